# SPDX-License-Identifier: MIT
"""CrossKD: the teacher's head reads the student's features (Wang et al., CVPR 2024, arXiv:2306.11369).

Idea. A student that must copy the teacher AND fit the labels with the same layer gets contradictory
gradients. CrossKD distils elsewhere: the student's i-th head feature f_i^s is sent through the REST of
the frozen teacher head, C_{i+1}^t ... C_5^t, and these cross-head predictions must equal the teacher's
own. The labels act on the student's predictions, as without a teacher. The gradient of distillation
passes THROUGH the frozen layers to the student's blocks <= i, its FPN and backbone, and never reaches
its later layers. At test time the student is a plain detector: nothing is added to it.

This is version 1 of the paper (June 2023): dense detectors. CVPR's version adds Faster R-CNN and
Deformable DETR, for which no tuned code was published; they are not here.

    Eq. 1  imitation of features          fitnet_loss, pkd_loss
    Eq. 2  imitation of predictions       kd_losses on the student's own ("mimic"), ld_losses (LD)
    Eq. 3  CrossKD                        cross_head (with align), kd_losses
    Eq. 4  weighted sum of all losses     Distiller.forward, summed in train; weights of distillation: each
                                          detector's kd_weights, --kd-weights
    Eq. 5  distance of boxes, 1 - GIoU    kd_box of ATSS and RetinaNet; of FCOS: -ln IoU
    Eq. 6  distance of binned edges, KL   region_kl, kd_box of GFL
    Eq. 7  distance of class scores, QFL  quality_focal; quality_focal_kd is the same in less memory

Differs from the paper. Where its text and the authors' code disagree, their code is followed, since it
made the numbers:
  1. phi, align below: before it enters the teacher's head each channel of f_i^s gets the mean and
     deviation of f_i^t. Not in the paper. --align post|pre|none. Their code takes f_i after its ReLU
     (an in-place ReLU overwrites what it meant to keep): post is the default.
  2. Eq. 3 divides by |S|. Their code divides by the positives of the labels, as the classification loss does
     (FCOS: by the sum of centerness, as its box loss); only GFL's box term divides by the sum of S.
  3. Eq. 3, S: paper 1 for classes, the foreground for boxes; their code 1 but for ignored priors, and the
     teacher's top class score. --kd-reg-mask soft|fg.
  4. FCOS: paper GIoU and i = 3; code -ln IoU, i = 2, weights 0.4 and 0.75. ATSS: the code adds a
     centerness term.
  5. RetinaNet students make P6 from P5, as in the code; teachers and mmdetection's plain RetinaNets, rows
     *-none with --p6 on_input, from C5.
and from their code:
  6. Normalisers are max(sum over processes, bound) / processes, the bound 1 or 1e-6 as there, but 1 in FCOS
     distillation and 1e-6 for GFL's sum of S, which has none (it and RetinaNet's positives are local there).
     Local, as there: the statistics of phi and PKD (--sync-stats makes them global), and LD's box term, which
     has no normaliser: N processes of B images weigh it 1/N of what one process of N x B images does. With
     --accumulate all of them are of a micro-batch.
Not published, our choice:
  7. Strategies b-d (a figure only), the LD rows (--method ld joins mmdetection's box term and the LD authors'
     class term, main region; --method mimic is i = 5 with CrossKD's own losses), the weights of FitNet and of
     PKD alone (that of CrossKD+PKD; PKD's authors: 10 for RetinaNet, 4 maps), MobileNetV2 (torchvision's
     weights, running statistics fixed), --adapt (a 1x1 convolution a tower, for heads of another width; the
     authors call it possible), Kaiming's first weights in such heads, the warm-up of short runs (a tenth).

Letters: B images, C channels, H W size, L = 5 levels, A anchors or points of all levels, M boxes
(padded), K classes, R = 17 bins of a box edge; C_1 .. C_5 the layers of a head (C_5 predicts), C3 .. C5
stages of the backbone, P3 .. P7 the pyramid; prefix t_ teacher, s_ student, cross_ cross-head.
S the region weight of Eq. 3. Boxes are xyxy pixels of the network's input.

    torchrun --nproc_per_node 8 crosskd.py --teacher gfl_r101    # GFL R101 -> R50, 12 epochs, data/coco
    torchrun --nproc_per_node 8 crosskd.py --row t1-i3           # a row of a table; --rows lists them
    python crosskd.py --data shapes         # everything in minutes on a CPU, into runs/crosskd/{none,crosskd}
    python crosskd.py --eval gfl_r101
    python crosskd.py --predict photo.jpg --weights runs/crosskd/best.pt     # of shapes: runs/crosskd/crosskd
    python crosskd.py --export student.pt2 --weights runs/crosskd/best.pt
Own data: train a teacher (--method none --student gfl_r101 --out runs/teacher --train-json a.json
--train-images a/ ...), then give it as --teacher runs/teacher/best.pt; see README.md.

Expected, COCO val2017 AP (paper; 8 GPUs x 2 images, 12 epochs): GFL R50 teacher 40.2, R18 alone 35.8,
CrossKD 38.7; GFL R101 teacher 44.9, R50 alone 40.2, CrossKD 43.7, with PKD 43.9. COCO not run here; shapes,
tests/STUDIES.md: 11.2 -> 17.5 after 3 epochs, 25.8 -> 29.4 after 8; at equal compute no gain is shown.
"""
import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd.function import once_differentiable
from torchvision.ops import FeaturePyramidNetwork, batched_nms, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from tqdm import tqdm

from common.boxes import (assign_atss, assign_fcos, assign_max_iou, cells_inside, centerness_target, constant,
                          decode_deltas, decode_distances, encode_deltas, encode_distances, grid_anchors,
                          grid_points, overlap)
from common.datasets import (CocoDataset, as_pixels, check_classes, collate, eval_loader, find_coco,
                             own_files, parse_image_size, resize, train_loader)
from common.evaluation import Detections, class_table, coco_evaluate, judged
from common.run import (COUNT, POSITIVE, SEED, Run, UserError, answer_folder, check_teacher, describe_model,
                        fast_layout, fused, gather, load_strict, number, open_run, open_table, parse, parser,
                        rebuilding, reduce_mean, rows, run_flags, saved_run, seed_all, started, tell_size,
                        to_device, warmup_multistep, with_defaults, wrap_ddp)

STRIDES = (8, 16, 32, 64, 128)
BINS = 17  # of a box edge


# ================================================================== the paper

class Outputs(NamedTuple):
    """What a detector's forward pass gives."""
    maps: dict   # {"cls", "reg", "ctr"} -> L raw maps (B, outputs, H_l, W_l)
    feats: list  # FPN: L maps (B, C, H_l, W_l)
    held: dict   # {(tower, i): L maps f_i} of the i asked for: block i's output, see Head; f_0 = FPN


class Targets(NamedTuple):
    """What the labels say about each prior. All on the device, made without waiting for it."""
    priors: torch.Tensor    # (A, 4) anchors, or (A, 2) points
    strides: torch.Tensor   # (A, 1)
    positive: torch.Tensor  # (B, A) bool
    weight: torch.Tensor    # (B, A) label weight: 0 where ignored
    onehot: torch.Tensor    # (B, A, K) 1 at the class of a positive
    boxes: torch.Tensor     # (B, A, 4) the assigned box (arbitrary where not positive)
    centerness: torch.Tensor  # (B, A) target in [0, 1], 0 where not positive
    count: torch.Tensor     # () normaliser of most losses, see Detector.normaliser


