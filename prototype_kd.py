# SPDX-License-Identifier: MIT
"""Distilling Object Detectors with Global Knowledge (Tang et al., ECCV 2022, arXiv:2210.09022).

Idea. Two trained detectors see the same object in two feature spaces, which cannot be compared directly. So
pick, for each class, K objects whose features span BOTH spaces well: the prototypes (PGM). An object is then
described by its coordinates in the prototypes, K numbers that mean the same in either space: global
knowledge. The student is pulled to the teacher's coordinates. Where the two disagree about an object's
coordinates, what the teacher says of it may be noise: sigma, one minus the gap, weighs that loss and the two
usual ones, on features and on class scores (RDM). All of it on each FPN level by itself; prototypes are
picked anew every T epochs, as the student moves. Both detectors are trained before distillation starts. The
student that comes out is torchvision's Faster R-CNN or RetinaNet (from mmdetection's weights with its anchors
and RoIAlign): distillation adds nothing to it.

    Eq. 1  basis of one space       the known problem, which Eq. 2 replaces: not here
    Eq. 2  prototypes of two spaces select_prototypes, which solves it greedily
    Eq. 3  residuals                select_prototypes
    Eq. 4  objective                select_prototypes: `gain` is what a candidate takes off it
    Eq. 5  coefficients             coefficients, in closed form
    Alg. 1 selection                select_prototypes
    Eq. 6  global loss              project, global_loss
    Eq. 7  feature loss             feature_loss
    Eq. 8  sigma                    reliability
    (none) response loss            response_loss, kl_softmax, kl_bernoulli
    Eq. 9  weighted sum of all      Distiller.forward, summed in train
    Alg. 2 the whole                train, refresh, Bank.refresh

Differs from the paper:
  1. The largest: Eqs. 6 and 8 compare cosines with the prototypes. The authors' code does, for sigma, of the
     largest cosine alone (--sigma maxcos); its Eq. 6 never runs. The paper: "exactly the same as in Eq. 5".
     With its lambda = 10 gaps shrink by 21 (--proj independent; joint, ...: others), and sigma is near 1.
     By cosines, on shapes, Eq. 6 is 0.1 to 0.2 % of the loss; sigma, a constant here, is 0.15 to 0.5 with the
     first prototypes, 0 for up to half of the objects on a level, later 0.4 to 0.6.
  2. Eq. 7 is a mean over channels (1/D of the printed norm), cells and levels, not a sum. Its regions, those
     of FGFI, are the cells with an anchor whose IoU with a box is above half of the best that the box has on
     that level. H ends in a ReLU, as printed: it matches no negative value (--adapt conv1x1 does).
  3. Levels are averaged. The response has none: its sigma is that of the level on which the student's head
     sees the proposal. Positive proposals, tau 1, a sum over classes, a mean over proposals; of a cascade
     the heads' logits are averaged.
  4. RetinaNet's class scores are compared as independent probabilities (KL of each sigmoid).
  5. Prototypes come from --proto-max-images images of a class (800, from their code), at the largest size.
     Features are unit vectors; none is picked twice. sigma is kept within 0 and 1 (released: not).
  6. The student's BatchNorm is fixed, statistics and factors. Paper and code do not settle it (their config's
     "in eval mode" fixes the statistics only); --bn affine trains the factors. On shapes there is none.
--preset released: their configuration as it stands in PRESETS (no Eq. 6, sigma from the largest cosines,
objects = positive proposals on the level of their size, DeFeat's regions and background, a 3x3 H without
ReLU, tau 2, a linear decay, a density filter, no photometric distortion). It keeps items 5, 6, RoIAlign's
means (code: whole cells), the largest sigma where boxes overlap (code: the last), torchvision's losses.
What the student would gain by training on alone the paper does not say: where there is a validation set, the
same student is trained for as long WITHOUT distillation beside the distilled one, and both are printed.

Letters: B images, L = 5 levels, D, h, w of a map, n objects (instances), N all of a class (Eq. 6: of the
batch), K prototypes, C classes, m positive proposals or anchors; t teacher, s student. Boxes: xyxy pixels.

    torchrun --nproc_per_node 8 prototype_kd.py                    # COCO, Faster R-CNN R101 -> R50, 24 epochs
    torchrun --nproc_per_node 8 prototype_kd.py --row t1-retina    # a row of a table; --rows lists them
    python prototype_kd.py --data shapes                           # everything in minutes on a CPU
    python prototype_kd.py --predict photo.jpg --weights runs/prototype_kd/best.pt
    python prototype_kd.py --export student.pt2 --weights runs/retina/best.pt        # RetinaNet only
Own data (--train-json a.json --train-images a/ --val-json b.json --val-images b/): a teacher (--teacher none
--student faster_r101 --out r/t), a student (--teacher none --student faster_r50 --out r/s), then both
(--teacher r/t/best.pt --init r/s/best.pt). VOC's rows pass on last.pt: best.pt saw the test set.

Expected (paper, COCO val2017 AP, 8 GPUs x 2 images, 24 epochs): Faster R-CNN R50 38.4 -> 40.6 (teacher 39.8),
RetinaNet R50 37.4 -> 39.8 (teacher 38.9). COCO and VOC at full size not run here; shapes, tests/STUDIES.md:
AP 6.9 -> 7.7 (+0.8 +- 0.6); above plain training of like cost, and of Eq. 6, nothing is shown.
"""
import argparse
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper
from tqdm import tqdm

from common.boxes import constant
from common.datasets import (CocoDataset, as_pixels, check_classes, collate, eval_loader, find_coco,
                             own_files, parse_image_size, read_annotations, read_json, read_voc, resize,
                             start_worker, to_corners, train_loader)
from common.evaluation import Detections, class_table, coco_evaluate, judged, voc_evaluate
from common.run import (COUNT, POSITIVE, SEED, Run, UserError, answer_folder, check_teacher, checksum,
                        dash, describe_model, fast_layout, fold, fused, gather, given_flags, load_checkpoint,
                        load_strict, number, open_run, open_table, parse, parser, rebuilding, reduce_mean,
                        rows, run_flags, saved_run, seed_all, started, tell, tell_size, to_device,
                        warmup_multistep, with_defaults, wrap_ddp)

STRIDES = dict(faster=(4, 8, 16, 32, 64), retina=(8, 16, 32, 64, 128))  # of the five FPN levels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in [0, 1]


# ================================================================== the paper

class Step(NamedTuple):
    """A detector's own training step; its boxes are sampled proposals (Faster R-CNN) or all anchors."""
    losses: dict          # {name: scalar}, L_det of Eq. 9
    boxes: list           # B of (A_i, 4)
    positive: list        # B of (m_i,) places of the boxes that belong to an object
    objects: list         # B of (A_i,) the object in its image that a box belongs to, where it is positive
    logits: torch.Tensor  # of classes: (sum of A_i, C + 1), RetinaNet (B, A, C)


class Objects(NamedTuple):
    """The instances that are compared, of all images."""
    boxes: torch.Tensor   # (n, 4)
    owner: torch.Tensor   # (n,) image of the batch
    label: torch.Tensor   # (n,) class
    of_roi: torch.Tensor  # (m,) the instance that each positive proposal or anchor is of


class Known(NamedTuple):
    """What the prototypes say about n objects on L levels."""
    f_t: torch.Tensor     # (n, L, D_t) descriptors
    f_s: torch.Tensor     # (n, L, D_s)
    u_t: torch.Tensor     # the same, less the centre, as unit vectors
    u_s: torch.Tensor
    l_t: torch.Tensor     # (n, L, K) coordinates, Lambda
    l_s: torch.Tensor
    valid: torch.Tensor   # (n, L, K) bool: such a prototype exists


def fp32(x):
    """bf16 maps of autocast -> fp32, in which all statistics and losses are computed; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ------------------------------------------------------------------ PGM: prototypes

def coefficients(p_t, p_s, n_t, n_s, lam):
    """Eq. 5 solved for both unknowns at once: the coefficients w_t, w_s of a prototype.

    p_t, p_s: inner products with the prototype, any shape; n_t, n_s: its squared norms, broadcast; lam:
    lambda of Eq. 2. The two lines of Eq. 5 are (n_t + lam) w_t - lam w_s = p_t and (n_s + lam) w_s - lam w_t
    = p_s; this is Cramer's rule.
    """
    det = n_t * n_s + lam * (n_t + n_s)
    w_t = ((lam + n_s) * p_t + lam * p_s) / det  # Eq. 5
    w_s = ((lam + n_t) * p_s + lam * p_t) / det
    return w_t, w_s


def select_prototypes(f_t, f_s, k, lam, candidates=None):
    """Alg. 1: the instances that span both spaces best, greedily, by Eqs. 2 to 5.

    f_t (D_t, N), f_s (D_s, N), finite: columns at one place are one instance. candidates (N,) bool: those
    that may be picked; all N are to be reconstructed. Returns min(k, candidates that are not 0) distinct
    indices, best first.

    With p_t[c, i] = <r_t[i], f_t[c]>, adopting candidate c lowers Eq. 4 by sum_i p_t w_t + p_s w_s, where w
    is Eq. 5. That is quadratic in p: three numbers a candidate tell it, a_t = sum_i p_t^2, a_s = sum_i p_s^2,
    a_ts = sum_i p_t p_s. They start as quadratic forms of D x D covariances, and a pick changes every
    residual by a multiple of the prototype, so they follow by O(N D) updates: no residuals for each
    candidate, no N x N matrix. fp64, for the updates subtract.
    """
    f_t, f_s = f_t.double(), f_s.double()
    n_t, n_s = f_t.square().sum(0), f_s.square().sum(0)
    r_t, r_s = f_t, f_s                                       # Eq. 3, n = 0
    cov_tt = f_t @ f_t.T                                      # (D_t, D_t)
    cov_ss = f_s @ f_s.T
    cov_ts = f_t @ f_s.T
    a_t = (cov_tt @ f_t * f_t).sum(0)                         # (N,)
    a_s = (cov_ss @ f_s * f_s).sum(0)
    a_ts = (cov_ts @ f_s * f_t).sum(0)
    det = n_t * n_s + lam * (n_t + n_s)
    free = det > 0
    if candidates is not None:
        free = candidates & free
    picks = []
    for _ in range(min(k, int(free.sum()))):
        gain = ((lam + n_s) * a_t + 2 * lam * a_ts + (lam + n_t) * a_s) / det  # Eq. 4: what it falls by
        best = int(gain.masked_fill(~free, -math.inf).argmax())                # the first of equals
        picks.append(best)
        free[best] = False
        g_t, g_s = f_t[:, best], f_s[:, best]
        w_t, w_s = coefficients(g_t @ r_t, g_s @ r_s, n_t[best], n_s[best], lam)  # Eq. 5: (N,)
        s_t, s_s = g_t @ f_t, g_s @ f_s                       # p[c, i] falls by s[c] w[i]
        a_ts = a_ts - s_t * (r_s @ w_t @ f_s) - s_s * (r_t @ w_s @ f_t) + s_t * s_s * (w_t @ w_s)
        a_t = a_t - 2 * s_t * (r_t @ w_t @ f_t) + s_t.square() * (w_t @ w_t)
        a_s = a_s - 2 * s_s * (r_s @ w_s @ f_s) + s_s.square() * (w_s @ w_s)
        r_t = r_t - torch.outer(g_t, w_t)                     # Eq. 3
        r_s = r_s - torch.outer(g_s, w_s)
    return torch.tensor(picks, dtype=torch.long, device=f_t.device)


def descriptors(maps, strides, boxes, owner):
    """Mean feature inside each box on every level: (n, L, D).

    maps: L of (B, D, h, w); boxes (n, 4) pixels, owner (n,) image of the batch. 8 x 8 bilinear samples a box,
    RoIAlign's: the cost does not grow with the box.
    """
    rois = torch.cat([owner[:, None].to(boxes), boxes], 1)
    levels = []
    for x, stride in zip(maps, strides):
        x = fp32(x)
        mean = roi_align(x, rois.to(x.dtype), 1, 1 / stride, sampling_ratio=8, aligned=True)
        levels.append(mean.flatten(1))
    return torch.stack(levels, 1)


class Instances:
    """The objects that prototypes are picked from: all of max_images images of each class, drawn once by
    seed.

    trained: the training set; its images are seen as evaluation sees them, with the boxes of training. An
    object's id: the place of its image in the dataset times 10,000, plus its place there. Blocks of 8
    neighbouring images are shared out to the processes: each image stands in one batch, and what shares a
    batch does not depend on the number of processes. min_size: pixels of the file, of both sides of a
    prototype.
    """

    def __init__(self, trained, image_size, max_images, min_size, seed, workers, rank, world):
        data = CocoDataset(trained.folder, trained.records, False, image_size, small=True)
        records, used = data.records, np.flatnonzero(data.used)
        corners = to_corners(records.xywh[used])
        sides = corners[:, 2:] - corners[:, :2]
        large, area = (sides.min(1) > min_size).tolist(), sides.prod(1).tolist()
        label, owner = data.label_of[records.label[used]].tolist(), records.owner[used]
        first, end = (np.searchsorted(owner, data.kept, side).tolist() for side in ("left", "right"))
        count, chosen, self.area, self.rank = Counter(), [], {}, rank
        for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist():
            boxes = range(first[i], end[i])  # of image i, in `used`
            wanted = [k for k in boxes if large[k] and count[label[k]] < max_images]
            if wanted:
                chosen.append(i)
                count.update({label[k] for k in wanted})
                self.area |= {i * 10000 + k - first[i]: area[k] for k in wanted}
        if not chosen:
            raise UserError("prototypes: no image holds an object to make them of; lower --proto-min-size")
        chosen.sort()
        self.index = {records.image_id(data.kept[i]): i for i in chosen}
        blocks = [[(i, 0) for i in chosen[b:b + 8]] for b in range(0, len(chosen), 8)][rank::world]
        self.loader = DataLoader(data, batch_sampler=blocks, num_workers=workers, collate_fn=collate,
                                 worker_init_fn=start_worker, generator=torch.Generator())


@torch.no_grad()
def extract(model, instances, device, amp=False):
    """(ids (n,), labels (n,), features (n, L, D) on the CPU) of this process's share of the Instances."""
    training, found, wanted = model.training, [], set(instances.area)
    model.eval()
    hidden = instances.rank != 0
    for batch in tqdm(instances.loader, desc="instances", leave=False, mininterval=1, disable=hidden):
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            maps = list(model.backbone(images_of(batch).tensors).values())
        image, slot = (batch["labels"] >= 0).nonzero(as_tuple=True)
        ids = []
        for i, k in zip(image.tolist(), slot.tolist()):
            ids.append(instances.index[batch["image_ids"][i]] * 10000 + k)
        keep = [k for k, i in enumerate(ids) if i in wanted]
        image, slot = image[keep], slot[keep]
        f = descriptors(maps, STRIDES[kind_of(model)], batch["boxes"][image, slot], image)
        kept = torch.tensor([ids[k] for k in keep], dtype=torch.long)
        found.append((kept, batch["labels"][image, slot].cpu(), f.cpu()))
    model.train(training)
    if not found:
        return torch.zeros(0).long(), torch.zeros(0).long(), None
    return tuple(torch.cat(part) for part in zip(*found))


