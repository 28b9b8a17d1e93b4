"""Terms that let a loss of the quantizer fade: more of it early, less or none later."""

from __future__ import annotations

from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.values import Count, check
from vistok.models.term import Step, Term
from vistok.models.tokenizer import Tokenizer


@register("fading_quantizer_loss")
class FadingQuantizerLoss(Term):
    """One of the quantizer's losses once more, with a factor that falls from 1 to 0.

    In addition to the loss's own weight b, an entry of weight a lets it begin at a + b and end at
    b, as MAGVIT-v2 and Open-MAGVIT2 anneal their entropy: b (1 + r max(0, 1 - seen / fade)) is the
    entry `weight: b r`. With `quantizer.entropy_weight=0` it ends at 0 (GigaTok stops it so).

    Papers: MAGVIT-v2, Yu et al. 2024, https://arxiv.org/abs/2310.05737; Open-MAGVIT2, Luo et al.
    2024, https://arxiv.org/abs/2409.04410.

    Args:
        loss: its name among the quantizer's losses, such as "entropy".
        fade_samples: images over which the factor falls to 0.
        linear: let it fall linearly; otherwise it is 1 and then 0 at once.
        tokenizer: whose quantizer it is; given by the objective.
    """

    def __init__(
        self,
        loss: str,
        fade_samples: Count,
        linear: bool = True,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        check("fade_samples", fade_samples, Count)
        if tokenizer is not None and loss not in tokenizer.quantizer.loss_weights:
            known = ", ".join(tokenizer.quantizer.loss_weights) or "none"
            raise ArgumentError(f"loss={loss}: the quantizer has no such loss; it has: {known}")
        self.loss, self.fade_samples, self.linear = loss, fade_samples, linear

    def factor(self, samples_seen: int) -> float:
        """Return the factor at a position in the data."""
        left = max(0.0, 1 - samples_seen / self.fade_samples)
        return left if self.linear else float(left > 0)

    def forward(self, step: Step) -> Tensor:
        """Return the loss times the factor."""
        factor = self.factor(step.samples_seen)
        losses = step.output.quantizer.losses
        if not factor or self.loss not in losses:
            return step.images.new_zeros(())
        return factor * losses[self.loss]
