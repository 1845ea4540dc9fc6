# SPDX-License-Identifier: MIT
"""Other people's weights: where they are, how their files are read, what their keys mean here.

    path = zoo_path("gfl_r101", CROSSKD_ZOO, "--teacher")    # downloaded once, its hash checked
    kind, *content = load_any(path, "--teacher", "crosskd.py")
    if kind == "foreign":
        state, meta = content                                # tensors, no common prefix, all finite
        guard(config_of(meta), ("norm_on_bbox=True",), where)    # variants of the same keys
        arch = infer_arch(state, where)
        state, classes = from_mmdet(state), classes_of(meta)     # load_strict names the rest

A checkpoint may hold pickled objects of any library. Nothing of them is ever executed: they become
inert stand-ins, see `read_inert`. Needs run.py and boxes.py beside it; our own files are run.py's.
"""
import hashlib
import os
import pickle
import pickletools
import re
import reprlib
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import batched_nms, clip_boxes_to_image, deform_conv2d, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from .boxes import constant
from .run import UserError, check_ours, first_not_finite, read_file, rebuilding, script_of, tell, why

MMDET_URL = "https://download.openmmlab.com/mmdetection/v2.0/"
RETINA_R50 = "retinanet/retinanet_r50_fpn_2x_coco/retinanet_r50_fpn_2x_coco_20200131-fdb43119.pth"
RETINA_R101 = ("retinanet/retinanet_r101_fpn_2x_coco/"
               "retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth")
FCOS_NAME = "caffe_fpn_gn-head_mstrain_640-800_2x_coco"
CROSSKD_ZOO = {  # name: file at MMDET_URL; the last 8 digits are the first of its sha256
    "gfl_r50": "gfl/gfl_r50_fpn_1x_coco/gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth",
    "gfl_r101": "gfl/gfl_r101_fpn_mstrain_2x_coco/"
                "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
    "atss_r50": "atss/atss_r50_fpn_1x_coco/atss_r50_fpn_1x_coco_20200209-985f7bd0.pth",
    "atss_r101": "atss/atss_r101_fpn_1x_coco/atss_r101_fpn_1x_20200825-dfcadd6f.pth",
    "fcos_r50": f"fcos/fcos_r50_{FCOS_NAME}/fcos_r50_{FCOS_NAME}-d92ceeea.pth",
    "fcos_r101": f"fcos/fcos_r101_{FCOS_NAME}/fcos_r101_{FCOS_NAME}-511424d6.pth",
    "retinanet_r18": "retinanet/retinanet_r18_fpn_1x_coco/"
                     "retinanet_r18_fpn_1x_coco_20220407_171055-614fd399.pth",
    "retinanet_r50": "retinanet/retinanet_r50_fpn_1x_coco/"
                     "retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth",
    "retinanet_r50_2x": RETINA_R50,
    "retinanet_r50_3x": "retinanet/retinanet_r50_fpn_mstrain_3x_coco/"
                        "retinanet_r50_fpn_mstrain_3x_coco_20210718_220633-88476508.pth",
    "retinanet_r101": RETINA_R101,
    # The authors' own file, linked from their repository, not in the zoo: no address, no hash.
    "retinanet_swint": "retinanet_swin-t-p4-w7_fpn_1x_coco.pth",
}
PROTOTYPE_ZOO = {  # the same; None: torchvision's own. COCO box AP above or behind each
    # 39.8
    "faster_r101": "faster_rcnn/faster_rcnn_r101_fpn_2x_coco/"
                   "faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth",
    # 38.4
    "faster_r50": "faster_rcnn/faster_rcnn_r50_fpn_2x_coco/"
                  "faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth",
    "retina_r101": RETINA_R101,           # 38.9
    "retina_r50": RETINA_R50,             # 37.4
    # 47.3
    "cascade_x101": "dcn/cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco/"
                    "cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth",
    "fasterrcnn_resnet50_fpn": None,      # 37.0
    "fasterrcnn_resnet50_fpn_v2": None,   # 46.7
    "maskrcnn_resnet50_fpn_v2": None,     # 47.4
    "retinanet_resnet50_fpn": None,       # 36.4
    "retinanet_resnet50_fpn_v2": None,    # 41.5
}
# Converted from Detectron's Caffe2 models; a few surplus conv biases in the files are not used.
CAFFE_URL = "https://download.openmmlab.com/pretrain/third_party/"
CAFFE = {"resnet50": "resnet50_caffe-788b5fa3.pth", "resnet101": "resnet101_caffe-3ad79236.pth"}


# ------------------------------------------------------------------ files of the network

PATIENCE = 600  # seconds without progress, after which a process stops waiting for a download


def fetch(url, sha256=""):
    """Path of the file behind `url` in torch's hub cache, downloaded once; it appears there whole.

    sha256: first digits, checked each time. The first process of a machine downloads, the others
    wait for it. Raises UserError, one line with the remedy.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if int(os.environ.get("LOCAL_RANK", 0)):
        wait_for(path, url)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"{path.parent}: cannot be made ({e.strerror}); set TORCH_HOME to a "
                            "folder for downloads") from None
        print(f"downloading {url} -> {path}", flush=True)
        try:
            torch.hub.download_url_to_file(url, path, sha256 or None)
        except RuntimeError as e:
            raise UserError(f"{url}: {e}; the download is damaged, try again") from None
        except (OSError, HTTPException) as e:
            raise UserError(f"{url}: cannot be downloaded ({why(e)}). Offline? Fetch it elsewhere "
                            f"and place it at {path}") from None
    if sha256:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(sha256):
            raise UserError(f"{path}: sha256 starts {digest[:8]}, expected {sha256}; delete the "
                            "file and run again")
    return path


def wait_for(path, url):
    """Until another process has put `path` there; UserError once its draft no longer grows."""
    before, since = None, time.monotonic()
    while not path.exists():
        drafts = path.parent.glob(f"{path.name}.*.partial")
        try:
            sizes = [draft.stat().st_size for draft in drafts]
        except FileNotFoundError:  # it got its name just now
            continue
        if sizes != before:
            before, since = sizes, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise UserError(f"{url}: waited {PATIENCE} s for the first process of this machine, "
                            f"which was to place it at {path}; its own line says why it has not")
        time.sleep(min(1, PATIENCE / 10))


def digits_of(url):
    """The first digits of the sha256 that a file's name ends in, "" where it has none."""
    found = re.search(r"-([0-9a-f]{8,64})\.(?:pth|pt)$", url)
    return found[1] if found else ""


