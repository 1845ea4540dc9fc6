# SPDX-License-Identifier: MIT
"""The embedded dataset: its files are what the published formats promise, and its world is what the experiments need."""

import errno
import hashlib
import json
import multiprocessing
import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import shapes
from common.run import UserError
from common.shapes import (ALL_CLASSES, BASE, CATEGORY_ID, CLASSES, FREQUENCY, IMAGE_ONLY, LVIS_ID, NOVEL,
                           PALETTE, VERSION, cut_at_border, draw_photo, make_shapes, rle)

COCO_SPLITS = ("train2017", "val2017")


@pytest.fixture(scope="module")
def root():
    """Of the default size: the counts below are promises about it. Drawn once for all tests."""
    return make_shapes().resolve()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("small"), train=48, val=24)


def instances(root, split):
    return json.loads((root / f"annotations/instances_{split}.json").read_text())


def named(root, split, crowd=False):
    """List of (class name, image record, annotation)."""
    data = instances(root, split)
    names, images = {c["id"]: c["name"] for c in data["categories"]}, {i["id"]: i for i in data["images"]}
    return [(names[a["category_id"]], images[a["image_id"]], a) for a in data["annotations"] if crowd or not a["iscrowd"]]


def digests(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def middle_colour(path, box):
    """Median RGB of a small disc in the middle of a box xyxy."""
    x0, y0, x1, y1 = box
    photo = Image.open(path).convert("RGB")
    disc, radius = Image.new("L", photo.size), max(2, 0.12 * min(x1 - x0, y1 - y0))
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    ImageDraw.Draw(disc).ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=255)
    return np.median(np.asarray(photo)[np.asarray(disc) > 0], axis=0)


def hue_name(rgb):
    """Nearest of the four novel colours by direction from grey, so that shading does not matter."""
    direction = lambda c: (np.asarray(c, float) - np.mean(c)) / (np.linalg.norm(np.asarray(c, float) - np.mean(c)) + 1e-6)
    return max(("red", "green", "blue", "yellow"), key=lambda n: direction(rgb) @ direction(PALETTE[n]))


