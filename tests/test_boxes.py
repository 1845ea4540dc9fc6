# SPDX-License-Identifier: MIT
"""common/boxes.py against hand-worked numbers, torchvision, and plain loops written from the published rules."""
import math
import statistics
from fractions import Fraction

import pytest
import torch
from torchvision import ops

from common.boxes import (BACKGROUND, IGNORED, assign_atss, assign_fcos, assign_max_iou, box_area, cells_inside, centerness_target,
                          decode_deltas, decode_distances, encode_deltas, encode_distances, grid_anchors, grid_points, overlap,
                          pairwise_iou)

STRIDES = (8, 16, 32, 64, 128)
COCO_LEVELS = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]  # a padded 800 x 1344 image
RETINA_SCALES = [4 * 2 ** (k / 3) for k in range(3)]


def random_boxes(generator, *shape, canvas=200.0, smallest=2.0, largest=150.0, dtype=torch.float64):
    """xyxy boxes whose sizes span small to large, partly outside the canvas."""
    size = smallest * (largest / smallest) ** torch.rand(*shape, 2, generator=generator, dtype=dtype)
    center = torch.rand(*shape, 2, generator=generator, dtype=dtype) * canvas
    return torch.cat([center - size / 2, center + size / 2], -1)


# ------------------------------------------------------------------ priors

def test_800x1344_has_22400_cells_and_201600_retinanet_anchors():
    assert len(grid_points(COCO_LEVELS, STRIDES, 0)) == 16800 + 4200 + 1050 + 273 + 77 == 22400
    assert len(grid_anchors(COCO_LEVELS, STRIDES, RETINA_SCALES, (0.5, 1.0, 2.0))) == 201600


def test_grid_points_are_row_major_x_y_level_after_level():
    expected = [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8], [0, 0], [16, 0]]
    assert grid_points([(2, 3), (1, 2)], (8, 16), 0).tolist() == expected


