"""common/run.py: schedules, checkpoints that survive a kill or a full disk, downloads, the log, two processes."""
import argparse
import errno
import hashlib
import importlib
import io
import json
import os
import pickle
import platform
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from common import run
from common.run import (Log, UserError, draw_boxes, fetch, init_ddp, load_checkpoint, open_run, plot_curves, reduce_mean, rng_state,
                        save_checkpoint, saved_flags, seed_all, set_rng_state, warmup_multistep)
from conftest import ROOT, free_port


def error_of(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ schedule

@pytest.mark.parametrize("it, lr", [(0, 1e-5), (1, 0.01 * (0.001 + 0.999 / 499)), (498, 0.01 * (0.001 + 0.999 * 498 / 499)),
                                    (499, 0.01), (500, 0.01), (7999, 0.01), (8000, 1e-3), (10999, 1e-3), (11000, 1e-4), (11999, 1e-4)])
def test_linear_warmup_and_milestones_by_hand(it, lr):
    assert 0.01 * warmup_multistep(it, 1000, (8, 11)) == pytest.approx(lr, rel=1e-9)


def test_second_learning_rate_is_the_published_one():
    assert f"{0.01 * warmup_multistep(1, 7330, (8, 11)):.3e}" == "3.002e-05"


@pytest.mark.parametrize("it, factor", [(0, 1 / 3), (1, 1 / 3), (498, 1 / 3), (499, 1), (15999, 1), (16000, 0.1), (22000, 0.01)])
def test_constant_warmup_by_hand(it, factor):
    assert warmup_multistep(it, 1000, (16, 22), start=1 / 3, constant=True) == pytest.approx(factor, rel=1e-12)


def test_milestones_and_a_short_warmup_multiply():
    assert warmup_multistep(2, 1, (1, 2), warmup=5, start=0.2) == pytest.approx(0.01 * (0.2 + 0.8 * 2 / 4))
    assert warmup_multistep(0, 10, (), warmup=1) == warmup_multistep(0, 10, (), warmup=0) == 1


# ------------------------------------------------------------------ saving

def in_child(code, folder):
    """Run `code` in a new python inside `folder`; returns its exit status, negative for a signal. Not os.fork: OpenMP's threads do
    not survive it, and the first large tensor operation of the child then waits for them for ever."""
    setup = f"""
import io, os, resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from common.run import UserError, save_checkpoint
"""
    return subprocess.run([sys.executable, "-c", setup + code], cwd=folder, timeout=120).returncode


def write_half(state, f):
    buffer = io.BytesIO()
    torch.serialization.save(state, buffer)
    f.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    f.flush()


def test_saved_checkpoint_loads_again_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(dict(it=1, w=torch.arange(5)), path)
    save_checkpoint(dict(it=2, w=torch.arange(6)), path)
    state = load_checkpoint(path)
    assert state["it"] == 2 and torch.equal(state["w"], torch.arange(6))
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("moment", ["half written", "before the rename"])
def test_kill_while_saving_leaves_the_previous_checkpoint(tmp_path, moment):
    path = tmp_path / "last.pt"
    save_checkpoint(dict(it=1, w=torch.arange(1000)), path)

    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    if moment == "half written":
        code = f"""
def save(state, f):
    buffer = io.BytesIO()
    torch.serialization.save(state, buffer)
    f.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    f.flush()
    {kill}
torch.save = save"""
    else:
        code = f"os.replace = lambda *_: {kill}"
    assert in_child(code + "\nsave_checkpoint(dict(it=2, w=torch.arange(100000)), 'last.pt')", tmp_path) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2  # the kill did come after the writing began
    assert load_checkpoint(path)["it"] == 1
    save_checkpoint(dict(it=3), path)
    assert load_checkpoint(path)["it"] == 3


def test_full_disk_keeps_the_previous_checkpoint_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(dict(it=1), path)

    def full(state, f):
        write_half(state, f)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    text = error_of(lambda: save_checkpoint(dict(it=2), path))
    assert str(path) in text and "No space left" in text and "previous one is intact" in text
    assert os.listdir(tmp_path) == ["last.pt"] and load_checkpoint(path)["it"] == 1
    text = error_of(lambda: save_checkpoint(dict(it=2), tmp_path / "best.pt"))
    assert "there is no earlier one" in text and os.listdir(tmp_path) == ["last.pt"]


def test_writing_past_a_real_size_limit_is_a_user_error(tmp_path):
    """The kernel refuses the write (as on a full disk or quota), through torch's own zip writer."""
    path, note = tmp_path / "last.pt", tmp_path / "note.txt"
    save_checkpoint(dict(it=1), path)

    assert in_child("""
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_checkpoint(dict(it=2, w=torch.zeros(1_000_000)), os.path.abspath("last.pt"))
except UserError as e:
    open("note.txt", "w").write(str(e))
""", tmp_path) == 0
    text = note.read_text()
    assert str(path) in text and "previous one is intact" in text and "\n" not in text
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "note.txt"] and load_checkpoint(path)["it"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_writing_to_a_full_device_is_a_user_error(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(dict(it=1), path)
    monkeypatch.setattr(run, "open", lambda name, mode: open("/dev/full", mode), raising=False)
    text = error_of(lambda: save_checkpoint(dict(it=2, w=torch.zeros(100_000)), path))
    monkeypatch.undo()
    assert str(path) in text and "not written" in text
    assert os.listdir(tmp_path) == ["last.pt"] and load_checkpoint(path)["it"] == 1


@pytest.mark.parametrize("error", [OSError(), RuntimeError(), RuntimeError("\n")])
def test_a_write_error_without_words_is_still_a_user_error(tmp_path, monkeypatch, error):
    def fail(state, f):
        raise error
    monkeypatch.setattr(torch, "save", fail)
    assert str(tmp_path / "last.pt") in error_of(lambda: save_checkpoint({}, tmp_path / "last.pt"))
    assert os.listdir(tmp_path) == []


def test_saving_into_a_folder_that_is_gone_is_a_user_error(tmp_path):
    path = tmp_path / "gone" / "last.pt"
    assert str(path) in error_of(lambda: save_checkpoint({}, path))


# ------------------------------------------------------------------ loading

def truncated(path, keep):
    torch.save(dict(w=torch.zeros(1000)), path)
    path.write_bytes(path.read_bytes()[:keep])


def old_format(path, keep):
    torch.save(dict(w=torch.zeros(1000)), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:keep])


UNREADABLE = dict(
    truncated=lambda p: truncated(p, 2000), one_byte_short=lambda p: truncated(p, -1), empty=lambda p: p.write_bytes(b""),
    zeros=lambda p: p.write_bytes(b"\0" * 1000), text=lambda p: p.write_text("hello world\n"),
    web_page=lambda p: p.write_text("<html>404 Not Found</html>\n"),
    lfs=lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
    photo=lambda p: Image.new("RGB", (8, 8)).save(p, format="jpeg"), folder=lambda p: p.mkdir(),
    old_truncated=lambda p: old_format(p, -5), old_cut_early=lambda p: old_format(p, 100))


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_checkpoint_is_one_line_that_says_so(tmp_path, name):
    path = tmp_path / f"{name}.pt"
    UNREADABLE[name](path)
    text = error_of(lambda: load_checkpoint(path))
    assert str(path) in text and "not a readable checkpoint" in text
    assert "trust" not in text  # it must not send the reader to weights_only=False


def test_missing_checkpoint_is_named(tmp_path):
    assert error_of(lambda: load_checkpoint(tmp_path / "no.pt")) == f"{tmp_path / 'no.pt'}: no such checkpoint"


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_with_the_remedy(tmp_path, zipped):
    path = tmp_path / "theirs.pt"
    torch.save(dict(state_dict=dict(w=torch.zeros(2)), args=argparse.Namespace(lr=1)), path, _use_new_zipfile_serialization=zipped)
    text = error_of(lambda: load_checkpoint(path))
    assert str(path) in text and "pickled objects" in text and "trust" in text and "weights_only=False" in text


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save(dict(w=torch.zeros(2), x=Attack()), tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack()))
    for name in ("bad.pt", "plain.pt"):
        error_of(lambda: load_checkpoint(tmp_path / name))
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------ random state

