# SPDX-License-Identifier: MIT
"""HierKD: open-vocabulary one-stage detection, CLIP teaches twice (Ma et al., CVPR 2022, arXiv:2203.10593).

Idea. ATSS, with CLIP's text embeddings of the class names as its classifier: any list of names can be
detected. Trained on base classes alone it does not know what a novel name looks like, so CLIP teaches the
embedding f of each anchor.
  (1) classify: f is compared with the names of the base classes and a learnt background, softmax focal loss,
      on all positives and 10 % of the negatives (more of them, the paper says, teach it that unlabelled
      novel objects are background);
  (2) IKD: at the positives, f must equal CLIP's image embedding of the predicted box;
  (3) GKD: positives are base objects only, but an image's caption names novel ones, too. It attends to
      max-pooled patches of f of all levels, and image and caption must find each other in the batch.
At test time CLIP's image tower and the captions are gone; only the text matrix is swapped: novel names (ZSD),
or base and novel together (GZSD).

    Eq. 1  classification                 class_logits, softmax_focal_loss, summed in Distiller.class_loss
    Eq. 2  IKD                            feature_distance, ikd_loss
    Eq. 3  cross attention of a caption   pool_patches, mlca
    Eq. 4  similarity of image, caption   mlca
    Eq. 5  GKD                            caption_loss
    Eq. 6  sum of all losses              Distiller.forward (weights; of boxes: box_losses), train (sum)

Differs from the paper. Where its text and the released code disagree, the default is the text, in 4, 6, 7, 9
the code; --row released is the code in 1 to 5:
  1. IKD: text L1, weight 1, mean over positives; code L2, weight 0.05, mean per level, then over levels.
     --ikd-norm, --ikd-weight, --ikd-details.
  2. Classification weight: text a constant; code exp(-s) with + |s| and s learnt. --cls-weight learn.
  3. Crops: text not stated; code ImageNet's normalisation, no antialias. Here CLIP's own and PIL's
     antialias. --ikd-details. In both, positives whose predicted box overlaps its object by less than 0.5
     take no part in IKD (the text has such a threshold, not its value).
  4. GKD's patches: text FPN maps; code the normalised embeddings f, which is also what lets a caption reach
     the classifier. We follow the code. Eq. 3 sums raw patches P; as in the code they are normalised first,
     and maps are not masked: of an image of 480 x 800 in a batch padded to 800 x 1333, 25 of 45 patches show
     padding alone.
  5. Algorithm 1: text CLIP's score alone; code times the quality. --direct-quality.
  6. The embedding's bias starts at -4.6 in the code (left over from a sigmoid); every f then starts nearly
     parallel. --embed-bias focal|zero.
  7. As in the code, not in the text: N_pos counts an image without positives as 1; of a level without
     positives all negatives are dropped.
  8. Differs from text and code: the normalisers of IKD and GKD, too, are means over all processes (IKD's not
     with --ikd-details released); a lower bound of 1 applies to the sum over processes, not to each.
  9. A flipped image keeps its caption's "left" and "right", as in the code. --flip-words swaps them (default
     on shapes, whose captions say where).
 10. Differs from text and code, at other widths than 256 channels (tiny*): the towers have one convolution
     instead of four, which would see the whole small picture, and a norm over the channels of each place
     instead of GroupNorm(32), which would be nearly an instance norm: through the statistics of the image
     GKD reads the caption off the background. On shapes GKD reads P3 only, with 96 % of the positives or
     more: chosen on few seeds; that it is better than P3 and P4 is not shown.
 11. The text's jitter of 480-800 for 3x; code 640-800, --image-size 640-800. Not here: its NMS at 0.6 (2x,
     65/15, some runs of IKD) or 0.3 (the main run of IKD); all NMS is at 0.4. The box loss has the code's
     weight of 2 and is weighted by u, see box_losses.
best.pt is chosen by the AP50 of base classes: novel labels are what is tested, so they must not choose.

Letters: B images, C captions, D embedding, A anchors of all L = 5 levels, P patches, M boxes (padded), K
classes, background is label K. Boxes are xyxy pixels of the network's input.

    torchrun --nproc_per_node 4 hierkd.py                        # HierKD R50 1x, 48/17 split, 4 x 8 images
    torchrun --nproc_per_node 4 hierkd.py --row t7-48            # a row of a table; --rows lists them
    python hierkd.py --data shapes                               # everything in minutes on a CPU
    python hierkd.py --eval runs/hierkd/last.pt
    python hierkd.py --predict photo.jpg --weights runs/hierkd/best.pt --classes "red panda,umbrella"
    python hierkd.py --export detector.pt2 --weights runs/hierkd/best.pt
Own data: --train-json a.json --train-images a/ --novel "cup,hair drier" (or a file with one name a line), and
--train-captions c.json for GKD; see README.md.

Expected, COCO 48/17, AP50 (paper): R50 1x novel (ZSD) 21.6 (--row t4-both: 20.7); R50 3x ZSD 25.3, GZSD base
51.3, novel 20.3, all 43.2. COCO not run here; shapes (from noise GKD showed nothing), ZSD / base, 6 seeds:
without 1.7 / 19.1, IKD 26.6 / 15.7, GKD 14.8 / 11.2, both 15.5 / 10.5: IKD alone is better, by 11.1 +- 2.2,
unlike Table 4; colours of novel names are learnt, of their shapes nothing is shown.
"""
import argparse
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FeaturePyramidNetwork, batched_nms, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from tqdm import tqdm

from common.boxes import (IGNORED, assign_atss, cells_inside, centerness_target, constant, decode_deltas,
                          grid_anchors, overlap)
from common.clip import TEMPLATES, clip_of, get_clip, tell_cut
from common.datasets import (BASE_48, NOVEL_15, NOVEL_17, CocoDataset, as_pixels, class_names, collate,
                             eval_loader, find_coco, own_files, parse_image_size, plain_name,
                             read_annotations, refuse_strange, resize, respell, same_names, spaced,
                             split_classes, train_loader)
from common.evaluation import Detections, class_mean, coco_evaluate, judged
from common.run import (COUNT, POSITIVE, SEED, Run, UserError, answer_folder, dash, describe_model,
                        fast_layout, fused, gather, given_flags, load_checkpoint, load_strict, number,
                        open_run, open_table, parse, parser, rebuilding, reduce_mean, rows, run_flags,
                        saved_run, seed_all, started, tell, to_device, warmup_multistep, with_defaults,
                        wrap_ddp)

STRIDES = (8, 16, 32, 64, 128)
DELTA_STD = (0.1, 0.1, 0.2, 0.2)
IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # mean and deviation, RGB


# ================================================================== the paper

class Outputs(NamedTuple):
    """What the detector says of each anchor, fp32."""
    f: torch.Tensor        # (B, A, D) unit rows
    reg: torch.Tensor      # (B, A, 4) raw
    quality: torch.Tensor  # (B, A) logits, or None


class Targets(NamedTuple):
    """What the labels say about each anchor. All on the device: making them waits for nothing."""
    anchors: torch.Tensor   # (A, 4)
    level_sizes: list       # L pairs (H_l, W_l)
    counts: list            # L ints, anchors of a level
    positive: torch.Tensor  # (B, A) bool
    inside: torch.Tensor    # (B, A) bool: not beyond the image's own canvas
    boxes: torch.Tensor     # (B, A, 4) the assigned box (arbitrary where not positive)
    labels: torch.Tensor    # (B, A) class of the assigned box, K where not positive
    count: torch.Tensor     # () N_pos, mean over processes


