# SPDX-License-Identifier: MIT
"""The claim of global knowledge on the embedded dataset: python tests/study_prototype_kd.py [--seeds 1 2 3] [--arms ...]

Does a trained student gain by distillation over the same student trained as long without it; which of the three losses does it; do the prototypes have
to be those of Alg. 1, does the paper's raw feature or the centred one serve, and is it the teacher at all? Every seed draws its own images and trains its
own teacher (all 2,000 images) and student (300 of them); all arms continue from that student, with the same images, flips and RoI seeds. Each finished run is one line of
tests/study_prototype_kd.jsonl, so the study continues where it was stopped; at the end (or with --report) the table. Schedule and weights are the script's
defaults for shapes and were chosen on seed 0, which is in no table.

The rule: AP of an arm minus AP of "continued", paired by seed; a gain counts if it is above two standard errors and has the same sign on all seeds.

Measured.

`python tests/study_prototype_kd.py --teacher-epochs 12`, raw results in `tests/study_prototype_kd.jsonl`.
Faster R-CNN. Per seed (1, 2, 3) new images, a teacher trained on all 2,000 of them (12 epochs) and a
student trained on 300 (608 steps); every arm continues that student on the same 300 images for 304 steps,
with the same order, flips and seeds, one thread, 2 to 4 minutes. The student gets few images so that there
is something to learn from the teacher: on seed 0, with all 2,000 images for both (teacher AP 24.4 after 8
epochs, student 14.9), the same student continued for 496 steps reached 18.4, with all three losses 16.8 and
with the response alone 16.4 (one run each, before the script's last changes): **there distillation took
away**. Rule: mean gain above two standard errors, and of one sign on all seeds.

| arm | AP (sd) | AP50 | AP gain, seeds 1, 2, 3 | mean (2 s.e.) | by the rule |
|---|---|---|---|---|---|
| teacher, faster_tiny32 | 34.4 (1.4) | 55.2 | | | |
| student before, faster_tiny8 | 7.9 (0.1) | 16.0 | | | |
| continued without distillation | 9.4 (0.6) | 18.8 | | | |
| **paper: all three losses** | 10.4 (0.6) | 21.4 | +0.26, +1.55, +1.38 | +1.06 (0.81) | gain |
| global alone (Eq. 6) | 9.3 (0.6) | 18.4 | +0.29, +0.18, -0.72 | -0.08 (0.64) | - |
| feature alone (Eq. 7) | 10.0 (0.7) | 20.1 | +0.39, +0.66, +0.98 | +0.68 (0.34) | gain |
| response alone | 10.3 (1.0) | 21.0 | +1.38, +0.53, +0.77 | +0.89 (0.50) | gain |
| preset released | 10.7 (0.4) | 21.5 | +1.07, +1.68, +1.36 | +1.37 (0.35) | gain |
| global x 10, all classes' prototypes, raw | 9.7 (0.4) | 19.1 | -0.23, +0.83, +0.43 | +0.34 (0.62) | - |
| the same, centred | 9.3 (0.4) | 19.1 | +0.01, +0.68, -0.82 | -0.04 (0.87) | - |
| centred, sigma by the largest cosine | 9.5 (0.3) | 18.9 | +0.11, +0.56, -0.17 | +0.17 (0.42) | - |
| centred, random prototypes | 9.4 (0.9) | 19.1 | -0.35, -0.14, +0.55 | +0.02 (0.54) | - |
| centred, k-means prototypes | 9.4 (0.7) | 19.0 | +0.20, -0.06, -0.03 | +0.04 (0.17) | - |
| centred, untrained teacher | 9.2 (0.4) | 18.9 | -0.44, +0.07, -0.13 | -0.17 (0.29) | - |

Reading. **Distillation as the paper sets it works** (+1.1 AP, +2.6 AP50 over the same student trained as
long without), and most of it is there without prototypes: the class scores alone give +0.9, the features
alone +0.7. (Both are weighed by sigma here; with sigma 1 they were not run.) **The global loss alone does
nothing**, as it must: with the paper's weight 1 it is 0.005 beside a detection loss of 1, half a percent,
and it does not fall in training. Ten times that weight, over the prototypes of all classes, on raw or on
mean-centred features, from Alg. 1, random or k-means, stays within the noise (-0.2 to +0.3, two standard
errors 0.2 to 0.9), and so does an untrained teacher. On centred features the paper's sigma is 0.2 and mutes
20 to 30 % of the objects wholly; with the released code's sigma, the largest cosine, that is lifted and the
gain is still none (+0.2, 0.4). So no ranking of generators (Table 6) can be read from three seeds, and
neither the harm of raw features nor the small gain of centred ones that another trial found with twelve.
`--center` therefore stays off, as in the paper, and the prototypes of Alg. 1 stay the default because they
are the paper's, not because they won. **The released configuration, which has no global loss, is the best
arm** (+1.4 on average, the smallest spread), within the spread of `--preset paper`. Not run: all three
losses centred, the response with sigma 1 (arms of the study), RetinaNet, more seeds.
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
RESULTS = ROOT / "tests" / "study_prototype_kd.jsonl"
RUNS = ROOT / "runs" / "study_prototype_kd"


def only(term, weight):
    """Flags of one loss alone."""
    return [x for name in ("global", "feat", "resp") for x in (f"--alpha-{name}", str(weight if name == term else 0))]


CENTRED = [*only("global", 10), "--center", "--all-class-prototypes", "--level-assign", "fpn"]
ARMS = {
    "continued": ["--teacher", "none"],
    "paper: all three": [],
    "global": only("global", 1),
    "feature": only("feat", 1),
    "response": only("resp", 5),
    "released": ["--preset", "released", "--proto-min-size", "0"],
    "global x 10, raw": [x for x in CENTRED if x != "--center"],
    "global x 10, centred": CENTRED,
    "centred, sigma by max cosine": [*CENTRED, "--sigma", "maxcos"],
    "centred, random": [*CENTRED, "--proto-method", "random"],
    "centred, untrained teacher": [*CENTRED, "--teacher", "UNTRAINED", "--no-teacher-check"],
    "centred, k-means": [*CENTRED, "--proto-method", "kmeans", "--proto-space", "student"],
    "all three, centred": ["--center"],
    "response, sigma 1": [*only("resp", 5), "--sigma", "none"],
}
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def train(out, flags):
    """One run of the script, resumed where it was stopped; returns its results.json."""
    resume = ["--resume"] if (out / "last.pt").exists() else []
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    if not (out / "results.json").exists():
        r = subprocess.run([sys.executable, "prototype_kd.py", "--data", "shapes", "--no-table", "--control", "none", "--workers", "0", "--log-every", "20", "--out", str(out),
                            *flags, *resume], cwd=ROOT, capture_output=True, text=True, env=ENV)
        if r.returncode:
            raise SystemExit(f"{out}: {r.stderr[-800:]}")
    return json.loads((out / "results.json").read_text())


def detector(role, seed, kind, epochs):
    """Teacher, start and an untrained teacher of a seed."""
    common = ["--teacher", "none", "--init", "none", "--data-seed", str(seed), "--seed", str(seed)]
    if role == "teacher":
        m = train(RUNS / f"{kind}-teacher-s{seed}", [*common, "--student", f"{kind}_tiny32", "--first-images", "0", "--epochs", str(epochs)])
        train(RUNS / f"{kind}-untrained-s{seed}", [*common, "--student", f"{kind}_tiny32", "--max-iters", "1"])
    else:
        m = train(RUNS / f"{kind}-start-s{seed}", [*common, "--student", f"{kind}_tiny8", "--epochs", "32"])
    write(dict(arm=role, kind=kind, seed=seed, AP=m["AP"], AP50=m["AP50"], AP75=m["AP75"]))


def write(row):
    if (row["arm"], row["kind"], row["seed"]) not in {(r["arm"], r["kind"], r["seed"]) for r in rows()}:
        with open(RESULTS, "a") as f:
            f.write(json.dumps(row) + "\n")
        print(f"{row['kind']} {row['arm']:28s} seed {row['seed']}: AP {row['AP']:.2f} AP50 {row['AP50']:.2f}", flush=True)


def run(arm, seed, kind, started):
    for s in started:
        s.result()
    since, out = time.time(), RUNS / f"{kind}-{''.join(c if c.isalnum() else '_' for c in arm)}-s{seed}"
    folder = lambda role: str(RUNS / f"{kind}-{role}-s{seed}" / "last.pt")
    teacher = [] if "--teacher" in ARMS[arm] and arm == "continued" else ["--teacher", folder("teacher")]
    flags = [*teacher, "--init", folder("start"), *[folder("untrained") if x == "UNTRAINED" else x for x in ARMS[arm]], "--seed", str(seed), "--data-seed", str(seed)]
    m = train(out, flags)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [r for r in log if "loss" in r]
    terms = {f"{k}_{when}": round(losses[i][k], 4) for k in ("global", "feat", "resp", "sigma", "muted") if k in losses[-1] for i, when in ((0, "first"), (-1, "last"))}
    kept = [r["kept"] for r in log if r.get("kept", -1) >= 0]
    write(dict(arm=arm, kind=kind, seed=seed, AP=m["AP"], AP50=m["AP50"], AP75=m["AP75"], seconds=round(time.time() - since), flags=" ".join(ARMS[arm]), det_last=round(
        sum(losses[-1][k] for k in ("cls", "box", "rpn_cls", "rpn_box") if k in losses[-1]), 4), **terms, **({"kept": round(statistics.mean(kept), 3)} if kept else {})))


def rows():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report(kind):
    done = {(r["arm"], r["seed"]): r for r in rows() if r["kind"] == kind}
    print(f"\n{'shapes, ' + kind:32s} {'seeds':>5s} {'AP':>6s} {'sd':>4s} {'AP50':>6s} | AP - continued: mean (2 s.e.), per seed | AP50 - continued | by the rule")
    for arm in ("teacher", "start", *ARMS):
        mine = [done[k] for k in sorted(done) if k[0] == arm]
        if not mine:
            continue
        gain = {k: [r[k] - done["continued", r["seed"]][k] for r in mine if ("continued", r["seed"]) in done] for k in ("AP", "AP50")}
        error = 2 * statistics.stdev(gain["AP"]) / len(gain["AP"]) ** 0.5 if len(gain["AP"]) > 1 else float("nan")
        up = gain["AP"]
        verdict = "gain" if len(up) > 1 and statistics.mean(up) > error and min(up) > 0 else "loss" if len(up) > 1 and -statistics.mean(up) > error and max(up) < 0 else "-"
        show = f"{statistics.mean(gain['AP']):+6.2f} ({error:.2f}) {', '.join(f'{v:+.2f}' for v in gain['AP']):>22s} | {statistics.mean(gain['AP50']):+6.2f} | {verdict}" if gain["AP"] and arm not in ("teacher", "start", "continued") else ""
        ap = [r["AP"] for r in mine]
        print(f"{arm:32s} {len(mine):5d} {statistics.mean(ap):6.2f} {statistics.stdev(ap) if len(ap) > 1 else 0:4.2f} {statistics.mean(r['AP50'] for r in mine):6.2f} | {show}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    p.add_argument("--kind", choices=("faster", "retina"), default="faster")
    p.add_argument("--teacher-epochs", type=int, default=16)
    p.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    p.add_argument("--report", action="store_true", help="print the table of what is done")
    a = p.parse_args()
    if not a.report:
        with ThreadPoolExecutor(a.jobs) as pool:
            have = {(r["arm"], r["kind"], r["seed"]) for r in rows()}
            made = {s: [pool.submit(detector, role, s, a.kind, a.teacher_epochs) for role in ("teacher", "start")] for s in a.seeds}  # first in the queue
            list(pool.map(lambda x: run(x[0], x[1], a.kind, made[x[1]]), [(arm, s) for arm in a.arms for s in a.seeds if (arm, a.kind, s) not in have]))
    report(a.kind)
