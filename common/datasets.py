# SPDX-License-Identifier: MIT
"""Boxes of COCO, LVIS and VOC: one cleaning step, transforms, batching and sampling.

A file is read once into `Records`, plain arrays, and there it is decided, for every entry, whether
it is kept, repaired, left out or refused. Training AND evaluation use the records, never the file;
what the file calls its images and classes comes back only in detections.json.

Everything random about a training image is drawn from one integer, made of (seed, epoch, image
index) by the sampler. So the pixels of a step do not depend on the number of workers or processes,
and a resumed run sees exactly the images that the uninterrupted run would have seen.

Of `common` this file needs the error class of run.py.
"""
import difflib
import errno
import gzip
import hashlib
import io
import json
import math
import mmap
import multiprocessing.queues
import os
import posixpath
import random
import re
import shutil
import signal
import stat
import sys
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import RandomPhotometricDistort, functional as TF

from .run import UserError, tell

RULES = 4  # version of the cleaning rules: caches of another version are made anew


# ------------------------------------------------------------------ where files are

OTHER_WAYS = "(own files: --{0}-json and --{0}-images; --data shapes needs nothing)"


def find_coco(root, split):
    """(image folder, instances json) of a COCO-layout root; split is "train" or "val"."""
    root = Path(root)
    images = root / f"{split}2017"
    annotations = root / "annotations" / f"instances_{split}2017.json"
    for path in (annotations, images):
        if not path.exists():
            raise UserError(f"--data {root}: {path} is missing; COCO 2017 is at "
                            f"https://cocodataset.org/#download {OTHER_WAYS.format(split)}")
    return images, annotations


def find_lvis(root, split, images="data/coco"):
    """(image folder, json) of LVIS v1: its images are COCO's, and coco_url says which."""
    annotations = Path(root) / "annotations" / f"lvis_v1_{split}.json"
    if not annotations.exists():
        raise UserError(f"--data {root}: {annotations} is missing; LVIS v1 is at "
                        f"https://www.lvisdataset.org/dataset {OTHER_WAYS.format(split)}")
    if not Path(images).is_dir():
        raise UserError(f"--images {images}: no such folder; LVIS uses COCO's images, it should "
                        "hold train2017 and val2017")
    return Path(images), annotations


def own_files(args, split):
    """(image folder, json) of --train-json or --val-json; None where they are not given, False
    where only the training files are: such a run has no validation set."""
    annotations, images = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
    if annotations is None:
        alone = split == "val" and args.train_json and not getattr(args, "eval", None)
        return False if alone else None
    for flag, path in ((f"--{split}-json", annotations), (f"--{split}-images", images)):
        if path is None:
            raise UserError(f"{flag}: is needed beside --{split}-json")
        if not Path(path).exists():
            raise UserError(f"{flag} {path}: is missing")
    return Path(images), Path(annotations)


# ------------------------------------------------------------------ reading json

def read_json(path):
    """Content of a json file: UTF-8 whatever the machine's locale, with or without BOM."""
    with reading(path):
        return json.loads(regular(path).read_text(encoding="utf-8-sig"))


@contextmanager
def reading(path):
    """What goes wrong while a json file is read, in one line."""
    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError, StopIteration) as e:  # StopIteration: of json's scanner
        reason = f"expected a value at byte {e}" if isinstance(e, StopIteration) else one_line(e)
        raise UserError(f"{path}: not valid json ({reason}); download or export it again") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def regular(path):
    """The path, if it is a file: reading a device or a pipe would never end."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
        raise UserError(f"{path}: is {kind}, not a file")
    return Path(path)


def one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def stream_json(path, take):
    """Reads a json object whose lists may be gigabytes, element by element.

    take: {key: function (element, start, end)} for the lists that matter; start, end: bytes of the
    file. Returns the keys of `take` that were lists. The file is read as Latin-1, a character a
    byte: so its text is as small as the file, and a place in it is a place in the file. Elements
    that hold more than ASCII are then decoded as UTF-8.
    """
    with reading(path):
        with open(regular(path), "rb") as f:
            if os.fstat(f.fileno()).st_size == 0:
                raise ValueError("the file is empty")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
                text = str(content, "latin-1")
        if text[:2] in ("\xff\xfe", "\xfe\xff"):
            raise ValueError("it is UTF-16; save it as UTF-8")
        return walk_json(text, 3 if text.startswith("\xef\xbb\xbf") else 0, take)


def walk_json(text, at, take):
    """stream_json, from place `at` of the text."""
    scan = json.JSONDecoder().scan_once  # (text, place) -> (value, its end)
    blank = re.compile(r"[ \t\n\r]*").match
    sign = re.compile(r"[ \t\n\r]*([,:\]}])[ \t\n\r]*").match
    ascii_only, found = text.isascii(), set()

    def expect(at, signs):
        match = sign(text, at)
        if match is None or match[1] not in signs:
            raise ValueError(f"expected {' or '.join(signs)} at byte {at}")
        return match[1], match.end()

    def elements(at, function):
        at = blank(text, at + 1).end()
        mark = text[at:at + 1]
        at += mark == "]"  # the list is empty
        while mark != "]":
            start = at
            element, end = scan(text, at)
            mark, at = expect(end, ",]")
            if not ascii_only and not text[start:end].isascii():
                element = json.loads(text[start:end].encode("latin-1").decode("utf-8"))
            function(element, start, end)
        return at

    at = blank(text, at).end()
    if text[at:at + 1] != "{":
        scan(text, at)  # raises, or it is a list or a number: valid json, but not ours
        return found
    at = blank(text, at + 1).end()
    mark = text[at:at + 1]
    if mark == "}":
        at = blank(text, at + 1).end()
    while mark != "}":
        key, at = scan(text, at)
        at = expect(at, ":")[1]
        if not isinstance(key, str) or key in found:
            raise ValueError(f"the key {key!r} is none, or stands there twice")
        if key in take and text[at:at + 1] == "[":
            found.add(key)
            at = elements(at, take[key])
        else:
            at = scan(text, at)[1]
        mark, at = expect(at, ",}")
    if at < len(text):
        raise ValueError(f"it goes on after its end, at byte {at}: two files in one?")
    return found


# ------------------------------------------------------------------ arrays, shared by processes

class Texts(Sequence):
    """Strings in one array of bytes; ends (N,): where each ends. Loader processes would get a copy
    of Python's own strings, page by page, as they look at them."""

    def __init__(self, content, ends):
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, parts):
        """Of bytes."""
        ends = np.cumsum([len(p) for p in parts], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

    def __len__(self):
        return len(self.ends)

    def raw(self, i):
        start = self.ends[i - 1] if i > 0 else 0
        return self.content[start:self.ends[i]].tobytes()

    def __getitem__(self, i):
        i = range(len(self))[i]
        return os.fsdecode(self.raw(i))  # a file's name as this machine's locale spells it


def checksum(arrays):
    crc = 0
    for a in arrays.values():
        crc = zlib.crc32(np.ascontiguousarray(a).reshape(-1).view(np.uint8), crc)
    return crc


def write_cache(place, key, about, arrays):
    """Arrays into one file, from which processes map them; whole, or not at all."""
    tensors = {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(key=key, about=about, crc=checksum(arrays), arrays=tensors), temporary)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def read_cache(place, key, verify=True):
    """(about, arrays) of write_cache; None where the file is missing, damaged or of another key."""
    try:
        state = torch.load(str(place), mmap=True, weights_only=True)
        if state["key"] != key:
            return None
        arrays = {name: t.numpy() for name, t in state["arrays"].items()}
        if verify and checksum(arrays) != state["crc"]:
            return None
        return state["about"], arrays
    except Exception:  # whatever it holds, it is not our cache
        return None


def cache_places(path):
    """Where the arrays of an annotation file may be kept: beside it, else in a cache folder."""
    folder = os.environ.get("DETECTION_CACHE") or Path.home() / ".cache" / "detection-papers"
    name = hashlib.sha256(os.fsencode(Path(path).resolve())).hexdigest()[:16]
    beside = Path(path).with_name(f".{Path(path).name}.records")
    return beside, Path(folder) / f"{name}.records"


# ------------------------------------------------------------------ the cleaning step

NUMBERS = {int, float}
BOX_FIELDS = ("xywh", "label", "owner", "area", "crowd", "difficult", "outline", "spans")
TEXT_FIELDS = ("ids", "names", "more")
FOUR = "expected four finite numbers x, y, width, height"
CUT = "boxes over the border of their image, cut there"
OUTSIDE = "boxes outside their image, left out"
NO_SIZE = "images without a size, taken from the picture"
IGNORED = "boxes that are to be ignored, taken as crowd"
TWICE = "boxes that stand there twice"
AGAIN = "images of a picture that another one has, too"
ROTATED = "boxes with a rotation, which is not read"
NO_AREA = "areas that are none, replaced by the box's"
LEAST = 0.01  # pixels: as float32 in a large image, a shorter side would be nothing
LVIS_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


def as_number(value):
    """A finite number; text that is one is taken for one. None where it is neither."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if type(value) in NUMBERS and -1e300 < value < 1e300 else None


def is_id(value):
    return isinstance(value, str) or as_number(value) is not None


def show(value, most=80):
    """A value of the file as an error names it."""
    text = repr(value)
    text = text if len(text) <= most else text[:most] + "..."
    return f"{text} (text)" if isinstance(value, str) else text


def name_error(name):
    """What is wrong with a class name, or None."""
    kinds = {unicodedata.category(c) for c in name}
    if not name:
        return "is empty"
    if kinds & {"Cc", "Zl", "Zp"}:
        return "holds a control character"
    if "Cs" in kinds:
        return "holds half of a character (a lone surrogate)"
    return None


def file_name_of(image, where):
    """Path of a picture in the image folder: file_name, or the end of LVIS's coco_url."""
    name = image.get("file_name")
    if name is None and isinstance(image.get("coco_url"), str):
        name = "/".join(image["coco_url"].split("/")[-2:])
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where} lacks id, width, height or file_name")
    if any(ord(c) < 32 for c in name):
        raise UserError(f"{where} has file_name {name!r}, which holds a control character")
    path = posixpath.normpath(name.replace("\\", "/"))
    if f"{path}/".startswith(("/", "../")) or re.match("[A-Za-z]:/", path):
        raise UserError(f"{where} has file_name {name!r}, which leaves the image folder; "
                        "names are relative to it")
    return path


