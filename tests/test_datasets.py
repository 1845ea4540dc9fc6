# SPDX-License-Identifier: MIT
"""common/datasets.py: which images and boxes are kept, what a wrong file says, pixels against OpenCV, batches and their order."""
import json
import math
import multiprocessing
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets import (BASE_48, BatchPlan, CocoDataset, Records, collate, eval_loader, find_coco, find_lvis, objects365,
                             parse_image_size, read_captions, read_image, read_voc, records_of, repeat_factors,
                             repeat_fractions, resize, train_loader, unsent)
from common.run import UserError


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photo(path, width, height, seed=0):
    """A JPEG of random 8-px blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width]).save(path, quality=95)


def make_coco(root, sizes, annotations=None, categories=((3, "cup"), (7, "dog"))):
    """COCO 2017 layout with both splits alike. sizes: {image id: (width, height)}; annotations: (image, category, bbox, extra) tuples."""
    if annotations is None:
        annotations = [(i, categories[k % len(categories)][0], (2 + k, 3, 20, 15), {}) for k, i in enumerate(sizes)]
    data = dict(images=[dict(id=i, file_name=f"{i}.jpg", width=w, height=h) for i, (w, h) in sizes.items()],
                annotations=[dict(dict(id=n, image_id=i, category_id=c, bbox=list(b), area=b[2] * b[3], iscrowd=0), **extra)
                             for n, (i, c, b, extra) in enumerate(annotations, 1)],
                categories=[dict(id=i, name=name) for i, name in categories])
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        for i, (w, h) in sizes.items():
            photo(root / split / f"{i}.jpg", w, h, i)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return root


def dataset(root, split="train", **kwargs):
    return CocoDataset(*find_coco(root, split), **dict(dict(train=split == "train", image_size="64"), **kwargs))


def change(root, edit, split="train"):
    """Apply `edit` to the parsed json of one split."""
    path = root / "annotations" / f"instances_{split}2017.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def seed_that(ds, flips):
    """A random seed under which the first image is mirrored, or is not."""
    plain = CocoDataset(ds.folder, ds.annotations, True, "64", flip=0.0)[0, 0]["image"]
    return next(seed for seed in range(100) if torch.equal(ds[0, seed]["image"], plain.flip(2) if flips else plain))


@pytest.fixture
def tiny(tmp_path):
    return make_coco(tmp_path / "tiny", {11: (64, 48), 5: (48, 64), 8: (64, 64)})


# ------------------------------------------------------------------ what is kept

KEPT_SIZES = {1: (100, 80), 2: (100, 80), 3: (100, 80), 4: (31, 80), 5: (100, 32), 6: (100, 80)}
KEPT = [
    (1, 7, (10, 20, 30, 40), {}),              # kept
    (1, 3, (0, 0, 50, 50), {"iscrowd": 1}),    # crowd
    (1, 3, (10, 10, 0.5, 40), {}),             # narrower than 1 px
    (1, 3, (10, 10, 40, 0.99), {}),            # flatter than 1 px
    (1, 3, (10, 10, 1, 1), {}),                # kept: exactly 1 px
    (1, 3, (100, 10, 20, 20), {}),             # touches the right edge from outside
    (1, 3, (-30, 10, 30, 20), {}),             # touches the left edge from outside
    (1, 3, (10, 200, 20, 20), {}),             # below
    (1, 3, (90, 70, 20, 20), {}),              # kept: sticks out, and is cut there
    (1, 3, (10, 10, 20, 20), {"area": 0}),     # no area
    (2, 3, (0, 0, 50, 50), {"iscrowd": 1}),    # crowd-only image: stays, as background
    (4, 3, (1, 1, 20, 20), {}),                # image 31 px wide: dropped with its box
    (5, 3, (1, 1, 20, 20), {}),                # image exactly 32 px high: kept
    (6, 3, (1, 1, 0.2, 0.2), {}),              # tiny-only image: annotated, so it stays
]                                              # image 3 has no annotation at all: dropped


@pytest.fixture
def kept_root(tmp_path):
    return make_coco(tmp_path / "kept", KEPT_SIZES, KEPT)


def test_training_keeps_and_counts_what_the_rules_say(kept_root):
    ds = dataset(kept_root)
    assert ds.dropped == {"crowd": 2, "under 1 px": 4, "images": 2}
    assert ds.records.count == {"boxes outside their image, left out": 3, "boxes over the border of their image, cut there": 1}
    boxes = {item[0]: item[4].tolist() for item in ds.items}
    assert boxes == {1: [[10, 20, 40, 60], [10, 10, 11, 11], [90, 70, 100, 80]], 2: [], 5: [[1, 1, 21, 21]], 6: []}
    assert {item[0]: item[5].tolist() for item in ds.items} == {1: [1, 0, 0], 2: [], 5: [0], 6: []}
    assert len(ds) == 4


def test_evaluation_keeps_every_image(kept_root):
    ds = dataset(kept_root, "val")
    assert [item[0] for item in ds.items] == [1, 2, 3, 4, 5, 6] and ds.dropped == {"crowd": 2, "images": 0}


def test_evaluation_and_its_truth_hold_the_same_boxes_those_under_1_px_too(kept_root):
    """COCO's evaluation counts them. `small`: as training does, for an evaluation that shall not."""
    for small, tiny in ((None, 4), (True, 0)):
        ds = dataset(kept_root, "val", small=small)
        truth = ds.truth()
        single = [a for a in truth["annotations"] if not a["iscrowd"]]
        assert len(single) == sum(len(item[4]) for item in ds.items) == 5 + tiny and len(truth["annotations"]) - len(single) == 2
        assert [a["id"] for a in truth["annotations"]] == list(range(1, 8 + tiny))
        for item in ds.items:
            mine = [a for a in single if a["image_id"] == item[0]]
            assert [ds.category_ids[k] for k in item[5]] == [a["category_id"] for a in mine]
            expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
            assert np.allclose(item[4], np.array(expected).reshape(-1, 4), rtol=1e-6)
    assert dataset(kept_root, "train").dropped["under 1 px"] == ds.dropped["under 1 px"] == 4
    assert [a["area"] for a in truth["annotations"]][0] == 1200


