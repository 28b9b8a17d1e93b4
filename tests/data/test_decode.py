"""Every kind of image against Pillow's own conversions."""

import io

import numpy as np
import pytest
from data_helpers import encode, picture
from PIL import Image, ImageOps

from vistok.data.decode import DecodeError, decode, image_extension

RGB = picture(1)
GREY = picture(2, channels=1)[:, :, 0]


def close(a, b, most=2):
    assert a.shape == b.shape and a.dtype == np.uint8
    assert np.abs(a.astype(int) - b.astype(int)).max() <= most


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_plain_images(kind, channels):
    data = encode(RGB, kind)
    expected = Image.open(io.BytesIO(data)).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    found = decode(data, channels)
    # A JPEG's own luma is taken as it is; Pillow's goes through clipped RGB.
    most = 8 if kind == "JPEG" and channels == 1 else 2
    close(found, np.asarray(expected).reshape(*RGB.shape[:2], channels), most)
    assert found.flags.c_contiguous and found.flags.writeable


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(kind):
    found = decode(encode(GREY, kind))
    assert np.array_equal(found[:, :, 0], found[:, :, 2])
    close(found[:, :, 0], GREY, 0 if kind == "PNG" else 40)


def test_cmyk_and_palette():
    cmyk = Image.fromarray(RGB).convert("CMYK")
    data = encode(cmyk, "JPEG", quality=95)
    close(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    palette = Image.fromarray(RGB).quantize(16)
    close(decode(encode(palette)), np.asarray(palette.convert("RGB")), 0)


def test_sixteen_bits_keep_their_range():
    deep = np.linspace(0, 65535, 40 * 56).reshape(40, 56).astype(np.uint16)
    found = decode(encode(Image.fromarray(deep)), 1)[:, :, 0]
    close(found, np.rint(deep / 257).astype(np.uint8), 0)
    assert found.min() == 0 and found.max() == 255 and len(np.unique(found)) == 256


def test_alpha_is_blended_over_white_or_kept():
    alpha = np.zeros_like(GREY)
    alpha[:20] = 255
    rgba = np.dstack([RGB, alpha])
    close(decode(encode(rgba), 4), rgba, 0)
    found = decode(encode(rgba), 3)
    close(found[:20], RGB[:20], 0)
    assert (found[20:] == 255).all()
    grey_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    assert (decode(encode(grey_alpha), 1)[20:] == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(RGB, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    close(decode(data), np.asarray(upright.convert("RGB")))


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", encode(RGB, "JPEG")[:700], encode(RGB)[:900], b"\xff\xd8\xff" + b"x" * 90],
    ids=["empty", "text", "cut jpeg", "cut png", "noise"],
)
def test_what_does_not_decode_says_why_in_one_line(data):
    with pytest.raises(DecodeError) as error:
        decode(data)
    assert str(error.value) and "\n" not in str(error.value) and "0x" not in str(error.value)


def test_extension_follows_the_bytes():
    assert image_extension(encode(RGB, "JPEG"), "a.png") == "jpg"
    assert image_extension(encode(RGB), "a.jpg") == "png"
    assert image_extension(encode(RGB, "WEBP"), "a.jpg") == "webp"
    assert image_extension(encode(RGB, "BMP"), "a.BMP") == "bmp"
