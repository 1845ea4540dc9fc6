"""hierkd.py from its command line: real photographs with captions, two processes, kill and resume, evaluation, prediction, bad input."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.datasets import NOVEL_17
from common.run import save_checkpoint
from common.shapes import make_shapes
from common.tiny import tiny_clip
from conftest import ROOT, launch

run = lambda *flags, **how: launch("hierkd", flags, **how)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP: what it knows does not matter here."""
    folder = tmp_path_factory.mktemp("clip")
    return tiny_clip(make_shapes(folder, train=24, val=12), folder, steps=1, objects=4, scenes=2)


@pytest.fixture
def small(coco_mini, clip):
    return ["--data", coco_mini, "--clip", clip, "--backbone", "tiny8", "--init", "none", "--image-size", "128", "--workers", "0",
            "--batch-size", "4", "--log-every", "2"]


def losses(out):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {r["it"]: {k: v for k, v in r.items() if k not in ("data", "step", "mem", "seconds")} for r in rows if "loss" in r}


def test_two_processes_train_on_real_photographs_evaluate_and_predict_any_names(small, coco_mini, tmp_path):
    out = tmp_path / "run"
    r = run(*small, "--max-iters", 4, "--gkd-gather", "--out", out, procs=2)
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


def test_killed_run_resumes_bit_exactly(small, tmp_path):
    flags = [*small, "--max-iters", 16, "--save-every", 4]
    run(*flags, "--out", tmp_path / "whole")
    process = subprocess.Popen([sys.executable, "hierkd.py", *map(str, flags), "--out", str(tmp_path / "killed")], cwd=ROOT, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed/log.jsonl"
    for _ in range(600):
        if log.exists() and len(log.read_text().splitlines()) >= 3:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 4 <= torch.load(tmp_path / "killed/last.pt", weights_only=True)["it"] < 16
    run("--out", tmp_path / "killed", "--resume")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    one = torch.load(tmp_path / "killed/last.pt", weights_only=True)
    assert len(one["rng"]) == 1 and one["args"]["max_iters"] == 16
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True)["model"] for n in ("whole", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_wrong_inputs_end_with_one_line(small, coco_mini, tmp_path):
    (tmp_path / "data/annotations").mkdir(parents=True)
    for name in ("train2017", "val2017", "annotations/instances_train2017.json", "annotations/instances_val2017.json"):
        (tmp_path / "data" / name).symlink_to(coco_mini / name)
    for words, flags in (("captions_train2017.json is missing", ["--data", tmp_path / "data", *small[2:], "--out", tmp_path / "a"]),
                         ("use more or --gkd-gather", [*small, "--batch-size", 1, "--out", tmp_path / "b"]),
                         ("expected MODEL/WEIGHTS", [*small, "--clip", "nothing", "--out", tmp_path / "c"]),
                         ("choose among r50, r101", [*small, "--backbone", "r18", "--out", tmp_path / "d"]),
                         ("no checkpoint of hierkd.py", ["--eval", small[3], *small[:2], "--out", tmp_path / "e"])):
        r = run(*flags, fail=True)
        assert words in r.stderr.strip().splitlines()[-1] and "Traceback" not in r.stderr, r.stderr[-1500:]


def test_analyses_of_the_paper_write_their_numbers_and_pictures(small, coco_mini, tmp_path):
    """Table 9 (true boxes), Table 1 (RPN), Table 6 (CLIP direct), Fig. 4 (heat map) on real photographs."""
    read = lambda name: json.loads((tmp_path / name / "results.json").read_text())
    r = run(*small[:4], "--gt-upper-bound", "--out", tmp_path / "bound")
    bound = read("bound")
    assert "true boxes of 17 novel classes" in r.stdout and 0 <= bound["AR50"] <= 100
    found = json.loads((tmp_path / "bound/detections.json").read_text())
    truth = json.loads((coco_mini / "annotations/instances_val2017.json").read_text())
    novel = {c["id"] for c in truth["categories"] if c["name"] in NOVEL_17}
    assert len(found) == sum(a["category_id"] in novel and not a["iscrowd"] for a in truth["annotations"])  # one name a box
    run(*small, "--rpn-recall", "--max-iters", 3, "--out", tmp_path / "rpn", procs=2)
    rpn = read("rpn")
    assert rpn["AR100_0.5"] <= rpn["AR300_0.5"] <= rpn["AR1000_0.5"] and rpn["AR1000_0.75"] <= rpn["AR1000_0.5"]
    run(*small, "--max-iters", 2, "--split", "65_15", "--out", tmp_path / "run")
    run("--eval", tmp_path / "run/last.pt", *small[:4], "--workers", 0, "--clip-direct", "--out", tmp_path / "direct")
    assert {p: len(c) for p, c in read("direct")["classes"].items()} == {"zsd": 15} and read("direct")["zsd_AP50"] >= 0  # the checkpoint's split
    photo = next((coco_mini / "val2017").iterdir())
    run("--predict", photo, "--weights", tmp_path / "run/best.pt", "--classes", "cat, red panda", "--heat-map", "--out", tmp_path / "heat")
    assert {p.name.split("_heat_")[1] for p in (tmp_path / "heat").glob("*_heat_*")} == {"cat.jpg", "red_panda.jpg"}


@pytest.mark.parametrize("pool, steps", [("avg", 10), ("max", 4)])
def test_one_process_of_four_and_two_of_two_have_the_same_losses(clip, tmp_path, pool, steps):
    """On shapes, where the images of a batch have one size: photographs are padded per process, and GroupNorm sees the padding. All negatives
    and all crops, because a draw belongs to a process; true boxes, because a predicted one at a threshold or
    at a whole pixel jumps by rounding; the maximum of a patch for four steps only, because it jumps from cell to cell; captions contrasted over all processes."""
    flags = ["--data", "shapes", "--clip", clip, "--max-iters", steps, "--image-size", 96, "--workers", 0, "--log-every", 1, "--negatives", "1.0", "--gkd-gather",
             "--ikd-max", 1000, "--ikd-box", "gt", "--ikd-iou", -1, "--gkd-pool", pool, "--optimizer", "sgd", "--lr", "0.01"]
    run(*flags, "--batch-size", 4, "--out", tmp_path / "one")
    run(*flags, "--batch-size", 2, "--out", tmp_path / "two", procs=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == steps and all(one[steps][k] > 0 for k in ("cls", "box", "quality", "ikd", "gkd"))
    for it in one:
        for k in set(one[it]) - ({"norm"} if it > 1 else set()):  # a gradient jumps where rounding turns a ReLU
            assert two[it][k] == pytest.approx(one[it][k], rel=1e-4, abs=1e-5), (it, k)
