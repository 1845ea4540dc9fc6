# SPDX-License-Identifier: MIT
"""common/run.py: schedules, checkpoints that survive a kill or a full disk, downloads, the log, two processes."""
import argparse
import errno
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

import pytest
import torch
from PIL import Image

from common import run
from common.run import (COUNT, POSITIVE, SEED, Log, UserError, checksum, explain, first_not_finite, fold, gather, init_ddp, load_checkpoint,
                        load_strict, number, open_run, open_table, parse, parser, read_log, reduce_mean, rng_state, run_flags, save_checkpoint,
                        saved_flags, script_of, seed_all, set_rng_state, split_line, unlock, warmup_multistep, write_whole)
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
def test_pickled_objects_in_a_checkpoint_of_ours_are_refused(tmp_path, zipped):
    path = tmp_path / "theirs.pt"
    torch.save(dict(state_dict=dict(w=torch.zeros(2)), args=argparse.Namespace(lr=1)), path, _use_new_zipfile_serialization=zipped)
    text = error_of(lambda: load_checkpoint(path))
    assert str(path) in text and "pickled objects" in text and "trust" not in text


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
    lines = [line for line in capsys.readouterr().out.replace("\n    ", " ").splitlines() if "loss" in line]
    assert len(lines) == 3 and "it 2/5" in lines[0] and "loss_cls 1.500" in lines[0] and "eta 0:00:00" in lines[2]
    assert "mem" not in lines[0]  # of a GPU, where there is one


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
    save_checkpoint(dict(model={}, optimizer={}, rng=[], it=1, args=dict(seed=3)), tmp_path / "last.pt")
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
    ours = set(re.findall(r"(?m)^  (--[a-z][\w-]*)", capsys.readouterr().out))
    assert len(ours) > 20 and not [(a, b) for a in ours for b in theirs if b.startswith(a) and a != b]


@pytest.mark.parametrize("script", ["crosskd", "hierkd", "prototype_kd", "dkdetr"])
def test_shapes_says_what_it_does(script):
    """Every default of --data shapes is one: no table of other defaults comes before it."""
    module = importlib.import_module(script)
    args = vars(module.resolve(module.parse_args(["--data", "shapes", "--max-iters", "1"])))
    assert {k: args[k] for k in module.SHAPES} == module.SHAPES


@pytest.mark.parametrize("script", ["hierkd", "dkdetr"])
def test_a_run_with_names_is_continued_by_its_own_command(tmp_path, script, capsys):
    """A stopped run prints its command with --resume: --novel as it was given, or the same names in a file, and no others."""
    module, out = importlib.import_module(script), str(tmp_path / "r")
    own = ["--train-json", "a", "--train-images", "b", "--out", out, "--novel"]
    first = module.resolve(module.parse_args([*own, "cup,hair drier"]))
    (tmp_path / "r").mkdir()
    (tmp_path / "r/args.json").write_text(json.dumps(dict(args=vars(first))))
    (tmp_path / "names.txt").write_text("cup\nhair drier\n")
    for again in (["cup,hair drier"], [str(tmp_path / "names.txt")], ["cup", "--novel", "hair drier"]):
        assert vars(module.resolve(module.parse_args([*own, *again, "--resume"])))["novel"] == first.novel == [["cup", "hair drier"]]
    with pytest.raises(SystemExit):
        module.parse_args([*own, "cup", "--resume"])
    assert "which --resume keeps" in capsys.readouterr().err


