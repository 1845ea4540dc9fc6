# SPDX-License-Identifier: MIT
"""common/pictures.py: drawing, curves, sample pages, result files, and the loop of --predict."""
import argparse
import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import pictures
from common.pictures import (Pictures, draw_boxes, loss_terms, plot_curves, save_samples,
                             write_results)
from common.run import UserError


def error_of(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def photo(path, colour=(90, 120, 150), size=(60, 40), **options):
    """An image file of one colour; size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def colourful(image):
    return int((image.max(-1) - image.min(-1) > 60).sum())


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


# ------------------------------------------------------------------ curves

def step_row(it, **terms):
    return dict(it=it, epoch=0, loss=3 / it, **terms, lr=0.1, data=0.1, step=0.2)


def write_log(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def test_curves_are_a_png_with_and_without_evaluations(tmp_path):
    path = tmp_path / "log.jsonl"
    train = [step_row(i, loss_cls=2 / i) for i in range(1, 6)]
    both = train + [dict(it=5, AP=10.0, AP50=20.0)]
    for name, rows in dict(train=train, both=both + [dict(it=6, AP=11.0, AP50=22.0)], one=both, none=[]).items():
        write_log(path, rows)
        plot_curves(path, tmp_path / f"{name}.png")
    train, both, one = (pixels(tmp_path / f"{name}.png") for name in ("train", "both", "one"))
    assert both.shape[1] > 1.9 * train.shape[1] and colourful(both[:, both.shape[1] // 2:]) > 50
    assert one.shape == train.shape and colourful(train) > 50  # a single point is no curve
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("watched", ["norm own other", "tau_c tau_m s", "sigma muted", "top1", ""])
def test_watched_numbers_are_not_drawn_among_the_losses(watched):
    rows = []
    for it in range(1, 4):
        terms = dict(cls=round(2 / it, 6), box=round(1 / it, 6))
        terms.update({name: 100.0 * it for name in watched.split()})
        rows.append(step_row(it, **terms))
    assert loss_terms(rows) == ["loss", "cls", "box"]


def test_a_loss_that_has_faded_to_zero_is_still_drawn():
    rows = [step_row(1, cls=2.0, kd=1.0, muted=0.0), step_row(3, cls=1.0, kd=0.0, muted=0.5)]
    assert loss_terms(rows) == ["loss", "cls", "kd"]


def test_terms_of_a_log_are_those_of_its_last_rows():
    rows = [step_row(1, a=3.0, norm=4.0), step_row(2, a=1.0, b=0.5, norm=4.0)]
    assert loss_terms(rows) == ["loss", "a", "b"]
    assert loss_terms([]) == []
    assert loss_terms([dict(it=1, loss=2.0)]) == ["loss"]


def test_curves_of_a_log_that_a_kill_cut_and_that_is_not_ascii(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [json.dumps(step_row(i, süß=3 / i), ensure_ascii=False) for i in (1, 2)]
    path.write_bytes("\n".join([*rows, '{"it": 3, "lo']).encode())
    plot_curves(str(path), str(tmp_path / "curves.png"))
    assert names_in(tmp_path) == ["curves.png", "log.jsonl"]


# ------------------------------------------------------------------ boxes

@pytest.mark.filterwarnings("error")
def test_drawing_no_boxes_returns_the_image_unchanged_without_a_warning():
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    before = image.clone()
    drawn = draw_boxes(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), ["a"],
                       torch.zeros(0))
    assert torch.equal(drawn, before)


@pytest.mark.parametrize("scores", [None, torch.tensor([0.9, 0.4])])
def test_drawn_boxes_change_their_edges_and_spare_the_rest(scores):
    image = torch.full((3, 100, 120), 128, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 30, 90, 80], [60, 10, 110, 60]])
    classes = [f"class{k}" for k in range(12)]
    drawn = draw_boxes(image, boxes, torch.tensor([0, 11]), classes, scores)
    assert drawn.shape == image.shape and drawn.dtype == torch.uint8
    assert (image == 128).all()  # the input is not drawn on
    assert drawn[:, 70, 20].tolist() == list(pictures.colour_of(0))
    assert drawn[:, 50, 110].tolist() == list(pictures.colour_of(11))
    assert (drawn[:, 95:] == 128).all() and (drawn[:, 70, 40] == 128).all()


def test_names_are_white_on_their_class_colour_inside_the_image_and_off_each_other():
    image = torch.full((3, 200, 200), 128, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 60, 60], [2, 2, 62, 62], [150, 150, 200, 200], [-5, 190, 30, 205]])
    drawn = draw_boxes(image, boxes, torch.tensor([0, 1, 2, 3]), ["one", "two", "a rather long name", "four"])
    assert drawn.shape == image.shape and (drawn > 220).all(0).sum() > 50
    size, tabs = (50, 14), []
    for box in boxes.tolist():
        x, y = pictures.place_tab(box, size, (200, 200), tabs)
        assert 0 <= x <= 150 and 0 <= y <= 186
        assert not any(x < b[2] and b[0] < x + 50 and y < b[3] and b[1] < y + 14 for b in tabs)
        tabs.append((x, y, x + 50, y + 14))
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(pictures.colour_of, range(300))]
    assert max(light) < 175  # white can be read on each
    assert len({pictures.colour_of(k) for k in range(80)}) > 70


def test_deprecated_torchvision_io_is_not_used():
    assert "torchvision.io" not in Path(pictures.__file__).read_text(encoding="utf-8")


# ------------------------------------------------------------------ a page of samples

def dataset_of(folder, sizes, category_ids=(7, None, 3)):
    """Grey images 1, 2, ... of these (width, height), each with a box of class 0 and one of 1."""
    items = []
    boxes = np.array([[10, 10, 50, 40], [20, 20, 60, 60]], np.float32)
    for k, (width, height) in enumerate(sizes, 1):
        photo(folder / f"{k}.png", (128, 128, 128), (width, height))
        items.append((k, f"{k}.png", height, width, boxes, np.array([0, 1])))
    return argparse.Namespace(items=items, folder=folder, classes=["a", "b", "c"],
                              category_ids=list(category_ids))


def result(image_id, category_id=3, score=0.9, bbox=(20, 30, 50, 40)):
    return dict(image_id=image_id, category_id=category_id, bbox=list(bbox), score=score)


def test_a_page_shows_truth_on_the_left_and_sure_results_on_the_right(tmp_path):
    data = dataset_of(tmp_path, [(100, 80)])
    results = [result(1), result(1, score=0.3, bbox=(60, 10, 30, 10)), result(2)]
    save_samples(data, results, tmp_path / "page.jpg")
    page = pixels(tmp_path / "page.jpg")
    assert page.shape == (288, 658, 3)  # two pictures of 320 x 256, gaps of 6, column titles
    left, right = page[26:282, 6:326], page[26:282, 332:652]
    assert colourful(left[100, 30:34]) and colourful(right[180, 62:66])  # scale 3.2: left edges, x = 32 and 64
    assert colourful(right[32:64, 200:]) == 0  # not the one of 0.3
    assert colourful(left[225:]) == 0 and (abs(left[225:] - 128) < 20).all()
    assert (page[:24, 6:100] < 60).any() and (page[:24, 332:400] < 60).any()  # the columns' titles


def test_a_page_shows_the_five_surest_boxes_of_an_image(tmp_path):
    data = dataset_of(tmp_path, [(100, 80)])
    results = [result(1, score=0.4 + 0.01 * k, bbox=(10 * k, k, 10, 10)) for k in range(9)]
    results += [result(1, category_id=7, score=0.475, bbox=(80, 9, 10, 10))]  # where a surer one is
    found = pictures.surest(results, data, data.items)[1]
    assert [round(r["score"], 2) for r in found] == [0.48, 0.47, 0.46, 0.45, 0.44]


def test_a_comparison_has_a_column_for_the_truth_and_one_for_each_detector(tmp_path):
    data = dataset_of(tmp_path, [(100, 80)] * 5)
    data.items[0] = (*data.items[0][:4], data.items[0][4][:1], data.items[0][5][:1])  # one object only: not taken
    for name, rows in (("a", []), ("b", [result(2), result(3)])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    path = pictures.save_comparison(data, {"alone": tmp_path / "a.json", "distilled": tmp_path / "b.json"}, tmp_path)
    page = pixels(path)
    assert page.shape == (46 + 3 * 246, 3 * 306 + 6, 3)
    columns = [page[46:, x:x + 300] for x in (6, 312, 618)]
    assert [colourful(c) > 0 for c in columns] == [True, False, True] and colourful(columns[2][500:]) == 0
    for k in (0, 1, 3, 4):
        data.items[k] = (*data.items[k][:5], data.items[k][5] * 0)  # of one class only
    first = lambda wanted: pixels(pictures.save_comparison(data, {}, tmp_path, wanted, count=1))
    assert (first("b") != first("")).any() and (first("c") == first("")).all()


def test_a_comparison_begins_where_the_detectors_differ_most(tmp_path):
    data = dataset_of(tmp_path, [(100, 80)] * 5, (7, 3, 4))
    named = [result(5, 7, bbox=(10, 10, 40, 30)), result(5, 3, bbox=(20, 20, 40, 40))]
    assert pictures.right(named, data, data.items[4]) == 2 and pictures.right([], data, data.items[4]) == 0
    assert pictures.right([named[0] | dict(category_id=3), named[1], named[1]], data, data.items[4]) == 1  # another's name; twice
    for name, rows in (("a", [result(2, 4)]), ("b", [result(2, 4), *named])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    path = pictures.save_comparison(data, {"alone": tmp_path / "a.json", "distilled": tmp_path / "b.json"}, tmp_path, count=1)
    alone, distilled = (colourful(pixels(path)[46:, x:x + 300]) for x in (312, 618))
    assert alone == 0 and distilled > 0  # the fifth image, not the second, on which both say the same
    with Image.open(path) as image:
        said = image.info["comment"].decode()
    assert said == "distilled finds more objects than alone on 1 of 5 images, fewer on 0"


def test_title_stands_above_the_page_and_in_the_files_comment(tmp_path):
    data = dataset_of(tmp_path, [(100, 80)] * 3)
    save_samples(data, [], tmp_path / "plain.jpg")
    save_samples(data, [], tmp_path / "page.jpg", "best.pt, epoch 9, step 1200")
    with Image.open(tmp_path / "page.jpg") as image:
        assert image.info["comment"] == b"best.pt, epoch 9, step 1200"
    plain, page = pixels(tmp_path / "plain.jpg"), pixels(tmp_path / "page.jpg")
    strip = page.shape[0] - plain.shape[0]
    assert 10 < strip < 60 and page.shape[1] == plain.shape[1]
    assert (page[:strip] > 240).any() and (page[:strip] < 60).any()  # black on white


def test_a_page_leaves_out_what_cannot_be_read_and_what_the_file_has_no_class_for(tmp_path):
    data = dataset_of(tmp_path, [(100, 80), (100, 80)])
    (tmp_path / "1.png").write_bytes(b"no image")
    unknown = [result(2, category_id=None), result(2, category_id=-1)]
    save_samples(data, unknown, tmp_path / "page.jpg")
    page = pixels(tmp_path / "page.jpg")
    assert page.shape == (288, 658, 3)
    assert colourful(page[:, 330:]) == 0
    (tmp_path / "2.png").unlink()
    save_samples(data, [], tmp_path / "none.jpg")
    assert not (tmp_path / "none.jpg").exists()


def test_boxes_are_of_the_annotations_pixels_where_the_file_has_others(tmp_path):
    """ILSVRC's XML may give another size than the file has."""
    data = dataset_of(tmp_path, [(200, 160)])
    photo(tmp_path / "1.png", (128, 128, 128), (100, 80))
    save_samples(data, [result(1, bbox=(100, 80, 80, 60))], tmp_path / "page.jpg")
    edge = pixels(tmp_path / "page.jpg")[26 + 200, 332 + 158:332 + 163]  # scale 1.6 of 200 pixels: x = 160
    assert colourful(edge)


def test_a_page_takes_the_first_images_only(tmp_path):
    data = dataset_of(tmp_path, [(30, 40)] * 5)
    save_samples(data, [], tmp_path / "page.jpg", count=3, size=100)
    assert pixels(tmp_path / "page.jpg").shape == (26 + 2 * 106, 4 * 81 + 6, 3)  # each 75 x 100


# ------------------------------------------------------------------ result files

METRICS = dict(score=31.2, AP=31.2, classes={"süß": dict(AP=31.2)}, images=2, seconds=1.5,
               line="AP 31.2")


def test_results_say_of_which_checkpoint_they_are(tmp_path):
    data = dataset_of(tmp_path / "images", [(100, 80)] * 2)
    detections = [result(1), result(2, score=0.1)]
    write_results(tmp_path, METRICS, detections, data, "best.pt", 9, 1200)
    content = (tmp_path / "results.json").read_text(encoding="utf-8")
    metrics = json.loads(content)
    assert list(metrics)[:3] == ["checkpoint", "epoch", "it"] and "süß" in content
    expected = {k: v for k, v in METRICS.items() if k != "line"}
    assert metrics == dict(checkpoint="best.pt", epoch=9, it=1200, **expected)
    found = json.loads((tmp_path / "detections.json").read_text())
    assert found == [dict(r, checkpoint="best.pt", epoch=9) for r in detections]
    assert "checkpoint" not in detections[0]  # the caller's are not changed
    with Image.open(tmp_path / "samples.jpg") as image:
        assert image.info["comment"] == b"best.pt, epoch 9, step 1200"
    assert names_in(tmp_path) == ["detections.json", "images", "results.json", "samples.jpg"]


def test_detections_load_in_pycocotools(tmp_path):
    from pycocotools.coco import COCO
    data = dataset_of(tmp_path / "images", [(100, 80)] * 2)
    write_results(tmp_path, METRICS, [result(1), result(2)], data, "last.pt", 1, 5)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dict(images=[dict(id=1), dict(id=2)], categories=[dict(id=3)],
                             annotations=[])
        truth.createIndex()
        loaded = truth.loadRes(str(tmp_path / "detections.json"))
    assert len(loaded.getAnnIds(imgIds=[1])) == 1 and len(loaded.anns) == 2


def test_many_detections_are_written_in_parts_that_make_one_list(tmp_path):
    data = dataset_of(tmp_path / "images", [(100, 80)])
    detections = [result(1, score=k / 100000) for k in range(20001)]
    detections[10000:20000] = [result(1, category_id=None)] * 10000  # a part without any
    write_results(tmp_path, METRICS, detections, data, "last.pt", 1, 5)
    found = json.loads((tmp_path / "detections.json").read_text())
    assert [r["score"] for r in found] == [*(k / 100000 for k in range(10000)), 0.2]


def test_results_without_detections_or_of_a_foreign_file(tmp_path):
    write_results(tmp_path / ".", METRICS, None, None, "runs/theirs.pth", None, None)
    assert names_in(tmp_path) == ["results.json"]
    metrics = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(metrics.items())[:3] == [("checkpoint", "runs/theirs.pth"), ("epoch", None),
                                         ("it", None)]
    data = dataset_of(tmp_path / "images", [(100, 80)])
    write_results(str(tmp_path), METRICS, [], data, Path("theirs.pth"), None, None)
    assert json.loads((tmp_path / "detections.json").read_text()) == []
    with Image.open(tmp_path / "samples.jpg") as image:
        assert image.info["comment"] == b"theirs.pth"


def test_results_hold_what_json_can_hold_only(tmp_path):
    odd = dict(AP=np.float32(0.5), epoch=77, nan=float("nan"), inf=float("inf"), absent=None,
               tensor=torch.zeros(2), rows=[1, 2], each=dict(a=1.0, b=float("nan"), c=object()))
    write_results(tmp_path, odd, None, None, "best.pt", 1, 2)
    metrics = json.loads((tmp_path / "results.json").read_text())
    assert metrics == dict(checkpoint="best.pt", epoch=1, it=2, AP=0.5, absent=None, rows=[1, 2],
                           each=dict(a=1.0))


def test_a_full_disk_leaves_the_earlier_results(tmp_path, monkeypatch):
    data = dataset_of(tmp_path / "images", [(100, 80)])
    write_results(tmp_path, METRICS, [result(1)], data, "best.pt", 1, 5)
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)
              if name != "images"}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for action in (lambda: write_results(tmp_path, METRICS, [], data, "best.pt", 2, 9),
                   lambda: save_samples(data, [], tmp_path / "samples.jpg")):
        assert "No space left" in error_of(action)
    assert names_in(tmp_path) == sorted([*before, "images"])
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


