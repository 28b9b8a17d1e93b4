"""The DataModule of tokens: batches of ids, and their position."""

from __future__ import annotations

import hashlib
import json
import time
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vistok.core import ranks as distributed
from vistok.core.errors import ConfigError, DataError
from vistok.data.checks import at_least
from vistok.data.dataset import EvalSampler, Request, StreamSampler
from vistok.data.order import SampleOrder
from vistok.data.skipped import SkippedImages
from vistok.data.tokens import TokenFolder

Batch = dict[str, Any]


class TokenDataModule(L.LightningDataModule):
    """Tokens for training and validation, from folders that `vistok tokenize` wrote.

    A batch is a dict: `ids` (B, N, Q) int64, `length` (B,) int64 tokens of each image, `label` (B,)
    int64 with -1 for none, `caption` list of str or None, `key` list of str, `index` (B,) int64
    into the folder, and `valid` (B,) bool, False for padding. Training batches are always full; in
    validation every image comes exactly once.

    As with images, the position in the data is `samples_seen`, and the order of the samples a pure
    function of it.

    Args:
        kind: `tokens`.
        train: folder of the training tokens.
        val: folder of the validation tokens, of the same tokenizer; None holds out `val_fraction`
            of train by a hash of the keys, so that all views of an image stay together.
        val_fraction: in (0, 1).
        batch_size: of training, per device.
        eval_batch_size: of validation, per device; None for `batch_size`.
        num_workers: loader processes; 0 reads in the main process, which is fast enough for most.
        shuffle_buffer: samples per shuffling window; None shuffles all of an epoch.
        seed: of the order.
        tokenizer: export that turns ids into pictures; None for no pictures.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    def __init__(
        self,
        kind: str = "tokens",
        train: str | None = None,
        val: str | None = None,
        val_fraction: float = 0.02,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle_buffer: int | None = None,
        seed: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        if kind != "tokens":
            raise ConfigError(f"data.kind={kind}: must be tokens for task=prior; add data=tokens")
        if not train:
            raise ConfigError("tokens: which folder? for example tokens=/tokens/cifar10")
        self.train_place, self.val_place, self.tokenizer = str(train), val, tokenizer
        self.val_fraction = val_fraction
        self.batch_size = at_least(1, "batch_size", batch_size)
        self.eval_batch_size = at_least(
            1, "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size
        )
        self.num_workers = at_least(0, "num_workers", num_workers)
        if shuffle_buffer is not None:
            at_least(1, "shuffle_buffer", shuffle_buffer)
        self.shuffle_buffer = shuffle_buffer
        self.seed = at_least(0, "seed", seed)
        self.samples_seen = 0
        self.batches_per_step = 1  # of each rank; the trainer sets it
        self.skipped = SkippedImages()  # tokens have none; the engine asks
        self._resumed: dict[str, Any] | None = None
        self._train_loader: weakref.ref[TokenLoader] | None = None

    # ------------------------------------------------------------------ sets

    def setup(self, stage: str | None = None) -> None:
        """Open the folders, so that what is missing or broken shows before anything else starts.

        Raises:
            DataError: if a folder is missing or damaged, or the two are of different tokenizers.
        """
        _ = self.parts
        if self._resumed is not None and stage in (None, "fit"):
            self._check_resumed(self._resumed)

    @cached_property
    def train_folder(self) -> TokenFolder:
        """The folder of the training tokens."""
        return TokenFolder(self.train_place)

    @cached_property
    def val_folder(self) -> TokenFolder:
        """The folder of the validation tokens, which may be the other one."""
        if not self.val_place:
            return self.train_folder
        folder = TokenFolder(self.val_place)
        for key in ("tokenizer_hash", "num_tokens", "streams", "grid", "lengths"):
            if folder.manifest[key] != self.train_folder.manifest[key]:
                raise DataError(
                    f"data.val={self.val_place}: {key} differs from that of {self.train_place}; "
                    "both must be made by the same tokenizer"
                )
        return folder

    @cached_property
    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the samples of training and of validation, each in its folder."""
        everything = np.arange(len(self.train_folder))
        if self.val_place:
            parts = everything, np.arange(len(self.val_folder))
        else:
            chosen = self._held_out()
            parts = everything[~chosen], everything[chosen]
        for name, part in zip(("training", "validation"), parts, strict=True):
            if not len(part):
                raise DataError(f"{self.train_place}: has no samples for {name}")
        return parts

    def _held_out(self) -> np.ndarray:
        """Choose images for validation by a hash of their keys, `(N,)` bool."""
        if not 0 < self.val_fraction < 1:
            raise ConfigError(
                f"data.val_fraction={self.val_fraction}: must be above 0 and below 1 while "
                "data.val is not set"
            )
        digests = b"".join(
            hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            for key in keys_of(self.train_folder)
        )
        hashes = np.frombuffer(digests, dtype="<u8")
        chosen = hashes < np.uint64(self.val_fraction * 2**64)
        if not chosen.any() and len(hashes):
            chosen = hashes == hashes.min()
        return chosen

    @cached_property
    def order(self) -> SampleOrder:
        """Where in the endless training stream each sample stands."""
        members = self.parts[0]
        ends = np.cumsum([shard["samples"] for shard in self.train_folder.manifest["shards"]])
        sizes = np.diff(np.searchsorted(members, ends), prepend=0)
        return SampleOrder(sizes, self.seed, self.shuffle_buffer)

    @property
    def num_train(self) -> int:
        """Training samples."""
        return len(self.parts[0])

    @property
    def num_val(self) -> int:
        """Validation samples."""
        return len(self.parts[1])

    @property
    def num_classes(self) -> int:
        """Number of labels in the training folder, used or not; 0 if there are none."""
        return num_classes(self.train_folder)

    @property
    def fingerprint(self) -> str:
        """Identity of the training tokens, independent of their place."""
        manifest = self.train_folder.manifest
        told = [manifest["tokenizer_hash"], [s["sha256"] for s in manifest["shards"]]]
        told += [len(self.parts[0]), self.val_fraction if not self.val_place else None]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> TokenLoader:
        """Return endless batches from the current position on."""
        sampler = StreamSampler(
            self.order, self.batch_size, lambda: self.samples_seen, self.batches_per_step
        )
        dataset = TokenDataset(self.train_folder, self.parts[0])
        loader = TokenLoader(dataset, sampler, self.num_workers)
        self._train_loader = weakref.ref(loader)
        return loader

    def val_dataloader(self) -> TokenLoader:
        """Return every validation sample once over all ranks, in a fixed order."""
        sampler = EvalSampler(self.num_val, self.eval_batch_size)
        return TokenLoader(TokenDataset(self.val_folder, self.parts[1]), sampler, 0)

    @property
    def wait_seconds(self) -> float:
        """Return how long training has waited for batches of its present loader."""
        loader = self._train_loader and self._train_loader()
        return 0.0 if loader is None else loader.wait_seconds

    def first(self, count: int, training: bool = True) -> Batch:
        """Return the first samples of a set, in the order of its folder; fewer if it has fewer."""
        folder = self.train_folder if training else self.val_folder
        members = self.parts[0 if training else 1]
        dataset = TokenDataset(folder, members)
        return dataset.__getitems__([(0, i) for i in range(min(count, len(members)))])

    # ------------------------------------------------------------------ position

    def advance(self, num_samples: int | None = None) -> None:
        """Move the position past samples that were consumed; see `VistokDataModule.advance`."""
        if num_samples is None:
            num_samples = self.batch_size * distributed.world_size()
        self.samples_seen += num_samples

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the data that it refers to."""
        return {
            "samples_seen": self.samples_seen,
            "seed": self.seed,
            "window": self.order.window,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of `state_dict`.

        Raises:
            DataError: if the tokens are not those it belongs to.
            ConfigError: if seed or shuffling window are not.
        """
        self._check_resumed(state_dict)
        self._resumed = state_dict
        self.samples_seen = int(state_dict["samples_seen"])

    def expect(self, state_dict: dict[str, Any]) -> None:
        """Let `setup` refuse tokens that are not those of a position, before anything is begun."""
        self._resumed = state_dict

    def _check_resumed(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"{self.train_place}: not the training tokens of the run to resume (fingerprint "
                f"{self.fingerprint} instead of {state['fingerprint']}); restore them, or start a "
                "new run from its weights with init_from"
            )
        for key, now in (("seed", self.seed), ("window", self.order.window)):
            if now != state[key]:
                name = "shuffle_buffer" if key == "window" else key
                raise ConfigError(
                    f"data.{name}={now}, but the run to resume was shuffled with {state[key]}; set "
                    f"data.{name}={state[key]} to continue in its order"
                )

    # ------------------------------------------------------------------ for people

    def in_words(self) -> str:
        """Describe the data in a line."""
        return f"tokens of {self.num_train} training and {self.num_val} validation images"

    def skipped_report(self) -> str:
        """Return an empty line: no tokens are skipped."""
        return ""

    def describe(self) -> dict[str, Any]:
        """Describe the data for a run's summary: plain values only."""
        return {
            "kind": "tokens",
            "train": self.train_place,
            "val": self.val_place,
            "num_train": self.num_train,
            "num_val": self.num_val,
            "tokenizer_hash": self.train_folder.manifest["tokenizer_hash"],
            "fingerprint": self.fingerprint,
        }


