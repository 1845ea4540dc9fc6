# SPDX-License-Identifier: MIT
"""prototype_kd.py from its command line: real photographs and VOC's XML, two processes, kill and resume, the table, bad input."""
import json
import shutil
import signal
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

import common.shapes
import prototype_kd
from common.datasets import CocoDataset, VOC_CLASSES, find_coco
from common.evaluation import voc_evaluate
from common.run import UserError, load_checkpoint, save_checkpoint
from common.shapes import make_shapes
from conftest import SHARED, killed, launch


def run(*flags, **how):
    """The script; teachers of these tests are untrained."""
    untrained = "--teacher" in flags and flags[flags.index("--teacher") + 1] != "none"
    return launch("prototype_kd", [*flags, *["--no-teacher-check"] * untrained], **how)


TINY = ["--image-size", "96", "--workers", "0", "--log-every", "2"]
pytestmark = pytest.mark.usefixtures("quick")


def weights_of(model):
    """What a detector is, as plain values and tensors."""
    return dict(prototype_kd.plain_of(model), model=model.state_dict())


def losses(out):
    """{iteration: losses} of a log; refreshes without their seconds under "refresh"."""
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    table = {r["it"]: {k: v for k, v in r.items() if k not in ("data", "step", "mem", "seconds")} for r in rows if "loss" in r}
    return table, [{k: v for k, v in r.items() if k != "seconds"} for r in rows if "refresh" in r]


def detector(name, classes):
    """Untrained, but with scores that differ from class to class and box to box."""
    model = prototype_kd.new_detector(name, classes, "none")
    torch.nn.init.normal_((model.head.classification_head.cls_logits if name.startswith("retina") else model.roi_heads.box_predictor.cls_score).weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{(kind, "coco" | "voc"): (teacher, start)}: untrained detectors as checkpoints; what they know does not matter here."""
    folder, table = tmp_path_factory.mktemp("detectors"), {}
    names = dict(voc=VOC_CLASSES)
    if (SHARED / "data/coco_mini").exists():
        names["coco"] = CocoDataset(*find_coco(SHARED / "data/coco_mini", "val"), False).classes
    for data, classes in names.items():
        for kind in ("faster", "retina"):
            torch.manual_seed(3)
            for role, width in (("teacher", 16), ("start", 8)):
                torch.save(weights_of(detector(f"{kind}_tiny{width}", classes)), folder / f"{kind}-{data}-{role}.pt")
            table[kind, data] = folder / f"{kind}-{data}-teacher.pt", folder / f"{kind}-{data}-start.pt"
    return table


def subset(folder, source, train=None, val=None):
    """`source`, a COCO layout, with its first images only, in `folder`."""
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        raw = json.loads((source / f"annotations/instances_{split}2017.json").read_text())
        raw["images"] = raw["images"][:count]
        ids = {i["id"] for i in raw["images"]}
        raw["annotations"] = [a for a in raw["annotations"] if a["image_id"] in ids]
        (folder / f"{split}2017").symlink_to((source / f"{split}2017").resolve())
        (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(scope="module")
def coco_few(coco_mini, tmp_path_factory):
    """coco_mini with 12 photographs to validate on, where their AP does not matter."""
    return subset(tmp_path_factory.mktemp("few") / "data", coco_mini, val=12)


@pytest.fixture
def voc_mini():
    path = SHARED / "data" / "voc_mini"
    if not path.exists():
        pytest.skip(f"real photographs are not here: {path}")
    return ["--dataset", "voc", "--data", path, "--voc-train", "2007_train,2012_train", "--voc-val", "2007_val"]


def pair(made, kind, data):
    return ["--teacher", made[kind, data][0], "--init", made[kind, data][1]]


@pytest.mark.parametrize("kind", ["faster", "retina"])
def test_two_processes_distil_on_real_photographs_evaluate_and_predict(made, coco_mini, tmp_path, kind):
    data = subset(tmp_path / "data", coco_mini, val=24)
    out = tmp_path / "run"
    r = run("--data", data, *pair(made, kind, "coco"), "--batch-size", 4, "--max-iters", 6, "--refresh", 0.3, *TINY, "--log-every", 1, "--out", out, procs=2,
            torchrun=kind == "retina")
    assert "80 classes" in r.stdout and "batch 4 x 2 x 1 = 8" in r.stdout and "difference" in r.stdout and "preset paper" in r.stdout
    files = ["args.json", "best.pt", "curves.png", "detections.json", "last.pt", "log.jsonl", "results.json", "samples.jpg"]
    assert sorted(p.name for p in out.iterdir()) == sorted([*files, "control"]) and sorted(p.name for p in (out / "control").iterdir()) == files
    results, (table, refreshes) = json.loads((out / "results.json").read_text()), losses(out)
    assert results["images"] == 24 and len(results["classes"]) == 80
    assert [x["it"] for x in refreshes] == [1, 4] and refreshes[0]["kept"] == -1 and 0 <= refreshes[1]["kept"] <= 1  # 10 steps an epoch, 0.3 of them
    assert all(table[6][k] > 0 for k in ("global", "feat", "resp")) and 0 < table[6]["sigma"] <= 1
    control = losses(out / "control")[0]
    assert not {"global", "feat", "resp"} & set(control[6])
    assert all(control[1][k] == table[1][k] for k in control[1] if k not in ("loss", "lr"))  # the same images, flips and RoIs until the first step
    assert control[6]["cls"] != table[6]["cls"]
    run("--eval", out / "best.pt", "--data", data, *TINY[:4], "--out", tmp_path / "eval")
    again = json.loads((tmp_path / "eval/results.json").read_text())
    assert again["AP"] == pytest.approx(results["AP"], abs=1e-9) and again["AR100"] == pytest.approx(results["AR100"], abs=1e-9)
    photo = next((data / "val2017").iterdir())
    run("--predict", photo, "--weights", out / "best.pt", "--score", "0.0", "--out", tmp_path / "predict")
    (name, boxes), = json.loads((tmp_path / "predict/predictions.json").read_text()).items()
    assert Path(name) == photo and len(list((tmp_path / "predict").glob("*_boxes.jpg"))) == 1


def test_killed_run_resumes_bit_exactly_with_its_prototypes(made, coco_few, tmp_path):
    """Killed between two selections: the prototypes of the middle of a period are an earlier student's and come from last.pt."""
    flags = [str(x) for x in ("--data", coco_few, *pair(made, "faster", "coco"), "--batch-size", 4, "--max-iters", 14, "--refresh", 0.25, *TINY, "--log-every", 1,
                              "--save-every", 3, "--proto-max-images", 8, "--control", "none", "--no-teacher-check")]
    run(*flags, "--out", tmp_path / "whole")
    for number in (signal.SIGKILL, signal.SIGTERM):  # SIGTERM: the step that is under way is finished and saved
        out = tmp_path / number.name
        code, error = killed("prototype_kd", flags, out, number, '"it": 8')
        at = torch.load(out / "last.pt", weights_only=True)["it"]
        if number == signal.SIGKILL:
            assert 0 < at < 14
        else:
            assert code == 143 and 8 <= at < 14 and "Traceback" not in error
            assert f"stopped by SIGTERM at step {at}, {out / 'last.pt'} is written; continue: python prototype_kd.py" in error.splitlines()[-1]
        run("--resume", "--out", out)
        assert losses(out) == losses(tmp_path / "whole")
        a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (out, tmp_path / "whole"))
        assert all(torch.equal(a["model"][k], b["model"][k]) for k in b["model"]) and all(torch.equal(a["bank"][k], b["bank"][k]) for k in b["bank"])
        assert all(torch.equal(a["adapters"][k], b["adapters"][k]) for k in b["adapters"]) and len(b["adapters"]) == 10
        assert torch.equal(a["rng"][0]["torch"], b["rng"][0]["torch"]) and a["finished"] and b["finished"]
    assert "total batch of 4" in run("--resume", "--batch-size", 2, "--out", out, fail=True).stderr
    assert "--k 3: the run in" in run("--resume", "--k", 3, "--out", out, fail=True).stderr


