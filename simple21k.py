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
    torchrun --nproc_per_node 8 simple21k.py --det-json a.json --det-images a/ --cls-dir folders/ --val-json b.json --val-images b/     # your own data
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

import numpy as np
import torch
import torch.distributed as dist
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
from common.datasets import (CocoDataset, DataError, ImageIndex, LabelledImages, LocalisationImages, Stream, collate, collate_labelled, eval_loader,
                             jitter_image, read_coco, read_ilsvrc, read_image, read_json, repeat_fractions)
from common.evaluation import class_mean, class_table, coco_evaluate, encode_mask, gather, import_lvis, localise, lvis_evaluate, sparse_ap, to_coco_results
from common.run import (Help, Log, UserError, answer_folder, barrier, can_resume, draw_boxes, fetch, init_ddp, leave_ddp, load_checkpoint,
                        load_strict, open_run, plot_curves, reduce_mean, rng_state, save_checkpoint, save_samples, saved_flags, seed_all,
                        set_rng_state, warmup_multistep)
from common.shapes import ShapesError, make_shapes

STRIDES = (4, 8, 16, 32)  # of P2 ... P5
SWIN = dict(  # torchvision's name, first width, depths, heads, stochastic depth of stage I and II
    swin_t=(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2, 0.2), swin_s=(96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3, 0.2),
    swin_b=(128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5, 0.3))
SETUPS = dict(s1="LVIS-997 base + IN-997, masks", s2="COCO + ImageNet-1K", s3="Objects365 + ImageNet-21K", lvis="fine-tuning on LVIS, 1,203 classes",
              own="--det-json ... or a folder in the layout of COCO with imagenet/train beside it")


# ================================================================== flags

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    # data
    p.add_argument("--setup", choices=tuple(SETUPS), help="; ".join(f"{k}: {v}" for k, v in SETUPS.items()) + " (default s2; shapes, --det-json: own)")
    p.add_argument("--data", default="data", help="root of coco/, lvis/, objects365/, imagenet/, imagenet21k/; or 'shapes': the embedded dataset")
    p.add_argument("--data-seed", type=int, default=0, help="of the embedded dataset")
    p.add_argument("--det-json", help="COCO- or LVIS-format boxes to train on (default: the setup's)")
    p.add_argument("--det-images", help="their images")
    p.add_argument("--cls-dir", help="folder with a folder or .tar of images for each class (default: the setup's)")
    p.add_argument("--cls-list", metavar="FILE", help="keep only these classes of it: first word of each line")
    p.add_argument("--cls-val", help="folder of the same kind for stage I's accuracy; none (default: the setup's, if it is there and --cls-dir not given)")
    p.add_argument("--val-json", help="what the detector is evaluated on: COCO or LVIS format, or a localisation set (images with category_id)")
    p.add_argument("--val-images", help="its images")
    p.add_argument("--val-boxes", help="instead of --val-json: folder of ILSVRC XML")
    p.add_argument("--names", metavar="FILE", help="names of the wnids: wnid, tab, name (default: classes.json in or beside --cls-dir, else the wnids)")
    p.add_argument("--wordnet", metavar="FILE", help="WordNet 3.0's index.noun: which LVIS class is which wnid (setup s1)")
    p.add_argument("--overlap", metavar="FILE", help="json {detection class: wnid} of classes that both vocabularies hold (default: s1 WordNet, own by name)")
    p.add_argument("--make-split", metavar="FILE", help="write a localisation set of --cls-dir, 5 images of a class, to be annotated (Sec. 4.1), and stop")
    p.add_argument("--workers", type=int, default=2, help="loader processes per training process, for each of the two kinds of images")
    # model
    p.add_argument("--backbone", help="r50, swin_t, swin_s, swin_b or tiny8 ... tiny64 (default r50, shapes tiny16; stage II: as --init)")
    p.add_argument("--head", choices=("2fc", "4conv1fc"), help="shared RoI head (default 2fc; stage II: as --init)")
    p.add_argument("--masks", action=argparse.BooleanOptionalAction, help="class-agnostic mask head, Mask R-CNN (default: setup s1)")
    p.add_argument("--bn", choices=("frozen", "sync"), help="BatchNorm in stage II: running statistics, or the batch's, on GPUs that of all processes "
                   "(default frozen; --init none: sync)")
    p.add_argument("--drop-path", type=float, help="stochastic depth of Swin (default 0.2, 0.3, 0.5 for T, S, B, s3 0.2; stage II 0.2, 0.2, 0.3)")
    # method
    p.add_argument("--stage", type=int, choices=(1, 2), help="1: the classifier; 2: the detector, from --init (default: both, in OUT/stage1 and OUT/stage2)")
    p.add_argument("--init", help="stage II: a checkpoint of stage I, imagenet or none (random: the row '-stage I'); stage I: imagenet or none (default none)")
    p.add_argument("--reinit-cls", action="store_true", help="stage II: the classifier of stage I is not loaded")
    p.add_argument("--stage1-head", choices=("roi", "gap"), default="roi", help="the detector's head on a whole-image RoI, or average pooling and one "
                   "linear layer ('-reform')")
    p.add_argument("--stage1-level", choices=("canonical", "random", "all"), default="canonical", help="FPN level of the whole-image RoI in stage I")
    p.add_argument("--cls-ratio", type=int, default=3, help="classification images for each detection image; 0: boxes only")
    p.add_argument("--cls-weight", type=float, help="weight of the classification loss, searched in 0.01, 0.1, 1 (default 0.1; tiny 1)")
    p.add_argument("--cls-size", type=int, help="stage II: canvas of the classification images (default: --image-size; tiny half of it)")
    p.add_argument("--jitter", help="large-scale jitter: smallest and largest scale (default 0.1,2.0; tiny 0.7,1.6)")
    p.add_argument("--cls-jitter", help="that of the classification images; 1,1: none (default: as --jitter; tiny 0.2,1.0)")
    p.add_argument("--fg-grad-on-cls", action="store_true", help="the foreground score learns from classification images, too (not the paper: should hurt)")
    p.add_argument("--extra-as-fg", action="store_true", help="setup s1: boxes of LVIS classes outside the 997 train foreground and boxes")
    p.add_argument("--fuse", type=float, default=2 / 3, help="Eq. 5: share of the detection classifier where both know a class; 0, 1: one of them alone")
    # inference
    p.add_argument("--score-thresh", type=float, default=1e-4, help="boxes below this score are dropped")
    p.add_argument("--max-dets", type=int, help="boxes of an image (default 100; evaluation on LVIS 300)")
    p.add_argument("--nms-topk", type=int, default=5000, help="candidates that enter NMS; doubled until enough survive, so the result does not depend on it")
    p.add_argument("--classes", help="--predict: only these names or wnids, comma-separated")
    # schedule
    p.add_argument("--stage1-epochs", type=int, help="(default r50 100, Swin 300, with ImageNet-21K 100; tiny 15)")
    p.add_argument("--stage1-batch", type=int, help="images per process and step (default r50 32, Swin 128; tiny 64)")
    p.add_argument("--stage1-lr", type=float, help="for 256 images (r50, SGD, 0.1), 1,024 (Swin, AdamW, 1e-3, s3 2.5e-4) or 64 (tiny, AdamW, 1e-3), "
                   "scaled linearly")
    p.add_argument("--stage1-size", type=int, help="pixels of a side (default 224; tiny 96)")
    p.add_argument("--crop", type=float, help="stage I: smallest share of the image in a random crop (default 0.08; tiny 0.5)")
    p.add_argument("--augment", choices=("plain", "weak", "strong"), help="stage I: plain: crop, flip; weak: and colours; strong: crop, flip, RandAugment, "
                   "Mixup, CutMix, erasing, smoothing 0.1 (default weak; Swin strong; shapes plain)")
    p.add_argument("--epochs", type=int, help="stage II, of the detection images (default 36; s3 12; lvis 24; tiny 3)")
    p.add_argument("--batch-size", type=int, help="stage II: detection images per process and step (default 2; tiny 4)")
    p.add_argument("--lr", type=float, help="stage II, for 16 detection images; the paper searches 3e-4, 1e-3, 3e-3 (default 3e-4; lvis 1e-4; tiny 4e-3)")
    p.add_argument("--weight-decay", type=float, default=0.05, help="stage II")
    p.add_argument("--rfs", type=float, help="repeat-factor sampling threshold; 0: off (default lvis 0.001, else 0)")
    p.add_argument("--image-size", type=int, help="canvas of stage II and of evaluation: the long side (default 1024; tiny 256)")
    p.add_argument("--max-iters", type=int, help="stop each stage after this many steps; the schedule is not shortened")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    # run
    p.add_argument("--out", help="run folder (default runs/simple21k, runs/simple21k-eval or runs/simple21k-predict)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--amp", choices=("none", "bf16"), default="none", help="autocast backbone and FPN; heads, scores and losses stay fp32")
    p.add_argument("--compile", action="store_true", help="torch.compile the backbone")
    p.add_argument("--channels-last", action="store_true", help="NHWC memory format")
    p.add_argument("--checkpoint", action="store_true", help="gradient checkpointing: the backbone's stages are computed twice and not kept")
    p.add_argument("--log-every", type=int, default=50, help="steps between log lines (and NaN checks)")
    p.add_argument("--save-every", type=int, default=500, help="steps between writes of last.pt, beside one at each evaluation")
    p.add_argument("--resume", action="store_true", help="continue --out's last.pt, with its flags; also of both stages (the table of --data shapes: "
                   "give them again)")
    p.add_argument("--table", action=argparse.BooleanOptionalAction, help="shapes: both stages, and stage II on boxes only, in one table (default without "
                   "--stage, --init, --max-iters)")
    p.add_argument("--eval", metavar="WEIGHTS", help="metrics of a checkpoint")
    p.add_argument("--predict", nargs="+", metavar="IMAGE", help="images or folders: boxes as json and pictures into --out")
    p.add_argument("--weights", help="for --predict: a checkpoint of stage II")
    p.add_argument("--score", type=float, default=0.1, help="--predict: boxes above this score are kept")
    args = p.parse_args(argv)
    args.out = args.out or "runs/simple21k" + ("-eval" if args.eval else "-predict" if args.predict else "")
    there = [path for folder in ("", "stage2", "stage1") for path in [Path(args.out) / folder / "last.pt"] if path.exists()]
    if args.resume and there:  # the flags of that run, then those given now; a run of both stages has them in its folders
        saved = saved_flags(there[0])
        if "stage1_level" not in saved:
            p.error(f"--resume {args.out}: holds a run of another script")
        if there[0].parent != Path(args.out):
            saved.update(stage=None, init=None)
        for one, other in (("val_json", "val_boxes"), ("val_boxes", "val_json")):  # the one that is given replaces the other
            saved[other] = None if getattr(args, one) else saved[other]
        p.set_defaults(**saved | dict(resume=False, out=args.out))
        args = p.parse_args(argv)
    check_conflicts(p, args)
    check_flags(p, args)
    return args