def test_min_side_is_a_choice(kept_root):
    assert len(dataset(kept_root, min_side=33)) == 3 and len(dataset(kept_root, min_side=1)) == 5


def test_crowd_only_image_has_no_boxes_and_loads(kept_root):
    item = dataset(kept_root)[1, 0]
    assert item["image_id"] == 2 and item["boxes"].shape == (0, 4) and item["labels"].shape == (0,)
    assert item["boxes"].dtype == torch.float32 and item["labels"].dtype == torch.int64


def test_labels_are_contiguous_in_the_order_of_category_ids(tmp_path):
    names = ((90, "z"), (1, "a"), (13, "m"))
    root = make_coco(tmp_path / "holes", {1: (64, 64)}, [(1, c, (5, 5, 20, 20), {}) for c in (90, 13, 1, 13)], names)
    ds = dataset(root)
    assert ds.category_ids == [1, 13, 90] and ds.classes == ["a", "m", "z"]
    assert ds[0, 0]["labels"].tolist() == [2, 1, 0, 1]


# ------------------------------------------------------------------ wrong data: one clear line

def error_of(action):
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("missing", ["annotations/instances_train2017.json", "train2017"])
def test_find_coco_names_the_missing_part_and_the_remedy(tmp_path, missing):
    root = make_coco(tmp_path / "d", {1: (64, 64)})
    assert find_coco(root, "train") == (root / "train2017", root / "annotations" / "instances_train2017.json")
    (root / missing).rename(tmp_path / "away")
    text = error_of(lambda: find_coco(root, "train"))
    assert str(root / missing) in text and "missing" in text and "--data" in text and "cocodataset.org" in text
    find_coco(root, "val")


def test_missing_image_is_found_at_the_start(tiny):
    (tiny / "train2017" / "5.jpg").unlink()
    text = error_of(lambda: dataset(tiny))
    assert "1 of 3 images are missing" in text and "5.jpg" in text and str(tiny / "train2017") in text


def test_file_name_in_a_subfolder_is_found(tiny):
    (tiny / "train2017" / "part").mkdir()
    (tiny / "train2017" / "5.jpg").rename(tiny / "train2017" / "part" / "5.jpg")
    change(tiny, lambda d: d["images"][1].update(file_name="part/5.jpg"))
    assert len(dataset(tiny)) == 3


def test_truncated_jpeg(tiny):
    path = tiny / "train2017" / "11.jpg"
    path.write_bytes(path.read_bytes()[:600])
    ds = dataset(tiny)
    text = error_of(lambda: ds[0, 0])
    assert str(path) in text and "cannot be decoded" in text


def test_file_that_is_no_image(tiny):
    path = tiny / "train2017" / "11.jpg"
    path.write_text("<html>404</html>")
    text = error_of(lambda: dataset(tiny)[0, 0])
    assert str(path) in text and "cannot be decoded" in text


def test_image_deleted_after_the_start(tiny):
    ds = dataset(tiny)
    (tiny / "train2017" / "11.jpg").unlink()
    text = error_of(lambda: ds[0, 0])
    assert str(tiny / "train2017" / "11.jpg") in text and "image is missing" in text


def test_wrong_image_size(tiny):
    photo(tiny / "train2017" / "11.jpg", 48, 64)
    text = error_of(lambda: dataset(tiny)[0, 0])
    assert str(tiny / "train2017" / "11.jpg") in text and "48x64" in text and "64x48" in text and "image 11" in text


@pytest.mark.parametrize("edit, words", [
    (lambda d: d["annotations"][1].update(category_id=4), ("annotation 2", "category id 4")),
    (lambda d: d["annotations"][1].pop("category_id"), ("annotation 2", "category id None")),
    (lambda d: d["annotations"][1].update(image_id=999), ("annotation 2", "image id 999")),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, float("nan"), 4]), ("annotation 2", "nan", "four finite numbers")),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, float("inf"), 4]), ("annotation 2", "inf", "four finite numbers")),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), ("annotation 2", "[1, 2, 3]")),
    (lambda d: d["annotations"][1].pop("bbox"), ("annotation 2", "four finite numbers")),
    (lambda d: d["annotations"][1].update(bbox=None), ("annotation 2", "four finite numbers")),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, None, 4]), ("annotation 2", "four finite numbers")),
    (lambda d: d["categories"].append(dict(id=3, name="again")), ("category id", "twice")),
    (lambda d: d["categories"].clear(), ("'categories'", "empty")),
    (lambda d: d.pop("categories"), ("no 'categories' list",)),
    (lambda d: d.pop("images"), ("no 'images' list",)),
    (lambda d: d.pop("annotations"), ("no 'annotations' list",)),
    (lambda d: d["annotations"].clear(), ("no usable image", "annotated")),
    (lambda d: d["images"].clear(), ("'images'", "empty")),
], ids=["category", "no-category", "image", "nan", "inf", "three", "no-bbox", "null-bbox", "null-width", "twice", "no-classes",
        "categories", "images", "annotations", "unusable", "no-images"])
