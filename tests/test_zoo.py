# SPDX-License-Identifier: MIT
"""common/zoo.py: downloads, files of others read without running them, prefixes, variant guards,
key rules, the modules that only other people's weights need, Swin's shift on small maps."""
import argparse
import datetime
import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import threading
import types
import zipfile
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import swin_transformer
from torchvision.models.detection.image_list import ImageList

from common import run, zoo
from common.zoo import (ANCHORS, CROSSKD_ZOO, PIXELS, PROTOTYPE_ZOO, AlignedPool, CascadeHeads, DeformConv,
                        ExactAnchors, Inert, PlainP6P7, always_shift, by_patches, classes_of,
                        config_of, digits_of, fetch, from_mmdet, guard, guard_numbers, imagenet_state, infer_arch,
                        load_any, read_dense, read_foreign, rename, strip_prefixes, tell_scale, to_dkdetr, to_torchvision,
                        zoo_path)
from common.run import UserError


def error_of(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refusal(path):
    return error_of(lambda: read_foreign(path, "--teacher"))


# ------------------------------------------------------------------ downloads

@pytest.fixture
def hub(tmp_path):
    """An empty cache, and a file to fetch: (cache folder, path, url, sha256)."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    source = tmp_path / "weights-12345678.pth"
    source.write_bytes(b"weights" * 1000)
    sha = hashlib.sha256(source.read_bytes()).hexdigest()
    yield tmp_path / "hub" / "checkpoints", source, source.as_uri(), sha
    torch.hub.set_dir(before)


@pytest.mark.parametrize("digits", [8, 64, 0])
def test_fetch_downloads_once_and_checks_the_hash(hub, digits, capsys):
    cache, source, url, sha = hub
    path = fetch(url, sha[:digits])
    assert path == cache / source.name and path.read_bytes() == source.read_bytes()
    source.unlink()
    assert fetch(url, sha[:digits]) == path  # no second download
    assert capsys.readouterr().out.count("downloading") == 1
    assert [p.name for p in cache.iterdir()] == [path.name]


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
    url = "http://127.0.0.1:1/net.pth"
    if kind == "no such file":
        url = (source.parent / "net.pth").as_uri()
    text = error_of(lambda: fetch(url, "12345678"))
    assert url in text and "Offline" in text and str(cache / "net.pth") in text
    assert list(cache.iterdir()) == []


def test_fetch_into_a_place_where_no_folder_can_be_made_names_torch_home(hub):
    cache, _, url, _ = hub
    cache.parent.write_text("a file")
    assert "TORCH_HOME" in error_of(lambda: fetch(url))


def test_other_processes_of_a_machine_wait_for_the_download_and_then_use_it(hub, monkeypatch):
    cache, source, url, sha = hub
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(zoo, "PATIENCE", 5)
    cache.mkdir(parents=True)
    timer = threading.Timer(0.2, lambda: os.link(source, cache / source.name))
    timer.start()
    assert fetch(url, sha[:8]).read_bytes() == source.read_bytes()
    timer.join()


def test_they_do_not_wait_for_ever_where_the_download_has_failed(hub, monkeypatch):
    _, source, url, _ = hub
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(zoo, "PATIENCE", 0.2)
    text = error_of(lambda: fetch(url))
    assert url in text and "first process" in text


def test_a_download_that_still_grows_is_waited_for(hub, monkeypatch):
    cache, source, url, _ = hub
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(zoo, "PATIENCE", 1.0)
    cache.mkdir(parents=True)
    draft = cache / f"{source.name}.0123.partial"

    def slowly():
        for n in range(13):  # longer than the patience
            draft.write_bytes(b"x" * n)
            threading.Event().wait(0.1)
        os.rename(draft, cache / source.name)

    thread = threading.Thread(target=slowly)
    thread.start()
    assert fetch(url) == cache / source.name
    thread.join()


def test_every_zoo_address_ends_in_the_first_digits_of_its_hash():
    for name, file in {**CROSSKD_ZOO, **PROTOTYPE_ZOO}.items():
        if name == "retinanet_swint":
            assert digits_of(file) == ""
        elif file is None:
            url = torchvision.models.get_model_weights(name).DEFAULT.url
            assert re.fullmatch("[0-9a-f]{8}", digits_of(url))
        else:
            assert re.fullmatch("[0-9a-f]{8}", digits_of(file)) and file.count("/") == 2
    assert all(len(digits_of(file)) == 8 for file in zoo.CAFFE.values())


def test_a_zoo_name_is_fetched_a_path_is_taken_as_it_is_and_another_word_names_the_choices(
        hub, monkeypatch, tmp_path):
    cache, source, url, sha = hub
    named = tmp_path / f"net-{sha[:8]}.pth"
    named.write_bytes(source.read_bytes())
    monkeypatch.setattr(zoo, "MMDET_URL", tmp_path.as_uri() + "/")
    assert zoo_path("net", {"net": named.name}, "--teacher") == cache / named.name
    assert zoo_path(str(source), {"net": named.name}, "--teacher") == source
    text = error_of(lambda: zoo_path("ent", {"net": named.name}, "--teacher"))
    assert text.startswith("--teacher ent") and "net" in text
    text = error_of(lambda: zoo_path("retinanet_swint", CROSSKD_ZOO, "--teacher"))
    assert "authors" in text and str(cache) in text


def test_imagenet_weights_that_cannot_be_had_name_the_way_without_them(hub, monkeypatch):
    def offline(*_):
        raise UserError("x: cannot be downloaded")
    monkeypatch.setattr(zoo, "fetch", offline)
    assert "--init none" in error_of(lambda: imagenet_state("resnet50"))
    asked = []
    monkeypatch.setattr(zoo, "fetch", lambda *given: asked.append(given) or hub[1])
    torch.save({"conv1.weight": torch.ones(1)}, hub[1])
    assert list(imagenet_state("resnet50", caffe=True)[0]) == ["conv1.weight"]
    imagenet_state("swin_t")
    assert asked[0] == (zoo.CAFFE_URL + "resnet50_caffe-788b5fa3.pth", "788b5fa3")
    assert asked[1][0].endswith(f"swin_t-{asked[1][1]}.pth")


# ------------------------------------------------------------------ objects in files

@pytest.fixture
def library(monkeypatch):
    """Classes of a library, to be pickled by their names and then not to be had: library(path,
    content) saves and takes them away. Each says so if it is ever made again."""
    made = []
    names = ("HistoryBuffer", "ConfigDict", "Names", "Frozen")
    history, config, listed, frozen = names

    def setstate(self, state):
        made.append(type(self))

    module = types.ModuleType("mmlike.logging")
    for name, base in ((history, object), (config, dict), (listed, list), (frozen, tuple)):
        cls = type(name, (base,), {"__module__": "mmlike.logging", "__setstate__": setstate})
        setattr(module, name, cls)

    def save(path, content, legacy=False):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, "mmlike", types.ModuleType("mmlike"))
            m.setitem(sys.modules, "mmlike.logging", module)
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)

    save.module, save.made = module, made
    return save


LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
WEIGHTS = OrderedDict([("backbone.conv1.weight", torch.arange(6.0).view(2, 3)),
                       ("backbone.bn1.num_batches_tracked", torch.tensor(7)),
                       ("neck.half", torch.ones(2).half())])


def same(state, other=WEIGHTS):
    return list(state) == list(other) and all(torch.equal(state[k], other[k]) for k in other)


@LEGACY
def test_a_training_checkpoint_of_mmengine_is_read_without_its_library(library, tmp_path, legacy):
    """As mmdetection 3.x writes them: HistoryBuffers of numpy arrays and methods, a ConfigDict,
    numpy scalars, paths, times."""
    buffer = library.module.HistoryBuffer()
    buffer.log, buffer.methods = np.arange(5.0), {"min": np.min, "mean": [np.float32(3)]}
    config = library.module.ConfigDict(model=library.module.ConfigDict(norm_on_bbox=True), k=3)
    config.filename = "x.py"
    listed = library.module.Names(["a", "b"])
    meta = dict(cfg=config, epoch=np.int64(3), dataset_meta=dict(classes=("cat", "dog")),
                names=listed, frozen=library.module.Frozen((1, 2)),
                flags=argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x")))
    hub = dict(log_scalars=OrderedDict(loss=buffer), all=[buffer, buffer], seen={1, 2},
               at=datetime.datetime(2024, 1, 1), left=deque([1, 2]),
               counts=defaultdict(list, a=[np.float64(1)]))
    optimizer = dict(state={0: dict(momentum=torch.ones(2), step=np.int32(2))},
                     param_groups=[dict(lr=0.1, betas=(0.9, 0.999))])
    content = dict(meta=meta, state_dict=WEIGHTS, message_hub=hub, optimizer=optimizer)
    library(tmp_path / "m.pth", content, legacy)
    state, meta = read_foreign(tmp_path / "m.pth", "--teacher")
    assert same(state) and classes_of(meta) == ("cat", "dog")
    assert isinstance(meta["epoch"], Inert) and meta["names"] == ["a", "b"]
    guarded = error_of(lambda: guard(config_of(meta), ["norm_on_bbox=True"], "x"))
    assert "norm_on_bbox=True" in guarded
    assert library.made == []


@LEGACY
def test_an_object_that_holds_its_config_as_an_argument_or_a_state_still_shows_it(
        library, tmp_path, legacy):
    """mmengine's ConfigDict gives its content to its maker; mmcv's Config keeps it as its state."""
    maker = library.module.HistoryBuffer
    maker.__reduce__ = lambda self: (type(self), (dict(style="caffe"),))
    library(tmp_path / "a.pth", dict(meta=dict(config=maker()), state_dict=WEIGHTS), legacy)
    del maker.__reduce__
    other = maker()
    other.held, other.itself = dict(backbone=dict(style="caffe")), other
    library(tmp_path / "b.pth", dict(meta=dict(config=other), state_dict=WEIGHTS), legacy)
    for name in ("a.pth", "b.pth"):
        config = config_of(read_foreign(tmp_path / name, "x")[1])
        assert "style='caffe'" in error_of(lambda: guard(config, ["style='caffe'"], "x"))


def evil(call, *args):
    class Evil:
        def __reduce__(self):
            return call, args
    return Evil()


def commands(folder):
    """{name: object whose unpickling makes `folder`}."""
    return dict(system=evil(os.system, f"mkdir {folder}"), mkdir=evil(os.mkdir, str(folder)),
                evaluate=evil(eval, f"__import__('os').mkdir({str(folder)!r})"),
                execute=evil(exec, f"import os; os.mkdir({str(folder)!r})"),
                shell=evil(subprocess.check_call, ["mkdir", str(folder)]),
                touch=evil(pathlib.Path.mkdir, pathlib.Path(folder)))


@LEGACY
@pytest.mark.parametrize("command", list(commands("x")))
def test_commands_in_a_file_are_never_run(tmp_path, legacy, command):
    bad, folder = commands(tmp_path / "made")[command], tmp_path / "made"
    nested = {bad: bad}  # as a key, too
    torch.save(dict(state_dict=WEIGHTS, meta=dict(x=[bad], y=nested)), tmp_path / "m.pth",
               _use_new_zipfile_serialization=not legacy)
    try:
        state, meta = read_foreign(tmp_path / "m.pth", "--teacher")
        assert same(state) and isinstance(meta["x"][0], Inert)
    except UserError as e:  # torch lets nothing stand in for os, nor be called that was just made
        words = dict(system="run commands", mkdir="run commands", touch="would run code")
        assert words[command] in str(e) and "\n" not in str(e)
    assert not folder.exists()
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(bad, protocol=2))
    refusal(tmp_path / "bare.pth")
    (tmp_path / "four.pth").write_bytes(pickle.dumps(dict(state_dict=bad), protocol=4))
    refusal(tmp_path / "four.pth")
    assert not folder.exists()


def test_what_an_object_makes_cannot_be_called_either(tmp_path):
    folder = tmp_path / "made"

    argument = pickle.dumps(str(folder), 2)[2:-1]
    # getattr(posixpath.os, "mkdir")(folder), by hand: REDUCE upon the result of REDUCE
    maker = b"\x80\x02cbuiltins\ngetattr\ncposixpath\nos\nX\x05\x00\x00\x00mkdir\x86R"
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("archive/data.pkl", maker + argument + b"\x85R.")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    assert "would run code" in refusal(tmp_path / "m.pth")
    assert not folder.exists()


def test_stand_ins_are_gone_after_reading(library, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    library(tmp_path / "m.pth", dict(state_dict=WEIGHTS, hub=library.module.HistoryBuffer()))
    read_foreign(tmp_path / "m.pth", "x")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "m.pth", weights_only=True)


def test_a_whole_pickled_model_is_refused_with_the_remedy(library, tmp_path):
    for content in (library.module.HistoryBuffer(), dict(model=library.module.HistoryBuffer())):
        library(tmp_path / "m.pth", content)
        text = refusal(tmp_path / "m.pth")
        assert "mmlike.logging.HistoryBuffer" in text and "state_dict()" in text
    torch.save(nn.Linear(2, 2), tmp_path / "m.pth")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "m.pth")


# ------------------------------------------------------------------ wrong files

def write(path, kind):
    if kind == "garbage":
        path.write_bytes(bytes(range(256)) * 9)
    elif kind == "html page":
        path.write_text("<!DOCTYPE html><html>not found</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind.startswith("truncated"):
        legacy = kind.endswith("old")
        torch.save(dict(state_dict={"a.b": torch.ones(999)}), path,
                   _use_new_zipfile_serialization=not legacy)
        path.write_bytes(path.read_bytes()[:-900])
    elif kind == "no tensors":
        torch.save(dict(state_dict=dict(a=1), meta={}), path)
    elif kind == "nothing":
        torch.save({}, path)
    elif kind == "list":
        torch.save([torch.ones(1)], path)
    elif kind == "tensor":
        torch.save(torch.ones(1), path)
    elif kind == "itself":
        content = {}
        content["model"] = content
        torch.save(content, path)


@pytest.mark.parametrize("kind, word", [
    ("garbage", "not a readable checkpoint"), ("html page", "not a readable checkpoint"),
    ("empty", "not a readable checkpoint"), ("folder", "is a folder"), ("fifo", "no regular file"),
    ("truncated", "not a readable checkpoint"), ("truncated old", "not a readable checkpoint"),
    ("no tensors", "holds no weights"), ("nothing", "holds no weights"),
    ("list", "holds a list"), ("tensor", "holds a Tensor"), ("itself", "holds no weights"),
    ("missing", "no such checkpoint")])
def test_other_files_are_refused_in_one_line_that_names_flag_and_file(tmp_path, kind, word):
    path = tmp_path / "w.pth"
    write(path, kind)
    text = refusal(path)
    assert text.startswith(f"--teacher {path}: ") and word in text
    assert error_of(lambda: load_any(path, "--eval", "crosskd.py")).startswith(f"--eval {path}: ")


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/zero", "/dev/null"])
def test_files_of_the_system_are_refused(path):
    if not os.path.exists(path):
        pytest.skip(f"there is no {path}")
    assert path in refusal(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_refused_by_their_first_key(tmp_path, bad, dtype):
    state = dict(a=torch.ones(3), **{"module.x": torch.zeros(1)})
    state |= {"b.c": torch.tensor([1, bad], dtype=dtype), "d": torch.tensor(bad)}
    torch.save(dict(state_dict=state), tmp_path / "w.pth")
    text = refusal(tmp_path / "w.pth")
    assert "b.c is not finite" in text


@pytest.mark.parametrize("value, word", [
    (3, "a int"), ("r50", "a str"), ([torch.ones(1)], "a list"), (None, "a NoneType"),
    (dict(weight=torch.ones(1)), "a dict"), (np.ones(2), "a pickled numpy"),
    (torch.ones(2).to_sparse(), "sparse"), (torch.ones(2, dtype=torch.complex64), "complex"),
    (torch.ones(2).to(torch.float8_e4m3fn), "float8")])
def test_what_is_no_plain_tensor_is_named(tmp_path, value, word):
    torch.save(dict(state_dict={"a.weight": torch.ones(1), "a.odd": value}), tmp_path / "w.pth")
    text = refusal(tmp_path / "w.pth")
    assert "a.odd" in text and word in text


def test_keys_that_are_no_text_and_counters_of_batches_that_are_no_tensors(tmp_path):
    torch.save({"a.weight": torch.ones(1), 3: torch.ones(1)}, tmp_path / "w.pth")
    assert ": 3 is" in refusal(tmp_path / "w.pth")
    state = {"a.weight": torch.ones(1), "a.num_batches_tracked": 5,
             "b.num_batches_tracked": np.int64(5), "c.num_batches_tracked": torch.tensor(5)}
    torch.save(state, tmp_path / "w.pth")
    assert list(read_foreign(tmp_path / "w.pth", "x")[0]) == ["a.weight", "c.num_batches_tracked"]


# ------------------------------------------------------------------ where weights stand, prefixes

@pytest.mark.parametrize("holder", ["", "state_dict", "model", "model.state_dict", "ema_state_dict",
                                    "model_ema", "ema.module"])
@LEGACY
def test_weights_are_found_where_projects_put_them(tmp_path, holder, legacy):
    content = WEIGHTS
    for name in reversed(holder.split(".") if holder else []):
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    state, meta = read_foreign(tmp_path / "w.pth", "x")
    assert same(state) and meta == {}


def test_parameters_lose_their_gradient(tmp_path):
    torch.save(dict(a=nn.Parameter(torch.ones(2))), tmp_path / "w.pth")
    assert not read_foreign(tmp_path / "w.pth", "x")[0]["a"].requires_grad


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module.", "module.model.", "model.module.",
                                    "_orig_mod._orig_mod.", "module.module.model._orig_mod."])
def test_prefixes_of_wrappers_are_stripped_also_stacked(prefix):
    state = {prefix + "backbone.conv1.weight": 1, prefix + "neck.bias": 2}
    assert strip_prefixes(state) == {"backbone.conv1.weight": 1, "neck.bias": 2}


def test_a_part_that_was_compiled_alone_keeps_its_name():
    state = {"backbone._orig_mod.a": 1, "head.b": 2}
    assert strip_prefixes(state) == {"backbone.a": 1, "head.b": 2}


def test_a_prefix_that_not_all_keys_share_is_a_name():
    state = {"model.weight": 1, "head.weight": 2}
    assert strip_prefixes(state) == state
    assert strip_prefixes({"module.a": 1, "module.b.c": 2}) == {"a": 1, "b.c": 2}
    assert strip_prefixes({}) == {}
    with pytest.raises(UserError, match="a.b twice"):
        strip_prefixes({"a._orig_mod.b": 1, "a.b": 2})


@pytest.mark.parametrize("prefix", ["", "module."])
def test_copies_of_averages_beside_the_weights_are_left_out(tmp_path, prefix):
    """mmcv's EMAHook: buffers ema_backbone_conv1_weight; mmengine's: a second state dict, of what
    state_dict is the average of."""
    state = {prefix + "backbone.conv1.weight": torch.ones(1),
             prefix + "ema_backbone_conv1_weight": torch.zeros(1)}
    other = {"steps": torch.tensor(3), "module.backbone.conv1.weight": torch.full((1,), 2.0)}
    torch.save(dict(state_dict=state, ema_state_dict=other), tmp_path / "w.pth")
    read = read_foreign(tmp_path / "w.pth", "x")[0]
    assert same(read, {"backbone.conv1.weight": torch.ones(1)})
    torch.save(dict(ema_state_dict=other), tmp_path / "w.pth")
    read = read_foreign(tmp_path / "w.pth", "x")[0]
    assert same(read, {"backbone.conv1.weight": torch.full((1,), 2.0)})
    assert list(strip_prefixes({"ema_gate": 1, "head.weight": 2})) == ["ema_gate", "head.weight"]


# ------------------------------------------------------------------ safetensors

@pytest.fixture
def tensors_file(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from safetensors.torch import save_file
    path = tmp_path / "w.safetensors"
    save_file({"module." + k: v for k, v in WEIGHTS.items()}, path, {"format": "pt"})
    return path


def test_safetensors_files_are_read_by_name_or_content(tensors_file, tmp_path):
    renamed = tmp_path / "w.pth"
    renamed.write_bytes(tensors_file.read_bytes())
    for path in (tensors_file, renamed):
        kind, state, meta = load_any(path, "--teacher", "crosskd.py")
        assert kind == "foreign" and set(state) == set(WEIGHTS)
        assert all(torch.equal(state[k], WEIGHTS[k]) for k in state)
        assert config_of(meta) == "" and classes_of(meta) is None


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_damaged_safetensors_files_are_one_line(tensors_file, size):
    tensors_file.write_bytes(tensors_file.read_bytes()[:size])
    assert "not a readable safetensors file" in refusal(tensors_file)


def test_without_the_package_a_safetensors_file_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    header = json.dumps({}).encode()
    (tmp_path / "w.bin").write_bytes(struct.pack("<Q", len(header)) + header + bytes(9))
    assert "pip install safetensors" in refusal(tmp_path / "w.bin")


# ------------------------------------------------------------------ ours or not

def test_ours_and_foreign_files_are_told_apart(tmp_path):
    ours = dict(arch=dict(kind="gfl", p6="x"), model=dict(a=torch.ones(1)), classes=["cat"])
    run.save_checkpoint(ours, tmp_path / "ours.pt")
    kind, content = load_any(tmp_path / "ours.pt", "--teacher", "crosskd.py")
    assert kind == "ours" and content["classes"] == ["cat"]
    assert "crosskd.py" in refusal(tmp_path / "ours.pt")
    text = error_of(lambda: load_any(tmp_path / "ours.pt", "--teacher", "dkdetr.py"))
    assert text.startswith("--teacher ") and "of crosskd.py, not of dkdetr.py" in text
    torch.save(dict(arch=dict(p6="x")), tmp_path / "half.pt")
    assert "no weights" in error_of(lambda: load_any(tmp_path / "half.pt", "x", "crosskd.py"))
    torch.save(dict(arch="resnet50", state_dict=WEIGHTS), tmp_path / "moco.pt")  # as MoCo's files
    kind, state, meta = load_any(tmp_path / "moco.pt", "--teacher", "crosskd.py")
    assert kind == "foreign" and same(state) and meta == {}


def test_ours_that_hold_nan_or_are_damaged_are_refused(tmp_path):
    nan = torch.tensor([float("nan")])
    torch.save(dict(arch=dict(p6="x"), model=dict(a=nan)), tmp_path / "a.pt")
    assert "a is not finite" in error_of(lambda: load_any(tmp_path / "a.pt", "x", "crosskd.py"))
    run.save_checkpoint(dict(arch=dict(p6="x"), model=dict(a=torch.ones(1))), tmp_path / "b.pt")
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    content["model"]["a"] += 1
    torch.save(content, tmp_path / "b.pt")
    assert "checksum" in error_of(lambda: load_any(tmp_path / "b.pt", "x", "crosskd.py"))


# ------------------------------------------------------------------ config and classes

@pytest.mark.parametrize("meta, names", [
    (dict(CLASSES=("a", "b")), ("a", "b")), (dict(CLASSES=["a"]), ("a",)),
    (dict(CLASSES="cat"), ("cat",)),
    (dict(dataset_meta=dict(classes=["a", "b"])), ("a", "b")),
    (dict(dataset_meta=dict(CLASSES=("a",))), ("a",)),
    (dict(CLASSES=None, dataset_meta=None), None),
    (dict(CLASSES=[1, 2]), None), (dict(CLASSES=()), None), ({}, None),
    (dict(dataset_meta=["a"]), None)])
def test_class_names_of_both_generations(meta, names):
    assert classes_of(meta) == names


NESTED = dict(model=dict(bbox_head=dict(norm_on_bbox=True, type="FCOSHead"),
                         backbone=dict(style="caffe")))
SPELLINGS = [
    "bbox_head=dict(type='FCOSHead', norm_on_bbox=True), backbone=dict(style='caffe')",
    'dict(\n  norm_on_bbox = True,\n  style = "caffe")', "norm_on_bbox=True\nstyle='caffe'",
    NESTED, OrderedDict(NESTED), OrderedDict(norm_on_bbox=True, style="caffe"), json.dumps(NESTED),
    json.dumps(json.dumps(NESTED)), "norm_on_bbox: true\nstyle: caffe\n"]


@pytest.mark.parametrize("key", ["config", "cfg"])
@pytest.mark.parametrize("config", SPELLINGS, ids=range(len(SPELLINGS)))
def test_variants_are_found_however_the_config_spells_them(tmp_path, config, key):
    """meta.config of mmdetection 2.x, meta.cfg of 3.x."""
    torch.save(dict(meta={key: config}, state_dict=WEIGHTS), tmp_path / "w.pth")
    text = config_of(read_foreign(tmp_path / "w.pth", "x")[1])
    for setting in ("norm_on_bbox=True", "style='caffe'"):
        said = error_of(lambda: guard(text, [setting], "--teacher w.pth", "crosskd.py's FCOS"))
        assert said.startswith("--teacher w.pth: ") and setting in said and "crosskd.py's" in said
    guard(text, ("norm_on_bbox=False", "centerness_on_reg=True", "style='pytorch'"), "x")


@pytest.mark.parametrize("config", [
    "", "norm_on_bbox=False", "my_norm_on_bbox=True", "style='caffe2'", "norm_on_bbox=Truely",
    "{'norm_on_bbox': False, 'x': True}"])
def test_other_settings_are_no_variant(config):
    assert guard(config, ("norm_on_bbox=True", "style='caffe'"), "x") is None  # no refusal


RETINANET = dict(
    model=dict(
        backbone=dict(type="ResNet", strides=(1, 2, 2, 2), style="pytorch"),
        bbox_head=dict(
            init_cfg=dict(type="Normal", layer="Conv2d", std=0.01),
            anchor_generator=dict(octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]),
            bbox_coder=dict(target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[1.0, 1.0, 1.0, 1.0]))),
    pipeline=[dict(type="RandomChoiceResize", scales=[(1333, 640), (1333, 800)])],
    img_norm_cfg=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True))


@pytest.mark.parametrize("text", [repr, json.dumps, lambda c: json.dumps(json.dumps(c)), lambda c: re.sub(r"'(\w+)': ", r"\1=", repr(c))])
def test_a_config_with_other_anchors_box_coding_or_pixels_is_refused(text):
    ours = ANCHORS["retinanet"] | PIXELS
    config = text(RETINANET)
    guard_numbers(config, ours, "x")
    for name, numbers in (("octave_base_scale", 3), ("ratios", [0.2, 1.0, 5.0]), ("target_stds", [0.1, 0.1, 0.2, 0.2]), ("mean", [0, 0, 0]), ("strides", (1, 2, 2, 1))):
        other = text(json.loads(json.dumps(RETINANET)) | {name: numbers})
        assert f"x: its config has {name}=" in error_of(lambda: guard_numbers(other, ours, "x"))


def test_without_a_config_it_is_told_that_anchors_are_the_usual_ones(capsys):
    guard_numbers("", ANCHORS["faster"] | PIXELS, "--teacher w.pth")
    assert "--teacher w.pth: holds no config; its anchors" in capsys.readouterr().err
    guard_numbers("scales=[8], ratios=[0.5, 1.0, 2.0], target_stds=[0.1, 0.1, 0.2, 0.2]", ANCHORS["faster"], "x")
    assert "scales=2" in error_of(lambda: guard_numbers("scales=[2]", ANCHORS["faster"], "x"))
    guard_numbers("target_stds=[0.033, 0.033, 0.067, 0.067]", ANCHORS["cascade"], "x")


def mmdet_file(path, kind, **meta):
    cls = dict(fcos="conv_cls", retinanet="retina_cls", gfl="gfl_cls")[kind]
    conv = torch.zeros(256, 256, 3, 3)
    state = {f"bbox_head.{cls}.bias": torch.zeros(9 if kind == "retinanet" else 1), "neck.lateral_convs.0.conv.weight": conv,
             "neck.fpn_convs.3.conv.weight": conv, "backbone.layer1.0.conv3.weight": conv}
    torch.save(dict(meta=meta, state_dict=state), path)
    return str(path)


def test_an_fcos_is_asked_for_its_pixels_as_the_others_are(tmp_path, capsys):
    read_dense(mmdet_file(tmp_path / "a.pth", "fcos"), "--teacher", "crosskd.py")
    assert "a.pth: holds no config; its anchors, box coding and pixels are taken for the usual" in capsys.readouterr().err
    read_dense(mmdet_file(tmp_path / "b.pth", "fcos", config="mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False"), "--teacher", "crosskd.py")
    for config, found in (("mean=[103.53, 116.28, 123.675]", "mean"), ("strides=[4, 8, 16, 32, 64]", "strides"), ("to_rgb=True", "to_rgb")):
        path = mmdet_file(tmp_path / "c.pth", "fcos", config=config)
        assert f"its config has {found}=" in error_of(lambda: read_dense(path, "--teacher", "crosskd.py"))


@pytest.mark.parametrize("setting", ["add_extra_convs='on_lateral'", "relu_before_extra_convs=True", "bgr_to_rgb=False"])
def test_variants_of_the_pyramid_are_refused(tmp_path, setting):
    path = mmdet_file(tmp_path / "a.pth", "retinanet", config=setting)
    assert setting in error_of(lambda: read_dense(path, "--teacher", "crosskd.py"))
    if "lateral" not in setting:  # FCOS has both
        read_dense(mmdet_file(tmp_path / "b.pth", "fcos", config=setting), "--teacher", "crosskd.py")


@pytest.mark.parametrize("text, told", [
    ("test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(512, 512))]", "tests images at 512 x 512"),
    ("{'test_pipeline': [{'type': 'Resize', 'scale': [640, 400]}]}", "tests images at 640 x 400"),
    ("train_pipeline = [dict(scale=(1333, 640))]\ntest_pipeline = [dict(scale=(1333, 800))]", ""), ("img_scale=(512, 512)", ""), ("", "")])
def test_a_config_that_tests_at_another_size_is_told(capsys, text, told):
    tell_scale(text, "x.pth")
    said = capsys.readouterr().err
    assert told in said and bool(told) == bool(said)


def test_a_file_without_config_has_none():
    assert config_of({}) == config_of(dict(config=None)) == ""
    assert config_of(dict(config="a", cfg="b")) == "a\nb"


# ------------------------------------------------------------------ key rules

def test_the_first_rule_that_fits_renames_a_key():
    rules = [(r"^a\.(\d)\.", r"x.\1."), (r"^a\.", "y."), (r"^gone\.", None)]
    state = {"a.1.w": 1, "a.b": 2, "gone.w": 3, "other": 4}
    assert rename(state, rules) == {"x.1.w": 1, "y.b": 2, "other": 4}
    assert "same weight, y.b" in error_of(lambda: rename({"a.b": 1, "y.b": 2}, rules))


@pytest.fixture(scope="module")
def fill(golden):
    spec = importlib.util.spec_from_file_location("fill", golden / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def key_list(golden, name, dtype=None):
    keys = json.loads((golden / "mmdet_keys" / f"{name}.json").read_text(encoding="utf-8"))
    state = {}
    for key, (shape, kind) in keys.items():
        state[key] = torch.zeros(shape, dtype=getattr(torch, kind))
        if key.endswith("integral.project"):
            state[key] = torch.linspace(0, 16, 17)
    return state


NAMES = ["gfl_r18", "gfl_r34", "gfl_r50", "gfl_r101", "atss_r50", "atss_r101", "fcos_r50",
         "fcos_r101", "retinanet_r18", "retinanet_r50", "retinanet_r101", "retinanet_swin-t",
         "retinanet_mobilenetv2"]
BODIES = {"r18": "resnet18", "r34": "resnet34", "r50": "resnet50", "r101": "resnet101",
          "swint": "swin_t", "mnv2": "mobilenet_v2"}


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_mmdetection_has_a_place_and_the_backbone_is_torchvisions(golden, name):
    state = key_list(golden, name)
    arch, ours = infer_arch(state, name), from_mmdet(state)
    assert arch["kind"] == name.split("_")[0] and arch["num_classes"] == 80
    known = ("body.stages.", "body.norms.", "fpn.", "head.")
    assert not [k for k in ours if not k.startswith(known)]
    constant = sum(k.endswith(("integral.project", "relative_position_index")) for k in state)
    assert len(ours) == len(state) - constant
    with torch.device("meta"):
        net = getattr(torchvision.models, BODIES[arch["backbone"]])()
    theirs = {}
    for k, v in net.state_dict().items():
        if not k.startswith(("fc.", "classifier.", "head.", "norm.")) and "_index" not in k:
            theirs["body.stages." + k.removeprefix("features.")] = v.shape
    assert {k: v.shape for k, v in ours.items() if k.startswith("body.stages.")} == theirs


def test_swins_patch_merging_reads_the_same_pixels():
    """mmdetection: nn.Unfold of 2 x 2 cells, LayerNorm and Linear; torchvision: four slices."""
    torch.manual_seed(0)
    c = 3
    x, norm = torch.randn(2, c, 4, 6, dtype=torch.float64), torch.randn(4 * c, dtype=torch.float64)
    weight = torch.randn(5, 4 * c, dtype=torch.float64)
    unfolded = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)                # (B, cells, 4 c)
    theirs = (unfolded * norm) @ weight.T
    y = x.permute(0, 2, 3, 1)
    merged = [y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]]
    merged = torch.cat(merged, -1)
    ours = (merged.flatten(1, 2) * by_patches(norm)) @ by_patches(weight).T
    torch.testing.assert_close(ours, theirs)
    merging = swin_transformer.PatchMerging(c).double()
    merging.norm = nn.Identity()
    merging.reduction.weight.data = by_patches(weight)
    torch.testing.assert_close(merging(y).flatten(1, 2), unfolded @ weight.T)


@pytest.mark.parametrize("change, word", [
    (lambda s: s.pop("bbox_head.gfl_cls.bias"), "neither ours nor an mmdetection"),
    (lambda s: s.pop("neck.fpn_convs.3.conv.weight"), "no FPN with five levels"),
    (lambda s: s.update({"neck.lateral_convs.0.conv.weight": torch.tensor(1.0)}), "no FPN"),
    (lambda s: s.update({"bbox_head.integral.project": torch.arange(16.0)}), "is not 0..16")])
def test_other_detectors_are_refused_in_one_line(change, word):
    state = {"bbox_head.gfl_cls.bias": torch.zeros(80),
             "bbox_head.integral.project": torch.arange(17.0),
             "neck.lateral_convs.0.conv.weight": torch.zeros(256, 512, 1, 1),
             "neck.fpn_convs.3.conv.weight": torch.zeros(256, 256, 3, 3)}
    infer_arch(state, "x"), from_mmdet(state)
    change(state)
    assert word in error_of(lambda: (infer_arch(state, "x"), from_mmdet(state)))


def test_tensors_without_dimensions_under_known_names_are_left_to_load_strict():
    zero = torch.tensor(0.0)
    state = {"bbox_head.retina_cls.bias": zero, "backbone.layer1.0.conv2.weight": zero}
    state |= {f"backbone.layer3.{i}.conv1.weight": zero for i in range(2)}
    assert to_torchvision(state, "x")[0] == "retina_r18"
    assert to_dkdetr({"bbox_head.cls_branches.6.bias": zero})[0] == {"objectness.bias": zero}
    assert len(from_mmdet({"backbone.stages.0.downsample.norm.weight": zero})) == 1
    stray = {"backbone.layer8.0.linear_conv.conv.weight": zero,
             "backbone.layer1.0.expand_conv.bn.bias": zero}
    assert len(from_mmdet(stray)) == 2


@pytest.mark.parametrize("name", ["faster_rcnn_r50", "faster_rcnn_r101", "retinanet_r18",
                                  "retinanet_r50", "retinanet_r101"])
def test_mmdetections_keys_become_torchvisions(golden, fill, name):
    """Every key finds its place; the background moves from the last output to the first."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    state = fill.fill(key_list(golden, name))
    made, count, ours = to_torchvision(state, name)
    depth = name.rsplit("r", 1)[1]
    retina = name.startswith("retina")
    assert made == f"{'retina' if retina else 'faster'}_r{depth}" and count == 80
    with torch.device("meta"):
        extra = dict(returned_layers=[2, 3, 4]) if retina else {}
        body = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, **extra)
        if retina:
            c5 = 2048 if int(depth) >= 50 else 512
            body.fpn.extra_blocks = PlainP6P7(c5, 256)
            net = torchvision.models.detection.RetinaNet(body, 80)
        else:
            net = torchvision.models.detection.FasterRCNN(body, 81)
    shapes = {k: v.shape for k, v in net.state_dict().items() if "num_batches" not in k}
    assert {k: v.shape for k, v in ours.items()} == shapes
    if not retina:
        theirs = state["roi_head.bbox_head.fc_cls.bias"]
        cls, box = (ours[f"roi_heads.box_predictor.{k}.bias"] for k in ("cls_score", "bbox_pred"))
        assert torch.equal(cls[1:], theirs[:-1]) and cls[0] == theirs[-1]
        assert torch.equal(box[4:], state["roi_head.bbox_head.fc_reg.bias"]) and not box[:4].any()


