# SPDX-License-Identifier: MIT
"""DK-DETR's claims on the embedded dataset: python tests/study_dkdetr.py [--seeds ...] [--arms ...] [--report]

Protocol and statistics: study.py. Does distillation by auxiliary queries lift the AP50 of classes that were
never labelled, and spare the base classes? All arms of a seed continue from one burn-in, so that they
differ by the distillation alone; `seconds` are those after it. Arms as in the paper: Tables 5 (SKD, RKD,
auxiliary queries) and 6 (L1), and the control: crops of other images. Equal compute beside equal epochs by
three lengths.

Diagnosis, on validation images (own and other by KD queries that are drawn anew, to be mended; targets without
those that overlap a base box): how often a target is a novel object, how many of the novel objects are
among the targets and among all queries, %, and the cosine of a feature with its own crop and with others'.
"""
import json

from study import Study, claims, curve, folder_of, python, table, train

EPOCHS = 12
LENGTHS = EPOCHS // 2, EPOCHS, 2 * EPOCHS
NONE = ["--skd", "none", "--rkd", "none"]
ARMS = {
    "none": NONE,
    "SKD": ["--rkd", "none"],
    "RKD": ["--skd", "none"],
    "both": [],
    "both, on object queries": ["--no-aux-queries"],
    "SKD with L1": ["--skd", "l1", "--rkd", "none"],
    "both, crops of other images": ["--shuffle-crops"],
}
MAIN = list(ARMS)
CURVES = {}
for label in ("none", "both"):
    CURVES[label] = [label if n == EPOCHS else f"{label}, {n} epochs" for n in LENGTHS]
    ARMS |= {arm: [*ARMS[label], "--epochs", str(n)] for arm, n in zip(CURVES[label], LENGTHS) if n != EPOCHS}
METRICS = "novel_AP50", "base_AP50", "novel_AR50"
DIAGNOSES = "novel_share", "novel_in_targets", "novel_in_queries", "own", "other"
CLAIMS = (
    ("DK-DETR lifts novel classes", "both", "none", "novel_AP50"),
    ("DK-DETR is above crops of other images", "both", "both, crops of other images", "novel_AP50"),
    ("SKD lifts novel classes", "SKD", "none", "novel_AP50"),
    ("RKD lifts novel classes", "RKD", "none", "novel_AP50"),
    ("RKD adds to SKD", "both", "SKD", "novel_AP50"),
    ("auxiliary queries spare base classes", "both", "both, on object queries", "base_AP50"),
    ("SKD is above L1", "SKD", "SKD with L1", "novel_AP50"),
    *((f"DK-DETR lifts novel classes ({n} epochs)", f"both, {n} epochs", f"none, {n} epochs", "novel_AP50")
      for n in LENGTHS if n != EPOCHS))

