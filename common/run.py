# SPDX-License-Identifier: MIT
"""What a run needs around its method: processes, flags, checkpoints, the run folder, errors in one line.

A script keeps its model, its order and its step (forward, backward, optimizer.step); `Run` keeps
how far the run is:

    with started("crosskd.py") as (rank, world, device):  # joins the processes; errors: one line
        run = Run(args, student, optimizer, plain, batches, total_batch, rank, world, device)
        while True:
            if run.due:
                run.scored(*evaluate(...), val)           # log, best.pt, result files
            if run.finished:
                break
            for batches in run.batches(loader, plan):     # the rest of an epoch, step by step
                ...                                       # the script's own step
                run.step(losses, lr)                      # log, and last.pt now and then
            run.end_epoch()

This file needs no other file of `common`; pictures.py is imported when an evaluation is written.
"""
import argparse
import copy
import ctypes
import hashlib
import json
import math
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from inspect import signature
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: runs there are not locked
    fcntl = None

FORMAT = 1  # of our checkpoints
tqdm.monitor_interval = 0  # its thread looks through all bars, and may fall over one that is closed meanwhile


class UserError(Exception):
    """A wrong flag, file, checkpoint or machine: one line with the remedy, no traceback."""


class Stopped(BaseException):
    """SIGINT or SIGTERM: the run leaves, with a line that says how to go on. quiet: another
    process says it."""

    def __init__(self, number, text, quiet=False):
        super().__init__(text)
        self.number, self.quiet = number, quiet


# ------------------------------------------------------------------ processes

def init_ddp():
    """(rank, world, device). Joins torchrun's group, or is rank 0 of 1 when run with plain python."""
    rank, local, world = (int(os.environ.get(k, d)) for k, d in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions use it by default
    else:
        keep_memory()
    if world > 1 and not dist.is_initialized():
        hours = timedelta(hours=3)  # rank 0 may score LVIS alone for longer than nccl's ten minutes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=hours)
    return rank, world, device


def keep_memory():
    """CPU runs: keep freed memory in the process. glibc returns each large tensor to the kernel,
    which hands its pages out anew, zeroed, at the next step: 10 to 30 % of a training step here.
    Does nothing where libc is another."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)   # M_MMAP_MAX: large blocks come from the heap, too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap does not shrink


@contextmanager
def started(script):
    """with started("crosskd.py") as (rank, world, device): joins the processes and leaves them.

    A wrong flag or file, a full disk, a lost process end in one line on stderr and a non-zero exit,
    a signal in 128 + its number; a fault of ours keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # names that the terminal's encoding lacks are no error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    def stop(number, frame):  # before there is a Run, which knows better, and after it
        if os.getpid() == pid:
            raise Stopped(number, f"stopped by {signal.Signals(number).name}; no step was under way")
    pid, before = os.getpid(), None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield init_ddp()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except (Stopped, KeyboardInterrupt) as e:
        code = 128 + getattr(e, "number", signal.SIGINT)
        line = str(e) or "stopped by SIGINT"
        line = "" if getattr(e, "quiet", False) else line
    except Exception as e:
        line, code = explain(e), 1
        if not line:
            raise
    finally:
        for run in list(ACTIVE):
            run.release()
        for folder in list(LOCKS):
            unlock(folder)
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    # what threads of torch's loaders have to say of their own end
    sys.excepthook = sys.unraisablehook = lambda *_: None
    if line:
        print(f"\n{script}: {line}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # no destructors: they would wait for the others
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


LOST = (r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|[Gg]loo|NCCL|ProcessGroup|TCPStore|"
        r"[Ss]ocket [Tt]imeout|Timed out waiting|[Tt]he client socket")


def explain(error):
    """The line that an exception is worth; "" for a fault of ours, whose traceback is wanted."""
    text, system = str(error).strip(), isinstance(error, (OSError, RuntimeError))
    if text.startswith("Caught "):  # by a loader process, whose traceback stands before its last line
        text = text.splitlines()[-1]
    if isinstance(error, UserError):
        return shorten(re.sub(r"^[\w.]+Error: ", "", text.splitlines()[-1]), 600)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return ("out of GPU memory; lower --batch-size (and raise --accumulate), lower --image-size, "
                "or use --amp bf16")
    if isinstance(error, MemoryError) or system and "can't allocate memory" in text:
        return "out of memory; lower --batch-size or --workers"
    if system and re.search(r"Too many open files|ancdata", text):
        return ("too few file descriptors for the loader processes: raise `ulimit -n`, or use "
                "--workers 0")
    if system and re.search(r"Bus error|shared memory|/dev/shm|</?torch_|shm_open", text):
        return ("/dev/shm is too small for the loader processes: docker run --shm-size 8g, or use "
                "--workers 0")
    if isinstance(error, RuntimeError) and re.search(r"DataLoader worker \(pid", text):
        return (f"a loader process died ({why(error)}); out of memory? Use fewer --workers; "
                "last.pt is intact: --resume")
    if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and dist.is_initialized() and re.search(LOST, text)):
        return (f"another process of this run is gone or cannot be reached ({why(error)}); its own "
                "line says why, last.pt is intact: --resume continues")
    if isinstance(error, OSError):
        names = [shorten(str(n)) for n in (error.filename, error.filename2) if n is not None]
        return f"{' -> '.join(names) or 'the system'}: {error.strerror or why(text or error)}"
    return ""


def shorten(text, most=120):
    return text if len(text) <= most else f"{text[:most // 2]}...{text[-most // 2:]}"


def why(error):
    """First line of an exception's text, or its name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:80]


def reduce_mean(x, at_least=0.0):
    """Mean of a tensor over processes, without gradient; at_least bounds the SUM over processes.

    For normalisers: DDP averages gradients over ranks, so loss_r / mean_r(count_r), averaged, is the
    loss of the whole batch over the count of the whole batch. (A bound on the mean, mmdetection's
    choice, would depend on the processes.)
    """
    x = x.detach().clone()
    if not (dist.is_available() and dist.is_initialized()):
        return x.clamp(min=at_least) if at_least else x
    dist.all_reduce(x)
    return (x.clamp(min=at_least) if at_least else x) / dist.get_world_size()


def gather(items):
    """The lists of all processes, concatenated, on rank 0; None elsewhere. Every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(items, parts)
    return sum(parts, []) if parts else None


def barrier():
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def wrap_ddp(module, device, world):
    """DistributedDataParallel where there are several processes, else the module itself. Buffers are
    only sent around where a BatchNorm learns some."""
    if world == 1:
        return module
    options, batch_norm = {}, torch.nn.modules.batchnorm._BatchNorm
    learnt = any(isinstance(m, batch_norm) and m.training for m in module.modules())
    new = "forward_sync_buffers" in signature(torch.nn.parallel.DistributedDataParallel).parameters
    options["forward_sync_buffers" if new else "broadcast_buffers"] = learnt  # the old name until 2.13
    if device.type == "cuda":
        options |= dict(device_ids=[device.index], gradient_as_bucket_view=True)
    return torch.nn.parallel.DistributedDataParallel(module, **options)


def fast_layout(module, device):
    """Weights in NHWC order where that is faster: on GPUs, and on CPUs for wide networks (ResNet-50: 7 %
    less a step; of 8 channels: 12 % more). The order of pixels in memory changes no result by more than
    rounding."""
    convolutions = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    wide = any(min(m.in_channels, m.out_channels) >= 256 and max(m.in_channels, m.out_channels) >= 512
               for m in convolutions)  # not a narrow head of many classes
    if wide or device.type == "cuda":
        module.to(memory_format=torch.channels_last)


def fused():
    """Options of an optimizer: on GPUs its step is one kernel."""
    return dict(fused=True) if torch.cuda.is_available() else {}


def to_device(batch, device):
    """The batch, or batches of several kinds, with tensors on the device; the copy waits for nothing."""
    moved = {}
    for k, v in batch.items():
        if isinstance(v, dict):
            v = to_device(v, device)
        moved[k] = v.to(device, non_blocking=True) if torch.is_tensor(v) else v
    return moved


def tell(text):
    """A line that concerns the user and stops nothing; of one process."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


def seed_all(seed):
    random.seed(seed)
    torch.manual_seed(seed)


def warmup_multistep(it, iters_per_epoch, milestones, warmup=500, start=0.001, constant=False):
    """Learning-rate factor of iteration `it`: x 0.1 at each milestone (epochs), times a warm-up.

    Linear: `start` at it 0, 1 at it warmup - 1. Constant: `start` until it warmup - 2. A pure
    function of `it`, so there is no schedule state to save.
    """
    factor = 0.1 ** sum(it >= m * iters_per_epoch for m in milestones)
    if it < warmup - 1:
        factor *= start if constant else start + (1 - start) * it / (warmup - 1)
    return factor


# ------------------------------------------------------------------ flags

class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action):
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


def number(kind=float, low=0, high=math.inf, above=False, below=False):
    """argparse type: a finite int or float of at least `low` (or above it) and at most `high` (or
    below it)."""
    least = f"above {low}" if above else f"at least {low}"
    most = "" if high == math.inf else f" and below {high}" if below else f" and at most {high}"
    what = "positive" if above and (low, high) == (0, math.inf) else least + most

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: expected {wanted}") from None
        enough = low < value if above else low <= value
        fits = value < high if below else value <= high
        if not (abs(value) <= 1e30 and enough and fits):  # float32 ends at 3e38, squares before
            raise argparse.ArgumentTypeError(f"{text}: must be {what}")
        return value
    return parse


COUNT = number(int, 1, 2**31)
POSITIVE = number(float, 0, above=True)
SEED = number(int, 0, 2**32 - 1)


def parser(doc, examples):
    """ArgumentParser of a script: its docstring's first line, one line of usage, three commands."""
    epilog = "examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")
    return argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=Help,
                                   usage="%(prog)s [flags], all with a default", epilog=epilog)