def fp32(x):
    """bf16 maps of autocast -> fp32, in which all losses are computed; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def class_logits(f, text, background, tau_c):
    """Inside the softmax of Eq. 1: cosines with the names and with the background, times tau_c.

    f: (..., D) unit rows; text: (K, D) unit rows; background: T_bg (1, D), or None for a cosine of 0.2
    (released code). Returns (..., K + 1) logits, the background last.
    """
    cosine = f @ text.to(f).T
    if background is None:
        bg = f.new_full((*f.shape[:-1], 1), 0.2)
    else:
        bg = f @ background.to(f).T
    return tau_c * torch.cat([cosine, bg], -1)  # Eq. 1


def softmax_focal_loss(logits, labels):
    """Focal loss of Eq. 1, element by element: -0.25 (1 - p_y)^2 log p_y.

    logits: (..., K + 1); labels: (...), K is the background. 0.25 for every class. Returns (...).
    """
    logp = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return -0.25 * (1 - logp.exp()).square() * logp  # Eq. 1


def sample_anchors(positive, counts, negatives=0.1):
    """Sec. 3.4: all positives and a random share of the others; as in the code per level, over this process'
    batch.

    positive: (B, A) bool; counts: anchors of each level. negatives: a share in (0, 1], or "1to1". Below 1 a
    level without positives keeps nothing, as in the released code. Returns (B, A) bool.
    """
    if negatives != "1to1" and float(negatives) >= 1:
        return torch.ones_like(positive)
    keep = []
    for level in positive.split(counts, 1):
        count = level.sum()
        wanted = count
        if negatives != "1to1":
            wanted = ((level.numel() - count).double() * float(negatives)).floor()
        # the `wanted` anchors of lowest rank: randperm would have to ask the device how many there are
        draw = torch.rand(level.shape, device=level.device).masked_fill(level, 2.0).flatten()
        order = torch.arange(draw.numel(), device=draw.device, dtype=draw.dtype)
        rank = torch.empty_like(draw).scatter_(0, draw.argsort(), order)
        keep.append(level | ((rank.view_as(level) < wanted) & (count > 0)))
    return torch.cat(keep, 1)


def feature_distance(f, v, norm="l1"):
    """d of Eq. 2 between unit rows (N, D): the L1 norm, or the L2 norm (not squared). Returns (N,)."""
    if norm == "l1":
        return (f - v).abs().sum(-1)
    return (f - v).square().sum(-1).clamp(min=1e-12).sqrt()


def ikd_loss(f, v, norm="l1"):
    """Eq. 2, instance-level distillation: mean over positives of the distance to CLIP's embeddings.

    f: (N, D) embeddings of positives, v: (N, D) CLIP's of their crops, without gradient; unit rows. Returns a
    scalar, 0 with a gradient if N = 0. The mean is over the positives of all processes.
    """
    d = feature_distance(f, v, norm)
    return d.sum() / reduce_mean(d.new_tensor(float(len(d))), 1.0)  # Eq. 2


def pool_patches(f, level_sizes, n=3, pool="max"):
    """Sec. 3.3: N x N patches of each level's embeddings, pooled and normalised.

    f: (B, A, D) unit rows of L levels; level_sizes: L pairs (H_l, W_l). Returns (B, P, D), P = L N^2. Padding
    of the batch is part of the maps, as in the released code.
    """
    pooling = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
    patches = []
    for level, size in zip(f.split([h * w for h, w in level_sizes], 1), level_sizes):
        level_map = level.transpose(1, 2).unflatten(2, size)  # (B, D, H_l, W_l)
        patches.append(pooling(level_map, n).flatten(2))      # (B, D, N^2)
    return F.normalize(torch.cat(patches, 2).transpose(1, 2), dim=-1, eps=1e-10)


def mlca(patches, captions, tau=1.0):
    """Eqs. 3 and 4, multi-layer cross attention: what each caption sees of each image, and whether it fits.

    patches: (B, P, D) unit rows; captions: (C, D) unit rows. tau: temperature of the attention, 1 in the
    paper: two patches then differ by e^2 at most, and a caption sees nearly their mean. Returns (C, B)
    cosines <I, C>.
    """
    e = torch.einsum("cd,bpd->cbp", captions, patches)                    # Eq. 3: a patch's response
    seen = torch.einsum("cbp,bpd->cbd", (e / tau).softmax(-1), patches)   # Eq. 3: P_I^C
    return (F.normalize(seen, dim=-1, eps=1e-10) * captions[:, None]).sum(-1)  # Eq. 4


def caption_loss(score, tau, valid):
    """Eq. 5: cross entropy over the captions of an image plus over the images of a caption, mean over pairs.

    score: (N, N) <I, C> of Eq. 4, rows are captions, one an image in the images' order, the diagonal are the
    pairs; tau: tau_m, a factor (learnt, from 10), not a divisor; valid: (N,) bool, the image has a caption.
    Returns a scalar, 0 with a gradient with less than two valid pairs.
    """
    weight = valid.float()
    count = reduce_mean(weight.sum(), 1.0)
    logits = (tau * score).masked_fill(~(valid[:, None] & valid), -1e4)
    pair = logits.diagonal()
    of_image = logits.logsumexp(0) - pair     # Eq. 5: which caption is this image's
    of_caption = logits.logsumexp(1) - pair   # Eq. 5: which image is this caption's
    return ((of_image + of_caption) * weight).sum() / count  # Eq. 5


class Distiller(nn.Module):
    """The student and its losses: forward(batch) -> {name: loss}, whose sum is Eq. 6.

    clip: FrozenCLIP, which is no nn.Module, so that parameters(), DDP and checkpoints never see it. classes:
    the base names. ikd, gkd: which distillations. The weights are those of Eq. 6. crop_scale: crops are
    enlarged by it. most_crops: at most so many a forward pass, at random. patches, levels: N of Sec. 3.3 and
    how many levels are cut, from P3.
    """
    least_iou = 0.5  # positives whose predicted box overlaps its object less take no part in IKD (their code)

    def __init__(self, student, clip, classes, ikd=True, gkd=True, cls_weight=1.0, ikd_weight=1.0,
                 gkd_weight=1.0, negatives=0.1, norm="l1", crop_scale=1.0, most_crops=None, patches=3,
                 levels=5, tau_a=1.0, amp=False, seed=0):
        super().__init__()
        self.student, self.clip, self.ikd, self.gkd = student, clip, ikd, gkd
        self.cls_weight, self.ikd_weight, self.gkd_weight = cls_weight, ikd_weight, gkd_weight
        self.negatives, self.norm, self.crop_scale, self.most_crops = negatives, norm, crop_scale, most_crops
        self.patches, self.levels, self.tau_a, self.amp, self.seed = patches, levels, tau_a, amp, seed
        self.register_buffer("text", clip.class_embeddings(classes), persistent=False)  # T_B (K, D)
        self.draws = 0  # how often crops were chosen, see draw_crops
        scalars = {name: getattr(student, name) for name in ("tau_c", "tau_m", "s")}
        self.watch = {name: p for name, p in scalars.items() if p is not None}  # for the log

    def autocast(self, like):
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.amp)

    def forward(self, batch):
        student = self.student
        student.unit_background()
        images = normalise(batch["images"], batch["sizes"])
        with self.autocast(images):
            maps = student(images)
        out = student.flatten(maps)
        targets = student.assign(maps, batch, len(self.text))
        losses = dict(cls=self.class_loss(out, targets))  # Eq. 1
        box_losses, boxes, iou = student.box_losses(out, targets)
        losses |= box_losses
        if self.ikd:
            chosen = targets.positive & (iou >= self.least_iou)
            instance = self.instance_loss(batch, out.f, boxes, chosen, targets)  # Eq. 2
            losses["ikd"] = self.ikd_weight * instance
        if self.gkd:
            losses["gkd"] = self.gkd_weight * self.global_loss(batch, out.f, targets.level_sizes)  # Eq. 5
        return losses  # Eq. 6: their sum

    def class_loss(self, out, targets):
        """Eq. 1, summed: (1 / N_pos) over positives and sampled negatives, times lambda_cls of Eq. 6."""
        # anchors beyond the image's own canvas take part in the draw, with weight 0, as in the released code
        used = sample_anchors(targets.positive, targets.counts, self.negatives) & targets.inside
        focal = softmax_focal_loss(self.student.classify(out.f, self.text), targets.labels)
        return self.cls_weight * ((focal * used).sum() / targets.count)  # Eq. 1

    def instance_loss(self, batch, f, boxes, chosen, targets):
        """Eq. 2, IKD. boxes: (B, A, 4) predicted, without gradient; chosen: (B, A) the positives that take
        part."""
        image, anchor = self.draw_crops(chosen)
        v = self.crop_embeddings(batch, boxes[image, anchor], image)
        return ikd_loss(f[image, anchor], v, self.norm)

    def draw_crops(self, chosen):
        """(image, anchor), two (N,) indices, of all that are chosen, or of most_crops of them.

        The draw has a generator of its own, so that runs with and without a limit see the same negatives. Its
        seed is made of run, process and number of the draw, which is what last.pt keeps.
        """
        image, anchor = chosen.nonzero(as_tuple=True)  # here a step waits for the device: how many crops?
        self.draws += 1
        if self.most_crops and len(image) > self.most_crops:
            rank = dist.get_rank() if dist.is_initialized() else 0
            seed = hash((self.seed, rank, self.draws))
            generator = torch.Generator(chosen.device).manual_seed(seed)
            pick = torch.randperm(len(image), generator=generator, device=image.device)[:self.most_crops]
            image, anchor = image[pick], anchor[pick]
        return image, anchor

    def crop_embeddings(self, batch, boxes, owner):
        """CLIP's embeddings (N, D) of boxes (N, 4) in the images `owner` (N,)."""
        with self.autocast(boxes):
            pixels = normalise(batch["images"], batch["sizes"], self.clip.grey_levels)
            return self.clip.encode_crops(pixels, boxes, owner, self.crop_scale)

    def global_loss(self, batch, f, level_sizes):
        """Eqs. 3 to 5, GKD, among the images of this process: captions against images."""
        captions, valid = self.captions_of(batch)
        sizes = level_sizes[:self.levels]
        cells = sum(h * w for h, w in sizes)
        return self.match(mlca(self.patches_of(f[:, :cells], sizes), captions, self.tau_a), valid)

    def captions_of(self, batch):
        """((B, D) embeddings of the captions, (B,) bool: there is one)."""
        with self.autocast(batch["images"]):
            captions = self.clip.encode_text(batch["captions"])
        valid = torch.tensor([bool(c) for c in batch["captions"]])
        return captions, valid.to(captions.device, non_blocking=True)

    def patches_of(self, f, level_sizes):
        return pool_patches(f, level_sizes, self.patches)

    def match(self, score, valid):
        return caption_loss(score, self.student.tau_m, valid)


