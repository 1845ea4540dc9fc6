# SPDX-License-Identifier: MIT
"""Seconds and peak memory of data at its real size, made up on the spot.

    python tests/bench_scale.py lvis [IMAGES]          # 300 detections in each of 20,000 images, scored by LVIS's metric
    python tests/bench_scale.py objects365 [BOXES]     # a json of so many boxes, read by simple21k.py's way, and once more

Measured, one core of 2 (python 3.11), peaks of a process with its imports (0.4 to 0.6 GB):
lvis: 6,000,000 detections in 20,000 images: kept as arrays in 2.6 s (350 MB); the metric itself 233 s, peak 2.4 GB;
detections.json of 1.1 GB in 45 s. Before (result dicts, the lvis package on all classes at once): 2,000 images 42 s and
3.1 GB, so 20,000 about 420 s and 26 GB. The same AP.
objects365: 3,000,000 boxes in 176,470 images, a json of 500 MB: 20.5 s and a peak of 1.5 GB, once, in one process; 0.7 s
and 0.68 GB in every other, whose arrays are shared. For its 29 million boxes that makes 200 s and 11 GB once, 7 s and 2.8 GB
(shared) in the others.
"""
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import evaluation  # noqa: E402
from common.datasets import CocoDataset, read_objects365  # noqa: E402


def tell(what, since):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20
    print(f"{what:48s} {time.time() - since:7.1f} s | now {now:,} MB, peak {peak:,} MB", flush=True)


def lvis_truth(images, classes=1203, boxes=12, negatives=20, seed=0):
    """Like LVIS v1 val: about 12 boxes and 20 absent classes an image, classes as rare as 1 / rank."""
    r = np.random.default_rng(seed)
    share = 1 / np.arange(1, classes + 1)
    share /= share.sum()
    categories = [dict(id=c, name=f"c{c}", frequency="fcr"[(c > 400) + (c > 860)], synset="x") for c in range(1, classes + 1)]
    truth = dict(images=[], annotations=[], categories=categories)
    for i in range(1, images + 1):
        held = r.choice(classes, boxes, p=share) + 1
        absent = np.setdiff1d(r.choice(classes, negatives, replace=False) + 1, held)
        truth["images"].append(dict(id=i, width=640, height=480, neg_category_ids=absent.tolist(), not_exhaustive_category_ids=held[:1].tolist()))
        xywh = np.concatenate([r.uniform(0, 400, (boxes, 2)), r.uniform(8, 200, (boxes, 2))], 1)
        for c, box in zip(held.tolist(), xywh.tolist()):
            truth["annotations"].append(dict(id=len(truth["annotations"]) + 1, image_id=i, category_id=c, bbox=box, area=box[2] * box[3], segmentation=[]))
    return truth


def lvis(images=20000, count=300, classes=1203):
    """Two of three detections are of classes that are judged in their image, which is more than a detector has: the worst case."""
    since = time.time()
    truth = lvis_truth(images, classes)
    tell(f"made-up ground truth of {images:,} images", since)
    r, found, boxes = np.random.default_rng(1), evaluation.Detections(), {}
    for a in truth["annotations"]:
        boxes.setdefault(a["image_id"], []).append((a["category_id"], *a["bbox"]))
    ids, since = list(range(1, classes + 1)), time.time()
    for i in truth["images"]:
        held = np.array(boxes[i["id"]])
        near = held[r.integers(0, len(held), count // 3)]
        label = np.concatenate([near[:, 0], r.choice(i["neg_category_ids"], count // 3), r.integers(1, classes + 1, count // 3)]) - 1
        xywh = np.concatenate([near[:, 1:], r.uniform(8, 200, (count // 3 * 2, 4))]) + r.normal(0, 4, (count // 3 * 3, 4))
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + np.abs(xywh[:, 2:])], 1)
        found.add(i["id"], torch.tensor(xyxy, dtype=torch.float32), torch.tensor(r.random(len(label)), dtype=torch.float32), torch.tensor(label).long(), ids)
    tell(f"{len(found):,} detections, kept as arrays", since)
    since = time.time()
    stats = evaluation.lvis_evaluate(truth, found)
    tell(f"the metric itself (AP {stats['AP']:.2f})", since)
    since = time.time()
    with tempfile.TemporaryDirectory() as folder:
        from common.pictures import result_texts
        from common.run import write_whole
        write_whole(Path(folder) / "detections.json", result_texts(found, dict(checkpoint="last.pt", epoch=1)))
        tell(f"detections.json of {(Path(folder) / 'detections.json').stat().st_size >> 20:,} MB", since)


def objects365_json(path, boxes, seed=0):
    """A json as Objects365 v2's: 365 classes, 17 boxes an image, fields as there."""
    r, images = np.random.default_rng(seed), boxes // 17
    with open(path, "w") as file:
        entries = (json.dumps(dict(id=i, file_name=f"images/v1/patch{i % 50}/objects365_v1_{i:08d}.jpg", height=512, width=768, license=5, url="")) for i in range(1, images + 1))
        file.write('{"images": [' + next(entries))
        for e in entries:
            file.write("," + e)
        file.write('], "annotations": [')
        for n in range(images * 17):
            x, y, w, h = r.uniform(0, 300, 4).round(4).tolist()
            file.write(("," if n else "") + f'{{"id": {n + 1}, "iscrowd": 0, "isfake": 0, "area": {w * h:.4f}, "isreflected": 0, "bbox": [{x}, {y}, {w}, {h}], '
                       f'"image_id": {n // 17 + 1}, "category_id": {n * 7 % 365 + 1}}}')
        file.write('], "categories": ' + json.dumps([dict(id=c, name=f"class {c}") for c in range(1, 366)]) + "}")


def objects365_once(path, folder):
    since = time.time()
    records = read_objects365(path, folder)
    data = CocoDataset(folder, records, True, "512")
    tell(f"{len(data):,} images, {len(records.label):,} boxes ready", since)


def objects365_bench(boxes=3_000_000):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zhiyuan_objv2_train.json"
        objects365_json(path, boxes)
        for k in range(50):
            (Path(folder) / f"patch{k}").mkdir()
        for i in range(1, boxes // 17 + 1):
            (Path(folder) / f"patch{i % 50}/objects365_v1_{i:08d}.jpg").touch()
        print(f"json of {boxes:,} boxes: {path.stat().st_size >> 20:,} MB", flush=True)
        for _ in range(2):  # a process of its own each: the second finds the arrays of the first
            if os.fork() == 0:
                objects365_once(path, folder)
                os._exit(0)
            os.wait()


if __name__ == "__main__":
    what, *number = sys.argv[1:]
    dict(lvis=lvis, objects365=objects365_bench)[what](*map(int, number))