# ------------------------------------------------------------------ --predict

BOXES = torch.tensor([[5.04, 5.06, 30, 30], [10, 10, 50, 35], [1, 1, 2, 2]])
SCORES = torch.tensor([0.91234, 0.5, 0.3])
LABELS = torch.tensor([1, 0, 0])


def predict(names, out, score=0.3, **options):
    """What a script does; the paths in their order."""
    seen = []
    for picture in Pictures([str(n) for n in names], str(out), score):
        seen.append(picture.path)
        picture.save(BOXES, SCORES, LABELS, ["cat", "süß"], **options)
    return seen


def answer_in(out):
    return json.loads((out / "predictions.json").read_text(encoding="utf-8"))


def test_boxes_above_the_score_are_noted_and_drawn(tmp_path, capsys):
    path, out = photo(tmp_path / "a b.png"), tmp_path / "new" / "out"
    predict([path], out)
    assert answer_in(out) == {str(path): [
        dict(box=[5.0, 5.1, 30.0, 30.0], score=0.9123, label="süß"),
        dict(box=[10.0, 10.0, 50.0, 35.0], score=0.5, label="cat")]}
    assert "süß" in (out / "predictions.json").read_text(encoding="utf-8")
    assert names_in(out) == ["0000_a_b_boxes.jpg", "predictions.json"]
    drawn = pixels(out / "0000_a_b_boxes.jpg")
    assert drawn.shape == (40, 60, 3) and colourful(drawn) > 20
    assert capsys.readouterr().out == f"2 boxes in 1 images -> {out}\n"


