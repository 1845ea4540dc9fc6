# SPDX-License-Identifier: MIT
"""common/imagenet.py: images found in folders and tars, what a damaged or odd file says; streams; boxes."""
import ast
import gzip
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import socket
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import common.imagenet as imagenet
from common.imagenet import (ImageIndex, LabelledImages, LocalisationImages, Stream, class_folders, collate_labelled,
                             evaluated_images, jitter_image, read_annotation, read_ilsvrc, shared_classes)
from common.run import UserError
from conftest import ROOT, SHARED


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photo(path, width, height, seed=0, orientation=None):
    """A JPEG of random 8-px blocks; orientation: EXIF's."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    picture = Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width])
    picture.save(path, quality=95, format="JPEG", exif=exif)


def folders(root, counts, tar=(), size=(40, 30)):
    """root/<class>/k.JPEG, or root/<class>.tar for those in `tar`."""
    for n, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for k in range(count):
            photo(root / name / f"{name}_{k}.JPEG", *size, seed=100 * n + k)
        if name in tar:
            with tarfile.open(root / f"{name}.tar", "w") as f:
                for path in sorted((root / name).iterdir()):
                    f.add(path, path.name)
            shutil.rmtree(root / name)
    return root


def names(index):
    return [index.name(i) for i in range(len(index))]


def member(tar, name, content, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    tar.addfile(info, io.BytesIO(content))


def one_line(error):
    text = str(error.value)
    assert len(text.splitlines()) == 1 and len(text) < 600
    return text


# ------------------------------------------------------------------ the index and its cache

def test_index_is_made_once_and_anew_when_a_class_changes(tmp_path, monkeypatch, capsys):
    root = folders(tmp_path / "in", {"n2": 2, "n1": 3, "n3": 0})
    index = ImageIndex(root)
    assert index.classes == ["n1", "n2"] and index.empty == ["n3"]
    assert index.labels.tolist() == [0, 0, 0, 1, 1] and index.first.tolist() == [0, 3, 5]
    assert names(index) == ["n1/n1_0.JPEG", "n1/n1_1.JPEG", "n1/n1_2.JPEG", "n2/n2_0.JPEG", "n2/n2_1.JPEG"]
    with monkeypatch.context() as m:
        m.setattr(ImageIndex, "build", lambda *_: pytest.fail("walked again"))
        again = ImageIndex(root)
    assert again.labels.tolist() == index.labels.tolist() and again.name(4) == index.name(4)
    photo(root / "n3" / "new.JPG", 40, 30)  # in capitals, too
    assert ImageIndex(root).classes == ["n1", "n2", "n3"]
    assert capsys.readouterr().out == ""

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(np, "savez", refused)  # a read-only disk
    photo(root / "n3" / "newer.jpg", 40, 30)
    assert len(ImageIndex(root)) == 7 and "cannot be kept there" in capsys.readouterr().out
    assert len(ImageIndex(root, quiet=True)) == 7 and capsys.readouterr().out == ""
    assert sorted(p.name for p in root.iterdir()) == [".index.npz", "n1", "n2", "n3"]  # no drafts left behind


def test_index_of_some_classes(tmp_path):
    root = folders(tmp_path / "in", {"n1": 1, "n2": 2, "n3": 3})
    index = ImageIndex(root, ["n3", "n1"])
    assert index.classes == ["n1", "n3"] and index.labels.tolist() == [0, 1, 1, 1]
    assert index.name(3) == "n3/n3_2.JPEG"
    with pytest.raises(UserError, match="has no class n9"):
        ImageIndex(root, ["n1", "n9"])
    with pytest.raises(UserError, match="no such folder"):
        ImageIndex(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no image"):
        ImageIndex(folders(tmp_path / "empty", {"n1": 0}))
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds no folder and no .tar"):
        ImageIndex(tmp_path / "bare")


def litter(folder):
    """What macOS, Windows and file servers leave beside images."""
    for name in ("._n1_0.JPEG", ".DS_Store", ".hidden.jpg", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    for name in ("__MACOSX", ".git", "@eaDir"):
        (folder / name).mkdir()
        photo(folder / name / "x.JPEG", 40, 30)


def test_hidden_files_are_ignored_in_folders_sub_folders_and_tars(tmp_path, capsys):
    root = folders(tmp_path / "in", {"n1": 2, "n2": 1, "n3": 0})
    (root / "n2" / "sub").mkdir()
    for folder in (root, root / "n1", root / "n2" / "sub", root / "n3"):
        litter(folder)
    with tarfile.open(root / "n4.tar", "w") as f:
        content = (root / "n1" / "n1_0.JPEG").read_bytes()
        for name in ("._x.JPEG", "__MACOSX/x.JPEG", "a/.b/x.JPEG", "n4/x.JPEG", "./y.JPEG", "Thumbs.db"):
            member(f, name, content)
    (root / "._n5.tar").write_bytes(b"\0")
    index = ImageIndex(root)
    assert names(index) == ["n1/n1_0.JPEG", "n1/n1_1.JPEG", "n2/n2_0.JPEG", "n4.tar/n4/x.JPEG",
                            "n4.tar/./y.JPEG"]
    assert index.empty == ["n3"] and capsys.readouterr().out == ""
    assert all(index.read(i).size == (40, 30) for i in range(5))


def test_images_in_sub_folders_are_read_and_changes_there_are_noticed(tmp_path, monkeypatch, capsys):
    root = folders(tmp_path / "in", {"n1": 2, "n2": 1})
    (root / "n1" / "a" / "b").mkdir(parents=True)
    photo(root / "n1" / "a" / "b" / "x.JPEG", 40, 30)
    index = ImageIndex(root)
    assert names(index) == ["n1/n1_0.JPEG", "n1/n1_1.JPEG", "n1/a/b/x.JPEG", "n2/n2_0.JPEG"]
    line = "1 of 4 images lie in sub-folders of their class's folder, as n1/a/b/x.JPEG"
    assert line in capsys.readouterr().out
    with monkeypatch.context() as m:
        m.setattr(ImageIndex, "build", lambda *_: pytest.fail("walked again"))
        assert len(ImageIndex(root)) == 4 and line in capsys.readouterr().out  # told from the cache, too
    photo(root / "n1" / "a" / "b" / "y.JPEG", 40, 30)
    assert len(ImageIndex(root)) == 5
    shutil.rmtree(root / "n1" / "a")
    assert len(ImageIndex(root)) == 3


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    root = folders(tmp_path / "in", {"n1": 1, "n2": 0})
    store = folders(tmp_path / "store", {"x": 2})
    (root / "n1" / "back").symlink_to(root / "n1")
    (root / "n1" / "again").symlink_to(store / "x")
    (root / "n1" / "once more").symlink_to(store / "x")
    (root / "n2" / "file.JPEG").symlink_to(store / "x" / "x_0.JPEG")
    (root / "n3").symlink_to(store / "x")
    index = ImageIndex(root)
    assert names(index) == ["n1/n1_0.JPEG", "n1/again/x_0.JPEG", "n1/again/x_1.JPEG", "n2/file.JPEG",
                            "n3/x_0.JPEG", "n3/x_1.JPEG"]
    assert index.read(3).size == (40, 30)


def test_a_folder_one_level_too_high_is_refused(tmp_path):
    folders(tmp_path / "train", {"n1": 1, "n2": 1})
    folders(tmp_path / "val", {"n1": 1, "n2": 1})
    with pytest.raises(UserError, match="holds train, val, which are no classes; give one of these folders"):
        ImageIndex(tmp_path)
    (tmp_path / "train").rename(tmp_path / "trainer")  # two classes, whose images lie in sub-folders
    assert ImageIndex(tmp_path).classes == ["trainer", "val"]
    for name in ("n1", "n2"):  # the layout of Tiny ImageNet
        folders(tmp_path / "tiny" / name, {"images": 2 if name == "n1" else 1})
    assert ImageIndex(tmp_path / "tiny").labels.tolist() == [0, 0, 1]


def test_a_class_of_other_endings_is_named_with_one_of_its_files(tmp_path, capsys):
    root = folders(tmp_path / "in", {"n1": 1, "n2": 0, "n3": 0})
    (root / "n2" / "x.gif").write_bytes(b"GIF89a")
    with tarfile.open(root / "n4.tar", "w") as f:
        member(f, "y.tiff", b"II")
    for _ in range(2):  # from the walk, from the cache
        index = ImageIndex(root)
        assert index.empty == ["n2", "n3", "n4"] and index.classes == ["n1"]
        endings = ".jpeg, .jpg, .png, .bmp, .webp; passed over: n2/x.gif\n"
        assert capsys.readouterr().out.endswith(f"n2, n4 hold no image with one of the endings {endings}")
    ImageIndex(root, ["n1", "n3"])
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="holds no image with one of the .*passed over: n4.tar/y.tiff"):
        ImageIndex(root, ["n3", "n4"])
    shutil.rmtree(root / "n1")
    with pytest.raises(UserError, match="holds no image with one of the endings .*; passed over: n2/x.gif"):
        ImageIndex(root)


def test_what_is_no_regular_file_is_left_out_and_told(tmp_path, capsys):
    root = folders(tmp_path / "in", {"n1": 1})
    os.mkfifo(root / "n1" / "pipe.JPEG")
    (root / "n1" / "gone.JPEG").symlink_to(root / "nothing")
    (root / "n1" / "self.JPEG").symlink_to(root / "n1" / "self.JPEG")
    os.mkfifo(root / "n2.tar")
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd()
        os.chdir(root / "n1")  # a socket's path is short
        s.bind("socket.JPEG")
        os.chdir(here)
        assert names(ImageIndex(root)) == ["n1/n1_0.JPEG"]
    out = capsys.readouterr().out
    assert "left out, no regular file: n2.tar" in out
    assert "4 left out, first n1/gone.JPEG, which is no regular file" in out


def test_names_that_lead_out_of_a_tar_and_links_in_it_are_left_out(tmp_path, capsys):
    root, content = folders(tmp_path / "in", {"n1": 1}), b"secret"
    (tmp_path / "x.JPEG").write_bytes(content)
    with tarfile.open(root / "n2.tar", "w") as f:
        member(f, "ok.JPEG", (root / "n1" / "n1_0.JPEG").read_bytes())
        member(f, "../../x.JPEG", content)
        member(f, "/etc/x.JPEG", content)
        member(f, "hard.JPEG", b"", tarfile.LNKTYPE, "ok.JPEG")
        member(f, "soft.JPEG", b"", tarfile.SYMTYPE, "/etc/passwd")
        member(f, "pipe.JPEG", b"", tarfile.FIFOTYPE)
        member(f, "folder.JPEG", b"", tarfile.DIRTYPE)
    index = ImageIndex(root)
    assert names(index) == ["n1/n1_0.JPEG", "n2.tar/ok.JPEG"] and index.read(1).size == (40, 30)
    assert "5 left out, first n2.tar/../../x.JPEG, which leads out of its tar" in capsys.readouterr().out


def test_names_that_cannot_be_printed_are_refused_or_shown_in_one_line(tmp_path):
    root = folders(tmp_path / "in", {"n1": 1})
    (root / "n1" / "two\nlines.JPEG").write_bytes(b"")
    index = ImageIndex(root)
    with pytest.raises(UserError) as e:
        imagenet.read_member(root / "n1" / "two\nlines.JPEG", 0, 9, root / index.name(1))
    assert r"two\nlines.JPEG" in one_line(e)
    for name in ("a\nb", "a\x1b[31m", os.fsdecode(b"\xff\xfe")):
        (root / name).mkdir()
        with pytest.raises(UserError, match="its name holds control characters or is no UTF-8") as e:
            ImageIndex(root)
        one_line(e)
        (root / name).rmdir()
    folders(root, {"Straße 北京": 1})
    assert ImageIndex(root).classes == ["Straße 北京", "n1"]


def test_a_damaged_cache_is_made_anew(tmp_path):
    root = folders(tmp_path / "in", {"n1": 3, "n2": 2}, tar=["n2"])
    expected, path = names(ImageIndex(root)), root / ".index.npz"
    good, rng = path.read_bytes(), random.Random(0)
    damaged = [b"", b"damaged", good[:100], good[:-40], good + good, b"\x93NUMPY" + good]
    for _ in range(100):
        content = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        damaged.append(bytes(content))
    for content in damaged:
        path.write_bytes(content)
        index = ImageIndex(root)
        assert names(index) == expected and index.read(4).size == (40, 30)
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    assert names(ImageIndex(root)) == expected
    path.unlink()
    path.mkdir()
    assert names(ImageIndex(root)) == expected


def test_a_cache_that_contradicts_itself_is_made_anew(tmp_path):
    root = folders(tmp_path / "in", {"n1": 3, "n2": 2}, tar=["n2"])
    expected = names(ImageIndex(root))
    with np.load(root / ".index.npz") as f:
        good = {k: f[k] for k in f.files}
    assert good["version"] == ImageIndex.VERSION

    def changed(field, place, value):
        array = good[field].copy()
        array[place] = value
        return {field: array}
    wrong = [changed("labels", -1, 2), changed("labels", 0, -1), changed("labels", 0, 1),
             changed("ends", -1, 10**6), changed("ends", 0, 0), changed("ends", 1, 1),
             changed("at", -1, 10**9), changed("at", -1, -1), changed("at", 0, 5), changed("size", -1, 10**9),
             changed("size", -1, -5), changed("size", -1, 2**63 - 1), changed("stamps", 0, 1),
             changed("lengths", 1, 1), dict(version=np.array(1)), dict(labels=good["labels"][:-1]),
             dict(at=good["at"][:-1]), dict(names=good["names"][:-1]), dict(ends=good["ends"].astype(float)),
             dict(inner=np.frombuffer(b"n1/gone/", np.uint8)), dict(inner_stamps=np.array([1])),
             dict(labels=good["labels"][:, None]), dict(lengths=good["lengths"][:0])]
    for change in wrong:
        np.savez(root / ".index.npz", **dict(good, **change))
        index = ImageIndex(root)
        assert names(index) == expected and index.read(4).size == (40, 30), change
    np.savez(root / ".index.npz", **{k: v for k, v in good.items() if k != "told"})
    assert names(ImageIndex(root)) == expected


def open_often(root):
    for _ in range(20):
        (root / ".index.npz").unlink(missing_ok=True)
        assert len(ImageIndex(root, quiet=True)) == 6


def test_two_processes_at_once_leave_one_whole_cache(tmp_path):
    root = folders(tmp_path / "in", {"n1": 3, "n2": 3})
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=open_often, args=(root,)) for _ in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert [w.exitcode for w in workers] == [0, 0]
    assert sorted(p.name for p in root.iterdir()) == [".index.npz", "n1", "n2"]


def test_an_index_can_be_sent_to_loader_processes(tmp_path):
    index = ImageIndex(folders(tmp_path / "in", {"n1": 2}))
    again = pickle.loads(pickle.dumps(LabelledImages(index, as_tensor)))
    assert torch.equal(again[1, 0]["image"], LabelledImages(index, as_tensor)[1, 0]["image"])


# ------------------------------------------------------------------ tars

def test_tar_reads_as_the_folder_does(tmp_path):
    a = ImageIndex(folders(tmp_path / "a", {"n1": 3, "n2": 2}))
    b = ImageIndex(folders(tmp_path / "b", {"n1": 3, "n2": 2}, tar=["n1", "n2"]))
    assert a.classes == b.classes and a.labels.tolist() == b.labels.tolist()
    assert all(np.array_equal(np.array(a.read(i)), np.array(b.read(i))) for i in range(5))
    data = gzip.compress((a.root / a.name(0)).read_bytes())  # as some members of ImageNet-21K are
    with tarfile.open(tmp_path / "b" / "n3.TAR", "w") as f:
        member(f, "x.JPEG", data)
    b = ImageIndex(tmp_path / "b")
    assert b.classes == ["n1", "n2", "n3"] and np.array_equal(np.array(b.read(5)), np.array(a.read(0)))
    (tmp_path / "a" / "n2" / "packed.JPEG").write_bytes(data)  # or in a folder
    (tmp_path / "a" / "n2" / "zzz.JPEG").write_bytes(data[:60])
    a = ImageIndex(tmp_path / "a")
    with pytest.raises(UserError, match="cannot be decoded"):
        a.read(6)
    assert a.name(5) == "n2/packed.JPEG" and np.array_equal(np.array(a.read(5)), np.array(a.read(0)))
    with tarfile.open(tmp_path / "b" / "n0.tar", "w") as f:  # made by `tar cf n0.tar n1/`
        f.add(tmp_path / "a" / "n1", "n1")
    b = ImageIndex(tmp_path / "b")
    assert b.name(0) == "n0.tar/n1/n1_0.JPEG" and np.array_equal(np.array(b.read(0)), np.array(a.read(0)))
    raw = localisation(file_name=b.name(0), width=40, height=30)
    assert LocalisationImages(b.root, raw, 64)[0, 0]["original_size"] == (30, 40)
    raw["images"][0]["file_name"] = "n0.tar/gone.JPEG"
    with pytest.raises(UserError, match="cannot be read"):
        LocalisationImages(b.root, raw, 64)[0, 0]
    raw["images"][0]["file_name"] = "n9.tar/gone.JPEG"
    with pytest.raises(UserError, match="1 of 1 images are missing, first n9.tar"):
        LocalisationImages(b.root, raw, 64)


def test_the_later_of_two_members_of_one_name_counts(tmp_path):
    root = folders(tmp_path / "in", {"n1": 1})
    with tarfile.open(root / "n2.tar", "w") as f:
        member(f, "x.JPEG", b"old")
        member(f, "x.JPEG", (root / "n1" / "n1_0.JPEG").read_bytes())
    index = ImageIndex(root)
    assert len(index) == 2 and np.array_equal(np.array(index.read(1)), np.array(index.read(0)))


@pytest.mark.parametrize("damage, words", [
    (lambda c: b"no tar", "n4.tar: cannot be read"), (lambda c: b"", "n4.tar: cannot be read"),
    (lambda c: c[:1000], "unexpected end of data"),
    (lambda c: c[:1024] + b"\xff" * 512 + c[1536:], "damaged at byte 1024"),
    (gzip.compress, "is gzip-compressed, but images are read in their place; unpack it")])
def test_damaged_tars_are_refused(tmp_path, damage, words):
    root = folders(tmp_path / "in", {"n1": 1})
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as f:
        member(f, "x.JPEG", b"x" * 500)
        member(f, "y.JPEG", b"y" * 500)
    (root / "n4.tar").write_bytes(damage(content.getvalue()))
    with pytest.raises(UserError, match=words) as e:
        ImageIndex(root)
    one_line(e)


def test_a_member_of_gigabytes_is_refused_before_anything_is_allocated(tmp_path):
    root = folders(tmp_path / "in", {"n1": 1})
    with tarfile.open(root / "n2.tar", "w") as f:
        info = tarfile.TarInfo("big.JPEG")
        info.size = 3 * 2**30
        head = info.tobuf()
    with open(root / "n2.tar", "wb") as f:
        f.write(head)
        f.truncate(512 + info.size)  # takes no room on the disk
    index = ImageIndex(root)
    with pytest.raises(UserError, match="big.JPEG: has 3,221,225,472 bytes; 268,435,456 are the most"):
        index.read(1)
    with open(root / "n1" / "n1_1.JPEG", "wb") as f:
        f.truncate(imagenet.MOST + 1)
    with pytest.raises(UserError, match="n1_1.JPEG: is larger than 256 MiB"):
        ImageIndex(root).read(1)


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    root = folders(tmp_path / "in", {"n1": 1})
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb", compresslevel=1) as f:
        for _ in range(257):
            f.write(bytes(2**20))
    with tarfile.open(root / "n2.tar", "w") as f:
        member(f, "bomb.JPEG", bomb.getvalue())
    with pytest.raises(UserError, match="n2.tar/bomb.JPEG: .* 256 MiB"):
        ImageIndex(root).read(1)


def test_folder_and_tar_of_one_class_are_refused(tmp_path):
    root = folders(tmp_path / "a", {"n1": 1}, tar=["n1"])
    folders(root, {"n1": 1})
    with pytest.raises(UserError, match="class n1 is there as a folder and as a .tar"):
        ImageIndex(root)


def test_two_spellings_of_one_class_are_refused(tmp_path):
    """Neither would be paired with the boxes' "hot dog"."""
    root = folders(tmp_path / "a", {"hot_dog": 1, "Hot dog": 1, "cat": 1})
    with pytest.raises(UserError, match="classes Hot dog and hot_dog are one; join them"):
        ImageIndex(root)
    assert ImageIndex(root, ["cat", "hot_dog"]).classes == ["cat", "hot_dog"]


