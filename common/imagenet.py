# SPDX-License-Identifier: MIT
"""ImageNet for simple21k.py: folders or tars of labelled images, ILSVRC's boxes, localisation sets.

    index = ImageIndex("imagenet21k")          # 14 million images: listed once, kept in .index.npz
    data = LabelledImages(index, transform)    # unreadable files are replaced, and told
    stream = Stream(len(index), 32, steps=n)   # batches of (index, seed); a pass runs into the next
    raw = read_ilsvrc("val", "val_boxes")      # XML -> COCO's format, images with category_id
    data = LocalisationImages("val", raw, 1024)

Hidden files and what systems leave behind (`._x.JPEG`, `__MACOSX`, `Thumbs.db`) are ignored
everywhere, in tars, too. Of `common` this file needs UserError of run.py, and to decode a picture
read_image of datasets.py.
"""
import functools
import io
import math
import os
import random
import re
import sys
import tarfile
import unicodedata
import uuid
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from .run import UserError

IMAGES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
LITTER = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found",
          "system volume information"}
MOST = 256 * 2**20  # bytes of one image file: no picture has more, but a damaged tar may say so
LARGEST = 10**6  # pixels of a side
PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


# ------------------------------------------------------------------ names, folders, tars

def hidden(name):
    return name.startswith(".") or name.lower() in LITTER


def show(text, most=200):
    """Text from a file or a disk for a message: one line, without control characters."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return text if len(text) <= most else f"{text[:most // 2]}...{text[-most // 2:]}"


def some(names, most=5):
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return show(", ".join(names[:most])) + more


def are(names):
    """"a is", "a and 2 more are": how a list of names begins a complaint."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def unprintable(text):
    """Whether a name holds a control character, a line break or bytes that are no UTF-8."""
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def kind_of(entry):
    """folder, file or odd (a pipe, a link that leads nowhere) of an os.DirEntry, links followed."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "odd"
    except OSError:  # a link to itself
        return "odd"


def list_folder(path):
    """Its entries by name, without the hidden ones."""
    try:
        with os.scandir(path) as entries:
            return sorted((e for e in entries if not hidden(e.name)), key=lambda e: e.name)
    except OSError as e:
        raise UserError(f"{show(path)}: cannot be listed ({e.strerror})") from None


def walk(top, endings):
    """Each folder from `top` down, once, as (path, time, files, passed, odd).

    path: relative to top, "" or ending in a slash. files: sorted names with one of the endings.
    passed: a file that has none of them, or "". odd: names that have one and are no regular file.
    """
    waiting, seen = [""], set()
    while waiting:
        path = waiting.pop()
        folder = os.path.join(top, path)
        try:
            here = os.stat(folder)  # before listing: what is added meanwhile makes a later time
        except OSError as e:
            raise UserError(f"{show(folder)}: cannot be listed ({e.strerror})") from None
        if (here.st_dev, here.st_ino) in seen:  # by a link
            continue
        seen.add((here.st_dev, here.st_ino))
        files, passed, odd, inner = [], "", [], []
        for entry in list_folder(folder):
            kind = kind_of(entry)
            if kind == "folder":
                inner.append(f"{path}{entry.name}/")
            elif not entry.name.lower().endswith(endings):
                passed = passed or entry.name
            elif kind == "file":
                files.append(entry.name)
            else:
                odd.append(entry.name)
        yield path, here.st_mtime_ns, files, passed, odd
        waiting += reversed(inner)


def list_class(path):
    """(images as [(name, -1, 0)], a file that is none or "", [(name, why it is left out)],
    sub-folders as [(name, time)]) of a class's folder."""
    found, other, odd, folders = [], "", [], []
    for inner, time, files, passed, strange in walk(path, IMAGES):
        found += [(inner + name, -1, 0) for name in files]
        odd += [(inner + name, "is no regular file") for name in strange]
        other = other or (inner + passed if passed else "")
        if inner:
            folders.append((inner, time))
    return found, other, odd, folders


def list_tar(path):
    """The same of a class's tar: images as [(name, start, length)], where their bytes lie in it.
    Of two members of one name the later one counts, as in unpacking."""
    images, other, odd = {}, "", []
    try:
        with open(path, "rb") as f:
            packed = PACKED.get(f.read(2))
            if packed:
                what = "but images are read in their place; unpack it"
                raise tarfile.ReadError(f"is {packed}-compressed, {what}")
            f.seek(0)
            with tarfile.open(fileobj=f, mode="r:") as tar:
                for m in tar:
                    parts = m.name.split("/")
                    if m.isdir() or any(hidden(p) for p in parts if p not in (".", "..")):
                        continue
                    if not m.name.lower().endswith(IMAGES):
                        other = other or m.name
                    elif ".." in parts or m.name.startswith("/"):
                        odd.append((m.name, "leads out of its tar"))
                    elif not m.isreg() or m.issparse():  # links, devices, files with holes
                        odd.append((m.name, "is no regular file"))
                    else:
                        images[m.name] = m.offset_data, m.size
                end = tar.offset
            f.seek(end)
            if f.read(512).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"damaged at byte {end}")
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError) as e:
        reason = show(e) or "out of memory"
        raise UserError(f"{show(path)}: cannot be read ({reason}); fetch it again") from None
    return [(name, *place) for name, place in images.items()], other, odd, []


def read_member(tar, start, length, where):
    """`length` bytes of a file from `start`; where: their name in messages."""
    if length > MOST:
        raise UserError(f"{show(where)}: has {length:,} bytes; {MOST:,} are the most for an image")
    try:
        with open(tar, "rb") as f:
            f.seek(start)
            content = f.read(length)
    except OSError as e:
        raise UserError(f"{show(where)}: cannot be read ({e.strerror})") from None
    if len(content) < length:
        raise UserError(f"{show(where)}: cannot be read (its tar ends early); fetch it again")
    return content


def decode(path, content=None, quiet=False):
    """RGB PIL image, upright, of a file or of its bytes, which may be gzip-compressed: some files
    of ImageNet-21K are. UserError for whatever is wrong with it. quiet: turning is not told."""
    from .datasets import read_image
    return read_image(path, content, quiet)


# ------------------------------------------------------------------ images with a label

def pack(strings):
    """Strings as one array of bytes (numpy's own would give each the room of the longest)."""
    return np.frombuffer(b"\0".join(os.fsencode(s) for s in strings), np.uint8)


def unpacked(array):
    return [os.fsdecode(s) for s in array.tobytes().split(b"\0")] if len(array) else []


