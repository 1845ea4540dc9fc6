# SPDX-License-Identifier: MIT
"""What stands in for ImageNet's and CLIP's networks on the embedded dataset: a ResNet-10 that knows
the drawn shapes, and a CLIP of 3.5 M parameters; a laptop trains each in one to two minutes.

    net = tiny_resnet("tiny16", shapes_backbone("tiny16"))  # a torchvision ResNet: conv1 ... layer4
    path = tiny_clip(root, folder)                          # trained by the first call, then cached
    clip = load_clip(path)                                  # common/clip.py

The tiny CLIP needs open_clip and clip.py; the backbone needs neither.
"""
import hashlib
import json
import lzma
import math
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork
from tqdm import tqdm

from .boxes import assign_atss, grid_anchors
from .run import UserError, load_checkpoint, load_strict, lock, made_once, save_checkpoint, there, unlock

WIDTHS = (8, 16, 24, 32, 48, 64)  # of NarrowResNet's first stage; GroupNorm takes eights
TINY_BACKBONE = f"tiny({'|'.join(map(str, WIDTHS))})"


# ------------------------------------------------------------------ the tiny backbone

def tiny_width(name):
    """"tiny16" -> 16; None for the name of any other backbone, and for other widths than WIDTHS."""
    found = re.fullmatch(TINY_BACKBONE, name)
    return int(found[1]) if found else None


class NarrowResNet(torchvision.models.ResNet):
    """torchvision's ResNet-10 (one BasicBlock a stage) with `width` instead of 64 channels and
    GroupNorm of 8 channels a group. Its stages have width, 2, 4 and 8 times width channels."""

    def __init__(self, width):
        norm = lambda c: nn.GroupNorm(c // 8, c)
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=1, norm_layer=norm)
        self.inplanes = width
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width)
        for level in range(4):
            stride = 1 if level == 0 else 2
            layer = self._make_layer(BasicBlock, width * 2**level, 1, stride=stride)
            setattr(self, f"layer{level + 1}", layer)


def tiny_resnet(name, init="none"):
    """NarrowResNet of "tiny16" ... init: "none", or a file of shapes_backbone."""
    if init == "imagenet":
        raise UserError(f"backbone {name}: has no ImageNet weights; use --init none, or on shapes --init "
                        "shapes")
    net = NarrowResNet(tiny_width(name))
    if init != "none":
        load_strict(net, load_checkpoint(init)["model"], init)
    return net


def load_fpn(fpn, init):
    """The FPN of a file of shapes_backbone into one of 64 channels; P6 and P7 are left as they are."""
    state = load_checkpoint(init)["fpn"]
    own = {k: v for k, v in fpn.state_dict().items() if k.startswith("extra_blocks.")}
    load_strict(fpn, state | own, init)


# ------------------------------------------------------------------ what stands in for its ImageNet

BACKBONE_SEED = 20_000  # added to the seed of the images that a detector sees
STRIDES = 8, 16, 32
IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # mean and deviation, RGB


class Classifier(nn.Module):
    """NarrowResNet, FPN of 64 channels and one linear classifier of shape and of colour for every anchor."""

    def __init__(self, name, shapes, colours):
        super().__init__()
        self.body, self.split, width = NarrowResNet(tiny_width(name)), (shapes, colours), tiny_width(name)
        self.fpn = FeaturePyramidNetwork([2 * width, 4 * width, 8 * width], 64)
        self.head = nn.Linear(64, shapes + colours)

    def forward(self, images, boxes, valid):
        """Normalised images (B, 3, H, W), boxes (B, M, 4), valid (B, M) -> logits (N, S) of shape and
        (N, C) of colour at the N positive anchors, and index of the box (B M) that each has to name."""
        net, maps = self.body, {}
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))
        for level in (2, 3, 4):
            x = maps[f"{level}"] = getattr(net, f"layer{level}")(x)
        maps = list(self.fpn(maps).values())
        sizes = [tuple(m.shape[-2:]) for m in maps]
        counts = [h * w for h, w in sizes]
        inside = images.new_ones((len(images), sum(counts)), dtype=torch.bool)
        owner = assign_atss(grid_anchors(sizes, STRIDES, [8.0]), counts, boxes, valid, inside)
        image, anchor = (owner >= 0).nonzero(as_tuple=True)
        features = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)[image, anchor]
        shape, colour = self.head(features).split(self.split, 1)
        return shape, colour, image * boxes.shape[1] + owner[image, anchor]


