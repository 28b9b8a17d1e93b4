"""Perceptual terms: pictures compared as a pretrained network sees them.

All compute in the precision of the network's weights, float32, also under autocast: near the end
of training two feature maps differ by less than bf16 can hold, and a Gram matrix sums thousands of
products. The target's features are computed without a gradient, and those of one picture once per
step, however many terms look at it through the same network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.models.term import Step, Term
from vistok.models.tokenizer import Tokenizer
from vistok.nn.frozen import Frozen
from vistok.nn.network import Network


class NetworkTerm(Term):
    """A term that looks at prediction and target through a frozen network.

    The network is in no checkpoint, no optimizer and no average.

    Args:
        network: to look through.
        tokenizer: whose images must suit the network; given by the objective.
    """

    accepts = ("pixels",)
    gift = "maps"  # what it asks of the network

    def __init__(self, network: Network, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        network.require(self.gift)
        if tokenizer is not None:
            try:
                network.check(tokenizer.channels, tokenizer.image_size)
            except ValueError as error:
                raise ArgumentError(f"network: {error}") from error
        self.network = Frozen(network)
        self.key = network.key

    def seen(self, step: Step, what: str, compute: Callable[[Network, Tensor], Any]) -> Any:
        """Return what `compute` says of the prediction and, without a gradient, of the target."""
        network: Network = self.network.module  # type: ignore[assignment]
        found = []
        for images, learns in ((step.prediction.value, True), (step.prediction.target, False)):

            def look(images: Tensor = images, learns: bool = learns) -> Any:
                grad = torch.set_grad_enabled(learns and torch.is_grad_enabled())
                with grad, torch.autocast(images.device.type, enabled=False):
                    return compute(network, images)

            found.append(step.once((self.key, what, learns), images, look))
        return found

    def averaged(self, step: Step, distances: Tensor) -> Tensor:
        """Return the mean of `(B,)` distances, each sample by its weight."""
        return step.prediction.mean(distances[:, None])


def _maps(network: Network, images: Tensor) -> list[Tensor]:
    return network.maps(images)


def _logits(network: Network, images: Tensor) -> Tensor:
    return network.classify(network.vectors(images))


@register("perceptual")
class PerceptualLoss(NetworkTerm):
    """The network's own distance: LPIPS, hed_vgg, lite0, DISTS, or a timm model's features.

    Of a network without learned weights (lite0, timm) it is the mean over depths and places of the
    squared distance of feature vectors of unit length.

    Args:
        network: such as `lpips` or `hed_vgg`.
        tokenizer: see `NetworkTerm`.
    """

    gift = "distances"

    def forward(self, step: Step) -> Tensor:
        """Return a scalar, 0 or more."""
        value, target = self.seen(step, "maps", _maps)
        network: Network = self.network.module  # type: ignore[assignment]
        with torch.autocast(value[0].device.type, enabled=False):
            return self.averaged(step, network.distances(value, target))


@register("class_logits")
class LogitLoss(NetworkTerm):
    """Mean squared error of a classifier's logits, as TiTok and TA-TiTok use ConvNeXt-S.

    1d-tokenizer (Yu et al. 2024, https://arxiv.org/abs/2406.07550) resizes to 224 px, bilinear and
    antialiased, which `timm` does with `interpolation=bilinear`; GigaTok uses a ResNet-50.

    Args:
        network: a classifier.
        tokenizer: see `NetworkTerm`.
    """

    gift = "logits"

    def forward(self, step: Step) -> Tensor:
        """Return a scalar, 0 or more."""
        value, target = self.seen(step, "logits", _logits)
        return self.averaged(step, (value - target).square().mean(dim=1))


@register("gram")
class GramLoss(NetworkTerm):
    """Mean squared error of the Gram matrices of feature maps: texture, wherever it lies.

    Of a map F of C channels and P places the matrix is F F^T / (C P). The sum is over depths.
    Papers: Gatys et al. 2016, https://arxiv.org/abs/1505.07376; AToken, Lu et al. 2025,
    https://arxiv.org/abs/2509.14476, whose factor was not at hand: the weight depends on it.

    Args:
        network: gives the maps.
        tokenizer: see `NetworkTerm`.
    """

    def forward(self, step: Step) -> Tensor:
        """Return a scalar, 0 or more."""
        value, target = self.seen(step, "maps", _maps)
        with torch.autocast(value[0].device.type, enabled=False):
            parts = [
                (gram(a) - gram(b)).square().mean((1, 2))
                for a, b in zip(value, target, strict=True)
            ]
            return self.averaged(step, torch.stack(parts).sum(0))


def gram(features: Tensor) -> Tensor:
    """Return F F^T / (C P), `(B, C, C)`, of maps `(B, C, H, W)`."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / (flat.shape[1] * flat.shape[2])
