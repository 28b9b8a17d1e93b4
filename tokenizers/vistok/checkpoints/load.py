"""Load tokenizers from runs, exports and checkpoints. Nothing loaded here can run code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.checkpoints.exports import check_export
from vistok.checkpoints.find import find_checkpoint, find_checkpoint_or_export
from vistok.checkpoints.hub import fetch, on_hub
from vistok.checkpoints.read import read_config, read_export, read_weights
from vistok.checkpoints.validate import check_weights
from vistok.core.errors import CheckpointError
from vistok.core.registry import resolve
from vistok.models.build import build_tokenizer
from vistok.models.tokenizer import Tokenizer
from vistok.priors.build import build_prior
from vistok.priors.prior import Prior


def load(
    path: str | Path,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> Tokenizer:
    """Load a tokenizer from a run folder, an export folder, a checkpoint file or the Hub.

    Args:
        path: `runs/<run>` (its best checkpoint, else the last), an exported folder, a `.ckpt`, or
            `owner/name` of an export on the Hugging Face Hub (needs huggingface_hub).
        weights: "ema" for the averaged weights where there are any, or "last" for the raw ones.
        device: where to put it.
        revision: on the Hub: a branch, a tag or a commit.

    Returns:
        The tokenizer in eval mode.

    Raises:
        CheckpointError: if there is none, it is damaged, or its weights do not fit its config.
        ConfigError: if its config names a class outside the registry.
    """
    name = on_hub(path)
    path = fetch(name, revision) if name else Path(path).expanduser()
    if is_export := (path / "model.safetensors").exists():
        check_export(path)
        config, state = read_export(path)
    else:
        config, state = read_weights(find_checkpoint(path), weights)
    if "tokenizer" not in config:
        raise CheckpointError(
            f"{path}: not of a tokenizer, but of task={config.get('task')}; load_prior reads priors"
        )
    tokenizer = build_tokenizer(config, teachers=False)
    load_weights(tokenizer, state, str(path))
    if is_export:
        _check_values(tokenizer, state, path)
    tokenizer.crop = (config.get("data") or {}).get("val_crop", tokenizer.crop)
    return tokenizer.to(device).eval()


def load_prior(
    path: str | Path, weights: str = "ema", device: str | torch.device = "cpu"
) -> tuple[Prior, dict[str, Any]]:
    """Load a prior from a run folder or a checkpoint file.

    Args:
        path: `runs/<run>` (its best checkpoint, else the last), or a `.ckpt`.
        weights: as in `load`.
        device: where to put it.

    Returns:
        The prior in eval mode, and the config of its run.

    Raises:
        CheckpointError: if there is none, it is damaged, or it is not of a prior.
    """
    config, state = read_weights(find_checkpoint(path), weights, "prior")
    if "prior" not in config:
        raise CheckpointError(f"{path}: not of a prior, but of a tokenizer; vistok.load reads it")
    prior = build_prior(config)
    load_weights(prior, state, str(path))
    return prior.to(device).eval(), config


def task_of(path: str | Path | None) -> Any:
    """Return the task of a run folder or checkpoint; of an export and None, that of tokenizers.

    Raises:
        CheckpointError: if there is no such run.
        ConfigError: if there is no such task.
    """
    config = read_config(find_checkpoint_or_export(str(path))) if path else {}
    return resolve(config.get("task", "reconstruction"), kind="task", key="task")


def _check_values(module: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Raise if a weight of an export has another type, or is NaN."""
    for key, own in module.state_dict().items():
        if state[key].dtype != own.dtype:
            found, wanted = (str(t.dtype).removeprefix("torch.") for t in (state[key], own))
            raise CheckpointError(f"{folder}: '{key}' is {found}, expected {wanted}")
        if own.is_floating_point() and own.isnan().any():
            raise CheckpointError(f"{folder}: '{key}' contains NaN; export the run anew")


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` strictly.

    Raises:
        CheckpointError: naming the first key that does not fit, and how many there are.
    """
    check_weights(state, source)
    own = module.state_dict()
    problems = [f"'{key}' is missing" for key in own if key not in state]
    problems += [f"'{key}' is not expected" for key in state if key not in own]
    problems += [
        f"'{key}' has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems += [
        f"'{key}' holds {state[key].dtype}, expected {own[key].dtype}"
        for key in own
        if key in state and state[key].is_floating_point() != own[key].is_floating_point()
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{source}: weights of another architecture: {problems[0]}{more}; use the config that "
            "they were trained with"
        )
    module.load_state_dict(dict(state))
