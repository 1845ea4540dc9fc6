# SPDX-License-Identifier: MIT
"""crosskd.py from its command line: real photographs, two processes, signals, kill and resume, bad input.

Losses of 1 process x 4 images and 2 gloo processes x 2 images agree to 1e-5 over 20 steps, for the plain
GFL and for CrossKD with `--sync-stats`. Every normaliser is a mean over processes. The released code keeps
four things local to a process: the sum of region weights of GFL's box distillation and RetinaNet's positive
count (reduced here), and the statistics of the feature alignment and of PKD (local here too by default,
because the paper's numbers were made with the statistics of 2 images; `--sync-stats` makes them global).
Evaluation gives identical detections and AP on 1, 2 and 3 processes (79 photographs). Stage II of
simple21k.py draws RoIs by lot: with all of them taken, the gradient of two processes, of which one has no
boxes, is that of one to 7e-6 of its largest value (the RPN's losses, whose anchors are drawn, left out).
"""
import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import launch
from forks import Forks, free_port
from PIL import Image

import common.shapes
import crosskd
from common import zoo
from common.datasets import CocoDataset, find_coco
from common.evaluation import coco_evaluate
from common.run import UserError, checksum, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--image-size", "128", "--workers", "0", "--init", "none", "--log-every", "5"]
pytestmark = pytest.mark.usefixtures("quick")


# ------------------------------------------------------------------ how runs are started

QUICK = """
import common.pictures
module.describe_model = lambda name, *a, **k: print(f"{name}:")
common.pictures.plot_curves = lambda *a: None
"""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = Forks("crosskd", tmp_path_factory.mktemp("jobs"), "import common.tiny, common.shapes, matplotlib, "
                   "PIL.ImageFont, pycocotools.cocoeval, torch.distributed.nn.functional", QUICK)
    yield server
    server.close()


def run(*flags):
    return launch("crosskd", flags)


def fails(*flags):
    """The one line that the script ends with, run in this process (an exit is no traceback)."""
    return one_line(launch("crosskd", flags, fail=True).stderr)


def one_line(err):
    """The line of ours on stderr, where beside it only progress bars are."""
    bare = re.sub(r"\x1b\[\w", "", err)  # what moves the cursor
    lines = [line for line in re.split(r"[\r\n]+", bare) if line.strip() and not re.search(r"it/s|s/it|\?it",
        line)]
    assert len(lines) == 1 and lines[0].startswith("crosskd.py: "), lines
    return lines[0]


def rows(out):
    """Of a log that may be being written."""
    path, found = Path(out) / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            pass
    return found


def wait_for_step(out, it):
    end = time.time() + 120
    while not any(r["it"] >= it for r in rows(out)):
        assert time.time() < end, f"{out}: step {it} does not come"
        time.sleep(0.01)


def losses(out):
    """{iteration: row without times} of a log."""
    return {r["it"]: {k: v for k, v in r.items() if k not in ("data", "step", "mem", "seconds")}
            for r in rows(out) if "loss" in r}


def same_end(a, b):
    """Two runs ended alike, to the last bit: steps, weights, optimizer, random states of all processes."""
    assert losses(a) == losses(b)
    a, b = (load_checkpoint(Path(p) / "last.pt", "crosskd.py") for p in (a, b))
    for state in (a, b):
        del state["args"], state["checksum"]
    assert a.keys() == b.keys() and [k for k in a if checksum(a[k]) != checksum(b[k])] == []


# ------------------------------------------------------------------ data and weights

def checkpoint(path, classes, backbone="tiny8", kind="gfl", seed=7, finds=False):
    """An untrained detector as a checkpoint of ours; one that `finds` has boxes everywhere."""
    torch.manual_seed(seed)
    model = crosskd.DETECTORS[kind](backbone, len(classes), 64)
    if finds:
        for p in model.head.parameters():
            if p.ndim == 4:
                torch.nn.init.normal_(p, std=0.06)
        torch.nn.init.constant_(model.head.cls_pred.bias, -2.5)
    save_checkpoint(dict(crosskd.plain_of(model, classes), model=model.state_dict()), path)
    return path


@pytest.fixture(scope="module")
def photographs(coco_mini, tmp_path_factory):
    """coco_mini with weights that fit it. train: flags of 24 of its images, val: of 6, some: of 11."""
    folder = tmp_path_factory.mktemp("photographs")
    classes = CocoDataset(*find_coco(coco_mini, "val"), False).classes

    def first(split, n):
        content = json.loads((coco_mini / f"annotations/instances_{split}2017.json").read_text())
        (folder / f"{split}{n}.json").write_text(json.dumps(first_images(content, n)))
        return [f"--{split}-json", folder / f"{split}{n}.json", f"--{split}-images",
                coco_mini / f"{split}2017"]
    return argparse.Namespace(classes=classes, teacher=checkpoint(folder / "teacher.pt", classes, "tiny16"),
                              start=checkpoint(folder / "start.pt", classes, finds=True),
                              train=first("train", 24), val=first("val", 6), some=first("val", 11))


def first_images(content, count):
    images = content["images"][:count]
    kept = {i["id"] for i in images}
    return content | dict(images=images, annotations=[a for a in content["annotations"]
                                                      if a["image_id"] in kept])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Files as users bring them, of the embedded pictures: 24 + 3 images and 4 classes to train on, 8 images
    and 3 of the classes, in another order, to validate.

    Ids are of no order, image ids of val are text, annotation ids begin anew in each image; the three images
    have no boxes.
    """
    folder = tmp_path_factory.mktemp("own")
    pictures, every = find_coco(common.shapes.make_shapes().resolve(), "val")
    content = json.loads(every.read_text())
    name = {c["id"]: c["name"] for c in content["categories"]}
    names = ["circle", "square", "triangle", "heart"]
    assert set(names) < set(name.values())
    boxes = {i["id"]: [a for a in content["annotations"] if a["image_id"] == i["id"]
                       and name[a["category_id"]] in names] for i in content["images"]}
    annotated = [i for i in content["images"] if any(name[a["category_id"]] in names[:3]
                                                     for a in boxes[i["id"]])]
    empty = [dict(i) for i in content["images"] if not boxes[i["id"]]][:3]

    def write(file, images, ids, key):
        annotations = [dict(a, id=n, image_id=key(i["id"]), category_id=ids[name[a["category_id"]]])
                       for i in images for n, a in enumerate(boxes[i["id"]]) if name[a["category_id"]] in ids]
        (folder / file).write_text(json.dumps(dict(images=[dict(i, id=key(i["id"])) for i in images],
                                                   annotations=annotations,
                                                   categories=[dict(id=i, name=n) for n, i in ids.items()])))
    write("train.json", annotated[:24] + empty, dict(heart=40, circle=7, triangle=19, square=3),
          lambda i: i * 1000)
    write("val.json", annotated[24:32], dict(triangle=5, square=9, circle=2), lambda i: f"photo {i}")
    classes = ["square", "circle", "triangle", "heart"]
    return argparse.Namespace(
        classes=classes, train=["--train-json", folder / "train.json", "--train-images", pictures],
        json=folder / "val.json",
        val=["--val-json", folder / "val.json", "--val-images", pictures],
        start=checkpoint(folder / "start.pt", classes, finds=True),
        teacher=checkpoint(folder / "teacher.pt", classes, "tiny16"))


@pytest.fixture(scope="module")
def steps(own):
    """Flags of a run whose steps are quick and all alike, without evaluation; an epoch has 6."""
    return [*own.train, "--student", "gfl_tiny8", "--teacher", own.teacher, "--method", "crosskd+pkd",
            "--image-size", "64", "--workers", "0", "--init", "none",
            "--log-every", "1", "--save-every", "4", "--eval-every", "3", "--batch-size", "4"]


# ------------------------------------------------------------------ a run and its files

def test_two_processes_train_on_real_photographs_evaluate_and_leave_all_files(
        forks, coco_mini, photographs, tmp_path):
    out = tmp_path / "run"
    whole = """