def test_prototypes_are_the_same_for_one_and_three_processes(made, coco_few, tmp_path):
    """The first selection of a run, every bit of it; classes are shared out, images in blocks."""
    banks = []
    for procs in (1, 3):
        out = tmp_path / str(procs)
        run("--data", coco_few, *pair(made, "retina", "coco"), "--batch-size", 12 // procs, "--max-iters", 1, "--center", "--proto-max-images", 5, "--control", "none",
            *TINY, "--out", out, procs=procs)
        banks.append(torch.load(out / "last.pt", weights_only=True)["bank"])
    assert all(torch.equal(banks[0][k], banks[1][k]) for k in banks[0]) and banks[0]["valid"].any(-1).sum() > 100
    ids, valid = banks[0]["ids"], banks[0]["valid"]
    assert all(len(set(i[v].tolist())) == int(v.sum()) for i, v in zip(ids.flatten(0, 1), valid.flatten(0, 1)))  # distinct


def test_two_processes_have_the_losses_of_one(made, tmp_path):
    """RetinaNet samples nothing, so equal global batches give equal losses; Faster R-CNN draws RoIs in each process."""
    torch.manual_seed(0)
    data = subset(tmp_path / "data", make_shapes(), 300, 12)
    classes = CocoDataset(*find_coco(data, "val"), False).classes
    for role, width in (("t", 16), ("s", 8)):
        torch.save(weights_of(detector(f"retina_tiny{width}", classes)), tmp_path / f"{role}.pt")
    flags = ["--data", data, "--teacher", tmp_path / "t.pt", "--init", tmp_path / "s.pt", "--max-iters", 6, "--image-size", "96", "--workers", 0, "--log-every", 1,
             "--no-photometric", "--optimizer", "sgd", "--lr", "0.01", "--control", "none", "--proto-max-images", 20, "--bg-weight", "1"]
    run(*flags, "--batch-size", 4, "--out", tmp_path / "one")
    run(*flags, "--batch-size", 2, "--out", tmp_path / "two", procs=2)
    one, two = losses(tmp_path / "one")[0], losses(tmp_path / "two")[0]
    assert len(one) == 6 and all(one[1][k] > 0 for k in ("global", "feat", "resp")), one[1]
    for it in one:
        for k in set(one[it]) - {"sigma", "muted"}:  # logged as the mean of the processes' means
            assert two[it][k] == pytest.approx(one[it][k], rel=1e-4, abs=2e-6), (it, k)


