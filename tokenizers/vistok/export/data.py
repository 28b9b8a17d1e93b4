"""The images that an exported tokenizer is given, by the words of a command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vistok.core.errors import ConfigError
from vistok.data.build import build_data
from vistok.data.fields import candidates
from vistok.data.places import expand_shards
from vistok.data.sets import ImageSets
from vistok.evaluation.inputs import data_config
from vistok.export.units import Units
from vistok.models.tokenizer import Tokenizer


def image_sets(model: Path, words: Sequence[str], tokenizer: Tokenizer) -> ImageSets:
    """Return the images that `data=...` and `data.*=...` name, cut for a tokenizer.

    Without `data=`, `data.train` is a folder of images if it is a folder, and shards otherwise.

    Args:
        model: an export.
        words: of the command line.
        tokenizer: of the export.

    Raises:
        ConfigError: for a value that cannot be, or images of another size.
    """
    values = data_config(model, [*_kind(words), *words], batch_size=1)
    data = build_data(values)
    if (data.channels, tuple(data.image_size)) != (tokenizer.channels, tokenizer.image_size):
        raise ConfigError(
            f"data: {data.channels} x {data.image_size} images, but the tokenizer takes "
            f"{tokenizer.channels} x {tokenizer.image_size}"
        )
    if others := [name for name in data.fields if name != "caption"]:
        raise ConfigError(f"data.fields={others}: tokens carry labels and captions alone")
    data.prepare_data()
    return data.sets


def _kind(words: Sequence[str]) -> list[str]:
    chosen = {w.lstrip("+").partition("=")[0]: w.partition("=")[2] for w in words}
    if "data" in chosen:
        return []
    place = chosen.get("data.train", "").strip("'\"")
    if not place:
        raise ConfigError(
            "data.train: which images? for example data.train=/photos or "
            "data.train='/sets/in1k/*.tar'"
        )
    return ["data=folder" if os.path.isdir(os.path.expanduser(place)) else "data=shards"]


def units_of(sets: ImageSets, per_unit: int) -> Units:
    """Return the units of work: tars as they are, other images in parts of `per_unit`."""
    members = [extension for name in sets.field_names for extension in candidates(name)]
    if sets.kind == "shards":
        tars = expand_shards(sets.train_place or [], "data.train", sets.cache)
        return Units(tars, members=members)
    return Units(source=sets.train_source, per_unit=per_unit, members=members)