class ImageIndex:
    """Images of a folder that holds a folder or a .tar for each class: found once, cached in
    `root`/.index.npz, checked by the times of all folders and tars. Sub-folders of a class's folder
    belong to it.

    classes: names (wnids), sorted, those without an image left out and listed in `empty`. labels
    (N,) int32; names: bytes of all file names one after the other, `ends` (N,) where each ends; at,
    size (N,): where an image lies in its class's tar, at = -1 for a file. numpy arrays: 14 million
    Python strings would be copied into every loader process, page by page. classes given: these
    only; unknown names are an error. notes: lines on what was left out, printed unless `quiet`
    (rank > 0).
    """

    VERSION = 3  # of the cache
    STRINGS = "all", "inner", "passed", "told"  # names in root, sub-folders, and see build
    FIELDS = *STRINGS, "stamps", "lengths", "inner_stamps", "labels", "names", "ends", "at", "size"

    def __init__(self, root, classes=None, quiet=False):
        self.root, self.notes, self.quiet = Path(root), [], quiet
        if not self.root.is_dir():
            hold = "it should hold a folder (or a .tar) of images for each class"
            raise UserError(f"{root}: no such folder; {hold}")
        self.entries = self.list_entries()
        self.folders = [e.name for e, _ in self.entries]
        stems = [e.name if kind == "folder" else e.name[:-4] for e, kind in self.entries]
        for name, count in Counter(stems).items():
            if count > 1:
                twice = "is there as a folder and as a .tar; keep one"
                raise UserError(f"{root}: class {show(name)} {twice}")
            if unprintable(name):
                what = "holds control characters or is no UTF-8; rename it"
                raise UserError(f"{root}: class {show(name)}: its name {what}")
        cached = self.read_cache()
        if cached is None:
            cached = self.build()
            self.write_cache(cached)
        self.notes += unpacked(cached["told"])
        self.choose(stems, classes, cached)
        del self.entries  # they cannot be sent to a loader's processes
        if not quiet:
            for note in self.notes:
                print(f"{show(root)}: {note}", flush=True)

    def list_entries(self):
        """[(os.DirEntry, "folder" or "file")] of the classes."""
        found = [(e, kind_of(e)) for e in list_folder(self.root)]
        found = [(e, k) for e, k in found if k == "folder" or e.name.lower().endswith(".tar")]
        odd = [e.name for e, kind in found if kind == "odd"]
        if odd:
            self.notes.append(f"left out, no regular file: {some(odd)}")
        if len(found) == len(odd):
            hold = "it should hold one for each class"
            raise UserError(f"{self.root}: holds no folder and no .tar; {hold}")
        return [(e, kind) for e, kind in found if kind != "odd"]

    def choose(self, stems, classes, cached):
        """Keep the wanted classes that have images."""
        from .datasets import plain_name
        wanted = set(stems if classes is None else classes)
        unknown = sorted(wanted - set(stems))
        if unknown:
            more = f" and {len(unknown) - 5} more of the list" if len(unknown) > 5 else ""
            raise UserError(f"{self.root}: has no class {show(', '.join(unknown[:5]))}{more}")
        spelled = {}
        for name in sorted(wanted):
            if (other := spelled.setdefault(plain_name(name), name)) != name:
                raise UserError(f"{self.root}: classes {show(other)} and {show(name)} are one; join them")
        held = np.bincount(cached["labels"], minlength=len(stems)) > 0
        self.empty = [n for n, h in zip(stems, held) if not h and n in wanted]
        kept = [k for k, n in enumerate(stems) if held[k] and n in wanted]
        stem_of = dict(zip(self.folders, stems))
        passed = [(stem_of.get(p.split("/")[0]), p) for p in unpacked(cached["passed"])]
        passed = [(stem, path) for stem, path in passed if stem in wanted]
        what = f"no image with one of the endings {', '.join(IMAGES)}"
        if passed:
            what += f"; passed over: {show(passed[0][1])}"
        if not kept:
            raise UserError(f"{self.root}: holds {what}")
        if passed:
            hold = "holds" if len(passed) == 1 else "hold"
            self.notes.append(f"{some([stem for stem, _ in passed])} {hold} {what}")
        self.classes, self.kept = [stems[k] for k in kept], np.array(kept)
        label_of = np.full(len(stems), -1, np.int32)
        label_of[kept] = np.arange(len(kept))
        self.labels = label_of[cached["labels"]]
        self.names, self.ends = cached["names"], cached["ends"]
        self.at, self.size = cached["at"], cached["size"]
        self.starts = np.concatenate([[0], self.ends[:-1]])
        self.keep(self.labels >= 0)

    def state(self):
        """What a cache must agree with: names, times and lengths (-1: a folder) of the entries."""
        try:
            stats = [e.stat() for e, _ in self.entries]
        except OSError as e:
            reason = f"changes while it is read ({e.strerror}); start again"
            raise UserError(f"{self.root}: {reason}") from None
        lengths = [s.st_size if kind == "file" else -1 for s, (_, kind) in zip(stats, self.entries)]
        stamps = [s.st_mtime_ns for s in stats]
        return dict(all=pack(self.folders), stamps=np.array(stamps, np.int64),
                    lengths=np.array(lengths, np.int64))

    def read_cache(self):
        """The cache's arrays if they are whole and nothing has changed since, else None."""
        path, now = self.root / ".index.npz", self.state()
        try:
            if not path.is_file():
                return None
            with np.load(path, allow_pickle=False) as f:
                if f["version"].tolist() != self.VERSION:
                    return None
                cached = {k: f[k] for k in self.FIELDS}
            if not self.is_whole(cached) or any(not np.array_equal(cached[k], now[k]) for k in now):
                return None
            inner = [os.stat(self.root / p).st_mtime_ns for p in unpacked(cached["inner"])]
            return cached if inner == cached["inner_stamps"].tolist() else None
        except Exception:  # numpy, zip and zlib have a dozen ways to fail on a damaged file
            return None

    def is_whole(self, cached):
        """Whether the arrays fit together: none points beyond another, or beyond its tar."""
        for field, array in cached.items():
            kind = {"labels": np.int32, "names": np.uint8}.get(field, np.int64)
            if array.ndim != 1 or array.dtype != (np.uint8 if field in self.STRINGS else kind):
                return False
        labels, ends, at, size = (cached[k] for k in ("labels", "ends", "at", "size"))
        lengths = cached["lengths"]
        if not len(labels) == len(ends) == len(at) == len(size):
            return False
        if not len(labels):
            return True
        if labels[0] < 0 or labels[-1] >= len(lengths) or (np.diff(labels) < 0).any():
            return False
        if ends[0] < 1 or ends[-1] != len(cached["names"]) or (np.diff(ends) < 1).any():
            return False
        room = lengths[labels]
        in_tar = (at >= 0) & (size >= 0) & (at <= room) & (size <= room - at)
        return bool(np.where(room < 0, at == -1, in_tar).all())

    def write_cache(self, content):
        """Under a name of its own, then renamed: others see the old one or the new one."""
        temporary = self.root / f".index.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp.npz"
        try:
            with open(temporary, "wb") as f:
                np.savez(f, version=np.array(self.VERSION), **content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, self.root / ".index.npz")
        except OSError as e:  # a read-only or a full disk
            try:
                temporary.unlink()
            except OSError:
                pass
            kept = f"the list of its images cannot be kept there ({e.strerror or show(e)})"
            self.notes.append(f"{kept}; it is made anew at each start")

    def build(self):
        """What the cache holds, by walking over everything. passed: of each class without an image
        a file of another ending, if there is one; told: lines on what was left out."""
        names, labels, at, size = [], [], [], []
        inner, inner_stamps, passed, odd, deeper, mixed = [], [], [], [], [], []
        now = self.state()
        bar = tqdm(desc=f"index of {self.root}", total=len(self.entries), leave=False,
                   mininterval=1, disable=self.quiet)
        for k, (entry, kind) in enumerate(self.entries):
            bar.update()
            list_one = list_class if kind == "folder" else list_tar
            found, other, strange, folders = list_one(entry.path)
            names += [os.fsencode(name) for name, _, _ in found]
            at += [start for _, start, _ in found]
            size += [length for _, _, length in found]
            labels += [k] * len(found)
            inner += [f"{entry.name}/{name}" for name, _ in folders]
            inner_stamps += [time for _, time in folders]
            odd += [(f"{entry.name}/{name}", reason) for name, reason in strange]
            if folders:
                deeper += [f"{entry.name}/{name}" for name, _, _ in found if "/" in name]
            if other and not found:
                passed.append(f"{entry.name}/{other}")
            mixed += [f"{entry.name}/{other}"] if other and found else []
        bar.close()
        if deeper and len(deeper) == len(labels):
            self.check_level(sorted(set(labels)))
        told = []
        if odd:
            told.append(f"{len(odd)} left out, first {show(odd[0][0])}, which {odd[0][1]}")
        if mixed:
            told.append(f"{len(mixed)} classes hold files of other endings, too, passed over, first "
                        f"{show(mixed[0])}")
        if deeper:
            share = f"{len(deeper):,} of {len(names):,} images"
            told.append(f"{share} lie in sub-folders of their class's folder, as {show(deeper[0])}")
        return dict(
            now, inner=pack(inner), passed=pack(passed), told=pack(told),
            inner_stamps=np.array(inner_stamps, np.int64), labels=np.array(labels, np.int32),
            names=np.frombuffer(b"".join(names), np.uint8),
            ends=np.cumsum([len(n) for n in names], dtype=np.int64),
            at=np.array(at, np.int64), size=np.array(size, np.int64))

    def check_level(self, labels):
        """All images lie deeper: ImageNet itself, with folders train and val, holds no classes."""
        holding = [self.folders[k] for k in labels]
        split = r"(train|val|validation|test)([\W\d_].*)?"
        if all(re.fullmatch(split, name, re.IGNORECASE) for name in holding):
            what = f"holds {some(holding)}, which are no classes; give one of these folders"
            raise UserError(f"{self.root}: {what}")

    def __len__(self):
        return len(self.labels)

    def folder(self, i):
        return self.folders[self.kept[self.labels[i]]]

    def name(self, i):
        """File name of image i relative to root; for one in a tar: n01440764.tar/name."""
        name = self.names[self.starts[i]:self.ends[i]].tobytes()
        return f"{self.folder(i)}/{os.fsdecode(name)}"

    def read(self, i):
        """RGB PIL image i; UserError where it cannot be decoded."""
        path, at, size, content = self.root / self.name(i), int(self.at[i]), int(self.size[i]), None
        if at >= 0:
            content = read_member(self.root / self.folder(i), at, size, path)
        return decode(path, content, quiet=True)  # turned or not is nothing to a label

    def drop(self, names):
        """Leave out the images of these names (as `name` gives them; a class's tar and its folder are
        one place), a benchmark's, say; `dropped`, `asked` count them."""
        wanted, rows = {}, np.ones(len(self), bool)
        for n in map(untarred, names):
            wanted.setdefault(n.split("/")[0], set()).add(n)
        places = [wanted.get(untarred(self.folders[f])) for f in self.kept]
        for k in np.flatnonzero([place is not None for place in places]):
            here = range(self.first[k], self.first[k + 1])
            rows[here] = [untarred(self.name(i)) not in places[k] for i in here]
        if not rows.any():
            raise UserError(f"{self.root}: all {len(rows):,} images belong to the evaluation; "
                            "none is left to train on")
        self.keep(rows)
        self.dropped, self.asked = int((~rows).sum()), sum(map(len, wanted.values()))

    def keep(self, rows):
        for field in ("labels", "starts", "ends", "at", "size"):
            setattr(self, field, getattr(self, field)[rows])
        counts = np.bincount(self.labels, minlength=len(self.kept))
        self.first = np.concatenate([[0], np.cumsum(counts)])  # class k: from first[k] on