@pytest.mark.parametrize("script,make", [("crosskd", "shapes_teacher"), ("prototype_kd", "shapes_detector"), ("dkdetr", "shapes_start"), ("simple21k", "shapes_stage1")])
def test_what_shapes_prepares_does_not_depend_on_the_number_of_processes(script, make, monkeypatch):
    """It is cached: four processes must make what one would have, with a quarter of the batch each."""
    from common import tiny
    module, seen = importlib.import_module(script), []

    def trained_before(name, seed, rank, train, **numbers):
        train("out")
        raise InterruptedError

    monkeypatch.setattr(tiny, "trained_before", trained_before)
    monkeypatch.setattr("common.shapes.make_shapes", lambda **_: ROOT)  # nothing is drawn
    monkeypatch.setattr(module, "train_loader", lambda data, batch, rank, world, *_: (None, range(1952 // (batch * world))), raising=False)
    if script == "dkdetr":
        monkeypatch.setattr(module, "make_data", lambda *_: None)
    for name in ("train", "train_stage"):
        monkeypatch.setattr(module, name, lambda args, *rest: seen.append(args), raising=False)
    args = module.parse_args(["--data", "shapes"])
    args = args if script == "simple21k" else module.resolve(args)
    for world in (1, 4):
        with pytest.raises(InterruptedError):
            (lambda *x: getattr(module, make)(*(("faster_tiny8",) * (script == "prototype_kd")), *x))(args, 0, world, torch.device("cpu"))
    key = "stage1_batch" if script == "simple21k" else "batch_size"
    one, four = map(vars, seen)
    assert one[key] == 4 * four[key] and {k for k in one if one[k] != four[k]} == {key}


def test_a_run_does_not_take_the_folder_of_a_table(tmp_path):
    args = argparse.Namespace(out=str(tmp_path / "t"), resume=False)
    open_table(args, 0)
    assert "holds a run already" in error_of(lambda: open_run(args, 0))
    assert "holds a run already" in error_of(lambda: open_run(args, 0, resume=True))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/args.json").write_text('{"args": {"table"')  # of a run that was killed while it began
    open_run(argparse.Namespace(out=str(tmp_path / "cut")), 0)


GATHER = """
import json, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
from common.run import gather
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=3)
mine = [dict(image_id=10 * rank + k, bbox=[rank + 0.5]) for k in range((3, 0, 2)[rank])]
whole, nothing = gather(mine), gather([])
print(json.dumps([whole, nothing, len(mine)]))
dist.barrier()
dist.destroy_process_group()
"""


def test_gather_gives_every_record_once_to_rank_0_and_none_to_the_others():
    code = GATHER.format(root=str(ROOT), port=free_port())
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "GLOO_SOCKET_IFNAME": "lo"}) for rank in range(3)]
    try:
        replies = [p.communicate(timeout=60) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0, 0], replies
    (whole, nothing, _), *others = [json.loads(out.splitlines()[-1]) for out, _ in replies]  # gloo of torch 2.9 talks
    assert [r["image_id"] for r in whole] == [0, 1, 2, 20, 21] and whole[3]["bbox"] == [2.5]
    assert nothing == []
    assert others == [[None, None, 0], [None, None, 2]]


def test_gather_without_processes_is_the_list_itself():
    assert gather([1, 2]) == [1, 2] and gather([]) == []


# ------------------------------------------------------------------ flags

def flags(*argv, name="crosskd", **options):
    """What parse makes of argv, for a script with a handful of flags; argv may end in an error, whose line is raised."""
    p = parser("What it does.\nMore.", "python x.py --data shapes\npython x.py --eval a.pt\npython x.py --predict b.jpg --weights a.pt")
    p.add_argument("--data", default="data/coco")
    p.add_argument("--method", default="crosskd")
    p.add_argument("--epochs", type=COUNT)
    p.add_argument("--schedule")
    p.add_argument("--lr", type=POSITIVE, default=0.1)
    p.add_argument("--kd-layer", type=number(int, 0, 4))
    p.add_argument("--student", default="small")
    run_flags(p, name)
    modes = dict(eval="val_json val_images", predict="weights score")
    return parse(p, argv, name, modes, belongs=[("kd_layer", "method", ("crosskd", None))], apart=["epochs schedule"], **options)


def refused(capsys, *argv, **options):
    with pytest.raises(SystemExit):
        flags(*argv, **options)
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind, good, bad", [
    (COUNT, ["1", "7"], ["0", "-1", "nan", "inf", "1.5", "x", "1e3", str(2**40)]), (POSITIVE, ["0.1", "1e-9"], ["0", "-1", "nan", "inf", "-inf", "1e999", ""]),
    (number(), ["0", "3.5"], ["-0.1", "nan", "inf"]), (number(float, 0, 1, below=True), ["0", "0.99"], ["1", "1.1"]), (number(float, 0, 1), ["1"], ["1.01"]),
    (number(int, 0, 4), ["0", "4"], ["5", "-1"]), (SEED, ["0", str(2**32 - 1)], [str(2**32), str(2**64), "-1", "1.0"])])
def test_flag_types_refuse_what_is_not_finite_or_out_of_range(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(text)):
            kind(text)


def test_help_has_groups_one_line_of_usage_and_three_commands(capsys):
    with pytest.raises(SystemExit):
        flags("--help")
    text = capsys.readouterr().out
    usage, examples = text.split("\n\n")[0], text.split("examples:\n")[1]
    assert len(usage.splitlines()) == 1 and "\nrun:\n" in text and "\nown data, instead of" in text and len(examples.splitlines()) == 3


