"""Readers, transforms, batching and sampling. This file needs no other file of `common`.

Everything random about a training image is drawn from one integer, made of (seed, epoch, image index) by
the sampler. So the pixels of a step do not depend on the number of workers or processes, and a resumed run
sees exactly the images that the uninterrupted run would have seen.
"""
import gzip
import io
import json
import math
import os
import random
import tarfile
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import RandomPhotometricDistort, functional as TF
from tqdm import tqdm


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


def find_lvis(root, split, images="data/coco"):
    """(image folder, json) of LVIS v1: its images are COCO's, which of train2017 and val2017 stands in each image's coco_url."""
    annotations = Path(root) / "annotations" / f"lvis_v1_{split}.json"
    if not annotations.exists():
        raise DataError(f"--data {root}: {annotations} is missing; LVIS v1 is at https://www.lvisdataset.org/dataset (--data shapes needs nothing)")
    if not Path(images).is_dir():
        raise DataError(f"--images {images}: no such folder; LVIS uses COCO's images, it should hold train2017 and val2017")
    return Path(images), annotations


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not valid json ({e}); download or export it again") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None


def read_coco(path):
    """Content of a COCO-format json (instances, LVIS, Objects365) whose three lists are there and whose categories have id and name."""
    raw = read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw, dict) or not isinstance(raw.get(key), list):
            raise DataError(f"{path}: no '{key}' list; this is not COCO instances json")
    for c in raw["categories"]:
        if not isinstance(c, dict) or not {"id", "name"} <= set(c):
            raise DataError(f"{path}: category {c} lacks id or name")
    return raw


