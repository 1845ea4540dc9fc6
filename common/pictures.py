# SPDX-License-Identifier: MIT
"""Pictures of a run: boxes, curves, sample pages, result files; the loop over images to predict.

    for picture in Pictures(args.predict, args.out, args.score):    # files and folders
        boxes, scores, labels = detect(picture.pixels)              # (3, H, W) uint8, upright
        picture.save(boxes, scores, labels, classes)                # notes and draws them
                                                                    # at the end predictions.json
"""
import colorsys
import io
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_convert, box_iou, nms
from tqdm import tqdm

from .run import UserError, write_whole

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def upright(path):
    """RGB PIL image, turned as its EXIF says. UserError where it cannot be decoded."""
    from .datasets import read_image  # here: a run that only draws curves needs no datasets
    return read_image(path)


def to_tensor(image):
    """RGB PIL image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def font_path():
    import matplotlib  # comes with lvis; here for its font
    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


def write_bytes(path, content):
    """A file appears whole or not at all, as write_whole's. No fsync: it can be made again."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: not written ({e.strerror or e})") from None


def write_jpeg(path, image, quality, comment=""):
    """PIL image -> file."""
    content = io.BytesIO()
    if max(image.size) > 65500:  # the format's limit
        image = image.copy()
        image.thumbnail((65500, 65500))
    image.save(content, "jpeg", quality=quality, subsampling=0, comment=comment.encode())
    write_bytes(path, content.getvalue())


# ------------------------------------------------------------------ curves

def plot_curves(log_path, out_path):
    """Every loss term and AP of a log.jsonl over the iterations."""
    from matplotlib.figure import Figure  # comes with lvis; needed here only

    rows = []
    for line in Path(log_path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a kill cut it in half
            continue
    train = [r for r in rows if "loss" in r]
    val = [r for r in rows if "loss" not in r and "refresh" not in r]
    scores = [n for n in (val[-1] if val else ())
              if n in ("AP", "AP50", "top1", "gt_known") or n.endswith("_AP50")
              or n.startswith("AR1000_")]
    series = [[(name, [r["it"] for r in train], [r.get(name, math.nan) for r in train])
               for name in loss_terms(train)],
              [(name, [r["it"] for r in val], [r.get(name, math.nan) for r in val])
               for name in scores]]
    labels = [dict(ylabel="loss", yscale="log"), dict(ylabel="percent")]
    # one point is no curve
    drawn = [(s, label) for s, label in zip(series, labels) if s and len(s[0][1]) > 1]
    if not drawn:
        return
    figure = Figure(figsize=(5.5 * len(drawn), 4))
    for axis, (lines, label) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn):
        for k, (name, x, y) in enumerate(lines):
            axis.plot(x, y, "o-" if "percent" in label.values() else "-", label=name, lw=1, ms=3,
                      color="black" if name == "loss" else f"C{k % 10}")
        axis.set(xlabel="iteration", **label)
        axis.legend(fontsize=7)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    write_bytes(out_path, content.getvalue())


def loss_terms(rows):
    """["loss", its terms] of a log's steps. A row is it, epoch, loss, terms, watched numbers, lr,
    ... in this order; the terms add up to the loss, which tells where they end."""
    if not rows:
        return []
    names = list(rows[-1])
    names = names[names.index("loss") + 1:]
    if "lr" in names:
        names = names[:names.index("lr")]
    alike = [r for r in rows if set(names) <= set(r)]
    for count in range(1, len(names)):
        if all(adds_up(r, names[:count]) for r in alike):
            return ["loss", *names[:count]]
    return ["loss", *names]


def adds_up(row, names):
    rounding = 1e-6 * (len(names) + 1)  # rows have six digits
    return abs(row["loss"] - sum(row[n] for n in names)) <= rounding


# ------------------------------------------------------------------ boxes and their names

