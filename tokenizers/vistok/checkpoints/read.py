"""Read checkpoints and exports: tensors and plain containers only."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.checkpoints.migrate import migrate_checkpoint, migrate_config
from vistok.checkpoints.seals import check_seal, checkpoint_files, is_checkpoint, read_seal
from vistok.checkpoints.validate import check_config, check_content
from vistok.core.errors import CheckpointError, ConfigError
from vistok.core.files import parse_json


def read_checkpoint(path: Path, without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the content of a checkpoint in today's form: tensors and plain containers only.

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
    """Read a checkpoint as `read_checkpoint` does, and `join` the pieces of sharded tensors.

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
    try:
        content = migrate_checkpoint(_joined(contents, join), path)
    except CheckpointError:
        raise
    except Exception as error:  # forms that were never written make it raise almost anything
        raise CheckpointError(f"{path}: damaged ({_said(error)})") from error
    sealed = read_seal(path)
    if not path.is_dir():
        check_content(content, path, sealed[1] if sealed else None)
    return content


def _said(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


#: Marks a piece of a tensor in the file of a rank: {SHARD: rows, "first": number of the first}.
SHARD = "vistok.shard"


def _joined(parts: Sequence[Any], join: Callable[[list[tuple[int, Tensor]]], Any]) -> Any:
    """Merge the contents of the ranks; values that are not sharded are those of the first."""
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
            f"{path}: refused; it contains more than tensors and plain values, or is damaged"
        ) from error
    except Exception as error:  # other files make torch.load raise almost anything
        raise CheckpointError(f"{path}: not a complete checkpoint ({_said(error)})") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path}: not a vistok checkpoint (it has no state_dict)")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Return the config of a checkpoint or an export folder, as plain containers.

    Weights stay on the disk, and only the bytes that are read are compared with their checksum:
    who uses the weights reads them with one of the other functions, which compare all.

    Raises:
        CheckpointError: if the config is damaged or missing, or the file would run code.
    """
    if path.is_dir() and not is_checkpoint(path):
        return _export_config(path)
    first = checkpoint_files(path)[0]  # of a sharded checkpoint it has all that is not sharded
    if read_seal(path) is None:
        check_seal(path)  # raises
    mapped = zipfile.is_zipfile(first)  # what torch wrote since version 1.6
    if mapped:
        _check_all_but_tensors(first)
    return _config_in(_read_file(first, mmap=mapped), path)


def _check_all_but_tensors(path: Path) -> None:
    """Compare the checksum of the part of torch's file that says what is in it; torch does not.

    Raises:
        CheckpointError: if it differs.
    """
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                if name.endswith("/data.pkl"):
                    file.read(name)
    except Exception as error:  # damaged headers make it raise almost anything
        raise CheckpointError(f"{path}: damaged ({error})") from error


def _config_in(content: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        config = content["hyper_parameters"]["config"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a vistok checkpoint (it has no config)") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a vistok checkpoint (it has no config)")
    try:
        config = migrate_config(config, path)
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged; its config cannot be read") from error
    check_config(config, path)
    return config


def read_weights(
    path: Path, weights: str, model: str = "tokenizer"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config of a checkpoint and the weights of its model.

    Args:
        path: a file, or the folder of a sharded checkpoint.
        weights: "ema" for the averaged weights where there are any, or "last" for the raw ones.
        model: name of the model in its task.
    """
    if weights not in ("ema", "last"):
        raise ConfigError(f"weights={weights}: must be 'ema' or 'last'")
    content = read_checkpoint(path, without=["optimizer_states"])
    config = _config_in(content, path)
    if weights == "ema" and content.get("ema"):
        return config, content["ema"]["weights"]
    prefix = f"{model}."
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

    config = _export_config(folder)
    try:
        return config, load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: model.safetensors is missing from the export") from error
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: damaged export ({error})") from error


def _export_config(folder: Path) -> dict[str, Any]:
    try:
        config = parse_json((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: config.json is missing from the export") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}/config.json: damaged ({str(error)[:120]})") from error
    for part in ("tokenizer", "quantizer"):
        if not isinstance(config, dict) or part not in config:
            raise CheckpointError(f"{folder}/config.json: has no '{part}'")
    return migrate_config(config, folder / "config.json")