def zoo_path(spec, zoo, flag):
    """Path of the file that a flag names: a name of CROSSKD_ZOO or PROTOTYPE_ZOO, which is
    downloaded once, or a file's own."""
    if spec not in zoo:
        if not Path(spec).exists():
            raise UserError(f"{flag} {spec}: neither a file nor one of {', '.join(zoo)}")
        return Path(spec)
    file = zoo[spec]
    if file is None:
        url = torchvision.models.get_model_weights(spec).DEFAULT.url
        return fetch(url, digits_of(url))
    if digits_of(file):
        return fetch(MMDET_URL + file, digits_of(file))
    cached = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not cached.exists():
        raise UserError(f"{flag} {spec}: the authors link this file from "
                        f"https://github.com/jbwang1997/CrossKD; download {file} and place it at "
                        f"{cached}, or give its path")
    return cached


def imagenet_state(name, flag="--init imagenet", caffe=False):
    """(state dict, url) of an ImageNet classifier under torchvision's names: resnet50, swin_t, ...

    torchvision's V1 weights, never V2: the papers' baselines start from these. caffe: Detectron's
    ResNets for BGR pixels instead. Raises UserError that names the way on without them.
    """
    url = CAFFE_URL + CAFFE[name] if caffe else (
        torchvision.models.get_model_weights(name).IMAGENET1K_V1.url)
    try:
        path = fetch(url, digits_of(url))
    except UserError as e:
        raise UserError(f"{e}; or --init none, which starts without it") from None
    return read_foreign(path, flag)[0], url


def load_imagenet(net, name, caffe=False):
    """Puts ImageNet's weights into a torchvision classifier; the classifying layer stays as it is."""
    state, url = imagenet_state(name, caffe=caffe)
    own = net.state_dict()
    state = {k: v for k, v in state.items() if k in own}
    head = ("fc.", "classifier.", "head.")
    missing = [k for k in own if k not in state and not k.startswith(head)
               and not k.endswith("num_batches_tracked")]
    if missing:
        raise UserError(f"{url}: lacks {len(missing)} keys of {name}, first {missing[0]}")
    net.load_state_dict(state, strict=False)


# ------------------------------------------------------------------ files of others, read safely

# Modules of which torch lets nothing stand in: a file that names them wants to run commands.
BLOCKED = ("os", "posix", "nt", "sys")
RESAVE = "torch.save({'state_dict': model.state_dict()}, 'new.pth')"


class Inert:
    """Stands in a loaded file for an object of another library. It has the object's parts, as inert
    as itself, to be printed; there is nothing that it does."""
    name = ""

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state):
        self.state = state

    @reprlib.recursive_repr()
    def __repr__(self):
        return f"{self.name}{self.args} {self.state or ''}"


class InertDict:
    """The same for a subclass of dict: becomes a plain one."""

    def __new__(cls, *args):
        return OrderedDict()


class InertList:
    """The same for a subclass of list, and for a deque."""

    def __new__(cls, *args):
        return []


def note_globals(file, kinds):
    """Adds to `kinds` every class and function that the pickle at `file`'s position names, as
    {"module.name": what its objects are: Inert, InertDict or InertList}.

    From its opcodes alone: a stack on which a name stands for a class, "name()" for what it made,
    None for all else. Nothing is imported, made or called. Stops behind the pickle.
    """
    stack, below, memo = [], [], {}
    filled = {"APPEND": InertList, "APPENDS": InertList,
              "SETITEM": InertDict, "SETITEMS": InertDict}
    for opcode, value, _ in pickletools.genops(file):
        op = opcode.name
        if op in ("PROTO", "STOP"):
            continue
        if op == "GLOBAL":
            module, name = value.split(" ", 1)
            if (module, name) in torch._utils.NAME_MAPPING:  # Python 2's names, as torch reads them
                module, name = torch._utils.NAME_MAPPING[module, name]
            else:
                module = torch._utils.IMPORT_MAPPING.get(module, module)
            stack.append(f"{module}.{name}")
            kinds.setdefault(stack[-1], Inert)
        elif op == "MARK":
            below.append(stack)
            stack = []
        elif op in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif op in ("NEWOBJ", "REDUCE"):
            stack.pop()
            maker = stack.pop()
            stack.append(f"{maker}()" if maker else None)
        elif op == "BUILD":
            stack.pop()
        elif op in filled:
            if op.endswith("S"):
                stack = below.pop()
            else:
                del stack[-2 if op == "SETITEM" else -1:]
            maker = (stack[-1] or "").removesuffix("()")
            if maker in kinds:
                kinds[maker] = filled[op]
        elif op == "TUPLE":
            stack = below.pop()
            stack.append(None)
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            del stack[-int(op[-1]):]
            stack.append(None)
        elif op == "BINPERSID":
            stack[-1] = None
        else:
            stack.append(None)  # a number, a text, an empty list, ...