def by_class(extracted, classes, rank, world):
    """{class: (ids, features)} in the order of ids, of classes rank, rank + world, ...: each process solves
    its own, and holds no other's features."""
    ids, labels, features = extracted
    mine = {}
    for c in range(classes):
        here = labels == c
        part = (ids[here], features[here]) if here.any() else None
        parts = [part]
        if world > 1:
            parts = [None] * world
            dist.gather_object(part, parts if rank == c % world else None, dst=c % world)
        parts = [p for p in parts if p]
        if rank == c % world and parts:
            ids_c, f = (torch.cat(x) for x in zip(*parts))
            order = ids_c.argsort()
            mine[c] = ids_c[order], f[order]
    return mine


def all_gather(item):
    """The items of all processes, as a list, on all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


class Bank:
    """Prototypes of C classes on L levels, the same in every process: g_t, g_s (C, L, K, D) unit vectors,
    valid (C, L, K) bool, ids (C, L, K): the instances they are; center_t, center_s (L, D): what was
    subtracted from the features (0 without `center`).

    method, space, density: how they are chosen where it is not by Alg. 1, see choose_otherwise.
    """
    NAMES = "g_t", "g_s", "valid", "ids", "center_t", "center_s"

    def __init__(self, instances, classes, k=10, lam=10.0, center=False, method="pgm", space="both",
                 density=0.0, seed=0, amp=False):
        self.instances, self.classes, self.k, self.lam, self.center = instances, classes, k, lam, center
        self.method, self.space, self.density, self.seed, self.amp = method, space, density, seed, amp
        self.teacher_features = None

    def refresh(self, student, teacher, device, rank, world):
        """Alg. 2, lines 4 and 5; the teacher's features are extracted the first time only. Returns what there
        is to log."""
        since, count = time.time(), len(self.classes)
        before = members(self.ids) if hasattr(self, "ids") else None
        if self.teacher_features is None:
            found = extract(teacher, self.instances, device, self.amp)
            self.teacher_features = by_class(found, count, rank, world)
        found = extract(student, self.instances, device, self.amp)
        pairs = {}                                            # {class: (ids (N,), f_t, f_s (N, L, D))}
        for c, (ids, f_s) in by_class(found, count, rank, world).items():
            pairs[c] = ids, self.teacher_features[c][1], f_s
        counts, *centers = self.centers(pairs)
        picked = self.choose(pairs, *centers, device)
        self.load(self.gathered(picked, *centers), device)
        return dict(self.changes(before, counts), seconds=time.time() - since)

    def centers(self, pairs):
        """(instances of each class (C,), what is subtracted from teacher's and student's features (L, D):
        their means with `center`, else 0). Summed class by class: the same bits for any number of
        processes."""
        mine = {}
        for c, (ids, f_t, f_s) in pairs.items():
            mine[c] = len(ids), f_t.double().sum(0), f_s.double().sum(0)
        sums = {}
        for part in all_gather(mine):
            sums |= part
        counts = torch.tensor([sums[c][0] if c in sums else 0 for c in range(len(self.classes))])
        means = []
        for i, name in ((1, "teacher"), (2, "student")):
            mean = sum(sums[c][i] for c in sorted(sums)) / counts.sum()
            if not mean.isfinite().all():
                raise UserError(f"prototypes: the {name}'s features are not finite; its weights are damaged, "
                                "or --lr is too high")
            means.append(mean.float() * self.center)
        return counts, *means

    def choose(self, pairs, center_t, center_s, device):
        """{(class, level): (ids (k,), g_t, g_s (k, D))} of this process's classes."""
        picked = {}
        for c, (ids, f_t, f_s) in pairs.items():
            u_t = F.normalize(f_t - center_t, dim=-1).to(device)
            u_s = F.normalize(f_s - center_s, dim=-1).to(device)
            for level in range(f_s.shape[1]):
                picks = self.pick(u_t[:, level].T, u_s[:, level].T, ids).cpu()
                picked[c, level] = ids[picks], u_t[picks, level].cpu(), u_s[picks, level].cpu()
        return picked

    def pick(self, u_t, u_s, ids):
        """Places of the K prototypes of one class on one level; u (D, N)."""
        if (self.method, self.space, self.density) == ("pgm", "both", 0):
            return select_prototypes(u_t, u_s, self.k, self.lam)
        area = torch.tensor([self.instances.area[i] for i in ids.tolist()])
        return choose_otherwise(u_t, u_s, ids, area, self.method, self.space, self.density, self.k, self.lam,
                                self.seed)

    def gathered(self, picked, center_t, center_s):
        """The bank's tensors, of what all processes picked."""
        levels, d_t = center_t.shape
        shape = len(self.classes), levels, self.k
        g_t, g_s = torch.zeros(*shape, d_t), torch.zeros(*shape, center_s.shape[1])
        valid, ids = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
        for part in all_gather(picked):
            for (c, level), (ids_c, t, s) in part.items():
                k = len(ids_c)
                ids[c, level, :k], g_t[c, level, :k], g_s[c, level, :k] = ids_c, t, s
                valid[c, level, :k] = True
        return dict(g_t=g_t, g_s=g_s, valid=valid, ids=ids, center_t=center_t, center_s=center_s)

    def changes(self, before, counts):
        """kept: share of the prototypes that were there before; -1 the first time."""
        now = members(self.ids)
        kept = len(now & before) / len(now) if before else -1.0
        counts = counts.tolist()
        without = [name for name, n in zip(self.classes, counts) if n == 0]
        fewest = self.valid.sum(-1).amin(1).tolist()          # of a level
        few = [name for name, n, k in zip(self.classes, counts, fewest) if n and k < self.k]
        return dict(prototypes=int(self.valid.sum()), instances=sum(counts), kept=kept, without=without,
                    few=few)

    def is_due(self, it, span):
        """Whether prototypes are picked anew after `it` steps: every `span`, not always a whole number."""
        return not hasattr(self, "ids") or it // span > (it - 1) // span

    def load(self, tensors, device):
        for name in self.NAMES:
            setattr(self, name, tensors[name].to(device))

    def tensors(self):
        return {name: getattr(self, name).cpu() for name in self.NAMES} if hasattr(self, "ids") else None


def members(ids):
    """{(class, level, instance)} of a bank's ids (C, L, K)."""
    found = set()
    for c, level, k in (ids >= 0).nonzero().tolist():
        found.add((c, level, int(ids[c, level, k])))
    return found


# ------------------------------------------------------------------ RDM: distances

def project(f_t, f_s, g_t, g_s, valid):
    """Coordinates of instances in the prototypes, Lambda_t and Lambda_s (..., K): cosines. Other readings of
    the paper: project_by_eq5.

    f (..., D), g (..., K, D): unit vectors; valid (..., K) bool: 0 where a prototype is missing.
    """
    l_t = (g_t @ f_t[..., None])[..., 0] * valid
    l_s = (g_s @ f_s[..., None])[..., 0] * valid
    return l_t, l_s


def reliability(l_t, l_s, valid, clamp=True):
    """Eq. 8: sigma (...,) of instances from their coordinates (..., K); a constant. No prototype: 1."""
    gap = ((l_s.detach() - l_t.detach()).square() * valid).sum(-1).sqrt()
    sigma = 1 - gap                                           # Eq. 8
    return sigma.clamp(0, 1) if clamp else sigma


def global_gap(l_t, l_s, valid):
    """Mean over its prototypes of an instance's squared gaps (..., K) -> (...,): Eq. 6's norm over K."""
    return ((l_s - l_t).square() * valid).sum(-1) / valid.sum(-1).clamp(min=1)


def global_loss(l_t, l_s, valid, sigma, own, levels):
    """Eq. 6, mean over levels. l_t, l_s, valid (n, L, K) of project; sigma (n, L); own (n, L) bool: the
    levels that an object counts on, `levels` each. An object without prototypes adds nothing but counts in
    N. Divided by the prototypes that there are where a class has fewer than K."""
    N = reduce_mean(torch.full((), float(len(l_s)), device=l_s.device), 1.0)
    return (sigma * global_gap(l_t, l_s, valid) * own).sum() / (2 * N * levels)  # Eq. 6


def level_of(boxes, kind, smallest=32):
    """Level that a box belongs to, 0 to 4. Faster R-CNN: side 112 is the border of 0 and 1 (FPN's Eq. 1);
    RetinaNet: twice the side of its `smallest` anchor."""
    w, h = (boxes[:, 2] - boxes[:, 0]).clamp(min=0), (boxes[:, 3] - boxes[:, 1]).clamp(min=0)
    side = (w * h).sqrt() / (56 if kind == "faster" else smallest)
    return side.clamp(min=1e-6).log2().add(1e-6).floor().clamp(0, 4).long()


def best_anchors(boxes, anchors, size):
    """(n, h, w) bool, FGFI (Wang et al. 2019): cells with an anchor whose IoU with the box is above half of
    the best that the level has."""
    iou = box_iou(boxes, anchors).view(len(boxes), *size, len(anchors) // size.numel())
    return (iou > 0.5 * iou.amax((1, 2, 3), keepdim=True)).any(-1)


def paint(cells, owner, value, count):
    """Objects that hold cells (n, h, w) bool of image owner (n,) -> their largest value (n,) >= 0 at each
    cell (count, h, w), and (count, h, w) bool: cells of any object."""
    index = owner[:, None, None].expand_as(cells)
    empty = value.new_zeros(count, *cells.shape[1:])
    weight = empty.scatter_reduce(0, index, cells * value[:, None, None], "amax")
    inside = torch.zeros_like(empty, dtype=torch.uint8).scatter_reduce(0, index, cells.byte(), "amax")
    return weight, inside.bool()


def feature_loss(gaps, cells, owner, sigma):
    """Eq. 7 on each level, mean over levels.

    gaps: L of (B, h, w), (H(student) - teacher).square().mean(1); cells: L of (n, h, w)
    bool; owner (n,), sigma (n, L) of the objects. A cell has the largest sigma of the objects that hold it;
    divided by the number of cells where the paper has that of objects, so that their size does not count.
    """
    sums, norms = [], []
    for level, (gap, held) in enumerate(zip(gaps, cells)):
        weight, inside = paint(held, owner, sigma[:, level], len(gap))
        sums.append((weight * gap).sum() / 2)                 # Eq. 7
        norms.append(inside.sum().float())
    norms = reduce_mean(torch.stack(norms), 1.0)
    return (torch.stack(sums) / norms).sum() / len(gaps)


def kl_softmax(z_t, z_s, tau):
    """tau^2 KL(teacher || student) of softmax logits (n, C) -> (n,)."""
    log_t = F.log_softmax(z_t.detach() / tau, -1)
    log_s = F.log_softmax(z_s / tau, -1)
    return (log_t.exp() * (log_t - log_s)).sum(-1) * tau**2


def kl_bernoulli(z_t, z_s, tau):
    """The same for independent classes, (n,): sum over classes of the KL of each sigmoid."""
    z_t, z_s = z_t.detach() / tau, z_s / tau
    p = z_t.sigmoid()
    yes = p * (F.logsigmoid(z_t) - F.logsigmoid(z_s))
    no = (1 - p) * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))
    return (yes + no).sum(-1) * tau**2


def response_loss(student, teacher, step, t_maps, images, sigma, tau=1.0, over_classes="sum"):
    """KL of the class scores of positive proposals (anchors), weighted by the sigma (m,) of their objects,
    over their number; the teacher answers the student's proposals. over_classes "mean": divided by the
    classes."""
    s_columns = constant(student.arch["columns"], sigma.device, torch.long)
    t_columns = constant(teacher.arch["columns"], sigma.device, torch.long)
    if kind_of(student) == "faster":
        starts = constant([0, *map(len, step.boxes)], sigma.device, torch.long).cumsum(0)
        z_s = step.logits[torch.cat([p + start for p, start in zip(step.positive, starts)])]
        with torch.no_grad():
            rois = [b[p] for b, p in zip(step.boxes, step.positive)]
            z_t = box_logits(teacher, t_maps, rois, images.image_sizes)
        z_s = z_s[:, F.pad(s_columns, (1, 0))]                # the background is 0 in both
        z_t = z_t[:, F.pad(t_columns, (1, 0))]
        kl = kl_softmax(z_t, z_s, tau)
    else:
        with torch.no_grad():
            z_t = teacher.head.classification_head(list(t_maps.values()))
        z_s = torch.cat([z[p] for z, p in zip(step.logits, step.positive)])[:, s_columns]
        z_t = torch.cat([z[p] for z, p in zip(z_t, step.positive)])[:, t_columns]
        kl = kl_bernoulli(z_t, z_s, tau)
    if over_classes == "mean":
        kl = kl / z_s.shape[1]
    m = constant(float(sum(map(len, step.positive))), sigma.device, torch.float32)
    return (kl * sigma).sum() / reduce_mean(m, 1.0)


# ------------------------------------------------------------------ the algorithm

