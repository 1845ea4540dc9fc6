# SPDX-License-Identifier: MIT
"""Kills runs of the five scripts at random moments and compares what they end with with an uninterrupted run, bit by bit. By hand:

    python tests/kills.py                                   # 20 signals a script, one and two processes; 20 kills while files are written
    python tests/kills.py --scripts crosskd --kills 4 --procs 1 --out /tmp/kills

Each round is one line of OUT/kills.jsonl. A run is started, gets SIGKILL, SIGTERM or SIGINT after a random time, is resumed, and so on until it finishes; `writing`
rounds are killed by SIGKILL at a random moment of a random write instead. Equal means: weights, optimizer, random states of last.pt, evaluations, losses.
"""
import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.run import checksum  # noqa: E402

COMMON = "--data shapes --workers 1 --log-every 4 --save-every 5 --max-iters 24".split()
FLAGS = dict(
    crosskd="--method none --student gfl_tiny8 --batch-size 4 --image-size 96",
    hierkd="--backbone tiny8 --batch-size 4 --image-size 96 --no-table",
    dkdetr="--backbone tiny8 --batch-size 4 --burn-in 0 --queries 20 --encoder 1 --decoder 2 --no-table",
    prototype_kd="--teacher none --init none --student faster_tiny8 --batch-size 4 --image-size 96 --no-table",
    simple21k="--stage 2 --init none --backbone tiny8 --batch-size 2 --image-size 128 --no-table")
# In front of the script: at the N-th file that appears whole, die before, in the middle of, or after its bytes are there.
WRITING = """
import os, random, runpy, signal, sys
moment, at = sys.argv[1], int(sys.argv[2])
sys.argv = sys.argv[3:]
count, replace, fsync = [0], os.replace, os.fsync
def die(*a): os.kill(os.getpid(), signal.SIGKILL)
def syncing(fd):
    count[0] += 1
    if count[0] == at and moment == "half":
        os.ftruncate(fd, os.fstat(fd).st_size // 2)
        die()
    if count[0] == at and moment == "before":
        die()
    fsync(fd)
def replacing(a, b):
    replace(a, b)
    if count[0] == at and moment == "after":
        die()
os.fsync, os.replace = syncing, replacing
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(script, out, procs, resume, writing=None):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [*COMMON, *FLAGS[script].split(), "--out", str(out)] + ["--resume"] * resume
    if writing:
        return [sys.executable, "-c", WRITING, *map(str, writing), f"{script}.py", *flags]
    start = [sys.executable] if procs == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(procs), "--master_port", str(port)]
    return [*start, f"{script}.py", *flags]


def result(out):
    """What a run ended with: one checksum each of weights and all else that a resume needs, and of the log."""
    state = torch.load(out / "last.pt", weights_only=True)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    evaluations = [{k: v for k, v in row.items() if k != "seconds"} for row in rows if "loss" not in row]
    return dict(weights=checksum(state["model"]), optimizer=checksum(state["optimizer"]["state"]), rng=checksum(state["rng"]),
                it=state["it"], best=state["best"], evaluations=checksum(evaluations), log=sums(rows))


def sums(rows):
    """{step: sum of the loss up to it} of logged rows, each the mean since the row before: a stop logs a row more."""
    total, before, found = 0.0, 0, {}
    for row in rows:
        if "loss" in row:
            total += row["loss"] * (row["it"] - before)
            before = row["it"]
            found[before] = total
    return found


def equal(got, want):
    """Bit by bit, and at each step that both logged the same sum of losses, to the seven digits of a row."""
    got, want = dict(got), dict(want)
    mine, theirs = got.pop("log"), want.pop("log")
    return got == want and set(theirs) <= set(mine) and all(abs(mine[k] - theirs[k]) < 1e-5 * theirs[k] for k in theirs)


def start(argv, log):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(argv, cwd=ROOT, env=env, start_new_session=True, stdout=log, stderr=log)


def finish(process):
    """Exit status, once it and all its children are gone."""
    code = process.wait(timeout=600)
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    return code


def kill_until_done(script, procs, kills, rng, folder, note):
    """Signals a run of `script` until `kills` of them have hit it; it is started anew when it finishes before that."""
    reference, hit, round_ = folder / f"{script}-p{procs}-whole", 0, 0
    shutil.rmtree(reference, ignore_errors=True)
    since = time.time()
    assert finish(start(command(script, reference, procs, False), open(folder / "whole.txt", "w"))) == 0, (folder / "whole.txt").read_text()[-3000:]
    seconds, truth = time.time() - since, result(reference)
    while hit < kills:
        out, resume, sent = folder / f"{script}-p{procs}-killed", False, []
        began = time.time()
        shutil.rmtree(out, ignore_errors=True)
        while True:
            log = folder / f"{script}-p{procs}-{round_}.txt"
            process = start(command(script, out, procs, resume), open(log, "w"))
            if hit < kills:
                number = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
                deadline = time.time() + rng.uniform(0.2, 0.9) * seconds
                while time.time() < deadline and process.poll() is None:
                    time.sleep(0.02)
                if process.poll() is None:
                    if number == signal.SIGKILL:
                        os.killpg(process.pid, number)
                        while subprocess.run(["pkill", "-KILL", "-f", "--", f"--out {out}"], check=False).returncode == 0:
                            time.sleep(0.1)  # torchrun's children have sessions of their own
                    else:
                        os.kill(process.pid, number)
                    sent.append(number.name)
                    hit += 1
            code = finish(process)
            resume = True
            if "Traceback" in log.read_text() and procs == 1:
                note(dict(script=script, procs=procs, traceback=log.read_text()[-1500:]))
            if code == 0:
                break
        if not sent:  # it was faster than its reference
            seconds = min(seconds, time.time() - began)
        same = equal(result(out), truth)
        note(dict(script=script, procs=procs, signals=sent, equal=same, **({} if same else dict(got=result(out), want=truth))))
        round_ += 1


def kill_while_writing(script, kills, rng, folder, note):
    reference = folder / f"{script}-p1-whole"
    truth = result(reference)
    out, sent, resume, count = folder / f"{script}-writing", [], False, 0
    shutil.rmtree(out, ignore_errors=True)
    while True:
        where = (rng.choice(("before", "half", "after")), rng.randint(1, 7)) if count < kills else None
        log = folder / f"{script}-writing.txt"
        code = finish(start(command(script, out, 1, resume, where), open(log, "w")))
        resume = (out / "last.pt").exists() or (out / "log.jsonl").exists()
        if code == -signal.SIGKILL:
            sent.append(where)
            count += 1
        elif code == 0:
            note(dict(script=script, writing=sent, equal=equal(result(out), truth)))
            if count >= kills:
                return
            sent, resume = [], False
            shutil.rmtree(out)
        else:
            note(dict(script=script, writing=sent, code=code, text=log.read_text()[-1500:]))
            return


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--scripts", nargs="+", default=list(FLAGS))
    p.add_argument("--procs", nargs="+", type=int, default=[1, 2])
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--writing", type=int, default=4, help="kills while files are written, a script")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="runs/kills")
    args = p.parse_args()
    folder = Path(args.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)

    def note(row):
        with open(folder / "kills.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    for script in args.scripts:
        for procs in args.procs:
            kill_until_done(script, procs, args.kills, random.Random(f"{args.seed} {script} {procs}"), folder, note)
        if args.writing:
            kill_while_writing(script, args.writing, random.Random(f"{args.seed} {script}"), folder, note)


if __name__ == "__main__":
    main()