def test_fcos_points_sit_half_a_stride_in():
    expected = [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert grid_points([(2, 3), (1, 2)], (8, 16), 0.5).tolist() == expected


def test_gfl_anchors_have_side_8_strides_around_the_undisplaced_grid():
    anchors = grid_anchors([(2, 2), (1, 1)], (8, 16), (8,))
    assert anchors.tolist() == [[-32, -32, 32, 32], [-24, -32, 40, 32], [-32, -24, 32, 40], [-24, -24, 40, 40], [-64, -64, 64, 64]]


def test_retinanet_anchor_sizes_ratio_outer_scale_inner():
    anchors = grid_anchors([(1, 2)], (8,), RETINA_SCALES, (0.5, 1.0, 2.0))
    assert anchors.shape == (18, 4)
    w, h = (anchors[:, 2] - anchors[:, 0]).tolist(), (anchors[:, 3] - anchors[:, 1]).tolist()
    assert (w[0], h[0]) == (pytest.approx(45.2548, abs=1e-3), pytest.approx(22.6274, abs=1e-3))  # ratio .5, scale 4: wide
    assert (w[3], h[3]) == (pytest.approx(32, abs=1e-4), pytest.approx(32, abs=1e-4))
    assert (w[4], h[4]) == (pytest.approx(40.3175, abs=1e-3), pytest.approx(40.3175, abs=1e-3))  # next scale, same ratio
    assert (w[6], h[6]) == (pytest.approx(22.6274, abs=1e-3), pytest.approx(45.2548, abs=1e-3))  # ratio 2: tall
    assert (w[8] * h[8]) == pytest.approx((32 * 2 ** (2 / 3)) ** 2, rel=1e-5)  # the ratio keeps the area
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    torch.testing.assert_close(centers, torch.tensor([[0.0, 0.0]] * 9 + [[8.0, 0.0]] * 9))


def test_anchors_are_not_rounded_unlike_torchvision():
    anchor = grid_anchors([(1, 1)], (8,), RETINA_SCALES[:1], (0.5,))[0].tolist()
    assert anchor == pytest.approx([-22.6274, -11.3137, 22.6274, 11.3137], abs=1e-3)


def test_grid_keeps_dtype():
    assert grid_points([(1, 1)], (8,), 0.5, dtype=torch.float64).dtype == torch.float64
    assert grid_anchors([(1, 1)], (8,), (4,), dtype=torch.float64).dtype == torch.float64


def test_cells_inside_rounds_each_image_up_to_32_not_to_the_batch():
    sizes = torch.tensor([[40, 33], [64, 96], [1, 32]])  # canvases 64 x 64, 64 x 96, 32 x 32
    inside = cells_inside(sizes, [(8, 12), (2, 3), (1, 2)], (8, 32, 64))
    assert inside.dtype == torch.bool and inside.shape == (3, 96 + 6 + 2)
    fine, coarse, top = inside.split([96, 6, 2], 1)
    fine = fine.view(3, 8, 12)
    assert fine[0, :8, :8].all() and fine[0].sum() == 64
    assert fine[1].all()
    assert fine[2, :4, :4].all() and fine[2].sum() == 16
    assert coarse.tolist() == [[True, True, False, True, True, False], [True] * 6, [True, False, False, False, False, False]]
    assert top.tolist() == [[True, False], [True, True], [True, False]]  # a cell that starts inside counts


def test_cells_inside_repeats_per_anchor_of_a_cell():
    inside = cells_inside(torch.tensor([[32, 32]]), [(2, 2)], (32,), per_cell=3)
    assert inside.tolist() == [[True] * 3 + [False] * 9]


# ------------------------------------------------------------------ IoU

@pytest.mark.parametrize("a, b, loss", [((0, 0, 2, 2), (1, 1, 3, 3), 68 / 63), ((0, 0, 1, 1), (2, 0, 3, 1), 4 / 3)])
def test_giou_loss_by_hand(a, b, loss):
    assert 1 - overlap(torch.tensor(a).double(), torch.tensor(b).double())[1].item() == pytest.approx(loss, abs=1e-9)


def test_iou_by_hand():
    a, b = torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 0, 15, 10])
    iou, giou = overlap(a, b)
    assert iou.item() == pytest.approx(1 / 3, abs=1e-6) and giou.item() == pytest.approx(1 / 3, abs=1e-6)
    assert overlap(a, a)[0].item() == overlap(a, a)[1].item() == 1.0
    assert pairwise_iou(a[None], b[None]).item() == pytest.approx(1 / 3, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_iou_and_giou_equal_torchvision(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = random_boxes(g, 40), random_boxes(g, 30)
    iou, giou = overlap(a[:, None], b[None])
    torch.testing.assert_close(iou, ops.box_iou(a, b), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(giou, ops.generalized_box_iou(a, b), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pairwise_iou(a, b), ops.box_iou(a, b), rtol=1e-12, atol=1e-12)
    assert (iou == 0).any() and (iou > 0.3).any() and (giou < -0.5).any()  # the sample holds every case


def test_pairwise_iou_batches_and_broadcasts():
    g = torch.Generator().manual_seed(3)
    anchors, boxes = random_boxes(g, 25), random_boxes(g, 2, 3, 7)
    iou = pairwise_iou(anchors, boxes)
    assert iou.shape == (2, 3, 25, 7)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(iou[i, j], ops.box_iou(anchors, boxes[i, j]), rtol=1e-12, atol=1e-12)


def test_pairwise_iou_leaves_its_inputs_alone():
    g = torch.Generator().manual_seed(4)
    a, b = random_boxes(g, 5), random_boxes(g, 4)
    a_before, b_before = a.clone(), b.clone()
    pairwise_iou(a, b)
    assert torch.equal(a, a_before) and torch.equal(b, b_before)


def test_giou_gradient_equals_torchvision():
    g = torch.Generator().manual_seed(5)
    a, b = random_boxes(g, 30), random_boxes(g, 30)
    ours, theirs = a.clone().requires_grad_(), a.clone().requires_grad_()
    (1 - overlap(ours, b)[1]).sum().backward()
    ops.generalized_box_iou_loss(theirs, b, reduction="sum", eps=0).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("b", [(3, 3, 3, 3), (3, 3, 9, 3), (0, 0, 8, 8), (20, 20, 20, 20)])
def test_empty_boxes_give_finite_iou_and_gradient(b):
    a = torch.tensor([3.0, 3, 3, 3], requires_grad=True)
    iou, giou = overlap(a, torch.tensor(b, dtype=torch.float32))
    assert iou.item() == 0 and math.isfinite(giou.item())
    (iou + giou).backward()
    assert a.grad.isfinite().all()
    pair = pairwise_iou(a.detach()[None], torch.tensor([b], dtype=torch.float32))
    assert pair.item() == 0


def test_box_area_by_hand():
    assert box_area(torch.tensor([[[0.0, 0, 2, 3], [1, 1, 1, 9]]])).tolist() == [[6, 0]]


# ------------------------------------------------------------------ coders

def test_encode_deltas_by_hand():
    anchor, box = torch.tensor([0.0, 0, 10, 20]), torch.tensor([5.0, 0, 25, 10])  # centres (5, 10), (15, 5); sizes (10, 20), (20, 10)
    expected = [1.0, -0.25, math.log(2), -math.log(2)]
    assert encode_deltas(box, anchor).tolist() == pytest.approx(expected, abs=1e-6)
    scaled = [10.0, -2.5, 5 * math.log(2), -5 * math.log(2)]
    assert encode_deltas(box, anchor, (0.1, 0.1, 0.2, 0.2)).tolist() == pytest.approx(scaled, abs=1e-5)


@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)])
def test_decode_deltas_inverts_encode(std):
    g = torch.Generator().manual_seed(6)
    boxes, anchors = random_boxes(g, 3, 50, dtype=torch.float32), random_boxes(g, 50, smallest=8, dtype=torch.float32)
    back = decode_deltas(encode_deltas(boxes, anchors, std), anchors, std)
    torch.testing.assert_close(back, boxes, rtol=0, atol=2e-4)
    assert torch.equal(decode_deltas(torch.zeros(4), torch.tensor([2.0, 4, 10, 20])), torch.tensor([2.0, 4, 10, 20]))