def test_wrong_annotations_name_the_file_and_the_entry(tiny, edit, words):
    change(tiny, edit)
    text = error_of(lambda: dataset(tiny))
    for word in ("instances_train2017.json", *words):
        assert word in text, text


@pytest.mark.parametrize("content", [b'{"images": [', b"", b"\xff\xd8\xff\xe0 a photo", b"<html></html>"])
def test_broken_json(tiny, content):
    path = tiny / "annotations" / "instances_train2017.json"
    path.write_bytes(content)
    text = error_of(lambda: dataset(tiny))
    assert str(path) in text and "not valid json" in text


@pytest.mark.parametrize("text", ["", "0", "-5", "800,", "800,0", "big", "800-480", "480-", "1-2-3", "800x600", "1e3"])
def test_bad_image_size_is_refused(tiny, text):
    message = error_of(lambda: dataset(tiny, image_size=text))
    assert "--image-size" in message and text in message and "800" in message


def test_image_sizes_by_hand():
    assert parse_image_size("800") == [800] == parse_image_size(800)
    assert parse_image_size("640,800") == [640, 800] and parse_image_size("480-800") == (480, 800) and parse_image_size("64-64") == (64, 64)


def test_error_in_a_loader_worker_ends_in_the_clear_line(tiny):
    path = tiny / "train2017" / "11.jpg"
    path.write_bytes(path.read_bytes()[:600])
    loader, _ = train_loader(dataset(tiny), 3, 0, 1, seed=0, workers=1, pin=False)
    with pytest.raises(UserError) as caught:
        list(loader)
    last = str(caught.value).strip().splitlines()[-1]
    assert str(path) in last and "cannot be decoded" in last and "fetch the file again" in last


# ------------------------------------------------------------------ resize, boxes, flip

@pytest.mark.parametrize("w, h, short, expected", [
    (640, 480, 800, (1067, 800)), (640, 427, 800, (1199, 800)), (1000, 400, 800, (1333, 533)), (480, 640, 800, (800, 1067)),
    (400, 1000, 800, (533, 1333)), (800, 800, 800, (800, 800)), (640, 480, 640, (853, 640)), (1600, 1200, 480, (640, 480)),
    (2000, 500, 480, (800, 200))])
def test_resize_sizes(w, h, short, expected):
    image, size = resize(torch.zeros(3, h, w, dtype=torch.uint8), short)
    assert (size[1], size[0]) == expected and image.shape == (3, *size) and image.dtype == torch.uint8


def test_resize_to_the_same_size_changes_no_pixel():
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize(image, 60)[0], image)


@pytest.mark.parametrize("short", [800, 544, 200])  # up, nearly the same, down (where antialiasing would show)
def test_resized_pixels_equal_opencv_to_one_grey_level(coco_mini, short):
    cv2 = pytest.importorskip("cv2", reason="OpenCV (a dependency of lvis) does not import")
    for path in sorted((coco_mini / "val2017").glob("*.jpg"))[:4]:
        image = np.array(read_image(path))
        ours, (h, w) = resize(torch.from_numpy(image).permute(2, 0, 1), short)
        theirs = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
        difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs.astype(int))
        assert difference.max() <= 1, f"{path.name} to {w}x{h}"
        assert image.shape != theirs.shape and theirs.std() > 10


def test_boxes_are_scaled_per_axis_and_clipped(tmp_path):
    boxes = [(1, 3, (10, 20, 30, 40), {}), (1, 3, (-8, 60, 40, 40), {}), (1, 3, (50, -5, 60, 30), {})]
    root = make_coco(tmp_path / "b", {1: (97, 71)}, boxes)
    item = dataset(root, flip=0.0, image_size="200")[0, 0]
    assert item["size"] == (200, 273) and item["original_size"] == (71, 97)  # 97 * 200 / 71 = 273.24
    sx, sy = 273 / 97, 200 / 71
    expected = torch.tensor([[10 * sx, 20 * sy, 40 * sx, 60 * sy], [0, 60 * sy, 32 * sx, 200], [50 * sx, 0, 273, 25 * sy]])
    torch.testing.assert_close(item["boxes"], expected, rtol=1e-6, atol=1e-4)


def test_flip_mirrors_pixels_and_boxes(tmp_path):
    root = make_coco(tmp_path / "f", {1: (100, 80)}, [(1, 3, (10, 20, 30, 40), {}), (1, 7, (0, 0, 100, 10), {})])
    plain, mirrored = dataset(root, image_size="80", flip=0.0)[0, 0], dataset(root, image_size="80", flip=1.0)[0, 0]
    assert plain["boxes"].tolist() == [[10, 20, 40, 60], [0, 0, 100, 10]]
    assert mirrored["boxes"].tolist() == [[60, 20, 90, 60], [0, 0, 100, 10]]  # x1' = 100 - 40
    assert torch.equal(mirrored["image"], plain["image"].flip(2)) and not torch.equal(mirrored["image"], plain["image"])
    assert mirrored["labels"].tolist() == plain["labels"].tolist() == [0, 1]


