# SPDX-License-Identifier: MIT
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
    # with torchvision's weights: --teacher fasterrcnn_resnet50_fpn_v2 --init fasterrcnn_resnet50_fpn
    # VOC: a teacher, a student, and both; last.pt, for best.pt is chosen on the test set
    torchrun --nproc_per_node 8 prototype_kd.py --dataset voc --teacher none --out r/t --student faster_r101
    torchrun --nproc_per_node 8 prototype_kd.py --dataset voc --teacher none --out r/s
    torchrun --nproc_per_node 8 prototype_kd.py --dataset voc --teacher r/t/last.pt --init r/s/last.pt
    python prototype_kd.py --eval fasterrcnn_resnet50_fpn_v2              # metrics of any of these, or of runs/x/best.pt
    python prototype_kd.py --predict photo.jpg dir/ --weights runs/x/best.pt
Not run by us: COCO and VOC at full size. On shapes (three seeds, README): +1.1 AP over the student continued without distillation; class scores alone
+0.9, features alone +0.7, the global loss alone nothing; --preset released +1.4.
"""
import argparse
import math
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper
from tqdm import tqdm

from common.boxes import constant
from common.datasets import (CocoDataset, collate, eval_loader, find_coco, own_files, parse_image_size,
                             read_annotations, read_json, read_voc, resize, start_worker, to_corners,
                             train_loader)
from common.evaluation import class_table, coco_evaluate, to_coco_results, voc_evaluate
from common.run import (COUNT, POSITIVE, SEED, Run, UserError, answer_folder, check_teacher, dash, describe_model,
                        fast_layout, fused, fold, gather, given_flags, load_checkpoint, load_strict, made_once,
                        number, open_run, parse, parser, rebuilding, reduce_mean, run_flags, saved_flags,
                        seed_all, started, warmup_multistep, wrap_ddp)

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
TORCHVISION = ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2",
               "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")  # its own detectors


def make_body(name, init):
    """A torchvision ResNet. init "imagenet": its weights, its BatchNorm frozen; "frozen": BatchNorm frozen, weights to come; "none"."""
    if name.startswith("tiny"):
        from common.tiny import NarrowResNet
        if init == "imagenet":
            raise UserError(f"backbone {name}: has no ImageNet weights; use --init none")
        return NarrowResNet(int(name[4:]))
    norm = nn.BatchNorm2d if init == "none" else FrozenBatchNorm2d
    if name.startswith("x101_32x4d"):  # mmdetection's; _dcn: deformable from the second stage on
        from common.zoo import DeformConv
        net = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, norm_layer=norm)
        for stage in (net.layer2, net.layer3, net.layer4) if name.endswith("_dcn") else ():
            for block in stage:
                block.conv2 = DeformConv(block.conv2)
        return net
    net = getattr(torchvision.models, BACKBONES[name])(norm_layer=norm)
    if init == "imagenet":
        from common.zoo import imagenet_state
        state, url = imagenet_state(BACKBONES[name])
        load_strict(net, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, url)
    return net


def split_name(name, others=()):
    """"faster_r50" -> ("faster", "r50"), both known. others: further backbones, and cascades."""
    kind, _, body = name.partition("_")
    kinds = ("faster", "retina", "cascade") if others else ("faster", "retina")
    known = body in BACKBONES or body in others or re.fullmatch("tiny(8|16|24|32|48|64)", body)
    if kind not in kinds or not known:
        raise UserError(f"--student {name}: expected faster_ or retina_ and one of {', '.join(BACKBONES)}, "
                        "tiny8 ... tiny64")
    return kind, body


def build(name, outputs, init="none", mmdet=False):
    """torchvision's own FasterRCNN or RetinaNet: faster_r50, retina_tiny16, cascade_x101_32x4d_dcn, fasterrcnn_resnet50_fpn_v2, ...

    outputs: class scores of the head; Faster R-CNN's first is the background. mmdet: what weights of mmdetection expect (exact anchors, RoIAlign's
    newer grid, no ReLU before P7); parameters and their names stay torchvision's.
    """
    if name in TORCHVISION:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=outputs)
        for m in model.backbone.body.modules() if not name.endswith("_v2") else ():
            if isinstance(m, nn.BatchNorm2d):
                m.eps = 0.0  # version 1 was trained so
        if name.startswith("maskrcnn"):
            model.roi_heads.mask_roi_pool = None  # has_mask() is false then; the weights stay
        return with_scales(model)
    if mmdet:
        from common import zoo
    kind, body = split_name(name, ("x101_32x4d", "x101_32x4d_dcn") if mmdet else ())
    tiny, retina = body.startswith("tiny"), kind == "retina"
    dim, net, layers = 64 if tiny else 256, make_body(body, init), [2, 3, 4] if retina else [1, 2, 3, 4]
    width = net.inplanes // 8  # of the first stage
    channels = [width * 2 ** (k - 1) for k in layers]
    higher = zoo.PlainP6P7 if mmdet else LastLevelP6P7
    extra = higher(channels[-1], dim) if retina else LastLevelMaxPool()
    backbone = BackboneWithFPN(net, {f"layer{k}": str(i) for i, k in enumerate(layers)}, channels, dim, extra)
    scale = 4 if tiny else 1  # the embedded dataset's images are of 100 pixels
    sides = [s // scale * 2 ** (k / 3) for s in (32, 64, 128, 256, 512) for k in range(3 if retina else 1)]
    sides = [tuple(sides[i:i + 3] if retina else sides[i:i + 1]) for i in range(0, len(sides), 3 if retina else 1)]
    anchors = (zoo.ExactAnchors(sides, STRIDES["retina" if retina else "faster"]) if mmdet else
               AnchorGenerator([tuple(int(s) for s in level) for level in sides], ((0.5, 1.0, 2.0),) * 5))
    if retina:  # tiny: GroupNorm in the head, as in torchvision's version 2; without it the head does not learn from random weights
        head = RetinaNetHead(dim, 9, outputs, norm_layer=lambda c: nn.GroupNorm(8, c)) if tiny else None
        return RetinaNet(backbone, outputs, anchor_generator=anchors, head=head, detections_per_img=100)
    small = dict(rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=100,
                 rpn_batch_size_per_image=64, box_batch_size_per_image=32) if tiny else {}
    hidden = 256 if tiny else 1024
    model = FasterRCNN(backbone, rpn_anchor_generator=anchors, box_head=TwoMLPHead(dim * 49, hidden), box_predictor=FastRCNNPredictor(hidden, outputs), **small)
    if kind == "cascade":
        model.roi_heads = zoo.CascadeHeads(dim, outputs)
    elif mmdet:
        model.roi_heads.box_roi_pool = zoo.AlignedPool()
    return with_scales(model)


def with_scales(model):
    """torchvision's RoI pooling guesses the maps' scales from the first image it sees, and wrongly where padding adds half of a side: tell it."""
    pool = getattr(getattr(model, "roi_heads", None), "box_roi_pool", None)
    if isinstance(pool, MultiScaleRoIAlign):
        pool.scales, pool.map_levels = [1 / s for s in STRIDES["faster"][:4]], initLevelMapper(2, 5, pool.canonical_scale, pool.canonical_level)
    return model


def kind_of(model):
    return "retina" if isinstance(model, RetinaNet) else "faster"


def kind_of_name(name):
    return "retina" if name.startswith("retina") else "faster"


def is_cascade(heads):
    return hasattr(heads, "logits")  # CascadeHeads of common/zoo.py, which is not imported here


def images_of(batch):
    """torchvision's ImageList of a collated batch: what its own transform makes of the same pixels, to the last bit."""
    x = batch["images"]
    mean, std = (constant(v, x.device, torch.float32).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows = torch.arange(x.shape[2], device=x.device) < batch["sizes"][:, :1]
    cols = torch.arange(x.shape[3], device=x.device) < batch["sizes"][:, 1:]
    return ImageList((x / 255 - mean) / std * (rows[:, None, :, None] & cols[:, None, None, :]), batch["image_sizes"])


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
    if is_cascade(heads):
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


class Counted(nn.Module):
    """A detector on fixed shapes, for its FLOPs: as many boxes as its RPN may propose go through the head."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        net, maps = self.detector, self.detector.backbone(images)
        if kind_of(net) == "retina":
            return net.head(list(maps.values()))
        net.rpn.head(list(maps.values()))
        heads, count = net.roi_heads, len(images) * net.rpn.post_nms_top_n()
        boxes = maps["0"].new_zeros(count, maps["0"].shape[1], 7, 7)
        if not is_cascade(heads):
            return heads.box_predictor(heads.box_head(boxes))
        for head, cls, reg in zip(heads.heads, heads.cls, heads.reg):
            x = head(boxes)
            cls(x), reg(x)


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


# ================================================================== checkpoints

def load_detector(spec, flag="--weights"):
    """Detector in eval mode from a zoo name, an mmdetection .pth or a checkpoint of ours.

    Its .arch, plain values: name and mmdet (see build), classes: names, or None where the file does not tell;
    columns: the head's output of each class; outputs; image_size. Its .trained: epoch and step, if known.
    """
    from common import zoo
    path = zoo.zoo_path(spec, zoo.PROTOTYPE_ZOO, flag)
    whose, *content = zoo.load_any(path, flag, "prototype_kd.py")
    where, trained = f"{flag} {path}", (None, None)
    with rebuilding(where):
        if whose == "ours":
            arch, state = content[0]["arch"], content[0]["model"]
            trained = tuple(content[0].get(k) for k in ("epoch", "it"))  # of a best.pt
        elif spec in TORCHVISION:
            arch, state = arch_of_torchvision(spec), content[0]
        else:
            state, meta = content
            name, count, state = zoo.to_torchvision(state, where)
            # what the keys cannot tell: BGR pixels and other strides
            zoo.guard(zoo.config_of(meta), ("style='caffe'",), where, f"this script's {name}",
                      "; use one in pytorch's style")
            classes, first = zoo.classes_of(meta), 0 if name.startswith("retina") else 1
            arch = dict(name=name, mmdet=True, classes=list(classes) if classes else None,
                        columns=list(range(first, first + count)), outputs=first + count)
        plain_norm = arch.get("plain_norm")
        model = build(arch["name"], arch["outputs"], "none" if plain_norm else "frozen", arch["mmdet"])
        model.arch, model.trained = dict(arch), trained
        if spec in TORCHVISION:
            model.load_state_dict(state)  # torchvision's loaders know the older names in its files
        else:
            needed = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
            load_strict(model, needed, where)
        check_arch(arch, where)
    return model.eval()


def check_arch(arch, where):
    """Each class has an output of its own and a name, or none of them has one."""
    columns, names = arch["columns"], arch["classes"]
    if sorted(set(columns)) != columns or not columns or not 0 <= columns[0] <= columns[-1] < arch["outputs"]:
        raise UserError(f"{where}: says that classes have the outputs {columns} of {arch['outputs']}")
    if not all(isinstance(arch.get(k, False), bool) for k in ("mmdet", "plain_norm")):
        raise UserError(f"{where}: its mmdet or plain_norm is neither true nor false")
    if names is not None and (len(names) != len(columns) or not all(isinstance(n, str) for n in names)):
        raise UserError(f"{where}: names {len(names)} classes, its head has {len(columns)}")


def arch_of_torchvision(name):
    """.arch of its own detectors: COCO's ids are outputs, some of which no class has."""
    categories = torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
    named = [(k, n) for k, n in enumerate(categories) if n not in ("__background__", "N/A")]
    return dict(name=name, mmdet=False, classes=[n for _, n in named], columns=[k for k, _ in named],
                outputs=len(categories))


def arch_of(spec, flag):
    """.arch of a detector, of a zoo's its name only: before anything is downloaded."""
    from common.zoo import PROTOTYPE_ZOO
    return dict(name=spec) if spec in PROTOTYPE_ZOO else load_detector(spec, flag).arch


def plain_of(model):
    """What a checkpoint holds beside weights. load_detector restores from it what the weights' names, which
    are torchvision's, do not tell: mmdetection's anchors and pooling, version 1's eps."""
    return dict(script="prototype_kd.py", arch=model.arch, classes=model.arch["classes"])


def weights_of(model):
    """What a detector is, as plain values and tensors."""
    return dict(plain_of(model), model=model.state_dict())


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

    def is_due(self, it, span):
        """Whether prototypes are picked anew after `it` steps: every `span`, not always a whole number."""
        return it == 0 or not hasattr(self, "ids") or it // span > (it - 1) // span

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
        if teacher is not None and args.alpha_feat:
            dims = student.backbone.out_channels, teacher.backbone.out_channels
            layer = dict(conv1x1relu=lambda: nn.Sequential(nn.Conv2d(*dims, 1), nn.ReLU()), conv1x1=lambda: nn.Conv2d(*dims, 1),
                         conv3x3=lambda: nn.Conv2d(*dims, 3, padding=1))[args.adapt]
            self.adapters = nn.ModuleList(layer() for _ in STRIDES[self.kind])

    def parts(self):
        """What last.pt holds beside the student: H."""
        return dict(adapters=nn.ModuleDict({k: m for k, m in self.named_children() if k == "adapters"}))

    def train(self, mode=True):
        super().train(mode)
        for m in self.student.modules() if getattr(self.student, "norms_fixed", False) else ():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        return self

    def forward(self, batch):
        args, student, teacher = self.args, self.student, self.outside["teacher"]
        images = images_of(batch)
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

def make_data(args, split, like=None, image_size=None):
    """The dataset "train" or "val" of the flags; None where own training files come without others."""
    files = own_files(args, split)
    if files is False:
        return None
    train, shapes = split == "train", args.data == "shapes"
    if files is None and args.dataset == "voc":
        lists = args.voc_train if train else args.voc_val
        images = Path(default_root(args)) / "VOCdevkit"
        records = read_voc(images.parent, [tuple(x.strip().split("_", 1)) for x in lists.split(",")])
    else:
        if shapes:
            from common.shapes import make_shapes
        root = make_shapes(seed=args.data_seed) if shapes else default_root(args)
        images, annotations = files or find_coco(root, split)
        records = read_annotations(annotations, images)
    if train and args.first_images:
        records = records.subset(np.arange(len(records)) < args.first_images)
    return CocoDataset(images, records, train, image_size or default_size(args), like=like,
                       keep_empty=args.keep_empty, photometric=train and args.photometric)


def default_root(args):
    return args.data or ("data" if args.dataset == "voc" else "data/coco")


def default_size(args):
    return args.image_size or ("72-120" if args.data == "shapes" else "800")


def to_device(batch, device):
    """The batch on the device, with what the host must know of it: number of objects and size of each image."""
    host = dict(counts=(batch["labels"] >= 0).sum(1).tolist(), image_sizes=[tuple(s) for s in batch["sizes"].tolist()])
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()} | host


