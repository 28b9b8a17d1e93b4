"""The convolutional encoder of VQGAN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.encoders.base import Encoder
from vistok.nn.cnn import Downsample, ResBlock, SpatialAttention, group_norm
from vistok.nn.linear_start import start_block_, start_conv_
from vistok.nn.patches import grid_of


class CNNEncoder(Encoder):
    """Residual blocks with a halving between levels; one latent per cell of the last grid.

    VQGAN (Esser et al. 2021, https://arxiv.org/abs/2012.09841). The downsampling factor is
    `stem * 2 ** (len(channel_multipliers) - 1)`.

    Args:
        image_size: side in pixels, or (H, W), multiples of the downsampling factor.
        channels: C of the images.
        base_channels: channels of the first level.
        channel_multipliers: one per level, times `base_channels`.
        num_res_blocks: residual blocks per level.
        stem: first, fold squares of this side into channels (1: the paper's 3x3 convolution).
            Work on few large cells costs less than on many small ones: 2 is about three
            times as fast and what the CPU-sized presets use.
        attention: self-attention in the middle block and at the last level.
        level_attention: with it, also at the last level (VQGAN), and not in the middle block alone
            (latent diffusion, Rombach et al. 2022, https://arxiv.org/abs/2112.10752).
        latent_dim: D, the width of the latents, to which a 3x3 convolution leads; None for the
            channels of the last level, and none.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int = 2,
        stem: int = 1,
        attention: bool = True,
        level_attention: bool = True,
        latent_dim: int | None = None,
    ) -> None:
        super().__init__()
        factor = stem * 2 ** (len(channel_multipliers) - 1)
        self.grid = grid_of(image_size, factor)
        self.num_tokens = self.grid[0] * self.grid[1]
        self.stem = stem
        self.conv_in = nn.Conv2d(channels * stem * stem, base_channels, 3, padding=1)
        layers: list[nn.Module] = []
        width = base_channels
        for level, multiplier in enumerate(channel_multipliers):
            last = level == len(channel_multipliers) - 1
            for _ in range(num_res_blocks):
                layers.append(ResBlock(width, base_channels * multiplier))
                width = base_channels * multiplier
                if last and attention and level_attention:
                    layers.append(SpatialAttention(width))
            if not last:
                layers.append(Downsample(width))
        layers.append(ResBlock(width, width))
        if attention:
            layers.append(SpatialAttention(width))
        layers.append(ResBlock(width, width))
        self.layers = nn.Sequential(*layers)
        self.norm_out = group_norm(width)
        self.dim = width if latent_dim is None else latent_dim
        self.conv_out = None if latent_dim is None else nn.Conv2d(width, latent_dim, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, rows * columns, D)`, raster order."""
        x = F.silu(self.norm_out(self.layers(self.conv_in(_fold(images, self.stem)))))
        x = x if self.conv_out is None else self.conv_out(x)
        return x.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Start as a map that keeps the principal components; see `linear_start`."""
        few = images[: max(8, 2**18 // images[0, 0].numel())]
        x = _fold(few, self.stem)
        start_conv_(self.conv_in, x)
        x = self.conv_in(x)
        for layer in self.layers:
            start_block_(layer, x)
            if isinstance(layer, Downsample):
                start_conv_(layer.conv, x)
            x = layer(x)
        if self.conv_out is not None:
            start_conv_(self.conv_out, F.silu(self.norm_out(x)))


def _fold(images: Tensor, side: int) -> Tensor:
    """Squares of `side` pixels of `(B, C, H, W)` as channels: `(B, C * side ** 2, ...)`."""
    if len(images):
        return F.pixel_unshuffle(images, side) if side > 1 else images
    _, channels, height, width = images.shape  # which torch 2.15 leaves as they are
    return images.new_empty(0, channels * side * side, height // side, width // side)