def corners(element):
    return [int(element.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]


# ------------------------------------------------------------------------------------------------------- one seed, one dataset

def test_same_seed_gives_byte_identical_files_and_another_seed_other_pictures(small, tmp_path):
    again = make_shapes(tmp_path, train=48, val=24)
    other = make_shapes(tmp_path, seed=3, train=48, val=24)
    assert small.name == f"shapes-{VERSION}-n48x24" and other.name == f"shapes-{VERSION}-s3-n48x24"
    first = digests(small)
    assert first == digests(again)
    jpgs = [name for name in first if name.startswith("train2017/")]
    assert len(jpgs) == 48 and not any(first[name] == digests(other)[name] for name in jpgs[:5])


def test_first_images_do_not_depend_on_how_many_are_drawn(root, small):
    for folder in ("train2017", "val2017", "valall2017"):
        for path in sorted((small / folder).iterdir()):
            assert path.read_bytes() == (root / folder / path.name).read_bytes()


def test_default_size_has_the_plain_name_and_existing_dataset_returns_at_once(root):
    assert root.name == f"shapes-{VERSION}"
    start = time.perf_counter()
    assert make_shapes(root.parent) == root
    assert time.perf_counter() - start < 0.2


def test_two_processes_at_once_end_with_one_complete_dataset(small, tmp_path):
    context = multiprocessing.get_context("spawn")  # a fork does not survive OpenMP threads
    workers = [context.Process(target=make_shapes, args=(tmp_path,), kwargs=dict(train=48, val=24)) for _ in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert [w.exitcode for w in workers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == [small.name]           # no drafts left behind
    assert digests(tmp_path / small.name) == digests(small)


def test_folder_with_files_missing_is_refused_with_its_name(tmp_path):
    (tmp_path / f"shapes-{VERSION}").mkdir()
    with pytest.raises(UserError, match=f"shapes-{VERSION} holds an incomplete dataset"):
        make_shapes(tmp_path)


def test_the_environment_names_the_folder_and_data_is_the_default(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "draw_split", refuse(errno.EROFS))
    monkeypatch.setenv("DETECTION_CACHE", str(small.parent))
    assert make_shapes(train=48, val=24) == small
    monkeypatch.delenv("DETECTION_CACHE")
    with pytest.raises(UserError, match=f"data/{small.name}: .* cannot be written"):
        make_shapes(train=48, val=24)


def refuse(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))
    return fail


@pytest.mark.parametrize("place, number", [("draw_split", errno.EROFS), ("draw_split", errno.EACCES),
                                           ("write_voc", errno.ENOSPC), ("draw_imagenet", errno.EDQUOT)])
def test_read_only_folder_and_full_disk_end_in_one_line_with_the_way_out(tmp_path, monkeypatch, place, number):
    monkeypatch.setattr(shapes, place, refuse(number))
    with pytest.raises(UserError) as e:
        make_shapes(tmp_path, train=6, val=6)
    text = str(e.value)
    assert "\n" not in text and text.startswith(str(tmp_path))
    assert os.strerror(number) in text and "DETECTION_CACHE=" in text
    assert not list(tmp_path.iterdir())                                   # no draft left behind


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match="cannot be written there .*DETECTION_CACHE"):
        make_shapes(tmp_path / "data", train=6, val=6)


# ------------------------------------------------------------------------------------------------------------------- the world

def test_every_class_has_the_promised_counts_and_rare_is_rarer(root):
    train, val = (Counter(n for n, _, _ in named(root, s)) for s in COCO_SPLITS)
    assert set(train) == set(val) == set(CLASSES)
    assert min(train[n] for n in NOVEL) >= 25 and min(val.values()) >= 12
    level = {f: [train[n] for n in CLASSES if FREQUENCY[n] == f] for f in "fcr"}
    assert max(level["r"]) < min(level["c"]) and max(level["c"]) < min(level["f"])
    assert {n for n in CLASSES if FREQUENCY[n] == "r"} == set(NOVEL)


def test_image_only_classes_are_never_in_detection_splits_but_in_imagenet_and_valall(root):
    for split in COCO_SPLITS:
        data = instances(root, split)
        assert {c["name"] for c in data["categories"]} == set(CLASSES)
        assert not {n for n, _, _ in named(root, split, crowd=True)} & set(IMAGE_ONLY)
    valall = Counter(n for n, _, _ in named(root, "valall2017"))
    assert set(valall) == set(ALL_CLASSES) and min(valall.values()) >= 10
    assert len(instances(root, "valall2017")["images"]) == 150
    classes = json.loads((root / "imagenet/classes.json").read_text())
    assert [c["name"] for c in classes] == ALL_CLASSES
    for c in classes:
        assert len(list((root / "imagenet/train" / c["wnid"]).glob("*.JPEG"))) == 40
        assert len(list((root / "imagenet/val" / c["wnid"]).glob("*.JPEG"))) == 10


def test_splits_file_names_the_same_classes_as_the_module(root):
    splits = json.loads((root / "splits.json").read_text())
    assert splits == dict(base=BASE, novel=NOVEL, image_only=IMAGE_ONLY, frequency=FREQUENCY)
    assert len(set(ALL_CLASSES)) == len(BASE) + len(NOVEL) + len(IMAGE_ONLY) == 26


def test_base_names_hold_no_colour_and_base_objects_come_in_many(root):
    assert not any(colour in name.split() for name in BASE + IMAGE_ONLY for colour in PALETTE)
    words = {o["colour"] for i in range(60) for o in draw_photo(0, "train2017", i)[1] if o["name"] in BASE}
    assert words >= set(PALETTE)


def test_novel_colour_is_the_colour_in_the_middle_of_the_object(root):
    wnid = {c["name"]: c["wnid"] for c in json.loads((root / "imagenet/classes.json").read_text())}
    for name in NOVEL:
        for path in (root / "imagenet/val_boxes" / wnid[name]).iterdir():
            found = corners(ElementTree.parse(path).find("object"))
            assert hue_name(middle_colour(root / f"imagenet/val/{wnid[name]}/{path.stem}.JPEG", found)) == name.split()[0], path
    right = []                                                            # in scenes another object may lie on top
    for name, image, a in named(root, "val2017"):
        if name in NOVEL:
            x, y, w, h = a["bbox"]
            right.append(hue_name(middle_colour(root / "val2017" / image["file_name"], (x, y, x + w, y + h))) == name.split()[0])
    assert np.mean(right) > 0.85


def test_small_medium_large_crowd_empty_grey_portrait_and_landscape_all_occur(root):
    for split in COCO_SPLITS:
        data, found = instances(root, split), named(root, split)
        areas = np.array([a["area"] for _, _, a in found])
        assert (areas < 32 ** 2).any() and ((areas > 32 ** 2) & (areas < 96 ** 2)).any() and (areas > 96 ** 2).sum() >= 5
        n = len(data["images"])
        crowds = {a["image_id"] for a in data["annotations"] if a["iscrowd"]}
        empty = {i["id"] for i in data["images"]} - {a["image_id"] for a in data["annotations"]}
        assert 0.01 * n <= len(crowds) <= 0.03 * n and 0.005 * n <= len(empty) <= 0.02 * n
        shapes = Counter((i["width"], i["height"]) for i in data["images"])
        assert set(shapes) == {(128, 96), (96, 128)} and min(shapes.values()) > 0.4 * n
        grey = sum(Image.open(root / split / i["file_name"]).mode == "L" for i in data["images"])
        assert 0.005 * n <= grey <= 0.02 * n


def test_no_object_is_hidden_by_more_than_60_percent():
    objects = [o for i in range(60) for o in draw_photo(0, "train2017", i)[1]]
    assert all(o["visible"].sum() >= 0.4 * o["pixels"] > 0 for o in objects)
    assert any(o["visible"].sum() < 0.9 * o["pixels"] for o in objects)


# ----------------------------------------------------------------------------------------------------------------- the formats

def test_boxes_are_tight_inside_the_image_and_at_least_one_pixel(root):
    for split in (*COCO_SPLITS, "valall2017"):
        for _, image, a in named(root, split):
            x, y, w, h = a["bbox"]
            assert w >= 1 and h >= 1 and x >= 0 and y >= 0 and x + w <= image["width"] + 1e-6 and y + h <= image["height"] + 1e-6
            (polygon,) = a["segmentation"]
            assert np.allclose((min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])), (x, y, x + w, y + h), atol=0.02)
            assert 0 < a["area"] <= w * h + 0.01