def test_a_cascade_on_a_deformable_resnext_is_recognised_and_its_masks_left_out():
    one = torch.ones(81)
    state = {f"roi_head.bbox_head.{i}.fc_cls.bias": torch.arange(81.0) for i in range(3)}
    state |= {"backbone.layer1.0.conv3.weight": one, "roi_head.mask_head.0.conv.weight": one,
              "backbone.layer1.0.conv2.weight": torch.zeros(128, 4, 3, 3),
              "backbone.layer2.0.conv2_offset.bias": one,
              "roi_head.bbox_head.1.shared_fcs.0.weight": one}
    state |= {f"backbone.layer3.{i}.conv1.weight": one for i in range(23)}
    name, count, ours = to_torchvision(state, "x")
    assert (name, count) == ("cascade_x101_32x4d_dcn", 80)
    assert torch.equal(ours["roi_heads.cls.2.bias"], torch.arange(81.0).roll(1))
    assert "roi_heads.heads.1.fc6.weight" in ours and not [k for k in ours if "mask" in k]
    assert "backbone.body.layer2.0.conv2.conv_offset.bias" in ours
    assert "neither" in error_of(lambda: to_torchvision({"a.b": one}, "x"))


def test_deformable_detr_of_mmdetection_has_a_place_for_every_key(golden):
    state = key_list(golden, "deformable_detr_r50")
    ours, unknown = to_dkdetr(state)
    assert unknown == [] and len(ours) == sum("num_batches_tracked" not in k for k in state)
    assert ours["objectness.weight"].shape[0] == 1
    for key in ("encoder.0.attention.sampling_offsets.weight", "decoder.5.ffn.3.bias",
                "level_embed", "decoder.0.self_attention.in_proj_weight",
                "decoder.3.attention.value_proj.bias"):
        assert key in ours, key
    ours, unknown = to_dkdetr({"something.else": 1, "text_encoder.text_feat": 2})
    assert unknown == ["something.else"] and list(ours) == ["something.else"]


