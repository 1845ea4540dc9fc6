# SPDX-License-Identifier: MIT
"""Simple-21K: first learn to classify, then to detect 21,000 categories (Lin et al., ECCV 2022).

Title: A Simple Approach and Benchmark for 21,000-Category Object Detection.
Idea. Boxes are costly and exist for hundreds of classes; image labels are cheap and exist for 21,841. Earlier
work carries a detector's boxes over to images with labels. Here it goes the other way round. Stage I trains a
classifier that is built as a detector: the whole image is one RoI, RoIAlign instead of average pooling, the
detector's own RoI head instead of one linear layer. Stage II trains detector and classifier together:
backbone, FPN and RoI head are shared; detection images give the losses of Faster R-CNN (Mask R-CNN),
classification images, three for each of the former, are still one RoI, the whole image. f decides whether a
RoI is an object, and learns from boxes only; g and g^, over the detection and the classification classes,
decide which. A proposal takes its name from g^ although no box of that class was ever seen.

    Eq. 1  S_fg = sigmoid(f(x))            product_score_loss; log_scores
    Eq. 2  S = softmax(g(x))               product_score_loss; log_scores: detection classes
    Eq. 3  S^ = softmax(g^(x))             mixed_cross_entropy; log_scores: classification classes
    Eq. 4  final score S_fg S_c            product_score_loss, mixed_cross_entropy; log_scores
    Eq. 5  S to the 2/3 times S^ to 1/3    log_scores: classes that both know
    Sec. 3 whole image as one RoI          Detector.whole_rois, Detector.whole_image

No code, weights or benchmark of this paper were published. Where it is silent we chose, mostly with a flag:
  1. The loss "on the final score" is the likelihood of p(class c) = S_fg S_c, p(background) = 1 - S_fg, in
     logits; both terms over the sampled RoIs. Of a classification image only S^_c learns
     (--fg-grad-on-cls: S_fg, too).
  2. Stage I pools the whole image from the FPN level that its size has in a detector, P4 at 224 px. Parts of
     the FPN that get no gradient then are frozen: decay would shrink them by e^-9 (Swin), e^-25 (ResNet).
  3. g^ is loaded into stage II (--reinit-cls: not); the RPN is new, though the introduction has it from stage
     I, which has none. A class that both know learns in g from its boxes, in g^ from its image labels. Box
     regression and masks are class-agnostic: classes without boxes have none.
  4. Stage II: AdamW, 2 detection and 6 classification images a GPU, learning rate 3e-4 for 16 detection
     images, weight 0.1 of the classification loss, 1,000 steps of warm-up, x0.1 at 3/4 and 11/12, BatchNorm
     frozen. It starts from stage I's last.pt: --init best.pt is --cls-val's choice, in s2 the test's.
  5. "-stage I": --stage 2 --init none, random weights; torchvision's, --init imagenet, are s2's "-reform".
  6. LVIS's 277 novel classes and those outside the 997 have no label: background, as what crowds cover.
  7. Eq. 5 is printed without S_fg. We read it as the S_c of Eq. 4: S_fg multiplies the mean, or shared
     classes would outrank all others on background.
  8. Table 5's detector keeps class-agnostic boxes, the product score and all of --init but the classifier.
  9. The jitter redraws a window without a box: large scales are rarer where objects lie at the border.
 10. 1,024 px a side (Sec. 4.1), not 800 x 1333 (3.2), in tests, too; NMS at IoU 0.5; AP50 counts a class's
     boxes on all images. The rest is in SETUPS, default_schedule, recipe_of and rate_factor.
Setups s1, lvis, localisation sets, novel classes report last.pt: best.pt was chosen on what is reported.

Letters: B images, R RoIs, D features of a RoI, C detection classes, K (the paper's C^) classification
classes, V classes that are scored. Boxes are xyxy pixels of the network's input.

    torchrun --nproc_per_node 8 simple21k.py --setup s2 --out runs/s2        # COCO + ImageNet-1K, both stages
    torchrun --nproc_per_node 8 simple21k.py --row t2-r50                    # a row of a table (--rows)
    torchrun --nproc_per_node 8 simple21k.py --row t5                        # fine-tuning on LVIS, after t4
    python simple21k.py --data shapes                                        # everything in minutes on a CPU
    python simple21k.py --eval runs/s2/stage2/last.pt --setup s2
    python simple21k.py --predict photo.jpg --weights runs/s2/stage2/last.pt --names words.txt
    python simple21k.py --export detector.pt2 --weights runs/s2/stage2/last.pt
Own data: --train-json a.json --train-images a/ --cls-dir folders/ --val-json b.json --val-images b/
trains both stages; see README.md.

Expected (paper): COCO + ImageNet-1K, R50: localisation 64.7 / 69.9 top-1 / 5, GT-known 73.8; LVIS-997, R50:
mask AP 27.6, base 29.1, novel 22.8; Objects365 + ImageNet-21K, Swin-B: 6.9 AP50, 19.2 top-1. Not run here.
Shapes, novel AP50, 6 seeds (study_simple21k.py): 10.5; -reform 7.6, boxes 4.5, -stage I, twice as long, 2.6.
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
from tqdm import tqdm

from common.boxes import constant
from common.datasets import (CocoDataset, as_pixels, class_names, collate, eval_loader, plain_name,
                             read_annotations, read_json, read_objects365, repeat_fractions,
                             require_lvis, start_worker)
from common.evaluation import (Detections, base_and_novel, class_table, coco_evaluate, encode_mask,
                               import_lvis, localise, localisation_metrics, lvis_evaluate)
from common.imagenet import (Benchmark, ClassificationTransform, ClassImages, DetectionTransform, ImageIndex,
                             Pairs, Stream, are, boxed_classes, class_folders, collate_labelled, draw_split,
                             evaluated_images, is_localisation, jitter_image, pair_by_name, read_class_list,
                             read_ilsvrc, read_overlap, shared_classes, wnid_names, wordnet_ids)
from common.run import (COUNT, POSITIVE, Run, UserError, answer_folder, barrier, dash, describe_model,
                        fast_layout, fused, gather, given_flags, holds_run, load_checkpoint, load_strict,
                        number, open_run, open_table, parse, parser, reduce_mean, rows, run_flags,
                        saved_flags, saved_run, seed_all, started, tell, tell_seen, to_device,
                        warmup_multistep, wrap_ddp, write_whole)

STRIDES = (4, 8, 16, 32)  # of P2 ... P5


# ================================================================== the paper

def fp32(x):
    """bf16 maps of autocast -> fp32, in which all scores and losses are computed; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def product_score_loss(z, g, foreground, label):
    """Eqs. 1, 2, 4: -log of the final score, for each RoI: (two (n,): foreground part, category part).

    z (n,) fp32 logits of f, g (n, C) logits; foreground (n,) bool; label (n,) 0 ... C - 1, -1 for background.
    The loss of a batch: the sum of both over the number of its sampled RoIs.
    An object: -log(S_fg S_y) = softplus(-z) + logsumexp(g) - g_y; background: -log(1 - S_fg) = softplus(z).
    That is a (C + 1)-way cross-entropy on [z + log_softmax(g), 0]; in logits, for log(softmax) is -inf at a
    gap of 104. Background gives g no gradient at all.
    """
    fg = F.softplus(torch.where(foreground, -z, z))                          # Eqs. 1, 4
    cat = F.cross_entropy(g, label, ignore_index=-1, reduction="none")       # Eqs. 2, 4
    return fg, cat


def mixed_cross_entropy(logits, label, other=None, lam=1.0, smoothing=0.0):
    """Eqs. 3, 4: -log softmax(g^)_y, mean over images. Of two mixed images lam of the first, 1 - lam of the
    other, as the dense soft target gives, without its B x K numbers.

    S_fg of Eq. 4 is a constant here, the foreground score learns from boxes only: its log has no gradient and
    is left out.
    """
    loss = F.cross_entropy(logits, label, label_smoothing=smoothing)         # Eqs. 3, 4
    if other is None:
        return loss
    return lam * loss + (1 - lam) * F.cross_entropy(logits, other, label_smoothing=smoothing)


class StageOne(nn.Module):
    """Stage I: forward(dict(cls=batch)) -> {name: loss}. The whole image is one RoI with one label.

    model: a Detector of stage 1 (or the row "-reform"'s PooledClassifier). mix: Mixup and CutMix, and labels
    smoothed by `smoothing`. model.watch: numbers of the step that are no losses.
    """

    def __init__(self, model, mix=False, smoothing=0.0, amp=False):
        super().__init__()
        self.model, self.mix, self.smoothing, self.amp = model, mix, smoothing, amp

    def forward(self, batch):
        batch = batch["cls"]
        images, label = normalise(batch), batch["labels"]
        lam, other = 1.0, None
        if self.mix:
            mix = draw_mix(images.shape[-1])
            images = mix_images(images, mix)
            lam, other = mix[0], label.roll(1)
        logits = self.model.whole_image(images, batch["image_sizes"], self.amp)  # Eq. 3
        seen = label if lam >= 0.5 else other  # of two mixed images the larger share
        self.model.watch = dict(top1=100 * (logits.argmax(1) == seen).float().mean())
        return dict(cls=mixed_cross_entropy(logits, label, other, lam, self.smoothing))


class StageTwo(nn.Module):
    """Stage II: forward(dict(det=batch, cls=batch)) -> {name: weighted loss}. Both kinds of images go through
    one forward, so each parameter has a gradient in every step of every process, and DDP never waits for one
    that took no part.

    model: a Detector of stage 2. Without "cls" in the batch: boxes only. fg_grad: S_fg learns from
    classification images, too (not the paper). model.watch: numbers of the step that are no losses.
    """

    def __init__(self, model, cls_weight=0.1, fg_grad=False, amp=False):
        super().__init__()
        self.model, self.cls_weight, self.fg_grad, self.amp = model, cls_weight, fg_grad, amp

    def features(self, det, cls):
        """(pyramid of the detection images, RoI of each whole classification image (n, D, 7, 7) or None).
        One pass through the backbone where both kinds have the same canvas."""
        model, x = self.model, normalise(det)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            if cls is None:
                return model.features(x), None
            images = normalise(cls)
            if images.shape[-2:] == x.shape[-2:]:
                tops = model.top_down(torch.cat([x, images]))
                rest = {k: m[len(x):] for k, m in tops.items()}
                tops = {k: m[:len(x)] for k, m in tops.items()}
            else:
                tops = model.top_down(x)
                rest = model.top_down(images)
            return model.smooth(tops), model.whole_rois(rest, cls["image_sizes"])

    def forward(self, batch):
        model, det, cls = self.model, batch["det"], batch.get("cls")
        maps, whole = self.features(det, cls)
        boxes = [b[:n] for b, n in zip(det["boxes"], det["counts"])]
        labels = [k[:n] for k, n in zip(det["labels"], det["counts"])]
        proposals, losses = model.proposals(det["images"], det["image_sizes"], maps, boxes)
        rois, fg, label, gt, owner = sample_rois(proposals, boxes, labels, model.rois_per_image)
        pooled = pool(maps, rois, model.canonical)
        h = model.head(pooled if cls is None else torch.cat([pooled, whole]))  # x_i of Eqs. 1-3
        roi_h = h[:len(rois)]
        n = reduce_mean(constant(float(len(rois)), h.device, torch.float32), 1.0)
        fg_loss, cat_loss = product_score_loss(model.fg(roi_h)[:, 0], model.det(roi_h), fg, label)
        losses["fg"] = fg_loss.sum() / n
        losses["cat"] = cat_loss.sum() / n
        losses["box"] = (box_loss(model.box(roi_h), rois[:, 1:], gt, fg) * fg).sum() / n
        if model.arch["masks"]:
            logits = model.mask_logits(maps, rois[fg])
            losses["mask"] = mask_loss(logits, rois[fg], owner[fg], det["masks"])
        if cls is not None:
            logits = model.cls(h[len(rois):])                                # Eq. 3
            loss = mixed_cross_entropy(logits, cls["labels"])
            if self.fg_grad:
                loss = loss + F.softplus(-model.fg(h[len(rois):])).mean()    # S_fg of Eq. 4
            losses["cls"] = self.cls_weight * loss
            model.watch = dict(top1=100 * (logits.argmax(1) == cls["labels"]).float().mean())
        return losses