def test_files_of_other_endings_beside_images_are_told(tmp_path, capsys):
    root = folders(tmp_path / "in", {"n1": 1, "n2": 1})
    (root / "n2" / "x.tif").write_bytes(b"II")
    for _ in range(2):  # from the walk, from the cache
        assert len(ImageIndex(root)) == 2
        assert "1 classes hold files of other endings, too, passed over, first n2/x.tif" in capsys.readouterr().out


def test_a_benchmark_drawn_from_a_tar_is_left_out_of_the_folder_and_the_other_way_round(tmp_path):
    tar, folder = ImageIndex(folders(tmp_path / "t", {"n1": 3, "n2": 1}, tar=["n1"])), ImageIndex(folders(tmp_path / "f", {"n1": 3, "n2": 1}))
    ours, theirs = names(tar), names(folder)
    assert any(".tar/" in n for n in ours) and not any(".tar/" in n for n in theirs)
    folder.drop([n for n in ours if n.startswith("n1")][:2])
    tar.drop([n for n in theirs if n.startswith("n1")][:2])
    assert (folder.dropped, len(folder), tar.dropped, len(tar)) == (2, 2, 2, 2)


def test_images_of_a_benchmark_are_left_out(tmp_path):
    index = ImageIndex(folders(tmp_path / "in", {"n1": 3, "n2": 2, "n3": 1}))
    index.drop(["n1/n1_1.JPEG", "n2/n2_0.JPEG", "n2/other.JPEG", "n9/x.JPEG"])
    assert index.dropped == 2
    assert names(index) == ["n1/n1_0.JPEG", "n1/n1_2.JPEG", "n2/n2_1.JPEG", "n3/n3_0.JPEG"]
    assert index.labels.tolist() == [0, 0, 1, 2] and index.first.tolist() == [0, 2, 3, 4]
    assert index.asked == 4
    index.drop([])
    assert index.dropped == index.asked == 0 and len(index) == 4
    with pytest.raises(UserError, match="all 4 images belong to the evaluation"):
        index.drop(names(index))


