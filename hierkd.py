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
import json
import math
import os
import re
import sys
import time
from contextlib import nullcontext
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

from common.boxes import assign_atss, cells_inside, centerness_target, constant, decode_deltas, grid_anchors, overlap
from common.clip import ClipError, load_clip, tiny_clip
from common.datasets import (BASE_48, NOVEL_15, NOVEL_17, CocoDataset, DataError, collate, eval_loader, find_coco, parse_image_size,
                             read_image, read_json, resize, train_loader)
from common.evaluation import class_agnostic_recall, class_mean, coco_evaluate, gather, to_coco_results
from common.run import (Help, Log, UserError, answer_folder, barrier, can_resume, draw_boxes, fetch, init_ddp, leave_ddp, load_checkpoint, load_strict, open_run,
                        plot_curves, reduce_mean, rng_state, save_checkpoint, save_samples, saved_flags, seed_all, set_rng_state, warmup_multistep)
from common.shapes import BASE, NOVEL, ShapesError, make_shapes

STRIDES = (8, 16, 32, 64, 128)
DELTA_STD = (0.1, 0.1, 0.2, 0.2)
RELEASED = dict(ikd_norm="l2", ikd_weight=0.05, ikd_mean="level", cls_weight="learn", crop_norm="imagenet", crop_antialias=False, direct_quality=True)