def test_flags_without_effect_in_a_mode_are_said_and_contradictions_refused(capsys):
    args = flags("--eval", "a.pt", "--lr", "0.5", "--seed", "3", "--amp", "bf16")
    assert args.out == "runs/crosskd-eval" and capsys.readouterr().err == "note: with --eval there is no effect of --lr, --seed\n"
    flags("--predict", "a.jpg", "--weights", "b.pt", "--score", "0.5")
    assert capsys.readouterr().err == ""
    for argv, words in ((["--eval", "a", "--resume"], "--resume"), (["--eval", "a", "--predict", "b"], "one at a time"), (["--predict", "b"], "--weights"),
                        (["--weights", "b"], "belongs to --predict"), (["--score", "0.4"], "belongs to --predict"), (["--epochs", "3", "--schedule", "2x"], "one of them"),
                        (["--method", "none", "--kd-layer", "2"], "--kd-layer: belongs to --method crosskd, here it is none"),
                        (["--train-json", "a.json"], "needs --train-images"), (["--local-rank", "0"], "torchrun"), (["--lr", "nan"], "nan"), (["--seed", str(2**64)], "at most")):
        assert words in refused(capsys, *argv), argv
    assert flags("--method", "crosskd+pkd", "--kd-layer", "2").kd_layer == 2


def test_flags_of_a_resumed_run_are_kept_and_only_some_may_change(tmp_path, capsys):
    saved = dict(vars(flags("--student", "tiny", "--epochs", "3")), out="elsewhere")
    save_checkpoint(dict(script="crosskd.py", model={}, optimizer={}, rng=[], it=1, args=saved), tmp_path / "last.pt")
    args = flags("--out", str(tmp_path), "--resume", "--lr", "0.5")
    assert (args.student, args.epochs, args.lr, args.out, args.resume) == ("tiny", 3, 0.5, str(tmp_path), True)
    line = refused(capsys, "--out", str(tmp_path), "--resume", "--student", "large")
    assert "--student large" in line and "tiny" in line and "--out" in line
    assert flags("--out", str(tmp_path), "--resume", "--student", "tiny").student == "tiny"


# ------------------------------------------------------------------ checkpoints: checksum, finite, whose

