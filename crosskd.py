"""CrossKD: the teacher's head reads the student's features (Wang et al., CVPR 2024, arXiv:2306.11369).

Idea. A student that must copy the teacher AND fit the labels with the same layer gets contradictory gradients.
CrossKD distils elsewhere: the student's i-th head feature f_i^s is sent through the REST of the frozen teacher
head, C_{i+1}^t ... C_5^t, and these cross-head predictions must equal the teacher's own. The labels act on the
student's own predictions, as without a teacher. In code: (1) student forward, keeping f_i of both towers;
(2) teacher forward without gradient, same; (3) phi gives each channel of f_i^s the mean and deviation of f_i^t;
(4) teacher head from block i + 1 on; the gradient passes THROUGH its frozen layers to the student's blocks <= i,
its FPN and backbone, and never reaches the student's later layers; (5) loss = detection loss + distance between
cross-head and teacher predictions. At test time the student is a plain detector: nothing is added to it.

Letters: B images, C channels, H W size, L = 5 levels, A anchors or points of all levels, M boxes (padded),
K classes, R = 17 bins of a box edge; prefix t_ teacher, s_ student, cross_ cross-head. Boxes xyxy pixels.

Differs from the paper (arXiv v1). Where text and released code disagree, the code is followed, since it made the numbers:
  1. phi (statistics per level, tower and channel) is not in the paper. --align post|pre|none. The code takes f_i
     after its ReLU (an in-place ReLU overwrites what it meant to keep): post is the default.
  2. Eq. 3, box branch: paper S = foreground indicator; code S = teacher's top class score. --kd-reg-mask soft|fg.
  3. FCOS: paper GIoU and i = 3; code -ln IoU, i = 2, weights 0.4 / 0.75. ATSS: the code adds a centerness term.
  4. RetinaNet students make P6 from P5, their teachers from C5, as in the code.
and from the code:
  5. Normalisers are means over all processes (two of the code's are local: GFL's sum of S, RetinaNet's positives), and
     their lower bound of 1 holds for the sum over processes, not the mean. FCOS distillation divides by at least 1.
     Statistics of phi and PKD are local, as in the code; --sync-stats makes them global.
  6. Not published, our choice: strategies b-d (a figure only), the LD rows (--method ld joins mmdetection's box term and
     the LD authors' class term, main region; --method mimic is i = n with CrossKD's own losses), the weight of PKD
     alone (that of CrossKD+PKD), MobileNetV2 (torchvision's weights, BatchNorm frozen, nothing else).

    torchrun --nproc_per_node 8 crosskd.py --teacher gfl_r101                       # GFL R101 -> R50, 12 epochs, data/coco
    torchrun --nproc_per_node 8 crosskd.py --teacher gfl_r50 --student gfl_r18      # the paper's ablation setting
    torchrun --nproc_per_node 8 crosskd.py --teacher fcos_r101                      # also atss_r101, retinanet_r101, ...
    torchrun --nproc_per_node 8 crosskd.py --student gfl_r50 --method none          # the plain detector
    python crosskd.py --data shapes                                                # everything in minutes on a CPU
    python crosskd.py --eval gfl_r101
    python crosskd.py --predict photo.jpg --weights runs/crosskd/best.pt
Every table row of the paper has its command in README.md.

Expected, COCO val2017 AP (paper; 8 GPUs x 2 images, 12 epochs): GFL R50 teacher 40.2, R18 alone 35.8, CrossKD 38.7;
GFL R101 teacher 44.9, R50 alone 40.2, CrossKD 43.7, with PKD 43.9. Measured here: COCO not run; shapes: README.md.
"""
import argparse
import os
import re
import sys
import time
from functools import partial
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

from common.boxes import (assign_atss, assign_fcos, assign_max_iou, cells_inside, centerness_target, constant, decode_deltas,
                          decode_distances, encode_deltas, encode_distances, grid_anchors, grid_points, overlap)
from common.datasets import CocoDataset, collate, eval_loader, find_coco, own_files, parse_image_size, resize, train_loader
from common.evaluation import class_table, coco_evaluate, to_coco_results
from common.run import (COUNT, POSITIVE, Run, UserError, answer_folder, describe_model, gather, load_strict, made_once,
                        number, open_run, parse, parser, rebuilding, reduce_mean, run_flags, seed_all, started,
                        warmup_multistep, wrap_ddp)

STRIDES = (8, 16, 32, 64, 128)
METHODS = ("none", "crosskd", "mimic", "ld", "pkd", "fitnet")


# ================================================================== model: backbone and pyramid

def fp32(x):
    """bf16 maps of autocast -> fp32, in which all statistics and losses are computed; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Body(nn.Module):
    """The stages of a torchvision classifier up to the last tap, run in order; returns {name: map} of the taps.

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


BACKBONES = {"r18": "resnet18", "r34": "resnet34", "r50": "resnet50", "r101": "resnet101", "mnv2": "mobilenet_v2", "swint": "swin_t"}


def make_body(name, caffe=False, init="none"):
    """(Body, its three channel counts) of r18|r34|r50|r101|swint|mnv2|tinyN; init "imagenet" downloads its weights."""
    if name.startswith("tiny"):
        from common.tiny import NarrowResNet
        if init == "imagenet":
            raise UserError(f"backbone {name}: has no ImageNet weights; use --init none")
        width = int(name[4:])
        net, taps, channels = NarrowResNet(width), ("layer2", "layer3", "layer4"), [2 * width, 4 * width, 8 * width]
    else:
        net = getattr(torchvision.models, BACKBONES[name])(weights=None)
        taps, channels = ("layer2", "layer3", "layer4"), [128, 256, 512] if name in ("r18", "r34") else [512, 1024, 2048]
        if name == "mnv2":
            taps, channels = ("6", "13", "18"), [32, 96, 1280]
        if name == "swint":
            taps, channels = ("3", "5", "7"), [192, 384, 768]
    if init == "imagenet":
        from common.zoo import imagenet_state
        (state, url), own = imagenet_state(BACKBONES[name], caffe=caffe), net.state_dict()
        state = {k: v for k, v in state.items() if k in own}
        missing = [k for k in own if k not in state and not k.startswith(("fc.", "classifier.", "head."))
                   and not k.endswith("num_batches_tracked")]
        if missing:
            raise UserError(f"{url}: lacks {len(missing)} keys of {name}, first {missing[0]}")
        net.load_state_dict(state, strict=False)
    if name == "swint":
        from common.zoo import always_shift
        always_shift(net)  # as mmdetection, whose weights the teacher has; torchvision does not on small maps
    if caffe:  # the stride of a stage sits in its first 1x1 convolution
        for stage in (net.layer2, net.layer3, net.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    norms = {t: nn.LayerNorm(c) for t, c in zip(taps, channels)} if name == "swint" else None
    return Body(list(getattr(net, "features", net).named_children()), taps, norms), channels


class P6P7(ExtraFPNBlock):
    """P6 and P7 by stride-2 convolutions, from C5 ("on_input") or P5 ("on_output"); only FCOS has a ReLU between.
    (torchvision's LastLevelP6P7 always has it.)"""

    def __init__(self, c5_channels, channels, source, relu):
        super().__init__()
        self.source, self.relu = source, relu
        self.p6 = nn.Conv2d(c5_channels if source == "on_input" else channels, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, results, x, names):
        p6 = self.p6(x[-1] if self.source == "on_input" else results[-1])
        p7 = self.p7(p6.relu() if self.relu else p6)
        return results + [p6, p7], names + ["p6", "p7"]


# ================================================================== model: head

class Block(nn.Module):
    """C_1 .. C_4: 3x3 convolution, GroupNorm (RetinaNet: none), ReLU."""

    def __init__(self, channels, norm):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=not norm)
        self.norm = nn.GroupNorm(32, channels) if norm else nn.Identity()

    def forward(self, x, relu=True):
        x = self.norm(self.conv(x))
        return x.relu() if relu else x


