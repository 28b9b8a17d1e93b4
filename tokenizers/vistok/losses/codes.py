"""Losses on codes rather than pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.outputs import TokenizerOutput
from vistok.core.registry import register


@register("codes")
class CodeLoss(nn.Module):
    """Cross-entropy between predicted logits `(B, n, K)` and target codes `(B, n)`, in nats."""

    def forward(self, output: TokenizerOutput, step: int) -> Tensor:
        """Scalar float32, the mean over all cells."""
        return F.cross_entropy(output.prediction.float().flatten(0, 1), output.target.flatten())
