# SPDX-License-Identifier: MIT
"""dkdetr.py as a place to copy from and to bring own names to: layout, rows, own splits, CLIP's pitfalls, load, predict_image, --export."""
import argparse
import ast
import difflib
import json
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import dkdetr
from common.clip import FrozenCLIP, check_activation, cut_names, get_clip
from common.datasets import class_names
from common.evaluation import Detections
from common.run import UserError
from common.shapes import make_shapes
from common.tiny import TINY, tiny_clip, tiny_model
from conftest import ROOT, launch
from test_fuzz import SECTIONS

SMALL = ["--templates", "one", "--backbone", "tiny8", "--init", "none", "--image-size", "128", "--jitter", "0.8", "1.25", "--dim", "32", "--hidden", "32", "--levels", "3",
         "--encoder", "1", "--decoder", "2", "--queries", "30", "--workers", "0", "--batch-size", "8", "--kd-min-size", "4", "--epochs", "2", "--burn-in", "1"]
run = lambda *flags, **how: launch("dkdetr", flags, **how)
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return tiny_clip(make_shapes(folder, train=24, val=12), folder, steps=1, objects=4, scenes=2)


@pytest.fixture(scope="module")
def clip():
    import open_clip
    torch.manual_seed(0)
    return FrozenCLIP(tiny_model(**TINY), open_clip.tokenize, "random")


# ------------------------------------------------------------------ the file

def test_the_paper_comes_first_and_lines_stay_readable():
    lines = (ROOT / "dkdetr.py").read_text(encoding="utf-8").split("\n")
    titles = [(k, line.strip("# =")) for k, line in enumerate(lines) if line.startswith("# ====")]
    assert [title for _, title in titles] == SECTIONS and titles[0][0] < 110
    assert max(map(len, lines)) <= 110
    assert (titles[3][0] - titles[0][0]) / len(lines) > 0.45  # its share of the file; the aim is 0.6


def test_the_loop_is_crosskds():
    loops = []
    for name in ("crosskd", "dkdetr"):
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        node = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "train")
        loops.append(text.split("\n")[node.lineno - 1:node.end_lineno])
    changed = [x for x in difflib.unified_diff(*loops, n=0, lineterm="") if x[0] in "+-" and x[:3] not in ("+++", "---")]
    assert len(changed) <= 40, len(changed)


@pytest.mark.parametrize("name", list(dkdetr.ROWS))
def test_every_row_of_the_tables_is_a_command(name):
    more = ["--train-json", "a", "--train-images", "b"] if name == "own" else []
    args = dkdetr.parse_args(["--row", name, *more])
    if not args.eval:
        dkdetr.resolve(args)
    assert all(number == "-" or 0 < float(number) < 100 for number in dkdetr.ROWS[name][0].split("/"))


def test_rows_set_flags_and_a_flag_beside_them_wins():
    a = dkdetr.resolve(dkdetr.parse_args(["--row", "t5-skd"]))
    assert (a.epochs, a.burn_in, a.skd, a.rkd) == (36, 20, "bce", "none")
    assert dkdetr.resolve(dkdetr.parse_args(["--row", "t5-skd", "--epochs", "7"])).epochs == 7
    assert dkdetr.parse_args(["--row", "t4-voc"]).dataset == "voc"


