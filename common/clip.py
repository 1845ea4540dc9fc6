# SPDX-License-Identifier: MIT
"""A frozen CLIP as teacher: text embeddings and batched crop encoding. Needs run.py beside it, and
tiny.py only for the tiny CLIP of `shapes`.

    clip = load_clip("ViT-B-32-quickgelu/openai", device)          # open_clip downloads it once
    text = clip.class_embeddings(["cat", "red panda"])             # (K, D) unit rows
    v = clip.encode_crops(clip.normalise(images), boxes, owner)    # (N, D) unit rows; boxes (N, 4),
                                                                   # owner (N,) image of each
Resizing a crop along an axis makes every new row a weighted sum of a few of its rows. Enlarging,
shrinking with or without antialiasing, repeating the border and padding with zeros differ in which
rows and weights (`taps`) only, and weighted bags of rows are what embedding_bag sums. So all crops
of a batch are resized together, on the device, and no pixel outside a crop is mixed in.
"""
import hashlib
import json
import math
import os
import unicodedata
import zipfile
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

from .run import UserError, barrier, checksum, first_not_finite, read_file, tell, why

TEMPLATES = ("a photo of a {}.",)


# ------------------------------------------------------------------ crops

def crop_windows(boxes, height, width, enlarge=1.0):
    """Boxes -> whole-pixel windows (N, 4) x1, y1, x2, y2 (end exclusive), one pixel at least.

    boxes: (N, 4) xyxy pixels. Corners are cut to whole numbers and the last pixel belongs to the
    crop. enlarge scales both half sides about the whole-number centre. These are the released
    HierKD code's roundings.
    """
    x1, y1, x2, y2 = boxes.detach().nan_to_num().clamp(min=0, max=1e6).long().unbind(1)
    if enlarge != 1:
        cx, cy = (x1 + x2) // 2, (y1 + y2) // 2
        x1 = (cx - (cx - x1) * enlarge).clamp(min=0).long()
        x2 = (cx + (x2 - cx) * enlarge).long()
        y1 = (cy - (cy - y1) * enlarge).clamp(min=0).long()
        y2 = (cy + (y2 - cy) * enlarge).long()
    x1, y1 = x1.clamp(max=width - 1), y1.clamp(max=height - 1)
    x2 = torch.maximum(x2 + 1, x1 + 1).clamp(max=width)
    y2 = torch.maximum(y2 + 1, y1 + 1).clamp(max=height)
    return torch.stack([x1, y1, x2, y2], 1)


def letterbox(windows, size):
    """Where crops land in the size x size square: out (N, 2) width and height, pad (N, 2) pixels
    left of and above them.

    The long side becomes `size`; the odd pixel of padding goes left / top. In double, and cut, not
    rounded, as in the released code: 55 pixels become 223, since 55 * (224 / 55) < 224.
    """
    sides = (windows[:, 2:] - windows[:, :2]).double()
    # a tensor of `size`: torch takes size / sides as size * (1 / sides), which rounds otherwise
    scale = (torch.full_like(sides, size) / sides).amin(1, keepdim=True)
    out = (sides * scale).long().clamp(min=1)
    return out, (size - out + 1) // 2


def taps(length, out, pad, size, most, antialias=True):
    """The pixels of a crop that one output pixel mixes, along one axis.

    length, out, pad: (N,) crop's pixels, output pixels, padding before them; most: the largest
    length, which decides T. Returns index (N, size, T) and weight (N, size, T), 0 in the padding.
    Cubic convolution. antialias: PIL's rule, a = -0.5, the kernel as wide as the shrinking, weights
    normalised inside the crop. Otherwise PyTorch's and OpenCV's: a = -0.75, four taps, those beyond
    the border repeat the last pixel.
    """
    length, out, pad = length[:, None], out[:, None], pad[:, None]
    o = torch.arange(size, device=length.device) - pad       # (N, size) output pixel in the crop
    center = (o + 0.5) * length / out                        # in pixels of the crop
    if antialias:
        shrink = (length / out).clamp(min=1)
        reach = 2 * max(1.0, 1.02 * most / size)             # 1.02: `out` may be cut short
    else:
        shrink = torch.ones_like(length, dtype=torch.float32)
        reach = 2.0
    steps = torch.arange(-math.ceil(reach) + 1, math.ceil(reach) + 1, device=length.device)
    index = (center - 0.5).floor().long()[..., None] + steps
    x = ((index + 0.5 - center[..., None]) / shrink[..., None]).abs()
    a = -0.5 if antialias else -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    weight = torch.where(x <= 1, near, torch.where(x < 2, far, 0))
    used = ((o >= 0) & (o < out))[..., None]
    if antialias:
        weight = weight * ((index >= 0) & (index < length[..., None]))
        weight = weight / torch.where(used, weight.sum(-1, keepdim=True), 1)
    return torch.minimum(index.clamp(min=0), length[..., None] - 1), weight * used


