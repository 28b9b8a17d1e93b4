"""Pairs of originals and reconstructions, wherever they come from: a tokenizer, or two folders."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from vistok.core import ranks
from vistok.core.errors import DataError
from vistok.core.terminal import counted
from vistok.data.crops import text as size_text
from vistok.data.decode import DecodeError, decode
from vistok.data.folders import FolderSource
from vistok.data.skipped import Skip
from vistok.data.sources import Source
from vistok.data.transforms import Transform
from vistok.evaluation.protocol import reference_hash, stem
from vistok.evaluation.robustness import Perturbation, Setting
from vistok.metrics.image import to_uint8
from vistok.models.tokenizer import Tokenizer


@dataclass
class Pairs:
    """A batch of originals, and what became of them.

    Attributes:
        numbers: places in the set that is measured.
        keys: names.
        originals: `(B, C, H, W)` uint8.
        reconstructions: likewise, by number of tokens; by 0 where there are no tokens.
        indices: `(B, N, Q)` ids of all tokens, or None.
        labels: `(B,)` classes, -1 for none.
        perturbed: reconstructions from perturbed tokens, by strength, where that is measured.
    """

    numbers: list[int]
    keys: list[str]
    originals: Tensor
    reconstructions: dict[int, Tensor]
    indices: Tensor | None = None
    labels: list[int] = field(default_factory=list)
    perturbed: dict[Setting, Tensor] = field(default_factory=dict)


class PairSource(Protocol):
    """Pairs in batches, each image once over all ranks.

    Attributes:
        budgets: numbers of tokens to reconstruct from, rising; the last one has all. `[0]` where
            there are no tokens.
        num_images: images there are, over all ranks.
        num_batches: of this rank.
        pick_size: how many images `pick` takes at a time, at most.
        skips: (key, reason, cause) of each image of this rank that could not be used.
        seconds: spent on encoding and decoding by this process, and `done`, of how many images.
    """

    budgets: list[int]
    num_images: int
    num_batches: int
    pick_size: int
    skips: list[tuple[str, str, str]]
    seconds: float
    done: int

    def restore(self, skips: Sequence[tuple[str, str, str]]) -> None:
        """Take note of images that an evaluation could not use before it was killed."""
        ...

    def batches(self, first: int = 0) -> Iterator[Pairs]:
        """Yield the batches of this rank, without the first ones."""
        ...

    def pick(self, numbers: Sequence[int]) -> Pairs:
        """Return some images by their places, whichever rank asks."""
        ...


class TokenizerPairs:
    """What a tokenizer makes of the validation images of a DataModule.

    Args:
        tokenizer: in eval mode.
        data: set up.
        budgets: numbers of tokens to measure in addition to all of them.
        sampling: further arguments of `detokenize`.
        autocast: what the networks run in.
        perturbation: of the tokens, whose reconstructions are measured as well; None for none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Any,
        budgets: Sequence[int] = (),
        sampling: dict[str, Any] | None = None,
        autocast: AbstractContextManager | None = None,
        perturbation: Perturbation | None = None,
    ) -> None:
        self.tokenizer, self.data, self.sampling = tokenizer, data, sampling or {}
        self.perturbation = perturbation
        self.budgets = sorted({*budgets, tokenizer.num_tokens})
        self.autocast = autocast or nullcontext()
        self.num_images, self.pick_size = data.num_val, data.eval_batch_size
        self.num_batches = len(data.val_dataloader().batch_sampler)
        members = data.val_set.members
        places = np.arange(data.num_val) if members is None else members
        self._number = {int(index): number for number, index in enumerate(places)}
        self.skips: list[tuple[str, str, str]] = []
        self.seconds, self.done = 0.0, 0

    def restore(self, skips: Sequence[tuple[str, str, str]]) -> None:
        """Take note of images that an evaluation could not use before it was killed."""
        self.skips = [(key, reason, cause) for key, reason, cause in skips]
        self.data.skipped.record([Skip(*skip) for skip in self.skips], training=False)

    def batches(self, first: int = 0) -> Iterator[Pairs]:
        """Yield the batches of this rank, without the first ones."""
        for batch in self.data.val_dataloader(first):
            self.skips += [tuple(skip) for skip in batch["skipped"]]
            yield self._reconstruct(batch, self.perturbation)

    def pick(self, numbers: Sequence[int]) -> Pairs:
        """Return some images by their places."""
        return self._reconstruct(self.data.val_set.__getitems__([(0, n) for n in numbers]))

    @torch.no_grad()
    def _reconstruct(
        self, batch: dict[str, Any], perturbation: Perturbation | None = None
    ) -> Pairs:
        tokenizer, valid = self.tokenizer, batch["valid"]
        kept = valid.nonzero().flatten().tolist()
        numbers = [self._number[int(batch["index"][i])] for i in kept]
        images = batch["image"][valid].to(tokenizer.device)
        conditions = {
            name: value[valid.to(value.device)]
            for name, value in tokenizer.conditions_of(batch).items()
        }
        reconstructions: dict[int, Tensor] = {}
        perturbed: dict[Setting, Tensor] = {}
        indices = torch.zeros(0, tokenizer.num_tokens, tokenizer.quantizer.num_indices).long()
        if kept:
            begun = time.perf_counter()
            with self.autocast:
                indices = tokenizer.tokenize(images)
                for budget in reversed(self.budgets):
                    given = {**self.sampling, **conditions}
                    if budget < tokenizer.num_tokens:
                        given["num_tokens"] = budget
                    reconstructions[budget] = to_uint8(tokenizer.detokenize(indices, **given))
                    if budget == tokenizer.num_tokens:
                        if images.device.type == "cuda":
                            torch.cuda.synchronize()
                        self.seconds += time.perf_counter() - begun
                        self.done += len(kept)
                if perturbation is not None:
                    for setting, ids in perturbation.perturbed(indices, numbers):
                        pictures = tokenizer.detokenize(ids, **self.sampling, **conditions)
                        perturbed[setting] = to_uint8(pictures)
        else:
            for budget in self.budgets:
                reconstructions[budget] = images
            for setting in perturbation.settings if perturbation is not None else []:
                perturbed[setting] = images
        return Pairs(
            numbers,
            [batch["key"][i] for i in kept],
            images,
            reconstructions,
            indices,
            [int(batch["label"][i]) for i in kept],
            perturbed,
        )


