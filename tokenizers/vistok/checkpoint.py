"""Plain configs and weights to tokenizers and back. Nothing loaded here can run code.

Weights are read as safetensors or with `weights_only=True`. Configs may name only classes of
vistok's own layers, or classes that the running program registered itself.

A checkpoint file ends with its seal: a line with the SHA-256 of all bytes before it and the step.
The seal is in the file itself, so no crash can come between the two; zip readers, torch's among
them, ignore what follows the archive.

A sharded run (FSDP2) writes a folder in a file's place, with a sealed file from each rank. What is
sharded lies in them in pieces, everything else in the first one. torch.distributed.checkpoint is
not used: it keeps no checksums, and reads its index by unpickling, which can run code.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    as_written,
    check_whole,
    is_number,
    is_whole,
    nearest,
)
from vistok.models.tokenizer import Tokenizer

_LAYERS = ("encoders", "decoders", "quantizers", "models", "losses")
_registered: dict[str, type[nn.Module]] = {}

#: Arguments that count or measure something, whatever part has them: the least of them is 1.
_COUNTS = {
    "base_channels",
    "causal_depth",
    "channel_multipliers",
    "channels",
    "code_dim",
    "depth",
    "dim",
    "image_size",
    "latent_dim",
    "num_codes",
    "num_heads",
    "num_holistic_tokens",
    "num_latent_tokens",
    "num_res_blocks",
    "num_text_tokens",
    "patch_size",
    "stem",
    "text_dim",
    "width",
}
#: Widths that a config takes from `tokenizer.latent_dim`, or from the width of what they meet.
_FOLLOWING = ("dim", "latent_dim")
#: What the annotation of an argument asks for: in words, and whether a value is that.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", is_whole),
    "float": ("a number", is_number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "Sequence[int]": (
        "a list of whole numbers",
        lambda value: isinstance(value, (list, tuple)) and all(map(is_whole, value)),
    ),
    "None": ("null", lambda value: value is None),
}


def register(cls: type[nn.Module]) -> type[nn.Module]:
    """Let configs name a class of your own by its import path; usable as a decorator.

    Only for code of your own: a config never causes an import outside vistok.
    """
    _registered[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


def resolve(target: str) -> type[nn.Module]:
    """The class that a config's `_target_` names.

    Raises:
        ConfigError: unless it is a module class of vistok's layers, or a registered one.
    """
    target = str(target)
    if target in _registered:
        return _registered[target]
    module_name, _, class_name = target.rpartition(".")
    parts = module_name.split(".")
    if len(parts) < 3 or parts[0] != "vistok" or parts[1] not in _LAYERS:
        raise ConfigError(
            f"_target_={target}: not a class of vistok's registry "
            f"(vistok.{{{','.join(_LAYERS)}}}.*, or registered with vistok.register)"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"_target_={target}: there is no module {module_name}") from error
    cls = getattr(module, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == module_name):
        known = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module_name
        ]
        raise ConfigError(
            f"_target_={target}: {module_name} defines no such module class"
            f"{nearest(class_name, known)}"
        )
    return cls


def build(config: Any, key: str = "", /, **given: Any) -> Any:
    """Build the object that a config of plain containers describes.

    Args:
        config: a mapping with `_target_` and constructor arguments; nested mappings with a
            `_target_` and lists are built first, everything else is passed as it is.
        key: where it lies in the run's config, for messages.
        given: further constructor arguments.

    Raises:
        ConfigError: naming the class or the key that is wrong.
    """
    _check_arguments(config, key)
    return _build(config, key, given)


def _build(config: Any, key: str, given: Mapping[str, Any]) -> Any:
    if isinstance(config, Mapping):
        values = {k: _build(v, _inner(key, k), {}) for k, v in config.items() if k != "_target_"}
        if "_target_" not in config:
            return values
        cls = resolve(config["_target_"])
        try:
            return cls(**values, **given)
        except ArgumentError as error:
            raise ConfigError(_inner(key, str(error))) from error
        except TypeError as error:
            raise ConfigError(f"{config['_target_']}: {error}") from error
    if isinstance(config, (list, tuple)):
        return [_build(value, f"{key}[{i}]", {}) for i, value in enumerate(config)]
    return config


def _inner(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _check_arguments(config: Any, key: str, but: Collection[str] = ()) -> None:
    """Refuse numbers that the annotation of an argument excludes, and counts below 1.

    Args:
        config: as for `build`.
        key: where it lies in the run's config.
        but: names of arguments to leave unchecked.
    """
    if isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            _check_arguments(value, f"{key}[{i}]", but)
    if not isinstance(config, Mapping):
        return
    target = config.get("_target_")
    parameters = inspect.signature(resolve(target)).parameters if target else {}
    for name, value in config.items():
        _check_arguments(value, _inner(key, name), but)
        if name in but:
            continue
        annotation = parameters[name].annotation if name in parameters else ""
        if not isinstance(annotation, str):
            annotation = inspect.formatannotation(annotation)
        names = annotation.split(" | ")
        if not _KINDS.keys() >= set(names):
            continue  # a part, a choice of words, ...
        kinds = [_KINDS[kind] for kind in names]
        right, least = any(fits(value) for _, fits in kinds), ""
        if name in _COUNTS:
            numbers = value if isinstance(value, (list, tuple)) else [value]
            right = right and bool(numbers) and all(n is None or n >= 1 for n in numbers)
            least = ", 1 or more"
        if not right:
            wanted = " or ".join(words for words, _ in kinds) + least
            raise ConfigError(f"{_inner(key, name)}={as_written(value)}: must be {wanted}")


def build_tokenizer(config: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer from the `tokenizer` and `quantizer` parts of a resolved config."""
    ends = config["tokenizer"] if isinstance(config["tokenizer"], Mapping) else {}
    described = {key: config[key] for key in ("tokenizer", "quantizer")}
    described |= {f"tokenizer.{key}": ends[key] for key in ("encoder", "decoder") if key in ends}
    for key, part in described.items():
        if not isinstance(part, Mapping):
            raise ConfigError(f"{key}={as_written(part)}: expected a mapping with a _target_")
    parts = {key: value for key, value in config["tokenizer"].items() if key != "latent_dim"}
    # First what others follow from in the configs: latent_dim itself may follow from a width.
    _check_arguments(parts, "tokenizer", but=_FOLLOWING)
    check_whole("tokenizer.latent_dim", config["tokenizer"].get("latent_dim", 1), 1)
    quantizer = build(config["quantizer"], "quantizer")
    tokenizer = build(parts, "tokenizer", quantizer=quantizer)
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"tokenizer._target_={parts.get('_target_')}: not a Tokenizer")
    return tokenizer