def globals_of(path):
    """note_globals of all pickles of a torch file: a zip or, before torch 1.6, four pickles and
    bytes. Of another kind of file, what was found until that was clear."""
    kinds = {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        with archive.open(name) as file:
                            note_globals(file, kinds)
        else:
            with open(path, "rb") as file:
                for _ in ("magic number", "version", "machine", "content"):
                    note_globals(file, kinds)
    except Exception:  # a damaged pickle can raise anything, and read_file will say what it is
        pass
    return kinds


def read_inert(path):
    """torch.load with weights_only=True for files that hold objects of other libraries, too.

    mmengine's HistoryBuffer, numpy's scalars, a ConfigDict, an argparse.Namespace ... are neither
    needed nor executed: every class and function that torch does not know is represented by a
    stand-in of ours (Inert), so that to call, fill or restore it makes an object that does nothing.
    Raises UserError, one line, for whatever else can be wrong with a file.
    """
    if not Path(path).is_file():
        return read_file(path)  # which says what it is instead
    kinds = globals_of(path)
    for name in sorted(kinds):
        if name.split(".")[0] in BLOCKED:
            raise UserError(f"{path}: names {name}, so loading it would run commands; not loaded")
    stand_ins = []
    for name, kind in kinds.items():  # torch's own names among them stay torch's
        stand_ins.append((type(kind.__name__, (kind,), {"name": name}), name))
    with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            tied = isinstance(e, pickle.UnpicklingError) or "subclass" in str(e)  # of Tensor
            if kinds and tied:
                raise UserError(f"{path}: holds pickled objects that cannot be left out, and to "
                                "load them would run code from the file; save its weights alone, "
                                f"where it was made: {RESAVE}") from None
        return read_file(path)  # which says in one line what is wrong with it


def read_safetensors(path):
    """dict(state_dict, meta) of a safetensors file."""
    try:
        from safetensors import safe_open  # needed here only
    except ImportError:
        raise UserError(f"{path}: is a safetensors file; to read it: "
                        "pip install safetensors") from None
    try:
        with safe_open(str(path), framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}
            return dict(state_dict=state, meta=dict(file.metadata() or {}))
    except Exception as e:  # SafetensorError, and whatever else is wrong with it
        raise UserError(f"{path}: not a readable safetensors file ({why(e)}); "
                        "truncated download?") from None


def is_safetensors(path):
    """By its name, or its first bytes: the length of a header and the header's "{"."""
    if not Path(path).is_file():
        return False
    if str(path).endswith(".safetensors"):
        return True
    with open(path, "rb") as file:
        start = file.read(9)
    header = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and 2 <= header < Path(path).stat().st_size


@contextmanager
def naming(flag):
    """Puts the flag before what a UserError says."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{flag} {e}") from None


# ------------------------------------------------------------------ what a file of others holds

# Where the weights are, the first that fits. mmengine writes the average to state_dict and what it
# was an average of to ema_state_dict; an average alone is taken, too.
HOLDERS = ("state_dict", "model", "ema_state_dict", "model_ema", "ema", "module")
COUNTERS = ("steps", "n_averaged")  # of such averages
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64,
          torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def strip_prefixes(state, where="weights"):
    """A state dict without what wrappers add to its keys: the ONE place where that is known.

    `module.` (DataParallel, DDP) and `model.` go where all keys begin with them, also stacked;
    `_orig_mod.` (torch.compile) goes wherever it stands. mmcv's copies of averages go, too:
    `ema_backbone_conv1_weight` beside `backbone.conv1.weight`.
    """
    names = []
    for key in state:
        names.append(".".join(part for part in key.split(".") if part != "_orig_mod"))
    while True:
        dotted = [n for n in names if "." in n]  # an average's `steps` and copies have no dot
        shared = [p for p in ("module.", "model.") if all(n.startswith(p) for n in dotted)]
        if not dotted or not shared:
            break
        names = [n.removeprefix(shared[0]) for n in names]
    twice = [n for n, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: holds {twice[0]} twice, with and without a wrapper's prefix")
    copies = {"ema_" + n.replace(".", "_") for n in names}
    return {n: value for n, value in zip(names, state.values()) if n not in copies}


def foreign_state(content, where):
    """(state dict, meta dict) of what another project's file holds.

    The tensors are plain, finite and detached, their keys without prefixes; meta {} if there is
    none. Raises UserError, one line with the first wrong key, where anything else stands there.
    """
    state, holder = content, None
    for _ in range(4):  # {"ema": {"module": {...}}}; not for ever: a pickle may hold itself
        if not isinstance(state, dict):
            break
        inner = [k for k in HOLDERS if isinstance(state.get(k), (dict, Inert))]
        if not inner:
            break
        state, holder = state[inner[0]], inner[0]
    if isinstance(state, Inert):
        raise UserError(f"{where}: holds {a(state)}, not its weights; save these, where it was "
                        f"made: {RESAVE}")
    if not isinstance(state, dict):
        raise UserError(f"{where}: holds {a(state)}, not a checkpoint")
    if not any(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{where}: holds no weights")
    tensors = {}
    for key, value in state.items():
        if str(key).endswith("num_batches_tracked") and not torch.is_tensor(value):
            continue  # some converters write a number; nothing needs it
        if not isinstance(key, str) or not torch.is_tensor(value):
            raise UserError(f"{where}: {key} is {a(value)}, not a tensor under a name, "
                            "so these are no weights")
        strided = value.layout == torch.strided and value.device.type == "cpu"
        if not strided or value.dtype not in DTYPES:
            kind = f"{value.dtype}, {value.layout}, on {value.device}".replace("torch.", "")
            raise UserError(f"{where}: {key} is a tensor of an unusual kind ({kind})")
        tensors[key] = value.detach()
    if holder in ("ema_state_dict", "model_ema", "ema", "module"):
        tensors = {k: v for k, v in tensors.items() if k not in COUNTERS}
    tensors = strip_prefixes(tensors, where)
    bad = first_not_finite(tensors)
    if bad:
        raise UserError(f"{where}: {bad} is not finite; the training that wrote it went wrong")
    meta = content.get("meta")
    return tensors, meta if isinstance(meta, dict) else {}


def a(value):
    """What a thing is, for a message."""
    if isinstance(value, Inert):
        return f"a pickled {value.name}"
    return f"a {type(value).__name__}"


def load_any(path, flag, script):
    """("ours", content) of a checkpoint of `script`, or ("foreign", state, meta) of anybody else's.

    flag: whose value the path is, for messages. Ours is checked by run.check_ours; for the rest see
    foreign_state. Raises UserError, one line.
    """
    with naming(flag):
        content = read_safetensors(path) if is_safetensors(path) else read_inert(path)
        if not isinstance(content, dict) or not isinstance(content.get("arch"), dict):
            return "foreign", *foreign_state(content, path)
        check_ours(content, path, script)
        if not isinstance(content.get("model"), dict):
            raise UserError(f"{path}: holds no weights")
        return "ours", content


def read_foreign(path, flag):
    """(state dict, meta) of a file of mmdetection 2.x or 3.x or of another project, or of bare
    weights, by torch.save or safetensors. One of our own checkpoints is refused: see load_any."""
    with naming(flag):
        content = read_safetensors(path) if is_safetensors(path) else read_inert(path)
        if isinstance(content, dict) and isinstance(content.get("arch"), dict):
            raise UserError(f"{path}: is a checkpoint of {script_of(content) or 'this project'}, "
                            "not the weights of another")
        return foreign_state(content, path)


def config_of(meta):
    """Text of the config that mmdetection saved along, "" where there is none.

    meta.config in 2.x, meta.cfg in 3.x: a text, or what was a dict, which is printed as Python.
    """
    texts = [str(meta[key]) for key in ("config", "cfg") if meta.get(key) is not None]
    return "\n".join(texts)


def classes_of(meta):
    """Tuple of the class names that mmdetection saved along (2.x: CLASSES, 3.x: dataset_meta), or
    None where there are none."""
    dataset = meta.get("dataset_meta")
    dataset = dataset if isinstance(dataset, dict) else {}
    for names in (meta.get("CLASSES"), dataset.get("classes"), dataset.get("CLASSES")):
        if isinstance(names, str):
            return (names,)
        if isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names):
            return tuple(names)
    return None


def guard(config, settings, where, whose="this script's detector", hint=""):
    """Refuses variants that keys cannot tell from ours: same names and shapes, other meaning.

    config: of config_of. settings: as norm_on_bbox=True or style='caffe'; found however a config
    spells them: with spaces, quotes, as keys of a printed dict, as JSON. Raises UserError.
    """
    for setting in settings:
        name, value = (re.escape(part.strip("'\" ")) for part in setting.split("=", 1))
        quote = r"\\?['\"]?"
        pattern = rf"(?<!\w){name}{quote}\s*[=:,]\s*{quote}{value}(?!\w)"
        if re.search(pattern, config, re.IGNORECASE):
            raise UserError(f"{where}: its config has {setting}, which {whose} does not{hint}")


PIXELS = dict(mean=[(123.675, 116.28, 103.53)], std=[(58.395, 57.12, 57.375)])
CAFFE_PIXELS = dict(mean=[(102.9801, 115.9465, 122.7717)], std=[(1, 1, 1)])  # FCOS on a ResNet
ANCHORS = dict(  # of the coded boxes and of the anchors; strides: a backbone's, too
    faster=dict(scales=[(8,)], ratios=[(0.5, 1, 2)], strides=[(4, 8, 16, 32, 64), (1, 2, 2, 2)],
                target_stds=[(1, 1, 1, 1), (0.1, 0.1, 0.2, 0.2)]),
    retinanet=dict(octave_base_scale=[(4,)], scales_per_octave=[(3,)], ratios=[(0.5, 1, 2)],
                   strides=[(8, 16, 32, 64, 128), (1, 2, 2, 2)], target_stds=[(1, 1, 1, 1)]),
    atss=dict(octave_base_scale=[(8,)], scales_per_octave=[(1,)], ratios=[(1,)],
              strides=[(8, 16, 32, 64, 128), (1, 2, 2, 2)], target_stds=[(0.1, 0.1, 0.2, 0.2)]))
ANCHORS["fcos"] = dict(strides=ANCHORS["atss"]["strides"])
ANCHORS["gfl"] = {k: v for k, v in ANCHORS["atss"].items() if k != "target_stds"}
THIRD = (0.033, 0.033, 0.067, 0.067)  # of a cascade's heads
ANCHORS["cascade"] = ANCHORS["faster"] | dict(
    target_stds=[*ANCHORS["faster"]["target_stds"], (0.05, 0.05, 0.1, 0.1), THIRD])


def guard_numbers(config, settings, where):
    """Refuses a config that gives one of `settings`, {name: tuples that are ours}, other numbers. Where there
    is no config, that is told."""
    if not config:
        tell(f"{where}: holds no config; its anchors, box coding and pixels are taken for the usual ones")
    for name, ours in settings.items():
        pattern = rf"(?<!\w){name}\\?['\"]?\s*[=:,]\s*[\[(]?\s*(-?[\d.]+(?:\s*,\s*-?[\d.]+)*)"
        for found in re.findall(pattern, config):
            numbers = tuple(float(x) for x in re.findall(r"-?\d*\.?\d+", found))
            alike = [tuple(map(float, x)) for x in ours if len(x) == len(numbers)]  # not an init's std=0.01
            if alike and numbers not in alike:
                usual = ", ".join(f"{x:g}" for x in alike[0])
                raise UserError(f"{where}: its config has {name}={found}, this script's detector {usual}")


def tell_scale(config, where):
    """Tells of a config that tests images at another size than 1333 x 800."""
    _, _, tested = config.partition("test_pipeline")
    found = re.search(r"(?<!\w)(?:img_)?scale\\?['\"]?\s*[=:,]\s*[\[(]+\s*(\d+)\s*,\s*(\d+)", tested)
    if found and {*map(int, found.groups())} != {800, 1333}:
        tell(f"{where}: its config tests images at {' x '.join(found.groups())}; here the short side is 800 "
             "and the long at most 1333, unless --image-size says another")


# ------------------------------------------------------------------ key rules

def first_fit(key, rules):
    """`key` after the first of `rules`, (pattern, replacement), that fits; itself if none does;
    None where the replacement is None."""
    for pattern, replacement in rules:
        if re.search(pattern, key):
            return None if replacement is None else re.sub(pattern, replacement, key, count=1)
    return key


def rename(state, rules):
    """A state dict under other names, see first_fit: a key that no rule fits keeps its name, so
    that load_strict reports it. Raises UserError where two keys become one."""
    renamed, source = {}, {}
    for key, value in state.items():
        name = first_fit(key, rules)
        if name is None:
            continue
        if name in renamed:
            raise UserError(f"{source[name]} and {key} of this file are the same weight, {name}")
        renamed[name], source[name] = value, key
    return renamed


def crosskd_rules():
    """mmdetection 2 and 3 -> crosskd.py, for GFL, ATSS, FCOS and RetinaNet on four backbones."""
    # MobileNetV2: layer L block j is one of features 1..17; the first block has no expansion
    rules = [(r"^backbone\.conv1\.conv\.", "body.stages.0.0."),
             (r"^backbone\.conv1\.bn\.", "body.stages.0.1."),
             (r"^backbone\.conv2\.conv\.", "body.stages.18.0."),
             (r"^backbone\.conv2\.bn\.", "body.stages.18.1.")]
    expand = {"expand_conv.conv": "0.0", "expand_conv.bn": "0.1", "depthwise_conv.conv": "1.0",
              "depthwise_conv.bn": "1.1", "linear_conv.conv": "2", "linear_conv.bn": "3"}
    first = {"depthwise_conv.conv": "0.0", "depthwise_conv.bn": "0.1",
             "linear_conv.conv": "1", "linear_conv.bn": "2"}
    block = 0
    for layer, count in enumerate((1, 2, 3, 4, 3, 3, 1), 1):
        for j in range(count):
            block += 1
            for theirs, ours in (first if block == 1 else expand).items():
                pattern = rf"^backbone\.layer{layer}\.{j}\.{re.escape(theirs)}\."
                rules.append((pattern, f"body.stages.{block}.conv.{ours}."))
    # Swin: stage i is features 2i + 1, its downsampling 2i + 2
    rules += [(r"^backbone\.patch_embed\.projection\.", "body.stages.0.0."),
              (r"^backbone\.patch_embed\.norm\.", "body.stages.0.2.")]
    for i in range(4):
        stage, ours = rf"^backbone\.stages\.{i}\.", f"body.stages.{2 * i + 1}."
        rules += [(stage + r"blocks\.(\d+)\.attn\.w_msa\.", ours + r"\1.attn."),
                  (stage + r"blocks\.(\d+)\.ffn\.layers\.0\.0\.", ours + r"\1.mlp.0."),
                  (stage + r"blocks\.(\d+)\.ffn\.layers\.1\.", ours + r"\1.mlp.3."),
                  (stage + r"blocks\.(\d+)\.", ours + r"\1."),
                  (stage + r"downsample\.", f"body.stages.{2 * i + 2}."),
                  (rf"^backbone\.norm{i}\.", f"body.norms.{2 * i + 1}.")]
    # ResNet: torchvision's own names. Then FPN and head
    return rules + [
        (r"^backbone\.", "body.stages."),
        (r"^neck\.lateral_convs\.(\d)\.conv\.", r"fpn.inner_blocks.\1.0."),
        (r"^neck\.fpn_convs\.([012])\.conv\.", r"fpn.layer_blocks.\1.0."),
        (r"^neck\.fpn_convs\.3\.conv\.", "fpn.extra_blocks.p6."),
        (r"^neck\.fpn_convs\.4\.conv\.", "fpn.extra_blocks.p7."),
        (r"^bbox_head\.(cls|reg)_convs\.(\d)\.conv\.", r"head.\1_tower.\2.conv."),
        (r"^bbox_head\.(cls|reg)_convs\.(\d)\.gn\.", r"head.\1_tower.\2.norm."),
        (r"^bbox_head\.(?:gfl|atss|conv|fcos|retina)_(cls|reg)\.", r"head.\1_pred."),
        (r"^bbox_head\.(?:atss|conv|fcos)_centerness\.", "head.ctr_pred."),
        (r"^bbox_head\.scales\.(\d)\.scale$", r"head.scales.\1")]


CROSSKD = crosskd_rules()


def from_mmdet(state):
    """mmdetection's GFL, ATSS, FCOS or RetinaNet -> the same tensors under crosskd.py's names.

    state: of read_foreign. Strict: an unknown key stays and is reported by load_strict. The
    constant buffer integral.project must be 0..16 and is dropped, as is Swin's index table, which
    torchvision computes itself. Raises UserError for another kind of GFL.
    """
    kept = {}
    for key, value in state.items():
        if key.endswith("integral.project"):
            if not torch.equal(value.float(), torch.linspace(0, 16, 17)):
                raise UserError(f"{key} is not 0..16: this file is another kind of GFL")
            continue
        if key.endswith("relative_position_index"):
            continue
        if re.search(r"stages\.\d\.downsample\.(reduction|norm)\.(weight|bias)$", key):
            value = by_patches(value)
        kept[key] = value
    return rename(kept, CROSSKD)


def by_patches(weight):
    """Swin's patch merging, inputs in the last dimension: mmdetection unfolds a 2 x 2 patch channel
    by channel (TL, TR, BL, BR inside), torchvision patch by patch (TL, BL, TR, BR)."""
    if weight.ndim == 0 or weight.shape[-1] % 4:
        return weight  # load_strict names its shape
    by_channel = weight.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]
    return by_channel.transpose(-1, -2).flatten(-2)


def infer_arch(state, where):
    """dict of kind, backbone, num_classes, channels, p6 of mmdetection's GFL, ATSS, FCOS or
    RetinaNet, from its keys and shapes. Raises UserError where it is none of them."""
    pattern = r"bbox_head\.(gfl|atss|conv|fcos|retina)_cls\.bias"
    cls = [found for found in (re.fullmatch(pattern, key) for key in state) if found]
    if not cls:
        raise UserError(f"{where}: neither ours nor an mmdetection GFL, ATSS, FCOS or RetinaNet "
                        "checkpoint")
    kind = {"conv": "fcos", "retina": "retinanet"}.get(cls[0][1], cls[0][1])
    if "backbone.patch_embed.projection.weight" in state:
        backbone = "swint"
    elif "backbone.layer7.0.linear_conv.conv.weight" in state:
        backbone = "mnv2"
    elif "backbone.layer1.0.conv3.weight" in state:
        backbone = "r101" if "backbone.layer3.22.conv1.weight" in state else "r50"
    else:
        backbone = "r34" if "backbone.layer3.5.conv1.weight" in state else "r18"
    lateral = state.get("neck.lateral_convs.0.conv.weight")
    p6 = state.get("neck.fpn_convs.3.conv.weight")
    if lateral is None or p6 is None or lateral.ndim != 4 or p6.ndim != 4:
        raise UserError(f"{where}: no FPN with five levels in it")
    channels, anchors = lateral.shape[0], 9 if kind == "retinanet" else 1
    return dict(kind=kind, backbone=backbone, num_classes=state[cls[0][0]].numel() // anchors,
                channels=channels, p6="on_output" if p6.shape[1] == channels else "on_input")


def dense_arch(spec, flag, script):
    """What the detector is that a flag of crosskd.py names: a zoo name (nothing is downloaded), a
    checkpoint of ours or of mmdetection."""
    if spec in CROSSKD_ZOO:
        kind, backbone = spec.split("_")[:2]
        return dict(kind=kind, backbone=backbone, channels=256, num_classes=80)
    path = zoo_path(spec, CROSSKD_ZOO, flag)
    whose, content, *_ = load_any(path, flag, script)
    return content["arch"] if whose == "ours" else infer_arch(content, f"{flag} {path}")


def read_dense(spec, flag, script):
    """(name of the file in errors, arch, state dict, class names or None, (epoch, step) or None each)."""
    path = zoo_path(spec, CROSSKD_ZOO, flag)
    whose, content, *meta = load_any(path, flag, script)
    where = f"{flag} {path}"
    if whose == "ours":
        lacks = [k for k in ("arch", "model", "classes") if k not in content]
        if lacks:
            raise UserError(f"{where}: does not describe a network of this script (no {lacks[0]})")
        trained = content.get("epoch"), content.get("it")
        return where, content["arch"], content["model"], content["classes"], trained
    arch = infer_arch(content, where)
    # what the keys cannot tell: these variants have the same names and shapes
    config, caffe = config_of(*meta), arch["kind"] == "fcos"
    style = ("style='pytorch'", "to_rgb=True", "bgr_to_rgb=True") if caffe else (
        "style='caffe'", "to_rgb=False", "bgr_to_rgb=False", "relu_before_extra_convs=True")
    settings = "norm_on_bbox=True", "centerness_on_reg=True", "add_extra_convs='on_lateral'", *style
    guard(config, settings, where, f"this script's {arch['kind']}")
    guard_numbers(config, ANCHORS[arch["kind"]] | (CAFFE_PIXELS if caffe else PIXELS), where)
    tell_scale(config, where)
    return where, arch, from_mmdet(content), classes_of(*meta), (None, None)


TORCHVISION = [  # mmdetection 2 and 3 -> torchvision's Faster R-CNN and RetinaNet, and CascadeHeads
    (r"^backbone\.(.*conv2)_offset\.", r"backbone.body.\1.conv_offset."),
    (r"^backbone\.", "backbone.body."),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.([012])\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
    (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^roi_head\.bbox_head\.(\d)\.shared_fcs\.0\.", r"roi_heads.heads.\1.fc6."),
    (r"^roi_head\.bbox_head\.(\d)\.shared_fcs\.1\.", r"roi_heads.heads.\1.fc7."),
    (r"^roi_head\.bbox_head\.(\d)\.fc_cls\.", r"roi_heads.cls.\1."),
    (r"^roi_head\.bbox_head\.(\d)\.fc_reg\.", r"roi_heads.reg.\1."),
    (r"^bbox_head\.cls_convs\.(\d)\.conv\.", r"head.classification_head.conv.\1.0."),
    (r"^bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
    (r"^bbox_head\.reg_convs\.(\d)\.conv\.", r"head.regression_head.conv.\1.0."),
    (r"^bbox_head\.retina_reg\.", "head.regression_head.bbox_reg."),
    (r"^neck\.fpn_convs\.4\.conv\.", "backbone.fpn.extra_blocks.p7."),
]  # and neck.fpn_convs.3, which is P6 in RetinaNet, P5 in Faster R-CNN


def to_torchvision(state, where):
    """(name, number of classes, state dict) of mmdetection's Faster R-CNN, RetinaNet or Cascade
    (Mask) R-CNN; name as prototype_kd.build takes it: faster_r50, cascade_x101_32x4d_dcn, ...

    state: of read_foreign. The mask head is left out. Raises UserError for any other detector.
    """
    retina = "bbox_head.retina_cls.bias" in state
    cascade = "roi_head.bbox_head.2.fc_cls.bias" in state
    last = "bbox_head.retina_cls.bias" if retina else (
        f"roi_head.bbox_head.{'0.' * cascade}fc_cls.bias")
    blocks = len({k.split(".")[2] for k in state if k.startswith("backbone.layer3.")})
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    bodies = {(2, False): "r18", (6, False): "r34", (6, True): "r50", (23, True): "r101",
              (36, True): "r152"}
    if last not in state or (blocks, bottleneck) not in bodies:
        raise UserError(f"{where}: neither a checkpoint of this script nor mmdetection's "
                        "Faster R-CNN, RetinaNet or Cascade R-CNN on a ResNet")
    body, conv2 = bodies[blocks, bottleneck], state.get("backbone.layer1.0.conv2.weight")
    if conv2 is not None and conv2.ndim == 4 and 0 < conv2.shape[1] <= 32:  # 64 in one group
        deformable = any("conv2.conv_offset" in k or "conv2_offset" in k for k in state)
        body = "x101_32x4d_dcn" if deformable else "x101_32x4d"
    third = "backbone.fpn.extra_blocks.p6." if retina else "backbone.fpn.layer_blocks.3.0."
    kept = {}
    for key, value in state.items():
        if "mask_head" not in key and not key.endswith("num_batches_tracked"):
            kept[key] = value
    ours = rename(kept, TORCHVISION + [(r"^neck\.fpn_convs\.3\.conv\.", third)])
    for key, value in ours.items():
        if value.ndim == 0:
            continue
        if re.search(r"box_predictor\.cls_score\.|roi_heads\.cls\.\d", key):
            ours[key] = value.roll(1, 0)  # their background is the last class, here it is the first
        elif "box_predictor.bbox_pred" in key:
            ours[key] = torch.cat([value[:4] * 0, value])  # boxes of the background, never used
    count = state[last].numel()
    count = count // 9 if retina else count - 1
    return f"{'cascade' if cascade else 'retina' if retina else 'faster'}_{body}", count, ours


def torchvision_arch(name):
    """What one of torchvision's own COCO detectors is: COCO's ids are outputs, some of which no class has."""
    categories = torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
    named = [(k, n) for k, n in enumerate(categories) if n not in ("__background__", "N/A")]
    return dict(name=name, mmdet=False, classes=[n for _, n in named], columns=[k for k, _ in named],
                outputs=len(categories))


def check_columns(arch, where):
    """Of a checkpoint of prototype_kd.py: each class has an output of its own and a name, or none of them has
    one."""

    columns, names = arch["columns"], arch["classes"]
    if sorted(set(columns)) != columns or not columns or not 0 <= columns[0] <= columns[-1] < arch["outputs"]:
        raise UserError(f"{where}: says that classes have the outputs {columns} of {arch['outputs']}")
    if not all(isinstance(arch.get(k, False), bool) for k in ("mmdet", "plain_norm")):
        raise UserError(f"{where}: its mmdet or plain_norm is neither true nor false")
    if names is not None and (len(names) != len(columns) or not all(isinstance(n, str) for n in names)):
        raise UserError(f"{where}: names {len(names)} classes, its head has {len(columns)}")


def read_torchvision(spec, flag, script):
    """(name of the file in errors, arch, state dict, (epoch, step) or None each) of a name in PROTOTYPE_ZOO,
    an mmdetection .pth or a checkpoint of prototype_kd.py, under torchvision's names. arch: see its load."""
    path = zoo_path(spec, PROTOTYPE_ZOO, flag)
    whose, *content = load_any(path, flag, script)
    where = f"{flag} {path}"
    if whose == "ours":
        trained = tuple(content[0].get(k) for k in ("epoch", "it"))  # of a best.pt
        with rebuilding(where):
            check_columns(content[0]["arch"], where)
        return where, content[0]["arch"], content[0]["model"], trained
    state, meta = content
    if spec in PROTOTYPE_ZOO and PROTOTYPE_ZOO[spec] is None:
        return where, torchvision_arch(spec), state, (None, None)
    name, count, state = to_torchvision(state, where)
    # what the keys cannot tell: BGR pixels and other strides
    settings = "style='caffe'", "to_rgb=False", "bgr_to_rgb=False"
    guard(config_of(meta), settings, where, f"this script's {name}", "; use one in pytorch's style")
    kind = dict(retina="retinanet").get(name.split("_")[0], name.split("_")[0])
    guard_numbers(config_of(meta), ANCHORS[kind] | PIXELS, where)
    tell_scale(config_of(meta), where)
    classes, first = classes_of(meta), 0 if name.startswith("retina") else 1
    arch = dict(name=name, mmdet=True, classes=list(classes) if classes else None,
                columns=list(range(first, first + count)), outputs=first + count)
    return where, arch, state, (None, None)


RENAMED = [  # mmdetection 3's Deformable DETR, the authors' release (mmdetection 2) -> dkdetr.py
    (r"^backbone\.(conv1|bn1|layer\d)\.", r"body.stages.\1."),
    (r"^neck\.convs\.(\d)\.conv\.", r"neck.\1.0."),
    (r"^neck\.convs\.(\d)\.gn\.", r"neck.\1.1."),
    (r"^neck\.extra_convs\.0\.conv\.", r"neck.3.0."),
    (r"^neck\.extra_convs\.0\.gn\.", r"neck.3.1."),
    (r"^(bbox_head\.transformer\.)?level_embeds?$", "level_embed"),
    (r"^(memory_trans_fc|bbox_head\.transformer\.enc_output)\.", "memory_trans."),
    (r"^(memory_trans_norm|bbox_head\.transformer\.enc_output_norm)\.", "memory_norm."),
    (r"^(pos_trans_fc|bbox_head\.transformer\.pos_trans)\.", "query_trans."),
    (r"^(pos_trans_norm|bbox_head\.transformer\.pos_trans_norm)\.", "query_norm."),
    (r"^bbox_head\.reg_branches\.", "refine."),
    (r"^bbox_head\.cls_branches\.6\.", "objectness."),
    (r"^bbox_head\.cls_branches\.", "project."),
    (r"^bbox_head\.transformer\.seg_encoder\.layers\.0\.attentions\.0\.",
     "mask_head.encoder.attention."),
    (r"^bbox_head\.transformer\.seg_encoder\.layers\.0\.", "mask_head.encoder."),
    (r"^bbox_head\.transformer\.mask_trans\.", "mask_head.trans."),
    (r"^bbox_head\.transformer\.mask_trans_norm\.", "mask_head.norm."),
    (r"^bbox_head\.seg_branches\.0\.", "mask_head.weights."),
    (r"^bbox_head\.seg_branches\.\d\.", None),  # six names of one module
    (r"^bbox_head\.transformer\.(encoder|decoder)\.", r"\1."),
    (r"^text_encoder\.", None),                 # the vocabulary that was saved along
]
INNER = [  # then each of these, inside encoder and decoder
    (r"(encoder\.layers\.\d)\.attentions\.0\.", r"\1.attention."),
    (r"(decoder\.layers\.\d)\.attentions\.0\.attn\.", r"\1.self_attention."),
    (r"(decoder\.layers\.\d)\.attentions\.1\.", r"\1.attention."),
    (r"(encoder\.layers\.\d)\.self_attn\.", r"\1.attention."),
    (r"(decoder\.layers\.\d)\.self_attn\.attn\.", r"\1.self_attention."),
    (r"\.cross_attn\.", ".attention."),
    (r"\.ffns?(\.0)?\.layers\.0\.0\.", ".ffn.0."),
    (r"\.ffns?(\.0)?\.layers\.1\.", ".ffn.3."),
    (r"coder\.layers\.", "coder."),
]


def to_dkdetr(state):
    """(state dict, keys that have no place here) of mmdetection's two-stage, box-refining
    Deformable DETR or of the authors' DK-DETR, under dkdetr.py's names.

    state: of read_foreign. Of the objectness layer only channel 0 is used, there too.
    """
    ours, unknown = {}, []
    for key, value in state.items():
        name = first_fit(key, RENAMED)
        if name is None or key.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in INNER:
            name = re.sub(pattern, replacement, name)
        if name.startswith("objectness.") and value.ndim:
            value = value[:1]
        if name == key and name != "level_embed":
            unknown.append(key)
        ours[name] = value
    return ours, unknown


# ------------------------------------------------------------------ modules that only they need

def fp32(x):
    """bf16 maps of autocast -> fp32; fp64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class AlignedPool(nn.Module):
    """mmdetection's RoI pooling: RoIAlign aligned, as many samples as a bin has cells, on levels 0
    to 3. Takes MultiScaleRoIAlign's place."""

    def forward(self, maps, boxes, image_sizes):
        """maps: {"0".."3": (B, D, h, w)}, strides 4 to 32; boxes: B of (n, 4) xyxy pixels ->
        (sum of n, D, 7, 7)."""
        rois = torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)])
        level = self.level(rois[:, 1:])
        out = rois.new_zeros(len(rois), maps["0"].shape[1], 7, 7)
        for k in range(4):
            here = (level == k).nonzero()[:, 0]
            pooled = roi_align(maps[str(k)], rois[here], 7, 1 / 2 ** (k + 2), sampling_ratio=0,
                               aligned=True)
            out = out.index_put((here,), pooled)
        return out

    def level(self, boxes):
        """0 to 3 of boxes (n, 4). Side 112 is the border of levels 0 and 1 (FPN's Eq. 1)."""
        w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        side = (w.clamp(min=0) * h.clamp(min=0)).sqrt()
        return (side / 56).clamp(min=1e-6).log2().add(1e-6).floor().clamp(0, 3).long()


