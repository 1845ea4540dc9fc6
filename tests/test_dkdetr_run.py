# SPDX-License-Identifier: MIT
"""dkdetr.py from its command line: COCO, LVIS with masks and VOC photographs, two processes, burn-in, kill and resume, prediction, bad input."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.datasets import NOVEL_17
from common.run import save_checkpoint
from common.shapes import make_shapes
from common.tiny import tiny_clip
from conftest import ROOT, killed, launch

run = lambda *flags, **how: launch("dkdetr", flags, **how)
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP: what it knows does not matter here."""
    folder = tmp_path_factory.mktemp("clip")
    return tiny_clip(make_shapes(folder, train=24, val=12), folder, steps=1, objects=4, scenes=2)


@pytest.fixture
def small(clip):
    return ["--clip", clip, "--templates", "one", "--backbone", "tiny8", "--init", "none", "--image-size", "128", "--jitter", "0.5", "1.5", "--dim", "32", "--hidden", "32",
            "--levels", "3", "--encoder", "1", "--decoder", "2", "--queries", "30", "--workers", "0", "--batch-size", "4", "--log-every", "2", "--kd-min-size", "4"]


def some_images(source, target, chosen):
    """A json of annotations with these images only."""
    raw = json.loads(source.read_text())
    raw["images"] = [i for i in raw["images"] if i["id"] in chosen]
    raw["annotations"] = [a for a in raw["annotations"] if a["image_id"] in chosen]
    target.write_text(json.dumps(raw))


@pytest.fixture(scope="module")
def few(coco_mini, tmp_path_factory):
    """coco_mini with 12 of its validation photographs, most with novel objects: an evaluation takes a second."""
    root, source = tmp_path_factory.mktemp("few"), coco_mini / "annotations/instances_val2017.json"
    (root / "annotations").mkdir()
    for name in ("train2017", "val2017", "annotations/instances_train2017.json"):
        os.symlink(coco_mini / name, root / name)
    raw = json.loads(source.read_text())
    novel = {c["id"] for c in raw["categories"] if c["name"] in NOVEL_17}
    holds = sorted({a["image_id"] for a in raw["annotations"]}, key=lambda i: -sum(a["image_id"] == i and a["category_id"] in novel for a in raw["annotations"]))
    some_images(source, root / "annotations/instances_val2017.json", set(holds[:12]))
    return root


@pytest.fixture
def lvis(coco_mini, tmp_path):
    """coco_mini's objects in the layout of LVIS v1, with 20 photographs to evaluate on."""
    source = coco_mini.parent / "lvis_mini" / "annotations"
    (tmp_path / "lvis/annotations").mkdir(parents=True)
    os.symlink(source / "coco_mini_as_lvis_v1_train.json", tmp_path / "lvis/annotations/lvis_v1_train.json")
    val = source / "coco_mini_as_lvis_v1_val.json"
    chosen = [i["id"] for i in json.loads(val.read_text())["images"]][:20]
    some_images(val, tmp_path / "lvis/annotations/lvis_v1_val.json", set(chosen))
    return ["--dataset", "lvis", "--data", tmp_path / "lvis", "--images", coco_mini]


def losses(out):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {r["it"]: {k: v for k, v in r.items() if k not in ("data", "step", "mem", "seconds")} for r in rows if "loss" in r}


