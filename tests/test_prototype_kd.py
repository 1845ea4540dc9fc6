# SPDX-License-Identifier: MIT
"""prototype_kd.py: the numbers of the paper's equations, by hand and by slow loops; torchvision's own training step, bit by bit; weights of others.

`python -m pytest -q tests/test_prototype_kd.py`: Alg. 1 picks what its direct transcription picks (fp64,
random problems). Without a teacher, losses, gradients and the random stream are those of torchvision's own
training step, bit by bit, for both detectors, and so are detections. mmdetection's Faster R-CNN R50, from
its key names, agrees with FPN, RPN and box head written out in plain functions to 1e-9 (fp64); its
RetinaNet R18, in torchvision's modules, detects what `crosskd.py`'s own RetinaNet detects. VOC AP, 11-point
and area, equals a count by loops over the XML files to 1e-6.
"""
import argparse
import importlib.util
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.ops.poolers import initLevelMapper

import crosskd
import prototype_kd
from common import zoo
from common.run import UserError
from prototype_kd import (PRESETS, ROWS, STRIDES, TORCHVISION, Bank, Distiller, bank_options, best_anchors, build, coefficients,
                          dense, descriptors, detect, freeze, global_gap, images_of, inside_box, kind_of, kl_bernoulli,
                          kl_softmax, level_of, load, make_distiller, needs_prototypes, new_detector, paint, parse_args,
                          predict_image, project, project_by_eq5, reliability, reliability_of_largest, resolve, rkd_loss,
                          run_detector, select_prototypes)


def weights_of(model):
    """What a detector is, as plain values and tensors."""
    return dict(prototype_kd.plain_of(model), model=model.state_dict())


def unit(d, n, seed=0, shift=0.0):
    return F.normalize(torch.randn(d, n, generator=torch.Generator().manual_seed(seed)).double() + shift, dim=0)


def gains(f_t, f_s, r_t, r_s, lam):
    p_t, p_s = f_t.T @ r_t, f_s.T @ r_s
    w_t, w_s = coefficients(p_t, p_s, f_t.square().sum(0)[:, None], f_s.square().sum(0)[:, None], lam)
    return (p_t * w_t + p_s * w_s).sum(1)


def transcription(f_t, f_s, k, lam):
    """Alg. 1 as printed: every candidate's residuals, Eq. 4 in full. Returns (picks, L after each)."""
    n, r_t, r_s, past, picks, values = f_t.shape[1], f_t.clone(), f_s.clone(), 0.0, [], []
    for _ in range(k):
        best = None
        for c in range(n):
            if c in picks:
                continue
            g_t, g_s = f_t[:, c], f_s[:, c]
            w_t, w_s = coefficients(g_t @ r_t, g_s @ r_s, g_t @ g_t, g_s @ g_s, lam)
            e_t, e_s = r_t - torch.outer(g_t, w_t), r_s - torch.outer(g_s, w_s)
            value = e_t.square().sum() + e_s.square().sum() + lam * (past + (w_t - w_s).square().sum())
            if best is None or value < best[0] - 1e-12:
                best = value, c, e_t, e_s, (w_t - w_s).square().sum()
        value, c, r_t, r_s, gap = best
        past = past + gap
        picks.append(c), values.append(value.item())
    return picks, values


def test_closed_form_of_eq_5():
    for arguments, want in (((1, 0.4, 1, 1, 10), (15 / 21, 14.4 / 21)), ((6, 1, 4, 1, 2), (20 / 14, 18 / 14)), ((1, 0, 1, 1, 1), (2 / 3, 1 / 3))):
        assert coefficients(*map(float, arguments)) == pytest.approx(want, abs=1e-12)
    g = torch.Generator().manual_seed(0)
    p_t, p_s = torch.randn(2, 1000, generator=g).double()
    n_t, n_s = torch.rand(2, 1000, generator=g).double() * 4 + 0.1
    for lam in (0, 1, 10, 1e6):
        w_t, w_s = coefficients(p_t, p_s, n_t, n_s, lam)
        assert ((w_t * (lam + n_t) - p_t - lam * w_s).abs() / (1 + lam)).max() < 1e-9 and ((w_s * (lam + n_s) - p_s - lam * w_t).abs() / (1 + lam)).max() < 1e-9
    assert (w_t - w_s).abs().max() < 1e-5 and torch.allclose(w_t, (p_t + p_s) / (n_t + n_s), atol=1e-5)


def test_gains_and_picks_by_hand():
    e = torch.eye(2).double()
    f = torch.stack([e[0], e[1], (e[0] + e[1]) / 2**0.5], 1)
    for lam in (0, 1, 10):
        assert gains(f, f, f, f, lam).tolist() == pytest.approx([3, 3, 4]) and select_prototypes(f, f, 3, lam).tolist() == [2, 0, 1]
    assert transcription(f, f, 3, 10)[1] == pytest.approx([2, 1, 0], abs=1e-12)
    t, s = torch.stack([e[0], e[1], e[0]], 1), torch.stack([e[0], e[1], e[1]], 1)
    for lam in (0, 1, 10):
        low, high = 2.5 + 0.5 / (1 + 2 * lam), 3 + 1 / (1 + 2 * lam)
        assert gains(t, s, t, s, lam).tolist() == pytest.approx([low, low, high])
    assert transcription(t, s, 2, 1)[1] == pytest.approx([6 - 10 / 3, 1.6296], abs=1e-4)


@pytest.mark.parametrize("lam", [0, 1, 10, 100])
def test_picks_equal_the_direct_transcription(lam):
    for seed in range(10):
        f_t, f_s = unit(8, 40, seed, 0.4), unit(6, 40, seed + 100, 0.2)
        picks, values = transcription(f_t, f_s, 12, lam)
        assert select_prototypes(f_t, f_s, 12, lam).tolist() == picks
        assert all(b <= a + 1e-9 for a, b in zip(values, values[1:]))


def test_few_and_equal_instances_and_candidates():
    for n in (0, 1, 2, 9):
        picks = select_prototypes(unit(8, n), unit(6, n, 1), 10, 10.0)
        assert len(picks) == len(set(picks.tolist())) == n
    same = torch.ones(4, 5) / 2
    assert sorted(select_prototypes(same, same, 3, 10.0).tolist()) == [0, 1, 2]
    allowed = torch.tensor([False, True, False, True, True])
    assert set(select_prototypes(unit(8, 5), unit(8, 5, 1), 10, 10.0, allowed).tolist()) == {1, 3, 4}
    zero = unit(8, 5).index_fill(1, torch.tensor([2]), 0.0)
    assert 2 not in select_prototypes(zero, zero, 5, 0.0).tolist()


def test_orthonormal_columns_are_all_picked():
    f, lam = torch.eye(5).double(), 10.0
    assert sorted(select_prototypes(f, f, 5, lam).tolist()) == list(range(5)) and transcription(f, f, 5, lam)[1] == pytest.approx([8, 6, 4, 2, 0], abs=1e-9)


def test_projections():
    k, f_t, f_s = 4, unit(6, 3).T, unit(5, 3, 1).T
    g_t, g_s = unit(6, k, 2).T, unit(5, k, 3).T
    valid = torch.ones(3, k, dtype=torch.bool)
    stack = lambda g: g.expand(3, *g.shape)

    def objective(w_t, w_s, lam):
        return ((f_t - w_t @ g_t).square().sum() + (f_s - w_s @ g_s).square().sum() + lam * (w_t - w_s).square().sum()).item()

    for lam in (0.5, 10.0):
        ways = {how: project_by_eq5(f_t, f_s, stack(g_t), stack(g_s), valid, how, lam) for how in ("independent", "sequential", "joint")}
        assert objective(*ways["joint"], lam) < objective(*ways["sequential"], lam) < objective(*ways["independent"], lam)
        w_t, w_s = torch.zeros(2, 3, k).double()
        for sweep in range(400):
            for i in range(k):
                w_t[:, i] = w_s[:, i] = 0
                w_t[:, i], w_s[:, i] = coefficients((f_t - w_t @ g_t) @ g_t[i], (f_s - w_s @ g_s) @ g_s[i], 1.0, 1.0, lam)
            if sweep == 0:
                assert torch.allclose(ways["sequential"][0], w_t) and torch.allclose(ways["sequential"][1], w_s)
        assert torch.allclose(ways["joint"][0], w_t, atol=1e-6) and torch.allclose(ways["joint"][1], w_s, atol=1e-6)
        less = valid.clone()
        less[:, 2] = False
        a, b = project_by_eq5(f_t, f_s, stack(g_t), stack(g_s), less, "joint", lam), project_by_eq5(f_t, f_s, stack(g_t[[0, 1, 3]]), stack(g_s[[0, 1, 3]]), valid[:, :3], "joint", lam)
        assert torch.allclose(a[0][:, [0, 1, 3]], b[0]) and a[0][:, 2].abs().max() == 0
    cosines = project(f_t, f_s, stack(g_t), stack(g_s), valid)
    assert torch.allclose(cosines[0], f_t @ g_t.T) and torch.allclose(cosines[1], f_s @ g_s.T)