class TokenDataset(Dataset):
    """Samples of a folder by their numbers, collated to batches.

    Args:
        folder: of tokens.
        members: `(M,)` the samples that count.
    """

    def __init__(self, folder: TokenFolder, members: np.ndarray) -> None:
        self.folder, self.members = folder, members

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, request: Request) -> Batch:
        return self.__getitems__([request])

    def __getitems__(self, requests: Sequence[Request]) -> Batch:
        """Load a batch; a request below 0 is padding, and repeats some sample."""
        valid = torch.tensor([number >= 0 for _, number in requests])
        chosen = self.members[[max(number, 0) for _, number in requests]]
        samples = [self.folder[int(index)] for index in chosen]
        manifest = self.folder.manifest
        shape = len(samples), manifest["num_tokens"], manifest["num_streams"]
        ids = np.zeros(shape, dtype=np.int64)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample.ids)] = sample.ids
        return {
            "ids": torch.from_numpy(ids),
            "length": torch.tensor([len(sample.ids) for sample in samples]),
            "label": torch.tensor([-1 if s.label is None else s.label for s in samples]),
            "caption": [sample.caption for sample in samples],
            "key": [sample.key for sample in samples],
            "index": torch.from_numpy(chosen.astype(np.int64)),
            "valid": valid,
        }