class ExactAnchors(AnchorGenerator):
    """mmdetection's anchors: not rounded to whole pixels, and a cell of level l is strides[l]
    pixels wide; torchvision's is the image over the map, 61 pixels instead of 64 where an image of
    800 has a map of 13. sides: of each level; ratios 0.5, 1, 2."""

    def __init__(self, sides, strides):
        super().__init__(sides, ((0.5, 1.0, 2.0),) * len(sides))
        self.strides = strides
        h = torch.tensor(self.aspect_ratios[0]).sqrt()[:, None]
        self.cell_anchors = []
        for level in sides:
            half_w = (torch.tensor(level) / h).flatten() / 2
            half_h = (torch.tensor(level) * h).flatten() / 2
            self.cell_anchors.append(torch.stack([-half_w, -half_h, half_w, half_h], 1))

    def forward(self, images, maps):
        self.set_cell_anchors(maps[0].dtype, maps[0].device)
        steps = [[constant(s, maps[0].device, torch.int64)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors([m.shape[-2:] for m in maps], steps))
        return [anchors] * len(images.image_sizes)


class PlainP6P7(LastLevelP6P7):
    """P7 from P6 without the ReLU, as in mmdetection's RetinaNet."""

    def forward(self, p, c, names):
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return p + [p6, self.p7(p6)], names + ["p6", "p7"]


class DeformConv(nn.Conv2d):
    """Deformable 3 x 3 convolution (Dai et al. 2017) in the place of `conv`: a plain convolution
    says where each of the nine taps reads."""

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, 3, conv.stride, 1,
                         groups=conv.groups, bias=False)
        self.conv_offset = nn.Conv2d(conv.in_channels, 18, 3, conv.stride, 1)

    def forward(self, x):
        offset = fp32(self.conv_offset(x))
        with torch.autocast(x.device.type, enabled=False):  # it has no bf16 kernel on the CPU
            return deform_conv2d(fp32(x), offset, self.weight, None, self.stride, self.padding)


