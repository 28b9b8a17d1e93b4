"""The convolutional encoder and decoder of MaskGIT's VQGAN."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.geometry import grid_of
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.taps import NO_TAPS, Tap, Taps
from vistok.core.values import Count, ImageSize, Positive, Sizes
from vistok.models.cnn import level_taps, offer_level
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.nn.conv import OutputSkipBlock, Upsample, group_norm


@register("maskgit_encoder")
class MaskGITEncoder(Encoder):
    """Residual blocks with an average over 2x2 cells between levels; no attention.

    The VQGAN of MaskGIT (Chang et al. 2022, https://arxiv.org/abs/2202.04200), whose released
    weights are the proxy of TiTok's first stage. The downsampling factor is
    `2 ** (len(channel_multipliers) - 1)`.

    Args:
        image_size: side in pixels, or (H, W), multiples of the downsampling factor.
        channels: C of the images.
        base_channels: channels of the first level.
        channel_multipliers: one per level, times `base_channels`.
        latent_dim: D of the latents.
        num_res_blocks: residual blocks per level, and behind the last one.
        mean: of each channel in [0, 1], taken off first; the first convolution has no bias.
        std: of each channel, divided by.
        norm_groups: of the norms, 32 as published; None for up to 32 of two or more channels each.
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        base_channels: Count,
        channel_multipliers: Sizes,
        latent_dim: Count,
        num_res_blocks: Count = 2,
        mean: float | Sequence[float] = 0.0,
        std: Positive | Sequence[Positive] = 1.0,
        norm_groups: Count | None = None,
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        check_values(MaskGITEncoder, locals())
        for name, given in (("mean", mean), ("std", std)):
            values = list(given) if isinstance(given, Sequence) else [given]
            if len(values) not in (1, channels):
                raise ArgumentError(f"{name}: {len(values)} values for {channels} channels")
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        grid = grid_of(image_size, 2 ** (len(channel_multipliers) - 1))
        self.grid: tuple[int, int] = grid  # type: ignore[assignment]
        self.num_tokens = grid[0] * grid[1]
        self.dim = latent_dim
        self.conv_in = nn.Conv2d(channels, base_channels, 3, padding=1, bias=False)
        self.widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.ends: dict[int, int] = {}  # levels by the indices of their last layers
        layers: list[nn.Module] = []
        width = base_channels
        for level in range(len(channel_multipliers)):
            if level:
                layers.append(nn.AvgPool2d(2))
            for _ in range(num_res_blocks):
                layers.append(OutputSkipBlock(width, self.widths[level], norm_groups))
                width = self.widths[level]
            self.ends[len(layers) - 1] = level
        layers += [OutputSkipBlock(width, width, norm_groups) for _ in range(num_res_blocks)]
        self.layers = nn.Sequential(*layers)
        self.norm_out = group_norm(width, groups=norm_groups)
        self.conv_out = nn.Conv2d(width, latent_dim, 1)

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, rows * columns, D)`, raster order."""
        images = ((images + 1) / 2 - self.mean) / self.std  # the weights know images in [0, 1]
        x = self.conv_in(images)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.ends:
                offer_level(taps, self.ends[number], x)
        return self.conv_out(F.silu(self.norm_out(x))).flatten(2).transpose(1, 2)

    def at(self, image_size: tuple[int, int]) -> MaskGITEncoder:
        """Return the same encoder, weights and all, for images of another size."""
        other = copy.copy(self)
        grid = grid_of(image_size, 2 ** (len(self.widths) - 1))
        other.grid, other.num_tokens = grid, grid[0] * grid[1]  # type: ignore[assignment]
        return other

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the levels."""
        return level_taps(self.widths, self.grid)


@register("maskgit_decoder")
class MaskGITDecoder(Decoder):
    """Residual blocks with a doubling between levels; the mirror of `MaskGITEncoder`.

    The VQGAN of MaskGIT (Chang et al. 2022, https://arxiv.org/abs/2202.04200).

    Args:
        image_size: side in pixels, or (H, W), multiples of the downsampling factor.
        channels: C of the images.
        latent_dim: D, the width of the quantized latents.
        base_channels: channels of the last level.
        channel_multipliers: one per level, times `base_channels`, in the *encoder's* order.
        num_res_blocks: residual blocks per level, and before the first one.
        norm_groups: of the norms, see `MaskGITEncoder`.
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        latent_dim: Count,
        base_channels: Count,
        channel_multipliers: Sizes,
        num_res_blocks: Count = 2,
        norm_groups: Count | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid_of(image_size, 2 ** (len(channel_multipliers) - 1))
        self.dim = latent_dim
        self.widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.ends: dict[int, int] = {}  # levels by the indices of their last layers
        width = self.widths[-1]
        self.conv_in = nn.Conv2d(latent_dim, width, 3, padding=1)
        layers: list[nn.Module] = [
            OutputSkipBlock(width, width, norm_groups) for _ in range(num_res_blocks)
        ]
        for level in reversed(range(len(channel_multipliers))):
            for _ in range(num_res_blocks):
                layers.append(OutputSkipBlock(width, self.widths[level], norm_groups))
                width = self.widths[level]
            self.ends[len(layers) - 1] = level
            if level:
                layers.append(Upsample(width))
        self.layers = nn.Sequential(*layers)
        self.norm_out = group_norm(width, groups=norm_groups)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **sampling: Any,
    ) -> Tensor:
        """Images `(B, C, H, W)` from `(B, rows * columns, D)`; masked cells count as zero."""
        if mask is not None:
            quantized = quantized * mask[..., None]
        x = self.conv_in(quantized.transpose(1, 2).unflatten(2, self.grid))
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.ends:
                offer_level(taps, self.ends[number], x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return 2 * x - 1  # the weights know images in [0, 1]

    def at(self, image_size: tuple[int, int]) -> MaskGITDecoder:
        """Return the same decoder, weights and all, for images of another size."""
        other = copy.copy(self)
        other.grid = grid_of(image_size, 2 ** (len(self.widths) - 1))
        return other

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the levels."""
        return level_taps(self.widths, self.grid)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution."""
        return self.conv_out.weight
