# SPDX-License-Identifier: MIT
"""A detector as a program that runs without this repository: torch.export (.pt2) or ONNX (.onnx).

    export_program(Exported(model), "student.pt2", ("boxes", "scores"), classes)

    program = torch.export.load("student.pt2").module()          # anywhere, with torch alone, simple21k.py's
                                                                 # after `import torchvision`, for its NMS
    boxes, scores, *maps = program(images)                       # uint8 (B, 3, H, W), multiples of 32
    boxes, scores, *maps = program(images, sizes)                # dkdetr.py: and their h, w (B, 2)
"""
import importlib.util
import json
import os
import warnings
from pathlib import Path

import torch

from .run import UserError, why

LEAST = 160  # pixels of a side: below, the coarsest map has one cell, which torch.export takes for a constant


def inputs(sized, batch, height, width, seed):
    """(images,), or (images, sizes): of padded pictures, each smaller than the one before."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[height - 16 * k, width - 9 * k] for k in range(batch)])
    return (images, sizes) if sized else (images,)


@torch.no_grad()
def export_program(module, path, names, classes, sized=False):
    """Write module, whose input is uint8 (B, 3, H, W), as a program for any B and any H, W from LEAST on
    that are multiples of 32. sized: it has a second input, the h, w (B, 2) of the pictures without padding.

    names: of its first outputs, boxes (in pixels) and scores; further ones are raw. classes: kept in the
    file as classes.json (.pt2), or as metadata (.onnx). Before it is written the program is compared with
    the module on pictures of other sizes. Raises UserError, one line, where that is not possible.
    """
    path, module = Path(path), module.eval()
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(f"--export {path}: expected a name that ends in .pt2 (torch.export) or .onnx")
    lacks = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and lacks:
        raise UserError(f"--export {path}: needs {' and '.join(lacks)}, not installed: pip install onnx "
                        "onnxscript; or write a .pt2")
    height, width = (torch.export.Dim(side, min=LEAST // 32) for side in "hw")
    batch = torch.export.Dim("batch", min=1)
    free = ({0: batch, 2: 32 * height, 3: 32 * width}, {0: batch})[:1 + sized]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, inputs(sized, 2, 256, 320, 0), dynamic_shapes=free)
            run = program.module()
    except Exception as e:  # torch.export names a line of the network
        raise UserError(f"--export {path}: torch.export does not take this network ({why(e)})") from None
    for size in ((1, 320, 256), (3, LEAST, 448)):
        compare(path, run, module, inputs(sized, *size, 1))
    checked = "the same as in eager mode on other sizes of picture"
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt2":
            torch.export.save(program, draft, extra_files={"classes.json": json.dumps(classes)})
        else:
            onnx = torch.onnx.export(program, dynamo=True, output_names=list(names), verbose=False)
            onnx.model.metadata_props["classes"] = json.dumps(classes)
            onnx.save(draft)
            if importlib.util.find_spec("onnxruntime"):
                compare(path, onnx_runner(draft), module, inputs(sized, 1, 320, 256, 1))
            else:
                checked = "not run here, which needs onnxruntime"
        os.replace(draft, path)
    except (OSError, RuntimeError) as e:
        raise UserError(f"--export {path}: not written ({why(e)})") from None
    finally:
        draft.unlink(missing_ok=True)
    print(f"{path}: {path.stat().st_size >> 20} MB, {checked}; outputs {', '.join(names)}, raw maps")


def onnx_runner(file):
    """Function of an ONNX file's inputs -> its outputs."""
    import onnxruntime
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*values):
        return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, (v.numpy() for v in values))))]
    return run


def compare(path, run, module, values):
    """The program against the module: boxes to 1e-5 of the picture's size, all else to 1e-4."""
    try:
        found = run(*values)
    except AssertionError as e:
        raise UserError(f"--export {path}: the program would take pictures of one size only, as with Swin's "
                        f"windows ({why(e)}); not written") from None
    wanted = module(*values)
    pixels = (found[0] - wanted[0]).abs().max().item() / max(values[0].shape[2:])
    scores = (found[1] - wanted[1]).abs().max().item()
    if not (pixels <= 1e-5 and scores <= 1e-4):
        raise UserError(f"--export {path}: the program differs from the detector: boxes by {pixels:.1e} of "
                        f"the picture's size, scores by {scores:.1e}; not written")