import importlib, common.pictures, common.run
importlib.reload(common.pictures)
module.describe_model = common.run.describe_model
"""
    job = forks.run("--data", coco_mini, *photographs.some, "--teacher", photographs.teacher, "--student",
                    "gfl_tiny8", "--batch-size", 2, "--max-iters", 12, *TINY,
                    "--init", photographs.start, "--eval-every", 2, "--no-teacher-check", "--out", out,
                    procs=2, before=whole)
    lines = [line for line in job.out.splitlines() if "[Gloo]" not in line]  # torch 2.9's
    assert "80 classes" in job.out and "batch 2 x 2 x 1 = 4" in job.out and "11 images" in job.out
    assert sorted(p.name for p in out.iterdir()) == ["args.json", "best.pt", "curves.png", "detections.json",
                                                     "last.pt", "log.jsonl", "results.json", "samples.jpg"]
    results = json.loads((out / "results.json").read_text())
    assert len(results["classes"]) == 80 and results["images"] == 11
    # of which checkpoint and epoch they are
    assert (results["checkpoint"], results["epoch"], results["it"]) == ("best.pt", 1, 12)
    best = load_checkpoint(out / "best.pt", "crosskd.py")
    assert (best["script"], best["epoch"], best["it"], best["format"]) == ("crosskd.py", 1, 12, 1)
    assert "optimizer" not in best
    assert Image.open(out / "samples.jpg").info["comment"] == b"best.pt, epoch 1, step 12"
    from pycocotools.coco import COCO
    found = json.loads((out / "detections.json").read_text())
    COCO(coco_mini / "annotations/instances_val2017.json").loadRes(found)
    assert len(found) > 1000 and all((d["checkpoint"], d["epoch"]) == ("best.pt", 1) for d in found)
    # what stands on the terminal
    start = next(k for k, line in enumerate(lines) if line.startswith("student "))
    assert re.fullmatch(r"student gfl_tiny8: 651,649 parameters, [\d,]+ trained, \d+\.\d GFLOPs at \d+ x \d+",
                        lines[start])
    assert re.fullmatch(r"teacher gfl_tiny16: [\d,]+ parameters, 0 trained, \d+\.\d GFLOPs at \d+ x \d+",
                        lines[start + 1])
    assert "teacher AP 0.0 on 11 validation images" in lines
    for term in ("cls", "box", "dfl", "kd_cls", "kd_box"):
        assert lines.count(f"{term}: {crosskd.LEGEND[term]}") == 1
    table = re.compile(r" \| .* \| |^/|\.json: ")  # of classes; names of files
    wide = [line for line in lines[start:] if len(line) > 80 and not table.search(line)]
    assert not wide and all(len(line) < 80 for line in lines if line.startswith(("ep ", "    ", "method ")))
    assert not any("mem " in line
                   for line in lines) and re.match(r"best AP \d+\.\d \(epoch 1\), last \d+\.\d \| 0:0",
                                                   lines[-1])
    assert [r["it"] for r in rows(out) if "loss" not in r] == [12]  # --eval-every
    # and what the checkpoint is good for
    again = run("--eval", out / "best.pt", *photographs.some, *TINY, "--out", tmp_path / "eval")
    assert "note: with --eval there is no effect of --init, --log-every" in again.stderr
    evaluated = json.loads((tmp_path / "eval/results.json").read_text())
    assert evaluated["AP"] == pytest.approx(results["AP"], abs=1e-6), again.stdout
    assert re.search(r".json: [\d,]+ boxes, ", again.stdout)  # what was left out of it is said here, too
    assert (evaluated["checkpoint"], evaluated["epoch"], evaluated["it"]) == (str(out / "best.pt"), 1, 12)
    photo = coco_mini / "val2017/000000000785.jpg"
    photo = photo if photo.exists() else next((coco_mini / "val2017").iterdir())
    run("--predict", photo, "--weights", out / "best.pt", "--score", 0.0, "--image-size", 128, "--out",
        tmp_path / "predict")
    (name, boxes), = json.loads((tmp_path / "predict/predictions.json").read_text()).items()
    assert Path(name).exists() and len(boxes) > 10
    assert len(list((tmp_path / "predict").glob("*_boxes.jpg"))) == 1


def test_own_files_whose_validation_knows_fewer_classes_in_another_order(own, tmp_path):
    flags = [*own.train, *own.val, "--student", "gfl_tiny8", "--method", "none", "--image-size", "96",
             "--workers", "0", "--init", own.start, "--batch-size", 4, "--epochs", 1]
    r = run(*flags, "--out", tmp_path / "o")
    assert re.search(r"27 images, 4 classes \| not used: .*3 images", r.stdout)
    assert "1 epochs of 6 steps" in r.stdout
    from pycocotools.coco import COCO
    found, results = (json.loads((tmp_path / f"o/{n}.json").read_text()) for n in ("detections", "results"))
    COCO(own.json).loadRes(found)  # the file's own ids
    assert {d["category_id"] for d in found} == {2, 5, 9} and len(found) > 100
    assert all(d["image_id"].startswith("photo ") for d in found)
    assert coco_evaluate(own.json, found)["AP"] == pytest.approx(results["AP"], abs=1e-6)
    assert list(results["classes"]) == ["circle", "triangle", "square"]
    run("--eval", tmp_path / "o/best.pt", *own.val, "--workers", "0", "--out", tmp_path / "e")
    again = json.loads((tmp_path / "e/results.json").read_text())
    assert again["AP"] == pytest.approx(results["AP"], abs=1e-6)
    assert load_checkpoint(tmp_path / "o/best.pt")["classes"] == own.classes


def test_ground_truth_is_perfect_in_this_scripts_evaluation(own, monkeypatch):
    flags = [*own.train, *own.val, "--image-size", "96", "--workers", "0"]
    args = crosskd.parse_args([str(f) for f in flags])
    val = crosskd.make_data(args, "val", "gfl", like=own.classes)

    def truth(model, batch, amp):
        (boxes,), (labels,), (size,) = (batch[k] for k in ("boxes", "labels", "sizes"))
        (h, w), = batch["original_sizes"]
        scale = torch.tensor([w / size[1], h / size[0]] * 2)
        return [(boxes[labels >= 0] * scale, torch.ones(len(labels))[labels >= 0], labels[labels >= 0])]
    monkeypatch.setattr(crosskd, "run_detector", truth)
    metrics, results = crosskd.evaluate(torch.nn.Identity(), val, 0, 1, torch.device("cpu"), args)
    assert metrics["AP"] == pytest.approx(100) and metrics["images"] == 8 and len(results) > 8


@pytest.mark.parametrize("federated", [False, True])
def test_classes_that_nobody_looked_for_are_not_judged_in_lvis_files(own, tmp_path, monkeypatch, federated):
    """The boxes of one class are gone from every other image, the detector finds them."""
    flags = ["--train-json", *map(str, own.train[1:]), "--val-images", str(own.val[3]), "--image-size", "96", "--workers", "0"]
    args = crosskd.parse_args([*flags, "--val-json", str(own.json)])
    every = {i: (torch.from_numpy(boxes), torch.ones(len(labels)), torch.from_numpy(labels))
             for i, _, _, _, boxes, labels in crosskd.make_data(args, "val", "gfl", like=own.classes).items}
    content = json.loads(Path(own.json).read_text())
    gone = {i["id"] for i in content["images"][::2]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in gone or a["category_id"] != 5]
    for i in content["images"] if federated else ():
        i["neg_category_ids"] = []
    (tmp_path / "few.json").write_text(json.dumps(content))
    args = crosskd.parse_args([*flags, "--val-json", str(tmp_path / "few.json")])
    few = crosskd.make_data(args, "val", "gfl", like=own.classes)
    monkeypatch.setattr(crosskd, "run_detector", lambda model, batch, amp: [every[batch["image_ids"][0]]])
    metrics, results = crosskd.evaluate(torch.nn.Identity(), few, 0, 1, torch.device("cpu"), args)
    assert (metrics["AP"] == pytest.approx(100)) == federated and len(results) == sum(len(k) for *_, k in every.values())


def test_without_a_validation_set_a_run_trains_says_so_and_best_is_the_last(own, tmp_path):
    base = [*own.train, "--student", "gfl_tiny8", "--method", "none", "--image-size", "96", "--workers", "0",
            "--init", "none", "--batch-size", 4, "--max-iters", 7]
    r = run(*base, "--keep-empty", "--out", tmp_path / "o")
    assert "no validation set: no evaluation, best.pt is the last" in r.stdout
    assert "no validation set: best.pt is the last" in r.stdout.splitlines()[-1]
    assert not re.search(r"27 images, 4 classes \| .*images", r.stdout)  # the empty ones are used
    assert "12 epochs of 7 steps" in r.stdout
    best, last = (load_checkpoint(tmp_path / "o" / f"{n}.pt") for n in ("best", "last"))
    assert checksum(best["model"]) == checksum(last["model"]) and best["it"] == last["it"] == 7
    assert not (tmp_path / "o/results.json").exists()


# ------------------------------------------------------------------ runs that are interrupted

SLOW = """
import crosskd, time
assign = crosskd.Distiller.assign
def slow(*args):
    time.sleep(0.08)
    return assign(*args)
