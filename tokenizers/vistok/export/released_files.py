"""Read files of released weights: bare ones, folders of Hugging Face, checkpoints of Lightning."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vistok.core.errors import CheckpointError
from vistok.core.files import parse_json
from vistok.core.released_weights import Published
from vistok.export.torchscript import is_torchscript, read_torchscript

#: Where training checkpoints keep weights, the averaged ones first.
_WEIGHTS = ("ema", "state_dict_ema", "ema_state_dict", "model", "state_dict")

#: Packages whose objects checkpoints of training carry along; each is read as an empty one.
_HARMLESS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "torchmetrics.")

#: Names that wrappers of parallel and compiled training put in front.
_WRAPPERS = ("module.", "_orig_mod.")


#: What reading a damaged file may raise.
_DAMAGED = (OSError, RuntimeError, EOFError, SafetensorError, ValueError, LookupError, TypeError)


def read_released(path: Path, source: str = "") -> Published:
    """Return the tensors of a file or folder by their published names. No code in it is run.

    Args:
        path: a `.safetensors` file, one of `torch.save` or `torch.jit.save`, or a folder of
            Hugging Face with `model.safetensors` or its index. Of a training checkpoint the
            averaged weights are taken, if it has some.
        source: the importer's name, for errors.

    Raises:
        CheckpointError: if it cannot be read, or holds no tensors by name.
    """
    if path.is_dir():
        return _read_folder(path, source)
    if not path.is_file():
        raise CheckpointError(f"weights={path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            return Published(load_file(path), metadata, source)
        content = read_torchscript(path) if is_torchscript(path) else _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"weights={path}: refused; it contains more than tensors and plain values, or is "
            "damaged"
        ) from error
    except Exception as error:  # other files make torch.load raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"weights={path}: cannot be read ({reason})") from error
    tensors = _averaged(content) if isinstance(content, dict) else None
    if tensors is None:
        raise CheckpointError(f"weights={path}: not a plain state_dict of names and tensors")
    return Published(tensors, source=source)


def read_said(path: Path) -> dict[str, str]:
    """Return the keys of the authors' config, JSON or YAML, with values as Python writes them.

    Raises:
        CheckpointError: if it cannot be read, or is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"config={path}: cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"config={path}: must be JSON or YAML with keys and values")
    return {str(key): str(value) for key, value in content.items()}


def _read_folder(folder: Path, source: str) -> Published:
    index = folder / "model.safetensors.index.json"
    try:
        names = [folder / "model.safetensors"]
        if index.is_file():
            shards = parse_json(index.read_text())["weight_map"].values()
            # Of their names alone: what they say of other folders does not count.
            names = [folder / Path(name).name for name in sorted(set(shards))]
        elif not names[0].is_file():
            names = sorted(folder.glob("*.safetensors"))
        if len(names) != 1 and not index.is_file():
            raise CheckpointError(
                f"weights={folder}: found {len(names)} .safetensors files; name the one to read"
            )
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= load_file(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"weights={folder}: cannot be read ({reason})") from error
    return Published(tensors, source=source)


class _Inert:
    """Stands for an object of a training framework: takes anything, keeps and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


@contextmanager
def _inert_objects(path: Path) -> Iterator[None]:
    """Let objects of known training frameworks be read as `_Inert`."""
    names = []
    if _is_zip(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    harmless = [(_Inert, name) for name in names if name.startswith(_HARMLESS)]
    with torch.serialization.safe_globals([Namespace, *harmless]):
        yield


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _load_pickle(path: Path) -> Any:
    with _inert_objects(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def _averaged(content: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The weights of a checkpoint, averaged ones if there are some; None if it has no weights."""
    for name in _WEIGHTS:
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    tensors = dict(content)
    pairs = tensors.items()
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in pairs):
        return None
    if not tensors:
        return None
    for wrapper in _WRAPPERS * 2:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return _without_dots(tensors)


def _without_dots(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averages of Stable Diffusion's `LitEma` in place of the weights they are averages of.

    They are in a part `model_ema`, by the names of the weights without their dots. Buffers and
    frozen weights have no average.
    """
    averages = {name: value for name, value in tensors.items() if name.startswith("model_ema.")}
    live = {name: value for name, value in tensors.items() if name not in averages}
    return {
        name: averages.get(f"model_ema.{name.replace('.', '')}", value)
        for name, value in live.items()
    }
