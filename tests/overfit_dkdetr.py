# SPDX-License-Identifier: MIT
"""Targets, losses, decoding and evaluation together: DK-DETR learns 16 real photographs by heart.

python tests/overfit_dkdetr.py [--epochs 400]: base AP50 on the images it was trained on, expected above 70. SKD and RKD are on in the last 3/7. The
photographs are those of overfit_crosskd.py; the names are told apart by the tiny CLIP of shapes, which has never seen them: to tell them apart is enough.
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
    p.add_argument("--image-size", default="192")
    p.add_argument("--epochs", default="400", help="of 4 steps x 4 images")
    p.add_argument("--backbone", default="tiny32")
    a, more = p.parse_known_args()
    sys.path.insert(0, str(ROOT))
    from common.shapes import make_shapes
    from common.tiny import tiny_clip
    root = make_shapes(ROOT / "data")
    with tempfile.TemporaryDirectory() as tmp:
        data, out = Path(tmp) / "data", Path(tmp) / "run"
        boxes = make_subset(data)
        subprocess.run([sys.executable, "dkdetr.py", "--dataset", "ovcoco", "--data", data, "--clip", tiny_clip(root, root.parent / "clip"), "--templates", "one", "--backbone",
                        a.backbone, "--init", "none", "--image-size", a.image_size, "--jitter", "1", "1", "--dim", "128", "--hidden", "256", "--levels", "3", "--encoder", "2",
                        "--decoder", "3", "--queries", "60", "--dropout", "0", "--crop-fit", "pad", "--kd-min-size", "8", "--epochs", a.epochs, "--batch-size", "4",
                        "--lr", "0.016", "--backbone-lr", "1", "--out", out, *more], cwd=ROOT, check=True)
        m = json.loads((out / "results.json").read_text())
        print(f"{boxes} boxes of all classes: base AP50 {m['base_AP50']:.1f}, AR50 {m['base_AR50']:.1f} on the 16 photographs")