def adapter(name, d_s, d_t):
    """H of Eq. 7: the student's map at the teacher's width."""
    if name == "conv3x3":
        return nn.Conv2d(d_s, d_t, 3, padding=1)
    conv = nn.Conv2d(d_s, d_t, 1)
    return nn.Sequential(conv, nn.ReLU()) if name == "conv1x1relu" else conv


class Distiller(nn.Module):
    """The student and its losses: forward(batch) -> {name: weighted loss}, whose sum is Eq. 9.

    teacher: None (then this is torchvision's own training step, bit by bit), or the frozen detector, kept
    outside the module tree; bank: its Bank, refreshed by the caller. alpha_global, alpha_feat, alpha_resp:
    alpha 1 to 3 of Eq. 9. adapt: H of Eq. 7. tau, over_classes: see response_loss.
    """

    def __init__(self, student, teacher=None, bank=None, alpha_global=1.0, alpha_feat=1.0, alpha_resp=5.0,
                 adapt="conv1x1relu", tau=1.0, over_classes="sum", amp=False):
        super().__init__()
        self.student, self.kind, self.strides = student, kind_of(student), STRIDES[kind_of(student)]
        # In a tuple, so that parameters(), state_dict(), train(), DDP and the optimizer never see it.
        self.teacher = (teacher.eval().requires_grad_(False),) if teacher else ()
        self.bank, self.amp, self.tau, self.over_classes = bank, amp, tau, over_classes
        self.alpha_global, self.alpha_feat, self.alpha_resp = alpha_global, alpha_feat, alpha_resp
        self.levels_each = len(self.strides)                  # levels that an object counts on
        self.watch = {}                                       # numbers to log that are no losses
        if teacher and alpha_feat:
            dims = student.backbone.out_channels, teacher.backbone.out_channels
            self.adapters = nn.ModuleList(adapter(adapt, *dims) for _ in self.strides)

    def train(self, mode=True):
        """BatchNorm of a pre-trained backbone keeps its running statistics: 2 images a GPU are too few."""
        super().train(mode)
        if getattr(self.student, "norms_fixed", False):
            for m in self.student.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()
        return self

    def forward(self, batch):
        student, images = self.student, images_of(batch)
        maps = self.maps_of(student, images)
        step = train_step(student, images, maps, batch)
        if not self.teacher:
            return step.losses
        teacher, = self.teacher
        with torch.no_grad():
            t_maps = self.maps_of(teacher, images)
        objects = self.objects_of(batch, step)
        own = self.levels_of(objects)                         # (n, L) bool
        known = self.knowledge(maps, t_maps, objects)
        sigma = self.sigma_of(known)                          # (n, L)
        losses = dict(step.losses)
        if self.alpha_global:
            losses |= self.relations(known, sigma, own)
        if self.alpha_feat:
            losses["feat"] = self.alpha_feat * self.features(maps, t_maps, images, objects, sigma, own)
        if self.alpha_resp:
            weight = sigma[objects.of_roi, self.head_levels(step, maps)]
            losses["resp"] = self.alpha_resp * response_loss(student, teacher, step, t_maps, images, weight,
                                                             self.tau, self.over_classes)
        with torch.no_grad():
            total = own.sum().clamp(min=1)
            self.watch = dict(sigma=(sigma * own).sum() / total, muted=((sigma <= 0) & own).sum() / total)
        return losses                                         # Eq. 9

    def maps_of(self, detector, images):
        """{level: map}, fp32."""
        with torch.autocast(images.tensors.device.type, torch.bfloat16, enabled=self.amp):
            maps = detector.backbone(images.tensors)
        return {name: fp32(x) for name, x in maps.items()}

    def objects_of(self, batch, step):
        """The true boxes."""
        owner, slot = (batch["labels"] >= 0).nonzero(as_tuple=True)
        starts = constant([0, *batch["counts"]], owner.device, torch.long).cumsum(0)
        of_roi = []
        for start, objects, positive in zip(starts, step.objects, step.positive):
            of_roi.append(start + objects[positive])
        return Objects(batch["boxes"][owner, slot], owner, batch["labels"][owner, slot], torch.cat(of_roi))

    def head_levels(self, step, maps):
        """(m,) level on which the student's head sees each positive proposal or anchor."""
        if self.kind == "faster":
            boxes = torch.cat([b[p] for b, p in zip(step.boxes, step.positive)])
            return level_of(boxes, "faster").clamp(max=3)
        cells = [x.shape[2] * x.shape[3] for x in maps.values()]
        anchors = len(step.boxes[0]) // sum(cells)            # of a cell
        ends = constant([anchors * n for n in cells], step.positive[0].device, torch.long).cumsum(0)
        return torch.bucketize(torch.cat(step.positive), ends, right=True)

    def levels_of(self, objects):
        """(n, L) bool: an object counts on every level."""
        shape = len(objects.boxes), len(self.strides)
        return torch.ones(shape, dtype=torch.bool, device=objects.boxes.device)

    def knowledge(self, maps, t_maps, objects):
        """Descriptors of the objects and their coordinates in their class's prototypes."""
        bank, c = self.bank, objects.label
        f_s = descriptors(list(maps.values()), self.strides, objects.boxes, objects.owner)
        f_t = descriptors(list(t_maps.values()), self.strides, objects.boxes, objects.owner)
        u_s = F.normalize(f_s - bank.center_s, dim=-1)
        u_t = F.normalize(f_t - bank.center_t, dim=-1)
        l_t, l_s = project(u_t, u_s, bank.g_t[c], bank.g_s[c], bank.valid[c])
        return Known(f_t, f_s, u_t, u_s, l_t, l_s, bank.valid[c])

    def sigma_of(self, known):
        return reliability(known.l_t, known.l_s, known.valid)

    def relations(self, known, sigma, own):
        loss = global_loss(known.l_t, known.l_s, known.valid, sigma, own, self.levels_each)
        return {"global": self.alpha_global * loss}

    def gaps(self, maps, t_maps):
        """L of (B, h, w): squared gap of H(student's map) and the teacher's, mean over channels."""
        found = []
        for x, y, h in zip(maps.values(), t_maps.values(), self.adapters):
            found.append((h(x) - y).square().mean(1))
        return found

    def cells_of(self, maps, images, objects):
        """L of (n, h, w) bool: where a level has a good anchor for an object."""
        anchors = level_anchors(self.student, images, list(maps.values()))
        cells = []
        for x, level in zip(maps.values(), anchors):
            cells.append(best_anchors(objects.boxes, level, x.shape[-2:]))
        return cells

    def features(self, maps, t_maps, images, objects, sigma, own):
        gaps, cells = self.gaps(maps, t_maps), self.cells_of(maps, images, objects)
        return feature_loss(gaps, cells, objects.owner, sigma)


# ================================================================== what its tables compare with

def choose_otherwise(f_t, f_s, ids, area, method, space, density, k, lam, seed):
    """Places of k prototypes by Table 6's other ways, and by the released code's filter.

    f (D, N) unit columns, ids (N,), area (N,) pixels. method: pgm; ambiguous, the smallest; random, which the
    paper lacks; kmeans, dbscan, of one space. space: whose features. density: see dense; for pgm only.
    """
    first, second = f_t, f_s
    if space == "student":
        first = f_s
    if space == "teacher":
        second = f_t
    if method == "ambiguous":
        return area.argsort(stable=True)[:k]
    if method == "random":
        generator = torch.Generator().manual_seed(int(ids[0]) + seed)
        return torch.randperm(len(ids), generator=generator)[:k]
    if method in ("kmeans", "dbscan"):
        return cluster_medoids(first, min(k, len(ids)), method, seed)
    keep = None
    if density:
        keep = dense(f_t, density) & dense(f_s, density)
        keep = keep if keep.any() else None
    return select_prototypes(first, second, k, lam, keep)


def dense(f, share):
    """(N,) bool: columns of f (D, N), unit, whose density, sum of exp(-((1 - cos) / 0.1)^2) over all, lies
    above the `share` quantile (released code only)."""
    parts = []
    for part in f.split(1024, 1):
        parts.append(torch.exp(-((1 - part.T @ f) / 0.1).square()).sum(1))
    rho = torch.cat(parts)
    return rho > rho.quantile(share) if f.shape[1] > 2 else torch.ones_like(rho, dtype=torch.bool)


def cluster_medoids(f, k, method, seed):
    """k distinct columns of f (D, N) nearest to the centres of k clusters (Table 6): k-means, or DBSCAN on
    cosine distance, largest clusters first; where there are fewer, the most central of the others."""
    from sklearn.cluster import DBSCAN, KMeans  # needed here only
    clusters = DBSCAN(eps=0.1, min_samples=3, metric="cosine")
    if method == "kmeans":
        clusters = KMeans(k, n_init=1, random_state=seed)
    label = torch.from_numpy(clusters.fit(f.T.double().cpu().numpy()).labels_).long().to(f.device)
    size = {g: int((label == g).sum()) for g in label.unique().tolist() if g >= 0}  # -1: in no cluster
    picks = []
    for g in sorted(size, key=lambda g: (-size[g], g))[:k]:
        columns = (label == g).nonzero()[:, 0]
        mean = f[:, columns].mean(1, keepdim=True)
        nearest = (f[:, columns] - mean).square().sum(0).argmin()
        picks.append(int(columns[nearest]))
    central = (f.T @ f.mean(1)).argsort(descending=True, stable=True).tolist()
    picks += [i for i in central if i not in picks]
    return torch.tensor(picks[:k], dtype=torch.long, device=f.device)


def project_by_eq5(f_t, f_s, g_t, g_s, valid, how, lam):
    """Coordinates (..., K) as the paper's word, "exactly the same as in Eq. 5", can be read; shapes as
    project.

    independent: each prototype alone, which couples the two spaces by lambda. joint: the minimiser of Eq. 2
    for given prototypes. sequential: prototype by prototype, each on the residual that the earlier ones
    leave, as Alg. 1 fills it. All couple the spaces: Lambda_t, too, has a gradient. The last two solve
    Q z = p. With unknowns in pairs, z = (t_1, s_1, t_2, s_2, ...), Q is a K x K table of 2 x 2 blocks, <.,.>
    of prototypes k and j:

        k = j   <g_t, g_t> + lam       -lam           k != j   <g_t, g_t>       0
                      -lam       <g_s, g_s> + lam                   0       <g_s, g_s>

    sequential drops the blocks above the diagonal: one block Gauss-Seidel sweep.
    """
    p_t = (g_t @ f_t[..., None])[..., 0] * valid
    p_s = (g_s @ f_s[..., None])[..., 0] * valid
    one = torch.ones((), dtype=g_t.dtype, device=g_t.device)
    n_t = g_t.square().sum(-1).where(valid, one)              # 1 where it is missing: Q has an inverse
    n_s = g_s.square().sum(-1).where(valid, one)
    if how == "independent":
        l_t, l_s = coefficients(p_t, p_s, n_t, n_s, lam)      # Eq. 5
        return l_t * valid, l_s * valid
    k = valid.shape[-1]
    eye = torch.eye(k, dtype=p_t.dtype, device=p_t.device)
    different = valid[..., :, None] & valid[..., None, :] & (eye == 0)
    Q = p_t.new_zeros(*p_t.shape, 2, k, 2)                    # (..., K, 2, K, 2): k, t or s, j, t or s
    Q[..., :, 0, :, 0] = (g_t @ g_t.transpose(-1, -2)) * different + eye * (n_t[..., None] + lam)
    Q[..., :, 1, :, 1] = (g_s @ g_s.transpose(-1, -2)) * different + eye * (n_s[..., None] + lam)
    Q[..., :, 0, :, 1] = -lam * eye
    Q[..., :, 1, :, 0] = -lam * eye
    if how == "sequential":
        Q = Q * eye.new_ones(k, k).tril()[:, None, :, None]
    Q = Q.flatten(-2).flatten(-3, -2)                         # (..., 2 K, 2 K)
    p = torch.stack([p_t, p_s], -1).flatten(-2)               # (..., 2 K)
    tiny = 10 * torch.finfo(Q.dtype).eps                      # two prototypes may be alike in both spaces
    Q = Q + tiny * torch.eye(2 * k, dtype=Q.dtype, device=Q.device)
    z = torch.linalg.solve_ex(Q, p)[0].unflatten(-1, (k, 2))
    return z[..., 0] * valid, z[..., 1] * valid


def reliability_of_largest(l_t, l_s, valid, clamp=True):
    """The released code's sigma (...,): one minus the gap of the largest cosines (..., K). No prototype:
    1."""
    best_t = l_t.detach().masked_fill(~valid, -2).amax(-1)
    best_s = l_s.detach().masked_fill(~valid, -2).amax(-1)
    sigma = 1 - (best_s - best_t).abs()
    return sigma.clamp(0, 1) if clamp else sigma


def rkd_loss(f_t, f_s):
    """RKD (Park et al. 2019), distances and angles of all instances (n, D): a baseline of Table 4. Scalar; 0
    for fewer than 2 (3 for angles)."""
    def distances(f):
        d = (f[:, None] - f[None]).square().sum(-1).clamp(min=1e-12).sqrt()
        off = ~torch.eye(len(f), dtype=torch.bool, device=f.device)
        return d[off] / d[off].mean().clamp(min=1e-6)

    def angles(f):
        e = F.normalize(f[None] - f[:, None], dim=-1)         # (n, n, D) from i to j
        return (e @ e.transpose(1, 2)).flatten()

    loss = f_s.sum() * 0
    if len(f_s) > 1:
        loss = loss + F.smooth_l1_loss(distances(f_s), distances(f_t.detach()))
    if len(f_s) > 2:
        loss = loss + 2 * F.smooth_l1_loss(angles(f_s), angles(f_t.detach()))
    return loss