def fp32(x):
    """bf16 maps of autocast -> fp32, in which all statistics and losses are computed; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def quality_focal(cross_logits, t_logits, beta=1.0):
    """Eq. 7, QFL with the teacher's scores as labels, element by element.

    cross_logits, t_logits: (..., K) logits, t_logits a constant. The factor |q - t|^beta carries
    gradient; beta 0 is plain BCE. Returns (..., K), 0 where both are equal (beta > 0).
    Source: Li et al. 2020 (GFL), Eq. 2. To read and to copy; called is `quality_focal_kd`, the same in less
    memory.
    """
    cross_logits, t = fp32(cross_logits), fp32(t_logits.detach()).sigmoid()
    bce = F.binary_cross_entropy_with_logits(cross_logits, t, reduction="none")
    return (cross_logits.sigmoid() - t).abs().pow(beta) * bce  # Eq. 7


class QualityFocal(torch.autograd.Function):
    """quality_focal with its derivative by hand: of a RetinaNet's 16 million scores an image, autograd
    would keep seven maps, this keeps one.

    With q = sigmoid(x), d = |q - t|:
    dL/dx = d^beta (q - t) + beta d^(beta - 1) sign(q - t) q (1 - q) BCE(q, t).
    """

    @staticmethod
    def forward(ctx, x, t, beta):
        q = x.sigmoid()
        gap = q - t
        bce = F.softplus(x).addcmul_(x, t, value=-1)  # softplus(x) - x t
        d = gap.abs()

        def power(exponent):
            return d if exponent == 1 else d.clamp(min=1e-12).pow(exponent)

        if beta == 0:
            ctx.save_for_backward(gap)
            return bce
        grad = gap * power(beta)
        slope = q.addcmul_(q, q, value=-1).mul_(bce).mul_(gap.sign_())  # in place: q and gap are done with
        grad += slope if beta == 1 else beta * power(beta - 1) * slope
        ctx.save_for_backward(grad)
        return bce.mul_(power(beta))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None


def quality_focal_kd(cross_logits, t_logits, beta=1.0):
    """Eq. 7, as `quality_focal`."""
    return QualityFocal.apply(fp32(cross_logits), fp32(t_logits.detach()).sigmoid(), beta)


def region_kl(cross_logits, t_logits, T=1.0):
    """Eq. 6: T^2 KL(teacher || cross-head) of a binned box edge. (..., R) logits -> (...), summed over R.
    (LD uses it for classes, too.)"""
    log_q = (cross_logits / T).log_softmax(-1)
    log_p = (t_logits.detach() / T).log_softmax(-1)
    return T * T * (log_p.exp() * (log_p - log_q)).sum(-1)  # Eq. 6


def channel_stats(x, sync=False):
    """Per-channel mean and unbiased std over batch, height and width: (B, C, H, W) -> two (1, C, 1, 1).

    sync: over all processes, with gradient. A single position has std 0 (its unbiased std would be NaN).
    """
    n = x.shape[0] * x.shape[2] * x.shape[3]
    if sync and dist.is_initialized():
        from torch.distributed.nn.functional import all_reduce
        n = reduce_mean(x.new_tensor(float(n))) * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3), keepdim=True)) / n
        var = all_reduce((x - mean).pow(2).sum((0, 2, 3), keepdim=True)) / (n - 1).clamp(min=1)
    else:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=1 if n > 1 else 0, keepdim=True)
    return mean, var.clamp(min=1e-20).sqrt()  # clamped: sqrt of a constant channel's 0 has gradient inf


def align(source, target, sync=False, eps=1e-6):
    """phi: give each channel of `source` the mean and deviation of `target`, both (B, C, H, W), fp32.

    Not in the paper. The statistics of `source` are part of the graph (so its gradient sums to zero per
    channel), those of `target` are constants. So the teacher's next layer sees the range it was trained on.
    """
    source, target = fp32(source), fp32(target.detach())
    s_mean, s_std = channel_stats(source, sync)
    t_mean, t_std = channel_stats(target, sync)
    return (source - s_mean) / (s_std + eps) * t_std + t_mean


def cross_head(head, s_held, t_held, i, aligned=True, sync=False):
    """Cross-head predictions of Eq. 3: C_{i+1} .. C_5 of `head` on phi(f_i^s; f_i^t).

    head(cls_feats, reg_feats, start=i)[0]: predictions of the frozen teacher head behind block i, here the
    maps of class Head. s_held, t_held: Outputs.held of student and teacher. Frozen, but for Eq. 3 not under
    no_grad: the gradient passes through the head to the student's f_i.

    Around another head, one tower, L maps each (f_i: outputs of its i-th block, AFTER the activation):
        rest = nn.Sequential(*teacher_tower[i:], teacher_prediction)            # frozen, in eval mode
        cross = [rest(align(s, t).relu()) for s, t in zip(s_feats, t_feats)]    # t_feats under no_grad
        loss = (quality_focal(cross_logits, t_logits).sum(-1) * used).sum() / max(positives, 1)
    used (B, A): 0 where the labels ignore a prior, else 1. positives: of the batch, an image without counts
    as one. The student's own losses come beside it. Both heads must read the same levels, anchors, classes
    and pixels; a scale of each level (ATSS, GFL, FCOS: of boxes) belongs to `rest`. (sync: reduce_mean.)
    """
    towers = []
    for tower in ("cls", "reg"):
        feats = []
        for s_feat, t_feat in zip(s_held[tower, i], t_held[tower, i], strict=True):
            x = align(s_feat, t_feat, sync) if aligned else s_feat
            # phi can leave negative values, which no block after a ReLU has ever seen; f_0, the FPN
            # map, has no ReLU
            feats.append(x.relu() if i > 0 else x)
        towers.append(feats)
    return head(*towers, start=i)[0]


def kd_losses(cross, teacher, targets, box_loss, cls_weight, *, branches="both", distance="qfl",
              region="P+N", reg_mask="soft", beta=1.0, T=1.0, class_logits=None):
    """Eq. 3 for both branches: sum over priors of S(r) * D(cross(r), teacher(r)), normalised.

    cross, teacher: flattened head outputs {"cls": (B, A, K), "reg": (B, A, ...)}, one sigmoid logit a class;
    teacher without gradient. targets: Targets (weight, positive are read). Classes: S by region, D = QFL,
    Eq. 7, or BCE, times cls_weight, a scalar: weight / normaliser. Boxes: box_loss(cross, teacher,
    targets, S, T) -> {name: scalar}, Eq. 5 or 6 with its normaliser, as RetinaNet.kd_box; S = the teacher's
    top class score ("soft") or the foreground ("fg"). class_logits: the teacher's, where `teacher` is
    something else (strategies c, d).
    """
    losses = {}
    if branches != "reg":
        D = quality_focal_kd(cross["cls"], teacher["cls"], beta if distance == "qfl" else 0.0).sum(-1)
        S = targets.weight  # 0 at priors that are ignored
        if region == "P":
            S = S * targets.positive
        elif region == "N":
            S = S * ~targets.positive
        losses["kd_cls"] = (D * S).sum() * cls_weight  # Eq. 3
    if branches != "cls":
        logits = teacher["cls"] if class_logits is None else class_logits
        S = logits.amax(-1).sigmoid() * targets.weight if reg_mask == "soft" else targets.positive.float()
        losses |= box_loss(cross, teacher, targets, S, T)  # Eq. 3
    return losses


class Distiller(nn.Module):
    """The student and its losses: forward(batch) -> {name: loss}, whose sum is Eq. 4.

    teacher: None, or the frozen detector. It is kept outside the module tree: move it to the device yourself.
    layer: i of Eq. 3, None for the detector's own. align: "post" or "pre" the ReLU of f_i, or "none". adapt:
    f_i^s passes a 1x1 convolution a tower to the teacher's width. kd: keyword arguments of kd_losses.
    Of a detector it uses normalise, forward, head, assign, flatten, losses, kd_box, kd_cls_weight, kd_layer
    and arch["channels"]: see class Detector.
    """

    def __init__(self, student, teacher=None, layer=None, align="post", sync_stats=False, amp=False,
                 adapt=False, kd=None):
        super().__init__()
        self.student = student
        # In a tuple, so that parameters(), state_dict(), train(), DDP and the optimizer never see it.
        self.teacher = (teacher.eval().requires_grad_(False),) if teacher else ()
        self.layer = student.kd_layer if layer is None else layer
        self.align, self.sync_stats, self.amp, self.kd = align, sync_stats, amp, kd or {}
        self.keep_layers = (self.layer,) if teacher else ()
        self.adapter = None
        if adapt:
            widths = student.arch["channels"], teacher.arch["channels"]
            self.adapter = nn.ModuleDict({tower: nn.Conv2d(*widths, 1) for tower in ("cls", "reg")})

    def outputs_of(self, detector, batch):
        """Outputs of student or teacher, with f_i of both towers."""
        images = detector.normalise(batch["images"], batch["sizes"])
        with self.autocast(images):
            return detector(images, self.keep_layers, self.align == "pre")

    def autocast(self, like):
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.amp)

    def assign(self, student_out, batch):
        """The student's Targets. Assigners here look at the labels only: the teacher's would be the same."""
        level_sizes = [m.shape[-2:] for m in student_out.maps["cls"]]
        return self.student.assign(level_sizes, batch["sizes"], batch["boxes"], batch["labels"])

    def adapted(self, held):
        """f_i^s at the teacher's width."""
        if self.adapter is None:
            return held
        return {(tower, i): [self.adapter[tower](x) for x in feats] for (tower, i), feats in held.items()}

    def forward(self, batch):
        student = self.student
        student_out = self.outputs_of(student, batch)
        targets = self.assign(student_out, batch)
        student_pred = student.flatten(student_out.maps)
        losses = student.losses(student_pred, targets)
        if not self.teacher:
            return losses
        with torch.no_grad():  # not inference_mode: its tensors cannot be saved for align's backward
            teacher_out = self.outputs_of(*self.teacher, batch)
        return losses | self.distil(student_out, student_pred, teacher_out, targets)

    def distil(self, student_out, student_pred, teacher_out, targets):
        """CrossKD's terms: {name: loss}. student_pred, the student's own predictions, take no part."""
        student, (teacher,) = self.student, self.teacher
        with self.autocast(targets.boxes):
            cross_maps = cross_head(teacher.head, self.adapted(student_out.held), teacher_out.held,
                                    self.layer, self.align != "none", self.sync_stats)
        return kd_losses(student.flatten(cross_maps), student.flatten(teacher_out.maps), targets,
                         student.kd_box, student.kd_cls_weight(targets), **self.kd)


# ================================================================== what its tables compare with

def pkd_loss(s_feats, t_feats, sync=False, eps=1e-6):
    """PKD (Cao et al. 2022): half the squared distance of per-channel standardised maps = 1 - Pearson
    correlation. Summed over levels, mean over elements. Weights and where it acts: --pkd-weight, --pkd-at.
    """
    total = 0
    for s_feat, t_feat in zip(s_feats, t_feats, strict=True):
        s_feat, t_feat = fp32(s_feat), fp32(t_feat.detach())
        s_mean, s_std = channel_stats(s_feat, sync)
        t_mean, t_std = channel_stats(t_feat, sync)
        gap = (s_feat - s_mean) / (s_std + eps) - (t_feat - t_mean) / (t_std + eps)
        total = total + gap.pow(2).mean() / 2
    return total


def fitnet_loss(s_feats, t_feats):
    """Eq. 1 with D = squared error and S = 1, summed over levels; weight 2 (LD's code: cells in boxes)."""
    return 2.0 * sum(F.mse_loss(fp32(s), fp32(t)) for s, t in zip(s_feats, t_feats, strict=True))


