# SPDX-License-Identifier: MIT
"""Box geometry shared by the scripts: priors, coders, IoU and label assigners, all batched.

Letters: B images, A anchors or points over all L levels, M ground-truth boxes (padded, see `valid`).
Boxes are float xyxy pixels of the network input; a box is continuous, so width = x2 - x1 (no "+1").
Nothing here loops over anchors, boxes or classes, and nothing reads a value back from the device:
an image without boxes is M padded rows with valid = False, not a special case.

An assignment is one (B, A) integer tensor: >= 0 index of the box, -1 background, -2 ignored (takes
part in no loss).
"""
import torch

BACKGROUND, IGNORED = -1, -2


def constant(values, device, dtype):
    """Python numbers -> a tensor on the device. Not blocking: a blocking copy waits for all that the GPU has still to do."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


# ------------------------------------------------------------------ priors

def grid_points(level_sizes, strides, offset, device=None, dtype=torch.float32):
    """((j + offset) * s, (i + offset) * s) for every cell, row-major, level after level.

    level_sizes: L pairs (H_l, W_l). offset 0 for the anchor-based detectors, 0.5 for FCOS: mmdetection's
    convention, on which its published weights depend. Returns (A, 2) x, y in pixels.
    """
    points = []
    for (h, w), s in zip(level_sizes, strides):
        y = (torch.arange(h, device=device, dtype=dtype) + offset) * s
        x = (torch.arange(w, device=device, dtype=dtype) + offset) * s
        points.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], 2).flatten(0, 1))
    return torch.cat(points)


def grid_anchors(level_sizes, strides, scales, ratios=(1.0,), device=None, dtype=torch.float32):
    """Anchors of side scale * stride centred on offset-0 grid points; ratio = height / width.

    Within a cell the ratio is the outer and the scale the inner index. Not rounded, unlike torchvision's
    AnchorGenerator, whose anchors would shift every target. Returns (A, 4).
    """
    anchors = []
    ratios, scales = constant(ratios, device, dtype), constant(scales, device, dtype)
    for size, s in zip(level_sizes, strides):
        w = (s / ratios.sqrt()[:, None] * scales).flatten()
        h = (s * ratios.sqrt()[:, None] * scales).flatten()
        base = torch.stack([-w, -h, w, h], 1) / 2  # (anchors per cell, 4)
        centers = grid_points([size], [s], 0, device, dtype)
        anchors.append((centers.repeat(1, 2)[:, None] + base).reshape(-1, 4))
    return torch.cat(anchors)


def cells_inside(sizes, level_sizes, strides, per_cell=1, divisor=32):
    """(B, A) bool: does the cell lie in the image's own canvas, its size rounded up to `divisor`?

    A batch is padded to its largest image; what lies beyond an image's own canvas is not trained on.
    sizes: (B, 2) height, width in pixels before padding.
    """
    canvas = (sizes + divisor - 1) // divisor * divisor  # (B, 2)
    inside = []
    for (h, w), s in zip(level_sizes, strides):
        rows = torch.arange(h, device=sizes.device) * s < canvas[:, :1]  # (B, h)
        cols = torch.arange(w, device=sizes.device) * s < canvas[:, 1:]  # (B, w)
        inside.append((rows[:, :, None] & cols[:, None]).flatten(1).repeat_interleave(per_cell, 1))
    return torch.cat(inside, 1)


# ------------------------------------------------------------------ IoU

def box_area(boxes):
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlap(a, b, eps=1e-6):
    """IoU and GIoU of boxes that broadcast against each other: (..., 4), (..., 4) -> two (...).

    For all pairs pass a[..., :, None, :] and b[..., None, :, :]. torchvision's loss versions select
    overlapping pairs with a boolean index, which makes a GPU wait for the host at every step.
    """
    lt, rb = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    w, h = (rb - lt).clamp(min=0).unbind(-1)  # w * h, since the backward of prod reads a value back from the device
    inter = w * h
    union = (box_area(a) + box_area(b) - inter).clamp(min=eps)
    w, h = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).unbind(-1)
    hull = (w * h).clamp(min=eps)
    iou = inter / union
    return iou, iou - (hull - union) / hull


def pairwise_iou(a, b, eps=1e-6):
    """IoU of all pairs, (..., N, 4) x (..., M, 4) -> (..., N, M), coordinate by coordinate to stay small."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a[..., :, None, :].unbind(-1), b[..., None, :, :].unbind(-1)
    inter = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)
    inter *= (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0)
    union = (box_area(a)[..., :, None] + box_area(b)[..., None, :] - inter).clamp_(min=eps)
    return inter / union


# ------------------------------------------------------------------ coders

def encode_deltas(boxes, anchors, std=(1.0, 1.0, 1.0, 1.0)):
    """(dx, dy, dw, dh) / std that take `anchors` to `boxes` (both (..., 4), boxes of positive size)."""
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    shift = ((boxes[..., :2] + boxes[..., 2:]) - (anchors[..., :2] + anchors[..., 2:])) / 2
    return torch.cat([shift / anchor_size, (size / anchor_size).log()], -1) / constant(std, boxes.device, boxes.dtype)