def test_two_processes_train_across_the_burn_in_evaluate_and_predict(small, coco_mini, tmp_path):
    out = tmp_path / "run"
    data = ["--dataset", "ovcoco", "--data", coco_mini]
    r = run(*data, *small, "--epochs", 2, "--burn-in", 1, "--out", out, procs=2, torchrun=True)
    said = " ".join(r.stdout.split())  # lines are folded
    assert "48 base and 17 novel classes" in said and "novel_AP50" in said and "batch 4 x 2 x 1 = 8" in said
    assert re.search(r"student DK-DETR tiny8: [\d,]+ parameters, [\d,]+ trained, [\d.]+ GFLOPs at 128 x 128", said) and "teacher CLIP tiny-" in said
    assert "skd: Eq. 4" in said and "best base AP50" in said
    rows = losses(out)
    steps = max(rows)
    assert "skd" not in rows[2] and {"skd", "rkd"} <= set(rows[steps])
    assert sorted(p.name for p in out.iterdir()) == ["args.json", "best.pt", "curves.png", "detections.json", "last.pt", "log.jsonl", "results.json", "samples.jpg"]
    results = json.loads((out / "results.json").read_text())
    assert len(results["classes"]) == 65
    found = json.loads((out / "detections.json").read_text())
    assert len(found) == 300 * results["images"] and results["checkpoint"] == "last.pt" and results["epoch"] == 2  # as in the paper; best.pt is chosen by base AP50
    state = torch.load(out / "last.pt", weights_only=True)
    assert not any("clip" in k or "text" in k for k in state["model"])
    run("--eval", out / "last.pt", *data, "--workers", 0, "--out", tmp_path / "eval")  # image size and prompts come with the weights
    again, of = json.loads((tmp_path / "eval/results.json").read_text()), ("seconds", "checkpoint", "epoch", "it", "zero_shot_AP", "zero_shot_AP50")
    assert set(of) <= set(again)
    assert {k: v for k, v in again.items() if k not in of} == {k: v for k, v in results.items() if k not in of}
    photo = next((coco_mini / "val2017").iterdir())
    run("--predict", photo, "--weights", out / "best.pt", "--classes", "red panda, umbrella", "--score", 0, "--out", tmp_path / "p")
    (name, boxes), = json.loads((tmp_path / "p/predictions.json").read_text()).items()
    assert {b["label"] for b in boxes} <= {"red panda", "umbrella"} and len(boxes) == 60 and len(list((tmp_path / "p").glob("*_boxes.jpg"))) == 1
    r = run("--eval", out / "last.pt", *data, "--dataset", "coco", "--workers", 0, "--classes", "dog,person", "--out", tmp_path / "eval2")
    assert len({d["category_id"] for d in json.loads((tmp_path / "eval2/detections.json").read_text())}) == 2
    results = json.loads((tmp_path / "eval2/results.json").read_text())
    assert set(results["classes"]) == {"dog", "person"} and results["images"] == 79  # images without objects count in COCO's own evaluation
    for flags, words in ((["--classes", "unicorn"], "unicorn is no class"), (["--clip", "ViT-B-32-quickgelu/nothing"], "cannot be loaded"), (["--classes", ""], "holds an empty name"),
                         (["--masks"], "has no mask head"), (["--data", "shapes"], "trained on real classes"), (["--out", out], "holds a training run")):
        r = run("--eval", out / "last.pt", *data, "--workers", 0, *(() if "--out" in flags else ("--out", tmp_path / "e3")), *flags, fail=True)
        assert words in r.stderr and "Traceback" not in r.stderr
    r = run("--predict", photo, "--weights", out / "best.pt", "--classes", " , ", "--out", tmp_path / "p2", fail=True)
    assert "holds an empty name" in r.stderr and "Traceback" not in r.stderr


def test_lvis_with_masks_trains_is_killed_resumed_and_evaluated(small, lvis, tmp_path):
    flags = [*lvis, *small, "--masks", "--rfs", "0.1", "--epochs", 1, "--max-iters", 16, "--burn-in", 0, "--save-every", 4]
    run(*flags, "--out", tmp_path / "whole")
    killed("dkdetr", flags, tmp_path / "killed", signal.SIGKILL, 3)
    assert (tmp_path / "killed/last.pt").exists() and not (tmp_path / "killed/results.json").exists()
    run("--resume", "--out", tmp_path / "killed")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items()) and torch.equal(a["rng"][0]["torch"], b["rng"][0]["torch"])
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert {"AP", "APr", "APc", "APf", "mask_AP", "mask_APf"} <= set(results) and results["APr"] == -1 and len(results["classes"]) == 1203
    found = json.loads((tmp_path / "whole/detections.json").read_text())
    sizes = {i["id"]: [i["height"], i["width"]] for i in json.loads((lvis[3] / "annotations/lvis_v1_val.json").read_text())["images"]}
    assert all(r["segmentation"]["size"] == sizes[r["image_id"]] and isinstance(r["segmentation"]["counts"], str) for r in found[::100])
    assert {"dice", "mask"} <= set(losses(tmp_path / "whole")[2])