def test_sigma():
    t, valid = torch.zeros(1, 10), torch.ones(1, 10, dtype=torch.bool)
    assert reliability(t, t + 0.1, valid).item() == pytest.approx(1 - 0.1 * 10**0.5, abs=1e-6)
    assert reliability(t, t + 0.1 / 21, valid).item() == pytest.approx(0.984942, abs=1e-6)
    assert reliability(t, t + 2, valid, clamp=False).item() == pytest.approx(1 - 2 * 10**0.5, abs=1e-5) and reliability(t, t + 2, valid).item() == 0
    a, b = torch.tensor([[0.7, 0.1]]), torch.tensor([[0.9, 0.3]])
    assert reliability_of_largest(a, b, torch.tensor([[True, True]])).item() == pytest.approx(0.8)


def test_responses():
    assert kl_softmax(torch.tensor([[0, math.log(3)]]), torch.zeros(1, 2), 1.0).item() == pytest.approx(0.130812, abs=1e-6)
    z = torch.tensor([[1.0, -2]])
    assert kl_softmax(z * 2, z * 0, 2.0).item() == pytest.approx(4 * kl_softmax(z, z * 0, 1.0).item(), rel=1e-6)
    three = torch.tensor([[math.log(3)]])  # a probability of 3/4 against 1/2: the same number as of two softmax classes
    assert kl_bernoulli(three, three * 0, 1.0).item() == pytest.approx(0.130812, abs=1e-6)
    assert kl_bernoulli(three, three * 0, 2.0).item() == pytest.approx(4 * (lambda q: q * math.log(2 * q) + (1 - q) * math.log(2 - 2 * q))(3**0.5 / (1 + 3**0.5)), abs=1e-6)
    assert kl_bernoulli(z, z, 1.0).item() == pytest.approx(0, abs=1e-7) and kl_bernoulli(z, -z, 1.0).item() > 0


def test_relations_of_few_instances_are_finite():
    for n in (0, 1, 2, 3):
        f = torch.randn(n, 4, requires_grad=True)
        rkd_loss(torch.randn(n, 4), f).backward()
        assert f.grad is None or f.grad.isfinite().all()


def test_relations_by_hand():
    """Two instances: the one distance over its mean is 1 in both spaces. Three on a line against a right angle: distances (1, 1, 2) / (4/3) against (1, 1, sqrt 2) / mean."""
    assert rkd_loss(torch.randn(2, 4), torch.randn(2, 4)).item() == pytest.approx(0, abs=1e-7)
    line, corner = torch.tensor([[0.0, 0], [1, 0], [2, 0]]), torch.tensor([[1.0, 0], [0, 0], [0, 1]])
    a, b = [3 / 4, 3 / 4, 3 / 2], [x / ((2 + 2**0.5) / 3) for x in (1, 1, 2**0.5)]
    distance = sum(0.5 * (x - y) ** 2 for x, y in zip(a, b)) / 3
    angles = lambda f: torch.tensor([[[0.0 if i in (j, k) else torch.dot(F.normalize(f[j] - f[i], dim=0), F.normalize(f[k] - f[i], dim=0)).item() for k in range(3)]
                                      for j in range(3)] for i in range(3)])
    gap = (angles(line) - angles(corner)).abs()
    angle = torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean().item()
    assert rkd_loss(line, corner).item() == pytest.approx(distance + 2 * angle, rel=1e-5)


def test_levels():
    side = torch.tensor([111.0, 112, 224, 448, 896])
    boxes = torch.stack([side * 0, side * 0, side, side], 1)
    assert level_of(boxes, "faster").tolist() == [0, 1, 2, 3, 4]


def test_cells_of_boxes_and_their_weights():
    boxes, owner = torch.tensor([[8.0, 8, 24, 24], [16.0, 16, 32, 32], [0.0, 0, 8, 8], [9.0, 9, 10, 10]]), torch.tensor([0, 0, 1, 1])
    cells = inside_box(boxes, (4, 4), 8)
    assert cells.sum((1, 2)).tolist() == [4, 4, 1, 1] and cells[3, 1, 1]  # a box between the centres has the cell it lies in
    weight, inside = paint(cells, owner, torch.tensor([0.5, 0.9, 0.0, 0.2]), 2)
    want = [[0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0.5, 0.9, 0.9], [0, 0, 0.9, 0.9]]  # the largest where two overlap
    assert torch.allclose(weight[0], torch.tensor(want)) and inside[1].sum() == 2 and weight[1].sum() == pytest.approx(0.2)
    empty = paint(cells[:0], owner[:0], torch.zeros(0), 2)
    assert empty[0].abs().sum() == 0 and not empty[1].any()


def test_best_anchors_by_hand():
    """One anchor of 16 pixels a cell of 8: the box of the middle anchor overlaps it wholly, a neighbour by half (IoU 1/3), so only cells above 1/2 stay."""
    y, x = torch.meshgrid(torch.arange(4) * 8.0, torch.arange(4) * 8.0, indexing="ij")
    anchors = torch.stack([x - 8, y - 8, x + 8, y + 8], -1).view(-1, 4)
    found = best_anchors(anchors[5:6], anchors, torch.Size([4, 4]))
    assert found.sum() == 1 and found[0, 1, 1]
    between = anchors[5:6] + torch.tensor([4.0, 0, 4, 0])  # overlaps two alike
    assert best_anchors(between, anchors, torch.Size([4, 4]))[0].nonzero().tolist() == [[1, 1], [1, 2]]


def test_descriptor_is_the_mean_of_the_box():
    m = torch.randn(2, 3, 16, 16)
    d = descriptors([m], [4], torch.tensor([[8.0, 4, 40, 36]]), torch.tensor([1]))
    assert torch.allclose(d[0, 0], m[1, :, 1:9, 2:10].mean((1, 2)), atol=1e-5)


def test_picking_a_prototype_again_would_still_gain():
    """Facts 9a, 6: after a pick its own residual correlation is +- lambda (p_t - p_s) / (1 + 2 lambda); without a mask it could come back."""
    lam, p_t, p_s = 10.0, 0.9, 0.7
    w_t, w_s = coefficients(p_t, p_s, 1.0, 1.0, lam)
    r_t, r_s = p_t - w_t, p_s - w_s
    v_t, v_s = coefficients(r_t, r_s, 1.0, 1.0, lam)
    assert r_t * v_t + r_s * v_s == pytest.approx(8.638e-4, abs=1e-7)


def test_as_many_prototypes_as_instances():
    """Joint projection reconstructs exactly; the greedy coefficients, never fitted again, do not (their objective stays above zero)."""
    f_t, f_s = unit(4, 6).T, unit(5, 6, 1).T
    valid = torch.ones(6, 6, dtype=torch.bool)
    w_t, w_s = project_by_eq5(f_t, f_s, f_t.expand(6, 6, 4), f_s.expand(6, 6, 5), valid, "joint", 10.0)
    assert torch.allclose(w_t, torch.eye(6).double(), atol=1e-8) and torch.allclose(w_s, torch.eye(6).double(), atol=1e-8)
    assert transcription(f_t.T, f_s.T, 6, 10.0)[1][-1] > 0.01


def test_equal_teacher_and_student_have_no_gap_and_no_gradient():
    f, g, valid = unit(6, 5).T, unit(6, 4, 1).T, torch.ones(5, 4, dtype=torch.bool)
    s = f.clone().requires_grad_()
    l_t, l_s = project(f, s, g.expand(5, 4, 6), g.expand(5, 4, 6), valid)
    loss = (reliability(l_t, l_s, valid) * global_gap(l_t, l_s, valid)).sum()
    loss.backward()
    assert loss == 0 and s.grad.abs().max() == 0 and (reliability(l_t, l_s, valid) == 1).all()