# ================================================================== what its tables compare with

def ikd_loss_by_level(f, v, level, levels, norm="l2"):
    """Eq. 2 as in the released code: a mean per level, 0 where there is none, then over the levels.

    f, v: (N, D); level: (N,) in 0 ... levels - 1.
    """
    d = feature_distance(f, v, norm)
    sums = d.new_zeros(levels).index_add(0, level, d)
    numbers = d.new_zeros(levels).index_add(0, level, torch.ones_like(d))
    return (sums / numbers.clamp(min=1)).mean()


def pull_loss(score, valid):
    """Table 3, PL: pairs are pulled together, without negatives and without temperature."""
    weight = valid.float()
    return -(score.diagonal() * weight).sum() / reduce_mean(weight.sum(), 1.0)


class Comparison(Distiller):
    """What the tables compare HierKD with, the released code's choices, and controls.

    details "released": IKD by level, crops with ImageNet's normalisation and without antialias. box "gt":
    true boxes are cropped (Table 2). pool "avg", loss "pl": Table 3. shuffle_crops, shuffle_captions: each
    positive or image gets what belongs to another. A student with s learns lambda_cls.
    """

    def __init__(self, *models, details="paper", box="pred", pool="max", loss="cl", shuffle_crops=False,
                 shuffle_captions=False, **options):
        super().__init__(*models, **options)
        self.details, self.box, self.pool, self.loss = details, box, pool, loss
        self.shuffle_crops, self.shuffle_captions = shuffle_crops, shuffle_captions

    def class_loss(self, out, targets):
        loss, s = super().class_loss(out, targets), self.student.s
        return loss if s is None else (-s).exp() * loss + s.abs()

    def instance_loss(self, batch, f, boxes, chosen, targets):
        image, anchor = self.draw_crops(chosen)
        crops = targets.boxes if self.box == "gt" else boxes
        v = self.crop_embeddings(batch, crops[image, anchor], image)
        if self.shuffle_crops and len(v) > 1:
            v = v.roll(len(v) // 2, 0)
        if self.details == "paper":
            return ikd_loss(f[image, anchor], v, self.norm)
        ends = torch.tensor(targets.counts, device=anchor.device).cumsum(0)
        level = torch.bucketize(anchor, ends, right=True)
        return ikd_loss_by_level(f[image, anchor], v, level, len(ends), self.norm)

    def crop_embeddings(self, batch, boxes, owner):
        if self.details == "paper":
            return super().crop_embeddings(batch, boxes, owner)
        with self.autocast(boxes):
            pixels = normalise(batch["images"], batch["sizes"])
            return self.clip.encode_crops(pixels, boxes, owner, self.crop_scale, antialias=False)

    def captions_of(self, batch):
        captions, valid = super().captions_of(batch)
        if self.shuffle_captions:
            return captions.roll(1, 0), valid.roll(1, 0)
        return captions, valid

    def patches_of(self, f, level_sizes):
        return pool_patches(f, level_sizes, self.patches, self.pool)

    def match(self, score, valid):
        if self.loss == "cl":
            return super().match(score, valid)
        loss = pull_loss(score, valid)
        return loss + self.student.tau_m * 0  # unused here, but DDP waits for its gradient


def direct_scores(clip, batch, boxes, text, details="paper", crop_scale=1.0, amp=False):
    """Algorithm 1: CLIP classifies crops of the detector's boxes. One image, boxes (n, 4) -> p (n, K)."""
    owner = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
    released = details == "released"
    pixels = normalise(batch["images"], batch["sizes"], IMAGENET if released else clip.grey_levels)
    with torch.autocast(boxes.device.type, torch.bfloat16, enabled=amp):
        v = clip.encode_crops(pixels, boxes, owner, crop_scale, not released)
    return (100 * v @ text.T).softmax(-1)


# ================================================================== detector

def normalise(images, sizes=None, mean_std=IMAGENET):
    """uint8 RGB (B, 3, H, W) -> float. sizes (B, 2) h, w: the padding becomes the mean pixel, zero here."""
    mean, std = (constant(v, images.device, torch.float32).view(3, 1, 1) for v in mean_std)
    x = (images - mean) / std
    if sizes is None:
        return x
    rows = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
    cols = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    return x * (rows[:, None, :, None] & cols[:, None, None, :])


class Body(nn.Module):
    """A torchvision ResNet up to C5; returns {name: map} of C3, C4, C5.

    frozen, for pre-trained weights: stem and layer1 do not learn, and BatchNorm always uses its running
    statistics (few images a GPU).
    """

    returned = "layer2", "layer3", "layer4"

    def __init__(self, net, frozen):
        super().__init__()
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", *self.returned)
        self.stages = nn.ModuleDict({n: getattr(net, n) for n in names})
        self.frozen = frozen
        if frozen:
            for name in ("conv1", "bn1", "layer1"):
                self.stages[name].requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()
        return self

    def forward(self, x):
        maps = {}
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.returned:
                maps[name] = x
        return maps


def check_backbone(name, init):
    if name not in ("r50", "r101") and not re.fullmatch("tiny(8|16|24|32|48|64)", name):
        raise UserError(f"--backbone {name}: choose among r50, r101, tiny8 ... tiny64")
    if init == ("imagenet" if name.startswith("tiny") else "shapes"):
        raise UserError(f"--backbone {name}: has no weights of --init {init}; tiny ones have those of shapes")


def make_body(name, init):
    """(Body, channels of its maps) of r50|r101|tinyN. init "imagenet" downloads torchvision's V1 weights;
    "none"; or a file of common/tiny.py's."""
    check_backbone(name, init)
    frozen = init != "none"
    if name.startswith("tiny"):
        from common.tiny import tiny_resnet
        width = int(name[4:])
        return Body(tiny_resnet(name, init), frozen), [2 * width, 4 * width, 8 * width]
    net = getattr(torchvision.models, "resnet" + name[1:])(weights=None)
    if init == "imagenet":
        from common.zoo import imagenet_state
        load_strict(net, *imagenet_state("resnet" + name[1:]))
    return Body(net, frozen), [512, 1024, 2048]


class P6P7(ExtraFPNBlock):
    """P6 and P7 by stride-2 convolutions from P5, without a ReLU between (torchvision's LastLevelP6P7 has
    one)."""

    def __init__(self, channels):
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, results, x, names):
        p6 = self.p6(results[-1])
        return results + [p6, self.p7(p6)], names + ["p6", "p7"]


