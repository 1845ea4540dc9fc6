# SPDX-License-Identifier: MIT
"""HierKD's claims on the embedded dataset: python tests/study_hierkd.py [--seeds ...] [--arms ...] [--report]

Protocol and statistics: study.py. Does each distillation lift the AP50 of classes that were never labelled?
Arms as in the paper: Table 4 (none, IKD, GKD, both), Table 5 (negatives), Table 3 (pooling), and two
controls: each positive gets another's crop (one in ten of them of the same class, so the control knows a
little), each image another's caption. And what GKD costs beside IKD:
its weight, its levels (P4 has 4 % of the positives), its attention at temperature 0.1 instead of 1: those
arms, and average pooling, on 4 seeds (of 6 planned first; 2 were done), the others on 6. GKD on P3 alone became the default of shapes after
seeds 1 (ten arms) and 2 (both, on two levels) had been seen, so what the study says of it is no test.

AP50 mixes two things: which novel name an object gets, and whether it stands out from all else. The second
is what unlabelled objects suffer from. So each run is asked for either alone. `named`: the share of novel
objects whose anchors are nearest to their own name among the 8 novel ones (chance 12.5 %), detected or not;
`coloured` and `shaped` where the colour (chance 25 %) and the shape (50 %) of that name are right. And
ZSD's AP50 of those detections, among the best 1,000 of an image, that overlap an object (IoU 0.5), and of
those that overlap a novel one.

Before --init shapes was (commit 6338962^; seeds 1 to 3), GKD gave nothing: 3.4, with shuffled captions 3.5,
IKD 26.4, both 19.3, none 2.0. The rule then asked also that base AP50 stays within 8 points and both are no
worse than the better one: not met then, nor now.
"""
import json

from study import Study, asides, claims, folder_of, python, seeds_of, table, train

ARMS = {  # name: flags
    "none": ["--no-ikd", "--no-gkd"],
    "IKD": ["--no-gkd"],
    "GKD": ["--no-ikd"],
    "both": [],
    "IKD, crops shuffled": ["--no-gkd", "--shuffle-crops"],
    "GKD, captions shuffled": ["--no-ikd", "--shuffle-captions"],
    "IKD, negatives 1:1": ["--no-gkd", "--negatives", "1to1"],
    "IKD, negatives 100 %": ["--no-gkd", "--negatives", "1.0"],
    "both, GKD weight 0.2": ["--gkd-weight", "0.2"],
    "both, GKD on two levels": ["--gkd-levels", "2"],
    "both, sharp attention": ["--tau-a", "0.1"],
    "GKD, average pooling": ["--no-ikd", "--gkd-pool", "avg"],
}
FEWER = "both, GKD weight 0.2", "both, GKD on two levels", "both, sharp attention", "GKD, average pooling"
METRICS = "zsd_AP50", "base_AP50", "gzsd_novel_AP50", "gzsd_base_AP50", "zsd_AR50"
NAMING = "named", "coloured", "shaped"
CLEANED = "on_objects", "on_novel"
CLAIMS = (
    ("both above neither", "both", "none", "zsd_AP50"),
    ("IKD above neither", "IKD", "none", "zsd_AP50"),
    ("IKD above IKD with crops shuffled", "IKD", "IKD, crops shuffled", "zsd_AP50"),
    ("GKD above neither", "GKD", "none", "zsd_AP50"),
    ("GKD above GKD with captions shuffled", "GKD", "GKD, captions shuffled", "zsd_AP50"),
    ("the same, named right, %", "GKD", "GKD, captions shuffled", "named"),
    ("both above IKD alone", "both", "IKD", "zsd_AP50"),
    ("both above GKD alone", "both", "GKD", "zsd_AP50"),
    ("both above IKD alone, named right, %", "both", "IKD", "named"),
    ("both, GKD on P3 alone above P3 and P4", "both", "both, GKD on two levels", "zsd_AP50"),
    ("IKD, 10 % of the negatives above all", "IKD", "IKD, negatives 100 %", "zsd_AP50"),
    ("GKD, max pooling above average pooling", "GKD", "GKD, average pooling", "zsd_AP50"))
ASIDES = (  # no claims
    *(("both", "IKD", key, *range(2, 7)) for key in ("zsd_AP50", *CLEANED)),  # the rows that have CLEANED
    *((arm, against, "zsd_AP50") for arm in ("both, GKD weight 0.2", "both, sharp attention") for against in ("IKD", "both")),
    *((arm, against, key) for arm, against in (("IKD", "IKD, crops shuffled"), ("GKD", "GKD, captions shuffled"))
      for key in NAMING[1:]))