class Head(nn.Module):
    """Two towers of n - 1 = 4 blocks and their prediction convolutions C_5, shared by all levels.

    ctr: None, "cls" or "reg", the tower that centerness is read from. scales: a learnt factor per level on reg.
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
        if channels != 256:  # 0.01 belongs to 256 channels and SGD; a narrow head trained by AdamW needs its fan-in's scale
            for block in (*self.cls_tower, *self.reg_tower):
                nn.init.kaiming_normal_(block.conv.weight)
        nn.init.constant_(self.cls_pred.bias, -4.59511985)  # -ln 99: every class starts at score 0.01

    def forward(self, cls_feats, reg_feats, start=0, keep=(), pre=False):
        """C_{start+1} .. C_5 on f_start, for L levels.

        cls_feats, reg_feats: L maps (B, C, H_l, W_l), f_start of the two towers (f_0, twice, is the FPN).
        keep: the i whose f_i the caller wants; pre: f_i before its ReLU.
        Returns (maps, held): maps {"cls", "reg", "ctr"} -> L raw maps; held {(tower, i): L maps}.
        """
        maps, held = {"cls": [], "reg": [], "ctr": []}, {(t, i): [] for t in ("cls", "reg") for i in keep}
        for level, feats in enumerate(zip(cls_feats, reg_feats)):
            last = {}
            for tower, x in zip(("cls", "reg"), feats):
                blocks = self.cls_tower if tower == "cls" else self.reg_tower
                if 0 in keep:
                    held[tower, 0].append(x)
                for i in range(start, 4):
                    x = blocks[i](x, relu=False)
                    if pre and i + 1 in keep:
                        held[tower, i + 1].append(x)
                    x = x.relu()  # not in place: it would overwrite the line above
                    if not pre and i + 1 in keep:
                        held[tower, i + 1].append(x)
                last[tower] = x
            maps["cls"].append(self.cls_pred(last["cls"]))
            reg = self.reg_pred(last["reg"])
            maps["reg"].append(reg * self.scales[level] if self.scales is not None else reg)
            if self.ctr:
                maps["ctr"].append(self.ctr_pred(last[self.ctr]))
        return maps, held


# ================================================================== model: the four detectors

class Targets(NamedTuple):
    """What the labels say about each prior. All device tensors, no Python numbers: nothing waits for the GPU."""
    priors: torch.Tensor    # (A, 4) anchors, or (A, 2) points
    strides: torch.Tensor   # (A, 1)
    positive: torch.Tensor  # (B, A) bool
    weight: torch.Tensor    # (B, A) label weight: 0 where ignored
    onehot: torch.Tensor    # (B, A, K) 1 at the class of a positive
    boxes: torch.Tensor     # (B, A, 4) the assigned box (arbitrary where not positive)
    centerness: torch.Tensor  # (B, A) target in [0, 1], 0 where not positive
    count: torch.Tensor     # () normaliser of the classification loss, mean over processes


class Detector(nn.Module):
    """Backbone, FPN, head. Subclasses say what the head's numbers mean and how they are trained."""
    kind, cells, reg_out, norm, ctr, scales, nms_iou = "", 1, 4, True, None, True, 0.6
    kd_layer, pkd_weight = 3, 2.0

    def __init__(self, backbone="r50", num_classes=80, channels=256, p6="on_output", init="none"):
        super().__init__()
        self.arch = dict(kind=self.kind, backbone=backbone, num_classes=num_classes, channels=channels, p6=p6)
        self.num_classes, self.frozen = num_classes, False
        self.caffe = self.kind == "fcos" and backbone in ("r50", "r101")
        self.body, widths = make_body(backbone, self.caffe, init)
        self.fpn = FeaturePyramidNetwork(widths, channels, P6P7(widths[-1], channels, p6, self.kind == "fcos"))
        for m in self.fpn.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        self.head = Head(channels, self.cells * num_classes, self.cells * self.reg_out, self.norm, self.ctr, self.scales)
        mean, std = ((102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)) if self.caffe else (
            (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        if init == "imagenet":
            self.freeze()

    def freeze(self):
        """A pre-trained ResNet keeps its stem and first stage; FCOS (caffe) all BatchNorm affines too. And see train()."""
        self.frozen = True
        for name, parameter in self.body.stages.named_parameters():
            if name.startswith(("conv1.", "bn1.", "layer1.")) or (self.caffe and re.search(r"bn\d\.|downsample\.1\.", name)):
                parameter.requires_grad = False

    def train(self, mode=True):
        """BatchNorm of a pre-trained backbone always uses its running statistics: 2 images a GPU are too few."""
        super().train(mode)
        if self.frozen:
            for m in self.body.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()
        return self

    def normalise(self, images, sizes):
        """uint8 RGB (B, 3, H, W) -> float; the padding is zeroed AFTER that, so it is the mean pixel."""
        if self.caffe:
            images = images.flip(1)  # BGR
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        rows = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]
        cols = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]
        return x * (rows[:, None, :, None] & cols[:, None, None, :])

    def forward(self, images, keep=(), pre=False):
        """Normalised images (B, 3, H, W), H and W multiples of 32 -> (maps, feats, held): see Head; feats: L maps."""
        feats = list(self.fpn(self.body(images)).values())
        maps, held = self.head(feats, feats, 0, keep, pre)
        return maps, feats, held

    def flatten(self, maps):
        """Maps of L levels -> {"cls": (B, A, K), "reg": (B, A, 4 or 4 R), "ctr": (B, A)} raw, fp32 under autocast."""
        def flat(levels, width):
            rows = torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in levels], 1)  # (B, cells, anchors * width), the only copy
            return fp32(rows.reshape(rows.shape[0], -1, width))
        out = dict(cls=flat(maps["cls"], self.num_classes), reg=flat(maps["reg"], self.reg_out))
        if self.ctr:
            out["ctr"] = flat(maps["ctr"], 1)[..., 0]
        return out

    def priors(self, level_sizes, device):
        """GFL, ATSS: one square anchor of side 8 strides per cell. (A, 4)"""
        return grid_anchors(level_sizes, STRIDES, [8.0], device=device)

    def assign(self, level_sizes, sizes, gt_boxes, gt_labels):
        """Label assignment -> Targets. sizes (B, 2) h, w; gt_boxes (B, M, 4); gt_labels (B, M), -1 = padding."""
        device, valid = gt_boxes.device, gt_labels >= 0
        priors = self.priors(level_sizes, device)
        counts = [h * w * self.cells for h, w in level_sizes]
        owner = self.match(priors, counts, gt_boxes, valid, cells_inside(sizes, level_sizes, STRIDES, self.cells))
        positive, index = owner >= 0, owner.clamp(min=0)
        boxes = gt_boxes.gather(1, index[..., None].expand(-1, -1, 4))
        labels = gt_labels.gather(1, index).clamp(min=0)
        onehot = torch.zeros(*labels.shape, self.num_classes, device=device)
        onehot.scatter_(2, labels[..., None], positive[..., None].float())
        per_image = positive.sum(1).float()
        # An image without positives counts as one, before the sum over images; FCOS clamps the sum instead.
        count = reduce_mean(per_image.sum(), 1.0) if self.kind == "fcos" else reduce_mean(per_image.clamp(min=1).sum())
        points = priors if priors.shape[1] == 2 else (priors[:, :2] + priors[:, 2:]) / 2
        return Targets(priors, self.strides(counts, device), positive, (owner > -2).float(), onehot, boxes,
                       centerness_target(boxes, points) * positive, count)

    def strides(self, counts, device):
        """(A, 1) stride of each prior; counts: priors per level."""
        return torch.cat([torch.full((n, 1), float(s), device=device) for n, s in zip(counts, STRIDES)])

    def match(self, priors, counts, gt_boxes, valid, inside):
        return assign_atss(priors, counts, gt_boxes, valid, inside)

    def cls_loss(self, out, t):
        """Sigmoid focal loss over all classes and priors, per positive."""
        return (focal_loss(out["cls"], t.onehot).sum(-1) * t.weight).sum() / t.count

    def kd_cls_weight(self, t):
        return 1.0 / t.count

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


