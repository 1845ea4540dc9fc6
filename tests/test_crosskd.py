# SPDX-License-Identifier: MIT
"""The losses and gradients of crosskd.py: hand-computed values, brute force, and what CrossKD promises."""
import copy
import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F

import crosskd
from common import zoo
from common.run import UserError, describe_model, fast_layout, tell_size
from crosskd import (ATSS, DETECTORS, FCOS, GFL, RetinaNet, align, check_arch, kd_options, make_distiller,
                     distribution_focal_loss, kd_losses, ld_losses, make_optimizer, pkd_loss, quality_focal_kd,
                     region_kl)

LEVELS = [(16, 12), (8, 6), (4, 3), (2, 2), (1, 1)]


def make_args(kind="gfl", *flags):
    return crosskd.resolve(crosskd.parse_args(["--student", f"{kind}_tiny8", *flags]))


def small(kind, seed=0, classes=3, width=8):
    model, random = prototype(kind, seed, classes, width)
    torch.set_rng_state(random)
    return copy.deepcopy(model)


@functools.cache
def prototype(kind, seed, classes, width):
    torch.manual_seed(seed)
    model = DETECTORS[kind](f"tiny{width}", classes, 64)
    for p in model.head.parameters():  # a fresh head is nearly constant: give it something to say
        if p.ndim == 4:
            torch.nn.init.normal_(p, std=0.06)
    return model, torch.get_rng_state()


def make_batch(boxes=((20, 20, 60, 70), (50, 10, 90, 40)), seed=0, count=2):
    images = torch.randint(0, 256, (count, 3, 128, 96), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    gt, labels = torch.zeros(count, 3, 4), torch.full((count, 3), -1)
    for b in range(count):
        for m, box in enumerate(boxes):
            gt[b, m], labels[b, m] = torch.tensor(box, dtype=torch.float) + b, m % 3
    return dict(images=images, sizes=torch.tensor([[128, 96]] * count), boxes=gt, labels=labels)


# ------------------------------------------------------------------ values by hand

def test_quality_focal_kd_by_hand():
    assert quality_focal_kd(torch.tensor([0.0]), torch.logit(torch.tensor([0.9]))).item() == pytest.approx(0.4 * math.log(2), abs=1e-6)
    got = quality_focal_kd(torch.tensor([[0.0, 2.0], [-4.0, 0.0]]), torch.tensor([[0.0, -1.0], [-4.0, 1.0]]))
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.9723], [0.0, 0.1602]]), atol=1e-4, rtol=0)
    z = torch.randn(50)
    assert quality_focal_kd(z, z).abs().max() == 0
    assert quality_focal_kd(z, z, beta=0.0).min() > 0  # plain BCE is not zero where both agree


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_quality_focal_kd_equals_the_formula_and_its_gradient_the_numerical_one(beta):
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(7, 5, dtype=torch.float64, generator=g) * 3 for _ in range(2))
    q, p = s.sigmoid(), t.sigmoid()
    want = (q - p).abs() ** beta * -(p * q.log() + (1 - p) * (1 - q).log())
    torch.testing.assert_close(quality_focal_kd(s, t, beta), want, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: quality_focal_kd(x, t, beta), s.requires_grad_())


def test_quality_focal_kd_modulating_factor_carries_gradient_and_teacher_does_not():
    s, t = torch.tensor([0.3], requires_grad=True), torch.tensor([1.2], requires_grad=True)
    quality_focal_kd(s, t).sum().backward()
    q, p = s.detach().sigmoid(), t.detach().sigmoid()
    bce = -(p * q.log() + (1 - p) * (1 - q).log())
    assert t.grad is None
    torch.testing.assert_close(s.grad, (q - p).sign() * q * (1 - q) * bce + (q - p).abs() * (q - p))


def test_region_kl_by_hand():
    t, s = torch.zeros(17), torch.zeros(17)
    t[0] = math.log(16)
    assert region_kl(s, t).item() == pytest.approx(0.75377, abs=1e-5)
    assert region_kl(s, t, T=10.0).item() == pytest.approx(0.2503, abs=1e-4)
    assert region_kl(s, t, T=10.0).item() / 17 == pytest.approx(0.0147, abs=1e-4)
    assert region_kl(t, t).item() == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(region_kl(s + 3, t - 5), region_kl(s, t))


def test_align_by_hand():
    s, t = (torch.tensor(v).view(1, 1, 2, 2) for v in ([1.0, 3, 5, 7], [10.0, 10, 14, 14]))
    got = align(s, t)
    torch.testing.assert_close(got.flatten(), torch.tensor([9.3167, 11.1056, 12.8944, 14.6833]), atol=1e-4, rtol=0)
    assert got.mean().item() == pytest.approx(12) and got.std().item() == pytest.approx(2.3094, abs=1e-4)


def test_post_and_pre_relu_alignment_differ_as_computed_by_hand():
    s, t = (torch.tensor(v).view(1, 1, 2, 2) for v in ([-1.0, -3, 1, 3], [-2.0, 0, 2, 4]))
    torch.testing.assert_close(align(s.relu(), t.relu()).relu().flatten(), torch.tensor([0.146, 0.146, 1.5, 4.208]), atol=1e-3, rtol=0)
    torch.testing.assert_close(align(s, t).relu().flatten(), torch.tensor([0.0, 0, 2, 4]), atol=1e-5, rtol=0)


def test_align_of_constant_channel_or_single_cell_is_the_teachers_mean_with_finite_gradient():
    for shape in ((2, 3, 4, 4), (1, 3, 1, 1)):
        s, t = torch.ones(shape, requires_grad=True), torch.randn(shape)
        y = align(s, t)
        y.pow(2).sum().backward()
        torch.testing.assert_close(y, t.mean((0, 2, 3), keepdim=True).expand(shape))
        assert s.grad.isfinite().all()


