"""Networks that are used but not owned: teachers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network that is never trained, saved, averaged or counted.

    It moves with its owner, but is none of its submodules: its weights are in no state dict, no
    optimizer and no EMA, and it stays in eval mode.

    Args:
        module: what to hold.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._held = (module.eval().requires_grad_(False),)  # a tuple hides it from torch

    @property
    def module(self) -> nn.Module:
        """Return what is held."""
        return self._held[0]

    def forward(self, *inputs: Tensor) -> Any:
        """The held module's output, without a gradient."""
        with torch.no_grad():
            return self.module(*inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self.module._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self