def test_polygon_area_equals_pycocotools_mask_area(root):
    masks = pytest.importorskip("pycocotools.mask")
    for name, image, a in named(root, "val2017")[:200]:
        (encoded,) = masks.frPyObjects(a["segmentation"], image["height"], image["width"])
        x, y, w, h = a["bbox"]
        assert abs(masks.area(encoded) - a["area"]) < 2 * (w + h) * 0.6, name     # half a pixel along the outline; a ring keeps its hole


def test_cut_polygon_has_the_area_of_the_overlap():
    points = np.array([(-5.0, 2.0), (5.0, 2.0), (5.0, 8.0), (-5.0, 8.0)])
    assert sorted(map(tuple, cut_at_border(points, 20, 6))) == [(0, 2), (0, 6), (5, 2), (5, 6)]
    assert np.array_equal(cut_at_border(points + 6, 20, 20), points + 6)


def test_rle_starts_with_zeros_and_runs_down_columns():
    assert rle(np.array([[0, 1], [1, 1]], bool)) == {"size": [2, 2], "counts": [1, 3]}
    assert rle(np.array([[1, 0], [1, 0]], bool)) == {"size": [2, 2], "counts": [0, 2, 2]}


def test_category_and_image_ids_have_holes_and_are_not_label_order(root):
    data = instances(root, "train2017")
    ids = [c["id"] for c in data["categories"]]
    assert ids == sorted(ids) and ids[:4] == [1, 2, 3, 5] and max(ids) > len(ids)
    assert [CATEGORY_ID[n] for n in CLASSES] != sorted(CATEGORY_ID[n] for n in CLASSES)
    assert len(set(CATEGORY_ID.values())) == len(ALL_CLASSES)
    image_ids = [i["id"] for i in data["images"]]
    assert len(set(image_ids)) == len(image_ids) < max(image_ids) - min(image_ids)
    assert all(i["file_name"] == f"{i['id']:012d}.jpg" and (root / "train2017" / i["file_name"]).is_file() for i in data["images"])


@pytest.mark.parametrize("split", ["val2017", "valall2017"])
def test_pycocotools_scores_ground_truth_as_detections_with_ap_1(root, split):
    COCO, COCOeval = pytest.importorskip("pycocotools.coco").COCO, pytest.importorskip("pycocotools.cocoeval").COCOeval
    truth = COCO(str(root / f"annotations/instances_{split}.json"))
    found = [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=0.9) for _, _, a in named(root, split)]
    run = COCOeval(truth, truth.loadRes(found), "bbox")
    run.evaluate(), run.accumulate(), run.summarize()
    assert run.stats[0] == pytest.approx(1.0)
    for a in truth.dataset["annotations"]:
        if a["iscrowd"]:
            assert truth.annToMask(a).sum() == a["area"]