def test_flip_depends_on_the_key_only_and_happens_half_the_time(tiny):
    ds = dataset(tiny)
    first = [ds[0, seed]["boxes"][0, 0].item() for seed in range(100)]
    again = [ds[0, seed]["boxes"][0, 0].item() for seed in range(100)]
    assert first == again
    count = Counter(first)
    assert len(count) == 2 and min(count.values()) > 30
    mirrored, plain = ds[0, seed_that(ds, True)], ds[0, seed_that(ds, False)]
    assert plain["boxes"].tolist() == [[2.65625, 4, 29.21875, 24]]  # (2, 3, 22, 18) in 64 x 48, seen as 85 x 64
    assert mirrored["boxes"].tolist() == [[85 - 29.21875, 4, 85 - 2.65625, 24]]


def test_colours_are_distorted_by_the_key_alone(tiny):
    """The same key, the same colours, whatever the global stream; boxes and flips are those without distortion; the stream is left alone."""
    plain, distorted = (CocoDataset(*find_coco(tiny, "train"), True, "64", photometric=p) for p in (False, True))
    changed = 0
    for seed in range(12):
        a, state = plain[0, seed], torch.get_rng_state()
        b = distorted[0, seed]
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(seed)
        c = distorted[0, seed]
        assert torch.equal(b["image"], c["image"]) and torch.equal(a["boxes"], b["boxes"]) and b["image"].dtype == torch.uint8
        changed += not torch.equal(a["image"], b["image"])
    assert changed > 6


def test_evaluation_never_flips_and_takes_the_largest_size(tiny):
    ds = dataset(tiny, "val", image_size="32,96", flip=1.0)
    items = [ds[0, seed] for seed in range(8)]
    assert {item["size"] for item in items} == {(96, 128)}
    assert all(torch.equal(item["image"], items[0]["image"]) for item in items)
    assert dataset(tiny, "val", image_size="32-96")[0, 0]["size"] == (96, 128)


def test_training_size_is_drawn_from_the_choice_or_the_range(tiny):
    two = Counter(dataset(tiny, image_size="32,96")[2, seed]["size"][0] for seed in range(60))
    assert set(two) == {32, 96} and min(two.values()) > 15
    many = {dataset(tiny, image_size="40-50")[2, seed]["size"][0] for seed in range(120)}
    assert many == set(range(40, 51))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_become_rgb(tiny, mode):
    path = tiny / "train2017" / "11.jpg"
    Image.new("RGB", (64, 48), (200, 40, 90)).convert(mode).save(path, quality=95)
    with Image.open(path) as stored:
        assert stored.mode == mode
    assert read_image(path).mode == "RGB"
    image = dataset(tiny, flip=0.0, image_size="48")[0, 0]["image"]
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
    expected = torch.tensor([200.0, 40, 90]) if mode == "CMYK" else torch.full((3,), 0.299 * 200 + 0.587 * 40 + 0.114 * 90)
    assert (image.float().mean((1, 2)) - expected).abs().max() < 4


# ------------------------------------------------------------------ collate

def test_collate_pads_right_and_bottom_to_32_with_minus_one_labels(tiny):
    items = [dataset(tiny, flip=0.0, image_size="48")[i, 0] for i in range(3)]
    items[1] = dict(items[1], boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    items[2] = dict(items[2], boxes=torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), labels=torch.tensor([1, 0]))
    batch = collate(items)
    assert batch["images"].shape == (3, 3, 64, 64) and batch["images"].dtype == torch.uint8
    assert batch["sizes"].tolist() == [[48, 64], [64, 48], [48, 48]] and batch["image_ids"] == [11, 5, 8]
    assert batch["original_sizes"] == [(48, 64), (64, 48), (64, 64)]
    for image, item in zip(batch["images"], items):
        h, w = item["size"]
        assert torch.equal(image[:, :h, :w], item["image"])
        assert image[:, h:].sum() == 0 and image[:, :, w:].sum() == 0
    assert batch["labels"].tolist() == [[0, -1], [-1, -1], [1, 0]] and batch["labels"].dtype == torch.int64
    assert batch["boxes"].shape == (3, 2, 4) and batch["boxes"][2].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch["boxes"][0, 1].tolist() == [0, 0, 0, 0]


def test_collate_without_any_box_has_one_padded_row(kept_root):
    batch = collate([dataset(kept_root)[1, 0]])
    assert batch["boxes"].shape == (1, 1, 4) and batch["labels"].tolist() == [[-1]]
    assert tuple(batch["images"].shape[2:]) == (64, 96)  # 64 x 80 padded


def test_collate_pads_to_its_own_largest_image_and_divisor():
    item = lambda h, w: dict(image=torch.ones(3, h, w, dtype=torch.uint8), size=(h, w), boxes=torch.zeros(0, 4),
                             labels=torch.zeros(0, dtype=torch.int64), image_id=0, original_size=(h, w))
    assert collate([item(33, 10), item(5, 64)])["images"].shape == (2, 3, 64, 64)
    assert collate([item(33, 10), item(5, 65)], divisor=1)["images"].shape == (2, 3, 33, 65)


# ------------------------------------------------------------------ order of the images

def plan_of(n=24, portrait=8, **kwargs):
    return BatchPlan([i >= portrait for i in range(n)], **kwargs)


def test_every_image_once_per_epoch_when_it_divides():
    plan = plan_of(batch_size=4)
    for epoch in range(3):
        plan.set_epoch(epoch)
        batches = list(plan)
        assert len(batches) == len(plan) == 6 and all(len(b) == 4 for b in batches)
        assert sorted(i for b in batches for i, _ in b) == list(range(24))