def run_flags(p, name, aliases={}, rows=None, export=False):
    """The flags that all scripts have: where own data are, and how to run. aliases: {flag: another
    name of it}. rows: of `rows`."""
    def flag(group, name, **options):
        names = [f"--{n}" for n in (name, aliases.get(name)) if n]
        group.add_argument(*names, dest=name.replace("-", "_"), **options)

    g = p.add_argument_group("own data, instead of --data's layout")
    flag(g, "train-json", metavar="JSON", help="COCO-format boxes to train on")
    flag(g, "train-images", metavar="DIR", help="their images")
    flag(g, "val-json", metavar="JSON", help="boxes to evaluate on; without: best.pt is the last")
    flag(g, "val-images", metavar="DIR", help="their images")
    flag(g, "keep-empty", action="store_true", help="images without boxes are negatives")
    g = p.add_argument_group("run")
    flag(g, "out", metavar="DIR", help=f"run folder (default runs/{name}, runs/{name}-eval, ...)")
    flag(g, "max-iters", type=COUNT, help="stop after so many steps; the schedule stays")
    flag(g, "eval-every", type=COUNT, metavar="N", help="epochs between evaluations (default a "
         "twelfth of the run; shapes: at the end)")
    flag(g, "accumulate", type=COUNT, default=1, help="micro-batches per step")
    flag(g, "workers", type=number(int, 0, 512), default=2, help="loader processes per process")
    flag(g, "seed", type=SEED, default=0)
    flag(g, "amp", choices=("none", "bf16"), default="none", help="autocast; losses stay fp32")
    flag(g, "compile", action="store_true", help="torch.compile the networks")
    flag(g, "log-every", type=COUNT, default=50, help="steps between log lines and NaN checks")
    flag(g, "save-every", type=COUNT, default=500, help="steps between writes of last.pt, beside "
         "one at each evaluation")
    flag(g, "resume", action="store_true", help="continue --out's last.pt, with its flags")
    flag(g, "retrain", action="store_true", help="shapes: train anew what comes ready-made (tiny CLIP, "
         "backbones, detectors)")
    flag(g, "eval", metavar="WEIGHTS", help="metrics of a checkpoint")
    flag(g, "predict", nargs="+", metavar="IMAGE", help="images or folders: boxes as json and "
         "pictures into --out")
    flag(g, "weights", metavar="FILE", help="the checkpoint for --predict" + " or --export" * export)
    flag(g, "score", type=number(float, 0, 1), default=0.3, help="--predict: boxes above it")
    if export:
        flag(g, "export", metavar="FILE", help="write --weights as student.pt2 (torch.export) or .onnx")
    if rows:
        flag(g, "row", metavar="NAME", help="a row of the paper's tables; flags given beside it win")
        flag(g, "rows", action="store_true", help="list them with the paper's numbers")
    flag(g, "local-rank", type=int, help=argparse.SUPPRESS)  # of torch.distributed.launch


# What --resume may change. The rest is what the run is: a value that differs is refused.
ADJUSTABLE = """out max_iters eval_every accumulate batch_size stage1_batch workers amp compile
    log_every save_every resume data train_json train_images val_json val_images epochs
    stage1_epochs lr stage1_lr weight_decay no_teacher_check table checkpoint retrain""".split()
ALWAYS = "out amp image_size".split()  # --eval and --predict read them


def rows(text, **short):
    """{name: (number, flags, remark)} of lines as `t1-i0  38.2  SMALL --kd-layer 0  # remark`. short:
    what words as SMALL stand for."""
    found = {}
    for line in filter(None, map(str.strip, text.split("\n")[1:])):
        line, _, remark = line.partition("  # ")
        name, number, flags = line.split(None, 2)
        for word, meaning in short.items():
            flags = flags.replace(word, meaning)
        found[name] = number, flags.strip(), remark
    return found


