# SPDX-License-Identifier: MIT
"""COCO, LVIS, VOC and localisation metrics. This file needs no other file of `common`."""
import contextlib
import io
import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

COCO_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl",
              "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
LVIS_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


class Found(NamedTuple):
    """What was found in an image, as arrays: 44 bytes a box, where a COCO result dict takes 600."""
    image_id: object
    boxes: np.ndarray   # (N, 4) xywh, fp64 as COCO's tools have it
    scores: np.ndarray  # (N,)
    labels: np.ndarray  # (N,)
    category_ids: list  # of each label; None: a class that the validation file lacks, which cannot be scored
    masks: list         # N compressed RLE, or None


class Detections:
    """What was found in many images. Whoever goes through it gets COCO result dicts, made one image at a
    time.

        found = Detections()
        found.add(image_id, boxes, scores, labels, category_ids)   # for each image
        found.images = gather(found.images)                        # of all processes
    """

    def __init__(self, images=()):
        self.images = list(images)

    def add(self, image_id, boxes, scores, labels, category_ids, masks=None):
        """boxes (N, 4) xyxy original pixels, scores (N,), labels (N,); see Found."""
        boxes = boxes.double().cpu().numpy()
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        scores, labels = scores.double().cpu().numpy(), labels.int().cpu().numpy()
        self.images.append(Found(image_id, boxes, scores, labels, category_ids, masks))

    def of(self, image_ids):
        """The Detections of these images."""
        return Detections(f for f in self.images if f.image_id in image_ids)

    def __len__(self):
        return sum(len(f.scores) for f in self.images)

    def __iter__(self):
        for image_id, boxes, scores, labels, category_ids, masks in self.images:
            for k, (box, score, label) in enumerate(zip(boxes.tolist(), scores.tolist(), labels.tolist())):
                if category_ids[label] is not None:
                    result = dict(image_id=image_id, category_id=category_ids[label], bbox=box, score=score)
                    yield result | dict(segmentation=masks[k]) if masks else result


def to_coco_results(image_id, boxes, scores, labels, category_ids):
    """One image's detections (N, 4) xyxy original pixels, (N,), (N,) -> list of COCO result dicts
    (xywh). category_ids: see Found."""
    found = Detections()
    found.add(image_id, boxes, scores, labels, category_ids)
    return list(found)


def numbers(entries):
    """{id of the file: 1, 2, ...}, in the order of the ids: numbers, then text."""
    ids = sorted((e["id"] for e in entries), key=lambda i: (isinstance(i, str), i))
    return {i: n for n, i in enumerate(ids, 1)}


def renumber(content, results):
    """Ground truth in COCO's format and results with ids counted anew from 1: whatever the file's
    are (0, text, repeated in each image), nothing of them reaches pycocotools or lvis, which take
    an annotation id 0 for "not found"."""
    image, category = numbers(content["images"]), numbers(content["categories"])
    images, annotations = [], []
    for i in content["images"]:
        lists = {key: [category[c] for c in i[key] if c in category]
                 for key in LVIS_LISTS if key in i}
        images.append({**i, **lists, "id": image[i["id"]]})
    for n, a in enumerate(content["annotations"], 1):
        crowd = a.get("iscrowd", 0)  # "ignore" is how lvis, which knows no crowd, calls it
        known = dict(iscrowd=crowd, ignore=crowd, area=a["bbox"][2] * a["bbox"][3]) | a
        annotations.append(dict(known, id=n, image_id=image[a["image_id"]],
                                category_id=category[a["category_id"]]))
    categories = [dict(c, id=category[c["id"]]) for c in content["categories"]]
    results = [dict(r, image_id=image[r["image_id"]], category_id=category[r["category_id"]])
               for r in results if r["category_id"] in category]
    return dict(images=images, annotations=annotations, categories=categories), results


def content_of(annotations):
    if isinstance(annotations, dict):
        return annotations
    return json.loads(Path(annotations).read_text(encoding="utf-8-sig"))


def percent(value):
    """-1 where the package could not compute it."""
    return float(value) * 100 if value >= 0 else -1.0


def mean_of(values):
    """Mean in percent of those that are defined; -1 where none is."""
    return float(values[values > -1].mean()) * 100 if (values > -1).any() else -1.0


# ------------------------------------------------------------------ COCO

