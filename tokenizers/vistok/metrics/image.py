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
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.registry import name_of, register
from vistok.core.signatures import check_values
from vistok.core.torch_internals import version_of
from vistok.core.values import Count


class ImageMetric(Metric):
    """A metric of reconstructions against their originals.

    Configs name it by the name that it is registered under, of the kind "metric".

    Attributes:
        higher_is_better: which way it improves.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool  # type: ignore[reportIncompatibleVariableOverride]

    @abstractmethod
    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""

    @abstractmethod
    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the value over all images and ranks, or several by name."""

    def per_image(self, originals: Tensor, reconstructions: Tensor) -> Tensor | None:
        """Return the value of each image, `(B,)`, if the metric is their mean; else None.

        For lists of the best and the worst. Both are `(B, C, H, W)` uint8; nothing is taken in.
        """
        return None

    def identity(self) -> dict[str, Any]:
        """Return what decides its value: name, options, networks and the SHA-256 of their weights.

        It can be written as JSON, and belongs to the protocol of an evaluation. `grows_with` is
        "images" where the expected value depends on their number, so that only values of equally
        many images compare.
        """
        return {"name": name_of(type(self), "metric"), **self.options(), "grows_with": None}

    def options(self) -> dict[str, Any]:
        """Return the options that change its value."""
        return {}

    def check_pair(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Raise unless both are `(B, C, H, W)` uint8 of one shape.

        Raises:
            ConfigError: saying what was found.
        """
        name = name_of(type(self), "metric")
        if originals.shape != reconstructions.shape or originals.ndim != 4:
            raise ConfigError(
                f"{name}: originals {tuple(originals.shape)} and reconstructions "
                f"{tuple(reconstructions.shape)} differ; must be (B, C, H, W) both"
            )
        for what, images in (("originals", originals), ("reconstructions", reconstructions)):
            if images.dtype != torch.uint8:
                raise ConfigError(f"{name}: {what} are {images.dtype}; must be torch.uint8")


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
        self._last: tuple[Tensor, Tensor, tuple[int, int], Tensor] | None = None

    @abstractmethod
    def values(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Return `(B,)` values of uint8 images `(B, C, H, W)`, B 1 or more."""

    def per_image(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Return `(B,)` values of uint8 images; those of the last call are not computed again."""
        self.check_pair(originals, reconstructions)
        if not len(originals):
            return torch.zeros(0, device=originals.device)
        counted = not (originals.is_inference() or reconstructions.is_inference())
        changes = (version_of(originals), version_of(reconstructions)) if counted else (0, 0)
        if self._last is not None and counted:
            a, b, before, found = self._last
            if a is originals and b is reconstructions and before == changes:
                return found
        with torch.no_grad(), torch.autocast(originals.device.type, enabled=False):
            found = self.values(originals, reconstructions)
        self._last = (originals, reconstructions, changes, found) if counted else None
        return found

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""
        values = self.per_image(originals, reconstructions)
        self.total += values.double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        """Return the mean over all images and ranks, a float64 scalar."""
        return self.total / self.count

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._last = None


@register("psnr", kind="metric")
class PSNR(MeanPerImage):
    """Peak signal-to-noise ratio in dB, the mean of the images' own (as papers report it).

    A perfect image counts as 100 dB.
    """

    def values(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Return `(B,)` dB, float64."""
        mse = (originals.double() - reconstructions.double()).square().mean(dim=(1, 2, 3))
        return -10 * torch.log10((mse / 255**2).clamp(min=1e-10))


@register("ssim", kind="metric")
class SSIM(MeanPerImage):
    """Structural similarity: Gaussian window of 11 px, sigma 1.5, data range 1.

    Implementations differ at the border, by 0.002 for photographs of 256 px and 0.04 for those of
    32 px. Values of the two do not compare.

    Paper: Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861.

    Args:
        border: "mirrored", where the mean is over all pixels and windows at the border see the
            mirror image, as in torchmetrics; or "cut", where it is over the windows that lie
            inside the image, as in the paper, scikit-image and pytorch-msssim.
    """

    def __init__(self, border: str = "mirrored") -> None:
        super().__init__()
        if border not in ("mirrored", "cut"):
            raise ArgumentError(f"border={border}: must be mirrored or cut")
        self.border = border

    def options(self) -> dict[str, Any]:
        """Return the border where it is not the default, which protocols do not name."""
        return {} if self.border == "mirrored" else {"border": self.border}

    def values(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Return `(B,)` in [-1, 1]."""
        height, width = originals.shape[2:]
        cut = self.border == "cut"
        least = 11 if cut else 6  # a mirror image of 5 px needs one more
        if min(height, width) < least:
            raise ConfigError(
                f"ssim: images of {height} x {width} px are too small; needs {least} px a side"
            )
        value = structural_similarity_index_measure(
            reconstructions.float() / 255,
            originals.float() / 255,
            data_range=1.0,
            reduction="none",
            return_full_image=cut,
        )
        if cut:
            value = value[1][..., 5:-5, 5:-5].flatten(1).mean(dim=1)
        assert isinstance(value, Tensor)
        return value.reshape(-1)


#: Of the five scales of the paper, fine to coarse.
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def _least_side(scales: int) -> int:
    """Return the side that an image must have for so many scales, with torchmetrics' own bound."""
    return max(10 * 2 ** (scales - 1) + 1, 11 * max(1, scales - 1) ** 2)


def most_scales(side: int) -> int:
    """Return the most scales of MS-SSIM that images of this side allow; 0 for none."""
    return max((n for n in range(1, 6) if _least_side(n) <= side), default=0)


@register("ms_ssim", kind="metric")
class MSSSIM(MeanPerImage):
    """Structural similarity over several scales, each half the size of the one before.

    Each scale needs a window of 11 px, and torchmetrics somewhat more: five scales need sides of
    176 px. With fewer scales the weights of those that are left are brought to a sum of 1; values
    of different numbers of scales do not compare.

    Paper: Wang et al. 2003, https://doi.org/10.1109/ACSSC.2003.1292216.

    Args:
        scales: how many, 1 to 5.

    Raises:
        ConfigError: if there are more than five, or an image is too small for them.
    """

    def __init__(self, scales: Count = 5) -> None:
        super().__init__()
        check_values(MSSSIM, locals())
        if scales > 5:
            raise ArgumentError(f"scales={scales}: must be 1 to 5")
        self.scales = scales

    def options(self) -> dict[str, Any]:
        """Return the number of scales."""
        return {"scales": self.scales}

    def values(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Return `(B,)` in [0, 1]."""
        height, width = originals.shape[2:]
        if min(height, width) < (least := _least_side(self.scales)):
            most = most_scales(min(height, width))
            hint = f"; scales={most} fits" if most else ""
            raise ConfigError(
                f"ms_ssim: images of {height} x {width} px are too small for {self.scales} scales, "
                f"which need {least} px{hint}"
            )
        weights = _SCALE_WEIGHTS[: self.scales]
        total = 1.0 if self.scales == 5 else sum(weights)  # the published five make 1.0001
        value = multiscale_structural_similarity_index_measure(
            reconstructions.float() / 255,
            originals.float() / 255,
            data_range=1.0,
            reduction="none",
            betas=tuple(weight / total for weight in weights),
            normalize="relu",
        )
        assert isinstance(value, Tensor)
        return value.reshape(-1)


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] to uint8, rounded (truncation would darken by half a level)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