def row_flags(p, rows, name):
    """{destination: value} of a row's flags."""
    if name not in rows:
        p.error(f"--row {name}: there is no such row; --rows lists them")
    argv = shlex.split(rows[name][1])
    values = vars(p.parse_args(argv))
    return {k: values[k] for k in given_flags(p, argv)}


def print_rows(p, rows):
    """The table of --rows: name, the paper's number, flags."""
    name = max(map(len, rows))
    number = max(5, *(len(r[0]) for r in rows.values()))
    print(f"{'--row':{name}s}  {'paper':{number}s}  flags")
    for key, (value, flags, remark) in rows.items():
        print(f"{key:{name}s}  {value:{number}s}  {flags}" + (f"   # {remark}" if remark else ""))


def dash(flag):
    return "--" + flag.replace("_", "-")


def given_flags(p, argv, rows=None):
    """The destinations of the flags that stand in argv; with rows also of those of its --row."""
    unset = object()
    blank = argparse.Namespace(**{a.dest: unset for a in p._actions})
    for a in p._actions:
        if isinstance(a, argparse._AppendAction):
            setattr(blank, a.dest, None)
    found = vars(p.parse_args(argv, blank))
    found = {k for k, v in found.items() if v is not unset and v is not None}
    if rows and "row" in found:
        found |= set(row_flags(p, rows, p.parse_args(argv).row))
    return found


def as_json(value):
    """A tuple is a list in args.json."""
    return list(value) if isinstance(value, tuple) else value


def with_defaults(args, defaults):
    """The flags, those that were not given from `defaults`, whose rate is for its own optimizer."""
    found = {k: v for k, v in defaults.items() if getattr(args, k) is None}
    if "lr" in found and args.optimizer not in (None, defaults["optimizer"]):
        raise UserError(f"--optimizer {args.optimizer}: give its --lr, too; the default, {found['lr']:g}, "
                        f"is for {defaults['optimizer']}")
    return argparse.Namespace(**vars(args) | found)


def parse(p, argv, name, modes, only="weights score", belongs=(), apart=(), saved=None, rows=None):
    """Flags given now > those of the run that --resume continues > defaults. What cannot have an
    effect is refused, or, with --eval and the like, said in a line.

    modes: {mode flag: flags that it reads beside ALWAYS}, as dict(predict="weights score"). only:
    flags that training does not read. belongs: (flags, other flag, its values that give them an
    effect; None: not given). apart: flags of which one can be given. saved: function (args) -> flags
    of the run that is continued. rows: of `rows`; the flags of --row are defaults.
    """
    args, given = p.parse_args(argv), given_flags(p, argv)
    if rows and args.rows:
        print_rows(p, rows)
        p.exit()
    if rows and args.row:
        p.set_defaults(**row_flags(p, rows, args.row))
        args = p.parse_args(argv)
    mode = [m for m in modes if getattr(args, m)]
    parts = [name, *(m.replace("_", "-") for m in mode[:1])]
    if rows and args.row:
        parts.append(args.row)
    args.out = args.out or "runs/" + "-".join(parts)
    refuse_pairs(p, args, given, mode, modes, apart)
    if mode:
        read = {*modes[mode[0]].split(), mode[0], "row"} | {*ALWAYS * (mode[0] != "export")}
        idle = sorted(given - read)
        if "resume" in idle:
            p.error(f"--resume: continues a training; it cannot go with {dash(mode[0])}")
        if idle and int(os.environ.get("RANK", 0)) == 0:
            flags = ", ".join(map(dash, idle))
            print(f"note: with {dash(mode[0])} there is no effect of {flags}", file=sys.stderr)
        return args
    for flag in sorted(given & set(only.split())):
        theirs = " or ".join(dash(m) for m in modes if flag in modes[m].split())
        p.error(f"{dash(flag)}: belongs to {theirs}")
    if args.resume:
        last = Path(args.out) / "last.pt"
        old = saved(args) if saved else saved_flags(last, f"{name}.py") if last.exists() else {}
        p.set_defaults(**{k: v for k, v in old.items() if k not in {"resume", "retrain", "out", *given}})
        args = argparse.Namespace(**vars(p.parse_args(argv)) | dict(out=args.out))
        for flag in sorted(given - set(ADJUSTABLE)):
            now = getattr(args, flag)
            if flag in old and as_json(now) != as_json(old[flag]):
                p.error(f"{dash(flag)} {now}: the run in {args.out} has {old[flag]}, "
                        "which --resume keeps; start another --out to change it")
    if getattr(args, "retrain", False):
        if args.data != "shapes":
            p.error("--retrain: belongs to --data shapes")
        if not args.resume:  # a run that goes on keeps what it began with
            os.environ["DETECTION_RETRAIN"] = "1"  # read by `there`, and by tiny.py
    asked, given = given, given_flags(p, argv, rows)
    for flags, other, values in belongs:
        value = getattr(args, other)
        parts = value.split("+") if isinstance(value, str) else [value]  # as --method crosskd+pkd
        idle = [f for f in flags.split() if f in given]
        if idle and not set(parts) & set(values):
            wanted = " or ".join(dash(other) + ("" if v is True else f" {v}")
                                 for v in values if v is not None)
            if not set(idle) & asked and other in asked:  # a flag wins over its row
                tell(f"{dash(idle[0])} of --row {args.row}: has no effect, {dash(other)} is {value}")
                continue
            p.error(f"{dash(idle[0])}: belongs to {wanted}, here it is {value}")
    return args


def refuse_pairs(p, args, given, mode, modes, apart):
    """Stops with a line where flags that were given contradict each other."""
    if args.local_rank is not None:
        p.error("--local-rank comes from torch.distributed.launch: start with torchrun")
    if len(mode) > 1:
        p.error(f"{', '.join(map(dash, modes))}: one at a time")
    for flags in apart:
        both = [f for f in flags.split() if f in given]
        if len(both) > 1:
            p.error(f"{dash(both[0])} and {dash(both[1])}: one of them")
    reads = [flag for flag in ("predict", "export") if getattr(args, flag, None)]
    if reads and not args.weights:
        p.error(f"{dash(reads[0])} needs --weights: a checkpoint")
    if args.weights and not reads:
        p.error("--weights: belongs to --predict; --eval takes its weights directly, --init is where "
                "a training starts")
    for flag, other in (("train_json", "train_images"), ("val_json", "val_images")):
        if flag in given and getattr(args, other) is None and not args.resume:
            p.error(f"{dash(flag)} needs {dash(other)}, the folder of its images")
        others = hasattr(args, "val_boxes")  # simple21k.py: boxes of another kind
        if other in given and getattr(args, flag) is None and not args.resume and not others:
            p.error(f"{dash(other)} needs {dash(flag)}, the boxes of its images")


# ------------------------------------------------------------------ checkpoints of ours

