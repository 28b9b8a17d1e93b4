"""Hold the content of a checkpoint to its form before anything uses it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import CheckpointError, ConfigError
from vistok.core.schema import check_run
from vistok.core.values import is_whole


def check_content(content: dict[str, Any], path: Path | str, step: int | None = None) -> None:
    """Raise unless a checkpoint has what it must have, each of its type.

    Parts that were not read are not missed.

    Args:
        content: in today's form.
        path: for errors.
        step: that its seal says; None for one that was not looked at.

    Raises:
        CheckpointError: naming file and place.
    """

    def expect(right: bool, place: str, wanted: str) -> None:
        if not right:
            raise CheckpointError(f"{path}: damaged; {place} must be {wanted}")

    number = content.get("global_step", 0)
    expect(is_whole(number) and number >= 0, "global_step", "a whole number, 0 or more")
    if step is not None:
        expect(number == step, f"global_step={number}", f"the {step} that its seal says")
    check_weights(content["state_dict"], f"{path}: state_dict")
    ema = content.get("ema")
    if ema is not None:
        right = isinstance(ema, dict) and is_whole(ema.get("num_updates"))
        expect(right and ema["num_updates"] >= 0, "ema.num_updates", "a whole number, 0 or more")
        check_weights(ema.get("weights"), f"{path}: ema.weights")
    for key, kind in _KINDS.items():
        if content.get(key) is not None:
            words = "a list" if kind is list else "a group of keys"
            expect(isinstance(content[key], kind), key, words)
    for key in ("VistokDataModule", "TokenDataModule"):
        position = content.get(key) or {}
        for name in ("samples_seen", "seed", "window", "hold_out_rule"):
            number = position.get(name, 0)
            right = is_whole(number) and number >= 0
            expect(right, f"{key}.{name}={str(number)[:80]}", "a whole number, 0 or more")
        named = position.get("fingerprint", "0")
        right = isinstance(named, str) and re.fullmatch(r"[0-9a-f]+(-\d+)?", named)
        expect(bool(right), f"{key}.fingerprint={str(named)[:80]}", "what a run writes")


_KINDS: dict[str, type] = {
    "optimizer_states": list,
    "lr_schedulers": list,
    "callbacks": dict,
    "loops": dict,
    "hyper_parameters": dict,
    "VistokDataModule": dict,
    "TokenDataModule": dict,
    "guard": dict,
    "health": dict,
    "schedule": dict,
    "players": dict,
    "codebook_window": dict,
    "random_state": list,
}


def check_weights(state: Any, source: str) -> None:
    """Raise unless all values of a state dict are tensors with finite numbers.

    Raises:
        CheckpointError: naming the first that is not.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{source}: must be a group of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = type(value).__name__
            raise CheckpointError(f"{source}: '{str(name)[:80]}' must be a tensor, found {found}")
        if value.is_floating_point() and value.numel() and value.device.type != "meta":
            low, high = torch.aminmax(value.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise CheckpointError(f"{source}: '{name}' holds NaN or infinite numbers")


def check_config(config: Any, path: Path | str) -> None:
    """Raise unless the config that a checkpoint stores is a run's.

    Raises:
        CheckpointError: naming file and key.
    """
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a vistok checkpoint (it has no config)")
    try:
        check_run(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: config: {error}") from error
