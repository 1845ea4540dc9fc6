# SPDX-License-Identifier: MIT
"""common/evaluation.py against the COCO API's own published output, and small scenes whose AP is known."""
import copy
import json
import random
import re

import numpy as np
import pytest
import torch

from common import evaluation
from common.evaluation import (class_agnostic_recall, class_mean, COCO_STATS, class_table, coco_evaluate, encode_mask, import_lvis, lvis_evaluate,
                               localise, sparse_ap, to_coco_results, voc_evaluate)
from conftest import SHARED


@pytest.fixture(scope="module")
def reference():
    path = SHARED / "data" / "eval_reference" / "coco_val2014_100"
    if not path.exists():
        pytest.skip(f"the COCO API's sample results are not here: {path}")
    return path


def printed_numbers(path, kind):
    """The twelve numbers after "type=kind", in the order of COCO_STATS."""
    section = path.read_text().split(f"type={kind}")[1].split("-----")[0]
    numbers = [float(v) for v in re.findall(r"maxDets= *\d+ \] = (-?[\d.]+)", section)]
    assert len(numbers) == 12
    return numbers


def two(stats):
    return {name: {k: v[k] for k in ("AP", "AP50")} for name, v in stats["classes"].items()}


def scene(boxes, classes=("cat", "dog"), images=3, size=200, **extra):
    """Ground truth dict. boxes: (image, category, xywh)."""
    return dict(images=[dict(id=i, width=size, height=size, file_name=f"{i}.jpg") for i in range(1, images + 1)],
                categories=[dict(id=10 * k + 1, name=name) for k, name in enumerate(classes)],
                annotations=[dict(dict(id=n, image_id=i, category_id=c, bbox=list(b), area=b[2] * b[3], iscrowd=0), **extra)
                             for n, (i, c, b) in enumerate(boxes, 1)])


def found(image, category, box, score):
    return dict(image_id=image, category_id=category, bbox=list(box), score=score)


# ------------------------------------------------------------------ published numbers

@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_twelve_published_numbers_of_the_coco_api(reference, kind):
    results = json.loads((reference / f"instances_val2014_fake{kind}100_results.json").read_text())
    stats = coco_evaluate(reference / "instances_val2014_100.json", results, kind)
    expected = printed_numbers(reference / "val2014_fake_eval_res.txt", kind)
    assert expected[0] == {"bbox": 0.505, "segm": 0.320}[kind]
    assert [round(stats[name] / 100, 3) for name in COCO_STATS] == expected
    present = [v["AP"] for v in stats["classes"].values() if v["AP"] >= 0]
    assert len(stats["classes"]) == 80 and sum(present) / len(present) == pytest.approx(stats["AP"], abs=1e-9)


def test_order_of_the_images_does_not_matter_on_the_published_sample(reference):
    """As if the images came from several processes: their order changes, the order within an image does not (it holds equal scores)."""
    truth = json.loads((reference / "instances_val2014_100.json").read_text())
    results = json.loads((reference / "instances_val2014_fakebbox100_results.json").read_text())
    first = coco_evaluate(truth, copy.deepcopy(results))
    images = sorted({r["image_id"] for r in results})
    random.Random(0).shuffle(images)
    shuffled = sorted(results, key=lambda r: images.index(r["image_id"]))
    assert shuffled != results
    assert coco_evaluate(truth, shuffled) == first


# ------------------------------------------------------------------ small scenes

BOXES = [(1, 1, (10, 10, 50, 50)), (1, 11, (100, 100, 40, 60)), (2, 1, (20, 20, 30, 30))]


def test_perfect_detections_score_100():
    stats = coco_evaluate(scene(BOXES), [found(i, c, b, 0.9) for i, c, b in BOXES])
    assert stats["AP"] == stats["AP50"] == stats["AP75"] == stats["AR100"] == pytest.approx(100)
    assert two(stats) == {"cat": dict(AP=pytest.approx(100), AP50=pytest.approx(100)),
                                "dog": dict(AP=pytest.approx(100), AP50=pytest.approx(100))}


