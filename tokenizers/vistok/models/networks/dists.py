"""DISTS: structure and texture of VGG16's features."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.registry import register
from vistok.models.networks.files import (
    check_hash,
    find_weights,
    given_or_packaged,
    misfit,
    read_tensors,
    sha256_of,
)
from vistok.models.networks.vgg import load_published, vgg16
from vistok.nn.network import Network

_WIDTHS = (3, 64, 128, 256, 512, 512)

_FLOOR = 1e-6  # of both ratios


class Smooth(nn.Module):
    """L2 pooling: the root of the mean of squares under a Hann window, at every second place."""

    def __init__(self) -> None:
        super().__init__()
        window = torch.tensor([0.5, 1.0, 0.5])
        window = window[:, None] * window
        self.register_buffer("window", (window / window.sum())[None, None], persistent=False)
        self.window: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, ceil(H / 2), ceil(W / 2))`."""
        window = self.window.expand(x.shape[1], -1, -1, -1)
        squares = F.conv2d(x.square(), window, stride=2, padding=1, groups=x.shape[1])
        return (squares + 1e-12).sqrt()


@register("dists")
class DISTS(Network):
    """DISTS: similarity of the means (texture) and correlations (structure) of VGG16's features.

    Paper: Ding et al. 2020, https://arxiv.org/abs/2004.07728.

    Args:
        weights: a file of torchvision's VGG16; None for torch hub's cache.
        heads: a file with `alpha` and `beta`; None for the one that comes with torchmetrics.
        sha256: first digits that the file of weights must have; None for any.

    Raises:
        ArgumentError: if the weights are not at hand or another network's.
    """

    name = "dists"
    gives = ("maps", "distances")

    def __init__(
        self,
        weights: str | Path | None = None,
        heads: str | Path | None = None,
        sha256: str | None = None,
    ) -> None:
        path = find_weights(
            weights, "VGG16", ["vgg16-397923af.pth"], "; hed_vgg comes with a package"
        )
        check_hash(path, sha256)
        super().__init__()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.normalize_by(2 * mean - 1, 2 * std)
        self.features = vgg16()[:30]
        load_published(self.features, path, "VGG16")
        for number, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):
                self.features[number] = Smooth()
        self.hashes["weights"] = sha256_of(path)
        where = given_or_packaged(
            heads,
            "torchmetrics",
            "functional/image/dists_models/weights.pt",
            "heads",
            "DISTS's alpha and beta come with torchmetrics",
        )
        found = read_tensors(where, "DISTS's alpha and beta", "heads")
        for name in ("alpha", "beta"):
            if name not in found or found[name].numel() != sum(_WIDTHS):
                raise misfit(where, "DISTS's alpha and beta", f"'{name}' does not fit", "heads")
            self.register_buffer(name, found[name].detach().flatten(), persistent=False)
        self.alpha: Tensor
        self.beta: Tensor
        self.hashes["heads"] = sha256_of(where)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the image itself in [0, 1] and five maps of it."""
        x = self.normalized(images)
        maps = [(x * self.std + self.mean + 1) / 2]
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in (3, 8, 15, 22, 29):
                maps.append(x)
        return maps

    def distances(self, maps: list[Tensor], others: list[Tensor]) -> Tensor:
        """Return one minus the similarity, `(B,)`."""
        total = self.alpha.sum() + self.beta.sum()
        alphas, betas = self.alpha.split(_WIDTHS), self.beta.split(_WIDTHS)
        similarity = torch.zeros((), device=maps[0].device)
        for x, y, alpha, beta in zip(maps, others, alphas, betas, strict=True):
            mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
            off_x, off_y = x - mean_x[..., None, None], y - mean_y[..., None, None]
            texture = (2 * mean_x * mean_y + _FLOOR) / (mean_x**2 + mean_y**2 + _FLOOR)
            spread = off_x.square().mean((2, 3)) + off_y.square().mean((2, 3))
            structure = (2 * (off_x * off_y).mean((2, 3)) + _FLOOR) / (spread + _FLOOR)
            similarity = similarity + (alpha * texture + beta * structure).sum(1) / total
        return 1 - similarity