class FolderPairs:
    """Originals, and the reconstructions that another program wrote, matched by their names.

    A reconstruction belongs to the original of the same path without its extension, else of the
    same file name without it. Images of any size are taken, a batch holding those of one size.

    Args:
        originals: where the originals are.
        folder: of the reconstructions.
        channels: 1, 3 or 4.
        batch_size: images in a batch, at most.
        transform: what the originals go through first; None takes them as they are.
        device: where the batches go.

    Raises:
        DataError: if there is nothing to measure, a name is missing or ambiguous, or the two
            images of a pair differ in size.
    """

    def __init__(
        self,
        originals: Source,
        folder: str,
        channels: int,
        batch_size: int,
        transform: Transform | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.originals, self.channels, self.transform = originals, channels, transform
        self.batch_size, self.device = batch_size, device
        self.reconstructions = FolderSource(folder, "images", [])
        self.members = _matched(originals, self.reconstructions, folder)
        # The protocol leaves out the reconstructions, and a folder may get others after a kill.
        self.identity = reference_hash(
            map(os.fsdecode, self.reconstructions.keys), map(int, self.reconstructions.sizes)
        )
        self.budgets, self.num_images, self.pick_size = [0], len(self.members), 1
        shapes = [self._checked_shape(pair) for pair in self.members]
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, shape in enumerate(shapes):
            by_size.setdefault(shape, []).append(number)
        self.shapes = sorted(by_size)
        chunks = [
            numbers[start : start + batch_size]
            for _, numbers in sorted(by_size.items())
            for start in range(0, len(numbers), batch_size)
        ]
        self._chunks = chunks[ranks.rank() :: ranks.world_size()]
        self.num_batches = len(self._chunks)
        self.skips: list[tuple[str, str, str]] = []
        self.seconds, self.done = 0.0, 0

    def restore(self, skips: Sequence[tuple[str, str, str]]) -> None:
        """Do nothing: an image that cannot be used ends the evaluation."""

    def batches(self, first: int = 0) -> Iterator[Pairs]:
        """Yield the batches of this rank, without the first ones."""
        for numbers in self._chunks[first:]:
            yield self.pick(numbers)

    def pick(self, numbers: Sequence[int]) -> Pairs:
        """Return some images of one size by their places."""
        loaded = [self._load(self.members[number]) for number in numbers]
        first, second = (
            torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(self.device)
            for arrays in zip(*[(a, b) for a, b, _ in loaded], strict=True)
        )
        keys = [os.fsdecode(self.originals.keys[self.members[n][0]]) for n in numbers]
        labels = [label for _, _, label in loaded]
        return Pairs(list(numbers), keys, first, {0: second}, None, labels)

    def _checked_shape(self, pair: tuple[int, int]) -> tuple[int, int]:
        """Return the size of a pair; what cannot be measured shows at the start."""
        original, reconstruction = pair
        shape = _shape(self.reconstructions, reconstruction)
        own = self.transform.size if self.transform else _shape(self.originals, original)
        if tuple(own) != shape:
            name = os.fsdecode(self.reconstructions.keys[reconstruction])
            height, width = shape
            remedy = (
                f"data.image_size=[{height},{width}] cuts the originals to it"
                if self.transform
                else f"data.val_crop=adm_center data.image_size=[{height},{width}] cuts originals"
            )
            raise DataError(
                f"images={self.reconstructions.name}: {name} is {size_text(shape)}, but its "
                f"original is {size_text(own)}; the two must be of one size ({remedy})"
            )
        return shape

    def _load(self, pair: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
        (original, label), (reconstruction, _) = (
            self._decoded(source, index)
            for source, index in zip((self.originals, self.reconstructions), pair, strict=True)
        )
        if self.transform is not None:
            target = torch.empty(*self.transform.size, self.channels, dtype=torch.uint8)
            try:
                self.transform.write(original, np.random.default_rng(0), target)
            except DecodeError as error:
                name = os.fsdecode(self.originals.keys[pair[0]])
                raise DataError(f"{self.originals.name}/{name}: {error}") from error
            original = target.numpy()
        return original, reconstruction, label

    def _decoded(self, source: Source, index: int) -> tuple[np.ndarray, int]:
        name = os.fsdecode(source.keys[index])
        try:
            _, data, label = source.read(index)
            return np.ascontiguousarray(decode(data, self.channels)), -1 if label is None else label
        except (DecodeError, OSError) as error:
            raise DataError(f"{source.name}/{name}: {error}") from error


def _shape(source: Source, index: int) -> tuple[int, int]:
    """Return height and width of an image, upright; its pixels are not decoded."""
    name = os.fsdecode(source.keys[index])
    try:
        with Image.open(io.BytesIO(source.read(index)[1])) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            width, height = image.size
            return (width, height) if turned else (height, width)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{source.name}/{name}: not an image, or damaged") from error


def _matched(originals: Source, reconstructions: Source, folder: str) -> list[tuple[int, int]]:
    """Return the places of each original and its reconstruction, in the originals' order."""
    wholes, names = _places(originals, stem), _places(originals, _name)
    found: dict[int, int] = {}
    for place, key in enumerate(map(os.fsdecode, reconstructions.keys)):
        candidates = wholes.get(stem(key)) or names.get(_name(key)) or []
        if not candidates:
            raise DataError(
                f"images={folder}: {key} has no original in {originals.name}; each reconstruction "
                "needs one of the same name, whatever its extension"
            )
        if len(candidates) > 1 or candidates[0] in found:
            raise DataError(
                f"images={folder}: {key} could belong to several originals, or its original has "
                f"two reconstructions; name them by their paths within {originals.name}"
            )
        found[candidates[0]] = place
    if len(found) < len(originals):
        missing = next(i for i in range(len(originals)) if i not in found)
        raise DataError(
            f"images={folder}: {counted(len(found), 'image')} for {len(originals)} originals; there"
            f" is none for {os.fsdecode(originals.keys[missing])}"
        )
    return sorted(found.items())


def _name(key: str) -> str:
    return stem(key).rpartition("/")[2]


def _places(source: Source, name: Any) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for index, key in enumerate(map(os.fsdecode, source.keys)):
        places.setdefault(name(key), []).append(index)
    return places


def source_name(source: Any) -> str:
    """Return what a source is called, as an absolute path where it is one."""
    name = str(source.name)
    return str(Path(name).absolute()) if Path(name).expanduser().exists() else name