class Instances:
    """The objects that prototypes are picked from: all of --proto-max-images images of each class, drawn once by --seed. An object's id: the place of its
    image in the dataset times 10,000, plus its place there. Blocks of 8 neighbouring images are shared out to the processes: each image stands
    in one batch, and what shares a batch does not depend on the number of processes.

    trained: the training set. Its images are seen as evaluation sees them, with the boxes of training."""

    def __init__(self, trained, args, rank, world):
        data = CocoDataset(trained.folder, trained.records, False, args.image_size, small=True)
        records, rows = data.records, np.flatnonzero(data.used)
        corners = to_corners(records.xywh[rows])
        sides = corners[:, 2:] - corners[:, :2]
        large = (sides.min(1) > args.proto_min_size).tolist()
        area, label = sides.prod(1).tolist(), data.label_of[records.label[rows]].tolist()
        owner = records.owner[rows]
        first, end = (np.searchsorted(owner, data.kept, side).tolist() for side in ("left", "right"))
        count, chosen, self.area, self.rank = Counter(), [], {}, rank
        for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)).tolist():
            boxes = range(first[i], end[i])  # of image i, in `rows`
            wanted = [k for k in boxes if large[k] and count[label[k]] < args.proto_max_images]
            if wanted:
                chosen.append(i)
                count.update({label[k] for k in wanted})
                self.area |= {i * 10000 + k - first[i]: area[k] for k in wanted}
        chosen.sort()
        self.index = {records.image_id(data.kept[i]): i for i in chosen}
        blocks = [[(i, 0) for i in chosen[b:b + 8]] for b in range(0, len(chosen), 8)][rank::world]
        self.loader = DataLoader(data, batch_sampler=blocks, num_workers=args.workers, collate_fn=collate,
                                 worker_init_fn=start_worker, generator=torch.Generator())


