# SPDX-License-Identifier: MIT
"""DK-DETR: open-vocabulary Deformable DETR, distilled from CLIP by auxiliary queries (Li et al., ICCV 2023).

Idea. A two-stage Deformable DETR compares the feature f of each query with CLIP's text embeddings of the
class names. It is trained on base classes, so it knows no novel name. CLIP's image encoder does: it sees
crops of coarse proposals that look like objects and are no query matched to a base object. To teach f these
embeddings directly would disturb detection. So a second set of queries, the KD queries, goes through the
SAME decoder from the same boxes; their features are distilled and thrown away after training. No object
query ever reads a KD query; what is learnt arrives through shared weights. At test time: a plain detector,
whose names are whatever text is given.

    Eqs. 1, 2  scores of names, sigmoid(cosine / tau)     classify
    Eq. 3  imitation of CLIP's embedding, L1              direct_loss
    Eq. 4  SKD: crop i belongs to feature i, to no other  semantic_loss
    Eq. 5  RKD: similarities must be those of CLIP        relational_loss
    Eq. 6  sum of all losses                              Distiller.forward, summed in train
    Sec. 3.3  KD queries, second pass of the decoder      DKDETR.kd_pass
    Sec. 4.2  what is distilled                           choose_targets

The authors released inference code only. Detector, masks and inference follow it; of the distillation there
are two pages of paper. The open choices that matter are a flag each, with its reason under OPEN, in "flags":
the default is the first value (--crop-fit on shapes: pad). Fixed, most without a flag:
  - KD query and crop are a pair in the first layer only: the later layers look around the object query's
    refined box, while the crop stays that of the encoder's proposal.
  - The last layer's matching says which queries are matched, objectness which of the others come first;
    near-duplicates among the k targets of an image stay, and are each other's negatives in Eq. 4.
  - One crop a box, cut to the image, out of the network's own input (at its edge a row of padding may be
    mixed in); its sides are at least --kd-min-size.
  - F^kd is the last layer's, through the classifier's projection. Gradients reach the object queries that KD
    queries look at. KD queries have no weight decay.
  - Image and batch RKD are added; the batch is a micro-batch of one process, and its map holds pairs of the
    same image, too, and the diagonal. Losses are means over the images that have a target.
  - Eq. 3 is taken on unit features, with lambda_skd (its weight was not published).
  - CLIP is ViT-B/32 ("CLIP" is all that the paper says); COCO runs on LVIS's schedule; no repeat factors.

Differs from the paper or the release:
  1. "886 base classes" are 866; Eq. 5 has no minus (its direction: see --rkd-dir); Sec. 3.3's Q are swapped.
  2. The release's objectness is 1203 wide, of which channel 0 is used: here one channel, prior 0.01.
  3. Names are fed without underscores, brackets and slashes; the release feeds raw ones (for its weights).
     ViLD's 63 prompts a name; the paper only says: such as "a photo of a [CLASS]".
  4. A training crop without objects is drawn again from the same image; after 20 tries it is the whole image.
     Mask targets are means of 2 x 2 pixels, and padding counts in neither mask loss.
  5. Normalisers are sums over all processes, at least 1; --accumulate normalises each micro-batch by its
     own objects. Warm-up is at most a tenth of the run.
  6. best.pt is chosen by base AP50 (LVIS: AP), last.pt is reported; where no class is novel, best.pt, by AP.

Letters: B images, S tokens of all L levels, N queries, D width, T text width, K classes, M objects (padded),
k distilled boxes an image. Boxes in the network: cx, cy, w, h in 0..1 of the valid image; else xyxy pixels.

    torchrun --nnodes 2 --nproc_per_node 8 ... dkdetr.py --masks       # the paper's LVIS run, 16 x 8 images
    torchrun --nproc_per_node 8 dkdetr.py --row t3                     # a row of a table; --rows lists them
    python dkdetr.py --data shapes                                     # everything in minutes on a CPU
    python dkdetr.py --row own --train-json a.json --train-images a/ --novel "red panda,umbrella" ...
    python dkdetr.py --eval runs/dkdetr/last.pt --dataset voc          # transfer: only the names change
    python dkdetr.py --predict photo.jpg --weights runs/dkdetr/best.pt # names of its training, or --classes
    python dkdetr.py --export detector.pt2 --weights runs/dkdetr/best.pt

Expected (paper): LVIS box APr 22.2 (17.3 without KD), AP 33.5; COCO novel 32.3 (9.0), base 61.1 (61.2), in
Table 3 "AP", by its rivals' rows rather AP50: not run here. On shapes, study_dkdetr.py, 4 seeds: AP50 15.7,
45.7 (3.4, 46.8; Eq. 3 alone: 17.0, 46.5), 24 + 8 epochs.
"""
import argparse
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

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
from common.clip import clip_of, get_clip, tell_cut
from common.datasets import (BASE_48, NOVEL_17, CocoDataset, Records, as_pixels, class_names, collate,
                             eval_loader, find_coco, find_lvis, own_files, read_annotations,
                             read_objects365, read_voc, refuse_strange, repeat_factors, require_lvis, respell,
                             same_names, split_classes, train_loader, without)
from common.evaluation import (Detections, class_mean, coco_evaluate, encode_mask, import_lvis, judged,
                               lvis_evaluate, voc_evaluate)
from common.run import (COUNT, POSITIVE, SEED, Run, UserError, answer_folder, check_clip, describe_model,
                        fast_layout, fused, gather, given_flags, load_checkpoint, load_strict, number,
                        open_run, open_table, parse, parser, rebuilding, reduce_mean, rows, run_flags,
                        saved_run, seed_all, started, tell, tell_seen, tell_size, to_device,
                        warmup_multistep, wrap_ddp)


# ================================================================== the paper

class Outputs(NamedTuple):
    """What the detector's forward pass gives: of the encoder's S tokens, then of each decoder layer."""
    objectness: torch.Tensor  # (B, S) logits
    coarse: torch.Tensor      # (B, S, 4) a box of each token
    proposals: torch.Tensor   # (B, N, 4) the N best of these, best first: where the decoder starts
    usable: torch.Tensor      # (B, N) bool: proposals that are not padding, nor on the very border
    boxes: torch.Tensor       # (layers, B, N, 4)
    features: torch.Tensor    # (layers, B, N, T) f of Eq. 1
    hidden: torch.Tensor      # (layers, B, N, D) queries that leave each layer
    decoding: tuple           # Decoding: what the KD queries' pass shares with the object queries'
    masks: dict               # of MaskHead.forward: features, padded, size, valid; None without masks


class Decoding(NamedTuple):
    """A pass of the decoder over the object queries, as far as another pass needs it."""
    positions: torch.Tensor  # (B, N, D) of the queries, from their proposals
    values: list             # of each layer: tokens (B, S, heads, d) that its attention samples
    level_sizes: list        # L pairs (h, w)
    ratio: torch.Tensor      # (B, 1, L, 4) from 0..1 of the valid image to 0..1 of the padded map
    inputs: list             # of each layer: object queries (B, N, D) that enter it
    references: list         # of each layer: boxes (B, N, 4) around which it looks


class Truth(NamedTuple):
    """The labelled objects of a batch."""
    labels: torch.Tensor  # (B, M), -1 = padding
    boxes: torch.Tensor   # (B, M, 4) cx, cy, w, h in 0..1
    scale: torch.Tensor   # (B, 1, 4) w, h, w, h of the valid image, pixels
    counts: list          # objects of each image, on the host


class Settings(NamedTuple):
    """Numbers and choices of the method: the flags of these names say what they are."""
    tau: float = 0.05
    w_skd: float = 0.1
    w_rkd: float = 2.0
    tau_s: float = 0.05
    tau_r: float = 0.2
    skd: str = "bce"
    rkd: str = "both"
    aux_queries: bool = True
    kd_topk: int = 20
    kd_min_size: float = 16.0
    kd_boxes: str = "encoder"
    kd_exclude: str = "matched"
    kd_attn: str = "obj+kd"
    kd_ref: str = "shared"
    rkd_dir: str = "teacher"
    crop_fit: str = "warp"
    shuffle_crops: bool = False


