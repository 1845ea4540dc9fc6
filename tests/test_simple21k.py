# SPDX-License-Identifier: MIT
"""simple21k.py: the numbers of the paper's equations by hand and by slow loops, who learns from which images, pooling, NMS, vocabularies, loading.

`python -m pytest -q tests/test_simple21k.py tests/test_datasets.py tests/test_evaluation.py`: the product
score of Eqs. 1, 2 and 4 is a (C + 1)-way cross-entropy (fp64, 1e-12) and survives logits of 500; Eq. 5 by
hand and in fp64; the pyramid is torchvision's FPN bit by bit; whole images of 224 px are pooled as average
pooling does; NMS of 21,841 classes is a loop over the classes; LVIS's synsets through WordNet 3.0 give the
997 classes, 720 base, set-equal to the published list (with Debian's `wordnet-base`; skipped without); AP50
without dense tables is the COCO API's, 1e-9, over all images and on a class's own. Each trap has a test
that fails without its remedy: idle FPN parts that decay, RoI scales that are guessed from the first batch,
two samples a bin, class offsets in float32.
"""
import argparse
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import nms

import simple21k
from common.datasets import collate, objects365, records_of
from common.imagenet import Stream, collate_labelled
from common.run import UserError
from common.zoo import always_shift
from conftest import SHARED
from simple21k import (Detector, PooledClassifier, Vocabulary, class_nms, class_scores, detect_options, draw_mix, level_of, load_init,
                       make_learner, make_split, mix_images, mixed_cross_entropy, new_model, normalise, of_stage, parameter_groups, parse_args,
                       plain, plain_of, pool, product_score_loss, read_overlap, resolve, sample_rois, wordnet_ids)

SPLITS = SHARED / "data" / "splits"


def arch_of(name="tiny8", det=3, cls=5, pair=None, stage=2, gap=False, masks=False, head="2fc"):
    return dict(name=name, kind=f"stage{stage}", stage=stage, head=head, gap=gap, masks=masks, det=[f"d{k}" for k in range(det)], cls=[f"n{k:08d}" for k in range(cls)],
                cls_names=[f"c{k}" for k in range(cls)], pair=pair or [-1] * cls, setup="own", image_size=128, stage1_size=64, augment="weak")


def flags(*more, backbone="tiny8", stage=2):
    """The flags of a stage, resolved."""
    args = parse_args(["--backbone", backbone, "--data", "nowhere", *map(str, more)])
    return resolve(of_stage(args, args.stage or stage, "nowhere"))


def write_boxes(path, categories, boxes=True):
    """A COCO json of one image with a box of each category; and the image."""
    Image.new("RGB", (64, 64)).save(path.parent / "a.jpg")
    content = dict(images=[dict(id=1, file_name="a.jpg", width=64, height=64)], categories=categories)
    content["annotations"] = [dict(id=k, image_id=1, category_id=c["id"], bbox=[1, 1, 20, 20], area=400, iscrowd=0)
                              for k, c in enumerate(categories) if boxes is True or c["id"] in boxes]
    path.write_text(json.dumps(content))
    return ["--det-json", path, "--det-images", path.parent]


def weights_of(model):
    return dict(plain_of(model), model=model.state_dict())


def images(n, size=128, sizes=None, seed=0):
    sizes = sizes or [(size, size)] * n
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *s), generator=g, dtype=torch.uint8) for s in sizes], sizes