def test_decode_deltas_clamps_size_at_1000_sixteenths():
    anchor = torch.tensor([-4.0, -8, 4, 8])
    big = decode_deltas(torch.tensor([0.0, 0, 30, 30]), anchor)
    torch.testing.assert_close(big, anchor * 62.5, rtol=1e-5, atol=0)
    small = decode_deltas(torch.tensor([0.0, 0, -30, -30]), anchor)
    torch.testing.assert_close(small, anchor / 62.5, rtol=1e-5, atol=0)
    just_below = decode_deltas(torch.tensor([0.0, 0, 4.1, 4.1]), anchor)
    torch.testing.assert_close(just_below, anchor * math.exp(4.1), rtol=1e-5, atol=0)
    with_std = decode_deltas(torch.tensor([0.0, 0, 21, 21]), anchor, (0.1, 0.1, 0.2, 0.2))  # 21 * .2 = 4.2 > 4.135
    torch.testing.assert_close(with_std, anchor * 62.5, rtol=1e-5, atol=0)


def test_decode_deltas_does_not_clamp_the_shift():
    moved = decode_deltas(torch.tensor([100.0, -100, 0, 0]), torch.tensor([0.0, 0, 8, 8]))
    assert moved.tolist() == [800, -800, 808, -792]


def test_distances_by_hand_and_back():
    box, point = torch.tensor([10.0, 20, 50, 90]), torch.tensor([15.0, 100.0])
    assert encode_distances(box, point).tolist() == [5, 80, 35, -10]  # left, top, right, bottom; below the box
    g = torch.Generator().manual_seed(7)
    boxes, points = random_boxes(g, 2, 60, dtype=torch.float32), grid_points([(6, 10)], (16,), 0.5)
    torch.testing.assert_close(decode_distances(encode_distances(boxes, points), points), boxes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("point, value", [
    ((5, 10), 1.0), ((2, 5), math.sqrt(2 / 8 * 5 / 15)), ((9, 10), math.sqrt(1 / 9)), ((0, 10), 0.0), ((-1, 10), 0.0), ((5, 21), 0.0),
    ((-1, 21), 0.0)])
def test_centerness_by_hand(point, value):
    got = centerness_target(torch.tensor([0.0, 0, 10, 20]), torch.tensor(point, dtype=torch.float32))
    assert got.item() == pytest.approx(value, abs=1e-6)


def test_centerness_of_an_empty_box_is_finite():
    assert centerness_target(torch.zeros(4), torch.zeros(2)).item() == 0


# ------------------------------------------------------------------ ATSS

def slow_iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def slow_atss(anchors, level_counts, boxes, inside, topk=9):
    """One image, plain lists, from the rule: nearest per level, mean + unbiased std, centre inside, higher IoU."""
    answer = [BACKGROUND if ok else IGNORED for ok in inside]
    claimed = [-1.0] * len(anchors)
    centers = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in anchors]
    for number, box in enumerate(boxes):
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates, start = [], 0
        for count in level_counts:
            level = [a for a in range(start, start + count) if inside[a]]
            level.sort(key=lambda a: math.dist(centers[a], middle))
            candidates += level[:topk]
            start += count
        ious = [slow_iou(anchors[a], box) for a in candidates]
        threshold = statistics.mean(ious) + statistics.stdev(ious)
        for a, iou in zip(candidates, ious):
            x, y = centers[a]
            deep = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if iou >= threshold and deep and iou > claimed[a]:
                claimed[a], answer[a] = iou, number
    return answer


