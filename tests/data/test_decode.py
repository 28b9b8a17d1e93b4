"""Every kind of image against Pillow's own conversions."""

import io
import zlib

import numpy as np
import pytest
from data_helpers import encode, picture
from PIL import Image, ImageOps

from vistok.data.decode import DecodeError, decode
from vistok.data.formats import image_extension
from vistok.data.order import sample_rng
from vistok.data.transforms import MARGIN, Transform

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


# ---------------------------------------------------------------------- scaled decode


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decode_is_a_smaller_picture(factor, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(3, 331, 250), "JPEG", quality=95, exif=exif)
    asked = []
    found = decode(data, 3, lambda h, w: asked.append((h, w)) or factor)
    whole = decode(data)
    assert asked == [whole.shape[:2]]  # upright
    assert found.shape[:2] == tuple(-(-side // factor) for side in whole.shape[:2])
    smaller = Image.fromarray(whole).resize(found.shape[1::-1], Image.Resampling.BOX)
    assert psnr(found, np.asarray(smaller)) > (60 if factor == 1 else 28)


def test_other_formats_are_decoded_whole():
    assert decode(encode(RGB), 3, lambda h, w: 8).shape == RGB.shape
    cmyk = encode(Image.fromarray(RGB).convert("CMYK"), "JPEG")
    assert decode(cmyk, 3, lambda h, w: 8).shape == RGB.shape


@pytest.mark.parametrize("crop", ["resize_random", "tv_center", "adm_random", "random_resized"])
def test_what_a_crop_gives_hardly_depends_on_the_scaled_decode(crop):
    worst, reduced = 100.0, 0
    for number in range(12):
        height, width = [(700, 900), (500, 433), (1100, 640)][number % 3]
        smooth = Image.fromarray(picture(number, height // 4, width // 4))
        image = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC))
        data = encode(image, "JPEG", quality=92)
        transform = Transform((96, 96), crop, scale=(0.5, 1))
        factor = transform.reduction(lambda number=number: sample_rng(0, 0, number))
        small = decode(data, 3, factor)
        reduced += small.shape[0] < height
        found = transform(small, sample_rng(0, 0, number))
        expected = transform(decode(data), sample_rng(0, 0, number))
        if crop == "tv_center":  # the others' random windows may be a pixel off
            worst = min(worst, psnr(found, expected))
        else:
            worst = min(worst, max(psnr(np.roll(found, (y, x), (0, 1))[2:-2, 2:-2], expected[2:-2, 2:-2])
                        for y in (-1, 0, 1) for x in (-1, 0, 1)))  # fmt: skip
    assert worst > 30 and reduced >= 10


def test_reduction_leaves_the_margin():
    for number in range(300):
        rng = np.random.default_rng(number)
        height, width = rng.integers(20, 4000, 2).tolist()
        for crop, grown in [("resize_random", 1), ("adm_random", 1.25), ("tv_center", 1)]:
            factor = Transform((64, 48), crop).reduction(lambda: sample_rng(0, 0, 0))(height, width)
            fits = min(height / 64, width / 48) / (MARGIN * grown)
            assert factor in (1, 2, 4, 8) and (factor == 1 or factor <= fits)
            assert factor == 8 or fits < 2 * factor
        for crop in ("random", "none"):
            assert (
                Transform((64, 48), crop).reduction(lambda: sample_rng(0, 0, 0))(height, width) == 1
            )


# ---------------------------------------------------------------------- depth, size, kind


def tiff(array, **options):
    """Write a TIFF without Pillow, with any depth, sign and photometric interpretation."""
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def scaled(array, low, high):
    """The definition: low is black, high is white, what lies between is rounded."""
    values = (array.astype(np.float64) - low) * 255 / (high - low)
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


DEEP = np.random.default_rng(0).integers(0, 65536, (40, 56), dtype=np.uint16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (lambda: tiff(DEEP), scaled(DEEP, 0, 65535)),
        (lambda: tiff(DEEP, byteorder=">"), scaled(DEEP, 0, 65535)),
        (lambda: tiff(DEEP, photometric="miniswhite"), 255 - scaled(DEEP, 0, 65535)),
        (lambda: encode(Image.fromarray(DEEP), "JPEG2000"), scaled(DEEP, 0, 65535)),
        (lambda: b"P5 56 40 65535\n" + DEEP.astype(">u2").tobytes(), scaled(DEEP, 0, 65535)),
        (lambda: b"P5 56 40 4095\n" + (DEEP >> 4).astype(">u2").tobytes(), scaled(DEEP >> 4, 0, 4095)),
    ],
)  # fmt: skip
def test_depths_whose_white_is_known(data, expected):
    close(decode(data(), 1)[:, :, 0], expected, 1)


FLOATS = np.random.default_rng(1).normal(0, 3, (40, 56)).astype(np.float32)


@pytest.mark.parametrize(
    ("array", "span"),
    [
        (FLOATS, (-4.0, 4.0)),
        (FLOATS / 1000, (0.0, 0.002)),
        ((FLOATS * 1000).astype(np.int16), (-4000, 4000)),
        ((FLOATS * 1e8).astype(np.int32), (-4e8, 4e8)),
        (DEEP.astype(np.uint32) * 65537, (0, 2**32 - 1)),
        (DEEP >> 4, (0, 4095)),  # 12 bits in 16
    ],
)
def test_a_range_for_the_whole_set(array, span):
    data = tiff(array)
    close(decode(data, 1, value_range=span)[:, :, 0], scaled(array, *span), 1)
    if array.dtype != np.uint16:  # never by what the image holds
        with pytest.raises(DecodeError, match=r"data.value_range=\[LOW,HIGH\]"):
            decode(data)


def test_what_is_refused_by_name():
    spoiled = FLOATS.copy()
    spoiled[3, 3] = np.nan
    for data, options, message in [
        (tiff(spoiled), {"value_range": (0, 1)}, "not numbers"),
        (tiff(np.dstack([DEEP] * 3)), {"value_range": (0, 4095)}, "of 16 bits is read at 8"),
        (tiff(FLOATS.astype(np.float64)), {}, "of a kind that is not read"),
        (tiff(RGB, photometric="cielab"), {}, "mode LAB"),
        (tiff(GREY.astype(np.int8)), {}, "8 bits with a sign"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", {}, "EPS is a program"),
        (b"<svg xmlns='x'/>", {}, "SVG"),
        (b"SIMPLE  =                    T".ljust(2880), {}, "FITS is not read"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, {}, "pip install pillow-heif"),
    ]:
        with pytest.raises(DecodeError, match=message) as error:
            decode(data, **options)
        assert error.value.cause in ("not read", "damaged")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "AVIF", "JPEG2000"])