class GFL(Detector):
    """Generalized Focal Loss: class score = IoU quality; each box edge is a distribution over R = 17 bins."""
    kind, reg_out, pkd_weight = "gfl", 4 * 17, 6.0

    def decode(self, reg, priors, strides):
        """(..., 68) logits, side-major l, t, r, b x 17 -> boxes: the expected bin, in strides from the anchor's centre."""
        p = reg.unflatten(-1, (4, 17)).softmax(-1)
        distances = p @ torch.arange(17, device=reg.device, dtype=reg.dtype)
        return decode_distances(distances * strides, (priors[..., :2] + priors[..., 2:]) / 2)

    def losses(self, out, t):
        """QFL + 2 GIoU + 0.25 DFL. Boxes are weighted by the student's own top score, and divided by its sum."""
        boxes = self.decode(out["reg"], t.priors, t.strides)
        iou, giou = overlap(boxes, t.boxes)
        target = t.onehot * iou.detach()[..., None]  # (B, A, K) the quality at the true class of a positive
        scores = out["cls"].sigmoid()
        cls = (target - scores).abs().pow(2) * F.binary_cross_entropy_with_logits(out["cls"], target, reduction="none")
        w = scores.detach().amax(-1) * t.positive
        w_sum = reduce_mean(w.sum(), 1.0)
        centers = (t.priors[:, :2] + t.priors[:, 2:]) / 2
        edges = (encode_distances(t.boxes, centers) / t.strides).clamp(0, 16 - 0.1)  # (B, A, 4) in strides
        return dict(cls=(cls.sum(-1) * t.weight).sum() / t.count,
                    box=2.0 * ((1 - giou) * w).sum() / w_sum,
                    dfl=0.25 * (distribution_focal_loss(out["reg"], edges).sum(-1) / 4 * w).sum() / w_sum)

    def kd_box(self, cross, teach, t, region, a):
        """Eq. 6 on the four edges: KL of the bin distributions; weight 4, over the sum of S."""
        kl = region_kl(cross["reg"].unflatten(-1, (4, 17)), teach["reg"].unflatten(-1, (4, 17)), a.kd_T)  # (B, A, 4)
        return dict(kd_box=4.0 * (kl.sum(-1) / 4 * region).sum() / reduce_mean(region.sum(), 1e-6))


class ATSS(Detector):
    """Adaptive training sample selection: box deltas from one square anchor, centerness from the box tower."""
    kind, ctr, pkd_weight, delta_std = "atss", "reg", 1.0, (0.1, 0.1, 0.2, 0.2)

    def decode(self, reg, priors, strides):
        return decode_deltas(reg, priors, self.delta_std)

    def losses(self, out, t):
        """Focal + 2 GIoU weighted by the centerness target + centerness BCE."""
        giou = overlap(self.decode(out["reg"], t.priors, t.strides), t.boxes)[1]
        bce = F.binary_cross_entropy_with_logits(out["ctr"], t.centerness, reduction="none") * t.positive
        return dict(cls=self.cls_loss(out, t), ctr=bce.sum() / t.count,
                    box=2.0 * ((1 - giou) * t.centerness).sum() / reduce_mean(t.centerness.sum(), 1.0))

    def kd_box(self, cross, teach, t, region, a):
        """Eq. 5 (GIoU of the decoded boxes) and, in the released code only, centerness at the positives."""
        giou = overlap(self.decode(cross["reg"], t.priors, t.strides), self.decode(teach["reg"], t.priors, t.strides))[1]
        bce = F.binary_cross_entropy_with_logits(cross["ctr"], teach["ctr"].sigmoid(), reduction="none") * t.positive
        return dict(kd_box=((1 - giou) * region).sum() / t.count, kd_ctr=bce.sum() / t.count)


class FCOS(Detector):
    """One point per cell regresses the four distances; centerness from the class tower."""
    kind, ctr, nms_iou, kd_layer = "fcos", "cls", 0.5, 2
    ranges = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, 1e8))

    def priors(self, level_sizes, device):
        return grid_points(level_sizes, STRIDES, 0.5, device)

    def match(self, priors, counts, gt_boxes, valid, inside):  # padding is background here, not ignored
        ranges = constant(self.ranges, priors.device, priors.dtype)
        ranges = torch.cat([ranges[level].expand(n, 2) for level, n in enumerate(counts)])
        return assign_fcos(priors, ranges, gt_boxes, valid)

    def decode(self, reg, priors, strides):
        return decode_distances(reg.clamp(max=20).exp(), priors)  # finite, so that 0 * gradient is 0 where no loss acts

    def losses(self, out, t):
        """Focal + IoU loss weighted by the centerness target + centerness BCE."""
        iou = overlap(self.decode(out["reg"], t.priors, t.strides), t.boxes)[0]
        bce = F.binary_cross_entropy_with_logits(out["ctr"], t.centerness, reduction="none") * t.positive
        return dict(cls=self.cls_loss(out, t), ctr=bce.sum() / t.count,
                    box=(-iou.clamp(min=1e-6).log() * t.centerness).sum() / reduce_mean(t.centerness.sum(), 1e-6))

    def kd_cls_weight(self, t):
        # The code divides by max(sum of centerness, 1e-6), so one step without boxes multiplies KD by 10^6: clamped at 1.
        return 0.4 / reduce_mean(t.centerness.sum(), 1.0)

    def kd_box(self, cross, teach, t, region, a):
        """-ln IoU of the decoded boxes, weight 0.75; the released code's choice (the paper says GIoU)."""
        iou = overlap(self.decode(cross["reg"], t.priors, t.strides), self.decode(teach["reg"], t.priors, t.strides))[0]
        return dict(kd_box=0.75 * (-iou.clamp(min=1e-6).log() * region).sum() / reduce_mean(t.centerness.sum(), 1.0))


