"""Pixel losses. Images are in [-1, 1]: an MSE here is four times, an L1 twice, that in [0, 1]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ConfigError
from vistok.core.outputs import TokenizerOutput
from vistok.core.ranks import all_reduce_mean_with_grad
from vistok.core.registry import register


@register("mse")
class MSELoss(nn.Module):
    """Mean squared error between prediction and target."""

    def forward(self, output: TokenizerOutput, step: int) -> Tensor:
        """Scalar float32."""
        return F.mse_loss(output.prediction.float(), output.target.float())


@register("log_mse")
class LogMSELoss(nn.Module):
    """Logarithm of the mean squared error: of each image's, averaged, or of the batch's.

    Of the images' it is PSNR, up to sign and scale, as it is reported: the mean of the images'
    own. It weighs easy and hard images alike, where the MSE of a batch is ruled by its few
    hardest ones. Of the batch's it leaves images as the MSE weighs them, but weighs steps alike:
    for codes of one length per step, where a short one's MSE is many times a long one's.

    Args:
        floor: added to the error, in squared units of [-1, 1]. Below it (46 dB for the default)
            an image counts as done.
        per: "sample" or "batch", of all ranks. Batches that are accumulated to one step have a
            logarithm each, so with "batch" the split of a step matters.
    """

    def __init__(self, floor: float = 1e-4, per: str = "sample") -> None:
        super().__init__()
        if per not in ("sample", "batch"):
            raise ConfigError(f"loss.terms.reconstruction.per={per}: must be sample or batch")
        self.floor = floor
        self.per = per

    def forward(self, output: TokenizerOutput, step: int) -> Tensor:
        """Scalar float32, in nats."""
        error = (output.prediction.float() - output.target.float()).square()
        if self.per == "batch":  # of all ranks: a mean of logarithms is another number
            return (all_reduce_mean_with_grad(error.mean()) + self.floor).log()
        return (error.flatten(1).mean(dim=1) + self.floor).log().mean()


@register("l1")
class L1Loss(nn.Module):
    """Mean absolute error between prediction and target."""

    def forward(self, output: TokenizerOutput, step: int) -> Tensor:
        """Scalar float32."""
        return F.l1_loss(output.prediction.float(), output.target.float())