class PlaceNorm(nn.LayerNorm):
    """Norm over the channels of each place of (B, C, H, W): it knows nothing of the rest of the image."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_tower(channels, depth, norm):
    """depth times 3x3 convolution, norm ("group" or "place"), ReLU."""
    layers = []
    for _ in range(depth):
        layers.append(nn.Conv2d(channels, channels, 3, 1, 1, bias=False))
        layers.append(nn.GroupNorm(32, channels) if norm == "group" else PlaceNorm(channels))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class OpenATSS(nn.Module):
    """ATSS whose class tower ends in a D-channel embedding; names are what it is compared with.

    background (D,): the start of T_bg, CLIP's embedding of "a photo of background."; None for a constant
    cosine of 0.2. quality: what the quality branch learns, "iou", "centerness" or "none". depth, norm: of the
    towers, see make_tower. learn_weight: lambda_cls is exp(-s), s learnt.
    """

    def __init__(self, backbone, background, dim, channels=256, quality="iou", tau_c=100.0,
                 learn_weight=False, gkd=True, embed_bias="focal", init="none", depth=4, norm="group"):
        super().__init__()
        self.arch = dict(backbone=backbone, dim=dim, channels=channels, quality=quality, depth=depth,
                         norm=norm, bg="fixed" if background is None else "learn", gkd=gkd,
                         learn_weight=learn_weight)
        self.body, widths = make_body(backbone, init)
        self.fpn = FeaturePyramidNetwork(widths, channels, P6P7(channels))
        for m in self.fpn.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        self.cls_tower = make_tower(channels, depth, norm)
        self.reg_tower = make_tower(channels, depth, norm)
        self.embed = nn.Conv2d(channels, dim, 3, 1, 1)
        self.reg = nn.Conv2d(channels, 4, 3, 1, 1)
        self.quality = nn.Conv2d(channels, 1, 3, 1, 1) if quality != "none" else None
        for m in (*self.cls_tower, *self.reg_tower, self.embed, self.reg, self.quality):
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=0.01)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        if channels != 256:  # 0.01 belongs to 256 channels and SGD
            for m in (*self.cls_tower, *self.reg_tower, self.embed):
                if isinstance(m, nn.Conv2d):
                    nn.init.kaiming_normal_(m.weight)
        if embed_bias == "focal":
            nn.init.constant_(self.embed.bias, -math.log(99))  # of a prior of 0.01
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in STRIDES)
        self.background = None
        if background is not None:
            self.background = nn.Parameter(background.detach().clone().reshape(1, dim))  # T_bg
        self.tau_c = nn.Parameter(torch.tensor(float(tau_c)))  # a plain scalar: no exp, no clamp
        self.tau_m = nn.Parameter(torch.tensor(10.0)) if gkd else None
        self.s = nn.Parameter(torch.tensor(1.0)) if learn_weight else None

    def forward(self, images):
        """(B, 3, H, W) normalised -> {"embed": (B, D, H_l, W_l), "reg": 4 channels, "quality": 1 channel}, L
        maps each, raw."""
        maps = dict(embed=[], reg=[], quality=[])
        for level, x in enumerate(self.fpn(self.body(images)).values()):
            maps["embed"].append(self.embed(self.cls_tower(x)))
            x = self.reg_tower(x)
            maps["reg"].append(self.reg(x) * self.scales[level])
            if self.quality is not None:
                maps["quality"].append(self.quality(x))
        return maps

    def flatten(self, maps):
        """Maps of L levels -> Outputs."""
        def flat(levels):
            return fp32(torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in levels], 1))
        x = flat(maps["embed"])
        quality = flat(maps["quality"])[..., 0] if maps["quality"] else None
        return Outputs(x / (x.norm(dim=-1, keepdim=True) + 1e-10), flat(maps["reg"]), quality)

    def classify(self, f, text):
        """Eq. 1 with this detector's background and temperature: (..., D), (K, D) -> (..., K + 1) logits."""
        return class_logits(f, text, self.background, self.tau_c)

    @torch.no_grad()
    def unit_background(self):
        """T_bg is kept on the unit sphere: it learns by projected SGD."""
        if self.background is not None:
            self.background /= self.background.norm()

    def assign(self, maps, batch, background_label):
        """Labels -> Targets, by ATSS."""
        anchors, level_sizes, counts = anchors_of(maps)
        valid = batch["labels"] >= 0
        inside = cells_inside(batch["sizes"], level_sizes, STRIDES)
        owner = assign_atss(anchors, counts, batch["boxes"], valid, inside)
        positive, index = owner >= 0, owner.clamp(min=0)
        boxes = batch["boxes"].gather(1, index[..., None].expand(-1, -1, 4))
        labels = torch.where(positive, batch["labels"].gather(1, index), background_label)
        count = reduce_mean(positive.sum(1).clamp(min=1).float().sum())  # N_pos: an image counts 1 at least
        return Targets(anchors, level_sizes, counts, positive, owner != IGNORED, boxes, labels, count)

    def box_losses(self, out, targets):
        """({"box", "quality"}: 2 GIoU weighted by u, BCE of the quality logits against u; the predicted boxes
        (B, A, 4) and their IoU (B, A) with the assigned ones, both without gradient). u: the IoU, or
        centerness."""
        decoded = decode_deltas(out.reg, targets.anchors, DELTA_STD)
        iou, giou = overlap(decoded, targets.boxes)
        iou = iou.detach()
        if self.arch["quality"] == "iou":
            u = iou
        elif self.arch["quality"] == "centerness":
            u = centerness_target(targets.boxes, (targets.anchors[:, :2] + targets.anchors[:, 2:]) / 2)
        else:
            u = torch.ones_like(iou)
        u = u * targets.positive
        losses = dict(box=2.0 * ((1 - giou) * u).sum() / reduce_mean(u.sum(), 1.0))
        if out.quality is not None:
            bce = F.binary_cross_entropy_with_logits(out.quality, u, reduction="none") * targets.positive
            losses["quality"] = bce.sum() / targets.count
        return losses, decoded.detach(), iou

    @torch.no_grad()
    def detect(self, maps, size, texts, direct=None, nms_iou=0.4, per_level=1000, count=100):
        """Maps of ONE image -> a list over text matrices (K, D) of (boxes in network pixels, scores, labels).

        size: (h, w) of the image. Per level the 1000 anchors of highest max_c p_c * sigmoid(quality); score =
        p_c * sigmoid(quality); the background is dropped after the softmax. direct: Algorithm 1, a function
        (boxes (n, 4), text, quality (n,)) -> scores (n, K) that take the place of these.
        """
        out, (anchors, _, counts) = self.flatten(maps), anchors_of(maps)
        quality = torch.ones(len(anchors), device=anchors.device)
        if out.quality is not None:
            quality = out.quality[0].sigmoid()
        boxes = clip_boxes_to_image(decode_deltas(out.reg[0], anchors, DELTA_STD), tuple(size))
        found = []
        for text in texts:
            scores = self.classify(out.f[0], text).softmax(-1)[:, :-1] * quality[:, None]  # (A, K)
            picked, start = [], 0
            for best, n in zip(scores.amax(1).split(counts), counts):
                picked.append(start + best.topk(min(per_level, n)).indices)
                start += n
            picked = torch.cat(picked)
            scores = scores[picked]
            if direct:
                scores = direct(boxes[picked], text, quality[picked])
            found.append(top_detections(boxes[picked], scores, nms_iou, count))
        return found


def anchors_of(maps):
    """(anchors (A, 4), [(H_l, W_l)], anchors per level): one square of side 8 strides per cell."""
    level_sizes = [tuple(m.shape[-2:]) for m in maps["reg"]]
    anchors = grid_anchors(level_sizes, STRIDES, [8.0], device=maps["reg"][0].device)
    return anchors, level_sizes, [h * w for h, w in level_sizes]