@pytest.mark.parametrize("seed", range(6))
def test_atss_equals_a_slow_loop(seed):
    g = torch.Generator().manual_seed(seed)
    levels, strides = [(16, 20), (8, 10), (4, 5), (2, 3)], (8, 16, 32, 64)
    counts = [h * w for h, w in levels]  # 320, 80, 20, 6: the last has fewer than 9
    anchors = grid_anchors(levels, strides, (8,), dtype=torch.float64)
    boxes = random_boxes(g, 4, 12, canvas=150, smallest=6)
    number = [12, 5, 0, 1]
    valid = torch.tensor([[m < n for m in range(12)] for n in number])
    boxes[~valid] = torch.tensor([20.0, 20, 90, 100]).double() if seed % 2 else 0  # what a padded row holds must not matter
    inside = cells_inside(torch.tensor([[128, 160], [90, 100], [128, 160], [33, 160]]), levels, strides)
    if seed >= 3:
        inside &= torch.rand(inside.shape, generator=g) > 0.2  # also holes
    got = assign_atss(anchors, counts, boxes, valid, inside)
    assert got.shape == (4, sum(counts)) and got.dtype == torch.int64
    for b in range(4):
        expected = slow_atss(anchors.tolist(), counts, boxes[b, :number[b]].tolist(), inside[b].tolist())
        assert got[b].tolist() == expected, f"image {b}"
    assert (got[0] >= 0).sum() > 12 and (got[1] >= 0).any() and (got[2] < 0).all()
    assert (got[1] == IGNORED).any()


def test_atss_example_of_a_box_that_coincides_with_an_anchor():
    """Box (336, 336, 464, 464): threshold 0.5245, nine positives, all of stride 16."""
    counts = [h * w for h, w in COCO_LEVELS]
    anchors = grid_anchors(COCO_LEVELS, STRIDES, (8,))
    box = torch.tensor([[[336.0, 336, 464, 464]]])
    got = assign_atss(anchors, counts, box, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, len(anchors), dtype=torch.bool))
    rows = (got[0] >= 0).nonzero()[:, 0]
    cells = [16800 + 84 * row + column for row in (24, 25, 26) for column in (24, 25, 26)]
    assert rows.tolist() == cells
    ious = ops.box_iou(anchors[rows].double(), box[0].double())[:, 0]
    expected = [49 / 79, 7 / 9, 49 / 79, 7 / 9, 1, 7 / 9, 49 / 79, 7 / 9, 49 / 79]
    torch.testing.assert_close(ious, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("best, expected", [(9.0, BACKGROUND), (10.0, 0)])
def test_atss_threshold_is_mean_plus_unbiased_std(best, expected):
    """IoUs .9 .8 .1 .1: mean + biased std .852 would keep .9, mean + unbiased std .910 does not. 1 .8 .1 .1: threshold .969."""
    anchors = torch.tensor([[0.0, 0, w, 10] for w in (best, 8, 1, 1)])  # against the box (0, 0, 10, 10) the IoU is width / 10
    got = assign_atss(anchors, [4], torch.tensor([[[0.0, 0, 10, 10]]]), torch.ones(1, 1, dtype=torch.bool),
                      torch.ones(1, 4, dtype=torch.bool))
    assert got[0].tolist() == [expected, BACKGROUND, BACKGROUND, BACKGROUND]


def test_atss_anchor_claimed_twice_goes_to_the_higher_iou():
    anchors = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110], [200, 200, 210, 210]])
    loose, tight = [0.0, 0, 14, 14], [0.0, 0, 11, 11]
    every, true = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    assert assign_atss(anchors, [3], torch.tensor([[loose, tight]]), true, every)[0].tolist() == [1, BACKGROUND, BACKGROUND]
    assert assign_atss(anchors, [3], torch.tensor([[tight, loose]]), true, every)[0].tolist() == [0, BACKGROUND, BACKGROUND]