def colour_of(label):
    """One colour a class, dark enough for white letters; neighbours differ (golden ratio)."""
    red, green, blue = colorsys.hls_to_rgb(label * 0.618034 % 1, 0.36, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_on(image, boxes, labels, classes, scores=None):
    """Draws boxes (N, 4) xyxy pixels on a PIL image, each with its name in white on a tab of its
    colour, inside the image and off the other tabs where there is room; scores (N,) in percent."""
    draw, taken = ImageDraw.Draw(image), []
    short = min(image.size)
    width = max(1, round(short / 130))
    font = ImageFont.truetype(font_path(), max(9, short // 26))
    order = list(range(len(boxes)))
    corners = torch.as_tensor(boxes).tolist()
    for i in reversed(order):  # the surest on top
        draw.rectangle(corners[i], outline=colour_of(int(labels[i])), width=width)
    for i in order:  # and its name where it belongs
        text = str(classes[int(labels[i])])
        if scores is not None:
            text += f" {100 * float(scores[i]):.0f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font)
        size = right - left + 6, bottom - top + 5
        at = place_tab(corners[i], size, image.size, taken)
        taken.append((*at, at[0] + size[0], at[1] + size[1]))
        draw.rectangle(taken[-1], fill=colour_of(int(labels[i])))
        draw.text((at[0] + 3 - left, at[1] + 2 - top), text, "white", font)


def place_tab(box, size, within, taken):
    """Left top corner of a tab: above its box, below it, at its inner corners; the first of these
    that lies in the image and on no other tab, else the first, moved into the image."""
    x1, y1, x2, y2 = box
    w, h = size
    spots = [(x1, y1 - h), (x2 - w, y1 - h), (x1, y2), (x2 - w, y2), (x1, y1), (x2 - w, y1),
             (x1, y2 - h), (x2 - w, y2 - h), (x2, y1), (x1 - w, y1)]
    moved = [(min(max(x, 0), max(within[0] - w, 0)), min(max(y, 0), max(within[1] - h, 0)))
             for x, y in spots]

    def free(x, y):
        return not any(x < b[2] and b[0] < x + w and y < b[3] and b[1] < y + h for b in taken)
    inside = [m for m, spot in zip(moved, spots) if m == spot]
    for x, y in [*inside, *moved]:
        if free(x, y):
            return x, y
    return moved[0]


def draw_boxes(image, boxes, labels, classes, scores=None):
    """uint8 (3, H, W) with boxes drawn, see draw_on."""
    if len(boxes) == 0:
        return image
    drawn = Image.fromarray(image.permute(1, 2, 0).numpy())
    draw_on(drawn, boxes.cpu(), labels, classes, scores)
    return to_tensor(drawn)


# ------------------------------------------------------------------ pages of validation images

MOST = 5  # boxes of a picture: the surest
SURE = 0.3  # a score from which on a box is drawn


def surest(results, dataset, items):
    """{image id: its surest MOST results above SURE} of these items; of results that lie on one another
    the surest, whatever its class. Classes that the dataset has no id for are left out."""
    known = {c for c in dataset.category_ids if c is not None}
    found = {item[0]: [] for item in items}
    if not isinstance(results, list):  # Detections: of the others no dict is made
        results = results.of(found)
    for r in results:
        if r["image_id"] in found and r["score"] > SURE and r["category_id"] in known:
            found[r["image_id"]].append(r)
    for image_id, mine in found.items():
        boxes = torch.tensor([r["bbox"] for r in mine], dtype=torch.float32).reshape(-1, 4)
        boxes = box_convert(boxes, "xywh", "xyxy")
        keep = nms(boxes, torch.tensor([float(r["score"]) for r in mine]), 0.6)[:MOST]
        found[image_id] = [mine[k] for k in keep.tolist()]
    return found


def show(dataset, item, size, results=None):
    """PIL image, its longer side `size`, of an item of the dataset: with its true boxes, or with
    results (COCO result dicts). None where the file cannot be read."""
    _, name, height, width, boxes, labels = item
    try:
        image = upright(Path(dataset.folder) / name)
    except UserError:  # the page is a help, not a result
        return None
    scale = size / max(height, width)  # of the annotation's pixels; a file may have others
    fitted = (max(1, int(width * scale)), max(1, int(height * scale)))
    image, scores = image.resize(fitted, Image.Resampling.BICUBIC), None
    if results is not None:
        label_of = {c: k for k, c in enumerate(dataset.category_ids) if c is not None}
        boxes = np.array([r["bbox"] for r in results], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [label_of[r["category_id"]] for r in results]
        scores = [r["score"] for r in results]
    draw_on(image, np.asarray(boxes) * scale, labels, dataset.classes, scores)
    return image


def write_page(rows, titles, path, comment=""):
    """A page of PIL images with a title above each column; comment: on top, and in the file."""
    gap, head = 6, 20
    font = ImageFont.truetype(font_path(), 13)
    widths = [max(image.width for image in column) for column in zip(*rows)]
    heights = [max(image.height for image in row) for row in rows]
    top = gap + head + (head if comment else 0)
    page = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1),
                             sum(heights) + top + gap * len(rows)), "white")
    draw, x = ImageDraw.Draw(page), gap
    draw.text((gap, gap // 2), comment, "black", font)
    for column, (width, title) in enumerate(zip(widths, titles)):
        draw.text((x, top - head), title, "black", font)
        y = top
        for row, height in zip(rows, heights):
            page.paste(row[column], (x, y))
            y += height + gap
        x += width + gap
    write_jpeg(path, page, 78, comment)


def save_samples(dataset, results, path, title="", count=6, size=320):
    """A page of the first validation images: ground truth, and right of it the surest results.

    dataset: items, a sequence of (image_id, name, height, width, boxes (M, 4) xyxy, labels (M,)),
    folder, classes, category_ids, None for a class that the file lacks. results: COCO result dicts.
    title: stands above the page and in the file's comment. No readable image: no page.
    """
    items, pairs = [dataset.items[k] for k in range(min(count, len(dataset.items)))], []
    found = surest(results, dataset, items)
    for item in items:
        truth = show(dataset, item, size)
        if truth:
            pairs.append([truth, show(dataset, item, size, found[item[0]])])
    if not pairs:
        return
    names = ["ground truth", "found"] * min(2, len(pairs))
    rows = [sum(pairs[k:k + 2], []) for k in range(0, len(pairs), 2)]
    blank = Image.new("RGB", (1, 1), "white")
    rows[-1] += [blank] * (len(names) - len(rows[-1]))
    write_page(rows, names, path, title)


def right(results, dataset, item):
    """How many objects of the item have one of the results on them, of their class, with an IoU of 0.5."""
    boxes = torch.tensor([r["bbox"] for r in results], dtype=torch.float32).reshape(-1, 4)
    overlap = box_iou(box_convert(boxes, "xywh", "xyxy"), torch.as_tensor(item[4], dtype=torch.float32))
    for k, r in enumerate(results):
        other = [dataset.category_ids[label] != r["category_id"] for label in item[5]]
        overlap[k, torch.tensor(other, dtype=torch.bool)] = 0
    return int((overlap >= 0.5).any(0).sum())


def save_comparison(dataset, results, out, wanted=(), count=3, size=300):
    """Path of a page: `count` images, a row each; ground truth and what the detectors find. results:
    {column title: a detections.json}. Images have two to MOST objects if there are such; of these come
    first those with objects of `wanted`, class names, and of others, then those where the number of
    objects that the first and the last detector name rightly differs most, in whichever direction. The head
    says on how many of them either is ahead."""
    items = [item for item in dataset.items if 2 <= len(item[4]) <= MOST] or [*dataset.items]
    columns = [surest(json.loads(Path(path).read_text()), dataset, items) for path in results.values()]
    fit, gains = [], []
    for k, item in enumerate(items):
        these = sum(dataset.classes[label] in wanted for label in item[5])
        ends = [right(column[item[0]], dataset, item) for column in (*columns[:1], *columns[-1:])]
        gains.append(ends[-1] - ends[0] if ends else 0)
        fit.append((-min(these, len(item[4]) - these), -abs(gains[k]), item[3] < item[2], k))  # wide first
    rows = []
    for item in [items[k] for *_, k in sorted(fit)[:count]]:
        rows.append([show(dataset, item, size, column and column[item[0]]) for column in (None, *columns)])
    path, head = Path(out) / "comparison.jpg", ""
    if len(results) > 1:
        more, fewer = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
        head = (f"{[*results][-1]} finds more objects than {[*results][0]} on {more} of {len(items)} images, "
                f"fewer on {fewer}")
    write_page(rows, ["ground truth", *results], path, head)
    return path


# ------------------------------------------------------------------ result files

def write_results(out, metrics, detections, dataset, of, epoch, it):
    """detections.json and samples.jpg (if there are detections and a dataset), then results.json.

    Each says of which checkpoint, epoch and step it is: `of`, `epoch`, `it`, the last two None
    where nobody knows. Detections of a class that the file has no id for (None) are not written.
    """
    out = Path(out)
    which = dict(checkpoint=utf8(of), epoch=epoch)
    title = utf8(of)
    if epoch is not None:
        title += f", epoch {epoch}"
    if it is not None:
        title += f", step {it}"
    if detections is not None and dataset is not None:
        write_whole(out / "detections.json", result_texts(detections, which))
        save_samples(dataset, detections, out / "samples.jpg", title)
    head = dict(which, it=it)
    numbers = {k: v for k, v in metrics.items() if k != "line" and k not in head}
    content = head | plain(numbers)
    write_whole(out / "results.json", json.dumps(content, indent=1, ensure_ascii=False))


def result_texts(detections, which):
    """The text of detections.json in parts: there may be six million."""
    yield "["
    results = (r | which for r in detections if r["category_id"] is not None)
    part = list(itertools.islice(results, 10000))
    while part:
        text = json.dumps(part)[1:-1]
        part = list(itertools.islice(results, 10000))
        yield text + (",\n" if part else "")
    yield "]"


def utf8(path):
    """A path as text of a UTF-8 file, also where the bytes of its name are no UTF-8."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def plain(values):
    """A dict as JSON can hold it, without the entries that it cannot: NaN, inf, tensors, ..."""
    kept = {}
    for name, value in values.items():
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, dict):
            value = plain(value)
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            continue
        if isinstance(name, (str, int, float)):
            kept[name] = value
    return kept


# ------------------------------------------------------------------ --predict

OURS = re.compile(r"\d{4,}_.*_(boxes|heat_.*)\.jpg", re.DOTALL)  # names of the pictures we write
MARK = ".predict-unfinished"  # in a folder whose predictions.json is still to come


class Pictures:
    """The images of --predict, one Picture after the other, and at the end predictions.json.

    names: files and folders. Images that cannot be read are left out with a line. `out` holds the
    files of one run only: those of an earlier one go before the first picture, nothing else does.
    """

    def __init__(self, names, out, score):
        self.names = " ".join(map(str, names))
        self.out = Path(out)
        self.score = score
        self.answer = {}
        self.paths = find_images(names, self.out)
        if not self.paths:
            raise UserError(f"--predict {self.names}: no image there")
        self.earlier = earlier_files(self.out, self.paths)

    def __iter__(self):
        first = True
        for number, path in enumerate(tqdm(self.paths, desc="predict")):
            try:
                pixels = to_tensor(upright(path))
            except UserError as e:  # the others are still wanted
                tqdm.write(f"left out: {e}", file=sys.stderr)
                continue
            if first:
                self.clear()
                first = False
            yield Picture(self, number, path, pixels)
        if first:
            raise UserError(f"--predict {self.names}: no image can be read")
        content = json.dumps(self.answer, indent=1, ensure_ascii=False)
        write_whole(self.out / "predictions.json", content)
        (self.out / MARK).unlink(missing_ok=True)
        boxes = sum(map(len, self.answer.values()))
        print(f"{boxes} boxes in {len(self.answer)} images -> {self.out}", flush=True)

    def clear(self):
        """From here on the folder is this run's. By the mark the next run knows what to remove,
        should this one not come to its end."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / MARK, "")
        for path in self.earlier:  # predictions.json first: it must not name what is gone
            path.unlink(missing_ok=True)


class Picture:
    """An image to predict: pixels (3, H, W) uint8 RGB upright, path, number, stem (for names)."""

    def __init__(self, pictures, number, path, pixels):
        self.pictures = pictures
        self.number = number
        self.path = path
        self.pixels = pixels
        self.stem = part_of_name(path.stem, 55)
        self.written = set()

    def save(self, boxes, scores, labels, classes, masks=None, extra=None):
        """Note the boxes above the wanted score, and draw them on the image.

        boxes (N, 4) xyxy pixels of the image, scores (N,), labels (N,) of `classes`; masks: N RLE
        dicts; extra: N dicts of what else is to be noted of a box.
        """
        keep = (scores > self.pictures.score).nonzero()[:, 0].cpu()
        boxes = boxes.detach().float().cpu()
        scores = scores.detach().float().cpu()
        labels = labels.cpu()
        noted = []
        for i in keep.tolist():
            entry = dict(box=[round(v, 1) for v in boxes[i].tolist()],
                         score=round(scores[i].item(), 4), label=classes[labels[i].item()])
            if masks:
                entry["mask"] = masks[i]
            if extra:
                entry.update(extra[i])
            noted.append(entry)
        self.pictures.answer[utf8(self.path)] = noted
        drawn = draw_boxes(self.pixels, boxes[keep], labels[keep], classes, scores[keep])
        self.write("boxes", drawn)

    def write(self, name, image):
        """A further picture of this image, (3, H, W) tensor or (H, W, 3) array in 0 ... 255.
        The next run into this folder removes it if its name begins with heat_."""
        if torch.is_tensor(image):
            image = image.detach().cpu().permute(1, 2, 0).numpy()
        image = Image.fromarray(np.ascontiguousarray(image.clip(0, 255).astype(np.uint8)))
        name = part_of_name(name, 30)
        unique = name
        while unique in self.written:  # names that differ only in what a file name cannot hold
            unique = f"{name}_{len(self.written)}"
        self.written.add(unique)
        file = f"{self.number:04d}_{self.stem}_{unique}.jpg"
        write_jpeg(self.pictures.out / file, image, 90)


def part_of_name(text, most):
    """Text as part of a file name: letters, digits, - . _; in UTF-8 at most 2 * most bytes."""
    text = re.sub(r"[^\w.-]", "_", text)[:most]
    return text.encode()[:2 * most].decode("utf-8", "ignore")


def find_images(names, out):
    """Paths of the images that files and folders name, each once. A named file is one whatever it
    is called; in a folder hidden files are none, nor are our own pictures in `out`."""
    found = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            paths = images_below(path, out)
        elif path.exists():
            paths = [path]
        else:
            raise UserError(f"--predict {name}: no such file or folder")
        for p in paths:
            found.setdefault(os.path.abspath(p), p)
    return list(found.values())


def images_below(top, out):
    found, seen = [], set()
    for folder, folders, files in os.walk(top, onerror=tell, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        for file in files:
            ours = OURS.fullmatch(file) and real == os.path.realpath(out)
            if file.lower().endswith(SUFFIXES) and not file.startswith(".") and not ours:
                found.append(Path(folder, file))
    return sorted(found)


def tell(error):
    print(f"left out: {error.filename}: {error.strerror}", file=sys.stderr)


def earlier_files(out, paths):
    """What an earlier --predict left in `out`. UserError where files have the names that we write
    and are not known to be ours, or are wanted as input."""
    if not out.is_dir():
        return []
    answer = out / "predictions.json"
    files = sorted(p for p in out.iterdir() if OURS.fullmatch(p.name))
    unknown = None
    if answer.exists():
        files.insert(0, answer)
        if not is_answer(answer):
            unknown = answer
    elif files and not (out / MARK).exists():
        unknown = files[0]
    if unknown:
        raise UserError(f"--out {out}: holds {unknown.name}, which is not known to be of an "
                        "earlier --predict; choose another folder, or remove it")
    given = {os.path.abspath(p) for p in paths}
    for path in files:
        if os.path.abspath(path) in given:
            raise UserError(f"--predict {path}: is of an earlier run into --out {out}, whose files "
                            "would be removed; choose another --out")
    return files


def is_answer(path):
    """Whether a file is a predictions.json of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        return False
    entries = [e for v in content.values() for e in v]
    return all(isinstance(e, dict) and {"box", "score", "label"} <= set(e) for e in entries)
