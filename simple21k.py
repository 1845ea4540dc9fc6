# SPDX-License-Identifier: MIT
"""A Simple Approach and Benchmark for 21,000-Category Object Detection (Lin et al., ECCV 2022): first learn to classify, then to detect.

Idea. Boxes are dear and exist for hundreds of classes; image labels are cheap and exist for 21,841. Earlier work trains a detector and then carries its
boxes over to images with labels. Here it goes the other way round. Stage I trains a classifier that is built as a detector: the whole image is one RoI,
RoIAlign instead of average pooling, the detector's own RoI head instead of one linear layer. Stage II trains detector and classifier together: backbone,
FPN and RoI head are shared, detection images give the losses of Faster R-CNN (Mask R-CNN), classification images, three for each of the former, still
one RoI, the whole image. What is an object is told apart from what it is: f, one foreground score (Eq. 1), learns from boxes only; g and g^ (Eqs. 2, 3),
a softmax over the detection classes and one over the classification classes, learn what objects are; the score of a class is the product (Eq. 4). A
proposal takes its name from g^ although no box of that class was ever seen. Classes that both vocabularies hold get a weighted geometric mean (Eq. 5).

No code, no weights and no benchmark of this paper were published. Where it is silent we chose; what can be chosen otherwise is a flag:
  1. The loss "on the final score" is the likelihood of p(class c) = S_fg S_c, p(background) = 1 - S_fg, in logits; both terms over the sampled RoIs.
  2. Stage I pools the whole image from the FPN level that its size has in a detector: P4 at 224 px (--stage1-level). The parts of the FPN that this
     leaves without gradient are frozen: weight decay alone would shrink them by e^-9 (Swin) to e^-25 (ResNet) in the paper's schedules.
  3. g^ is loaded into stage II (--reinit-cls: not). Box regression and masks are class-agnostic: classes without boxes have none of their own.
  4. Stage II: AdamW, 2 detection and 6 classification images a GPU, learning rate 3e-4 for 16 detection images, weight 0.1 of the classification
     loss, 1,000 steps of warm-up, x0.1 at 3/4 and 11/12, BatchNorm frozen.
  5. "-stage I" in Table 2: --stage 2 --init none, random weights; with --init imagenet, torchvision's classifier, it would be the row "-reform".
  6. LVIS classes outside the 997 have no label, so they are background; --extra-as-fg lets them train f and the boxes.
  7. Boxes of crowd regions are no boxes here, as in torchvision's training: what they cover is background.
  8. Eq. 5 is printed without S_fg. We read it as the S_c of Eq. 4: S_fg multiplies the mean, or shared classes would outrank all others on background.

    python simple21k.py --data shapes                                                # both stages and boxes alone, on 2 cores
    torchrun --nproc_per_node 8 simple21k.py --setup s2 --out runs/s2                # COCO + ImageNet-1K; paper: 64.7 / 69.9 top-1 / 5, GT-known 73.8
    torchrun --nproc_per_node 8 simple21k.py --setup s1 --wordnet index.noun --out runs/s1      # LVIS + IN-997, masks; paper: AP 27.6, base 29.1, novel 22.8
    torchrun --nproc_per_node 8 simple21k.py --setup s3 --backbone swin_b --out runs/s3         # Objects365 + ImageNet-21K; paper: 6.9 AP50, 19.2 top-1
    torchrun --nproc_per_node 8 simple21k.py --setup lvis --init runs/s3/stage2/best.pt --out runs/lvis    # Table 5: fine-tuning on LVIS
    torchrun --nproc_per_node 8 simple21k.py --train-json a.json --train-images a/ --cls-dir folders/ --val-json b.json --val-images b/     # your own data
    python simple21k.py --eval runs/x/best.pt --setup s2
    python simple21k.py --predict photo.jpg dir/ --weights runs/x/best.pt --names words.txt --classes "red panda,n02510455"
Not run by us: any of it at full size. On shapes (three seeds, README): novel AP50 9.3, without the classifier built as a detector 7.3, without stage I 1.4,
with boxes only in stage II 3.5.

Letters: B images, R RoIs, D channels of a RoI, C detection classes, K (the paper's C^) classification classes, V classes that are scored.
"""
import argparse
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, OrderedDict
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops import FeaturePyramidNetwork, box_iou, clip_boxes_to_image, nms, roi_align
from torchvision.transforms import v2 as T
from tqdm import tqdm

from common.boxes import constant
from common.datasets import (CocoDataset, collate, eval_loader, objects365, read_annotations, read_json, regular,
                             repeat_fractions, require_lvis, start_worker, stream_json)
from common.evaluation import (class_mean, class_table, coco_evaluate, encode_mask, import_lvis, localise, lvis_evaluate,
                               sparse_ap, to_coco_results)
from common.imagenet import (ImageIndex, LabelledImages, LocalisationImages, Stream, check_localisation, collate_labelled,
                             hidden, jitter_image, read_ilsvrc, unprintable)
from common.run import (COUNT, POSITIVE, Run, UserError, answer_folder, barrier, dash, describe_model,
                        fast_layout, fused, gather, given_flags, holds_run, load_checkpoint, load_strict, number,
                        open_run, parse, parser, reduce_mean, run_flags, saved_flags, seed_all, started,
                        warmup_multistep, wrap_ddp, write_whole)

STRIDES = (4, 8, 16, 32)  # of P2 ... P5
SWIN = dict(  # torchvision's name, first width, depths, heads, stochastic depth of stage I and II
    swin_t=(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2, 0.2), swin_s=(96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3, 0.2),
    swin_b=(128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5, 0.3))


# ================================================================== model

def fp32(x):
    """bf16 maps of autocast -> fp32, in which all scores and losses are computed; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Body(nn.Module):
    """Backbone up to C5 as four stages: (B, 3, H, W) -> [C2, C3, C4, C5], strides 4 to 32. Swin's maps get a LayerNorm each, as in Swin's detectors."""

    def __init__(self, name, drop_path=0.0):
        super().__init__()
        if name in SWIN:
            # Windows shift by torchvision's rule: not on a map of one window (up to 7 x 7 cells). mmdetection shifts there, too
            # (common.zoo.always_shift), but none of its weights are read here. Stage I at 224 px (C5: 7 x 7) is Swin's
            # classification, whose own code does not shift there, and so torchvision's ImageNet weights have learnt it.
            # On stage II's canvas of 1,024 px (C5: 32 x 32) all shift: there both rules are one.
            width, depths, heads, *_ = SWIN[name]
            parts = list(SwinTransformer([4, 4], width, list(depths), list(heads), [7, 7], stochastic_depth_prob=drop_path, num_classes=1).features)
            stages = [nn.Sequential(*parts[2 * i:2 * i + 2]) for i in range(4)]  # patches or merging, then blocks; (B, H, W, C)
            self.channels = [width * 2**i for i in range(4)]
            self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-5) for c in self.channels)
        else:
            if name.startswith("tiny"):
                from common.tiny import NarrowResNet
                net = NarrowResNet(int(name[4:]))
            else:
                net = torchvision.models.resnet50(weights=None)
            first = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool, layer1=net.layer1))
            stages = [first, net.layer2, net.layer3, net.layer4]
            width = net.inplanes // 8  # of the first stage
            self.channels, self.norms = [width * 2**i for i in range(4)], None
        self.stages, self.recompute, self.fixed_norms = nn.ModuleList(stages), False, False

    def train(self, mode=True):
        super().train(mode)
        for m in self.modules() if self.fixed_norms else ():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()
        return self

    def forward(self, x, lowest=0):
        """Maps from stage `lowest` on; None for those below."""
        maps = []
        for i, stage in enumerate(self.stages):
            x = checkpoint(stage, x, use_reentrant=False) if self.recompute and self.training else stage(x)
            m = None if i < lowest else x
            if self.norms is not None and m is not None:
                m = self.norms[i](m).permute(0, 3, 1, 2).contiguous()
            maps.append(m)
        return maps


def level_of(side, canonical):
    """FPN level 0 ... 3 (P2 ... P5) of RoIs with sqrt(area) `side`: a RoI of `canonical` pixels, 224 on ImageNet-size images, goes to P4."""
    return (4 + torch.log2(side / canonical) + 1e-6).floor().clamp(2, 5).long() - 2


def pool(maps, rois, canonical, size=7):
    """RoIAlign from the FPN level of each RoI. maps: {level: (B, D, h, w)}, or one level for all; rois (n, 5) image and xyxy pixels -> (n, D, size, size).

    Strides are told, not guessed: torchvision's MultiScaleRoIAlign infers them once, from the first batch, and wrongly if its images fill less than 0.7
    of the canvas. sampling_ratio 0 reads every cell: two samples a bin would skip a third of the cells of a whole image.
    """
    align = lambda k, part: roi_align(fp32(maps[k]), part, size, 1 / STRIDES[k], sampling_ratio=0, aligned=True)
    if len(maps) == 1:
        return align(next(iter(maps)), rois)
    level = level_of(((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=1e-6).sqrt(), canonical)
    out = rois.new_zeros(len(rois), next(iter(maps.values())).shape[1], size, size)
    for k in maps:  # a level without RoIs takes part with zero gradients: every process has a gradient for everything
        rows = (level == k).nonzero()[:, 0]
        out = out.index_copy(0, rows, align(k, rois[rows]))
    return out


class Detector(nn.Module):
    """Body, FPN, RPN, RoI head and the linear layers f, g, g^. Stage I has no RPN, no f, g, boxes; with head "gap" only body and g^.

    arch, plain values: name (backbone), stage, head, masks, gap; det: names of the C detection classes; cls: wnids of the K classification classes,
    cls_names, pair: for each its detection class or -1; what else --eval and --predict need.
    """

    def __init__(self, arch, drop_path=0.0):
        super().__init__()
        self.arch, self.watch, tiny = arch, {}, arch["name"].startswith("tiny")
        c, k = len(arch["det"]), len(arch["cls"])
        dim, hidden, scale = (32, 256, 4) if tiny else (256, 1024, 1)  # the embedded dataset's images are of 100 pixels
        self.canonical, self.body = 224 / scale, Body(arch["name"], drop_path)
        if arch["gap"]:
            self.cls = linear(self.body.channels[-1], k)
            return
        self.fpn = FeaturePyramidNetwork(self.body.channels, dim)
        self.head = (TwoMLPHead(dim * 49, hidden) if arch["head"] == "2fc" else
                     FastRCNNConvFCHead((dim, 7, 7), [dim] * 4, [hidden], norm_layer=lambda c: nn.GroupNorm(32 if c % 32 == 0 else 8, c)))
        if k:
            self.cls = linear(hidden, k)        # g^ of Eq. 3
        if arch["stage"] == 1:
            return
        self.fg, self.det = linear(hidden, 1), linear(hidden, c)     # f of Eq. 1, g of Eq. 2
        self.box = linear(hidden, 4, 0.001)     # of any class
        anchors = AnchorGenerator(tuple((s // scale,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
        before = dict(training=200, testing=200) if tiny else dict(training=2000, testing=1000)
        after = dict(training=100, testing=100) if tiny else dict(training=2000, testing=1000)
        self.rpn = RegionProposalNetwork(anchors, RPNHead(dim, 3), 0.7, 0.3, 64 if tiny else 256, 0.5, before, after, 0.7)
        self.rpn.box_similarity = lambda a, b: torch.cat([box_iou(part, b) for part in a.split(16)])  # 600 boxes x 262,000 anchors at once would be 5 GB
        self.rois_per_image = 32 if tiny else 512
        if arch["masks"]:
            self.mask = nn.Sequential(OrderedDict(convs=MaskRCNNHeads(dim, (dim,) * 4, 1), out=MaskRCNNPredictor(dim, dim, 1)))

    def forward(self, images):
        """Raw outputs of every layer, with the whole image as every RoI: for describe_model, which counts their work. Training and
        detection go through the methods below."""
        sizes = [tuple(images.shape[-2:])] * len(images)
        if self.arch["stage"] == 1:
            return self.whole_image(images, sizes, self.arch["level"])
        tops = self.top_down(images)
        maps = self.smooth(tops)
        pooled = self.whole_rois(tops, sizes).repeat_interleave(self.rpn.post_nms_top_n(), 0)
        h = self.head(pooled)
        out = [*self.rpn.head([*maps.values(), F.max_pool2d(maps[3], 1, 2)]), self.fg(h), self.det(h), self.box(h)]
        if self.arch["cls"]:
            out.append(self.cls(h))
        if self.arch["masks"]:
            out.append(self.mask(pooled[:100].repeat(1, 1, 2, 2)))  # of the final boxes, 14 x 14
        return out

    def top_down(self, images, lowest=0):
        """Normalised images -> {level: (B, D, h, w)} from P5 down to `lowest`: torchvision's FPN before its 3x3 convolutions."""
        maps, tops = self.body(images, lowest), {}
        for i in range(3, lowest - 1, -1):
            tops[i] = self.fpn.inner_blocks[i](maps[i])
            if i < 3:
                tops[i] = tops[i] + F.interpolate(tops[i + 1], size=tops[i].shape[-2:])
        return tops

    def smooth(self, tops):
        """The FPN's 3x3 convolutions: most of its work, so only for the levels and images that are read."""
        return {k: fp32(self.fpn.layer_blocks[k](tops[k])) for k in sorted(tops)}

    def features(self, images):
        return self.smooth(self.top_down(images))

    def proposals(self, images, sizes, maps, boxes=None):
        """(per image (n, 4) xyxy pixels inside its content, RPN losses). sizes: list of (h, w); boxes: true ones of each image, in training."""
        levels = OrderedDict((str(k), m) for k, m in maps.items())
        levels["pool"] = F.max_pool2d(maps[3], 1, 2)  # P6
        return self.rpn(ImageList(images, sizes), levels, None if boxes is None else [dict(boxes=b) for b in boxes])

    def whole_image(self, images, sizes, level="canonical", bf16=False):
        """Stage I: logits of g^ (B, K) on one RoI, the image's content. sizes: list of (h, w). level: "all" gives four RoIs an image, logits (4 B, K).

        level: see whole_rois. bf16: autocast body and FPN.
        """
        with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
            if self.arch["gap"]:
                x = fp32(self.body(images, 3)[3]).mean((2, 3))
            else:
                x = self.whole_rois(self.top_down(images, self.lowest(sizes, level)), sizes, level)
        return self.cls(x if self.arch["gap"] else self.head(x))                                               # Eq. 3

    def lowest(self, sizes, level="canonical"):
        return min(self.whole_levels(sizes)) if level == "canonical" else 0

    def whole_levels(self, sizes):
        return level_of(torch.tensor([float(h * w) for h, w in sizes]).sqrt(), self.canonical).tolist()

    def whole_rois(self, tops, sizes, level="canonical"):
        """RoIAlign of whole images (B, D, 7, 7), (4 B, ...) for "all". level: "canonical", that of the RoI's size; "random" for each image; "all".

        The level is known before anything is computed: each image goes through the 3x3 convolution of its own level only."""
        whole = [(0.0, 0.0, float(w), float(h)) for h, w in sizes]
        if level == "all":
            level, whole, image = [k for k in range(4) for _ in sizes], 4 * whole, 4 * list(range(len(sizes)))
        else:
            image = list(range(len(sizes)))
            level = self.whole_levels(sizes) if level == "canonical" else torch.randint(4, (len(sizes),)).tolist()
        device, order, pooled = next(iter(tops.values())).device, [], []
        for k in sorted(tops):  # also one that no image has: every process has a gradient for everything
            rows = [i for i, own in enumerate(level) if own == k]
            part = tops[k][constant([image[i] for i in rows], device, torch.long)]
            rois = constant([(j, *whole[i]) for j, i in enumerate(rows)], device, torch.float32).reshape(-1, 5)
            pooled.append(pool(self.smooth({k: part}), rois, self.canonical))
            order += rows
        # pooled is in the order of levels; this permutation puts it back into that of the images
        return torch.cat(pooled)[constant(sorted(range(len(order)), key=order.__getitem__), device, torch.long)]

    def mask_logits(self, maps, rois):
        """(n, 28, 28) for rois (n, 5)."""
        return self.mask(pool(maps, rois, self.canonical, 14))[:, 0]


