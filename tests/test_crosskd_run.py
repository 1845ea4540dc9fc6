"""crosskd.py from its command line: real photographs, two processes, kill and resume, bad input."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import crosskd
from common.datasets import CocoDataset, find_coco
from common.shapes import make_shapes

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--image-size", "128", "--workers", "0", "--init", "none", "--log-every", "5"]


def run(*flags, procs=1, check=True, **kw):
    port = socket.socket()
    port.bind(("127.0.0.1", 0))
    launch = [sys.executable] if procs == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(procs),
                                                  "--master_port", str(port.getsockname()[1])]
    port.close()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    r = subprocess.run([*launch, "crosskd.py", *map(str, flags)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=150, **kw)
    if check:
        assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-3000:]
    return r


def losses(out):
    """(iteration, loss) rows of a log."""
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {r["it"]: {k: v for k, v in r.items() if k not in ("data", "step", "mem", "seconds")} for r in rows if "loss" in r}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A GFL with a narrow backbone and 80 classes, as a checkpoint of ours: what it knows does not matter here."""
    torch.manual_seed(7)
    model = crosskd.GFL("tiny16", 80, 64)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    classes = CocoDataset(*find_coco(ROOT.parent / "shared/data/coco_mini", "val"), False).classes
    torch.save(crosskd.weights_of(model, classes), path)
    return path


def test_two_processes_train_on_real_photographs_evaluate_and_leave_all_files(coco_mini, teacher, tmp_path):
    r = run("--data", coco_mini, "--teacher", teacher, "--student", "gfl_tiny8", "--batch-size", 4, "--max-iters", 12, *TINY,
            "--out", tmp_path / "run", procs=2)
    out = tmp_path / "run"
    assert "80 classes" in r.stdout and "batch 4 x 2 x 1 = 8" in r.stdout and "79 images" in r.stdout
    assert sorted(p.name for p in out.iterdir()) == ["args.json", "best.pt", "curves.png", "detections.json", "last.pt", "log.jsonl", "results.json", "samples.jpg"]
    results = json.loads((out / "results.json").read_text())
    assert len(results["classes"]) == 80 and results["images"] == 79
    from pycocotools.coco import COCO
    found = json.loads((out / "detections.json").read_text())
    if found:
        COCO(coco_mini / "annotations/instances_val2017.json").loadRes(found)
    again = run("--eval", out / "last.pt", "--data", coco_mini, *TINY, "--out", tmp_path / "eval")
    assert json.loads((tmp_path / "eval/results.json").read_text())["AP"] == pytest.approx(results["AP"], abs=1e-6), again.stdout
    run("--predict", coco_mini / "val2017/000000000785.jpg" if (coco_mini / "val2017/000000000785.jpg").exists() else next((coco_mini / "val2017").iterdir()),
        "--weights", out / "best.pt", "--score", 0.0, *TINY[:2], "--out", tmp_path / "predict")
    (name, boxes), = json.loads((tmp_path / "predict/predictions.json").read_text()).items()
    assert Path(name).exists() and len(list((tmp_path / "predict").glob("*_boxes.jpg"))) == 1


def test_killed_run_resumes_bit_exactly(coco_mini, teacher, tmp_path):
    flags = ["--data", coco_mini, "--teacher", teacher, "--student", "gfl_tiny8", "--batch-size", 4, "--max-iters", 30, *TINY, "--save-every", 5,
             "--method", "crosskd+pkd"]
    run(*flags, "--out", tmp_path / "whole")
    process = subprocess.Popen([sys.executable, "crosskd.py", *map(str, flags), "--out", str(tmp_path / "killed")], cwd=ROOT, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed/log.jsonl"
    for _ in range(600):  # SIGKILL in the middle of an epoch of 20 steps, after some save
        if log.exists() and len(log.read_text().splitlines()) >= 3:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = torch.load(tmp_path / "killed/last.pt", weights_only=True)["it"]
    assert 5 <= killed_at < 30
    run("--out", tmp_path / "killed", "--resume")  # the flags come from the checkpoint
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert "total batch of 4" in fails("--out", tmp_path / "killed", "--resume", "--batch-size", 2)
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "killed"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert all(torch.equal(x["exp_avg" if "exp_avg" in x else "momentum_buffer"], y["exp_avg" if "exp_avg" in y else "momentum_buffer"])
               for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()))