@contextmanager
def whole(path, mode="wb", **options):
    """with whole(path) as file: the file appears whole, under its name, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path, text):
    """A text file, whole or not at all. text: a str, or its parts."""
    try:
        with whole(path, "w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
    except OSError as e:
        raise UserError(f"{path}: not written ({why(e)})") from None


def checksum(value):
    """sha256 of nested dicts, lists, tensors and plain values."""
    digest = hashlib.sha256()

    def add(v):
        if torch.is_tensor(v):
            digest.update(f"{v.dtype}{tuple(v.shape)}".encode())
            if v.numel():
                digest.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(v, dict):
            digest.update(b"{")
            for k in sorted(v, key=repr):
                digest.update(repr(k).encode())
                add(v[k])
        elif isinstance(v, (list, tuple)):
            digest.update(b"[")
            for e in v:
                add(e)
        else:
            digest.update(repr(v).encode())
        digest.update(b";")
    add(value)
    return digest.hexdigest()


def named_tensors(value, name=""):
    """(name, tensor) of nested dicts and lists."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for k, v in value.items() if isinstance(value, dict) else enumerate(value):
            yield from named_tensors(v, f"{name}.{k}" if name else str(k))


@torch.no_grad()
def first_not_finite(value):
    """Name of the first tensor that holds NaN or inf, or None. One fused check and one wait for the
    device; tensor by tensor only if that fails."""
    tensors = [(n, t) for n, t in named_tensors(value) if t.is_floating_point() and t.numel()]
    groups = {}
    for _, t in tensors:
        groups.setdefault((t.device, t.dtype), []).append(t)
    most = [torch.nn.utils.get_total_norm(g, math.inf).float().cpu() for g in groups.values()]
    if not most or torch.stack(most).isfinite().all():
        return None
    return next((n for n, t in tensors if not t.isfinite().all()), None)


def save_checkpoint(state, path):
    """Write whole: a kill or a full disk never costs the previous checkpoint. Weights that are not
    finite are refused."""
    path = Path(path)
    kept = "the previous one is intact" if path.exists() else "there is no earlier one"
    bad = first_not_finite({k: v for k, v in state.items() if k != "rng"})
    if bad:
        when = f" at iteration {state['it']}" if "it" in state else ""
        raise UserError(f"{path}: {bad} is not finite{when}; checkpoint not written, {kept}. Lower --lr")
    try:
        with whole(path) as file:
            torch.save(dict(state, format=FORMAT, checksum=checksum(state)), file)
    except (OSError, RuntimeError) as e:  # torch's zip writer raises RuntimeError on a full disk
        raise UserError(f"{path}: checkpoint not written ({why(e)}); {kept}. Free some space and "
                        "--resume") from None


def read_file(path):
    """torch.load with weights_only=True on the CPU; whatever can be wrong with it is one line."""
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"{path}: not a readable checkpoint; it is {kind}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as e:
        if "Unsupported global" in str(e) or "Unsupported class" in str(e):
            raise UserError(f"{path}: holds pickled objects beside its tensors and is not loaded, "
                            "since that would run code from the file") from None
        raise UserError(f"{path}: not a readable checkpoint; an html page or another kind of "
                        "file?") from None
    except MemoryError:
        raise UserError(f"{path}: not a readable checkpoint; its sizes fit no memory") from None
    except Exception as e:  # a damaged pickle can raise anything
        raise UserError(f"{path}: not a readable checkpoint ({why(e)}); truncated download or another "
                        "kind of file?") from None


def load_checkpoint(path, script=None):
    """Content of a checkpoint of ours: checksum verified, weights finite. script: its file name;
    another's checkpoint is refused."""
    content = read_file(path)
    check_ours(content, path, script)
    return content


def check_ours(content, path, script=None):
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    if {"format", "checksum"} & set(content):  # not in files of versions before
        if content.get("format") != FORMAT:
            raise UserError(f"{path}: has format {content.get('format')} of another version of this "
                            f"project; here it is {FORMAT}")
        rest = {k: v for k, v in content.items() if k not in ("format", "checksum")}
        if checksum(rest) != content.get("checksum"):
            raise UserError(f"{path}: is damaged: its content has not the checksum that was saved "
                            "with it; take an earlier copy")
    theirs = script_of(content)
    if script and theirs and theirs != script:
        raise UserError(f"{path}: is a checkpoint of {shorten(str(theirs))}, not of {script}")
    bad = first_not_finite(content.get("model", content))
    if bad:
        raise UserError(f"{path}: {bad} is not finite; the training that wrote it went wrong")


# Files of versions that did not write their script's name: what only its `arch` has.
MARKS = dict(p6="crosskd.py", quality="hierkd.py", rpn="hierkd.py", queries="dkdetr.py",
             columns="prototype_kd.py", pair="simple21k.py")


def script_of(content):
    """Which of the five scripts wrote a checkpoint, or None."""
    arch = content.get("arch") if isinstance(content, dict) else None
    if not isinstance(arch, dict):
        return None
    script = content.get("script")
    if isinstance(script, str):
        return script
    return next((s for key, s in MARKS.items() if key in arch), None)


def saved_flags(path, script=None):
    """{flag: value} of the run that wrote this last.pt."""
    state = load_checkpoint(path, script)
    if "format" not in state:
        raise UserError(f"--resume {path}: was not written by this version of the project; take its "
                        "weights by --init, or start anew")
    if not isinstance(state.get("args"), dict) or not {"model", "optimizer", "rng", "it"} <= set(state):
        raise UserError(f"--resume {path}: holds no training state; only a last.pt can be resumed")
    return state["args"]


