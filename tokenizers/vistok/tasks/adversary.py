"""An adversary: a discriminator with an optimizer of its own, trained beside a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ConfigError
from vistok.core.outputs import TokenizerOutput
from vistok.core.ranks import average_gradients
from vistok.core.registry import build
from vistok.losses.gan.players import hinge_discriminator_loss, hinge_generator_loss
from vistok.training.optimizers import build_optimizer, clip_by_norm


class Adversary:
    """Judges what the tokenizer makes of images, and learns to tell the two apart.

    For each batch: `loss` is a term of the tokenizer's loss, through a discriminator that gets no
    gradient from it; `learn`, behind the tokenizer's backward pass, adds the discriminator's own
    gradients, for pictures that pass none back. `step`, once per optimizer step, averages these
    over the ranks, bounds their norm and moves the discriminator. So both players of a step see
    the same discriminator, and accumulated batches and ranks count as one batch.

    It is no part of the LightningModule: of the two players DDP and FSDP know the tokenizer only,
    Lightning counts the tokenizer's steps only, and no export carries a discriminator.

    Args:
        config: `adversary` of the run's config.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.discriminator = build(config["discriminator"], "adversary.discriminator")
        self.weight = float(config["weight"])
        self.start_samples = int(config["start_samples"])
        self.clip = config["gradient_clip_val"]
        options = config["optimizer"]
        self.lr = float(options["lr"])
        self.optimizer = build_optimizer(
            self.discriminator, self.lr, options["betas"], options["weight_decay"]
        )
        self.discriminator.requires_grad_(False)

    def plays(self, samples_seen: int) -> bool:
        """Whether it takes part in a step that begins at this position in the data."""
        return samples_seen >= self.start_samples

    def to(self, device: torch.device) -> None:
        """Move it."""
        self.discriminator.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # to where the weights are

    def loss(self, images: Tensor, output: TokenizerOutput) -> Tensor:
        """The tokenizer's side: float32 scalar, unweighted.

        Raises:
            ConfigError: if the decoder predicts no images.
        """
        if output.prediction.shape != images.shape or output.target is not images:
            raise ConfigError("adversary: the decoder must predict images; use adversary=none")
        return hinge_generator_loss(self.discriminator(output.prediction))

    def learn(self, images: Tensor, pictures: Tensor, share: float, context: Any) -> Tensor:
        """The discriminator's side: adds to its gradients.

        Args:
            images: `(B, C, H, W)` in [-1, 1].
            pictures: what the tokenizer made of them; detached.
            share: of this batch in the step.
            context: to compute the logits in (autocast).

        Returns:
            Its loss, detached.
        """
        self.discriminator.requires_grad_(True)
        with context:
            loss = hinge_discriminator_loss(
                self.discriminator(images), self.discriminator(pictures)
            )
        (loss * share).backward()
        self.discriminator.requires_grad_(False)
        return loss.detach()

    def step(self, factor: float) -> None:
        """Move the discriminator, with `factor` times its learning rate."""
        parameters = list(self.discriminator.parameters())
        average_gradients(parameters)
        if self.clip:
            clip_by_norm(parameters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Weights and moments."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_adversary(config: Mapping[str, Any] | None) -> Adversary | None:
    """The adversary that a run's config asks for, if any; the run's random state stays."""
    if not config or not config["discriminator"]:
        return None
    with torch.random.fork_rng(devices=[]):
        return Adversary(config)
