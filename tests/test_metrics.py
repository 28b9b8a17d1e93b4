"""Metrics against independent implementations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from helpers import images_of, tiny_tokenizer
from vistok.core.errors import ArgumentError, ConfigError
from vistok.evaluation.evaluator import Evaluator
from vistok.evaluation.pictures import comparison, save_png
from vistok.metrics.image import PSNR, SSIM, to_uint8
from vistok.metrics.seams import Seams


def pair(count=3, size=(32, 48), channels=3):
    originals = images_of(count, size, channels)
    noise = torch.randint(-30, 31, originals.shape, generator=torch.Generator().manual_seed(0))
    return originals, (originals.int() + noise).clamp(0, 255).to(torch.uint8)


def value(metric, *batches):
    for batch in batches:
        metric.update(*batch)
    return metric.compute().item()


def test_psnr_by_hand():
    black, grey = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.full((1, 3, 4, 4), 51).byte()
    assert value(PSNR(), (black, grey)) == pytest.approx(20 * math.log10(5))  # 51 = 255 / 5
    assert value(PSNR(), (black, black)) == pytest.approx(100)
    originals, reconstructions = pair()
    expected = [
        peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255)
        for a, b in zip(originals, reconstructions, strict=True)
    ]
    assert value(PSNR(), (originals, reconstructions)) == pytest.approx(np.mean(expected), abs=1e-5)


@pytest.mark.parametrize("metric", [PSNR, SSIM])
def test_the_mean_is_over_images_whatever_the_batches(metric):
    a, b = pair(5)
    whole = value(metric(), (a, b))
    parts = value(metric(), (a[:4], b[:4]), (a[4:], b[4:]), (a[:0], b[:0]))
    assert parts == pytest.approx(whole, rel=1e-6)
    assert whole != pytest.approx(value(metric(), (a[:4], b[:4])), rel=1e-4)


@pytest.mark.parametrize(("size", "channels"), [((32, 32), 3), ((24, 40), 3), ((32, 32), 1)])
def test_ssim_equals_scikit_image(size, channels):
    originals, reconstructions = pair(3, size, channels)
    expected = []
    for a, b in zip(originals, reconstructions, strict=True):
        # The map of the whole image, whose border sees its mirror image.
        a, b = (
            np.pad(x.permute(1, 2, 0).numpy() / 255, [(5, 5), (5, 5), (0, 0)], "reflect")
            for x in (a, b)
        )
        _, ssim_map = structural_similarity(
            a,
            b,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            full=True,
        )
        expected.append(ssim_map[5:-5, 5:-5].mean())
    assert value(SSIM(), (originals, reconstructions)) == pytest.approx(np.mean(expected), abs=2e-4)


@pytest.mark.parametrize(("size", "channels"), [((11, 11), 3), ((32, 48), 3), ((64, 40), 1)])
def test_ssim_with_its_border_cut_is_scikit_images_own_mean(size, channels):
    originals, reconstructions = pair(3, size, channels)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=255, **options)
        for a, b in zip(originals, reconstructions, strict=True)
    ]
    metric = SSIM(border="cut")
    assert metric.per_image(originals, reconstructions).tolist() == pytest.approx(
        expected, abs=1e-4
    )
    assert metric.identity() != SSIM().identity() == SSIM(border="mirrored").identity()


def test_ssim_says_what_it_does_not_take():
    small = images_of(1, (10, 5))
    with pytest.raises(
        ConfigError, match=r"^ssim: images of 10 x 5 px are too small; needs 6 px a"
    ):
        SSIM().update(small, small)
    with pytest.raises(ConfigError, match=r"needs 11 px a side$"):
        SSIM(border="cut").update(small.repeat(1, 1, 1, 3), small.repeat(1, 1, 1, 3))
    with pytest.raises(ArgumentError, match=r"^border=same: must be mirrored or cut"):
        SSIM(border="same")


def test_rounding_to_8_bits():
    levels = torch.arange(256).float() / 255
    assert torch.equal(to_uint8(levels), torch.arange(256).byte())
    floats = torch.tensor([-1.0, 0.4999 / 255, 0.5001 / 255, 1.5])
    assert to_uint8(floats).tolist() == [0, 0, 1, 255]


def test_evaluator_in_a_trainers_autocast_measures_in_float32():
    originals, _ = pair(2, (16, 16))
    results = []
    for enabled in (False, True):
        evaluator = Evaluator(tiny_tokenizer())
        reconstructions = torch.full_like(originals, 100)
        pixels = reconstructions.float() / 127.5 - 1
        evaluator.tokenizer.decode = lambda *args, pixels=pixels: pixels
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            evaluator.update(originals)
        results.append(evaluator.compute()["ssim"])
    assert results[0] == results[1]


def test_evaluator_leaves_padding_out():
    tokenizer = tiny_tokenizer()
    images = images_of(5)
    plain, padded = Evaluator(tokenizer), Evaluator(tokenizer)
    plain.update(images[:3])
    valid = torch.tensor([True, True, True, False, False])
    assert padded.update(images, valid).shape[0] == 3
    padded.update(images, torch.zeros(5, dtype=torch.bool))  # a batch of nothing else
    skip = "images_per_second"
    a, b = plain.compute(), padded.compute()
    assert {k: v for k, v in a.items() if k != skip} == {k: v for k, v in b.items() if k != skip}
    assert a["images"] == 3 and a["num_tokens"] == 4 and a["bits_per_image"] == 16


def test_evaluator_measures_what_users_get():
    tokenizer = tiny_tokenizer()
    images = images_of(4)
    evaluator = Evaluator(tokenizer)
    reconstructions = evaluator.update(images)
    ids = tokenizer.tokenize(images)
    assert torch.equal(reconstructions, to_uint8(tokenizer.detokenize(ids)))
    results = evaluator.compute()
    used = ids.unique().numel()
    assert results["dead_codes"] == 16 - used and results["codebook_usage"] == used / 16
    assert results["psnr"] == pytest.approx(value(PSNR(), (images, reconstructions)))


def test_comparison_sheet(tmp_path):
    from PIL import Image

    originals, reconstructions = pair(2, (6, 8))
    sheet = comparison(originals, reconstructions, gap=2)
    assert sheet.shape == (3, 2 * 6 + 6, 2 * 10 + 2)
    assert torch.equal(sheet[:, 2:8, 2:10], originals[0])
    assert torch.equal(sheet[:, 10:16, 12:20], reconstructions[1])
    covered = 4 * 3 * 6 * 8
    assert (sheet == 255).sum() >= sheet.numel() - covered  # white between
    save_png(sheet, tmp_path / "deep" / "x.png", scale=3)
    with Image.open(tmp_path / "deep" / "x.png") as picture:
        assert picture.size == (22 * 3, 18 * 3)
        assert np.array_equal(np.asarray(picture)[1::3, 1::3], sheet.permute(1, 2, 0).numpy())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.png"]


# ---------------------------------------------------------------------- seams


@pytest.mark.parametrize(("size", "channels"), [((32, 32), 3), ((24, 40), 3), ((16, 19), 1)])
@pytest.mark.parametrize("period", [8, 3])
def test_seams_against_a_loop_over_pixels(size, channels, period):
    _, pictures = pair(3, size, channels)
    across, elsewhere = [], []
    for picture in pictures.numpy().astype(int):
        for plane in picture:
            for rows in (plane, plane.T):
                for row in rows:
                    for place in range(1, len(row)):
                        step = abs(row[place] - row[place - 1])
                        (elsewhere if place % period else across).append(step)
    expected = np.mean(across) / np.mean(elsewhere)
    assert value(Seams(period), (pictures, pictures)) == pytest.approx(expected, rel=1e-6)
    parts = ((pictures[:2], pictures[:2]), (pictures[2:], pictures[2:]), (pictures[:0],) * 2)
    assert value(Seams(period), *parts) == pytest.approx(expected, rel=1e-6)


def test_seams_of_noise_tiles_and_flat_images():
    noise = torch.rand(8, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    smooth = to_uint8(F.avg_pool2d(noise, 9, stride=1))  # 192 px
    assert value(Seams(), (smooth, smooth)) == pytest.approx(1, abs=0.02)
    tiles = smooth.float().unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).mean((3, 5), keepdim=True)
    tiles = tiles.expand(-1, -1, -1, 8, -1, 8).flatten(4, 5).flatten(2, 3)
    mixed = ((tiles + smooth) / 2).byte()
    assert value(Seams(), (smooth, mixed)) > 2  # of the reconstructions
    flat = torch.full_like(smooth, 70)
    assert value(Seams(), (smooth, flat)) == 1
    small = smooth[..., :8, :8]
    assert value(Seams(), (small, small)) == 1  # a single tile
    with pytest.raises(ConfigError, match="period=1: must be 2 or more"):
        Seams(1)