def det_batch(n=2, size=128, boxes=True, seed=0, masks=False):
    """boxes: all images have two, none has, or a list of those that have."""
    pictures, sizes = images(n, size, seed=seed)
    items = []
    for k, (picture, s) in enumerate(zip(pictures, sizes)):
        box = torch.tensor([[10.0, 12, 60, 70], [50, 40, 110, 100]]) if boxes is True or boxes and k in boxes else torch.zeros(0, 4)
        item = dict(image=picture, size=s, boxes=box, labels=torch.tensor([0, 2])[:len(box)], image_id=0, original_size=s, hidden=torch.zeros(0, 4))
        if masks:
            item["masks"] = torch.full((len(box), size // 2, size // 2), 4, dtype=torch.uint8)
        items.append(item)
    return collate(items, size)


def cls_batch(n=4, size=128, sizes=None, seed=1):
    pictures, sizes = images(n, size, sizes, seed)
    return collate_labelled([dict(image=p, size=s, label=k % 5, bad=[]) for k, (p, s) in enumerate(zip(pictures, sizes))], size)


# ------------------------------------------------------------------ Eqs. 1-4

def test_product_score_loss_by_hand():
    fg, cat = product_score_loss(torch.zeros(2), torch.zeros(2, 2), torch.tensor([True, False]), torch.tensor([1, -1]))
    assert (fg + cat).tolist() == pytest.approx([math.log(4), math.log(2)], abs=1e-6)  # -log(1/2 * 1/2), -log(1 - 1/2)


def test_product_score_loss_is_a_cross_entropy_with_a_background_class():
    g = torch.Generator().manual_seed(0)
    z, logits, label = torch.randn(50, generator=g).double() * 3, torch.randn(50, 7, generator=g).double() * 3, torch.randint(-1, 7, (50,), generator=g)
    both = sum(product_score_loss(z, logits, label >= 0, label))
    joint = torch.cat([z[:, None] + logits.log_softmax(1), torch.zeros(50, 1)], 1)
    assert torch.allclose(both, F.cross_entropy(joint, torch.where(label >= 0, label, 7), reduction="none"), atol=1e-12)
    s_fg, s = z.sigmoid(), logits.softmax(1)  # Eqs. 1, 2, and 4 as printed
    direct = torch.where(label >= 0, -(s_fg * s.gather(1, label.clamp(min=0)[:, None])[:, 0]).log(), -(1 - s_fg).log())
    assert torch.allclose(both, direct, atol=1e-9)


def test_product_score_loss_survives_extreme_logits_in_float32():
    z = torch.tensor([-300.0, 300, 300, -300])
    logits = torch.tensor([[500.0, -500], [500, -500], [-500, 500], [0, 0]])
    fg, cat = product_score_loss(z, logits, torch.tensor([True, True, False, False]), torch.tensor([1, 0, -1, -1]))
    assert (fg + cat).tolist() == pytest.approx([300 + 1000, 0, 300, 0], abs=1e-4)
    assert torch.log(torch.softmax(logits, 1))[0, 1] == -math.inf  # what the same in probabilities gives


def test_background_gives_no_gradient_to_the_categories_and_no_objects_give_zero():
    z, g = torch.randn(4, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    fg, cat = product_score_loss(z, g, torch.zeros(4, dtype=torch.bool), torch.full((4,), -1))
    (fg + cat).sum().backward()
    assert g.grad.abs().max() == 0 and (z.grad > 0).all()


@pytest.mark.parametrize("k,value", [(21841, 9.9915), (1000, 6.9078), (997, 6.9048), (720, 6.5793)])
def test_fresh_classifier_loss(k, value):
    assert mixed_cross_entropy(torch.zeros(2, k), torch.tensor([0, k - 1])).item() == pytest.approx(value, abs=1e-4)


def test_mixed_labels_equal_the_dense_soft_target():
    g = torch.Generator().manual_seed(0)
    logits, a, lam = torch.randn(6, 9, generator=g), torch.randint(9, (6,), generator=g), 0.3
    b = a.roll(1)
    target = lam * F.one_hot(a, 9) + (1 - lam) * F.one_hot(b, 9)
    assert torch.allclose(mixed_cross_entropy(logits, a, b, lam), -(target * logits.log_softmax(1)).sum(1).mean(), atol=1e-6)
    smooth = target * 0.9 + 0.1 / 9
    assert torch.allclose(mixed_cross_entropy(logits, a, b, lam, 0.1), -(smooth * logits.log_softmax(1)).sum(1).mean(), atol=1e-6)


def test_mixed_images_have_the_shares_that_the_labels_say():
    torch.manual_seed(0)
    x = torch.stack([torch.full((3, 32, 32), float(k)) for k in (0, 1)])
    kinds = set()
    for _ in range(30):
        mix = draw_mix(32)
        kinds.add(mix[1] is None)
        assert 0 <= mix[0] <= 1 and mix_images(x, mix)[1].mean().item() == pytest.approx(mix[0], abs=1e-5)  # image 1 keeps lam of itself
    assert kinds == {True, False}


def test_mixed_images_are_torchvisions_and_the_loss_is_but_for_rounding():
    """Why the mixing is our own: for the same share and window images are equal to the last digit, the loss on their dense targets is not."""
    from torchvision.transforms import v2
    x, label, logits = torch.rand(6, 3, 32, 32), torch.arange(6), torch.randn(6, 9)
    for kind, seed in (("MixUp", 0), ("CutMix", 1)):
        transform = getattr(v2, kind)(alpha=1.0, num_classes=9)
        torch.manual_seed(seed)
        theirs, target = transform(x, label)
        torch.manual_seed(seed)
        params = transform.make_params([x])
        lam = params["lam" if kind == "MixUp" else "lam_adjusted"]
        window = None
        if kind == "CutMix":
            x0, y0, x1, y1 = params["box"]
            window = y0, y1, x0, x1
        assert torch.equal(mix_images(x, (lam, window)), theirs)
        assert mixed_cross_entropy(logits, label, label.roll(1), lam).item() == pytest.approx(F.cross_entropy(logits, target).item(), abs=1e-6)


# ------------------------------------------------------------------ Eq. 5

class Fixed(nn.Module):
    """Logits given, for class_scores."""

    def __init__(self, arch, fg, det, cls):
        super().__init__()
        self.arch, self.values = arch, dict(fg=fg, det=det, cls=cls)
        for name in self.values:
            setattr(self, name, lambda h, name=name: self.values[name][h[:, 0].long()].clone())


def scores_of(model, vocabulary, fuse, n, chunk=256):
    return torch.cat([s for _, s in class_scores(model, torch.arange(n)[:, None], vocabulary, fuse, chunk)]).exp()


def test_vocabulary_of_the_docstring():
    arch = arch_of() | dict(det=["dog", "cat"], cls=["n1", "n2"], cls_names=["cat", "bird"], pair=[1, -1])
    v = Vocabulary(arch, "cpu")
    assert v.names == ["cat", "bird", "dog"] and v.base == [True, False, True]
    assert (v.both.tolist(), v.partner.tolist(), v.alone.tolist()) == ([0], [1], [0])


def test_fused_scores_by_hand():
    logits = lambda p: torch.tensor(p).log()
    arch = arch_of(det=2, cls=2, pair=[0, -1])  # d0 = c0; c1 is known to g^ alone, d1 to g alone
    model = Fixed(arch, torch.tensor([[100.0], [0.0]]), logits([[0.8, 0.2]] * 2), logits([[0.1, 0.9]] * 2))
    vocabulary = Vocabulary(arch, "cpu")
    assert vocabulary.names == ["c0", "c1", "d1"] and vocabulary.base == [True, False, True]
    assert scores_of(model, vocabulary, 2 / 3, 2).flatten().tolist() == pytest.approx([0.4, 0.9, 0.2, 0.2, 0.45, 0.1], abs=1e-6)  # 0.8^(2/3) 0.1^(1/3) = 0.4; S_fg 1, 0.5
    assert scores_of(model, vocabulary, 0.0, 1).tolist()[0] == pytest.approx([0.1, 0.9, 0.2], abs=1e-6)
    assert scores_of(model, vocabulary, 1.0, 1).tolist()[0] == pytest.approx([0.8, 0.9, 0.2], abs=1e-6)
    assert scores_of(model, Vocabulary(arch, "cpu", only_cls=True), 0.0, 1).tolist()[0] == pytest.approx([0.1, 0.9], abs=1e-6)
    assert scores_of(model, Vocabulary(arch, "cpu").choose([2, 0]), 2 / 3, 1).tolist()[0] == pytest.approx([0.2, 0.4], abs=1e-6)


def test_scores_equal_float64_and_do_not_depend_on_the_chunk():
    g = torch.Generator().manual_seed(0)
    pair = [int(k) if k < 40 else -1 for k in torch.randperm(300, generator=g)]
    arch = arch_of(det=50, cls=300, pair=pair)
    z, det, cls = (torch.randn(30, k, generator=g) * 5 for k in (1, 50, 300))
    model, vocabulary = Fixed(arch, z, det, cls), Vocabulary(arch, "cpu")
    fast = scores_of(model, vocabulary, 2 / 3, 30)
    assert torch.equal(fast, scores_of(model, vocabulary, 2 / 3, 30, 7))
    s_fg, s, s_hat = z.double().sigmoid(), det.double().softmax(1), cls.double().softmax(1)
    slow = torch.stack([s_fg[:, 0] * (s[:, p] ** (2 / 3) * s_hat[:, k] ** (1 / 3) if p >= 0 else s_hat[:, k]) for k, p in enumerate(pair)], 1)
    slow = torch.cat([slow, s_fg * s[:, 40:]], 1)
    assert torch.allclose(fast.double(), slow, rtol=1e-5, atol=1e-12)


# ------------------------------------------------------------------ levels, pooling

@pytest.mark.parametrize("side,level", [(102, 0), (112, 1), (223.99, 1), (224, 2), (447, 2), (448, 3), (1024, 3)])
def test_levels_of_roi_sizes(side, level):
    assert level_of(torch.tensor(float(side)), 224).item() == level  # P2 is 0


def test_whole_image_roi_is_average_pooling_on_p4():
    """224 px: P4 is 14 x 14, a bin of the 7 x 7 is 2 x 2 cells: RoIAlign reads each cell once, at its centre."""
    maps = {k: torch.randn(2, 4, 224 // s, 224 // s) for k, s in enumerate((4, 8, 16, 32))}
    rois = torch.tensor([[0.0, 0, 0, 224, 224], [1, 0, 0, 224, 224]])
    assert torch.allclose(pool(maps, rois, 224), F.adaptive_avg_pool2d(maps[2], 7), atol=1e-5)
    assert torch.allclose(pool(maps, rois, 224).mean((2, 3)), maps[2].mean((2, 3)), atol=1e-5)


def test_pooling_reads_every_cell_of_a_large_whole_image():
    p5 = torch.zeros(1, 1, 32, 32, requires_grad=True)
    pool({3: p5}, torch.tensor([[0.0, 0, 0, 1024, 1024]]), 224).sum().backward()
    assert (p5.grad > 0).all()  # two samples a bin, torchvision's default in its detectors, read 676 of the 1,024


def test_pooling_does_not_depend_on_the_first_images_size():
    """MultiScaleRoIAlign takes its scales from the first call; a 102 px image in a canvas of 1,024 gives it (2, 1, 0.5, 0.25) for ever."""
    from torchvision.ops import MultiScaleRoIAlign
    maps = {k: torch.randn(1, 4, 1024 // s, 1024 // s) for k, s in enumerate((4, 8, 16, 32))}
    box = torch.tensor([[0.0, 100, 100, 500, 400]])
    before = pool(maps, box, 224)
    pool(maps, torch.tensor([[0.0, 0, 0, 102, 102]]), 224)
    assert torch.equal(pool(maps, box, 224), before)
    theirs, named = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2), {str(k): m for k, m in maps.items()}
    theirs(named, [torch.tensor([[0.0, 0, 102, 102]])], [(102, 102)])
    assert theirs.scales != [1 / 4, 1 / 8, 1 / 16, 1 / 32]  # the trap is still there


def test_levels_without_rois_still_give_gradients():
    maps = {k: torch.randn(1, 4, 128 // s, 128 // s, requires_grad=True) for k, s in enumerate((4, 8, 16, 32))}
    pool(maps, torch.tensor([[0.0, 0, 0, 20, 20]]), 56).sum().backward()
    assert all(m.grad is not None for m in maps.values()) and maps[3].grad.abs().max() == 0 and maps[0].grad.abs().max() > 0
    for m in maps.values():
        m.grad = None
    pool(maps, torch.zeros(0, 5), 56).sum().backward()  # no RoI at all
    assert all(m.grad is not None and m.grad.abs().max() == 0 for m in maps.values())


def test_fpn_equals_torchvisions():
    torch.manual_seed(0)
    model = Detector(arch_of(stage=1))
    x = torch.randn(1, 3, 128, 128)
    theirs = model.fpn({str(k): m for k, m in enumerate(model.body(x))})
    ours = model.features(x)
    assert all(torch.equal(ours[k], theirs[str(k)]) for k in range(4))
    assert list(model.top_down(x, 2)) == [3, 2] and torch.equal(model.smooth({2: model.top_down(x, 2)[2]})[2], ours[2])


def test_whole_images_are_pooled_from_their_own_level_as_any_roi():
    """Each image goes through the convolution of its level only; the numbers are those of pooling from the full pyramid."""
    torch.manual_seed(0)
    model, sizes = Detector(arch_of(stage=1)), [(128, 128), (40, 30), (20, 24), (64, 60), (90, 30)]
    x = torch.randn(5, 3, 128, 128)
    tops, rois = model.top_down(x), torch.tensor([[i, 0.0, 0, w, h] for i, (h, w) in enumerate(sizes)])
    assert sorted(set(model.whole_levels(sizes))) == [0, 1, 2, 3]
    assert torch.allclose(model.whole_rois(tops, sizes), pool(model.features(x), rois, model.canonical), atol=1e-5)
    for k, m in model.features(x).items():
        mine = [i for i, level in enumerate(model.whole_levels(sizes)) if level == k]
        assert mine and torch.allclose(model.whole_rois(tops, sizes)[mine], pool({k: m}, rois[mine], model.canonical), atol=1e-5)


def test_padding_does_not_reach_the_score_of_a_whole_image_beyond_the_receptive_field():
    torch.manual_seed(0)
    model = Detector(arch_of(stage=1)).eval()
    batch = cls_batch(1, 128, [(96, 64)])
    other = dict(batch, images=batch["images"].clone())
    other["images"][:, :, 96:], other["images"][:, :, :, 64:] = 255, 255
    with torch.no_grad():
        assert torch.equal(normalise(batch), normalise(other))  # whatever lies in the padding is zeroed
        assert torch.equal(*(model.whole_image(normalise(b), b["image_sizes"]) for b in (batch, other)))


def test_swin_maps_have_the_published_shapes():
    with torch.device("meta"):
        body = simple21k.Body("swin_t", 0.2)
        assert [tuple(m.shape) for m in body(torch.zeros(1, 3, 224, 224))] == [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]
    assert simple21k.Body("swin_t", 0.3).stages[3][1][1].stochastic_depth.p == pytest.approx(0.3)


def test_swin_shifts_its_windows_as_torchvision_does():
    """Stage I at 224 px: C5 is one window, which Swin's classification does not shift and mmdetection does. On larger maps, as stage
    II has them, both rules are one."""
    torch.manual_seed(0)
    body, other = simple21k.Body("swin_t").eval(), simple21k.Body("swin_t").eval()
    for m in body.modules():
        if hasattr(m, "relative_position_bias_table"):
            nn.init.normal_(m.relative_position_bias_table)
    other.load_state_dict(body.state_dict())
    always_shift(other)
    with torch.no_grad():
        for side, cells in ((224, 7), (256, 8)):
            ours, theirs = (net(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))) for net in (body, other))
            assert ours[3].shape[-1] == cells and all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3]))
            assert torch.equal(ours[3], theirs[3]) == (cells > 7)
            blocks = body.stages[3][1]
            assert blocks[1].attn.shift_size == [3, 3]
            if cells == 7:  # what is meant: the same as without a shift
                blocks[1].attn.shift_size = [0, 0]
                again = body(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side)))
                blocks[1].attn.shift_size = [3, 3]
                assert torch.equal(ours[3], again[3])


def test_frozen_batchnorm_keeps_its_statistics_in_training():
    torch.manual_seed(0)
    body = simple21k.Body("r50")
    before = {k: v.clone() for k, v in body.state_dict().items() if "running" in k}
    body.train()(torch.randn(2, 3, 64, 64))
    moved = {k: v.clone() for k, v in body.state_dict().items() if "running" in k}
    assert not torch.equal(moved["stages.0.bn1.running_mean"], before["stages.0.bn1.running_mean"])
    body.fixed_norms = True
    body.train()(torch.randn(2, 3, 64, 64))
    assert body.training and all(torch.equal(v, moved[k]) for k, v in body.state_dict().items() if "running" in k)


def test_imagenet_weights_go_where_they_belong(monkeypatch):
    """Files of torchvision's layout, made from its own models."""
    import torchvision
    for name, build in (("r50", torchvision.models.resnet50), ("swin_t", torchvision.models.swin_t)):
        torch.manual_seed(1)
        net = build(weights=None).eval()
        monkeypatch.setattr("common.zoo.imagenet_state", lambda name: (net.state_dict(), "url"))
        body = simple21k.Body(name).eval()
        simple21k.load_imagenet(body, name)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            c5 = body(x)[3]
            expected = net.norm(net.features(x)).permute(0, 3, 1, 2) if name == "swin_t" else nn.Sequential(*list(net.children())[:-2])(x)
        assert torch.allclose(c5, expected, atol=1e-5)


# ------------------------------------------------------------------ who learns from what

def gradients(args, det, cls, terms=None, **arch):
    torch.manual_seed(0)
    model = Detector(arch_of(**arch))
    nn.init.normal_(model.box.weight, std=0.1), nn.init.normal_(model.cls.weight, std=0.1)
    losses = make_learner(model, args).train()(dict(cls=cls, det=det))
    sum(v for k, v in losses.items() if terms is None or k in terms).backward()
    size = lambda part: sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None)
    return {name: size(part) for name, part in model.named_children()}, model, losses


