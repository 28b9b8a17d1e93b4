"""The sets of images of a run: where they come from, what is held out, in which order they come."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vistok.core import ranks as distributed
from vistok.core.errors import ConfigError, DataError
from vistok.core.terminal import counted
from vistok.data.dataset import ImageDataset
from vistok.data.decode import MAX_PIXELS
from vistok.data.deep import Range
from vistok.data.fields import Field, candidates
from vistok.data.folders import FolderSource
from vistok.data.held_out import fingerprint, hold_out
from vistok.data.names import shown
from vistok.data.order import MixtureOrder, Order, RenumberedOrder, ResampledOrder, SampleOrder
from vistok.data.photographs import sample_shards
from vistok.data.places import expand_shards
from vistok.data.remote import ShardCache
from vistok.data.sources import MixedSource, ShardSource, Source
from vistok.data.transforms import Transform


@dataclass(eq=False)
class ImageSets:
    """Training and validation images; sources are opened when they are first looked at.

    The values are those of `VistokDataModule`, checked.

    Attributes:
        kind: `sample`, `folder`, `shards` or `mixture`.
        train_place: folder or shards; None for the other kinds.
        val_place: likewise; None holds out `val_fraction` of the training images.
        val_fraction: in (0, 1).
        sources: of a mixture: name to `train` and `weight`.
        size: height and width of the images.
        channels: 1, 3 or 4.
        batch_size: of training, per device.
        seed: of order, crops and augmentations.
        shuffle_buffer: samples per shuffling window; None for all of an epoch.
        resample: draw with replacement.
        scaled_decode: decode large JPEGs of training at a part of their size.
        field_names: names of what is read next to image and label.
        train_transform: of training images.
        bucket_transforms: of training images of each shape; none for one shape.
        val_transform: of validation images.
        cache: of remote shards.
        value_range: black and white of images of more than 8 bits; None for those of their types.
        max_pixels: of an image.
        hold_out_rule: 2; 1 for that of runs from before, where samples of one key stay together.
    """

    kind: str
    train_place: str | Sequence[str] | None
    val_place: str | Sequence[str] | None
    val_fraction: float
    sources: Mapping[str, Mapping[str, Any]]
    size: tuple[int, int]
    channels: int
    batch_size: int
    seed: int
    shuffle_buffer: int | None
    resample: bool
    scaled_decode: bool
    field_names: Sequence[str]
    train_transform: Transform
    bucket_transforms: Sequence[Transform]
    val_transform: Transform
    cache: ShardCache
    value_range: Range | None = None
    max_pixels: int = MAX_PIXELS
    hold_out_rule: int = 2

    # ------------------------------------------------------------------ sources

    @cached_property
    def train_source(self) -> Source:
        """Return all images that are named for training."""
        if self.kind != "mixture":
            return self._source("train", self.train_place)
        parts = {
            part: self._open(spec["train"], f"data.sources.{part}.train")
            for part, spec in self.sources.items()
        }
        return MixedSource(parts)

    def _source(self, name: str, place: Any) -> Source:
        key = f"data.{name}"
        if self.kind == "sample":
            return ShardSource(sample_shards(max(self.size))[name == "val"], key, self._members)
        # Labels must mean the same in both sets.
        same = name == "val" and self.kind == "folder" and _is_folder(self.train_place)
        return self._open(place, key, self.train_source.classes if same else None)

    def _open(self, place: Any, key: str, classes: list[str] | None = None) -> Source:
        if self.kind == "folder" or (self.kind == "mixture" and _is_folder(place)):
            return FolderSource(place, key, classes)
        return ShardSource(expand_shards(place, key, self.cache), key, self._members)

    @property
    def _members(self) -> list[str]:
        """Return the extensions of the members that the fields may be."""
        return [extension for name in self.field_names for extension in candidates(name)]

    @cached_property
    def _held_out(self) -> np.ndarray | None:
        """Return which training samples are for validation; None if that has its own data."""
        if self.kind == "sample" or self.val_place:
            return None
        source = self.train_source
        parts = source.sources.values() if isinstance(source, MixedSource) else [source]
        return np.concatenate(
            [hold_out(part, self.val_fraction, rule=self.hold_out_rule) for part in parts]
        )

    def hold_out_as_before(self) -> None:
        """Hold out as runs did that know only the first rule; looks at the images again."""
        self.hold_out_rule = 1
        for name in ("_held_out", "train", "val", "_order", "fingerprint"):
            self.__dict__.pop(name, None)

    @property
    def has_files(self) -> bool:
        """Return whether images are read from single files, for which shards say nothing."""
        return self.kind == "folder" or any(_is_folder(s["train"]) for s in self.sources.values())

    @property
    def num_shards(self) -> int:
        """Return the number of shards with training images."""
        return int((self.train.shard_sizes > 0).sum())

    @cached_property
    def fingerprint(self) -> str:
        """Return the identity of the training images and their order, wherever they are."""
        source = fingerprint(self.train_source)
        return source if self._held_out is None else f"{source}-{len(self.train)}"

    # ------------------------------------------------------------------ sets

    def left_out(self) -> list[tuple[str, str]]:
        """Return (name, reason) of what is in the sources and cannot be used, each once."""
        found = list(self.train.source.left_out)
        if self._held_out is None:
            found += self.val.source.left_out
        return list(dict.fromkeys(found))

    def describe(self) -> dict[str, Any]:
        """Describe the sources for a run's summary: plain values only."""
        return {
            "train": self.train_source.name,
            "val": self.val.source.name,
            "shards": self.num_shards,
            "left_out": len(self.left_out()),
        }

    def describe_left_out(self) -> str:
        """Return a line on what is left out; empty if nothing is."""
        found, further = self.left_out(), getattr(self.train.source, "further_images", {})
        said = [f"{name} {reason}" for name, reason in found[:3]]
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        lines = [f"left out {counted(len(found), 'member')}: {', '.join(said)}{more}"] * bool(found)
        kinds = ", ".join(f"{count} .{shown(extension)}" for extension, count in further.items())
        if kinds:
            lines.append(f"images that come after the first of a sample are not used: {kinds}")
        return "; ".join(lines)

    @property
    def opened(self) -> bool:
        """Return whether the training images were looked at."""
        return "train" in self.__dict__

    @cached_property
    def train(self) -> ImageDataset:
        """Return the training images."""
        source = self.train_source
        members = None if self._held_out is None else np.flatnonzero(~self._held_out)
        shapes = source.shapes if members is None else source.shapes[members]
        return ImageDataset(
            source,
            members,
            self.train_transform,
            self.channels,
            self.seed,
            substitute=True,
            scaled=self.scaled_decode,
            fields=[Field(name, source) for name in self.field_names],
            buckets=self._buckets_of(shapes) if self.bucket_transforms else None,
            value_range=self.value_range,
            max_pixels=self.max_pixels,
        )

    def _buckets_of(self, shapes: np.ndarray) -> tuple[Sequence[Transform], np.ndarray]:
        if not shapes.all():
            raise DataError(
                f"data.buckets: the sizes of the images in {self.train_source.name} are not known;"
                " write them as shards with vistok make-shards"
            )
        sizes = np.array([transform.size for transform in self.bucket_transforms])
        return self.bucket_transforms, nearest_shapes(shapes, sizes)

    @cached_property
    def val(self) -> ImageDataset:
        """Return the validation images."""
        if self._held_out is None:
            source, members = self._source("val", self.val_place), None
        else:
            source, members = self.train_source, np.flatnonzero(self._held_out)
        return ImageDataset(
            source,
            members,
            self.val_transform,
            self.channels,
            self.seed,
            substitute=False,
            fields=[Field(name, source) for name in self.field_names],
            value_range=self.value_range,
            max_pixels=self.max_pixels,
        )

    # ------------------------------------------------------------------ order

    @property
    def order(self) -> Order:
        """Return where in the endless training stream each sample stands."""
        if self.bucket_transforms:
            # A run of positions is a global batch, whose size is known once all ranks are there.
            return self._bucket_order(self.batch_size * distributed.world_size())
        return self._order

    @cached_property
    def _order(self) -> Order:
        kind = ResampledOrder if self.resample else SampleOrder
        sizes, source = self.train.shard_sizes, self.train_source
        if not isinstance(source, MixedSource):
            return kind(sizes, self.seed, self.shuffle_buffer)
        ends = np.cumsum([len(part.shard_sizes) for part in source.sources.values()])
        orders = [
            kind(part, self.seed, self.shuffle_buffer, stream)
            for stream, part in enumerate(np.split(sizes, ends[:-1]))
        ]
        try:
            return MixtureOrder(orders, [spec["weight"] for spec in self.sources.values()])
        except ValueError as error:
            raise ConfigError(f"data.sources: {error}") from None

    def _bucket_order(self, run: int) -> Order:
        which = self.train.buckets[1]  # pyright: ignore[reportOptionalSubscript]
        shards = np.repeat(np.arange(len(self.train.shard_sizes)), self.train.shard_sizes)
        members = [np.flatnonzero(which == number) for number in np.unique(which)]
        orders = [
            SampleOrder(np.bincount(shards[part]), self.seed, self.shuffle_buffer, stream)
            for stream, part in enumerate(members)
        ]
        weights = [max(len(part), len(which) / MixtureOrder.block) for part in members]
        return RenumberedOrder(MixtureOrder(orders, weights, run), np.concatenate(members))


def nearest_shapes(shapes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the number of the size whose ratio of height to width is nearest to each shape's.

    Args:
        shapes: `(N, 2)` heights and widths.
        sizes: `(S, 2)` likewise.

    Returns:
        `(N,)` in 0 to S - 1.
    """
    ratios, wanted = np.log(shapes[:, 0] / shapes[:, 1]), np.log(sizes[:, 0] / sizes[:, 1])
    return np.abs(ratios[:, None] - wanted).argmin(1)


def _is_folder(place: Any) -> bool:
    return isinstance(place, str) and os.path.isdir(os.path.expanduser(place))