def read_image(path, content=None):
    """RGB PIL image; grey and CMYK files are converted. EXIF rotation is ignored, as COCO's boxes do. content: the file's bytes, if they are at hand."""
    try:
        content = Path(path).read_bytes() if content is None else content
        if content[:2] == b"\x1f\x8b":  # some files of ImageNet-21K are gzip-compressed JPEGs
            content = gzip.decompress(content)
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: image is missing") from None
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error) as e:  # PIL's and gzip's words for truncated or damaged
        raise DataError(f"{path}: cannot be decoded ({e}); fetch the file again") from None
    except Image.DecompressionBombError as e:
        raise DataError(f"{path}: is larger than Pillow reads ({e}); scale it down first") from None


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
    canvas: instead of image_size, large-scale jitter (Ghiasi et al. 2021): the long side becomes jitter (low, high) times canvas, then a random
    window of at most canvas x canvas; in validation the long side becomes canvas. masks: items have `masks`, see window_masks. hidden: names
    whose boxes go to `hidden` (H, 4), never to boxes: for oracles. originals: items have the file's pixels and the window (6,) that was cut.
    annotations may be LVIS v1's json. raw: its content, if that is read already. photometric: colours are distorted, as SSD does.
    """

    def __init__(self, images, annotations, train, image_size="800", flip=0.5, min_side=32, classes=None, without=(), captions=None,
                 canvas=None, jitter=(0.1, 2.0), masks=False, hidden=(), originals=False, raw=None, photometric=False):
        self.folder, self.train, self.flip = Path(images), train, flip if train else 0.0
        self.sizes = parse_image_size(image_size)
        if not train:
            self.sizes = [max(self.sizes)]
        self.canvas, self.jitter, self.with_masks, self.originals = canvas, jitter, masks, originals
        self.distort = RandomPhotometricDistort() if photometric else None
        self.annotations = Path(annotations)
        raw = raw or read_coco(annotations)
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
            if not {"id", "width", "height"} <= set(i) or not {"file_name", "coco_url"} & set(i):
                raise DataError(f"{annotations}: image {i.get('id')} lacks id, width, height or file_name")
        info = {i["id"]: i for i in raw["images"]}
        boxes, labels, annotated, excluded = {i: [] for i in info}, {i: [] for i in info}, set(), set()
        outlines, unseen = {i: [] for i in info if masks}, {i: [] for i in info if hidden}
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
            if known[a["category_id"]] in hidden and not a.get("iscrowd"):
                x, y, w, h = a["bbox"]
                unseen[a["image_id"]].append((x, y, x + w, y + h))
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
            if masks:
                if not a.get("segmentation"):
                    raise DataError(f"{where} has no segmentation, which masks need")
                outline = a["segmentation"]
                outlines[a["image_id"]].append(outline if isinstance(outline, dict) else [np.array(p, np.float32) for p in outline])
        self.items, self.outlines, self.hidden = [], outlines, {i: np.array(b, np.float32).reshape(-1, 4) for i, b in unseen.items()}
        for i, image in info.items():
            small = train and min(image["width"], image["height"]) < min_side
            if small or i in excluded or (i not in annotated and (train or classes is not None)):
                self.dropped["images"] += 1
                continue
            name = image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:])
            self.items.append((i, name, image["height"], image["width"],
                               np.array(boxes[i], np.float32).reshape(-1, 4), np.array(labels[i], np.int64)))
        if not self.items:
            raise DataError(f"{annotations}: no usable image" + (" (training needs annotated ones)" if train else ""))
        listed = {folder: set(os.listdir(self.folder / folder)) if (self.folder / folder).is_dir() else () for folder in {str(Path(name).parent) for _, name, *_ in self.items}}
        missing = [name for _, name, *_ in self.items if Path(name).name not in listed[str(Path(name).parent)]]  # not 118,287 look-ups on a network disk
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} of {len(self.items)} images are missing, first {missing[0]}")
        self.captions = None
        if captions:
            self.captions = {i: [] for i in info}
            for c in read_json(captions).get("annotations", []):
                if c.get("image_id") in self.captions and str(c.get("caption", "")).strip():
                    self.captions[c["image_id"]].append(str(c["caption"]).strip())
        self.repeats = None  # per image: how often it stands in an epoch
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
        if self.canvas:
            return self.jittered(index, image, rng)
        short = rng.choice(self.sizes) if isinstance(self.sizes, list) else rng.randint(*self.sizes)
        image, (h, w) = resize(image, short, max(self.sizes))
        boxes = torch.from_numpy(boxes) * torch.tensor([w / width, h / height] * 2)  # scaled per axis
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, w)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, h)
        if rng.random() < self.flip:
            image = image.flip(2)
            boxes[:, 0::2] = w - boxes[:, 0::2].flip(1)
        if self.distort:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator
                torch.manual_seed(rng.getrandbits(62))
                image = self.distort(image)
        item = dict(image=image, size=(h, w), boxes=boxes, labels=torch.from_numpy(labels),
                    image_id=image_id, original_size=(height, width))
        if self.captions is not None:
            item["caption"] = rng.choice(self.captions[image_id] or [""])
        return item

    def jittered(self, index, image, rng):
        """An item under large-scale jitter. A window without any box is drawn anew; after 20 the whole image is taken, at scale 1."""
        image_id, _, height, width, boxes, labels = self.items[index]
        boxes, hidden = torch.from_numpy(boxes), torch.from_numpy(self.hidden.get(image_id, np.zeros((0, 4), np.float32)))
        for attempt in range(21):
            factor = rng.uniform(*self.jitter) if self.train and attempt < 20 else 1.0
            scale = factor * self.canvas / max(height, width)
            h, w = max(1, round(height * scale)), max(1, round(width * scale))
            y0, x0 = rng.randint(0, max(0, h - self.canvas)), rng.randint(0, max(0, w - self.canvas))
            window = min(h - y0, self.canvas), min(w - x0, self.canvas)
            moved = move_boxes(boxes, (w / width, h / height), (x0, y0), window)
            keep = ((moved[:, 2:] - moved[:, :2]) > 0.01).all(1)
            if not self.train or keep.any():
                break
        original, flip = image, rng.random() < self.flip
        if (h, w) != (height, width):
            image = TF.resize(image, [h, w], interpolation=TF.InterpolationMode.BILINEAR, antialias=False)
        image = image[:, y0:y0 + window[0], x0:x0 + window[1]]
        unseen = move_boxes(hidden, (w / width, h / height), (x0, y0), window)
        unseen = unseen[((unseen[:, 2:] - unseen[:, :2]) > 0.01).all(1)]
        if flip:
            image = image.flip(2)
            moved[:, 0::2], unseen[:, 0::2] = window[1] - moved[:, 0::2].flip(1), window[1] - unseen[:, 0::2].flip(1)
        item = dict(image=image, size=window, boxes=moved[keep], labels=torch.from_numpy(labels)[keep], image_id=image_id,
                    original_size=(height, width), hidden=unseen)
        if self.with_masks and self.train:
            outlines = [o for o, k in zip(self.outlines[image_id], keep.tolist()) if k]
            item["masks"] = window_masks(outlines, (height, width), (w / width, h / height), (x0, y0), window, flip)
        if self.originals:
            item.update(original=original, window=torch.tensor([w / width, h / height, x0, y0, window[1], flip]))
        return item


def move_boxes(boxes, scale, offset, window):
    """Boxes (M, 4) of the file, scaled by (x, y), seen from offset (x, y), cut to the window (h, w)."""
    boxes = boxes * torch.tensor(scale * 2) - torch.tensor(offset * 2)
    return torch.stack([boxes[:, k].clamp(0, window[1 - k % 2]) for k in range(4)], 1)


def window_masks(outlines, size, scale, offset, window, flip):
    """Outlines of the file (lists of polygons x y x y ..., or RLE dicts) -> (M, ceil(h / 2), ceil(w / 2)) uint8: covered pixels, 0 to 4, of each 2 x 2 block.

    Half the resolution in a quarter of the memory, and exactly the bilinear halving of the full masks. size: (h, w) of the file.
    """
    from pycocotools import mask as rle
    h, w = window
    masks = np.zeros((len(outlines), h + h % 2, w + w % 2), np.uint8)
    for m, outline in zip(masks, outlines):
        if isinstance(outline, dict):
            code = outline if isinstance(outline["counts"], (bytes, str)) else rle.frPyObjects(outline, *size)
            full = torch.from_numpy(rle.decode(code))[None]
            full = TF.resize(full, [round(size[0] * scale[1]), round(size[1] * scale[0])], interpolation=TF.InterpolationMode.NEAREST)[0]
            m[:h, :w] = full[offset[1]:offset[1] + h, offset[0]:offset[0] + w].numpy()
        else:
            moved = [(p.reshape(-1, 2) * scale - offset).ravel().tolist() for p in outline if len(p) >= 6]
            if moved:
                m[:h, :w] = rle.decode(rle.merge(rle.frPyObjects(moved, h, w)))
        if flip:
            m[:h, :w] = m[:h, :w][:, ::-1].copy()
    return torch.from_numpy(masks.reshape(len(masks), masks.shape[1] // 2, 2, masks.shape[2] // 2, 2).sum((2, 4), dtype=np.uint8))


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
    h, w = (max(1, int(side * scale + 0.5)) for side in (height, width))
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
    batch = dict(images=images, sizes=torch.tensor([x["size"] for x in items]), boxes=boxes, labels=labels,
                image_ids=[x["image_id"] for x in items], original_sizes=[x["original_size"] for x in items],
                captions=[x.get("caption", "") for x in items])
    if "masks" in items[0]:
        batch["masks"] = torch.zeros(len(items), most, height // 2, width // 2, dtype=torch.uint8)
        for m, x in zip(batch["masks"], items):
            m[:len(x["masks"]), :x["masks"].shape[1], :x["masks"].shape[2]] = x["masks"]
    if "hidden" in items[0]:
        batch["hidden"] = pad_sequence([x["hidden"] for x in items], batch_first=True)
    if "window" in items[0]:
        batch.update(originals=[x["original"] for x in items], windows=torch.stack([x["window"] for x in items]))
    return batch


class BatchPlan:
    """Batch sampler: aspect-ratio groups, shuffled, sharded over processes, resumable at any batch.

    One plan is made for the global batch (batch_size * world) and each rank takes its slice: N processes
    with batch B train on the same images, step by step, as one process with batch N * B. Landscape and
    portrait images share no batch, except the last ones of an epoch. repeats: how often each image stands in an epoch. Yields lists of (index, seed).
    """

    def __init__(self, landscape, batch_size, rank=0, world=1, seed=0, repeats=None):
        self.landscape, self.batch_size, self.rank, self.world, self.seed = landscape, batch_size, rank, world, seed
        self.entries = [(i, copy) for i, n in enumerate(repeats or [1] * len(landscape)) for copy in range(n)]
        self.epoch = self.start = 0

    def set_epoch(self, epoch, start=0):
        """Continue with batch `start` of `epoch`."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        return -(-len(self.entries) // (self.batch_size * self.world)) - self.start

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = [self.entries[k] for k in torch.randperm(len(self.entries), generator=generator).tolist()]
        total, groups, batches = self.batch_size * self.world, {True: [], False: []}, []
        for entry in order:
            group = groups[self.landscape[entry[0]]]
            group.append(entry)
            if len(group) == total:
                batches.append(group.copy())
                group.clear()
        rest = groups[True] + groups[False]
        while rest:
            last, rest = rest[:total], rest[total:]
            batches.append((last + order * total)[:total])  # an epoch's last batch is filled from its start
        for batch in batches[self.start:]:
            mine = batch[self.rank * self.batch_size:(self.rank + 1) * self.batch_size]
            yield [(i, hash((self.seed, self.epoch, i, *[copy] * (copy > 0)))) for i, copy in mine]