# ------------------------------------------------------------------ modules that only they need

def test_mmdetections_anchors_have_their_exact_sides_and_strides():
    """On maps of 100 x 168, 50 x 84, ..., 7 x 11 of an image of 800 x 1344: torchvision's own would
    lie 114 pixels apart on the last, not 128."""
    sides = [(s * 1.0, s * 2 ** (1 / 3)) for s in (32, 64, 128, 256, 512)]
    made = ExactAnchors(sides, (8, 16, 32, 64, 128))
    images = ImageList(torch.zeros(2, 3, 800, 1344), [(800, 1344)] * 2)
    sizes = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    a, b = made(images, [torch.zeros(2, 1, *size) for size in sizes])
    assert a.shape == (6 * sum(h * w for h, w in sizes), 4) and torch.equal(a, b)
    last = a[-6 * 77:].view(7, 11, 3, 2, 4)
    step = torch.tensor([256.0, 128, 256, 128]).expand(3, 2, 4)
    assert torch.allclose(last[1, 2] - last[0, 0], step)
    w, h = (last[0, 0, ..., k + 2] - last[0, 0, ..., k] for k in (0, 1))
    assert torch.allclose((w * h).sqrt(), torch.tensor([512.0, 512 * 2 ** (1 / 3)]).expand(3, 2))
    assert torch.allclose(h / w, torch.tensor([[0.5], [1], [2]]).expand(3, 2))