class Vocabulary:
    """What is scored: V columns, the K classification classes, then the detection classes that these lack.

        det = dog, cat; cls = n1 "cat", n2 "bird"; pair = [1, -1]: n1 is detection class 1, n2 none
        names = cat, bird, dog; base = True, False, True: birds had no boxes in training
        both = [0], partner = [1]: column 0 is known to g^ and, as class 1, to g; alone = [0]: dog, to g only

    known_as: all names of each column. choose: keep some columns. only_cls: without `alone`, as in setups 2
    and 3; there g^ works alone unless --overlap has told what they share.
    """

    def __init__(self, arch, device, only_cls=False):
        det, cls, pair = arch["det"], arch["cls"], arch["pair"]
        known = set(pair)
        alone = [] if only_cls else [d for d in range(len(det)) if d not in known]
        self.both = constant([k for k, p in enumerate(pair) if p >= 0], device, torch.long)
        self.partner = constant([p for p in pair if p >= 0], device, torch.long)
        self.alone = constant(alone, device, torch.long)
        self.names = [*arch["cls_names"], *(det[d] for d in alone)]
        wnids = [*cls, *(det[d] for d in alone)]
        self.base = [p >= 0 for p in pair] + [True] * len(alone)
        self.known_as = [words(name) | {plain(wnid)} for name, wnid in zip(self.names, wnids)]
        for k, p in enumerate(pair):
            if p >= 0:  # its name among the detection classes, which --overlap may give another
                self.known_as[k] |= words(det[p])
        self.chosen = None

    def choose(self, columns):
        index = torch.tensor(columns, dtype=torch.long, device=self.both.device)
        self.chosen = index if self.chosen is None else self.chosen[index]
        self.names = [self.names[k] for k in columns]
        self.base = [self.base[k] for k in columns]
        self.known_as = [self.known_as[k] for k in columns]
        return self

    def find(self, wanted, flag="--classes"):
        """Columns of names or wnids that a user typed, each once."""
        columns = {}
        for name in wanted:
            found = [k for k, known in enumerate(self.known_as) if plain(name) in known]
            if not found:
                raise UserError(f"{flag} {name}: no such name or wnid among the {len(self.names):,} classes "
                                "of the checkpoint")
            columns |= dict.fromkeys(found)
        return list(columns)

    def of(self, categories):
        """{name of a COCO category, plain: column}, best to choose before evaluation: others would take
        places among an image's best boxes."""
        wanted, best = {plain(c["name"]) for c in categories}, {}
        for k, known in enumerate(self.known_as):
            for name in known & wanted:
                # of several columns with this name: the one that had boxes, then the one that has no other
                rank = self.base[k], plain(self.names[k]) == name
                if name not in best or rank > best[name][0]:
                    best[name] = rank, k
        return {name: k for name, (_, k) in best.items()}


def plain(name):
    """A class's name as it is compared: LVIS writes aerosol_can."""
    return plain_name(name).strip()


def words(name):
    """All that a class is called: "lesser panda, red panda" is one class."""
    return {plain(name), *map(plain, name.split(","))}


def log_scores(model, h, vocabulary, fuse=2 / 3):
    """Log of the final scores, (R, V) fp32, of RoI features h (R, D). In log space: a uniform softmax over
    21,841 classes is 4.6e-5, which bf16 cannot tell from its neighbours. S_fg factors out of Eq. 5."""
    both, partner, alone = vocabulary.both, vocabulary.partner, vocabulary.alone
    h = h.float()
    log_det = F.log_softmax(model.det(h), 1)                                            # Eq. 2
    if model.arch["cls"]:
        scores = model.cls(h)
        scores -= scores.logsumexp(1, keepdim=True)                                     # Eq. 3
        if len(both):
            scores[:, both] = fuse * log_det[:, partner] + (1 - fuse) * scores[:, both]  # Eq. 5
        if len(alone):
            scores = torch.cat([scores, log_det[:, alone]], 1)
    else:
        scores = log_det[:, alone]
    if vocabulary.chosen is not None:
        scores = scores[:, vocabulary.chosen]
    scores += F.logsigmoid(model.fg(h))                                                 # Eqs. 1, 4
    return scores


def class_scores(model, h, vocabulary, fuse=2 / 3, chunk=256):
    """log_scores a chunk of RoIs at a time: yields (first RoI, (r, V)). Memory of a few chunk x V floats."""
    for start in range(0, len(h), chunk):
        yield start, log_scores(model, h[start:start + chunk], vocabulary, fuse)


# Mixup and CutMix of Swin's classification (Sec. 4.1). torchvision.transforms.v2 makes the same images of the
# same share and window (a test); but it rounds half the window's sides down, and its dense (B, K) targets,
# 11 MB for 128 x 21,841, give a loss that differs in the last digits.

def draw_mix(size):
    """Mixup (alpha 0.8) or CutMix (alpha 1), half each, as plain values: (lam, None), or
    (lam, (y0, y1, x0, x1)). From torch's generator, whose state last.pt keeps."""
    cut = torch.rand(()).item() < 0.5
    a = torch.tensor(1.0 if cut else 0.8)
    lam = torch.distributions.Beta(a, a).sample().item()
    if not cut:
        return lam, None
    side = size * math.sqrt(1 - lam)
    y, x = torch.randint(size, (2,)).tolist()
    window = [round(v) for v in (y - side / 2, y + side / 2, x - side / 2, x + side / 2)]
    y0, y1, x0, x1 = (min(max(v, 0), size) for v in window)
    return 1 - (y1 - y0) * (x1 - x0) / size**2, (y0, y1, x0, x1)


def mix_images(images, mix):
    """Each image with its neighbour in the batch."""
    lam, window = mix
    other = images.roll(1, 0)
    if window is None:
        return lam * images + (1 - lam) * other
    y0, y1, x0, x1 = window
    images = images.clone()
    images[:, :, y0:y1, x0:x1] = other[:, :, y0:y1, x0:x1]
    return images


# ================================================================== what its tables compare with

class PooledClassifier(nn.Module):
    """"-reform" of Tables 2 and 3: stage I as an ordinary classifier, average pooling and one linear layer.
    Only its backbone goes on into stage II. arch: as Detector's."""

    def __init__(self, arch, drop_path=0.0):
        super().__init__()
        self.arch, self.watch = arch, {}
        self.body = Body(arch["name"], drop_path)
        self.cls = linear(self.body.channels[-1], len(arch["cls"]))

    def whole_image(self, images, sizes, bf16=False):
        """As Detector's."""
        with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
            x = fp32(self.body(images, 3)[3]).mean((2, 3))
        return self.cls(x)

    def forward(self, images):
        return self.whole_image(images, None)

    def freeze_idle(self, side):
        """As Detector's: the norms of C2 ... C4 take no part."""
        for norm in list(self.body.norms or ())[:3]:
            norm.requires_grad_(False)


# ================================================================== detector

SWIN = dict(  # first width, depths, heads, stochastic depth of stage I and II
    swin_t=(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2, 0.2), swin_s=(96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3, 0.2),
    swin_b=(128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5, 0.3))


class Body(nn.Module):
    """Backbone up to C5 as four stages: (B, 3, H, W) -> [C2, C3, C4, C5], strides 4 to 32. Swin's maps get a
    LayerNorm each, as in Swin's detectors; its windows shift by torchvision's rule, not on a map of one
    window."""

    def __init__(self, name, drop_path=0.0):
        super().__init__()
        self.norms = None
        if name in SWIN:
            width, depths, heads, *_ = SWIN[name]
            net = SwinTransformer([4, 4], width, list(depths), list(heads), [7, 7],
                                  stochastic_depth_prob=drop_path, num_classes=1)
            parts = list(net.features)  # patches or merging, then blocks; (B, H, W, C)
            stages = [nn.Sequential(*parts[2 * i:2 * i + 2]) for i in range(4)]
            self.channels = [width * 2**i for i in range(4)]
            self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-5) for c in self.channels)
        else:
            if name.startswith("tiny"):
                from common.tiny import NarrowResNet
                net = NarrowResNet(int(name[4:]))
            else:
                net = torchvision.models.resnet50(weights=None)
            first = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu,
                                              maxpool=net.maxpool, layer1=net.layer1))
            stages = [first, net.layer2, net.layer3, net.layer4]
            width = net.inplanes // 8  # of the first stage
            self.channels = [width * 2**i for i in range(4)]
        self.stages = nn.ModuleList(stages)
        self.recompute, self.fixed_norms = False, False

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
    """FPN level 0 ... 3 (P2 ... P5) of RoIs with sqrt(area) `side`: a RoI of `canonical` pixels, 224 on
    ImageNet-size images, goes to P4."""
    return (4 + torch.log2(side / canonical) + 1e-6).floor().clamp(2, 5).long() - 2


def align_rois(m, rois, level, size):
    """RoIAlign from one map of the pyramid. sampling_ratio 0 reads every cell: two samples a bin would skip a
    third of the cells of a whole image."""
    return roi_align(fp32(m), rois, size, 1 / STRIDES[level], sampling_ratio=0, aligned=True)


def pool(maps, rois, canonical, size=7):
    """RoIAlign from the FPN level of each RoI. maps: {level: (B, D, h, w)}, or one level for all; rois (n, 5)
    image and xyxy pixels -> (n, D, size, size).

    Strides are told, not guessed: torchvision's MultiScaleRoIAlign infers them once, from the first batch,
    and wrongly if its images fill less than 0.7 of the canvas.
    """
    if len(maps) == 1:
        (level, m), = maps.items()
        return align_rois(m, rois, level, size)
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    levels = level_of(area.clamp(min=1e-6).sqrt(), canonical)
    out = rois.new_zeros(len(rois), next(iter(maps.values())).shape[1], size, size)
    for k, m in maps.items():  # also a level without RoIs: every process has a gradient for everything
        mine = (levels == k).nonzero()[:, 0]
        out = out.index_copy(0, mine, align_rois(m, rois[mine], k, size))
    return out


def linear(d, out, std=0.01):
    layer = nn.Linear(d, out)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)  # of torchvision's ImageNet weights
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


def normalise(batch):
    """uint8 images -> mean 0, deviation 1; 0 in the padding."""
    x = batch["images"]
    mean, std = (v.to(x.device, non_blocking=True) for v in (MEAN, STD))
    rows_in = torch.arange(x.shape[2], device=x.device) < batch["sizes"][:, :1]
    cols_in = torch.arange(x.shape[3], device=x.device) < batch["sizes"][:, 1:]
    return (x / 255 - mean) / std * (rows_in[:, None, :, None] & cols_in[:, None, None, :])


