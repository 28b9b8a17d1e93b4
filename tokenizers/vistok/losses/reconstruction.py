"""Pixel losses. Images are in [-1, 1]: an MSE here is four times, an L1 twice, that in [0, 1]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vistok.types import TokenizerOutput


class MSELoss(nn.Module):
    """Mean squared error between prediction and target."""

    def forward(self, output: TokenizerOutput, step: int) -> Tensor:
        """Scalar float32."""
        return F.mse_loss(output.prediction.float(), output.target.float())


class L1Loss(nn.Module):
    """Mean absolute error between prediction and target."""

    def forward(self, output: TokenizerOutput, step: int) -> Tensor:
        """Scalar float32."""
        return F.l1_loss(output.prediction.float(), output.target.float())
