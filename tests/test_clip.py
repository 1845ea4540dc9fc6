"""common/clip.py: crops against PIL and against the per-crop loop, text embeddings, weights that cannot be had, the tiny CLIP."""
import math
import time

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import clip as C
from common.clip import ClipError, FrozenCLIP, crop_and_resize, crop_windows, letterbox, load_clip, taps, tiny_clip
from common.shapes import make_shapes


def randn_images(count=2, height=150, width=210, seed=0):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random_boxes(n, height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = torch.rand(n, 4, generator=g) * torch.tensor([width, height, width, height])
    boxes = torch.cat([torch.minimum(r[:, :2], r[:, 2:]), torch.maximum(r[:, :2], r[:, 2:])], 1)
    return boxes, torch.arange(n) % 2


# ------------------------------------------------------------------ geometry, by hand

@pytest.mark.parametrize("box, enlarge, window", [
    ((10, 20, 30, 60), 1.5, (5, 10, 36, 71)), ((11, 20, 30, 60), 1.5, (6, 10, 36, 71)),  # the centre is a whole number
    ((10.9, 20.9, 30.9, 60.9), 1.0, (10, 20, 31, 61)),                                   # corners are cut, the last pixel counts
    ((-7.5, -3, 5, 4), 1.0, (0, 0, 6, 5)), ((190, 140, 500, 500), 1.0, (190, 140, 200, 150)),  # beyond the border
    ((50, 50, 50, 50), 1.0, (50, 50, 51, 51)), ((500, 500, 600, 600), 1.0, (199, 149, 200, 150)),  # one pixel; all outside
    ((math.nan, 3, 5, math.inf), 1.0, (0, 3, 6, 150)), ((30, 40, 10, 20), 1.0, (30, 40, 31, 41))])  # never an empty crop
def test_crop_windows_by_hand(box, enlarge, window):
    assert tuple(crop_windows(torch.tensor([box]), 150, 200, enlarge)[0].tolist()) == window


@pytest.mark.parametrize("sides, out, pad", [((256, 64), (224, 56), (0, 84)), ((31, 61), (113, 224), (56, 0)), ((55, 55), (223, 223), (1, 1)),
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
    boxes = torch.cat([boxes, torch.tensor([[0, 0, 209, 149.0], [5, 5, 5, 5], [0, 3, 209, 3], [207, 0, 209, 149]])])
    owner = torch.cat([owner, torch.zeros(4).long()])
    torch.testing.assert_close(crop_and_resize(images, boxes, owner, size, antialias=False), loop_of_the_released_code(images, boxes, owner, size),
                               atol=1e-4, rtol=0)


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
    image = np.clip(128 + 50 * np.sin(np.arange(300)[:, None, None] / 9 + np.arange(400)[None, :, None] / 14 + np.arange(3))
                    + rng.normal(0, 20, (300, 400, 3)), 0, 255).astype(np.uint8)
    boxes, _ = random_boxes(30, 300, 400)
    ours = crop_and_resize(torch.from_numpy(image).permute(2, 0, 1)[None].float(), boxes, torch.zeros(30).long(), size).clamp(0, 255)
    for box, crop in zip(crop_windows(boxes, 300, 400).tolist(), ours):
        gap = (crop.permute(1, 2, 0) - torch.from_numpy(pil_crop(image, tuple(box), size).copy()).float()).abs()
        assert gap.max() < 2 and gap.mean() < 0.6  # PIL rounds to whole grey levels, after the rows and after the columns


def test_no_pixel_outside_the_crop_is_mixed_in_and_padding_is_zero():
    images = randn_images()
    box, owner = torch.tensor([[40.0, 30, 99, 69]]), torch.tensor([1])  # 60 x 40 pixels
    for antialias in (True, False):
        crop = crop_and_resize(images, box, owner, 48, antialias=antialias)
        other = images.clone() + 100
        other[1, :, 30:70, 40:100] = images[1, :, 30:70, 40:100]
        torch.testing.assert_close(crop_and_resize(other, box, owner, 48, antialias=antialias), crop)
        assert crop[:, :, :8].abs().max() == 0 and crop[:, :, 40:].abs().max() == 0 and crop[:, :, 8:40].abs().min() > 0


def test_weights_of_a_pixel_sum_to_one_inside_and_to_zero_in_the_padding():
    for antialias in (True, False):
        index, w = taps(torch.tensor([10, 300]), torch.tensor([40, 40]), torch.tensor([4, 4]), 48, 300, antialias)
        torch.testing.assert_close(w.sum(2)[:, 4:44], torch.ones(2, 40))
        assert w[:, :4].abs().max() == 0 and w[:, 44:].abs().max() == 0 and w.isfinite().all()
        assert index.min() == 0 and index[0].max() == 9 and index[1].max() == 299


def test_no_boxes_give_no_crops_and_no_embeddings():
    assert crop_and_resize(randn_images(), torch.zeros(0, 4), torch.zeros(0).long(), 32).shape == (0, 3, 32, 32)
    assert random_clip().encode_crops(randn_images(), torch.zeros(0, 4), torch.zeros(0).long()).shape == (0, 64)


def test_batched_crops_are_faster_than_pil():
    """64 boxes as COCO has them, to 224 x 224."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 800, 1056, 3), dtype=np.uint8)
    side = np.exp(rng.normal(4.4, 0.7, (64, 2))).clip(16, 700)
    corner = rng.uniform(0, 1, (64, 2)) * (np.array([1056, 800]) - side).clip(1)
    boxes, owner = torch.from_numpy(np.concatenate([corner, corner + side], 1)).float(), torch.arange(64) % 2
    images = torch.from_numpy(image).permute(0, 3, 1, 2).float()
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1), torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)

    def by_pil():
        windows = crop_windows(boxes, 800, 1056).tolist()
        pixels = images.to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return torch.stack([(torch.from_numpy(pil_crop(pixels[b], tuple(w), 224)).permute(2, 0, 1).float() / 255 - mean) / std
                            for w, b in zip(windows, owner.tolist())])

    def seconds(f):
        since = time.perf_counter()
        f()
        return time.perf_counter() - since

    times = [(seconds(lambda: crop_and_resize(images, boxes, owner, 224)), seconds(by_pil)) for _ in range(4)][1:]
    ours, pil = (min(t) for t in zip(*times))
    print(f"batched {1e3 * ours / 64:.2f} ms, PIL {1e3 * pil / 64:.2f} ms a crop")
    assert ours < pil


# ------------------------------------------------------------------ the frozen model

def random_clip(seed=0):
    torch.manual_seed(seed)
    return FrozenCLIP(C.tiny_model(**C.TINY), open_clip.SimpleTokenizer(), "random")


def test_model_is_frozen_in_eval_and_no_module():
    clip = random_clip()
    assert not isinstance(clip, torch.nn.Module) and not clip.model.training
    assert not any(p.requires_grad for p in clip.model.parameters()) and (clip.size, clip.dim) == (48, 64)
    crops = clip.encode_crops(randn_images().requires_grad_(), *random_boxes(5, 150, 210))
    assert not crops.requires_grad and crops.norm(dim=1).tolist() == pytest.approx([1] * 5, abs=1e-5)


def test_normalisation_is_that_of_clip():
    clip = random_clip()
    x = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    want = (x.double() / 255 - torch.tensor(open_clip.OPENAI_DATASET_MEAN).double().view(3, 1, 1)) / torch.tensor(open_clip.OPENAI_DATASET_STD).double().view(3, 1, 1)
    torch.testing.assert_close(clip.normalise(x).double(), want, atol=1e-5, rtol=0)


def test_chunks_do_not_change_embeddings():
    clip, (boxes, owner) = random_clip(), random_boxes(11, 150, 210)
    torch.testing.assert_close(clip.encode_crops(randn_images(), boxes, owner, chunk=4), clip.encode_crops(randn_images(), boxes, owner), atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.encode_text(["a", "b c", "d"], chunk=2), clip.encode_text(["a", "b c", "d"]), atol=1e-5, rtol=0)


def test_class_embeddings_are_unit_rows_averaged_over_templates_and_cached_by_model_names_and_templates(tmp_path):
    clip = random_clip()
    names, two = ["cat", "hot_dog"], ("a photo of a {}.", "{}")
    text = clip.class_embeddings(names, two, tmp_path)
    rows = clip.encode_text(["a photo of a cat.", "cat", "a photo of a hot dog.", "hot dog"])
    torch.testing.assert_close(text, F.normalize(torch.stack([rows[:2].mean(0), rows[2:].mean(0)]), dim=1))
    assert len(list(tmp_path.iterdir())) == 1
    clip.encode_text = lambda *_: 1 / 0  # the second time nothing is encoded
    assert torch.equal(clip.class_embeddings(names, two, tmp_path), text)
    for other, args in ((clip, (["hot_dog", "cat"], two)), (clip, (names, two[:1])), (random_clip(1), (names, two))):
        with pytest.raises(ZeroDivisionError):
            other.encode_text = clip.encode_text
            other.class_embeddings(*args, tmp_path)


@pytest.mark.parametrize("names, word", [([], "is empty"), (["cat", " "], "empty name"), (["cat", "dog", "cat"], "cat occurs twice"),
                                         (["hot dog", "hot_dog"], "hot dog occurs twice")])
def test_wrong_class_lists_are_one_line(names, word):
    with pytest.raises(ClipError, match=word) as e:
        random_clip().class_embeddings(names)
    assert "\n" not in str(e.value)


def test_a_sentence_beyond_the_context_is_cut_not_refused():
    clip = random_clip()
    long = "a red star " * 100
    torch.testing.assert_close(clip.encode_text([long]), clip.encode_text([long + "and a circle"]))


@pytest.mark.parametrize("spec, word", [("ViT-B-32-quickgelu", "expected MODEL/WEIGHTS"), ("NoNet/openai", "expected MODEL/WEIGHTS"),
                                        ("ViT-B-32/openai", "QuickGELU"), ("ViT-B-32-quickgelu/nothing-there.pt", "cannot be loaded")])
def test_wrong_clip_names_are_one_line(spec, word):
    with pytest.raises(ClipError, match=word) as e:
        load_clip(spec)
    assert "\n" not in str(e.value)


def test_weights_that_cannot_be_downloaded_are_one_line_with_the_remedy(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")
    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(ClipError, match="Offline.*ViT-B-32-quickgelu/PATH") as e:
        load_clip()
    assert "\n" not in str(e.value)


def test_a_file_that_is_no_tiny_clip_is_one_line(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"no")
    with pytest.raises(ClipError, match="x.pt: not a tiny CLIP"):
        load_clip(str(tmp_path / "x.pt"))


# ------------------------------------------------------------------ the tiny CLIP

def test_contrastive_loss_by_hand():
    eye = torch.eye(8)
    assert C.contrastive(torch.ones(8, 1), torch.ones(8, 1), eye, 1.0).item() == pytest.approx(math.log(8), abs=1e-5)
    assert C.contrastive(eye, eye, eye, 10.0).item() == pytest.approx(math.log(1 + 7 * math.exp(-10)), abs=1e-6)
    same = torch.ones(2, 2)  # two pairs that mean the same: no loss for confusing them, beside the entropy of the target
    assert C.contrastive(torch.ones(2, 1), torch.ones(2, 1), same, 5.0).item() == pytest.approx(math.log(2), abs=1e-6)


def test_tiny_clip_is_reproducible_cached_and_leaves_the_random_stream_alone(tmp_path, capsys):
    root = make_shapes(tmp_path, train=24, val=12)
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    a = tiny_clip(root, tmp_path / "a", steps=2, objects=6, scenes=2)
    assert torch.equal(torch.rand(2), want)
    b = tiny_clip(root, tmp_path / "b", steps=2, objects=6, scenes=2)
    x, y = (torch.load(p, weights_only=True) for p in (a, b))
    assert all(torch.equal(x["model"][k], y["model"][k]) for k in x["model"])
    assert capsys.readouterr().out.count("zero-shot accuracy") == 2
    assert tiny_clip(root, tmp_path / "a", steps=2, objects=6, scenes=2) == a and not capsys.readouterr().out
    assert tiny_clip(root, tmp_path / "a", seed=1, steps=2, objects=6, scenes=2) != a
    clip = load_clip(a)
    assert clip.class_embeddings(["red star", "circle"]).shape == (2, 64)
