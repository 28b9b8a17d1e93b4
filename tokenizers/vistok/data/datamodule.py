"""The DataModule: plain values in, batches and their position out."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vistok.core import ranks as distributed
from vistok.core.errors import ConfigError, DataError
from vistok.core.files import cache_dir as own_cache
from vistok.core.terminal import counted
from vistok.data.checks import above_zero, at_least, check_places, mixture_sources, share_pair
from vistok.data.checks import image_size as size_of
from vistok.data.checks import value_range as range_of
from vistok.data.dataset import Batch, EvalSampler, ImageDataset, ImageLoader, StreamSampler, cores
from vistok.data.decode import MAX_PIXELS
from vistok.data.fields import check_names
from vistok.data.order import Order
from vistok.data.photographs import sample_shards
from vistok.data.places import as_path
from vistok.data.remote import ShardCache
from vistok.data.sets import ImageSets
from vistok.data.skipped import SkippedImages
from vistok.data.transforms import Transform

log = logging.getLogger(__name__)


class VistokDataModule(L.LightningDataModule):
    """Images for training and validation, from one kind of source or several mixed.

    A batch is a dict: `image` (B, C, H, W) uint8 (channels last in memory until the trainer has
    it on the device), `key` list of str, `label` (B,) int64 with -1 for none, `index` (B,) int64,
    `valid` (B,) bool, False for padding, and `skipped`, a list of (key, reason, cause), and each
    of `fields`. Training batches are always full; in validation every image comes exactly once.

    The position in the data is `samples_seen`. The training loop moves it by `advance()` after
    each step, so it counts what was consumed, not what was fetched ahead; it is in the state dict.

    Args:
        kind: `sample` (the photographs inside two packages), `folder` (of images), `shards` or
            `mixture` (of folders and shards).
        train: folder, or shards: a path or address with braces or wildcards, or a list of these.
            Not for `sample` and `mixture`.
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
        train_crop: crop policy, see `vistok.data.crops.CROPS`.
        val_crop: crop policy of validation.
        augment: names of `vistok.data.transforms.AUGMENTS`, for training.
        split_shards: let more workers than there are shards share them.
        sources: of a mixture: name to `train` (a folder or shards) and relative `weight`.
        resample: draw with replacement, instead of each sample once per epoch.
        fields: names of what is read in addition to image and label; see `vistok.data.fields`.
        max_skipped_share: stop when more of the images than this cannot be used.
        scaled_decode: decode large training JPEGs at 1/2, 1/4 or 1/8, if the crop shrinks more.
        crop_scale: least and largest share of the area that `random_resized` takes.
        buckets: sizes [height, width]; an image goes to the nearest shape, a batch is of one.
        cache_dir: where remote shards are kept; None for a folder in vistok's cache.
        cache_gb: when more lies there, what was used longest ago is removed.
        retries: further tries to fetch a remote shard.
        timeout: seconds without a byte, after which a try has failed.
        value_range: [black, white] of images of more than 8 bits; None: their types', floats none.
        max_pixels: of an image as it is stored; larger ones cannot be used.

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
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        resample: bool = False,
        fields: Sequence[str] = (),
        max_skipped_share: float = 0.01,
        scaled_decode: bool = True,
        crop_scale: Sequence[float] = (0.08, 1.0),
        buckets: Sequence[Sequence[int]] | None = None,
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
        retries: int = 5,
        timeout: float = 30.0,
        value_range: Sequence[float] | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        super().__init__()
        train, val = as_path(train), as_path(val)
        check_places(kind, train, val)
        self.sources = mixture_sources(sources) if kind == "mixture" else {}
        if channels not in (1, 3, 4):
            raise ConfigError(
                f"data.channels={channels!r}: must be 1 (grayscale), 3 (RGB) or 4 (RGB with alpha)"
            )
        self.kind = kind
        self.image_size = size_of(image_size)
        self.channels = channels
        self.batch_size = at_least(1, "batch_size", batch_size)
        self.eval_batch_size = at_least(
            1, "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size
        )
        self.num_workers = num_workers
        if num_workers is not None:
            at_least(0, "num_workers", num_workers)
        if shuffle_buffer is not None:
            at_least(1, "shuffle_buffer", shuffle_buffer)
        self.seed = at_least(0, "seed", seed)
        if seed >= 2**64:
            raise ConfigError(f"data.seed={seed}: must be below 2^64")
        self.split_shards = split_shards
        self.resample = resample
        self.fields = check_names(fields)
        scale = share_pair("crop_scale", crop_scale)
        train_transform, *bucket_transforms = [
            Transform(size, train_crop, augment, scale=scale)
            for size in (self.image_size, *(size_of(side, "buckets") for side in buckets or ()))
        ]
        if buckets and (resample or kind == "mixture"):
            raise ConfigError("data.buckets: cannot be combined with data.resample or data=mixture")
        cache = ShardCache(
            Path(cache_dir).expanduser() if cache_dir else own_cache() / "shards",
            int(above_zero("cache_gb", cache_gb) * 1e9),
            at_least(0, "retries", retries),
            above_zero("timeout", timeout),
        )
        if not 0 <= max_skipped_share <= 1:
            raise ConfigError(f"data.max_skipped_share={max_skipped_share!r}: must be from 0 to 1")
        self.sets = ImageSets(
            kind=kind,
            train_place=train,
            val_place=val,
            val_fraction=val_fraction,
            sources=self.sources,
            size=self.image_size,
            channels=channels,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle_buffer=shuffle_buffer,
            resample=resample,
            scaled_decode=scaled_decode,
            field_names=self.fields,
            train_transform=train_transform,
            bucket_transforms=bucket_transforms,
            val_transform=Transform(self.image_size, val_crop, key="data.val_crop"),
            cache=cache,
            value_range=range_of(value_range),
            max_pixels=at_least(1, "max_pixels", max_pixels),
        )
        self.samples_seen = 0
        self.batches_per_step = 1  # of each rank; the trainer sets it
        self.skipped = SkippedImages(max_skipped_share)
        self._skipped_val: set[str] = set()
        self._resumed: dict[str, Any] | None = None
        self._train_loader: weakref.ref[ImageLoader] | None = None

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
        self.skipped.total = self.num_val
        if stage in (None, "fit"):
            self.skipped.total += self.num_train
            _ = self.order
            self._check_workers()
            if self._resumed is not None:
                self._check_resumed(self._resumed)
        if line := self.sets.describe_left_out() if stage in (None, "fit") else "":
            log.warning("%s: %s", self.sets.train_source.name, line)

    @property
    def train_set(self) -> ImageDataset:
        """The training images."""
        return self.sets.train

    @property
    def val_set(self) -> ImageDataset:
        """The validation images."""
        return self.sets.val

    @property
    def order(self) -> Order:
        """Where in the endless training stream each sample stands."""
        return self.sets.order

    @property
    def buckets_used(self) -> bool:
        """Return whether batches are of different sizes."""
        return bool(self.sets.bucket_transforms)

    @property
    def num_train(self) -> int:
        """Training images."""
        return len(self.train_set)

    @property
    def num_val(self) -> int:
        """Validation images."""
        return len(self.val_set)

    @property
    def fingerprint(self) -> str:
        """Identity of the training images and their order, independent of their place."""
        return self.sets.fingerprint

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> ImageLoader:
        """Return endless batches from the current position on; the length is that of an epoch."""
        sampler = StreamSampler(
            self.order, self.batch_size, lambda: self.samples_seen, self.batches_per_step
        )
        loader = ImageLoader(self.train_set, sampler, self._workers(), self.record)
        self._train_loader = weakref.ref(loader)  # its processes end with its user
        return loader

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Move channels to the front on the device; pixels arrive as they were decoded."""
        return batch | {"image": batch["image"].contiguous()}

    @property
    def wait_seconds(self) -> float:
        """Return how long training has waited for batches of its present loader."""
        loader = self._train_loader and self._train_loader()
        return 0.0 if loader is None else loader.wait_seconds

    def val_dataloader(self, first: int = 0) -> ImageLoader:
        """Return every validation image once over all ranks, in a fixed order.

        Args:
            first: batches of each rank to leave out at the beginning.
        """
        sampler = EvalSampler(self.num_val, self.eval_batch_size, first)
        workers = min(self._workers(), len(sampler))
        return ImageLoader(self.val_set, sampler, workers, self._record_val)

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        shards = 8 if self.sets.has_files or self.split_shards else self.sets.num_shards
        return min(cores(), 8, shards)

    def _check_workers(self) -> None:
        wanted, shards = self.num_workers or 0, self.sets.num_shards
        if not self.sets.has_files and wanted > shards and not self.split_shards:
            raise ConfigError(
                f"data.num_workers={wanted}: too many for {counted(shards, 'training shard')}; set"
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

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the data it refers to, and the images that each rank skipped."""
        return {
            "samples_seen": self.samples_seen,
            "seed": self.seed,
            "window": self.order.window,
            "fingerprint": self.fingerprint,
            "skipped": distributed.gather(self.skipped.state_dict()),
            "hold_out_rule": self.sets.hold_out_rule,
            **self._mixing(),
        }

    def _mixing(self) -> dict[str, Any]:
        """Return the other settings that decide the order, by their names in the config."""
        weights = {name: float(spec["weight"]) for name, spec in self.sources.items()}
        run = self.batch_size * distributed.world_size() if self.buckets_used else None
        return {
            "resample": self.resample,
            "weights of the sources": weights,
            "buckets": [list(transform.size) for transform in self.sets.bucket_transforms],
            "global batch with buckets": run,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of `state_dict`.

        Raises:
            DataError: if the data are not those it belongs to.
            ConfigError: if seed or shuffling window are not.
        """
        self.expect(state_dict)
        if self.sets.opened:
            self._check_resumed(state_dict)
        self.samples_seen = int(state_dict["samples_seen"])
        skipped, rank = state_dict.get("skipped", []), distributed.rank()
        if len(skipped) == distributed.world_size():
            skipped = skipped[rank : rank + 1]
        elif rank > 0:  # of other ranks than these: the first one keeps all accounts
            skipped = []
        for account in skipped:
            self.skipped.load_state_dict(account)

    def expect(self, state_dict: dict[str, Any]) -> None:
        """Let `setup` refuse data that are not those of a position, before anything is begun."""
        if state_dict.get("hold_out_rule", 1) < 2:
            self.sets.hold_out_as_before()
        self._resumed = state_dict

    def _check_resumed(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"{self.sets.train_source.name}: not the training data of the run to resume"
                f" (fingerprint {self.fingerprint} instead of {state['fingerprint']}); restore the"
                " data, or start a new run from its weights with init_from"
            )
        for key, now, then in (
            ("seed", self.seed, state["seed"]),
            ("shuffle_buffer", self.order.window, state["window"]),
            *((key, now, state.get(key, now)) for key, now in self._mixing().items()),
        ):
            if now != then and " " in key:
                raise ConfigError(f"data: {key}: {now}, but {then} in the run to resume")
            if now != then:
                raise ConfigError(
                    f"data.{key}={now}, but the run to resume was shuffled with {then}; set"
                    f" data.{key}={then} to continue in its order"
                )

    # ------------------------------------------------------------------ images that fail

    def record(self, batch: Batch) -> None:
        """Keep account of a batch's skipped images; the loaders call it for every batch."""
        self.skipped.record(batch["skipped"], int(batch["valid"].sum()))

    def _record_val(self, batch: Batch, is_counted: bool = True) -> None:
        # Pictures look at what the validation has counted.
        met = int(batch["valid"].sum()) if is_counted else 0
        self.skipped.record(batch["skipped"], met, training=False)
        self._skipped_val.update(skip.key for skip in batch["skipped"])
        if len(self._skipped_val) == self.num_val and batch["skipped"]:
            last = batch["skipped"][-1]
            raise DataError(
                f"{self.val_set.source.name}: none of the validation images can be used;"
                f" {last.key}: {last.reason}"
            )

    def skipped_report(self) -> str:
        """Return a line on the images that were skipped so far, or an empty one."""
        return self.skipped.report()

    # ------------------------------------------------------------------ single looks

    def init_batches(self, num_samples: int) -> Tensor:
        """Return the first images of the training stream, uint8 `(num_samples, C, H, W)`.

        For data-dependent initialisation: the same on every rank, and the position stays.
        """
        dataset = copy.copy(self.train_set)
        dataset.buckets = None  # all at `image_size`
        order = self.order
        batch = dataset.__getitems__([order(p) for p in range(num_samples)])
        self.record(batch)
        return batch["image"].contiguous()

    def val_samples(self, num_images: int) -> dict[str, Any]:
        """A validation batch for pictures, fields included: always the same, spread evenly.

        Of `num_images` samples, or less if there are fewer that decode.
        """
        wanted = min(num_images, self.num_val)
        start = [int((i + 0.5) * self.num_val / wanted) for i in range(wanted)]
        samples, tried = [], set()
        for first in start:
            for number in (*range(first, self.num_val), *range(first)):
                if number in tried:
                    continue
                tried.add(number)
                batch = self.val_set.__getitems__([(0, number)])
                self._record_val(batch, is_counted=False)
                if bool(batch["valid"][0]):
                    samples.append({name: batch[name] for name in ("image", *self.fields)})
                    break
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        return {
            name: torch.cat(parts).contiguous()
            if isinstance(parts[0], Tensor)
            else [text for part in parts for text in part]
            for name, parts in columns.items()
        }

    def in_words(self) -> str:
        """Describe the data in a line."""
        counts, (height, width) = f"{self.num_train} training and {self.num_val}", self.image_size
        return f"{counts} validation images of {height}x{width} px"

    def describe(self) -> dict[str, Any]:
        """Describe the data for a run's summary: plain values only."""
        mine = ("num_train", "num_val", "channels", "fingerprint")
        return {
            "kind": self.kind,
            **self.sets.describe(),
            **{name: getattr(self, name) for name in mine},
            "image_size": list(self.image_size),
            "num_workers": self._workers(),
        }