def test_class_folders_are_those_of_the_index_whatever_the_case_of_their_tars(tmp_path):
    root = folders(tmp_path / "in", {"n1": 1, "n2": 1, "n3": 1}, tar=["n1", "n2"])
    (root / "n2.tar").rename(root / "n2.TAR")
    (root / "n3").rename(root / "n3.tar")  # a folder, by its whole name
    assert class_folders(root) == set(ImageIndex(root).classes) == {"n1", "n2", "n3.tar"}


def test_images_that_are_evaluated_on_are_found_in_the_training_folder(tmp_path, monkeypatch):
    """Of a plain COCO json, and of ILSVRC's XML; nothing is read where they lie elsewhere."""
    root = folders(tmp_path / "in", {"n1": 2, "n2": 1})
    image = dict(id=1, file_name="n1/n1_0.JPEG", width=40, height=30)
    (tmp_path / "val.json").write_text(json.dumps(dict(images=[image, dict(image, id=2, file_name="n9/x.JPEG")], categories=[dict(id=1, name="n1")],
                                                       annotations=[dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 9, 9])])))
    assert evaluated_images(root, root, tmp_path / "val.json") == ["n1/n1_0.JPEG", "n9/x.JPEG"]  # ImageIndex.drop looks which are there
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml/n2_0.xml").write_text("<annotation><object><name>n2</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
                                           "<size><width>40</width><height>30</height></size></annotation>")
    for images in (root, tmp_path):  # from above, too
        assert evaluated_images(root, images, None, tmp_path / "xml") == ["n2/n2_0.JPEG"]
    (tmp_path / "link").symlink_to(root)
    assert evaluated_images(tmp_path / "link", root, None, tmp_path / "xml") == ["n2/n2_0.JPEG"]
    assert evaluated_images(root, None, tmp_path / "val.json") == evaluated_images(root, root, tmp_path / "none.json") == evaluated_images(root, root, None) == []
    other = folders(tmp_path / "other", {"n1": 2, "n2": 1})
    monkeypatch.setattr("common.imagenet.read_ilsvrc", None)
    monkeypatch.setattr("common.datasets.read_annotations", None)
    assert evaluated_images(root, other, tmp_path / "val.json") == evaluated_images(root, other, None, tmp_path / "xml") == []


