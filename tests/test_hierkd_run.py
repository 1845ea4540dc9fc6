# SPDX-License-Identifier: MIT
"""hierkd.py from its command line: real photographs with captions, two processes, kill and resume, evaluation, prediction, bad input."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.datasets import NOVEL_17
from common.shapes import make_shapes
from common.tiny import tiny_clip
from conftest import ROOT, killed, launch

run = lambda *flags, **how: launch("hierkd", flags, **how)
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small shapes dataset."""
    return make_shapes(tmp_path_factory.mktemp("drawn"), train=24, val=12)


@pytest.fixture(scope="module")
def clip(drawn):
    """A tiny CLIP: what it knows does not matter here."""
    return tiny_clip(drawn, drawn.parent, steps=1, objects=4, scenes=2)


@pytest.fixture(scope="session")
def photos(coco_mini, tmp_path_factory):
    """The photographs in COCO's layout, 24 instead of 79 of them to validate."""
    root = tmp_path_factory.mktemp("photos")
    (root / "annotations").mkdir()
    for name in ("train2017", "val2017", "annotations/instances_train2017.json", "annotations/captions_train2017.json"):
        (root / name).symlink_to(coco_mini / name)
    content = json.loads((coco_mini / "annotations/instances_val2017.json").read_text())
    novel = {c["id"] for c in content["categories"] if c["name"] in NOVEL_17}
    held = [a["image_id"] for a in sorted(content["annotations"], key=lambda a: a["category_id"] not in novel)]
    few = set(list(dict.fromkeys(held))[:24])
    content["images"] = [i for i in content["images"] if i["id"] in few]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in few]
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def small(photos, clip):
    return ["--data", photos, "--clip", clip, "--backbone", "tiny8", "--init", "none", "--image-size", "128", "--workers", "0",
            "--batch-size", "4", "--log-every", "2"]


def losses(out):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {r["it"]: {k: v for k, v in r.items() if k not in ("data", "step", "mem", "seconds")} for r in rows if "loss" in r}


def test_two_processes_train_on_real_photographs_evaluate_and_predict_any_names(small, coco_mini, tmp_path):
    out = tmp_path / "run"
    r = run(*small, "--max-iters", 4, "--out", out, procs=2, torchrun=True)
    words = " ".join(r.stdout.split())  # lines are folded
    assert "48 base and 17 novel classes" in words and "batch 4 x 2 x 1 = 8" in words and "GZSD base" in words
    assert words.count("student OpenATSS_tiny8: ") == 1 and "GFLOPs at 128 x" in words and "ikd: Eq. 2: embeddings" in words
    assert sorted(p.name for p in out.iterdir()) == ["args.json", "best.pt", "curves.png", "detections.json", "last.pt", "log.jsonl", "results.json", "samples.jpg"]
    results = json.loads((out / "results.json").read_text())
    assert {k: len(v) for k, v in results["classes"].items()} == dict(zsd=17, base=48, gzsd=65)
    state = torch.load(out / "last.pt", weights_only=True)
    assert not any("clip" in k or "text" in k for k in state["model"]) and {"ikd", "gkd"} <= set(losses(out)[4])
    run("--eval", out / "last.pt", *small[:4], "--workers", 0, "--out", tmp_path / "eval")  # the image size comes with the weights
    again = json.loads((tmp_path / "eval/results.json").read_text())
    numbers = lambda r: {k: v for k, v in r.items() if k not in ("seconds", "checkpoint", "epoch", "it")}
    assert numbers(again) == numbers(results)
    assert (results["checkpoint"], results["it"], again["checkpoint"]) == ("last.pt", 4, str(out / "last.pt"))  # not the best: it was chosen by these images
    photo = next((coco_mini / "val2017").iterdir())
    (tmp_path / "torn.jpg").write_bytes(photo.read_bytes()[:999])
    r = run("--predict", tmp_path / "torn.jpg", photo, "--weights", out / "best.pt", "--classes", "red panda, umbrella", "--score", 0, "--out", tmp_path / "p")
    assert "left out" in r.stderr and "torn.jpg" in r.stderr  # and the other is still predicted
    (name, boxes), = json.loads((tmp_path / "p/predictions.json").read_text()).items()
    assert {b["label"] for b in boxes} <= {"red panda", "umbrella"} and len(boxes) > 10 and len(list((tmp_path / "p").glob("*_boxes.jpg"))) == 1


