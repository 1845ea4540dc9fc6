"""CrossKD's claim on the embedded dataset: python tests/study_crosskd.py [--seeds 1 2 3] [--jobs 2]

One teacher; every arm is a student of the same size, data order and start per seed. Each finished run is one line
of tests/study_crosskd.jsonl, so the study continues where it was stopped; at the end (or with --report) the table.
Arms as in the paper: Tables 1 (position i and prediction mimicking), 2 (feature imitation) and 6 (combination).
The schedule was fixed on seed 0, which is not in the table.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "study_crosskd.jsonl"
ARMS = {  # name: flags; the number is the paper's AP (GFL R50 -> R18 on COCO), for the order only
    "baseline": (["--method", "none"], 35.8),
    "mimicking (i = n)": (["--method", "mimic"], 37.8),
    "PKD": (["--method", "pkd"], 38.0),
    "CrossKD, i = 0": (["--method", "crosskd", "--kd-layer", "0"], 38.2),
    "CrossKD, i = 3": (["--method", "crosskd"], 38.7),
    "CrossKD + PKD": (["--method", "crosskd+pkd"], None),
}


def run(arm, seed, threads):
    out = ROOT / "runs" / "study_crosskd" / f"{arm.replace(' ', '').replace(',', '_')}-s{seed}"
    flags = ["--data", "shapes", "--teacher", teacher_path(), "--student", "gfl_tiny8", *ARMS[arm][0], "--seed", str(seed), "--workers", "0",
             "--log-every", "100", "--out", str(out)]
    since = time.time()
    resume = ["--resume"] if (out / "last.pt").exists() else []
    if not resume and out.exists():
        for f in out.iterdir():
            f.unlink()
    r = subprocess.run([sys.executable, "crosskd.py", *flags, *resume], cwd=ROOT, capture_output=True, text=True,
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if r.returncode:
        raise SystemExit(f"{arm}, seed {seed}: {r.stderr[-800:]}")
    m = json.loads((out / "results.json").read_text())
    row = dict(arm=arm, seed=seed, seconds=round(time.time() - since), flags=" ".join(ARMS[arm][0]), **{k: m[k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl")})
    with open(RESULTS, "a") as f:
        f.write(json.dumps(row) + "\n")
    print(f"{arm:20s} seed {seed}: AP {row['AP']:.1f} AP50 {row['AP50']:.1f} ({row['seconds']} s)", flush=True)


def teacher_path():
    return str(ROOT / "data" / "teachers" / "gfl_tiny32-s0" / "best.pt")


def rows():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def report():
    teacher = Path(teacher_path()).parent / "results.json"
    if teacher.exists():
        m = json.loads(teacher.read_text())
        print(f"teacher gfl_tiny32: AP {m['AP']:.1f} AP50 {m['AP50']:.1f}")
    done = rows()
    base = {r["seed"]: r["AP"] for r in done if r["arm"] == "baseline"}
    print(f"\n{'student gfl_tiny8':20s} {'seeds':>5s} {'AP mean':>8s} {'sd':>5s} {'AP50':>6s} {'AP75':>6s}   paired difference to the baseline, per seed   (paper's AP)")
    for arm, (_, paper) in ARMS.items():
        mine = sorted((r for r in done if r["arm"] == arm), key=lambda r: r["seed"])
        if not mine:
            continue
        ap = [r["AP"] for r in mine]
        gain = [r["AP"] - base[r["seed"]] for r in mine if r["seed"] in base]
        mean = lambda k: statistics.mean(r[k] for r in mine)
        print(f"{arm:20s} {len(ap):5d} {statistics.mean(ap):8.2f} {statistics.stdev(ap) if len(ap) > 1 else 0:5.2f} {mean('AP50'):6.1f} {mean('AP75'):6.1f}   "
              f"{statistics.mean(gain):+.2f} ({', '.join(f'{g:+.1f}' for g in gain)})   {f'({paper})' if paper else ''}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    p.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    p.add_argument("--report", action="store_true", help="print the table of what is done")
    a = p.parse_args()
    if not a.report:
        if not Path(teacher_path()).exists():  # a run of one step trains and caches the teacher
            subprocess.run([sys.executable, "crosskd.py", "--data", "shapes", "--method", "crosskd", "--max-iters", "1", "--out", "runs/study_crosskd/first"], cwd=ROOT, check=True)
        have = {(r["arm"], r["seed"]) for r in rows()}
        with ThreadPoolExecutor(a.jobs) as pool:
            list(pool.map(lambda x: run(*x, threads=1), [(arm, s) for s in a.seeds for arm in a.arms if (arm, s) not in have]))
    report()