class Detector(nn.Module):
    """Body, FPN, RPN, RoI head and the linear layers f, g, g^. Stage I has no RPN, no f, g, boxes.

    arch, plain values: name (backbone), stage, head, masks, gap; det: names of the C detection classes; cls:
    wnids of the K classification classes, cls_names, pair: for each its detection class or -1; what else
    --eval and --predict need.
    """

    def __init__(self, arch, drop_path=0.0):
        super().__init__()
        self.arch, self.watch = arch, {}
        tiny = arch["name"].startswith("tiny")
        dim, hidden, scale = (32, 256, 4) if tiny else (256, 1024, 1)  # tiny: a canvas of 256 for 1,024
        self.canonical = 224 / scale
        self.body = Body(arch["name"], drop_path)
        self.fpn = FeaturePyramidNetwork(self.body.channels, dim)
        if arch["head"] == "2fc":
            self.head = TwoMLPHead(dim * 49, hidden)
        else:
            norm = partial(nn.GroupNorm, 32)
            self.head = FastRCNNConvFCHead((dim, 7, 7), [dim] * 4, [hidden], norm_layer=norm)
        if arch["cls"]:
            self.cls = linear(hidden, len(arch["cls"]))  # g^ of Eq. 3
        if arch["stage"] == 1:
            return
        self.fg = linear(hidden, 1)                      # f of Eq. 1
        self.det = linear(hidden, len(arch["det"]))      # g of Eq. 2
        self.box = linear(hidden, 4, 0.001)              # of any class
        self.rpn = make_rpn(dim, tiny, scale)
        self.rois_per_image = 32 if tiny else 512
        if arch["masks"]:
            self.mask = nn.Sequential(OrderedDict(convs=MaskRCNNHeads(dim, (dim,) * 4, 1),
                                                  out=MaskRCNNPredictor(dim, dim, 1)))

    def top_down(self, images, lowest=0):
        """Normalised images -> {level: (B, D, h, w)} from P5 down to `lowest`: torchvision's FPN before its
        3x3 convolutions."""
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

    def whole_levels(self, sizes):
        """FPN level of each whole image."""
        return level_of(torch.tensor([float(h * w) for h, w in sizes]).sqrt(), self.canonical).tolist()

    def whole_rois(self, tops, sizes):
        """Sec. 3: images, the content without the padding, as one RoI (B, D, 7, 7). sizes: list of (h, w).

        The level is known before anything is computed: each image goes through the 3x3 convolution of its
        own level only."""
        levels = self.whole_levels(sizes)
        device, order, pooled = next(iter(tops.values())).device, [], []
        for k in sorted(tops):  # also one that no image has: every process has a gradient for everything
            mine = [i for i, level in enumerate(levels) if level == k]
            part = tops[k][constant(mine, device, torch.long)]
            rois = [(j, 0.0, 0.0, float(sizes[i][1]), float(sizes[i][0])) for j, i in enumerate(mine)]
            rois = constant(rois, device, torch.float32).reshape(-1, 5)
            pooled.append(pool(self.smooth({k: part}), rois, self.canonical))
            order += mine
        back = torch.tensor(order).argsort().tolist()  # from the order of levels into that of the images
        return torch.cat(pooled)[constant(back, device, torch.long)]

    def whole_image(self, images, sizes, bf16=False):
        """Stage I: logits of g^ (B, K) on one RoI, the image's content. sizes: list of (h, w). bf16: autocast
        body and FPN."""
        with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
            x = self.whole_rois(self.top_down(images, min(self.whole_levels(sizes))), sizes)
        return self.cls(self.head(x))  # Eq. 3

    def proposals(self, images, sizes, maps, boxes=None):
        """(per image (n, 4) xyxy pixels inside its content, RPN losses). images: for their number and canvas;
        sizes: list of (h, w); boxes: true ones of each image, in training."""
        levels = OrderedDict((str(k), m) for k, m in maps.items())
        levels["pool"] = F.max_pool2d(maps[3], 1, 2)  # P6
        targets = None if boxes is None else [dict(boxes=b) for b in boxes]
        found, losses = self.rpn(ImageList(images, sizes), levels, targets)
        if boxes is not None:
            losses = dict(rpn_fg=losses["loss_objectness"], rpn_box=losses["loss_rpn_box_reg"])
        return found, losses

    def mask_logits(self, maps, rois):
        """(n, 28, 28) for rois (n, 5)."""
        return self.mask(pool(maps, rois, self.canonical, 14))[:, 0]

    def freeze_idle(self, side):
        """Stage I at `side` pixels: what the whole image's level does not reach gets no gradient, and must
        not decay; and DDP would wait for its gradient."""
        used = set(self.whole_levels([(side, side)]))
        for i in range(4):
            self.fpn.inner_blocks[i].requires_grad_(i >= min(used))
            self.fpn.layer_blocks[i].requires_grad_(i in used)
        for norm in list(self.body.norms or ())[:min(used)]:
            norm.requires_grad_(False)

    def forward(self, images):
        """Raw outputs of every layer, with the whole image as every RoI: for describe_model, which counts
        their work. Training and detection go through the methods above."""
        sizes = [tuple(images.shape[-2:])] * len(images)
        if self.arch["stage"] == 1:
            return self.whole_image(images, sizes)
        tops = self.top_down(images)
        maps, level = self.smooth(tops), self.whole_levels(sizes)[0]
        rois = [(i, 0.0, 0.0, float(images.shape[3]), float(images.shape[2])) for i in range(len(images))]
        pooled = pool({level: maps[level]}, constant(rois, images.device, torch.float32), self.canonical)
        pooled = pooled.repeat_interleave(self.rpn.post_nms_top_n(), 0)
        h = self.head(pooled)
        levels = [*maps.values(), F.max_pool2d(maps[3], 1, 2)]
        out = [*self.rpn.head(levels), self.fg(h), self.det(h), self.box(h)]
        if self.arch["cls"]:
            out.append(self.cls(h))
        if self.arch["masks"]:
            out.append(self.mask(pooled[:100].repeat(1, 1, 2, 2)))  # of the final boxes, 14 x 14
        return out


def new_model(arch, drop_path=0.0):
    return (PooledClassifier if arch["gap"] else Detector)(arch, drop_path)


