# SPDX-License-Identifier: MIT
"""Speed of dkdetr.py, all from one run on this machine: python tests/bench_dkdetr.py [--size 512] [--quick]

(a) deformable attention alone, one encoder layer at 1024 x 1024: kept or computed again, time and memory saved for the backward pass
(b) a training step without and with distillation, CLIP's forward counted apart, and the peak memory of each   (c) crops a second.
With a GPU also: images/s and memory at 1024 x 1024, fp32, bf16, compiled. Random weights: they take as long. Medians of interleaved repetitions.

Measured. `python tests/bench_dkdetr.py --quick` (one repetition, two threads). Deformable attention of one
encoder layer at 1024 x 1024, forward / with backward / saved: grid 0.22 s / 1.57 s / 393 MiB, computed
again in the backward pass (the default) 0.34 / 1.70 / 53; gather 0.81 / 1.50 / 1,743, computed again 0.79 /
3.44 / 53. A training step of R50 with 2 x 512 px: 6.78 s without KD, 9.63 s with, 2.34 s of it CLIP's
ViT-B/32 on 40 crops: 1.07 times the plain step without CLIP's forward (another run 1.14; aim 1.35). Crops
to 224 in one batch: stretched 507 (573) a second, padded 679 (1,088). Peak memory of that step, CLIP and
libraries included: grid 5.29 GB, with KD 5.47; gather 6.10 and 6.30. (gather, another way to sample, is
gone since: slower forward, more memory.) `--compile` on shapes: the losses of
the first six steps, with distillation, agree to the three digits that are printed; 170 s in all, most of it
compiling.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import torch
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dkdetr  # noqa: E402
from common.clip import FrozenCLIP, crop_and_resize  # noqa: E402
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


def bench_attention(device, repeats):
    sizes = [(128, 128), (64, 64), (32, 32), (16, 16)]
    tokens = sum(h * w for h, w in sizes)
    g = torch.Generator().manual_seed(0)
    value, at = torch.randn(1, tokens, 8, 32, generator=g).to(device).requires_grad_(), torch.rand(1, tokens, 8, 4, 4, 2, generator=g).to(device).requires_grad_()
    weight = torch.rand(1, tokens, 8, 4, 4, generator=g).to(device).requires_grad_()
    core = dkdetr.msda_grid
    for again in (False, True):
        run = (lambda: checkpoint(core, value, sizes, at, weight, use_reentrant=False)) if again else (lambda: core(value, sizes, at, weight))
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
            out = run()
        kept = sum(saved.values()) / 2**20
        del out
        forward, both = interleaved([run, lambda: run().sum().backward()], repeats)
        print(f"attention, {tokens} tokens, {'computed again' if again else 'kept          '}: forward {forward:.3f} s, with backward {both:.3f} s, "
              f"saved {kept:.0f} MiB", flush=True)


def distiller_of(device, size, distil, amp="none", compiled=False):
    clip = FrozenCLIP(open_clip.create_model("ViT-B-32-quickgelu"), open_clip.get_tokenizer("ViT-B-32-quickgelu"), "random", device)
    a = dkdetr.resolve(dkdetr.parse_args(["--kd-min-size", "0"]))
    torch.manual_seed(0)
    model = dkdetr.DKDETR("r50", clip.dim).to(device)
    if compiled:
        model.compile()
    text = torch.nn.functional.normalize(torch.randn(866, clip.dim), dim=1).to(device)
    distiller = dkdetr.make_distiller(model, text, clip, dkdetr.settings_of(a), amp == "bf16").train()
    distiller.kd_active = distil
    return distiller


def batch_of(device, size, count):
    g = torch.Generator().manual_seed(0)
    corner, side = torch.rand(count, 10, 2, generator=g) * size * 0.6, size * (0.05 + 0.3 * torch.rand(count, 10, 2, generator=g))
    return dkdetr.to_device(dict(images=torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=g), sizes=torch.tensor([[size, size]] * count),
                                 boxes=torch.cat([corner, corner + side], -1), labels=torch.randint(0, 866, (count, 10), generator=g), counts=[10] * count), device)


def step(distiller, batch, optimizer):
    sum(distiller(batch).values()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def bench_step(device, size, count, repeats):
    batch, steps, spent = batch_of(device, size, count), [], [0.0, 0]
    for distil in (False, True):
        distiller = distiller_of(device, size, distil)
        optimizer = torch.optim.SGD(distiller.model.parameters(), 1e-9)
        steps.append(lambda l=distiller, o=optimizer: step(l, batch, o))
    encode = distiller.clip.encode_images

    def timed(pixels):
        result = []
        spent[0] += seconds(lambda: result.append(encode(pixels)))
        spent[1] += len(pixels)
        return result[0]
    distiller.clip.encode_images = timed
    plain, distilled = interleaved(steps, repeats)
    clip = spent[0] / (repeats + 1)
    print(f"step, {count} x {size} px: without KD {plain:.2f} s, with {distilled:.2f} s, of which CLIP {clip:.2f} s for {spent[1] / (repeats + 1):.0f} crops; "
          f"ratio without CLIP's forward {(distilled - clip) / plain:.3f} (aim 1.35)", flush=True)
    crops = torch.rand(160, 4, device=device).sort(1).values * size
    boxes, owner = torch.cat([crops[:, :2] * 0.5, crops[:, 2:]], 1), torch.arange(160, device=device) % count
    pixels = dkdetr.normalise(batch["images"], batch["sizes"], distiller.clip.grey_levels)
    for fit in ("warp", "pad"):
        cut = (lambda: dkdetr.roi_align(pixels, torch.cat([owner[:, None].to(boxes), boxes], 1), 224, aligned=True)) if fit == "warp" else (
            lambda: crop_and_resize(pixels, boxes, owner, 224))
        print(f"crops of one batch to 224, --crop-fit {fit}: {160 / interleaved([cut], repeats)[0]:.0f} a second", flush=True)


def memory(size, count, distil):
    """Peak of a process that does one step, in GB."""
    code = (f"import sys, torch; sys.path[:0] = ['{ROOT}', '{ROOT}/tests']; import bench_dkdetr as b; from common.run import keep_memory\n"
            f"d = torch.device('cpu'); l = b.distiller_of(d, {size}, {distil}); b.step(l, b.batch_of(d, {size}, {count}), torch.optim.SGD(l.model.parameters(), 0.1))\n"
            "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 2**20)")  # ru_maxrss would be that of this process
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(r.stdout.split()[-1]) if r.returncode == 0 else float("nan")


def bench_gpu(device):
    for amp, compiled in (("none", False), ("bf16", False), ("bf16", True)):
        count = 8
        try:
            torch.cuda.reset_peak_memory_stats()
            distiller, batch = distiller_of(device, 1024, True, amp, compiled), batch_of(device, 1024, count)
            optimizer = torch.optim.SGD(distiller.model.parameters(), 1e-9)
            t, = interleaved([lambda: step(distiller, batch, optimizer)], 5)
            print(f"GPU, 1024 px, batch {count}, {amp}, compile {compiled}: {count / t:.1f} images/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GB", flush=True)
        except Exception as e:  # out of memory, or a compiler that cannot
            print(f"GPU, {amp}, compile {compiled}: {type(e).__name__} {str(e)[:120]}", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--size", type=int, default=512)
    p.add_argument("--batch-size", type=int, default=2)
    p.add_argument("--quick", action="store_true", help="one repetition")
    a = p.parse_args()
    _, _, device = init_ddp()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else f'cpu, {torch.get_num_threads()} threads'}")
    repeats = 1 if a.quick else 5
    bench_attention(device, repeats)
    bench_step(device, a.size, a.batch_size, repeats)
    if device.type == "cuda":
        bench_gpu(device)
    else:
        print(f"peak memory of a step, {a.batch_size} x {a.size} px: without KD {memory(a.size, a.batch_size, False):.2f} GB, "
              f"with {memory(a.size, a.batch_size, True):.2f} GB (libraries and CLIP included)", flush=True)