def test_masks_and_extras_of_a_box_are_noted_beside_it(tmp_path):
    masks = [dict(size=[40, 60], counts=f"x{k}") for k in range(3)]
    path = photo(tmp_path / "a.png")
    predict([path], tmp_path / "out", 0.6, masks=masks, extra=[dict(group="novel")] * 3)
    entry, = answer_in(tmp_path / "out")[str(path)]
    assert entry["mask"] == masks[0] and entry["group"] == "novel"


def test_an_image_without_boxes_is_answered_with_none(tmp_path, capsys):
    path = photo(tmp_path / "a.png")
    predict([path], tmp_path / "out", 0.95)
    assert answer_in(tmp_path / "out") == {str(path): []}
    assert (abs(pixels(tmp_path / "out/0000_a_boxes.jpg") - [90, 120, 150]) < 8).all()
    assert "0 boxes in 1 images" in capsys.readouterr().out


def test_a_picture_is_the_images_pixels_with_its_number_and_name(tmp_path):
    photo(tmp_path / "in/a.png", (10, 20, 30))
    photo(tmp_path / "in/b.png", (40, 50, 60), (7, 9))
    a, b = list(Pictures([tmp_path / "in"], tmp_path / "out", 0.3))
    assert (a.number, b.number) == (0, 1) and (a.stem, b.stem) == ("a", "b")
    assert b.path == tmp_path / "in/b.png"
    assert a.pixels.dtype == torch.uint8 and a.pixels.shape == (3, 40, 60)
    assert b.pixels.shape == (3, 9, 7) and b.pixels[:, 0, 0].tolist() == [40, 50, 60]


