"""An adversary: a discriminator with an optimizer of its own, trained next to a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.ranks import (
    all_reduce_mean_with_grad,
    all_reduce_sum,
    average_gradients,
    world_size,
)
from vistok.core.registry import register
from vistok.core.taps import Taps
from vistok.core.values import Count, Decay, Index, NonNegative, Share, filled_list
from vistok.losses.gan.augment import DiffAugment
from vistok.losses.gan.discriminators import Discriminator
from vistok.losses.gan.players import GAMES, gradient_penalty, lecam_penalty
from vistok.losses.gan.released import load_discriminator
from vistok.losses.gradients import carried, leaf_of
from vistok.models.term import MakeOptimizer, Player, Step


class AdamOptions(TypedDict):
    """Options of the optimizer of a discriminator."""

    lr: NonNegative
    betas: Annotated[
        Sequence[float], filled_list(Decay, "two numbers, 0 or more and below 1", (2,))
    ]
    weight_decay: NonNegative


class LeCamOptions(TypedDict):
    """Options of LeCAM.

    Keys:
        weight: in the discriminator's loss.
        decay: of the moving means, per optimizer step.
        per: "logit" penalizes each logit, "batch" their means, over all ranks, as TiTok does.
    """

    weight: NonNegative
    decay: Decay
    per: Literal["logit", "batch"]


class PenaltyOptions(TypedDict):
    """Options of gradient penalties.

    Keys:
        r1: gamma of the penalty on real images; half of it is the weight.
        r2: the same on reconstructions.
        interval: optimizer steps from one to the next, which counts as many times.
    """

    r1: NonNegative
    r2: NonNegative
    interval: Count


@dataclass
class _Verdict:
    """What the discriminator makes of images, with the graph."""

    images: Tensor
    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Batch:
    """What is kept of a batch until the discriminator learns from it."""

    images: Tensor
    pictures: Tensor
    numbers: tuple[Tensor, Tensor] | None  # of the augmentation
    real: _Verdict | None = None
    fake: _Verdict | None = None


@register("adversary")
class Adversary(Player):
    """Judges what the tokenizer makes of images, and learns to tell the two apart.

    Each image is judged once in a step: the tokenizer's gradient and the discriminator's come from
    the same forward, of the same weights.

    Args:
        discriminator: images `(B, C, H, W)` in [-1, 1] to logits, positive for real ones.
        optimizer: `lr`, `betas` and `weight_decay` of its AdamW; warm-up and decay are the
            tokenizer's.
        gradient_clip_val: largest norm of its gradient; None for no bound.
        warmup_samples: how long it learns before the tokenizer's loss reads it; 0 for what
            `warmup` says.
        warmup: the same as a share of the run.
        loss: of both players, see `losses/gan/players.py`. "hinge_non_saturating" is hinge for
            the discriminator and softplus for the tokenizer (Hita), "..._mean" softplus of an
            image's mean logit (Open-MAGVIT2, IBQ).
        augment: of all that the discriminator sees; None for none.
        lecam: see `LeCamOptions`; None for none.
        penalty: see `PenaltyOptions`; None for none. Computed in float32, as is the forward that
            it differentiates.
        feature_matching: weight, relative to the verdict's, of the mean absolute difference of
            the discriminator's features of images and reconstructions; 0 for none.
        weights: file that a fresh discriminator starts from, of a run or released; None for
            random weights.
    """

    accepts = ("pixels",)

    def __init__(
        self,
        discriminator: nn.Module,
        optimizer: AdamOptions,
        gradient_clip_val: NonNegative | None = 1.0,
        warmup_samples: Index = 0,
        warmup: Share = 0.0,
        loss: Literal[
            "hinge",
            "vanilla",
            "non_saturating",
            "hinge_non_saturating",
            "hinge_non_saturating_mean",
            "least_squares",
            "relativistic",
        ] = "hinge",
        augment: DiffAugment | None = None,
        lecam: LeCamOptions | None = None,
        penalty: PenaltyOptions | None = None,
        feature_matching: NonNegative = 0.0,
        weights: str | None = None,
    ) -> None:
        self.discriminator = discriminator.requires_grad_(False)
        self.options = optimizer
        self.clip = gradient_clip_val
        self.warmup_samples = warmup_samples
        self.warmup = warmup
        self.game = GAMES[loss]
        self.augment = augment
        self.lecam = lecam
        self.penalty = penalty
        self.feature_matching = feature_matching
        self.weights = weights
        if feature_matching and not getattr(discriminator, "taps", ()):
            raise ArgumentError(
                f"feature_matching={feature_matching}: {type(discriminator).__name__} offers no "
                "features"
            )
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps = 0  # that it has made
        self.means = torch.zeros(2)  # LeCAM's, of the logits of real images and reconstructions
        self._sums = torch.zeros(2)  # of the step under way
        self._gathered = False
        self._kept: _Batch | None = None

    def start(self) -> None:
        """Take the weights of the file."""
        if self.weights is not None:
            load_discriminator(self.discriminator, Path(self.weights))

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

    # ------------------------------------------------------------------ of a batch

    def __call__(self, step: Step) -> Tensor:
        """Return the generator's loss of the pictures."""
        self.watch(step)
        kept, value = self._kept, step.prediction.value
        assert kept is not None
        if not torch.is_grad_enabled():  # nobody learns
            kept.fake, kept.real = self._judge(kept, False), self._judge(kept, True)
            return self._generator_loss(kept)
        kept.pictures = leaf_of(value)
        self.discriminator.requires_grad_(True)
        kept.fake = self._judge(kept, False)
        if self.game.compares or self.feature_matching:
            kept.real = self._judge(kept, True)
        loss, self.gradient = carried(self._generator_loss(kept), kept.pictures, value, keep=True)
        return loss

    def watch(self, step: Step) -> None:
        """Keep images and pictures, and draw how they are augmented."""
        images, pictures = step.prediction.target, step.prediction.value.detach()
        numbers = None
        if self.augment is not None:
            numbers = self.augment.draw(images), self.augment.draw(pictures)
        self._kept = _Batch(images, pictures, numbers)
        self.gradient = None

    def learn(self, share: float, context: AbstractContextManager[Any]) -> dict[str, Tensor]:
        """Add the discriminator's gradients; its loss is logged as "discriminator"."""
        if self._kept is None:
            return {}
        kept, self._kept = self._kept, None
        self.discriminator.requires_grad_(True)
        with context:
            if self._penalized("r2") and kept.fake is None:
                kept.pictures = leaf_of(kept.pictures)
            real = kept.real or self._judge(kept, True)
            fake = kept.fake or self._judge(kept, False)
        loss = self.game.discriminator(real.logits, fake.logits)
        numbers = {"discriminator": loss.detach(), **self._verdicts(real.logits, fake.logits)}
        total = loss
        for name, penalty, weight in self._penalties(real, fake):
            numbers[f"gan/{name}"] = penalty.detach()
            total = total + weight * penalty
        learned = [p for p in self.discriminator.parameters() if p.requires_grad]
        # For them alone: the pictures' gradient has been taken.
        torch.autograd.backward(total * share, inputs=learned)
        self.discriminator.requires_grad_(False)
        means = torch.stack([x.detach().float().mean() for x in (real.logits, fake.logits)])
        self._sums = self._sums.to(means.device) + share * means
        return numbers

    def _judge(self, kept: _Batch, is_real: bool) -> _Verdict:
        """Judge images or pictures, in float32 where the verdict is differentiated twice."""
        images = kept.images if is_real else kept.pictures
        exact = self._penalized("r1" if is_real else "r2")
        if exact and is_real:
            images = leaf_of(images)
        outside: AbstractContextManager[Any] = nullcontext()
        if exact:
            outside = torch.autocast(images.device.type, enabled=False)
        with outside:
            seen = images.float() if exact else images
            if self.augment is not None and kept.numbers is not None:
                seen = self.augment(seen, kept.numbers[0 if is_real else 1])
            if not self.feature_matching:
                return _Verdict(images, self.discriminator(seen))
            assert isinstance(self.discriminator, Discriminator)
            taps = Taps(self.discriminator.taps)
            return _Verdict(images, self.discriminator(seen, taps), taps.features)

    def _generator_loss(self, kept: _Batch) -> Tensor:
        assert kept.fake is not None
        loss = self.game.generator(kept.real.logits if kept.real else None, kept.fake.logits)
        if self.feature_matching and kept.real is not None:
            distances = [
                (kept.fake.features[name].float() - real.detach().float()).abs().mean()
                for name, real in kept.real.features.items()
            ]
            loss = loss + self.feature_matching * torch.stack(distances).mean()
        return loss

    def _verdicts(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Return mean logits, and the share of them on the right side."""
        real, fake = real.detach().float(), fake.detach().float()
        if self.game.compares:
            accuracy = (real > fake).float().mean()
        else:
            accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        return {
            "gan/logits_real": real.mean(),
            "gan/logits_fake": fake.mean(),
            "gan/accuracy": accuracy,
        }

    # ------------------------------------------------------------------ regularization

    def _penalized(self, kind: str) -> bool:
        options = self.penalty
        return bool(options and options[kind] and self.steps % options["interval"] == 0)

    def _penalties(self, real: _Verdict, fake: _Verdict) -> list[tuple[str, Tensor, float]]:
        """Return names, penalties and weights of a batch."""
        found = []
        for kind, verdict in (("r1", real), ("r2", fake)):
            if self._penalized(kind):
                assert self.penalty is not None
                weight = self.penalty[kind] / 2 * self.penalty["interval"]
                penalty = gradient_penalty(verdict.logits, verdict.images)
                found.append((kind, penalty, weight))
        if self.lecam is not None:
            self.means = self.means.to(real.logits.device)
            sides = real.logits, fake.logits
            if self.lecam["per"] == "batch":
                sides = tuple(all_reduce_mean_with_grad(side.float().mean()) for side in sides)
            found.append(("lecam", lecam_penalty(*sides, *self.means), self.lecam["weight"]))
        return found

    # ------------------------------------------------------------------ of a step

    def gather(self) -> Tensor | None:
        """Average the gradients over the ranks, bound them, and return their norm."""
        parameters = [p for p in self.discriminator.parameters() if p.grad is not None]
        if not parameters:
            return None
        if self._gathered:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore
        average_gradients(parameters)
        self._gathered = True
        return torch.nn.utils.clip_grad_norm_(parameters, self.clip or float("inf"))

    def step(self, factor: float) -> None:
        """Move the discriminator and LeCAM's means."""
        assert self.optimizer is not None, "equip comes first"
        if not self._gathered and self.gather() is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.options["lr"]) * factor
        self.optimizer.step()
        if self.lecam is not None:
            decay, means = self.lecam["decay"], all_reduce_sum(self._sums) / world_size()
            self.means = decay * self.means.to(means.device) + (1 - decay) * means
        self.steps += 1
        self.discard()

    def discard(self) -> None:
        """Forget the gradients and sums of the step."""
        assert self.optimizer is not None, "equip comes first"
        self.optimizer.zero_grad()
        self._sums = torch.zeros_like(self._sums)
        self._gathered = False
        self._kept = None

    def to(self, device: torch.device) -> None:
        """Move discriminator and moments."""
        self.discriminator.to(device)
        self.means = self.means.to(device)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # to where the weights are

    def state_dict(self) -> dict[str, Any]:
        """Return weights, moments, LeCAM's means and the number of steps."""
        assert self.optimizer is not None, "equip comes first"
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "means": self.means,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, also before it had means and steps."""
        assert self.optimizer is not None, "equip comes first"
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.means = state.get("means", self.means).clone()
        self.steps = int(state.get("steps", 0))