@pytest.fixture(scope="module")
def whole(photos, clip, tmp_path_factory):
    """A run that nothing disturbed, with its flags; the choice of crops is random, too."""
    flags = ["--data", photos, "--clip", clip, "--backbone", "tiny8", "--init", "none", "--image-size", "128", "--workers", "0", "--batch-size", "4",
             "--log-every", "1", "--max-iters", 16, "--save-every", 4, "--ikd-max", 2]
    out = tmp_path_factory.mktemp("whole") / "run"
    run(*flags, "--out", out)
    return out, flags


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_resumes_bit_exactly(whole, tmp_path, number):
    out, flags = whole
    code, error = killed("hierkd", flags, tmp_path / "killed", number, 5)
    if number == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM and "Traceback" not in error
        assert "stopped by SIGTERM at step" in error and error.strip().endswith("--resume")
    assert 4 <= torch.load(tmp_path / "killed/last.pt", weights_only=True)["it"] < 16
    run("--out", tmp_path / "killed", "--resume")
    assert losses(tmp_path / "killed") == losses(out)
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (tmp_path / "killed", out))
    assert len(one["rng"]) == 1 and one["args"]["max_iters"] == 16 and one["draws"] == other["draws"] == 16
    assert all(torch.equal(other["model"][k], one["model"][k]) for k in one["model"])


def test_wrong_inputs_end_with_one_line(small, coco_mini, tmp_path):
    (tmp_path / "data/annotations").mkdir(parents=True)
    for name in ("train2017", "val2017", "annotations/instances_train2017.json", "annotations/instances_val2017.json"):
        (tmp_path / "data" / name).symlink_to(coco_mini / name)
    for words, flags in (("captions_train2017.json is missing", ["--data", tmp_path / "data", *small[2:], "--out", tmp_path / "a"]),
                         ("use more images, or --no-gkd", [*small, "--batch-size", 1, "--out", tmp_path / "b"]),
                         ("expected MODEL/WEIGHTS", [*small, "--clip", "nothing", "--out", tmp_path / "c"]),
                         ("choose among r50, r101", [*small, "--backbone", "r18", "--out", tmp_path / "d"]),
                         ("no checkpoint of hierkd.py", ["--eval", small[3], *small[:2], "--out", tmp_path / "e"])):
        r = run(*flags, fail=True)
        assert words in r.stderr.strip().splitlines()[-1] and "Traceback" not in r.stderr, r.stderr[-1500:]


def test_analyses_of_the_paper_write_their_numbers_and_pictures(small, photos, coco_mini, tmp_path):
    """Table 9 (true boxes), Table 1 (RPN), Table 6 (CLIP direct), Fig. 4 (heat map) on real photographs."""
    read = lambda name: json.loads((tmp_path / name / "results.json").read_text())
    analyse = lambda *words, **how: launch("tests/analyses_hierkd" if how else "analyses_hierkd", words, **how)
    r = analyse("bound", *small[:4], "--out", tmp_path / "bound")
    bound = read("bound")
    assert "true boxes of 17 novel classes" in r.stdout and 0 <= bound["AR50"] <= 100
    found = json.loads((tmp_path / "bound/detections.json").read_text())
    truth = json.loads((photos / "annotations/instances_val2017.json").read_text())
    novel = {c["id"] for c in truth["categories"] if c["name"] in NOVEL_17}
    assert len(found) == sum(a["category_id"] in novel and not a["iscrowd"] for a in truth["annotations"])  # one name a box
    analyse("rpn", *small[:2], *small[4:], "--max-iters", 3, "--out", tmp_path / "rpn", procs=2)
    rpn = read("rpn")
    assert rpn["AR100_0.5"] <= rpn["AR300_0.5"] <= rpn["AR1000_0.5"] and rpn["AR1000_0.75"] <= rpn["AR1000_0.5"]
    run(*small, "--max-iters", 2, "--split", "65_15", "--out", tmp_path / "run")
    run("--eval", tmp_path / "run/last.pt", *small[:4], "--workers", 0, "--clip-direct", "--out", tmp_path / "direct")
    assert {p: len(c) for p, c in read("direct")["classes"].items()} == {"zsd": 15} and read("direct")["zsd_AP50"] >= 0  # the checkpoint's split
    photo = next((coco_mini / "val2017").iterdir())
    analyse("heat", "--predict", photo, "--weights", tmp_path / "run/best.pt", "--classes", "cat, red panda", "--out", tmp_path / "heat")
    assert "is an RPN" in run("--predict", photo, "--weights", tmp_path / "rpn/best.pt", "--out", tmp_path / "no", fail=True).stderr
    assert {p.name.split("_heat_")[1] for p in (tmp_path / "heat").glob("*_heat_*")} == {"cat.jpg", "red_panda.jpg"}


