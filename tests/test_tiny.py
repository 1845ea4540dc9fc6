# SPDX-License-Identifier: MIT
"""common/tiny.py: the tiny backbone; the tiny CLIP, its data, loss and cache, two runs at once."""
import ast
import fcntl
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import run, tiny
from common.clip import FrozenCLIP, load_clip
from common.run import UserError
from common.shapes import BASE, make_shapes
from common.tiny import (COLOURS, TINY, WIDTHS, NarrowResNet, TinyTower, coloured, contrastive, draw_batch,
                         read_objects, tiny_clip, tiny_model, tiny_width)

SMALL = dict(steps=2, objects=6, scenes=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=24, val=12)


# ------------------------------------------------------------------ the tiny backbone

def test_names_of_tiny_backbones():
    assert [tiny_width(f"tiny{w}") for w in WIDTHS] == [8, 16, 24, 32, 48, 64]
    others = ("r50", "tiny", "tiny0", "tiny12", "tiny128", "tiny 16", "tiny16x", "Tiny16",
              "tiny-16", "tiny16\n", "tiny٨")
    assert [tiny_width(name) for name in others] == [None] * len(others)


@pytest.mark.parametrize("width", WIDTHS)
def test_narrow_resnet_has_strides_and_channels_of_a_resnet(width):
    net = NarrowResNet(width)
    x = net.maxpool(net.relu(net.bn1(net.conv1(torch.zeros(1, 3, 64, 96)))))
    shapes = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(width * 2**i, 16 >> i, 24 >> i) for i in range(4)]
    assert net.inplanes == 8 * width
    norms = [m for m in net.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))]
    assert all(isinstance(m, nn.GroupNorm) and m.num_channels // m.num_groups == 8 for m in norms)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 12  # 1 + 4 * 2, and three shortcuts


def test_narrow_resnet_depends_on_the_seed_alone():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(NarrowResNet(8).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


def test_the_backbone_needs_no_open_clip():
    """A script without CLIP is copied without it."""
    code = ast.parse(open(tiny.__file__, encoding="utf-8").read())
    names = []
    for node in code.body:
        if isinstance(node, ast.Import):
            names += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    assert "torchvision" in names and "run" in names and not {"open_clip", "clip"} & set(names)


# ------------------------------------------------------------------ the trained backbone

FEW = dict(steps=3, batch=2)


@pytest.fixture
def few_scenes(monkeypatch, tmp_path):
    draw = tiny.draw_scenes
    monkeypatch.setattr(tiny, "draw_scenes", lambda seed, count: draw(seed, 4))
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path))
    monkeypatch.delenv("DETECTION_RETRAIN", raising=False)


def test_scenes_hold_base_objects_alone_and_their_labels():
    images, boxes, shape, colour = tiny.draw_scenes(3, 6)
    assert images.shape == (6, 3, 128, 128) and images.dtype == torch.uint8
    there = shape >= 0
    assert there.any(1).all() and shape.max() < len(BASE) and colour.max() < len(COLOURS)
    assert (boxes[there][:, 2:] > boxes[there][:, :2]).all() and boxes[there].min() >= 0 and boxes.max() <= 128
    again = tiny.draw_scenes(3, 6)
    assert all(torch.equal(a, b) for a, b in zip((images, boxes, shape, colour), again))
    assert not torch.equal(images, tiny.draw_scenes(4, 6)[0])


def test_classifier_reads_each_object_at_its_own_anchors():
    torch.manual_seed(0)
    model = tiny.Classifier("tiny8", 12, 8)
    boxes = torch.tensor([[[8.0, 8, 40, 40], [80, 80, 120, 120]], [[30, 60, 70, 110], [-1, -1, -1, -1]]])
    valid = torch.tensor([[True, True], [True, False]])
    shape, colour, owner = model(torch.randn(2, 3, 128, 128), boxes, valid)
    assert shape.shape == (len(owner), 12) and colour.shape == (len(owner), 8)
    assert set(owner.tolist()) == {0, 1, 2}  # box 3 is none