def test_resume_across_the_burn_in(small, few, tmp_path):
    flags = ["--dataset", "ovcoco", "--data", few, *small, "--batch-size", 16, "--epochs", 3, "--burn-in", 1, "--eval-every", 3]
    run(*flags, "--out", tmp_path / "whole", "--max-iters", 12)
    run(*flags, "--out", tmp_path / "short", "--max-iters", 1)
    run(*flags, "--out", tmp_path / "cut", "--max-iters", 3)  # within the burn-in, KD queries wait untouched
    short, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("short", "cut"))
    assert torch.equal(short["model"]["kd_queries"], cut["model"]["kd_queries"]) and not torch.equal(short["model"]["level_embed"], cut["model"]["level_embed"])
    for upto in (6, 12):
        run("--resume", "--out", tmp_path / "cut", "--max-iters", upto)
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert not torch.equal(a["model"]["kd_queries"], cut["model"]["kd_queries"])
    assert a["it"] == b["it"] == 12 and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def test_a_run_that_dies_in_the_evaluation_evaluates_when_resumed(small, few, tmp_path, monkeypatch):
    import dkdetr
    flags = ["--dataset", "ovcoco", "--data", few, *small, "--batch-size", 16, "--epochs", 3, "--burn-in", 1]
    run(*flags, "--out", tmp_path / "whole")

    real = dkdetr.evaluate
    for dies_at in (1, 2, 2, 3):  # of its evaluations: so each of the three is cut off once
        calls = []

        def evaluate(*arguments):
            calls.append(1)
            if len(calls) == dies_at:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as m:
            m.setattr(dkdetr, "evaluate", evaluate)
            r = run(*(("--resume",) if dies_at > 1 else flags), "--out", tmp_path / "cut", fail=dies_at < 3)
            assert r.returncode == (130 if dies_at < 3 else 0)
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert a["it"] == b["it"] and a["best"] == b["best"] and not b["due"] and all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    evaluations = [[(r["it"], r["epoch"], r["AP50"]) for r in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines()) if "loss" not in r]
                   for name in ("whole", "cut")]
    assert len(evaluations[0]) == 3 and evaluations[0] == evaluations[1]


def test_voc_evaluation_with_the_names_swapped(small, coco_mini, tmp_path):
    voc = coco_mini.parent / "voc_mini" / "VOCdevkit" / "VOC2012"
    target = tmp_path / "data/VOCdevkit/VOC2007"
    (target / "ImageSets/Main").mkdir(parents=True)
    for name in ("JPEGImages", "Annotations"):
        os.symlink(voc / name, target / name)
    shutil.copy(voc / "ImageSets/Main/val.txt", target / "ImageSets/Main/test.txt")
    run("--dataset", "ovcoco", "--data", coco_mini, *small, "--max-iters", 2, "--out", tmp_path / "run")
    r = run("--eval", tmp_path / "run/last.pt", "--dataset", "voc", "--data", tmp_path / "data", "--workers", 0, "--out", tmp_path / "voc")
    results = json.loads((tmp_path / "voc/results.json").read_text())
    assert "AP50_area" in r.stdout and {"AP50", "AP75", "AP50_area", "AP75_area"} <= set(results) and results["images"] == 20


def test_objects365_evaluation(small, coco_mini, tmp_path):
    root = tmp_path / "o365"
    (root / "annotations").mkdir(parents=True)
    (root / "val/patch16").mkdir(parents=True)
    raw = json.loads((coco_mini / "annotations/instances_val2017.json").read_text())
    raw["images"] = raw["images"][:5]
    for image in raw["images"]:
        os.symlink(coco_mini / "val2017" / image["file_name"], root / "val/patch16" / image["file_name"])
        image["file_name"] = "images/v2/patch16/" + image["file_name"]
    kept = {i["id"] for i in raw["images"]}
    raw["annotations"] = [a for a in raw["annotations"] if a["image_id"] in kept]
    (root / "annotations/zhiyuan_objv2_val.json").write_text(json.dumps(raw))
    run("--dataset", "ovcoco", "--data", coco_mini, *small, "--max-iters", 2, "--out", tmp_path / "run")
    r = run("--eval", tmp_path / "run/last.pt", "--dataset", "objects365", "--data", root, "--workers", 0, "--out", tmp_path / "e")
    assert "AP75" in r.stdout and len(json.loads((tmp_path / "e/results.json").read_text())["classes"]) == 80