def inside_box(boxes, size, stride):
    """(n, h, w) bool, DeFeat (Guo et al. 2021): cells whose centre a box (n, 4) covers; on an axis where
    it covers none, the one that its own centre is in."""
    h, w = size
    cells = []
    for low, high, count in ((boxes[:, 1], boxes[:, 3], h), (boxes[:, 0], boxes[:, 2], w)):
        at = (torch.arange(count, device=boxes.device) + 0.5) * stride
        covered = (at >= low[:, None]) & (at < high[:, None])
        nearest = F.one_hot(((low + high) / 2 / stride).long().clamp(0, count - 1), count).bool()
        cells.append(torch.where(covered.any(1, keepdim=True), covered, nearest))
    return cells[0][:, :, None] & cells[1][:, None]


def defeat_loss(gaps, cells, owner, sigma, background=4.0, by_sigma=False):
    """feature_loss, and DeFeat's term of the other cells, weight `background`. by_sigma: as the released code
    divides, by the sum of sigma, and what sigma mutes is background."""
    sums, norms = [], []
    for level, (gap, held) in enumerate(zip(gaps, cells)):
        weight, inside = paint(held, owner, sigma[:, level].clamp(min=0), len(gap))
        if by_sigma:
            inside = weight > 0
        sums += [(weight * gap).sum() / 2, background * (gap * ~inside).sum() / 2]
        norms += [weight.sum() if by_sigma else inside.sum().float(), (~inside).sum().float()]
    norms = reduce_mean(torch.stack(norms), 1.0)
    return (torch.stack(sums) / norms).sum() / len(gaps)


class Comparison(Distiller):
    """What the tables and --preset released compare the paper's losses with, each in its place of forward.

    bank: None where nothing reads prototypes. relation: "global", or "rkd" on all levels, without sigma.
    every_class: Eq. 6 over the prototypes of all classes. proj, lam: see project_by_eq5, or "cosine". sigma:
    "l2", "maxcos", "none"; clamp: to [0, 1]. instances: "gt", or the student's positive "proposals". levels:
    "all", or the one of the object's size, "fpn". cells: "fgfi" or "defeat". background, by_sigma: see
    defeat_loss.
    """

    def __init__(self, student, teacher, bank=None, relation="global", every_class=False, proj="cosine",
                 lam=10.0, sigma="l2", clamp=True, instances="gt", levels="all", cells="fgfi", background=0.0,
                 by_sigma=False, **options):
        super().__init__(student, teacher, bank, **options)
        self.relation, self.every_class, self.proj, self.lam = relation, every_class, proj, lam
        self.sigma, self.clamp, self.instances, self.levels = sigma, clamp, instances, levels
        self.cells, self.background, self.by_sigma = cells, background, by_sigma
        self.decay = 1.0                                      # of global and feature losses; the caller's
        if levels == "fpn":
            self.levels_each = 1

    def forward(self, batch):
        losses = super().forward(batch)
        for name in {"global", "rkd", "feat"} & set(losses):
            losses[name] = losses[name] * self.decay
        return losses

    def objects_of(self, batch, step):
        if self.instances == "gt":
            return super().objects_of(batch, step)
        boxes = torch.cat([b[p] for b, p in zip(step.boxes, step.positive)])
        slot = torch.cat([o[p] for o, p in zip(step.objects, step.positive)])
        owner = torch.cat([torch.full_like(p, i) for i, p in enumerate(step.positive)])
        of_roi = torch.arange(len(boxes), device=boxes.device)
        return Objects(boxes, owner, batch["labels"][owner, slot], of_roi)

    def levels_of(self, objects):
        if self.levels == "all":
            return super().levels_of(objects)
        smallest = self.student.anchor_generator.sizes[0][0] if self.kind == "retina" else None
        return F.one_hot(level_of(objects.boxes, self.kind, smallest), len(self.strides)).bool()

    def knowledge(self, maps, t_maps, objects):
        if self.bank is None:
            f_s = descriptors(list(maps.values()), self.strides, objects.boxes, objects.owner)
            f_t = descriptors(list(t_maps.values()), self.strides, objects.boxes, objects.owner)
            return Known(f_t, f_s, None, None, None, None, None)
        known, bank, c = super().knowledge(maps, t_maps, objects), self.bank, objects.label
        if self.proj == "cosine":
            return known
        l_t, l_s = project_by_eq5(known.u_t, known.u_s, bank.g_t[c], bank.g_s[c], known.valid, self.proj,
                                  self.lam)
        return known._replace(l_t=l_t, l_s=l_s)

    def sigma_of(self, known):
        if self.bank is None or self.sigma == "none":
            return torch.ones(known.f_s.shape[:2], device=known.f_s.device)
        function = reliability_of_largest if self.sigma == "maxcos" else reliability
        return function(known.l_t, known.l_s, known.valid, self.clamp)

    def relations(self, known, sigma, own):
        if self.relation == "rkd":
            levels = range(len(self.strides))
            loss = sum(rkd_loss(known.f_t[:, i], known.f_s[:, i]) for i in levels) / len(levels)
            return dict(rkd=self.alpha_global * loss)
        if self.every_class:
            known = self.against_every_class(known)
        return super().relations(known, sigma, own)

    def against_every_class(self, known):
        """Coordinates in the prototypes of all classes: (n, L, C K)."""
        bank = self.bank
        g_t, g_s = (g.transpose(0, 1).flatten(1, 2) for g in (bank.g_t, bank.g_s))  # (L, C K, D)
        l_t = (known.u_t.transpose(0, 1) @ g_t.transpose(1, 2)).transpose(0, 1)
        l_s = (known.u_s.transpose(0, 1) @ g_s.transpose(1, 2)).transpose(0, 1)
        valid = bank.valid.transpose(0, 1).flatten(1, 2).expand(len(l_s), -1, -1)
        return known._replace(l_t=l_t, l_s=l_s, valid=valid)

    def cells_of(self, maps, images, objects):
        if self.cells == "fgfi":
            return super().cells_of(maps, images, objects)
        return [inside_box(objects.boxes, x.shape[-2:], s) for x, s in zip(maps.values(), self.strides)]

    def features(self, maps, t_maps, images, objects, sigma, own):
        gaps, cells = self.gaps(maps, t_maps), self.cells_of(maps, images, objects)
        cells = [held & own[:, level, None, None] for level, held in enumerate(cells)]
        if self.background or self.by_sigma:
            return defeat_loss(gaps, cells, objects.owner, sigma, self.background, self.by_sigma)
        return feature_loss(gaps, cells, objects.owner, sigma)


# ================================================================== detector

NEW = "imagenet", "shapes", "none"  # what an untrained detector's backbone may start from
BACKBONES = dict(r18="resnet18", r34="resnet34", r50="resnet50", r101="resnet101", r152="resnet152",
                 x50="resnext50_32x4d", x101="resnext101_32x8d")
TORCHVISION = ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2",
               "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")  # its own detectors


def make_body(name, init):
    """A torchvision ResNet. init "imagenet": its weights, its BatchNorm frozen; "frozen": BatchNorm frozen,
    weights to come; "none"; a tiny one: or a file of common/tiny.py's."""
    if name.startswith("tiny"):
        from common.tiny import tiny_resnet
        return tiny_resnet(name, "none" if init == "frozen" else init)
    norm = nn.BatchNorm2d if init == "none" else FrozenBatchNorm2d
    if name.startswith("x101_32x4d"):  # mmdetection's; _dcn: deformable from the second stage on
        from common.zoo import DeformConv
        net = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 23, 3], groups=32,
                                        width_per_group=4, norm_layer=norm)
        for stage in (net.layer2, net.layer3, net.layer4) if name.endswith("_dcn") else ():
            for block in stage:
                block.conv2 = DeformConv(block.conv2)
        return net
    net = getattr(torchvision.models, BACKBONES[name])(norm_layer=norm)
    if init == "imagenet":
        from common.zoo import imagenet_state
        state, url = imagenet_state(BACKBONES[name])
        load_strict(net, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, url)
    return net


def split_name(name, others=()):
    """"faster_r50" -> ("faster", "r50"), both known. others: further backbones, and cascades."""
    kind, _, body = name.partition("_")
    kinds = ("faster", "retina", "cascade") if others else ("faster", "retina")
    known = body in BACKBONES or body in others or re.fullmatch("tiny(8|16|24|32|48|64)", body)
    if kind not in kinds or not known:
        raise UserError(f"--student {name}: expected faster_ or retina_ and one of {', '.join(BACKBONES)}, "
                        "tiny8 ... tiny64")
    return kind, body


def build(name, outputs, init="none", mmdet=False):
    """torchvision's own FasterRCNN or RetinaNet: faster_r50, retina_tiny16, cascade_x101_32x4d_dcn,
    fasterrcnn_resnet50_fpn_v2, ...

    outputs: class scores of the head; Faster R-CNN's first is the background. mmdet: what weights of
    mmdetection expect (exact anchors, RoIAlign's newer grid, no ReLU before P7); parameters and their names
    stay torchvision's.
    """
    if name in TORCHVISION:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=outputs)
        for m in model.backbone.body.modules() if not name.endswith("_v2") else ():
            if isinstance(m, nn.BatchNorm2d):
                m.eps = 0.0  # version 1 was trained so
        if name.startswith("maskrcnn"):
            model.roi_heads.mask_roi_pool = None  # has_mask() is false then; the weights stay
        return with_scales(model)
    if mmdet:
        from common import zoo
    kind, body = split_name(name, ("x101_32x4d", "x101_32x4d_dcn") if mmdet else ())
    tiny, retina = body.startswith("tiny"), kind == "retina"
    net, dim = make_body(body, init), 64 if tiny else 256
    layers = [2, 3, 4] if retina else [1, 2, 3, 4]
    channels = [net.inplanes // 8 * 2 ** (k - 1) for k in layers]
    p6p7 = zoo.PlainP6P7 if mmdet else LastLevelP6P7
    extra = p6p7(channels[-1], dim) if retina else LastLevelMaxPool()
    taps = {f"layer{k}": str(i) for i, k in enumerate(layers)}
    backbone = BackboneWithFPN(net, taps, channels, dim, extra)
    sides = []  # of the anchors of each level; the embedded dataset's images are of 100 pixels
    least = (16 if retina else 8) if tiny else 32
    for side in (least * 2 ** k for k in range(5)):
        sides.append(tuple(side * 2 ** (k / 3) for k in range(3 if retina else 1)))
    if mmdet:
        anchors = zoo.ExactAnchors(sides, STRIDES["retina" if retina else "faster"])
    else:
        whole = [tuple(int(s) for s in level) for level in sides]
        anchors = AnchorGenerator(whole, ((0.5, 1.0, 2.0),) * 5)
    if retina:
        head = None
        if tiny:  # GroupNorm, as in torchvision's version 2, and a start by fan-in: else it hardly learns
            head = RetinaNetHead(dim, 9, outputs, norm_layer=lambda c: nn.GroupNorm(8, c))
            for m in (*head.classification_head.conv.modules(), *head.regression_head.conv.modules()):
                if isinstance(m, nn.Conv2d):
                    nn.init.kaiming_normal_(m.weight)
        return RetinaNet(backbone, outputs, anchor_generator=anchors, head=head, detections_per_img=100)
    fewer = {}
    if tiny:
        fewer = dict(rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200,
                     rpn_post_nms_top_n_test=100, rpn_batch_size_per_image=64, box_batch_size_per_image=32)
    hidden = 256 if tiny else 1024
    model = FasterRCNN(backbone, rpn_anchor_generator=anchors, box_head=TwoMLPHead(dim * 49, hidden),
                       box_predictor=FastRCNNPredictor(hidden, outputs), **fewer)
    if kind == "cascade":
        model.roi_heads = zoo.CascadeHeads(dim, outputs)
    elif mmdet:
        model.roi_heads.box_roi_pool = zoo.AlignedPool()
    return with_scales(model)


def with_scales(model):
    """torchvision's RoI pooling guesses the maps' scales from the first image it sees, and wrongly where
    padding adds half of a side: tell it."""
    pool = getattr(getattr(model, "roi_heads", None), "box_roi_pool", None)
    if isinstance(pool, MultiScaleRoIAlign):
        pool.scales = [1 / s for s in STRIDES["faster"][:4]]
        pool.map_levels = initLevelMapper(2, 5, pool.canonical_scale, pool.canonical_level)
    return model


def kind_of(model):
    return "retina" if isinstance(model, RetinaNet) else "faster"


def kind_of_name(name):
    return "retina" if name.startswith("retina") else "faster"


def is_cascade(heads):
    return hasattr(heads, "logits")  # CascadeHeads of common/zoo.py, which is not imported here


def generator_of(model):
    return model.anchor_generator if kind_of(model) == "retina" else model.rpn.anchor_generator


def new_detector(name, classes, init):
    """An untrained detector for these classes, its backbone from init: see make_body."""
    first = 0 if name.startswith("retina") else 1  # Faster R-CNN's output 0 is the background
    count = first + len(classes)
    model = build(name, count, init)
    model.arch = dict(name=name, mmdet=False, classes=list(classes), columns=list(range(first, count)),
                      outputs=count, plain_norm=init == "none")
    return model


def freeze(model, norms="frozen"):
    """As the paper's baselines train a backbone that is trained already: stem and first stage fixed, the
    statistics of all BatchNorm; with norms "frozen" their factors, too, with "affine" all but those of stem
    and first stage are trained."""
    body = model.backbone.body
    if norms == "affine":
        for stage in (body.layer2, body.layer3, body.layer4):
            learn_factors(stage)
    for name, p in body.named_parameters():
        p.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
    for name, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            early = name.startswith(("backbone.body.bn1", "backbone.body.layer1"))
            m.requires_grad_(norms == "affine" and not early)
    model.norms_fixed = True  # Distiller.train() keeps them in eval mode


def learn_factors(module):
    """Frozen BatchNorm, whose factors are buffers, becomes BatchNorm with the same numbers, in place."""
    for name, child in module.named_children():
        if isinstance(child, FrozenBatchNorm2d):
            norm = nn.BatchNorm2d(len(child.weight), child.eps)
            norm.load_state_dict(child.state_dict(), strict=False)  # it also counts batches
            setattr(module, name, norm.to(child.weight.device))
        else:
            learn_factors(child)


def images_of(batch):
    """torchvision's ImageList of a collated batch: what its own transform makes of the same pixels, to the
    last bit."""
    x = batch["images"]
    mean, std = (constant(v, x.device, torch.float32).view(3, 1, 1) for v in (MEAN, STD))
    high = torch.arange(x.shape[2], device=x.device) < batch["sizes"][:, :1]
    wide = torch.arange(x.shape[3], device=x.device) < batch["sizes"][:, 1:]
    pixels = (x / 255 - mean) / std * (high[:, None, :, None] & wide[:, None, None, :])
    return ImageList(pixels, batch["image_sizes"])


def train_step(model, images, maps, batch):
    """A training step of the detector by itself -> Step."""
    columns = constant(model.arch["columns"], images.tensors.device, torch.long)
    targets = []
    for boxes, labels, n in zip(batch["boxes"], batch["labels"], batch["counts"]):
        targets.append(dict(boxes=boxes[:n], labels=columns[labels[:n]]))
    if kind_of(model) == "faster":
        losses, boxes, labels, objects, logits = two_stage(model, images, maps, targets)
        positive = [(k > 0).nonzero()[:, 0] for k in labels]
    else:
        losses, boxes, objects, logits = one_stage(model, images, maps, targets)
        positive = [(o >= 0).nonzero()[:, 0] for o in objects]
    return Step(losses, boxes, positive, objects, logits)


def two_stage(model, images, maps, targets):
    """Faster R-CNN's training step in torchvision's own calls and order -> (losses, sampled boxes, their
    classes and objects, class logits)."""
    proposals, losses = model.rpn(images, maps, targets)
    heads = model.roi_heads
    boxes, objects, labels, offsets = heads.select_training_samples(proposals, targets)
    logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, images.image_sizes)))
    cls, box = fastrcnn_loss(logits, deltas, labels, offsets)
    losses = dict(cls=cls, box=box, rpn_cls=losses["loss_objectness"], rpn_box=losses["loss_rpn_box_reg"])
    return losses, boxes, labels, objects, logits


