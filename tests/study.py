# SPDX-License-Identifier: MIT
"""What the studies share: the protocol, runs that continue where they were stopped, statistics, tables,
curves.

Protocol. Each seed draws everything anew: training and validation images, backbone, teacher, tiny CLIP,
student. The arms of a seed share all of it, and the order of the data. Settings are those of seed 0, which
is in no table; where a study's own text says so, seeds from 1 had been run under earlier settings before,
and what was seen there may have led to today's. Every finished run is a line of tests/study_NAME.jsonl:
arm, seed, metrics, epochs, steps, seconds (of one CPU thread, the whole command: start, training,
evaluation; without teacher, burn-in, stage I, tiny CLIP; null if a run was killed in between, or on a GPU,
which `gpu` then names), commit (two of them where it was stopped in between), start (hashes of the weights it
was given: teacher, burn-in; a line with others than the seed's is refused, as where a machine was lost in
between; lines of before commit af69913 lack it). Seeds ran on machines of unlike speed, so tables and curves show the seconds of one seed, the first
that has them.

Statistics. A gain is a difference within a seed, its interval Student's t of 95 %. A claim, one per line of
CLAIMS, holds where its interval excludes 0 from above, is REFUTED where it does from below, else not shown,
which says nothing of how near to 0 the gain is; it is interim until all seeds are run that the end of each
study plans. The p beside it (two-sided, paired t test) is Holm's, over all claims of the study: where it is
above 0.05, "holds" or "REFUTED" is of that claim alone. What is printed "beside"
or "at equal seconds", interpolated, is no claim.

    python tests/study_NAME.py [--seeds 1 2 3] [--arms A B] [--jobs 2]    # runs what is missing, reports
    python tests/study_NAME.py --report                                   # tables from the lines that are there
    python tests/study.py                                                 # those of STUDIES.md, of all five
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ENV = os.environ | dict(OMP_NUM_THREADS="1")


# ------------------------------------------------------------------ statistics

def interval(values, level=0.95):
    """(mean, half width of its t interval) of at least two numbers; nan for the half width of one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    error = statistics.stdev(values) / len(values) ** 0.5
    return mean, stats.t.ppf(0.5 + level / 2, len(values) - 1) * error


def p_value(gains):
    """Two-sided p of the t test that the mean gain is 0; 1 for a single gain."""
    if len(gains) < 2 or len(set(gains)) == 1:
        return 1.0 if len(gains) < 2 or gains[0] == 0 else 0.0
    return float(stats.ttest_1samp(gains, 0).pvalue)


def holm(ps):
    """Holm's correction: adjusted p values in the order of `ps`."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, k in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[k]))
        adjusted[k] = worst
    return adjusted


def paired(rows, arm, against, key):
    """Gains of `arm` over `against`, seed by seed, on the seeds that both have."""
    of = {(r["arm"], r["seed"]): r[key] for r in rows if r.get(key) is not None}
    seeds = sorted({s for a, s in of if a == arm} & {s for a, s in of if a == against})
    return [of[arm, s] - of[against, s] for s in seeds]


def said(gains):
    """Mean gain and the half width of its interval, as text; one gain has none."""
    mean, half = interval(gains)
    return f"{mean:+.2f} +- {half:.2f}" if len(gains) > 1 else f"{mean:+.2f}"


# ------------------------------------------------------------------ tables

def table(title, rows, arms, keys, against):
    """Prints a line an arm: means of `keys`, deviation of the first, its gain over `against` (None: none)."""
    width = max(map(len, [*arms, title]))
    head = " ".join(f"{k:>10s}" for k in keys[1:])
    if not any(r["arm"] in arms for r in rows):
        return
    compared = f' {keys[0]} against "{against}": mean, 95 % t' if against else ""
    print(f"\n{title:{width}s} seeds {keys[0]:>10s}   sd {head}   sec. |{compared}")
    for arm in arms:
        mine = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["seed"])
        if not mine:
            continue
        values = {k: [r[k] for r in mine if r.get(k) is not None] for k in keys}
        seconds = next((r["seconds"] for r in mine if r.get("seconds")), math.nan)
        mean_of = lambda k: statistics.fmean(values[k]) if values[k] else float("nan")
        first = values[keys[0]]
        deviation = f"{statistics.stdev(first):4.1f}" if len(first) > 1 else "   -"
        line = f"{arm:{width}s} {len(first):5d} {mean_of(keys[0]):10.2f} {deviation} "
        line += " ".join(f"{mean_of(k):10.2f}" for k in keys[1:]) + f" {seconds:6.0f} |"
        gains = paired(rows, arm, against, keys[0])
        if gains and arm != against:
            line += f" {said(gains):>6s}" + (f" ({len(gains)} seeds)" if len(gains) < len(first) else "")
        print(line)


def verdicts(rows, listed, planned):
    """What each claim of (sentence, arm, against, metric) comes to, a dict each; sentence: expects a gain.
    planned: {arm: its seeds}; there is no verdict before all of them are run. means: of both arms, on the seeds
    that both have. p: Holm's."""
    gains = [paired(rows, *compared) for _, *compared in listed]
    adjusted = holm([p_value(g) for g in gains])  # 1 for what is not run yet
    found = []
    for (sentence, arm, against, key), gain, p in zip(listed, gains, adjusted):
        claim = dict(sentence=sentence, key=key, gains=gain, p=p, verdict="not run")
        if gain:
            mean, half = interval(gain)
            claim["verdict"] = "holds" if mean - half > 0 else "REFUTED" if mean + half < 0 else "not shown"
            if len(gain) < len({*planned[arm]} & {*planned[against]}):
                claim["verdict"] = "interim"
            of = {(r["arm"], r["seed"]): r[key] for r in rows if r.get(key) is not None}
            seeds = [s for a, s in of if a == arm and (against, s) in of]
            claim["means"] = [statistics.fmean(of[a, s] for s in seeds) for a in (arm, against)]
        found.append(claim)
    return found