def linear(d, out, std=0.01):
    layer = nn.Linear(d, out)
    nn.init.normal_(layer.weight, std=std), nn.init.zeros_(layer.bias)
    return layer


def normalise(batch):
    """uint8 images -> mean 0, deviation 1; 0 in the padding."""
    x = batch["images"]
    mean, std = (constant(v, x.device, torch.float32).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows = torch.arange(x.shape[2], device=x.device) < batch["sizes"][:, :1]
    cols = torch.arange(x.shape[3], device=x.device) < batch["sizes"][:, 1:]
    return (x / 255 - mean) / std * (rows[:, None, :, None] & cols[:, None, None, :])


# ================================================================== losses

def product_score_loss(z, g, foreground, label):
    """Eqs. 1, 2, 4: -log of the final score, for each RoI: (two (n,): foreground part, category part).

    z (n,) logits of f, g (n, C) logits; foreground (n,) bool; label (n,) 0 ... C - 1, -1 for background and for objects without a class.
    An object: -log(S_fg S_y) = softplus(-z) + logsumexp(g) - g_y; background: -log(1 - S_fg) = softplus(z).
    That is a (C + 1)-way cross-entropy on [z + log_softmax(g), 0];
    in logits, for log(softmax) is -inf at a gap of 104. Background gives g no gradient at all.
    """
    fg = F.softplus(torch.where(foreground, -z, z))                                                            # Eqs. 1, 4
    return fg, F.cross_entropy(g, label, ignore_index=-1, reduction="none")                                    # Eqs. 2, 4


def mixed_cross_entropy(logits, label, other=None, lam=1.0, smoothing=0.0):
    """Eq. 3, 4: -log softmax(g^)_y, mean over images; of two mixed images lam of the first and 1 - lam of the other, as the dense soft target gives.

    S_fg of Eq. 4 is a constant here, the foreground score learns from boxes only: its log has no gradient and is left out.
    """
    loss = F.cross_entropy(logits, label, label_smoothing=smoothing)
    return loss if other is None else lam * loss + (1 - lam) * F.cross_entropy(logits, other, label_smoothing=smoothing)


def draw_mix(size):
    """Mixup (alpha 0.8) or CutMix (alpha 1), half each, as plain values: (lam, None), or (lam, (y0, y1, x0, x1)). From torch's generator."""
    cut = torch.rand(()).item() < 0.5
    a = torch.tensor(1.0 if cut else 0.8)
    lam = torch.distributions.Beta(a, a).sample().item()
    if not cut:
        return lam, None
    side, (y, x) = size * math.sqrt(1 - lam), torch.randint(size, (2,)).tolist()
    y0, y1, x0, x1 = (min(max(round(v), 0), size) for v in (y - side / 2, y + side / 2, x - side / 2, x + side / 2))
    return 1 - (y1 - y0) * (x1 - x0) / size**2, (y0, y1, x0, x1)


def mix_images(images, mix):
    """Each image with its neighbour in the batch."""
    (lam, window), other = mix, images.roll(1, 0)
    if window is None:
        return lam * images + (1 - lam) * other
    y0, y1, x0, x1 = window
    images = images.clone()
    images[:, :, y0:y1, x0:x1] = other[:, :, y0:y1, x0:x1]
    return images


@torch.no_grad()
def sample_rois(proposals, boxes, labels, per_image):
    """`per_image` RoIs of an image, at most a quarter of them objects: IoU >= 0.5 with a true box. True boxes are proposals, too.

    proposals, boxes, labels: per image (n, 4), (M, 4), (M,) with -1 for objects without a class. Returns rois (R, 5), foreground (R,) bool, label (R,), the
    true box of each (R, 4), and its place in the image (R,); the last two mean nothing for background.
    """
    sampler, parts = BalancedPositiveNegativeSampler(per_image, 0.25), []
    for i, (found, gt, label) in enumerate(zip(proposals, boxes, labels)):
        roi = torch.cat([found, gt])
        if len(gt):
            iou, owner = box_iou(gt, roi).max(0)
        else:
            iou, owner = roi.new_zeros(len(roi)), torch.zeros(len(roi), dtype=torch.long, device=roi.device)
            gt, label = roi.new_zeros(1, 4), label.new_full((1,), -1)
        positive, negative = sampler([(iou >= 0.5).float()])
        rows = (positive[0] | negative[0]).nonzero()[:, 0]
        fg, owner = iou[rows] >= 0.5, owner[rows]
        parts.append((F.pad(roi[rows], (1, 0), value=i), fg, torch.where(fg, label[owner], -1), gt[owner], owner))
    return tuple(torch.cat(p) for p in zip(*parts))


CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


class Learner(nn.Module):
    """One training step: forward(dict(det=batch, cls=batch)) -> {name: weighed loss}. Both kinds of images go through one
    forward, so each parameter has a gradient in every step of every process, and DDP never waits for one that took no part.
    model.watch: numbers of the step that are no losses."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def autocast(self, x):
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.args.amp == "bf16")

    def forward(self, batch):
        return self.classify(batch["cls"]) if self.model.arch["stage"] == 1 else self.detect(batch["det"], batch.get("cls"))

    def classify(self, batch):
        """Stage I."""
        images, label = normalise(batch), batch["labels"]
        mix = draw_mix(self.args.stage1_size) if self.args.augment == "strong" else None
        if mix:
            images = mix_images(images, mix)
        logits = self.model.whole_image(images, batch["image_sizes"], self.args.stage1_level, self.args.amp == "bf16")
        if self.args.stage1_level == "all" and not self.model.arch["gap"]:
            label = label.repeat(4)
        self.model.watch = dict(top1=100 * (logits.argmax(1) == label).float().mean())
        other = label.view(-1, len(images)).roll(1, 1).flatten() if mix else None
        return dict(cls=mixed_cross_entropy(logits, label, other, mix[0] if mix else 1.0, 0.1 if self.args.augment == "strong" else 0.0))

    def detect(self, det, cls):
        """Stage II: detection and classification images, one pass where they have the same canvas."""
        model, args = self.model, self.args
        x = normalise(det)
        joint = cls is not None and cls["images"].shape[-2:] == x.shape[-2:]
        with self.autocast(x):
            tops = model.top_down(torch.cat([x, normalise(cls)]) if joint else x)
            first = model.smooth({k: m[:len(x)] for k, m in tops.items()})
            if cls is not None:
                rest = {k: m[len(x):] for k, m in tops.items()} if joint else model.top_down(normalise(cls))
                whole = model.whole_rois(rest, cls["image_sizes"])
        losses, rois, fg, label, gt, owner = self.rpn_and_rois(x, first, det)
        h = model.head(torch.cat([pool(first, rois, model.canonical), *([whole] if cls is not None else [])]))  # x_i of Eqs. 1-3
        roi_h, n = h[:len(rois)], reduce_mean(constant(float(len(rois)), x.device, torch.float32), 1.0)
        fg_loss, cat_loss = product_score_loss(model.fg(roi_h)[:, 0], model.det(roi_h), fg, label)
        losses.update(fg=fg_loss.sum() / n, cat=cat_loss.sum() / n)
        target = CODER.encode_single(torch.where(fg[:, None], gt, rois[:, 1:]), rois[:, 1:])
        losses["box"] = (F.smooth_l1_loss(model.box(roi_h), target, beta=1 / 9, reduction="none").sum(1) * fg).sum() / n
        if model.arch["masks"]:
            losses["mask"] = self.mask_loss(first, rois[fg], owner[fg], det["masks"], label[fg])
        if cls is not None:
            whole_h = h[len(rois):]
            logits = model.cls(whole_h)                                          # Eq. 3
            loss = mixed_cross_entropy(logits, cls["labels"])
            if args.fg_grad_on_cls:
                loss = loss + F.softplus(-model.fg(whole_h)).mean()  # log S_fg of Eq. 4 with its gradient
            losses["cls"] = args.cls_weight * loss
            self.model.watch = dict(top1=100 * (logits.argmax(1) == cls["labels"]).float().mean())
        return losses

    def rpn_and_rois(self, x, maps, det):
        """(RPN losses, *sample_rois)."""
        boxes = [b[:n] for b, n in zip(det["boxes"], det["counts"])]
        labels = [k[:n] for k, n in zip(det["labels"], det["counts"])]
        if self.args.extra_as_fg:
            boxes = [torch.cat([b, e[:n]]) for b, e, n in zip(boxes, det["hidden"], det["hidden_counts"])]
            labels = [F.pad(k, (0, n), value=-1) for k, n in zip(labels, det["hidden_counts"])]
        found, losses = self.model.proposals(x, det["image_sizes"], maps, boxes)
        return dict(rpn_fg=losses["loss_objectness"], rpn_box=losses["loss_rpn_box_reg"]), *sample_rois(found, boxes, labels, self.model.rois_per_image)

    def mask_loss(self, maps, rois, owner, masks, label):
        """Binary cross-entropy of the class-agnostic masks (Mask R-CNN), mean over objects with a class. masks (B, M, H / 2, W / 2): covered pixels, 0 to 4."""
        known = (label >= 0).nonzero()[:, 0]  # an extra object has no outline
        rois, owner = rois[known], owner[known]
        logits = self.model.mask_logits(maps, rois)
        with torch.no_grad():  # a few outlines at a time: at 1,024 px each is a megabyte
            numbered = lambda boxes: torch.cat([torch.arange(len(boxes), device=boxes.device)[:, None].to(boxes), boxes], 1)
            parts = [roi_align(masks[r[:, 0].long(), o][:, None].float() / 4, numbered(r[:, 1:]), 28, 0.5, 0, True)
                     for r, o in zip(rois.split(32), owner.split(32))]
            target = (torch.cat(parts)[:, 0] >= 0.5).float() if parts and len(rois) else torch.zeros_like(logits)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2))
        return loss.sum() / reduce_mean(constant(float(len(rois)), rois.device, torch.float32), 1.0)


# ================================================================== inference, Eqs. 4, 5

class Vocabulary:
    """What is scored: the K classes of the classification data, then those of the detection data that it lacks; `names` of these V classes.

    both, partner: columns that both classifiers know, and their detection class; alone: detection classes that only g knows; known_as: each column's names,
    all of them. choose: keep some columns. only_cls: without `alone`, as in setups 2 and 3; there g^ works alone unless --overlap has told what they share.
    """

    def __init__(self, arch, device, only_cls=False):
        pair = torch.tensor(arch["pair"], dtype=torch.long)
        known = set(pair.tolist())
        alone = [] if only_cls else [d for d in range(len(arch["det"])) if d not in known]
        self.names = [*arch["cls_names"], *(arch["det"][d] for d in alone)]
        self.wnids = [*arch["cls"], *(arch["det"][d] for d in alone)]
        self.both = (pair >= 0).nonzero()[:, 0].to(device)
        self.partner, self.alone = pair[pair >= 0].to(device), torch.tensor(alone, dtype=torch.long, device=device)
        self.base = [p >= 0 for p in pair.tolist()] + [True] * len(alone)  # had boxes in training
        det = [arch["det"][p] if p >= 0 else n for n, p in zip(self.names, pair.tolist())] + self.names[len(pair):]
        self.known_as = [{*words(n), *words(d), plain(w)} for n, d, w in zip(self.names, det, self.wnids)]
        self.chosen = None

    def choose(self, columns):
        self.chosen = torch.tensor(columns, dtype=torch.long, device=self.both.device)
        self.names, self.wnids, self.base, self.known_as = ([x[k] for k in columns] for x in (self.names, self.wnids, self.base, self.known_as))
        return self

    def find(self, wanted):
        """Columns of names or wnids that a user typed."""
        columns = {}  # keys: each column once
        for name in wanted:
            rows = [k for k, known in enumerate(self.known_as) if plain(name) in known]
            if not rows:
                raise UserError(f"--classes {name}: no such name or wnid among the {len(self.names):,} classes of the checkpoint")
            columns |= dict.fromkeys(rows)
        return list(columns)

    def of(self, truth):
        """{category of a COCO dict, plain: column}, best to choose before evaluation: others would take places among an image's best boxes."""
        wanted, best = {plain(c["name"]) for c in truth["categories"]}, {}
        for k, known in enumerate(self.known_as):
            for name in known & wanted:  # a name that several columns have: the one that had boxes, then the one that has no other
                rank = self.base[k], plain(self.names[k]) == name
                if name not in best or rank > best[name][0]:
                    best[name] = rank, k
        return {name: k for name, (_, k) in best.items()}


def plain(name):
    """A class's name as it is compared: LVIS writes aerosol_can."""
    return name.lower().replace("_", " ").strip()


def words(name):
    """All that a class is called: "lesser panda, red panda" is one class."""
    return {plain(name), *map(plain, name.split(","))}


def class_scores(model, h, vocabulary, fuse, chunk=256):
    """Log scores of RoI features h (R, D), a chunk of RoIs at a time: yields (first RoI, (r, V) fp32). Never more than chunk x V floats at once.

    log S' = log S_fg + log S_c (Eq. 4); where both know a class log S_c is fuse * log S + (1 - fuse) * log S^ (Eq. 5), so S_fg factors out. In log space:
    a uniform softmax over 21,841 classes is 4.6e-5, which bf16 and fp16 cannot tell from its neighbours.
    """
    for start in range(0, len(h), chunk):
        part, v = h[start:start + chunk].float(), vocabulary
        log_det = F.log_softmax(model.det(part), 1)                                                            # Eq. 2
        if model.arch["cls"]:
            scores = model.cls(part)
            scores -= scores.logsumexp(1, keepdim=True)                                                        # Eq. 3
            if len(v.both):
                scores[:, v.both] = fuse * log_det[:, v.partner] + (1 - fuse) * scores[:, v.both]              # Eq. 5
            if len(v.alone):
                scores = torch.cat([scores, log_det[:, v.alone]], 1)
        else:
            scores = log_det[:, v.alone]
        if v.chosen is not None:
            scores = scores[:, v.chosen]
        scores += F.logsigmoid(model.fg(part))                                                                 # Eqs. 1, 4
        yield start, scores


def class_nms(boxes, roi, label, score, topk, most, iou=0.5):
    """Best `most` candidates after NMS within each class: (places (n,) in roi, best first). boxes (R, 4); roi, label, score (N,): candidates.

    A box is only ever removed by a better one of its class, so the best topk give the exact answer if `most` survive; else twice as many are taken. For
    one joint NMS the classes are moved apart: numbered anew 0 ... U - 1 and in float64, for in float32 class 16,384 x 1,024 px swallows the pixels.
    """
    order = score.argsort(descending=True, stable=True)
    while True:
        first = order[:topk]
        here = boxes[roi[first]].double()
        shift = label[first].unique(return_inverse=True)[1] * (here.max() + 1 if len(first) else 1)
        keep = first[nms(here + shift[:, None], score[first].double(), iou)[:most]]
        if len(keep) == most or topk >= len(order):
            return keep
        topk *= 2


@torch.no_grad()
def detect(model, batch, device, args, vocabulary, most=None, best=False):
    """One collated image -> dict(boxes (n, 4) in original pixels, scores, labels: columns of the vocabulary, masks: list of RLE or None).

    most: boxes, instead of --max-dets. best: also best (V,), each class's highest log score, and best_boxes (V, 4): its box. No NMS needed: NMS never removes a class's best box.
    """
    batch = to_device(batch, device)
    images, (size,), (original,) = normalise(batch), batch["image_sizes"], batch["original_sizes"]
    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        maps = model.features(images)
    (found,), _ = model.proposals(images, [size], maps)
    h = model.head(pool(maps, F.pad(found, (1, 0)), model.canonical))
    boxes = clip_boxes_to_image(CODER.decode_single(model.box(h), found), size)
    real = ((boxes[:, 2:] - boxes[:, :2]) > 0.01).all(1)
    boxes, h = boxes[real], h[real]
    scale, least = boxes.new_tensor([original[1] / size[1], original[0] / size[0]] * 2), math.log(max(args.score_thresh, 1e-30))
    parts, top = [], None
    for start, scores in class_scores(model, h, vocabulary, args.fuse):
        roi, label = (scores > least).nonzero(as_tuple=True)
        parts.append((roi + start, label, scores[roi, label]))
        if best:
            value, row = scores.max(0)
            top = (value, row) if top is None else (torch.maximum(top[0], value), torch.where(value > top[0], row + start, top[1]))
    empty = torch.zeros(0, dtype=torch.long, device=device)
    roi, label, score = (torch.cat(p) for p in zip(*parts)) if parts else (empty, empty, boxes.new_zeros(0))
    keep = class_nms(boxes, roi, label, score, args.nms_topk, most or args.max_dets or 100)
    kept = boxes[roi[keep]]
    answer = dict(boxes=kept * scale, scores=score[keep].exp(), labels=label[keep], masks=None)
    if model.arch["masks"] and args.masks:
        logits = model.mask_logits(maps, F.pad(kept, (1, 0)))
        answer["masks"] = [encode_mask((m[0] > 0.5).cpu().numpy()) for part, b in zip(logits.sigmoid()[:, None].split(32), answer["boxes"].split(32))
                           for m in paste_masks_in_image(part, b, original)]
    if best:
        if top is None:
            top = boxes.new_full((len(vocabulary.names),), -math.inf), empty.new_zeros(len(vocabulary.names))
            boxes = boxes.new_zeros(1, 4)
        answer.update(best=top[0], best_boxes=boxes[top[1]] * scale)
    return answer


# ================================================================== checkpoints

ARCH = dict(name=str, stage=int, head=str, gap=bool, masks=bool, det=list, cls=list, cls_names=list,
            pair=list, setup=str, image_size=int, stage1_size=int, augment=str, level=str)
CHOICES = dict(stage=(1, 2), head=("2fc", "4conv1fc"), setup=("s1", "s2", "s3", "lvis", "own"),
               augment=("plain", "weak", "strong"), level=("canonical", "random", "all"))


def plain_of(model):
    """What a checkpoint holds beside weights: enough to rebuild the model without any flag."""
    return dict(script="simple21k.py", arch=model.arch)


def weights_of(model):
    """What a model is, as plain values and tensors."""
    return dict(plain_of(model), model=model.state_dict())


def read_model_file(path, flag):
    """(arch, state dict) of a checkpoint of this script."""
    from common.zoo import naming
    with naming(flag):
        content = load_checkpoint(path, "simple21k.py")
        arch, state = content.get("arch"), content.get("model")
        if not is_arch(arch) or not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise UserError(f"{path}: is no checkpoint of this script")
    return arch, state


def is_arch(arch):
    """Whether a Detector can be built from it, and used."""
    if not isinstance(arch, dict) or not all(type(arch.get(k)) is kind for k, kind in ARCH.items()):
        return False
    chosen = all(arch[k] in values for k, values in CHOICES.items()) and is_backbone(arch["name"])
    sized = all(32 <= arch[k] <= 2**15 and arch[k] % 32 == 0 for k in ("image_size", "stage1_size"))
    named = all(isinstance(n, str) for k in ("det", "cls", "cls_names") for n in arch[k])
    same = len(arch["cls"]) == len(arch["cls_names"]) == len(arch["pair"])
    paired = all(type(p) is int and -1 <= p < len(arch["det"]) for p in arch["pair"])
    return chosen and sized and named and same and paired


def is_backbone(name):
    return name in ("r50", *SWIN) or bool(re.fullmatch("tiny(8|16|24|32|48|64)", name))


def load_model(path, flag):
    arch, state = read_model_file(path, flag)
    model = Detector(arch)
    load_strict(model, state, f"{flag} {path}")
    return model.eval()


def load_imagenet(body, name):
    """torchvision's ImageNet-1K classifier (V1) into a Body; downloaded once, hash checked."""
    from common.zoo import imagenet_state
    state, url = imagenet_state("resnet50" if name == "r50" else name)
    ours = body.state_dict()
    for key, value in state.items():
        if name in SWIN:  # features.0 ... 7 -> stages.0 ... 3; its last norm is C5's
            key = re.sub(r"^features\.(\d)\.", lambda m: f"stages.{int(m[1]) // 2}.{int(m[1]) % 2}.", key)
            key = re.sub(r"^norm\.", "norms.3.", key)
        else:
            key = re.sub(r"^(conv1|bn1|layer1)\.", r"stages.0.\1.", key)
            key = re.sub(r"^layer([234])\.", lambda m: f"stages.{int(m[1]) - 1}.", key)
        if key in ours:
            ours[key] = value
        elif not key.startswith(("fc.", "head.")):
            raise UserError(f"{url}: has {key}, which {name} has not")
    body.load_state_dict(ours)


def load_init(model, args, rank):
    """Stage I (or an earlier detector) into a new one: all parts that both have; prints which. g^ goes
    by wnid, so a part of the classes may go on.

    A backbone that does not fit is an error: a detector that silently starts from noise is the
    commonest cause of bad numbers. g is new where its classes are others.
    """
    arch, state = read_model_file(args.init, "--init")
    ours, new, where, every = model.arch, model.state_dict(), f"--init {args.init}", set(state)
    for key in ("name",) if arch["gap"] else ("name", "head"):
        if arch[key] != ours[key]:
            what = "backbone" if key == "name" else "head"
            raise UserError(f"{where}: has {what} {arch[key]}, this run {ours[key]}")
    if arch["gap"] or args.reinit_cls or not ours["cls"]:
        state = {k: v for k, v in state.items() if not k.startswith("cls.")}
    elif arch["cls"] and arch["cls"] != ours["cls"]:
        row = {w: k for k, w in enumerate(arch["cls"])}
        missing = [w for w in ours["cls"] if w not in row]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{where}: does not know class {missing[0]}{more} of --cls-dir; train stage I on "
                            "them, leave them out with --cls-list, or start the classifier anew with "
                            "--reinit-cls")
        rows = torch.tensor([row[w] for w in ours["cls"]])
        if any(len(v) != len(row) for k, v in state.items() if k.startswith("cls.")):
            raise UserError(f"{where}: its classifier has not the size of its list of {len(row)} classes")
        state |= {k: v[rows] for k, v in state.items() if k.startswith("cls.")}
    if arch["det"] != ours["det"]:
        state = {k: v for k, v in state.items() if not k.startswith("det.")}
    loaded = {k: v for k, v in state.items() if k in new and v.shape == new[k].shape}
    lost = [k for k in state if k not in loaded and k.startswith(("body.", "fpn.", "head."))]
    if lost or any(k.startswith("body.") for k in new if k not in loaded):
        raise UserError(f"{where}: its backbone, FPN or head does not fit; is it a file of this version?")
    model.load_state_dict(new | loaded)
    parts = lambda keys: ", ".join(sorted({k.split(".")[0] for k in keys})) or "nothing"
    if rank == 0:
        print(f"{where}: loaded {parts(loaded)} | new {parts(k for k in new if k not in loaded)} | "
              f"left out {parts(every - set(loaded))}", flush=True)