def rle_counts(code):
    """Run lengths of COCO's compressed RLE, numbers of 5 bits a character, the lowest first; None
    where it is none. pycocotools trusts such texts: a wrong one makes it read or write anywhere."""
    counts, value, bits = [], 0, 0
    for c in code:
        c = ord(c) - 48
        if not 0 <= c < 64 or bits > 30:
            return None
        value |= (c & 31) << bits
        bits += 5
        if c & 32:  # the number goes on
            continue
        if c & 16:  # it is negative
            value -= 1 << bits
        if len(counts) > 2:  # the difference to the run before the last
            value += counts[-2]
        counts.append(value)
        value, bits = 0, 0
    return None if bits else counts


def usable(polygon):
    """Three corners or more, as finite numbers x y x y ..."""
    try:
        return len(polygon) >= 6 and len(polygon) % 2 == 0 and math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        return False


def flagged(value):
    return value is True or as_number(value) not in (None, 0)


def rotation_of(attributes):
    """Degrees by which a tool (CVAT, Datumaro) has turned the box; 0 without."""
    turned = attributes.get("rotation") if isinstance(attributes, dict) else 0
    return (as_number(turned) or 0) % 360


def outline_kind(outline):
    """0: no usable outline; 1: polygons, at least one is usable; height * 2^32 + width: run lengths
    that cover an image of this size exactly."""
    if type(outline) is list:
        return int(any(map(usable, outline)))
    if type(outline) is not dict:
        return 0
    size, counts = outline.get("size"), outline.get("counts")
    if type(size) is not list or [*map(type, size)] != [int, int] or min(size) < 1:
        return 0
    if isinstance(counts, str):
        counts = rle_counts(counts)
    if type(counts) is not list or set(map(type, counts)) != {int} or min(counts) < 0:
        return 0
    height, width = size
    fits = sum(counts) == height * width and max(size) <= 10**6
    return height << 32 | width if fits else 0


class Collector:
    """Takes the elements of a COCO-format file as they come, and makes Records of them.
    where: the file's name, for errors."""

    def __init__(self, where):
        self.where = where
        self.count = Counter()  # what was repaired or left out: {reason: entries}
        self.categories = []
        self.images = []  # [id, name, width, height, json of LVIS's lists]
        self.place = {}  # image id -> its place there
        self.image_of, self.category_of = [], []  # ids of each annotation
        self.boxes, self.areas = array("d"), array("d")
        self.outlines, self.spans = array("q"), array("q")
        self.crowd, self.difficult = bytearray(), bytearray()

    def refuse(self, text):
        raise UserError(f"{self.where}: {text}")

    def refuse_entry(self, k, text, entry=None):
        """Of the k-th annotation; its id is read from the file once more if it is not at hand."""
        if entry is None and self.spans[2 * k + 1] > 0:
            with open(self.where, "rb") as f:
                start, end = self.spans[2 * k:2 * k + 2]
                f.seek(start)
                entry = json.loads(f.read(end - start).decode("latin-1"))
        number = (entry or {}).get("id")
        name = f"number {k + 1}" if number is None else show(number)
        self.refuse(f"annotation {name} {text}")

    def category(self, c, start=-1, end=-1):
        if not isinstance(c, dict) or "id" not in c or "name" not in c:
            self.refuse(f"category {show(c)} lacks id or name")
        if not is_id(c["id"]):
            self.refuse(f"category {show(c)} has id {show(c['id'])}; expected a number")
        name = c["name"]
        if type(name) in NUMBERS:
            name = str(name)
            self.count["class names that were numbers, read as text"] += 1
        if not isinstance(name, str):
            self.refuse(f"category {show(c['id'])} has name {show(name)}; expected text")
        stripped = name.strip()
        self.count["class names with blanks around them, cut"] += stripped != name
        wrong = name_error(stripped)
        if wrong:
            self.refuse(f"category {show(c['id'])} has name {name!r}, which {wrong}")
        self.categories.append(dict(c, name=stripped))

    def image(self, i, start=-1, end=-1):
        if not isinstance(i, dict):
            self.refuse(f"'images' holds {show(i)}, which is no object")
        key = i.get("id")
        where = f"{self.where}: image {show(key)}"
        if not is_id(key):
            raise UserError(f"{where} lacks id, width, height or file_name")
        name = file_name_of(i, where)
        sides = [self.side(i.get(side), f"{where} has {side}") for side in ("width", "height")]
        if key in self.place:
            other = self.images[self.place[key]]
            if other[1:4] == [name, *sides]:
                self.count["images that are listed twice, once left out"] += 1
                return
            raise UserError(f"{where} stands there twice, for {other[1]} and for {name}; every "
                            "image needs an id of its own (were two files joined?)")
        self.place[key] = len(self.images)
        more = {k: i[k] for k in (*LVIS_LISTS, "category_id") if k in i}
        self.images.append([key, name, *sides, json.dumps(more) if more else ""])

    def side(self, given, where):
        """Width or height of an image; 0 where there is none."""
        value = as_number(0 if given is None else given)
        if value is None or value != int(value) or not 0 <= value <= 10**6:
            raise UserError(f"{where} {show(given)}; expected a number of pixels")
        self.count["sizes given as text, read as numbers"] += isinstance(given, str)
        return int(value)

    def annotation(self, a, start=-1, end=-1):
        if not isinstance(a, dict):
            self.refuse(f"'annotations' holds {show(a)}, which is no object")
        box, area, crowd = a.get("bbox"), a.get("area"), a.get("iscrowd")
        # The usual kinds are passed quickly: COCO has 860,000 of these, Objects365 25 million.
        if type(box) is not list or len(box) != 4 or not {*map(type, box)} <= NUMBERS:
            box = self.box_of(a)
        if type(area) not in NUMBERS or not 0 <= area < 1e300:
            area = self.area_of(area)
        if type(crowd) is not int or not 0 <= crowd <= 1:
            crowd = self.crowd_of(a)
        if "ignore" in a and not crowd and flagged(a["ignore"]):
            crowd = self.count_one(IGNORED)
        if "attributes" in a and rotation_of(a["attributes"]):
            self.count_one(ROTATED)
        try:
            self.boxes.extend(box)
        except OverflowError:  # an integer of hundreds of digits
            self.box_of(a)
        self.areas.append(area)
        self.crowd.append(crowd)
        self.difficult.append(flagged(a.get("difficult")))
        self.outlines.append(outline_kind(a.get("segmentation")))
        self.spans.append(start)
        self.spans.append(end)
        self.image_of.append(a.get("image_id"))
        self.category_of.append(a.get("category_id"))

    def box_of(self, a):
        box = a.get("bbox")
        numbers = [as_number(v) for v in box] if isinstance(box, (list, tuple)) else []
        if len(numbers) != 4 or None in numbers:
            self.refuse_entry(len(self.crowd), f"has bbox {show(box)}; {FOUR}", a)
        self.count["boxes given as text, read as numbers"] += any(isinstance(v, str) for v in box)
        return numbers

    def area_of(self, given):
        """NaN stands for: as large as the box."""
        area = as_number(given)
        if area is None or area < 0:
            self.count[NO_AREA] += given is not None
            return math.nan
        self.count["areas given as text, read as numbers"] += 1
        return area

    def count_one(self, reason):
        self.count[reason] += 1
        return 1

    def crowd_of(self, a):
        given = a.get("iscrowd")
        if given is None or type(given) is bool:
            return int(given or 0)
        crowd = as_number(given)
        if crowd not in (0, 1):
            self.refuse_entry(len(self.crowd), f"has iscrowd {show(given)}; expected 0 or 1", a)
        return int(crowd)

    def records(self, folder=None):
        """Records of what was taken. folder: of the images, for sizes that the file lacks."""
        categories = sorted(self.categories, key=lambda c: (isinstance(c["id"], str), c["id"]))
        row_of = {c["id"]: k for k, c in enumerate(categories)}
        if not categories:
            self.refuse("the 'categories' list is empty")
        if not self.images:
            self.refuse("the 'images' list is empty")
        if len(row_of) < len(categories):
            twice = Counter(c["id"] for c in categories).most_common(1)[0][0]
            self.refuse(f"a category id occurs twice: {show(twice)}")
        label = self.rows(self.category_of, row_of, "category id", "categories")
        owner = self.rows(self.image_of, self.place, "image id", "images")
        self.find_sizes(folder)
        sizes = np.array([i[2:4] for i in self.images], np.int32)  # width, height
        xywh, keep = self.clean_boxes(sizes[owner])
        kept = np.flatnonzero(keep)
        kept = kept[np.argsort(owner[kept], kind="stable")]  # image after image
        owner = owner[kept]
        categories, label = self.without_twins(categories, label[kept])
        area = np.array(self.areas)[kept]
        wrong = area > 1.5 * np.abs(np.array(self.boxes).reshape(-1, 4)[kept, 2:]).prod(1) + 1
        area[wrong] = math.nan
        self.count[NO_AREA] += int(wrong.sum())
        self.count[TWICE] += int((~first_of_equals(owner, label, xywh[kept])).sum())
        self.count[AGAIN] += len(self.images) - len({i[1] for i in self.images})
        code = np.array(self.outlines, np.int64)[kept]
        width, height = sizes[owner].astype(np.int64).T
        outline = np.where(code == height << 32 | width, 2, code == 1)
        arrays = dict(
            sizes=sizes, xywh=xywh[kept], label=label.astype(np.int32),
            owner=owner.astype(np.int32), area=area,
            crowd=np.array(self.crowd, np.uint8)[kept],
            difficult=np.array(self.difficult, np.uint8)[kept],
            outline=outline.astype(np.uint8),
            spans=np.array(self.spans, np.int64).reshape(-1, 2)[kept])
        ids, names, _, _, more = zip(*self.images)
        arrays |= packed("ids", [json.dumps(i).encode() for i in ids])
        arrays |= packed("names", [n.encode("utf-8", "surrogatepass") for n in names])
        arrays |= packed("more", [m.encode() for m in more])
        count = {reason: n for reason, n in self.count.items() if n}
        return Records(self.where, dict(categories=categories, count=count), arrays)

    def rows(self, ids, row_of, what, listed):
        """Place of each annotation's image or category; the first that is not listed is refused,
        beside the one it may mean."""
        try:
            if bool not in set(map(type, ids)):  # True would be taken for 1
                return np.array([row_of[i] for i in ids], np.int64)
        except (KeyError, TypeError):
            pass
        for k, i in enumerate(ids):
            if not is_id(i) or i not in row_of:
                text = f"has {what} {show(i)}, which '{listed}' does not list"
                twin = [j for j in row_of if str(j) == str(i) and is_id(i)]
                self.refuse_entry(k, text + (f"; it lists {show(twin[0])}" if twin else ""))

    def find_sizes(self, folder):
        """Width and height from the picture where the file has none, or 0."""
        for i in self.images:
            if min(i[2:4]) == 0:
                if folder is None:
                    self.refuse(f"image {show(i[0])} lacks id, width, height or file_name")
                i[2:4] = picture_size(Path(folder) / os.fsdecode(i[1].encode()))
                self.count[NO_SIZE] += 1

    def clean_boxes(self, sizes):
        """(xywh (n, 4), which of them are boxes at all). sizes (n, 2): of each one's image.

        Boxes drawn from another corner are turned. Those over the border are cut, but not where
        that is the rounding of a file, COCO's too: its numbers are then those of its evaluation.
        """
        xywh = np.array(self.boxes).reshape(-1, 4)
        bad = np.flatnonzero(~np.isfinite(xywh).all(1))
        if len(bad):
            self.refuse_entry(int(bad[0]), f"has bbox {xywh[bad[0]].tolist()}; {FOUR}")
        if len(xywh) and (np.abs(xywh) <= 1.01).all() and (sizes > 4).all():
            self.refuse(f"all {len(xywh)} boxes lie within 0 ... 1: they look like fractions of "
                        "the image; expected pixels x, y, width, height")
        turned = xywh[:, 2:] < 0
        low = xywh[:, :2] + np.where(turned, xywh[:, 2:], 0)
        side = np.abs(xywh[:, 2:])
        seen_low, seen_end = np.maximum(low, 0), np.minimum(low + side, sizes)
        seen = seen_end - seen_low
        solid = (side >= LEAST).all(1)
        inside = (seen >= LEAST).all(1)
        keep = solid & inside
        over = keep & ((side - seen > 1) | (seen < 0.98 * side)).any(1)
        xywh = np.where(over[:, None], np.hstack([seen_low, seen]), np.hstack([low, side]))
        self.count["boxes drawn from another corner, turned"] += int(turned.any(1).sum())
        self.count["boxes without width or height, left out"] += int((~solid).sum())
        self.count[OUTSIDE] += int((solid & ~inside).sum())
        self.count[CUT] += int(over.sum())
        if len(xywh) and not keep.any():
            reasons = "; ".join(f"{n} {reason}" for reason, n in self.count.items() if n)
            self.refuse(f"no box is left of {len(xywh)}: {reasons}")
        return xywh, keep

    def without_twins(self, categories, label):
        """Two categories of one name: one without a box is left out, two with boxes are refused."""
        held = np.bincount(label, minlength=len(categories))
        row_of, rows = {}, []
        for k in np.argsort(held == 0, kind="stable").tolist():  # those with boxes first
            c = categories[k]
            other = row_of.setdefault(c["name"], k)
            if other == k:
                rows.append(k)
            elif held[k]:
                self.refuse(f"categories {show(categories[other]['id'])} and {show(c['id'])} have "
                            f"the same name {c['name']!r}, and both have boxes; rename one")
            else:
                self.count[f"category {show(c['id'])}, which has no box and the name "
                           f"{c['name']!r} of another, left out"] += 1
        rows.sort()
        place = np.full(len(categories), -1)
        place[rows] = np.arange(len(rows))
        return [categories[k] for k in rows], place[label]


