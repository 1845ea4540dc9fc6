# SPDX-License-Identifier: MIT
"""simple21k.py from its command line: both stages on small drawn and on real data, two processes, kill and resume, the table, bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import simple21k
from common import tiny
from common.run import save_checkpoint
from common.shapes import ALL_CLASSES, CLASSES, IMAGE_ONLY, WNID, make_shapes
from conftest import ROOT, SHARED, killed, launch

run = lambda *flags, **how: launch("simple21k", flags, **how)
pytestmark = pytest.mark.usefixtures("quick")
QUICK = ["--backbone", "tiny8", "--workers", "0", "--log-every", "1"]
FIRST, SECOND = ["--stage1-size", "32", "--stage1-batch", "8"], ["--image-size", "64", "--batch-size", "2", "--jitter", "0.5,1.2"]
Small = namedtuple("Small", "root flags first second data")  # flags: of both stages, of the first, of the second, of the data alone


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """60 drawn photographs with boxes, 26 classes of 2 images, and the flags that find them."""
    root = make_shapes(tmp_path_factory.mktemp("shapes"), train=60, val=30)
    data = ["--setup", "own", "--data", root]
    flags = [*data, "--val-json", root / "annotations/instances_valall2017.json", "--val-images", root / "valall2017", *QUICK]
    return Small(root, [*flags, *FIRST, *SECOND], [*flags, *FIRST], [*flags, *SECOND], data)


@pytest.fixture(scope="module")
def stage1(small, tmp_path_factory):
    """A stage I of three steps."""
    out = tmp_path_factory.mktemp("stage1") / "run"
    run(*small.first, "--stage", "1", "--max-iters", "3", "--out", out)
    return out / "best.pt"


def weights_of(model):
    return dict(simple21k.plain_of(model), model=model.state_dict())


def trace(out):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {r["it"]: {k: v for k, v in r.items() if k not in ("data", "step", "mem", "seconds")} for r in rows if "loss" in r}


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------ the whole path

@pytest.mark.whole
def test_both_stages_then_eval_and_predict(small, tmp_path):
    root, flags = small[:2]
    out = tmp_path / "run"
    r = run(*flags, "--max-iters", "3", "--log-every", "1", "--out", out)
    assert "loaded body, cls, fpn, head | new box, det, fg, rpn | left out nothing" in r.stdout and "20 in both" in r.stdout
    for stage, files in (("stage1", ()), ("stage2", ("detections.json", "samples.jpg"))):
        for name in ("args.json", "log.jsonl", "last.pt", "best.pt", "results.json", "curves.png", *files):
            assert (out / stage / name).exists(), name
    results = json.loads((out / "stage2" / "results.json").read_text())
    assert set(results["classes"]) == set(ALL_CLASSES) and results["images"] == 15
    # stage I's best.pt was chosen on images: stage II starts from last.pt, of which results.json is, too
    assert json.loads((out / "stage2/args.json").read_text())["args"]["init"] == str(out / "stage1/last.pt")
    assert json.loads((out / "stage1/results.json").read_text())["checkpoint"] == "last.pt"
    assert list(trace(out / "stage2")[1]) == ["it", "epoch", "loss", "rpn_fg", "rpn_box", "fg", "cat", "box", "cls", "top1", "lr"]
    assert json.loads((out / "stage1" / "results.json").read_text())["images"] == 52
    run(*flags, "--eval", out / "stage2" / "last.pt", "--out", tmp_path / "eval")
    again = json.loads((tmp_path / "eval" / "results.json").read_text())
    of = ("checkpoint", "epoch", "it")
    assert all(again[k] == results[k] for k in results if k not in ("seconds", *of))
    assert [results[k] for k in of] == ["last.pt", 1, 3] and [again[k] for k in of] == [str(out / "stage2" / "last.pt"), None, None]
    assert "stage II tiny8: " in r.stdout and "GFLOPs at 64 x 64" in r.stdout and "cat: Eqs. 2, 4" in r.stdout
    run(*flags, "--eval", out / "stage1" / "best.pt", "--out", tmp_path / "eval1")
    assert json.loads((tmp_path / "eval1" / "results.json").read_text())["images"] == 52
    photo = next((root / "valall2017").iterdir())
    run("--predict", photo, "--weights", out / "stage2" / "best.pt", "--classes", f"fish,{WNID['spiral']},Letter_T", "--score", "0", "--out", tmp_path / "predict")
    boxes = json.loads((tmp_path / "predict" / "predictions.json").read_text())[str(photo)]
    assert len(boxes) > 0 and {b["label"] for b in boxes} <= {"fish", "spiral", "letter T"} and len(list((tmp_path / "predict").glob("*_boxes.jpg"))) == 1
    r = run("--out", out, "--resume")  # alone: the flags are those of the stages
    assert r.stdout.count("from 3") == 2 and "from 0" not in r.stdout  # both stages are finished: nothing is trained again
    assert "holds a run already" in run(*flags, "--max-iters", "3", "--out", out, fail=True).stderr


def test_vocabularies_of_the_embedded_dataset(small):
    root, flags = small[:2]
    args = simple21k.parse_args([str(f) for f in flags])
    words, _, _ = simple21k.make_vocabulary(simple21k.resolve(simple21k.of_stage(args, 2, "x", init="none")))
    assert words["cls_names"] == ALL_CLASSES and set(words["det"]) == set(CLASSES)
    assert [n for n, p in zip(words["cls_names"], words["pair"]) if p < 0] == IMAGE_ONLY
    assert all(words["det"][p] == n for n, p in zip(words["cls_names"], words["pair"]) if p >= 0)


def test_table_of_the_embedded_dataset(small, tmp_path, monkeypatch):
    monkeypatch.setattr("common.shapes.make_shapes", lambda **_: small[0])
    flags = ["--data", "shapes", "--table", "--max-iters", "2", "--stage1-batch", "4", "--batch-size", "1", "--backbone", "tiny8", "--workers", "0", "--out", tmp_path / "t"]
    r = run(*flags)
    lines = r.stdout[r.stdout.index("\nshapes"):].splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["stage I", "boxes only", "simple21k"]
    only = weights(tmp_path / "t/boxes_only/last.pt")
    assert torch.equal(only["cls.weight"], weights(tmp_path / "t/stage_I/last.pt")["cls.weight"])  # no image data: the classifier stays
    assert not torch.equal(only["head.fc6.weight"], weights(tmp_path / "t/stage_I/last.pt")["head.fc6.weight"])
    assert (tmp_path / "t/comparison.jpg").stat().st_size > 5000
    again = run("--resume", "--out", tmp_path / "t").stdout  # the flags are known
    assert "from 0" not in again and "simple21k  " in again


def test_stage1_of_the_embedded_dataset_is_ready_but_for_flags_that_change_it(small, stage1, tmp_path, monkeypatch):
    monkeypatch.setattr("common.shapes.make_shapes", lambda **_: small.root)
    monkeypatch.setattr(tiny, "SHIPPED", tmp_path)
    monkeypatch.delenv("DETECTION_RETRAIN", raising=False)
    content = {k: v for k, v in torch.load(stage1, weights_only=True).items() if k not in ("format", "checksum")}
    tiny.pack(content, tmp_path / f"simple21k-tiny16-e15-{small.root.name}.xz")
    flags, place = ["--data", "shapes", "--workers", "0", "--out", str(tmp_path / "t")], (0, 1, torch.device("cpu"))
    path, metrics = simple21k.shapes_stage1(simple21k.parse_args(flags), *place)
    assert Path(path).parent.parent == small.root.parent / "teachers" and 0 <= metrics["top1"] <= 100
    torch.testing.assert_close(weights(path)["cls.weight"], content["model"]["cls.weight"], atol=0.01, rtol=0)
    trained = []
    monkeypatch.setattr(simple21k, "train", lambda args, *_: trained.append(args) or dict(top1=1.0))
    path, metrics = simple21k.shapes_stage1(simple21k.parse_args([*flags, "--stage1-epochs", "2"]), *place)
    assert path == str(tmp_path / "t/stage_I/last.pt") and metrics == dict(top1=1.0) and trained[0].stage1_epochs == 2


@pytest.mark.parametrize("more", [["--stage1-head", "gap"], ["--head", "4conv1fc"],
                                  ["--augment", "strong", "--accumulate", "2"]])
def test_variants_of_stage_one_lead_into_stage_two(small, more, tmp_path):
    flags = [*small[1], *more, "--max-iters", "2", "--out"]
    run(*flags, tmp_path / "run")
    last = trace(tmp_path / "run/stage2")[2]
    assert last["loss"] > 0 and "cls" in last


@pytest.mark.parametrize("more", [["--init", "none"], ["--reinit-cls"], ["--cls-ratio", "1", "--cls-size", "32"], ["--cls-jitter", "1,1", "--fg-grad-on-cls"], ["--rfs", "0.5"],
                                  ["--masks", "--amp", "bf16", "--checkpoint"]])
def test_variants_of_stage_two(small, stage1, more, tmp_path):
    init = [] if "--init" in more else ["--init", stage1]
    run(*small.second, "--stage", "2", *init, *more, "--max-iters", "2", "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert ("mask_AP" in results) == ("--masks" in more) and results["AP"] >= 0
    if "--masks" in more:
        assert "segmentation" in json.loads((tmp_path / "run" / "detections.json").read_text())[0]


def test_gradient_checkpointing_changes_nothing(small, stage1, tmp_path):
    for name, more in (("plain", []), ("again", ["--checkpoint"])):
        run(*small.second, "--stage", "2", "--init", stage1, *more, "--max-iters", "2", "--out", tmp_path / name)
    assert same(weights(tmp_path / "plain/last.pt"), weights(tmp_path / "again/last.pt"))


def test_swin_trains_in_both_stages(small, tmp_path, monkeypatch):
    monkeypatch.setitem(simple21k.SWIN, "swin_t", (24, (2, 2, 2, 2), (1, 2, 4, 8), 0.2, 0.2))  # narrower: the whole one takes half a minute
    run(*small.flags, "--backbone", "swin_t", "--stage1-batch", "2", "--batch-size", "1", "--max-iters", "1", "--out", tmp_path / "run")
    first, second = (weights(tmp_path / f"run/stage{k}/last.pt") for k in (1, 2))
    assert "body.norms.0.weight" in second and second["body.stages.0.1.0.attn.qkv.weight"].shape == first["body.stages.0.1.0.attn.qkv.weight"].shape


# ------------------------------------------------------------------ resume, several processes

@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_resumed_run_equals_an_uninterrupted_one(small, stage1, stage, tmp_path):
    flags = [*small.first, "--augment", "strong"] if stage == "1" else [*small.second, "--init", stage1]
    flags += ["--stage", stage]
    run(*flags, "--max-iters", "5", "--out", tmp_path / "whole")
    run(*flags, "--max-iters", "2", "--out", tmp_path / "parts")
    run("--resume", "--out", tmp_path / "parts", "--max-iters", "5")
    assert same(weights(tmp_path / "whole/last.pt"), weights(tmp_path / "parts/last.pt"))
    assert trace(tmp_path / "whole") == trace(tmp_path / "parts")


def test_a_killed_run_continues_bit_by_bit(small, stage1, tmp_path):
    flags = [str(f) for f in (*small.second, "--stage", "2", "--init", stage1, "--save-every", "3")]
    killed("simple21k", [*flags, "--max-iters", 4000], tmp_path / "killed", signal.SIGKILL, 5)
    done = torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["it"]
    assert done >= 3
    run("--resume", "--out", tmp_path / "killed", "--max-iters", done + 2)
    run(*flags, "--max-iters", done + 2, "--out", tmp_path / "whole")
    assert same(weights(tmp_path / "whole/last.pt"), weights(tmp_path / "killed/last.pt"))
    assert trace(tmp_path / "whole") == trace(tmp_path / "killed")


def test_two_processes_of_stage_one_equal_one(small, tmp_path):
    flags = [*small.first, "--stage", "1", "--max-iters", "3"]
    run(*flags, "--stage1-batch", "4", "--out", tmp_path / "two", procs=2, torchrun=True)
    run(*flags, "--stage1-batch", "8", "--out", tmp_path / "one")
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two")
    assert all(one[k]["cls"] == pytest.approx(two[k]["cls"], rel=1e-4) and one[k]["top1"] == pytest.approx(two[k]["top1"]) for k in one)
    a, b = weights(tmp_path / "one/last.pt"), weights(tmp_path / "two/last.pt")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-3  # AdamW turns rounding of small gradients into whole steps
    assert json.loads((tmp_path / "one/results.json").read_text())["top5"] == json.loads((tmp_path / "two/results.json").read_text())["top5"]


WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from common.run import init_ddp
import test_simple21k as t
from simple21k import Detector, make_learner, parameter_groups

def main():  # a function: now and then the interpreter aborts at its end if a DDP module has outlived its process group
    rank, world, device = init_ddp()
    torch.manual_seed(0)
    model = Detector(t.arch_of())
    model.rois_per_image = 100000  # all RoIs: nothing is drawn by lot
    learner = make_learner(model, t.flags())
    wrapped = torch.nn.parallel.DistributedDataParallel(learner, find_unused_parameters=False)
    every = t.det_batch(4, boxes=[0, 1]), t.cls_batch(6)  # rank 1 has images without boxes
    mine = [{k: v[rank * len(v) // 2:(rank + 1) * len(v) // 2] for k, v in batch.items()} for batch in every]

    def gradient(learner, det, cls):  # the RPN's anchors are drawn by lot: its losses are left out, but take part, or DDP would wait for them
        model.zero_grad()
        sum(0 * v if k.startswith("rpn") else v for k, v in learner(dict(det=det, cls=cls)).items()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    two, one = gradient(wrapped, *mine), gradient(learner, *every)
    worst = max((two[n] - one[n]).abs().max() / one[n].abs().max().clamp(min=1e-6) for n in one)
    assert sum(g.abs().max() > 1e-6 for g in one.values()) > 40 and worst < 1e-4, worst
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0), 0.01)
    for _ in range(2):
        sum(wrapped(dict(det=mine[0], cls=mine[1])).values()).backward()
        optimizer.step(), optimizer.zero_grad()
    total = torch.stack([p.detach().double().sum() for p in model.parameters()])
    both = [torch.zeros_like(total) for _ in range(world)]
    dist.all_gather(both, total)
    assert torch.equal(*both), "the processes have drifted apart"
    if rank == 0:
        print("EQUAL", float(worst))

main()
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradient_of_one_though_one_has_no_boxes(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "worker.py"), str(ROOT)], capture_output=True,
                       text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert r.returncode == 0 and "EQUAL" in r.stdout, r.stderr


# ------------------------------------------------------------------ real photographs

@pytest.fixture(scope="module")
def photos():
    data = SHARED / "data"
    if not data.exists():
        pytest.skip(f"real photographs are not here: {data}")
    return data


REAL2 = ["--image-size", "64", "--batch-size", "1", "--workers", "0", "--log-every", "1", "--max-iters", "2"]
REAL = ["--stage1-size", "32", "--stage1-batch", "4", *REAL2]


def test_setup_two_on_photographs_with_two_processes_and_resnet50(photos, tmp_path):
    """COCO boxes and ImageNet labels train; ImageNet's validation boxes measure localisation. BatchNorm learns in both stages: after two steps its running
    statistics are those of nothing, and with them frozen a ResNet-50 overflows."""
    flags = ["--setup", "s2", "--det-json", photos / "coco_mini/annotations/instances_train2017.json", "--det-images", photos / "coco_mini/train2017",
             "--cls-dir", copy_of(photos / "imagenet_mini/train", tmp_path / "in" / "train"), "--cls-val", copy_of(photos / "imagenet_mini/val", tmp_path / "in" / "val"),
             "--val-boxes", photos / "imagenet_mini/val_boxes", "--val-images", photos / "imagenet_mini/val", *REAL]
    run(*flags, "--stage1-batch", "2", "--bn", "sync", "--out", tmp_path / "run", procs=2)
    a, b = (weights(tmp_path / f"run/stage{k}/last.pt") for k in (1, 2))
    assert not torch.equal(a["body.stages.0.conv1.weight"], b["body.stages.0.conv1.weight"]) and not torch.equal(a["body.stages.0.bn1.running_mean"], b["body.stages.0.bn1.running_mean"])
    results = json.loads((tmp_path / "run/stage2/results.json").read_text())
    assert results["images"] == 40 and results["top1"] <= min(results["top5"], results["cls"]) and results["top1"] <= results["gt_known"]
    assert results["whole"] == pytest.approx(whole_image_floor(photos), abs=1e-6) and 0 <= results["AP50"] <= results["AP50_federated"] + 1e-9
    assert json.loads((tmp_path / "run/stage1/results.json").read_text())["images"] == 40


def copy_of(source, target):
    """Links, in a folder in which the index may be kept."""
    for folder in (p for p in source.iterdir() if p.is_dir()):
        (target / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            (target / folder.name / path.name).symlink_to(path.resolve())
    return target


def whole_image_floor(photos):
    """GT-known of the whole image, from the XML by a plain loop."""
    import xml.etree.ElementTree as ET
    hits, count = 0, 0
    for path in (photos / "imagenet_mini/val_boxes").rglob("*.xml"):
        root = ET.parse(path).getroot()
        w, h = (float(root.find(f"size/{k}").text) for k in ("width", "height"))
        areas = [(float(b.find("xmax").text) - float(b.find("xmin").text)) * (float(b.find("ymax").text) - float(b.find("ymin").text)) for b in root.iter("bndbox")]
        hits, count = hits + (max(areas) > 0.5 * w * h), count + 1
    return 100 * hits / count


def test_setup_one_on_photographs_with_masks_and_lvis_evaluation(photos, stage_names, tmp_path):
    """COCO's boxes and outlines in LVIS's layout; eight of its classes are made the partners of ImageNet folders, for lack of real ones."""
    overlap, flags = stage_names
    flags = [*flags, "--overlap", overlap, "--cls-dir", copy_of(photos / "imagenet_mini/train", tmp_path / "in"), *REAL, "--backbone", "tiny8", "--max-dets", "20"]
    r = run("--setup", "s1", *flags, "--out", tmp_path / "run")
    assert "8 classes" in r.stdout
    results = json.loads((tmp_path / "run/stage2/results.json").read_text())
    assert {"mask_AP", "mask_base_AP", "mask_novel_AP", "mask_APr", "mask_APf", "AP"} <= set(results) and len(results["classes"]) == 8
    assert results["mask_novel_AP"] == -1  # no rare class among these eight
    found = json.loads((tmp_path / "run/stage2/detections.json").read_text())
    assert found and {"bbox", "segmentation", "score", "category_id", "image_id"} <= set(found[0])


@pytest.fixture
def stage_names(photos, tmp_path):
    lvis = photos / "lvis_mini/annotations"
    wnids = sorted(p.name for p in (photos / "imagenet_mini/train").iterdir() if p.is_dir())
    path = tmp_path / "overlap.json"
    path.write_text(json.dumps(dict(zip(["person", "car_(automobile)", "chair", "bottle", "cup", "bowl", "book", "dog"], wnids))))
    return path, ["--det-json", lvis / "coco_mini_as_lvis_v1_train.json", "--det-images", photos / "coco_mini", "--val-json", lvis / "coco_mini_as_lvis_v1_val.json",
                  "--val-images", photos / "coco_mini"]


def test_fine_tuning_on_lvis_from_both_stages(photos, stage_names, small, stage1, tmp_path):
    """Table 5: 1,203 classes, repeat factors, boxes; a new detection classifier, no image classifier."""
    r = run("--setup", "lvis", "--init", stage1, *stage_names[1], *REAL2, "--rfs", "0.2", "--out", tmp_path / "run")
    assert "new box, det, fg, rpn | left out cls" in r.stdout
    model = weights(tmp_path / "run/last.pt")
    assert model["det.weight"].shape[0] == 1203 and "cls.weight" not in model
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {"AP", "APr", "APc", "APf"} <= set(results)


# ------------------------------------------------------------------ bad input

def test_wrong_input_is_told_in_one_line(small, stage1, tmp_path):
    root, _, first, second, data = small
    out = ["--out", tmp_path / "x"]
    line = lambda *more, **how: run(*more, *out, fail=True, **how).stderr.strip().splitlines()[-1]
    missing = line("--setup", "s2", "--data", tmp_path, "--stage", "2", "--init", "none", "--backbone", "tiny8")
    assert "coco/annotations/instances_train2017.json: is missing" in missing and "--data shapes" in missing
    missing = line("--setup", "s2", "--data", tmp_path, "--backbone", "tiny8", "--stage", "1")
    assert "--cls-dir" in missing and "--data shapes" in missing and not (tmp_path / "x").exists()
    assert "choose among r50" in line(*first, "--stage", "1", "--backbone", "vgg")
    assert "no such checkpoint" in line(*second, "--stage", "2", "--init", tmp_path / "none.pt")
    torch.save(dict(model={}), tmp_path / "other.pt")
    assert "is no checkpoint of this script" in line(*second, "--stage", "2", "--init", tmp_path / "other.pt")
    assert "is a classifier of stage I" in line("--predict", next((root / "val2017").iterdir()), "--weights", stage1)
    (tmp_path / "list.txt").write_text("n90000001\nn12345678\n")
    assert "has no class n12345678" in line(*first, "--stage", "1", "--cls-list", tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("n90000001\n")
    assert "holds one class, n90000001" in line(*first, "--stage", "1", "--cls-list", tmp_path / "list.txt")
    assert "there are no ImageNet weights" in line(*first, "--stage", "1", "--init", "imagenet")
    assert "--wordnet: is missing" in line("--setup", "s1", *first[4:], "--det-json", root / "annotations/lvis_v1_train.json", "--det-images", root,
                                           "--cls-dir", root / "imagenet/train", "--stage", "1")
    odd = odd_classes(stage1, tmp_path)
    assert "class n90000001" in line(*data, *QUICK, "--eval", odd, "--val-boxes", root / "imagenet/val_boxes", "--val-images", root / "imagenet/val")
    assert "its accuracy needs --cls-val" in line("--data", tmp_path, "--eval", stage1)
    assert "needs --val-json and --val-images" in line("--data", tmp_path, "--eval", odd, "--train-json", root / "annotations/lvis_v1_train.json", "--train-images", root)


@pytest.mark.parametrize("change,text", [
    (lambda c: c["arch"].pop("gap"), "is no checkpoint of this script"), (lambda c: c["arch"].update(pair=[7]), "is no checkpoint of this script"),
    (lambda c: c["arch"].update(name="tiny9999999"), "is no checkpoint of this script"), (lambda c: c.update(model=[1]), "is no checkpoint of this script"),
    (lambda c: c["model"]["cls.bias"].fill_(float("nan")), "cls.bias is not finite"), (lambda c: c["model"].pop("cls.bias"), "1 missing (first cls.bias)"),
    (lambda c: c.update(script="hierkd.py"), "is a checkpoint of hierkd.py, not of simple21k.py"),
    (lambda c: (c.pop("script"), c["arch"].pop("pair"), c["arch"].update(columns=[0])), "is a checkpoint of prototype_kd.py, not of simple21k.py")])
def test_damaged_and_other_scripts_checkpoints_are_refused(small, stage1, change, text, tmp_path):
    content = torch.load(stage1, weights_only=True)
    content.pop("checksum"), content.pop("format")  # as if somebody had changed the file by hand
    change(content)
    torch.save(content, tmp_path / "x.pt")
    for flags in (["--eval", tmp_path / "x.pt", "--data", small.root, "--setup", "own"], [*small.second, "--stage", "2", "--init", tmp_path / "x.pt"]):
        if "missing" not in text or "--eval" in flags:
            r = run(*flags, "--out", tmp_path / "out", fail=True)
            assert text in r.stderr and len(r.stderr.strip().splitlines()[-1:]) == 1 and "Traceback" not in r.stderr
    content = bytearray(Path(stage1).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    assert "flipped.pt" in run("--eval", tmp_path / "flipped.pt", "--data", small.root, "--setup", "own", "--out", tmp_path / "out", fail=True).stderr


def test_what_stage_two_lacks_is_told_before_stage_one(small, tmp_path):
    root, flags = small[:2]
    def line(*more):
        (message,) = run(*flags, *more, "--max-iters", "1", "--out", tmp_path / "x", fail=True).stderr.strip().splitlines()[-1:]
        assert not (tmp_path / "x").exists()
        return message
    (tmp_path / "o.json").write_text('{"unicorn": "n90000001"}')
    assert "unicorn is no class of" in line("--overlap", tmp_path / "o.json")
    other = json.loads((root / "annotations/instances_valall2017.json").read_text())
    other["categories"] = [c | dict(name=f"other {c['name']}") for c in other["categories"]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert "none of its classes is known to the model" in line("--val-json", tmp_path / "other.json")
    for a in other["annotations"]:
        a.pop("segmentation")
    other["categories"] = [c | dict(name=c["name"].removeprefix("other ")) for c in other["categories"]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert "annotations lack segmentation; --no-masks" in line("--val-json", tmp_path / "other.json", "--masks")


def odd_classes(stage1, tmp_path):
    """A stage II whose classes are not those of the data."""
    arch = torch.load(stage1, weights_only=True)["arch"] | dict(stage=2, kind="stage2", det=["a"])
    arch.update(cls=["nA", "nB"], cls_names=["A", "B"], pair=[-1, 0])
    torch.save(weights_of(simple21k.Detector(arch)), tmp_path / "odd.pt")
    return tmp_path / "odd.pt"


def test_other_classes_than_the_checkpoint_and_no_common_class(small, stage1, tmp_path):
    root, flags = small[:2]
    tree = shutil.copytree(root / "imagenet/train", tmp_path / "train")
    (tree / WNID["fish"]).rename(tree / "n99999999")
    more = ["--cls-dir", tree, "--stage", "2", "--init", stage1, "--max-iters", "1"]
    assert "does not know class n99999999 of --cls-dir" in run(*small.second, *more, "--out", tmp_path / "a", fail=True).stderr
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{w}\tthing {k}\n" for k, w in enumerate(WNID.values())))
    r = run(*small.second, "--stage", "2", "--init", stage1, "--names", names, "--max-iters", "1", "--out", tmp_path / "b")
    assert "warning: no class is in both vocabularies" in r.stdout
    assert torch.load(tmp_path / "b/last.pt", weights_only=True)["arch"]["cls_names"][0] == "thing 0"


def test_classes_may_have_folders_in_their_folders(small, tmp_path):
    tree = shutil.copytree(small.root / "imagenet/train", tmp_path / "train")
    for folder in list(tree.iterdir()):
        if folder.is_dir():
            (folder / "batch 1/raw").mkdir(parents=True)
            for path in list(folder.glob("*.JPEG"))[1:]:
                path.rename(folder / "batch 1/raw" / path.name)
    r = run(*small.first, "--cls-dir", tree, "--stage", "1", "--max-iters", "1", "--out", tmp_path / "run")
    plain = len(list((small.root / "imagenet/train").glob("*/*.JPEG")))
    assert f"{plain} images, 26 classes" in r.stdout and "lie in sub-folders" in r.stdout


def test_empty_classes_and_unreadable_images_are_told(small, tmp_path):
    root, flags = small[:2]
    tree = shutil.copytree(root / "imagenet/train", tmp_path / "train")
    (tree / "n00000001").mkdir()
    for folder in list(tree.iterdir()):
        if folder.name.startswith("n9"):
            sorted(folder.iterdir())[0].write_bytes(b"no jpeg")
    r = run(*small.first, "--cls-dir", tree, "--stage", "1", "--max-iters", "4", "--out", tmp_path / "run")
    assert "no image of n00000001: 1 classes left out" in r.stdout and "replaced by another image of its class" in r.stderr and "(1 so far)" in r.stderr


def test_without_a_validation_set_the_last_classifier_is_the_best(small, tmp_path):
    """Setups 1 and 3 have none for stage I."""
    r = run(*small.first, "--stage", "1", "--cls-val", "none", "--stage1-epochs", "3", "--out", tmp_path / "run")
    assert r.stdout.count("no validation set: ") == 2 and not (tmp_path / "run/results.json").exists()
    assert sum('"lr"' not in line for line in (tmp_path / "run/log.jsonl").read_text().splitlines()) == 3  # three evaluations that measured nothing
    assert same(weights(tmp_path / "run/best.pt"), weights(tmp_path / "run/last.pt"))


def test_split_of_a_benchmark_and_training_without_its_images(small, tmp_path):
    """Setup 3 in small: one class is a tar, one file is damaged; the split is drawn, annotated, left out of training, and evaluated."""
    tree = shutil.copytree(small[0] / "imagenet/train", tmp_path / "train")
    first = sorted(p for p in tree.iterdir() if p.is_dir())[0]
    for path in sorted(tree.glob("*/*"))[:10]:
        for k in range(5):
            shutil.copy(path, path.with_name(f"copy{k}_{path.name}"))
    (first / "copy0_damaged.JPEG").write_bytes(b"no jpeg")
    with tarfile.open(f"{first}.tar", "w") as f:
        f.add(first, first.name)
    shutil.rmtree(first)
    r = run("--make-split", tmp_path / "split.json", "--cls-dir", tree, "--setup", "own", "--data", small[0])
    split = json.loads((tmp_path / "split.json").read_text())
    assert "seed 0" in r.stdout and any(i["file_name"].startswith(f"{first.name}.tar/") for i in split["images"])
    split["annotations"] = [dict(id=i["id"], image_id=i["id"], category_id=i["category_id"], bbox=[10, 10, 40, 40]) for i in split["images"]]
    (tmp_path / "split.json").write_text(json.dumps(split))
    r = run(*small.data, *QUICK, *FIRST, *SECOND, "--cls-dir", tree, "--val-json", tmp_path / "split.json", "--val-images", tree, "--max-iters", "1",
            "--out", tmp_path / "run")
    assert r.stdout.count(f"left out {len(split['images'])} of the {len(split['images'])} images of the benchmark") == 2
    results = json.loads((tmp_path / "run/stage2/results.json").read_text())
    assert results["images"] == len(split["images"]) and results["whole"] == 0 and "AP50_federated" in results
    assert results["checkpoint"] == "last.pt" and "a training reports last.pt" in r.stdout  # a benchmark chooses nothing
    found = json.loads((tmp_path / "run/stage2/detections.json").read_text())
    assert all(d["category_id"] in {c["id"] for c in split["categories"]} and d["score"] > 0.05 and d["checkpoint"] == "last.pt" for d in found)
    split["images"] = [i for i in split["images"] if ".tar/" in i["file_name"]]  # a page of samples has nothing to show then
    split["annotations"] = [a for a in split["annotations"] if a["image_id"] in {i["id"] for i in split["images"]}]
    (tmp_path / "split.json").write_text(json.dumps(split))
    run(*small.data, *QUICK, "--eval", tmp_path / "run/stage2/last.pt", "--val-json", tmp_path / "split.json", "--val-images", tree, "--out", tmp_path / "tars")
    assert json.loads((tmp_path / "tars/results.json").read_text())["images"] == len(split["images"]) > 0 and not (tmp_path / "tars/samples.jpg").exists()


def test_exported_program_runs_without_this_repository(stage1, tmp_path):
    """torch alone reads it; pictures of other sizes and numbers than it was made from. Stage I and Swin are refused."""
    arch = dict(name="tiny8", kind="stage2", stage=2, head="2fc", gap=False, masks=False, det=["a", "b"], cls=["n1", "n2"], cls_names=["a", "c"], pair=[0, -1],
                setup="own", image_size=160, stage1_size=32, augment="plain")
    torch.manual_seed(0)
    model = simple21k.Detector(arch).eval()
    torch.save(weights_of(model), tmp_path / "w.pt")
    r = run("--export", tmp_path / "d.pt2", "--weights", tmp_path / "w.pt", "--classes", "c,b")
    assert "the same as in eager mode on other sizes" in r.stdout
    files = {"classes.json": ""}
    program = torch.export.load(tmp_path / "d.pt2", extra_files=files).module()
    assert json.loads(files["classes.json"]) == ["c", "b"]
    images = torch.randint(0, 256, (1, 3, 224, 192), dtype=torch.uint8)
    boxes, scores, _ = program(images)
    with torch.no_grad():
        vocabulary = simple21k.Vocabulary(arch, "cpu").choose([1, 2])
        expected = simple21k.Exported(model, vocabulary)(images)
    assert boxes.shape == (1, 100, 4) and scores.shape == (1, 100, 2) and torch.allclose(scores, expected[1], atol=1e-5)
    assert "is a classifier of stage I" in run("--export", tmp_path / "x.pt2", "--weights", stage1, fail=True).stderr


# ------------------------------------------------------------------ own data, stopped runs

def rewrite(path, change):
    """A changed copy of a json beside it."""
    content = json.loads(path.read_text())
    change(content)
    target = path.with_name(f"changed_{path.name}")
    target.write_text(json.dumps(content))
    return target


def keep_classes(names):
    def change(content):
        content["categories"] = [c for c in content["categories"] if c["name"] in names]
        ids = {c["id"] for c in content["categories"]}
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] in ids]
    return change


@pytest.fixture
def own(small, stage1, tmp_path):
    """Flags of stage II on own files, without a validation set, and the folder of a copy of these files."""
    root = tmp_path / "own"
    (root / "annotations").mkdir(parents=True)
    for path in (small.root / "annotations").glob("*_*2017.json"):
        shutil.copy(path, root / "annotations")
    flags = ["--train-json", root / "annotations/instances_train2017.json", "--train-images", small.root / "train2017", "--cls-dir", small.root / "imagenet/train",
             *QUICK, *SECOND, "--stage", "2", "--init", stage1, "--max-iters", "2", "--out", tmp_path / "run"]
    return root, flags


def test_own_data_without_a_validation_set(own, tmp_path):
    r = run(*own[1])
    assert r.stdout.count("no validation set: ") == 2 and "best.pt is the last" in r.stdout
    assert same(weights(tmp_path / "run/best.pt"), weights(tmp_path / "run/last.pt")) and not (tmp_path / "run/results.json").exists()


def test_validation_may_list_other_classes_than_training(own, small, tmp_path):
    """By name: a part of training's, one that it does not know; ids of its own, annotation ids from 0."""
    def change(content):
        keep_classes(["circle", "red star", "fish"])(content)
        renamed = {c["id"]: 70 + k for k, c in enumerate(content["categories"])}
        content["categories"] = [dict(c, id=renamed[c["id"]]) for c in content["categories"]] + [dict(id=99, name="unicorn")]
        content["annotations"] = [dict(a, id=k, category_id=renamed[a["category_id"]]) for k, a in enumerate(content["annotations"])]
    path = rewrite(own[0] / "annotations/instances_valall2017.json", change)
    r = run(*own[1], "--val-json", path, "--val-images", small.root / "valall2017")
    assert "1 of its 4 classes are not known to the model and are not scored, first unicorn" in r.stdout
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results["classes"]) == {"circle", "red star", "fish"} and "15 images, 3 of 4 classes" in r.stdout.replace("\n    ", " ")
    assert {d["category_id"] for d in json.loads((tmp_path / "run/detections.json").read_text())} <= {70, 71, 72}


