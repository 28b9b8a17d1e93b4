"""The contract of an encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from vistok.core.geometry import Grid


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
    def forward(self, images: Tensor) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, N, D)`."""

    def initialize(self, images: Tensor) -> None:
        """Set weights from training images `(M, C, H, W)` in [-1, 1]; by default nothing."""