def test_classification_images_train_backbone_head_and_their_classifier_only():
    grads, model, _ = gradients(flags(), det_batch(), cls_batch(), ["cls"])
    assert grads["fg"] == grads["det"] == grads["box"] == grads["rpn"] == 0
    assert min(grads["body"], grads["fpn"], grads["head"], grads["cls"]) > 0


def test_detection_images_do_not_train_the_image_classifier():
    grads, _, _ = gradients(flags(), det_batch(), cls_batch(), ["fg", "cat", "box", "rpn_fg", "rpn_box"])
    assert grads["cls"] == 0 and min(v for k, v in grads.items() if k != "cls") > 0


def test_foreground_learns_from_classification_images_when_asked():
    grads, _, _ = gradients(flags("--fg-grad-on-cls"), det_batch(), cls_batch(), ["cls"])
    assert grads["fg"] > 0 and grads["det"] == 0


@pytest.mark.parametrize("head", ["2fc", "4conv1fc"])
def test_images_without_boxes_train_without_nan(head):
    grads, model, losses = gradients(flags(), det_batch(boxes=False, masks=True), cls_batch(), masks=True, head=head)
    losses = {k: v.item() for k, v in losses.items()}
    assert all(math.isfinite(v) for v in losses.values()) and losses["cat"] == losses["box"] == losses["mask"] == losses["rpn_box"] == 0
    assert all(p.grad is not None for p in model.parameters())


def test_masks_learn_from_objects():
    grads, _, losses = gradients(flags("--masks"), det_batch(masks=True), cls_batch(), ["mask"], masks=True)
    assert grads["mask"] > 0 and grads["cls"] == grads["fg"] == 0 and losses["mask"] > 0


def test_classification_images_on_another_canvas():
    grads, _, losses = gradients(flags(), det_batch(), cls_batch(size=64))
    assert losses["cls"] > 0 and min(grads.values()) > 0


def test_two_images_of_a_batch_normalise_by_all_rois():
    """The terms of a detection step, from their definitions: sums over sampled RoIs, divided by their number."""
    args = flags()
    torch.manual_seed(0)
    model = Detector(arch_of())
    learner, det, cls = make_learner(model, args), det_batch(), cls_batch()
    torch.manual_seed(5)
    losses = learner(dict(cls=cls, det=det))
    torch.manual_seed(5)
    x = normalise(det)
    maps = model.features(torch.cat([x, normalise(cls)]))
    first = {k: m[:2] for k, m in maps.items()}
    boxes, labels = ([v[:n] for v, n in zip(det[k], det["counts"])] for k in ("boxes", "labels"))
    found, _ = model.proposals(x, det["image_sizes"], first, boxes)
    rois, fg, label, gt, _ = sample_rois(found, boxes, labels, model.rois_per_image)
    h = model.head(pool(first, rois, model.canonical))
    n, s_fg, s = len(rois), model.fg(h)[:, 0].sigmoid(), model.det(h).softmax(1)
    assert losses["fg"].item() == pytest.approx((-torch.where(fg, s_fg, 1 - s_fg).log()).sum().item() / n, abs=1e-5)
    assert losses["cat"].item() == pytest.approx(-sum(s[i, label[i]].log().item() for i in range(n) if label[i] >= 0) / n, abs=1e-5)
    encoded, out = simple21k.CODER.encode_single(gt[fg], rois[fg, 1:]), model.box(h)[fg]
    assert losses["box"].item() == pytest.approx(F.smooth_l1_loss(out, encoded, beta=1 / 9, reduction="sum").item() / n, abs=1e-5)


def test_sampled_rois():
    boxes = torch.tensor([[0.0, 0, 50, 50], [60, 60, 100, 100]])
    found = torch.cat([torch.tensor([[0.0, 0, 50, 26], [0, 0, 50, 24]]), torch.rand(300, 4) * 5 + torch.tensor([110.0, 0, 115, 20])])
    torch.manual_seed(0)
    rois, fg, label, gt, owner = sample_rois([found], [boxes], [torch.tensor([7, -1])], 64)
    assert len(rois) == 64 and fg.sum() == 3  # two true boxes and the one at IoU 0.52
    assert sorted(label[fg].tolist()) == [-1, 7, 7] and (label[~fg] == -1).all() and torch.equal(gt[fg], boxes[owner[fg]])
    rois, fg, *_ = sample_rois([boxes.repeat(100, 1)], [boxes], [torch.tensor([0, 1])], 64)
    assert fg.sum() == 16 and len(rois) == 16  # a quarter at most


def test_mixing_is_drawn_before_the_step():
    """Where it was drawn when the loop did it: the random numbers of a step are those of earlier versions."""
    torch.manual_seed(0)
    args, batch = flags("--augment", "strong", "--stage1-size", "64", stage=1), cls_batch(6, 64)
    model = Detector(arch_of(stage=1))
    learner = make_learner(model, args)
    torch.manual_seed(3)
    loss = learner(dict(cls=batch))["cls"]
    torch.manual_seed(3)
    mix = draw_mix(64)
    logits = model.whole_image(mix_images(normalise(batch), mix), batch["image_sizes"])
    assert torch.equal(loss, mixed_cross_entropy(logits, batch["labels"], batch["labels"].roll(1), mix[0], 0.1))


class Numbers(torch.utils.data.Dataset):
    """Items that say which they are."""
    canvas, repeats = 32, None

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        return dict(image=torch.zeros(3, 8, 8, dtype=torch.uint8), size=(8, 8), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(),
                    image_id=key, original_size=(8, 8), label=key[0], bad=["damaged"] if key[0] == 3 else [])


@pytest.mark.parametrize("workers", [0, 2])
def test_pairs_follow_two_endless_streams_from_any_step(workers, capsys):
    args = flags("--batch-size", "2", "--cls-ratio", "3", "--accumulate", "2", "--workers", workers, "--seed", "5")
    pairs = simple21k.make_pairs(Numbers(13), Numbers(7), args, 1, 2, False)
    assert len(pairs) == 4  # two steps of two micro-batches: 16 of 13 images
    expected = zip(Stream(13, 2, 1, 2, 5), Stream(7, 6, 1, 2, 6))
    expected = [(det, [i for i, _ in cls]) for (det, cls), _ in zip(expected, range(12))]
    key = lambda batch: (batch["det"]["image_ids"], batch["cls"]["labels"].tolist())
    found = []
    for epoch in range(3):
        pairs.set_epoch(epoch)
        found += map(key, pairs)
    assert found == expected
    pairs.set_epoch(1, 2)
    assert list(map(key, pairs)) == expected[6:8]
    assert pairs.broken == {"damaged"} and capsys.readouterr().err.count("damaged") == 1  # told once
    alone = simple21k.make_pairs(Numbers(13), None, args, 1, 2, False)
    assert [list(b) for b in alone] == [["det"]] * 4


def test_every_layer_is_counted_once(capsys):
    """describe_model: a step's work is that of body, FPN, RPN and of the RoI head on every proposal."""
    from common.run import describe_model
    for arch in (arch_of(stage=1), arch_of(stage=1, gap=True), arch_of(masks=True), arch_of(cls=0)):
        model = new_model(arch)
        describe_model("net", model, torch.zeros(1, 3, 128, 128))
        line = capsys.readouterr().out
        assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in line and "GFLOPs at 128 x 128" in line
        if arch["masks"]:
            out = model(torch.zeros(1, 3, 128, 128))
            assert [len(x) for x in out] == [5, 5, 100, 100, 100, 100, 100]


# ------------------------------------------------------------------ NMS

def brute_nms(boxes, roi, label, score, most):
    keep = [torch.tensor([k for k in range(len(roi)) if label[k] == c]) for c in label.unique()]
    keep = torch.cat([k[nms(boxes[roi[k]].double(), score[k].double(), 0.5)] for k in keep])
    return keep[score[keep].argsort(descending=True)][:most]