crosskd.Distiller.assign = slow
"""


def test_killed_run_resumes_bit_exactly(forks, coco_mini, photographs, tmp_path):
    """SIGKILL in the middle of an epoch of 6 steps, after some save. While it lives nobody else runs in its
    folder, afterwards everybody may."""
    flags = [*photographs.train, *photographs.val, "--teacher", photographs.teacher, "--student", "gfl_tiny8",
             "--batch-size", 4, "--max-iters", 16, *TINY, "--image-size", 64,
             "--log-every", 2, "--save-every", 4, "--method", "crosskd+pkd", "--no-teacher-check"]
    run(*flags, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    job, = forks.start(*flags, "--out", out, before=SLOW)
    wait_for_step(out, 8)
    for second in ([*flags, "--out", out, "--resume"], ["--out", out, "--resume"]):
        assert f"process {job.pid} on " in fails(*second) and job.out.count("git ") == 1
    job.kill(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    killed_at = load_checkpoint(out / "last.pt")["it"]
    assert 8 <= killed_at < 16
    (out / ".last.pt.12345.tmp").write_bytes(b"what a process was writing when it died")
    with open(out / "log.jsonl", "a") as f:
        f.write('{"it": 99, "lo')
    run("--out", out, "--resume")  # the flags come from the checkpoint
    assert {p.name for p in out.iterdir() if p.name.startswith(".")} == set()
    same_end(out, tmp_path / "whole")
    assert [r["it"] for r in rows(out) if "loss" not in r] == [6, 12, 16]
    assert "total batch of 4" in fails("--out", out, "--resume", "--batch-size", 2)


def stopped(err, name, out, runner):
    """The flags of the command that continues, from the one line of a run that was stopped."""
    text = rf"crosskd.py: stopped by {name} at step (\d+), {out}/last.pt is written; "
    found = re.fullmatch(text + f"continue: {runner} crosskd.py (.*)", one_line(err))
    assert found and load_checkpoint(out / "last.pt")["it"] == int(found[1]), err
    return shlex.split(found[2])


def test_a_run_that_signals_stop_continues_bit_exactly_by_the_command_it_prints(forks, steps, tmp_path):
    """SIGTERM to the process, as kill sends it; SIGINT to its loader process, too, as a terminal does."""
    out, flags = tmp_path / "stopped", [*steps, "--max-iters", 15]
    forks.run(*flags, "--out", tmp_path / "whole")
    again = [*map(str, flags), "--out", str(out)]
    for number, code, more in ((signal.SIGTERM, 143, []), (signal.SIGINT, 130, ["--workers", "1"])):
        begun = max([r["it"] for r in rows(out)], default=0)
        job, = forks.start(*again, *more, before=SLOW)
        wait_for_step(out, begun + 4)
        (os.killpg if more else os.kill)(job.pid, number)
        assert job.wait() == code, job.err
        want = [f for f in (*again, *more) if f != "--resume"]
        again = stopped(job.err, number.name, out, "python")
        assert again == [*want, "--resume"]
    forks.run(*again, "--workers", 0)
    same_end(out, tmp_path / "whole")


def test_two_processes_stop_together_for_torchrun_a_signal_to_one_or_a_lost_one_and_continue_bit_exactly(
        forks, steps, tmp_path):
    out, flags = tmp_path / "stopped", [*steps, "--batch-size", 2, "--max-iters", 17]
    forks.run(*flags, "--out", tmp_path / "whole", procs=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                str(free_port()), "crosskd.py"]
    with open(tmp_path / "err", "w") as err:  # SIGTERM to torchrun, as Slurm sends it
        process = subprocess.Popen([*torchrun, *map(str, flags), "--out", str(out)], cwd=ROOT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                                   stdout=subprocess.DEVNULL, stderr=err, start_new_session=True)
        wait_for_step(out, 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    lines = [line for line in (tmp_path / "err").read_text().splitlines() if line.startswith("crosskd.py: ")]
    again = stopped("\n".join(lines), "SIGTERM", out, "torchrun --nproc_per_node 2")
    assert again == [*map(str, flags), "--out", str(out), "--resume"]
    assert "[rank" not in (tmp_path / "err").read_text()  # how torch begins a traceback

    jobs = forks.start(*again, procs=2, before=SLOW)
    wait_for_step(out, load_checkpoint(out / "last.pt")["it"] + 3)
    jobs[1].kill(signal.SIGINT)
    assert [job.wait() for job in jobs] == [130, 130]
    assert stopped(jobs[0].err, "SIGINT", out, "torchrun --nproc_per_node 2") == again
    assert jobs[1].err.strip() == ""

    jobs = forks.start(*again, procs=2, before=SLOW)
    wait_for_step(out, load_checkpoint(out / "last.pt")["it"] + 3)
    jobs[1].kill(signal.SIGKILL)
    assert [job.wait(30) for job in jobs] == [1, -signal.SIGKILL]
    assert "another process of this run is gone" in one_line(jobs[0].err)
    forks.run(*again, procs=2)
    same_end(out, tmp_path / "whole")


def test_a_second_signal_leaves_at_once(forks, steps, tmp_path):
    job, = forks.start(*steps, "--max-iters", 26, "--out", tmp_path / "o", before=SLOW.replace("0.08", "100"))
    wait_for_file(tmp_path / "o/last.pt")
    time.sleep(0.3)
    job.kill(signal.SIGTERM)
    time.sleep(1.2)  # torchrun and a terminal may both send the first
    since = time.time()
    job.kill(signal.SIGTERM)
    assert job.wait() == 143 and time.time() - since < 5
    assert load_checkpoint(tmp_path / "o/last.pt")["it"] == 0


def wait_for_file(path):
    end = time.time() + 60
    while not path.exists():
        assert time.time() < end
        time.sleep(0.01)


# ------------------------------------------------------------------ runs that starve

BROKEN = """
import crosskd, torch
make = crosskd.make_optimizer
def make_broken(*a):
    optimizer = make(*a)
    step, count = optimizer.step, []
    def broken():
        step()
        count.append(1)
        if len(count) == 8:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].view(-1)[5] = float("nan")
    optimizer.step = broken
    return optimizer
