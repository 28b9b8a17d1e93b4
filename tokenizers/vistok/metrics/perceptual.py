"""Perceptual distances of reconstructions, by networks that are handed in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vistok.core.registry import register
from vistok.metrics.image import MeanPerImage
from vistok.nn.frozen import Frozen
from vistok.nn.network import Network


@register("perceptual", kind="metric")
class Perceptual(MeanPerImage):
    """Distance of deep features: LPIPS, hed_vgg, lite0, DISTS or any network that has one.

    Args:
        network: whose distance it is.

    Raises:
        ArgumentError: if the network has none.
    """

    higher_is_better = False

    def __init__(self, network: Network) -> None:
        super().__init__()
        network.require("distances")
        self.network = Frozen(network)

    def values(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Return `(B,)`, 0 or more."""
        network: Network = self.network.module  # type: ignore[assignment]
        # Originals are compared with several reconstructions: budgets and codecs.
        a = network.recall("maps", originals, network.maps, kept=1)
        return network.distances(network.maps(reconstructions.float() / 127.5 - 1), a)

    def options(self) -> dict[str, Any]:
        """Return the network."""
        return {"network": self.network.module.identity()}  # type: ignore[operator]