def test_nms_of_21841_classes_equals_a_loop_over_classes():
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(60, 2, generator=g) * 900
    boxes = torch.cat([corner, corner + 20 + torch.rand(60, 2, generator=g) * 100], 1)
    roi = torch.randint(60, (3000,), generator=g)
    label = torch.cat([torch.randint(21841 - 40, 21841, (1500,), generator=g), torch.randint(0, 40, (1500,), generator=g)])
    score = torch.rand(3000, generator=g)
    expected = brute_nms(boxes, roi, label, score, 300)
    assert torch.equal(class_nms(boxes, roi, label, score, 300), expected)
    for topk in (300, 301, 450, 1000):  # fewer candidates: doubled until 300 survive
        assert torch.equal(class_nms(boxes, roi, label, score, 300, topk=topk), expected)


def test_nms_with_float32_offsets_would_be_wrong():
    boxes, offset = torch.tensor([[0.0, 0, 2.9, 2.9], [0.9, 0.9, 1.2, 1.2]]), 21840 * 1025.0
    far = boxes + offset
    assert len(nms(boxes, torch.tensor([0.9, 0.8]), 0.5)) == 2 and len(nms(far, torch.tensor([0.9, 0.8]), 0.5)) == 1  # the trap
    keep = class_nms(boxes, torch.tensor([0, 1]), torch.tensor([21840, 21840]), torch.tensor([0.9, 0.8]), 10)
    assert keep.tolist() == [0, 1]


def test_nms_of_nothing():
    empty = torch.zeros(0, dtype=torch.long)
    assert len(class_nms(torch.rand(5, 4), empty, empty, torch.zeros(0), 10)) == 0


def test_detect_scores_21841_classes_and_finds_each_classes_best_box():
    torch.manual_seed(0)
    model = Detector(arch_of(det=4, cls=21841, pair=[k if k < 3 else -1 for k in range(21841)])).eval()
    nn.init.normal_(model.cls.weight, std=0.3), nn.init.normal_(model.box.weight, std=0.05)
    vocabulary, args = Vocabulary(model.arch, "cpu"), flags("--score-thresh", "1e-4", "--max-dets", "100")
    found = simple21k.detect(model, det_batch(1), vocabulary, **detect_options(args), best=True)
    assert len(vocabulary.names) == 21842 and len(found["best"]) == 21842 and found["best_boxes"].shape == (21842, 4)
    assert len(found["boxes"]) == 100 and (found["scores"].diff() <= 0).all() and found["scores"][-1] >= 1e-4
    top = found["best"].argmax()
    assert top == found["labels"][0] and found["best"][top].exp().item() == pytest.approx(found["scores"][0].item(), rel=1e-5)
    assert torch.allclose(found["best_boxes"][top], found["boxes"][0], atol=1e-4)
    few = simple21k.detect(model, det_batch(1), vocabulary)
    assert torch.equal(few["boxes"], found["boxes"]) and torch.equal(few["labels"], found["labels"])


def test_predict_image_finds_what_detect_finds_of_the_classes_that_are_asked_for(tmp_path):
    """From a file, a PIL image or a tensor; load gives the detector and the names of what it scores."""
    from common.pictures import Pictures
    torch.manual_seed(0)
    model = Detector(arch_of(pair=[1, -1, -1, -1, -1]))
    nn.init.normal_(model.cls.weight, std=0.3), nn.init.normal_(model.box.weight, std=0.05)
    torch.save(weights_of(model), tmp_path / "w.pt")
    model, names = simple21k.load(tmp_path / "w.pt")
    assert not model.training and names == ["c0", "c1", "c2", "c3", "c4", "d0", "d2"]
    picture = Image.effect_noise((150, 100), 90).convert("RGB")
    picture.save(tmp_path / "a.png")
    (shown,) = Pictures([str(tmp_path)], tmp_path / "out", 0.05)
    expected = simple21k.find_boxes(model, shown.pixels, Vocabulary(model.arch, "cpu"), least=0.05)
    for image in (tmp_path / "a.png", picture, shown.pixels):
        boxes, scores, found = simple21k.predict_image(model, names, image, 0.05)
        assert len(boxes) > 0 and torch.equal(boxes, expected["boxes"]) and torch.equal(scores, expected["scores"])
        assert found == [names[k] for k in expected["labels"].tolist()] and boxes.max() > 100
    _, _, found = simple21k.predict_image(model, ["n00000002", "d2"], picture, 0.0)
    assert set(found) == {"c2", "d2"}
    model.arch["fuse"] = 0.0  # of its run
    shared = [simple21k.predict_image(model, ["c0"], picture, 0.0, *fuse)[1] for fuse in ([], [0.0], [2 / 3])]
    assert torch.equal(shared[0], shared[1]) and not torch.equal(shared[0], shared[2])
    with pytest.raises(UserError, match="classes unicorn: no such name"):
        simple21k.predict_image(model, ["unicorn"], picture)
    with pytest.raises(UserError, match="'d2' is one text; give a list"):
        simple21k.predict_image(model, "d2", picture)


@pytest.mark.parametrize("classes", [None, ["d2", "c3"]])
def test_exported_program_gives_what_detect_finds(classes):
    """Before the NMS of each class; of any number of images. (The program itself: test_simple21k_run.py.)"""
    torch.manual_seed(0)
    model = Detector(arch_of(pair=[1, -1, -1, -1, -1])).eval()
    nn.init.normal_(model.cls.weight, std=0.3), nn.init.normal_(model.box.weight, std=0.05), nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.2)
    vocabulary = Vocabulary(model.arch, "cpu")
    if classes:
        vocabulary.choose(vocabulary.find(classes))
    pictures, _ = images(2, 160)
    with torch.no_grad():
        boxes, scores, found = simple21k.Exported(model, vocabulary)(torch.stack(pictures))
    for k, picture in enumerate(pictures):
        item = dict(image=picture, size=(160, 160), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0, original_size=(160, 160))
        batch = collate([item], 160)
        with torch.no_grad():
            (theirs,), _ = model.proposals(batch["images"], [(160, 160)], model.features(normalise(batch)))
        assert torch.allclose(found[k, :len(theirs)], theirs, atol=1e-3) and (scores[k, len(theirs):] == 0).all()
        expected = simple21k.detect(model, batch, vocabulary, least=1e-3)
        roi, label = (scores[k] > 1e-3).nonzero(as_tuple=True)
        keep = class_nms(boxes[k], roi, label, scores[k][roi, label], 100)
        assert len(keep) > 10 and torch.equal(label[keep], expected["labels"])
        assert torch.allclose(boxes[k][roi[keep]], expected["boxes"], atol=1e-2) and torch.allclose(scores[k][roi, label][keep], expected["scores"], atol=1e-4)


@pytest.mark.parametrize("side", [160, 192, 224, 288])
def test_exported_anchors_are_torchvisions_at_any_multiple_of_32(side):
    """torchvision's stride is side // cells: 53, not 64, on P6 at 160 px."""
    model = Detector(arch_of()).eval()
    nn.init.zeros_(model.rpn.head.bbox_pred.weight), nn.init.zeros_(model.rpn.head.bbox_pred.bias)  # a box is its anchor
    images = torch.rand(1, 3, side, side)
    with torch.no_grad():
        maps = model.features(images)
        boxes, _, levels = simple21k.Exported(model, None).candidates(maps, side, side)
        pyramid = [*maps.values(), torch.nn.functional.max_pool2d(maps[3], 1, 2)]
        anchors, = model.rpn.anchor_generator(ImageList(images, [(side, side)]), pyramid)
    coarse = anchors[-3 * pyramid[-1].shape[2] * pyramid[-1].shape[3]:].clamp(0, side)
    mine = boxes[0][levels == 4]
    assert len(mine) == len(coarse) and torch.cdist(mine, coarse).amin(1).max() < 1e-3


# ------------------------------------------------------------------ stage I and its load into stage II

def test_idle_parts_of_the_fpn_do_not_decay_in_stage_one():
    """Whole images of 224 px reach P4 alone. What gets no gradient must not decay: 300 epochs would leave e^-9 of P2, P3, P5."""
    def after(freeze):
        torch.manual_seed(0)
        args, model = flags("--stage1-size", "64", stage=1), Detector(arch_of(stage=1))
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        if freeze:
            model.freeze_idle(args.stage1_size)
        groups = parameter_groups(model, 0.5)
        optimizer, learner = torch.optim.AdamW(groups, 0.1), make_learner(model, args)
        for _ in range(3):
            # without the remedy every level would be computed, as torchvision's FPN does it, and idle parts get zero gradients
            loss = sum(learner(dict(cls=cls_batch(4, 64))).values()) + (0 if freeze else 0 * sum(p.sum() for p in model.parameters()))
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
        return {n: (p.norm() / start[n].norm()).item() for n, p in model.named_parameters() if p.ndim > 1 and n.startswith("fpn")}
    kept, shrunk = after(True), after(False)
    idle = [n for n in kept if n.startswith(("fpn.inner_blocks.0", "fpn.inner_blocks.1", "fpn.layer_blocks.0", "fpn.layer_blocks.1", "fpn.layer_blocks.3"))]
    assert len(idle) == 5 and all(kept[n] == 1 for n in idle)
    assert all(shrunk[n] == pytest.approx(0.95**3, rel=1e-4) for n in idle)  # the trap: 1 - lr x decay a step


def init_from(tmp_path, arch, **changes):
    torch.manual_seed(3)
    first = new_model(arch)
    torch.save(weights_of(first), tmp_path / "first.pt")
    torch.manual_seed(4)
    second = Detector({**arch_of(cls=len(changes.get("cls", arch["cls"]))), **{k: arch[k] for k in ("name", "head", "cls", "cls_names")}, **changes})
    return first.eval(), second.eval(), tmp_path / "first.pt"