def first_of_equals(owner, label, xywh):
    """(n,) bool: boxes that are not the second of equal ones, image, class and place; owner ascends."""
    once = np.zeros(len(owner), bool)
    ends = np.searchsorted(owner, np.arange(0, (int(owner[-1]) + 1 if len(owner) else 0) + 100_000, 100_000))
    for start, end in zip(ends, ends[1:]):  # all 25 million of Objects365 at once: ten times the memory
        fields = owner[start:end], label[start:end], xywh[start:end]
        once[start + np.unique(np.column_stack(fields), axis=0, return_index=True)[1]] = True
    return once


def packed(name, parts):
    """The two arrays of a text field."""
    texts = Texts.of(parts)
    return {name: texts.content, f"{name}_ends": texts.ends}


class Records:
    """Cleaned boxes of one annotation file. Arrays over images, in the file's order, and over
    boxes, image after image.

    images: ids, names (in the image folder), sizes (N, 2) width, height, more (json of LVIS's lists
        and of category_id).
    boxes: xywh (n, 4) float64 pixels, label (n,) row of `categories`, owner (n,) image, area (NaN:
        that of the box), crowd, difficult, outline 0 none, 1 polygons, 2 run lengths, spans (n, 2)
        bytes of the entry in the file.
    first (N + 1,): image i has boxes first[i] ... first[i + 1] - 1.
    categories: dicts of the file, by id, names unique. count: {what was repaired, left out: n}.
    """

    def __init__(self, path, about, arrays, cache=None):
        self.path, self.about, self.arrays, self.cache = Path(path), about, arrays, cache
        self.categories, self.count = about["categories"], about["count"]
        self.file = None
        for name in ("sizes", *BOX_FIELDS):
            setattr(self, name, arrays[name])
        for name in TEXT_FIELDS:
            setattr(self, name, Texts(arrays[name], arrays[f"{name}_ends"]))
        self.first = np.searchsorted(self.owner, np.arange(len(self.sizes) + 1))

    def __reduce__(self):  # to loader processes that are not forked
        if self.cache:
            return reopen, (self.path, *self.cache)
        return Records, (self.path, self.about, self.arrays)

    def __len__(self):
        return len(self.sizes)

    @property
    def classes(self):
        return [c["name"] for c in self.categories]

    def image_id(self, i):
        return json.loads(self.ids[i])

    def lvis_lists(self, i):
        return json.loads(self.more[i] or "{}")

    def subset(self, keep):
        """Records of some images, keep (N,) bool."""
        rows = keep[self.owner]
        place = np.cumsum(keep) - 1
        arrays = {name: getattr(self, name)[rows] for name in BOX_FIELDS}
        arrays |= dict(sizes=self.sizes[keep], owner=place[arrays["owner"]].astype(np.int32))
        for name in TEXT_FIELDS:
            texts = getattr(self, name)
            arrays |= packed(name, [texts.raw(i) for i in np.flatnonzero(keep)])
        return Records(self.path, self.about, arrays)

    def segmentation(self, k):
        """Outline of box k as the file has it, without polygons that are none."""
        start, end = self.spans[k].tolist()
        try:
            if self.file is None:
                self.file = os.open(self.path, os.O_RDONLY)
            content = os.pread(self.file, end - start, start)
            outline = json.loads(content.decode("latin-1"))["segmentation"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: has changed since it was read; start again") from None
        if isinstance(outline, dict):
            return outline
        far = 2 * int(self.sizes[self.owner[k]].max())  # pycocotools walks along every edge
        return [[min(max(v, -far), far) for v in p] for p in outline if usable(p)]

    def report(self):
        """One line: what is there, what was repaired or left out."""
        counts = [reason if reason.startswith("category ") else f"{n:,} {reason}"
                  for reason, n in self.count.items()]
        line = (f"{self.path}: {len(self.xywh):,} boxes, {len(self):,} images, "
                f"{len(self.categories):,} classes")
        return line + (" | " + "; ".join(counts) if counts else "")

    def warning(self):
        """A line where the file may mean something else than it says: many boxes leave their image, are
        very small or crowd, pictures stand there twice. Or ""."""
        outside = self.count.get(OUTSIDE, 0)
        beyond = outside + self.count.get(CUT, 0)
        small = int((self.xywh[:, 2:] < 1).any(1).sum())
        every = len(self.xywh) + outside
        head = f"warning: {self.path}:"
        if beyond > max(1, 0.1 * every):
            return (f"{head} {beyond:,} of {every:,} boxes reach beyond their image; "
                    "are they x1 y1 x2 y2 instead of x, y, width, height?")
        if small > max(1, 0.1 * every):
            return (f"{head} {small:,} of {every:,} boxes are under 1 pixel; "
                    "are they fractions of the image instead of pixels?")
        if AGAIN in self.count:
            return (f"{head} {self.count[AGAIN]:,} {AGAIN}: were files joined? Each of them lacks the "
                    "other's boxes; join their annotations under one id")
        if (crowd := int(self.crowd.sum()) - self.count.get(IGNORED, 0)) > max(1, 0.1 * every):
            return (f"{head} {crowd:,} of {every:,} boxes are iscrowd 1, which is not trained and hardly "
                    "scored; some tools write it for every mask: then set it to 0")
        return ""


def read_annotations(path, folder=None, then=None, **more):
    """Records of a COCO-format json (instances, LVIS): those of the cache, if it is of this very
    file, else it is read and cleaned now. folder: of the images. then: a function (records, folder)
    -> Records that comes before the cache; more: what its answer depends on, beside the file.

    Of several processes of a machine the first reads; the arrays are on disk, so that all of them
    and their loaders share the memory.
    """
    path = Path(path)
    with reading(path):
        about = regular(path).stat()
    key = dict(rules=RULES, size=about.st_size, time=about.st_mtime_ns, **more)
    if about.st_size <= 1 << 20:  # read faster than looked up
        records = read_records(path, folder)
        return then(records, folder) if then else records
    together = dist.is_available() and dist.is_initialized()
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if together and not first:
        dist.barrier()
    records = open_cache(path, cache_places(path), key, first)
    if records is None:
        records = read_records(path, folder)
        records = then(records, folder) if then else records
        if NO_SIZE not in records.count:  # pictures may change, and the key would not tell
            records = keep_cache(path, key, records)
    if together and first:
        dist.barrier()
    return records


def read_records(path, folder):
    """read_annotations without a cache."""
    taker = Collector(path)
    lists = dict(images=taker.image, annotations=taker.annotation, categories=taker.category)
    found = stream_json(path, lists)
    for name in lists:
        if name not in found:
            raise UserError(f"{path}: no '{name}' list; this is not COCO instances json")
    return taker.records(folder)


def records_of(content, where, folder=None):
    """Records of a dict in COCO's format (VOC's XML, a file that a script has changed)."""
    taker = Collector(Path(where))
    for c in content["categories"]:
        taker.category(c)
    for i in content["images"]:
        taker.image(i)
    for a in content["annotations"]:
        taker.annotation(a)
    return taker.records(folder)


def open_cache(path, places, key, verify=True):
    """Records of the first of these places where a cache file of the key is, or None."""
    for place in places:
        content = read_cache(place, key, verify)
        if content is not None:
            return Records(path, *content, cache=(place, key))
    return None


def reopen(path, place, key):
    """Records in a loader process."""
    records = open_cache(path, [place], key, verify=False)
    if records is None:
        raise UserError(f"{path}: has changed since it was read; start again")
    return records


def keep_cache(path, key, records):
    """The records from a cache file made of them; themselves, with a line, where that fails."""
    beside, elsewhere = cache_places(path)
    reason = "its folder is read-only"
    for place in (beside, elsewhere):
        if place == beside and not path.parent.stat().st_mode & 0o222:  # root could write there
            continue
        try:
            write_cache(place, key, records.about, records.arrays)
        except (OSError, RuntimeError) as e:  # RuntimeError: torch's word for a full disk
            reason = one_line(e)
            continue
        if place == elsewhere:
            print(f"{path}: {reason}; its boxes are kept in {place} "
                  "(DETECTION_CACHE names another folder)", flush=True)
        return open_cache(path, [place], key, verify=False) or records
    print(f"{path}: its boxes cannot be kept on disk ({reason}); every process reads the file",
          flush=True)
    return records


def read_objects365(path, folder):
    """Records of Objects365 v2's json, see objects365; shared and kept as read_annotations does, as
    long as the same number of files lies in the folder."""
    files = sum(len(names) for place, _, names in os.walk(folder) if place != str(folder))
    return read_annotations(path, folder, objects365, files=files)


def objects365(records, folder):
    """Objects365 v2 as its files lie on the disk: patchN/name.jpg, without the few that do not
    exist; a box that stands there twice counts once."""
    names = ["/".join(n.split("/")[-2:]) for n in records.names]
    listed = list_folders(folder, names)
    keep = np.array([is_listed(n, listed) for n in names])
    lost = int((~keep).sum())
    if lost > max(10, len(names) // 1000):
        raise UserError(f"{folder}: {lost} of {len(names)} images are missing; Objects365 v2 is "
                        "at https://www.objects365.org")
    once = first_of_equals(records.owner, records.label, records.xywh)
    again = int((~once).sum())
    count = {reason: n for reason, n in records.count.items() if reason != TWICE}
    count |= {"images that are not on the disk, left out": lost} if lost else {}
    count |= {"boxes that are listed twice, once left out": again} if again else {}
    arrays = dict(records.arrays, **{name: getattr(records, name)[once] for name in BOX_FIELDS})
    arrays |= packed("names", [os.fsencode(n) for n in names])
    records = Records(records.path, dict(records.about, count=count), arrays)
    return records.subset(keep) if lost else records


def list_folders(root, names):
    """{folder: file names in it} of paths below the root: one listing a folder, not a look-up for
    each of 118,287 files on a network disk."""
    listed = {}
    for folder in {os.path.dirname(n) for n in names}:
        there = Path(root) / folder
        listed[folder] = set(os.listdir(there)) if there.is_dir() else set()
    return listed


def is_listed(name, listed):
    folder, file = os.path.split(name)
    return file in listed[folder]


# ------------------------------------------------------------------ pictures

MOST_BYTES = 256 << 20  # of a picture, also after decompression
FLIP = Image.Transpose
TURNS = {2: FLIP.FLIP_LEFT_RIGHT, 3: FLIP.ROTATE_180, 4: FLIP.FLIP_TOP_BOTTOM, 5: FLIP.TRANSPOSE,
         6: FLIP.ROTATE_270, 7: FLIP.TRANSVERSE, 8: FLIP.ROTATE_90}  # EXIF orientation -> upright
TURNED = set()  # folders of which it is told that pictures were turned


def read_image(path, content=None, quiet=False):
    """RGB PIL image, upright, 8 bit: grey and CMYK files are converted, 16-bit ones scaled, the
    turn of an EXIF orientation is carried out, and stands in info["turned"] then.

    content: the file's bytes, if they are at hand. quiet: a turn is not told. Raises UserError for
    whatever is wrong with the file.
    """
    with opened(path, content) as image:
        image.load()
        turn = orientation(image)
        if turn in TURNS:
            image = image.transpose(TURNS[turn])
            folder = Path(path).parent
            if folder not in TURNED and not quiet:
                TURNED.add(folder)
                print(f"{path}: EXIF orientation {turn}, turned upright (told once a folder)",
                      file=sys.stderr)
        image = eight_bit(image, path).convert("RGB")
        image.info = dict(turned=turn) if turn in TURNS else {}
        return image


def as_pixels(image):
    """(3, H, W) uint8 RGB of a path, a PIL image or such a tensor; upright, 8 bit."""
    if torch.is_tensor(image):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise UserError(f"image: is {image.dtype} of shape {tuple(image.shape)}, expected uint8 RGB "
                            "(3, H, W)")
        return image
    if isinstance(image, np.ndarray):
        raise UserError("image: is a numpy array, BGR or RGB; give torch.from_numpy(RGB).permute(2, 0, 1)")
    if isinstance(image, Image.Image):
        image.load()  # Pillow turns a TIFF itself then, and drops its orientation
        turn = orientation(image)
        image = image.transpose(TURNS[turn]) if turn in TURNS else image
        image = eight_bit(image, "image").convert("RGB")
    else:
        image = read_image(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def picture_size(path):
    """(width, height) of read_image, from the file's head alone."""
    with opened(path) as image:
        if image.format == "TIFF":  # Pillow turns these itself
            image.load()
        width, height = image.size
        return (height, width) if orientation(image) in (5, 6, 7, 8) else (width, height)


@contextmanager
def opened(path, content=None):
    """Pillow's image of a file, or of its bytes; what goes wrong with it, in one line."""
    limit = f"than {MOST_BYTES >> 20} MiB, which no picture here is"
    try:
        with open(regular(path), "rb") if content is None else io.BytesIO(content) as f:
            if f.seek(0, 2) > MOST_BYTES:
                raise UserError(f"{path}: is larger {limit}")
            f.seek(0)
            if f.read(2) == b"\x1f\x8b":  # some files of ImageNet-21K are gzip-compressed JPEGs
                f.seek(0)
                content = gzip.GzipFile(fileobj=f).read(MOST_BYTES + 1)
                if len(content) > MOST_BYTES:
                    raise UserError(f"{path}: unpacks to more {limit}")
                f = io.BytesIO(content)
            f.seek(0)
            with Image.open(f) as image:
                yield image
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: image is missing") from None
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # of the machine, not of the picture
            raise
        if e.errno in (errno.EACCES, errno.EPERM, errno.EIO):
            raise UserError(f"{path}: cannot be read ({e.strerror})") from None
        raise UserError(f"{path}: cannot be decoded ({one_line(e)}); fetch the file again") from None
    except Image.DecompressionBombError as e:
        raise UserError(f"{path}: is larger than Pillow reads ({e}); scale it down first") from None
    except Exception as e:  # a damaged picture makes Pillow's plugins raise anything
        raise UserError(f"{path}: cannot be decoded ({one_line(e)}); "
                        "fetch the file again") from None


def orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF beside a good picture turns nothing
        return 1


def eight_bit(image, path):
    """16-bit grey scaled to 8 bit: Pillow itself cuts at 255, which makes it white. Float pixels
    are refused, since nobody tells their range."""
    if image.mode == "F":
        raise UserError(f"{path}: holds floating-point pixels, whose range nobody tells; "
                        "convert it to 8 bit")
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image)
    if image.format == "TIFF" and image.tag_v2.get(262) == 0 and image.mode.startswith("I;16"):
        levels = 65535 - levels  # 0 is white; Pillow inverts 8 bits, but not 16
    if levels.size and not 0 <= levels.min() <= levels.max() <= 65535:
        raise UserError(f"{path}: holds grey levels {levels.min()} to {levels.max()}, more than "
                        "16 bit; convert it to 8 bit")
    if image.mode == "I" and image.format == "TIFF" and 0 < levels.max() < 256:
        raise UserError(f"{path}: holds 32-bit pixels up to {levels.max()}: of 8 bit, or of 16? "
                        "convert it to 8 bit")
    return Image.fromarray((levels / 257).round().astype(np.uint8))


# ------------------------------------------------------------------ the dataset

# COCO's classes of the open-vocabulary literature: the 48 base and 17 novel of Bansal et al. 2018
# (15 classes belong to neither), and the 15 novel of Rahman et al. 2018 (all others are base).
BASE_48 = """person, bicycle, car, motorcycle, train, truck, boat, bench, bird, horse, sheep, bear,
zebra, giraffe, backpack, handbag, suitcase, frisbee, skis, kite, surfboard, bottle, fork, spoon,
bowl, banana, apple, sandwich, orange, broccoli, carrot, pizza, donut, chair, bed, toilet, tv,
laptop, mouse, remote, microwave, oven, toaster, refrigerator, book, clock, vase,
toothbrush""".replace("\n", " ").split(", ")
NOVEL_17 = """airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup,
knife, cake, couch, keyboard, sink, scissors""".replace("\n", " ").split(", ")
NOVEL_15 = """airplane, train, parking meter, cat, bear, suitcase, frisbee, snowboard, fork,
sandwich, hot dog, toilet, mouse, toaster, hair drier""".replace("\n", " ").split(", ")


class Items(Sequence):
    """(image id, name, height, width, boxes (M, 4) xyxy float32, labels (M,)) of each image of a
    CocoDataset, made when asked for."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset.kept)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        data, records = self.dataset, self.dataset.records
        row = int(data.kept[i])
        width, height = records.sizes[row].tolist()
        here = data.rows(row)
        boxes, labels = to_corners(records.xywh[here]), data.label_of[records.label[here]]
        return records.image_id(row), records.names[row], height, width, boxes, labels


def to_corners(xywh):
    """(n, 4) float64 x, y, width, height -> float32 x1, y1, x2, y2."""
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).astype(np.float32)


class CocoDataset(Dataset):
    """COCO-format boxes. Item: dict with image (3, h, w) uint8, size (h, w), boxes (M, 4), labels
    (M,), ...

    Labels are 0..K-1 in the order of the category ids, which may have holes. Beside what the
    cleaning step leaves out, training drops, and counts in `dropped`: crowd boxes, boxes under 1 px
    or of area 0, images without any annotation (keep_empty: not) or with a side < 32 px (min_side).
    Images that have crowd regions only stay, without boxes: they are background. keep_empty in validation:
    beside `classes`, images that hold no box of another class stay, too.

    image_size: "800" short side; "640,800" one of these per image; "480-800" uniform. The long side
    is at most 1333/800 of the largest of these: 1333 in all three. Keys come from BatchPlan:
    (index, random seed).

    annotations: json, or Records. like: class names of the training set, whose labels the boxes
    get, by name; the file may know fewer. classes: keep these names only, in the order of their
    ids, and only images with a box of one (open-vocabulary splits). without: names whose images are
    left out as a whole. captions: a COCO captions json; an item then has a sentence of its image,
    drawn anew at each visit, or "" where the file has none.

    canvas: instead of image_size, large-scale jitter (Ghiasi et al. 2021): the long side becomes
    jitter (low, high) times canvas, then a random window of at most canvas x canvas; in validation
    the long side becomes canvas. masks: items have `masks`, see window_masks; boxes without outline
    are left out. hidden: names whose boxes go to `hidden` (H, 4), never to boxes: for oracles.
    originals: items have the file's pixels and the window (6,) that was cut. photometric: colours
    are distorted, as SSD does. small: boxes that training drops are dropped in validation, too; it
    keeps them otherwise, since COCO's evaluation counts them. flip_words: the caption of a flipped image
    has left and right swapped.
    """

    def __init__(self, images, annotations, train, image_size="800", flip=0.5, min_side=32,
                 classes=None, without=(), captions=None, canvas=None, jitter=(0.1, 2.0),
                 masks=False, hidden=(), originals=False, photometric=False, like=None,
                 keep_empty=False, small=None, flip_words=False):
        self.flip_words = flip_words
        self.folder, self.train, self.flip = Path(images), train, flip if train else 0.0
        sizes = parse_image_size(image_size)
        self.sizes = sizes if train else [max(sizes)]
        self.canvas, self.jitter = canvas, jitter
        self.with_masks, self.originals = masks, originals
        self.distort = RandomPhotometricDistort() if photometric else None
        if not isinstance(annotations, Records):
            annotations = read_annotations(annotations, images)
        self.records, self.annotations = annotations, annotations.path
        self.choose_classes(classes, without, like)
        self.hidden = np.isin(annotations.classes, list(hidden))[annotations.label]
        self.hidden &= annotations.crowd == 0  # (n,) boxes
        self.choose_boxes(train if small is None else small, masks)
        self.choose_images(classes, without, min_side, keep_empty)
        self.check_files()
        self.captions = None
        if captions:
            sentences = read_captions(captions, self.records)
            self.captions = [sentences[row] for row in self.kept.tolist()]
            self.silent = sum(not s for s in self.captions)
        self.repeats = None  # per image: how often it stands in an epoch
        width, height = self.records.sizes[self.kept].T
        self.landscape = (width >= height).tolist()
        self.items = Items(self)

    def choose_classes(self, classes, without, like):
        """Sets classes (names), category_ids (the file's; None for a class of `like` that it
        lacks), label_of (rows of the file's categories -> labels, -1 for none)."""
        original = self.records.classes
        unknown = sorted({*(classes or ()), *without} - set(original))
        if unknown:
            raise UserError(f"{self.annotations}: has no class {', '.join(unknown)}")
        chosen = set(original if classes is None else classes)
        rows = [k for k, n in enumerate(original) if n in chosen]
        if not rows:
            raise UserError(f"{self.annotations}: the 'categories' list is empty")
        self.classes = [original[k] for k in rows]
        if like is not None:
            names, known = respell(original, like), set(like)
            row_of = {names[k]: k for k in rows}
            strange = ", ".join([n for n in row_of if n not in known][:5])
            absent = ", ".join([n for n in like if n not in row_of][:5])
            if strange:
                lacks = f", and lacks {absent}" if absent else ""
                raise UserError(f"{self.annotations}: lists {strange}, which training does not "
                                f"know{lacks}; validation classes must be among the training's, "
                                "by name")
            self.classes, rows = list(like), [row_of.get(n) for n in like]
        self.category_ids = [None if k is None else self.records.categories[k]["id"] for k in rows]
        self.label_of = np.full(len(original), -1, np.int64)
        for label, k in enumerate(rows):
            if k is not None:
                self.label_of[k] = label

    def choose_boxes(self, small, masks):
        """Sets used (n,): boxes that items have, and begins `dropped`."""
        records = self.records
        self.chosen = self.label_of[records.label] >= 0
        drop = self.chosen & (records.crowd > 0)
        self.dropped = {"crowd": int(drop.sum())}
        if small:
            tiny = (records.xywh[:, 2:] < 1).any(1) | (records.area <= 0)
            tiny &= self.chosen & ~drop
            self.dropped["under 1 px"] = int(tiny.sum())
            drop |= tiny
        if masks:
            bare = self.chosen & ~drop & (records.outline == 0)
            self.dropped["without outline"] = int(bare.sum())
            drop |= bare
        self.used = self.chosen & ~drop

    def choose_images(self, classes, without, min_side, keep_empty):
        """Sets kept (N,): rows of the images that are items."""
        records = self.records
        excluded = np.isin(records.classes, list(without))[records.label]
        keep = ~self.holding(excluded)
        if self.train:
            keep &= records.sizes.min(1) >= min_side
        if (self.train or classes is not None) and not (keep_empty and self.train):
            held = self.holding(self.chosen if classes is None else self.used)
            keep &= held | ~self.holding(~self.chosen) if keep_empty else held
        self.kept = np.flatnonzero(keep)
        self.dropped["images"] = len(records) - len(self.kept)
        if not len(self.kept):
            needs = " (training needs annotated ones)" if self.train else ""
            raise UserError(f"{self.annotations}: no usable image{needs}")
        if not self.used[keep[records.owner]].any():
            counts = {k: n for k, n in records.count.items() if "left out" in k} | self.dropped
            reasons = "; ".join(f"{n:,} {reason}" for reason, n in counts.items() if n)
            raise UserError(f"{self.annotations}: no box is left to "
                            f"{'train on' if self.train else 'evaluate'} "
                            f"({reasons or 'it holds none'})")

    def holding(self, boxes):
        """(N,) bool: images of the file with one of these boxes (n,) bool."""
        return np.bincount(self.records.owner[boxes], minlength=len(self.records)) > 0

    def check_files(self):
        """All pictures are there."""
        names = [self.records.names[row] for row in self.kept.tolist()]
        listed = list_folders(self.folder, names)
        missing = [n for n in names if not is_listed(n, listed)]
        if missing:
            raise UserError(f"{self.folder}: {len(missing)} of {len(names)} images are missing, "
                            f"first {missing[0]}")

    def rows(self, row):
        """Places of the boxes of the file's image `row` that this dataset uses."""
        here = np.arange(self.records.first[row], self.records.first[row + 1])
        return here[self.used[here]]

    def held(self):
        """(image, label), two arrays: the classes of each image's boxes, once each."""
        place = np.full(len(self.records), -1)
        place[self.kept] = np.arange(len(self.kept))
        images = place[self.records.owner[self.used]]
        pairs = images * len(self.classes) + self.label_of[self.records.label[self.used]]
        return np.divmod(np.unique(pairs[images >= 0]), len(self.classes))

    def report(self):
        """Lines for the start of a run: the file, what was repaired or left out, a warning."""
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items() if n)
        line = self.records.report() + (f" | not used: {dropped}" if dropped else "")
        if self.captions is not None and self.silent:
            line += f" | {self.silent:,} images have no caption"
        bare = np.setdiff1d(np.arange(len(self.classes)), self.held()[1]) if self.train else ()
        if len(bare):
            line += f" | {len(bare)} classes have no box, first {self.classes[bare[0]]}"
        many = np.bincount(self.records.owner[self.used], minlength=1) > 100
        if not self.train and many.any():
            line += (f" | {many.sum():,} images have over 100 boxes; the metric takes 100 detections of an "
                     "image, LVIS's 300")
        if not self.train and any("neg_category_ids" in self.records.lvis_lists(i) for i in self.kept[:99]):
            line += " | by neg_category_ids: of an image, classes count that were looked for in it"
        warning = self.records.warning()
        return f"{line}\n{warning}" if warning else line

    def fingerprint(self):
        """A number that another set of images and boxes hardly has."""
        parts = self.records.ids.content, self.records.xywh, self.records.label, self.kept, self.used
        return zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))

    def places(self):
        """The paths of its pictures, as text."""
        folder = os.path.realpath(self.folder)
        return {f"{folder}/{self.records.names[row]}" for row in self.kept.tolist()}

    def truth(self, names=None, holding=False, rows=None, outlines=False):
        """What is evaluated against: the same records as a dict in COCO's format; image and
        category ids are the file's, annotation ids are counted anew.

        names: these classes only; holding: only images with a box of one. rows: images of the
        dataset, by place (default all). outlines: with segmentation, and only boxes that have one.
        """
        records = self.records
        names = set(self.classes if names is None else names)
        wanted = np.array([k >= 0 and self.classes[k] in names for k in self.label_of.tolist()])
        use = wanted[records.label] & (self.used | (records.crowd > 0))
        if outlines:
            use &= records.outline > 0
        here = self.kept if rows is None else self.kept[list(rows)]
        if holding:
            here = here[self.holding(use & (records.crowd == 0))[here]]
        categories = [dict(c, name=self.classes[label])
                      for c, label, w in zip(records.categories, self.label_of, wanted) if w]
        content = dict(images=[], annotations=[], categories=categories)
        for row in here.tolist():
            image_id = records.image_id(row)
            width, height = records.sizes[row].tolist()
            content["images"].append(dict(id=image_id, file_name=records.names[row], width=width,
                                          height=height, **records.lvis_lists(row)))
            first = int(records.first[row])
            for k in (first + np.flatnonzero(use[first:records.first[row + 1]])).tolist():
                a = self.as_annotation(k, len(content["annotations"]) + 1, image_id)
                if outlines:
                    a["segmentation"] = records.segmentation(k)
                content["annotations"].append(a)
        return content

    def as_annotation(self, k, number, image_id):
        """Box k as COCO's format has it."""
        records = self.records
        box, area = records.xywh[k].tolist(), float(records.area[k])
        if not area > 0:  # none given; or 0, of which the lvis package knows nothing
            area = box[2] * box[3]
        return dict(id=number, image_id=image_id, bbox=box,
                    category_id=records.categories[records.label[k]]["id"],
                    area=area, iscrowd=int(records.crowd[k]),
                    difficult=int(records.difficult[k]))

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, key):
        index, seed = key
        rng = random.Random(seed)
        image_id, name, height, width, boxes, labels = self.items[index]
        image = self.pixels(name, width, height, image_id)
        if self.canvas:
            return self.jittered(index, image, rng)
        one_of = isinstance(self.sizes, list)
        short = rng.choice(self.sizes) if one_of else rng.randint(*self.sizes)
        image, (h, w) = resize(image, short, max(self.sizes))
        boxes = torch.from_numpy(boxes) * torch.tensor([w / width, h / height] * 2)  # per axis
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, w)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, h)
        flipped = rng.random() < self.flip
        if flipped:
            image = image.flip(2)
            boxes[:, 0::2] = w - boxes[:, 0::2].flip(1)
        if self.distort:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator
                torch.default_generator.manual_seed(rng.getrandbits(62))
                image = self.distort(image)
        item = dict(image=image, size=(h, w), boxes=boxes, labels=torch.from_numpy(labels),
                    image_id=image_id, original_size=(height, width))
        if self.captions is not None:
            item["caption"] = rng.choice(self.captions[index] or [""])
            if flipped and self.flip_words:
                item["caption"] = mirror_caption(item["caption"])
        return item

    def pixels(self, name, width, height, image_id):
        """(3, height, width) uint8 of an image whose size the file tells."""
        path = self.folder / name
        image = read_image(path)
        if image.size != (width, height):
            hint = ""
            if image.info.get("turned") and image.size == (height, width):
                hint = ("; the boxes seem to be of the picture before its EXIF orientation: "
                        "save it without")
            raise UserError(f"{path}: is {image.size[0]}x{image.size[1]}, but "
                            f"{self.annotations.name} says {width}x{height} for image "
                            f"{show(image_id)}{hint}")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def jittered(self, index, image, rng):
        """An item under large-scale jitter. A window without any box is drawn anew; after 20 the
        whole image is taken, at scale 1."""
        image_id, _, height, width, boxes, labels = self.items[index]
        row = int(self.kept[index])
        records, boxes = self.records, torch.from_numpy(boxes)
        here = slice(records.first[row], records.first[row + 1])
        hidden = torch.from_numpy(to_corners(records.xywh[here][self.hidden[here]]))
        for attempt in range(21):
            factor = rng.uniform(*self.jitter) if self.train and attempt < 20 else 1.0
            scale = factor * self.canvas / max(height, width)
            h, w = max(1, round(height * scale)), max(1, round(width * scale))
            y0 = rng.randint(0, max(0, h - self.canvas))
            x0 = rng.randint(0, max(0, w - self.canvas))
            window = min(h - y0, self.canvas), min(w - x0, self.canvas)
            moved = move_boxes(boxes, (w / width, h / height), (x0, y0), window)
            keep = ((moved[:, 2:] - moved[:, :2]) > 0.01).all(1)
            if not self.train:  # whatever is evaluated
                keep[:] = True
            if not self.train or keep.any() or not len(boxes):
                break
        original, flip = image, rng.random() < self.flip
        if (h, w) != (height, width):
            image = TF.resize(image, [h, w], interpolation=BILINEAR, antialias=False)
        image = image[:, y0:y0 + window[0], x0:x0 + window[1]]
        unseen = move_boxes(hidden, (w / width, h / height), (x0, y0), window)
        unseen = unseen[((unseen[:, 2:] - unseen[:, :2]) > 0.01).all(1)]
        if flip:
            image = image.flip(2)
            for b in (moved, unseen):
                b[:, 0::2] = window[1] - b[:, 0::2].flip(1)
        item = dict(image=image, size=window, boxes=moved[keep],
                    labels=torch.from_numpy(labels)[keep], image_id=image_id,
                    original_size=(height, width), hidden=unseen)
        if self.with_masks and self.train:
            shown = self.rows(row)[keep.numpy()].tolist()
            outlines = [as_arrays(records.segmentation(k)) for k in shown]
            item["masks"] = window_masks(outlines, (height, width), (w / width, h / height),
                                         (x0, y0), window, flip)
        if self.originals:
            cut = torch.tensor([w / width, h / height, x0, y0, window[1], flip])
            item.update(original=original, window=cut)
        return item


