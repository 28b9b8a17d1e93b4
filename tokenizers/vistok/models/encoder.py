"""The contract of an encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from vistok.core.geometry import Grid
from vistok.core.taps import NO_TAPS, Tap, Taps


class Encoder(nn.Module, ABC):
    """Maps images `(B, C, H, W)` in [-1, 1] to latents `(B, N, D)`.

    Attributes:
        dim: D, the width of the latents.
        num_tokens: N.
        grid: places of the N tokens, in raster order: (rows, columns). None for a sequence.
    """

    dim: int
    num_tokens: int
    grid: Grid | None = None

    @abstractmethod
    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, N, D)`.

        Args:
            images: a batch.
            taps: offered the features that `tap_shapes` names.
        """

    def tap_shapes(self) -> dict[str, Tap]:
        """Return the features that every forward offers; by default none.

        In raster order where they have a grid: `block.{i}`, the places of the picture behind a
        transformer block, and `level.{i}`, the cells of a CNN behind a level, 0 the finest.
        """
        return {}

    def initialize(self, images: Tensor) -> None:
        """Set weights from training images `(M, C, H, W)` in [-1, 1]; by default nothing."""
