# SPDX-License-Identifier: MIT
"""DK-DETR: open-vocabulary Deformable DETR, distilled from CLIP by auxiliary queries (Li et al., ICCV 2023).

Idea. A two-stage Deformable DETR compares the projected feature f of each query with CLIP's text embeddings of the class names (Eqs. 1, 2).
It is trained on base classes, so it knows no novel name. CLIP's image encoder does: it sees crops of those coarse proposals that match no base
object but look like objects. To teach f the embeddings of these crops directly would disturb detection, so a second set of queries, the KD
queries, goes through the SAME decoder from the same boxes; its features are distilled and thrown away after training. Two losses: SKD (Eq. 4),
a query's feature and the crop of its own box are a pair, those of other boxes are not; RKD (Eq. 5), similarities among the features of an
image or a batch must equal those among CLIP's. No object feature ever reads a KD feature; what is learnt arrives through shared weights.

Letters: B images, S tokens of all L levels, N queries, D width, T text width, K classes, M objects (padded), k distilled boxes of an image.
Boxes: cx, cy, w, h in 0..1 of the valid image inside the network, xyxy pixels outside.

What nobody published. The release is inference only; of the distillation there are two pages of paper. Open choices are flags (default first):
  --kd-boxes encoder|decoder|gt   coarse proposals, as the text has it
  --kd-exclude matched|iou        the text drops matched queries; iou also those that overlap an object by half
  --kd-attn obj+kd|kd             KD queries may look at object queries: only the other direction is said to be blocked
  --kd-ref shared|own             KD queries follow the object queries' boxes, which keeps query and crop paired
  --kd-embed per_rank|shared      one embedding for each rank of objectness, as N embeddings suggest
  --kd-layers last|all            Fig. 2 draws the output
  --kd-dedupe 1                   IoU from which a box is dropped as a duplicate of a better one (1: never)
  --crop-scales 1 --crop-source augmented|original   one crop, of the network's own input
  --crop-fit warp|pad             stretched to CLIP's square by RoIAlign, or as hierkd.py crops: whole pixels, padded, bicubic
  --skd-scope image|batch         Eq. 4 counts N targets of one image
  --rkd-dir teacher|student       KL(teacher || student); as printed, KL(student || teacher) with a minus sign would be maximised
  --rkd-diag                      the diagonal of the relation maps stays in
  --rfs 0                         repeat-factor sampling: unknown in the paper; 0.001 is LVIS's own
  --train-vocab base|all          all is a control: rare names as negatives must hurt
  --name-style clean|raw          names without underscores and brackets; the release feeds raw ones
and, without a flag: the last layer's matching says which queries are matched, objectness which of the others come first; image and batch RKD are
added, the batch is that of one process and its map holds pairs of the same image, too; losses are means over the images that have a target; Eq. 3 is
taken on unit features, with lambda_skd (its weight was not published).
Differs from the paper: "886 base classes" are 866; Eq. 5's sign and swapped R, Sec. 3.3's swapped Q are taken as meant; the release's 1203-wide
objectness, of which only channel 0 is used, is one channel with a prior of 0.01; a training crop without objects is drawn again from the same image;
mask targets are means of 2 x 2 pixels, and padding counts in neither mask loss; --accumulate normalises each micro-batch by its own objects; positives
are at least 1 over all processes, not in each; warm-up is at most a tenth of the run.

    torchrun --nnodes 2 --nproc_per_node 8 ... dkdetr.py --masks                 # the paper's LVIS run, 16 x 8 images, 70 epochs
    torchrun --nproc_per_node 8 dkdetr.py --dataset ovcoco                       # COCO 48/17
    python dkdetr.py --data shapes                                              # everything in minutes on a CPU
    python dkdetr.py --eval runs/dkdetr/last.pt --dataset voc                    # transfer: only the names change
    python dkdetr.py --predict photo.jpg --weights runs/dkdetr/best.pt --classes "red panda,umbrella"

Expected (paper): LVIS box APr 22.2 (17.3 without KD), AP 33.5; COCO AP50 novel 32.3 (9.0), base 61.1 (61.2): neither was run here. Measured, shapes,
3 seeds: AP50 novel 9.9 (2.7 without KD), base 35.1 (36.0); README has the other arms.
"""
import argparse
import math
import os
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_convert, box_iou, roi_align, sigmoid_focal_loss
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common.boxes import constant, overlap
from common.clip import load_clip
from common.datasets import (BASE_48, NOVEL_17, CocoDataset, Records, collate, eval_loader, find_coco, find_lvis, objects365,
                             own_files, read_annotations, read_voc, repeat_factors, require_lvis, train_loader)
from common.evaluation import class_mean, coco_evaluate, encode_mask, import_lvis, lvis_evaluate, to_coco_results, voc_evaluate
from common.run import (COUNT, POSITIVE, SEED, Run, UserError, answer_folder, barrier, describe_model,
                        fast_layout, fused, gather, given_flags, load_checkpoint, load_strict, number, open_run,
                        parse, parser, rebuilding, reduce_mean, run_flags, saved_flags, seed_all, started,
                        warmup_multistep, wrap_ddp)

IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
QUALITIES = "good, bad, bright, dark, low resolution, cropped, close-up, jpeg corrupted, blurry, pixelated, black and white".split(", ")
TEMPLATES = [f"There is {a} {{}} in the scene." for a in ("a", "the")] + [f"a photo of {a} {{}} in the scene." for a in ("a", "the", "one")]
TEMPLATES += [f"itap of {a} {{}}." for a in ("a", "my", "the")] + [f"a photo of {a} {{}}." for a in ("a", "my", "the", "one", "many")]
TEMPLATES += [f"a {q} photo of {a} {{}}." for q in QUALITIES for a in ("a", "the")]
TEMPLATES += [f"a photo of {a} {q} {{}}." for q in "nice, cool, weird, small, large, clean, dirty, hard to see".split(", ") for a in ("a", "the")]
TEMPLATES += [f"{a} {q} {{}}." for q in ("plastic", "toy", "plushie", "cartoon") for a in ("a", "the")]
TEMPLATES += [f"{a} embroidered {{}}." for a in ("an", "the")] + [f"a painting of {a} {{}}." for a in ("a", "the")]  # the 63 of ViLD
BACKBONES = ("r50", "r101", *(f"tiny{width}" for width in (8, 16, 24, 32, 48, 64)))
DATASETS = dict(lvis="data/lvis", ovcoco="data/coco", coco="data/coco", objects365="data/objects365", voc="data")
DEFAULTS = dict(  # flag: (the paper's or the release's, else ours: kd_min_size, name_style, crop_fit, ckpt_msda; that of the embedded dataset)
    image_size=(1024, 128), jitter=([0.1, 2.0], [0.8, 1.25]), templates=("vild", "one"), name_style=("clean", "clean"),
    backbone=("r50", "tiny16"), init=("imagenet", "none"), dim=(256, 64), hidden=(1024, 128), levels=(4, 3), encoder=(6, 2), decoder=(6, 3),
    queries=(300, 40), dropout=(0.1, 0.0), ckpt_msda=(True, False), w_skd=(0.1, 0.3), kd_topk=(20, 8), kd_min_size=(16.0, 8.0), crop_fit=("warp", "pad"),
    epochs=(70, 24), batch_size=(8, 16), lr=(8e-4, 1e-3), backbone_lr=(0.1, 1.0), warmup=(2000, 100))


# ================================================================== model: multi-scale deformable attention

