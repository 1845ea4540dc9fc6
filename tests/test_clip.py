# SPDX-License-Identifier: MIT
"""common/clip.py: crops against PIL and a loop over crops, text embeddings, weights that cannot be had."""
import json
import math
import time

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.clip import FrozenCLIP, clip_of, crop_and_resize, crop_windows, letterbox, load_clip, pixels_of, taps
from common.run import UserError
from common.tiny import TINY, tiny_model


def randn_images(count=2, height=150, width=210, seed=0):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random_boxes(n, height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = torch.rand(n, 4, generator=g) * torch.tensor([width, height, width, height])
    boxes = torch.cat([torch.minimum(r[:, :2], r[:, 2:]), torch.maximum(r[:, :2], r[:, 2:])], 1)
    return boxes, torch.arange(n) % 2


# ------------------------------------------------------------------ geometry, by hand

@pytest.mark.parametrize("box, enlarge, window", [
    # the centre is a whole number
    ((10, 20, 30, 60), 1.5, (5, 10, 36, 71)), ((11, 20, 30, 60), 1.5, (6, 10, 36, 71)),
    # corners are cut, the last pixel counts
    ((10.9, 20.9, 30.9, 60.9), 1.0, (10, 20, 31, 61)),
    # beyond the border
    ((-7.5, -3, 5, 4), 1.0, (0, 0, 6, 5)), ((190, 140, 500, 500), 1.0, (190, 140, 200, 150)),
    # one pixel; all outside
    ((50, 50, 50, 50), 1.0, (50, 50, 51, 51)), ((500, 500, 600, 600), 1.0, (199, 149, 200, 150)),
    # never an empty crop
    ((math.nan, 3, 5, math.inf), 1.0, (0, 3, 6, 150)), ((30, 40, 10, 20), 1.0, (30, 40, 31, 41))])
def test_crop_windows_by_hand(box, enlarge, window):
    assert tuple(crop_windows(torch.tensor([box]), 150, 200, enlarge)[0].tolist()) == window


@pytest.mark.parametrize("sides, out, pad", [
    ((256, 64), (224, 56), (0, 84)), ((31, 61), (113, 224), (56, 0)), ((55, 55), (223, 223), (1, 1)),
    ((1, 1), (224, 224), (0, 0)), ((1, 1000), (1, 224), (112, 0))])
def test_letterbox_by_hand(sides, out, pad):
    o, p = letterbox(torch.tensor([[3, 5, 3 + sides[0], 5 + sides[1]]]), 224)
    assert tuple(o[0].tolist()) == out and tuple(p[0].tolist()) == pad


def test_letterbox_cuts_117_of_the_first_1400_lengths_one_pixel_short():
    n = torch.arange(1, 1401)
    out, _ = letterbox(torch.stack([n * 0, n * 0, n, n], 1), 224)
    short = n[out[:, 0] == 223].tolist()
    assert len(short) == 117 and short[:6] == [55, 71, 83, 95, 97, 107]
    assert set(out[:, 0].tolist()) == {223, 224}


# ------------------------------------------------------------------ pixels

def loop_of_the_released_code(images, boxes, owner, size):
    """One crop after the other through F.interpolate: what resize_weights(antialias=False) has to give."""
    result = []
    for (x1, y1, x2, y2), b in zip(crop_windows(boxes, *images.shape[2:]).tolist(), owner.tolist()):
        crop = images[b:b + 1, :, y1:y2, x1:x2]
        h, w = crop.shape[2:]
        scale = min(size / h, size / w)
        nh, nw = max(1, int(h * scale)), max(1, int(w * scale))
        crop = F.interpolate(crop, (nh, nw), mode="bicubic", align_corners=False)
        left, top = (size - nw + 1) // 2, (size - nh + 1) // 2
        result.append(F.pad(crop, (left, size - nw - left, top, size - nh - top))[0])
    return torch.stack(result)


@pytest.mark.parametrize("size", [224, 32])
def test_without_antialias_equals_the_loop_over_crops(size):
    images = randn_images()
    boxes, owner = random_boxes(40, 150, 210)
    thin = torch.tensor([[0, 0, 209, 149.0], [5, 5, 5, 5], [0, 3, 209, 3], [207, 0, 209, 149]])
    boxes, owner = torch.cat([boxes, thin]), torch.cat([owner, torch.zeros(4).long()])
    ours = crop_and_resize(images, boxes, owner, size, antialias=False)
    loop = loop_of_the_released_code(images, boxes, owner, size)
    torch.testing.assert_close(ours, loop, atol=1e-4, rtol=0)


def pil_crop(image, window, size):
    """One uint8 crop by PIL: cut out, bicubic, pasted onto black."""
    crop = Image.fromarray(image).crop(window)
    (out, pad) = (v[0].tolist() for v in letterbox(torch.tensor([window]), size))
    square = Image.new("RGB", (size, size))
    square.paste(crop.resize(out, Image.BICUBIC), tuple(pad))
    return np.asarray(square)


@pytest.mark.parametrize("size", [224, 64])
def test_with_antialias_equals_pil_within_a_grey_level(size):
    rng = np.random.default_rng(0)
    phase = np.arange(300)[:, None, None] / 9 + np.arange(400)[None, :, None] / 14 + np.arange(3)
    noise = rng.normal(0, 20, (300, 400, 3))
    image = np.clip(128 + 50 * np.sin(phase) + noise, 0, 255).astype(np.uint8)
    boxes, _ = random_boxes(30, 300, 400)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    ours = crop_and_resize(pixels, boxes, torch.zeros(30).long(), size).clamp(0, 255)
    for box, crop in zip(crop_windows(boxes, 300, 400).tolist(), ours):
        theirs = torch.from_numpy(pil_crop(image, tuple(box), size).copy()).float()
        gap = (crop.permute(1, 2, 0) - theirs).abs()
        # PIL rounds to whole grey levels, after the rows and after the columns
        assert gap.max() < 2 and gap.mean() < 0.6


def test_no_pixel_outside_the_crop_is_mixed_in_and_padding_is_zero():
    images = randn_images()
    box, owner = torch.tensor([[40.0, 30, 99, 69]]), torch.tensor([1])  # 60 x 40 pixels
    for antialias in (True, False):
        crop = crop_and_resize(images, box, owner, 48, antialias=antialias)
        other = images.clone() + 100
        other[1, :, 30:70, 40:100] = images[1, :, 30:70, 40:100]
        torch.testing.assert_close(crop_and_resize(other, box, owner, 48, antialias=antialias), crop)
        above, inside, below = crop.split((8, 32, 8), 2)
        assert above.abs().max() == 0 and below.abs().max() == 0 and inside.abs().min() > 0


def test_weights_of_a_pixel_sum_to_one_inside_and_to_zero_in_the_padding():
    for antialias in (True, False):
        length, out, pad = torch.tensor([[10, 300], [40, 40], [4, 4]])
        index, w = taps(length, out, pad, 48, 300, antialias)
        torch.testing.assert_close(w.sum(2)[:, 4:44], torch.ones(2, 40))
        assert w[:, :4].abs().max() == 0 and w[:, 44:].abs().max() == 0 and w.isfinite().all()
        assert index.min() == 0 and index[0].max() == 9 and index[1].max() == 299


def test_no_boxes_give_no_crops_and_no_embeddings():
    images, boxes, owner = randn_images(), torch.zeros(0, 4), torch.zeros(0).long()
    assert crop_and_resize(images, boxes, owner, 32).shape == (0, 3, 32, 32)
    assert random_clip().encode_crops(images, boxes, owner).shape == (0, 64)


def test_batched_crops_are_faster_than_pil():
    """64 boxes as COCO has them, to 224 x 224."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 800, 1056, 3), dtype=np.uint8)
    side = np.exp(rng.normal(4.4, 0.7, (64, 2))).clip(16, 700)
    corner = rng.uniform(0, 1, (64, 2)) * (np.array([1056, 800]) - side).clip(1)
    boxes, owner = torch.from_numpy(np.concatenate([corner, corner + side], 1)).float(), torch.arange(64) % 2
    images = torch.from_numpy(image).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(v).view(3, 1, 1)
                 for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

    def by_pil():
        windows = crop_windows(boxes, 800, 1056).tolist()
        pixels = images.to(torch.uint8).permute(0, 2, 3, 1).numpy()
        crops = [torch.from_numpy(pil_crop(pixels[b], tuple(w), 224)).permute(2, 0, 1)
                 for w, b in zip(windows, owner.tolist())]
        return torch.stack([(crop.float() / 255 - mean) / std for crop in crops])

    def seconds(f):
        since = time.perf_counter()
        f()
        return time.perf_counter() - since

    by_us = lambda: crop_and_resize(images, boxes, owner, 224)
    times = [(seconds(by_us), seconds(by_pil)) for _ in range(8)][1:]
    ours, pil = (min(t) for t in zip(*times))
    print(f"batched {1e3 * ours / 64:.2f} ms, PIL {1e3 * pil / 64:.2f} ms a crop")
    assert ours < pil


# ------------------------------------------------------------------ the frozen model

def random_clip(seed=0):
    torch.manual_seed(seed)
    return FrozenCLIP(tiny_model(**TINY), open_clip.tokenize, "random")


def test_model_is_frozen_in_eval_and_no_module():
    clip = random_clip()
    assert not isinstance(clip, torch.nn.Module) and not clip.model.training
    assert not any(p.requires_grad for p in clip.model.parameters()) and (clip.size, clip.dim) == (48, 64)
    crops = clip.encode_crops(randn_images().requires_grad_(), *random_boxes(5, 150, 210))
    assert not crops.requires_grad and crops.norm(dim=1).tolist() == pytest.approx([1] * 5, abs=1e-5)


def test_normalisation_is_that_of_clip():
    clip = random_clip()
    x = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(v).double().view(3, 1, 1)
                 for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    want = (x.double() / 255 - mean) / std
    torch.testing.assert_close(clip.normalise(x).double(), want, atol=1e-5, rtol=0)


def test_chunks_do_not_change_embeddings():
    clip, (boxes, owner) = random_clip(), random_boxes(11, 150, 210)
    parts = clip.encode_crops(randn_images(), boxes, owner, chunk=4)
    torch.testing.assert_close(parts, clip.encode_crops(randn_images(), boxes, owner), atol=1e-5, rtol=0)
    parts = clip.encode_text(["a", "b c", "d"], chunk=2)
    torch.testing.assert_close(parts, clip.encode_text(["a", "b c", "d"]), atol=1e-5, rtol=0)


def test_class_embeddings_are_unit_rows_averaged_over_templates_and_cached_by_model_names_and_templates(
        tmp_path):
    clip = random_clip()
    names, two = ["cat", "hot_dog"], ("a photo of a {}.", "{}")
    text = clip.class_embeddings(names, two, tmp_path)
    rows = clip.encode_text(["a photo of a cat.", "cat", "a photo of a hot dog.", "hot dog"])
    mean = torch.stack([rows[:2].mean(0), rows[2:].mean(0)])
    torch.testing.assert_close(text, F.normalize(mean, dim=1))
    assert len(list(tmp_path.iterdir())) == 1
    clip.model.encode_text = lambda *_, **k: 1 / 0  # the second time nothing is encoded
    assert torch.equal(clip.class_embeddings(names, two, tmp_path), text)
    for other, args in ((clip, (["hot_dog", "cat"], two)), (clip, (names, two[:1])),
                        (random_clip(1), (names, two))):
        with pytest.raises(ZeroDivisionError):
            other.model.encode_text = clip.model.encode_text
            other.class_embeddings(*args, tmp_path)


@pytest.mark.parametrize("names, word", [
    ([], "is empty"), (["cat", " "], "empty name"), (["cat", "dog", "cat"], "cat occurs twice"),
    (["hot dog", "hot_dog"], "hot dog occurs twice")])
def test_wrong_class_lists_are_one_line(names, word):
    with pytest.raises(UserError, match=word) as e:
        random_clip().class_embeddings(names)
    assert "\n" not in str(e.value)


def test_names_that_clip_reads_alike_are_refused():
    """Its tokenizer knows no capitals: two classes would share every detection."""
    with pytest.raises(UserError, match="CLIP reads 'Helmet' and 'helmet' alike"):
        random_clip().class_embeddings(["Helmet", "cat", "helmet"])


@pytest.mark.parametrize("beside, name, mean, told", [
    (dict(preprocess_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3)), "x.pt", 0.5, False),  # as Hugging Face's repositories
    (None, "ViT-B-32-datacomp_xl_s13b_b90k.pt", 0.48145466, False), (None, "mine.pt", 0.48145466, False),
    (None, "vit_l_14_laion2b_s32b_b82k.bin", 0.5, False), (None, "other.bin", 0.48145466, True)])
def test_pixels_of_a_file_are_those_it_was_trained_with(tmp_path, capsys, beside, name, mean, told):
    if beside:
        (tmp_path / "open_clip_config.json").write_text(json.dumps(beside))
    (tmp_path / name).touch()
    model = "ViT-L-14" if name.endswith(".bin") else "ViT-B-32"
    assert pixels_of(f"{model}/{tmp_path / name}").get("mean", open_clip.OPENAI_DATASET_MEAN)[0] == mean
    assert ("normalised as OpenAI's" in capsys.readouterr().err) == told


def test_a_sentence_beyond_the_context_is_cut_not_refused():
    clip = random_clip()
    long = "a red star " * 100
    torch.testing.assert_close(clip.encode_text([long]), clip.encode_text([long + "and a circle"]))


@pytest.mark.parametrize("spec, word", [
    ("ViT-B-32-quickgelu", "expected MODEL/WEIGHTS"), ("NoNet/openai", "expected MODEL/WEIGHTS"),
    ("ViT-B-32/openai", "QuickGELU; use ViT-B-32-quickgelu/openai"), ("ViT-H-14/dfn5b", "QuickGELU; use ViT-H-14-quickgelu/dfn5b"), ("ViT-B-32-quickgelu/nothing-there.pt", "cannot be loaded")])
def test_wrong_clip_names_are_one_line(spec, word):
    with pytest.raises(UserError, match=word) as e:
        load_clip(spec)
    assert "\n" not in str(e.value)


def test_weights_that_cannot_be_downloaded_are_one_line_with_the_remedy(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")
    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(UserError, match="Offline.*ViT-B-32-quickgelu/PATH") as e:
        load_clip()
    assert "\n" not in str(e.value)


def test_a_file_that_is_no_tiny_clip_is_one_line(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"no")
    with pytest.raises(UserError, match="x.pt: not a tiny CLIP"):
        load_clip(str(tmp_path / "x.pt"))


def tiny_file(path, change=lambda state: None):
    state = tiny_model(**TINY).state_dict()
    change(state)
    torch.save(dict(config=TINY, id="0", model=state), path)
    return str(path)


def test_a_tiny_clip_is_loaded_from_its_file_and_its_weights_must_be_finite(tmp_path):
    clip = load_clip(tiny_file(tmp_path / "a.pt"))
    assert (clip.name, clip.size) == ("tiny-0", 48)
    bad = tiny_file(tmp_path / "b.pt", lambda state: state["visual.1.running_mean"].fill_(math.nan))
    with pytest.raises(UserError, match="b.pt: visual.1.running_mean is not finite"):
        load_clip(bad)
    lacks = tiny_file(tmp_path / "c.pt", lambda state: state.pop("logit_scale"))
    with pytest.raises(UserError, match="c.pt: not a tiny CLIP") as e:
        load_clip(lacks)
    assert "\n" not in str(e.value)


def test_weights_of_open_clip_that_are_not_finite_are_refused(monkeypatch):
    model = tiny_model(**TINY)
    model.logit_scale.data.fill_(math.inf)
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: model)
    with pytest.raises(UserError, match="--clip ViT-B-32-quickgelu/openai: logit_scale is not finite"):
        load_clip()


def test_the_name_of_a_file_tells_its_weights_not_its_place(monkeypatch, tmp_path, capsys):
    """A file that was written anew under its path is not the one that a checkpoint was trained with."""
    model = tiny_model(**TINY)
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: model)
    names = []
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "openai.pt").touch()
        names.append(load_clip(f"ViT-B-32-quickgelu/{tmp_path}/{folder}/openai.pt").name)
    assert names[0] == names[1] and names[0].startswith("ViT-B-32-quickgelu/openai.pt ")
    arch = dict(clip=f"ViT-B-32-quickgelu/{tmp_path}/a/openai.pt", clip_name=names[0], data_seed=0)
    clip_of(arch, 64, None, "cpu")
    assert not capsys.readouterr().err
    model.logit_scale.data.add_(1)
    clip = clip_of(arch, 64, None, "cpu")
    assert f"was trained with CLIP {names[0]}, this is {clip.name}: unless" in capsys.readouterr().err


# ------------------------------------------------------------------ names, and the cache of their rows

@pytest.mark.parametrize("name", ["\ud800cat", "ca\udfff", "a\x00b", "bell\x07", "a\x7f", "c\x85t",
                                  "hot\tdog", "a\nb", "\x1b[31m"])
def test_halves_of_characters_and_control_characters_in_a_class_name_are_one_line(name):
    with pytest.raises(UserError) as e:
        random_clip().class_embeddings(["cat", name])
    text = str(e.value)
    assert text.startswith("class list: ") and repr(name) in text and "\n" not in text and text.isprintable()


def test_spaces_around_names_and_letters_of_any_script_are_fine():
    clip = random_clip()
    rows = clip.class_embeddings([" cat \n", "größe", "猫", "a  b", "🐈"])
    torch.testing.assert_close(rows[[0, 3]], clip.class_embeddings(["cat", "a b"]))


def test_a_damaged_file_in_the_cache_is_one_line_that_names_it(tmp_path):
    clip = random_clip()
    clip.class_embeddings(["cat"], cache=tmp_path)
    file, = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(UserError, match=file.name) as e:
        clip.class_embeddings(["cat"], cache=tmp_path)
    assert "\n" not in str(e.value)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not written") as e:
        random_clip().class_embeddings(["cat"], cache=tmp_path / "file")
    assert "\n" not in str(e.value)
