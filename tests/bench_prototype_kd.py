# SPDX-License-Identifier: MIT
"""Speed of prototype_kd.py, all from one run on this machine: python tests/bench_prototype_kd.py [--size 512] [--pair r18 r34] [--quick]

(a) selection, Alg. 1: 80 classes x 5 levels x 800 instances, one problem of N = 20,000 with its peak memory; against the direct transcription
(b) a distilled step against torchvision's own training step plus the teacher's forward   (c) the refresh of the prototypes as a share of an epoch.
With a GPU also: the same there, images/s and memory, fp32 and bf16. Random weights: they take as long. Medians of interleaved repetitions.

Measured. `OMP_NUM_THREADS=1 python tests/bench_prototype_kd.py --quick` (one repetition, while the tests
ran on the other core). Selecting 10 of 800 instances: 0.024 s, the direct transcription 4.0 s, the same
picks; 80 classes x 5 levels x 800: 12 s (transcription 0.4 h); 20,000 instances: 4.7 s, 0.3 GiB more than
the features themselves (1.0 GiB in all; aim 2). A step of R101 -> R50 on 2 x 512 x 672 pixels against
torchvision's own training step plus the teacher's forward: Faster R-CNN 10.5 s / (8.1 + 3.1) = 0.93,
RetinaNet 11.0 / (6.5 + 3.0) = 1.15 (aim 1.20; a ratio below 1 is noise). Extracting the student's features
for a refresh on COCO (64,000 images): 8 % of an epoch. `--compile` of prototype_kd.py on shapes: the first
step's losses are the same to six digits; cut off after 230 s, most of it compiling.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prototype_kd as pk  # noqa: E402
from common.run import init_ddp  # noqa: E402


def seconds(f):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    since = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - since


def interleaved(functions, repeats):
    times = [[seconds(f) for f in functions] for _ in range(repeats + 1)][1:]  # the first round warms up
    return [sorted(t)[len(t) // 2] for t in zip(*times)]


def features(n, d=256, seed=0):
    """Two spaces of unit columns with a common component, as the features of one class have it."""
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(d, n, generator=g) + 0.5 * torch.randn(d, 1, generator=g), dim=0) for _ in range(2)]


def transcription(f_t, f_s, k, lam):
    """Alg. 1 line by line: for each candidate the residuals of all instances (the D x N temporaries are what costs)."""
    r_t, r_s, picks = f_t, f_s, []
    for _ in range(k):
        best = None
        for c in range(f_t.shape[1]):
            if c in picks:
                continue
            g_t, g_s = f_t[:, c], f_s[:, c]
            w_t, w_s = pk.coefficients(g_t @ r_t, g_s @ r_s, g_t @ g_t, g_s @ g_s, lam)
            e_t, e_s = r_t - torch.outer(g_t, w_t), r_s - torch.outer(g_s, w_s)
            value = e_t.square().sum() + e_s.square().sum() + lam * (w_t - w_s).square().sum()
            if best is None or value < best[0]:
                best = value, c, e_t, e_s
        _, c, r_t, r_s = best
        picks.append(c)
    return picks


def bench_selection(device, quick):
    f_t, f_s = (x.to(device) for x in features(800))
    fast, = interleaved([lambda: pk.select_prototypes(f_t, f_s, 10, 10.0)], 5)
    picks = 2 if quick else 10
    since = time.perf_counter()
    slow = transcription(f_t.double(), f_s.double(), picks, 10.0)
    direct = (time.perf_counter() - since) * 10 / picks
    assert pk.select_prototypes(f_t, f_s, picks, 10.0).tolist() == slow
    print(f"selection, 800 instances, K = 10: {fast:.3f} s, transcription {direct:.1f} s{' (from 2 picks)' if quick else ''}, the same picks", flush=True)
    problems = [features(800, seed=s) for s in range(8 if quick else 40)]
    total = sum(seconds(lambda: pk.select_prototypes(a.to(device), b.to(device), 10, 10.0)) for a, b in problems) * 400 / len(problems)
    print(f"selection, 80 classes x 5 levels x 800: {total:.1f} s (from {len(problems)} of 400 problems), transcription {direct * 400 / 3600:.1f} h", flush=True)
    if device.type == "cpu":
        code = ("import sys; sys.path.insert(0, '.'); sys.path.insert(0, 'tests'); import torch, time, re; from bench_prototype_kd import features, pk\n"
                "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 2**20\n"
                "a, b = features(20000); before = peak(); t = time.time(); pk.select_prototypes(a, b, 10, 10.0); print(f'{time.time() - t:.1f} {before:.2f} {peak():.2f}')")
        s, before, after = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        print(f"selection, 20,000 instances: {s} s, process at its largest {after} GiB, {before} GiB before; an N x N matrix in fp32 alone: 1.5 GiB", flush=True)
    else:
        a, b = (x.to(device) for x in features(20000))
        torch.cuda.reset_peak_memory_stats()
        s = seconds(lambda: pk.select_prototypes(a, b, 10, 10.0))
        print(f"selection, 20,000 instances: {s:.2f} s, {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", flush=True)


def make_learner(kind, pair, device, flags=()):
    args = pk.resolve(pk.parse_args(["--teacher", f"{kind}_r101", *flags]))
    torch.manual_seed(0)
    names = [f"class {k}" for k in range(80)]
    student, teacher = (pk.new_detector(f"{kind}_{body}", names, "none").to(device) for body in pair)
    pk.freeze(student)
    teacher = teacher.eval().requires_grad_(False)
    bank = pk.Bank(None, names, **pk.bank_options(args))
    d = student.backbone.out_channels
    g_t, g_s = (F.normalize(torch.randn(80, 5, 10, d), dim=-1) for _ in range(2))
    bank.load(dict(g_t=g_t, g_s=g_s, valid=torch.ones(80, 5, 10, dtype=torch.bool), ids=torch.zeros(80, 5, 10).long(), center_t=torch.zeros(5, d), center_s=torch.zeros(5, d)), device)
    return pk.make_distiller(student, teacher, bank, args).to(device).train(), pk.Distiller(student, amp=args.amp == "bf16").train(), teacher


def make_batch(count, height, width, boxes, device):
    g = torch.Generator().manual_seed(0)
    xy = torch.rand(count, boxes, 2, generator=g) * torch.tensor([width * 0.7, height * 0.7])
    where = torch.cat([xy, xy + 16 + torch.rand(count, boxes, 2, generator=g) * 0.25 * min(height, width)], 2)
    return pk.to_device(dict(images=torch.randint(0, 256, (count, 3, height, width), generator=g, dtype=torch.uint8), sizes=torch.tensor([[height, width]] * count), boxes=where,
                             labels=torch.randint(0, 80, (count, boxes), generator=g), image_ids=[*range(count)], original_sizes=[(height, width)] * count, image_sizes=[(height, width)] * count, counts=[boxes] * count), device)


def bench_step(kind, pair, size, batch_size, device, repeats, flags=()):
    distilled, plain, teacher = make_learner(kind, pair, device, flags)
    height, width = size, size * 4 // 3 // 32 * 32
    batch = make_batch(batch_size, height, width, 7, device)

    def step(learner):
        learner.zero_grad()
        sum(learner(batch).values()).backward()

    @torch.no_grad()
    def teacher_forward():
        images = pk.images_of(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in flags):
            maps = {k: pk.fp32(v) for k, v in teacher.backbone(images.tensors).items()}
        if kind == "faster":  # its box head on the student's positive proposals, of which there are a few dozen
            pk.box_logits(teacher, maps, [b.repeat(4, 1) for b in batch["boxes"]], images.image_sizes)
        else:
            teacher.head.classification_head(list(maps.values()))

    @torch.no_grad()
    def student_features():
        images = pk.images_of(batch)
        maps = list(plain.student.backbone(images.tensors).values())
        pk.descriptors(maps, pk.STRIDES[kind], batch["boxes"].flatten(0, 1), torch.arange(batch_size, device=device).repeat_interleave(7))

    a, t, d, f = interleaved([lambda: step(plain), teacher_forward, lambda: step(distilled), student_features], repeats)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, {batch_size / d:.1f} images/s" if device.type == "cuda" else ""
    print(f"{kind} {pair[1]} -> {pair[0]}, {batch_size} images of {height} x {width} {' '.join(flags)}: torchvision's step {a:.2f} s, teacher's forward {t:.2f} s, "
          f"distilled step {d:.2f} s = {d / (a + t):.2f} times their sum{memory}", flush=True)
    images = 64000
    print(f"  refresh on COCO: {images:,} images x {f / batch_size:.3f} s for features = {100 * images * f / (117266 * d):.0f} % of an epoch of distilled steps, and the selection of (a)", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--size", type=int, default=512)
    p.add_argument("--pair", nargs=2, default=["r50", "r101"], help="student and teacher")
    p.add_argument("--batch-size", type=int, default=2)
    p.add_argument("--quick", action="store_true", help="fewer repetitions")
    a = p.parse_args()
    _, _, device = init_ddp()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}")
    bench_selection(device, a.quick)
    for kind in ("faster", "retina"):
        bench_step(kind, a.pair, a.size, a.batch_size, device, 1 if a.quick else 5)
        if device.type == "cuda":
            bench_step(kind, a.pair, 800, 16, device, 5, ["--amp", "bf16"])