crosskd.make_optimizer = make_broken
"""


@pytest.mark.parametrize("procs", [1, 2])
def test_weights_that_are_not_finite_never_reach_last_pt(forks, steps, tmp_path, procs):
    jobs = forks.start(*steps, "--log-every", 50, "--batch-size", 4 // procs, "--max-iters", 26, "--out",
                       tmp_path / "o", procs=procs, before=BROKEN, env=dict(PATH=""))
    assert [job.wait() for job in jobs] == [1] * procs
    line = one_line(jobs[0].err)
    assert f"{tmp_path / 'o/last.pt'}: model.body.stages.conv1.weight is not finite at iteration 8" in line
    assert "previous one is intact" in line
    for job in jobs[1:]:
        one_line(job.err)
    last = load_checkpoint(tmp_path / "o/last.pt")
    assert last["it"] == 4
    assert all(v.isfinite().all() for v in last["model"].values() if v.is_floating_point())
    others = [p.name for p in (tmp_path / "o").iterdir() if p.suffix != ".pt"]
    assert sorted(others) == ["args.json", "log.jsonl"]
    assert json.loads((tmp_path / "o/args.json").read_text())["git"] == "none"  # a machine without git


FULL = """
import crosskd, resource
assign = crosskd.Distiller.assign
def late(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # as a full disk, from the first step on
    return assign(*args)
crosskd.Distiller.assign = late
"""


def test_a_full_disk_is_one_line_and_loses_nothing(forks, steps, tmp_path):
    job = forks.run(*steps, "--max-iters", 26, "--out", tmp_path / "o", before=FULL, code=1)
    assert f"{tmp_path / 'o/last.pt'}: checkpoint not written" in one_line(job.err)
    assert load_checkpoint(tmp_path / "o/last.pt")["it"] == 0 and max(losses(tmp_path / "o")) == 4
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["args.json", "last.pt", "log.jsonl"]


KILLED = """
whole_exit = True
import os, signal, common.datasets, torch
get = common.datasets.CocoDataset.__getitem__
def killed(self, key):
    if torch.utils.data.get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)  # as Linux does where memory runs out
    return get(self, key)
common.datasets.CocoDataset.__getitem__ = killed
"""
FILES = """
whole_exit = True
import os, resource
n = len(os.listdir("/proc/self/fd")) + 8
resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))
"""
SHM = """
import collections, shutil
usage = collections.namedtuple("usage", "total used free")
shutil.disk_usage = lambda path: usage(2 << 20, 0, 2 << 20)
"""
HANDOVER = """
whole_exit = True
import os, torch
main, share = os.getpid(), torch.UntypedStorage._share_fd_cpu_
def full(self, *a, **k):
    if os.getpid() != main:  # docker's 64 MB are used up when a loader process hands over its batch
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_9>: No space left (28)")
    return share(self, *a, **k)
torch.UntypedStorage._share_fd_cpu_ = full
"""


@pytest.mark.parametrize("before, word", [
    (KILLED, "a loader process died"), (SHM, "/dev/shm has 2 MB free"), (HANDOVER, "/dev/shm is too small"),
    (FILES, "ulimit -n")], ids=["killed", "shm", "handover", "files"])
def test_starved_loader_processes_are_one_line_with_the_remedy(forks, steps, tmp_path, before, word):
    job = forks.run(*steps, "--workers", 2, "--batch-size", 8, "--max-iters", 26, "--out", tmp_path / "o",
                    before=before, code=1)
    line = one_line(job.err)
    assert word in line and "--workers" in line
    if before != SHM:  # which is refused before the run begins
        assert load_checkpoint(tmp_path / "o/last.pt")["it"] == 0


def test_a_run_with_loader_processes_ends_when_it_is_done(forks, steps, tmp_path):
    since = time.time()
    job = forks.run(*steps, "--workers", 2, "--max-iters", 2, "--out", tmp_path / "o",
                    before="whole_exit = True")
    assert "Traceback" not in job.err and "Exception" not in job.err and time.time() - since < 20


def small_shapes(folder):
    """A folder like that of the embedded dataset, of 16 + 8 of its images."""
    folder.symlink_to(common.shapes.make_shapes(folder.parent / "drawn", train=16, val=8))
    return folder


def test_two_first_runs_on_shapes_share_one_teacher_and_one_that_finds_nothing_is_refused(forks, tmp_path):
    before = f"""