def test_global_loss_by_hand_and_its_gradient():
    t, valid = torch.zeros(1, 10), torch.ones(1, 10, dtype=torch.bool)
    assert global_gap(t, t + 0.1, valid).item() / 2 == pytest.approx(0.005) and global_gap(t, t + 0.1 / 21, valid).item() / 2 == pytest.approx(1.134e-5, abs=1e-8)
    half = valid.clone()
    half[:, 5:] = False  # five prototypes only: the mean is over those
    assert global_gap(t, t + 0.1, half).item() == pytest.approx(0.01)
    f_t, g_t, g_s = unit(6, 3).T, unit(6, 4, 1).T.expand(3, 4, 6), unit(5, 4, 2).T.expand(3, 4, 5)
    all_valid = torch.ones(3, 4, dtype=torch.bool)

    def loss(f_s, how="independent"):
        return global_gap(*project_by_eq5(f_t, F.normalize(f_s, dim=-1), g_t, g_s, all_valid, how, 0.5), all_valid).sum()  # lambda ties Lambda_t to the student, too

    start = torch.randn(3, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for how in ("independent", "sequential", "joint"):
        assert torch.autograd.gradcheck(lambda x: loss(x, how), start)
        assert loss(start * 7, how).item() == pytest.approx(loss(start, how).item(), rel=1e-9)  # the length of a feature does not count
    weight = torch.full((3,), 0.5).requires_grad_()
    l_t, l_s = project(f_t, start, g_t, g_s * weight[:, None, None], all_valid)
    assert not reliability(l_t, l_s, all_valid).requires_grad


def test_order_of_instances_moves_the_picks_along():
    f_t, f_s = unit(8, 30, 1, 0.3), unit(6, 30, 2, 0.3)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    assert order[select_prototypes(f_t[:, order], f_s[:, order], 8, 10.0)].tolist() == select_prototypes(f_t, f_s, 8, 10.0).tolist()


def test_density_keeps_the_crowded_part():
    f = torch.cat([unit(8, 1).expand(8, 12) + 0.01 * unit(8, 12, 1), unit(8, 8, 2)], 1)
    keep = dense(F.normalize(f, dim=0), 0.4)
    assert keep[:12].all() and keep.sum() == 12 and dense(unit(8, 2), 0.4).all()


@pytest.mark.parametrize("method", ["kmeans", "dbscan"])
def test_clusters_give_distinct_instances_one_of_each_group(method):
    pytest.importorskip("sklearn")
    f = F.normalize(torch.cat([torch.eye(4)[:, [k]] + 0.05 * torch.randn(4, 6, generator=torch.Generator().manual_seed(k)) for k in range(3)], 1), dim=0)
    picks = prototype_kd.cluster_medoids(f, 3, method, 0)
    assert sorted((picks // 6).tolist()) == [0, 1, 2]
    assert len(set(prototype_kd.cluster_medoids(f, 10, method, 0).tolist())) == 10  # more than there are clusters


def test_levels_of_retinanet():
    side = torch.tensor([31.0, 63, 64, 128, 600])
    assert level_of(torch.stack([side * 0, side * 0, side, side], 1), "retina").tolist() == [0, 0, 1, 2, 4]


def test_mmdetections_anchors_have_their_exact_sides_and_strides():
    """On maps of 100 x 168, 50 x 84, ..., 7 x 11 of an image of 800 x 1344: torchvision's own would lie 114 pixels apart on the last, not 128."""
    sides = [(s * 1.0, s * 2 ** (1 / 3)) for s in (32, 64, 128, 256, 512)]
    made = zoo.ExactAnchors(sides, STRIDES["retina"])
    images = torchvision.models.detection.image_list.ImageList(torch.zeros(2, 3, 800, 1344), [(800, 1344)] * 2)
    maps = [torch.zeros(2, 1, *size) for size in ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))]
    a, b = made(images, maps)
    assert a.shape == (6 * sum(m.shape[2] * m.shape[3] for m in maps), 4) and torch.equal(a, b)
    last = a[-6 * 77:].view(7, 11, 3, 2, 4)
    assert torch.allclose(last[1, 2] - last[0, 0], torch.tensor([256.0, 128, 256, 128]).expand(3, 2, 4))
    w, h = (last[0, 0, ..., k + 2] - last[0, 0, ..., k] for k in (0, 1))
    assert torch.allclose((w * h).sqrt(), torch.tensor([512.0, 512 * 2 ** (1 / 3)]).expand(3, 2)) and torch.allclose(h / w, torch.tensor([[0.5], [1], [2]]).expand(3, 2))


# ------------------------------------------------------------------ detectors

def arguments(*flags):
    return resolve(parse_args(["--data", "shapes", *flags]))


def some_batch(count=2, seed=0, boxes=3):
    """Images of 96 x 128, the second 64 x 128, and boxes."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 96, 128), generator=g, dtype=torch.uint8)
    sizes = torch.tensor([[96, 128]] + [[64, 128]] * (count - 1))
    xy = torch.rand(count, boxes, 2, generator=g) * 30
    where = torch.cat([xy, xy + 10 + 20 * torch.rand(count, boxes, 2, generator=g)], 2)
    for i, (h, _) in enumerate(sizes.tolist()):
        images[i, :, h:] = 0
    return dict(images=images, sizes=sizes, boxes=where, labels=torch.randint(0, 5, (count, boxes), generator=g), image_ids=[*range(count)],
                original_sizes=[(96, 128)] * count, image_sizes=[*map(tuple, sizes.tolist())], counts=[boxes] * count)


NAMES = [f"class {k}" for k in range(5)]


@pytest.mark.parametrize("name", ["faster_tiny8", "retina_tiny8"])
def test_training_without_a_teacher_is_torchvisions_bit_by_bit(name):
    """Facts 9a, 19: losses, gradients and the random stream, so the same RoIs are sampled; inference, too."""
    torch.manual_seed(0)
    student = new_detector(name, NAMES, "none")
    batch, first = some_batch(), 1 if name.startswith("faster") else 0
    theirs = torchvision.models.detection.transform.GeneralizedRCNNTransform(0, 10**6, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], _skip_resize=True)
    student.transform = theirs
    pictures = [image[:, :h, :w] / 255 for image, (h, w) in zip(batch["images"], batch["image_sizes"])]
    targets = [dict(boxes=b, labels=k + first) for b, k in zip(batch["boxes"], batch["labels"])]
    results = []
    for run in (lambda: student.train()(pictures, targets), lambda: Distiller(student).train()(batch)):
        torch.manual_seed(5)
        student.zero_grad()
        losses = run()
        sum(losses.values()).backward()
        results.append((sorted(v.item() for v in losses.values()), [p.grad.clone() for p in student.parameters()], torch.rand(1)))
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))
    student.eval()
    student.transform = torchvision.models.detection.transform.GeneralizedRCNNTransform(96, 200, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    batch, pictures = some_batch(1), pictures[:1]
    if name.startswith("retina"):  # untrained, it has no score above 0.05
        student.head.classification_head.cls_logits.bias.data.zero_()
    images = images_of(batch)
    with torch.no_grad():
        want, found = student(pictures), detect(student, images, student.backbone(images.tensors))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(want, found) for k in ("boxes", "scores", "labels")) and sum(len(w["boxes"]) for w in want) > 0


def make_bank(student, teacher, args, classes=5):
    """A bank with random prototypes."""
    bank, g = Bank(None, NAMES, **bank_options(args)), torch.Generator().manual_seed(4)
    d = 64
    vectors = [F.normalize(torch.randn(classes, 5, args.k, d, generator=g), dim=-1) for _ in range(2)]
    bank.load(dict(g_t=vectors[0], g_s=vectors[1], valid=torch.ones(classes, 5, args.k, dtype=torch.bool), ids=torch.zeros(classes, 5, args.k).long(),
                   center_t=torch.zeros(5, d), center_s=torch.zeros(5, d)), torch.device("cpu"))
    return bank


def test_bank_keeps_classes_and_levels_apart_and_asks_the_teacher_once(monkeypatch):
    """Facts 9a, 12, 13, 16: min(K, N) distinct prototypes and a mask; other features of class 2 or of level 3 leave all other prototypes as they are."""
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 30 + [1] * 9 + [2] * 12 + [3])  # class 4 has none
    ids = torch.randperm(len(labels), generator=g) * 10000
    f = {"teacher": torch.randn(len(labels), 5, 8, generator=g), "student": torch.randn(len(labels), 5, 6, generator=g)}
    calls = []
    monkeypatch.setattr(prototype_kd, "extract", lambda model, *rest: calls.append(model) or (ids, labels, f[model]))
    instances = argparse.Namespace(area={i: 1.0 for i in ids.tolist()})
    bank = Bank(instances, NAMES, **bank_options(arguments("--student", "faster_tiny8")))
    refresh = lambda: bank.refresh("student", "teacher", torch.device("cpu"), 0, 1)
    news = refresh()
    first = {k: v.clone() for k, v in bank.tensors().items()}
    assert first["valid"].sum(-1).tolist() == [[n] * 5 for n in (10, 9, 10, 1, 0)] and news["without"] == ["class 4"] and news["few"] == ["class 1", "class 3"]
    for c in range(5):
        for level in range(5):
            picks = first["ids"][c, level][first["valid"][c, level]]
            assert len(set(picks.tolist())) == len(picks) and set(picks.tolist()) <= set(ids[labels == c].tolist())
            rows = [int((ids == i).nonzero()) for i in picks]
            assert torch.allclose(first["g_s"][c, level, :len(picks)], F.normalize(f["student"][rows, level], dim=-1))
    assert refresh()["kept"] == 1 and calls == ["teacher", "student", "student"]
    f["student"] = torch.where((labels == 2)[:, None, None], torch.randn(len(labels), 5, 6, generator=g), f["student"])
    assert 0.5 < refresh()["kept"] < 1
    second = {k: v.clone() for k, v in bank.tensors().items()}
    others = torch.tensor([0, 1, 3, 4])
    assert all(torch.equal(first[k][others], second[k][others]) for k in ("ids", "g_t", "g_s")) and not torch.equal(first["ids"][2], second["ids"][2])
    f["student"] = f["student"].clone()
    f["student"][:, 3] = torch.randn(len(labels), 6, generator=g)
    refresh()
    others = torch.tensor([0, 1, 2, 4])
    assert all(torch.equal(second[k][:, others], bank.tensors()[k][:, others]) for k in ("ids", "g_t", "g_s")) and not torch.equal(second["ids"][:, 3], bank.ids[:, 3])
    bank.center = True
    refresh()
    assert torch.allclose(bank.center_t, f["teacher"].mean(0), atol=1e-5) and bank.center_s.abs().max() > 0


EVERY = [([], {}), (["--preset", "released"], {}), (["--preset", "released", "--alpha-global", "1"], dict(sigma_clamp=True)), (["--kd-relation", "rkd", "--sigma", "none"], {}),
         (["--proj", "joint", "--adapt", "conv1x1"], {}), (["--proj", "sequential", "--lam", "1", "--center"], {}), (["--proj", "independent"], {}),
         (["--all-class-prototypes", "--level-assign", "fpn"], dict(resp_norm="mean")), (["--kd-local", "defeat", "--bg-weight", "4"], dict(feat_norm="sigma", kd_decay="linear"))]


@pytest.mark.parametrize("flags, settings", EVERY, ids=lambda f: " ".join(f) or "paper")
@pytest.mark.parametrize("name", ["faster", "retina"])
@pytest.mark.parametrize("boxes", [3, 0])
def test_every_choice_trains_also_without_any_object(name, flags, settings, boxes):
    """Finite losses; every parameter of the student's backbone and of H gets a gradient, the teacher none."""
    torch.manual_seed(0)
    args = arguments("--student", f"{name}_tiny8", *flags)
    vars(args).update(settings)  # of a preset, no flags
    teacher, student = new_detector(f"{name}_tiny16", NAMES, "none").eval().requires_grad_(False), new_detector(f"{name}_tiny8", NAMES, "none")
    bank = make_bank(student, teacher, args) if needs_prototypes(args) else None
    learner = make_distiller(student, teacher, bank, args).train()
    assert (type(learner) is Distiller) == (flags == [])
    batch = some_batch(boxes=3)
    if boxes == 0:
        batch.update(labels=torch.full((2, 1), -1), boxes=torch.zeros(2, 1, 4), counts=[0, 0])
    losses = learner(batch)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values()) and all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())
    assert all(p.grad is None for p in teacher.parameters()) and 0 <= learner.watch["muted"] <= 1
    distilled = {"global", "rkd", "feat", "resp"} & set(losses)
    assert distilled and (boxes == 0 or all(losses[k] > 0 for k in distilled))
    assert not [k for k in learner.state_dict() if k.split(".")[0] not in ("student", "adapters")]