def test_exif_turned_photographs_are_predicted_and_drawn_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was held upright
    path = photo(tmp_path / "a.jpg", size=(60, 40), exif=exif.tobytes())
    picture, = Pictures([path], tmp_path / "out", 0.3)
    assert picture.pixels.shape == (3, 60, 40)
    predict([path], tmp_path / "out")
    assert pixels(tmp_path / "out/0000_a_boxes.jpg").shape == (60, 40, 3)


def test_folders_are_walked_in_sorted_order_without_hidden_files(tmp_path):
    top = tmp_path / "in"
    wanted = ["a/z.JPG", "a/deep/er/x.Jpeg", "b.png", "c.bmp", "d.webp", "e.tif", "f.TIFF"]
    for name in wanted:
        suffix = Path(name).suffix.lower()
        kind = {".jpg": "jpeg", ".tif": "tiff"}.get(suffix, suffix[1:])
        photo(top / name, format=kind)
    for name in ("._b.png", ".hidden.png", ".cache/x.png", "__MACOSX/x.png", "a/__MACOSX/q/x.png"):
        photo(top / name)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt"):
        (top / name).write_bytes(b"x")
    (top / "folder.png").mkdir()
    assert predict([top], tmp_path / "out") == sorted(top / name for name in wanted)


def test_a_hidden_folder_that_is_named_is_read(tmp_path, monkeypatch):
    path = photo(tmp_path / ".hidden/a.png")
    assert predict([path.parent], tmp_path / "out") == [path]
    monkeypatch.chdir(path.parent)
    assert predict(["."], tmp_path / "out") == [Path("a.png")]