def repeat_fractions(dataset, threshold):
    """Repeat-factor sampling (LVIS, Gupta et al. 2019), (N,) float >= 1: max over an image's classes of sqrt(threshold / share of the images that hold it)."""
    held = [set(labels.tolist()) for *_, labels in dataset.items]
    count = Counter(label for labels in held for label in labels)
    factor = {label: max(1.0, math.sqrt(threshold * len(held) / n)) for label, n in count.items()}
    return torch.tensor([max([factor[label] for label in labels], default=1.0) for labels in held], dtype=torch.float64)


def repeat_factors(dataset, threshold):
    """The same as integers: how often each image stands in an epoch of BatchPlan. Rounded up, as mmdetection does it."""
    return repeat_fractions(dataset, threshold).ceil().int().tolist()


def train_loader(dataset, batch_size, rank, world, seed, workers, pin):
    """(loader, plan): call plan.set_epoch before each epoch. Workers need no seeds: the keys carry them."""
    plan = BatchPlan(dataset.landscape, batch_size, rank, world, seed, dataset.repeats)
    # A generator of its own: a loader draws one number per epoch, which must not shift the model's random stream.
    return DataLoader(dataset, batch_sampler=plan, num_workers=workers, collate_fn=partial(collate, divisor=dataset.canvas or 32), pin_memory=pin,
                      persistent_workers=workers > 0, generator=torch.Generator()), plan