def top_detections(boxes, scores, iou, count):
    """Class-wise NMS over all (box, class) pairs, the best `count`: (boxes (N, 4), scores (N,), labels (N,)).

    boxes (n, 4), scores (n, K). With a threshold of 0 every pair competes, 217,750 of them for GZSD. NMS goes
    down by score, so what survives among the best pairs does not depend on the rest: the best 4,096 are tried
    first, and more only if too few survive. The same result.
    """
    flat, tried, classes = scores.flatten(), 4096, scores.shape[1]
    while True:
        score, pair = flat.topk(min(tried, len(flat)))
        pair, score = pair[score > 0], score[score > 0]
        kept = batched_nms(boxes[pair // classes], score, pair % classes, iou)
        if len(kept) >= count or tried >= len(flat):
            kept = kept[:count]
            return boxes[pair[kept] // classes], score[kept], pair[kept] % classes
        tried *= 8


# ================================================================== data

def make_data(args, split, like=None, novel=None):
    """The training set (base boxes, with captions), or the images of val with a base or novel object; None
    without a val set. like, novel: base and novel names that are known already, of training or of weights."""
    files = own_files(args, split)
    if files is False:
        return None
    captions, root = args.train_captions, None
    if files is None:
        root = args.data
        if root == "shapes":
            from common.shapes import make_shapes
            root = make_shapes(seed=args.data_seed)
        files = find_coco(root, split)
        captions = Path(root) / "annotations" / "captions_train2017.json"
    need = split == "train" and args.gkd
    if need:
        check_captions(captions, root)
    folder, annotations = files
    records, size = read_annotations(annotations, folder), args.image_size or "800"
    rule = args.split or "own"
    asked_base, asked_novel = given_names(args)
    base, novel = class_split(rule, records.classes, like, asked_novel if novel is None else novel,
                              asked_base)
    if split == "train":
        absent = sorted({*novel} - {*records.classes}) if rule in ("48_17", "65_15") else ()
        for name in absent:
            tell(f"{annotations}: has no {name}, novel in --split {rule}; under another name it is trained")
        if asked_base:
            refuse_strange(base, records.classes, "--base", annotations)
        strange = sorted(spaced(asked_novel or []) - spaced(records.classes))
        if strange and args.train_json and not args.val_json:  # with one it is looked up there
            tell(f"--novel: {', '.join(strange[:5])} is no class of {annotations} and keeps nothing out of "
                 "training; is it spelled as there?")
        data = CocoDataset(folder, records, True, size, classes=base, captions=captions if need else None,
                           keep_empty=args.keep_empty, flip_words=args.flip_words)
        if need and not any(data.captions):
            raise UserError(f"{captions}: has no caption for any of the {len(data)} training images; do "
                            "their ids agree? Or use --no-gkd (--data shapes needs nothing)")
        return data
    if asked_novel:
        refuse_strange(novel, records.classes, "--novel", annotations)
    names, wanted = respell(records.classes, base + novel), set(base + novel)
    here = [n for n, name in zip(records.classes, names) if name in wanted]
    if not here:
        raise UserError(f"{annotations}: has none of the classes {', '.join((base + novel)[:5])} ...")
    order = [name for name in names if name in wanted]  # the file's, then what it lacks
    order += [n for n in base + novel if n not in set(order)]
    val = CocoDataset(folder, records, False, size, classes=here, like=order)
    if args.clip_direct and not val.truth(novel, holding=True)["images"]:
        raise UserError(f"{annotations}: has no box of a novel class, and this evaluation is about them")
    return val


def check_captions(captions, root):
    """GKD's captions are there. root: of --data, None for own files."""
    if captions and Path(captions).exists():
        return
    where = f"--train-captions {captions}: is missing" if captions else "--train-captions: is missing"
    if root:
        where = f"--data {root}: {captions} is missing; it comes with COCO's annotations"
    raise UserError(f"{where}. GKD needs captions; or use --no-gkd (--data shapes needs nothing)")


def given_names(args):
    """(--base, --novel), lists of names, or None where they are not given."""
    base = class_names(args.base, "--base") if args.base else None
    novel = class_names(args.novel, "--novel") if args.novel else None
    return base, novel


def class_split(split, names, base=None, novel=None, asked=None):
    """Class names of a file -> (base, novel). split: of COCO, or "shapes", or "own", see split_classes."""
    if split == "own":
        return split_classes(names, base, novel, asked)
    if split == "shapes":
        from common.shapes import BASE, NOVEL
        return BASE, NOVEL
    if split == "48_17":
        return BASE_48, NOVEL_17
    return [n for n in names if n not in NOVEL_15], NOVEL_15


# ================================================================== train

LEGEND = dict(  # of the log; losses are times their weights
    cls="classification loss, Eq. 1: focal loss of the softmax over names and background",
    box="box loss: GIoU", quality="loss of the quality branch: IoU or centerness of a box",
    ikd="Eq. 2: embeddings of positives against CLIP's of their crops", gkd="Eqs. 3-5: captions and images",
    norm="norm of the gradient, clipped at 10", tau_c="temperature of Eq. 1, learnt",
    tau_m="temperature of Eq. 5, learnt", s="of the learnt weight exp(-s) of cls")


def plain_of(model):
    """What a checkpoint holds beside weights: enough to rebuild the detector without flags; CLIP by name."""
    return dict(script="hierkd.py", arch=model.arch)


def make_pair(args, data, rank, world, device):
    """(student, CLIP) of the flags, on the device."""
    clip = get_clip(args.clip, args.data_seed, device)
    init = args.init
    if init == "shapes":
        from common.tiny import load_fpn, shapes_backbone
        init = shapes_backbone(args.backbone, args.data_seed)
    seed_all(args.seed)  # here, so that every method starts from the same student
    background = None if args.bg == "fixed" else clip.encode_text(["a photo of background."])[0]
    channels = 64 if args.backbone.startswith("tiny") else 256
    student = OpenATSS(args.backbone, background, clip.dim, channels, args.quality, args.tau_c,
                       args.cls_weight == "learn", args.gkd, args.embed_bias, init, **tower_of(channels))
    spec = str(Path(args.clip).resolve()) if Path(args.clip).is_file() else args.clip
    if args.init == "shapes":
        load_fpn(student.fpn, init)
    student.arch |= dict(image_size=args.image_size, clip=spec, clip_name=clip.name,
                         templates=list(TEMPLATES), data=args.data, data_seed=args.data_seed)
    if rank > 0:
        seed_all(args.seed + rank)  # each process draws negatives of its own; the weights are rank 0's
    return student.to(device), clip


def tower_of(channels):
    """Depth and norm of the towers: the paper's at its width."""
    return dict(depth=4, norm="group") if channels == 256 else dict(depth=1, norm="place")


def make_distiller(student, clip, classes, args):
    """The module that is trained: Distiller, or Comparison where a table's variant is asked for."""
    weight = 1.0 if args.cls_weight == "learn" else args.cls_weight
    options = dict(ikd=args.ikd, gkd=args.gkd, cls_weight=weight, ikd_weight=args.ikd_weight,
                   gkd_weight=args.gkd_weight, negatives=args.negatives, norm=args.ikd_norm,
                   crop_scale=args.crop_scale, most_crops=args.ikd_max, patches=args.gkd_patches,
                   levels=args.gkd_levels, tau_a=args.tau_a, amp=args.amp == "bf16", seed=args.seed)
    variant = dict(details=args.ikd_details, box=args.ikd_box, pool=args.gkd_pool, loss=args.gkd_loss,
                   shuffle_crops=args.shuffle_crops, shuffle_captions=args.shuffle_captions)
    papers = dict(details="paper", box="pred", pool="max", loss="cl", shuffle_crops=False,
                  shuffle_captions=False)
    if variant == papers and student.s is None:
        return Distiller(student, clip, classes, **options)
    return Comparison(student, clip, classes, **options, **variant)


def prepare(args, data, val, student, teacher, rank, world, device):
    """The Distiller; the student told its names, described and compiled."""
    base = data.classes
    asked_base, asked_novel = given_names(args)
    novel = class_split(args.split, data.records.classes, base, asked_novel, asked_base)[1]
    if val:
        novel = [n for n in val.classes if n not in base]
    teacher.class_embeddings(base + novel)  # what is wrong with a name is told before training
    tell_cut(teacher, base + novel)
    if args.gkd:
        long = 2 * teacher.model.context_length  # characters: the few that may have more tokens
        tell_cut(teacher, [c for some in data.captions for c in some if len(c) > long], ("{}",), "captions")
        if len(data) < args.batch_size * world:
            tell(f"{len(data)} images are no batch: GKD tells them from copies of themselves (--no-gkd)")
    student.arch |= dict(base=base, novel=novel)
    if rank == 0:
        print(f"CLIP {teacher.name} | {len(base)} base and {len(novel)} novel classes")
    fast_layout(student, device)
    example = collate([data[0, 0]])["images"].float()
    describe_model(f"student {type(student).__name__}_{args.backbone}", student, example, rank=rank)
    if args.compile:
        student.compile()
    if args.train_json and len(data) < 2000 and args.row != "own":
        tell(f"{len(data)} images: {args.epochs} epochs of COCO's settings are few steps here; --row own has "
             "settings for small data")
    return make_distiller(student, teacher, data.classes, args).train()


def make_optimizer(model, algorithm, lr, weight_decay, backbone=1.0):
    """SGD with momentum 0.9, or AdamW, for the weights that learn; the backbone at `backbone` times lr."""
    parts = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts.setdefault(lr * backbone if "body." in name else lr, []).append(p)
    groups = [dict(params=weights, lr=rate, base_lr=rate, weight_decay=weight_decay)
              for rate, weights in parts.items()]
    if algorithm == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, **fused())
    return torch.optim.AdamW(groups, lr, **fused())


def method_of(args):
    """What is distilled, in words, for the start of a run."""
    return f"IKD {args.ikd} GKD {args.gkd}"


def count_draws(run, distiller):
    """last.pt keeps how often crops were chosen: a resumed run goes on drawing where the other stopped."""
    distiller.draws = run.state.get("draws", 0) if run.resumed else 0
    run.beside = dict(draws=lambda: distiller.draws)


def reported(args, distiller):
    """What of a Run depends on the method. Base classes choose best.pt: novel labels must not."""
    return dict(every=args.epochs if args.data == "shapes" else None, metric="base AP50", report="last")


def rate_factor(args, it, steps):
    """Learning-rate factor of iteration `it`, `steps` an epoch."""
    milestones = (args.epochs * (3 / 4 if args.schedule == "3x" else 2 / 3), args.epochs * 11 / 12)
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
    optimizer = make_optimizer(distiller, args.optimizer, lr, args.weight_decay, args.backbone_lr)
    run = Run(args, student, optimizer, plain_of(student), len(plan), total_batch, rank, world,
              device, legend=LEGEND, **reported(args, distiller))
    count_draws(run, distiller)
    run.describe(method_of(args), lr, args.lr, paper_batch, data, val)
    while True:
        if run.due:
            run.scored(*evaluate(student, val, rank, world, device, args, teacher), val)
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
                (sum(terms.values()) / len(batches)).backward()  # Eq. 6
                losses = {k: losses.get(k, 0) + v.detach() / len(batches) for k, v in terms.items()}
            norm = nn.utils.clip_grad_norm_(distiller.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step(losses, lr * factor, dict(norm=norm, **distiller.watch))
        run.end_epoch()
    return run.close()


# ================================================================== evaluate, predict

ARCH = """backbone dim channels depth norm quality bg learn_weight gkd image_size clip clip_name templates
    data data_seed base novel""".split()


def load(weights, flag="--weights"):
    """(detector in eval mode, names of the base, then of the novel classes) of a checkpoint of ours.

    The detector is a plain module on the CPU: see predict_image. Raises UserError, one line, for whatever is
    wrong with the file; flag: what that line calls it.
    """
    checkpoint, where = load_checkpoint(weights, "hierkd.py"), f"{flag} {weights}"
    a = checkpoint.get("arch")
    if isinstance(a, dict) and a.get("rpn") is True:
        raise UserError(f"{where}: is an RPN of Table 1, which names nothing; give a detector")
    if not isinstance(a, dict) or not set(ARCH) <= set(a):
        raise UserError(f"{where}: is no checkpoint of hierkd.py")
    with rebuilding(where):
        background = torch.ones(a["dim"]) if a["bg"] == "learn" else None
        model = OpenATSS(a["backbone"], background, a["dim"], a["channels"], a["quality"], 100.0,
                         a["learn_weight"], a["gkd"], depth=a["depth"], norm=a["norm"])
        classes = a["base"] + a["novel"]
        words = [*classes, *a["templates"], a["clip"], a["clip_name"], a["data"]]
        if a["norm"] not in ("group", "place") or not all(isinstance(w, str) for w in words):
            raise UserError(f"{where}: its description of the network is damaged")
    model.arch = a
    load_strict(model, checkpoint.get("model"), where)
    model.unit_background()
    model.trained = checkpoint.get("epoch"), checkpoint.get("it")
    model.clip, model.spec, model.texts = None, None, {}  # see text_of
    return model.eval(), classes


def text_of(model, classes, spec=None):
    """(K, D) text matrix of these names by the checkpoint's CLIP, or by spec (--clip). CLIP is loaded once,
    each list of names read once."""
    device = model.tau_c.device
    if model.clip is None or spec not in (None, model.spec):
        model.clip, model.spec, model.texts = clip_of(model.arch, model.arch["dim"], spec, device), spec, {}
    key = classes if isinstance(classes, str) else tuple(classes)
    if key not in model.texts:
        tell_cut(model.clip, key, model.arch["templates"])
        model.texts[key] = model.clip.class_embeddings(key, model.arch["templates"])
    return model.texts[key].to(device)


@torch.no_grad()
def run_detector(model, batch, texts, amp="none", direct=None):
    """One collated image -> for each text matrix (boxes in original pixels, scores, labels). direct: with
    --clip-direct, a function (batch, boxes, text, quality) -> scores."""
    device = model.tau_c.device
    batch = to_device(batch, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
        maps = model(normalise(batch["images"], batch["sizes"]))

    def by_clip(boxes, text, quality):
        return direct(batch, boxes, text, quality)

    (h, w), (height, width) = batch["sizes"][0].tolist(), batch["original_sizes"][0]
    found = model.detect(maps, (h, w), texts, by_clip if direct else None)
    scale = torch.tensor([width / w, height / h] * 2, device=device)
    return [(boxes * scale, scores, labels) for boxes, scores, labels in found]


def find_boxes(model, text, pixels, image_size=None, amp="none"):
    """(boxes (N, 4) xyxy pixels, scores (N,), labels (N,)) of uint8 (3, H, W), resized as in training."""
    image, (h, w) = resize(pixels, max(parse_image_size(image_size or model.arch["image_size"])))
    item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0,
                original_size=pixels.shape[1:])
    return run_detector(model, collate([item]), [text], amp)[0]


def predict_image(model, classes, image, score=0.3):
    """(boxes (N, 4) xyxy pixels of `image`, scores (N,), N names), best first, of those above `score`.

    model: of load; it may be moved to a GPU. classes: any names; CLIP is loaded at the first call. image: a
    path or PIL image (turned upright as its EXIF says), or a uint8 RGB tensor (3, H, W).
    """
    boxes, scores, labels = find_boxes(model, text_of(model, classes), as_pixels(image))
    keep = scores > score
    return boxes[keep], scores[keep], [classes[k] for k in labels[keep].tolist()]


KEYS = ("AP50", "AR50", "AP50s", "AP50m", "AP50l")


def evaluate(model, val, rank, world, device, args, clip):
    """(AP50 and AR50 under ZSD, GZSD and base only, GZSD's detections) on rank 0, (None, None) elsewhere or
    without a validation set.

    ZSD: novel names, images with a novel object. Base: likewise. GZSD: all names compete; means over base,
    novel and all classes. With --clip-direct ZSD alone, as in Table 6; without a novel object without ZSD.
    """
    if val is None:
        return None, None
    model.eval()
    model.unit_background()  # it is off the sphere after a step
    since, known = time.time(), model.arch["base"]
    base = [n for n in val.classes if n in known]
    novel = [n for n in val.classes if n not in known]
    names = dict(zsd=novel) if args.clip_direct else dict(zsd=novel, base=base, gzsd=val.classes)
    truth = {p: val.truth(names[p], holding=True) for p in names}
    names = {p: names[p] for p in names if truth[p]["images"]}
    ids = {p: [val.category_ids[val.classes.index(n)] for n in names[p]] for p in names}
    texts = {p: clip.class_embeddings(names[p], model.arch["templates"]) for p in names}
    wanted = {p: {i["id"] for i in truth[p]["images"]} for p in names}
    results = {p: Detections() for p in names}

    def direct(batch, boxes, text, quality):
        p = direct_scores(clip, batch, boxes, text, args.ikd_details, args.crop_scale, args.amp == "bf16")
        return p * quality[:, None] if args.direct_quality else p

    loader = eval_loader(val, rank, world, args.workers)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        image_id = batch["image_ids"][0]
        asked = [p for p in names if image_id in wanted[p]]
        if asked:
            found = run_detector(model, batch, [texts[p] for p in asked], args.amp,
                                 direct if args.clip_direct else None)
            for p, result in zip(asked, found):
                results[p].add(image_id, *result, ids[p])
    for found in results.values():
        found.images = gather(found.images)
    if rank != 0:
        return None, None
    results = {p: judged(truth[p], results[p]) for p in names}
    stats = {p: coco_evaluate(truth[p], results[p]) for p in names}
    scored = len(set().union(*wanted.values()))
    metrics, line = dict(images=scored, seconds=time.time() - since), [f"{scored} images"]
    groups = dict(zsd=("ZSD novel", "zsd", novel), base=("base", "base", base),
                  gzsd_base=("GZSD base", "gzsd", base), gzsd_novel=("novel", "gzsd", novel),
                  gzsd_all=("all", "gzsd", val.classes))
    for group, (words, protocol, members) in groups.items():
        if protocol in names and members:
            metrics |= {f"{group}_{key}": class_mean(stats[protocol], members, key) for key in KEYS}
            line.append(f"{words} AP50 {metrics[group + '_AP50']:.1f} AR50 {metrics[group + '_AR50']:.1f}")
    metrics["score"] = metrics.get("zsd_AP50" if args.clip_direct else "base_AP50", -1.0)
    metrics["classes"] = {p: stats[p]["classes"] for p in names}
    metrics["line"] = " | ".join([*line, f"{metrics['seconds']:.0f}s"])
    return metrics, results["zsd" if args.clip_direct else "gzsd"]


def follow(args, arch):
    """The flags with what a checkpoint was trained with: its novel classes must stay novel."""
    shapes = arch["data"] == "shapes"
    if args.data == "shapes" and not shapes:
        raise UserError("--data shapes: the checkpoint was trained on other classes, not on those of shapes")
    if shapes and args.data not in (None, "shapes"):
        raise UserError(f"--data {args.data}: the checkpoint was trained on shapes and knows nothing else")
    if arch["data"] == OWN and not (args.data or args.val_json):
        raise UserError(f"--eval {args.eval}: was trained on own files; give --val-json and --val-images")
    return argparse.Namespace(**vars(args) | dict(
        data=args.data or arch["data"], split="own", data_seed=arch["data_seed"],
        image_size=args.image_size or arch["image_size"]))


def evaluate_file(args, rank, world, device):
    """--eval: metrics of a checkpoint, into --out. Novel is what was novel in training, or, if nothing was,
    what the file knows beside the base; with --classes, whatever of them is not base."""
    from common.pictures import write_results
    model, classes = load(args.eval, "--eval")
    args = follow(args, model.arch)
    base, novel = model.arch["base"], model.arch["novel"] or None
    if args.classes:
        classes = class_names(args.classes)
        known = spaced(base)
        base = [n for n in model.arch["base"] if plain_name(n) in spaced(classes)]
        novel = [n for n in classes if plain_name(n) not in known]
    val = make_data(args, "val", like=base, novel=novel)
    strange = [n for n in respell(val.records.classes, val.classes) if n not in val.classes]
    if args.classes:
        lacks = sorted(spaced(classes) - spaced(val.records.classes))
        if lacks:
            tell(f"--classes: {', '.join(lacks[:5])} is no class of {val.annotations.name} and cannot be "
                 "scored")
    elif strange and args.val_json:
        tell(f"{len(strange)} classes of {val.annotations.name} are not in the checkpoint's vocabulary and "
             f"left out, first {strange[0]}; --classes names others")
    clip = clip_of(model.arch, model.arch["dim"], args.clip, device)
    tell_cut(clip, val.classes)
    metrics, results = evaluate(model.to(device), val, rank, world, device, args, clip)
    if rank == 0:
        write_results(Path(args.out), metrics, results, val, args.eval, *model.trained)
        print(val.report(), metrics["line"], sep="\n")


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file) and one picture per image into --out."""
    from common.pictures import Pictures
    model, classes = load(args.weights)
    model.to(device)
    if args.classes:
        classes = class_names(args.classes)
    pictures = Pictures(args.predict, args.out, args.score)
    text = text_of(model, classes, args.clip)
    for picture in pictures:
        picture.save(*find_boxes(model, text, picture.pixels, args.image_size, args.amp), classes)


class Exported(nn.Module):
    """What --export writes: uint8 RGB (B, 3, H, W), resized, then padded right and bottom to multiples of 32
    with the mean pixel (124, 116, 104) -> boxes (B, A, 4) xyxy pixels, scores (B, A, K) times the quality,
    both before NMS; then the embedding and box maps, level by level. The names are fixed: text (K, D)."""

    def __init__(self, model, text):
        super().__init__()
        self.model = model
        self.register_buffer("text", text)

    def forward(self, images):
        maps = self.model(normalise(images))
        out, anchors = self.model.flatten(maps), anchors_of(maps)[0]
        scores = self.model.classify(out.f, self.text).softmax(-1)[..., :-1]
        if out.quality is not None:
            scores = scores * out.quality.sigmoid()[..., None]
        return decode_deltas(out.reg, anchors, DELTA_STD), scores, maps["embed"], maps["reg"]


def export(args):
    """--export: the detector of these names as a torch.export (.pt2) or ONNX (.onnx) program."""
    from common.export import export_program
    model, classes = load(args.weights)
    if args.classes:
        classes = class_names(args.classes)
    program = Exported(model, text_of(model, classes, args.clip))
    export_program(program, args.export, ("boxes", "scores"), classes)


# ================================================================== flags

EXAMPLES = """
torchrun --nproc_per_node 4 hierkd.py                            # HierKD R50 1x on data/coco, 48/17 split
python hierkd.py --data shapes                                   # everything in minutes on a CPU
python hierkd.py --predict photo.jpg --weights runs/hierkd/best.pt --classes "red panda,umbrella"
"""
OWN = "own files"  # --data's name of --train-json
SHAPES = dict(  # --data shapes
    backbone="tiny16", init="shapes", tau_c=30.0, embed_bias="zero", ikd_weight=0.4, ikd_max=64,
    gkd_weight=0.5, gkd_levels=1, epochs=8, batch_size=16, optimizer="adamw", lr=0.004,
    clip="", flip_words=True, crop_scale=1.2, image_size="72-120")
ROWS = rows("""  # --row NAME: the paper's AR50/AP50 of novel classes (ZSD), COCO 48/17, R50; flags; a remark
    t2-l1           62.4/14.6  IKD
    t2-l2           65.1/12.8  IKD --ikd-norm l2
    t2-l2-w10       63.6/14.6  IKD --ikd-norm l2 --ikd-weight 10
    t2-gt           62.8/14.5  IKD --ikd-box gt
    t2-1.5x         64.5/15.3  IKD --crop-scale 1.5
    t3-avg4         59.2/12.0  GKD --gkd-patches 4 --gkd-pool avg
    t3-max4         64.2/20.1  GKD --gkd-patches 4
    t3-max3         61.1/20.7  GKD
    t3-max8         60.8/13.7  GKD --gkd-patches 8
    t3-pl           60.9/17.9  GKD --gkd-loss pl
    t3-batch4       65.6/20.5  GKD --batch-size 4 --lr 0.01
    t4-none         52.4/10.2  --no-ikd --no-gkd --quality centerness --batch-size 4
    t4-ikd          62.4/14.6  IKD  # = t2-l1, t5-ikd-10
    t4-gkd          61.1/20.7  GKD  # = t3-max3, t5-gkd-10
    t4-both         70.1/20.7  --quality centerness
    t4-iou          71.3/21.6  --quality iou  # HierKD, the default
    t5-ikd-1to1     63.0/16.8  IKD --negatives 1to1  # base AR50/AP50: 71.0/37.0
    t5-ikd-10       62.4/14.6  IKD --negatives 0.1  # base 75.9/44.3
    t5-ikd-100      60.3/9.0   IKD --negatives 1.0  # base 74.5/44.4
    t5-gkd-1to1     60.2/19.3  GKD --negatives 1to1
    t5-gkd-10       61.1/20.7  GKD --negatives 0.1
    t5-gkd-100      56.4/18.7  GKD --negatives 1.0
    t6-ikd          66.6/24.9  --eval runs/hierkd-t4-ikd/last.pt --clip-direct  # run row t4-ikd first
    t6-gkd          64.5/23.3  --eval runs/hierkd-t4-gkd/last.pt --clip-direct
    t6-both         65.8/22.8  --eval runs/hierkd-t4-both/last.pt --clip-direct
    t7-48           25.3;51.3,20.3,43.2  --schedule 3x  # AP50: ZSD novel; GZSD base, novel, all
    t7-65           27.4;48.9,20.4,43.6  --schedule 3x --split 65_15  # images with novel objects stay
    t8-1x           71.3/21.6  --schedule 1x  # = t4-iou
    t8-2x           69.8/23.1  --schedule 2x
    t8-3x           70.0/25.3  --schedule 3x  # = t7-48
    t8-r101         71.4/27.3  --schedule 3x --backbone r101  # also of Table 9; jitter as R50's, not printed
    s31-fixed-bg    -          --bg fixed  # number not printed
    released        -          RELEASED  # the released code's choices, see the script's head
    own             -          OWN  # small own data, not tuned; from random weights --lr 0.004
    """, IKD="--no-gkd --quality centerness --batch-size 4", GKD="--no-ikd --quality centerness",
    RELEASED="--ikd-norm l2 --ikd-weight 0.05 --ikd-details released --cls-weight learn --direct-quality",
    OWN="--optimizer adamw --lr 0.0002 --batch-size 16 --epochs 16 --tau-c 30 --embed-bias zero "
        "--ikd-weight 0.4 --ikd-max 64 --crop-scale 1.2 --gkd-weight 0.5")
ANALYSES = rows("""  # rows that are no run of this script: `python tests/analyses_hierkd.py` and these words
    t1-iou50        61.9,76.9,87.5  rpn --batch-size 4  # recall of novel boxes at 100, 300, 1000
    t1-iou75        37.4,48.1,57.4  rpn --batch-size 4  # the same run
    t9              70.7/68.0  bound
    fig4            -          heat --predict photo.jpg --weights runs/hierkd/best.pt --classes umbrella,cat
    """)
OF_IKD = "ikd_norm ikd_weight ikd_details ikd_box ikd_max crop_scale shuffle_crops"
OF_GKD = """gkd_loss gkd_weight gkd_patches gkd_levels gkd_pool tau_a shuffle_captions train_captions
    flip_words"""
# flags, the flag that gives them an effect, its values
BELONGS = (
    (OF_IKD, "ikd", (True, None)),
    (OF_GKD, "gkd", (True, None)),
    ("data_seed", "data", ("shapes",)))
MODES = dict(eval="data workers clip clip_direct direct_quality classes val_json val_images",
             predict="weights score classes clip", export="weights classes clip")


def number_or(word, kind):
    """argparse type: the word, or a number of this kind."""
    def parse_it(text):
        try:
            return word if text == word else kind(text)
        except argparse.ArgumentTypeError as e:
            raise argparse.ArgumentTypeError(f"{e}; or {word}") from None
    return parse_it


def parse_args(argv=None):
    p = parser(__doc__, EXAMPLES)
    switch = dict(action=argparse.BooleanOptionalAction)
    g = p.add_argument_group("data")
    g.add_argument("--data", help="COCO-layout root, or 'shapes': the embedded dataset (default data/coco)")
    g.add_argument("--split", choices=("48_17", "65_15"),
                   help="base / novel classes of COCO (default 48_17; shapes has its own)")
    names = "comma-separated, or a file with one a line; given several times, one name each"
    g.add_argument("--base", action="append", metavar="NAMES",
                   help=f"classes to train on, {names} (default: all but --novel)")
    g.add_argument("--novel", action="append", metavar="NAMES",
                   help="classes to name unseen (default: what the validation file knows beside the base)")
    g.add_argument("--classes", action="append", metavar="NAMES",
                   help="for --predict, --eval, --export: any names (default: base and novel of training)")
    g.add_argument("--train-captions", metavar="JSON",
                   help="COCO-format captions of the images of --train-json; without them no GKD")
    g.add_argument("--flip-words", **switch,
                   help="swap left and right in the caption of a flipped image (default: shapes only)")
    g.add_argument("--data-seed", type=SEED, default=0,
                   help="shapes: seed of the drawn images, of the tiny CLIP and of the backbone")
    g.add_argument("--image-size",
                   help="short side: 800, a choice 640,800 or a range 480-800 (default 800; schedule 3x "
                   "480-800; shapes 72-120; --eval, --predict: as trained)")
    g = p.add_argument_group("model")
    g.add_argument("--clip", help="teacher: MODEL/WEIGHTS of open_clip (default ViT-B-32-quickgelu/openai; "
                   "shapes: the tiny CLIP, trained on demand)")
    g.add_argument("--backbone", help="r50 or r101 (default r50; shapes tiny16; tiny8 ... tiny64)")
    g.add_argument("--init", choices=("imagenet", "shapes", "none"),
                   help="backbone (default imagenet; shapes: shapes, of drawn base objects, with its FPN)")
    g.add_argument("--quality", choices=("iou", "centerness", "none"), default="iou",
                   help="what the quality branch learns, and the weight of boxes")
    g.add_argument("--bg", choices=("learn", "fixed"), default="learn",
                   help="background embedding, or a constant cosine of 0.2")
    g.add_argument("--tau-c", type=POSITIVE,
                   help="start of the classifier's temperature, Eq. 1 (default 100; shapes 30)")
    g.add_argument("--embed-bias", choices=("focal", "zero"),
                   help="start of the embedding's bias: -4.6 or 0 (default focal; shapes zero)")
    g = p.add_argument_group("method")
    g.add_argument("--ikd", **switch, default=True, help="instance-level distillation, Eq. 2")
    g.add_argument("--ikd-norm", choices=("l1", "l2"), default="l1", help="distance of Eq. 2")
    g.add_argument("--ikd-weight", type=number(), help="lambda_ins of Eq. 6 (default 1; shapes 0.4)")
    g.add_argument("--ikd-details", choices=("paper", "released"), default="paper", help="released: mean per "
                   "level, then over levels; crops with ImageNet's normalisation and without antialias")
    g.add_argument("--ikd-box", choices=("pred", "gt"), default="pred", help="boxes that are cropped")
    g.add_argument("--ikd-max", type=COUNT, help="at most so many crops per process and micro-batch, drawn "
                   "at random (default all; shapes 64)")
    g.add_argument("--crop-scale", type=POSITIVE,
                   help="crops are enlarged by this (default 1; training on shapes 1.2)")
    g.add_argument("--gkd", **switch, help="global (caption) distillation, Eqs. 3-5 (default, where there "
                   "are captions)")
    g.add_argument("--gkd-loss", choices=("cl", "pl"), default="cl", help="contrastive, Eq. 5, or pairs only")
    g.add_argument("--gkd-weight", type=number(), help="lambda_Glo of Eq. 6 (default 1; shapes 0.5)")
    g.add_argument("--gkd-patches", type=COUNT, default=3, help="N: each level is cut into N x N patches")
    g.add_argument("--gkd-levels", type=number(int, 1, 5), help="levels that are cut, from P3 (default 5; "
                   "shapes 1: the others have next to no object)")
    g.add_argument("--gkd-pool", choices=("max", "avg"), default="max", help="pooling of a patch")
    g.add_argument("--tau-a", type=POSITIVE, default=1.0, help="temperature of captions' attention, Eq. 3")
    g.add_argument("--negatives", type=number_or("1to1", number(float, 0, 1, above=True)), default=0.1,
                   help="share of the negatives that is kept, per level; or 1to1: as many as positives")
    g.add_argument("--cls-weight", type=number_or("learn", POSITIVE), default=1.0,
                   help="lambda_cls of Eq. 6: a number, or learn: exp(-s), with + |s|")
    g.add_argument("--shuffle-captions", action="store_true", help="control: an image gets another's caption")
    g.add_argument("--shuffle-crops", action="store_true", help="control: a positive gets another one's crop")
    g.add_argument("--clip-direct", **switch, default=False, help="with --eval: Algorithm 1, Table 6: CLIP "
                   "classifies crops of the boxes; with this command's --ikd-details, --crop-scale")
    g.add_argument("--direct-quality", **switch, default=False,
                   help="the quality still multiplies CLIP's score there")
    g = p.add_argument_group("schedule")
    g.add_argument("--schedule", choices=("1x", "2x", "3x"), default="1x",
                   help="12, 24 or 36 epochs; x0.1 at 2/3 and 11/12, 3x: 3/4 and 11/12")
    g.add_argument("--epochs", type=COUNT, help="instead of the schedule's (shapes 8)")
    g.add_argument("--batch-size", type=COUNT, help="images per process and pass (default 8; shapes 16)")
    g.add_argument("--optimizer", choices=("sgd", "adamw"), help="(default sgd; shapes adamw)")
    g.add_argument("--lr", type=POSITIVE, help="for a total batch of 16, scaled linearly (default 0.005 with "
                   "GKD, 0.01 without: the released code's, 0.01 at 32 and at 16; shapes 0.004)")
    g.add_argument("--backbone-lr", type=number(), help="the backbone's, as a factor (default 1; shapes 0.1)")
    g.add_argument("--weight-decay", type=number(), default=1e-4)
    g.add_argument("--table", **switch, help="train without and with distillation, at one rate, and print "
                   "both (default: on shapes, with IKD and GKD, without --max-iters, --base, --novel)")
    run_flags(p, "hierkd", rows=ROWS | ANALYSES, export=True)
    first, given = p.parse_args(argv), given_flags(p, argv)
    if first.row in ANALYSES:
        words = ANALYSES[first.row][1]
        p.error(f"--row {first.row}: is run by hand: python tests/analyses_hierkd.py {words}")
    direct = first.clip_direct or "--clip-direct" in ROWS.get(first.row, ("", ""))[1]
    crops = " ikd_details crop_scale" if direct else ""
    args = parse(p, argv, "hierkd", MODES | dict(eval=MODES["eval"] + crops),
                 only="weights score classes clip_direct direct_quality", belongs=BELONGS,
                 rows=ROWS | ANALYSES,
                 saved=lambda args: same_names(args, saved_run(args, "hierkd.py", "ikd_details")))
    if "direct_quality" in given and not args.clip_direct:
        p.error("--direct-quality: belongs to --clip-direct")
    wrong = "" if any(getattr(args, m) for m in MODES) else contradiction(args, given)
    if wrong:
        p.error(wrong)
    if args.image_size:
        parse_image_size(args.image_size)
    return args


def contradiction(args, given):
    """What is wrong with a training's flags as a whole, or "". given: those that stand in the command."""
    shapes, own = args.data == "shapes", args.train_json
    idle = "schedule" in given and (shapes or "epochs" in given)
    if args.schedule != "3x" and idle or args.schedule == "2x" and shapes:
        return f"--schedule {args.schedule}: sets the epochs only, which --epochs or --data shapes set, too"
    if args.split in ("48_17", "65_15") and (shapes or own or args.base or args.novel):
        whose = "shapes have theirs" if shapes else "own files, and --base and --novel, say theirs"
        return f"--split {args.split}: is of COCO's names; {whose}"
    if args.train_captions and not own:
        return "--train-captions: belongs to --train-json; COCO's captions lie beside its boxes"
    if args.table and (args.ikd is False or args.gkd is False):
        return "--table: trains without and with both distillations; leave out --no-ikd and --no-gkd"
    if args.row == "own" and not own and not shapes:
        return "--row own: is for your own data, --train-json and --train-images"
    idle = [f for f in OF_GKD.split() if f in given]
    if idle and own and args.gkd is None and not args.train_captions:
        return f"{dash(idle[0])}: belongs to GKD, which needs --train-captions"
    if args.table and own and not args.val_json:
        return "--table: needs a validation set, --val-json"
    return ""


def resolve(args):
    """The flags with every default that depends on another flag; after this they are only read."""
    training = not any(getattr(args, mode) for mode in MODES)
    shapes, own = args.data == "shapes", bool(training and args.train_json)
    named = bool(own or args.base or args.novel)
    args = argparse.Namespace(**vars(args))
    if args.gkd is None:
        args.gkd = not own or bool(args.train_captions)
        if training and not args.gkd:
            tell("--train-json without --train-captions: no GKD (--no-gkd)")
    defaults = dict(
        backbone="r50", init="imagenet", tau_c=100.0, embed_bias="focal", ikd_weight=1.0, gkd_weight=1.0,
        gkd_levels=5, epochs={"1x": 12, "2x": 24, "3x": 36}[args.schedule], batch_size=8, optimizer="sgd",
        lr=0.005 if args.gkd else 0.01, backbone_lr=0.1 if shapes and args.init != "none" else 1.0,
        image_size="480-800" if args.schedule == "3x" else "800", clip="ViT-B-32-quickgelu/openai",
        data=OWN if own else "data/coco", split="own" if named else "48_17", flip_words=False,
        crop_scale=1.0, table=False)
    if shapes:
        every_part = args.ikd and args.gkd and args.max_iters is None
        defaults |= SHAPES | dict(split="own" if named else "shapes", table=every_part and not named)
    if not training:  # the checkpoint says
        defaults |= dict(crop_scale=1.0, split=None, image_size=None, clip=None, data=None)
        args.base = args.novel = args.train_json = None
    args = with_defaults(args, defaults)
    if training:
        # names, not files of names, are saved: --resume needs no file
        args.base, args.novel = (names and [names] for names in given_names(args))
        check_backbone(args.backbone, args.init)
        if args.gkd and args.batch_size == 1 and (args.gkd_loss == "cl" or args.shuffle_captions):
            raise UserError("--batch-size 1: GKD contrasts (--shuffle-captions: exchanges) the captions of a "
                            "process' batch; use more images, or --no-gkd")
    return args

# ================================================================== main

def quick_start(args, rank, world, device):
    """--table: the detector without and with distillation, at the same rate, in one table and one picture."""
    open_table(args, rank)
    lines, found = [], {}
    for name, distil in (("baseline", False), ("HierKD" if args.gkd else "IKD", True)):
        since, out = time.time(), Path(args.out) / name.lower()
        more = dict(ikd=distil, gkd=distil and args.gkd, out=str(out), table=False,
                    resume=args.resume and (out / "last.pt").exists())
        metrics = train(argparse.Namespace(**vars(args) | more), rank, world, device)
        if rank == 0:
            groups = "zsd base gzsd_base gzsd_novel gzsd_all".split()
            numbers = name, *(metrics.get(f"{g}_AP50", -1) for g in groups), time.time() - since
            lines.append("%-18s %10.1f %6.1f | %9.1f %6.1f %6.1f %9.0f" % numbers)
            found[name] = out / "detections.json"
    if rank == 0:
        from common.pictures import save_comparison
        base = make_data(args, "train").classes
        val = make_data(args, "val", base)
        page = save_comparison(val, found, args.out, [n for n in val.classes if n not in base])
        head = f"{args.data + ', AP50':18s}  ZSD novel   base | GZSD base  novel    all   seconds"
        print(f"\n{head}", *lines, f"ground truth, and what each finds: {page}", sep="\n")


def main():
    with started("hierkd.py") as (rank, world, device):
        args = resolve(parse_args())
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
        elif args.table:
            quick_start(args, rank, world, device)
        else:
            train(args, rank, world, device)


if __name__ == "__main__":
    main()