def check_flags(p, args):
    """Stops with the line of the first flag whose value makes no sense."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    for names, ok, text in (
            (("stage1_epochs", "stage1_batch", "epochs", "max_iters", "batch_size", "accumulate", "log_every", "save_every", "max_dets", "nms_topk"),
             lambda v: v >= 1, "must be at least 1"),
            (("lr", "stage1_lr"), lambda v: 0 < v < math.inf, "must be positive"),
            (("workers", "weight_decay", "cls_weight", "cls_ratio", "rfs"), lambda v: 0 <= v < math.inf, "must be 0 or more"),
            (("fuse", "score_thresh"), lambda v: 0 <= v <= 1, "must be between 0 and 1"),
            (("drop_path",), lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
            (("crop",), lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
            (("image_size", "cls_size", "stage1_size"), lambda v: v >= 32 and v % 32 == 0, "must be a multiple of 32")):
        for name in names:
            if name in given and not ok(given[name]):
                p.error(f"--{name.replace('_', '-')} {given[name]}: {text}")
    for name, text in (("jitter", args.jitter), ("cls-jitter", args.cls_jitter)):
        if text and not (re.fullmatch(r"\d+\.?\d*,\d+\.?\d*", text) and 0 < scales(text)[0] <= scales(text)[1]):
            p.error(f"--{name} {text}: expected two scales as 0.1,2.0")


def check_conflicts(p, args):
    """Stops with a line where flags that were given contradict each other."""
    if args.eval and args.predict:
        p.error("--eval and --predict: one at a time")
    if args.predict and not args.weights:
        p.error("--predict needs --weights: a checkpoint of stage II")
    if args.weights and not args.predict:
        p.error("--weights: belongs to --predict; --eval takes its weights directly, --init is where stage II starts")
    if args.classes and not args.predict:
        p.error("--classes: belongs to --predict; --cls-list chooses the classes to train on")
    if args.data == "shapes" and args.setup not in (None, "own"):
        p.error(f"--setup {args.setup}: --data shapes has its own")
    if args.setup == "lvis" and args.init is None and not args.eval and not args.predict:
        p.error("--setup lvis: fine-tunes --init, a checkpoint of stage I or II, or imagenet")
    if args.init in ("none", "imagenet") and not args.stage and args.setup != "lvis":
        p.error(f"--init {args.init}: say of which stage, --stage 1 or --stage 2")
    if args.setup == "lvis" and args.stage == 1:
        p.error("--setup lvis: is stage II on boxes; stage I belongs to the other setups")
    if args.extra_as_fg and args.setup != "s1" and not args.eval and not args.predict:
        p.error("--extra-as-fg: belongs to --setup s1, where LVIS has classes outside the 997")
    if args.make_split and Path(args.make_split).exists():
        p.error(f"--make-split {args.make_split}: exists; its boxes are somebody's work: choose another file")
    if args.reinit_cls and args.cls_ratio == 0:
        p.error("--reinit-cls: with --cls-ratio 0 the new classifier would never learn, and be part of every score")
    if args.stage == 2 and args.init is None:
        p.error("--stage 2: needs --init, a checkpoint of stage I; or imagenet, or none")
    if args.stage == 1 and args.init not in (None, "imagenet", "none"):
        p.error(f"--init {args.init}: stage I starts from imagenet or none")
    if args.table and (args.data != "shapes" or args.stage or args.init):
        p.error("--table: belongs to --data shapes and runs both stages")
    if args.val_json and args.val_boxes:
        p.error("--val-json and --val-boxes: one of them")


def scales(text):
    return tuple(float(v) for v in text.split(","))


def fp32(x):
    """bf16 maps of autocast -> fp32, in which all scores and losses are computed; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ================================================================== model

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
    """Backbone up to C5 as four stages: (B, 3, H, W) -> [C2, C3, C4, C5], strides 4 to 32. Swin's maps get a LayerNorm each, as in Swin's detectors."""

    def __init__(self, name, drop_path=0.0):
        super().__init__()
        if name in SWIN:
            width, depths, heads, *_ = SWIN[name]
            parts = list(SwinTransformer([4, 4], width, list(depths), list(heads), [7, 7], stochastic_depth_prob=drop_path, num_classes=1).features)
            stages = [nn.Sequential(*parts[2 * i:2 * i + 2]) for i in range(4)]  # patches or merging, then blocks; (B, H, W, C)
            self.channels = [width * 2**i for i in range(4)]
            self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-5) for c in self.channels)
        else:
            net = NarrowResNet(int(name[4:])) if name.startswith("tiny") else torchvision.models.resnet50(weights=None)
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


def load_imagenet(body, name):
    """torchvision's ImageNet-1K classifier (V1) into a Body; downloaded once, hash checked."""
    if name.startswith("tiny"):
        raise UserError(f"--init imagenet: there are no ImageNet weights for {name}")
    full = "resnet50" if name == "r50" else name
    url = torchvision.models.get_model_weights(full).IMAGENET1K_V1.url
    state, ours = load_checkpoint(fetch(url, re.search(r"-([0-9a-f]{8})\.pth$", url)[1])), body.state_dict()
    for key, value in state.items():
        if name in SWIN:  # features.0 ... 7 -> stages.0 ... 3; its last norm is C5's
            key = re.sub(r"^features\.(\d)\.", lambda m: f"stages.{int(m[1]) // 2}.{int(m[1]) % 2}.", key)
            key = re.sub(r"^norm\.", "norms.3.", key)
        else:
            key = re.sub(r"^layer([234])\.", lambda m: f"stages.{int(m[1]) - 1}.", re.sub(r"^(conv1|bn1|layer1)\.", r"stages.0.\1.", key))
        if key in ours:
            ours[key] = value
        elif not key.startswith(("fc.", "head.")):
            raise UserError(f"{url}: has {key}, which {name} has not")
    body.load_state_dict(ours)


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
        self.arch, tiny = arch, arch["name"].startswith("tiny")
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
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
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


