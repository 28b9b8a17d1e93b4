"""Tokenize units of images: what one worker does.

The file of a unit is a function of its images, the tokenizer and the settings in the plan: batches
are formed inside a unit, in its order, so that no worker, restart or share of work changes a byte.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vistok.core.errors import DataError
from vistok.data.decode import DecodeError, decode
from vistok.data.fields import candidates
from vistok.data.sources import Source
from vistok.data.token_shards import ShardRows, open_shard, write_shard
from vistok.export.formats.base import Alphabet, Layout
from vistok.export.units import Units, claimed, order_of
from vistok.export.views import Views
from vistok.models.tokenizer import Tokenizer

#: Folder of the claims, which vanishes with the last of them.
CLAIMS = ".claims"

#: Images that a decoding thread reads before it hands them over, at most.
_TOGETHER = 16


@dataclass
class Progress:
    """What a worker has done since it began.

    Attributes:
        images: tokenized, and left out.
        units: done.
        seconds: spent in units.
        waited: of these, spent waiting for pictures.
    """

    images: int = 0
    units: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class _Picture(NamedTuple):
    key: str
    label: int
    caption: str | None
    views: Tensor | str  # (A, h, w, C) uint8; a text says why there are none


@dataclass
class Worker:
    """Tokenizes units.

    Args:
        out: folder of tokens.
        tokenizer: in eval mode, on its device.
        units: the images.
        views: of each.
        plan: of the run; `digest` is the identity of the whole.
        values: of the manifest, as far as they are known.
        layouts: to write along with each unit.
        decode_threads: that read and decode ahead.
        captions: whether to take the images' texts along.
        told: of the progress, after each batch and each unit.
    """

    out: Path
    tokenizer: Tokenizer
    units: Units
    views: Views
    plan: dict[str, Any]
    values: dict[str, Any]
    layouts: list[Layout]
    decode_threads: int = 2
    captions: bool = False
    told: Callable[[Progress], None] = lambda progress: None
    progress: Progress = field(default_factory=Progress)
    _opened: dict[int, Future[tuple[Source, range]]] = field(default_factory=dict)

    @property
    def alphabet(self) -> Alphabet:
        """Return the vocabulary of the ids."""
        return Alphabet.of(self.values)

    def run(self, number: int, count: int) -> None:
        """Do all units that are not done and that nobody else is doing.

        Args:
            number: of this worker.
            count: of workers.
        """
        with ThreadPoolExecutor(self.decode_threads) as pool:
            following = list(order_of(len(self.units), number, count))
            following.reverse()
            while following:
                unit = following.pop()
                if self.is_done(unit):
                    continue
                with claimed(self.out / CLAIMS, unit_name(unit)) as mine:
                    if mine and not self.is_done(unit):
                        self._do(unit, pool, following[-1:])
                        self.progress.units += 1
                        self.told(self.progress)

    def is_done(self, unit: int) -> bool:
        """Return whether all files of a unit are there; their names appear when they are whole."""
        return all(path.exists() for path in self.files_of(unit))

    def files_of(self, unit: int) -> list[Path]:
        """Return the files of a unit, the tokens first."""
        name = unit_name(unit)
        others = [
            layout.file_of(self.out / layout.name, name)
            for layout in self.layouts
            if layout.per_shard
        ]
        return [self.out / f"{name}.safetensors", *others]

    def _do(self, unit: int, pool: ThreadPoolExecutor, then: list[int]) -> None:
        tokens, *_ = self.files_of(unit)
        begun = time.perf_counter()
        if not tokens.exists():
            rows = self._rows(unit, pool, then)
            notes = {"plan": self.plan["digest"], "unit": str(unit)}
            write_shard(tokens, rows, self.alphabet.sizes, self.plan["dtype"], notes)
        shard = open_shard(tokens, self.alphabet.sizes)
        if shard.notes.get("plan") != self.plan["digest"]:
            raise DataError(f"{tokens}: of another run than this folder; delete it")
        for layout in self.layouts:
            if layout.per_shard:
                path = layout.file_of(self.out / layout.name, tokens.stem)
                path.parent.mkdir(exist_ok=True)
                if not path.exists():
                    layout.write_shard(path, shard, self.alphabet)
        self.progress.seconds += time.perf_counter() - begun

    # ------------------------------------------------------------------ images to ids

    def _rows(self, unit: int, pool: ThreadPoolExecutor, then: list[int]) -> ShardRows:
        ahead, self._opened = self._opened, {}
        source, numbers = ahead[unit].result() if unit in ahead else self.units.open(unit)
        rows = ShardRows()
        waiting: list[Tensor] = []
        size = self.plan["batch_size"]
        for picture in self._pictures(source, numbers, pool):
            if not self._opened:  # behind the first images of this one
                self._opened = {other: pool.submit(self.units.open, other) for other in then}
            self.progress.images += 1
            if isinstance(picture.views, str):
                rows.left_out.append((picture.key, picture.views))
                continue
            for view, pixels in enumerate(picture.views):
                waiting.append(pixels)
                rows.labels.append(picture.label)
                rows.keys.append(picture.key)
                rows.views.append(view)
                rows.captions.append(picture.caption)
                if len(waiting) == size:
                    rows.ids += self.encode(torch.stack(waiting))
                    waiting = []
                    self.told(self.progress)
        if waiting:
            rows.ids += self.encode(torch.stack(waiting))
        return rows

    def _pictures(
        self, source: Source, numbers: range, pool: ThreadPoolExecutor
    ) -> Iterator[_Picture]:
        """Yield the pictures of a unit in order; some are read ahead, so memory is bounded."""
        ahead = 2 * self.plan["batch_size"]
        # Handing over single images would cost a small model a twentieth of its time.
        few = max(1, min(_TOGETHER, ahead // (4 * self.decode_threads)))
        parts = (numbers[begin : begin + few] for begin in range(0, len(numbers), few))
        futures: deque[Future[list[_Picture]]] = deque()
        try:
            for part in islice(parts, -(-ahead // few)):
                futures.append(pool.submit(self._read_all, source, part))
            while futures:
                begun = time.perf_counter()
                pictures = futures.popleft().result()
                self.progress.waited += time.perf_counter() - begun
                if (part := next(parts, None)) is not None:
                    futures.append(pool.submit(self._read_all, source, part))
                yield from pictures
        finally:
            for future in futures:
                future.cancel()

    def _read_all(self, source: Source, numbers: range) -> list[_Picture]:
        return [self._read(source, number) for number in numbers]

    def _read(self, source: Source, number: int) -> _Picture:
        key = source.keys[number].decode("utf-8", "surrogateescape")
        try:
            _, data, label = source.read(number)
            caption = self._caption(source, number) if self.captions else None
            views: Tensor | str = self.views(decode(data, self.tokenizer.channels))
        except DecodeError as error:
            return _Picture(key, -1, None, str(error))
        except OSError as error:
            return _Picture(key, -1, None, error.strerror or str(error))
        return _Picture(key, -1 if label is None else label, caption, views)

    @staticmethod
    def _caption(source: Source, number: int) -> str | None:
        for extension in candidates("caption"):
            data = source.read_other(number, extension)
            if data is not None:
                try:
                    return data.decode()
                except UnicodeDecodeError:
                    raise DecodeError(f".{extension} is not UTF-8 text") from None
        return None

    def encode(self, pictures: Tensor) -> list[np.ndarray]:
        """Return ids `(n, Q)` of each of `(B, h, w, C)` uint8."""
        images = pictures.permute(0, 3, 1, 2).contiguous()
        device = self.tokenizer.device
        half = self.plan["precision"] == "bf16"
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            if self.plan["psnr"] is None:
                ids, lengths = self.tokenizer.tokenize(images, self.plan["num_tokens"]), None
            else:
                ids, lengths = self.tokenizer.tokenize_to_target(images, psnr=self.plan["psnr"])
        found = ids.cpu().numpy()
        if lengths is None:
            return list(found)
        return [row[:length] for row, length in zip(found, lengths.tolist(), strict=True)]


def unit_name(unit: int) -> str:
    """Return the name of the files of a unit, without ending."""
    return f"tokens-{unit:06d}"
