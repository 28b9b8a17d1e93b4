"""Exponential moving average of the weights that are evaluated and exported.

Lightning's WeightAveraging, over torch's AveragedModel, does not work with sharded parameters, and
keeps a second model whose codebook no statistics move; here one model's parameters are exchanged.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vistok.core.errors import ConfigError
from vistok.training.sharding import release


class EMA:
    """Keeps averaged copies of a module's parameters; buffers are copied, never averaged.

    Averaging integer counters or the running sums of an EMA codebook would make them wrong. The
    decay ramps up as min(decay, (1 + n) / (10 + n)), so the average forgets the random start.

    Args:
        module: whose parameters to average, in float32; frozen ones are left out.
        decay: of the average per optimizer step, in [0, 1).

    Attributes:
        swapped: whether the module has the averages, and `shadow` what is trained.

    Raises:
        ConfigError: for another decay.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema.decay={decay}: must be at least 0 and below 1")
        self.module = module
        self.decay = decay
        self.swapped = False
        self.reset()

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return averages and parameters, where the parameters are; of each this rank's part."""
        parameters = [p.detach() for _, p in self._parameters()]
        for (name, average), p in zip(self.shadow.items(), parameters, strict=True):
            self.shadow[name] = average.to(p.device)
        return [_part(average) for average in self.shadow.values()], [_part(p) for p in parameters]

    @torch.no_grad()
    def reset(self) -> None:
        """Take over the present parameters and begin to average anew."""
        self.num_updates = 0
        self.shadow = {name: p.detach().clone() for name, p in self._parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present parameters; once per optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages, live = self._pairs()
        if averages:
            get_ema_multi_avg_fn(decay)(averages, live, self.num_updates)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages, in place; again for the way back."""
        for average, live in zip(*self._pairs(), strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
        self.swapped = not self.swapped

    def weights(self) -> dict[str, Tensor]:
        """State dict of the module with the averaged parameters in place.

        Raises:
            RuntimeError: while they are swapped, when the module's state is not what is trained.
        """
        if self.swapped:
            raise RuntimeError("nothing can be saved while the averaged weights are in place")
        weights = {name: value.detach() for name, value in self.module.state_dict().items()}
        return weights | self.shadow

    def state_dict(self) -> dict:
        """Plain containers and tensors."""
        return {"num_updates": self.num_updates, "weights": self.weights()}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        self.num_updates = int(state["num_updates"])
        for name in self.shadow:
            self.shadow[name] = state["weights"][name].clone()


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class AveragedWeights(L.Callback):
    """Validates the averaged weights of a task.

    They are in place from the start of a validation to the end of its epoch, which is before
    anything is saved (`on_validation_end`). Callbacks that look at them go before this one, in
    `on_validation_epoch_end`.
    """

    def on_validation_start(self, trainer: L.Trainer, module: Any) -> None:
        """Put them in place."""
        if module.ema is not None:
            module.ema.swap()

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        """Put back what is trained."""
        release(module.model)  # what is gathered is a copy
        if module.ema is not None and module.ema.swapped:
            module.ema.swap()

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Put back what is trained."""
        self.on_validation_epoch_end(trainer, module)
