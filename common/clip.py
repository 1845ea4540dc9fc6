"""A frozen CLIP as teacher: text embeddings, batched crop encoding, and the tiny CLIP of `shapes`. Needs no other file of `common`.

    clip = load_clip("ViT-B-32-quickgelu/openai", device)              # open_clip downloads it once
    text = clip.class_embeddings(["cat", "red panda"])                 # (K, D) unit rows
    v = clip.encode_crops(clip.normalise(images), boxes, owner)        # (N, D) unit rows; boxes (N, 4), owner (N,) image of each

Resizing a crop along an axis makes every new row a weighted sum of a few of its rows. Enlarging, shrinking with or without
antialiasing, repeating the border and padding with zeros differ in which rows and weights (`taps`) only, and weighted bags of
rows are what embedding_bag sums. So all crops of a batch are resized together, on the device, and no pixel outside a crop is mixed in.
"""
import hashlib
import json
import math
import os
import re
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

TEMPLATES = ("a photo of a {}.",)
# The tiny CLIP: TinyTower for 48 x 48 crops and a two-layer text transformer, with CLIP's own vocabulary: 3.5 M parameters.
TINY = dict(embed_dim=64, image_size=48, width=16, text_cfg=dict(context_length=32, vocab_size=49408, width=64, heads=4, layers=2))


class ClipError(Exception):
    """CLIP cannot be had or used: one line with the remedy. Scripts print it and stop."""


# ------------------------------------------------------------------ crops

def crop_windows(boxes, height, width, enlarge=1.0):
    """Boxes (N, 4) xyxy pixels -> whole-pixel windows (N, 4) x1, y1, x2, y2 (end exclusive), at least one pixel of the image.

    Corners are cut to whole numbers and the last pixel belongs to the crop. enlarge scales both half sides about the whole-number
    centre. These are the released HierKD code's roundings.
    """
    x1, y1, x2, y2 = boxes.detach().nan_to_num().clamp(min=0, max=1e6).long().unbind(1)
    if enlarge != 1:
        cx, cy = (x1 + x2) // 2, (y1 + y2) // 2
        x1, x2 = (cx - (cx - x1) * enlarge).clamp(min=0).long(), (cx + (x2 - cx) * enlarge).long()
        y1, y2 = (cy - (cy - y1) * enlarge).clamp(min=0).long(), (cy + (y2 - cy) * enlarge).long()
    x1, y1 = x1.clamp(max=width - 1), y1.clamp(max=height - 1)
    return torch.stack([x1, y1, torch.maximum(x2 + 1, x1 + 1).clamp(max=width), torch.maximum(y2 + 1, y1 + 1).clamp(max=height)], 1)


def letterbox(windows, size):
    """Where a crop lands in the size x size square: (out (N, 2) its width and height, pad (N, 2) pixels left of and above it).

    The long side becomes `size`; the odd pixel of padding goes left / top. In double, and cut, not rounded, as in the released code:
    55 pixels become 223, since 55 * (224 / 55) < 224.
    """
    sides = (windows[:, 2:] - windows[:, :2]).double()
    scale = (torch.full_like(sides, size) / sides).amin(1, keepdim=True)  # not size / sides, which torch takes as size * (1 / sides)
    out = (sides * scale).long().clamp(min=1)
    return out, (size - out + 1) // 2


def taps(length, out, pad, size, most, antialias=True):
    """The pixels of a crop that one output pixel mixes, along one axis: (index (N, size, T), weight (N, size, T)).

    length, out, pad: (N,) crop's pixels, output pixels, padding before them; most: the largest length, which decides T. Cubic
    convolution. antialias: PIL's rule, a = -0.5, the kernel as wide as the shrinking, weights normalised inside the crop. Otherwise
    PyTorch's and OpenCV's: a = -0.75, four taps, those beyond the border repeat the last pixel. Weights of the padding are zero.
    """
    length, out, pad = length[:, None], out[:, None], pad[:, None]
    o = torch.arange(size, device=length.device) - pad                               # (N, size) output pixel within the crop
    center = (o + 0.5) * length / out                                                # in pixels of the crop
    shrink = (length / out).clamp(min=1) if antialias else torch.ones_like(length, dtype=torch.float32)
    reach = 2 * max(1.0, 1.02 * most / size) if antialias else 2.0                   # 1.02: `out` may be cut short of `size`
    steps = torch.arange(-math.ceil(reach) + 1, math.ceil(reach) + 1, device=length.device)
    index = (center - 0.5).floor().long()[..., None] + steps
    x = ((index + 0.5 - center[..., None]) / shrink[..., None]).abs()
    a = -0.5 if antialias else -0.75
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
    weight = torch.where(x <= 1, near, torch.where(x < 2, far, 0))
    used = ((o >= 0) & (o < out))[..., None]
    if antialias:
        weight = weight * ((index >= 0) & (index < length[..., None]))
        weight = weight / torch.where(used, weight.sum(-1, keepdim=True), 1)
    return torch.minimum(index.clamp(min=0), length[..., None] - 1), weight * used