def saved_run(args, script, mark):
    """Flags that --resume continues: of OUT/last.pt, else of OUT/args.json, which a table of runs has, and a
    run that got no further than its start; {} where there is nothing. mark: a flag that only this version
    of this script has."""
    last, first = Path(args.out) / "last.pt", Path(args.out) / "args.json"
    if last.exists():
        saved = saved_flags(last, script)
        if mark not in saved:
            raise UserError(f"--resume {last}: was written by an earlier version of this project, whose "
                            "flags may have meant something else; start anew")
        return saved
    if not first.exists():
        return {}
    try:
        header = json.loads(first.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{first}: cannot be read ({why(e)})") from None
    saved = header.get("args") if isinstance(header, dict) else None
    if not isinstance(saved, dict) or mark not in saved:
        raise UserError(f"--resume {args.out}: holds a run of another script")
    return saved


def open_table(args, rank):
    """args.json of a table of runs, which have folders of their own in OUT."""
    first = Path(args.out) / "args.json"
    if rank == 0 and not args.resume:
        if first.exists():
            raise UserError(f"--out {args.out}: holds a run already; choose another folder, --resume it, or "
                            "delete it")
        make_folder(args.out)
        header = dict(command=shlex.join(sys.argv), table=True, args=vars(args))
        write_whole(first, json.dumps(header, indent=1, default=str))


def load_strict(model, state, where):
    """load_state_dict that tells all it misses in one line."""
    own = model.state_dict()
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{where}: holds no weights")
    optional = {k for k in own if k not in state and
                k.endswith(("relative_position_index", "num_batches_tracked"))}
    wrong = {"missing": [k for k in own if k not in state and k not in optional],
             "unexpected": [k for k in state if k not in own],
             "of another shape": [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
                                  for k in own if k in state and state[k].shape != own[k].shape],
             "of another type": [f"{k} {state[k].dtype}" for k in own if k in state and
                                 state[k].is_floating_point() != own[k].is_floating_point()]}
    found = [f"{len(keys)} {what} (first {keys[0]})" for what, keys in wrong.items() if keys]
    if found:
        arch = getattr(model, "arch", {})
        name = "_".join(str(arch[k]) for k in ("name", "kind", "backbone") if k in arch)
        raise UserError(f"{where}: does not fit {name or type(model).__name__}: {'; '.join(found)}")
    model.load_state_dict({**{k: own[k] for k in optional}, **state})


@contextmanager
def rebuilding(where):
    """with rebuilding("--eval x.pt"): what a checkpoint says of its network does not fit the code: one
    line, whatever the exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{where}: does not describe a network of this script "
                        f"({type(e).__name__}: {why(e)}); damaged, or of another version?") from None


def rng_state():
    """State of torch's and Python's generators as plain values (loads with weights_only=True)."""
    return dict(torch=torch.get_rng_state(), python=random.getstate(),
                cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def set_rng_state(state):
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# ------------------------------------------------------------------ run folder

# {lock file: open file}. A POSIX lock lives as long as its process has the file open: it dies with
# the process, however that ends, loader processes do not inherit it, and NFS knows it.
LOCKS = {}
STARTED = time.time()


def lock(folder, wait=False):
    """Hold folder/.lock, {"pid", "host"}; False if another process holds it (wait: until it does
    not)."""
    path = Path(folder) / ".lock"
    if fcntl is None or str(path) in LOCKS:
        return True
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            file.close()
            return False
        print(f"{path.parent}: waiting for {owner(path)}, which makes it", flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:  # a disk without locks
        file.close()
        return True
    if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
        file.close()  # its owner took the file away meanwhile: this lock is of a file without a name
        Path(folder).mkdir(parents=True, exist_ok=True)
        return lock(folder, wait)
    file.truncate(0)
    file.write(json.dumps(dict(pid=os.getpid(), host=socket.gethostname())))
    file.flush()
    LOCKS[str(path)] = file
    return True


def unlock(path):
    """path: a folder that `lock` was given, or its lock file."""
    path = Path(path)
    file = LOCKS.pop(str(path if path.name == ".lock" else path / ".lock"), None)
    if file:
        Path(file.name).unlink(missing_ok=True)
        file.close()


def owner(path):
    """Who holds a lock file, for a message."""
    try:
        who = json.loads(Path(path).read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def there(path):
    """Whether something cached is there, and with --retrain: made by this run."""
    return path.exists() and (not os.environ.get("DETECTION_RETRAIN") or path.stat().st_mtime >= STARTED)


@contextmanager
def made_once(path, rank):
    """with made_once(path, rank) as missing: the first run that needs a cached folder makes it; the
    others, also those of other runs, wait."""
    path = Path(path)
    guard = path.with_name(f".{path.name}.making")
    if rank == 0 and not there(path):
        make_folder(guard, str(path.parent))
        lock(guard, wait=True)
        if not there(path):
            shutil.rmtree(path, ignore_errors=True)
    barrier()
    try:
        yield not path.exists()
    finally:
        if rank == 0 and guard.exists():
            shutil.rmtree(guard, ignore_errors=True)
            unlock(guard)
    barrier()


def make_folder(out, what=""):
    """The folder, if this process can write there. what: its name in an error, if it is not --out."""
    probe = Path(out) / f".{os.getpid()}.tmp"
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"{what or '--out ' + shorten(str(out))}: cannot be made or written to "
                        f"({e.strerror}); choose another folder") from None


def holds_run(out):
    try:
        return (Path(out) / "log.jsonl").exists()
    except OSError as e:
        raise UserError(f"--out {shorten(str(out))}: cannot be used ({e.strerror})") from None


def holds_table(out):
    """Whether OUT is of a table, whose runs have folders of their own: see open_table."""
    try:
        return "table" in json.loads((Path(out) / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def git_commit():
    try:
        folder = Path(sys.argv[0]).resolve().parent
        command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "none"
    except (OSError, subprocess.SubprocessError):  # no git on this machine
        return "none"


def open_run(args, rank, resume=False):
    """Make `args.out`, lock it, refuse to overwrite another run, write args.json, print the header.
    Rank 0 only."""
    out = Path(args.out)
    if rank != 0:
        return out
    if holds_table(out) or holds_run(out) and not resume:
        raise UserError(f"--out {out}: holds a run already; choose another folder, --resume it, or "
                        "delete it")
    make_folder(out)
    if not lock(out):
        raise UserError(f"--out {out}: {owner(out / '.lock')} is running in it; wait for it, stop it, "
                        "or choose another folder")
    for left in out.glob(".*.tmp"):  # of processes that died writing: a living one holds the lock
        left.unlink(missing_ok=True)
    versions = dict(python=platform.python_version(), torch=torch.__version__,
                    torchvision=torchvision.__version__, cuda=torch.version.cuda)
    header = dict(command=shlex.join(sys.argv), git=git_commit(), **versions, args=vars(args))
    write_whole(out / "args.json", json.dumps(header, indent=1, default=str))
    device = f"cpu, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    print(f"{header['command']}\ngit {header['git']} | torch {torch.__version__} torchvision "
          f"{torchvision.__version__} | {device}\nout {out}", flush=True)
    return out


def answer_folder(out, rank=0):
    """Make the folder of --eval or --predict, before the work; never that of a training run."""
    if rank == 0:
        if holds_run(out):
            raise UserError(f"--out {out}: holds a training run; choose another folder")
        make_folder(out)


def can_resume(out, wanted, rank, device):
    """Whether to go on from out/last.pt: --resume was given and every process sees the file."""
    there = bool(wanted) and (Path(out) / "last.pt").exists()
    share = reduce_mean(torch.tensor(float(there), device=device)).item()
    if 0 < share < 1:
        raise UserError(f"--resume {out}: not every process sees last.pt there; with several machines "
                        "--out must be on a disk they share")
    if wanted and not there and rank == 0:
        print(f"--resume {out}: there is no last.pt yet, starting at the beginning", flush=True)
    return there


# ------------------------------------------------------------------ log

def read_log(path):
    """Rows of a log.jsonl; a last line that a kill cut in half is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def duration(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def fold(parts):
    """Words that stay together -> lines that fit the terminal, all but the first indented."""
    columns = shutil.get_terminal_size((80, 24)).columns - 1
    glued = " ".join(p.replace(" ", "\xa0") for p in parts)
    lines = textwrap.wrap(glued, columns, subsequent_indent="    ", break_long_words=False,
                          break_on_hyphens=False)
    return "\n".join(lines).replace("\xa0", " ")


def split_line(text):
    """Words of a line; a name and its number stay together."""
    return re.findall(r"\S*[A-Za-z]\S* -?\d[\d.,]*(?=\s|$)|\S+", text)


class Log:
    """log.jsonl and the log line, from rank 0, around a tqdm bar that shows the time left.

    Losses come as device tensors and are only looked at every `every` steps, so no step waits for
    the GPU. Then all of them are checked: the first step with a non-finite loss stops the run, on
    all ranks at once, by name. legend: {term: what it is}, printed once, for the terms that there
    are. later: seconds of what is still to come beside steps. again: the evaluation of step `start`
    will be done anew.
    """

    def __init__(self, out, rank, total, start=0, every=50, legend={}, again=False):
        self.path, self.rank, self.total, self.every = Path(out) / "log.jsonl", rank, total, every
        self.legend, self.pending, self.data_time, self.later = dict(legend), [], 0.0, 0.0
        self.time = time.time()
        if rank == 0 and self.path.exists():  # drop what was logged after the checkpoint resumed
            kept = [r for r in read_log(self.path) if r.get("it", 0) <= start and
                    not (again and r.get("it") == start and "loss" not in r)]
            write_whole(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self.bar = tqdm(total=total, initial=start, disable=rank != 0, mininterval=1,
                        dynamic_ncols=True)

    def step(self, it, epoch, losses, lr, data_time=0.0, watch={}):
        """Note the losses {name: scalar tensor} of iteration `it`, counted from 1; print and check
        every so often. watch: scalars that are no losses."""
        self.names, self.losses = [*losses, *watch], len(losses)
        scalars = (*losses.values(), *watch.values())
        self.pending.append(torch.stack([v.detach().float() for v in scalars]))
        self.data_time += data_time
        self.bar.update()
        if it % self.every == 0 or it == self.total:
            self.flush(it, epoch, lr)

    def flush(self, it, epoch, lr):
        if not self.pending:
            return
        values = reduce_mean(torch.stack(self.pending)).cpu()  # (steps, terms); one rank's NaN is all's
        self.check(values, it)
        mean, steps, now = values.mean(0).tolist(), len(values), time.time()
        seconds, data, loss = (now - self.time) / steps, self.data_time / steps, sum(mean[:self.losses])
        terms = dict(zip(self.names, mean))
        row = dict(it=it, epoch=epoch, loss=loss, **terms, lr=lr, data=data, step=seconds)
        parts = [f"ep {epoch:02d} it {it}/{self.total}", "|", f"loss {loss:.3f}",
                 *(f"{n} {v:.3f}" for n, v in terms.items()), "|", f"lr {lr:.1e}",
                 f"data {data:.2f}s step {seconds:.2f}s"]
        if torch.cuda.is_available():
            row["mem"] = torch.cuda.max_memory_allocated() / 2**30
            parts.append(f"mem {row['mem']:.1f}G")
        parts.append(f"eta {duration((self.total - it) * seconds + self.later)}")
        for n in self.names:
            if n in self.legend and self.rank == 0:
                self.bar.write(fold(f"{n}: {self.legend.pop(n)}".split()), file=sys.stdout)
        self.write(row, fold(parts))
        self.pending, self.time, self.data_time = [], now, 0.0

    def check(self, values, it):
        bad = (~values.isfinite()).any(1).nonzero()
        if not len(bad):
            return
        first = int(bad[0, 0])
        row = dict(zip(self.names, values[first].tolist()))
        wrong = [n for n, v in row.items() if not math.isfinite(v)]
        what = "loss" if wrong[0] in self.names[:self.losses] else wrong[0]
        terms = ", ".join(f"{n}={v:.4g}" for n, v in row.items())
        raise UserError(f"{what} is not finite at iteration {it - len(values) + 1 + first}: {terms}. "
                        "Lower --lr, or resume from last.pt, which was written before")

    def write(self, row, line):
        if self.rank == 0:
            row = {k: float(f"{v:.9g}") if isinstance(v, float) else v for k, v in row.items()}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def restart_clock(self):
        """After an evaluation, whose time is not training time."""
        self.time = time.time()


# ------------------------------------------------------------------ the run

ACTIVE = []  # runs that hold signals and a folder: given back however the process ends


class Run:
    """A run folder and how far the run in it has come. Script: model, loss, loop, step. Here: log,
    last.pt, best.pt, stopping.

    it: steps done of `total`. due: an evaluation comes before the next step, because an epoch is
    over or because a kill came before its evaluation was done. best: highest score so far; -1 is a
    score, where val holds no box.
    plain: what a checkpoint holds beside weights. batches: loader batches of an epoch. parts: further
    modules that last.pt holds, {name: module}; fixed: modules of which it holds the checksum, {name:
    module}: --resume refuses others; beside: further entries, {name: function}. metric: what
    metrics["score"] is called. report: whose results stand in results.json: "best", or "last" where
    the set that is reported must not choose. every: epochs between evaluations. table: function
    (metrics) -> text, printed at the end where there are "classes".
    """

    def __init__(self, args, model, optimizer, plain, batches, total_batch, rank, world, device,
                 epochs=None, parts={}, fixed={}, legend={}, metric="AP", report="best", every=None,
                 table=None):
        self.args, self.model, self.optimizer, self.plain, self.parts = args, model, optimizer, plain, parts
        self.rank, self.world, self.out, self.total_batch = rank, world, Path(args.out), total_batch
        self.metric, self.report, self.table, self.since = metric, report, table, time.time()
        self.fixed = {name: checksum(module.state_dict()) for name, module in fixed.items()}
        self.beside, self.loader = {}, None
        self.epochs, self.steps = epochs or args.epochs, -(-batches // args.accumulate)
        self.total = min(self.epochs * self.steps, args.max_iters or 10**12)
        self.every = args.eval_every or every or max(1, self.epochs // 12)
        self.it, self.best, self.best_epoch, self.due, self.complete = 0, -2.0, 0, False, False
        self.metrics, self.lr, self.data_time, self.eval_seconds = None, 0.0, 0.0, 0.0
        self.judge = self.seen = None  # fingerprints: of what `best` was measured on, of what is trained on
        self.signal, self.signal_time, self.training, self.handlers = None, 0.0, True, {}
        self.resumed = can_resume(self.out, args.resume, rank, device)
        if self.resumed:
            state = load_checkpoint(self.out / "last.pt", plain["script"])
            self.load(state, f"--resume {self.out / 'last.pt'}")
        self.log = Log(self.out, rank, self.total, self.it, args.log_every, legend,
                       self.due)
        if self.resumed and rank == 0 and self.log.path.exists():
            self.eval_seconds = max([r.get("seconds", 0) for r in read_log(self.log.path)], default=0)
        # votes on stopping have a group of their own, so that no work on a GPU waits for them
        self.side = dist.new_group(backend="gloo") if world > 1 else None
        self.vote = self.ballot = None
        self.pid = os.getpid()
        ACTIVE.append(self)
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.handlers[number] = signal.signal(number, self.on_signal)
            except ValueError:  # not the main thread
                pass
        if not self.resumed:
            self.save()  # from here on --resume finds the run and its flags

    epoch = property(lambda self: max(1, -(-self.it // self.steps)))  # of step `it`, from 1
    finished = property(lambda self: self.it >= self.total)

    # -------------------------------------------------------------- stopping

    def on_signal(self, number, frame):
        """Once: stop after the step that is under way; in an evaluation, before which last.pt was
        written: now. Twice: leave at once."""
        if os.getpid() != self.pid:
            return  # a forked loader process: it ends with us
        if self.signal and time.time() - self.signal_time > 1:  # torchrun may send one twice
            os._exit(128 + number)
        self.signal, self.signal_time = self.signal or number, self.signal_time or time.time()
        if not self.training:
            raise Stopped(number, self.farewell("last.pt was written before its evaluation"))

    def farewell(self, text):
        runner = "python"
        if self.world > 1:
            runner = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', self.world)}"
        again = shlex.join([*(a for a in sys.argv if a != "--resume"), "--resume"])
        name = signal.Signals(self.signal).name
        return f"stopped by {name} at step {self.it}, {text}; continue: {runner} {again}"

    def leave_if_asked(self):
        """All processes agree by a vote that takes a step to arrive, so that none waits for it."""
        number = self.signal or 0
        if self.world > 1:
            number = 0  # of this process alone it says nothing
            if self.vote:
                self.vote.wait()
                number = int(self.ballot)
                self.signal = self.signal or number or None
            self.ballot = torch.tensor(int(self.signal or 0))
            self.vote = dist.all_reduce(self.ballot, dist.ReduceOp.MAX, self.side, async_op=True)
        if number:
            self.log.flush(self.it, self.epoch, self.lr)
            self.save()
            text = self.farewell(f"{self.out / 'last.pt'} is written")
            raise Stopped(number, text, quiet=self.rank != 0)

    def release(self):
        """Give back what this run holds: signals, the lock, the bar, loader processes."""
        if self in ACTIVE:
            ACTIVE.remove(self)
            # an exception's traceback may keep the loader alive, and exit would wait for its processes
            for loader in getattr(self.loader, "loaders", {0: self.loader}).values():
                workers = getattr(loader, "_iterator", None)
                if workers is not None:
                    loader._iterator = None
                    with suppress(Exception):  # without file descriptors this fails, too
                        workers._shutdown_workers()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.log.bar.close()
            if self.rank == 0:
                unlock(self.out)

    # -------------------------------------------------------------- last.pt

    def load(self, state, where, copy=False):
        """Go on as if nothing had happened, but for flags given now: --resume --lr 0.005 is meant.
        copy: as the beginning of another run."""
        if not {"model", "optimizer", "it", "rng", "total_batch"} <= set(state):
            raise UserError(f"{where}: holds no training state; only a last.pt can be resumed")
        if not isinstance(state["rng"], list):
            raise UserError(f"{where}: was written by an earlier version of this project; take its "
                            "weights by --init, or start anew")
        if state["total_batch"] != self.total_batch:
            raise UserError(f"{where}: was trained with a total batch of {state['total_batch']}, this "
                            f"command has {self.total_batch}")
        names = [(c.get("classes"), c.get("arch", {}).get("base")) for c in (state, self.plain)]
        if not copy and names[0] != names[1]:
            raise UserError(f"{where}: was trained on other classes, or in another order of their ids, than "
                            "the data have now; start anew, or from its weights")
        check_clip(state, self.plain, where)
        for name, module in dict(self.parts, model=self.model).items():
            if name not in state:
                raise UserError(f"{where}: lacks {name}, which these flags train")
            load_strict(module, state[name], where)
        known = state.get("fixed")
        for name, sha in self.fixed.items():
            if isinstance(known, dict) and known.get(name, sha) != sha:
                raise UserError(f"{where}: was trained with another {name} than is there now; bring that "
                                "back, or start anew")
        now = [{k: g[k] for k in ("base_lr", "weight_decay") if k in g}
               for g in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception:  # torch checks little of it
            raise UserError(f"{where}: other weights learn than before, or by another optimizer; the "
                            "flags that say so must stay what they were") from None
        for group, values in zip(self.optimizer.param_groups, now):
            group.update(values)
        self.it, self.state = state["it"], state  # for what a script keeps beside
        if not copy:
            self.judge, self.seen = state.get("judge"), state.get("seen")
            same = "judge" in state or state["args"].get("val_json") == vars(self.args).get("val_json")
            if same and math.isfinite(state["best"]):  # inf: of no validation set
                self.best, self.best_epoch = state["best"], state["best_epoch"]
            if self.it % self.steps and state["args"].get("batch_size") != vars(self.args).get("batch_size"):
                tell(f"{where}: other batches than before; of this epoch images may come twice, or not")
            self.complete = self.finished and not state["due"]  # evaluated anew, for who asks
            self.due = state["due"] or self.finished
            self.training = not self.due
        if self.rank < len(state["rng"]):
            with rebuilding(where):
                set_rng_state(state["rng"][self.rank])

    def save(self, path=None):
        """last.pt, or another file that a run can begin from. Every rank must call it."""
        rng = gather([rng_state()])
        modules = {n: module.state_dict() for n, module in dict(self.parts, model=self.model).items()}
        state = dict(self.plain, **modules, optimizer=self.optimizer.state_dict(), it=self.it)
        if self.rank == 0:
            state |= dict(best=self.best, best_epoch=self.best_epoch, due=self.due, rng=rng,
                          total_batch=self.total_batch, args=vars(self.args),
                          fixed=self.fixed, judge=self.judge, seen=self.seen)
            state |= {name: make() for name, make in self.beside.items()}
            save_checkpoint(state, path or self.out / "last.pt")
        elif first_not_finite(state):  # rank 0 says which
            raise UserError("weights are not finite; checkpoint not written. Lower --lr")

    # -------------------------------------------------------------- the loop's calls

    def batches(self, loader, plan):
        """The rest of this epoch, a step at a time: lists of up to --accumulate batches."""
        epoch, done = divmod(self.it, self.steps)
        plan.set_epoch(epoch, done * self.args.accumulate)
        self.loader, source = loader, iter(loader)
        while not self.finished and self.it < (epoch + 1) * self.steps:
            self.leave_if_asked()
            since = time.time()
            group = list(islice(source, self.args.accumulate))
            self.data_time = time.time() - since
            if not group:
                raise RuntimeError(f"the loader ended after {self.it % self.steps} of {self.steps} steps")
            yield group

    def step(self, losses, lr, watch={}):
        """A step is done: note its losses, write last.pt now and then."""
        self.it, self.lr = self.it + 1, lr
        self.log.later = ((self.epochs - self.epoch) // self.every + 1) * self.eval_seconds
        self.log.step(self.it, self.epoch, losses, lr, self.data_time, watch)
        if self.it % self.args.save_every == 0 and self.it % self.steps and not self.finished:
            self.log.flush(self.it, self.epoch, lr)  # looks for NaN: never save what it left behind
            self.save()
            self.log.restart_clock()

    def end_epoch(self):
        """An epoch is over; after `every` of them, and after the last, an evaluation is due."""
        self.log.flush(self.it, self.epoch, self.lr)
        self.due = self.finished or self.epoch % self.every == 0
        if self.due or self.it % self.args.save_every == 0:
            self.save()  # before anything of the evaluation can fail
        self.leave_if_asked()
        if self.due and self.world > 1:  # and the vote that was cast just now: an evaluation is long
            self.leave_if_asked()
        self.training = not self.due

    def scored(self, metrics, detections=None, dataset=None):
        """The evaluation that was due is done. metrics on rank 0: "score" chooses best.pt, "line" is
        printed; None: no validation set, the last is the best. detections and dataset go into the
        result files."""
        self.training = True
        if self.rank == 0:
            blind = metrics is None
            self.metrics = metrics = metrics or dict(score=math.inf, line="no validation set")
            numbers = {k: v for k, v in metrics.items()
                       if isinstance(v, (int, float)) and math.isfinite(v)}
            self.eval_seconds = metrics.get("seconds", 0)
            line = fold([f"ep {self.epoch:02d} eval", *split_line(metrics["line"])])
            self.log.write(dict(it=self.it, epoch=self.epoch, **numbers), line)
            # below 0: nothing there that could choose; then the last is the best
            better = blind or metrics["score"] > self.best or max(metrics["score"], self.best) < 0
            if not blind and (better if self.report == "best" else self.finished):
                from .pictures import write_results
                of = f"{self.report}.pt"
                write_results(self.out, metrics, detections, dataset, of, self.epoch, self.it)
            if better:
                self.best, self.best_epoch = metrics["score"], self.epoch
                weights = dict(self.plain, model=self.model.state_dict(), epoch=self.epoch, it=self.it)
                save_checkpoint(weights, self.out / "best.pt")
        self.due = False
        if not self.complete:
            self.save()
        self.log.restart_clock()

    def describe(self, text, lr, base_lr, paper_batch, *datasets):
        """The lines before the first step: on what is learnt, what was repaired or left out there, at
        which rate. datasets: for training, and last the validation set, or None."""
        *seen, val = datasets
        judge = val.fingerprint() if hasattr(val, "fingerprint") else None
        if self.judge not in (None, judge):  # --resume with another validation set
            self.best, self.best_epoch = -2.0, 0
        now = [data.fingerprint() for data in seen if hasattr(data, "fingerprint")]
        if self.seen not in (None, now):
            tell(f"--resume {self.out}: what is trained on are other images or boxes than before; the "
                 "results are of both")
        self.judge, self.seen = judge, now
        if self.rank == 0:
            for data in datasets:
                print(data.report() if data else "no validation set: no evaluation, best.pt is the last")
            places = [data.places() if hasattr(data, "places") else set() for data in (val, *seen)]
            if both := places[0] & set().union(*places[1:]):
                print(f"warning: {len(both):,} of {len(val):,} validation images are trained on, too; what "
                      "is reported is no result", flush=True)
            each = self.total_batch // self.world // self.args.accumulate
            batch = f"batch {each} x {self.world} x {self.args.accumulate} = {self.total_batch}"
            rate = f"lr {base_lr:g} at {paper_batch} -> {lr:g}"
            length = f"{self.epochs} epochs of {self.steps} steps, from {self.it}"
            print(fold([*split_line(text), "|", batch, "|", rate, "|", length]), flush=True)

    def close(self):
        """Curves and the last line; the last evaluation's metrics (rank 0) or None."""
        if self.vote:
            self.vote.wait()
        if self.rank == 0:
            from .pictures import plot_curves
            plot_curves(self.out / "log.jsonl", self.out / "curves.png")
            score = "no validation set: best.pt is the last"
            if math.isfinite(self.best):
                last = self.metrics["score"]
                score = f"best {self.metric} {self.best:.1f} (epoch {self.best_epoch}), last {last:.1f}"
            if self.table and self.metrics.get("classes"):
                print(self.table(self.metrics))
            print(f"{score} | {duration(time.time() - self.since)} | {self.out}", flush=True)
        self.release()
        barrier()
        return self.metrics


def check_teacher(metrics, args):
    """Prints a teacher's AP on some validation images (metrics: on rank 0, else None); one that finds
    nothing has nothing to teach."""
    if metrics is None:
        return
    text = f"AP {metrics['AP']:.1f} on {metrics['images']} validation images"
    print(f"teacher {text}", flush=True)
    if 0 <= metrics["AP"] < 1 and not args.no_teacher_check:  # -1: no box on these images
        raise UserError(f"--teacher {args.teacher or 'of shapes'}: {text}: wrong weights, other classes or "
                        "other pixels? --no-teacher-check goes on")


def tell_seen(before, novel, what):
    """Tells of names that count as novel, though a checkpoint was trained on boxes of them."""
    plain = {n.replace("_", " ").casefold() for n in before}
    if again := sorted(n for n in novel if n.replace("_", " ").casefold() in plain):
        tell(f"{what}: was trained on {', '.join(again[:5])}, which count as novel here")


def check_clip(state, plain, where):
    """Raises UserError where a checkpoint was trained with another CLIP than `plain` names."""
    theirs, ours = (c.get("arch", {}).get("clip_name") for c in (state, plain))
    if theirs and ours and theirs != ours:
        raise UserError(f"{where}: was trained with CLIP {theirs}, this is {ours}; bring that back, or start "
                        "anew")


def tell_size(arch, size, what):
    """Tells of a detector that was trained on images of another size than `size`, --image-size."""
    if arch.get("image_size") not in (None, size):
        tell(f"{what}: was trained at --image-size {arch['image_size']}, it sees {size} here")


# ------------------------------------------------------------------ what a network is

def describe_model(name, model, *inputs, rank=0):
    """Prints parameters, trained parameters and FLOPs (2 a multiply-add) of one forward pass.
    inputs: example tensors; on the meta device, so nothing is computed."""
    if rank != 0:
        return
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        twin = copy.deepcopy(model).eval().to("meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            twin(*(x.to("meta") for x in inputs))
        size = " x ".join(map(str, inputs[0].shape[2:]))
        flops = f"{counter.get_total_flops() / 1e9:,.1f} GFLOPs at {size}"
    except (RuntimeError, TypeError) as e:  # an operator without a meta kernel
        flops = f"FLOPs not counted ({why(e)})"
    print(fold([f"{name}:", f"{every:,} parameters,", f"{trained:,} trained,", flops]), flush=True)