TWO = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, os.getcwd())
sys.argv = sys.argv[:1]
import dkdetr
from common.clip import load_clip
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if world > 1:
    dist.init_process_group("gloo")
a = dkdetr.resolve(dkdetr.parse_args(["--data", "shapes", "--kd-min-size", "1", "--rkd", "image"]))
clip = load_clip(os.environ["TINY"])
torch.manual_seed(0)
model = dkdetr.DKDETR("tiny8", 64, 32, 4, 32, 3, 1, 2, 12, 0.0)
distiller = dkdetr.make_distiller(model, clip.class_embeddings(["circle", "square", "cross"]), clip, dkdetr.settings_of(a))
distiller.kd_active = True
g = torch.Generator().manual_seed(5)
batch = dict(images=torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=g), sizes=torch.tensor([[96, 96], [80, 96]]),
             boxes=torch.tensor([[[10.0, 10, 50, 50], [40, 30, 90, 80]], [[20.0, 5, 60, 70], [0, 0, 0, 0]]]), labels=torch.tensor([[0, 2], [1, -1]]), counts=[2, 1])
if world > 1:
    batch = {k: v[rank:rank + 1] for k, v in batch.items()}
    distiller = torch.nn.parallel.DistributedDataParallel(distiller)
terms = distiller(batch)
sum(terms.values()).backward()
values = torch.stack([terms[k].detach() for k in sorted(terms)])
if world > 1:
    dist.all_reduce(values)
    values /= world
if rank == 0:
    torch.save(dict(values=values, grads=torch.cat([p.grad.flatten() for p in model.parameters()])), os.environ["OUT"])
if world > 1:
    del distiller, terms  # now and then the interpreter aborts at its end if a DDP module has outlived its process group
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_processes_equal_one(clip, tmp_path):
    """Same losses and gradients, with unequal numbers of objects on the ranks."""
    (tmp_path / "two.py").write_text(TWO)
    for procs in (1, 2):
        port = socket.socket()
        port.bind(("127.0.0.1", 0))
        address = str(port.getsockname()[1])
        port.close()
        workers = [subprocess.Popen([sys.executable, tmp_path / "two.py"], cwd=ROOT, env={**os.environ, "TINY": clip, "OUT": str(tmp_path / f"{procs}.pt"), "RANK": str(r),
                                    "WORLD_SIZE": str(procs), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": address, "OMP_NUM_THREADS": "1"}) for r in range(procs)]
        assert all(w.wait(200) == 0 for w in workers)
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert torch.allclose(one["values"], two["values"], rtol=1e-4, atol=1e-5)
    assert (one["grads"] - two["grads"]).abs().max() < 1e-3 * one["grads"].abs().max()


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], "lvis_v1_train.json is missing"), (["--dataset", "ovcoco", "--data", "nowhere"], "instances_train2017.json is missing"),
    (["--predict", "x.jpg"], "--predict needs --weights"), (["--eval", "README.md"], "README.md"), (["--row", "t9"], "there is no such row"),
    (["--queries", "0"], "--queries: 0"), (["--dataset", "voc"], "is for --eval"), (["--levels", "7"], "--levels: 7"), (["--rfs", "-1"], "--rfs: -1"),
    (["--dim", "48"], "--dim 48"), (["--masks", "--image-size", "100"], "--image-size 100"), (["--table", "--dataset", "lvis"], "--table"),
    (["--lr", "nan"], "--lr: nan"), (["--w-skd", "nan"], "--w-skd: nan"), (["--jitter", "2", "0.1"], "--jitter 2.0 0.1"), (["--hidden", "0"], "--hidden: 0"),
    (["--data", "shapes", "--burn-in", "1", "--epochs", "1"], "--table"), (["--predict", "x.jpg", "--weights", "nowhere.pt"], "nowhere.pt"), (["--tau", "-1"], "--tau: -1"),
    (["--tau-r", "inf"], "--tau-r: inf"), (["--jitter", "0", "1"], "--jitter: 0"), (["--dropout", "1"], "--dropout: 1"), (["--bn", "frozen", "--init", "none"], "--init none needs --bn sync")])