# ================================================================== train

LEGEND = {
    "cls": "classification loss of the detector", "box": "box loss of the detector",
    "rpn_cls": "RPN: object or not", "rpn_box": "RPN: boxes",
    "global": "Eq. 6, gaps of an object's coordinates in the prototypes",
    "rkd": "RKD, distances and angles among objects",
    "feat": "Eq. 7, squared gap of H(student's features) and teacher's",
    "resp": "third term of Eq. 9, KL of class scores",
    "sigma": "Eq. 8, mean over objects", "muted": "share of objects whose sigma is 0"}


def make_pair(args, data, val, rank, world, device):
    """(student, teacher or None) of the flags, on the device."""
    teacher = None
    if args.teacher != "none":
        spec = args.teacher
        if spec is None:
            kind = kind_of_name(args.student or arch_of(args.init, "--init")["name"])
            spec = shapes_detector(f"{kind}_tiny32", args, rank, world, device)
        teacher = load_detector(spec, "--teacher").requires_grad_(False).to(device)
        check_classes(teacher, data.classes, f"--teacher {spec}")
    start = args.init or shapes_detector(args.student, args, rank, world, device)
    seed_all(args.seed)
    if start in ("imagenet", "none"):
        student = new_detector(args.student, data.classes, start)
        if teacher and rank == 0:
            print(f"warning: --init {start}: the paper distils students that are trained already; prototypes "
                  "of an untrained one are noise", flush=True)
    else:
        student = load_detector(start, "--init")
        check_classes(student, data.classes, f"--init {start}")
    if teacher and kind_of(teacher) == "retina":  # its anchors are compared one by one
        theirs, ours = (net.anchor_generator.cell_anchors for net in (teacher, student))
        if any(a.shape != b.shape or (a.cpu() - b.cpu()).abs().max() > 1 for a, b in zip(theirs, ours)):
            raise UserError(f"--teacher {args.teacher}: has other anchors than the student; tiny RetinaNets "
                            "have smaller ones")
    if start != "none" and "tiny" not in student.arch["name"]:
        freeze(student)
    # image_size: --eval and --predict see the images as training did
    student.arch.update(classes=list(data.classes), image_size=args.image_size)
    return student.to(device), teacher


