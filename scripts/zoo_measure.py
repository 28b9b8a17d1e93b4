"""Measure what zoo.py asks for itself: reference pictures, reconstructions for a sheet, speed."""

from __future__ import annotations

import io
import itertools
import shutil
import statistics
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: k-means: the largest of these patches counts whose codebook comes to 2 to 4096 codes.
PATCHES = (16, 8, 4)

CODECS = ("jpeg", "webp")


def checkpoint(run: Path) -> Path:
    """Return a run's last checkpoint, which every number is of."""
    return run / "checkpoints" / "last.ckpt"


def data_of(run: Path, stage: str = "validate") -> Any:
    """Return a run's DataModule, set up; without fields, which not every row reads."""
    from vistok.data.datamodule import VistokDataModule
    from vistok.evaluation.inputs import data_config

    data = VistokDataModule(**data_config(checkpoint(run), [], 64))
    data.prepare_data()
    data.setup(stage)
    return data


def originals(run: Path) -> tuple[list[str], Tensor]:
    """Return keys and images `(N, C, H, W)` uint8 that a run is measured on, in their order."""
    keys, images = [], []
    for batch in data_of(run).val_dataloader():
        kept = batch["valid"].nonzero().flatten().tolist()
        keys += [batch["key"][i] for i in kept]
        images.append(batch["image"][kept])
    return keys, torch.cat(images)


@torch.no_grad()
def reconstructions(run: Path, images: Tensor) -> Tensor:
    """Return what a run makes of images `(B, C, H, W)` uint8, likewise."""
    from vistok.checkpoints.load import load
    from vistok.metrics.image import to_uint8

    tokenizer = load(checkpoint(run))
    return to_uint8(tokenizer.detokenize(tokenizer.tokenize(images)))


@torch.no_grad()
def images_per_second(run: Path, seconds: float = 4.0, batch: int = 32) -> dict[str, Any]:
    """Return images/s of encoding and decoding, each by the median batch, and their threads."""
    from vistok.checkpoints.load import load

    tokenizer = load(checkpoint(run))
    images = data_of(run).val_samples(batch)["image"]
    ids = tokenizer.tokenize(images)
    tokenizer.detokenize(ids)
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["decode"]) < 3:
        for name, call, value in (
            ("encode", tokenizer.tokenize, images),
            ("decode", tokenizer.detokenize, ids),
        ):
            begun = time.perf_counter()
            call(value)
            times[name].append(time.perf_counter() - begun)
    rates = {f"{name}_per_second": len(images) / statistics.median(t) for name, t in times.items()}
    both = 1 / sum(1 / rate for rate in rates.values())
    return {**rates, "images_per_second": both, "threads": torch.get_num_threads()}


# ---------------------------------------------------------------------- references


def references(runs: Sequence[Path], out: Path) -> Iterator[Path]:
    """Yield folders of reference pictures at the bytes of each run, which are written if missing.

    They are `jpeg_BYTES`, `webp_BYTES` (the compressed data without headers just fit) and
    `kmeans_BYTES` (a codebook over patches of the training images), a PNG for each image.
    """
    from vistok.evaluation.rates import whole_bytes

    limits = sorted({whole_bytes(bits_of(run)) for run in runs})
    keys, images = originals(runs[0])
    for codec in CODECS:
        missing = [limit for limit in limits if not (out / f"{codec}_{limit}").is_dir()]
        for limit, pictures in coded(images, codec, missing):
            save(pictures, keys, out / f"{codec}_{limit}")
    data = None
    for limit in limits:
        if not (out / f"kmeans_{limit}").is_dir():
            data = data or data_of(runs[0], "fit")
            pictures = clustered(data, images, limit)
            if pictures is not None:
                save(pictures, keys, out / f"kmeans_{limit}")
    for name in (*CODECS, "kmeans"):
        yield from (out / f"{name}_{n}" for n in limits if (out / f"{name}_{n}").is_dir())


def bits_of(run: Path) -> float:
    """Return a run's bits per image, from its evaluation."""
    import json

    return json.loads((run / "eval" / "metrics.json").read_text())["bits_per_image"]


def coded(images: Tensor, codec: str, limits: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Return a codec's pictures within each number of bytes that all images fit into."""
    from vistok.evaluation.codecs import codec_curves

    pictures: list[Tensor] = []

    def keep(made: Sequence[Tensor]) -> list[dict[str, float]]:
        pictures.extend(made)
        return [{} for _ in made]

    points = codec_curves(images, limits, codec, measure=keep)["payload"]
    return [(int(p["max_bytes"]), made) for p, made in zip(points, pictures, strict=True)]


def clustered(data: Any, images: Tensor, limit: int) -> Tensor | None:
    """Return images by a k-means codebook of a number of bytes, or None if no patch suits."""
    from vistok.evaluation.baseline import patch_codebook, quantize_patches

    for patch in PATCHES:
        codebook = patch_codebook(data, 8 * limit, patch, num_patches=100000, iterations=25)
        if codebook is not None:
            return quantize_patches(images, codebook, patch)
    return None


def texts_added(shards: str, folder: Path) -> Path:
    """Copy shards to a folder, each sample with a text `(1, 1)` that is zero; return the folder."""
    from vistok.data.places import expand_shards

    if folder.is_dir():
        return folder
    text = io.BytesIO()
    np.save(text, np.zeros((1, 1), np.float32))
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for shard in expand_shards(shards):
        if not isinstance(shard, Path):
            raise SystemExit(f"{shards}: texts are added to shards on this machine alone")
        with (
            tarfile.open(shard) as source,
            tarfile.open(unfinished / shard.name, "w") as copy,
        ):
            files = (member for member in source if member.isfile())
            for key, members in itertools.groupby(files, sample_key):
                for member in members:
                    copy.addfile(member, source.extractfile(member))
                added = tarfile.TarInfo(f"{key}.text.npy")
                added.size = len(text.getvalue())
                copy.addfile(added, io.BytesIO(text.getvalue()))
    unfinished.rename(folder)
    return folder


def sample_key(member: tarfile.TarInfo) -> str:
    """Return the key of a member's sample: its path up to the first dot of the file's name."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.split(".")[0]


def save(pictures: Tensor, keys: Sequence[str], folder: Path) -> None:
    """Write images `(N, C, H, W)` uint8 as PNG files by their keys, all or none."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for key, picture in zip(keys, pictures, strict=True):
        as_image(picture).save(picture_path(unfinished, key))
    unfinished.rename(folder)


def load_pictures(folder: Path, keys: Sequence[str]) -> Tensor:
    """Return images `(N, C, H, W)` uint8 that `save` wrote."""
    arrays = [np.array(Image.open(picture_path(folder, key))) for key in keys]
    return torch.from_numpy(np.stack(arrays)).reshape(*np.stack(arrays).shape[:3], -1).movedim(3, 1)


def picture_path(folder: Path, key: str) -> Path:
    """Return the file of an image by its key."""
    from vistok.evaluation.protocol import stem

    return folder / (stem(key).replace("/", "_") + ".png")


def as_image(picture: Tensor) -> Image.Image:
    """Return a picture `(C, H, W)` uint8 for Pillow."""
    array = picture.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