def draw_scenes(seed, count):
    """`count` pictures of draw_scene: (images (B, 3, H, W) uint8, boxes (B, M, 4), shapes (B, M) and colours
    (B, M), -1 where there is no object, or no word for its colour)."""
    from .shapes import BASE, draw_scene
    pictures, rows = [], []
    for index in range(count):
        pixels, objects = draw_scene(seed, index)
        pictures.append(pixels)
        rows.append([(*o["box"], BASE.index(o["name"]), COLOURS.index(o["colour"]) if o["colour"] else -1)
                     for o in objects])
    table = torch.full((count, max(map(len, rows)), 6), -1.0)
    for b, row in enumerate(rows):
        table[b, :len(row)] = torch.tensor(row)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return images, table[..., :4], table[..., 4].long(), table[..., 5].long()


def shapes_backbone(name, seed=0, steps=1500, batch=16, lr=3e-3):
    """Path of the weights of the tiny backbone `name` for `shapes` of this seed: trained by the first call,
    cached beside the tiny CLIP, accuracy printed. Where several processes need it, one trains.

    The stand-in for ImageNet: a classifier, by shape and colour, of base objects where they stand in pictures
    that are drawn from another seed. It sees no novel object and no name of one, but learns the colours
    that novel names are made of. (Pictures of single objects
    teach shapes faster, but what they teach says of any place what is somewhere in the picture, and then GKD
    of hierkd.py names no better than chance.)
    """
    if tiny_width(name) is None:
        raise UserError(f"--init shapes: has weights of tiny8 ... tiny64, not of {name}; use --init "
                        "imagenet or --init none")
    from .shapes import VERSION
    recipe = [1, VERSION, name, seed, steps, batch, lr]  # the first is the version of this function
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    return cached(cache_folder() / f"backbone-{name}-{key}.pt",
                  lambda path: train_backbone(path, name, seed, steps, batch, lr))


