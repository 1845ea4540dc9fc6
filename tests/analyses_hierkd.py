# SPDX-License-Identifier: MIT
"""HierKD's analyses, run by hand: Table 1 (recall of novel boxes), Table 9 (CLIP on true boxes), Fig. 4.

    torchrun --nproc_per_node 4 tests/analyses_hierkd.py rpn --batch-size 4   # trains it on base boxes only
    python tests/analyses_hierkd.py bound --data data/coco                    # no training
    python tests/analyses_hierkd.py heat --predict photo.jpg --weights runs/hierkd/best.pt --classes cat

The flags are those of hierkd.py; those that it does not need here have no effect. On COCO not run.
"""
import argparse
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import hierkd  # noqa: E402
from common.datasets import collate, eval_loader, parse_image_size, read_image, resize  # noqa: E402
from common.evaluation import class_agnostic_recall, class_mean, coco_evaluate, to_coco_results  # noqa: E402
from common.run import UserError, answer_folder, fast_layout, gather, seed_all, started, to_device  # noqa: E402


# ------------------------------------------------------------------ Table 1

class BaseRPN(nn.Module):
    """torchvision's class-agnostic region proposal network on an FPN of C2..C5."""

    def __init__(self, backbone, init, channels):
        super().__init__()
        self.arch = dict(rpn=True, backbone=backbone, channels=channels)
        self.body, widths = hierkd.make_body(backbone, init)
        self.body.returned = "layer1", *self.body.returned
        widths = [widths[0] // 2, *widths]
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool())
        anchors = AnchorGenerator(tuple((size,) for size in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
        count = dict(training=1000, testing=1000)
        self.rpn = RegionProposalNetwork(anchors, RPNHead(channels, 3), 0.7, 0.3, 256, 0.5, count, count, 0.7)

    def forward(self, x, sizes=None, boxes=None, amp=False):
        """-> (proposals of each image, best first, {name: loss}, empty without boxes); without sizes raw
        predictions. bf16 up to the FPN: torchvision's anchors have the maps' dtype."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            maps = self.fpn(self.body(x))
        if sizes is None:
            return self.rpn.head(list(maps.values()))
        targets = None if boxes is None else [dict(boxes=b) for b in boxes]
        images = ImageList(x, [tuple(size) for size in sizes.tolist()])
        return self.rpn(images, {k: hierkd.fp32(m) for k, m in maps.items()}, targets)


class RPNLearner(nn.Module):
    """The RPN and its losses, as hierkd.Distiller: forward(batch) -> {name: loss}."""

    def __init__(self, model, amp):
        super().__init__()
        self.model, self.amp, self.watch, self.draws = model, amp, {}, 0

    def forward(self, batch):
        x = hierkd.normalise(batch["images"], batch["sizes"])
        boxes = [b[k >= 0] for b, k in zip(batch["boxes"], batch["labels"])]
        losses = self.model(x, batch["sizes"], boxes, self.amp)[1]
        return dict(objectness=losses["loss_objectness"], box=losses["loss_rpn_box_reg"])


@torch.no_grad()
def measure_recall(model, val, rank, world, device, args, clip, most=(100, 300, 1000), ious=(0.5, 0.75)):
    """(recall of novel boxes by an RPN that has seen base boxes only, None) on rank 0, else (None, None).
    Among the best `most` proposals, at each IoU, one proposal a box; classes are ignored."""
    if val is None:
        return None, None
    model.eval()
    since, names = time.time(), [n for n in val.classes if n not in model.arch["base"]]
    truth, results = val.truth(names, holding=True), []
    wanted = {i["id"] for i in truth["images"]}
    if not wanted:
        raise UserError(f"{val.annotations}: has no box of a novel class, and this evaluation is about them")
    loader = eval_loader(val, rank, world, args.workers)
    for batch in tqdm(loader, desc="recall", disable=rank != 0, leave=False, mininterval=1):
        if batch["image_ids"][0] in wanted:
            batch = to_device(batch, device)
            x = hierkd.normalise(batch["images"], batch["sizes"])
            boxes = model(x, batch["sizes"], None, args.amp == "bf16")[0][0]
            (h, w), (height, width) = batch["sizes"][0].tolist(), batch["original_sizes"][0]
            boxes = boxes * torch.tensor([width / w, height / h] * 2, device=device)
            scores = torch.arange(len(boxes), 0, -1) / len(boxes)
            labels = torch.zeros(len(boxes), dtype=torch.long)
            results += to_coco_results(batch["image_ids"][0], boxes, scores, labels, [0])
    results = gather(results)
    if rank != 0:
        return None, None
    found = class_agnostic_recall(truth, results, most, ious)
    metrics = {f"AR{n}_{iou}": recall for (iou, n), recall in found.items()}
    metrics |= dict(score=metrics[f"AR{most[-1]}_{ious[0]}"], images=len(wanted), seconds=time.time() - since)
    lines = []
    for iou in ious:
        recall = " ".join(f"@{n} {metrics[f'AR{n}_{iou}']:.1f}" for n in most)
        lines.append(f"novel boxes, IoU {iou}: recall {recall}")
    metrics["line"] = " | ".join(lines)
    return metrics, None


def rpn(flags, rank, world, device):
    """Table 1: hierkd.train() with an RPN in the place of the detector."""
    own = ["--no-ikd", "--no-gkd", "--no-table", "--out", "runs/hierkd-rpn"]
    rate = [] if "shapes" in flags or "--lr" in flags else ["--lr", "0.02"]  # of a total batch of 16
    args = hierkd.resolve(hierkd.parse_args([*own, *rate, *flags]))

    def make_pair(args, data, rank, world, device):
        seed_all(args.seed)
        student = BaseRPN(args.backbone, args.init, 64 if args.backbone.startswith("tiny") else 256)
        student.arch |= dict(image_size=args.image_size, data=args.data, base=data.classes)
        if rank > 0:
            seed_all(args.seed + rank)
        return student.to(device), None

    def prepare(args, data, val, student, teacher, rank, world, device):
        fast_layout(student, device)
        return RPNLearner(student, args.amp == "bf16").train()

    def reported(args, distiller):
        return dict(every=args.epochs if args.data == "shapes" else None, metric="novel AR1000", report="last")

    def method_of(args):
        return "RPN, trained on base boxes"

    with mock.patch.multiple(hierkd, make_pair=make_pair, prepare=prepare, evaluate=measure_recall,
                             reported=reported, method_of=method_of):
        hierkd.train(args, rank, world, device)


# ------------------------------------------------------------------ Table 9

def bound(flags, rank, world, device):
    """Table 9: each novel object's true box is one detection, named by CLIP among the novel names.

    Crops come from the original file, with CLIP's normalisation, enlarged by --crop-scale. One name a box, so
    AR50 is the mean over classes of the top-1 accuracy.
    """
    from common.pictures import write_results
    args = hierkd.resolve(hierkd.parse_args(["--out", "runs/hierkd-bound", "--no-table", *flags]))
    scale = args.crop_scale if "--crop-scale" in flags else 1.0
    answer_folder(args.out, rank)
    val = hierkd.make_data(args, "val", like=[] if args.val_json else None)
    split = "own" if args.val_json else args.split
    novel = hierkd.class_split(split, val.classes, [] if args.val_json else None,
                               *hierkd.given_names(args)[::-1])[1]
    names = [n for n in val.classes if n in novel]
    ids = [val.category_ids[val.classes.index(n)] for n in names]
    truth, results = val.truth(names, holding=True), []
    if not truth["images"]:
        raise UserError(f"{val.annotations}: has no box of a novel class, and this evaluation is about them")
    clip = hierkd.get_clip(args.clip, args.data_seed, device)
    text = clip.class_embeddings(names)
    boxes = {i["id"]: [] for i in truth["images"]}
    for a in truth["annotations"]:
        if not a["iscrowd"]:
            x, y, w, h = a["bbox"]
            boxes[a["image_id"]].append((x, y, x + w, y + h))
    for image in tqdm(truth["images"][rank::world], desc="upper bound", disable=rank != 0, mininterval=1):
        path, where = val.folder / image["file_name"], torch.tensor(boxes[image["id"]])
        pixels = TF.pil_to_tensor(read_image(path))[None].to(device)
        size = pixels.shape[2:]
        if tuple(size) != (image["height"], image["width"]):
            raise UserError(f"{path}: is {size[1]}x{size[0]}, but {val.annotations.name} says "
                            f"{image['width']}x{image['height']}")
        owner = torch.zeros(len(where), dtype=torch.long, device=device)
        pixels = hierkd.normalise(pixels, mean_std=clip.grey_levels)
        v = clip.encode_crops(pixels, where.to(device), owner, scale)
        score, label = (100 * v @ text.T).softmax(-1).max(-1)
        results += to_coco_results(image["id"], where, score, label, ids)
    results = gather(results)
    if rank == 0:
        stats = coco_evaluate(truth, results)
        metrics = {key: class_mean(stats, names, key) for key in hierkd.KEYS} | dict(classes=stats["classes"])
        sizes = " ".join(f"{k[-1].upper()} {metrics[k]:.1f}" for k in hierkd.KEYS[2:])
        print(f"CLIP {clip.name} on {len(results)} true boxes of {len(names)} novel classes | "
              f"AR50 {metrics['AR50']:.1f} AP50 {metrics['AP50']:.1f} {sizes}")
        write_results(Path(args.out), metrics, results, val, f"CLIP {clip.name}", None, None)


# ------------------------------------------------------------------ Fig. 4

def heat_map(model, maps, text, size):
    """The classification score p_c of each name at each place, the best of all levels. (K, h, w) in 0..1."""
    score = model.classify(model.flatten(maps).f[0], text).softmax(-1)[:, :-1]
    x, y = torch.meshgrid(torch.arange(size[1]), torch.arange(size[0]), indexing="xy")
    at = torch.stack([x, y], -1).to(score)
    counts, levels = [m.shape[-2] * m.shape[-1] for m in maps["reg"]], []
    for m, level, stride in zip(maps["reg"], score.split(counts), hierkd.STRIDES):
        h, w = m.shape[-2:]
        last = torch.tensor([max(w - 1, 1), max(h - 1, 1)]).to(at)
        where = 2 * at / stride / last - 1  # cell j lies at j * stride
        grid = level.T.reshape(1, -1, h, w)
        levels.append(F.grid_sample(grid, where[None], padding_mode="border", align_corners=True)[0])
    return torch.stack(levels).amax(0)


@torch.no_grad()
def heat(flags, rank, world, device):
    """Fig. 4: one coloured picture a name."""
    from matplotlib import colormaps  # comes with lvis

    from common.pictures import Pictures
    args = hierkd.resolve(hierkd.parse_args(["--out", "runs/hierkd-heat", *flags]))
    if not args.predict:
        raise UserError("heat: needs --predict PHOTO --weights FILE")
    answer_folder(args.out)
    model, classes = hierkd.load(args.weights)
    model.to(device)
    classes = hierkd.class_names(args.classes) if args.classes else classes
    text = hierkd.text_of(model, classes, args.clip)
    shortest = max(parse_image_size(args.image_size or model.arch["image_size"]))
    for picture in Pictures(args.predict, args.out, args.score):
        image, (h, w) = resize(picture.pixels, shortest)
        item = dict(image=image, size=(h, w), boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), image_id=0,
                    original_size=picture.pixels.shape[1:])
        batch = collate([item])
        picture.save(*hierkd.run_detector(model, batch, [text], args.amp)[0], classes)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            maps = model(hierkd.normalise(batch["images"].to(device), batch["sizes"].to(device)))
        scores = heat_map(model, maps, text, (h, w))[None]
        scores = F.interpolate(scores, picture.pixels.shape[1:], mode="bilinear")[0].cpu().numpy()
        for name, score in zip(classes, scores):
            coloured = torch.from_numpy(colormaps["jet"](score)[..., :3]).permute(2, 0, 1) * 255
            picture.write(f"heat_{name}", 0.5 * picture.pixels + 0.5 * coloured)


ANALYSES = dict(rpn=rpn, bound=bound, heat=heat)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("analysis", choices=ANALYSES)
    with started("analyses_hierkd.py") as (rank, world, device):
        first, flags = p.parse_args(sys.argv[1:2]), sys.argv[2:]
        ANALYSES[first.analysis](flags, rank, world, device)


if __name__ == "__main__":
    main()
