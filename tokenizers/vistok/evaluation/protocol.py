"""The protocol of a measurement: all that its numbers depend on besides the tokenizer, as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor, nn

from vistok.data.formats import IMAGE_EXTENSIONS

#: Of the protocol's own layout; it is hashed with the rest.
FORMAT = 2

ROUNDING = "clamped to [0, 1], then rounded to 8 bits"

#: How each crop policy resizes.
KERNELS = {
    "adm_center": "box halvings, then antialiased bicubic",
    "adm_random": "box halvings, then antialiased bicubic",
    "tv_center": "antialiased bicubic",
    "resize_random": "antialiased bicubic",
    "random_resized": "antialiased bicubic",
    "random": "none",
    "none": "none",
}


def stem(key: str) -> str:
    """Return a key without the extension of an image file: a folder and its shards agree."""
    path = PurePosixPath(key)
    known = path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
    return str(path.with_suffix("")) if known else key


def reference_hash(keys: Iterable[str], sizes: Iterable[int]) -> str:
    """Return the identity of a set of images, wherever they are and in whatever order.

    Args:
        keys: names; extensions of image files do not count.
        sizes: bytes of each image file.
    """
    lines = sorted(f"{stem(key)}\0{size}\n" for key, size in zip(keys, sizes, strict=True))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a protocol's canonical JSON: keys sorted, no spaces, ASCII."""
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(first: Any, second: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value, other value) of each field in which two protocols differ.

    A field that one of them lacks is `MISSING` there.
    """
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return [] if first == second and type(first) is type(second) else [(key, first, second)]
    found = []
    for name in sorted({*first, *second}):
        inner = f"{key}.{name}" if key else name
        found += differences(first.get(name, MISSING), second.get(name, MISSING), inner)
    return found


#: Stands for a field that is not there.
MISSING = "(not there)"


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's tensors, with their names, types and shapes."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, the same for any order and on any device."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