def train_backbone(path, name, seed, steps, batch, lr):
    """Train it, print its accuracy on other pictures, write its weights and its FPN's to `path`."""
    from .shapes import BASE
    images, boxes, shape, colour = draw_scenes(seed + BACKBONE_SEED, 1500)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    rng, whole = torch.Generator().manual_seed(seed), images.shape[-1]

    def likely(low, high):
        return int(torch.randint(low, high + 1, (), generator=rng))

    with torch.random.fork_rng(devices=[]):  # leaves the caller's random stream as it was
        torch.manual_seed(seed)
        model = Classifier(name, len(BASE), len(COLOURS))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc=f"backbone {name}", mininterval=1):
        pick = torch.randint(len(images), (batch,), generator=rng)
        x, b = (images[pick] - mean) / std, boxes[pick]
        if likely(0, 1):  # mirrored
            x, b = x.flip(3), torch.stack([whole - b[..., 2], b[..., 1], whole - b[..., 0], b[..., 3]], -1)
        if likely(0, 1):  # upside down
            x, b = x.flip(2), torch.stack([b[..., 0], whole - b[..., 3], b[..., 2], whole - b[..., 1]], -1)
        if likely(0, 1):  # about the diagonal
            x, b = x.transpose(2, 3), b[..., [1, 0, 3, 2]]
        side = 32 * likely(3, 5)
        x = F.interpolate(x, size=side, mode="bilinear", antialias=True).contiguous(
            memory_format=torch.channels_last)
        of_shape, of_colour, owner = model(x, b * (side / whole), shape[pick] >= 0)
        loss = F.cross_entropy(of_shape, shape[pick].flatten()[owner])
        loss = loss + F.cross_entropy(of_colour, colour[pick].flatten()[owner], ignore_index=-1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()

    images, boxes, shape, colour = draw_scenes(seed + 2 * BACKBONE_SEED, 100)
    with torch.no_grad():
        of_shape, of_colour, owner = model((images - mean) / std, boxes, shape >= 0)
    shape, colour = shape.flatten()[owner], colour.flatten()[owner]
    accuracy = dict(shape=100 * (of_shape.argmax(1) == shape).float().mean().item(),
                    colour=100 * (of_colour.argmax(1) == colour)[colour >= 0].float().mean().item())
    print(f"backbone {name} -> {path}: at {len(shape)} anchors of other pictures it names "
          f"{accuracy['shape']:.1f} % of the {len(BASE)} shapes and {accuracy['colour']:.1f} % of the "
          f"{len(COLOURS)} colours", flush=True)
    state, fpn = ({k: v.contiguous() for k, v in m.state_dict().items()} for m in (model.body, model.fpn))
    save_checkpoint(dict(name=name, accuracy=accuracy, model=state, fpn=fpn), path)


# ------------------------------------------------------------------ what is kept, and what is shipped

SHIPPED = Path(__file__).parent / "shipped"  # made by `python tests/ship.py`, which says how well each does


def cache_folder():
    """Where the stand-ins are kept, beside the drawn images."""
    return Path(os.environ.get("DETECTION_CACHE") or "data") / "clip"


def cached(path, make):
    """str(path); where it is missing it comes from SHIPPED, or else by make(path), with --retrain always so.
    Where several processes need it, one makes it and the others wait."""
    if there(path):
        return str(path)
    guard = path.with_name(f".{path.name}.making")
    try:
        guard.mkdir(parents=True, exist_ok=True)
        lock(guard, wait=True)
    except OSError as e:
        raise UserError(f"{path.parent}: cannot be made or written to ({e.strerror}), and {path.name} is "
                        "kept there") from None
    try:
        if not there(path):
            content = shipped(path.stem)
            if content:
                save_checkpoint(content, path)
            else:
                make(path)
    finally:
        unlock(guard)
    return str(path)


def trained_before(name, seed, rank, train, **numbers):
    """Path of best.pt of a detector that a quick start only prepares with: as it is shipped, or trained by
    train(folder) the first time, then cached beside the drawn images. name: script and recipe, a new one
    where the recipe changes; seed, numbers: of the images, see make_shapes."""
    from .shapes import make_shapes
    images = make_shapes(seed=seed, **numbers)
    done = images.parent / "teachers" / f"{name}-{images.name}"
    draft = done.with_name(f".{done.name}")  # renamed when finished, so that a killed run is no detector
    with made_once(done, rank) as missing:
        ready = shipped(done.name) if missing else None
        if missing and rank == 0 and (ready or os.environ.get("DETECTION_RETRAIN")):
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
        if ready and rank == 0:
            draft.mkdir(parents=True)
            save_checkpoint(ready, draft / "best.pt")
        elif missing and not ready:
            if rank == 0:
                print(f"== {name}: trained once, cached at {done}", flush=True)
            train(str(draft))
        if missing and rank == 0:
            draft.rename(done)
    return str(done / "best.pt")


def shipped(name):
    """Content of SHIPPED/name.xz, tensors as they were before pack, but for rounding; None where there is no
    such file, or where --retrain was given."""
    path = SHIPPED / f"{name}.xz"
    if os.environ.get("DETECTION_RETRAIN") or not path.exists():
        return None
    head, _, data = lzma.decompress(path.read_bytes()).partition(b"\n")
    content, layout = json.loads(head)
    arrays, at = {}, 0
    for key, (kind, shape) in layout.items():
        count = math.prod(shape)
        arrays[key] = torch.from_numpy(np.frombuffer(data, kind, count, at).reshape(shape).copy())
        at += count * arrays[key].element_size()
    for key, value in arrays.items():
        part, _, tensor = key.partition("/")
        if ":" in tensor:
            continue
        if f"{key}:scale" in arrays:
            value = value * arrays[f"{key}:scale"].float()
        value = value.float() if value.is_floating_point() else value
        if f"{key}:rows" in arrays:
            rows, total = arrays[f"{key}:rows"], int(arrays[f"{key}:total"])
            table = torch.randn(total, value.shape[1], generator=torch.Generator().manual_seed(0)) * 0.01
            value = table.index_copy(0, rows, value)
        if f"{key}:left" in arrays:
            value = arrays[f"{key}:left"].float() @ value
        content.setdefault(part, {})[tensor] = value
    return content


def pack(content, path, rows={}, levels=31, ranks={}):
    """Write a checkpoint for SHIPPED: matrices rounded to `levels` multiples of a scale for each row, vectors
    to 16 bits. 31: an eighth of the size, an error of at most 3.3 % of the largest weight of a row. content:
    plain values, and dicts of tensors. rows: {name of a table: rows that are kept}; any other row is noise
    and comes back as noise. ranks: {name of a matrix: rank at which two narrow ones stand for it}. The file:
    a line of JSON (plain values, layout), then all arrays, compressed."""
    parts = {k: v for k, v in content.items()
             if isinstance(v, dict) and all(map(torch.is_tensor, v.values()))}
    arrays = {}
    for part, tensors in parts.items():
        for name, value in tensors.items():
            if name in rows:
                arrays[f"{part}/{name}:rows"] = rows[name].numpy()
                arrays[f"{part}/{name}:total"] = np.array(len(value))
                value = value[rows[name]]
            if name in ranks:
                u, s, v = torch.linalg.svd(value, full_matrices=False)
                arrays[f"{part}/{name}:left"] = (u * s)[:, :ranks[name]].half().numpy()
                value = v[:ranks[name]]
            if value.is_floating_point() and value.ndim > 1:
                flat, most = value.float().flatten(1), levels // 2
                scale = (flat.abs().amax(1, keepdim=True) / most).clamp(min=1e-6).half()
                arrays[f"{part}/{name}:scale"] = scale.view(-1, *[1] * (value.ndim - 1)).numpy()
                value = (flat / scale).round().clamp(-most, most).to(torch.int8).view(value.shape)
            elif value.is_floating_point():
                value = value.half()
            arrays[f"{part}/{name}"] = value.numpy()
    arrays = dict(sorted(arrays.items(), key=lambda item: item[1].dtype.str))  # like beside like
    layout = {k: (v.dtype.str, v.shape) for k, v in arrays.items()}
    head = json.dumps([{k: v for k, v in content.items() if k not in parts}, layout]).encode()
    data = b"".join([head, b"\n", *(v.tobytes() for v in arrays.values())])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


# ------------------------------------------------------------------ the tiny CLIP's networks

# TinyTower for 48 x 48 crops and a two-layer text transformer, with CLIP's own vocabulary.
TINY = dict(embed_dim=64, image_size=48, width=16,
            text_cfg=dict(context_length=32, vocab_size=49408, width=64, heads=4, layers=2))


class Residual(nn.Sequential):
    def forward(self, x):
        return F.relu(x + super().forward(x))


class TinyTower(nn.Sequential):
    """(N, 3, size, size) -> (N, D). Pooled by maxima down to size / 16 cells, which one linear
    layer reads.

    In equal time it learns shapes better than open_clip's ResNet, whose attention pooling is slow
    to start (80 % against 60 %).
    """

    def __init__(self, dim, size, width):
        def conv(i, o):
            return nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o)

        def residual(c):
            return Residual(*conv(c, c), nn.ReLU(), *conv(c, c))

        w, pool = width, nn.MaxPool2d(2)
        super().__init__(*conv(3, w), nn.ReLU(), pool,
                         *conv(w, 2 * w), nn.ReLU(), pool, residual(2 * w),
                         *conv(2 * w, 4 * w), nn.ReLU(), pool, residual(4 * w),
                         *conv(4 * w, 4 * w), nn.ReLU(), pool,
                         nn.Flatten(), nn.Linear(4 * w * (size // 16) ** 2, dim))
        self.image_size = size


def tiny_model(embed_dim, image_size, width, text_cfg):
    """open_clip's CLIP with TinyTower in the place of its image tower."""
    import open_clip  # needed here only: NarrowResNet must do without
    vision = dict(layers=1, width=64, patch_size=image_size, image_size=image_size)
    model = open_clip.CLIP(embed_dim, vision, text_cfg)
    model.visual = TinyTower(embed_dim, image_size, width)
    return model


# ------------------------------------------------------------------ what it learns from

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")


def coloured(name):
    """Whether a class is named with its colour, as the novel ones of shapes are: "red star"."""
    return name.split()[0] in COLOURS


def read_objects(root, split):
    """The objects and captions of shapes at `root`, as one dict.

    images: (B, 3, H, W) uint8, padded; sizes: (B, 2) width, height; captions: B lists; content: B
    frozensets of class names. boxes: (N, 4) xyxy pixels; owner: (N,) image of each; names: N class
    names; words: N pairs (noun, colour or None). The colour of a "circle" stands in its image's
    captions; it is None where two circles share an image.
    """
    files = []
    for kind in ("instances", "captions"):
        text = (Path(root) / f"annotations/{kind}_{split}.json").read_text(encoding="utf-8")
        files.append(json.loads(text))
    instances, sentences = files
    index = {image["id"]: b for b, image in enumerate(instances["images"])}
    names = {c["id"]: c["name"] for c in instances["categories"]}
    height = max(image["height"] for image in instances["images"])
    width = max(image["width"] for image in instances["images"])
    images = torch.zeros(len(index), 3, height, width, dtype=torch.uint8)
    for b, image in enumerate(instances["images"]):
        file = Image.open(Path(root) / split / image["file_name"]).convert("RGB")
        pixels = torch.from_numpy(np.array(file)).permute(2, 0, 1)
        images[b, :, :image["height"], :image["width"]] = pixels
    sizes = torch.tensor([[image["width"], image["height"]] for image in instances["images"]])
    objects = [a for a in instances["annotations"] if not a["iscrowd"]]
    boxes = []
    for x, y, w, h in (a["bbox"] for a in objects):
        boxes.append([x, y, x + w, y + h])
    captions = [[] for _ in index]
    for c in sentences["annotations"]:
        captions[index[c["image_id"]]].append(c["caption"])
    content = [set() for _ in index]
    for a in instances["annotations"]:
        content[index[a["image_id"]]].add(names[a["category_id"]])
    owner = [index[a["image_id"]] for a in objects]
    named = [names[a["category_id"]] for a in objects]
    counts = Counter(zip(owner, named))
    words = []
    for b, name in zip(owner, named):
        first, _, noun = name.partition(" ")
        if first not in COLOURS:
            noun = name
            text = " ".join(captions[b]).lower()
            said = re.findall(rf"({'|'.join(COLOURS)}) {name}\b", text)
            first = said[0] if said and counts[b, name] == 1 else None
        words.append((noun, first))
    return dict(images=images, sizes=sizes, boxes=torch.tensor(boxes), owner=torch.tensor(owner),
                names=named, words=words, captions=captions,
                content=[frozenset(c) for c in content])


def contrastive(image, text, same, scale):
    """CLIP's symmetric loss, a scalar. Pairs that are true share the target.

    image, text: (N, D) unit rows; same: (N, N) 0 or 1, [i, j]: text j is true of image i; scale:
    of the cosines.
    """
    logits = scale * image @ text.T
    text_of, image_of = same / same.sum(1, keepdim=True), same.T / same.sum(0)[:, None]
    by_image = (text_of * logits.log_softmax(1)).sum(1)
    by_text = (image_of * logits.T.log_softmax(1)).sum(1)
    return -(by_image + by_text).mean() / 2


def draw_batch(data, pixels_of, rare_more, objects, scenes, rng):
    """A batch of N = objects + scenes pairs: crops (N, 3, size, size), N texts, same (N, N) float.

    Objects are called by noun and colour (base ones too, or their images would not tell colours
    apart; dropped in 40 %), whole images by a caption. pixels_of: function of boxes and owners.
    """
    r = lambda *shape: torch.rand(*shape, generator=rng)
    pick = torch.multinomial(rare_more, objects, generator=rng)
    scene = torch.randint(len(data["images"]), (scenes,), generator=rng)
    boxes = data["boxes"][pick]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    # as a detector's boxes are: a little off, and with some of their surroundings
    boxes = boxes + (r(objects, 4) - 0.5) * 0.1 * sides
    boxes = boxes + r(objects, 1) * 0.15 * sides * torch.tensor([-1.0, -1, 1, 1])
    whole = torch.cat([torch.zeros(scenes, 2), data["sizes"][scene] - 1.0], 1)
    pixels = pixels_of(torch.cat([boxes, whole]), torch.cat([data["owner"][pick], scene]))
    mirror = lambda x: x.flip(3)
    upside_down = lambda x: x.flip(2)
    diagonal = lambda x: x.transpose(2, 3)
    for turn in (mirror, upside_down, diagonal):  # names say nothing of left or up
        chosen = r(objects) < 0.5
        pixels[:objects][chosen] = turn(pixels[:objects][chosen])

    words = [data["words"][i] for i in pick.tolist()]
    said = []
    for (noun, colour), drop in zip(words, r(objects).tolist()):
        said.append((noun, None if drop < 0.4 else colour))
    texts = []
    for noun, colour in said:
        texts.append(f"a photo of a {colour} {noun}." if colour else f"a photo of a {noun}.")
    for i, u in zip(scene.tolist(), r(scenes).tolist()):
        captions = data["captions"][i]
        texts.append(captions[int(u * len(captions))])

    what = [noun for noun, _ in words] + [data["content"][i] for i in scene.tolist()]
    ids = {k: i for i, k in enumerate(dict.fromkeys(what))}
    noun = torch.tensor([ids[k] for k in what])
    colour, told = (torch.tensor([COLOURS.index(c) if c else -1 for _, c in pairs] + [-1] * scenes)
                    for pairs in (words, said))
    same = (noun[:, None] == noun) & ((told == -1) | (colour[:, None] == told))
    same = same | torch.eye(len(texts), dtype=torch.bool)
    return pixels, texts, same.float()


# ------------------------------------------------------------------ training it

def tiny_clip(root, folder, seed=0, steps=1400, objects=112, scenes=24, device="cpu", draw=None):
    """Path of the tiny CLIP of the shapes dataset at `root`: trained by the first call, cached in
    `folder`, accuracy printed. Where two runs need it at once, one trains and the other waits.

    The stand-in for web-scale pre-training: it sees objects and captions of ALL classes, the novel
    ones too. A batch holds `objects` objects and `scenes` whole images. draw: function that makes `root`,
    called where it is needed. To be called by one process
    of a machine; the others of a run wait at a barrier.
    """
    version = 2  # of this function
    recipe = json.dumps([version, TINY, Path(root).name, seed, steps, objects, scenes])
    key = hashlib.sha256(recipe.encode()).hexdigest()[:12]

    def make(path):
        if draw:
            draw()
        train_tiny(root, path, key, seed, steps, objects, scenes, device)

    return cached(Path(folder) / f"tiny-clip-{key}.pt", make)


def train_tiny(root, path, key, seed, steps, objects, scenes, device):
    """Train the tiny CLIP, print its zero-shot accuracy on val2017, write it to `path`."""
    import open_clip
    from .clip import FrozenCLIP, crop_and_resize, save
    data, val = read_objects(root, "train2017"), read_objects(root, "val2017")
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random stream as it was
        torch.manual_seed(seed)
        model = tiny_model(**TINY)
    frozen = FrozenCLIP(model, open_clip.tokenize, "tiny", device)
    model.train().requires_grad_(True)
    model.visual.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    images = frozen.normalise(data["images"])
    number = Counter(data["names"])
    rare_more = torch.tensor([number[n] ** -0.5 for n in data["names"]])

    def pixels_of(boxes, owner):
        return crop_and_resize(images, boxes.to(device), owner.to(device), frozen.size)

    for _ in tqdm(range(steps), desc="tiny CLIP", mininterval=1):
        pixels, texts, same = draw_batch(data, pixels_of, rare_more, objects, scenes, rng)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        image = model.encode_image(pixels, normalize=True)
        once = {t: i for i, t in enumerate(dict.fromkeys(texts))}  # each sentence is encoded once
        tokens = frozen.tokenizer(list(once), context_length=model.context_length).to(device)
        row = torch.tensor([once[t] for t in texts], device=device)
        text = model.encode_text(tokens, normalize=True)[row]
        loss = contrastive(image, text, same.to(device), model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=4.6052)  # the scale is 100 at most

    frozen = FrozenCLIP(model, frozen.tokenizer, "tiny", device)
    accuracy = zero_shot(frozen, val)
    objects, names = len(val["names"]), len(set(val["names"]))
    print(f"tiny CLIP -> {path}: zero-shot accuracy on {objects} objects of val2017 among {names} "
          f"names {accuracy['all']:.1f} %, on the novel {accuracy['novel']:.1f} %; "
          f"loss {loss.item():.2f}", flush=True)
    save(dict(config=TINY, id=key, accuracy=accuracy, model=model.state_dict()), path)


def zero_shot(clip, val):
    """dict of "all" and "novel": percent of the objects of read_objects that are called rightly."""
    names = sorted(set(val["names"]))
    boxes, owner = val["boxes"].to(clip.device), val["owner"].to(clip.device)
    found = clip.encode_crops(clip.normalise(val["images"]), boxes, owner)
    found = (found @ clip.class_embeddings(names).T).argmax(1).tolist()
    right = torch.tensor([names[k] == n for k, n in zip(found, val["names"])])
    novel = torch.tensor([coloured(n) for n in val["names"]])
    return dict(all=100 * right.float().mean().item(),
                novel=100 * right[novel].float().mean().item())


CLIP_SEED = 10_000  # added to the seed of the images that a detector sees


def shapes_clip(seed=0, device="cpu"):
    """Path of the tiny CLIP for `shapes` of this seed. It learns from images of another seed of the same
    world, none of which a detector sees. To be called by one process of a machine, as tiny_clip."""
    from .shapes import folder_of, make_shapes
    seen = seed + CLIP_SEED
    root = folder_of(seed=seen)
    return tiny_clip(root, root.parent / "clip", seed, device=device, draw=lambda: make_shapes(seed=seen))