def test_stage_two_takes_everything_of_stage_one(tmp_path, capsys):
    first, second, path = init_from(tmp_path, arch_of(stage=1))
    before = second.fg.weight.clone()
    load_init(second, flags("--stage", "2", "--init", str(path)), 0)
    assert capsys.readouterr().out.strip().endswith("loaded body, cls, fpn, head | new box, det, fg, rpn | left out nothing")
    assert torch.equal(second.fg.weight, before)
    batch = cls_batch(2, 64)
    with torch.no_grad():
        assert torch.equal(first.whole_image(normalise(batch), batch["image_sizes"]), second.whole_image(normalise(batch), batch["image_sizes"]))
    load_init(second, flags("--stage", "2", "--init", str(path), "--reinit-cls"), 0)
    assert "loaded body, fpn, head | new box, cls, det, fg, rpn" in capsys.readouterr().out


def test_novel_classes_that_had_boxes_before_are_told(tmp_path, capsys):
    """Stage II from an earlier detector, whose boxes knew d1: without boxes now it is not novel."""
    for stage, told in ((2, True), (1, False)):  # stage I sees no box, whatever its list says
        changes = dict(cls_names=["d0", "d1, dee", "c2", "c3", "c4"], det=["d0"], pair=[0, -1, -1, -1, -1])
        _, second, path = init_from(tmp_path, arch_of(stage=stage, det=2), **changes)
        load_init(second, flags("--stage", "2", "--init", str(path)), 0)
        assert ("was trained on d1, which count as novel here" in capsys.readouterr().err) == told


def test_a_detector_of_coco_that_lvis_will_score_is_told_at_its_start(tmp_path, capsys):
    """As beside --eval. Stage I of setup 2 has seen ImageNet only."""
    for setup, stage, told in (("s2", 2, True), ("s2", 1, False), ("s3", 2, False)):
        _, second, path = init_from(tmp_path, arch_of(stage=stage) | dict(setup=setup), cls=[], cls_names=[], pair=[])
        load_init(second, flags("--setup", "lvis", "--init", path), 0)
        assert ("LVIS's validation images are of COCO's train2017, too" in capsys.readouterr().err) == told


def test_pooled_classifier_gives_its_backbone_only(tmp_path, capsys):
    first, second, path = init_from(tmp_path, arch_of(stage=1, gap=True))
    assert isinstance(first, PooledClassifier) and isinstance(simple21k.load(path)[0], PooledClassifier)
    load_init(second, flags("--stage", "2", "--init", str(path)), 0)
    assert "loaded body | new box, cls, det, fg, fpn, head, rpn | left out cls" in capsys.readouterr().out
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items() if k.startswith("body."))


def test_a_part_of_the_classes_goes_by_wnid_and_unknown_ones_are_refused(tmp_path):
    first, second, path = init_from(tmp_path, arch_of(stage=1), cls=["n00000003", "n00000001"], cls_names=["a", "b"], pair=[-1, -1])
    load_init(second, flags("--stage", "2", "--init", str(path)), 0)
    assert torch.equal(second.cls.weight, first.cls.weight[[3, 1]])
    _, other, path = init_from(tmp_path, arch_of(stage=1), cls=["n00000003", "n00000009"], cls_names=["a", "b"], pair=[-1, -1])
    with pytest.raises(UserError, match="does not know class n00000009"):
        load_init(other, flags("--stage", "2", "--init", str(path)), 0)


def test_wrong_backbone_and_damaged_backbone_are_refused(tmp_path):
    _, second, path = init_from(tmp_path, arch_of("tiny16", stage=1), name="tiny8")
    with pytest.raises(UserError, match="has backbone tiny16, this run tiny8"):
        load_init(second, flags("--stage", "2", "--init", str(path)), 0)
    _, second, path = init_from(tmp_path, arch_of(stage=1))
    content = torch.load(path, weights_only=True)
    content["model"] = {k: v for k, v in content["model"].items() if not k.startswith("body.stages.3")}
    torch.save(content, path)
    with pytest.raises(UserError, match="backbone, FPN or head does not fit"):
        load_init(second, flags("--stage", "2", "--init", str(path)), 0)


def test_weights_decay_and_norms_do_not():
    groups = parameter_groups(Detector(arch_of("swin_t", stage=1)), 0.05)
    assert groups[0]["weight_decay"] == 0.05 and all(p.ndim > 1 and p.shape[0] != 169 for p in groups[0]["params"]) and len(groups[1]["params"]) > 50


# ------------------------------------------------------------------ vocabularies

INDEX = """  1 This software and database is being provided
bank n 3 2 @ ~ 3 1 09213565 08420278 09213434
bass n 2 1 @ 2 1 04990781 04990770
hot_dog n 1 1 @ 1 0 07697537
"""


def test_wordnet_senses(tmp_path):
    (tmp_path / "index.noun").write_text(INDEX)
    ids = wordnet_ids(tmp_path / "index.noun", ["bank.n.01", "bank.n.03", "bass.n.02", "hot_dog.n.01", "stop_sign.n.01", "bank.n.04"])
    assert ids == {"bank.n.01": "n09213565", "bank.n.03": "n09213434", "bass.n.02": "n04990770", "hot_dog.n.01": "n07697537"}
    for odd in ("bank", "bank.n.00", 5):
        with pytest.raises(UserError, match=f"synset {odd}: expected lemma.n.number"):
            wordnet_ids(tmp_path / "index.noun", ["bank.n.01", odd])
    with pytest.raises(UserError, match="--wordnet .* is a folder"):
        wordnet_ids(tmp_path, ["bank.n.01"])
    for content, text in (("", "holds none of the synsets"), ("bank n x 1\n", "is not WordNet's index.noun")):
        (tmp_path / "index.noun").write_text(content)
        with pytest.raises(UserError, match=text):
            wordnet_ids(tmp_path / "index.noun", ["bank.n.01"])


@pytest.fixture
def lists():
    if not SPLITS.exists():
        pytest.skip(f"the class lists are not here: {SPLITS}")
    categories = json.loads((SHARED / "data/lvis_mini/lvis_v1_categories.json").read_text())
    return categories, [line.split()[0] for line in (SPLITS / "imagenet21k_wnids.txt").read_text().splitlines()], (SPLITS / "imagenet_lvis_997_wnids.txt").read_text().split()


def test_the_997_classes_from_wordnet_itself(lists):
    """Needs WordNet 3.0 (Debian: apt install wordnet-base); everything else is real, too."""
    path = Path("/usr/share/wordnet/index.noun")
    if not path.exists():
        pytest.skip(f"WordNet 3.0 is not here: {path}")
    categories, all_wnids, expected = lists
    ids = wordnet_ids(path, [c["synset"] for c in categories])
    shared = {c["synset"]: ids[c["synset"]] for c in categories if ids.get(c["synset"]) in set(all_wnids)}
    assert len(ids) == 1202 and {c["synset"] for c in categories} - set(ids) == {"stop_sign.n.01"}
    assert set(shared.values()) == set(expected) and len(shared) == 997
    assert sum(c["frequency"] != "r" for c in categories if c["synset"] in shared) == 720


def test_setup_one_on_the_real_lists(lists, tmp_path):
    """Base, novel and what both know, from LVIS's real categories and the real 997 wnids; folders of one picture each stand for ImageNet-21K."""
    categories, _, expected = lists
    mapped = json.loads((SPLITS / "lvis_v1_to_in21k_wnid.json").read_text())  # 982 of the 997, matched by name
    wnids = [m["wnid"] for m in mapped]
    assert set(wnids) <= set(expected)
    (tmp_path / "overlap.json").write_text(json.dumps(mapped))
    boxes = write_boxes(tmp_path / "det.json", categories)
    for w in [*wnids, "n99999999"]:  # the last is no class of LVIS
        (tmp_path / "in21k" / w).mkdir(parents=True)
        (tmp_path / "in21k" / w / "a.jpg").touch()
    args = flags("--setup", "s1", "--overlap", str(tmp_path / "overlap.json"), *boxes, "--cls-dir", str(tmp_path / "in21k"))
    spaces, index, _ = simple21k.make_vocabulary(args)
    by_name = {c["name"]: c for c in categories}
    base = [m["name"] for m in mapped if by_name[m["name"]]["frequency"] != "r"]
    assert spaces["cls"] == sorted(wnids) and sorted(spaces["det"]) == sorted(base) and sum(p >= 0 for p in spaces["pair"]) == len(base) and len(index) == 982
    assert all(spaces["det"][p] == n for n, p in zip(spaces["cls_names"], spaces["pair"]) if p >= 0)
    ids = [by_name[n]["id"] for n in spaces["det"]]
    assert ids == sorted(ids)  # the order in which CocoDataset counts labels
    vocabulary = Vocabulary(arch_of() | spaces, "cpu")
    assert len(vocabulary.names) == 982 and sum(vocabulary.base) == len(base) and not len(vocabulary.alone)
    assert vocabulary.find(["aerosol can", spaces["cls"][5]]) == [vocabulary.names.index("aerosol_can"), 5]
    with pytest.raises(UserError, match="--classes unicorn: no such name"):
        vocabulary.find(["unicorn"])


def test_overlap_files(tmp_path):
    path = tmp_path / "o.json"
    path.write_text('{"cat": "n1"}')
    assert read_overlap(path) == {"cat": "n1"}
    path.write_text('[{"name": "cat", "wnid": "n1", "synset": "x"}]')
    assert read_overlap(path) == {"cat": "n1"}
    for content, text in (("[3]", "expected a json object"), ('[{"name": 1, "wnid": "n1"}]', "expected a json object"), ('{"cat": ["n1"]}', "expected a json object"), ('{"cat": "n1", "tabby": "n1"}', "two detection classes are n1")):
        path.write_text(content)
        with pytest.raises(UserError, match=text):
            read_overlap(path)
    assert plain("Aerosol_Can ") == "aerosol can"


