# SPDX-License-Identifier: MIT
"""Changes real annotation files at random and reads them through the scripts' own datasets: each must be refused in one line, or the ground truth as the loader
gives it must score 100 in the script's own evaluation. By hand:

    python tests/fuzz_annotations.py --count 200 --seed 0

A slice runs in test_fuzz.py. Needs ../shared/data.
"""
import argparse
import copy
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.datasets import CocoDataset, collate, read_annotations, require_lvis  # noqa: E402
from common.evaluation import coco_evaluate, lvis_evaluate, to_coco_results  # noqa: E402
from common.run import UserError, explain  # noqa: E402

DATA = ROOT.parent / "shared/data"
STRANGE = (None, True, False, -1, 0, 1, 10**400, 1.5, float("nan"), float("inf"), "", "12", "x", "\ud800", "a\nb", [], {}, [1, 2], {"a": 1}, [[[]]], "../x", "/dev/zero")
KINDS = ("value", "value", "value", "drop", "double", "shuffle", "ids", "boxes", "nest", "text", "bytes", "crowd", "area", "rename", "join")


def few(path, count):
    """The first images of a file, with their annotations."""
    raw = json.loads(path.read_text())
    images = raw["images"][:count]
    ids = {i["id"] for i in images}
    return dict(images=images, annotations=[a for a in raw["annotations"] if a["image_id"] in ids], categories=raw["categories"])


def change(content, rng):
    """A changed copy (dict, text or bytes) and what was done."""
    content, kind = copy.deepcopy(content), rng.choice(KINDS)
    group = rng.choice(("images", "annotations", "categories"))
    entry = rng.choice(content[group])
    key = rng.choice(list(entry))
    if kind == "value":
        entry[key] = rng.choice(STRANGE)
    elif kind == "drop":
        del entry[key]
    elif kind == "double":
        content[group].append(copy.deepcopy(entry))
    elif kind == "shuffle":
        rng.shuffle(content[group])
    elif kind == "ids":
        way = rng.choice((lambda k, i: k, lambda k, i: str(i), lambda k, i: k % 3, lambda k, i: -k, lambda k, i: float(i), lambda k, i: 10**30 + k))
        if group == "annotations":
            for k, a in enumerate(content[group]):
                a["id"] = way(k, a["id"])
        else:
            new = {e["id"]: way(k, e["id"]) for k, e in enumerate(content[group])}
            field = "image_id" if group == "images" else "category_id"
            for e in content[group]:
                e["id"] = new[e["id"]]
            for a in content["annotations"]:
                a[field] = new[a[field]]
    elif kind == "boxes":
        way = rng.choice((lambda b: [b[0] + b[2], b[1] + b[3], -b[2], -b[3]], lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]], lambda b: [v / 640 for v in b],
                          lambda b: [str(v) for v in b], lambda b: [b[0], b[1], 0, b[3]], lambda b: [v * 10 for v in b], lambda b: [b[0] - 1000, *b[1:]], lambda b: b[:3]))
        share = rng.choice((0.1, 0.5, 1.0))
        for a in content["annotations"]:
            if rng.random() < share:
                a["bbox"] = way(a["bbox"])
    elif kind == "nest":
        content[group] = rng.choice((None, {}, "x", [content[group]], [None], [3], dict(enumerate(content[group]))))
    elif kind == "text":
        return "text", json.dumps(content, ensure_ascii=False).replace('"name": "', '"name": "ß' + rng.choice(("", "猫", " ")))
    elif kind == "bytes":
        raw = bytearray(json.dumps(content).encode())
        for _ in range(rng.randint(1, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return "bytes", bytes(raw[:rng.choice((len(raw), rng.randrange(len(raw))))])
    elif kind == "crowd":
        for a in content["annotations"]:
            a["iscrowd"] = rng.choice((0, 1, "0", "1", None, True, False))
    elif kind == "area":
        for a in content["annotations"]:
            a["area"] = rng.choice((None, "12", 0, -5, a.get("area", 1), float("nan")))
    elif kind == "rename":
        for e in rng.sample(content["categories"], 2):
            e["name"] = "twin"
    else:
        content["images"] += [dict(i, file_name=content["images"][0].get("file_name", "x.jpg")) for i in content["images"]]
    return kind, content


def score(folder, path, lvis, train):
    """AP of the ground truth, as the validation loader gives it, against itself; None where there is nothing to score. Training reads it, too."""
    records = read_annotations(path, folder)
    if lvis:
        require_lvis(records)
    if train:
        data = CocoDataset(folder, records, True)
        for i in range(len(data)):
            data[i, i]
    val = CocoDataset(folder, records, False)
    results = []
    for i in range(len(val)):
        batch = collate([val[i, 0]])
        (h, w), (height, width) = batch["sizes"][0].tolist(), batch["original_sizes"][0]
        keep = batch["labels"][0] >= 0
        boxes, labels = batch["boxes"][0][keep].double(), batch["labels"][0][keep]
        boxes = boxes * boxes.new_tensor([width / w, height / h] * 2)
        results += to_coco_results(batch["image_ids"][0], boxes, boxes.new_ones(len(boxes)), labels, val.category_ids)
    # categories without frequency are refused by require_lvis, so what passes can be scored
    return (lvis_evaluate if lvis else coco_evaluate)(val.truth(), results)["AP"]


def attempts(count, seed, folder, images=4):
    """Yields (description, verdict): "refused", "perfect", or what went wrong."""
    rng = random.Random(seed)
    coco, lvis = DATA / "coco_mini", DATA / "lvis_mini/annotations/coco_mini_as_lvis_v1_val.json"
    files = dict(coco=(few(coco / "annotations/instances_val2017.json", images), coco / "val2017", False), lvis=(few(lvis, images), coco, True))
    path = folder / "changed.json"
    for k in range(count):
        name = rng.choice(list(files))
        content, pictures, is_lvis = files[name]
        kind, changed = change(content, rng)
        what = f"{k} {name} {kind}"
        if isinstance(changed, bytes):
            path.write_bytes(changed)
        else:
            text = changed if isinstance(changed, str) else json.dumps(changed)
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            ap = score(pictures, path, is_lvis, train=rng.random() < 0.5)
        except UserError as e:
            line = explain(e)  # what the script prints
            yield what, "refused" if "\n" not in str(e).strip() and len(line) < 1000 else f"not one line: {line[:500]}"
        except BaseException:
            yield what, "traceback: " + traceback.format_exc()[-1500:]
        else:
            yield what, "perfect" if ap > 99.99 else f"accepted with AP {ap:.2f}"


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--count", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    tally = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for what, verdict in attempts(args.count, args.seed, Path(folder)):
            tally[verdict.split(":")[0]] += 1
            if verdict not in ("refused", "perfect"):
                print(f"{what}: {verdict}", flush=True)
    print(json.dumps(tally))


if __name__ == "__main__":
    main()
