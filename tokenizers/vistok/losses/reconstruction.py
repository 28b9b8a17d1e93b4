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


class LogMSELoss(nn.Module):
    """Mean over the images of the logarithm of their mean squared error.

    This is PSNR, up to sign and scale, as it is reported: the mean of the images' own. It weighs
    easy and hard images alike, where the MSE of a batch is ruled by its few hardest ones.

    Args:
        floor: added to each image's error, in squared units of [-1, 1]. Below it (46 dB for the
            default) an image counts as done.
    """

    def __init__(self, floor: float = 1e-4) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, output: TokenizerOutput, step: int) -> Tensor:
        """Scalar float32, in nats."""
        error = (output.prediction.float() - output.target.float()).square()
        return (error.flatten(1).mean(dim=1) + self.floor).log().mean()


class L1Loss(nn.Module):
    """Mean absolute error between prediction and target."""

    def forward(self, output: TokenizerOutput, step: int) -> Tensor:
        """Scalar float32."""
        return F.l1_loss(output.prediction.float(), output.target.float())
