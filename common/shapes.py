# SPDX-License-Identifier: MIT
"""The embedded dataset `shapes`: drawn photographs, written once in the formats of COCO, LVIS, VOC, ImageNet.

Why. Each script has to show its claim in minutes on a laptop, through the same readers that real data take.
So the pictures are drawn, but the files are real: boxes, polygons, crowd regions, captions, ids with holes,
grey JPEGs, images without objects.

The world, and the reason for each rule:
  BASE        12 shapes named without colour and drawn in every colour. Colour is a nuisance for a detector
              trained on them ...
  NOVEL       ... so star and flower in four named colours cannot be composed from base names: a world of
              shape x colour gave 77 novel AP50 without any distillation, which voids the test. Novel objects
              are annotated in all files (an open-vocabulary reader drops them itself) and occur in training
              images, or distillation would have no region to learn from.
  IMAGE_ONLY  6 shapes that differ by form, not colour. Never in train2017 / val2017: only in imagenet/ and
              valall2017, for methods that learn names from image labels.
  Occlusion, truncation, clutter, low contrast, noise and 18 px objects keep a strong detector below 0.9 AP
  and a small one well below it: distillation needs room.

Conventions. Boxes and polygons are those of the full shape cut at the image border, also where a later
object hides part of it (at most 60 %; what would hide more is not placed). Pixel i covers [i, i + 1]. Box,
polygon, area: float pixels. Crowd regions (iscrowd = 1, RLE) are in the COCO files only: VOC has no such
thing, and LVIS lists their class under not_exhaustive_category_ids. LVIS names carry underscores as in the
real file ("striped_square"); LVIS ids (1..K, alphabetical) differ from COCO ids (scrambled, with holes).

    from common.shapes import make_shapes
    root = make_shapes()                       # data/shapes-1, drawn on the first call
"""

import json
import os
import shutil
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from .run import UserError

VERSION = "1"
FREQUENT = ["circle", "square", "triangle", "cross", "ring", "heart"]
COMMON = ["diamond", "hexagon", "crescent", "arrow", "striped square", "dotted circle"]
BASE = FREQUENT + COMMON
NOVEL = [f"{colour} {shape}" for shape in ("star", "flower") for colour in ("red", "green", "blue", "yellow")]
IMAGE_ONLY = ["bolt", "hourglass", "letter T", "letter H", "fish", "spiral"]
CLASSES = BASE + NOVEL  # the detection categories
ALL_CLASSES = CLASSES + IMAGE_ONLY
# By how often we draw a class, not by LVIS's image counts (r <= 10 < c <= 100 < f): 2,000 images cannot fill
# those.
FREQUENCY = {name: "f" if name in FREQUENT else "c" if name in COMMON else "r" for name in CLASSES}
DRAW_WEIGHT = {"f": 9.0, "c": 5.0, "r": 1.0}  # r: besides the novel object in every third image

