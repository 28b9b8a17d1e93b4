"""Measure visible borders between the tiles of a reconstruction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.values import Count
from vistok.metrics.image import ImageMetric

_FLOOR = 1e-6  # levels, added to both gradients: of flat images their ratio is 1


@register("seams", kind="metric")
class Seams(ImageMetric):
    """Gradient across the borders of tiles over that elsewhere; 1 where no tiles show.

    The mean absolute difference of neighbouring pixels, in 8-bit levels, where a row or a column
    that is a multiple of `period` begins, over its mean at all other rows and columns, of all
    images and channels together. Photographs have about 1. It looks at reconstructions alone: a
    blurred picture has no seams either. Of images without a border between tiles it is 1.

    Args:
        period: side of the tiles in pixels, 2 or more.
    """

    higher_is_better = False

    def __init__(self, period: Count = 8) -> None:
        super().__init__()
        check_values(Seams, locals())
        if period < 2:
            raise ArgumentError(f"period={period}: must be 2 or more")
        self.period = period
        for name in ("across", "elsewhere"):  # sum of differences, and their number
            self.add_state(name, torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.across: Tensor
        self.elsewhere: Tensor

    def options(self) -> dict[str, Any]:
        """Return the side of the tiles."""
        return {"period": self.period}

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""
        self.check_pair(originals, reconstructions)
        pixels = reconstructions.to(torch.int16)
        for steps in (pixels.diff(dim=3), pixels.diff(dim=2).transpose(2, 3)):
            steps = steps.abs().double()
            at = torch.arange(1, steps.shape[3] + 1, device=steps.device) % self.period == 0
            for total, some in ((self.across, steps[..., at]), (self.elsewhere, steps[..., ~at])):
                total += torch.stack([some.sum(), some.new_tensor(some.numel())])

    def compute(self) -> Tensor:
        """Return the ratio over all images and ranks, a float64 scalar."""
        across, elsewhere = (total[0] / total[1] for total in (self.across, self.elsewhere))
        ratio = (across + _FLOOR) / (elsewhere + _FLOOR)
        return torch.where(self.across[1] > 0, ratio, 1.0)
