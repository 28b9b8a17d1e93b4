"""Pixel losses. Images are in [-1, 1]: an MSE here is four times, an L1 twice, that in [0, 1]."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vistok.core.ranks import all_reduce_mean_with_grad
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.values import NonNegative
from vistok.models.term import Step, Term


class _Pointwise(Term):
    """A term that compares value and target point by point."""

    accepts = ("pixels", "velocity", "features")

    def errors(self, step: Step) -> Tensor:
        """Return value minus target, float32."""
        prediction = step.prediction
        return prediction.value.float() - prediction.target.float()


@register("mse")
class MSELoss(_Pointwise):
    """Mean squared error between prediction and target."""

    def forward(self, step: Step) -> Tensor:
        """Return a float32 scalar."""
        return step.prediction.mean(self.errors(step).square())


@register("log_mse")
class LogMSELoss(_Pointwise):
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

    def __init__(
        self, floor: NonNegative = 1e-4, per: Literal["sample", "batch"] = "sample"
    ) -> None:
        super().__init__()
        check_values(LogMSELoss, locals())
        self.floor = floor
        self.per = per

    def forward(self, step: Step) -> Tensor:
        """Return a float32 scalar, in nats."""
        error = self.errors(step).square()
        if self.per == "batch":  # of all ranks: a mean of logarithms is another number
            mean = step.prediction.mean(error)
            return (all_reduce_mean_with_grad(mean) + self.floor).log()
        return step.prediction.mean((error.flatten(1).mean(dim=1) + self.floor).log())


@register("l1")
class L1Loss(_Pointwise):
    """Mean absolute error between prediction and target."""

    def forward(self, step: Step) -> Tensor:
        """Return a float32 scalar."""
        return step.prediction.mean(self.errors(step).abs())