def coco_evaluate(annotations, results, kind="bbox"):
    """The twelve COCO numbers in percent, and per class AP, AP50 (also by area) and AR50.

    annotations: path or dict in COCO format; results: Detections, or a list of result dicts (may be
    empty, AP is 0 then); kind: "bbox" or "segm". Returns dict: COCO_STATS names -> float (-1 where the ground
    truth has no such object), "classes" -> {name: {"AP", "AP50", "AP50s", "AP50m", "AP50l",
    "AR50"}}. The order of images does not matter; equal scores within an image rank in list order,
    as in the COCO API. `results` is left unchanged.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks a lot
        truth = COCO()
        truth.dataset, results = renumber(content_of(annotations), results)
        truth.createIndex()
        if results:
            if kind != "bbox":  # without boxes it takes the areas of masks, as it should for them
                results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
            found = truth.loadRes(results)
        else:
            found = COCO()
            found.dataset = dict(truth.dataset, annotations=[])
            found.createIndex()
        ev = COCOeval(truth, found, kind)
        ev.evaluate()
        ev.accumulate()
        ev.summarize()
    stats = {name: percent(v) for name, v in zip(COCO_STATS, ev.stats)}
    # (10 IoUs, 101 recalls, K, areas: all, small, medium, large) and (10, K, areas), both at 100
    # detections
    precision, recall = ev.eval["precision"][..., -1], ev.eval["recall"][..., -1]
    stats["classes"] = {}
    for k, c in enumerate(ev.params.catIds):
        row = dict(AP=mean_of(precision[:, :, k, 0]), AR50=mean_of(recall[0, k, 0]))
        for area, name in enumerate(("AP50", "AP50s", "AP50m", "AP50l")):
            row[name] = mean_of(precision[0, :, k, area])
        stats["classes"][truth.cats[c]["name"]] = row
    return stats


def class_agnostic_recall(annotations, results, most, ious):
    """{(iou, n): percent of the boxes of `annotations` (a COCO dict) found by an image's best n
    results, each used once}; classes are ignored."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not results:
        return {(iou, n): 0.0 for iou in ious for n in most}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        # pycocotools drops results of classes that the truth has not, here too: all get a known one
        known = annotations["categories"][0]["id"]
        results = [dict(r, category_id=known) for r in results]
        truth.dataset, results = renumber(annotations, results)
        truth.createIndex()
        ev = COCOeval(truth, truth.loadRes(results), "bbox")
        ev.params.useCats, ev.params.maxDets, ev.params.iouThrs = 0, list(most), np.array(ious)
        ev.evaluate()
        ev.accumulate()
    recall = ev.eval["recall"]
    return {(iou, n): percent(recall[i, 0, 0, k])
            for i, iou in enumerate(ious) for k, n in enumerate(most)}


def class_mean(stats, names, key):
    """Mean of a per-class number over those of `names` that the ground truth holds: how base, novel
    and all are defined."""
    values = [stats["classes"][n][key] for n in names if n in stats["classes"]]
    values = [v for v in values if v >= 0]
    return sum(values) / len(values) if values else -1.0


def judged(truth, results):
    """LVIS-format files say for each image which classes were looked for: detections of others are neither
    right nor wrong, and left out. (not_exhaustive_category_ids are not read.)"""
    looked = {i["id"]: set(i["neg_category_ids"]) for i in truth["images"] if "neg_category_ids" in i}
    if not looked:
        return results
    for a in truth["annotations"]:
        if a["image_id"] in looked:
            looked[a["image_id"]].add(a["category_id"])
    return [r for r in results if r["category_id"] in looked.get(r["image_id"], (r["category_id"],))]


def class_table(stats, columns=3):
    """Per-class AP as text, `columns` classes a line; a dash where the truth has no object."""
    cells = []
    for name, v in stats["classes"].items():
        pair = f"{v['AP']:5.1f} {v['AP50']:5.1f}" if v["AP"] >= 0 else "    -     -"
        cells.append(f"{name[:22]:22s} {pair}")
    head = " | ".join([f"{'class':22s}    AP  AP50"] * min(columns, len(cells)))
    rows = [" | ".join(cells[i:i + columns]) for i in range(0, len(cells), columns)]
    return "\n".join([head, *rows])


# ------------------------------------------------------------------ LVIS

