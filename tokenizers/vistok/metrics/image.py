"""Metrics of reconstructions. All take images as uint8, so every tool gives the same number.

A metric of the whole set (rFID) or with a network (LPIPS) is one more class with `update` and
`compute`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from vistok.core.ranks import all_reduce_sum


class ImageMetric(ABC):
    """Something that compares reconstructions with their originals."""

    @abstractmethod
    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The named results over all batches and ranks."""


class MeanPerImage(ImageMetric):
    """A metric that is the mean over images of one number each.

    A mean of batch means would weight the images of a last, smaller batch more.
    """

    name: str

    def __init__(self) -> None:
        self.total = torch.zeros(2, dtype=torch.float64)

    @abstractmethod
    def per_image(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """`(B,)` values of float images in [0, 1]."""

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""
        if len(originals):
            values = self.per_image(originals.float() / 255, reconstructions.float() / 255)
            self.total[0] += values.double().sum().cpu()
            self.total[1] += len(values)

    def compute(self) -> dict[str, float]:
        """The mean over all images and ranks."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        total = all_reduce_sum(self.total.to(device).clone())
        return {self.name: (total[0] / total[1]).item()}


class PSNR(MeanPerImage):
    """Peak signal-to-noise ratio in dB, the mean of the images' own (as papers report it).

    A perfect image counts as 100 dB.
    """

    name = "psnr"

    def per_image(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """`(B,)` dB."""
        mse = (originals.double() - reconstructions.double()).square().mean(dim=(1, 2, 3))
        return -10 * torch.log10(mse.clamp(min=1e-10))


class SSIM(MeanPerImage):
    """Structural similarity: Gaussian window, sigma 1.5, data range 1 (torchmetrics)."""

    name = "ssim"

    def per_image(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """`(B,)` in [-1, 1]."""
        value = structural_similarity_index_measure(
            reconstructions, originals, data_range=1.0, reduction="none"
        )
        assert isinstance(value, Tensor)
        return value.reshape(-1)


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] to uint8, rounded (truncation would darken by half a level)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