def test_bad_flags_give_one_line(flags, words, monkeypatch, capsys):
    assert words in refusal(flags, monkeypatch, capsys)


def refusal(flags, monkeypatch, capsys):
    """What main() ends with; here and not in a new process: ten times as fast."""
    import dkdetr
    monkeypatch.setattr(sys, "argv", ["dkdetr.py", *flags])
    with pytest.raises(SystemExit) as e:
        dkdetr.main()
    return f"{e.value} {capsys.readouterr().err}"


def test_unknown_backbone_and_foreign_checkpoints_are_named(tmp_path):
    import dkdetr
    from common.run import UserError
    with pytest.raises(UserError, match="--backbone r7"):
        dkdetr.make_body("r7", "none", "sync")
    for state, words in (({"neck.convs.0.conv.weight": torch.zeros(1)}, "no two-stage"), ({"a": torch.zeros(1)}, "neither a checkpoint")):
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(UserError, match=words):
            dkdetr.load(tmp_path / "w.pt")


def test_table_resumes_and_prints_both(small, few, tmp_path):
    flags = ["--dataset", "ovcoco", "--data", few, *small, "--batch-size", 40, "--epochs", 3, "--burn-in", 1, "--rkd", "image", "--table", "--out", tmp_path / "t"]
    first = run(*flags)
    assert "without KD" in first.stdout and "DK-DETR " in first.stdout.split("novel  base")[1]
    start, plain, kd = (losses(tmp_path / "t" / name) for name in ("burn-in", "without-kd", "dk-detr"))
    assert max(plain) == max(kd) and "skd" in kd[max(kd)] and "skd" not in plain[max(plain)] | start[max(start)]
    assert min(kd) > 2 and min(plain) > 2  # they begin where the burn-in ends
    shutil.rmtree(tmp_path / "t/dk-detr")
    again = run("--resume", "--out", tmp_path / "t")
    assert json.loads((tmp_path / "t/dk-detr/args.json").read_text())["args"]["rkd"] == "image"  # the method, too, is that of the first command
    table = lambda r: [line.split()[:-1] for line in r.stdout.split("novel  base")[1].splitlines()[1:4]]
    assert table(again) == table(first)


def test_fast_flags_and_the_oracle_run_together(small, few, tmp_path):
    flags = small[:-2]  # the oracle's boxes have no smallest size
    run("--dataset", "ovcoco", "--data", few, *flags, "--max-iters", 2, "--burn-in", 0, "--amp", "bf16", "--accumulate", 2, "--kd-boxes", "gt",
        "--dropout", "0.1", "--out", tmp_path / "x", procs=2)
    assert {"skd", "rkd"} <= set(losses(tmp_path / "x")[2])


def test_mask_training_leaves_boxes_without_outline_out_and_counts_them(small, lvis, coco_mini, tmp_path):
    path = tmp_path / "lvis/annotations/lvis_v1_train.json"
    raw = json.loads(path.read_text())
    del raw["annotations"][0]["segmentation"]
    raw["annotations"][1]["segmentation"] = [[]]
    path.unlink()
    path.write_text(json.dumps(raw))
    r = run(*lvis, *small, "--masks", "--max-iters", 1, "--out", tmp_path / "x")
    assert "2 without outline" in " ".join(r.stdout.split())
    for a in raw["annotations"]:
        a["segmentation"] = []
    path.write_text(json.dumps(raw))
    r = run(*lvis, *small, "--masks", "--max-iters", 1, "--out", tmp_path / "y", fail=True)
    assert ("no usable image" in r.stderr or "no box is left" in r.stderr) and not (tmp_path / "y").exists()