def box_logits(model, maps, boxes, image_sizes):
    """Class logits of given boxes: the teacher's answer to the student's proposals."""
    heads = model.roi_heads
    if is_cascade(heads):
        return heads.logits(maps, boxes, image_sizes)
    return heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, image_sizes)))[0]


def one_stage(model, images, maps, targets):
    """RetinaNet's training step -> (losses, anchors, object of each anchor or < 0, class logits (B, A,
    C))."""
    maps = list(maps.values())
    out, anchors = model.head(maps), model.anchor_generator(images, maps)
    found = []
    for t, a in zip(targets, anchors):
        nothing = torch.full((len(a),), -1, device=a.device)
        found.append(model.proposal_matcher(box_iou(t["boxes"], a)) if len(t["boxes"]) else nothing)
    losses = model.head.compute_loss(targets, out, anchors, found)
    losses = dict(cls=losses["classification"], box=losses["bbox_regression"])
    return losses, anchors, found, out["cls_logits"]


def level_anchors(model, images, maps):
    """L of (A_l, 4): anchors of one image; all images of a batch have the same."""
    generator = generator_of(model)
    every = generator(ImageList(images.tensors, images.image_sizes[:1]), maps)[0]
    counts = [m.shape[2] * m.shape[3] * k for m, k in zip(maps, generator.num_anchors_per_location())]
    return every.split(counts)


def detect(model, images, maps):
    """Detections in eval mode: [{"boxes" in pixels of the batch, "scores", "labels" as the head counts}]."""
    if kind_of(model) == "faster":
        return model.roi_heads(maps, model.rpn(images, maps)[0], images.image_sizes)[0]
    levels = list(maps.values())
    out, anchors = model.head(levels), model.anchor_generator(images, levels)
    cells = model.anchor_generator.num_anchors_per_location()[0]
    sizes = [m.shape[2] * m.shape[3] * cells for m in levels]
    out = {k: list(v.split(sizes, 1)) for k, v in out.items()}
    return model.postprocess_detections(out, [list(a.split(sizes)) for a in anchors], images.image_sizes)


class Counted(nn.Module):
    """A detector on fixed shapes, for its FLOPs: as many boxes as its RPN may propose go through the head."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        net, maps = self.detector, self.detector.backbone(images)
        if kind_of(net) == "retina":
            return net.head(list(maps.values()))
        net.rpn.head(list(maps.values()))
        heads, count = net.roi_heads, len(images) * net.rpn.post_nms_top_n()
        boxes = maps["0"].new_zeros(count, maps["0"].shape[1], 7, 7)
        if not is_cascade(heads):
            return heads.box_predictor(heads.box_head(boxes))
        for head, cls, reg in zip(heads.heads, heads.cls, heads.reg):
            x = head(boxes)
            cls(x), reg(x)


# ================================================================== data

def make_data(args, split, like=None, image_size=None):
    """The dataset "train" or "val" of the flags; None where own training files come without others."""
    files = own_files(args, split)
    if files is False:
        return None
    train = split == "train"
    if files is None and args.dataset == "voc":
        lists = args.voc_train if train else args.voc_val
        images = Path(default_root(args)) / "VOCdevkit"
        records = read_voc(images.parent, [tuple(x.strip().split("_", 1)) for x in lists.split(",")])
    else:
        root = default_root(args)
        if args.data == "shapes":
            from common.shapes import make_shapes
            root = make_shapes(seed=args.data_seed)
        images, annotations = files or find_coco(root, split)
        records = read_annotations(annotations, images)
    if train and args.first_images:
        records = records.subset(np.arange(len(records)) < args.first_images)
    return CocoDataset(images, records, train, image_size or default_size(args), like=like,
                       keep_empty=args.keep_empty, photometric=train and args.photometric)


def default_root(args):
    return args.data or ("data" if args.dataset == "voc" else "data/coco")


def default_size(args):
    return args.image_size or ("72-120" if args.data == "shapes" else "800")


# ================================================================== train

LEGEND = {  # of the log's terms
    "cls": "classification loss of the detector", "box": "box loss of the detector",
    "rpn_cls": "RPN: object or not", "rpn_box": "RPN: boxes",
    "global": "Eq. 6, gaps of an object's coordinates in the prototypes",
    "rkd": "RKD, distances and angles among objects",
    "feat": "Eq. 7, squared gap of H(student's features) and teacher's",
    "resp": "third term of Eq. 9, KL of class scores",
    "sigma": "Eq. 8, mean over objects", "muted": "share of objects on a level whose sigma is 0 or less"}


def plain_of(model):
    """What a checkpoint holds beside weights: enough for load to rebuild the detector, and, as "torchvision",
    what a torchvision model must be told that is filled with these weights by hand."""
    return dict(script="prototype_kd.py", arch=model.arch, classes=model.arch["classes"],
                torchvision=plain_settings(model))


def plain_settings(model):
    """What the weights' names, which are torchvision's, do not tell: sizes of the images, anchors, the eps of
    the backbone's BatchNorm; with mmdetection's weights also modules of common/zoo.py."""
    least, most = image_sides(model)
    eps = [m.eps for m in model.backbone.body.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
    sizes = [list(map(float, level)) for level in generator_of(model).sizes]
    found = dict(min_size=least, max_size=most, anchor_sizes=sizes, batch_norm_eps=eps[0] if eps else None)
    if model.arch["mmdet"]:
        found["modules"] = "ExactAnchors, AlignedPool, PlainP6P7 of common/zoo.py"
    return found


def image_sides(model):
    """(short side, most of the long one) that --eval and --predict resize to."""
    short = max(parse_image_size(model.arch.get("image_size") or "800"))
    return short, round(short * 1333 / 800)


def check_known(spec, flag, classes):
    """Before anything is downloaded: the detectors of common/zoo.py know COCO's classes."""
    from common.zoo import PROTOTYPE_ZOO, torchvision_arch
    if spec not in PROTOTYPE_ZOO:
        return
    names = torchvision_arch("fasterrcnn_resnet50_fpn")["classes"]
    try:
        check_classes(names, len(names), classes, f"{flag} {spec}")
    except UserError as e:
        kind = kind_of_name(spec)
        raise UserError(f"{e}. The paper distils detectors that are trained on the data already: train a "
                        f"teacher, --teacher none --student {kind}_r101 --out r/t, and a student, --teacher "
                        f"none --student {kind}_r50 --out r/s, then --teacher r/t/best.pt --init "
                        "r/s/best.pt. --init imagenet or --init none: an untrained student") from None


def make_pair(args, data, rank, world, device):
    """(student, teacher or None) of the flags, on the device."""
    teacher, spec, start = None, args.teacher, args.init
    for flag, source in (("--teacher", spec), ("--init", start)):
        check_known(source, flag, data.classes)
        if args.dataset == "voc" and rank == 0 and Path(str(source)).name == "best.pt":
            print(f"warning: {flag} {source}: was chosen on VOC's test set; last.pt was not", flush=True)
    if spec != "none":
        if spec is None:
            kind = kind_of_name(args.student or arch_of(start, "--init")["name"])
            spec = shapes_detector(f"{kind}_{TEACHER}", args, rank, world, device, teacher=True)
        teacher, classes = load(spec, "--teacher")
        teacher.requires_grad_(False).to(device)
        check_classes(classes, len(teacher.arch["columns"]), data.classes, f"--teacher {spec}")
        tell_size(teacher.arch, args.image_size, f"--teacher {spec}")
    start = start or shapes_detector(args.student, args, rank, world, device)
    seed_all(args.seed)
    if start in NEW:
        init = start
        if start == "shapes":
            from common.tiny import shapes_backbone
            init = shapes_backbone(split_name(args.student)[1], args.data_seed)
        student = new_detector(args.student, data.classes, init)
        if teacher and rank == 0:
            print(f"warning: --init {start}: the paper distils students that are trained already; prototypes "
                  "of an untrained one are noise", flush=True)
    else:
        student, classes = load(start, "--init")
        check_classes(classes, len(student.arch["columns"]), data.classes, f"--init {start}")
        tell_size(student.arch, args.image_size, f"--init {start}")
    if teacher and kind_of(teacher) == "retina":  # its anchors are compared one by one
        check_anchors(teacher, student, args)
    if start != "none" and not ("tiny" in student.arch["name"] and student.arch.get("plain_norm")):
        freeze(student, args.bn)
    # image_size: --eval and --predict see the images as training did
    student.arch.update(classes=list(data.classes), image_size=args.image_size)
    return student.to(device), teacher


def check_anchors(teacher, student, args):
    theirs, ours = generator_of(teacher).cell_anchors, generator_of(student).cell_anchors
    for a, b in zip(theirs, ours):
        if a.shape != b.shape or (a.cpu() - b.cpu()).abs().max() > 1:
            raise UserError(f"--teacher {args.teacher}: has other anchors than the student; tiny RetinaNets "
                            "have smaller ones")


def needs_prototypes(args):
    """Whether a loss, or sigma in one, compares coordinates in prototypes."""
    weighs = args.sigma != "none" and args.alpha_feat + args.alpha_resp > 0
    return args.teacher != "none" and (weighs or args.alpha_global > 0 and args.kd_relation == "global")


def make_bank(args, data, rank, world):
    """The bank of prototypes, still empty; None where no loss needs one."""
    if not needs_prototypes(args):
        return None
    instances = Instances(data, args.image_size, args.proto_max_images, args.proto_min_size, args.seed,
                          args.workers, rank, world)
    return Bank(instances, data.classes, **bank_options(args))


def bank_options(args):
    """Keyword arguments of Bank."""
    return dict(k=args.k, lam=args.lam, center=args.center, method=args.proto_method, space=args.proto_space,
                density=args.density_filter, seed=args.seed, amp=args.amp == "bf16")


# What Comparison says where it is Distiller.
PAPER = dict(relation="global", every_class=False, proj="cosine", sigma="l2", clamp=True, instances="gt",
             levels="all", cells="fgfi", background=0.0, by_sigma=False)


def make_distiller(student, teacher, bank, args):
    """The module that is trained: Distiller, or Comparison where a table or a preset asks for something
    else."""
    if teacher is None:
        return Distiller(student, amp=args.amp == "bf16")
    options = dict(alpha_global=args.alpha_global, alpha_feat=args.alpha_feat, alpha_resp=args.alpha_resp,
                   adapt=args.adapt, tau=args.resp_tau, over_classes=args.resp_norm, amp=args.amp == "bf16")
    other = dict(relation=args.kd_relation, every_class=args.all_class_prototypes, proj=args.proj,
                 sigma=args.sigma, clamp=args.sigma_clamp or args.sigma == "l2" or args.alpha_global > 0,
                 instances=args.instances, levels=args.level_assign,
                 cells=args.kd_local, background=args.bg_weight, by_sigma=args.feat_norm == "sigma")
    if bank and args.kd_decay == "none" and other == PAPER:
        return Distiller(student, teacher, bank, **options)
    return Comparison(student, teacher, bank, lam=args.lam, **other, **options)


def prepare(args, data, val, student, teacher, rank, world, device):
    """The Distiller with its adapters and its bank; networks described and compiled, the teacher checked, the
    student continued without distillation."""
    example = collate([data[0, 0]])["images"].float()  # image 0, random seed 0
    for name, net in (("student", student), ("teacher", teacher)):
        if net:
            fast_layout(net, device)
            describe_model(f"{name} {net.arch['name']}", Counted(net), example, rank=rank)
            if args.compile:
                net.backbone.compile()
    if teacher and val and not (Path(args.out) / "last.pt").exists():
        check_teacher(evaluate(teacher, val, rank, world, device, args, most=100)[0], args)
    bank = make_bank(args, data, rank, world)  # here: what is wrong with it must not cost the control's time
    continued(args, rank, world, device)
    seed_all(args.seed)  # H does not depend on what ran before
    distiller = make_distiller(student, teacher, bank, args).to(device).train()
    seed_all(args.seed + 1000 * rank)  # here: the same RoIs are drawn with and without distillation
    return distiller