class CascadeHeads(nn.Module):
    """Three box heads (Cai and Vasconcelos 2018), class-agnostic boxes, each working on the boxes
    of the one before; only for teachers: no training. Takes the place of torchvision's RoIHeads."""
    WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0),
               (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067))  # mmdetection's

    def __init__(self, dim, outputs):
        super().__init__()
        self.box_roi_pool = AlignedPool()
        self.heads = nn.ModuleList(TwoMLPHead(dim * 49, 1024) for _ in range(3))
        self.cls = nn.ModuleList(nn.Linear(1024, outputs) for _ in range(3))
        self.reg = nn.ModuleList(nn.Linear(1024, 4) for _ in range(3))

    def logits(self, maps, boxes, image_sizes):
        """The heads' mean logits on the boxes as they are (R, C + 1): what is distilled."""
        x = self.box_roi_pool(maps, boxes, image_sizes)
        return torch.stack([c(h(x)) for h, c in zip(self.heads, self.cls)]).mean(0)

    def forward(self, maps, boxes, image_sizes):
        """Detections of each image, as torchvision's RoIHeads returns them."""
        scores, counts = 0, [len(b) for b in boxes]
        for head, cls, reg, weights in zip(self.heads, self.cls, self.reg, self.WEIGHTS):
            x = head(self.box_roi_pool(maps, boxes, image_sizes))
            scores = scores + cls(x) / 3  # mmdetection averages the logits
            moved = BoxCoder(weights).decode(reg(x), boxes)[:, 0].split(counts)
            boxes = [clip_boxes_to_image(b, size) for b, size in zip(moved, image_sizes)]
        found = []
        for b, s in zip(boxes, scores.softmax(-1).split(counts)):
            roi, label = (s[:, 1:] > 0.05).nonzero(as_tuple=True)
            b, s, label = b[roi], s[roi, label + 1], label + 1
            keep = batched_nms(b, s, label, 0.5)[:100]
            found.append(dict(boxes=b[keep], scores=s[keep], labels=label[keep]))
        return found, {}