@pytest.mark.parametrize("kind", ["faster", "retina"])
def test_voc_trains_in_two_processes_and_its_ap_is_what_a_slow_count_says(made, voc_mini, tmp_path, kind):
    """XML with difficult flags, photometric distortion; 11-point and area AP50 from the written detections and the files, to 1e-6."""
    out = tmp_path / "run"
    r = run(*voc_mini, *pair(made, kind, "voc"), "--batch-size", 4, "--max-iters", 4, "--lr", "0.05", *TINY, "--out", out, procs=2)
    assert "VOC11" in r.stdout and "difference" in r.stdout
    results = json.loads((out / "results.json").read_text())
    # detections that find something: true boxes, moved, with some wrong ones; scored by the script's own function and by loops
    truth = prototype_kd.make_data(prototype_kd.parse_args([*map(str, voc_mini), "--image-size", "96"]), "val").truth()
    g = torch.Generator().manual_seed(0)
    found = json.loads((out / "detections.json").read_text())
    for a in truth["annotations"]:
        for shift in (0.02, 0.3):
            x, y, w, h = a["bbox"]
            found.append(dict(image_id=a["image_id"], category_id=a["category_id"], bbox=[x + shift * w, y, w, h], score=torch.rand(1, generator=g).item()))
    voc = voc_evaluate(truth, found)
    slow = slow_voc(voc_mini[3], truth, found)
    assert voc["AP11"] == pytest.approx(slow[0], abs=1e-6) and voc["AP"] == pytest.approx(slow[1], abs=1e-6) and 20 < voc["AP"] < 100
    own = slow_voc(voc_mini[3], truth, json.loads((out / "detections.json").read_text()))
    assert results["VOC11"] == pytest.approx(own[0], abs=1e-6) and results["VOCarea"] == pytest.approx(own[1], abs=1e-6)


def slow_voc(root, truth, found):
    """VOC AP50 in percent, 11-point and area, straight from the XML files, detection by detection."""
    eleven, area = [], []
    for name in VOC_CLASSES:
        objects = {}
        for image in truth["images"]:
            for o in ET.parse(root / "VOCdevkit" / image["file_name"].replace("JPEGImages", "Annotations").replace(".jpg", ".xml")).getroot().iter("object"):
                if o.find("name").text == name:
                    x1, y1, x2, y2 = (float(o.find(f"bndbox/{k}").text) for k in ("xmin", "ymin", "xmax", "ymax"))
                    objects.setdefault(image["id"], []).append([x1 - 1, y1 - 1, x2, y2, int(o.findtext("difficult") or 0), False])
        total = sum(o[4] == 0 for many in objects.values() for o in many)
        if not total:
            continue
        tp = fp = 0
        points = [(0.0, 1.0)]
        for d in sorted((d for d in found if d["category_id"] == VOC_CLASSES.index(name) + 1), key=lambda d: -d["score"]):
            x, y, w, h = d["bbox"]
            best, which = 0.0, None
            for o in objects.get(d["image_id"], []):
                iw, ih = max(0.0, min(o[2], x + w) - max(o[0], x)), max(0.0, min(o[3], y + h) - max(o[1], y))
                iou = iw * ih / ((o[2] - o[0]) * (o[3] - o[1]) + w * h - iw * ih)
                if iou > best:
                    best, which = iou, o
            if best >= 0.5 and which[4]:
                continue
            if best >= 0.5 and not which[5]:
                which[5], tp = True, tp + 1
            else:
                fp += 1
            points.append((tp / total, tp / (tp + fp)))
        eleven.append(sum(max([p for r, p in points[1:] if r >= t / 10 - 1e-12], default=0.0) for t in range(11)) / 11)
        area.append(sum((points[i][0] - points[i - 1][0]) * max(p for _, p in points[i:]) for i in range(1, len(points))))
    return 100 * sum(eleven) / len(eleven), 100 * sum(area) / len(area)