def make_optimizer(model, algorithm, lr, weight_decay):
    """SGD with momentum 0.9, or AdamW, for all that is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if algorithm == "sgd":
        optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, **fused())
    else:
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, **fused())
    for g in optimizer.param_groups:
        g["base_lr"] = g["lr"]
    return optimizer


def method_of(args):
    """What is distilled, in words, for the start of a run."""
    start = f"from {args.init or 'the student of shapes'}"
    if args.teacher == "none":
        return f"no teacher | {start}"
    changed = [k for k, v in PRESETS[args.preset].items() if k != "photometric" and getattr(args, k) != v]
    other = " ".join(f"{dash(k)} {getattr(args, k)}" for k in changed)
    return f"preset {args.preset}{', but ' if other else ''}{other} | {start}"


def reported(args, distiller):
    """What of a Run depends on the method: what last.pt holds beside the student (H), how often it evaluates;
    VOC's test set must not choose the weights that are reported."""
    adapters = {k: m for k, m in distiller.named_children() if k == "adapters"}
    every = args.epochs if args.data == "shapes" else None
    report = "last" if args.dataset == "voc" else "best"
    fixed = dict(teacher=distiller.teacher[0]) if distiller.teacher else {}
    return dict(parts=dict(adapters=nn.ModuleDict(adapters)), fixed=fixed, every=every, table=class_table,
                report=report)


def keep_beside(run, bank, device):
    """last.pt also says whether the run is finished and with which weights it began, which must be those of
    its control, and holds the prototypes, of an earlier step, which a run that was cut off goes on with."""
    run.beside["finished"] = lambda: run.finished and not run.due
    begun = run.state.get("begun") if run.resumed else checksum(run.model.state_dict())
    run.beside["begun"] = lambda: begun
    folder = control_folder(run.args)
    there = run.args.control != "none" and (folder / "last.pt").exists()
    theirs = load_checkpoint(folder / "last.pt").get("begun") if there else None
    if begun and theirs and begun != theirs:
        raise UserError(f"--control {folder}: did not begin with the weights that --init {run.args.init} "
                        "holds now; run it anew")
    if bank:
        run.beside["bank"] = bank.tensors
        if run.resumed and run.state.get("bank"):
            bank.load(run.state["bank"], device)


def refresh(run, distiller, device):
    """Alg. 2, lines 3 to 6: prototypes of the student as it is now, where they are due; and the released
    code's decay of the global and feature losses, epoch by epoch, to 0 after the last."""
    args, done = run.args, run.it // run.steps
    if args.kd_decay == "linear":
        distiller.decay = 1 - done / args.epochs
    bank = distiller.bank
    if not bank or not bank.is_due(run.it, args.refresh * run.steps):
        return
    news = bank.refresh(distiller.student, *distiller.teacher, device, run.rank, run.world)
    distiller.train()
    if run.it == 0 and run.rank == 0 and (news["without"] or news["few"]):
        without, few = ((", ".join(news[k]) or "-").split(" ") for k in ("without", "few"))
        print(fold(["warning:", "no prototype for", *without, "(sigma is 1, no global loss there);",
                    f"fewer than {bank.k} (a larger sigma) for", *few]), flush=True)
    row = {k: news[k] for k in ("prototypes", "instances", "kept", "seconds")}
    run.log.write(dict(it=run.it + 1, epoch=done + 1, refresh=True, **row),
                  f"ep {done + 1:02d} {news['prototypes']} prototypes of {news['instances']} instances"
                  + (f", {100 * news['kept']:.0f} % as before" if news["kept"] >= 0 else "")
                  + f" | {news['seconds']:.0f}s")
    run.log.restart_clock()