def test_aligned_pool_equals_a_loop_over_boxes():
    torch.manual_seed(0)
    maps = {str(k): torch.randn(2, 4, 64 >> k, 64 >> k) for k in range(4)}
    side = torch.tensor([20.0, 111, 112, 113, 223, 224, 447, 448, 900, 0])
    boxes = torch.stack([side * 0 + 3, side * 0 + 2, side + 3, side + 2], 1)
    out = AlignedPool()(maps, [boxes, boxes[:2]], [(256, 256)] * 2)
    levels = [0, 0, 1, 1, 1, 2, 2, 3, 3, 0, 0, 0]
    owner = [0] * 10 + [1] * 2
    for row, box in enumerate(torch.cat([boxes, boxes[:2]])):
        k, b = levels[row], owner[row]
        roi = torch.cat([torch.zeros(1), box])[None]
        alone = torchvision.ops.roi_align(maps[str(k)][b:b + 1], roi, 7, 0.25 / 2 ** k, 0, True)
        assert torch.equal(out[row], alone[0])
    assert AlignedPool()(maps, [boxes[:0], boxes[:0]], [(256, 256)] * 2).shape == (0, 4, 7, 7)


def test_deform_conv_without_offsets_is_the_plain_convolution():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, 2, 1, groups=4, bias=False)
    deform = DeformConv(conv)
    deform.weight.data = conv.weight.data
    nn.init.zeros_(deform.conv_offset.weight)
    nn.init.zeros_(deform.conv_offset.bias)
    x = torch.randn(2, 8, 9, 11)
    torch.testing.assert_close(deform(x), conv(x), atol=1e-5, rtol=1e-5)