def normalise(batch, layout=torch.contiguous_format):
    """uint8 images -> mean 0, deviation 1; 0 in the padding."""
    x = batch["images"]
    mean, std = (constant(v, x.device, torch.float32).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows = torch.arange(x.shape[2], device=x.device) < batch["sizes"][:, :1]
    cols = torch.arange(x.shape[3], device=x.device) < batch["sizes"][:, 1:]
    return ((x / 255 - mean) / std * (rows[:, None, :, None] & cols[:, None, None, :])).contiguous(memory_format=layout)


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
    """One training step: forward(batches) -> {name: weighed loss}. Both kinds of images go through one forward, so each parameter has a gradient in
    every step of every process, and DDP never waits for one that took no part."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args, self.watch = model, args, {}
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format

    def autocast(self, x):
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.args.amp == "bf16")

    def forward(self, cls=None, det=None, mix=None):
        return self.classify(cls, mix) if self.model.arch["stage"] == 1 else self.detect(det, cls)

    def classify(self, batch, mix):
        """Stage I."""
        images, label = normalise(batch, self.layout), batch["labels"]
        if mix:
            images = mix_images(images, mix)
        logits = self.model.whole_image(images, batch["image_sizes"], self.args.stage1_level, self.args.amp == "bf16")
        if self.args.stage1_level == "all" and not self.model.arch["gap"]:
            label = label.repeat(4)
        self.watch = dict(top1=100 * (logits.argmax(1) == label).float().mean())
        other = label.view(-1, len(images)).roll(1, 1).flatten() if mix else None
        return dict(cls=mixed_cross_entropy(logits, label, other, mix[0] if mix else 1.0, 0.1 if self.args.augment == "strong" else 0.0))

    def detect(self, det, cls):
        """Stage II: detection and classification images, one pass where they have the same canvas."""
        model, args = self.model, self.args
        x = normalise(det, self.layout)
        joint = cls is not None and cls["images"].shape[-2:] == x.shape[-2:]
        with self.autocast(x):
            tops = model.top_down(torch.cat([x, normalise(cls, self.layout)]) if joint else x)
            first = model.smooth({k: m[:len(x)] for k, m in tops.items()})
            if cls is not None:
                rest = {k: m[len(x):] for k, m in tops.items()} if joint else model.top_down(normalise(cls, self.layout))
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
            self.watch = dict(top1=100 * (logits.argmax(1) == cls["labels"]).float().mean())
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
def detect(model, batch, device, args, vocabulary, best=False):
    """One collated image -> dict(boxes (n, 4) in original pixels, scores, labels: columns of the vocabulary, masks: list of RLE or None).

    best: also best (V,), each class's highest log score, and best_boxes (V, 4): its box. No NMS needed: NMS never removes a class's best box.
    """
    batch = to_device(batch, device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    images, (size,), (original,) = normalise(batch, layout), batch["image_sizes"], batch["original_sizes"]
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
    keep = class_nms(boxes, roi, label, score, args.nms_topk, args.max_dets or 100)
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


# ================================================================== data

def read_lines(path, flag):
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{flag} {path}: is no text file ({e})") from None


def wordnet_ids(path, synsets):
    """{synset: wnid} from WordNet 3.0's index.noun. "bass.n.03" is the third sense of the lemma bass; a line ends in the offsets of its senses, in order,
    and a wnid is n + offset. Offsets are those of version 3.0 only. Synsets that WordNet has not are left out."""
    strange = [s for s in synsets if not re.fullmatch(r".+\.[a-z]\.\d+", s.lower())]
    if strange:
        raise DataError(f"synset {strange[0]}: expected lemma.n.number, as bass.n.03")
    wanted, offsets = {s.lower().rsplit(".", 2)[0] for s in synsets}, {}
    try:
        for line in read_lines(path, "--wordnet"):
            if not line.startswith(" "):
                cells = line.split()
                if cells and cells[0] in wanted:
                    offsets[cells[0]] = cells[-int(cells[2]):]
    except (ValueError, IndexError) as e:
        raise DataError(f"--wordnet {path}: is not WordNet's index.noun ({e}); version 3.0 is at https://wordnet.princeton.edu "
                        "(Debian: apt install wordnet-base)") from None
    answer = {}
    for s in synsets:
        lemma, _, sense = s.lower().rsplit(".", 2)
        if int(sense) <= len(offsets.get(lemma, ())):
            answer[s] = f"n{offsets[lemma][int(sense) - 1]}"
    if not answer:
        raise DataError(f"--wordnet {path}: holds none of the synsets; it should be WordNet 3.0's dict/index.noun")
    return answer


def read_overlap(path):
    """{detection class name: wnid} of a json: that dict, or a list of dicts with name and wnid."""
    raw = read_json(path)
    try:
        answer = dict(raw) if isinstance(raw, dict) else {r["name"]: r["wnid"] for r in raw}
        if not all(isinstance(w, str) for w in answer.values()):
            raise TypeError
    except (TypeError, KeyError):
        raise DataError(f"--overlap {path}: expected a json object {{detection class: wnid}}") from None
    twice = [w for w, n in Counter(answer.values()).items() if n > 1]
    if twice:
        raise DataError(f"--overlap {path}: two detection classes are {twice[0]}; one class has one partner")
    return answer


def open_index(folder, classes=None):
    """ImageIndex; its cache is made by the first process, while the others wait."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank > 0:
        barrier()
    index = ImageIndex(folder, classes)
    if rank == 0:
        barrier()
    return index


def benchmark_images(args):
    """File names of a localisation set that lies in the training folder (setup s3: or is a copy from it): they take no part in training, Sec. 4.1."""
    path = args.val_json
    if not path or not Path(path).exists() or not args.val_images or args.setup != "s3" and Path(args.val_images).resolve() != Path(args.cls_dir).resolve():
        return []
    return [i["file_name"] for i in read_coco(path)["images"] if "category_id" in i]


def class_names(args, wnids):
    """Name of each wnid: --names, or classes.json in or beside --cls-dir, else the wnid itself."""
    known = {}
    if args.names:
        known = dict(line.split("\t")[:2] for line in read_lines(args.names, "--names") if "\t" in line)
        if not known:
            raise DataError(f"--names {args.names}: no line has a wnid, a tab and a name")
    else:
        for folder in (Path(args.cls_dir), Path(args.cls_dir).parent):
            if (folder / "classes.json").exists():
                try:
                    known = {c["wnid"]: c["name"] for c in read_json(folder / "classes.json")}
                except (TypeError, KeyError):
                    raise DataError(f"{folder / 'classes.json'}: expected a list of objects with wnid and name") from None
                break
    return [known.get(w, w) for w in wnids]


def objects365(raw, folder):
    """Objects365 v2's json as its files lie on the disk: patchN/name.jpg, without the few that do not exist, boxes that repeat exactly once only."""
    if not all("file_name" in i for i in raw["images"]):
        raise DataError("--det-json: images lack file_name; setup s3 reads Objects365 v2's json")
    names = {i["id"]: "/".join(i["file_name"].split("/")[-2:]) for i in raw["images"]}
    there = {p: set(x.name for x in (Path(folder) / p).iterdir()) if (Path(folder) / p).is_dir() else set() for p in {n.split("/")[0] for n in names.values()}}
    images = [i | dict(file_name=names[i["id"]]) for i in raw["images"] if names[i["id"]].split("/")[-1] in there[names[i["id"]].split("/")[0]]]
    lost = len(names) - len(images)
    if lost > max(10, len(names) // 1000):
        raise DataError(f"{folder}: {lost} of {len(names)} images are missing; Objects365 v2 is at https://www.objects365.org")
    kept, seen, annotations = {i["id"] for i in images}, set(), []
    for a in raw["annotations"]:
        key = (a["image_id"], a["category_id"], *a["bbox"])
        if a["image_id"] in kept and key not in seen:
            seen.add(key), annotations.append(a)
    count = Counter(c["name"].strip() for c in raw["categories"])
    categories = [c | dict(name=c["name"].strip() if count[c["name"].strip()] == 1 else f"{c['name'].strip()} {c['id']}") for c in raw["categories"]]
    return raw | dict(images=images, annotations=annotations, categories=categories)


def make_split(args):
    """--make-split, Sec. 4.1: 5 images of each class, 20 % of classes with fewer than 25, none of those with fewer than 5; COCO's format without boxes."""
    if not Path(args.make_split).parent.is_dir():
        raise UserError(f"--make-split {args.make_split}: its folder does not exist")
    index, generator = ImageIndex(args.cls_dir, read_class_list(args)), torch.Generator().manual_seed(args.seed)
    images, kept = [], []
    for k, wnid in enumerate(index.classes):
        first, count = int(index.first[k]), int(index.first[k + 1] - index.first[k])
        if count >= 5:
            kept.append(wnid)
            wanted = 5 if count >= 25 else count // 5
            for i in torch.randperm(count, generator=generator).tolist():
                try:
                    width, height = index.read(first + i).size
                except DataError:  # the next one then
                    continue
                images.append(dict(id=len(images) + 1, file_name=index.name(first + i), width=width, height=height, category_id=len(kept)))
                wanted -= 1
                if not wanted:
                    break
    Path(args.make_split).write_text(json.dumps(dict(images=images, annotations=[], categories=[dict(id=k + 1, name=n) for k, n in enumerate(kept)])))
    print(f"{len(images):,} images of {len(kept):,} classes, seed {args.seed} -> {args.make_split}; "
          "annotations (image_id, category_id, bbox) are still to be made")


def read_class_list(args):
    """The classes of --cls-list, or None."""
    return [line.split()[0] for line in read_lines(args.cls_list, "--cls-list") if line.strip()] if args.cls_list else None


def fill_paths(args):
    """Where the setup's files lie, for what was not given."""
    shapes = args.data == "shapes"
    args.setup = args.setup or ("own" if shapes or args.det_json else "s2")
    root = make_shapes(seed=args.data_seed, val=600, labelled=400) if shapes else Path(args.data)
    lvis, coco, box = root / "lvis", root / "coco", root / "objects365"
    paths = dict(
        s1=dict(det_json=lvis / "annotations/lvis_v1_train.json", det_images=coco, cls_dir=root / "imagenet21k",
                val_json=lvis / "annotations/lvis_v1_val.json", val_images=coco),
        s2=dict(det_json=coco / "annotations/instances_train2017.json", det_images=coco / "train2017",
                cls_dir=root / "imagenet/train", cls_val=root / "imagenet/val",
                val_images=root / "imagenet/val", val_boxes=root / "imagenet/val_boxes"),
        s3=dict(det_json=box / "annotations/zhiyuan_objv2_train.json", det_images=box / "train", cls_dir=root / "imagenet21k",
                val_json=root / "imagenet21k_benchmark.json", val_images=root / "imagenet21k"),
        own=dict(det_json=root / "annotations/instances_train2017.json", det_images=root / "train2017",
                 cls_dir=root / "imagenet/train", cls_val=root / "imagenet/val",
                 val_json=root / f"annotations/instances_val{'all' if shapes else ''}2017.json", val_images=root / f"val{'all' if shapes else ''}2017"))
    paths["lvis"] = {k: v for k, v in paths["s1"].items() if k != "cls_dir"}
    if args.cls_val not in (None, "none"):
        need(args.cls_val, "--cls-val", "a folder with a folder of images for each class")
    given = {flag for flag in ("det_json", "cls_dir") if getattr(args, flag)}  # somebody's own data: do not measure them on others'
    for name in ("val_json", "val_images") if "det_json" in given else ():
        paths["own"].pop(name)
    if "cls_dir" in given or not (root / "imagenet/val").is_dir():
        paths["s2"].pop("cls_val"), paths["own"].pop("cls_val")
    if args.val_json or args.val_boxes:
        paths[args.setup].pop("val_boxes", None), paths[args.setup].pop("val_json", None)
    for name, path in paths[args.setup].items():
        if getattr(args, name) is None:
            setattr(args, name, str(path))


def need(path, flag, where):
    if path is None or not Path(path).exists():
        raise DataError(f"{flag}{f' {path}' if path else ''}: is missing; {where} (--data shapes needs nothing)")


def wnids_of(args, categories):
    """{detection class name: wnid}: by --overlap, or in setup s1 by WordNet, from the synsets that LVIS's categories have; else {}."""
    names = {c["name"] for c in categories}
    if args.overlap:
        answer = read_overlap(args.overlap)
        strange = sorted(set(answer) - names)
        if strange:
            raise DataError(f"--overlap {args.overlap}: {strange[0]} is no class of {args.det_json}")
        return answer
    if args.setup != "s1":
        return {}
    need(args.wordnet, "--wordnet", "WordNet 3.0's dict/index.noun, https://wordnet.princeton.edu (Debian: apt install wordnet-base)")
    ids = wordnet_ids(args.wordnet, [c["synset"] for c in categories])
    return {c["name"]: ids[c["synset"]] for c in categories if c["synset"] in ids}


def labelled_images(args, partners):
    """ImageIndex of --cls-dir: all its classes, those of --cls-list, in setup s1 those that are LVIS's; without the benchmark's images."""
    wanted = read_class_list(args)
    if args.setup == "s3":
        need(args.val_json, "--val-json", "its images must not be trained on; the benchmark was never published, --make-split draws one")
    need(args.cls_dir, "--cls-dir", "a folder with a folder or .tar of images for each class, as ImageNet's train")
    if args.setup == "s1" and Path(args.cls_dir).is_dir():
        held = {e.name.removesuffix(".tar") for e in Path(args.cls_dir).iterdir()}
        wanted = sorted(set(partners) & held & set(wanted or held))
        if not wanted:
            raise DataError(f"--cls-dir {args.cls_dir}: holds none of the {len(partners)} wnids of LVIS; there is nothing to evaluate")
    index = open_index(args.cls_dir, wanted)
    index.drop(benchmark_images(args))
    if len(index.classes) < 2:
        raise DataError(f"--cls-dir {args.cls_dir}: holds one class, {index.classes[0]}; a classifier needs two")
    return index


def make_vocabulary(args, stage, pretrained=None):
    """(dict(det, cls, cls_names, pair), ImageIndex or None, content of the detection json or None): the two label spaces and what they share.

    pretrained: the arch of --init; boxes alone (--cls-ratio 0) keep its classes, and without it there are none.
    """
    index, raw, det, wnid_of, cls, names = None, None, [], {}, [], []
    if stage == 2 or args.setup == "s1":
        need(args.det_json, "--det-json", "boxes in COCO's or LVIS's format")
        raw = read_coco(args.det_json)
        if args.setup == "s3":
            raw = objects365(raw, args.det_images)
        categories = sorted(raw["categories"], key=lambda c: c["id"])
        det = [c["name"] for c in categories]
        twice = [n for n, count in Counter(det).items() if count > 1]
        if twice:
            raise DataError(f"{args.det_json}: two categories have the name {twice[0]}; give them different ones")
        if args.setup == "s1" and not all("synset" in c and "frequency" in c for c in categories):
            raise DataError(f"{args.det_json}: categories lack synset or frequency; setup s1 reads LVIS v1's json")
        wnid_of = wnids_of(args, categories)
    name_of = {w: n for n, w in wnid_of.items()}
    if args.setup != "lvis" and (stage == 1 or args.cls_ratio):
        index = labelled_images(args, name_of)
        cls, names = index.classes, class_names(args, index.classes)
    elif args.setup != "lvis" and pretrained and not pretrained["gap"]:  # of '-reform' no g^ is left, and a new one would stay noise
        cls, names = list(pretrained["cls"]), list(pretrained["cls_names"])
    if args.setup == "s1":
        names = [name_of.get(w, w) for w in cls]
        det = [c["name"] for c in categories if c["name"] in names and c["frequency"] != "r"]
        if not (dist.is_initialized() and dist.get_rank()):
            print(f"{len(cls)} of {len(wnid_of):,} LVIS classes have images: {len(det)} base, {len(cls) - len(det)} novel (of fall 2011's: 997, 720, 277)",
                  flush=True)
        if not det:
            raise DataError(f"--cls-dir {args.cls_dir}: none of its {len(cls)} classes of LVIS is common or frequent; there are no base classes")
    column = {n: k for k, n in enumerate(det)}
    lost = sorted(set(wnid_of.values()) - set(cls)) if args.overlap and cls else []
    if lost and not (dist.is_initialized() and dist.get_rank()):
        more = f" and {len(lost) - 1} more are" if len(lost) > 1 else " is"
        print(f"--overlap {args.overlap}: {lost[0]}{more} not among the {len(cls):,} classes with images", flush=True)
    if wnid_of:
        pair = [column.get(name_of.get(w), -1) for w in cls]
    elif args.setup == "own":
        free = {plain(n): k for n, k in column.items()}
        pair = [free.get(plain(n), -1) for n in names]
        free = {n: k for n, k in free.items() if k not in pair}
        pair = [p if p >= 0 else next((free.pop(w) for w in map(plain, n.split(",")) if w in free), -1) for p, n in zip(pair, names)]
    else:
        pair = [-1] * len(cls)  # the paper does not map them
    return dict(det=det, cls=cls, cls_names=names, pair=pair), index, raw


def val_data(args, arch):
    """dict(kind, data, truth) of what the detector is evaluated on; kind: coco, lvis, loc."""
    if args.val_boxes:
        need(args.val_images, "--val-images", "ImageNet's validation images")
        need(args.val_boxes, "--val-boxes", "ILSVRC's XML boxes of the validation images, https://image-net.org")
        truth = read_ilsvrc(args.val_images, args.val_boxes)
    else:
        need(args.val_json, "--val-json", "boxes to evaluate on" if args.setup != "s3" else
             "the benchmark was never published; --make-split draws one, in the format that the README describes")
        truth = read_coco(args.val_json)
    need(args.val_images, "--val-images", "images to evaluate on")
    if truth["images"] and "category_id" in truth["images"][0]:
        data = LocalisationImages(args.val_images, truth, args.image_size)
        known = set(arch["cls"])
        strange = [c["name"] for c in truth["categories"] if c["name"] not in known]
        if strange:
            raise DataError(f"{args.val_boxes or args.val_json}: class {strange[0]}{f' and {len(strange) - 1} more are' if len(strange) > 1 else ' is'} "
                            "not among the classification classes of the model")
        return dict(kind="loc", data=data, truth=truth)
    if not Vocabulary(arch, "cpu").of(truth):
        raise DataError(f"{args.val_json}: none of its classes is known to the model, by name")
    if arch["masks"] and args.masks and not all("segmentation" in a for a in truth["annotations"]):
        raise DataError(f"{args.val_json}: annotations lack segmentation; --no-masks evaluates boxes")
    lvis = bool(truth["images"]) and "neg_category_ids" in truth["images"][0]
    if lvis:
        try:
            import_lvis()
        except RuntimeError as e:
            raise UserError(str(e)) from None
    return dict(kind="lvis" if lvis else "coco", data=CocoDataset(args.val_images, args.val_json, False, raw=truth, canvas=args.image_size), truth=truth)


class ClassificationTransform:
    """Stage I's augmentation of a PIL image -> (3, S, S) uint8: random crop and flip; weak: colours; strong: RandAugment and random erasing.

    Swin's RandAugment is magnitude 9 of 10 with noise; torchvision counts to 30 and has no noise: 27.

    train False: short side S * 8/7, centre crop; plain: the whole image, its objects may stand at the border. The randomness of torchvision's transforms comes
    from the sample's own seed."""

    def __init__(self, size, augment, train, crop=0.08):
        self.size, self.erase = size, 0.25 if augment == "strong" and train else 0.0
        bicubic = T.InterpolationMode.BICUBIC if augment == "strong" else T.InterpolationMode.BILINEAR
        self.steps = (T.Compose([T.RandomResizedCrop(size, (crop, 1.0), interpolation=bicubic), T.RandomHorizontalFlip(), *(
            dict(plain=[], weak=[T.ColorJitter(0.4, 0.4, 0.4)], strong=[T.RandAugment(2, 27, interpolation=bicubic)])[augment]), T.PILToTensor()]) if train else
            T.Compose([*([T.Resize((size, size))] if augment == "plain" else [T.Resize(round(size * 8 / 7), interpolation=bicubic), T.CenterCrop(size)]),
                       T.PILToTensor()]))
        self.eraser = T.RandomErasing(1.0, value="random")

    def __call__(self, image, rng):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.getrandbits(62))
            image = self.steps(image)
            if rng.random() < self.erase:  # noise of the images' own mean and deviation
                mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
                image = ((self.eraser((image / 255 - mean) / std) * std + mean) * 255).round().clamp(0, 255).byte()
        return image, (self.size, self.size)


class DetectionTransform:
    """Stage II's weak augmentation of a classification image: large-scale jitter and flip, as for detection images."""

    def __init__(self, canvas, jitter):
        self.canvas, self.jitter = canvas, jitter

    def __call__(self, image, rng):
        return jitter_image(image, self.canvas, rng.uniform(*self.jitter), rng)


def endless(dataset, stream, collate_fn, args, device):
    """Iterator over the Stream's batches. The loader's generator is its own: it must not shift the model's random numbers."""
    loader = DataLoader(dataset, batch_sampler=stream, num_workers=args.workers, collate_fn=collate_fn, pin_memory=device.type == "cuda",
                        generator=torch.Generator())
    return iter(loader)


def to_device(batch, device):
    """The batch on the device, with what the host must know of it: number of objects and size of each image."""
    host = dict(image_sizes=[tuple(s) for s in batch["sizes"].tolist()])
    if "boxes" in batch:
        host["counts"] = (batch["labels"] >= 0).sum(1).tolist()
    if "hidden" in batch:
        host["hidden_counts"] = (batch["hidden"][..., 2] > batch["hidden"][..., 0]).sum(1).tolist()
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()} | host