def fp32(x):
    """bf16 of autocast -> fp32; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def device_type(x):
    """What torch.autocast is told: it does not know the meta device, on which describe_model counts FLOPs."""
    return "cpu" if x.is_meta else x.device.type


def msda_grid(value, level_sizes, at, weight):
    """Multi-scale deformable attention (Zhu et al. 2021, Eq. 3) by grid_sample.

    value (B, S, H, d): tokens of all levels, H heads. level_sizes: L pairs (h, w), of S cells together. at (B, Q, H, L, P, 2): x, y in 0..1 of a
    level's padded map; outside it is zero. weight (B, Q, H, L, P). Returns (B, Q, H * d): the weighted sum of L * P bilinear samples.
    """
    b, _, heads, d = value.shape
    out, grid = 0, 2 * at - 1
    for level, ((h, w), v) in enumerate(zip(level_sizes, value.split([h * w for h, w in level_sizes], 1))):
        v = v.permute(0, 2, 3, 1).reshape(b * heads, d, h, w)
        points, share = (t[:, :, :, level].permute(0, 2, 3, 1, *range(4, t.ndim - 1)).flatten(0, 1) for t in (grid, weight))  # (B H, P, Q[, 2])
        samples = F.grid_sample(v, points, align_corners=False)                                               # (B H, d, P, Q)
        out = out + (samples * share[:, None]).sum(2)  # P is not the last dimension: the backward would crawl through rows of four
    return out.view(b, heads * d, at.shape[1]).transpose(1, 2)


def msda_gather(value, level_sizes, at, weight):
    """The same sum, all levels at once: the four corners of each sample are read as rows of d channels. For torch.compile, which fuses it."""
    b, s, heads, d = value.shape
    h, w = (torch.tensor(x, device=value.device).view(-1, 1) for x in zip(*level_sizes))                      # (L, 1)
    start = F.pad((h * w)[:-1, 0].cumsum(0), (1, 0)).view(-1, 1)
    x, y = (at[..., k] * n - 0.5 for k, n in enumerate((w, h)))
    left, top = x.floor(), y.floor()
    rows, out = value.transpose(1, 2), 0                                                                     # (B, H, S, d)
    for right, low in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, line = left.long() + right, top.long() + low
        share = (1 - (x - column).abs()) * (1 - (y - line).abs()) * ((column >= 0) & (column < w) & (line >= 0) & (line < h))
        index = start + line.clamp(min=0).minimum(h - 1) * w + column.clamp(min=0).minimum(w - 1)
        index, share = (t.transpose(1, 2).flatten(3) for t in (index, share * weight))                         # (B, H, Q, L P)
        corner = rows.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, d)).unflatten(2, index.shape[2:])
        out = out + (corner * share[..., None]).sum(3)
    return out.transpose(1, 2).flatten(2)


class DeformableAttention(nn.Module):
    """Each query looks at P points of each level, around its reference. `core` computes in fp32: bf16 would move a point by a quarter pixel."""

    def __init__(self, dim, heads=8, levels=4, points=4):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for m in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        ray = torch.stack([angle.cos(), angle.sin()], -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)  # head k looks along angle 2 pi k / heads, point p at p + 1 cells
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((ray[:, None, None] * torch.arange(1, points + 1)[:, None]).expand(-1, levels, -1, -1).flatten())
        for m in (self.value_proj, self.output_proj):
            nn.init.zeros_(m.bias)

    def values(self, tokens, padded):
        """Tokens (B, S, D) -> (B, S, heads, d), padding zeroed. Apart from forward, so that two sets of queries can share it."""
        return self.value_proj(tokens).masked_fill(padded[..., None], 0).unflatten(-1, (self.heads, -1))

    def forward(self, query, reference, values, level_sizes, core=msda_grid, save_memory=False):
        """query (B, Q, D); reference (B, Q, L, 2 or 4): points, or boxes, whose size scales the offsets -> (B, Q, D)."""
        shape = (*query.shape[:2], self.heads, self.levels, self.points)
        offsets = fp32(self.sampling_offsets(query)).view(*shape, 2)
        weight = fp32(self.attention_weights(query)).view(*shape[:3], -1).softmax(-1).view(shape)
        if reference.shape[-1] == 2:
            at = reference[:, :, None, :, None] + offsets / offsets.new_tensor([(w, h) for h, w in level_sizes])[:, None]
        else:
            at = reference[:, :, None, :, None, :2] + offsets / self.points * reference[:, :, None, :, None, 2:] * 0.5
        with torch.autocast(device_type(query), enabled=False):
            arguments = values.to(at.dtype), level_sizes, at, weight.to(at.dtype)
            out = checkpoint(core, *arguments, use_reentrant=False, preserve_rng_state=False) if save_memory else core(*arguments)
        return self.output_proj(out)


# ================================================================== model: the detector

def take(x, index):
    """Rows of x (B, N, C) at index (B, k) -> (B, k, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def to_pixels(boxes, scale):
    """cx, cy, w, h in 0..1 -> xyxy pixels; scale: w, h, w, h of the valid image, broadcast."""
    return box_convert(boxes, "cxcywh", "xyxy") * scale


def inverse_sigmoid(x, eps=1e-5):
    """logit of x, which is cut to eps .. 1 - eps."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def sine(angle, dim, temperature=10000.0):
    """(...) radians -> (..., dim): sin and cos in turns, at dim / 2 falling frequencies."""
    i = torch.arange(dim, device=angle.device)
    x = angle[..., None] / temperature ** (2 * (i // 2).to(angle) / dim)
    return torch.stack([x[..., 0::2].sin(), x[..., 1::2].cos()], -1).flatten(-2)


def mlp(dim, out, layers=3):
    return nn.Sequential(*[m for i in range(layers) for m in ((nn.Linear(dim, dim), nn.ReLU()) if i < layers - 1 else (nn.Linear(dim, out),))])


def feed_forward(dim, hidden, dropout):
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout))


class EncoderLayer(nn.Module):
    def __init__(self, dim, hidden, dropout, heads=8, levels=4):
        super().__init__()
        self.attention, self.ffn = DeformableAttention(dim, heads, levels), feed_forward(dim, hidden, dropout)
        self.norms, self.dropout = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2)), nn.Dropout(dropout)

    def forward(self, x, position, reference, padded, level_sizes, core, save_memory):
        values = self.attention.values(x, padded)
        x = self.norms[0](x + self.dropout(self.attention(x + position, reference, values, level_sizes, core, save_memory)))
        return self.norms[1](x + self.ffn(x))


class DecoderLayer(nn.Module):
    def __init__(self, dim, hidden, dropout, heads, levels):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.attention, self.ffn = DeformableAttention(dim, heads, levels), feed_forward(dim, hidden, dropout)
        self.norms, self.dropout = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3)), nn.Dropout(dropout)

    def forward(self, x, position, reference, values, level_sizes, core, seen=None):
        """x, position (B, N, D). seen (B, N', D): other queries at the same positions, which x looks at besides itself."""
        key = x + position if seen is None else torch.cat([seen + position, x + position], 1)
        value = x if seen is None else torch.cat([seen, x], 1)
        x = self.norms[0](x + self.dropout(self.self_attention(x + position, key, value, need_weights=False)[0]))
        x = self.norms[1](x + self.dropout(self.attention(x + position, reference, values, level_sizes, core)))
        return self.norms[2](x + self.ffn(x))


class MaskHead(nn.Module):
    """SOIT's masks (Yu et al. 2022): each query writes the 441 weights of a small deformable attention, which draws its mask.

    Mask features: level 0 through one more encoder layer, 8 channels. Every cell of an instance looks, with 4 heads of 2 channels, at 4 points
    of them: offsets 8 -> 32 and attention 8 -> 16 come from feature + position relative to the box centre; then ReLU and 8 -> 1.
    """
    SPLIT = (8 * 32, 32, 8 * 16, 16, 8, 1)

    def __init__(self, dim, hidden, dropout):
        super().__init__()
        self.encoder = EncoderLayer(dim, hidden, dropout, heads=1, levels=1)
        self.trans, self.norm, self.weights = nn.Linear(dim, 8), nn.LayerNorm(8), mlp(dim, sum(self.SPLIT))

    def features(self, memory, position, reference, padded, level_sizes, core, save_memory):
        """Level 0 of the memory (B, S0, D) -> (B, S0, 8)."""
        return self.norm(self.trans(self.encoder(memory, position, reference, padded, level_sizes, core, save_memory)))

    def forward(self, query, center, image, features, padded, size, valid, core=msda_grid):
        """query (n, D); center (n, 2) x, y of its box; image (n,) which of the B it belongs to; features (B, S0, 8), padded (B, S0); size (h, w) of
        level 0; valid (B, 2) its valid share of x, y -> mask logits (n, 4 h, 4 w), all instances at once."""
        (h, w), n = size, len(query)
        parts = fp32(self.weights(query)).split(self.SPLIT, 1)
        features = fp32(features)
        row, column = ((torch.arange(k, device=query.device).to(features) + 1) / k for k in (h, w))  # as in the release, the far side of each cell
        y, x = row / valid[image, 1:] - center[:, 1:], column / valid[image, :1] - center[:, :1]                # (n, h), (n, w)
        y, x = (sine(t * (2 * math.pi), 4) for t in (y, x))
        where = torch.cat([y[:, :, None].expand(-1, -1, w, -1), x[:, None].expand(-1, h, -1, -1)], -1).flatten(1, 2)   # (n, S0, 8) y, x
        q, value = features[image] + where, features.masked_fill(padded[..., None], 0)[image]                  # (n, S0, 8) each
        offsets = linear_each(q, *parts[0:2]).view(n, h * w, 4, 1, 4, 2)  # heads, levels, points, x y
        weight = linear_each(q, *parts[2:4]).view(n, h * w, 4, 1, 4).softmax(-1)
        cell = torch.stack(torch.meshgrid((torch.arange(w).to(q) + 0.5) / w, (torch.arange(h).to(q) + 0.5) / h, indexing="xy"), -1).flatten(0, 1)
        at = cell[:, None, None, None] + offsets / offsets.new_tensor([w, h])
        logit = linear_each(core(value.unflatten(-1, (4, 2)), [size], at, weight).relu(), *parts[4:6])[..., 0]  # (n, S0)
        return aligned_bilinear(logit.view(n, 1, h, w), 4)[:, 0]


def linear_each(x, weight, bias):
    """A linear layer for each instance: x (n, S, i), weight (n, o * i), bias (n, o) -> (n, S, o)."""
    return torch.einsum("nsi,noi->nso", x, weight.unflatten(1, (bias.shape[1], x.shape[2]))) + bias[:, None]


def aligned_bilinear(x, factor):
    """Upsampling that keeps cell centres where a stride of `factor` puts them: (n, 1, h, w) -> (n, 1, factor h, factor w)."""
    h, w = x.shape[-2:]
    x = F.interpolate(F.pad(x, (0, 1, 0, 1), mode="replicate"), (factor * h + 1, factor * w + 1), mode="bilinear", align_corners=True)
    return F.pad(x, (factor // 2, 0, factor // 2, 0), mode="replicate")[..., :factor * h, :factor * w]


def normalise(images, sizes, mean_std=IMAGENET):
    """uint8 RGB (B, 3, H, W), sizes (B, 2) h, w -> float; the padding is zeroed AFTER that, so it is the mean pixel."""
    mean, std = (constant(v, images.device, torch.float32).view(3, 1, 1) for v in mean_std)
    rows = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
    cols = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    return (images - mean) / std * (rows[:, None, :, None] & cols[:, None, None, :])


class Body(nn.Module):
    """A torchvision ResNet up to C5; returns [C3, C4, C5]. pretrained: stem and layer1 do not learn, their BatchNorm uses its running statistics.

    bn "sync": the other BatchNorms learn and use the statistics of the batch, over all GPUs; "frozen": running statistics, few images a GPU.
    last: the last stage that anybody reads; those behind it do not exist, for they would get no gradient, for which DDP waits.
    """

    def __init__(self, net, pretrained, bn="sync", last="layer4"):
        super().__init__()
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self.stages = nn.ModuleDict({n: getattr(net, n) for n in names[:names.index(last) + 1]})
        frozen = ("conv1", "bn1", "layer1") if pretrained else ()
        for name in frozen:
            self.stages[name].requires_grad_(False)
        self.running = list(self.stages) if bn == "frozen" else frozen

    def train(self, mode=True):
        super().train(mode)
        for name in self.running:
            for m in self.stages[name].modules():  # looked up anew: SyncBatchNorm takes the place of the modules of the start
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        return self

    def forward(self, x):
        maps = []
        for name, stage in self.stages.items():
            x = stage(x)
            if name in ("layer2", "layer3", "layer4"):
                maps.append(x)
        return maps


def make_body(name, init, bn, levels=4):
    """(Body as far as `levels` reads it, channels of C3, C4, C5) of r50|r101|tinyN; init "imagenet" downloads torchvision's V1 weights."""
    last = f"layer{min(levels, 3) + 1}"
    if name not in BACKBONES:
        raise UserError(f"--backbone {name}: choose among {', '.join(BACKBONES)}")
    if name.startswith("tiny"):
        from common.tiny import NarrowResNet
        width = int(name[4:])
        return Body(NarrowResNet(width), False, bn, last), [2 * width, 4 * width, 8 * width]
    net = getattr(torchvision.models, "resnet" + name[1:])(weights=None)
    if init == "imagenet":
        from common.zoo import imagenet_state
        load_strict(net, *imagenet_state("resnet" + name[1:]))
    return Body(net, init == "imagenet", bn, last), [512, 1024, 2048]


class DKDETR(nn.Module):
    """Two-stage Deformable DETR with box refinement whose classifier is a text matrix.

    text_dim None: a linear classifier of `classes` outputs instead, as in the closed-vocabulary Deformable DETR: to check the detector against
    published weights, from Python only.
    """

    def __init__(self, backbone="r50", text_dim=512, dim=256, heads=8, hidden=1024, levels=4, encoder=6, decoder=6, queries=300, dropout=0.1,
                 masks=False, init="none", bn="sync", kd_embed="per_rank", classes=None):
        super().__init__()
        self.arch = dict(backbone=backbone, text_dim=text_dim, dim=dim, heads=heads, hidden=hidden, levels=levels, encoder=encoder, decoder=decoder,
                         queries=queries, masks=masks, kd_embed=kd_embed, classes=classes)
        self.queries, self.core, self.save_memory = queries, msda_grid, False
        self.body, widths = make_body(backbone, init, bn, levels)
        conv = lambda c, k, s: nn.Sequential(nn.Conv2d(c, dim, k, s, k // 2, bias=False), nn.GroupNorm(32, dim))
        self.neck = nn.ModuleList([conv(c, 1, 1) for c in widths[:levels]] + [conv(widths[-1], 3, 2)] * (levels > 3))
        for m in self.neck.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight)
        self.level_embed = nn.Parameter(torch.randn(levels, dim))
        self.encoder = nn.ModuleList(EncoderLayer(dim, hidden, dropout, heads, levels) for _ in range(encoder))
        self.memory_trans, self.memory_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.query_trans, self.query_norm = nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim)
        self.decoder = nn.ModuleList(DecoderLayer(dim, hidden, dropout, heads, levels) for _ in range(decoder))
        self.objectness, self.refine = nn.Linear(dim, 1), nn.ModuleList(mlp(dim, 4) for _ in range(decoder + 1))  # the last: of the encoder
        self.project = nn.ModuleList(nn.Linear(dim, text_dim or classes) for _ in range(decoder))
        self.mask_head = MaskHead(dim, hidden, dropout) if masks else None
        for name, p in self.named_parameters():  # as mmdetection starts the transformer; heads start as nn.Linear does
            if p.ndim == 2 and re.match("encoder|decoder|memory_trans|query_trans|mask_head.encoder|mask_head.trans", name):
                if not re.search("sampling_offsets|attention_weights", name):
                    nn.init.xavier_uniform_(p)
        nn.init.constant_(self.objectness.bias, -math.log(99))
        for head in self.refine:
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)
        self.kd_queries = nn.Parameter(torch.randn(queries if kd_embed == "per_rank" else 1, dim))

    def forward(self, images, sizes):
        """(B, 3, H, W) normalised, sizes (B, 2) valid h, w -> dict:

        objectness (B, S) logits and coarse (B, S, 4) of all tokens; boxes (layers, B, N, 4) and features (layers, B, N, T) of the decoder;
        hidden (layers, B, N, D) its queries; proposals (B, N, 4), the coarse boxes these came from, best first, and usable (B, N): no padding;
        `masks` for the mask head, `state` for kd_features.
        """
        maps = self.body(images)
        maps = [fp32(block(m)) for block, m in zip(self.neck, maps + maps[-1:])]
        x, position, padded, anchors, ratio = self.tokens(maps, images.shape[-2:], sizes)
        level_sizes = [tuple(m.shape[-2:]) for m in maps]
        reference = anchors[:, :, None, :2] * ratio[:, None]
        for layer in self.encoder:
            x = layer(x, position, reference, padded, level_sizes, self.core, self.save_memory and self.training)
        memory, cells = fp32(x), level_sizes[0][0] * level_sizes[0][1]
        masks = None
        if self.mask_head:  # of level 0, the finest
            masks = self.mask_head.features(memory[:, :cells], position[:, :cells], reference[:, :cells, :1], padded[:, :cells], level_sizes[:1],
                                            self.core, self.save_memory and self.training)

        # Two-stage: the best N coarse boxes start the decoder.
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~padded
        with torch.autocast(device_type(memory), enabled=False):  # ranks are the identity of KD queries: bf16 scores would tie
            z = self.memory_norm(self.memory_trans(memory.masked_fill(~usable[..., None], 0)))
            objectness = self.objectness(z)[..., 0]
            anchor_logits = (anchors / (1 - anchors)).log().masked_fill(~usable[..., None], math.inf)
            coarse = self.refine[-1](z) + anchor_logits
        best = objectness.topk(min(self.queries, objectness.shape[1]), 1).indices                            # sorted: rank is identity
        proposals = take(coarse.detach(), best).sigmoid()
        code = sine(proposals * (2 * math.pi), memory.shape[2] // 2).flatten(2)                                # (B, N, 2 D) of cx, cy, w, h
        where, content = self.query_norm(self.query_trans(code)).chunk(2, -1)                                 # queries know the boxes only
        values = [layer.attention.values(memory, padded) for layer in self.decoder]
        # what a pass of the decoder needs: where (B, N, D) positions of the queries, values of each layer, ratio (B, 1, L, 4) to padded coordinates
        state = dict(where=where, values=values, level_sizes=level_sizes, ratio=torch.cat([ratio, ratio], -1)[:, None])
        out = self.decode(content, [proposals] * (len(self.decoder) + 1), state, update=True)
        state.update(inputs=out["inputs"], references=out["references"])  # of each layer: what KD queries see, and the boxes they look around
        return dict(objectness=objectness, coarse=coarse.sigmoid(), proposals=proposals, usable=usable.gather(1, best), boxes=out["boxes"],
                    features=out["features"], hidden=out["hidden"], state=state,
                    masks=dict(features=masks, padded=padded[:, :cells], size=level_sizes[0], valid=ratio[:, 0]))

    def tokens(self, maps, canvas, sizes):
        """All levels as one sequence. maps: L of (B, D, h, w); canvas (H, W) padded, sizes (B, 2) valid pixels.

        Returns values and positions (B, S, D); padded (B, S); anchors (B, S, 4): cell centre and 0.05 * 2^level in 0..1 of the valid image; valid
        share of x, y (B, L, 2).
        """
        values, positions, padded, anchors, ratios = [], [], [], [], []
        for level, m in enumerate(maps):
            h, w = m.shape[-2:]
            row, column = (torch.arange(n, device=m.device) for n in (h, w))
            count_y = (row * canvas[0] // h < sizes[:, :1]).sum(1, keepdim=True)  # valid cells: (B, 1)
            count_x = (column * canvas[1] // w < sizes[:, 1:]).sum(1, keepdim=True)
            at_y, at_x = (row.to(m) + 0.5) / count_y, (column.to(m) + 0.5) / count_x
            grid = torch.stack([at_y[:, :, None].expand(-1, -1, w), at_x[:, None].expand(-1, h, -1)], -1).flatten(1, 2)  # (B, h w, 2) y, x
            count = torch.stack([count_y, count_x], -1).to(m)                                                 # (B, 1, 2)
            angle = grid * (count / (count + 1e-6)) * (2 * math.pi)                                           # 1e-6: mmdetection's
            values.append(m.flatten(2).transpose(1, 2))
            positions.append(sine(angle, m.shape[1] // 2).flatten(2) + self.level_embed[level])
            padded.append(((row >= count_y)[:, :, None] | (column >= count_x)[:, None]).flatten(1))
            anchors.append(torch.cat([grid.flip(-1), torch.full_like(grid, 0.05 * 2**level)], -1))
            ratios.append(torch.cat([count_x.to(m) / w, count_y.to(m) / h], 1))
        return *(torch.cat(t, 1) for t in (values, positions, padded, anchors)), torch.stack(ratios, 1)

    def decode(self, x, references, state, update, seen=None):
        """The decoder over queries x (B, N, D). update: each layer refines the boxes it looks around; otherwise they are those given, one per layer.

        seen: what each layer's self-attention sees besides the queries: the inputs of the layers of another pass.
        """
        inputs, hidden, boxes, features, used = [], [], [], [], []
        reference = references[0]
        for index, (layer, refine, project) in enumerate(zip(self.decoder, self.refine, self.project)):
            reference = reference if update else references[index]
            inputs.append(x)
            used.append(reference)
            x = layer(x, state["where"], reference[:, :, None] * state["ratio"], state["values"][index], state["level_sizes"], self.core,
                      seen[index] if seen else None)
            h = fp32(x)
            with torch.autocast(device_type(h), enabled=False):
                features.append(project(h))
                if update:
                    boxes.append((refine(h) + inverse_sigmoid(reference)).sigmoid())
                    reference = boxes[-1].detach()
            hidden.append(h)
        return dict(inputs=inputs, references=used, hidden=torch.stack(hidden), features=torch.stack(features), boxes=torch.stack(boxes) if update else None)

    def kd_features(self, out, reference="shared", see_objects=True):
        """KD queries through the same decoder, after the object queries, which therefore cannot depend on them: features (layers, B, N, T)."""
        state, (b, n) = out["state"], out["proposals"].shape[:2]
        queries = self.kd_queries[:n] if len(self.kd_queries) > 1 else self.kd_queries.expand(n, -1)
        seen = state["inputs"] if see_objects else None
        return self.decode(queries.expand(b, -1, -1), state["references"], state, reference == "own", seen)["features"]


def classify(features, text, tau=0.05):
    """Eqs. 1 and 2 before the sigmoid: cosine / tau. (..., T), (K, T) -> (..., K) logits in -1/tau .. 1/tau. text None: features are logits."""
    if text is None:
        return features
    features = F.normalize(fp32(features), dim=-1)
    return features @ F.normalize(text, dim=-1).to(features).T / tau  # Eq. 1, and the argument of Eq. 2


# ================================================================== loss: matching and detection

W_CLS, W_L1, W_GIOU = 2, 5, 2  # of L_det in Eq. 6, and of the matcher's costs
W_DICE, W_MASK = 8, 2          # of SOIT's masks

def focal_cost(logits, alpha=0.25, gamma=2.0):
    """What it costs to call a query with this logit a positive rather than a negative (Deformable DETR): elementwise."""
    p, log_p, log_q = logits.sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits)
    return -alpha * (1 - p) ** gamma * log_p + (1 - alpha) * p ** gamma * log_q


@torch.no_grad()
def match_cost(logits, boxes, gt_boxes, scale):
    """(..., N, M) cost of query n for object m, weighed as the losses are.

    logits (..., N, M): of the class of each object. boxes (..., N, 4), gt_boxes (..., M, 4) in 0..1; scale (..., 1, 4): w, h, w, h in pixels.
    """
    giou = overlap(to_pixels(boxes, scale)[..., :, None, :], to_pixels(gt_boxes, scale)[..., None, :, :])[1]
    l1 = (boxes[..., :, None, :] - gt_boxes[..., None, :, :]).abs().sum(-1)
    return W_CLS * focal_cost(logits) + W_L1 * l1 - W_GIOU * giou


def match(costs, counts):
    """Hungarian matching of a whole step. costs: list of (layers, B, N, M) tensors; counts: objects of each image.

    Returns one (4, n) long tensor a list entry, on its device: layer, image, query and object of each match. The costs cross to the host together,
    and the matches return together: two transfers a step, not one per image and layer.
    """
    device = costs[0].device
    flat, found = torch.cat([c.flatten() for c in costs]).cpu(), []
    flat = flat.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)  # the solver refuses anything else
    for c, part in zip(costs, flat.split([c.numel() for c in costs])):
        part, rows = part.view(c.shape).numpy(), []
        for layer in range(len(part)):
            for image, count in enumerate(counts):
                query, obj = linear_sum_assignment(part[layer, image, :, :count])
                rows += [(layer, image, q, o) for q, o in zip(query.tolist(), obj.tolist())]
        found.append(torch.tensor(rows, dtype=torch.long).view(-1, 4))
    together = torch.cat(found).T.contiguous().to(device, non_blocking=True)
    return together.split([len(f) for f in found], 1)


def box_losses(boxes, gt_boxes, scale):
    """Weighted L1 and GIoU losses, summed over matches (n, 4) in 0..1; scale (n, 4) pixels."""
    giou = overlap(to_pixels(boxes, scale), to_pixels(gt_boxes, scale))[1]
    return W_L1 * (boxes - gt_boxes).abs().sum(), W_GIOU * (1 - giou).sum()


def mask_losses(logits, target, valid):
    """Weighted dice and BCE per valid pixel, summed over instances (n, h, w). target in 0..1, valid bool."""
    p, target = (logits.sigmoid() * valid).flatten(1), (target * valid).flatten(1)
    dice = 1 - 2 * (p * target).sum(1) / (p.square().sum(1) + target.square().sum(1) + 1e-5)
    bce = F.binary_cross_entropy_with_logits(logits.flatten(1), target, reduction="none") * valid.flatten(1)
    return W_DICE * dice.sum(), W_MASK * (bce.sum(1) / valid.flatten(1).sum(1).clamp(min=1)).sum()


# ================================================================== loss: distillation

def choose_targets(usable, matched, boxes, k, least):
    """Sec. 4.2: the k best proposals of each image that match no object -> (index (B, k), there (B, k) bool: this row is one).

    usable, matched (B, N) bool, best proposal first; boxes (B, N, 4) xyxy pixels; those with a side under `least` are left out.
    """
    big = (boxes[..., 2:] - boxes[..., :2]).amin(-1) >= least
    good = usable & ~matched & big
    index = (~good).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]  # good ones first, in their order
    return index, good.gather(1, index)


def duplicates(boxes, good, iou):
    """(B, N) bool: boxes that overlap a better good one by `iou`, even one that is a duplicate itself: this is no NMS. Best box first."""
    over = (box_iou(boxes, boxes) >= iou) & good[:, None]  # (B, N, N): row n overlaps column m, which is good
    return over.tril(-1).any(-1)                                # m < n: the better one


def group_mean(total, there):
    """Sum over targets (G,) -> mean per target of each group, mean over the groups of all processes that hold one."""
    n = there.sum(1)
    return (total / n.clamp(min=1)).sum() / reduce_mean((n > 0).sum().float(), 1.0)


def semantic_loss(f, v, there, tau=0.05):
    """Eq. 4, SKD: the feature of box i and the crop of box i are a pair, all others are none. f, v (G, n, T), there (G, n) bool.

    Mean over the groups (images) that hold a target. Without any, 0 with a gradient.
    """
    s = F.normalize(f, dim=-1) @ F.normalize(v, dim=-1).transpose(1, 2) / tau                                    # (G, n, n)
    pair = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    terms = torch.where(pair, F.softplus(-s), F.softplus(s)) * (there[:, :, None] & there[:, None])              # Eq. 4
    return group_mean(terms.sum((1, 2)), there)


def direct_loss(f, v, there):
    """Eq. 3: L1 distance of unit features."""
    distance = (F.normalize(f, dim=-1) - F.normalize(v, dim=-1)).abs().sum(-1)                                   # Eq. 3
    return group_mean((distance * there).sum(1), there)


def relational_loss(f, v, there, tau=0.2, direction="teacher", diagonal=True):
    """Eq. 5, RKD: rows of similarities among f must be distributed as those among v. Shapes as in semantic_loss."""
    both = there[:, :, None] & there[:, None]
    if not diagonal:
        both = both & ~torch.eye(both.shape[1], dtype=torch.bool, device=f.device)
    v, f = F.normalize(v, dim=-1), F.normalize(f, dim=-1)
    log_p, log_q = ((x @ x.transpose(1, 2) / tau).masked_fill(~both, -1e4).log_softmax(-1) for x in (v, f))
    if direction == "student":
        log_p, log_q = log_q, log_p
    return group_mean((log_p.exp() * (log_p - log_q) * both).sum((1, 2)), there)                                 # Eq. 5


# ================================================================== loss: all of Eq. 6

class Distiller(nn.Module):
    """The detector with its text matrix and, outside the module tree, CLIP: forward(batch) -> {name: loss}; their sum is Eq. 6.

    L_det there is that of Deformable DETR: of all decoder layers, of the encoder's coarse boxes, and with masks. `kd_active`: burn-in is over.
    """

    def __init__(self, model, text, clip, a):
        super().__init__()
        self.model, self.a, self.clip, self.kd_active = model, a, clip, False  # FrozenCLIP is no nn.Module
        self.watch = {}  # see cosines
        self.register_buffer("text", text, persistent=False)

    def distil(self, on):
        """Begin, or wait with, distillation. KD queries learn while something is distilled into them; DDP must be told, so it is wrapped anew."""
        self.kd_active = on
        self.model.kd_queries.requires_grad_(on and self.a.aux_queries)

    def forward(self, batch):
        a, labels, sizes = self.a, batch["labels"], batch["sizes"]
        x = normalise(batch["images"], sizes)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=a.amp == "bf16"):
            out = self.model(x, sizes)
        scale = sizes.flip(1).repeat(1, 2)[:, None].to(x.dtype)                                                 # (B, 1, 4) w, h, w, h
        gt_boxes = box_convert(batch["boxes"], "xyxy", "cxcywh") / scale
        logits = classify(out["features"], self.text, a.tau)                                                   # (layers, B, N, K)
        layers, b, n, _ = logits.shape
        of_object = labels.clamp(min=0)[None, :, None].expand(layers, -1, n, -1)
        cost = match_cost(logits.gather(3, of_object), out["boxes"], gt_boxes, scale)                           # (layers, B, N, M)
        enc_cost = torch.stack([match_cost(score[:, None].expand(-1, labels.shape[1]), coarse, gt, s)          # S = 21,760: an image at a time
                                for score, coarse, gt, s in zip(out["objectness"], out["coarse"], gt_boxes, scale)])
        (layer, image, query, obj), (_, enc_image, token, enc_obj) = match([cost, enc_cost[None]], batch["counts"])
        positives, enc_positives = (reduce_mean(constant(float(sum(min(c, most) for c in batch["counts"])), x.device, x.dtype), 1.0)
                                    for most in (n, out["objectness"].shape[1]))

        target = torch.zeros_like(logits)
        target[layer, image, query, labels[image, obj]] = 1
        losses = dict(cls=W_CLS * sigmoid_focal_loss(logits, target, 0.25, 2, "sum"))
        losses["l1"], losses["giou"] = box_losses(out["boxes"][layer, image, query], gt_boxes[image, obj], scale[image, 0])
        enc_target = torch.zeros_like(out["objectness"])
        enc_target[enc_image, token] = 1  # the encoder tells objects from background only
        losses["enc_cls"] = W_CLS * sigmoid_focal_loss(out["objectness"], enc_target, 0.25, 2, "sum")
        losses["enc_box"] = sum(box_losses(out["coarse"][enc_image, token], gt_boxes[enc_image, enc_obj], scale[enc_image, 0]))
        if a.masks:
            keep = slice(None) if a.mask_layers == "all" else layer == layers - 1
            losses["dice"], losses["mask"] = self.mask_loss(out, batch, *(t[keep] for t in (layer, image, query, obj)))
        losses = {name: value / (enc_positives if name.startswith("enc") else positives) for name, value in losses.items()}
        if self.kd_active:
            last = layer == layers - 1
            matched = torch.zeros_like(out["usable"])
            matched[image[last], query[last]] = True
            losses.update(self.kd_losses(out, batch, matched, scale))
        return losses

    def mask_loss(self, out, batch, layer, image, query, obj):
        def part(hidden, center, image, obj):
            logits = self.model.mask_head(hidden, center, image, **out["masks"], core=self.model.core)
            target, (h, w) = batch["masks"][image, obj].float() / 4, logits.shape[-2:]                          # sums of 2 x 2 pixels
            inside = lambda size, k: torch.arange(k, device=size.device) * 2 < size[image, None]
            valid = inside(batch["sizes"][:, 0], h)[:, :, None] & inside(batch["sizes"][:, 1], w)[:, None]
            return torch.stack(mask_losses(logits, target, valid))

        arguments = out["hidden"][layer, image, query], out["boxes"][layer, image, query, :2].detach(), image, obj
        chunks = zip(*(t.split(64) for t in arguments))  # 8 MB an instance at 1024 px: kept for one chunk at a time
        return sum(checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks)

    @torch.no_grad()
    def kd_targets(self, out, batch, matched, scale):
        """Which queries are distilled from which boxes: index (B, k) of queries, there (B, k) bool, crops (B, k, 4) xyxy pixels."""
        a = self.a
        boxes = to_pixels(out["boxes"][-1] if a.kd_boxes == "decoder" else out["proposals"], scale)            # (B, N, 4)
        if a.kd_boxes == "gt":  # oracle: the hidden novel objects, and the query nearest to each
            crops = batch["hidden"]
            best, index = box_iou(crops, boxes).max(2)
            return index, (crops[..., 2] > 0) & (best > 0.1), crops
        if a.kd_exclude == "iou":
            near = box_iou(boxes, batch["boxes"]) >= 0.5                                                  # (B, N, M)
            matched = matched | (near & (batch["labels"] >= 0)[:, None]).any(-1)
        if a.kd_dedupe < 1:
            matched = matched | duplicates(boxes, out["usable"] & ~matched, a.kd_dedupe)
        index, there = choose_targets(out["usable"], matched, boxes, a.kd_topk, a.kd_min_size)
        return index, there, take(boxes, index)

    def kd_losses(self, out, batch, matched, scale):
        """SKD and RKD of the KD queries of the chosen boxes against CLIP's embeddings of their crops. matched (B, N): in the last layer."""
        a = self.a
        index, there, crops = self.kd_targets(out, batch, matched, scale)
        image, slot = there.nonzero(as_tuple=True)  # here a step waits for the device: CLIP must know how many crops
        v = self.crop_embeddings(batch, crops[image, slot], image)
        v = v.new_zeros(*there.shape, v.shape[1]).index_put((image, slot), v)                                  # (B, k, T)
        if a.shuffle_crops:  # another image's; in a batch of one, another box's
            turn = 0 if len(v) > 1 else 1
            v, there = v.roll(1, turn), there & there.roll(1, turn)
        if a.aux_queries:
            with torch.autocast(v.device.type, torch.bfloat16, enabled=a.amp == "bf16"):
                features = self.model.kd_features(out, a.kd_ref, a.kd_attn == "obj+kd")
        else:
            features = out["features"]
        chosen = [take(fp32(f), index) for f in (features if a.kd_layers == "all" else features[-1:])]         # (B, k, T) each
        self.watch = self.cosines(chosen[-1].detach(), v, there)
        batched = lambda x: x.reshape(1, -1, *x.shape[2:])  # all images as one group
        losses = dict(skd=v.new_zeros(()), rkd=v.new_zeros(()))
        for f in chosen:
            if a.skd == "l1":
                losses["skd"] = losses["skd"] + a.w_skd * direct_loss(f, v, there)                             # Eq. 3
            elif a.skd == "bce":
                group = (f, v, there) if a.skd_scope == "image" else map(batched, (f, v, there))
                losses["skd"] = losses["skd"] + a.w_skd * semantic_loss(*group, a.tau_s)                       # Eq. 4
            if a.rkd in ("image", "both"):
                losses["rkd"] = losses["rkd"] + a.w_rkd * relational_loss(f, v, there, a.tau_r, a.rkd_dir, a.rkd_diag)  # Eq. 5
            if a.rkd in ("batch", "both"):
                losses["rkd"] = losses["rkd"] + a.w_rkd * relational_loss(*map(batched, (f, v, there)), a.tau_r, a.rkd_dir, a.rkd_diag)
        # 0 * sum: each parameter has a gradient in each process, also where no image has a target; DDP waits for it
        return {k: value / len(chosen) + 0 * features.sum() for k, value in losses.items() if getattr(a, k) != "none"}

    @staticmethod
    def cosines(f, v, there):
        """Mean cosine of a feature with the crop of its own box and with the others of its image: the losses alone do not tell what is learnt."""
        cosine, both = F.normalize(f, dim=-1) @ v.transpose(1, 2), there[:, :, None] & there[:, None]
        mine = both & torch.eye(both.shape[1], dtype=torch.bool, device=v.device)
        return {name: (cosine * mask).sum() / mask.sum().clamp(min=1) for name, mask in (("own", mine), ("other", both & ~mine))}

    @torch.no_grad()
    def crop_embeddings(self, batch, boxes, image):
        """CLIP's unit embeddings (n, T) of boxes (n, 4) xyxy pixels of the network's input, all in one batch; image (n,) is their owner."""
        a, total, levels = self.a, 0, self.clip.grey_levels
        if a.crop_source == "original":
            boxes = to_original(boxes, batch["windows"][image])
            sizes = torch.tensor([x.shape[1:] for x in batch["originals"]], device=boxes.device)
            pixels = [normalise(x[None], size[None], levels) for x, size in zip(batch["originals"], sizes)]
        else:
            sizes, pixels = batch["sizes"], [normalise(batch["images"], batch["sizes"], levels)]
        center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        for factor in a.crop_scales:
            regions = torch.cat([center - half * factor, center + half * factor], 1).clamp(min=0).minimum(sizes.flip(1).repeat(1, 2)[image])
            with torch.autocast(boxes.device.type, torch.bfloat16, enabled=a.amp == "bf16"):
                if a.crop_source == "augmented":
                    total = total + self.encode(pixels[0], regions, image)
                else:  # files differ in size
                    parts = [(image == i).nonzero()[:, 0] for i in range(len(pixels))]
                    v = torch.cat([self.encode(x, regions[i], torch.zeros_like(i)) for x, i in zip(pixels, parts)])
                    total = total + v[torch.cat(parts).argsort()]
        return F.normalize(total, dim=-1)

    def encode(self, pixels, boxes, owner):
        """Crops of normalised images (B, 3, H, W), boxes (n, 4), owner (n,) -> (n, T)."""
        if self.a.crop_fit == "pad":
            return self.clip.encode_crops(pixels, boxes, owner)
        rois = torch.cat([owner[:, None].to(boxes), boxes], 1)
        return self.clip.encode_images(roi_align(pixels, rois, self.clip.size, aligned=True))  # adaptive sampling: a box filter where it shrinks


def to_original(boxes, window):
    """Boxes of the augmented image -> of the file. window (n, 6): scale x, y; crop offset x, y; width of the crop; flipped."""
    flipped = torch.stack([window[:, 4] - boxes[:, 2], boxes[:, 1], window[:, 4] - boxes[:, 0], boxes[:, 3]], 1)
    boxes = torch.where(window[:, 5:] > 0, flipped, boxes)
    return (boxes + window[:, 2:4].repeat(1, 2)) / window[:, :2].repeat(1, 2)


# ================================================================== checkpoints

PARTS = ("backbone", "text_dim", "dim", "heads", "hidden", "levels", "encoder", "decoder", "queries", "masks",
         "kd_embed", "classes")  # of DKDETR, as its arch has them
# How the authors' model sees images and names; ours say it themselves.
SEEN = dict(image_size=1024, clip="", data="data/lvis", dataset="lvis", data_seed=0, tau=0.05,
            templates="vild", name_style="raw")


def plain_of(model, classes):
    """What a checkpoint holds beside weights; no tensor of CLIP. classes: the names that --predict takes."""
    return dict(script="dkdetr.py", arch=model.arch, classes=list(classes))


def weights_of(model, classes=()):
    """What a detector is, as plain values and tensors."""
    return dict(plain_of(model, classes), model=model.state_dict())


def load_detector(path, flag="--weights"):
    """(DKDETR in eval mode, class names) from a checkpoint of ours, of the authors or of mmdetection.

    The keys of others are renamed; those that have no place here are named. They know no class names.
    """
    from common import zoo
    whose, *content = zoo.load_any(path, flag, "dkdetr.py")
    if whose == "ours":
        arch, state = content[0]["arch"], content[0]["model"]
        with rebuilding(f"{flag} {path}"):
            classes = [str(n) for n in content[0].get("classes", [])]
            for part in ("encoder", "decoder"):
                count = len({key.split(".")[1] for key in state if key.startswith(f"{part}.")})
                if arch[part] != count:
                    raise UserError(f"{flag} {path}: is damaged: it says {part} {arch[part]}, has {count}")
            model = DKDETR(**{k: arch[k] for k in PARTS}, dropout=0.0)
        model.arch = SEEN | arch
        state = {k: v for k, v in state.items() if k != "kd_queries"}
    else:
        state, classes = content[0], []
        if "neck.convs.0.conv.weight" not in state:
            raise UserError(f"{flag} {path}: is neither a checkpoint of dkdetr.py nor a Deformable DETR of "
                            "mmdetection's key names")
        state, unknown = zoo.to_dkdetr(state)
        if unknown:
            print(f"{flag} {path}: {len(unknown)} keys have no place here, first {unknown[0]}")
            state = {k: v for k, v in state.items() if k not in unknown}
        width = len(state["project.0.weight"]) if getattr(state.get("project.0.weight"), "ndim", 0) else 0
        if not width or "objectness.weight" not in state:
            raise UserError(f"{flag} {path}: is no two-stage, box-refining Deformable DETR")
        text = width == 512  # a closed-vocabulary model has as many outputs as classes
        model = DKDETR(text_dim=512 if text else None, classes=None if text else width,
                       masks="mask_head.trans.weight" in state, dropout=0.0)
        model.arch.update(SEEN)
    # the KD queries are of no use any more
    load_strict(model, state | dict(kd_queries=model.kd_queries.detach()), f"{flag} {path}")
    return model.eval(), classes


# ================================================================== data

def class_split(args, categories):
    """(names to train, novel names) of a file's categories, in the order of ids. LVIS: the rare are novel."""
    if args.dataset == "lvis":
        rare = [c["name"] for c in categories if c.get("frequency") == "r"]
        return [c["name"] for c in categories if c["name"] not in set(rare)], rare
    if args.dataset == "ovcoco" and args.data == "shapes":
        from common.shapes import BASE, NOVEL
        return BASE, NOVEL
    return (BASE_48, NOVEL_17) if args.dataset == "ovcoco" else ([c["name"] for c in categories], [])


def find_data(args, split):
    """(image folder, json or Records) of --dataset in --data's layout."""
    root = args.data
    if args.dataset == "voc":
        return Path(root) / "VOCdevkit", read_voc(root, [("2007", "test")])
    if args.dataset == "objects365":
        folder, annotations = Path(root) / "val", Path(root) / "annotations" / "zhiyuan_objv2_val.json"
        if not annotations.exists():
            raise UserError(f"--data {root}: {annotations} is missing; Objects365 v2 is at "
                            "https://www.objects365.org (own files: --val-json and --val-images; "
                            "--data shapes needs nothing)")
        return folder, objects365(read_annotations(annotations), folder)
    if root == "shapes":
        from common.shapes import make_shapes
        root = make_shapes(seed=args.data_seed)
    if args.dataset == "lvis":
        return find_lvis(root, split, root if args.data == "shapes" else args.images)
    return find_coco(root, split)


def make_data(args, split):
    """The dataset "train" or "val" of the flags; None where own training files come without a validation set.

    Training sees base boxes only. class_split of its records says which names are novel.
    """
    files = own_files(args, split)
    if files is False:
        return None
    folder, records = files or find_data(args, split)
    if not isinstance(records, Records):
        records = read_annotations(records, folder)
    if args.dataset == "lvis":
        require_lvis(records)
        try:
            import_lvis()
        except RuntimeError as e:
            raise UserError(e) from None
    base, novel = class_split(args, records.categories)
    options = dict(canvas=args.image_size, jitter=args.jitter, masks=args.masks)
    if split == "train":
        data = CocoDataset(folder, records, True, classes=base, hidden=novel if args.kd_boxes == "gt" else (),
                           originals=args.crop_source == "original", keep_empty=args.keep_empty, **options)
        data.repeats = repeat_factors(data, args.rfs) if args.rfs else None
        return data
    names = None  # all, and images without objects, too
    if args.dataset == "ovcoco":
        names = [n for n in records.classes if n in {*base, *novel}]
        if not names:
            raise UserError(f"{records.path}: has no class of --dataset ovcoco, as {', '.join(base[:3])}")
    return CocoDataset(folder, records, False, classes=names, **options)


def prompt_name(name, style):
    """A dataset's class name as a person would say it."""
    if style == "raw":
        return name
    joined = dict(diningtable="dining table", pottedplant="potted plant", tvmonitor="tv monitor", Bakset="basket")
    name = joined.get(name, name).replace("_", " ").replace("/", " or ").replace("Moniter", "monitor")
    return " ".join(re.sub(r"\((.*?)\)", r" \1", name).split())


def text_matrix(clip, names, args):
    """(K, T) unit rows of dataset names, cached on disk: 1203 times 63 prompts take an hour on a laptop."""
    cache = None if args.data == "shapes" else Path(torch.hub.get_dir()) / "text"
    templates = TEMPLATES if args.templates == "vild" else ("a photo of a {}.",)
    names = [prompt_name(n, args.name_style) for n in names]
    return clip.class_embeddings(names, templates, cache, raw=args.name_style == "raw")


def to_device(batch, device):
    """The batch on the device, with the number of objects of each image, which stays on the host."""
    counts = (batch["labels"] >= 0).sum(1).tolist()
    batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else [x.to(device, non_blocking=True) for x in v] if k == "originals" else v
             for k, v in batch.items()}
    return batch | dict(counts=counts)


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

LEGEND = dict(
    cls="focal loss of classes, of all decoder layers", l1="L1 loss of boxes", giou="GIoU loss of boxes",
    enc_cls="focal loss of objectness, of the encoder's tokens",
    enc_box="L1 and GIoU loss of the coarse boxes",
    dice="dice loss of masks", mask="cross-entropy of masks",
    skd="Eq. 4, semantic distillation (--skd l1: Eq. 3)", rkd="Eq. 5, relational distillation",
    norm="norm of the gradient, before it is cut to 0.1",
    own="mean cosine of a feature and the crop of its own box",
    other="the same with the other crops of its image")


def make_pair(args, data, val, rank, world, device):
    """(student, CLIP) of the flags, on the device."""
    clip = get_clip(args, device)
    seed_all(args.seed)
    heads = args.dim // 32 if args.dim < 256 else 8
    model = DKDETR(args.backbone, clip.dim, args.dim, heads, args.hidden, args.levels, args.encoder,
                   args.decoder, args.queries, args.dropout, args.masks, args.init, args.bn, args.kd_embed)
    seed_all(args.seed + rank)  # dropout differs from process to process
    clip_name = str(Path(args.clip).resolve()) if args.clip and Path(args.clip).is_file() else args.clip
    seen = {k: getattr(args, k) for k in SEEN}
    model.arch.update(seen | dict(clip=clip_name or ""))  # --eval and --predict see what training saw
    model.core, model.save_memory = dict(grid=msda_grid, gather=msda_gather)[args.msda], args.ckpt_msda
    fast_layout(model.body, device)
    return model.to(device), clip


def describe_pair(student, clip, args, rank):
    """Sizes of the detector, and of the CLIP that encodes a crop."""
    side = args.image_size
    image, size = torch.zeros(1, 3, side, side), torch.tensor([[side, side]])
    describe_model(f"student DK-DETR {args.backbone}", student, image, size, rank=rank)
    crop = torch.zeros(1, 3, clip.size, clip.size)
    describe_model(f"teacher CLIP {clip.name}, of a crop", clip.model.visual, crop, rank=rank)


def parameter_groups(model, lr, decay, backbone=0.1):
    """As the release has it: `backbone` (0.1) of the rate for the backbone, 0.1 for the sampling offsets; no decay on norms outside the backbone.

    None on the KD queries either, which would shrink while they wait for the burn-in to end. The groups do not depend on the numbers: --resume may
    change these.
    """
    rate = dict(body=backbone, offsets=0.1, rest=1.0)
    norms = {id(p) for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for p in m.parameters()}
    groups = {}
    for name, p in model.named_parameters():
        part = "body" if name.startswith("body.") else "offsets" if "sampling_offsets" in name else "rest"
        plain = part != "body" and (id(p) in norms or name == "kd_queries")
        groups.setdefault((part, plain), []).append(p)
    return [dict(params=[p for p in ps if p.requires_grad], lr=lr * rate[part], base_lr=lr * rate[part], weight_decay=0.0 if plain else decay)
            for (part, plain), ps in groups.items()]


def method_of(args, clip, base, novel):
    """What is learnt from whom, and when."""
    what = "no distillation"
    if distils(args):
        what = f"SKD {args.skd} RKD {args.rkd} auxiliary queries {args.aux_queries}"
        what += f", from epoch {args.burn_in + 1}"
        what += f": never, of {args.epochs} epochs" if args.burn_in >= args.epochs else ""
    return f"CLIP {clip.name} | {what} | {len(base)} base and {len(novel)} novel classes"


def begin_as_copy(run, path):
    """--from: the state of another run's last.pt, as the beginning of this one."""
    run.load(load_checkpoint(path, "dkdetr.py"), f"--from {path}", copy=True)
    run.log.bar.initial = run.log.bar.n = run.it
    run.due = run.finished
    run.save()


def at_epoch(model, distiller, run, device, world):
    """The module to train in the epoch that begins or goes on: the distiller, wrapped for DDP, anew where
    distillation begins."""
    start = run.args.burn_in * run.steps
    if run.args.burn_in_to and run.it == start:
        run.save(run.args.burn_in_to)  # where the distilled run of the table starts
    active = distils(run.args) and run.it >= start
    if model is None or active != distiller.kd_active:
        distiller.distil(active)
        model = wrap_ddp(distiller, device, world)
    return model


def prepare(args, data, val, student, teacher, rank, world, device):
    """The Distiller with its text matrix; the student described and compiled."""
    novel = class_split(args, data.records.categories)[1]
    text = text_matrix(teacher, data.classes + (novel if args.train_vocab == "all" else []), args)
    describe_pair(student, teacher, args, rank)
    if world > 1 and device.type == "cuda" and args.bn == "sync":
        nn.SyncBatchNorm.convert_sync_batchnorm(student)
    if args.compile:
        student.compile()
    return Distiller(student, text, teacher, args).train()


def learnt(optimizer):
    """The weights that the optimizer has."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def reported(args):
    """How often a Run evaluates, and what it reports: novel classes, which own data (coco) have not, must not
    choose the weights."""
    return dict(every=args.epochs if args.data == "shapes" else max(1, args.epochs // 14),
                report="best" if args.dataset == "coco" else "last",
                metric="AP50" if args.dataset == "ovcoco" else "AP")


def rate_factor(args, it, steps):
    """Learning-rate factor of iteration `it`, `steps` an epoch."""
    return warmup_multistep(it, steps, (args.epochs * 55 // 70,), min(args.warmup, args.epochs * steps // 10))


def train(args, rank, world, device):
    """Train under args; returns the last evaluation's metrics (rank 0) or None."""
    data = make_data(args, "train")
    val = make_data(args, "val")
    base, novel = class_split(args, data.records.categories)
    open_run(args, rank, args.resume)
    student, teacher = make_pair(args, data, val, rank, world, device)
    distiller = prepare(args, data, val, student, teacher, rank, world, device)
    model = None  # see at_epoch
    loader, plan = train_loader(data, args.batch_size, rank, world, args.seed, args.workers)
    total_batch = args.batch_size * world * args.accumulate
    paper_batch = 16 if args.data == "shapes" else 128
    lr = args.lr * total_batch / paper_batch
    optimizer = torch.optim.AdamW(parameter_groups(student, lr, args.weight_decay, args.backbone_lr), **fused())
    run = Run(args, student, optimizer, plain_of(student, base + novel), len(plan), total_batch, rank, world, device,
              legend=LEGEND, **reported(args))
    if args.start_from and run.it == 0:  # also where a kill came before the copy was saved
        begin_as_copy(run, args.start_from)
    run.describe(method_of(args, teacher, base, novel), lr, args.lr, paper_batch, data, val)
    while True:
        if run.due:
            run.scored(*evaluate(student, val, teacher, rank, world, device, args), val)
            student.train()
        if run.finished:
            break
        model = at_epoch(model, distiller, run, device, world)
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
            norm = nn.utils.clip_grad_norm_(learnt(optimizer), 0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step(losses, lr * factor, dict(norm=norm, **distiller.watch))
        run.end_epoch()
    return run.close()


# ================================================================== evaluate, predict

@torch.no_grad()
def detect(out, text, sizes, tau, count=300):
    """The best `count` (query, class) pairs of each image: list of (boxes (n, 4) xyxy network pixels, scores, labels, queries). No NMS."""
    scores = classify(out["features"][-1], text, tau).sigmoid()                                                 # (B, N, K), Eq. 2
    score, pair = scores.flatten(1).topk(min(count, scores[0].numel()), 1)
    query, label = pair // scores.shape[2], pair % scores.shape[2]
    scale = sizes.flip(1).repeat(1, 2)[:, None].to(score)
    boxes = to_pixels(take(out["boxes"][-1], query), scale)
    return [tuple(t[i] for t in (boxes.clamp(min=0).minimum(scale), score, label, query)) for i in range(len(score))]


@torch.no_grad()
def detect_masks(model, out, image, queries, size, original_size, chunk=32):
    """Masks of some queries of one image: iterates over bool (h, w) of the file, in order. size: (h, w) valid in the network's input."""
    (h, w), (height, width) = size, original_size
    for part in queries.split(chunk):
        hidden, center = out["hidden"][-1, image, part], out["boxes"][-1, image, part, :2]
        logits = model.mask_head(hidden, center, torch.full_like(part, image), **out["masks"], core=model.core)
        masks = F.interpolate(logits.sigmoid()[:, None], scale_factor=2, mode="bilinear", align_corners=True)[..., :h, :w]  # as the release does
        yield from F.interpolate(masks, (height, width), mode="bilinear", align_corners=True)[:, 0] > 0.5


def run_detector(model, batch, device, args, text, count=300, masks=False):
    """One collated image -> (boxes in original pixels, scores, labels, masks or None: a list of RLE)."""
    batch = to_device(batch, device)
    x = normalise(batch["images"], batch["sizes"])
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        out = model(x, batch["sizes"])
    boxes, scores, labels, queries = detect(out, text, batch["sizes"], model.arch["tau"], count)[0]
    (h, w), (height, width) = batch["sizes"][0].tolist(), batch["original_sizes"][0]
    codes = None
    if masks:
        once, inverse = queries.unique(return_inverse=True)  # several classes may share a query
        drawn = [encode_mask(m.cpu().numpy()) for m in detect_masks(model, out, 0, once, (h, w), (height, width))]
        codes = [drawn[i] for i in inverse.tolist()]
    return boxes * torch.tensor([width / w, height / h] * 2, device=device), scores, labels, codes


def names_of(flag):
    """--classes "red panda, umbrella" -> ["red panda", "umbrella"]."""
    names = [n.strip() for n in flag.split(",") if n.strip()]
    if not names:
        raise UserError(f'--classes "{flag}": holds no name')
    return names


def scored_names(args, val):
    """The class names of an evaluation: all of the validation set's, or those of --classes among them."""
    if args.classes is None:
        return val.classes
    chosen = set(names_of(args.classes))
    unknown = sorted(chosen - set(val.classes))
    if unknown:
        raise UserError(f"--classes: {', '.join(unknown)} is no class of --dataset {args.dataset}; its names "
                        f"are {', '.join(val.classes[:5])}, ...")
    return [n for n in val.classes if n in chosen]


def evaluate(model, val, clip, rank, world, device, args):
    """(metrics, detections) on rank 0, (None, None) elsewhere or without a validation set. Novel and base
    names compete, as in the paper's tables."""
    if val is None:
        return None, None
    model.eval()
    since, results, names = time.time(), [], scored_names(args, val)
    ids, text = [val.category_ids[val.classes.index(n)] for n in names], text_matrix(clip, names, args)
    loader = eval_loader(val, rank, world, args.workers)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        boxes, scores, labels, codes = run_detector(model, batch, device, args, text, masks=args.masks)
        found = to_coco_results(batch["image_ids"][0], boxes, scores, labels, ids)
        results += [r | dict(segmentation=m) for r, m in zip(found, codes)] if args.masks else found
    results = gather(results)
    if rank != 0:
        return None, None
    # LVIS says of each image which of all names count
    truth = val.truth(None if args.dataset == "lvis" else names, outlines=args.masks)
    metrics = dict(images=len(val), line=f"{len(val)} images")
    for kind in ("bbox", "segm")[:1 + args.masks]:
        prefix, word = ("", "boxes") if kind == "bbox" else ("mask_", "masks")
        stats, keys = score(args, val, truth, results, kind, ids)
        metrics |= {prefix + k: v for k, v in stats.items()}
        metrics["line"] += f" | {word} " + " ".join(f"{k} {stats[k]:.1f}" for k in keys)
    chooses = "AP50" if args.dataset in ("ovcoco", "voc") else "AP"
    metrics.update(seconds=time.time() - since, score=metrics[chooses])
    metrics["line"] += f" | {metrics['seconds']:.0f}s"
    return metrics, results


def score(args, val, truth, results, kind, ids):
    """(numbers of --dataset's own evaluation, names of those to print). kind: bbox or segm."""
    if args.dataset == "lvis":
        return lvis_evaluate(truth, results, kind, ids), ("AP", "APr", "APc", "APf", "AP50", "AP75")
    if args.dataset == "voc":
        at_50, at_75 = (voc_evaluate(truth, results, iou, legacy=True) for iou in (0.5, 0.75))
        stats = dict(AP50=at_50["AP11"], AP75=at_75["AP11"], AP50_area=at_50["AP"], AP75_area=at_75["AP"],
                     classes=at_50["classes"])
        return stats, ("AP50", "AP75", "AP50_area", "AP75_area")
    stats, (base, novel) = coco_evaluate(truth, results, kind), class_split(args, val.records.categories)
    if not novel:
        return stats, ("AP", "AP50", "AP75")
    stats |= {f"{group}_{key}": class_mean(stats, members, key)
              for group, members in (("novel", novel), ("base", base)) for key in ("AP50", "AR50")}
    return stats, ("novel_AP50", "base_AP50", "AP50", "AP")


def follow(args, arch):
    """The flags of --eval and --predict, resolved: dataset, prompts, seed of shapes and image size are those
    of the checkpoint's training, where the command names no other."""
    shapes = arch["data"] == "shapes"
    if args.data == "shapes" and not shapes:
        raise UserError("--data shapes: the checkpoint was trained on real classes")
    if shapes and (args.data not in (None, "shapes") or args.dataset in ("voc", "objects365")):
        raise UserError(f"--data {args.data}, --dataset {args.dataset}: the checkpoint was trained on "
                        "shapes and knows these only, as ovcoco, coco or lvis")
    if args.masks and not arch["masks"]:
        raise UserError("--masks: the checkpoint has no mask head")
    known = {name: arch[name] for name in ("dataset", "image_size", "templates", "name_style")}
    if args.val_json:  # own files
        known["dataset"] = "coco"
    known["masks"] = arch["masks"] and (args.dataset or known["dataset"]) in ("lvis", "ovcoco")
    known = {k: v for k, v in known.items() if getattr(args, k) is None}
    if shapes:
        known.update(data="shapes", data_seed=arch["data_seed"])
    return resolve(argparse.Namespace(**vars(args) | known | dict(train_json=None)))


def clip_of(model, args, device):
    """The CLIP that a checkpoint was trained with, unless --clip names another; its width must fit."""
    if model.arch["text_dim"] is None:
        raise UserError("the checkpoint is of a closed vocabulary: it has no text classifier for names")
    spec = args.clip or model.arch["clip"] or None
    clip = get_clip(argparse.Namespace(clip=spec, data=args.data, data_seed=args.data_seed), device)
    if clip.dim != model.arch["text_dim"]:
        raise UserError(f"--clip {clip.name}: has {clip.dim}-d embeddings, the checkpoint "
                        f"{model.arch['text_dim']}-d")
    return clip


def evaluate_file(args, rank, world, device):
    """--eval: metrics of a checkpoint, into --out."""
    from common.pictures import write_results
    model, _ = load_detector(args.eval, "--eval")
    args = follow(args, model.arch)
    val = make_data(args, "val")
    scored_names(args, val)  # what is wrong with them is told before CLIP is downloaded
    clip = clip_of(model, args, device)
    metrics, results = evaluate(model.to(device), val, clip, rank, world, device, args)
    if rank == 0:
        write_results(Path(args.out), metrics, results, val, args.eval, None, None)
        print(metrics["line"])


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file; masks as RLE) and a picture per image."""
    from common.pictures import Pictures
    model, trained = load_detector(args.weights)
    named, args = args.dataset, follow(args, model.arch)
    pictures = Pictures(args.predict, args.out, args.score)
    if args.classes is not None:
        classes = names_of(args.classes)
    elif trained and not named:
        classes = trained
    else:
        data = make_data(args, "val")
        classes = sum(class_split(args, data.records.categories), [])
    clip = clip_of(model.to(device), args, device)
    text = text_matrix(clip, classes, args)
    for picture in pictures:
        height, width = picture.pixels.shape[1:]
        scale = args.image_size / max(height, width)
        h, w = max(1, round(height * scale)), max(1, round(width * scale))
        image = TF.resize(picture.pixels, [h, w], interpolation=TF.InterpolationMode.BILINEAR, antialias=False)
        item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(),
                    image_id=0, original_size=(height, width))
        batch = collate([item], args.image_size)
        boxes, scores, labels, codes = run_detector(model, batch, device, args, text, masks=args.masks)
        picture.save(boxes, scores, labels, classes, masks=codes)


# ================================================================== the embedded dataset: with and without KD

def compare(args, rank, world, device):
    """The detector without distillation and DK-DETR, both from one burn-in, side by side."""
    root, rows = Path(args.out), []
    start, method = str(root / "burn-in.pt"), (args.skd, args.rkd)
    arms = (("without KD", dict(skd="none", rkd="none", burn_in_to=start)),
            ("DK-DETR", dict(start_from=start, burn_in_to=None)))
    for name, flags in arms:
        since, out = time.time(), root / name.lower().replace(" ", "-")
        resume = args.resume and (out / "last.pt").exists()
        more = dict(flags, out=str(out), resume=resume, table=False, method=method)
        metrics = train(argparse.Namespace(**vars(args) | more), rank, world, device)
        rows.append((name, metrics, "resumed" if resume else f"{time.time() - since:.0f}"))
    if rank == 0:
        print(f"\n{args.data + ', AP50':14s} novel  base   all   seconds (DK-DETR: after the common burn-in)")
        for name, m, seconds in rows:
            print(f"{name:14s} {m['novel_AP50']:5.1f} {m['base_AP50']:5.1f} {m['AP50']:5.1f} {seconds:>9s}")


# ================================================================== flags

EXAMPLES = """
torchrun --nproc_per_node 8 dkdetr.py --dataset ovcoco           # COCO 48/17 in data/coco
python dkdetr.py --data shapes                                   # everything in minutes on a CPU
python dkdetr.py --predict photo.jpg --weights runs/dkdetr/best.pt --classes "red panda,umbrella"
"""
# flags, the flag that gives them an effect, its values
BELONGS = (
    ("images", "dataset", ("lvis", None)),
    ("data_seed", "data", ("shapes",)),
    ("bn", "backbone", ("r50", "r101", None)),
    ("mask_layers", "masks", (True,)),
    ("tau_s skd_scope", "skd", ("bce",)),
    ("w_skd", "skd", ("bce", "l1")),
    ("w_rkd tau_r rkd_dir rkd_diag", "rkd", ("both", "image", "batch")),
    ("kd_attn kd_ref kd_embed", "aux_queries", (True,)),
    ("kd_exclude kd_topk kd_dedupe kd_min_size", "kd_boxes", ("encoder", "decoder")))
DISTILLATION = """aux_queries burn_in kd_topk kd_min_size kd_boxes kd_exclude kd_dedupe kd_attn kd_ref
    kd_layers crop_scales crop_fit crop_source shuffle_crops""".split()  # of no effect where there is none
NAMING = "dataset images clip templates name_style masks classes"  # what --eval and --predict read


def distils(args):
    return (args.skd, args.rkd) != ("none", "none")


def numbers(text):
    """argparse type of --crop-scales: "1,1.5" -> [1.0, 1.5]."""
    return [POSITIVE(x) for x in text.split(",")]


def parse_args(argv=None):
    p = parser(__doc__, EXAMPLES)
    both = argparse.BooleanOptionalAction

    def flag(g, name, text, **options):
        full, small = DEFAULTS.get(name.replace("-", "_"), (None, None))
        if full is not None:
            text += f" (default {full}" + (f"; shapes {small})" if small != full else ")")
        g.add_argument(f"--{name}", help=text, **options)

    g = p.add_argument_group("data")
    flag(g, "dataset", "lvis (rare is novel), ovcoco (48 base, 17 novel); to evaluate only: coco, "
         "objects365, voc (default lvis; shapes ovcoco; own data coco: all its classes)",
         choices=tuple(DATASETS))
    flag(g, "data", "its root, or 'shapes': the embedded dataset (default data/lvis, data/coco, "
         "data/objects365, data)")
    flag(g, "images", "lvis: folder of train2017 and val2017", default="data/coco")
    flag(g, "data-seed", "shapes: seed of the drawn images and of the tiny CLIP", type=SEED, default=0)
    flag(g, "image-size", "canvas: large-scale jitter of 0.1 to 2 times this, cut and padded to it",
         type=COUNT)
    flag(g, "jitter", "scales of the jitter", type=POSITIVE, nargs=2, metavar=("LOW", "HIGH"))
    flag(g, "rfs", "repeat-factor sampling threshold, 0 for none; LVIS's own is 0.001", type=number(),
         default=0.0)
    flag(g, "train-vocab", "names of the classifier in training; all: a control, novel ones as negatives",
         choices=("base", "all"), default="base")
    g = p.add_argument_group("model")
    flag(g, "clip", "teacher: MODEL/WEIGHTS of open_clip (default ViT-B-32-quickgelu/openai; shapes: the "
         "tiny CLIP, trained on demand)")
    flag(g, "templates", "63 prompts a name, or one", choices=("vild", "one"))
    flag(g, "name-style", "names as in the file, or without underscores, brackets and joined words",
         choices=("raw", "clean"))
    flag(g, "backbone", "r50, r101, or tiny8 ... tiny64, which start from nothing", choices=BACKBONES,
         metavar="NAME")
    flag(g, "init", "backbone start", choices=("imagenet", "none"))
    flag(g, "bn", "BatchNorm of layer2-4: batch statistics over all GPUs, or running ones",
         choices=("sync", "frozen"), default="sync")
    flag(g, "dim", "width D, a multiple of 32", type=COUNT)
    flag(g, "hidden", "width of the feed-forward layers", type=COUNT)
    flag(g, "levels", "levels, from stride 8", type=number(int, 1, 4))
    flag(g, "encoder", "encoder layers", type=COUNT)
    flag(g, "decoder", "decoder layers", type=COUNT)
    flag(g, "queries", "N", type=COUNT)
    flag(g, "dropout", "of the transformer", type=number(float, 0, 1, below=True))
    flag(g, "masks", "SOIT's mask head; boxes without outline are left out (default no; --eval: if the "
         "checkpoint has it, on lvis and ovcoco)", action=both)
    flag(g, "mask-layers", "decoder layers whose masks are trained", choices=("all", "last"), default="all")
    flag(g, "tau", "temperature of the classifier, Eq. 2; evaluation uses the checkpoint's", type=POSITIVE,
         default=0.05)
    flag(g, "msda", "deformable attention by grid_sample, or by reading corners, for --compile",
         choices=("grid", "gather"), default="grid")
    flag(g, "ckpt-msda", "compute the encoder's samples again in the backward pass rather than keep them",
         action=both)
    g = p.add_argument_group("method")
    flag(g, "skd", "semantic distillation: Eq. 4, or Eq. 3 on unit features", choices=("bce", "l1", "none"),
         default="bce")
    flag(g, "rkd", "relational distillation, Eq. 5, Table 7", choices=("both", "image", "batch", "none"),
         default="both")
    flag(g, "aux-queries", "KD queries; without, the object queries are distilled, Table 5", action=both,
         default=True)
    flag(g, "w-skd", "lambda_skd of Eq. 6; its negatives grow with --kd-topk, so 8 targets need 19/7 of the "
         "weight of 20", type=number())
    flag(g, "w-rkd", "lambda_rkd of Eq. 6", type=number(), default=2.0)
    flag(g, "tau-s", "temperature of Eq. 4", type=POSITIVE, default=0.05)
    flag(g, "tau-r", "temperature of Eq. 5", type=POSITIVE, default=0.2)
    flag(g, "burn-in", "epochs without distillation (default 40 of 70, so 4/7 of --epochs)",
         type=number(int, 0, 2 ** 31))
    flag(g, "kd-topk", "targets of an image", type=COUNT)
    flag(g, "kd-min-size", "smallest side of a target, pixels of the network's input", type=number())
    flag(g, "kd-boxes", "what is cropped; gt: the hidden novel objects, an oracle",
         choices=("encoder", "decoder", "gt"), default="encoder")
    flag(g, "kd-exclude", "no targets: matched queries; or also overlaps of an object",
         choices=("matched", "iou"), default="matched")
    flag(g, "kd-dedupe", "IoU from which a target is dropped for a better one; 1: none is", type=number(),
         default=1.0)
    flag(g, "kd-attn", "what KD queries attend to", choices=("obj+kd", "kd"), default="obj+kd")
    flag(g, "kd-ref", "boxes KD queries look around: the object queries', or their own",
         choices=("shared", "own"), default="shared")
    flag(g, "kd-embed", "KD embeddings: one a rank, or one", choices=("per_rank", "shared"),
         default="per_rank")
    flag(g, "kd-layers", "decoder layers that are distilled; all: the mean of their losses",
         choices=("last", "all"), default="last")
    flag(g, "crop-scales", "crops are enlarged by these, embeddings added: 1, or 1,1.5 as ViLD", type=numbers,
         default="1")
    flag(g, "crop-fit", "crops are stretched to CLIP's square, or padded", choices=("warp", "pad"))
    flag(g, "crop-source", "cut crops from the network's input, or from the file",
         choices=("augmented", "original"), default="augmented")
    flag(g, "skd-scope", "targets that are negatives of each other in Eq. 4", choices=("image", "batch"),
         default="image")
    flag(g, "rkd-dir", "KL(teacher || student) or the other way round", choices=("teacher", "student"),
         default="teacher")
    flag(g, "rkd-diag", "the diagonal of the relation maps takes part", action=both, default=True)
    flag(g, "shuffle-crops", "control: each target gets the embedding of another image's crop",
         action="store_true")
    g = p.add_argument_group("schedule")
    flag(g, "epochs", "the rate falls by 10 at 55/70 of them; the table of shapes takes 18", type=COUNT)
    flag(g, "batch-size", "images per process and step", type=COUNT)
    flag(g, "lr", "for a total batch of 128, shapes 16; scaled linearly", type=POSITIVE)
    flag(g, "backbone-lr", "share of --lr for the backbone", type=number())
    flag(g, "weight-decay", "of AdamW", type=number(), default=0.05)
    flag(g, "warmup", "steps of linear warm-up, at most a tenth of the run", type=number(int, 0, 2 ** 31))
    g.add_argument("--from", "--start-from", dest="start_from", metavar="LAST.PT", help="begin as a copy of "
                   "the run of this last.pt, in all but its flags, which are given anew")
    flag(g, "table", "train without and with distillation, from one burn-in, and print both (default: on "
         "shapes, without --max-iters)", action=both)
    flag(g, "classes", "--predict, --eval: names, comma-separated (--predict: any; --eval: some of the "
         "dataset's)")
    run_flags(p, "dkdetr")
    # of --table: where its first run leaves the burn-in, and the (skd, rkd) of its second
    p.set_defaults(burn_in_to=None, method=None)
    modes = dict(eval=f"{NAMING} data data_seed workers val_json val_images",
                 predict=f"{NAMING} data data_seed weights score")
    args = parse(p, argv, "dkdetr", modes, only="weights score classes", belongs=BELONGS,
                 apart=("resume start_from", "data train_json"), saved=run_or_table)
    if args.jitter is not None and args.jitter[0] > args.jitter[1]:
        p.error(f"--jitter {args.jitter[0]} {args.jitter[1]}: expected LOW <= HIGH")
    if args.dim is not None and args.dim % 32:
        p.error(f"--dim {args.dim}: must be a multiple of 32")
    if args.eval and args.dataset and args.out == "runs/dkdetr-eval":  # one checkpoint on several datasets
        return argparse.Namespace(**vars(args) | dict(out=f"{args.out}-{args.dataset}"))
    if args.eval or args.predict:
        return args
    if args.dataset in ("objects365", "voc") or args.dataset == "coco" and not args.train_json:
        p.error(f"--dataset {args.dataset}: is for --eval; train on lvis or ovcoco, or on own files")
    idle = [f for f in DISTILLATION if f in given_flags(p, argv)]
    if idle and not distils(args):
        p.error(f"--{idle[0].replace('_', '-')}: belongs to --skd or --rkd, here both are none")
    return args


def run_or_table(args):
    """The flags of the run, or of the table of runs, that --resume continues; {} where there is none yet."""
    one, table = Path(args.out) / "last.pt", Path(args.out) / "without-kd" / "last.pt"
    if one.exists() and table.exists():
        raise UserError(f"--resume: {args.out} holds a run and a table of runs; give the folder of one run")
    if one.exists():
        return saved_flags(one, "dkdetr.py")
    if not table.exists():
        return {}
    flags = saved_flags(table, "dkdetr.py")
    skd, rkd = flags["method"] or ("none", "none")
    return flags | dict(table=True, skd=skd, rkd=rkd)


def resolve(args):
    """The flags with every default that depends on another flag; after this they are only read."""
    shapes = args.data == "shapes"
    known = dict(dataset="coco" if args.train_json else "ovcoco" if shapes else "lvis", masks=False)
    known |= {name: values[shapes] for name, values in DEFAULTS.items()}
    dataset = args.dataset or known["dataset"]
    known["data"] = DATASETS[dataset]
    training = not (args.eval or args.predict)
    short = args.max_iters or args.start_from
    quick = training and shapes and dataset == "ovcoco" and distils(args)
    known["table"] = quick and not short
    table = known["table"] if args.table is None else args.table
    if shapes and (table or quick and args.table is None):  # --max-iters: the start of that run
        known["epochs"] = 18  # the study's 24 would take more than a quarter of an hour on 2 cores
    known["burn_in"] = (args.epochs or known["epochs"]) * 40 // 70
    args = argparse.Namespace(**vars(args) | {k: v for k, v in known.items() if getattr(args, k) is None})
    if args.init == "imagenet" and args.backbone.startswith("tiny"):
        raise UserError(f"--backbone {args.backbone}: has no ImageNet weights; use --init none")
    if args.masks and args.image_size % 32:
        raise UserError(f"--image-size {args.image_size}: masks need a multiple of 32")
    unfit = dataset != "ovcoco" or not 0 < args.burn_in < args.epochs or short or not distils(args)
    if table and (unfit or args.train_json and not args.val_json):
        raise UserError("--table: compares on ovcoco or shapes, needs a method, a validation set, "
                        "0 < --burn-in < --epochs, and neither --max-iters nor --from")
    return args


# ================================================================== main

def main():
    with started("dkdetr.py") as (rank, world, device):
        args = parse_args()
        if args.eval or args.predict:
            answer_folder(args.out, rank)
        if args.eval:
            evaluate_file(args, rank, world, device)
        elif args.predict:
            if world > 1:
                raise UserError("--predict: runs in one process; start it with python")
            predict(args, device)
        else:
            args = resolve(args)
            (compare if args.table else train)(args, rank, world, device)


if __name__ == "__main__":
    main()
