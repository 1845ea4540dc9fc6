# SPDX-License-Identifier: MIT
"""The claim of simple21k.py on the embedded dataset: python tests/study_simple21k.py [--seeds 1 2 3] [--arms ...]

26 drawn classes have images with labels; 20 of them (base) have boxes, too. Do the other six (novel) get boxes, and by what: the joint training, a stage I before it,
a stage I that is built as the detector (Table 2: full > -reform > -stage I)? Every seed draws its own images. Each finished run is one line of tests/study_simple21k.jsonl, so
the study continues where it was stopped; at the end (or with --report) the table. Schedule and weights are the script's defaults for shapes and were
chosen on seed 0, which is in no table.

The rule, set before the runs: novel AP50 of "full" at least twice that of "boxes only", and at least 10 points above "-stage I, twice as long".

Measured.

`python tests/study_simple21k.py`, raw results in `tests/study_simple21k.jsonl`. 26 drawn classes have 400
labelled images each; 20 of them (base) have boxes, too, on 2,000 images; six (novel: bolt, hourglass,
letter T, letter H, fish, spiral) have none. Per seed (1, 2, 3, in this order in the table) new images and
two stages I of 15 epochs, one as a detector (75.6, 73.1, 73.8 % of the held-out images right), one with
pooling and a linear layer (65.8, 65.2, 68.5 %); stage II 3 epochs (1,485 steps of 4 + 12 images), scored on
300 images of all classes; one thread each, 2 to 5 minutes an arm. Learning rates and sizes were chosen on
seed 0, which is in no row.

| arm | novel AP50 | mean (sd) | full minus this (2 s.e.) | base AP50 | mean | paper, Table 2: AP / base / novel |
|---|---|---|---|---|---|---|
| **full** | 8.4 / 10.0 / 9.4 | 9.3 (0.8) | | 32.1 / 30.7 / 29.3 | 30.7 | 27.6 / 29.1 / 22.8 |
| -reform (`--stage1-head gap`) | 6.3 / 6.9 / 8.8 | 7.3 (1.3) | +2.0 (1.4) | 26.1 / 26.6 / 25.5 | 26.1 | 26.8 / 28.4 / 21.8 |
| -stage I (`--init none`) | 1.4 / 1.5 / 1.4 | 1.4 (0.0) | +7.9 (0.9) | 14.8 / 14.6 / 13.1 | 14.2 | 15.5 / 16.3 / 13.0 |
| -stage I, stage II twice as long | 3.3 / 2.2 / 3.3 | 2.9 (0.6) | +6.4 (1.6) | 20.8 / 18.0 / 17.2 | 18.7 | - |
| stage I, then boxes only (`--cls-ratio 0`) | 4.9 / 3.2 / 2.3 | 3.5 (1.3) | +5.8 (2.3) | 25.5 / 20.5 / 17.5 | 21.2 | - |
| images without scale jitter (`--cls-jitter 1,1`) | 11.0 / 11.9 / 8.2 | 10.4 (1.9) | -1.1 (2.3) | 33.4 / 29.9 / 29.0 | 30.8 | - |
| full, scored by g^ alone (`--fuse 0`) | 8.5 / 10.0 / 9.4 | 9.3 (0.8) | 0.0 | 29.0 / 27.2 / 25.2 | 27.1 | - |
| full, scored by g alone where it knows (`--fuse 1`) | 8.4 / 10.0 / 9.3 | 9.2 (0.8) | 0.0 | 32.9 / 30.8 / 29.4 | 31.0 | - |

| rule, set before the runs | |
|---|---|
| the order of Table 2: full, -reform, -stage I, in base and novel AP50 | holds on 3 of 3 seeds |
| novel AP50 of full at least twice that of boxes only | holds on average, 2.7 times (1.7, 3.1, 4.1); not on seed 1 |
| novel AP50 of full at least 10 points above -stage I twice as long | **not met**: +6.4 (+5.2, +7.8, +6.1), 3.2 times as high |

Reading. **The paper's order is found**: what stage I learnt is worth most, more than twice the time in
stage II; that it is built as a detector is worth 2 points of novel and 5 of base AP50. Joint training is
what keeps it: on boxes alone g^ stands still while the features under it move (base scores suffer with it,
for Eq. 5 mixes in a third of g^: compare the novel columns). The 10 points of the second rule come from
another, easier trial (12 glyphs, 46 to 55 novel AP50); here novel AP50 stays around 10 in all arms: 1.3
million parameters, 26 classes, ten minutes. Scale jitter of the classification images does not help here,
in that trial it was needed: our objects fill more of a detection image (36 to 176 px of 256, mostly on the
level that stage I trained), theirs were half as large as in the labelled images. g^ costs little against g
where both know a class, and Eq. 5 is no better than g alone (30.7 and 31.0). Not run: the two other arms of
the study, more seeds.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "study_simple21k.jsonl"
RUNS = ROOT / "runs" / "study_simple21k"
STAGE1 = {"roi": [], "gap": ["--stage1-head", "gap"]}
ARMS = {  # which stage I, flags of stage II
    "full": ("roi", []),
    "boxes only": ("roi", ["--cls-ratio", "0"]),
    "-reform": ("gap", []),
    "-stage I": (None, ["--init", "none"]),
    "-stage I, twice as long": (None, ["--init", "none", "--epochs", "TWICE"]),
    "images without jitter": ("roi", ["--cls-jitter", "1,1"]),
    "classifier anew": ("roi", ["--reinit-cls"]),
    "foreground from images, too": ("roi", ["--fg-grad-on-cls"]),
}
FUSE = {"full, g^ alone (fuse 0)": "0", "full, g alone where it knows (fuse 1)": "1"}  # the full model, evaluated otherwise
KEYS = "base_AP", "base_AP50", "novel_AP", "novel_AP50"


def script(out, flags):
    r = subprocess.run([sys.executable, "simple21k.py", "--data", "shapes", "--workers", "0", "--log-every", "50", "--out", str(out), *flags], cwd=ROOT, capture_output=True, text=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    if r.returncode:
        raise SystemExit(f"{out}: {r.stderr[-800:]}")
    return json.loads((out / "results.json").read_text())


def train(out, flags):
    """One run, resumed where it was stopped; returns its results.json."""
    if not ((out / "results.json").exists() and (out / "best.pt").exists()):
        if (out / "last.pt").exists():
            return script(out, ["--resume"])
        shutil.rmtree(out, ignore_errors=True)
        return script(out, flags)
    return json.loads((out / "results.json").read_text())


def seeds_of(seed):
    return ["--seed", str(seed), "--data-seed", str(seed)]


def first(head, seed):
    since = time.time()
    m = train(RUNS / f"stage1-{head}-s{seed}", ["--stage", "1", *STAGE1[head], *seeds_of(seed)])
    write(dict(arm=f"stage I, {head}", seed=seed, top1=m["top1"], top5=m["top5"], seconds=round(time.time() - since)))


def run(arm, seed, epochs, started):
    head, flags = ARMS[arm]
    if head:
        started[head, seed].result()
        flags = ["--init", str(RUNS / f"stage1-{head}-s{seed}" / "best.pt"), *flags]
    since, out = time.time(), RUNS / f"{''.join(c if c.isalnum() else '_' for c in arm)}-s{seed}"
    m = train(out, ["--stage", "2", *[str(2 * epochs) if f == "TWICE" else f for f in flags], *seeds_of(seed)])
    write(dict(arm=arm, seed=seed, **{k: m[k] for k in KEYS}, seconds=round(time.time() - since)))
    for name, fuse in FUSE.items() if arm == "full" else ():
        m = script(out.with_name(out.name + f"-fuse{fuse}"), ["--eval", str(out / "last.pt"), "--fuse", fuse, "--data-seed", str(seed)])
        write(dict(arm=name, seed=seed, **{k: m[k] for k in KEYS}))


def write(row):
    if (row["arm"], row["seed"]) not in {(r["arm"], r["seed"]) for r in rows()}:
        with open(RESULTS, "a") as f:
            f.write(json.dumps(row) + "\n")
        print(row, flush=True)


def rows():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report():
    done = {(r["arm"], r["seed"]): r for r in rows()}
    spread = lambda v: 2 * statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else float("nan")
    print(f"\n{'shapes':40s} seeds  base AP  AP50   novel AP  AP50 (2 s.e.)   novel AP50 per seed | full minus this, novel AP50 (2 s.e.)")
    for head in STAGE1:
        acc = [r["top1"] for (a, _), r in done.items() if a == f"stage I, {head}"]
        if acc:
            print(f"{f'stage I, {head}':40s} {len(acc):5d}  top-1 accuracy {statistics.mean(acc):.1f} ({spread(acc):.1f})")
    for arm in (*ARMS, *FUSE):
        mine = [done[k] for k in sorted(done) if k[0] == arm]
        if mine:
            mean = {k: statistics.mean(r[k] for r in mine) for k in KEYS}
            gap = [done["full", r["seed"]]["novel_AP50"] - r["novel_AP50"] for r in mine if ("full", r["seed"]) in done]
            each = ', '.join(f"{r['novel_AP50']:.1f}" for r in mine)
            against = f"{statistics.mean(gap):+6.2f} ({spread(gap):.2f})" if gap and arm != "full" else ""
            print(f"{arm:40s} {len(mine):5d} {mean['base_AP']:8.2f} {mean['base_AP50']:5.1f} {mean['novel_AP']:10.2f} {mean['novel_AP50']:5.1f} "
                  f"({spread([r['novel_AP50'] for r in mine]):.1f})  {each:>20s} | {against}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--arms", nargs="+", default=list(ARMS)[:6], choices=list(ARMS))
    p.add_argument("--epochs", type=int, default=3, help="the script's own number for stage II, of which 'twice as long' is twice")
    p.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    p.add_argument("--report", action="store_true", help="print the table of what is done")
    a = p.parse_args()
    if not a.report:
        sys.path.insert(0, str(ROOT))
        from common.shapes import make_shapes
        for seed in a.seeds:
            make_shapes(ROOT / "data", seed=seed, val=600, labelled=400)
        with ThreadPoolExecutor(a.jobs) as pool:
            have, jobs, started = {(r["arm"], r["seed"]) for r in rows()}, [], {}
            for seed in a.seeds:  # a seed at a time: a study that is cut off has whole seeds
                for head in STAGE1:
                    if any(ARMS[arm][0] == head and (arm, seed) not in have for arm in a.arms):
                        started[head, seed] = pool.submit(first, head, seed)
                jobs += [pool.submit(run, arm, seed, a.epochs, started) for arm in a.arms if (arm, seed) not in have]
            for job in jobs:
                job.result()
    report()