def test_one_process_of_four_and_two_of_two_have_the_same_losses(clip, drawn, tmp_path, steps=10):
    """On shapes, where the images of a batch have one size: photographs are padded per process, and the towers see the padding. All negatives
    and all crops, because a draw belongs to a process; true boxes, because a predicted one at a whole pixel jumps by rounding. GKD contrasts the
    images of a process, so that its loss is another there: without it."""
    flags = ["--data", "shapes", "--clip", clip, "--max-iters", steps, "--image-size", 96, "--workers", 0, "--log-every", 1, "--negatives", "1.0",
             "--no-gkd", "--val-json", drawn / "annotations/instances_val2017.json", "--val-images", drawn / "val2017",
             "--ikd-max", 1000, "--ikd-box", "gt", "--optimizer", "sgd", "--lr", "0.01"]
    run(*flags, "--batch-size", 4, "--out", tmp_path / "one")
    run(*flags, "--batch-size", 2, "--out", tmp_path / "two", procs=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == steps and all(one[steps][k] > 0 for k in ("cls", "box", "quality", "ikd"))
    for it in one:
        for k in set(one[it]) - ({"norm"} if it > 1 else set()):  # a gradient jumps where rounding turns a ReLU
            assert two[it][k] == pytest.approx(one[it][k], rel=1e-4, abs=1e-5), (it, k)


def test_own_files_without_and_with_a_validation_set_of_fewer_classes(clip, drawn, tmp_path):
    """Base classes are those of the training file; a class that only validation has is novel."""
    train, val = (json.loads((drawn / f"annotations/instances_{split}2017.json").read_text()) for split in ("train", "val"))
    names = [c["name"] for c in sorted(val["categories"], key=lambda c: -sum(a["category_id"] == c["id"] for a in val["annotations"]))]
    new, kept = names[3], names[:12]  # with boxes
    for content, wanted in ((train, [n for n in names if n != new]), (val, kept)):
        content["categories"] = [c for c in content["categories"] if c["name"] in wanted]
        ids = {c["id"] for c in content["categories"]}
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] in ids]
    for content, name in ((train, "train.json"), (val, "val.json")):
        (tmp_path / name).write_text(json.dumps(content))
    own = ["--train-json", tmp_path / "train.json", "--train-images", drawn / "train2017", "--clip", clip, "--backbone", "tiny8", "--init", "none",
           "--image-size", "96", "--workers", 0, "--batch-size", 4, "--max-iters", 2, "--log-every", 1]
    r = run(*own, "--train-captions", drawn / "annotations/captions_train2017.json", "--out", tmp_path / "alone")
    assert "no validation set" in r.stdout and f"{len(names) - 1} base and 0 novel classes" in " ".join(r.stdout.split())
    assert (tmp_path / "alone/best.pt").exists() and not (tmp_path / "alone/results.json").exists()
    with_val = ["--val-json", tmp_path / "val.json", "--val-images", drawn / "val2017"]
    r = run(*own, "--no-gkd", "--keep-empty", *with_val, "--out", tmp_path / "run")
    assert f"{len(names) - 1} base and 1 novel classes" in " ".join(r.stdout.split())
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results["classes"]["gzsd"]) == set(kept) and list(results["classes"]["zsd"]) == [new]
    run("--eval", tmp_path / "run/last.pt", *with_val, "--workers", 0, "--out", tmp_path / "eval")
    again = json.loads((tmp_path / "eval/results.json").read_text())
    assert again["classes"] == results["classes"]
    assert "--train-captions" in run(*own, *with_val, "--gkd", "--out", tmp_path / "no", fail=True).stderr  # GKD needs them
    r = run(*own, "--out", tmp_path / "without")
    assert "no GKD (--no-gkd)" in r.stderr and "--row own" in r.stderr and "gkd" not in losses(tmp_path / "without")[2]


