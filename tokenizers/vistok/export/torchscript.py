"""Read the tensors of TorchScript archives without running their code."""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Return whether a file is an archive of `torch.jit.save`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a module by name, buffers that a state dict leaves out as well.

    `torch.jit.load` would run the archive's code. Here its objects are read as plain ones with
    attributes, its code is not looked at, and its tensors are views of the archive's bytes.

    Raises:
        UnpicklingError: if the archive names anything else than modules and tensors.
        OSError, ValueError, KeyError, RuntimeError: if it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        record = next(name for name in archive.namelist() if name.endswith("/constants.pkl"))
        root = _Reader(archive, record.removesuffix("constants.pkl")).load()
    tensors: dict[str, Tensor] = {}
    _gather(root, "", tensors, 0)
    return tensors


class _Object:
    """Stands for an object of the archive: keeps its attributes and does nothing."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Reader(pickle.Unpickler):
    """Knows modules, tensors and lists of numbers, and refuses any other name."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self.archive, self.folder = archive, folder
        super().__init__(io.BytesIO(self.part("data.pkl")))

    def part(self, name: str) -> bytes:
        """Return the bytes of a part, which take no more room than in the file."""
        entry = self.archive.getinfo(f"{self.folder}{name}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"part {name} is compressed, and torch's are not")
        return self.archive.read(entry)

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (_Object,), {})
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle" and name.startswith(("build_", "restore_")):
            return lambda values, *_: values
        raise pickle.UnpicklingError(f"names {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        content = self.part(f"data/{key}")
        values = (
            torch.frombuffer(bytearray(content), dtype=dtype)
            if content
            else torch.empty(0, dtype=dtype)
        )
        if len(values) != count:
            raise ValueError(f"part {key} is cut short")
        return values


def _gather(found: Any, prefix: str, tensors: dict[str, Tensor], depth: int) -> None:
    if depth > 100:
        raise ValueError("modules in one another without an end")
    for name, value in getattr(found, "attributes", {}).items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, _Object):
            _gather(value, f"{prefix}{name}.", tensors, depth + 1)