def test_table_of_shapes_begins_from_the_burn_in_that_is_ready(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(dkdetr, "shapes_start", lambda *of: "ready/best.pt")
    monkeypatch.setattr(dkdetr, "train", lambda args, *of: ran.append(args) or dict(novel_AP50=1.0, base_AP50=2.0, AP50=3.0))
    pages = []
    monkeypatch.setattr("common.pictures.save_comparison", lambda val, found, out, novel: pages.append((list(found), novel)) or "a page")
    monkeypatch.setattr(dkdetr, "make_data", lambda args, split: argparse.Namespace(records=argparse.Namespace(categories=[])))
    args = dkdetr.resolve(dkdetr.parse_args(["--data", "shapes", "--out", str(tmp_path)]))
    assert args.table and args.burn_in == 0
    dkdetr.quick_start(args, 0, 1, torch.device("cpu"))
    assert [Path(a.out).name for a in ran] == ["without-kd", "dk-detr"]
    assert all(a.start_from == "ready/best.pt" and a.epochs == args.epochs and not a.table for a in ran)
    assert [dkdetr.distils(a) for a in ran] == [False, True]
    words = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert words == ["without KD", "DK-DETR", "ground truth, and what each finds: a page"] and pages[0][0] == ["without KD", "DK-DETR"] and "blue star" in pages[0][1]
    assert not dkdetr.resolve(dkdetr.parse_args(["--data", "shapes", "--max-iters", "3"])).table
    for flags in (["--novel", "square"], ["--init", "none"], ["--queries", "20"], ["--burn-in", "4"], ["--seed", "3"], ["--lr", "1e-4"]):  # another start
        args = dkdetr.resolve(dkdetr.parse_args(["--data", "shapes", *flags]))
        assert args.table and 0 < args.burn_in < args.epochs == 18


def test_every_open_choice_is_a_flag_with_its_default_first():
    a = dkdetr.resolve(dkdetr.parse_args([]))
    assert all(getattr(a, name.replace("-", "_")) == values[0] for name, values, _ in dkdetr.OPEN)
    assert all(getattr(dkdetr.Settings(), f) == getattr(a, f) for f in dkdetr.Settings._fields)


# ------------------------------------------------------------------ names

def test_names_come_by_commas_by_repetition_or_from_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("red panda\nstool, wooden\n", encoding="utf-8")
    assert class_names(["red panda, umbrella"]) == ["red panda", "umbrella"]
    assert class_names(["stool, wooden", "worker"]) == ["stool, wooden", "worker"]
    assert class_names([str(tmp_path / "names.txt")]) == ["red panda", "stool, wooden"]
    (tmp_path / "blank.txt").write_text("\ufeffred panda\r\n\r\nvan\r\n", encoding="utf-8")
    assert class_names([str(tmp_path / "blank.txt")]) == ["red panda", "van"]
    with pytest.raises(UserError, match="--novel nofile.txt: no such file of names"):
        class_names(["nofile.txt"], "--novel")
    with pytest.raises(UserError, match="'cup' is one text; give a list"):
        FrozenCLIP.class_embeddings(None, "cup")
    for values, words in (([""], "empty name"), (["a,,b"], "empty name"), (["a,a"], "occurs twice"), ([" , "], "empty name")):
        with pytest.raises(UserError, match=f"--novel.*{words}"):
            class_names(values, "--novel")


def test_base_and_novel_are_each_others_rest_and_cannot_overlap():
    split = lambda *flags: dkdetr.class_split(dkdetr.resolve(dkdetr.parse_args(["--dataset", "lvis", *flags])), categories)
    categories = [dict(name=n, frequency=f) for n, f in (("red_panda", "f"), ("stool, wooden", "c"), ("worker", "r"), ("van", "f"))]
    assert split() == (["red_panda", "stool, wooden", "van"], ["worker"])
    assert split("--novel", "red panda,van") == (["stool, wooden", "worker"], ["red_panda", "van"])
    assert split("--base", "stool, wooden", "--base", "van") == (["stool, wooden", "van"], ["red_panda", "worker"])
    assert split("--base", "van", "--novel", "worker") == (["van"], ["worker"])
    with pytest.raises(UserError, match="both name van"):
        split("--base", "van", "--novel", "van")


BASE, NOVEL = ["person", "chair", "car", "dining table, wooden", "bottle"], ["dog", "cup", "cat"]


def own_files(coco_mini, folder, lvis=False):
    """coco_mini as own data: five base categories, one with a comma in its name, and three novel ones. LVIS-format: as LVIS v1's json."""
    flags = []
    for split in ("train", "val"):
        source = coco_mini / f"annotations/instances_{split}2017.json"
        raw = json.loads(source.read_text())
        for c in raw["categories"]:
            c["name"] = "dining table, wooden" if c["name"] == "dining table" else c["name"]
            c["frequency"] = "f"
        raw["categories"] = [c for c in raw["categories"] if c["name"] in BASE + NOVEL]
        kept = {c["id"] for c in raw["categories"]}
        raw["annotations"] = [a for a in raw["annotations"] if a["category_id"] in kept and not a["iscrowd"]]
        if lvis:
            for image in raw["images"]:
                image.update(neg_category_ids=sorted(kept), not_exhaustive_category_ids=[])
        (folder / f"{split}.json").write_text(json.dumps(raw))
        flags += [f"--{split}-json", folder / f"{split}.json", f"--{split}-images", coco_mini / f"{split}2017"]
    return flags


@pytest.mark.parametrize("lvis", [False, True], ids=["coco-format", "lvis-format"])
def test_an_own_split_from_the_command_line_to_names_on_a_photograph(coco_mini, clip_file, tmp_path, lvis):
    files = own_files(coco_mini, tmp_path, lvis)
    (tmp_path / "base.txt").write_text("\n".join(BASE), encoding="utf-8")
    kind = ["--dataset", "lvis"] if lvis else []
    r = run(*files, *kind, *SMALL, "--clip", clip_file, "--base", tmp_path / "base.txt", "--novel", ",".join(NOVEL), "--out", tmp_path / "run")
    said, results = " ".join(r.stdout.split()), json.loads((tmp_path / "run/results.json").read_text())
    key = "AP" if lvis else "AP50"
    assert "5 base and 3 novel classes" in said and set(results["classes"]) == {*BASE, *NOVEL} and results["images"] == 79
    assert results["score"] == results[f"base_{key}"] and f"novel_{key}" in results and results["checkpoint"] == "last.pt"
    assert "images are few" in said and "--row own" in said
    state = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert set(state["classes"]) == {*BASE, *NOVEL} and set(state["novel"]) == {*NOVEL}
    assert state["arch"]["clip_name"].startswith("tiny-") and state["arch"]["templates"] == "one"
    val = [*files[4:], *kind, "--workers", 0]
    run("--eval", tmp_path / "run/last.pt", *val, "--out", tmp_path / "e")  # names and split come with the weights
    again = json.loads((tmp_path / "e/results.json").read_text())
    assert all(again[k] == results[k] for k in (f"base_{key}", f"novel_{key}", key)) and {"zero_shot_AP", "zero_shot_AP50"} <= set(again)
    if not lvis:
        run("--eval", tmp_path / "run/last.pt", *val, "--classes", "dining table, wooden", "--classes", "dog", "--out", tmp_path / "e2")
        assert set(json.loads((tmp_path / "e2/results.json").read_text())["classes"]) == {"dining table, wooden", "dog"}
        run("--resume", "--out", tmp_path / "run")
    photo = sorted((coco_mini / "val2017").iterdir())[0]
    run("--predict", photo, "--weights", tmp_path / "run/best.pt", "--score", 0, "--out", tmp_path / "p")
    (boxes,) = json.loads((tmp_path / "p/predictions.json").read_text()).values()
    assert {b["label"] for b in boxes} == {*BASE, *NOVEL}


def test_what_is_trained_is_base_in_the_validation_file_too_and_a_resumed_run_keeps_its_names(coco_mini, clip_file, tmp_path, monkeypatch):
    """Train knows 5 classes, val 8, no --base: the other three are novel and do not choose. Names come from a file that changes before --resume."""
    files = own_files(coco_mini, tmp_path)
    raw = json.loads((tmp_path / "train.json").read_text())
    raw["categories"] = [c for c in raw["categories"] if c["name"] in BASE]
    kept = {c["id"] for c in raw["categories"]}
    raw["annotations"] = [a for a in raw["annotations"] if a["category_id"] in kept]
    (tmp_path / "five.json").write_text(json.dumps(raw))
    five = ["--train-json", tmp_path / "five.json", *files[2:]]
    r = run(*five, *SMALL, "--clip", clip_file, "--max-iters", 2, "--out", tmp_path / "a")
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert "5 base and 3 novel classes" in " ".join(r.stdout.split()) and results["score"] == results["base_AP50"] and results["checkpoint"] == "last.pt"
    assert all(n in r.stderr for n in NOVEL) and f"not in {tmp_path / 'five.json'}, so scored as novel" in r.stderr
    assert set(torch.load(tmp_path / "a/best.pt", weights_only=True)["novel"]) == {*NOVEL}
    r = run("--eval", tmp_path / "a/last.pt", *files[4:], "--workers", 0, "--novel", "person,cat", "--out", tmp_path / "e")
    assert "was trained on person, which count as novel here\n" in r.stderr and "novel are beside --novel its own cup, dog\n" in r.stderr
    assert "base_AP50" in json.loads((tmp_path / "e/results.json").read_text())
    r = run(*five, *SMALL, "--clip", clip_file, "--novel", "person", "--from", tmp_path / "a/best.pt", "--max-iters", 1, "--out", tmp_path / "f")
    assert f"--from {tmp_path / 'a/best.pt'}: was trained on person, which count as novel here\n" in r.stderr
    made, asked = dkdetr.text_matrix, []
    monkeypatch.setattr(dkdetr, "text_matrix", lambda clip, names, *of, **how: asked.append(names) or made(clip, names, *of, **how))
    run(*five, *SMALL, "--clip", clip_file, "--train-vocab", "all", "--max-iters", 1, "--out", tmp_path / "c")
    assert sorted(asked[0]) == sorted([*BASE, *NOVEL])  # novel names come from the validation file
    (tmp_path / "novel.txt").write_text("\n".join(NOVEL))
    run(*files, *SMALL, "--clip", clip_file, "--novel", tmp_path / "novel.txt", "--max-iters", 2, "--out", tmp_path / "b")
    (tmp_path / "novel.txt").unlink()
    r = run("--resume", "--out", tmp_path / "b", "--max-iters", 3)
    assert "5 base and 3 novel classes" in " ".join(r.stdout.split())


def drawn(folder, split, classes, held, **lists):
    """The flags of own files: a blank image for each of `held`, the names of its boxes; lists: of LVIS, by name."""
    ids, images, boxes = {n: k for k, n in enumerate(classes, 1)}, folder / split, []
    images.mkdir(parents=True)
    for k, names in enumerate(held):
        Image.new("RGB", (64, 64)).save(images / f"{k}.png")
        boxes += [dict(id=len(boxes) + j, image_id=k, category_id=ids[n], bbox=[8, 8, 40, 40], area=1600, iscrowd=0) for j, n in enumerate(names)]
    lists = {key: [ids[n] for n in names] for key, names in lists.items()}
    content = dict(images=[dict(id=k, file_name=f"{k}.png", width=64, height=64, **lists) for k in range(len(held))],
                   annotations=boxes, categories=[dict(id=k, name=n) for n, k in ids.items()])
    (folder / f"{split}.json").write_text(json.dumps(content))
    return [f"--{split}-json", str(folder / f"{split}.json"), f"--{split}-images", str(images)]


def test_what_only_the_validation_file_has_is_novel_beside_base_and_told_beside_novel(tmp_path, capsys):
    files = [*drawn(tmp_path, "train", "abde", ["ab", "d"]), *drawn(tmp_path, "val", "abcd", ["a", "b", "c", "d"])]
    made = lambda *flags: dkdetr.make_sets(dkdetr.resolve(dkdetr.parse_args([*flags])))
    args, data, val, novel = made(*files, "--base", "a,b")
    assert data.classes == ["a", "b"] and sorted(novel) == ["c", "d", "e"]  # e: held out, though nothing can score it
    assert dkdetr.evaluated_names(args, val) == list("abcd") and dkdetr.class_split(args, val.records.categories)[0] == ["a", "b"]
    said = capsys.readouterr().err
    assert "val.json: c: not in " in said and "so scored as novel" in said and "left out" not in said
    args, data, val, novel = made(*files, "--novel", "d")
    assert data.classes == ["a", "b", "e"] and novel == ["d"] and dkdetr.evaluated_names(args, val) == list("abd")
    assert "note: 1 classes of val.json are neither base nor novel and left out, first c; --novel names others\n" in capsys.readouterr().err
    assert made(*files, "--novel", "d,c")[3] == ["d", "c"] and "left out" not in capsys.readouterr().err
    assert made(*files)[3] == ["c"] and "left out" not in capsys.readouterr().err
    assert made(*files[:4], "--novel", "dd")[3] == ["dd"]  # no validation set
    assert "train.json: has no class dd to keep out of training\n" in capsys.readouterr().err


def test_a_class_without_a_box_takes_no_background_out_of_the_evaluation(tmp_path):
    files = [*drawn(tmp_path, "train", "ab", ["a", "b"]), *drawn(tmp_path, "val", "abc", ["a", "b", "", ""])]
    assert len(dkdetr.make_sets(dkdetr.resolve(dkdetr.parse_args([*files, "--novel", "b"])))[2]) == 4
    others = drawn(tmp_path / "more", "val", "abc", ["a", "c", "ac", ""])  # c alone is left out
    assert len(dkdetr.make_sets(dkdetr.resolve(dkdetr.parse_args([*files[:4], *others, "--novel", "b"])))[2]) == 3


def test_lists_of_lvis_say_what_is_judged_where_a_file_is_scored_as_cocos(tmp_path):
    """b is found in the first image, too, and c in the second: nobody has said that they are not there."""
    for lists, ap, alone in ((dict(neg_category_ids=""), 100, 100), ({}, 50, 75)):
        files = drawn(tmp_path / f"{ap}", "val", "abc", ["a", "ab", "c"], **lists)
        args = dkdetr.resolve(dkdetr.parse_args(["--eval", "x", "--dataset", "coco", *files, "--novel", "b,c"]))
        val, found = dkdetr.make_data(args, "val"), Detections()
        for image, scores in enumerate(([0.9, 0.0], [0.8, 0.9], [0.0, 0.8])):
            found.add(image, torch.tensor([[8.0, 8, 48, 48]] * 2), torch.tensor(scores), torch.tensor([1, 2]), val.category_ids)
        stats, _ = dkdetr.dataset_metrics(args, val, val.truth(), found, "bbox", val.category_ids)
        assert stats["novel_AP50"] == pytest.approx(ap, abs=0.01)
        stats = dkdetr.zero_shot_metrics(args, val, ["b", "c"], found, val.category_ids)  # without the first image
        assert stats["zero_shot_AP50"] == pytest.approx(alone, abs=0.01)


def test_own_names_that_no_file_has_are_told_before_the_first_step(coco_mini, clip_file, tmp_path):
    files = own_files(coco_mini, tmp_path)
    for flags, words in ((["--novel", "dgo"], "--novel: no class 'dgo' in"), (["--base", "persn"], "is 'person' meant?")):
        r = run(*files, *SMALL, "--clip", clip_file, *flags, "--out", tmp_path / "run", fail=True)
        assert words in r.stderr and "Traceback" not in r.stderr and not (tmp_path / "run").exists()


def test_best_is_chosen_without_novel_labels():
    assert dkdetr.chooser("ovcoco", ["dog"]) == "base_AP50" and dkdetr.chooser("lvis", ["dog"]) == "base_AP"
    assert dkdetr.chooser("coco", []) == "AP" and dkdetr.chooser("voc", []) == "AP50"


# ------------------------------------------------------------------ CLIP's pitfalls

def test_names_that_clip_cuts_are_told(clip, capsys):
    long = "stool " * 90
    assert cut_names(clip, ["stool", long]) == [long]
    dkdetr.text_matrix(clip, ["stool", long], "one", cache=False)
    assert "1 names are longer than CLIP's 32 tokens and are cut, first 'stool stool" in capsys.readouterr().err
    dkdetr.text_matrix(clip, ["stool"], "one", cache=False)
    assert not capsys.readouterr().err


def test_a_clip_file_of_the_other_activation_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:  # as OpenAI's TorchScript
        archive.writestr("x/code/__torch__/model.py", "return torch.mul(x, torch.sigmoid(torch.mul(x, 1.702)))")
    torch.save(dict(input_resolution=torch.tensor(224)), tmp_path / "state.pt")
    torch.save(dict(a=torch.zeros(1)), tmp_path / "laion2b_s34b_b79k.pt")
    torch.save(dict(a=torch.zeros(1)), tmp_path / "plain.pt")
    wrong = "ViT-B-32/ViT-B-32.pt", "ViT-B-32/state.pt", "ViT-B-32-quickgelu/laion2b_s34b_b79k.pt"
    right = "ViT-B-32-quickgelu/state.pt", "ViT-B-32/laion2b_s34b_b79k.pt", "ViT-B-32/plain.pt", "ViT-B-32-quickgelu/plain.pt"
    for spec in wrong:
        model, file = spec.split("/")
        other = "ViT-B-32" if "quick" in model else "ViT-B-32-quickgelu"
        with pytest.raises(UserError, match=f"were trained with .*GELU; use {other}/{tmp_path / file}"):
            check_activation(f"{model}/{tmp_path / file}")
    for spec in right:
        model, file = spec.split("/")
        check_activation(f"{model}/{tmp_path / file}")
    check_activation("ViT-B-32/laion2b_s34b_b79k")
    with pytest.raises(UserError, match="QuickGELU"):
        get_clip(f"ViT-B-32/{tmp_path / 'state.pt'}", 0, torch.device("cpu"))


def test_the_tiny_clip_sees_no_picture_that_is_distilled_from(monkeypatch, tmp_path):
    import common.clip
    import common.shapes
    import common.tiny
    drawn = []
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path))
    monkeypatch.setattr(common.shapes, "make_shapes", lambda seed=0: drawn.append(seed))
    monkeypatch.setattr(common.tiny, "tiny_clip", lambda root, folder, seed, device, draw: f"{root.name} {seed} {draw()}")
    monkeypatch.setattr(common.clip, "load_clip", lambda path, device: path)
    assert get_clip("", 3, "cpu") == "shapes-1-s10003 3 None" and drawn == [10003]