def test_a_class_that_is_only_difficult_and_prototypes_of_large_objects_only(made, voc_mini, tmp_path):
    """No prototype for such a class: sigma 1, no global term, one line; the run goes on."""
    devkit = tmp_path / "data/VOCdevkit"
    shutil.copytree(voc_mini[3] / "VOCdevkit", devkit)
    for path in devkit.glob("VOC20*/Annotations/*.xml"):
        tree = ET.parse(path)
        for o in tree.getroot().iter("object"):
            if o.find("name").text == "person":
                o.find("difficult").text = "1"
        tree.write(path)
    flags = [*voc_mini[:3], tmp_path / "data", *voc_mini[4:], *pair(made, "faster", "voc"), "--batch-size", 4, "--max-iters", 2, *TINY, "--control", "none"]
    r = run(*flags, "--proto-min-size", 20, "--out", tmp_path / "run")
    bank = torch.load(tmp_path / "run/last.pt", weights_only=True)["bank"]
    count = bank["valid"][:, 0].sum(1)
    assert count[VOC_CLASSES.index("person")] == 0 and "person" in r.stdout and "no prototype for" in r.stdout
    assert [bool(n) for n in count.tolist()].count(True) > 5 and losses(tmp_path / "run")[0][2]["global"] > 0
    r = run(*flags, "--proto-min-size", 5000, "--out", tmp_path / "none", fail=True)
    assert "no image holds an object to make them of; lower --proto-min-size" in r.stderr


def test_a_run_killed_in_its_control_resumes_with_its_flags(made, coco_few, tmp_path):
    """last.pt of the run is not there yet; its flags are in args.json."""
    teacher, start = made["retina", "coco"][0], shutil.copy(made["retina", "coco"][1], tmp_path / "start.pt")
    flags = [*map(str, ("--data", coco_few, "--teacher", teacher, "--init", start, "--batch-size", 8, "--max-iters", 2, *TINY, "--epochs", 12, "--seed", 5))]
    real = prototype_kd.evaluate

    def killed(*a, **how):  # in the evaluation that ends the control: its results.json is not there, its last.pt says that it is due
        raise UserError("killed")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(prototype_kd, "evaluate", lambda *a, **how: real(*a, **how) if "most" in how else killed())
        run(*flags, "--out", tmp_path / "run", fail=True)
    assert not (tmp_path / "run/last.pt").exists() and not torch.load(tmp_path / "run/control/last.pt", weights_only=True)["finished"]
    r = run(*flags, "--control", tmp_path / "run/control", "--out", tmp_path / "other", fail=True)
    assert "that run is not finished; --resume it first" in r.stderr
    (tmp_path / "run/control/results.json").write_text('{"AP": 12')  # as if somebody had cut it: it is not taken for a result
    changed = tmp_path / "changed"
    shutil.copytree(tmp_path / "run", changed)
    r = run("--resume", "--lr", 0.003, "--out", changed)
    assert "has trained with --lr 0.01 so far, the distilled run goes on with 0.003" in r.stderr and "no result" not in r.stdout
    state = {k: v for k, v in load_checkpoint(changed / "control/last.pt").items() if k not in ("format", "checksum")}
    assert state["judge"] and state["seen"]
    save_checkpoint(state | dict(judge=1, seen=[2]), changed / "control/last.pt")  # as if of other images under the same names
    r = run(*flags, "--lr", 0.003, "--control", changed / "control", "--out", tmp_path / "apart")
    assert all(f"control was {what} on other images or boxes; the difference is no result" in r.stdout for what in ("trained", "evaluated"))
    r = run("--resume", "--epochs", 12, "--out", tmp_path / "run")
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["args"]
    assert "difference" in r.stdout and saved["seed"] == 5 and saved["epochs"] == 12 and saved["max_iters"] == 2
    other = load_checkpoint(start)  # a student that was trained anew at the same place
    next(v for v in other["model"].values() if v.is_floating_point())[0] += 1e-3
    save_checkpoint({k: v for k, v in other.items() if k not in ("format", "checksum")}, start)
    r = run(*flags, "--control", tmp_path / "run/control", "--out", tmp_path / "third", fail=True)
    assert "did not begin with the weights that --init" in r.stderr
    r = run("--resume", "--max-iters", 3, "--out", tmp_path / "run")  # the control goes on, too
    assert "difference" in r.stdout and all(max(losses(tmp_path / f"run{folder}")[0]) == 3 for folder in ("", "/control"))
    r = run("--resume", "--preset", "released", "--out", tmp_path / "run", fail=True)
    assert "--preset released: the run in" in r.stderr and "has paper, which --resume keeps" in r.stderr


