"""Losses on codes rather than pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vistok.core.registry import register
from vistok.models.term import Step, Term


@register("codes")
class CodeLoss(Term):
    """Cross-entropy between predicted logits `(B, n, K)` and target codes `(B, n)`, in nats."""

    accepts = ("logits",)

    def forward(self, step: Step) -> Tensor:
        """Return a float32 scalar, the mean over all cells."""
        prediction = step.prediction
        logits = prediction.value.float().flatten(0, 1)
        errors = F.cross_entropy(logits, prediction.target.flatten(), reduction="none")
        return prediction.mean(errors.view(prediction.target.shape))