def import_lvis():
    """The lvis package, whose evaluation says np.float, a name that numpy has dropped: its own np,
    not numpy, gets the name back."""
    try:
        import lvis
        import lvis.eval
    except ImportError as e:  # it draws with OpenCV, which needs libraries of the system
        raise RuntimeError(f"the lvis package cannot be imported ({e}); OpenCV's system libraries "
                           "are missing? apt install libgl1 libglib2.0-0") from None

    class Numpy:
        float = float
        __getattr__ = staticmethod(lambda name: getattr(np, name))

    lvis.eval.np = Numpy()
    return lvis


def lvis_evaluate(annotations, results, kind="bbox", category_ids=None):
    """LVIS v1's numbers in percent: AP, AP50, AP75, APs, APm, APl, APr, APc, APf (300 boxes an
    image; -1 where undefined), and "classes".

    annotations: dict in LVIS's format, or the path of its json; results: Detections, or a list of result
    dicts (may be empty); kind "bbox" or "segm" (compressed RLE). category_ids: these only. Federated: in
    an image, classes that are neither annotated nor in neg_category_ids are not scored.

    The lvis package scores one class at a time, on the images that are judged for it: the same numbers as of
    all at once, for which it would hold an entry for each of 24 million pairs of image and class.
    """
    lvis = import_lvis()
    content = content_of(annotations)
    number = numbers(content["categories"])
    truth, _ = renumber(content, [])
    found = columns(results, numbers(content["images"]), number)
    wanted = sorted(number[c] for c in (number if category_ids is None else category_ids) if c in number)
    with silent():
        whole = lvis_eval(lvis, dict(truth, annotations=[]), [no_result(truth, kind)], kind)
        whole.params.cat_ids, whole.freq_groups = wanted, None
        whole.freq_groups = whole._prepare_freq_group()
        p = whole.params
        ious, recalls, areas = len(p.iou_thrs), len(p.rec_thrs), len(p.area_rng)
        precision = np.full((ious, recalls, len(wanted), areas), -1.0)
        recall = np.full((ious, len(wanted), areas), -1.0)
        by_class = judged_classes(truth)
        for k, c in enumerate(tqdm(wanted, "metric", leave=False, mininterval=1, disable=len(wanted) < 100)):
            images, boxes = by_class[c]
            if boxes:
                mine = dict(images=images, annotations=boxes, categories=[truth["categories"][c - 1]])
                ev = lvis_eval(lvis, mine, found.of_class(c, images, kind) or [no_result(mine, kind)], kind)
                ev.evaluate()
                ev.accumulate()
                precision[:, :, k], recall[:, k] = ev.eval["precision"][:, :, 0], ev.eval["recall"][:, 0]
        whole.eval = dict(precision=precision, recall=recall)
        whole.summarize()
    stats = {k: percent(v) for k, v in whole.get_results().items()}
    stats["classes"] = {whole.lvis_gt.cats[c]["name"]: dict(AP=mean_of(precision[:, :, k, 0]),
                                                            AP50=mean_of(precision[0, :, k, 0]))
                        for k, c in enumerate(wanted)}
    return stats


@contextlib.contextmanager
def silent():
    """Without what the lvis package has to say."""
    logging.getLogger("lvis").setLevel(logging.ERROR)
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def lvis_eval(lvis, content, results, kind):
    """The package's evaluation of a dict in LVIS's format and of result dicts."""
    truth = lvis.LVIS.__new__(lvis.LVIS)  # its constructor only reads a file
    truth.logger, truth.dataset = logging.getLogger("lvis.lvis"), content
    truth._create_index()
    return lvis.LVISEval(truth, lvis.LVISResults(truth, results), kind)


def judged_classes(truth):
    """{class: (images that are judged for it, boxes of it)} of a renumbered dict in LVIS's format."""
    by_class = {c["id"]: ({}, []) for c in truth["categories"]}
    image_of = {i["id"]: i for i in truth["images"]}
    for a in truth["annotations"]:
        images, boxes = by_class[a["category_id"]]
        images[a["image_id"]] = image_of[a["image_id"]]
        boxes.append(a)
    for i in truth["images"]:
        for c in i["neg_category_ids"]:
            by_class[c][0][i["id"]] = i
    return {c: ([images[i] for i in sorted(images)], boxes) for c, (images, boxes) in by_class.items()}


