"""Pixel losses. Images are in [-1, 1]: an MSE here is four times, an L1 twice, that in [0, 1]."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vistok.core.ranks import all_reduce_mean_with_grad
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.values import NonNegative, Positive
from vistok.models.logit_laplace import EDGE, LOG_SCALES, to_logits
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


@register("gradients")
class GradientLoss(Term):
    """Mean squared error of the differences between neighbouring pixels, along rows and columns.

    The sum of both directions' means. Next to `mse` it weighs what changes from pixel to pixel:
    seams between tiles, which cost the MSE little and the eye much. Both have the same best
    picture of a code, the mean of all images that it stands for.
    """

    accepts = ("pixels",)

    def forward(self, step: Step) -> Tensor:
        """Return a float32 scalar, 0 or more."""
        prediction = step.prediction
        errors = prediction.value.float() - prediction.target.float()
        return sum(
            (prediction.mean(errors.diff(dim=dim).square()) for dim in (2, 3)),
            start=errors.new_zeros(()),
        )


@register("huber")
class HuberLoss(_Pointwise):
    """Squared error of small differences, absolute error of large ones.

    e^2 / 2 for |e| up to delta, delta (|e| - delta / 2) beyond.

    Args:
        delta: where one becomes the other, in units of [-1, 1].
    """

    def __init__(self, delta: Positive = 0.1) -> None:
        super().__init__()
        check_values(HuberLoss, locals())
        self.delta = delta

    def forward(self, step: Step) -> Tensor:
        """Return a float32 scalar."""
        size = self.errors(step).abs()
        inner = size.clamp(max=self.delta)
        return step.prediction.mean(inner * (size - inner / 2))


@register("logit_laplace")
class LogitLaplaceLoss(Term):
    """Negative log-likelihood of pixels under logit-Laplace distributions, in nats per value.

    |logit(p) - m| / b + ln b + ln(2 p (1 - p)) for a value p of [0, 1] squeezed into [0.1, 0.9], at
    the location m and the scale b that the decoder predicts; ln b is held within -7 and 7. It can
    be negative. Needs a `logit_laplace_decoder`, whose prediction is `of: distribution`.

    Papers: DALL-E, Ramesh et al. 2021, https://arxiv.org/abs/2102.12092; ViT-VQGAN, Yu et al. 2022,
    https://arxiv.org/abs/2110.04627.
    """

    accepts = ("logit_laplace",)

    def forward(self, step: Step) -> Tensor:
        """Return a float32 scalar."""
        prediction = step.prediction
        location, log_scale = prediction.value.float().chunk(2, dim=1)
        log_scale = log_scale.clamp(*LOG_SCALES)
        target = prediction.target.float()
        share = (1 - 2 * EDGE) * (target + 1) / 2 + EDGE
        distance = (to_logits(target) - location).abs() * torch.exp(-log_scale)
        density = math.log(2) + share.log() + (1 - share).log()
        return prediction.mean(distance + log_scale + density)