def saved(path, clip_file, **arch):
    """A small detector with names, as a checkpoint."""
    torch.manual_seed(0)
    model = dkdetr.DKDETR("tiny8", 64, 32, 4, 32, 3, 1, 2, 40, 0.0)
    model.arch |= dkdetr.SEEN | dict(image_size=160, clip=str(clip_file), templates="one", name_style="clean") | arch
    torch.save(dict(dkdetr.plain_of(model, ["worker", "stool, wooden"], ["dog"]), model=model.state_dict()), path)
    return path


def test_classes_of_own_files_that_the_checkpoint_does_not_know_are_told(coco_mini, clip_file, tmp_path):
    path = saved(tmp_path / "a.pt", clip_file)  # worker; stool, wooden; dog
    val = ["--val-json", coco_mini / "annotations/instances_val2017.json", "--val-images", coco_mini / "val2017", "--workers", 0]
    r = run("--eval", path, *val, "--out", tmp_path / "e")
    assert "79 classes of instances_val2017.json are not in the checkpoint's vocabulary and left out, first person" in r.stderr


@pytest.mark.parametrize("flags, base, novel, told", [
    ([], ["worker", "stool, wooden"], ["dog"], "1 classes of val.json are not in the checkpoint's vocabulary and left out, first cat"),
    (["--novel", "cat"], ["worker", "stool, wooden"], ["cat", "dog"], "novel are beside --novel its own dog\n"),
    (["--base", "worker", "--base", "dog"], ["worker", "dog"], ["cat", "stool, wooden"], "was not trained on dog, which count as base here\n")])