class Columns(NamedTuple):
    """Detections as columns, sorted by class: numbers of image and class, score, xywh, RLEs or Nones."""
    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    box: np.ndarray
    masks: list

    def of_class(self, c, images, kind):
        """Result dicts of one class in these images."""
        first, last = np.searchsorted(self.category, [c, c + 1])
        rows = np.arange(first, last)
        rows = rows[np.isin(self.image[rows], [i["id"] for i in images])]
        columns = self.image[rows].tolist(), self.score[rows].tolist(), self.box[rows].tolist()
        results = []
        for row, image, score, box in zip(rows.tolist(), *columns):
            if kind == "bbox":  # without an outline the package would draw one
                what = dict(bbox=box, segmentation=None)
            else:
                what = dict(segmentation=self.masks[row])
            results.append(dict(what, image_id=image, category_id=c, score=score))
        return results


def columns(results, image, category, most=300):
    """Columns of Detections or result dicts: each image's best `most` of the classes that the truth has.
    image, category: {id: number}."""
    parts, masks = [], []
    for f in (results if isinstance(results, Detections) else as_detections(results)).images:
        number = np.array([category.get(c, 0) for c in f.category_ids], int)
        label = number[f.labels]
        rows = np.flatnonzero(label)
        if len(rows) > most:
            rows = rows[np.argsort(-f.scores[rows], kind="stable")[:most]]
        parts.append((np.full(len(rows), image[f.image_id]), label[rows], f.scores[rows], f.boxes[rows]))
        masks += [f.masks[k] if f.masks else None for k in rows.tolist()]
    if not parts:
        parts = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros((0, 4)))]
    place, label, score, box = (np.concatenate(column) for column in zip(*parts))
    order = np.argsort(label, kind="stable")
    masks = [masks[k] for k in order.tolist()]
    return Columns(place[order], label[order], score[order], box[order], masks)


def as_detections(results):
    """Detections of result dicts."""
    by_image, found = {}, Detections()
    for r in results:
        by_image.setdefault(r["image_id"], []).append(r)
    for image_id, mine in by_image.items():
        ids = list(dict.fromkeys(r["category_id"] for r in mine))
        label = {c: k for k, c in enumerate(ids)}
        boxes = np.array([r.get("bbox", (0, 0, 0, 0)) for r in mine], float).reshape(-1, 4)
        masks = [r.get("segmentation") for r in mine]
        found.images.append(Found(image_id, boxes, np.array([r["score"] for r in mine], float),
                                  np.array([label[r["category_id"]] for r in mine]), ids,
                                  masks if any(masks) else None))
    return found


def no_result(content, kind):
    """The package asks the first result for its kind, and cannot do without one: a box of score 0
    in a corner finds nothing."""
    image = content["images"][0]
    result = dict(image_id=image["id"], category_id=content["categories"][0]["id"], score=0.0)
    if kind == "bbox":
        return dict(result, bbox=[-2.0, -2.0, 1.0, 1.0])
    empty = np.zeros([image["height"], image["width"]], np.uint8)
    return dict(result, segmentation=encode_mask(empty))


def encode_mask(mask):
    """(h, w) of 0 and 1 -> COCO's compressed RLE with a text in it, as json needs."""
    from pycocotools import mask as rle
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return dict(code, counts=code["counts"].decode())


# ------------------------------------------------------------------ Pascal VOC

def voc_evaluate(truth, results, iou=0.5, legacy=False):
    """Pascal VOC's average precision in percent: {"AP11", "AP" (area), "classes": {name: {both}}};
    classes without truth are left out.

    truth: dict in COCO's format whose annotations have `difficult`; results: list of COCO result
    dicts. Per class, detections go by falling score; each takes the object of its image that it
    overlaps most, if by at least `iou`: right the first time, wrong the second time, ignored if the
    object is difficult. legacy: pixels count as 1 wide, boxes end at xmax - 1 of ours, so that
    widths are x2 - x1 + 1 again: the devkit's own arithmetic.
    """
    objects, by_class, classes = {}, {}, {}
    for a in truth["annotations"]:
        x, y, w, h = a["bbox"]
        here = objects.setdefault(a["category_id"], {}).setdefault(a["image_id"], [])
        here.append((x, y, x + w, y + h, a["difficult"]))
    for r in results:
        by_class.setdefault(r["category_id"], []).append(r)
    for c in truth["categories"]:
        held = {i: np.array(rows, float) for i, rows in objects.get(c["id"], {}).items()}
        total = sum(int((rows[:, 4] == 0).sum()) for rows in held.values())
        if total:
            right = voc_matches(held, by_class.get(c["id"], []), iou, 1.0 if legacy else 0.0)
            classes[c["name"]] = voc_precision(right, total)
    mean = {key: sum(v[key] for v in classes.values()) / len(classes) if classes else -1.0
            for key in ("AP11", "AP")}
    return dict(mean, classes=classes)


