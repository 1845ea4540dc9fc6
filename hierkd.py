# SPDX-License-Identifier: MIT
"""HierKD: open-vocabulary one-stage detection, taught by CLIP at two levels (Ma et al., CVPR 2022, arXiv:2203.10593).

Idea. ATSS, with CLIP's text embeddings of the class names as its classifier: any list of names can be detected. Trained on base classes alone
it does not know what a novel name looks like, so CLIP teaches the embedding f of each anchor: (1) f is compared with the names of
the base classes and a learnt background, softmax focal loss, on all positives and 10 % of the negatives (more negatives teach it
that unlabelled novel objects are background); (2) IKD: at the positives, f must equal CLIP's image embedding of the predicted box;
positives are base objects only, so (3) GKD: the image's caption, which also names novel objects, attends to max-pooled patches of f of
all five levels, and image and caption must find each other in the batch. At test time CLIP's image tower and the captions
are gone; only the text matrix is swapped: novel names (ZSD), or base and novel together (GZSD).

Letters: B images, C captions, D embedding, A anchors of all L = 5 levels, M boxes (padded), K classes. Boxes xyxy pixels.

Differs from the paper. Where text and released code disagree, the text is the default (but for 4 and 6) and --preset released is the code:
  1. IKD: text L1, weight 1, mean over positives (Eq. 2); code L2, weight 0.05, mean per level, then over levels. --ikd-norm --ikd-weight --ikd-mean
  2. Classification weight: text a constant; code exp(-s) with + |s| and s learnt. --cls-weight learn
  3. Crops: text not stated; code ImageNet's normalisation, no antialias. Here CLIP's own, PIL's antialias. --crop-norm --crop-antialias
  4. GKD's patches: text FPN maps; code the normalised embeddings f, which is also what lets a caption reach the classifier. We follow the code.
  5. Algorithm 1: text CLIP's score alone; code times the quality. --direct-quality
  6. The embedding's bias starts at -4.6 in the code (left over from a sigmoid); every f then starts nearly parallel. --embed-bias focal|zero
and from both: the normalisers of IKD and GKD are means over all processes, too (not --ikd-mean level); all lower bounds hold for the sum over processes. Not in the
preset: the code's jitter of 640-800 (3x), its NMS at 0.6 (2x), and L1 with weight 1 in its runs of IKD alone. On shapes, whose images are 16 cells
of P3 wide, GKD reads P3 and P4 only, and its attention has temperature 0.1: at 1 a caption sees the mean of all patches, and every background cell learns it.

    torchrun --nproc_per_node 4 hierkd.py --data data/coco                       # HierKD R50 1x, 48/17 split, 4 x 8 images
    python hierkd.py --data shapes                                              # everything in minutes on a CPU
    python hierkd.py --eval runs/hierkd/last.pt
    python hierkd.py --predict photo.jpg --weights runs/hierkd/best.pt --classes "red panda,umbrella"

Expected, COCO 48/17, AP50 (paper): R50 1x novel (ZSD) 21.6, R50 3x 25.3; GZSD base 51.3, novel 20.3, all 43.2.
Measured here, shapes, ZSD novel AP50, mean of 3 seeds: 2.0 without distillation, 26.4 with IKD, 3.4 with GKD (its gain is not shown), 19.3 with both. COCO not run.
"""
import argparse
import math
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, batched_nms, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common.boxes import (assign_atss, cells_inside, centerness_target, constant, decode_deltas, grid_anchors,
                          overlap)
from common.clip import load_clip
from common.datasets import (BASE_48, NOVEL_15, NOVEL_17, CocoDataset, collate, eval_loader, find_coco, own_files,
                             parse_image_size, read_annotations, read_image, resize, train_loader)
from common.evaluation import class_agnostic_recall, class_mean, coco_evaluate, to_coco_results
from common.run import (COUNT, POSITIVE, SEED, Run, UserError, answer_folder, barrier, describe_model,
                        fast_layout, fused, gather, given_flags, load_checkpoint, load_strict, number, open_run,
                        parse, parser, rebuilding, reduce_mean, run_flags, saved_flags, seed_all, started, to_device,
                        warmup_multistep, wrap_ddp)

STRIDES = (8, 16, 32, 64, 128)
DELTA_STD = (0.1, 0.1, 0.2, 0.2)


# ================================================================== model

def fp32(x):
    """bf16 maps of autocast -> fp32, in which all losses are computed; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def normalise(images, sizes, mean_std=IMAGENET):
    """uint8 RGB (B, 3, H, W), sizes (B, 2) h, w -> float; the padding is zeroed AFTER that, so it is the mean pixel."""
    mean, std = (constant(v, images.device, torch.float32).view(3, 1, 1) for v in mean_std)
    rows = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
    cols = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    return (images - mean) / std * (rows[:, None, :, None] & cols[:, None, None, :])


def encode_regions(clip, images, sizes, boxes, owner, a, scale):
    """CLIP's embeddings (N, D) of boxes (N, 4) in uint8 images, under the flags --crop-norm and --crop-antialias."""
    pixels = normalise(images, sizes, IMAGENET if a.crop_norm == "imagenet" else clip.grey_levels)
    return clip.encode_crops(pixels, boxes, owner, scale, a.crop_antialias)


class Body(nn.Module):
    """A torchvision ResNet up to C5; returns {name: map} of C3, C4, C5, with from_c2 also C2.

    frozen, for pre-trained weights: stem and layer1 do not learn, and BatchNorm always uses its running statistics (few images a GPU).
    """

    def __init__(self, net, frozen, from_c2=False):
        super().__init__()
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self.stages = nn.ModuleDict({n: getattr(net, n) for n in names})
        self.frozen, self.returned = frozen, names[4 if from_c2 else 5:]
        if frozen:
            for name in ("conv1", "bn1", "layer1"):
                self.stages[name].requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        for m in self.modules() if self.frozen else ():
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
    if name.startswith("tiny") and init == "imagenet":
        raise UserError(f"--backbone {name}: has no ImageNet weights; use --init none")


def make_body(name, init, from_c2=False):
    """(Body, channels of its maps) of r50|r101|tinyN; init "imagenet" downloads torchvision's V1 weights."""
    check_backbone(name, init)
    frozen, skip = init == "imagenet", 0 if from_c2 else 1
    if name.startswith("tiny"):
        from common.tiny import NarrowResNet
        width = int(name[4:])
        return Body(NarrowResNet(width), frozen, from_c2), [width, 2 * width, 4 * width, 8 * width][skip:]
    net = getattr(torchvision.models, "resnet" + name[1:])(weights=None)
    if init == "imagenet":
        from common.zoo import imagenet_state
        load_strict(net, *imagenet_state("resnet" + name[1:]))
    return Body(net, frozen, from_c2), [256, 512, 1024, 2048][skip:]


class P6P7(ExtraFPNBlock):
    """P6 and P7 by stride-2 convolutions from P5, without a ReLU between. (torchvision's LastLevelP6P7 has it.)"""

    def __init__(self, channels):
        super().__init__()
        self.p6, self.p7 = (nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2))

    def forward(self, results, x, names):
        p6 = self.p6(results[-1])
        return results + [p6, self.p7(p6)], names + ["p6", "p7"]


