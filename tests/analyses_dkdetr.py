# SPDX-License-Identifier: MIT
"""How a detector of dkdetr.py names the novel objects of shapes: python tests/analyses_dkdetr.py last.pt ...

AP50 mixes two things: which novel name an object gets, and whether it stands out from all else. Here each
novel object of the validation images is asked for its name alone: of the query whose box overlaps it most (IoU
0.5 at least), the nearest of the 8 novel names. Printed: how many objects have such a query, and on how many
of these, in %, the name is right (chance 12.5), its colour (25), its shape (50).

Measured, on 173 to 181 objects: name, colour, shape of runs as study_dkdetr.py's; those of seeds 3 and 4 made anew
on a CPU, its rows of these are of a GPU.
    seed  none              SKD and RKD       distilled on object queries
    2     15.3  22.2  68.8  17.3  25.7  69.8  39.0  46.3  84.2
    3     12.7  22.5  66.5  37.9  44.3  78.7  47.7  64.4  75.3
    4     17.7  24.9  74.6  37.6  44.4  81.5  not run
Seed 2 also: SKD 14.2, RKD 18.5, SKD with L1 14.9, crops of other images 15.3; 16 epochs, without and with both, 15.6
and 21.5.
"""
import argparse
import sys
from pathlib import Path

import torch
from torchvision.ops import box_convert, box_iou

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dkdetr  # noqa: E402
from common.shapes import NOVEL  # noqa: E402


@torch.no_grad()
def naming(weights):
    """(n, 3) bool of the n novel objects that some query overlaps: name, colour, shape right."""
    model, classes = dkdetr.load(weights, "--eval")
    args = dkdetr.follow(dkdetr.parse_args(["--data", "shapes", "--eval", weights]), model, classes)
    val = dkdetr.make_data(args, "val")
    text, right = dkdetr.text_of(model, NOVEL), []
    for batch in dkdetr.eval_loader(val, 0, 1, 0):
        size, labels = batch["sizes"][0], batch["labels"][0]
        out = model(dkdetr.normalise(batch["images"], batch["sizes"]), batch["sizes"])
        boxes = box_convert(out.boxes[-1][0], "cxcywh", "xyxy") * size.flip(0).repeat(2)
        guess = dkdetr.classify(out.features[-1][0], text).argmax(1)
        overlap, query = box_iou(batch["boxes"][0][labels >= 0], boxes).max(1)
        for label, iou, q in zip(labels[labels >= 0].tolist(), overlap.tolist(), query.tolist()):
            if iou >= 0.5 and (true := val.classes[label]) in NOVEL:
                name = NOVEL[guess[q]]
                right.append([name == true, *(a == b for a, b in zip(name.split(), true.split()))])
    return torch.tensor(right).view(-1, 3)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("weights", nargs="+")
    for path in p.parse_args().weights:
        found = naming(path)
        name, colour, shape = (100 * found.float().mean(0)).tolist()
        print(f"{path}: {len(found)} objects, name {name:.1f}, colour {colour:.1f}, shape {shape:.1f}", flush=True)
