"""Metrics of reconstructions. All take images as uint8, so every tool gives the same number.

Subclasses of `torchmetrics.Metric`, which adds up their states over the ranks in `compute`. Ours
are PSNR and SSIM all the same: torchmetrics' own average over batches and pixels, papers over
images.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure


class ImageMetric(Metric):
    """A metric of reconstructions against their originals."""

    higher_is_better = True

    full_state_update = False
    is_differentiable = False

    @abstractmethod
    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""

    def per_image(self, originals: Tensor, reconstructions: Tensor) -> Tensor | None:
        """Return `(B,)` values if the metric is their mean over images, else None."""
        return None

    def identity(self) -> dict[str, Any]:
        """Return what its numbers depend on, as plain values."""
        return {"name": type(self).__name__.lower()}


class MeanPerImage(ImageMetric):
    """A metric that is the mean over images of one number each.

    A mean of batch means would weight the images of a last, smaller batch more. Sums are float64.
    """

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.total: Tensor
        self.count: Tensor

    @abstractmethod
    def per_image(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Return `(B,)` values of images `(B, C, H, W)` uint8."""

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""
        if len(originals):
            values = self.per_image(originals, reconstructions)
            self.total += values.double().sum()
            self.count += len(values)

    def compute(self) -> Tensor:
        """Return the mean over all images and ranks, a float64 scalar."""
        return self.total / self.count


class PSNR(MeanPerImage):
    """Peak signal-to-noise ratio in dB, the mean of the images' own (as papers report it).

    A perfect image counts as 100 dB.
    """

    def per_image(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Return `(B,)` dB, float64."""
        mse = ((originals.double() - reconstructions.double()) / 255).square().mean(dim=(1, 2, 3))
        return -10 * torch.log10(mse.clamp(min=1e-10))


class SSIM(MeanPerImage):
    """Structural similarity: Gaussian window, sigma 1.5, data range 1 (torchmetrics)."""

    def per_image(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Return `(B,)` in [-1, 1]."""
        value = structural_similarity_index_measure(
            reconstructions.float() / 255, originals.float() / 255, data_range=1.0, reduction="none"
        )
        assert isinstance(value, Tensor)
        return value.reshape(-1)


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] to uint8, rounded (truncation would darken by half a level)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
