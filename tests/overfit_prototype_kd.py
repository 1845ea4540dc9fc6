# SPDX-License-Identifier: MIT
"""Targets, losses, prototypes and evaluation together: teacher, then distilled student, learn 16 real photographs by heart.

python tests/overfit_prototype_kd.py [--kind retina] [--epochs 150]: AP50 on the images they were trained on, expected above 80. The photographs are those of
overfit_crosskd.py. The student starts from random weights, so prototypes are of little use at first; all three losses are on.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from overfit_crosskd import ROOT, make_subset

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--kind", choices=("faster", "retina"), default="faster")
    p.add_argument("--image-size", default="144")
    p.add_argument("--epochs", default="150", help="of 4 steps x 4 images")
    p.add_argument("--lr", default="0.004")
    a, more = p.parse_known_args()
    found = {}
    with tempfile.TemporaryDirectory() as tmp:
        data = Path(tmp) / "data"
        boxes = make_subset(data)
        common = ["--data", data, "--image-size", a.image_size, "--epochs", a.epochs, "--batch-size", "4", "--optimizer", "adamw", "--lr", a.lr, "--workers", "0", "--init", "none",
                  "--no-photometric", "--log-every", "50", "--control", "none", "--first-images", "0"]
        for role, width, flags in (("teacher", 32, ["--teacher", "none"]), ("student", 16, ["--teacher", f"{tmp}/teacher/last.pt", *more])):
            subprocess.run([sys.executable, "prototype_kd.py", *map(str, common), "--student", f"{a.kind}_tiny{width}", *flags, "--out", f"{tmp}/{role}"], cwd=ROOT, check=True)
            found[role] = json.loads(Path(tmp, role, "results.json").read_text())
    print(f"overfit {a.kind}, 16 photographs, {boxes} boxes, short side {a.image_size}, {a.epochs} epochs: " +
          ", ".join(f"{role} AP {m['AP']:.1f} AP50 {m['AP50']:.1f}" for role, m in found.items()))
    sys.exit(found["student"]["AP50"] <= 80)
