"""What a run needs around its method: processes, schedules, checkpoints, downloads, logs and pictures."""
import argparse
import ctypes
import hashlib
import json
import math
import os
import pickle
import platform
import random
import shlex
import subprocess
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision.transforms.v2.functional
from tqdm import tqdm


class UserError(Exception):
    """A wrong flag, file or checkpoint: one line with the remedy. Scripts print it and stop, without a traceback."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""
    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


# ------------------------------------------------------------------ processes

def init_ddp():
    """(rank, world, device). Joins torchrun's group, or is rank 0 of 1 when run with plain python."""
    rank, local, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if world > 1 and not dist.is_initialized():
        hours = timedelta(hours=3)  # rank 0 may score LVIS alone for longer than the ten minutes that nccl grants
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=hours)
    return rank, world, device


def leave_ddp():
    """Ends what init_ddp began, at the end of a run that went well: after an error it would wait for the others, and nobody would see the line."""
    if dist.is_available() and dist.is_initialized():
        barrier()  # gloo of torch 2.6 often hangs in the next line if the others have left already
        dist.destroy_process_group()


def keep_memory():
    """CPU runs: keep freed memory in the process. glibc returns each large tensor to the kernel, which hands its pages
    out anew, zeroed, at the next step: 10 to 30 % of a training step here. Does nothing where libc is another."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)   # M_MMAP_MAX: large blocks come from the heap, too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap does not shrink


def reduce_mean(x, at_least=0.0):
    """Mean of a tensor over processes, without gradient; at_least bounds the SUM over processes.

    For normalisers: DDP averages gradients over ranks, so loss_r / mean_r(count_r), averaged, is the loss of the whole
    batch over the count of the whole batch. (A bound on the mean, mmdetection's choice, would depend on the processes.)
    """
    x = x.detach().clone()
    if not (dist.is_available() and dist.is_initialized()):
        return x.clamp(min=at_least) if at_least else x
    dist.all_reduce(x)
    return (x.clamp(min=at_least) if at_least else x) / dist.get_world_size()


def barrier():
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def seed_all(seed):
    random.seed(seed), torch.manual_seed(seed)


def warmup_multistep(it, iters_per_epoch, milestones, warmup=500, start=0.001, constant=False):
    """Learning-rate factor of iteration `it`: x 0.1 at each milestone (epochs), times a warm-up.

    Linear: `start` at it 0, 1 at it warmup - 1. Constant: `start` until it warmup - 2. A pure function of
    `it`, so there is no schedule state to save.
    """
    factor = 0.1 ** sum(it >= m * iters_per_epoch for m in milestones)
    if it < warmup - 1:
        factor *= start if constant else start + (1 - start) * it / (warmup - 1)
    return factor


# ------------------------------------------------------------------ checkpoints and downloads

def why(error):
    """First line of an exception's text, or its name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:80]


def save_checkpoint(state, path):
    """Write to a temporary name, then rename: a kill or a full disk never costs the previous checkpoint."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch's zip writer raises RuntimeError on a full disk
        temporary.unlink(missing_ok=True)
        kept = "the previous one is intact" if path.exists() else "there is no earlier one"
        raise UserError(f"{path}: checkpoint not written ({why(e)}); {kept}. "
                        "Free some space and --resume") from None


def load_checkpoint(path):
    """torch.load with weights_only=True on the CPU; whatever can be wrong with the file is one line."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as e:
        if "Unsupported global" not in str(e) and "Unsupported class" not in str(e):
            raise UserError(f"{path}: not a readable checkpoint; an html page or another kind of file?") from None
        raise UserError(f"{path}: holds pickled objects beside its tensors and is not loaded, since that would run "
                        "code from the file. If you trust it, re-save its tensors once: torch.save({'state_dict': "
                        "torch.load(path, weights_only=False)['state_dict']}, new_path)") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: not a readable checkpoint ({why(e)}); "
                        "truncated download or another kind of file?") from None


def saved_flags(path):
    """{flag: value} of the run that wrote this last.pt."""
    state = load_checkpoint(path)
    if not isinstance(state, dict) or not isinstance(state.get("args"), dict):
        raise UserError(f"--resume {path}: holds no training state; only a last.pt can be resumed")
    return state["args"]


def load_strict(model, state, where):
    """load_state_dict that tells all it misses in one line."""
    own = model.state_dict()
    optional = {k for k in own if k.endswith(("relative_position_index", "num_batches_tracked")) and k not in state}
    missing, surplus = [k for k in own if k not in state and k not in optional], [k for k in state if k not in own]
    shape = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in own
             if k in state and state[k].shape != own[k].shape]
    wrong = {"missing": missing, "unexpected": surplus, "of another shape": shape}
    if any(wrong.values()):
        raise UserError(f"{where}: does not fit {'_'.join(str(model.arch[k]) for k in ('name', 'kind', 'backbone') if k in model.arch)}: " +
                        "; ".join(f"{len(keys)} {what} (first {keys[0]})" for what, keys in wrong.items() if keys))
    model.load_state_dict({**{k: own[k] for k in optional}, **state})