def test_a_flipped_byte_is_found_wherever_it_changes_the_content(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(dict(script="crosskd.py", arch=dict(kind="gfl"), it=7, model=dict(w=torch.arange(500.0))), path)
    whole, truth = path.read_bytes(), load_checkpoint(path)
    found = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        try:
            again = load_checkpoint(path)
        except UserError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            found += 1
        else:  # in what a zip has around its content
            assert torch.equal(again["model"]["w"], truth["model"]["w"]) and checksum(again) == checksum(truth)
    assert found > 250


def test_checksum_tells_dtype_shape_order_and_plain_values():
    values = [dict(a=torch.zeros(4)), dict(a=torch.zeros(2, 2)), dict(a=torch.zeros(4, dtype=torch.int32)), dict(b=torch.zeros(4)), dict(a=[0]), dict(a=0), dict(a=0.0), {}, []]
    assert len({checksum(v) for v in values}) == len(values)
    assert checksum(dict(a=1, b=2)) == checksum(dict(b=2, a=1)) and checksum(torch.zeros(0, 3)) == checksum(torch.zeros(0, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(tmp_path, value):
    path = tmp_path / "last.pt"
    save_checkpoint(dict(it=1, model=dict(w=torch.ones(3))), path)
    broken = dict(it=2, model=dict(w=torch.ones(3)), optimizer=dict(state={0: dict(m=torch.tensor([1.0, value]))}))
    text = error_of(lambda: save_checkpoint(broken, path))
    assert "optimizer.state.0.m" in text and "iteration 2" in text and "intact" in text and load_checkpoint(path)["it"] == 1
    assert first_not_finite(dict(a=torch.full((2,), 3e38), b=torch.tensor(5), c=torch.zeros(0))) is None  # large is not infinite
    torch.save(dict(model=dict(w=torch.tensor([value]))), tmp_path / "theirs.pt")
    assert "w is not finite" in error_of(lambda: load_checkpoint(tmp_path / "theirs.pt"))


SCRIPTS = dict(zip(("crosskd.py", "hierkd.py", "dkdetr.py", "prototype_kd.py", "simple21k.py"), ("p6", "quality", "queries", "columns", "pair")))


@pytest.mark.parametrize("written", SCRIPTS)
@pytest.mark.parametrize("asked", SCRIPTS)
def test_a_checkpoint_of_another_script_is_named(tmp_path, written, asked):
    for name, content in (("new.pt", dict(script=written, arch={}, model={})), ("old.pt", dict(arch={SCRIPTS[written]: 1}, model={}))):
        torch.save(content, tmp_path / name)
        assert script_of(content) == written
        if written == asked:
            load_checkpoint(tmp_path / name, asked)
        else:
            assert f"is a checkpoint of {written}" in error_of(lambda: load_checkpoint(tmp_path / name, asked))


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    save_checkpoint(dict(model={}), tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(dict(content, format=99), tmp_path / "a.pt")
    assert "format 99" in error_of(lambda: load_checkpoint(tmp_path / "a.pt"))


def test_weights_that_do_not_fit_are_told_in_one_line():
    model = torch.nn.Linear(2, 3)
    text = error_of(lambda: load_strict(model, dict(weight=torch.zeros(3, 3), other=torch.zeros(1)), "--init x.pt"))
    assert "--init x.pt" in text and "missing (first bias)" in text and "unexpected (first other)" in text and "(3, 3) instead of (3, 2)" in text
    assert "holds no weights" in error_of(lambda: load_strict(model, dict(weight=3), "x"))


# ------------------------------------------------------------------ files and folders

def test_a_text_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "args.json"
    write_whole(path, "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    assert "No space left" in error_of(lambda: write_whole(path, "new" * 1000))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["args.json"]


HOLD = """
import sys, time; sys.path.insert(0, {root!r})
from common.run import lock
print(lock({folder!r}), flush=True)
time.sleep(60)
"""


def test_a_folder_is_locked_while_its_process_lives_and_free_after_any_death(tmp_path, capsys):
    child = subprocess.Popen([sys.executable, "-c", HOLD.format(root=str(ROOT), folder=str(tmp_path))], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "True\n"
        args = argparse.Namespace(out=str(tmp_path))
        text = error_of(lambda: open_run(args, 0))
        assert f"process {child.pid} on {platform.node()}" in text and "--out" in text
    finally:
        child.kill()
        child.wait()
    (tmp_path / ".last.pt.99999.tmp").write_bytes(b"left by a dead process")
    open_run(args, 0)
    assert not list(tmp_path.glob(".*.tmp"))
    unlock(tmp_path)
    assert not (tmp_path / ".lock").exists()


ONCE = """
import sys, time; sys.path.insert(0, {root!r})
from pathlib import Path
from common.run import made_once
path = Path({folder!r}) / "teacher"
with made_once(path, 0) as missing:
    if missing:
        time.sleep(1)
        path.mkdir()  # raises if the other has made it
print(missing)
"""


def test_two_first_runs_make_a_cached_thing_once(tmp_path):
    code = ONCE.format(root=str(ROOT), folder=str(tmp_path))
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [r.communicate(timeout=60) for r in runs]
    assert sorted(a[0].split()[-1] for a in answers) == ["False", "True"], answers
    assert os.listdir(tmp_path) == ["teacher"]


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    for out in ("x" * 300, "\0", str(tmp_path / "no" / ("y" * 256))):
        text = error_of(lambda: open_run(argparse.Namespace(out=str(tmp_path / out)), 0)) if "\0" not in out else "--out"
        assert "--out" in text and len(text) < 400


def test_a_run_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    open_run(argparse.Namespace(out=str(tmp_path / "run")), 0)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["git"] == "none"
    unlock(tmp_path / "run")


# ------------------------------------------------------------------ a run

def small_run(out, total_batch=2, batches=10, plain={}, **flags):
    """A Run of one linear layer, `batches` an epoch."""
    values = dict(out=str(out), accumulate=1, epochs=3, max_iters=None, eval_every=None, log_every=1000, save_every=5, resume=False, val_json=None)
    args = argparse.Namespace(**values | flags)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    open_run(args, 0, args.resume)
    return run.Run(args, model, optimizer, dict(script="crosskd.py", arch={}) | plain, batches, total_batch, 0, 1, torch.device("cpu"))


class Plan:
    def set_epoch(self, epoch, start):
        self.start = start


def steps(it, count=10**6):
    """The loop of the scripts, for `count` steps at most, without a network."""
    for batch in it.batches(range(10), Plan()):
        it.step(dict(cls=torch.tensor(1.0)), 4e-7)
        count -= 1
        if count == 0:
            return


def test_last_pt_is_written_every_so_often_also_at_the_end_of_an_epoch(tmp_path):
    it = small_run(tmp_path, eval_every=3, save_every=10)  # every multiple of 10 ends an epoch
    steps(it)
    it.end_epoch()
    assert not it.due and load_checkpoint(tmp_path / "last.pt")["it"] == 10
    it.release()
    rows = read_log(tmp_path / "log.jsonl")
    assert rows[0]["lr"] == 4e-7  # not 0


def test_best_is_forgotten_where_the_validation_set_is_another_one(tmp_path):
    it = small_run(tmp_path)
    steps(it)
    it.end_epoch()
    it.scored(None)  # no validation set
    assert it.best == float("inf")
    it.release()
    again = small_run(tmp_path, resume=True, val_json="b.json")
    again.describe("x", 1, 1, 2, Photos("a", "1.jpg"), Photos("b", "2.jpg"))
    assert (again.it, again.best) == (10, -2.0)
    again.best = 31.0
    again.save()
    again.release()
    for name, val, best in (("b.json", "b", 31.0), ("elsewhere/b.json", "b", 31.0), ("b.json", "c", -2.0)):
        same = small_run(tmp_path, resume=True, val_json=name)  # what is in the file counts, not its name
        same.describe("x", 1, 1, 2, Photos("a", "1.jpg"), Photos(val, "2.jpg"))
        assert same.best == best
        same.release()


class Photos(list):
    """A data set for Run.describe."""

    def __init__(self, number, *places):
        super().__init__(places)
        self.fingerprint, self.places, self.report = lambda: number, lambda: {*places}, lambda: "a line"


def test_validation_images_that_are_trained_on_are_told(tmp_path, capsys):
    it = small_run(tmp_path)
    it.describe("x", 1, 1, 2, Photos("a", "/1.jpg", "/2.jpg"), Photos("b", "/2.jpg", "/3.jpg"))
    assert "warning: 1 of 2 validation images are trained on, too" in capsys.readouterr().out
    it.describe("x", 1, 1, 2, Photos("a", "/1.jpg"), Photos("b", "/3.jpg"))
    it.describe("x", 1, 1, 2, Photos("a", "/1.jpg"), None)
    assert "warning" not in capsys.readouterr().out
    it.release()


def test_resume_with_other_training_images_is_told(tmp_path, capsys):
    describe = lambda it, number: it.describe("x", 1, 1, 2, Photos(number), Photos("v"))
    it = small_run(tmp_path)
    describe(it, "a")
    it.save()
    it.release()
    for number in "ab":
        it = small_run(tmp_path, resume=True)
        capsys.readouterr()
        describe(it, number)
        assert ("other images or boxes than before" in capsys.readouterr().err) == (number == "b")
        it.release()


@pytest.mark.parametrize("kind", ["classes", "base"])
def test_resume_with_other_classes_or_another_order_of_them_is_refused(tmp_path, kind):
    """A file exported anew gives its categories other ids: each output would get another name."""
    plain = lambda *names: dict(classes=[*names]) if kind == "classes" else dict(arch=dict(base=[*names]))
    it = small_run(tmp_path, plain=plain("cat", "dog"))
    it.release()
    small_run(tmp_path, resume=True, plain=plain("cat", "dog")).release()
    text = error_of(lambda: small_run(tmp_path, resume=True, plain=plain("dog", "cat")))
    assert "was trained on other classes, or in another order" in text


def test_resume_with_another_clip_is_refused(tmp_path):
    plain = lambda name: dict(arch=dict(clip_name=name))
    small_run(tmp_path, plain=plain("ViT-B-32/a.pt 01234567")).release()
    small_run(tmp_path, resume=True, plain=plain("ViT-B-32/a.pt 01234567")).release()
    text = error_of(lambda: small_run(tmp_path, resume=True, plain=plain("ViT-B-32/a.pt 89abcdef")))
    assert "was trained with CLIP ViT-B-32/a.pt 01234567, this is ViT-B-32/a.pt 89abcdef" in text


def test_resume_in_mid_epoch_with_other_batches_is_told(tmp_path, capsys):
    it = small_run(tmp_path, batch_size=2)
    steps(it, 3)
    it.save()
    it.release()
    small_run(tmp_path, resume=True, batch_size=2).release()
    assert "other batches" not in capsys.readouterr().err
    small_run(tmp_path, resume=True, batch_size=1).release()
    assert "other batches than before" in capsys.readouterr().err


def test_a_loader_that_ends_too_early_is_no_endless_loop(tmp_path):
    it = small_run(tmp_path, batches=12)
    with pytest.raises(RuntimeError, match="ended after 10 of 12"):
        steps(it)
    it.release()


def test_flags_that_are_repeated_do_not_pile_up_when_a_run_is_resumed(tmp_path):
    def names(*argv):
        p = parser("Doc.", "a")
        p.add_argument("--name", action="append")
        run_flags(p, "crosskd")
        return parse(p, ["--out", str(tmp_path), *argv], "crosskd", dict(eval=""))
    saved = dict(vars(names("--name", "a", "--name", "b")))
    save_checkpoint(dict(script="crosskd.py", model={}, optimizer={}, rng=[], it=1, args=saved), tmp_path / "last.pt")
    assert names("--resume", "--name", "a", "--name", "b").name == names("--resume").name == ["a", "b"]


# ------------------------------------------------------------------ lines

def test_log_lines_fit_80_columns_and_the_legend_comes_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    terms = {f"kd_{name}": torch.tensor(0.123) for name in ("cls", "box", "ctr", "pkd", "ld", "mimic", "own", "other")}
    log = Log(tmp_path, 0, total=88000, every=1, legend=dict(kd_cls="Eq. 7, " + "word " * 30, unused="not there"))
    for it in (87001, 87002):
        log.step(it, 12, terms, lr=1.25e-3)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 80 and sum("kd_cls: Eq. 7" in line for line in lines) == 1 and not any("not there" in line for line in lines)
    assert not any(re.search(r"kd_\w+$", line) for line in lines)  # a name and its number stay together


def test_words_of_a_line_keep_their_numbers():
    assert split_line("5000 images | AP 31.2 APs -1.0 | GZSD base AP50 3.0 | 12s") == ["5000", "images", "|", "AP 31.2", "APs -1.0", "|", "GZSD", "base", "AP50 3.0", "|", "12s"]
    assert fold(["a 1"] * 60).count("\n") >= 2


def test_a_log_with_damaged_lines_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"it": 1}\n{"it": 2, "x": {"y": 1}\n\n{"it": 3}\n{"it')
    assert [r["it"] for r in read_log(tmp_path / "log.jsonl")] == [1, 3]


@pytest.mark.parametrize("error, words", [
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory."), "--shm-size"),
    (RuntimeError("unable to write to file </torch_123_456>: No space left on device (28)"), "--shm-size"), (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"), (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "--workers"),
    (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x: No space left"), (MemoryError(), "out of memory"),
    (OSError("Caught PermissionError in DataLoader worker process 0.\nTraceback\nPermissionError: [Errno 13] Permission denied: 'a.jpg'"), "a.jpg"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out of memory"),
    (UserError("Caught UserError in DataLoader worker process 0.\nTraceback\ncommon.run.UserError: a.jpg: image is missing"), "a.jpg: image is missing")])
def test_what_the_machine_does_is_one_line(error, words):
    line = explain(error)
    assert words in line and "\n" not in line and "Traceback" not in line


def test_a_fault_of_ours_keeps_its_traceback():
    assert explain(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback\nRuntimeError: shape mismatch")) == ""
    assert explain(KeyError("kind")) == explain(RuntimeError("shape mismatch")) == explain(TypeError("x")) == ""


def test_retrain_belongs_to_shapes(monkeypatch, capsys):
    import crosskd
    monkeypatch.setenv("DETECTION_RETRAIN", "")  # and is put back as it was
    with pytest.raises(SystemExit):
        crosskd.parse_args(["--retrain"])
    assert "--retrain: belongs to --data shapes" in capsys.readouterr().err
    assert os.environ["DETECTION_RETRAIN"] == ""
    assert crosskd.parse_args(["--data", "shapes", "--retrain"]).retrain and os.environ["DETECTION_RETRAIN"] == "1"


def test_made_once_makes_anew_with_retrain(tmp_path, monkeypatch):
    done = tmp_path / "teacher"
    done.mkdir()
    (done / "best.pt").touch()
    monkeypatch.setattr(run, "STARTED", done.stat().st_mtime + 1)  # it is of an earlier run
    monkeypatch.setenv("DETECTION_RETRAIN", "")
    with run.made_once(done, 0) as missing:
        assert not missing
    monkeypatch.setenv("DETECTION_RETRAIN", "1")
    with run.made_once(done, 0) as missing:
        assert missing and not done.exists()
        done.mkdir()
        monkeypatch.setattr(run, "STARTED", done.stat().st_mtime)  # made by this run
    with run.made_once(done, 0) as missing:
        assert not missing