def check_classes(names, count, classes, flag):
    """A checkpoint's classes (names or None, count) against the data's; "_" and " " are the same, a file
    without names is trusted, with a line."""
    if count != len(classes):
        raise UserError(f"{flag}: has {count} classes, --data has {len(classes)}")
    if not names:
        tell(f"{flag}: holds no class names; taken to be those of --data in their order, {classes[0]} first")
    for k, (theirs, ours) in enumerate(zip(names or classes, classes)):
        if plain_name(theirs) != plain_name(ours):
            raise UserError(f"{flag}: its class {k} is {theirs!r}, --data has {ours!r}")


def plain_name(name):
    """What two spellings of a class have in common."""
    return name.replace("_", " ").casefold()


def respell(names, like):
    """Names as `like` spells them: "Traffic_light" is "traffic light", unless both are there."""
    plain = [plain_name(n) for n in like]
    spelled = {p: n for p, n in zip(plain, like) if plain.count(p) == 1}
    answer = [spelled.get(plain_name(n), n) for n in names]
    return answer if len(set(answer)) == len(names) else names


def check_numbering(path, images, records, row_of):
    """The images of a captions file are those of the records' ids: by file name, where it has names. 2014's
    end as 2017's: COCO_val2014_000000522418.jpg."""
    named = [i for i in (images if isinstance(images, list) else ())
             if isinstance(i, dict) and is_id(i.get("id")) and isinstance(i.get("file_name"), str)]
    if not named:
        tell(f"{path}: names no image files; its image ids are taken for those of {records.path.name}")
    for i in named:
        row, theirs = row_of.get(i["id"]), Path(i["file_name"].replace("\\", "/")).stem
        mine = theirs if row is None else Path(records.names[row]).stem
        if not (theirs.endswith(mine) or mine.endswith(theirs)):
            raise UserError(f"{path}: its image {show(i['id'])} is {theirs}, that of {records.path.name} is "
                            f"{mine}; the ids of both files must be of one numbering")