@pytest.mark.parametrize("own", [True, False], ids=["val-json", "data"])
def test_names_of_eval_are_read_against_the_checkpoints(clip_file, tmp_path, monkeypatch, capsys, flags, base, novel, told, own):
    """What it held as novel is base only where --base says so; classes that it does not know are told, whichever way the file came."""
    path, seen = saved(tmp_path / "a.pt", clip_file, data="data/coco", dataset="coco"), []
    files = drawn(tmp_path, "val", ["cat", "dog", "stool, wooden", "worker"], [["cat", "dog"], ["stool, wooden", "worker"]])
    monkeypatch.setattr(dkdetr, "find_data", lambda args, split: (tmp_path / "val", tmp_path / "val.json"))
    monkeypatch.setattr(dkdetr, "clip_for", lambda *of: None)
    monkeypatch.setattr(dkdetr, "evaluate", lambda model, val, *of, **how: seen.append(dkdetr.class_split(of[-1], val.records.categories)) or (None, None))
    dkdetr.evaluate_file(dkdetr.parse_args(["--eval", str(path), *(files if own else ()), *flags]), 1, 1, torch.device("cpu"))
    assert [sorted(names) for names in seen[0]] == [sorted(base), sorted(novel)] and told in capsys.readouterr().err


def test_weights_to_begin_with_are_of_the_same_clip_and_another_image_size_is_told(clip_file, tmp_path, capsys):
    path = saved(tmp_path / "best.pt", clip_file, clip_name="tiny-a")
    model, _ = dkdetr.load(path)
    here = mock.MagicMock(it=0, model=model, args=argparse.Namespace(start_from=str(path), image_size=128))
    here.plain = dict(novel=[], arch=dict(clip_name="tiny-b"))
    with pytest.raises(UserError, match="best.pt: was trained with CLIP tiny-a, this is tiny-b; bring that back, or start anew"):
        dkdetr.begin_as_copy(here)
    assert "best.pt: was trained at --image-size 160, it sees 128 here\n" in capsys.readouterr().err and not here.save.called
    here.plain = dict(novel=[], arch=dict(clip_name="tiny-a"))
    dkdetr.begin_as_copy(here)
    assert here.save.called