def test_images_without_boxes_are_negatives_when_asked(own):
    empty = lambda content: content.update(annotations=[a for a in content["annotations"] if a["image_id"] != content["images"][0]["id"]])
    path = rewrite(own[0] / "annotations/instances_train2017.json", empty)
    flags = [f if f != own[0] / "annotations/instances_train2017.json" else path for f in own[1]]
    for more in ([], ["--keep-empty"]):
        args = simple21k.parse_args([str(f) for f in [*flags, *more]])
        data = simple21k.make_data(simple21k.resolve(simple21k.of_stage(args, 2, "x")), quiet=True)[1]
        everything = len(data.records)
        assert len(data) == everything if more else len(data) < everything
    run(*flags, "--keep-empty")


def test_lvis_files_that_its_evaluation_cannot_read_are_refused_before_training(photos, stage_names, stage1, tmp_path):
    lacking = lambda content: content["images"][3].pop("neg_category_ids")
    (tmp_path / "val.json").write_text((photos / "lvis_mini/annotations/coco_mini_as_lvis_v1_val.json").read_text())
    path = rewrite(tmp_path / "val.json", lacking)
    flags = [path if str(f).endswith("v1_val.json") else f for f in stage_names[1]]
    r = run("--setup", "lvis", "--init", stage1, *flags, *REAL2, "--out", tmp_path / "run", fail=True)
    assert "has no list neg_category_ids" in r.stderr and not (tmp_path / "run").exists()