def test_lvis_loads_its_file_with_federated_labels_that_are_true(root):
    try:
        from lvis import LVIS
    except Exception as error:                                            # it imports cv2, which may lack a system library
        pytest.skip(f"lvis cannot be imported: {error}")
    crowded = {i["id"]: n for s in COCO_SPLITS for n, i, a in named(root, s, crowd=True) if a["iscrowd"]}
    for part, split in (("train", "train2017"), ("val", "val2017")):
        lvis = LVIS(str(root / f"annotations/lvis_v1_{part}.json"))
        assert lvis.get_cat_ids() == list(range(1, len(CLASSES) + 1))
        assert {c["name"].replace("_", " "): c["id"] for c in lvis.dataset["categories"]} == LVIS_ID
        assert all(FREQUENCY[c["name"].replace("_", " ")] == c["frequency"] for c in lvis.dataset["categories"])
        assert sorted(a["bbox"] for a in lvis.dataset["annotations"]) == sorted(a["bbox"] for _, _, a in named(root, split))
        present = {i: {a["category_id"] for a in anns} for i, anns in lvis.img_ann_map.items()}
        for image in lvis.dataset["images"]:
            assert "file_name" not in image and (root / "/".join(image["coco_url"].split("/")[-2:])).is_file()
            assert not set(image["neg_category_ids"]) & present.get(image["id"], set())
            crowd = [LVIS_ID[crowded[image["id"]]]] if image["id"] in crowded else []
            assert image["not_exhaustive_category_ids"] == crowd and not set(crowd) & set(image["neg_category_ids"])
    counts = Counter(a["category_id"] for a in json.loads((root / "annotations/lvis_v1_train.json").read_text())["annotations"])
    assert {c["id"]: c["instance_count"] for c in lvis.dataset["categories"]} == counts


def test_voc_boxes_are_the_coco_boxes_after_the_offset_of_one(root):
    devkit = root / "VOCdevkit/VOC2007"
    lists = {n: (devkit / f"ImageSets/Main/{n}.txt").read_text().split() for n in ("train", "val", "trainval", "test")}
    assert sorted(lists["train"] + lists["val"]) == lists["trainval"] and len(lists["val"]) == 400 and len(lists["test"]) == 300
    difficult = 0
    for split, members in (("train2017", lists["trainval"]), ("val2017", lists["test"])):
        boxes = {m: [] for m in members}
        for name, image, a in named(root, split):
            x, y, w, h = a["bbox"]
            boxes[image["file_name"][:-4]].append((name, [round(v) for v in (x, y, round(x + w, 2), round(y + h, 2))]))
        for stem in members:
            objects = ElementTree.parse(devkit / f"Annotations/{stem}.xml").findall("object")
            inclusive = [(o.findtext("name"), corners(o)) for o in objects]
            assert [(n, [x0 - 1, y0 - 1, x1, y1]) for n, (x0, y0, x1, y1) in inclusive] == boxes[stem]
            difficult += sum(o.findtext("difficult") == "1" for o in objects)
            assert (devkit / f"JPEGImages/{stem}.jpg").stat().st_size == (root / split / f"{stem}.jpg").stat().st_size
    assert difficult > 100


def test_imagenet_boxes_lie_inside_their_picture_and_name_their_folder(root):
    paths = sorted((root / "imagenet/val_boxes").rglob("*.xml"))
    assert len(paths) == 10 * len(ALL_CLASSES)
    for path in paths:
        tree = ElementTree.parse(path)
        (found,) = tree.findall("object")
        x0, y0, x1, y1 = corners(found)
        with Image.open(root / f"imagenet/val/{path.parent.name}/{path.stem}.JPEG") as photo:
            assert photo.size == (int(tree.findtext("size/width")), int(tree.findtext("size/height")))
            assert 0 <= x0 < x1 <= photo.width and 0 <= y0 < y1 <= photo.height
        assert found.findtext("name") == path.parent.name


def test_captions_are_five_an_image_varied_and_drop_some_colour_words(root):
    data = json.loads((root / "annotations/captions_train2017.json").read_text())
    assert set(Counter(a["image_id"] for a in data["annotations"]).values()) == {5} and len(data["annotations"]) == 5 * len(data["images"])
    texts = [a["caption"].lower() for a in data["annotations"]]
    assert len(set(texts)) > 0.8 * len(texts)
    stars = {i["id"] for n, i, _ in named(root, "train2017") if n == "red star"}
    about = [a["caption"].lower() for a in data["annotations"] if a["image_id"] in stars]
    assert np.mean(["star" in t for t in about]) > 0.8 and 0.45 < np.mean(["red star" in t for t in about]) < 0.8
    assert any("red circle" in t for t in texts) and any("a small circle" in t or "a circle" in t for t in texts)