def make_rpn(dim, tiny, scale):
    """torchvision's, five levels. Its IoU is taken 16 boxes at a time: 600 boxes x 262,000 anchors at once
    would be 5 GB."""
    sides = tuple((s // scale,) for s in (32, 64, 128, 256, 512))
    anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 5)
    before = dict(training=200, testing=200) if tiny else dict(training=2000, testing=1000)
    after = dict(training=100, testing=100) if tiny else dict(training=2000, testing=1000)
    sampled = 64 if tiny else 256
    rpn = RegionProposalNetwork(anchors, RPNHead(dim, 3), 0.7, 0.3, sampled, 0.5, before, after, 0.7)
    rpn.box_similarity = iou_in_parts
    return rpn


def iou_in_parts(a, b):
    return torch.cat([box_iou(part, b) for part in a.split(16)])


@torch.no_grad()
def sample_rois(proposals, boxes, labels, per_image):
    """`per_image` RoIs of an image, at most a quarter of them objects: IoU >= 0.5 with a true box. True boxes
    are proposals, too.

    proposals, boxes, labels: per image (n, 4), (M, 4), (M,). Returns rois (R, 5), foreground (R,) bool, label
    (R,), -1 for background, the true box of each (R, 4), and its place in the image (R,); the last two mean
    nothing for background.
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
        taken = (positive[0] | negative[0]).nonzero()[:, 0]
        fg, owner = iou[taken] >= 0.5, owner[taken]
        roi = F.pad(roi[taken], (1, 0), value=i)
        parts.append((roi, fg, torch.where(fg, label[owner], -1), gt[owner], owner))
    return tuple(torch.cat(p) for p in zip(*parts))


CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


def box_loss(deltas, rois, gt, fg):
    """Smooth L1 of class-agnostic boxes, (R,); of background it means nothing."""
    target = CODER.encode_single(torch.where(fg[:, None], gt, rois), rois)
    return F.smooth_l1_loss(deltas, target, beta=1 / 9, reduction="none").sum(1)


def mask_loss(logits, rois, owner, masks):
    """Binary cross-entropy of the class-agnostic masks (Mask R-CNN), mean over objects. logits (n, 28, 28) of
    rois (n, 5) and their place in the image, owner (n,); masks (B, M, H / 2, W / 2): covered pixels, 0-4."""
    target = [torch.zeros_like(logits)] if not len(rois) else []
    with torch.no_grad():  # a few outlines at a time: at 1,024 px each is a megabyte
        for part, place in zip(rois.split(32), owner.split(32)) if len(rois) else ():
            outlines = masks[part[:, 0].long(), place][:, None].float() / 4
            first = torch.arange(len(part), device=part.device)[:, None].to(part)
            numbered = torch.cat([first, part[:, 1:]], 1)
            covered = roi_align(outlines, numbered, 28, 0.5, 0, True)[:, 0]
            target.append((covered >= 0.5).float())
    loss = F.binary_cross_entropy_with_logits(logits, torch.cat(target), reduction="none").mean((1, 2))
    return loss.sum() / reduce_mean(constant(float(len(rois)), rois.device, torch.float32), 1.0)


def class_nms(boxes, roi, label, score, most, iou=0.5, topk=5000):
    """Best `most` candidates after NMS within each class: (places (n,) in roi, best first). boxes (R, 4);
    roi, label, score (N,): candidates.

    A box is only ever removed by a better one of its class, so the best topk give the exact answer if `most`
    survive; else twice as many are taken: the result does not depend on topk. For one joint NMS the classes
    are moved apart: numbered anew 0 ... U - 1 and in float64, for in float32 class 16,384 x 1,024 px swallows
    the pixels.
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
def detect(model, batch, vocabulary, *, fuse=2 / 3, least=1e-4, most=100, masks=True, amp=False, best=False):
    """One collated image -> dict(boxes (n, 4) in original pixels, scores, labels: columns of the vocabulary,
    masks: list of RLE or None).

    fuse: of Eq. 5. least: smallest score; most: boxes. masks: where the model has them. best: also best (V,),
    each class's highest log score, and best_boxes (V, 4): its box. No NMS needed: it never removes a class's
    best box.
    """
    device = model.fg.weight.device
    batch = to_device(batch, device)
    images, (size,), (original,) = normalise(batch), batch["image_sizes"], batch["original_sizes"]
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        maps = model.features(images)
    (found,), _ = model.proposals(images, [size], maps)
    h = model.head(pool(maps, F.pad(found, (1, 0)), model.canonical))
    boxes = clip_boxes_to_image(CODER.decode_single(model.box(h), found), size)
    real = ((boxes[:, 2:] - boxes[:, :2]) > 0.01).all(1)
    boxes, h = boxes[real], h[real]
    scale = boxes.new_tensor([original[1] / size[1], original[0] / size[0]] * 2)
    threshold = math.log(max(least, 1e-30))
    empty = torch.zeros(0, dtype=torch.long, device=device)
    parts = [(empty, empty, boxes.new_zeros(0))]
    top = boxes.new_full((len(vocabulary.names),), -math.inf)
    top_roi = empty.new_zeros(len(vocabulary.names))
    for start, scores in class_scores(model, h, vocabulary, fuse):
        roi, label = (scores > threshold).nonzero(as_tuple=True)
        parts.append((roi + start, label, scores[roi, label]))
        if best:
            value, row = scores.max(0)
            top_roi = torch.where(value > top, row + start, top_roi)
            top = torch.maximum(top, value)
    roi, label, score = (torch.cat(p) for p in zip(*parts))
    keep = class_nms(boxes, roi, label, score, most)
    kept = boxes[roi[keep]]
    answer = dict(boxes=kept * scale, scores=score[keep].exp(), labels=label[keep], masks=None)
    if model.arch["masks"] and masks:
        shapes = model.mask_logits(maps, F.pad(kept, (1, 0))).sigmoid()[:, None]
        answer["masks"] = []
        for part, part_boxes in zip(shapes.split(32), answer["boxes"].split(32)):
            for m in paste_masks_in_image(part, part_boxes, original):
                answer["masks"].append(encode_mask((m[0] > 0.5).cpu().numpy()))
    if best:
        places = boxes if len(boxes) else boxes.new_zeros(1, 4)
        answer.update(best=top, best_boxes=places[top_roi] * scale)
    return answer


# ================================================================== data

class Setup(NamedTuple):
    """A row of Table 1, or own data: where they lie, what C and K are, what both vocabularies share, and its
    schedule."""
    about: str
    paths: dict  # {flag: path under --data}
    det: str     # C: "all" classes of the boxes; "base": LVIS's common and frequent ones that have images
    cls: str     # K: "all" classes of --cls-dir; "shared": those of them that LVIS has; "none"
    pair: str    # what both know: by "wordnet" or by "name"; "none"; --overlap, where given, replaces it
    masks: bool = False
    epochs: int = 36
    lr: float = 3e-4
    rfs: float = 0.0  # repeat-factor sampling


LVIS = dict(train_json="lvis/annotations/lvis_v1_train.json", train_images="coco",
            val_json="lvis/annotations/lvis_v1_val.json", val_images="coco")
SETUPS = dict(
    s1=Setup("LVIS-997 base + IN-997, masks", LVIS | dict(cls_dir="imagenet21k"), "base", "shared", "wordnet",
             masks=True),
    s2=Setup("COCO + ImageNet-1K", dict(
        train_json="coco/annotations/instances_train2017.json", train_images="coco/train2017",
        cls_dir="imagenet/train", cls_val="imagenet/val",
        val_images="imagenet/val", val_boxes="imagenet/val_boxes"), "all", "all", "none"),
    s3=Setup("Objects365 + ImageNet-21K", dict(
        train_json="objects365/annotations/zhiyuan_objv2_train.json", train_images="objects365/train",
        cls_dir="imagenet21k",
        val_json="imagenet21k_benchmark.json", val_images="imagenet21k"), "all", "all", "none", epochs=12),
    lvis=Setup("fine-tuning on LVIS, 1,203 classes", LVIS, "all", "none", "none", epochs=24, lr=1e-4,
               rfs=0.001),
    own=Setup("--train-json ... or a folder in the layout of COCO with imagenet/train beside it", dict(
        train_json="annotations/instances_train2017.json", train_images="train2017",
        cls_dir="imagenet/train", cls_val="imagenet/val",
        val_json="annotations/instances_{val}2017.json", val_images="{val}2017"), "all", "all", "name"))
SCORED = dict(fuse=2 / 3, score_thresh=1e-4, max_dets=None)  # how a run is scored: its file keeps it
PATHS = "train_json train_images cls_dir cls_val val_json val_images val_boxes".split()


def need(path, flag, where):
    if path is None or not Path(path).exists():
        named = f"{flag} {path}" if path else flag
        raise UserError(f"{named}: is missing; {where} (--data shapes needs nothing)")


def open_index(folder, classes, quiet):
    """ImageIndex; its cache is made by the first process, while the others wait."""
    first = int(os.environ.get("RANK", 0)) == 0
    if not first:
        barrier()
    index = ImageIndex(folder, classes, quiet or not first)
    if first:
        barrier()
    return index


def boxes_of(args):
    """(Records of the boxes, {wnid: detection class} where --overlap or WordNet tells them)."""
    need(args.train_json, "--train-json", "boxes in COCO's or LVIS's format")
    need(args.train_images, "--train-images", "the images of --train-json")
    read = read_objects365 if args.setup == "s3" else read_annotations
    records = read(args.train_json, args.train_images)
    by_wordnet = SETUPS[args.setup].pair == "wordnet"
    if by_wordnet and not all({"synset", "frequency"} <= set(c) for c in records.categories):
        raise UserError(f"{args.train_json}: categories lack synset or frequency; setup s1 reads LVIS v1's "
                        "json")
    if args.overlap:
        wnid_of = read_overlap(args.overlap)
        strange = sorted(set(wnid_of) - set(records.classes))
        if strange:
            raise UserError(f"--overlap {args.overlap}: {strange[0]} is no class of {args.train_json}")
    elif by_wordnet:
        need(args.wordnet, "--wordnet", "WordNet 3.0's dict/index.noun, https://wordnet.princeton.edu "
             "(Debian: apt install wordnet-base)")
        ids = wordnet_ids(args.wordnet, [c["synset"] for c in records.categories])
        wnid_of = {c["name"]: ids[c["synset"]] for c in records.categories if c["synset"] in ids}
    else:
        wnid_of = {}
    return records, {w: n for n, w in wnid_of.items()}


def labelled_index(args, partners, quiet=False):
    """ImageIndex of --cls-dir: all its classes or those of --cls-list, in setup s1 those of them that are
    among `partners`, LVIS's wnids; without images that are evaluated on, Sec. 4.1."""
    wanted = read_class_list(args.cls_list)
    if args.setup == "s3":
        need(args.val_json, "--val-json", "its images must not be trained on; the benchmark was never "
             "published, --make-split draws one")
    need(args.cls_dir, "--cls-dir", "a folder with a folder or .tar of images for each class, as ImageNet's "
         "train")
    if SETUPS[args.setup].cls == "shared" and Path(args.cls_dir).is_dir():
        held = class_folders(args.cls_dir)
        wanted = sorted(set(partners) & held & set(wanted or held))
        if not wanted:
            raise UserError(f"--cls-dir {args.cls_dir}: holds none of the {len(partners)} wnids of LVIS; "
                            "there is nothing to evaluate")
    index = open_index(args.cls_dir, wanted, quiet)
    index.drop(evaluated_images(args.cls_dir, args.val_images, args.val_json, args.val_boxes))
    if args.setup == "s3" and not index.dropped:
        raise UserError(f"--val-json {args.val_json}: none of its images is in --cls-dir {args.cls_dir}, so "
                        "none could be kept from training; file names are as there, class/name")
    if args.setup == "s3" and index.dropped < index.asked and not quiet:
        tell(f"--val-json {args.val_json}: {index.asked - index.dropped:,} of its {index.asked:,} images are "
             f"not in --cls-dir {args.cls_dir} by their names; if they are by another, they are trained on")
    if len(index.classes) < 2:
        raise UserError(f"--cls-dir {args.cls_dir}: holds one class, {index.classes[0]}; it takes two")
    return index


def make_vocabulary(args, quiet=False, before=None):
    """(dict(det, cls, cls_names, pair), ImageIndex or None, Records of the boxes or None): the two label
    spaces and what they share, as the setup's row says.

    before: the arch of --init; boxes alone (--cls-ratio 0) keep its classes, and without it there are none.
    """
    setup, index, records, name_of, cls, names = SETUPS[args.setup], None, None, {}, [], []
    if args.stage == 2 or setup.cls == "shared":
        records, name_of = boxes_of(args)
    if setup.cls != "none" and (args.stage == 1 or args.cls_ratio):
        index = labelled_index(args, name_of, quiet)
        cls, names = index.classes, wnid_names(index.classes, args.cls_dir, args.names)
    elif setup.cls != "none" and before and not before["gap"]:  # of '-reform' no g^ is left
        cls, names = list(before["cls"]), list(before["cls_names"])
    if setup.cls == "shared":
        names = [name_of.get(w, w) for w in cls]
    det = records.classes if records else []
    if records and args.setup == "own":
        det, bare = boxed_classes(records)  # in g the others would count as base, though it never saw them
        if bare and not quiet:
            tell(f"{args.train_json}: {are(bare)} listed without a box: no detection classes")
        novel = {w: n for w, n in name_of.items() if n in bare}  # --overlap still tells what they are called
        names = [n if plain(novel.get(w, n)) in words(n) else f"{n}, {novel[w]}" for w, n in zip(cls, names)]
    if setup.det == "base":
        det = base_classes(args, records, cls, names)
        if cls and not quiet:
            print(f"{len(cls)} of {len(name_of):,} LVIS classes have images: {len(det)} base, "
                  f"{len(cls) - len(det)} novel (of fall 2011's: 997, 720, 277)", flush=True)
    lost = sorted(set(name_of) - set(cls)) if args.overlap and cls else []
    if lost and not quiet:
        print(f"--overlap {args.overlap}: {are(lost)} not among the {len(cls):,} classes with images",
              flush=True)
    if name_of or args.overlap:
        column = {n: k for k, n in enumerate(det)}
        pair = [column.get(name_of.get(w), -1) for w in cls]
    elif setup.pair == "name":
        pair = pair_by_name(det, names)
    else:
        pair = [-1] * len(cls)  # the paper does not map them
    return dict(det=det, cls=cls, cls_names=names, pair=pair), index, records


def base_classes(args, records, cls, names):
    """LVIS's common and frequent classes that have images; boxes alone: all that are not rare."""
    pictured = set(names) if cls else set(records.classes)
    det = [c["name"] for c in records.categories if c["name"] in pictured and c["frequency"] != "r"]
    if not det:
        raise UserError(f"--cls-dir {args.cls_dir}: none of its {len(cls)} classes of LVIS is common or "
                        "frequent; there are no base classes")
    return det


def make_data(args, quiet=False, before=None):
    """(arch of the model, detection images or None, labelled ones or None). before: see make_vocabulary."""
    before = before or arch_before(args) or {}
    spaces, index, records = make_vocabulary(args, quiet, before)
    if args.stage == 1:
        spaces |= dict(det=[], pair=[-1] * len(spaces["cls"]))
    arch = dict(spaces, name=args.backbone, kind=f"stage{args.stage}", stage=args.stage, head=args.head,
                gap=args.stage == 1 and args.stage1_head == "gap", masks=args.stage == 2 and args.masks,
                setup=args.setup, image_size=args.image_size, stage1_size=args.stage1_size,
                augment=args.augment, **{k: getattr(args, k) for k in SCORED})
    out = [n for n in (index and index.dropped, before.get("left_out")) if n is not None]
    arch |= dict(left_out=min(out)) if out else {}
    if len(out) == 2 and out[1] < out[0] and not quiet:
        tell(f"--init {args.init}: left out {out[1]:,} images that are evaluated on, this run {out[0]:,}; if "
             "it was trained on the others, the numbers are too high")
    if resuming(args):
        theirs = read_model_file(Path(args.out) / "last.pt", "--resume")[0]
        if (theirs["cls"], theirs["det"]) != (arch["cls"], arch["det"]):
            raise UserError(f"--resume {args.out}: was trained on other classes than the data have now")
    if args.stage == 1:
        least = 0.5 if args.backbone.startswith("tiny") else 0.08
        transform = ClassificationTransform(args.stage1_size, args.augment, True, least)
        return arch, None, ClassImages(index, transform, args.stage1_size)
    both = sum(p >= 0 for p in arch["pair"])
    if args.setup == "own" and arch["cls"] and not both and not args.overlap and not quiet:
        print("warning: no class is in both vocabularies, by name; Eq. 5 never applies. --overlap maps them",
              flush=True)
    elif args.setup == "own" and both and not args.overlap and not quiet:
        same = [arch["det"][p] for p in arch["pair"] if p >= 0]
        print(f"{both} classes are in both vocabularies by name: {', '.join(same[:8])}{' ...' * (both > 8)}",
              flush=True)
    images = None
    if args.cls_ratio:
        transform = DetectionTransform(args.cls_size, args.cls_jitter)
        images = ClassImages(index, transform, args.cls_size, both=both)
    return arch, detection_data(args, arch, records), images


def detection_data(args, arch, records):
    """CocoDataset of the classes arch["det"] under large-scale jitter. Images without a box of these are left
    out: LVIS's may be full of unlabelled ones."""
    if args.masks:
        need_outlines(records)
    data = CocoDataset(args.train_images, records, True, classes=arch["det"], canvas=args.image_size,
                       jitter=args.jitter, masks=args.masks, keep_empty=args.keep_empty)
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
        content, where = read_ilsvrc(args.val_images, args.val_boxes, quiet), args.val_boxes
    elif args.val_json is None and args.train_json:
        return None
    else:
        what = "boxes to evaluate on"
        if args.setup == "s3":
            what = "in COCO's format; the benchmark was never published, --make-split draws images for one"
        need(args.val_json, "--val-json", what)
        need(args.val_images, "--val-images", "images to evaluate on")
        if not is_localisation(args.val_json):
            return boxes_data(args, arch, quiet)
        content, where = read_json(args.val_json), args.val_json
    data = Benchmark(args.val_images, content, args.image_size, where, quiet)
    strange = sorted(set(data.names) - set(arch["cls"]))
    if strange:
        raise UserError(f"{where}: class {are(strange)} not among the classification classes of the "
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
    vocabulary = Vocabulary(arch, "cpu")
    known = vocabulary.of(records.categories)
    if not known:
        raise UserError(f"{args.val_json}: none of its classes is known to the model, by name")
    unknown = [n for n in names if n not in known]
    if unknown and not quiet:
        print(f"{args.val_json}: {len(unknown):,} of its {len(names):,} classes are not known to the model "
              f"and are not scored, first {unknown[0]}", flush=True)
    count = Counter(known.values())
    twins = sorted((k, n) for n, k in known.items() if count[k] > 1)
    if twins and not quiet:
        tell(f"{args.val_json}: {twins[0][1]} and {twins[1][1]} are one class of the model, whose boxes are "
             "scored as both" + f", and {len(twins) - 2} classes more" * (len(twins) > 2))
    free = [n for n, k in known.items() if not vocabulary.base[k]]
    several = [n for n in free if sum(n in called for called in vocabulary.known_as) > 1]
    if several and not quiet:
        print(f"{args.val_json}: {are(several)} the name of several classes of the model; the first is "
              f"scored as {vocabulary.names[known[several[0]]]}", flush=True)
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
    held = class_folders(args.cls_val)
    known = [w for w in arch["cls"] if w in held]
    if not known:  # ImageNet's archive is flat; its labels are in the XML
        if not quiet:
            print(f"--cls-val {args.cls_val}: holds no folder of a class of the model; no "
                  "accuracy", flush=True)
        return None
    if len(known) < len(arch["cls"]) and not quiet:
        lacks = sorted({*arch["cls"]} - held)
        tell(f"--cls-val {args.cls_val}: lacks {', '.join(lacks[:5])}{' ...' * (len(lacks) > 5)}; the "
             f"accuracy is of the other {len(known):,} classes")
    both = shared_classes(args.cls_val, args.cls_dir, arch["cls"])
    if both and not quiet:
        tell(f"--cls-val {args.cls_val}: {are(both)} in --cls-dir, too: the accuracy is of training images")
    index, label_of = ImageIndex(args.cls_val, known, quiet), {w: k for k, w in enumerate(arch["cls"])}
    transform = ClassificationTransform(arch["stage1_size"], arch["augment"], False)
    return ClassImages(index, transform, arch["stage1_size"], [label_of[w] for w in index.classes])


def make_pairs(data, images, args, rank, world, pin):
    """Pairs of dict(det=batch, cls=batch): --cls-ratio classification images for each detection image; a kind
    that the run does without is not there. An epoch is a pass over the detection images, in stage I over the
    others."""
    parts, repeats = {}, data.repeats if data else None
    batch = args.batch_size if data else args.stage1_batch
    size = len(data or images) if repeats is None else float(repeats.sum())
    steps = math.ceil(size / (batch * world * args.accumulate)) * args.accumulate
    if data:
        stream = Stream(len(data), batch, rank, world, args.seed, repeats, steps)
        parts["det"] = data, stream, partial(collate, divisor=data.canvas)
    if images:
        many, seed = (args.cls_ratio, args.seed + 1) if data else (1, args.seed)
        stream = Stream(len(images), batch * many, rank, world, seed, None, steps)
        parts["cls"] = images, stream, partial(collate_labelled, canvas=images.canvas)
    return Pairs(parts, args.workers, pin)


# ================================================================== train

LEGEND = dict(
    rpn_fg="RPN: object or not", rpn_box="RPN: boxes of objects",
    fg="Eqs. 1, 4: -log S_fg of objects, -log(1 - S_fg) of background", cat="Eqs. 2, 4: -log S_c of objects",
    box="smooth L1 of the boxes, of any class", mask="cross-entropy of the masks, of any class",
    cls="Eqs. 3, 4: -log S^_c of images, in stage II times --cls-weight",
    top1="percent of a step's images that g^ names right; no loss")


def plain_of(model):
    """What a checkpoint holds beside weights: enough to rebuild the model without any flag."""
    return dict(script="simple21k.py", arch=model.arch)


def resuming(args):
    """Whether last.pt takes the place of --init, whose file may be gone."""
    return args.resume and (Path(args.out) / "last.pt").exists()


def arch_before(args):
    """arch of the checkpoint that stage II starts from, or, resumed, of its last.pt; None for imagenet and
    none."""
    if args.stage != 2 or args.init in (None, "imagenet", "none"):
        return None
    if resuming(args):
        return read_model_file(Path(args.out) / "last.pt", "--resume")[0]
    return read_model_file(args.init, "--init")[0]


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
    """Stage I (or an earlier detector) into a new one: all parts that both have; prints which. g^ goes by
    wnid, so a part of the classes may go on. g is new where its classes are others.

    A backbone that does not fit is an error: a detector that silently starts from noise is the commonest
    cause of bad numbers.
    """
    arch, state = read_model_file(args.init, "--init")
    ours, new, where, every = model.arch, model.state_dict(), f"--init {args.init}", set(state)
    for key, what in (("name", "backbone"), ("head", "head")):
        if arch[key] != ours[key] and not (key == "head" and arch["gap"]):
            raise UserError(f"{where}: has {what} {arch[key]}, this run {ours[key]}")
    novel = [p for n, k in zip(ours["cls_names"], ours["pair"]) if k < 0 for p in n.split(", ")]
    tell_seen({*arch["det"]} - {*ours["det"]} if arch["stage"] == 2 else (), novel, where)
    tell_coco(arch, args)
    classifier = {k: state.pop(k) for k in ("cls.weight", "cls.bias") if k in state}
    if not (arch["gap"] or args.reinit_cls or not ours["cls"]):
        state |= classifier_of(classifier, arch["cls"], ours["cls"], where)
    if arch["det"] != ours["det"]:
        state = {k: v for k, v in state.items() if not k.startswith("det.")}
    loaded = {k: v for k, v in state.items() if k in new and v.shape == new[k].shape}
    lost = [k for k in state if k not in loaded and k.startswith(("body.", "fpn.", "head."))]
    if lost or any(k.startswith("body.") for k in new if k not in loaded):
        raise UserError(f"{where}: its backbone, FPN or head does not fit; is it a file of this version?")
    model.load_state_dict(new | loaded)
    if rank == 0:
        print(f"{where}: loaded {parts_of(loaded)} | new {parts_of(set(new) - set(loaded))} | "
              f"left out {parts_of(every - set(loaded))}", flush=True)


def tell_coco(arch, args):
    """Tells of a detector of COCO that is scored on LVIS."""
    lvis = args.setup in ("s1", "lvis") or "lvis" in str(args.val_json)
    if arch["setup"] == "s2" and arch["stage"] == 2 and lvis:
        tell("LVIS's validation images are of COCO's train2017, too, on which this checkpoint was trained: "
             "its numbers are too high")


def classifier_of(classifier, theirs, ours, where):
    """The weights of g^ for the classes `ours` out of those for `theirs`, both lists of wnids."""
    if not theirs or theirs == ours:
        return classifier
    row = {w: k for k, w in enumerate(theirs)}
    missing = [w for w in ours if w not in row]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where}: does not know class {missing[0]}{more} of --cls-dir; train stage I on "
                        "them, leave them out with --cls-list, or start the classifier anew with "
                        "--reinit-cls")
    if any(len(v) != len(theirs) for v in classifier.values()):
        raise UserError(f"{where}: its classifier has not the size of its list of {len(theirs)} classes")
    wanted = torch.tensor([row[w] for w in ours])
    return {k: v[wanted] for k, v in classifier.items()}


