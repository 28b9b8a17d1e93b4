"""The convolutional encoder and decoder of VQGAN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.geometry import grid_of
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.taps import NO_TAPS, Tap, Taps
from vistok.core.values import Count, ImageSize, Sizes
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.nn.conv import (
    AdaptiveGroupNorm,
    DepthToSpace,
    Downsample,
    ResBlock,
    SpatialAttention,
    Upsample,
    group_norm,
)
from vistok.nn.data_init import (
    chunks,
    least_squares,
    pixels,
    start_block_,
    start_conv_,
    start_upsampling_,
)


@register("cnn_encoder")
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
        image_size: ImageSize,
        channels: Count,
        base_channels: Count,
        channel_multipliers: Sizes,
        num_res_blocks: Count = 2,
        stem: Count = 1,
        attention: bool = True,
        level_attention: bool = True,
        latent_dim: Count | None = None,
    ) -> None:
        super().__init__()
        factor = stem * 2 ** (len(channel_multipliers) - 1)
        grid = grid_of(image_size, factor)
        self.grid: tuple[int, int] = grid  # type: ignore[assignment]
        self.num_tokens = grid[0] * grid[1]
        self.stem = stem
        self.conv_in = nn.Conv2d(channels * stem * stem, base_channels, 3, padding=1)
        self.widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.ends: dict[int, int] = {}  # levels by the indices of their last layers
        layers: list[nn.Module] = []
        width = base_channels
        for level, multiplier in enumerate(channel_multipliers):
            last = level == len(channel_multipliers) - 1
            for _ in range(num_res_blocks):
                layers.append(ResBlock(width, base_channels * multiplier))
                width = base_channels * multiplier
                if last and attention and level_attention:
                    layers.append(SpatialAttention(width))
            self.ends[len(layers) - 1] = level
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

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, rows * columns, D)`, raster order."""
        x = self.conv_in(_fold(images, self.stem))
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.ends:
                offer_level(taps, self.ends[number], x)
        x = F.silu(self.norm_out(x))
        x = x if self.conv_out is None else self.conv_out(x)
        return x.flatten(2).transpose(1, 2)

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the levels."""
        return level_taps(self.widths, self.grid)

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


def level_taps(widths: Sequence[int], coarsest: tuple[int, int]) -> dict[str, Tap]:
    """Return the taps `level.{i}` of a CNN, each grid half of the one before.

    Args:
        widths: channels of each level, 0 the finest.
        coarsest: rows and columns of the last level.
    """
    rows, columns = coarsest
    scales = [2 ** (len(widths) - 1 - level) for level in range(len(widths))]
    grids = [(rows * scale, columns * scale) for scale in scales]
    return {f"level.{i}": Tap(*level) for i, level in enumerate(zip(widths, grids, strict=True))}


def offer_level(taps: Taps, level: int, maps: Tensor) -> None:
    """Offer the cells of maps `(B, C, rows, columns)` as `level.{i}`, `(B, cells, C)`."""
    if taps.wants(f"level.{level}"):
        taps.offer(f"level.{level}", maps.flatten(2).transpose(1, 2))


def _fold(images: Tensor, side: int) -> Tensor:
    """Squares of `side` pixels of `(B, C, H, W)` as channels: `(B, C * side ** 2, ...)`."""
    if len(images):
        return F.pixel_unshuffle(images, side) if side > 1 else images
    _, channels, height, width = images.shape  # which torch 2.15 leaves as they are
    return images.new_empty(0, channels * side * side, height // side, width // side)


_ROWS = 20000  # pixels that the last layer is fitted to


@register("cnn_decoder")
class CNNDecoder(Decoder):
    """Residual blocks with a doubling between levels; the mirror of `CNNEncoder`.

    VQGAN (Esser et al. 2021, https://arxiv.org/abs/2012.09841).

    Args:
        image_size: side in pixels, or (H, W), multiples of the downsampling factor.
        channels: C of the images.
        latent_dim: D, the width of the quantized latents.
        base_channels: channels of the last level.
        channel_multipliers: one per level, times `base_channels`, in the *encoder's* order.
        num_res_blocks: residual blocks per level (one more than the encoder, as in the paper).
        stem: side of the squares that the last channels unfold into; the encoder's.
        attention: self-attention in the middle block and at the first level.
        upsample: "nearest" pixels and a convolution (VQGAN), or "depth_to_space" (GigaTok).
        adaptive_norm: begin each level with a norm that is set by the latents; see
            `AdaptiveGroupNorm` (GigaTok).
        level_attention: the encoder's.
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        latent_dim: Count,
        base_channels: Count,
        channel_multipliers: Sizes,
        num_res_blocks: Count = 3,
        stem: Count = 1,
        attention: bool = True,
        upsample: Literal["nearest", "depth_to_space"] = "nearest",
        adaptive_norm: bool = False,
        level_attention: bool = True,
    ) -> None:
        super().__init__()
        check_values(CNNDecoder, locals())
        self.grid = grid_of(image_size, stem * 2 ** (len(channel_multipliers) - 1))
        self.dim = latent_dim
        self.stem = stem
        self.widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.ends: dict[int, int] = {}  # levels by the indices of their last layers
        width = self.widths[-1]
        self.conv_in = nn.Conv2d(latent_dim, width, 3, padding=1)
        layers: list[nn.Module] = [ResBlock(width, width)]
        if attention:
            layers.append(SpatialAttention(width))
        layers.append(ResBlock(width, width))
        for level in reversed(range(len(channel_multipliers))):
            if adaptive_norm:
                layers.append(AdaptiveGroupNorm(width, latent_dim))
            for _ in range(num_res_blocks):
                layers.append(ResBlock(width, self.widths[level]))
                width = self.widths[level]
                if attention and level_attention and level == len(channel_multipliers) - 1:
                    layers.append(SpatialAttention(width))
            self.ends[len(layers) - 1] = level
            if level:
                layers.append((Upsample if upsample == "nearest" else DepthToSpace)(width))
        self.layers = nn.Sequential(*layers)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, channels * stem * stem, 3, padding=1)

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
        return F.pixel_shuffle(self.conv_out(self.features(quantized, taps)), self.stem)

    def features(self, quantized: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return what the last convolution sees: `(B, base_channels, H / stem, W / stem)`."""
        latents = quantized.transpose(1, 2).unflatten(2, self.grid)
        x = self.conv_in(latents)
        for number, layer in enumerate(self.layers):
            x = layer(x, latents) if isinstance(layer, AdaptiveGroupNorm) else layer(x)
            if number in self.ends:
                offer_level(taps, self.ends[number], x)
        return F.silu(self.norm_out(x))

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the levels."""
        return level_taps(self.widths, self.grid)

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start as a map that hands on what latents say of `images`; see `linear_start`.

        The last convolution is the linear map that reconstructs them best.
        """
        few = max(8, 2**18 // images[0, 0].numel())
        latents = quantized[:few].transpose(1, 2).unflatten(2, self.grid)
        start_conv_(self.conv_in, latents)
        x = self.conv_in(latents)
        for layer in self.layers:
            start_block_(layer, x)
            if isinstance(layer, (Upsample, DepthToSpace)):
                factor = images.shape[2] // (2 * x.shape[2])
                start_upsampling_(layer, x, F.pixel_unshuffle(images[:few], factor))
            x = layer(x, latents) if isinstance(layer, AdaptiveGroupNorm) else layer(x)
        rows, targets = [], []
        # A few images are enough.
        for chunk, latents in chunks(images[:64], quantized[:64], most=8):
            count = _ROWS * len(chunk) // min(64, len(images))
            rows.append(pixels(self.features(latents), 3, count=count))
            targets.append(pixels(F.pixel_unshuffle(chunk, self.stem), count=count))
        weight, bias = least_squares(torch.cat(rows), torch.cat(targets))
        self.conv_out.weight.copy_(weight.view_as(self.conv_out.weight))
        assert self.conv_out.bias is not None
        self.conv_out.bias.copy_(bias)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution."""
        return self.conv_out.weight
