# SPDX-License-Identifier: MIT
"""A detector as a program that runs without this repository: torch.export (.pt2) or ONNX (.onnx).

    export_program(Exported(model), "student.pt2", ("boxes", "scores"), classes)

    program = torch.export.load("student.pt2").module()          # anywhere, with torch alone
    boxes, scores, *maps = program(images)                       # uint8 (B, 3, H, W), multiples of 32
"""
import importlib.util
import json
import os
import warnings
from pathlib import Path

import torch

from .run import UserError, why

LEAST = 160  # pixels of a side: below, the coarsest map has one cell, which torch.export takes for a constant


def pictures(batch, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def export_program(module, path, names, classes):
    """Write module, whose input is uint8 (B, 3, H, W), as a program for any B and any H, W from LEAST on
    that are multiples of 32.

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
    free = {0: torch.export.Dim("batch", min=1), 2: 32 * height, 3: 32 * width}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (pictures(2, 256, 320, 0),), dynamic_shapes=(free,))
            run = program.module()
    except Exception as e:  # torch.export names a line of the network
        raise UserError(f"--export {path}: torch.export does not take this network ({why(e)})") from None
    for size in ((1, 320, 256), (3, LEAST, 448)):
        compare(path, run, module, pictures(*size, 1))
    checked = "equal to the detector on other sizes of picture"
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
                compare(path, onnx_runner(draft), module, pictures(1, 320, 256, 1))
            else:
                checked = "not run here, which needs onnxruntime"
        os.replace(draft, path)
    except (OSError, RuntimeError) as e:
        raise UserError(f"--export {path}: not written ({why(e)})") from None
    finally:
        draft.unlink(missing_ok=True)
    print(f"{path}: {path.stat().st_size >> 20} MB, {checked}; outputs {', '.join(names)}, raw maps")


def onnx_runner(file):
    """Function images -> outputs of an ONNX file."""
    import onnxruntime
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(x) for x in session.run(None, {name: images.numpy()})]


def compare(path, run, module, images):
    """The program against the module: boxes to 1e-5 of the picture's size, all else to 1e-4."""
    try:
        found = run(images)
    except AssertionError as e:
        raise UserError(f"--export {path}: the program would take pictures of one size only, as with Swin's "
                        f"windows ({why(e)}); not written") from None
    wanted = module(images)
    pixels = (found[0] - wanted[0]).abs().max().item() / max(images.shape[2:])
    scores = (found[1] - wanted[1]).abs().max().item()
    if not (pixels <= 1e-5 and scores <= 1e-4):
        raise UserError(f"--export {path}: the program differs from the detector: boxes by {pixels:.1e} of "
                        f"the picture's size, scores by {scores:.1e}; not written")
