# SPDX-License-Identifier: MIT
"""Inputs that people reported in public, made from real files by the mutation named: whatever a file
holds, it is read so that its ground truth, scored as if a detector had found exactly it, gets AP 100
("perfect"), or it is refused in one line that names file and entry. Nothing is wrong silently."""
import copy
import gzip
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common.datasets as datasets
from common.datasets import (CocoDataset, as_pixels, collate, eval_loader, find_coco, own_files,
                             picture_size, read_annotations, read_image, read_json, read_voc,
                             records_of, require_lvis, stream_json, train_loader)
from common.evaluation import coco_evaluate, encode_mask, lvis_evaluate, voc_evaluate
from common.run import UserError
from conftest import ROOT, SHARED, free_port

BIG = 2**70  # beyond 64 bit
WRONG_BOX = "expected four finite numbers x, y, width, height"


@pytest.fixture(scope="session")
def voc_mini():
    path = SHARED / "data" / "voc_mini"
    if not path.exists():
        pytest.skip(f"real photographs are not here: {path}")
    return path


@pytest.fixture(scope="session")
def lvis_mini():
    path = SHARED / "data" / "lvis_mini"
    if not path.exists():
        pytest.skip(f"LVIS samples are not here: {path}")
    return path


@pytest.fixture(scope="session")
def eight(coco_mini):
    """(content, image folder): eight photographs of COCO val2017 with their 80 classes."""
    content = json.loads((coco_mini / "annotations/instances_val2017.json").read_text())
    many = {i["id"]: 0 for i in content["images"]}
    crowded = set()
    for a in content["annotations"]:
        many[a["image_id"]] += 1
        crowded |= {a["image_id"]} if a["iscrowd"] else set()
    few = [i for i in content["images"] if many[i["id"]] < 30]
    few.sort(key=lambda i: (i["id"] not in crowded, i["id"]))
    content["images"] = few[:8]
    ids = {i["id"] for i in few[:8]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    assert sum(a["iscrowd"] for a in content["annotations"]) and len(content["annotations"]) > 25
    return content, coco_mini / "val2017"


@pytest.fixture
def world(eight, tmp_path):
    """A copy to change: `content` is written when a dataset is asked for."""
    return World(copy.deepcopy(eight[0]), eight[1], tmp_path)


class World:
    def __init__(self, content, photos, folder):
        self.content, self.folder, self.path = content, folder / "images", folder / "own.json"
        self.folder.mkdir()
        for i in content["images"]:
            (self.folder / i["file_name"]).symlink_to(photos / i["file_name"])
        self.images, self.annotations = content["images"], content["annotations"]
        self.categories = content["categories"]

    def add(self, box, **more):
        """A box on the first image."""
        key = self.images[0]["id"]
        self.annotations.append(dict(id=9000, image_id=key, category_id=1, bbox=box, iscrowd=0, **more))

    def write(self):
        self.path.write_text(json.dumps(self.content), encoding="utf-8")

    def dataset(self, train=False, **kwargs):
        self.write()
        return CocoDataset(self.folder, self.path, train, **dict(dict(image_size="96", flip=0), **kwargs))

    def error(self, **kwargs):
        """The line after the file's name."""
        text = error_of(lambda: self.dataset(**kwargs))
        assert text.startswith(f"{self.path}: "), text
        return text.removeprefix(f"{self.path}: ")

    def count(self, train=False):
        return dict(self.dataset(train).records.count)


def error_of(action):
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def detections(data):
    """The boxes that the loader yields, in the file's pixels, as results."""
    results = []
    for k in range(len(data)):
        item = data[k, 0]
        (h, w), (height, width) = item["size"], item["original_size"]
        boxes = item["boxes"].double() * torch.tensor([width / w, height / h] * 2)
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), item["labels"].tolist()):
            results.append(dict(image_id=item["image_id"], category_id=data.category_ids[label],
                                bbox=[x1, y1, x2 - x1, y2 - y1], score=0.9))
    return results


def perfect(data):
    results = detections(data)
    assert results
    return coco_evaluate(data.truth(), results)["AP"] == pytest.approx(100, abs=1e-6)


def each(entries, key, value):
    """Set a key of all entries; value: function of (place, entry)."""
    for k, e in enumerate(entries):
        e[key] = value(k, e)


# ------------------------------------------------------------------ ids

IDS = {
    "from 0": lambda k, e: k, "negative": lambda k, e: -1 - k, "floats": lambda k, e: k + 0.5,
    "text": lambda k, e: f"entry {k}", "numbers as text": lambda k, e: str(k),
    "beyond 64 bit": lambda k, e: BIG + k, "text and numbers": lambda k, e: k if k % 2 else f"{k}",
}


def test_the_untouched_file_is_perfect(world):
    data = world.dataset()
    assert perfect(data) and data.records.count == {} and data.records.warning() == ""
    assert coco_evaluate(data.truth(), detections(data)) == coco_evaluate(world.path, detections(data))


@pytest.mark.parametrize("ids", [
    *IDS.values(), lambda k, e: 7, lambda k, e: None, lambda k, e: k % 2 == 0, lambda k, e: [k],
    lambda k, e: math.nan], ids=[*IDS, "all alike", "none", "bool", "list", "nan"])
def test_annotation_ids_do_not_matter(world, ids):
    """perfect AP was 95.0 where they start at 0."""
    each(world.annotations, "id", ids)
    assert perfect(world.dataset()) and world.count() == {}


def test_annotation_ids_that_restart_in_each_image_or_are_absent(world):
    """perfect AP was 58.4."""
    seen = {}
    for a in world.annotations:
        seen[a["image_id"]] = seen.get(a["image_id"], 0) + 1
        a["id"] = seen[a["image_id"]]
    assert perfect(world.dataset())
    for a in world.annotations:
        del a["id"]
    assert perfect(world.dataset())
    world.annotations[4]["bbox"] = None
    assert world.error() == f"annotation number 5 has bbox None; {WRONG_BOX}"


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("kind", ["images", "categories"])
def test_image_and_category_ids_of_any_kind(world, kind, ids):
    """Ids come back as they are: in items, in the truth, in results."""
    field = {"images": "image_id", "categories": "category_id"}[kind]
    new = {e["id"]: ids(k, e) for k, e in enumerate(world.content[kind])}
    each(world.annotations, field, lambda k, a: new[a[field]])
    each(world.content[kind], "id", lambda k, e: new[e["id"]])
    data = world.dataset()
    assert perfect(data)
    if kind == "images":
        assert [i[0] for i in data.items] == list(new.values())
    else:
        assert sorted(data.category_ids, key=str) == sorted(new.values(), key=str)
    results = json.loads(json.dumps(detections(data)))  # as detections.json has them
    assert coco_evaluate(world.path, results)["AP"] == pytest.approx(100, abs=1e-6)


@pytest.mark.parametrize("wrong", [True, None, [1], {"a": 1}, math.nan, math.inf], ids=str)
def test_ids_that_are_none_are_refused(world, wrong):
    world.images[3]["id"] = wrong
    assert world.error() == f"image {wrong!r} lacks id, width, height or file_name"
    world.images[3]["id"] = 12345678
    world.categories[2]["id"] = wrong
    assert world.error() == f"category {world.categories[2]!r} has id {wrong!r}; expected a number"
    world.categories[2]["id"] = 3
    world.annotations[5].update(id=55, image_id=wrong)
    assert world.error() == f"annotation 55 has image id {wrong!r}, which 'images' does not list"


def test_true_is_not_the_image_1(world):
    world.images[0]["id"] = 1
    each(world.annotations, "image_id", lambda k, a: True)
    assert "has image id True, which 'images' does not list" in world.error()
    each(world.annotations, "image_id", lambda k, a: 1)
    each(world.annotations, "category_id", lambda k, a: True)
    assert "has category id True, which 'categories' does not list" in world.error()


def test_ids_as_text_beside_numbers_name_both(world):
    """"54718 ... does not list", it said, although that one was listed."""
    each(world.annotations, "image_id", lambda k, a: str(a["image_id"]))
    first = world.annotations[0]
    assert world.error() == (f"annotation {first['id']} has image id {first['image_id']!r} (text), which "
                             f"'images' does not list; it lists {first['image_id']}")
    each(world.annotations, "image_id", lambda k, a: int(a["image_id"]))
    each(world.categories, "id", lambda k, c: str(c["id"]))
    k = world.annotations[0]["category_id"]
    assert world.error().endswith(f"category id {k}, which 'categories' does not list; it lists '{k}' (text)")


def test_joined_files_are_refused_and_name_id_and_both_files(world):
    """8 pictures became 4, with the boxes of two pictures on one, silently."""
    new = {i["id"]: k % 4 for k, i in enumerate(world.images)}
    each(world.annotations, "image_id", lambda k, a: new[a["image_id"]])
    each(world.images, "id", lambda k, i: new[i["id"]])
    names = [i["file_name"] for i in world.images]
    assert world.error() == (f"image 0 stands there twice, for {names[0]} and for {names[4]}; every image "
                             "needs an id of its own (were two files joined?)")


def test_an_image_that_is_listed_twice_counts_once(world):
    world.images += copy.deepcopy(world.images[:3])
    data = world.dataset()
    assert perfect(data) and len(data) == 8
    assert data.records.count == {"images that are listed twice, once left out": 3}
    world.images[-1]["width"] += 1  # not the same
    assert "stands there twice" in world.error()


# ------------------------------------------------------------------ the file