def mix_rows(rows, index, weight):
    """Weighted sums of rows (R, W): index, weight (..., T) -> (..., W). One kernel: embedding_bag."""
    mixed = F.embedding_bag(index.flatten(0, -2), rows, mode="sum", per_sample_weights=weight.flatten(0, -2))
    return mixed.view(*index.shape[:-1], rows.shape[1])


@torch.no_grad()
def crop_and_resize(images, boxes, owner, size, enlarge=1.0, antialias=True):
    """Crops of a batch, long side resized to `size`, zero-padded to a square: (N, 3, size, size) fp32, no gradient.

    images: (B, 3, H, W) float, normalised (so that padding is the mean colour). boxes: (N, 4) xyxy pixels; owner: (N,) index into
    images. Crops are grouped by their longer side, in steps of sqrt 2, and a group is cut where it would outgrow the cache of a CPU or
    1 GB of a GPU. What costs is moving memory: rows are read as slices, both transposes are those of one matrix.
    """
    images = images.float().contiguous()
    height, width = images.shape[2:]
    windows = crop_windows(boxes, height, width, enlarge)
    (out, pad), sides = letterbox(windows, size), windows[:, 2:] - windows[:, :2]
    crops = images.new_empty(len(boxes), 3, size, size)
    channel = torch.arange(3, device=images.device)[:, None]
    group = (2 * sides.amax(1).clamp(min=32).double().log2()).ceil().long()
    jobs = []
    for half_octaves in group.unique().tolist():
        spans = [min(math.ceil(2 ** (half_octaves / 2)), side) for side in (width, height)]
        most = max(1, 2 ** (28 if images.is_cuda else 20) // (3 * max(size, spans[0]) * spans[1]))
        jobs += [(at, *spans) for at in (group == half_octaves).nonzero()[:, 0].split(most)]
    for at, span_x, span_y in jobs:
        n = len(at)
        x, y = windows[at, 0].clamp(max=width - span_x), windows[at, 1].clamp(max=height - span_y)
        (index_x, weight_x), (index_y, weight_y) = (taps(sides[at, k], out[at, k], pad[at, k], size, span, antialias)
                                                    for k, span in enumerate((span_x, span_y)))
        # every run of span_x pixels is a row of this view: (n, 3, span_y) of them are read
        runs = images.as_strided((images.numel() - span_x + 1, span_x), (1, 1))
        crop, plane = torch.arange(n, device=x.device).view(n, 1, 1), owner[at, None, None] * 3 + channel    # (n, 3, 1)
        start = (plane * height + y[:, None, None] + torch.arange(span_y, device=x.device)) * width + x[:, None, None]
        patch = runs.index_select(0, start.flatten())                                        # (n * 3 * span_y, span_x)
        columns = patch.t().contiguous().view(span_x * n, -1)                                # rows of 3 * span_y: [x, crop]
        index_x = (index_x + (windows[at, 0] - x).view(-1, 1, 1)) * n + crop
        columns = mix_rows(columns, index_x.transpose(0, 1), weight_x.transpose(0, 1))       # (size, n, 3 * span_y)
        rows = columns.flatten(1).t().contiguous()                                           # rows of size: [crop, channel, y]
        index_y = (index_y + (windows[at, 1] - y).view(-1, 1, 1))[:, None] + (crop[..., None] * 3 + channel[:, None]) * span_y
        crops.index_copy_(0, at, mix_rows(rows, index_y, weight_y[:, None].expand(-1, 3, -1, -1)))
    return crops


# ------------------------------------------------------------------ the frozen model

class FrozenCLIP:
    """open_clip's model, its tokenizer and normalisation. Not an nn.Module, so that no checkpoint, optimizer, DDP or train() sees it."""

    def __init__(self, model, tokenizer, name, device="cpu"):
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.name, self.device = tokenizer, name, torch.device(device)
        size = model.visual.image_size
        self.size = size[0] if isinstance(size, (tuple, list)) else size
        own = open_clip.get_model_preprocess_cfg(model)  # empty for the tiny CLIP
        mean_std = own.get("mean", open_clip.OPENAI_DATASET_MEAN), own.get("std", open_clip.OPENAI_DATASET_STD)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in mean_std)
        self.grey_levels = [[255 * x for x in v] for v in mean_std]  # plain numbers: reading them back from a GPU would wait for it

    @cached_property
    def dim(self):
        return self.encode_text(["a"]).shape[1]

    def normalise(self, images):
        """uint8 RGB -> float with CLIP's mean and deviation."""
        return (images.to(self.device) / 255 - self.mean) / self.std

    @torch.no_grad()
    def encode_text(self, sentences, chunk=256):
        """Sentences, cut at the model's context length -> (N, D) unit rows, fp32."""
        tokens = self.tokenizer(list(sentences), context_length=self.model.context_length).to(self.device)
        parts = [F.normalize(self.model.encode_text(part).float(), dim=1) for part in tokens.split(chunk)]
        return torch.cat(parts) if parts else torch.zeros(0, self.dim, device=self.device)

    def class_embeddings(self, names, templates=TEMPLATES, cache=None, raw=False):
        """(K, D) unit rows: the mean over templates of each name's sentences. cache: a folder, keyed by model, templates and names. raw: keep underscores."""
        clean = [" ".join(str(n).replace("_", "_" if raw else " ").split()) for n in names]
        if not clean or not all(clean):
            raise ClipError(f"class list {list(names)}: holds an empty name" if clean else "class list: is empty")
        twice = sorted({n for n in clean if clean.count(n) > 1})
        if twice:
            raise ClipError(f"class list: {', '.join(twice)} occurs twice")
        path = Path(cache) / f"text-{self.text_key(clean, templates)}.pt" if cache else None
        if path and path.exists():
            return torch.load(path, map_location=self.device, weights_only=True)
        sentences = self.encode_text([t.format(n) for n in clean for t in templates])
        text = F.normalize(sentences.unflatten(0, (len(clean), len(templates))).mean(1), dim=1)
        if path:
            save(text.cpu(), path)
        return text

    def text_key(self, *what):
        """Changes with the text tower's weights, which a name alone does not tell, and with `what`."""
        digest = hashlib.sha256(json.dumps([self.name, what]).encode())
        for key, value in sorted(self.model.state_dict().items()):
            if not key.startswith("visual."):
                digest.update(key.encode() + value.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:24]

    @torch.no_grad()
    def encode_images(self, pixels, chunk=256):
        """(N, 3, size, size) normalised -> (N, D) unit rows, fp32. In chunks, so that memory does not grow with N."""
        if not len(pixels):  # a transformer refuses an empty batch
            return torch.zeros(0, self.dim, device=self.device)
        return torch.cat([F.normalize(self.model.encode_image(part).float(), dim=1) for part in pixels.split(chunk)])

    def encode_crops(self, images, boxes, owner, enlarge=1.0, antialias=True, chunk=256):
        """Regions of normalised images (B, 3, H, W) -> (N, D) unit rows. See crop_and_resize."""
        return self.encode_images(crop_and_resize(images, boxes, owner, self.size, enlarge, antialias), chunk)


