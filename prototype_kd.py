"""Distilling Object Detectors with Global Knowledge (Tang et al., ECCV 2022): prototypes as the common ground of teacher and student.

Idea. Two trained detectors see the same object in two feature spaces, which cannot be compared directly. So pick, for each class, K objects whose
features span BOTH spaces well: the prototypes (PGM, Eqs. 2-5, Alg. 1). An object is then described by its coordinates in the prototypes, K numbers
that mean the same in either space: global knowledge. The student is pulled to the teacher's coordinates (Eq. 6). Where teacher and student disagree
about an object's coordinates, what the teacher says of it may be noise: sigma, one minus the gap (Eq. 8), weighs that loss and the two usual ones, on
features (Eq. 7) and on class scores (RDM, Eq. 9). All of it once per FPN level; prototypes are picked anew every T epochs, as the student moves
(Alg. 2). Eq. 1 is the known problem for one space, which Eq. 2 replaces. The detectors are torchvision's own, called stage by stage; the student that
comes out has torchvision's parameters and their names (one that started from mmdetection's weights also has its anchors and pooling: load_detector).

The authors' code never evaluates Eq. 6 and adds what the paper does not say: --preset released follows its configuration, --preset paper (default) the
paper, as far as it says; what remains open, and what we chose, stands at PRESETS. Both detectors are trained already when distillation starts, so beside
every distilled student this script trains the same student for as long WITHOUT distillation and prints both (--control).

    python prototype_kd.py --data shapes                                  # teacher, student, continued student, distilled student on 2 cores
    torchrun --nproc_per_node 8 prototype_kd.py                           # COCO, Faster R-CNN R101 -> R50: paper 38.4 -> 40.6 AP
    torchrun --nproc_per_node 8 prototype_kd.py --teacher retina_r101 --out runs/retina      # RetinaNet R101 -> R50: paper 37.4 -> 39.8 AP
    torchrun --nproc_per_node 8 prototype_kd.py --teacher fasterrcnn_resnet50_fpn_v2 --init fasterrcnn_resnet50_fpn --out runs/tv   # torchvision's weights
    torchrun --nproc_per_node 8 prototype_kd.py --dataset voc --teacher none --student faster_r101 --out runs/voc_teacher                     # VOC: a teacher,
    torchrun --nproc_per_node 8 prototype_kd.py --dataset voc --teacher none --student faster_r50 --out runs/voc_student                      # a student,
    torchrun --nproc_per_node 8 prototype_kd.py --dataset voc --teacher runs/voc_teacher/best.pt --init runs/voc_student/best.pt --out runs/voc   # and both
    python prototype_kd.py --eval fasterrcnn_resnet50_fpn_v2              # metrics of any of these, or of runs/x/best.pt
    python prototype_kd.py --predict photo.jpg dir/ --weights runs/x/best.pt
Not run by us: COCO and VOC at full size. On shapes (three seeds, README): +1.1 AP over the student continued without distillation; class scores alone
+0.9, features alone +0.7, the global loss alone nothing; --preset released +1.4.
"""
import argparse
import json
import math
import re
import shutil
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image, deform_conv2d, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper
from tqdm import tqdm

from common.boxes import constant
from common.datasets import CocoDataset, DataError, collate, eval_loader, find_coco, parse_image_size, read_coco, read_image, read_voc, resize, train_loader
from common.evaluation import class_table, coco_evaluate, gather, to_coco_results, voc_evaluate
from common.run import (Help, Log, UserError, answer_folder, barrier, can_resume, draw_boxes, fetch, init_ddp, leave_ddp, load_checkpoint,
                        load_strict, open_run, plot_curves, reduce_mean, rng_state, save_checkpoint, save_samples, saved_flags, seed_all,
                        set_rng_state, warmup_multistep)
from common.shapes import ShapesError, make_shapes

STRIDES = dict(faster=(4, 8, 16, 32, 64), retina=(8, 16, 32, 64, 128))  # of the five FPN levels
# Where the paper and the authors' code differ; each is a flag of its own. Choices of ours, in both presets:
# - Projections (Eqs. 6, 8) are cosines, as in the code: with lambda = 10 in them, "exactly as in Eq. 5", the gap shrinks by 21 and Eq. 6 by 441 (--proj-lambda).
# - Eq. 7 is a mean over channels, cells and levels, not a sum over them; FGFI's threshold (IoU above half of a box's best) holds level by level.
# - Prototypes come from --proto-max-images images of a class. Features are unit vectors; a picked instance cannot be picked again.
# - RetinaNet's class scores are compared as independent probabilities (Bernoulli KL), as its focal loss sees them; levels are averaged.
# "released" keeps: mean features by 8 x 8 RoIAlign samples (code: whole cells), the largest sigma where boxes overlap (code: the last box's), fp64
# selection (code: half precision, in which prototypes come out other and repeated), torchvision's losses and proposals.
PRESETS = dict(
    paper=dict(alpha_global=1.0, alpha_feat=1.0, alpha_resp=5.0, sigma="l2", sigma_clamp=True, instances="gt", level_assign="all", kd_local="fgfi",
               bg_weight=0.0, feat_norm="cells", adapt="conv1x1relu", resp_tau=1.0, resp_norm="sum", kd_decay="none", density_filter=0.0,
               proto_min_size=0.0, photometric=True),
    released=dict(alpha_global=0.0, alpha_feat=1.0, alpha_resp=1.0, sigma="maxcos", sigma_clamp=False, instances="proposals", level_assign="fpn",
                  kd_local="defeat", bg_weight=4.0, feat_norm="sigma", adapt="conv3x3", resp_tau=2.0, resp_norm="mean", kd_decay="linear",
                  density_filter=0.4, proto_min_size=30.0, photometric=False))


# ================================================================== flags

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)

    def preset(name, text, **options):
        paper, released = (PRESETS[k][name.replace("-", "_")] for k in ("paper", "released"))
        p.add_argument(f"--{name}", help=f"{text} (paper {paper}, released {released})", **options)

    # data
    p.add_argument("--dataset", choices=("coco", "voc"), default="coco", help="layout of --data; voc: 07+12 trainval, 07 test")
    p.add_argument("--data", help="root, or 'shapes': the embedded dataset (default data/coco; voc: data, which holds VOCdevkit)")
    p.add_argument("--voc-train", default="2007_trainval,2012_trainval", help="lists of VOC to train on, year_list")
    p.add_argument("--voc-val", default="2007_test", help="and to evaluate on")
    p.add_argument("--data-seed", type=int, default=0, help="of the embedded dataset")
    p.add_argument("--train-images", type=int, help="train on the first so many images only, 0 for all (default 0; shapes 300, its teacher all)")
    p.add_argument("--image-size", help="short side: 800, a choice 640,800 or a range 480-800 (default 800; shapes 72-120; --eval, --predict: as trained)")
    preset("photometric", "training images with other brightness, contrast, saturation and hue; shapes: off", action=argparse.BooleanOptionalAction)
    p.add_argument("--workers", type=int, default=2, help="loader processes per training process")
    # models
    p.add_argument("--teacher", help=f"one of {', '.join(ZOO)}, an mmdetection .pth or our .pt; none: plain training "
                   "(default faster_r101; shapes: trained on demand)")
    p.add_argument("--init", help="what the student starts from: as --teacher; imagenet; none "
                   "(default: the r50 of the teacher's kind, trained on COCO; --teacher none, or voc: imagenet; shapes: trained on demand)")
    p.add_argument("--student", help="detector_backbone where it starts from imagenet or none: faster_r50, retina_r18, retina_tiny8 ... (default: the teacher's kind, else "
                   "faster, on r50; shapes on tiny8)")
    # the method
    p.add_argument("--preset", choices=tuple(PRESETS), help="what the flags below are where they are not given (default paper)")
    preset("alpha-global", "alpha_1 of Eq. 9", type=float)
    preset("alpha-feat", "alpha_2 of Eq. 9", type=float)
    preset("alpha-resp", "alpha_3 of Eq. 9", type=float)
    p.add_argument("--k", type=int, default=10, help="K: prototypes of a class and level")
    p.add_argument("--lam", type=float, default=10.0, help="lambda of Eq. 2, in the selection")
    p.add_argument("--refresh", type=float, help="T: epochs between two selections; 0.5 is twice an epoch (default 1; shapes 4, of 19 steps each)")
    p.add_argument("--proto-method", choices=("pgm", "kmeans", "dbscan", "ambiguous", "random"), default="pgm", help="how prototypes are picked, Table 6")
    p.add_argument("--proto-space", choices=("both", "student", "teacher"), default="both", help="whose features they are picked by, Table 6")
    p.add_argument("--proto-max-images", type=int, default=800, help="images drawn of each class for the selection")
    preset("proto-min-size", "prototypes only from objects wider and taller than this, pixels of the file", type=float)
    preset("density-filter", "share of a class, the least dense in features, that may not be prototype", type=float)
    p.add_argument("--proj", choices=("independent", "sequential", "joint"), default="independent", help="projection P of Eqs. 6, 8")
    p.add_argument("--proj-lambda", type=float, default=0.0, help="lambda in the projection; 0 and independent: cosines; 10, the paper's word, "
                   "shrinks Eq. 6 by 441")
    p.add_argument("--center", action="store_true", help="subtract each space's mean feature first (not in the paper; see README)")
    p.add_argument("--all-class-prototypes", action="store_true", help="Eq. 6 over the prototypes of all classes, not of the object's own")
    preset("sigma", "Eq. 8 by the l2 norm, by the largest cosine, or 1", choices=("l2", "maxcos", "none"))
    preset("sigma-clamp", "keep sigma within 0 and 1", action=argparse.BooleanOptionalAction)
    preset("instances", "objects: true boxes, or the student's positive proposals (anchors)", choices=("gt", "proposals"))
    preset("level-assign", "an object counts on all levels, or on the one of its size", choices=("all", "fpn"))
    p.add_argument("--kd-relation", choices=("global", "rkd"), default="global", help="Eq. 6, or RKD's relations among objects, Table 4")
    preset("kd-local", "cells of Eq. 7: fgfi where anchors fit an object best, defeat inside its box", choices=("fgfi", "defeat"))
    preset("bg-weight", "weight of the other cells in Eq. 7", type=float)
    preset("feat-norm", "Eq. 7 by the number of cells, or by the sum of sigma over them", choices=("cells", "sigma"))
    preset("adapt", "H of Eq. 7", choices=("conv1x1relu", "conv1x1", "conv3x3"))
    preset("resp-tau", "temperature of the class scores", type=float)
    preset("resp-norm", "KL as the sum over classes, or their mean", choices=("sum", "mean"))
    p.add_argument("--resp-rois", choices=("pos", "all"), default="pos", help="whose class scores: positive proposals (anchors), or all")
    preset("kd-decay", "linear: the global and feature losses fall epoch by epoch, to 0 after the last", choices=("none", "linear"))
    p.add_argument("--control", default="run", help="the same student continued without distillation: run it too, in OUT/control; the folder of such a run; or none")
    # schedule
    p.add_argument("--schedule", choices=("1x", "2x"), help="12 or 24 epochs (default 2x)")
    p.add_argument("--epochs", type=int, help="instead of --schedule (shapes 16); x0.1 at 2/3 and 11/12")
    p.add_argument("--max-iters", type=int, help="stop after this many steps; the schedule is not shortened")
    p.add_argument("--batch-size", type=int, help="images per process and step (default 2; shapes 16)")
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches per step, each of --batch-size")
    p.add_argument("--optimizer", choices=("sgd", "adamw"), help="(default sgd; shapes adamw)")
    p.add_argument("--lr", type=float, help="for a total batch of 16, scaled linearly (default 0.02, retina 0.01; shapes 0.002)")
    p.add_argument("--weight-decay", type=float, default=1e-4)
    # run
    p.add_argument("--out", help="run folder (default runs/prototype_kd, runs/prototype_kd-eval or runs/prototype_kd-predict)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--amp", choices=("none", "bf16"), default="none", help="autocast backbone and FPN; heads and losses stay fp32")
    p.add_argument("--compile", action="store_true", help="torch.compile backbones and FPNs")
    p.add_argument("--channels-last", action="store_true", help="NHWC memory format")
    p.add_argument("--log-every", type=int, default=50, help="steps between log lines (and NaN checks)")
    p.add_argument("--save-every", type=int, default=500, help="steps between writes of last.pt, beside one at each evaluation")
    p.add_argument("--resume", action="store_true", help="continue --out's last.pt, with its flags (the table of --data shapes: give them again)")
    p.add_argument("--table", action=argparse.BooleanOptionalAction, help="shapes: teacher, start, continued and distilled student in one table "
                   "(default where no --teacher, --init, --max-iters is given)")
    p.add_argument("--eval", metavar="WEIGHTS", help="metrics of what --teacher takes")
    p.add_argument("--predict", nargs="+", metavar="IMAGE", help="images or folders: boxes as json and pictures into --out")
    p.add_argument("--weights", help="for --predict: as for --eval")
    p.add_argument("--score", type=float, default=0.3, help="--predict: boxes above this score are kept")
    args = p.parse_args(argv)
    check_conflicts(p, args)
    args.out = args.out or "runs/prototype_kd" + ("-eval" if args.eval else "-predict" if args.predict else "")
    last, first = Path(args.out) / "last.pt", Path(args.out) / "args.json"
    if args.resume and (last.exists() or first.exists()):  # the flags of that run (it may have got no further than its control), then those given now
        saved = saved_flags(last) if last.exists() else json.loads(first.read_text())["args"]
        if "proto_method" not in saved:
            p.error(f"--resume {args.out}: holds a run of another script")
        if args.preset not in (None, saved["preset"]):
            p.error(f"--preset {args.preset}: the run in {args.out} has {saved['preset']}, and --resume keeps its flags; give the single flags that shall change")
        p.set_defaults(**saved | dict(resume=False))
        args = p.parse_args(argv)
    check_flags(p, args)
    return args