class RetinaNet(Detector):
    """Nine anchors per cell, no norm in the head, plain deltas."""
    kind, cells, norm, scales, nms_iou = "retinanet", 9, False, False, 0.5

    def priors(self, level_sizes, device):
        return grid_anchors(level_sizes, STRIDES, [4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)], (0.5, 1.0, 2.0), device)

    def match(self, priors, counts, gt_boxes, valid, inside):
        return assign_max_iou(priors, gt_boxes, valid, inside)

    def decode(self, reg, priors, strides):
        return decode_deltas(reg, priors)

    def losses(self, out, t):
        """Focal + L1 on the deltas."""
        boxes = torch.where(t.positive[..., None], t.boxes, t.priors)  # log of a padded, empty box would be -inf
        l1 = (out["reg"] - encode_deltas(boxes, t.priors)).abs().sum(-1) * t.positive
        return dict(cls=self.cls_loss(out, t), box=l1.sum() / t.count)

    def kd_box(self, cross, teach, t, region, a):
        """Eq. 5: GIoU of the decoded boxes."""
        giou = overlap(self.decode(cross["reg"], t.priors, t.strides), self.decode(teach["reg"], t.priors, t.strides))[1]
        return dict(kd_box=((1 - giou) * region).sum() / t.count)


DETECTORS = {c.kind: c for c in (GFL, ATSS, FCOS, RetinaNet)}


# ================================================================== loss: one function per equation

def focal_loss(logits, onehot, alpha=0.25):
    """Focal loss (Lin et al. 2017), gamma 2: -alpha_t (1 - p_t)^2 log p_t, element by element.

    With u = logit of the WRONG answer, 1 - p_t = sigmoid(u) and -log p_t = softplus(u): half the passes over the
    16 million scores of a RetinaNet image that torchvision's sigmoid_focal_loss takes, the same numbers.
    """
    u = logits * (1 - 2 * onehot)
    return u.sigmoid().square() * F.softplus(u) * (1 - alpha + (2 * alpha - 1) * onehot)


def distribution_focal_loss(logits, target):
    """GFL's DFL: cross entropy with the two bins around a continuous target. (..., 68), (..., 4) -> (..., 4)."""
    low = target.floor()
    logp = logits.unflatten(-1, (4, 17)).log_softmax(-1)
    left, right = (logp.gather(-1, (low.long() + k)[..., None])[..., 0] for k in (0, 1))
    return -(low + 1 - target) * left - (target - low) * right


class QualityFocal(torch.autograd.Function):
    """Eq. 7 with its derivative by hand: of a RetinaNet's 16 million scores an image, autograd would keep eight maps, this keeps one.

    With q = sigmoid(x), d = |q - t|:  dL/dx = d^beta (q - t) + beta d^(beta - 1) sign(q - t) q (1 - q) BCE(q, t).
    """

    @staticmethod
    def forward(ctx, x, t, beta):
        q = x.sigmoid()
        gap, bce = q - t, F.softplus(x).addcmul_(x, t, value=-1)  # softplus(x) - x t
        d = gap.abs()
        power = lambda e: d if e == 1 else d.clamp(min=1e-12).pow(e)
        grad = gap * power(beta) if beta else gap.clone()
        if beta:
            slope = q.addcmul_(q, q, value=-1).mul_(bce).mul_(gap.sign_())  # in place: q and gap are not used again
            grad += slope if beta == 1 else beta * power(beta - 1) * slope
        ctx.save_for_backward(grad)
        return bce.mul_(power(beta)) if beta else bce

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None


def quality_focal_kd(cross_logits, t_logits, beta=1.0):
    """Eq. 7, QFL with the teacher's scores as labels: |q - t|^beta * BCE(q, t), element by element, fp32.

    cross_logits, t_logits: same shape (..., K); t carries no gradient, the factor |q - t|^beta does.
    beta 0 is plain BCE. Exactly 0 where both are equal (beta = 1). Source: Li et al. 2020 (GFL), Eq. 2.
    """
    return QualityFocal.apply(cross_logits, t_logits.detach().sigmoid(), beta)


def region_kl(cross_logits, t_logits, T=1.0):
    """Eq. 6: T^2 * KL(teacher || cross-head) of binned box edges, summed over bins. (..., R) logits -> (...)."""
    log_q, log_p = (cross_logits / T).log_softmax(-1), (t_logits.detach() / T).log_softmax(-1)
    return T * T * (log_p.exp() * (log_p - log_q)).sum(-1)


def channel_stats(x, sync=False):
    """Per-channel mean and unbiased std over batch, height and width: (B, C, H, W) -> two (1, C, 1, 1), fp32.

    sync: over all processes, with gradient. A single position has std 0 (its unbiased std would be NaN).
    """
    if not (sync and dist.is_initialized()):
        n = x.shape[0] * x.shape[2] * x.shape[3]
        var, mean = torch.var_mean(x, (0, 2, 3), correction=1 if n > 1 else 0, keepdim=True)
        return mean, var.clamp(min=1e-20).sqrt()  # the clamp gives a constant channel gradient 0 instead of NaN
    from torch.distributed.nn.functional import all_reduce
    n = reduce_mean(x.new_tensor(float(x.shape[0] * x.shape[2] * x.shape[3]))) * dist.get_world_size()
    mean = all_reduce(x.sum((0, 2, 3), keepdim=True)) / n
    var = all_reduce((x - mean).pow(2).sum((0, 2, 3), keepdim=True)) / (n - 1).clamp(min=1)
    return mean, var.clamp(min=1e-20).sqrt()


def align(source, target, sync=False, eps=1e-6):
    """phi: give each channel of `source` the mean and deviation of `target`, both (B, C, H, W). Not in the paper.

    The statistics of `source` are part of the graph (so its gradient sums to zero per channel), those of `target`
    are constants. The next layer of the teacher thus sees the range it was trained on.
    """
    source, target = fp32(source), fp32(target.detach())
    (m_s, std_s), (m_t, std_t) = channel_stats(source, sync), channel_stats(target, sync)
    return (source - m_s) / (std_s + eps) * std_t + m_t


def pkd_loss(s_feats, t_feats, sync=False, eps=1e-6):
    """PKD (Cao et al. 2022): half the squared distance of per-channel standardised maps = 1 - Pearson correlation.

    Summed over levels, mean over elements. Weights and where it acts: --pkd-weight, --pkd-at.
    """
    total = 0
    for s, t in zip(s_feats, t_feats):
        s, t = fp32(s), fp32(t.detach())
        (m_s, std_s), (m_t, std_t) = channel_stats(s, sync), channel_stats(t, sync)
        total = total + ((s - m_s) / (std_s + eps) - (t - m_t) / (std_t + eps)).pow(2).mean() / 2
    return total


def ld_losses(out, teach, t, branches="both"):
    """LD (Zheng et al. 2022), main region, for GFL: logits of the student itself at the positives.

    Box: mean over bins of T^2 KL, T = 10, weighted by the student's own top score, weight 0.25, not normalised by
    the number of boxes, as in mmdetection. Class: softmax KL, T = 2, mean over classes, weight 10, per positive of all
    levels together (the LD authors' code divides level by level).
    """
    losses = {}
    if branches != "cls":
        kl = region_kl(out["reg"].unflatten(-1, (4, 17)), teach["reg"].unflatten(-1, (4, 17)), 10.0) / 17
        w = out["cls"].detach().sigmoid().amax(-1) * t.positive
        losses["ld_box"] = 0.25 * (kl.sum(-1) / 4 * w).sum()
    if branches != "reg":
        kl = region_kl(out["cls"], teach["cls"], 2.0) / out["cls"].shape[-1]
        losses["ld_cls"] = 10.0 * (kl * t.positive).sum() / t.count
    return losses


