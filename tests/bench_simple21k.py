# SPDX-License-Identifier: MIT
"""Speed and memory of simple21k.py: python tests/bench_simple21k.py [--classes 80 1203 21841] [--size 512] [--predict-size 1024] [--backbone r50] [--quick]

(a) one step of stage II, 1 + 3 images, against the number of classes, with its peak memory   (b) prediction of a photo, likewise   (c) stage I: images/s of the
whole-image RoI head against torchvision's plain classifier of the same backbone   (d) loader: decoded and augmented images/s of one process.
Every width is a process of its own, so that peaks do not mix. Random weights: they take as long. With a GPU the same there, with its own memory.

Measured. `OMP_NUM_THREADS=1 python tests/bench_simple21k.py` (median of three; R50, 80 + K classes). A step
of stage II, 1 + 3 images of 512 px: 8.9, 9.7, 10.0 s and 3.93, 3.94, 4.20 GiB for K = 80, 1,203, 21,841
(aim at the last: 12 GB). A prediction at 1024 px: 3.9, 4.1, 5.4 s, 1.39 times the narrow one's (aim 1.5),
1.41, 1.45, 1.54 GiB (aim 8). Stage I, batch 16 of 224 px: 0.92 of the images/s of torchvision's plain
classifier (aim 0.85): only P4 is computed. Loader, images/s of one process, ImageNet photographs: decoded
676, stage I weak 216, strong 134, stage II's jitter 260.
"""
import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import simple21k as s  # noqa: E402
from common.imagenet import ImageIndex  # noqa: E402
from common.run import init_ddp  # noqa: E402

DATA = ROOT.parent / "shared" / "data" / "imagenet_mini" / "train"


def seconds(f):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    since = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - since


def median(f, repeats):
    f()  # warms up
    return sorted(seconds(f) for _ in range(repeats))[repeats // 2]


def peak(device):
    """GiB: of the GPU's tensors, or of this process."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def on(batch, device):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def width(a, device):
    """(a) or (b) for one number of classes, as a line of json."""
    import test_simple21k as t
    torch.manual_seed(0)
    args, model = t.flags(*(["--amp", "bf16"] if a.amp else []), backbone=a.backbone), s.Detector(t.arch_of(a.backbone, det=80, cls=a.one)).to(device)
    if a.what == "predict":
        model.eval()
        torch.nn.init.normal_(model.cls.weight, std=0.1)  # scores that differ: candidates pass the threshold
        vocabulary, batch = s.Vocabulary(model.arch, device), t.det_batch(1, a.predict_size)
        f = lambda: s.detect(model, batch, vocabulary, **s.detect_options(args))
    else:
        learner, det, cls = s.make_learner(model, args).train(), on(t.det_batch(1, a.size), device), on(t.cls_batch(3, a.size), device)
        model.body.fixed_norms = True
        learner.train()
        optimizer = torch.optim.AdamW(s.parameter_groups(model, 0.05), 1e-4)

        def f():
            sum(learner(dict(det=det, cls=cls)).values()).backward()
            optimizer.step(), optimizer.zero_grad(set_to_none=True)
    print(json.dumps(dict(seconds=median(f, a.repeats), peak=peak(device))))


def stage_one(a, device):
    """(c): one step, interleaved."""
    import test_simple21k as t
    import torchvision
    args, batch = t.flags(backbone=a.backbone, stage=1), on(t.cls_batch(a.batch, 224), device)
    model = s.Detector(t.arch_of(a.backbone, stage=1, cls=1000)).to(device)
    model.freeze_idle(args.stage1_size)
    plain = torchvision.models.get_model("resnet50" if a.backbone == "r50" else a.backbone, weights=None).to(device).train()
    learner = s.make_learner(model, args).train()
    ours = lambda: learner(dict(cls=batch))["cls"].backward()
    theirs = lambda: torch.nn.functional.cross_entropy(plain(s.normalise(batch)), batch["labels"]).backward()
    rows = [[seconds(f) for f in (ours, theirs)] for _ in range(a.repeats + 1)][1:]
    ours, theirs = (sorted(r)[len(r) // 2] for r in zip(*rows))
    print(f"(c) stage I, {a.backbone}, batch {a.batch}: {a.batch / ours:.1f} images/s, torchvision's classifier {a.batch / theirs:.1f}: {theirs / ours:.2f} of it")


def loader():
    """(d)"""
    if not DATA.exists():
        return print(f"(d) loader: no photographs at {DATA}")
    folder = tempfile.TemporaryDirectory()  # in which the index may be kept
    for path in DATA.glob("*/*"):
        (Path(folder.name) / path.parent.name).mkdir(exist_ok=True)
        (Path(folder.name) / path.parent.name / path.name).symlink_to(path)
    index = ImageIndex(folder.name)
    full = [i for i in range(len(index)) if index.read(i).size != (224, 224)]
    for name, transform in (("decode only", None), ("stage I, weak", s.ClassificationTransform(224, "weak", True)), ("stage I, strong", s.ClassificationTransform(224, "strong", True)),
                            ("stage II, jitter 1024", s.DetectionTransform(1024, (0.1, 2.0)))):
        f = lambda: [transform(index.read(i), random.Random(i)) if transform else index.read(i) for i in full]
        print(f"(d) loader, {name}: {len(full) / median(f, 2):.0f} images/s of one process ({len(full)} ImageNet photographs)", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--classes", type=int, nargs="+", default=[80, 1203, 21841])
    p.add_argument("--backbone", default="r50")
    p.add_argument("--size", type=int, default=512)
    p.add_argument("--predict-size", type=int, default=1024)
    p.add_argument("--batch", type=int, default=16, help="of stage I")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--amp", action="store_true")
    p.add_argument("--quick", action="store_true", help="one repetition")
    p.add_argument("--what", choices=("step", "predict"), help=argparse.SUPPRESS)
    p.add_argument("--one", type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    a.repeats = 1 if a.quick else a.repeats
    device = init_ddp()[2]
    if a.what:
        width(a, device)
        sys.exit()
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'cpu, {torch.get_num_threads()} threads'}, torch {torch.__version__}")
    for what, text in (("step", f"(a) stage II, {a.backbone}, 1 + 3 images of {a.size} px"), ("predict", f"(b) prediction, {a.backbone}, {a.predict_size} px")):
        for k in a.classes:
            more = ["--amp"] if a.amp else []
            r = subprocess.run([sys.executable, __file__, "--what", what, "--one", str(k), "--backbone", a.backbone, "--size", str(a.size), "--predict-size", str(a.predict_size),
                                "--repeats", str(a.repeats), *more], capture_output=True, text=True)
            if r.returncode:
                sys.exit(r.stderr[-800:])
            row = json.loads(r.stdout.splitlines()[-1])
            print(f"{text}, {k} classes: {row['seconds']:.2f} s, peak {row['peak']:.2f} GiB", flush=True)
    stage_one(a, device)
    loader()
