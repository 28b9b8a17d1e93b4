"""Fields of a sample in addition to image and label: captions and precomputed embeddings.

A field is chosen by name (`data.fields=[caption,clip]`). `caption` is the sample's member `.txt`,
`embedding` its `.npy` or `.safetensors`, and any other name X is `.X.npy`, `.X.safetensors` or
`.X.txt`. Arrays are read without unpickling anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ConfigError, DataError
from vistok.data.arrays import array_of
from vistok.data.decode import DecodeError
from vistok.data.names import shown
from vistok.data.sources import Source

RESERVED = ("image", "key", "label", "index", "valid", "skipped")  # keys of every batch

_LONGEST_TEXT = 1 << 20  # bytes

_LOOKED_AT = 100  # samples in which a field is looked for, to learn what it is


def candidates(name: str) -> tuple[str, ...]:
    """Return the extensions of the members that a field may be, in the order of preference."""
    if name == "caption":
        return ("txt", "caption.txt", "caption")
    if name == "embedding":
        return ("npy", "safetensors", "embedding.npy", "embedding.safetensors")
    return (f"{name}.npy", f"{name}.safetensors", f"{name}.txt")


class Field:
    """One field of a source: text, or arrays of one shape and type.

    Args:
        name: as chosen; the batch's key.
        source: looked at to learn which member the field is, and the shape of its arrays.

    Raises:
        DataError: if no sample has it, or the first array cannot be read.
    """

    def __init__(self, name: str, source: Source):
        self.name = name
        broken = ""
        for index in range(min(len(source), _LOOKED_AT)):
            for extension in candidates(name):
                data = source.read_other(index, extension)
                if data is None:
                    continue
                self.extension, self.like = extension, None
                try:
                    if extension.endswith(("npy", "safetensors")):
                        self.like = torch.zeros_like(_array(data, extension))
                    return
                except ValueError as error:
                    broken = broken or f"{shown(bytes(source.keys[index]))}.{extension} {error}"
        if broken:
            raise DataError(f"data.fields={name}: {source.name}: {broken}")
        there = ", ".join(f".{shown(extension)}" for extension in source.others)
        raise DataError(
            f"data.fields={name}: {source.name} has no member"
            f" {' or '.join(f'.{e}' for e in candidates(name))}"
            + (f"; it has {there}" if there else "")
            + "; data.fields=[] reads none"
        )

    def read(self, source: Source, index: int) -> Any:
        """Return the field of one sample: str, or a tensor.

        Raises:
            DecodeError: if the sample lacks it, or it is of another shape or type.
        """
        data = source.read_other(index, self.extension)
        if data is None:
            raise DecodeError(f"has no member .{self.extension}", f"no {self.name}")
        if self.like is None and len(data) > _LONGEST_TEXT:
            raise DecodeError(
                f".{self.extension} has {len(data)} bytes; a text has {_LONGEST_TEXT} at most",
                f"damaged {self.name}",
            )
        try:
            if self.like is None:
                return data.decode()
            value = _array(data, self.extension)
        except UnicodeDecodeError:
            raise DecodeError(
                f".{self.extension} is not UTF-8 text", f"damaged {self.name}"
            ) from None
        except ValueError as error:
            raise DecodeError(f".{self.extension} {error}", f"damaged {self.name}") from None
        if value.shape != self.like.shape or value.dtype != self.like.dtype:
            raise DecodeError(
                f".{self.extension} is {_text(value)}, not {_text(self.like)}", f"other {self.name}"
            )
        return value

    def collate(self, values: Sequence[Any]) -> Any:
        """Return the field of a batch, None for padding: list of str, or one tensor `(B, ...)`."""
        if self.like is None:
            return ["" if value is None else value for value in values]
        return torch.stack([self.like if value is None else value for value in values])


def check_names(names: Any) -> tuple[str, ...]:
    """Return the chosen fields.

    Raises:
        ConfigError: if they are not a list of names, or one is a batch's own.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ConfigError(
            f"data.fields={names!r}: must be a list, for example data.fields=[caption]"
        )
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name):
            raise ConfigError(f"data.fields: {name!r} is not a valid name; use a-z, 0-9 and _")
        if name in RESERVED:
            raise ConfigError(f"data.fields: every batch has {name!r} anyway; leave it out")
    return tuple(names)


def _array(data: bytes, extension: str) -> Tensor:
    """Read an array from bytes; a ValueError says in a few words why that fails."""
    if extension.endswith("npy"):
        array = array_of(data)
        if array.dtype.kind not in "biufc":
            raise ValueError("is not a readable array of numbers")
        try:
            # Torch knows its own byte order alone, and arrays that it may write to.
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        except TypeError:
            raise ValueError(f"is an array of {array.dtype}, which torch does not have") from None
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = list(load(data).values())
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError):
        raise ValueError("is not a readable safetensors file") from None
    if len(tensors) != 1:
        raise ValueError(f"contains {len(tensors)} tensors; expected one")
    return tensors[0]


def _text(array: Tensor) -> str:
    return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"