@pytest.mark.parametrize("method", ["none", "crosskd"])
def test_one_process_of_four_and_two_of_two_have_the_same_losses_for_20_steps(tmp_path, method):
    """On shapes, where the images of a batch have one size: photographs are padded per process, and GroupNorm sees the padding."""
    torch.manual_seed(7)
    torch.save(crosskd.weights_of(crosskd.GFL("tiny16", 20, 64), CocoDataset(*find_coco(make_shapes(), "val"), False).classes), tmp_path / "t.pt")
    flags = ["--data", "shapes", "--teacher", tmp_path / "t.pt", "--student", "gfl_tiny8", "--max-iters", 20, "--image-size", 96, "--workers", 0,
             "--log-every", 1, "--method", method, "--sync-stats", "--optimizer", "sgd", "--lr", "0.01"]
    run(*flags, "--batch-size", 4, "--out", tmp_path / "one")
    run(*flags, "--batch-size", 2, "--out", tmp_path / "two", procs=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    for it in one:
        for k in one[it]:
            assert two[it][k] == pytest.approx(one[it][k], rel=1e-5, abs=1e-5), (it, k)


def test_resume_before_the_first_checkpoint_starts_at_the_beginning(coco_mini, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/log.jsonl").write_text('{"it": 5, "loss": 1.0}\n')
    r = run("--data", coco_mini, "--student", "gfl_tiny8", "--method", "none", "--max-iters", 3, *TINY, "--out", tmp_path / "r", "--resume")
    assert "no last.pt yet" in r.stdout and list(losses(tmp_path / "r")) == [3]


def test_evaluation_needs_the_files_of_val_only(coco_mini, tmp_path):
    (tmp_path / "data/annotations").mkdir(parents=True)
    for name in ("val2017", "annotations/instances_val2017.json"):
        (tmp_path / "data" / name).symlink_to(coco_mini / name)
    torch.save(crosskd.weights_of(crosskd.GFL("tiny8", 80, 64), CocoDataset(*find_coco(coco_mini, "val"), False).classes), tmp_path / "w.pt")
    assert "79 images" in run("--eval", tmp_path / "w.pt", "--data", tmp_path / "data", *TINY[:4], "--out", tmp_path / "e").stdout


def test_table_of_shapes_trains_students_of_the_teachers_detector(tmp_path):
    classes = CocoDataset(*find_coco(make_shapes(), "val"), False).classes
    torch.save(crosskd.weights_of(crosskd.FCOS("tiny16", 20, 64), classes), tmp_path / "fcos.pt")
    r = run("--data", "shapes", "--teacher", tmp_path / "fcos.pt", "--max-iters", 2, "--batch-size", 2, "--workers", 0, "--out", tmp_path / "t")
    assert r.stdout.count("student fcos_tiny8:") == 2 and "gfl" not in r.stdout
    assert [line.split("  ")[0] for line in r.stdout.splitlines()[-3:]] == ["teacher fcos_tiny16", "student alone", "student with CrossKD"]


def test_accumulating_two_micro_batches_runs_and_counts_steps(coco_mini, tmp_path):
    r = run("--data", coco_mini, "--student", "fcos_tiny8", "--method", "none", "--batch-size", 4, "--accumulate", 2, "--epochs", 1, *TINY, "--out", tmp_path / "a")
    assert "4 x 1 x 2 = 8" in r.stdout and max(losses(tmp_path / "a")) == 10


@pytest.mark.parametrize("procs", [2, 3])
def test_evaluation_is_identical_on_1_2_and_3_processes(coco_mini, tmp_path, procs):
    torch.manual_seed(1)
    model = crosskd.GFL("tiny8", 80, 64)
    for p in model.head.parameters():
        if p.ndim == 4:
            torch.nn.init.normal_(p, std=0.06)
    torch.nn.init.constant_(model.head.cls_pred.bias, -2.5)  # so that it finds something
    torch.save(crosskd.weights_of(model, CocoDataset(*find_coco(coco_mini, "val"), False).classes), tmp_path / "w.pt")
    for n in (1, procs):
        run("--eval", tmp_path / "w.pt", "--data", coco_mini, *TINY, "--out", tmp_path / str(n), procs=n)
    one, many = (json.loads((tmp_path / str(n) / "results.json").read_text()) for n in (1, procs))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in many.items() if k != "seconds"}
    key = lambda d: (d["image_id"], d["category_id"], d["score"], d["bbox"])
    a, b = (sorted(map(key, json.loads((tmp_path / str(n) / "detections.json").read_text()))) for n in (1, procs))
    assert a == b and len(a) > 1000


@pytest.mark.parametrize("flags", [["--amp", "bf16"], ["--channels-last"]])
def test_speed_flags_run_and_keep_the_first_losses_close(coco_mini, teacher, tmp_path, flags):
    base = ["--data", coco_mini, "--teacher", teacher, "--student", "gfl_tiny8", "--batch-size", 2, "--max-iters", 3, *TINY[:-1], 1]
    run(*base, "--out", tmp_path / "plain")
    run(*base, *flags, "--out", tmp_path / "fast")
    plain, fast = losses(tmp_path / "plain")[1], losses(tmp_path / "fast")[1]
    for k in ("cls", "box", "dfl", "kd_cls", "kd_box"):
        assert fast[k] == pytest.approx(plain[k], rel=0.05 if flags[0] == "--amp" else 1e-4), k


# ------------------------------------------------------------------ bad input: one clear line, no traceback, nothing lost

def fails(*flags):
    """The one line that the script ends with, run in this process (an exit with a text is no traceback)."""
    old, sys.argv = sys.argv, ["crosskd.py", *map(str, flags)]
    try:
        with pytest.raises(SystemExit) as e:
            crosskd.main()
    finally:
        sys.argv = old
    assert isinstance(e.value.code, str) and e.value.code.startswith("\ncrosskd.py: ")
    assert len(e.value.code.strip().splitlines()) == 1
    return e.value.code.strip()


def test_a_wrong_input_ends_the_process_with_one_line_and_no_traceback(tmp_path):
    r = run("--data", tmp_path, "--student", "gfl_tiny8", "--method", "none", "--init", "none", "--out", tmp_path / "o", check=False)
    assert r.returncode == 1 and "Traceback" not in r.stderr and r.stderr.strip().splitlines()[-1].startswith("crosskd.py: --data")


def test_missing_data_says_which_file_and_that_shapes_needs_nothing(tmp_path):
    line = fails("--data", tmp_path, "--student", "gfl_tiny8", "--method", "none", "--init", "none", "--out", tmp_path / "o")
    assert "instances_train2017.json" in line and "shapes" in line


def test_truncated_jpeg_is_named_also_from_a_loader_worker(coco_mini, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(coco_mini, data)
    for image in (data / "train2017").iterdir():
        image.chmod(0o644)
    (data / "train2017").chmod(0o755)
    for image in sorted((data / "train2017").iterdir())[:40]:
        image.write_bytes(image.read_bytes()[:3000])
    line = fails("--data", data, "--student", "gfl_tiny8", "--method", "none", "--init", "none", "--image-size", 64, "--out", tmp_path / "o", "--workers", 1)
    assert re.search(r"train2017/\d{12}\.jpg: cannot be decoded", line)


@pytest.mark.parametrize("make, word", [
    (lambda p: p.write_bytes(b"not a checkpoint"), "not a readable checkpoint"),
    (lambda p: torch.save({"state_dict": {"a": torch.zeros(1)}}, p), "neither ours nor"),
    (lambda p: torch.save([1, 2], p), "holds a list"),
    (lambda p: torch.save({"model": p}, p), "pickled objects")])
def test_foreign_or_corrupt_teacher_is_refused(coco_mini, tmp_path, make, word):
    make(tmp_path / "t.pth")
    assert word in fails("--data", coco_mini, "--teacher", tmp_path / "t.pth", "--out", tmp_path / "o", "--init", "none")


def test_unknown_teacher_name_lists_the_known_ones(coco_mini, tmp_path):
    assert "retinanet_swint" in fails("--data", coco_mini, "--teacher", "gfl_r999", "--out", tmp_path / "o", "--init", "none")


def test_teacher_of_other_class_count_is_refused_before_training(coco_mini, tmp_path):
    torch.save(crosskd.weights_of(crosskd.GFL("tiny8", 5, 64), list("abcde")), tmp_path / "t.pt")
    line = fails("--data", coco_mini, "--teacher", tmp_path / "t.pt", "--student", "gfl_tiny8", "--out", tmp_path / "o", "--init", "none")
    assert "num_classes 5" in line and "80" in line


def test_teacher_of_another_kind_is_refused(coco_mini, teacher, tmp_path):
    assert "kind gfl" in fails("--data", coco_mini, "--teacher", teacher, "--student", "atss_tiny8", "--out", tmp_path / "o", "--init", "none")


def test_wrong_p6_shape_in_an_mmdet_file_is_named(golden, tmp_path):
    keys = json.loads((golden / "mmdet_keys/retinanet_r18.json").read_text())
    state = {k: torch.zeros(s, dtype=getattr(torch, d)) for k, (s, d) in keys.items()}
    state["neck.fpn_convs.3.conv.weight"] = torch.zeros(256, 300, 3, 3)
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "p6.pth")
    assert "p6.weight (256, 300, 3, 3) instead of (256, 512, 3, 3)" in fails("--eval", tmp_path / "p6.pth", "--data", "x", "--out", tmp_path / "o")


def test_missing_key_in_an_mmdet_file_is_named(golden, tmp_path):
    keys = json.loads((golden / "mmdet_keys/retinanet_r18.json").read_text())
    state = {k: torch.zeros(s, dtype=getattr(torch, d)) for k, (s, d) in keys.items()}
    del state["bbox_head.cls_convs.2.conv.bias"]
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "k.pth")
    assert "1 missing (first head.cls_tower.2.conv.bias)" in fails("--eval", tmp_path / "k.pth", "--data", "x", "--out", tmp_path / "o")