# ================================================================== flags

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    flag = partial(p.add_argument, action=argparse.BooleanOptionalAction)
    # data
    p.add_argument("--data", default="data/coco", help="COCO-layout root, or 'shapes': the embedded dataset")
    p.add_argument("--split", choices=("48_17", "65_15"), default="48_17", help="base / novel classes of COCO; shapes has its own")
    p.add_argument("--data-seed", type=int, default=0, help="shapes: seed of the drawn images and of the tiny CLIP")
    flag("--drop-novel-images", default=False, help="leave out training images that hold a novel object (the older 65/15 protocol)")
    p.add_argument("--image-size", help="short side: 800, a choice 640,800 or a range 480-800 (default 800; schedule 3x 480-800; shapes 72-120)")
    p.add_argument("--workers", type=int, default=2, help="loader processes per training process")
    # model
    p.add_argument("--clip", help="teacher: MODEL/WEIGHTS of open_clip (default ViT-B-32-quickgelu/openai; shapes: the tiny CLIP, trained on demand)")
    p.add_argument("--backbone", help="r50 or r101 (default r50; shapes tiny16; tiny8 ... tiny64)")
    p.add_argument("--init", choices=("imagenet", "none"), help="backbone start (default imagenet; shapes none)")
    p.add_argument("--quality", choices=("iou", "centerness", "none"), default="iou", help="what the quality branch learns, and the weight of boxes")
    p.add_argument("--bg", choices=("learn", "fixed"), default="learn", help="background embedding, or a constant cosine of 0.2")
    p.add_argument("--tau-c", type=float, help="start of the classifier's temperature, Eq. 1 (default 100; shapes 30)")
    p.add_argument("--embed-bias", choices=("focal", "zero"), help="start of the embedding's bias: -4.6 or 0 (default focal; shapes zero)")
    # method
    p.add_argument("--preset", choices=("paper", "released"), default="paper", help="released: --ikd-norm l2 --ikd-weight 0.05 --ikd-mean level --cls-weight learn --crop-norm imagenet --no-crop-antialias --direct-quality")
    flag("--ikd", default=True, help="instance-level distillation, Eq. 2")
    p.add_argument("--ikd-norm", choices=("l1", "l2"), default="l1", help="distance of Eq. 2")
    p.add_argument("--ikd-weight", type=float, help="lambda_ins of Eq. 6 (default 1; shapes 0.4)")
    p.add_argument("--ikd-mean", choices=("all", "level"), default="all", help="mean over positives, or per level and then over levels")
    p.add_argument("--ikd-box", choices=("pred", "gt"), default="pred", help="boxes that are cropped")
    p.add_argument("--ikd-iou", type=float, default=0.5, help="positives whose predicted box overlaps its object less are left out")
    p.add_argument("--ikd-max", type=int, help="at most so many crops per process and step, drawn at random (default all; shapes 64)")
    p.add_argument("--crop-scale", type=float, help="crops are enlarged by this (default 1; training on shapes 1.2)")
    p.add_argument("--crop-norm", choices=("clip", "imagenet"), default="clip", help="mean and deviation of the crops")
    flag("--crop-antialias", default=True, help="PIL's antialiased resize, or plain bicubic")
    flag("--gkd", default=True, help="global (caption) distillation, Eqs. 3-5")
    p.add_argument("--gkd-loss", choices=("cl", "pl"), default="cl", help="contrastive, Eq. 5, or positive pairs only")
    p.add_argument("--gkd-weight", type=float, help="lambda_Glo of Eq. 6 (default 1; shapes 0.2)")
    p.add_argument("--gkd-patches", type=int, default=3, help="N: each level is cut into N x N patches")
    p.add_argument("--gkd-levels", type=int, choices=range(1, 6), help="levels that are cut, from P3 (default 5; shapes 2: P5 to P7 see a whole image in 16 to 1 cells)")
    p.add_argument("--gkd-pool", choices=("max", "avg"), default="max", help="pooling of a patch")
    flag("--gkd-gather", default=False, help="contrast with the images and captions of all processes")
    p.add_argument("--tau-a", type=float, help="temperature of the captions' attention, Eq. 3 (default 1; shapes 0.1)")
    p.add_argument("--tau-m", type=float, default=10.0, help="start of the temperature of Eq. 5")
    p.add_argument("--negatives", default="0.1", help="share of the negatives that is kept, per level; or 1to1: as many as positives")
    p.add_argument("--cls-weight", help="lambda_cls of Eq. 6: a number, or learn: exp(-s), with + |s| (default 1)")
    p.add_argument("--nms", type=float, default=0.4, help="IoU of the class-wise NMS")
    p.add_argument("--shuffle-captions", action="store_true", help="control: each image gets the caption of another")
    p.add_argument("--shuffle-crops", action="store_true", help="control: each positive gets the crop embedding of another")
    # schedule
    p.add_argument("--schedule", choices=("1x", "2x", "3x"), default="1x", help="12, 24 or 36 epochs; x0.1 at 2/3 and 11/12, 3x: 3/4 and 11/12")
    p.add_argument("--epochs", type=int, help="instead of the schedule's (shapes 16)")
    p.add_argument("--max-iters", type=int, help="stop after this many steps; the schedule is not shortened")
    p.add_argument("--batch-size", type=int, help="images per process and step (default 8; shapes 16)")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches per step, each of --batch-size")
    p.add_argument("--optimizer", choices=("sgd", "adamw"), help="(default sgd; shapes adamw)")
    p.add_argument("--lr", type=float, help="for a total batch of 32, of 16 without GKD; scaled linearly (default 0.01; shapes 0.004 at 16)")
    p.add_argument("--weight-decay", type=float, default=1e-4)
    flag("--table", help="train without and with distillation and print both (default: on shapes, with IKD and GKD, without --max-iters)")
    # analyses
    flag("--clip-direct", default=False, help="with --eval: Algorithm 1, Table 6: CLIP classifies crops of the detector's boxes; crops as by --crop-*")
    flag("--direct-quality", default=False, help="the quality still multiplies CLIP's score there")
    p.add_argument("--gt-upper-bound", action="store_true", help="Table 9: CLIP classifies the true boxes of novel objects")
    p.add_argument("--rpn-recall", action="store_true", help="Table 1: train a class-agnostic RPN on base boxes, then its recall of novel boxes")
    p.add_argument("--heat-map", action="store_true", help="with --predict: Fig. 4, the classification score of each name at each place")
    # run
    p.add_argument("--out", help="run folder (default runs/hierkd, or runs/hierkd-eval, -predict, -bound, -rpn)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--amp", choices=("none", "bf16"), default="none", help="autocast the networks; losses stay fp32")
    p.add_argument("--compile", action="store_true", help="torch.compile the detector, in training")
    p.add_argument("--channels-last", action="store_true", help="NHWC memory format")
    p.add_argument("--log-every", type=int, default=50, help="steps between log lines (and NaN checks)")
    p.add_argument("--save-every", type=int, default=500, help="steps between writes of last.pt, beside one at each evaluation")
    p.add_argument("--resume", action="store_true", help="continue --out's last.pt, with its flags")
    p.add_argument("--eval", metavar="WEIGHTS", help="metrics of a checkpoint")
    p.add_argument("--predict", nargs="+", metavar="IMAGE", help="images or folders: boxes as json and pictures into --out")
    p.add_argument("--weights", help="for --predict: a checkpoint")
    p.add_argument("--classes", help="for --predict: any names, comma-separated (default: base and novel)")
    p.add_argument("--score", type=float, default=0.3, help="--predict: boxes above this score are kept")
    if p.parse_known_args(argv)[0].preset == "released":
        p.set_defaults(**RELEASED)
    args = p.parse_args(argv)
    mode = dict(eval=args.eval, predict=args.predict, bound=args.gt_upper_bound, rpn=args.rpn_recall)
    args.out = args.out or "-".join(["runs/hierkd", *[name for name, on in mode.items() if on][:1]])
    one, table = Path(args.out) / "last.pt", Path(args.out) / "baseline/last.pt"
    if args.resume and one.exists() and table.exists():
        p.error(f"--resume: {args.out} holds a run and a table of runs; give the folder of one run")
    if args.resume and (one.exists() or table.exists()):  # the flags of that run, or of the table's runs, then those given now
        saved = saved_flags(one) if one.exists() else saved_flags(table) | dict(ikd=True, gkd=True, table=True, out=args.out)
        p.set_defaults(**saved)
        args = p.parse_args(argv)
        for name in ("preset", "schedule", "optimizer"):  # they would set other flags, which the run has already
            if getattr(args, name) != saved[name]:
                p.error(f"--{name} {getattr(args, name)}: the run has {saved[name]}; what can change with --resume are single flags, as --epochs or --lr")
    try:
        if args.negatives != "1to1" and not 0 < float(args.negatives) <= 1:
            raise ValueError
    except ValueError:
        p.error(f"--negatives {args.negatives}: 1to1, or a share above 0 and up to 1")
    try:
        if args.cls_weight not in (None, "learn") and not float(args.cls_weight) > 0:
            raise ValueError
    except ValueError:
        p.error(f"--cls-weight {args.cls_weight}: learn, or a number above 0")
    for name in ("epochs", "max_iters", "batch_size", "accumulate", "log_every", "save_every", "gkd_patches", "ikd_max"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("lr", "tau_a", "tau_c", "tau_m", "crop_scale"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be positive")
    if sum(map(bool, mode.values())) > 1:
        p.error("--eval, --predict, --gt-upper-bound, --rpn-recall: one at a time")
    if args.clip_direct and not args.eval:
        p.error("--clip-direct: belongs to --eval")
    if args.heat_map and not args.predict:
        p.error("--heat-map: belongs to --predict")
    for name, low, high in (("nms", 0, 1), ("ikd_iou", -1, 1), ("ikd_weight", 0, math.inf), ("gkd_weight", 0, math.inf), ("weight_decay", 0, math.inf), ("workers", 0, math.inf)):
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must lie in {low} to {high}")
    if args.weights and not args.predict:
        p.error("--weights: belongs to --predict; --eval takes its weights directly, a training starts from --init")
    if args.predict and not args.weights:
        p.error("--predict needs --weights: a checkpoint")
    if args.classes and not args.predict:
        p.error("--classes: belongs to --predict")
    return args


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


class NarrowResNet(torchvision.models.ResNet):
    """torchvision's ResNet-10 with `width` instead of 64 channels and GroupNorm, for the embedded dataset."""

    def __init__(self, width):
        norm = lambda c: nn.GroupNorm(c // 8, c)
        super().__init__(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=1, norm_layer=norm)
        self.inplanes = width
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width)
        for level in range(4):
            layer = self._make_layer(torchvision.models.resnet.BasicBlock, width * 2**level, 1, stride=1 if level == 0 else 2)
            setattr(self, f"layer{level + 1}", layer)


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


def make_body(name, init, from_c2=False):
    """(Body, channels of its maps) of r50|r101|tinyN; init "imagenet" downloads torchvision's V1 weights."""
    frozen, skip = init == "imagenet", 0 if from_c2 else 1
    if re.fullmatch("tiny(8|16|24|32|48|64)", name):
        if init == "imagenet":
            raise UserError(f"--backbone {name}: has no ImageNet weights; use --init none")
        width = int(name[4:])
        return Body(NarrowResNet(width), frozen, from_c2), [width, 2 * width, 4 * width, 8 * width][skip:]
    if name not in ("r50", "r101"):
        raise UserError(f"--backbone {name}: choose among r50, r101, tiny8 ... tiny64")
    net = getattr(torchvision.models, "resnet" + name[1:])(weights=None)
    if init == "imagenet":
        url = torchvision.models.get_model_weights("resnet" + name[1:]).IMAGENET1K_V1.url
        net.load_state_dict(load_checkpoint(fetch(url, re.search(r"-([0-9a-f]{8})\.pth$", url)[1])))
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


class Learner(nn.Module):
    """The detector with its text matrix and, outside the module tree, CLIP: forward(batch) -> {name: loss}; their sum is Eq. 6."""

    def __init__(self, model, text, clip, a):
        super().__init__()
        self.model, self.a, self.clip = model, a, clip  # FrozenCLIP is no nn.Module
        self.register_buffer("text", text, persistent=False)

    def forward(self, batch):
        a, model = self.a, self.model
        model.unit_background()
        x = normalise(batch["images"], batch["sizes"])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=a.amp == "bf16"):
            maps = model(x.to(memory_format=torch.channels_last) if a.channels_last else x)
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

    def instance_loss(self, batch, f, decoded, boxes, chosen, counts):
        """Eq. 2, IKD: embeddings of positives against CLIP's of their crops. chosen (B, A): the positives that take part."""
        a = self.a
        image, anchor = chosen.nonzero(as_tuple=True)  # here a step waits for the device: CLIP must know how many crops, and their sizes
        if a.ikd_max and len(image) > a.ikd_max:
            pick = torch.randperm(len(image), device=image.device)[:a.ikd_max]
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
        return caption_loss(mlca(patches, captions, a.tau_a), self.model.tau_m, mine, has, a.gkd_loss) + self.model.tau_m * 0  # pl does not use it, but DDP waits for its gradient


# ================================================================== data

def class_split(args):
    """(base names, novel names) of --data and --split."""
    if args.data == "shapes":
        return BASE, NOVEL
    if args.split == "48_17":
        return BASE_48, NOVEL_17
    names = [c["name"] for c in read_json(find_coco(args.data, "val")[1])["categories"]]
    return [n for n in names if n not in NOVEL_15], NOVEL_15


def make_data(args, split):
    """The training set (base boxes only, with captions) or the images of val that hold any base or novel object."""
    root = make_shapes(seed=args.data_seed) if args.data == "shapes" else args.data
    args.image_size = args.image_size or ("72-120" if args.data == "shapes" else "480-800" if args.schedule == "3x" else "800")
    base, novel = class_split(args)
    if split == "val":
        return CocoDataset(*find_coco(root, "val"), False, args.image_size, classes=base + novel)
    captions = Path(root) / "annotations" / "captions_train2017.json"
    if args.gkd and not captions.exists():
        raise UserError(f"--data {root}: {captions} is missing, which GKD needs; it comes with COCO's annotations. Or use --no-gkd")
    data = CocoDataset(*find_coco(root, "train"), True, args.image_size, classes=base, captions=captions if args.gkd else None,
                       without=novel if args.drop_novel_images else ())
    if args.gkd and not any(data.captions[image_id] for image_id, *_ in data.items):
        raise UserError(f"--data {root}: {captions} has no caption for any of the {len(data)} training images; do their image ids agree? Or use --no-gkd")
    return data


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def get_clip(args, device):
    """FrozenCLIP: the one asked for, or the tiny CLIP of shapes. The first process of a machine goes first: it downloads, or trains the tiny CLIP."""
    def load():
        if args.clip or args.data != "shapes":
            return load_clip(args.clip or "ViT-B-32-quickgelu/openai", device)
        root = make_shapes(seed=args.data_seed)
        return load_clip(tiny_clip(root, root.parent / "clip", args.data_seed, device=device), device)
    clip = load() if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None
    barrier()
    return clip or load()


# ================================================================== train

def fill_defaults(args):
    """Defaults that depend on the dataset and the schedule."""
    shapes = args.data == "shapes"
    defaults = dict(backbone="r50", init="imagenet", gkd_levels=5, tau_a=1.0, tau_c=100.0, embed_bias="focal", cls_weight="1", ikd_weight=1.0, crop_scale=1.0, gkd_weight=1.0,
                    epochs={"1x": 12, "2x": 24, "3x": 36}[args.schedule], batch_size=8, optimizer="sgd", lr=0.01)
    if shapes:
        defaults.update(backbone="tiny16", init="none", gkd_levels=2, tau_a=0.1, tau_c=30.0, embed_bias="zero", ikd_weight=0.4, crop_scale=1.2, gkd_weight=0.2,
                        ikd_max=64, epochs=16, batch_size=16, optimizer="adamw", lr=0.004)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    contrasted = args.batch_size * (dist.get_world_size() if args.gkd_gather and dist.is_initialized() else 1)
    if args.gkd and args.gkd_loss == "cl" and contrasted == 1:
        raise UserError("--batch-size 1: GKD contrasts the images of a batch, with one image its loss is always 0; use more or --gkd-gather")


def train(args, rank, world, device):
    """Train the detector under args; returns the last evaluation's metrics (rank 0) or None."""
    fill_defaults(args)
    data, val = make_data(args, "train"), make_data(args, "val")
    clip = get_clip(args, device)
    out = open_run(args, rank, args.resume)
    seed_all(args.seed)
    model = OpenATSS(args.backbone, None if args.bg == "fixed" else clip.encode_text(["a photo of background."])[0], clip.dim,
                     64 if args.backbone.startswith("tiny") else 256, args.quality, args.tau_c, args.tau_m, args.cls_weight, args.gkd,
                     args.embed_bias, args.init)
    own = args.clip and (str(Path(args.clip).resolve()) if Path(args.clip).is_file() else args.clip)
    model.arch.update(image_size=args.image_size, clip=own or "", data=args.data,
                      split=args.split, data_seed=args.data_seed)
    learner = Learner(model.to(device), clip.class_embeddings(data.classes), clip, args)
    if rank == 0:
        print(f"CLIP {clip.name} | IKD {args.ikd} GKD {args.gkd} | {len(data.classes)} base and {len(class_split(args)[1])} novel classes")
    return fit(learner, data, out, args, rank, world, device, partial(evaluate, model, val, clip, rank, world, device, args))


def fit(learner, data, out, args, rank, world, device, measure):
    """The training loop: minimises the sum of learner(batch)'s losses. Returns what the last measure(folder or None) gave.

    learner.model is what is saved. measure: -> metrics on rank 0; "score" of them chooses best.pt, "line" is printed.
    """
    model = learner.model
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    learner.train()
    if world > 1:
        learner = nn.parallel.DistributedDataParallel(learner, [device.index] if device.type == "cuda" else None)
    loader, plan = train_loader(data, args.batch_size, rank, world, args.seed, args.workers, device.type == "cuda")
    total_batch, paper_batch = args.batch_size * world * args.accumulate, 32 if args.gkd and args.data != "shapes" else 16
    lr = args.lr * total_batch / paper_batch
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = (torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=args.weight_decay) if args.optimizer == "sgd" else
                 torch.optim.AdamW(parameters, lr, weight_decay=args.weight_decay))
    steps_per_epoch = -(-len(plan) // args.accumulate)
    total = min(args.epochs * steps_per_epoch, args.max_iters or 10**9)
    milestones = (args.epochs * (3 / 4 if args.schedule == "3x" else 2 / 3), args.epochs * 11 / 12)
    warmup = min(500, args.epochs * steps_per_epoch // 10)
    it, best, due = 0, -2.0, False  # a score is -1 where val holds no box
    if can_resume(out, args.resume, rank, device):
        state = load_checkpoint(out / "last.pt")
        load_strict(model, state["model"], f"--resume {out / 'last.pt'}")
        optimizer.load_state_dict(state["optimizer"])
        for g in optimizer.param_groups:
            g["weight_decay"] = args.weight_decay  # --resume --weight-decay 0 is meant
        if state["total_batch"] != total_batch:
            raise UserError(f"--resume {out}: was trained with a total batch of {state['total_batch']}, this command has {total_batch}")
        it, best, due = state["it"], state["best"], state.get("due", False)
        if rank < len(state["rng"]):
            set_rng_state(state["rng"][rank])
    if rank == 0:
        n = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False)]
        print(f"{type(model).__name__} {args.backbone}: {n[0]:,} parameters, {n[1]:,} trained | {len(data)} images, dropped {data.dropped} | "
              f"batch {args.batch_size} x {world} x {args.accumulate} = {total_batch} | lr {args.lr:g} at {paper_batch} -> {lr:g} | "
              f"{args.epochs} epochs of {steps_per_epoch} steps, from {it}", flush=True)

    scalars = {n: p for n in ("tau_c", "tau_m", "s") if (p := getattr(model, n, None)) is not None}

    def save_last(due=False):  # due: the evaluation of this step is still to come
        states = gather([rng_state()])  # of every process
        if rank == 0:
            save_checkpoint(dict(weights_of(model), optimizer=optimizer.state_dict(), it=it, best=best, due=due, rng=states,
                                 total_batch=total_batch, args=vars(args)), out / "last.pt")

    def validate():
        nonlocal best
        metrics = measure(out if it >= total else None)
        model.train()
        if rank == 0:
            numbers = {k: v for k, v in metrics.items() if k not in ("classes", "line")}
            log.write(dict(it=it, epoch=epoch + 1, **numbers), f"ep {epoch + 1:02d} eval " + metrics["line"])
            if metrics["score"] > best:
                best = metrics["score"]
                save_checkpoint(weights_of(model), out / "best.pt")
        log.restart_clock()
        return metrics

    log = Log(out, rank, total, it, args.log_every)
    metrics, clock, epoch = None, time.time(), max(it - 1, 0) // steps_per_epoch
    if it == 0:
        save_last()  # from here on --resume finds the run and its flags
    elif due or it >= total:  # killed before the evaluation was done, or --resume of a finished run
        metrics = validate()
        save_last()
    while it < total:
        epoch, done = divmod(it, steps_per_epoch)
        plan.set_epoch(epoch, done * args.accumulate)
        batches, left = iter(loader), len(plan)
        while left and it < total:
            factor = warmup_multistep(it, steps_per_epoch, milestones, warmup)
            for g in optimizer.param_groups:
                g["lr"] = lr * factor
            waited, losses = 0.0, {}
            count = min(args.accumulate, left)
            for micro in range(count):
                since = time.time()
                batch = to_device(next(batches), device)
                waited += time.time() - since
                hold = learner.no_sync() if world > 1 and micro < count - 1 else nullcontext()
                with hold:
                    terms = learner(batch)
                    (sum(terms.values()) / count).backward()  # Eq. 6
                losses = {k: losses.get(k, 0) + v.detach() / count for k, v in terms.items()}
            left -= count
            norm = nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            it += 1
            log.step(it, epoch + 1, losses, lr * factor, waited, dict(norm=norm, **scalars))
            if it % args.save_every == 0 and left and it < total:
                log.flush(it, epoch + 1, lr * factor)
                save_last()
        log.flush(it, epoch + 1, lr * factor)  # looks for NaN: never save what a NaN step left behind
        if it >= total or (epoch + 1) % (args.epochs if args.data == "shapes" else max(1, args.epochs // 12)) == 0:
            save_last(due=True)  # before anything of the evaluation can fail
            metrics = validate()
            save_last()
    log.bar.close()
    if rank == 0:
        plot_curves(out / "log.jsonl", out / "curves.png")
        print(f"best {best:.1f} | {time.time() - clock:.0f}s | {out}", flush=True)
    barrier()
    return metrics


def weights_of(model):
    """What a detector is, as plain values and tensors. No CLIP tensor, no class list: names are chosen when it is used."""
    return dict(arch=model.arch, model=model.state_dict())


def load_detector(path, flag="--weights"):
    """OpenATSS in eval mode from a checkpoint of ours."""
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint, dict) or "dim" not in checkpoint.get("arch", {}):
        raise UserError(f"{flag} {path}: is no checkpoint of hierkd.py")
    a = checkpoint["arch"]
    model = OpenATSS(a["backbone"], torch.ones(a["dim"]) if a["bg"] == "learn" else None, a["dim"], a["channels"], a["quality"],
                     cls_weight=a["cls_weight"], gkd=a["gkd"])
    model.arch = a
    load_strict(model, checkpoint["model"], f"{flag} {path}")
    model.unit_background()
    return model.eval()


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
    """One collated image -> for each text matrix (boxes in original pixels, scores, labels). clip: it classifies (--clip-direct)."""
    batch = to_device(batch, device)
    x, direct = normalise(batch["images"], batch["sizes"]), None
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        maps = model(x)
    if clip:
        def by_clip(boxes, text):
            owner = torch.zeros(len(boxes), dtype=torch.long, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                v = encode_regions(clip, batch["images"], batch["sizes"], boxes, owner, args, args.crop_scale or 1.0)
            return (100 * v @ text.T).softmax(-1)
        direct = by_clip, args.direct_quality
    (h, w), (height, width) = batch["sizes"][0].tolist(), batch["original_sizes"][0]
    scale = torch.tensor([width / w, height / h] * 2, device=device)
    return [(boxes * scale, scores, labels) for boxes, scores, labels in detect(model, maps, (h, w), texts, args.nms, direct=direct)]


def truth_of(val, raw, names):
    """COCO ground truth `raw` of these classes and of the images that hold one of them, as a dict."""
    ids = {c for c, n in zip(val.category_ids, val.classes) if n in set(names)}
    used = {a["image_id"] for a in raw["annotations"] if a["category_id"] in ids and not a.get("iscrowd")}
    return dict(images=[i for i in raw["images"] if i["id"] in used], categories=[c for c in raw["categories"] if c["id"] in ids],
                annotations=[a for a in raw["annotations"] if a["category_id"] in ids and a["image_id"] in used])


def evaluate(model, val, clip, rank, world, device, args, out=None):
    """AP50 and AR50 under ZSD, GZSD and base only, on rank 0, None elsewhere; one pass over the images.

    ZSD: novel names, images with a novel object. Base: likewise. GZSD: all names compete; means over base, novel and all classes.
    With --clip-direct ZSD alone, as in Table 6.
    """
    model.eval()
    model.unit_background()  # it is off the sphere after a step
    since, (base, novel) = time.time(), class_split(args)
    names = dict(zsd=[n for n in val.classes if n in novel], base=[n for n in val.classes if n in base], gzsd=val.classes)
    names = {p: names[p] for p in names if p == "zsd" or not args.clip_direct}
    ids = {p: [val.category_ids[val.classes.index(n)] for n in names[p]] for p in names}
    texts, raw = {p: clip.class_embeddings(names[p]) for p in names}, read_json(val.annotations)
    truth = {p: truth_of(val, raw, names[p]) for p in names}
    wanted = {p: {i["id"] for i in truth[p]["images"]} for p in names}
    results = {p: [] for p in names}
    for batch in tqdm(eval_loader(val, rank, world, args.workers, device.type == "cuda"), desc="eval", disable=rank != 0, leave=False, mininterval=1):
        image_id = batch["image_ids"][0]
        asked = [p for p in names if image_id in wanted[p]]
        if asked:
            found = run_detector(model, batch, device, args, [texts[p] for p in asked], clip if args.clip_direct else None)
            for p, result in zip(asked, found):
                results[p] += to_coco_results(image_id, *result, ids[p])
    results = {p: gather(results[p]) for p in names}
    if rank != 0:
        return None
    stats = {p: coco_evaluate(truth[p], results[p]) for p in names}
    groups = dict(zsd=("zsd", novel), base=("base", base), gzsd_base=("gzsd", base), gzsd_novel=("gzsd", novel), gzsd_all=("gzsd", val.classes))
    groups = {g: (p, members) for g, (p, members) in groups.items() if p in names}
    metrics = dict(images=len(val), seconds=time.time() - since) | {
        f"{g}_{key}": class_mean(stats[p], members, key) for g, (p, members) in groups.items() for key in ("AP50", "AR50", "AP50s", "AP50m", "AP50l")}
    metrics["score"] = metrics["zsd_AP50" if args.clip_direct else "gzsd_all_AP50"]
    metrics["classes"] = {p: stats[p]["classes"] for p in names}
    metrics["line"] = f"{len(val)} images | " + " | ".join(f"{label} AP50 {metrics[g + '_AP50']:.1f} AR50 {metrics[g + '_AR50']:.1f}" for g, label in (
        ("zsd", "ZSD novel"), ("base", "base"), ("gzsd_base", "GZSD base"), ("gzsd_novel", "novel"), ("gzsd_all", "all")) if g in groups)
    metrics["line"] += f" | {metrics['seconds']:.0f}s"
    write_results(out, metrics, results["zsd" if args.clip_direct else "gzsd"], val)
    return metrics


def write_results(out, metrics, results, val):
    """results.json, detections.json and samples.jpg into the folder out, if given."""
    if out:
        (out / "detections.json").write_text(json.dumps(results))
        (out / "results.json").write_text(json.dumps({k: v for k, v in metrics.items() if k != "line"}, indent=1))
        save_samples(val, results, out / "samples.jpg")


def follow(args, arch):
    """Classes, split, seed of shapes and image size are those that a checkpoint was trained with: its novel classes must stay novel."""
    if args.data == "shapes" and arch["data"] != "shapes":
        raise UserError("--data shapes: the checkpoint was trained on COCO's classes")
    args.data = "shapes" if arch["data"] == "shapes" else args.data
    args.split, args.data_seed, args.image_size = arch["split"], arch["data_seed"], args.image_size or arch["image_size"]


def clip_of(model, args, device):
    """The CLIP that a checkpoint was trained with, unless --clip names another; its width must fit."""
    clip = get_clip(argparse.Namespace(clip=args.clip or model.arch["clip"] or None, data=args.data, data_seed=args.data_seed), device)
    if clip.dim != model.arch["dim"]:
        raise UserError(f"--clip {clip.name}: has {clip.dim}-d embeddings, the checkpoint {model.arch['dim']}-d")
    return clip


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file) and one picture per image into --out."""
    model = load_detector(args.weights).to(device)
    follow(args, model.arch)
    classes = [n.strip() for n in args.classes.split(",")] if args.classes else sum(class_split(args), [])
    text = clip_of(model, args, device).class_embeddings(classes)
    size = max(parse_image_size(args.image_size))
    out, answer = Path(args.out), {}
    paths = [q for p in map(Path, args.predict) for q in (sorted(p.iterdir()) if p.is_dir() else [p])
             if q == p or q.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp")]
    if not paths:
        raise UserError(f"--predict {' '.join(args.predict)}: no image there")
    for number, path in enumerate(tqdm(paths, desc="predict")):
        try:
            original = TF.pil_to_tensor(read_image(path))
        except DataError as e:  # the others are still wanted
            print(f"left out: {e}", file=sys.stderr)
            continue
        image, (h, w) = resize(original, size)
        item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0,
                    original_size=original.shape[1:])
        batch = collate([item])
        (boxes, scores, labels), = run_detector(model, batch, device, args, [text])
        keep = scores > args.score
        boxes, scores, labels = boxes[keep].cpu(), scores[keep].cpu(), labels[keep].cpu()
        answer[str(path)] = [dict(box=[round(v, 1) for v in b], score=round(s, 4), label=classes[k]) for b, s, k in
                             zip(boxes.tolist(), scores.tolist(), labels.tolist())]
        picture = draw_boxes(original, boxes, labels, classes, scores)
        torchvision.io.write_jpeg(picture, str(out / f"{number:04d}_{path.stem}_boxes.jpg"), quality=90)
        if args.heat_map:
            from matplotlib import colormaps  # comes with lvis
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                maps = model(normalise(batch["images"].to(device), batch["sizes"].to(device)))
                heat = F.interpolate(heat_map(model, maps, text, (h, w))[None], original.shape[1:], mode="bilinear")[0].cpu().numpy()
            for name, score in zip(classes, heat):
                coloured = torch.from_numpy(colormaps["jet"](score)[..., :3]).permute(2, 0, 1) * 255
                file = f"{number:04d}_{path.stem}_heat_" + re.sub(r"[^\w-]", "_", name) + ".jpg"
                torchvision.io.write_jpeg((0.5 * original + 0.5 * coloured).byte(), str(out / file), quality=90)
    if not answer:
        raise UserError(f"--predict {' '.join(args.predict)}: no image can be read")
    (out / "predictions.json").write_text(json.dumps(answer, indent=1))
    print(f"{sum(map(len, answer.values()))} boxes in {len(answer)} images -> {out}")


# ================================================================== analyses of the paper

def upper_bound(args, rank, world, device):
    """Table 9: each novel object's true box is one detection, named by CLIP among the novel names. Metrics on rank 0.

    Crops come from the original file, enlarged by --crop-scale. One name a box, so AR50 is the mean over classes of the top-1 accuracy.
    """
    val, clip = make_data(args, "val"), get_clip(args, device)
    novel = class_split(args)[1]
    names = [n for n in val.classes if n in novel]
    ids = [val.category_ids[val.classes.index(n)] for n in names]
    text, truth, results = clip.class_embeddings(names), truth_of(val, read_json(val.annotations), names), []
    boxes = {i["id"]: [] for i in truth["images"]}
    for a in truth["annotations"]:
        if not a.get("iscrowd"):
            x, y, w, h = a["bbox"]
            boxes[a["image_id"]].append((x, y, x + w, y + h))
    for image in tqdm(truth["images"][rank::world], desc="upper bound", disable=rank != 0, mininterval=1):
        pixels, where = TF.pil_to_tensor(read_image(val.folder / image["file_name"]))[None], torch.tensor(boxes[image["id"]])
        owner = torch.zeros(len(where), dtype=torch.long)
        v = encode_regions(clip, pixels.to(device), torch.tensor([pixels.shape[2:]], device=device), where.to(device), owner.to(device), args, args.crop_scale or 1.0)
        score, label = (100 * v @ text.T).softmax(-1).max(-1)
        results += to_coco_results(image["id"], where, score, label, ids)
    results = gather(results)
    if rank != 0:
        return None
    stats = coco_evaluate(truth, results)
    metrics = {key: class_mean(stats, names, key) for key in ("AR50", "AP50", "AP50s", "AP50m", "AP50l")} | dict(classes=stats["classes"])
    metrics["line"] = (f"CLIP {clip.name} on {len(results)} true boxes of {len(names)} novel classes | AR50 {metrics['AR50']:.1f} "
                       f"AP50 {metrics['AP50']:.1f} S {metrics['AP50s']:.1f} M {metrics['AP50m']:.1f} L {metrics['AP50l']:.1f}")
    write_results(Path(args.out), metrics, results, val)
    return metrics


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

    def forward(self, x, sizes, boxes=None, amp="none"):
        """-> (proposals of each image, best first, {name: loss}, empty without boxes). bf16 up to the FPN: torchvision's anchors have the maps' dtype."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp == "bf16"):
            maps = self.fpn(self.body(x))
        targets = None if boxes is None else [dict(boxes=b) for b in boxes]
        return self.rpn(ImageList(x, [tuple(size) for size in sizes.tolist()]), {k: fp32(m) for k, m in maps.items()}, targets)


class RPNLearner(nn.Module):
    def __init__(self, model, args):
        super().__init__()
        self.model, self.a = model, args

    def forward(self, batch):
        x = normalise(batch["images"], batch["sizes"])
        boxes = [b[k >= 0] for b, k in zip(batch["boxes"], batch["labels"])]
        losses = self.model(x, batch["sizes"], boxes, self.a.amp)[1]
        return dict(objectness=losses["loss_objectness"], box=losses["loss_rpn_box_reg"])


def rpn_recall(args, rank, world, device):
    """Table 1: recall of novel boxes by an RPN that has seen base boxes only. Metrics on rank 0."""
    args.gkd = False  # no captions, learning rate for 16 images, mmdetection's for an RPN
    args.lr = args.lr or (None if args.data == "shapes" else 0.02)
    fill_defaults(args)
    data, val = make_data(args, "train"), make_data(args, "val")
    seed_all(args.seed)
    model = BaseRPN(args.backbone, args.init, 64 if args.backbone.startswith("tiny") else 256).to(device)
    return fit(RPNLearner(model, args), data, open_run(args, rank, args.resume), args, rank, world, device,
               partial(measure_recall, model, val, rank, world, device, args))


@torch.no_grad()
def measure_recall(model, val, rank, world, device, args, out=None, most=(100, 300, 1000), ious=(0.5, 0.75)):
    """Recall of novel boxes among the best `most` proposals, at each IoU, one proposal a box; classes are ignored."""
    model.eval()
    names = [n for n in val.classes if n in class_split(args)[1]]
    truth, results = truth_of(val, read_json(val.annotations), names), []
    wanted = {i["id"] for i in truth["images"]}
    for batch in tqdm(eval_loader(val, rank, world, args.workers, device.type == "cuda"), desc="recall", disable=rank != 0, leave=False, mininterval=1):
        if batch["image_ids"][0] in wanted:
            batch = to_device(batch, device)
            boxes = model(normalise(batch["images"], batch["sizes"]), batch["sizes"], None, args.amp)[0][0]
            (h, w), (height, width) = batch["sizes"][0].tolist(), batch["original_sizes"][0]
            boxes = boxes * torch.tensor([width / w, height / h] * 2, device=device)
            results += to_coco_results(batch["image_ids"][0], boxes, torch.arange(len(boxes), 0, -1) / len(boxes),
                                       torch.zeros(len(boxes), dtype=torch.long), val.category_ids)
    results = gather(results)
    if rank != 0:
        return None
    metrics = {f"AR{n}_{iou}": r for (iou, n), r in class_agnostic_recall(truth, results, most, ious).items()}
    metrics["score"] = metrics[f"AR{most[-1]}_{ious[0]}"]
    metrics["line"] = " | ".join(f"novel boxes, IoU {iou}: recall " + " ".join(f"@{n} {metrics[f'AR{n}_{iou}']:.1f}" for n in most) for iou in ious)
    if out:
        (out / "results.json").write_text(json.dumps(metrics, indent=1))
    return metrics


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
        resume = args.resume and (out / "log.jsonl").exists()
        run = argparse.Namespace(**{**vars(args), "ikd": ikd, "gkd": gkd, "out": str(out), "resume": resume, "table": False})
        rows.append((name, train(run, rank, world, device), time.time() - since))
    if rank == 0:
        print(f"\n{args.data + ', AP50':18s}  ZSD novel   base | GZSD base  novel    all   seconds")
        for name, m, seconds in rows:
            print(f"{name:18s} {m['zsd_AP50']:10.1f} {m['base_AP50']:6.1f} | {m['gzsd_base_AP50']:9.1f} {m['gzsd_novel_AP50']:6.1f} "
                  f"{m['gzsd_all_AP50']:6.1f} {seconds:9.0f}")


def main():
    try:
        args = parse_args()
        rank, world, device = init_ddp()
        if args.eval or args.predict or args.gt_upper_bound:
            answer_folder(args.out)
        if args.eval:
            model = load_detector(args.eval, "--eval").to(device)
            follow(args, model.arch)
            metrics = evaluate(model, make_data(args, "val"), clip_of(model, args, device), rank, world, device, args, Path(args.out))
            if rank == 0:
                print(metrics["line"])
        elif args.predict:
            if world > 1:
                raise UserError("--predict: runs in one process; start it with python")
            predict(args, device)
        elif args.gt_upper_bound:
            metrics = upper_bound(args, rank, world, device)
            if rank == 0:
                print(metrics["line"])
        elif args.rpn_recall:
            rpn_recall(args, rank, world, device)
        elif args.table if args.table is not None else args.data == "shapes" and args.ikd and args.gkd and args.max_iters is None:
            shapes_table(args, rank, world, device)
        else:
            train(args, rank, world, device)
    except (UserError, DataError, ClipError, ShapesError) as e:
        line = str(e).strip().splitlines()[-1]  # a loader worker puts its traceback and the exception's name before it
        sys.exit("\nhierkd.py: " + re.sub(r"^[\w.]+Error: ", "", line))
    leave_ddp()


if __name__ == "__main__":
    main()
