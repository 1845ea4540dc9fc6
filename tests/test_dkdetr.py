# SPDX-License-Identifier: MIT
"""dkdetr.py: attention, matching and every loss by hand or against a slow loop, the invariants of the KD queries, masks, key names."""
import argparse
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert

import dkdetr
from common.clip import FrozenCLIP
from common.tiny import TINY, tiny_model
from common.zoo import to_dkdetr
from dkdetr import (DKDETR, TEMPLATES, DeformableAttention, Distiller, MaskHead, Settings, choose_targets, classify, detect, direct_loss,
                    focal_cost, inverse_sigmoid, load, make_distiller, mask_losses, match, match_cost, msda_grid, parameter_groups, parse_args, plain_of,
                    prompt_name, relational_loss, semantic_loss, settings_of, sine)

UNIT = lambda *shape, seed=0: F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)
SMALL = dict(backbone="tiny8", text_dim=64, dim=32, heads=4, hidden=32, levels=3, encoder=1, decoder=3, queries=12, dropout=0.0)


def flags(*extra):
    return dkdetr.resolve(parse_args(["--data", "shapes", "--backbone", "tiny8", "--dim", "32", "--encoder", "1", "--queries", "12", *extra]))


@pytest.fixture(scope="module")
def clip():
    import open_clip
    torch.manual_seed(0)
    return FrozenCLIP(tiny_model(**TINY), open_clip.tokenize, "random")


def batch_of(count=2, boxes=((20.0, 20, 60, 60), (50.0, 10, 100, 90)), size=128):
    g = torch.Generator().manual_seed(0)
    batch = dict(images=torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=g), sizes=torch.tensor([[size, size]] * count),
                 boxes=torch.tensor([boxes] * count).reshape(count, -1, 4) if boxes else torch.zeros(count, 1, 4),
                 labels=torch.arange(len(boxes)).repeat(count, 1) if boxes else torch.full((count, 1), -1))
    return batch | dict(counts=[len(boxes)] * count)


def distiller_of(clip, *extra, **model):
    a = flags(*extra)
    torch.manual_seed(1)
    text = clip.class_embeddings(["circle", "square", "cross"])
    distiller = make_distiller(DKDETR(**{**SMALL, **model, "masks": a.masks}), text, clip, settings_of(a)).train()
    distiller.kd_active = True
    return distiller


# ------------------------------------------------------------------ multi-scale deformable attention

def slow_attention(value, level_sizes, at, weight):
    """The definition, one number at a time."""
    b, _, heads, d = value.shape
    out = torch.zeros(b, at.shape[1], heads, d, dtype=value.dtype)
    for i, q, m, level, p in itertools.product(*map(range, (b, *at.shape[1:5]))):
        h, w = level_sizes[level]
        start = sum(h * w for h, w in level_sizes[:level])
        x, y = at[i, q, m, level, p, 0] * w - 0.5, at[i, q, m, level, p, 1] * h - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < h and 0 <= column < w:
                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                    out[i, q, m] += weight[i, q, m, level, p] * share * value[i, start + row * w + column, m]
    return out.flatten(2)


def random_attention(seed=0, sizes=((5, 4), (3, 2))):
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(2, sum(h * w for h, w in sizes), 2, 3, dtype=torch.float64, generator=g)
    at = torch.rand(2, 7, 2, len(sizes), 3, 2, dtype=torch.float64, generator=g) * 1.6 - 0.3  # outside the map, too
    weight = torch.rand(2, 7, 2, len(sizes), 3, dtype=torch.float64, generator=g)
    return value, list(sizes), at, weight


def test_attention_equals_the_definition_to_1e_12():
    inputs = random_attention()
    assert (msda_grid(*inputs) - slow_attention(*inputs)).abs().max() < 1e-12
    one = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64).view(1, 4, 1, 1)
    for (x, y), want in {(.5, .5): 2.5, (.25, .25): 1, (.75, .25): 2, (0, 0): .25, (.5, 0): .75, (1, 1): 1, (-.25, .5): 0}.items():
        at = torch.tensor([x, y], dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
        assert msda_grid(one, [(2, 2)], at, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)).item() == pytest.approx(want, abs=1e-12)


def test_attention_has_the_right_gradients():
    value, sizes, at, weight = random_attention(3, ((3, 4), (2, 2)))
    value, at, weight = (t[:1, :5].clone().requires_grad_() if t is not value else t[:1].clone().requires_grad_() for t in (value, at, weight))
    assert torch.autograd.gradcheck(lambda v, a, w: msda_grid(v, sizes, a, w), (value, at, weight), eps=1e-7, atol=1e-5)


def test_offsets_start_on_rays_and_weights_uniform():
    m = DeformableAttention(64, heads=8, levels=4, points=4)
    bias = m.sampling_offsets.bias.view(8, 4, 4, 2)
    assert torch.allclose(bias[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]), atol=1e-6)
    assert torch.allclose(bias[1, 3], torch.tensor([[1.0, 1], [2, 2], [3, 3], [4, 4]]), atol=1e-6)
    assert not m.sampling_offsets.weight.any() and not m.attention_weights.weight.any() and not m.attention_weights.bias.any()