def test_classes_whose_validation_images_are_those_of_training(tmp_path):
    train = folders(tmp_path / "train", {"n1": 1, "n2": 1, "n3": 1}, tar=["n3"])
    val, classes = folders(tmp_path / "val", {"n1": 1}), ["n1", "n2", "n3"]
    assert shared_classes(val, train, classes) == shared_classes(val, None, classes) == []
    (val / "n2").symlink_to(train / "n2")
    (val / "n3.tar").symlink_to(train / "n3.tar")
    assert shared_classes(val, train, classes) == ["n2", "n3"]
    (tmp_path / "link").symlink_to(train)
    assert shared_classes(tmp_path / "link", train, classes) == classes
    folders(train / "val", {"n1": 1})
    assert shared_classes(train / "val", train, classes) == []  # --cls-list has left it out
    assert shared_classes(train / "val", train, [*classes, "val"]) == [*classes, "val"]


# ------------------------------------------------------------------ labelled images

def as_tensor(image, rng):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), (image.height, image.width)


def test_unreadable_images_are_replaced_by_one_of_their_class_and_told(tmp_path):
    root = folders(tmp_path / "in", {"n1": 3, "n2": 3})
    (root / "n2" / "n2_1.JPEG").write_bytes(b"\xff\xd8 no jpeg")
    data = LabelledImages(ImageIndex(root), as_tensor)
    item = data[4, 7]
    assert item["label"] == 1 and len(item["bad"]) >= 1 and "n2_1.JPEG: cannot be decoded" in item["bad"][0]
    assert item["image"].shape == (3, 30, 40)
    batch = collate_labelled([data[0, 1], item], 64)
    assert batch["images"].shape == (2, 3, 64, 64) and batch["labels"].tolist() == [0, 1]
    assert batch["bad"] == item["bad"] and batch["images"][:, :, 30:].max() == 0
    for path in (root / "n2").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="ten files of class n2 in a row"):
        data[4, 7]