def untarred(name):
    """n01440764.tar/a.jpg or n01440764.tar -> the same without .tar."""
    return re.sub(r"^([^/]*)\.tar(?=/|$)", r"\1", name, flags=re.IGNORECASE)


class LabelledImages(Dataset):
    """Images of an ImageIndex. Item: dict with image (3, h, w) uint8, size (h, w), label, bad:
    files that could not be read on the way.

    transform(PIL image, random.Random) -> (image, (h, w)). Keys: (index, seed). An unreadable file
    (14 million have some) is replaced by another of its class.
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
            except UserError as e:
                bad.append(str(e))
                if len(bad) == 10:
                    files = f"ten files of class {self.index.classes[label]} in a row"
                    raise UserError(f"{e}; {files} cannot be read") from None
                i = rng.randrange(self.index.first[label], self.index.first[label + 1])


def collate_labelled(items, canvas):
    """Items -> images (B, 3, canvas, canvas) uint8 padded right and bottom, sizes (B, 2), labels
    (B,); on the host: image_sizes (sizes again), bad: list of texts."""
    images = torch.zeros(len(items), 3, canvas, canvas, dtype=torch.uint8)
    for b, x in enumerate(items):
        images[b, :, :x["size"][0], :x["size"][1]] = x["image"]
    sizes = torch.tensor([x["size"] for x in items])
    labels = torch.tensor([x["label"] for x in items])
    bad = [e for x in items for e in x["bad"]]
    image_sizes = [tuple(x["size"]) for x in items]
    return dict(images=images, sizes=sizes, labels=labels, image_sizes=image_sizes, bad=bad)


def jitter_image(image, canvas, scale, rng, flip=0.5):
    """Large-scale jitter of an image without boxes: PIL or (3, H, W) uint8 -> (3, h, w), (h, w).
    The long side becomes scale * canvas, of which a window of at most canvas x canvas is cut."""
    image = TF.pil_to_tensor(image) if isinstance(image, Image.Image) else image
    height, width = image.shape[1:]
    factor = scale * canvas / max(height, width)
    h, w = max(1, round(height * factor)), max(1, round(width * factor))
    if (h, w) != (height, width):
        bilinear = TF.InterpolationMode.BILINEAR
        image = TF.resize(image, [h, w], interpolation=bilinear, antialias=False)
    y0 = rng.randint(0, max(0, h - canvas))
    x0 = rng.randint(0, max(0, w - canvas))
    image = image[:, y0:y0 + canvas, x0:x0 + canvas]
    if rng.random() < flip:
        image = image.flip(2)
    return image, tuple(image.shape[1:])


class Stream:
    """Batches of (index, seed) over n images: sharded, resumable at any step. No process waits for
    another's pass to end, and none starves.

    Each pass over the images has an order of its own; batches run on over the end of a pass. A
    step's global batch does not depend on the number of processes. repeats (n,) float: how often an
    image stands in a pass, the fraction as a chance drawn anew in each pass.

    steps None: endless, from batch `start` on. Else as BatchPlan: `steps` batches are an epoch, and
    set_epoch says which; its batch k is batch epoch * steps + k of the endless stream.
    """

    def __init__(self, n, batch_size, rank=0, world=1, seed=0, repeats=None, steps=None):
        if n < 1:
            raise UserError("no image to draw batches from")
        self.n, self.batch_size, self.rank, self.world, self.seed = n, batch_size, rank, world, seed
        self.repeats = None if repeats is None else torch.as_tensor(repeats, dtype=torch.float64)
        self.steps, self.epoch, self.start = steps, 0, 0

    def set_epoch(self, epoch, start=0):
        """Continue with batch `start` of `epoch`, which needs steps."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        if self.steps is None:
            raise TypeError("a Stream without steps is endless")
        return self.steps - self.start

    def order(self, number):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        if self.repeats is None:
            return torch.randperm(self.n, generator=generator)
        chance = torch.rand(self.n, generator=generator, dtype=torch.float64)
        count = self.repeats.floor() + (chance < self.repeats.frac())
        entries = torch.arange(self.n).repeat_interleave(count.long())
        return entries[torch.randperm(len(entries), generator=generator)]

    def __iter__(self):
        total, number = self.batch_size * self.world, 0
        step, last = self.start, math.inf
        if self.steps is not None:
            step = self.epoch * self.steps + self.start
            last = (self.epoch + 1) * self.steps
        skip = step * total
        if self.repeats is None:
            number, skip = divmod(skip, self.n)
        order = self.order(number)
        while skip >= len(order):
            skip, number = skip - len(order), number + 1
            order = self.order(number)
        order = order[skip:]
        first = self.rank * self.batch_size
        while step < last:
            while len(order) < total:
                number += 1
                order = torch.cat([order, self.order(number)])
            mine = order[first:first + self.batch_size].tolist()
            yield [(i, hash((self.seed, step, first + k))) for k, i in enumerate(mine)]
            order, step = order[total:], step + 1