def test_a_named_file_is_taken_whatever_its_suffix(tmp_path):
    paths = [photo(tmp_path / name, format="png") for name in ("b.dat", ".a", "image")]
    assert predict(paths, tmp_path / "out") == paths


def test_the_same_file_given_twice_is_read_once(tmp_path, monkeypatch):
    path, other = photo(tmp_path / "in/a.png"), photo(tmp_path / "in/b.png")
    monkeypatch.chdir(tmp_path)
    names = [path, "in/a.png", "./in/../in/a.png", "in"]
    assert predict(names, tmp_path / "out") == [path, Path("in/b.png")]
    assert other.exists() and len(answer_in(tmp_path / "out")) == 2


def test_a_link_that_leads_back_is_followed_once(tmp_path):
    path = photo(tmp_path / "in/a.png")
    (tmp_path / "in/back").symlink_to(tmp_path / "in")
    elsewhere = photo(tmp_path / "elsewhere/b.png")
    (tmp_path / "in/there").symlink_to(elsewhere.parent)
    assert predict([tmp_path / "in"], tmp_path / "out") == [path, tmp_path / "in/there/b.png"]


def test_a_missing_path_is_named_before_anything_is_done(tmp_path):
    path = photo(tmp_path / "a.png")
    text = error_of(lambda: predict([path, tmp_path / "no.png"], tmp_path / "out"))
    assert text == f"--predict {tmp_path / 'no.png'}: no such file or folder"
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_is_said(tmp_path):
    (tmp_path / "in").mkdir()
    text = error_of(lambda: predict([tmp_path / "in", tmp_path / "in"], tmp_path / "out"))
    assert text == f"--predict {tmp_path / 'in'} {tmp_path / 'in'}: no image there"