def test_grey_and_cmyk_images_become_rgb(tmp_path):
    root = folders(tmp_path / "in", {"n1": 1})
    for mode, ending in (("L", "jpg"), ("CMYK", "jpg"), ("1", "png")):
        Image.new(mode, (40, 30)).save(root / "n1" / f"{mode}.{ending}")
    index = ImageIndex(root)
    assert len(index) == 4 and all(index.read(i).mode == "RGB" for i in range(4))


def test_turned_images_are_upright_and_not_told_14_million_times(tmp_path, capsys):
    root = folders(tmp_path / "in", {"n1": 0})
    photo(root / "n1" / "x.jpg", 40, 30, orientation=6)
    assert ImageIndex(root).read(0).size == (30, 40) and "orientation" not in str(capsys.readouterr())


def test_large_scale_jitter_sizes():
    """500 x 375 on a canvas of 1,024: 1,024 x 768; half of it; at 2 a window of 1,024 x 1,024."""
    image = torch.zeros(3, 375, 500, dtype=torch.uint8)
    sizes = [jitter_image(image, 1024, s, random.Random(0))[1] for s in (1.0, 0.5, 2.0)]
    assert sizes == [(768, 1024), (384, 512), (1024, 1024)]
    image = torch.arange(40 * 60).reshape(1, 40, 60).expand(3, -1, -1).byte()
    drawn = [jitter_image(image, 32, 60 / 32, random.Random(k), 0.0)[0] for k in range(60)]
    assert len({tuple(x[0, 0, :2].tolist()) for x in drawn}) > 20  # windows differ


# ------------------------------------------------------------------ streams

def take(stream, n):
    return list(itertools.islice(stream, n))


@pytest.mark.parametrize("repeats", [None, [1.0, 2.5, 1.0, 1.3, 1, 1, 1]])
def test_stream_is_the_same_for_any_number_of_processes_and_after_a_resume(repeats):
    one = take(Stream(7, 4, seed=3, repeats=repeats), 12)
    halves = [take(Stream(7, 2, rank, 2, 3, repeats), 12) for rank in (0, 1)]
    assert all(a == b + c for a, b, c in zip(one, *halves))
    late = Stream(7, 4, seed=3, repeats=repeats)
    late.start = 5
    assert take(late, 7) == one[5:]
    assert take(Stream(7, 4, seed=4, repeats=repeats), 12) != one
    assert len({seed for b in one for _, seed in b}) == 48  # no two visits look alike