def parts_of(keys):
    return ", ".join(sorted({k.split(".")[0] for k in keys})) or "nothing"


def freeze_norms(body):
    """BatchNorm keeps its running statistics, weights and biases."""
    body.fixed_norms = True
    for m in body.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(False)


def make_model(args, arch, rank):
    """The Detector of the flags, as the stage begins with it: what shall not learn is frozen."""
    drop = SWIN[args.backbone][2 + args.stage] if args.backbone in SWIN else 0.0
    if args.backbone in SWIN and args.stage == 1 and args.setup == "s3":
        drop = 0.2  # Swin's recipe for ImageNet-21K
    seed_all(args.seed)
    model = new_model(arch, drop)
    if args.init == "imagenet" and not resuming(args):
        load_imagenet(model.body, args.backbone)
    elif args.init not in (None, "none") and not resuming(args):
        load_init(model, args, rank)
    if args.stage == 1:
        model.freeze_idle(args.stage1_size)
    elif arch["cls"]:
        model.cls.requires_grad_(args.cls_ratio > 0)
    if args.stage == 2 and args.bn == "frozen":
        freeze_norms(model.body)
    model.body.recompute = args.checkpoint
    return model


def make_learner(model, args):
    """The module that is trained."""
    if args.stage == 1:
        strong = args.augment == "strong"
        return StageOne(model, strong, 0.1 if strong else 0.0, args.amp == "bf16")
    return StageTwo(model, args.cls_weight, args.fg_grad_on_cls, args.amp == "bf16")


def prepare(args, model, rank, world, device):
    """The learner, its model on its device, described, compiled. From here on each process draws random
    numbers of its own."""
    model.to(device)
    fast_layout(model, device)
    pixels = args.stage1_size if args.stage == 1 else args.image_size
    example = torch.zeros(1, 3, pixels, pixels)
    describe_model(f"stage {'I' * args.stage} {args.backbone}", model, example, rank=rank)
    if world > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        model.body.compile()
    learner = make_learner(model, args).train()
    seed_all(args.seed + 1000 * rank)
    return learner


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


def parameter_groups(model, decay):
    """Weights decay; norms, biases and Swin's position biases do not."""
    weights, free = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or "relative_position_bias_table" in name:
            free.append(p)
        else:
            weights.append(p)
    return [dict(params=weights, weight_decay=decay), dict(params=free, weight_decay=0.0)]


def make_optimizer(model, recipe, lr):
    """SGD with momentum 0.9, or AdamW."""
    groups = [g | dict(base_lr=lr) for g in parameter_groups(model, recipe.weight_decay)]
    if recipe.sgd:
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, **fused())
    return torch.optim.AdamW(groups, lr=lr, **fused())