def needs_prototypes(args):
    """Whether a loss, or sigma in one, compares coordinates in prototypes."""
    weighs = args.sigma != "none" and args.alpha_feat + args.alpha_resp > 0
    return args.teacher != "none" and (weighs or args.alpha_global > 0 and args.kd_relation == "global")


def make_optimizer(model, algorithm, lr, weight_decay):
    """SGD with momentum 0.9, or AdamW, for all that is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if algorithm == "sgd":
        optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, **fused())
    else:
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, **fused())
    for g in optimizer.param_groups:
        g["base_lr"] = g["lr"]
    return optimizer


def method_of(args):
    """What is distilled, in words, for the start of a run."""
    start = f"from {args.init or 'the student of shapes'}"
    if args.teacher == "none":
        return f"no teacher | {start}"
    changed = [k for k, v in PRESETS[args.preset].items() if k != "photometric" and getattr(args, k) != v]
    other = [f"{dash(k)} {getattr(args, k)}" for k in changed]
    return f"preset {args.preset}{', but ' * bool(other)}{' '.join(other)} | {start}"


def make_bank(args, data, rank, world):
    """The bank of prototypes, still empty; None where no loss needs one."""
    return Bank(args, Instances(data, args, rank, world), data.classes) if needs_prototypes(args) else None


def keep_beside(run, bank, device):
    """last.pt also says whether the run is finished, and holds the prototypes: an earlier student's, which a
    run that was cut off goes on with."""
    run.beside["finished"] = lambda: run.finished and not run.due
    if bank:
        run.beside["bank"] = bank.tensors
        if run.resumed and run.state.get("bank"):
            bank.load(run.state["bank"], device)


def refresh(run, distiller, device):
    """Alg. 2, lines 3 to 6: prototypes of the student as it is now, where they are due."""
    bank = distiller.outside["bank"]
    if not bank or not bank.is_due(run.it, run.args.refresh * run.steps):
        return
    news = bank.refresh(distiller.student, distiller.outside["teacher"], device, run.rank, run.world)
    distiller.train()
    epoch = run.it // run.steps + 1
    if run.it == 0 and run.rank == 0 and (news["without"] or news["few"]):
        without, few = ((", ".join(news[k]) or "-").split(" ") for k in ("without", "few"))
        print(fold(["warning:", "no prototype for", *without, "(sigma is 1, no global loss there);",
                    f"fewer than {bank.args.k} for", *few]), flush=True)
    row = {k: news[k] for k in ("prototypes", "instances", "kept", "seconds")}
    run.log.write(dict(it=run.it + 1, epoch=epoch, refresh=True, **row),
                  f"ep {epoch:02d} {news['prototypes']} prototypes of {news['instances']} instances, "
                  f"{100 * max(0, news['kept']):.0f} % as before | {news['seconds']:.0f}s")
    run.log.restart_clock()


def prepare(args, data, val, student, teacher, rank, world, device):
    """The Distiller with its adapters and its bank; networks described and compiled, the teacher checked, the
    student continued without distillation."""
    example = collate([data[0, 0]])["images"].float()
    for name, net in (("student", student), ("teacher", teacher)):
        if net:
            fast_layout(net, device)
            describe_model(f"{name} {net.arch['name']}", Counted(net), example, rank=rank)
            if args.compile:
                net.backbone.compile()
    if teacher and val and not (Path(args.out) / "last.pt").exists():
        check_teacher(evaluate(teacher, val, rank, world, device, args, most=100)[0], args)
    continued(args, rank, world, device)
    seed_all(args.seed)  # H does not depend on what ran before
    distiller = Distiller(student, teacher, make_bank(args, data, rank, world), args).to(device).train()
    seed_all(args.seed + 1000 * rank)  # here: the same RoIs are drawn with and without distillation
    return distiller


def reported(args):
    """How often a Run evaluates, and what it reports: VOC's test set must not choose the weights."""
    return dict(every=args.epochs if args.data == "shapes" else None, table=class_table,
                report="last" if args.dataset == "voc" else "best")