@pytest.mark.parametrize("levels", [1, 2])
def test_two_processes_train_on_one_and_two_levels(small, few, tmp_path, levels):
    """Stages of the backbone that no level reads do not exist: DDP would wait for their gradients."""
    flags = [*small, "--levels", levels, "--burn-in", 1, "--epochs", 2, "--batch-size", 20]
    run("--dataset", "ovcoco", "--data", few, *flags, "--out", tmp_path / "x", procs=2)
    state = torch.load(tmp_path / "x/last.pt", weights_only=True)
    assert len(losses(tmp_path / "x")) == 2 and "skd" in losses(tmp_path / "x")[state["it"]]
    assert not any(f"stages.layer{k}" in name for name in state["model"] for k in range(levels + 2, 5))
    assert json.loads((tmp_path / "x/results.json").read_text())["images"] == 12


def test_a_run_stopped_by_sigterm_resumes_bit_exactly(small, few, tmp_path):
    flags = ["--dataset", "ovcoco", "--data", few, *small, "--batch-size", 8, "--epochs", 2, "--burn-in", 1, "--dropout", "0.1"]
    run(*flags, "--out", tmp_path / "whole")
    code, error = killed("dkdetr", flags, tmp_path / "cut", signal.SIGTERM, 2)
    line = error.strip().splitlines()[-1]
    assert code == 143 and line.startswith("dkdetr.py: stopped by SIGTERM at step") and "--resume" in line
    a = torch.load(tmp_path / "whole/last.pt", weights_only=True)
    assert 4 <= torch.load(tmp_path / "cut/last.pt", weights_only=True)["it"] < a["it"]
    run("--resume", "--out", tmp_path / "cut")
    b = torch.load(tmp_path / "cut/last.pt", weights_only=True)
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items()) and torch.equal(a["rng"][0]["torch"], b["rng"][0]["torch"])
    assert (a["best"], a["best_epoch"], a["it"]) == (b["best"], b["best_epoch"], b["it"])


def test_a_run_begins_as_the_copy_of_another(small, few, tmp_path):
    flags = ["--dataset", "ovcoco", "--data", few, *small, "--batch-size", 16, "--epochs", 3, "--eval-every", 3, "--burn-in", 1, "--dropout", "0.1"]
    run(*flags, "--out", tmp_path / "whole")
    run(*flags, "--out", tmp_path / "start", "--max-iters", 4)
    run(*flags, "--out", tmp_path / "copy", "--from", tmp_path / "start/last.pt")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "copy"))
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items()) and a["it"] == b["it"]
    assert min(losses(tmp_path / "copy")) > 4 and b["best_epoch"] >= 1
    (tmp_path / "copy/log.jsonl").unlink()
    r = run(*flags, "--out", tmp_path / "copy2", "--from", tmp_path / "copy/last.pt")  # nothing is left to do but its evaluation
    assert "novel_AP50" in " ".join(r.stdout.split()) and losses(tmp_path / "copy2") == {}
    best = tmp_path / "copy/best.pt"  # its weights alone, at step 0
    run(*flags, "--out", tmp_path / "copy4", "--from", best, "--max-iters", 1, "--lr", 1e-12, "--weight-decay", 0)
    now, before = (torch.load(path, weights_only=True) for path in (tmp_path / "copy4/last.pt", best))
    assert now["it"] == 1 and all(torch.allclose(v, before["model"][k], atol=1e-6) for k, v in now["model"].items())
    r = run("--resume", "--from", "x.pt", "--out", tmp_path / "start", fail=True)
    assert "one of them" in r.stderr
    r = run(*flags, "--batch-size", 8, "--out", tmp_path / "copy3", "--from", tmp_path / "start/last.pt", fail=True)
    assert "total batch of 16" in r.stderr and "Traceback" not in r.stderr