PERFECT = {
    "as it is": lambda c: None,
    "annotation ids restart": lambda c: [a.update(id=k % 3) for k, a in enumerate(c["annotations"])],
    "boxes from another corner": lambda c: [a.update(bbox=[a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3], -a["bbox"][2], -a["bbox"][3]])
                                            for a in c["annotations"][::3]],
    "no crowd flags": lambda c: [a.update(iscrowd=None, area=None) for a in c["annotations"] if not a["iscrowd"]],
    "ids as text": lambda c: ([i.update(id=f"i{i['id']}") for i in c["images"]], [a.update(image_id=f"i{a['image_id']}") for a in c["annotations"]]),
    "an empty twin": lambda c: c["categories"].append(dict(c["categories"][0], id=999)),
}


@pytest.mark.parametrize("kind", PERFECT)
@pytest.mark.parametrize("masks", [False, True])
def test_the_truth_scored_as_detections_is_perfect(own, small, kind, masks, tmp_path, monkeypatch):
    """Through the script's own evaluation, whatever the ids and the awkward boxes of the file."""
    path = rewrite(own[0] / "annotations/instances_valall2017.json", PERFECT[kind])
    args = simple21k.parse_args([str(f) for f in [*own[1], "--val-json", path, "--val-images", small.root / "valall2017", *["--masks"] * masks]])
    args = simple21k.resolve(simple21k.of_stage(args, 2, "x"))
    arch = simple21k.make_data(args, quiet=True)[0]
    val = simple21k.make_val(args, arch, quiet=True)
    model = simple21k.Detector(arch)

    def detect(model, batch, vocabulary, **options):
        index = [i for i in range(len(val)) if val.items[i][0] == batch["image_ids"][0]][0]
        _, _, height, width, boxes, labels = val.items[index]
        columns = [vocabulary.names.index(val.classes[k]) for k in labels.tolist()]
        outlines = [val.records.segmentation(k) for k in val.rows(int(val.kept[index])).tolist()] if masks else []
        from pycocotools import mask as rle
        codes = [o if isinstance(o, dict) else rle.merge(rle.frPyObjects(o, height, width)) for o in outlines]
        codes = [dict(c, counts=c["counts"].decode()) for c in codes] if masks else None
        return dict(boxes=torch.from_numpy(boxes), scores=torch.ones(len(boxes)), labels=torch.tensor(columns, dtype=torch.long), masks=codes)
    monkeypatch.setattr(simple21k, "detect", detect)
    metrics, results = simple21k.evaluate(model, val, 0, 1, torch.device("cpu"), args)
    assert [metrics[k] for k in ("AP", "AP50", "score")] == pytest.approx([100, 100, 100]) and len(results) > 30
    if masks:
        assert metrics["mask_AP"] == pytest.approx(100)