def ld_losses(student, teacher, targets, branches="both"):
    """LD (Zheng et al. 2022), main region, for GFL: flattened outputs of student and teacher at positives.

    Box: mean over bins of T^2 KL, T = 10, weighted by the student's own top score, weight 0.25, not
    normalised by the number of boxes, as in mmdetection. Class: softmax KL, T = 2, mean over classes,
    weight 10, per positive of all levels together (the LD authors' code divides level by level).
    """
    losses = {}
    if branches != "cls":
        kl = region_kl(student["reg"].unflatten(-1, (4, BINS)), teacher["reg"].unflatten(-1, (4, BINS)), 10.0)
        weight = student["cls"].detach().sigmoid().amax(-1) * targets.positive
        losses["ld_box"] = 0.25 * ((kl / BINS).sum(-1) / 4 * weight).sum()
    if branches != "reg":
        kl = region_kl(student["cls"], teacher["cls"], 2.0) / student["cls"].shape[-1]
        losses["ld_cls"] = 10.0 * (kl * targets.positive).sum() / targets.count
    return losses


def strategy_maps(strategy, student, teacher, student_out, teacher_out, i, aligned=True, sync=False):
    """The two predictions that are compared: (maps that receive gradient, target maps).

    a  teacher head on student feature  <-> teacher prediction                (CrossKD, Eq. 3)
    b  student head on teacher feature  <-> teacher prediction
    c  student prediction               <-> student head on teacher feature
    d  student prediction               <-> teacher head on student feature
    b-d are our reading of a figure; targets are constants. The paper says that c and d hardly reach the
    backbone, which this reading, through the student's own prediction, does not share.
    """
    def teachers_head():  # on the student's feature
        return cross_head(teacher.head, student_out.held, teacher_out.held, i, aligned, sync)

    def students_head():  # on the teacher's feature
        return cross_head(student.head, teacher_out.held, student_out.held, i, aligned, sync)

    if strategy == "a":
        return teachers_head(), teacher_out.maps
    if strategy == "b":
        return students_head(), teacher_out.maps
    with torch.no_grad():  # of the target alone: student_out.maps have their graph already
        return student_out.maps, students_head() if strategy == "c" else teachers_head()


class Comparison(Distiller):
    """What the tables compare CrossKD with, alone or joined. methods: of METHODS."""
    pkd_layer = 3  # whose features PKD compares in a tower

    def __init__(self, student, teacher, methods=("crosskd",), strategy="a", pkd_at="neck", pkd_weight=1.0,
                 **options):
        super().__init__(student, teacher, **options)
        self.methods, self.strategy, self.pkd_at, self.pkd_weight = methods, strategy, pkd_at, pkd_weight
        keep = {self.layer} if "crosskd" in methods else set()
        if "pkd" in methods and pkd_at != "neck":
            keep.add(self.pkd_layer)
        self.keep_layers = tuple(sorted(keep))

    def pkd_places(self, out):
        """Lists of L maps, one a place where PKD compares. The ReLU: --align pre holds f_i before it."""
        if self.pkd_at == "neck":
            return [out.feats]
        return [[x.relu() for x in out.held[tower, self.pkd_layer]] for tower in self.pkd_at.split("+")]

    def distil(self, student_out, student_pred, teacher_out, targets):
        student, (teacher,) = self.student, self.teacher
        teacher_pred = student.flatten(teacher_out.maps)
        kd_terms, losses = (student.kd_box, student.kd_cls_weight(targets)), {}
        if "crosskd" in self.methods:
            with self.autocast(targets.boxes):
                adapted = student_out._replace(held=self.adapted(student_out.held))
                pair = strategy_maps(self.strategy, student, teacher, adapted, teacher_out, self.layer,
                                     self.align != "none", self.sync_stats)
            cross, target = map(student.flatten, pair)
            logits = teacher_pred["cls"]
            losses |= kd_losses(cross, target, targets, *kd_terms, class_logits=logits, **self.kd)
        if "mimic" in self.methods:  # Eq. 2: the student's own predictions, same distances
            mimic = kd_losses(student_pred, teacher_pred, targets, *kd_terms, **self.kd)
            losses |= {name.replace("kd", "mimic"): loss for name, loss in mimic.items()}
        if "ld" in self.methods:
            losses |= ld_losses(student_pred, teacher_pred, targets, self.kd.get("branches", "both"))
        if "pkd" in self.methods:
            places = zip(self.pkd_places(student_out), self.pkd_places(teacher_out))
            losses["pkd"] = self.pkd_weight * sum(pkd_loss(s, t, self.sync_stats) for s, t in places)
        if "fitnet" in self.methods:
            losses["fitnet"] = fitnet_loss(student_out.feats, teacher_out.feats)
        return losses


METHODS = ("none", "crosskd", "mimic", "ld", "pkd", "fitnet")


# ================================================================== detector

class Body(nn.Module):
    """The stages of a torchvision classifier up to the last tap, run in order; returns {tap: map}.

    norms: optional LayerNorm per tap for channels-last stages (Swin), whose maps are turned to NCHW.
    """

    def __init__(self, stages, taps, norms=None):
        super().__init__()
        names = [n for n, _ in stages]
        self.stages = nn.ModuleDict(stages[:names.index(taps[-1]) + 1])
        self.taps, self.norms = taps, nn.ModuleDict(norms or {})

    def forward(self, x):
        maps = {}
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.taps:
                maps[name] = self.norms[name](x).permute(0, 3, 1, 2).contiguous() if self.norms else x
        return maps


RESNET_TAPS = ("layer2", "layer3", "layer4")
BACKBONES = {  # name: torchvision's name, where C3, C4, C5 are tapped, their channels
    "r18": ("resnet18", RESNET_TAPS, (128, 256, 512)),
    "r34": ("resnet34", RESNET_TAPS, (128, 256, 512)),
    "r50": ("resnet50", RESNET_TAPS, (512, 1024, 2048)),
    "r101": ("resnet101", RESNET_TAPS, (512, 1024, 2048)),
    "mnv2": ("mobilenet_v2", ("6", "13", "18"), (32, 96, 1280)),
    "swint": ("swin_t", ("3", "5", "7"), (192, 384, 768))}


def make_body(name, caffe=False, init="none"):
    """(Body, its three channel counts) of a name in BACKBONES, or tinyN. init "imagenet": downloaded; "none";
    or, of tinyN, a file of common/tiny.py's."""
    if name.startswith("tiny"):
        from common.tiny import tiny_resnet
        width = int(name[4:])
        net, taps, channels = tiny_resnet(name, init), RESNET_TAPS, (2 * width, 4 * width, 8 * width)
    else:
        full_name, taps, channels = BACKBONES[name]
        net = getattr(torchvision.models, full_name)(weights=None)
    if init not in ("imagenet", "none") and not name.startswith("tiny"):
        raise UserError(f"{name}: starts from imagenet or none, not from {init}")
    if init == "imagenet":
        from common.zoo import load_imagenet
        load_imagenet(net, full_name, caffe)
    if name == "swint":
        from common.zoo import always_shift
        always_shift(net)  # as mmdetection, whose weights the teacher has; torchvision does not on small maps
    if caffe:  # the stride of a stage sits in its first 1x1 convolution
        for stage in (net.layer2, net.layer3, net.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    norms = {t: nn.LayerNorm(c) for t, c in zip(taps, channels)} if name == "swint" else None
    stages = list(getattr(net, "features", net).named_children())
    return Body(stages, taps, norms), channels


class P6P7(ExtraFPNBlock):
    """P6 and P7 by stride-2 convolutions, from C5 ("on_input") or P5 ("on_output"); only FCOS has a ReLU
    between (torchvision's LastLevelP6P7 always)."""

    def __init__(self, c5_channels, channels, source, relu):
        super().__init__()
        self.source, self.relu = source, relu
        self.p6 = nn.Conv2d(c5_channels if source == "on_input" else channels, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, results, x, names):
        p6 = self.p6(x[-1] if self.source == "on_input" else results[-1])
        p7 = self.p7(p6.relu() if self.relu else p6)
        return results + [p6, p7], names + ["p6", "p7"]


class Block(nn.Module):
    """C_1 .. C_4 up to the ReLU, which Head applies: 3x3 convolution, GroupNorm (RetinaNet: none)."""

    def __init__(self, channels, norm):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=not norm)
        groups = min(32, channels // 2)  # one channel on one cell would be a norm of a single number
        self.norm = nn.GroupNorm(groups, channels) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.conv(x))


class Head(nn.Module):
    """Two towers of four blocks and their prediction convolutions C_5, shared by all levels.

    ctr: None, "cls" or "reg", the tower that centerness is read from. scales: a learnt factor a level on reg.
    """

    def __init__(self, channels, cls_out, reg_out, norm=True, ctr=None, scales=True):
        super().__init__()
        self.cls_tower = nn.ModuleList(Block(channels, norm) for _ in range(4))
        self.reg_tower = nn.ModuleList(Block(channels, norm) for _ in range(4))
        self.cls_pred = nn.Conv2d(channels, cls_out, 3, 1, 1)
        self.reg_pred = nn.Conv2d(channels, reg_out, 3, 1, 1)
        self.ctr, self.ctr_pred = ctr, nn.Conv2d(channels, 1, 3, 1, 1) if ctr else None
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in STRIDES) if scales else None
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=0.01)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        if channels != 256:  # 0.01 belongs to 256 channels and SGD; a narrow head by AdamW needs its fan-in
            for block in (*self.cls_tower, *self.reg_tower):
                nn.init.kaiming_normal_(block.conv.weight)
        nn.init.constant_(self.cls_pred.bias, -4.59511985)  # -ln 99: every class starts at score 0.01

    def forward(self, cls_feats, reg_feats, start=0, keep=(), pre=False):
        """C_{start+1} .. C_5 on f_start, for L levels.

        cls_feats, reg_feats: L maps (B, C, H_l, W_l), f_start of the two towers (f_0, twice, is the FPN).
        keep: the i whose f_i the caller wants; pre: f_i before its ReLU.
        Returns (maps, held): maps {"cls", "reg", "ctr"} -> L raw maps; held {(tower, i): L maps}.
        """
        maps = {"cls": [], "reg": [], "ctr": []}
        held = {(tower, i): [] for tower in ("cls", "reg") for i in keep}
        for level, feats in enumerate(zip(cls_feats, reg_feats)):
            last = {}
            for tower, blocks, x in zip(("cls", "reg"), (self.cls_tower, self.reg_tower), feats):
                if 0 in keep:
                    held[tower, 0].append(x)
                for i in range(start + 1, 5):
                    before = blocks[i - 1](x)
                    x = before.relu()  # not in place: `before` may be held
                    if i in keep:
                        held[tower, i].append(before if pre else x)
                last[tower] = x
            maps["cls"].append(self.cls_pred(last["cls"]))
            reg = self.reg_pred(last["reg"])
            maps["reg"].append(reg if self.scales is None else reg * self.scales[level])
            if self.ctr:
                maps["ctr"].append(self.ctr_pred(last[self.ctr]))
        return maps, held