@pytest.mark.parametrize("repeats", [None, [1.0, 2.5, 1.0, 1.3, 1, 1, 1]])
def test_epochs_of_a_stream_are_pieces_of_the_endless_one(repeats):
    endless = take(Stream(7, 4, seed=3, repeats=repeats), 20)
    stream = Stream(7, 4, seed=3, repeats=repeats, steps=5)
    for epoch in range(4):
        for start in (0, 3, 5):
            stream.set_epoch(epoch, start)
            assert list(stream) == endless[5 * epoch + start:5 * epoch + 5] and len(stream) == 5 - start
    with pytest.raises(TypeError, match="endless"):
        len(Stream(7, 4))
    with pytest.raises(UserError, match="no image"):
        Stream(0, 4)


def test_stream_keeps_the_batches_of_earlier_versions():
    """Written down at commit 467c94e: a resumed run goes on with the same images."""
    seeds = [[7839147235533974352, 2946073206561277986, -8993030111046275205],
             [-757448186211189212, 5750192569890809213, -3541238842066255281]]
    for repeats, images in ((None, [[4, 2, 1], [0, 3, 3]]), ([1, 1.5, 2, 1, 1], [[3, 2, 0], [4, 1, 2]])):
        expected = [list(zip(i, s)) for i, s in zip(images, seeds)]
        assert take(Stream(5, 3, seed=1, repeats=repeats), 2) == expected


def test_stream_shows_each_image_once_a_pass_and_outlasts_any_dataset():
    seen = [i for b in take(Stream(7, 4), 14) for i, _ in b]
    assert all(sorted(seen[k:k + 7]) == list(range(7)) for k in range(0, 56, 7)) and seen[:7] != seen[7:14]
    assert take(Stream(2, 5), 3) and len(take(Stream(2, 5, 1, 3), 3)[0]) == 5  # a batch beyond the dataset


def test_stream_repeats_as_often_as_the_factors_say():
    stream = Stream(3, 1, repeats=torch.tensor([1.0, 2.5, 1.25]))
    counts = torch.stack([torch.bincount(stream.order(k), minlength=3) for k in range(4000)]).double()
    assert counts.mean(0).tolist() == pytest.approx([1, 2.5, 1.25], abs=0.03)
    assert counts[:, 1].unique().tolist() == [2, 3]


# ------------------------------------------------------------------ ILSVRC's boxes

def xml(name, *boxes, size=(100, 80)):
    keys = ("xmin", "ymin", "xmax", "ymax")
    text = "<annotation>"
    if size:
        text += f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for box in boxes:
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box))
        text += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    return text + "</annotation>"


@pytest.fixture
def ilsvrc(tmp_path):
    """(images, boxes): two images of 50 x 40, whose XML says 100 x 80."""
    root = folders(tmp_path / "val", {"n1": 1, "n2": 1}, size=(50, 40))
    texts = {"n1": xml("n1", (10, 20, 50, 60), (90, 70, 130, 90)), "n2": xml("n2", (0, 0, 100, 80))}
    for name, text in texts.items():
        (tmp_path / "xml" / name).mkdir(parents=True)
        (tmp_path / "xml" / name / f"{name}_0.xml").write_text(text)
    return root, tmp_path / "xml"


def test_ilsvrc_boxes(ilsvrc, capsys):
    root, boxes = ilsvrc
    raw = read_ilsvrc(root, boxes)
    assert [c["name"] for c in raw["categories"]] == ["n1", "n2"]
    assert [i["category_id"] for i in raw["images"]] == [1, 2]
    cut = [[10, 20, 40, 40], [90, 70, 10, 10], [0, 0, 100, 80]]
    assert [a["bbox"] for a in raw["annotations"]] == cut
    data = LocalisationImages(root, raw, 64)
    item = data[0, 0]  # the file is half as large as the XML says: predictions go to the XML's pixels
    assert item["image"].shape == (3, 51, 64) and item["original_size"] == (80, 100)
    assert data.names == ["n1", "n2"]
    assert item["boxes"].tolist() == [[10, 20, 50, 60], [90, 70, 100, 80]] and data.truth == raw
    assert capsys.readouterr().out == ""
    odd = dict(raw, annotations=[dict(raw["annotations"][0], category_id=2)])
    with pytest.raises(UserError, match="an image has one class"):
        LocalisationImages(root, odd, 64)
    (boxes / "n2" / "n2_0.xml").rename(boxes / "n2" / "n2_0.XML")
    litter(boxes), litter(boxes / "n1"), litter(root), litter(root / "n1")
    (boxes / "._n1_0.xml").write_text("no xml")
    assert read_ilsvrc(root, boxes) == raw
    for path in [p for p in root.glob("*/n*_0.JPEG")]:  # flat, as the original archive is
        path.rename(root / path.name)
    assert read_ilsvrc(root, boxes)["images"][0]["file_name"] == "n1_0.JPEG"
    (root / "n1_0.JPEG").unlink()
    with pytest.raises(UserError, match="images are missing, first n"):
        LocalisationImages(root, raw, 64)
    with pytest.raises(UserError, match="has no image n1_0, for which .*n1_0.xml has boxes"):
        read_ilsvrc(root, boxes)
    with pytest.raises(UserError, match="holds no .xml"):
        read_ilsvrc(root, boxes / "nothing")
    with pytest.raises(UserError, match="no such folder"):
        read_ilsvrc(root / "nothing", boxes)


def test_ilsvrc_repairs_sizes_and_corners_and_counts_them(ilsvrc, capsys):
    root, boxes = ilsvrc
    photo(root / "n2" / "n2_0.JPEG", 40, 50, orientation=6)  # 50 x 40 when upright
    (boxes / "n1" / "n1_0.xml").write_text(xml("n1", (30.5, 5, 10.25, 35), (60, 0, 70, 9), size=(0, 0)))
    (boxes / "n2" / "n2_0.xml").write_text(xml("n2", (0, 0, 45, 35), size=None))
    raw = read_ilsvrc(root, boxes)
    assert [(i["width"], i["height"]) for i in raw["images"]] == [(50, 40), (50, 40)]
    assert [a["bbox"] for a in raw["annotations"]] == [[10.25, 5, 20.25, 30], [0, 0, 45, 35]]
    out = capsys.readouterr().out
    assert out == (f"{boxes}: 2 sizes are missing, taken from the picture, 1 boxes had their corners "
                   "exchanged, 1 boxes without area in the image are left out\n")
    assert LocalisationImages(root, raw, 64)[1, 0]["image"].shape == (3, 51, 64)
    assert read_ilsvrc(root, boxes, quiet=True) == raw and capsys.readouterr().out == ""