@pytest.mark.parametrize("n, portrait, batch", [(25, 8, 4), (26, 3, 4), (7, 3, 4), (3, 1, 8), (1, 0, 4), (5, 5, 2), (30, 11, 7)])
def test_uneven_epoch_is_wrapped_and_covers_every_image(n, portrait, batch):
    plan = plan_of(n, portrait, batch_size=batch)
    batches = list(plan)
    assert len(batches) == len(plan) == math.ceil(n / batch) and all(len(b) == batch for b in batches)
    seen = Counter(i for b in batches for i, _ in b)
    assert set(seen) == set(range(n)) and sum(seen.values()) == math.ceil(n / batch) * batch
    if batch <= n:
        assert max(seen.values()) <= 2


@pytest.mark.parametrize("world, batch", [(2, 2), (4, 1)])
def test_processes_share_the_global_batches_of_one_process(world, batch):
    one = plan_of(26, batch_size=4, seed=3)
    ranks = [plan_of(26, batch_size=batch, rank=r, world=world, seed=3) for r in range(world)]
    for epoch in (0, 5):
        for plan in (one, *ranks):
            plan.set_epoch(epoch)
        whole, parts = list(one), [list(p) for p in ranks]
        assert all(len(p) == len(one) == len(whole) == 7 for p in parts)
        assert [sum(step, []) for step in zip(*parts)] == whole  # the same (index, seed) pairs in the same order