def test_losses_of_a_step_by_slow_loops():
    """Eqs. 6 and 8 and the responses again, instance by instance, level by level, from the student's maps: preset paper on Faster R-CNN."""
    torch.manual_seed(0)
    args = arguments("--student", "faster_tiny8", "--alpha-resp", "1", "--adapt", "conv1x1", "--kd-local", "defeat")
    teacher, student = new_detector("faster_tiny16", NAMES, "none").eval().requires_grad_(False), new_detector("faster_tiny8", NAMES, "none")
    learner = make_distiller(student, teacher, make_bank(student, teacher, args), args).train()
    batch = some_batch()
    torch.manual_seed(1)
    losses = learner(batch)
    bank, images = learner.bank, images_of(batch)
    s, t = (list(m.backbone(images.tensors).values()) for m in (student, teacher))
    total, sigmas = 0.0, {}
    for i in range(2):
        for j in range(3):
            box, c = batch["boxes"][i, j], batch["labels"][i, j]
            for level, stride in enumerate((4, 8, 16, 32, 64)):
                f = [descriptors([m[level]], [stride], box[None], torch.tensor([i]))[0, 0] for m in (t, s)]
                lam_t, lam_s = ([torch.dot(F.normalize(x, dim=0), g) for g in table[c, level]] for x, table in zip(f, (bank.g_t, bank.g_s)))
                gap = sum((a - b) ** 2 for a, b in zip(lam_t, lam_s))
                sigmas[i, j, level] = max(0.0, 1 - gap.sqrt().item())
                total += sigmas[i, j, level] * gap.item() / (2 * 6 * args.k * 5)
    assert losses["global"].item() == pytest.approx(total, rel=1e-4)
    feat = 0.0
    for level, stride in enumerate((4, 8, 16, 32, 64)):
        gap = (learner.adapters[level](s[level]) - t[level]).square().mean(1)
        cells = {}
        for i in range(2):
            for j in range(3):
                for y, x in inside_box(batch["boxes"][i, j][None], gap.shape[1:], stride)[0].nonzero().tolist():
                    cells[i, y, x] = max(cells.get((i, y, x), 0.0), sigmas[i, j, level])
        feat += sum(w * gap[cell].item() for cell, w in cells.items()) / (2 * len(cells)) / 5
    assert losses["feat"].item() == pytest.approx(feat, rel=1e-4)
    torch.manual_seed(1)  # the same RoIs again
    maps_s, maps_t = student.backbone(images.tensors), teacher.backbone(images.tensors)
    targets = [dict(boxes=b, labels=k + 1) for b, k in zip(batch["boxes"], batch["labels"])]
    proposals, _ = student.rpn(images, maps_s, targets)
    rois, objects, labels, _ = student.roi_heads.select_training_samples(proposals, targets)
    kl, m = 0.0, 0
    for i in range(2):
        for roi, o, k in zip(rois[i], objects[i], labels[i]):
            if k > 0:
                z = []
                for model, maps in ((teacher, maps_t), (student, maps_s)):
                    here = {n: v[i:i + 1] for n, v in maps.items()}
                    z.append(prototype_kd.box_logits(model, here, [roi[None]], images.image_sizes[i:i + 1])[0].log_softmax(0))
                level = level_of(batch["boxes"][i, o][None], "faster").item()
                kl, m = kl + sigmas[i, o.item(), level] * (z[0].exp() * (z[0] - z[1])).sum().item(), m + 1
    assert m > 0 and losses["resp"].item() == pytest.approx(kl / m, rel=1e-3)


def test_student_loads_strictly_into_the_plain_torchvision_model(tmp_path):
    """What --out holds is torchvision's state dict: no teacher, no H, no prototypes."""
    student = new_detector("faster_r18", NAMES, "none")
    torch.save(weights_of(student), tmp_path / "a.pt")
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    plain = torchvision.models.detection.FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d), num_classes=6)
    plain.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True)["model"])
    again = load(tmp_path / "a.pt")[0]
    assert kind_of(again) == "faster" and all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), plain.state_dict().values()))
    retina = torchvision.models.detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    retina.load_state_dict(build("retinanet_resnet50_fpn_v2", 91).state_dict())


def scored(name, size, file=None):
    """A detector whose scores differ from box to box, as a training at `size` leaves it; in `file`, too."""
    torch.manual_seed(0)
    model = new_detector(name, NAMES, "none")
    head = model.head.classification_head.cls_logits if name.startswith("retina") else model.roi_heads.box_predictor.cls_score
    torch.nn.init.normal_(head.weight, std=0.1)
    model.arch.update(image_size=str(size))
    if file:
        torch.save(weights_of(model), file)
    return model


def smooth_picture():
    """uint8 (3, 320, 480): every size below is a whole share of it, so that torchvision and --predict round alike."""
    noise = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(1))
    return (F.interpolate(noise, (320, 480), mode="bilinear")[0] * 255).round().to(torch.uint8)


def gap_to_nearest(theirs, ours):
    """Of torchvision's five best boxes: pixels to the nearest of ours with about that score."""
    gaps = []
    for box, score in zip(theirs["boxes"][:5], theirs["scores"]):
        near = (ours[1] - score).abs() < 0.02
        gaps.append((ours[0][near] - box).abs().amax(1).min().item() if near.any() else math.inf)
    return gaps


