"""The embedded sample data: color photographs that ship inside two Python packages.

scikit-image and scikit-learn carry a handful of photographs. They are cut into small images once
and kept as shards in the cache folder, so the default run needs no download and reads its data
exactly as any other run does. Validation is two photographs that training never sees.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vistok.core.errors import DataError
from vistok.core.files import cache_dir
from vistok.data.shards import ShardWriter, write_manifest

log = logging.getLogger(__name__)

VERSION = 2  # of the cutting below; part of the cache folder's name

VAL = ("coffee.png", "china.jpg")

# Share of the training images per photograph. The last three are no everyday pictures: a galaxy
# field, a tissue section and a retina, much of it of one colour.
TRAIN = {
    "astronaut.png": 4,
    "chelsea.png": 4,
    "rocket.jpg": 4,
    "motorcycle_left.png": 4,
    "flower.jpg": 4,
    "hubble_deep_field.jpg": 1,
    "ihc.png": 2,
    "retina.jpg": 1,
}

TRAIN_SHARDS = 4

MARGIN = 1.25  # training images are larger than asked, for the random window of each epoch

PIXELS = 20_000_000  # of all training images together; 60 MB as stored PNG

MIN_IMAGES, MAX_IMAGES = 256, 8192


def sample_shards(size: int) -> tuple[list[Path], list[Path]]:
    """Return the training and validation shards for images of `size` pixels, made if need be.

    Validation images are `size` x `size` at native resolution, side by side on a grid; a
    photograph that is smaller than that is enlarged to fit. Training images are 1.25 times as
    large (the random window of each epoch is cut from them): squares at random places, half of
    them at native resolution, the others scaled down from up to the whole photograph.

    Several processes may ask at once: each builds for itself, the first to finish wins.

    Raises:
        DataError: if the packages lack the photographs, or the cache cannot be written.
    """
    photographs = {name: _find(name) for name in (*TRAIN, *VAL)}
    digest = hashlib.sha256()
    for path in photographs.values():
        digest.update(path.read_bytes())
    folder = cache_dir() / "photographs" / f"v{VERSION}-{size}px-{digest.hexdigest()[:8]}"
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
        except OSError as error:
            raise DataError(
                f"cannot write the sample data to {folder.parent}: {error.strerror}; set"
                " VISTOK_CACHE to a writable folder"
            ) from None
        try:
            log.info("cutting the sample photographs to %d px (once; kept in %s)", size, folder)
            _build(building, photographs, size)
            os.chmod(building, 0o755)  # mkdtemp's is ours alone
            building.rename(folder)
        except OSError as error:
            if not folder.exists():  # else another process was first, with the same bytes
                raise DataError(f"cannot write the sample data to {folder}: {error}") from None
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return sorted(folder.glob("train-*.tar")), sorted(folder.glob("val-*.tar"))


def _find(name: str) -> Path:
    """Find a photograph in the installed packages without importing them."""
    for package, inside in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or []:
            if (path := Path(place) / inside / name).exists():
                return path
    raise DataError(
        f"the sample photograph {name} is not in the installed packages;"
        " pip install scikit-image scikit-learn, or use data=folder data.train=FOLDER"
    )


def _build(folder: Path, photographs: dict[str, Path], size: int) -> None:
    side = round(size * MARGIN)
    count = min(max(PIXELS // side**2, MIN_IMAGES), MAX_IMAGES)
    with ShardWriter(folder, "train", max_bytes=2**62) as train:
        for number, image in enumerate(_train_images(photographs, side, count)):
            if number and number % -(-count // TRAIN_SHARDS) == 0:
                train.roll()
            train.write(_png(image), "png", size=(side, side))
    with ShardWriter(folder, "val", max_bytes=2**62) as val:
        for image in _val_images(photographs, size):
            val.write(_png(image), "png", size=(size, size))
    write_manifest(
        folder,
        {"train": train.shards, "val": val.shards},
        source={"train": list(TRAIN), "val": list(VAL), "version": VERSION},
    )


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _train_images(photographs: dict[str, Path], side: int, count: int) -> Iterator[Image.Image]:
    rng = np.random.Generator(np.random.Philox(key=[VERSION, side]))
    pictures = [_open(photographs[name]) for name in TRAIN]
    shares = np.array(list(TRAIN.values()))
    # Dealt out exactly, then shuffled: chance should not decide what a small set is made of.
    which = np.searchsorted(np.cumsum(shares) / shares.sum(), (np.arange(count) + 0.5) / count)
    for number in rng.permutation(which):
        picture = pictures[number]
        short = min(picture.size)
        cut = min(side, short)
        if rng.random() < 0.5:
            cut = round(np.exp(rng.uniform(np.log(cut), np.log(short))))
        left = int(rng.integers(picture.width - cut + 1))
        top = int(rng.integers(picture.height - cut + 1))
        box = (left, top, left + cut, top + cut)
        yield picture.resize((side, side), Image.Resampling.BICUBIC, box=box)


def _val_images(photographs: dict[str, Path], size: int) -> Iterator[Image.Image]:
    for name in VAL:
        picture = _open(photographs[name])
        if min(picture.size) < size:
            scale = size / min(picture.size)
            larger = (round(picture.width * scale), round(picture.height * scale))
            picture = picture.resize(larger, Image.Resampling.BICUBIC)
        for top in range(0, picture.height - size + 1, size):
            for left in range(0, picture.width - size + 1, size):
                yield picture.crop((left, top, left + size, top + size))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    # Stored, not deflated: inflating would be most of the work of each step's batch, on every step.
    image.save(file, "PNG", compress_level=0)
    return file.getvalue()