def test_a_class_is_known_by_all_its_names():
    """--overlap joins classes of different names: validation and --classes may use either, and a class is scored once."""
    arch = arch_of(pair=[1, -1, -1, -1, -1]) | dict(det=["cup", "tv", "cat"], cls_names=["television, telly", "B_c", "c2", "c3", "c4"])
    vocabulary = Vocabulary(arch, "cpu")
    assert vocabulary.names == ["television, telly", "B_c", "c2", "c3", "c4", "cup", "cat"]
    assert vocabulary.find(["tv", "Telly", "N00000000", "b c"]) == [0, 1]
    assert vocabulary.of([dict(name=n) for n in ("TV", "cat", "dog", "b_c")]) == {"tv": 0, "cat": 6, "b c": 1}
    assert Vocabulary(arch, "cpu").choose([]).names == []
    twins = arch_of(det=1) | dict(det=["dog"], cls_names=["scan, cat", "cat", "cat, true cat", "c3", "c4"])
    assert Vocabulary(twins, "cpu").of([dict(name="cat")]) == {"cat": 1}


def test_two_validation_classes_that_are_one_to_the_model_are_told(tmp_path, capsys):
    for names, told in (("couch", "sofa"), True), (("couch", "chair"), False):
        boxes = write_boxes(tmp_path / "val.json", [dict(id=k, name=n) for k, n in enumerate(names)])
        args = flags("--setup", "own", "--val-json", boxes[1], "--val-images", boxes[3])
        simple21k.make_val(args, arch_of() | dict(cls_names=["couch, sofa", "chair", "c2", "c3", "c4"]))
        assert ("couch and sofa are one class of the model" in capsys.readouterr().err) == told


def test_wanted_classes_by_commas_flags_or_lines(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufefftélly, tv\ncup\n\n".encode())
    wanted = lambda *values: simple21k.class_names(parse_args(["--predict", "a", "--weights", "b", *(x for v in values for x in ("--classes", v))]).classes)
    assert wanted("red panda, cup") == ["red panda", "cup"] and wanted("television, telly", "cup") == ["television, telly", "cup"]
    assert wanted(str(tmp_path / "names.txt")) == ["télly, tv", "cup"]
    vocabulary = Vocabulary(arch_of() | dict(cls_names=["television, telly", "c1", "c2", "c3", "c4"]), "cpu")
    assert vocabulary.find(["television, telly", "c2"]) == [0, 2]
    for values in (["cup,"], [""], ["cup", " "]):
        with pytest.raises(UserError, match="holds an empty name"):
            wanted(*values)


def test_own_classes_meet_by_name(tmp_path):
    """The whole name first, then its parts; what two classes are called by is nobody's."""
    boxes = write_boxes(tmp_path / "det.json", [dict(id=k, name=n) for k, n in enumerate(("cat", "tench", "red panda"))])
    names = ["scan, cat", "Cat", "tench, Tinca tinca", "lesser panda, red_panda", "panda, giant panda"]
    for k, n in enumerate(names):
        (tmp_path / "in" / f"n{k}").mkdir(parents=True)
        (tmp_path / "in" / f"n{k}" / "a.jpg").touch()
    (tmp_path / "names.txt").write_text("".join(f"n{k}\t{n}\n" for k, n in enumerate(names)))
    args = flags("--setup", "own", *boxes, "--cls-dir", tmp_path / "in", "--names", tmp_path / "names.txt")
    assert simple21k.make_vocabulary(args)[0]["pair"] == [-1, 0, 1, 2, -1]
    assert simple21k.pair_by_name(["crane", "cat"], ["crane", "crane", "cat"]) == [-1, -1, 1]  # a bird, a machine: which?
    assert simple21k.pair_by_name(["crane", "cat"], ["crane, bird", "crane, machine", "cat, feline"]) == [-1, -1, 1]
    assert simple21k.pair_by_name(["crane"], ["crane, bird", "crane"]) == [-1, 0]  # a whole name goes first
    assert simple21k.pair_by_name(["red panda"], ["lesser panda, red_panda", "panda, red panda"]) == [-1, -1]
    (tmp_path / "names.txt").write_text("n0\ta\x07b\n")
    with pytest.raises(UserError, match="the name of n0 is empty, no text, or holds control characters"):
        simple21k.make_vocabulary(args)


def pictures(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(root / name)
    return root


def test_classes_that_are_listed_without_a_box_are_no_detection_classes(tmp_path, capsys):
    """One category list for training and validation: the novel classes stay novel, by a name of --overlap, too."""
    categories = [dict(id=k, name=n) for k, n in enumerate(("dog", "cat", "crowd", "tv"))]
    boxes = write_boxes(tmp_path / "det.json", categories, [0, 2])
    content = json.loads(boxes[1].read_text())
    content["annotations"][1]["iscrowd"] = 1
    boxes[1].write_text(json.dumps(content))
    cls_dir = pictures(tmp_path / "in", "dog/a.jpg", "cat/a.jpg", "n1/a.jpg")
    args = flags("--setup", "own", *boxes, "--cls-dir", cls_dir)
    arch = simple21k.make_data(args)[0]
    assert "note: " + f"{boxes[1]}: cat and 2 more are listed without a box" in capsys.readouterr().err
    assert (arch["det"], arch["cls"], arch["pair"]) == (["dog"], ["cat", "dog", "n1"], [-1, 0, -1])
    assert Vocabulary(arch, "cpu").base == [False, True, False]
    val = argparse.Namespace(records=argparse.Namespace(categories=categories))
    assert simple21k.reported(args, val, arch, 1)["report"] == "last"  # novel labels choose nothing
    (tmp_path / "o.json").write_text(json.dumps(dict(dog="dog", tv="n1")))
    args = flags("--setup", "own", *boxes, "--cls-dir", cls_dir, "--overlap", tmp_path / "o.json")
    arch = simple21k.make_data(args, quiet=True)[0]
    assert (arch["det"], arch["cls_names"], arch["pair"]) == (["dog"], ["cat", "dog", "n1, tv"], [-1, 0, -1])
    assert Vocabulary(arch, "cpu").of(categories) == dict(cat=0, dog=1, tv=2) and capsys.readouterr().err == ""
    write_boxes(tmp_path / "det.json", categories)
    assert simple21k.make_data(flags("--setup", "own", *boxes, "--cls-dir", cls_dir))[0]["det"] == ["dog", "cat", "crowd", "tv"]
    assert "without a box" not in capsys.readouterr().err
    write_boxes(tmp_path / "det.json", categories, [])
    with pytest.raises(UserError, match="it holds none|no usable image"):
        simple21k.make_data(flags("--setup", "own", *boxes, "--cls-dir", cls_dir))
    lvis = [dict(c, synset="x.n.01", frequency="c") for c in categories]
    args = flags("--setup", "lvis", "--init", "none", *write_boxes(tmp_path / "det.json", lvis, [0]))
    assert len(simple21k.make_vocabulary(args)[0]["det"]) == 4  # as ever: LVIS's and COCO's lists are whole


def test_validation_images_in_the_training_folder_are_left_out_of_it(tmp_path):
    """Boxes of a plain COCO json, as those of a localisation set."""
    root = pictures(tmp_path / "all", "n1/a.jpg", "n1/b.jpg", "n2/c.jpg", "n2/d.jpg")
    content = dict(images=[dict(id=1, file_name="n1/a.jpg", width=64, height=64)], categories=[dict(id=1, name="n1")],
                   annotations=[dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 20, 20], area=400, iscrowd=0)])
    (tmp_path / "val.json").write_text(json.dumps(content))
    for folder, left in (root, 1), (tmp_path / "elsewhere", 0):
        args = flags("--setup", "own", "--cls-dir", root, "--val-json", tmp_path / "val.json", "--val-images", folder)
        index = simple21k.labelled_index(args, {})
        assert (index.dropped, index.asked, len(index)) == (left, left, 4 - left)


def test_accuracy_of_training_images_is_told(tmp_path, capsys):
    train, val = pictures(tmp_path / "train", "n1/a.jpg", "n2/b.jpg"), pictures(tmp_path / "val", "n1/a.jpg", "n2/b.jpg")
    arch = arch_of(stage=1) | dict(cls=["n1", "n2"], cls_names=["a", "b"], pair=[-1, -1])
    for folder, told in (train, True), (val, False):
        simple21k.make_val(flags("--setup", "own", "--cls-dir", train, "--cls-val", folder, stage=1), arch)
        assert ("n1 and 1 more are in --cls-dir, too: the accuracy is of training images" in capsys.readouterr().err) == told


def test_a_stage_one_that_left_out_fewer_images_is_told(tmp_path, capsys):
    """Its checkpoint keeps the number; files of earlier versions have none."""
    root = pictures(tmp_path / "all", "n1/a.jpg", "n1/b.jpg", "n2/c.jpg")
    split = dict(images=[dict(id=1, file_name="n1/a.jpg", width=64, height=64, category_id=1)], annotations=[], categories=[dict(id=1, name="n1")])
    (tmp_path / "split.json").write_text(json.dumps(split))
    given = ["--setup", "own", *write_boxes(tmp_path / "det.json", [dict(id=1, name="n1")]), "--cls-dir", root]
    val = ["--val-json", tmp_path / "split.json", "--val-images", root]
    without, with_it = (simple21k.make_data(flags("--stage", "1", *given, *more))[0] for more in ([], val))
    assert (without["left_out"], with_it["left_out"]) == (0, 1)
    old = {k: v for k, v in with_it.items() if k != "left_out"}
    for before, told in (without, True), (with_it, False), (old, False):
        torch.save(weights_of(new_model(before)), tmp_path / "first.pt")
        arch = simple21k.make_data(flags("--stage", "2", "--init", tmp_path / "first.pt", *given, *val))[0]
        assert ("left out 0 images that are evaluated on, this run 1;" in capsys.readouterr().err) == told
        assert arch["left_out"] == (0 if told else 1)  # for what starts from this one