def test_annotations_need_neither_id_nor_area_nor_iscrowd():
    bare = dict(images=[dict(id=1, height=100, width=100)], categories=[dict(id=1, name="a")], annotations=[dict(image_id=1, category_id=1, bbox=[10, 10, 40, 40])])
    stats = coco_evaluate(bare, [dict(image_id=1, category_id=1, bbox=[10, 10, 40, 40], score=0.9)])
    assert stats["AP"] == pytest.approx(100) and "area" not in bare["annotations"][0]


def test_no_results_score_zero():
    stats = coco_evaluate(scene(BOXES), [])
    assert all(stats[k] == 0 for k in ("AP", "AP50", "AP75", "AR1", "AR10", "AR100"))
    assert stats["APl"] == stats["ARl"] == -1  # no large object; the three are small and medium
    assert two(stats) == {"cat": dict(AP=0, AP50=0), "dog": dict(AP=0, AP50=0)}


def test_class_without_ground_truth_is_minus_one_and_a_dash_and_not_in_the_mean():
    truth = scene(BOXES, ("cat", "dog", "unicorn"))
    stats = coco_evaluate(truth, [found(i, c, b, 0.9) for i, c, b in BOXES if c == 1] + [found(3, 21, (5, 5, 50, 50), 0.99)])
    assert set(stats["classes"]["unicorn"].values()) == {-1}
    assert stats["AP"] == pytest.approx(50)  # cat 100, dog 0
    lines = class_table(stats, columns=2).splitlines()
    assert len(lines) == 3 and lines[0].count("class") == 2
    assert re.fullmatch(r"cat +100\.0 100\.0 \| dog +0\.0 +0\.0", lines[1])
    assert re.fullmatch(r"unicorn +- +-", lines[2])
    assert len({line.index("|") for line in lines[:2]}) == 1


def test_class_table_is_narrow_for_few_classes():
    stats = dict(classes={"a very long name of more than 22 letters": dict(AP=12.34, AP50=56.78)})
    assert class_table(stats) == "class                     AP  AP50\na very long name of mo  12.3  56.8"


def test_scene_without_any_object_is_minus_one():
    stats = coco_evaluate(scene([]), [found(1, 1, (5, 5, 50, 50), 0.9)])
    assert stats["AP"] == stats["AP50"] == stats["AR100"] == -1
    assert coco_evaluate(scene([]), [])["AP"] == -1


def test_iou_of_exactly_one_half_counts():
    truth = scene([(1, 1, (0, 0, 100, 100))])
    at = coco_evaluate(truth, [found(1, 1, (0, 0, 100, 50), 0.9)])
    assert at["AP50"] == pytest.approx(100) and at["AP75"] == 0 and at["AP"] == pytest.approx(10)
    assert two(at)["cat"] == dict(AP=pytest.approx(10), AP50=pytest.approx(100))
    assert coco_evaluate(truth, [found(1, 1, (0, 0, 100, 49.9), 0.9)])["AP50"] == 0