# Scrambled and with holes (1, 2, 3, 5, 6, 7, 9, ...), so that a reader that takes id - 1 for a label fails at
# once. 7 and 26 are coprime.
CATEGORY_ID = {name: (k := i * 7 % len(ALL_CLASSES)) + k // 3 + 1 for i, name in enumerate(ALL_CLASSES)}
LVIS_ID = {name: i + 1 for i, name in enumerate(sorted(CLASSES))}
WNID = {name: f"n{90000001 + 10 * i}" for i, name in enumerate(ALL_CLASSES)}
SPLITS = ["train2017", "val2017", "valall2017", "imagenet/train", "imagenet/val"]  # index: in an image's seed

PALETTE = {"red": (210, 40, 45), "green": (45, 160, 60), "blue": (45, 80, 215), "yellow": (235, 210, 50),
           "purple": (140, 55, 175), "orange": (240, 130, 35), "white": (242, 242, 242),
           "black": (25, 25, 28)}
# Texture is a nuisance too, except where it makes another class (a dotted hexagon looks like a dotted circle)
# or cuts thin parts to pieces.
FREE_TEXTURE = {"circle": ["striped"], "hexagon": ["striped"], "square": ["dotted"], "bolt": [],
                "letter T": [], "letter H": [], "spiral": []}


# ------------------------------------------------------------------ outlines

def arc(start, stop, n, radius=1.0, center=(0.0, 0.0)):
    """(n, 2) points on a circle, angles in degrees, both ends included; y points down."""
    t = np.radians(np.linspace(start, stop, n))
    return np.stack([np.cos(t), np.sin(t)], 1) * radius + center


def make_outlines():
    """dict shape -> ((P, 2) outline of radius about 1, greatest rotation in degrees that keeps the shapes
    apart)."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    petals = (0.4 + 0.6 * np.abs(np.cos(3 * t)) ** 0.6)[:, None] * np.stack([np.cos(t), np.sin(t)], 1)
    lobes = -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    heart = np.stack([16 * np.sin(t) ** 3, lobes], 1) / 16
    turn = np.linspace(0, 1, 28)[:, None]
    outer, inner = arc(0, 620, 28) * (0.22 + 0.78 * turn), arc(0, 620, 28) * (0.02 + 0.72 * turn)
    spiral = np.concatenate([outer, inner[::-1]])
    a, b, c = 0.34, 0.30, 1.0  # half widths: arm of the cross, stroke of a letter, extent
    return {
        "circle": (arc(0, 350, 36), 180),
        "square": ([(-1, -1), (1, -1), (1, 1), (-1, 1)], 20),  # at 45 degrees it would be a diamond
        "triangle": ([(0, -1), (0.95, 0.8), (-0.95, 0.8)], 180),
        "cross": ([(-a, -c), (a, -c), (a, -a), (c, -a), (c, a), (a, a), (a, c), (-a, c), (-a, a), (-c, a),
                   (-c, -a), (-a, -a)], 180),
        # COCO polygons know no holes: outer and inner circle are joined by a slit that is walked both ways.
        "ring": (np.concatenate([arc(0, 360, 37), arc(360, 0, 37, 0.5)]), 180),
        "heart": (heart, 40),
        "diamond": ([(0, -1), (0.52, 0), (0, 1), (-0.52, 0)], 20),  # clearly elongated, for the same reason
        "hexagon": (arc(0, 300, 6), 180),
        "crescent": (np.concatenate([arc(50, 310, 24), arc(-69, -291, 20, 0.82, (0.35, 0.0))]), 180),
        "arrow": ([(-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)], 180),
        "star": (arc(-90, 234, 10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None], 180),
        "flower": (petals, 180),
        "bolt": ([(0.35, -1), (-0.55, 0.15), (-0.05, 0.15), (-0.35, 1), (0.6, -0.3), (0.08, -0.3)], 35),
        "hourglass": ([(-0.8, -1), (0.8, -1), (0.13, 0), (0.8, 1), (-0.8, 1), (-0.13, 0)], 35),
        "letter T": ([(-0.9, -1), (0.9, -1), (0.9, -0.5), (b, -0.5), (b, 1), (-b, 1), (-b, -0.5),
                      (-0.9, -0.5)], 30),
        "letter H": ([(-0.9, -1), (-b, -1), (-b, -0.25), (b, -0.25), (b, -1), (0.9, -1), (0.9, 1), (b, 1),
                      (b, 0.3), (-b, 0.3), (-b, 1), (-0.9, 1)], 30),
        "fish": (np.concatenate([arc(140, -140, 24, 0.62, (0.35, 0.0)) * (1.0, 0.9),
                                 [(-1, -0.6), (-0.72, 0), (-1, 0.6)]]), 35),
        "spiral": (spiral, 180),
    }


OUTLINES = {name: (np.asarray(points, float), turn) for name, (points, turn) in make_outlines().items()}


def recipe(name):
    """Class name -> (shape, colour the name fixes or None, texture the name fixes or None)."""
    first, _, rest = name.partition(" ")
    if name in NOVEL:
        return rest, first, None
    return (rest, None, first) if first in ("striped", "dotted") else (name, None, None)


def turned(points, angle):
    """Rotate (P, 2) about the origin, radians, clockwise on the screen (y points down)."""
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def pose(rng, shape, size):
    """((P, 2) outline around the origin in pixels, longest box side = size; rotation in radians)."""
    points, turn = OUTLINES[shape]
    angle = np.radians(rng.uniform(-turn, turn))
    stretch = np.exp(rng.uniform(-0.18, 0.18))
    points = turned(points * (stretch, 1 / stretch), angle)
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) * (size / (high - low).max()), angle


def cut_at_border(points, width, height):
    """Sutherland-Hodgman: the part of a polygon inside the image, (P', 2). The area is right for concave
    outlines too."""
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        inside = sign * (points[:, axis] - limit) >= 0
        if inside.all():
            continue
        kept = []
        for i in range(len(points)):
            p, q = points[i - 1], points[i]
            if inside[i - 1] != inside[i]:
                kept.append(p + (q - p) * (limit - p[axis]) / (q[axis] - p[axis]))
            if inside[i]:
                kept.append(q)
        points = np.array(kept).reshape(-1, 2)
    return points


# ------------------------------------------------------------------ drawing

def some_colour(rng, name=None):
    """(name, jittered RGB) of a palette colour, drawn at random if no name is given."""
    name = name or list(PALETTE)[rng.integers(len(PALETTE))]
    return name, np.clip(np.array(PALETTE[name]) * rng.uniform(0.88, 1.1) + rng.normal(0, 7, 3), 0, 255)


def background(rng, width, height):
    """(H, W, 3) float: tinted gradient, smooth blobs, and clutter in object colours that is no object
    (strokes and splinters)."""
    gx, gy = np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5))
    coarse = (rng.uniform(60, 190) + rng.normal(0, 14, 3)
              + gx[..., None] * rng.normal(0, 20, 3) + gy[..., None] * rng.normal(0, 20, 3))
    coarse = np.clip(coarse + rng.normal(0, 14, (5, 5, 3)), 0, 255).astype(np.uint8)
    photo = Image.fromarray(coarse).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(photo)
    for _ in range(rng.integers(3, 10)):
        if rng.random() < 0.6:  # a bent stroke, 1-3 px thick
            (p, q), bend, t = rng.normal(0, 16, (2, 2)), rng.normal(0, 12, 2), np.linspace(0, 1, 8)[:, None]
            line = (1 - t) ** 2 * p + 2 * t * (1 - t) * bend + t ** 2 * q
            points = np.concatenate([line, line[::-1] + rng.uniform(1, 3, 2) * rng.choice([-1, 1], 2)])
        else:  # a splinter: long and thin, so that it is no triangle
            bend, end = rng.uniform(-0.3, 0.3), rng.uniform(-0.1, 0.1)
            points = np.array([(-1, 0), (bend, -0.12), (1, end), (0, 0.12)]) * rng.uniform(6, 22)
            points = turned(points, rng.uniform(0, 2 * np.pi))
        points = 2 * (points + rng.uniform((0, 0), (width, height)))
        colour = some_colour(rng)[1].astype(int).tolist()
        pen.polygon([tuple(xy) for xy in points.tolist()], fill=tuple(colour))
    return np.array(photo.reduce(2), np.float32)


def coverage(points, width, height):
    """Share of each pixel that a polygon covers: (slices of its patch, (h, w) float in [0, 1]). 3 x 3 samples
    a pixel."""
    x0, y0 = np.maximum(np.floor(points.min(0)).astype(int), 0).tolist()
    x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int), (width, height)).tolist()
    patch = Image.new("L", (3 * (x1 - x0), 3 * (y1 - y0)))
    ImageDraw.Draw(patch).polygon([tuple(xy) for xy in ((points - (x0, y0)) * 3 - 0.5).tolist()], fill=255)
    return (slice(y0, y1), slice(x0, x1)), np.asarray(patch.reduce(3), np.float32) / 255


def paint(canvas, where, alpha, points, rgb, angle, texture=None, shade=0.0):
    """Draw a polygon, with its coverage, into canvas (H, W, 3) float. shade: how its brightness changes."""
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    side = max(x1 - x0, y1 - y0)
    x = (np.arange(where[1].start, where[1].stop, dtype=np.float32) + 0.5 - (x0 + x1) / 2) / side
    y = (np.arange(where[0].start, where[0].stop, dtype=np.float32) + 0.5 - (y0 + y1) / 2)[:, None] / side
    u = x * np.cos(angle) + y * np.sin(angle)  # the texture turns with the shape
    v = y * np.cos(angle) - x * np.sin(angle)
    fill = (1 + shade * u)[..., None] * rgb
    if texture:
        dots = np.cos(8 * np.pi * u) + np.cos(8 * np.pi * v) - 0.5
        wave = np.sin(8 * np.pi * u) if texture == "striped" else dots
        ink = np.clip(0.5 + 3 * wave, 0, 1)[..., None] * 0.8
        fill = fill * (1 - ink) + (20 if rgb.sum() > 330 else 245) * ink
    canvas[where] += (fill - canvas[where]) * alpha[..., None]


def propose(rng, canvas, name, size):
    """Random pose and colour of a class: (arguments of paint, (H, W) mask, colour word or None); None if it
    would not be seen.

    size: longest side in pixels, "fill" for one that fills the picture, None for log-uniform up to 88 px.
    """
    height, width = canvas.shape[:2]
    shape, colour, texture = recipe(name)
    if size == "fill":
        points, angle, side = OUTLINES[shape][0] * rng.uniform(0.44, 0.49, 2) * (width, height), 0.0, 96
    else:
        # Below 32 px stripes and dots blur, below 24 px a star is a flower; a plain class may be 18 px small.
        # (From 10 px on, a narrow detector that sees minutes of training learns little, and there is nothing
        # to measure.)
        least = 32 if texture else 24 if colour else 18
        side = size or np.exp(rng.uniform(np.log(least), np.log(88)))
        points, angle = pose(rng, shape, side)
    margin = 0.5 if size == "fill" or rng.random() < 0.85 else 0.25  # else: the border may cut a quarter off
    room = np.minimum(np.ptp(points, axis=0) * margin, (width / 2, height / 2))
    points = points + rng.uniform(room, (width, height) - room)
    word, rgb = some_colour(rng, colour)
    where, alpha = coverage(points, width, height)
    below = (canvas[where] * alpha[..., None]).sum((0, 1)) / max(alpha.sum(), 1)  # mean colour it would cover
    mask = np.zeros((height, width), bool)
    mask[where] = alpha >= 0.5
    if np.count_nonzero(mask) < 12 or np.linalg.norm(rgb - below) < 80:
        return None
    if colour is None and rng.random() < 0.12:  # low contrast; not for classes named after a colour
        word, rgb = None, below + (rgb - below) * 0.45
    free = FREE_TEXTURE.get(shape, ["striped", "dotted"])
    if free and texture is None and colour is None and side >= 24 and rng.random() < 0.25:
        texture = str(rng.choice(free))
    look = dict(where=where, alpha=alpha, points=points, rgb=rgb, angle=angle, texture=texture)
    return dict(look, shade=rng.uniform(-0.3, 0.3)), mask, word


def place(rng, canvas, placed, name, size=None, tries=15):
    """Draw an object of a class over the others, where it hides at most 60 % of each; appends to `placed`,
    True if it found a place."""
    height, width = canvas.shape[:2]
    for _ in range(tries):
        proposal = propose(rng, canvas, name, size)
        if proposal is None:
            continue
        look, mask, colour = proposal
        if any(np.count_nonzero(o["visible"] & ~mask) < 0.4 * o["pixels"] for o in placed):
            continue
        paint(canvas, **look)
        for o in placed:
            o["visible"] &= ~mask
        polygon = np.round(cut_at_border(look["points"], width, height), 2)
        truncated = bool((look["points"] < 0).any() or (look["points"] > (width, height)).any())
        (x0, y0), (x1, y1), (x, y) = polygon.min(0).tolist(), polygon.max(0).tolist(), polygon.T
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))).item() / 2  # shoelace formula
        placed.append(dict(name=name, colour=colour, box=(x0, y0, x1, y1), area=round(area, 2),
                           segmentation=[polygon.ravel().tolist()], crowd=False, truncated=truncated,
                           visible=mask, pixels=np.count_nonzero(mask)))
        return True
    return False


def place_crowd(rng, canvas, placed):
    """A patch of many tiny shapes of one frequent class, annotated as one crowd region: its mask is the union
    of the shapes."""
    height, width = canvas.shape[:2]
    name = str(rng.choice(FREQUENT))
    center = rng.uniform((30, 30), (width - 30, height - 30))
    radius = rng.uniform(16, 26, 2)
    union = np.zeros((height, width), bool)
    for gx, gy in np.stack(np.meshgrid(np.linspace(-1, 1, 6), np.linspace(-1, 1, 6)), -1).reshape(-1, 2):
        if gx * gx + gy * gy < 1.3:
            points, angle = pose(rng, name, rng.uniform(6, 9))
            points = points + center + radius * (gx, gy) + rng.normal(0, 1, 2)
            where, alpha = coverage(points, width, height)
            paint(canvas, where, alpha, points, some_colour(rng)[1], angle)
            union[where] |= alpha >= 0.5
    ys, xs = np.nonzero(union)
    box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
    placed.append(dict(name=name, colour=None, box=box, area=float(union.sum()), segmentation=rle(union),
                       crowd=True, truncated=False, visible=union, pixels=np.count_nonzero(union)))


def rle(mask):
    """COCO's uncompressed RLE: run lengths down the columns; the first one counts zeros."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0] + counts if flat[0] else counts}


def draw_photo(seed, split, index, name=None, size=(36, 80)):
    """One photograph from its own generator, so that it does not depend on how many others are drawn.

    name: the only object (ImageNet folders), its longest side within `size` pixels; otherwise 1-6 objects by
    the schedule below. Returns (PIL image, list of object dicts). The periods are multiples of 3: a grey or
    empty photograph never takes the place of one that starts with a novel object.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index, ALL_CLASSES.index(name) if name else 0])
    width, height = (128, 96) if rng.random() < 0.5 else (96, 128)
    canvas, placed, grey = background(rng, width, height), [], False
    if name:
        while not place(rng, canvas, placed, name, rng.uniform(*size)):
            canvas = background(rng, width, height)
    elif split == "valall2017":  # all classes alike: every name must be measurable
        for _ in range(rng.integers(2, 7)):
            place(rng, canvas, placed, ALL_CLASSES[rng.integers(len(ALL_CLASSES))])
    elif index % 99 != 41:  # 1 % hold nothing at all
        if index % 48 == 13:  # 2 % hold a crowd
            place_crowd(rng, canvas, placed)
        if index % 39 == 7:  # 2.5 % COCO "large" (> 96 x 96): only squares fill that much
            place(rng, canvas, placed, str(rng.choice(["square", "striped square"])), "fill")
        grey = index % 96 == 5  # 1 % grey files: base only, or the colour in a name would lie
        if index % 3 == 0:  # novel classes in turn: at least val / 24 instances of each
            place(rng, canvas, placed, NOVEL[index // 3 % len(NOVEL)], tries=200)
        names = BASE if grey else CLASSES
        weight = np.array([DRAW_WEIGHT[FREQUENCY[n]] for n in names])
        for n in rng.choice(names, rng.integers(1, 6), p=weight / weight.sum()):
            place(rng, canvas, placed, str(n))
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(3, 16))
    photo = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    if rng.random() < 0.15:
        photo = photo.filter(ImageFilter.GaussianBlur(0.8))
    if grey:
        photo, placed = photo.convert("L"), [o | dict(colour=None) for o in placed]
    return photo, placed


def draw_scene(seed, index, objects=8, side=128):
    """(pixels (side, side, 3) uint8, list of object dicts): a full picture of base objects alone, in no file.
    What a backbone is pre-trained on, see tiny.py."""
    rng = np.random.default_rng([seed, len(SPLITS), index])
    canvas, placed = background(rng, side, side), []
    for name in rng.choice(BASE, objects):
        place(rng, canvas, placed, str(name), tries=5)
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(3, 16))
    return np.clip(canvas, 0, 255).astype(np.uint8), placed


# ------------------------------------------------------------------ captions

TEMPLATES = ["A photo of {}.", "There is {} in the picture.", "{} on a blurry background.",
             "An image that shows {}.", "We can see {}.", "A picture with {} among some scratches.", "{}.",
             "Someone drew {} here.", "A noisy photograph of {}.", "{} in front of a wall."]
NUMBERS = ["", "", "two", "three", "four", "five", "six", "seven"]


def plural(noun):
    return noun + ("es" if noun.endswith("s") else "s")


def mention(rng, o, width, height):
    """(noun with size and colour words, place or ""). The colour word stays with probability 0.7, for novel
    and base objects alike."""
    (x0, y0, x1, y1), (shape, _, texture) = o["box"], recipe(o["name"])
    noun = f"{texture} {shape}" if texture else shape
    side, cx, cy = max(x1 - x0, y1 - y0), (x0 + x1) / 2 / width, (y0 + y1) / 2 / height
    colour = o["colour"] if o["colour"] and rng.random() < 0.7 else ""
    size = ("small" if side < 20 else "large" if side > 48 else "") if rng.random() < 0.3 else ""
    across = "on the left" if cx < 0.3 else "on the right" if cx > 0.7 else ""
    along = "at the top" if cy < 0.3 else "at the bottom" if cy > 0.7 else "in the middle"
    words = " ".join(word for word in (size, colour, noun) if word)
    return words, (across or along) if rng.random() < 0.3 else ""


def write_captions(rng, placed, width, height):
    """Five sentences; each names an object with probability 0.85 (at least one of them), novel ones too."""
    sentences = []
    for _ in range(5):
        told = [o for o in placed if rng.random() < 0.85] or placed[:1]
        many = ["many tiny", "a crowd of", "lots of"]
        parts = [f"{rng.choice(many)} {plural(o['name'])}" for o in told if o["crowd"]]
        single = Counter(mention(rng, o, width, height) for o in told if not o["crowd"])
        for (noun, where), n in single.items():
            article = "an" if noun[0] in "aeiou" else "a"
            text = f"{NUMBERS[n]} {plural(noun)}" if n > 1 else f"{article} {noun}"
            parts.append(f"{text} {where}".strip())
        rng.shuffle(parts)
        listed = parts[0] if parts else "nothing but scratches"
        if len(parts) > 1:
            listed = ", ".join(parts[:-1]) + " and " + parts[-1]
        text = str(rng.choice(TEMPLATES)).format(listed)
        sentences.append(text[0].upper() + text[1:])
    return sentences


# ------------------------------------------------------------------ file formats

def write_json(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_coco(path, rows, annotations, **lists):
    """rows: see draw_split. Every file of the COCO family has info, licenses, images and annotations; ids are
    given here."""
    info = dict(description=f"shapes {VERSION}", version=VERSION, year=2017, date_created="2017/01/01")
    annotations = [a | dict(id=i + 1) for i, a in enumerate(annotations)]
    content = dict(info=info, licenses=[dict(id=1, name="none", url="")],
                   images=[row["image"] for row in rows], annotations=annotations)
    write_json(path, **content | lists)


def draw_split(root, seed, split, count, bar):
    """Draw one COCO split with its instances file. Returns rows: list of dict(image record, objects,
    captions, JPEG mode)."""
    (root / split).mkdir(parents=True)
    rows, names = [], ALL_CLASSES if split == "valall2017" else CLASSES
    for index in range(count):
        photo, objects = draw_photo(seed, split, index)
        image_id = 10_000_000 * SPLITS.index(split) + 139 + 37 * index + index * index % 11  # holes, as COCO
        file_name = f"{image_id:012d}.jpg"
        photo.save(root / split / file_name, quality=88)
        image = dict(license=1, file_name=file_name, coco_url=f"http://shapes.invalid/{split}/{file_name}",
                     height=photo.height, width=photo.width, date_captured="2017-01-01 00:00:00",
                     flickr_url="", id=image_id)
        rng = np.random.default_rng([seed, SPLITS.index(split), index, 999])  # words do not disturb drawing
        captions = write_captions(rng, objects, *photo.size)
        rows.append(dict(image=image, objects=objects, captions=captions, mode=photo.mode))
        bar.update()
    annotations = [annotation(o, row, CATEGORY_ID) | dict(iscrowd=int(o["crowd"]))
                   for row in rows for o in row["objects"]]
    names = sorted(names, key=CATEGORY_ID.get)
    categories = [dict(supercategory="shape", id=CATEGORY_ID[n], name=n) for n in names]
    write_coco(root / f"annotations/instances_{split}.json", rows, annotations, categories=categories)
    return rows


def annotation(o, row, ids):
    x0, y0, x1, y1 = o["box"]
    return dict(segmentation=o["segmentation"], area=o["area"], image_id=row["image"]["id"],
                category_id=ids[o["name"]], bbox=[x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)])


def write_lvis(path, rows, train_rows, seed):
    """LVIS v1 file of the same images: no crowds, federated labels. The counts are those of train in both
    files, as in LVIS."""
    images = []
    for row in rows:
        absent = sorted(set(CLASSES) - {o["name"] for o in row["objects"]})
        negative = np.random.default_rng([seed, row["image"]["id"]]).choice(absent, 6, replace=False)
        crowds = {LVIS_ID[o["name"]] for o in row["objects"] if o["crowd"]}
        image = {k: v for k, v in row["image"].items() if k != "file_name"}  # v1 has coco_url only
        images.append(image | dict(neg_category_ids=sorted(LVIS_ID[n] for n in negative),
                                   not_exhaustive_category_ids=sorted(crowds)))
    annotations = [annotation(o, row, LVIS_ID) for row in rows for o in row["objects"] if not o["crowd"]]
    seen = [[o["name"] for o in row["objects"] if not o["crowd"]] for row in train_rows]
    instances = Counter(n for names in seen for n in names)
    photos = Counter(n for names in seen for n in set(names))
    categories = []
    for n, i in LVIS_ID.items():
        key = n.replace(" ", "_")
        categories.append({"name": key, "id": i, "synset": f"{key}.n.01", "synonyms": [key],
                           "def": f"a drawn {n}", "frequency": FREQUENCY[n], "image_count": photos[n],
                           "instance_count": instances[n]})
    write_coco(path, rows, annotations, images=images, categories=categories)


def write_xml(path, folder, database, filename, size, objects):
    """Annotation in the layout of VOC and ILSVRC. objects: list of (name, truncated, difficult, four integer
    corners)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = "".join(f"\t\t<{k}>{v}</{k}>\n" for k, v in zip(("width", "height", "depth"), size))
    text = (f"<annotation>\n\t<folder>{folder}</folder>\n\t<filename>{filename}</filename>\n"
            f"\t<source>\n\t\t<database>{database}</database>\n\t</source>\n\t<size>\n{size}\t</size>\n"
            "\t<segmented>0</segmented>\n")
    for name, truncated, difficult, corners in objects:
        box = "".join(f"\t\t\t<{k}>{v}</{k}>\n" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners))
        text += (f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Unspecified</pose>\n"
                 f"\t\t<truncated>{int(truncated)}</truncated>\n\t\t<difficult>{int(difficult)}</difficult>\n"
                 f"\t\t<bndbox>\n{box}\t\t</bndbox>\n\t</object>\n")
    path.write_text(text + "</annotation>\n", encoding="utf-8")


def write_voc(root, splits):
    """VOC2007 devkit of the same photographs. Corners are 1-based and inclusive: the interval [x0, x1] is
    pixels x0 + 1 .. x1."""
    devkit, stems = root / "VOCdevkit/VOC2007", {}
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (devkit / folder).mkdir(parents=True)
    for split, rows in splits.items():
        stems[split] = [row["image"]["file_name"][:-4] for row in rows]
        for stem, row in zip(stems[split], rows):
            source, target, objects = root / split / f"{stem}.jpg", devkit / f"JPEGImages/{stem}.jpg", []
            try:
                os.link(source, target)
            except OSError:  # no hard links on this file system
                shutil.copyfile(source, target)
            for o in row["objects"]:
                x0, y0, x1, y1 = (round(v) for v in o["box"])
                hidden, tiny = o["visible"].sum() < 0.6 * o["pixels"], max(x1 - x0, y1 - y0) < 20
                if not o["crowd"]:
                    objects.append((o["name"], o["truncated"], hidden or tiny, (x0 + 1, y0 + 1, x1, y1)))
            size = row["image"]["width"], row["image"]["height"], 1 if row["mode"] == "L" else 3
            path = devkit / f"Annotations/{stem}.xml"
            write_xml(path, "VOC2007", "The VOC2007 Database", f"{stem}.jpg", size, objects)
    trainval, test = stems["train2017"], stems["val2017"]
    lists = dict(trainval=trainval, test=test, val=trainval[4::5],
                 train=[s for i, s in enumerate(trainval) if i % 5 != 4])
    for name, members in lists.items():
        text = "".join(f"{m}\n" for m in members)
        (devkit / f"ImageSets/Main/{name}.txt").write_text(text, encoding="utf-8")


def draw_imagenet(root, seed, counts, size, bar):
    """Folder tree of single-object images of ALL_CLASSES, counts = {part: images a class}. Boxes for val
    only, as 0-based corners."""
    for part, count in counts.items():
        for k, (name, wnid) in enumerate(WNID.items()):
            (root / part / wnid).mkdir(parents=True)
            for index in range(count):
                photo, (o,) = draw_photo(seed, f"imagenet/{part}", index, name, size)
                stem = f"{wnid}_{index + 1}"
                if part == "val":
                    stem = f"ILSVRC2012_val_{index * len(WNID) + k + 1:08d}"
                photo.save(root / part / wnid / f"{stem}.JPEG", quality=88)
                if part == "val":
                    path, corners = root / f"val_boxes/{wnid}/{stem}.xml", [round(v) for v in o["box"]]
                    objects = [(wnid, o["truncated"], False, corners)]
                    write_xml(path, "val", "ILSVRC_2012", stem, (*photo.size, 3), objects)
                bar.update()
    classes = [dict(wnid=wnid, name=name) for name, wnid in WNID.items()]
    (root / "classes.json").write_text(json.dumps(classes), encoding="utf-8")


def folder_of(root=None, seed=0, train=2000, val=300, labelled=None):
    """Where make_shapes puts the dataset of these arguments."""
    name = f"shapes-{VERSION}" + (f"-s{seed}" if seed else "")
    name += f"-n{train}x{val}" if (train, val) != (2000, 300) else ""
    name += f"-i{labelled}" if labelled else ""
    return Path(root or os.environ.get("DETECTION_CACHE") or "data") / name


def make_shapes(root=None, seed=0, train=2000, val=300, labelled=None):
    """Path of the dataset under `root`; drawn on the first call (10-15 s on one core), else returned at once.

    root: by default the environment's DETECTION_CACHE, else data/ under the current folder.
    train, val: numbers of COCO images. The other parts scale along: valall2017 val / 2; ImageNet train / 50
    and val / 30 a class (>= 2). labelled: instead, images of a class in ImageNet's train folder, for learning
    26 classes from scratch, which 40 are not enough for; their objects fill most of the picture, as
    ImageNet's do. Files are byte-identical for a seed with the same Pillow and numpy; the first N pictures do
    not depend on the counts. Any number of processes may call this: each draws into a folder of its own, the
    first one to finish names it. Raises UserError if the folder is there but not complete (it appears by
    renaming, so somebody has removed files from it), or if it cannot be written.
    """
    target = folder_of(root, seed, train, val, labelled)
    try:
        if (target / "splits.json").is_file():
            return target
        incomplete = target.exists()
    except OSError as e:  # a folder on the way may not be entered
        raise UserError(not_written(target, e)) from None
    if incomplete:
        remedy = "delete the folder and run again"
        raise UserError(f"{target} holds an incomplete dataset (no splits.json): {remedy}")
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    counts = dict(train=labelled or max(train // 50, 2), val=max(val // 30, 2))
    total = train + val + val // 2 + sum(counts.values()) * len(ALL_CLASSES)
    try:
        with tqdm(total=total, desc=f"drawing {target}", unit="img", mininterval=1) as bar:
            splits = dict(train2017=draw_split(draft, seed, "train2017", train, bar),
                          val2017=draw_split(draft, seed, "val2017", val, bar))
            draw_split(draft, seed, "valall2017", val // 2, bar)
            draw_imagenet(draft / "imagenet", seed, counts, (60, 92) if labelled else (36, 80), bar)
        for split, rows in splits.items():
            sentences = [dict(image_id=row["image"]["id"], caption=text)
                         for row in rows for text in row["captions"]]
            write_coco(draft / f"annotations/captions_{split}.json", rows, sentences)
            write_lvis(draft / f"annotations/lvis_v1_{split[:-4]}.json", rows, splits["train2017"], seed)
        write_voc(draft, splits)
        write_json(draft / "splits.json", base=BASE, novel=NOVEL, image_only=IMAGE_ONLY, frequency=FREQUENCY)
        os.rename(draft, target)
    except OSError as e:
        if not (target / "splits.json").is_file():  # a real failure, not another process that was faster
            raise UserError(not_written(target, e)) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def not_written(target, error):
    reason = error.strerror or str(error)
    return (f"{target}: the embedded dataset cannot be written there ({reason}); the environment variable "
            "DETECTION_CACHE names another folder: DETECTION_CACHE=/tmp/shapes")
