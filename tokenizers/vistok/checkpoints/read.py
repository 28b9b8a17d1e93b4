"""Read checkpoints and exports: tensors and plain containers only."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.checkpoints.migrate import migrate_checkpoint, migrate_config
from vistok.checkpoints.seals import check_seal, checkpoint_files, is_checkpoint
from vistok.core.errors import CheckpointError, ConfigError


def read_checkpoint(path: Path, without: Iterable[str] = ()) -> dict[str, Any]:
    """The content of a checkpoint in today's form: tensors and plain containers only.

    Args:
        path: a file, or the folder of a sharded checkpoint, which is put together.
        without: names at the top level to leave out; of a sharded one they are not read.

    Raises:
        CheckpointError: if a file is damaged, or holds anything that would run code.
    """
    return read_parts(path, lambda pieces: torch.cat([piece for _, piece in pieces]), without)


def read_parts(
    path: Path, join: Callable[[list[tuple[int, Tensor]]], Any], without: Iterable[str] = ()
) -> dict[str, Any]:
    """Like `read_checkpoint`, with `join` to make something of the pieces of a sharded tensor.

    Args:
        path: a file or a folder.
        join: from (first row, rows) in order of the rows. Of a folder the rows are on the disk
            until they are looked at.
        without: names at the top level to leave out.
    """
    check_seal(path)
    files = checkpoint_files(path)
    contents = [_read_file(file, mmap=path.is_dir()) for file in files]
    for name in without:
        for content in contents:
            content.pop(name, None)
    return migrate_checkpoint(_joined(contents, join), path)


#: Marks a piece of a tensor in the file of a rank: {SHARD: rows, "first": number of the first}.
SHARD = "vistok.shard"


def _joined(parts: Sequence[Any], join: Callable[[list[tuple[int, Tensor]]], Any]) -> Any:
    """One content from those of the ranks; what is not sharded is the first one's."""
    first = parts[0]
    if isinstance(first, dict):
        if SHARD in first:
            pieces = [(part["first"], part[SHARD]) for part in parts]
            return join([piece for piece in pieces if len(piece[1])] or pieces[:1])
        return {key: _joined([part[key] for part in parts], join) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_joined(items, join) for items in zip(*parts, strict=True))
    return first


def _read_file(path: Path, mmap: bool) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain values, or is damaged"
        ) from error
    except Exception as error:  # other files make torch.load raise almost anything
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a whole checkpoint ({reason})") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path}: not a checkpoint of vistok (no state_dict in it)")
    return content


_HEAVY = ("state_dict", "optimizer_states", "ema")


def read_config(path: Path) -> dict[str, Any]:
    """The config of a checkpoint or an export folder, as plain containers."""
    if path.is_dir() and not is_checkpoint(path):
        return read_export(path)[0]
    content = read_checkpoint(path, without=_HEAVY)
    try:
        return content["hyper_parameters"]["config"]
    except KeyError as error:
        raise CheckpointError(f"{path}: not a checkpoint of vistok (no config in it)") from error


def read_weights(path: Path, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config of a checkpoint and the weights of its tokenizer.

    Args:
        path: a file, or the folder of a sharded checkpoint.
        weights: "ema" for the averaged weights where there are any, or "last" for the raw ones.
    """
    if weights not in ("ema", "last"):
        raise ConfigError(f"weights={weights}: must be 'ema' or 'last'")
    content = read_checkpoint(path, without=["optimizer_states"])
    try:
        config = content["hyper_parameters"]["config"]
    except KeyError as error:
        raise CheckpointError(f"{path}: not a checkpoint of vistok (no config in it)") from error
    if weights == "ema" and content.get("ema"):
        return config, content["ema"]["weights"]
    prefix = "tokenizer."
    state = {
        key[len(prefix) :]: value
        for key, value in content["state_dict"].items()
        if key.startswith(prefix)
    }
    return config, state


def read_export(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the weights of an export.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: {error.filename} is missing from the export") from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: damaged export ({error})") from error
    for part in ("tokenizer", "quantizer"):
        if not isinstance(config, dict) or part not in config:
            raise CheckpointError(f"{folder}/config.json: has no '{part}'")
    return migrate_config(config, folder / "config.json"), state