@pytest.mark.parametrize("size", [96, 160])
@pytest.mark.parametrize("name", ["faster_tiny8", "retina_tiny8"])
def test_a_loaded_detector_answers_as_predict_does_at_the_size_of_its_training(name, size, tmp_path):
    """model([picture]), torchvision's own call: its transform comes from the checkpoint. At torchvision's 800 the boxes are others."""
    scored(name, size, tmp_path / "d.pt")
    model, classes = load(tmp_path / "d.pt")
    picture = smooth_picture()
    with torch.no_grad():
        found = model([picture / 255])[0]
        ours = prototype_kd.find_boxes(model, picture)
        assert len(found["boxes"]) > 5 and max(gap_to_nearest(found, ours)) < 2
        model.transform.min_size, model.transform.max_size = (800,), 1333
        assert max(gap_to_nearest(model([picture / 255])[0], ours)) > 10
    boxes, scores, names = predict_image(model, classes, picture, 0.0)
    assert torch.equal(boxes, ours[0]) and names == [NAMES[k] for k in ours[2]]


def test_what_a_model_filled_by_hand_must_be_told_is_in_the_checkpoint(tmp_path):
    """A torchvision model made from "torchvision" of the file and its weights finds what load finds."""
    scored("faster_r18", 96, tmp_path / "d.pt")
    content = torch.load(tmp_path / "d.pt", weights_only=True)
    told = content["torchvision"]
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d)
    anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(tuple(tuple(map(int, level)) for level in told["anchor_sizes"]), ((0.5, 1.0, 2.0),) * 5)
    plain = torchvision.models.detection.FasterRCNN(body, 6, min_size=told["min_size"], max_size=told["max_size"], rpn_anchor_generator=anchors).eval()
    plain.load_state_dict(content["model"])
    model, _ = load(tmp_path / "d.pt")
    with torch.no_grad():
        a, b = (net([smooth_picture() / 255])[0] for net in (plain, model))
    assert len(a["boxes"]) > 5 and all(torch.equal(a[k], b[k]) for k in a) and told == model.settings and told["batch_norm_eps"] == 1e-5


def test_classes_that_the_zoo_does_not_know_are_told_before_anything_is_downloaded(monkeypatch):
    def downloads(*a):
        raise AssertionError("downloaded")
    monkeypatch.setattr(zoo, "fetch", downloads)
    own = argparse.Namespace(classes=["cat", "dog"])
    args = resolve(parse_args([]))
    with pytest.raises(UserError, match=r"--teacher faster_r101: has 80 classes, --data has 2. The paper distils.*--init none"):
        prototype_kd.make_pair(args, own, 0, 1, "cpu")
    args.teacher = "none"
    with pytest.raises(UserError, match=r"--init faster_r50: has 80 classes, --data has 2.*--teacher none --student faster_r50 --out r/s.*--init none"):
        prototype_kd.make_pair(args, own, 0, 1, "cpu")
    own.classes = zoo.torchvision_arch("fasterrcnn_resnet50_fpn")["classes"]
    with pytest.raises(AssertionError, match="downloaded"):  # COCO's own: go on
        prototype_kd.make_pair(args, own, 0, 1, "cpu")


def test_batchnorm_affine_trains_the_factors_of_the_later_stages_only(tmp_path):
    """The same detections before training; statistics never move; the checkpoint loads as any other."""
    def student():
        torch.manual_seed(0)
        model = build("faster_r18", 6, "frozen")
        model.arch = dict(name="faster_r18", mmdet=False, classes=NAMES, columns=[1, 2, 3, 4, 5], outputs=6, plain_norm=False)
        return model
    frozen, affine = student(), student()
    freeze(frozen)
    freeze(affine, "affine")
    learnt = {n for n, p in affine.named_parameters() if p.requires_grad} - {n for n, p in frozen.named_parameters() if p.requires_grad}
    assert len(learnt) == 2 * 15 and all(re.match(r"backbone\.body\.layer[234]\..*(bn\d|downsample\.1)\.(weight|bias)$", n) for n in learnt)
    batch, learner = some_batch(), Distiller(affine).train()
    images = images_of(batch)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(frozen.backbone(images.tensors).values(), affine.backbone(images.tensors).values()))
    before = affine.backbone.body.layer3[0].bn1.running_mean.clone()
    sum(learner(batch).values()).backward()
    norm = affine.backbone.body.layer3[0].bn1
    assert norm.weight.grad.abs().max() > 0 and torch.equal(norm.running_mean, before)
    norm.weight.data += 1
    torch.save(weights_of(affine), tmp_path / "a.pt")
    assert torch.equal(load(tmp_path / "a.pt")[0].backbone.body.layer3[0].bn1.weight, norm.weight)
    for flags in (["--student", "faster_tiny8"], ["--teacher", "none", "--init", "none", "--student", "faster_r18"]):
        with pytest.raises(UserError, match="belongs to a student that is trained already"):
            arguments("--bn", "affine", *flags)


