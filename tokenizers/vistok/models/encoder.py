"""The contract of an encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """Maps images `(B, C, H, W)` in [-1, 1] to latents `(B, N, D)`.

    Attributes:
        dim: D, the width of the latents.
        num_tokens: N.
    """

    dim: int
    num_tokens: int

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, N, D)`."""

    def initialize(self, images: Tensor) -> None:
        """Set weights from training images `(M, C, H, W)` in [-1, 1]; by default nothing."""