# ================================================================== train

def fill_defaults(args, name):
    """Defaults that depend on the backbone and the setup."""
    tiny, swin = name.startswith("tiny"), name in SWIN
    if tiny:
        first = dict(stage1_epochs=15, stage1_batch=64, stage1_lr=1e-3, stage1_size=96, augment="plain", crop=0.5)
        second = dict(epochs=3, batch_size=4, lr=4e-3, image_size=256, jitter="0.7,1.6", cls_jitter="0.2,1.0", cls_weight=1.0)
    else:
        large = args.setup == "s3"  # Swin's recipe for ImageNet-21K is another: a quarter of the rate, a third of the epochs
        first = (dict(stage1_epochs=100 if large else 300, stage1_batch=128, stage1_lr=2.5e-4 if large else 1e-3, augment="strong") if swin else
                 dict(stage1_epochs=100, stage1_batch=32, stage1_lr=0.1, augment="weak")) | dict(stage1_size=224, crop=0.08)
        second = dict(epochs=dict(s3=12, lvis=24).get(args.setup, 36), batch_size=2, lr=1e-4 if args.setup == "lvis" else 3e-4, image_size=1024,
                      jitter="0.1,2.0", cls_weight=0.1)
    common = dict(masks=args.setup == "s1", rfs=0.001 if args.setup == "lvis" else 0.0, bn="sync" if args.init == "none" else "frozen", head="2fc")
    for flag, value in (first | second | common).items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.setup == "lvis":
        args.cls_ratio = 0
    args.cls_size = args.cls_size or (max(32, args.image_size // 64 * 32) if tiny else args.image_size)
    args.cls_jitter = args.cls_jitter or args.jitter


def read_model_file(path, flag):
    """(arch, state dict) of a checkpoint of this script."""
    if not Path(path).exists():
        raise UserError(f"{flag} {path}: no such file")
    content = load_checkpoint(path)
    if not isinstance(content, dict) or not isinstance(content.get("arch"), dict) or "pair" not in content["arch"]:
        raise UserError(f"{flag} {path}: is no checkpoint of this script")
    return content["arch"], content["model"]


def load_model(path, flag):
    arch, state = read_model_file(path, flag)
    model = Detector(arch)
    load_strict(model, state, f"{flag} {path}")
    return model.eval()


def load_init(model, args, rank):
    """Stage I (or an earlier detector) into a new one: all parts that both have; prints which. g^ goes by wnid, so a part of the classes may go on.

    A backbone that does not fit is an error: a detector that silently starts from noise is the commonest cause of bad numbers. g is new where its
    classes are others."""
    arch, state = read_model_file(args.init, "--init")
    ours, new, where, every = model.arch, model.state_dict(), f"--init {args.init}", set(state)
    for key in ("name",) if arch["gap"] else ("name", "head"):
        if arch[key] != ours[key]:
            raise UserError(f"{where}: has {'backbone' if key == 'name' else 'head'} {arch[key]}, this run {ours[key]}")
    if arch["gap"] or args.reinit_cls or not ours["cls"]:
        state = {k: v for k, v in state.items() if not k.startswith("cls.")}
    elif arch["cls"] and arch["cls"] != ours["cls"]:
        row = {w: k for k, w in enumerate(arch["cls"])}
        missing = [w for w in ours["cls"] if w not in row]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{where}: does not know class {missing[0]}{more} of --cls-dir; train stage I on them, "
                            "leave them out with --cls-list, or start the classifier anew with --reinit-cls")
        rows = torch.tensor([row[w] for w in ours["cls"]])
        state |= {k: v[rows] for k, v in state.items() if k.startswith("cls.")}
    if arch["det"] != ours["det"]:
        state = {k: v for k, v in state.items() if not k.startswith("det.")}
    loaded = {k: v for k, v in state.items() if k in new and v.shape == new[k].shape}
    if any(k.startswith(("body.", "fpn.", "head.")) for k in state if k not in loaded) or any(k.startswith("body.") for k in new if k not in loaded):
        raise UserError(f"{where}: its backbone, FPN or head does not fit; is it a file of this version?")
    model.load_state_dict(new | loaded)
    parts = lambda keys: ", ".join(sorted({k.split(".")[0] for k in keys})) or "nothing"
    if rank == 0:
        print(f"{where}: loaded {parts(loaded)} | new {parts(k for k in new if k not in loaded)} | left out {parts(every - set(loaded))}", flush=True)


def freeze_idle(model, args):
    """Stage I: what the whole-image RoI's level does not reach gets no gradient, and must not decay (or stop DDP): it does not learn."""
    used = set(range(4))
    if model.arch["gap"]:
        used = {3}
    elif args.stage1_level == "canonical":
        used = set(model.whole_levels([(args.stage1_size, args.stage1_size)]))
        for i in range(4):
            model.fpn.inner_blocks[i].requires_grad_(i >= min(used)), model.fpn.layer_blocks[i].requires_grad_(i in used)
    for i, norm in enumerate(model.body.norms or ()):
        norm.requires_grad_(i >= min(used))


def parameter_groups(model, decay):
    """Weights decay; norms, biases and Swin's position biases do not."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    free = lambda n, p: p.ndim < 2 or "relative_position_bias_table" in n
    return [dict(params=[p for n, p in named if not free(n, p)], weight_decay=decay), dict(params=[p for n, p in named if free(n, p)], weight_decay=0.0)]


def cosine(it, total, warmup, least=0.0):
    """Learning-rate factor of stage I: linear warm-up, then half a cosine to `least`."""
    return (it + 1) / warmup if it < warmup else least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (it - warmup) / max(1, total - warmup)))


def train(args, rank, world, device):
    """Stage I and II one after the other in OUT/stage1 and OUT/stage2, or the one that --stage or --init asks for. Metrics of the last, on rank 0."""
    if args.stage or args.init:
        return train_stage(args, args.stage or 2, rank, world, device)
    fill_paths(args)
    out, metrics = Path(args.out), None
    for flag in ("det_json", "det_images", "val_boxes" if args.val_boxes else "val_json", "val_images"):  # of stage II, before days of stage I
        need(getattr(args, flag), f"--{flag.replace('_', '-')}", "stage II needs it")
    if rank == 0 and not args.resume and (out / "stage2" / "log.jsonl").exists():
        raise UserError(f"--out {out}: holds a run already; choose another folder, --resume it, or delete it")
    if not args.resume:
        trial = argparse.Namespace(**vars(args))
        fill_defaults(trial, args.backbone or "r50")
        words = make_vocabulary(trial, 1 if args.setup == "s3" else 2)[0]  # Objects365's boxes take minutes to read
        val_data(trial, dict(words, masks=trial.masks))
    for stage in (1, 2):
        folder = out / f"stage{stage}"
        init = None if stage == 1 else str(out / "stage1" / "best.pt")
        run = argparse.Namespace(**{**vars(args), "stage": stage, "out": str(folder), "init": init, "table": False,
                                    "resume": args.resume and (folder / "last.pt").exists()})
        metrics = train_stage(run, stage, rank, world, device)
    return metrics


def train_stage(args, stage, rank, world, device):
    if rank == 0 and not args.resume and (Path(args.out) / "log.jsonl").exists():  # before anything is read
        raise UserError(f"--out {args.out}: holds a run already; choose another folder, --resume it, or delete it")
    if device.type == "cpu" and args.workers and "OMP_NUM_THREADS" not in os.environ:  # loaders need cores, too: without, a step takes half as long again
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - args.workers))
    args.stage = stage
    last = Path(args.out) / "last.pt"
    resumed = args.resume and last.exists()  # it replaces --init, whose file may be gone
    from_file = stage == 2 and args.init not in (None, "imagenet", "none")
    pretrained = read_model_file(last if resumed else args.init, "--init")[0] if from_file else None
    if pretrained:
        for flag, key in (("backbone", "name"), ("head", "head")):
            setattr(args, flag, getattr(args, flag) or (None if key == "head" and pretrained["gap"] else pretrained[key]))
    args.backbone = args.backbone or ("tiny16" if args.data == "shapes" else "r50")
    if args.backbone not in ("r50", *SWIN) and not re.fullmatch("tiny(8|16|24|32|48|64)", args.backbone):
        raise UserError(f"--backbone {args.backbone}: choose among r50, {', '.join(SWIN)}, tiny8 ... tiny64")
    fill_paths(args)
    fill_defaults(args, args.backbone)
    words, index, raw = make_vocabulary(args, stage, pretrained)
    if stage == 1:
        words |= dict(det=[], pair=[-1] * len(words["cls"]))
    arch = dict(words, name=args.backbone, kind=f"stage{stage}", stage=stage, head=args.head, gap=stage == 1 and args.stage1_head == "gap",
                masks=stage == 2 and args.masks, setup=args.setup, image_size=args.image_size, stage1_size=args.stage1_size, augment=args.augment,
                level=args.stage1_level)
    data = detection_data(args, arch, raw) if stage == 2 else None
    del raw  # of Objects365 it is gigabytes
    seed_all(args.seed)
    drop = args.drop_path if args.drop_path is not None else 0.0
    if args.drop_path is None and args.backbone in SWIN:
        drop = 0.2 if stage == 1 and args.setup == "s3" else SWIN[args.backbone][2 + stage]
    model = Detector(arch, drop)
    if args.init == "imagenet" and not resumed:
        load_imagenet(model.body, args.backbone)
    elif pretrained and not resumed:
        load_init(model, args, rank)
    if stage == 1:
        freeze_idle(model, args)
    else:
        if "cls" in dict(model.named_children()):
            model.cls.requires_grad_(args.cls_ratio > 0)
        if args.bn == "frozen" and args.init == "none" and args.backbone == "r50":
            raise UserError("--bn frozen: random weights cannot learn with the statistics of a BatchNorm that has seen nothing; --init none needs --bn sync")
        model.body.fixed_norms = args.bn == "frozen"
        for m in model.body.modules() if args.bn == "frozen" else ():
            if isinstance(m, nn.BatchNorm2d):
                m.requires_grad_(False)
        shared = sum(p >= 0 for p in arch["pair"])
        if args.setup == "own" and arch["cls"] and not shared and rank == 0:
            print("warning: no class is in both vocabularies, by name; Eq. 5 never applies. --overlap maps them", flush=True)
    if args.checkpoint and args.backbone == "r50" and not model.body.fixed_norms:
        raise UserError("--checkpoint: computes each stage twice, and a BatchNorm that learns would count each batch twice; it is for Swin, "
                        "and for --stage 2 with --bn frozen")
    model.body.recompute = args.checkpoint
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return fit(model.to(device), index, data, args, rank, world, device)


def detection_data(args, arch, raw):
    """CocoDataset of the classes arch["det"] under large-scale jitter. Images without a box of these are left out: LVIS's may be full of unlabelled ones."""
    names = {c["name"] for c in raw["categories"]}
    unused = names - set(arch["det"]) - set(arch["cls_names"])  # not the novel classes: they have no boxes in this paper
    data = CocoDataset(args.det_images, args.det_json, True, raw=raw, classes=arch["det"], canvas=args.image_size, jitter=scales(args.jitter),
                       masks=args.masks, hidden=unused if args.extra_as_fg else ())
    data.repeats = repeat_fractions(data, args.rfs) if args.rfs else None
    return data


def make_streams(model, index, data, args, rank, world):
    """(det, cls, steps of an epoch, text): Stream, dataset and canvas of either kind; det is None in stage I, cls without classification images."""
    det = cls = None
    if args.stage == 1:
        images = LabelledImages(index, ClassificationTransform(args.stage1_size, args.augment, True, args.crop))
        cls = Stream(len(index), args.stage1_batch, rank, world, args.seed), images, args.stage1_size
        return det, cls, -(-len(index) // (args.stage1_batch * world * args.accumulate)), f"{len(index):,} images, {len(index.classes):,} classes"
    det = Stream(len(data), args.batch_size, rank, world, args.seed, data.repeats), data, args.image_size
    text = f"{len(data):,} detection images, {len(data.classes):,} classes, dropped {data.dropped}"
    if args.cls_ratio:
        images = LabelledImages(index, DetectionTransform(args.cls_size, scales(args.cls_jitter)))
        cls = Stream(len(index), args.batch_size * args.cls_ratio, rank, world, args.seed + 1), images, args.cls_size
        text += f" | {len(index):,} classification images, {len(index.classes):,} classes, {sum(p >= 0 for p in model.arch['pair']):,} in both"
    each = float(data.repeats.sum()) if data.repeats is not None else len(data)
    return det, cls, math.ceil(each / (args.batch_size * world * args.accumulate)), text


def fit(model, index, data, args, rank, world, device):
    """The training loop of either stage."""
    stage, tiny = args.stage, args.backbone.startswith("tiny")
    det, cls, steps_per_epoch, text = make_streams(model, index, data, args, rank, world)
    val = val_data(args, model.arch) if stage == 2 else accuracy_data(args, model.arch)
    if index is not None and index.dropped:
        text += f" | {index.dropped:,} images of the benchmark left out"
    if index is not None and index.empty:
        text += f" | no image of {', '.join(index.empty[:5])}{' ...' if len(index.empty) > 5 else ''}: {len(index.empty)} classes left out"
    out = open_run(args, rank, args.resume)
    epochs, batch = (args.stage1_epochs, args.stage1_batch) if stage == 1 else (args.epochs, args.batch_size)
    total_batch, full = batch * world * args.accumulate, epochs * steps_per_epoch
    base = 16 if stage == 2 else 64 if tiny else 1024 if args.backbone in SWIN else 256
    lr = (args.stage1_lr if stage == 1 else args.lr) * total_batch / base
    sgd, decay = stage == 1 and args.backbone == "r50", args.weight_decay if stage == 2 else 1e-4 if args.backbone == "r50" else 0.05
    clip = 1.0 if stage == 2 else 0.0 if sgd else 5.0
    learner = wrapped = Learner(model, args).to(device).train()
    model.to(memory_format=learner.layout)
    if args.compile:
        model.body.compile()
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(learner, [device.index] if device.type == "cuda" else None)
    groups = parameter_groups(model, decay)
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9) if sgd else torch.optim.AdamW(groups, lr)
    total = min(full, args.max_iters or 10**12)
    if stage == 1:
        warmup = max(1, min(full // 10, steps_per_epoch * (20 if args.backbone in SWIN and args.setup != "s3" else 5)))
        schedule = lambda it: cosine(it, full, warmup, 0.01 if args.backbone in SWIN else 0.0)
    else:
        schedule = lambda it: warmup_multistep(it, steps_per_epoch, (epochs * 3 / 4, epochs * 11 / 12), max(2, min(1000, full // 10)))
    seed_all(args.seed + 1000 * rank)
    it, best, due = 0, -2.0, False
    if can_resume(out, args.resume, rank, device):
        state = load_checkpoint(out / "last.pt")
        if state["arch"]["cls"] != model.arch["cls"] or state["arch"]["det"] != model.arch["det"]:
            raise UserError(f"--resume {out}: was trained on other classes than the data have now")
        load_strict(model, state["model"], f"--resume {out / 'last.pt'}")
        if state["total_batch"] != total_batch:
            raise UserError(f"--resume {out}: was trained with a total batch of {state['total_batch']}, this command has {total_batch}")
        try:
            optimizer.load_state_dict(state["optimizer"])
        except ValueError:
            raise UserError(f"--resume {out}: other weights learn than before; --cls-ratio 0, --bn and --stage1-level must stay what they were") from None
        for group, value in zip(optimizer.param_groups, (decay, 0.0)):  # --resume --weight-decay is meant
            group["weight_decay"] = value
        it, best, due = state["it"], state["best"], state["due"]
        if rank < len(state["rng"]):
            set_rng_state(state["rng"][rank])
    if rank == 0:
        n = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False)]
        more = f", and {args.cls_ratio} x as many classification images" if cls and stage == 2 else ""
        print(f"stage {'I' * stage}, {args.backbone} from {args.init or 'none'}: {n[0]:,} parameters, {n[1]:,} trained | {text} | "
              f"batch {batch} x {world} x {args.accumulate} = {total_batch}{more} | lr {lr / total_batch * base:g} at {base} -> {lr:g} | "
              f"{epochs} epochs of {steps_per_epoch} steps, from {it}", flush=True)

    def save_last(due=False):  # due: the evaluation of this step is still to come
        rng = [rng_state()]
        if world > 1:
            rng = [None] * world
            dist.all_gather_object(rng, rng_state())
        if rank == 0:
            save_checkpoint(dict(weights_of(model), optimizer=optimizer.state_dict(), it=it, best=best, due=due, rng=rng, total_batch=total_batch,
                                 args=vars(args)), out / "last.pt")

    def validate():
        nonlocal best
        metrics = evaluate(model, val, rank, world, device, args, out if it >= total else None)
        learner.train()
        if rank == 0:
            numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
            log.write(dict(it=it, epoch=epoch + 1, **numbers), f"ep {epoch + 1:02d} eval {metrics['line']}")
            if val is None or metrics["score"] > best:  # without a validation set the last is the best
                best = metrics["score"]
                save_checkpoint(weights_of(model), out / "best.pt")
        log.restart_clock()
        return metrics

    log, broken = Log(out, rank, total, it, args.log_every), set()
    metrics, clock, epoch = None, time.time(), max(it - 1, 0) // steps_per_epoch
    every = epochs if args.data == "shapes" else max(1, epochs // 12)
    if it == 0:
        save_last()  # from here on --resume finds the run and its flags
    elif due or it >= total:  # killed before the evaluation was done, or --resume of a finished run
        metrics = validate()
        save_last()
    streams = []
    for kind, collate_fn in ((det, partial(collate, divisor=args.image_size)), (cls, partial(collate_labelled, canvas=cls[2]) if cls else None)):
        if kind:
            kind[0].start = it * args.accumulate
        streams.append(endless(kind[1], kind[0], collate_fn, args, device) if kind and it < total else None)
    while it < total:
        epoch, factor = it // steps_per_epoch, schedule(it)
        for g in optimizer.param_groups:
            g["lr"] = lr * factor
        waited, losses = 0.0, {}
        for micro in range(args.accumulate):
            since = time.time()
            batches = [to_device(next(s), device) if s is not None else None for s in streams]
            waited += time.time() - since
            if batches[1]:
                for text in set(batches[1]["bad"]) - broken:
                    broken.add(text), print(f"replaced by another image of its class: {text}", file=sys.stderr, flush=True)
            mix = draw_mix(args.stage1_size) if stage == 1 and args.augment == "strong" else None
            with wrapped.no_sync() if world > 1 and micro < args.accumulate - 1 else nullcontext():
                terms = wrapped(cls=batches[1], det=batches[0], mix=mix)
                (sum(terms.values()) / args.accumulate).backward()
            losses = {k: losses.get(k, 0) + v.detach() / args.accumulate for k, v in terms.items()}
        if clip:
            nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        it += 1
        log.step(it, epoch + 1, losses, lr * factor, waited, learner.watch)
        ends = it % steps_per_epoch == 0 or it >= total
        if ends:
            log.flush(it, epoch + 1, lr * factor)  # looks for NaN: never save what a NaN step left behind
        if it >= total or ends and (epoch + 1) % every == 0:
            save_last(due=True)  # before anything of the evaluation can fail
            metrics = validate()
            save_last()
        elif it % args.save_every == 0:
            log.flush(it, epoch + 1, lr * factor)
            save_last()
    log.bar.close()
    if rank == 0:
        plot_curves(out / "log.jsonl", out / "curves.png")
        if "classes" in metrics:
            print(class_table(metrics))
        print(f"{metrics['line']}\n{time.time() - clock:.0f}s | {out}" + (f" | {len(broken)} unreadable images" if broken else ""), flush=True)
    barrier()
    return metrics


def weights_of(model):
    """What a model is, as plain values and tensors."""
    return dict(arch=model.arch, model=model.state_dict())


# ================================================================== evaluate, predict

def accuracy_data(args, arch):
    """Stage I's validation: (index, dataset, label of each of its classes), or None without --cls-val."""
    if args.cls_val in (None, "none") or not Path(args.cls_val).is_dir():
        return None
    held = {e.name.removesuffix(".tar") for e in Path(args.cls_val).iterdir()}
    known = [w for w in arch["cls"] if w in held]
    if not known:  # ImageNet's archive is flat; its labels are in the XML
        if not (dist.is_initialized() and dist.get_rank()):
            print(f"--cls-val {args.cls_val}: holds no folder of a class of the model; no accuracy", flush=True)
        return None
    index, label_of = ImageIndex(args.cls_val, known), {w: k for k, w in enumerate(arch["cls"])}
    return index, LabelledImages(index, ClassificationTransform(arch["stage1_size"], arch["augment"], False)), [label_of[w] for w in index.classes]


@torch.no_grad()
def evaluate_accuracy(model, val, rank, world, device, args):
    """{top1, top5, images} of stage I in percent; every image once, on rank 0."""
    if val is None:
        return dict(score=0.0, line="no --cls-val: no accuracy")
    (index, data, labels), counts = val, torch.zeros(3, dtype=torch.float64)
    mine = list(range(rank, len(index), world))
    batches = [[(i, 0) for i in mine[k:k + 64]] for k in range(0, len(mine), 64)]
    loader = DataLoader(data, batch_sampler=batches, num_workers=args.workers, generator=torch.Generator(),
                        collate_fn=partial(collate_labelled, canvas=model.arch["stage1_size"]))
    label_of = torch.tensor(labels, device=device)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        for line in batch["bad"]:
            print(f"left out, another of its class in its place: {line}", file=sys.stderr)
        batch = to_device(batch, device)
        logits = model.whole_image(normalise(batch), batch["image_sizes"], "canonical" if model.arch["level"] == "canonical" else "all", args.amp == "bf16")
        if len(logits) > len(batch["labels"]):
            logits = logits.unflatten(0, (4, -1)).log_softmax(-1).mean(0)
        hit = logits.topk(min(5, logits.shape[1])).indices == label_of[batch["labels"]][:, None]
        counts += torch.stack([hit[:, :1].any(1).sum(), hit.any(1).sum(), torch.tensor(len(hit), device=device)]).double().cpu()
    parts = gather([counts])
    if parts is None:
        return None
    one, five, n = sum(parts).tolist()
    top1, top5 = 100 * one / n, 100 * five / n
    return dict(top1=top1, top5=top5, images=int(n), score=top1, line=f"{int(n)} images | accuracy top-1 {top1:.1f} top-5 {top5:.1f}")


def evaluate(model, val, rank, world, device, args, out=None):
    """Metrics of either stage as a dict with `score` (what best.pt goes by) and `line`, on rank 0; None elsewhere. out: also write the result files."""
    since = time.time()
    model.eval()
    if model.arch["stage"] == 1:
        metrics = evaluate_accuracy(model, val, rank, world, device, args)
    else:
        metrics = (evaluate_localisation if val["kind"] == "loc" else evaluate_boxes)(model, val, rank, world, device, args, out)
    if rank == 0:
        metrics["seconds"] = time.time() - since
        metrics["line"] += f" | {metrics['seconds']:.0f}s"
        if out:
            (out / "results.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def evaluate_boxes(model, val, rank, world, device, args, out):
    """AP of all, base (had boxes in training) and novel classes (image labels only) on a COCO or LVIS set."""
    data, truth, results = val["data"], val["truth"], []
    vocabulary, category = Vocabulary(model.arch, device), {plain(c["name"]): c for c in truth["categories"]}
    column = vocabulary.of(truth)
    chosen = sorted(column, key=column.get)
    vocabulary.choose([column[n] for n in chosen])
    ids, names = [category[n]["id"] for n in chosen], [category[n]["name"] for n in chosen]
    masks = model.arch["masks"] and args.masks
    args = argparse.Namespace(**vars(args) | dict(max_dets=args.max_dets or (300 if val["kind"] == "lvis" else 100)))
    for batch in tqdm(eval_loader(data, rank, world, args.workers, device.type == "cuda"), desc="eval", disable=rank != 0, leave=False, mininterval=1):
        found = detect(model, batch, device, args, vocabulary)
        rows = to_coco_results(batch["image_ids"][0], found["boxes"], found["scores"], found["labels"], ids)
        results += [r | dict(segmentation=m) for r, m in zip(rows, found["masks"])] if masks else rows
    results = gather(results)
    if rank != 0:
        return None
    metrics = dict(images=len(data), line=f"{len(data)} images" + (f", {len(ids)} of {len(category)} classes" if len(ids) < len(category) else ""))
    base, novel = ([n for n, b in zip(names, vocabulary.base) if b == side] for side in (True, False))
    for kind in ("bbox", "segm")[:1 + masks]:
        prefix = "mask_" * (kind == "segm")
        stats = lvis_evaluate(args.val_json, results, kind, ids) if val["kind"] == "lvis" else coco_evaluate(truth, results, kind)
        numbers = {k: stats[k] for k in ("APr", "APc", "APf") if k in stats}
        for name, group in (("AP", base + novel), ("base_AP", base), ("novel_AP", novel)):
            numbers.update({name: class_mean(stats, group, "AP"), f"{name}50": class_mean(stats, group, "AP50")})
        metrics.update({prefix + k: v for k, v in numbers.items()})
        metrics["line"] += f" | {'masks' if prefix else 'boxes'} " + " ".join(
            f"{k} {numbers[k]:.1f}" for k in ("AP", "AP50", "base_AP", "base_AP50", "novel_AP", "novel_AP50", "APr", "APc", "APf") if k in numbers)
        metrics["classes"] = {n: m for n, m in stats["classes"].items() if n in {*base, *novel}}
    metrics["score"] = metrics["mask_AP" if masks else "AP"]
    if out:
        (out / "detections.json").write_text(json.dumps(results))
        save_samples(data, results, out / "samples.jpg")
    return metrics


def evaluate_localisation(model, val, rank, world, device, args, out):
    """Setups 2 and 3: localisation accuracy (Sec. 4.3) and AP50 over all classes (Sec. 4.4) by g^ alone, or by Eq. 5 for classes that --overlap (own data: a
    name) maps. Per-class AP in results.json."""
    data, truth, rows, found = val["data"], val["truth"], [], []
    vocabulary, column = Vocabulary(model.arch, device, only_cls=True), {w: k for k, w in enumerate(model.arch["cls"])}
    for batch in tqdm(eval_loader(data, rank, world, args.workers, device.type == "cuda"), desc="eval", disable=rank != 0, leave=False, mininterval=1):
        i = batch["image_ids"][0]
        if len(data.boxes[data.info[i]["id"]]) == 0:
            continue  # the benchmark's image is not annotated
        d = detect(model, batch, device, args, vocabulary, best=True)
        rows.append(localise(d["best"], d["best_boxes"], d["labels"], d["boxes"], column[data.names[i]], batch["boxes"][0], batch["original_sizes"][0]))
        boxes = d["boxes"].cpu()
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], d["scores"].cpu()[:, None]], 1)
        found.append((data.info[i]["id"], xywh.numpy(), d["labels"].cpu().numpy()))
    rows, found = gather(rows), gather(found)
    if rank != 0:
        return None
    if not rows:
        raise UserError(f"{args.val_boxes or args.val_json}: no image has a box")
    metrics = {k: 100 * sum(r[k] for r in rows) / len(rows) for k in rows[0]} | dict(images=len(rows))
    id_of = {c["name"]: c["id"] for c in truth["categories"]}
    ids = np.array([id_of.get(w, -1) for w in model.arch["cls"]])  # classes without a validation image are nobody's false positives
    image = np.concatenate([np.full(len(x), i) for i, x, _ in found])
    box, label = np.concatenate([x for _, x, _ in found]), np.concatenate([k for *_, k in found])
    for name, federated in (("AP50", False), ("AP50_federated", True)):
        per_class = sparse_ap(truth, (image, ids[label], box[:, 4], box[:, :4]), federated)
        metrics[name] = sum(per_class.values()) / len(per_class)
        metrics[name + "_classes"] = {c["name"]: per_class[c["id"]] for c in truth["categories"] if c["id"] in per_class}
    metrics["score"] = metrics["top1"]
    metrics["line"] = f"{len(rows)} images | localisation " + " ".join(f"{k} {metrics[k]:.1f}" for k in rows[0])
    metrics["line"] += f" | AP50 {metrics['AP50']:.1f} federated {metrics['AP50_federated']:.1f}"
    if out:
        keep, names = box[:, 4] > 0.05, {i["id"]: i["file_name"] for i in data.info}  # 10 million boxes of score 1e-4 are of no use in a text file
        results = [dict(image_id=i, file_name=names[i], category_id=c, bbox=b[:4], score=b[4]) for i, c, b in
                   zip(image[keep].tolist(), ids[label[keep]].tolist(), box[keep].tolist())]
        (out / "detections.json").write_text(json.dumps(results))
        shown = [i for i in data.info if ".tar/" not in i["file_name"]][:6]
        classes, category_ids = ([c[k] for c in truth["categories"]] for k in ("name", "id"))
        page = argparse.Namespace(folder=data.folder, classes=classes, category_ids=category_ids, items=[
            (i["id"], i["file_name"], i["height"], i["width"], np.array(data.boxes[i["id"]], np.float32).reshape(-1, 4),
             np.full(len(data.boxes[i["id"]]), category_ids.index(i["category_id"]))) for i in shown])
        save_samples(page, [r for r in results if r["category_id"] >= 0], out / "samples.jpg")
    return metrics


def follow(args, model):
    """--eval and --predict see the images as training did."""
    arch = model.arch
    args.setup, args.image_size = args.setup or arch["setup"], args.image_size or arch["image_size"]
    args.masks = arch["masks"] and args.masks is not False
    fill_defaults(args, arch["name"])


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file; masks as RLE) and one picture per image into --out."""
    model = load_model(args.weights, "--weights").to(device)
    if model.arch["stage"] == 1:
        raise UserError(f"--weights {args.weights}: is a classifier of stage I, which finds no boxes; train stage II from it")
    follow(args, model)
    args.score_thresh = max(args.score_thresh, args.score)
    if args.names:
        model.arch["cls_names"] = class_names(args, model.arch["cls"])
    vocabulary = Vocabulary(model.arch, device)
    if args.classes:
        vocabulary.choose(vocabulary.find([c.strip() for c in args.classes.split(",") if c.strip()]))
    out, answer = Path(args.out), {}
    paths = [q for p in map(Path, args.predict) for q in (sorted(p.iterdir()) if p.is_dir() else [p])
             if q == p or q.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp")]
    if not paths:
        raise UserError(f"--predict {' '.join(args.predict)}: no image there")
    for number, path in enumerate(tqdm(paths, desc="predict")):
        try:
            original = torchvision.transforms.v2.functional.pil_to_tensor(read_image(path))
        except DataError as e:  # the others are still wanted
            print(f"left out: {e}", file=sys.stderr)
            continue
        image, size = jitter_image(original, args.image_size, 1.0, random.Random(0), 0.0)
        item = dict(image=image, size=size, boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0, original_size=tuple(original.shape[1:]))
        found = detect(model, collate([item], args.image_size), device, args, vocabulary)
        boxes, scores, labels = (found[k].cpu() for k in ("boxes", "scores", "labels"))
        masks = [dict(mask=m) for m in found["masks"]] if found["masks"] else [{}] * len(boxes)
        answer[str(path)] = [dict(box=[round(v, 1) for v in b], score=round(s, 4), label=vocabulary.names[k], **m)
                             for b, s, k, m in zip(boxes.tolist(), scores.tolist(), labels.tolist(), masks)]
        torchvision.io.write_jpeg(draw_boxes(original, boxes, labels, vocabulary.names, scores), str(out / f"{number:04d}_{path.stem}_boxes.jpg"), quality=90)
    if not answer:
        raise UserError(f"--predict {' '.join(args.predict)}: no image can be read")
    (out / "predictions.json").write_text(json.dumps(answer, indent=1))
    print(f"{sum(map(len, answer.values()))} boxes in {len(answer)} images -> {out}")


def shapes_table(args, rank, world, device):
    """Both stages, and stage II with boxes only, in one table. Six classes of the embedded dataset have no boxes in training, only image labels."""
    since, rows, out = time.time(), [], Path(args.out)
    for name, flags in (("stage I", dict(stage=1)), ("boxes only", dict(stage=2, cls_ratio=0)), ("simple21k", dict(stage=2))):
        folder = out / name.replace(" ", "_")
        run = argparse.Namespace(**{**vars(args), **flags, "out": str(folder), "table": False, "resume": args.resume and (folder / "last.pt").exists(),
                                    "init": None if name == "stage I" else str(out / "stage_I" / "best.pt")})
        rows.append((name, train_stage(run, run.stage, rank, world, device), time.time() - since))
        since = time.time()
    if rank == 0:
        print(f"\nshapes                base AP  AP50  novel AP  AP50  accuracy   seconds")
        for name, m, seconds in rows:
            boxes = "" if name == "stage I" else f"{m['base_AP']:8.1f} {m['base_AP50']:5.1f} {m['novel_AP']:9.1f} {m['novel_AP50']:5.1f}"
            cells = f"{boxes:30s}" + (f"{m['top1']:12.1f}" if name == "stage I" else " " * 12)
            print(f"{name:20s} {cells} {seconds:9.0f}")
        print("base: boxes in training; novel: image labels only. Eq. 5 mixes a third of g^ into base scores, also of one that was not trained on:\n"
              "compare the novel columns")


def main():
    try:
        args = parse_args()
        rank, world, device = init_ddp()
        if args.eval or args.predict:
            answer_folder(args.out)
        if args.make_split:
            fill_paths(args)
            make_split(args)
        elif args.eval:
            model = load_model(args.eval, "--eval")
            follow(args, model)
            fill_paths(args)
            val = val_data(args, model.arch) if model.arch["stage"] == 2 else accuracy_data(args, model.arch)
            metrics = evaluate(model.to(device), val, rank, world, device, args, Path(args.out))
            if rank == 0:
                print((class_table(metrics) + "\n" if "classes" in metrics else "") + metrics["line"])
        elif args.predict:
            if world > 1:
                raise UserError("--predict: runs in one process; start it with python")
            predict(args, device)
        elif args.table if args.table is not None else args.data == "shapes" and not (args.stage or args.init or args.max_iters):
            shapes_table(args, rank, world, device)
        else:
            train(args, rank, world, device)
    except (UserError, DataError, ShapesError) as e:
        line = str(e).strip().splitlines()[-1]  # a loader worker puts its traceback and the exception's name before it
        sys.exit("\nsimple21k.py: " + re.sub(r"^[\w.]+Error: ", "", line))
    leave_ddp()


if __name__ == "__main__":
    main()