def test_a_checkpoint_is_scored_as_its_run_was_unless_flags_say_otherwise(tmp_path):
    given = ["--setup", "own", *write_boxes(tmp_path / "det.json", [dict(id=1, name="n1")]), "--cls-dir", pictures(tmp_path / "in", "n1/a.jpg", "n2/b.jpg")]
    arch = simple21k.make_data(flags(*given, "--fuse", "0", "--max-dets", "7", "--score-thresh", "0.01"))[0]
    assert (arch["fuse"], arch["max_dets"], arch["score_thresh"]) == (0.0, 7, 0.01) and simple21k.is_arch(arch)
    scored = lambda arch, *more: [getattr(resolve(parse_args([*map(str, more)]), arch), k) for k in ("fuse", "max_dets", "score_thresh")]
    assert scored(arch, "--eval", "x") == [0.0, 7, 0.01] and scored(arch, "--eval", "x", "--fuse", "1", "--max-dets", "9") == [1.0, 9, 0.01]
    assert scored(arch_of(), "--eval", "x") == [2 / 3, None, 1e-4]  # files of earlier versions
    model = Detector(arch)
    torch.save(weights_of(model), tmp_path / "w.pt")
    given = ["--weights", str(tmp_path / "w.pt")]
    for mode in ["--predict", "a.jpg"], ["--export", "a.pt2"]:
        for more, fuse in ([], 0.0), (["--fuse", "0.5"], 0.5):
            assert simple21k.detector_of(parse_args([*mode, *given, *more]))[2].fuse == fuse
    assert simple21k.detector_of(parse_args(["--predict", "a.jpg", *given]))[2].score_thresh == 0.1  # that is --score's
    for wrong in (dict(fuse="1"), dict(fuse=2.0), dict(score_thresh=math.nan), dict(max_dets=0), dict(left_out="a")):
        assert not simple21k.is_arch(arch | wrong)


def test_paths_that_are_not_there_are_not_asked_for(tmp_path):
    """imagenet/val is used where it is; what somebody names must exist; other people's classes are not measured on ImageNet's."""
    paths = lambda *given: resolve(flags("--setup", "own", *given, "--data", tmp_path))  # twice: it finds nothing to do
    assert paths().cls_val is None
    (tmp_path / "imagenet/val").mkdir(parents=True)
    assert paths().cls_val == str(tmp_path / "imagenet/val") and paths("--cls-dir", str(tmp_path)).cls_val is None
    own = paths("--det-json", "a.json", "--det-images", "a")
    assert own.val_json is None and own.val_boxes is None and (own.train_json, own.train_images) == ("a.json", "a")
    with pytest.raises(UserError, match="--cls-val nowhere: is missing"):
        simple21k.make_val(paths("--cls-val", "nowhere"), arch_of(stage=1))


def test_detection_classes_of_one_name_and_no_random_classifier_in_the_scores(tmp_path):
    twins = [dict(id=1, name="a"), dict(id=2, name="a"), dict(id=3, name="b")]
    args = flags("--setup", "own", "--cls-ratio", "0", *write_boxes(tmp_path / "det.json", twins))
    with pytest.raises(UserError, match="categories 1 and 2 have the same name 'a', and both have boxes"):
        simple21k.make_vocabulary(args)
    write_boxes(tmp_path / "det.json", twins, [2, 3])  # an export's parent without boxes
    spaces, _, records = simple21k.make_vocabulary(args, before=arch_of(stage=1))
    assert spaces["cls"] == arch_of()["cls"] and spaces["det"] == ["a", "b"] and "category 1, which has no box" in records.report()
    assert simple21k.make_vocabulary(args, before=arch_of(stage=1, gap=True))[0]["cls"] == []


def test_a_copy_of_the_benchmark_takes_no_part_in_training_either(tmp_path):
    for name in ("in/n1/a.jpg", "in/n1/b.jpg", "in/n2/c.jpg", "copy/n1/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    (tmp_path / "split.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="n1/a.jpg", width=40, height=40, category_id=1)], annotations=[], categories=[dict(id=1, name="n1")])))
    args = flags("--setup", "s3", "--cls-dir", str(tmp_path / "in"), "--val-json", str(tmp_path / "split.json"), "--val-images", str(tmp_path / "copy"))
    index = simple21k.labelled_index(args, {})
    assert len(index) == 2 and index.dropped == 1
    args.val_json = str(tmp_path / "other.json")
    (tmp_path / "other.json").write_text((tmp_path / "split.json").read_text().replace("n1/a.jpg", "n1/z.jpg"))
    with pytest.raises(UserError, match="none of its images is in --cls-dir"):
        simple21k.labelled_index(args, {})