import common.shapes, common.tiny, crosskd, pathlib
common.tiny.SHIPPED = pathlib.Path("nothing")
common.tiny.shapes_backbone = lambda name, seed: "none"
common.shapes.make_shapes = lambda seed: pathlib.Path({str(small_shapes(tmp_path / "shapes-1"))!r})
crosskd.default_size = lambda *a: "48"
crosskd.rate_factor = lambda *a: 0.0  # so that the teacher learns nothing
"""
    flags = ["--data", "shapes", "--method", "pkd", "--max-iters", 2, "--workers", 0]
    jobs = [forks.start(*flags, "--out", tmp_path / "a", "--no-teacher-check", before=before)[0],
            forks.start(*flags, "--out", tmp_path / "b", before=before)[0]]
    assert [job.wait() for job in jobs] == [0, 1]
    assert sum("trained once, cached" in job.out for job in jobs) == 1
    assert os.listdir(tmp_path / "teachers") == ["crosskd-gfl_tiny32-e8-shapes-1"]
    assert all("teacher AP 0.0 on 8 validation images" in job.out for job in jobs)
    line = one_line(jobs[1].err)
    assert "AP 0.0 on 8 validation images" in line and "--no-teacher-check goes on" in line
    assert rows(tmp_path / "b") == []


def test_students_of_shapes_keep_stem_and_first_stage_of_their_backbone(quick_backbones, tmp_path, monkeypatch):
    folder = small_shapes(tmp_path / "shapes-1")
    monkeypatch.setattr(common.shapes, "make_shapes", lambda seed: folder)
    flags = ["--data", "shapes", "--method", "none", "--student", "gfl_tiny8", "--batch-size", 4, "--max-iters", 2,
             "--workers", 0]
    for init, same in (([], True), (["--init", "none"], False)):
        out = tmp_path / str(same)
        run(*flags, *init, "--out", out)
        weights = torch.load(out / "last.pt", weights_only=True)["model"]
        start = torch.load(next((tmp_path / "cache/clip").glob("*.pt")), weights_only=True)["model"]
        kept = [torch.equal(weights[f"body.stages.{name}"], value) for name, value in start.items()
                if name.startswith(("conv1", "bn1", "layer1"))]
        assert len(kept) > 5 and all(kept) == same
        assert not torch.equal(weights["body.stages.layer2.0.conv1.weight"], start["layer2.0.conv1.weight"])


# ------------------------------------------------------------------ processes, flags that change speed only

@pytest.mark.parametrize("method", ["none", "crosskd"])
def test_one_process_of_four_and_two_of_two_have_the_same_losses_for_20_steps(forks, tmp_path, method):
    """On shapes, where the images of a batch have one size: photographs are padded per process, and GroupNorm
    sees the padding."""
    pictures, boxes = find_coco(common.shapes.make_shapes().resolve(), "val")  # without evaluation
    teacher = checkpoint(tmp_path / "t.pt", CocoDataset(pictures, boxes, False).classes, "tiny16")
    flags = ["--train-json", boxes, "--train-images", pictures, "--student", "gfl_tiny8", "--max-iters", 20,
             "--image-size", 80, "--workers", 0, "--init", "none",
             "--log-every", 1, "--method", method, "--optimizer", "sgd", "--lr", "0.01",
             *(["--teacher", teacher, "--sync-stats"] if method == "crosskd" else [])]
    run(*flags, "--batch-size", 4, "--out", tmp_path / "one")
    forks.run(*flags, "--batch-size", 2, "--out", tmp_path / "two", procs=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    for it in one:
        for k in one[it]:
            assert two[it][k] == pytest.approx(one[it][k], rel=1e-5, abs=1e-5), (it, k)


def test_resume_before_the_first_checkpoint_starts_at_the_beginning(own, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/log.jsonl").write_text('{"it": 5, "loss": 1.0}\n')
    r = run(*own.train, "--student", "gfl_tiny8", "--method", "none", "--max-iters", 3, *TINY, "--out",
            tmp_path / "r", "--resume")
    assert "no last.pt yet" in r.stdout and list(losses(tmp_path / "r")) == [3]


def test_evaluation_needs_the_files_of_val_only(coco_mini, photographs, tmp_path):
    (tmp_path / "data/annotations").mkdir(parents=True)
    for name in ("val2017", "annotations/instances_val2017.json"):
        (tmp_path / "data" / name).symlink_to(coco_mini / name)
    weights = checkpoint(tmp_path / "w.pt", photographs.classes)
    r = run("--eval", weights, "--data", tmp_path / "data", *TINY[:4], "--out", tmp_path / "e")
    assert "79 images" in r.stdout


def test_table_of_shapes_trains_students_of_the_teachers_detector(tmp_path, monkeypatch):
    folder = small_shapes(tmp_path / "shapes-1")
    monkeypatch.setattr(common.shapes, "make_shapes", lambda seed: folder)
    teacher = checkpoint(tmp_path / "fcos.pt", CocoDataset(*find_coco(folder, "val"), False).classes,
                         "tiny16", "fcos")
    r = run("--data", "shapes", "--teacher", teacher, "--no-teacher-check", "--max-iters", 2,
            "--batch-size", 2, "--workers", 0, "--out", tmp_path / "t")
    assert r.stdout.count("student fcos_tiny16:") == 2 and "gfl" not in r.stdout
    lines = r.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[-5:-1]] == [
        "shapes, 8 validation images", "teacher fcos_tiny16", "student alone", "student with CrossKD"]
    assert lines.count(lines[-2]) == 2  # a row is told as soon as it is there, and again in the table
    assert Image.open(tmp_path / "t/comparison.jpg").width > 600 and "comparison.jpg" in lines[-1]
    shutil.rmtree(tmp_path / "t/crosskd")  # as if it had been killed before: --resume knows the flags
    again = run("--resume", "--out", tmp_path / "t")
    assert again.stdout.splitlines()[-2].split()[:6] == lines[-2].split()[:6]
    flags = json.loads((tmp_path / "t/crosskd/args.json").read_text())["args"]
    assert flags["teacher"] == str(teacher) and flags["batch_size"] == 2 and flags["max_iters"] == 2
    line = fails("--data", "shapes", "--teacher", teacher, "--out", tmp_path / "t")
    assert "holds a run already" in line
    wrong = checkpoint(tmp_path / "w.pt", list("abc"), "tiny16", "fcos")  # told before the plain student trains
    assert "has num_classes 3" in fails("--data", "shapes", "--teacher", wrong, "--out", tmp_path / "u")


def test_a_student_leaves_the_house_as_it_predicts_here(photographs, coco_mini, tmp_path):
    """load and predict_image give what --predict writes, for a path, a PIL image and a tensor; so does --row."""
    weights = checkpoint(tmp_path / "w.pt", photographs.classes, finds=True)
    file = sorted((coco_mini / "val2017").glob("*.jpg"))[3]
    run("--predict", file, "--weights", weights, "--score", 0.01, "--out", tmp_path / "p")
    (noted,), = [json.loads((tmp_path / "p/predictions.json").read_text()).values()]
    model, classes = crosskd.load(str(weights))
    with Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        answers = [crosskd.predict_image(model, classes, x, score=0.01) for x in (file, str(file), image, pixels)]
    for boxes, scores, names in answers:
        assert len(noted) == len(names) > 3 and names == [n["label"] for n in noted]
        assert torch.equal((boxes * 10).round(), (torch.tensor([n["box"] for n in noted]) * 10).round())
        assert scores.tolist() == pytest.approx([n["score"] for n in noted], abs=1e-4)
    with pytest.raises(UserError, match="expected uint8"):
        crosskd.predict_image(model, classes, pixels.float())


@pytest.mark.parametrize("kind", ["gfl", "fcos", "atss", "retinanet"])
def test_an_exported_student_gives_its_boxes_and_scores(tmp_path, kind):
    weights = checkpoint(tmp_path / "w.pt", ["a", "b", "c"], "tiny8", kind)
    r = run("--export", tmp_path / "s.pt2", "--weights", weights)
    assert "the same as in eager mode on other sizes" in r.stdout
    names = {"classes.json": ""}
    program = torch.export.load(tmp_path / "s.pt2", extra_files=names).module()
    assert json.loads(names["classes.json"]) == ["a", "b", "c"]
    model, _ = crosskd.load(str(weights))
    images = torch.randint(0, 256, (2, 3, 192, 224), dtype=torch.uint8)
    boxes, scores, cls_maps, _ = program(images)
    with torch.no_grad():
        maps = model(model.normalise(images)).maps
        (found, found_scores, labels), _ = model.detect(maps, torch.tensor([[192, 224]] * 2), score_thr=0.0, max_per_image=1)
    assert boxes.shape[:2] == scores.shape[:2] and scores.shape[2] == 3
    assert scores[0].max().item() == pytest.approx(found_scores[0].item(), rel=1e-5)
    best = scores[0].flatten().argmax()
    clipped = boxes[0, best // 3].clamp(min=0).minimum(torch.tensor([224.0, 192, 224, 192]))
    torch.testing.assert_close(clipped, found[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(cls_maps[0], maps["cls"][0], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_one_line(tmp_path):
    weights = checkpoint(tmp_path / "w.pt", ["a", "b", "c"])
    assert ".pt2 (torch.export) or .onnx" in fails("--export", tmp_path / "s.zip", "--weights", weights)
    if importlib.util.find_spec("onnxscript") is None:
        assert "pip install onnx" in fails("--export", tmp_path / "s.onnx", "--weights", weights)
    assert "--export needs --weights" in launch("crosskd", ["--export", tmp_path / "s.pt2"], fail=True).stderr
    assert "Swin" in fails("--export", tmp_path / "s.pt2", "--weights", checkpoint(tmp_path / "x.pt", ["a"], "swint"))


def test_a_row_sets_flags_an_explicit_one_wins_and_the_list_is_printed(own, tmp_path):
    teacher = checkpoint(tmp_path / "t.pt", own.classes, "tiny16")
    run("--row", "t4-N", *own.train, *own.val, "--teacher", teacher, "--student", "gfl_tiny8", "--init", "none",
        "--no-teacher-check", "--max-iters", 1, *TINY, "--out", tmp_path / "o")
    args = json.loads((tmp_path / "o/args.json").read_text())["args"]
    assert (args["row"], args["kd_cls_loss"], args["kd_region"]) == ("t4-N", "bce", "N")
    run("--resume", "--max-iters", 2, "--out", tmp_path / "o")
    assert max(losses(tmp_path / "o")) == 2
    assert "no such row; --rows lists them" in launch("crosskd", ["--row", "t99"], fail=True).stderr
    text = run("--rows").stdout
    assert len(text.splitlines()) == len(crosskd.ROWS) + 1 and "t5-r34" in text and "42.4" in text


def test_a_narrow_student_is_trained_through_its_adapter_and_resumed(own, tmp_path):
    teacher = checkpoint(tmp_path / "t.pt", own.classes, "tiny16")
    flags = [*own.train, *own.val, "--teacher", teacher, "--student", "gfl_tiny8", "--channels", 32, "--init", "none",
             "--no-teacher-check", *TINY]
    assert "--adapt" in fails(*flags, "--max-iters", 1, "--out", tmp_path / "refused")
    run(*flags, "--adapt", "--max-iters", 4, "--out", tmp_path / "whole")
    run(*flags, "--adapt", "--max-iters", 2, "--out", tmp_path / "o")
    run("--resume", "--max-iters", 4, "--out", tmp_path / "o")
    whole, resumed = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "o"))
    for part in ("model", "adapter"):
        assert checksum(whole[part]) == checksum(resumed[part])
    assert "adapter" not in load_checkpoint(tmp_path / "o/best.pt") and crosskd.load(tmp_path / "o/best.pt")[0].arch["channels"] == 32
    checkpoint(teacher, own.classes, "tiny16", seed=8)  # that file is another teacher now
    assert "was trained with another teacher than is there now" in fails("--resume", "--max-iters", 6, "--out", tmp_path / "o")


def test_a_start_of_another_kind_or_of_other_classes_is_refused(own, tmp_path):
    """ATSS and FCOS have the same keys and shapes; what they mean differs."""
    flags = [*own.train, "--method", "none", *TINY[:4], "--out", tmp_path / "o"]
    start = checkpoint(tmp_path / "a.pt", own.classes, "tiny8", "atss")
    assert "has kind atss, --student fcos" in fails(*flags, "--student", "fcos_tiny8", "--init", start)
    start = checkpoint(tmp_path / "b.pt", own.classes[::-1], "tiny8")
    assert "its class 0 is" in fails(*flags, "--student", "gfl_tiny8", "--init", start)


def test_accumulating_two_micro_batches_runs_and_counts_steps(photographs, tmp_path):
    r = run(*photographs.train, "--student", "fcos_tiny8", "--method", "none", "--batch-size", 4,
            "--accumulate", 2, "--epochs", 1, *TINY, "--out", tmp_path / "a")
    assert "4 x 1 x 2 = 8" in r.stdout and max(losses(tmp_path / "a")) == 3  # of 24 images


@pytest.fixture(scope="module")
def evaluated(forks, photographs, tmp_path_factory):
    """Flags of an evaluation, and the result files of one process."""
    out = tmp_path_factory.mktemp("one")
    flags = ["--eval", photographs.start, *photographs.some, "--image-size", 64, "--workers", 0]
    forks.run(*flags, "--out", out)
    return flags, out


@pytest.mark.parametrize("procs", [2, 3])
def test_evaluation_is_identical_on_1_2_and_3_processes(forks, evaluated, tmp_path, procs):
    flags, alone = evaluated
    forks.run(*flags, "--out", tmp_path, procs=procs)
    one, many = (json.loads((out / "results.json").read_text()) for out in (alone, tmp_path))
    del one["seconds"], many["seconds"]
    assert one == many
    key = lambda d: (d["image_id"], d["category_id"], d["score"], d["bbox"])
    a, b = (sorted(map(key, json.loads((out / "detections.json").read_text()))) for out in (alone, tmp_path))
    assert a == b and len(a) > 1000


@pytest.fixture(scope="module")
def first_steps(photographs, tmp_path_factory):
    """Flags of three steps, and their log."""
    out = tmp_path_factory.mktemp("plain")
    flags = [*photographs.train, "--teacher", photographs.teacher, "--student", "gfl_tiny8",
             "--batch-size", 2, "--max-iters", 3, *TINY[:-1], 1]
    run(*flags, "--out", out)
    return flags, losses(out)


@pytest.mark.parametrize("flags", [["--amp", "bf16"]])
def test_speed_flags_run_and_keep_the_first_losses_close(first_steps, tmp_path, flags):
    base, plain = first_steps
    run(*base, *flags, "--out", tmp_path / "fast")
    plain, fast = plain[1], losses(tmp_path / "fast")[1]
    for k in ("cls", "box", "dfl", "kd_cls", "kd_box"):
        assert fast[k] == pytest.approx(plain[k], rel=0.05 if flags[0] == "--amp" else 1e-4), k


# ------------------------------------------------------------------ bad input: one line, nothing lost

def test_a_wrong_input_ends_the_process_with_one_line_and_no_traceback(forks, tmp_path):
    job = forks.run("--data", tmp_path, "--student", "gfl_tiny8", "--method", "none", "--init", "none",
                    "--out", tmp_path / "o", before="whole_exit = True", code=1)
    assert one_line(job.err).startswith("crosskd.py: --data")


def test_missing_data_says_which_file_and_that_shapes_needs_nothing(tmp_path):
    line = fails("--data", tmp_path, "--student", "gfl_tiny8", "--method", "none", "--init", "none", "--out",
                 tmp_path / "o")
    assert "instances_train2017.json" in line and "shapes" in line


@pytest.mark.parametrize("flags", ["", "--teacher gfl_r50", "--method none",
                                   "--method none --student gfl_r18 --init imagenet", "--eval gfl_r101",
                                   "--train-json {0}/a.json --train-images {0}"])
def test_what_is_missing_is_told_before_anything_is_downloaded(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(zoo, "fetch", lambda url, sha256="": pytest.fail(f"downloads {url}"))
    line = fails("--data", tmp_path, *flags.format(tmp_path).split(), "--out", tmp_path / "o")
    assert any(word in line for word in ("a.json", "--data shapes"))


def test_a_picture_that_is_missing_is_told_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "fetch", lambda url, sha256="": pytest.fail(f"downloads {url}"))
    assert "nothing.jpg" in fails("--predict", "nothing.jpg", "--weights", "gfl_r50", "--out", tmp_path / "o")


def test_a_teacher_that_cannot_fit_is_told_before_it_is_downloaded(own, coco_mini, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "fetch", lambda url, sha256="": pytest.fail(f"downloads {url}"))
    for flags, word in ((own.train, "num_classes 80, --student 4"),
                        (["--data", coco_mini, "--student", "gfl_tiny8"], "channels 256, --student 64"),
                        (["--data", coco_mini, "--teacher", "gfl_r50", "--student", "atss_r50"], "kind gfl")):
        assert word in fails(*flags, "--out", tmp_path / "o")


def test_imagenet_weights_that_cannot_be_downloaded_name_the_way_without_them(own, tmp_path, monkeypatch):
    def offline(*a):
        raise URLError("Name or service not known")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    line = fails(*own.train, "--method", "none", "--student", "gfl_r18", "--out", tmp_path / "o")
    assert "resnet18" in line and "Offline?" in line and "--init none" in line


def test_an_out_folder_that_cannot_be_made_is_one_line(own, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / ("x" * 300), tmp_path / "file", tmp_path / "file/sub"):
        for flags in ([*own.train, "--method", "none", "--student", "gfl_tiny8", "--init", "none"],
                      ["--eval", own.start, *own.val], ["--predict", own.val[3], "--weights", own.start]):
            assert "--out " in fails(*flags, "--out", out)


@pytest.mark.parametrize("script, mark", [("hierkd.py", "rpn"), ("dkdetr.py", "queries"),
                                          ("prototype_kd.py", "columns"), ("simple21k.py", "pair")])
def test_a_checkpoint_of_another_script_is_refused_by_its_name(own, tmp_path, script, mark):
    save_checkpoint(dict(script=script, arch=dict(backbone="r50"), classes=["a"],
                         model=dict(w=torch.zeros(1)), epoch=1, it=9), tmp_path / "best.pt")
    # of before checkpoints named their script
    torch.save(dict(arch={mark: 1}, model=dict(w=torch.zeros(1))), tmp_path / "old.pt")
    for name in ("best.pt", "old.pt"):
        path = tmp_path / name
        for flags in (["--eval", path], ["--predict", own.val[3], "--weights", path],
                      [*own.train, "--init", "none", "--teacher", path],
                      [*own.train, "--method", "none", "--student", "gfl_tiny8", "--init", path]):
            line = fails(*flags, "--out", tmp_path / "o")
            assert f"is a checkpoint of {script}, not of crosskd.py" in line
    state = dict(script=script, arch=dict(backbone="r50"), model=dict(w=torch.zeros(1)), optimizer={},
                 rng=[{}], it=9, total_batch=4, args={})
    save_checkpoint(state, tmp_path / "last.pt")
    assert f"is a checkpoint of {script}" in fails(*own.train, "--student", "gfl_tiny8", "--init", "none",
                                                   "--method", "none", "--resume", "--out", tmp_path)


def test_an_own_checkpoint_that_does_not_fit_together_is_one_line(own, tmp_path):
    whole = load_checkpoint(own.start)
    arch = whole["arch"]
    for change, word in (
            (dict(classes=["a"]), "names 1 classes"), (dict(classes=3), "does not describe a network"),
            (dict(arch=arch | dict(kind="yolo")), "does not describe a network"),
            (dict(arch=dict(p6="on_input")), "does not describe a network"),
            (dict(arch=arch | dict(num_classes=7)), "of another shape"), (dict(model={}), "missing")):
        state = {k: v for k, v in (whole | change).items() if k not in ("format", "checksum")}
        save_checkpoint(state, tmp_path / "w.pt")
        assert word in fails("--predict", own.val[3], "--weights", tmp_path / "w.pt", "--out", tmp_path / "o")


def test_truncated_jpeg_is_named_also_from_a_loader_worker(coco_mini, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(coco_mini, data)
    for image in (data / "train2017").iterdir():
        image.chmod(0o644)
    (data / "train2017").chmod(0o755)
    first = json.loads((data / "annotations/instances_train2017.json").read_text())["images"][0]["file_name"]
    for image in (data / "train2017").iterdir():
        if image.name != first:  # which a run reads itself, before its loaders, to know its size
            image.write_bytes(image.read_bytes()[:3000])
    line = fails("--data", data, "--student", "gfl_tiny8", "--method", "none", "--init", "none",
                 "--image-size", 64, "--out", tmp_path / "o", "--workers", 1)
    assert re.search(r"train2017/\d{12}\.jpg: cannot be decoded", line)


@pytest.mark.parametrize("make, word", [
    (lambda p: p.write_bytes(b"not a checkpoint"), "not a readable checkpoint"),
    (lambda p: torch.save({"state_dict": {"a": torch.zeros(1)}}, p), "neither ours nor"),
    (lambda p: torch.save([1, 2], p), "holds a list"),
    (lambda p: torch.save({"model": p}, p), "pickled pathlib.PosixPath")])
def test_foreign_or_corrupt_teacher_is_refused(coco_mini, tmp_path, make, word):
    make(tmp_path / "t.pth")
    assert word in fails("--data", coco_mini, "--teacher", tmp_path / "t.pth", "--out", tmp_path / "o",
                         "--init", "none")


def test_unknown_teacher_name_lists_the_known_ones(coco_mini, tmp_path):
    assert "retinanet_swint" in fails("--data", coco_mini, "--teacher", "gfl_r999", "--out", tmp_path / "o",
                                      "--init", "none")


def test_teacher_of_other_class_count_is_refused_before_training(coco_mini, tmp_path):
    checkpoint(tmp_path / "t.pt", list("abcde"))
    line = fails("--data", coco_mini, "--teacher", tmp_path / "t.pt", "--student", "gfl_tiny8", "--out",
                 tmp_path / "o", "--init", "none")
    assert "num_classes 5" in line and "80" in line


def test_teacher_of_another_kind_is_refused(coco_mini, photographs, tmp_path):
    assert "kind gfl" in fails("--data", coco_mini, "--teacher", photographs.teacher, "--student",
                               "atss_tiny8", "--out", tmp_path / "o", "--init", "none")


def test_wrong_p6_shape_in_an_mmdet_file_is_named(golden, own, tmp_path):
    keys = json.loads((golden / "mmdet_keys/retinanet_r18.json").read_text())
    state = {k: torch.zeros(s, dtype=getattr(torch, d)) for k, (s, d) in keys.items()}
    state["neck.fpn_convs.3.conv.weight"] = torch.zeros(256, 300, 3, 3)
    torch.save({"meta": {"config": "a"}, "state_dict": state}, tmp_path / "p6.pth")
    assert "p6.weight (256, 300, 3, 3) instead of (256, 512, 3, 3)" in fails("--eval", tmp_path / "p6.pth",
        *own.val, "--out", tmp_path / "o")


def test_missing_key_in_an_mmdet_file_is_named(golden, own, tmp_path):
    keys = json.loads((golden / "mmdet_keys/retinanet_r18.json").read_text())
    state = {k: torch.zeros(s, dtype=getattr(torch, d)) for k, (s, d) in keys.items()}
    del state["bbox_head.cls_convs.2.conv.bias"]
    torch.save({"meta": {"config": "a"}, "state_dict": state}, tmp_path / "k.pth")
    assert "1 missing (first head.cls_tower.2.conv.bias)" in fails("--eval", tmp_path / "k.pth", *own.val,
                                                                   "--out", tmp_path / "o")


def test_run_folder_of_another_run_is_not_overwritten(coco_mini, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o/log.jsonl").write_text('{"it": 1}\n')
    assert "--resume" in fails("--data", coco_mini, "--student", "gfl_tiny8", "--method", "none", "--init",
                               "none", "--out", tmp_path / "o")
    assert (tmp_path / "o/log.jsonl").read_text() == '{"it": 1}\n'


def test_nan_loss_stops_with_step_and_terms_and_keeps_the_last_checkpoint(coco_mini, tmp_path):
    line = fails("--data", coco_mini, "--student", "gfl_tiny8", "--method", "none", "--batch-size", 2, "--lr",
                 "1e9", "--optimizer", "sgd", *TINY,
                 "--max-iters", 40, "--epochs", 1, "--out", tmp_path / "o")
    assert re.search(r"not finite at iteration \d+: cls=", line)
    last = torch.load(tmp_path / "o/last.pt", weights_only=True)
    assert last["it"] == 0 and all(v.isfinite().all() for v in last["model"].values()
                                   if v.is_floating_point())  # the start, and nothing bad


def test_a_rank_without_boxes_trains_on(forks, coco_mini, photographs, tmp_path):
    """Two processes, one image each; half of the images lose their boxes (crowd-only), so ranks without boxes
    occur at most steps."""
    data = tmp_path / "data"
    (data / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (data / f"{split}2017").symlink_to(coco_mini / f"{split}2017")
        raw = json.loads((coco_mini / f"annotations/instances_{split}2017.json").read_text())
        for a in raw["annotations"]:
            a["iscrowd"] = int(a["image_id"] % 2 == 0 or a["iscrowd"])
            if a["iscrowd"] and not isinstance(a["segmentation"], dict):
                a["segmentation"] = {"size": [1, 1], "counts": [1]}
        (data / f"annotations/instances_{split}2017.json").write_text(json.dumps(raw))
    forks.run("--train-json", data / "annotations/instances_train2017.json", "--train-images",
              data / "train2017", "--teacher", photographs.teacher,
              "--student", "gfl_tiny8", "--batch-size", 1, "--max-iters", 8, *TINY, "--image-size", 64,
              "--method", "crosskd+pkd", "--out", tmp_path / "o", procs=2)
    assert len(losses(tmp_path / "o")) >= 1