def check_flags(p, args):
    """Stops with the line of the first flag whose value makes no sense."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    for names, ok, text in (
            (("k", "epochs", "max_iters", "batch_size", "accumulate", "log_every", "save_every", "proto_max_images"), lambda v: v >= 1, "must be at least 1"),
            (("lr", "refresh", "resp_tau"), lambda v: 0 < v < math.inf, "must be positive"),
            (("workers", "lam", "proj_lambda", "alpha_global", "alpha_feat", "alpha_resp", "bg_weight", "proto_min_size", "weight_decay", "train_images"),
             lambda v: 0 <= v < math.inf, "must be 0 or more"),
            (("density_filter",), lambda v: 0 <= v < 1, "must be at least 0 and below 1")):
        for name in names:
            if name in given and not ok(given[name]):
                p.error(f"--{name.replace('_', '-')} {given[name]}: {text}")

    for name in ("voc_train", "voc_val"):
        if not re.fullmatch(r"\s*\d{4}_\w+\s*(,\s*\d{4}_\w+\s*)*", given[name]):
            p.error(f"--{name.replace('_', '-')} {given[name]}: expected year_list, as 2007_trainval,2012_trainval")


def check_conflicts(p, args):
    """Stops with a line where flags that were given contradict each other."""
    if args.eval and args.predict:
        p.error("--eval and --predict: one at a time")
    if args.predict and not args.weights:
        p.error("--predict needs --weights: a zoo name, an mmdetection .pth or our .pt")
    if args.weights and not args.predict:
        p.error("--weights: belongs to --predict; --eval takes its weights directly, --init is where a student starts")
    if args.proto_method in ("kmeans", "dbscan") and args.proto_space == "both":
        p.error(f"--proto-method {args.proto_method}: clusters one space; add --proto-space student or teacher")
    if args.proto_method in ("ambiguous", "random") and args.proto_space != "both":
        p.error(f"--proto-space {args.proto_space}: --proto-method {args.proto_method} looks at no features")
    if args.schedule and args.epochs:
        p.error("--schedule and --epochs: one of them")
    if args.kd_relation == "rkd" and args.all_class_prototypes:
        p.error("--all-class-prototypes: belongs to --kd-relation global")
    if args.all_class_prototypes and (args.proj != "independent" or args.proj_lambda):
        p.error("--all-class-prototypes: compares cosines; --proj and --proj-lambda must stay independent and 0")
    if args.student and args.init not in (None, "imagenet", "none"):
        p.error(f"--student {args.student}: --init {args.init} says already what the student is")
    if args.data == "shapes" and args.dataset == "voc":
        p.error("--dataset voc: --data shapes is read as COCO")
    if args.table and (args.data != "shapes" or args.teacher or args.init or args.control != "run"):
        p.error("--table: belongs to --data shapes and makes its own teacher, student and control")
    if args.proj == "joint" and not args.proj_lambda:
        p.error("--proj joint: needs --proj-lambda above 0; two prototypes may be almost alike")


def fp32(x):
    """bf16 maps of autocast -> fp32, in which all statistics and losses are computed; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ================================================================== PGM: prototypes, Eqs. 2-5, Alg. 1

def coefficients(p_t, p_s, n_t, n_s, lam):
    """Eq. 5 solved for both unknowns at once: the coefficients w_t, w_s of a prototype.

    p_t, p_s: inner products with the prototype, any shape; n_t, n_s: its squared norms, broadcast; lam: lambda of Eq. 2. The two lines of Eq. 5 are
    (n_t + lam) w_t - lam w_s = p_t and (n_s + lam) w_s - lam w_t = p_s; this is Cramer's rule.
    """
    det = n_t * n_s + lam * (n_t + n_s)
    return ((lam + n_s) * p_t + lam * p_s) / det, ((lam + n_t) * p_s + lam * p_t) / det


def select_prototypes(f_t, f_s, k, lam, candidates=None):
    """Alg. 1: the instances that span both spaces best, greedily. f_t (D_t, N), f_s (D_s, N): columns at one place are one instance.

    Returns min(k, candidates) distinct indices. candidates (N,) bool: those that may be picked; all N are to be reconstructed.

    With p_t[c, i] = <r_t[i], f_t[c]>, adopting candidate c lowers Eq. 4 by sum_i p_t w_t + p_s w_s, where w is Eq. 5. That is quadratic in p: three
    numbers a candidate tell it, a_t = sum_i p_t^2, a_s = sum_i p_s^2, a_ts = sum_i p_t p_s. They start as quadratic forms of D x D covariances, and a
    pick changes every residual by a multiple of the prototype, so they follow by O(N D) updates: no residuals for each candidate, no N x N matrix.
    fp64, for the updates subtract; in half precision, as released, good candidates tie and the first one wins.
    """
    f_t, f_s = f_t.double(), f_s.double()
    n_t, n_s = f_t.square().sum(0), f_s.square().sum(0)
    r_t, r_s = f_t, f_s                                                                                        # Eq. 3, n = 0
    a_t, a_s, a_ts = ((a @ b.T @ d * c).sum(0) for a, b, c, d in ((f_t, f_t, f_t, f_t), (f_s, f_s, f_s, f_s), (f_t, f_s, f_t, f_s)))
    det = n_t * n_s + lam * (n_t + n_s)
    free = (det > 0) if candidates is None else candidates & (det > 0)
    picks = []
    for _ in range(min(k, int(free.sum()))):
        gain = ((lam + n_s) * a_t + 2 * lam * a_ts + (lam + n_t) * a_s) / det                                  # L_n - L_(n+1)^c, Eq. 4
        best = int(gain.masked_fill(~free, -math.inf).argmax())                                                # the first of equals
        picks.append(best)
        free[best] = False
        g_t, g_s = f_t[:, best], f_s[:, best]
        w_t, w_s = coefficients(g_t @ r_t, g_s @ r_s, n_t[best], n_s[best], lam)                               # (N,)
        s_t, s_s = g_t @ f_t, g_s @ f_s                                                                        # p[c, i] falls by s[c] w[i]
        a_ts = a_ts - s_t * (r_s @ w_t @ f_s) - s_s * (r_t @ w_s @ f_t) + s_t * s_s * (w_t @ w_s)
        a_t = a_t - 2 * s_t * (r_t @ w_t @ f_t) + s_t.square() * (w_t @ w_t)
        a_s = a_s - 2 * s_s * (r_s @ w_s @ f_s) + s_s.square() * (w_s @ w_s)
        r_t, r_s = r_t - torch.outer(g_t, w_t), r_s - torch.outer(g_s, w_s)                                    # Eq. 3
    return torch.tensor(picks, dtype=torch.long, device=f_t.device)


def dense(f, share):
    """(N,) bool: columns whose density, sum of exp(-((1 - cos) / 0.1)^2) over all, lies above the `share` quantile (released code only). f: unit (D, N)."""
    rho = torch.cat([torch.exp(-((1 - part.T @ f) / 0.1).square()).sum(1) for part in f.split(1024, 1)])
    return rho > rho.quantile(share) if f.shape[1] > 2 else torch.ones_like(rho, dtype=torch.bool)


def cluster_medoids(f, k, method, seed):
    """k distinct columns of f (D, N) nearest to the centres of k clusters (Table 6): k-means, or DBSCAN on cosine distance, largest clusters first."""
    from sklearn.cluster import DBSCAN, KMeans  # needed here only
    x = f.T.double().cpu().numpy()
    if method == "kmeans":
        label = KMeans(k, n_init=1, random_state=seed).fit(x).labels_
    else:
        label = DBSCAN(eps=0.1, min_samples=3, metric="cosine").fit(x).labels_
    label = torch.from_numpy(label).long().to(f.device)
    groups = sorted((g for g in label.unique().tolist() if g >= 0), key=lambda g: (-int((label == g).sum()), g))
    picks = []
    for g in groups[:k]:
        members = (label == g).nonzero()[:, 0]
        mean = f[:, members].mean(1, keepdim=True)
        picks.append(int(members[(f[:, members] - mean).square().sum(0).argmin()]))
    rest = [i for i in (f.T @ f.mean(1)).argsort(descending=True, stable=True).tolist() if i not in picks]  # fewer clusters than k: the most central others
    return torch.tensor((picks + rest)[:k], dtype=torch.long, device=f.device)


# ================================================================== RDM: projections, sigma and distances, Eqs. 6-8