def test_a_benchmark_is_found_in_the_training_folder_from_above_and_from_below(tmp_path):
    for name in ("in/n1/a.jpg", "in/n1/b.jpg", "in/n2/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    for root, name in (("in", "n1/a.jpg"), (".", "in/n1/a.jpg"), ("in/n1", "a.jpg")):
        (tmp_path / "split.json").write_text(json.dumps(dict(images=[dict(id=1, file_name=name, width=40, height=40, category_id=1)], annotations=[], categories=[dict(id=1, name="n1")])))
        args = flags("--setup", "own", "--cls-dir", str(tmp_path / "in"), "--val-json", str(tmp_path / "split.json"), "--val-images", str(tmp_path / root))
        assert simple21k.evaluated_images(args.cls_dir, args.val_images, args.val_json) == ["n1/a.jpg"]


def test_objects365_as_it_is_published(tmp_path):
    (tmp_path / "patch8").mkdir()
    (tmp_path / "patch8" / "a.jpg").touch()
    image = lambda k, name: dict(id=k, file_name=name, width=50, height=50)
    box = lambda k, c=1: dict(image_id=k, category_id=c, bbox=[0, 0, 5, 5])
    raw = dict(images=[image(1, "images/v1/patch8/a.jpg"), image(2, "images/v2/patch16/gone.jpg")],
               categories=[dict(id=1, name="Person ")], annotations=[box(1), box(1), box(2)])
    clean = objects365(records_of(raw, "o365.json"), tmp_path)
    assert list(clean.names) == ["patch8/a.jpg"] and len(clean.xywh) == 1 and clean.classes == ["Person"]
    raw["categories"] += [dict(id=2, name=" Person"), dict(id=3, name="Sneakers")]
    assert objects365(records_of(raw, "o365.json"), tmp_path).classes == ["Person", "Sneakers"]
    with pytest.raises(UserError, match="categories 1 and 2 have the same name"):
        records_of(raw | dict(annotations=[box(1), box(1, 2)]), "o365.json")


def test_benchmark_split(tmp_path):
    for wnid, n in (("n1", 30), ("n2", 24), ("n3", 4), ("n4", 5)):
        (tmp_path / "in" / wnid).mkdir(parents=True)
        for k in range(n):
            Image.new("RGB", (8 + k, 6)).save(tmp_path / "in" / wnid / f"{k:03d}.jpg")
    args = argparse.Namespace(cls_dir=str(tmp_path / "in"), cls_list=None, seed=0, make_split=str(tmp_path / "split.json"))
    with pytest.raises(UserError, match="--cls-dir: is missing; the folders to draw from"):
        make_split(argparse.Namespace(**vars(args) | dict(cls_dir=None)))  # as setup lvis has it
    make_split(args)
    split = json.loads((tmp_path / "split.json").read_text())
    names = {c["id"]: c["name"] for c in split["categories"]}
    count = lambda w: sum(names[i["category_id"]] == w for i in split["images"])
    assert list(names.values()) == ["n1", "n2", "n4"] and [count(w) for w in names.values()] == [5, 4, 1]  # 5; 20 %; classes under 5 are out
    assert all(i["width"] == 8 + int(i["file_name"][3:6]) and i["height"] == 6 for i in split["images"])


@pytest.mark.parametrize("given,text", [
    (["--eval", "a", "--predict", "b"], "one at a time"), (["--predict", "b"], "needs --weights"),
    (["--weights", "a"], "belongs to --predict"), (["--classes", "a"], "belongs to --predict"),
    (["--stage", "2"], "needs --init"), (["--stage", "1", "--init", "x.pt"], "stage I starts from"),
    (["--setup", "lvis"], "fine-tunes --init"), (["--init", "none"], "say of which stage"),
    (["--reinit-cls", "--cls-ratio", "0"], "would never learn"),
    (["--setup", "lvis", "--stage", "1", "--init", "none"], "stage I belongs to the other setups"),
    (["--make-split", __file__], "somebody's work"), (["--data", "shapes", "--setup", "s1"], "has its own"),
    (["--table"], "belongs to --data shapes"), (["--data", "shapes", "--table", "--cls-ratio", "0"], "leave out --stage"),
    (["--data", "shapes", "--table", "--reinit-cls"], "leave out --stage"), (["--data", "shapes", "--table", "--cls-val", "none"], "leave out --stage"),
    (["--val-json", "a", "--val-boxes", "b"], "one of them"),
    (["--fuse", "1.5"], "at least 0 and at most 1"), (["--image-size", "100"], "multiple of 32"),
    (["--jitter", "2,1"], "--jitter: 2,1: expected two scales"), (["--jitter", "1.2.3,2"], "expected two scales"),
    (["--cls-jitter", "x"], "--cls-jitter: x: expected two scales"), (["--lr", "0"], "must be positive"),
    (["--batch-size", "0"], "at least 1"), (["--cls-ratio", "-1"], "at least 0"),
    # values that only look like numbers
    (["--lr", "nan"], "must be positive"), (["--cls-weight", "inf"], "at least 0"), (["--fuse", "nan"], "at most 1"),
    (["--image-size", "0"], "at least 32"),
    (["--seed", "-1"], "at least 0"), (["--max-dets", "1.5"], "expected a whole number"),
    # flags without effect
    (["--stage", "2", "--init", "none", "--stage1-epochs", "3"], "--stage1-epochs: belongs to --stage 1, here it is 2"),
    (["--init", "x.pt", "--augment", "weak"], "--augment: belongs to stage I"),
    (["--stage", "1", "--epochs", "3"], "--epochs: belongs to --stage 2, here it is 1"),
    (["--stage", "1", "--stage1-head", "gap", "--head", "4conv1fc"], "--head: belongs to --stage1-head roi"),
    (["--setup", "s2", "--stage", "2", "--init", "none", "--fuse", "0.5"], "--fuse: in setup s2 no class is known to be in both"),
    (["--setup", "lvis", "--init", "x", "--fuse", "0.5"], "--fuse: belongs to"),
    (["--wordnet", "a"], "--wordnet: belongs to --setup s1"), (["--setup", "s1", "--names", "a"], "--names: belongs to"),
    (["--setup", "s1", "--wordnet", "a", "--overlap", "b"], "one of them"),
    (["--setup", "lvis", "--init", "x", "--cls-dir", "a"], "--cls-dir: belongs to"),
    (["--setup", "lvis", "--init", "x", "--keep-empty"], "--keep-empty: belongs to"),
    (["--cls-ratio", "0", "--cls-weight", "1"], "--cls-weight: has no effect with --cls-ratio 0"),
    (["--data-seed", "1"], "--data-seed: belongs to --data shapes"), (["--eval", "x", "--resume"], "cannot go with --eval"),
    (["--det-json", "a"], "--train-json needs --train-images")])
def test_flags_that_make_no_sense(given, text, capsys):
    with pytest.raises(SystemExit):
        parse_args(given)
    assert text in capsys.readouterr().err


def test_every_row_of_the_tables_is_a_command():
    assert len({k for k in simple21k.ROWS if k.startswith("t")}) == 14  # Tables 2, 3, 4, 5
    for name, (paper, _, _) in simple21k.ROWS.items():
        args = parse_args(["--row", name])
        assert args.setup and re.fullmatch(r"-|[0-9.]+(/[0-9.]+)+", paper)
    args = parse_args(["--row", "t2-r50-reform", "--backbone", "swin_t"])  # what is given beside it wins
    assert (args.setup, args.stage1_head, args.backbone) == ("s1", "gap", "swin_t")
    assert resolve(of_stage(parse_args(["--row", "t4"]), 1, "x")).stage1_epochs == 100


def test_a_setup_is_decided_in_one_table(tmp_path):
    """Which paths, which classes, what both share: s1 and lvis read the same boxes, lvis has no classification images, s2 maps nothing."""
    setups = simple21k.SETUPS
    assert {k for k, s in setups.items() if s.cls == "none"} == {"lvis"} and {k for k, s in setups.items() if s.det == "base"} == {"s1"}
    assert [setups[k].pair for k in ("s1", "s2", "s3", "lvis", "own")] == ["wordnet", "none", "none", "none", "name"]
    assert all(set(s.paths) <= set(simple21k.PATHS) for s in setups.values())
    args = resolve(of_stage(parse_args(["--setup", "lvis", "--init", "none", "--backbone", "r50", "--data", str(tmp_path)]), 2, "x"))
    assert args.train_json == str(tmp_path / "lvis/annotations/lvis_v1_train.json") and args.cls_dir is None and args.cls_ratio == 0


def test_what_is_measured_chooses_nothing():
    """Stage I's accuracy is measured on the benchmark's images in setup 2: neither it nor the benchmark may choose weights."""
    one, two = flags(stage=1), flags()
    benchmark = simple21k.Benchmark.__new__(simple21k.Benchmark)
    assert simple21k.reported(one, None, {}, 1)["report"] == simple21k.reported(two, benchmark, {}, 1)["report"] == "last"
    assert simple21k.reported(two, None, {}, 1)["report"] == "best"
    for setup in ("s1", "lvis"):
        assert simple21k.reported(argparse.Namespace(**vars(two) | dict(setup=setup)), None, {}, 1)["report"] == "last"
    arch = dict(det=["cat"], cls=["cat", "dog"], cls_names=["cat", "dog"], pair=[0, -1], setup="own")
    own = lambda *names: argparse.Namespace(records=argparse.Namespace(categories=[dict(name=n) for n in names]))
    said = [simple21k.reported(two, own(*names), arch, 1) for names in (["cat"], ["cat", "dog"])]
    assert [x["report"] for x in said] == ["best", "last"] and said[1]["metric"] == "base " + said[0]["metric"]  # nor novel labels


def test_names_may_be_chosen_among_the_chosen():
    arch = dict(det=["cat"], cls=["cat", "dog", "cow"], cls_names=["cat", "dog", "cow"], pair=[0, -1, -1], setup="own")
    vocabulary = simple21k.Vocabulary(arch, "cpu").choose([2, 0]).choose([1])
    assert vocabulary.names == ["cat"] and vocabulary.chosen.tolist() == [0] and vocabulary.base == [True]


def test_a_pair_of_scales_may_be_given_again_with_resume(tmp_path, capsys):
    """args.json knows no tuples, and the line that says how to go on repeats all flags."""
    given = ["--data", "shapes", "--jitter", "0.5,1.5", "--out", str(tmp_path)]
    (tmp_path / "args.json").write_text(json.dumps(dict(args=vars(parse_args(given)))))
    assert parse_args([*given, "--resume"]).jitter == (0.5, 1.5)
    with pytest.raises(SystemExit):
        parse_args(["--resume", "--out", str(tmp_path), "--jitter", "0.5,1.6"])
    assert "--jitter (0.5, 1.6): the run in" in capsys.readouterr().err


SECTIONS = ["the paper", "what its tables compare with", "detector", "data", "train", "evaluate, predict", "flags", "main"]


def test_the_paper_comes_first_and_lines_stay_readable():
    lines = Path(simple21k.__file__).read_text(encoding="utf-8").split("\n")
    titles = [(k, line.strip("# =")) for k, line in enumerate(lines) if line.startswith("# ====")]
    assert [title for _, title in titles] == SECTIONS and titles[0][0] < 115
    assert not [k for k, line in enumerate(lines, 1) if len(line) > 110]


def test_the_loop_is_that_of_crosskd():
    import difflib
    import inspect

    import crosskd
    ours, theirs = (inspect.getsource(script.train).split("\n") for script in (simple21k, crosskd))
    changed = [line for line in difflib.unified_diff(theirs, ours, lineterm="", n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= 40


def test_flags_without_effect_beside_eval_are_said(capsys):
    args = parse_args(["--eval", "x", "--epochs", "3", "--fuse", "0.5", "--image-size", "64"])
    assert capsys.readouterr().err == "note: with --eval there is no effect of --epochs\n" and args.fuse == 0.5
    parse_args(["--predict", "a.jpg", "--weights", "x", "--names", "n", "--score", "0.5"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given,text", [
    (dict(backbone="vgg"), "choose among r50"),
    (dict(bn="sync"), "--bn: belongs to r50"), (dict(stage=1, init="imagenet"), "no ImageNet weights for tiny8"),
    (dict(backbone="r50", init="none", bn="frozen"), "--init none needs --bn sync"),
    (dict(backbone="r50", stage=1, init=None, checkpoint=True), "would count each batch twice")])
def test_flags_that_do_not_fit_the_backbone(given, text):
    args = parse_args(["--backbone", "tiny8"])
    args = argparse.Namespace(**vars(args) | dict(stage=2, init="none") | given)
    before = dict(vars(args))
    with pytest.raises(UserError, match=text):
        resolve(args)
    assert vars(args) == before  # flags are only read


def test_defaults_of_backbones_and_setups():
    """Which were the script's before its flags were resolved in one place."""
    s2 = flags(backbone="r50", stage=1)
    assert (s2.setup, s2.stage1_epochs, s2.stage1_batch, s2.stage1_lr, s2.augment, s2.stage1_size) == ("s2", 100, 32, 0.1, "weak", 224)
    assert (s2.epochs, s2.batch_size, s2.lr, s2.image_size, s2.cls_size, s2.jitter, s2.cls_jitter) == (36, 2, 3e-4, 1024, 1024, (0.1, 2.0), (0.1, 2.0))
    assert (s2.cls_weight, s2.cls_ratio, s2.masks, s2.rfs, s2.bn, s2.head) == (0.1, 3, False, 0.0, "frozen", "2fc")
    s3 = flags("--setup", "s3", backbone="swin_b")
    assert (s3.stage1_epochs, s3.stage1_batch, s3.stage1_lr, s3.augment, s3.epochs, s3.bn) == (100, 128, 2.5e-4, "strong", 12, None)
    s1 = flags("--setup", "s1", backbone="swin_t")
    assert (s1.stage1_epochs, s1.stage1_lr, s1.masks, s1.epochs) == (300, 1e-3, True, 36)
    lvis = flags("--setup", "lvis", "--init", "none", backbone="r50")
    assert (lvis.epochs, lvis.lr, lvis.rfs, lvis.cls_ratio, lvis.bn, lvis.masks) == (24, 1e-4, 0.001, 0, "sync", False)
    tiny = flags()
    assert (tiny.stage1_epochs, tiny.stage1_batch, tiny.stage1_size, tiny.augment) == (15, 64, 96, "plain")
    assert (tiny.epochs, tiny.batch_size, tiny.lr, tiny.image_size, tiny.cls_size) == (3, 4, 4e-3, 256, 128)
    assert (tiny.jitter, tiny.cls_jitter, tiny.cls_weight) == ((0.7, 1.6), (0.2, 1.0), 1.0)