def focal_loss(logits, onehot, alpha=0.25):
    """Focal loss (Lin et al. 2017), gamma 2: -alpha_t (1 - p_t)^2 log p_t, element by element.

    With u = logit of the WRONG answer, 1 - p_t = sigmoid(u) and -log p_t = softplus(u): torchvision's
    sigmoid_focal_loss, the same numbers, takes twice the passes over a RetinaNet's 16 million scores.
    """
    u = logits * (1 - 2 * onehot)
    return u.sigmoid().square() * F.softplus(u) * (1 - alpha + (2 * alpha - 1) * onehot)


def distribution_focal_loss(logits, target):
    """GFL's DFL: cross entropy with the two bins around a target in bins. (..., 68), (..., 4) -> (..., 4)."""
    low = target.floor()
    logp = logits.unflatten(-1, (4, BINS)).log_softmax(-1)
    left, right = (logp.gather(-1, (low.long() + k)[..., None])[..., 0] for k in (0, 1))
    return -(low + 1 - target) * left - (target - low) * right


class Detector(nn.Module):
    """Backbone, FPN, head. Subclasses say what its numbers mean, decode(reg, priors, strides), how they
    are trained, losses(out, targets), and distilled, kd_box(cross, teacher, targets, S, T). priors and match
    here are those of GFL and ATSS."""
    kind = ""
    cells = 1          # priors a position
    reg_out = 4        # numbers a prior
    norm = True        # GroupNorm in the towers
    ctr = None         # the tower that centerness is read from
    scales = True      # a learnt factor a level on reg
    p6_relu = False    # between P6 and P7
    nms_iou = 0.6
    kd_layer = 3       # i of Eq. 3
    kd_weights = 1.0, 1.0  # of Eq. 3 in Eq. 4: classes, boxes
    pkd_weight = 2.0

    def __init__(self, backbone="r50", num_classes=80, channels=256, p6="on_output", init="none"):
        super().__init__()
        self.arch = dict(kind=self.kind, backbone=backbone, num_classes=num_classes, channels=channels, p6=p6)
        self.num_classes, self.frozen = num_classes, False
        self.caffe = self.kind == "fcos" and backbone in ("r50", "r101")
        self.body, widths = make_body(backbone, self.caffe, init)
        self.fpn = FeaturePyramidNetwork(list(widths), channels, P6P7(widths[-1], channels, p6, self.p6_relu))
        for m in self.fpn.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        self.head = Head(channels, self.cells * num_classes, self.cells * self.reg_out, self.norm, self.ctr,
                         self.scales)
        mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
        if self.caffe:
            mean, std = (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        if init != "none":
            self.freeze()

    def freeze(self):
        """A pre-trained ResNet keeps stem and first stage; FCOS (caffe) all BatchNorm affines, too."""
        self.frozen = True
        for name, parameter in self.body.stages.named_parameters():
            norm = self.caffe and re.search(r"bn\d\.|downsample\.1\.", name)
            if norm or name.startswith(("conv1.", "bn1.", "layer1.")):
                parameter.requires_grad = False

    def train(self, mode=True):
        """BatchNorm of a pre-trained backbone keeps its running statistics: 2 images a GPU are too few."""
        super().train(mode)
        if self.frozen:
            for m in self.body.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()
        return self

    def normalise(self, images, sizes=None):
        """uint8 RGB (B, 3, H, W) -> float. sizes (B, 2) h, w: padding becomes the mean pixel, zero here."""
        if self.caffe:
            images = images.flip(1)  # BGR
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        if sizes is None:
            return x
        rows = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]
        cols = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]
        return x * (rows[:, None, :, None] & cols[:, None, None, :])

    def forward(self, images, keep=(), pre=False):
        """Normalised images (B, 3, H, W), H and W multiples of 32 -> Outputs; keep, pre: see Head."""
        feats = list(self.fpn(self.body(images)).values())
        maps, held = self.head(feats, feats, 0, keep, pre)
        return Outputs(maps, feats, held)

    def flatten(self, maps):
        """Maps of L levels -> {"cls": (B, A, K), "reg": (B, A, 4 or 4 R), "ctr": (B, A)}, raw, fp32."""
        def flat(levels, width):
            rows = torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in levels], 1)  # one copy
            return fp32(rows.reshape(rows.shape[0], -1, width))  # (B, A, width)
        out = dict(cls=flat(maps["cls"], self.num_classes), reg=flat(maps["reg"], self.reg_out))
        if self.ctr:
            out["ctr"] = flat(maps["ctr"], 1)[..., 0]
        return out

    def priors(self, level_sizes, device):
        """GFL, ATSS: one square anchor of side 8 strides per cell. (A, 4)"""
        return grid_anchors(level_sizes, STRIDES, [8.0], device=device)

    def strides(self, counts, device):
        """(A, 1) stride of each prior; counts: priors per level."""
        return torch.cat([torch.full((n, 1), float(s), device=device) for n, s in zip(counts, STRIDES)])

    def match(self, priors, counts, gt_boxes, valid, inside):
        """(B, A) index of each prior's box, -1 background, -2 ignored."""
        return assign_atss(priors, counts, gt_boxes, valid, inside)

    def assign(self, level_sizes, sizes, gt_boxes, gt_labels):
        """Labels -> Targets. sizes (B, 2) h, w; gt_boxes (B, M, 4); gt_labels (B, M), -1 = padding."""
        device, valid = gt_boxes.device, gt_labels >= 0
        priors = self.priors(level_sizes, device)
        counts = [h * w * self.cells for h, w in level_sizes]
        inside = cells_inside(sizes, level_sizes, STRIDES, self.cells)
        owner = self.match(priors, counts, gt_boxes, valid, inside)
        positive, index = owner >= 0, owner.clamp(min=0)
        boxes = gt_boxes.gather(1, index[..., None].expand(-1, -1, 4))
        labels = gt_labels.gather(1, index).clamp(min=0)
        onehot = torch.zeros(*labels.shape, self.num_classes, device=device)
        onehot.scatter_(2, labels[..., None], positive[..., None].float())
        count = self.normaliser(positive.sum(1).float())
        points = priors if priors.shape[1] == 2 else centers(priors)
        centerness = centerness_target(boxes, points) * positive
        return Targets(priors, self.strides(counts, device), positive, (owner > -2).float(), onehot, boxes,
                       centerness, count)

    def normaliser(self, positives):
        """Positives (B,) of the batch's images in all, mean over processes. An image without any counts as
        one."""
        return reduce_mean(positives.clamp(min=1).sum())

    def cls_loss(self, out, targets):
        """Sigmoid focal loss over all classes and priors, per positive."""
        return (focal_loss(out["cls"], targets.onehot).sum(-1) * targets.weight).sum() / targets.count

    def kd_cls_weight(self, targets):
        """Weight of Eq. 4 / normaliser of Eq. 3's class term."""
        return self.kd_weights[0] / targets.count

    def decoded(self, out, targets):
        """Boxes (B, A, 4) of flattened outputs."""
        return self.decode(out["reg"], targets.priors, targets.strides)

    @torch.no_grad()
    def detect(self, maps, sizes, score_thr=0.05, nms_pre=1000, max_per_image=100):
        """Maps -> per image (boxes (N, 4) in network pixels, scores (N,), labels (N,)), by falling score.

        sigmoid(cls) > score_thr -> the best nms_pre (prior, class) pairs of each level by that score alone ->
        decode, clip to the image -> times sigmoid(centerness) -> class-wise NMS -> max_per_image.
        """
        level_sizes = [m.shape[-2:] for m in maps["cls"]]
        out, counts = self.flatten(maps), [h * w * self.cells for h, w in level_sizes]
        priors = self.priors(level_sizes, out["reg"].device).to(out["reg"].dtype)
        strides = self.strides(counts, priors.device)
        scores, results = out["cls"].sigmoid(), []
        for b in range(len(scores)):
            picked, start = [], 0
            for count in counts:
                level = scores[b, start:start + count]
                pairs = (level > score_thr).nonzero()
                best = level[pairs[:, 0], pairs[:, 1]].topk(min(nms_pre, len(pairs))).indices
                picked.append(pairs[best] + pairs.new_tensor([start, 0]))
                start += count
            prior, label = torch.cat(picked).unbind(1)
            boxes = self.decode(out["reg"][b, prior], priors[prior], strides[prior])
            h, w = sizes[b].tolist()
            boxes = clip_boxes_to_image(boxes, (h, w))
            score = scores[b, prior, label]
            if self.ctr:
                score = score * out["ctr"][b, prior].sigmoid()
            solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
            boxes, score, label = boxes[solid], score[solid], label[solid]
            kept = batched_nms(boxes, score, label, self.nms_iou)[:max_per_image]
            results.append((boxes[kept], score[kept], label[kept]))
        return results