ENTITIES = ["<!ENTITY a0 'aaaaaaaaaa'>"] + [f"<!ENTITY a{k} '{f'&a{k - 1};' * 10}'>" for k in range(1, 12)]
BOMB = f"<!DOCTYPE x [{''.join(ENTITIES)}]><annotation>&a11;</annotation>"
OUTSIDE = "<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><annotation>&a;</annotation>"


@pytest.mark.parametrize("text, words", [
    ("<annotation>", "is no ILSVRC annotation"), ("", "is no ILSVRC annotation"),
    ("\0\1", "is no ILSVRC annotation"),
    ("<html></html>", "its root is <html>, not <annotation>"),
    ('<?xml version="1.0" encoding="klingon"?><annotation/>', "is no ILSVRC annotation"),
    (BOMB, "is no ILSVRC annotation"), (OUTSIDE, "is no ILSVRC annotation"),
    ("<annotation></annotation>", "has no <object>, so its image has no class"),
    (xml("n1", (1, 2, 3)), "<bndbox/ymax> is missing or empty; a number is expected"),
    (xml("n1", (1, "two", 3, 4)), "<bndbox/ymin> holds 'two'; a number is expected"),
    (xml("n1", (1, 2, 3, "nan")), "<bndbox/ymax> holds 'nan'"),
    (xml("n1", (1, 2, "inf", 4)), "<bndbox/xmax> holds 'inf'"),
    (xml("n1", (1, 2, 3, 4), size=("wide", 80)), "<size/width> holds 'wide'"),
    (xml("n1", (1, 2, 3, 4), size=("1e9", 80)), "<size> is 1e.09 x 80, no size of a picture"),
    (xml(" ", (1, 2, 3, 4)), "<object/name> is missing or empty"),
    (xml("n\u00851", (1, 2, 3, 4)), r"<object/name> holds 'n\\x851'"),
    ("<annotation><object><bndbox/></object></annotation>", "<object/name> is missing or empty"),
    ("<annotation><object><name>n1</name></object></annotation>", "<bndbox/xmin> is missing or empty"),
    (xml("n1", (1, 2, 3, 4)).replace("</annotation>", "") + xml("n2", (1, 2, 3, 4))[12:],
     "objects of several classes")])
def test_a_wrong_element_is_named_with_its_file(tmp_path, text, words):
    path = tmp_path / "x.xml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as e:
        read_annotation(path)
    assert one_line(e).startswith(f"{path}: ") and "NoneType" not in one_line(e)


def test_an_image_with_two_xml_or_an_xml_with_two_images_is_refused(ilsvrc):
    root, boxes = ilsvrc
    shutil.copy(boxes / "n1" / "n1_0.xml", boxes / "n1_0.xml")
    with pytest.raises(UserError, match="is the second file of image n1_0, after .*n1_0.xml"):
        read_ilsvrc(root, boxes)
    (boxes / "n1_0.xml").unlink()
    shutil.copy(root / "n1" / "n1_0.JPEG", root / "n1_0.JPEG")
    assert read_ilsvrc(root, boxes)["images"][0]["file_name"] == "n1/n1_0.JPEG"  # that of the class's folder
    shutil.copy(root / "n1" / "n1_0.JPEG", root / "n1" / "n1_0.png")
    with pytest.raises(UserError, match="n1/n1_0.JPEG, n1/n1_0.png are two images, for which .* has boxes"):
        read_ilsvrc(root, boxes)


def test_real_ilsvrc_boxes():
    root = SHARED / "data" / "imagenet_mini"
    if not root.exists():
        pytest.skip(f"real photographs are not here: {root}")
    raw = read_ilsvrc(root / "val", root / "val_boxes")
    assert len(raw["images"]) == 40 and len(raw["annotations"]) == 54 and len(raw["categories"]) == 10
    assert LocalisationImages(root / "val", raw, 128).truth == raw
    raw = read_ilsvrc(root / "val_fullsize", root / "val_fullsize_boxes")
    item = LocalisationImages(root / "val_fullsize", raw, 128)[0, 0]
    assert len(raw["images"]) == 4 and item["image"].shape[0] == 3


# ------------------------------------------------------------------ localisation sets

def localisation(**image):
    """A set of one image, 40 x 30, of class 3."""
    image = dict(dict(id=7, file_name="x.jpg", width=40, height=30, category_id=3), **image)
    box = dict(id=1, image_id=7, category_id=3, bbox=[5, 5, 20, 10])
    return dict(images=[image], annotations=[box], categories=[dict(id=3, name="n1")])


@pytest.fixture
def one(tmp_path):
    photo(tmp_path / "x.jpg", 40, 30)
    return tmp_path


def without(key, **kwargs):
    raw = localisation(**kwargs)
    del raw["images"][0][key]
    return raw


def with_box(**kwargs):
    raw = localisation()
    raw["annotations"][0].update(kwargs)
    return raw


def joined():
    raw = localisation()
    raw["images"].append(dict(raw["images"][0], file_name="y.jpg"))
    return raw


def twice(**kwargs):
    raw = localisation()
    raw["categories"].append(dict(dict(id=4, name="n1"), **kwargs))
    raw["images"].append(dict(raw["images"][0], id=8, category_id=4))
    return raw