def test_global_loss_counts_objects_without_prototypes():
    """N of Eq. 6: an object whose class has no prototype adds nothing, and is divided by."""
    l_t, valid = torch.zeros(2, 1, 4), torch.ones(2, 1, 4, dtype=torch.bool)
    sigma, own = torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool)
    both = prototype_kd.global_loss(l_t, l_t + 0.1, valid, sigma, own, 1).item()
    valid[1] = False
    assert both == pytest.approx(0.005) and prototype_kd.global_loss(l_t, l_t + 0.1, valid, sigma, own, 1).item() == pytest.approx(0.0025)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_weights_load_with_their_labels(name, monkeypatch, tmp_path):
    """Random numbers under the names of torchvision's COCO files. Version 1 was trained with a BatchNorm whose eps is 0; labels are COCO's ids."""
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=91)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if not name.endswith("_v2"):  # the files of version 1 are older than some names
        old = [(r"(fpn\.(inner|layer)_blocks\.\d)\.0\.", r"\1."), (r"rpn\.head\.conv\.0\.0\.", "rpn.head.conv."), (r"(_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.")]
        for pattern, new in old:
            state = {re.sub(pattern, new, k): v for k, v in state.items()}
        assert not set(state) <= set(model.state_dict())
    torch.save(state, tmp_path / "w.pth")
    monkeypatch.setattr(zoo, "fetch", lambda url, sha: tmp_path / "w.pth")
    ours = load(name)[0]
    assert len(ours.arch["classes"]) == len(ours.arch["columns"]) == 80 and ours.arch["columns"][-1] == 90 and ours.arch["outputs"] == 91
    norms = {m.eps for m in ours.backbone.body.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert norms == ({1e-5} if name.endswith("_v2") else {0.0})
    freeze(ours)
    Distiller(ours).train()
    assert ours.training and not any(m.training for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert not ours.backbone.body.conv1.weight.requires_grad and ours.backbone.body.layer2[0].conv1.weight.requires_grad


@pytest.mark.parametrize("name", ["faster_rcnn_r50", "faster_rcnn_r101", "retinanet_r18", "retinanet_r50", "retinanet_r101"])
def test_mmdetections_keys_load_strictly(golden, name, tmp_path):
    """Every key of mmdetection 3.3.0 finds its place; the background moves from the last output to the first."""
    keys = json.loads((golden / "mmdet_keys" / f"{name}.json").read_text())
    g = torch.Generator().manual_seed(0)
    state = {k: torch.randn(shape, generator=g) * 0.01 if dtype == "float32" else torch.zeros(shape, dtype=torch.long) for k, (shape, dtype) in keys.items()}
    torch.save(dict(state_dict=state, meta=dict(CLASSES=("a",) * 80)), tmp_path / "m.pth")
    model = load(tmp_path / "m.pth")[0]
    assert model.arch["name"] == name.replace("faster_rcnn", "faster").replace("retinanet", "retina") and len(model.arch["columns"]) == 80
    if name.startswith("faster"):
        theirs, ours = state["roi_head.bbox_head.fc_cls.bias"], model.roi_heads.box_predictor.cls_score.bias
        assert torch.equal(ours[1:], theirs[:-1]) and ours[0] == theirs[-1]
        assert torch.equal(model.roi_heads.box_predictor.bbox_pred.bias[4:], state["roi_head.bbox_head.fc_reg.bias"])
    batch = some_batch(1)
    with torch.no_grad():
        run_detector(model, batch)
    used = sum(not k.endswith("num_batches_tracked") for k in state)
    assert used == len(model.state_dict())


def cascade_state(model):
    """The state of a cascade under mmdetection's names."""
    names = {"roi_heads.cls": "fc_cls", "roi_heads.reg": "fc_reg"}
    out = {}
    for k, v in model.state_dict().items():
        if k.startswith("backbone.body."):
            k = k.replace("backbone.body.", "backbone.")
        elif k.startswith("backbone.fpn."):
            k = k.replace("backbone.fpn.inner_blocks.", "neck.lateral_convs.").replace("backbone.fpn.layer_blocks.", "neck.fpn_convs.").replace(".0.weight", ".conv.weight").replace(".0.bias", ".conv.bias")
        elif k.startswith("rpn."):
            k = k.replace("rpn.head.conv.0.0.", "rpn_head.rpn_conv.").replace("rpn.head.cls_logits.", "rpn_head.rpn_cls.").replace("rpn.head.bbox_pred.", "rpn_head.rpn_reg.")
        elif k.startswith("roi_heads.heads."):
            k = k.replace("roi_heads.heads.", "roi_head.bbox_head.").replace("fc6", "shared_fcs.0").replace("fc7", "shared_fcs.1")
        else:
            part, stage, kind = k.rsplit(".", 2)
            v, k = v.roll(-1, 0) if part == "roi_heads.cls" else v, f"roi_head.bbox_head.{stage}.{names[part]}.{kind}"
        out[k] = v
    return out | {"roi_head.mask_head.0.conv_logits.weight": torch.zeros(80, 256, 1, 1)}


def test_cascade_teacher_loads_detects_and_answers_proposals(tmp_path):
    """ResNeXt-101 32x4d with deformable convolutions, three box heads, a mask head that is left out."""
    torch.manual_seed(0)
    source = build("cascade_x101_32x4d_dcn", 6, "frozen", True)
    torch.save(dict(state_dict=cascade_state(source)), tmp_path / "c.pth")
    teacher = load(tmp_path / "c.pth")[0]
    assert teacher.arch["name"] == "cascade_x101_32x4d_dcn" and teacher.arch["classes"] is None and teacher.arch["columns"] == [1, 2, 3, 4, 5]
    for (k, a), b in zip(source.state_dict().items(), teacher.state_dict().values()):
        assert torch.equal(a, b), k
    batch = some_batch(1)
    with torch.no_grad():
        images = images_of(batch)
        maps = teacher.backbone(images.tensors)
        logits = prototype_kd.box_logits(teacher, maps, [batch["boxes"][0]], images.image_sizes)
        found = detect(teacher, images, maps)
        pool, heads = teacher.roi_heads.box_roi_pool, teacher.roi_heads
        rois, score = teacher.rpn(images, maps)[0][0][:20], 0.0
        cascaded, _ = heads(maps, [rois], images.image_sizes)
        for stage, std in enumerate(((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))):  # mmdetection's deltas, by hand
            x = heads.heads[stage](pool(maps, [rois], images.image_sizes))
            score = score + heads.cls[stage](x) / 3
            dx, dy, dw, dh = (heads.reg[stage](x) * torch.tensor(std)).unbind(1)
            w, h = rois[:, 2] - rois[:, 0], rois[:, 3] - rois[:, 1]
            cx, cy, w, h = rois[:, 0] + w / 2 + dx * w, rois[:, 1] + h / 2 + dy * h, w * dw.clamp(max=math.log(62.5)).exp(), h * dh.clamp(max=math.log(62.5)).exp()
            rois = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1)
            rois = torch.stack([rois[:, 0].clamp(0, 128), rois[:, 1].clamp(0, 96), rois[:, 2].clamp(0, 128), rois[:, 3].clamp(0, 96)], 1)
        score = score.softmax(1)
        assert len(cascaded[0]["scores"]) and all((rois - b).abs().amax(1).min() < 1e-3 and (score[:, k] - s).abs().min() < 1e-5 for b, s, k in zip(
            cascaded[0]["boxes"], cascaded[0]["scores"], cascaded[0]["labels"]))
    assert logits.shape == (3, 6) and logits.isfinite().all() and set(found[0]) == {"boxes", "scores", "labels"}


def test_deformable_convolution_without_offsets_is_a_convolution():
    conv = torch.nn.Conv2d(8, 8, 3, 2, 1, groups=4, bias=False)
    deformable = zoo.DeformConv(conv)
    deformable.weight.data.copy_(conv.weight.data)
    torch.nn.init.zeros_(deformable.conv_offset.weight), torch.nn.init.zeros_(deformable.conv_offset.bias)
    x = torch.randn(1, 8, 9, 9)
    assert torch.allclose(deformable(x), conv(x), atol=1e-5)


def test_aligned_pool_is_the_mean_of_whole_cells():
    """One bin of a box that lies on the grid is the mean of its cells: no half pixel to the side."""
    m = torch.randn(1, 2, 16, 16)
    out = zoo.AlignedPool()({"0": m, "1": m, "2": m, "3": m}, [torch.tensor([[0.0, 0, 56, 56]])], [(64, 64)])
    assert torch.allclose(out[0, :, 0, 0], m[0, :, :2, :2].mean((1, 2)), atol=1e-6) and torch.allclose(out[0, :, 3, 4], m[0, :, 6:8, 8:10].mean((1, 2)), atol=1e-6)


# ------------------------------------------------------------------ flags

def test_presets_differ_where_they_should_and_a_flag_beats_its_preset():
    want = dict(alpha_global=0, alpha_feat=1, alpha_resp=1, sigma="maxcos", sigma_clamp=False, instances="proposals", level_assign="fpn", kd_local="defeat", bg_weight=4,
                feat_norm="sigma", adapt="conv3x3", resp_tau=2, resp_norm="mean", kd_decay="linear", density_filter=0.4, proto_min_size=30, photometric=False)
    assert PRESETS["released"] == want
    paper, released = arguments("--student", "faster_tiny8"), arguments("--preset", "released", "--resp-tau", "3")
    assert (paper.alpha_global, paper.alpha_feat, paper.alpha_resp, paper.k, paper.lam) == (1, 1, 5, 10, 10) and not paper.bg_weight
    assert released.alpha_global == 0 and released.sigma == "maxcos" and released.resp_tau == 3 and released.adapt == "conv3x3"
    full = resolve(parse_args(["--teacher", "retina_r101"]))
    assert (full.refresh, full.epochs, full.lr, full.init, full.student, full.batch_size) == (1, 24, 0.01, "retina_r50", None, 2)
    assert set(PRESETS["paper"]) == set(PRESETS["released"])


@pytest.mark.parametrize("flags, words", [
    (["--k", "0"], "--k: 0: must be at least 1"), (["--refresh", "0"], "--refresh: 0: must be positive"), (["--lam", "nan"], "--lam: nan"),
    (["--resp-tau", "inf"], "--resp-tau: inf: must be positive"), (["--alpha-feat", "-1"], "--alpha-feat: -1: must be at least 0"),
    (["--seed", str(2**64)], "--seed"), (["--data-seed", "-1"], "--data-seed: -1: must be at least 0"),
    (["--bg-weight", "-1"], "--bg-weight: -1: must be at least 0"), (["--proto-method", "kmeans"], "add --proto-space"),
    (["--proto-method", "random", "--proto-space", "student"], "--proto-space: belongs to --proto-method pgm"),
    (["--eval", "a", "--predict", "b"], "one at a time"), (["--predict", "b"], "needs --weights"), (["--weights", "b"], "belongs to --predict"),
    (["--voc-train", "2007"], "expected year_list"), (["--bn", "off"], "invalid choice"), (["--export", "a.pt2"], "--export needs --weights"),
    (["--student", "faster_r50", "--init", "x.pt"], "--student: belongs to --init imagenet or --init shapes or --init none, here it is x.pt"),
    (["--table"], "belongs to --data shapes"), (["--data", "shapes", "--dataset", "voc"], "is read as COCO"), (["--proj", "joint", "--lam", "0"], "needs --lam above 0"), (["--row", "t9"], "--rows lists them"),
    (["--preset", "released", "--alpha-global", "1", "--proj", "joint"], "--sigma maxcos compares cosines"),
    (["--kd-relation", "rkd", "--all-class-prototypes"], "belongs to")])
def test_bad_flags_give_one_line(flags, words, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags, words", [
    (["--voc-val", "2007_val"], "--voc-val: belongs to --dataset voc"), (["--data-seed", "3"], "--data-seed: belongs to --data shapes"),
    (["--proto-method", "ambiguous", "--lam", "1"], "--lam: belongs to --proto-method pgm, or to a --proj; here ambiguous"),
    (["--proto-space", "student", "--lam", "1"], "or to a --proj; here one --proto-space"),
    (["--sigma", "maxcos", "--proj", "joint"], "--proj joint: --sigma maxcos compares cosines"), (["--sigma", "none", "--alpha-global", "0", "--k", "5"], "--k: belongs to losses"),
    (["--alpha-feat", "0", "--adapt", "conv1x1"], "--adapt: belongs to --alpha-feat above 0"), (["--preset", "released", "--kd-relation", "rkd"], "above 0, here it is 0"),
    (["--alpha-global", "0", "--alpha-feat", "0", "--alpha-resp", "0"], "nothing is distilled"),
    (["--alpha-global", "0", "--alpha-feat", "0", "--level-assign", "fpn"], "--level-assign: belongs to"),
    (["--kd-relation", "rkd", "--alpha-feat", "0", "--level-assign", "fpn"], "--level-assign: belongs to"),
    (["--kd-relation", "rkd", "--alpha-feat", "0", "--alpha-resp", "0", "--sigma", "maxcos"], "--sigma: belongs to losses"),
    (["--alpha-resp", "0", "--resp-tau", "2"], "--resp-tau: belongs to --alpha-resp above 0"), (["--teacher", "none", "--k", "5"], "--k: belongs to a --teacher"),
    (["--teacher", "none", "--control", "x"], "--control: belongs to a --teacher"), (["--teacher", "none", "--no-teacher-check"], "belongs to a --teacher"),
    (["--teacher", "x", "--alpha-global", "0", "--alpha-feat", "0", "--alpha-resp", "0"], "--teacher none says so"),
    (["--data", "d", "--train-json", "a", "--train-images", "b"], "--train-json and --data: one of them"),
    (["--dataset", "voc", "--val-json", "a", "--val-images", "b"], "--val-json and --dataset: one of them"),
    (["--train-json", "a", "--train-images", "b", "--teacher", "x", "--control", "c"], "which --val-json names"),
    (["--eval", "a", "--resume"], "it cannot go with --eval")])