def kd_losses(detector, cross, teach, t, a, soft=None):
    """Eq. 3 for both branches: 1/|S| * sum over positions of S(r) * D(cross(r), teacher(r)).

    cross, teach: flattened head outputs (Detector.flatten). Classification: S = 1 (label weight), D = QFL, Eq. 7.
    Boxes: D by detector (kd_box); S = the teacher's top class score, or the foreground (--kd-reg-mask).
    soft: the teacher's class logits where `teach` holds other predictions (strategies c, d).
    """
    losses = {}
    if a.kd_branches != "reg":
        distance = quality_focal_kd(cross["cls"], teach["cls"], a.kd_beta if a.kd_cls_loss == "qfl" else 0.0).sum(-1)
        region = t.weight
        if a.kd_region != "P+N":
            region = region * (t.positive if a.kd_region == "P" else ~t.positive)
        losses["kd_cls"] = (distance * region).sum() * detector.kd_cls_weight(t)
    if a.kd_branches != "cls":
        scores = teach["cls"] if soft is None else soft
        region = scores.amax(-1).sigmoid() * t.weight if a.kd_reg_mask == "soft" else t.positive.float()
        losses.update(detector.kd_box(cross, teach, t, region, a))
    return losses


def strategy_predictions(a, student, teacher, s, t):
    """The two predictions that are compared: (maps that receive gradient, target maps). s, t: (maps, feats, held).

    a  teacher head on student feature  <-> teacher prediction                (CrossKD, Eq. 3)
    b  student head on teacher feature  <-> teacher prediction
    c  student prediction               <-> student head on teacher feature
    d  student prediction               <-> teacher head on student feature
    b-d are our reading of a figure; targets are constants. The paper says that c and d hardly reach the backbone, which
    this reading, through the student's own prediction, does not share.
    """
    def through(head, source, target):
        """C_{i+1} .. C_5 of `head` on phi(source; target)."""
        feats = []
        for tower in ("cls", "reg"):
            pairs = zip(source[tower, a.kd_layer], target[tower, a.kd_layer])
            xs = [x if a.align == "none" else align(x, y, a.sync_stats) for x, y in pairs]
            # phi can leave negative values, which no block after a ReLU has ever seen; f_0, the FPN map, has no ReLU
            feats.append([x.relu() if a.kd_layer > 0 else x for x in xs])
        return head(*feats, start=a.kd_layer)[0]

    if a.kd_strategy == "a":
        return through(teacher.head, s[2], t[2]), t[0]  # frozen, but no no_grad here: the gradient passes through it
    if a.kd_strategy == "b":
        return through(student.head, t[2], s[2]), t[0]
    with torch.no_grad():
        return s[0], through(student.head, t[2], s[2]) if a.kd_strategy == "c" else through(teacher.head, s[2], t[2])


class Distiller(nn.Module):
    """Student and, outside the module tree, its teacher: forward(batch) -> {name: loss}; their sum is Eq. 4."""

    def __init__(self, student, teacher, a):
        super().__init__()
        self.student, self.a, self.watch = student, a, {}
        self.parts = set(a.method.split("+"))
        # In a tuple, so that parameters(), state_dict(), train(), DDP and the optimizer never see the teacher.
        self.teacher = (teacher.eval().requires_grad_(False),) if teacher else ()
        self.pkd_weight = student.pkd_weight if a.pkd_weight is None else a.pkd_weight
        cross = "crosskd" in self.parts
        towers = {3} if "pkd" in self.parts and a.pkd_at != "neck" else set()
        self.keep = tuple(sorted(towers | ({a.kd_layer} if cross else set())))
        self.pre = cross and a.align == "pre"

    def forward(self, batch):
        a, student = self.a, self.student
        autocast = partial(torch.autocast, batch["images"].device.type, torch.bfloat16, enabled=a.amp == "bf16")
        layout = torch.channels_last if a.channels_last else torch.contiguous_format
        with autocast():
            s = student(student.normalise(batch["images"], batch["sizes"]).to(memory_format=layout), self.keep, self.pre)
        targets = student.assign([m.shape[-2:] for m in s[0]["cls"]], batch["sizes"], batch["boxes"], batch["labels"])
        out = student.flatten(s[0])
        losses = student.losses(out, targets)
        if not self.teacher:
            return losses
        teacher = self.teacher[0]
        with torch.no_grad(), autocast():  # not inference_mode: phi multiplies these with tensors that need gradients
            t = teacher(teacher.normalise(batch["images"], batch["sizes"]).to(memory_format=layout), self.keep, self.pre)
        teach = teacher.flatten(t[0])
        if "crosskd" in self.parts:
            with autocast():
                cross, target = (student.flatten(maps) for maps in strategy_predictions(a, student, teacher, s, t))
            losses.update(kd_losses(student, cross, target, targets, a, soft=teach["cls"]))
        if "mimic" in self.parts:  # Eq. 2: the student's own predictions, same distances
            losses.update({k.replace("kd", "mimic"): v for k, v in kd_losses(student, out, teach, targets, a).items()})
        if "ld" in self.parts:
            losses.update(ld_losses(out, teach, targets, a.kd_branches))
        if "pkd" in self.parts:
            after_relu = lambda held, k: [x.relu() for x in held[k, 3]]
            places = [(s[1], t[1])] if a.pkd_at == "neck" else [
                (after_relu(s[2], k), after_relu(t[2], k)) for k in a.pkd_at.split("+")]
            losses["pkd"] = self.pkd_weight * sum(pkd_loss(x, y, a.sync_stats) for x, y in places)
        if "fitnet" in self.parts:  # Eq. 1 with D = squared error and S = 1; weight 2 as in LD's code
            losses["fitnet"] = 2.0 * sum(F.mse_loss(fp32(x), fp32(y)) for x, y in zip(s[1], t[1]))
        return losses


# ================================================================== checkpoints

def plain_of(model, classes):
    """What a checkpoint holds beside weights: enough to rebuild the detector without any flag."""
    return dict(script="crosskd.py", arch=model.arch, classes=list(classes))


def weights_of(model, classes):
    """What a detector is, as plain values and tensors."""
    return dict(plain_of(model, classes), model=model.state_dict())


def arch_of(spec, flag):
    """What a detector is, before anything is downloaded."""
    from common import zoo
    if spec in zoo.CROSSKD_ZOO:
        kind, backbone = spec.split("_")[:2]
        return dict(kind=kind, backbone=backbone, channels=256, num_classes=80)
    path = zoo.zoo_path(spec, zoo.CROSSKD_ZOO, flag)
    whose, content, *_ = zoo.load_any(path, flag, "crosskd.py")
    arch = content["arch"] if whose == "ours" else zoo.infer_arch(content, f"{flag} {path}")
    if arch.get("kind") not in DETECTORS:
        raise UserError(f"{flag} {path}: does not describe a network of this script (kind {arch.get('kind')!r})")
    return arch