def save(value, path):
    """Written to a temporary name, then renamed: two processes may do this at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(value, draft)
    os.replace(draft, path)


def load_clip(spec="ViT-B-32-quickgelu/openai", device="cpu"):
    """FrozenCLIP from "model/weights" of open_clip (weights: a tag, downloaded once, or a file) or from a tiny CLIP's file.

    OpenAI's weights need a "-quickgelu" model: with plain GELU they load without complaint and give worse features.
    """
    if Path(spec).is_file():
        try:
            state = torch.load(spec, map_location="cpu", weights_only=True)
            model = tiny_model(**state["config"])
            model.load_state_dict(state["model"])
        except Exception as e:  # whatever is wrong with it, it is not ours
            raise ClipError(f"{spec}: not a tiny CLIP of this project ({type(e).__name__}); give MODEL/FILE for other weights") from None
        return FrozenCLIP(model, open_clip.SimpleTokenizer(), f"tiny-{state['id']}", device)
    model_name, _, weights = spec.partition("/")
    if model_name not in open_clip.list_models() or not weights:
        raise ClipError(f"--clip {spec}: expected MODEL/WEIGHTS of open_clip, as ViT-B-32-quickgelu/openai")
    if weights == "openai" and "quickgelu" not in model_name:
        raise ClipError(f"--clip {spec}: OpenAI's weights were trained with QuickGELU; use {model_name}-quickgelu/openai")
    try:
        model = open_clip.create_model(model_name, pretrained=weights)
    except Exception as e:  # each of its download routes fails with another exception
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:120]
        raise ClipError(f"--clip {spec}: cannot be loaded ({reason}). Offline? Fetch the weights elsewhere and give "
                        f"{model_name}/PATH") from None
    return FrozenCLIP(model, open_clip.get_tokenizer(model_name), spec, device)


# ------------------------------------------------------------------ the tiny CLIP of shapes

class Residual(nn.Sequential):
    def forward(self, x):
        return F.relu(x + super().forward(x))


class TinyTower(nn.Sequential):
    """(N, 3, size, size) -> (N, D). Pooled by maxima down to size / 16 cells, which one linear layer reads.

    In equal time it learns shapes better than open_clip's ResNet, whose attention pooling is slow to start (80 % against 60 %).
    """

    def __init__(self, dim, size, width):
        conv = lambda i, o: (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o))
        residual = lambda c: Residual(*conv(c, c), nn.ReLU(), *conv(c, c))
        w, pool = width, nn.MaxPool2d(2)
        super().__init__(*conv(3, w), nn.ReLU(), pool, *conv(w, 2 * w), nn.ReLU(), pool, residual(2 * w), *conv(2 * w, 4 * w), nn.ReLU(), pool,
                         residual(4 * w), *conv(4 * w, 4 * w), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4 * w * (size // 16) ** 2, dim))
        self.image_size = size


def tiny_model(embed_dim, image_size, width, text_cfg):
    """open_clip's CLIP with TinyTower in the place of its image tower."""
    model = open_clip.CLIP(embed_dim, dict(layers=1, width=64, patch_size=image_size, image_size=image_size), text_cfg)
    model.visual = TinyTower(embed_dim, image_size, width)
    return model


COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")


def read_objects(root, split):
    """dict of images (B, 3, H, W) uint8 padded, their sizes, captions and content {names}; boxes (N, 4), owner (N,), names and words of objects.

    words: (noun, colour or None). The colour of a "circle" stands in its image's captions; it is None where two circles share an image.
    """
    files = [json.loads((Path(root) / f"annotations/{kind}_{split}.json").read_text()) for kind in ("instances", "captions")]
    index = {image["id"]: b for b, image in enumerate(files[0]["images"])}
    names = {c["id"]: c["name"] for c in files[0]["categories"]}
    height, width = (max(image[k] for image in files[0]["images"]) for k in ("height", "width"))
    images = torch.zeros(len(index), 3, height, width, dtype=torch.uint8)
    for b, image in enumerate(files[0]["images"]):
        pixels = torch.from_numpy(np.array(Image.open(Path(root) / split / image["file_name"]).convert("RGB")))
        images[b, :, :image["height"], :image["width"]] = pixels.permute(2, 0, 1)
    sizes = torch.tensor([[image["width"], image["height"]] for image in files[0]["images"]])
    objects = [a for a in files[0]["annotations"] if not a["iscrowd"]]
    boxes = torch.tensor([[a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in objects])
    captions, content = [[] for _ in index], [set() for _ in index]
    for c in files[1]["annotations"]:
        captions[index[c["image_id"]]].append(c["caption"])
    for a in files[0]["annotations"]:
        content[index[a["image_id"]]].add(names[a["category_id"]])
    owner, told = [index[a["image_id"]] for a in objects], [names[a["category_id"]] for a in objects]
    counts, words = Counter(zip(owner, told)), []
    for b, name in zip(owner, told):
        first, _, noun = name.partition(" ")
        if first not in COLOURS:
            said = re.findall(rf"({'|'.join(COLOURS)}) {name}\b", " ".join(captions[b]).lower()) if counts[b, name] == 1 else []
            first, noun = said[0] if said else None, name
        words.append((noun, first))
    return dict(images=images, sizes=sizes, boxes=boxes, owner=torch.tensor(owner), names=told, words=words, captions=captions,
                content=[frozenset(c) for c in content])


def contrastive(image, text, same, scale):
    """CLIP's symmetric loss; same (N, N) bool: the text is true of the image. Pairs that are true share the target."""
    logits, image_of = scale * image @ text.T, same.T / same.sum(0)[:, None]
    return -((same / same.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1) + (image_of * logits.T.log_softmax(1)).sum(1)).mean() / 2


def tiny_clip(root, folder, seed=0, steps=1400, objects=112, scenes=24, device="cpu"):
    """Path of the tiny CLIP of the shapes dataset at `root`: trained by the first call, cached in `folder`, accuracy printed.

    The stand-in for web-scale pre-training: it sees objects and captions of ALL classes, the novel ones too. A batch holds objects,
    called by name and colour (base ones too, or their images would not tell colours apart; dropped in 40 %), and whole images with a caption.
    """
    recipe = json.dumps([2, TINY, Path(root).name, seed, steps, objects, scenes])  # 2: this function's version
    key = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    path = Path(folder) / f"tiny-clip-{key}.pt"
    if path.exists():
        return str(path)
    data, val = read_objects(root, "train2017"), read_objects(root, "val2017")
    coloured = lambda name: name.split()[0] in COLOURS
    rng, r = torch.Generator().manual_seed(seed), lambda *shape: torch.rand(*shape, generator=rng)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random stream as it was
        torch.manual_seed(seed)
        model = tiny_model(**TINY)
    frozen = FrozenCLIP(model, open_clip.SimpleTokenizer(), "tiny", device)
    model.train().requires_grad_(True)
    model.visual.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    images, number = frozen.normalise(data["images"]), {n: data["names"].count(n) for n in data["names"]}
    rare_more = torch.tensor([number[n] ** -0.5 for n in data["names"]])
    for _ in tqdm(range(steps), desc="tiny CLIP", mininterval=1):
        pick = torch.multinomial(rare_more, objects, generator=rng)
        scene = torch.randint(len(data["images"]), (scenes,), generator=rng)
        boxes = data["boxes"][pick]
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        boxes = boxes + (r(objects, 4) - 0.5) * 0.1 * sides                                # as a detector's boxes are: a little off,
        boxes = boxes + r(objects, 1) * 0.15 * sides * torch.tensor([-1.0, -1, 1, 1])      # and with some of their surroundings
        boxes = torch.cat([boxes, torch.cat([torch.zeros(scenes, 2), data["sizes"][scene] - 1.0], 1)]).to(device)
        owner = torch.cat([data["owner"][pick], scene]).to(device)
        pixels = crop_and_resize(images, boxes, owner, frozen.size)
        for turn in (lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.transpose(2, 3)):  # names say nothing of left or up
            chosen = r(objects) < 0.5
            pixels[:objects][chosen] = turn(pixels[:objects][chosen])
        what = [data["words"][i] for i in pick.tolist()]
        said = [(noun, None if drop < 0.4 else colour) for (noun, colour), drop in zip(what, r(objects).tolist())]
        texts = ["a photo of a " + (f"{colour} " if colour else "") + noun + "." for noun, colour in said]
        texts += [data["captions"][i][int(u * len(data["captions"][i]))] for i, u in zip(scene.tolist(), r(scenes).tolist())]
        ids = {k: i for i, k in enumerate(dict.fromkeys([noun for noun, _ in what] + [data["content"][i] for i in scene.tolist()]))}
        noun = torch.tensor([ids[n] for n, _ in what] + [ids[data["content"][i]] for i in scene.tolist()])
        colour, told = (torch.tensor([COLOURS.index(c) if c else -1 for _, c in x] + [-1] * scenes) for x in (what, said))
        same = ((noun[:, None] == noun) & ((told == -1) | (colour[:, None] == told)) | torch.eye(len(texts), dtype=torch.bool)).float().to(device)
        image = model.encode_image(pixels.contiguous(memory_format=torch.channels_last), normalize=True)
        once = {t: i for i, t in enumerate(dict.fromkeys(texts))}                          # each sentence is encoded once
        tokens = frozen.tokenizer(list(once), context_length=model.context_length).to(device)
        text = model.encode_text(tokens, normalize=True)[torch.tensor([once[t] for t in texts], device=device)]
        loss = contrastive(image, text, same, model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=4.6052)  # 100
    frozen = FrozenCLIP(model, frozen.tokenizer, "tiny", device)
    names = sorted(set(val["names"]))
    found = frozen.encode_crops(frozen.normalise(val["images"]), val["boxes"].to(device), val["owner"].to(device)) @ frozen.class_embeddings(names).T
    right, novel = (torch.tensor(x) for x in ([names[k] == n for k, n in zip(found.argmax(1).tolist(), val["names"])], list(map(coloured, val["names"]))))
    accuracy = dict(all=100 * right.float().mean().item(), novel=100 * right[novel].float().mean().item())
    print(f"tiny CLIP -> {path}: zero-shot accuracy on {len(right)} objects of val2017 among {len(names)} names {accuracy['all']:.1f} %, "
          f"on the novel {accuracy['novel']:.1f} %; loss {loss.item():.2f}", flush=True)
    save(dict(config=TINY, id=key, accuracy=accuracy, model=model.state_dict()), path)
    return str(path)