class ShiftedAttention(ShiftedWindowAttention):
    """Swin's shifted windows (Liu et al. 2021, Sec. 3.2), shifted on maps of one window, too.

    torchvision leaves out the shift along an axis on which the padded map is no longer than the
    window, as the authors' classifier does; mmdetection and the authors' detectors do not: two
    answers from the same weights, on small images. Where torchvision shifts, its own code runs.
    """

    def forward(self, x):
        """x: (B, H, W, C) -> the same shape."""
        (_, height, width, _), (wh, ww) = x.shape, self.window_size
        if height > wh and width > ww:
            return super().forward(x)
        x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh))
        shift = tuple(self.shift_size)
        x = x.roll((-shift[0], -shift[1]), (1, 2))
        x = self.attend(x, self.came_over(x.shape[1:3], x.device))
        return x.roll(shift, (1, 2))[:, :height, :width].contiguous()

    def came_over(self, size, device):
        """(H, W) int, 0 to 3: of each cell of the rolled map, over which borders of the real one it
        came. Inside a window only cells that came alike touch in the real map."""
        down, right = (torch.arange(length, device=device) >= length - shift
                       for length, shift in zip(size, self.shift_size))
        return 2 * down.long()[:, None] + right.long()

    def attend(self, x, region):
        """Attention inside each window of (B, H, W, C), between cells of one region (H, W)."""
        batch, height, width, channels = x.shape
        (wh, ww), heads = self.window_size, self.num_heads
        rows, columns = height // wh, width // ww
        x = x.view(batch, rows, wh, columns, ww, channels).transpose(2, 3)
        x = x.reshape(batch * rows * columns, wh * ww, channels)             # (windows, T, C)
        region = region.view(rows, wh, columns, ww).transpose(1, 2).reshape(-1, wh * ww)
        apart = region[:, None, :] != region[:, :, None]                     # (rows columns, T, T)
        mask = torch.zeros(apart.shape, dtype=x.dtype, device=x.device).masked_fill(apart, -100.0)
        qkv = self.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)                                              # (.., heads, T, d)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        logits = logits + self.get_relative_position_bias()                  # of (1, heads, T, T)
        logits = (logits.unflatten(0, (batch, -1)) + mask[:, None]).flatten(0, 1)
        weight = F.dropout(logits.softmax(-1), self.attention_dropout, self.training)
        x = (weight @ v).transpose(1, 2).flatten(2)                          # (windows, T, C)
        x = F.dropout(self.proj(x), self.dropout, self.training)
        x = x.view(batch, rows, columns, wh, ww, channels).transpose(2, 3)
        return x.reshape(batch, height, width, channels)


def always_shift(swin):
    """Make every shifted attention of torchvision's swin_t, _s or _b shift on maps of any size, as
    mmdetection's does: same weights and names, in place. Returns swin."""
    for module in swin.modules():
        if type(module) is ShiftedWindowAttention and sum(module.shift_size) > 0:
            module.__class__ = ShiftedAttention
    return swin
