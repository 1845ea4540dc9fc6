# SPDX-License-Identifier: MIT
"""Makes common/shipped: what a quick start only prepares with, trained on seed 0 of the embedded dataset.

    python tests/ship.py                 # trains all of it anew (about 25 minutes on 2 cores), packs it, measures
    python tests/ship.py --check         # trains anew, packs nothing, compares with what is shipped

No study uses these files: studies have seeds above 0. --retrain of the scripts does without them, too. A
file is found by its name, which holds a hash of the recipe: a changed recipe never meets an old file.
Measured, as shipped / trained anew by another process on another number of threads: see MEASURED, which
--check compares with.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import tiny  # noqa: E402
from common.run import load_checkpoint  # noqa: E402

BACKBONES = "tiny8", "tiny16"
TEACHER = "crosskd-gfl_tiny32-e8-s0"


def content_of(path):
    content = torch.load(path, weights_only=True)
    return {k: v for k, v in content.items() if k not in ("format", "checksum")}


def trained_rows(clip):
    """Rows of the tiny CLIP's token table that training has moved; all others only decayed from their start."""
    name = "token_embedding.weight"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = tiny.tiny_model(**clip["config"]).state_dict()[name]
    now = clip["model"][name]
    decay = (now / start).median()
    return {name: ((now - decay * start).abs().amax(1) > 1e-4).nonzero()[:, 0]}


def train(cache):
    """{name: path} of everything, trained anew in the folder `cache`."""
    os.environ |= dict(DETECTION_CACHE=str(cache), DETECTION_RETRAIN="1")
    made = {}
    for name in BACKBONES:
        path = Path(tiny.shapes_backbone(name))
        made[path.stem] = path
    path = Path(tiny.shapes_clip())
    made[path.stem] = path
    flags = ["--data", "shapes", "--max-iters", "1", "--retrain", "--method", "crosskd", "--out", cache / "run"]
    subprocess.run([sys.executable, "crosskd.py", *map(str, flags)], cwd=ROOT, check=True)
    made[TEACHER] = cache / "teachers" / TEACHER.partition("-")[2] / "best.pt"
    return made


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true")
    p.add_argument("--cache", type=Path, default=ROOT / "runs/ship", help="folder of what is trained; kept")
    a = p.parse_args()
    for name, path in train(a.cache.resolve()).items():
        file = tiny.SHIPPED / f"{name}.npz"
        if not a.check:
            content = content_of(path)
            tiny.pack(content, file, trained_rows(content) if name.startswith("tiny-clip") else None)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        print(f"{file.name}: {file.stat().st_size:,} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
