# SPDX-License-Identifier: MIT
"""Speed and memory of crosskd.py, all from one run on this machine: python tests/bench_crosskd.py [--quick]

(a) a training step of our RetinaNet-R50 and FCOS-R50 beside torchvision's own, same batch, input and frozen layers
(b) a CrossKD step beside student step + teacher forward        (c) loader and evaluation        (d) peak memory
With a GPU also: R101 -> R50 at 800 x 1333, images/s, peak memory and the share of the step that the GPU is busy.
Ratios are medians over interleaved repetitions, so that a busy machine slows both sides.

Measured. `python tests/bench_crosskd.py`, 2 cores of an AMD EPYC, torch 2.15, 2 images of 320 x 480
(memory on a GPU: README):

| | seconds | ratio |
|---|---|---|
| RetinaNet R50 training step, ours / torchvision's, same frozen layers | 1.15 / 1.16 | 0.996 (a second run: 0.975) |
| FCOS R50 training step, ours / torchvision's | 0.93 / 0.98 | 0.951 (0.978) |
| GFL R50 -> R18: CrossKD step / (student step + teacher forward) | 1.19 / 1.07 | 1.113 (1.149) |
| RetinaNet R101 -> R50: the same | 1.91 / 1.69 | 1.125 (1.160: the aim, 1.15, is met in one run of two) |

Loader: 262 (188) images/s per core (COCO photographs: decode, resize to 800 x 1333, batch). COCO
evaluation: 21 s for 5,000 images x 100 boxes. Peak memory of a GFL R18 step: 1.01 GB, with the R50 teacher
and the cross-head 1.22 GB (resident, weights and libraries included). On the CPU the scripts keep freed
memory in the process (`keep_memory` in `common/run.py`): without it the last ratio is 1.39. `--compile`
gives the same losses (to 1 % after 60 steps, the usual drift of another rounding) but takes 4.5 minutes to
compile on 2 cores, and compiles again for new image shapes.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import crosskd  # noqa: E402
from common.datasets import CocoDataset, find_coco, train_loader  # noqa: E402
from common.evaluation import coco_evaluate  # noqa: E402
from common.run import fast_layout, init_ddp  # noqa: E402

HEIGHT, WIDTH, BATCH = 320, 480, 2


def batch_of(height=HEIGHT, width=WIDTH, count=BATCH, boxes=8, device="cpu"):
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(count, boxes, 2, generator=g) * torch.tensor([width * 0.6, height * 0.6])
    size = 16 + torch.rand(count, boxes, 2, generator=g) * torch.tensor([width * 0.35, height * 0.35])
    batch = dict(images=torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=g), sizes=torch.tensor([[height, width]] * count),
                 boxes=torch.cat([corner, corner + size], -1), labels=torch.randint(0, 80, (count, boxes), generator=g))
    return {k: v.to(device) for k, v in batch.items()}


def interleaved(functions, repeats):
    """Median seconds of each function, called in turn."""
    times = [[] for _ in functions]
    for r in range(repeats + 1):
        for f, t in zip(functions, times):
            since = time.perf_counter()
            f()
            if r:  # the first round warms up
                t.append(time.perf_counter() - since)
    return [sorted(t)[len(t) // 2] for t in times]


def our_student(kind, backbone="r50"):
    model = crosskd.DETECTORS[kind](backbone)
    model.freeze()  # random weights take as long as pre-trained ones
    return model


def arguments(kind, *flags):
    return crosskd.resolve(crosskd.parse_args(["--student", f"{kind}_r50", *flags]))


def step_of(model, batch):
    def step():
        sum(model(batch).values()).backward()
        model.zero_grad(set_to_none=True)
    return step


def torchvision_step(kind, batch):
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import misc
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=misc.FrozenBatchNorm2d, trainable_layers=3,
                                   returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(2048 if kind == "retinanet" else 256, 256))
    height, width = batch["images"].shape[-2:]
    model = (RetinaNet if kind == "retinanet" else FCOS)(backbone, 80, min_size=height, max_size=width).train()
    targets = [dict(boxes=b, labels=l) for b, l in zip(batch["boxes"], batch["labels"])]

    def step():
        images = [x.float() / 255 for x in batch["images"]]
        sum(model(images, targets).values()).backward()
        model.zero_grad(set_to_none=True)
    return step


def bench_torchvision(repeats):
    batch = batch_of()
    for kind in ("retinanet", "fcos"):
        ours = step_of(crosskd.make_distiller(our_student(kind), None, arguments(kind, "--method", "none")).train(), batch)
        a, b = interleaved([ours, torchvision_step(kind, batch)], repeats)
        print(f"(a) {kind}_r50 step, {BATCH} x {HEIGHT} x {WIDTH}: ours {a:.2f} s, torchvision {b:.2f} s, ratio {a / b:.3f}", flush=True)


def bench_crosskd(repeats, device="cpu", batch=None, pairs=(("gfl", "r18", "r50"), ("retinanet", "r50", "r101"))):
    batch = batch or batch_of(device=device)
    for kind, small, large in pairs:
        teacher = crosskd.DETECTORS[kind](large).eval().requires_grad_(False).to(device)
        student = our_student(kind, small).to(device)
        plain = crosskd.make_distiller(student, None, arguments(kind, "--method", "none")).train()
        full = crosskd.make_distiller(student, teacher, arguments(kind)).train()

        @torch.no_grad()
        def forward():
            teacher(teacher.normalise(batch["images"], batch["sizes"]))
        s, t, c = interleaved([step_of(plain, batch), forward, step_of(full, batch)], repeats)
        print(f"(b) {kind} {large} -> {small}: student step {s:.2f} s + teacher forward {t:.2f} s; CrossKD step {c:.2f} s, ratio {c / (s + t):.3f}", flush=True)


def bench_data(images=5000, per_image=100):
    data = ROOT.parent / "shared/data/coco_mini"
    if data.exists():
        torch.set_num_threads(1)
        loader, plan = train_loader(CocoDataset(*find_coco(data, "train"), True), 2, 0, 1, 0, 0, False)
        since, count = time.time(), 0
        for epoch in range(2):
            plan.set_epoch(epoch)
            count += sum(len(b["image_ids"]) for b in loader)
        print(f"(c) loader: {count / (time.time() - since):.0f} images/s per core (COCO photographs, decode + resize to 800 x 1333 + batch)", flush=True)
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.rand(*s, generator=g)
    truth = dict(images=[dict(id=i, width=640, height=480) for i in range(images)], categories=[dict(id=k, name=str(k)) for k in range(80)], annotations=[])
    results = []
    for i in range(images):
        xy, wh, k = r(7, 2) * 400, 20 + r(7, 2) * 200, (r(7) * 80).long()
        truth["annotations"] += [dict(id=len(truth["annotations"]) + 1 + j, image_id=i, category_id=k[j].item(), bbox=[*xy[j].tolist(), *wh[j].tolist()],
                                      area=wh[j].prod().item(), iscrowd=0) for j in range(7)]
        pick = (r(per_image) * 7).long()
        box = torch.cat([xy[pick] + r(per_image, 2) * 20, wh[pick]], 1).tolist()
        results += [dict(image_id=i, category_id=c, bbox=b, score=s) for c, b, s in zip(k[pick].tolist(), box, r(per_image).tolist())]
    since = time.time()
    coco_evaluate(truth, results)
    print(f"(c) evaluation: {time.time() - since:.0f} s for {images} images x {per_image} boxes", flush=True)


def bench_memory():
    """Each configuration in a process of its own (Linux; getrusage would report the parent's peak if that is higher)."""
    for name, method in (("plain", "none"), ("CrossKD", "crosskd")):
        code = ("import sys; sys.path.insert(0, 'tests'); import bench_crosskd as b, crosskd; b.init_ddp()\n"
                "teacher = crosskd.GFL('r50').eval() if sys.argv[1] != 'none' else None\n"
                "b.step_of(crosskd.make_distiller(b.our_student('gfl', 'r18'), teacher, b.arguments('gfl', '--method', sys.argv[1])).train(), b.batch_of())()\n"
                "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])")
        peak = int(subprocess.run([sys.executable, "-c", code, method], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        print(f"(d) GFL R18 {name} step, {BATCH} x {HEIGHT} x {WIDTH}: peak {peak / 2**20:.2f} GB resident, weights and libraries included", flush=True)


def bench_gpu(repeats):
    from torch.profiler import ProfilerActivity, profile
    batch = batch_of(800, 1344, 2, device="cuda")
    for name, flags in (("fp32", []), ("bf16", ["--amp", "bf16"]), ("bf16 + compile", ["--amp", "bf16", "--compile"])):
        a = arguments("gfl", *flags)
        student, teacher = our_student("gfl").cuda(), crosskd.GFL("r101").cuda()
        for net in (student, teacher):
            fast_layout(net, torch.device("cuda"))
            if a.compile:
                net.compile(), net.head.compile()
        step = step_of(crosskd.make_distiller(student, teacher, a).train(), batch)
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        since = time.time()
        for _ in range(repeats * 3):
            step()
        torch.cuda.synchronize()
        seconds = (time.time() - since) / (repeats * 3)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as p:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
        busy = sum(e.self_device_time_total for e in p.key_averages()) / 3e6
        print(f"GPU {torch.cuda.get_device_name()} GFL R101 -> R50, 2 x 800 x 1344, {name}: {2 / seconds:.1f} images/s, "
              f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, GPU busy {100 * min(1, busy / seconds):.0f} %", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="3 repetitions and 500 evaluation images instead of 9 and 5000")
    quick = p.parse_args().quick
    init_ddp()  # as the scripts do; it also sets how the CPU's memory is kept
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        bench_gpu(3 if quick else 9)
    bench_torchvision(3 if quick else 9)
    bench_crosskd(3 if quick else 9)
    bench_memory()
    bench_data(500 if quick else 5000)