def rate_factor(args, it, steps):
    """Learning-rate factor of iteration `it`, `steps` an epoch."""
    milestones = (args.epochs * 2 / 3, args.epochs * 11 / 12)
    return warmup_multistep(it, steps, milestones, min(500, args.epochs * steps // 10))


def train(args, rank, world, device):
    """Train under args; returns the last evaluation's metrics (rank 0) or None."""
    data = make_data(args, "train")
    val = make_data(args, "val", like=data.classes)
    open_run(args, rank, args.resume)
    student, teacher = make_pair(args, data, rank, world, device)
    distiller = prepare(args, data, val, student, teacher, rank, world, device)
    model = wrap_ddp(distiller, device, world)
    loader, plan = train_loader(data, args.batch_size, rank, world, args.seed, args.workers)
    total_batch = args.batch_size * world * args.accumulate
    paper_batch = 16
    lr = args.lr * total_batch / paper_batch
    optimizer = make_optimizer(distiller, args.optimizer, lr, args.weight_decay)
    run = Run(args, student, optimizer, plain_of(student), len(plan), total_batch, rank, world, device,
              legend=LEGEND, **reported(args, distiller))
    keep_beside(run, distiller.bank, device)
    run.describe(method_of(args), lr, args.lr, paper_batch, data, val)
    while True:
        if run.due:
            run.scored(*evaluate(student, val, rank, world, device, args), val)
            model.train()
        if run.finished:
            break
        for batches in run.batches(loader, plan):
            refresh(run, distiller, device)
            factor = rate_factor(args, run.it, run.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            losses = {}
            for n, batch in enumerate(batches, 1):
                model.require_backward_grad_sync = n == len(batches)  # DDP exchanges gradients once a step
                terms = model(to_device(batch, device))
                (sum(terms.values()) / len(batches)).backward()  # Eq. 9
                losses = {k: losses.get(k, 0) + v.detach() / len(batches) for k, v in terms.items()}
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step(losses, lr * factor, distiller.watch)
        run.end_epoch()
    metrics = run.close()
    compare(run)
    return metrics


# Flags in which a run and its continuation without distillation must agree.
SAME = """data dataset voc_train voc_val data_seed train_json train_images val_json val_images keep_empty
    first_images image_size init student bn epochs max_iters eval_every optimizer lr weight_decay photometric
    seed amp""".split()


def control_folder(args):
    return Path(args.out) / "control" if args.control == "run" else Path(args.control)


def continued(args, rank, world, device):
    """Trains the same student as long without distillation, in OUT/control; or checks the run that --control
    names."""
    if args.control == "none":
        return
    folder = control_folder(args)
    there, finished = (folder / "last.pt").exists(), False
    if there:
        state = load_checkpoint(folder / "last.pt", "prototype_kd.py")
        if not {"args", "total_batch"} <= set(state):
            raise UserError(f"--control {folder}: its last.pt holds no training state, as a best.pt")
        theirs = dict(state["args"], total_batch=state["total_batch"])
        ours = dict(vars(args), total_batch=args.batch_size * args.accumulate * world)
        wrong = [k for k in (*SAME, "total_batch") if theirs.get(k) != ours[k]]
        follows = args.control == "run" and args.resume  # --resume changed these flags, for the control, too
        if theirs["teacher"] != "none" or wrong and not follows:
            text = f"--control {folder}: is no continuation without distillation of this run"
            for k in wrong[:1]:
                text += (f": its {k.replace('_', '-')} is {theirs.get(k)}, here {ours[k]}; give another "
                         "folder, or --control none")
            raise UserError(text)
        own = Path(args.out) / "last.pt"
        if not (own.exists() and load_checkpoint(own).get("finished")):  # else both go on from their ends
            for k in {"epochs", "lr", "weight_decay"} & {*wrong}:
                tell(f"--control {folder}: has trained with {dash(k)} {theirs.get(k)} so far, the distilled "
                     f"run goes on with {ours[k]}; the difference will not be distillation's alone")
        finished = state.get("finished", False) and not wrong
    if finished and args.control != "run" and not (folder / "results.json").exists():
        raise UserError(f"--control {folder}: holds no results.json to compare with")
    if finished:
        return
    if args.control != "run":
        what = "that run is not finished; --resume it first" if there else "no last.pt there"
        raise UserError(f"--control {folder}: {what}")
    if rank == 0:
        print(f"== the student continued without distillation -> {folder}", flush=True)
    more = dict(teacher="none", control="none", out=str(folder), resume=there)
    train(resolve(argparse.Namespace(**vars(args) | more)), rank, world, device)


def compare(run):
    """Prints what a distilled run reports beside what its continuation without distillation does."""
    if run.rank != 0 or run.args.control == "none":
        return
    folder = control_folder(run.args)
    state = load_checkpoint(folder / "last.pt")
    for name, what in (("seen", "trained"), ("judge", "evaluated")):
        if state.get(name) not in (None, getattr(run, name)):
            print(f"warning: {folder} was {what} on other images or boxes; the difference is no result")
    theirs, ours = (read_json(out / "results.json") for out in (folder, run.out))
    keys = [k for k in ("AP", "AP50", "AP75", "VOC11", "VOCarea") if k in ours]
    gain = {k: ours[k] - theirs[k] for k in keys}
    for name, m in (("continued without distillation", theirs), ("distilled", ours), ("difference", gain)):
        print(f"{name:31s} " + " ".join(f"{k} {m[k]:5.1f}" for k in keys))


# ================================================================== evaluate, predict

def arch_of(spec, flag):
    """What a detector is; of one of common/zoo.py its name only: before anything is downloaded."""
    from common.zoo import PROTOTYPE_ZOO
    return dict(name=spec) if spec in PROTOTYPE_ZOO else load(spec, flag)[0].arch


def load(weights, flag="--weights"):
    """(detector in eval mode, class names or None) of a name in common/zoo.py, an mmdetection .pth, a
    checkpoint of ours.

    The detector is torchvision's, on the CPU: model([pictures in [0, 1]]) answers as torchvision does, in
    pixels of the pictures, with labels as the head counts; predict_image names them. What the weights' names
    do not tell (sizes of the images, anchors, BatchNorm's eps, mmdetection's pooling and P7) is set here; a
    model filled by hand needs .settings. .arch, plain values: name and mmdet (see build); classes; columns:
    the head's output of each class; outputs; image_size. .trained: (epoch, step) of a best.pt. Raises
    UserError, one line, for whatever is wrong with the file; flag: what that line calls it.
    """
    from common.zoo import read_torchvision
    where, arch, state, trained = read_torchvision(weights, flag, "prototype_kd.py")
    with rebuilding(where):
        init = "none" if arch.get("plain_norm") else "frozen"
        model = build(arch["name"], arch["outputs"], init, arch["mmdet"])
        model.arch, model.trained = dict(arch), trained
        if weights in TORCHVISION:
            model.load_state_dict(state)  # torchvision's loaders know the older names in its files
        else:
            needed = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
            load_strict(model, needed, where)
        model.transform = GeneralizedRCNNTransform(*image_sides(model), list(MEAN), list(STD))
        model.settings = plain_settings(model)
    return model.eval(), arch["classes"]


@torch.no_grad()
def run_detector(model, batch, amp="none"):
    """One collated batch -> per image (boxes in original pixels, scores, classes 0 ... C - 1)."""
    device = next(model.parameters()).device
    batch, columns = to_device(batch, device), model.arch["columns"]
    images = images_of(batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
        maps = model.backbone(images.tensors)
    found = detect(model, images, {k: fp32(v) for k, v in maps.items()})
    label_of = torch.full((model.arch["outputs"],), -1, device=device)
    label_of[torch.tensor(columns, device=device)] = torch.arange(len(columns), device=device)
    results = []
    for one, (h, w), (height, width) in zip(found, batch["image_sizes"], batch["original_sizes"]):
        label = label_of[one["labels"]]
        known = label >= 0  # torchvision's COCO weights have outputs for ids that no class has
        boxes = one["boxes"][known] * one["boxes"].new_tensor([width / w, height / h] * 2)
        results.append((boxes, one["scores"][known], label[known]))
    return results


def find_boxes(model, pixels, image_size=None, amp="none"):
    """(boxes (N, 4) xyxy pixels, scores (N,), labels (N,)) of uint8 (3, H, W), resized as in training."""
    size = max(parse_image_size(image_size)) if image_size else image_sides(model)[0]
    image, (h, w) = resize(pixels, size)
    item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0,
                original_size=pixels.shape[1:])
    return run_detector(model, collate([item]), amp)[0]


def names_of(model, classes):
    return classes or [f"class {k}" for k in range(len(model.arch["columns"]))]


def predict_image(model, classes, image, score=0.3):
    """(boxes (N, 4) xyxy pixels of `image`, scores (N,), N names), best first, of those above `score`.

    model, classes: of load; the model may be moved to a GPU. image: a path or PIL image (turned upright as
    its EXIF says), or a uint8 RGB tensor (3, H, W).
    """
    if classes and len(classes) != len(model.arch["columns"]):
        raise UserError(f"classes: {len(classes)} names, not {len(model.arch['columns'])}; load gives them")
    boxes, scores, labels = find_boxes(model, as_pixels(image))
    names, keep = names_of(model, classes), scores > score
    return boxes[keep], scores[keep], [names[k] for k in labels[keep].tolist()]


def evaluate(model, val, rank, world, device, args, most=None):
    """(COCO metrics, detections) on rank 0, (None, None) elsewhere or without a validation set. Images by
    stride over ranks. most: the first so many images only. --dataset voc: VOC's 11-point and area AP50."""
    if val is None:
        return None, None
    model.eval()
    since, results = time.time(), Detections()
    loader = eval_loader(val, rank, world, args.workers, most=most)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        (boxes, scores, labels), = run_detector(model, batch, args.amp)
        results.add(batch["image_ids"][0], boxes, scores, labels, val.category_ids)
    results.images = gather(results.images)
    if rank != 0:
        return None, None
    count = min(len(val), most or len(val))
    truth = val.truth(rows=range(count))
    metrics = coco_evaluate(truth, judged(truth, results))
    if args.dataset == "voc":
        voc = voc_evaluate(truth, results)
        metrics.update(VOC11=voc["AP11"], VOCarea=voc["AP"])
        for name, m in voc["classes"].items():
            metrics["classes"][name].update(VOC11=m["AP11"], VOCarea=m["AP"])
    metrics |= dict(score=metrics["AP"], images=count, seconds=time.time() - since)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "VOC11", "VOCarea")
    numbers = " ".join(f"{k} {metrics[k]:.1f}" for k in names if k in metrics)
    metrics["line"] = f"{count} images | {numbers} | {metrics['seconds']:.0f}s"
    return metrics, results


def evaluate_file(args, rank, world, device):
    """--eval: metrics of a checkpoint, into --out."""
    from common.pictures import write_results
    make_data(args, "val")  # what is missing is told before anything is downloaded
    model, classes = load(args.eval, "--eval")
    size = args.image_size or model.arch.get("image_size")
    val = make_data(args, "val", like=classes, image_size=size)
    check_classes(classes, len(model.arch["columns"]), val.classes, f"--eval {args.eval}")
    metrics, results = evaluate(model.to(device), val, rank, world, device, args)
    if rank == 0:
        write_results(Path(args.out), metrics, results, val, args.eval, *model.trained)
        print(class_table(metrics), val.report(), metrics["line"], sep="\n")


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file) and one picture per image into --out."""
    from common.pictures import Pictures
    pictures = Pictures(args.predict, args.out, args.score)  # before anything is downloaded: are they there?
    model, classes = load(args.weights)
    model.to(device)
    for picture in pictures:
        found = find_boxes(model, picture.pixels, args.image_size, args.amp)
        picture.save(*found, names_of(model, classes))


class Exported(nn.Module):
    """What --export writes of a RetinaNet: uint8 RGB (B, 3, H, W), resized, then padded right and bottom to
    multiples of 32 with the mean pixel (124, 116, 104) -> boxes (B, A, 4) xyxy pixels, scores (B, A, C), both
    before NMS; then the raw class and box outputs (B, A, .)."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, images):
        model = self.model
        x = (images / 255 - self.mean) / self.std
        maps = list(model.backbone(x).values())
        out = model.head(maps)
        anchors = model.anchor_generator(ImageList(x, [tuple(x.shape[-2:])]), maps)[0]
        cls, reg = out["cls_logits"], out["bbox_regression"]
        every = anchors.expand(reg.shape[0], -1, -1).flatten(0, 1)
        boxes = model.box_coder.decode_single(reg.flatten(0, 1), every).view_as(reg)
        scores = cls[..., model.arch["columns"]].sigmoid()
        return boxes, scores, cls, reg


def export(args):
    """--export: a RetinaNet as a torch.export (.pt2) or ONNX (.onnx) program."""
    from common.export import export_program
    if kind_of_name(arch_of(args.weights, "--weights")["name"]) != "retina":
        raise UserError("--export: writes RetinaNet only; Faster R-CNN's second stage sees as many boxes as "
                        "NMS leaves, no fixed number. prototype_kd.load gives torchvision's own model")
    model, classes = load(args.weights)
    export_program(Exported(model), args.export, ("boxes", "scores"), classes)


# ================================================================== flags

EXAMPLES = """
torchrun --nproc_per_node 8 prototype_kd.py      # COCO, Faster R-CNN R101 -> R50
python prototype_kd.py --data shapes             # everything in minutes on a CPU
python prototype_kd.py --predict photo.jpg --weights runs/prototype_kd/best.pt
"""
# What paper and released code set where they differ; the last five are no flags.
PRESETS = dict(
    paper=dict(alpha_global=1.0, alpha_feat=1.0, alpha_resp=5.0, sigma="l2", instances="gt",
               level_assign="all", kd_local="fgfi", bg_weight=0.0, adapt="conv1x1relu", resp_tau=1.0,
               proto_min_size=0.0, photometric=True,
               sigma_clamp=True, feat_norm="cells", resp_norm="sum", kd_decay="none", density_filter=0.0),
    released=dict(alpha_global=0.0, alpha_feat=1.0, alpha_resp=1.0, sigma="maxcos", instances="proposals",
                  level_assign="fpn", kd_local="defeat", bg_weight=4.0, adapt="conv3x3", resp_tau=2.0,
                  proto_min_size=30.0, photometric=False,
                  sigma_clamp=False, feat_norm="sigma", resp_norm="mean", kd_decay="linear",
                  density_filter=0.4))
DEFAULTS = dict(first_images=0, refresh=1.0, epochs=24, batch_size=2, optimizer="sgd")
SHAPES = dict(first_images=300, refresh=4.0, epochs=16, batch_size=16, optimizer="adamw", lr=0.002)
TEACHER = "tiny32"  # of --data shapes
PLAIN = "--dataset voc --teacher none"
V1X = "--dataset voc --epochs 12 --init runs/voc_student/last.pt"
V2X = "--dataset voc --teacher runs/voc2x_KIND_teacher/last.pt --init runs/voc2x_KIND_student/last.pt"
CONTROL = "--control runs/voc/control"
ALONE = "--alpha-global 0 --alpha-resp 0"
ROWS = rows(f"""  # --row NAME: the paper's number, flags, a remark. t1, t7: AP, COCO; t2: AP, VOC; else AP50
    t1-faster         40.6  --teacher faster_r101  # the same pair in others' papers: PKD 40.4, CSKD 41.0
    t1-fgfi           39.3  --teacher faster_r101 FGFI CONTROL1  # with the paper's H
    t1-defeat         40.3  --teacher faster_r101 DEFEAT CONTROL1  # with the paper's H, on the FPN only
    t1-student        38.4  --eval faster_r50
    t1-teacher        39.8  --eval faster_r101
    t1-retina         39.8  --teacher retina_r101  # its control is that of the rows below
    t1-retina-fgfi    38.6  --teacher retina_r101 FGFI CONTROL2  # as t1-fgfi
    t1-retina-defeat  39.3  --teacher retina_r101 DEFEAT CONTROL2  # as t1-defeat
    t1-retina-student 37.4  --eval retina_r50
    t1-retina-teacher 38.9  --eval retina_r101
    t2-teacher        56.3  {PLAIN} --student faster_r101 --out runs/voc2x_faster_teacher
    t2-student        54.2  {PLAIN} --student faster_r50 --out runs/voc2x_faster_student
    t2-faster         56.7  FASTER2X
    t2-fgfi           55.3  FASTER2X FGFI --control runs/prototype_kd-t2-faster/control  # as t1-fgfi
    t2-retina-teacher 58.2  {PLAIN} --student retina_r101 --out runs/voc2x_retina_teacher
    t2-retina-student 56.1  {PLAIN} --student retina_r50 --out runs/voc2x_retina_student
    t2-retina         58.6  RETINA2X
    t2-retina-fgfi    55.6  RETINA2X FGFI --control runs/prototype_kd-t2-retina/control  # as t1-fgfi
    t3-teacher        82.4  {PLAIN} --epochs 12 --student faster_r101 --out runs/voc_teacher
    t3-student        81.3  {PLAIN} --epochs 12 --student faster_r50 --out runs/voc_student
    t3-all            82.9  R101 --out runs/voc  # its control is that of the rows below
    t3-feat           82.0  SHARE {ALONE}  # or 82.4: the table's marks are damaged in our copy
    t3-global         82.4  SHARE --alpha-feat 0 --alpha-resp 0  # or 82.0, as t4-rkd+
    t3-resp           82.2  SHARE --alpha-global 0 --alpha-feat 0
    t3-feat+resp      82.6  SHARE --alpha-global 0  # or 82.4
    t3-global+resp    82.4  SHARE --alpha-feat 0  # or 82.6
    t4-defeat         82.0  SHARE DEFEAT  # as t1-defeat
    t4-defeat+        82.4  SHARE {ALONE} --kd-local defeat --bg-weight 4  # with prototypes
    t4-rkd            81.6  SHARE --alpha-feat 0 --alpha-resp 0 --kd-relation rkd
    t4-rkd+           82.0  SHARE --alpha-feat 0 --alpha-resp 0  # with prototypes; flags of t3-global
    t4-kd             81.8  SHARE --alpha-global 0 --alpha-feat 0 --sigma none
    t4-kd+            82.2  SHARE --alpha-global 0 --alpha-feat 0  # with prototypes; flags of t3-resp
    t5-alpha1-0.1     82.1  SHARE --alpha-global 0.1
    t5-alpha1-0.5     82.3  SHARE --alpha-global 0.5
    t5-alpha1-1.2     82.6  SHARE --alpha-global 1.2
    t5-alpha2-0.5     82.3  SHARE --alpha-feat 0.5
    t5-alpha2-0.8     82.4  SHARE --alpha-feat 0.8
    t5-alpha2-1.5     82.6  SHARE --alpha-feat 1.5
    t5-alpha3-1       82.3  SHARE --alpha-resp 1
    t5-alpha3-10      82.3  SHARE --alpha-resp 10
    t5-alpha3-20      82.2  SHARE --alpha-resp 20
    t5-lambda-1       82.3  SHARE --lam 1
    t5-lambda-50      82.6  SHARE --lam 50
    t5-lambda-100     82.0  SHARE --lam 100
    t5-K-1            82.0  SHARE --k 1
    t5-K-5            82.3  SHARE --k 5
    t5-K-20           82.5  SHARE --k 20
    t5-T-0.5          82.8  SHARE --refresh 0.5
    t5-T-2            82.3  SHARE --refresh 2
    t5-T-3            82.2  SHARE --refresh 3
    t6-kmeans         82.3  SHARE --proto-method kmeans --proto-space student  # teacher: lost in our copy
    t6-kmeans-teacher none  SHARE --proto-method kmeans --proto-space teacher
    t6-dbscan-student 82.4  SHARE --proto-method dbscan --proto-space student
    t6-dbscan-teacher 82.2  SHARE --proto-method dbscan --proto-space teacher
    t6-ambiguous      81.8  SHARE --proto-method ambiguous
    t6-random         none  SHARE --proto-method random  # a control that the paper lacks
    t7-teacher        47.3  --eval cascade_x101
    t7-cascade        41.5  --teacher cascade_x101
    t7-mask-rcnn      none  --teacher maskrcnn_resnet50_fpn_v2 --init fasterrcnn_resnet50_fpn  # a stand-in
    t8-teacher        83.1  {PLAIN} --epochs 12 --student faster_r152 --out runs/voc_r152
    t8-r152           82.9  R152
    t8-r152-fgfi      81.6  R152 FGFI  # as t1-fgfi
    t8-r152-defeat    82.3  R152 DEFEAT  # as t1-defeat
    released          none  --preset released  # what the published code is configured to do
    """, FGFI=f"{ALONE} --sigma none", DEFEAT=f"{ALONE} --sigma none --kd-local defeat --bg-weight 4",
    R101=f"{V1X} --teacher runs/voc_teacher/last.pt", R152=f"{V1X} --teacher runs/voc_r152/last.pt {CONTROL}",
    SHARE=f"{V1X} --teacher runs/voc_teacher/last.pt {CONTROL}",
    CONTROL1="--control runs/prototype_kd-t1-faster/control",
    CONTROL2="--control runs/prototype_kd-t1-retina/control",
    FASTER2X=V2X.replace("KIND", "faster"), RETINA2X=V2X.replace("KIND", "retina"))
# flags, the flag that gives them an effect, its values (None: it is not given)
BELONGS = (
    ("voc_train voc_val", "dataset", ("voc",)),
    ("data_seed table", "data", ("shapes",)),
    ("student", "init", (*NEW, None)),
    ("proto_space", "proto_method", ("pgm", "kmeans", "dbscan")),
    ("all_class_prototypes", "kd_relation", ("global",)))
# the same: flags, the weight of Eq. 9 that must be above 0
WEIGHED = (
    ("kd_relation all_class_prototypes", "alpha_global"),
    ("adapt kd_local bg_weight", "alpha_feat"),
    ("resp_tau", "alpha_resp"))
# flags that no run without prototypes reads
OF_BANK = "k lam refresh proto_method proto_space proto_max_images proto_min_size proj center".split()
MODES = dict(eval="data data_seed workers dataset voc_val val_json val_images", predict="weights score",
             export="weights")


def voc_lists(text):
    """argparse type of --voc-train and --voc-val."""
    if not re.fullmatch(r"\s*\d{4}_\w+\s*(,\s*\d{4}_\w+\s*)*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected year_list, as 2007_trainval,2012_trainval")
    return text


def parse_args(argv=None):
    p = parser(__doc__.split("\n", 1)[0], EXAMPLES)

    def preset(group, name, text, **options):
        paper, released = (PRESETS[k][name.replace("-", "_")] for k in ("paper", "released"))
        group.add_argument(f"--{name}", help=f"{text} (paper {paper}, released {released})", **options)

    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=("coco", "voc"), default="coco",
                   help="layout of --data; voc: 07+12 trainval, 07 test")
    g.add_argument("--data", help="root (default data/coco; voc: data, which holds VOCdevkit), or 'shapes': "
                   "the embedded dataset")
    g.add_argument("--voc-train", type=voc_lists, default="2007_trainval,2012_trainval", help="lists of VOC")
    g.add_argument("--voc-val", type=voc_lists, default="2007_test", help="and to evaluate on")
    g.add_argument("--data-seed", type=SEED, default=0, help="of the embedded dataset")
    g.add_argument("--first-images", type=number(int, 0, 2**31), metavar="N", help="train on the first so "
                   "many images only, 0 for all (default 0; shapes 300, its teacher all)")
    g.add_argument("--image-size", help="short side: 800, a choice 640,800 or a range 480-800 "
                   "(default 800; shapes 72-120; --eval, --predict: as trained)")
    preset(g, "photometric", "training images in other brightness, contrast, saturation, hue; shapes: off",
           action=argparse.BooleanOptionalAction)
    g = p.add_argument_group("models")
    g.add_argument("--teacher", help="name in common/zoo.py (faster_r101 ...), mmdetection .pth or our .pt; "
                   "none: plain training (default: the student's kind on r101; shapes: trained on demand)")
    g.add_argument("--init", help="where the student starts: as --teacher; imagenet; none; shapes (a tiny "
                   "backbone of drawn base objects) (default: the r50 of the teacher's kind, from COCO; "
                   "--teacher none, voc, own data: imagenet; on shapes a detector that is made on demand)")
    g.add_argument("--student", help="detector_backbone where it starts from a backbone: faster_r50, "
                   "retina_r18 ... (default: the teacher's kind, else faster, on r50; shapes on tiny8)")
    g.add_argument("--bn", choices=("frozen", "affine"), default="frozen", help="BatchNorm of a student that "
                   "is trained already: fixed, or its factors learn from stage 2 on; its statistics never do")
    g.add_argument("--no-teacher-check", action="store_true", help="go on with a teacher of AP below 1")
    g = method = p.add_argument_group("method")
    g.add_argument("--preset", choices=tuple(PRESETS),
                   help="what the flags below are where they are not given (default paper)")
    preset(g, "alpha-global", "alpha_1 of Eq. 9", type=number())
    preset(g, "alpha-feat", "alpha_2 of Eq. 9", type=number())
    preset(g, "alpha-resp", "alpha_3 of Eq. 9", type=number())
    g.add_argument("--k", type=COUNT, default=10, help="K: prototypes of a class and level")
    g.add_argument("--lam", type=number(), default=10.0,
                   help="lambda of Eq. 2, in the selection; in the projection where --proj is not cosine")
    g.add_argument("--refresh", type=POSITIVE, help="T: epochs between two selections; 0.5 is twice an epoch "
                   "(default 1; shapes 4, of 19 steps each)")
    g.add_argument("--proto-method", choices=("pgm", "kmeans", "dbscan", "ambiguous", "random"),
                   default="pgm", help="how prototypes are picked, Table 6")
    g.add_argument("--proto-space", choices=("both", "student", "teacher"), default="both",
                   help="whose features they are picked by, Table 6")
    g.add_argument("--proto-max-images", type=COUNT, default=800, help="images of a class to pick from")
    preset(g, "proto-min-size", "prototypes are wider and taller than this, pixels of the file",
           type=number())
    g.add_argument("--proj", choices=("cosine", "independent", "sequential", "joint"), default="cosine",
                   help="projection P of Eqs. 6, 8; all but cosine: readings of \"as in Eq. 5\", which "
                   "shrink Eq. 6 at lambda 10 some hundred times (independent: 441)")
    g.add_argument("--center", action="store_true", help="subtract each space's mean feature first (not in "
                   "the paper)")
    g.add_argument("--all-class-prototypes", action="store_true",
                   help="Eq. 6 over the prototypes of all classes, not of the object's own")
    preset(g, "sigma", "Eq. 8 by the l2 norm, by the largest cosine, or 1", choices=("l2", "maxcos", "none"))
    preset(g, "instances", "objects: true boxes, or the student's positive proposals (anchors)",
           choices=("gt", "proposals"))
    preset(g, "level-assign", "levels an object counts on: all, or that of its size", choices=("all", "fpn"))
    g.add_argument("--kd-relation", choices=("global", "rkd"), default="global",
                   help="Eq. 6, or RKD's relations among objects, Table 4")
    preset(g, "kd-local", "cells of Eq. 7: fgfi where anchors fit an object best, defeat inside its box",
           choices=("fgfi", "defeat"))
    preset(g, "bg-weight", "weight of the other cells in Eq. 7", type=number())
    preset(g, "adapt", "H of Eq. 7", choices=("conv1x1relu", "conv1x1", "conv3x3"))
    preset(g, "resp-tau", "temperature of the class scores", type=POSITIVE)
    g.add_argument("--control", default="run", help="the same student continued without distillation: run it "
                   "too, in OUT/control (shapes: the table); the folder of such a run; or none")
    g = p.add_argument_group("schedule")
    g.add_argument("--epochs", type=COUNT, help="(default 24, the paper's 2x; shapes 16), x0.1 at 2/3, 11/12")
    g.add_argument("--batch-size", type=COUNT, help="images per process and pass (default 2; shapes 16)")
    g.add_argument("--optimizer", choices=("sgd", "adamw"), help="(default sgd; shapes adamw)")
    g.add_argument("--lr", type=POSITIVE, help="for a total batch of 16, scaled linearly (default 0.02, "
                   "retina 0.01; shapes 0.002)")
    g.add_argument("--weight-decay", type=number(), default=1e-4)
    g.add_argument("--table", action=argparse.BooleanOptionalAction, help="shapes: teacher, start, continued "
                   "and distilled student in one table (default without --teacher, --init, --control, "
                   "--max-iters, --val-json)")
    run_flags(p, "prototype_kd", rows=ROWS, export=True)
    apart = "train_json data", "train_json dataset", "val_json dataset"
    args = parse(p, argv, "prototype_kd", MODES, belongs=BELONGS, apart=apart, rows=ROWS,
                 saved=lambda args: saved_run(args, "prototype_kd.py", "proto_method"))
    if args.image_size:
        parse_image_size(args.image_size)
    if args.data == "shapes" and args.dataset == "voc":
        p.error("--dataset voc: --data shapes is read as COCO")
    if not (args.eval or args.predict or args.export):
        check_method(p, args, given_flags(p, argv, ROWS), {a.dest for a in method._group_actions})
    return args


