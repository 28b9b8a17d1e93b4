"""Every private name of timm that vistok uses, in one place; see `core/torch_internals.py`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def has_tokens(model: nn.Module) -> bool:
    """Return whether a network is a vision transformer with positions added to its patches."""
    return hasattr(model, "_pos_embed") and hasattr(model, "blocks")


def with_positions(model: Any, patches: Tensor) -> Tensor:
    """Return the tokens before the first block: prefix tokens and patches, with their positions.

    timm's `forward_intermediates` starts behind the first block.
    """
    return model._pos_embed(patches)