def test_the_order_of_lists_does_not_matter(world):
    plain = world.dataset()
    for order in (("annotations", "images", "categories"), ("categories", "annotations", "images")):
        world.content = {k: world.content[k] for k in order} | {"info": dict(x=[1, {"images": []}])}
        data = world.dataset()
        assert perfect(data) and detections(data) == detections(plain)


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_lists_that_are_missing_or_none(world, name):
    for wrong in (None, {}, "many", 5):
        world.content[name] = wrong
        assert world.error() == f"no '{name}' list; this is not COCO instances json"
    del world.content[name]
    assert world.error() == f"no '{name}' list; this is not COCO instances json"


def test_empty_lists(world):
    lists = dict(images=world.images, annotations=world.annotations, categories=world.categories)
    expected = {"images": "the 'images' list is empty", "categories": "the 'categories' list is empty",
                "annotations": "no box is left to evaluate (it holds none)"}
    for name, line in expected.items():
        world.content.update(lists, **{name: []})
        if name != "annotations":
            world.content["annotations"] = []
        assert world.error() == line
    world.content.update(lists, annotations=[])
    assert world.error(train=True) == "no usable image (training needs annotated ones)"


@pytest.mark.parametrize("junk", [None, 5, "text", [], [{}], True], ids=str)
def test_entries_that_are_no_object(world, junk):
    for name in ("images", "annotations"):
        world.content[name].insert(2, junk)
        assert world.error() in (f"'{name}' holds {junk!r}, which is no object",
                                 f"'{name}' holds {junk!r} (text), which is no object")
        del world.content[name][2]
    world.categories.append(junk)
    assert "lacks id or name" in world.error()


def test_a_list_instead_of_an_object(world):
    """Results, given as annotations."""
    world.content = [dict(image_id=1, category_id=1, bbox=[1, 2, 3, 4], score=0.5)]
    assert world.error() == "no 'images' list; this is not COCO instances json"


@pytest.mark.parametrize("change, words", [
    (lambda t: t[:-1], "not valid json (expected , or } at byte"),
    (lambda t: t[:len(t) // 2], "not valid json ("),
    (lambda t: t + t, "two files in one?"),
    (lambda t: t + "\x00", "it goes on after its end"),
    (lambda t: t.replace(', "annotations"', '  "annotations"'), "not valid json (expected , or }"),
    (lambda t: t.replace('"annotations": [', '"annotations": [,'), "expected a value at byte"),
    (lambda t: t.replace('"annotations"', '"images"'), "the key 'images' is none, or stands there twice"),
    (lambda t: t.replace('"annotations"', "5"), "the key 5 is none"),
    (lambda t: t.replace('"annotations": [', '"annotations": [' + "[" * 100000), "not valid json ("),
    (lambda t: t.replace('"iscrowd": 0', '"iscrowd": ' + "9" * 5000), "not valid json ("),
    (lambda t: "", "the file is empty"),
    (lambda t: "{}", "no 'images' list"),
    (lambda t: " { } ", "no 'images' list"),
    (lambda t: "{} {}", "two files in one?"),
], ids=["end", "half", "twice", "nul", "comma", "gap", "key", "no-key", "deep", "digits", "empty", "object",
        "blank-object", "two"])
def test_json_that_is_none(world, change, words):
    world.write()
    world.path.write_text(change(world.path.read_text()))
    text = error_of(lambda: CocoDataset(world.folder, world.path, False))
    assert text.startswith(f"{world.path}: ") and words in text


def test_encodings(world):
    world.categories[0]["name"] = "Straße 猫 🐈"
    plain = world.dataset()
    assert plain.classes[0] == "Straße 猫 🐈" and perfect(plain)  # json.dumps wrote \u escapes
    text = json.dumps(world.content, ensure_ascii=False, indent=1)
    for encoding in ("utf-8", "utf-8-sig"):
        world.path.write_text(text, encoding=encoding)
        data = CocoDataset(world.folder, world.path, False, image_size="96")
        assert data.classes == plain.classes and detections(data) == detections(plain)
        assert read_json(world.path)["categories"][0]["name"] == plain.classes[0]
    world.path.write_text(text, encoding="utf-16")
    assert "not valid json (it is UTF-16; save it as UTF-8)" in error_of(lambda: read_annotations(world.path))
    world.path.write_bytes(text.replace(" 猫 🐈", "").encode("latin-1"))
    for read in (read_annotations, read_json):
        assert error_of(lambda: read(world.path)) == f"{world.path}: is not UTF-8; save it as UTF-8"


IN_C_LOCALE = """
import json, locale, sys
sys.path.insert(0, {root!r})
from common.datasets import CocoDataset, read_json
assert locale.getpreferredencoding(False) != "UTF-8" and sys.getfilesystemencoding() != "utf-8"
data = CocoDataset({folder!r}, {path!r}, False, image_size="64", captions={captions!r})
read_json({path!r})
items = [data[k, 0] for k in range(len(data))]
print(ascii([data.classes[:3], data.captions[0], len(items), data.truth()["categories"][0]["name"]]))
"""


def test_text_is_utf8_under_any_locale(world, tmp_path):
    """ß became mojibake, which was then given to CLIP."""
    names = ["Straße", "猫", "a\u0308"]
    for c, name in zip(world.categories, names):
        c["name"] = name
    for i, name in zip(world.images, ["Größe.jpg", "猫 1.jpg"]):
        (world.folder / i["file_name"]).rename(world.folder / name)
        i["file_name"] = name
    world.path = world.path.with_name("größe.json")
    world.path.write_text(json.dumps(world.content, ensure_ascii=False), encoding="utf-8")
    captions = tmp_path / "captions.json"
    caption = dict(image_id=world.images[0]["id"], caption=" süß ")
    captions.write_text(json.dumps(dict(annotations=[caption]), ensure_ascii=False), encoding="utf-8")
    code = IN_C_LOCALE.format(root=str(ROOT), folder=str(world.folder), path=str(world.path),
                              captions=str(captions))
    script = tmp_path / "run.py"
    script.write_text("# -*- coding: utf-8 -*-\n" + code.replace(repr(str(world.path)), "sys.argv[1]"),
                      encoding="utf-8")
    env = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, script, world.path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert eval(done.stdout) == [names, ["süß"], 8, "Straße"]


# ------------------------------------------------------------------ class names

@pytest.mark.parametrize("name, reason", [
    ("", "is empty"), ("  ", "is empty"), ("a\x00b", "holds a control character"),
    ("a\nb", "holds a control character"), ("a\x85b", "holds a control character"),
    ("a\u2028b", "holds a control character"),
    ("cat\ud83d", "holds half of a character (a lone surrogate)")], ids=ascii)
def test_names_that_are_none(world, name, reason):
    world.categories[1]["name"] = name
    assert world.error() == f"category 2 has name {name!r}, which {reason}"


@pytest.mark.parametrize("name", [None, True, ["cat"], {"en": "cat"}], ids=str)
def test_names_of_another_kind(world, name):
    world.categories[1]["name"] = name
    assert world.error() == f"category 2 has name {name!r}; expected text"


def test_names_with_blanks_and_numeric_names_are_repaired_and_told(world):
    world.categories[0]["name"], world.categories[1]["name"] = " person\n", 7
    world.categories[2]["name"] = "dining table, round"
    data = world.dataset()
    assert data.classes[:3] == ["person", "7", "dining table, round"] and perfect(data)
    assert data.records.count == {"class names with blanks around them, cut": 1,
                                  "class names that were numbers, read as text": 1}
    assert "| 1 class names with blanks around them, cut; 1 class names that were" in data.report()


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_empty_category_of_the_same_name_is_left_out(world, first):
    """An export's parent: the table showed "-" for the class while AP was 100."""
    used = world.annotations[0]["category_id"]
    name = next(c["name"] for c in world.categories if c["id"] == used)
    world.categories.append(dict(id=0 if first else 500, name=f"{name} "))
    world.categories.append(dict(id=600, name=name))  # a third one
    data = world.dataset()
    assert perfect(data) and len(data.classes) == 80 and used in data.category_ids
    assert coco_evaluate(data.truth(), detections(data))["classes"][name]["AP"] > 99
    line = (f"category {0 if first else 500}, which has no box and the name '{name}' of another, left out")
    assert line in data.records.count and f"; {line}" in data.report()


def test_two_categories_of_one_name_with_boxes_are_refused(world):
    used = world.annotations[0]["category_id"]
    name = next(c["name"] for c in world.categories if c["id"] == used)
    world.categories.append(dict(id=500, name=name))
    world.annotations[1]["category_id"] = 500
    world.annotations[1]["iscrowd"] = 0
    world.annotations[0]["iscrowd"] = 0
    assert world.error() == (f"categories {used} and 500 have the same name {name!r}, and both have boxes; "
                             "rename one")
    world.annotations[1]["bbox"] = [-50, -50, 10, 10]  # which is left out: no box any more
    assert perfect(world.dataset())


def test_a_category_id_that_occurs_twice(world):
    world.categories.append(dict(id=1, name="other"))
    assert world.error() == "a category id occurs twice: 1"


def test_an_unknown_category(world):
    world.annotations[3]["category_id"] = 12345
    number = world.annotations[3]["id"]
    assert world.error() == f"annotation {number} has category id 12345, which 'categories' does not list"


# ------------------------------------------------------------------ boxes

@pytest.mark.parametrize("box", [
    None, "1 2 3 4", {}, [], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, None, 4], [1, 2, [3], 4], [1, 2, True, 4],
    [1, 2, "wide", 4], [1, 2, "nan", 4], [1, 2, "inf", 4]], ids=str)
def test_boxes_that_are_none(world, box):
    number = world.annotations[6]["id"]
    world.annotations[6]["bbox"] = box
    told = f"{box!r} (text)" if isinstance(box, str) else repr(box)
    assert world.error() == f"annotation {number} has bbox {told}; {WRONG_BOX}"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400])