def test_atss_centre_must_be_inside_the_box():
    """The first anchor has by far the best IoU, but its centre is 1 px right of the box."""
    anchors = torch.tensor([[0.0, 0, 12, 10], [40, 40, 50, 50], [60, 60, 70, 70]])
    args = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    assert assign_atss(anchors, [3], torch.tensor([[[0.0, 0, 5, 10]]]), *args)[0].tolist() == [BACKGROUND] * 3
    assert assign_atss(anchors, [3], torch.tensor([[[0.0, 0, 6.005, 10]]]), *args)[0].tolist() == [BACKGROUND] * 3  # 0.005 px
    assert assign_atss(anchors, [3], torch.tensor([[[0.0, 0, 6.05, 10]]]), *args)[0].tolist() == [0, BACKGROUND, BACKGROUND]


# ------------------------------------------------------------------ MaxIoU

def exact_iou(a, b):
    """Integer boxes: an exact fraction, so that ties are ties."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return Fraction(inter, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def slow_max_iou(anchors, boxes, inside):
    """One image -> per anchor the set of acceptable answers (several only where two boxes tie at the best IoU)."""
    answer = []
    for anchor, ok in zip(anchors, inside):
        if not ok:
            answer.append({IGNORED})
            continue
        ious = [exact_iou(anchor, box) for box in boxes]
        best = max(ious, default=Fraction(0))
        if best < Fraction(2, 5):
            answer.append({BACKGROUND})
        elif best < Fraction(1, 2):
            answer.append({IGNORED})
        else:
            answer.append({m for m, iou in enumerate(ious) if iou == best})
    for m, box in enumerate(boxes):  # a later box overrules an earlier one
        usable = [a for a, ok in enumerate(inside) if ok]
        best = max((exact_iou(anchors[a], box) for a in usable), default=None)
        for a in usable:
            if exact_iou(anchors[a], box) == best:
                answer[a] = {m}
    return answer


@pytest.mark.parametrize("seed", range(6))
def test_max_iou_equals_a_slow_loop(seed):
    g = torch.Generator().manual_seed(100 + seed)
    corners = torch.randint(0, 12, (4, 6, 2), generator=g) * 8
    sizes = torch.randint(1, 7, (4, 6, 2), generator=g) * 8 + torch.randint(0, 2, (4, 6, 2), generator=g)
    boxes = torch.cat([corners, corners + sizes], -1)
    number = [6, 3, 0, 1]
    valid = torch.tensor([[m < n for m in range(6)] for n in number])
    boxes[~valid] = torch.tensor([8, 8, 56, 56]) if seed % 2 else 0
    if seed % 2:
        boxes[1, 2] = torch.tensor([500, 500, 540, 540])  # a box that no anchor overlaps, last of its image
    else:
        boxes[1, 0] = torch.tensor([500, 500, 540, 540])  # the same, first of its image: overruled by later ones
    levels, strides = [(8, 9), (4, 5)], (12, 24)
    anchors = torch.cat([grid_anchors(levels, strides, (2,), dtype=torch.float64),
                         grid_anchors(levels, strides, (3,), dtype=torch.float64)])
    assert torch.equal(anchors, anchors.round())
    inside = torch.rand(4, len(anchors), generator=g) > 0.25
    got = assign_max_iou(anchors, boxes.double(), valid, inside)
    assert got.shape == (4, len(anchors)) and got.dtype == torch.int64
    for b in range(4):
        expected = slow_max_iou(anchors.long().tolist(), boxes[b, :number[b]].tolist(), inside[b].tolist())
        wrong = [(a, v, e) for a, (v, e) in enumerate(zip(got[b].tolist(), expected)) if v not in e]
        assert not wrong, f"image {b}: (anchor, got, allowed) {wrong[:5]}"
    assert (got[2][inside[2]] == BACKGROUND).all()


@pytest.mark.parametrize("height, expected", [(3, BACKGROUND), (4, IGNORED), (4.5, IGNORED), (5, 0), (8, 0)])
def test_max_iou_bands_are_inclusive_below(height, expected):
    """Anchor (0, 0, 10, height) has IoU height / 10; a second, perfect anchor takes the low-quality match."""
    anchors = torch.tensor([[0.0, 0, 10, height], [0, 0, 10, 10]])
    box = torch.tensor([[[0.0, 0, 10, 10]]])
    got = assign_max_iou(anchors, box, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))
    assert got[0].tolist() == [expected, 0]


def test_max_iou_all_ties_of_a_box_are_positive_whatever_the_iou():
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [40, 0, 50, 10]])
    box = torch.tensor([[[5.0, 0, 15, 10]]])  # IoU 1/3 with the first two
    got = assign_max_iou(anchors, box, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool))
    assert got[0].tolist() == [0, 0, BACKGROUND]


def test_max_iou_box_nobody_overlaps_claims_every_zero_anchor_and_later_boxes_overrule():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    far, near = [900.0, 900, 910, 910], [0.0, 0, 10, 10]
    valid, inside = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[True, True, True, False]])
    assert assign_max_iou(anchors, torch.tensor([[far, near]]), valid, inside)[0].tolist() == [1, 0, 0, IGNORED]
    assert assign_max_iou(anchors, torch.tensor([[near, far]]), valid, inside)[0].tolist() == [1, 1, 1, IGNORED]


def test_max_iou_later_box_takes_a_shared_best_anchor_though_its_iou_is_lower():
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    perfect, rough = [0.0, 0, 10, 10], [0.0, 0, 10, 4]
    every = torch.ones(1, 2, dtype=torch.bool)
    assert assign_max_iou(anchors, torch.tensor([[perfect, rough]]), every, every)[0].tolist() == [1, BACKGROUND]
    assert assign_max_iou(anchors, torch.tensor([[rough, perfect]]), every, every)[0].tolist() == [1, BACKGROUND]


def test_max_iou_best_anchor_is_sought_among_usable_ones_only():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 30], [50, 50, 60, 60]])
    got = assign_max_iou(anchors, torch.tensor([[[0.0, 0, 10, 10]]]), torch.ones(1, 1, dtype=torch.bool),
                         torch.tensor([[False, True, True]]))
    assert got[0].tolist() == [IGNORED, 0, BACKGROUND]  # IoU 1/3, but the best that may be used


# ------------------------------------------------------------------ FCOS

FCOS_RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))


def slow_fcos(points, ranges, boxes):
    """One image -> per point the set of acceptable boxes (several where areas tie), {-1} for background."""
    answer = []
    for (x, y), (low, high) in zip(points, ranges):
        fits = {}
        for m, (x1, y1, x2, y2) in enumerate(boxes):
            if x1 < x < x2 and y1 < y < y2 and low <= max(x - x1, y - y1, x2 - x, y2 - y) <= high:
                fits[m] = (x2 - x1) * (y2 - y1)
        answer.append({m for m, area in fits.items() if area == min(fits.values())} or {BACKGROUND})
    return answer


@pytest.mark.parametrize("seed", range(6))
def test_fcos_equals_a_slow_loop(seed):
    g = torch.Generator().manual_seed(200 + seed)
    levels = [(h, w) for h, w in ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))]
    points = grid_points(levels, STRIDES, 0.5, dtype=torch.float64)
    ranges = torch.tensor([r for (h, w), r in zip(levels, ((-1, 16), (16, 32), (32, 64), (64, 128), (128, 1e8))) for _ in range(h * w)],
                          dtype=torch.float64)
    corners = torch.randint(-2, 40, (4, 8, 2), generator=g) * 4  # multiples of 4: edges and range ends are met exactly
    sizes = torch.randint(1, 40, (4, 8, 2), generator=g) * 4
    boxes = torch.cat([corners, corners + sizes], -1)
    number = [8, 4, 0, 1]
    valid = torch.tensor([[m < n for m in range(8)] for n in number])
    boxes[~valid] = torch.tensor([0, 0, 1000, 1000]) if seed % 2 else torch.zeros(4, dtype=torch.long)  # a padded row must not matter
    got = assign_fcos(points, ranges, boxes.double(), valid)
    assert got.shape == (4, len(points)) and got.dtype == torch.int64
    for b in range(4):
        expected = slow_fcos(points.tolist(), ranges.tolist(), boxes[b, :number[b]].tolist())
        wrong = [(p, v, e) for p, (v, e) in enumerate(zip(got[b].tolist(), expected)) if v not in e]
        assert not wrong, f"image {b}: (point, got, allowed) {wrong[:5]}"
    assert (got[0] >= 0).any() and (got[2] == BACKGROUND).all()


def fcos_one(point, boxes, low_high):
    got = assign_fcos(torch.tensor([point], dtype=torch.float32), torch.tensor([low_high], dtype=torch.float32),
                      torch.tensor([boxes], dtype=torch.float32), torch.ones(1, len(boxes), dtype=torch.bool))
    return got.item()


def test_fcos_smallest_area_wins_in_either_order():
    small, large = (0, 0, 40, 40), (0, 0, 60, 60)
    assert fcos_one((20, 20), [small, large], (-1, 64)) == 0
    assert fcos_one((20, 20), [large, small], (-1, 64)) == 1


def test_fcos_needs_a_point_strictly_inside():
    assert fcos_one((0, 20), [(0, 0, 40, 40)], (-1, 64)) == BACKGROUND
    assert fcos_one((20, 40), [(0, 0, 40, 40)], (-1, 64)) == BACKGROUND
    assert fcos_one((0.1, 20), [(0, 0, 40, 40)], (-1, 64)) == 0


@pytest.mark.parametrize("low_high, owner", [((-1, 64), 0), ((64, 128), 0), ((-1, 63.9), BACKGROUND), ((64.1, 128), BACKGROUND)])
def test_fcos_both_ends_of_a_range_are_included(low_high, owner):
    """Largest edge distance exactly 64 belongs to P3 and to P4."""
    assert fcos_one((64, 10), [(0, 0, 80, 20)], low_high) == owner


def test_fcos_range_looks_at_the_largest_distance_of_the_point_not_the_box_size():
    assert fcos_one((50, 50), [(0, 0, 100, 100)], FCOS_RANGES[0]) == 0  # 100 px box, but no edge further than 50
    assert fcos_one((5, 50), [(0, 0, 100, 100)], FCOS_RANGES[0]) == BACKGROUND  # 95
    assert fcos_one((5, 50), [(0, 0, 100, 100)], FCOS_RANGES[1]) == 0


def test_fcos_out_of_range_small_box_does_not_shadow_a_larger_one():
    assert fcos_one((100, 100), [(90, 90, 110, 110), (0, 0, 200, 200)], FCOS_RANGES[1]) == 1


# ------------------------------------------------------------------ together

@pytest.mark.parametrize("assign", ["atss", "max_iou", "fcos"])
def test_assignment_of_an_image_does_not_depend_on_its_batch(assign):
    """Alone with its own rows, or padded beside a fuller image: the same answer in float32, as in training."""
    g = torch.Generator().manual_seed(8)
    levels, strides = [(12, 16), (6, 8), (3, 4)], (8, 16, 32)
    boxes = random_boxes(g, 2, 9, canvas=110, dtype=torch.float32)
    valid = torch.tensor([[True] * 9, [True] * 2 + [False] * 7])
    boxes[~valid] = 0
    inside = cells_inside(torch.tensor([[96, 128], [64, 100]]), levels, strides)
    anchors, points = grid_anchors(levels, strides, (8,)), grid_points(levels, strides, 0.5)
    ranges = torch.tensor([(-1.0, 1e8)]).expand(len(points), 2)
    run = {"atss": lambda b, v, i: assign_atss(anchors, [192, 48, 12], b, v, i),
           "max_iou": lambda b, v, i: assign_max_iou(anchors, b, v, i),
           "fcos": lambda b, v, i: assign_fcos(points, ranges, b, v)}[assign]
    both = run(boxes, valid, inside)
    assert torch.equal(both[1:], run(boxes[1:, :2], valid[1:, :2], inside[1:]))
    assert (both >= 0).any(1).all()