@pytest.mark.parametrize("raw, words", [
    ([], "no 'images' list of objects"),
    (dict(localisation(), annotations=[3]), "no 'annotations' list of objects"),
    (dict(localisation(), images=[]), "holds no image"),
    (joined(), "image id 7 occurs twice, x.jpg and y.jpg"),
    (without("width"), "image 7 lacks width"), (without("file_name"), "image 7 lacks file_name"),
    (localisation(height=None), r"image 7 lacks height \(height is None\)"),
    (localisation(width="wide"), r"image 7 lacks width \(width is wide\)"),
    (localisation(width=True), "image 7 lacks width"), (localisation(id="a"), "image a lacks id"),
    (localisation(width=0), "image 7 has the size 0x30"),
    (localisation(height=-3), "image 7 has the size 40x-3"),
    (localisation(width=10**7), "has the size 10000000x30"),
    (localisation(category_id=9), "image 7 has category_id 9, which 'categories' does not list"),
    (localisation(file_name="../x.jpg"), "which is no file inside the image folder"),
    (localisation(file_name="a/../../x.jpg"), "which is no file inside the image folder"),
    (localisation(file_name="/etc/x.jpg"), "which is no file inside the image folder"),
    (localisation(file_name="a.tar/../x.jpg"), "which is no file inside the image folder"),
    (localisation(file_name="x\n.jpg"), r"x\\n.jpg, which is no file inside the image folder"),
    (localisation(file_name="x\0.jpg"), "which is no file inside the image folder"),
    (localisation(file_name="y.jpg"), "1 of 1 images are missing, first y.jpg"),
    (with_box(image_id=8), "annotation 1 has image id 8"),
    (with_box(bbox=[1, 2, 3]), "four numbers are expected"),
    (with_box(bbox=None), "bbox None; an image's id and four numbers are expected"),
    (with_box(bbox="1234"), "bbox 1234; an image's id and four numbers are expected"),
    (with_box(bbox=[1, 2, 3, float("nan")]), "four numbers are expected"),
    (with_box(bbox=[1, 2, 3, 10**400]), "four numbers are expected"),
    (with_box(category_id=None), "category id None, its image 3; an image has one class"),
    (with_box(bbox=[0.1, 0.2, 0.5, 0.3]), "boxes are in pixels, not in fractions"),
    (dict(localisation(), categories=[dict(id=3)]), "lacks an id, or a name in plain text"),
    (dict(localisation(), categories=[dict(id=3, name="a\nb")]), "lacks an id, or a name in plain text"),
    (twice(id=3, name="n2"), "category id 3 occurs twice, n1 and n2"),
    (twice(), "categories 3 and 4 are both called n1")])
def test_a_wrong_localisation_set_is_refused_by_name(one, raw, words):
    with pytest.raises(UserError, match=words) as e:
        LocalisationImages(one, raw, 64, "set.json")
    assert one_line(e).startswith(("set.json: ", f"{one}: "))


def test_numbers_as_text_are_numbers_and_boxes_are_repaired(one, capsys):
    raw = localisation(id="7", width="40", height=30.0, category_id="3")
    raw["annotations"] = [dict(id=1, image_id=7.0, category_id=3, bbox=["5", 5, "20", 10]),
                          dict(id=1, image_id=7, category_id=3, bbox=[30, 20, -10, -15]),
                          dict(id=1, image_id=7, category_id=3, bbox=[30, 20, 100, 100]),
                          dict(id=1, image_id=7, category_id=3, bbox=[3, 3, 0, 5])]
    raw["categories"].insert(0, dict(id=2, name="n1"))  # an export's parent, without an image
    data = LocalisationImages(one, raw, 64, "set.json")
    item = data[0, 0]
    assert item["boxes"].tolist() == [[5, 5, 25, 15], [20, 5, 30, 20], [30, 20, 40, 30]]
    assert item["original_size"] == (30, 40)
    truth = data.truth
    assert truth["images"] == [dict(id=7, width=40, height=30, category_id=3, file_name="x.jpg")]
    assert [(a["id"], a["image_id"]) for a in truth["annotations"]] == [(1, 7), (2, 7), (3, 7)]
    assert truth["categories"] == [dict(id=3, name="n1")]
    assert capsys.readouterr().out == (
        "set.json: 1 categories that share a name are left out, they have no image, 1 boxes of negative "
        "width or height are turned round, 1 boxes without area in the image are left out, 1 boxes reach "
        "beyond their image, are they x, y, width, height?\n")
    assert json.dumps(truth)


def test_ids_of_19_digits_stay_apart(one):
    raw = localisation(id=2**62 + 1)
    raw["images"].append(dict(raw["images"][0], id=str(2**62 + 2)))
    raw["annotations"][0]["image_id"] = 2**62 + 1
    data = LocalisationImages(one, raw, 64)
    assert len(data[0, 0]["boxes"]) == 1 and len(data[1, 0]["boxes"]) == 0


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_boxes_of_a_turned_picture_are_upright_or_refused(one, orientation):
    photo(one / "x.jpg", 40, 32, orientation=orientation)
    turned = orientation in (6, 8)
    upright = dict(width=32, height=40) if turned else dict(width=40, height=32)
    item = LocalisationImages(one, localisation(**upright), 64)[0, 0]
    assert item["size"] == ((64, 51) if turned else (51, 64))
    stored = LocalisationImages(one, localisation(width=40, height=32), 64)
    if turned:
        words = f"is 32x40 when upright .EXIF orientation {orientation}., but .* 40x32"
        with pytest.raises(UserError, match=words) as e:
            stored[0, 0]
        assert one_line(e).startswith(str(one / "x.jpg"))
    else:
        assert stored[0, 0]["size"] == (51, 64)
    photo(one / "x.jpg", 40, 40, orientation=orientation)
    assert LocalisationImages(one, localisation(width=80, height=80), 64)[0, 0]["size"] == (64, 64)  # square


def test_this_file_starts_with_nothing_of_common_but_the_error_class():
    tree = ast.parse((ROOT / "common" / "imagenet.py").read_text(encoding="utf-8"))
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    own = [n for n in imports if n.level or n.module.startswith("common")]
    assert [(n.module, [a.name for a in n.names]) for n in own] == [("run", ["UserError"])]