def load_detector(spec, flag="--weights"):
    """(detector in eval mode, class names or None) from a zoo name, an mmdetection .pth or a checkpoint of ours."""
    from common import zoo
    path = zoo.zoo_path(spec, zoo.CROSSKD_ZOO, flag)
    whose, *content = zoo.load_any(path, flag, "crosskd.py")
    where, trained = f"{flag} {path}", (None, None)
    with rebuilding(where):
        if whose == "ours":
            arch, state, classes = (content[0][k] for k in ("arch", "model", "classes"))
            trained = tuple(content[0].get(k) for k in ("epoch", "it"))  # of a best.pt
        else:
            state, meta = content
            arch, classes = zoo.infer_arch(state, where), zoo.classes_of(meta)
            # what the keys cannot tell: these variants have the same names and shapes
            style = "style='pytorch'" if arch["kind"] == "fcos" else "style='caffe'"
            settings = ("norm_on_bbox=True", "centerness_on_reg=True", style)
            zoo.guard(zoo.config_of(meta), settings, where, f"this script's {arch['kind']}")
            state = zoo.from_mmdet(state)
        model = DETECTORS[arch["kind"]](arch["backbone"], arch["num_classes"], arch["channels"], arch["p6"])
        model.arch, model.trained = arch, trained
        load_strict(model, state, where)
        if classes is not None and (len(classes) != model.num_classes or not all(isinstance(c, str) for c in classes)):
            raise UserError(f"{where}: names {len(classes)} classes, its head has {model.num_classes}")
    return model.eval(), classes


def check_pair(teacher, classes_of_teacher, student, classes):
    """The teacher's head must be able to read the student's features, and both must mean the same by class k."""
    check_arch(teacher.arch, student.arch)
    check_classes(classes_of_teacher, teacher.num_classes, classes, "--teacher")


def check_arch(theirs, ours):
    for what in ("kind", "channels", "num_classes"):
        if theirs[what] != ours[what]:
            raise UserError(f"--teacher has {what} {theirs[what]}, --student {ours[what]}: they must be the same")


def check_classes(names, count, classes, flag):
    """A checkpoint's classes against the data's; "_" and " " are the same, files without names are trusted."""
    if count != len(classes):
        raise UserError(f"{flag}: has {count} classes, --data has {len(classes)}")
    for k, (theirs, ours) in enumerate(zip(names or classes, classes)):
        if theirs.replace("_", " ") != ours.replace("_", " "):
            raise UserError(f"{flag}: its class {k} is {theirs!r}, --data has {ours!r}")


# ================================================================== data

def make_data(args, split, kind=None, like=None, image_size=None):
    """The dataset "train" or "val" of the flags; None where own training files come without a validation set."""
    files = own_files(args, split)
    if files is False:
        return None
    if files is None:
        if args.data == "shapes":
            from common.shapes import make_shapes
        files = find_coco(make_shapes() if args.data == "shapes" else args.data, split)
    size = image_size or default_size(args, kind or split_name(args.student)[0])
    return CocoDataset(*files, split == "train", size, like=like, keep_empty=args.keep_empty)


def default_size(args, kind):
    return args.image_size or ("72-120" if args.data == "shapes" else "640,800" if kind == "fcos" else "800")


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


# ================================================================== train

LEGEND = dict(
    cls="classification loss of the detector", box="box loss of the detector", dfl="GFL's loss of the binned box edges",
    ctr="centerness loss", kd_cls="Eq. 3 for classes, distance Eq. 7", kd_box="Eq. 3 for boxes, distance Eq. 6 (GFL) or Eq. 5",
    kd_ctr="Eq. 3 for centerness (released code)", mimic_cls="Eq. 2 for classes", mimic_box="Eq. 2 for boxes",
    mimic_ctr="Eq. 2 for centerness", ld_cls="LD, classes", ld_box="LD, box edges", pkd="PKD, 1 - Pearson correlation of features",
    fitnet="Eq. 1, squared distance of FPN features")


def make_optimizer(model, algorithm, lr, weight_decay, kind):
    """SGD with momentum 0.9, or AdamW. FCOS: conv biases learn twice as fast, no bias decays (norm biases keep the rate)."""
    plain, bias, norm_bias = [], [], []
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                norm = isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm))
                (plain if kind != "fcos" or name != "bias" else norm_bias if norm else bias).append(p)
    groups = [dict(params=plain, lr=lr, weight_decay=weight_decay), dict(params=bias, lr=2 * lr, weight_decay=0.0),
              dict(params=norm_bias, lr=lr, weight_decay=0.0)]
    groups = [g for g in groups if g["params"]]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9) if algorithm == "sgd" else torch.optim.AdamW(groups, lr=lr)
    for g in optimizer.param_groups:
        g["base_lr"] = g["lr"]
    return optimizer


def split_name(student):
    """"gfl_r18" -> ("gfl", "r18"), both known."""
    kind, _, backbone = student.partition("_")
    if kind not in DETECTORS or not (backbone in BACKBONES or re.fullmatch("tiny(8|16|24|32|48|64)", backbone)):
        raise UserError(f"--student {student}: expected detector_backbone, a detector of {', '.join(DETECTORS)} and a backbone of "
                        f"{', '.join(BACKBONES)}, tiny8 ... tiny64")
    return kind, backbone


def make_pair(args, data, val, rank, world, device):
    """(student, teacher or None) of the flags, on the device."""
    kind, backbone = split_name(args.student)
    channels, teacher = 64 if backbone.startswith("tiny") else 256, None
    if args.method != "none":
        if args.teacher and not Path(args.teacher).exists():  # of the zoo: before its 200 MB are downloaded
            check_arch(arch_of(args.teacher, "--teacher"), dict(kind=kind, channels=channels, num_classes=len(data.classes)))
        teacher, teacher_classes = load_detector(args.teacher or shapes_teacher(args, rank, world, device), "--teacher")
    seed_all(args.seed)  # here, so that every method starts from the same student
    start = args.init if args.init in ("imagenet", "none") else "none"
    student = DETECTORS[kind](backbone, len(data.classes), channels, args.p6, start)
    if args.init != start:
        load_strict(student, load_detector(args.init, "--init")[0].state_dict(), f"--init {args.init}")
        student.freeze()
    student.arch["image_size"] = default_size(args, kind)  # --eval and --predict see the images as training did
    if teacher:
        check_pair(teacher, teacher_classes, student, data.classes)
        teacher.to(device).requires_grad_(False)
    return student.to(device), teacher


def check_teacher(teacher, val, rank, world, device, args):
    """Prints the teacher's AP on up to 100 validation images; a teacher that finds nothing has nothing to teach."""
    metrics, _ = evaluate(teacher, val, rank, world, device, args, most=100)
    if rank == 0:
        print(f"teacher AP {metrics['AP']:.1f} on {metrics['images']} validation images", flush=True)
        if 0 <= metrics["AP"] < 1 and not args.no_teacher_check:  # -1: no box on these images
            raise UserError(f"--teacher {args.teacher or 'of shapes'}: AP {metrics['AP']:.1f} on {metrics['images']} validation "
                            "images: wrong weights, other classes or other pixels? --no-teacher-check goes on")


