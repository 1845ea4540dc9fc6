# SPDX-License-Identifier: MIT
import faulthandler
import importlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from forks import Forks, free_port
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"


def pytest_configure(config):
    config.addinivalue_line("markers", "whole: the fixture quick leaves nothing out")
    config.option.loadscopereorder = False  # of xdist: the files of most tests first, which are not the longest
    config.stderr = os.fdopen(os.dup(2), "w")  # the real one, before pytest captures it
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # one of -n 2 processes: the other core is taken


@pytest.fixture(autouse=True)
def no_test_hangs(request):
    """A test that has not ended after ten minutes ends the whole run, with the stack of every thread."""
    faulthandler.dump_traceback_later(600, exit=True, file=request.config.stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def no_bar_is_left():
    """A bar that a test leaves behind is closed by the garbage collector, which may come while tqdm looks
    through all of them."""
    yield
    while tqdm._instances:
        tqdm._instances.pop().close()


SERVERS = {}  # script: Forks


@pytest.fixture(scope="session", autouse=True)
def servers_end():
    yield
    for each in SERVERS.values():
        each.close()
        shutil.rmtree(each.folder)


def server(script):
    if script not in SERVERS:
        SERVERS[script] = Forks(script, tempfile.mkdtemp())
    return SERVERS[script]


def killed(script, flags, out, number, when):
    """A run of one process that gets a signal as soon as its log has `when` lines, or this text: (exit code, stderr)."""
    job, log, until = server(script).start(*flags, "--out", out)[0], Path(out) / "log.jsonl", time.time() + 120
    mark, count = (when, 1) if isinstance(when, str) else ("\n", when)
    while not log.exists() or log.read_text().count(mark) < count:
        assert time.time() < until, job.err
        time.sleep(0.02)
    os.killpg(job.pid, number)
    return job.wait(), job.err


def launch(script, flags, procs=1, fail=False, torchrun=False):
    """The script's command line on the CPU, one thread each: CompletedProcess. One process runs in this one, several are forked from one that has
    imported the script, unless torchrun is to start them: a run saves ten seconds of imports."""
    flags = [str(f) for f in flags]
    if procs > 1 and not torchrun:
        jobs = server(script).start(*flags, procs=procs)
        codes = [job.wait(300) for job in jobs]
        r = subprocess.CompletedProcess(flags, next(filter(None, codes), 0), *("".join(getattr(job, k) for job in jobs) for k in ("out", "err")))
    elif procs > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(procs), "--master_port", str(free_port())]
        r = subprocess.run([*torchrun, f"{script}.py", *flags], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                           capture_output=True, text=True, timeout=300)
    else:
        out, err, code, threads, folder = io.StringIO(), io.StringIO(), 0, torch.get_num_threads(), os.getcwd()
        torch.set_num_threads(1)
        os.chdir(ROOT)
        try:
            with (mock.patch.object(sys, "argv", [f"{script}.py", *flags]), mock.patch("torch.cuda.is_available", return_value=False),
                  mock.patch.object(sys, "unraisablehook", sys.unraisablehook), redirect_stdout(out), redirect_stderr(err)):
                importlib.import_module(script).main()
        except SystemExit as e:  # an exit with a text is what prints one line; any other exception is a traceback and fails the test
            code = 1 if isinstance(e.code, str) else e.code or 0
            err.write(e.code if isinstance(e.code, str) else "")
        finally:
            torch.set_num_threads(threads)
            os.chdir(folder)
        r = subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())
    assert (r.returncode != 0) == fail, r.stdout[-2000:] + r.stderr[-3000:]
    return r


@pytest.fixture
def quick(request, monkeypatch):
    """FLOPs and curves have tests of their own, and a run or two of each script that have both (by torchrun, or marked as whole); in all others they
    would take a third of the time."""
    if "whole" not in request.keywords:
        monkeypatch.setattr("common.pictures.plot_curves", lambda *a: None)
        for name in ("crosskd", "hierkd", "dkdetr", "prototype_kd", "simple21k"):
            if name in sys.modules:
                monkeypatch.setattr(f"{name}.describe_model", lambda name, *a, **k: print(f"{name}:"))


@pytest.fixture
def quick_backbones(monkeypatch, tmp_path):
    """--init shapes trains for two steps on four pictures, into a cache of the test's own."""
    from common import tiny
    scenes, backbone = tiny.draw_scenes, tiny.shapes_backbone
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DETECTION_RETRAIN", raising=False)
    monkeypatch.setattr(tiny, "draw_scenes", lambda seed, count: scenes(seed, 4))
    monkeypatch.setattr(tiny, "shapes_backbone", lambda name, seed=0: backbone(name, seed, steps=2, batch=2))


@pytest.fixture(scope="session")
def coco_mini():
    """80 + 79 real COCO photographs."""
    path = SHARED / "data" / "coco_mini"
    if not path.exists():
        pytest.skip(f"real photographs are not here: {path}")
    return path


@pytest.fixture(scope="session")
def golden():
    """Numbers made by mmdet 3.3.0 and by the CrossKD authors' repository."""
    path = SHARED / "golden"
    if not path.exists():
        pytest.skip(f"golden numbers are not here: {path}")
    return path