def claims(rows, listed, planned):
    """Prints `verdicts`, a line each."""
    print()
    for c in verdicts(rows, listed, planned):
        gains = c["gains"]
        if not gains:
            print(f"not run    {c['sentence']}")
            continue
        up = sum(g > 0 for g in gains)
        p = "" if len(gains) < 2 else f", p {c['p']:.3f}" if c["p"] >= 0.001 else ", p < 0.001"
        print(f"{c['verdict']:10s} {c['sentence']}: {c['key']} {said(gains)}{p}, up on {up} of {len(gains)} seeds")


def asides(rows, listed):
    """Prints comparisons that are no claims, made afterwards or beside the question: (arm, against, metric), or
    with the seeds that they are of. No verdict, no p."""
    print()
    for arm, against, key, *seeds in listed:
        gains = paired([r for r in rows if not seeds or r["seed"] in seeds], arm, against, key)
        if gains:
            print(f"beside: {arm}, above {against}: {key} {said(gains)}, {len(gains)} seeds")


def markdown(rows, listed, planned):
    """The claims as STUDIES.md prints them."""
    lines = ["| claim | with | against | gain | seeds | |", "|---|---|---|---|---|---|"]
    for c in verdicts(rows, listed, planned):
        if not (gains := c["gains"]):
            lines.append(f"| {c['sentence']} | | | | 0 | not run |")
            continue
        mean, half = interval(gains)
        gain = f"{mean:+.1f} ± {half:.1f}" if len(gains) > 1 else f"{mean:+.1f}"
        verdict = c["verdict"].lower()
        if verdict in ("holds", "refuted") and c["p"] > 0.05:
            verdict += f", p {c['p']:.2f}"
        high, low = c["means"]
        lines.append(f"| {c['sentence']} | {high:.1f} | {low:.1f} | {gain} | {len(gains)} | {verdict} |")
    return "\n".join(lines)


def seconds_of(rows, lines):
    """{arm: seconds of the first seed that has them} of {label: arms}."""
    rows = sorted((r for r in rows if r.get("seconds")), key=lambda r: -r["seed"])
    took = {r["arm"]: r["seconds"] for r in rows}  # the lowest seed comes last
    return {arm: took.get(arm, math.nan) for arms in lines.values() for arm in arms}


def at_equal_seconds(rows, lines, key):
    """[(seconds, gains)] of the arms of the last line over the first line at the seconds that they take, on the
    seeds that have the arms for it; each seed's first line is interpolated over log seconds, which is fair only
    where that line is nearly flat."""
    of, took = {(r["arm"], r["seed"]): r[key] for r in rows if key in r}, seconds_of(rows, lines)
    plain, *others = lines.values()
    found = []
    for arm in others[-1] if others else ():
        for short, long in zip(plain, plain[1:]):
            mine = [s for a, s in sorted(of) if a == arm and (short, s) in of and (long, s) in of]
            if took[short] <= took[arm] < took[long] and mine:
                share = math.log(took[arm] / took[short]) / math.log(took[long] / took[short])
                found.append((took[arm], [of[arm, s] - (1 - share) * of[short, s] - share * of[long, s] for s in mine]))
    return found