def test_run_folder_of_another_run_is_not_overwritten(coco_mini, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o/log.jsonl").write_text('{"it": 1}\n')
    assert "--resume" in fails("--data", coco_mini, "--student", "gfl_tiny8", "--method", "none", "--init", "none", "--out", tmp_path / "o")
    assert (tmp_path / "o/log.jsonl").read_text() == '{"it": 1}\n'


def test_nan_loss_stops_with_step_and_terms_and_keeps_the_last_checkpoint(coco_mini, tmp_path):
    line = fails("--data", coco_mini, "--student", "gfl_tiny8", "--method", "none", "--batch-size", 2, "--lr", "1e9", "--optimizer", "sgd", *TINY,
                 "--max-iters", 40, "--epochs", 1, "--out", tmp_path / "o")
    assert re.search(r"not finite at iteration \d+: cls=", line)
    last = torch.load(tmp_path / "o/last.pt", weights_only=True)
    assert last["it"] == 0 and all(v.isfinite().all() for v in last["model"].values() if v.is_floating_point())  # the start, and nothing bad


def test_a_rank_without_boxes_trains_on(coco_mini, teacher, tmp_path):
    """Two processes, one image each; half of the images lose their boxes (crowd-only), so ranks without boxes occur at most steps."""
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
    run("--data", data, "--teacher", teacher, "--student", "gfl_tiny8", "--batch-size", 1, "--max-iters", 8, *TINY, "--method", "crosskd+pkd", "--out", tmp_path / "o", procs=2)
    assert len(losses(tmp_path / "o")) >= 1