def check_method(p, args, given, method):
    """Stops with a line where flags of the method contradict each other, or were given and have no effect.
    method: names of them all."""
    if args.proto_method in ("kmeans", "dbscan") and args.proto_space == "both":
        p.error(f"--proto-method {args.proto_method}: clusters one space; add --proto-space student or "
                "teacher")
    if "lam" in given and args.proj == "cosine" and (args.proto_method, args.proto_space) != ("pgm", "both"):
        alone = f"{args.proto_method}, cosine" if args.proto_method != "pgm" else "one --proto-space, cosine"
        p.error(f"--lam: belongs to --proto-method pgm, or to a --proj; here {alone}")
    if args.proj == "joint" and not args.lam:
        p.error("--proj joint: needs --lam above 0; two prototypes may be almost alike")
    if args.all_class_prototypes and args.proj != "cosine":
        p.error(f"--all-class-prototypes: compares cosines; here --proj is {args.proj}")
    if args.table and (args.teacher or args.init or args.control != "run"):
        p.error("--table: makes its own teacher, student and control")
    if args.teacher == "none":
        idle = given & (method | {"no_teacher_check"}) - {"preset"}
        if args.control == "none":
            idle = idle - {"control"}
        if idle:
            p.error(f"{dash(min(idle))}: belongs to a --teacher, here it is none")
        return
    if "control" in given and args.control != "none" and args.train_json and not args.val_json:
        p.error(f"--control {args.control}: compares on a validation set, which --val-json names")
    values = argparse.Namespace(**vars(args) | from_preset(args))
    if values.proj != "cosine" and values.sigma == "maxcos":
        p.error(f"--proj {values.proj}: --sigma maxcos compares cosines")
    if not any([values.alpha_global, values.alpha_feat, values.alpha_resp]):
        p.error("--alpha-global, --alpha-feat and --alpha-resp are 0, nothing is distilled: --teacher none "
                "says so, with --init where the student starts")
    for flags, weight in WEIGHED:
        idle = [f for f in flags.split() if f in given and not getattr(values, weight)]
        if idle:
            p.error(f"{dash(idle[0])}: belongs to {dash(weight)} above 0, here it is 0")
    whole = values.kd_relation == "global"  # rkd reads neither levels nor sigma
    levels = values.alpha_feat or values.alpha_global and whole
    if "sigma" in given and not (levels or values.alpha_resp):
        p.error("--sigma: belongs to losses that these weights leave out")
    if "level_assign" in given and not levels:
        p.error("--level-assign: belongs to losses that these weights leave out")
    if "instances" in given and not (values.alpha_feat or values.alpha_global or values.sigma != "none"):
        p.error("--instances: belongs to losses that these weights leave out")
    idle = [f for f in OF_BANK if f in given]
    if idle and not needs_prototypes(values):
        p.error(f"{dash(idle[0])}: belongs to losses that use prototypes, Eq. 6 or --sigma in the two others")


def from_preset(args):
    """What the preset says of all that was not given."""
    values = PRESETS[args.preset or "paper"]
    return {k: v for k, v in values.items() if getattr(args, k, None) is None}


def resolve(args):
    """The flags with every default that depends on another flag; after this they are only read."""
    from common.zoo import PROTOTYPE_ZOO
    shapes, own = args.data == "shapes", args.train_json is not None
    names = {}  # of detectors that are trained already
    for flag, spec in (("--init", args.init), ("--teacher", args.teacher)):
        if spec not in (None, *NEW):
            names[flag] = arch_of(spec, flag)["name"]
    kind = kind_of_name(next(iter(names.values()), args.student or "faster"))
    student = None  # --init says it
    if "--init" not in names:
        student = args.student or f"{kind}_{'tiny8' if shapes else 'r50'}"
        kind, body = split_name(student)
        if shapes and not args.init and not body.startswith("tiny"):
            raise UserError(f"--student {student}: with --data shapes faster_tiny8 ... retina_tiny64 are "
                            "trained on demand; others need --init and --teacher")
    elif names["--init"].startswith(("cascade", "maskrcnn")):
        raise UserError(f"--init {args.init}: can be a teacher only; a student is Faster R-CNN or RetinaNet")
    values = vars(args) | from_preset(args)
    if shapes and args.photometric is None:
        values["photometric"] = False  # it swaps channels, and colours are names there
    teacher, control = args.teacher, args.control
    if teacher == "none" or not (values["alpha_global"] or values["alpha_feat"] or values["alpha_resp"]):
        teacher, control = "none", "none"
        values |= dict(alpha_global=0.0, alpha_feat=0.0, alpha_resp=0.0)
    elif own and not teacher:
        raise UserError("--train-json: needs a --teacher that knows its classes; train one: --teacher none "
                        "--student faster_r101")
    elif kind_of_name(names.get("--teacher", kind)) != kind:
        theirs = kind_of_name(names["--teacher"])
        raise UserError(f"--teacher {teacher} is a {theirs}, the student a {kind}: they must be of one kind")
    if teacher is None and not shapes:
        teacher = f"{kind}_r101"
    if own and not args.val_json:
        control = "none"  # nothing to compare on
    init = args.init
    if init is None and not shapes:
        init = "imagenet"
        if teacher != "none" and args.dataset == "coco" and not own and student in PROTOTYPE_ZOO:
            init, student = student, None
    if args.bn == "affine" and (init == "none" or "tiny" in (student or names.get("--init", ""))):
        raise UserError("--bn affine: belongs to a student that is trained already and has BatchNorm; tiny "
                        "ones have none")
    defaults = DEFAULTS | dict(lr=0.01 if kind == "retina" else 0.02)
    if shapes:
        defaults |= SHAPES
    values |= dict(preset=args.preset or "paper", data=default_root(args), image_size=default_size(args),
                   teacher=teacher, init=init, student=student, control=control)
    return with_defaults(argparse.Namespace(**values), defaults)


# ================================================================== main

def shapes_detector(name, args, rank, world, device, teacher=False):
    """Path of a plainly trained detector for shapes, see trained_before: a teacher has seen all images, a
    student the first 300 of them, or --first-images."""
    from common.tiny import trained_before
    epochs, usual = (8, 0) if teacher else (20, SHAPES["first_images"])
    images = usual if teacher or args.first_images is None else args.first_images
    flags = ["--data", "shapes", "--data-seed", str(args.data_seed), "--teacher", "none", "--init", "shapes"]
    flags += ["--student", name, "--epochs", str(epochs), "--first-images", str(images)]
    flags += ["--workers", str(args.workers), "--resume"]
    flags += ["--batch-size", str(max(1, SHAPES["batch_size"] // world))]  # of all processes: the same
    name += f"-e{epochs}-r2" + (f"-n{images}" if images != usual else "")  # r2: the second recipe
    return trained_before(f"prototype_kd-{name}", args.data_seed, rank,
                          lambda out: train(resolve(parse_args([*flags, "--out", out])), rank, world, device))


def wants_table(args):
    """Whether a command on shapes names nothing that would ask for one run only."""
    if args.table is not None:
        return args.table
    alone = args.teacher or args.init or args.max_iters or args.val_json or args.control != "run"
    return args.data == "shapes" and not alone


def quick_start(args, rank, world, device):
    """--data shapes: teacher, the student that is distilled, the same continued without distillation, and
    distilled, in one table and one picture."""
    open_table(args, rank)
    lines, found, paths, out = [], {}, [], Path(args.out)
    kind, val = kind_of_name(args.student or "faster"), make_data(resolve(args), "val")

    def note(name, metrics):
        """A row of the table, told as soon as it is there."""
        if rank == 0:
            line = f"{name:31s} {metrics['AP']:5.1f} {metrics['AP50']:5.1f} {metrics['AP75']:5.1f}"
            lines.append(f"{line} {time.time() - since:9.0f}")
            print(lines[-1], flush=True)

    for role, name in (("teacher", f"{kind}_{TEACHER}"), ("student", args.student or f"{kind}_tiny8")):
        since = time.time()
        paths.append(shapes_detector(name, args, rank, world, device, teacher=role == "teacher"))
        model = load(paths[-1], "--init")[0].to(device)
        note(f"{role} {name}", evaluate(model, val, rank, world, device, args)[0])
    runs = ("continued", "none", "none"), ("distilled", paths[0], str(out / "continued"))
    for word, teacher, control in runs:
        since = time.time()
        more = dict(teacher=teacher, init=paths[1], student=None, out=str(out / word), control=control,
                    table=False, resume=args.resume and (out / word / "last.pt").exists())
        note(f"student {word}", train(resolve(argparse.Namespace(**vars(args) | more)), rank, world, device))
        found[f"student {word}"] = out / word / "detections.json"
    if rank == 0:
        print(f"\nshapes, {len(val)} validation images     AP  AP50  AP75   seconds", *lines, sep="\n")
        from common.pictures import save_comparison
        print(f"ground truth, and what each student finds: {save_comparison(val, found, out)}")


def main():
    with started("prototype_kd.py") as (rank, world, device):
        args = parse_args()
        alone = args.predict and "--predict" or args.export and "--export"
        if alone and world > 1:
            raise UserError(f"{alone}: runs in one process; start it with python")
        if args.eval or args.predict:
            answer_folder(args.out, rank)
        if args.eval:
            evaluate_file(args, rank, world, device)
        elif args.predict:
            predict(args, device)
        elif args.export:
            export(args)
        elif wants_table(args):
            quick_start(args, rank, world, device)
        else:
            train(resolve(args), rank, world, device)


if __name__ == "__main__":
    main()