def project(f_t, f_s, g_t, g_s, valid, how="independent", lam=0.0):
    """Coordinates of instances in the prototypes: Lambda_t, Lambda_s (..., K).

    f (..., D), g (..., K, D): unit vectors; valid (..., K) bool, 0 where a prototype is missing. "joint": the minimiser of Eq. 2 for given prototypes.
    "sequential": Eq. 5 prototype by prototype, each on the residual that the earlier ones leave, as Alg. 1 fills it: one block Gauss-Seidel sweep.
    "independent": each prototype alone; with lam 0 these are cosines.
    """
    b_t, b_s = ((g @ f[..., None])[..., 0] * valid for f, g in ((f_t, g_t), (f_s, g_s)))
    n_t, n_s = (g.square().sum(-1).where(valid, torch.ones((), dtype=g.dtype, device=g.device)) for g in (g_t, g_s))
    if how == "independent":
        w_t, w_s = coefficients(b_t, b_s, n_t, n_s, lam)                                                       # Eq. 5
        return w_t * valid, w_s * valid
    k, both = valid.shape[-1], valid[..., :, None] & valid[..., None, :]
    eye = torch.eye(k, dtype=b_t.dtype, device=b_t.device)
    blocks = torch.zeros(*b_t.shape, 2, k, 2, dtype=b_t.dtype, device=b_t.device)                                # (..., K, 2, K, 2): unknowns in pairs
    for i, (g, n) in enumerate(((g_t, n_t), (g_s, n_s))):
        gram = (g @ g.transpose(-1, -2)) * both
        blocks[..., i, :, i] = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)) + eye * (n[..., None] + lam)
        blocks[..., i, :, 1 - i] = -lam * eye
    if how == "sequential":
        order = torch.arange(k, device=b_t.device)
        blocks = blocks * (order[:, None, None, None] >= order[None, None, :, None])
    q, beta = blocks.flatten(-2).flatten(-3, -2), torch.stack([b_t, b_s], -1).flatten(-2)
    q = q + 10 * torch.finfo(q.dtype).eps * torch.eye(2 * k, dtype=q.dtype, device=q.device)  # two prototypes may be alike in both spaces
    z = torch.linalg.solve_ex(q, beta)[0].unflatten(-1, (k, 2))
    return z[..., 0] * valid, z[..., 1] * valid


def reliability(l_t, l_s, valid, how="l2", clamp=True):
    """Eq. 8: sigma (...,) of instances from their coordinates (..., K); a constant. maxcos: the released code's, from cosines. No prototype: 1."""
    l_t, l_s = l_t.detach(), l_s.detach()
    if how == "none":
        return torch.ones_like(l_t[..., 0])
    if how == "maxcos":
        gap = (l_s.masked_fill(~valid, -2).amax(-1) - l_t.masked_fill(~valid, -2).amax(-1)).abs()
    else:
        gap = ((l_s - l_t).square() * valid).sum(-1).sqrt()
    sigma = 1 - gap                                                                                            # Eq. 8
    return sigma.clamp(0, 1) if clamp else sigma


def global_gap(l_t, l_s, valid):
    """Mean over its prototypes of an instance's squared gaps of coordinates (..., K) -> (...,): the norm of Eq. 6 over K."""
    return ((l_s - l_t).square() * valid).sum(-1) / valid.sum(-1).clamp(min=1)


def kl_softmax(z_t, z_s, tau):
    """Response distillation (n,): tau^2 KL(teacher || student) of softmax logits (n, C)."""
    log_t, log_s = (F.log_softmax(z / tau, -1) for z in (z_t.detach(), z_s))
    return (log_t.exp() * (log_t - log_s)).sum(-1) * tau**2


def kl_bernoulli(z_t, z_s, tau):
    """The same for independent classes, (n,): sum over classes of the KL of each sigmoid."""
    z_t, z_s = z_t.detach() / tau, z_s / tau
    p = z_t.sigmoid()
    return (p * (F.logsigmoid(z_t) - F.logsigmoid(z_s)) + (1 - p) * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))).sum(-1) * tau**2


def rkd_loss(f_t, f_s):
    """RKD (Park et al. 2019), distances and angles of all instances (n, D): a baseline of Table 4. Scalar; 0 for fewer than 2 (3 for angles)."""

    def distances(f):
        d = (f[:, None] - f[None]).square().sum(-1).clamp(min=1e-12).sqrt()
        off = ~torch.eye(len(f), dtype=torch.bool, device=f.device)
        return d[off] / d[off].mean().clamp(min=1e-6)

    def angles(f):
        e = F.normalize(f[None] - f[:, None], dim=-1)                                                          # (n, n, D) from i to j
        return (e @ e.transpose(1, 2)).flatten()

    loss = f_s.sum() * 0
    if len(f_s) > 1:
        loss = loss + F.smooth_l1_loss(distances(f_s), distances(f_t.detach()))
    if len(f_s) > 2:
        loss = loss + 2 * F.smooth_l1_loss(angles(f_s), angles(f_t.detach()))
    return loss


# ================================================================== detectors: torchvision's modules

BACKBONES = dict(r18="resnet18", r34="resnet34", r50="resnet50", r101="resnet101", r152="resnet152", x50="resnext50_32x4d", x101="resnext101_32x8d")
MMDET_URL = "https://download.openmmlab.com/mmdetection/v2.0/"
ZOO = dict(  # COCO box AP
    faster_r101="faster_rcnn/faster_rcnn_r101_fpn_2x_coco/faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth",   # 39.8
    faster_r50="faster_rcnn/faster_rcnn_r50_fpn_2x_coco/faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth",      # 38.4
    retina_r101="retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth",                               # 38.9
    retina_r50="retinanet/retinanet_r50_fpn_2x_coco/retinanet_r50_fpn_2x_coco_20200131-fdb43119.pth",                                  # 37.4
    cascade_x101="dcn/cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco/cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth",  # 47.3
    fasterrcnn_resnet50_fpn=None, fasterrcnn_resnet50_fpn_v2=None, maskrcnn_resnet50_fpn_v2=None,  # torchvision's: 37.0, 46.7, 47.4
    retinanet_resnet50_fpn=None, retinanet_resnet50_fpn_v2=None)                                   # 36.4, 41.5


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


def make_body(name, init):
    """A torchvision ResNet. init "imagenet": its weights, its BatchNorm frozen; "frozen": BatchNorm frozen, weights to come; "none"."""
    if name.startswith("tiny"):
        if init == "imagenet":
            raise UserError(f"backbone {name}: has no ImageNet weights; use --init none")
        return NarrowResNet(int(name[4:]))
    norm = nn.BatchNorm2d if init == "none" else FrozenBatchNorm2d
    if name.startswith("x101_32x4d"):  # mmdetection's; _dcn: deformable from the second stage on
        net = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, norm_layer=norm)
        for stage in (net.layer2, net.layer3, net.layer4) if name.endswith("_dcn") else ():
            for block in stage:
                block.conv2 = DeformConv(block.conv2)
        return net
    net = getattr(torchvision.models, BACKBONES[name])(norm_layer=norm)
    if init == "imagenet":
        url = torchvision.models.get_model_weights(BACKBONES[name]).IMAGENET1K_V1.url
        state = load_checkpoint(fetch(url, re.search(r"-([0-9a-f]{8})\.pth$", url)[1]))
        load_strict(net, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, url)
    return net


def build(name, outputs, init="none", mmdet=False):
    """torchvision's own FasterRCNN or RetinaNet: faster_r50, retina_tiny16, cascade_x101_32x4d_dcn, fasterrcnn_resnet50_fpn_v2, ...

    outputs: class scores of the head; Faster R-CNN's first is the background. mmdet: what weights of mmdetection expect (exact anchors, RoIAlign's
    newer grid, no ReLU before P7); parameters and their names stay torchvision's.
    """
    if name in ZOO and ZOO[name] is None:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=outputs)
        for m in model.backbone.body.modules() if not name.endswith("_v2") else ():
            if isinstance(m, nn.BatchNorm2d):
                m.eps = 0.0  # version 1 was trained so
        if name.startswith("maskrcnn"):
            model.roi_heads.mask_roi_pool = None  # has_mask() is false then; the weights stay
        return with_scales(model)
    kind, _, body = name.partition("_")
    if kind not in ("faster", "retina", "cascade") or not (body in BACKBONES or re.fullmatch("tiny(8|16|24|32|48|64)", body) or
                                                             mmdet and body in ("x101_32x4d", "x101_32x4d_dcn")):
        raise UserError(f"--student {name}: expected faster_ or retina_ and one of {', '.join(BACKBONES)}, tiny8 ... tiny64")
    tiny, retina = body.startswith("tiny"), kind == "retina"
    dim, net, layers = 64 if tiny else 256, make_body(body, init), [2, 3, 4] if retina else [1, 2, 3, 4]
    width = net.inplanes // 8  # of the first stage
    channels = [width * 2 ** (k - 1) for k in layers]
    extra = LastLevelMaxPool() if not retina else (PlainP6P7 if mmdet else LastLevelP6P7)(channels[-1], dim)
    backbone = BackboneWithFPN(net, {f"layer{k}": str(i) for i, k in enumerate(layers)}, channels, dim, extra)
    scale = 4 if tiny else 1  # the embedded dataset's images are of 100 pixels
    sides = [s // scale * 2 ** (k / 3) for s in (32, 64, 128, 256, 512) for k in range(3 if retina else 1)]
    sides = [tuple(sides[i:i + 3] if retina else sides[i:i + 1]) for i in range(0, len(sides), 3 if retina else 1)]
    anchors = (ExactAnchors(sides, STRIDES["retina" if retina else "faster"]) if mmdet else
               AnchorGenerator([tuple(int(s) for s in level) for level in sides], ((0.5, 1.0, 2.0),) * 5))
    if retina:  # tiny: GroupNorm in the head, as in torchvision's version 2; without it the head does not learn from random weights
        head = RetinaNetHead(dim, 9, outputs, norm_layer=lambda c: nn.GroupNorm(8, c)) if tiny else None
        return RetinaNet(backbone, outputs, anchor_generator=anchors, head=head, detections_per_img=100)
    small = dict(rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=100,
                 rpn_batch_size_per_image=64, box_batch_size_per_image=32) if tiny else {}
    hidden = 256 if tiny else 1024
    model = FasterRCNN(backbone, rpn_anchor_generator=anchors, box_head=TwoMLPHead(dim * 49, hidden), box_predictor=FastRCNNPredictor(hidden, outputs), **small)
    if kind == "cascade":
        model.roi_heads = CascadeHeads(dim, outputs)
    elif mmdet:
        model.roi_heads.box_roi_pool = AlignedPool()
    return with_scales(model)


def with_scales(model):
    """torchvision's RoI pooling guesses the maps' scales from the first image it sees, and wrongly where padding adds half of a side: tell it."""
    pool = getattr(getattr(model, "roi_heads", None), "box_roi_pool", None)
    if isinstance(pool, MultiScaleRoIAlign):
        pool.scales, pool.map_levels = [1 / s for s in STRIDES["faster"][:4]], initLevelMapper(2, 5, pool.canonical_scale, pool.canonical_level)
    return model


def kind_of(model):
    return "retina" if isinstance(model, RetinaNet) else "faster"


def images_of(batch, layout=torch.contiguous_format):
    """torchvision's ImageList of a collated batch: what its own transform makes of the same pixels, to the last bit."""
    x = batch["images"]
    mean, std = (constant(v, x.device, torch.float32).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows = torch.arange(x.shape[2], device=x.device) < batch["sizes"][:, :1]
    cols = torch.arange(x.shape[3], device=x.device) < batch["sizes"][:, 1:]
    return ImageList(((x / 255 - mean) / std * (rows[:, None, :, None] & cols[:, None, None, :])).contiguous(memory_format=layout), batch["image_sizes"])


def two_stage(model, images, maps, targets):
    """Faster R-CNN's training step in torchvision's own calls and order -> (losses, sampled boxes, their classes and objects, class logits)."""
    proposals, losses = model.rpn(images, maps, targets)
    heads = model.roi_heads
    boxes, objects, labels, offsets = heads.select_training_samples(proposals, targets)
    logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, images.image_sizes)))
    cls, box = fastrcnn_loss(logits, deltas, labels, offsets)
    return dict(cls=cls, box=box, rpn_cls=losses["loss_objectness"], rpn_box=losses["loss_rpn_box_reg"]), boxes, labels, objects, logits


