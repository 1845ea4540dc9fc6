# SPDX-License-Identifier: MIT
"""Targets, losses, decoding and evaluation together: HierKD's detector learns 16 real photographs by heart.

python tests/overfit_hierkd.py [--epochs 150]: base AP50 on the images it was trained on, expected above 70. IKD and GKD are on. The photographs are
those of overfit_crosskd.py; the names are told apart by the tiny CLIP of shapes, which has never seen them: to tell them apart is enough.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from overfit_crosskd import COCO, ROOT, make_subset

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--image-size", default="144")
    p.add_argument("--epochs", default="150", help="of 4 steps x 4 images")
    p.add_argument("--backbone", default="tiny64")
    a, more = p.parse_known_args()
    sys.path.insert(0, str(ROOT))
    from common.shapes import make_shapes
    from common.tiny import tiny_clip
    root = make_shapes(ROOT / "data")
    with tempfile.TemporaryDirectory() as tmp:
        data, out = Path(tmp) / "data", Path(tmp) / "run"
        boxes = make_subset(data)
        for split in ("train", "val"):
            (data / f"annotations/captions_{split}2017.json").symlink_to(COCO / "annotations/captions_train2017.json")
        subprocess.run([sys.executable, "hierkd.py", "--data", data, "--clip", tiny_clip(root, root.parent / "clip"), "--backbone", a.backbone, "--init", "none",
                        "--image-size", a.image_size, "--epochs", a.epochs, "--batch-size", "4", "--optimizer", "adamw", "--lr", "0.008", "--embed-bias", "zero",
                        "--negatives", "1.0", "--ikd-weight", "0.02", "--gkd-weight", "0.02", "--out", out, *more], cwd=ROOT, check=True)
        m = json.loads((out / "results.json").read_text())
        print(f"{boxes} boxes of all classes: base AP50 {m['base_AP50']:.1f}, AR50 {m['base_AR50']:.1f} on the 16 photographs")
