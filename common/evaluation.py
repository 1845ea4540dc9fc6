"""COCO, LVIS, VOC and localisation metrics, gathered over processes. This file needs no other file of `common`."""
import contextlib
import io
import json
import logging
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

COCO_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def gather(items):
    """The lists of all processes, concatenated, on rank 0; None on the others. Every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(items, parts)
    return sum(parts, []) if parts else None


def to_coco_results(image_id, boxes, scores, labels, category_ids):
    """One image's detections (N, 4) xyxy original pixels, (N,), (N,) -> list of COCO result dicts (xywh)."""
    boxes = boxes.double().cpu()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    return [dict(image_id=image_id, category_id=category_ids[k], bbox=box, score=score)
            for box, score, k in zip(boxes.tolist(), scores.tolist(), labels.tolist())]


def coco_evaluate(annotations, results, kind="bbox"):
    """The twelve COCO numbers in percent, and per class AP, AP50 (also by area) and AR50.

    annotations: path or dict in COCO format; results: list of result dicts (may be empty, AP is 0 then); kind:
    "bbox" or "segm". Returns dict: COCO_STATS names -> float (-1 where the ground truth has no such object),
    "classes" -> {name: {"AP", "AP50", "AP50s", "AP50m", "AP50l", "AR50"}}. The order of images does not matter;
    equal scores within an image rank in list order, as in the COCO API. `results` is left unchanged.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks a lot
        truth = COCO()
        content = annotations if isinstance(annotations, dict) else json.loads(Path(annotations).read_text())
        truth.dataset = content | dict(annotations=[  # pycocotools needs what our readers, and many people's files, do without
            dict(id=k, iscrowd=0, area=a["bbox"][2] * a["bbox"][3]) | a for k, a in enumerate(content["annotations"], 1)])
        truth.createIndex()
        if results:
            # copies: pycocotools adds keys; without boxes it takes the areas of masks, as it should for them
            found = truth.loadRes([{k: v for k, v in r.items() if kind == "bbox" or k != "bbox"} for r in results])
        else:
            found = COCO()
            found.dataset = dict(images=truth.dataset["images"], categories=truth.dataset["categories"], annotations=[])
            found.createIndex()
        ev = COCOeval(truth, found, kind)
        ev.evaluate()
        ev.accumulate()
        ev.summarize()
    stats = {name: float(v) * 100 if v >= 0 else -1.0 for name, v in zip(COCO_STATS, ev.stats)}
    # precision (10 IoUs, 101 recalls, K, areas: all, small, medium, large), recall (10, K, areas), both at 100 detections
    precision, recall = ev.eval["precision"][..., -1], ev.eval["recall"][..., -1]
    mean = lambda p: float(p[p > -1].mean()) * 100 if (p > -1).any() else -1.0
    stats["classes"] = {truth.cats[c]["name"]: dict(
        AP=mean(precision[:, :, k, 0]), AR50=mean(recall[0, k, 0]),
        **{name: mean(precision[0, :, k, area]) for area, name in enumerate(("AP50", "AP50s", "AP50m", "AP50l"))})
        for k, c in enumerate(ev.params.catIds)}
    return stats


def class_agnostic_recall(annotations, results, most, ious):
    """{(iou, n): percent of the boxes of `annotations` (a COCO dict) found by an image's best n results, each used once}; classes are ignored."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = annotations
        truth.createIndex()
        known = annotations["categories"][0]["id"]  # pycocotools drops results of classes that the truth has not, here too
        ev = COCOeval(truth, truth.loadRes([dict(r, category_id=known) for r in results]), "bbox") if results else None
        if ev:
            ev.params.useCats, ev.params.maxDets, ev.params.iouThrs = 0, list(most), np.array(ious)
            ev.evaluate()
            ev.accumulate()
    recall = lambda i, k: 100 * float(ev.eval["recall"][i, 0, 0, k]) if ev else 0.0
    return {(iou, n): recall(i, k) for i, iou in enumerate(ious) for k, n in enumerate(most)}


def class_mean(stats, names, key):
    """Mean of a per-class number over those of `names` that the ground truth holds: how base, novel and all are defined."""
    values = [stats["classes"][n][key] for n in names if stats["classes"].get(n, {}).get(key, -1) >= 0]
    return sum(values) / len(values) if values else -1.0


def class_table(stats, columns=3):
    """Per-class AP as text, `columns` classes a line; a dash where the ground truth has no object."""
    cells = [f"{name[:22]:22s} {v['AP']:5.1f} {v['AP50']:5.1f}" if v["AP"] >= 0 else f"{name[:22]:22s}     -     -"
             for name, v in stats["classes"].items()]
    head = " | ".join([f"{'class':22s}    AP  AP50"] * min(columns, len(cells)))
    rows = [" | ".join(cells[i:i + columns]) for i in range(0, len(cells), columns)]
    return "\n".join([head, *rows])


# ------------------------------------------------------------------ LVIS

def import_lvis():
    """The lvis package, whose evaluation says np.float, a name that numpy has dropped: its own np, not numpy, gets the name back."""
    try:
        import lvis
        import lvis.eval
    except ImportError as e:  # it draws with OpenCV, which needs libraries of the system
        raise RuntimeError(f"the lvis package cannot be imported ({e}); OpenCV's system libraries are missing? apt install libgl1 libglib2.0-0") from None

    class Numpy:
        float = float
        __getattr__ = staticmethod(lambda name: getattr(np, name))

    lvis.eval.np = Numpy()
    return lvis


def lvis_evaluate(annotations, results, kind="bbox", category_ids=None):
    """LVIS v1's numbers in percent: AP, AP50, AP75, APs, APm, APl, APr, APc, APf (300 boxes an image; -1 where undefined), and "classes".

    annotations: path of an LVIS json; results: list of result dicts (may be empty); kind "bbox" or "segm" (compressed RLE). category_ids: these only.
    Federated: in an image, classes that are neither annotated nor in neg_category_ids are not scored; the package sees to that.
    """
    lvis = import_lvis()
    logging.getLogger("lvis").setLevel(logging.ERROR)
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = lvis.LVIS(str(annotations))
            keys = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
            # the package asks the first result for its kind, and cannot do without one: a box of score 0 in a corner finds nothing
            nothing = dict(image_id=truth.dataset["images"][0]["id"], category_id=truth.dataset["categories"][0]["id"], score=0.0)
            nothing |= dict(bbox=[-2.0, -2.0, 1.0, 1.0]) if kind == "bbox" else dict(segmentation=encode_mask(np.zeros([
                truth.dataset["images"][0][k] for k in ("height", "width")], np.uint8)))
            found = lvis.LVISResults(truth, [{k: r[k] for k in keys} for r in results] or [nothing])
            ev = lvis.LVISEval(truth, found, kind)
            if category_ids is not None:
                ev.params.cat_ids = sorted(category_ids)
            ev.run()
    finally:
        logging.disable(logging.NOTSET)
    stats = {k: float(v) * 100 if v >= 0 else -1.0 for k, v in ev.get_results().items()}
    precision = ev.eval["precision"]  # (10 IoUs, 101 recalls, K, areas)
    mean = lambda p: float(p[p > -1].mean()) * 100 if (p > -1).any() else -1.0
    stats["classes"] = {truth.cats[c]["name"]: dict(AP=mean(precision[:, :, k, 0]), AP50=mean(precision[0, :, k, 0])) for k, c in enumerate(ev.params.cat_ids)}
    return stats


def encode_mask(mask):
    """(h, w) of 0 and 1 -> COCO's compressed RLE with a text in it, as json needs."""
    from pycocotools import mask as rle
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return code | dict(counts=code["counts"].decode())


# ------------------------------------------------------------------ Pascal VOC

def voc_evaluate(truth, results, iou=0.5, legacy=False):
    """Pascal VOC's average precision in percent: {"AP11", "AP" (area), "classes": {name: {both}}}; classes without truth are left out.

    truth: dict of datasets.read_voc; results: list of COCO result dicts. Per class, detections go by falling score; each takes the object of its image that it
    overlaps most, if by at least `iou`: right the first time, wrong the second time, ignored if the object is difficult. legacy: pixels count
    as 1 wide, boxes end at xmax - 1 of ours, so that widths are x2 - x1 + 1 again: the devkit's own arithmetic.
    """
    names, counts = {c["id"]: c["name"] for c in truth["categories"]}, {}
    for a in truth["annotations"]:
        x, y, w, h = a["bbox"]
        counts.setdefault((a["category_id"], a["image_id"]), []).append((x, y, x + w, y + h, a["difficult"]))
    objects = {k: np.array(v, float) for k, v in counts.items()}
    classes, by_class = {}, {}
    for r in results:
        by_class.setdefault(r["category_id"], []).append(r)
    for c, name in names.items():
        total = sum(int((o[:, 4] == 0).sum()) for (k, _), o in objects.items() if k == c)
        if total == 0:
            continue
        taken, right, wrong = {}, [], []
        for r in sorted(by_class.get(c, []), key=lambda r: -r["score"]):  # stable: equal scores keep their order
            here, (x, y, w, h) = objects.get((c, r["image_id"])), r["bbox"]
            hit = ignored = False
            if here is not None:
                one = 1.0 if legacy else 0.0
                low, high = np.maximum(here[:, :2], (x, y)), np.minimum(here[:, 2:4] - one, (x + w, y + h))
                inter = np.clip(high - low + one, 0, None).prod(1)
                union = (here[:, 2:4] - here[:, :2]).prod(1) + (w + one) * (h + one) - inter
                best = int((inter / union).argmax())
                if inter[best] / union[best] >= iou:
                    ignored = bool(here[best, 4])
                    hit = not ignored and (r["image_id"], best) not in taken
                    taken[r["image_id"], best] = True
            if not ignored:
                right.append(hit), wrong.append(not hit)
        tp, fp = np.cumsum(right, dtype=float), np.cumsum(wrong, dtype=float)
        recall, precision = tp / total, tp / np.maximum(tp + fp, 1e-12)
        eleven = np.mean([precision[recall >= t - 1e-9].max(initial=0) for t in np.linspace(0, 1, 11)])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        area = float((np.diff(recall, prepend=0) * envelope).sum())
        classes[name] = dict(AP11=100 * float(eleven), AP=100 * area)
    mean = lambda key: sum(v[key] for v in classes.values()) / len(classes) if classes else -1.0
    return dict(AP11=mean("AP11"), AP=mean("AP"), classes=classes)


# ------------------------------------------------------------------ localisation: images with one class

def localise(scores, boxes, found_labels, found_boxes, label, gt_boxes, size):
    """The localisation metrics of one image, {name: 0.0 or 1.0}: means over images are the published numbers. A box is right above IoU 0.5 with any true box.

    scores (K,): each class's best score in the image, boxes (K, 4) the box that has it; found_labels (N,), found_boxes (N, 4): final detections, best
    first; label: the image's class; gt_boxes (M, 4); size (h, w). top5: five classes, each with its best box; top5_boxes: the five best detections,
    which may be of one class. gt_known: the true class's best box. cls: the best class, wherever its box. whole, centred: what the whole image and a
    centred box of 75 % of its sides get.
    """
    (h, w), gt_boxes = size, gt_boxes.to(boxes)

    def right(boxes):
        low, high = torch.maximum(boxes[:, None, :2], gt_boxes[:, :2]), torch.minimum(boxes[:, None, 2:], gt_boxes[:, 2:])
        inter = (high - low).clamp(min=0).prod(-1)
        union = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None] + (gt_boxes[:, 2:] - gt_boxes[:, :2]).prod(-1) - inter
        return (inter > 0.5 * union).any(1)

    top = scores.topk(min(5, len(scores))).indices
    hit = (top == label) & right(boxes[top])
    found = (found_labels[:5] == label) & right(found_boxes[:5])
    fixed = right(boxes.new_tensor([[0, 0, w, h], [w / 8, h / 8, w * 7 / 8, h * 7 / 8]]))
    return dict(top1=float(hit[0]), top5=float(hit.any()), gt_known=float(right(boxes[label:label + 1])[0]), top1_boxes=float(found[:1].any()),
                top5_boxes=float(found.any()), cls=float(top[0] == label), whole=float(fixed[0]), centred=float(fixed[1]))