NAME_THEM = """
import json, sys, torch
import hierkd as h
from common.shapes import NOVEL
from torchvision.ops import box_iou
model, _ = h.load(sys.argv[1])
a = h.follow(h.resolve(h.parse_args(["--data", "shapes", "--eval", sys.argv[1]])), model.arch)
val = h.make_data(a, "val", like=model.arch["base"], novel=model.arch["novel"])
names, named = [n for n in val.classes if n in NOVEL], []
truth, text = val.truth(names, holding=True), h.text_of(model, names)
wanted, ids = {i["id"] for i in truth["images"]}, [val.category_ids[val.classes.index(n)] for n in names]
kept = dict(on_objects=h.Detections(), on_novel=h.Detections())
with torch.no_grad():
    for batch in h.eval_loader(val, 0, 1, 0, False):
        maps = model(h.normalise(batch["images"], batch["sizes"]))
        anchors, level_sizes, counts = h.anchors_of(maps)
        inside = h.cells_inside(batch["sizes"], level_sizes, h.STRIDES)
        owner = h.assign_atss(anchors, counts, batch["boxes"], batch["labels"] >= 0, inside)[0]
        f, labels = model.flatten(maps).f[0], batch["labels"][0]
        novel = torch.tensor([k >= 0 and val.classes[k] in names for k in labels.tolist()])
        for k in novel.nonzero().flatten().tolist():
            if (owner == k).any():
                guess = names[(f[owner == k] @ text.T).mean(0).argmax()]
                true = val.classes[labels[k]]
                named.append([guess == true, *(x == y for x, y in zip(guess.split(), true.split()))])
        if (image := batch["image_ids"][0]) in wanted:
            (height, width), original = batch["sizes"][0].tolist(), batch["original_sizes"][0]
            boxes, scores, found = model.detect(maps, (height, width), [text], count=1000)[0]
            overlap, nearest = box_iou(boxes, batch["boxes"][0][labels >= 0]).max(1)
            on = dict(on_objects=overlap >= 0.5, on_novel=(overlap >= 0.5) & novel[labels >= 0][nearest])
            scale = torch.tensor([original[1] / width, original[0] / height] * 2)
            for name, keep in on.items():
                kept[name].add(image, boxes[keep] * scale, scores[keep], found[keep], ids)
ap = {k: h.class_mean(h.coco_evaluate(truth, list(d)), names, "AP50") for k, d in kept.items()}
print(json.dumps([(torch.tensor(named).float().mean(0) * 100).tolist(), ap]))
"""
CLIP_OF = """
import sys, torch
from common.shapes import make_shapes
from common.tiny import shapes_backbone, shapes_clip
make_shapes(seed=int(sys.argv[1]))
shapes_backbone("tiny16", int(sys.argv[1]))
print(torch.load(shapes_clip(int(sys.argv[1])), weights_only=True)["accuracy"]["novel"])
"""


def prepare(seed, folder):
    novel = float(python(CLIP_OF, seed).split()[-1])
    print(f"seed {seed}: the tiny CLIP names {novel:.1f} % of the novel objects (wanted: 90)", flush=True)


def run(arm, seed, folder):
    out = folder / folder_of(arm)
    result, took = train("hierkd.py", out, ["--no-table", *ARMS[arm], *seeds_of(seed)])
    naming, ap = json.loads(python(NAME_THEM, out / "last.pt").splitlines()[-1])
    row = {k: round(result[k], 3) for k in METRICS} | dict(zip(NAMING, (round(x, 1) for x in naming)))
    row |= {k: round(ap[k], 3) for k in CLEANED}
    return row | took


def report(rows):
    table("ZSD novel, base, GZSD", rows, ARMS, METRICS, "none")
    table("naming, %", rows, ARMS, NAMING, None)
    table("ZSD AP50, cleaned", [r for r in rows if "on_novel" in r], ARMS, CLEANED, None)
    claims(rows, CLAIMS, SEEDS)
    asides(rows, ASIDES)


SEEDS = {arm: range(1, 5 if arm in FEWER else 7) for arm in ARMS}

if __name__ == "__main__":
    Study("hierkd", run, prepare, SEEDS, report).main_program(__doc__)