def test_a_run_of_both_stages_stops_on_a_signal_and_continues_bit_by_bit(small, tmp_path):
    """In stage I; --resume then does the rest of both."""
    flags = [str(f) for f in (*small.flags, "--max-iters", "6")]
    run(*flags, "--out", tmp_path / "whole")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", STOPPING, *flags, "--out", str(tmp_path / "parts")]
    r = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert r.returncode == 128 + signal.SIGTERM and "Traceback" not in r.stderr
    line = r.stderr.strip().splitlines()[-1]
    assert "stopped by SIGTERM at step 3" in line and "continue: python" in line and line.endswith("--resume")
    assert torch.load(tmp_path / "parts/stage1/last.pt", weights_only=True)["it"] == 3 and not (tmp_path / "parts/stage2").exists()
    r = run("--resume", "--out", tmp_path / "parts")
    for stage in ("stage1", "stage2"):
        assert same(weights(tmp_path / "whole" / stage / "last.pt"), weights(tmp_path / "parts" / stage / "last.pt"))
        assert trace(tmp_path / "whole" / stage) == trace(tmp_path / "parts" / stage)


STOPPING = """
import os, signal, sys
sys.argv[0] = "simple21k.py"
sys.path.insert(0, os.getcwd())
import simple21k
step = simple21k.Run.step

def stop(run, *rest):  # while the third step is noted
    if run.it == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    step(run, *rest)

simple21k.Run.step = stop
simple21k.main()
"""