def resuming(args):
    """Whether last.pt takes the place of --init, whose file may be gone."""
    return args.resume and (Path(args.out) / "last.pt").exists()


def arch_before(args):
    """arch of the checkpoint that stage II starts from, or, resumed, of its last.pt; None for imagenet
    and none."""
    if args.stage != 2 or args.init in (None, "imagenet", "none"):
        return None
    if resuming(args):
        return read_model_file(Path(args.out) / "last.pt", "--resume")[0]
    return read_model_file(args.init, "--init")[0]


# ================================================================== data: vocabularies

def read_lines(path, flag):
    try:
        return regular(path).read_text(encoding="utf-8-sig").splitlines()
    except UserError as e:
        raise UserError(f"{flag} {e}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{flag} {path}: is no text file ({e})") from None


def wordnet_ids(path, synsets):
    """{synset: wnid} from WordNet 3.0's index.noun. "bass.n.03" is the third sense of the lemma bass; a
    line ends in the offsets of its senses, in order, and a wnid is n + offset. Offsets are those of
    version 3.0 only. Synsets that WordNet has not are left out."""
    strange = [s for s in synsets if not re.fullmatch(r".+\.[a-z]\.\d+", s.lower())]
    if strange:
        raise UserError(f"synset {strange[0]}: expected lemma.n.number, as bass.n.03")
    wanted, offsets = {s.lower().rsplit(".", 2)[0] for s in synsets}, {}
    try:
        for line in read_lines(path, "--wordnet"):
            if not line.startswith(" "):
                cells = line.split()
                if cells and cells[0] in wanted:
                    offsets[cells[0]] = cells[-int(cells[2]):]
    except (ValueError, IndexError) as e:
        raise UserError(f"--wordnet {path}: is not WordNet's index.noun ({e}); version 3.0 is at "
                        "https://wordnet.princeton.edu (Debian: apt install wordnet-base)") from None
    answer = {}
    for s in synsets:
        lemma, _, sense = s.lower().rsplit(".", 2)
        if int(sense) <= len(offsets.get(lemma, ())):
            answer[s] = f"n{offsets[lemma][int(sense) - 1]}"
    if not answer:
        raise UserError(f"--wordnet {path}: holds none of the synsets; it should be WordNet 3.0's "
                        "dict/index.noun")
    return answer