def read_captions(path, records):
    """For each image of the records the list of its sentences; images are found by id."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError(f"{path}: no 'annotations' list; this is not COCO captions json")
    row_of = {records.image_id(i): i for i in range(len(records))}
    check_numbering(path, content.get("images"), records, row_of)
    sentences = [[] for _ in range(len(records))]
    for c in content["annotations"]:
        if not isinstance(c, dict) or not is_id(c.get("image_id")):
            continue
        row, text = row_of.get(c["image_id"]), c.get("caption")
        if row is not None and isinstance(text, str) and text.strip():
            sentences[row].append(text.strip())
    if not any(sentences):
        raise UserError(f"{path}: has no caption for any of the images of {records.path.name}: another "
                        "split's, or ids that are text in one of them? (--data shapes needs nothing)")
    return sentences


def mirror_caption(text):
    """A sentence with left and right swapped, as whole words: what it says of the flipped image."""
    other = dict(left="right", right="left", Left="Right", Right="Left", LEFT="RIGHT", RIGHT="LEFT")
    return re.sub(r"\b(left|right|Left|Right|LEFT|RIGHT)\b", lambda found: other[found[0]], text)


# ------------------------------------------------------------------ base and novel names

def spaced(names):
    """The set of names, "_" and " ", and letter case, being the same."""
    return {plain_name(n) for n in names}


def class_names(values, flag="--classes"):
    """Names of a flag that may be repeated: one value is split at commas, or is a file with one name a line;
    several values are one name each, so that a name may hold a comma. A list: names that were read before, as
    of the run that --resume continues."""
    names = values
    if isinstance(values[0], list):
        return values[0]
    if len(values) == 1 and os.path.isfile(values[0]):  # Path's raises for a long list
        try:
            names = Path(values[0]).read_text(encoding="utf-8-sig").splitlines()
            names = [n for n in names if n.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{flag} {values[0]}: is no text file ({e})") from None
    elif len(values) == 1 and (values[0].endswith(".txt") or os.sep in values[0]):
        raise UserError(f"{flag} {values[0]}: no such file of names")
    elif len(values) == 1:
        names = values[0].split(",")
    names = [n.strip() for n in names]
    if not names or not all(names):
        raise UserError(f"{flag} {' '.join(values)}: holds an empty name")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"{flag}: {', '.join(twice)} occurs twice")
    return names


def same_names(args, saved, flags=("base", "novel")):
    """The flags `saved` of a run that --resume continues; where they hold the very names that are given now,
    perhaps as a file, they are as given."""
    saved = dict(saved)
    for flag in flags:
        given = getattr(args, flag)
        if given and saved.get(flag) == [class_names(given, f"--{flag}")]:
            saved[flag] = given
    return saved


def without(names, others):
    """The names that are none of `others`; of such as are not among `names` in no other spelling either."""
    exact = set(others)
    wide = spaced(exact - set(names))
    return [n for n in names if n not in exact and plain_name(n) not in wide]


def split_classes(names, base=None, novel=None, asked=None):
    """Class names of a file -> (base, novel), as the file spells them where it knows them.

    base: what training knows; asked: --base. novel: --novel, or a checkpoint's. Without base and asked all
    names but the novel ones are base; if novel is None, all names but the base ones are novel.
    """
    novel = respell(novel, names) if novel else novel
    if base is None and asked:
        base = respell(asked, names)
    elif base is None:
        base = without(names, novel or [])
        if names and not base:
            raise UserError("--novel names all classes of the file: none is left to train on")
    if novel is None:
        novel = without(names, base)
    both = sorted(spaced(base) & spaced(novel))
    if both:
        raise UserError(f"--base and --novel both name {', '.join(both[:5])}")
    return list(base), list(novel)


def refuse_strange(names, known, flag, path):
    """A name that the file does not know is a misspelling."""
    spelled = spaced(known)
    for n in names:
        if plain_name(n) not in spelled:
            near = difflib.get_close_matches(n, known, 1)
            hint = f"; is {near[0]!r} meant?" if near else f"; it knows {', '.join(known[:5])} ..."
            raise UserError(f"{flag}: no class {n!r} in {path}{hint} (One value is split at commas; for "
                            "names that hold one give the flag several times, or a file)")


# ------------------------------------------------------------------ pixels and boxes of an item

BILINEAR, NEAREST = TF.InterpolationMode.BILINEAR, TF.InterpolationMode.NEAREST


def move_boxes(boxes, scale, offset, window):
    """Boxes (M, 4) of the file, scaled by (x, y), seen from offset (x, y), cut to the window
    (h, w)."""
    boxes = boxes * torch.tensor(scale * 2) - torch.tensor(offset * 2)
    return torch.stack([boxes[:, k].clamp(0, window[1 - k % 2]) for k in range(4)], 1)


def as_arrays(outline):
    """Polygons as arrays; run lengths as they are."""
    return outline if isinstance(outline, dict) else [np.array(p, np.float32) for p in outline]


def window_masks(outlines, size, scale, offset, window, flip):
    """Outlines of the file (lists of polygons x y x y ..., or RLE dicts) -> (M, ceil(h / 2),
    ceil(w / 2)) uint8: covered pixels, 0 to 4, of each 2 x 2 block.

    Half the resolution in a quarter of the memory, and exactly the bilinear halving of the full
    masks. size: (h, w) of the file.
    """
    from pycocotools import mask as rle
    h, w = window
    masks = np.zeros((len(outlines), h + h % 2, w + w % 2), np.uint8)
    for m, outline in zip(masks, outlines):
        if isinstance(outline, dict):
            packed_already = isinstance(outline["counts"], (bytes, str))
            code = outline if packed_already else rle.frPyObjects(outline, *size)
            full = torch.from_numpy(rle.decode(code))[None]
            scaled = [round(size[0] * scale[1]), round(size[1] * scale[0])]
            full = TF.resize(full, scaled, interpolation=NEAREST)[0]
            m[:h, :w] = full[offset[1]:offset[1] + h, offset[0]:offset[0] + w].numpy()
        else:
            moved = [(p.reshape(-1, 2) * scale - offset).ravel().tolist()
                     for p in outline if len(p) >= 6]
            if moved:
                m[:h, :w] = rle.decode(rle.merge(rle.frPyObjects(moved, h, w)))
        if flip:
            m[:h, :w] = m[:h, :w][:, ::-1].copy()
    blocks = masks.reshape(len(masks), masks.shape[1] // 2, 2, masks.shape[2] // 2, 2)
    return torch.from_numpy(blocks.sum((2, 4), dtype=np.uint8))


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
    raise UserError(f"--image-size {text}: expected a short side as 800, a choice as 640,800 or a "
                    "range as 480-800")


def resize(image, short, largest=None):
    """Keep-ratio resize: short side `short`, long side at most 1333/800 * `largest`. uint8
    (3, H, W) -> (3, h, w), (h, w).

    Bilinear without antialias: what OpenCV does, and what the published weights were trained with
    (torchvision differs from OpenCV by at most one grey level, tests/test_datasets.py).
    """
    height, width = image.shape[1:]
    most = round((largest or short) * 1333 / 800)
    scale = min(most / max(height, width), short / min(height, width))
    h, w = (max(1, int(side * scale + 0.5)) for side in (height, width))
    if (h, w) != (height, width):
        image = TF.resize(image, [h, w], interpolation=BILINEAR, antialias=False)
    return image, (h, w)


# ------------------------------------------------------------------ batches and their order

def collate(items, divisor=32):
    """List of items -> one batch, padded right and bottom to a multiple of `divisor`.

    images (B, 3, H, W) uint8; sizes (B, 2) h, w before padding; boxes (B, M, 4), labels (B, M) with
    -1 where padded and M >= 1. On the host: image_ids, original_sizes, image_sizes (sizes again),
    counts (boxes of each image). uint8 keeps the copy to a GPU four times smaller; the detector
    normalises, and zeroes the padding after that.
    """
    height, width = (-(-max(x["size"][k] for x in items) // divisor) * divisor for k in (0, 1))
    most = max(1, max(len(x["boxes"]) for x in items))
    images = torch.zeros(len(items), 3, height, width, dtype=torch.uint8)
    boxes = torch.zeros(len(items), most, 4)
    labels = torch.full((len(items), most), -1)
    for b, x in enumerate(items):
        images[b, :, :x["size"][0], :x["size"][1]] = x["image"]
        boxes[b, :len(x["boxes"])] = x["boxes"]
        labels[b, :len(x["labels"])] = x["labels"]
    batch = dict(images=images, sizes=torch.tensor([x["size"] for x in items]), boxes=boxes,
                 labels=labels, image_ids=[x["image_id"] for x in items],
                 original_sizes=[x["original_size"] for x in items],
                 image_sizes=[tuple(x["size"]) for x in items],
                 counts=[len(x["boxes"]) for x in items],
                 captions=[x.get("caption", "") for x in items])
    if "masks" in items[0]:
        shape = len(items), most, height // 2, width // 2
        batch["masks"] = torch.zeros(shape, dtype=torch.uint8)
        for m, x in zip(batch["masks"], items):
            m[:len(x["masks"]), :x["masks"].shape[1], :x["masks"].shape[2]] = x["masks"]
    if "hidden" in items[0]:
        batch["hidden"] = pad_sequence([x["hidden"] for x in items], batch_first=True)
    if "window" in items[0]:
        batch["originals"] = [x["original"] for x in items]
        batch["windows"] = torch.stack([x["window"] for x in items])
    return batch


class BatchPlan:
    """Batch sampler: aspect-ratio groups, shuffled, sharded over processes, resumable at any batch.

    One plan is made for the global batch (batch_size * world) and each rank takes its slice: N
    processes with batch B train on the same images, step by step, as one process with batch N * B.
    Landscape and portrait images share no batch, except the last ones of an epoch. repeats: how
    often each image stands in an epoch. Yields lists of (index, seed).
    """

    def __init__(self, landscape, batch_size, rank=0, world=1, seed=0, repeats=None):
        self.landscape, self.batch_size = landscape, batch_size
        self.rank, self.world, self.seed = rank, world, seed
        repeats = repeats or [1] * len(landscape)
        self.entries = [(i, copy) for i, n in enumerate(repeats) for copy in range(n)]
        self.epoch = self.start = 0

    def set_epoch(self, epoch, start=0):
        """Continue with batch `start` of `epoch`."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        return -(-len(self.entries) // (self.batch_size * self.world)) - self.start

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.entries), generator=generator).tolist()
        order = [self.entries[k] for k in shuffled]
        total = self.batch_size * self.world
        groups, batches = {True: [], False: []}, []
        for entry in order:
            group = groups[self.landscape[entry[0]]]
            group.append(entry)
            if len(group) == total:
                batches.append(group.copy())
                group.clear()
        rest = groups[True] + groups[False]
        while rest:
            last, rest = rest[:total], rest[total:]
            while len(last) < total:  # an epoch's last batch is filled from its start
                last += order[:total - len(last)]
            batches.append(last)
        first = self.rank * self.batch_size
        for batch in batches[self.start:]:
            yield [(i, self.seed_of(i, copy)) for i, copy in batch[first:first + self.batch_size]]

    def seed_of(self, i, copy):
        """Of image i in this epoch, of its copies, too."""
        return hash((self.seed, self.epoch, i, *[copy] * (copy > 0)))