def test_flags_without_effect_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert words in capsys.readouterr().err.splitlines()[-1].replace("--data and --train-json", "--train-json and --data")


def test_flags_without_effect_beside_eval_are_said_in_a_line(capsys):
    parse_args(["--eval", "a", "--k", "5", "--lr", "1", "--dataset", "voc", "--voc-val", "2007_val"])
    assert capsys.readouterr().err == "note: with --eval there is no effect of --k, --lr\n"


def test_presets_hold_what_no_flag_sets():
    """Five settings of the released code are its preset's alone."""
    flags = set(vars(parse_args([])))
    assert set(PRESETS["paper"]) - flags == {"sigma_clamp", "feat_norm", "resp_norm", "kd_decay", "density_filter"}
    assert arguments("--preset", "released").kd_decay == "linear" and arguments().density_filter == 0


OTHERS = ["--preset released --bn affine", "--dataset voc --teacher none --student faster_r101 --epochs 12", "--data shapes --teacher none --control none --no-table"]


@pytest.mark.parametrize("row", [*(flags for _, flags, _ in ROWS.values()), *OTHERS])
def test_rows_of_the_tables_parse_and_resolving_twice_changes_nothing(row, tmp_path, monkeypatch):
    """What --resume and the control begin with is a resolved set of flags; detectors of earlier rows stand for themselves."""
    real = prototype_kd.arch_of
    monkeypatch.setattr(prototype_kd, "arch_of", lambda spec, flag: dict(name="retina_r50" if "retina" in spec else "faster_r50") if spec.startswith("runs/") else real(spec, flag))
    args = parse_args(row.split())
    if args.eval:
        assert args.eval in zoo.PROTOTYPE_ZOO
        return
    args = resolve(args)
    assert resolve(args) == args and args.epochs == (12 if "--epochs" in row else 16 if args.data == "shapes" else 24)
    assert args.data == ("data" if "voc" in row else "shapes" if "shapes" in row else "data/coco")


def test_detectors_that_a_row_needs_are_made_by_another():
    made = [re.search(r"--out (\S+)", flags)[1] if "--out" in flags else f"runs/prototype_kd-{name}" for name, (_, flags, _) in ROWS.items()]
    wanted = {path for _, flags, _ in ROWS.values() for path in re.findall(r"(runs/\S+)/(?:last.pt|control)", flags)}
    assert wanted <= set(made) and len(made) == len(set(made))


def test_a_row_sets_flags_an_explicit_one_wins_and_the_list_is_printed(capsys):
    args = parse_args(["--row", "t5-K-5", "--lam", "3"])
    assert (args.k, args.lam, args.epochs, args.control) == (5, 3, 12, "runs/voc/control")
    assert parse_args(["--row", "t5-K-5", "--k", "7"]).k == 7
    with pytest.raises(SystemExit):
        parse_args(["--rows"])
    text = capsys.readouterr().out
    assert "t1-faster " in text and "40.6" in text and "PKD 40.4, CSKD 41.0" in text and len(text.splitlines()) == len(ROWS) + 1


def test_defaults_that_depend_on_other_flags(tmp_path):
    torch.save(weights_of(new_detector("retina_tiny8", NAMES, "none")), tmp_path / "d.pt")
    args = resolve(parse_args([]))
    assert (args.teacher, args.init, args.student, args.lr, args.image_size, args.control) == ("faster_r101", "faster_r50", None, 0.02, "800", "run")
    args = resolve(parse_args(["--teacher", "none", "--student", "retina_r18"]))
    assert (args.teacher, args.init, args.student, args.lr, args.control, args.alpha_feat) == ("none", "imagenet", "retina_r18", 0.01, "none", 0)
    own = ["--train-json", "a", "--train-images", "b", "--teacher", str(tmp_path / "d.pt")]
    args = resolve(parse_args(own))
    assert (args.init, args.student, args.control) == ("imagenet", "retina_r50", "none")  # nothing to compare on
    assert resolve(parse_args([*own, "--val-json", "a", "--val-images", "b"])).control == "run"
    photometric = [resolve(parse_args(flags)).photometric for flags in
                   ([], ["--data", "shapes"], ["--data", "shapes", "--photometric"], ["--data", "shapes", "--preset", "paper"], ["--preset", "released"])]
    assert photometric == [True, False, True, False, False]  # it swaps channels, and names of shapes hold colours
    for flags, words in ((own[:4], "needs a --teacher"), (["--student", "faster_r50", "--teacher", str(tmp_path / "d.pt")], "they must be of one kind"),
                         (["--init", "cascade_x101"], "can be a teacher only"), (["--student", "yolo_r50"], "expected faster_ or retina_"),
                         (["--data", "shapes", "--student", "faster_r50"], "others need --init and --teacher")):
        with pytest.raises(UserError, match=words):
            resolve(parse_args(flags))