def test_own_data_needs_no_names_of_ours(small, coco_mini, tmp_path):
    """Files named by flags; the validation set lists some of the training's classes; without one the last checkpoint is the best."""
    for split in ("train", "val"):
        raw = json.loads((coco_mini / f"annotations/instances_{split}2017.json").read_text())
        names = ("person", "dog", "chair", "car") if split == "train" else ("person", "chair")
        raw["categories"] = [c for c in raw["categories"] if c["name"] in names]
        kept = {c["id"] for c in raw["categories"]}
        raw["annotations"] = [a for a in raw["annotations"] if a["category_id"] in kept]
        (tmp_path / f"{split}.json").write_text(json.dumps(raw))
    train = ["--train-json", tmp_path / "train.json", "--train-images", coco_mini / "train2017"]
    val = ["--val-json", tmp_path / "val.json", "--val-images", coco_mini / "val2017"]
    flags = [*small, "--batch-size", 16, "--epochs", 1, "--burn-in", 0]
    r = run(*train, *val, *flags, "--keep-empty", "--out", tmp_path / "run")
    said = " ".join(r.stdout.split())
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert "4 base and 0 novel classes" in said and set(results["classes"]) == {"person", "chair"} and results["images"] == 79
    assert results["checkpoint"] == "best.pt"
    assert max(losses(tmp_path / "run")) == 5  # all 80 images, with --keep-empty
    r = run(*train, *flags, "--out", tmp_path / "blind")
    assert "no validation set" in r.stdout and max(losses(tmp_path / "blind")) < 5
    last, best = (torch.load(tmp_path / "blind" / f"{name}.pt", weights_only=True) for name in ("last", "best"))
    assert all(torch.equal(v, best["model"][k]) for k, v in last["model"].items())
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in sorted((coco_mini / "val2017").iterdir())[:2]:
        os.symlink(photo, photos / photo.name)
    (photos / "z.jpg").write_bytes(b"no picture")
    r = run("--predict", photos, "--weights", tmp_path / "blind/best.pt", "--score", 0, "--epochs", 3, "--out", tmp_path / "p")
    answer = json.loads((tmp_path / "p/predictions.json").read_text())
    assert {b["label"] for boxes in answer.values() for b in boxes} == {"person", "dog", "chair", "car"}  # names of its training
    assert len(answer) == len(list((tmp_path / "p").glob("*_boxes.jpg"))) == 2 and "left out" in r.stderr and "no effect of --epochs" in r.stderr
    run("--eval", tmp_path / "blind/best.pt", *val, "--workers", 0, "--out", tmp_path / "e")
    assert set(json.loads((tmp_path / "e/results.json").read_text())["classes"]) == {"person", "chair"}
    r = run(*train, "--data", "shapes", *flags, "--out", tmp_path / "z", fail=True)
    assert "one of them" in r.stderr


def test_another_scripts_checkpoint_is_named(tmp_path):
    for k, script in enumerate(("crosskd.py", "hierkd.py", "prototype_kd.py", "simple21k.py")):
        save_checkpoint(dict(script=script, arch={}, model={}), tmp_path / f"{k}.pt")
        r = run("--eval", tmp_path / f"{k}.pt", "--out", tmp_path / "e", fail=True)
        assert f"is a checkpoint of {script}, not of dkdetr.py" in r.stderr and "Traceback" not in r.stderr


@pytest.mark.parametrize("flags, words", [
    (["--skd", "none", "--w-skd", "1"], "--w-skd: belongs to --skd"), (["--rkd", "none", "--tau-r", "1"], "--tau-r: belongs to --rkd"),
    (["--dataset", "ovcoco", "--images", "x"], "--images: belongs to --dataset lvis"),
    (["--no-aux-queries", "--kd-ref", "own"], "--kd-ref: belongs to --aux-queries"), (["--no-aux-queries", "--kd-embed", "shared"], "--kd-embed: belongs"), (["--kd-boxes", "gt", "--kd-topk", "3"], "--kd-topk: belongs to --kd-boxes"),
    (["--skd", "none", "--rkd", "none", "--burn-in", "3"], "--burn-in: belongs to --skd or --rkd"), (["--classes", "dog"], "--classes: belongs to --eval or --predict"),
    (["--eval", "x.pt", "--resume"], "--resume: continues a training"), (["--data-seed", "3"], "--data-seed: belongs to --data shapes")])
def test_flags_that_would_have_no_effect_are_refused(flags, words, monkeypatch, capsys):
    assert words in refusal(flags, monkeypatch, capsys)