def test_points_follow_the_size_of_a_reference_box(monkeypatch):
    m = DeformableAttention(8, heads=1, levels=1, points=1)
    seen = []
    monkeypatch.setattr(dkdetr, "msda_grid", lambda value, sizes, at, weight: seen.append(at) or value.new_zeros(1, 1, 8))
    values = m.values(torch.randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.bool))
    m(torch.randn(1, 1, 8), torch.tensor([0.5, 0.5]).view(1, 1, 1, 2), values, [(2, 2)])
    m(torch.randn(1, 1, 8), torch.tensor([0.5, 0.5, 0.2, 0.4]).view(1, 1, 1, 4), values, [(2, 2)])
    assert torch.allclose(seen[0].flatten(), torch.tensor([1.0, 0.5]))  # one cell of two to the right
    assert torch.allclose(seen[1].flatten(), torch.tensor([0.6, 0.5]))  # half the width
    padded = torch.tensor([[False, True, False, True]])
    assert not m.values(torch.randn(1, 4, 8), padded)[0, [1, 3]].any()


# ------------------------------------------------------------------ two stages

def test_proposals_of_a_full_square():
    assert inverse_sigmoid(torch.tensor(1.0)).item() == pytest.approx(11.5129, abs=1e-3)
    assert sine(torch.tensor(0.0), 8).tolist() == [0, 1] * 4
    seen = {}
    model = DKDETR(**{**SMALL, "levels": 4, "queries": 300}).eval()
    model.objectness.register_forward_pre_hook(lambda m, z: seen.update(z=z[0]))
    model.memory_trans.register_forward_pre_hook(lambda m, x: seen.update(memory=x[0]))
    with torch.no_grad():
        out = model(torch.randn(1, 3, 1024, 1024), torch.tensor([[1024, 1024]]))
    assert out.objectness.shape == (1, 21760) and out.proposals.shape == (1, 300, 4)
    usable = seen["memory"].abs().sum(-1) > 0
    assert usable.sum() == 21000 and not usable[0, 0]
    start, side = 0, (128, 64, 32, 16)
    for level, n in enumerate(side):  # the last layer of the refinement starts at zero: a coarse box is its anchor
        row = usable[0, start:start + n * n].view(n, n)[n // 2]
        at = start + (n // 2) * n + n // 2
        assert row.any() and torch.allclose(out.coarse[0, at], torch.tensor([(n // 2 + .5) / n] * 2 + [0.05 * 2**level] * 2), atol=1e-5)
        start += n * n
    score = out.objectness[0].topk(300).values
    assert (score.diff() <= 0).all()


class Maps(torch.nn.Module):
    """Stands for backbone and neck, whose convolutions do see the border: gives the same features with and without padding beside them."""

    def __init__(self, extra):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.maps = [torch.cat([torch.randn(1, 32, n, n, generator=g), torch.randn(1, 32, n, n * extra, generator=torch.Generator().manual_seed(9))], 3) for n in (8, 4, 2)]

    def forward(self, x):
        return self.maps


def test_padding_does_not_reach_a_valid_token():
    torch.manual_seed(0)
    model, found = DKDETR(**SMALL).eval(), []
    with torch.no_grad():
        for m in model.encoder.modules():
            if isinstance(m, DeformableAttention):
                torch.nn.init.normal_(m.sampling_offsets.weight, std=0.5)
        model.neck = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
        for extra in (0, 1):
            model.body = Maps(extra)
            out = model(torch.zeros(1, 3, 64, 64 * (1 + extra)), torch.tensor([[64, 64]]))
            values, start, valid = out.decoding.values[0][0], 0, []
            for n in (8, 4, 2):
                w = n * (1 + extra)
                valid.append(values[start:start + n * w].view(n, w, -1)[:, :n].flatten(0, 1))
                start += n * w
            found.append((torch.cat(valid), out.proposals, out.features))
    assert (found[0][0] - found[1][0]).abs().max() < 1e-5
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5) and torch.allclose(found[0][2], found[1][2], atol=1e-4)
    assert (out.coarse[0, :128].view(8, 16, 4)[:, 8:] == 1).all() and out.coarse.isfinite().all()


def test_frozen_stages_stay_frozen_when_batchnorm_is_synchronised():
    import torchvision
    for bn in ("sync", "frozen"):
        body = torch.nn.SyncBatchNorm.convert_sync_batchnorm(dkdetr.Body(torchvision.models.resnet18(), True, bn)).train()
        norms = {n: m.training for n, m in body.named_modules() if isinstance(m, torch.nn.SyncBatchNorm)}
        assert len(norms) == 20 and not any(on for n, on in norms.items() if "bn1" == n.split(".")[1] or "layer1" in n)
        assert all(on == (bn == "sync") for n, on in norms.items() if "layer4" in n)
        assert not body.stages["layer1"][0].conv1.weight.requires_grad and body.stages["layer2"][0].conv1.weight.requires_grad


def test_fewer_tokens_than_queries_and_padded_proposals_stay_finite(clip):
    distiller = distiller_of(clip, queries=400)
    batch = batch_of(size=64, boxes=((2.0, 2, 30, 30),))
    losses = distiller(batch)
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in distiller.parameters() if p.grad is not None)
    out = distiller.model(torch.zeros(1, 3, 64, 64), torch.tensor([[40, 64]]))
    assert out.proposals.shape[1] == 64 + 16 + 4 and not out.usable.all()


# ------------------------------------------------------------------ matching and detection losses

def test_focal_cost_and_matching():
    assert 2 * focal_cost(torch.tensor(0.0)).item() == pytest.approx(-0.1733, abs=1e-4)
    from torchvision.ops import sigmoid_focal_loss
    assert sigmoid_focal_loss(torch.zeros(1), torch.ones(1), 0.25, 2).item() == pytest.approx(0.0433, abs=1e-4)
    assert sigmoid_focal_loss(torch.zeros(1), torch.zeros(1), 0.25, 2).item() == pytest.approx(0.1300, abs=1e-4)
    rng = torch.Generator().manual_seed(0)
    costs, counts = [torch.randn(2, 3, 6, 5, generator=rng), torch.randn(1, 3, 9, 5, generator=rng)], [5, 0, 3]
    for found, cost in zip(match(costs, counts), costs):
        for layer, image in itertools.product(range(len(cost)), range(3)):
            mine = found[2:, (found[0] == layer) & (found[1] == image)]
            c = cost[layer, image, :, :counts[image]]
            best = min(sum(c[q, o] for o, q in enumerate(order)) for order in itertools.permutations(range(len(c)), counts[image]))
            assert sum(c[q, o] for q, o in mine.T.tolist()) == pytest.approx(float(best), abs=1e-5) and mine.shape[1] == counts[image]
    assert all(f.shape == (4, 0) for f in match(costs, [0, 0, 0]))
    match([torch.full((1, 1, 3, 2), torch.nan)], [2])  # a NaN must not crash the solver; the loss reports it


def test_cost_is_what_the_losses_weigh():
    boxes, gt, scale = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]), torch.tensor([[[0.6, 0.5, 0.2, 0.2]]]), torch.full((1, 1, 4), 100.0)
    want = 2 * focal_cost(torch.tensor(1.0)) + 5 * 0.1 - 2 * (10 * 20 / 600)
    assert match_cost(torch.ones(1, 1, 1), boxes, gt, scale).item() == pytest.approx(want.item(), abs=1e-5)
    l1, giou = dkdetr.box_losses(boxes[0], gt[0], scale[0])
    assert l1.item() == pytest.approx(0.5, abs=1e-5) and giou.item() == pytest.approx(2 * (1 - 1 / 3), abs=1e-5)


def test_no_object_anywhere_is_a_finite_loss_that_reaches_every_parameter(clip):
    distiller = distiller_of(clip, "--masks")
    batch = batch_of(boxes=())
    batch["masks"] = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    losses = distiller(batch)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert [n for n, p in distiller.named_parameters() if p.grad is None] == []  # what DDP needs


def test_detection_loss_against_a_slow_loop(clip):
    distiller = distiller_of(clip).eval()
    distiller.kd_active = False
    batch = batch_of(boxes=((20.0, 20, 60, 60), (50.0, 10, 100, 90), (5.0, 5, 30, 100)))
    batch["labels"][1, 2], batch["counts"] = -1, [3, 2]
    got = distiller(batch)
    out = distiller.model(dkdetr.normalise(batch["images"], batch["sizes"]), batch["sizes"])
    want = dict(cls=0.0, l1=0.0, giou=0.0)
    from scipy.optimize import linear_sum_assignment
    from torchvision.ops import generalized_box_iou
    for layer, image in itertools.product(range(3), range(2)):
        n = batch["counts"][image]
        boxes, gt = out.boxes[layer, image], box_convert(batch["boxes"][image, :n], "xyxy", "cxcywh") / 128
        p = (classify(out.features[layer, image], distiller.text)).sigmoid()
        pixel = lambda b: box_convert(b, "cxcywh", "xyxy") * 128
        giou = generalized_box_iou(pixel(boxes), pixel(gt))
        mine = p[:, batch["labels"][image, :n]]
        cost = 2 * (0.25 * (1 - mine) ** 2 * -(mine + 1e-12).log() - 0.75 * mine**2 * -(1 - mine + 1e-12).log()) + 5 * torch.cdist(boxes, gt, 1) - 2 * giou
        query, obj = linear_sum_assignment(cost.detach().numpy())
        target = torch.zeros_like(p)
        target[query, batch["labels"][image, obj]] = 1
        pt = torch.where(target > 0, p, 1 - p)
        want["cls"] += 2 * (torch.where(target > 0, 0.25, 0.75) * (1 - pt) ** 2 * -(pt + 1e-12).log()).sum() / 5
        want["l1"] += 5 * (boxes[query] - gt[obj]).abs().sum() / 5
        want["giou"] += 2 * (1 - giou[query, obj]).sum() / 5
    for name, value in want.items():
        assert got[name].item() == pytest.approx(value.item(), rel=1e-4), name


def test_classifier():
    f, t = torch.tensor([[3.0, 0], [-2, 0], [0, 1]]), torch.tensor([[5.0, 0], [0, 1]])
    assert classify(f, t).tolist() == [[20, 0], [-20, 0], [0, 20]]
    assert torch.allclose(classify(7 * f, 0.1 * t), classify(f, t)) and torch.equal(classify(f, t.flip(0)), classify(f, t).flip(1))


# ------------------------------------------------------------------ Eqs. 3-5

THERE = lambda *n: torch.tensor([[i < k for i in range(max(n))] for k in n])


def test_semantic_loss_by_hand():
    eye = torch.eye(2, dtype=torch.float64)[None]
    assert semantic_loss(eye, eye, THERE(2)).item() == pytest.approx(math.log(2) + math.log1p(math.exp(-20)), abs=1e-6)
    same = torch.ones(1, 2, 3, dtype=torch.float64)
    assert semantic_loss(same, same, THERE(2)).item() == pytest.approx(20, abs=1e-6)
    assert semantic_loss(same[:, :1], same[:, :1], THERE(1)).item() == pytest.approx(math.log1p(math.exp(-20)), abs=1e-9)
    f, v = UNIT(1, 20, 64), UNIT(1, 20, 64)
    f = torch.cat([f, torch.zeros_like(f)], -1)
    v = torch.cat([torch.zeros_like(v), v], -1)  # orthogonal
    assert semantic_loss(f, v, THERE(20)).item() == pytest.approx(20 * math.log(2), abs=1e-6)


def test_losses_against_slow_loops_and_rotations():
    f, v, there = UNIT(3, 5, 8) * 3, UNIT(3, 5, 8, seed=1), THERE(5, 0, 3)
    skd, rkd, l1 = [], [], []
    for i in (0, 2):
        n = int(there[i].sum())
        F_, V = F.normalize(f[i, :n], dim=-1), F.normalize(v[i, :n], dim=-1)
        total = 0
        for a, b in itertools.product(range(n), range(n)):
            s = torch.sigmoid(F_[a] @ V[b] / 0.05)
            total = total - (s.log() if a == b else (1 - s).log())                             # Eq. 4
        skd.append(total / n)
        p, q = (x @ x.T / 0.2 for x in (V, F_))
        p, q = p.softmax(1), q.softmax(1)
        rkd.append((p * (p.log() - q.log())).sum() / n)                                       # Eq. 5, KL(teacher || student)
        l1.append((F_ - V).abs().sum() / n)
    mean = lambda x: (sum(x) / 2).item()
    assert semantic_loss(f, v, there).item() == pytest.approx(mean(skd), rel=1e-9)
    assert relational_loss(f, v, there).item() == pytest.approx(mean(rkd), rel=1e-9)
    assert direct_loss(f, v, there).item() == pytest.approx(mean(l1), rel=1e-9)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    assert semantic_loss(f @ turn, v @ turn, there).item() == pytest.approx(mean(skd), rel=1e-6)
    assert abs(semantic_loss(f @ turn, v, there).item() - mean(skd)) > 0.1
    assert relational_loss(f @ turn, v, there).item() == pytest.approx(mean(rkd), rel=1e-6)


def test_relational_loss_by_hand():
    c = 0.5
    v = torch.tensor([[[1.0, 0], [c, math.sqrt(1 - c * c)]]], dtype=torch.float64)
    f = torch.eye(2, dtype=torch.float64)[None].requires_grad_()
    assert relational_loss(f, v, THERE(2)).item() == pytest.approx(0.117471, abs=1e-6)
    assert relational_loss(f, v, THERE(2), direction="student").item() == pytest.approx(0.055442, abs=1e-6)
    assert relational_loss(v, v, THERE(2)).item() == pytest.approx(0, abs=1e-12)
    relational_loss(f, v.requires_grad_(False), THERE(2)).backward()
    assert f.grad.abs().sum() > 0
    for loss in (semantic_loss, relational_loss, direct_loss):  # nothing to distil: 0, with a graph
        f = torch.randn(2, 3, 4, requires_grad=True)
        value = loss(f, torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
        value.backward()
        assert value.item() == 0 and f.grad is not None


# ------------------------------------------------------------------ KD queries

def test_object_queries_cannot_depend_on_kd_queries(clip):
    distiller = distiller_of(clip).eval()
    batch, model = batch_of(), distiller.model
    x = dkdetr.normalise(batch["images"], batch["sizes"])
    alone = model(x, batch["sizes"])
    out = model(x, batch["sizes"])
    kd = model.kd_pass(out)
    assert torch.equal(out.boxes, alone.boxes) and torch.equal(out.features, alone.features)
    with torch.no_grad():
        model.kd_queries.add_(1.0)
    again = model(x, batch["sizes"])
    assert torch.equal(again.boxes, alone.boxes) and torch.equal(again.features, alone.features)
    assert not torch.equal(model.kd_pass(again), kd)
    with torch.no_grad():
        model.kd_queries.sub_(1.0)
    kd = model.kd_pass(out)
    grad = torch.autograd.grad(out.features.square().sum() + out.boxes.sum(), model.kd_queries, allow_unused=True)[0]
    assert grad is None or not grad.any()
    # KD features do see the objects, unless told otherwise
    inputs = out.decoding.inputs
    assert torch.autograd.grad(kd.square().sum(), inputs[1], retain_graph=True)[0].abs().sum() > 0
    own = model.kd_pass(out, see_objects=False)
    assert not torch.equal(own, kd) and torch.autograd.grad(own.square().sum(), inputs[1], retain_graph=True, allow_unused=True)[0] is None
    # gradients of distillation arrive in the shared weights and in the backbone
    kd.square().sum().backward()
    assert model.kd_queries.grad.abs().sum() > 0 and model.decoder[0].ffn[0].weight.grad.abs().sum() > 0
    assert next(model.body.parameters()).grad.abs().sum() > 0 and model.project[-1].weight.grad.abs().sum() > 0


def test_kd_pass_equals_masked_attention_over_both_sets():
    """One attention over [objects; KD] whose mask blocks KD keys for object queries: what the paper's figure draws, and our two passes compute."""
    torch.manual_seed(0)
    layer = dkdetr.DecoderLayer(32, 32, 0.0, 4, 1).double().eval()
    obj, kd, where = (torch.randn(1, 5, 32, dtype=torch.float64) for _ in range(3))
    blocked = torch.zeros(10, 10, dtype=torch.bool)
    blocked[:5, 5:] = True
    x, p = torch.cat([obj, kd], 1), torch.cat([where, where], 1)
    both = layer.self_attention(x + p, x + p, x, attn_mask=blocked, need_weights=False)[0]
    values, ref = layer.attention.values(torch.randn(1, 4, 32, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.bool)), torch.rand(1, 5, 1, 4, dtype=torch.float64)
    a, b = layer(obj, where, ref, values, [(2, 2)]), layer(kd, where, ref, values, [(2, 2)], seen=obj)
    y = layer.norms[0](x + both)
    for got, part in ((a, y[:, :5]), (b, y[:, 5:])):
        want = layer.norms[1](part + layer.attention(part + where, ref, values, [(2, 2)]))
        assert torch.allclose(got, layer.norms[2](want + layer.ffn(want)), atol=1e-12)


def test_queries_follow_their_proposals():
    torch.manual_seed(0)
    model = DKDETR(**SMALL).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 96, 96), torch.tensor([[96, 96]]))
        decoding, order = out.decoding, torch.randperm(12)
        proposals = out.proposals[:, order]
        positions, content = model.query_norm(model.query_trans(sine(proposals * (2 * math.pi), 16).flatten(2))).chunk(2, -1)
        turned = decoding._replace(positions=positions, inputs=[], references=[])
        _, features, _ = model.object_pass(content, proposals, turned)
        assert torch.allclose(features, out.features[:, :, order], atol=1e-5)
        again = out._replace(proposals=proposals, decoding=turned)
        kd = model.kd_pass(again)
        assert torch.allclose(turned.references[2], decoding.references[2][:, order], atol=1e-6)
        assert not torch.allclose(kd, model.kd_pass(out)[:, order], atol=1e-4)  # one embedding per rank: KD queries are tied to ranks
        shared = DKDETR(**SMALL, kd_embed="shared").eval()
        shared.load_state_dict({k: v for k, v in model.state_dict().items() if k != "kd_queries"}, strict=False)
        assert torch.allclose(shared.kd_pass(again), shared.kd_pass(out)[:, order], atol=1e-5)


def test_choice_of_targets():
    boxes = torch.tensor([[0.0, 0, 40, 40]]).expand(1, 4, 4).clone()
    usable, matched = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, False, False, False]])
    index, there = choose_targets(usable, matched, boxes, 2, 16)
    assert index.tolist() == [[1, 2]] and there.all()
    index, there = choose_targets(usable, matched, boxes, 10, 16)
    assert there.sum() == 3
    boxes[0, 1, 2], usable[0, 2] = 10, False  # tiny, padding
    index, there = choose_targets(usable, matched, boxes, 2, 16)
    assert index[0, 0] == 3 and there.tolist() == [[True, False]]
    assert not choose_targets(torch.zeros(1, 4, dtype=torch.bool), matched, boxes, 2, 16)[1].any()