class OpenATSS(nn.Module):
    """ATSS whose class tower ends in a D-channel embedding; names are what it is compared with.

    background (D,): the start of T_bg, CLIP's embedding of "a photo of background."; None for a constant cosine of 0.2.
    """

    def __init__(self, backbone, background, dim, channels=256, quality="iou", tau_c=100.0, tau_m=10.0, cls_weight="1", gkd=True,
                 embed_bias="focal", init="none"):
        super().__init__()
        self.arch = dict(backbone=backbone, dim=dim, channels=channels, quality=quality, bg="fixed" if background is None else "learn",
                         cls_weight=cls_weight, gkd=gkd)
        self.body, widths = make_body(backbone, init)
        self.fpn = FeaturePyramidNetwork(widths, channels, P6P7(channels))
        for m in self.fpn.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        tower = lambda: nn.Sequential(*[layer for _ in range(4) for layer in (
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.GroupNorm(32, channels), nn.ReLU())])
        self.cls_tower, self.reg_tower = tower(), tower()
        self.embed, self.reg = nn.Conv2d(channels, dim, 3, 1, 1), nn.Conv2d(channels, 4, 3, 1, 1)
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
        self.background = None if background is None else nn.Parameter(background.detach().clone().reshape(1, dim))
        self.tau_c = nn.Parameter(torch.tensor(float(tau_c)))                      # a plain scalar: no exp, no clamp
        self.tau_m = nn.Parameter(torch.tensor(float(tau_m))) if gkd else None
        self.s = nn.Parameter(torch.tensor(1.0)) if cls_weight == "learn" else None

    def forward(self, images):
        """(B, 3, H, W) normalised -> {"embed": (B, D, H_l, W_l), "reg": 4 channels, "quality": 1 channel}, L maps each, raw."""
        maps = dict(embed=[], reg=[], quality=[])
        for level, x in enumerate(self.fpn(self.body(images)).values()):
            maps["embed"].append(self.embed(self.cls_tower(x)))
            x = self.reg_tower(x)
            maps["reg"].append(self.reg(x) * self.scales[level])
            if self.quality is not None:
                maps["quality"].append(self.quality(x))
        return maps

    def flatten(self, maps):
        """Maps -> {"f": (B, A, D) unit, "reg": (B, A, 4), "quality": (B, A) or None}, fp32 under autocast."""
        flat = lambda levels: fp32(torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in levels], 1))
        x = flat(maps["embed"])
        return dict(f=x / (x.norm(dim=-1, keepdim=True) + 1e-10), reg=flat(maps["reg"]),
                    quality=flat(maps["quality"])[..., 0] if maps["quality"] else None)

    def classify(self, f, text):
        """Eq. 1, inside the softmax: (..., D) unit, (K, D) unit -> (..., K + 1) logits; the background is the last."""
        cosine = f @ text.to(f).T
        bg = f.new_full((*f.shape[:-1], 1), 0.2) if self.background is None else f @ self.background.to(f).T
        return self.tau_c * torch.cat([cosine, bg], -1)

    @torch.no_grad()
    def unit_background(self):
        """T_bg is kept on the unit sphere: it learns by projected SGD."""
        if self.background is not None:
            self.background /= self.background.norm()


def anchors_of(maps):
    """(anchors (A, 4), [(H_l, W_l)], anchors per level): one square of side 8 strides per cell."""
    level_sizes = [tuple(m.shape[-2:]) for m in maps["reg"]]
    return grid_anchors(level_sizes, STRIDES, [8.0], device=maps["reg"][0].device), level_sizes, [h * w for h, w in level_sizes]


# ================================================================== loss: one function per equation

def softmax_focal_loss(logits, labels):
    """Focal loss of Eq. 1: -0.25 (1 - p_y)^2 log p_y. (..., K + 1) logits, (...) labels, K = background. 0.25 for every class."""
    logp = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return -0.25 * (1 - logp.exp()).square() * logp


def sample_anchors(positive, counts, negatives):
    """Sec. 3.4: all positives and a random share of the others, per level over the whole batch. (B, A) bool -> (B, A) bool.

    negatives: "1to1", or a share in (0, 1]. Below 1, a level without positives keeps nothing, as in the released code. A fixed number is drawn
    by rank, without asking the device how many there are.
    """
    if negatives != "1to1" and float(negatives) >= 1:
        return torch.ones_like(positive)
    keep = []
    for level in positive.split(counts, 1):
        count = level.sum()
        number = count if negatives == "1to1" else ((level.numel() - count).double() * float(negatives)).floor()
        draw = torch.rand(level.shape, device=level.device).masked_fill(level, 2.0).flatten()
        rank = torch.empty_like(draw).scatter_(0, draw.argsort(), torch.arange(draw.numel(), device=draw.device, dtype=draw.dtype))
        keep.append(level | ((rank.view_as(level) < number) & (count > 0)))
    return torch.cat(keep, 1)


def feature_distance(f, v, norm):
    """d of Eq. 2 between unit rows (N, D): the L1 norm, or the L2 norm (not squared). (N,)"""
    return (f - v).abs().sum(-1) if norm == "l1" else (f - v).square().sum(-1).clamp(min=1e-12).sqrt()


def pool_patches(f, level_sizes, n, pool):
    """Sec. 3.3: N x N patches of each level's unit embeddings, pooled and normalised. f (B, A, D) of L levels (H_l, W_l) -> (B, L N^2, D)."""
    pooling = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
    maps = [x.transpose(1, 2).unflatten(2, size) for x, size in zip(f.split([h * w for h, w in level_sizes], 1), level_sizes)]
    return F.normalize(torch.cat([pooling(x, n).flatten(2) for x in maps], 2).transpose(1, 2), dim=-1, eps=1e-10)


def mlca(patches, captions, tau=1.0):
    """Eqs. 3 and 4, multi-layer cross attention: (B, P, D) unit patches, (C, D) unit captions -> <I, C> as (C, B) cosines.

    tau: temperature of the attention, 1 in the paper: two patches then differ by e^2 at most, and a caption sees nearly their mean.
    """
    e = torch.einsum("cd,bpd->cbp", captions, patches)                         # Eq. 3: response of each patch to the caption
    seen = torch.einsum("cbp,bpd->cbd", (e / tau).softmax(-1), patches)                # Eq. 3: P_I^C, what the caption sees of the image
    return (F.normalize(seen, dim=-1, eps=1e-10) * captions[:, None]).sum(-1)  # Eq. 4


def caption_loss(score, tau, mine, valid, kind="cl"):
    """Eq. 5: cross entropy over the captions of an image plus over the images of a caption, mean over pairs.

    score: (N, N) <I, C>, rows captions; its diagonal are the pairs. mine: slice of the pairs of this process. valid: (N,) bool, the image
    has a caption. kind "pl": only pulls pairs together, without temperature. Without a valid pair the loss is 0, with gradient.
    """
    weight = valid[mine].float()
    count = reduce_mean(weight.sum(), 1.0)
    if kind == "pl":
        return -(score.diagonal()[mine] * weight).sum() / count
    logits = (tau * score).masked_fill(~(valid[:, None] & valid), -1e4)
    pairs = logits.diagonal()[mine]
    images, captions = logits.logsumexp(0)[mine], logits.logsumexp(1)[mine]
    return (((images - pairs) + (captions - pairs)) * weight).sum() / count


def gather_rows(x):
    """Rows of all processes, with gradient; the same everywhere."""
    if not dist.is_initialized():
        return x
    from torch.distributed.nn.functional import all_gather
    return torch.cat(all_gather(x))