def repeat_fractions(dataset, threshold):
    """Repeat-factor sampling (LVIS, Gupta et al. 2019), (N,) float >= 1: max over an image's
    classes of sqrt(threshold / share of the images that hold it)."""
    images, labels = dataset.held()
    holders = np.bincount(labels, minlength=1).clip(1)  # of each class: images that hold it
    factor = np.maximum(1.0, np.sqrt(threshold * len(dataset) / holders))
    fractions = np.ones(len(dataset))
    np.maximum.at(fractions, images, factor[labels])
    return torch.from_numpy(fractions)


def repeat_factors(dataset, threshold):
    """The same as integers: how often each image stands in an epoch of BatchPlan. Rounded up, as
    mmdetection does it."""
    return repeat_fractions(dataset, threshold).ceil().int().tolist()


def start_worker(_):
    """Loader processes get the signals that stop a run, too: from a terminal, or from torchrun.
    They work on, for the step that is under way, and end with the process that they work for;
    after 20 seconds in any case."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: signal.alarm(20))
    multiprocessing.queues.Queue._on_queue_feeder_error = unsent


def unsent(queue, error, item):
    """In a loader process: a batch cannot be handed over, as /dev/shm or the file descriptors are
    used up. The error is handed over instead: Python only prints it, and the run waits for ever."""
    info = type(error), error, error.__traceback__
    try:
        queue.put((item[0], ExceptionWrapper(info, where="in a loader process")))
    except ValueError:  # the queue is closed: the run ends already, and nobody waits for this batch
        pass


def train_loader(dataset, batch_size, rank, world, seed, workers, pin=None):
    """(loader, plan): call plan.set_epoch before each epoch. Workers need no seeds: the keys carry
    them."""
    plan = BatchPlan(dataset.landscape, batch_size, rank, world, seed, dataset.repeats)
    return make_loader(dataset, plan, workers, pin, persistent_workers=workers > 0), plan


def eval_loader(dataset, rank, world, workers, pin=None, most=None):
    """Images rank, rank + world, ...: each exactly once, one at a time, so that no image's result
    depends on which others share its batch (padding reaches GroupNorm) or on the number of
    processes. most: the first so many only."""
    keys = [[(i, 0)] for i in range(rank, min(len(dataset), most or len(dataset)), world)]
    return make_loader(dataset, keys, workers, pin)


def make_loader(dataset, batches, workers, pin, **more):
    # A generator of its own: a loader draws one number per epoch, which must not shift the model's
    # random stream.
    if workers and Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free >> 20
        if free < 16:  # a loader process that cannot hand over its batch waits for ever
            raise UserError(f"/dev/shm has {free} MB free, which is too small for loader processes: "
                            "docker run --shm-size 8g, or --workers 0")
    if pin is None:  # for copies that wait for nothing
        pin = torch.cuda.is_available()
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                      collate_fn=partial(collate, divisor=dataset.canvas or 32),
                      worker_init_fn=start_worker, generator=torch.Generator(), **more)


# ------------------------------------------------------------------ Pascal VOC

VOC_CLASSES = """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable,
dog, horse, motorbike, person, pottedplant, sheep, sofa, train,
tvmonitor""".replace("\n", " ").split(", ")
VOC_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # the first found wins


def read_voc(root, sets, classes=VOC_CLASSES):
    """Records of VOC's XML in `root`/VOCdevkit. sets: pairs (year, list) as ("2007", "test").

    Boxes become 0-based and continuous: xmin - 1, ymin - 1, xmax, ymax. `difficult` objects carry
    iscrowd = 1 and difficult = 1: training drops them, evaluation ignores them. File names are
    relative to the devkit.
    """
    devkit = Path(root) / "VOCdevkit"
    categories = [dict(id=k, name=name) for k, name in enumerate(classes, 1)]
    content = dict(images=[], annotations=[], categories=categories)
    for year, name in sets:
        folder = devkit / f"VOC{year}"
        listing = folder / "ImageSets" / "Main" / f"{name}.txt"
        if not listing.exists():
            raise UserError(f"--data {root}: {listing} is missing; Pascal VOC is at "
                            "http://host.robots.ox.ac.uk/pascal/VOC (--data shapes needs nothing)")
        pictures = voc_pictures(folder / "JPEGImages")
        for stem in voc_stems(listing, folder / "Annotations"):
            file = f"VOC{year}/JPEGImages/{pictures.get(stem, stem + '.jpg')}"
            add_voc_image(content, folder / "Annotations" / f"{stem}.xml", file, classes)
    return records_of(content, devkit, devkit)


def voc_pictures(folder):
    """{name without ending: file} of a folder's pictures."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = {}
    for ending in VOC_PICTURES:
        for name in names:
            if name.lower().endswith(ending) and not name.startswith("."):
                found.setdefault(name[:-len(ending)], name)
    return found