def fetch(url, sha256=""):
    """Path of the file behind `url` in torch's hub cache, downloaded once. sha256: first digits, checked each time."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    while int(os.environ.get("LOCAL_RANK", 0)) and not path.exists():
        time.sleep(1)  # one process of a machine downloads, the others wait for it
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} -> {path}", flush=True)
        try:
            torch.hub.download_url_to_file(url, path, sha256 or None)
        except RuntimeError as e:
            raise UserError(f"{url}: {e}; the download is damaged, try again") from None
        except OSError as e:
            raise UserError(f"{url}: cannot be downloaded ({e}). Offline? Fetch it elsewhere and place it at {path}") from None
    if sha256:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(sha256):
            raise UserError(f"{path}: sha256 starts {digest[:8]}, expected {sha256}; delete the file and run again")
    return path


def rng_state():
    """State of torch's and Python's generators as plain values and tensors (loads with weights_only=True)."""
    return dict(torch=torch.get_rng_state(), python=random.getstate(),
                cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def set_rng_state(state):
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# ------------------------------------------------------------------ run folder, log, progress

def open_run(args, rank, resume=False):
    """Make `args.out`, refuse to overwrite another run, write args.json, print the header. Rank 0 only."""
    out = Path(args.out)
    if rank == 0:
        if (out / "log.jsonl").exists() and not resume:
            raise UserError(f"--out {out}: holds a run already; choose another folder, --resume it, or delete it")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out {out}: cannot be made ({e.strerror})") from None
        git = subprocess.run(["git", "-C", Path(sys.argv[0]).resolve().parent, "rev-parse", "--short", "HEAD"],
                             capture_output=True, text=True).stdout.strip() or "none"
        header = dict(command=shlex.join(sys.argv), git=git, python=platform.python_version(), torch=torch.__version__,
                      torchvision=torchvision.__version__, cuda=torch.version.cuda, args=vars(args))
        (out / "args.json").write_text(json.dumps(header, indent=1, default=str))
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
        print(f"{header['command']}\ngit {git} | torch {torch.__version__} torchvision {torchvision.__version__} | {device} | out {out}")
    return out


def answer_folder(out):
    """Make the folder of --eval or --predict, before the work; never that of a training run."""
    if (Path(out) / "log.jsonl").exists():
        raise UserError(f"--out {out}: holds a training run; choose another folder")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be made ({e.strerror})") from None


def can_resume(out, wanted, rank, device):
    """Whether to go on from out/last.pt: --resume was given and every process sees the file. Says so where there is none yet."""
    there = bool(wanted) and (Path(out) / "last.pt").exists()
    share = reduce_mean(torch.tensor(float(there), device=device)).item()
    if 0 < share < 1:
        raise UserError(f"--resume {out}: not every process sees last.pt there; with several machines --out must be on a disk they share")
    if wanted and not there and rank == 0:
        print(f"--resume {out}: there is no last.pt yet, starting at the beginning", flush=True)
    return there


def read_log(path):
    """Rows of a log.jsonl; a last line that a kill cut in half is left out."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]


class Log:
    """log.jsonl and the log line, from rank 0, around a tqdm bar that shows the time left.

    Losses come as device tensors and are only looked at every `every` steps, so no step waits for the GPU. Then all
    of them are checked: the first step with a non-finite loss stops the run, on all ranks at once, by name.
    """

    def __init__(self, out, rank, total, start=0, every=50):
        self.path, self.rank, self.total, self.every = Path(out) / "log.jsonl", rank, total, every
        self.pending, self.time, self.data_time = [], time.time(), 0.0
        if rank == 0 and self.path.exists():  # drop what was logged after the checkpoint that is resumed
            rows = read_log(self.path)
            self.path.write_text("".join(json.dumps(r) + "\n" for r in rows if r.get("it", 0) <= start))
        self.bar = tqdm(total=total, initial=start, disable=rank != 0, mininterval=1, dynamic_ncols=True)

    def step(self, it, epoch, losses, lr, data_time=0.0, watch={}):
        """Note the losses {name: scalar tensor} of iteration `it`, counted from 1; print and check every so often. watch: scalars that are no losses."""
        self.names, self.losses = [*losses, *watch], len(losses)
        self.pending.append(torch.stack([v.detach().float() for v in (*losses.values(), *watch.values())]))
        self.data_time += data_time
        self.bar.update()
        if it % self.every == 0 or it == self.total:
            self.flush(it, epoch, lr)

    def flush(self, it, epoch, lr):
        if not self.pending:
            return
        values = reduce_mean(torch.stack(self.pending)).cpu()  # (steps, terms); NaN on one rank is NaN on all
        bad = (~values.isfinite()).any(1).nonzero()
        if len(bad):
            row = values[bad[0, 0]]
            terms = ", ".join(f"{n}={v:.4g}" for n, v in zip(self.names, row.tolist()))
            what = "loss" if not row[:self.losses].isfinite().all() else self.names[int((~row.isfinite()).nonzero()[0])]
            raise UserError(f"{what} is not finite at iteration {it - len(values) + 1 + int(bad[0, 0])}: {terms}. "
                            "Lower --lr, or resume from last.pt, which was written before")
        mean, steps = values.mean(0).tolist(), len(values)
        seconds, now = (time.time() - self.time) / steps, time.time()
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        row = dict(it=it, epoch=epoch, loss=sum(mean[:self.losses]), **dict(zip(self.names, mean)), lr=lr,
                   data=self.data_time / steps, step=seconds, mem=memory)
        left = int((self.total - it) * seconds)
        eta = f"{left // 3600:02d}:{left // 60 % 60:02d}:{left % 60:02d}"
        self.write(row, f"ep {epoch:02d} it {it}/{self.total} | loss {row['loss']:.3f} " +
                   " ".join(f"{n} {v:.3f}" for n, v in zip(self.names, mean)) +
                   f" | lr {lr:.1e} | data {row['data']:.2f}s step {seconds:.2f}s | mem {memory:.1f}G | eta {eta}")
        self.pending, self.time, self.data_time = [], now, 0.0

    def write(self, row, line):
        if self.rank == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def restart_clock(self):
        """After an evaluation, whose time is not training time."""
        self.time = time.time()