def test_targets_are_cut_to_the_image_before_their_size_is_asked():
    scale = torch.tensor([[[100.0, 50, 100, 50]]])
    boxes = dkdetr.cut_boxes(torch.tensor([[[0.05, 0.5, 0.25, 0.4], [0.5, 0.5, 0.2, 0.4]]]), scale)
    assert torch.allclose(boxes, torch.tensor([[[0.0, 15, 17.5, 35], [40, 15, 60, 35]]]), atol=1e-4)


def test_flags_that_cannot_act_are_refused(capsys):
    for words, text in ((["--row", "own"], "--row own: is for your own data"), (["--data", "shapes", "--images", "x"], "--data shapes has its own"),
                        (["--skd", "none", "--rkd", "none", "--kd-embed", "shared"], "--kd-embed: belongs to")):
        with pytest.raises(SystemExit):
            dkdetr.parse_args(words)
        assert text in capsys.readouterr().err
    with pytest.raises(UserError, match="--kd-topk 500: there are 300"):
        dkdetr.resolve(dkdetr.parse_args(["--kd-topk", "500"]))


def test_masks_stay_with_the_dataset_of_their_training(clip_file, tmp_path):
    torch.manual_seed(0)
    model = dkdetr.DKDETR("tiny8", 64, 32, 4, 32, 3, 1, 2, 40, 0.0, masks=True)
    model.arch |= dkdetr.SEEN | dict(clip=str(clip_file), dataset="coco", data="data/coco")
    model.novel = []
    masks = lambda *flags: dkdetr.follow(dkdetr.parse_args(["--predict", "a.jpg", "--weights", "x", *flags]), model, ["a"]).masks
    assert masks() and masks("--dataset", "lvis") and not masks("--dataset", "voc")