def test_backbone_is_cached_by_recipe_and_loads(few_scenes, tmp_path, capsys):
    path = tiny.shapes_backbone("tiny8", 5, **FEW)
    assert "of the 12 shapes" in capsys.readouterr().out
    assert tiny.shapes_backbone("tiny8", 5, **FEW) == path and not capsys.readouterr().out
    assert tiny.shapes_backbone("tiny8", 6, **FEW) != path
    saved = torch.load(path, weights_only=True)
    net = tiny.tiny_resnet("tiny8", path)
    assert all(torch.equal(v, saved["model"][k]) for k, v in net.state_dict().items())
    with pytest.raises(UserError, match="does not fit"):
        tiny.tiny_resnet("tiny16", path)
    with pytest.raises(UserError, match="no ImageNet weights"):
        tiny.tiny_resnet("tiny16", "imagenet")
    with pytest.raises(UserError, match="not of r50"):
        tiny.shapes_backbone("r50")


def test_shipped_file_comes_back_and_retrain_does_without_it(few_scenes, tmp_path, monkeypatch, capsys):
    path = Path(tiny.shapes_backbone("tiny8", 5, **FEW))
    content = {k: v for k, v in torch.load(path, weights_only=True).items() if k not in ("format", "checksum")}
    monkeypatch.setattr(tiny, "SHIPPED", tmp_path / "shipped")
    tiny.pack(content, tmp_path / "shipped" / f"{path.stem}.xz")
    assert (tmp_path / "shipped" / f"{path.stem}.xz").stat().st_size < path.stat().st_size / 5
    path.unlink()
    capsys.readouterr()
    assert Path(tiny.shapes_backbone("tiny8", 5, **FEW)) == path and not capsys.readouterr().out  # not trained
    back = run.load_checkpoint(path)
    for part in ("model", "fpn"):
        for k, v in content[part].items():
            most = v.flatten(1).abs().amax(1) / 30 * 1.001 if v.ndim > 1 else v.abs() * 1e-3
            wrong = (back[part][k] - v).abs()
            assert ((wrong.flatten(1).amax(1) if v.ndim > 1 else wrong) <= most + 1e-5).all(), k
    assert back["accuracy"] == content["accuracy"]
    monkeypatch.setenv("DETECTION_RETRAIN", "1")
    monkeypatch.setattr(run, "STARTED", path.stat().st_mtime + 1)  # the file is of an earlier run
    tiny.shapes_backbone("tiny8", 5, **FEW)
    assert "of the 12 shapes" in capsys.readouterr().out
    assert torch.equal(run.load_checkpoint(path)["model"]["conv1.weight"], content["model"]["conv1.weight"])