# ---------------------------------------------------------------------- weights


def load(path: str | Path, weights: str = "ema", device: str | torch.device = "cpu") -> Tokenizer:
    """Load a tokenizer from a run folder, an export folder or a checkpoint file.

    Args:
        path: `runs/<run>` (its best checkpoint, else the last), an exported folder, a `.ckpt`.
        weights: "ema" for the averaged weights where there are any, or "last" for the raw ones.
        device: where to put it.

    Returns:
        The tokenizer in eval mode.

    Raises:
        CheckpointError: if there is none, it is damaged, or its weights do not fit its config.
        ConfigError: if its config names a class outside the registry.
    """
    path = Path(path)
    if (path / "model.safetensors").exists():
        config, state = _read_export(path)
    else:
        config, state = _read_checkpoint(find_checkpoint(path), weights)
    tokenizer = build_tokenizer(config)
    load_weights(tokenizer, state, str(path))
    return tokenizer.to(device).eval()


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` strictly.

    Raises:
        CheckpointError: naming the first key that does not fit, and how many there are.
    """
    own = module.state_dict()
    problems = [f"'{key}' is missing" for key in own if key not in state]
    problems += [f"'{key}' is unknown here" for key in state if key not in own]
    problems += [
        f"'{key}' has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise CheckpointError(
            f"{source}: weights of another architecture, {problems[0]} "
            f"(and {len(problems) - 1} more); use the config they were trained with"
        )
    module.load_state_dict(dict(state))


def find_checkpoint(path: str | Path, prefer: str = "best") -> Path:
    """The checkpoint of a run folder (best or last), or `path` itself if it is one.

    Raises:
        CheckpointError: if there is none.
    """
    path = Path(path)
    if is_checkpoint(path):
        return path
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) or f"; {path.parent} holds: {', '.join(siblings[:5])}"
        raise CheckpointError(f"{path}: no such run, export or checkpoint{hint}")
    names = ("best.ckpt", "last.ckpt") if prefer == "best" else ("last.ckpt", "best.ckpt")
    for name in names:
        if is_checkpoint(path / "checkpoints" / name):
            return path / "checkpoints" / name
    raise CheckpointError(f"{path}: holds no checkpoints/last.ckpt and no model.safetensors")


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint's: a file, or the folder of a sharded one."""
    return path.is_file() or (path.suffix == ".ckpt" and path.is_dir())


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to."""
    inside = checkpoint.parent.name == "checkpoints"
    return checkpoint.parent.parent if inside else checkpoint.parent


def read_checkpoint(path: Path, without: Iterable[str] = ()) -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain containers only.

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
    return _joined(contents, join)


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


# ---------------------------------------------------------------------- seals

_SEAL = "\nvistok sha256={} step={:010d}\n"
_SEAL_BYTES = len(_SEAL.format("0" * 64, 0))


def seal(sha256: str, step: int) -> bytes:
    """The last line of a checkpoint file whose bytes before it have this digest."""
    return _SEAL.format(sha256, step).encode()


def checkpoint_files(path: Path) -> list[Path]:
    """The files of a checkpoint, in the order of the ranks.

    Raises:
        CheckpointError: if one of a sharded checkpoint is missing.
    """
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*-of-*.ckpt"))
    wanted = int(files[0].stem.rpartition("-")[2]) if files else 1
    if len(files) != wanted:
        raise CheckpointError(f"{path}: not whole, it has {len(files)} of {wanted} files")
    return files


def read_seal(path: Path) -> tuple[str, int] | None:
    """Digest and step that the seal of a checkpoint('s first file) names; None if it has none."""
    with open(checkpoint_files(path)[0], "rb") as file:
        file.seek(max(0, file.seek(0, 2) - _SEAL_BYTES))
        found = re.fullmatch(rb"\nvistok sha256=(.{64}) step=(\d{10})\n", file.read(), re.DOTALL)
    return (found[1].decode(errors="replace"), int(found[2])) if found else None


def check_seal(path: Path) -> None:
    """Compare the bytes of a checkpoint with its seals; a single file without one passes.

    Raises:
        CheckpointError: if they differ, or a file cannot be read.
    """
    if path.is_dir():
        files = checkpoint_files(path)
        seals = [read_seal(file) for file in files]
        if None in seals or len({seal[1] for seal in seals if seal}) != 1:
            raise CheckpointError(f"{path}: damaged, its files are not of one step")
        for file in files:
            check_seal(file)
        return
    try:
        sealed = read_seal(path)
        if sealed is None:
            return
        sha, left = hashlib.sha256(), path.stat().st_size - _SEAL_BYTES
        with open(path, "rb") as file:
            while left and (chunk := file.read(min(left, 1 << 22))):
                sha.update(chunk)
                left -= len(chunk)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read, {error.strerror}") from error
    if sha.hexdigest() != sealed[0]:
        raise CheckpointError(
            f"{path}: damaged, its bytes do not have the checksum in its last line"
        )


_HEAVY = ("state_dict", "optimizer_states", "ema")


def read_config(path: Path) -> dict[str, Any]:
    """The config of a checkpoint or an export folder, as plain containers."""
    if path.is_dir() and not is_checkpoint(path):
        return _read_export(path)[0]
    content = read_checkpoint(path, without=_HEAVY)
    try:
        return content["hyper_parameters"]["config"]
    except KeyError as error:
        raise CheckpointError(f"{path}: not a checkpoint of vistok (no config in it)") from error


def _read_checkpoint(path: Path, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
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


def _read_export(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    return config, state