def sparse_ap(truth, results, federated, iou=0.5):
    """{category id: AP in percent at one IoU} for thousands of classes, where COCO's dense tables do not fit: detections are grouped by class.

    truth: COCO dict whose images have category_id (the one class that was annotated there); results: (image_ids, category_ids, scores, boxes (N, 4) xywh) arrays. federated: a
    class is scored on its own images only; otherwise its detections on all others are false positives. As COCO: greedy by score, 101 recall
    points, classes without boxes are left out.
    """
    of_image = {i["id"]: i["category_id"] for i in truth["images"]}
    gt = {}
    for a in truth["annotations"]:
        if a["category_id"] == of_image[a["image_id"]] and min(a["bbox"][2:]) > 0:
            gt.setdefault(a["category_id"], {}).setdefault(a["image_id"], []).append(a["bbox"])
    images, categories, scores, boxes = (np.asarray(x) for x in results)
    order = np.lexsort((-scores, categories))  # stable
    images, categories, scores, boxes = images[order], categories[order], scores[order], boxes.reshape(-1, 4)[order].astype(float)
    own = np.array([of_image[i] for i in images.tolist()], dtype=np.int64) if len(images) else np.zeros(0, np.int64)
    answer = {}
    for c, held in gt.items():
        first, last = np.searchsorted(categories, [c, c + 1])
        rows = np.arange(first, last)
        if federated:
            rows = rows[own[rows] == c]
        right = np.zeros(len(rows), bool)
        free = {i: (np.array(b, float), np.ones(len(b), bool)) for i, b in held.items()}
        for k in np.flatnonzero([i in free for i in images[rows].tolist()]):
            (targets, open_), (x, y, w, h) = free[images[rows[k]]], boxes[rows[k]]
            side = np.minimum(targets[:, :2] + targets[:, 2:], (x + w, y + h)) - np.maximum(targets[:, :2], (x, y))
            inter = np.clip(side, 0, None).prod(1)
            overlap = np.where(open_, inter / (targets[:, 2:].prod(1) + w * h - inter), -1)
            best = int(overlap.argmax())
            if overlap[best] >= iou:
                right[k], open_[best] = True, False
        total = sum(len(b) for b in held.values())
        tp = np.cumsum(right)
        precision = np.maximum.accumulate((tp / np.arange(1, len(tp) + 1))[::-1])[::-1]
        at = np.searchsorted(tp / total, np.linspace(0, 1, 101), side="left")
        answer[c] = 100 * float(np.where(at < len(tp), np.append(precision, 0)[np.minimum(at, len(tp))], 0).mean())
    return answer