class Pairs:
    """Training batches {kind: batch} of several Streams. set_epoch and len: as BatchPlan's.

    parts: {kind: (data set, its Stream, collate function)}. Each kind has `workers` loader processes, and
    generators of its own, that do not shift the model's random numbers. broken: lines on files that could
    not be read (`bad` of collate_labelled), each told once.
    """

    def __init__(self, parts, workers, pin):
        from .datasets import start_worker
        self.datasets, self.streams, self.loaders, self.broken = [], {}, {}, set()
        for kind, (dataset, stream, collate) in parts.items():
            self.datasets.append(dataset)
            self.streams[kind] = stream
            self.loaders[kind] = DataLoader(
                dataset, batch_sampler=stream, num_workers=workers, collate_fn=collate, pin_memory=pin,
                worker_init_fn=start_worker, persistent_workers=workers > 0, generator=torch.Generator())

    def set_epoch(self, epoch, start=0):
        for stream in self.streams.values():
            stream.set_epoch(epoch, start)

    def __len__(self):
        return len(next(iter(self.streams.values())))

    def __iter__(self):
        for batches in zip(*self.loaders.values()):
            batch = dict(zip(self.loaders, batches))
            self.tell(text for part in batches for text in part.get("bad", ()))
            yield batch

    def tell(self, bad):
        for text in sorted(set(bad) - self.broken):
            self.broken.add(text)
            count = f"({len(self.broken)} so far)"
            print(f"replaced by another image of its class {count}: {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------ boxes of images with one class

def number(value):
    """A finite float, also one written as text; None for everything else."""
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        return None
    try:
        value = float(value)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def whole(value):
    """A whole number, also one written as text or as 3.0; None for everything else."""
    if isinstance(value, str):
        try:
            value = int(value)  # not by way of float: ids may have 19 digits
        except ValueError:
            value = number(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**63 else None


def box_record(image, box, annotations):
    """Append x, y, width, height, cut to its image; False if nothing of the box lies in there."""
    x, y, w, h = box
    if min(x, y) < 0 or x + w > image["width"] or y + h > image["height"]:
        x1, x2 = (min(max(v, 0.0), float(image["width"])) for v in (x, x + w))
        y1, y2 = (min(max(v, 0.0), float(image["height"])) for v in (y, y + h))
        x, y, w, h = x1, y1, x2 - x1, y2 - y1
    if w <= 0 or h <= 0:
        return False
    annotations.append(dict(
        id=len(annotations) + 1, image_id=image["id"], category_id=image["category_id"],
        bbox=[x, y, w, h], area=w * h, iscrowd=0))
    return True


def tell(where, repaired, quiet):
    if repaired and not quiet:
        counts = ", ".join(f"{count} {what}" for what, count in repaired.items())
        print(f"{show(where)}: {counts}", flush=True)


def read_annotation(path):
    """(width, height, [(class, [x1, y1, x2, y2])]) of one ILSVRC XML; 0: a size it does not have.

    Nested entities that would expand to gigabytes do no harm: expat stops them (2.4 and later,
    Python's own since 3.9.7), and ElementTree follows no external ones.
    """
    where = show(path)
    try:
        if path.stat().st_size > 2**24:
            raise ValueError("16 MiB and more")
        tree = ElementTree.fromstring(path.read_bytes())
    except (OSError, ElementTree.ParseError, ValueError, LookupError, MemoryError) as e:
        raise UserError(f"{where}: is no ILSVRC annotation ({show(e)})") from None
    if tree.tag != "annotation":
        root = f"<{show(tree.tag, 40)}>, not <annotation>"
        raise UserError(f"{where}: is no ILSVRC annotation (its root is {root})")

    def read(element, tag, missing=None):
        text = (element.findtext(tag) or "").strip()
        value = number(text) if text else missing
        if value is None:
            holds = f"holds '{show(text, 40)}'" if text else "is missing or empty"
            raise UserError(f"{where}: <{tag}> {holds}; a number is expected")
        return value

    width, height = (max(0.0, read(tree, f"size/{k}", 0.0)) for k in ("width", "height"))
    if max(width, height) > LARGEST:
        raise UserError(f"{where}: <size> is {width:g} x {height:g}, no size of a picture")
    objects = []
    for found in tree.iter("object"):
        name = (found.findtext("name") or "").strip()
        if not name or unprintable(name):
            holds = f"holds '{show(name, 40)}'" if name else "is missing or empty"
            raise UserError(f"{where}: <object/name> {holds}; a class (wnid) is expected")
        corners = [read(found, f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")]
        objects.append((name, corners))
    if not objects:
        raise UserError(f"{where}: has no <object>, so its image has no class")
    if len({name for name, _ in objects}) > 1:
        raise UserError(f"{where}: has objects of several classes; an image of ImageNet has one")
    return int(width), int(height), objects


def read_ilsvrc(images, boxes, quiet=False):
    """Localisation set from ILSVRC XML: a dict in COCO's format whose images have category_id;
    categories' names are wnids.

    images: folder of <wnid>/<stem>.JPEG or flat; boxes: folder of XML, at any depth. Width and
    height are the XML's: predictions are scaled to them; where it has none, the picture's. Boxes
    are cut to the image; those without area are dropped; corners in the wrong order are exchanged.
    One line says how many were repaired, unless `quiet`. Boxes of the folder `train` are nobody's
    business here: image labels only.
    """
    if not Path(images).is_dir():
        raise UserError(f"{images}: no such folder; it should hold ILSVRC's images")
    inside = walk(boxes, (".xml",)) if Path(boxes).is_dir() else ()
    paths = sorted(Path(boxes, folder, n) for folder, _, files, _, _ in inside for n in files)
    if not paths:
        where = "ILSVRC's validation boxes are at https://image-net.org (Bounding Boxes, val)"
        raise UserError(f"{boxes}: holds no .xml; {where}")
    pictures = {}
    for folder, _, files, _, _ in walk(images, IMAGES):
        for name in files:
            pictures.setdefault(Path(name).stem, []).append(folder + name)
    found, repaired = {}, Counter()
    for path in tqdm(paths, desc="boxes", leave=False, mininterval=1, disable=quiet):
        width, height, objects = read_annotation(path)
        stem, wnid = show(path.stem), objects[0][0]
        names = pictures.get(path.stem, [])
        if len(names) > 1:
            names = [n for n in names if Path(n).parent.name == wnid] or names
        if len(names) != 1:
            is_there = f"{some(names, 2)} are two images" if names else f"has no image {stem}"
            raise UserError(f"{images}: {is_there}, for which {show(path)} has boxes")
        if names[0] in found:
            other = show(found[names[0]][0])
            raise UserError(f"{show(path)}: is the second file of image {stem}, after {other}")
        if not width or not height:
            width, height = decode(Path(images, names[0])).size
            repaired["sizes are missing, taken from the picture"] += 1
        found[names[0]] = path, width, height, wnid, [corners for _, corners in objects]
    wnids = sorted({wnid for _, _, _, wnid, _ in found.values()})
    ids = {n: k + 1 for k, n in enumerate(wnids)}
    content = dict(images=[], annotations=[], categories=[dict(id=ids[n], name=n) for n in wnids])
    for name, (_, width, height, wnid, objects) in found.items():
        image = dict(id=len(content["images"]) + 1, file_name=name, width=width, height=height,
                     category_id=ids[wnid])
        content["images"].append(image)
        for x1, y1, x2, y2 in objects:
            repaired["boxes had their corners exchanged"] += x1 > x2 or y1 > y2
            box = min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)
            kept = box_record(image, box, content["annotations"])
            repaired["boxes without area in the image are left out"] += not kept
    tell(boxes, +repaired, quiet)
    return content


def check_localisation(raw, where, quiet=False):
    """A localisation set's plain records: values are numbers, boxes lie in their images. What
    cannot be right is refused, one line says what was repaired."""
    for key in ("images", "annotations", "categories"):
        entries = raw.get(key) if isinstance(raw, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise UserError(f"{where}: no '{key}' list of objects; this is no localisation set")
    categories = check_categories(raw, where)
    images = check_images(raw, {c["id"] for c in categories}, where)
    boxes, annotations, repaired, beyond = [], [], Counter(), 0
    twins = len(raw["categories"]) - len(categories)
    repaired["categories that share a name are left out, they have no image"] += twins
    for a in raw["annotations"]:
        image = images.get(whole(a.get("image_id")))
        box = a["bbox"] if isinstance(a.get("bbox"), (list, tuple)) else ()
        box = [number(v) for v in box]
        name = f"{where}: annotation {show(a.get('id'), 40)} has"
        if image is None or len(box) != 4 or None in box:
            has = f"image id {show(a.get('image_id'), 40)}, bbox {show(a.get('bbox'), 80)}"
            raise UserError(f"{name} {has}; an image's id and four numbers are expected")
        if whole(a.get("category_id")) != image["category_id"]:
            has = f"category id {show(a.get('category_id'), 40)}, its image {image['category_id']}"
            raise UserError(f"{name} {has}; an image has one class")
        boxes.append((image, box))
    if boxes and all(abs(v) <= 1 for _, box in boxes for v in box[2:]):
        raise UserError(f"{where}: no box is larger than one pixel; boxes are in pixels, not in "
                        "fractions of the image")
    for image, (x, y, w, h) in boxes:
        repaired["boxes of negative width or height are turned round"] += w < 0 or h < 0
        x, y, w, h = min(x, x + w), min(y, y + h), abs(w), abs(h)
        beyond += min(x, y) < -1 or x + w > image["width"] + 1 or y + h > image["height"] + 1
        kept = box_record(image, (x, y, w, h), annotations)
        repaired["boxes without area in the image are left out"] += not kept  # never to be found
    if beyond > len(boxes) / 10:
        repaired["boxes reach beyond their image, are they x, y, width, height?"] += beyond
    tell(where, +repaired, quiet)
    return dict(images=list(images.values()), annotations=annotations, categories=categories)


def check_categories(raw, where):
    """[dict(id, name)]. Of two of one name one without images is left out, else it is refused."""
    used = {whole(i.get("category_id")) for i in raw["images"]}
    by_id, by_name = {}, {}
    for c in raw["categories"]:
        key, name = whole(c.get("id")), c.get("name")
        if key is None or not isinstance(name, str) or not name or unprintable(name):
            raise UserError(f"{where}: category {show(c, 80)} lacks an id, or a name in plain text")
        if key in by_id:
            raise UserError(f"{where}: category id {key} occurs twice, {by_id[key]} and {name}")
        by_id[key] = name
    for key in sorted(by_id, key=lambda k: k not in used):  # those with images first
        first = by_name.setdefault(by_id[key], key)
        if first != key and key in used:
            name = show(by_id[key], 40)
            raise UserError(f"{where}: categories {first} and {key} are both called {name}")
    return [dict(id=key, name=name) for key, name in by_id.items() if by_name[name] == key]


def check_images(raw, categories, where):
    """{id: dict(id, width, height, category_id, file_name)}."""
    images = {}
    for i in raw["images"]:
        image = {k: whole(i.get(k)) for k in ("id", "width", "height", "category_id")}
        name = i.get("file_name")
        lacks = [k for k, value in image.items() if value is None]
        if not isinstance(name, str) or not name:
            lacks.append("file_name")
        if lacks:
            has = f" ({lacks[0]} is {show(i[lacks[0]], 40)})" if lacks[0] in i else ""
            raise UserError(f"{where}: image {show(i.get('id'), 40)} lacks {', '.join(lacks)}{has}")
        if not (0 < image["width"] <= LARGEST and 0 < image["height"] <= LARGEST):
            size = f"{image['width']}x{image['height']}"
            raise UserError(f"{where}: image {image['id']} has the size {size}")
        if image["category_id"] not in categories:
            strange = f"category_id {image['category_id']}, which 'categories' does not list"
            raise UserError(f"{where}: image {image['id']} has {strange}")
        if name.startswith("/") or ".." in name.split("/") or unprintable(name):
            strange = f"file_name {show(name)}, which is no file inside the image folder"
            raise UserError(f"{where}: image {image['id']} has {strange}")
        if image["id"] in images:
            names = f"{show(images[image['id']]['file_name'])} and {show(name)}"
            raise UserError(f"{where}: image id {image['id']} occurs twice, {names}")
        images[image["id"]] = dict(image, file_name=name)
    if not images:
        raise UserError(f"{where}: holds no image")
    return images


@functools.lru_cache(8)  # images of a class follow each other
def places_in(tar):
    """{name of an image: (start, length)} in a class's tar."""
    return {name: place for name, *place in list_tar(tar)[0]}


class LocalisationImages(Dataset):
    """Images of a localisation set (COCO's format, images with category_id) for evaluation: the
    long side becomes `canvas`.

    Items as CocoDataset's: boxes (M, 4) and original_size are those of the annotation, whatever the
    size of the file. truth: the set's plain records, from which all of an evaluation is computed.
    A file_name n1.tar/x.JPEG is a member of a tar. where: the set's name in messages.
    """

    def __init__(self, folder, raw, canvas, where="localisation set", quiet=False):
        self.folder, self.canvas = Path(folder), canvas
        self.truth = check_localisation(raw, where, quiet)
        self.info = self.truth["images"]
        names = {c["id"]: c["name"] for c in self.truth["categories"]}
        self.names = [names[i["category_id"]] for i in self.info]
        self.boxes = {i["id"]: [] for i in self.info}
        for a in self.truth["annotations"]:
            x, y, w, h = a["bbox"]
            self.boxes[a["image_id"]].append((x, y, x + w, y + h))
        files = [self.file_of(i["file_name"])[0] for i in self.info]
        listed = {}  # folders, not 50,000 look-ups on a network disk
        for parent in {os.path.dirname(n) for n in files}:
            path = self.folder / parent
            listed[parent] = {e.name for e in list_folder(path)} if path.is_dir() else ()
        missing = [n for n in files if os.path.basename(n) not in listed[os.path.dirname(n)]]
        if missing:
            count = f"{len(missing)} of {len(files)} images are missing"
            raise UserError(f"{folder}: {count}, first {show(missing[0])}")

    def file_of(self, name):
        """(file, member of it or None)."""
        found = re.match(r"(.*?\.tar)/(.+)", name, re.IGNORECASE)
        return (found[1], found[2]) if found else (name, None)

    def __len__(self):
        return len(self.info)

    def __getitem__(self, key):
        record = self.info[key[0]]
        path = self.folder / record["file_name"]
        file, member = self.file_of(record["file_name"])
        content = None
        if member is not None:
            places = places_in(self.folder / file)
            if member not in places:
                raise UserError(f"{show(path)}: cannot be read (the tar has no such image)")
            content = read_member(self.folder / file, *places[member], path)
        image = decode(path, content)
        self.check_turn(path, content, image, record)
        image, size = jitter_image(image, self.canvas, 1.0, random.Random(0), 0.0)
        boxes = torch.tensor(self.boxes[record["id"]], dtype=torch.float32).reshape(-1, 4)
        labels = torch.zeros(len(boxes), dtype=torch.long)
        return dict(image=image, size=size, boxes=boxes, labels=labels, image_id=key[0],
                    original_size=(record["height"], record["width"]))

    def check_turn(self, path, content, image, record):
        """Refuse a picture that EXIF turns by 90 degrees where its annotation did not turn."""
        wide = image.width - image.height  # upright
        if wide * (record["width"] - record["height"]) >= 0:  # alike, or one of them is square
            return
        try:
            with Image.open(io.BytesIO(content) if content else path) as stored:
                turn = stored.getexif().get(274)
        except Exception:  # what Pillow cannot read has turned nothing
            turn = None
        if turn in (5, 6, 7, 8):
            upright = f"is {image.width}x{image.height} when upright (EXIF orientation {turn})"
            stored = f"its annotation says {record['width']}x{record['height']}, as it is stored"
            raise UserError(f"{show(path)}: {upright}, but {stored}; turn its boxes, or take the "
                            "orientation out of the file")


# ------------------------------------------------------------------ classes and their names

def read_lines(path, flag):
    """Lines of a text file that a flag names."""
    from .datasets import regular
    try:
        return regular(path).read_text(encoding="utf-8-sig").splitlines()
    except UserError as e:
        raise UserError(f"{flag} {e}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{flag} {path}: is no text file ({e})") from None


def read_class_list(path):
    """The classes of a --cls-list: first word of each line; None without a file."""
    if not path:
        return None
    return [line.split()[0] for line in read_lines(path, "--cls-list") if line.strip()]


def wordnet_ids(path, synsets):
    """{synset: wnid} from WordNet 3.0's index.noun. "bass.n.03" is the third sense of the lemma
    bass; a line ends in the offsets of its senses, in order, and a wnid is n + offset. Offsets are
    those of version 3.0 only. Synsets that WordNet has not are left out."""
    strange = [s for s in synsets if not re.fullmatch(r".+\.[a-z]\.0*[1-9]\d*", str(s).lower())]
    if strange:
        raise UserError(f"synset {strange[0]}: expected lemma.n.number, as bass.n.03")
    wanted, offsets = {s.lower().rsplit(".", 2)[0] for s in synsets}, {}
    try:
        for line in read_lines(path, "--wordnet"):
            if not line.startswith(" "):
                cells = line.split()
                if cells and cells[0] in wanted:
                    offsets[cells[0]] = cells[-int(cells[2]):]
    except (ValueError, IndexError) as e:
        raise UserError(f"--wordnet {path}: is not WordNet's index.noun ({e}); version 3.0 is at "
                        "https://wordnet.princeton.edu (Debian: apt install wordnet-base)") from None
    answer = {}
    for s in synsets:
        lemma, _, sense = s.lower().rsplit(".", 2)
        if int(sense) <= len(offsets.get(lemma, ())):
            answer[s] = f"n{offsets[lemma][int(sense) - 1]}"
    if not answer:
        raise UserError(f"--wordnet {path}: holds none of the synsets; it should be WordNet 3.0's "
                        "dict/index.noun")
    return answer


def read_overlap(path):
    """{detection class name: wnid} of a json: that dict, or a list of dicts with name and wnid."""
    from .datasets import read_json
    content = read_json(path)
    try:
        if isinstance(content, dict):
            answer = dict(content)
        else:
            answer = {r["name"]: r["wnid"] for r in content}
        if not all(isinstance(text, str) for pair in answer.items() for text in pair):
            raise TypeError
    except (TypeError, KeyError):
        raise UserError(f"--overlap {path}: expected a json object {{detection class: wnid}}") from None
    twice = [w for w, n in Counter(answer.values()).items() if n > 1]
    if twice:
        one = "one class has one partner"
        raise UserError(f"--overlap {path}: two detection classes are {twice[0]}; {one}")
    return answer


def wnid_names(wnids, folder, path=None):
    """Name of each wnid: of a text file (wnid, tab, name), or of classes.json in or beside the folder (there
    it may be somebody else's), else the wnid itself."""
    from .datasets import read_json
    known, source = {}, None
    if path:
        source = f"--names {path}"
        known = dict(line.split("\t")[:2] for line in read_lines(path, "--names") if "\t" in line)
        if not known:
            raise UserError(f"{source}: no line has a wnid, a tab and a name")
    else:
        there = [place / "classes.json" for place in (Path(folder), Path(folder).parent)]
        source = next((place for place in there if place.exists()), None)
        try:
            known = {c["wnid"]: c["name"] for c in read_json(source)} if source else {}
        except (TypeError, KeyError):
            if source.parent == Path(folder):
                raise UserError(f"{source}: expected a list of objects with wnid and name") from None
    names = [known.get(w, w) for w in wnids]
    for w, n in zip(wnids, names):
        if not isinstance(n, str) or not n.strip() or unprintable(n):
            what = "is empty, no text, or holds control characters"
            raise UserError(f"{source}: the name of {w} {what}")
    return names


def boxed_classes(records):
    """(classes of the Records that have a box, but for crowds, those that have none: many a file lists
    validation's, too). All and none, if no class has one."""
    held = np.bincount(records.label[records.crowd == 0], minlength=len(records.classes)) > 0
    held |= not held.any()
    return tuple([n for n, h in zip(records.classes, held) if h == wanted] for wanted in (True, False))


def pair_by_name(det, names):
    """For each classification class its detection class or -1: by its whole name, if no other has it (cranes
    are birds and machines), then by a part of it, likewise."""
    from .datasets import plain_name
    plain = lambda name: plain_name(name).strip()
    free, count = {plain(n): k for k, n in enumerate(det)}, Counter(map(plain, names))
    pair = [free.get(plain(n), -1) if count[plain(n)] == 1 else -1 for n in names]
    free = {n: k for n, k in free.items() if k not in set(pair)}
    times = Counter(part for n in names for part in {plain(n), *map(plain, n.split(","))})
    for k, n in enumerate(names):
        found = [part for part in map(plain, n.split(",")) if part in free and times[part] == 1]
        if pair[k] < 0 and found:
            pair[k] = free[found[0]]
    return pair


def class_folders(path):
    """Names of the classes of a folder: its folders and tars; nothing in them is looked at."""
    return {e.name if kind_of(e) == "folder" else untarred(e.name) for e in list_folder(path)}


def shared_classes(val, train, classes):
    """Those of the training classes whose folder or .tar in `val` is that in `train`, links followed; all of
    them where `val` is `train`, or lies in a class of it. train None: none."""
    def same(name):
        try:
            return os.path.samefile(os.path.join(val, name), os.path.join(train, name))
        except OSError:  # not there
            return False
    if not train:
        return []
    place = os.path.relpath(os.path.realpath(val), os.path.realpath(train)).split(os.sep)[0]
    everything = place == "." or place in classes
    return [w for w in classes if everything or same(w) or same(f"{w}.tar")]


# ------------------------------------------------------------------ augmentation, data sets that report

class ClassificationTransform:
    """Stage I's augmentation of a PIL image -> (3, S, S) uint8: random crop of at least the share `least`,
    and flip; weak: colours; strong: RandAugment and random erasing. Swin's RandAugment is magnitude 9 of
    10 with noise; torchvision counts to 30 and has no noise: 27.

    train False: short side S * 8/7, centre crop; plain: the whole image, its objects may stand at the border.
    The randomness of torchvision's transforms comes from the sample's own seed.
    """

    def __init__(self, size, augment, train, least=0.08):
        self.size, self.erase = size, 0.25 if augment == "strong" and train else 0.0
        mode = T.InterpolationMode.BICUBIC if augment == "strong" else T.InterpolationMode.BILINEAR
        if train:
            steps = [T.RandomResizedCrop(size, (least, 1.0), interpolation=mode), T.RandomHorizontalFlip()]
            if augment == "weak":
                steps.append(T.ColorJitter(0.4, 0.4, 0.4))
            if augment == "strong":
                steps.append(T.RandAugment(2, 27, interpolation=mode))
        elif augment == "plain":
            steps = [T.Resize((size, size))]
        else:
            steps = [T.Resize(round(size * 8 / 7), interpolation=mode), T.CenterCrop(size)]
        self.steps = T.Compose([*steps, T.PILToTensor()])
        self.eraser = T.RandomErasing(1.0, value="random")

    def __call__(self, image, rng):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.getrandbits(62))
            image = self.steps(image)
            if rng.random() < self.erase:  # noise of the images' own mean and deviation
                mean = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
                std = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
                image = (self.eraser((image / 255 - mean) / std) * std + mean) * 255
                image = image.round().clamp(0, 255).byte()
        return image, (self.size, self.size)


class DetectionTransform:
    """Stage II's weak augmentation of a classification image: large-scale jitter and flip, as for detection
    images."""

    def __init__(self, canvas, jitter):
        self.canvas, self.jitter = canvas, jitter

    def __call__(self, image, rng):
        return jitter_image(image, self.canvas, rng.uniform(*self.jitter), rng)


class ClassImages(LabelledImages):
    """Labelled images on a canvas. labels: the model's of each class of the index. both: classes with
    boxes, too."""

    def __init__(self, index, transform, canvas, labels=(), both=0):
        super().__init__(index, transform)
        self.canvas, self.labels, self.both = canvas, list(labels), both

    def report(self):
        """A line for the start of a run."""
        index = self.index
        text = f"{index.root}: {len(index):,} images, {len(index.classes):,} classes"
        if self.both:
            text += f", {self.both:,} in both"
        if getattr(index, "asked", 0):
            text += (f" | left out {index.dropped:,} of the {index.asked:,} images of the benchmark, or of "
                     "validation")
        if index.empty:
            more = " ..." if len(index.empty) > 5 else ""
            names = ", ".join(index.empty[:5])
            text += f" | no image of {names}{more}: {len(index.empty)} classes left out"
        return text


class Benchmark(LocalisationImages):
    """A localisation set, with what a page of samples needs to show it."""

    def __init__(self, folder, content, canvas, where, quiet):
        super().__init__(folder, content, canvas, where, quiet)
        self.where = where
        self.classes = [c["name"] for c in self.truth["categories"]]
        self.category_ids = [c["id"] for c in self.truth["categories"]]
        if not self.truth["annotations"]:
            raise UserError(f"{where}: no image has a box")
        self.items = []
        for i in [i for i in self.info if ".tar/" not in i["file_name"]][:6]:
            boxes = np.array(self.boxes[i["id"]], np.float32).reshape(-1, 4)
            labels = np.full(len(boxes), self.category_ids.index(i["category_id"]))
            self.items.append((i["id"], i["file_name"], i["height"], i["width"], boxes, labels))

    def report(self):
        boxes = len(self.truth["annotations"])
        return (f"{self.where}: {boxes:,} boxes, {len(self):,} images, {len(self.classes):,} classes; "
                "they choose nothing: a training reports last.pt")


class FirstImage(Exception):
    """Ends the reading of a json."""


def is_localisation(path):
    """Whether the images of a COCO-format json have a class each: category_id of the first one tells."""
    from .datasets import stream_json

    def stop(image, *_):
        raise FirstImage(image)
    try:
        stream_json(path, dict(images=stop))
    except FirstImage as e:
        return isinstance(e.args[0], dict) and "category_id" in e.args[0]
    return False


def evaluated_images(train, images, boxes, xml=None):
    """File names in the folder `train` of images that are evaluated on and lie there: of a json's in the
    folder `images`, or of those that ILSVRC's XML tells. A localisation set's may be copies: where none lies
    there, its names as they are."""
    from .datasets import read_annotations, read_json
    if not images or not os.path.exists(xml or boxes or ""):
        return []
    root, folder = os.path.realpath(train), os.path.realpath(images)
    nested = Path(root).is_relative_to(folder) or Path(folder).is_relative_to(root)
    local = not xml and is_localisation(boxes)
    if local:
        names = [i["file_name"] for i in check_localisation(read_json(boxes), boxes, quiet=True)["images"]]
    elif not nested or not os.path.isdir(images):
        return []  # without a look into the files
    elif xml:
        names = [i["file_name"] for i in read_ilsvrc(images, xml, quiet=True)["images"]]
    else:
        names = list(read_annotations(boxes, images).names)
    inside = [os.path.relpath(os.path.join(folder, n), root) for n in names]
    inside = [n for n in inside if not n.startswith("..")]
    return inside or (names if local else [])


def draw_split(index, seed):
    """A localisation set without boxes, of an ImageIndex (Sec. 4.1 of Simple-21K): 5 images of each
    class, 20 % of classes with fewer than 25, none of those with fewer than 5. A dict in COCO's
    format whose images have category_id."""
    generator, images, kept = torch.Generator().manual_seed(seed), [], []
    for k, wnid in enumerate(index.classes):
        first, count = int(index.first[k]), int(index.first[k + 1] - index.first[k])
        if count < 5:
            continue
        kept.append(wnid)
        wanted = 5 if count >= 25 else count // 5
        for i in torch.randperm(count, generator=generator).tolist():
            try:
                width, height = index.read(first + i).size
            except UserError:  # the next one then
                continue
            images.append(dict(id=len(images) + 1, file_name=index.name(first + i), width=width,
                               height=height, category_id=len(kept)))
            wanted -= 1
            if not wanted:
                break
    categories = [dict(id=k + 1, name=n) for k, n in enumerate(kept)]
    return dict(images=images, annotations=[], categories=categories)