def read_overlap(path):
    """{detection class name: wnid} of a json: that dict, or a list of dicts with name and wnid."""
    content = read_json(path)
    try:
        answer = dict(content) if isinstance(content, dict) else {r["name"]: r["wnid"] for r in content}
        if not all(isinstance(w, str) for w in answer.values()):
            raise TypeError
    except (TypeError, KeyError):
        raise UserError(f"--overlap {path}: expected a json object {{detection class: wnid}}") from None
    twice = [w for w, n in Counter(answer.values()).items() if n > 1]
    if twice:
        raise UserError(f"--overlap {path}: two detection classes are {twice[0]}; one class has one partner")
    return answer


def class_names(args, wnids):
    """Name of each wnid: --names, or classes.json in or beside --cls-dir, else the wnid itself."""
    known, source = {}, None
    if args.names:
        source = f"--names {args.names}"
        known = dict(line.split("\t")[:2] for line in read_lines(args.names, "--names") if "\t" in line)
        if not known:
            raise UserError(f"{source}: no line has a wnid, a tab and a name")
    else:
        there = [folder / "classes.json" for folder in (Path(args.cls_dir), Path(args.cls_dir).parent)]
        source = next((path for path in there if path.exists()), None)
        try:
            known = {c["wnid"]: c["name"] for c in read_json(source)} if source else {}
        except (TypeError, KeyError):
            raise UserError(f"{source}: expected a list of objects with wnid and name") from None
    names = [known.get(w, w) for w in wnids]
    strange = [w for w, n in zip(wnids, names) if not isinstance(n, str) or not n.strip() or unprintable(n)]
    if strange:
        raise UserError(f"{source}: the name of {strange[0]} is empty, no text, or holds control characters")
    return names


def read_class_list(args):
    """The classes of --cls-list, or None."""
    if not args.cls_list:
        return None
    return [line.split()[0] for line in read_lines(args.cls_list, "--cls-list") if line.strip()]


def need(path, flag, where):
    if path is None or not Path(path).exists():
        named = f"{flag} {path}" if path else flag
        raise UserError(f"{named}: is missing; {where} (--data shapes needs nothing)")


def wnids_of(args, categories):
    """{detection class name: wnid}: by --overlap, or in setup s1 by WordNet, from the synsets that
    LVIS's categories have; else {}."""
    if args.overlap:
        answer = read_overlap(args.overlap)
        strange = sorted(set(answer) - {c["name"] for c in categories})
        if strange:
            raise UserError(f"--overlap {args.overlap}: {strange[0]} is no class of {args.train_json}")
        return answer
    if args.setup != "s1":
        return {}
    need(args.wordnet, "--wordnet", "WordNet 3.0's dict/index.noun, https://wordnet.princeton.edu "
         "(Debian: apt install wordnet-base)")
    ids = wordnet_ids(args.wordnet, [c["synset"] for c in categories])
    return {c["name"]: ids[c["synset"]] for c in categories if c["synset"] in ids}


def open_index(folder, classes=None, quiet=False):
    """ImageIndex; its cache is made by the first process, while the others wait."""
    first = int(os.environ.get("RANK", 0)) == 0
    if not first:
        barrier()
    index = ImageIndex(folder, classes, quiet or not first)
    if first:
        barrier()
    return index


class FirstImage(Exception):
    """Ends the reading of a json."""


def is_localisation(path):
    """Whether the images of a COCO-format json have a class each: category_id of the first one tells."""
    def stop(image, *_):
        raise FirstImage(image)
    try:
        stream_json(path, dict(images=stop))
    except FirstImage as e:
        return isinstance(e.args[0], dict) and "category_id" in e.args[0]
    return False


def benchmark_images(args):
    """File names of a localisation set that lies in the training folder (setup s3: or is a copy from
    it): they take no part in training, Sec. 4.1."""
    if not args.val_json or not Path(args.val_json).exists() or not args.val_images:
        return []
    if args.setup != "s3" and Path(args.val_images).resolve() != Path(args.cls_dir).resolve():
        return []
    if not is_localisation(args.val_json):
        return []
    content = check_localisation(read_json(args.val_json), args.val_json, quiet=True)
    return [i["file_name"] for i in content["images"]]


def labelled_index(args, partners, quiet=False):
    """ImageIndex of --cls-dir: all its classes, those of --cls-list, in setup s1 those that are LVIS's;
    without the benchmark's images."""
    wanted = read_class_list(args)
    if args.setup == "s3":
        need(args.val_json, "--val-json", "its images must not be trained on; the benchmark was never "
             "published, --make-split draws one")
    need(args.cls_dir, "--cls-dir", "a folder with a folder or .tar of images for each class, as "
         "ImageNet's train")
    if args.setup == "s1" and Path(args.cls_dir).is_dir():
        held = {e.name.removesuffix(".tar") for e in Path(args.cls_dir).iterdir() if not hidden(e.name)}
        wanted = sorted(set(partners) & held & set(wanted or held))
        if not wanted:
            raise UserError(f"--cls-dir {args.cls_dir}: holds none of the {len(partners)} wnids of LVIS; "
                            "there is nothing to evaluate")
    index = open_index(args.cls_dir, wanted, quiet)
    index.drop(benchmark_images(args))
    if len(index.classes) < 2:
        raise UserError(f"--cls-dir {args.cls_dir}: holds one class, {index.classes[0]}; a classifier "
                        "needs two")
    return index


def make_vocabulary(args, quiet=False, before=None):
    """(dict(det, cls, cls_names, pair), ImageIndex or None, Records of the boxes or None): the two
    label spaces and what they share.

    before: the arch of --init; boxes alone (--cls-ratio 0) keep its classes, and without it there are
    none.
    """
    index, records, det, wnid_of, cls, names = None, None, [], {}, [], []
    if args.stage == 2 or args.setup == "s1":
        need(args.train_json, "--train-json", "boxes in COCO's or LVIS's format")
        need(args.train_images, "--train-images", "the images of --train-json")
        records = read_annotations(args.train_json, args.train_images)
        if args.setup == "s3":
            records = objects365(records, args.train_images)
        det = records.classes
        if args.setup == "s1" and not all({"synset", "frequency"} <= set(c) for c in records.categories):
            raise UserError(f"{args.train_json}: categories lack synset or frequency; setup s1 reads LVIS "
                            "v1's json")
        wnid_of = wnids_of(args, records.categories)
    name_of = {w: n for n, w in wnid_of.items()}
    if args.setup != "lvis" and (args.stage == 1 or args.cls_ratio):
        index = labelled_index(args, name_of, quiet)
        cls, names = index.classes, class_names(args, index.classes)
    elif args.setup != "lvis" and before and not before["gap"]:  # of '-reform' no g^ is left
        cls, names = list(before["cls"]), list(before["cls_names"])
    if args.setup == "s1":
        names = [name_of.get(w, w) for w in cls]
        pictured = set(names) if cls else set(records.classes)  # boxes alone: every class that is not rare
        det = [c["name"] for c in records.categories if c["name"] in pictured and c["frequency"] != "r"]
        if cls and not quiet:
            print(f"{len(cls)} of {len(wnid_of):,} LVIS classes have images: {len(det)} base, "
                  f"{len(cls) - len(det)} novel (of fall 2011's: 997, 720, 277)", flush=True)
        if not det:
            raise UserError(f"--cls-dir {args.cls_dir}: none of its {len(cls)} classes of LVIS is common or "
                            "frequent; there are no base classes")
    lost = sorted(set(wnid_of.values()) - set(cls)) if args.overlap and cls else []
    if lost and not quiet:
        more = f" and {len(lost) - 1} more are" if len(lost) > 1 else " is"
        print(f"--overlap {args.overlap}: {lost[0]}{more} not among the {len(cls):,} classes with images",
              flush=True)
    pair = pair_classes(args, det, cls, names, name_of)
    return dict(det=det, cls=cls, cls_names=names, pair=pair), index, records


def pair_classes(args, det, cls, names, name_of):
    """For each classification class its detection class or -1. name_of: {wnid: detection class} where
    these are told."""
    column = {n: k for k, n in enumerate(det)}
    if name_of:
        return [column.get(name_of.get(w), -1) for w in cls]
    if args.setup != "own":
        return [-1] * len(cls)  # the paper does not map them
    free = {plain(n): k for n, k in column.items()}
    pair = [free.get(plain(n), -1) for n in names]
    free = {n: k for n, k in free.items() if k not in set(pair)}
    for k, n in enumerate(names):  # the others by a part of their names
        parts = [w for w in map(plain, n.split(",")) if w in free]
        if pair[k] < 0 and parts:
            pair[k] = free.pop(parts[0])
    return pair


def make_split(args):
    """--make-split, Sec. 4.1: 5 images of each class, 20 % of classes with fewer than 25, none of those
    with fewer than 5; COCO's format without boxes."""
    if not Path(args.make_split).parent.is_dir():
        raise UserError(f"--make-split {args.make_split}: its folder does not exist")
    index = ImageIndex(args.cls_dir, read_class_list(args))
    generator, images, kept = torch.Generator().manual_seed(args.seed), [], []
    for k, wnid in enumerate(index.classes):
        first, count = int(index.first[k]), int(index.first[k + 1] - index.first[k])
        if count >= 5:
            kept.append(wnid)
            wanted = 5 if count >= 25 else count // 5
            for i in torch.randperm(count, generator=generator).tolist():
                try:
                    width, height = index.read(first + i).size
                except UserError:  # the next one then
                    continue
                images.append(dict(id=len(images) + 1, file_name=index.name(first + i), width=width,
                                   height=height, category_id=len(kept)))
                wanted -= 1
                if not wanted:
                    break
    categories = [dict(id=k + 1, name=n) for k, n in enumerate(kept)]
    write_whole(args.make_split, json.dumps(dict(images=images, annotations=[], categories=categories)))
    print(f"{len(images):,} images of {len(kept):,} classes, seed {args.seed} -> {args.make_split}; "
          "annotations (image_id, category_id, bbox) are still to be made")


# ================================================================== data: images