def fp32(x):
    """bf16 of autocast -> fp32; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def classify(features, text, tau=0.05):
    """Eqs. 1 and 2 before the sigmoid: cosine / tau. (..., T), (K, T) -> (..., K) logits up to 1 / tau."""
    features = F.normalize(fp32(features), dim=-1)
    return features @ F.normalize(text, dim=-1).to(features).T / tau  # Eq. 1, and the argument of Eq. 2


def group_mean(total, there):
    """total (G,) -> mean over groups of total / n, n the targets of a group; groups without one do not count,
    those of all processes do. there (G, n) bool: this row is a target."""
    n = there.sum(1)
    return (total / n.clamp(min=1)).sum() / reduce_mean((n > 0).sum().float(), 1.0)


def semantic_loss(f, v, there, tau=0.05):
    """Eq. 4, SKD: the feature of box i and the crop of box i are a pair, all others are none.

    f, v (G, n, T) features and CLIP's embeddings (no_grad), there (G, n) bool: this row is a target, the rest
    is padding, which must be finite. Mean over the groups (images) that hold a target. Without any, 0 with a
    gradient.
    """
    s = F.normalize(f, dim=-1) @ F.normalize(v, dim=-1).transpose(1, 2) / tau  # (G, n, n)
    pair = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    both = there[:, :, None] & there[:, None]
    terms = torch.where(pair, F.softplus(-s), F.softplus(s)) * both  # Eq. 4
    return group_mean(terms.sum((1, 2)), there)


def relational_loss(f, v, there, tau=0.2, direction="teacher"):
    """Eq. 5, RKD: rows of similarities among f must be distributed as those among v. Shapes as in
    semantic_loss. direction: "teacher" is KL(teacher || student), "student" the other way round."""
    both = there[:, :, None] & there[:, None]
    v, f = F.normalize(v, dim=-1), F.normalize(f, dim=-1)
    log_p = (v @ v.transpose(1, 2) / tau).masked_fill(~both, -1e4).log_softmax(-1)
    log_q = (f @ f.transpose(1, 2) / tau).masked_fill(~both, -1e4).log_softmax(-1)
    if direction == "student":
        log_p, log_q = log_q, log_p
    return group_mean((log_p.exp() * (log_p - log_q) * both).sum((1, 2)), there)  # Eq. 5


def as_one_group(x):
    """(B, k, ...) -> (1, B k, ...): all images of the batch together."""
    return x.reshape(1, -1, *x.shape[2:])


def choose_targets(usable, matched, boxes, k, least):
    """Sec. 4.2: the k best proposals of each image that match no object -> (index (B, k), there (B, k) bool:
    this row is one).

    usable, matched (B, N) bool, best proposal first; boxes (B, N, 4) xyxy pixels; those with a side under
    `least` are left out.
    """
    big = (boxes[..., 2:] - boxes[..., :2]).amin(-1) >= least
    good = usable & ~matched & big
    index = (~good).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]  # good ones first, in their order
    return index, good.gather(1, index)


def cosines(f, v, there):
    """Mean cosine of a feature with the crop of its own box and with the others of its image: the losses
    alone do not tell what is learnt."""
    cosine = F.normalize(f, dim=-1) @ v.transpose(1, 2)
    both = there[:, :, None] & there[:, None]
    own = both & torch.eye(both.shape[1], dtype=torch.bool, device=v.device)
    other = both & ~own
    return dict(own=(cosine * own).sum() / own.sum().clamp(min=1),
                other=(cosine * other).sum() / other.sum().clamp(min=1))


W_CLS, W_L1, W_GIOU = 2, 5, 2  # of L_det in Eq. 6, and of the matcher's costs: mmdetection's, none is printed
W_DICE, W_MASK = 8, 2          # of SOIT's masks


def focal_cost(logits, alpha=0.25, gamma=2.0):
    """What it costs to call a query with this logit a positive rather than a negative (Deformable DETR):
    elementwise."""
    p, log_p, log_q = logits.sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits)
    return -alpha * (1 - p) ** gamma * log_p + (1 - alpha) * p ** gamma * log_q


@torch.no_grad()
def match_cost(logits, boxes, gt_boxes, scale):
    """(..., N, M) cost of query n for object m, weighted as the losses are.

    logits (..., N, M): of the class of each object. boxes (..., N, 4), gt_boxes (..., M, 4) in 0..1; scale
    (..., 1, 4): w, h, w, h in pixels.
    """
    pixels, gt_pixels = to_pixels(boxes, scale), to_pixels(gt_boxes, scale)
    giou = overlap(pixels[..., :, None, :], gt_pixels[..., None, :, :])[1]
    l1 = (boxes[..., :, None, :] - gt_boxes[..., None, :, :]).abs().sum(-1)
    return W_CLS * focal_cost(logits) + W_L1 * l1 - W_GIOU * giou


def match(costs, counts):
    """Hungarian matching of a whole step. costs: list of (layers, B, N, M) tensors; counts: objects of each
    image.

    Returns one (4, n) long tensor a list entry, on its device: layer, image, query and object of each match.
    The costs cross to the host together, and the matches return together: two transfers a step, not one per
    image and layer.
    """
    flat = torch.cat([c.flatten() for c in costs]).cpu()
    flat = flat.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)  # the solver refuses anything else
    found = []
    for cost, part in zip(costs, flat.split([c.numel() for c in costs])):
        part, pairs = part.view(cost.shape).numpy(), []
        for layer in range(len(part)):
            for image, count in enumerate(counts):
                query, obj = linear_sum_assignment(part[layer, image, :, :count])
                pairs += [(layer, image, q, o) for q, o in zip(query.tolist(), obj.tolist())]
        found.append(torch.tensor(pairs, dtype=torch.long).view(-1, 4))
    together = torch.cat(found).T.contiguous().to(costs[0].device, non_blocking=True)
    return together.split([len(f) for f in found], 1)


def match_all(out, logits, truth):
    """The matches of the decoder's boxes, layer by layer, and of the encoder's coarse boxes."""
    layers, _, n, _ = logits.shape
    of_object = truth.labels.clamp(min=0)[None, :, None].expand(layers, -1, n, -1)
    cost = match_cost(logits.gather(3, of_object), out.boxes, truth.boxes, truth.scale)  # (layers, B, N, M)
    coarse = []
    for image, objectness in enumerate(out.objectness):  # S = 21,760: an image at a time
        score = objectness[:, None].expand(-1, truth.labels.shape[1])
        coarse.append(match_cost(score, out.coarse[image], truth.boxes[image], truth.scale[image]))
    return match([cost, torch.stack(coarse)[None]], truth.counts)


def box_losses(boxes, gt_boxes, scale):
    """Weighted L1 and GIoU losses, summed over matches (n, 4) in 0..1; scale (n, 4) pixels."""
    giou = overlap(to_pixels(boxes, scale), to_pixels(gt_boxes, scale))[1]
    return W_L1 * (boxes - gt_boxes).abs().sum(), W_GIOU * (1 - giou).sum()


def object_count(counts, most, like):
    """Objects that can be matched (at most `most` an image) of all processes, at least 1, divided by the
    number of processes: DDP averages gradients."""
    return reduce_mean(constant(float(sum(min(c, most) for c in counts)), like.device, like.dtype), 1.0)


def detection_losses(out, logits, truth, matches, coarse_matches):
    """L_det of Eq. 6, as in Deformable DETR: of all decoder layers, and of the encoder's coarse boxes, which
    tell objects from background only. logits (layers, B, N, K)."""
    layer, image, query, obj = matches
    n = object_count(truth.counts, logits.shape[2], logits)
    target = torch.zeros_like(logits)
    target[layer, image, query, truth.labels[image, obj]] = 1
    cls = W_CLS * sigmoid_focal_loss(logits, target, 0.25, 2, "sum")
    l1, giou = box_losses(out.boxes[layer, image, query], truth.boxes[image, obj], truth.scale[image, 0])
    _, image, token, obj = coarse_matches
    coarse_n = object_count(truth.counts, out.objectness.shape[1], logits)
    target = torch.zeros_like(out.objectness)
    target[image, token] = 1
    enc_cls = W_CLS * sigmoid_focal_loss(out.objectness, target, 0.25, 2, "sum")
    enc_box = sum(box_losses(out.coarse[image, token], truth.boxes[image, obj], truth.scale[image, 0]))
    return dict(cls=cls / n, l1=l1 / n, giou=giou / n, enc_cls=enc_cls / coarse_n, enc_box=enc_box / coarse_n)


class Distiller(nn.Module):
    """The method in its default readings, see make_distiller: forward(batch) -> {name: loss}, summed: Eq. 6.

    model: DKDETR. text (K, T): embeddings of the names it is trained on. clip: FrozenCLIP, no nn.Module.
    `kd_active`: the burn-in is over.
    """

    def __init__(self, model, text, clip, settings=Settings(), amp=False):
        super().__init__()
        self.model, self.clip, self.settings, self.amp = model, clip, settings, amp
        self.kd_active = False
        self.watch = {}  # see cosines
        self.register_buffer("text", text, persistent=False)

    def distil(self, on):
        """Begin, or wait with, distillation. KD queries learn while something is distilled into them; DDP
        must be told, so it is wrapped anew."""
        self.kd_active = on
        self.model.kd_queries.requires_grad_(on and self.settings.aux_queries)

    def autocast(self, like):
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.amp)

    def forward(self, batch):
        images = normalise(batch["images"], batch["sizes"])
        with self.autocast(images):
            out = self.model(images, batch["sizes"])
        scale = batch["sizes"].flip(1).repeat(1, 2)[:, None].to(images.dtype)
        gt_boxes = box_convert(batch["boxes"], "xyxy", "cxcywh") / scale
        truth = Truth(batch["labels"], gt_boxes, scale, batch["counts"])
        logits = classify(out.features, self.text, self.settings.tau)  # Eqs. 1, 2: (layers, B, N, K)
        matches, coarse_matches = match_all(out, logits, truth)
        losses = detection_losses(out, logits, truth, matches, coarse_matches)
        if self.model.mask_head:
            losses |= self.mask_losses(out, batch, truth, matches)
        if self.kd_active:
            index, there, crops = self.kd_targets(out, batch, truth, matches)  # Sec. 4.2
            v, there = self.embeddings(batch, crops, there)                    # CLIP's, (B, k, T)
            f = take(self.kd_features(out), index)                             # F^kd, (B, k, T)
            self.watch = cosines(f.detach(), v, there)
            losses |= self.kd_losses(f, v, there)
        return losses

    @torch.no_grad()
    def kd_targets(self, out, batch, truth, matches):
        """Which queries are distilled from which boxes: index (B, k) of queries, there (B, k) bool, crops
        (B, k, 4) xyxy pixels."""
        boxes = cut_boxes(out.proposals, truth.scale)  # (B, N, 4)
        index, there = choose_targets(out.usable, matched_queries(out, matches), boxes,
                                      self.settings.kd_topk, self.settings.kd_min_size)
        return index, there, take(boxes, index)

    @torch.no_grad()
    def embeddings(self, batch, crops, there):
        """V of Eqs. 3 to 5: (B, k, T), CLIP's embedding of each crop that is there, else 0; and there."""
        image, slot = there.nonzero(as_tuple=True)  # waits for the device: CLIP must know how many
        v = self.crop_embeddings(batch, crops[image, slot], image)
        return v.new_zeros(*there.shape, v.shape[1]).index_put((image, slot), v), there

    @torch.no_grad()
    def crop_embeddings(self, batch, boxes, image):
        """CLIP's unit embeddings (n, T) of boxes (n, 4) xyxy pixels of the network's input, all in one
        batch; image (n,) is their owner."""
        pixels = normalise(batch["images"], batch["sizes"], self.clip.grey_levels)
        with self.autocast(boxes):
            if self.settings.crop_fit == "pad":
                return self.clip.encode_crops(pixels, boxes, image)
            rois = torch.cat([image[:, None].to(boxes), boxes], 1)
            crops = roi_align(pixels, rois, self.clip.size, aligned=True)  # a box filter where it shrinks
            return self.clip.encode_images(crops)

    def kd_features(self, out):
        """Features (B, N, T) of the KD queries."""
        with self.autocast(out.boxes):
            return self.model.kd_pass(out, self.settings.kd_attn == "obj+kd", self.settings.kd_ref == "own")

    def kd_losses(self, f, v, there):
        """SKD and RKD of Eq. 6, weighted."""
        s = self.settings
        skd = s.w_skd * semantic_loss(f, v, there, s.tau_s)                        # Eq. 4
        image_rkd = s.w_rkd * relational_loss(f, v, there, s.tau_r, s.rkd_dir)     # Eq. 5 within an image
        batch = [as_one_group(x) for x in (f, v, there)]
        batch_rkd = s.w_rkd * relational_loss(*batch, s.tau_r, s.rkd_dir)          # Eq. 5 within the batch
        return dict(skd=skd, rkd=image_rkd + batch_rkd)

    def mask_losses(self, out, batch, truth, matches):
        """SOIT's losses of the matched queries' masks, of all layers."""
        layer, image, query, obj = matches

        def part(hidden, center, image, obj):
            logits = self.model.mask_head(hidden, center, image, **out.masks)
            target = batch["masks"][image, obj].float() / 4  # sums of 2 x 2 pixels
            h, w = logits.shape[-2:]
            rows = torch.arange(h, device=logits.device) * 2 < batch["sizes"][image, 0, None]
            cols = torch.arange(w, device=logits.device) * 2 < batch["sizes"][image, 1, None]
            return torch.stack(mask_losses(logits, target, rows[:, :, None] & cols[:, None]))

        center = out.boxes[layer, image, query, :2].detach()
        arguments = out.hidden[layer, image, query], center, image, obj
        total = 0
        for chunk in zip(*(t.split(64) for t in arguments)):  # in chunks: at 1024 px an instance takes 12 MB
            total = total + checkpoint(part, *chunk, use_reentrant=False)
        dice, mask = total / object_count(truth.counts, out.boxes.shape[2], out.boxes)
        return dict(dice=dice, mask=mask)


def matched_queries(out, matches):
    """(B, N) bool: queries that the last layer's matching gives an object."""
    layer, image, query, _ = matches
    last = layer == len(out.boxes) - 1
    matched = torch.zeros_like(out.usable)
    matched[image[last], query[last]] = True
    return matched


# ================================================================== what its tables compare with

def direct_loss(f, v, there):
    """Eq. 3: L1 distance of unit features. Shapes as in semantic_loss."""
    distance = (F.normalize(f, dim=-1) - F.normalize(v, dim=-1)).abs().sum(-1)  # Eq. 3
    return group_mean((distance * there).sum(1), there)


class Comparison(Distiller):
    """The rows of Tables 5 to 7, the controls, and the other readings of what is distilled."""

    @torch.no_grad()
    def kd_targets(self, out, batch, truth, matches):
        s, boxes = self.settings, cut_boxes(out.proposals, truth.scale)
        if s.kd_boxes == "decoder":
            boxes = cut_boxes(out.boxes[-1], truth.scale)
        if s.kd_boxes == "gt":  # oracle: the hidden novel objects, and the query nearest to each
            crops = batch["hidden"]
            best, index = box_iou(crops, boxes).max(2)
            return index, (crops[..., 2] > 0) & (best > 0.1), crops
        matched = matched_queries(out, matches)
        if s.kd_exclude == "iou":
            near = box_iou(boxes, batch["boxes"]) >= 0.5  # (B, N, M)
            matched = matched | (near & (truth.labels >= 0)[:, None]).any(-1)
        index, there = choose_targets(out.usable, matched, boxes, s.kd_topk, s.kd_min_size)
        return index, there, take(boxes, index)

    @torch.no_grad()
    def embeddings(self, batch, crops, there):
        v, there = super().embeddings(batch, crops, there)
        if not self.settings.shuffle_crops:
            return v, there
        axis = 0 if len(v) > 1 else 1  # another image's; in a batch of one, another box's
        return v.roll(1, axis), there & there.roll(1, axis)

    def kd_features(self, out):
        return super().kd_features(out) if self.settings.aux_queries else out.features[-1]  # Table 5

    def kd_losses(self, f, v, there):
        s, losses = self.settings, {}
        if s.skd == "bce":
            losses["skd"] = s.w_skd * semantic_loss(f, v, there, s.tau_s)
        elif s.skd == "l1":  # Table 6
            losses["skd"] = s.w_skd * direct_loss(f, v, there)
        groups = []  # Table 7
        if s.rkd in ("image", "both"):
            groups.append((f, v, there))
        if s.rkd in ("batch", "both"):
            groups.append([as_one_group(x) for x in (f, v, there)])
        if groups:
            losses["rkd"] = sum(s.w_rkd * relational_loss(*g, s.tau_r, s.rkd_dir) for g in groups)
        return losses