def rate_factor(args, it, steps):
    """Learning-rate factor of iteration `it`, `steps` an epoch."""
    milestones = (args.epochs * 2 / 3, args.epochs * 11 / 12)
    return warmup_multistep(it, steps, milestones, min(500, args.epochs * steps // 10))


def train(args, rank, world, device):
    """Train under args; returns the last evaluation's metrics (rank 0) or None."""
    data = make_data(args, "train")
    val = make_data(args, "val", like=data.classes)
    open_run(args, rank, args.resume)
    student, teacher = make_pair(args, data, val, rank, world, device)
    distiller = prepare(args, data, val, student, teacher, rank, world, device)
    model = wrap_ddp(distiller, device, world)
    loader, plan = train_loader(data, args.batch_size, rank, world, args.seed, args.workers)
    total_batch = args.batch_size * world * args.accumulate
    paper_batch = 16
    lr = args.lr * total_batch / paper_batch
    optimizer = make_optimizer(distiller, args.optimizer, lr, args.weight_decay)
    run = Run(args, student, optimizer, plain_of(student), len(plan), total_batch, rank, world, device,
              legend=LEGEND, parts=distiller.parts(), **reported(args))
    keep_beside(run, distiller.outside["bank"], device)
    run.describe(method_of(args), lr, args.lr, paper_batch, data, val)
    while True:
        if run.due:
            run.scored(*evaluate(student, val, rank, world, device, args), val)
            model.train()
        if run.finished:
            break
        distiller.decay = 1 - run.it // run.steps / args.epochs if args.kd_decay == "linear" else 1.0
        for batches in run.batches(loader, plan):
            refresh(run, distiller, device)
            factor = rate_factor(args, run.it, run.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            losses = {}
            for n, batch in enumerate(batches, 1):
                model.require_backward_grad_sync = n == len(batches)  # DDP exchanges gradients once a step
                terms = model(to_device(batch, device))
                (sum(terms.values()) / len(batches)).backward()  # Eq. 9
                losses = {k: losses.get(k, 0) + v.detach() / len(batches) for k, v in terms.items()}
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step(losses, lr * factor, distiller.watch)
        run.end_epoch()
    metrics = run.close()
    compare(args, rank)
    return metrics


# ================================================================== the same without distillation

# Flags in which a run and its continuation without distillation must agree.
SAME = """data dataset voc_train voc_val data_seed train_json train_images val_json val_images keep_empty
    first_images image_size init student epochs max_iters optimizer lr weight_decay photometric seed
    amp""".split()


def control_folder(args):
    return Path(args.out) / "control" if args.control == "run" else Path(args.control)


def continued(args, rank, world, device):
    """Trains the same student as long without distillation, in OUT/control; or checks the run that --control
    names."""
    if args.control == "none":
        return
    folder = control_folder(args)
    there, finished = (folder / "last.pt").exists(), False
    if there:
        state = load_checkpoint(folder / "last.pt", "prototype_kd.py")
        theirs = dict(state["args"], total_batch=state["total_batch"])
        ours = dict(vars(args), total_batch=args.batch_size * args.accumulate * world)
        wrong = [k for k in (*SAME, "total_batch") if theirs.get(k) != ours[k]]
        follows = args.control == "run" and args.resume  # --resume changed these flags, for the control, too
        if theirs["teacher"] != "none" or wrong and not follows:
            text = f"--control {folder}: is no continuation without distillation of this run"
            for k in wrong[:1]:
                text += (f": its {k.replace('_', '-')} is {theirs.get(k)}, here {ours[k]}; give another "
                         "folder, or --control none")
            raise UserError(text)
        finished = state.get("finished", False) and not wrong
    if finished:
        return
    if args.control != "run":
        what = "that run is not finished; --resume it first" if there else "no last.pt there"
        raise UserError(f"--control {folder}: {what}")
    if rank == 0:
        print(f"== the student continued without distillation -> {folder}", flush=True)
    more = dict(teacher="none", control="none", out=str(folder), resume=there)
    train(resolve(argparse.Namespace(**vars(args) | more)), rank, world, device)


def compare(args, rank):
    """Prints what a distilled run reports beside what its continuation without distillation does."""
    if rank != 0 or args.control == "none":
        return
    theirs, ours = (read_json(folder / "results.json") for folder in (control_folder(args), Path(args.out)))
    keys = [k for k in ("AP", "AP50", "AP75", "VOC11", "VOCarea") if k in ours]
    gain = {k: ours[k] - theirs[k] for k in keys}
    for name, m in (("continued without distillation", theirs), ("distilled", ours), ("difference", gain)):
        print(f"{name:31s} " + " ".join(f"{k} {m[k]:5.1f}" for k in keys))


# ================================================================== evaluate, predict

@torch.no_grad()
def run_detector(model, batch, device, args):
    """One collated batch -> per image (boxes in original pixels, scores, classes 0 ... C - 1)."""
    batch, columns = to_device(batch, device), model.arch["columns"]
    images = images_of(batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        maps = model.backbone(images.tensors)
    label_of, answer = torch.full((model.arch["outputs"],), -1, device=device), []
    label_of[torch.tensor(columns, device=device)] = torch.arange(len(columns), device=device)
    for found, (h, w), (height, width) in zip(detect(model, images, {k: fp32(v) for k, v in maps.items()}), batch["image_sizes"], batch["original_sizes"]):
        label = label_of[found["labels"]]
        known = label >= 0  # torchvision's COCO weights have outputs for ids that no class has
        answer.append((found["boxes"][known] * found["boxes"].new_tensor([width / w, height / h] * 2), found["scores"][known], label[known]))
    return answer


def evaluate(model, val, rank, world, device, args, most=None):
    """(COCO metrics, detections) on rank 0, (None, None) elsewhere or without a validation set. Images by
    stride over ranks. most: the first so many images only. --dataset voc: VOC's 11-point and area AP50."""
    if val is None:
        return None, None
    model.eval()
    since, results = time.time(), []
    loader = eval_loader(val, rank, world, args.workers, most=most)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        (boxes, scores, labels), = run_detector(model, batch, device, args)
        results += to_coco_results(batch["image_ids"][0], boxes, scores, labels, val.category_ids)
    results = gather(results)
    if rank != 0:
        return None, None
    count = min(len(val), most or len(val))
    truth = val.truth(rows=range(count))
    metrics = coco_evaluate(truth, results)
    if args.dataset == "voc":
        voc = voc_evaluate(truth, results)
        metrics.update(VOC11=voc["AP11"], VOCarea=voc["AP"])
        for name, m in voc["classes"].items():
            metrics["classes"][name].update(VOC11=m["AP11"], VOCarea=m["AP"])
    metrics |= dict(score=metrics["AP"], images=count, seconds=time.time() - since)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "VOC11", "VOCarea")
    numbers = " ".join(f"{k} {metrics[k]:.1f}" for k in names if k in metrics)
    metrics["line"] = f"{count} images | {numbers} | {metrics['seconds']:.0f}s"
    return metrics, results


def evaluate_file(args, rank, world, device):
    """--eval: metrics of a checkpoint, into --out."""
    from common.pictures import write_results
    make_data(args, "val")  # what is missing is told before anything is downloaded
    model = load_detector(args.eval, "--eval")
    size = args.image_size or model.arch.get("image_size")
    val = make_data(args, "val", like=model.arch["classes"], image_size=size)
    check_classes(model, val.classes, f"--eval {args.eval}")
    metrics, results = evaluate(model.to(device), val, rank, world, device, args)
    if rank == 0:
        write_results(Path(args.out), metrics, results, val, args.eval, *model.trained)
        print(f"{class_table(metrics)}\n{metrics['line']}")


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file) and one picture per image into --out."""
    from common.pictures import Pictures
    model = load_detector(args.weights).to(device)
    classes = model.arch["classes"] or [f"class {k}" for k in range(len(model.arch["columns"]))]
    size = max(parse_image_size(args.image_size or model.arch.get("image_size") or "800"))
    for picture in Pictures(args.predict, args.out, args.score):
        image, (h, w) = resize(picture.pixels, size)
        item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(),
                    image_id=0, original_size=picture.pixels.shape[1:])
        picture.save(*run_detector(model, collate([item]), device, args)[0], classes)


# ================================================================== the embedded dataset

def shapes_detector(name, args, rank, world, device):
    """Path of a plainly trained detector for shapes; trained by this script the first time, then cached beside the data."""
    from common.shapes import make_shapes
    if "_tiny" not in name:
        raise UserError(f"--student {name}: with --data shapes faster_tiny8 ... retina_tiny64 are trained on demand; others need --init and --teacher")
    done = make_shapes(seed=args.data_seed).parent / "teachers" / f"{name}-s{args.data_seed}"
    draft = done.with_name(f".{done.name}")  # renamed when finished, so that a killed run is never taken for a detector
    with made_once(done, rank) as missing:
        if missing:
            if rank == 0:
                print(f"== {name}: trained once, cached at {done}", flush=True)
            teacher = name.endswith("32")  # it sees all images
            flags = ["--data", "shapes", "--data-seed", str(args.data_seed), "--teacher", "none"]
            flags += ["--epochs", "8", "--first-images", "0"] if teacher else ["--epochs", "32"]
            flags += ["--init", "none", "--student", name, "--workers", str(args.workers)]
            flags += ["--out", str(draft), "--resume"]
            train(resolve(parse_args(flags)), rank, world, device)
            if rank == 0:
                draft.rename(done)
    return str(done / "best.pt")


def wants_table(args):
    """Whether a command on shapes names nothing that would ask for one run only."""
    if args.table is not None:
        return args.table
    return args.data == "shapes" and not (args.teacher or args.init or args.max_iters or args.val_json)


def shapes_table(args, rank, world, device):
    """Teacher, the student that is distilled, the same continued without distillation, and distilled, in one table."""
    since, rows, out = time.time(), [], Path(args.out)
    kind = kind_of_name(args.student or "faster")
    tiny = [f"{kind}_tiny32", args.student or f"{kind}_tiny8"]
    paths = []
    for role, name in zip(("teacher", "student"), tiny):
        paths.append(shapes_detector(name, args, rank, world, device))
        rows.append((f"{role} {name}", Path(paths[-1]).parent, time.time() - since))
        since = time.time()
    runs = ("continued", "none", "none"), ("distilled", paths[0], str(out / "continued"))
    for word, teacher, control in runs:
        more = dict(teacher=teacher, init=paths[1], student=None, out=str(out / word), control=control,
                    table=False, resume=args.resume and (out / word / "last.pt").exists())
        train(resolve(argparse.Namespace(**vars(args) | more)), rank, world, device)
        rows.append((f"student {word}", out / word, time.time() - since))
        since = time.time()
    if rank == 0:
        results = [read_json(folder / "results.json") for _, folder, _ in rows]
        print(f"\nshapes, {results[-1]['images']} validation images     AP  AP50  AP75   seconds")
        for (name, _, seconds), m in zip(rows, results):
            print(f"{name:31s} {m['AP']:5.1f} {m['AP50']:5.1f} {m['AP75']:5.1f} {seconds:9.0f}")


# ================================================================== flags

EXAMPLES = """
torchrun --nproc_per_node 8 prototype_kd.py      # COCO, Faster R-CNN R101 -> R50
python prototype_kd.py --data shapes             # everything in minutes on a CPU
python prototype_kd.py --predict photo.jpg --weights runs/prototype_kd/best.pt
"""
# flags, the flag that gives them an effect, its values
BELONGS = (
    ("voc_train voc_val", "dataset", ("voc",)),
    ("data_seed table", "data", ("shapes",)),
    ("student", "init", ("imagenet", "none", None)),
    ("lam density_filter", "proto_method", ("pgm",)),
    ("proto_space", "proto_method", ("pgm", "kmeans", "dbscan")),
    ("all_class_prototypes", "kd_relation", ("global",)),
    ("sigma_clamp", "sigma", ("l2", "maxcos", None)))
# the same: flags, the weight of Eq. 9 that must be above 0
WEIGHED = (
    ("kd_relation all_class_prototypes", "alpha_global"),
    ("adapt kd_local bg_weight feat_norm", "alpha_feat"),
    ("resp_tau resp_norm resp_rois", "alpha_resp"))
# flags that no run without prototypes reads
OF_BANK = """k lam refresh proto_method proto_space proto_max_images proto_min_size density_filter
    proj proj_lambda center sigma_clamp""".split()


def voc_lists(text):
    """argparse type of --voc-train and --voc-val."""
    if not re.fullmatch(r"\s*\d{4}_\w+\s*(,\s*\d{4}_\w+\s*)*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected year_list, as 2007_trainval,2012_trainval")
    return text


def saved_run(args):
    """Flags of the run that --resume continues, of its last.pt; of its args.json where it got no further than
    its control."""
    last, first = Path(args.out) / "last.pt", Path(args.out) / "args.json"
    if last.exists():
        return saved_flags(last, "prototype_kd.py")
    header = read_json(first) if first.exists() else dict(args={})
    saved = header.get("args") if isinstance(header, dict) else None
    if saved != {} and (not isinstance(saved, dict) or "proto_method" not in saved):
        raise UserError(f"--resume {args.out}: holds a run of another script")
    return saved


def parse_args(argv=None):
    p = parser(__doc__, EXAMPLES)

    def preset(group, name, text, **options):
        paper, released = (PRESETS[k][name.replace("-", "_")] for k in ("paper", "released"))
        group.add_argument(f"--{name}", help=f"{text} (paper {paper}, released {released})", **options)

    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=("coco", "voc"), default="coco",
                   help="layout of --data; voc: 07+12 trainval, 07 test")
    g.add_argument("--data", help="root, or 'shapes': the embedded dataset (default data/coco; voc: data, "
                   "which holds VOCdevkit)")
    g.add_argument("--voc-train", type=voc_lists, default="2007_trainval,2012_trainval",
                   help="lists of VOC to train on, year_list")
    g.add_argument("--voc-val", type=voc_lists, default="2007_test", help="and to evaluate on")
    g.add_argument("--data-seed", type=SEED, default=0, help="of the embedded dataset")
    g.add_argument("--first-images", type=number(int, 0, 2**31), metavar="N",
                   help="train on the first so many images only, 0 for all "
                   "(default 0; shapes 300, its teacher all)")
    g.add_argument("--image-size", help="short side: 800, a choice 640,800 or a range 480-800 "
                   "(default 800; shapes 72-120; --eval, --predict: as trained)")
    preset(g, "photometric", "training images with other brightness, contrast, saturation and hue; "
           "shapes: off", action=argparse.BooleanOptionalAction)
    g = p.add_argument_group("models")
    g.add_argument("--teacher", help="name in common/zoo.py (faster_r101, retinanet_resnet50_fpn_v2 ...), "
                   "mmdetection .pth or our .pt; none: plain training (default faster_r101; shapes: trained "
                   "on demand)")
    g.add_argument("--init", help="what the student starts from: as --teacher; imagenet; none (default: the "
                   "r50 of the teacher's kind, trained on COCO; --teacher none, voc or own data: imagenet; "
                   "shapes: trained on demand)")
    g.add_argument("--student", help="detector_backbone where it starts from imagenet or none: faster_r50, "
                   "retina_r18, retina_tiny8 ... (default: the teacher's kind, else faster, on r50; shapes "
                   "on tiny8)")
    g.add_argument("--no-teacher-check", action="store_true", help="go on with a teacher of AP below 1")
    g = method = p.add_argument_group("method")
    g.add_argument("--preset", choices=tuple(PRESETS),
                   help="what the flags below are where they are not given (default paper)")
    preset(g, "alpha-global", "alpha_1 of Eq. 9", type=number())
    preset(g, "alpha-feat", "alpha_2 of Eq. 9", type=number())
    preset(g, "alpha-resp", "alpha_3 of Eq. 9", type=number())
    g.add_argument("--k", type=COUNT, default=10, help="K: prototypes of a class and level")
    g.add_argument("--lam", type=number(), default=10.0, help="lambda of Eq. 2, in the selection")
    g.add_argument("--refresh", type=POSITIVE, help="T: epochs between two selections; 0.5 is twice an epoch "
                   "(default 1; shapes 4, of 19 steps each)")
    g.add_argument("--proto-method", choices=("pgm", "kmeans", "dbscan", "ambiguous", "random"),
                   default="pgm", help="how prototypes are picked, Table 6")
    g.add_argument("--proto-space", choices=("both", "student", "teacher"), default="both",
                   help="whose features they are picked by, Table 6")
    g.add_argument("--proto-max-images", type=COUNT, default=800,
                   help="images drawn of each class for the selection")
    preset(g, "proto-min-size", "prototypes only from objects wider and taller than this, pixels of the file",
           type=number())
    preset(g, "density-filter", "share of a class, the least dense in features, that may not be prototype",
           type=number(float, 0, 1, below=True))
    g.add_argument("--proj", choices=("independent", "sequential", "joint"), default="independent",
                   help="projection P of Eqs. 6, 8")
    g.add_argument("--proj-lambda", type=number(), default=0.0, help="lambda in the projection; 0 and "
                   "independent: cosines; 10, the paper's word, shrinks Eq. 6 by 441")
    g.add_argument("--center", action="store_true",
                   help="subtract each space's mean feature first (not in the paper; see README)")
    g.add_argument("--all-class-prototypes", action="store_true",
                   help="Eq. 6 over the prototypes of all classes, not of the object's own")
    preset(g, "sigma", "Eq. 8 by the l2 norm, by the largest cosine, or 1", choices=("l2", "maxcos", "none"))
    preset(g, "sigma-clamp", "keep sigma within 0 and 1", action=argparse.BooleanOptionalAction)
    preset(g, "instances", "objects: true boxes, or the student's positive proposals (anchors)",
           choices=("gt", "proposals"))
    preset(g, "level-assign", "an object counts on all levels, or on the one of its size",
           choices=("all", "fpn"))
    g.add_argument("--kd-relation", choices=("global", "rkd"), default="global",
                   help="Eq. 6, or RKD's relations among objects, Table 4")
    preset(g, "kd-local", "cells of Eq. 7: fgfi where anchors fit an object best, defeat inside its box",
           choices=("fgfi", "defeat"))
    preset(g, "bg-weight", "weight of the other cells in Eq. 7", type=number())
    preset(g, "feat-norm", "Eq. 7 by the number of cells, or by the sum of sigma over them",
           choices=("cells", "sigma"))
    preset(g, "adapt", "H of Eq. 7", choices=("conv1x1relu", "conv1x1", "conv3x3"))
    preset(g, "resp-tau", "temperature of the class scores", type=POSITIVE)
    preset(g, "resp-norm", "KL as the sum over classes, or their mean", choices=("sum", "mean"))
    g.add_argument("--resp-rois", choices=("pos", "all"), default="pos",
                   help="whose class scores: positive proposals (anchors), or all")
    preset(g, "kd-decay", "linear: the global and feature losses fall epoch by epoch, to 0 after the last",
           choices=("none", "linear"))
    g.add_argument("--control", default="run", help="the same student continued without distillation: run it "
                   "too, in OUT/control; the folder of such a run; or none")
    g = p.add_argument_group("schedule")
    g.add_argument("--schedule", choices=("1x", "2x"), help="12 or 24 epochs (default 2x)")
    g.add_argument("--epochs", type=COUNT, help="instead of --schedule (shapes 16); x0.1 at 2/3 and 11/12")
    g.add_argument("--batch-size", type=COUNT, help="images per process and step (default 2; shapes 16)")
    g.add_argument("--optimizer", choices=("sgd", "adamw"), help="(default sgd; shapes adamw)")
    g.add_argument("--lr", type=POSITIVE, help="for a total batch of 16, scaled linearly "
                   "(default 0.02, retina 0.01; shapes 0.002)")
    g.add_argument("--weight-decay", type=number(), default=1e-4)
    g.add_argument("--table", action=argparse.BooleanOptionalAction, help="shapes: teacher, start, continued "
                   "and distilled student in one table; --resume wants its flags again (default where no "
                   "--teacher, --init, --max-iters is given)")
    run_flags(p, "prototype_kd")
    modes = dict(eval="data data_seed workers dataset voc_val val_json val_images",
                 predict="weights score")
    apart = "schedule epochs", "train_json data", "train_json dataset", "val_json dataset"
    args = parse(p, argv, "prototype_kd", modes, belongs=BELONGS, apart=apart, saved=saved_run)
    if args.image_size:
        parse_image_size(args.image_size)
    if args.data == "shapes" and args.dataset == "voc":
        p.error("--dataset voc: --data shapes is read as COCO")
    if not (args.eval or args.predict):
        check_method(p, args, given_flags(p, argv), {a.dest for a in method._group_actions})
    return args


def check_method(p, args, given, method):
    """Stops with a line where flags of the method contradict each other, or were given and have no effect.
    method: names of them all."""
    if args.proto_method in ("kmeans", "dbscan") and args.proto_space == "both":
        p.error(f"--proto-method {args.proto_method}: clusters one space; add --proto-space student or teacher")
    if args.proj == "joint" and not args.proj_lambda:
        p.error("--proj joint: needs --proj-lambda above 0; two prototypes may be almost alike")
    if args.all_class_prototypes and (args.proj != "independent" or args.proj_lambda):
        p.error("--all-class-prototypes: compares cosines; --proj and --proj-lambda must stay independent and 0")
    if args.table and (args.teacher or args.init or args.control != "run"):
        p.error("--table: makes its own teacher, student and control")
    if args.teacher == "none":
        idle = given & (method | {"no_teacher_check"}) - {"preset"}
        if args.control == "none":
            idle = idle - {"control"}
        if idle:
            p.error(f"{dash(min(idle))}: belongs to a --teacher, here it is none")
        return
    if "control" in given and args.control != "none" and args.train_json and not args.val_json:
        p.error(f"--control {args.control}: compares on a validation set, which --val-json names")
    values = argparse.Namespace(**vars(args) | from_preset(args))
    weights = [values.alpha_global, values.alpha_feat, values.alpha_resp]
    if not any(weights):
        p.error("--alpha-global, --alpha-feat and --alpha-resp are 0, nothing is distilled: --teacher none says "
                "so, with --init where the student starts")
    for flags, weight in WEIGHED:
        idle = [f for f in flags.split() if f in given and not getattr(values, weight)]
        if idle:
            p.error(f"{dash(idle[0])}: belongs to {dash(weight)} above 0, here it is 0")
    compares = values.alpha_feat or values.alpha_global  # Eqs. 6 and 7
    levels = values.alpha_feat or values.alpha_global and values.kd_relation == "global"
    for flag, reads in (("kd_decay", compares), ("level_assign", levels),
                        ("instances", compares or values.sigma != "none")):
        if flag in given and not reads:
            p.error(f"{dash(flag)}: belongs to losses that these weights leave out")
    idle = [f for f in OF_BANK if f in given]
    if idle and not needs_prototypes(values):
        p.error(f"{dash(idle[0])}: belongs to losses that use prototypes, Eq. 6 or --sigma in the two others")


def from_preset(args):
    """What the preset says of flags that were not given."""
    return {k: v for k, v in PRESETS[args.preset or "paper"].items() if getattr(args, k) is None}


def resolve(args):
    """The flags with every default that depends on another flag; after this they are only read."""
    from common.zoo import PROTOTYPE_ZOO
    shapes, own = args.data == "shapes", args.train_json is not None
    names = {}  # of detectors that are trained already
    for flag, spec in (("--init", args.init), ("--teacher", args.teacher)):
        if spec not in (None, "imagenet", "none"):
            names[flag] = arch_of(spec, flag)["name"]
    kind = kind_of_name(next(iter(names.values()), args.student or "faster"))
    values = vars(args) | from_preset(args)
    student = None  # --init says it
    if "--init" not in names:
        student = args.student or f"{kind}_{'tiny8' if shapes else 'r50'}"
        kind = split_name(student)[0]
    elif names["--init"].startswith(("cascade", "maskrcnn")):
        raise UserError(f"--init {args.init}: can be a teacher only; a student is Faster R-CNN or RetinaNet")
    teacher = args.teacher
    if teacher == "none" or not (values["alpha_global"] or values["alpha_feat"] or values["alpha_resp"]):
        teacher, control = "none", "none"
        values.update(alpha_global=0.0, alpha_feat=0.0, alpha_resp=0.0)
    else:
        control = "none" if own and not args.val_json else args.control
        if own and not teacher:
            raise UserError("--train-json: needs a --teacher that knows its classes; train one: --teacher "
                            "none --student faster_r101")
        theirs = kind_of_name(names.get("--teacher", kind))
        if theirs != kind:
            raise UserError(f"--teacher {teacher} is a {theirs}, the student a {kind}: they must be of one "
                            "kind")
        teacher = teacher or (None if shapes else f"{kind}_r101")
    init = args.init
    if init is None and not shapes:
        init = "imagenet"
        if teacher != "none" and args.dataset == "coco" and not own and student in PROTOTYPE_ZOO:
            init, student = student, None
    defaults = dict(first_images=0, refresh=1.0, epochs=24, batch_size=2, optimizer="sgd",
                    lr=0.01 if kind == "retina" else 0.02, photometric=values["photometric"])
    if shapes:
        defaults.update(first_images=300, refresh=4.0, epochs=16, batch_size=16, lr=0.002, optimizer="adamw",
                        photometric=False)
    if args.schedule:
        defaults.update(epochs={"1x": 12, "2x": 24}[args.schedule])
    values |= {k: v for k, v in defaults.items() if getattr(args, k) is None}
    values |= dict(preset=args.preset or "paper", data=default_root(args), image_size=default_size(args))
    return argparse.Namespace(**values | dict(teacher=teacher, init=init, student=student, control=control))


# ================================================================== main

def main():
    with started("prototype_kd.py") as (rank, world, device):
        args = parse_args()
        if args.eval or args.predict:
            answer_folder(args.out, rank)
        if args.eval:
            evaluate_file(args, rank, world, device)
        elif args.predict:
            if world > 1:
                raise UserError("--predict: runs in one process; start it with python")
            predict(args, device)
        elif wants_table(args):
            shapes_table(args, rank, world, device)
        else:
            train(resolve(args), rank, world, device)


if __name__ == "__main__":
    main()
