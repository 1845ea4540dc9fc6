"""COCO metrics through pycocotools, gathered over processes. This file needs no other file of `common`."""
import contextlib
import io
import json
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
        truth.dataset = annotations if isinstance(annotations, dict) else json.loads(Path(annotations).read_text())
        truth.createIndex()
        if results:
            found = truth.loadRes([dict(r) for r in results])  # copies: pycocotools adds keys
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