def test_another_clip_is_told_and_another_width_refused(clip_file, tmp_path, capsys):
    model, _ = dkdetr.load(saved(tmp_path / "a.pt", clip_file, clip_name="ViT-B-32-quickgelu/openai"))
    dkdetr.clip_for(model, torch.device("cpu"))
    assert "was trained with CLIP ViT-B-32-quickgelu/openai, this is tiny-" in capsys.readouterr().err
    model.arch["clip_name"] = dkdetr.clip_for(model, torch.device("cpu")).name
    capsys.readouterr()
    dkdetr.clip_for(model, torch.device("cpu"))
    assert not capsys.readouterr().err
    model.arch["text_dim"] = 512
    with pytest.raises(UserError, match="has 64-d embeddings, the checkpoint 512-d"):
        dkdetr.clip_for(model, torch.device("cpu"))


# ------------------------------------------------------------------ load, predict_image, --export

def test_load_and_predict_image_from_python(clip_file, tmp_path):
    from PIL import Image
    model, classes = dkdetr.load(saved(tmp_path / "a.pt", clip_file))
    assert classes == ["worker", "stool, wooden", "dog"] and model.novel == ["dog"] and not model.training
    Image.effect_noise((120, 90), 90).convert("RGB").save(tmp_path / "x.png")
    boxes, scores, names = dkdetr.predict_image(model, classes, tmp_path / "x.png", score=0.0)
    assert boxes.shape == (120, 4) and set(names) <= set(classes) and (scores.diff() <= 0).all()
    assert boxes.min() >= 0 and boxes[:, 0::2].max() <= 120 and boxes[:, 1::2].max() <= 90
    pixels = dkdetr.as_pixels(tmp_path / "x.png")
    assert torch.equal(dkdetr.predict_image(model, classes, pixels, 0.0)[0], boxes)
    assert set(dkdetr.predict_image(model, ["red panda"], pixels, 0.0)[2]) == {"red panda"}