class TokenLoader(DataLoader):
    """A stock DataLoader that counts how long it is waited for.

    Args:
        dataset: collates its batches itself.
        sampler: of batches.
        num_workers: processes.

    Attributes:
        wait_seconds: how long the main process waited for batches, over all iterations.
    """

    def __init__(
        self, dataset: TokenDataset, sampler: StreamSampler | EvalSampler, num_workers: int
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,  # pyright: ignore[reportArgumentType]
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            # Each iteration draws a seed; from here, lest it move the run's own generator.
            generator=torch.Generator(),
        )
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the DataModule has the position. Lightning asks for this to resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing; see `state_dict`."""


def _as_it_is(batch: Any) -> Batch:
    return batch


def keys_of(folder: TokenFolder) -> Iterator[str]:
    """Yield the keys of all samples in their order."""
    for number in range(len(folder.manifest["shards"])):
        shard = folder.shard(number)
        yield from map(shard.key, range(len(shard)))


def num_classes(folder: TokenFolder) -> int:
    """Return the number of labels of a folder: the manifest's, or one more than the largest."""
    known = folder.manifest.get("classes") or {}
    if count := int(known.get("count") or len(folder.manifest.get("class_names") or ())):
        return count
    most = -1
    for number in range(len(folder.manifest["shards"])):
        labels = folder.shard(number).labels
        most = max(most, int(labels.max())) if len(labels) else most
    return most + 1
