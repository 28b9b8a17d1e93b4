"""An adversary: a discriminator with an optimizer of its own, trained next to a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor, nn

from vistok.core.ranks import average_gradients
from vistok.core.registry import register
from vistok.core.values import Decay, Index, NonNegative, filled_list
from vistok.losses.gan.players import hinge_discriminator_loss, hinge_generator_loss
from vistok.models.term import MakeOptimizer, Player, Step


class AdamOptions(TypedDict):
    """Options of the optimizer of a discriminator."""

    lr: NonNegative
    betas: Annotated[
        Sequence[float], filled_list(Decay, "two numbers, 0 or more and below 1", (2,))
    ]
    weight_decay: NonNegative


@register("adversary")
class Adversary(Player):
    """Judges what the tokenizer makes of images, and learns to tell the two apart.

    Args:
        discriminator: images `(B, C, H, W)` in [-1, 1] to logits, positive for real ones.
        optimizer: `lr`, `betas` and `weight_decay` of its AdamW; warm-up and decay are the
            tokenizer's.
        gradient_clip_val: largest norm of its gradient; None for no bound.
        warmup_samples: how long it learns before the tokenizer's loss reads it.
    """

    accepts = ("pixels",)

    def __init__(
        self,
        discriminator: nn.Module,
        optimizer: AdamOptions,
        gradient_clip_val: NonNegative | None = 1.0,
        warmup_samples: Index = 0,
    ) -> None:
        self.discriminator = discriminator.requires_grad_(False)
        self.options = optimizer
        self.clip = gradient_clip_val
        self.warmup_samples = warmup_samples
        self.optimizer: torch.optim.Optimizer | None = None
        self._kept: tuple[Tensor, Tensor] | None = None  # images, and what became of them

    def equip(self, make_optimizer: MakeOptimizer) -> None:
        """Take an optimizer of the discriminator's parameters."""
        self.discriminator.requires_grad_(True)
        self.optimizer = make_optimizer(
            self.discriminator,
            float(self.options["lr"]),
            self.options["betas"],
            self.options["weight_decay"],
        )
        self.discriminator.requires_grad_(False)

    def __call__(self, step: Step) -> Tensor:
        """Return minus the mean logit of the pictures."""
        self.watch(step)
        return hinge_generator_loss(self.discriminator(step.prediction.value))

    def watch(self, step: Step) -> None:
        """Keep images and pictures."""
        self._kept = step.prediction.target, step.prediction.value.detach()

    def learn(self, share: float, context: AbstractContextManager[Any]) -> dict[str, Tensor]:
        """Add the discriminator's gradients; its loss is logged as "discriminator"."""
        if self._kept is None:
            return {}
        (images, pictures), self._kept = self._kept, None
        self.discriminator.requires_grad_(True)
        with context:
            loss = hinge_discriminator_loss(
                self.discriminator(images), self.discriminator(pictures)
            )
        (loss * share).backward()
        self.discriminator.requires_grad_(False)
        return {"discriminator": loss.detach()}

    def step(self, factor: float) -> None:
        """Move the discriminator."""
        assert self.optimizer is not None, "equip comes first"
        parameters = list(self.discriminator.parameters())
        if all(p.grad is None for p in parameters):
            return
        average_gradients(parameters)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.options["lr"]) * factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    def to(self, device: torch.device) -> None:
        """Move discriminator and moments."""
        self.discriminator.to(device)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # to where the weights are

    def state_dict(self) -> dict[str, Any]:
        """Return weights and moments."""
        assert self.optimizer is not None, "equip comes first"
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        assert self.optimizer is not None, "equip comes first"
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