def test_files_that_cannot_be_read_are_left_out_with_a_line(tmp_path, capsys):
    good = photo(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "c.png").write_bytes(good.read_bytes()[:60])
    out = tmp_path / "out"
    assert predict([tmp_path], out) == [good]
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
    assert len(lines) == 2
    assert str(tmp_path / "a.png") in lines[0] and str(tmp_path / "c.png") in lines[1]
    assert names_in(out) == ["0001_b_boxes.jpg", "predictions.json"]


def test_no_readable_image_is_one_line_and_nothing_is_written_or_removed(tmp_path):
    out, paths = tmp_path / "out", [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(b"no image")
    text = error_of(lambda: predict(paths, out))
    assert text == f"--predict {paths[0]} {paths[1]}: no image can be read"
    assert not out.exists()
    predict([photo(tmp_path / "good.png")], out)
    before = names_in(out)
    error_of(lambda: predict(paths, out))
    assert names_in(out) == before


@pytest.mark.parametrize("stem, written", [
    ("a:b*c?d", "a_b_c_d"), ("x" * 200, "x" * 55), ("größe-1.v2", "größe-1.v2"),
    ("写" * 70, None)])
def test_pictures_have_names_that_every_disk_takes(tmp_path, stem, written):
    path = photo(tmp_path / f"{stem}.png")
    predict([path], tmp_path / "out")
    name, = [n for n in names_in(tmp_path / "out") if n != "predictions.json"]
    assert len(name) <= 100 and len(name.encode()) < 230
    if written:
        assert name == f"0000_{written}_boxes.jpg"
    assert list(answer_in(tmp_path / "out")) == [str(path)]


def test_a_file_name_that_is_no_utf8_is_predicted(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    try:
        photo(Path(name))
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    predict([tmp_path], tmp_path / "out")
    assert list(answer_in(tmp_path / "out")) == [f"{tmp_path}/caf\\udce9.png"]
    assert "0000_caf__boxes.jpg" in names_in(tmp_path / "out")


def test_further_pictures_are_written_beside_the_boxes(tmp_path):
    out = tmp_path / "out"
    for picture in Pictures([photo(tmp_path / "a.png")], out, 0.3):
        picture.write("heat_red panda", torch.full((3, 40, 60), 300.0))
        picture.write("heat_red_panda", np.full((40, 60, 3), 50, np.uint8))
        picture.write("heat_" + "long name " * 20, np.zeros((40, 60, 3)))
        picture.save(BOXES, SCORES, LABELS, ["cat", "dog"])
    first, second = out / "0000_a_heat_red_panda.jpg", out / "0000_a_heat_red_panda_1.jpg"
    assert (pixels(first) > 250).all() and (abs(pixels(second) - 50) < 5).all()
    assert len(names_in(out)) == 5 and max(map(len, names_in(out))) <= 100
    predict([tmp_path / "a.png"], out)
    assert names_in(out) == ["0000_a_boxes.jpg", "predictions.json"]


# ------------------------------------------------------------------ two runs, one folder

def test_a_second_run_removes_the_files_of_the_first_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    predict([photo(tmp_path / "a.png"), photo(tmp_path / "b.png")], out)
    theirs = ["notes.txt", "photo.jpg", "a_boxes.jpg", "0000_a_boxes.png", ".0000_a_boxes.jpg"]
    for name in theirs:
        (out / name).write_text("mine")
    (out / "0000_sub_boxes.jpg.d").mkdir()
    predict([photo(tmp_path / "c.png")], out)
    expected = ["0000_c_boxes.jpg", "predictions.json", "0000_sub_boxes.jpg.d", *theirs]
    assert names_in(out) == sorted(expected)
    assert list(answer_in(out)) == [str(tmp_path / "c.png")]


def test_a_folder_with_other_files_is_taken(tmp_path):
    out = tmp_path / "out"
    photo(out / "photo.jpg")
    (out / "results.json").write_text("{}")
    predict([photo(tmp_path / "a.png")], out)
    assert names_in(out) == ["0000_a_boxes.jpg", "photo.jpg", "predictions.json", "results.json"]


@pytest.mark.parametrize("name, content", [
    ("0000_a_boxes.jpg", "mine"), ("predictions.json", "[]"), ("predictions.json", '{"a": [1]}'),
    ("predictions.json", '{"images": 3}'), ("predictions.json", "not json")])
def test_files_of_our_names_that_are_not_ours_are_not_overwritten(tmp_path, name, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    text = error_of(lambda: predict([photo(tmp_path / "a.png")], out))
    assert f"--out {out}: holds {name}" in text
    assert names_in(out) == [name] and (out / name).read_text() == content


def test_an_interrupted_run_claims_nothing_and_the_next_one_cleans_up(tmp_path):
    out = tmp_path / "out"
    paths = [photo(tmp_path / f"{name}.png") for name in "abc"]
    predict(paths[2:], out)
    for picture in Pictures(paths, out, 0.3):
        picture.save(BOXES, SCORES, LABELS, ["cat", "dog"])
        if picture.number == 1:
            break
    assert "predictions.json" not in names_in(out) and "0000_c_boxes.jpg" not in names_in(out)
    assert {"0000_a_boxes.jpg", "0001_b_boxes.jpg"} <= set(names_in(out))
    predict(paths[2:], out)
    assert names_in(out) == ["0000_c_boxes.jpg", "predictions.json"]


def test_pictures_of_an_earlier_run_are_no_input_when_out_lies_in_the_folder(tmp_path):
    path = photo(tmp_path / "in/a.png")
    for out in (tmp_path / "in/out", tmp_path / "in"):
        for _ in range(2):
            assert predict([path.parent], out) == [path]
        for picture in out.glob("*_boxes.jpg"):
            picture.unlink()


def test_a_picture_that_the_run_would_remove_is_refused_as_input(tmp_path):
    out = tmp_path / "out"
    predict([photo(tmp_path / "a.png")], out)
    before = names_in(out)
    text = error_of(lambda: predict([out / "0000_a_boxes.jpg"], out))
    assert str(out / "0000_a_boxes.jpg") in text and f"--out {out}" in text
    assert names_in(out) == before