def test_a_process_without_objects_trains_on(made, coco_mini, tmp_path):
    """Two photographs, one with a crowd only: at batch 1 one of two processes has neither objects nor positives; H and all collectives are reached all the same."""
    raw = json.loads((coco_mini / "annotations/instances_train2017.json").read_text())
    raw["images"] = raw["images"][:2]
    ids = [i["id"] for i in raw["images"]]
    raw["annotations"] = [a for a in raw["annotations"] if a["image_id"] == ids[0] and not a["iscrowd"]] + [
        dict(id=10**9, image_id=ids[1], category_id=1, bbox=[5, 5, 50, 50], area=2500, iscrowd=1, segmentation=dict(counts=[], size=[1, 1]))]
    assert len(raw["annotations"]) > 1
    (tmp_path / "data/annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"data/{split}2017").symlink_to(coco_mini / "train2017")
        (tmp_path / f"data/annotations/instances_{split}2017.json").write_text(json.dumps(raw))
    r = run("--data", tmp_path / "data", *pair(made, "faster", "coco"), "--batch-size", 1, "--max-iters", 3, *TINY, "--control", "none", "--out", tmp_path / "run", procs=2)
    table = losses(tmp_path / "run")[0]
    assert table[3]["feat"] > 0 and "no prototype for" in r.stdout


def test_table_of_shapes_and_a_control_that_does_not_fit(tmp_path, monkeypatch, request):
    """teacher, start, continued, distilled; run again it reuses all; --control of another seed is refused by name."""
    real = make_shapes()
    request.getfixturevalue("quick_backbones")  # after the real pictures were found
    subset(tmp_path / "data" / real.name, real, val=24)
    monkeypatch.setattr(common.shapes, "make_shapes", lambda seed=0: tmp_path / "data" / real.name)
    parse = prototype_kd.parse_args
    monkeypatch.setattr(prototype_kd, "parse_args", lambda argv=None: parse([*(argv if argv is not None else sys.argv[1:]), "--max-iters", "2"]))
    flags = ["--data", "shapes", "--table", "--student", "retina_tiny8", "--workers", 0, "--proto-max-images", 5, "--no-teacher-check"]
    r = run(*flags, "--out", tmp_path / "out")
    rows = r.stdout[r.stdout.index("shapes, 24 validation"):].splitlines()
    assert [x.split("  ")[0].strip() for x in rows[1:5]] == ["teacher retina_tiny32", "student retina_tiny8", "student continued", "student distilled"]
    assert "difference" in r.stdout
    weights = {k: torch.load(tmp_path / path, weights_only=True)["model"] for k, path in dict(
        teacher="data/teachers/prototype_kd-retina_tiny32-e8-r2-shapes-1/last.pt", start="data/teachers/prototype_kd-retina_tiny8-e20-r2-shapes-1/last.pt",
        distilled="out/distilled/last.pt").items()}
    for k, name in (("teacher", "tiny32"), ("start", "tiny8"), ("distilled", "tiny8")):
        backbone = torch.load(next((tmp_path / "cache/clip").glob(f"backbone-{name}-*.pt")), weights_only=True)["model"]
        first = {n: v for n, v in backbone.items() if n.startswith(("conv1", "bn1", "layer1"))}
        assert len(first) > 5 and all(torch.equal(weights[k][f"backbone.body.{n}"], v) for n, v in first.items())
        assert not torch.equal(weights[k]["backbone.body.layer2.0.conv1.weight"], backbone["layer2.0.conv1.weight"])
    again = run(*flags, "--out", tmp_path / "out", "--resume")
    assert [x.split()[:5] for x in again.stdout[again.stdout.index("shapes, 24 validation"):].splitlines()[1:5]] == [x.split()[:5] for x in rows[1:5]]
    teacher = tmp_path / "data/teachers/prototype_kd-retina_tiny32-e8-r2-shapes-1/best.pt"
    start = tmp_path / "data/teachers/prototype_kd-retina_tiny8-e20-r2-shapes-1/best.pt"
    r = run("--data", "shapes", "--teacher", teacher, "--init", start, "--seed", 4, "--workers", 0, "--control", tmp_path / "out/continued", "--out", tmp_path / "other", fail=True)
    assert "its seed is 0, here 4" in r.stderr
    (tmp_path / "best").mkdir()
    shutil.copy(tmp_path / "out/continued/best.pt", tmp_path / "best/last.pt")
    r = run("--data", "shapes", "--teacher", teacher, "--init", start, "--workers", 0, "--control", tmp_path / "best", "--out", tmp_path / "other2", fail=True)
    assert "its last.pt holds no training state" in r.stderr


def test_wrong_inputs_end_with_one_line(made, coco_mini, voc_mini, tmp_path):
    few = [*TINY, "--max-iters", 1, "--control", "none"]
    nan = torch.load(made["faster", "coco"][0], weights_only=True)
    nan["model"]["backbone.fpn.inner_blocks.0.0.weight"].fill_(float("nan"))
    torch.save(nan, tmp_path / "nan.pt")
    other = torch.load(made["faster", "coco"][0], weights_only=True)
    other["arch"]["classes"] = ["person", "wheel", *other["arch"]["classes"][2:]]
    torch.save(other, tmp_path / "other.pt")
    torch.save(dict(arch=dict(kind="gfl"), model={}), tmp_path / "foreign.pt")
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), tmp_path / "mm.pt")
    short = torch.load(made["faster", "coco"][0], weights_only=True)
    del short["model"]["rpn.head.cls_logits.bias"]
    torch.save(short, tmp_path / "short.pt")
    torch.save(dict(arch=dict(kind="gfl", p6="on_input"), model={}), tmp_path / "crosskd.pt")
    coco, teacher, start = ["--data", coco_mini], *made["faster", "coco"]
    for n, (flags, words) in enumerate((
            ([*coco, "--teacher", tmp_path / "nan.pt", "--init", start], "backbone.fpn.inner_blocks.0.0.weight is not finite"),
            ([*coco, "--teacher", teacher, "--init", tmp_path / "nan.pt"], "backbone.fpn.inner_blocks.0.0.weight is not finite"),
            ([*coco, "--teacher", tmp_path / "other.pt", "--init", start], "its class 1 is 'wheel', --data has 'bicycle'"),
            ([*coco, "--teacher", made["faster", "voc"][0], "--init", start], "has 20 classes, --data has 80"),
            ([*coco, "--teacher", made["retina", "coco"][0], "--init", start], "they must be of one kind"),
            ([*coco, "--teacher", tmp_path / "foreign.pt", "--init", start], "does not describe a network of this script"),
            ([*coco, "--teacher", tmp_path / "crosskd.pt", "--init", start], "is a checkpoint of crosskd.py, not of prototype_kd.py"),
            ([*coco, "--teacher", tmp_path / "mm.pt", "--init", start], "neither a checkpoint of this script nor mmdetection's"),
            ([*coco, "--teacher", tmp_path / "short.pt", "--init", start], "1 missing (first rpn.head.cls_logits.bias)"),
            ([*coco, "--teacher", "gfl_r101", "--init", start], "neither a file nor one of faster_r101"),
            ([*coco, "--teacher", "none", "--init", "none", "--student", "yolo_r50"], "expected faster_ or retina_"),
            ([*coco, "--teacher", "none", "--init", "imagenet", "--student", "faster_tiny8"], "has no ImageNet weights"),
            ([*coco, "--teacher", teacher, "--init", start, "--control", tmp_path], "no last.pt there"),
            ([*coco, "--teacher", teacher, "--init", start, "--proto-min-size", 9999], "lower --proto-min-size"),
            (["--data", tmp_path, "--teacher", teacher, "--init", start], "is missing; COCO 2017 is at"),
            (["--data", tmp_path], "--data shapes needs nothing"), (["--data", tmp_path, "--dataset", "voc"], "--data shapes needs nothing"))):
        r = run(*flags, *(few if "--control" not in flags and "none" not in flags[:4] else few[:-2]), "--out", tmp_path / f"out{n}", fail=True)
        assert "prototype_kd.py: " in r.stderr and words in r.stderr and "Traceback" not in r.stderr, r.stderr[-500:]
    r = run("--predict", coco_mini / "annotations", "--weights", start, "--out", tmp_path / "p", fail=True)
    assert "no image there" in r.stderr