# ------------------------------------------------------------------ pictures

def plot_curves(log_path, out_path):
    """Every loss term and AP of a log.jsonl over the iterations."""
    import matplotlib  # comes with lvis; needed here only
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_log(log_path)
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "loss" not in r and "refresh" not in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    skip = {"it", "epoch", "lr", "data", "step", "mem", "norm", "own", "other", "tau_c", "tau_m", "s", "sigma", "muted", "top1"}
    for name in (n for n in (train[-1] if train else {}) if n not in skip):
        left.plot([r["it"] for r in train], [r.get(name, math.nan) for r in train], label=name, lw=1)
    left.set(xlabel="iteration", ylabel="loss", yscale="log")
    for name in (n for n in (val[-1] if val else {}) if n in ("AP", "AP50", "top1", "gt_known") or n.endswith("_AP50") or n.startswith("AR1000_")):
        right.plot([r["it"] for r in val], [r.get(name, math.nan) for r in val], "o-", label=name)
    right.set(xlabel="iteration", ylabel="percent")
    for axis in (left, right):
        if axis.lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out_path, dpi=90)
    plt.close(figure)


def draw_boxes(image, boxes, labels, classes, scores=None):
    """uint8 (3, H, W) with boxes (N, 4) xyxy pixels and names drawn; scores (N,) are shown in percent."""
    if len(boxes) == 0:
        return image
    import matplotlib  # comes with lvis; here for its font
    palette = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#808000", "#000075"]
    names = [classes[k] + (f" {100 * s:.0f}" if scores is not None else "")
             for k, s in zip(labels.tolist(), scores.tolist() if scores is not None else [0] * len(labels))]
    short = min(image.shape[1:])
    font = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    return torchvision.utils.draw_bounding_boxes(image, boxes.cpu(), names, [palette[k % 10] for k in labels.tolist()],
                                                 width=max(1, short // 200), font=font, font_size=max(9, short // 35))


def save_samples(dataset, results, path, count=6, size=400):
    """A page of images of a CocoDataset: ground truth on the left, results above score 0.3 on the right."""
    rows, label_of = [], {c: k for k, c in enumerate(dataset.category_ids)}
    for image_id, name, _, _, boxes, labels in dataset.items[:count]:
        try:
            image = torchvision.io.decode_image(str(dataset.folder / name), torchvision.io.ImageReadMode.RGB)
        except RuntimeError:  # a format that torchvision does not know; the page is a help, not a result
            continue
        scale = size / max(image.shape[1:])
        image = torchvision.transforms.v2.functional.resize(image, [int(s * scale) for s in image.shape[1:]])
        mine = [r for r in results if r["image_id"] == image_id and r["score"] > 0.3]
        found = torch.tensor([r["bbox"] for r in mine]).reshape(-1, 4)
        found[:, 2:] += found[:, :2]
        pair = (draw_boxes(image, torch.from_numpy(boxes) * scale, torch.from_numpy(labels), dataset.classes),
                draw_boxes(image, found * scale, torch.tensor([label_of[r["category_id"]] for r in mine]), dataset.classes,
                           torch.tensor([r["score"] for r in mine])))
        rows += [torch.nn.functional.pad(x, (0, size - x.shape[2], 0, size - x.shape[1])) for x in pair]
    if rows:
        torchvision.io.write_jpeg(torchvision.utils.make_grid(torch.stack(rows), nrow=4), str(path), quality=85)
