# SPDX-License-Identifier: MIT
"""Simple-21K's claims on the embedded dataset: python tests/study_simple21k.py [--seeds ...] [--report]

Protocol and statistics: study.py. 26 drawn classes have 400 labelled images each; 20 of them (base) have
boxes, too, on 2,000 images; six (novel: bolt, hourglass, letter T, letter H, fish, spiral) have none. Do
those six get boxes, and by what? Arms as in Table 2: full; a stage I that is no detector (-reform: pooling
and a linear layer); none (-stage I), also with stage II twice as long; and stage II on boxes alone. Each
seed has two stages I, whose lines (metric top1) and seconds are their own; `seconds` of an arm are those of
stage II; stage I takes longer. The last two lines are "full", scored by one of the two classifiers of Eq. 5
alone.

Seeds 1 to 3 had been run before (commit 1dc8396; today's code gives the same numbers to the last digit,
seed 1 and two runs of seed 2; seconds were not CPU time there) and today's claims written after them: seeds
4 to 6 are new, on which alone each claim but "-reform above -stage I on novel classes" (6.5 +- 6.9) comes out
the same. The rule then: "full" twice as high as "boxes only" (9.3 against 3.5: met) and 10 points above
"-stage I, twice as long" (6.4: not met); now, of the means, as then (10.5 against 4.5; 7.9), but neither is
shown: on 3 of 6 seeds it is twice as high. An arm more, no jitter of the labelled images, had 1.1 +- 5.0
more than "full".
"""
import json
import sys

from study import Study, asides, claims, command, folder_of, python, seeds_of, table, train

STAGE1 = {"roi": [], "gap": ["--stage1-head", "gap"]}
ARMS = {  # name: (which stage I, flags of stage II)
    "full": ("roi", []),
    "boxes only": ("roi", ["--cls-ratio", "0"]),
    "-reform": ("gap", []),
    "-stage I": (None, ["--init", "none"]),
    "-stage I, twice as long": (None, ["--init", "none", "--epochs", "6"]),
}
FUSE = {"full, g^ alone": "0", "full, g alone where it knows": "1"}
METRICS = "novel_AP50", "base_AP50", "novel_AP", "base_AP"
CLAIMS = (
    ("full above no stage I", "full", "-stage I", "novel_AP50"),
    ("full above a plain classifier as stage I", "full", "-reform", "novel_AP50"),
    ("the same, base AP50", "full", "-reform", "base_AP50"),
    ("a plain classifier as stage I above none", "-reform", "-stage I", "novel_AP50"),
    ("the same, base AP50", "-reform", "-stage I", "base_AP50"),
    ("full above no stage I, stage II twice as long", "full", "-stage I, twice as long", "novel_AP50"),
    ("full above boxes only", "full", "boxes only", "novel_AP50"),
    ("Eq. 5 above g, of boxes, alone, base AP50", "full", "full, g alone where it knows", "base_AP50"),
    ("Eq. 5 above g^, of image labels, alone, base AP50", "full", "full, g^ alone", "base_AP50"))
ASIDES = ("-reform", "-stage I", "novel_AP50", 4, 5, 6),  # the seeds after the claims


def stage1(head, seed, folder):
    """best.pt of a seed's first stage, with its line in the results."""
    out = folder / f"stage1-{head}"
    result, took = train("simple21k.py", out, ["--stage", "1", *STAGE1[head], *seeds_of(seed)])
    STUDY.add(dict(arm=f"stage I, {head}", seed=seed, top1=round(result["top1"], 3)) | took)
    return out / "best.pt"


def prepare(seed, folder):
    python("import sys; from common.shapes import make_shapes; "
           "make_shapes(seed=int(sys.argv[1]), val=600, labelled=400)", seed)


def run(arm, seed, folder):
    rounded = lambda result: {k: round(result[k], 3) for k in METRICS}
    if arm in FUSE:
        full = run("full", seed, folder)
        out = folder / folder_of(arm)
        command([sys.executable, "simple21k.py", "--data", "shapes", "--workers", "0", "--out", out, "--eval",
                 folder / "full/last.pt", "--fuse", FUSE[arm], "--data-seed", str(seed)])
        return rounded(json.loads((out / "results.json").read_text())) | dict(seconds=None, commit=full["commit"])
    head, flags = ARMS[arm]
    if head:
        flags = ["--init", stage1(head, seed, folder), *flags]
    result, took = train("simple21k.py", folder / folder_of(arm), ["--stage", "2", *flags, *seeds_of(seed)])
    return rounded(result) | took


def report(rows):
    table("stage I", rows, [f"stage I, {head}" for head in STAGE1], ["top1"], "stage I, gap")
    table("3 epochs of stage II", rows, [*ARMS, *FUSE], METRICS, "-stage I")
    claims(rows, CLAIMS, SEEDS)
    asides(rows, ASIDES)


SEEDS = dict.fromkeys([*ARMS, *FUSE], range(1, 7))
STUDY = Study("simple21k", run, prepare, SEEDS, report)

if __name__ == "__main__":
    STUDY.main_program(__doc__)