def voc_matches(held, results, iou, one):
    """Of one class's results, by falling score, whether each is right; those on difficult objects
    are left out. held: {image id: (M, 5) x1 y1 x2 y2 difficult}. one: width of a pixel."""
    taken, right = set(), []
    for r in sorted(results, key=lambda r: -r["score"]):  # stable: equal scores keep their order
        here = held.get(r["image_id"])
        hit = False
        if here is not None:
            x, y, w, h = r["bbox"]
            low = np.maximum(here[:, :2], (x, y))
            high = np.minimum(here[:, 2:4] - one, (x + w, y + h))
            inter = np.clip(high - low + one, 0, None).prod(1)
            union = (here[:, 2:4] - here[:, :2]).prod(1) + (w + one) * (h + one) - inter
            best = int((inter / union).argmax())
            if inter[best] / union[best] >= iou:
                if here[best, 4]:
                    continue
                hit = (r["image_id"], best) not in taken
                taken.add((r["image_id"], best))
        right.append(hit)
    return right


def voc_precision(right, total):
    """Average precision in percent: at eleven recalls, and as the area under the curve."""
    tp = np.cumsum(right, dtype=float)
    recall = tp / total
    precision = tp / np.arange(1, len(tp) + 1)
    eleven = [precision[recall >= t - 1e-9].max(initial=0) for t in np.linspace(0, 1, 11)]
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    area = (np.diff(recall, prepend=0) * envelope).sum()
    return dict(AP11=100 * float(np.mean(eleven)), AP=100 * float(area))


# ------------------------------------------------------------------ localisation, one class each

def localise(scores, boxes, found_labels, found_boxes, label, gt_boxes, size):
    """The localisation metrics of one image, {name: 0.0 or 1.0}: means over images are the
    published numbers. A box is right above IoU 0.5 with any true box.

    scores (K,): each class's best score in the image, boxes (K, 4) the box that has it;
    found_labels (N,), found_boxes (N, 4): final detections, best first; label: the image's class;
    gt_boxes (M, 4); size (h, w). top5: five classes, each with its best box; top5_boxes: the five
    best detections, which may be of one class. gt_known: the true class's best box. cls: the best
    class, wherever its box. whole, centred: what the whole image and a centred box of 75 % of its
    sides get.
    """
    h, w = size
    gt_boxes = gt_boxes.to(boxes)

    def right(boxes):
        low = torch.maximum(boxes[:, None, :2], gt_boxes[:, :2])
        high = torch.minimum(boxes[:, None, 2:], gt_boxes[:, 2:])
        inter = (high - low).clamp(min=0).prod(-1)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        union = area[:, None] + (gt_boxes[:, 2:] - gt_boxes[:, :2]).prod(-1) - inter
        return (inter > 0.5 * union).any(1)

    top = scores.topk(min(5, len(scores))).indices
    hit = (top == label) & right(boxes[top])
    found = (found_labels[:5] == label) & right(found_boxes[:5])
    fixed = right(boxes.new_tensor([[0, 0, w, h], [w / 8, h / 8, w * 7 / 8, h * 7 / 8]]))
    known = right(boxes[label:label + 1])
    return dict(top1=float(hit[0]), top5=float(hit.any()), gt_known=float(known[0]),
                top1_boxes=float(found[:1].any()), top5_boxes=float(found.any()),
                cls=float(top[0] == label), whole=float(fixed[0]), centred=float(fixed[1]))