def box_logits(model, maps, boxes, image_sizes):
    """Class logits of given boxes: the teacher's answer to the student's proposals."""
    heads = model.roi_heads
    if isinstance(heads, CascadeHeads):
        return heads.logits(maps, boxes, image_sizes)
    return heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, image_sizes)))[0]


def one_stage(model, images, maps, targets):
    """RetinaNet's training step -> (losses, anchors, object of each anchor or < 0, class logits (B, A, C))."""
    maps = list(maps.values())
    out, anchors = model.head(maps), model.anchor_generator(images, maps)
    found = [model.proposal_matcher(box_iou(t["boxes"], a)) if len(t["boxes"]) else torch.full((len(a),), -1, device=a.device) for t, a in zip(targets, anchors)]
    losses = model.head.compute_loss(targets, out, anchors, found)
    return dict(cls=losses["classification"], box=losses["bbox_regression"]), anchors, found, out["cls_logits"]


def detect(model, images, maps):
    """Detections in eval mode: [{"boxes" in pixels of the batch, "scores", "labels" as the head counts them}]."""
    if kind_of(model) == "faster":
        return model.roi_heads(maps, model.rpn(images, maps)[0], images.image_sizes)[0]
    levels = list(maps.values())
    out, anchors = model.head(levels), model.anchor_generator(images, levels)
    sizes = [m.shape[2] * m.shape[3] * model.anchor_generator.num_anchors_per_location()[0] for m in levels]
    return model.postprocess_detections({k: list(v.split(sizes, 1)) for k, v in out.items()}, [list(a.split(sizes)) for a in anchors], images.image_sizes)


# ================================================================== detectors of others


class AlignedPool(nn.Module):
    """mmdetection's RoI pooling: RoIAlign aligned, as many samples as a bin has cells, on levels 0 to 3. Takes MultiScaleRoIAlign's place."""

    def forward(self, maps, boxes, image_sizes):
        rois = torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)])
        level = level_of(rois[:, 1:], "faster").clamp(max=3)
        out = rois.new_zeros(len(rois), maps["0"].shape[1], 7, 7)
        for k in range(4):
            here = (level == k).nonzero()[:, 0]
            out = out.index_put((here,), roi_align(maps[str(k)], rois[here], 7, 1 / 2 ** (k + 2), sampling_ratio=0, aligned=True))
        return out


class ExactAnchors(AnchorGenerator):
    """mmdetection's anchors: not rounded to whole pixels, and a cell of level l is STRIDES[l] pixels wide; torchvision's is the image over the map,
    61 pixels instead of 64 where an image of 800 has a map of 13. sides: of each level; ratios 0.5, 1, 2."""

    def __init__(self, sides, strides):
        super().__init__(sides, ((0.5, 1.0, 2.0),) * len(sides))
        self.strides = strides
        h = torch.tensor(self.aspect_ratios[0]).sqrt()[:, None]
        halves = [((torch.tensor(level) / h).flatten() / 2, (torch.tensor(level) * h).flatten() / 2) for level in sides]
        self.cell_anchors = [torch.stack([-w, -t, w, t], 1) for w, t in halves]

    def forward(self, images, maps):
        self.set_cell_anchors(maps[0].dtype, maps[0].device)
        steps = [[constant(s, maps[0].device, torch.int64)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors([m.shape[-2:] for m in maps], steps))
        return [anchors] * len(images.image_sizes)


class PlainP6P7(LastLevelP6P7):
    """P7 from P6 without the ReLU, as in mmdetection's RetinaNet."""

    def forward(self, p, c, names):
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return p + [p6, self.p7(p6)], names + ["p6", "p7"]


class DeformConv(nn.Conv2d):
    """Deformable 3 x 3 convolution (Dai et al. 2017): a plain convolution says where each of the nine taps reads."""

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, 3, conv.stride, 1, groups=conv.groups, bias=False)
        self.conv_offset = nn.Conv2d(conv.in_channels, 18, 3, conv.stride, 1)

    def forward(self, x):
        offset = fp32(self.conv_offset(x))
        with torch.autocast(x.device.type, enabled=False):  # it has no bf16 kernel on the CPU
            return deform_conv2d(fp32(x), offset, self.weight, None, self.stride, self.padding)


class CascadeHeads(nn.Module):
    """Three box heads (Cai and Vasconcelos 2018), class-agnostic boxes, each working on the boxes of the one before; only for teachers: no training."""
    WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067))  # mmdetection's

    def __init__(self, dim, outputs):
        super().__init__()
        self.box_roi_pool = AlignedPool()
        self.heads = nn.ModuleList(TwoMLPHead(dim * 49, 1024) for _ in range(3))
        self.cls, self.reg = (nn.ModuleList(nn.Linear(1024, n) for _ in range(3)) for n in (outputs, 4))

    def logits(self, maps, boxes, image_sizes):
        """The three heads' mean logits on the boxes as they are (R, C + 1): what is distilled."""
        x = self.box_roi_pool(maps, boxes, image_sizes)
        return torch.stack([c(h(x)) for h, c in zip(self.heads, self.cls)]).mean(0)

    def forward(self, maps, boxes, image_sizes):
        """Detections of each image, as torchvision's RoIHeads returns them."""
        scores, counts = 0, [len(b) for b in boxes]
        for head, cls, reg, weights in zip(self.heads, self.cls, self.reg, self.WEIGHTS):
            x = head(self.box_roi_pool(maps, boxes, image_sizes))
            scores = scores + cls(x) / 3  # mmdetection averages the logits
            moved = BoxCoder(weights).decode(reg(x), boxes)[:, 0].split(counts)
            boxes = [clip_boxes_to_image(b, size) for b, size in zip(moved, image_sizes)]
        found = []
        for b, s in zip(boxes, scores.softmax(-1).split(counts)):
            roi, label = (s[:, 1:] > 0.05).nonzero(as_tuple=True)
            b, s, label = b[roi], s[roi, label + 1], label + 1
            keep = batched_nms(b, s, label, 0.5)[:100]
            found.append(dict(boxes=b[keep], scores=s[keep], labels=label[keep]))
        return found, {}


MMDET = [  # mmdetection 2 and 3 -> torchvision, the first rule that fits
    (r"^backbone\.(.*conv2)_offset\.", r"backbone.body.\1.conv_offset."), (r"^backbone\.", "backbone.body."), (r"^neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.([012])\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."), (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."), (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."), (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."), (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^roi_head\.bbox_head\.(\d)\.shared_fcs\.0\.", r"roi_heads.heads.\1.fc6."), (r"^roi_head\.bbox_head\.(\d)\.shared_fcs\.1\.", r"roi_heads.heads.\1.fc7."),
    (r"^roi_head\.bbox_head\.(\d)\.fc_cls\.", r"roi_heads.cls.\1."), (r"^roi_head\.bbox_head\.(\d)\.fc_reg\.", r"roi_heads.reg.\1."),
    (r"^bbox_head\.cls_convs\.(\d)\.conv\.", r"head.classification_head.conv.\1.0."), (r"^bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
    (r"^bbox_head\.reg_convs\.(\d)\.conv\.", r"head.regression_head.conv.\1.0."), (r"^bbox_head\.retina_reg\.", "head.regression_head.bbox_reg."),
]


def convert_mmdet(state, where):
    """(name for build, number of classes, state dict) of mmdetection's Faster R-CNN, RetinaNet or Cascade (Mask) R-CNN file."""
    retina, cascade = "bbox_head.retina_cls.bias" in state, "roi_head.bbox_head.2.fc_cls.bias" in state
    last = "bbox_head.retina_cls.bias" if retina else f"roi_head.bbox_head.{'0.' * cascade}fc_cls.bias"
    blocks = len({k.split(".")[2] for k in state if k.startswith("backbone.layer3.")})
    bottleneck, groups = "backbone.layer1.0.conv3.weight" in state, "backbone.layer1.0.conv2.weight" in state and 64 // state["backbone.layer1.0.conv2.weight"].shape[1]
    bodies = {(2, False): "r18", (6, False): "r34", (6, True): "r50", (23, True): "r101", (36, True): "r152"}
    if last not in state or (blocks, bottleneck) not in bodies:
        raise UserError(f"{where}: neither a checkpoint of this script nor mmdetection's Faster R-CNN, RetinaNet or Cascade R-CNN on a ResNet")
    body = bodies[blocks, bottleneck]
    if groups > 1:
        body = "x101_32x4d" + "_dcn" * any("conv2.conv_offset" in k or "conv2_offset" in k for k in state)
    rules = MMDET + [(r"^neck\.fpn_convs\.3\.conv\.", "backbone.fpn.extra_blocks.p6." if retina else "backbone.fpn.layer_blocks.3.0."),
                     (r"^neck\.fpn_convs\.4\.conv\.", "backbone.fpn.extra_blocks.p7.")]
    ours = {}
    for key, value in state.items():
        if "mask_head" in key or key.endswith("num_batches_tracked"):
            continue
        for pattern, name in rules:
            if re.search(pattern, key):
                key = re.sub(pattern, name, key)
                break
        if key.endswith(("cls_score.weight", "cls_score.bias")) or re.search(r"roi_heads\.cls\.\d", key):
            value = value.roll(1, 0)  # their background is the last class, torchvision's the first
        elif "box_predictor.bbox_pred" in key:
            value = torch.cat([value[:4] * 0, value])  # boxes of the background, which nobody uses
        ours[key] = value
    count = len(state[last]) // 9 if retina else len(state[last]) - 1
    return f"{'cascade' if cascade else 'retina' if retina else 'faster'}_{body}", count, ours


def load_detector(spec, flag="--weights"):
    """Detector in eval mode from a zoo name, an mmdetection .pth or a checkpoint of ours.

    Its .arch, plain values: name and mmdet (see build), classes: names, or None where the file does not tell; columns: the head's output of each class;
    outputs; image_size.
    """
    if spec in ZOO and ZOO[spec] is None:
        weights = torchvision.models.get_model_weights(spec).DEFAULT
        path, named = fetch(weights.url, re.search(r"-([0-9a-f]{8})\.pth$", weights.url)[1]), [
            (k, n) for k, n in enumerate(weights.meta["categories"]) if n not in ("__background__", "N/A")]
        state = load_checkpoint(path)
        arch = dict(name=spec, mmdet=False, classes=[n for _, n in named], columns=[k for k, _ in named], outputs=len(weights.meta["categories"]))
    else:
        if spec in ZOO:
            path = fetch(MMDET_URL + ZOO[spec], re.search(r"-([0-9a-f]{8})\.pth$", ZOO[spec])[1])
        elif Path(spec).exists():
            path = Path(spec)
        else:
            raise UserError(f"{flag} {spec}: neither a file nor one of {', '.join(ZOO)}")
        checkpoint = load_checkpoint(path)
        if not isinstance(checkpoint, dict):
            raise UserError(f"{flag} {path}: holds a {type(checkpoint).__name__}, not a checkpoint")
        if "arch" in checkpoint:
            arch, state = checkpoint["arch"], checkpoint["model"]
            if "columns" not in arch:
                raise UserError(f"{flag} {path}: is a detector of another script of this project")
        else:
            meta, state = checkpoint.get("meta") or {}, checkpoint.get("state_dict", checkpoint)
            if "style='caffe'" in str(meta.get("config", "")):
                raise UserError(f"{flag} {path}: a backbone in caffe's style (BGR pixels, other strides), which this script does not have; use one in pytorch's style")
            name, count, state = convert_mmdet(state, f"{flag} {path}")
            classes = meta.get("CLASSES") or (meta.get("dataset_meta") or {}).get("classes")
            first = 0 if name.startswith("retina") else 1
            arch = dict(name=name, mmdet=True, classes=list(classes) if classes else None, columns=list(range(first, first + count)), outputs=first + count)
    model = build(arch["name"], arch["outputs"], "none" if arch.get("plain_norm") else "frozen", arch["mmdet"])
    model.arch = dict(arch)
    if spec in ZOO and ZOO[spec] is None:
        model.load_state_dict(dict(state))  # torchvision's loaders know the older names in its files
    else:
        load_strict(model, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, f"{flag} {spec}")
    return model.eval()


def new_detector(name, classes, init):
    """An untrained detector for these classes, its backbone from init "imagenet" or "none"."""
    first = 0 if name.startswith("retina") else 1
    model = build(name, len(classes) + first, init)
    model.arch = dict(name=name, mmdet=False, classes=list(classes), columns=list(range(first, first + len(classes))), outputs=first + len(classes),
                      plain_norm=init == "none")
    return model


def freeze(model):
    """As the paper's baselines train: stem and first stage fixed, all BatchNorm as it is. For backbones that are trained already."""
    for name, p in model.backbone.body.named_parameters():
        p.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(False)
    model.norms_fixed = True  # Distiller.train() keeps them in eval mode


def check_classes(model, classes, flag):
    """A detector must know the data's classes, in its order; "_" and " " are the same; files without names are trusted."""
    theirs = model.arch["classes"] or classes
    if len(model.arch["columns"]) != len(classes):
        raise UserError(f"{flag}: knows {len(model.arch['columns'])} classes, --data has {len(classes)}")
    for k, (a, b) in enumerate(zip(theirs, classes)):
        if a.replace("_", " ") != b.replace("_", " "):
            raise UserError(f"{flag}: its class {k} is {a!r}, --data has {b!r}")


# ================================================================== features of objects

def descriptors(maps, strides, boxes, owner):
    """Mean feature inside each box on every level: (n, L, D). maps: L of (B, D, h, w); boxes (n, 4) pixels, owner (n,) image of the batch.

    8 x 8 bilinear samples a box, RoIAlign's: the cost does not grow with the box.
    """
    rois = torch.cat([owner[:, None].to(boxes), boxes], 1)
    return torch.stack([roi_align(fp32(m), rois.to(fp32(m).dtype), 1, 1 / s, sampling_ratio=8, aligned=True).flatten(1) for m, s in zip(maps, strides)], 1)


def level_of(boxes, kind):
    """Level that a box belongs to, 0 to 4. Faster R-CNN: side 112 is the border of 0 and 1 (FPN's Eq. 1); RetinaNet: 64, twice its smallest anchor."""
    side = ((boxes[:, 2] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 1]).clamp(min=0)).sqrt()
    return (side / (56 if kind == "faster" else 32)).clamp(min=1e-6).log2().add(1e-6).floor().clamp(0, 4).long()


