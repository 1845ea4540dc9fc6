# SPDX-License-Identifier: MIT
"""hierkd.py: every loss by hand or against a slow loop, the invariants of the method, the classifier, scores and NMS."""
import argparse
import json
import math
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms

import hierkd
from common.boxes import assign_atss, decode_deltas, encode_deltas, overlap
from common.clip import FrozenCLIP
from common.datasets import BASE_48, NOVEL_15, NOVEL_17, CocoDataset
from common.run import open_table, save_checkpoint
from common.tiny import TINY, tiny_model
from hierkd import (Comparison, Distiller, OpenATSS, anchors_of, caption_loss, feature_distance, make_distiller, mlca, normalise, parse_args, pool_patches,
                    pull_loss, resolve, sample_anchors, softmax_focal_loss, top_detections, tower_of)

UNIT = lambda *shape, seed=0, dtype=torch.float64: F.normalize(torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=-1)


def flags(*extra):
    return resolve(parse_args(["--data", "shapes", "--backbone", "tiny8", *extra]))


@pytest.fixture(scope="module")
def clip():
    import open_clip
    torch.manual_seed(0)
    return FrozenCLIP(tiny_model(**TINY), open_clip.tokenize, "random")


def batch_of(count=2, boxes=((20.0, 20, 60, 60), (50.0, 10, 100, 90)), size=128):
    g = torch.Generator().manual_seed(0)
    return dict(images=torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=g), sizes=torch.tensor([[size, size]] * count),
                boxes=torch.tensor([boxes] * count).reshape(count, -1, 4) if boxes else torch.zeros(count, 1, 4),
                labels=torch.arange(len(boxes)).repeat(count, 1) if boxes else torch.full((count, 1), -1),
                captions=["A red star.", "Two circles.", "A cross.", "A square and a ring."][:count])


def learner_of(clip, *extra):
    a = flags(*extra)
    torch.manual_seed(1)
    model = OpenATSS(a.backbone, None if a.bg == "fixed" else clip.class_embeddings(["background"])[0], clip.dim, 64, a.quality, a.tau_c,
                     a.cls_weight == "learn", a.gkd, a.embed_bias, **tower_of(64))
    return make_distiller(model, clip, ["circle", "square", "cross"], a).train()


# ------------------------------------------------------------------ Eq. 1

def test_softmax_focal_loss_by_hand():
    for k, want in ((49, 0.93365), (66, 1.01591)):
        for label in (0, k - 1):  # foreground and background alike
            assert softmax_focal_loss(torch.zeros(k), torch.tensor(label)).item() == pytest.approx(want, abs=1e-5)
    assert softmax_focal_loss(torch.tensor([math.log(2), 0.0, 0.0]), torch.tensor(0)).item() == pytest.approx(0.043322, abs=1e-6)
    assert softmax_focal_loss(torch.tensor([1e4, 0.0]), torch.tensor(1)).isfinite()  # the logarithm is never taken of a rounded 0


def test_sampling_keeps_positives_and_the_exact_share_of_the_others_per_level():
    positive = torch.zeros(1, 200, dtype=torch.bool)
    positive[0, :5] = True  # level 1: 5 of 100, level 2: none of 100
    for rule, want in (("0.1", 5 + 9), ("1to1", 10)):
        keep = sample_anchors(positive, [100, 100], rule)
        assert keep[0, :100].sum() == want and keep[positive].all() and keep[0, 100:].sum() == 0
    assert sample_anchors(positive, [100, 100], "1.0").all()


def test_sampling_is_reproducible_and_uniform():
    positive = torch.zeros(2, 500, dtype=torch.bool)
    positive[0, 3] = True
    torch.manual_seed(0)
    draws = [sample_anchors(positive, [500], "0.1") for _ in range(200)]
    torch.manual_seed(0)
    assert torch.equal(draws[0], sample_anchors(positive, [500], "0.1"))
    rate = torch.stack(draws).float().mean(0)[~positive]
    assert rate.mean().item() == pytest.approx(99 / 999, abs=1e-6) and 0.02 < rate.min() and rate.max() < 0.2


def test_number_of_positives_counts_an_image_without_any_as_one(clip, monkeypatch):
    learner, batch, seen = learner_of(clip, "--no-ikd", "--no-gkd"), batch_of(), []
    batch["labels"][1] = -1
    monkeypatch.setattr(hierkd, "reduce_mean", lambda x, at_least=0.0: seen.append((x.item(), at_least)) or x.clamp(min=at_least))
    learner(batch)
    maps = learner.student(normalise(batch["images"], batch["sizes"]))
    anchors, sizes, counts = anchors_of(maps)
    owner = assign_atss(anchors, counts, batch["boxes"], batch["labels"] >= 0, torch.ones(2, len(anchors), dtype=torch.bool))
    assert seen[0] == ((owner[0] >= 0).sum().item() + 1, 0.0)


def test_learnt_classification_weight_at_its_start(clip):
    losses = []
    for extra in ((), ("--cls-weight", "learn")):
        learner = learner_of(clip, "--no-ikd", "--no-gkd", "--negatives", "1.0", *extra)
        losses.append(learner(batch_of())["cls"].item())
    assert losses[1] == pytest.approx(math.exp(-1) * losses[0] + 1, rel=1e-5)


def test_classifier_is_a_cosine_times_tau_with_the_background_last(clip):
    model = learner_of(clip).student
    f, text = UNIT(7, 64, dtype=torch.float32), UNIT(4, 64, seed=1, dtype=torch.float32)
    logits = model.classify(f, text)
    torch.testing.assert_close(logits[:, :4], 30 * f @ text.T)
    torch.testing.assert_close(logits[:, 4], 30 * f @ model.background[0])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model.classify(f, text[order])[:, :4], logits[:, order])
    fixed = learner_of(clip, "--bg", "fixed").student
    torch.testing.assert_close(fixed.classify(f, text)[:, 4], torch.full((7,), 6.0))  # 0.2 * tau


def test_more_names_never_raise_the_score_of_a_name(clip):
    model = learner_of(clip).student
    f, text = UNIT(50, 64, dtype=torch.float32), UNIT(9, 64, seed=1, dtype=torch.float32)
    few, many = (model.classify(f, t).softmax(-1) for t in (text[:4], text))
    assert (many[:, :4] <= few[:, :4] + 1e-7).all()


def test_background_is_a_unit_vector_that_learns_and_clip_and_text_do_not(clip):
    learner = learner_of(clip)
    text, weights = learner.text.clone(), {k: v.clone() for k, v in clip.model.state_dict().items()}
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    for _ in range(2):
        losses = learner(batch_of())
        assert learner.student.background.norm().item() == pytest.approx(1, abs=1e-5)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert learner.student.background.grad.abs().sum() > 0
        optimizer.step()
    assert torch.equal(learner.text, text) and all(torch.equal(v, weights[k]) for k, v in clip.model.state_dict().items())
    assert not clip.model.training and not any("clip" in k or "text" in k for k in learner.state_dict())


def test_embedding_bias_of_the_released_code_makes_all_embeddings_start_parallel(clip):
    f = {}
    for bias in ("focal", "zero"):
        torch.manual_seed(0)
        model = OpenATSS("tiny8", None, 64, embed_bias=bias)
        with torch.no_grad():
            f[bias] = model.flatten(model(torch.randn(1, 3, 128, 128))).f[0]
    assert (f["focal"] @ f["focal"].mean(0)).min() > 0.99 > (f["zero"] @ F.normalize(f["zero"].mean(0), dim=0)).min()


# ------------------------------------------------------------------ anchors, boxes