def test_names_of_a_checkpoint_are_what_is_evaluated(clip_file, tmp_path):
    path = saved(tmp_path / "a.pt", clip_file, data="data/coco", dataset="ovcoco")
    follow = lambda *flags: dkdetr.follow(dkdetr.parse_args(["--eval", str(path), *flags]), *dkdetr.load(path))
    a = follow()
    assert a.base_names == ["worker", "stool, wooden"] and a.novel_names == ["dog"] and (a.dataset, a.image_size) == ("ovcoco", 160)
    assert follow("--dataset", "voc").base_names == follow("--dataset", "voc").novel_names == []
    a = follow("--classes", "Worker,dog,cat")  # what was trained stays base, whatever ovcoco calls novel
    assert a.base_names == ["worker", "stool, wooden"] and a.novel_names == ["dog", "cat"]
    for novel in (["cat", "dog"], ["worker", "dog"]):  # those that are given, beside the checkpoint's own, which is never base
        a = follow("--novel", novel[0])
        assert a.novel_names == novel and a.base_names == [n for n in ("worker", "stool, wooden") if n not in novel]
    a = follow("--novel", "cat", "--dataset", "voc")  # of other data all the rest is base
    assert a.novel_names == ["cat", "dog"] and a.base_names == []
    a = follow("--base", "dog")
    assert a.base_names == ["dog"] and a.novel_names == []


def test_a_list_of_names_is_no_text(clip_file, tmp_path):
    model, _ = dkdetr.load(saved(tmp_path / "a.pt", clip_file))
    with pytest.raises(dkdetr.UserError, match="'cat' is one text; give a list"):
        dkdetr.predict_image(model, "cat", torch.zeros(3, 60, 80, dtype=torch.uint8))
    with pytest.raises(dkdetr.UserError, match=r"uint8 of shape \(3, 0, 80\), expected"):
        dkdetr.predict_image(model, ["cat"], torch.zeros(3, 0, 80, dtype=torch.uint8))


def test_flags_without_distillation_or_with_a_folder_of_ones_own(tmp_path):
    flags = lambda *words: dkdetr.resolve(dkdetr.parse_args([*words]))
    assert flags("--queries", "10", "--skd", "none", "--rkd", "none").queries == 10
    with pytest.raises(dkdetr.UserError, match="--kd-topk 20: there are 10"):
        flags("--queries", "10")
    out = lambda *words: dkdetr.parse_args(["--eval", "x", "--dataset", "coco", *words]).out
    assert out() == "runs/dkdetr-eval-coco" and out("--out", "runs/dkdetr-eval") == "runs/dkdetr-eval"