def inside_box(boxes, size, stride):
    """(n, h, w) bool: cells whose centre a box (n, 4) covers; for one that covers none, the cell that its own centre is in."""
    h, w = size
    cells = []
    for low, high, count in ((boxes[:, 1], boxes[:, 3], h), (boxes[:, 0], boxes[:, 2], w)):
        at = (torch.arange(count, device=boxes.device) + 0.5) * stride
        covered = (at >= low[:, None]) & (at < high[:, None])
        nearest = F.one_hot(((low + high) / 2 / stride).long().clamp(0, count - 1), count).bool()
        cells.append(torch.where(covered.any(1, keepdim=True), covered, nearest))
    return cells[0][:, :, None] & cells[1][:, None]


def best_anchors(boxes, anchors, size):
    """(n, h, w) bool, FGFI (Wang et al. 2019): cells with an anchor whose IoU with the box is above half of the best that the level has."""
    iou = box_iou(boxes, anchors).view(len(boxes), *size, len(anchors) // size.numel())
    return (iou > 0.5 * iou.amax((1, 2, 3), keepdim=True)).any(-1)


def paint(cells, owner, value, count):
    """The largest value (n,) >= 0 among the objects that hold a cell: (count, h, w), and (count, h, w) bool, cells of any object. cells (n, h, w) bool."""
    index = owner[:, None, None].expand_as(cells)
    weight = value.new_zeros(count, *cells.shape[1:]).scatter_reduce(0, index, cells * value[:, None, None], "amax")
    return weight, torch.zeros_like(weight, dtype=torch.uint8).scatter_reduce(0, index, cells.byte(), "amax").bool()


# ================================================================== the bank: prototypes of every class and level

def all_gather(item):
    """The items of all processes, as a list, on all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


@torch.no_grad()
def extract(model, instances, device, args):
    """(ids (n,), labels (n,), features (n, L, D) on the CPU) of this process's share of the Instances."""
    training, found, wanted = model.training, [], set(instances.area)
    model.eval()
    for batch in tqdm(instances.loader, desc="instances", leave=False, mininterval=1, disable=instances.rank != 0):
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            maps = list(model.backbone(images_of(batch).tensors).values())
        image, slot = (batch["labels"] >= 0).nonzero(as_tuple=True)
        ids = [instances.index[batch["image_ids"][i]] * 10000 + k for i, k in zip(image.tolist(), slot.tolist())]
        keep = [k for k, i in enumerate(ids) if i in wanted]
        image, slot = image[keep], slot[keep]
        f = descriptors(maps, STRIDES[kind_of(model)], batch["boxes"][image, slot], image)
        found.append((torch.tensor([ids[k] for k in keep], dtype=torch.long), batch["labels"][image, slot].cpu(), f.cpu()))
    model.train(training)
    return tuple(torch.cat(part) for part in zip(*found)) if found else (torch.zeros(0).long(), torch.zeros(0).long(), None)


def by_class(extracted, classes, rank, world):
    """{class: (ids, features)} in the order of ids; of classes rank, rank + world, ...: each process solves its own, and holds no other's features."""
    ids, labels, features = extracted
    mine = {}
    for c in range(classes):
        rows = labels == c
        part, parts = (ids[rows], features[rows]) if rows.any() else None, [None] * world
        if world > 1:
            dist.gather_object(part, parts if rank == c % world else None, dst=c % world)
        else:
            parts = [part]
        parts = [p for p in parts if p]
        if rank == c % world and parts:
            ids_c, f = (torch.cat(x) for x in zip(*parts))
            order = ids_c.argsort()
            mine[c] = ids_c[order], f[order]
    return mine


def choose(f_t, f_s, ids, area, args):
    """Places of the K prototypes of one class on one level: f (D, N) unit columns, ids (N,), area (N,) pixels."""
    if args.proto_method == "ambiguous":  # the smallest
        return area.argsort(stable=True)[:args.k]
    if args.proto_method == "random":
        return torch.randperm(len(ids), generator=torch.Generator().manual_seed(int(ids[0]) + args.seed))[:args.k]
    if args.proto_method in ("kmeans", "dbscan"):
        return cluster_medoids(f_s if args.proto_space == "student" else f_t, min(args.k, len(ids)), args.proto_method, args.seed)
    keep = dense(f_t, args.density_filter) & dense(f_s, args.density_filter) if args.density_filter else None
    a, b = f_s if args.proto_space == "student" else f_t, f_t if args.proto_space == "teacher" else f_s
    return select_prototypes(a, b, args.k, args.lam, keep if keep is None or keep.any() else None)


class Bank:
    """Prototypes of C classes on L levels, the same in every process: tensors g_t, g_s (C, L, K, D) unit vectors, valid (C, L, K) bool, ids (C, L, K):
    the instances they are; center_t, center_s (L, D): what was subtracted (0 without --center)."""
    NAMES = "g_t", "g_s", "valid", "ids", "center_t", "center_s"

    def __init__(self, args, instances, classes):
        self.args, self.instances, self.classes, self.teacher = args, instances, classes, None

    def refresh(self, student, teacher, device, rank, world):
        """Alg. 2, lines 4 and 5; the teacher's features are extracted the first time only. Returns what there is to log."""
        since, args, before = time.time(), self.args, getattr(self, "ids", None)
        if self.teacher is None:
            self.teacher = by_class(extract(teacher, self.instances, device, args), len(self.classes), rank, world)
        pairs = {c: (ids, self.teacher[c][1], f_s) for c, (ids, f_s) in by_class(extract(student, self.instances, device, args), len(self.classes), rank, world).items()}
        count, center_t, center_s = self.centers(pairs)
        picked = {}
        for c, (ids, f_t, f_s) in pairs.items():
            u_t, u_s = (F.normalize(f - center, dim=-1).to(device) for f, center in ((f_t, center_t), (f_s, center_s)))
            area = torch.tensor([self.instances.area[i] for i in ids.tolist()])
            for level in range(f_s.shape[1]):
                picks = choose(u_t[:, level].T, u_s[:, level].T, ids, area, args).cpu()
                picked[c, level] = ids[picks], u_t[picks, level].cpu(), u_s[picks, level].cpu()
        (levels, d_t), d_s = center_t.shape, center_s.shape[1]
        shape = len(self.classes), levels, args.k
        tensors = dict(g_t=torch.zeros(*shape, d_t), g_s=torch.zeros(*shape, d_s), valid=torch.zeros(shape, dtype=torch.bool), ids=torch.full(shape, -1),
                       center_t=center_t, center_s=center_s)
        for part in all_gather(picked):
            for (c, level), (ids, g_t, g_s) in part.items():
                for name, value in (("ids", ids), ("g_t", g_t), ("g_s", g_s), ("valid", True)):
                    tensors[name][c, level, :len(ids)] = value
        self.load(tensors, device)
        now, then = (set() if x is None else {(*at, i) for *at, i in torch.cat([(x >= 0).nonzero()[:, :2], x[x >= 0][:, None]], 1).tolist()}
                     for x in (tensors["ids"], before if before is None else before.cpu()))
        return dict(prototypes=int(tensors["valid"].sum()), instances=int(count.sum()), kept=len(now & then) / len(now) if then else -1.0,
                    without=[n for n, k in zip(self.classes, count.tolist()) if k == 0], few=[n for n, k in zip(self.classes, count.tolist()) if 0 < k < args.k],
                    seconds=time.time() - since)

    def centers(self, pairs):
        """(instances of each class (C,), what is subtracted from teacher's and student's features (L, D): their means with --center, else 0)."""
        sums = {c: (len(ids), f_t.double().sum(0), f_s.double().sum(0)) for c, (ids, f_t, f_s) in pairs.items()}
        sums = dict(sorted(item for part in all_gather(sums) for item in part.items()))  # summed class by class: the same bits for any number of processes
        if not sums:
            raise UserError("prototypes: no image holds an object to make them of; lower --proto-min-size")
        count = torch.tensor([sums[c][0] if c in sums else 0 for c in range(len(self.classes))])
        means = [sum(s[i] for s in sums.values()) / count.sum() for i in (1, 2)]
        for name, x in zip(("teacher", "student"), means):
            if not x.isfinite().all():
                raise UserError(f"prototypes: the {name}'s features are not finite; its weights are damaged, or --lr is too high")
        return count, *(x.float() * self.args.center for x in means)

    def load(self, tensors, device):
        for name in self.NAMES:
            setattr(self, name, tensors[name].to(device))

    def tensors(self):
        return {name: getattr(self, name).cpu() for name in self.NAMES} if hasattr(self, "ids") else None


# ================================================================== RDM: the distilled training step, Eq. 9

class Distiller(nn.Module):
    """Student and adapters H; forward(batch) -> {name: weighed loss}, whose sum is Eq. 9. Teacher and bank stand outside the module tree: no process
    broadcasts their buffers and no checkpoint holds them. Without a teacher: torchvision's own training step, bit by bit."""

    def __init__(self, student, teacher, bank, args):
        super().__init__()
        self.student, self.args, self.kind = student, args, kind_of(student)
        self.outside, self.decay, self.watch = dict(teacher=teacher, bank=bank), 1.0, {}
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        if teacher is not None and args.alpha_feat:
            dims = student.backbone.out_channels, teacher.backbone.out_channels
            layer = dict(conv1x1relu=lambda: nn.Sequential(nn.Conv2d(*dims, 1), nn.ReLU()), conv1x1=lambda: nn.Conv2d(*dims, 1),
                         conv3x3=lambda: nn.Conv2d(*dims, 3, padding=1))[args.adapt]
            self.adapters = nn.ModuleList(layer() for _ in STRIDES[self.kind])

    def train(self, mode=True):
        super().train(mode)
        for m in self.student.modules() if getattr(self.student, "norms_fixed", False) else ():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        return self

    def forward(self, batch):
        args, student, teacher = self.args, self.student, self.outside["teacher"]
        images = images_of(batch, self.layout)
        columns = constant(student.arch["columns"], images.tensors.device, torch.long)
        targets = [dict(boxes=b[:n], labels=columns[k[:n]]) for b, k, n in zip(batch["boxes"], batch["labels"], batch["counts"])]
        with torch.autocast(images.tensors.device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            maps = student.backbone(images.tensors)
            with torch.no_grad():
                teacher_maps = teacher.backbone(images.tensors) if teacher is not None else {}
        maps, teacher_maps = ({k: fp32(v) for k, v in m.items()} for m in (maps, teacher_maps))
        labels = None
        if self.kind == "faster":
            losses, boxes, labels, objects, logits = two_stage(student, images, maps, targets)
        else:
            losses, boxes, objects, logits = one_stage(student, images, maps, targets)
        if teacher is None:
            return losses
        positive = [(k > 0 if self.kind == "faster" else o >= 0).nonzero()[:, 0] for k, o in zip(labels or objects, objects)]
        roi = torch.cat([b[p] for b, p in zip(boxes, positive)])
        roi_owner = torch.cat([torch.full_like(p, i) for i, p in enumerate(positive)])
        roi_object = torch.cat([o[p] for o, p in zip(objects, positive)])
        if args.instances == "gt":
            owner, slot = (batch["labels"] >= 0).nonzero(as_tuple=True)
            instance, label = batch["boxes"][owner, slot], batch["labels"][owner, slot]
            starts = constant([0, *batch["counts"]], owner.device, torch.long).cumsum(0)
            of_roi = starts[roi_owner] + roi_object  # the instance that a proposal is of
        else:
            instance, owner, label = roi, roi_owner, batch["labels"][roi_owner, roi_object]
            of_roi = torch.arange(len(roi), device=roi.device)
        more, sigma = self.knowledge(images, maps, teacher_maps, instance, owner, label)
        if args.alpha_resp:
            more["resp"] = args.alpha_resp * self.response(teacher_maps, images, boxes, positive, logits, sigma[of_roi])
        return losses | more

    def knowledge(self, images, maps, teacher_maps, boxes, owner, label):
        """Global and feature losses of instances boxes (n, 4), owner (n,), label (n,); and sigma (n,) of each on the level of its size. No bank: sigma 1."""
        args, bank, strides = self.args, self.outside["bank"], STRIDES[self.kind]
        s, t = list(maps.values()), list(teacher_maps.values())
        level, levels = level_of(boxes, self.kind), len(s)
        own = F.one_hot(level, levels).bool() if args.level_assign == "fpn" else torch.ones(len(boxes), levels, dtype=torch.bool, device=boxes.device)
        losses, sigma = {}, torch.ones(len(boxes), levels, device=boxes.device)
        if bank or args.alpha_global:
            f_s, f_t = descriptors(s, strides, boxes, owner), descriptors(t, strides, boxes, owner)            # (n, L, D)
        if bank:
            u_s, u_t = F.normalize(f_s - bank.center_s, dim=-1), F.normalize(f_t - bank.center_t, dim=-1)
            g_t, g_s, valid = bank.g_t[label], bank.g_s[label], bank.valid[label]                              # (n, L, K, D), (n, L, K)
            l_t, l_s = project(u_t, u_s, g_t, g_s, valid, args.proj, args.proj_lambda)                         # Lambda: (n, L, K)
            cosines = project(u_t, u_s, g_t, g_s, valid) if args.sigma == "maxcos" else (l_t, l_s)
            sigma = torch.where(valid.any(-1), reliability(*cosines, valid, args.sigma, args.sigma_clamp), sigma)     # Eq. 8: (n, L)
        if args.alpha_global and args.kd_relation == "rkd":
            losses["rkd"] = args.alpha_global * self.decay * sum(rkd_loss(f_t[:, i], f_s[:, i]) for i in range(levels)) / levels
        elif args.alpha_global:
            if args.all_class_prototypes:
                every = lambda x: x.transpose(0, 1).flatten(1, 2)                                              # (C, L, K, ...) -> (L, C K, ...)
                l_t, l_s = ((u.transpose(0, 1) @ every(g).transpose(1, 2)).transpose(0, 1) for u, g in ((u_t, bank.g_t), (u_s, bank.g_s)))
                valid = every(bank.valid).expand(len(boxes), -1, -1)
            n = reduce_mean(constant(float(len(boxes)), boxes.device, torch.float32), 1.0)                     # N of Eq. 6
            share = 1 if args.level_assign == "fpn" else levels
            losses["global"] = args.alpha_global * self.decay * (sigma * global_gap(l_t, l_s, valid) * own).sum() / (2 * n * share)      # Eq. 6
        if args.alpha_feat:
            losses["feat"] = args.alpha_feat * self.decay * self.features(images, s, t, boxes, owner, sigma.clamp(min=0), own)
        with torch.no_grad():
            self.watch = dict(sigma=(sigma * own).sum() / own.sum().clamp(min=1), muted=((sigma <= 0) & own).sum() / own.sum().clamp(min=1))
        read = level.clamp(max=3) if self.kind == "faster" else level  # the level that the box head reads
        return losses, sigma.gather(1, read[:, None])[:, 0]

    def features(self, images, s, t, boxes, owner, sigma, own):
        """Eq. 7 on each level: squared gaps of H(student) and teacher, mean over channels, weighed by the largest sigma of the objects at a cell; over the
        number of these cells where the paper has that of objects, so that the size of objects does not count; mean over levels."""
        args, sums, norms = self.args, [], []
        anchors = self.anchors(images, s) if args.kd_local == "fgfi" else None
        for i, (x, y, stride, adapt) in enumerate(zip(s, t, STRIDES[self.kind], self.adapters)):
            gap = (adapt(x) - y).square().mean(1)                                                              # (B, h, w)
            mine = own[:, i] if args.level_assign == "fpn" else slice(None)
            box, size = boxes[mine], x.shape[-2:]
            cells = inside_box(box, size, stride) if args.kd_local == "defeat" else best_anchors(box, anchors[i], size)
            weight, inside = paint(cells, owner[mine], sigma[mine, i], len(x))
            if args.feat_norm == "sigma":  # released: what sigma mutes is background
                inside = weight > 0
            sums += [(weight * gap).sum() / 2, args.bg_weight * (gap * ~inside).sum() / 2]                     # Eq. 7; DeFeat's background
            norms += [inside.sum().float() if args.feat_norm == "cells" else weight.sum(), (~inside).sum().float()]
        norms = reduce_mean(torch.stack(norms), 1.0)
        return (torch.stack(sums) / norms).sum() / len(s)

    def anchors(self, images, maps):
        """Anchors of each level of one image; all images of a batch have the same."""
        generator = self.student.rpn.anchor_generator if self.kind == "faster" else self.student.anchor_generator
        every, count = generator(ImageList(images.tensors, images.image_sizes[:1]), maps)[0], generator.num_anchors_per_location()
        return every.split([m.shape[2] * m.shape[3] * k for m, k in zip(maps, count)])

    def response(self, teacher_maps, images, boxes, positive, logits, sigma):
        """KL of the class scores of the proposals (anchors), weighed by sigma (m,) of the positive ones' instances, over their number."""
        args, student, teacher = self.args, self.student, self.outside["teacher"]
        classes = [constant(x.arch["columns"], sigma.device, torch.long) for x in (student, teacher)]
        chosen = positive if args.resp_rois == "pos" else [torch.arange(len(b), device=b.device) for b in boxes]
        if args.resp_rois == "all":  # those of no object: 1
            at = torch.cat([p + k for p, k in zip(positive, constant([0, *(len(b) for b in boxes)], sigma.device, torch.long).cumsum(0))])
            sigma = sigma.new_ones(sum(map(len, boxes))).index_put((at,), sigma)
        if self.kind == "faster":
            starts = constant([0, *(len(b) for b in boxes)], sigma.device, torch.long).cumsum(0)
            z_s = logits[torch.cat([p + k for p, k in zip(chosen, starts)])]
            with torch.no_grad():
                z_t = box_logits(teacher, teacher_maps, [b[p] for b, p in zip(boxes, chosen)], images.image_sizes)
            z_s, z_t = (z[:, F.pad(k, (1, 0))] for z, k in zip((z_s, z_t), classes))                           # the background is 0 in both
            kl, m = kl_softmax(z_t, z_s, args.resp_tau), sum(map(len, chosen))
        else:
            with torch.no_grad():
                z_t = teacher.head.classification_head(list(teacher_maps.values()))
            z_s, z_t = (torch.cat([x[p] for x, p in zip(z, chosen)])[:, k] for z, k in zip((logits, z_t), classes))
            kl, m = kl_bernoulli(z_t, z_s, args.resp_tau), sum(map(len, positive))                             # no background, as focal loss
        if args.resp_norm == "mean":
            kl = kl / z_s.shape[1]
        return (kl * sigma).sum() / reduce_mean(constant(float(m), sigma.device, torch.float32), 1.0)


# ================================================================== data

def make_data(args, split, augmented=True, raw=None):
    """(CocoDataset, annotations) of "train" or "val"; augmented False: training images as evaluation sees them, for prototypes. raw: annotations read before."""
    args.data = args.data or ("data" if args.dataset == "voc" else "data/coco")
    args.image_size = args.image_size or ("72-120" if args.data == "shapes" else "800")
    train, root = split == "train" and augmented, make_shapes(seed=args.data_seed) if args.data == "shapes" else Path(args.data)
    if args.dataset == "voc":
        images = annotations = root / "VOCdevkit"
        raw = raw or read_voc(root, [tuple(x.strip().split("_", 1)) for x in (args.voc_train if split == "train" else args.voc_val).split(",")])
    else:
        images, annotations = find_coco(root, split)
        raw = raw or read_coco(annotations)
    if split == "train" and args.train_images:
        kept = {i["id"] for i in raw["images"][:args.train_images]}
        raw = raw | dict(images=[i for i in raw["images"] if i["id"] in kept], annotations=[a for a in raw["annotations"] if a["image_id"] in kept])
    return CocoDataset(images, annotations, train, args.image_size, raw=raw, photometric=train and args.photometric), raw


def to_device(batch, device):
    """The batch on the device, with what the host must know of it: number of objects and size of each image."""
    host = dict(counts=(batch["labels"] >= 0).sum(1).tolist(), image_sizes=[tuple(s) for s in batch["sizes"].tolist()])
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()} | host


class Instances:
    """The objects that prototypes are picked from: all of --proto-max-images images of each class, drawn once by --seed. An object's id: the place of its
    image in the dataset times 10,000, plus its place there. Blocks of 8 neighbouring images are shared out to the processes: each image stands
    in one batch, and what shares a batch does not depend on the number of processes."""

    def __init__(self, data, args, rank, world):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)).tolist()
        count, chosen, self.area, self.rank = Counter(), [], {}, rank
        for i in order:
            boxes, classes = data.items[i][4], data.items[i][5].tolist()
            sides = boxes[:, 2:] - boxes[:, :2]
            wanted = [k for k in range(len(boxes)) if sides[k].min() > args.proto_min_size and count[classes[k]] < args.proto_max_images]
            if wanted:
                chosen.append(i)
                count.update({classes[k] for k in wanted})
                self.area |= {i * 10000 + k: float(sides[k].prod()) for k in wanted}
        chosen.sort()
        self.index = {data.items[i][0]: i for i in chosen}
        blocks = [[(i, 0) for i in chosen[b:b + 8]] for b in range(0, len(chosen), 8)][rank::world]
        self.loader = DataLoader(data, batch_sampler=blocks, num_workers=args.workers, collate_fn=collate, generator=torch.Generator())