def test_anchors_and_atss_by_hand(clip):
    maps = dict(reg=[torch.zeros(1, 4, -(-800 // s), -(-1344 // s)) for s in hierkd.STRIDES])
    anchors, _, counts = anchors_of(maps)
    assert counts == [16800, 4200, 1050, 273, 77] and len(anchors) == 22400
    owner = assign_atss(anchors, counts, torch.tensor([[[336.0, 336, 464, 464]]]), torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 22400, dtype=torch.bool))
    chosen = (owner[0] == 0).nonzero()[:, 0]
    iou = overlap(anchors[chosen], torch.tensor([336.0, 336, 464, 464]))[0].sort(descending=True).values
    assert len(chosen) == 9 and ((chosen >= 16800) & (chosen < 21000)).all()
    assert iou.tolist() == pytest.approx([1] + 4 * [7 / 9] + 4 * [49 / 79], abs=1e-6)


def test_boxes_round_trip_and_zero_deltas_are_the_anchor():
    anchors = torch.tensor([[0.0, 0, 64, 64], [10, 20, 74, 84]])
    boxes = torch.tensor([[5.0, 6, 50, 70], [1, 2, 90, 100]])
    torch.testing.assert_close(decode_deltas(encode_deltas(boxes, anchors, hierkd.DELTA_STD), anchors, hierkd.DELTA_STD), boxes, atol=1e-4, rtol=0)
    assert torch.equal(decode_deltas(torch.zeros(2, 4), anchors, hierkd.DELTA_STD), anchors)


# ------------------------------------------------------------------ Eq. 2

def test_feature_distances_by_hand():
    e = torch.eye(512)
    assert feature_distance(e[:1], e[:1], "l1").item() == 0 and feature_distance(e[:1], e[:1], "l2").item() < 1e-5
    assert feature_distance(e[:1], e[1:2], "l1").item() == 2 and feature_distance(e[:1], e[1:2], "l2").item() == pytest.approx(math.sqrt(2))
    assert feature_distance(e[:1], -e[:1], "l2").item() == 2
    f, v = UNIT(4000, 512), UNIT(4000, 512, seed=1)
    l1, l2 = (feature_distance(f, v, n).mean().item() for n in ("l1", "l2"))
    assert (l1, l2) == (pytest.approx(25.54, abs=0.05), pytest.approx(1.414, abs=0.005)) and l1 / l2 == pytest.approx(18.05, abs=0.05)


@pytest.mark.parametrize("details", ["paper", "released"])
def test_instance_loss_equals_a_loop_over_positives(clip, details):
    learner, batch = learner_of(clip, "--ikd-details", details, "--crop-scale", "1.5"), batch_of()
    f, boxes = UNIT(2, 341, 64, dtype=torch.float32), torch.rand(2, 341, 4) * 40
    boxes[..., 2:] += 60
    chosen, counts = torch.rand(2, 341) < 0.04, [256, 64, 16, 4, 1]
    got = learner.instance_loss(batch, f, boxes, chosen, SimpleNamespace(counts=counts, boxes=None))
    pixels = clip.normalise(batch["images"]) if details == "paper" else normalise(batch["images"], batch["sizes"])
    total, start, means = [], 0, []
    for count in counts:
        mine = []
        for b, a in chosen.nonzero().tolist():
            if start <= a < start + count:
                v = clip.encode_crops(pixels[b:b + 1], boxes[b, a][None], torch.zeros(1).long(), 1.5, details == "paper")[0]
                mine.append((f[b, a] - v).abs().sum())
        total, start = total + mine, start + count
        means.append(torch.stack(mine).mean() if mine else torch.tensor(0.0))
    want = torch.stack(total).mean() if details == "paper" else torch.stack(means).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-4)


def test_instance_gradient_reaches_the_class_tower_but_not_the_box_branch(clip):
    learner = learner_of(clip)
    learner.least_iou = 0.0
    learner(batch_of())["ikd"].backward()
    grad = {n: p.grad is not None and p.grad.abs().sum().item() > 0 for n, p in learner.student.named_parameters()}
    assert grad["embed.weight"] and grad["cls_tower.0.weight"] and grad["fpn.inner_blocks.0.0.weight"]
    assert not any(v for n, v in grad.items() if n.startswith(("reg", "scales", "quality", "background", "tau")))


def test_iou_threshold_is_inclusive_and_without_positives_the_loss_is_zero_with_gradient(clip, monkeypatch):
    learner, seen = learner_of(clip), []
    monkeypatch.setattr(learner, "instance_loss", lambda batch, f, boxes, chosen, targets: seen.append(chosen) or f.sum() * 0)
    monkeypatch.setattr(hierkd, "overlap", lambda a, b: (torch.where(torch.arange(a.shape[1]) % 2 == 0, 0.5, 0.4999).expand(a.shape[:2]).clone(), a.sum(-1) * 0))
    learner(batch_of())
    assert seen[0].sum() > 0 and (seen[0].nonzero()[:, 1] % 2 == 0).all()
    monkeypatch.undo()
    learner = learner_of(clip)
    losses = learner(batch_of(boxes=()))
    assert losses["ikd"].item() == 0 and losses["box"].item() == 0 and all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in learner.parameters())  # DDP needs every parameter in every step


# ------------------------------------------------------------------ Eqs. 3-5

def slow_scores(patches, captions):
    """Eqs. 3 and 4, one caption, image and patch after the other."""
    score = torch.zeros(len(captions), len(patches), dtype=patches.dtype)
    for c, t in enumerate(captions):
        for i, image in enumerate(patches):
            e = [torch.dot(t, p) / (t.norm() * p.norm()) for p in image]
            z = sum(math.exp(x) for x in e)
            seen = sum(math.exp(x) / z * p for x, p in zip(e, image))
            score[c, i] = torch.dot(seen, t) / (seen.norm() * t.norm())
    return score


def test_cross_attention_and_contrastive_loss_equal_a_slow_loop_in_fp64():
    patches, captions = UNIT(5, 45, 16), UNIT(5, 16, seed=1)
    score = mlca(patches, captions)
    torch.testing.assert_close(score, slow_scores(patches, captions), rtol=1e-12, atol=1e-12)
    want = 0.0
    for k in range(5):
        want += -math.log(math.exp(10 * score[k, k]) / sum(math.exp(10 * score[c, k]) for c in range(5)))
        want += -math.log(math.exp(10 * score[k, k]) / sum(math.exp(10 * score[k, i]) for i in range(5)))
    got = caption_loss(score, 10.0, torch.ones(5, dtype=torch.bool))
    assert got.item() == pytest.approx(want / 5, rel=1e-10)


def test_cross_attention_by_hand():
    t, other = torch.tensor([1.0, 0]), torch.tensor([0.0, 1])
    assert mlca(torch.stack([t, other])[None], t[None]).item() == pytest.approx(0.93851, abs=1e-5)  # weights 0.73106, 0.26894
    w = 1 / (1 + math.exp(-10))  # temperature 0.1: the caption sees its own patch
    assert mlca(torch.stack([t, other])[None], t[None], 0.1).item() == pytest.approx(w / math.hypot(w, 1 - w), abs=1e-6)
    p = F.normalize(torch.tensor([3.0, 4]), dim=0)
    assert mlca(p.expand(1, 45, 2), t[None]).item() == pytest.approx(0.6, abs=1e-6)
    patches = UNIT(2, 45, 8)
    torch.testing.assert_close(mlca(patches[:, torch.randperm(45)], UNIT(2, 8, seed=1)), mlca(patches, UNIT(2, 8, seed=1)))


def test_contrastive_loss_by_hand():
    loss = lambda score, tau=10.0: caption_loss(score, tau, torch.ones(len(score), dtype=torch.bool)).item()
    assert loss(torch.ones(8, 8)) == pytest.approx(2 * math.log(8), abs=1e-5)
    assert loss(torch.eye(8)) == pytest.approx(6.355e-4, abs=1e-6)
    assert loss(torch.ones(1, 1)) == 0
    assert pull_loss(torch.eye(3), torch.ones(3, dtype=torch.bool)) == -1
    score = torch.rand(4, 4)
    order = torch.tensor([2, 0, 3, 1])
    assert loss(score[order][:, order]) == pytest.approx(loss(score), rel=1e-6) and abs(loss(score[order]) - loss(score)) > 1e-3


def test_image_without_caption_is_masked_from_rows_and_columns():
    score, valid = torch.rand(4, 4, dtype=torch.float64), torch.tensor([True, True, False, True])
    rest = score[valid][:, valid]
    got = caption_loss(score, 10.0, valid)
    assert got.item() == pytest.approx(caption_loss(rest, 10.0, torch.ones(3, dtype=torch.bool)).item(), rel=1e-12)
    nobody = caption_loss(score.requires_grad_(), 10.0, torch.zeros(4, dtype=torch.bool))
    nobody.backward()
    assert nobody.item() == 0 and score.grad.abs().sum() == 0


def test_max_pooling_keeps_a_hot_cell_and_average_pooling_dilutes_it():
    x = torch.zeros(1, 2, 9, 9)
    x[:, 1] = 1e-3  # a direction of its own, so that no cell is empty
    x[0, :, 4, 4] = torch.tensor([1.0, 0])
    f = F.normalize(x, dim=1).flatten(2).transpose(1, 2)
    hot, mean = (pool_patches(f, [(9, 9)], 3, pool)[0, 4] for pool in ("max", "avg"))
    assert hot[0].item() == pytest.approx(math.sqrt(0.5), abs=1e-4) and mean[0].item() == pytest.approx(1 / math.sqrt(1 + 64), abs=1e-4)
    assert pool_patches(torch.randn(2, 3, 8), [(2, 1), (1, 1)], 3, "max").shape == (2, 18, 8)  # smaller than 3 x 3


def test_caption_gradient_reaches_every_level_and_the_backbone(clip):
    learner = learner_of(clip, "--gkd-levels", "5")
    maps = learner.student(torch.randn(2, 3, 128, 128))
    for m in maps["embed"]:
        m.retain_grad()
    learner.global_loss(batch_of(), learner.student.flatten(maps).f, [tuple(m.shape[-2:]) for m in maps["embed"]]).backward()
    assert all(m.grad.abs().sum() > 0 for m in maps["embed"])
    assert learner.student.body.stages["layer4"][0].conv1.weight.grad.abs().sum() > 0 and learner.student.tau_m.grad != 0


def test_one_distillation_step_raises_what_it_should(clip):
    learner, batch = learner_of(clip, "--ikd-box", "gt"), batch_of(4)
    learner.least_iou = 0.0
    for name in ("ikd", "gkd"):
        optimizer = torch.optim.SGD(learner.student.embed.parameters(), 0.05)
        torch.manual_seed(0)
        before = learner(batch)[name]
        optimizer.zero_grad()
        before.backward()
        optimizer.step()
        torch.manual_seed(0)
        assert learner(batch)[name] < before, name


def test_flags_off_leave_the_losses_of_the_plain_detector_bit_for_bit(clip):
    torch.manual_seed(3)
    plain = learner_of(clip, "--no-ikd", "--no-gkd")(batch_of())
    full = learner_of(clip)(batch_of())
    assert set(plain) == {"cls", "box", "quality"} and set(full) == set(plain) | {"ikd", "gkd"}
    assert all(torch.equal(plain[k], full[k]) for k in plain if k != "cls") and full["cls"].item() == pytest.approx(plain["cls"].item(), rel=1e-6)


# ------------------------------------------------------------------ scores, NMS, data

def maps_of(model, size=(64, 64)):
    torch.manual_seed(0)
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *size))
        for k in maps:
            maps[k] = [m + torch.randn_like(m) for m in maps[k]]
    return maps