def eval_loader(dataset, rank, world, workers, pin):
    """Images rank, rank + world, ...: each exactly once, one at a time, so that no image's result depends on
    which others share its batch (padding reaches GroupNorm) or on the number of processes."""
    keys = [[(i, 0)] for i in range(rank, len(dataset), world)]
    return DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=partial(collate, divisor=dataset.canvas or 32), pin_memory=pin,
                      generator=torch.Generator())


# ------------------------------------------------------------------ Pascal VOC

VOC_CLASSES = """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person, pottedplant, sheep, sofa,
train, tvmonitor""".replace("\n", " ").split(", ")


def read_voc(root, sets, classes=VOC_CLASSES):
    """VOC XML of `root`/VOCdevkit as a dict in COCO's format. sets: pairs (year, list) as ("2007", "test").

    Boxes become 0-based and continuous: xmin - 1, ymin - 1, xmax, ymax. `difficult` objects carry iscrowd = 1 and difficult = 1: training drops
    them, evaluation ignores them. file_name is relative to the devkit.
    """
    devkit = Path(root) / "VOCdevkit"
    images, annotations = [], []
    for year, name in sets:
        listing = devkit / f"VOC{year}" / "ImageSets" / "Main" / f"{name}.txt"
        if not listing.exists():
            raise DataError(f"--data {root}: {listing} is missing; Pascal VOC is at http://host.robots.ox.ac.uk/pascal/VOC (--data shapes needs nothing)")
        for stem in listing.read_text().split():
            path = devkit / f"VOC{year}" / "Annotations" / f"{stem}.xml"
            try:
                tree = ElementTree.parse(path).getroot()
                width, height = (int(tree.find(f"size/{k}").text) for k in ("width", "height"))
                found = [(o.find("name").text.strip(), [float(o.find(f"bndbox/{k}").text) for k in ("xmin", "ymin", "xmax", "ymax")],
                          int(o.findtext("difficult") or 0)) for o in tree.iter("object")]
            except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as e:
                raise DataError(f"{path}: is no VOC annotation ({e})") from None
            images.append(dict(id=len(images) + 1, file_name=f"VOC{year}/JPEGImages/{stem}.jpg", width=width, height=height))
            for label, (x1, y1, x2, y2), difficult in found:
                if label not in classes:
                    raise DataError(f"{path}: has class {label}, expected one of {', '.join(classes)}")
                box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
                annotations.append(dict(id=len(annotations) + 1, image_id=len(images), category_id=classes.index(label) + 1, bbox=box, area=box[2] * box[3],
                                        iscrowd=difficult, difficult=difficult))
    return dict(images=images, annotations=annotations, categories=[dict(id=k + 1, name=n) for k, n in enumerate(classes)])


