# SPDX-License-Identifier: MIT
"""Speed of hierkd.py, all from one run on this machine: python tests/bench_hierkd.py [--quick]

(a) a training step split into detector, crops, CLIP and captions, and what IKD and GKD cost in percent     (b) crops a second, batched
against PIL. With a GPU also: images/s and peak memory at the paper's setting, 8 images of 800 x 1333 with ViT-B/32.
CLIP's ViT-B/32 and the detector have random weights: they take as long. Medians of interleaved repetitions.

Measured. `python tests/bench_hierkd.py`, two threads. Crops of 16 to 700 pixels to 224: batched 2,439/s,
PIL one by one 1,880/s, 1.3x (1.5x in another run; aim 5x: **not met**). PIL is fast at this, and what is
left is moving 600 kB a crop; cut as bytes, one by one, by ATen's kernel they take a fifth of PIL's time,
but that is a loop over boxes on the host. In a step it does not matter: R50, 2 x 320 x 480, 123 crops:
detector 1.40 s; IKD + 6.34 s (452 %), of which CLIP's ViT-B/32 6.08 s and the crops 0.04 s; GKD + 0.28 s
(20 %). On a CPU IKD with the real CLIP is therefore for trying out. On shapes a step takes 0.12 s
without distillation and 0.14 to 0.16 s with both. `--compile` (inductor, 3 minutes to compile): the
first step's losses and gradient norm agree to 1e-6, after 20 steps the loss to 0.6 %, since whole-pixel
crops follow the rounding of the boxes.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import hierkd  # noqa: E402
from common.clip import FrozenCLIP, crop_and_resize, crop_windows, letterbox  # noqa: E402
from common.run import init_ddp  # noqa: E402


def batch_of(height, width, count, boxes, device):
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(count, boxes, 2, generator=g) * torch.tensor([width * 0.6, height * 0.6])
    size = 32 + torch.rand(count, boxes, 2, generator=g) * torch.tensor([width * 0.35, height * 0.35])
    batch = dict(images=torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=g), sizes=torch.tensor([[height, width]] * count),
                 boxes=torch.cat([corner, corner + size], -1), labels=torch.randint(0, 48, (count, boxes), generator=g))
    return {k: v.to(device) for k, v in batch.items()} | dict(captions=["a cat and two red umbrellas on the grass"] * count)


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


def step_of(distiller):
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-6)

    def step(batch):
        sum(distiller(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def bench_step(device, height, width, count, repeats, amp):
    clip = FrozenCLIP(open_clip.create_model("ViT-B-32-quickgelu"), open_clip.get_tokenizer("ViT-B-32-quickgelu"), "random", device)
    names, batch = [f"class {k}" for k in range(48)], batch_of(height, width, count, 6, device)
    steps, spent = {}, dict(crops=[0, 0.0], CLIP=[0, 0.0])
    for name, flags in (("detector", ["--no-ikd", "--no-gkd"]), ("IKD", ["--no-gkd"]), ("GKD", ["--no-ikd"]), ("both", [])):
        crops = [] if "--no-ikd" in flags else ["--ikd-box", "gt"]
        a = hierkd.resolve(hierkd.parse_args(["--amp", amp, *crops, *flags]))
        torch.manual_seed(0)
        model = hierkd.OpenATSS("r50", clip.class_embeddings(["background"])[0], clip.dim, gkd=a.gkd).to(device)
        model.body.train(False)
        distiller = hierkd.make_distiller(model, clip, names, a)
        distiller.least_iou = -1  # all positives, as late in training
        steps[name] = step_of(distiller)
    times = interleaved([lambda s=s: s(batch) for s in steps.values()], repeats)

    # What IKD's share consists of: the same calls, timed one by one.
    import common.clip as module
    plain_crop, plain_encode = module.crop_and_resize, clip.encode_images

    def timed(name, f):
        def call(*args, **more):
            result = []
            spent[name][1] += seconds(lambda: result.append(f(*args, **more)))
            spent[name][0] += len(result[0])
            return result[0]
        return call
    module.crop_and_resize, clip.encode_images = timed("crops", plain_crop), timed("CLIP", plain_encode)
    for _ in range(3):
        steps["IKD"](batch)
    module.crop_and_resize = plain_crop
    detector, ikd, gkd, both = times
    print(f"(a) step of R50 ATSS, {count} x {height} x {width}, ViT-B/32, --amp {amp}, {spent['crops'][0] // 3} crops: detector {1e3 * detector:.0f} ms | IKD +{1e3 * (ikd - detector):.0f} ms "
          f"({100 * (ikd / detector - 1):.0f} %; crops {1e3 * spent['crops'][1] / 3:.0f} ms, CLIP {1e3 * spent['CLIP'][1] / 3:.0f} ms) | GKD +{1e3 * (gkd - detector):.0f} ms "
          f"({100 * (gkd / detector - 1):.0f} %) | both {1e3 * both:.0f} ms, {count / both:.1f} images/s", flush=True)
    if device.type == "cuda":
        print(f"    peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GB")


def bench_crops(device, repeats, count=128, height=800, width=1344, size=224):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    side = np.exp(rng.normal(4.4, 0.7, (count, 2))).clip(16, 700)  # as COCO's boxes at 800 pixels
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([width, height]) - side).clip(1)
    boxes, owner = torch.from_numpy(np.concatenate([corner, corner + side], 1)).float(), torch.arange(count) % 2
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1), torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    windows, photos = crop_windows(boxes, height, width), [Image.fromarray(p) for p in pixels]
    (out, pad), square = letterbox(windows, size), tuple(int(255 * m) for m in open_clip.OPENAI_DATASET_MEAN)

    def by_pil():
        crops = []
        for window, o, p, b in zip(windows.tolist(), out.tolist(), pad.tolist(), owner.tolist()):
            canvas = Image.new("RGB", (size, size), square)
            canvas.paste(photos[b].crop(window).resize(o, Image.BICUBIC), p)
            crops.append((torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255 - mean) / std)
        torch.stack(crops).to(device)
    images = ((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std).to(device)
    boxes, owner = boxes.to(device), owner.to(device)
    ours, pil = interleaved([lambda: crop_and_resize(images, boxes, owner, size), by_pil], repeats)
    print(f"(b) {count} crops to {size} px on {device.type}, {torch.get_num_threads()} threads: batched {count / ours:.0f}/s, PIL one by one {count / pil:.0f}/s: {pil / ours:.1f}x", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="one repetition")
    quick = p.parse_args().quick
    _, _, device = init_ddp()
    bench_crops(device, 1 if quick else 7)
    bench_step(device, 320, 480, 2, 1 if quick else 5, "none")
    if device.type == "cuda":
        for amp in ("none", "bf16"):
            torch.cuda.reset_peak_memory_stats()
            bench_step(device, 800, 1344, 8, 1 if quick else 10, amp)