class ClassificationTransform:
    """Stage I's augmentation of a PIL image -> (3, S, S) uint8: random crop and flip; weak: colours;
    strong: RandAugment and random erasing.

    Swin's RandAugment is magnitude 9 of 10 with noise; torchvision counts to 30 and has no noise: 27.

    train False: short side S * 8/7, centre crop; plain: the whole image, its objects may stand at the
    border. The randomness of torchvision's transforms comes from the sample's own seed.
    """

    def __init__(self, size, augment, train, crop=0.08):
        self.size, self.erase = size, 0.25 if augment == "strong" and train else 0.0
        mode = T.InterpolationMode.BICUBIC if augment == "strong" else T.InterpolationMode.BILINEAR
        if train:
            steps = [T.RandomResizedCrop(size, (crop, 1.0), interpolation=mode), T.RandomHorizontalFlip()]
            if augment == "weak":
                steps.append(T.ColorJitter(0.4, 0.4, 0.4))
            if augment == "strong":
                steps.append(T.RandAugment(2, 27, interpolation=mode))
        elif augment == "plain":
            steps = [T.Resize((size, size))]
        else:
            steps = [T.Resize(round(size * 8 / 7), interpolation=mode), T.CenterCrop(size)]
        self.steps = T.Compose([*steps, T.PILToTensor()])
        self.eraser = T.RandomErasing(1.0, value="random")

    def __call__(self, image, rng):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.getrandbits(62))
            image = self.steps(image)
            if rng.random() < self.erase:  # noise of the images' own mean and deviation
                mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
                std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
                image = (self.eraser((image / 255 - mean) / std) * std + mean) * 255
                image = image.round().clamp(0, 255).byte()
        return image, (self.size, self.size)


class DetectionTransform:
    """Stage II's weak augmentation of a classification image: large-scale jitter and flip, as for
    detection images."""

    def __init__(self, canvas, jitter):
        self.canvas, self.jitter = canvas, jitter

    def __call__(self, image, rng):
        return jitter_image(image, self.canvas, rng.uniform(*self.jitter), rng)


class ClassImages(LabelledImages):
    """Labelled images on a canvas. labels: the model's of each class of the index. both: classes with
    boxes, too."""

    def __init__(self, index, transform, canvas, labels=(), both=0):
        super().__init__(index, transform)
        self.canvas, self.labels, self.both = canvas, list(labels), both

    def report(self):
        """A line for the start of a run."""
        index = self.index
        text = f"{index.root}: {len(index):,} images, {len(index.classes):,} classes"
        if self.both:
            text += f", {self.both:,} in both"
        if getattr(index, "dropped", 0):
            text += f" | {index.dropped:,} images of the benchmark left out"
        if index.empty:
            more = " ..." if len(index.empty) > 5 else ""
            text += f" | no image of {', '.join(index.empty[:5])}{more}: {len(index.empty)} classes left out"
        return text


class Benchmark(LocalisationImages):
    """A localisation set, with what a page of samples needs to show it."""

    def __init__(self, folder, content, canvas, where, quiet):
        super().__init__(folder, content, canvas, where, quiet)
        self.where = where
        self.classes, self.category_ids = ([c[k] for c in self.truth["categories"]] for k in ("name", "id"))
        self.items = []
        for i in [i for i in self.info if ".tar/" not in i["file_name"]][:6]:
            boxes = np.array(self.boxes[i["id"]], np.float32).reshape(-1, 4)
            labels = np.full(len(boxes), self.category_ids.index(i["category_id"]))
            self.items.append((i["id"], i["file_name"], i["height"], i["width"], boxes, labels))

    def report(self):
        boxes = len(self.truth["annotations"])
        return (f"{self.where}: {boxes:,} boxes, {len(self):,} images, {len(self.classes):,} classes; they "
                "choose nothing: results are of last.pt")


def make_data(args, quiet=False, before=None):
    """(arch of the model, detection images or None, classification images or None) to train on. before:
    see make_vocabulary."""
    words, index, records = make_vocabulary(args, quiet, before or arch_before(args))
    stage = args.stage
    if stage == 1:
        words |= dict(det=[], pair=[-1] * len(words["cls"]))
    arch = dict(words, name=args.backbone, kind=f"stage{stage}", stage=stage, head=args.head,
                gap=stage == 1 and args.stage1_head == "gap", masks=stage == 2 and args.masks,
                setup=args.setup, image_size=args.image_size, stage1_size=args.stage1_size,
                augment=args.augment, level=args.stage1_level)
    if resuming(args):
        theirs = read_model_file(Path(args.out) / "last.pt", "--resume")[0]
        if (theirs["cls"], theirs["det"]) != (arch["cls"], arch["det"]):
            raise UserError(f"--resume {args.out}: was trained on other classes than the data have now")
    both = sum(p >= 0 for p in arch["pair"])
    if stage == 2 and args.setup == "own" and arch["cls"] and not both and not quiet:
        print("warning: no class is in both vocabularies, by name; Eq. 5 never applies. --overlap maps them",
              flush=True)
    data = detection_data(args, arch, records) if stage == 2 else None
    if stage == 1:
        transform = ClassificationTransform(args.stage1_size, args.augment, True, args.crop)
        images = ClassImages(index, transform, args.stage1_size)
    else:
        transform = DetectionTransform(args.cls_size, args.cls_jitter)
        images = ClassImages(index, transform, args.cls_size, both=both) if args.cls_ratio else None
    return arch, data, images


def detection_data(args, arch, records):
    """CocoDataset of the classes arch["det"] under large-scale jitter. Images without a box of these
    are left out: LVIS's may be full of unlabelled ones."""
    if args.masks:
        need_outlines(records)
    # not the novel classes: they have no boxes in this paper
    unused = set(records.classes) - set(arch["det"]) - set(arch["cls_names"])
    data = CocoDataset(args.train_images, records, True, classes=arch["det"], canvas=args.image_size,
                       jitter=args.jitter, masks=args.masks, hidden=unused if args.extra_as_fg else (),
                       keep_empty=args.keep_empty)
    data.repeats = repeat_fractions(data, args.rfs) if args.rfs else None
    return data


def need_outlines(records):
    if len(records.outline) and not records.outline.any():
        raise UserError(f"{records.path}: annotations lack segmentation; --no-masks goes on with boxes")


def make_val(args, arch, quiet=False):
    """What the stage is evaluated on: ClassImages, CocoDataset (`lvis`: by LVIS's rules), Benchmark, or
    None."""
    if arch["stage"] == 1:
        return accuracy_data(args, arch, quiet)
    if args.val_boxes:
        need(args.val_images, "--val-images", "ImageNet's validation images")
        need(args.val_boxes, "--val-boxes", "ILSVRC's XML boxes of these, https://image-net.org")
        content = read_ilsvrc(args.val_images, args.val_boxes, quiet)
        return benchmark(args, arch, content, args.val_boxes, quiet)
    if args.val_json is None and args.train_json:
        return None
    what = "boxes to evaluate on"
    if args.setup == "s3":
        what = "the benchmark was never published; --make-split draws one, in the format that README.md tells"
    need(args.val_json, "--val-json", what)
    need(args.val_images, "--val-images", "images to evaluate on")
    if is_localisation(args.val_json):
        return benchmark(args, arch, read_json(args.val_json), args.val_json, quiet)
    return boxes_data(args, arch, quiet)


def benchmark(args, arch, content, where, quiet):
    data = Benchmark(args.val_images, content, args.image_size, where, quiet)
    if not data.truth["annotations"]:
        raise UserError(f"{where}: no image has a box")
    strange = sorted(set(data.names) - set(arch["cls"]))
    if strange:
        more = f" and {len(strange) - 1} more are" if len(strange) > 1 else " is"
        raise UserError(f"{where}: class {strange[0]}{more} not among the classification classes of the "
                        "model")
    return data


def boxes_data(args, arch, quiet):
    """A COCO or LVIS set, with all that its evaluation will ask for."""
    records, masks = read_annotations(args.val_json, args.val_images), arch["masks"] and args.masks
    lists = [records.lvis_lists(i) for i in range(len(records))]
    if any("category_id" in x for x in lists):
        raise UserError(f"{args.val_json}: some images have a category_id, the first has not; a localisation "
                        "set has one for each")
    names = Counter(plain(n) for n in records.classes)
    twice = [n for n, count in names.items() if count > 1]
    if twice:
        raise UserError(f"{args.val_json}: two classes are called {twice[0]}, but for capitals and "
                        "underscores")
    known = Vocabulary(arch, "cpu").of(dict(categories=records.categories))
    if not known:
        raise UserError(f"{args.val_json}: none of its classes is known to the model, by name")
    unknown = [n for n in names if n not in known]
    if unknown and not quiet:
        print(f"{args.val_json}: {len(unknown):,} of its {len(names):,} classes are not known to the model "
              f"and are not scored, first {unknown[0]}", flush=True)
    lvis = any(lists) or any("frequency" in c for c in records.categories)
    if lvis:
        require_lvis(records)
        try:
            import_lvis()
        except RuntimeError as e:
            raise UserError(str(e)) from None
    if masks:
        need_outlines(records)
    data = CocoDataset(args.val_images, records, False, canvas=args.image_size, masks=masks)
    data.lvis = lvis
    return data


def accuracy_data(args, arch, quiet):
    """Stage I's validation images, or None without --cls-val."""
    if args.cls_val in (None, "none"):
        return None
    need(args.cls_val, "--cls-val", "a folder with a folder of images for each class")
    held = {e.name.removesuffix(".tar") for e in Path(args.cls_val).iterdir()}
    known = [w for w in arch["cls"] if w in held]
    if not known:  # ImageNet's archive is flat; its labels are in the XML
        if not quiet:
            print(f"--cls-val {args.cls_val}: holds no folder of a class of the model; no accuracy",
                  flush=True)
        return None
    index, label_of = ImageIndex(args.cls_val, known, quiet), {w: k for k, w in enumerate(arch["cls"])}
    transform = ClassificationTransform(arch["stage1_size"], arch["augment"], False)
    return ClassImages(index, transform, arch["stage1_size"], [label_of[w] for w in index.classes])


class Pairs:
    """Training batches dict(det=batch, cls=batch), each kind from a stream of its own that runs on over
    the ends of its passes; a kind that the run does without is not there.

    An epoch is a pass over the detection images (stage I: over the others). set_epoch and len: as
    BatchPlan's. Each kind has --workers loader processes, and generators of its own, that do not shift
    the model's random numbers. broken: lines on files that could not be read, each told once.
    """

    def __init__(self, data, images, args, rank, world, pin):
        self.loaders, self.streams, self.broken = {}, {}, set()
        self.workers, self.pin = args.workers, pin
        batch = args.batch_size if data else args.stage1_batch
        each = float(data.repeats.sum()) if data and data.repeats is not None else len(data or images)
        steps = math.ceil(each / (batch * world * args.accumulate)) * args.accumulate
        if data:
            stream = Stream(len(data), batch, rank, world, args.seed, data.repeats, steps)
            self.add("det", data, stream, partial(collate, divisor=data.canvas))
        if images:
            batch, seed = (batch * args.cls_ratio, args.seed + 1) if data else (batch, args.seed)
            stream = Stream(len(images), batch, rank, world, seed, None, steps)
            self.add("cls", images, stream, partial(collate_labelled, canvas=images.canvas))

    def add(self, kind, dataset, stream, collate_fn):
        self.streams[kind] = stream
        self.loaders[kind] = DataLoader(
            dataset, batch_sampler=stream, num_workers=self.workers, collate_fn=collate_fn,
            pin_memory=self.pin, worker_init_fn=start_worker, persistent_workers=self.workers > 0,
            generator=torch.Generator())

    def set_epoch(self, epoch, start=0):
        for stream in self.streams.values():
            stream.set_epoch(epoch, start)

    def __len__(self):
        return len(next(iter(self.streams.values())))

    def __iter__(self):
        for parts in zip(*self.loaders.values()):
            batch = dict(zip(self.loaders, parts))
            for text in sorted(set(batch["cls"]["bad"]) - self.broken) if "cls" in batch else ():
                self.broken.add(text)
                print(f"replaced by another image of its class ({len(self.broken)} so far): {text}",
                      file=sys.stderr, flush=True)
            yield batch


def to_device(batch, device):
    """The batch, or each of a pair, on the device, with what the host must know of it: number of
    objects and size of each image."""
    if "images" not in batch:
        return {kind: to_device(part, device) for kind, part in batch.items()}
    host = dict(image_sizes=[tuple(s) for s in batch["sizes"].tolist()])
    if "boxes" in batch:
        host["counts"] = (batch["labels"] >= 0).sum(1).tolist()
    if "hidden" in batch:
        host["hidden_counts"] = (batch["hidden"][..., 2] > batch["hidden"][..., 0]).sum(1).tolist()
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()} | host


# ================================================================== train

LEGEND = dict(
    rpn_fg="RPN: object or not", rpn_box="RPN: boxes of objects",
    fg="Eqs. 1, 4: -log S_fg of objects, -log(1 - S_fg) of background", cat="Eqs. 2, 4: -log S_c of objects",
    box="smooth L1 of the boxes, of any class", mask="cross-entropy of the masks, of any class",
    cls="Eqs. 3, 4: -log S^_c of images, in stage II times --cls-weight",
    top1="percent of a step's images that g^ names right; no loss")


class Recipe(NamedTuple):
    """How a stage learns. lr: of paper_batch images. clip: largest norm of the gradient."""
    epochs: int
    batch: int
    lr: float
    paper_batch: int
    sgd: bool
    weight_decay: float
    clip: float