def mix_rows(rows, index, weight):
    """Weighted sums of rows (R, W): index, weight (..., T) -> (..., W). One kernel does it."""
    weight = weight.flatten(0, -2)
    mixed = F.embedding_bag(index.flatten(0, -2), rows, mode="sum", per_sample_weights=weight)
    return mixed.view(*index.shape[:-1], rows.shape[1])


@torch.no_grad()
def crop_and_resize(images, boxes, owner, size, enlarge=1.0, antialias=True):
    """Crops of a batch, long side resized to `size`, zero-padded to a square.

    images: (B, 3, H, W) float, normalised (so that padding is the mean colour). boxes: (N, 4) xyxy
    pixels; owner: (N,) index into images. Returns (N, 3, size, size) fp32, no gradient.
    Crops are grouped by their longer side, in steps of sqrt 2, and a group is cut where it would
    outgrow the cache of a CPU or 1 GB of a GPU. What costs is moving memory: rows are read as
    slices, both transposes are those of one matrix.
    """
    images = images.float().contiguous()
    height, width = images.shape[2:]
    windows = crop_windows(boxes, height, width, enlarge)
    sides = windows[:, 2:] - windows[:, :2]
    out, pad = letterbox(windows, size)
    crops = images.new_empty(len(boxes), 3, size, size)
    channel = torch.arange(3, device=images.device)[:, None]
    group = (2 * sides.amax(1).clamp(min=32).double().log2()).ceil().long()
    jobs = []
    for half_octaves in group.unique().tolist():
        spans = [min(math.ceil(2 ** (half_octaves / 2)), side) for side in (width, height)]
        room = 2 ** (28 if images.is_cuda else 20)
        most = max(1, room // (3 * max(size, spans[0]) * spans[1]))
        for at in (group == half_octaves).nonzero()[:, 0].split(most):
            jobs.append((at, *spans))
    for at, span_x, span_y in jobs:
        n = len(at)
        x = windows[at, 0].clamp(max=width - span_x)
        y = windows[at, 1].clamp(max=height - span_y)
        index_x, weight_x = taps(sides[at, 0], out[at, 0], pad[at, 0], size, span_x, antialias)
        index_y, weight_y = taps(sides[at, 1], out[at, 1], pad[at, 1], size, span_y, antialias)
        # every run of span_x pixels is a row of this view: (n, 3, span_y) of them are read
        runs = images.as_strided((images.numel() - span_x + 1, span_x), (1, 1))
        crop = torch.arange(n, device=x.device).view(n, 1, 1)
        plane = owner[at, None, None] * 3 + channel                          # (n, 3, 1)
        line = plane * height + y[:, None, None] + torch.arange(span_y, device=x.device)
        start = line * width + x[:, None, None]                              # (n, 3, span_y)
        patch = runs.index_select(0, start.flatten())                        # (n 3 span_y, span_x)
        columns = patch.t().contiguous().view(span_x * n, -1)                # rows are [x, crop]
        index_x = (index_x + (windows[at, 0] - x).view(-1, 1, 1)) * n + crop
        columns = mix_rows(columns, index_x.transpose(0, 1), weight_x.transpose(0, 1))
        rows = columns.flatten(1).t().contiguous()                           # [crop, channel, y]
        index_y = (index_y + (windows[at, 1] - y).view(-1, 1, 1))[:, None]
        index_y = index_y + (crop[..., None] * 3 + channel[:, None]) * span_y
        weight_y = weight_y[:, None].expand(-1, 3, -1, -1)
        crops.index_copy_(0, at, mix_rows(rows, index_y, weight_y))
    return crops


# ------------------------------------------------------------------ the frozen model

class FrozenCLIP:
    """open_clip's model, its tokenizer and normalisation. Not an nn.Module, so that no checkpoint,
    optimizer, DDP or train() sees it."""

    def __init__(self, model, tokenizer, name, device="cpu"):
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.name, self.device = tokenizer, name, torch.device(device)
        size = model.visual.image_size
        self.size = size[0] if isinstance(size, (tuple, list)) else size
        own = open_clip.get_model_preprocess_cfg(model)  # empty for the tiny CLIP
        mean = own.get("mean", open_clip.OPENAI_DATASET_MEAN)
        std = own.get("std", open_clip.OPENAI_DATASET_STD)
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)
        # plain numbers: reading them back from a GPU would wait for it
        self.grey_levels = [[255 * x for x in mean], [255 * x for x in std]]

    @cached_property
    def dim(self):
        return self.encode_text(["a"]).shape[1]

    def normalise(self, images):
        """uint8 RGB -> float with CLIP's mean and deviation."""
        return (images.to(self.device) / 255 - self.mean) / self.std

    @torch.no_grad()
    def encode_text(self, sentences, chunk=256):
        """Sentences, cut at the model's context length -> (N, D) unit rows, fp32."""
        tokens = self.tokenizer(list(sentences), context_length=self.model.context_length)
        parts = []
        for part in tokens.to(self.device).split(chunk):
            parts.append(F.normalize(self.model.encode_text(part).float(), dim=1))
        return torch.cat(parts) if parts else torch.zeros(0, self.dim, device=self.device)

    def class_embeddings(self, names, templates=TEMPLATES, cache=None, raw=False):
        """(K, D) unit rows: the mean over templates of each name's sentences.

        cache: a folder, keyed by model, templates and names. raw: keep underscores.
        Raises UserError for an empty list, an empty name, one that occurs twice, one with control
        characters or halves of characters, which no tokenizer reads as was meant.
        """
        if isinstance(names, str):
            raise UserError(f"class list: {names!r} is one text; give a list of names")
        names = list(names)
        clean = []
        for n in names:
            unreadable = [c for c in str(n).strip() if unicodedata.category(c) in ("Cc", "Cs")]
            if unreadable:
                raise UserError(f"class list: {n!r} holds {unreadable[0]!r}, which is no text")
            clean.append(" ".join(str(n).replace("_", "_" if raw else " ").split()))
        if not clean:
            raise UserError("class list: is empty")
        if not all(clean):
            raise UserError(f"class list {names}: holds an empty name")
        twice = sorted({n for n in clean if clean.count(n) > 1})
        if twice:
            raise UserError(f"class list: {', '.join(twice)} occurs twice")
        read = {}  # tokens: CLIP's tokenizer knows no capitals, so "Helmet" and "helmet" share a row
        tokenizer = partial(self.tokenizer, context_length=self.model.context_length)
        for name, tokens in zip(clean, tokenizer(clean).tolist()):
            if (other := read.setdefault(tuple(tokens), name)) != name:
                raise UserError(f"class list: CLIP reads {other!r} and {name!r} alike; rename or join them")
        path = Path(cache) / f"text-{self.text_key(clean, templates)}.pt" if cache else None
        if path and path.exists():
            return read_file(path).to(self.device)
        at_once = max(1, 256 // len(templates))
        text = open_clip.build_zero_shot_classifier(
            self.model, tokenizer, clean, tuple(templates), at_once, self.device).T.float().contiguous()
        if path:
            save(text.cpu(), path)
        return text

    def text_key(self, *what):
        """Changes with the text tower's weights, which a name alone does not tell, and `what`."""
        digest = hashlib.sha256(json.dumps([self.name, what]).encode())
        for key, value in sorted(self.model.state_dict().items()):
            if not key.startswith("visual."):
                digest.update(key.encode() + value.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:24]

    @torch.no_grad()
    def encode_images(self, pixels, chunk=256):
        """(N, 3, size, size) normalised -> (N, D) unit rows, fp32. In chunks, so that memory does
        not grow with N."""
        if not len(pixels):  # a transformer refuses an empty batch
            return torch.zeros(0, self.dim, device=self.device)
        parts = []
        for part in pixels.split(chunk):
            parts.append(F.normalize(self.model.encode_image(part).float(), dim=1))
        return torch.cat(parts)

    def encode_crops(self, images, boxes, owner, enlarge=1.0, antialias=True, chunk=256):
        """Regions of normalised images (B, 3, H, W) -> (N, D) unit rows. See crop_and_resize."""
        crops = crop_and_resize(images, boxes, owner, self.size, enlarge, antialias)
        return self.encode_images(crops, chunk)


def save(value, path):
    """Written to a temporary name, then renamed: two processes may do this at once."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as e:  # torch's zip writer raises RuntimeError on a full disk
        if draft.exists():
            draft.unlink()
        raise UserError(f"{path}: not written ({why(e)}); is there space to write?") from None


def load_clip(spec="ViT-B-32-quickgelu/openai", device="cpu"):
    """FrozenCLIP from "model/weights" of open_clip (weights: a tag, downloaded once, or a file), or
    from a tiny CLIP's file.

    OpenAI's weights need a "-quickgelu" model: with plain GELU they load without complaint and give
    worse features. Raises UserError, one line with the remedy, where it cannot be had.
    """
    if Path(spec).is_file():
        model, name = load_tiny(spec)
        return FrozenCLIP(model, open_clip.tokenize, name, device)
    model_name, _, weights = spec.partition("/")
    if model_name not in open_clip.list_models() or not weights:
        raise UserError(f"--clip {spec}: expected MODEL/WEIGHTS of open_clip, "
                        "as ViT-B-32-quickgelu/openai")
    tag, twin = open_clip.get_pretrained_cfg(model_name, weights), twin_of(model_name)  # tag: {} of a file
    quick = bool(tag.get("quick_gelu"))
    if tag and twin in open_clip.list_models() and quick != activation_of(model_name):
        kind = "QuickGELU" if quick else "plain GELU"
        raise UserError(f"--clip {spec}: these weights were trained with {kind}; use {twin}/{weights}")
    try:
        model = open_clip.create_model(model_name, pretrained=weights)
    except Exception as e:  # each of its download routes fails with another exception
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:120]
        raise UserError(f"--clip {spec}: cannot be loaded ({reason}). Offline? Fetch the weights "
                        f"elsewhere and give {model_name}/PATH") from None
    refuse_nan(model, f"--clip {spec}")
    if Path(weights).is_file():
        open_clip.set_model_preprocess_cfg(model, open_clip.get_model_preprocess_cfg(model) | pixels_of(spec))
        # a file may be moved, and another put in its place
        spec = f"{model_name}/{Path(weights).name} {checksum(model.state_dict())[:8]}"
    return FrozenCLIP(model, open_clip.get_tokenizer(model_name), spec, device)


def cut_names(clip, names, templates=TEMPLATES):
    """The names that clip (FrozenCLIP) does not read to their end: the longest of the templates makes a
    sentence of more tokens than its text tower takes."""
    most = clip.model.context_length

    def there(sentences):
        tokens = clip.tokenizer(["", *sentences], context_length=most + 1)
        return tokens[1:] != tokens[0, -1]  # of "" that is padding

    longest = templates[there([t.format("") for t in templates]).sum(1).argmax()]
    beyond = there([longest.format(name) for name in names])[:, -1].tolist()
    return [name for name, cut in zip(names, beyond) if cut]


def activation_of(model):
    """Whether open_clip builds this model with QuickGELU."""
    return bool(open_clip.get_model_config(model).get("quick_gelu"))


def twin_of(model):
    """Name of the model with the other activation."""
    return model.removesuffix("-quickgelu") if model.endswith("-quickgelu") else f"{model}-quickgelu"


def pixels_of(spec):
    """dict(mean, std) that the weights of MODEL/FILE were trained with: of open_clip_config.json beside the
    file, or of the tag that its name holds. Else OpenAI's, which is told where not all of the model's have
    them."""
    model, _, file = spec.partition("/")
    config = Path(file).parent / "open_clip_config.json"
    if config.is_file():
        with suppress(ValueError, AttributeError):
            found = json.loads(config.read_text(encoding="utf-8")).get("preprocess_cfg", {})
            return {k: tuple(found[k]) for k in ("mean", "std") if k in found}
    stem, known = Path(file).stem.lower().replace("-", "_"), {}
    for tag in open_clip.list_pretrained_tags_by_model(model):
        cfg = open_clip.get_pretrained_cfg(model, tag)
        known[tag] = {k: tuple(cfg[k]) for k in ("mean", "std") if cfg.get(k)}
    named = [known[tag] for tag in sorted(known, key=len) if tag.lower().replace("-", "_") in stem]
    usual = dict(mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    if not named and any(usual | pixels != usual for pixels in known.values()):
        tell(f"--clip {spec}: pixels are normalised as OpenAI's; if the weights want another mean and "
             "deviation, put their open_clip_config.json beside them")
    return named[-1] if named else {}


def check_activation(spec):
    """Raises UserError where spec is MODEL/FILE and the file shows that its weights were trained with
    QuickGELU but the model's name says GELU, or the reverse: they would load and give worse features."""
    model, _, file = spec.partition("/")
    other = twin_of(model)
    if Path(spec).is_file() or not Path(file).is_file() or not {model, other} <= {*open_clip.list_models()}:
        return
    found = quick_gelu_of(Path(file), model.removesuffix("-quickgelu"))
    if found is not None and found != activation_of(model):
        kind = "QuickGELU" if found else "plain GELU"
        raise UserError(f"--clip {spec}: these weights were trained with {kind}; use {other}/{file}")


def quick_gelu_of(path, model):
    """Whether a file of weights was trained with QuickGELU; None where it does not show. It shows in
    open_clip_config.json beside it, in the code of OpenAI's archives, in the keys that only OpenAI's have, in
    a file name that holds a tag which open_clip has for one of MODEL and MODEL-quickgelu only."""
    config = path.parent / "open_clip_config.json"
    if config.is_file():
        with suppress(ValueError, AttributeError):
            return bool(json.loads(config.read_text(encoding="utf-8")).get("model_cfg", {}).get("quick_gelu"))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            code = [n for n in archive.namelist() if "/code/" in n and n.endswith(".py")]
            if code:
                return any(b"1.702" in archive.read(n) for n in code)
        with suppress(Exception):  # whatever is wrong with the file, load_clip says it
            if "input_resolution" in torch.load(path, map_location="cpu", weights_only=True, mmap=True):
                return True
    stem = path.stem.lower().replace("-", "_")
    quick, plain = (set(open_clip.list_pretrained_tags_by_model(m)) for m in (f"{model}-quickgelu", model))
    quick, plain = (any(tag in stem for tag in tags) for tags in (quick, plain - {"openai"}))
    return quick if quick != plain else None


def get_clip(spec, data_seed, device):
    """FrozenCLIP of "model/weights", or of "", the tiny CLIP of shapes. The first process of a machine goes
    first: it downloads, or trains the tiny CLIP."""
    def load():
        if spec:
            check_activation(spec)
            return load_clip(spec, device)
        from .tiny import shapes_clip
        return load_clip(shapes_clip(data_seed, device), device)
    clip = load() if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None
    barrier()
    return clip or load()


def clip_of(arch, width, spec, device):
    """The CLIP that a checkpoint was trained with, unless spec (--clip) is another; its width must fit. arch:
    what the checkpoint says of it, clip (for get_clip), clip_name ("": not known) and data_seed."""
    if spec is None and os.path.isabs(arch["clip"]) and not Path(arch["clip"]).is_file():
        raise UserError(f"{arch['clip']}: is missing, the CLIP that the checkpoint was trained with; give "
                        "its new place as --clip")
    clip = get_clip(arch["clip"] if spec is None else spec, arch["data_seed"], device)
    if clip.dim != width:
        raise UserError(f"--clip {clip.name}: has {clip.dim}-d embeddings, the checkpoint {width}-d")
    if arch["clip_name"] not in ("", clip.name):
        tell(f"the checkpoint was trained with CLIP {arch['clip_name']}, this is {clip.name}: unless they "
             "have the same weights, names mean something else")
    return clip


def tell_cut(clip, names, templates=TEMPLATES, what="names"):
    """Says which names CLIP reads in part only."""
    cut = cut_names(clip, names, templates)
    if cut:
        tell(f"{len(cut)} {what} are longer than CLIP's {clip.model.context_length} tokens and are cut, "
             f"first {cut[0][:60]!r}")


def load_tiny(spec):
    """(model, name) of a file that tiny_clip wrote."""
    try:
        from .tiny import tiny_model  # needed here only
        state = torch.load(spec, map_location="cpu", weights_only=True)
        model = tiny_model(**state["config"])
        model.load_state_dict(state["model"])
        name = f"tiny-{state['id']}"
    except Exception as e:  # whatever is wrong with it, it is not ours
        raise UserError(f"{spec}: not a tiny CLIP of this project ({type(e).__name__}); "
                        "give MODEL/FILE for other weights") from None
    refuse_nan(model, spec)
    return model, name


def refuse_nan(model, where):
    """Raises UserError that names the first weight or statistic which is NaN or inf."""
    bad = first_not_finite(model.state_dict())
    if bad:
        raise UserError(f"{where}: {bad} is not finite; the weights are damaged")