def test_export_is_the_detector_with_its_names(clip_file, tmp_path):
    path = saved(tmp_path / "a.pt", clip_file)
    r = run("--export", tmp_path / "d.pt2", "--weights", path)
    assert "the same as in eager mode on other sizes" in r.stdout
    names = {"classes.json": ""}
    program = torch.export.load(tmp_path / "d.pt2", extra_files=names).module()
    assert json.loads(names["classes.json"]) == ["worker", "stool, wooden", "dog"]
    model, classes = dkdetr.load(path)
    images = torch.randint(0, 256, (2, 3, 192, 160), dtype=torch.uint8)
    sizes = torch.tensor([[192, 160], [150, 121]])  # the second is padded
    with torch.no_grad():
        boxes, scores, features = program(images, sizes)
        out = model(dkdetr.normalise(images, sizes), sizes)
    want = dkdetr.classify(out.features[-1], dkdetr.text_of(model, classes)).sigmoid()
    assert scores.shape == (2, 40, 3) and (scores - want).abs().max() < 1e-4 and (features - out.features[-1]).abs().max() < 1e-3
    assert (boxes - dkdetr.to_pixels(out.boxes[-1], sizes.flip(1).repeat(1, 2)[:, None])).abs().max() < 0.01
    r = run("--export", tmp_path / "d.txt", "--weights", path, fail=True)
    assert "Traceback" not in r.stderr and ".pt2" in r.stderr


# ------------------------------------------------------------------ the loss, without argparse

def test_one_image_a_process_counts_relations_twice_and_says_so(clip):
    f, v, there = torch.randn(1, 5, 8), torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    image = dkdetr.relational_loss(f, v, there)
    assert torch.equal(image, dkdetr.relational_loss(*map(dkdetr.as_one_group, (f, v, there))))

    class Data(list):
        classes = ["a"]
    for size, told in ((1, True), (2, False)):
        a = dkdetr.resolve(dkdetr.parse_args(["--batch-size", str(size)]))
        assert ("counts Eq. 5 within the image twice" in dkdetr.method_of(a, clip, Data(), [], 10, 1e-4)) == told


def test_a_comparison_of_the_full_method_is_the_distiller(clip):
    """Distiller is the algorithm, Comparison all its rows; where both say the same they must agree."""
    torch.manual_seed(0)
    model = dkdetr.DKDETR("tiny8", 64, 32, 4, 32, 3, 1, 2, 12, 0.0)
    text = clip.class_embeddings(["circle", "square", "cross"])
    settings = dkdetr.Settings(kd_min_size=1.0)
    assert type(dkdetr.make_distiller(model, text, clip, settings)) is dkdetr.Distiller
    assert type(dkdetr.make_distiller(model, text, clip, settings._replace(rkd="image"))) is dkdetr.Comparison
    batch = dict(images=torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8), sizes=torch.tensor([[96, 96]] * 2),
                 boxes=torch.tensor([[[10.0, 10, 50, 50]]] * 2), labels=torch.tensor([[0], [1]]), counts=[1, 1])
    losses = []
    for kind in (dkdetr.Distiller, dkdetr.Comparison):
        distiller = kind(model, text, clip, settings)
        distiller.distil(True)
        losses.append(distiller(batch))
    assert {"skd", "rkd"} <= set(losses[0]) and all(torch.equal(v, losses[1][k]) for k, v in losses[0].items())


def test_large_maps_are_sampled_again_in_the_backward_pass(monkeypatch):
    torch.manual_seed(0)
    layer, calls = dkdetr.DeformableAttention(32, 4, 1), []
    real = dkdetr.msda_grid
    monkeypatch.setattr(dkdetr, "msda_grid", lambda *a: calls.append(1) or real(*a))
    for large, count in ((10**6, 1), (3, 2)):
        monkeypatch.setattr(dkdetr, "LARGE", large)
        calls.clear()
        values = layer.values(torch.randn(1, 16, 32), torch.zeros(1, 16, dtype=torch.bool))
        layer(torch.randn(1, 16, 32), torch.rand(1, 16, 1, 2), values, [(4, 4)]).sum().backward()
        assert len(calls) == count


def test_the_header_names_every_flag_that_it_mentions():
    import re
    parser_flags = set(re.findall(r'"--?([a-z][\w-]+)"', (ROOT / "dkdetr.py").read_text()))
    known = parser_flags | {name for name, _, _ in dkdetr.OPEN}
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]+)", dkdetr.__doc__):
        flag = flag.removeprefix("no-")
        assert flag in known or f'"{flag}"' in Path(ROOT / "dkdetr.py").read_text() + Path(ROOT / "common/run.py").read_text() or flag in ("nnodes", "nproc_per_node"), flag