def test_fast_flags_run_together_and_keep_the_losses_close(made, coco_few, tmp_path):
    flags = ["--data", coco_few, *pair(made, "faster", "coco"), "--batch-size", 2, "--max-iters", 2, *TINY, "--log-every", 1, "--control", "none", "--proto-max-images", 2]
    run(*flags, "--out", tmp_path / "plain")
    run(*flags, "--amp", "bf16", "--out", tmp_path / "fast")
    a, b = losses(tmp_path / "plain")[0][1], losses(tmp_path / "fast")[0][1]
    assert b["feat"] == pytest.approx(a["feat"], rel=0.02) and b["rpn_cls"] == pytest.approx(a["rpn_cls"], rel=0.02)


def test_two_micro_batches_are_one_batch(tmp_path):
    """RetinaNet, whose loss is a mean over images, on images of one size (GroupNorm sees the padding): losses of the first step, and of the second, after it."""
    real, folder = make_shapes(), tmp_path / "data"
    raw = json.loads((real / "annotations/instances_train2017.json").read_text())
    raw["images"] = [i for i in raw["images"] if i["width"] > i["height"]][:8]
    raw["annotations"] = [a for a in raw["annotations"] if a["image_id"] in {i["id"] for i in raw["images"]}]
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}2017").symlink_to((real / "train2017").resolve())
        (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(raw))
    flags = ["--data", folder, "--image-size", "96", *TINY[2:4], "--log-every", 1, "--max-iters", 2, "--teacher", "none", "--init", "none",
             "--student", "retina_tiny8", "--optimizer", "sgd", "--lr", "0.01"]
    run(*flags, "--batch-size", 4, "--out", tmp_path / "one")
    run(*flags, "--batch-size", 2, "--accumulate", 2, "--out", tmp_path / "two")
    one, two = losses(tmp_path / "one")[0], losses(tmp_path / "two")[0]
    assert list(two) == [1, 2]
    for it in one:
        assert all(two[it][k] == pytest.approx(one[it][k], rel=1e-4) for k in ("loss", "cls", "box"))


