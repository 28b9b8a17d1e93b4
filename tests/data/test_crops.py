"""Crop policies against independent computations with Pillow, and augmentations by property."""

import numpy as np
import pytest
import torch
from data_helpers import picture
from PIL import Image
from torch.nn import functional as F

from vistok.core.errors import ConfigError
from vistok.data.crops import CROPS, random_box
from vistok.data.decode import DecodeError
from vistok.data.order import sample_rng
from vistok.data.transforms import Transform, hflip, take

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


def boxes(height, width, size=(32, 32), scale=(0.08, 1.0), count=400):
    """Where random_resized cuts, read off an image of coordinates that is not resized after."""
    return [random_box((height, width), size, rng(i), scale) for i in range(count)]


def test_random_resized_has_torchvisions_distribution():
    """Area uniform in the scale, log of the shape uniform in 3/4 to 4/3, places uniform."""
    found = np.array(boxes(4000, 4000, scale=(0.08, 0.5)), dtype=float)
    top, left, height, width = found.T
    area, shape = height * width / 4000**2, np.log(width / height) / np.log(4 / 3)
    for values, low, high in [
        (area, 0.08, 0.5),
        (shape, -1, 1),
        (top / (4000 - height), 0, 1),
        (left / (4000 - width), 0, 1),
    ]:
        assert low - 1e-3 <= values.min() and values.max() <= high + 1e-3
        steps = np.sort((values - low) / (high - low)) - (np.arange(400) + 0.5) / 400
        assert np.abs(steps).max() < 1.63 / 20  # Kolmogorov and Smirnov, 1 %


def test_random_resized_is_a_resized_window():
    image = picture(8, 90, 120)
    for number in range(20):
        top, left, height, width = boxes(90, 120, count=number + 1)[-1]
        window = Image.fromarray(image[top : top + height, left : left + width])
        expected = np.asarray(window.resize((32, 32), Image.Resampling.BICUBIC))
        close(Transform((32, 32), "random_resized")(image, rng(number)), expected)


def test_random_resized_falls_back_to_the_middle():
    for height, width in [(10, 1000), (1000, 10)]:
        for box in boxes(height, width, scale=(0.9, 1.0), count=20):
            long, short = (width, height) if width > height else (height, width)
            place, length = (box[1], box[3]) if width > height else (box[0], box[2])
            assert (place, length) == ((long - 13) // 2, 13) and short in box[2:]


def test_random_resized_takes_the_same_part_at_any_scale():
    far = 0
    for number in range(300):
        large = np.array(random_box((803, 1207), (32, 32), rng(number), (0.08, 1.0)))
        small = np.array(random_box((402, 604), (32, 32), rng(number), (0.08, 1.0)))
        far += np.abs(large / 2 - small).max() > 2
    assert far <= 6  # where a window only just fits at one of the scales, another draw is taken


@pytest.mark.parametrize("crop", sorted(set(CROPS) - {"none"}))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sizes_that_are_not_square(crop, channels):
    for shape in [(80, 60), (60, 200), (49, 66)]:
        image = picture(4, *shape, channels)
        assert Transform((48, 24), crop)(image, rng()).shape == (48, 24, channels)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (32, 48), (48, 32), (20, 30), (32, 32)])
def test_what_is_cut_is_the_window_of_the_whole_image_resized(shape, channels):
    """To the bit, though columns outside the window are dropped half way, wherever it goes."""
    image = picture(9, *shape, channels)
    for number in range(6):
        cut = CROPS["resize_random"](shape, (32, 32), rng(number))
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        whole = F.interpolate(pixels, cut.resized, mode="bicubic", antialias=True)
        top, left = cut.window
        window = whole[0].permute(1, 2, 0).numpy()[top : top + 32, left : left + 32]
        for mirrored, expected in ((False, window), (True, window[:, ::-1])):
            assert np.array_equal(take(image, cut, (32, 32), mirrored), expected)
            out = torch.zeros(32, 32, channels, dtype=torch.uint8)
            assert take(image, cut, (32, 32), mirrored, out) is None
            assert np.array_equal(out, expected)


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


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_any_layout_are_mirrored(channels):
    packed = picture(7, 20, 20, channels)
    planes = np.ascontiguousarray(packed.transpose(2, 0, 1)).transpose(1, 2, 0)
    for image in (packed, planes):
        window = image[3:17, 5:17]
        for view in (window, window[::-1], np.rot90(window), np.rot90(window, 2)):
            found = [hflip(view, rng(number)).tolist() for number in range(20)]
            assert all(f in (view.tolist(), view[:, ::-1].tolist()) for f in found)
            assert found.count(view[:, ::-1].tolist()) in range(4, 17)


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
        (((8, 8), "adm_centre"), r"data.train_crop='adm_centre': .*did you mean 'adm_center'"),
        (
            ((8, 8), "none", ["hflp"]),
            r"data.augment: 'hflp' is not one of .* \(did you mean 'hflip'\?\)",
        ),
        (((8, 8), "none", "hflip"), r"data.augment=hflip: must be a list"),
        (
            ((8, 9), "none", ["hflip", "rot90", "vflip"]),
            r"rot90 needs a square data.image_size, not 8x9; .* data.augment=\[hflip,vflip\]$",
        ),
    ],
)
def test_wrong_names(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Transform(*arguments)
