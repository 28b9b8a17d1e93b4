"""Formats of image files: their names, their first bytes, and which of them are read."""

from __future__ import annotations

import importlib.util
from functools import cache

from PIL import Image

# Member and file names that we take for images, in the order in which a sample with several such
# members gives its image: first those that WebDataset's users have, then the others.
USUAL_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "png", "webp", "bmp", "tif", "tiff", "gif"}
    | {"ppm", "pgm", "pnm", "jp2", "avif"}
)
IMAGE_EXTENSIONS = USUAL_EXTENSIONS | frozenset(
    {"jfif", "pjpeg", "pjp", "jif", "apng", "dib", "pbm", "pfm", "j2k", "j2c", "jpc", "jpf", "jpx"}
    | {"avifs", "tga", "pcx", "sgi", "rgb", "rgba", "bw", "qoi", "ico", "icns", "dds"}
    | {"heic", "heif", "hif", "jxl", "psd", "eps"}
)

# Names of what lies next to images; other names, and files without any, are known by their bytes.
OTHER_EXTENSIONS = frozenset(
    {"cls", "txt", "json", "jsonl", "npy", "npz", "pt", "pth", "pkl", "pickle", "safetensors"}
    | {"csv", "tsv", "yaml", "yml", "xml", "html", "htm", "md", "log", "idx", "index", "caption"}
    | {"parquet", "arrow", "h5", "hdf5", "mat", "bin", "dat", "db", "py", "ini", "lock", "part"}
    | {"mp4", "avi", "mov", "mkv", "webm", "mp3", "wav", "flac", "ogg", "tar", "gz", "zip", "url"}
)

# What Pillow opens without a program of another kind (it hands EPS to Ghostscript), and whose
# pixels mean what they say.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "DIB"),
    *("TGA", "PCX", "SGI", "QOI", "ICO", "ICNS", "DDS", "PSD"),
)

# Formats by plugins: what Pillow's format is called, the package, and its module.
PLUGINS = {
    "heic": ("HEIF", "pillow-heif", "pillow_heif"),
    "jxl": ("JXL", "pillow-jxl-plugin", "pillow_jxl"),
}

_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"II+\0": "tif",
    b"MM\0+": "tif",
    b"\0\0\0\x0cjP  \r\n": "jp2",
    b"\xff\x4f\xff\x51": "j2k",
    b"\0\0\0\x0cJXL ": "jxl",
    b"qoif": "qoi",
    b"DDS ": "dds",
    b"8BPS": "psd",
    b"icns": "icns",
    b"\x01\xda\0\x01": "sgi",
    b"\x01\xda\x01\x01": "sgi",
}

# Two bytes prove little: these are believed only where the name does not say something else.
_WEAK = {b"BM": "bmp", b"\xff\x0a": "jxl"}

_NETPBM = {b"1": "pbm", b"4": "pbm", b"2": "pgm", b"5": "pgm", b"3": "ppm", b"6": "ppm"}

_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "avif"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1"), "heic"),
}

HEAD = 32  # bytes that `sniffed` looks at


def sniffed(head: bytes) -> str:
    """Return the usual extension of an image with these first bytes; "" if they are no image's."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        brand = _BRANDS.get(head[8:12], "")
        return "avif" if brand == "heic" and b"avif" in head[16:HEAD] else brand
    if head[:1] == b"P" and head[1:2] in _NETPBM and head[2:3].isspace():
        return _NETPBM[head[1:2]]
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def image_extension(data: bytes, name: str) -> str:
    """Return the extension for an image file: by its first bytes, else as in `name`.

    Files are often misnamed, and readers of shards choose their decoder by the extension.
    """
    if found := sniffed(data[:HEAD]):
        return found
    named = name.rpartition(".")[2].lower()
    if named in IMAGE_EXTENSIONS:
        return named
    return next((name for magic, name in _WEAK.items() if data.startswith(magic)), named)


@cache
def readable() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def refusal(data: bytes) -> tuple[str, str]:
    """Say why a file that Pillow does not take for one of `FORMATS` is not read, and the cause."""
    plugin = PLUGINS.get(sniffed(data[:HEAD]))
    if plugin is not None and importlib.util.find_spec(plugin[2]) is None:
        return f"{plugin[0]} needs a package: pip install {plugin[1]}", "not read"
    if data.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "EPS is a program, not an image; convert it to PNG", "not read"
    if data.startswith(b"%PDF"):
        return "PDF is not an image; convert its pages to PNG", "not read"
    if data.lstrip()[:4] == b"<svg" or (data[:5] == b"<?xml" and b"<svg" in data[:2000]):
        return "SVG is a drawing, not an image; convert it to PNG", "not read"
    if found := sniffed(data[:HEAD]):
        cause = "not read" if found == "tif" else "damaged"
        return f"is damaged, or {found.upper()} of a kind that is not read", cause
    Image.init()
    for name in Image.ID:
        accept = Image.OPEN[name][1]
        if name not in FORMATS and accept is not None and accept(data[:16]) is True:
            return f"{name} is not read; convert it to PNG", "not read"
    return "not an image, or of an unknown format", "not an image"