def learnt(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def rate_factor(args, it, steps):
    """Learning-rate factor of iteration `it`, `steps` an epoch. Stage I: linear warm-up, then half a
    cosine."""
    if args.stage == 2:
        milestones = (args.epochs * 3 / 4, args.epochs * 11 / 12)
        return warmup_multistep(it, steps, milestones, max(2, min(1000, args.epochs * steps // 10)))
    swin, full = args.backbone in SWIN, args.stage1_epochs * steps
    warmup = max(1, min(full // 10, steps * (20 if swin and args.setup != "s3" else 5)))
    if it < warmup:
        return (it + 1) / warmup
    least = 0.01 if swin else 0.0
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (it - warmup) / max(1, full - warmup)))


def reported(args, val, arch, epochs):
    """How a Run counts and what it reports. Neither the benchmark nor the images of stage I's accuracy, which
    in setup 2 are the benchmark's, nor LVIS's validation set nor novel labels may choose the weights that are
    reported or trained on: last.pt."""
    measured, novel = args.stage == 1 or isinstance(val, Benchmark), False
    if val is not None and not measured:
        vocabulary = Vocabulary(arch, "cpu")
        novel = not all(vocabulary.base[k] for k in vocabulary.of(val.records.categories).values())
    metric = "base " * novel + ("mask AP" if args.masks else "AP")
    last = measured or novel or args.setup in ("s1", "lvis")
    return dict(epochs=epochs, metric="top-1" if measured else metric, report="last" if last else "best",
                every=epochs if args.data == "shapes" else None, table=class_table)


def train(args, rank, world, device):
    """Train under args; returns the last evaluation's metrics (rank 0) or None."""
    arch, data, images = make_data(args, rank > 0)
    val = make_val(args, arch, rank > 0)
    open_run(args, rank, args.resume)
    detector = make_model(args, arch, rank)
    learner = prepare(args, detector, rank, world, device)
    model = wrap_ddp(learner, device, world)
    pairs = make_pairs(data, images, args, rank, world, device.type == "cuda")
    recipe = recipe_of(args)
    total_batch = recipe.batch * world * args.accumulate
    paper_batch = recipe.paper_batch
    lr = recipe.lr * total_batch / paper_batch
    optimizer = make_optimizer(detector, recipe, lr)
    run = Run(args, detector, optimizer, plain_of(detector), len(pairs), total_batch, rank, world, device,
              legend=LEGEND, **reported(args, val, arch, recipe.epochs))
    run.describe(f"from {args.init or 'none'}", lr, recipe.lr, paper_batch, *pairs.datasets, val)
    while True:
        if run.due:
            run.scored(*evaluate(detector, val, rank, world, device, args), val)
            detector.train()
        if run.finished:
            break
        for batches in run.batches(pairs, pairs):  # they are loader and plan
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
            run.step(losses, lr * factor, detector.watch)
        run.end_epoch()
    return run.close()


# ================================================================== evaluate, predict

ARCH = dict(name=str, stage=int, head=str, gap=bool, masks=bool, det=list, cls=list, cls_names=list,
            pair=list, setup=str, image_size=int, stage1_size=int, augment=str)
CHOICES = dict(stage=(1, 2), head=("2fc", "4conv1fc"), setup=tuple(SETUPS),
               augment=("plain", "weak", "strong"))


def is_backbone(name):
    return name in ("r50", *SWIN) or bool(re.fullmatch("tiny(8|16|24|32|48|64)", name))


def is_arch(arch):
    """Whether a model can be built from it, and used."""
    if not isinstance(arch, dict) or not all(type(arch.get(k)) is kind for k, kind in ARCH.items()):
        return False
    chosen = all(arch[k] in values for k, values in CHOICES.items()) and is_backbone(arch["name"])
    sized = all(32 <= arch[k] <= 2**15 and arch[k] % 32 == 0 for k in ("image_size", "stage1_size"))
    named = all(isinstance(n, str) for k in ("det", "cls", "cls_names") for n in arch[k])
    same = len(arch["cls"]) == len(arch["cls_names"]) == len(arch["pair"])
    paired = all(type(p) is int and -1 <= p < len(arch["det"]) for p in arch["pair"])
    fuse, least, most = (arch.get(k, v) for k, v in SCORED.items())
    scored = all(type(v) is float and 0 <= v <= 1 for v in (fuse, least))
    scored &= (most is None or type(most) is int and most > 0) and type(arch.get("left_out", 0)) is int
    return all((chosen, sized, named, same, paired, scored, not (arch["gap"] and arch["stage"] == 2)))


def read_model_file(path, flag):
    """(arch, state dict) of a checkpoint of this script."""
    from common.zoo import naming
    with naming(flag):
        content = load_checkpoint(path, "simple21k.py")
        arch, state = content.get("arch"), content.get("model")
        if not is_arch(arch) or not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise UserError(f"{path}: is no checkpoint of this script")
    return arch, state


def load(weights, flag="--weights"):
    """(model in eval mode, names of its V classes) of a checkpoint of ours, of either stage.

    The model is a plain module on the CPU: see predict_image. Raises UserError, one line, for whatever is
    wrong with the file; flag: what that line calls it.
    """
    arch, state = read_model_file(weights, flag)
    model = new_model(arch)
    load_strict(model, state, f"{flag} {weights}")
    return model.eval(), Vocabulary(arch, "cpu").names


def find_boxes(model, pixels, vocabulary, image_size=None, **options):
    """detect of uint8 (3, H, W), resized as for evaluation."""
    canvas = image_size or model.arch["image_size"]
    image, size = jitter_image(pixels, canvas, 1.0, random.Random(0), 0.0)
    item = dict(image=image, size=size, boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0,
                original_size=tuple(pixels.shape[1:]))
    return detect(model, collate([item], canvas), vocabulary, **options)


def predict_image(model, classes, image, score=0.1, fuse=None):
    """(boxes (N, 4) xyxy pixels of `image`, scores (N,), N names), best first, of those above `score`.

    model: of load, stage II; it may be moved to a GPU. classes: names or wnids to look for, or all that load
    gives, or None. image: a path or PIL image (turned upright as its EXIF says), or a uint8 RGB tensor
    (3, H, W). fuse: of Eq. 5 (None: the run's). Of thousands of classes none scores high.
    """
    if model.arch["stage"] == 1:
        raise UserError("model: is a classifier of stage I, which finds no boxes; train stage II from it")
    vocabulary = Vocabulary(model.arch, model.fg.weight.device)
    if isinstance(classes, str):
        raise UserError(f"classes: {classes!r} is one text; give a list of names")
    if classes is not None and list(classes) != vocabulary.names:
        vocabulary.choose(vocabulary.find(classes, "classes"))
    fuse = model.arch.get("fuse", 2 / 3) if fuse is None else fuse
    found = find_boxes(model, as_pixels(image), vocabulary, fuse=fuse, least=score, masks=False)
    return found["boxes"], found["scores"], [vocabulary.names[k] for k in found["labels"].tolist()]


def detect_options(args):
    """Keyword arguments of detect."""
    return dict(fuse=args.fuse, least=args.score_thresh, most=args.max_dets or 100, masks=args.masks,
                amp=args.amp == "bf16")


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
    """Stage I: top1 and top5 in percent; every image once, but for those that cannot be read."""
    counts = torch.zeros(3, dtype=torch.float64)
    mine = list(range(rank, len(val), world))
    batches = [[(i, 0) for i in mine[k:k + 64]] for k in range(0, len(mine), 64)]
    loader = DataLoader(val, batch_sampler=batches, num_workers=args.workers, generator=torch.Generator(),
                        worker_init_fn=start_worker, collate_fn=partial(collate_labelled, canvas=val.canvas))
    label_of = torch.tensor(val.labels, device=device)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        for line in batch["bad"]:
            print(f"left out, another of its class in its place: {line}", file=sys.stderr)
        batch = to_device(batch, device)
        logits = model.whole_image(normalise(batch), batch["image_sizes"], args.amp == "bf16")
        best = logits.topk(min(5, logits.shape[1])).indices
        hit = (best == label_of[batch["labels"]][:, None]).cpu()
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
    masks, results = val.with_masks, Detections()
    truth = val.truth(outlines=masks)
    vocabulary = Vocabulary(model.arch, device)
    category = {plain(c["name"]): c for c in truth["categories"]}
    column = vocabulary.of(truth["categories"])
    chosen = sorted(column, key=column.get)
    vocabulary.choose([column[n] for n in chosen])
    ids, names = [category[n]["id"] for n in chosen], [category[n]["name"] for n in chosen]
    options = detect_options(args) | dict(most=args.max_dets or (300 if val.lvis else 100))
    loader = eval_loader(val, rank, world, args.workers)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        found = detect(model, batch, vocabulary, **options)
        results.add(batch["image_ids"][0], found["boxes"], found["scores"], found["labels"], ids,
                    found["masks"] if masks else None)
    results.images = gather(results.images)
    if rank != 0:
        return None, None
    metrics = dict(images=len(val), line=f"{len(val)} images")
    if len(ids) < len(category):
        metrics["line"] += f", {len(ids)} of {len(category)} classes"
    base = [n for n, had_boxes in zip(names, vocabulary.base) if had_boxes]
    novel = [n for n, had_boxes in zip(names, vocabulary.base) if not had_boxes]
    for kind in ("bbox", "segm") if masks else ("bbox",):
        if val.lvis:
            stats = lvis_evaluate(truth, results, kind, ids)
        else:
            stats = coco_evaluate(truth, results, kind)
        numbers = base_and_novel(stats, base, novel)
        prefix, what = ("mask_", "masks") if kind == "segm" else ("", "boxes")
        metrics |= {prefix + k: v for k, v in numbers.items()}
        metrics["line"] += f" | {what} " + " ".join(f"{k} {v:.1f}" for k, v in numbers.items())
        metrics["classes"] = {n: m for n, m in stats["classes"].items() if n in {*base, *novel}}
    metrics["score"] = metrics[("mask_" if masks else "") + ("base_AP" if base and novel else "AP")]
    return metrics, results


def evaluate_localisation(model, val, rank, world, device, args):
    """Setups 2 and 3: localisation accuracy (Sec. 4.3) and AP50 over all classes (Sec. 4.4) by g^ alone, or
    by Eq. 5 for classes that --overlap (own data: a name) maps. Per-class AP in results.json."""
    hits, found = [], []
    vocabulary = Vocabulary(model.arch, device, only_cls=True)
    column = {w: k for k, w in enumerate(model.arch["cls"])}
    loader = eval_loader(val, rank, world, args.workers)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        i = batch["image_ids"][0]
        if len(val.boxes[val.info[i]["id"]]) == 0:
            continue  # the benchmark's image is not annotated
        d = detect(model, batch, vocabulary, **detect_options(args), best=True)
        hits.append(localise(d["best"], d["best_boxes"], d["labels"], d["boxes"], column[val.names[i]],
                             batch["boxes"][0], batch["original_sizes"][0]))
        boxes = d["boxes"].cpu()
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], d["scores"].cpu()[:, None]], 1)
        found.append((i, xywh.numpy(), d["labels"].cpu().numpy()))
    hits, found = gather(hits), gather(found)
    if rank != 0:
        return None, None
    metrics, results = localisation_metrics(hits, found, val, model.arch["cls"])
    return metrics | dict(score=metrics["top1"]), results


def evaluate_file(args, rank, world, device):
    """--eval: metrics of a checkpoint of either stage, into --out."""
    from common.pictures import write_results
    model, _ = load(args.eval, "--eval")
    args = resolve(args, model.arch)
    val = make_val(args, model.arch, rank > 0)
    if val is None and model.arch["stage"] == 2:
        raise UserError(f"--eval {args.eval}: needs --val-json and --val-images")
    if val is None:
        raise UserError(f"--eval {args.eval}: is a classifier of stage I; its accuracy needs --cls-val, a "
                        "folder with a folder of images for each class (--data shapes needs nothing)")
    tell_coco(model.arch, args)
    metrics, results = evaluate(model.to(device), val, rank, world, device, args)
    if rank == 0:
        write_results(args.out, metrics, results, val, args.eval, None, None)
        table = [class_table(metrics)] if "classes" in metrics else []
        print(*table, val.report(), metrics["line"], sep="\n")


def detector_of(args, device="cpu"):
    """(Detector, Vocabulary, flags) of --weights, --names and --classes."""
    model, _ = load(args.weights)
    if model.arch["stage"] == 1:
        raise UserError(f"--weights {args.weights}: is a classifier of stage I, which finds no boxes; train "
                        "stage II from it")
    if args.names:
        model.arch["cls_names"] = wnid_names(model.arch["cls"], None, args.names)
    vocabulary = Vocabulary(model.arch, device)
    if args.fuse is not None and not len(vocabulary.both):
        tell("--fuse has no effect: the checkpoint knows no class that is in both vocabularies")
    if args.classes:
        vocabulary.choose(vocabulary.find(class_names(args.classes)))
    return model.to(device), vocabulary, resolve(args, model.arch)


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file; masks as RLE) and one picture per image
    into --out."""
    from common.pictures import Pictures
    model, vocabulary, args = detector_of(args, device)
    for picture in Pictures(args.predict, args.out, args.score):
        found = find_boxes(model, picture.pixels, vocabulary, args.image_size, **detect_options(args))
        picture.save(found["boxes"], found["scores"], found["labels"], vocabulary.names, found["masks"])


class Exported(nn.Module):
    """What --export writes: uint8 RGB (B, 3, H, W), resized, then padded right and bottom to the square of
    training with the mean pixel (124, 116, 104) -> boxes (B, R, 4) xyxy pixels, scores (B, R, V) by Eq. 5,
    both before the NMS of each class; proposals (B, R, 4). R is what the RPN gives at most; what it gave less
    scores 0.

    The steps of Detector.proposals and detect, in shapes that do not depend on what is found. Boxes are cut
    to the square, where detect cuts them to the picture.
    """

    def __init__(self, model, vocabulary, fuse=2 / 3):
        super().__init__()
        self.model, self.vocabulary, self.fuse = model, vocabulary, fuse

    def candidates(self, maps, height, width):
        """(boxes (B, N, 4), scores (B, N), levels (N,)): the RPN's best of each level before its NMS."""
        rpn, boxes, scores, levels = self.model.rpn, [], [], []
        maps = [*maps.values(), maps[3][:, :, ::2, ::2]]  # LastLevelMaxPool
        for k, (logits, deltas) in enumerate(zip(*rpn.head(maps))):
            batch, _, h, w = logits.shape  # not len(), which torch.export takes for a constant
            device = logits.device  # strides as torchvision's: of the last level they may be no power of two
            y, x = torch.meshgrid(torch.arange(h, device=device) * (height // h),
                                  torch.arange(w, device=device) * (width // w), indexing="ij")
            corner = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
            anchors = (corner + rpn.anchor_generator.cell_anchors[k].to(device)).reshape(-1, 4)
            logits = logits.permute(0, 2, 3, 1).flatten(1)
            deltas = deltas.reshape(batch, -1, 4, h, w).permute(0, 3, 4, 1, 2).reshape(batch, -1, 4)
            value, place = logits.topk(torch.sym_min(rpn.pre_nms_top_n(), logits.shape[1]), 1)
            deltas = deltas.gather(1, place[..., None].expand(-1, -1, 4))
            decoded = rpn.box_coder.decode_single(deltas.reshape(-1, 4), anchors[place].reshape(-1, 4))
            boxes.append(decoded.reshape(batch, -1, 4))
            scores.append(value.sigmoid())
            levels.append(torch.full_like(place[0], k))
        boxes = torch.cat(boxes, 1)
        x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
        boxes = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)
        return boxes, torch.cat(scores, 1), torch.cat(levels)

    def proposals(self, maps, height, width):
        """(RoIs (B, R, 4), whether there is one (B, R)): one NMS for all levels and images, moved apart."""
        boxes, scores, levels = self.candidates(maps, height, width)
        batch, n = scores.shape
        images = torch.arange(batch, device=boxes.device)
        large = (boxes[..., 2:] - boxes[..., :2]).amin(-1) >= self.model.rpn.min_size
        scores = torch.where(large, scores, -1.0).flatten()
        shift = (levels + 5 * images[:, None]).flatten()[:, None] * (height + width)
        keep = nms(boxes.reshape(-1, 4).double() + shift, scores.double(), self.model.rpn.nms_thresh)
        most = self.model.rpn.post_nms_top_n()
        mine = (keep[:, None] // n == images).long()
        rank = (mine.cumsum(0) * mine).sum(1) - 1           # of a box in its image
        rank = torch.where(scores[keep] >= 0, rank.clamp(max=most), most)
        table = torch.zeros(batch * (most + 1), dtype=torch.long, device=boxes.device)
        table = table.scatter(0, keep // n * (most + 1) + rank, keep + 1).reshape(batch, -1)[:, :most]
        return boxes.reshape(-1, 4)[(table - 1).clamp(min=0)], table > 0

    def pool(self, maps, rois):
        """`pool`, of all RoIs from all levels."""
        area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
        levels = level_of(area.clamp(min=1e-6).sqrt(), self.model.canonical)
        parts = [align_rois(m, rois, k, 7) * (levels == k)[:, None, None, None] for k, m in maps.items()]
        return sum(parts)

    def forward(self, images):
        model, (height, width) = self.model, images.shape[-2:]
        mean, std = MEAN.to(images.device), STD.to(images.device)
        maps = model.features((images / 255 - mean) / std)
        found, there = self.proposals(maps, height, width)
        batch, most = there.shape
        image = torch.arange(batch, device=found.device)[:, None, None].expand(-1, most, 1).to(found)
        h = model.head(self.pool(maps, torch.cat([image, found], 2).reshape(-1, 5)))
        boxes = CODER.decode_single(model.box(h), found.reshape(-1, 4))
        x, y = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
        boxes = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1).reshape(batch, most, 4)
        there = there & ((boxes[..., 2:] - boxes[..., :2]) > 0.01).all(-1)
        scores = log_scores(model, h, self.vocabulary, self.fuse).exp().reshape(batch, most, -1)
        return boxes, scores * there[..., None], found


def export(args):
    """--export: the detector as a torch.export (.pt2) or ONNX (.onnx) program; --classes: of these only."""
    from common.export import export_program
    model, vocabulary, args = detector_of(args)
    if model.arch["name"] in SWIN:
        raise UserError("--export: torch.export would fix the size of pictures, whose windows Swin pads")
    export_program(Exported(model, vocabulary, args.fuse), args.export, ("boxes", "scores"), vocabulary.names)


# ================================================================== flags

EXAMPLES = """
torchrun --nproc_per_node 8 simple21k.py --setup s2 --out runs/s2      # COCO + ImageNet-1K, both stages
python simple21k.py --data shapes                                      # everything in minutes on a CPU
python simple21k.py --predict photo.jpg --weights runs/s2/stage2/last.pt
"""
# Table 2: mask AP / base / novel. 3: localisation top-1 / top-5 / GT-known. 4: AP50 / top-1 / top-5, which
# may be our top5_boxes. 5: box AP / r / c / f. None of them was run here.
ROWS = rows("""
    t2-r50          27.6/29.1/22.8  S1
    t2-r50-reform   26.8/28.4/21.8  S1 --stage1-head gap
    t2-r50-no1      15.5/16.3/13.0  S1 --stage 2 --init none  # random weights; --init imagenet: torchvision's
    t2-swin_t       30.4/30.9/28.8  S1 --backbone swin_t
    t2-swin_s       35.1/36.5/30.6  S1 --backbone swin_s
    t3-r50          64.7/69.9/73.8  --setup s2
    t3-r50-reform   60.8/62.1/69.9  --setup s2 --stage1-head gap
    t3-r50-no1      50.4/51.3/71.0  --setup s2 --stage 2 --init none
    t3-swin_t       66.5/72.6/73.9  --setup s2 --backbone swin_t
    t3-swin_s       68.3/78.5/75.1  --setup s2 --backbone swin_s
    t4              6.9/19.2/19.7   --setup s3 --backbone swin_b
    t5-classifier   35.8/23.6/36.1/40.9  --setup lvis --init runs/simple21k-t4/stage1/last.pt  # row t4 first
    boxes           -               --setup s3 --stage 2 --cls-ratio 0 --init runs/simple21k-t4/stage1/last.pt
    t5-successive   38.8/26.8/38.9/44.0  --setup lvis --init runs/simple21k-boxes/last.pt  # row boxes first
    t5              40.1/28.8/40.2/45.0  --setup lvis --init runs/simple21k-t4/stage2/last.pt  # row t4 first
    lr-1e-3         -               AGAIN --lr 1e-3  # row t3-r50 first; searched: 3e-4, ours, 1e-3, 3e-3
    lr-3e-3         -               AGAIN --lr 3e-3
    weight-0.01     -               AGAIN --cls-weight 0.01  # searched: 0.01, 0.1, ours, 1
    weight-1        -               AGAIN --cls-weight 1
    eq5-g           -               --eval T2 --setup s1 --fuse 1  # row t2-r50 first, which has 2/3
    eq5-g^          -               --eval T2 --setup s1 --fuse 0
    """, T2="runs/simple21k-t2-r50/stage2/last.pt",
            AGAIN="--setup s2 --stage 2 --init runs/simple21k-t3-r50/stage1/last.pt",
            S1="--setup s1 --wordnet /usr/share/wordnet/index.noun")
STAGE1 = "stage1_epochs stage1_batch stage1_lr stage1_size augment stage1_head cls_val"
STAGE2 = """image_size keep_empty masks bn reinit_cls cls_ratio cls_weight cls_size jitter cls_jitter
    fg_grad_on_cls fuse score_thresh max_dets epochs batch_size lr weight_decay rfs"""
IMAGES2 = "cls_weight cls_size cls_jitter fg_grad_on_cls"  # of classification images in stage II
LABELLED = (*(k for k, setup in SETUPS.items() if setup.cls != "none"), None)
COMPLETE = ("s2", "s3", "own", None)  # setups whose images without boxes are negatives, as LVIS's are not
# flags, the flag that gives them an effect, its values
BELONGS = (
    (STAGE1, "stage", (1, None)),
    (STAGE2, "stage", (2, None)),
    ("wordnet", "setup", ("s1",)),
    ("names", "setup", ("s2", "s3", "own", None)),  # s1: LVIS's own
    ("keep_empty", "setup", COMPLETE),
    (f"{STAGE1} {IMAGES2} cls_dir cls_list overlap cls_ratio reinit_cls fuse", "setup", LABELLED),
    ("data_seed table", "data", ("shapes",)))
SEEN = "masks fuse score_thresh max_dets"
MODES = dict(eval=f"data data_seed workers setup cls_val val_json val_images val_boxes {SEEN}",
             predict="weights score names classes masks fuse max_dets", export="weights names classes fuse",
             make_split="data data_seed cls_dir cls_list setup seed")


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
    setups = "; ".join(f"{k}: {setup.about}" for k, setup in SETUPS.items())
    g.add_argument("--setup", choices=tuple(SETUPS), help=f"{setups} (default s2; shapes, --train-json: own)")
    g.add_argument("--data", default="data", help="root of coco/, lvis/, objects365/, imagenet/, "
                   "imagenet21k/; or 'shapes': the embedded dataset")
    g.add_argument("--data-seed", type=number(int, 0, 2**31), default=0, help="of the embedded dataset")
    g.add_argument("--cls-dir", metavar="DIR", help="a folder or .tar of images for each class, sub-folders "
                   "belong to it (default: the setup's)")
    g.add_argument("--cls-list", metavar="FILE", help="keep only these classes of it: first word of each "
                   "line")
    g.add_argument("--cls-val", metavar="DIR", help="folder of the same kind for stage I's accuracy, or "
                   "the word none (default: the setup's, if it is there and --cls-dir not given)")
    g.add_argument("--val-boxes", metavar="DIR", help="instead of --val-json: folder of ILSVRC XML. "
                   "(--val-json may be a localisation set, too: images with category_id)")
    g.add_argument("--names", metavar="FILE", help="names of the wnids: wnid, tab, name (default: "
                   "classes.json in or beside --cls-dir, else the wnids)")
    g.add_argument("--wordnet", metavar="FILE", help="WordNet 3.0's index.noun: which LVIS class is which "
                   "wnid (setup s1)")
    g.add_argument("--overlap", metavar="FILE", help="json {detection class: wnid} of classes that both "
                   "vocabularies hold (default: s1 WordNet, own by name)")
    g.add_argument("--make-split", metavar="FILE", help="write a localisation set of --cls-dir, 5 images of "
                   "a class, to be annotated (Sec. 4.1), and stop")
    g = p.add_argument_group("model")
    g.add_argument("--backbone", help="r50, swin_t, swin_s, swin_b or tiny8 ... tiny64 (default r50, shapes "
                   "tiny16; stage II: as --init)")
    g.add_argument("--head", choices=CHOICES["head"], help="shared RoI head (default 2fc; stage II: as "
                   "--init)")
    g.add_argument("--masks", action=argparse.BooleanOptionalAction, help="class-agnostic mask head, Mask "
                   "R-CNN (default: setup s1)")
    g.add_argument("--bn", choices=("frozen", "sync"), help="BatchNorm in stage II: running statistics, or "
                   "the batch's, on GPUs that of all processes (default frozen; --init none: sync)")
    g = p.add_argument_group("method")
    g.add_argument("--stage", type=int, choices=CHOICES["stage"], help="1: the classifier; 2: the detector, "
                   "from --init (default: both, in OUT/stage1 and OUT/stage2; with --init 2)")
    g.add_argument("--init", help="stage II: a checkpoint of stage I, imagenet or none (random: the row "
                   "'-stage I'); stage I: imagenet or none (default none)")
    g.add_argument("--reinit-cls", action="store_true", help="stage II: the classifier of stage I is not "
                   "loaded")
    g.add_argument("--stage1-head", choices=("roi", "gap"), default="roi", help="the detector's head on a "
                   "whole-image RoI, or average pooling and one linear layer ('-reform')")
    g.add_argument("--cls-ratio", type=number(int, 0, 2**15), default=3, help="classification images for "
                   "each detection image; 0: boxes only")
    g.add_argument("--cls-weight", type=number(), help="weight of the classification loss, searched in 0.01, "
                   "0.1, 1 (default 0.1; tiny 1)")
    g.add_argument("--cls-size", type=side, help="stage II: canvas of the classification images (default: "
                   "--image-size; tiny half of it)")
    g.add_argument("--jitter", type=scales, help="large-scale jitter: smallest and largest scale (default "
                   "0.1,2.0; tiny 0.7,1.6)")
    g.add_argument("--cls-jitter", type=scales, help="that of the classification images; 1,1: none (default: "
                   "as --jitter; tiny 0.2,1.0)")
    g.add_argument("--fg-grad-on-cls", action="store_true", help="the foreground score learns from "
                   "classification images, too (not the paper: should hurt)")
    g.add_argument("--fuse", type=number(float, 0, 1), help="Eq. 5: share of the detection classifier where "
                   "both know a class; 0, 1: one of them alone (default 2/3; of a checkpoint: its run's)")
    g.add_argument("--score-thresh", type=number(float, 0, 1), help="boxes below this score are dropped "
                   "(default 1e-4; of a checkpoint: its run's)")
    g.add_argument("--max-dets", type=COUNT, help="boxes of an image (default 100; evaluation on LVIS 300; "
                   "of a checkpoint: its run's)")
    g.add_argument("--classes", action="append", metavar="NAMES", help="--predict, --export: only these "
                   "names or wnids: with commas between them, or the flag for each, or a file, one a line")
    g = p.add_argument_group("schedule")
    g.add_argument("--stage1-epochs", type=COUNT, help="(default r50 100, Swin 300, with ImageNet-21K 100; "
                   "tiny 15)")
    g.add_argument("--stage1-batch", type=COUNT, help="images per process and pass (default r50 32, Swin "
                   "128; tiny 64)")
    g.add_argument("--stage1-lr", type=POSITIVE, help="for 256 images (r50, SGD, 0.1), 1,024 (Swin, AdamW, "
                   "1e-3, s3 2.5e-4) or 64 (tiny, AdamW, 1e-3), scaled linearly")
    g.add_argument("--stage1-size", type=side, help="pixels of a side (default 224; tiny 96)")
    g.add_argument("--augment", choices=CHOICES["augment"], help="stage I: plain: crop, flip; weak: and "
                   "colours; strong: crop, flip, RandAugment, Mixup, CutMix, erasing, smoothing 0.1 (default "
                   "weak; Swin strong; tiny plain)")
    g.add_argument("--epochs", type=COUNT, help="stage II, of the detection images (default 36; s3 12; lvis "
                   "24; tiny 3)")
    g.add_argument("--batch-size", type=COUNT, help="stage II: detection images per process and step "
                   "(default 2; tiny 4)")
    g.add_argument("--lr", type=POSITIVE, help="stage II, for 16 detection images; the paper searches 3e-4, "
                   "1e-3, 3e-3 (default 3e-4; lvis 1e-4; tiny 4e-3)")
    g.add_argument("--weight-decay", type=number(), default=0.05, help="stage II")
    g.add_argument("--rfs", type=number(), help="repeat-factor sampling threshold, for long-tailed boxes; 0: "
                   "off (default lvis 0.001, else 0)")
    g.add_argument("--image-size", type=side, help="canvas of stage II and of evaluation: the long side "
                   "(default 1024; tiny 256)")
    g.add_argument("--checkpoint", action="store_true", help="gradient checkpointing: the backbone's stages "
                   "are computed twice and not kept")
    g.add_argument("--table", action=argparse.BooleanOptionalAction, help="shapes: stage II on boxes only, "
                   "and on both, in one table (default, but for other data, stages, losses, and --max-iters)")
    run_flags(p, "simple21k", aliases={"train-json": "det-json", "train-images": "det-images"}, rows=ROWS,
              export=True)
    p.set_defaults(score=0.1)  # of thousands of classes none scores high
    args = parse(p, argv, "simple21k", MODES, only="weights score classes", belongs=BELONGS,
                 apart=("val_json val_boxes", "overlap wordnet"), saved=flags_of_run, rows=ROWS)
    refuse(p, args, given_flags(p, argv))
    return args


def refuse(p, args, given):
    """Stops with a line where flags contradict each other, or have no effect for a reason that no table
    tells."""
    if args.data == "shapes" and args.setup not in (None, "own"):
        p.error(f"--setup {args.setup}: --data shapes has its own")
    if args.make_split and Path(args.make_split).exists():
        p.error(f"--make-split {args.make_split}: exists; its boxes are somebody's work: choose another file")
    if args.eval or args.predict or args.export or args.make_split:
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
    for flag in IMAGES2.split():
        if args.cls_ratio == 0 and flag in given:
            p.error(f"{dash(flag)}: has no effect with --cls-ratio 0, boxes only")
    for flag in STAGE1.split():
        if args.init and not args.stage and flag in given:
            p.error(f"{dash(flag)}: belongs to stage I; --init {args.init} is where stage II starts")
    if "head" in given and args.stage == 1 and args.stage1_head == "gap":
        p.error("--head: belongs to --stage1-head roi, or to stage II")
    setup = args.setup or ("own" if args.data == "shapes" or args.train_json else "s2")
    if "fuse" in given and SETUPS[setup].pair == "none" and not args.overlap:
        p.error(f"--fuse: in setup {setup} no class is known to be in both vocabularies; --overlap tells")
    if args.table and not fits_table(args):
        p.error("--table: trains both stages on shapes as they are, stage II on boxes and on both kinds of "
                "images; leave out --stage, --init, --reinit-cls, --cls-ratio 0 and data of your own")


def fits_table(args):
    """Whether the two detectors of the table differ as it says, and are scored on the drawn images."""
    own = args.train_json or args.val_json or args.val_boxes or args.cls_dir or args.cls_val
    return not (args.stage or args.init or args.reinit_cls or args.cls_ratio == 0 or own)


def flags_of_run(args):
    """Flags of the run in args.out, which --resume continues. A run of both stages has them in its folders.
    Paths that were the setup's are left out, and those that are given now: --data may have moved."""
    there = [Path(args.out) / folder / "last.pt" for folder in ("", "stage2", "stage1")]
    there = [path for path in there if path.exists()]
    if not there:
        return saved_run(args, "simple21k.py", "stage1_head")
    flags = saved_flags(there[0], "simple21k.py")
    if not {"setup", "augment", *PATHS} <= set(flags):
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


SHAPES = dict(val=600, labelled=400)  # images of --data shapes: of validation, of each class with labels


def default_paths(args, setup):
    """{flag: where the setup's file lies}, without what own data replace."""
    root, val = Path(args.data), "val"
    if args.data == "shapes":
        from common.shapes import make_shapes
        root, val = make_shapes(seed=args.data_seed, **SHAPES), "valall"
    paths = {flag: str(root / path.format(val=val)) for flag, path in SETUPS[setup].paths.items()}
    replaced = set()
    if setup == "own" and args.train_json:  # somebody's own data: do not measure them on others'
        replaced |= {"val_json", "val_images"}
    if args.cls_dir or not (root / "imagenet/val").is_dir():
        replaced.add("cls_val")
    if args.val_json or args.val_boxes:
        replaced |= {"val_json", "val_boxes"}
    return {flag: path for flag, path in paths.items() if flag not in replaced}


def default_schedule(backbone, setup):
    """{flag: value} of what depends on the backbone and the setup."""
    row = SETUPS[setup]
    if backbone.startswith("tiny"):
        return dict(stage1_epochs=15, stage1_batch=64, stage1_lr=1e-3, stage1_size=96, augment="plain",
                    epochs=3, batch_size=4, lr=4e-3, image_size=256, jitter=(0.7, 1.6), cls_jitter=(0.2, 1.0),
                    cls_weight=1.0, masks=row.masks, rfs=row.rfs)
    found = dict(stage1_epochs=100, stage1_batch=32, stage1_lr=0.1, stage1_size=224, augment="weak",
                 epochs=row.epochs, batch_size=2, lr=row.lr, image_size=1024, jitter=(0.1, 2.0),
                 cls_weight=0.1, masks=row.masks, rfs=row.rfs)
    if backbone in SWIN:
        found.update(stage1_epochs=300, stage1_batch=128, stage1_lr=1e-3, augment="strong")
    if backbone in SWIN and setup == "s3":  # its recipe for ImageNet-21K
        found.update(stage1_epochs=100, stage1_lr=2.5e-4)
    return found


def resolve(args, trained=None):
    """The flags of a stage, args.stage, with every default that depends on another flag; after this they are
    only read: what is given, else what the checkpoint had, else the setup's and the backbone's.

    trained: arch of the checkpoint of --eval or --predict, which see images as its training did.
    """
    shapes, before = args.data == "shapes", None
    if trained:
        backbone, head, setup = trained["name"], trained["head"], args.setup or trained["setup"]
    else:
        if not (args.backbone and args.head):
            before = arch_before(args)
        backbone = args.backbone or (before or {}).get("name") or ("tiny16" if shapes else "r50")
        head = args.head or (before["head"] if before and not before["gap"] else "2fc")
        setup = args.setup or ("own" if shapes or args.train_json else "s2")
    if not is_backbone(backbone):
        raise UserError(f"--backbone {backbone}: choose among r50, {', '.join(SWIN)}, tiny8 ... tiny64")
    found = default_schedule(backbone, setup) | default_paths(args, setup) | SCORED
    if backbone == "r50":
        found["bn"] = "sync" if args.init == "none" else "frozen"
    if trained:
        found.update({k: trained[k] for k in ("image_size", *SCORED) if k in trained})
    found |= {k: v for k, v in vars(args).items() if v is not None or k not in found}
    found.update(backbone=backbone, head=head, setup=setup)
    if trained:
        found.update(masks=trained["masks"] and args.masks is not False)
    if args.predict:
        found.update(score_thresh=max(SCORED["score_thresh"], args.score))
    if SETUPS[setup].cls == "none":
        found.update(cls_ratio=0)
    small = found["image_size"] // 64 * 32 if backbone.startswith("tiny") else found["image_size"]
    found["cls_size"] = found["cls_size"] or max(32, small)
    found["cls_jitter"] = found["cls_jitter"] or found["jitter"]
    args = argparse.Namespace(**found)
    if not trained:
        check_model(args)
    return args


def check_model(args):
    """Stops where flags do not fit the backbone, before anything is read."""
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

def of_stage(args, stage, out, **more):
    """The flags of one stage, in a folder of its own."""
    resume = args.resume and (Path(out) / "last.pt").exists()
    more = dict(stage=stage, out=str(out), table=False, resume=resume) | more
    return argparse.Namespace(**vars(args) | more)


def train_stage(args, rank, world, device):
    """train. On a CPU stage I leaves cores to its loaders, which read many images a step: a step is a quarter
    faster."""
    threads = torch.get_num_threads()
    if args.stage == 1 and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, threads - args.workers))
    try:
        return train(args, rank, world, device)
    finally:
        torch.set_num_threads(threads)


def train_both(args, rank, world, device):
    """Stage I and II one after the other in OUT/stage1 and OUT/stage2. Metrics of the second, on rank 0. What
    stage II needs is looked at before stage I begins."""
    out = Path(args.out)
    first = resolve(of_stage(args, 1, out / "stage1", init=None))
    parts = dict(backbone=first.backbone, head=first.head)  # not from --init: that file is still to come
    second = resolve(of_stage(args, 2, out / "stage2", init=str(out / "stage1" / "last.pt"), **parts))
    if not args.resume:
        if rank == 0 and holds_run(second.out):
            raise UserError(f"--out {out}: holds a run already; choose another folder, --resume it, or "
                            "delete it")
        before = make_data(first, quiet=True)[0]
        arch = make_data(second, True, before)[0]
        make_val(second, arch, quiet=True)
    train_stage(first, rank, world, device)
    return train_stage(second, rank, world, device)


def shapes_stage1(args, rank, world, device):
    """(path, metrics) of stage I for shapes: as it is ready, see trained_before, or as the flags want it."""
    from common.tiny import trained_before
    flags = parse_args(f"--data shapes --data-seed {args.data_seed} --workers {args.workers}".split())
    flags.resume = True  # where it was stopped
    stage = lambda flags, out: resolve(of_stage(flags, 1, out, init=None))
    mine, plain = (stage(a, Path(args.out) / "stage_I") for a in (args, flags))
    named = f"backbone head bn max_iters cls_dir cls_list seed {STAGE1}".split()
    if any(getattr(mine, k) != getattr(plain, k) for k in named):
        return f"{mine.out}/last.pt", train_stage(mine, rank, world, device)
    flags.stage1_batch = max(1, plain.stage1_batch // world)
    path = trained_before(f"simple21k-{plain.backbone}-e{plain.stage1_epochs}", args.data_seed, rank,
                          lambda out: train_stage(stage(flags, out), rank, world, device), **SHAPES)
    model, _ = load(path)
    val = make_val(mine, model.arch, rank > 0)
    return path, evaluate(model.to(device), val, rank, world, device, mine)[0]


def quick_start(args, rank, world, device):
    """--data shapes: stage I, and stage II on boxes only and on images, too, in one table and one picture.
    Six classes of the embedded dataset have no boxes in training, only image labels."""
    open_table(args, rank)
    since, lines, out = time.time(), [], Path(args.out)
    init, m = shapes_stage1(args, rank, world, device)
    if rank == 0:
        lines.append(f"{'stage I':20s} {m['top1']:42.1f} {time.time() - since:9.0f}")
    runs = {"boxes only": dict(cls_ratio=0), "simple21k": {}}
    for name, more in runs.items():
        since = time.time()
        flags = resolve(of_stage(args, 2, out / name.replace(" ", "_"), init=init, **more))
        m = train_stage(flags, rank, world, device)
        if rank == 0:
            cells = f"{m['base_AP']:8.1f} {m['base_AP50']:5.1f} {m['novel_AP']:9.1f} {m['novel_AP50']:5.1f}"
            lines.append(f"{name:20s} {cells:42s} {time.time() - since:9.0f}")
    if rank == 0:
        print("\nshapes                base AP  AP50  novel AP  AP50  accuracy   seconds", *lines, sep="\n")
        print("base: boxes in training; novel: image labels only. Eq. 5 mixes a third of g^ into base\n"
              "scores, also of one that was not trained on: compare the novel columns")
        from common.pictures import save_comparison
        arch = read_model_file(out / "simple21k" / "last.pt", "--out")[0]
        found = {name: out / name.replace(" ", "_") / "detections.json" for name in runs}
        novel = [name for name in arch["cls"] if name not in arch["det"]]
        page = save_comparison(make_val(flags, arch, True), found, out, novel)
        print(f"ground truth, and what each finds: {page}")


def make_split(args):
    """--make-split, Sec. 4.1: a localisation set of --cls-dir in COCO's format, without boxes."""
    need(args.cls_dir, "--cls-dir", "the folders to draw from")
    if not Path(args.make_split).parent.is_dir():
        raise UserError(f"--make-split {args.make_split}: its folder does not exist")
    split = draw_split(ImageIndex(args.cls_dir, read_class_list(args.cls_list)), args.seed)
    write_whole(args.make_split, json.dumps(split))
    print(f"{len(split['images']):,} images of {len(split['categories']):,} classes, seed {args.seed} -> "
          f"{args.make_split}; annotations (image_id, category_id, bbox) are still to be made")


def main():
    with started("simple21k.py") as (rank, world, device):
        args = parse_args()
        if args.eval or args.predict:
            answer_folder(args.out, rank)
        alone = [dash(flag) for flag in ("predict", "export", "make_split") if getattr(args, flag)]
        if alone and world > 1:
            raise UserError(f"{alone[0]}: runs in one process; start it with python")
        table = args.table
        if table is None:
            table = args.data == "shapes" and fits_table(args) and not args.max_iters
        if args.make_split:
            make_split(resolve(args))
        elif args.eval:
            evaluate_file(args, rank, world, device)
        elif args.predict:
            predict(args, device)
        elif args.export:
            export(args)
        elif table:
            quick_start(args, rank, world, device)
        elif args.stage or args.init:
            train_stage(resolve(of_stage(args, args.stage or 2, args.out)), rank, world, device)
        else:
            train_both(args, rank, world, device)


if __name__ == "__main__":
    main()