def test_orientation_in_every_format(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    data = encode(RGB, kind, exif=exif, **more.get(kind, {}))
    turn = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    turn |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1)}
    turn |= {7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 1)}
    upright = RGB if kind == "JPEG2000" else turn[orientation](RGB)  # which has no EXIF
    assert np.abs(decode(data).astype(int) - upright).mean() < 3


def test_orientation_in_xmp_alone():
    xmp = b"<x:xmpmeta><rdf:Description tiff:Orientation='6'/></x:xmpmeta>".replace(b"'", b'"')
    data = encode(RGB, "JPEG", quality=95, xmp=xmp)
    assert decode(data).shape == (56, 40, 3)


def test_too_large_is_not_damaged():
    for kind in ("PNG", "JPEG", "TIFF"):
        with pytest.raises(
            DecodeError, match=r"40 x 56 pixels, above data.max_pixels=2000"
        ) as error:
            decode(encode(RGB, kind), max_pixels=2000)
        assert error.value.cause == "too large"
    png = encode(RGB)
    bomb = png[:16] + (60000).to_bytes(4, "big") * 2 + png[24:]
    with pytest.raises(DecodeError) as error:
        decode(bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4, "big") + bomb[33:])
    assert error.value.cause == "too large"
    long = np.zeros((40000, 1, 3), np.uint8)
    with pytest.raises(DecodeError, match=r"40000 x 1 pixels become 10240000 x 256") as error:
        Transform((256, 256), "resize_random")(long, np.random.default_rng(0))
    assert error.value.cause == "too large"


def test_palettes_and_transparent_colors():
    palette = Image.fromarray(RGB).quantize(16)
    data = encode(palette, transparency=bytes([0] + [255] * 15))
    expected = np.asarray(palette.convert("RGB")).copy()
    expected[np.asarray(palette) == 0] = 255
    close(decode(data), expected, 0)
    deep = DEEP.copy()
    deep[:9] = 777
    found = decode(encode(Image.fromarray(deep), transparency=777), 4)
    assert (found[:9, :, 3] == 0).all() and (found[9:, :, 3] == 255).mean() > 0.99


def test_the_first_of_several_frames():
    frames = [Image.fromarray(picture(n)) for n in range(3)]
    for kind in ("TIFF", "WEBP", "PNG", "GIF"):
        more = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **more)
        close(decode(data), np.asarray(frames[0]), 100 if kind == "GIF" else 0)