def decode_deltas(deltas, anchors, std=(1.0, 1.0, 1.0, 1.0), max_log=4.135166556742356):
    """Inverse of encode_deltas; dw, dh are clamped to +-|ln(16/1000)| so that exp cannot explode."""
    deltas = deltas * constant(std, deltas.device, deltas.dtype)
    size = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(-max_log, max_log).exp() / 2
    return torch.cat([center - half, center + half], -1)


def encode_distances(boxes, points):
    """(left, top, right, bottom) pixels from points (..., 2) to the edges of boxes (..., 4); negative outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def decode_distances(distances, points):
    """Inverse of encode_distances."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)


def centerness_target(boxes, points):
    """sqrt of (min/max of left, right) * (min/max of top, bottom), in [0, 1] (FCOS Eq. 3); 0 outside the box."""
    left, top, right, bottom = encode_distances(boxes, points).clamp(min=0).unbind(-1)
    x = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-6)
    y = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-6)
    return (x * y).sqrt()


# ------------------------------------------------------------------ assigners

def assign_atss(anchors, level_counts, gt_boxes, valid, inside, topk=9):
    """ATSS (Zhang et al. 2020, Alg. 1): per box, the anchors whose IoU stands out among its nearest ones.

    Candidates: per level the `topk` anchors nearest to the box centre. Threshold: mean + unbiased std of the
    candidates' IoU. Kept: IoU >= threshold and centre more than 0.01 px inside. Claimed twice: higher IoU.
    anchors (A, 4); level_counts: L ints that sum to A; gt_boxes (B, M, 4); valid (B, M) bool; inside (B, A)
    bool, anchors that may be used at all. Returns (B, A) assignment.
    """
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    gt_centers = (gt_boxes[..., :2] + gt_boxes[..., 2:]) / 2
    distance = (centers - gt_centers[:, :, None]).pow(2).sum(-1).sqrt()  # (B, M, A)
    distance = distance.masked_fill(~inside[:, None], torch.inf)
    nearest, index, start = [], [], 0
    for level, count in zip(distance.split(level_counts, -1), level_counts):
        d, i = level.topk(min(topk, count), largest=False)
        nearest.append(d), index.append(i + start)
        start += count
    usable, index = torch.cat(nearest, -1).isfinite(), torch.cat(index, -1)  # (B, M, up to 9 L)
    iou = overlap(anchors[index], gt_boxes[:, :, None])[0]
    n = usable.sum(-1, keepdim=True)
    mean = (iou * usable).sum(-1, keepdim=True) / n.clamp(min=1)
    std = (((iou - mean) * usable).pow(2).sum(-1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    deep = encode_distances(gt_boxes[:, :, None], centers[index]).amin(-1) > 0.01
    keep = usable & (iou >= mean + std) & deep & valid[..., None]
    claim = torch.full_like(distance, -1.0).scatter(2, index, iou.masked_fill(~keep, -1.0))  # (B, M, A)
    best, owner = claim.max(1)
    return owner.masked_fill(best < 0, BACKGROUND).masked_fill(~inside, IGNORED)


def assign_max_iou(anchors, gt_boxes, valid, inside, positive=0.5, negative=0.4):
    """RetinaNet's rule: IoU >= positive -> best box, < negative -> background, between -> ignored.

    Then every anchor tied at a box's own best IoU is given to that box, whatever the IoU (even 0: mmdetection's
    min_pos_iou 0), a later box overruling an earlier one. Shapes as in assign_atss.
    """
    iou = pairwise_iou(anchors, gt_boxes)  # (B, A, M)
    iou = iou.masked_fill_(~(valid[:, None] & inside[..., None]), -1.0)
    best, owner = iou.max(2)
    owner = owner.masked_fill(best < positive, IGNORED).masked_fill(best < negative, BACKGROUND)
    tied = (iou == iou.amax(1, keepdim=True)) & (iou >= 0)
    forced = torch.arange(iou.shape[2], device=iou.device).where(tied, -1).amax(2)
    return torch.where(forced >= 0, forced, owner).masked_fill(~inside, IGNORED)


def assign_fcos(points, ranges, gt_boxes, valid):
    """FCOS: a point strictly inside a box whose largest edge distance fits its level; the smallest box wins.

    points (A, 2); ranges (A, 2) lowest and highest distance of the point's level, ends included. Returns (B, A).
    """
    sides = encode_distances(gt_boxes[:, None], points[:, None])  # (B, A, M, 4)
    reach = sides.amax(-1)
    fits = (sides.amin(-1) > 0) & (reach >= ranges[:, :1]) & (reach <= ranges[:, 1:]) & valid[:, None]
    area, owner = box_area(gt_boxes)[:, None].where(fits, torch.inf).min(2)
    return owner.masked_fill(area.isinf(), BACKGROUND)