DIAGNOSE = """
import json, sys, torch
import dkdetr as d
from common.boxes import pairwise_iou
model, classes = d.load(sys.argv[1])
a = d.follow(d.parse_args(["--data", "shapes", "--no-table", *sys.argv[2:]]), model, classes)
data = d.make_data(a, "val")
base, novel = d.class_split(a, data.records.categories)
clip = d.clip_for(model, torch.device("cpu"))
distiller = d.make_distiller(model, None, clip, d.settings_of(a))
targets = right = inside = among = total = 0
own, other = [], []
with torch.no_grad():
    for batch in d.eval_loader(data, 0, 1, 0, False):
        batch = d.to_device(batch, torch.device("cpu"))
        out = model(d.normalise(batch["images"], batch["sizes"]), batch["sizes"])
        scale = batch["sizes"].flip(1).repeat(1, 2)[:, None].float()
        boxes = d.box_convert(out.proposals, "cxcywh", "xyxy") * scale
        known = torch.tensor([data.classes[k] in base for k in batch["labels"][0].tolist()])
        hidden, labelled = batch["boxes"][0][~known & (batch["labels"][0] >= 0)], batch["boxes"][0][known & (batch["labels"][0] >= 0)]
        near = (pairwise_iou(boxes, labelled[None]) >= 0.5).any(-1) if len(labelled) else torch.zeros_like(out.usable)
        index, there = d.choose_targets(out.usable, near, boxes, a.kd_topk, a.kd_min_size)
        chosen = boxes[0, index[0][there[0]]]
        targets += len(chosen)
        if len(hidden) and len(chosen):
            iou = pairwise_iou(chosen, hidden)
            right, inside = right + int((iou.amax(1) >= 0.5).sum()), inside + int((iou.amax(0) >= 0.5).sum())
        if len(hidden):
            among, total = among + int((pairwise_iou(boxes[0], hidden).amax(0) >= 0.5).sum()), total + len(hidden)
        if len(chosen) > 1:
            v = distiller.crop_embeddings(batch, chosen, torch.zeros(len(chosen), dtype=torch.long))
            f = distiller.kd_features(out)[0, index[0][there[0]]]
            c = torch.nn.functional.normalize(f, dim=-1) @ v.T
            own.append(c.diagonal().mean()), other.append((c.sum() - c.diagonal().sum()) / (c.numel() - len(c)))
mean = lambda x: float(sum(x) / max(len(x), 1))
print(json.dumps(dict(novel_share=100 * right / max(targets, 1), novel_in_targets=100 * inside / max(total, 1), novel_in_queries=100 * among / max(total, 1), own=mean(own), other=mean(other))))
"""
PREPARE = """
import sys, torch
from common.shapes import make_shapes
from common.tiny import shapes_clip
import dkdetr
seed, epochs = sys.argv[1:]
make_shapes(seed=int(seed))
a = dkdetr.resolve(dkdetr.parse_args(["--data", "shapes", "--data-seed", seed, "--epochs", epochs, "--no-table"]))
n = len(dkdetr.make_data(a, "train"))
print(torch.load(shapes_clip(int(seed)), weights_only=True)["accuracy"]["novel"], a.burn_in * -(-n // a.batch_size))
"""


def length(flags):
    return flags[flags.index("--epochs") + 1] if "--epochs" in flags else str(EPOCHS)


def burn_in(seed, folder, epochs):
    """last.pt of the common start of this length."""
    novel, steps = python(PREPARE, seed, epochs).split()[-2:]
    out = folder / f"burn-in-{epochs}"
    if not (out / "results.json").exists():
        print(f"seed {seed}: the tiny CLIP names {float(novel):.1f} % of the novel objects (wanted: 90)", flush=True)
    train("dkdetr.py", out, ["--no-table", *NONE, "--epochs", epochs, "--max-iters", steps, *seeds_of(seed)])
    return out / "last.pt"


def seeds_of(seed):
    return ["--seed", str(seed), "--data-seed", str(seed)]


def prepare(seed, folder):
    burn_in(seed, folder, str(EPOCHS))


def run(arm, seed, folder):
    flags, out = ARMS[arm], folder / folder_of(arm)
    start = burn_in(seed, folder, length(flags))
    result, took = train("dkdetr.py", out, ["--no-table", "--epochs", length(flags), *flags, "--from", start,
                                            *seeds_of(seed)])
    found = json.loads(python(DIAGNOSE, out / "last.pt", *flags).splitlines()[-1])
    return {k: round(result[k], 3) for k in METRICS} | {k: round(v, 3) for k, v in found.items()} | took


def report(rows):
    table(f"{EPOCHS} epochs, novel and base compete", rows, MAIN, METRICS, "none")
    table("diagnosis", rows, MAIN, DIAGNOSES, "none")
    claims(rows, CLAIMS)
    curve(rows, CURVES, "novel_AP50", "tests/study_dkdetr.png",
          f"shapes, {', '.join(map(str, LENGTHS))} epochs, after the common burn-in")


if __name__ == "__main__":
    Study("dkdetr", run, prepare, ARMS, report).main_program(__doc__)
