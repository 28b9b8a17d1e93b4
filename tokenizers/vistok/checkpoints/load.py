"""Load tokenizers from runs, exports and checkpoints. Nothing loaded here can run code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vistok.checkpoints.find import find_checkpoint
from vistok.checkpoints.read import read_export, read_weights
from vistok.checkpoints.validate import check_weights
from vistok.core.errors import CheckpointError
from vistok.models.build import build_tokenizer
from vistok.models.tokenizer import Tokenizer


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
    path = Path(path).expanduser()
    if (path / "model.safetensors").exists():
        config, state = read_export(path)
    else:
        config, state = read_weights(find_checkpoint(path), weights)
    tokenizer = build_tokenizer(config, teachers=False)
    load_weights(tokenizer, state, str(path))
    return tokenizer.to(device).eval()


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
