"""Readers, transforms, batching and sampling. This file needs no other file of `common`.

Everything random about a training image is drawn from one integer, made of (seed, epoch, image index) by
the sampler. So the pixels of a step do not depend on the number of workers or processes, and a resumed run
sees exactly the images that the uninterrupted run would have seen.
"""
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF


class DataError(Exception):
    """Wrong data: one line that names the file and the entry. Scripts print it and stop."""


def find_coco(root, split):
    """(image folder, instances json) of a COCO-layout root; split is "train" or "val"."""
    root = Path(root)
    images, annotations = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
    for path in (annotations, images):
        if not path.exists():
            raise DataError(f"--data {root}: {path} is missing; COCO 2017 is at https://cocodataset.org/#download "
                            "(--data shapes needs nothing)")
    return images, annotations


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not valid json ({e}); download or export it again") from None


def read_image(path):
    """RGB PIL image; grey and CMYK files are converted. EXIF rotation is ignored, as COCO's boxes do."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: image is missing") from None
    except OSError as e:  # PIL's word for truncated or damaged
        raise DataError(f"{path}: cannot be decoded ({e}); fetch the file again") from None


# COCO's classes of the open-vocabulary literature: the 48 base and 17 novel of Bansal et al. 2018 (15 classes belong to neither), and the
# 15 novel of Rahman et al. 2018 (all the others are base).
BASE_48 = """person, bicycle, car, motorcycle, train, truck, boat, bench, bird, horse, sheep, bear, zebra, giraffe, backpack, handbag, suitcase,
frisbee, skis, kite, surfboard, bottle, fork, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, pizza, donut, chair, bed, toilet, tv,
laptop, mouse, remote, microwave, oven, toaster, refrigerator, book, clock, vase, toothbrush""".replace("\n", " ").split(", ")
NOVEL_17 = """airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup, knife, cake, couch, keyboard, sink,
scissors""".replace("\n", " ").split(", ")
NOVEL_15 = """airplane, train, parking meter, cat, bear, suitcase, frisbee, snowboard, fork, sandwich, hot dog, toilet, mouse, toaster,
hair drier""".replace("\n", " ").split(", ")


class CocoDataset(Dataset):
    """COCO-format boxes. Item: dict with image (3, h, w) uint8, size (h, w), boxes (M, 4), labels (M,), ...

    Labels are 0..K-1 in the order of the category ids, which may have holes. Training drops, and counts in
    `dropped`: crowd boxes, boxes under 1 px or off the image, images without any annotation or with a side
    < 32 px (min_side). Images that have crowd regions only stay, without boxes: they are background.

    image_size: "800" short side; "640,800" one of these per image; "480-800" uniform. The long side is at
    most 1333/800 of the largest of these: 1333 in all three. Keys come from BatchPlan: (index, random seed).

    classes: keep these names only, in the order of their ids, and only images with a box of one (open-vocabulary splits).
    without: names whose images are left out as a whole. captions: a COCO captions json; an item then has a sentence of its image,
    drawn anew at each visit, or "" where the file has none.
    """

    def __init__(self, images, annotations, train, image_size="800", flip=0.5, min_side=32, classes=None, without=(), captions=None):
        self.folder, self.train, self.flip = Path(images), train, flip if train else 0.0
        self.sizes = parse_image_size(image_size)
        if not train:
            self.sizes = [max(self.sizes)]
        self.annotations = Path(annotations)
        raw = read_json(annotations)
        for key in ("images", "annotations", "categories"):
            if key not in raw:
                raise DataError(f"{annotations}: no '{key}' list; this is not COCO instances json")
        categories = sorted(raw["categories"], key=lambda c: c["id"])
        known = {c["id"]: c["name"] for c in categories}
        unknown = sorted({*(classes or ()), *without} - set(known.values()))
        if unknown:
            raise DataError(f"{annotations}: has no class {', '.join(unknown)}")
        if classes is not None:
            categories = [c for c in categories if c["name"] in set(classes)]
        if not categories:
            raise DataError(f"{annotations}: the 'categories' list is empty")
        self.category_ids = [c["id"] for c in categories]
        self.classes = [c["name"] for c in categories]
        label_of = {c: k for k, c in enumerate(self.category_ids)}
        if len(label_of) != len(categories):
            raise DataError(f"{annotations}: a category id occurs twice")
        for i in raw["images"]:
            if not {"id", "file_name", "width", "height"} <= set(i):
                raise DataError(f"{annotations}: image {i.get('id')} lacks id, file_name, width or height")
        info = {i["id"]: i for i in raw["images"]}
        boxes, labels, annotated, excluded = {i: [] for i in info}, {i: [] for i in info}, set(), set()
        self.dropped = {"crowd": 0, "tiny or outside": 0, "images": 0}
        for a in raw["annotations"]:
            where = f"{annotations}: annotation {a.get('id')}"
            if a.get("category_id") not in known:
                raise DataError(f"{where} has category id {a.get('category_id')}, which 'categories' does not list")
            if a.get("image_id") not in info:
                raise DataError(f"{where} has image id {a.get('image_id')}, which 'images' does not list")
            numbers = [v for v in a.get("bbox") or () if isinstance(v, (int, float)) and math.isfinite(v)]
            if len(numbers) != 4 or len(a["bbox"]) != 4:
                raise DataError(f"{where} has bbox {a.get('bbox')}; expected four finite numbers x, y, width, height")
            if known[a["category_id"]] in without:
                excluded.add(a["image_id"])
            if a["category_id"] not in label_of:
                continue
            if classes is None:
                annotated.add(a["image_id"])
            if a.get("iscrowd"):
                self.dropped["crowd"] += 1
                continue
            (x, y, w, h), size = a["bbox"], info[a["image_id"]]
            visible_w = min(x + w, size["width"]) - max(x, 0)
            visible_h = min(y + h, size["height"]) - max(y, 0)
            if w < 1 or h < 1 or visible_w <= 0 or visible_h <= 0 or a.get("area", 1) <= 0:
                self.dropped["tiny or outside"] += 1
                continue
            annotated.add(a["image_id"])
            boxes[a["image_id"]].append((x, y, x + w, y + h))
            labels[a["image_id"]].append(label_of[a["category_id"]])
        self.items = []
        for i, image in info.items():
            small = train and min(image["width"], image["height"]) < min_side
            if small or i in excluded or (i not in annotated and (train or classes is not None)):
                self.dropped["images"] += 1
                continue
            self.items.append((i, image["file_name"], image["height"], image["width"],
                               np.array(boxes[i], np.float32).reshape(-1, 4), np.array(labels[i], np.int64)))
        if not self.items:
            raise DataError(f"{annotations}: no usable image" + (" (training needs annotated ones)" if train else ""))
        on_disk = set(os.listdir(self.folder))  # one listing, not 118,287 look-ups on a network disk
        missing = [name for _, name, *_ in self.items if name not in on_disk and not (self.folder / name).exists()]
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} of {len(self.items)} images are missing, first {missing[0]}")
        self.captions = None
        if captions:
            self.captions = {i: [] for i in info}
            for c in read_json(captions).get("annotations", []):
                if c.get("image_id") in self.captions and str(c.get("caption", "")).strip():
                    self.captions[c["image_id"]].append(str(c["caption"]).strip())
        self.landscape = [w >= h for _, _, h, w, _, _ in self.items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        index, seed = key
        rng = random.Random(seed)
        image_id, name, height, width, boxes, labels = self.items[index]
        image = read_image(self.folder / name)
        if image.size != (width, height):
            raise DataError(f"{self.folder / name}: is {image.size[0]}x{image.size[1]}, but {self.annotations.name} "
                            f"says {width}x{height} for image {image_id}")
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        short = rng.choice(self.sizes) if isinstance(self.sizes, list) else rng.randint(*self.sizes)
        image, (h, w) = resize(image, short, max(self.sizes))
        boxes = torch.from_numpy(boxes) * torch.tensor([w / width, h / height] * 2)  # scaled per axis
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, w)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, h)
        if rng.random() < self.flip:
            image = image.flip(2)
            boxes[:, 0::2] = w - boxes[:, 0::2].flip(1)
        item = dict(image=image, size=(h, w), boxes=boxes, labels=torch.from_numpy(labels),
                    image_id=image_id, original_size=(height, width))
        if self.captions is not None:
            item["caption"] = rng.choice(self.captions[image_id] or [""])
        return item


def parse_image_size(text):
    """"800" -> [800]; "640,800" -> [640, 800] choose one; "480-800" -> (480, 800) uniform."""
    try:
        if "-" in str(text):
            low, high = map(int, text.split("-"))
            if 0 < low <= high:
                return (low, high)
        else:
            sizes = [int(s) for s in str(text).split(",")]
            if min(sizes) > 0:
                return sizes
    except ValueError:
        pass
    raise DataError(f"--image-size {text}: expected a short side as 800, a choice as 640,800 or a range as 480-800")


def resize(image, short, largest=None):
    """Keep-ratio resize: short side `short`, long side at most 1333/800 * `largest`. uint8 (3, H, W) -> (3, h, w), (h, w).

    Bilinear without antialias: what OpenCV does, and what the published weights were trained with (torchvision
    differs from OpenCV by at most one grey level, tests/test_datasets.py).
    """
    height, width = image.shape[1:]
    scale = min(round((largest or short) * 1333 / 800) / max(height, width), short / min(height, width))
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    if (h, w) != (height, width):
        image = TF.resize(image, [h, w], interpolation=TF.InterpolationMode.BILINEAR, antialias=False)
    return image, (h, w)


def collate(items, divisor=32):
    """List of items -> one batch, padded right and bottom to a multiple of `divisor`.

    images (B, 3, H, W) uint8; sizes (B, 2) h, w before padding; boxes (B, M, 4), labels (B, M) with -1 where
    padded and M >= 1; image_ids, original_sizes: lists. uint8 keeps the copy to a GPU four times smaller;
    the detector normalises, and zeroes the padding after that.
    """
    height, width = (-(-max(x["size"][k] for x in items) // divisor) * divisor for k in (0, 1))
    most = max(1, max(len(x["boxes"]) for x in items))
    images = torch.zeros(len(items), 3, height, width, dtype=torch.uint8)
    boxes, labels = torch.zeros(len(items), most, 4), torch.full((len(items), most), -1)
    for b, x in enumerate(items):
        images[b, :, :x["size"][0], :x["size"][1]] = x["image"]
        boxes[b, :len(x["boxes"])] = x["boxes"]
        labels[b, :len(x["labels"])] = x["labels"]
    return dict(images=images, sizes=torch.tensor([x["size"] for x in items]), boxes=boxes, labels=labels,
                image_ids=[x["image_id"] for x in items], original_sizes=[x["original_size"] for x in items],
                captions=[x.get("caption", "") for x in items])


class BatchPlan:
    """Batch sampler: aspect-ratio groups, shuffled, sharded over processes, resumable at any batch.

    One plan is made for the global batch (batch_size * world) and each rank takes its slice: N processes
    with batch B train on the same images, step by step, as one process with batch N * B. Landscape and
    portrait images share no batch, except the last ones of an epoch. Yields lists of (index, seed).
    """

    def __init__(self, landscape, batch_size, rank=0, world=1, seed=0):
        self.landscape, self.batch_size, self.rank, self.world, self.seed = landscape, batch_size, rank, world, seed
        self.epoch = self.start = 0

    def set_epoch(self, epoch, start=0):
        """Continue with batch `start` of `epoch`."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        return -(-len(self.landscape) // (self.batch_size * self.world)) - self.start

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.landscape), generator=generator).tolist()
        total, groups, batches = self.batch_size * self.world, {True: [], False: []}, []
        for i in order:
            group = groups[self.landscape[i]]
            group.append(i)
            if len(group) == total:
                batches.append(group.copy())
                group.clear()
        rest = groups[True] + groups[False]
        while rest:
            last, rest = rest[:total], rest[total:]
            batches.append((last + order * total)[:total])  # an epoch's last batch is filled from its start
        for batch in batches[self.start:]:
            mine = batch[self.rank * self.batch_size:(self.rank + 1) * self.batch_size]
            yield [(i, hash((self.seed, self.epoch, i))) for i in mine]


def train_loader(dataset, batch_size, rank, world, seed, workers, pin):
    """(loader, plan): call plan.set_epoch before each epoch. Workers need no seeds: the keys carry them."""
    plan = BatchPlan(dataset.landscape, batch_size, rank, world, seed)
    # A generator of its own: a loader draws one number per epoch, which must not shift the model's random stream.
    return DataLoader(dataset, batch_sampler=plan, num_workers=workers, collate_fn=collate, pin_memory=pin,
                      persistent_workers=workers > 0, generator=torch.Generator()), plan


def eval_loader(dataset, rank, world, workers, pin):
    """Images rank, rank + world, ...: each exactly once, one at a time, so that no image's result depends on
    which others share its batch (padding reaches GroupNorm) or on the number of processes."""
    keys = [[(i, 0)] for i in range(rank, len(dataset), world)]
    return DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=collate, pin_memory=pin,
                      generator=torch.Generator())