# ================================================================== train

def fill_defaults(args, kind):
    """Defaults that depend on the data, the preset and the kind of the detectors."""
    args.preset = args.preset or "paper"
    if args.schedule:
        args.epochs = {"1x": 12, "2x": 24}[args.schedule]
    small = dict(epochs=16, train_images=300, refresh=4.0, batch_size=16, lr=0.002, optimizer="adamw", photometric=False, student=f"{kind}_tiny8")
    full = dict(train_images=0, refresh=1.0, epochs=24, batch_size=2, lr=0.01 if kind == "retina" else 0.02, optimizer="sgd", student=f"{kind}_r50")
    for name, value in (PRESETS[args.preset] | (small if args.data == "shapes" else full)).items():
        if getattr(args, name) is None and not (name == "student" and args.init not in (None, "imagenet", "none")):
            setattr(args, name, value)
    args.schedule = None  # --epochs says it
    if not (args.alpha_global or args.alpha_feat or args.alpha_resp):
        args.teacher = "none"
    if args.teacher == "none":
        args.alpha_global = args.alpha_feat = args.alpha_resp = 0.0


def train(args, rank, world, device):
    """Train the student under args; returns the last evaluation's metrics (rank 0) or None."""
    if rank == 0 and not args.resume:
        if (Path(args.out) / "log.jsonl").exists():  # before anything is read or trained
            raise UserError(f"--out {args.out}: holds a run already; choose another folder, --resume it, or delete it")
    given = [spec for spec in (args.init, args.teacher) if spec not in (None, "imagenet", "none")]
    kind = kind_of(load_detector(given[0])) if given else "retina" if (args.student or "").startswith("retina") else "faster"
    fill_defaults(args, kind)
    (data, raw), val = make_data(args, "train"), make_data(args, "val")
    if val[0].classes != data.classes:
        raise UserError(f"--data {args.data}: train and val annotations list different categories")
    teacher = None
    if args.teacher != "none":
        args.teacher = args.teacher or (shapes_detector(f"{kind}_tiny32", args, rank, world, device) if args.data == "shapes" else f"{kind}_r101")
        teacher = load_detector(args.teacher, "--teacher").requires_grad_(False).to(device)
        check_classes(teacher, data.classes, f"--teacher {args.teacher}")
    else:
        args.control = "none"
    if args.init is None:
        on_coco = args.teacher != "none" and args.dataset == "coco" and args.student in ZOO
        args.init = shapes_detector(args.student, args, rank, world, device) if args.data == "shapes" else args.student if on_coco else "imagenet"
    seed_all(args.seed)
    if args.init in ("imagenet", "none"):
        student = new_detector(args.student, data.classes, args.init)
        if teacher is not None and rank == 0:
            print(f"warning: --init {args.init}: the paper distils students that are trained already; prototypes of an untrained one are noise", flush=True)
    else:
        student = load_detector(args.init, "--init")
        if student.arch["name"].startswith(("cascade", "maskrcnn")):
            raise UserError(f"--init {args.init}: can be a teacher only; a student is a Faster R-CNN or a RetinaNet")
        args.student = None  # --init says it
    check_classes(student, data.classes, f"--init {args.init}")
    if teacher is not None and kind_of(teacher) != kind_of(student):
        raise UserError(f"--teacher {args.teacher} is a {kind_of(teacher)}, the student a {kind_of(student)}: they must be of one kind")
    if teacher is not None and kind == "retina":  # its anchors are compared one by one
        pairs = list(zip(teacher.anchor_generator.cell_anchors, student.anchor_generator.cell_anchors))
        if any(a.shape != b.shape or (a - b).abs().max() > 1 for a, b in ((a.cpu(), b.cpu()) for a, b in pairs)):
            raise UserError(f"--teacher {args.teacher}: has other anchors than the student; tiny RetinaNets have smaller ones")
    if args.init != "none" and "tiny" not in student.arch["name"]:
        freeze(student)
    student.arch.update(classes=list(data.classes), image_size=args.image_size)  # --eval and --predict see the images as training did
    out = open_run(args, rank, args.resume)
    other = {k: getattr(args, k) for k, v in PRESETS[args.preset].items() if getattr(args, k) != v and k != "photometric"}
    if teacher is not None and rank == 0:
        print(f"preset {args.preset}" + "".join(f", but --{k.replace('_', '-')} {v}" for k, v in other.items()), flush=True)
    control = None if args.control == "none" else continued(args, out, rank, world, device)
    metrics = fit(student.to(device), teacher, data, raw, val, out, args, rank, world, device)
    if rank == 0 and control:
        keys = [k for k in ("AP", "AP50", "AP75", "VOC11", "VOCarea") if k in metrics]
        for name, m in (("continued without distillation", control), ("distilled", metrics), ("difference", {k: metrics[k] - control[k] for k in keys})):
            print(f"{name:31s} " + " ".join(f"{k} {m[k]:5.1f}" for k in keys))
    return metrics


