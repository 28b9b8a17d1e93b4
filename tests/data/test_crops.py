"""Crop policies against independent computations with Pillow, and augmentations by property."""

import numpy as np
import pytest
from data_helpers import picture
from PIL import Image

from vistok.data.decode import DecodeError
from vistok.data.order import sample_rng
from vistok.data.transforms import CROPS, Transform
from vistok.errors import ConfigError

SHAPES = [(40, 56), (57, 40), (33, 33), (16, 90), (131, 97), (300, 200), (20, 21)]


def rng(number=0):
    return sample_rng(0, 0, number)


def close(found, expected):
    assert found.shape == expected.shape and found.dtype == np.uint8
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 3 and difference.mean() < 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_tv_center_is_torchvisions(shape):
    image = picture(1, *shape)
    h, w = shape  # torchvision.transforms.functional: resize, then center_crop
    small = (32, int(32 * w / h)) if h <= w else (int(32 * h / w), 32)
    resized = np.asarray(Image.fromarray(image).resize(small[::-1], Image.Resampling.BICUBIC))
    top, left = round((small[0] - 32) / 2), round((small[1] - 32) / 2)
    close(
        Transform((32, 32), "tv_center")(image, rng()),
        resized[top : top + 32, left : left + 32],
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_adm_center_is_guided_diffusions(shape):
    image = picture(2, *shape)
    picture_ = Image.fromarray(image)  # guided_diffusion.image_datasets.center_crop_arr
    while min(*picture_.size) >= 2 * 32:
        picture_ = picture_.resize(tuple(x // 2 for x in picture_.size), Image.Resampling.BOX)
    scale = 32 / min(*picture_.size)
    picture_ = picture_.resize(
        tuple(round(x * scale) for x in picture_.size), Image.Resampling.BICUBIC
    )
    array = np.asarray(picture_)
    top, left = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    close(Transform((32, 32), "adm_center")(image, rng()), array[top : top + 32, left : left + 32])


@pytest.mark.parametrize("crop", ["resize_random", "random"])
def test_random_windows_are_windows_and_reach_everywhere(crop):
    image = picture(3, 32, 40)
    found = [Transform((32, 32), crop)(image, rng(i)) for i in range(300)]
    windows = [image[:, left : left + 32] for left in range(9)]
    lefts = [next(i for i, w in enumerate(windows) if np.array_equal(w, f)) for f in found]
    assert set(lefts) == set(range(9))


def test_adm_random_scales_between_one_and_five_quarters():
    # Straight ramps: the slope of the result tells the scale.
    ramp = np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[:, None, None], (60, 60, 3)).copy()
    slopes = []
    for number in range(200):
        found = Transform((40, 40), "adm_random")(ramp, rng(number)).astype(float)[:, 20, 0]
        slopes.append((found[30] - found[10]) / 20)
    sides = 60 * 4 / np.array(slopes)
    assert 39 < sides.min() < 42 and 48 < sides.max() < 51.5


@pytest.mark.parametrize("crop", sorted(set(CROPS) - {"none"}))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sizes_that_are_not_square(crop, channels):
    for shape in [(80, 60), (60, 200), (49, 66)]:
        image = picture(4, *shape, channels)
        assert Transform((48, 24), crop)(image, rng()).shape == (48, 24, channels)


def test_images_that_a_policy_cannot_take():
    with pytest.raises(DecodeError, match=r"is 20x50, smaller than 32x32 \(crop 'random'\)"):
        Transform((32, 32), "random")(picture(0, 20, 50), rng())
    with pytest.raises(DecodeError, match=r"is 32x33, not 32x32 \(crop 'none'\)"):
        Transform((32, 32), "none")(picture(0, 32, 33), rng())
    assert np.array_equal(Transform((32, 32), "none")(p := picture(0, 32, 32), rng()), p)


def test_flips_and_turns():
    image = picture(5, 32, 32)
    for name, variants in [
        ("hflip", [image, image[:, ::-1]]),
        ("vflip", [image, image[::-1]]),
        ("rot90", [np.rot90(image, k) for k in range(4)]),
    ]:
        transform = Transform((32, 32), "none", [name])
        seen = []
        for number in range(200):
            found = transform(image, rng(number))
            assert found.flags.c_contiguous
            seen.append(next(i for i, v in enumerate(variants) if np.array_equal(v, found)))
        share = np.bincount(seen, minlength=len(variants)) / 200
        assert np.abs(share - 1 / len(variants)).max() < 0.15


def test_color_is_one_monotone_curve_over_permuted_channels_and_never_clips():
    image = picture(6, 32, 32, 4)
    orders = set()
    for number in range(60):
        found = Transform((32, 32), "none", ["color"])(image, rng(number))
        assert np.array_equal(found[:, :, 3], image[:, :, 3])  # alpha stays
        correlation = np.corrcoef(image.reshape(-1, 4).T[:3], found.reshape(-1, 4).T[:3])[3:, :3]
        order = tuple(correlation.argmax(1))
        assert sorted(order) == [0, 1, 2]
        orders.add(order)
        source, target = image[:, :, list(order)].astype(int), found[:, :, :3].astype(int)
        low, high = source.min(), source.max()
        # Still as many levels apart at the ends as inside: nothing was clipped.
        gain = (target.max() - target.min()) / (high - low)
        predicted = target.min() + (source - low) * gain
        assert np.abs(predicted - target).max() <= 1.5
    assert len(orders) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 8), "adm_centre"), r"data.train_crop='adm_centre' .*did you mean 'adm_center'"),
        (((8, 8), "none", ["hflp"]), r"data.augment holds 'hflp' \(did you mean 'hflip'\?\)"),
        (((8, 8), "none", "hflip"), r"write a list"),
        (((8, 9), "none", ["rot90"]), r"rot90 needs a square data.image_size, not 8x9"),
    ],
)
def test_wrong_names(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Transform(*arguments)