def voc_stems(listing, annotations):
    """The names of a list, each once. Lists of one class have a second column, 1, 0 or -1."""
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise UserError(f"{listing}: is not UTF-8 ({one_line(e)})") from None
    stems = {}
    for line in filter(None, map(str.strip, lines)):
        whole = (annotations / f"{line}.xml").exists()  # a name may hold blanks
        stems[line if whole else re.sub(r"\s+(-1|0|1)$", "", line)] = None
    return list(stems)


def add_voc_image(content, path, file, classes):
    """One image and its objects, from its XML."""
    width, height, objects = read_xml(path)
    image_id = len(content["images"]) + 1
    content["images"].append(dict(id=image_id, file_name=file, width=width, height=height))
    for name, (x1, y1, x2, y2), difficult in objects:
        if name not in classes:
            raise UserError(f"{path}: has class {name}, expected one of {', '.join(classes)}")
        (x, w), (y, h) = voc_side(x1, x2), voc_side(y1, y2)
        content["annotations"].append(dict(
            image_id=image_id, category_id=classes.index(name) + 1, bbox=[x, y, w, h],
            iscrowd=difficult, difficult=difficult))


def voc_side(low, high):
    """(start, length) of pixels low ... high, counted from 1; swapped ends give a negative
    length."""
    return (low - 1, high - low + 1) if low <= high else (low, high - 1 - low)


