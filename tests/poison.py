"""Parts that make a training sick, for `plugins=[poison]`: losses and gradients that are not finite."""

import torch

import vistok
from vistok.core.ranks import rank
from vistok.losses.gan.adversary import Adversary
from vistok.models.term import Term


class _Sick(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@vistok.register("poison")
class Poison(Term):
    """Zero; in some steps NaN, or zero with an infinite gradient.

    Args:
        at: positions in the data at which these steps begin.
        kind: "loss", "gradient", or "weights" for weights of the tokenizer that turn into NaN.
        on_rank: that is struck alone; None for all.
    """

    accepts = ("pixels",)

    def __init__(self, at: list, kind: str = "loss", on_rank: int | None = None) -> None:
        super().__init__()
        self.at, self.kind, self.on_rank = at, kind, on_rank

    def forward(self, step):
        zero = step.prediction.value.float().sum() * 0
        if step.samples_seen not in self.at or self.on_rank not in (None, rank()):
            return zero
        if self.kind == "weights":
            with torch.no_grad():
                next(step.tokenizer.decoder.parameters()).fill_(float("nan"))
        return _Sick.apply(zero) if self.kind == "gradient" else zero * float("nan")


@vistok.register("poisoned_adversary")
class PoisonedAdversary(Adversary):
    """An adversary whose own loss is NaN after so many steps.

    Args:
        at: its steps; each strikes once.
        options: of an adversary.
    """

    def __init__(self, at: list, on_rank: int | None = None, **options) -> None:
        super().__init__(**options)
        self.at, self.on_rank = list(at), on_rank
        self.game = self.game._replace(discriminator=self._loss(self.game.discriminator))

    def _loss(self, loss):
        def poisoned(real, fake):
            sick = self.steps in self.at
            if sick:
                self.at.remove(self.steps)
            sick = sick and self.on_rank in (None, rank())
            return loss(real, fake) * (float("nan") if sick else 1.0)

        return poisoned