def centers(boxes):
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def centerness_loss(out, target, targets):
    """BCE at the positives, per positive."""
    bce = F.binary_cross_entropy_with_logits(out["ctr"], target, reduction="none")
    return (bce * targets.positive).sum() / targets.count


class GFL(Detector):
    """Generalized Focal Loss: class score = IoU quality; a box edge is a distribution over R = 17 bins."""
    kind, reg_out = "gfl", 4 * BINS
    kd_weights, pkd_weight = (1.0, 4.0), 6.0

    def decode(self, reg, priors, strides):
        """(..., 68) logits, l, t, r, b x 17 -> boxes: the expected bin, in strides from the centre."""
        p = reg.unflatten(-1, (4, BINS)).softmax(-1)
        distances = p @ torch.arange(BINS, device=reg.device, dtype=reg.dtype)
        return decode_distances(distances * strides, centers(priors))

    def losses(self, out, targets):
        """QFL + 2 GIoU + 0.25 DFL. Boxes are weighted by the detector's own top score, over its sum."""
        iou, giou = overlap(self.decoded(out, targets), targets.boxes)
        quality = targets.onehot * iou.detach()[..., None]  # (B, A, K) at the true class of a positive
        scores = out["cls"].sigmoid()
        bce = F.binary_cross_entropy_with_logits(out["cls"], quality, reduction="none")
        cls = (quality - scores).abs().pow(2) * bce
        weight = scores.detach().amax(-1) * targets.positive
        total = reduce_mean(weight.sum(), 1.0)
        edges = encode_distances(targets.boxes, centers(targets.priors)) / targets.strides  # (B, A, 4)
        dfl = distribution_focal_loss(out["reg"], edges.clamp(0, BINS - 1 - 0.1))
        return dict(cls=(cls.sum(-1) * targets.weight).sum() / targets.count,
                    box=2.0 * ((1 - giou) * weight).sum() / total,
                    dfl=0.25 * (dfl.sum(-1) / 4 * weight).sum() / total)

    def kd_box(self, cross, teacher, targets, S, T):
        """Eq. 6 on the four edges: KL of the bin distributions, over the sum of S."""
        kl = region_kl(cross["reg"].unflatten(-1, (4, BINS)), teacher["reg"].unflatten(-1, (4, BINS)), T)
        loss = (kl.sum(-1) / 4 * S).sum() / reduce_mean(S.sum(), 1e-6)  # Eq. 6
        return dict(kd_box=self.kd_weights[1] * loss)


class ATSS(Detector):
    """Adaptive training sample selection: deltas from one square anchor, centerness from the box tower."""
    kind, ctr = "atss", "reg"
    pkd_weight = 1.0
    delta_std = (0.1, 0.1, 0.2, 0.2)

    def decode(self, reg, priors, strides):
        return decode_deltas(reg, priors, self.delta_std)

    def losses(self, out, targets):
        """Focal + 2 GIoU weighted by the centerness target + centerness BCE."""
        giou = overlap(self.decoded(out, targets), targets.boxes)[1]
        total = reduce_mean(targets.centerness.sum(), 1.0)
        return dict(cls=self.cls_loss(out, targets), ctr=centerness_loss(out, targets.centerness, targets),
                    box=2.0 * ((1 - giou) * targets.centerness).sum() / total)

    def kd_box(self, cross, teacher, targets, S, T):
        """Eq. 5 (GIoU of the decoded boxes) and, in the released code only, centerness at the positives."""
        giou = overlap(self.decoded(cross, targets), self.decoded(teacher, targets))[1]
        return dict(kd_box=self.kd_weights[1] * ((1 - giou) * S).sum() / targets.count,  # Eq. 5
                    kd_ctr=self.kd_weights[1] * centerness_loss(cross, teacher["ctr"].sigmoid(), targets))


class FCOS(Detector):
    """One point per cell regresses the four distances; centerness from the class tower."""
    kind, ctr, nms_iou = "fcos", "cls", 0.5
    p6_relu = True
    kd_layer, kd_weights = 2, (0.4, 0.75)
    ranges = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, 1e8))

    def priors(self, level_sizes, device):
        return grid_points(level_sizes, STRIDES, 0.5, device)

    def match(self, priors, counts, gt_boxes, valid, inside):  # padding is background here, not ignored
        ranges = constant(self.ranges, priors.device, priors.dtype)
        ranges = torch.cat([ranges[level].expand(n, 2) for level, n in enumerate(counts)])
        return assign_fcos(priors, ranges, gt_boxes, valid)

    def normaliser(self, positives):
        return reduce_mean(positives.sum(), 1.0)

    def decode(self, reg, priors, strides):
        return decode_distances(reg.clamp(max=20).exp(), priors)  # exp stays finite where no loss acts

    def losses(self, out, targets):
        """Focal + IoU loss weighted by the centerness target + centerness BCE."""
        iou = overlap(self.decoded(out, targets), targets.boxes)[0]
        total = reduce_mean(targets.centerness.sum(), 1e-6)
        return dict(cls=self.cls_loss(out, targets), ctr=centerness_loss(out, targets.centerness, targets),
                    box=(-iou.clamp(min=1e-6).log() * targets.centerness).sum() / total)

    def kd_cls_weight(self, targets):
        # The code divides by max(sum of centerness, 1e-6): one step without boxes would multiply KD by 10^6
        return self.kd_weights[0] / reduce_mean(targets.centerness.sum(), 1.0)

    def kd_box(self, cross, teacher, targets, S, T):
        """-ln IoU of the decoded boxes, the released code's choice (the paper says GIoU)."""
        iou = overlap(self.decoded(cross, targets), self.decoded(teacher, targets))[0]
        total = reduce_mean(targets.centerness.sum(), 1.0)
        return dict(kd_box=self.kd_weights[1] * (-iou.clamp(min=1e-6).log() * S).sum() / total)


class RetinaNet(Detector):
    """Nine anchors per cell, no norm in the head, plain deltas."""
    kind, cells, nms_iou = "retinanet", 9, 0.5
    norm = scales = False

    def priors(self, level_sizes, device):
        sides = [4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)]
        return grid_anchors(level_sizes, STRIDES, sides, (0.5, 1.0, 2.0), device)

    def match(self, priors, counts, gt_boxes, valid, inside):
        return assign_max_iou(priors, gt_boxes, valid, inside)

    def decode(self, reg, priors, strides):
        return decode_deltas(reg, priors)

    def losses(self, out, targets):
        """Focal + L1 on the deltas."""
        solid = torch.where(targets.positive[..., None], targets.boxes, targets.priors)  # no log of 0
        l1 = (out["reg"] - encode_deltas(solid, targets.priors)).abs().sum(-1) * targets.positive
        return dict(cls=self.cls_loss(out, targets), box=l1.sum() / targets.count)

    def kd_box(self, cross, teacher, targets, S, T):
        """Eq. 5: GIoU of the decoded boxes."""
        giou = overlap(self.decoded(cross, targets), self.decoded(teacher, targets))[1]
        return dict(kd_box=self.kd_weights[1] * ((1 - giou) * S).sum() / targets.count)  # Eq. 5


DETECTORS = {c.kind: c for c in (GFL, ATSS, FCOS, RetinaNet)}


# ================================================================== data

def make_data(args, split, kind=None, like=None, image_size=None):
    """The dataset "train" or "val"; None where own training files come without a validation set."""
    files = own_files(args, split)
    if files is False:
        return None
    if files is None:
        root = args.data
        if root == "shapes":
            from common.shapes import make_shapes
            root = make_shapes(seed=args.data_seed)
        files = find_coco(root, split)
    size = image_size or default_size(args, kind or split_name(args.student)[0])
    return CocoDataset(*files, split == "train", size, like=like, keep_empty=args.keep_empty)


def default_size(args, kind):
    if args.image_size:
        return args.image_size
    if args.data == "shapes":
        return "72-120"
    return "640,800" if kind == "fcos" else "800"


# ================================================================== train

LEGEND = dict(  # of the log's terms
    cls="classification loss of the detector", box="box loss of the detector", ctr="centerness loss",
    dfl="GFL's loss of the binned box edges", kd_cls="Eq. 3 for classes, distance Eq. 7 or BCE",
    kd_box="Eq. 3 for boxes, distance Eq. 5 or 6 (FCOS: -ln IoU)",
    kd_ctr="Eq. 3 for centerness (their code)", mimic_cls="Eq. 2 for classes", mimic_box="Eq. 2 for boxes",
    mimic_ctr="Eq. 2 for centerness",
    ld_cls="LD, classes", ld_box="LD, box edges", pkd="PKD, 1 - Pearson correlation of features",
    fitnet="Eq. 1, squared distance of FPN features")


def plain_of(model, classes):
    """What a checkpoint holds beside weights: enough to rebuild the detector without any flag."""
    return dict(script="crosskd.py", arch=model.arch, classes=list(classes))


def split_name(student):
    """"gfl_r18" -> ("gfl", "r18"), both known."""
    kind, _, backbone = student.partition("_")
    known = backbone in BACKBONES or re.fullmatch("tiny(8|16|24|32|48|64)", backbone)
    if kind not in DETECTORS or not known:
        raise UserError(f"--student {student}: expected detector_backbone, a detector of "
                        f"{', '.join(DETECTORS)} and a backbone of {', '.join(BACKBONES)}, tiny8 ... tiny64")
    return kind, backbone