# ------------------------------------------------------------------ ImageNet

IMAGES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


class ImageIndex:
    """Images of a folder that holds a folder or a .tar for each class: found once, cached in `root`/.index.npz, checked by the times of the classes' folders.

    classes: names (wnids), sorted, those without an image left out and listed in `empty`. labels (N,) int32; names: bytes of all file names one after
    the other, `ends` (N,) where each ends; at, size (N,): where an image lies in its class's tar, at = -1 for a file. numpy arrays: 14 million Python
    strings would be copied into every loader process, page by page. classes given: these only; unknown names are an error.
    """

    FIELDS = "all", "stamps", "labels", "names", "ends", "at", "size"

    def __init__(self, root, classes=None):
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{root}: no such folder; it should hold a folder (or a .tar) of images for each class")
        entries = sorted((e for e in os.scandir(self.root) if not e.name.startswith(".") and (e.is_dir() or e.name.endswith(".tar"))), key=lambda e: e.name)
        stamps = np.array([e.stat().st_mtime_ns for e in entries], np.int64)
        names = np.array([e.name for e in entries])
        if not entries:
            raise DataError(f"{root}: holds no folder and no .tar; it should hold one for each class")
        cached = self.read_cache()
        if cached is None or not np.array_equal(cached["all"], names) or not np.array_equal(cached["stamps"], stamps):
            cached = self.build(entries) | dict(all=names, stamps=stamps)
            self.write_cache(cached)
        self.folders, held = names.tolist(), np.bincount(cached["labels"], minlength=len(names)) > 0
        stems = [n.removesuffix(".tar") for n in self.folders]
        if len(set(stems)) < len(stems):
            raise DataError(f"{root}: class {next(n for n, c in Counter(stems).items() if c > 1)} is there as a folder and as a .tar; keep one")
        wanted = set(stems if classes is None else classes)
        unknown = sorted(wanted - set(stems))
        if unknown:
            raise DataError(f"{root}: has no class {', '.join(unknown[:5])}" + (f" and {len(unknown) - 5} more of the list" if len(unknown) > 5 else ""))
        self.empty = [n for n, h in zip(stems, held) if not h and n in wanted]
        kept = [k for k, n in enumerate(stems) if held[k] and n in wanted]
        if not kept:
            raise DataError(f"{root}: holds no image")
        self.classes, self.kept, self.names = [stems[k] for k in kept], np.array(kept), cached["names"]
        label_of = np.full(len(names), -1, np.int32)
        label_of[kept] = np.arange(len(kept))
        self.labels, self.ends, self.at, self.size = label_of[cached["labels"]], cached["ends"], cached["at"], cached["size"]
        self.starts = np.concatenate([[0], self.ends[:-1]])
        self.keep(self.labels >= 0)

    def read_cache(self):
        try:
            with np.load(self.root / ".index.npz", allow_pickle=False) as f:
                return {k: f[k] for k in self.FIELDS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def write_cache(self, content):
        temporary = self.root / f".index.{os.getpid()}.tmp.npz"
        try:
            np.savez(temporary, **content)
            os.replace(temporary, self.root / ".index.npz")
        except OSError as e:  # a read-only disk
            print(f"{self.root}: the list of its images cannot be kept there ({e.strerror}); it is made anew at each start", flush=True)

    def build(self, entries):
        names, lengths, labels, at, size = [], [], [], [], []
        for k, entry in enumerate(tqdm(entries, desc=f"index of {self.root}", leave=False, mininterval=1)):
            if entry.is_dir():
                found = [(n, -1, 0) for n in sorted(os.listdir(entry.path)) if n.lower().endswith(IMAGES)]
            else:
                try:
                    with tarfile.open(entry.path) as tar:
                        found = [(m.name, m.offset_data, m.size) for m in tar if m.isfile() and m.name.lower().endswith(IMAGES)]
                except tarfile.TarError as e:
                    raise DataError(f"{entry.path}: cannot be read ({e}); fetch it again") from None
            for name, start, length in found:
                names.append(os.fsencode(name)), labels.append(k), at.append(start), size.append(length)
                lengths.append(len(names[-1]))
        return dict(names=np.frombuffer(b"".join(names), np.uint8), ends=np.cumsum(lengths, dtype=np.int64), labels=np.array(labels, np.int32),
                    at=np.array(at, np.int64), size=np.array(size, np.int64))

    def __len__(self):
        return len(self.labels)

    def folder(self, i):
        return self.folders[self.kept[self.labels[i]]]

    def name(self, i):
        """File name of image i relative to root; for one in a tar: n01440764.tar/name."""
        return f"{self.folder(i)}/{os.fsdecode(self.names[self.starts[i]:self.ends[i]].tobytes())}"

    def read(self, i):
        """RGB PIL image i; DataError where it cannot be decoded."""
        where = self.root / self.name(i)
        if self.at[i] < 0:
            return read_image(where)
        try:
            with open(self.root / self.folder(i), "rb") as f:
                f.seek(self.at[i])
                content = f.read(self.size[i])
        except OSError as e:
            raise DataError(f"{where}: cannot be read ({e})") from None
        return read_image(where, content)

    def drop(self, names):
        """Leave out the images of these names (as `name` gives them), a benchmark's, say; `dropped` counts them."""
        wanted, rows = {}, np.ones(len(self), bool)
        for n in names:
            wanted.setdefault(n.split("/")[0], set()).add(n)
        for k in np.flatnonzero([self.folders[f] in wanted for f in self.kept]):
            here = range(self.first[k], self.first[k + 1])
            rows[here] = [self.name(i) not in wanted[self.folders[self.kept[k]]] for i in here]
        self.keep(rows)
        self.dropped = int((~rows).sum())

    def keep(self, rows):
        for field in ("labels", "starts", "ends", "at", "size"):
            setattr(self, field, getattr(self, field)[rows])
        self.first = np.concatenate([[0], np.cumsum(np.bincount(self.labels, minlength=len(self.kept)))])  # images of class k: first[k] ... first[k + 1] - 1


class LabelledImages(Dataset):
    """Images of an ImageIndex. Item: dict with image (3, h, w) uint8, size (h, w), label, bad: files that could not be read on the way.

    transform(PIL image, random.Random) -> (image, (h, w)). Keys: (index, seed). An unreadable file (14 million have some) is replaced by another of its class.
    """

    def __init__(self, index, transform):
        self.index, self.transform = index, transform

    def __len__(self):
        return len(self.index)

    def __getitem__(self, key):
        i, seed = key
        rng, bad, label = random.Random(seed), [], int(self.index.labels[i])
        while True:
            try:
                image, size = self.transform(self.index.read(i), rng)
                return dict(image=image, size=size, label=label, bad=bad)
            except DataError as e:
                bad.append(str(e))
                if len(bad) == 10:
                    raise DataError(f"{e}; ten files of class {self.index.classes[label]} in a row cannot be read") from None
                i = rng.randrange(self.index.first[label], self.index.first[label + 1])


def collate_labelled(items, canvas):
    """Items -> images (B, 3, canvas, canvas) uint8 padded right and bottom, sizes (B, 2), labels (B,), bad: list of texts."""
    images = torch.zeros(len(items), 3, canvas, canvas, dtype=torch.uint8)
    for b, x in enumerate(items):
        images[b, :, :x["size"][0], :x["size"][1]] = x["image"]
    return dict(images=images, sizes=torch.tensor([x["size"] for x in items]), labels=torch.tensor([x["label"] for x in items]),
                bad=[e for x in items for e in x["bad"]])


def jitter_image(image, canvas, scale, rng, flip=0.5):
    """Large-scale jitter of an image without boxes: PIL or (3, H, W) uint8 -> (3, h, w), (h, w). Long side to scale * canvas, a window of at most canvas^2."""
    image = TF.pil_to_tensor(image) if isinstance(image, Image.Image) else image
    height, width = image.shape[1:]
    factor = scale * canvas / max(height, width)
    h, w = max(1, round(height * factor)), max(1, round(width * factor))
    if (h, w) != (height, width):
        image = TF.resize(image, [h, w], interpolation=TF.InterpolationMode.BILINEAR, antialias=False)
    y0, x0 = rng.randint(0, max(0, h - canvas)), rng.randint(0, max(0, w - canvas))
    image = image[:, y0:y0 + canvas, x0:x0 + canvas]
    return (image.flip(2) if rng.random() < flip else image), tuple(image.shape[1:])


class Stream:
    """Endless batches of (index, seed) over n images: sharded, resumable at any step. No process waits for another's epoch to end, and none starves.

    Each pass over the images has an order of its own; batches run on over the end of a pass. A step's global batch does not depend on the number of
    processes. repeats (n,) float: how often an image stands in a pass, the fraction as a chance drawn anew in each pass. Set `start` to resume.
    """

    def __init__(self, n, batch_size, rank=0, world=1, seed=0, repeats=None):
        self.n, self.batch_size, self.rank, self.world, self.seed, self.start = n, batch_size, rank, world, seed, 0
        self.repeats = None if repeats is None else torch.as_tensor(repeats, dtype=torch.float64)

    def order(self, number):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        if self.repeats is None:
            return torch.randperm(self.n, generator=generator)
        count = self.repeats.floor() + (torch.rand(self.n, generator=generator, dtype=torch.float64) < self.repeats.frac())
        entries = torch.arange(self.n).repeat_interleave(count.long())
        return entries[torch.randperm(len(entries), generator=generator)]

    def __iter__(self):
        total, number = self.batch_size * self.world, 0
        step, skip = self.start, self.start * total
        if self.repeats is None:
            number, skip = divmod(skip, self.n)
        order = self.order(number)
        while skip >= len(order):
            skip, number = skip - len(order), number + 1
            order = self.order(number)
        order = order[skip:]
        while True:
            while len(order) < total:
                number += 1
                order = torch.cat([order, self.order(number)])
            first = self.rank * self.batch_size
            yield [(i, hash((self.seed, step, first + k))) for k, i in enumerate(order[first:first + self.batch_size].tolist())]
            order, step = order[total:], step + 1


def read_ilsvrc(images, boxes):
    """Localisation set from ILSVRC XML: a dict in COCO's format whose images have category_id; categories' names are wnids.

    images: folder of <wnid>/<stem>.JPEG or flat; boxes: folder of XML, at any depth. Width and height are the XML's: predictions are scaled to them. Boxes
    are cut to the image; those without area are dropped. Boxes of the folder `train` are nobody's business here: image labels only.
    """
    paths = sorted(Path(boxes).rglob("*.xml"))
    if not paths:
        raise DataError(f"{boxes}: holds no .xml; ILSVRC's validation boxes are at https://image-net.org (Bounding Boxes, val)")
    found, entries = {}, []
    for folder in [Path(images), *(e for e in Path(images).iterdir() if e.is_dir())] if Path(images).is_dir() else []:
        found |= {Path(n).stem: (folder.relative_to(images) / n).as_posix() for n in os.listdir(folder) if n.lower().endswith(IMAGES)}
    for path in tqdm(paths, desc="boxes", leave=False, mininterval=1):
        try:
            tree = ElementTree.parse(path).getroot()
            width, height = (int(tree.find(f"size/{k}").text) for k in ("width", "height"))
            objects = [(o.find("name").text.strip(), [float(o.find(f"bndbox/{k}").text) for k in ("xmin", "ymin", "xmax", "ymax")]) for o in tree.iter("object")]
        except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as e:
            raise DataError(f"{path}: is no ILSVRC annotation ({e})") from None
        if path.stem not in found:
            raise DataError(f"{images}: has no image {path.stem}, for which {path} has boxes")
        if not objects or width < 1 or height < 1:
            raise DataError(f"{path}: has no object or no size")
        entries.append((path, found[path.stem], width, height, objects))
    wnids = sorted({name for *_, objects in entries for name, _ in objects})
    content = dict(images=[], annotations=[], categories=[dict(id=k + 1, name=n) for k, n in enumerate(wnids)])
    ids = {n: k + 1 for k, n in enumerate(wnids)}
    for number, (path, name, width, height, objects) in enumerate(entries, 1):
        if len({n for n, _ in objects}) > 1:
            raise DataError(f"{path}: has objects of several classes; an image of ImageNet has one")
        content["images"].append(dict(id=number, file_name=name, width=width, height=height, category_id=ids[objects[0][0]]))
        for label, corners in objects:
            x1, y1, x2, y2 = (min(max(v, 0.0), float(side)) for v, side in zip(corners, (width, height) * 2))
            if x2 > x1 and y2 > y1:
                content["annotations"].append(dict(id=len(content["annotations"]) + 1, image_id=number, category_id=ids[label], bbox=[x1, y1, x2 - x1, y2 - y1],
                                                   area=(x2 - x1) * (y2 - y1), iscrowd=0))
    return content


class LocalisationImages(Dataset):
    """Images of a localisation set (COCO's format, images with category_id) for evaluation: the long side becomes `canvas`.

    Items as CocoDataset's: boxes (M, 4) and original_size are those of the annotation, whatever the size of the file."""

    def __init__(self, folder, raw, canvas):
        self.folder, self.canvas, self.info = Path(folder), canvas, raw["images"]
        names = {c["id"]: c["name"] for c in raw["categories"]}
        for i in self.info:
            if not {"id", "width", "height", "file_name", "category_id"} <= set(i) or i["category_id"] not in names:
                raise DataError(f"localisation set: image {i.get('id')} lacks width, height, file_name or a category_id that 'categories' lists")
        self.names = [names[i["category_id"]] for i in self.info]
        self.boxes, of_image = {i["id"]: [] for i in self.info}, {i["id"]: i["category_id"] for i in self.info}
        listed = {f: set(os.listdir(self.folder / f)) if (self.folder / f).is_dir() else () for f in {str(Path(i["file_name"]).parent) for i in self.info if ".tar/" not in i["file_name"]}}
        missing = [i["file_name"] for i in self.info if ".tar/" not in i["file_name"] and Path(i["file_name"]).name not in listed[str(Path(i["file_name"]).parent)]]
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} of {len(self.info)} images are missing, first {missing[0]}")
        for a in raw["annotations"]:
            if a.get("image_id") not in self.boxes or len(a.get("bbox") or ()) != 4 or not all(math.isfinite(v) for v in a["bbox"]):
                raise DataError(f"localisation set: annotation {a.get('id')} has image id {a.get('image_id')}, bbox {a.get('bbox')}")
            if a.get("category_id") != of_image[a["image_id"]]:
                raise DataError(f"localisation set: annotation {a.get('id')} has category id {a.get('category_id')}, its image {of_image[a['image_id']]}; an image has one class")
            x, y, w, h = a["bbox"]
            if w > 0 and h > 0:  # an empty box could never be found
                self.boxes[a["image_id"]].append((x, y, x + w, y + h))

    def __len__(self):
        return len(self.info)

    def __getitem__(self, key):
        record, content = self.info[key[0]], None
        path = self.folder / record["file_name"]
        if ".tar/" in record["file_name"]:
            tar, member = record["file_name"].split(".tar/", 1)
            try:
                with tarfile.open(self.folder / f"{tar}.tar") as f:
                    content = f.extractfile(member).read()
            except (OSError, KeyError, tarfile.TarError) as e:
                raise DataError(f"{path}: cannot be read ({e})") from None
        image, size = jitter_image(read_image(path, content), self.canvas, 1.0, random.Random(0), 0.0)
        boxes = torch.tensor(self.boxes[record["id"]], dtype=torch.float32).reshape(-1, 4)
        return dict(image=image, size=size, boxes=boxes, labels=torch.zeros(len(boxes), dtype=torch.long), image_id=key[0],
                    original_size=(record["height"], record["width"]))