class Distiller(nn.Module):
    """The detector with its text matrix and, outside the module tree, CLIP: forward(batch) -> {name: loss}; their sum is Eq. 6."""

    def __init__(self, student, clip, classes, a):
        super().__init__()
        self.student, self.a, self.clip = student, a, clip  # FrozenCLIP is no nn.Module
        self.register_buffer("text", clip.class_embeddings(classes), persistent=False)
        self.draws = 0  # how often crops were chosen, see crop_generator
        self.watch = {n: p for n in ("tau_c", "tau_m", "s") if (p := getattr(student, n, None)) is not None}

    def forward(self, batch):
        a, model = self.a, self.student
        model.unit_background()
        x = normalise(batch["images"], batch["sizes"])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=a.amp == "bf16"):
            maps = model(x)
        out = model.flatten(maps)
        anchors, level_sizes, counts = anchors_of(maps)
        valid = batch["labels"] >= 0
        owner = assign_atss(anchors, counts, batch["boxes"], valid, cells_inside(batch["sizes"], level_sizes, STRIDES))
        positive, index = owner >= 0, owner.clamp(min=0)
        boxes = batch["boxes"].gather(1, index[..., None].expand(-1, -1, 4))                       # (B, A, 4)
        labels = torch.where(positive, batch["labels"].gather(1, index), len(self.text))           # background is class K
        n_pos = reduce_mean(positive.sum(1).clamp(min=1).float().sum())  # at least 1 an image: the released code's rule

        # Eq. 1. Anchors beyond the image's own canvas take part in the draw, with weight 0, as in the released code.
        used = sample_anchors(positive, counts, a.negatives) & (owner > -2)
        cls = (softmax_focal_loss(model.classify(out["f"], self.text), labels) * used).sum() / n_pos
        losses = dict(cls=float(a.cls_weight) * cls if model.s is None else (-model.s).exp() * cls + model.s.abs())

        # Boxes and their quality.
        decoded = decode_deltas(out["reg"], anchors, DELTA_STD)
        iou, giou = overlap(decoded, boxes)
        iou = iou.detach()
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        u = dict(iou=iou, none=torch.ones_like(iou)).get(a.quality)
        u = (centerness_target(boxes, centers) if u is None else u) * positive
        losses["box"] = 2.0 * ((1 - giou) * u).sum() / reduce_mean(u.sum(), 1.0)
        if out["quality"] is not None:
            bce = F.binary_cross_entropy_with_logits(out["quality"], u, reduction="none") * positive
            losses["quality"] = bce.sum() / n_pos

        if a.ikd:
            losses["ikd"] = a.ikd_weight * self.instance_loss(batch, out["f"], decoded.detach(), boxes, positive & (iou >= a.ikd_iou), counts)
        if a.gkd:
            losses["gkd"] = a.gkd_weight * self.global_loss(batch, out["f"], level_sizes)
        return losses

    def crop_generator(self, device):
        """For --ikd-max, so that runs with and without it draw the same negatives. Each draw has a seed of its own,
        made of run, process and number of the draw: that number, alike in all processes, is what last.pt keeps."""
        self.draws += 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        return torch.Generator(device).manual_seed(hash((self.a.seed, rank, self.draws)))

    def instance_loss(self, batch, f, decoded, boxes, chosen, counts):
        """Eq. 2, IKD: embeddings of positives against CLIP's of their crops. chosen (B, A): the positives that take part."""
        a = self.a
        generator = self.crop_generator(chosen.device)
        image, anchor = chosen.nonzero(as_tuple=True)  # here a step waits for the device: CLIP must know how many crops, and their sizes
        if a.ikd_max and len(image) > a.ikd_max:
            pick = torch.randperm(len(image), generator=generator, device=image.device)[:a.ikd_max]
            image, anchor = image[pick], anchor[pick]
        crops = (decoded if a.ikd_box == "pred" else boxes)[image, anchor]
        with torch.autocast(f.device.type, torch.bfloat16, enabled=a.amp == "bf16"):
            v = encode_regions(self.clip, batch["images"], batch["sizes"], crops, image, a, a.crop_scale)
        if a.shuffle_crops and len(v) > 1:
            v = v.roll(len(v) // 2, 0)
        d = feature_distance(f[image, anchor], v, a.ikd_norm)
        if a.ikd_mean == "all":
            return d.sum() / reduce_mean(d.new_tensor(float(len(d))), 1.0)
        level = torch.bucketize(anchor, torch.tensor(counts, device=anchor.device).cumsum(0), right=True)
        sums, numbers = d.new_zeros(2, len(counts)).unbind()
        sums, numbers = sums.index_add(0, level, d), numbers.index_add(0, level, torch.ones_like(d))
        return (sums / numbers.clamp(min=1)).mean()

    def global_loss(self, batch, f, level_sizes):
        """Eqs. 3-5, GKD: captions against images."""
        a = self.a
        with torch.autocast(f.device.type, torch.bfloat16, enabled=a.amp == "bf16"):
            captions = self.clip.encode_text(batch["captions"])
        has = torch.tensor([bool(c) for c in batch["captions"]]).to(captions.device, non_blocking=True)
        if a.shuffle_captions:
            captions, has = captions.roll(1, 0), has.roll(1, 0)
        cells = sum(h * w for h, w in level_sizes[:a.gkd_levels])
        patches, start = pool_patches(f[:, :cells], level_sizes[:a.gkd_levels], a.gkd_patches, a.gkd_pool), 0
        if a.gkd_gather and dist.is_initialized():
            start = dist.get_rank() * len(patches)
            patches, captions, has = gather_rows(patches), gather_rows(captions), gather_rows(has.float()) > 0
        mine = slice(start, start + len(batch["captions"]))
        return caption_loss(mlca(patches, captions, a.tau_a), self.student.tau_m, mine, has, a.gkd_loss) + self.student.tau_m * 0  # pl: unused, but DDP waits for it


# ================================================================== checkpoints

ARCH = "backbone dim channels quality bg cls_weight gkd image_size clip data split data_seed".split()


def plain_of(model):
    """What a checkpoint holds beside weights: enough to rebuild the detector without any flag. No tensor of
    CLIP: names are chosen when it is used; arch has those of training (base) and evaluation (novel)."""
    return dict(script="hierkd.py", arch=model.arch)


def weights_of(model):
    """What a detector is, as plain values and tensors."""
    return dict(plain_of(model), model=model.state_dict())


def load_detector(path, flag="--weights"):
    """OpenATSS in eval mode from a checkpoint of ours."""
    checkpoint = load_checkpoint(path, "hierkd.py")
    a = checkpoint.get("arch")
    if isinstance(a, dict) and a.get("rpn") is True:
        raise UserError(f"{flag} {path}: is an RPN of --rpn-recall, which names nothing; give a detector")
    if not isinstance(a, dict) or not set(ARCH) <= set(a):
        raise UserError(f"{flag} {path}: is no checkpoint of hierkd.py")
    with rebuilding(f"{flag} {path}"):
        background = torch.ones(a["dim"]) if a["bg"] == "learn" else None
        model = OpenATSS(a["backbone"], background, a["dim"], a["channels"], a["quality"],
                         cls_weight=a["cls_weight"], gkd=a["gkd"])
    model.arch = a
    load_strict(model, checkpoint.get("model"), f"{flag} {path}")
    model.unit_background()
    return model.eval()


def follow(args, arch):
    """The flags with what a checkpoint was trained with: its novel classes must stay novel."""
    shapes, split = arch["data"] == "shapes", arch["split"]
    if args.data == "shapes" and not shapes:
        raise UserError("--data shapes: the checkpoint was trained on other classes, not on those of shapes")
    if shapes and split != "own":
        split = "shapes"  # an earlier version wrote 48_17
    return argparse.Namespace(**vars(args) | dict(
        data="shapes" if shapes else args.data, split=split, data_seed=arch["data_seed"],
        image_size=args.image_size or arch["image_size"]))


# ================================================================== data

def class_split(split, names, base=None):
    """Class names of a file -> (base, novel). split: of COCO, or "shapes", or "own": base is what training
    knows, by default this file's, and novel whatever else it names."""
    if split == "own":
        base = names if base is None else base
        known = {n.replace("_", " ") for n in base}
        return list(base), [n for n in names if n.replace("_", " ") not in known]
    if split == "shapes":
        from common.shapes import BASE, NOVEL
        return BASE, NOVEL
    return (BASE_48, NOVEL_17) if split == "48_17" else ([n for n in names if n not in NOVEL_15], NOVEL_15)


def make_data(args, split, base=None):
    """The training set (base boxes, with captions), or the images of val with a base or novel object; None
    without a val set. base: what was trained on; for own files, all other classes are novel."""
    files, captions = own_files(args, split), args.train_captions
    if files is False:
        return None
    rule, root = "own" if files else args.split, None
    if files is None:
        if args.data == "shapes":
            from common.shapes import make_shapes
        root = make_shapes(seed=args.data_seed) if args.data == "shapes" else args.data
        files = find_coco(root, split)
        captions = Path(root) / "annotations" / "captions_train2017.json"
    need = split == "train" and args.gkd
    if need and not (captions and Path(captions).exists()):
        where = f"--train-captions {captions}: is missing" if captions else "--train-captions: is missing"
        if root:
            where = f"--data {root}: {captions} is missing; it comes with COCO's annotations"
        raise UserError(f"{where}. GKD needs captions; or use --no-gkd (--data shapes needs nothing)")
    folder, annotations = files
    records, size = read_annotations(annotations, folder), args.image_size or "800"
    base, novel = class_split(rule, records.classes, base)
    if split == "train":
        data = CocoDataset(folder, records, True, size, classes=base, captions=captions if need else None,
                           without=novel if args.drop_novel_images else (), keep_empty=args.keep_empty)
        if need and not any(data.captions):
            raise UserError(f"{captions}: has no caption for any of the {len(data)} training images; do "
                            "their ids agree? Or use --no-gkd (--data shapes needs nothing)")
        return data
    chosen = dict(like=base + novel) if rule == "own" else dict(classes=base + novel)
    val = CocoDataset(folder, records, False, size, **chosen)
    if (args.rpn_recall or args.clip_direct or args.gt_upper_bound) and not truth_of(val, novel)["images"]:
        raise UserError(f"{annotations}: has no box of a novel class, and this evaluation is about them")
    return val


def truth_of(val, names):
    """COCO ground truth of these classes and of the images that hold one of them; called as in `val`."""
    called = dict(zip(val.category_ids, val.classes))
    truth = val.truth(names, holding=True)
    return truth | dict(categories=[c | dict(name=called[c["id"]]) for c in truth["categories"]])


def get_clip(args, device):
    """FrozenCLIP: the one asked for, or the tiny CLIP of shapes. The first process of a machine goes first:
    it downloads, or trains the tiny CLIP."""
    def load():
        if args.clip or args.data != "shapes":
            return load_clip(args.clip or "ViT-B-32-quickgelu/openai", device)
        from common.shapes import make_shapes
        from common.tiny import tiny_clip
        root = make_shapes(seed=args.data_seed)
        return load_clip(tiny_clip(root, root.parent / "clip", args.data_seed, device=device), device)
    clip = load() if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None
    barrier()
    return clip or load()


# ================================================================== train

METRIC = {False: "GZSD all AP50", True: "novel AR1000"}  # metrics["score"], without and with --rpn-recall
LEGEND = dict(
    cls="classification loss, Eq. 1: focal loss of the softmax over names and background",
    box="box loss: GIoU (RPN: L1)", quality="loss of the quality branch: IoU or centerness of a box",
    ikd="Eq. 2: embeddings of positives against CLIP's of their crops", gkd="Eqs. 3-5: captions and images",
    norm="norm of the gradient, clipped at 10", tau_c="temperature of Eq. 1, learnt",
    tau_m="temperature of Eq. 5, learnt", s="of the learnt weight exp(-s) of cls",
    objectness="the RPN's loss of object or not")


def make_pair(args, data, val, rank, world, device):
    """(student, CLIP) of the flags, on the device; with --rpn-recall (RPN, None)."""
    clip = None if args.rpn_recall else get_clip(args, device)
    channels = 64 if args.backbone.startswith("tiny") else 256
    seed_all(args.seed)
    if args.rpn_recall:
        student = BaseRPN(args.backbone, args.init, channels)
    else:
        background = None if args.bg == "fixed" else clip.encode_text(["a photo of background."])[0]
        student = OpenATSS(args.backbone, background, clip.dim, channels, args.quality, args.tau_c,
                           args.tau_m, args.cls_weight, args.gkd, args.embed_bias, args.init)
        if val:
            clip.class_embeddings(val.classes)  # a name that the evaluation could not use is told now
    own = args.clip and (str(Path(args.clip).resolve()) if Path(args.clip).is_file() else args.clip)
    novel = [n for n in val.classes if n not in data.classes] if val else []
    student.arch |= dict(image_size=args.image_size, clip=own or "", data=args.data, split=args.split,
                         data_seed=args.data_seed, base=data.classes, novel=novel)
    return student.to(device), clip


def method_of(args, student, clip):
    """What the log says of the models at the start."""
    names = f"{len(student.arch['base'])} base and {len(student.arch['novel'])} novel classes"
    return f"RPN | {names}" if clip is None else f"CLIP {clip.name} | IKD {args.ikd} GKD {args.gkd} | {names}"


def make_optimizer(model, algorithm, lr, weight_decay):
    """SGD with momentum 0.9, or AdamW, for the weights that learn."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=weights, lr=lr, base_lr=lr, weight_decay=weight_decay)]
    if algorithm == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, **fused())
    return torch.optim.AdamW(groups, lr, **fused())


def prepare(args, data, val, student, teacher, rank, world, device):
    """The Distiller, or Table 1's RPNLearner; the student described and compiled."""
    fast_layout(student, device)
    example = collate([data[0, 0]])["images"].float()
    describe_model(f"student {type(student).__name__}_{args.backbone}", student, example, rank=rank)
    if args.compile:
        student.compile()
    return (Distiller(student, teacher, data.classes, args) if teacher else RPNLearner(student, args)).train()


def reported(args):
    """How often a Run evaluates, and what it reports: novel classes must not choose the weights."""
    return dict(every=args.epochs if args.data == "shapes" else None, metric=METRIC[args.rpn_recall], report="last")


def rate_factor(args, it, steps):
    """Learning-rate factor of iteration `it`, `steps` an epoch."""
    milestones = (args.epochs * (3 / 4 if args.schedule == "3x" else 2 / 3), args.epochs * 11 / 12)
    return warmup_multistep(it, steps, milestones, min(500, args.epochs * steps // 10))


def train(args, rank, world, device):
    """Train under args; returns the last evaluation's metrics (rank 0) or None."""
    data = make_data(args, "train")
    val = make_data(args, "val", base=data.classes)
    open_run(args, rank, args.resume)
    student, teacher = make_pair(args, data, val, rank, world, device)
    distiller = prepare(args, data, val, student, teacher, rank, world, device)
    model = wrap_ddp(distiller, device, world)
    loader, plan = train_loader(data, args.batch_size, rank, world, args.seed, args.workers)
    total_batch = args.batch_size * world * args.accumulate
    paper_batch = 32 if args.gkd and args.data != "shapes" else 16
    lr = args.lr * total_batch / paper_batch
    optimizer = make_optimizer(student, args.optimizer, lr, args.weight_decay)
    run = Run(args, student, optimizer, plain_of(student), len(plan), total_batch, rank, world, device,
              legend=LEGEND, **reported(args))
    measure = partial(evaluate, teacher) if teacher else measure_recall
    distiller.draws = run.state.get("draws", 0) if run.resumed else 0
    run.beside = dict(draws=lambda: distiller.draws)
    run.describe(method_of(args, student, teacher), lr, args.lr, paper_batch, data, val)
    while True:
        if run.due:
            run.scored(*measure(student, val, rank, world, device, args), val)
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
            norm = nn.utils.clip_grad_norm_(student.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step(losses, lr * factor, dict(norm=norm, **distiller.watch))
        run.end_epoch()
    return run.close()


# ================================================================== evaluate, predict

def top_detections(boxes, scores, iou, count):
    """Class-wise NMS over all (box, class) pairs, best `count`: (boxes (N, 4), scores (N,), labels (N,)). boxes (n, 4), scores (n, K).

    With a threshold of 0 every pair competes, 217,750 of them for GZSD. NMS goes down by score, so what survives among the best pairs
    does not depend on the rest: the best 4,096 are tried first, and more only if too few survive. The same result.
    """
    flat, tried = scores.flatten(), 4096
    while True:
        score, pair = flat.topk(min(tried, len(flat)))
        pair, score = pair[score > 0], score[score > 0]
        kept = batched_nms(boxes[pair // scores.shape[1]], score, pair % scores.shape[1], iou)
        if len(kept) >= count or tried >= len(flat):
            kept = kept[:count]
            return boxes[pair[kept] // scores.shape[1]], score[kept], pair[kept] % scores.shape[1]
        tried *= 8


@torch.no_grad()
def detect(model, maps, size, texts, nms_iou=0.4, per_level=1000, count=100, direct=None):
    """Maps of ONE image -> a list over text matrices (K, D) of (boxes in network pixels, scores, labels). size: (h, w) of the image.

    Per level the 1000 anchors of highest max_c p_c * sigmoid(quality); score = p_c * sigmoid(quality); background is dropped after the softmax.
    direct: Algorithm 1, a function (boxes (n, 4), text (K, D)) -> p (n, K) that takes the place of p for the chosen anchors, and whether
    it is multiplied by the quality.
    """
    out, (anchors, _, counts) = model.flatten(maps), anchors_of(maps)
    quality = out["quality"][0].sigmoid() if out["quality"] is not None else torch.ones(len(anchors), device=anchors.device)
    boxes = clip_boxes_to_image(decode_deltas(out["reg"][0], anchors, DELTA_STD), tuple(size))
    found = []
    for text in texts:
        scores = model.classify(out["f"][0], text).softmax(-1)[:, :-1] * quality[:, None]                         # (A, K)
        start, picked = 0, []
        for top, n in zip(scores.amax(1).split(counts), counts):
            picked.append(start + top.topk(min(per_level, n)).indices)
            start += n
        picked = torch.cat(picked)
        scores = scores[picked]
        if direct:
            scores = direct[0](boxes[picked], text) * (quality[picked, None] if direct[1] else 1)
        found.append(top_detections(boxes[picked], scores, nms_iou, count))
    return found


def run_detector(model, batch, device, args, texts, clip=None):
    """One collated image -> for each text matrix (boxes in original pixels, scores, labels). clip: with
    --clip-direct it classifies."""
    batch = to_device(batch, device)
    x, direct = normalise(batch["images"], batch["sizes"]), None
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        maps = model(x)
    if clip:
        def by_clip(boxes, text):
            owner = torch.zeros(len(boxes), dtype=torch.long, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                v = encode_regions(clip, batch["images"], batch["sizes"], boxes, owner, args, args.crop_scale)
            return (100 * v @ text.T).softmax(-1)
        direct = by_clip, args.direct_quality
    (h, w), (height, width) = batch["sizes"][0].tolist(), batch["original_sizes"][0]
    scale = torch.tensor([width / w, height / h] * 2, device=device)
    found = detect(model, maps, (h, w), texts, args.nms, direct=direct)
    return [(boxes * scale, scores, labels) for boxes, scores, labels in found]


GROUPS = dict(zsd="ZSD novel", base="base", gzsd_base="GZSD base", gzsd_novel="novel", gzsd_all="all")
KEYS = ("AP50", "AR50", "AP50s", "AP50m", "AP50l")


def evaluate(clip, model, val, rank, world, device, args):
    """(AP50 and AR50 under ZSD, GZSD and base only, GZSD's detections) on rank 0, (None, None) elsewhere or
    without a validation set.

    ZSD: novel names, images with a novel object. Base: likewise. GZSD: all names compete; means over base,
    novel and all classes. With --clip-direct ZSD alone, as in Table 6; without a novel object without ZSD.
    """
    if val is None:
        return None, None
    model.eval()
    model.unit_background()  # it is off the sphere after a step
    since, known = time.time(), model.arch.get("base") or class_split(args.split, val.classes)[0]
    base, novel = ([n for n in val.classes if (n in known) == wanted] for wanted in (True, False))
    names = dict(zsd=novel) if args.clip_direct else dict(zsd=novel, base=base, gzsd=val.classes)
    truth = {p: truth_of(val, names[p]) for p in names}
    names = {p: names[p] for p in names if truth[p]["images"]}
    ids = {p: [val.category_ids[val.classes.index(n)] for n in names[p]] for p in names}
    texts = {p: clip.class_embeddings(names[p]) for p in names}
    wanted = {p: {i["id"] for i in truth[p]["images"]} for p in names}
    results = {p: [] for p in names}
    loader = eval_loader(val, rank, world, args.workers)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        image_id = batch["image_ids"][0]
        asked = [p for p in names if image_id in wanted[p]]
        if asked:
            direct = clip if args.clip_direct else None
            found = run_detector(model, batch, device, args, [texts[p] for p in asked], direct)
            for p, result in zip(asked, found):
                results[p] += to_coco_results(image_id, *result, ids[p])
    results = {p: gather(results[p]) for p in names}
    if rank != 0:
        return None, None
    stats = {p: coco_evaluate(truth[p], results[p]) for p in names}
    members = dict(zsd=novel, base=base, gzsd_base=base, gzsd_novel=novel, gzsd_all=val.classes)
    groups = [g for g in GROUPS if g.split("_")[0] in names and members[g]]
    metrics = dict(images=len(val), seconds=time.time() - since)
    for g in groups:
        protocol = stats[g.split("_")[0]]
        metrics |= {f"{g}_{key}": class_mean(protocol, members[g], key) for key in KEYS}
    metrics["score"] = metrics["zsd_AP50" if args.clip_direct else "gzsd_all_AP50"]
    metrics["classes"] = {p: stats[p]["classes"] for p in names}
    both = {g: f"AP50 {metrics[g + '_AP50']:.1f} AR50 {metrics[g + '_AR50']:.1f}" for g in groups}
    numbers = [f"{GROUPS[g]} {both[g]}" for g in groups]
    metrics["line"] = " | ".join([f"{len(val)} images", *numbers, f"{metrics['seconds']:.0f}s"])
    return metrics, results["zsd" if args.clip_direct else "gzsd"]


def evaluate_file(args, rank, world, device):
    """--eval: metrics of a checkpoint, into --out."""
    from common.pictures import write_results
    model = load_detector(args.eval, "--eval").to(device)
    args = follow(args, model.arch)
    val = make_data(args, "val", base=model.arch.get("base"))
    metrics, results = evaluate(clip_of(model, args, device), model, val, rank, world, device, args)
    if rank == 0:
        write_results(Path(args.out), metrics, results, val, args.eval, None, None)
        print(metrics["line"])


def clip_of(model, args, device):
    """The CLIP that a checkpoint was trained with, unless --clip names another; its width must fit."""
    name = args.clip or model.arch["clip"] or None
    clip, dim = get_clip(argparse.Namespace(**vars(args) | dict(clip=name)), device), model.arch["dim"]
    if clip.dim != dim:
        raise UserError(f"--clip {clip.name}: has {clip.dim}-d embeddings, the checkpoint {dim}-d")
    return clip


def class_names(values, flag="--classes"):
    """One value is split at commas, or is a file with one name a line; several values are one name each."""
    names = values
    if len(values) == 1 and Path(values[0]).is_file():
        names = Path(values[0]).read_text(encoding="utf-8-sig").strip().splitlines()
    elif len(values) == 1:
        names = values[0].split(",")
    names = [n.strip() for n in names]
    if not all(names):
        raise UserError(f"{flag} {' '.join(values)}: holds an empty name")
    return names


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file) and one picture per image into --out."""
    from common.pictures import Pictures
    model = load_detector(args.weights).to(device)
    args = follow(args, model.arch)
    classes = model.arch.get("base", []) + model.arch.get("novel", [])
    if args.classes:
        classes = class_names(args.classes)
    if not classes:
        raise UserError(f"--weights {args.weights}: of an earlier version, without names; give --classes")
    pictures = Pictures(args.predict, args.out, args.score)
    text = clip_of(model, args, device).class_embeddings(classes)
    size = max(parse_image_size(args.image_size))
    for picture in pictures:
        image, (h, w) = resize(picture.pixels, size)
        item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(),
                    image_id=0, original_size=picture.pixels.shape[1:])
        batch = collate([item])
        picture.save(*run_detector(model, batch, device, args, [text])[0], classes)
        if args.heat_map:
            from matplotlib import colormaps  # comes with lvis
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                maps = model(normalise(batch["images"].to(device), batch["sizes"].to(device)))
                heat = heat_map(model, maps, text, (h, w))[None]
                heat = F.interpolate(heat, picture.pixels.shape[1:], mode="bilinear")[0].cpu().numpy()
            for name, score in zip(classes, heat):
                coloured = torch.from_numpy(colormaps["jet"](score)[..., :3]).permute(2, 0, 1) * 255
                picture.write(f"heat_{name}", 0.5 * picture.pixels + 0.5 * coloured)


# ================================================================== analyses of the paper

def upper_bound(args, rank, world, device):
    """Table 9: each novel object's true box is one detection, named by CLIP among the novel names.

    Crops come from the original file, enlarged by --crop-scale. One name a box, so AR50 is the mean over
    classes of the top-1 accuracy.
    """
    from common.pictures import write_results
    val = make_data(args, "val", base=[])
    novel = class_split("own" if args.val_json else args.split, val.classes, [])[1]
    names = [n for n in val.classes if n in novel]
    ids = [val.category_ids[val.classes.index(n)] for n in names]
    truth, results = truth_of(val, names), []
    clip = get_clip(args, device)
    text = clip.class_embeddings(names)
    boxes = {i["id"]: [] for i in truth["images"]}
    for a in truth["annotations"]:
        if not a["iscrowd"]:
            x, y, w, h = a["bbox"]
            boxes[a["image_id"]].append((x, y, x + w, y + h))
    for image in tqdm(truth["images"][rank::world], desc="upper bound", disable=rank != 0, mininterval=1):
        path, where = val.folder / image["file_name"], torch.tensor(boxes[image["id"]])
        pixels = TF.pil_to_tensor(read_image(path))[None]
        size = pixels.shape[2:]
        if tuple(size) != (image["height"], image["width"]):
            raise UserError(f"{path}: is {size[1]}x{size[0]}, but {val.annotations.name} says "
                            f"{image['width']}x{image['height']}")
        owner = torch.zeros(len(where), dtype=torch.long, device=device)
        sizes = torch.tensor([size], device=device)
        v = encode_regions(clip, pixels.to(device), sizes, where.to(device), owner, args, args.crop_scale)
        score, label = (100 * v @ text.T).softmax(-1).max(-1)
        results += to_coco_results(image["id"], where, score, label, ids)
    results = gather(results)
    if rank == 0:
        stats = coco_evaluate(truth, results)
        metrics = {key: class_mean(stats, names, key) for key in KEYS} | dict(classes=stats["classes"])
        sizes = " ".join(f"{k[-1].upper()} {metrics[k]:.1f}" for k in KEYS[2:])
        print(f"CLIP {clip.name} on {len(results)} true boxes of {len(names)} novel classes | "
              f"AR50 {metrics['AR50']:.1f} AP50 {metrics['AP50']:.1f} {sizes}")
        write_results(Path(args.out), metrics, results, val, f"CLIP {clip.name}", None, None)


class BaseRPN(nn.Module):
    """torchvision's class-agnostic region proposal network on an FPN of C2..C5 (Table 1)."""

    def __init__(self, backbone, init, channels):
        super().__init__()
        self.arch = dict(rpn=True, backbone=backbone, channels=channels)
        self.body, widths = make_body(backbone, init, from_c2=True)
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool())
        anchors = AnchorGenerator(tuple((size,) for size in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
        count = dict(training=1000, testing=1000)
        self.rpn = RegionProposalNetwork(anchors, RPNHead(channels, 3), 0.7, 0.3, 256, 0.5, count, count, 0.7)

    def forward(self, x, sizes=None, boxes=None, amp="none"):
        """-> (proposals of each image, best first, {name: loss}, empty without boxes); without sizes raw
        predictions. bf16 up to the FPN: torchvision's anchors have the maps' dtype."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp == "bf16"):
            maps = self.fpn(self.body(x))
        if sizes is None:
            return self.rpn.head(list(maps.values()))
        targets = None if boxes is None else [dict(boxes=b) for b in boxes]
        images = ImageList(x, [tuple(size) for size in sizes.tolist()])
        return self.rpn(images, {k: fp32(m) for k, m in maps.items()}, targets)


class RPNLearner(nn.Module):
    """The RPN, which has no teacher: forward(batch) -> {name: loss}."""

    def __init__(self, model, a):
        super().__init__()
        self.model, self.a, self.watch = model, a, {}

    def forward(self, batch):
        x = normalise(batch["images"], batch["sizes"])
        boxes = [b[k >= 0] for b, k in zip(batch["boxes"], batch["labels"])]
        losses = self.model(x, batch["sizes"], boxes, self.a.amp)[1]
        return dict(objectness=losses["loss_objectness"], box=losses["loss_rpn_box_reg"])


@torch.no_grad()
def measure_recall(model, val, rank, world, device, args, most=(100, 300, 1000), ious=(0.5, 0.75)):
    """Table 1: (recall of novel boxes by an RPN that has seen base boxes only, None) on rank 0, (None, None)
    elsewhere. Among the best `most` proposals, at each IoU, one proposal a box; classes are ignored."""
    model.eval()
    since, names = time.time(), [n for n in val.classes if n not in model.arch["base"]]
    truth, results = truth_of(val, names), []
    wanted = {i["id"] for i in truth["images"]}
    loader = eval_loader(val, rank, world, args.workers)
    for batch in tqdm(loader, desc="recall", disable=rank != 0, leave=False, mininterval=1):
        if batch["image_ids"][0] in wanted:
            batch = to_device(batch, device)
            boxes = model(normalise(batch["images"], batch["sizes"]), batch["sizes"], None, args.amp)[0][0]
            (h, w), (height, width) = batch["sizes"][0].tolist(), batch["original_sizes"][0]
            boxes = boxes * torch.tensor([width / w, height / h] * 2, device=device)
            scores = torch.arange(len(boxes), 0, -1) / len(boxes)
            labels = torch.zeros(len(boxes), dtype=torch.long)
            results += to_coco_results(batch["image_ids"][0], boxes, scores, labels, [0])
    results = gather(results)
    if rank != 0:
        return None, None
    metrics = {f"AR{n}_{iou}": r for (iou, n), r in class_agnostic_recall(truth, results, most, ious).items()}
    metrics |= dict(score=metrics[f"AR{most[-1]}_{ious[0]}"], images=len(wanted), seconds=time.time() - since)
    recall = {iou: " ".join(f"@{n} {metrics[f'AR{n}_{iou}']:.1f}" for n in most) for iou in ious}
    metrics["line"] = " | ".join(f"novel boxes, IoU {iou}: recall {recall[iou]}" for iou in ious)
    return metrics, None


def heat_map(model, maps, text, size):
    """Fig. 4: the classification score p_c of each name at each place, the best of all levels. (K, h, w) in 0..1."""
    score = model.classify(model.flatten(maps)["f"][0], text).softmax(-1)[:, :-1]
    at, levels = torch.stack(torch.meshgrid(torch.arange(size[1]), torch.arange(size[0]), indexing="xy"), -1).to(score), []
    for m, level, stride in zip(maps["reg"], score.split([m.shape[-2] * m.shape[-1] for m in maps["reg"]]), STRIDES):
        h, w = m.shape[-2:]
        where = 2 * at / stride / torch.tensor([max(w - 1, 1), max(h - 1, 1)]).to(at) - 1  # cell j lies at j * stride
        levels.append(F.grid_sample(level.T.reshape(1, -1, h, w), where[None], padding_mode="border", align_corners=True)[0])
    return torch.stack(levels).amax(0)


# ================================================================== the embedded dataset: baseline and HierKD

def shapes_table(args, rank, world, device):
    """The detector without distillation and HierKD, in one table."""
    rows = []
    for name, ikd, gkd in (("baseline", False, False), ("HierKD", True, True)):
        since, out = time.time(), Path(args.out) / name.lower()
        resume = args.resume and (out / "last.pt").exists()
        more = dict(ikd=ikd, gkd=gkd, out=str(out), resume=resume, table=False)
        metrics = train(argparse.Namespace(**vars(args) | more), rank, world, device)
        rows.append((name, metrics, time.time() - since))
    if rank == 0:
        print(f"\n{args.data + ', AP50':18s}  ZSD novel   base | GZSD base  novel    all   seconds")
        for name, m, seconds in rows:
            zsd, base, of_base, of_novel, of_all = (m.get(f"{g}_AP50", -1) for g in GROUPS)
            print(f"{name:18s} {zsd:10.1f} {base:6.1f} | {of_base:9.1f} {of_novel:6.1f} {of_all:6.1f} "
                  f"{seconds:9.0f}")


# ================================================================== flags

EXAMPLES = """
torchrun --nproc_per_node 4 hierkd.py --data data/coco           # HierKD R50 1x, 48/17 split
python hierkd.py --data shapes                                   # everything in minutes on a CPU
python hierkd.py --predict photo.jpg --weights runs/hierkd/best.pt --classes "red panda,umbrella"
"""
CROPS = "crop_scale crop_norm crop_antialias"
OF_IKD = "ikd_norm ikd_weight ikd_mean ikd_box ikd_iou ikd_max shuffle_crops"
OF_GKD = """gkd_loss gkd_weight gkd_patches gkd_levels gkd_pool gkd_gather tau_a tau_m shuffle_captions
    train_captions"""
# flags, the flag that gives them an effect, its values
BELONGS = (
    (f"{OF_IKD} {CROPS}", "ikd", (True,)),
    (OF_GKD, "gkd", (True,)),
    ("tau_m gkd_gather", "gkd_loss", ("cl",)),
    ("data_seed", "data", ("shapes",)))
OF_DETECTOR = f"""clip quality bg tau_c embed_bias preset ikd gkd negatives cls_weight nms table
    {OF_IKD} {OF_GKD} {CROPS}"""
RELEASED = dict(ikd_norm="l2", ikd_weight=0.05, ikd_mean="level", cls_weight="learn", crop_norm="imagenet",
                crop_antialias=False, direct_quality=True)


def number_or(word, kind):
    """argparse type: the word, or a number of this kind."""
    def parse(text):
        try:
            return word if text == word else kind(text)
        except argparse.ArgumentTypeError as e:
            raise argparse.ArgumentTypeError(f"{e}; or {word}") from None
    return parse


def parse_args(argv=None):
    p = parser(__doc__, EXAMPLES)
    switch = dict(action=argparse.BooleanOptionalAction)
    g = p.add_argument_group("data")
    g.add_argument("--data", default="data/coco", help="COCO-layout root, or 'shapes': the embedded dataset")
    g.add_argument("--split", choices=("48_17", "65_15"),
                   help="base / novel classes of COCO (default 48_17). Shapes has its own; own files: base "
                   "are the classes of --train-json, novel are others of --val-json")
    g.add_argument("--train-captions", metavar="JSON",
                   help="COCO-format captions of the images of --train-json, for GKD")
    g.add_argument("--classes", action="append", metavar="NAMES",
                   help="for --predict: any names, comma-separated, or a file with one a line; given several "
                   "times, one name each (default: base and novel)")
    g.add_argument("--data-seed", type=SEED, default=0,
                   help="shapes: seed of the drawn images and of the tiny CLIP")
    g.add_argument("--drop-novel-images", **switch, default=False,
                   help="leave out training images that hold a novel object (the older 65/15 protocol)")
    g.add_argument("--image-size",
                   help="short side: 800, a choice 640,800 or a range 480-800 (default 800; schedule 3x "
                   "480-800; shapes 72-120; --eval, --predict: as trained)")
    g = p.add_argument_group("model")
    g.add_argument("--clip",
                   help="teacher: MODEL/WEIGHTS of open_clip (default ViT-B-32-quickgelu/openai; shapes: the "
                   "tiny CLIP, trained on demand)")
    g.add_argument("--backbone", help="r50 or r101 (default r50; shapes tiny16; tiny8 ... tiny64)")
    g.add_argument("--init", choices=("imagenet", "none"),
                   help="backbone start (default imagenet; shapes none)")
    g.add_argument("--quality", choices=("iou", "centerness", "none"), default="iou",
                   help="what the quality branch learns, and the weight of boxes")
    g.add_argument("--bg", choices=("learn", "fixed"), default="learn",
                   help="background embedding, or a constant cosine of 0.2")
    g.add_argument("--tau-c", type=POSITIVE,
                   help="start of the classifier's temperature, Eq. 1 (default 100; shapes 30)")
    g.add_argument("--embed-bias", choices=("focal", "zero"),
                   help="start of the embedding's bias: -4.6 or 0 (default focal; shapes zero)")
    g = p.add_argument_group("method")
    g.add_argument("--preset", choices=("paper", "released"), default="paper",
                   help="released: --ikd-norm l2 --ikd-weight 0.05 --ikd-mean level --cls-weight learn "
                   "--crop-norm imagenet --no-crop-antialias --direct-quality")
    g.add_argument("--ikd", **switch, default=True, help="instance-level distillation, Eq. 2")
    g.add_argument("--ikd-norm", choices=("l1", "l2"), help="distance of Eq. 2 (default l1)")
    g.add_argument("--ikd-weight", type=number(), help="lambda_ins of Eq. 6 (default 1; shapes 0.4)")
    g.add_argument("--ikd-mean", choices=("all", "level"),
                   help="mean over positives, or per level and then over levels (default all)")
    g.add_argument("--ikd-box", choices=("pred", "gt"), default="pred", help="boxes that are cropped")
    g.add_argument("--ikd-iou", type=number(float, -1, 1), default=0.5,
                   help="positives whose predicted box overlaps its object less are left out")
    g.add_argument("--ikd-max", type=COUNT,
                   help="at most so many crops per process and step, drawn at random (default all; shapes "
                   "64)")
    g.add_argument("--crop-scale", type=POSITIVE,
                   help="crops are enlarged by this (default 1; training on shapes 1.2)")
    g.add_argument("--crop-norm", choices=("clip", "imagenet"),
                   help="mean and deviation of the crops (default clip)")
    g.add_argument("--crop-antialias", **switch, help="PIL's antialiased resize (default), or plain bicubic")
    g.add_argument("--gkd", **switch, default=True, help="global (caption) distillation, Eqs. 3-5")
    g.add_argument("--gkd-loss", choices=("cl", "pl"), default="cl",
                   help="contrastive, Eq. 5, or positive pairs only")
    g.add_argument("--gkd-weight", type=number(), help="lambda_Glo of Eq. 6 (default 1; shapes 0.2)")
    g.add_argument("--gkd-patches", type=COUNT, default=3, help="N: each level is cut into N x N patches")
    g.add_argument("--gkd-levels", type=number(int, 1, 5),
                   help="levels that are cut, from P3 (default 5; shapes 2: P5 to P7 see a whole image in 16 "
                   "to 1 cells)")
    g.add_argument("--gkd-pool", choices=("max", "avg"), default="max", help="pooling of a patch")
    g.add_argument("--gkd-gather", **switch, default=False,
                   help="contrast with the images and captions of all processes")
    g.add_argument("--tau-a", type=POSITIVE,
                   help="temperature of the captions' attention, Eq. 3 (default 1; shapes 0.1)")
    g.add_argument("--tau-m", type=POSITIVE, default=10.0, help="start of the temperature of Eq. 5")
    g.add_argument("--negatives", type=number_or("1to1", number(float, 0, 1, above=True)), default=0.1,
                   help="share of the negatives that is kept, per level; or 1to1: as many as positives")
    g.add_argument("--cls-weight", type=number_or("learn", POSITIVE),
                   help="lambda_cls of Eq. 6: a number, or learn: exp(-s), with + |s| (default 1)")
    g.add_argument("--nms", type=number(float, 0, 1), default=0.4, help="IoU of the class-wise NMS")
    g.add_argument("--shuffle-captions", action="store_true",
                   help="control: each image gets the caption of another")
    g.add_argument("--shuffle-crops", action="store_true",
                   help="control: each positive gets the crop embedding of another")
    g = p.add_argument_group("schedule")
    g.add_argument("--schedule", choices=("1x", "2x", "3x"), default="1x",
                   help="12, 24 or 36 epochs; x0.1 at 2/3 and 11/12, 3x: 3/4 and 11/12")
    g.add_argument("--epochs", type=COUNT, help="instead of the schedule's (shapes 16)")
    g.add_argument("--batch-size", type=COUNT, help="images per process and step (default 8; shapes 16)")
    g.add_argument("--optimizer", choices=("sgd", "adamw"), help="(default sgd; shapes adamw)")
    g.add_argument("--lr", type=POSITIVE,
                   help="for a total batch of 32, of 16 without GKD; scaled linearly (default 0.01; "
                   "--rpn-recall 0.02; shapes 0.004 at 16)")
    g.add_argument("--weight-decay", type=number(), default=1e-4)
    g.add_argument("--table", **switch,
                   help="train without and with distillation and print both (default: on shapes, with IKD "
                   "and GKD, without --max-iters)")
    g = p.add_argument_group("analyses of the paper")
    g.add_argument("--clip-direct", **switch, default=False,
                   help="with --eval: Algorithm 1, Table 6: CLIP classifies crops of the detector's boxes; "
                   "crops as by --crop-*")
    g.add_argument("--direct-quality", **switch, help="the quality still multiplies CLIP's score there")
    g.add_argument("--gt-upper-bound", action="store_true",
                   help="Table 9: CLIP classifies the true boxes of novel objects")
    g.add_argument("--rpn-recall", action="store_true",
                   help="Table 1: train a class-agnostic RPN on base boxes, then its recall of novel boxes")
    g.add_argument("--heat-map", action="store_true",
                   help="with --predict: Fig. 4, the classification score of each name at each place")
    run_flags(p, "hierkd")
    first, given = p.parse_args(argv), given_flags(p, argv)
    crops = f"{CROPS} preset" if first.clip_direct else ""
    modes = dict(eval=f"data data_seed workers clip clip_direct direct_quality nms val_json val_images {crops}",
                 predict="data data_seed weights score classes clip nms heat_map",
                 gt_upper_bound=f"data data_seed clip split {CROPS} preset val_json val_images")
    args = parse(p, argv, "hierkd-rpn" if first.rpn_recall else "hierkd", modes,
                 only="weights score classes heat_map clip_direct direct_quality", belongs=BELONGS,
                 apart=("eval predict gt_upper_bound rpn_recall",), saved=flags_of_run)
    if "direct_quality" in given and not args.clip_direct:
        p.error("--direct-quality: belongs to --clip-direct")
    wrong = "" if any(getattr(args, m) for m in modes) else contradiction(args, given)
    if wrong:
        p.error(wrong)
    idle = sorted(given & set(OF_DETECTOR.split())) if args.rpn_recall else []
    if idle and int(os.environ.get("RANK", 0)) == 0:
        idle = ", ".join("--" + f.replace("_", "-") for f in idle)
        print(f"note: with --rpn-recall there is no effect of {idle}", file=sys.stderr)
    if args.image_size:
        parse_image_size(args.image_size)
    return args


def contradiction(args, given):
    """What is wrong with a training's flags as a whole, or "". given: those that stand in the command."""
    shapes, own = args.data == "shapes", args.train_json
    if args.schedule != "3x" and "schedule" in given and (shapes or "epochs" in given):
        return f"--schedule {args.schedule}: sets the epochs only, which --epochs or --data shapes set, too"
    if "split" in given and (shapes or own):
        return f"--split {args.split}: is of COCO's names, {'own files' if own else 'shapes'} have theirs"
    if args.drop_novel_images and own:
        return "--drop-novel-images: the classes of --train-json are all base"
    if args.train_captions and not own:
        return "--train-captions: belongs to --train-json; COCO's captions lie beside its boxes"
    if args.table and not (args.ikd and args.gkd):
        return "--table: trains without and with both distillations; leave out --no-ikd and --no-gkd"
    if (args.table or args.rpn_recall) and own and not args.val_json:
        return f"--{'table' if args.table else 'rpn-recall'}: needs a validation set, --val-json"
    return ""


def flags_of_run(args):
    """For --resume: the flags of the run in --out, or of the table of runs; {} where nothing is saved yet."""
    one, table = Path(args.out) / "last.pt", Path(args.out) / "baseline/last.pt"
    if one.exists() and table.exists():
        raise UserError(f"--resume: {args.out} holds a run and a table of runs; give the folder of one run")
    if table.exists():
        return saved_flags(table, "hierkd.py") | dict(ikd=True, gkd=True, table=True)
    return saved_flags(one, "hierkd.py") if one.exists() else {}


def resolve(args):
    """The flags with every default that depends on another flag; after this they are only read."""
    training = not (args.eval or args.predict or args.gt_upper_bound)
    shapes, own, rpn = args.data == "shapes", bool(training and args.train_json), args.rpn_recall
    defaults = dict(
        split="own" if own else "shapes" if shapes else "48_17", backbone="r50", init="imagenet", tau_c=100.0,
        embed_bias="focal", ikd_norm="l1", ikd_weight=1.0, ikd_mean="all", crop_scale=1.0, crop_norm="clip",
        crop_antialias=True, gkd_weight=1.0, gkd_levels=5, tau_a=1.0, cls_weight=1.0, direct_quality=False,
        epochs={"1x": 12, "2x": 24, "3x": 36}[args.schedule], batch_size=8, optimizer="sgd",
        lr=0.02 if rpn else 0.01,
        table=shapes and args.ikd and args.gkd and args.max_iters is None and not (own or rpn))
    if shapes:
        defaults.update(
            backbone="tiny16", init="none", tau_c=30.0, embed_bias="zero", ikd_weight=0.4, ikd_max=64,
            crop_scale=1.2 if training else 1.0, gkd_weight=0.2, gkd_levels=2, tau_a=0.1, epochs=16,
            batch_size=16, optimizer="adamw", lr=0.004)
    if training:
        defaults["image_size"] = "72-120" if shapes else "480-800" if args.schedule == "3x" else "800"
    if args.preset == "released":
        defaults.update(RELEASED)
    found = {k: v for k, v in defaults.items() if getattr(args, k) is None}
    if rpn:
        found |= dict(ikd=False, gkd=False)
    if not training:
        found["train_json"] = None
    args = argparse.Namespace(**vars(args) | found)
    if training:
        check_backbone(args.backbone, args.init)
        processes = dist.get_world_size() if args.gkd_gather and dist.is_initialized() else 1
        if args.gkd and args.gkd_loss == "cl" and args.batch_size * processes == 1:
            raise UserError("--batch-size 1: GKD contrasts the images of a batch, with one image its loss is "
                            "always 0; use more or --gkd-gather")
    return args


# ================================================================== main

def main():
    with started("hierkd.py") as (rank, world, device):
        args = resolve(parse_args())
        if args.eval or args.predict or args.gt_upper_bound:
            answer_folder(args.out, rank)
        if args.eval:
            evaluate_file(args, rank, world, device)
        elif args.predict:
            if world > 1:
                raise UserError("--predict: runs in one process; start it with python")
            predict(args, device)
        elif args.gt_upper_bound:
            upper_bound(args, rank, world, device)
        elif args.table:
            shapes_table(args, rank, world, device)
        else:
            train(args, rank, world, device)


if __name__ == "__main__":
    main()