def continued(args, out, rank, world, device):
    """Metrics of the same student trained as long without distillation: of an earlier run's folder, or of one made now in OUT/control."""
    folder = out / "control" if args.control == "run" else Path(args.control)
    same = "data dataset voc_train voc_val data_seed train_images image_size init student epochs max_iters optimizer lr weight_decay photometric seed amp".split()
    if (folder / "last.pt").exists():
        state = load_checkpoint(folder / "last.pt")
        theirs, ours = ({**flags, "total batch": total} for flags, total in (
            (state["args"], state["total_batch"]), (vars(args), args.batch_size * args.accumulate * world)))
        wrong = [k for k in (*same, "total batch") if theirs.get(k) != ours[k]]
        if wrong or theirs["teacher"] != "none":
            raise UserError(f"--control {folder}: is no continuation without distillation of this run" + (
                f": its {wrong[0].replace('_', '-')} is {theirs.get(wrong[0])}, here {ours[wrong[0]]}; give another folder, or --control none" if wrong else ""))
    elif args.control != "run":
        raise UserError(f"--control {folder}: no last.pt there")
    if args.control != "run" and not (folder / "results.json").exists():
        raise UserError(f"--control {folder}: that run is not finished; --resume it first")
    if (folder / "results.json").exists():  # written by the last evaluation
        return json.loads((folder / "results.json").read_text()) if rank == 0 else None
    if rank == 0:
        print(f"== the student continued without distillation -> {folder}", flush=True)
    run = argparse.Namespace(**{**vars(args), "teacher": "none", "control": "none", "out": str(folder), "resume": (folder / "last.pt").exists()})
    return train(run, rank, world, device)


