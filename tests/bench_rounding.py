# SPDX-License-Identifier: MIT
"""How far rounding alone moves a short run: python tests/bench_rounding.py [--out runs/rounding]

Teacher and students of crosskd.py's quick start, seed 0, with AVX-512 or AVX2 kernels, on one or two threads:
the same equations, images and order, other sums. An hour on 2 cores; continued where it was stopped.

Measured (AMD EPYC with AVX-512, torch 2.14): AP of AVX-512 on 1 and 2 threads, AVX2 on 1 and 2.
    alone    11.5  11.3  12.3  11.7
    CrossKD  16.3  16.9  16.9  17.3
Teacher, on an Intel Xeon with AVX-512 (the shipped one, of that EPYC, has 28.7): 25.7  26.4  26.7  -
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = dict(teacher=["none", "--student", "gfl_tiny32", "--epochs", "8"], alone=["none", "--student", "gfl_tiny16"],
            CrossKD=["crosskd", "--student", "gfl_tiny16"])
KERNELS = {"AVX-512": {}, "AVX2": dict(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")}

p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
p.add_argument("--out", type=Path, default=ROOT / "runs/rounding")
out = p.parse_args().out.resolve()
found = {}
for name, words in RUNS.items():
    for kernels, more in KERNELS.items():
        for threads in ("1", "2"):
            folder = out / f"{name}-{kernels}-{threads}"
            if not (folder / "results.json").exists():
                flags = ["--data", "shapes", "--workers", "0", "--method", *words]
                again = ["--resume"] if (folder / "last.pt").exists() else []
                subprocess.run([sys.executable, "crosskd.py", *flags, "--out", folder, *again], cwd=ROOT, check=True,
                               env=os.environ | more | dict(OMP_NUM_THREADS=threads), stdout=subprocess.DEVNULL)
            found[name, kernels, threads] = json.loads((folder / "results.json").read_text())["AP"]
            print(f"{name:8s} {kernels:8s} {threads} threads: AP {found[name, kernels, threads]:.1f}", flush=True)
for name in RUNS:
    values = [v for (n, *_), v in found.items() if n == name]
    print(f"{name:8s} {min(values):.1f} to {max(values):.1f}")