def test_random_streams_continue_after_a_saved_state(tmp_path):
    seed_all(5)
    random.gauss(0, 1), torch.randn(3), random.random()
    save_checkpoint(dict(rng=rng_state()), tmp_path / "rng.pt")
    expected = [random.random() for _ in range(4)], random.gauss(0, 1), torch.rand(5), torch.randperm(9)
    seed_all(77)
    set_rng_state(load_checkpoint(tmp_path / "rng.pt")["rng"])
    again = [random.random() for _ in range(4)], random.gauss(0, 1), torch.rand(5), torch.randperm(9)
    assert again[:2] == expected[:2] and torch.equal(again[2], expected[2]) and torch.equal(again[3], expected[3])


def test_seed_all_seeds_python_and_torch():
    draw = lambda: (random.random(), float(torch.rand(())))
    seed_all(3)
    first = draw()
    seed_all(4)
    second = draw()
    seed_all(3)
    assert draw() == first and all(a != b for a, b in zip(first, second))


# ------------------------------------------------------------------ downloads

@pytest.fixture
def hub(tmp_path):
    """An empty cache, and a file to fetch: (cache folder, path, url, sha256)."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    source = tmp_path / "weights-12345678.pth"
    source.write_bytes(b"weights" * 1000)
    yield tmp_path / "hub" / "checkpoints", source, source.as_uri(), hashlib.sha256(source.read_bytes()).hexdigest()
    torch.hub.set_dir(before)


@pytest.mark.parametrize("digits", [8, 64, 0])
def test_fetch_downloads_once_and_checks_the_hash(hub, digits, capsys):
    cache, source, url, sha = hub
    path = fetch(url, sha[:digits])
    assert path == cache / source.name and path.read_bytes() == source.read_bytes()
    source.unlink()
    assert fetch(url, sha[:digits]) == path  # no second download
    assert capsys.readouterr().out.count("downloading") == 1


def test_fetch_refuses_a_download_with_another_hash_and_keeps_nothing(hub):
    cache, source, url, sha = hub
    wrong = "00000000" if not sha.startswith("0") else "ffffffff"
    text = error_of(lambda: fetch(url, wrong))
    assert url in text and wrong in text and "damaged" in text
    assert list(cache.iterdir()) == []


def test_fetch_refuses_a_cached_file_with_another_hash(hub):
    cache, source, url, sha = hub
    path = fetch(url, sha[:8])
    path.write_bytes(path.read_bytes()[:-1])
    now = hashlib.sha256(path.read_bytes()).hexdigest()
    text = error_of(lambda: fetch(url, sha[:8]))
    assert str(path) in text and now[:8] in text and sha[:8] in text and "delete" in text


@pytest.mark.parametrize("kind", ["refused connection", "no such file"])
def test_fetch_offline_says_where_to_put_the_file(hub, kind, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    cache, source, _, _ = hub
    url = "http://127.0.0.1:1/net.pth" if kind == "refused connection" else (source.parent / "net.pth").as_uri()
    text = error_of(lambda: fetch(url, "12345678"))
    assert url in text and "Offline" in text and str(cache / "net.pth") in text
    assert list(cache.iterdir()) == []


# ------------------------------------------------------------------ run folder

def test_open_run_writes_what_was_run(tmp_path, capsys):
    args = argparse.Namespace(out=str(tmp_path / "a" / "b"), lr=0.01, data="coco")
    out = open_run(args, 0)
    header = json.loads((out / "args.json").read_text())
    assert out == tmp_path / "a" / "b" and header["args"] == dict(out=str(out), lr=0.01, data="coco")
    assert header["torch"] == torch.__version__ and header["git"] and header["command"]
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and str(out) in printed


def test_open_run_refuses_a_folder_with_a_run_unless_resumed(tmp_path):
    args = argparse.Namespace(out=str(tmp_path))
    open_run(args, 0)  # an existing folder without a log is fine
    (tmp_path / "log.jsonl").write_text('{"it": 1}\n')
    before = (tmp_path / "args.json").read_text()
    text = error_of(lambda: open_run(args, 0))
    assert "--out" in text and str(tmp_path) in text and "--resume" in text
    assert (tmp_path / "log.jsonl").read_text() == '{"it": 1}\n' and (tmp_path / "args.json").read_text() == before
    open_run(args, 0, resume=True)
    assert (tmp_path / "log.jsonl").read_text() == '{"it": 1}\n'


def test_open_run_where_a_file_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/sub"):
        assert str(tmp_path / out) in error_of(lambda: open_run(argparse.Namespace(out=str(tmp_path / out)), 0))


def test_open_run_on_other_ranks_writes_nothing(tmp_path, capsys):
    open_run(argparse.Namespace(out=str(tmp_path / "x")), 1)
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ""


# ------------------------------------------------------------------ log

def losses(cls=1.0, box=2.0):
    return dict(loss_cls=torch.tensor(float(cls), requires_grad=True), loss_box=torch.tensor(box))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_log_rows_are_means_over_the_steps_since_the_last_row(tmp_path, capsys):
    log = Log(tmp_path, 0, total=5, every=2)
    for it in range(1, 6):
        log.step(it, it // 3, losses(cls=it), lr=0.1 * it, data_time=0.5)
    rows = rows_of(tmp_path)
    assert [r["it"] for r in rows] == [2, 4, 5] and [r["epoch"] for r in rows] == [0, 1, 1]  # the last step always has a row
    assert [r["loss_cls"] for r in rows] == [1.5, 3.5, 5] and [r["loss_box"] for r in rows] == [2, 2, 2]
    assert [r["loss"] for r in rows] == [3.5, 5.5, 7] and [r["lr"] for r in rows] == pytest.approx([0.2, 0.4, 0.5])
    assert [r["data"] for r in rows] == [0.5] * 3
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert len(lines) == 3 and "it 2/5" in lines[0] and "loss_cls 1.500" in lines[0] and "eta 00:00:00" in lines[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_stops_at_its_own_step_by_name(tmp_path, value):
    log = Log(tmp_path, 0, total=100, every=10)
    for it in range(1, 10):
        log.step(it, 0, losses(box=value if it == 7 else 2.0), lr=0.1)
    text = error_of(lambda: log.step(10, 0, losses(), lr=0.1))
    assert "iteration 7:" in text and f"loss_box={value}" in text and "loss_cls=1" in text and "--lr" in text
    assert not (tmp_path / "log.jsonl").exists()


def test_non_finite_step_number_is_right_after_a_row_and_after_a_resume(tmp_path):
    log = Log(tmp_path, 0, total=100, start=25, every=10)
    for it in range(26, 33):
        log.step(it, 0, losses(), lr=0.1)  # a row at 30
    log.step(33, 0, losses(cls=float("nan")), lr=0.1)
    log.step(34, 0, losses(cls=float("nan")), lr=0.1)
    text = error_of(lambda: log.flush(34, 0, 0.1))
    assert "iteration 33:" in text and "loss_cls=nan" in text and "loss_box=2" in text


def test_flags_of_a_run_come_from_its_last_checkpoint_only(tmp_path):
    save_checkpoint(dict(model={}, args=dict(seed=3)), tmp_path / "last.pt")
    save_checkpoint(dict(model={}), tmp_path / "best.pt")
    assert saved_flags(tmp_path / "last.pt") == dict(seed=3)
    with pytest.raises(UserError, match="best.pt: holds no training state"):
        saved_flags(tmp_path / "best.pt")


def test_resume_drops_the_rows_after_the_checkpoint(tmp_path):
    log = Log(tmp_path, 0, total=10, every=2)
    for it in range(1, 9):
        log.step(it, 0, losses(cls=it), lr=0.1)
    log.write(dict(it=6, AP=12.5), "AP 12.5")
    again = Log(tmp_path, 0, total=10, start=6, every=2)
    assert sorted(r["it"] for r in rows_of(tmp_path)) == [2, 4, 6, 6]
    again.step(7, 0, losses(), lr=0.1)
    again.step(8, 0, losses(cls=100.0), lr=0.1)
    rows = rows_of(tmp_path)
    assert [r["it"] for r in rows] == [2, 4, 6, 6, 8] and rows[-1]["loss_cls"] == 50.5 and rows[3]["AP"] == 12.5


def test_resume_after_a_kill_in_the_middle_of_a_log_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"it": 2, "loss": 1.0}\n{"it": 4, "loss": 1.0}\n{"it": 6, "lo')
    Log(tmp_path, 0, total=10, start=4)
    assert [r["it"] for r in rows_of(tmp_path)] == [2, 4]


def test_other_ranks_write_no_log(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"it": 9}\n')
    log = Log(tmp_path, 1, total=2, start=0, every=1)
    log.step(1, 0, losses(), lr=0.1)
    assert (tmp_path / "log.jsonl").read_text() == '{"it": 9}\n' and capsys.readouterr().out == ""


def test_time_left_of_more_than_a_day_is_not_cut(tmp_path, capsys):
    log = Log(tmp_path, 0, total=10_001, every=1)
    log.time -= 100.0  # the step took 100 s: 1,000,000 s = 11 days 13:46:40 = 277:46:40 are left
    log.step(1, 0, losses(), lr=0.1)
    line = capsys.readouterr().out
    assert re.search(r"eta (27[78]:|11 ?d)", line), line


def test_evaluation_time_is_not_step_time(tmp_path):
    log = Log(tmp_path, 0, total=2, every=1)
    log.time -= 1000.0
    log.restart_clock()
    log.step(1, 0, losses(), lr=0.1)
    assert rows_of(tmp_path)[0]["step"] < 100


# ------------------------------------------------------------------ pictures

def test_curves_are_a_png_with_and_without_evaluations(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "log.jsonl"
    train = [dict(it=i, epoch=0, loss=3 / i, loss_cls=2 / i, lr=0.1, data=0.1, step=0.2, mem=0.0) for i in range(1, 6)]
    for name, rows in dict(train=train, both=train + [dict(it=5, AP=10.0, AP50=20.0)], none=[]).items():
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        plot_curves(path, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.format == "PNG" and picture.size[0] > 600
    pixels = {name: np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("train", "both", "none")}
    half = pixels["both"].shape[1] // 2
    colourful = lambda p: int((p.max(-1).astype(int) - p.min(-1) > 60).sum())
    assert colourful(pixels["train"][:, :half]) > colourful(pixels["none"][:, :half]) + 50  # losses on the left
    assert colourful(pixels["both"][:, half:]) > colourful(pixels["train"][:, half:]) + 10  # AP on the right


@pytest.mark.filterwarnings("error")
def test_drawing_no_boxes_returns_the_image_unchanged_without_a_warning():
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    before = image.clone()
    drawn = draw_boxes(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), ["a"], torch.zeros(0))
    assert torch.equal(drawn, before)


@pytest.mark.parametrize("scores", [None, torch.tensor([0.9, 0.4])])
def test_drawn_boxes_change_their_edges_and_spare_the_rest(scores):
    image = torch.full((3, 100, 120), 128, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 30, 90, 80], [60, 10, 110, 60]])
    drawn = draw_boxes(image, boxes, torch.tensor([0, 11]), [f"class{k}" for k in range(12)], scores)
    assert drawn.shape == image.shape and drawn.dtype == torch.uint8
    assert (image == 128).all()  # the input is not drawn on
    for x, y, colour in ((20, 70, (0xe6, 0x19, 0x4b)), (110, 50, (0x3c, 0xb4, 0x4b))):  # class 11 has the colour of class 1
        assert tuple(drawn[:, y, x].tolist()) == colour
    assert (drawn[:, 90:] == 128).all() and (drawn[:, 70, 40] == 128).all()


# ------------------------------------------------------------------ processes

def test_plain_python_is_rank_0_of_1(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    rank, world, device = init_ddp()
    assert (rank, world) == (0, 1) and device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_large_tensors_are_allocated_without_new_page_faults():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import resource, torch
from common.run import init_ddp
torch.set_num_threads(1)
for kept in (False, True):
    if kept:
        init_ddp()
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    env = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    plain, kept = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.split())
    assert kept < plain / 10 or plain < 100  # < 100: huge pages


def test_reduce_mean_of_one_process_is_a_detached_copy():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = reduce_mean(x)
    assert y.tolist() == [1, 2] and not y.requires_grad
    y += 1
    assert x.tolist() == [1, 2]


TWO = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from common.run import Log, UserError, init_ddp, reduce_mean
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=2)
joined = init_ddp()[:2]
x = torch.tensor([1.0, 10.0]) * (1 + 2 * rank)
mean = reduce_mean(x).tolist()
log, text = Log({folder!r}, rank, total=3, every=3), ""
try:
    for it in (1, 2, 3):
        log.step(it, 0, dict(loss_a=torch.tensor(1.0), loss_b=torch.tensor(float("nan") if (rank, it) == (1, 2) else 2.0)), lr=0.1)
except UserError as e:
    text = str(e)
print(json.dumps([joined, mean, x.tolist(), text]))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_average_and_stop_together_on_a_nan_of_one(tmp_path):
    code = TWO.format(root=str(ROOT), port=free_port(), folder=str(tmp_path))
    env = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(2)]
    try:
        replies = [p.communicate(timeout=60) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], replies
    for rank, (out, _) in enumerate(replies):
        joined, mean, x, text = json.loads(out.splitlines()[-1])
        assert joined == [rank, 2] and mean == [2, 20] and x == [1 + 2 * rank, 10 + 20 * rank]
        assert "iteration 2:" in text and "loss_b=nan" in text and "loss_a=1" in text


def test_watched_numbers_are_logged_but_are_no_part_of_the_loss(tmp_path):
    log = Log(tmp_path, 0, 2, every=2)
    for it in (1, 2):
        log.step(it, 1, dict(a=torch.tensor(1.0), b=torch.tensor(2.0)), 0.1, watch=dict(norm=torch.tensor(5.0)))
    row, = rows_of(tmp_path)
    assert row["loss"] == 3 and row["norm"] == 5 and row["b"] == 2


@pytest.mark.parametrize("script", ["crosskd", "hierkd", "dkdetr", "prototype_kd", "simple21k"])
def test_no_flag_is_the_beginning_of_one_of_torchruns(script, capsys):
    """torchrun looks at all words of its command line: a script's --start would be refused as an abbreviation of its --start-method."""
    from torch.distributed.run import get_args_parser
    theirs = set(get_args_parser()._option_string_actions)
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    ours = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out.split("options:")[0]))
    assert len(ours) > 20 and not [(a, b) for a in ours for b in theirs if b.startswith(a) and a != b]