def test_a_resumed_run_follows_its_data_and_refuses_other_flags(small, stage1, tmp_path):
    """Paths that were the setup's are looked up under --data, which may have moved; what the run is stays."""
    out = ["--out", tmp_path / "run"]
    moved = tmp_path / "moved"
    moved.symlink_to(small.root)
    flags = [*small.data, *QUICK, *SECOND, "--stage", "2", "--init", stage1]
    run(*flags, "--max-iters", "1", *out)
    run("--resume", *out, "--data", moved, "--max-iters", "2")
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert saved["args"]["train_json"] == str(moved / "annotations/instances_train2017.json") and saved["it"] == 2
    r = run("--resume", *out, "--val-boxes", small.root / "imagenet/val_boxes", "--val-images", small.root / "imagenet/val", "--max-iters", "3")
    assert "a training reports last.pt" in r.stdout and json.loads((tmp_path / "run/results.json").read_text())["checkpoint"] == "last.pt"
    assert "which --resume keeps" in run("--resume", *out, "--head", "4conv1fc", fail=True).stderr
    (tmp_path / "list.txt").write_text("n90000001\nn90000011\n")
    torch.save(saved | dict(args=saved["args"] | dict(cls_list=str(tmp_path / "list.txt")), checksum=None) | dict(format=1), tmp_path / "run/last.pt")
    assert "is damaged" in run("--resume", *out, fail=True).stderr
    del saved["checksum"], saved["format"]
    saved["args"]["cls_list"] = str(tmp_path / "list.txt")
    save_checkpoint(saved, tmp_path / "run/last.pt")
    assert "was trained on other classes than the data have now" in run("--resume", *out, fail=True).stderr