def check_arch(theirs, ours, args):
    """The teacher's head must be able to read the student's features. theirs, ours: the `arch` of each."""
    methods = set(args.method.split("+"))
    needs_width = methods & {"pkd", "fitnet"} or ("crosskd" in methods and not args.adapt)
    for what in ("kind", "channels", "num_classes"):
        if theirs[what] == ours[what] or (what == "channels" and not needs_width):
            continue
        more = ""
        if what == "channels" and methods == {"crosskd"}:
            more = "; --adapt joins them by 1x1 convolutions"
        if what == "num_classes":
            more = (f"; train a teacher on these classes: --method none --student {theirs['kind']}_r101 "
                    "--out runs/teacher, then --teacher runs/teacher/best.pt")
        raise UserError(f"--teacher has {what} {theirs[what]}, --student {ours[what]}: they must be the "
                        f"same{more}")


def load_teacher(path, args, classes):
    """The teacher, of a student of these flags and classes; one line where it cannot be."""
    ours = dict(kind=split_name(args.student)[0], channels=args.channels, num_classes=len(classes))
    if not Path(path).exists():  # a zoo model: before its 200 MB come
        check_arch(arch_of(path, "--teacher"), ours, args)
    teacher, known = load(path, "--teacher")
    check_arch(teacher.arch, ours, args)
    check_classes(known, teacher.num_classes, classes, "--teacher")
    tell_size(teacher.arch, default_size(args, ours["kind"]), "--teacher")
    return teacher


def make_pair(args, data, rank, world, device):
    """(student, teacher or None) of the flags, on the device."""
    kind, backbone = split_name(args.student)
    teacher = None
    if args.method != "none":
        path = args.teacher or shapes_teacher(args, rank, world, device)
        teacher = load_teacher(path, args, data.classes).to(device).requires_grad_(False)
    seed_all(args.seed)  # here, so that every method starts from the same student
    start, trained = args.init, args.init not in ("imagenet", "shapes", "none")
    if start == "shapes":
        from common.tiny import shapes_backbone
        start = shapes_backbone(backbone, args.data_seed)
    student = DETECTORS[kind](backbone, len(data.classes), args.channels, args.p6,
                              "none" if trained else start)
    if trained:
        begun, known = load(args.init, "--init")
        check_classes(known, begun.num_classes, data.classes, "--init")
        for what in ("kind", "p6"):  # their weights would fit, and mean something else
            if begun.arch[what] != student.arch[what]:
                raise UserError(f"--init {args.init}: has {what} {begun.arch[what]}, --student "
                                f"{student.arch[what]}")
        load_strict(student, begun.state_dict(), f"--init {args.init}")
        student.freeze()
    student.arch["image_size"] = default_size(args, kind)  # --eval and --predict see images as training did
    return student.to(device), teacher


def kd_options(args):
    """Keyword arguments of kd_losses."""
    return dict(branches=args.kd_branches, distance=args.kd_cls_loss, region=args.kd_region,
                reg_mask=args.kd_reg_mask, beta=args.kd_beta, T=args.kd_T)


def make_distiller(student, teacher, args):
    """The module that is trained: Distiller, or Comparison where a table's baseline is asked for."""
    student.kd_weights = args.kd_weights or student.kd_weights
    options = dict(layer=args.kd_layer, align=args.align, sync_stats=args.sync_stats, amp=args.amp == "bf16",
                   adapt=args.adapt and teacher is not None, kd=kd_options(args))
    if teacher is None or (args.method == "crosskd" and args.kd_strategy == "a"):
        return Distiller(student, teacher, **options)
    weight = student.pkd_weight if args.pkd_weight is None else args.pkd_weight
    methods = args.method.split("+")
    return Comparison(student, teacher, methods, args.kd_strategy, args.pkd_at, weight, **options)


def prepare(args, data, val, student, teacher, rank, world, device):
    """The Distiller, its networks described and compiled, its teacher checked."""
    example = collate([data[0, 0]])["images"].float()  # image 0, random seed 0
    for name, net in (("student", student), ("teacher", teacher)):
        if net:
            fast_layout(net, device)
            describe_model(f"{name} {net.kind}_{net.arch['backbone']}", net, example, rank=rank)
            if args.compile:
                net.compile()
                net.head.compile()  # cross_head calls it by itself
    if teacher and val and not (Path(args.out) / "last.pt").exists():
        check_teacher(evaluate(teacher, val, rank, world, device, args, most=100)[0], args)
    return make_distiller(student, teacher, args).to(device).train()


def make_optimizer(model, algorithm, lr, weight_decay, kind):
    """SGD with momentum 0.9, or AdamW. FCOS: biases of convolutions learn twice as fast, no bias decays."""
    plain, bias, norm_bias = [], [], []
    for module in model.modules():
        norm = isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm))
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            if kind != "fcos" or name != "bias":
                plain.append(p)
            else:
                (norm_bias if norm else bias).append(p)
    groups = [dict(params=plain, lr=lr, weight_decay=weight_decay),
              dict(params=bias, lr=2 * lr, weight_decay=0.0), dict(params=norm_bias, lr=lr, weight_decay=0.0)]
    groups = [g for g in groups if g["params"]]
    if algorithm == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, **fused())
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, **fused())
    for g in optimizer.param_groups:
        g["base_lr"] = g["lr"]
    return optimizer


def method_of(args):
    """What is distilled, in words, for the start of a run."""
    return f"method {args.method}" + (f" i={args.kd_layer}" if "crosskd" in args.method else "")


def reported(args, distiller):
    """What of a Run depends on the method: what last.pt holds beside the student (the adapter; of the teacher
    its checksum), how often it evaluates."""
    parts = dict(adapter=distiller.adapter) if distiller.adapter is not None else {}
    fixed = dict(teacher=distiller.teacher[0]) if distiller.teacher else {}
    every = args.epochs if args.data == "shapes" else None
    return dict(parts=parts, fixed=fixed, every=every, table=class_table)