def test_detections_are_probability_times_quality_with_100_at_most(clip):
    model = learner_of(clip).student.eval()
    maps, text = maps_of(model, (160, 160)), UNIT(20, 64, seed=3, dtype=torch.float32)
    (boxes, scores, labels), = model.detect(maps, (160, 160), [text])
    out = model.flatten(maps)
    p = model.classify(out.f[0], text).softmax(-1)[:, :20] * out.quality[0].sigmoid()[:, None]
    assert scores[0].item() == pytest.approx(p.max().item(), rel=1e-6) and len(scores) == 100 and (scores.diff() <= 0).all()
    assert boxes.min() >= 0 and boxes.max() <= 160 and set(labels.tolist()) <= set(range(20))


def test_top_detections_equal_nms_over_all_pairs():
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(3000, 2, generator=g) * 300
    boxes = torch.cat([corner, corner + 5 + torch.rand(3000, 2, generator=g) * 80], 1)
    for clumped in (False, True):  # clumped: the best 4,096 pairs leave less than 100, so that it must look further
        scores = torch.rand(3000, 20, generator=g)
        if clumped:
            boxes[:1500] = boxes[0] + torch.rand(1500, 4, generator=g)
            scores[:1500] += 1
        got = top_detections(boxes, scores, 0.4, 100)
        pair = torch.arange(60000)
        kept = batched_nms(boxes[pair // 20], scores.flatten(), pair % 20, 0.4)[:100]
        assert torch.equal(got[0], boxes[kept // 20]) and torch.equal(got[1], scores.flatten()[kept]) and torch.equal(got[2], kept % 20)


def test_same_box_survives_once_per_class():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.4]])
    got = top_detections(boxes, scores, 0.4, 100)
    assert got[1].tolist() == pytest.approx([0.9, 0.5]) and got[2].tolist() == [0, 1]
    assert len(top_detections(boxes, torch.zeros(2, 2), 0.4, 100)[1]) == 0  # strictly above 0


def test_classes_of_the_splits_are_disjoint_and_complete():
    assert (len(BASE_48), len(NOVEL_17), len(NOVEL_15)) == (48, 17, 15) and not set(BASE_48) & set(NOVEL_17)
    assert set(NOVEL_17) & set(NOVEL_15) == {"airplane", "cat", "snowboard"}


def test_lists_are_those_of_the_reference_and_of_coco(coco_mini):
    both = json.loads((coco_mini.parent / "splits/ov_coco_48_17.json").read_text())
    text = json.dumps(both)
    names = {c["name"] for c in json.loads((coco_mini / "annotations/instances_val2017.json").read_text())["categories"]}
    assert set(BASE_48) | set(NOVEL_17) <= names and set(NOVEL_15) <= names and len(names - set(BASE_48) - set(NOVEL_17)) == 15
    assert all(f'"{n}"' in text for n in BASE_48 + NOVEL_17)


@pytest.fixture
def four_images(tmp_path):
    """base only / base + novel / novel only / unused only, ids with holes."""
    from PIL import Image
    cats = [dict(id=3, name="car"), dict(id=7, name="cat"), dict(id=20, name="sink")]
    content = {11: [3], 15: [3, 7], 16: [7], 30: [20]}
    images = [dict(id=i, file_name=f"{i}.jpg", width=64, height=48) for i in content]
    annotations = [dict(id=n, image_id=i, category_id=c, bbox=[5, 5, 20, 20], area=400, iscrowd=0)
                   for n, (i, c) in enumerate(((i, c) for i, cs in content.items() for c in cs), 1)]
    for i in content:
        Image.new("RGB", (64, 48)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "instances.json").write_text(json.dumps(dict(images=images, categories=cats, annotations=annotations)))
    (tmp_path / "captions.json").write_text(json.dumps(dict(annotations=[dict(image_id=11, caption=" A car. "), dict(image_id=11, caption=" ")])))
    return tmp_path


def test_data_builder_keeps_base_boxes_in_training_and_images_by_protocol(four_images):
    make = lambda train, **kw: CocoDataset(four_images, four_images / "instances.json", train, "48", **kw)
    train = make(True, classes=["car"], captions=four_images / "captions.json")
    assert [i[0] for i in train.items] == [11, 15] and all(len(i[4]) == 1 for i in train.items) and train.classes == ["car"] and train.category_ids == [3]
    assert [train[k, 0]["caption"] for k in range(2)] == ["A car.", ""]
    assert [i[0] for i in make(True, classes=["car"], without=["cat"]).items] == [11]
    val = make(False, classes=["cat", "car"])
    assert [i[0] for i in val.items] == [11, 15, 16] and val.classes == ["car", "cat"]  # in the order of ids, whatever the list's
    assert [len(val.truth(names, holding=True)["images"]) for names in (["cat"], ["car"], ["car", "cat"])] == [2, 2, 3]


@pytest.mark.parametrize("words", [["--negatives", "0"], ["--negatives", "x"], ["--tau-c", "0"], ["--gkd-patches", "0"], ["--predict", "a.jpg"],
                                   ["--classes", "cat"], ["--eval", "a", "--predict", "b"], ["--weights", "a"], ["--nms", "7"], ["--gkd-weight=-1"],
                                   ["--tau-m", "nan"], ["--ikd-weight", "inf"], ["--cls-weight", "nan"], ["--negatives", "nan"], ["--seed", "18446744073709551616"],
                                   ["--gkd-levels", "6"], ["--ikd-max", "9", "--no-ikd"], ["--tau-a", "1", "--no-gkd"], ["--tau-m", "9", "--gkd-loss", "pl"],
                                   ["--crop-scale", "2", "--no-ikd"], ["--schedule", "2x", "--epochs", "3"], ["--split", "65_15", "--data", "shapes"],
                                   ["--table", "--no-ikd"], ["--direct-quality", "--eval", "x"], ["--heat-map"], ["--clip-direct"], ["--rpn-recall", "--eval", "x"],
                                   ["--split", "65_15", "--novel", "cat"], ["--row", "t9"], ["--row", "t4"], ["--export", "x.pt2"], ["--flip-words", "--no-gkd"],
                                   ["--data-seed", "3"], ["--train-captions", "x"], ["--train-json", "x"], ["--eval", "x", "--resume"],
                                   ["--drop-novel-images", "--train-json", "x", "--train-images", "y"],
                                   ["--gkd-weight", "2", "--train-json", "x", "--train-images", "y"]])
def test_wrong_flags_end_with_a_word_about_the_flag(words, capsys):
    with pytest.raises(SystemExit):
        parse_args(words)
    assert words[0].split("=")[0] in capsys.readouterr().err


def test_own_files_are_not_called_coco():
    """Nor is their detector evaluated on COCO unasked; a backbone starts from weights that there are."""
    own = ["--train-json", "a", "--train-images", "b"]
    assert (resolve(parse_args(own)).data, resolve(parse_args([])).data) == (hierkd.OWN, "data/coco")
    arch = dict(data=hierkd.OWN, data_seed=0, image_size="800")
    with pytest.raises(hierkd.UserError, match="--eval x: was trained on own files; give --val-json"):
        hierkd.follow(resolve(parse_args(["--eval", "x"])), arch)
    assert hierkd.follow(resolve(parse_args(["--eval", "x", "--data", "d"])), arch).data == "d"
    for flags, words in ((["--backbone", "tiny16"], "no weights of --init imagenet"), (["--data", "shapes", "--backbone", "r50"], "no weights of --init shapes")):
        with pytest.raises(hierkd.UserError, match=words):
            resolve(parse_args(flags))


def test_row_released_sets_its_choices_and_a_flag_still_wins():
    a = resolve(parse_args(["--row", "released", "--ikd-norm", "l1"]))
    assert (a.ikd_norm, a.ikd_weight, a.ikd_details, a.cls_weight) == ("l1", 0.05, "released", "learn")
    assert parse_args(["--row", "released", "--eval", "x", "--clip-direct"]).direct_quality
    assert resolve(parse_args([])).ikd_norm == "l1" and isinstance(parse_args([]), argparse.Namespace)


def test_resume_takes_the_flags_of_a_run_or_of_the_tables_runs(tmp_path, capsys):
    saved = vars(resolve(parse_args(["--data", "shapes", "--seed", "5", "--no-table", "--no-ikd", "--no-gkd", "--out", str(tmp_path / "baseline")])))
    last = dict(script="hierkd.py", args=saved, model={}, optimizer={}, rng=[], it=0)
    (tmp_path / "baseline").mkdir()
    save_checkpoint(last, tmp_path / "baseline/last.pt")
    open_table(resolve(parse_args(["--data", "shapes", "--seed", "5", "--out", str(tmp_path)])), 0)
    whole, one = (resolve(parse_args(["--resume", "--out", str(folder)])) for folder in (tmp_path, tmp_path / "baseline"))
    assert (whole.seed, whole.table, whole.ikd, whole.gkd, whole.out) == (5, True, True, True, str(tmp_path))
    assert (one.seed, one.table, one.ikd, one.gkd) == (5, False, False, False)
    for wrong, words in ((["--ikd-details", "released"], "--ikd-details released"), (["--schedule", "3x"], "--schedule 3x"), (["--ikd-norm", "l2"], "--ikd-norm l2")):
        with pytest.raises(SystemExit):
            parse_args(["--resume", "--out", str(tmp_path / "baseline"), *wrong])
        assert f"{words}: the run in {tmp_path / 'baseline'} has" in capsys.readouterr().err
    assert parse_args(["--resume", "--out", str(tmp_path), "--lr", "0.5"]).lr == 0.5
    old = {k: v for k, v in saved.items() if k != "ikd_details"}
    (tmp_path / "old").mkdir()
    save_checkpoint(dict(last, args=old), tmp_path / "old/last.pt")  # whose rate was for another batch
    with pytest.raises(hierkd.UserError, match="by an earlier version"):
        parse_args(["--resume", "--out", str(tmp_path / "old")])
    (tmp_path / "args.json").write_text('{"args": {"kd_layer": 3}}')
    with pytest.raises(hierkd.UserError, match="of another script"):
        parse_args(["--resume", "--out", str(tmp_path)])


def test_captions_of_other_images_are_refused(coco_mini, tmp_path):
    (tmp_path / "annotations").mkdir()
    for name in ("train2017", "annotations/instances_train2017.json"):
        (tmp_path / name).symlink_to(coco_mini / name)
    (tmp_path / "annotations/captions_train2017.json").write_text(json.dumps(dict(annotations=[dict(image_id=10**9, caption="A cat.")])))
    with pytest.raises(hierkd.UserError, match="has no caption for any of the images of"):
        hierkd.make_data(resolve(parse_args(["--data", str(tmp_path)])), "train")
    content = json.loads((coco_mini / "annotations/instances_train2017.json").read_text())
    base = {c["id"] for c in content["categories"] if c["name"] in BASE_48}
    held = {a["image_id"] for a in content["annotations"] if a["category_id"] in base}
    without = next(i["id"] for i in content["images"] if i["id"] not in held)  # no training image
    (tmp_path / "annotations/captions_train2017.json").write_text(json.dumps(dict(annotations=[dict(image_id=without, caption="A cat.")])))
    with pytest.raises(hierkd.UserError, match="has no caption for any of the .*--data shapes"):
        hierkd.make_data(resolve(parse_args(["--data", str(tmp_path)])), "train")


def test_a_flag_without_effect_is_said(capsys):
    for words, names in ((["--eval", "x", "--epochs", "3", "--no-ikd"], "--epochs, --ikd"), (["--eval", "x", "--crop-scale", "2"], "--crop-scale"),
                         (["--eval", "x", "--split", "65_15"], "--split"), (["--eval", "x", "--novel", "cat"], "--novel"),
                         (["--predict", "a", "--weights", "b", "--clip-direct"], "--clip-direct")):
        parse_args(words)
        assert f"there is no effect of {names}\n" in capsys.readouterr().err
    for words in (["--eval", "x", "--clip-direct", "--crop-scale", "2", "--direct-quality"], ["--eval", "x", "--clip-direct", "--ikd-details", "released"],
                  ["--predict", "a", "--weights", "b", "--classes", "cat", "--score", "0.1"], ["--export", "a.pt2", "--weights", "b", "--classes", "cat"],
                  ["--eval", "x", "--classes", "cat"]):
        parse_args(words)
        assert not capsys.readouterr().err


def test_flags_are_resolved_once_and_for_what_they_depend_on():
    assert resolve(parse_args(["--schedule", "3x"])).image_size == "480-800"
    assert resolve(parse_args(["--data", "shapes"])).table and resolve(parse_args(["--data", "shapes"])).crop_scale == 1.2
    a = resolve(parse_args(["--data", "shapes", "--eval", "x", "--clip-direct", "--ikd-details", "released", "--direct-quality"]))
    assert (a.crop_scale, a.ikd_details, a.direct_quality, a.image_size, a.clip) == (1.0, "released", True, None, None)
    for a in (a, resolve(parse_args(["--novel", "cat, dog"]))):
        before = dict(vars(a))
        a = resolve(a)
        assert vars(a) == before


def test_the_papers_rate_belongs_to_its_batch_and_every_arm_of_a_table_has_one(monkeypatch, tmp_path):
    """0.01 for 32 images with GKD, for 16 without; --table resolves its flags once, so its arms differ in nothing but the distillation."""
    assert resolve(parse_args([])).lr * 32 / 16 == 0.01 and resolve(parse_args(["--no-gkd"])).lr == 0.01
    arms = []
    monkeypatch.setattr(hierkd, "train", lambda args, *_: arms.append(vars(args)) or {})
    monkeypatch.setattr(hierkd, "make_data", lambda *_: argparse.Namespace(classes=["a"]))
    monkeypatch.setattr("common.pictures.save_comparison", lambda *_: "a page")
    hierkd.quick_start(resolve(parse_args(["--table", "--out", str(tmp_path)])), 0, 1, torch.device("cpu"))
    differ = {k for k in arms[0] if arms[0][k] != arms[1][k]}
    assert differ == {"ikd", "gkd", "out"} and arms[0]["lr"] == 0.005


def test_every_row_of_the_tables_is_a_run(capsys):
    """Each row's flags parse and resolve, alone and by name; an analysis says its command."""
    for name, (number, flags, _) in hierkd.ROWS.items():
        args = parse_args(["--row", name, *(["--train-json", "a", "--train-images", "b"] if name == "own" else [])])
        assert args.row == name and (number == "-" or float(number.split("/")[-1].split(";")[0]) > 0)
        assert not args.eval or args.clip_direct
        resolved = resolve(args)
        for flag, value in zip(shlex.split(flags), [*shlex.split(flags)[1:], ""]):
            if flag.startswith("--") and not value.startswith("--") and value:
                assert getattr(resolved, flag[2:].replace("-", "_")) in (value, [value], float(value) if value.replace(".", "").isdigit() else value)
    capsys.readouterr()
    own = ["--row", "own", "--train-json", "a", "--train-images", "b", "--no-gkd"]
    assert parse_args(own).gkd is False and "--gkd-weight of --row own: has no effect, --gkd is False" in capsys.readouterr().err  # a flag wins over its row
    with pytest.raises(SystemExit):
        parse_args(["--row", "own"])
    assert "--row own: is for your own data" in capsys.readouterr().err
    assert (args.optimizer, resolve(parse_args(["--row", "t2-l2", "--ikd-weight", "3"])).ikd_weight) == ("adamw", 3)
    import analyses_hierkd
    for name, (_, words, _) in hierkd.ANALYSES.items():
        assert words.split()[0] in analyses_hierkd.ANALYSES and parse_args(words.split()[1:])


def test_rows_are_listed_with_the_papers_numbers(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--rows"])
    out = capsys.readouterr().out
    assert "71.3/21.6" in out and "tests/analyses" not in out.splitlines()[0] and all(n in out for n in [*hierkd.ROWS, *hierkd.ANALYSES])


def test_crops_are_drawn_beside_the_global_stream(clip):
    """So that runs with and without --ikd-max see the same negatives."""
    streams = []
    for extra in (("--ikd-max", "100000"), ("--ikd-max", "2"), ("--no-ikd",)):
        learner = learner_of(clip, *extra)
        learner.least_iou = -1
        torch.manual_seed(5)
        learner(batch_of())
        streams.append(torch.get_rng_state())
    assert torch.equal(streams[0], streams[1]) and torch.equal(streams[0], streams[2])


def test_crops_of_a_step_depend_on_seed_and_number_of_the_draw_only(clip):
    f, boxes, chosen = UNIT(2, 341, 64, dtype=torch.float32), torch.tensor([10.0, 10, 60, 60]).expand(2, 341, 4), torch.ones(2, 341, dtype=torch.bool)
    learner, other = learner_of(clip, "--ikd-max", "3"), learner_of(clip, "--ikd-max", "3", "--seed", "1")
    draw = lambda who: who.instance_loss(batch_of(), f, boxes, chosen, SimpleNamespace(counts=[256, 64, 16, 4, 1], boxes=boxes)).item()
    first = [draw(learner) for _ in range(4)]
    assert len(set(first)) == 4 and draw(other) != first[0]
    learner.draws = 2  # as --resume sets it
    torch.manual_seed(99)
    assert [draw(learner) for _ in range(2)] == first[2:]


class Names:
    """Stands in for CLIP where only names are wanted."""

    def class_embeddings(self, names, templates=()):
        return list(names)


@pytest.mark.parametrize("ids", ["from 0", "again in each image", "text", "none"])
def test_perfect_detections_score_100_whatever_the_files_ids(four_images, monkeypatch, ids):
    content = json.loads((four_images / "instances.json").read_text())
    for n, a in enumerate(content["annotations"]):
        a["id"] = dict(zip(("from 0", "again in each image", "text"), (n, 1, f"a{n}"))).get(ids)
    for i in content["images"] if ids == "text" else ():
        i["id"] = f"image {i['id']}"
    for a in content["annotations"] if ids == "text" else ():
        a["image_id"] = f"image {a['image_id']}"
    (four_images / "val.json").write_text(json.dumps(content))
    a = resolve(parse_args(["--eval", "x", "--val-json", str(four_images / "val.json"), "--val-images", str(four_images)]))
    val = hierkd.make_data(a, "val", like=["car", "an absent one"])
    assert val.classes == ["car", "cat", "sink", "an absent one"]  # in the order of the file
    truth = {i: (boxes, labels) for i, _, _, _, boxes, labels in val.items}

    def perfect(model, batch, texts, amp="none", direct=None):
        found = []
        boxes, labels = truth[batch["image_ids"][0]]
        for names in texts:
            here = [k for k, label in enumerate(labels) if val.classes[label] in names]
            found.append((torch.from_numpy(boxes[here]), torch.ones(len(here)), torch.tensor([names.index(val.classes[k]) for k in labels[here]])))
        return found
    monkeypatch.setattr(hierkd, "run_detector", perfect)
    model = OpenATSS("tiny8", None, 64)
    model.arch |= dict(base=["car", "an absent one"], templates=hierkd.TEMPLATES)
    metrics, found = hierkd.evaluate(model, val, 0, 1, torch.device("cpu"), a, Names())
    assert {metrics[f"{g}_AP50"] for g in ("zsd", "base", "gzsd_base", "gzsd_novel", "gzsd_all")} == {100.0} and len(found) == 5
    assert metrics["score"] == 100 and sorted(metrics["classes"]["zsd"]) == ["cat", "sink"]
    only = hierkd.make_data(a, "val", like=["car", "cat", "sink"])  # no novel class: ZSD is left out
    model.arch["base"] = only.classes
    truth.update({i: (boxes, labels) for i, _, _, _, boxes, labels in only.items})
    val = only
    metrics, _ = hierkd.evaluate(model, only, 0, 1, torch.device("cpu"), a, Names())
    assert "zsd_AP50" not in metrics and metrics["score"] == 100


def test_own_files_tell_what_is_base_and_novel():
    assert hierkd.class_split("own", ["car", "cat"]) == (["car", "cat"], [])
    assert hierkd.class_split("own", ["traffic_light", "cat"], ["traffic light", "dog"]) == (["traffic light", "dog"], ["cat"])
    assert hierkd.class_split("65_15", ["person", "cat"])[0] == ["person"]


def test_class_lists(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffcrane, grey\nStra\u00dfe\n", encoding="utf-8")
    assert hierkd.class_names(["cat, red panda"]) == ["cat", "red panda"]
    assert hierkd.class_names(["crane, grey", "cat"]) == ["crane, grey", "cat"]  # several values: a name may hold a comma
    assert len(hierkd.class_names([",".join(f"class {k}" for k in range(2000))])) == 2000  # no name of a file is as long
    assert hierkd.class_names([str(tmp_path / "names.txt")]) == ["crane, grey", "Stra\u00dfe"]
    for wrong in (["cat,"], ["cat", " "], [","]):
        with pytest.raises(hierkd.UserError, match="empty name"):
            hierkd.class_names(wrong)


def test_checkpoints_of_others_are_refused_by_name(tmp_path):
    for name in ("crosskd.py", "dkdetr.py", "prototype_kd.py", "simple21k.py"):
        save_checkpoint(dict(script=name, arch={}, model={}), tmp_path / "other.pt")
        with pytest.raises(hierkd.UserError, match=f"is a checkpoint of {name}, not of hierkd.py"):
            hierkd.load(tmp_path / "other.pt")
    save_checkpoint(dict(script="hierkd.py", arch=dict(rpn=True), model={}), tmp_path / "rpn.pt")
    with pytest.raises(hierkd.UserError, match="is an RPN"):
        hierkd.load(tmp_path / "rpn.pt")


def test_missing_captions_are_told_before_anything_is_loaded(coco_mini, tmp_path, monkeypatch, capsys):
    (tmp_path / "annotations").mkdir()
    for name in ("train2017", "val2017", "annotations/instances_train2017.json", "annotations/instances_val2017.json"):
        (tmp_path / name).symlink_to(coco_mini / name)
    monkeypatch.setattr(hierkd, "get_clip", lambda *_: pytest.fail("CLIP was loaded first"))
    monkeypatch.setattr(hierkd, "read_annotations", lambda *_: pytest.fail("boxes were read first"))
    with pytest.raises(hierkd.UserError, match="captions_train2017.json is missing.*--no-gkd.*--data shapes"):
        hierkd.train(resolve(parse_args(["--data", str(tmp_path)])), 0, 1, torch.device("cpu"))
    own = ["--train-json", str(tmp_path / "annotations/instances_train2017.json"), "--train-images", str(tmp_path / "train2017")]
    with pytest.raises(hierkd.UserError, match="--train-captions: is missing.*--no-gkd"):
        hierkd.train(resolve(parse_args([*own, "--gkd"])), 0, 1, torch.device("cpu"))
    with pytest.raises(hierkd.UserError, match="--train-captions .*none.json: is missing.*--no-gkd"):
        hierkd.train(resolve(parse_args([*own, "--train-captions", str(tmp_path / "none.json")])), 0, 1, torch.device("cpu"))
    capsys.readouterr()
    assert not resolve(parse_args(own)).gkd and "note: --train-json without --train-captions: no GKD (--no-gkd)" in capsys.readouterr().err


# ------------------------------------------------------------------ any vocabulary

def test_a_split_of_ones_own():
    names = ["car", "cat", "traffic_light", "sink"]
    split = hierkd.class_split
    assert split("own", names, None, ["traffic light"]) == (["car", "cat", "sink"], ["traffic_light"])  # --novel alone: base are the others
    assert split("own", names, None, None, ["cat", "car"]) == (["cat", "car"], ["traffic_light", "sink"])  # --base alone
    assert split("own", names, None, ["sink"], ["cat"]) == (["cat"], ["sink"])  # the rest is neither
    assert split("own", names, ["cat"], ["sink", "bear"]) == (["cat"], ["sink", "bear"])  # a checkpoint's names need not be in the file
    with pytest.raises(hierkd.UserError, match="--base and --novel both name cat"):
        split("own", names, None, ["cat"], ["cat", "car"])
    assert split("own", names, None, ["Traffic Light"]) == (["car", "cat", "sink"], ["traffic_light"])
    with pytest.raises(hierkd.UserError, match="--base and --novel both name crane"):  # a file that has both: none is dropped silently
        split("own", ["Crane", "crane", "cat"], None, ["crane"])


def test_own_split_on_the_command_line_reaches_both_sets_and_a_misspelling_is_told(four_images):
    own = ["--train-json", str(four_images / "instances.json"), "--train-images", str(four_images), "--val-json", str(four_images / "instances.json"),
           "--val-images", str(four_images)]
    a = resolve(parse_args([*own, "--novel", "cat,sink"]))
    train = hierkd.make_data(a, "train")
    val = hierkd.make_data(a, "val", like=train.classes)
    assert (train.classes, val.classes, a.split, a.novel) == (["car"], ["car", "cat", "sink"], "own", [["cat", "sink"]])
    a = resolve(parse_args([*own, "--base", "cat", "--novel", "car"]))  # sink is neither: its image is not evaluated
    val = hierkd.make_data(a, "val", like=hierkd.make_data(a, "train").classes)
    assert val.classes == ["car", "cat"] and len(val) == 3
    for words, text in ((["--base", "cat,sinc"], "--base: no class 'sinc' in .*; is 'sink' meant"), (["--novel", "dog"], "--novel: no class 'dog' in")):
        a = resolve(parse_args([*own, *words]))
        with pytest.raises(hierkd.UserError, match=text):
            hierkd.make_data(a, "val", like=hierkd.make_data(a, "train").classes)


def test_novel_names_that_hold_nothing_out_or_everything_are_told(four_images, capsys):
    own = ["--train-json", str(four_images / "instances.json"), "--train-images", str(four_images)]
    assert hierkd.make_data(resolve(parse_args([*own, "--novel", "sinc,Cat"])), "train").classes == ["car", "sink"]
    err = capsys.readouterr().err
    assert "--novel: sinc is no class of" in err and "Cat" not in err
    with pytest.raises(hierkd.UserError, match="--novel names all classes of the file"):
        hierkd.make_data(resolve(parse_args([*own, "--novel", "car,sink,cat"])), "train")


def test_base_names_alone_are_asked_without_a_novel_one(four_images):
    a = resolve(parse_args(["--eval", "x", "--val-json", str(four_images / "instances.json"), "--val-images", str(four_images)]))
    assert hierkd.make_data(a, "val", like=["car", "cat"], novel=[]).classes == ["car", "cat"]
    assert hierkd.make_data(a, "val", like=["car", "cat"]).classes == ["car", "cat", "sink"]


def test_cocos_split_holds_for_a_validation_file_of_ones_own(four_images):
    a = resolve(parse_args(["--val-json", str(four_images / "instances.json"), "--val-images", str(four_images)]))
    val = hierkd.make_data(a, "val", like=hierkd.BASE_48)  # car is base, cat and sink novel, as in training
    assert set(val.classes) == {*hierkd.BASE_48, *hierkd.NOVEL_17}


def test_a_rate_is_for_its_optimizer():
    with pytest.raises(hierkd.UserError, match="--optimizer adamw: give its --lr, too; the default, 0.005, is for sgd"):
        resolve(parse_args(["--optimizer", "adamw"]))
    assert resolve(parse_args(["--optimizer", "adamw", "--lr", "1e-4"])).lr == 1e-4
    assert resolve(parse_args(["--data", "shapes", "--optimizer", "adamw"])).lr == 0.004


def test_names_of_a_run_survive_its_resume(tmp_path):
    """Names are read once: a file may go, and a name with a comma stays one."""
    (tmp_path / "names.txt").write_text("crane, grey\n")
    a = resolve(parse_args(["--novel", str(tmp_path / "names.txt"), "--base", "a, b", "--out", str(tmp_path)]))
    save_checkpoint(dict(script="hierkd.py", args=vars(a), model={}, optimizer={}, rng=[], it=0), tmp_path / "last.pt")
    (tmp_path / "names.txt").unlink()
    assert hierkd.given_names(resolve(parse_args(["--resume", "--out", str(tmp_path)]))) == (["a", "b"], ["crane, grey"])


def test_lvis_files_say_which_classes_were_looked_for():
    truth = dict(images=[dict(id=1, neg_category_ids=[7]), dict(id=2, neg_category_ids=[])], annotations=[dict(image_id=1, category_id=5)])
    results = [dict(image_id=i, category_id=c) for i, c in ((1, 5), (1, 6), (1, 7), (2, 5))]
    assert hierkd.judged(truth, results) == [results[0], results[2]]
    del truth["images"][0]["neg_category_ids"], truth["images"][1]["neg_category_ids"]  # COCO: all were
    assert hierkd.judged(truth, results) == results


def test_novel_classes_do_not_choose_the_weights(four_images, monkeypatch):
    a = resolve(parse_args(["--eval", "x", "--val-json", str(four_images / "instances.json"), "--val-images", str(four_images)]))
    val = hierkd.make_data(a, "val", like=["car"])
    model = OpenATSS("tiny8", None, 64)
    model.arch |= dict(base=["car"], templates=hierkd.TEMPLATES)
    box = dict((i, (b, labels)) for i, _, _, _, b, labels in val.items)

    def only(wanted):
        def find(model, batch, texts, amp="none", direct=None):
            boxes, labels = box[batch["image_ids"][0]]
            found = []
            for names in texts:
                here = [k for k, label in enumerate(labels) if val.classes[label] in names and val.classes[label] in wanted]
                found.append((torch.from_numpy(boxes[here]), torch.ones(len(here)), torch.tensor([names.index(val.classes[labels[k]]) for k in here])))
            return found
        monkeypatch.setattr(hierkd, "run_detector", find)
        return hierkd.evaluate(model, val, 0, 1, torch.device("cpu"), a, Names())[0]
    base, novel = only(["car"]), only(["cat", "sink"])
    assert (base["score"], base["zsd_AP50"], novel["score"], novel["zsd_AP50"]) == (100, 0, 0, 100)
    assert hierkd.reported(argparse.Namespace(epochs=1, data="x"), None)["metric"] == "base AP50"


def test_clip_tells_crops_apart_under_autocast_as_without(clip):
    torch.manual_seed(0)
    batch = dict(images=torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8), sizes=torch.tensor([[96, 96]]))
    corner = torch.rand(64, 2) * 60
    boxes, text = torch.cat([corner, corner + 10 + torch.rand(64, 2) * 20], 1), clip.class_embeddings(["circle", "square", "cross"])
    plain, mixed = (hierkd.direct_scores(clip, batch, boxes, text, amp=amp) for amp in (False, True))
    assert mixed.dtype == torch.float32 and len(mixed.amax(1).unique()) == 64 and (plain - mixed).abs().max() < 0.1


def test_a_row_that_its_data_contradicts_is_refused(capsys):
    for words, text in ((["--row", "t7-65", "--data", "shapes"], "--split 65_15: is of COCO's names"), (["--row", "t7-65", "--novel", "cup"], "--split 65_15"),
                        (["--row", "t8-2x", "--data", "shapes"], "--schedule 2x: sets the epochs only")):
        with pytest.raises(SystemExit):
            parse_args(words)
        assert text in capsys.readouterr().err
    assert parse_args(["--row", "t7-65"]).out == "runs/hierkd-t7-65" and parse_args(["--row", "t8-2x", "--epochs", "3"]).epochs == 3
    args = parse_args(["--row", "t6-ikd", "--crop-scale", "1.5"])
    assert args.crop_scale == 1.5 and not capsys.readouterr().err and args.eval == "runs/hierkd-t4-ikd/last.pt"


def test_names_that_clip_reads_in_part_are_told(clip, capsys):
    from common.clip import cut_names
    long = "a very long name " * 10
    assert cut_names(clip, ["cat", long, ""]) == [long]
    whole = " ".join(["cat"] * (clip.model.context_length - 2 - 5))  # "a photo of a ... ." and the two ends fill the rest
    assert cut_names(clip, [whole, whole + " cat"]) == [whole + " cat"]
    hierkd.tell_cut(clip, ["cat", long])
    assert f"1 names are longer than CLIP's {clip.model.context_length} tokens" in capsys.readouterr().err
    hierkd.tell_cut(clip, ["cat", long], ("{}",), "captions")
    assert f"1 captions are longer than CLIP's {clip.model.context_length} tokens" in capsys.readouterr().err


def test_weights_of_another_activation_are_refused(tmp_path):
    import zipfile

    from common.clip import check_activation
    with zipfile.ZipFile(tmp_path / "jit.pt", "w") as archive:  # as OpenAI's archives
        archive.writestr("x/code/__torch__/model.py", "return torch.mul(x, torch.sigmoid(torch.mul(x, CONSTANTS.c1)))  # 1.702")
    torch.save(dict(input_resolution=torch.tensor(224)), tmp_path / "keys.pt")
    torch.save(dict(logit_scale=torch.tensor(1.0)), tmp_path / "other.pt")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/open_clip_config.json").write_text(json.dumps(dict(model_cfg=dict(quick_gelu=False))))
    (tmp_path / "hub/open_clip_model.safetensors").write_bytes(b"x")
    for file, quick in (("jit.pt", True), ("keys.pt", True), ("hub/open_clip_model.safetensors", False)):
        right, wrong = ("ViT-B-32-quickgelu", "ViT-B-32") if quick else ("ViT-B-32", "ViT-B-32-quickgelu")
        check_activation(f"{right}/{tmp_path / file}")
        with pytest.raises(hierkd.UserError, match=f"GELU; use {right}/"):
            check_activation(f"{wrong}/{tmp_path / file}")
    for spec in (f"ViT-B-32/{tmp_path / 'other.pt'}", "ViT-B-32-quickgelu/openai", "nothing", "ViT-B-32/absent.pt"):
        check_activation(spec)


def saved(tmp_path, clip, width=64, name=None, seed=0, **arch):
    """A checkpoint of an untrained detector, and the file of its tiny CLIP."""
    path = tmp_path / "tiny.pt"
    torch.save(dict(config=TINY, id="x", model=clip.model.state_dict()), path)
    torch.manual_seed(seed)
    model = OpenATSS("tiny8", torch.ones(width), width, 64, **tower_of(64))
    model.arch |= dict(image_size="96", clip=str(path), clip_name=name or "tiny-x", templates=["a photo of a {}."], data="own", data_seed=0,
                       base=["cat", "crane, grey"], novel=["red panda"]) | arch
    save_checkpoint(dict(hierkd.plain_of(model), model=model.state_dict()), tmp_path / "best.pt")
    return tmp_path / "best.pt"


def test_load_and_predict_image_know_the_names_of_training(clip, tmp_path, coco_mini):
    from PIL import Image
    model, classes = hierkd.load(saved(tmp_path, clip))
    assert classes == ["cat", "crane, grey", "red panda"] and not model.training and model.clip is None
    file = sorted((coco_mini / "val2017").iterdir())[0]
    pixels = hierkd.as_pixels(file)
    answers = [hierkd.predict_image(model, classes, x, score=0.0) for x in (file, str(file), Image.open(file), pixels)]
    boxes, scores, names = answers[0]
    assert len(boxes) == len(scores) == len(names) > 10 and set(names) <= set(classes) and (scores.diff() <= 0).all()
    assert all(torch.equal(boxes, b) and torch.equal(scores, s) and names == n for b, s, n in answers[1:])
    loaded = model.clip
    assert set(hierkd.predict_image(model, ["umbrella"], pixels, score=0.0)[2]) == {"umbrella"} and model.clip is loaded


def test_another_clip_is_told(clip, tmp_path, capsys):
    model, classes = hierkd.load(saved(tmp_path, clip, width=32))
    with pytest.raises(hierkd.UserError, match="has 64-d embeddings, the checkpoint 32-d"):
        hierkd.text_of(model, classes)
    model, classes = hierkd.load(saved(tmp_path, clip, name="tiny-y"))
    hierkd.text_of(model, classes)
    model, classes = hierkd.load(saved(tmp_path, clip, name="tiny-x"))
    (tmp_path / "tiny.pt").rename(tmp_path / "moved.pt")
    with pytest.raises(hierkd.UserError, match="tiny.pt: is missing.*--clip"):
        hierkd.text_of(model, classes)
    assert len(hierkd.text_of(model, classes, str(tmp_path / "moved.pt"))) == 3
    assert "was trained with CLIP tiny-y, this is tiny-x" in capsys.readouterr().err
    first = model.clip
    assert hierkd.text_of(model, classes) is not None and model.clip is first
    shutil.copy(tmp_path / "moved.pt", tmp_path / "third.pt")
    hierkd.text_of(model, classes, str(tmp_path / "third.pt"))
    assert model.clip is not first


def test_an_evaluation_looks_where_training_did():
    arch = dict(data="/x/coco", data_seed=0, image_size="800")
    follow = lambda *flags: hierkd.follow(parse_args(["--eval", "a.pt", *flags]), arch).data
    assert follow() == "/x/coco" and follow("--data", "/y") == "/y"


def test_files_of_other_towers_are_refused_not_misread(clip, tmp_path):
    path = saved(tmp_path, clip)
    content = torch.load(path, weights_only=True)
    old = {k: v for k, v in content["arch"].items() if k not in ("norm", "depth", "clip_name", "templates")}
    save_checkpoint(dict(script="hierkd.py", arch=old, model=content["model"]), path)
    with pytest.raises(hierkd.UserError, match="is no checkpoint of hierkd.py"):
        hierkd.load(path)
    save_checkpoint(dict(script="hierkd.py", arch=dict(content["arch"], norm="batch"), model=content["model"]), path)
    with pytest.raises(hierkd.UserError, match="damaged"):
        hierkd.load(path)


def test_exported_detector_gives_its_boxes_and_scores(clip, tmp_path, capsys):
    path = saved(tmp_path, clip)
    hierkd.export(parse_args(["--export", str(tmp_path / "d.pt2"), "--weights", str(path), "--classes", "cat, dog"]))
    names = {"classes.json": ""}
    program = torch.export.load(tmp_path / "d.pt2", extra_files=names).module()
    assert json.loads(names["classes.json"]) == ["cat", "dog"] and "the same as in eager mode" in capsys.readouterr().out
    model, _ = hierkd.load(path)
    images = torch.randint(0, 256, (1, 3, 192, 256), dtype=torch.uint8)
    with torch.no_grad():
        boxes, scores, *_ = program(images)
        out = model.flatten(model(normalise(images)))
        want = model.classify(out.f, hierkd.text_of(model, ["cat", "dog"])).softmax(-1)[..., :2] * out.quality.sigmoid()[..., None]
    torch.testing.assert_close(scores, want, atol=1e-5, rtol=0)
    assert boxes.shape == (1, scores.shape[1], 4)


# ------------------------------------------------------------------ towers, captions, seeds

def test_narrow_towers_know_nothing_of_the_rest_of_the_image(clip):
    """GroupNorm of two channels a group is nearly an instance norm: a change in one corner moves f in the other. PlaceNorm does not."""
    x = torch.randn(1, 64, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[..., :3, :3] += 5
    far = {}
    for norm in ("group", "place"):
        tower = hierkd.make_tower(64, 1, norm)
        far[norm] = (tower(x) - tower(changed))[..., 8:, 8:].abs().max().item()
    assert far["place"] == 0 < far["group"]
    y = hierkd.PlaceNorm(64)(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(1, 16, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(1, 16, 16), atol=1e-3, rtol=0)


def test_towers_are_the_papers_at_its_width_only():
    assert tower_of(256) == dict(depth=4, norm="group") and tower_of(64) == dict(depth=1, norm="place")
    model = OpenATSS("tiny8", None, 64)
    assert [type(m).__name__ for m in model.cls_tower] == ["Conv2d", "GroupNorm", "ReLU"] * 4 and model.arch["norm"] == "group"
    a = resolve(parse_args(["--data", "shapes"]))
    assert (a.gkd_weight, a.tau_a, a.flip_words) == (0.5, 1.0, True) and not resolve(parse_args([])).flip_words


def test_words_of_a_flipped_image_are_swapped_where_asked(four_images):
    from common.datasets import mirror_caption
    assert mirror_caption("A star on the left, left of a ring; Right.") == "A star on the right, right of a ring; Left."
    assert mirror_caption("leftover bright") == "leftover bright"
    (four_images / "captions.json").write_text(json.dumps(dict(annotations=[dict(image_id=11, caption="A car on the left.")])))
    make = lambda **more: CocoDataset(four_images, four_images / "instances.json", True, "48", classes=["car"], captions=four_images / "captions.json", **more)
    kept, swapped = make(), make(flip_words=True)
    said = set()
    for seed in range(20):
        a, b = kept[0, seed], swapped[0, seed]
        flipped = a["boxes"][0, 0] > 10
        assert torch.equal(a["image"], b["image"]) and a["caption"] == "A car on the left."
        assert b["caption"] == ("A car on the right." if flipped else "A car on the left.")
        said.add(b["caption"])
    assert len(said) == 2


def test_the_tiny_clip_does_not_see_the_images_that_are_distilled_from(monkeypatch, tmp_path):
    import common.shapes
    import common.tiny
    drawn = []
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path))
    monkeypatch.setattr(common.shapes, "make_shapes", lambda seed=0: drawn.append(seed))
    monkeypatch.setattr(common.tiny, "tiny_clip", lambda root, folder, seed, device, draw: (root, folder, seed, draw()))
    root = common.shapes.folder_of(seed=10003)
    assert common.tiny.shapes_clip(3) == (root, tmp_path / "clip", 3, None) and drawn == [10003]
    assert root.name == "shapes-1-s10003" != common.shapes.folder_of(seed=3).name


def test_each_process_draws_its_own_negatives_and_rank_0_as_before(monkeypatch, clip, four_images):
    a = resolve(parse_args(["--data", "shapes", "--clip", "x", "--backbone", "tiny8"]))
    monkeypatch.setattr(hierkd, "get_clip", lambda *_: clip)
    data = CocoDataset(four_images, four_images / "instances.json", True, "48", classes=["car"])
    draws, weights = [], []
    for rank in (0, 1, 2):
        student, _ = hierkd.make_pair(a, data, rank, 3, torch.device("cpu"))
        weights.append(student.embed.weight)
        draws.append(torch.rand(4))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    hierkd.seed_all(a.seed)
    background = clip.encode_text(["a photo of background."])[0]
    OpenATSS("tiny8", background, clip.dim, 64, **tower_of(64), embed_bias="zero")
    assert torch.equal(draws[0], torch.rand(4))  # nothing is seeded anew there


def test_variants_of_the_tables_are_a_class_of_their_own(clip):
    assert type(learner_of(clip)) is Distiller and type(learner_of(clip, "--ikd-norm", "l2")) is Distiller
    for flags in (["--gkd-pool", "avg"], ["--gkd-loss", "pl"], ["--ikd-box", "gt"], ["--ikd-details", "released"], ["--cls-weight", "learn"],
                  ["--shuffle-crops"], ["--shuffle-captions"]):
        learner = learner_of(clip, *flags)
        assert type(learner) is Comparison
        losses = learner(batch_of())
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in learner.parameters()), flags  # DDP waits for every one


def test_sections_and_width_of_the_script():
    lines = open(hierkd.__file__, encoding="utf-8").read().splitlines()
    titles = [line.split(" ", 2)[2] for line in lines if line.startswith("# =====")]
    assert titles == ["the paper", "what its tables compare with", "detector", "data", "train", "evaluate, predict", "flags", "main"]
    assert max(map(len, lines)) <= 110


def test_the_backbone_learns_at_its_share_of_the_rate(clip):
    learner = learner_of(clip)
    (everything,) = hierkd.make_optimizer(learner, "adamw", 0.004, 1e-4).param_groups
    groups = hierkd.make_optimizer(learner, "adamw", 0.004, 1e-4, 0.1).param_groups
    assert sorted(g["base_lr"] for g in groups) == pytest.approx([0.0004, 0.004])
    slow = min(groups, key=lambda g: g["lr"])["params"]
    body = [p for p in learner.student.body.parameters() if p.requires_grad]
    assert {id(p) for p in slow} == {id(p) for p in body} and len(body) > 10
    assert sum(len(g["params"]) for g in groups) == len(everything["params"])


def test_a_backbone_of_noise_learns_at_the_whole_rate():
    rate = lambda *flags: resolve(parse_args(["--data", "shapes", *flags])).backbone_lr
    assert rate() == 0.1 and rate("--init", "none") == 1.0 and rate("--init", "none", "--backbone-lr", "0.3") == 0.3