def test_a_detector_is_shipped_or_else_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr("common.shapes.make_shapes", lambda seed: tmp_path / ("shapes" + f"-s{seed}" * (seed > 0)))
    monkeypatch.setattr(tiny, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("DETECTION_RETRAIN", raising=False)
    tiny.pack(dict(script="x.py", model=dict(w=torch.ones(2, 3))), tmp_path / "shipped/x-net-shapes.xz")

    def train(out):
        Path(out).mkdir(parents=True)
        torch.save("trained", Path(out) / "best.pt")

    ready = tiny.trained_before("x-net", 0, 0, train)
    content = run.load_checkpoint(ready)
    assert content["script"] == "x.py" and torch.allclose(content["model"]["w"], torch.ones(2, 3), atol=1e-3)
    other = tiny.trained_before("x-net", 1, 0, train)
    assert torch.load(other) == "trained" and Path(other).parent.name == "x-net-shapes-s1"
    assert tiny.trained_before("x-net", 1, 0, lambda out: 1 / 0) == other
    monkeypatch.setenv("DETECTION_RETRAIN", "1")
    monkeypatch.setattr(run, "STARTED", Path(ready).stat().st_mtime + 1)
    tiny.trained_before("x-net", 0, 0, train)
    assert torch.load(ready) == "trained"


def test_what_is_shipped_is_what_ship_says_and_small(tmp_path):
    import ship
    files = {p.stem: p for p in (Path(tiny.__file__).parent / "shipped").glob("*")}
    assert set(files) == set(ship.SHIPPED) and sum(p.stat().st_size for p in files.values()) < 3e6
    for name, (digest, before, _) in ship.SHIPPED.items():
        assert ship.digest(name) == digest
        content = tiny.shipped(name)
        if "accuracy" in content:
            assert all(abs(content["accuracy"][k] - v) < 0.06 for k, v in before.items())
        else:  # its script loads it
            script = importlib.import_module(name.split("-")[0])
            run.save_checkpoint(content, tmp_path / "best.pt")
            model, classes = script.load(str(tmp_path / "best.pt"))
            assert set(classes) >= set(BASE) and sum(p.numel() for p in model.parameters()) > 500_000


def test_pack_keeps_the_rows_that_were_trained(tmp_path, monkeypatch):
    table = torch.randn(10, 4)
    rows = torch.tensor([2, 7])
    monkeypatch.setattr(tiny, "SHIPPED", tmp_path)
    monkeypatch.delenv("DETECTION_RETRAIN", raising=False)
    tiny.pack(dict(id="x", model=dict(t=table, b=torch.arange(3.0))), tmp_path / "clip.xz", dict(t=rows))
    back = tiny.shipped("clip")
    assert back["id"] == "x" and torch.equal(back["model"]["b"], torch.arange(3.0))
    assert back["model"]["t"].shape == (10, 4)
    torch.testing.assert_close(back["model"]["t"][rows], table[rows], atol=table.abs().max().item() / 30 + 1e-6, rtol=0)
    assert back["model"]["t"][0].abs().max() < 0.1
    assert tiny.shipped("another") is None


def test_pack_keeps_a_matrix_by_its_largest_directions(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "SHIPPED", tmp_path)
    monkeypatch.delenv("DETECTION_RETRAIN", raising=False)
    matrix = torch.randn(20, 3) @ torch.randn(3, 400)
    noisy = matrix + 0.001 * torch.randn(20, 400)
    tiny.pack(dict(model=dict(m=noisy, b=torch.arange(3.0))), tmp_path / "net.xz", levels=255, ranks=dict(m=3))
    back = tiny.shipped("net")["model"]
    assert back["m"].shape == matrix.shape and torch.equal(back["b"], torch.arange(3.0))
    torch.testing.assert_close(back["m"], matrix, atol=0.02 * matrix.abs().max().item(), rtol=0)
    assert (tmp_path / "net.xz").stat().st_size < 2000 < 20 * 400


# ------------------------------------------------------------------ the tiny CLIP's networks

@pytest.mark.parametrize("dim, size, width", [(64, 48, 16), (32, 32, 8)])
def test_tower_maps_crops_to_rows(dim, size, width):
    tower = TinyTower(dim, size, width).eval()
    assert tower(torch.zeros(2, 3, size, size)).shape == (2, dim) and tower.image_size == size


def test_tiny_clip_has_three_and_a_half_million_parameters():
    model = tiny_model(**TINY)
    assert 3.4e6 < sum(p.numel() for p in model.parameters()) < 3.6e6
    assert model.context_length == 32 and model.visual.image_size == 48


def test_contrastive_loss_by_hand():
    eye = torch.eye(8)
    one = torch.ones(8, 1)
    assert contrastive(one, one, eye, 1.0).item() == pytest.approx(math.log(8), abs=1e-5)
    far = math.log(1 + 7 * math.exp(-10))
    assert contrastive(eye, eye, eye, 10.0).item() == pytest.approx(far, abs=1e-6)
    same = torch.ones(2, 2)  # two pairs that mean the same: the entropy of the target alone is left
    two = torch.ones(2, 1)
    assert contrastive(two, two, same, 5.0).item() == pytest.approx(math.log(2), abs=1e-6)


# ------------------------------------------------------------------ what it learns from

def test_objects_and_captions_by_hand(tmp_path):
    """Colours of captions: of a circle that is alone in its image, or nobody's."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    for name, (w, h), grey in (("a.png", (10, 6), 9), ("b.png", (4, 8), 200)):
        Image.fromarray(np.full((h, w, 3), grey, np.uint8)).save(tmp_path / "val" / name)
    image = lambda i, name, w, h: dict(id=i, file_name=name, width=w, height=h)
    box = lambda i, c, crowd=0: dict(image_id=i, category_id=c, bbox=[1, 2, 3, 4], iscrowd=crowd)
    instances = dict(images=[image(7, "a.png", 10, 6), image(3, "b.png", 4, 8)],
                     categories=[dict(id=1, name="circle"), dict(id=5, name="red star")],
                     annotations=[box(7, 1), box(3, 1), box(3, 1), box(3, 5), box(7, 5, crowd=1)])
    captions = dict(annotations=[dict(image_id=7, caption="A Blue circle, größer."),
                                 dict(image_id=3, caption="a green circle and a red circle")])
    for kind, content in (("instances", instances), ("captions", captions)):
        text = json.dumps(content, ensure_ascii=False)
        (tmp_path / f"annotations/{kind}_val.json").write_text(text, encoding="utf-8")
    data = read_objects(tmp_path, "val")
    assert data["images"].shape == (2, 3, 8, 10) and data["images"][0, 0, 5, 9] == 9
    assert data["images"][0, :, 6:].max() == 0 and data["images"][1, 0, 7, 3] == 200
    assert data["sizes"].tolist() == [[10, 6], [4, 8]] and data["owner"].tolist() == [0, 1, 1, 1]
    assert data["boxes"].tolist() == [[1, 2, 4, 6]] * 4
    circle = ("circle", None)
    assert data["words"] == [("circle", "blue"), circle, circle, ("star", "red")]
    assert data["names"] == ["circle", "circle", "circle", "red star"]
    assert data["content"] == [{"circle", "red star"}] * 2
    assert data["captions"][0] == ["A Blue circle, größer."]
    assert coloured("red star") and not coloured("circle")


def test_a_batch_pairs_each_crop_with_a_text_that_is_true_of_it(root):
    data = read_objects(root, "train2017")
    shown = []

    def pixels_of(boxes, owner):
        shown.append((boxes, owner))
        return torch.arange(len(boxes) * 3 * 4.0).view(-1, 3, 2, 2)

    even = torch.ones(len(data["names"]))
    rng = torch.Generator().manual_seed(0)
    pixels, texts, same = draw_batch(data, pixels_of, even, 40, 5, rng)
    boxes, owner = shown[0]
    assert len(boxes) == len(owner) == len(texts) == len(pixels) == 45 and same.shape == (45, 45)
    assert same.diagonal().eq(1).all() and set(same.unique().tolist()) <= {0, 1}
    assert torch.equal(boxes[40:, 2:], data["sizes"][owner[40:]] - 1.0)  # whole images
    for text, image in zip(texts[40:], owner[40:].tolist()):
        assert text in data["captions"][image]
    assert all(t.startswith("a photo of a ") for t in texts[:40])
    for i in range(40):
        for j in range(40):
            named_alike = texts[i].split()[-1] == texts[j].split()[-1]
            assert not same[i, j] or named_alike
    again = draw_batch(data, pixels_of, even, 40, 5, torch.Generator().manual_seed(0))
    assert again[1] == texts and torch.equal(again[2], same)


# ------------------------------------------------------------------ training and caching it

def test_tiny_clip_is_reproducible_cached_and_leaves_the_random_stream_alone(
        root, tmp_path, capsys):
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    a = tiny_clip(root, tmp_path / "a", **SMALL)
    assert torch.equal(torch.rand(2), want)
    b = tiny_clip(root, tmp_path / "b", **SMALL)
    x, y = (torch.load(p, weights_only=True) for p in (a, b))
    assert all(torch.equal(x["model"][k], y["model"][k]) for k in x["model"])
    assert capsys.readouterr().out.count("zero-shot accuracy") == 2
    assert tiny_clip(root, tmp_path / "a", **SMALL) == a and not capsys.readouterr().out
    assert tiny_clip(root, tmp_path / "a", seed=1, **SMALL) != a
    assert run.LOCKS == {}
    clip = load_clip(a)
    assert isinstance(clip, FrozenCLIP) and clip.name == f"tiny-{x['id']}"
    assert clip.class_embeddings(["red star", "circle"]).shape == (2, 64)


def test_the_file_of_the_embedded_dataset_keeps_its_name(tmp_path):
    """What a laptop has trained before is found again: the name is a hash of the recipe."""
    (tmp_path / "tiny-clip-cd3c4507902a.pt").touch()
    found = tiny_clip("anywhere/shapes-1", tmp_path)
    assert found == str(tmp_path / "tiny-clip-cd3c4507902a.pt")


HOLD = """import fcntl, pathlib, sys, time
guard, made = map(pathlib.Path, sys.argv[1:])
guard.mkdir()
file = open(guard / ".lock", "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write('{"pid": 77, "host": "laptop"}')
file.flush()
print("held", flush=True)
time.sleep(1.5)
made.touch()
"""


def test_a_second_run_waits_for_the_first_to_train(root, tmp_path, capsys):
    name = tiny_clip(root, tmp_path / "name", **SMALL).rsplit("/", 1)[1]
    capsys.readouterr()
    (tmp_path / "clip").mkdir()
    made = tmp_path / "clip" / name
    other = subprocess.Popen([sys.executable, "-c", HOLD, made.with_name(f".{name}.making"), made],
                             stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert tiny_clip(root, tmp_path / "clip", **SMALL) == str(made)
    assert other.wait() == 0
    said = capsys.readouterr().out
    assert "waiting for process 77 on laptop" in said and "accuracy" not in said
    assert made.stat().st_size == 0 and run.LOCKS == {}  # nothing was trained here


@pytest.fixture(autouse=True)
def no_locks_of_other_tests(monkeypatch):
    monkeypatch.setattr(run, "LOCKS", {})


def test_a_training_that_fails_lets_the_next_one_in(tmp_path):
    with pytest.raises(OSError):
        tiny_clip(tmp_path / "no shapes", tmp_path, **SMALL)
    assert run.LOCKS == {}
    guard = next(tmp_path.glob(".tiny-clip-*.making"))
    with open(guard / ".lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "clip").write_text("a file")
    with pytest.raises(UserError, match="clip: cannot be made") as e:
        tiny_clip(tmp_path, tmp_path / "clip", **SMALL)
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------ detectors that start from the backbone

def test_detectors_start_from_the_backbone_and_keep_its_first_stage(quick_backbones):
    """hierkd.py also takes the FPN; what is frozen gets no gradient; dkdetr.py freezes nothing here."""
    import crosskd
    import dkdetr
    import hierkd
    import prototype_kd
    path = tiny.shapes_backbone("tiny8")
    saved = torch.load(path, weights_only=True)
    models = dict(crosskd=crosskd.GFL("tiny8", 3, 64, init=path).body.stages,
                  dkdetr=dkdetr.make_body("tiny8", path, "sync", 3)[0].stages,
                  hierkd=hierkd.make_body("tiny8", path)[0].stages,
                  prototype_kd=prototype_kd.new_detector("faster_tiny8", ["a"], path).backbone.body)
    for script, stages in models.items():
        for name, value in stages.state_dict().items():
            assert torch.equal(value, saved["model"][name]), (script, name)
        if script != "prototype_kd":  # freezes in make_pair
            learning = {name.split(".")[0] for name, p in stages.named_parameters() if p.requires_grad}
            first = {"conv1", "bn1", "layer1"} if script == "dkdetr" else set()
            assert learning == {"layer2", "layer3", "layer4"} | first, script
    assert all(p.requires_grad for p in crosskd.GFL("tiny8", 3, 64).body.parameters())
    detector = hierkd.OpenATSS("tiny8", None, 64, 64, init=path, depth=1, norm="place")
    before = {k: v.clone() for k, v in detector.fpn.state_dict().items()}
    tiny.load_fpn(detector.fpn, path)
    for name, value in detector.fpn.state_dict().items():
        assert torch.equal(value, saved["fpn"].get(name, before[name]))
    assert {k for k in before if k not in saved["fpn"]} == {f"extra_blocks.p{n}.{k}" for n in (6, 7)
                                                           for k in ("weight", "bias")}