def recipe_of(args):
    if args.stage == 2:
        return Recipe(args.epochs, args.batch_size, args.lr, 16, False, args.weight_decay, 1.0)
    first = args.stage1_epochs, args.stage1_batch, args.stage1_lr
    if args.backbone == "r50":
        return Recipe(*first, 256, True, 1e-4, math.inf)
    return Recipe(*first, 1024 if args.backbone in SWIN else 64, False, 0.05, 5.0)


def freeze_idle(model, args):
    """Stage I: what the whole-image RoI's level does not reach gets no gradient, and must not decay (or
    stop DDP): it does not learn."""
    used = set(range(4))
    if model.arch["gap"]:
        used = {3}
    elif args.stage1_level == "canonical":
        used = set(model.whole_levels([(args.stage1_size, args.stage1_size)]))
        for i in range(4):
            model.fpn.inner_blocks[i].requires_grad_(i >= min(used))
            model.fpn.layer_blocks[i].requires_grad_(i in used)
    for i, norm in enumerate(model.body.norms or ()):
        norm.requires_grad_(i >= min(used))


def freeze_norms(body):
    """BatchNorm keeps its running statistics, weights and biases."""
    body.fixed_norms = True
    for m in body.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(False)


def make_model(args, arch, rank):
    """The Detector of the flags, as the stage begins with it: what shall not learn is frozen."""
    drop = args.drop_path  # not filled in by resolve: a run of both stages has two values
    if drop is None:
        drop = SWIN[args.backbone][2 + args.stage] if args.backbone in SWIN else 0.0
        if args.backbone in SWIN and args.stage == 1 and args.setup == "s3":
            drop = 0.2
    seed_all(args.seed)
    model = Detector(arch, drop)
    if args.init == "imagenet" and not resuming(args):
        load_imagenet(model.body, args.backbone)
    elif args.init not in (None, "none") and not resuming(args):
        load_init(model, args, rank)
    if args.stage == 1:
        freeze_idle(model, args)
    elif arch["cls"]:
        model.cls.requires_grad_(args.cls_ratio > 0)
    if args.stage == 2 and args.bn == "frozen":
        freeze_norms(model.body)
    model.body.recompute = args.checkpoint
    return model


def parameter_groups(model, decay):
    """Weights decay; norms, biases and Swin's position biases do not."""
    weights, free = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (free if p.ndim < 2 or "relative_position_bias_table" in name else weights).append(p)
    return [dict(params=weights, weight_decay=decay), dict(params=free, weight_decay=0.0)]


def make_optimizer(model, recipe, lr):
    """SGD with momentum 0.9, or AdamW."""
    groups = [g | dict(base_lr=lr) for g in parameter_groups(model, recipe.weight_decay)]
    if recipe.sgd:
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, **fused())
    return torch.optim.AdamW(groups, lr=lr, **fused())


def learnt(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def cosine(it, total, warmup, least=0.0):
    """Learning-rate factor of stage I: linear warm-up, then half a cosine to `least`."""
    if it < warmup:
        return (it + 1) / warmup
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (it - warmup) / max(1, total - warmup)))