def test_fast_flags_and_the_released_preset_run_with_accumulation(made, coco_few, tmp_path):
    run("--data", coco_few, *pair(made, "faster", "coco"), "--batch-size", 2, "--max-iters", 2, *TINY, "--log-every", 1, "--control", "none", "--proto-max-images", 2,
        "--accumulate", 2, "--amp", "bf16", "--preset", "released", "--proto-min-size", 0, "--out", tmp_path / "run")
    assert list(losses(tmp_path / "run")[0]) == [1, 2]


def test_own_data_without_a_validation_set_and_with_a_subset_of_classes(made, coco_mini, tmp_path):
    """Train on one's own json; val lists some of the classes only, in another order, with other ids. Without it a run trains and says so, without a control."""
    raw = json.loads((coco_mini / "annotations/instances_val2017.json").read_text())
    kept = {c["id"]: c for c in raw["categories"] if c["name"] in ("person", "car", "dog")}
    raw["annotations"] = [dict(a, category_id=100 - a["category_id"]) for a in raw["annotations"] if a["category_id"] in kept]
    raw["categories"] = [dict(c, id=100 - c["id"]) for c in kept.values()]
    raw["images"] = raw["images"][:10]
    raw["annotations"] = [a for a in raw["annotations"] if a["image_id"] in {i["id"] for i in raw["images"]}]
    (tmp_path / "val.json").write_text(json.dumps(raw))
    own = ["--train-json", coco_mini / "annotations/instances_train2017.json", "--train-images", coco_mini / "train2017"]
    few = [*pair(made, "retina", "coco"), "--batch-size", 4, "--max-iters", 2, *TINY, "--proto-max-images", 2, "--first-images", 20]
    r = run(*own, *few, "--out", tmp_path / "blind")
    assert "no validation set: no evaluation, best.pt is the last" in r.stdout and "teacher AP" not in r.stdout and "20 images" in r.stdout
    assert sorted(p.name for p in (tmp_path / "blind").iterdir()) == ["args.json", "best.pt", "last.pt", "log.jsonl"]  # one logged step: no curves
    best, last = (torch.load(tmp_path / f"blind/{name}.pt", weights_only=True)["model"] for name in ("best", "last"))
    assert all(torch.equal(best[k], last[k]) for k in last)
    r = run(*own, "--val-json", tmp_path / "val.json", "--val-images", coco_mini / "val2017", *few, "--control", "none", "--out", tmp_path / "run")
    assert "teacher AP" in r.stdout
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results["classes"]) == {"person", "car", "dog"} and results["images"] == 10 and (results["checkpoint"], results["epoch"]) == ("best.pt", 1)
    run("--eval", tmp_path / "run/best.pt", "--val-json", tmp_path / "val.json", "--val-images", coco_mini / "val2017", "--workers", 0, "--out", tmp_path / "eval")
    assert json.loads((tmp_path / "eval/results.json").read_text())["AP"] == pytest.approx(results["AP"], abs=1e-9)
    assert "its class 0" not in run(*own, *few, "--k", 0, "--out", tmp_path / "x", fail=True).stderr


def test_a_teacher_that_finds_nothing_stops_the_run_before_its_control(made, coco_few, tmp_path):
    torch.manual_seed(0)
    torch.save(weights_of(prototype_kd.new_detector("faster_tiny8", CocoDataset(*find_coco(coco_few, "val"), False).classes, "none")), tmp_path / "t.pt")
    flags = ["--data", coco_few, "--teacher", tmp_path / "t.pt", "--init", made["faster", "coco"][1], *TINY, "--max-iters", 1, "--out", tmp_path / "run"]
    r = launch("prototype_kd", flags, fail=True)
    assert "--no-teacher-check goes on" in r.stderr and "teacher AP 0.0 on 12 validation images" in r.stdout and not (tmp_path / "run/control").exists()