def localisation_metrics(hits, found, val, wnids):
    """({metric: percent, line, images, AP50 of each class}, detections above 0.05 for a file).

    hits: what `localise` gave for each image; found: (place of the image in val.info, boxes (n, 5) x, y,
    w, h, score, labels (n,)) of each; val: a Benchmark of imagenet.py; wnids: of the labels.
    """
    metrics = {k: 100 * sum(h[k] for h in hits) / len(hits) for k in hits[0]} | dict(images=len(hits))
    id_of = dict(zip(val.classes, val.category_ids))
    # -1: classes without a validation image are nobody's false positives
    ids = np.array([id_of.get(w, -1) for w in wnids])
    place = np.concatenate([np.full(len(x), i) for i, x, _ in found])
    box = np.concatenate([x for _, x, _ in found])
    label = np.concatenate([k for *_, k in found])
    image = np.array([i["id"] for i in val.info])[place]
    for name, federated in (("AP50", False), ("AP50_federated", True)):
        per_class = sparse_ap(val.truth, (image, ids[label], box[:, 4], box[:, :4]), federated)
        metrics[name] = sum(per_class.values()) / len(per_class)
        metrics[name + "_classes"] = {n: per_class[c] for n, c in id_of.items() if c in per_class}
    shown = " ".join(f"{k} {metrics[k]:.1f}" for k in hits[0])
    metrics["line"] = (f"{len(hits)} images | localisation {shown} | AP50 {metrics['AP50']:.1f} "
                       f"federated {metrics['AP50_federated']:.1f}")
    results = []  # without 10 million boxes of score 1e-4, which are of no use in a text file
    for k in np.flatnonzero(box[:, 4] > 0.05).tolist():
        i, (*xywh, score) = val.info[place[k]], box[k].tolist()
        category = id_of.get(wnids[label[k]])
        results.append(dict(image_id=i["id"], file_name=i["file_name"], category_id=category, bbox=xywh,
                            score=score))
    return metrics, results


def base_and_novel(stats, base, novel):
    """{AP, AP50, base_AP ...} of coco_evaluate's or lvis_evaluate's stats: means over the classes that had
    boxes in training, those that had none, and both; and LVIS's APr, APc, APf."""
    numbers = {}
    for name, group in (("AP", base + novel), ("base_AP", base), ("novel_AP", novel)):
        numbers[name] = class_mean(stats, group, "AP")
        numbers[f"{name}50"] = class_mean(stats, group, "AP50")
    return numbers | {k: stats[k] for k in ("APr", "APc", "APf") if k in stats}


def sparse_ap(truth, results, federated, iou=0.5):
    """{category id: AP in percent at one IoU} for thousands of classes, where COCO's dense tables
    do not fit: detections are grouped by class.

    truth: COCO dict whose images have category_id (the one class that was annotated there);
    results: (image_ids, category_ids, scores, boxes (N, 4) xywh) arrays. federated: a class is
    scored on its own images only; otherwise its detections on all others are false positives. As
    COCO: greedy by score, 101 recall points, classes without boxes are left out.
    """
    of_image = {i["id"]: i["category_id"] for i in truth["images"]}
    gt = {}
    for a in truth["annotations"]:
        if a["category_id"] == of_image[a["image_id"]] and min(a["bbox"][2:]) > 0:
            here = gt.setdefault(a["category_id"], {}).setdefault(a["image_id"], [])
            here.append(a["bbox"])
    images, categories, scores, boxes = (np.asarray(x) for x in results)
    order = np.lexsort((-scores, categories))  # stable
    images, categories = images[order], categories[order]
    boxes = boxes.reshape(-1, 4)[order].astype(float)
    own = np.array([of_image[i] for i in images.tolist()], dtype=np.int64)
    answer = {}
    for c, held in gt.items():
        first, last = np.searchsorted(categories, [c, c + 1])
        rows = np.arange(first, last)
        if federated:
            rows = rows[own[rows] == c]
        right = sparse_matches(held, images[rows], boxes[rows], iou)
        total = sum(len(b) for b in held.values())
        tp = np.cumsum(right)
        precision = tp / np.arange(1, len(tp) + 1)
        precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # 0: not reached
        at = np.searchsorted(tp / total, np.linspace(0, 1, 101), side="left")
        answer[c] = 100 * float(precision[at].mean())
    return answer


def sparse_matches(held, images, boxes, iou):
    """(N,) bool: which detections of one class, best first, find an object that is still free.
    held: {image id: its boxes}. images (N,), boxes (N, 4): of the detections."""
    free = {i: (np.array(b, float), np.ones(len(b), bool)) for i, b in held.items()}
    right = np.zeros(len(images), bool)
    for k in np.flatnonzero([i in free for i in images.tolist()]):
        targets, still_free = free[images[k]]
        x, y, w, h = boxes[k]
        low = np.maximum(targets[:, :2], (x, y))
        side = np.minimum(targets[:, :2] + targets[:, 2:], (x + w, y + h)) - low
        inter = np.clip(side, 0, None).prod(1)
        overlap = inter / (targets[:, 2:].prod(1) + w * h - inter)
        overlap = np.where(still_free, overlap, -1)
        best = int(overlap.argmax())
        if overlap[best] >= iou:
            right[k], still_free[best] = True, False
    return right