def test_predict_walks_folders_and_keeps_two_runs_apart(whole, coco_mini, tmp_path):
    weights, photo = whole[0] / "best.pt", sorted((coco_mini / "val2017").iterdir())[:2]
    (tmp_path / "in/deeper").mkdir(parents=True)
    for path, place in zip(photo, ("one.jpg", "deeper/two.JPG")):
        (tmp_path / "in" / place).write_bytes(path.read_bytes())
    (tmp_path / "in/._one.jpg").write_bytes(b"Finder's")
    (tmp_path / "names.txt").write_text("red panda\numbrella, open\n")
    flags = ["--weights", weights, "--score", 0, "--out", tmp_path / "p"]
    run("--predict", tmp_path / "in", *flags, "--classes", tmp_path / "names.txt")
    found = json.loads((tmp_path / "p/predictions.json").read_text())
    assert sorted(Path(n).name for n in found) == ["one.jpg", "two.JPG"] and {b["label"] for v in found.values() for b in v} <= {"red panda", "umbrella, open"}
    assert len(list((tmp_path / "p").glob("*_boxes.jpg"))) == 2
    run("--predict", tmp_path / "in/one.jpg", *flags)  # names of training and of its evaluation
    found = json.loads((tmp_path / "p/predictions.json").read_text())
    assert [Path(n).name for n in found] == ["one.jpg"] and len(list((tmp_path / "p").glob("*_boxes.jpg"))) == 1
    assert "no such file" in run("--predict", tmp_path / "nothing", *flags, fail=True).stderr


@pytest.mark.parametrize("layout", ["coco", "lvis"])
def test_an_own_split_from_the_command_line_to_names_in_a_fresh_process(clip, coco_mini, tmp_path, layout):
    """Five base and three novel categories by name, one with a comma in it; training, evaluation and prediction need not be told again."""
    folders = {split: coco_mini / f"{split}2017" for split in ("train", "val")}
    for split in ("train", "val"):
        path = coco_mini / f"annotations/instances_{split}2017.json"
        if layout == "lvis":
            path = coco_mini.parent / f"lvis_mini/annotations/coco_mini_as_lvis_v1_{split}.json"
            folders[split] = coco_mini
        content = json.loads(path.read_text())
        for c in content["categories"]:
            c["name"] = "book, printed" if c["name"] == "book" else c["name"]
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    files = {split: [f"--{split}-json", tmp_path / f"{split}.json", f"--{split}-images", folders[split]] for split in ("train", "val")}
    base, novel = ["person", "book, printed", "bottle", "bowl", "chair"], ["cup", "boat", "knife"]
    words = [w for n in base for w in ("--base", n)]
    r = run(*files["train"], *files["val"], *words, "--novel", ",".join(novel), "--clip", clip, "--backbone", "tiny8", "--init", "none", "--image-size", 96,
            "--workers", 0, "--batch-size", 4, "--max-iters", 2, "--out", tmp_path / "run")
    assert "5 base and 3 novel classes" in " ".join(r.stdout.split())
    arch = torch.load(tmp_path / "run/best.pt", weights_only=True)["arch"]
    assert sorted(arch["base"]) == sorted(base) and sorted(arch["novel"]) == sorted(novel) and arch["templates"] and arch["clip_name"].startswith("tiny-")
    r = run("--eval", tmp_path / "run/last.pt", *files["val"], "--workers", 0, "--out", tmp_path / "eval")
    results, again = (json.loads((tmp_path / f"{n}/results.json").read_text()) for n in ("run", "eval"))
    assert results["classes"] == again["classes"] and set(again["classes"]["zsd"]) <= set(novel) and "book, printed" in again["classes"]["base"]
    assert set(again["classes"]["gzsd"]) <= {*base, *novel} and {"zsd_AP50", "base_AP50", "gzsd_all_AP50"} <= set(again)
    assert "are not in the checkpoint's vocabulary and left out" in r.stderr
    run("--eval", tmp_path / "run/last.pt", *files["val"], "--workers", 0, "--classes", "cup,person,boat", "--out", tmp_path / "few")
    few = json.loads((tmp_path / "few/results.json").read_text())
    assert (set(few["classes"]["zsd"]), set(few["classes"]["base"])) == ({"cup", "boat"}, {"person"})
    photo = next((coco_mini / "val2017").iterdir())
    subprocess.run([sys.executable, "hierkd.py", "--predict", str(photo), "--weights", str(tmp_path / "run/best.pt"), "--score", "0", "--out", str(tmp_path / "p")],
                   cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    found, = json.loads((tmp_path / "p/predictions.json").read_text()).values()
    assert len(found) > 10 and {b["label"] for b in found} <= {*base, *novel}