@pytest.mark.parametrize("world", [1, 3])
def test_length_formula(world):
    for n in range(1, 20):
        for batch in (1, 2, 5):
            plan = plan_of(n, n // 3, batch_size=batch, rank=world - 1, world=world)
            assert len(plan) == len(list(plan)) == math.ceil(n / (batch * world))


def test_start_continues_an_epoch_exactly():
    plan = plan_of(26, batch_size=4, seed=1)
    plan.set_epoch(2)
    whole = list(plan)
    for start in (0, 1, 5, 7):
        plan.set_epoch(2, start)
        assert list(plan) == whole[start:] and len(plan) == 7 - start
    plan.set_epoch(3)
    assert len(list(plan)) == 7  # the next epoch starts at its beginning again


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        plan = plan_of(batch_size=4, seed=seed)
        plan.set_epoch(epoch)
        return list(plan)
    assert order(0, 0) == order(0, 0)
    indices = lambda batches: [i for b in batches for i, _ in b]
    assert indices(order(0, 0)) != indices(order(0, 1)) and indices(order(0, 0)) != indices(order(1, 0))
    keys = {pair for seed in range(3) for epoch in range(3) for b in order(seed, epoch) for pair in b}
    assert len({k for _, k in keys}) == 3 * 3 * 24  # every image gets its own random seed in every epoch


def test_landscape_and_portrait_share_only_the_last_batches():
    for epoch in range(5):
        plan = plan_of(50, 21, batch_size=4)
        plan.set_epoch(epoch)
        mixed = [len({i >= 21 for i, _ in batch}) > 1 for batch in plan]
        assert not any(mixed[:12])  # 29 // 4 + 21 // 4 = 12 full batches, then one leftover of 1 + 1 images
        assert len(mixed) == 13


def test_loader_follows_the_plan_over_epochs(tiny):
    loader, plan = train_loader(dataset(tiny), 2, 0, 1, seed=0, workers=0, pin=False)
    for epoch in (0, 1, 4):
        plan.set_epoch(epoch)
        expected = [[dataset(tiny).items[i][0] for i, _ in batch] for batch in plan]
        assert [batch["image_ids"] for batch in loader] == expected


def test_pixels_do_not_depend_on_the_number_of_workers(tiny):
    batches = {}
    for workers in (0, 2):
        loader, plan = train_loader(dataset(tiny, image_size="48-80"), 2, 0, 1, seed=5, workers=workers, pin=False)
        batches[workers] = []
        for epoch in (0, 1):
            plan.set_epoch(epoch, start=epoch)
            batches[workers] += list(loader)
    assert len(batches[0]) == len(batches[2]) == 3
    for a, b in zip(batches[0], batches[2]):
        assert a["image_ids"] == b["image_ids"]
        for name in ("images", "sizes", "boxes", "labels"):
            assert torch.equal(a[name], b[name]), name
    del loader


def test_loaders_leave_the_global_random_streams_alone(tiny):
    """Otherwise a resumed run, which starts its loaders another number of times, would draw other numbers in the model."""
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    loader, _ = train_loader(dataset(tiny), 2, 0, 1, seed=0, workers=0, pin=False)
    for _ in range(2):
        list(loader)
    list(eval_loader(dataset(tiny, "val"), 0, 1, workers=0, pin=False))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


# ------------------------------------------------------------------ real photographs

def test_coco_mini_train_counts(coco_mini):
    ds = CocoDataset(*find_coco(coco_mini, "train"), train=True)
    raw = json.loads((coco_mini / "annotations" / "instances_train2017.json").read_text())
    images = {i["id"]: i for i in raw["images"]}
    single = [a for a in raw["annotations"] if not a["iscrowd"]]
    assert len(raw["annotations"]) == 739 and len(single) == 731
    assert len(ds) == len({a["image_id"] for a in raw["annotations"]}) == 80
    assert sum(len(item[4]) for item in ds.items) == 731 and ds.dropped == {"crowd": 8, "under 1 px": 0, "images": 0}
    assert len(ds.classes) == 80 and ds.category_ids[-1] == 90 and ds.classes[0] == "person"
    assert Counter(k for item in ds.items for k in item[5].tolist()) == Counter(
        sorted(c["id"] for c in raw["categories"]).index(a["category_id"]) for a in single)
    assert ds.landscape == [images[item[0]]["width"] >= images[item[0]]["height"] for item in ds.items]
    assert 0 < sum(ds.landscape) < 80


def test_coco_mini_boxes_follow_their_photo(coco_mini):
    """Three photos at 800: size by the rule, boxes as raw xywh times the two factors."""
    ds = CocoDataset(*find_coco(coco_mini, "train"), train=True, flip=0.0)
    raw = json.loads((coco_mini / "annotations" / "instances_train2017.json").read_text())
    for index in (0, 17, 60):
        item, info = ds[index, 0], next(i for i in raw["images"] if i["id"] == ds.items[index][0])
        k = min(1333 / max(info["width"], info["height"]), 800 / min(info["width"], info["height"]))
        w, h = int(info["width"] * k + 0.5), int(info["height"] * k + 0.5)
        assert item["size"] == (h, w) and item["image"].shape == (3, h, w)
        mine = [a["bbox"] for a in raw["annotations"] if a["image_id"] == info["id"] and not a["iscrowd"]]
        sx, sy = w / info["width"], h / info["height"]
        expected = torch.tensor([[x * sx, y * sy, (x + bw) * sx, (y + bh) * sy] for x, y, bw, bh in mine])
        torch.testing.assert_close(item["boxes"], expected, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_eval_loader_covers_79_photos_exactly_once(coco_mini, world):
    ds = CocoDataset(*find_coco(coco_mini, "val"), train=False, image_size="32")
    shards = [[batch["image_ids"] for batch in eval_loader(ds, rank, world, workers=0, pin=False)] for rank in range(world)]
    assert all(len(ids) == 1 for shard in shards for ids in shard)
    seen = [ids[0] for shard in shards for ids in shard]
    assert len(seen) == 79 and sorted(seen) == sorted(i["id"] for i in json.loads(
        (coco_mini / "annotations" / "instances_val2017.json").read_text())["images"])
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_eval_pixels_do_not_depend_on_the_number_of_processes(tiny):
    ds = dataset(tiny, "val")
    alone = {b["image_ids"][0]: b["images"] for b in eval_loader(ds, 0, 1, 0, False)}
    shared = {b["image_ids"][0]: b["images"] for rank in (0, 1) for b in eval_loader(ds, rank, 2, 0, False)}
    assert alone.keys() == shared.keys() and all(torch.equal(alone[i], shared[i]) for i in alone)


def test_more_processes_than_images_leaves_some_idle(tiny):
    assert [len(list(eval_loader(dataset(tiny, "val"), rank, 5, 0, False))) for rank in range(5)] == [1, 1, 1, 0, 0]


def test_data_errors_are_one_line_without_python_words(tiny):
    """The text is shown to a person as it is: no exception class name, no traceback."""
    change(tiny, lambda d: d["annotations"][0].update(category_id=99))
    assert not re.search(r"Error|Traceback", error_of(lambda: dataset(tiny)))


# ------------------------------------------------------------------ large-scale jitter, LVIS, VOC, repeats

def test_jitter_stays_on_the_canvas_keeps_a_box_and_moves_boxes_with_the_pixels(tmp_path):
    picture = np.zeros((90, 160, 3), np.uint8)
    picture[30:60, 100:140] = 255
    (tmp_path / "i").mkdir()
    Image.fromarray(picture).save(tmp_path / "i/1.png")
    raw = dict(images=[dict(id=1, file_name="1.png", width=160, height=90)], categories=[dict(id=1, name="box"), dict(id=2, name="other")],
               annotations=[dict(id=1, image_id=1, category_id=1, bbox=[100.0, 30, 40, 30], area=1200.0), dict(id=2, image_id=1, category_id=2, bbox=[5.0, 5, 10, 10], area=100.0)])
    records = records_of(raw, "x.json")
    data = CocoDataset(tmp_path / "i", records, True, classes=["box"], canvas=128, jitter=(0.2, 3.0), hidden=["other"])
    sizes, flipped = set(), 0
    for seed in range(60):
        item = data[0, seed]
        (h, w), (x1, y1, x2, y2) = item["size"], item["boxes"][0].tolist()
        assert item["image"].shape == (3, h, w) and h <= 128 and w <= 128 and 0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h
        bright = item["image"][0].float() / 255
        if (x2 - x1) > 8 and (y2 - y1) > 8:
            inner = bright[int(y1) + 3:int(y2) - 3, int(x1) + 3:int(x2) - 3]
            assert inner.min() > 0.9 and abs(bright.sum().item() - (x2 - x1) * (y2 - y1)) < 0.35 * (x2 - x1) * (y2 - y1) + 8
        sizes.add((h, w))
        assert (item["hidden"].shape[1:] == (4,)) and len(item["hidden"]) <= 1
    assert len(sizes) > 10 and min(w for _, w in sizes) < 60 and (72, 128) not in sizes - {(72, 128)}
    plain = CocoDataset(tmp_path / "i", records, False, canvas=128)[0, 0]
    assert plain["size"] == (72, 128) and plain["boxes"][0].tolist() == [80, 24, 112, 48]
    batch = collate([plain, plain], 128)
    assert batch["images"].shape == (2, 3, 128, 128)


def test_lvis_files_name_their_images_by_url(tmp_path):
    (tmp_path / "coco/val2017").mkdir(parents=True)
    photo(tmp_path / "coco/val2017/000000000007.jpg", 64, 48)
    (tmp_path / "lvis/annotations").mkdir(parents=True)
    raw = dict(images=[dict(id=7, width=64, height=48, coco_url="http://images.cocodataset.org/val2017/000000000007.jpg")],
               categories=[dict(id=1, name="a_b", frequency="r"), dict(id=2, name="c", frequency="f")],
               annotations=[dict(id=1, image_id=7, category_id=2, bbox=[1.0, 2, 30, 20], area=600.0, segmentation=[[1, 2, 31, 2, 31, 22, 1, 22]])])
    (tmp_path / "lvis/annotations/lvis_v1_train.json").write_text(json.dumps(raw))
    data = CocoDataset(*find_lvis(tmp_path / "lvis", "train", tmp_path / "coco"), True, canvas=64, masks=True, jitter=(1.0, 1.0), flip=0)
    batch = collate([data[0, 0]], 64)
    assert data.classes == ["a_b", "c"] and batch["masks"].shape == (1, 1, 32, 32) and abs(int(batch["masks"].sum()) - 600) < 60
    with pytest.raises(UserError, match="lvis_v1_val.json is missing"):
        find_lvis(tmp_path / "lvis", "val", tmp_path / "coco")
    with pytest.raises(UserError, match="--images"):
        find_lvis(tmp_path / "lvis", "train", tmp_path / "nothing")
    (tmp_path / "coco/val2017/000000000007.jpg").unlink()
    with pytest.raises(UserError, match="1 of 1 images are missing"):
        CocoDataset(*find_lvis(tmp_path / "lvis", "train", tmp_path / "coco"), True, canvas=64)


def test_repeat_factors_by_hand_and_in_an_epoch(tmp_path):
    many = [(i, 3, (2, 3, 20, 15), {}) for i in range(1, 9)] + [(8, 7, (2, 3, 20, 15), {})]
    data = dataset(make_coco(tmp_path, {i: (64, 48) for i in range(1, 9)}, many), train=True)
    # class 3 in every image: factor 1; class 7 in 1 of 8 with threshold 1/2: sqrt(4) = 2
    assert repeat_factors(data, 0.5) == [1] * 7 + [2] and repeat_factors(data, 0.9) == [1] * 7 + [3] and repeat_factors(data, 0.01) == [1] * 8
    plan = BatchPlan(data.landscape, 3, repeats=repeat_factors(data, 0.5))
    keys = [key for batch in plan for key in batch]
    assert len(plan) == 3 and Counter(i for i, _ in keys) == {**{i: 1 for i in range(7)}, 7: 2} and len(set(keys)) == 9


def test_voc_xml_becomes_coco(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2007"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    photo(root / "JPEGImages/000001.jpg", 64, 48)
    xml = """<annotation><size><width>64</width><height>48</height></size><object><name>dog</name><difficult>1</difficult>
             <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object><object><name>cat</name>
             <bndbox><xmin>5</xmin><ymin>5</ymin><xmax>8</xmax><ymax>8</ymax></bndbox></object></annotation>"""
    (root / "Annotations/000001.xml").write_text(xml)
    (root / "ImageSets/Main/test.txt").write_text("000001\n")
    records = read_voc(tmp_path, [("2007", "test")])
    assert isinstance(records, Records) and records.xywh.tolist() == [[0, 1, 10, 19], [4, 4, 4, 4]]
    assert records.difficult.tolist() == records.crowd.tolist() == [1, 0]
    data = CocoDataset(tmp_path / "VOCdevkit", records, True, image_size="48")
    assert data.items[0][4].tolist() == [[4, 4, 8, 8]] and data.classes[7] == "cat" and len(data.classes) == 20
    assert [a["difficult"] for a in data.truth()["annotations"]] == [1, 0]
    with pytest.raises(UserError, match="train.txt is missing"):
        read_voc(tmp_path, [("2007", "train")])
    for broken, words in ((xml.replace("<name>dog", "<name>unicorn"), "class unicorn"), ("<annotation>", "no VOC annotation"), (xml.replace("<xmin>1</xmin>", ""), "no VOC annotation")):
        (root / "Annotations/000001.xml").write_text(broken)
        with pytest.raises(UserError, match=words):
            read_voc(tmp_path, [("2007", "test")])


def test_repeat_factors_of_lvis():
    """100,170 images, threshold 0.001: a class in n of them stands sqrt(100.17 / n) times."""
    class Held:
        def __len__(self):
            return 100170

        def held(self):
            of_class = {9: (1000, 100170), 0: (0, 1), 1: (1, 11), 2: (11, 36), 3: (36, 136), 4: (136, 237)}  # from image ... to image
            return (np.concatenate([np.arange(a, b) for a, b in of_class.values()]),
                    np.concatenate([np.full(b - a, k) for k, (a, b) in of_class.items()]))
    r = repeat_fractions(Held(), 0.001)
    assert [r[i].item() for i in (0, 1, 11, 36, 136, 5000)] == pytest.approx([10.0085, 3.1650, 2.0017, 1.0008, 1, 1], abs=1e-4)


@pytest.mark.parametrize("kwargs", [{}, dict(classes=["person", "dog", "cup"]), dict(min_side=500), dict(like=["x", *BASE_48])], ids=str)
def test_repeat_fractions_are_bit_equal_to_the_plain_loop(coco_mini, kwargs):
    kwargs = dict(kwargs, classes=BASE_48) if "like" in kwargs else kwargs
    data = CocoDataset(*find_coco(coco_mini, "train"), True, **kwargs)
    held = [set(labels.tolist()) for *_, labels in data.items]
    count = Counter(label for labels in held for label in labels)
    for threshold in (0.001, 0.1, 0.3, 1.0):
        factor = {label: max(1.0, math.sqrt(threshold * len(held) / n)) for label, n in count.items()}
        plain = [max([factor[label] for label in labels], default=1.0) for labels in held]
        assert repeat_fractions(data, threshold).tolist() == plain and repeat_fractions(data, threshold).dtype == torch.float64
        assert repeat_factors(data, threshold) == [math.ceil(f) for f in plain]
    assert max(plain) > 2


def test_objects365_is_read_as_it_lies_on_the_disk(tmp_path):
    """patchN/name.jpg; the few images that do not exist and boxes that are listed twice are left out, and told."""
    for k in (1, 2, 3):
        (tmp_path / f"patch{k % 2}").mkdir(exist_ok=True)
        photo(tmp_path / f"patch{k % 2}/{k}.jpg", 64, 48)
    boxes = [(1, 3, [1.5, 2, 30, 20]), (4, 3, [1, 2, 30, 20]), (2, 3, [1, 2, 30, 20]), (1, 3, [1.5, 2, 30, 20]), (1, 7, [1.5, 2, 30, 20]),
             (2, 3, [1, 2, 30, 20]), (2, 3, [1, 2, 30, 21]), (1, 3, [1.5, 2, 30, 20])]
    raw = dict(images=[dict(id=k, file_name=f"images/v2/patch{k % 2}/{k}.jpg", width=64, height=48) for k in (3, 1, 2, 4)],
               categories=[dict(id=3, name="a"), dict(id=7, name="b")],
               annotations=[dict(id=n, image_id=i, category_id=c, bbox=b) for n, (i, c, b) in enumerate(boxes)])
    records = objects365(records_of(raw, "objects.json"), tmp_path)
    assert list(records.names) == ["patch1/3.jpg", "patch1/1.jpg", "patch0/2.jpg"] and records.owner.tolist() == [1, 1, 2, 2]
    assert records.xywh.tolist() == [[1.5, 2, 30, 20], [1.5, 2, 30, 20], [1, 2, 30, 20], [1, 2, 30, 21]] and records.label.tolist() == [0, 1, 0, 0]
    assert records.count == {"images that are not on the disk, left out": 1, "boxes that are listed twice, once left out": 3}
    data = CocoDataset(tmp_path, records, True, image_size="48", flip=0)
    assert [i[0] for i in data.items] == [1, 2] and data[0, 0]["boxes"].tolist() == [[1.5, 2, 31.5, 22]] * 2
    raw["images"] = [dict(i, id=k, file_name=f"images/v2/patch0/{k}.jpg") for k, i in enumerate(raw["images"] * 4)]
    raw["annotations"] = []
    assert "15 of 16 images are missing; Objects365 v2 is at https" in error_of(lambda: objects365(records_of(raw, "objects.json"), tmp_path))


def test_captions_belong_to_their_image(tiny, tmp_path):
    sentences = [dict(image_id=5, caption=" a dog "), dict(image_id=11, caption="b"), dict(image_id=5, caption="c"), dict(image_id=99, caption="d"),
                 dict(image_id=[5], caption="e"), dict(caption="f"), "g", dict(image_id=8, caption=None), dict(image_id=8, caption="  ")]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(dict(annotations=sentences)))
    data = dataset(tiny, captions=path)
    assert read_captions(path, data.records) == data.captions == [["b"], ["a dog", "c"], []]
    assert {data[1, seed]["caption"] for seed in range(20)} == {"a dog", "c"} and data[2, 0]["caption"] == ""
    assert "1 images have no caption" in data.report() and "have no box" not in data.report()
    data.used &= data.label_of[data.records.label] != 0  # no object of the first class
    assert f"1 classes have no box, first {data.classes[0]}" in data.report()
    path.write_text(json.dumps(dict(annotations=[dict(image_id="5", caption="of another split")])))
    assert "has no caption for any of the images" in error_of(lambda: dataset(tiny, captions=path))
    path.write_text("[]")
    assert error_of(lambda: dataset(tiny, captions=path)) == f"{path}: no 'annotations' list; this is not COCO captions json"


def test_a_batch_that_cannot_be_handed_over_sends_its_error_and_is_silent_once_the_queue_is_closed():
    queue = multiprocessing.Queue()
    unsent(queue, RuntimeError("No space left"), (3, None))
    number, error = queue.get(timeout=10)
    assert number == 3
    with pytest.raises(RuntimeError, match="No space left"):
        error.reraise()
    queue.close()
    with pytest.raises(ValueError, match="closed"):
        queue.put(0)
    unsent(queue, RuntimeError("No space left"), (4, None))


def test_a_numpy_picture_is_told_what_to_become():
    from common.datasets import as_pixels
    with pytest.raises(UserError, match="is a numpy array, BGR or RGB; give torch.from_numpy"):
        as_pixels(np.zeros((4, 4, 3), np.uint8))
