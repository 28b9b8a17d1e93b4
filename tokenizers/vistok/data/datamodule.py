"""The DataModule: plain values in, batches and their position out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from vistok import distributed
from vistok.data.dataset import Batch, EvalSampler, ImageDataset, ImageLoader, StreamSampler
from vistok.data.order import SampleOrder
from vistok.data.photographs import sample_shards
from vistok.data.skipped import SkippedImages
from vistok.data.sources import (
    FolderSource,
    ShardSource,
    Source,
    expand_shards,
    fingerprint,
    hold_out,
)
from vistok.data.transforms import Transform
from vistok.errors import ConfigError, DataError, nearest

KINDS = ("sample", "folder", "shards")


class VistokDataModule(L.LightningDataModule):
    """Images for training and validation, from one of three kinds of source.

    A batch is a dict: `image` (B, C, H, W) uint8, `key` list of str, `label` (B,) int64 with -1
    for none, `index` (B,) int64, `valid` (B,) bool, False for padding, and `skipped`, a list of
    (key, reason). Training batches are always full; in validation every image comes exactly once.

    The position in the data is `samples_seen`. The training loop moves it by `advance()` after
    each step, so it counts what was consumed, not what was fetched ahead; it is in the state dict.

    Args:
        kind: `sample` (the photographs inside two packages), `folder` (of images) or `shards`.
        train: folder, or shards: a path with braces or wildcards, or a list of these. Not
            for `sample`.
        val: as train; None holds out `val_fraction` of train by a hash of the keys.
        val_fraction: in (0, 1).
        image_size: pixels of a square, or [height, width].
        channels: 1, 3 or 4.
        batch_size: of training, per device.
        eval_batch_size: of validation, per device; None for `batch_size`.
        num_workers: loader processes; None for as many as there are cores, at most 8 and at
            most one per shard; 0 loads in the main process.
        shuffle_buffer: samples per shuffling window; None shuffles all of an epoch.
        seed: of order, crops and augmentations.
        train_crop: crop policy, see `vistok.data.transforms.CROPS`.
        val_crop: crop policy of validation.
        augment: names of `vistok.data.transforms.AUGMENTS`, for training.
        split_shards: let more workers than there are shards share them.

    Raises:
        ConfigError: for a value that cannot be.
    """

    def __init__(
        self,
        kind: str = "sample",
        train: str | Sequence[str] | None = None,
        val: str | Sequence[str] | None = None,
        val_fraction: float = 0.02,
        image_size: int | Sequence[int] = 64,
        channels: int = 3,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        shuffle_buffer: int | None = None,
        seed: int = 0,
        train_crop: str = "resize_random",
        val_crop: str = "adm_center",
        augment: Sequence[str] = (),
        split_shards: bool = False,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(
                f"data.kind={kind!r}{nearest(str(kind), KINDS)}; there are {', '.join(KINDS)}"
            )
        if kind == "sample" and (train or val):
            raise ConfigError(
                "data=sample has pictures of its own; for data.train and data.val use data=folder"
                " or data=shards"
            )
        if kind != "sample" and not train:
            example = "/photos" if kind == "folder" else "'/sets/train-{000000..000127}.tar'"
            raise ConfigError(f"data.train is not set; for example data.train={example}")
        if kind == "folder" and not (isinstance(train, str) and isinstance(val, str | None)):
            raise ConfigError("data=folder takes one folder as data.train (and one as data.val)")
        if channels not in (1, 3, 4):
            raise ConfigError(
                f"data.channels={channels!r}; 1 (grey), 3 (RGB) and 4 (with alpha) can be"
            )
        self.kind, self.train, self.val, self.val_fraction = kind, train, val, val_fraction
        self.image_size = _size(image_size)
        self.channels = channels
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.eval_batch_size = _at_least(
            1, "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size
        )
        self.num_workers = num_workers
        if num_workers is not None:
            _at_least(0, "num_workers", num_workers)
        self.shuffle_buffer = shuffle_buffer
        if shuffle_buffer is not None:
            _at_least(1, "shuffle_buffer", shuffle_buffer)
        self.seed = _at_least(0, "seed", seed)
        if seed >= 2**64:
            raise ConfigError(f"data.seed={seed} must be below 2^64")
        self.split_shards = split_shards
        self._train_transform = Transform(self.image_size, train_crop, augment)
        self._val_transform = Transform(self.image_size, val_crop, key="data.val_crop")
        self.samples_seen = 0
        self.batches_per_step = 1  # of each rank; the trainer sets it
        self.skipped = SkippedImages()
        self._skipped_val: set[str] = set()
        self._resumed: dict[str, Any] | None = None

    # ------------------------------------------------------------------ sources and sets

    def prepare_data(self) -> None:
        """Cut the sample photographs, once per machine."""
        if self.kind == "sample":
            sample_shards(max(self.image_size))

    def setup(self, stage: str | None = None) -> None:
        """Open the sources, so that what is missing or broken shows before anything else starts.

        Args:
            stage: `fit`, or None for all; the others need no training data if `val` is given.

        Raises:
            DataError: if shards, folders or images are missing or broken.
            ConfigError: if there are more workers than shards.
        """
        _ = self.val_set
        if stage in (None, "fit"):
            _ = self.train_set
            self._check_workers()
            if self._resumed is not None:
                self._check_resumed(self._resumed)

    def _source(self, name: str) -> Source:
        key, place = f"data.{name}", getattr(self, name)
        if self.kind == "sample":
            paths = sample_shards(max(self.image_size))[name == "val"]
            return ShardSource(paths, key)
        if self.kind == "folder":
            # Labels must mean the same in both sets.
            classes = self._train_source.classes if name == "val" and _exists(self.train) else None
            return FolderSource(place, key, classes)
        return ShardSource(expand_shards(place, key), key)

    @cached_property
    def _train_source(self) -> Source:
        return self._source("train")

    @cached_property
    def _held_out(self) -> np.ndarray | None:
        """Which samples of the training source are for validation; None if that has its own."""
        if self.kind == "sample" or self.val:
            return None
        return hold_out(self._train_source, self.val_fraction)

    @cached_property
    def train_set(self) -> ImageDataset:
        """The training images."""
        members = None if self._held_out is None else np.flatnonzero(~self._held_out)
        return ImageDataset(
            self._train_source, members, self._train_transform, self.channels, self.seed, True
        )

    @cached_property
    def val_set(self) -> ImageDataset:
        """The validation images."""
        if self._held_out is None:
            source, members = self._source("val"), None
        else:
            source, members = self._train_source, np.flatnonzero(self._held_out)
        return ImageDataset(
            source, members, self._val_transform, self.channels, self.seed, substitute=False
        )

    @cached_property
    def order(self) -> SampleOrder:
        """Where in the endless training stream each sample stands."""
        return SampleOrder(self.train_set.shard_sizes, self.seed, self.shuffle_buffer)

    @property
    def num_train(self) -> int:
        """Training images."""
        return len(self.train_set)

    @property
    def num_val(self) -> int:
        """Validation images."""
        return len(self.val_set)

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> ImageLoader:
        """Endless batches from the current position on; its length is one epoch's."""
        sampler = StreamSampler(
            self.order, self.batch_size, lambda: self.samples_seen, self.batches_per_step
        )
        return ImageLoader(self.train_set, sampler, self._workers(), self.record)

    def val_dataloader(self) -> ImageLoader:
        """Every validation image once over all ranks, in a fixed order."""
        sampler = EvalSampler(self.num_val, self.eval_batch_size)
        workers = min(self._workers(), len(sampler))
        return ImageLoader(self.val_set, sampler, workers, self._record_val)

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        shards = 8 if self.kind == "folder" or self.split_shards else self._num_shards
        return min(_cores(), 8, shards)

    @property
    def _num_shards(self) -> int:
        return int((self.train_set.shard_sizes > 0).sum())

    def _check_workers(self) -> None:
        wanted, shards = self.num_workers or 0, self._num_shards
        if self.kind != "folder" and wanted > shards and not self.split_shards:
            raise ConfigError(
                f"data.num_workers={wanted} is more than the {shards} training shards; set"
                f" data.num_workers={shards}, or data.split_shards=true to let workers share shards"
            )

    # ------------------------------------------------------------------ position

    def advance(self, num_samples: int | None = None) -> None:
        """Move the position past samples that were consumed; call it after each training step.

        Args:
            num_samples: consumed by all ranks together; None for one global batch.
        """
        if num_samples is None:
            num_samples = self.batch_size * distributed.world_size()
        self.samples_seen += num_samples

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the training images and their order, wherever they lie."""
        source = fingerprint(self._train_source)
        return source if self._held_out is None else f"{source}-{self.num_train}"

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {
            "samples_seen": self.samples_seen,
            "seed": self.seed,
            "window": self.order.window,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of `state_dict`.

        Raises:
            DataError: if the data are not those it belongs to.
            ConfigError: if seed or shuffling window are not.
        """
        if "train_set" in self.__dict__:
            self._check_resumed(state_dict)
        self._resumed = state_dict
        self.samples_seen = int(state_dict["samples_seen"])

    def _check_resumed(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"{self._train_source.name}: not the training data of the run to resume"
                f" (fingerprint {self.fingerprint}, the run has {state['fingerprint']}); restore"
                " the data, or start a new run from its weights"
            )
        for key, now, then in (
            ("seed", self.seed, state["seed"]),
            ("shuffle_buffer", self.order.window, state["window"]),
        ):
            if now != then:
                raise ConfigError(
                    f"data.{key}={now}, but the run to resume was shuffled with {then}; set"
                    f" data.{key}={then} to continue in its order"
                )

    # ------------------------------------------------------------------ images that fail

    def record(self, batch: Batch) -> None:
        """Keep account of a batch's skipped images; the loaders call it for every batch."""
        self.skipped.record(batch["skipped"])

    def _record_val(self, batch: Batch) -> None:
        self.record(batch)
        self._skipped_val.update(key for key, _ in batch["skipped"])
        if len(self._skipped_val) == self.num_val and batch["skipped"]:
            key, reason = batch["skipped"][-1]
            raise DataError(
                f"{self.val_set.source.name}: no validation image can be used; {key}: {reason}"
            )

    def skipped_report(self) -> str:
        """One line on the images that were skipped so far; empty if none were."""
        return self.skipped.report()

    # ------------------------------------------------------------------ single looks

    def init_batches(self, num_samples: int) -> Tensor:
        """The first images of the training stream, `(num_samples, C, H, W)` uint8.

        For data-dependent initialisation: the same on every rank, and the position stays.
        """
        batch = self.train_set.__getitems__([self.order(p) for p in range(num_samples)])
        self.record(batch)
        return batch["image"]

    def val_images(self, num_images: int) -> Tensor:
        """Validation images for pictures, `(n, C, H, W)` uint8: always the same, spread evenly.

        n is `num_images`, or less if there are fewer that decode.
        """
        wanted = min(num_images, self.num_val)
        start = [int((i + 0.5) * self.num_val / wanted) for i in range(wanted)]
        images, tried = [], set()
        for first in start:
            for number in (*range(first, self.num_val), *range(first)):
                if number in tried:
                    continue
                tried.add(number)
                batch = self.val_set.__getitems__([(0, number)])
                self._record_val(batch)
                if bool(batch["valid"][0]):
                    images.append(batch["image"])
                    break
        return torch.cat(images)

    def describe(self) -> dict[str, Any]:
        """What the data are, for a run's summary: plain values only."""
        return {
            "kind": self.kind,
            "train": self._train_source.name,
            "val": self.val_set.source.name,
            "num_train": self.num_train,
            "num_val": self.num_val,
            "shards": self._num_shards,
            "image_size": list(self.image_size),
            "channels": self.channels,
            "num_workers": self._workers(),
            "fingerprint": self.fingerprint,
        }


def _exists(place: Any) -> bool:
    return isinstance(place, str) and os.path.isdir(os.path.expanduser(place))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _at_least(least: int, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"data.{name}={value!r} must be a whole number of at least {least}")
    return value


def _size(value: Any) -> tuple[int, int]:
    sides = [value, value] if isinstance(value, int) else list(value or [])
    if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
        raise ConfigError(
            f"data.image_size={value!r} must be a positive number of pixels, or [height, width]"
        )
    return sides[0], sides[1]
