# SPDX-License-Identifier: MIT
"""crosskd.py against an independent implementation: mmdet 3.3.0 and the CrossKD authors' repository.

Weights come from golden/fill.py through mmdetection's key names, so every number below also tests the key map.

`python -m pytest -q tests/test_crosskd_golden.py`: weights made from mmdetection's key names go through our
key map; then raw head outputs and FPN features (GFL R50, ATSS R50; float64) agree with mmdet 3.3.0 to 2e-6
of each map's standard deviation, detections to 0.002 px, ATSS assignments exactly, losses to 2e-6 (six
cases each), the gradient norm of every trained parameter to 1e-3; CrossKD's cross-head predictions and
losses agree with the authors' repository likewise, before and after the ReLU question (`--align pre|post`).
All 13 key lists load strictly.
"""
import argparse
import copy
import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention

import crosskd
from common.run import load_strict
from common.zoo import from_mmdet, infer_arch
from crosskd import DETECTORS, kd_losses, kd_options, make_distiller, strategy_maps

SIZES = {"full": [[256, 320], [256, 320]], "own": [[256, 320], [230, 270]]}


@pytest.fixture(scope="module")
def fill(golden):
    spec = importlib.util.spec_from_file_location("fill", golden / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mmdet_state(golden, name):
    keys = json.loads((golden / "mmdet_keys" / f"{name}.json").read_text())
    state = {k: torch.zeros(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in keys.items()}
    return {k: torch.linspace(0, 16, 17) if k.endswith("integral.project") else v for k, v in state.items()}


def build(golden, fill, name, salt=""):
    """In float64, the stem and first stage frozen, as mmdetection trains it."""
    state = fill.fill(mmdet_state(golden, name), salt)
    arch = infer_arch(state, name)
    model = DETECTORS[arch["kind"]](arch["backbone"], arch["num_classes"], arch["channels"], arch["p6"])
    load_strict(model, from_mmdet(state), name)
    model.freeze()
    return model.eval().double()


@pytest.fixture(scope="module")
def computed(golden, fill):
    """(model, maps of its backbone, (maps, feats, held)) of the golden images, of a name: computed once, with
    its graph, for all tests."""
    done = {}

    def get(name, salt=""):
        if name not in done:
            model, body = build(golden, fill, name, salt), {}
            hook = model.body.register_forward_hook(lambda module, inputs, output: body.update(output))
            done[name] = model, body, model(images(fill).double(), (3,))
            hook.remove()
        return done[name]
    return get


def images(fill):
    return fill.image(256, 320, 2, [(256, 320), (230, 270)])


def ground_truth(golden, case):
    """Padded boxes (2, 8, 4) and labels (2, 8) of case A (image 1 empty), B, or C (both empty)."""
    z = np.load(golden / "gfl_r50_assign.npz")
    boxes, labels = torch.zeros(2, 8, 4), torch.full((2, 8), -1)
    for i in range(2):
        if case == "B" or (case == "A" and i == 0):
            b = torch.from_numpy(z[f"gt{i}_boxes"])
            boxes[i, :len(b)], labels[i, :len(b)] = b, torch.from_numpy(z[f"gt{i}_labels"])
    return boxes, labels


NAMES = ["gfl_r18", "gfl_r34", "gfl_r50", "gfl_r101", "atss_r50", "atss_r101", "fcos_r50", "fcos_r101", "retinanet_r18",
         "retinanet_r50", "retinanet_r101", "retinanet_swin-t", "retinanet_mobilenetv2"]


@pytest.mark.parametrize("name", NAMES)
def test_every_mmdet_key_list_loads_strictly_with_none_left_over(golden, name):
    state = mmdet_state(golden, name)
    arch = infer_arch(state, name)
    assert arch["kind"] == name.split("_")[0] and arch["num_classes"] == 80
    ours = from_mmdet(state)
    with torch.device("meta"):  # names and shapes are compared, numbers below
        model = DETECTORS[arch["kind"]](arch["backbone"], arch["num_classes"], arch["channels"], arch["p6"])
    load_strict(model, {k: v.to("meta") for k, v in ours.items()}, name)
    constant = sum(k.endswith(("integral.project", "relative_position_index")) for k in state)
    assert len(ours) == len(state) - constant  # no two mmdet keys fell on one of ours


@pytest.mark.parametrize("name", ["gfl_r50", "atss_r50"])
def test_raw_outputs_features_and_detections_equal_mmdet(golden, computed, name):
    z = np.load(golden / f"{name}_forward.npz")
    model, body, (maps, feats, _) = computed(name)
    single = {k: [m.detach().float() for m in v] for k, v in maps.items()}
    found = model.detect(single, torch.tensor(SIZES["own"]))

    def close(ours, theirs, key):
        error = np.abs(ours.detach().numpy() - theirs).max() / theirs.std()
        assert error <= 2e-6, f"{key}: max error {error:.1e} std"
    for i, m in enumerate(body.values(), 1):
        close(m[0, :8], z[f"backbone_{i}"], f"backbone_{i}")
    for level in range(5):
        close(feats[level][0, :8], z[f"neck_{level}"], f"neck_{level}")
        for key in ("cls", "reg", "ctr") if model.ctr else ("cls", "reg"):
            close(maps[key][level], z[f"{key}_{level}"], f"{key}_{level}")
    for i, (boxes, scores, labels) in enumerate(found):
        assert np.array_equal(labels.numpy(), z[f"det{i}_labels"])
        np.testing.assert_allclose(boxes.numpy(), z[f"det{i}_boxes"], atol=2e-3)
        np.testing.assert_allclose(scores.numpy(), z[f"det{i}_scores"], atol=2e-6)


@pytest.mark.parametrize("name", ["gfl_r50", "atss_r50"])
@pytest.mark.parametrize("variant", ["full", "own"])
@pytest.mark.parametrize("case", ["A", "B"])
def test_atss_assignment_is_identical_to_mmdet(golden, name, variant, case):
    z = np.load(golden / f"{name}_assign.npz")
    model = DETECTORS[name.split("_")[0]]("tiny8", 80, 64)
    sizes, level_sizes = torch.tensor(SIZES[variant]), [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
    assert np.array_equal(model.priors(level_sizes, "cpu").numpy(), z["anchors"])
    boxes, labels = ground_truth(golden, case)
    inside = crosskd.cells_inside(sizes, level_sizes, crosskd.STRIDES)
    owner = model.match(torch.from_numpy(z["anchors"]), z["num_level_anchors"].tolist(), boxes, labels >= 0, inside)
    theirs = z[f"gt_index_{variant}_{case}"].astype(int)
    assert np.array_equal(owner.numpy(), np.where(theirs == -3, -2, theirs))


def losses_and_gradients(model, maps, sizes, boxes, labels):
    targets = model.assign([m.shape[-2:] for m in maps["cls"]], sizes, boxes, labels)
    return model.losses(model.flatten(maps), targets), targets


NAME_OF = {"loss_cls": "cls", "loss_bbox": "box", "loss_dfl": "dfl", "loss_centerness": "ctr"}


@pytest.mark.parametrize("name", ["gfl_r50", "atss_r50"])
def test_losses_equal_mmdet_in_every_case(golden, name):
    z, theirs = np.load(golden / f"{name}_forward.npz"), json.loads((golden / f"{name}_loss.json").read_text())["losses"]
    model = DETECTORS[name.split("_")[0]]("tiny8", 80, 64)
    maps = {k: [torch.from_numpy(z[f"{k}_{i}"]) for i in range(5)] if f"{k}_0" in z else [] for k in ("cls", "reg", "ctr")}
    for key, terms in theirs.items():
        variant, case = key.split("_")
        ours, _ = losses_and_gradients(model, maps, torch.tensor(SIZES[variant]), *ground_truth(golden, case))
        for term, levels in terms.items():
            assert float(ours[NAME_OF[term]]) == pytest.approx(sum(levels), rel=2e-6, abs=1e-7), (key, term)


def mmdet_name(ours):
    """Inverse of from_mmdet for the parameters of R18/R50 GFL and ATSS."""
    for a, b in (("body.stages.", "backbone."), ("fpn.inner_blocks.", "neck.lateral_convs."), ("fpn.layer_blocks.", "neck.fpn_convs."),
                 ("fpn.extra_blocks.p6.", "neck.fpn_convs.3.conv."), ("fpn.extra_blocks.p7.", "neck.fpn_convs.4.conv."),
                 ("head.cls_tower.", "bbox_head.cls_convs."), ("head.reg_tower.", "bbox_head.reg_convs.")):
        if ours.startswith(a):
            rest = ours[len(a):]
            if "lateral" in b or b.endswith("fpn_convs."):
                rest = rest.replace(".0.", ".conv.", 1)
            return b + rest.replace("norm.", "gn.") if "tower" in a else b + rest
    if ours.startswith("head.scales."):
        return "bbox_head." + ours.removeprefix("head.") + ".scale"
    return ours


def check_gradients(model, total, theirs, kind):
    model.zero_grad()
    total.backward(retain_graph=True)  # of what `computed` holds
    checked = 0
    for ours, p in model.named_parameters():
        key = mmdet_name(ours)
        for part, name in (("cls_pred", f"{kind}_cls"), ("reg_pred", f"{kind}_reg"), ("ctr_pred", f"{kind}_centerness")):
            key = key.replace(f"head.{part}.", f"bbox_head.{name}.")
        if key in theirs:
            assert float(p.grad.norm()) == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
            checked += 1
    return checked


@pytest.mark.parametrize("name", ["gfl_r50", "atss_r50"])
@pytest.mark.parametrize("key", ["full_A", "own_B"])
def test_gradient_of_every_trained_parameter_equals_mmdet(golden, computed, name, key):
    theirs = json.loads((golden / f"{name}_loss.json").read_text())["grad_norms"][key]
    (model, _, (maps, _, _)), (variant, case) = computed(name), key.split("_")
    boxes, labels = ground_truth(golden, case)
    losses, _ = losses_and_gradients(model, maps, torch.tensor(SIZES[variant]), boxes, labels)
    assert check_gradients(model, sum(losses.values()), theirs, name.split("_")[0]) == len(theirs)


def crosskd_args(**changes):
    a = crosskd.resolve(crosskd.parse_args(["--student", "gfl_r18"]))
    return argparse.Namespace(**{**vars(a), **changes})


@pytest.fixture(scope="module")
def pair(computed):
    """Student and teacher, (maps, feats, held) of each, f_3 after the ReLU."""
    (student, _, s), (teacher, _, t) = computed("gfl_r18", "student."), computed("gfl_r50")
    teacher.zero_grad()
    t = torch.utils._pytree.tree_map(torch.Tensor.detach, t)
    return student, copy.deepcopy(teacher).requires_grad_(False), s, t


@pytest.mark.parametrize("align, suffix", [("post", ""), ("pre", "_hold_before_relu")])
def test_cross_head_predictions_and_losses_equal_the_authors(golden, pair, align, suffix):
    student, teacher, s, t = pair
    z = np.load(golden / "crosskd_gfl_r50_r18.npz")
    theirs = json.loads((golden / "crosskd_gfl_r50_r18.json").read_text())
    a = crosskd_args(align=align)
    with torch.no_grad():
        if align == "pre":  # other features are held of the same pyramid
            s, t = (crosskd.Outputs(maps, feats, net.head(feats, feats, 0, (3,), True)[1])
                    for net, (maps, feats, _) in ((student, s), (teacher, t)))
        cross, target = strategy_maps(a.kd_strategy, student, teacher, s, t, a.kd_layer, a.align != "none")
    assert target is t[0]
    for group, maps in (("stu", s[0]), ("tea", t[0]), (f"reused{suffix}", cross)):
        step = int(np.atleast_1d(z[f"{group}_step"])[0]) if f"{group}_step" in z else None
        for key in ("cls", "reg"):
            for level in range(5):
                golden_map = z[f"{group}_{key}_{level}"]
                n = step or round(maps[key][level].shape[-1] / golden_map.shape[-1])
                ours = maps[key][level].detach()
                ours = ours[:, :, ::n, ::n].numpy() if level == 0 else ours.numpy()
                assert np.abs(ours - golden_map).max() <= 5e-6 * golden_map.std(), (group, key, level)
    for key, terms in theirs[f"losses{suffix}"].items():
        variant, case = key.split("_")
        single = {k: [m.detach().float() for m in v] for k, v in s[0].items()}
        ours, targets = losses_and_gradients(student, single, torch.tensor(SIZES[variant]), *ground_truth(golden, case))
        flat = lambda maps: student.flatten({k: [m.float() for m in v] for k, v in maps.items()})
        ours.update(kd_losses(flat(cross), flat(t[0]), targets, student.kd_box, student.kd_cls_weight(targets), **kd_options(a)))
        for term, levels in terms.items():
            name = {"loss_cls_kd": "kd_cls", "loss_reg_kd": "kd_box", **NAME_OF}[term]
            assert float(ours[name]) == pytest.approx(sum(levels), rel=2e-6, abs=1e-7), (key, term)


@pytest.mark.parametrize("key", ["full_A", "own_B"])
def test_gradient_of_the_whole_crosskd_loss_equals_the_authors(golden, fill, pair, key, monkeypatch):
    student, teacher, s, t = pair
    variant, case = key.split("_")
    boxes, labels = ground_truth(golden, case)
    model = make_distiller(student, teacher, crosskd_args()).eval()
    for net, out in ((student, s), (teacher, t)):
        monkeypatch.setattr(net, "normalise", lambda x, sizes: x)  # the golden images are normalised already
        known = {((3,), False): out}
        monkeypatch.setattr(net, "forward", lambda x, keep, pre, known=known: known[keep, pre])
    batch = dict(images=images(fill).double(), sizes=torch.tensor(SIZES[variant]), boxes=boxes, labels=labels)
    theirs = json.loads((golden / "crosskd_gfl_r50_r18.json").read_text())["grad_norms"][key]
    assert check_gradients(student, sum(model(batch).values()), theirs, "gfl") == len(theirs)


# ------------------------------------------------------------------ Swin on small images, against plain steps

def layer_norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def shifted_attention(x, state, name, heads, shift):
    """Windows of 7 x 7 whose grid begins `shift` cells outside the map (1, H, W, C), one after the other; the
    map is padded with zeros to whole windows."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % 7, 0, -height % 7))
    out = torch.zeros_like(x)
    table = state[f"{name}.relative_position_bias_table"]
    for top, bottom in borders(x.shape[1], shift):
        for left, right in borders(x.shape[2], shift):
            place = torch.cartesian_prod(torch.arange(top, bottom), torch.arange(left, right))  # (T, 2)
            apart = place[:, None] - place[None] + 6
            bias = table[apart[..., 0] * 13 + apart[..., 1]].permute(2, 0, 1)            # (heads, T, T)
            window = x[0, top:bottom, left:right].flatten(0, 1)                          # (T, C)
            qkv = linear(window, state, f"{name}.qkv").unflatten(1, (3, heads, -1))
            q, k, v = qkv.permute(1, 2, 0, 3)                                            # (heads, T, d)
            weight = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5 + bias).softmax(2)
            mixed = linear((weight @ v).transpose(0, 1).flatten(1), state, f"{name}.proj")
            out[0, top:bottom, left:right] = mixed.unflatten(0, (bottom - top, -1))
    return out[:, :height, :width]


def borders(length, shift):
    cuts = sorted({0, length, *range(shift, length, 7)})
    return list(zip(cuts, cuts[1:]))


def plain_swin(state, image):
    """C3, C4, C5 of mmdetection's Swin-T from its own keys: no roll, no mask, no rule for small maps."""
    patches = F.conv2d(image, state["patch_embed.projection.weight"], state["patch_embed.projection.bias"], 4)
    x, maps = layer_norm(patches.permute(0, 2, 3, 1), state, "patch_embed.norm"), []
    for stage, (depth, heads) in enumerate(((2, 3), (2, 6), (6, 12), (2, 24))):
        for block in range(depth):
            name, shift = f"stages.{stage}.blocks.{block}", 3 * (block % 2)
            y = layer_norm(x, state, f"{name}.norm1")
            x = x + shifted_attention(y, state, f"{name}.attn.w_msa", heads, shift)
            y = linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.ffn.layers.0.0")
            x = x + linear(F.gelu(y), state, f"{name}.ffn.layers.1")
        if stage:
            maps.append(layer_norm(x, state, f"norm{stage}").permute(0, 3, 1, 2))
        if stage < 3:
            height, name = x.shape[1] // 2, f"stages.{stage}.downsample"
            patches = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)       # (1, cells, 4 C)
            patches = layer_norm(patches, state, f"{name}.norm")
            x = linear(patches, state, f"{name}.reduction").unflatten(1, (height, -1))
    return maps


def test_swin_at_224_x_288_equals_the_paper_where_torchvision_leaves_out_the_shift(golden, fill):
    keys = {k: v for k, v in mmdet_state(golden, "retinanet_swin-t").items() if k.startswith("backbone.")}
    state, image = fill.fill(keys), fill.image(224, 288, 1).double()
    body = crosskd.make_body("swint")[0].eval()
    load_strict(body, {k.removeprefix("body."): v for k, v in from_mmdet(state).items()}, "swin")
    body.double()
    with torch.no_grad():
        ours = list(body(image).values())
        doubles = {k.removeprefix("backbone."): v.double() for k, v in state.items()}
        paper = plain_swin(doubles, image)
        for module in body.modules():
            if isinstance(module, ShiftedWindowAttention):
                module.__class__ = ShiftedWindowAttention
        without = list(body(image).values())
    assert [m.shape[2:] for m in ours] == [(28, 36), (14, 18), (7, 9)]
    for ours_, paper_ in zip(ours, paper):
        assert (ours_ - paper_).abs().max() <= 1e-11 * paper_.std()
    # the rule that was silent: 7 rows are one window
    assert (without[2] - paper[2]).abs().mean() > 0.05 * paper[2].std()