def test_ap_of_a_known_precision_recall_curve():
    """Two objects; scores order hit, miss, hit: precision 1 up to recall .5 (51 points), 2/3 beyond (50 points)."""
    truth = scene([(1, 1, (10, 10, 50, 50)), (2, 1, (10, 10, 50, 50))])
    results = [found(1, 1, (10, 10, 50, 50), 0.9), found(1, 1, (120, 120, 50, 50), 0.8), found(2, 1, (10, 10, 50, 50), 0.7)]
    stats = coco_evaluate(truth, results)
    assert stats["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101, abs=1e-6)
    assert stats["AR1"] == pytest.approx(100) and stats["APm"] == stats["AP"]


def test_crowd_region_neither_counts_nor_punishes():
    truth = scene([(1, 1, (10, 10, 50, 50))])
    truth["annotations"].append(dict(id=9, image_id=1, category_id=1, bbox=[100, 100, 90, 90], area=8100, iscrowd=1,
                                     segmentation=dict(size=[200, 200], counts=[0, 40000])))
    stats = coco_evaluate(truth, [found(1, 1, (10, 10, 50, 50), 0.8), found(1, 1, (110, 110, 20, 20), 0.9)])
    assert stats["AP"] == pytest.approx(100)


def test_order_of_results_with_different_scores_does_not_matter():
    truth = scene([(i, c, (10 + 20 * c % 70, 10, 50, 50)) for i in (1, 2, 3) for c in (1, 11)])
    g = random.Random(1)
    results = [found(i, c, (10 + 20 * c % 70 + g.randint(0, 30), 10, 50, 50), round(0.9 - 0.01 * k, 2))
               for k, (i, c) in enumerate(g.choices([(i, c) for i in (1, 2, 3) for c in (1, 11)], k=30))]
    first = coco_evaluate(truth, copy.deepcopy(results))
    assert 5 < first["AP"] < 95
    for seed in range(3):
        random.Random(seed).shuffle(results)
        assert coco_evaluate(truth, copy.deepcopy(results)) == first


def test_equal_scores_of_one_image_rank_in_list_order_as_in_the_coco_api():
    """The published sample has such ties; breaking them by another rule would miss its numbers."""
    truth = scene([(1, 1, (10, 10, 50, 50))])
    hit, miss = found(1, 1, (10, 10, 50, 50), 0.5), found(1, 1, (120, 120, 50, 50), 0.5)
    assert coco_evaluate(truth, [dict(hit), dict(miss)])["AP"] == pytest.approx(100)
    assert coco_evaluate(truth, [dict(miss), dict(hit)])["AP"] == pytest.approx(50)


def test_order_of_images_with_equal_scores_does_not_matter():
    truth = scene([(1, 1, (10, 10, 50, 50)), (2, 1, (10, 10, 50, 50)), (3, 1, (10, 10, 50, 50))])
    results = [found(1, 1, (10, 10, 50, 50), 0.5), found(2, 1, (120, 120, 50, 50), 0.5), found(3, 1, (10, 10, 50, 50), 0.5)]
    forward = coco_evaluate(truth, copy.deepcopy(results))
    assert 0 < forward["AP"] < 100
    assert coco_evaluate(truth, [copy.deepcopy(results[k]) for k in (1, 2, 0)]) == forward


def test_evaluating_twice_gives_the_same_from_a_path_or_a_dict(tmp_path):
    truth, results = scene(BOXES), [found(i, c, (b[0] + 4, *b[1:]), 0.9) for i, c, b in BOXES]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    first = coco_evaluate(tmp_path / "truth.json", results)
    assert coco_evaluate(truth, results) == coco_evaluate(truth, results) == coco_evaluate(str(tmp_path / "truth.json"), results) == first
    assert 0 < first["AP"] < 100


def test_evaluation_prints_nothing(capsys):
    coco_evaluate(scene(BOXES), [found(1, 1, (10, 10, 50, 50), 0.9)])
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------ result records

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_xywh_with_the_dataset_category_ids_and_plain_values(dtype):
    boxes = torch.tensor([[10.0, 20, 40, 60], [1, 2, 3.5, 4]], dtype=dtype)
    records = to_coco_results(42, boxes, torch.tensor([0.75, 0.25]), torch.tensor([2, 0]), [1, 13, 90])
    assert records == [dict(image_id=42, category_id=90, bbox=[10, 20, 30, 40], score=0.75),
                       dict(image_id=42, category_id=1, bbox=[1, 2, 2.5, 2], score=0.25)]
    assert json.loads(json.dumps(records)) == records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_making_results_leaves_the_boxes_alone(dtype):
    boxes = torch.tensor([[10.0, 20, 40, 60]], dtype=dtype)
    to_coco_results(1, boxes, torch.tensor([0.5]), torch.tensor([0]), [1])
    assert boxes.tolist() == [[10, 20, 40, 60]]


def test_results_of_an_image_without_detections_are_empty():
    assert to_coco_results(1, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), [1]) == []