def rate_factor(args, it, steps):
    """Learning-rate factor of iteration `it`, `steps` an epoch."""
    milestones = (args.epochs * 2 / 3, args.epochs * 11 / 12)
    warmup = min(500, args.epochs * steps // 10)  # 500 of the paper's 87,960 steps; a tenth of a short run
    start, constant_start = (1 / 3, True) if args.student.startswith("fcos") else (0.001, False)
    return warmup_multistep(it, steps, milestones, warmup, start, constant_start)


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
    optimizer = make_optimizer(distiller, args.optimizer, lr, args.weight_decay, student.kind)
    run = Run(args, student, optimizer, plain_of(student, data.classes), len(plan), total_batch, rank, world,
              device, legend=LEGEND, **reported(args, distiller))
    run.describe(method_of(args), lr, args.lr, paper_batch, data, val)
    while True:
        if run.due:
            run.scored(*evaluate(student, val, rank, world, device, args), val)
            student.train()
        if run.finished:
            break
        for batches in run.batches(loader, plan):
            factor = rate_factor(args, run.it, run.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            losses = {}
            for n, batch in enumerate(batches, 1):
                model.require_backward_grad_sync = n == len(batches)  # DDP exchanges gradients once a step
                terms = model(to_device(batch, device))
                (sum(terms.values()) / len(batches)).backward()  # Eq. 4
                losses = {k: losses.get(k, 0) + v.detach() / len(batches) for k, v in terms.items()}
            if student.kind == "fcos":
                nn.utils.clip_grad_norm_(distiller.parameters(), 35.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step(losses, lr * factor)
        run.end_epoch()
    return run.close()


# ================================================================== evaluate, predict

def arch_of(spec, flag):
    """What a detector is, before anything is downloaded."""
    from common.zoo import dense_arch
    arch = dense_arch(spec, flag, "crosskd.py")
    if arch.get("kind") not in DETECTORS:
        kind = arch.get("kind")
        raise UserError(f"{flag} {spec}: does not describe a network of this script (kind {kind!r})")
    return arch


def load(weights, flag="--weights"):
    """(detector in eval mode, class names or None) of a checkpoint of ours, a zoo name, an mmdetection .pth.

    The detector is a plain module on the CPU: see predict_image. Raises UserError, one line, for whatever is
    wrong with the file; flag: what that line calls it.
    """
    from common.zoo import read_dense
    where, arch, state, classes, trained = read_dense(weights, flag, "crosskd.py")
    with rebuilding(where):
        model = DETECTORS[arch["kind"]](arch["backbone"], arch["num_classes"], arch["channels"], arch["p6"])
        model.arch, model.trained = arch, trained  # trained: (epoch, step) of a best.pt
        load_strict(model, state, where)
        if classes is not None and [*map(type, classes)] != [str] * model.num_classes:
            raise UserError(f"{where}: names {len(classes)} classes, its head has {model.num_classes}")
    return model.eval(), classes


@torch.no_grad()
def run_detector(model, batch, amp="none"):
    """One collated batch -> per image (boxes in original pixels, scores, labels)."""
    device = model.mean.device
    batch = to_device(batch, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
        maps = model(model.normalise(batch["images"], batch["sizes"])).maps
    found = model.detect(maps, batch["sizes"])
    results = []
    for (boxes, scores, labels), size, (h, w) in zip(found, batch["sizes"], batch["original_sizes"]):
        results.append((boxes * (boxes.new_tensor([w, h]) / size.flip(0)).repeat(2), scores, labels))
    return results


def find_boxes(model, pixels, image_size=None, amp="none"):
    """(boxes (N, 4) xyxy pixels, scores (N,), labels (N,)) of uint8 (3, H, W), resized as in training."""
    size = max(parse_image_size(image_size or model.arch.get("image_size") or "800"))
    image, (h, w) = resize(pixels, size)
    item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0,
                original_size=pixels.shape[1:])
    return run_detector(model, collate([item]), amp)[0]


def predict_image(model, classes, image, score=0.3):
    """(boxes (N, 4) xyxy pixels of `image`, scores (N,), N names), best first, of those above `score`.

    model, classes: of load; the model may be moved to a GPU. image: a path or PIL image (turned upright as
    its EXIF says), or a uint8 RGB tensor (3, H, W).
    """
    boxes, scores, labels = find_boxes(model, as_pixels(image))
    names = classes or [f"class {k}" for k in range(model.num_classes)]
    keep = scores > score
    return boxes[keep], scores[keep], [names[k] for k in labels[keep].tolist()]


def evaluate(model, val, rank, world, device, args, most=None):
    """(COCO metrics, detections) on rank 0, else or without a validation set (None, None). Images by stride
    over ranks. most: the first so many images only."""
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
    metrics |= dict(score=metrics["AP"], images=count, seconds=time.time() - since)
    numbers = " ".join(f"{k} {metrics[k]:.1f}" for k in ("AP", "AP50", "AP75", "APs", "APm", "APl"))
    metrics["line"] = f"{count} images | {numbers} | {metrics['seconds']:.0f}s"
    return metrics, results


def evaluate_file(args, rank, world, device):
    """--eval: metrics of a checkpoint, into --out."""
    from common.pictures import write_results
    kind = arch_of(args.eval, "--eval")["kind"]
    make_data(args, "val", kind)  # what is missing is told before anything is downloaded
    model, classes = load(args.eval, "--eval")
    size = args.image_size or model.arch.get("image_size")
    val = make_data(args, "val", kind, image_size=size, like=classes)
    check_classes(classes, model.num_classes, val.classes, f"--eval {args.eval}")
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
    classes = classes or [f"class {k}" for k in range(model.num_classes)]
    for picture in pictures:
        picture.save(*find_boxes(model, picture.pixels, args.image_size, args.amp), classes)


class Exported(nn.Module):
    """What --export writes: uint8 RGB (B, 3, H, W), resized, then padded right and bottom to multiples of 32
    with the mean pixel (124, 116, 104) -> boxes (B, A, 4) xyxy pixels, scores (B, A, K) that include
    centerness, both before NMS; then the raw class and box maps, level by level."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        model = self.model
        maps = model(model.normalise(images)).maps
        level_sizes = [m.shape[-2:] for m in maps["cls"]]
        counts = [h * w * model.cells for h, w in level_sizes]
        out = model.flatten(maps)
        priors = model.priors(level_sizes, images.device)
        boxes = model.decode(out["reg"], priors, model.strides(counts, images.device))
        scores = out["cls"].sigmoid()
        if model.ctr:
            scores = scores * out["ctr"].sigmoid()[..., None]
        return boxes, scores, maps["cls"], maps["reg"]


def export(args):
    """--export: the detector as a torch.export (.pt2) or ONNX (.onnx) program."""
    from common.export import export_program
    model, classes = load(args.weights)
    if model.arch["backbone"] == "swint":
        raise UserError("--export: torch.export would fix the size of pictures, whose windows Swin pads")
    export_program(Exported(model), args.export, ("boxes", "scores"), classes)


# ================================================================== flags

EXAMPLES = """
torchrun --nproc_per_node 8 crosskd.py --teacher gfl_r101        # GFL R101 -> R50 on data/coco
python crosskd.py --data shapes                                  # everything in minutes on a CPU
python crosskd.py --predict photo.jpg --weights runs/crosskd/best.pt
"""
SHAPES = dict(epochs=3, batch_size=8, lr=0.003, optimizer="adamw", init="shapes")  # --data shapes
GUESS = "  # which losses made this row is not published"
BCE = "  # BCE's weight, P and N: our reading"
ROWS = rows(f"""  # --row NAME: the paper's AP on COCO val2017, flags, a remark; the tables counted by us
    t1-none         35.8  --student gfl_r18 --method none
    t1-i0           38.2  SMALL --kd-layer 0  # the position of f_i
    t1-i1           38.3  SMALL --kd-layer 1
    t1-i2           38.6  SMALL --kd-layer 2
    t1-i3           38.7  SMALL --kd-layer 3
    t1-i4           38.2  SMALL --kd-layer 4
    t1-ld           37.8  SMALL --method ld{GUESS}
    t1-mimic        37.8  SMALL --method mimic  # the same row, CrossKD's losses
    t2-pkd-neck     38.0  SMALL --method pkd --pkd-at neck  # weight not published
    t2-pkd-cls      37.5  SMALL --method pkd --pkd-at cls
    t2-pkd-reg      37.2  SMALL --method pkd --pkd-at reg
    t2-pkd-both     37.3  SMALL --method pkd --pkd-at cls+reg
    t3-ld-cls       37.3  SMALL --method ld --kd-branches cls{GUESS}
    t3-ld-reg       36.8  SMALL --method ld --kd-branches reg{GUESS}
    t3-mimic-cls    37.3  SMALL --method mimic --kd-branches cls  # the same row, CrossKD's losses
    t3-mimic-reg    36.8  SMALL --method mimic --kd-branches reg  # the same row, CrossKD's losses
    t3-cls          37.7  SMALL --kd-branches cls
    t3-reg          37.2  SMALL --kd-branches reg
    t3-ld           38.1  SMALL --method crosskd+ld
    t3-mimic        38.1  SMALL --method crosskd+mimic  # the same row, CrossKD's losses
    t4-P            36.3  SMALL --kd-cls-loss bce --kd-region P{BCE}
    t4-N            36.2  SMALL --kd-cls-loss bce --kd-region N{BCE}
    t4-P+N          36.9  SMALL --kd-cls-loss bce --kd-region P+N{BCE}
    t4-qfl          38.7  SMALL --kd-cls-loss qfl --kd-region P+N
    t5-r18          39.2  --teacher gfl_r101 --student gfl_r18
    t5-r34          42.4  --teacher gfl_r101 --student gfl_r34
    t5-r34-none     38.9  --student gfl_r34 --method none
    t6-none         40.2  --student gfl_r50 --method none
    t6-fitnet       40.7  --teacher gfl_r101 --method fitnet  # weight not published
    t6-ld           43.0  --teacher gfl_r101 --method ld  # mmdetection's LD: 41.0
    t6-pkd          43.3  --teacher gfl_r101 --method pkd
    t6-crosskd      43.7  --teacher gfl_r101
    t6-crosskd+pkd  43.9  --teacher gfl_r101 --method crosskd+pkd
    t7-retinanet      39.7  --teacher retinanet_r101 --epochs 24
    t7-retinanet+pkd  39.8  --teacher retinanet_r101 --epochs 24 --method crosskd+pkd  # authors' README
    t7-retinanet-none 37.4  --student retinanet_r50 --method none --epochs 24 --p6 on_input
    t7-fcos         41.3  --teacher fcos_r101  # authors' README: 41.1
    t7-fcos+pkd     41.3  --teacher fcos_r101 --method crosskd+pkd  # authors' README
    t7-fcos-none    38.5  --student fcos_r50 --method none
    t7-atss         41.8  --teacher atss_r101 --batch-size 8  # --nproc_per_node 2: phi sees 8 images
    t7-atss+pkd     41.8  --teacher atss_r101 --batch-size 8 --method crosskd+pkd  # likewise; authors' README
    t7-atss-none    39.4  --student atss_r50 --method none
    t8-swint        38.0  --teacher retinanet_swint
    t8-swint-pkd    37.2  --teacher retinanet_swint --method pkd  # weight not published
    t8-r50-none     36.5  --student retinanet_r50 --method none --p6 on_input
    t8-mnv2         34.1  --teacher retinanet_r50 --student retinanet_mnv2  # details not published
    t8-mnv2-pkd     33.2  --teacher retinanet_r50 --student retinanet_mnv2 --method pkd  # likewise
    t8-mnv2-none    30.9  --student retinanet_mnv2 --method none --p6 on_input
    t9-crosskd      36.7  --teacher retinanet_r50_3x --student retinanet_r18  # their config: retinanet_r50
    t9-none         31.7  --student retinanet_r18 --method none --p6 on_input
    t10-a           38.7  SMALL --kd-strategy a
    t10-b           35.4  SMALL --kd-strategy b  # b-d are our reading of a figure
    t10-c           34.5  SMALL --kd-strategy c
    t10-d           32.5  SMALL --kd-strategy d
    gfl_r50         40.2  --eval gfl_r50
    gfl_r101        44.9  --eval gfl_r101  # mmdetection says 44.7
    retinanet_r50   36.5  --eval retinanet_r50
    retinanet_r50_3x 39.5 --eval retinanet_r50_3x
    retinanet_r101  38.9  --eval retinanet_r101
    retinanet_swint 37.3  --eval retinanet_swint
    fcos_r101       40.8  --eval fcos_r101
    atss_r101       41.5  --eval atss_r101
    """, SMALL="--teacher gfl_r50 --student gfl_r18")
# flags, the flag that gives them an effect, its values (None: it is not given)
BELONGS = (
    ("kd_layer kd_strategy align adapt", "method", ("crosskd", None)),
    ("kd_weights kd_cls_loss kd_region kd_reg_mask kd_T kd_beta", "method", ("crosskd", "mimic", None)),
    ("kd_branches", "method", ("crosskd", "mimic", "ld", None)),
    ("kd_cls_loss kd_region kd_beta", "kd_branches", ("cls", "both")),
    ("kd_reg_mask kd_T", "kd_branches", ("reg", "both")),
    ("kd_beta", "kd_cls_loss", ("qfl",)),
    ("adapt", "kd_strategy", ("a",)),
    ("adapt", "kd_branches", ("both",)),  # one of its convolutions would not be trained
    ("sync_stats", "method", ("crosskd", "pkd", None)),
    ("data_seed", "data", ("shapes",)),
    ("pkd_at pkd_weight", "method", ("pkd",)),
    ("no_teacher_check", "method", ("crosskd", "mimic", "ld", "pkd", "fitnet", None)))
MODES = dict(eval="data data_seed workers val_json val_images", predict="weights score", export="weights")


def channel_count(text):
    """argparse type."""
    value = number(int, 32, 4096)(text)
    if value % 32:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of 32, the groups of GroupNorm")
    return value


def parse_args(argv=None):
    p = parser(__doc__.split("\n", 1)[0], EXAMPLES)
    g = p.add_argument_group("data")
    g.add_argument("--data", default="data/coco", help="COCO-layout root, or 'shapes': the embedded dataset")
    g.add_argument("--data-seed", type=SEED, default=0, help="shapes: seed of images, backbone and teacher")
    g.add_argument("--image-size", help="short side: 800, a choice 640,800 or a range 480-800 "
                   "(default 800; FCOS 640,800; shapes 72-120; --eval, --predict: as trained)")
    g = p.add_argument_group("models")
    g.add_argument("--teacher", help="zoo name (gfl_r101 ...), mmdetection .pth or our .pt "
                   "(default: the student's detector on r101; shapes: trained on demand)")
    g.add_argument("--student", help="detector_backbone, as gfl_r18 (default: the teacher's detector on r50; "
                   "shapes tiny16)")
    g.add_argument("--channels", type=channel_count, help="of its FPN and head (default 256; tiny 64)")
    g.add_argument("--p6", choices=("on_output", "on_input"), default="on_output",
                   help="student's P6 from P5, or from C5 (zoo RetinaNets)")
    g.add_argument("--init", help="student start: imagenet or a detector of the same kind and classes "
                   "(running statistics stay fixed; a ResNet's stem and first stage, too), shapes (of drawn "
                   "base objects, tiny8 ... only), or none (default imagenet; shapes shapes)")
    g.add_argument("--no-teacher-check", action="store_true", help="go on with a teacher of AP below 1")
    g = p.add_argument_group("method")
    g.add_argument("--method", help=f"one of {', '.join(METHODS)}, or joined: crosskd+pkd, crosskd+ld "
                   "(default crosskd)")
    g.add_argument("--kd-layer", type=number(int, 0, 4),
                   help="i: the student's feature f_i enters the teacher's head, 0..4 (default 3; FCOS 2)")
    g.add_argument("--kd-strategy", choices="abcd", default="a",
                   help="which predictions are compared; a is CrossKD, Eq. 3")
    g.add_argument("--kd-weights", type=number(), nargs=2, metavar=("CLS", "BOX"), help="of Eq. 3 in Eq. 4, "
                   "classes and boxes with centerness (default GFL 1 4, FCOS 0.4 0.75, ATSS, RetinaNet 1 1)")
    g.add_argument("--kd-branches", choices=("cls", "reg", "both"), default="both",
                   help="branches that are distilled")
    g.add_argument("--kd-cls-loss", choices=("qfl", "bce"), default="qfl", help="D of Eq. 3, classification")
    g.add_argument("--kd-region", choices=("P", "N", "P+N"), default="P+N",
                   help="S of Eq. 3, classification: positives, negatives")
    g.add_argument("--kd-reg-mask", choices=("soft", "fg"), default="soft",
                   help="S of Eq. 3, boxes: teacher's top score or foreground")
    g.add_argument("--align", choices=("post", "pre", "none"), default="post",
                   help="phi on f_i after / before its ReLU, or no phi")
    g.add_argument("--adapt", action="store_true", help="a 1x1 convolution a tower, trained along and not "
                   "kept, brings f_i to the width of the teacher's head")
    g.add_argument("--kd-T", type=POSITIVE, default=1.0, help="temperature of Eq. 6, GFL boxes")
    g.add_argument("--kd-beta", type=number(), default=1.0, help="beta of Eq. 7, QFL")
    g.add_argument("--pkd-at", choices=("neck", "cls", "reg", "cls+reg"), default="neck",
                   help="where PKD compares features")
    g.add_argument("--pkd-weight", type=number(), help="(default GFL 6, ATSS 1, FCOS 2, RetinaNet 2)")
    g.add_argument("--sync-stats", action="store_true", help="statistics of phi and PKD over all processes")
    g = p.add_argument_group("schedule")
    g.add_argument("--epochs", type=COUNT, help="(default 12; FCOS 24; shapes 3), x0.1 at 2/3 and 11/12")
    g.add_argument("--batch-size", type=COUNT, help="images per process and pass (default 2; shapes 8)")
    g.add_argument("--optimizer", choices=("sgd", "adamw"),
                   help="(default sgd; shapes adamw, which learns from scratch faster)")
    g.add_argument("--lr", type=POSITIVE,
                   help="for a total batch of 16, scaled linearly (default 0.01; shapes 0.003)")
    g.add_argument("--weight-decay", type=number(), default=1e-4)
    run_flags(p, "crosskd", rows=ROWS, export=True)
    args = parse(p, argv, "crosskd", MODES, belongs=BELONGS, rows=ROWS,
                 saved=lambda args: saved_run(args, "crosskd.py", "kd_layer"))
    parts = set((args.method or "crosskd").split("+"))
    if parts - set(METHODS) or ("none" in parts and len(parts) > 1):
        p.error(f"--method {args.method}: choose among {', '.join(METHODS)}; join with +, but for none")
    if args.image_size:
        parse_image_size(args.image_size)
    if args.method == "none" and args.teacher and args.student and int(os.environ.get("RANK", 0)) == 0:
        print("note: with --method none there is no effect of --teacher", file=sys.stderr)
    return args


def resolve(args):
    """The flags with every default that depends on another flag; after this they are only read."""
    shapes, method = args.data == "shapes", args.method or "crosskd"
    teacher = args.teacher
    arch = arch_of(teacher, "--teacher") if teacher else {}
    student = args.student or f"{arch.get('kind', 'gfl')}_{'tiny16' if shapes else 'r50'}"
    kind, backbone = split_name(student)
    if "ld" in method.split("+") and kind != "gfl":
        raise UserError(f"--method {method}: LD compares edge distributions, which only GFL has; use mimic "
                        f"for {kind}")
    if args.kd_T != 1 and kind != "gfl":
        raise UserError(f"--kd-T {args.kd_T}: is the temperature of GFL's binned edges, which {kind} has not")
    if shapes and args.train_json and method != "none" and not teacher:
        raise UserError("--train-json: the teacher of --data shapes knows other classes; give --teacher, or "
                        "--method none")
    if method != "none" and not teacher and not shapes:
        teacher = f"{kind}_r101"
    defaults = dict(kd_layer=DETECTORS[kind].kd_layer, epochs=24 if kind == "fcos" else 12, batch_size=2,
                    lr=0.01, optimizer="sgd", init="imagenet",
                    channels=64 if backbone.startswith("tiny") else 256)
    if shapes:
        defaults |= SHAPES
    found = dict(method=method, teacher=teacher, student=student)
    return argparse.Namespace(**vars(with_defaults(args, defaults)) | found)


# ================================================================== main

TEACHER_EPOCHS = 8


def shapes_teacher(args, rank, world, device):
    """Path of the teacher for shapes, see trained_before."""
    from common.tiny import trained_before
    kind, backbone = split_name(args.student)
    if not backbone.startswith("tiny"):
        raise UserError(f"--student {args.student}: the teacher for shapes has 64 channels, so have the "
                        "tiny8 ... tiny64 students only")
    flags = ["--data", "shapes", "--data-seed", str(args.data_seed), "--method", "none", "--student",
             f"{kind}_tiny32", "--epochs", str(TEACHER_EPOCHS), "--workers", str(args.workers), "--resume",
             "--batch-size", str(max(1, SHAPES["batch_size"] // world))]  # of all processes: 8
    return trained_before(f"crosskd-{kind}_tiny32-e{TEACHER_EPOCHS}", args.data_seed, rank,
                          lambda out: train(resolve(parse_args([*flags, "--out", out])), rank, world, device))


def quick_start(args, rank, world, device):
    """--data shapes: teacher, plain student and CrossKD student in one table and one picture."""
    open_table(args, rank)
    since, lines, results = time.time(), [], {}

    def note(name, metrics):
        """A row of the table, told as soon as it is there."""
        if rank == 0:
            line = f"{name:31s} {metrics['AP']:5.1f} {metrics['AP50']:5.1f} {metrics['AP75']:5.1f}"
            lines.append(f"{line} {time.time() - since:9.0f}")
            print(lines[-1], flush=True)

    path = args.teacher or shapes_teacher(resolve(args), rank, world, device)
    plan = resolve(argparse.Namespace(**vars(args) | dict(teacher=path)))
    val = make_data(plan, "val")
    teacher = load_teacher(path, plan, val.classes)  # here: a wrong one must not cost the plain training
    kind, backbone = teacher.arch["kind"], teacher.arch["backbone"]
    metrics, _ = evaluate(teacher.to(device), val, rank, world, device, args)
    note(f"teacher {kind}_{backbone}", metrics)
    for method, name in (("none", "student alone"), ("crosskd", "student with CrossKD")):
        since, out = time.time(), Path(args.out) / method
        more = dict(method=method, teacher=None if method == "none" else path, out=str(out),
                    student=plan.student,
                    resume=args.resume and (out / "last.pt").exists())
        note(name, train(resolve(argparse.Namespace(**vars(args) | more)), rank, world, device))
        results[name] = out / "detections.json"
    if rank == 0:
        from common.pictures import save_comparison
        head = f"shapes, {len(val)} validation images"
        print(f"\n{head:31s}    AP  AP50  AP75   seconds", *lines, sep="\n")
        print(f"ground truth, and what each student finds: {save_comparison(val, results, Path(args.out))}")


def main():
    with started("crosskd.py") as (rank, world, device):
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
        elif args.data == "shapes" and args.method is None and not (args.train_json or args.val_json):
            quick_start(args, rank, world, device)
        else:
            train(resolve(args), rank, world, device)


if __name__ == "__main__":
    main()