def test_only_one_process_predicts_and_pictures_of_two_runs_do_not_mix(small, tmp_path):
    arch = dict(name="tiny8", kind="stage2", stage=2, head="2fc", gap=False, masks=True, det=["a", "b"], cls=["n1", "n2"], cls_names=["a", "c"], pair=[0, -1],
                setup="own", image_size=64, stage1_size=32, augment="plain")
    torch.manual_seed(0)
    torch.save(weights_of(simple21k.Detector(arch)), tmp_path / "w.pt")
    photos = sorted((small.root / "val2017").iterdir())[:3]
    flags = ["--weights", tmp_path / "w.pt", "--score", "0.001", "--max-dets", "3", "--out", tmp_path / "p"]
    (tmp_path / "broken.jpg").write_bytes(b"no jpeg")
    r = run("--predict", photos[0], tmp_path / "broken.jpg", photos[1], *flags)
    assert "left out: " in r.stderr and "broken.jpg" in r.stderr
    answer = json.loads((tmp_path / "p/predictions.json").read_text())
    assert list(answer) == [str(photos[0]), str(photos[1])] and all("counts" in b["mask"] for boxes in answer.values() for b in boxes) and answer[str(photos[0])]
    run("--predict", photos[2], *flags, "--no-masks", "--classes", "c")
    (boxes,) = json.loads((tmp_path / "p/predictions.json").read_text()).values()
    assert {b["label"] for b in boxes} == {"c"} and "mask" not in boxes[0] and len(list((tmp_path / "p").glob("*.jpg"))) == 1