def test_class_means_are_over_classes_and_by_area_at_iou_one_half():
    truth = scene([])
    first, second = (image["id"] for image in truth["images"][:2])
    boxes = [(first, 1, [10, 10, 20, 20]), (first, 1, [60, 60, 50, 50]), (second, 11, [60, 60, 50, 50])]  # small, medium, medium
    truth["annotations"] = [dict(id=n, image_id=i, category_id=c, bbox=b, area=b[2] * b[3], iscrowd=0) for n, (i, c, b) in enumerate(boxes, 1)]
    found = [dict(image_id=first, category_id=1, bbox=[60, 60, 50, 50], score=0.9)]
    stats = coco_evaluate(truth, found)
    cat, dog = stats["classes"]["cat"], stats["classes"]["dog"]
    assert (cat["AR50"], cat["AP50s"], cat["AP50m"], cat["AP50l"]) == (pytest.approx(50), 0, pytest.approx(100), -1)
    assert dog["AR50"] == 0 and class_mean(stats, ["cat", "dog"], "AR50") == pytest.approx(25)
    assert class_mean(stats, ["cat", "dog"], "AP50l") == class_mean(stats, ["bird"], "AP50") == -1


def test_class_agnostic_recall_by_hand():
    box = lambda i, image, category, x: dict(id=i, image_id=image, category_id=category, bbox=[x, 0, 10, 10], area=100, iscrowd=0)
    truth = dict(images=[dict(id=1), dict(id=2)], categories=[dict(id=5, name="a"), dict(id=7, name="b")],
                 annotations=[box(1, 1, 5, 0), box(2, 1, 7, 50), box(3, 2, 7, 0), box(4, 2, 7, 90)])
    found = lambda image, x, score: dict(image_id=image, category_id=99, bbox=[x, 0, 10, 10], score=score)
    results = [found(1, 200, 0.9), found(1, 2.5, 0.8), found(1, 50, 0.7), found(2, 0, 0.5), found(2, 0, 0.4)]
    # IoU of the box shifted by 2.5 is 7.5 / 12.5 = 0.6. Two equal proposals find one box only, and nobody finds the last.
    assert class_agnostic_recall(truth, results, (1, 2, 100), (0.5, 0.75)) == pytest.approx(
        {(0.5, 1): 25.0, (0.5, 2): 50.0, (0.5, 100): 75.0, (0.75, 1): 25.0, (0.75, 2): 25.0, (0.75, 100): 50.0})
    assert class_agnostic_recall(truth, [], (100,), (0.5,)) == {(0.5, 100): 0.0}


# ------------------------------------------------------------------ LVIS

@pytest.fixture(scope="module")
def lvis_mini():
    path = SHARED / "data" / "lvis_mini" / "annotations"
    if not path.exists():
        pytest.skip(f"LVIS samples are not here: {path}")
    return path


def truth_as_results(path):
    return [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], segmentation=a["segmentation"], score=1.0)
            for a in json.loads(path.read_text())["annotations"]]


def test_lvis_truth_scores_100_and_numpy_is_left_alone(lvis_mini):

    path = lvis_mini / "lvis_v1_style_val_9.json"
    stats = lvis_evaluate(path, truth_as_results(path))
    assert stats["AP"] == pytest.approx(100) and stats["APr"] == -1 and stats["APc"] == pytest.approx(100) and stats["APf"] == pytest.approx(100)
    assert len(stats["classes"]) == 1203 and not hasattr(np, "float") and import_lvis().eval.np.mean is np.mean
    assert lvis_evaluate(path, [])["AP"] == pytest.approx(0) and lvis_evaluate(path, [], "segm")["AP"] == pytest.approx(0)


def test_lvis_ignores_classes_that_an_image_was_not_searched_for(lvis_mini):
    path = lvis_mini / "lvis_v1_style_val_9.json"
    raw, results = json.loads(path.read_text()), truth_as_results(path)
    image = raw["images"][0]
    known = {a["category_id"] for a in raw["annotations"] if a["image_id"] == image["id"]} | set(image["neg_category_ids"]) | set(image["not_exhaustive_category_ids"])
    used = {a["category_id"] for a in raw["annotations"]}
    unknown, wrong = sorted(used - known), sorted(used & set(image["neg_category_ids"]))
    false = lambda c: results + [dict(image_id=image["id"], category_id=c, bbox=[1.0, 1, 9, 9], segmentation=None, score=1.0)] * 3
    assert lvis_evaluate(path, false(unknown[0]))["AP"] == pytest.approx(100)
    if wrong:
        assert lvis_evaluate(path, false(wrong[0]))["AP"] < 99.9