def rate_factor(args, it, steps):
    """Learning-rate factor of iteration `it`, `steps` an epoch."""
    if args.stage == 2:
        milestones = (args.epochs * 3 / 4, args.epochs * 11 / 12)
        return warmup_multistep(it, steps, milestones, max(2, min(1000, args.epochs * steps // 10)))
    swin, full = args.backbone in SWIN, args.stage1_epochs * steps
    warmup = max(1, min(full // 10, steps * (20 if swin and args.setup != "s3" else 5)))
    return cosine(it, full, warmup, 0.01 if swin else 0.0)


def prepare(args, student, rank, world, device):
    """The Learner, its Detector on its device, described, compiled. From here on each process draws random
    numbers of its own."""
    student.to(device)
    fast_layout(student, device)
    pixels = args.stage1_size if args.stage == 1 else args.image_size
    example = torch.zeros(1, 3, pixels, pixels)
    describe_model(f"stage {'I' * args.stage} {args.backbone}", student, example, rank=rank)
    if world > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(student)
    if args.compile:
        student.body.compile()
    distiller = Learner(student, args).train()
    seed_all(args.seed + 1000 * rank)
    return distiller


def reported(args, val, epochs):
    """How a Run counts and what it reports. A localisation set is the benchmark itself: it must not
    choose the weights."""
    metric = "mask AP" if args.masks else "AP"
    if args.stage == 1 or isinstance(val, Benchmark):
        metric = "top-1"
    return dict(epochs=epochs, metric=metric, report="last" if isinstance(val, Benchmark) else "best",
                every=epochs if args.data == "shapes" else None, table=class_table)


def train(args, rank, world, device):
    """Train under args; returns the last evaluation's metrics (rank 0) or None."""
    arch, data, images = make_data(args, rank > 0)
    val = make_val(args, arch, rank > 0)
    open_run(args, rank, args.resume)
    student = make_model(args, arch, rank)
    distiller = prepare(args, student, rank, world, device)  # in this script it learns from labels alone
    model = wrap_ddp(distiller, device, world)
    loader = plan = Pairs(data, images, args, rank, world, device.type == "cuda")
    recipe = recipe_of(args)
    total_batch = recipe.batch * world * args.accumulate
    paper_batch = recipe.paper_batch
    lr = recipe.lr * total_batch / paper_batch
    optimizer = make_optimizer(student, recipe, lr)
    run = Run(args, student, optimizer, plain_of(student), len(plan), total_batch, rank, world, device,
              legend=LEGEND, **reported(args, val, recipe.epochs))
    run.describe(f"from {args.init or 'none'}", lr, recipe.lr, paper_batch, *filter(None, (data, images)), val)
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
                (sum(terms.values()) / len(batches)).backward()
                losses = {k: losses.get(k, 0) + v.detach() / len(batches) for k, v in terms.items()}
            nn.utils.clip_grad_norm_(learnt(optimizer), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step(losses, lr * factor, student.watch)
        run.end_epoch()
    return run.close()


def of_stage(args, stage, out, **more):
    """The flags of one stage, in a folder of its own."""
    out = Path(out)
    resume = args.resume and (out / "last.pt").exists()
    more = dict(stage=stage, out=str(out), table=False, resume=resume) | more
    return argparse.Namespace(**vars(args) | more)


def train_both(args, rank, world, device):
    """Stage I and II one after the other in OUT/stage1 and OUT/stage2. Metrics of the second, on rank
    0. What stage II needs is looked at before stage I begins."""
    out = Path(args.out)
    first = resolve(of_stage(args, 1, out / "stage1", init=None))
    parts = dict(backbone=first.backbone, head=first.head)  # not from --init: that file is still to come
    second = resolve(of_stage(args, 2, out / "stage2", init=str(out / "stage1" / "best.pt"), **parts))
    if not args.resume:
        if rank == 0 and holds_run(second.out):
            raise UserError(f"--out {out}: holds a run already; choose another folder, --resume it, or "
                            "delete it")
        before = make_data(first, quiet=True)[0]
        arch = make_data(second, True, before)[0]
        make_val(second, arch, quiet=True)
    train(first, rank, world, device)
    return train(second, rank, world, device)


# ================================================================== evaluate, predict

def evaluate(model, val, rank, world, device, args):
    """(metrics, detections or None) on rank 0, (None, None) elsewhere or without a validation set.
    metrics: `score`, what best.pt goes by, `line`, `images`, `seconds`, and what was measured."""
    if val is None:
        return None, None
    since = time.time()
    model.eval()
    kinds = {ClassImages: evaluate_accuracy, Benchmark: evaluate_localisation, CocoDataset: evaluate_boxes}
    metrics, detections = kinds[type(val)](model, val, rank, world, device, args)
    if rank == 0:
        metrics["seconds"] = time.time() - since
        metrics["line"] += f" | {metrics['seconds']:.0f}s"
    return metrics, detections


@torch.no_grad()
def evaluate_accuracy(model, val, rank, world, device, args):
    """Stage I: top1 and top5 in percent; every image once."""
    counts = torch.zeros(3, dtype=torch.float64)
    mine = list(range(rank, len(val), world))
    batches = [[(i, 0) for i in mine[k:k + 64]] for k in range(0, len(mine), 64)]
    loader = DataLoader(val, batch_sampler=batches, num_workers=args.workers, generator=torch.Generator(),
                        worker_init_fn=start_worker, collate_fn=partial(collate_labelled, canvas=val.canvas))
    level = "canonical" if model.arch["level"] == "canonical" else "all"
    label_of = torch.tensor(val.labels, device=device)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        for line in batch["bad"]:
            print(f"left out, another of its class in its place: {line}", file=sys.stderr)
        batch = to_device(batch, device)
        logits = model.whole_image(normalise(batch), batch["image_sizes"], level, args.amp == "bf16")
        if len(logits) > len(batch["labels"]):
            logits = logits.unflatten(0, (4, -1)).log_softmax(-1).mean(0)
        hit = (logits.topk(min(5, logits.shape[1])).indices == label_of[batch["labels"]][:, None]).cpu()
        counts += torch.tensor([hit[:, 0].sum(), hit.any(1).sum(), len(hit)])
    parts = gather([counts])
    if rank != 0:
        return None, None
    one, five, n = sum(parts).tolist()
    top1, top5 = 100 * one / n, 100 * five / n
    line = f"{int(n)} images | accuracy top-1 {top1:.1f} top-5 {top5:.1f}"
    return dict(top1=top1, top5=top5, images=int(n), score=top1, line=line), None


def evaluate_boxes(model, val, rank, world, device, args):
    """AP of all, base (had boxes in training) and novel classes (image labels only) on a COCO or LVIS set."""
    masks, results = val.with_masks, []
    truth = val.truth(outlines=masks)
    vocabulary, category = Vocabulary(model.arch, device), {plain(c["name"]): c for c in truth["categories"]}
    column = vocabulary.of(truth)
    chosen = sorted(column, key=column.get)
    vocabulary.choose([column[n] for n in chosen])
    ids, names = [category[n]["id"] for n in chosen], [category[n]["name"] for n in chosen]
    most = args.max_dets or (300 if val.lvis else 100)
    loader = eval_loader(val, rank, world, args.workers)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        found = detect(model, batch, device, args, vocabulary, most)
        rows = to_coco_results(batch["image_ids"][0], found["boxes"], found["scores"], found["labels"], ids)
        results += [r | dict(segmentation=m) for r, m in zip(rows, found["masks"])] if masks else rows
    results = gather(results)
    if rank != 0:
        return None, None
    metrics = dict(images=len(val), line=f"{len(val)} images")
    if len(ids) < len(category):
        metrics["line"] += f", {len(ids)} of {len(category)} classes"
    base, novel = ([n for n, b in zip(names, vocabulary.base) if b == side] for side in (True, False))
    for kind in ("bbox", "segm")[:1 + masks]:
        prefix = "mask_" * (kind == "segm")
        stats = lvis_evaluate(truth, results, kind, ids) if val.lvis else coco_evaluate(truth, results, kind)
        numbers = {}
        for name, group in (("AP", base + novel), ("base_AP", base), ("novel_AP", novel)):
            numbers[name] = class_mean(stats, group, "AP")
            numbers[f"{name}50"] = class_mean(stats, group, "AP50")
        numbers |= {k: stats[k] for k in ("APr", "APc", "APf") if k in stats}
        metrics.update({prefix + k: v for k, v in numbers.items()})
        shown = " ".join(f"{k} {v:.1f}" for k, v in numbers.items())
        metrics["line"] += f" | {'masks' if prefix else 'boxes'} {shown}"
        metrics["classes"] = {n: m for n, m in stats["classes"].items() if n in {*base, *novel}}
    metrics["score"] = metrics["mask_AP" if masks else "AP"]
    return metrics, results


def evaluate_localisation(model, val, rank, world, device, args):
    """Setups 2 and 3: localisation accuracy (Sec. 4.3) and AP50 over all classes (Sec. 4.4) by g^
    alone, or by Eq. 5 for classes that --overlap (own data: a name) maps. Per-class AP in results.json."""
    rows, found = [], []
    vocabulary = Vocabulary(model.arch, device, only_cls=True)
    column = {w: k for k, w in enumerate(model.arch["cls"])}
    loader = eval_loader(val, rank, world, args.workers)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        i = batch["image_ids"][0]
        if len(val.boxes[val.info[i]["id"]]) == 0:
            continue  # the benchmark's image is not annotated
        d = detect(model, batch, device, args, vocabulary, best=True)
        rows.append(localise(d["best"], d["best_boxes"], d["labels"], d["boxes"], column[val.names[i]],
                             batch["boxes"][0], batch["original_sizes"][0]))
        boxes = d["boxes"].cpu()
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], d["scores"].cpu()[:, None]], 1)
        found.append((i, xywh.numpy(), d["labels"].cpu().numpy()))
    rows, found = gather(rows), gather(found)
    if rank != 0:
        return None, None
    metrics = {k: 100 * sum(r[k] for r in rows) / len(rows) for k in rows[0]} | dict(images=len(rows))
    id_of = dict(zip(val.classes, val.category_ids))
    # -1: classes without a validation image are nobody's false positives
    ids = np.array([id_of.get(w, -1) for w in model.arch["cls"]])
    place = np.concatenate([np.full(len(x), i) for i, x, _ in found])
    box, label = np.concatenate([x for _, x, _ in found]), np.concatenate([k for *_, k in found])
    image = np.array([i["id"] for i in val.info])[place]
    for name, federated in (("AP50", False), ("AP50_federated", True)):
        per_class = sparse_ap(val.truth, (image, ids[label], box[:, 4], box[:, :4]), federated)
        metrics[name] = sum(per_class.values()) / len(per_class)
        metrics[name + "_classes"] = {n: per_class[c] for n, c in id_of.items() if c in per_class}
    metrics["score"] = metrics["top1"]
    shown = " ".join(f"{k} {metrics[k]:.1f}" for k in rows[0])
    metrics["line"] = (f"{len(rows)} images | localisation {shown} | AP50 {metrics['AP50']:.1f} "
                       f"federated {metrics['AP50_federated']:.1f}")
    results = []  # without 10 million boxes of score 1e-4, which are of no use in a text file
    for k in np.flatnonzero(box[:, 4] > 0.05).tolist():
        i, (*xywh, score) = val.info[place[k]], box[k].tolist()
        category = id_of.get(model.arch["cls"][label[k]])
        results.append(dict(image_id=i["id"], file_name=i["file_name"], category_id=category, bbox=xywh,
                            score=score))
    return metrics, results


def evaluate_file(args, rank, world, device):
    """--eval: metrics of a checkpoint of either stage, into --out."""
    from common.pictures import write_results
    model = load_model(args.eval, "--eval")
    args = resolve(args, model.arch)
    val = make_val(args, model.arch, rank > 0)
    if val is None:
        raise UserError(f"--eval {args.eval}: is a classifier of stage I; its accuracy needs --cls-val, a "
                        "folder with a folder of images for each class (--data shapes needs nothing)")
    metrics, results = evaluate(model.to(device), val, rank, world, device, args)
    if rank == 0:
        write_results(args.out, metrics, results, val, args.eval, None, None)
        print((class_table(metrics) + "\n" if "classes" in metrics else "") + metrics["line"])


def wanted_classes(values):
    """One value is split at commas, or is a file with one name a line; several values are one name each."""
    names = values
    if len(values) == 1 and Path(values[0]).is_file():
        names = [line for line in read_lines(values[0], "--classes") if line.strip()]
    elif len(values) == 1:
        names = values[0].split(",")
    names = [n.strip() for n in names]
    if not names or not all(names):
        raise UserError(f"--classes {' '.join(values)}: holds an empty name")
    return names


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file; masks as RLE) and one picture per
    image into --out."""
    from common.pictures import Pictures
    model = load_model(args.weights, "--weights").to(device)
    if model.arch["stage"] == 1:
        raise UserError(f"--weights {args.weights}: is a classifier of stage I, which finds no boxes; train "
                        "stage II from it")
    args = resolve(args, model.arch)
    if args.names:
        model.arch["cls_names"] = class_names(args, model.arch["cls"])
    vocabulary = Vocabulary(model.arch, device)
    if args.classes:
        vocabulary.choose(vocabulary.find(wanted_classes(args.classes)))
    for picture in Pictures(args.predict, args.out, args.score):
        image, size = jitter_image(picture.pixels, args.image_size, 1.0, random.Random(0), 0.0)
        item = dict(image=image, size=size, boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0,
                    original_size=tuple(picture.pixels.shape[1:]))
        found = detect(model, collate([item], args.image_size), device, args, vocabulary)
        picture.save(found["boxes"], found["scores"], found["labels"], vocabulary.names, found["masks"])


# ================================================================== the embedded dataset: three runs

def shapes_table(args, rank, world, device):
    """Both stages, and stage II with boxes only, in one table. Six classes of the embedded dataset have
    no boxes in training, only image labels."""
    since, rows, out = time.time(), [], Path(args.out)
    init = str(out / "stage_I" / "best.pt")
    runs = {"stage I": dict(stage=1, init=None), "boxes only": dict(stage=2, init=init, cls_ratio=0),
            "simple21k": dict(stage=2, init=init)}
    for name, more in runs.items():
        flags = of_stage(args, out=out / name.replace(" ", "_"), **more)
        rows.append((name, train(resolve(flags), rank, world, device), time.time() - since))
        since = time.time()
    if rank == 0:
        print("\nshapes                base AP  AP50  novel AP  AP50  accuracy   seconds")
        for name, m, seconds in rows:
            if name == "stage I":
                cells = f"{m['top1']:42.1f}"
            else:
                cells = f"{m['base_AP']:8.1f} {m['base_AP50']:5.1f} "
                cells += f"{m['novel_AP']:9.1f} {m['novel_AP50']:5.1f}"
            print(f"{name:20s} {cells:42s} {seconds:9.0f}")
        print("base: boxes in training; novel: image labels only. Eq. 5 mixes a third of g^ into base\n"
              "scores, also of one that was not trained on: compare the novel columns")


# ================================================================== flags

SETUPS = dict(s1="LVIS-997 base + IN-997, masks", s2="COCO + ImageNet-1K", s3="Objects365 + ImageNet-21K",
              lvis="fine-tuning on LVIS, 1,203 classes",
              own="--train-json ... or a folder in the layout of COCO with imagenet/train beside it")
EXAMPLES = """
torchrun --nproc_per_node 8 simple21k.py --setup s2 --out runs/s2      # COCO + ImageNet-1K, both stages
python simple21k.py --data shapes                                      # everything in minutes on a CPU
python simple21k.py --predict photo.jpg --weights runs/s2/stage2/best.pt
"""
STAGE1 = "stage1_epochs stage1_batch stage1_lr stage1_size crop augment stage1_head stage1_level cls_val"
STAGE2 = """image_size keep_empty masks bn reinit_cls cls_ratio cls_weight cls_size jitter cls_jitter
    fg_grad_on_cls extra_as_fg fuse score_thresh max_dets nms_topk epochs batch_size lr weight_decay rfs"""
LABELLED = ("s1", "s2", "s3", "own", None)  # setups with classification images
COMPLETE = ("s2", "s3", "own", None)  # setups whose images without boxes are negatives: LVIS's need not be
IMAGES2 = "cls_weight cls_size cls_jitter fg_grad_on_cls"  # of classification images in stage II
PATHS = "train_json train_images cls_dir cls_val val_json val_images val_boxes".split()
# flags, the flag that gives them an effect, its values
BELONGS = (
    (STAGE1, "stage", (1, None)),
    (STAGE2, "stage", (2, None)),
    ("stage1_level head", "stage1_head", ("roi",)),
    ("wordnet extra_as_fg", "setup", ("s1",)),
    ("names", "setup", ("s2", "s3", "own", None)),  # s1: LVIS's own
    ("keep_empty", "setup", COMPLETE),
    (f"{STAGE1} {IMAGES2} cls_dir cls_list overlap cls_ratio reinit_cls fuse", "setup", LABELLED),
    ("data_seed table", "data", ("shapes",)))


def side(text):
    """argparse type: pixels of a square canvas."""
    value = number(int, 32, 2**15)(text)
    if value % 32:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of 32")
    return value


def scales(text):
    """argparse type: "0.1,2.0" -> (0.1, 2.0)."""
    if re.fullmatch(r"\d+\.?\d*,\d+\.?\d*", text):
        low, high = (float(v) for v in text.split(","))
        if 0 < low <= high < math.inf:
            return low, high
    raise argparse.ArgumentTypeError(f"{text}: expected two scales as 0.1,2.0")


def parse_args(argv=None):
    p = parser(__doc__, EXAMPLES)
    g = p.add_argument_group("data")
    setups = "; ".join(f"{k}: {v}" for k, v in SETUPS.items())
    g.add_argument("--setup", choices=tuple(SETUPS), help=f"{setups} (default s2; shapes, --train-json: own)")
    g.add_argument("--data", default="data", help="root of coco/, lvis/, objects365/, imagenet/, "
                   "imagenet21k/; or 'shapes': the embedded dataset")
    g.add_argument("--data-seed", type=number(int, 0, 2**31), default=0, help="of the embedded dataset")
    g.add_argument("--cls-dir", metavar="DIR", help="a folder or .tar of images for each class "
                   "(default: the setup's)")
    g.add_argument("--cls-list", metavar="FILE", help="keep only these classes of it: first word of "
                   "each line")
    g.add_argument("--cls-val", metavar="DIR", help="folder of the same kind for stage I's accuracy; "
                   "none (default: the setup's, if it is there and --cls-dir not given)")
    g.add_argument("--val-boxes", metavar="DIR", help="instead of --val-json: folder of ILSVRC XML. "
                   "(--val-json may be a localisation set, too: images with category_id)")
    g.add_argument("--names", metavar="FILE", help="names of the wnids: wnid, tab, name (default: "
                   "classes.json in or beside --cls-dir, else the wnids)")
    g.add_argument("--wordnet", metavar="FILE", help="WordNet 3.0's index.noun: which LVIS class is "
                   "which wnid (setup s1)")
    g.add_argument("--overlap", metavar="FILE", help="json {detection class: wnid} of classes that "
                   "both vocabularies hold (default: s1 WordNet, own by name)")
    g.add_argument("--make-split", metavar="FILE", help="write a localisation set of --cls-dir, 5 "
                   "images of a class, to be annotated (Sec. 4.1), and stop")
    g = p.add_argument_group("model")
    g.add_argument("--backbone", help="r50, swin_t, swin_s, swin_b or tiny8 ... tiny64 (default r50, "
                   "shapes tiny16; stage II: as --init)")
    g.add_argument("--head", choices=CHOICES["head"], help="shared RoI head (default 2fc; stage "
                   "II: as --init)")
    g.add_argument("--masks", action=argparse.BooleanOptionalAction, help="class-agnostic mask head, "
                   "Mask R-CNN (default: setup s1)")
    g.add_argument("--bn", choices=("frozen", "sync"), help="BatchNorm in stage II: running "
                   "statistics, or the batch's, on GPUs that of all processes (default frozen; --init "
                   "none: sync)")
    g.add_argument("--drop-path", type=number(float, 0, 1, below=True), help="stochastic depth of "
                   "Swin (default 0.2, 0.3, 0.5 for T, S, B, s3 0.2; stage II 0.2, 0.2, 0.3)")
    g = p.add_argument_group("method")
    g.add_argument("--stage", type=int, choices=CHOICES["stage"], help="1: the classifier; 2: the detector, "
                   "from --init (default: both, in OUT/stage1 and OUT/stage2)")
    g.add_argument("--init", help="stage II: a checkpoint of stage I, imagenet or none (random: the "
                   "row '-stage I'); stage I: imagenet or none (default none)")
    g.add_argument("--reinit-cls", action="store_true", help="stage II: the classifier of stage I is "
                   "not loaded")
    g.add_argument("--stage1-head", choices=("roi", "gap"), default="roi",
                   help="the detector's head on a whole-image RoI, or average pooling and one linear "
                   "layer ('-reform')")
    g.add_argument("--stage1-level", choices=CHOICES["level"], default="canonical",
                   help="FPN level of the whole-image RoI in stage I")
    g.add_argument("--cls-ratio", type=number(int, 0, 2**15), default=3, help="classification images "
                   "for each detection image; 0: boxes only")
    g.add_argument("--cls-weight", type=number(), help="weight of the classification loss, searched "
                   "in 0.01, 0.1, 1 (default 0.1; tiny 1)")
    g.add_argument("--cls-size", type=side, help="stage II: canvas of the classification images "
                   "(default: --image-size; tiny half of it)")
    g.add_argument("--jitter", type=scales, help="large-scale jitter: smallest and largest scale "
                   "(default 0.1,2.0; tiny 0.7,1.6)")
    g.add_argument("--cls-jitter", type=scales, help="that of the classification images; 1,1: none "
                   "(default: as --jitter; tiny 0.2,1.0)")
    g.add_argument("--fg-grad-on-cls", action="store_true", help="the foreground score learns from "
                   "classification images, too (not the paper: should hurt)")
    g.add_argument("--extra-as-fg", action="store_true", help="setup s1: boxes of LVIS classes "
                   "outside the 997 train foreground and boxes")
    g.add_argument("--fuse", type=number(float, 0, 1), default=2 / 3, help="Eq. 5: share of the "
                   "detection classifier where both know a class; 0, 1: one of them alone")
    g = p.add_argument_group("inference")
    g.add_argument("--score-thresh", type=number(float, 0, 1), default=1e-4,
                   help="boxes below this score are dropped")
    g.add_argument("--max-dets", type=COUNT, help="boxes of an image (default 100; evaluation on LVIS 300)")
    g.add_argument("--nms-topk", type=COUNT, default=5000, help="candidates that enter NMS; doubled "
                   "until enough survive, so the result does not depend on it")
    g.add_argument("--classes", action="append", metavar="NAMES", help="--predict: only these names or "
                   "wnids: with commas between them, or the flag for each, or a file with one a line")
    g = p.add_argument_group("schedule")
    g.add_argument("--stage1-epochs", type=COUNT, help="(default r50 100, Swin 300, with ImageNet-21K "
                   "100; tiny 15)")
    g.add_argument("--stage1-batch", type=COUNT, help="images per process and step (default r50 32, "
                   "Swin 128; tiny 64)")
    g.add_argument("--stage1-lr", type=POSITIVE, help="for 256 images (r50, SGD, 0.1), 1,024 (Swin, "
                   "AdamW, 1e-3, s3 2.5e-4) or 64 (tiny, AdamW, 1e-3), scaled linearly")
    g.add_argument("--stage1-size", type=side, help="pixels of a side (default 224; tiny 96)")
    g.add_argument("--crop", type=number(float, 0, 1, above=True), help="stage I: smallest share of "
                   "the image in a random crop (default 0.08; tiny 0.5)")
    g.add_argument("--augment", choices=CHOICES["augment"], help="stage I: plain: crop, "
                   "flip; weak: and colours; strong: crop, flip, RandAugment, Mixup, CutMix, erasing, "
                   "smoothing 0.1 (default weak; Swin strong; shapes plain)")
    g.add_argument("--epochs", type=COUNT, help="stage II, of the detection images (default 36; s3 "
                   "12; lvis 24; tiny 3)")
    g.add_argument("--batch-size", type=COUNT, help="stage II: detection images per process and step "
                   "(default 2; tiny 4)")
    g.add_argument("--lr", type=POSITIVE, help="stage II, for 16 detection images; the paper searches "
                   "3e-4, 1e-3, 3e-3 (default 3e-4; lvis 1e-4; tiny 4e-3)")
    g.add_argument("--weight-decay", type=number(), default=0.05, help="stage II")
    g.add_argument("--rfs", type=number(), help="repeat-factor sampling threshold; 0: off (default "
                   "lvis 0.001, else 0)")
    g.add_argument("--image-size", type=side, help="canvas of stage II and of evaluation: the long "
                   "side (default 1024; tiny 256)")
    g.add_argument("--checkpoint", action="store_true", help="gradient checkpointing: the backbone's "
                   "stages are computed twice and not kept")
    g.add_argument("--table", action=argparse.BooleanOptionalAction, help="shapes: both stages, and "
                   "stage II on boxes only, in one table (default without --stage, --init, "
                   "--max-iters)")
    run_flags(p, "simple21k", aliases={"train-json": "det-json", "train-images": "det-images"})
    p.set_defaults(score=0.1)  # of thousands of classes none scores high
    seen = "masks fuse score_thresh max_dets nms_topk"
    modes = dict(eval=f"data data_seed workers setup cls_val val_json val_images val_boxes {seen}",
                 predict=f"weights score names classes {seen}", make_split="data data_seed cls_dir cls_list setup seed")
    args = parse(p, argv, "simple21k", modes, only="weights score classes", belongs=BELONGS,
                 apart=("val_json val_boxes", "overlap wordnet"), saved=saved_run)
    refuse(p, args, given_flags(p, argv))
    return args


def refuse(p, args, given):
    """Stops with a line where flags contradict each other, or have no effect for a reason that no table
    tells."""
    if args.data == "shapes" and args.setup not in (None, "own"):
        p.error(f"--setup {args.setup}: --data shapes has its own")
    if args.make_split and Path(args.make_split).exists():
        p.error(f"--make-split {args.make_split}: exists; its boxes are somebody's work: choose another file")
    if args.eval or args.predict or args.make_split:
        return
    if args.setup == "lvis" and args.init is None:
        p.error("--setup lvis: fine-tunes --init, a checkpoint of stage I or II, or imagenet")
    if args.setup == "lvis" and args.stage == 1:
        p.error("--setup lvis: is stage II on boxes; stage I belongs to the other setups")
    if args.init in ("none", "imagenet") and not args.stage and args.setup != "lvis":
        p.error(f"--init {args.init}: say of which stage, --stage 1 or --stage 2")
    if args.stage == 2 and args.init is None:
        p.error("--stage 2: needs --init, a checkpoint of stage I; or imagenet, or none")
    if args.stage == 1 and args.init not in (None, "imagenet", "none"):
        p.error(f"--init {args.init}: stage I starts from imagenet or none")
    if args.reinit_cls and args.cls_ratio == 0:
        p.error("--reinit-cls: with --cls-ratio 0 the new classifier would never learn, and be part of every "
                "score")
    idle = IMAGES2.split() if args.cls_ratio == 0 else []
    for flag in idle:
        if flag in given:
            p.error(f"{dash(flag)}: has no effect with --cls-ratio 0, boxes only")
    for flag in STAGE1.split():
        if args.init and not args.stage and flag in given:
            p.error(f"{dash(flag)}: belongs to stage I; --init {args.init} is where stage II starts")
    if args.table and (args.stage or args.init):
        p.error("--table: belongs to --data shapes and runs both stages")


def saved_run(args):
    """Flags of the run in args.out, which --resume continues. A run of both stages has them in its
    folders. Paths that were the setup's are left out, and those that are given now: --data may have
    moved."""
    there = [Path(args.out) / folder / "last.pt" for folder in ("", "stage2", "stage1")]
    there = [path for path in there if path.exists()]
    if not there:
        return {}
    flags = saved_flags(there[0], "simple21k.py")
    if not {"setup", "stage1_level", *PATHS} <= set(flags):
        raise UserError(f"--resume {there[0]}: was written by an earlier version of this project; take its "
                        "weights by --init, or start anew")
    if there[0].parent != Path(args.out):
        flags.update(stage=None, init=None)
    usual = default_paths(argparse.Namespace(**flags | dict.fromkeys(PATHS)), flags["setup"])
    for name in PATHS:
        if getattr(args, name) or flags[name] == usual.get(name):
            del flags[name]
    if args.val_json:  # the one that is given replaces the other
        flags["val_boxes"] = None
    if args.val_boxes:
        flags["val_json"] = None
    return flags


def default_paths(args, setup):
    """{flag: where the setup's file lies} of the paths that are not given, but for what somebody's own
    data take the place of."""
    root = Path(args.data)
    val = "val"
    if args.data == "shapes":
        from common.shapes import make_shapes
        root, val = make_shapes(seed=args.data_seed, val=600, labelled=400), "valall"
    lvis, coco, box, imagenet = (root / name for name in ("lvis", "coco", "objects365", "imagenet"))
    paths = dict(
        lvis=dict(train_json=lvis / "annotations/lvis_v1_train.json", train_images=coco,
                  val_json=lvis / "annotations/lvis_v1_val.json", val_images=coco),
        s2=dict(train_json=coco / "annotations/instances_train2017.json", train_images=coco / "train2017",
                cls_dir=imagenet / "train", cls_val=imagenet / "val",
                val_images=imagenet / "val", val_boxes=imagenet / "val_boxes"),
        s3=dict(train_json=box / "annotations/zhiyuan_objv2_train.json", train_images=box / "train",
                cls_dir=root / "imagenet21k",
                val_json=root / "imagenet21k_benchmark.json", val_images=root / "imagenet21k"),
        own=dict(train_json=root / "annotations/instances_train2017.json", train_images=root / "train2017",
                 cls_dir=imagenet / "train", cls_val=imagenet / "val",
                 val_json=root / f"annotations/instances_{val}2017.json", val_images=root / f"{val}2017"))
    paths["s1"] = paths["lvis"] | dict(cls_dir=root / "imagenet21k")
    found, out = paths[setup], []
    if setup == "own" and args.train_json:  # somebody's own data: do not measure them on others'
        out += ["val_json", "val_images"]
    if args.cls_dir or not (imagenet / "val").is_dir():
        out.append("cls_val")
    if args.val_json or args.val_boxes:
        out += ["val_json", "val_boxes"]
    return {k: str(v) for k, v in found.items() if k not in out and getattr(args, k) is None}


def defaults(args, backbone, setup):
    """{flag: value} of what depends on the backbone and the setup."""
    if backbone.startswith("tiny"):
        first = dict(stage1_epochs=15, stage1_batch=64, stage1_lr=1e-3, stage1_size=96, augment="plain",
                     crop=0.5)
        second = dict(epochs=3, batch_size=4, lr=4e-3, image_size=256, jitter=(0.7, 1.6),
                      cls_jitter=(0.2, 1.0), cls_weight=1.0)
    else:
        first = dict(stage1_epochs=100, stage1_batch=32, stage1_lr=0.1, stage1_size=224, augment="weak",
                     crop=0.08)
        second = dict(epochs=dict(s3=12, lvis=24).get(setup, 36), batch_size=2,
                      lr=1e-4 if setup == "lvis" else 3e-4, image_size=1024, jitter=(0.1, 2.0),
                      cls_weight=0.1)
    if backbone in SWIN:
        first.update(stage1_epochs=300, stage1_batch=128, stage1_lr=1e-3, augment="strong")
        if setup == "s3":  # its recipe for ImageNet-21K: a quarter of the rate, a third of the epochs
            first.update(stage1_epochs=100, stage1_lr=2.5e-4)
    norms = dict(bn="sync" if args.init == "none" else "frozen") if backbone == "r50" else {}
    return first | second | norms | dict(masks=setup == "s1", rfs=0.001 if setup == "lvis" else 0.0)


def resolve(args, trained=None):
    """The flags of a stage, args.stage, with every default that depends on another flag; after this
    they are only read.

    trained: arch of the checkpoint of --eval or --predict, which see images as its training did.
    """
    shapes, before = args.data == "shapes", None
    backbone, head, setup = args.backbone, args.head, args.setup
    if not (trained or backbone and head):
        before = arch_before(args)
    if trained:
        backbone, head, setup = trained["name"], trained["head"], setup or trained["setup"]
    elif before:
        backbone = backbone or before["name"]
        head = head or (None if before["gap"] else before["head"])
    backbone = backbone or ("tiny16" if shapes else "r50")
    if not is_backbone(backbone):
        raise UserError(f"--backbone {backbone}: choose among r50, {', '.join(SWIN)}, tiny8 ... tiny64")
    setup = setup or ("own" if shapes or args.train_json else "s2")
    found = defaults(args, backbone, setup) | default_paths(args, setup)
    if trained:
        found.update(image_size=trained["image_size"])
    found = {k: v for k, v in found.items() if getattr(args, k) is None}
    found.update(backbone=backbone, head=head or "2fc", setup=setup)
    if trained:
        found.update(masks=trained["masks"] and args.masks is not False)
    if args.predict:
        found.update(score_thresh=max(args.score_thresh, args.score))
    if setup == "lvis":
        found.update(cls_ratio=0)
    args = argparse.Namespace(**vars(args) | found)
    small = args.image_size // 64 * 32 if backbone.startswith("tiny") else args.image_size
    found = dict(cls_size=args.cls_size or max(32, small), cls_jitter=args.cls_jitter or args.jitter)
    args = argparse.Namespace(**vars(args) | found)
    if not trained:
        check_model(args)
    return args


def check_model(args):
    """Stops where flags do not fit the backbone, before anything is read."""
    if args.drop_path is not None and args.backbone not in SWIN:
        raise UserError(f"--drop-path: belongs to {', '.join(SWIN)}; {args.backbone} has no stochastic depth")
    if args.bn is not None and args.backbone != "r50":
        raise UserError(f"--bn: belongs to r50; {args.backbone} has no BatchNorm")
    if args.init == "imagenet" and args.backbone.startswith("tiny"):
        raise UserError(f"--init imagenet: there are no ImageNet weights for {args.backbone}; use --init "
                        "none")
    learns = args.stage == 1 or args.bn == "sync"
    if args.stage == 2 and args.bn == "frozen" and args.init == "none":
        raise UserError("--bn frozen: random weights cannot learn with the statistics of a BatchNorm that "
                        "has seen nothing; --init none needs --bn sync")
    if args.checkpoint and args.backbone == "r50" and learns:
        raise UserError("--checkpoint: computes each stage twice, and a BatchNorm that learns would count "
                        "each batch twice; it is for Swin, and for --stage 2 with --bn frozen")


# ================================================================== main

def share_cores(args, device):
    """On a CPU the loaders need cores, too: without this a step takes half as long again."""
    if device.type == "cpu" and args.workers and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - args.workers))


def main():
    with started("simple21k.py") as (rank, world, device):
        args = parse_args()
        if args.eval or args.predict:
            answer_folder(args.out, rank)
        else:
            share_cores(args, device)
        if world > 1 and (args.predict or args.make_split):
            flag = "--predict" if args.predict else "--make-split"
            raise UserError(f"{flag}: runs in one process; start it with python")
        table = args.table
        if table is None:
            table = args.data == "shapes" and not (args.stage or args.init or args.max_iters)
        if args.make_split:
            make_split(resolve(args))
        elif args.eval:
            evaluate_file(args, rank, world, device)
        elif args.predict:
            predict(args, device)
        elif table:
            shapes_table(args, rank, world, device)
        elif args.stage or args.init:
            train(resolve(of_stage(args, args.stage or 2, args.out, resume=args.resume)), rank, world, device)
        else:
            train_both(args, rank, world, device)


if __name__ == "__main__":
    main()