def test_numbers_that_are_none(world, number):
    world.annotations[6]["bbox"] = [1, 2, 3, 987654]
    world.write()
    world.path.write_text(world.path.read_text().replace("987654", number))
    text = error_of(lambda: read_annotations(world.path))
    assert text.startswith(f"{world.path}: annotation {world.annotations[6]['id']} has bbox [1")
    assert text.endswith(WRONG_BOX)


def test_boxes_as_text_are_read(world):
    plain = detections(world.dataset())
    each(world.annotations, "bbox", lambda k, a: [str(v) for v in a["bbox"]] if k % 2 else a["bbox"])
    data = world.dataset()
    assert perfect(data) and detections(data) == plain
    assert data.records.count == {"boxes given as text, read as numbers": len(world.annotations) // 2}


def test_boxes_from_the_lower_right_corner_are_turned_for_training_and_evaluation_alike(world):
    """Left out in training, kept in evaluation: perfect AP was 71.1."""
    plain = world.dataset(), world.dataset(train=True)

    def turn(k, a):
        x, y, w, h = a["bbox"]
        return [[x + w, y + h, -w, -h], a["bbox"], [x + w, y, -w, h], [x, y + h, w, -h]][k % 4]
    each(world.annotations, "bbox", turn)
    for data, before in zip((world.dataset(), world.dataset(train=True)), plain):
        assert perfect(data)
        n = len(world.annotations)
        assert data.records.count == {"boxes drawn from another corner, turned": n - len(range(1, n, 4))}
        for a, b in zip(data.items, before.items):
            assert np.allclose(a[4], b[4], atol=1e-4) and (a[5] == b[5]).all()


def test_boxes_without_size_and_outside_are_left_out_for_training_and_evaluation_alike(world):
    width, height = world.images[0]["width"], world.images[0]["height"]
    for box in ([5, 5, 0, 9], [5, 5, 9, 0], [5, 5, 0, 0], [5, 5, 1e-9, 9], [width, 5, 9, 9],
                [5, height, 9, 9], [-9, 5, 9, 9], [5, 5e9, 9, 9], [-99, -99, 9, 9]):
        world.add(box)
    for train in (False, True):
        data = world.dataset(train)
        assert perfect(data)
        assert data.records.count == {"boxes without width or height, left out": 4,
                                      "boxes outside their image, left out": 5}
    assert not {tuple(b) for b in data.records.xywh.tolist()} & {(5, 5, 0, 9), (-9, 5, 9, 9)}


def test_boxes_over_the_border_are_cut_but_not_where_the_file_is_rounded(world):
    width, height = world.images[0]["width"], world.images[0]["height"]
    boxes = [[-20, 10, 60, 50], [width - 20, height - 20, 40, 40], [-5, -5, width + 10, height + 10],
             [-0.5, 3, 4, 4], [width - 100, 4, 100.3, 40], [-0.25, -0.25, 50, 50]]
    for box in boxes:
        world.add(box)
    data = world.dataset()
    assert perfect(data) and data.records.count == {"boxes over the border of their image, cut there": 4}
    mine = data.records.xywh[data.records.owner == 0].tolist()
    assert mine[-6:] == [[0, 10, 40, 50], [width - 20, height - 20, 20, 20], [0, 0, width, height],
                         [0, 3, 3.5, 4], boxes[4], boxes[5]]


def test_small_boxes_are_evaluated_but_not_trained_on(world):
    for side in (0.05, 0.5, 0.99, 1):
        for box in ([30, 30, side, 20], [200, 100, 20, side]):
            world.add(box)
    data, train = world.dataset(), world.dataset(train=True)
    assert perfect(data) and perfect(world.dataset(canvas=64)) and train.dropped["under 1 px"] == 6
    assert len(detections(data)) == len(detections(train)) + 6


@pytest.mark.parametrize("centred", [False, True], ids=["corner", "centre"])
@pytest.mark.parametrize("train", [False, True], ids=["val", "train"])
def test_fractions_are_refused(world, train, centred):
    """39 of 39 boxes were dropped; two scripts trained on background, exit code 0."""
    size = {i["id"]: (i["width"], i["height"]) for i in world.images}
    for a in world.annotations:
        (w, h), (x, y, bw, bh) = size[a["image_id"]], a["bbox"]
        a["bbox"] = [x / w + bw / w / 2 * centred, y / h + bh / h / 2 * centred, bw / w, bh / h]
    n = len(world.annotations)
    assert world.error(train=train) == (
        f"all {n} boxes lie within 0 ... 1: they look like fractions of the image; "
        "expected pixels x, y, width, height")
    for a in world.annotations[::5]:  # some are pixels: a warning
        a["bbox"] = [10, 10, 50, 50]
    records = world.dataset(train).records
    nothing = records.count["boxes without width or height, left out"]  # under 0.01
    assert records.warning().endswith(f"{n - len(range(0, n, 5)) - nothing} of {n - nothing} boxes are under "
                                      "1 pixel; are they fractions of the image instead of pixels?")


def test_all_boxes_left_out_is_told_by_reason(world):
    n = len(world.annotations)
    each(world.annotations, "bbox", lambda k, a: [5000, 5, 20, 20] if k % 2 else [5, 5, 0, 20])
    assert world.error(train=True) == (
        f"no box is left of {n}: {n - n // 2} boxes without width or height, left out; "
        f"{n // 2} boxes outside their image, left out")
    each(world.annotations, "bbox", lambda k, a: [5, 5, 20, 20])
    each(world.annotations, "iscrowd", lambda k, a: 1)
    assert world.error(train=True) == f"no box is left to train on ({n} crowd)"
    assert world.error() == f"no box is left to evaluate ({n} crowd)"


def test_corners_instead_of_width_and_height_are_warned_of(world):
    """32 of 39 reached beyond the image, silently."""
    assert world.dataset().report().count("\n") == 0

    def corners(k, a):
        x, y, w, h = a["bbox"]
        return [x, y, x + w, y + h]
    each(world.annotations, "bbox", corners)
    for train in (False, True):
        data = world.dataset(train)
        beyond = data.records.count["boxes over the border of their image, cut there"]
        n = len(world.annotations)
        assert beyond > n / 3 and perfect(data)
        assert data.report().splitlines()[1] == (
            f"warning: {world.path}: {beyond} of {n} boxes reach beyond their image; "
            "are they x1 y1 x2 y2 instead of x, y, width, height?")


# ------------------------------------------------------------------ crowd, area

@pytest.mark.parametrize("value, crowd", [
    (None, 0), (0, 0), (False, 0), ("0", 0), (0.0, 0), (1, 1), (True, 1), ("1", 1), (1.0, 1)], ids=repr)
def test_crowd_of_many_kinds(world, value, crowd):
    """null: trained, then a TypeError without a best.pt."""
    world.annotations[:] = [a for a in world.annotations if not a["iscrowd"]]
    n = len(world.annotations)
    world.annotations[4]["iscrowd"] = value
    del world.annotations[5]["iscrowd"]
    data = world.dataset()
    assert perfect(data) and len(detections(data)) == n - crowd and data.dropped["crowd"] == crowd
    assert sum(a["iscrowd"] for a in data.truth()["annotations"]) == crowd


@pytest.mark.parametrize("value", [2, -1, 0.5, "yes", [], {}, [1]], ids=repr)
def test_crowd_that_is_none(world, value):
    number = world.annotations[4]["id"]
    world.annotations[4]["iscrowd"] = value
    told = f"{value!r} (text)" if isinstance(value, str) else repr(value)
    assert world.error() == f"annotation {number} has iscrowd {told}; expected 0 or 1"


@pytest.mark.parametrize("value", [None, "none", -5, math.nan, math.inf, [], "x", 10**400],
                         ids=lambda v: str(v)[:9])
def test_areas_that_are_none_are_those_of_the_boxes(world, value):
    a = next(a for a in world.annotations if not a["iscrowd"])
    a["area"] = value
    if value == "none":
        del a["area"]
    data = world.dataset()
    assert perfect(data) and perfect(world.dataset(train=True))
    mine = next(t for t in data.truth()["annotations"] if t["bbox"] == a["bbox"])
    assert mine["area"] == pytest.approx(a["bbox"][2] * a["bbox"][3])
    told = value is not None and value != "none"
    assert data.records.count == ({"areas that are none, replaced by the box's": 1} if told else {})


def test_areas_as_text_are_read_and_area_0_is_not_trained_on(world):
    plain = world.dataset()
    each(world.annotations, "area", lambda k, a: str(a["area"]))
    data = world.dataset()
    assert perfect(data) and data.truth() == plain.truth()
    each(world.annotations, "area", lambda k, a: 0 if k == 3 else a["area"])
    assert not world.annotations[3]["iscrowd"]
    assert world.dataset(train=True).dropped["under 1 px"] == 1 and perfect(world.dataset())


# ------------------------------------------------------------------ the list of images

def test_sizes_as_text_and_floats_are_read(world):
    for i, width in zip(world.images, (str, float, lambda w: f" {w}.0 ")):
        i["width"] = width(i["width"])
    data = world.dataset()
    assert perfect(data) and data.records.count == {"sizes given as text, read as numbers": 2}


def test_areas_beyond_the_box_are_those_of_the_boxes(world):
    each(world.annotations, "area", lambda k, e: 10.0 * e["bbox"][2] * e["bbox"][3] + 9 if k < 3 else e["area"])
    data = world.dataset()
    assert data.records.count["areas that are none, replaced by the box's"] == 3
    for a in data.truth()["annotations"]:
        assert a["area"] <= 1.5 * a["bbox"][2] * a["bbox"][3] + 1


# ------------------------------------------------------------------ what other tools write

def test_boxes_to_be_ignored_are_crowd(world):
    """mmdetection leaves "ignore" out of training; pycocotools overwrites it."""
    single = [a for a in world.annotations if not a["iscrowd"]]
    for a, value in zip(single, (1, True, "1", 0, False, None)):
        a["ignore"] = value
    data = world.dataset(train=True)
    assert data.records.count["boxes that are to be ignored, taken as crowd"] == 3
    assert len(data.records.xywh) - data.records.crowd.sum() == len(single) - 3


def test_boxes_that_stand_there_twice_are_told(world):
    assert "twice" not in world.dataset().report()
    twin = dict(world.annotations[0], id=9001)
    other = dict(world.annotations[0], id=9002, category_id=world.categories[-1]["id"])
    world.annotations += [twin, dict(twin, id=9003), other]
    assert "2 boxes that stand there twice" in world.dataset().report()


def test_a_picture_under_two_ids_is_warned_of(world):
    world.images.append(dict(world.images[0], id=777, file_name=f"./{world.images[0]['file_name']}"))
    warning = world.dataset().report().split("\n")[1]
    assert warning.startswith("warning: ") and "1 images of a picture that another one has, too" in warning


def test_masks_that_a_tool_calls_crowd_are_warned_of(world):
    assert "\n" not in world.dataset().report()
    each(world.annotations, "iscrowd", lambda k, e: int(k % 2))
    assert "boxes are iscrowd 1" in world.dataset().report().split("\n")[1]


def test_a_rotation_is_told(world):
    each(world.annotations, "attributes", lambda k, e: dict(occluded=False, rotation=(0.0, 90.0, "0", 360)[k % 4]))
    assert world.count()["boxes with a rotation, which is not read"] == len(world.annotations[1::4])


def test_more_objects_than_the_metric_takes_are_told(world):
    for k in range(101):
        world.add([k * 0.5, 5, 20, 20])
    assert "1 images have over 100 boxes" in world.dataset().report() and "over 100" not in world.dataset(train=True).report()


@pytest.mark.parametrize("name, fits", [
    ("{0}", True), ("COCO_val2014_{0}", True), ("sub\\\\{0}", True), ("other.jpg", False)])
def test_captions_of_another_numbering_are_refused(world, tmp_path, name, fits):
    key, file = world.images[0]["id"], world.images[0]["file_name"]
    captions = dict(images=[dict(id=key, file_name=name.format(file)), dict(id=12345, file_name="x.jpg")],
                    annotations=[dict(image_id=key, caption="a kitchen")])
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    if fits:
        assert ["a kitchen"] in world.dataset(captions=tmp_path / "captions.json").captions
    else:
        text = error_of(lambda: world.dataset(captions=tmp_path / "captions.json"))
        assert f"its image {key} is other, that of own.json is" in text


def test_captions_that_name_no_files_are_told(world, tmp_path, capsys):
    """Two files that both count from 1 would give every image another's caption."""
    key = world.images[0]["id"]
    (tmp_path / "captions.json").write_text(json.dumps(dict(images=[dict(id=key)], annotations=[dict(image_id=key, caption="a kitchen")])))
    world.dataset(captions=tmp_path / "captions.json")
    assert "captions.json: names no image files; its image ids are taken for those of own.json" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_tiff_is_turned_once_whoever_opens_it(tmp_path, orientation):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.tif", exif=exif)
    read = np.asarray(read_image(tmp_path / "a.tif", quiet=True))
    assert read.shape[:2] == ((40, 60) if orientation == 3 else (60, 40))
    for image in (tmp_path / "a.tif", Image.open(tmp_path / "a.tif")):
        assert np.array_equal(as_pixels(image).permute(1, 2, 0).numpy(), read)


def test_16_bits_of_which_0_is_white_are_inverted(tmp_path):
    levels = np.full((40, 60), 60000, np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0 and np.asarray(image).max() == 60000  # stored so, and Pillow inverts nothing
    assert np.unique(np.asarray(read_image(tmp_path / "a.tif"))) == [22]  # (65535 - 60000) / 257


@pytest.mark.parametrize("value", [-640, 640.5, "wide", "-5", True, [640], math.nan, 10**7], ids=str)
def test_sizes_that_are_none(world, value):
    key = world.images[1]["id"]
    world.images[1]["width"] = value
    told = f"{value!r} (text)" if isinstance(value, str) else repr(value)
    assert world.error() == f"image {key} has width {told}; expected a number of pixels"


def test_sizes_that_are_missing_are_those_of_the_picture(world):
    plain = world.dataset()
    del world.images[0]["width"]
    world.images[1]["height"] = 0
    world.images[2].update(width=None, height=None)
    world.images[3].update(width="0", height=0.0)
    data = world.dataset()
    assert perfect(data) and data.truth() == plain.truth()
    assert data.records.count["images without a size, taken from the picture"] == 4
    (world.folder / world.images[0]["file_name"]).unlink()
    assert error_of(world.dataset) == f"{world.folder / world.images[0]['file_name']}: image is missing"
    with pytest.raises(UserError, match="lacks id, width, height or file_name"):
        records_of(world.content, "x")


@pytest.mark.parametrize("name, reason", [
    ("/dev/zero", "leaves the image folder; names are relative to it"),
    ("../own.json", "leaves the image folder; names are relative to it"),
    ("a/../../own.json", "leaves the image folder; names are relative to it"),
    ("..\\own.json", "leaves the image folder; names are relative to it"),
    ("C:\\photos\\1.jpg", "leaves the image folder; names are relative to it"),
    ("C:/photos/1.jpg", "leaves the image folder; names are relative to it"),
    ("\\\\server\\1.jpg", "leaves the image folder; names are relative to it"),
    ("a\nb.jpg", "holds a control character"), ("a\0b.jpg", "holds a control character")], ids=ascii)
def test_file_names_that_leave_the_folder(world, name, reason):
    key = world.images[1]["id"]
    world.images[1]["file_name"] = name
    assert world.error() == f"image {key} has file_name {name!r}, which {reason}"


@pytest.mark.parametrize("name", [None, "", "  ", 5, ["a.jpg"]], ids=repr)
def test_file_names_that_are_none(world, name):
    key = world.images[1]["id"]
    world.images[1].update(file_name=name, coco_url=None)
    assert world.error() == f"image {key} lacks id, width, height or file_name"


def test_file_names_with_backslashes_dots_and_colons_are_found(world):
    (world.folder / "part").mkdir()
    for i, name in zip(world.images, ("part\\1.jpg", "./part//2.jpg", "part/x:3.jpg", " 4 .jpg")):
        target = world.folder / name.replace("\\", "/")
        (world.folder / i["file_name"]).rename(target)
        i["file_name"] = name
    data = world.dataset()
    assert perfect(data) and data.items[1][1] == "part/2.jpg"


@pytest.mark.parametrize("name", ["gone.jpg", "gone/1.jpg", ".", "lone\ud800.jpg", "x" * 300 + ".jpg"],
                         ids=ascii)
def test_a_missing_file_is_named_at_the_start(world, name):
    world.images[1]["file_name"] = name
    assert error_of(world.dataset).startswith(f"{world.folder}: 1 of 8 images are missing, first ")


def test_a_pipe_and_a_folder_instead_of_a_picture(world):
    paths = [world.folder / i["file_name"] for i in world.images]
    for path in paths[:3]:
        path.unlink()
    os.mkfifo(paths[0])
    paths[1].mkdir()
    paths[2].symlink_to("/dev/zero")
    data = world.dataset()
    for k, kind in enumerate(("a device or pipe", "a folder", "a device or pipe")):
        assert error_of(lambda: data[k, 0]) == f"{paths[k]}: is {kind}, not a file"
    for odd in ("/dev/zero", paths[0], paths[1]):
        with pytest.raises(UserError, match="is a (device or pipe|folder), not a file"):
            read_annotations(odd)
        with pytest.raises(UserError, match="is a (device or pipe|folder), not a file"):
            read_json(odd)


# ------------------------------------------------------------------ pictures

def turned(path, orientation, kind="jpg"):
    """The same scene, stored as a camera would that notes this orientation."""
    upright = Image.open(path).convert("RGB")
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # PIL's Transpose
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x112] = orientation
    path.unlink()
    options = dict(format="JPEG", quality=95) if kind == "jpg" else dict(format=kind.upper())
    stored.save(path, exif=exif, **options)
    return np.array(upright), stored.size


@pytest.mark.parametrize("orientation, kind", [
    *((k, "jpg") for k in range(2, 9)), (3, "png"), (6, "png"), (6, "webp"), (6, "tiff")])
def test_exif_orientations_are_upright_in_training_and_evaluation_or_refused(
        world, orientation, kind, capsys):
    """Orientation 3 has the same size: boxes were upright, the picture was turned."""
    path = world.folder / world.images[0]["file_name"]
    pixels, stored = turned(path, orientation, kind)
    assert picture_size(path) == (pixels.shape[1], pixels.shape[0])
    datasets.TURNED.clear()
    for data in (world.dataset(), world.dataset(train=True)):
        assert perfect(data)
        short = min(pixels.shape[:2])
        seen = CocoDataset(data.folder, data.annotations, data.train, str(short), flip=0)[0, 0]["image"]
        error = np.abs(seen.permute(1, 2, 0).numpy().astype(int) - pixels).mean()
        assert error < 4, "not upright"
    told = capsys.readouterr().err
    if kind != "tiff":  # which Pillow turns itself
        line = f"{path}: EXIF orientation {orientation}, turned upright (told once a folder)\n"
        assert told == line
    if orientation > 4 and kind == "jpg":
        world.images[0].update(width=stored[0], height=stored[1])
        each(world.annotations, "bbox", lambda k, a: [1, 1, 50, 50])
        text = error_of(lambda: world.dataset()[0, 0])
        assert text == (f"{path}: is {stored[1]}x{stored[0]}, but own.json says {stored[0]}x{stored[1]} for "
                        f"image {world.images[0]['id']}; the boxes seem to be of the picture before its "
                        "EXIF orientation: save it without")
        del world.images[0]["width"]  # its size is taken from the picture: upright
        assert world.dataset()[0, 0]["original_size"] == (stored[0], stored[1])


def test_exif_that_is_damaged_turns_nothing(world):
    path = world.folder / world.images[0]["file_name"]
    content = path.read_bytes()
    path.unlink()
    for exif in (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0",
                 b"Exif\0\0II*\0\xff\xff\xff\xff"):
        length = (len(exif) + 2).to_bytes(2, "big")
        path.write_bytes(content[:2] + b"\xff\xe1" + length + exif + content[2:])
        assert perfect(world.dataset())


def test_turns_are_told_once_a_folder(world, capsys):
    datasets.TURNED.clear()
    for i in world.images[:3]:
        turned(world.folder / i["file_name"], 3)
    data = world.dataset()
    for k in range(3):
        data[k, 0]
    assert capsys.readouterr().err.count("turned upright") == 1
    datasets.TURNED.clear()
    read_image(world.folder / world.images[0]["file_name"], quiet=True)
    assert capsys.readouterr().err == ""


def test_16_bit_grey_is_scaled_to_8_bit(tmp_path):
    """It was white: mean 254 for 128."""
    grey = (np.arange(256).repeat(16).reshape(64, 64)).astype(np.uint16) * 257
    for name in ("a.png", "a.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.mode == "RGB" and (np.array(image)[..., 0] == grey // 257).all()
    Image.fromarray((grey // 257 * 128 + 7).astype(np.int32)).save(tmp_path / "b.tif")
    assert abs(np.array(read_image(tmp_path / "b.tif")).mean() - 64) < 1
    Image.fromarray(np.full((8, 8), 70000, np.int32)).save(tmp_path / "c.tif")
    assert error_of(lambda: read_image(tmp_path / "c.tif")) == (
        f"{tmp_path / 'c.tif'}: holds grey levels 70000 to 70000, more than 16 bit; convert it to 8 bit")
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(tmp_path / "e.tif")
    assert "32-bit pixels up to 200" in error_of(lambda: read_image(tmp_path / "e.tif"))
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(grey[:32]).save(tmp_path / "d.png", exif=exif)
    assert (np.array(read_image(tmp_path / "d.png"))[..., 0] == np.rot90(grey[:32] // 257, -1)).all()


def test_float_pixels_are_refused(tmp_path):
    path = tmp_path / "f.tif"
    Image.fromarray(np.random.default_rng(0).random((8, 8)).astype(np.float32)).save(path)
    assert error_of(lambda: read_image(path)) == (
        f"{path}: holds floating-point pixels, whose range nobody tells; convert it to 8 bit")


@pytest.mark.parametrize("mode, kind", [
    ("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("CMYK", "jpeg"),
    ("CMYK", "tiff"), ("YCbCr", "jpeg"), ("RGBA", "webp"), ("RGB", "bmp")])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode, kind):
    path = tmp_path / f"x.{kind}"
    colour = Image.new("RGB", (40, 30), (255, 255, 255))
    colour.paste((0, 0, 0), (0, 0, 20, 30))
    colour.convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == picture_size(path) == (40, 30)
    assert np.abs(np.array(image).astype(int) - np.array(colour)).max() < 12


def test_a_palette_with_transparency_and_16_bit_colour(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "p.png", transparency=1)
    assert np.array(read_image(tmp_path / "p.png"))[0, 0].tolist() == [200, 100, 50]


def test_gzip_bombs_and_giants_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.jpg"
    path.write_bytes(gzip.compress(bytes(300 << 20), 1))
    begin = time.time()
    assert error_of(lambda: read_image(path)) == (
        f"{path}: unpacks to more than 256 MiB, which no picture here is")
    assert time.time() - begin < 20
    with open(path, "wb") as f:
        f.truncate(257 << 20)  # a sparse file
    assert error_of(lambda: read_image(path)) == (
        f"{path}: is larger than 256 MiB, which no picture here is")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (200, 200)).save(path, format="PNG")
    assert "is larger than Pillow reads" in error_of(lambda: read_image(path))


@pytest.mark.parametrize("change", [
    lambda b: b[:len(b) // 2], lambda b: b[:20], lambda b: b"", lambda b: b"<html>404</html>",
    lambda b: gzip.compress(b)[:-30], lambda b: b"\x1f\x8b" + b, lambda b: bytes(1000),
    lambda b: b"\x89PNG\r\n\x1a\n" + b],
    ids=["half", "head", "empty", "html", "gzip", "no-gzip", "zeros", "png"])
def test_truncated_files_are_one_line(world, change):
    path = world.folder / world.images[2]["file_name"]
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(change(content))
    data = world.dataset()
    text = error_of(lambda: data[2, 0])
    assert text.startswith(f"{path}: cannot be decoded (") and text.endswith("; fetch the file again")
    path.write_bytes(gzip.compress(content))
    assert perfect(data)  # as some of ImageNet-21K are


# ------------------------------------------------------------------ outlines

def masks_of(data):
    for k in range(len(data)):
        data[k, 1]
    return collate([data[0, 0], data[1, 0]], 64)["masks"]


def square_rle(image, size=None):
    mask = np.zeros(size or (image["height"], image["width"]), np.uint8)
    mask[5:40, 7:60] = 1
    return encode_mask(mask)


def uncompressed(image):
    height, width = image["height"], image["width"]
    mask = np.zeros((height, width), np.uint8)
    mask[5:40, 7:60] = 1
    flat = mask.T.ravel()
    change = np.flatnonzero(np.diff(flat)) + 1
    return dict(size=[height, width], counts=np.diff([0, *change, len(flat)]).tolist())


GARBAGE = {
    "empty": [], "empty polygon": [[]], "empty polygons": [[], []], "two corners": [[1, 2, 3, 4]],
    "odd": [[1, 2, 3, 4, 5, 6, 7]], "flat": [1, 2, 3, 4, 5, 6], "pairs": [[[1, 2], [3, 4], [5, 6]]],
    "text": [["1", "2", "3", "4", "5", "6"]], "none": [[None] * 6], "null": None, "word": "polygon",
    "nan": [[1, 2, math.nan, 4, 5, 6]], "inf": [[1, 2, math.inf, 4, 5, 6]], "number": 5,
    "digits": [[10**400, 2, 3, 4, 5, 6]],
    "cancel": [[math.inf, 2, -math.inf, 4, 5, 6]], "object in list": [{"a": 1}], "words": ["abcdef"],
    "no size": {"counts": "PX"}, "no counts": {"size": [480, 640]},
    "list counts": {"size": [2, 2], "counts": [4]},
    "text size": {"size": ["480", "640"], "counts": [480 * 640]}, "one": {"size": [5], "counts": [5]},
    "negative": {"size": [2, 2], "counts": [-1, 5]}, "floats": {"size": [2, 2], "counts": [1.5, 2.5]},
    "bools": {"size": [1, 1], "counts": [True]}, "nothing": {"size": [0, 0], "counts": []},
    "letters": {"size": [480, 640], "counts": "~~~~"}, "unfinished": {"size": [480, 640], "counts": "PPPP"},
    "endless": {"size": [480, 640], "counts": "o" * 1000}, "nul": {"size": [480, 640], "counts": "\0"},
    "wide": {"size": [480, 640], "counts": "猫" * 9}, "short": {"size": [480, 640], "counts": "11"},
    "huge": {"size": [10**9, 10**9], "counts": [10**18]}, "nested": {"size": [[1], [2]], "counts": {}},
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_outlines_that_are_none(kind):
    assert datasets.outline_kind(GARBAGE[kind]) == 0 or kind == "list counts"  # of another size, see below


def test_outlines_that_are_none_are_left_out_and_counted_before_training(world):
    """[[]]: trained, then an exception of pycocotools, whose C code trusts its input."""
    single = [a for a in world.annotations if not a["iscrowd"]]
    for a, outline in zip(single[3:], GARBAGE.values()):
        a["segmentation"] = outline
    del single[0]["segmentation"]
    data = world.dataset(train=True, masks=True, canvas=64)
    assert data.dropped["without outline"] == len(GARBAGE) + 1 and masks_of(data).max() > 0
    plain = world.dataset()  # boxes need no outline
    assert perfect(plain) and "without outline" not in plain.dropped
    for val in (world.dataset(masks=True), plain):
        truth = val.truth(outlines=True)
        results = [dict(image_id=t["image_id"], category_id=t["category_id"], score=0.9,
                        segmentation=rle_of(t, world)) for t in truth["annotations"] if not t["iscrowd"]]
        assert len(results) == len(single) - len(GARBAGE) - 1
        assert coco_evaluate(truth, results, "segm")["AP"] == pytest.approx(100)


def rle_of(a, world):
    from pycocotools import mask as rle
    size = next((i["height"], i["width"]) for i in world.images if i["id"] == a["image_id"])
    outline = a["segmentation"]
    if isinstance(outline, list):
        outline = rle.merge(rle.frPyObjects(outline, *size))
    elif isinstance(outline["counts"], list):
        outline = rle.frPyObjects(outline, *size)
    else:
        return outline
    return dict(outline, counts=outline["counts"].decode())


@pytest.mark.parametrize("kind", ["compressed", "uncompressed", "wrong size", "transposed", "mixed", "far"])
def test_outlines_of_every_kind(world, kind):
    i = world.images[0]
    assert i["width"] != i["height"]
    a = next(a for a in world.annotations if a["image_id"] == i["id"] and not a["iscrowd"])
    good = [[10, 10, 60, 10, 60, 60]]
    a["bbox"], a["segmentation"] = [7, 5, 53, 35], {
        "compressed": square_rle(i), "uncompressed": uncompressed(i), "wrong size": square_rle(i, (100, 100)),
        "transposed": square_rle(i, (i["width"], i["height"])),
        "mixed": [*good, [1, 2], 5, None, [math.nan] * 6, ["a"] * 6, []],
        "far": [*good, [-1e300, 5, 1e300, 5, 50, 50], [1e9, 1e9, -1e9, 1e9, 0, 0]]}[kind]
    left_out = kind in ("wrong size", "transposed")  # pycocotools would stretch, or never match, it
    data = world.dataset(train=True, masks=True, canvas=64)
    assert data.dropped["without outline"] == left_out
    assert masks_of(data).max() > 0
    truth = world.dataset(masks=True).truth(outlines=True)
    outlines = [t["segmentation"] for t in truth["annotations"] if t["bbox"] == a["bbox"]]
    assert len(outlines) == (not left_out)
    if kind == "mixed":
        assert outlines == [good]
    if kind == "far":
        assert max(abs(v) for p in outlines[0] for v in p) <= 2 * max(i["width"], i["height"])
    if kind in ("compressed", "uncompressed"):
        data = world.dataset(train=True, masks=True, canvas=max(i["width"], i["height"]), jitter=(1, 1))
        item, k = data[0, 0], [b.tolist()[:2] for b in data.items[0][4]].index([7, 5])
        assert int(item["masks"][k].sum()) == 53 * 35


def test_texts_of_run_lengths_are_read_as_pycocotools_reads_them():
    from pycocotools import mask as rle
    rng = np.random.default_rng(0)
    for k in range(60):
        h, w = rng.integers(1, 60, 2).tolist()
        mask = (rng.random((h, w)) < rng.choice([0, 0.02, 0.5, 0.98, 1])).astype(np.uint8)
        code = encode_mask(mask)["counts"]
        change = np.flatnonzero(np.diff(mask.T.ravel())) + 1
        runs = np.diff([0, *change, h * w]).tolist()
        assert datasets.rle_counts(code) == ([0] if mask[0, 0] else []) + runs
        assert datasets.outline_kind(dict(size=[h, w], counts=code)) == h << 32 | w
        for _ in range(30):  # damaged: refused, or harmless
            letters = list(code)
            letters[rng.integers(len(letters))] = chr(rng.integers(40, 115))
            text = "".join(letters[:rng.integers(1, len(letters) + 1)])
            if datasets.outline_kind(dict(size=[h, w], counts=text)):
                assert rle.decode(dict(size=[h, w], counts=text)).shape == (h, w)


def test_a_file_that_changes_under_a_run_is_noticed(world):
    data = world.dataset(train=True, masks=True, canvas=64)
    world.path.write_text("{}")
    assert error_of(lambda: data[0, 0]) == f"{world.path}: has changed since it was read; start again"


# ------------------------------------------------------------------ classes of training and validation

def test_validation_that_lists_fewer_classes_is_mapped_by_name(world):
    """Refused without naming them."""
    train = world.dataset(train=True)
    used = {a["category_id"] for a in world.annotations}
    new = {c["id"]: 1000 - c["id"] for c in world.categories}
    world.categories[:] = [dict(id=new[c["id"]], name=c["name"].replace(" ", "_"))
                           for c in world.categories if c["id"] in used]
    each(world.annotations, "category_id", lambda k, a: new[a["category_id"]])
    val = world.dataset(like=train.classes)
    assert perfect(val) and val.classes == train.classes and len(val.classes) == 80
    assert {k for k in val.category_ids if k} == {new[c] for c in used} and None in val.category_ids
    for a, b in zip(train.items, val.items):
        assert a[0] == b[0] and (a[5] == b[5]).all()  # labels are training's
    assert set(coco_evaluate(val.truth(), detections(val))["classes"]) <= set(train.classes)
    some = [n for n in train.classes if n not in ("person", "cat")]
    assert val.truth(some)["categories"] == [c for c in val.truth()["categories"] if c["name"] in some]


def test_a_strange_class_in_validation_names_both_differences(world):
    train = world.dataset(train=True).classes
    names = {c["name"]: c for c in world.categories}
    names["dog"]["name"], names["cat"]["name"] = "Hund", "Katze"
    assert world.error(like=train) == ("lists Katze, Hund, which training does not know, and lacks cat, dog; "
                                       "validation classes must be among the training's, by name")
    assert world.error(like=[*train, "Hund"]).startswith("lists Katze, which training does not know, and")
    assert world.dataset(like=[*train, "Hund", "Katze"]).classes[-1] == "Katze"


def test_names_that_differ_by_underscores_only_stay_apart_where_both_are_there(world):
    world.categories[0]["name"], world.categories[1]["name"] = "traffic light x", "traffic_light_x"
    train = world.dataset(train=True).classes
    assert world.dataset(like=train).classes == train and perfect(world.dataset(like=train))


def test_images_without_boxes_are_left_out_or_negatives(world):
    lonely = world.images[3]["id"]
    world.annotations[:] = [a for a in world.annotations if a["image_id"] != lonely]
    assert len(world.dataset(train=True)) == 7 and world.dataset(train=True).dropped["images"] == 1
    data = world.dataset(train=True, keep_empty=True)
    assert len(data) == 8 and data.items[3][4].shape == (0, 4) and data.dropped["images"] == 0
    assert perfect(data)
    assert len(world.dataset()) == 8


def test_own_data_names_the_flags(tmp_path):
    """"COCO 2017 is at ..." where own files were meant."""
    text = error_of(lambda: find_coco(tmp_path, "val"))
    assert "(own files: --val-json and --val-images; --data shapes needs nothing)" in text
    args = SimpleNamespace(train_json=None, train_images=None, val_json=None, val_images=None)
    assert own_files(args, "train") is None and own_files(args, "val") is None
    args.train_json, args.train_images = __file__, str(tmp_path)
    assert own_files(args, "train") == (tmp_path, Path(__file__)) and own_files(args, "val") is False
    args.val_json = "gone.json"
    assert error_of(lambda: own_files(args, "val")) == "--val-json gone.json: is missing"
    args.val_json = __file__
    assert error_of(lambda: own_files(args, "val")) == "--val-images: is needed beside --val-json"
    args.val_images = "nowhere"
    assert error_of(lambda: own_files(args, "val")) == "--val-images nowhere: is missing"


# ------------------------------------------------------------------ everything at once

def change(kind, key, value):
    """Another value for a key of all entries that have it; value: function (rng, old value)."""
    def mutate(rng, content):
        for e in content[kind]:
            if key in e:
                e[key] = value(rng, e[key])
    return mutate


MUTATIONS = [
    change("annotations", "id", lambda r, v: r.choice([0, "x", None, BIG])),
    change("annotations", "iscrowd", lambda r, v: r.choice([0, None, "0", True, 1.0, False])),
    change("annotations", "area", lambda r, v: r.choice([None, "7", -1, 0, 9e9, v])),
    change("annotations", "bbox", lambda r, v: [x + r.choice([0, 0, 300, -300]) for x in v]),
    change("annotations", "bbox", lambda r, v: [x * r.choice([1, 1e-3, -1, 2]) for x in v]),
    change("annotations", "bbox", lambda r, v: [r.choice([x, str(x), round(x)]) for x in v]),
    change("annotations", "segmentation", lambda r, v: r.choice(list(GARBAGE.values()))),
    change("images", "width", lambda r, v: r.choice([v, v, str(v), 0, None])),
    change("categories", "name", lambda r, v: r.choice([v, f"{v} "])),
    change("categories", "name", lambda r, v: v if r.random() < 0.95 else "person"),
    lambda r, content: content["images"].append(dict(r.choice(content["images"]))),
    lambda r, content: r.shuffle(content["annotations"]),
    lambda r, content: r.shuffle(content["images"]),
    lambda r, content: r.choice(content[r.choice(LISTS)]).popitem(),
    lambda r, content: r.choice(content["annotations"]).update({
        r.choice(["bbox", "image_id", "category_id"]): r.choice([None, [], "5", BIG, True, [5] * 4])}),
]
LISTS = ["images", "annotations", "categories"]


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_done_to_a_file_it_is_perfect_or_refused(world, seed):
    rng = random.Random(seed)
    for k in sorted(rng.sample(range(len(MUTATIONS)), rng.randint(1, 5))):
        MUTATIONS[k](rng, world.content)
    train = rng.random() < 0.3
    try:
        data = world.dataset(train, masks=rng.random() < 0.3, canvas=rng.choice([None, 64]))
    except UserError as e:
        assert "\n" not in str(e) and (str(world.path) in str(e) or str(world.folder) in str(e))
        return
    if train:
        assert all(len(data[k, 0]["boxes"]) == len(data[k, 0]["labels"]) for k in range(len(data)))
        assert all((i[4][:, 2:] > i[4][:, :2]).all() for i in data.items)
    else:
        assert perfect(data), data.report()


# ------------------------------------------------------------------ the cache

@pytest.fixture
def large(world, tmp_path, monkeypatch):
    """A file of more than a megabyte, whose arrays are kept; `reads`: how often it was parsed."""
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    world.content = dict(world.content, info="x" * (1 << 20))
    world.write()
    world.place = world.path.with_name(".own.json.records")
    world.reads = []
    read = datasets.stream_json
    monkeypatch.setattr(datasets, "stream_json", lambda *a: (world.reads.append(1), read(*a))[1])
    return world


def same(a, b):
    if a.about != b.about or a.arrays.keys() != b.arrays.keys():
        return False
    return all(np.array_equal(a.arrays[k], b.arrays[k], equal_nan=k == "area") for k in b.arrays)


def test_a_second_read_takes_the_cache_and_a_changed_file_does_not(large):
    first = read_annotations(large.path)
    assert large.place.exists() and len(large.reads) == 1 and first.cache
    assert same(read_annotations(large.path), first) and len(large.reads) == 1
    data = CocoDataset(large.folder, large.path, False, image_size="96")
    assert perfect(data) and len(large.reads) == 1
    masks = CocoDataset(large.folder, large.path, True, masks=True, canvas=64)
    assert masks_of(masks).max() > 0 and len(large.reads) == 1
    large.annotations.pop()
    large.write()
    again = read_annotations(large.path)
    assert len(large.reads) == 2 and len(again.xywh) == len(first.xywh) - 1
    os.utime(large.path, (1, 1))
    assert same(read_annotations(large.path), again) and len(large.reads) == 3
    assert list(large.path.parent.glob("*.tmp")) + list(large.path.parent.glob(".*.tmp")) == []


@pytest.mark.parametrize("damage", [
    "truncated", "empty", "bits", "foreign", "text", "folder", "rules", "pickle"])
def test_a_damaged_cache_is_made_anew_silently(large, damage, capsys):
    first = read_annotations(large.path)
    content = large.place.read_bytes()
    changed = bytearray(content)
    middle = content.index(np.ascontiguousarray(first.xywh).tobytes()[:64])
    changed[middle + 5] ^= 1
    large.place.unlink()  # `first` has it mapped: never truncate it in place
    if damage == "folder":
        large.place.mkdir()
    else:
        large.place.write_bytes({
            "truncated": content[:len(content) // 2], "empty": b"", "bits": bytes(changed),
            "foreign": content, "text": b"hello", "rules": content,
            "pickle": pickle.dumps(print)}[damage])
    if damage == "foreign":
        torch.save(dict(model={}), large.place)
    if damage == "rules":
        state = torch.load(large.place, weights_only=True)
        torch.save(dict(state, key=dict(state["key"], rules=-1)), large.place)
    again = read_annotations(large.path)
    assert same(again, first) and len(large.reads) == 2
    assert ("its boxes are kept in" in capsys.readouterr().out) == (damage == "folder")
    assert same(read_annotations(large.path), first) and len(large.reads) == 2


def test_a_read_only_folder_keeps_its_arrays_elsewhere(large, tmp_path, capsys, monkeypatch):
    mode = tmp_path.stat().st_mode
    tmp_path.chmod(0o555)
    try:
        monkeypatch.setenv("DETECTION_CACHE", "/proc/nowhere")
        first = read_annotations(large.path)
        line = capsys.readouterr().out
        assert line.startswith(f"{large.path}: its boxes cannot be kept on disk (") and line.count("\n") == 1
        elsewhere = Path(os.environ.get("TMPDIR", "/tmp")) / f"cache-of-{os.getpid()}-{tmp_path.name}"
        monkeypatch.setenv("DETECTION_CACHE", str(elsewhere))
        assert same(read_annotations(large.path), first)
        line = capsys.readouterr().out
        assert line.startswith(f"{large.path}: its folder is read-only; its boxes are kept in {elsewhere}/")
        assert line.endswith(".records (DETECTION_CACHE names another folder)\n") and not large.place.exists()
        assert same(read_annotations(large.path), first) and len(large.reads) == 2
        assert capsys.readouterr().out == ""
    finally:
        tmp_path.chmod(mode)
        shutil.rmtree(elsewhere, ignore_errors=True)


def test_sizes_from_pictures_are_not_kept(large):
    large.images[0]["width"] = 0
    large.write()
    read_annotations(large.path, large.folder)
    read_annotations(large.path, large.folder)
    assert len(large.reads) == 2 and not large.place.exists()


PROCESS = """
import os, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import common.datasets as datasets
rank = int(os.environ["LOCAL_RANK"])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=2)
read = datasets.stream_json
def told(*a):
    print("read", flush=True)
    return read(*a)
datasets.stream_json = told
data = datasets.CocoDataset({folder!r}, {path!r}, False, image_size="96")
print(len(data), len(data.records.xywh), data.records.cache is not None)
dist.barrier()
dist.destroy_process_group()
"""


def test_of_two_processes_one_reads(large):
    code = PROCESS.format(root=str(ROOT), port=free_port(), folder=str(large.folder), path=str(large.path))
    env = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                                  stderr=subprocess.PIPE, env=dict(env, LOCAL_RANK=str(rank)))
                 for rank in range(2)]
    try:
        replies = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], replies
    line = f"8 {len(large.annotations)} True\n"
    assert [out for out, _ in replies] == ["read\n" + line, line]


def test_spawned_loader_workers_see_the_same(large):
    data = CocoDataset(large.folder, large.path, True, masks=True, canvas=64)
    # a path, not arrays
    assert len(pickle.dumps(data.records)) < 3000 < len(pickle.dumps(data.records.arrays))
    loader = torch.utils.data.DataLoader(data, batch_sampler=[[(0, 5), (1, 6)], [(2, 7)]], collate_fn=collate,
                                         num_workers=1, multiprocessing_context="spawn")
    small = CocoDataset(large.folder, data.records.subset(np.arange(8) < 3), True, masks=True, canvas=64)
    batches = list(loader)
    for twin in (data, pickle.loads(pickle.dumps(data)), pickle.loads(pickle.dumps(small))):
        for got, batch in zip(batches, ([(0, 5), (1, 6)], [(2, 7)])):
            expected = collate([twin[key] for key in batch])
            assert got["image_ids"] == expected["image_ids"]
            assert all(torch.equal(got[k], expected[k]) for k in ("images", "boxes", "labels", "masks"))
    pickled = pickle.dumps(data)
    large.place.unlink()
    assert error_of(lambda: pickle.loads(pickled)) == (
        f"{large.path}: has changed since it was read; start again")


def test_forked_loader_workers_see_the_same(world):
    data = world.dataset(train=True, masks=True, canvas=64)
    batches = {}
    for workers in (0, 2):
        loader, plan = train_loader(data, 4, 0, 1, 0, workers, False)
        plan.set_epoch(0)
        batches[workers] = list(loader)
    for a, b in zip(batches[0], batches[2]):
        assert all(torch.equal(a[k], b[k]) for k in ("images", "boxes", "labels", "masks"))
    assert len(list(eval_loader(world.dataset(), 0, 1, 1, False))) == 8


def test_a_file_of_cocos_size_is_read_in_pieces(tmp_path):
    """Elements are handed over one by one; the rest of the file makes no Python objects."""
    path, seen = tmp_path / "x.json", []
    path.write_text('{"a" : [ 1 , {"b": [2]} , [3]\n] ,\t"c": {"a": [9]}, "d": [] }')
    found = stream_json(path, dict(a=lambda e, start, end: seen.append((e, start, end)), d=None, e=None))
    assert found == {"a", "d"} and [e for e, *_ in seen] == [1, {"b": [2]}, [3]]
    assert [json.loads(path.read_text()[s:e]) for _, s, e in seen] == [1, {"b": [2]}, [3]]


def test_a_dict_is_read_as_a_file_is(world):
    world.write()
    read, made = read_annotations(world.path), records_of(world.content, world.path)
    assert made.spans.max() < 0  # a dict has no bytes
    made.arrays["spans"] = read.arrays["spans"]
    assert same(read, made)


# ------------------------------------------------------------------ LVIS

@pytest.fixture
def lvis(lvis_mini, tmp_path):
    content = json.loads((lvis_mini / "annotations/lvis_v1_style_val_9.json").read_text())
    path = tmp_path / "lvis.json"

    def read(edit=lambda c: None):
        changed = copy.deepcopy(content)
        edit(changed)
        path.write_text(json.dumps(changed))
        records = read_annotations(path)
        require_lvis(records)
        return CocoDataset(lvis_mini, records, False, image_size="96")
    return SimpleNamespace(read=read, content=content, path=path)


def test_lvis_is_perfect_with_its_own_ids_and_with_others(lvis):
    data = lvis.read()
    stats = lvis_evaluate(data.truth(), detections(data))
    assert stats["AP"] == pytest.approx(100)
    assert stats == lvis_evaluate(lvis.path, detections(data))

    def other(content):
        each(content["annotations"], "id", lambda k, a: 0)
        for i in content["images"]:
            i["id"] = -i["id"]
        for a in content["annotations"]:
            a["image_id"] = -a["image_id"]
    data = lvis.read(other)
    assert lvis_evaluate(data.truth(), detections(data))["AP"] == pytest.approx(100)


@pytest.mark.parametrize("key, values", [("iscrowd", [0, 1, None, "1"]), ("area", [0, 5e3, None, -1])])
def test_lvis_knows_no_crowd_and_no_area_of_0(lvis, key, values):
    """perfect AP was 35 to 99: the package counts crowds as missed, and passes over areas of 0."""
    data = lvis.read(lambda c: each(c["annotations"], key, lambda k, a: values[k % 4]))
    assert lvis_evaluate(data.truth(), detections(data))["AP"] == pytest.approx(100)
    assert coco_evaluate(data.truth(), detections(data))["AP"] == pytest.approx(100)


@pytest.mark.parametrize("key", ["neg_category_ids", "not_exhaustive_category_ids"])
@pytest.mark.parametrize("wrong", [
    None, "missing", {}, 5, "1, 2", [None], [True], [[1]], [1.5, "x"], [99999]], ids=str)
def test_lvis_lists_are_required_before_training(lvis, key, wrong):
    """Trained, then a KeyError."""
    def edit(content):
        content["images"][2][key] = wrong
        if wrong == "missing":
            del content["images"][2][key]
    number = lvis.content["images"][2]["id"]
    text = error_of(lambda: lvis.read(edit))
    if wrong in ([1.5, "x"], [99999]):
        assert text.startswith(f"{lvis.path}: image {number} has {key} ")
        assert text.endswith(", which 'categories' does not list")
    else:
        assert text == f"{lvis.path}: image {number} has no list {key}, which LVIS's evaluation needs"


@pytest.mark.parametrize("wrong", [None, "missing", "rare", 1, ["r"]], ids=str)
def test_lvis_frequency_is_required_before_training(lvis, wrong):
    def edit(content):
        content["categories"][7]["frequency"] = wrong
        if wrong == "missing":
            del content["categories"][7]["frequency"]
    number = lvis.content["categories"][7]["id"]
    assert error_of(lambda: lvis.read(edit)) == (
        f"{lvis.path}: category {number} has no frequency r, c or f; this is not LVIS v1's json")


# ------------------------------------------------------------------ Pascal VOC

@pytest.fixture
def voc(voc_mini, tmp_path):
    """Ten images of VOC2012 and a list of them."""
    source = voc_mini / "VOCdevkit/VOC2012"
    folder = tmp_path / "VOCdevkit/VOC2012"
    stems = (source / "ImageSets/Main/val.txt").read_text().split()[:10]
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for stem in stems:
        shutil.copy(source / f"Annotations/{stem}.xml", folder / "Annotations")
        shutil.copy(source / f"JPEGImages/{stem}.jpg", folder / "JPEGImages")
    xml = folder / f"Annotations/{stems[3]}.xml"
    listing = folder / "ImageSets/Main/val.txt"
    listing.write_text("\n".join(stems) + "\n")

    def edit(a, b):
        text = xml.read_text()
        assert a in text
        xml.write_text(text.replace(a, b, 1))

    def read(train=False):
        return CocoDataset(tmp_path / "VOCdevkit", read_voc(tmp_path, [("2012", "val")]), train, "96", flip=0)
    return SimpleNamespace(folder=folder, stems=stems, xml=xml, listing=listing, edit=edit, read=read,
                           picture=folder / f"JPEGImages/{stems[3]}.jpg")


def voc_perfect(data):
    return voc_evaluate(data.truth(), detections(data))["AP"] == pytest.approx(100, abs=1e-6)


def test_voc_is_perfect(voc):
    data = voc.read()
    assert voc_perfect(data) and len(data) == 10 and data.records.count == {}
    assert sum(a["difficult"] for a in data.truth()["annotations"]) == data.dropped["crowd"]


@pytest.mark.parametrize("size", ["<size><width>0</width><height>0</height></size>", "", "<size></size>",
                                  "<size><width></width><height>0</height></size>"],
                         ids=["0", "missing", "empty", "blank"])
def test_voc_without_a_size_takes_the_pictures(voc, size):
    """"no usable image"; "'NoneType' object has no attribute 'text'"."""
    plain = voc.read().truth()
    text = voc.xml.read_text()
    begin, end = text.index("<size>"), text.index("</size>") + len("</size>")
    voc.xml.write_text(text[:begin] + size + text[end:])
    data = voc.read()
    assert data.truth() == plain and voc_perfect(data)
    assert data.records.count == {"images without a size, taken from the picture": 1}


@pytest.mark.parametrize("name", [".JPG", ".jpeg", ".PNG"])
def test_voc_pictures_with_another_ending_are_found(voc, name):
    """"missing"."""
    if name == ".PNG":
        Image.open(voc.picture).save(voc.picture.with_suffix(".PNG"))
        voc.picture.unlink()
    else:
        voc.picture.rename(voc.picture.with_suffix(name))
    voc.picture.with_suffix(".txt").write_text("0 0.5 0.5 0.1 0.1")  # YOLO's labels beside them
    voc.picture.with_name("._" + voc.picture.name).write_bytes(b"macOS")
    data = voc.read()
    assert voc_perfect(data) and data.items[3][1].endswith(name)


@pytest.mark.parametrize("a, b, words", [
    ("<name>", "<nome>", None), ("<xmin>", "<xmin>x", "<bndbox/xmin> is 'x"),
    ("<xmin>", "<xmin>nan</xmin><xmin>", "<bndbox/xmin> is 'nan'; expected a number"),
    ("<bndbox>", "<box>", None), ("<width>", "<width>wide", "<size/width> is 'wide"),
    ("<annotation", "annotation", "is no VOC annotation (")], ids=["name", "x", "nan", "box", "width", "xml"])
def test_voc_elements_that_are_wrong_are_named(voc, a, b, words):
    text = voc.xml.read_text()
    text = text.replace(a, b) if words is None else text.replace(a, b, 1)
    if words is None:
        text = text.replace(a.replace("<", "</"), b.replace("<", "</"))
        words = "<object> without <name>" if a == "<name>" else "<bndbox/xmin> is missing; expected a number"
    voc.xml.write_text(text)
    text = error_of(voc.read)
    assert text.startswith(f"{voc.xml}: is no VOC annotation (") and words in text


def test_voc_negative_size_and_unknown_class(voc):
    voc.edit("<width>", "<width>-")
    assert f"image 4 has width -" in error_of(voc.read)
    voc.edit("<width>-", "<width>")
    name = voc.xml.read_text().split("<object>")[1].split("<name>")[1].split("<")[0]
    voc.edit(f"<name>{name}", "<name>unicorn")
    assert error_of(voc.read).startswith(f"{voc.xml}: has class unicorn, expected one of aeroplane, ")


def test_voc_boxes_with_swapped_corners_are_turned(voc):
    plain = voc.read()
    text = voc.xml.read_text()
    for low, high in (("xmin", "xmax"), ("ymin", "ymax")):
        text = text.replace(low, "other").replace(high, low).replace("other", high)
    voc.xml.write_text(text)
    data = voc.read()
    assert voc_perfect(data) and np.array_equal(data.records.xywh, plain.records.xywh)
    assert list(data.records.count) == ["boxes drawn from another corner, turned"]


def test_voc_lists_with_a_column_blanks_and_repetitions(voc):
    marks = [" 1", "  1", " -1", "  0", "\t-1", "", " 1", " -1", "", " 1"]
    voc.listing.write_bytes("\r\n".join(
        ["\ufeff" + voc.stems[0] + " 1", "", *map("".join, zip(voc.stems, marks)), voc.stems[2]]).encode())
    data = voc.read()
    assert voc_perfect(data) and [Path(i[1]).stem for i in data.items] == voc.stems
    named = "photo 1"  # a name that ends like such a column
    voc.xml.rename(voc.xml.with_name(f"{named}.xml"))
    voc.picture.rename(voc.picture.with_name(f"{named}.jpg"))
    voc.listing.write_text(f"{voc.stems[0]} -1\n{named}\n")
    data = voc.read()
    assert voc_perfect(data) and [Path(i[1]).stem for i in data.items] == [voc.stems[0], named]


def test_voc_missing_parts_are_named(voc, tmp_path):
    voc.xml.unlink()
    assert error_of(voc.read) == f"{voc.xml}: is missing, though its list names it"
    voc.listing.unlink()
    assert error_of(voc.read).startswith(f"--data {tmp_path}: {voc.listing} is missing; Pascal VOC is at")


def test_voc_names_that_leave_the_folder(voc):
    shutil.copy(voc.xml, voc.folder.parent.parent / "x.xml")
    voc.listing.write_text("../../../x\n")
    assert "leaves the image folder" in error_of(voc.read)


def test_an_xml_bomb_is_refused_quickly(voc):
    lines = ['<!ENTITY a0 "ha">'] + [f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 12)]
    voc.xml.write_text("<!DOCTYPE x [" + "".join(lines) + "]><annotation>&a11;</annotation>")
    begin = time.time()
    text = error_of(voc.read)
    assert text.startswith(f"{voc.xml}: is no VOC annotation (") and time.time() - begin < 10
    voc.xml.write_text('<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><annotation>&f;</annotation>')
    assert "is no VOC annotation (" in error_of(voc.read)
    voc.xml.write_bytes('<?xml version="1.0" encoding="nonsense"?><annotation/>'.encode())
    assert "is no VOC annotation (" in error_of(voc.read)


def test_an_xml_in_another_encoding_is_read(voc):
    text = voc.xml.read_text()
    voc.xml.write_bytes(('<?xml version="1.0" encoding="utf-16"?>' + text).encode("utf-16"))
    assert voc_perfect(voc.read())