def test_a_backbone_in_caffes_style_is_refused(golden, tmp_path):
    """Same keys and shapes, other pixels and strides: meta tells, of mmdetection 2 and 3."""
    keys = json.loads((golden / "mmdet_keys/faster_rcnn_r50.json").read_text())
    state = {k: torch.zeros(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in keys.items()}
    for meta in (dict(config="backbone=dict(type='ResNet', style='caffe')"), dict(cfg="style = 'caffe'")):
        torch.save(dict(state_dict=state, meta=meta), tmp_path / "c.pth")
        with pytest.raises(UserError, match="its config has style='caffe'.*use one in pytorch's style"):
            load(str(tmp_path / "c.pth"))[0]


def test_checkpoints_of_the_other_scripts_are_named(tmp_path):
    for arch, script in ((dict(p6="on_input"), "crosskd.py"), (dict(quality=1), "hierkd.py"), (dict(queries=3), "dkdetr.py"), (dict(pair=1), "simple21k.py")):
        torch.save(dict(arch=arch, model={}), tmp_path / "o.pt")
        with pytest.raises(UserError, match=f"is a checkpoint of {script}"):
            load(str(tmp_path / "o.pt"))[0]


# ------------------------------------------------------------------ mmdetection's detectors, written down a second time

def filled(golden, name, tmp_path):
    """(state under mmdetection's keys with the golden set's reproducible numbers, the file, normalised images of two sizes)."""
    spec = importlib.util.spec_from_file_location("fill", golden / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    keys = json.loads((golden / "mmdet_keys" / f"{name}.json").read_text())
    state = fill.fill({k: torch.zeros(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in keys.items()})
    torch.save(dict(state_dict=state), tmp_path / "m.pth")
    return {k: v.double() for k, v in state.items()}, tmp_path / "m.pth", fill.image(256, 320, 2, [(256, 320), (230, 270)]).double()


def test_retinanet_of_mmdetection_detects_what_crosskds_does(golden, tmp_path):
    """crosskd.py's RetinaNet, its own code from anchors to NMS, is held to mmdetection by other goldens; torchvision's, with our anchors and P7, must agree."""
    _, path, images = filled(golden, "retinanet_r18", tmp_path)
    ours, (theirs, _) = load(path)[0].double(), crosskd.load(str(path))
    theirs = theirs.double()
    sizes = [(256, 320), (230, 270)]
    with torch.no_grad():
        maps = theirs(images)[0]
        out = theirs.flatten(maps)
        levels = list(ours.backbone(images).values())
        head = ours.head(levels)
        found = detect(ours, torchvision.models.detection.image_list.ImageList(images, sizes), dict(enumerate(levels)))
        want = theirs.detect(maps, torch.tensor(sizes))
    assert torch.allclose(head["cls_logits"], out["cls"], atol=1e-9) and torch.allclose(head["bbox_regression"], out["reg"], atol=1e-9)
    anchors = ours.anchor_generator(torchvision.models.detection.image_list.ImageList(images, sizes), levels)[0]
    assert torch.allclose(anchors.double(), theirs.priors([x.shape[-2:] for x in levels], "cpu").double(), atol=1e-4)
    for f, (boxes, scores, labels) in zip(found, want):
        keep = ((f["boxes"][:, 2:] - f["boxes"][:, :2]) > 0).all(1)  # torchvision keeps boxes that lie wholly outside, where they have no area
        n = int(keep.sum())
        assert n > 70 and torch.equal(f["labels"][keep], labels[:n]) and torch.allclose(f["scores"][keep], scores[:n], atol=1e-9)
        large = ((boxes[:n, 2:] - boxes[:n, :2]) > 20).all(1)  # mmdetection never shrinks an anchor by more than 62.5, torchvision does: sides below 15 pixels
        assert large.sum() > 30 and (f["boxes"][keep] - boxes[:n])[large].abs().max() < 1e-3


def test_faster_rcnn_of_mmdetection_stage_by_stage(golden, tmp_path):
    """FPN, RPN and box head as their configuration says, from their keys, in plain functions; fp64."""
    state, path, images = filled(golden, "faster_rcnn_r50", tmp_path)
    ours = load(path)[0].double()
    body = torchvision.models.resnet50(weights=None)
    body.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("backbone.")}, strict=False)
    body = body.double().eval()
    conv = lambda x, name, **how: F.conv2d(x, state[name + ".weight"], state[name + ".bias"], **how)
    with torch.no_grad():
        x, stages = body.maxpool(body.relu(body.bn1(body.conv1(images)))), []
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = stage(x)
            stages.append(x)
        lateral = [conv(x, f"neck.lateral_convs.{k}.conv") for k, x in enumerate(stages)]
        for k in (2, 1, 0):
            lateral[k] = lateral[k] + F.interpolate(lateral[k + 1], size=lateral[k].shape[-2:], mode="nearest")
        levels = [conv(x, f"neck.fpn_convs.{k}.conv", padding=1) for k, x in enumerate(lateral)]
        levels.append(levels[3][:, :, ::2, ::2])
        maps = ours.backbone(images)
        assert list(maps) == ["0", "1", "2", "3", "pool"] and all(torch.allclose(a, b, atol=1e-9) for a, b in zip(maps.values(), levels))
        objectness, deltas = ours.rpn.head(levels)
        for level, a, b in zip(levels, objectness, deltas):
            hidden = conv(level, "rpn_head.rpn_conv", padding=1).relu()
            assert torch.allclose(a, conv(hidden, "rpn_head.rpn_cls"), atol=1e-9) and torch.allclose(b, conv(hidden, "rpn_head.rpn_reg"), atol=1e-9)
        boxes = torch.tensor([[10.0, 20, 60, 70], [0, 0, 300, 250], [40, 30, 200, 150], [5.5, 7.25, 118.75, 119.5]]).double()  # sides 50, 274, 139, 113
        logits, offsets = ours.roi_heads.box_predictor(ours.roi_heads.box_head(ours.roi_heads.box_roi_pool(maps, [boxes[:2], boxes[2:]], [(256, 320)] * 2)))
        for i, (box, image, level) in enumerate(zip(boxes, (0, 0, 1, 1), (0, 2, 1, 1))):  # floor(log2(side / 56)), 0 to 3
            roi = torchvision.ops.roi_align(levels[level], torch.cat([torch.tensor([image]).double(), box])[None], 7, 1 / 2 ** (level + 2), 0, True)
            hidden = roi.flatten(1)
            for k in (0, 1):
                hidden = F.linear(hidden, state[f"roi_head.bbox_head.shared_fcs.{k}.weight"], state[f"roi_head.bbox_head.shared_fcs.{k}.bias"]).relu()
            z = F.linear(hidden, state["roi_head.bbox_head.fc_cls.weight"], state["roi_head.bbox_head.fc_cls.bias"])[0]
            r = F.linear(hidden, state["roi_head.bbox_head.fc_reg.weight"], state["roi_head.bbox_head.fc_reg.bias"])[0]
            assert torch.allclose(logits[i], torch.cat([z[80:], z[:80]]), atol=1e-9) and torch.allclose(offsets[i, 4:], r, atol=1e-9)
    assert ours.roi_heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0) and ours.rpn.box_coder.weights == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["args.json", "last.pt"])
def test_a_run_of_another_script_is_not_resumed(name, tmp_path):
    args = dict(seed=1, teacher="gfl_r101")
    if name == "args.json":
        (tmp_path / name).write_text(json.dumps(dict(args=args)))
    else:
        torch.save(dict(script="crosskd.py", arch=dict(kind="gfl"), args=args, model={}, optimizer={}, rng=[], it=1), tmp_path / name)
    with pytest.raises(UserError, match="a run of another script" if name == "args.json" else "is a checkpoint of crosskd.py, not of prototype_kd.py"):
        parse_args(["--resume", "--out", str(tmp_path)])


# ------------------------------------------------------------------ where the head looks

@pytest.mark.parametrize("name", ["faster_tiny8", "retina_tiny8"])
def test_response_reads_sigma_where_the_students_head_sees_a_proposal(name):
    """Levels of anchors and proposals against torchvision's own: anchors level by level, and the pooler's mapper."""
    torch.manual_seed(0)
    student, batch = new_detector(name, [f"c{k}" for k in range(5)], "none"), some_batch()
    distiller = Distiller(student)
    images = prototype_kd.images_of(batch)
    maps = student.backbone(images.tensors)
    step = prototype_kd.train_step(student, images, maps, batch)
    levels = distiller.head_levels(step, maps)
    if name.startswith("faster"):
        pooler = student.roi_heads.box_roi_pool
        rois = [b[p] for b, p in zip(step.boxes, step.positive)]
        want = initLevelMapper(2, 5, canonical_scale=224, canonical_level=4)(rois)
        assert torch.equal(levels, want) and pooler is not None
    else:
        sides = (step.boxes[0][:, 2] - step.boxes[0][:, 0]) * (step.boxes[0][:, 3] - step.boxes[0][:, 1])
        smallest = student.anchor_generator.sizes[0][0]
        octave = (sides.sqrt() / smallest).log2().add(0.1).floor().long()  # anchors of a level are within one octave
        assert torch.equal(levels, octave[torch.cat(step.positive)]) and len(levels)


def test_a_retinanets_levels_follow_its_smallest_anchor():
    boxes = torch.tensor([[0.0, 0, s, s] for s in (15, 17, 33, 65)])
    assert level_of(boxes, "retina", 8).tolist() == [0, 1, 2, 3] and level_of(boxes, "retina").tolist() == [0, 0, 0, 1]


def test_flags_of_a_row_are_checked_as_if_given(capsys):
    for words, text in ((["--row", "t5-K-5", "--teacher", "none"], "belongs to a --teacher"), (["--row", "t5-lambda-1", "--proto-method", "random"], "--lam: belongs to")):
        with pytest.raises(SystemExit):
            parse_args(words)
        assert text in capsys.readouterr().err
    assert parse_args(["--proto-method", "kmeans", "--proto-space", "student", "--proj", "independent", "--lam", "5"]).lam == 5


def test_a_control_that_is_named_or_none_asks_for_one_run_not_for_the_table():
    asks = lambda *flags: prototype_kd.wants_table(parse_args(["--data", "shapes", *flags]))
    assert asks() and asks("--table") and not asks("--control", "none") and not asks("--control", "x") and not asks("--no-table")


def test_the_student_of_shapes_has_seen_the_images_that_are_asked_for(monkeypatch):
    monkeypatch.setattr("common.tiny.trained_before", lambda name, *_: name)
    name = lambda *flags: prototype_kd.shapes_detector("faster_tiny8", parse_args(["--data", "shapes", *flags]), 0, 1, None)
    assert name() == name("--first-images", "300") == "prototype_kd-faster_tiny8-e20-r2" and name("--first-images", "50") == "prototype_kd-faster_tiny8-e20-r2-n50"
    teacher = prototype_kd.shapes_detector("faster_tiny32", parse_args(["--data", "shapes", "--first-images", "50"]), 0, 1, None, teacher=True)
    assert teacher == "prototype_kd-faster_tiny32-e8-r2"