def make_distiller(model, text, clip, settings=Settings(), amp=False):
    """Distiller, or Comparison where another row or reading is asked for."""
    plain = dict(skd="bce", rkd="both", aux_queries=True, kd_boxes="encoder", kd_exclude="matched",
                 shuffle_crops=False)
    same = all(getattr(settings, name) == value for name, value in plain.items())
    return (Distiller if same else Comparison)(model, text, clip, settings, amp)


# ================================================================== detector

IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BACKBONES = ("r50", "r101", *(f"tiny{width}" for width in (8, 16, 24, 32, 48, 64)))
LARGE = 4096  # above so many tokens an encoder layer computes its samples twice (1024 px: 400 MB an image)


def device_type(x):
    """What torch.autocast is told: it does not know the meta device, on which describe_model counts FLOPs."""
    return "cpu" if x.is_meta else x.device.type


def msda_grid(value, level_sizes, at, weight):
    """Multi-scale deformable attention (Zhu et al. 2021, Eq. 3) by grid_sample.

    value (B, S, H, d): tokens of all levels, H heads. level_sizes: L pairs (h, w), of S cells together. at
    (B, Q, H, L, P, 2): x, y in 0..1 of a level's padded map; outside it is zero. weight (B, Q, H, L, P).
    Returns (B, Q, H * d): the weighted sum of L * P bilinear samples.
    """
    b, _, heads, d = value.shape
    out, grid = 0, 2 * at - 1
    for level, tokens in enumerate(value.split([h * w for h, w in level_sizes], 1)):
        h, w = level_sizes[level]
        image = tokens.permute(0, 2, 3, 1).reshape(b * heads, d, h, w)
        points = grid[:, :, :, level].permute(0, 2, 3, 1, 4).flatten(0, 1)    # (B H, P, Q, 2)
        share = weight[:, :, :, level].permute(0, 2, 3, 1).flatten(0, 1)      # (B H, P, Q)
        samples = F.grid_sample(image, points, align_corners=False)           # (B H, d, P, Q)
        # P is not the last dimension: rows of four numbers would make the backward slow
        out = out + (samples * share[:, None]).sum(2)
    return out.view(b, heads * d, at.shape[1]).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Each query looks at P points of each level, around its reference. Samples are taken in fp32: bf16
    would move a point by a quarter pixel.

    To lift it: this class, msda_grid, fp32, device_type, LARGE; torch.utils.checkpoint's checkpoint.
    """

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
        ray = ray / ray.abs().amax(-1, keepdim=True)  # head k looks along angle 2 pi k / heads
        steps = torch.arange(1, points + 1)[:, None]  # point p at p + 1 cells
        start = (ray[:, None, None] * steps).expand(-1, levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(start.flatten())
        for m in (self.value_proj, self.output_proj):
            nn.init.zeros_(m.bias)

    def values(self, tokens, padded):
        """Tokens (B, S, D), padded (B, S) bool -> (B, S, heads, d), padding zeroed. Apart from forward, so
        that two sets of queries can share it."""
        return self.value_proj(tokens).masked_fill(padded[..., None], 0).unflatten(-1, (self.heads, -1))

    def forward(self, query, reference, values, level_sizes):
        """query (B, Q, D); reference (B, Q, L, 2 or 4) in 0..1 of the padded map: points, or boxes cx, cy, w,
        h, whose size scales the offsets; values: of that method; level_sizes: L pairs (h, w) -> (B, Q, D)."""
        shape = (*query.shape[:2], self.heads, self.levels, self.points)
        offsets = fp32(self.sampling_offsets(query)).view(*shape, 2)
        weight = fp32(self.attention_weights(query)).view(*shape[:3], -1).softmax(-1).view(shape)
        center = reference[:, :, None, :, None, :2]
        if reference.shape[-1] == 2:
            cells = torch.cat([offsets.new_full((1,), n) for h, w in level_sizes for n in (w, h)])
            at = center + offsets / cells.view(-1, 1, 2)
        else:
            at = center + offsets / self.points * reference[:, :, None, :, None, 2:] * 0.5
        with torch.autocast(device_type(query), enabled=False):
            arguments = values.to(at.dtype), level_sizes, at, weight.to(at.dtype)
            if self.training and torch.is_grad_enabled() and query.shape[1] > LARGE:
                out = checkpoint(msda_grid, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out = msda_grid(*arguments)
        return self.output_proj(out)


def take(x, index):
    """Rows of x (B, N, C) at index (B, k) -> (B, k, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def to_pixels(boxes, scale):
    """cx, cy, w, h in 0..1 -> xyxy pixels; scale: w, h, w, h of the valid image, broadcast."""
    return box_convert(boxes, "cxcywh", "xyxy") * scale


def cut_boxes(boxes, scale):
    """The same, cut to the image: (B, N, 4), (B, 1, 4)."""
    return to_pixels(boxes, scale).clamp(min=0).minimum(scale)


def inverse_sigmoid(x, eps=1e-5):
    """logit of x, which is cut to eps .. 1 - eps."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def sine(angle, dim, temperature=10000.0):
    """(...) radians -> (..., dim): sin and cos in turns, at dim / 2 falling frequencies."""
    i = torch.arange(dim, device=angle.device)
    x = angle[..., None] / temperature ** (2 * (i // 2).to(angle) / dim)
    return torch.stack([x[..., 0::2].sin(), x[..., 1::2].cos()], -1).flatten(-2)


def mlp(dim, out):
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, out))


def feed_forward(dim, hidden, dropout):
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim),
                         nn.Dropout(dropout))


class EncoderLayer(nn.Module):
    def __init__(self, dim, hidden, dropout, heads=8, levels=4):
        super().__init__()
        self.attention = DeformableAttention(dim, heads, levels)
        self.ffn = feed_forward(dim, hidden, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, position, reference, padded, level_sizes):
        values = self.attention.values(x, padded)
        x = self.norms[0](x + self.dropout(self.attention(x + position, reference, values, level_sizes)))
        return self.norms[1](x + self.ffn(x))


class DecoderLayer(nn.Module):
    def __init__(self, dim, hidden, dropout, heads, levels):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.attention = DeformableAttention(dim, heads, levels)
        self.ffn = feed_forward(dim, hidden, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, position, reference, values, level_sizes, seen=None):
        """x, position (B, N, D). seen (B, N', D): other queries at the same positions, which x looks at
        besides itself."""
        key = x + position if seen is None else torch.cat([seen + position, x + position], 1)
        value = x if seen is None else torch.cat([seen, x], 1)
        looked = self.self_attention(x + position, key, value, need_weights=False)[0]
        x = self.norms[0](x + self.dropout(looked))
        x = self.norms[1](x + self.dropout(self.attention(x + position, reference, values, level_sizes)))
        return self.norms[2](x + self.ffn(x))


class MaskHead(nn.Module):
    """SOIT's masks (Yu et al. 2022): each query writes the 441 weights of a small deformable attention,
    which draws its mask.

    Mask features: level 0 through one more encoder layer, 8 channels. Every cell of an instance looks, with
    4 heads of 2 channels, at 4 points of them: offsets 8 -> 32 and attention 8 -> 16 come from feature +
    position relative to the box centre; then ReLU and 8 -> 1.
    """
    SPLIT = (8 * 32, 32, 8 * 16, 16, 8, 1)

    def __init__(self, dim, hidden, dropout):
        super().__init__()
        self.encoder = EncoderLayer(dim, hidden, dropout, heads=1, levels=1)
        self.trans, self.norm, self.weights = nn.Linear(dim, 8), nn.LayerNorm(8), mlp(dim, sum(self.SPLIT))

    def features(self, memory, position, reference, padded, level_sizes):
        """Level 0 of the memory (B, S0, D) -> (B, S0, 8)."""
        return self.norm(self.trans(self.encoder(memory, position, reference, padded, level_sizes)))

    def forward(self, query, center, image, features, padded, size, valid):
        """All instances at once: mask logits (n, 4 h, 4 w).

        query (n, D); center (n, 2) x, y of its box; image (n,) which of the B it belongs to; features
        (B, S0, 8), padded (B, S0); size (h, w) of level 0; valid (B, 2) its valid share of x, y.
        """
        (h, w), n = size, len(query)
        parts = fp32(self.weights(query)).split(self.SPLIT, 1)
        features = fp32(features)
        row = (torch.arange(h, device=query.device).to(features) + 1) / h  # as in the release, the far side
        column = (torch.arange(w, device=query.device).to(features) + 1) / w  # of each cell
        y = sine((row / valid[image, 1:] - center[:, 1:]) * (2 * math.pi), 4)      # (n, h, 4)
        x = sine((column / valid[image, :1] - center[:, :1]) * (2 * math.pi), 4)   # (n, w, 4)
        where = torch.cat([y[:, :, None].expand(-1, -1, w, -1), x[:, None].expand(-1, h, -1, -1)], -1)
        q = features[image] + where.flatten(1, 2)                                  # (n, S0, 8)
        value = features.masked_fill(padded[..., None], 0)[image]                  # (n, S0, 8)
        offsets = linear_each(q, *parts[0:2]).view(n, h * w, 4, 1, 4, 2)  # heads, levels, points, x y
        weight = linear_each(q, *parts[2:4]).view(n, h * w, 4, 1, 4).softmax(-1)
        columns, rows = (torch.arange(w).to(q) + 0.5) / w, (torch.arange(h).to(q) + 0.5) / h
        cell = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)
        at = cell[:, None, None, None] + offsets / offsets.new_tensor([w, h])
        drawn = msda_grid(value.unflatten(-1, (4, 2)), [size], at, weight).relu()
        logit = linear_each(drawn, *parts[4:6])[..., 0]  # (n, S0)
        return aligned_bilinear(logit.view(n, 1, h, w), 4)[:, 0]


def linear_each(x, weight, bias):
    """A linear layer for each instance: x (n, S, i), weight (n, o * i), bias (n, o) -> (n, S, o)."""
    weight = weight.unflatten(1, (bias.shape[1], x.shape[2]))
    return torch.einsum("nsi,noi->nso", x, weight) + bias[:, None]


def aligned_bilinear(x, factor):
    """Upsampling that keeps cell centres where a stride of `factor` puts them: (n, 1, h, w) ->
    (n, 1, factor h, factor w)."""
    h, w = x.shape[-2:]
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, (factor * h + 1, factor * w + 1), mode="bilinear", align_corners=True)
    return F.pad(x, (factor // 2, 0, factor // 2, 0), mode="replicate")[..., :factor * h, :factor * w]


def mask_losses(logits, target, valid):
    """Weighted dice and BCE per valid pixel, summed over instances (n, h, w). target in 0..1, valid bool."""
    p, target = (logits.sigmoid() * valid).flatten(1), (target * valid).flatten(1)
    dice = 1 - 2 * (p * target).sum(1) / (p.square().sum(1) + target.square().sum(1) + 1e-5)
    bce = F.binary_cross_entropy_with_logits(logits.flatten(1), target, reduction="none") * valid.flatten(1)
    return W_DICE * dice.sum(), W_MASK * (bce.sum(1) / valid.flatten(1).sum(1).clamp(min=1)).sum()


def normalise(images, sizes, mean_std=IMAGENET):
    """uint8 RGB (B, 3, H, W), sizes (B, 2) h, w -> float; the padding is zeroed AFTER that, so it is the
    mean pixel."""
    mean, std = (constant(v, images.device, torch.float32).view(3, 1, 1) for v in mean_std)
    rows = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
    columns = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    return (images - mean) / std * (rows[:, None, :, None] & columns[:, None, None, :])


class Body(nn.Module):
    """A torchvision ResNet up to C5; returns [C3, C4, C5]. pretrained: stem and layer1 do not learn, their
    BatchNorm uses its running statistics.

    bn "sync": the other BatchNorms learn and use the statistics of the batch, over all GPUs; "frozen":
    running statistics, few images a GPU. last: the last stage that anybody reads; those behind it do not
    exist, for they would get no gradient, for which DDP waits.
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
            # looked up anew: SyncBatchNorm takes the place of the modules of the start
            for m in self.stages[name].modules():
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
    """(Body as far as `levels` reads it, channels of C3, C4, C5) of r50|r101|tinyN; init "imagenet" downloads
    torchvision's V1 weights; "none"; or a file of common/tiny.py's."""
    last = f"layer{min(levels, 3) + 1}"
    if name not in BACKBONES:
        raise UserError(f"--backbone {name}: choose among {', '.join(BACKBONES)}")
    if name.startswith("tiny"):
        from common.tiny import tiny_resnet
        width = int(name[4:])
        # shapes: all of it learns; frozen as below it loses 8 points of base AP50 (18 epochs, seed 0)
        return Body(tiny_resnet(name, init), False, bn, last), [2 * width, 4 * width, 8 * width]
    net = getattr(torchvision.models, "resnet" + name[1:])(weights=None)
    if init == "imagenet":
        from common.zoo import imagenet_state
        load_strict(net, *imagenet_state("resnet" + name[1:]))
    return Body(net, init == "imagenet", bn, last), [512, 1024, 2048]


def neck_block(channels, dim, kernel, stride):
    conv = nn.Conv2d(channels, dim, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(32, dim))


class DKDETR(nn.Module):
    """Two-stage Deformable DETR with box refinement whose classifier is a text matrix of width text_dim."""

    def __init__(self, backbone="r50", text_dim=512, dim=256, heads=8, hidden=1024, levels=4, encoder=6,
                 decoder=6, queries=300, dropout=0.1, masks=False, init="none", bn="sync",
                 kd_embed="per_rank"):
        super().__init__()
        self.arch = dict(backbone=backbone, text_dim=text_dim, dim=dim, heads=heads, hidden=hidden,
                         levels=levels, encoder=encoder, decoder=decoder, queries=queries, masks=masks,
                         kd_embed=kd_embed)
        self.queries = queries
        self.body, widths = make_body(backbone, init, bn, levels)
        self.neck = nn.ModuleList(neck_block(c, dim, 1, 1) for c in widths[:levels])
        if levels > 3:
            self.neck.append(neck_block(widths[-1], dim, 3, 2))
        for m in self.neck.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight)
        self.level_embed = nn.Parameter(torch.randn(levels, dim))
        shape = dim, hidden, dropout, heads, levels
        self.encoder = nn.ModuleList(EncoderLayer(*shape) for _ in range(encoder))
        self.memory_trans, self.memory_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.query_trans, self.query_norm = nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim)
        self.decoder = nn.ModuleList(DecoderLayer(*shape) for _ in range(decoder))
        self.objectness = nn.Linear(dim, 1)
        self.refine = nn.ModuleList(mlp(dim, 4) for _ in range(decoder + 1))  # the last: of the encoder
        self.project = nn.ModuleList(nn.Linear(dim, text_dim) for _ in range(decoder))
        self.mask_head = MaskHead(dim, hidden, dropout) if masks else None
        self.start_weights()
        self.kd_queries = nn.Parameter(torch.randn(queries if kd_embed == "per_rank" else 1, dim))

    def start_weights(self):
        """As mmdetection starts the transformer; heads start as nn.Linear does."""
        transformer = "encoder|decoder|memory_trans|query_trans|mask_head.encoder|mask_head.trans"
        for name, p in self.named_parameters():
            attention = re.search("sampling_offsets|attention_weights", name)
            if p.ndim == 2 and re.match(transformer, name) and not attention:
                nn.init.xavier_uniform_(p)
        nn.init.constant_(self.objectness.bias, -math.log(99))
        for head in self.refine:
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    def forward(self, images, sizes):
        """(B, 3, H, W) normalised, sizes (B, 2) valid h, w -> Outputs."""
        maps = self.body(images)
        maps = maps + maps[-1:]  # the fourth level is made from C5, too
        maps = [fp32(block(m)) for block, m in zip(self.neck, maps)]
        level_sizes = [tuple(m.shape[-2:]) for m in maps]
        tokens, positions, padded, anchors, ratio = self.tokens(maps, images.shape[-2:], sizes)
        points = anchors[:, :, None, :2] * ratio[:, None]
        for layer in self.encoder:
            tokens = layer(tokens, positions, points, padded, level_sizes)
        memory = fp32(tokens)
        masks = self.mask_inputs(memory, positions, points, padded, level_sizes, ratio)

        # Two-stage: the best N coarse boxes start the decoder, whose queries know nothing but these boxes.
        objectness, coarse, usable = self.propose(memory, anchors, padded)
        count = self.queries
        if not torch.compiler.is_exporting():  # min() would give the exported program a size that varies
            count = min(count, objectness.shape[1])
        best = objectness.topk(count, 1).indices  # sorted: rank is identity
        proposals = take(coarse.detach(), best).sigmoid()
        code = sine(proposals * (2 * math.pi), memory.shape[2] // 2).flatten(2)    # (B, N, 2 D)
        query_positions, queries = self.query_norm(self.query_trans(code)).chunk(2, -1)
        values = [layer.attention.values(memory, padded) for layer in self.decoder]
        ratio = torch.cat([ratio, ratio], -1)[:, None]
        decoding = Decoding(query_positions, values, level_sizes, ratio, [], [])
        boxes, features, hidden = self.object_pass(queries, proposals, decoding)
        return Outputs(objectness, coarse.sigmoid(), proposals, usable.gather(1, best), boxes, features,
                       hidden, decoding, masks)

    def tokens(self, maps, canvas, sizes):
        """All levels as one sequence. maps: L of (B, D, h, w); canvas (H, W) padded, sizes (B, 2) valid.

        Returns tokens and positions (B, S, D); padded (B, S); anchors (B, S, 4): cell centre and
        0.05 * 2^level in 0..1 of the valid image; valid share of x, y (B, L, 2).
        """
        tokens, positions, padded, anchors, ratios = [], [], [], [], []
        for level, m in enumerate(maps):
            h, w = m.shape[-2:]
            row, column = torch.arange(h, device=m.device), torch.arange(w, device=m.device)
            count_y = (row * canvas[0] // h < sizes[:, :1]).sum(1, keepdim=True)  # valid cells: (B, 1)
            count_x = (column * canvas[1] // w < sizes[:, 1:]).sum(1, keepdim=True)
            at_y, at_x = (row.to(m) + 0.5) / count_y, (column.to(m) + 0.5) / count_x
            grid = torch.stack([at_y[:, :, None].expand(-1, -1, w), at_x[:, None].expand(-1, h, -1)], -1)
            grid = grid.flatten(1, 2)                                             # (B, h w, 2) y, x
            count = torch.stack([count_y, count_x], -1).to(m)                     # (B, 1, 2)
            angle = grid * (count / (count + 1e-6)) * (2 * math.pi)               # 1e-6: mmdetection's
            tokens.append(m.flatten(2).transpose(1, 2))
            positions.append(sine(angle, m.shape[1] // 2).flatten(2) + self.level_embed[level])
            padded.append(((row >= count_y)[:, :, None] | (column >= count_x)[:, None]).flatten(1))
            anchors.append(torch.cat([grid.flip(-1), torch.full_like(grid, 0.05 * 2**level)], -1))
            ratios.append(torch.cat([count_x.to(m) / w, count_y.to(m) / h], 1))
        return (torch.cat(tokens, 1), torch.cat(positions, 1), torch.cat(padded, 1), torch.cat(anchors, 1),
                torch.stack(ratios, 1))

    def mask_inputs(self, memory, positions, points, padded, level_sizes, ratio):
        """What MaskHead.forward needs of level 0, the finest; None without it."""
        if self.mask_head is None:
            return None
        cells = level_sizes[0][0] * level_sizes[0][1]
        features = self.mask_head.features(memory[:, :cells], positions[:, :cells], points[:, :cells, :1],
                                           padded[:, :cells], level_sizes[:1])
        return dict(features=features, padded=padded[:, :cells], size=level_sizes[0], valid=ratio[:, 0])

    def propose(self, memory, anchors, padded):
        """Objectness (B, S), coarse boxes (B, S, 4) as logits, usable (B, S) bool of the encoder's tokens."""
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~padded
        with torch.autocast(device_type(memory), enabled=False):  # bf16 scores would tie
            z = self.memory_norm(self.memory_trans(memory.masked_fill(~usable[..., None], 0)))
            start = (anchors / (1 - anchors)).log().masked_fill(~usable[..., None], math.inf)
            return self.objectness(z)[..., 0], self.refine[-1](z) + start, usable

    def object_pass(self, x, box, decoding):
        """The decoder over object queries x (B, N, D) that start at box (B, N, 4): each layer looks around a
        box and refines it. Returns boxes, features and queries of all layers; fills decoding's lists."""
        boxes, features, hidden = [], [], []
        for index, (layer, refine, project) in enumerate(zip(self.decoder, self.refine, self.project)):
            decoding.inputs.append(x)
            decoding.references.append(box)
            reference = box[:, :, None] * decoding.ratio
            x = layer(x, decoding.positions, reference, decoding.values[index], decoding.level_sizes)
            h = fp32(x)
            with torch.autocast(device_type(h), enabled=False):
                features.append(project(h))
                boxes.append((refine(h) + inverse_sigmoid(box)).sigmoid())
            hidden.append(h)
            box = boxes[-1].detach()
        return torch.stack(boxes), torch.stack(features), torch.stack(hidden)

    def kd_pass(self, out, see_objects=True, own_boxes=False):
        """Sec. 3.3: KD queries through the same decoder, after the object queries, which therefore cannot
        depend on them. Features (B, N, T) of the last layer.

        see_objects: their self-attention reads the object queries, too. own_boxes: they refine the proposals
        by themselves, else they look around the object queries' boxes.
        """
        decoding, (b, n) = out.decoding, out.proposals.shape[:2]
        queries = self.kd_queries[:n] if len(self.kd_queries) > 1 else self.kd_queries.expand(n, -1)
        x, own = queries.expand(b, -1, -1), out.proposals
        for index, layer in enumerate(self.decoder):
            box = own if own_boxes else decoding.references[index]
            seen = decoding.inputs[index] if see_objects else None
            reference = box[:, :, None] * decoding.ratio
            x = layer(x, decoding.positions, reference, decoding.values[index], decoding.level_sizes, seen)
            if own_boxes:
                with torch.autocast(device_type(x), enabled=False):
                    own = (self.refine[index](fp32(x)) + inverse_sigmoid(box)).sigmoid().detach()
        with torch.autocast(device_type(x), enabled=False):
            return self.project[-1](fp32(x))


@torch.no_grad()
def detect(logits, boxes, sizes, count=300):
    """The best `count` (query, class) pairs of each image: list of (boxes (n, 4) xyxy network pixels, scores,
    labels, queries). No NMS. logits (B, N, K), boxes (B, N, 4) of the last layer."""
    best, pair = logits.flatten(1).topk(min(count, logits[0].numel()), 1)  # sigmoids near 1 would tie
    query, label = pair // logits.shape[2], pair % logits.shape[2]
    scale = sizes.flip(1).repeat(1, 2)[:, None].to(best)
    boxes = cut_boxes(take(boxes, query), scale)
    return list(zip(boxes, best.sigmoid(), label, query))  # Eq. 2


@torch.no_grad()
def detect_masks(model, out, image, queries, size, original_size, chunk=32):
    """Masks of some queries of one image: iterates over bool (h, w) of the file, in order. size: (h, w) valid
    in the network's input."""
    h, w = size
    for part in queries.split(chunk):
        hidden, center = out.hidden[-1, image, part], out.boxes[-1, image, part, :2]
        logits = model.mask_head(hidden, center, torch.full_like(part, image), **out.masks)
        masks = F.interpolate(logits.sigmoid()[:, None], scale_factor=2, mode="bilinear", align_corners=True)
        masks = masks[..., :h, :w]  # as the release does
        yield from F.interpolate(masks, original_size, mode="bilinear", align_corners=True)[:, 0] > 0.5


# ================================================================== data

DATASETS = dict(lvis="data/lvis", ovcoco="data/coco", coco="data/coco", objects365="data/objects365",
                voc="data")
CLIP = "ViT-B-32-quickgelu/openai"
QUALITIES = ("good", "bad", "bright", "dark", "low resolution", "cropped", "close-up", "jpeg corrupted",
             "blurry", "pixelated", "black and white")
KINDS = ("nice", "cool", "weird", "small", "large", "clean", "dirty", "hard to see")
TEMPLATES = [f"There is {a} {{}} in the scene." for a in ("a", "the")]  # the 63 of ViLD
TEMPLATES += [f"a photo of {a} {{}} in the scene." for a in ("a", "the", "one")]
TEMPLATES += [f"itap of {a} {{}}." for a in ("a", "my", "the")]
TEMPLATES += [f"a photo of {a} {{}}." for a in ("a", "my", "the", "one", "many")]
TEMPLATES += [f"a {q} photo of {a} {{}}." for q in QUALITIES for a in ("a", "the")]
TEMPLATES += [f"a photo of {a} {q} {{}}." for q in KINDS for a in ("a", "the")]
TEMPLATES += [f"{a} {q} {{}}." for q in ("plastic", "toy", "plushie", "cartoon") for a in ("a", "the")]
TEMPLATES += [f"{a} embroidered {{}}." for a in ("an", "the")]
TEMPLATES += [f"a painting of {a} {{}}." for a in ("a", "the")]
PROMPTS = dict(vild=TEMPLATES, one=("a photo of a {}.",))


def class_split(args, categories):
    """(names to train, novel names), as the file of `categories` spells them. args.base_names, novel_names:
    those of --base and --novel, or of a checkpoint. LVIS: the rare are novel."""
    names = [c["name"] for c in categories]
    if args.base_names or args.novel_names:
        return split_classes(names, None, args.novel_names or None, args.base_names)
    if args.dataset == "lvis":
        rare = {c["name"] for c in categories if c.get("frequency") == "r"}
        return [n for n in names if n not in rare], [n for n in names if n in rare]
    if args.dataset == "ovcoco" and args.data == "shapes":
        from common.shapes import BASE, NOVEL
        return BASE, NOVEL
    if args.dataset == "ovcoco":
        return BASE_48, NOVEL_17
    return names, []


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
        return folder, read_objects365(annotations, folder)
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
    elif files and all("frequency" in c for c in records.categories):
        tell(f"{records.path}: looks like LVIS; --dataset lvis scores it as such")
    base, novel = class_split(args, records.categories)
    options = dict(canvas=args.image_size, jitter=args.jitter, masks=args.masks, keep_empty=args.keep_empty)
    if split == "train":
        if args.base_names:
            refuse_strange(base, records.classes, "--base", records.path)
        hidden = novel if args.kd_boxes == "gt" else ()
        data = CocoDataset(folder, records, True, classes=base, hidden=hidden, **options)
        data.repeats = repeat_factors(data, args.rfs) if args.rfs else None
        return data
    names = [n for n in records.classes if n in {*base, *novel}]
    if not names:
        raise UserError(f"{records.path}: has no class of --dataset {args.dataset}, as {', '.join(base[:3])}")
    # of all that has a box: images without objects count, too; LVIS says of each image which classes count
    whole = args.dataset == "lvis" or {records.classes[k] for k in {*records.label.tolist()}} <= {*names}
    options["keep_empty"] = args.dataset != "ovcoco"  # whose images hold a box of the 65 names each
    return CocoDataset(folder, records, False, classes=None if whole else names, **options)


def as_trained(args, data):
    """The flags with the split of own data: what is trained is base, in the validation file, too. With --base
    alone the rest of both files is novel."""
    if not args.train_json:
        return args
    base, novel = class_split(args, data.records.categories)
    if args.base and not args.novel and (files := own_files(args, "val")):
        novel += without(read_annotations(*files[::-1]).classes, base + novel)
    return argparse.Namespace(**vars(args) | dict(base_names=base, novel_names=novel))


def make_sets(args):
    """(the flags with own data's split, training set, validation set or None, novel names). A name of --novel
    that no file has is told before the first step."""
    data = make_data(args, "train")
    args = as_trained(args, data)
    val = make_data(args, "val")
    novel, there = class_split(args, (val or data).records.categories)[1], data.records
    new = [n for n in novel if n not in there.classes]
    if args.novel and val:
        refuse_strange(args.novel_names, [*there.classes, *val.records.classes], "--novel",
                       f"{there.path}, {val.records.path}")
    elif args.train_json and new:
        tell(f"{val.records.path}: {', '.join(new[:5])}: not in {there.path}, so scored as novel" if val else
             f"{there.path}: has no class {', '.join(new[:5])} to keep out of training")
    if args.train_json and val:
        tell_left_out(val, evaluated_names(args, val), "neither base nor novel")
    return args, data, val, novel


def tell_left_out(val, names, what):
    """Tells of classes of the validation file that are none of `names`, those that are evaluated."""
    if left := [n for n in val.records.classes if n not in names]:
        tell(f"{len(left)} classes of {val.annotations.name} are {what} and left out, first {left[0]}; "
             "--novel names others")


def prompt_name(name, style="clean"):
    """A dataset's class name as a person would say it; "raw": as the file has it."""
    if style == "raw":
        return name
    joined = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor",
              "Bakset": "basket", "Moniter/TV": "monitor or TV"}
    name = re.sub(r"(?<=\w\w)/(?=\w\w)", " or ", joined.get(name, name).replace("_", " "))  # not w/o
    return " ".join(re.sub(r"\((.*?)\)", r" \1", name).split())


def text_matrix(clip, names, templates="vild", style="clean", cache=True):
    """(K, T) unit rows of dataset names. cache: on disk, as 1203 x 63 prompts take an hour on a laptop."""
    folder = Path(torch.hub.get_dir()) / "text" if cache else None
    spoken = names if isinstance(names, str) else [prompt_name(n, style) for n in names]
    tell_cut(clip, spoken, PROMPTS[templates])
    return clip.class_embeddings(spoken, PROMPTS[templates], folder, raw=style == "raw")


# ================================================================== train

LEGEND = dict(
    cls="focal loss of classes, of all decoder layers", l1="L1 loss of boxes", giou="GIoU loss of boxes",
    enc_cls="focal loss of objectness, of the encoder's tokens",
    enc_box="L1 and GIoU loss of the coarse boxes",
    dice="dice loss of masks", mask="cross-entropy of masks",
    skd="Eq. 4, semantic distillation (--skd l1: Eq. 3)", rkd="Eq. 5, relational distillation",
    norm="norm of the gradient, before it is cut to 0.1",
    own="mean cosine of a feature and its crop", other="the same with the other crops of its image")


def plain_of(model, base, novel=()):
    """What a checkpoint holds beside weights; no tensor of CLIP. The names are what --eval looks for."""
    return dict(script="dkdetr.py", arch=model.arch, classes=[*base, *novel], novel=list(novel))


def make_pair(args, rank, device):
    """(student, CLIP) of the flags, on the device."""
    spec = args.clip or ("" if args.data == "shapes" else CLIP)
    clip = get_clip(spec, args.data_seed, device)
    init = args.init
    if init == "shapes":
        from common.tiny import shapes_backbone
        init = shapes_backbone(args.backbone, args.data_seed)
    seed_all(args.seed)
    heads = args.dim // 32 if args.dim < 256 else 8
    student = DKDETR(args.backbone, clip.dim, args.dim, heads, args.hidden, args.levels, args.encoder,
                     args.decoder, args.queries, args.dropout, args.masks, init, args.bn, args.kd_embed)
    seed_all(args.seed + rank)  # dropout differs from process to process
    spec = str(Path(spec).resolve()) if Path(spec).is_file() else spec
    # --eval and --predict see what training saw
    student.arch |= {k: getattr(args, k) for k in SEEN if hasattr(args, k)}
    student.arch |= dict(clip=spec, clip_name=clip.name, name_style="clean")
    fast_layout(student.body, device)
    return student.to(device), clip


def prepare(args, data, novel, student, clip, rank, world, device):
    """The Distiller with its text matrix; the student described and compiled."""
    names = [*data.classes, *(novel if args.train_vocab == "all" else ())]
    text = text_matrix(clip, names, args.templates, cache=args.data != "shapes")
    side = args.image_size
    image, size = torch.zeros(1, 3, side, side), torch.tensor([[side, side]])
    describe_model(f"student DK-DETR {args.backbone}", student, image, size, rank=rank)
    crop = torch.zeros(1, 3, clip.size, clip.size)
    describe_model(f"teacher CLIP {clip.name}, of a crop", clip.model.visual, crop, rank=rank)
    if world > 1 and device.type == "cuda" and args.bn == "sync":
        nn.SyncBatchNorm.convert_sync_batchnorm(student)
    if args.compile:
        student.compile()
    return make_distiller(student, text, clip, settings_of(args), args.amp == "bf16").train()


def settings_of(args):
    """The method's flags."""
    return Settings(**{name: getattr(args, name) for name in Settings._fields})


def distils(args):
    return (args.skd, args.rkd) != ("none", "none")


def parameter_groups(model, lr, decay, backbone=0.1):
    """As the release has it: `backbone` (0.1) of the rate for the backbone, 0.1 for the sampling offsets; no
    decay on norms outside the backbone.

    None on the KD queries either, as on no start that is learnt. The groups do not depend on the numbers:
    --resume may change these.
    """
    rate = dict(body=backbone, offsets=0.1, rest=1.0)
    norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))]
    norms = {id(p) for m in norms for p in m.parameters()}
    groups = {}
    for name, p in model.named_parameters():
        part = "body" if name.startswith("body.") else "offsets" if "sampling_offsets" in name else "rest"
        plain = part != "body" and (id(p) in norms or name == "kd_queries")
        groups.setdefault((part, plain), []).append(p)
    return [dict(params=[p for p in parameters if p.requires_grad], lr=lr * rate[part],
                 base_lr=lr * rate[part], weight_decay=0.0 if plain else decay)
            for (part, plain), parameters in groups.items()]


def method_of(args, clip, data, novel, steps, lr):
    """What is learnt from whom, and when; what the scaling rule did to small data."""
    what = "no distillation"
    if distils(args):
        what = f"SKD {args.skd} RKD {args.rkd} auxiliary queries {args.aux_queries}"
        what += f", from epoch {args.burn_in + 1}"
        what += f": never, of {args.epochs} epochs" if args.burn_in >= args.epochs else ""
        what += ": nothing, no class is novel" if args.kd_boxes == "gt" and not novel else ""
        if args.batch_size == 1 and args.rkd == "both":
            what += ", whose batch is one image: --rkd both counts Eq. 5 within the image twice"
    if args.train_json and args.row != "own" and len(data) < 10_000:
        warm = min(args.warmup, args.epochs * steps // 10)
        what += (f" | {len(data)} images are few: the rate fell to {lr:.1e} by the batch, {warm} of "
                 f"{args.epochs * steps} steps warm up; --row own is for such data")
    return f"CLIP {clip.name} | {what} | {len(data.classes)} base and {len(novel)} novel classes"


def reported(args, novel):
    """How often a Run evaluates, and what it reports: the last, as the paper; the best if none is novel."""
    return dict(every=args.epochs if args.data == "shapes" else None, report="last" if novel else "best",
                metric=chooser(args.dataset, novel).replace("_", " "))


def begin_as_copy(run):
    """--from: this run begins with the state of another's last.pt, or with the weights of its best.pt."""
    path = run.args.start_from
    if not path or run.it > 0:  # resumed; at step 0 a kill came before the copy was saved
        return
    state, where = load_checkpoint(path, "dkdetr.py"), f"--from {path}"
    tell_seen({*state.get("classes", ())} - {*state.get("novel", ())}, run.plain["novel"], where)
    tell_size(state.get("arch", {}), run.args.image_size, where)
    check_clip(state, run.plain, where)
    if "optimizer" in state:
        run.load(state, where, copy=True)
    else:
        load_strict(run.model, state.get("model"), where)
    run.log.bar.initial = run.log.bar.n = run.it
    run.due = run.finished
    run.save()


def at_epoch(model, distiller, run, device, world):
    """The module to train in this epoch: the distiller, wrapped for DDP, anew where distillation begins."""
    active = distils(run.args) and run.it >= run.args.burn_in * run.steps
    if model is None or active != distiller.kd_active:
        distiller.distil(active)
        model = wrap_ddp(distiller, device, world)
    return model


def rate_factor(args, it, steps):
    """Learning-rate factor of iteration `it`, `steps` an epoch."""
    return warmup_multistep(it, steps, (args.epochs * 55 // 70,), min(args.warmup, args.epochs * steps // 10))


def trained(optimizer):
    """The weights that the optimizer has."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(args, rank, world, device):
    """Train under args; returns the last evaluation's metrics (rank 0) or None."""
    args, data, val, novel = make_sets(args)
    open_run(args, rank, args.resume)
    student, clip = make_pair(args, rank, device)
    distiller = prepare(args, data, novel, student, clip, rank, world, device)
    model = None  # see at_epoch
    loader, plan = train_loader(data, args.batch_size, rank, world, args.seed, args.workers)
    total_batch = args.batch_size * world * args.accumulate
    paper_batch = 16 if args.data == "shapes" else 128
    lr = args.lr * total_batch / paper_batch
    groups = parameter_groups(student, lr, args.weight_decay, args.backbone_lr)
    optimizer = torch.optim.AdamW(groups, **fused())
    run = Run(args, student, optimizer, plain_of(student, data.classes, novel), len(plan), total_batch, rank,
              world, device, legend=LEGEND, **reported(args, novel))
    begin_as_copy(run)
    text = method_of(args, clip, data, novel, run.steps, lr)
    run.describe(text, lr, args.lr, paper_batch, data, val)
    while True:
        if run.due:
            run.scored(*evaluate(student, val, clip, rank, world, device, args), val)
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
            norm = nn.utils.clip_grad_norm_(trained(optimizer), 0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step(losses, lr * factor, dict(norm=norm, **distiller.watch))
        run.end_epoch()
    return run.close()


# ================================================================== evaluate, predict

PARTS = ("backbone", "text_dim", "dim", "heads", "hidden", "levels", "encoder", "decoder", "queries", "masks",
         "kd_embed")  # of DKDETR, as its arch has them
# How the authors' model sees images and names; ours say it themselves.
SEEN = dict(image_size=1024, clip=CLIP, clip_name="", data="data/lvis", dataset="lvis", data_seed=0, tau=0.05,
            templates="vild", name_style="raw", closed=False)


def load(weights, flag="--weights"):
    """(DKDETR in eval mode, class names) from a checkpoint of ours, of the authors or of mmdetection.

    The detector is a plain module on the CPU: see predict_image. The names are those of its training; files
    of others know none, and mmdetection's has no text classifier: it is for comparing outputs only. Raises
    UserError, one line, for whatever is wrong with the file; flag: what that line calls it.
    """
    from common import zoo
    whose, *content = zoo.load_any(weights, flag, "dkdetr.py")
    where = f"{flag} {weights}"
    if whose == "ours":
        model, state, classes, novel = rebuilt(content[0], where)
    else:
        model, state = rebuilt_foreign(content[0], where)
        classes, novel = [], None
    # the KD queries are of no use any more
    load_strict(model, state | dict(kd_queries=model.kd_queries.detach()), where)
    model.novel, model.texts = novel, {}
    return model.eval(), classes


def rebuilt(content, where):
    """(model, its weights, class names, the novel ones) of our checkpoint."""
    arch, state = content["arch"], content["model"]
    with rebuilding(where):
        classes = [str(n) for n in content.get("classes", [])]
        novel = [str(n) for n in content.get("novel", [])]
        for part in ("encoder", "decoder"):
            count = len({key.split(".")[1] for key in state if key.startswith(f"{part}.")})
            if arch[part] != count:
                raise UserError(f"{where}: is damaged: it says {part} {arch[part]}, has {count}")
        model = DKDETR(**{k: arch[k] for k in PARTS}, dropout=0.0)
    model.arch = SEEN | arch
    return model, {k: v for k, v in state.items() if k != "kd_queries"}, classes, novel


def rebuilt_foreign(state, where):
    """(model, its weights) of the authors' or mmdetection's keys, renamed; those without a place are told."""
    from common import zoo
    if "neck.convs.0.conv.weight" not in state:
        raise UserError(f"{where}: is neither a checkpoint of dkdetr.py nor a Deformable DETR of "
                        "mmdetection's key names")
    state, unknown = zoo.to_dkdetr(state)
    if unknown:
        print(f"{where}: {len(unknown)} keys have no place here, first {unknown[0]}")
        state = {k: v for k, v in state.items() if k not in unknown}
    width = len(state["project.0.weight"]) if getattr(state.get("project.0.weight"), "ndim", 0) else 0
    if not width or "objectness.weight" not in state:
        raise UserError(f"{where}: is no two-stage, box-refining Deformable DETR")
    model = DKDETR(text_dim=width, masks="mask_head.trans.weight" in state, dropout=0.0)
    # a closed-vocabulary model has as many outputs as classes: its features are logits
    model.arch |= SEEN | dict(closed=width != 512)
    return model, state


def clip_for(model, device, spec=None):
    """The CLIP that a checkpoint was trained with, unless spec (--clip) names another."""
    if model.arch["closed"]:
        raise UserError("the checkpoint is of a closed vocabulary: it has no text classifier for names")
    return clip_of(model.arch, model.arch["text_dim"], spec, device)


@torch.no_grad()
def run_detector(model, batch, texts, amp="none", count=300, masks=False):
    """One collated image -> for each text matrix: (boxes in original pixels, scores, labels, masks or None: a
    list of RLE). Masks of the first only."""
    device = model.level_embed.device
    batch = to_device(batch, device)
    images = normalise(batch["images"], batch["sizes"])
    with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
        out = model(images, batch["sizes"])
    (h, w), (height, width) = batch["sizes"][0].tolist(), batch["original_sizes"][0]
    found = []
    for text in texts:
        logits = classify(out.features[-1], text, model.arch["tau"])
        boxes, scores, labels, queries = detect(logits, out.boxes[-1], batch["sizes"], count)[0]
        codes = None
        if masks and not found:
            once, inverse = queries.unique(return_inverse=True)  # several classes may share a query
            drawn = detect_masks(model, out, 0, once, (h, w), (height, width))
            codes = [encode_mask(m.cpu().numpy()) for m in drawn]
            codes = [codes[i] for i in inverse.tolist()]
        boxes = boxes * torch.tensor([width / w, height / h] * 2, device=device)
        found.append((boxes, scores, labels, codes))
    return found


def find_boxes(model, pixels, text, image_size=None, amp="none", masks=False):
    """(boxes, scores, labels, masks) of uint8 (3, H, W): its long side becomes image_size, as in training."""
    canvas = image_size or model.arch["image_size"]
    height, width = pixels.shape[1:]
    scale = canvas / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    image = TF.resize(pixels, [h, w], interpolation=TF.InterpolationMode.BILINEAR, antialias=False)
    item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0,
                original_size=(height, width))
    return run_detector(model, collate([item], canvas), [text], amp, masks=masks)[0]


def text_of(model, names, clip=None):
    """The text matrix of names for a model of load, on its device; made by its own CLIP the first time."""
    key = names if isinstance(names, str) else tuple(names)
    device = model.level_embed.device
    if key not in model.texts:
        clip = clip or clip_for(model, device)
        arch = model.arch
        model.texts[key] = text_matrix(clip, names, arch["templates"], arch["name_style"],
                                       arch["data"] != "shapes")
    return model.texts[key].to(device)


def predict_image(model, classes, image, score=0.3):
    """(boxes (N, 4) xyxy pixels of `image`, scores (N,), N names), best first, of those above `score`.

    model, classes: of load, or any other names; the model may be moved to a GPU. image: a path or PIL image
    (turned upright as its EXIF says), or a uint8 RGB tensor (3, H, W). The first call with some names loads
    CLIP for their embeddings.
    """
    boxes, scores, labels, _ = find_boxes(model, as_pixels(image), text_of(model, classes))
    keep = scores > score
    return boxes[keep], scores[keep], [classes[k] for k in labels[keep].tolist()]


def evaluated_names(args, val):
    """The class names of an evaluation: the validation set's, base and novel, or those of --classes."""
    if args.classes is None:
        known = set(sum(class_split(args, val.records.categories), []))
        return [n for n in val.classes if n in known]
    chosen = set(respell(class_names(args.classes), val.classes))
    unknown = sorted(chosen - set(val.classes))
    if unknown:
        raise UserError(f"--classes: {', '.join(unknown)} is no class of --dataset {args.dataset}; its names "
                        f"are {', '.join(val.classes[:5])}, ...")
    return [n for n in val.classes if n in chosen]


def evaluate(model, val, clip, rank, world, device, args, zero_shot=False):
    """(metrics, detections) on rank 0, (None, None) elsewhere or without a validation set. Novel and base
    names compete, as in the paper's tables; zero_shot: in a second answer the novel ones only."""
    if val is None:
        return None, None
    model.eval()
    since, names = time.time(), evaluated_names(args, val)
    novel = class_split(args, val.records.categories)[1]
    vocabularies = [names]
    if zero_shot and 0 < len({*names} & {*novel}) < len(names):
        vocabularies.append([n for n in names if n in novel])
    style, cache = model.arch["name_style"], args.data != "shapes"
    texts = [text_matrix(clip, some, args.templates, style, cache) for some in vocabularies]
    ids = [[val.category_ids[val.classes.index(n)] for n in some] for some in vocabularies]
    results = [Detections() for _ in vocabularies]
    loader = eval_loader(val, rank, world, args.workers)
    for batch in tqdm(loader, desc="eval", disable=rank != 0, leave=False, mininterval=1):
        answers = run_detector(model, batch, texts, args.amp, masks=args.masks)
        for found, some, (boxes, scores, labels, codes) in zip(results, ids, answers):
            found.add(batch["image_ids"][0], boxes, scores, labels, some, codes)
    for found in results:
        found.images = gather(found.images)
    if rank != 0:
        return None, None
    # LVIS says of each image which of all names count
    truth = val.truth(None if args.dataset == "lvis" else names, outlines=args.masks)
    metrics = dict(images=len(val), line=f"{len(val)} images")
    for kind in ("bbox", "segm")[:1 + args.masks]:
        prefix, word = ("", "boxes") if kind == "bbox" else ("mask_", "masks")
        stats, keys = dataset_metrics(args, val, truth, results[0], kind, ids[0])
        metrics |= {prefix + k: v for k, v in stats.items()}
        metrics["line"] += f" | {word} " + " ".join(f"{k} {stats[k]:.1f}" for k in keys)
    if len(vocabularies) > 1:
        metrics |= zero_shot_metrics(args, val, vocabularies[1], results[1], ids[1])
        metrics["line"] += f" | novel names alone AP50 {metrics['zero_shot_AP50']:.1f}"
    metrics.update(seconds=time.time() - since, score=metrics[chooser(args.dataset, novel)])
    metrics["line"] += f" | {metrics['seconds']:.0f}s"
    return metrics, results[0]


def chooser(dataset, novel):
    """The number that chooses best.pt: novel labels are not for choosing."""
    if dataset == "voc":
        return "AP50"
    if not novel:
        return "AP"
    return "base_AP" if dataset == "lvis" else "base_AP50"


def dataset_metrics(args, val, truth, results, kind, ids):
    """(numbers of --dataset's own evaluation, names of those to print). kind: bbox or segm."""
    if args.dataset == "voc":
        at_50, at_75 = (voc_evaluate(truth, results, iou, legacy=True) for iou in (0.5, 0.75))
        stats = dict(AP50=at_50["AP11"], AP75=at_75["AP11"], AP50_area=at_50["AP"], AP75_area=at_75["AP"],
                     classes=at_50["classes"])
        return stats, ("AP50", "AP75", "AP50_area", "AP75_area")
    base, novel = class_split(args, val.records.categories)
    if args.dataset == "lvis":
        stats, keys = lvis_evaluate(truth, results, kind, ids), ("AP", "APr", "APc", "APf", "AP50", "AP75")
        per_class, more = ("AP", "AP50"), ("novel_AP", "base_AP") if args.novel_names else ()
    else:
        found = judged(truth, results)
        stats, keys = coco_evaluate(truth, found, kind), ("AP50", "AP") if novel else ("AP", "AP50", "AP75")
        per_class, more = ("AP50", "AR50"), ("novel_AP50", "base_AP50")
    if not novel:
        return stats, keys
    for group, members in (("novel", novel), ("base", base)):
        stats |= {f"{group}_{key}": class_mean(stats, members, key) for key in per_class}
    return stats, (*more, *keys)


def zero_shot_metrics(args, val, names, results, ids):
    """Of the novel names alone, on the images that hold such an object (LVIS: that say so)."""
    if args.dataset == "lvis":
        stats = lvis_evaluate(val.truth(), results, "bbox", ids)
    else:
        truth = val.truth(names, holding=True)
        if not truth["images"]:
            return dict(zero_shot_AP=-1.0, zero_shot_AP50=-1.0)
        stats = coco_evaluate(truth, judged(truth, results.of({i["id"] for i in truth["images"]})))
    return dict(zero_shot_AP=stats["AP"], zero_shot_AP50=stats["AP50"])


def follow(args, model, classes):
    """The flags of --eval and --predict, resolved: dataset, names, prompts, seed of shapes and image size are
    those of the checkpoint's training, where the command names no other."""
    arch = model.arch
    shapes = arch["data"] == "shapes"
    if args.data == "shapes" and not shapes:
        raise UserError("--data shapes: the checkpoint was trained on real classes")
    if shapes and (args.data not in (None, "shapes") or args.dataset in ("voc", "objects365")):
        raise UserError(f"--data {args.data}, --dataset {args.dataset}: the checkpoint was trained on "
                        "shapes and knows these only, as ovcoco, coco or lvis")
    if args.masks and not arch["masks"]:
        raise UserError("--masks: the checkpoint has no mask head")
    known = {name: arch[name] for name in ("dataset", "image_size", "templates")}
    same = args.dataset in (None, arch["dataset"])
    if args.val_json:  # own files
        lvis = arch["dataset"] == "lvis" and "frequency" in read_annotations(args.val_json).categories[0]
        known["dataset"] = "lvis" if lvis else "coco"
    known["masks"] = arch["masks"] and (same or args.dataset in ("lvis", "ovcoco"))
    known = {k: v for k, v in known.items() if getattr(args, k) is None}
    if shapes:
        known.update(data="shapes", data_seed=arch["data_seed"])
    args = resolve(argparse.Namespace(**vars(args) | known | dict(train_json=None)))
    if model.novel is not None and not args.base and (same or args.novel):  # what was novel stays so
        more = without(class_names(args.classes), classes) if args.classes else []
        args.novel_names = args.novel_names + without(model.novel + more, args.novel_names)
        args.base_names = without(classes, args.novel_names) if same else []
    return args


def evaluate_file(args, rank, world, device):
    """--eval: metrics of a checkpoint, into --out."""
    from common.pictures import write_results
    model, classes = load(args.eval, "--eval")
    args = follow(args, model, classes)
    val = make_data(args, "val")
    for flag in ("base", "novel"):
        if getattr(args, flag):
            refuse_strange(getattr(args, flag)[0], val.records.classes, f"--{flag}", val.annotations)
    names = evaluated_names(args, val)  # what is wrong with them is told before CLIP is downloaded
    novel = {*class_split(args, val.records.categories)[1]} & {*names}
    trained = {*classes} - {*(model.novel or ())}
    tell_seen(trained, novel, f"--eval {args.eval}")
    if unseen := without(args.base_names, trained) if args.base and trained else []:
        tell(f"--eval {args.eval}: was not trained on {', '.join(unseen[:5])}, which count as base here")
    if more := without(sorted(novel), args.novel[0]) if args.novel and not args.base else []:
        tell(f"--eval {args.eval}: novel are beside --novel its own {', '.join(more[:5])}")
    if not args.classes:
        tell_left_out(val, names, "not in the checkpoint's vocabulary")
    clip = clip_for(model, device, args.clip)
    metrics, results = evaluate(model.to(device), val, clip, rank, world, device, args, zero_shot=True)
    if rank == 0:
        write_results(Path(args.out), metrics, results, val, args.eval, None, None)
        print(val.report(), metrics["line"], sep="\n")


def predict(args, device):
    """--predict: predictions.json (boxes xyxy, pixels of the file; masks as RLE) and a picture per image."""
    from common.pictures import Pictures
    model, trained_on = load(args.weights)
    named, args = args.dataset, follow(args, model, trained_on)
    pictures = Pictures(args.predict, args.out, args.score)
    classes = trained_on if args.classes is None else class_names(args.classes)
    if args.classes is None and (named or not trained_on):
        classes = sum(class_split(args, make_data(args, "val").records.categories), [])
    clip = clip_for(model.to(device), device, args.clip)
    model.arch["templates"] = args.templates
    text = text_of(model, classes, clip)
    for picture in pictures:
        boxes, scores, labels, codes = find_boxes(model, picture.pixels, text, args.image_size, args.amp,
                                                  args.masks)
        picture.save(boxes, scores, labels, classes, masks=codes)


class Exported(nn.Module):
    """What --export writes: uint8 RGB (B, 3, H, W), resized as in training and padded to its square, and the
    h, w (B, 2) of the pictures in it -> boxes (B, N, 4) xyxy pixels, not cut to the picture, scores (B, N, K)
    of the names whose text matrix is baked in, both before the best pairs are taken; then the features
    (B, N, T): sigmoid(cosine with any CLIP embedding / tau) scores any name."""

    def __init__(self, model, text):
        super().__init__()
        self.model = model
        self.register_buffer("text", text)

    def forward(self, images, sizes):
        out = self.model(normalise(images, sizes), sizes)
        features = out.features[-1]
        scale = sizes.flip(1).repeat(1, 2)[:, None].to(features)
        scores = classify(features, self.text, self.model.arch["tau"]).sigmoid()
        return to_pixels(out.boxes[-1], scale), scores, features


def export(args):
    """--export: the detector as a torch.export (.pt2) or ONNX (.onnx) program, its names baked in."""
    from common.export import export_program
    model, classes = load(args.weights)
    classes = class_names(args.classes) if args.classes else classes
    if not classes:
        raise UserError(f"--weights {args.weights}: knows no names; give --classes")
    clip = clip_for(model, torch.device("cpu"), args.clip)
    export_program(Exported(model, text_of(model, classes, clip)), args.export, ("boxes", "scores"), classes,
                   sized=True)


# ================================================================== flags

EXAMPLES = """
torchrun --nproc_per_node 8 dkdetr.py --dataset ovcoco           # COCO 48/17 in data/coco
python dkdetr.py --data shapes                                   # everything in minutes on a CPU
python dkdetr.py --predict photo.jpg --weights runs/dkdetr/best.pt --classes "red panda,umbrella"
"""
# The paper's or the release's; ours: kd_min_size, crop_fit, and what the header says.
PAPER = dict(image_size=1024, jitter=[0.1, 2.0], templates="vild", backbone="r50", init="imagenet", dim=256,
             hidden=1024, levels=4, encoder=6, decoder=6, queries=300, dropout=0.1, w_skd=0.1, kd_topk=20,
             kd_min_size=16.0, crop_fit="warp", epochs=70, batch_size=8, lr=8e-4, backbone_lr=0.1,
             warmup=2000)
# --data shapes: where it differs. 8 targets have 7 negatives instead of 19, hence the weight of SKD.
SHAPES = dict(image_size=128, jitter=[0.8, 1.25], templates="one", backbone="tiny16", init="shapes", dim=64,
              hidden=128, levels=3, encoder=2, decoder=3, queries=40, dropout=0.0, w_skd=0.3, kd_topk=8,
              kd_min_size=8.0, crop_fit="pad", epochs=24, batch_size=16, lr=1e-3, backbone_lr=1.0, warmup=100)
# What two pages of paper leave open: flag, its values with our default first, what it is and why it is open.
OPEN = (
    ("kd-boxes", ("encoder", "decoder", "gt"), "what is cropped: coarse proposals, as Sec. 3.3 has it for "
     "its first, naive form; or refined boxes, which fit better; gt: the hidden novel objects, an oracle"),
    ("kd-exclude", ("matched", "iou"), "what is no target: Sec. 4.2 drops matched queries only, so that "
     "duplicates of a base object stay; iou: whatever overlaps one by half, too"),
    ("kd-attn", ("obj+kd", "kd"), "what KD queries attend to: Sec. 3.3 blocks only the other direction"),
    ("kd-ref", ("shared", "own"), "boxes KD queries look around: the object queries', or refined by "
     "themselves; the text says nothing of later layers"),
    ("kd-embed", ("per_rank", "shared"), "KD embeddings: the i-th of N belongs to the i-th best "
     "proposal; or one for all, for a rank far down has hardly any gradient"),
    ("rkd-dir", ("teacher", "student"), "KL(teacher || student), Eq. 5 with both R as printed; or "
     "KL(student || teacher), with them swapped back; without its minus sign, which would maximise either"),
    ("crop-fit", ("warp", "pad"), "how a crop becomes CLIP's square, unsaid: stretched by RoIAlign; or whole "
     "pixels, padded, bicubic, as hierkd.py does"))
TABLE = """
    t2              22.2/32.0/40.2/33.5  --masks  # box APr/APc/APf/AP on LVIS; masks 20.5/28.9/35.4/30.0
    t2-none         17.3/32.0/40.0/32.9  --masks --skd none --rkd none  # masks 16.4/28.9/35.3/29.3
    t3              32.3/61.1            --dataset ovcoco  # novel/base on COCO, AP50 by its rivals
    t3-none         9.0/61.2             --dataset ovcoco --skd none --rkd none
    t4-coco         39.4/54.3/43.0       --eval runs/dkdetr-t2/last.pt --dataset coco  # row t2: AP/AP50/AP75
    t4-objects365   12.4/17.3/13.4       --eval runs/dkdetr-t2/last.pt --dataset objects365
    t4-voc          71.3/60.9            --eval runs/dkdetr-t2/last.pt --dataset voc  # AP50/AP75, 11 points
    t5              20.4/30.9/37.6/31.7  --epochs 36  # 36 epochs: burn-in and drop of the rate scale along
    t5-none         17.0/30.0/36.9/30.5  --epochs 36 --skd none --rkd none
    t5-skd          20.0/30.8/37.4/31.5  --epochs 36 --rkd none  # Table 6's BCE, too
    t5-rkd          19.8/30.9/37.6/31.5  --epochs 36 --skd none  # Table 7's last row, too
    t5-no-aux       19.7/27.3/35.6/29.2  --epochs 36 --no-aux-queries
    t6-l1           18.9/30.8/37.3/31.4  --epochs 36 --rkd none --skd l1  # its weight was not published
    t7-image        19.5/30.8/37.4/31.3  --epochs 36 --skd none --rkd image
    t7-batch        19.2/31.2/37.6/31.6  --epochs 36 --skd none --rkd batch
    released-lvis   22.4/31.9/40.1/33.5  --eval RELEASED --masks  # authors' README; masks 20.5/29.0/35.3/30.0
    released-coco   39.3/54.5/42.8       --eval RELEASED --dataset coco  # authors' README
    released-objects365 13.0/17.9/13.9   --eval RELEASED --dataset objects365  # authors' README
    released-voc    71.1/61.3            --eval RELEASED --dataset voc  # authors' README
    own             -  --image-size 640 --templates one --bn frozen OWN  # hundreds of own images; not tuned
"""
# own: the rate and warm-up of shapes (0.001 for 16 images are 0.008 for 128), a milder jitter
ROWS = rows(TABLE, RELEASED="checkpoints/dkd_r50_70e_lvis.pth",
            OWN="--batch-size 4 --lr 0.008 --warmup 100 --jitter 0.5 1.5")
# flags, the flag that gives them an effect, its values
BELONGS = (
    ("images", "dataset", ("lvis", None)), ("w_rkd tau_r rkd_dir", "rkd", ("both", "image", "batch")),
    ("data_seed", "data", ("shapes",)), ("tau_s", "skd", ("bce",)), ("w_skd", "skd", ("bce", "l1")),
    ("bn", "backbone", ("r50", "r101", None)), ("kd_attn kd_ref kd_embed", "aux_queries", (True,)),
    ("kd_exclude kd_topk kd_min_size", "kd_boxes", ("encoder", "decoder")))
DISTILLATION = """aux_queries burn_in kd_topk kd_min_size kd_boxes kd_exclude kd_attn kd_ref kd_embed crop_fit
    shuffle_crops""".split()  # of no effect where there is none
OF_START = """base novel keep_empty rfs dataset image_size jitter clip templates train_vocab tau backbone
    init bn dim hidden levels encoder decoder queries dropout masks kd_embed lr backbone_lr weight_decay
    warmup seed"""  # what a burn-in depends on
NAMING = "dataset images clip templates masks classes"  # what --eval and --predict read


def parse_args(argv=None):
    p = parser(__doc__.split("\n", 1)[0], EXAMPLES)
    both = argparse.BooleanOptionalAction

    def flag(g, name, text, **options):
        full = PAPER.get(name.replace("-", "_"))
        if full is not None:
            small = SHAPES[name.replace("-", "_")]
            text += f" (default {full}" + (f"; shapes {small})" if small != full else ")")
        g.add_argument(f"--{name}", help=text, **options)

    g = p.add_argument_group("data")
    flag(g, "dataset", "lvis (rare is novel), ovcoco (48 base, 17 novel), coco (all its classes); only to "
         "evaluate: objects365, voc (default lvis; shapes ovcoco; own data coco)",
         choices=tuple(DATASETS))
    flag(g, "data", "its root, or 'shapes': the embedded dataset (default data/lvis, data/coco, "
         "data/objects365, data)")
    flag(g, "images", "lvis: folder of train2017 and val2017", default="data/coco")
    flag(g, "base", "names to train on, comma-separated, or a file with one a line, or the flag once a name "
         "(which may then hold a comma); default: all but --novel", action="append", metavar="NAMES|FILE")
    flag(g, "novel", "names that are never trained, and are evaluated apart (--eval: beside the "
         "checkpoint's); given alike", action="append", metavar="NAMES|FILE")
    flag(g, "data-seed", "shapes: seed of the drawn images, tiny CLIP and backbone", type=SEED, default=0)
    flag(g, "image-size", "canvas: images are jittered to --jitter times this, cut, padded to it", type=COUNT)
    flag(g, "jitter", "scales of the jitter", type=POSITIVE, nargs=2, metavar=("LOW", "HIGH"))
    flag(g, "rfs", "repeat-factor sampling threshold, 0 for none, unknown in the paper; LVIS's own is 0.001",
         type=number(), default=0.0)
    g = p.add_argument_group("model")
    flag(g, "clip", f"teacher: MODEL/WEIGHTS of open_clip (default {CLIP}; shapes: the tiny CLIP, trained on "
         "demand)")
    flag(g, "templates", "63 prompts a name, or one", choices=tuple(PROMPTS))
    flag(g, "backbone", "r50, r101, or tiny8 ... tiny64", choices=BACKBONES, metavar="NAME")
    flag(g, "init", "backbone start; shapes: of drawn base objects", choices=("imagenet", "shapes", "none"))
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
    flag(g, "tau", "classifier's temperature, Eq. 2 (--eval: the checkpoint's)", type=POSITIVE, default=0.05)
    g = p.add_argument_group("method")
    flag(g, "skd", "semantic distillation: bce is Eq. 4, l1 Eq. 3 on unit features",
         choices=("bce", "l1", "none"), default="bce")
    flag(g, "rkd", "relational distillation, Eq. 5, Table 7", choices=("both", "image", "batch", "none"),
         default="both")
    flag(g, "aux-queries", "KD queries; else object queries are taught, Table 5", action=both, default=True)
    flag(g, "w-skd", "lambda_skd of Eq. 6; lower it as kd-topk, and so negatives, grow", type=number())
    flag(g, "w-rkd", "lambda_rkd of Eq. 6", type=number(), default=2.0)
    flag(g, "tau-s", "temperature of Eq. 4", type=POSITIVE, default=0.05)
    flag(g, "tau-r", "temperature of Eq. 5", type=POSITIVE, default=0.2)
    flag(g, "burn-in", "epochs without distillation (default 4/7 of --epochs; 0 where one is ready)",
         type=number(int, 0, 2 ** 31))
    flag(g, "kd-topk", "targets of an image", type=COUNT)
    flag(g, "kd-min-size", "smallest side of a target, pixels of the network's input", type=number())
    flag(g, "shuffle-crops", "control: each target gets the crop of another image", action="store_true")
    flag(g, "train-vocab", "names of the classifier in training; all: a control, novel ones as negatives",
         choices=("base", "all"), default="base")
    g = p.add_argument_group("open choices: what the paper does not say")
    for name, values, reason in OPEN:
        flag(g, name, reason, choices=values, default=None if name == "crop-fit" else values[0])
    g = p.add_argument_group("schedule")
    flag(g, "epochs", "rate / 10 at 55/70; the table of shapes takes 5, or 18 with a burn-in", type=COUNT)
    flag(g, "batch-size", "images per process and pass", type=COUNT)
    flag(g, "lr", "for a total batch of 128, shapes 16; scaled linearly", type=POSITIVE)
    flag(g, "backbone-lr", "share of --lr for the backbone", type=number())
    flag(g, "weight-decay", "of AdamW", type=number(), default=0.05)
    flag(g, "warmup", "steps of linear warm-up, at most a tenth of the run", type=number(int, 0, 2 ** 31))
    g.add_argument("--from", "--start-from", dest="start_from", metavar="LAST.PT", help="begin as a copy of "
                   "the run of this last.pt, in all but its flags, which are given anew; of a best.pt: with "
                   "its weights alone, at step 0")
    flag(g, "table", "train a burn-in (shapes: one of the default schedule is ready), go on from it with and "
         "without distillation, and print both (default: on shapes, without --max-iters)", action=both)
    flag(g, "classes", "--predict, --export: any names; --eval: some of the dataset's; given as --base is "
         "(default: those of training)", action="append", metavar="NAMES|FILE")
    run_flags(p, "dkdetr", rows=ROWS, export=True)
    modes = dict(eval=f"{NAMING} base novel data workers val_json val_images",
                 predict=f"{NAMING} data weights score", export="weights clip classes")
    args = parse(p, argv, "dkdetr", modes, only="weights score classes", belongs=BELONGS,
                 apart=("resume start_from", "data train_json"), rows=ROWS,
                 saved=lambda args: same_names(args, saved_run(args, "dkdetr.py", "kd_topk")))
    if args.jitter is not None and args.jitter[0] > args.jitter[1]:
        p.error(f"--jitter {args.jitter[0]} {args.jitter[1]}: expected LOW <= HIGH")
    if args.dim is not None and args.dim % 32:
        p.error(f"--dim {args.dim}: must be a multiple of 32")
    if args.eval and args.dataset and "out" not in given_flags(p, argv):  # one checkpoint on several datasets
        return argparse.Namespace(**vars(args) | dict(out=f"{args.out}-{args.dataset}"))
    if args.eval or args.predict or args.export:
        return args
    if args.row == "own" and not args.train_json:
        p.error("--row own: is for your own data, --train-json and --train-images")
    if args.images != "data/coco" and args.data == "shapes":
        p.error(f"--images {args.images}: --data shapes has its own")
    if args.dataset in ("objects365", "voc"):
        p.error(f"--dataset {args.dataset}: is for --eval; train on lvis, ovcoco or coco, or on own files")
    idle = [f for f in DISTILLATION if f in given_flags(p, argv)]
    if idle and not distils(args):
        p.error(f"--{idle[0].replace('_', '-')}: belongs to --skd or --rkd, here both are none")
    return args


def starts_plain(args):
    """Whether the burn-in that is ready for shapes is what these flags would train."""
    plain = vars(parse_args(["--data", "shapes"])) | dict(dataset="ovcoco", masks=False) | SHAPES
    return all(vars(args)[k] in (None, [], False, plain[k]) for k in OF_START.split())


def resolve(args):
    """The flags with every default that depends on another flag; after this they are only read."""
    shapes = args.data == "shapes"
    dataset = args.dataset or ("coco" if args.train_json else "ovcoco" if shapes else "lvis")
    known = PAPER | dict(dataset=dataset, data=DATASETS[dataset], masks=False)
    if shapes:
        known |= SHAPES
    training = not (args.eval or args.predict or args.export)
    short = args.max_iters or args.start_from
    quick = training and shapes and dataset == "ovcoco" and distils(args)
    known["table"] = bool(quick and not short)
    table = known["table"] if args.table is None else args.table
    ready = shapes and table and not args.burn_in and starts_plain(args)
    if shapes and table:
        known["epochs"] = 5 if ready else 18  # after the burn-in that is ready; with it
    known["burn_in"] = 0 if ready else (args.epochs or known["epochs"]) * 40 // 70
    known = {k: v for k, v in known.items() if getattr(args, k) is None}
    for k in ("base", "novel"):
        known[f"{k}_names"] = getattr(args, f"{k}_names", [])
        if getattr(args, k):
            known[f"{k}_names"] = names = class_names(getattr(args, k), f"--{k}")
            known[k] = [names]  # names, not a file of names, are saved: --resume needs no file
    args = argparse.Namespace(**vars(args) | known)
    if args.init == "imagenet" and args.backbone.startswith("tiny"):
        raise UserError(f"--backbone {args.backbone}: has no ImageNet weights; use --init shapes on shapes, "
                        "else none")
    if training and args.bn == "frozen" and (args.init == "none" or args.backbone.startswith("tiny")):
        raise UserError("--bn frozen: needs a BatchNorm that has been trained; tiny backbones have none, and "
                        "--init none needs --bn sync")
    if training and distils(args) and args.kd_boxes != "gt" and args.kd_topk > args.queries:
        raise UserError(f"--kd-topk {args.kd_topk}: there are {args.queries} --queries to choose from")
    if args.masks and args.image_size % 32:
        raise UserError(f"--image-size {args.image_size}: masks need a multiple of 32")
    unfit = not (ready or 0 < args.burn_in < args.epochs) or short or not distils(args)
    if table and (unfit or args.dataset == "lvis" or args.train_json and not args.val_json):
        raise UserError("--table: compares on ovcoco, shapes or own data, needs a method, a validation set, "
                        "0 < --burn-in < --epochs, and neither --max-iters nor --from")
    return args


# ================================================================== main

BURN_IN, READY = "burn-in", 24  # folder of the table's first run; epochs of the one that is ready for shapes


def shapes_start(args, rank, world, device):
    """Path of what the table of shapes begins from, see trained_before: a burn-in at the whole rate."""
    from common.tiny import trained_before
    batch = max(1, SHAPES["batch_size"] // world)
    _, plan = train_loader(make_data(args, "train"), batch, rank, world, 0, 0)
    flags = (f"--data shapes --data-seed {args.data_seed} --no-table --skd none --rkd none --resume "
             f"--epochs {2 * READY} --max-iters {READY * len(plan)} --batch-size {batch} --workers "
             f"{args.workers} --out").split()
    return trained_before(f"dkdetr-e{READY}", args.data_seed, rank,
                          lambda out: train(resolve(parse_args([*flags, out])), rank, world, device))


def quick_start(args, rank, world, device):
    """--table: the detector with and without distillation, from one burn-in, in a table and a picture."""
    open_table(args, rank)
    root, lines, found = Path(args.out), [], {}
    runs = [("without KD", dict(skd="none", rkd="none")), ("DK-DETR", {})]
    if args.burn_in:
        _, plan = train_loader(make_data(args, "train"), args.batch_size, rank, world, args.seed, 0)
        start = str(root / BURN_IN / "last.pt")
        steps = args.burn_in * -(-len(plan) // args.accumulate)
        runs.insert(0, ("burn-in", dict(max_iters=steps)))
    else:
        start = shapes_start(args, rank, world, device)
    for name, flags in runs:
        since, out = time.time(), root / name.lower().replace(" ", "-")
        more = dict(flags, out=str(out), resume=args.resume and (out / "last.pt").exists(), table=False,
                    start_from=None if name == "burn-in" else start)
        metrics = train(argparse.Namespace(**vars(args) | more), rank, world, device)
        if rank == 0:
            groups = " ".join(f"{metrics.get(k, -1):5.1f}" for k in ("novel_AP50", "base_AP50", "AP50"))
            lines.append(f"{name:14s} {groups} {time.time() - since:9.0f}")
            found[name] = out / "detections.json"
    if rank == 0:
        from common.pictures import save_comparison
        val = make_data(args, "val")
        page = save_comparison(val, found, root, class_split(args, val.records.categories)[1])
        print(f"\n{args.data + ', AP50':14s} novel  base   all   seconds", *lines,
              f"ground truth, and what each finds: {page}", sep="\n")


def main():
    with started("dkdetr.py") as (rank, world, device):
        args = parse_args()
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
        else:
            args = resolve(args)
            (quick_start if args.table else train)(args, rank, world, device)


if __name__ == "__main__":
    main()