def read_xml(path):
    """(width, height, [(class, (xmin, ymin, xmax, ymax), difficult 0 or 1)]) of one VOC annotation.
    A size that is missing is 0."""
    try:
        tree = ElementTree.fromstring(regular(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is missing, though its list names it") from None
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as e:
        raise UserError(f"{path}: is no VOC annotation ({one_line(e)})") from None

    def value(element, tag, default=None):
        text = (element.findtext(tag) or "").strip()
        found = as_number(text) if text else default
        if found is None:
            reason = f"is {text!r}" if text else "is missing"
            raise UserError(f"{path}: is no VOC annotation (<{tag}> {reason}; expected a number)")
        return found

    objects = []
    for element in tree.iter("object"):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{path}: is no VOC annotation (<object> without <name>)")
        corners = [value(element, f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")]
        objects.append((name, corners, int(value(element, "difficult", 0) > 0)))
    return int(value(tree, "size/width", 0)), int(value(tree, "size/height", 0)), objects


# ------------------------------------------------------------------ LVIS

def require_lvis(records):
    """What LVIS's evaluation will ask for, before the first step: the lists of each image, the
    frequency of each class."""
    for c in records.categories:
        if c.get("frequency") not in ("r", "c", "f"):
            raise UserError(f"{records.path}: category {show(c['id'])} has no frequency r, c or f; "
                            "this is not LVIS v1's json")
    known = {c["id"] for c in records.categories}
    for i in range(len(records)):
        lists = records.lvis_lists(i)
        where = f"{records.path}: image {show(records.image_id(i))} has"
        for key in LVIS_LISTS:
            ids = lists.get(key)
            if not isinstance(ids, list) or not all(map(is_id, ids)):
                raise UserError(f"{where} no list {key}, which LVIS's evaluation needs")
            if not known.issuperset(ids):
                raise UserError(f"{where} {key} {show(sorted(set(ids) - known, key=str)[0])}, "
                                "which 'categories' does not list")
