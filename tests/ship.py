# SPDX-License-Identifier: MIT
"""Makes common/shipped: what a quick start only prepares with, trained on seed 0 of the embedded dataset.

    python tests/ship.py                 # trains all of it anew (25 minutes on 2 cores) and packs it
    python tests/ship.py --check         # trains anew, packs nothing: does it do as well as what is shipped?

No study uses these files: studies have seeds above 0. --retrain of the scripts does without them, too. A
file is found by its name. That of backbones and CLIP holds a hash of their recipe, so that a changed one never
meets an old file; the teacher's holds detector, epochs and seed only: rename it when its recipe changes. test_tiny.py compares the files with their hashes here.
"""
import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import tiny  # noqa: E402

BACKBONES = "tiny8", "tiny16"
TEACHER = "crosskd-gfl_tiny32-e8-s0"
SHIPPED = {  # file: start of its sha256, what was measured when it was made (before packing), spread allowed
    "backbone-tiny8-14c698ad2741": ("20b163aa4ff91557", dict(shape=21.5, colour=79.9), 4),
    "backbone-tiny16-4c87b47fc776": ("e98b04c9d3a7bde4", dict(shape=26.9, colour=82.7), 4),
    "tiny-clip-04ea169bc1d1": ("a8a7ccb6ea6723d7", dict(all=81.6, novel=93.2), 4),
    TEACHER: ("0e636b496db8c090", dict(AP=28.7), 2)}  # packed: 28.6


def digest(name):
    return hashlib.sha256((tiny.SHIPPED / f"{name}.npz").read_bytes()).hexdigest()[:16]


def content_of(path):
    content = torch.load(path, weights_only=True)
    return {k: v for k, v in content.items() if k not in ("format", "checksum")}


def trained_rows(clip):
    """Rows of the tiny CLIP's token table that training has moved; the others only decayed from their start."""
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
    flags = ["--data", "shapes", "--max-iters", "1", "--retrain", "--method", "crosskd"]
    flags += ["--out", cache / "run"]
    shutil.rmtree(cache / "run", ignore_errors=True)
    subprocess.run([sys.executable, "crosskd.py", *map(str, flags)], cwd=ROOT, check=True)
    made[TEACHER] = cache / "teachers" / TEACHER.partition("-")[2] / "best.pt"
    return made


def measured(name, path):
    """What SHIPPED says of a file, of one that was trained anew."""
    if name == TEACHER:
        return dict(AP=json.loads(path.with_name("results.json").read_text())["AP"])
    return content_of(path)["accuracy"]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true")
    p.add_argument("--cache", type=Path, default=ROOT / "runs/ship", help="folder of what is trained; kept")
    a = p.parse_args()
    worse = []
    for name, path in train(a.cache.resolve()).items():
        now, (_, before, spread) = measured(name, path), SHIPPED[name]
        for key, value in before.items():
            print(f"{name} {key}: shipped {value:.1f}, trained anew {now[key]:.1f}")
            worse += [f"{name} {key}"] if abs(now[key] - value) > spread else []
        if not a.check:
            content = content_of(path)
            rows = trained_rows(content) if name.startswith("tiny-clip") else None
            tiny.pack(content, tiny.SHIPPED / f"{name}.npz", rows)
            print(f"{name}: sha256 {digest(name)}")
    if worse:
        raise SystemExit(f"beyond the spread: {', '.join(worse)}")


if __name__ == "__main__":
    main()