def test_lvis_masks(lvis_mini):

    path = lvis_mini / "lvis_v1_style_val_9.json"
    raw = json.loads(path.read_text())
    sizes = {i["id"]: (i["height"], i["width"]) for i in raw["images"]}
    from pycocotools import mask as rle
    results = []
    for a in raw["annotations"]:
        m = rle.decode(rle.merge(rle.frPyObjects(a["segmentation"], *sizes[a["image_id"]])))
        results.append(dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], segmentation=encode_mask(m), score=1.0))
    assert lvis_evaluate(path, results, "segm")["AP"] == pytest.approx(100)
    assert isinstance(json.dumps(results[0]), str)
    for r in results:
        r["segmentation"] = encode_mask(np.zeros(r["segmentation"]["size"], np.uint8))
    assert lvis_evaluate(path, results, "segm")["AP"] < 1


# ------------------------------------------------------------------ Pascal VOC

def voc(boxes, **kwargs):
    """boxes: (image, class, xywh, difficult)."""
    return dict(categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
                annotations=[dict(image_id=i, category_id=c, bbox=list(b), difficult=d) for i, c, b, d in boxes])


def test_voc_by_hand():
    truth = voc([(1, 1, (0, 0, 10, 10), 0), (2, 1, (0, 0, 10, 10), 0), (2, 1, (50, 50, 10, 10), 1)])
    right, second, hard, miss = found(1, 1, (0, 0, 10, 10), 0.9), found(1, 1, (0, 0, 10, 10), 0.8), found(2, 1, (50, 50, 10, 10), 0.7), found(2, 1, (0, 0, 10, 4), 0.6)
    stats = voc_evaluate(truth, [miss, right, second, hard])
    # right; twice the same object: wrong; difficult: not counted; too small: wrong. Recall 1/2 at precision 1
    assert stats["classes"] == {"cat": dict(AP11=pytest.approx(100 * 6 / 11), AP=pytest.approx(50))}
    both = voc_evaluate(truth, [right, second, found(2, 1, (0, 0, 10, 10), 0.5)])
    assert both["AP"] == pytest.approx(100 * (0.5 + 0.5 * 2 / 3)) and both["AP11"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    assert voc_evaluate(truth, [])["AP"] == 0 and voc_evaluate(voc([]), [])["AP"] == -1


def test_voc_counts_pixels_as_the_devkit_does():
    truth = voc([(1, 1, (0, 0, 10, 10), 0)])
    half = [found(1, 1, (0, 0, 9, 4.2), 0.9)]  # devkit: 10 x 5.2 of 100 pixels; continuous: 9 x 4.2
    assert voc_evaluate(truth, half, legacy=True)["AP"] == pytest.approx(100) and voc_evaluate(truth, half)["AP"] == 0
    assert voc_evaluate(truth, [found(1, 1, (0, 0, 9, 9), 0.9)], iou=0.999, legacy=True)["AP"] == pytest.approx(100)


def brute_voc(truth, results, c, iou):
    """Average precision from its definition: at every rank, count from scratch."""
    objects = [(a["image_id"], a["bbox"], a["difficult"]) for a in truth["annotations"] if a["category_id"] == c]
    mine = sorted([r for r in results if r["category_id"] == c], key=lambda r: -r["score"])
    curve = []
    for n in range(1, len(mine) + 1):
        used, tp, fp = set(), 0, 0
        for r in mine[:n]:
            best, k = 0, None
            for j, (image, (x, y, w, h), _) in enumerate(objects):
                if image == r["image_id"]:
                    u, v, s, t = r["bbox"]
                    inter = max(0, min(x + w, u + s) - max(x, u)) * max(0, min(y + h, v + t) - max(y, v))
                    o = inter / (w * h + s * t - inter)
                    if o > best:
                        best, k = o, j
            if best >= iou and objects[k][2]:
                continue
            if best >= iou and k not in used:
                used.add(k)
                tp += 1
            else:
                fp += 1
        curve.append((tp, fp))
    total = sum(not d for *_, d in objects)
    recall, precision = [tp / total for tp, _ in curve], [tp / max(tp + fp, 1) for tp, fp in curve]
    eleven = sum(max([p for r, p in zip(recall, precision) if r >= t / 10 - 1e-12], default=0) for t in range(11)) / 11
    levels = sorted({0.0, *recall})
    area = sum((b - a) * max([p for r, p in zip(recall, precision) if r >= b - 1e-12], default=0) for a, b in zip(levels, levels[1:]))
    return 100 * eleven, 100 * area


@pytest.mark.parametrize("seed", range(5))
def test_voc_equals_brute_force(seed):
    rng = random.Random(seed)
    box = lambda: (rng.randint(0, 40), rng.randint(0, 40), rng.randint(5, 40), rng.randint(5, 40))
    truth = voc([(rng.randint(1, 4), rng.randint(1, 2), box(), int(rng.random() < 0.2)) for _ in range(25)])
    results = []
    for a in truth["annotations"] * 2:
        x, y, w, h = a["bbox"]
        results.append(found(a["image_id"], rng.choice([a["category_id"], 1, 2]), (x + rng.randint(-4, 4), y + rng.randint(-4, 4), w, h), rng.random()))
    stats = voc_evaluate(truth, results)
    for c, name in ((1, "cat"), (2, "dog")):
        eleven, area = brute_voc(truth, results, c, 0.5)
        assert stats["classes"][name]["AP11"] == pytest.approx(eleven, abs=1e-6) and stats["classes"][name]["AP"] == pytest.approx(area, abs=1e-6)


# ------------------------------------------------------------------ localisation

def at(label, scores, box, k=10):
    """(scores (k,), boxes (k, 4)) where class `label` has `box` and all others a box in a corner."""
    boxes = torch.tensor([[90.0, 90, 99, 99]]).repeat(k, 1)
    boxes[label] = torch.tensor(box, dtype=torch.float32)
    return torch.tensor(scores, dtype=torch.float32), boxes


def test_localisation_by_hand():
    """(a) class and box right, (b) box right but the class third, (c) class right, IoU 0.4: top-1 1/3, top-5 2/3, GT-known 2/3."""
    gt, nothing = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), (torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    good, poor = [50, 50, 60, 60], [0, 0, 10, 4]
    rows = [localise(*at(2, scores, box), *nothing, 2, gt, (100, 100)) for scores, box in (
        ([0.1, 0.2, 0.9, 0, 0, 0, 0, 0, 0, 0], good), ([0.9, 0.8, 0.7, 0, 0, 0, 0, 0, 0, 0], good), ([0.1, 0.2, 0.9, 0, 0, 0, 0, 0, 0, 0], poor))]
    mean = {k: 100 * sum(r[k] for r in rows) / 3 for k in rows[0]}
    assert mean["top1"] == pytest.approx(33.33, abs=0.01) and mean["top5"] == pytest.approx(66.67, abs=0.01) and mean["gt_known"] == pytest.approx(66.67, abs=0.01)
    assert mean["cls"] == pytest.approx(66.67, abs=0.01) and mean["whole"] == mean["centred"] == mean["top5_boxes"] == 0


def test_localisation_counts_more_than_half_only_and_any_true_box():
    nothing = (torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    gt = torch.tensor([[0.0, 0, 10, 10]])
    hit = lambda box: localise(*at(0, [1.0] * 10, box), *nothing, 0, gt, (10, 10))["gt_known"]
    assert hit([0, 0, 10, 5]) == 0 and hit([0, 0, 10, 5.1]) == 1 and hit([3, 0, 13, 10]) == 1  # IoU 0.5, 0.51, 7/13
    full = localise(*at(0, [1.0] * 10, [0, 0, 10, 10]), *nothing, 0, gt, (10, 10))
    assert full["whole"] == 1 and full["centred"] == 1  # a box of 75 % of the sides has 56 % of the area


def test_localisation_by_five_best_boxes_may_be_one_class():
    labels, boxes = torch.tensor([3, 3, 3, 3, 3, 1]), torch.tensor([[0.0, 0, 10, 10]]).repeat(6, 1)
    row = localise(torch.tensor([0, 0.5, 0, 0.9]), torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1), labels, boxes, 1, torch.tensor([[0.0, 0, 10, 10]]), (10, 10))
    assert row["top1"] == 0 and row["top5"] == 1 and row["top5_boxes"] == 0


def loc_set(seed, images=30, classes=6, most=4):
    """A localisation set and random detections, many of them near a true box."""
    rng, truth = random.Random(seed), dict(images=[], annotations=[], categories=[dict(id=k + 1, name=f"n{k}") for k in range(classes)])
    results = []
    box = lambda: [rng.uniform(0, 60), rng.uniform(0, 60), rng.uniform(5, 40), rng.uniform(5, 40)]
    for i in range(1, images + 1):
        truth["images"].append(dict(id=i, width=100, height=100, file_name=f"{i}.jpg", category_id=rng.randint(1, classes)))
        for _ in range(rng.randint(1, most)):
            b = box()
            truth["annotations"].append(dict(id=len(truth["annotations"]) + 1, image_id=i, category_id=truth["images"][-1]["category_id"], bbox=b, area=b[2] * b[3], iscrowd=0))
            for _ in range(rng.randint(0, 3)):
                near = [v + rng.uniform(-3, 3) for v in b]
                results.append(dict(image_id=i, category_id=rng.choice([truth["images"][-1]["category_id"], rng.randint(1, classes)]), bbox=near, score=rng.random()))
        results += [dict(image_id=i, category_id=rng.randint(1, classes), bbox=box(), score=rng.random()) for _ in range(3)]
    arrays = [r["image_id"] for r in results], [r["category_id"] for r in results], [r["score"] for r in results], [r["bbox"] for r in results]
    return truth, results, arrays


@pytest.mark.parametrize("seed", range(4))
def test_sparse_ap_equals_coco(seed):
    truth, results, arrays = loc_set(seed)
    ours, theirs = sparse_ap(truth, arrays, federated=False), coco_evaluate(truth, results)["classes"]
    for c in truth["categories"]:
        assert ours.get(c["id"], -1) == pytest.approx(theirs[c["name"]]["AP50"], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_federated_sparse_ap_equals_coco_on_a_class_s_own_images(seed):
    truth, results, arrays = loc_set(seed)
    ours = sparse_ap(truth, arrays, federated=True)
    for c in truth["categories"]:
        own = {i["id"] for i in truth["images"] if i["category_id"] == c["id"]}
        part = dict(truth, images=[i for i in truth["images"] if i["id"] in own], annotations=[a for a in truth["annotations"] if a["image_id"] in own])
        theirs = coco_evaluate(part, [r for r in results if r["image_id"] in own])["classes"][c["name"]]["AP50"]
        assert ours.get(c["id"], -1) == pytest.approx(theirs, abs=1e-9)


def test_sparse_ap_by_hand():
    """Two objects; true .9, false .8, true .7: (51 + 50 * 2/3) / 101."""
    truth = dict(images=[dict(id=1, category_id=5)], categories=[dict(id=5, name="a"), dict(id=6, name="b")],
                 annotations=[dict(image_id=1, category_id=5, bbox=[0, 0, 10, 10]), dict(image_id=1, category_id=5, bbox=[50, 0, 10, 10])])
    arrays = [1] * 3, [5] * 3, [0.9, 0.8, 0.7], [[0, 0, 10, 10], [20, 20, 10, 10], [50, 0, 10, 10]]
    assert sparse_ap(truth, arrays, False) == {5: pytest.approx(83.498, abs=1e-3)}
    truth["annotations"].append(dict(image_id=1, category_id=5, bbox=[5, 5, 0, 10]))  # nobody can find an empty box
    assert sparse_ap(truth, arrays, False) == {5: pytest.approx(83.498, abs=1e-3)}
    assert sparse_ap(truth, ([], [], [], []), True) == {5: 0.0}


# ------------------------------------------------------------------ detections as arrays, LVIS one class at a time

def all_at_once(content, results, kind, category_ids=None):
    """What the lvis package says of everything together."""
    lvis = import_lvis()
    content, results = evaluation.renumber(copy.deepcopy(content), copy.deepcopy(results))
    with evaluation.silent():
        ev = evaluation.lvis_eval(lvis, content, results, kind)
        if category_ids is not None:
            ev.params.cat_ids = sorted(category_ids)
        ev.run()
    return {k: v * 100 if v >= 0 else -1 for k, v in ev.get_results().items()}, ev.eval["precision"]


def lvis_world(images=40, classes=25, seed=0):
    """Made-up LVIS ground truth (ids as lvis counts them: 1, 2, ...) and result dicts with ties, wrong classes, more than 300 an image."""
    r = np.random.default_rng(seed)
    categories = [dict(id=c, name=f"c{c}", frequency="rcf"[c % 3], synset="x") for c in range(1, classes + 1)]
    world = dict(images=[], annotations=[], categories=categories)
    results = []
    for i in range(1, images + 1):
        held = r.choice(classes - 3, 4, replace=False) + 1  # three classes have no box
        others = [int(c) for c in r.choice(np.setdiff1d(np.arange(1, classes + 1), held), 5, replace=False)]
        world["images"].append(dict(id=i, width=100, height=80, neg_category_ids=others[:3], not_exhaustive_category_ids=[int(held[0]), others[4]]))
        for n in range(int(r.integers(0, 9))):
            box = [*r.uniform(0, 50, 2), *r.uniform(4, 40, 2)]
            c = int(r.choice(held))
            world["annotations"].append(dict(id=len(world["annotations"]) + 1, image_id=i, category_id=c, bbox=[float(v) for v in box], area=float(box[2] * box[3]), segmentation=[]))
            for _ in range(int(r.integers(0, 4))):
                near = [float(v) for v in np.array(box) + r.normal(0, 2, 4)]
                results.append(dict(image_id=i, category_id=c, bbox=[near[0], near[1], abs(near[2]), abs(near[3])], score=float(r.integers(0, 20)) / 20))
        for _ in range(360 if i % 9 == 0 else 30):
            results.append(dict(image_id=i, category_id=int(r.integers(1, classes + 1)), bbox=[float(v) for v in r.uniform(1, 40, 4)], score=float(r.integers(0, 20)) / 20))
    return world, results


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_lvis_one_class_at_a_time_is_the_package_all_at_once(seed, kind):
    world, results = lvis_world(seed=seed)
    if kind == "segm":
        def outline(b):
            mask = np.zeros((80, 100), np.uint8)
            mask[int(b[1]):int(b[1] + b[3]) + 1, int(b[0]):int(b[0] + b[2]) + 1] = 1
            return encode_mask(mask)
        for a in world["annotations"]:
            a["segmentation"] = outline(a["bbox"])
        results = [dict(image_id=r["image_id"], category_id=r["category_id"], score=r["score"], segmentation=outline(r["bbox"])) for r in results]
    for ids in (None, [1, 2, 5, 9, 25]):
        want, precision = all_at_once(world, results, kind, ids)
        got = lvis_evaluate(world, results, kind, ids)
        assert all(got[k] == pytest.approx(v, abs=1e-12) for k, v in want.items()) and 0 < got["AP"] < 100
        for k, c in enumerate(ids or range(1, 26)):
            seen = precision[:, :, k, 0]
            assert got["classes"][f"c{c}"]["AP"] == pytest.approx(seen[seen > -1].mean() * 100 if (seen > -1).any() else -1, abs=1e-12)


def test_detections_are_result_dicts_when_one_goes_through_them():
    found, masks = evaluation.Detections(), [dict(size=[2, 2], counts="a"), dict(size=[2, 2], counts="b")]
    assert not found and list(found) == []
    found.add("i1", torch.tensor([[1.0, 2, 4, 8], [0, 0, 3, 3]]), torch.tensor([0.5, 0.25]), torch.tensor([1, 0]), [None, 7], masks)
    found.add(2, torch.tensor([[1.0, 2, 4, 8]]), torch.tensor([0.1]), torch.tensor([0]), [9])
    assert list(found) == [dict(image_id="i1", category_id=7, bbox=[1, 2, 3, 6], score=0.5, segmentation=masks[0]),
                           dict(image_id=2, category_id=9, bbox=[1, 2, 3, 6], score=float(torch.tensor(0.1)))]
    assert len(found) == 3 and [r["image_id"] for r in found.of({2})] == [2]