def test_pkd_by_hand():
    x = torch.randn(2, 4, 5, 6)
    n = 2 * 5 * 6
    assert pkd_loss([x], [-x]).item() == pytest.approx(2 * (n - 1) / n, rel=1e-4)
    assert pkd_loss([x], [3 * x + 2]).item() == pytest.approx(0, abs=1e-6)
    y = torch.randn_like(x)
    rho = torch.stack([torch.corrcoef(torch.stack([x[:, c].flatten(), y[:, c].flatten()]))[0, 1] for c in range(4)])
    assert pkd_loss([x, x], [y, y]).item() == pytest.approx(2 * ((1 - rho) * (n - 1) / n).mean().item(), rel=1e-4)


def test_focal_loss_at_the_initial_bias_by_hand():
    model, t = ATSS("tiny8", 2, 64), None
    z = torch.full((1, 2, 2), -4.59511985)
    t = crosskd.Targets(None, None, None, torch.ones(1, 2), torch.tensor([[[1.0, 0], [0, 0]]]), None, None, torch.tensor(1.0))
    assert model.cls_loss(dict(cls=z), t).item() == pytest.approx(1.12838 + 3 * 7.538e-7, rel=1e-4)


def test_focal_loss_and_its_gradient_equal_torchvisions():
    z, t = (torch.randn(200, 7, dtype=torch.float64) * 5).requires_grad_(), (torch.rand(200, 7) < 0.1).double()
    ours, theirs = crosskd.focal_loss(z, t), crosskd.torchvision.ops.sigmoid_focal_loss(z, t, 0.25, 2.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    for a, b in zip(*(torch.autograd.grad(x.sum(), z) for x in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_distribution_focal_loss_clamps_and_interpolates():
    logits = torch.randn(1, 68)
    logp = logits.view(4, 17).log_softmax(-1)
    got = distribution_focal_loss(logits, torch.tensor([[0.0, 3.25, 15.9, 7.5]]))[0]
    want = [-logp[0, 0], -(0.75 * logp[1, 3] + 0.25 * logp[1, 4]), -(0.1 * logp[2, 15] + 0.9 * logp[2, 16]), -(0.5 * logp[3, 7] + 0.5 * logp[3, 8])]
    torch.testing.assert_close(got, torch.stack(want), atol=1e-5, rtol=1e-5)


def test_parameter_counts_of_the_papers_detectors():
    count = lambda m: sum(p.numel() for p in m.parameters())
    with torch.device("meta"):  # numbers are counted, none is drawn
        counts = [count(GFL(b)) for b in ("r18", "r34", "r50", "r101")]
        assert counts == [19_420_889, 29_529_049, 32_440_537, 51_432_665]
        assert count(ATSS("r50")) == count(FCOS("r50")) == 32_295_322
        assert (count(RetinaNet("r50", p6="on_input")), count(RetinaNet("r50"))) == (37_968_692, 33_839_924)


# ------------------------------------------------------------------ detectors against slow loops

@pytest.mark.parametrize("kind", DETECTORS)
def test_losses_equal_a_loop_over_positives(kind):
    model, batch = small(kind), make_batch()
    with torch.no_grad():
        out = model.flatten(model(model.normalise(batch["images"], batch["sizes"]))[0])
    t = model.assign(LEVELS, batch["sizes"], batch["boxes"], batch["labels"])
    got, pos = model.losses(out, t), t.positive.nonzero().tolist()
    assert len(pos) >= 6
    scores = out["cls"].sigmoid()
    box = ctr = dfl = wsum = 0.0
    for b, a in pos:
        boxes = model.decode(out["reg"][b, a], t.priors[a], t.strides[a])
        target = t.boxes[b, a]
        iou = crosskd.torchvision.ops.box_iou(boxes[None], target[None])[0, 0]
        giou = crosskd.torchvision.ops.generalized_box_iou(boxes[None], target[None])[0, 0]
        c = t.priors[a] if kind == "fcos" else (t.priors[a][:2] + t.priors[a][2:]) / 2
        l, tp, r, bt = (c[0] - target[0], c[1] - target[1], target[2] - c[0], target[3] - c[1])
        if kind == "gfl":
            w = scores[b, a].max()
            wsum += w
            box += 2 * w * (1 - giou)
            for side, d in enumerate((l, tp, r, bt)):
                d = (d / t.strides[a, 0]).clamp(0, 15.9)
                logp = out["reg"][b, a].view(4, 17)[side].log_softmax(-1)
                k = int(d)
                dfl += -0.25 * w / 4 * ((k + 1 - d) * logp[k] + (d - k) * logp[k + 1])
        elif kind == "retinanet":
            anchor = t.priors[a]
            size, asize = target[2:] - target[:2], anchor[2:] - anchor[:2]
            delta = torch.cat([((target[:2] + target[2:]) / 2 - c) / asize, (size / asize).log()])
            box += (out["reg"][b, a] - delta).abs().sum() / t.count
        else:
            w = ((torch.minimum(l, r) / torch.maximum(l, r)) * (torch.minimum(tp, bt) / torch.maximum(tp, bt))).sqrt()
            wsum += w
            box += 2 * w * (1 - giou) if kind == "atss" else -w * iou.clamp(min=1e-6).log()
            ctr += F.binary_cross_entropy_with_logits(out["ctr"][b, a], w) / t.count
    if kind == "gfl":
        assert got["dfl"].item() == pytest.approx(float(dfl / max(wsum, 1)), rel=1e-4)
    if "ctr" in got:
        assert got["ctr"].item() == pytest.approx(float(ctr), rel=1e-4)
    norm = 1 if kind == "retinanet" else wsum if kind == "fcos" else max(wsum, torch.tensor(1.0))
    assert got["box"].item() == pytest.approx(float(box / norm), rel=1e-4)
    per_image = [sum(p[0] == b for p in pos) for b in range(2)]
    assert t.count == (max(sum(per_image), 1) if kind == "fcos" else sum(max(n, 1) for n in per_image))


@pytest.mark.parametrize("kind", DETECTORS)
def test_kd_losses_have_the_weights_and_normalisers_of_the_fact_sheet(kind):
    student, teacher, batch, a = small(kind), small(kind, 1), make_batch(), make_args(kind)
    with torch.no_grad():
        s, t_out = (m.flatten(m(m.normalise(batch["images"], batch["sizes"]))[0]) for m in (student, teacher))
    t = student.assign(LEVELS, batch["sizes"], batch["boxes"], batch["labels"])
    got = kd_losses(s, t_out, t, student.kd_box, student.kd_cls_weight(t), **kd_options(a))
    w = t_out["cls"].sigmoid().amax(-1) * t.weight
    qfl = (quality_focal_kd(s["cls"], t_out["cls"]).sum(-1) * t.weight).sum()
    boxes, t_boxes = (student.decode(o["reg"], t.priors, t.strides).flatten(0, 1) for o in (s, t_out))
    iou = crosskd.torchvision.ops.box_iou
    if kind == "gfl":
        kl = F.kl_div(s["reg"].view(-1, 17).log_softmax(-1), t_out["reg"].view(-1, 17).softmax(-1), reduction="none").sum(-1)
        want = dict(kd_cls=qfl / t.count, kd_box=4.0 * (kl.view(-1, 4).sum(1) / 4 * w.flatten()).sum() / w.sum())
    elif kind == "fcos":
        centerness = crosskd.centerness_target(t.boxes, t.priors)[t.positive].sum()
        logiou = -crosskd.torchvision.ops.complete_box_iou_loss(boxes, t_boxes) * 0  # replaced below, box by box
        logiou = torch.stack([-iou(x[None], y[None])[0, 0].clamp(min=1e-6).log() for x, y in zip(boxes, t_boxes)])
        want = dict(kd_cls=0.4 * qfl / centerness, kd_box=0.75 * (logiou * w.flatten()).sum() / centerness)
    else:
        giou = crosskd.torchvision.ops.generalized_box_iou_loss(boxes, t_boxes)
        want = dict(kd_cls=qfl / t.count, kd_box=(giou * w.flatten()).sum() / t.count)
        if kind == "atss":
            p = t.positive
            want["kd_ctr"] = F.binary_cross_entropy_with_logits(s["ctr"][p], t_out["ctr"][p].sigmoid(), reduction="sum") / t.count
    assert set(got) == set(want)
    for k in want:
        assert got[k].item() == pytest.approx(float(want[k]), rel=1e-4), k


def test_retinanet_ignores_the_band_and_the_padding_but_fcos_counts_the_padding():
    batch = make_batch()
    batch["sizes"] = torch.tensor([[128, 96], [64, 32]])
    batch["boxes"], batch["labels"] = torch.tensor([[[8.0, 8, 40, 44]], [[0.0, 0, 30, 30]]]), torch.zeros(2, 1).long()
    for kind, ignores in (("retinanet", True), ("gfl", True), ("atss", True), ("fcos", False)):
        t = small(kind).assign(LEVELS, batch["sizes"], batch["boxes"], batch["labels"])
        assert bool((t.weight[1] == 0).any()) is ignores
    t = small("retinanet").assign(LEVELS, batch["sizes"], batch["boxes"], batch["labels"])
    iou = crosskd.torchvision.ops.box_iou(t.priors, batch["boxes"][0])[:, 0]
    band = (iou >= 0.4) & (iou < 0.5) & (iou < iou.max())
    assert band.any() and (t.weight[0][band] == 0).all() and (t.weight[0][iou < 0.4] == 1).all()


# ------------------------------------------------------------------ what CrossKD promises

def grads(kind, i, flags=(), seed=0, total=lambda losses: sum(v for k, v in losses.items() if k.startswith("kd"))):
    student, teacher = small(kind, seed), small(kind, seed + 1, width=16)
    layer = () if "--method" in flags else ("--kd-layer", str(i))  # which only crosskd has
    model = make_distiller(student, teacher, make_args(kind, *layer, *flags)).train()
    losses = model(make_batch())
    total(losses).backward()
    return student, teacher, losses


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("i", range(5))
def test_kd_gradient_reaches_layers_up_to_i_and_none_above(kind, i):
    student, teacher, _ = grads(kind, i)
    for name, p in student.named_parameters():
        g = 0.0 if p.grad is None else p.grad.abs().max().item()
        tower = name.startswith("head.cls_tower") or name.startswith("head.reg_tower")
        reached = int(name.split(".")[2]) < i if tower else not name.startswith("head.")
        if reached and not (name.endswith("conv.bias") and i == int(name.split(".")[2]) + 1 if tower else False):
            assert g > 0, name
        elif not reached:
            assert g == 0, name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("kind", DETECTORS)
def test_detection_gradient_reaches_every_parameter(kind):
    student, _, _ = grads(kind, 3, total=lambda losses: sum(v for k, v in losses.items() if "kd" not in k))
    unreached = [n for n, p in student.named_parameters() if p.grad is None]
    assert not unreached


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("i", range(5))
@pytest.mark.parametrize("position", ["post", "pre"])
def test_identical_student_and_teacher_give_the_teachers_predictions_and_no_loss(kind, i, position):
    student = small(kind).double()
    teacher = copy.deepcopy(student)
    losses = make_distiller(student, teacher, make_args(kind, "--kd-layer", str(i), "--align", position)).eval()(make_batch())
    scale = losses["cls"].item() + losses["box"].item()
    assert abs(losses["kd_cls"].item()) < 1e-5 * scale
    if kind == "fcos":  # -ln IoU of equal boxes is 0
        assert abs(losses["kd_box"].item()) < 1e-4 * scale
    else:
        assert abs(losses["kd_box"].item()) < 1e-4 * scale


def test_cross_head_is_invariant_to_a_positive_gain_on_the_students_feature_and_its_gradient_sums_to_zero():
    student, teacher, a = small("gfl").double(), small("gfl", 1).double(), make_args("gfl")
    x = student.normalise(make_batch()["images"], make_batch()["sizes"])
    with torch.no_grad():
        s, t = student(x, (3,)), teacher(x, (3,))
    gain = 0.5 + torch.rand(1, 64, 1, 1, dtype=torch.float64) * 3
    held = {k: [f.clone().requires_grad_() for f in v] for k, v in s[2].items()}
    plain, _ = crosskd.strategy_maps("a", student, teacher, s._replace(held=held), t, a.kd_layer)
    louder, _ = crosskd.strategy_maps("a", student, teacher, s._replace(held={k: [f * gain for f in v] for k, v in held.items()}), t, a.kd_layer)
    for p, q in zip(plain["cls"][:3], louder["cls"][:3]):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=1e-3)  # exact but for the 1e-6 beside the std
    sum(m.pow(2).sum() for m in plain["cls"]).backward()
    for f in held["cls", 3][:4]:
        assert f.grad.sum((0, 2, 3)).abs().max() < 1e-8 * max(1.0, f.grad.abs().max().item() * f.numel())


def test_teacher_is_byte_identical_after_steps_and_stays_in_eval_and_out_of_the_state():
    student, teacher = small("gfl"), small("gfl", 1)
    before = copy.deepcopy(teacher.state_dict())
    model = make_distiller(student, teacher, make_args("gfl"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model.train()
        sum(model(make_batch()).values()).backward()
        optimizer.step()
    assert not teacher.training and not any(m.training for m in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(k.startswith("student.") for k in model.state_dict())
    assert len(list(model.parameters())) == len(list(student.parameters()))


@pytest.mark.parametrize("kind", DETECTORS)
def test_method_none_is_the_plain_detector_and_crosskd_only_adds_terms(kind):
    student, batch = small(kind), make_batch()
    plain = make_distiller(student, None, make_args(kind, "--method", "none"))(batch)
    full = make_distiller(student, small(kind, 1), make_args(kind, "--method", "crosskd+pkd"))(batch)
    assert all(torch.equal(v, full[k]) for k, v in plain.items())
    assert set(full) - set(plain) == {"kd_cls", "kd_box", "pkd"} | ({"kd_ctr"} if kind == "atss" else set())


@pytest.mark.parametrize("kind", DETECTORS)
def test_batch_without_any_box_has_finite_losses_and_gradients_everywhere(kind):
    student = small(kind)
    model = make_distiller(student, small(kind, 1), make_args(kind, "--method", "crosskd+pkd"))
    losses = model(make_batch(boxes=()))
    assert all(v.isfinite() for v in losses.values())
    assert losses["kd_cls"] < 1e4  # not multiplied by 10^6 (FCOS)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_gfl_box_kd_does_not_change_when_all_region_weights_are_multiplied_but_the_others_do():
    for kind in DETECTORS:
        student, teacher, batch, a = small(kind), small(kind, 1), make_batch(), make_args(kind)
        with torch.no_grad():
            s, t_out = (m.flatten(m(m.normalise(batch["images"], batch["sizes"]))[0]) for m in (student, teacher))
        t = student.assign(LEVELS, batch["sizes"], batch["boxes"], batch["labels"])
        w = torch.rand(t.weight.shape)
        one, two = (student.kd_box(s, t_out, t, k * w, a.kd_T)["kd_box"].item() for k in (1, 2))
        assert two == pytest.approx(one if kind == "gfl" else 2 * one, rel=1e-5)


@pytest.mark.parametrize("kind", DETECTORS)
def test_kd_weights_multiply_their_own_terms(kind):
    """--kd-weights, of Eq. 4: given as they are, nothing changes; twice and three times as large, the terms are, too."""
    batch, losses = make_batch(), []
    usual = dict(gfl=(1, 4), fcos=(0.4, 0.75)).get(kind, (1, 1))
    for weights in ((), usual, (2 * usual[0], 3 * usual[1])):
        student, teacher = small(kind), small(kind, 1)
        losses.append(make_distiller(student, teacher, make_args(kind, *(["--kd-weights", *map(str, weights)] if weights else [])))(batch))
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0])
    factors = dict(kd_cls=2, kd_box=3, kd_ctr=3)
    for k in losses[0]:
        torch.testing.assert_close(losses[2][k], factors.get(k, 1) * losses[0][k])


def test_a_detector_of_an_unknown_start_is_refused():
    with pytest.raises(crosskd.UserError, match="r18: starts from imagenet or none, not from best.pt"):
        GFL("r18", 3, 64, init="best.pt")


FLAG_CHANGES = [  # flags, the terms that they change
    (["--kd-layer", "1"], {"kd_cls", "kd_box"}), (["--kd-cls-loss", "bce"], {"kd_cls"}), (["--kd-region", "P"], {"kd_cls"}),
    (["--kd-region", "N"], {"kd_cls"}), (["--kd-reg-mask", "fg"], {"kd_box"}), (["--kd-T", "3"], {"kd_box"}), (["--kd-beta", "2"], {"kd_cls"}),
    (["--align", "pre"], {"kd_cls", "kd_box"}), (["--align", "none"], {"kd_cls", "kd_box"}), (["--kd-strategy", "b"], {"kd_cls", "kd_box"}),
    (["--kd-strategy", "c"], {"kd_cls", "kd_box"}), (["--kd-strategy", "d"], {"kd_cls", "kd_box"})]


@pytest.mark.parametrize("flags, changed", FLAG_CHANGES, ids=[" ".join(f) for f, _ in FLAG_CHANGES])
def test_each_ablation_flag_changes_exactly_the_terms_it_names(flags, changed):
    student, teacher, batch = small("gfl"), small("gfl", 1), make_batch()
    base, other = (make_distiller(student, teacher, make_args("gfl", *f))(batch) for f in ([], flags))
    assert set(base) == set(other) and {k for k in base if not torch.equal(base[k], other[k])} == changed


def test_branch_and_method_flags_switch_whole_terms():
    student, teacher, batch = small("gfl"), small("gfl", 1), make_batch()
    terms = lambda *f: set(make_distiller(student, teacher, make_args("gfl", *f))(batch)) - {"cls", "box", "dfl"}
    assert terms("--kd-branches", "cls") == {"kd_cls"} and terms("--kd-branches", "reg") == {"kd_box"}
    assert terms("--method", "mimic") == {"mimic_cls", "mimic_box"} and terms("--method", "ld") == {"ld_cls", "ld_box"}
    assert terms("--method", "pkd") == {"pkd"} and terms("--method", "fitnet") == {"fitnet"}
    assert terms("--method", "crosskd+ld") == {"kd_cls", "kd_box", "ld_cls", "ld_box"}


def test_positive_and_negative_regions_add_up():
    student, teacher, batch = small("gfl"), small("gfl", 1), make_batch()
    p, n, both = (make_distiller(student, teacher, make_args("gfl", "--kd-region", r))(batch)["kd_cls"].item() for r in ("P", "N", "P+N"))
    assert p + n == pytest.approx(both, rel=1e-5) and p > 0 and n > 0


@pytest.mark.parametrize("strategy", "bcd")
def test_other_strategies_put_gradient_on_the_students_own_head(strategy):
    student, _, _ = grads("gfl", 3, ("--kd-strategy", strategy))
    assert student.head.cls_pred.weight.grad.abs().max() > 0
    if strategy == "b":  # only the student head after block 3 is in the graph: nothing reaches the backbone
        assert student.body.stages["layer4"][0].conv1.weight.grad is None or student.body.stages["layer4"][0].conv1.weight.grad.abs().max() == 0


def test_mimicking_gradient_reaches_the_prediction_layers():
    student, _, _ = grads("gfl", 3, ("--method", "mimic"), total=lambda losses: losses["mimic_cls"] + losses["mimic_box"])
    assert student.head.cls_pred.weight.grad.abs().max() > 0 and student.head.reg_pred.weight.grad.abs().max() > 0


def test_ld_equals_a_loop_over_positives():
    student, teacher, batch = small("gfl"), small("gfl", 1), make_batch()
    with torch.no_grad():
        s, t_out = (m.flatten(m(m.normalise(batch["images"], batch["sizes"]))[0]) for m in (student, teacher))
    t = student.assign(LEVELS, batch["sizes"], batch["boxes"], batch["labels"])
    box = cls = 0.0
    for b, a in t.positive.nonzero().tolist():
        w = s["cls"][b, a].sigmoid().max()
        p, q = (o["reg"][b, a].view(4, 17) / 10 for o in (t_out, s))
        box += 0.25 * 100 * F.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").mean(1).sum() / 4 * w
        p, q = (o["cls"][b, a] / 2 for o in (t_out, s))
        cls += 10 * 4 * F.kl_div(q.log_softmax(0), p.softmax(0), reduction="none").mean() / t.count
    got = ld_losses(s, t_out, t)
    assert got["ld_box"].item() == pytest.approx(float(box), rel=1e-4) and got["ld_cls"].item() == pytest.approx(float(cls), rel=1e-4)


# ------------------------------------------------------------------ model details

def test_padding_is_the_mean_pixel_and_fcos_sees_bgr():
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    images[:, 0] = 255
    sizes = torch.tensor([[32, 64]])
    x = FCOS("r50").normalise(images, sizes)
    assert x[0, 2, 0, 0].item() == pytest.approx(255 - 122.7717) and x[0, 0, 0, 0].item() == pytest.approx(-102.9801)
    assert x[:, :, 32:].abs().max() == 0
    y = GFL("tiny8").normalise(images, sizes)
    assert y[0, 0, 0, 0].item() == pytest.approx((255 - 123.675) / 58.395, rel=1e-5) and y[:, :, 32:].abs().max() == 0


def test_caffe_style_moves_the_stride_to_the_first_convolution():
    caffe, pytorch = FCOS("r50").body.stages, GFL("r50").body.stages
    for layer in ("layer2", "layer3", "layer4"):
        assert caffe[layer][0].conv1.stride == (2, 2) and caffe[layer][0].conv2.stride == (1, 1)
        assert pytorch[layer][0].conv1.stride == (1, 1) and pytorch[layer][0].conv2.stride == (2, 2)
    assert caffe["layer1"][0].conv1.stride == (1, 1)


def test_p6_relu_is_fcos_only_and_p6_source_is_a_choice():
    x = torch.randn(1, 3, 64, 64)
    for kind in DETECTORS:
        model = small(kind)
        feats = list(model.fpn(model.body(x)).values())
        p6 = feats[3].relu() if kind == "fcos" else feats[3]
        torch.testing.assert_close(model.fpn.extra_blocks.p7(p6), feats[4])
        torch.testing.assert_close(model.fpn.extra_blocks.p6(feats[2]), feats[3])
    model = RetinaNet("tiny8", 3, 64, p6="on_input")
    c5 = list(model.body(x).values())[-1]
    torch.testing.assert_close(model.fpn.extra_blocks.p6(c5), list(model.fpn(model.body(x)).values())[3])


def test_pretrained_backbone_keeps_stem_layer1_and_batchnorm_frozen(monkeypatch):
    monkeypatch.setattr(zoo, "fetch", lambda url, sha: "x")
    resnet = crosskd.torchvision.models.resnet50().state_dict()
    monkeypatch.setattr(zoo, "read_foreign", lambda path, flag: (resnet, {}))
    for cls in (GFL, FCOS):
        model = cls("r50", init="imagenet").train()
        assert not any(m.training for m in model.body.modules() if isinstance(m, torch.nn.BatchNorm2d)) and model.head.training
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        expected = {n for n, _ in model.named_parameters() if n.split(".")[2] in ("conv1", "bn1", "layer1") and n.startswith("body.")}
        if cls is FCOS:  # and no BN affine anywhere
            bn = {k for k, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
            expected |= {f"{k}.{p}" for k in bn for p in ("weight", "bias")}
        assert frozen == expected


def test_fcos_optimizer_groups_follow_the_released_config():
    model = FCOS("tiny8", 3, 64)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = make_optimizer(model, "sgd", 0.01, 1e-4, "fcos").param_groups
    seen = [names[id(p)] for g in groups for p in g["params"]]
    assert sorted(seen) == sorted(names.values())
    for g in groups:
        for n in (names[id(p)] for p in g["params"]):
            bias, norm = n.endswith("bias"), "norm" in n or "bn" in n or "downsample.1" in n
            assert g["weight_decay"] == (0 if bias else 1e-4) and g["lr"] == pytest.approx(0.02 if bias and not norm else 0.01), n
    for name, algorithm in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        optimizer = make_optimizer(GFL("tiny8", 3, 64), name, 0.01, 1e-4, "gfl")
        assert type(optimizer) is algorithm and len(optimizer.param_groups) == 1 and optimizer.param_groups[0].get("momentum", 0.9) == 0.9


def test_detect_respects_threshold_count_clip_and_classwise_nms():
    model = ATSS("tiny8", 2, 64)
    maps = dict(cls=[torch.full((1, 2, h, w), -9.0) for h, w in LEVELS], reg=[torch.zeros(1, 4, h, w) for h, w in LEVELS],
                ctr=[torch.zeros(1, 1, h, w) for h, w in LEVELS])
    (boxes, scores, labels), = model.detect(maps, torch.tensor([[128, 96]]))
    assert len(boxes) == 0
    maps["cls"][0][0, 0, 5, 5] = 2.0   # two classes on one anchor: both stay
    maps["cls"][0][0, 1, 5, 5] = 1.0
    maps["cls"][0][0, 0, 5, 6] = 1.5   # IoU 7/9 with its neighbour: suppressed
    (boxes, scores, labels), = model.detect(maps, torch.tensor([[128, 60]]))
    assert labels.tolist() == [0, 1] and boxes[0].tolist() == [8, 8, 60, 72]  # clipped at x = 60
    torch.testing.assert_close(scores, torch.tensor([2.0, 1.0]).sigmoid() * 0.5)
    maps["cls"] = [torch.full_like(m, 3.0) for m in maps["cls"]]
    assert len(model.detect(maps, torch.tensor([[128, 96]]), max_per_image=7)[0][0]) == 7


def test_mismatched_pairs_are_refused_by_name():
    args, student = make_args(), small("gfl")
    for teacher, word in ((small("atss"), "kind"), (small("gfl", classes=4), "num_classes"), (GFL("tiny8", 3, 32), "channels 32, .*--adapt")):
        with pytest.raises(UserError, match=word):
            check_arch(teacher.arch, student.arch, args)
    check_arch(GFL("tiny8", 3, 32).arch, student.arch, make_args("gfl", "--adapt"))
    check_arch(GFL("tiny8", 3, 32).arch, student.arch, make_args("gfl", "--method", "mimic"))  # compares predictions only
    with pytest.raises(UserError, match="'x'"):
        crosskd.check_classes(["a", "x", "c"], 3, ["a", "b", "c"], "--teacher")


def test_a_narrow_student_learns_through_its_adapter_and_keeps_nothing_of_it():
    student, teacher = GFL("tiny8", 3, 32), small("gfl", 1)
    model = make_distiller(student, teacher, make_args("gfl", "--adapt", "--channels", "32")).train()
    losses = model(make_batch())
    (losses["kd_cls"] + losses["kd_box"]).backward()
    assert all(p.grad.abs().max() > 0 for p in model.adapter.parameters())
    assert student.head.cls_tower[2].conv.weight.grad.abs().max() > 0 and student.head.cls_tower[3].conv.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("adapter" in k for k in student.state_dict()) and {p for p in model.adapter.parameters()} <= set(model.parameters())
    from_optimizer = {p for g in make_optimizer(model, "sgd", 0.01, 0, "gfl").param_groups for p in g["params"]}
    assert set(model.adapter.parameters()) <= from_optimizer


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_quality_focal_in_less_memory_is_quality_focal(beta):
    g = torch.Generator().manual_seed(1)
    s, t = (torch.randn(9, 7, dtype=torch.float64, generator=g) * 3 for _ in range(2))
    plain, lean = (s.clone().requires_grad_() for _ in range(2))
    a, b = crosskd.quality_focal(plain, t, beta), quality_focal_kd(lean, t, beta)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    a.sum().backward(), b.sum().backward()
    torch.testing.assert_close(plain.grad, lean.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", DETECTORS)
def test_the_tables_own_forward_gives_the_losses_of_the_algorithm(kind):
    """Comparison with method crosskd and strategy a is Distiller."""
    student, teacher, batch = small(kind), small(kind, 1), make_batch()
    args = make_args(kind)
    plain = make_distiller(student, teacher, args)
    assert type(plain) is crosskd.Distiller
    other = crosskd.Comparison(student, teacher, ["crosskd"], layer=args.kd_layer, align="post", kd=kd_options(args))
    a, b = plain(batch), other(batch)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_order_of_pixels_in_memory_changes_losses_by_rounding_only():
    """fast_layout: NHWC for wide networks; ours of 8 channels stay as they are on a CPU."""
    torch.manual_seed(0)
    student, teacher, batch = GFL("r18", 3, 64), small("gfl", 1), make_batch()
    before = make_distiller(student, teacher, make_args()).eval()(batch)
    for net in (student, teacher):
        fast_layout(net, torch.device("cpu"))
    assert student.body.stages["layer4"][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert teacher.head.cls_pred.weight.is_contiguous()
    after = make_distiller(student, teacher, make_args()).eval()(batch)
    for name in before:
        assert after[name].item() == pytest.approx(before[name].item(), rel=1e-5, abs=1e-6), name


def test_every_row_of_the_tables_is_a_run():
    """Each row's flags parse and resolve; numbers stand beside them."""
    for name, (number, flags, _) in crosskd.ROWS.items():
        args = crosskd.parse_args(["--row", name])
        assert args.row == name and float(number) > 0
        for word in flags.split()[::2]:
            assert getattr(args, word[2:].replace("-", "_")) is not None
        if not args.eval:
            resolved = crosskd.resolve(args)
            assert resolved.student.count("_") == 1 and resolved.epochs in (12, 24)
    args = crosskd.resolve(crosskd.parse_args(["--row", "t10-b", "--epochs", "3"]))
    assert (args.kd_strategy, args.teacher, args.student, args.epochs) == ("b", "gfl_r50", "gfl_r18", 3)


NUMBERS = ["--lr", "--weight-decay", "--kd-T", "--kd-beta", "--pkd-weight", "--score"]


@pytest.mark.parametrize("flags", [
    ["--kd-layer", "5"], ["--kd-layer", "-1"], ["--method", "crossdk"], ["--method", "none+pkd"],
    ["--batch-size", "0"], ["--predict", "x.jpg"], ["--kd-T", "0"], ["--lr", "0"], ["--kd-beta", "-1"],
    ["--score", "1.5"], ["--seed", str(2**64)], ["--epochs", "1.5"], ["--workers", "1e3"],
    *([flag, value] for flag in NUMBERS for value in ("nan", "inf", "-inf", "x"))], ids=" ".join)
def test_wrong_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        crosskd.parse_args(flags)
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("flags, word", [
    ("--eval x --resume", "--resume"), ("--eval x --predict y --weights z", "one at a time"),
    ("--weights x", "--predict"), ("--score 0.5", "--predict"),
    ("--kd-layer 1 --method pkd", "--method crosskd"), ("--kd-T 2 --method ld", "--method"),
    ("--pkd-at cls", "--method pkd"),
    ("--kd-strategy b --method mimic", "--method crosskd"), ("--kd-branches cls --method fitnet", "--method"),
    ("--sync-stats --method none", "--method"), ("--no-teacher-check --method none", "--method"),
    ("--kd-beta 2 --kd-cls-loss bce", "--kd-cls-loss qfl"), ("--kd-region P --kd-branches reg", "both"),
    ("--kd-reg-mask fg --kd-branches cls", "both"), ("--kd-T 2 --kd-branches cls", "both"),
    ("--train-json x", "--train-images"), ("--val-json x", "--val-images"), ("--local-rank=0", "torchrun")])
def test_flags_that_contradict_each_other_or_have_no_effect_are_refused(flags, word, capsys):
    with pytest.raises(SystemExit):
        crosskd.parse_args(flags.split())
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert word in line and any(flag.split("=")[0] in line for flag in flags.split())


def test_flags_that_a_mode_does_not_read_are_said(capsys):
    crosskd.parse_args("--eval x --lr 1 --kd-T 2 --image-size 64 --val-json v --val-images d".split())
    assert capsys.readouterr().err == "note: with --eval there is no effect of --kd-T, --lr\n"
    crosskd.parse_args("--predict x --weights y --epochs 3 --score 0.1".split())
    assert capsys.readouterr().err == "note: with --predict there is no effect of --epochs\n"
    crosskd.parse_args("--teacher gfl_r50 --student gfl_r18 --method none".split())
    assert "no effect of --teacher" in capsys.readouterr().err
    crosskd.parse_args("--teacher fcos_r101 --method none".split())  # it says which detector
    crosskd.parse_args("--data shapes --lr 0.1".split())
    assert capsys.readouterr().err == ""


def test_resolving_fills_in_what_depends_on_other_flags_and_changes_nothing_else():
    for flags, want in (
            ("", dict(student="gfl_r50", teacher="gfl_r101", epochs=12, kd_layer=3, lr=0.01, optimizer="sgd",
                      init="imagenet")),
            ("--teacher fcos_r101", dict(student="fcos_r50", epochs=24, kd_layer=2)),
            ("--teacher retinanet_r101", dict(epochs=12)), ("--row t7-retinanet", dict(epochs=24, teacher="retinanet_r101")),
            ("--teacher retinanet_r101 --student retinanet_r18", dict(epochs=12)),
            ("--method none", dict(teacher=None)),
            ("--data shapes", dict(student="gfl_tiny16", teacher=None, epochs=3, batch_size=8,
                                   optimizer="adamw", init="shapes")),
            ("--data shapes --epochs 2 --lr 0.1 --kd-layer 0", dict(epochs=2, lr=0.1, kd_layer=0))):
        args = crosskd.parse_args(flags.split())
        before = copy.deepcopy(vars(args))
        found = vars(crosskd.resolve(args))
        assert vars(args) == before and {k: found[k] for k in want} == want
        assert all(found[k] == v for k, v in before.items() if v is not None)
    for flags, word in (("--method ld --student atss_r50", "only GFL has"), ("--student gfl_r7", "gfl_r7"),
                        ("--kd-T 2 --student fcos_r50", "GFL's binned edges"),
                        ("--data shapes --train-json x --train-images y", "other classes")):
        with pytest.raises(UserError, match=word):
            crosskd.resolve(crosskd.parse_args(flags.split()))


def test_help_has_one_line_of_usage_groups_and_three_commands(capsys):
    with pytest.raises(SystemExit) as e:
        crosskd.parse_args(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and text.startswith("usage: ") and text.splitlines()[1] == ""
    assert [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")] == [
        "options:", "data:", "models:", "method:", "schedule:", "own data, instead of --data's layout:",
        "run:", "examples:"]
    commands = text[text.index("examples:"):].strip().splitlines()[1:]
    assert len(commands) == 3 and all("crosskd.py --" in c for c in commands)


def test_every_loss_term_has_a_line_that_explains_it_in_80_columns():
    terms = set()
    for kind in DETECTORS:
        for method in ("crosskd+mimic+pkd+fitnet", "crosskd+ld")[:2 if kind == "gfl" else 1]:
            model = make_distiller(small(kind), small(kind, 1), make_args(kind, "--method", method))
            terms |= set(model(make_batch()))
    assert terms == set(crosskd.LEGEND)
    assert all(len(f"{term}: {text}") < 80 for term, text in crosskd.LEGEND.items())
    for term, text in crosskd.LEGEND.items():
        assert "Eq. " in text or not term.startswith(("kd_", "mimic_", "fitnet"))


def test_parameters_and_flops_of_the_start_are_those_counted_over_the_layers(capsys):
    model, total = small("fcos"), 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, torch.nn.Conv2d):
            total += 2 * output.numel() * module.weight[0].numel()
    model.body.requires_grad_(False)
    hooks = [m.register_forward_hook(count) for m in model.modules()]
    x = torch.zeros(1, 3, 256, 224)
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    describe_model("student", model, x)
    every, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or k) for k in (1, 0))
    want = f"student: {every:,} parameters, {trained:,} trained, {total / 1e9:.1f} GFLOPs at 256 x 224\n"
    assert capsys.readouterr().out == want


def test_bf16_kd_losses_are_within_a_few_percent_of_fp32():
    student, teacher, batch = small("gfl"), small("gfl", 1), make_batch()
    full, half = (make_distiller(student, teacher, make_args("gfl", "--amp", amp))(batch) for amp in ("none", "bf16"))
    for k in full:
        assert half[k].dtype == torch.float32 and half[k].item() == pytest.approx(full[k].item(), rel=0.05), k


def test_class_names_are_compared_but_underscores_are_not(capsys):
    crosskd.check_classes(["traffic_light"], 1, ["traffic light"], "--eval x")
    assert not capsys.readouterr().err
    crosskd.check_classes(None, 1, ["anything"], "--eval x")
    assert "--eval x: holds no class names; taken to be those of --data in their order, anything first" in capsys.readouterr().err
    with pytest.raises(UserError, match="class 0 is 'cat'"):
        crosskd.check_classes(["cat"], 1, ["dog"], "--eval x")
    with pytest.raises(UserError, match="has 2 classes, --data has 1"):
        crosskd.check_classes(None, 2, ["dog"], "--eval x")


@pytest.mark.parametrize("setting", ["norm_on_bbox=True", "centerness_on_reg=True", "style='pytorch'"])
def test_fcos_variants_with_the_same_keys_but_another_meaning_are_refused(tmp_path, monkeypatch, setting):
    arch = dict(kind="fcos", backbone="tiny8", num_classes=3, channels=64, p6="on_output")
    monkeypatch.setattr(zoo, "infer_arch", lambda state, where: arch)
    monkeypatch.setattr(zoo, "from_mmdet", lambda state: FCOS("tiny8", 3, 64).state_dict())
    for config, refused in ((f"bbox_head=dict({setting})", True), ("backbone=dict(style='caffe')", False)):
        content = dict(meta=dict(config=config, CLASSES=("a", "b", "c")), state_dict={"x": torch.zeros(1)})
        torch.save(content, tmp_path / "f.pth")
        if refused:
            with pytest.raises(UserError, match=setting):
                crosskd.load(str(tmp_path / "f.pth"))
        else:
            assert crosskd.load(str(tmp_path / "f.pth"))[1] == ("a", "b", "c")


@pytest.mark.parametrize("kind, config, refused", [
    ("retinanet", "bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2])", True), ("retinanet", "target_stds=[1.0, 1.0, 1.0, 1.0]", False),
    ("retinanet", "octave_base_scale=2", True), ("retinanet", "octave_base_scale=4", False),
    ("atss", "target_stds=[1.0, 1.0, 1.0, 1.0]", True), ("atss", "octave_base_scale=8, target_stds=[0.1, 0.1, 0.2, 0.2]", False)])
def test_boxes_coded_by_other_numbers_are_refused(tmp_path, monkeypatch, kind, config, refused):
    """FreeAnchor's RetinaNet has the keys of RetinaNet and would decode boxes ten times as far."""
    arch = dict(kind=kind, backbone="tiny8", num_classes=3, channels=64, p6="on_output")
    monkeypatch.setattr(zoo, "infer_arch", lambda state, where: arch)
    monkeypatch.setattr(zoo, "from_mmdet", lambda state: DETECTORS[kind]("tiny8", 3, 64).state_dict())
    torch.save(dict(meta=dict(config=config, CLASSES=("a", "b", "c")), state_dict={"x": torch.zeros(1)}), tmp_path / "f.pth")
    if refused:
        with pytest.raises(UserError, match=r"its config has (target_stds|octave_base_scale)=.*, this script's detector \d"):
            crosskd.load(str(tmp_path / "f.pth"))
    else:
        assert crosskd.load(str(tmp_path / "f.pth"))[1] == ("a", "b", "c")


def test_a_teacher_of_another_image_size_is_told(capsys):
    tell_size(dict(image_size="800"), "800", "--teacher")
    tell_size({}, "800", "--teacher")
    assert not capsys.readouterr().err
    tell_size(dict(image_size="640"), "800", "--teacher")
    assert "--teacher: was trained at --image-size 640, it sees 800 here" in capsys.readouterr().err


def test_every_zoo_name_builds_and_its_hash_is_in_its_file_name():
    for name, file in zoo.CROSSKD_ZOO.items():
        kind, backbone = name.split("_")[:2]
        assert kind in DETECTORS and (re.search(r"-[0-9a-f]{8}\.pth$", file) or name == "retinanet_swint")
        with torch.device("meta"):
            assert crosskd.make_body(backbone)[1]


def test_offline_download_is_one_line_with_the_place_to_put_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(zoo, "MMDET_URL", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="Offline.*gfl_r101"):
        crosskd.load("gfl_r101", "--teacher")
    with pytest.raises(UserError, match="authors"):
        crosskd.load("retinanet_swint", "--teacher")


def test_methods_without_teacher_features_keep_none_and_pkd_at_a_tower_is_after_the_relu():
    student, teacher, batch = small("gfl"), small("gfl", 1), make_batch()
    assert make_distiller(student, teacher, make_args("gfl", "--method", "pkd")).keep_layers == ()
    for flags in ([], ["--align", "pre"]):
        pkd = make_distiller(student, teacher, make_args("gfl", "--method", "crosskd+pkd", "--pkd-at", "cls", *flags))(batch)["pkd"].item()
        alone = make_distiller(student, teacher, make_args("gfl", "--method", "pkd", "--pkd-at", "cls"))(batch)["pkd"].item()
        assert pkd == pytest.approx(alone, rel=1e-5)


def test_compiled_networks_give_the_same_losses():
    """Graph capture and autograd of torch.compile (backend aot_eager: no C++ compiler, seconds instead of minutes)."""
    student, teacher, batch = small("gfl"), small("gfl", 1), make_batch()
    model = make_distiller(student, teacher, make_args("gfl", "--method", "crosskd+pkd"))
    plain = model(batch)
    for net in (student, teacher):
        net.compile(backend="aot_eager")
        net.head.compile(backend="aot_eager")
    compiled = model(batch)
    sum(compiled.values()).backward()
    for k in plain:
        assert compiled[k].item() == pytest.approx(plain[k].item(), rel=1e-5), k
    assert all(p.grad is not None for p in student.parameters())