def test_predict_walks_folders_leaves_out_what_is_no_image_and_notes_boxes(made, coco_mini, tmp_path):
    """One picture a readable image; a second run removes what the first one left, and a training run's folder is never used."""
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    photos = sorted((coco_mini / "val2017").iterdir())[:2]
    shutil.copy(photos[0], folder / "a.jpg"), shutil.copy(photos[1], folder / "deeper/b.jpg")
    (folder / "broken.jpg").write_bytes(b"no picture"), (folder / ".hidden.jpg").write_bytes(b"")
    flags = ["--weights", made["retina", "coco"][1], "--image-size", 64, "--score", 0.0]
    r = run("--predict", folder, *flags, "--out", tmp_path / "out")
    answer = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [Path(p).name for p in answer] == ["a.jpg", "b.jpg"] and "left out: " in r.stderr and "broken.jpg" in r.stderr
    assert len(list((tmp_path / "out").glob("*_boxes.jpg"))) == 2
    for boxes in answer.values():
        assert boxes and all(set(b) == {"box", "score", "label"} and 0 < b["score"] <= 1 for b in boxes)
    run("--predict", folder / "a.jpg", *flags, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*_boxes.jpg"))) == 1
    (tmp_path / "out/log.jsonl").write_text("{}")
    assert "holds a training run" in run("--predict", folder / "a.jpg", *flags, "--out", tmp_path / "out", fail=True).stderr


def test_results_of_voc_are_the_last_checkpoints(made, voc_mini, tmp_path):
    """The test set must not choose the model that it measures: results.json is last.pt's, though best.pt is kept."""
    flags = [*voc_mini, *pair(made, "retina", "voc"), "--batch-size", 16, "--epochs", 2, "--max-iters", 2, "--eval-every", 1, *TINY, "--control", "none",
             "--proto-max-images", 2, "--first-images", 16]
    run(*flags, "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["checkpoint"], results["epoch"], results["it"]) == ("last.pt", 2, 2)
    assert {d["checkpoint"] for d in json.loads((tmp_path / "run/detections.json").read_text())} <= {"last.pt"}


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_trained(made, coco_few, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text('{"it": 1}\n')
    r = run("--data", coco_few, "--teacher", "faster_r101", "--out", tmp_path / "run", fail=True)  # which would be downloaded
    assert "--resume it, or delete it" in r.stderr and (tmp_path / "run/log.jsonl").read_text() == '{"it": 1}\n'


def test_an_exported_retinanet_gives_its_boxes_and_scores_and_a_faster_rcnn_is_refused(made, tmp_path):
    weights = made["retina", "voc"][1]
    r = run("--export", tmp_path / "s.pt2", "--weights", weights)
    assert "the same as in eager mode on other sizes" in r.stdout
    names = {"classes.json": ""}
    program = torch.export.load(tmp_path / "s.pt2", extra_files=names).module()
    assert json.loads(names["classes.json"]) == list(VOC_CLASSES)
    model, _ = prototype_kd.load(weights)
    images = torch.randint(0, 256, (2, 3, 192, 224), dtype=torch.uint8)
    boxes, scores, _, _ = program(images)
    batch = dict(images=images, sizes=torch.tensor([[192, 224]] * 2), image_sizes=[(192, 224)] * 2)
    with torch.no_grad():
        inputs = prototype_kd.images_of(batch)
        best = prototype_kd.detect(model, inputs, model.backbone(inputs.tensors))[0]
    assert boxes.shape[:2] == scores.shape[:2] and scores.shape[2] == 20
    assert scores[0].max().item() == pytest.approx(best["scores"][0].item(), rel=1e-5)
    at = scores[0].flatten().argmax() // 20
    limit = torch.tensor([224.0, 192, 224, 192])
    torch.testing.assert_close(boxes[0, at].clamp(min=0).minimum(limit), best["boxes"][0], rtol=1e-4, atol=1e-3)
    r = run("--export", tmp_path / "f.pt2", "--weights", made["faster", "voc"][1], fail=True)
    assert "--export: writes RetinaNet only" in r.stderr and not (tmp_path / "f.pt2").exists()


def test_a_best_pt_that_vocs_test_set_chose_is_said(made, voc_mini, tmp_path):
    shutil.copy(made["retina", "voc"][0], tmp_path / "best.pt")
    shutil.copy(made["retina", "voc"][1], tmp_path / "last.pt")
    flags = ["--batch-size", 16, "--max-iters", 1, *TINY, "--control", "none", "--proto-max-images", 2, "--first-images", 16]
    r = run(*voc_mini, "--teacher", tmp_path / "best.pt", "--init", tmp_path / "last.pt", *flags, "--out", tmp_path / "run")
    assert r.stdout.count("was chosen on VOC's test set; last.pt was not") == 1


def test_own_classes_of_a_coco_layout_are_told_before_the_download(tmp_path, monkeypatch):
    """shapes as --data: without --init, where COCO's detector would be downloaded and then refused."""
    monkeypatch.setattr("common.zoo.fetch", lambda *a: pytest.fail("downloaded"))
    r = run("--data", make_shapes(), "--out", tmp_path / "run", fail=True)
    assert "--teacher faster_r101: has 80 classes" in r.stderr and "--init none" in r.stderr