def prepare(args, data, val, student, teacher, rank, world, device):
    """The Distiller, its networks described and compiled, its teacher checked."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    example = collate([data[0, 0]])["images"].float()
    for name, net in (("student", student), ("teacher", teacher)):
        if net:
            net.to(memory_format=layout)
            describe_model(f"{name} {net.kind}_{net.arch['backbone']}", net, example, rank=rank)
            if args.compile:
                net.compile()
                net.head.compile()
    if teacher and val and not (Path(args.out) / "last.pt").exists():
        check_teacher(teacher, val, rank, world, device, args)
    return Distiller(student, teacher, args).train()


def method_of(args):
    """What is distilled, in words, for the start of a run."""
    return f"method {args.method}" + (f" i={args.kd_layer}" if "crosskd" in args.method else "")


def reported(args):
    """How often a Run evaluates."""
    return dict(every=args.epochs if args.data == "shapes" else None, table=class_table)


def rate_factor(args, it, steps):
    """Learning-rate factor of iteration `it`, `steps` an epoch."""
    milestones = (args.epochs * 2 / 3, args.epochs * 11 / 12)
    warmup = min(500, args.epochs * steps // 10)  # 500 of the paper's 87,960 steps; a tenth of a short run
    start, constant = (1 / 3, True) if args.student.startswith("fcos") else (0.001, False)
    return warmup_multistep(it, steps, milestones, warmup, start, constant)


def train(args, rank, world, device):
    """Train under args; returns the last evaluation's metrics (rank 0) or None."""
    data = make_data(args, "train")
    val = make_data(args, "val", like=data.classes)
    open_run(args, rank, args.resume)
    student, teacher = make_pair(args, data, val, rank, world, device)
    distiller = prepare(args, data, val, student, teacher, rank, world, device)
    model = wrap_ddp(distiller, device, world)
    loader, plan = train_loader(data, args.batch_size, rank, world, args.seed, args.workers, device.type == "cuda")
    total_batch = args.batch_size * world * args.accumulate
    paper_batch = 16
    lr = args.lr * total_batch / paper_batch
    optimizer = make_optimizer(student, args.optimizer, lr, args.weight_decay, student.kind)
    run = Run(args, student, optimizer, plain_of(student, data.classes), len(plan), total_batch, rank, world, device,
              legend=LEGEND, **reported(args))
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
                nn.utils.clip_grad_norm_(student.parameters(), 35.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step(losses, lr * factor, distiller.watch)
        run.end_epoch()
    return run.close()


# ================================================================== evaluate, predict

@torch.no_grad()
def run_detector(model, batch, device, args):
    """One collated batch -> per image (boxes in original pixels, scores, labels)."""
    batch = to_device(batch, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        maps = model(model.normalise(batch["images"], batch["sizes"]))[0]
    found = []
    for (boxes, scores, labels), size, (h, w) in zip(
            model.detect(maps, batch["sizes"]), batch["sizes"], batch["original_sizes"]):
        found.append((boxes * (boxes.new_tensor([w, h]) / size.flip(0)).repeat(2), scores, labels))
    return found


def evaluate(model, val, rank, world, device, args, most=None):
    """(COCO metrics, detections) on rank 0, (None, None) elsewhere or without a validation set. Images by stride over ranks.
    most: the first so many images only."""
    if val is None:
        return None, None
    model.eval()
    since, results = time.time(), []
    loader = eval_loader(val, rank, world, args.workers, device.type == "cuda", most)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        (boxes, scores, labels), = run_detector(model, batch, device, args)
        results += to_coco_results(batch["image_ids"][0], boxes, scores, labels, val.category_ids)
    results = gather(results)
    if rank != 0:
        return None, None
    count = min(len(val), most or len(val))
    metrics = coco_evaluate(val.truth(rows=range(count)), results)
    metrics |= dict(score=metrics["AP"], images=count, seconds=time.time() - since)
    numbers = " ".join(f"{k} {metrics[k]:.1f}" for k in ("AP", "AP50", "AP75", "APs", "APm", "APl"))
    metrics["line"] = f"{count} images | {numbers} | {metrics['seconds']:.0f}s"
    return metrics, results


def evaluate_file(args, rank, world, device):
    """--eval: metrics of a checkpoint, into --out."""
    from common.pictures import write_results
    kind = arch_of(args.eval, "--eval")["kind"]
    make_data(args, "val", kind)  # what is missing is told before anything is downloaded
    model, classes = load_detector(args.eval, "--eval")
    val = make_data(args, "val", kind, image_size=args.image_size or model.arch.get("image_size"), like=classes)
    check_classes(classes, model.num_classes, val.classes, f"--eval {args.eval}")
    metrics, results = evaluate(model.to(device), val, rank, world, device, args)
    if rank == 0:
        write_results(Path(args.out), metrics, results, val, args.eval, *model.trained)
        print(f"{class_table(metrics)}\n{metrics['line']}")


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file) and one picture per image into --out."""
    from common.pictures import Pictures
    pictures = Pictures(args.predict, args.out, args.score)  # before anything is downloaded: are they there?
    model, classes = load_detector(args.weights)
    model.to(device)
    classes = classes or [f"class {k}" for k in range(model.num_classes)]
    size = max(parse_image_size(args.image_size or model.arch.get("image_size") or "800"))
    for picture in pictures:
        image, (h, w) = resize(picture.pixels, size)
        item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0,
                    original_size=picture.pixels.shape[1:])
        picture.save(*run_detector(model, collate([item]), device, args)[0], classes)


# ================================================================== the embedded dataset: teacher, baseline, CrossKD

def shapes_teacher(args, rank, world, device):
    """Path of the teacher for shapes; trained by this script the first time, then cached beside the data."""
    from common.shapes import make_shapes
    kind, backbone = split_name(args.student)
    if not backbone.startswith("tiny"):
        raise UserError(f"--student {args.student}: the teacher for shapes has 64 channels, so have the tiny8 ... tiny64 students only")
    done = make_shapes().parent / "teachers" / f"{kind}_tiny32-s{args.seed}"
    draft = done.with_name(f".{done.name}")  # renamed when finished, so that a killed run is never taken for a teacher
    with made_once(done, rank) as missing:
        if missing:
            if rank == 0:
                print(f"== teacher {kind}_tiny32: trained once, cached at {done}")
            flags = ["--data", "shapes", "--method", "none", "--student", f"{kind}_tiny32", "--epochs", "8", "--out", str(draft)]
            flags += ["--seed", str(args.seed), "--workers", str(args.workers), "--resume"]
            train(resolve(parse_args(flags)), rank, world, device)
            if rank == 0:
                draft.rename(done)
    return str(done / "best.pt")


def shapes_table(args, rank, world, device):
    """Teacher, plain student and CrossKD student on shapes, in one table."""
    since, rows = time.time(), []
    path = args.teacher or shapes_teacher(resolve(args), rank, world, device)
    teacher, _ = load_detector(path, "--teacher")
    kind, backbone = teacher.arch["kind"], teacher.arch["backbone"]
    metrics, _ = evaluate(teacher.to(device), make_data(args, "val", kind), rank, world, device, args)
    rows.append((f"teacher {kind}_{backbone}", metrics, time.time() - since))
    for method, name in (("none", "student alone"), ("crosskd", "student with CrossKD")):
        since, out = time.time(), Path(args.out) / method
        more = dict(method=method, teacher=None if method == "none" else path, student=args.student or f"{kind}_tiny8", out=str(out),
                    resume=args.resume and (out / "last.pt").exists())
        rows.append((name, train(resolve(argparse.Namespace(**vars(args) | more)), rank, world, device), time.time() - since))
    if rank == 0:
        count = f"shapes, {metrics['images']} validation images"
        print(f"\n{count:31s}    AP  AP50  AP75   seconds")
        for name, m, seconds in rows:
            print(f"{name:31s} {m['AP']:5.1f} {m['AP50']:5.1f} {m['AP75']:5.1f} {seconds:9.0f}")


# ================================================================== flags

EXAMPLES = """
torchrun --nproc_per_node 8 crosskd.py --teacher gfl_r101        # GFL R101 -> R50 on data/coco
python crosskd.py --data shapes                                  # everything in minutes on a CPU
python crosskd.py --predict photo.jpg --weights runs/crosskd/best.pt
"""
# flags, the flag that gives them an effect, its values
BELONGS = (
    ("kd_layer kd_strategy align", "method", ("crosskd", None)),
    ("kd_cls_loss kd_region kd_reg_mask kd_T kd_beta", "method", ("crosskd", "mimic", None)),
    ("kd_branches", "method", ("crosskd", "mimic", "ld", None)),
    ("kd_cls_loss kd_region kd_beta", "kd_branches", ("cls", "both")),
    ("kd_reg_mask kd_T", "kd_branches", ("reg", "both")),
    ("kd_beta", "kd_cls_loss", ("qfl",)),
    ("sync_stats", "method", ("crosskd", "pkd", None)),
    ("pkd_at pkd_weight", "method", ("pkd",)),
    ("no_teacher_check", "method", ("crosskd", "mimic", "ld", "pkd", "fitnet", None)))


def parse_args(argv=None):
    p = parser(__doc__, EXAMPLES)
    g = p.add_argument_group("data")
    g.add_argument("--data", default="data/coco", help="COCO-layout root, or 'shapes': the embedded dataset")
    g.add_argument("--image-size", help="short side: 800, a choice 640,800 or a range 480-800 "
                   "(default 800; FCOS 640,800; shapes 72-120; --eval, --predict: as trained)")
    g = p.add_argument_group("models")
    g.add_argument("--teacher", help="zoo name (gfl_r101 ...), mmdetection .pth or our .pt (default gfl_r101; shapes: trained on demand)")
    g.add_argument("--student", help="detector_backbone, e.g. gfl_r18 (default: the teacher's detector with r50)")
    g.add_argument("--p6", choices=("on_output", "on_input"), default="on_output", help="student's P6 from P5, or from C5 (zoo RetinaNets)")
    g.add_argument("--init", help="student start: imagenet or our .pt (BatchNorm, stem and first stage stay frozen), or none "
                   "(default imagenet; shapes none)")
    g.add_argument("--no-teacher-check", action="store_true", help="go on with a teacher of AP below 1")
    g = p.add_argument_group("method")
    g.add_argument("--method", help=f"one of {', '.join(METHODS)}, or joined: crosskd+pkd, crosskd+ld (default crosskd)")
    g.add_argument("--kd-layer", type=number(int, 0, 4), help="i: the student's feature f_i enters the teacher's head, 0..4 (default 3; FCOS 2)")
    g.add_argument("--kd-strategy", choices="abcd", default="a", help="which predictions are compared; a is CrossKD, Eq. 3")
    g.add_argument("--kd-branches", choices=("cls", "reg", "both"), default="both", help="branches that are distilled")
    g.add_argument("--kd-cls-loss", choices=("qfl", "bce"), default="qfl", help="D of Eq. 3, classification")
    g.add_argument("--kd-region", choices=("P", "N", "P+N"), default="P+N", help="S of Eq. 3, classification: positives, negatives")
    g.add_argument("--kd-reg-mask", choices=("soft", "fg"), default="soft", help="S of Eq. 3, boxes: teacher's top score or foreground")
    g.add_argument("--align", choices=("post", "pre", "none"), default="post", help="phi on f_i after / before its ReLU, or no phi")
    g.add_argument("--kd-T", type=POSITIVE, default=1.0, help="temperature of Eq. 6, GFL boxes")
    g.add_argument("--kd-beta", type=number(), default=1.0, help="beta of Eq. 7, QFL")
    g.add_argument("--pkd-at", choices=("neck", "cls", "reg", "cls+reg"), default="neck", help="where PKD compares features")
    g.add_argument("--pkd-weight", type=number(), help="(default GFL 6, ATSS 1, FCOS 2, RetinaNet 2)")
    g.add_argument("--sync-stats", action="store_true", help="statistics of phi and PKD over all processes")
    g = p.add_argument_group("schedule")
    g.add_argument("--epochs", type=COUNT, help="(default 12; FCOS and retinanet_r101 -> r50: 24; shapes 6), x0.1 at 2/3 and 11/12")
    g.add_argument("--batch-size", type=COUNT, help="images per process and step (default 2; shapes 16)")
    g.add_argument("--optimizer", choices=("sgd", "adamw"), help="(default sgd; shapes adamw, which learns from scratch faster)")
    g.add_argument("--lr", type=POSITIVE, help="for a total batch of 16, scaled linearly (default 0.01; shapes 0.002)")
    g.add_argument("--weight-decay", type=number(), default=1e-4)
    run_flags(p, "crosskd")
    args = parse(p, argv, "crosskd", dict(eval="data workers val_json val_images", predict="weights score"), belongs=BELONGS)
    parts = set((args.method or "crosskd").split("+"))
    if parts - set(METHODS) or ("none" in parts and len(parts) > 1):
        p.error(f"--method {args.method}: choose among {', '.join(METHODS)}; join with +")
    if args.image_size:
        parse_image_size(args.image_size)
    if args.method == "none" and args.teacher and args.student and int(os.environ.get("RANK", 0)) == 0:
        print("note: with --method none there is no effect of --teacher", file=sys.stderr)
    return args


def resolve(args):
    """The flags with every default that depends on another flag; after this they are only read."""
    shapes, method = args.data == "shapes", args.method or "crosskd"
    arch = arch_of(args.teacher, "--teacher") if args.teacher else {}
    student = args.student or f"{arch.get('kind', 'gfl')}_{'tiny8' if shapes else 'r50'}"
    kind, backbone = split_name(student)
    if "ld" in method.split("+") and kind != "gfl":
        raise UserError(f"--method {method}: LD compares edge distributions, which only GFL has; use mimic for {kind}")
    if args.kd_T != 1 and kind != "gfl":
        raise UserError(f"--kd-T {args.kd_T}: is the temperature of GFL's binned edges, which {kind} has not")
    teacher = args.teacher
    if shapes and args.train_json and method != "none" and not teacher:
        raise UserError("--train-json: the teacher of --data shapes knows other classes; give --teacher, or "
                        "--method none")
    if method != "none" and not teacher and not shapes:
        teacher = f"{kind}_r101"
        arch = dict(kind=kind, backbone="r101")
    long = kind == "fcos" or (kind == "retinanet" and (arch.get("backbone"), backbone) == ("r101", "r50"))
    defaults = dict(kd_layer=DETECTORS[kind].kd_layer, epochs=24 if long else 12, batch_size=2, lr=0.01, optimizer="sgd", init="imagenet")
    if shapes:
        defaults.update(epochs=6, batch_size=16, lr=0.002, optimizer="adamw", init="none")
    found = {k: v for k, v in defaults.items() if getattr(args, k) is None}
    return argparse.Namespace(**vars(args) | found | dict(method=method, teacher=teacher, student=student))


# ================================================================== main

def main():
    with started("crosskd.py") as (rank, world, device):
        args = parse_args()
        if args.eval or args.predict:
            answer_folder(args.out, rank)
        if args.eval:
            evaluate_file(args, rank, world, device)
        elif args.predict:
            if world > 1:
                raise UserError("--predict: runs in one process; start it with python")
            predict(args, device)
        elif args.data == "shapes" and args.method is None and not (args.train_json or args.val_json):
            shapes_table(args, rank, world, device)
        else:
            train(resolve(args), rank, world, device)


if __name__ == "__main__":
    main()