class Colour:
    """A CLIP whose embedding is the mean colour of the crop."""
    dim, size, grey_levels = 3, 8, [[0.0] * 3, [1.0] * 3]
    encode_images = staticmethod(lambda pixels: F.normalize(pixels.mean((2, 3)), dim=1))

    def encode_crops(self, pixels, boxes, owner):
        rois = torch.cat([owner[:, None].to(boxes), boxes], 1)
        from torchvision.ops import roi_align
        return self.encode_images(roi_align(pixels, rois, 4, aligned=True))


@pytest.mark.parametrize("extra", [[], ["--crop-fit", "warp"]])
def test_crop_shows_its_own_box_after_jitter_flip_and_padding(tmp_path, extra):
    from PIL import Image

    from common.datasets import CocoDataset, collate, records_of
    colours = np.random.default_rng(0).integers(40, 255, (8, 3))
    boxes = [(20 + 100 * (i % 4), 15 + 90 * (i // 4), 60, 50) for i in range(8)]
    picture = np.zeros((200, 420, 3), np.uint8)
    for (x, y, w, h), c in zip(boxes, colours):
        picture[y:y + h, x:x + w] = c
    Image.fromarray(picture).save(tmp_path / "a.png")
    raw = dict(images=[dict(id=1, file_name="a.png", width=420, height=200)], categories=[dict(id=i + 1, name=str(i)) for i in range(8)],
               annotations=[dict(id=i, image_id=1, category_id=i + 1, bbox=list(map(float, b)), area=1.0) for i, b in enumerate(boxes)])
    distiller = Distiller(torch.nn.Linear(1, 1), torch.zeros(1, 3), Colour(), settings_of(flags(*extra)))
    data = CocoDataset(tmp_path, records_of(raw, tmp_path / "a.json"), True, canvas=256, jitter=(0.5, 2.0))
    seen = 0
    for seed in range(12):
        batch = collate([data[0, seed], data[0, seed + 100]], 256)
        image, slot = (batch["labels"] >= 0).nonzero(as_tuple=True)
        b = batch["boxes"][image, slot]
        inner = (b[:, 2:] - b[:, :2]).amin(1) > 12
        v = distiller.crop_embeddings(batch, b[inner], image[inner])
        want = F.normalize(torch.from_numpy(colours)[batch["labels"][image, slot][inner]].float(), dim=1)
        assert (v * want).sum(1).min() > 0.995
        seen += len(v)
    assert seen > 40


def test_no_crop_at_all_is_no_error_for_a_transformer_either():
    import open_clip
    model = open_clip.CLIP(16, dict(layers=1, width=32, head_width=16, patch_size=8, image_size=16), dict(context_length=8, vocab_size=49408, width=16, heads=2, layers=1))
    clip = FrozenCLIP(model, open_clip.tokenize, "vit")
    assert clip.encode_images(torch.zeros(0, 3, 16, 16)).shape == (0, 16)
    distiller = Distiller(torch.nn.Linear(1, 1), torch.zeros(1, 16), clip, Settings(crop_fit="warp"))
    batch = dict(images=torch.zeros(2, 3, 32, 32, dtype=torch.uint8), sizes=torch.tensor([[20, 30]] * 2))
    assert distiller.crop_embeddings(batch, torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([1])).shape == (1, 16)  # image 0 has none
    assert distiller.crop_embeddings(batch, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0, 16)


def test_shuffled_crops_are_those_of_another_image(clip):
    distiller = distiller_of(clip, "--shuffle-crops", "--kd-min-size", "1")
    batch = batch_of(3)
    there = torch.tensor([[True, True], [True, False], [True, True]])
    distiller.crop_embeddings = lambda b, boxes, image: F.one_hot(image, 64).float()
    v, there = distiller.embeddings(batch, torch.rand(3, 2, 4), there)
    owner = v.argmax(-1)
    assert all((owner[i][there[i]] == (i - 1) % 3).all() for i in range(3)) and there.any(1).all()


def test_distillation_flags_all_run_and_matter(clip):
    batch = batch_of(size=96)
    batch["hidden"] = torch.tensor([[[10.0, 10, 40, 50]], [[0.0, 0, 0, 0]]])

    def wild():  # boxes that differ from layer to layer
        for head in distiller.model.refine:
            torch.nn.init.normal_(head[-1].weight, std=0.5)
        distiller.model.refine[-1][-1].bias[2:] = 2.0  # large proposals, some of which overlap

    with torch.no_grad():
        distiller = distiller_of(clip)
        wild()
        near = distiller.model(dkdetr.normalise(batch["images"], batch["sizes"]), batch["sizes"]).proposals[:, [2, 5]]
        batch["boxes"] = box_convert(near, "cxcywh", "xyxy").clamp(0, 1) * 96
    values = {}
    for extra in ([], ["--kd-boxes", "decoder"], ["--kd-boxes", "gt"], ["--kd-exclude", "iou"], ["--kd-attn", "kd"], ["--kd-ref", "own"],
                  ["--crop-fit", "warp"], ["--rkd-dir", "student"],
                  ["--skd", "l1"], ["--skd", "none"], ["--rkd", "image"], ["--rkd", "batch"], ["--rkd", "none"], ["--no-aux-queries"], ["--shuffle-crops"],
                  ["--kd-min-size", "30"], ["--kd-topk", "3"]):
        distiller = distiller_of(clip, *(("--kd-min-size", "1") if "gt" not in extra else ()), *extra)  # the oracle's boxes may be small
        with torch.no_grad():
            wild()
        losses = distiller(batch)
        sum(losses.values()).backward()
        values[" ".join(extra)] = tuple(round(losses[k].item(), 7) if k in losses else None for k in ("skd", "rkd"))
    assert values["--skd none"] == (None, values[""][1]) and values["--rkd none"] == (values[""][0], None)
    assert values["--rkd image"][1] + values["--rkd batch"][1] == pytest.approx(values[""][1], abs=1e-6)
    same = [k for k, v in values.items() if k and v == values[""]]
    assert same == [], same


def test_parameter_groups():
    model = DKDETR(**SMALL, masks=True)
    groups = parameter_groups(model, 1.0, 0.05)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == sum(p.requires_grad for p in model.parameters())
    where = {id(p): (g["base_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    want = {"body.stages.conv1.weight": (0.1, 0.05), "body.stages.bn1.weight": (0.1, 0.05), "encoder.0.attention.sampling_offsets.bias": (0.1, 0.05),
            "encoder.0.norms.0.weight": (1.0, 0.0), "neck.0.1.weight": (1.0, 0.0), "encoder.0.ffn.0.weight": (1.0, 0.05), "kd_queries": (1.0, 0.0)}
    assert {n: where[id(named[n])] for n in want} == want
    optimizer = torch.optim.AdamW(parameter_groups(model, 1.0, 0.0, backbone=1.0))  # --resume with other numbers: the same groups
    optimizer.load_state_dict(torch.optim.AdamW(groups).state_dict())


def test_clip_is_left_alone_and_absent_from_the_checkpoint(clip):
    distiller = distiller_of(clip)
    before = {k: v.clone() for k, v in clip.model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(distiller.model, 1e-3, 0.05))
    sum(distiller(batch_of()).values()).backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in clip.model.state_dict().items()) and not clip.model.training
    saved = distiller.model.state_dict()
    assert not any("clip" in k or "text" in k for k in saved) and not any("clip" in n for n, _ in distiller.named_parameters())


def test_kd_queries_wait_untouched_through_the_burn_in(clip):
    distiller = distiller_of(clip)
    distiller.kd_active = False
    distiller.model.kd_queries.requires_grad_(False)
    before = distiller.model.kd_queries.clone()
    distiller.model.kd_queries.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameter_groups(distiller.model, 1e-3, 0.05))
    distiller.model.kd_queries.requires_grad_(False)
    for _ in range(3):
        losses = distiller(batch_of())
        assert not {"skd", "rkd"} & set(losses)
        sum(losses.values()).backward()
        assert distiller.model.kd_queries.grad is None
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(distiller.model.kd_queries, before)


# ------------------------------------------------------------------ masks

def test_mask_head_draws_all_instances_as_one_by_one():
    assert sum(MaskHead.SPLIT) == 441 and sum(MaskHead.SPLIT[:2]) == 288 and sum(MaskHead.SPLIT[2:4]) == 144
    torch.manual_seed(0)
    head = MaskHead(32, 32, 0.0).double().eval()
    h, w, n = 6, 5, 3
    query, center, image = torch.randn(n, 32).double(), torch.rand(n, 2).double(), torch.tensor([1, 0, 1])
    features, padded = torch.randn(2, h * w, 8).double(), torch.zeros(2, h * w, dtype=torch.bool)
    padded[1].view(h, w)[:, 4:] = True
    valid = torch.tensor([[1.0, 1], [0.8, 1]]).double()
    got = head(query, center, image, features, padded, (h, w), valid)
    assert got.shape == (n, 24, 20)
    for i in range(n):
        parts = head.weights(query[i:i + 1])[0].split(head.SPLIT)
        m, out = features[image[i]], torch.zeros(h * w).double()
        value = m.masked_fill(padded[image[i], :, None], 0).view(1, h * w, 4, 2)
        for cell in range(h * w):
            r, c = cell // w, cell % w
            y = (r + 1) / (h * valid[image[i], 1]) - center[i, 1]
            x = (c + 1) / (w * valid[image[i], 0]) - center[i, 0]
            q = m[cell] + torch.cat([sine(y * 2 * math.pi, 4), sine(x * 2 * math.pi, 4)])
            offset = (parts[0].view(32, 8) @ q + parts[1]).view(4, 1, 4, 2)
            weight = (parts[2].view(16, 8) @ q + parts[3]).view(4, 1, 4).softmax(-1)
            at = torch.tensor([(c + .5) / w, (r + .5) / h], dtype=torch.float64) + offset / torch.tensor([w, h])
            out[cell] = parts[4] @ slow_attention(value, [(h, w)], at[None, None], weight[None, None])[0, 0].relu() + parts[5][0]
        assert torch.allclose(got[i], dkdetr.aligned_bilinear(out.view(1, 1, h, w), 4)[0, 0], atol=1e-10)
    assert head(query[:0], center[:0], image[:0], features, padded, (h, w), valid).shape == (0, 24, 20)


def test_mask_losses_and_soft_targets():
    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 2:6] = 1
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    dice, bce = mask_losses((target * 2 - 1) * 50, target, valid)
    assert dice.item() == pytest.approx(0, abs=1e-5) and bce.item() == pytest.approx(0, abs=1e-5)
    dice, _ = mask_losses((1 - target * 2) * 50, target, valid)
    assert dice.item() == pytest.approx(8, abs=1e-4)
    assert mask_losses(torch.zeros(1, 8, 8), target, valid)[1].item() == pytest.approx(2 * math.log(2), abs=1e-5)
    half = torch.zeros(1, 8, 8, dtype=torch.bool)
    half[:, :4] = True
    noise = torch.where(half, 0.0, 9.0)
    assert mask_losses(noise, target, half)[1].item() == pytest.approx(2 * math.log(2), abs=1e-5)  # padding counts in neither sum


def test_training_masks_are_the_halved_outlines():
    from common.datasets import window_masks
    square = [np.array([10, 10, 30, 10, 30, 30, 10, 30], np.float32)]
    m = window_masks([square], (64, 64), (1.0, 1.0), (0, 0), (64, 64), False)
    assert m.shape == (1, 32, 32) and m.max() == 4 and abs(int(m.sum()) - 400) <= 40
    flipped = window_masks([square], (64, 64), (1.0, 1.0), (0, 0), (64, 64), True)
    assert torch.equal(flipped, m.flip(2)) or (flipped.float() - m.flip(2).float()).abs().mean() < 0.1
    from pycocotools import mask as rle
    code = rle.encode(np.asfortranarray(np.pad(np.ones((20, 20), np.uint8), ((10, 34), (10, 34)))))
    assert (window_masks([code], (64, 64), (2.0, 2.0), (16, 16), (64, 64), False).sum(dtype=torch.long) - 1600).abs() < 10
    cut = window_masks([square], (64, 64), (1.0, 1.0), (20, 20), (21, 33), False)  # odd sizes, cut by the window
    assert cut.shape == (1, 11, 17) and 80 < int(cut.sum()) <= 121


# ------------------------------------------------------------------ inference and files

def test_a_query_may_have_several_names_and_nothing_is_suppressed():
    logits = torch.tensor([[[1.0, 1, -1], [-1, -1, -1]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.2, 0.5], [0.2, 0.2, 0.1, 0.1]]])
    found, scores, labels, query = detect(logits, boxes, torch.tensor([[50, 100]]))[0]
    assert len(scores) == 6 and query[:2].tolist() == [0, 0] and set(labels[:2].tolist()) == {0, 1}
    assert found[0].tolist() == [0, 12.5, 100, 37.5]  # cut to the image
    assert len(detect(logits, torch.zeros(1, 2, 4), torch.tensor([[50, 100]]), 4)[0][0]) == 4


def test_templates_and_names(golden):
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 63 and "itap of my {}." in TEMPLATES and "an embroidered {}." in TEMPLATES
    assert [prompt_name(n, "clean") for n in ("bow_(weapon)", "diningtable", "Moniter/TV", "stop_sign ", "Bakset", "Barrel/bucket", "w/o helmet", "A/C unit")] == [
        "bow weapon", "dining table", "monitor or TV", "stop sign", "basket", "Barrel or bucket", "w/o helmet", "A/C unit"]
    assert prompt_name("bow_(weapon)", "raw") == "bow_(weapon)"


def test_split_of_lvis(golden):
    path = golden.parent / "data" / "lvis_mini" / "lvis_v1_categories.json"
    if not path.exists():
        pytest.skip(f"LVIS's list is not here: {path}")
    categories = json.loads(path.read_text())
    base, novel = dkdetr.class_split(argparse.Namespace(data="x", dataset="lvis", base_names=[], novel_names=[]), categories)
    assert (len(base), len(novel)) == (866, 337)


def release_state(model):
    """Our weights under the key names of the authors' checkpoint."""
    state = {}
    for key, value in model.state_dict().items():
        if key == "kd_queries" or key.endswith("num_batches_tracked"):
            continue
        if key.startswith("body.stages."):
            name = "backbone." + key[12:]
        elif key.startswith("neck.3."):
            name = "neck.extra_convs.0." + ("conv." if key[7] == "0" else "gn.") + key[9:]
        elif key.startswith("neck."):
            name = f"neck.convs.{key[5]}." + ("conv." if key[7] == "0" else "gn.") + key[9:]
        elif key == "level_embed":
            name = "bbox_head.transformer.level_embeds"
        elif key.startswith(("memory_", "query_")):
            name = "bbox_head.transformer." + key.replace("memory_trans", "enc_output").replace("memory_norm", "enc_output_norm").replace(
                "query_trans", "pos_trans").replace("query_norm", "pos_trans_norm")
        elif key.startswith("refine."):
            name = "bbox_head.reg_branches." + key[7:]
        elif key.startswith("project."):
            name = "bbox_head.cls_branches." + key[8:]
        elif key.startswith("objectness."):
            name, value = "bbox_head.cls_branches.6." + key[11:], torch.cat([value, torch.randn(1202, *value.shape[1:])])
        elif key.startswith("mask_head.weights."):
            for layer in range(6):
                state[f"bbox_head.seg_branches.{layer}." + key[18:]] = value
            continue
        elif key.startswith("mask_head.") and not key.startswith("mask_head.encoder."):
            name = "bbox_head.transformer." + key.replace("mask_head.trans", "mask_trans").replace("mask_head.norm", "mask_trans_norm")
        else:
            part, number, rest = (("seg_encoder", "0", key[18:]) if key.startswith("mask_head.encoder.") else key.split(".", 2))
            rest = rest.replace("self_attention.", "attentions.0.attn.").replace("ffn.0.", "ffns.0.layers.0.0.").replace("ffn.3.", "ffns.0.layers.1.")
            if rest.startswith("attention."):
                rest = f"attentions.{int(part == 'decoder')}." + rest[10:]
            name = f"bbox_head.transformer.{part}.layers.{number}.{rest}"
        state[name] = value
    return state | {"text_encoder.text_feat": torch.randn(1203, 512)}


def test_released_checkpoint_loads_by_its_key_names(tmp_path):
    torch.manual_seed(0)
    model = DKDETR(masks=True, dropout=0.0)
    state = release_state(model)
    for key in ("bbox_head.transformer.encoder.layers.0.attentions.0.sampling_offsets.weight", "bbox_head.transformer.decoder.layers.5.attentions.0.attn.in_proj_weight",
                "bbox_head.transformer.decoder.layers.5.attentions.1.value_proj.weight", "bbox_head.transformer.seg_encoder.layers.0.ffns.0.layers.0.0.weight",
                "bbox_head.transformer.mask_trans_norm.weight", "bbox_head.seg_branches.5.4.weight", "neck.extra_convs.0.conv.weight"):
        assert key in state
    torch.save(dict(state_dict=state | {"something.else": torch.zeros(1)}), tmp_path / "release.pth")
    loaded, classes = load(tmp_path / "release.pth")
    assert loaded.arch["masks"] and loaded.arch["text_dim"] == 512 and classes == []
    mine = model.state_dict()
    assert all(torch.equal(v, mine[k]) for k, v in loaded.state_dict().items() if k != "kd_queries")
    assert to_dkdetr(state)[1] == [] and not any("text" in k for k in to_dkdetr(state)[0])


def test_mmdetection_deformable_detr_loads_by_its_key_names(golden, tmp_path):
    import importlib.util
    spec = importlib.util.spec_from_file_location("fill", golden / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    keys = json.loads((golden / "mmdet_keys" / "deformable_detr_r50.json").read_text())
    state = fill.fill({k: torch.zeros(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in keys.items()})
    torch.save(dict(state_dict=state), tmp_path / "m.pth")
    model, _ = load(tmp_path / "m.pth")
    assert model.arch["closed"] and model.arch["text_dim"] == 80 and torch.equal(model.objectness.weight, state["bbox_head.cls_branches.6.weight"][:1])
    with torch.no_grad():
        out = model(fill.image(256, 320, 2, [(256, 320), (230, 270)]), torch.tensor([[256, 320], [230, 270]]))
    assert out.boxes.shape == (6, 2, 300, 4) and out.features.shape == (6, 2, 300, 80)
    assert out.boxes.isfinite().all() and out.features.std() > 0.1


def test_checkpoint_without_kd_queries_gives_the_same_boxes(tmp_path):
    torch.manual_seed(0)
    model = DKDETR(**SMALL).eval()
    weights = dict(plain_of(model, ()), model=model.state_dict())
    torch.save(dict(arch=model.arch, model={k: v for k, v in weights["model"].items() if k != "kd_queries"}), tmp_path / "w.pt")
    x, sizes = torch.randn(1, 3, 96, 96), torch.tensor([[96, 96]])
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "w.pt")[0](x, sizes).boxes, model(x, sizes).boxes)


def test_bf16_stays_close(clip):
    """Every token is a query, for rounding swaps tokens of almost equal objectness, and which ones become queries would be another loss."""
    for seed in range(4):
        torch.manual_seed(seed)
        distiller = Distiller(DKDETR(**{**SMALL, "queries": 1000}), clip.class_embeddings(["circle", "square", "cross"]), clip, settings_of(flags())).eval()
        exact = distiller(batch_of())
        distiller.amp = True
        rough = distiller(batch_of())
        assert all(v.dtype == torch.float32 for v in rough.values())
        assert sum(rough.values()).item() == pytest.approx(sum(exact.values()).item(), rel=0.02), seed
