"""Exponential moving average of the weights that are evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vistok.core.errors import ConfigError


class EMA:
    """Keeps averaged copies of a module's parameters; buffers are copied, never averaged.

    Averaging integer counters or the running sums of an EMA codebook would make them wrong. The
    decay ramps up as min(decay, (1 + n) / (10 + n)), so the average forgets the random start.

    Args:
        module: whose parameters to average; frozen ones are left out.
        decay: of the average per optimizer step, in [0, 1).

    Raises:
        ConfigError: for another decay.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema.decay={decay}: must be at least 0 and below 1")
        self.module = module
        self.decay = decay
        self.num_updates = 0
        self.shadow = {name: p.detach().clone().float() for name, p in self._parameters()}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def reset(self) -> None:
        """Take over the present parameters and begin to average anew."""
        self.num_updates = 0
        self.shadow = {name: p.detach().clone().float() for name, p in self._parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present parameters; once per optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = [p.detach().float() for _, p in self._parameters()]
        shadow = list(self.shadow.values())
        if shadow and shadow[0].device != live[0].device:
            self.shadow = {k: v.to(live[0].device) for k, v in self.shadow.items()}
            shadow = list(self.shadow.values())
        for average, value in zip(shadow, live, strict=True):
            average.lerp_(value, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the module computes with the averaged parameters."""
        live = {name: p.detach().clone() for name, p in self._parameters()}
        self._copy_in(self.shadow)
        try:
            yield
        finally:
            self._copy_in(live)

    @torch.no_grad()
    def _copy_in(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters():
            parameter.copy_(values[name])

    def weights(self) -> dict[str, Tensor]:
        """State dict of the module with the averaged parameters in place."""
        weights = {name: value.detach() for name, value in self.module.state_dict().items()}
        for name, average in self.shadow.items():
            weights[name] = average.to(weights[name].dtype)
        return weights

    def state_dict(self) -> dict:
        """Plain containers and tensors."""
        return {"num_updates": self.num_updates, "weights": self.weights()}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        self.num_updates = int(state["num_updates"])
        for name in self.shadow:
            self.shadow[name] = state["weights"][name].clone().float()