def fit(student, teacher, data, raw, val, out, args, rank, world, device):
    """The training loop, Alg. 2: prototypes every --refresh epochs, Eq. 9 in between."""
    classes = data.classes
    seed_all(args.seed)  # H does not depend on what ran before
    needed = teacher is not None and (args.alpha_global > 0 and args.kd_relation == "global" or args.sigma != "none" and args.alpha_feat + args.alpha_resp > 0)
    bank = Bank(args, Instances(make_data(args, "train", False, raw)[0], args, rank, world), classes) if needed else None
    learner = model = Distiller(student, teacher, bank, args).to(device).train()
    for net in filter(None, (student, teacher)):
        net.to(memory_format=learner.layout)
        if args.compile:
            net.backbone.compile()
    if world > 1:
        model = nn.parallel.DistributedDataParallel(learner, [device.index] if device.type == "cuda" else None,
                                                    broadcast_buffers=not getattr(student, "norms_fixed", False))
    loader, plan = train_loader(data, args.batch_size, rank, world, args.seed, args.workers, device.type == "cuda")
    total_batch = args.batch_size * world * args.accumulate
    lr = args.lr * total_batch / 16
    parameters = [p for p in learner.parameters() if p.requires_grad]
    optimizer = (torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=args.weight_decay) if args.optimizer == "sgd" else
                 torch.optim.AdamW(parameters, lr, weight_decay=args.weight_decay))
    steps_per_epoch = -(-len(plan) // args.accumulate)
    total = min(args.epochs * steps_per_epoch, args.max_iters or 10**9)
    span = args.refresh * steps_per_epoch  # between two selections, not always a whole number
    milestones, warmup = (args.epochs * 2 / 3, args.epochs * 11 / 12), min(500, args.epochs * steps_per_epoch // 10)
    seed_all(args.seed + 1000 * rank)  # here: the samplers of RPN and box head draw from the same stream with and without distillation
    it, best, due = 0, -2.0, False  # AP is -1 where val holds no box
    if can_resume(out, args.resume, rank, device):
        state = load_checkpoint(out / "last.pt")
        load_strict(student, state["model"], f"--resume {out / 'last.pt'}")
        if state["args"]["optimizer"] != args.optimizer:
            raise UserError(f"--resume {out}: was trained with --optimizer {state['args']['optimizer']}")
        if state["total_batch"] != total_batch:
            raise UserError(f"--resume {out}: was trained with a total batch of {state['total_batch']}, this command has {total_batch}")
        if set(state["adapters"]) != {k for k in learner.state_dict() if k.startswith("adapters.")}:
            raise UserError(f"--resume {out}: was trained with other adapters H; --alpha-feat and --adapt must stay what they were")
        learner.load_state_dict(state["adapters"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        for g in optimizer.param_groups:  # --resume --weight-decay is meant
            g["weight_decay"] = args.weight_decay
        it, best, due = state["it"], state["best"], state["due"]
        if bank and state["bank"]:
            bank.load(state["bank"], device)  # an earlier student's, as in the run that was cut off
        if rank < len(state["rng"]):
            set_rng_state(state["rng"][rank])
    if rank == 0:
        n = [sum(p.numel() for p in student.parameters() if p.requires_grad or every) for every in (True, False)]
        print(f"student {student.arch['name']} from {args.init}: {n[0]:,} parameters, {n[1]:,} trained | teacher {args.teacher} | "
              f"{len(data)} images, {len(classes)} classes, dropped {data.dropped} | batch {args.batch_size} x {world} x {args.accumulate} = {total_batch} | "
              f"lr {args.lr:g} at 16 -> {lr:g} | {args.epochs} epochs of {steps_per_epoch} steps, from {it}", flush=True)

    def save_last(due=False):  # due: the evaluation of this step is still to come
        rng = all_gather(rng_state())
        if rank == 0:
            adapters = {k: v for k, v in learner.state_dict().items() if k.startswith("adapters.")}
            save_checkpoint(dict(weights_of(student), adapters=adapters, bank=bank and bank.tensors(), optimizer=optimizer.state_dict(), it=it, best=best,
                                 due=due, rng=rng, total_batch=total_batch, args=vars(args)), out / "last.pt")

    def validate():
        nonlocal best
        metrics = evaluate(student, val, rank, world, device, args, out if it >= total else None)
        learner.train()
        if rank == 0:
            log.write(dict(it=it, epoch=epoch + 1, **{k: v for k, v in metrics.items() if k != "classes"}), eval_line(epoch + 1, metrics))
            if metrics["AP"] > best:
                best = metrics["AP"]
                save_checkpoint(weights_of(student), out / "best.pt")
        log.restart_clock()
        return metrics

    def refresh():
        news = bank.refresh(student, teacher, device, rank, world)
        learner.train()
        if it == 0 and rank == 0 and (news["without"] or news["few"]):
            print(f"warning: no prototype for {', '.join(news['without']) or '-'} (sigma is 1, no global loss there); fewer than {args.k} for {', '.join(news['few']) or '-'}", flush=True)
        log.write(dict(it=it + 1, epoch=epoch + 1, refresh=True, **{k: news[k] for k in ("prototypes", "instances", "kept", "seconds")}),
                  f"ep {epoch + 1:02d} {news['prototypes']} prototypes of {news['instances']} instances, {100 * max(0, news['kept']):.0f} % as before | {news['seconds']:.0f}s")
        log.restart_clock()

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
        learner.decay = 1 - epoch / args.epochs if args.kd_decay == "linear" else 1.0
        batches, left = iter(loader), len(plan)
        while left and it < total:
            if bank and (it == 0 or not hasattr(bank, "ids") or it // span > (it - 1) // span):
                refresh()                                                                                      # Alg. 2, lines 3 to 6
            factor = warmup_multistep(it, steps_per_epoch, milestones, warmup)
            for g in optimizer.param_groups:
                g["lr"] = lr * factor
            waited, losses = 0.0, {}
            count = min(args.accumulate, left)
            for micro in range(count):
                since = time.time()
                batch = to_device(next(batches), device)
                waited += time.time() - since
                with model.no_sync() if world > 1 and micro < count - 1 else nullcontext():
                    terms = model(batch)
                    (sum(terms.values()) / count).backward()                                                   # Eq. 9
                losses = {k: losses.get(k, 0) + v.detach() / count for k, v in terms.items()}
            left -= count
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            it += 1
            log.step(it, epoch + 1, losses, lr * factor, waited, learner.watch)
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
        print(f"{class_table(metrics)}\nbest AP {best:.1f} | {time.time() - clock:.0f}s | {out}", flush=True)
    barrier()
    return metrics


def weights_of(model):
    """What a detector is, as plain values and tensors. "model" has the names of torchvision's detector; load_detector also restores what names do not
    tell: mmdetection's anchors and pooling, version 1's eps."""
    return dict(arch=model.arch, classes=model.arch["classes"], model=model.state_dict())


def eval_line(epoch, m):
    numbers = " ".join(f"{k} {m[k]:.1f}" for k in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "VOC11", "VOCarea") if k in m)
    return f"ep {epoch:02d} eval {m['images']} images | {numbers} | {m['seconds']:.0f}s"


# ================================================================== evaluate, predict

@torch.no_grad()
def run_detector(model, batch, device, args):
    """One collated batch -> per image (boxes in original pixels, scores, classes 0 ... C - 1)."""
    batch, columns = to_device(batch, device), model.arch["columns"]
    images = images_of(batch, torch.channels_last if args.channels_last else torch.contiguous_format)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        maps = model.backbone(images.tensors)
    label_of, answer = torch.full((model.arch["outputs"],), -1, device=device), []
    label_of[torch.tensor(columns, device=device)] = torch.arange(len(columns), device=device)
    for found, (h, w), (height, width) in zip(detect(model, images, {k: fp32(v) for k, v in maps.items()}), batch["image_sizes"], batch["original_sizes"]):
        label = label_of[found["labels"]]
        known = label >= 0  # torchvision's COCO weights have outputs for ids that no class has
        answer.append((found["boxes"][known] * found["boxes"].new_tensor([width / w, height / h] * 2), found["scores"][known], label[known]))
    return answer


def evaluate(model, val, rank, world, device, args, out=None):
    """COCO metrics, and VOC's 11-point and area AP50 with --dataset voc, on rank 0; None elsewhere. out: also write the result files."""
    (dataset, truth), since, results = val, time.time(), []
    model.eval()
    loader = eval_loader(dataset, rank, world, args.workers, device.type == "cuda")
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        (boxes, scores, labels), = run_detector(model, batch, device, args)
        results += to_coco_results(batch["image_ids"][0], boxes, scores, labels, dataset.category_ids)
    results = gather(results)
    if rank != 0:
        return None
    metrics = dict(coco_evaluate(truth, results), images=len(dataset))
    if args.dataset == "voc":
        voc = voc_evaluate(truth, results)
        metrics.update(VOC11=voc["AP11"], VOCarea=voc["AP"])
        for name, m in voc["classes"].items():
            metrics["classes"][name].update(VOC11=m["AP11"], VOCarea=m["AP"])
    metrics["seconds"] = time.time() - since
    if out:
        (out / "detections.json").write_text(json.dumps(results))
        save_samples(dataset, results, out / "samples.jpg")
        (out / "results.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file) and one picture per image into --out."""
    model = load_detector(args.weights, "--weights").to(device)
    classes = model.arch["classes"] or [f"class {k}" for k in range(len(model.arch["columns"]))]
    size = max(parse_image_size(args.image_size or model.arch.get("image_size") or "800"))
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
        image, (h, w) = resize(original, size)
        item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0, original_size=original.shape[1:])
        (boxes, scores, labels), = run_detector(model, collate([item]), device, args)
        keep = scores > args.score
        boxes, scores, labels = boxes[keep].cpu(), scores[keep].cpu(), labels[keep].cpu()
        answer[str(path)] = [dict(box=[round(v, 1) for v in b], score=round(s, 4), label=classes[k]) for b, s, k in
                             zip(boxes.tolist(), scores.tolist(), labels.tolist())]
        torchvision.io.write_jpeg(draw_boxes(original, boxes, labels, classes, scores), str(out / f"{number:04d}_{path.stem}_boxes.jpg"), quality=90)
    if not answer:
        raise UserError(f"--predict {' '.join(args.predict)}: no image can be read")
    (out / "predictions.json").write_text(json.dumps(answer, indent=1))
    print(f"{sum(map(len, answer.values()))} boxes in {len(answer)} images -> {out}")


# ================================================================== the embedded dataset

def shapes_detector(name, args, rank, world, device):
    """Path of a plainly trained detector for shapes; trained by this script the first time, then cached beside the data."""
    if "_tiny" not in name:
        raise UserError(f"--student {name}: with --data shapes faster_tiny8 ... retina_tiny64 are trained on demand; others need --init and --teacher")
    done = make_shapes(seed=args.data_seed).parent / "teachers" / f"{name}-s{args.data_seed}"
    draft = done.with_name(f".{done.name}")  # renamed when finished, so that a killed run is never taken for a detector
    if not (done / "best.pt").exists():
        if rank == 0:
            print(f"== {name}: trained once, cached at {done}", flush=True)
            if draft.exists() and not (draft / "last.pt").exists():
                shutil.rmtree(draft)
        barrier()
        flags = ["--data", "shapes", "--data-seed", str(args.data_seed), "--teacher", "none", "--init", "none", "--student", name, "--out", str(draft)]
        flags += ["--epochs", "8", "--train-images", "0"] if name.endswith("32") else ["--epochs", "32"]  # the teacher sees all images
        flags += ["--workers", str(args.workers)] + ["--resume"] * (draft / "last.pt").exists()
        train(parse_args(flags), rank, world, device)
        if rank == 0:
            draft.rename(done)
        barrier()
    return str(done / "best.pt")


def shapes_table(args, rank, world, device):
    """Teacher, the student that is distilled, the same continued without distillation, and distilled, in one table."""
    since, rows, out = time.time(), [], Path(args.out)
    kind = "retina" if (args.student or "").startswith("retina") else "faster"
    for role, name in (("teacher", f"{kind}_tiny32"), ("init", args.student or f"{kind}_tiny8")):
        path = shapes_detector(name, args, rank, world, device)
        setattr(args, role, path)
        rows.append((f"{'teacher' if role == 'teacher' else 'student'} {name}", json.loads((Path(path).parent / "results.json").read_text()), time.time() - since))
        since = time.time()
    for name, teacher, folder in (("student continued", "none", "continued"), ("student distilled", args.teacher, "distilled")):
        run = argparse.Namespace(**{**vars(args), "teacher": teacher, "student": None, "out": str(out / folder), "control": "none" if teacher == "none" else str(out / "continued"),
                                    "resume": args.resume and (out / folder / "last.pt").exists(), "table": False})
        rows.append((name, train(run, rank, world, device), time.time() - since))
        since = time.time()
    if rank == 0:
        print(f"\nshapes, {rows[-1][1]['images']} validation images     AP  AP50  AP75   seconds")
        for name, m, seconds in rows:
            print(f"{name:31s} {m['AP']:5.1f} {m['AP50']:5.1f} {m['AP75']:5.1f} {seconds:9.0f}")


def main():
    try:
        args = parse_args()
        rank, world, device = init_ddp()
        if args.eval or args.predict:
            answer_folder(args.out)
        if args.eval:
            model = load_detector(args.eval, "--eval")
            args.image_size = args.image_size or model.arch.get("image_size")
            val = make_data(args, "val")
            check_classes(model, val[0].classes, f"--eval {args.eval}")
            metrics = evaluate(model.to(device), val, rank, world, device, args, Path(args.out))
            if rank == 0:
                print(f"{class_table(metrics)}\n{eval_line(0, metrics)}")
        elif args.predict:
            if world > 1:
                raise UserError("--predict: runs in one process; start it with python")
            predict(args, device)
        elif args.table if args.table is not None else args.data == "shapes" and not (args.teacher or args.init or args.max_iters):
            shapes_table(args, rank, world, device)
        else:
            train(args, rank, world, device)
    except (UserError, DataError, ShapesError) as e:
        line = str(e).strip().splitlines()[-1]  # a loader worker puts its traceback and the exception's name before it
        sys.exit("\nprototype_kd.py: " + re.sub(r"^[\w.]+Error: ", "", line))
    leave_ddp()


if __name__ == "__main__":
    main()