def curve(rows, lines, key, path, title, axis="CPU seconds of the student's run, one thread", between=True):
    """A picture: metric against seconds of one thread. lines: {label: arms from short to long}; each point is
    the mean of the seeds that have every arm, its bar the 95 % t interval of the arm (not of the gain). between:
    prints at_equal_seconds, too."""
    of, took = {(r["arm"], r["seed"]): r for r in rows}, seconds_of(rows, lines)
    seeds = sorted({s for _, s in of})
    print()
    for seconds, gains in at_equal_seconds(rows, lines, key) if between else ():
        print(f"at equal seconds, {seconds:.0f}, interpolated: {key} {said(gains)} ({len(gains)} seeds)")
    seeds = [s for s in seeds if all((a, s) in of for arms in lines.values() for a in arms)]
    if not seeds:
        print("no curve: no seed has all its arms")
        return
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter
    figure, axes = plt.subplots(figsize=(5, 3.2), dpi=100)
    for label, arms in lines.items():
        points = []
        for arm in arms:
            mean, half = interval([of[arm, s][key] for s in seeds])
            points.append((took[arm], mean, 0 if half != half else half))
        print(f"{label:20s}", "; ".join(f"{x:.0f} s {y:.1f}" + (f" +- {e:.1f}" if e else "") for x, y, e in points))
        x, y, bars = zip(*points)
        axes.errorbar(x, y, yerr=bars, marker="o", capsize=3, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(axis)
    axes.set_ylabel(key.replace("_", " "))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    print(f"{len(seeds)} seeds: {path}")


# ------------------------------------------------------------------ runs

def commit():
    """Short hash of HEAD, with + where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    said = []
    for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", "*.py"]):
        said.append(subprocess.run([*git, *words], capture_output=True, text=True).stdout.strip())
    return said[0] + ("+" if said[1] else "")


def gpu():
    """Name of the GPU that runs use here, or None."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


class Failed(SystemExit):
    """A command has failed, or was stopped, after so many CPU seconds."""
    seconds = 0.0


def command(words, cwd=None):
    """Runs it on one thread; (stdout, CPU seconds). Stops the study with the end of stderr if it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, cwd=cwd or ROOT, stdout=out, stderr=err, text=True, env=ENV)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        seconds = usage.ru_utime + usage.ru_stime
        if process.returncode:
            failed = Failed(f"{' '.join(map(str, words))}: {err.read()[-1500:]}")
            failed.seconds = seconds
            raise failed
        return out.read(), seconds


def python(code, *words):
    """stdout of a piece of Python at the root of the project."""
    return command([sys.executable, "-c", code, *map(str, words)])[0]


def train(script, out, flags):
    """results.json of a run of a script on shapes, and what it took: dict(epochs, steps, seconds, commit, start;
    gpu).
    Continued where it was stopped, taken as it is where it is finished, made anew where the flags differ, or
    the files that they name."""
    out, flags = Path(out), [*map(str, flags)]
    said, done, cost = out / "flags.json", out / "results.json", out / "cost.json"
    files = {f: hashlib.sha256(Path(f).read_bytes()).hexdigest()[:16] for f in flags if Path(f).is_file()}
    begun = json.loads(said.read_text()) if said.exists() else {}
    if (begun.get("flags"), begun.get("files")) != (flags, files):
        shutil.rmtree(out, ignore_errors=True)
    if not cost.exists():
        resumed = (out / "last.pt").exists()
        if not resumed:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            begun = dict(flags=flags, files=files, commit=commit(), gpu=gpu())
            said.write_text(json.dumps(begun))
        more = ["--resume"] if resumed else []
        if resumed and "--from" in flags:  # last.pt knows it
            flags = flags[:flags.index("--from")] + flags[flags.index("--from") + 2:]
        words = [sys.executable, script, "--data", "shapes", "--workers", "0", "--log-every", "100", "--out"]
        on = begun.get("gpu") or gpu()
        spent = begun.pop("spent", None if resumed else 0.0)  # before; None: it was killed, and nobody knows
        spent, begun["gpu"] = None if on else spent, on
        said.write_text(json.dumps(begun))
        try:
            _, seconds = command([*words, str(out), *flags, *more])
        except Failed as e:
            if spent is not None:
                said.write_text(json.dumps(begun | dict(spent=spent + e.seconds)))
            raise
        result = json.loads(done.read_text())
        seconds = None if spent is None else round(spent + seconds, 1)
        took = dict(epochs=result["epoch"], steps=result["it"], seconds=seconds)
        now = commit()
        took["commit"] = now if now == begun["commit"] else f"{begun['commit']}, {now}"
        took |= dict(gpu=on) if on else {}
        cost.write_text(json.dumps(took))
    start = {f"{Path(f).parent.name}/{Path(f).name}": key for f, key in files.items()}
    return json.loads(done.read_text()), json.loads(cost.read_text()) | (dict(start=start) if files else {})


class Study:
    """name: of the script. run(arm, seed, folder): trains one arm, returns its row without arm and seed.
    prepare(seed, folder): what the arms of a seed share. arms: {name: the seeds it runs on}; 0 is none of
    them."""

    def __init__(self, name, run, prepare, arms, report):
        self.name, self.run, self.prepare, self.arms, self.report = name, run, prepare, arms, report
        self.path = ROOT / "tests" / f"study_{name}.jsonl"
        self.folder = ROOT / "runs" / f"study_{name}"
        self.stopped = False  # by a command that failed, or that somebody has stopped

    def rows(self):
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def add(self, row):
        mine = [r for r in self.rows() if r["seed"] == row["seed"]]
        if row["arm"] in {r["arm"] for r in mine}:
            return
        for name, key in row.get("start", {}).items():
            if other := [r["arm"] for r in mine if r.get("start", {}).get(name, key) != key]:
                raise Failed(f"{self.name}, seed {row['seed']}: {name} of {row['arm']!r} is not that of "
                             f"{', '.join(other)}; bring that back, or run them again, too")
        with open(self.path, "a") as f:
            f.write(json.dumps(row | dict(commit=row.get("commit") or commit())) + "\n")
        print(time.strftime("%H:%M"), json.dumps(row), flush=True)

    def one_seed(self, seed, arms):
        have = {r["arm"] for r in self.rows() if r["seed"] == seed}
        missing = [arm for arm in arms if arm not in have]
        if not missing or self.stopped:
            return
        folder = self.folder / f"s{seed}"
        try:
            self.prepare(seed, folder)
            for arm in missing:
                self.add(dict(arm=arm, seed=seed, **self.run(arm, seed, folder)))
        except Failed:
            self.stopped = True
            raise

    def main_program(self, doc):
        p = argparse.ArgumentParser(description=doc.split("\n")[0])
        p.add_argument("--seeds", type=int, nargs="+", help="default: those of each arm")
        p.add_argument("--arms", nargs="+", choices=[*self.arms], help="default: those of each seed")
        p.add_argument("--jobs", type=int, default=2, help="seeds at once, one thread each")
        p.add_argument("--report", action="store_true", help="print the tables of what is done")
        a = p.parse_args()
        if a.seeds and min(a.seeds) < 1:
            p.error("--seeds: on seed 0 the settings were chosen; give seeds from 1")
        if not a.report:
            arms = a.arms or [*self.arms]
            seeds = a.seeds or sorted({seed for arm in arms for seed in self.arms[arm]})
            chosen = lambda seed: [arm for arm in arms if a.arms or seed in self.arms[arm]]
            # a seed at a time: a study that is cut off has whole seeds
            with ThreadPoolExecutor(a.jobs) as pool:
                list(pool.map(lambda seed: self.one_seed(seed, chosen(seed)), seeds))
        self.report(self.rows())


def folder_of(arm):
    """A folder's name of an arm."""
    return "".join(c if c.isalnum() else "_" for c in arm)


def seeds_of(seed):
    """Flags that draw everything anew for a seed."""
    return ["--seed", str(seed), "--data-seed", str(seed)]


if __name__ == "__main__":
    for name in ("crosskd", "hierkd", "dkdetr", "prototype_kd", "simple21k"):
        module = __import__(f"study_{name}")
        rows = [json.loads(line) for line in (ROOT / "tests" / f"study_{name}.jsonl").read_text().splitlines()]
        print(f"\n**{name}.py**\n\n{markdown(rows, module.CLAIMS, module.SEEDS)}")