def test_p7_of_mmdetection_comes_from_p6_without_relu():
    p = PlainP6P7(4, 4)
    x = [torch.randn(1, 4, 9, 9)]
    maps, names = p(list(x), x, ["c5"])
    assert names == ["c5", "p6", "p7"] and torch.equal(maps[2], p.p7(p.p6(x[0])))


def test_cascade_refines_boxes_three_times_and_averages_logits():
    torch.manual_seed(0)
    heads = CascadeHeads(4, 3)
    maps = {str(k): torch.randn(1, 4, 32 >> k, 32 >> k) for k in range(4)}
    rois, size = torch.tensor([[4.0, 4, 60, 80], [10, 20, 100, 60]]), [(128, 128)]
    found, losses = heads(maps, [rois], size)
    score, boxes = 0.0, rois
    deltas = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    for stage, std in enumerate(deltas):  # mmdetection's deltas, by hand
        x = heads.heads[stage](heads.box_roi_pool(maps, [boxes], size))
        score = score + heads.cls[stage](x) / 3
        d = heads.reg[stage](x) * torch.tensor(std)
        wh = boxes[:, 2:] - boxes[:, :2]
        center = (boxes[:, 2:] + boxes[:, :2]) / 2 + d[:, :2] * wh
        half = wh * d[:, 2:].exp() / 2
        boxes = torch.cat([center - half, center + half], 1).clamp(0, 128)
    p = score.softmax(-1)[:, 1:]
    for box, s, label in zip(*(found[0][k] for k in ("boxes", "scores", "labels"))):
        row = (boxes - box).abs().sum(1).argmin()
        torch.testing.assert_close(box, boxes[row], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(s, p[row, label - 1])
    assert losses == {} and len(found[0]["boxes"]) > 0
    x = heads.box_roi_pool(maps, [rois], size)
    mean = sum(c(h(x)) for c, h in zip(heads.cls, heads.heads)) / 3
    torch.testing.assert_close(heads.logits(maps, [rois], size), mean)


# ------------------------------------------------------------------ Swin's shift on small maps

def attention(window=(7, 7), shift=(3, 3), heads=2, dim=4):
    torch.manual_seed(0)
    module = swin_transformer.ShiftedWindowAttention(dim, list(window), list(shift), heads).double()
    for p in module.parameters():
        p.data.normal_()
    return module


def loop(module, x):
    """Shifted-window attention of the paper, cell by cell: which window a cell falls into once the
    map is rolled, and whether it came over the border, along each axis."""
    (wh, ww), (sh, sw), heads = module.window_size, module.shift_size, module.num_heads
    b, h, w, c = x.shape
    ph, pw, d = -(-h // wh) * wh, -(-w // ww) * ww, c // heads
    padded = torch.zeros(b, ph, pw, c, dtype=x.dtype)
    padded[:, :h, :w] = x
    cells = {}
    for i in range(ph):
        for j in range(pw):
            row, column = (i - sh) % ph, (j - sw) % pw
            window = (row // wh, column // ww)
            region = (i < sh, j < sw)  # came over the border
            cells.setdefault(window, []).append((i, j, row % wh, column % ww, region))
    out = torch.zeros_like(padded)
    table = module.relative_position_bias_table
    for members in cells.values():
        tokens = torch.stack([padded[:, i, j] for i, j, *_ in members], 1)           # (B, T, C)
        q, k, v = (tokens @ module.qkv.weight.T + module.qkv.bias).chunk(3, -1)
        mixed = torch.zeros_like(tokens)
        for t, (_, _, y, x_, region) in enumerate(members):
            for n in range(heads):
                part = slice(n * d, (n + 1) * d)
                logits = (k[..., part] @ q[:, t, part, None])[..., 0] / d ** 0.5           # (B, T)
                for u, (_, _, y2, x2, region2) in enumerate(members):
                    logits[:, u] += table[(y - y2 + wh - 1) * (2 * ww - 1) + x_ - x2 + ww - 1, n]
                    if region != region2:
                        logits[:, u] -= 100
                weight = logits.softmax(-1)
                mixed[:, t, part] = (weight[:, None] @ v[..., part])[:, 0]
        mixed = mixed @ module.proj.weight.T + module.proj.bias
        for t, (i, j, *_) in enumerate(members):
            out[:, i, j] = mixed[:, t]
    return out[:, :h, :w]


SMALL_MAPS = [((7, 7), (3, 3), (7, 7)), ((7, 7), (3, 3), (3, 5)), ((7, 7), (3, 3), (7, 9)),
              ((7, 7), (3, 3), (12, 4)), ((4, 3), (2, 1), (4, 7)), ((4, 3), (2, 0), (3, 3)),
              ((2, 2), (1, 1), (1, 1)), ((3, 3), (1, 1), (8, 2))]


@pytest.mark.parametrize("window, shift, size", SMALL_MAPS)
def test_shift_on_small_maps_equals_the_paper_cell_by_cell(window, shift, size):
    module = attention(window, shift)
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    with torch.no_grad():
        without, ours = module(x), always_shift(module)(x)
        torch.testing.assert_close(ours, loop(module, x), atol=1e-12, rtol=1e-12)
    assert (ours - without).abs().max() > 1e-3  # torchvision leaves the shift out


@pytest.mark.parametrize("size", [(8, 8), (14, 14), (15, 22)])
def test_on_larger_maps_every_bit_is_torchvisions(size):
    module = attention()
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    with torch.no_grad():
        before, after = module(x), always_shift(module)(x)
        assert torch.equal(before, after)
        torch.testing.assert_close(after[:1], loop(module, x[:1]), atol=1e-12, rtol=1e-12)


def without_the_rule(monkeypatch):
    """torchvision's function, its rule about small maps taken out."""
    source = inspect.getsource(swin_transformer.shifted_window_attention)
    assert source.count("shift_size[0] = 0") == source.count("shift_size[1] = 0") == 1
    source = re.sub(r"shift_size\[([01])\] = 0", r"pass", source)
    names = dict(vars(swin_transformer))
    exec(source, names)
    function = names["shifted_window_attention"]
    monkeypatch.setattr(swin_transformer, "shifted_window_attention", function)


@pytest.mark.parametrize("height, width", [(224, 288), (64, 96), (200, 40), (448, 448)])
def test_a_whole_swin_equals_torchvisions_without_its_rule_to_the_last_bit(
        height, width, monkeypatch):
    torch.manual_seed(0)
    net = torchvision.models.SwinTransformer([4, 4], 12, [2, 2, 2, 2], [1, 2, 3, 6], [7, 7])
    net.double().eval()
    for p in net.parameters():
        p.data.normal_(std=0.3)
    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    names, numbers = list(net.state_dict()), torch.random.get_rng_state()
    with torch.no_grad():
        plain, ours = net.features(x), always_shift(net).features(x)
        assert list(net.state_dict()) == names
        assert torch.equal(torch.random.get_rng_state(), numbers)
        without_the_rule(monkeypatch)
        for m in net.modules():  # back to torchvision's class, with its function changed
            if type(m) is zoo.ShiftedAttention:
                m.__class__ = swin_transformer.ShiftedWindowAttention
        assert torch.equal(net.features(x), ours)
    assert torch.equal(plain, ours) == (height == 448)  # C5 of 14 x 14 needs no rule


def test_shifted_attention_passes_gradients_dropout_and_bf16():
    module = always_shift(attention())
    assert type(module) is zoo.ShiftedAttention
    assert type(always_shift(attention(shift=(0, 0)))) is swin_transformer.ShiftedWindowAttention
    x = torch.randn(1, 5, 5, 4, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters()) and x.grad.abs().sum() > 0
    module.attention_dropout = 1.0
    assert torch.allclose(module(x), module.proj.bias.expand(1, 5, 5, 4))
    module.eval()
    full = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = module.float()(x.float())
    assert (half - full).abs().max() < 0.1 * full.abs().max()
