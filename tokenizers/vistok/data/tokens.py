"""Read folders of tokens, as `vistok tokenize` writes them.

A folder has `manifest.json`, which says what the ids mean, and one safetensors file for each shard
of images: flat arrays that are mapped, never loaded as a whole. The formats of other programs lie
next to them, in folders of their own.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import DataError
from vistok.core.files import parse_json, replacing
from vistok.core.terminal import counted
from vistok.data.token_shards import DTYPES, ShardArrays, file_sha256, open_shard, serialized

#: The form of the folders that are written today.
FORMAT = 1

MANIFEST = "manifest.json"

#: How often each id occurs: a safetensors file of one row for each stream.
HISTOGRAM = "histogram.safetensors"

_KIND = "vistok-tokens"


@dataclass(frozen=True)
class TokenSample:
    """The tokens of one picture.

    Attributes:
        ids: `(n, Q)` int64, each stream counting from 0.
        label: number of its class, if it has one.
        caption: its text, if it has one.
        key: name of the image among those that were tokenized.
        view: which crop or flip of the image this is, from 0.
    """

    ids: np.ndarray
    label: int | None
    caption: str | None
    key: str
    view: int = 0


class TokenFolder:
    """Samples by number: an image's views follow one another, in the order of the images.

    A shard is opened when it is first asked for; then its checksum and the range of its ids are
    compared with the manifest. Objects can be sent to other processes, which open their own.

    Args:
        path: a folder with `manifest.json`.
        verify: compare checksums and ranges; without, sizes alone are compared.
        manifest: of the folder, where it is not written yet; None reads it.

    Attributes:
        manifest: `format`, `tokenizer_hash`, `num_tokens` (N, the most that a sample has),
            `num_streams` (Q), `streams` (each with `name`, `size` and `offset` in the joint
            vocabulary), `special` and `classes` (first id and count of the class tokens) of that
            vocabulary, `vocabulary_size`, `order`, `grid` (rows and columns, or None), `scales`,
            `lengths` ("fixed" or "variable"), `labels` and `captions` (whether samples have them),
            `class_names`, `views`, `dtype`, `counts`, and `shards` (each with `name`, `samples`,
            `tokens`, `bytes` and `sha256`).

    Raises:
        DataError: if there is no manifest, it is damaged or newer than this program, or a shard
            is missing or of another size.
    """

    def __init__(
        self, path: str | Path, verify: bool = True, manifest: dict[str, Any] | None = None
    ) -> None:
        self.path = Path(path).expanduser()
        self.manifest = read_manifest(self.path) if manifest is None else manifest
        self.verify = verify
        shards = self.manifest["shards"]
        for shard in shards:
            self._check_file(shard["name"], shard["bytes"])
        self._ends = np.cumsum([shard["samples"] for shard in shards]).tolist()
        self._open: dict[int, ShardArrays] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> TokenSample:
        """Return a sample; negative numbers count from the end.

        Raises:
            IndexError: if there are fewer samples.
            DataError: if the shard is damaged.
        """
        shard, row = self._locate(index)
        arrays = self.shard(shard)
        label = int(arrays.labels[row])
        return TokenSample(
            np.asarray(arrays.tokens(row), dtype=np.int64),
            None if label < 0 else label,
            arrays.caption(row),
            arrays.key(row),
            int(arrays.views[row]),
        )

    def ids(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return `(B, N, Q)` int64 of samples, zeros behind those that are shorter than N."""
        shape = len(indices), self.manifest["num_tokens"], self.manifest["num_streams"]
        batch = np.zeros(shape, dtype=np.int64)
        for place, index in enumerate(indices):
            shard, row = self._locate(int(index))
            found = self.shard(shard).tokens(row)
            batch[place, : len(found)] = found
        return batch

    def lengths(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return `(B,)` int64, the numbers of tokens of samples."""
        places = [self._locate(int(index)) for index in indices]
        return np.array([self.shard(s).length(row) for s, row in places], dtype=np.int64)

    def labels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return `(B,)` int64, the classes of samples; -1 for none."""
        places = [self._locate(int(index)) for index in indices]
        return np.array([self.shard(s).labels[row] for s, row in places], dtype=np.int64)

    def check_tokenizer(self, tokenizer_hash: str, model: str | Path = "model") -> None:
        """Raise if the tokens were made by another tokenizer.

        Args:
            tokenizer_hash: of the export at hand.
            model: its place, for the message.
        """
        if self.manifest["tokenizer_hash"] != tokenizer_hash:
            raise DataError(
                f"{self.path}: tokens of another tokenizer ({self.manifest['tokenizer_hash'][:12]})"
                f" than {model} ({tokenizer_hash[:12]}); use the export they were made with"
            )

    def shard(self, number: int) -> ShardArrays:
        """Return the arrays of a shard, checked when it is opened for the first time."""
        if number not in self._open:
            entry = self.manifest["shards"][number]
            arrays = open_shard(self.path / entry["name"], self._sizes())
            if self.verify:
                arrays.verify(entry["sha256"])
            if (len(arrays), arrays.num_tokens) != (entry["samples"], entry["tokens"]):
                raise DataError(
                    f"{arrays.path}: has {counted(len(arrays), 'sample')} of "
                    f"{counted(arrays.num_tokens, 'token')}, but {MANIFEST} says "
                    f"{entry['samples']} of {entry['tokens']}; copy it again"
                )
            self._open[number] = arrays
        return self._open[number]

    def close(self, number: int) -> None:
        """Give the map of a shard back; asking for it opens it again."""
        self._open.pop(number, None)

    def _sizes(self) -> list[int]:
        return [stream["size"] for stream in self.manifest["streams"]]

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the shard of a sample and its row in it."""
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._ends, number)
        return shard, number - (self._ends[shard - 1] if shard else 0)

    def _check_file(self, name: str, size: int) -> None:
        path = self.path / name
        if not path.is_file():
            raise DataError(f"{path}: missing; {MANIFEST} names it")
        if path.stat().st_size != size:
            raise DataError(
                f"{path}: has {path.stat().st_size} bytes, but {MANIFEST} says {size}; copy it "
                "again, or make it anew with the command that wrote the folder"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a map would be sent as a copy of its file


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of tokens, its values checked.

    Raises:
        DataError: see `TokenFolder`.
    """
    path = folder / MANIFEST
    try:
        found = parse_json(path.read_bytes())
    except FileNotFoundError:
        if not folder.exists():
            raise DataError(f"{folder}: no such folder") from None
        raise DataError(
            f"{folder}: has no {MANIFEST}; not a folder of tokens, or vistok tokenize has not "
            "finished it: run its command again"
        ) from None
    except NotADirectoryError:
        raise DataError(f"{folder}: not a folder of tokens") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not valid JSON ({reason})") from None
    if not isinstance(found, dict) or found.get("kind") != _KIND:
        raise DataError(f'{path}: not of a folder of tokens; expected "kind": "{_KIND}"')
    number = found.get("format")
    if not (isinstance(number, int) and _whole(number, 1)):
        raise DataError(f"{path}: format: expected a whole number, 1 to {FORMAT}, found {number!r}")
    if number > FORMAT:
        raise DataError(
            f"{path}: written in format {number} by a newer vistok, and this one reads formats up "
            f"to {FORMAT}; update vistok"
        )
    for key, (wanted, is_right) in _RULES.items():
        if not is_right(found.get(key)):
            told = json.dumps(found.get(key), default=str)[:60]
            raise DataError(f"{path}: {key}: expected {wanted}, found {told}")
    offset = 0
    for stream in found["streams"]:
        if stream["offset"] != offset:
            raise DataError(f"{path}: streams: offset {stream['offset']} must be {offset}")
        offset += stream["size"]
    if len(found["streams"]) != found["num_streams"]:
        raise DataError(f"{path}: num_streams: expected {len(found['streams'])}, one per stream")
    return found


#: How a model may read the tokens; as `Tokenizer.token_order`.
ORDERS = ("raster", "nested", "holistic", "unordered", "next_scale")


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**62


def _name(value: Any) -> bool:
    # A file of the folder itself, wherever the folder is.
    return isinstance(value, str) and bool(value) and Path(value).name == value


def _is_shard(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _name(value.get("name"))
        and all(_whole(value.get(key)) for key in ("samples", "tokens", "bytes"))
        and isinstance(value.get("sha256"), str)
    )


def _is_stream(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and _whole(value.get("size"), 1)
        and _whole(value.get("offset"))
    )


def _is_grid(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(_whole(side, 1) for side in value))


_RULES = {
    "tokenizer_hash": ("a text", lambda v: isinstance(v, str)),
    "num_tokens": ("a whole number of at least 1", lambda v: _whole(v, 1)),
    "num_streams": ("a whole number of at least 1", lambda v: _whole(v, 1)),
    "vocabulary_size": ("a whole number of at least 1", lambda v: _whole(v, 1)),
    "streams": (
        "a list of streams, each with a name, a size and an offset",
        lambda v: isinstance(v, list) and bool(v) and all(map(_is_stream, v)),
    ),
    "special": (
        "numbers by name",
        lambda v: isinstance(v, dict) and all(_whole(number) for number in v.values()),
    ),
    "order": (f"one of {', '.join(ORDERS)}", lambda v: v in ORDERS),
    "grid": ("rows and columns, or null", _is_grid),
    "lengths": ("fixed or variable", lambda v: v in ("fixed", "variable")),
    "dtype": (f"one of {', '.join(DTYPES)}", lambda v: v in DTYPES),
    "shards": (
        "a list of shards, each with a name, samples, tokens, bytes and sha256",
        lambda v: isinstance(v, list) and all(map(_is_shard, v)),
    ),
}


def smallest_dtype(largest: int) -> np.dtype:
    """Return the smallest unsigned type that holds `largest`.

    Raises:
        DataError: if 32 bits do not.
    """
    for name in DTYPES:
        if largest <= np.iinfo(name).max:
            return np.dtype(name)
    raise DataError(
        f"ids up to {largest} ({math.ceil(math.log2(largest + 1))} bits): tokens are stored in 32 "
        "bits at most; use a tokenizer with smaller codebooks in more streams"
    )


def finish_folder(folder: Path, names: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of shards that are whole, and with it make them a folder of tokens.

    Equal shards and values give equal bytes, whoever wrote them.

    Args:
        folder: with the shards in it.
        names: of their files, in order.
        values: of the manifest, without `shards`, `counts`, `usage` and `histogram`.

    Returns:
        The manifest.
    """
    manifest = describe_shards(folder, names, values)
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, whole or not at all."""
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")


def describe_shards(folder: Path, names: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of shards that are whole, as `finish_folder` writes it."""
    sizes = [stream["size"] for stream in values["streams"]]
    histograms = [np.zeros(size, dtype=np.int64) for size in sizes]
    shards, left_out = [], 0
    for name in names:
        arrays = open_shard(folder / name, sizes)
        for begin in range(0, len(arrays.flat), 1 << 22):
            part = arrays.flat[begin : begin + (1 << 22)]
            for stream, histogram in enumerate(histograms):
                histogram += np.bincount(part[:, stream], minlength=len(histogram))
        left_out += len(arrays.left_out)
        shards.append(
            {
                "name": name,
                "samples": len(arrays),
                "tokens": arrays.num_tokens,
                "bytes": arrays.path.stat().st_size,
                "sha256": file_sha256(arrays.path),
            }
        )
    counts = {key: sum(shard[key] for shard in shards) for key in ("samples", "tokens")}
    with replacing(folder / HISTOGRAM) as file:
        file.write(serialized({f"stream.{q}": h for q, h in enumerate(histograms)}, {}))
    return {
        "kind": _KIND,
        "format": FORMAT,
        **values,
        "counts": {**counts, "left_out": left_out},
        "usage": [_usage(histogram) for histogram in histograms],
        "histogram": {"name": HISTOGRAM, "sha256": file_sha256(folder / HISTOGRAM)},
        "shards": shards,
    }


def _usage(histogram: np.ndarray) -> dict[str, float]:
    """Return how many codes of a stream are in use, and the entropy of their frequencies."""
    shares = histogram[histogram > 0] / max(1, histogram.sum())
    # Rounded: sums of logarithms differ in their last digits between processors.
    entropy = round(float(-(shares * np.log2(shares)).sum()), 6)
    return {"codes": len(shares), "entropy_bits": entropy}
