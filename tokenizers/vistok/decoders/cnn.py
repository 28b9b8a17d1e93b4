"""The convolutional decoder of VQGAN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.decoders.base import Decoder
from vistok.errors import ArgumentError
from vistok.nn.cnn import (
    AdaptiveGroupNorm,
    DepthToSpace,
    ResBlock,
    SpatialAttention,
    Upsample,
    group_norm,
)
from vistok.nn.linear_start import pixels, start_block_, start_conv_, start_upsampling_
from vistok.nn.patches import grid_of, least_squares

_ROWS = 20000  # pixels that the last layer is fitted to


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
        image_size: int | Sequence[int],
        channels: int,
        latent_dim: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int = 3,
        stem: int = 1,
        attention: bool = True,
        upsample: str = "nearest",
        adaptive_norm: bool = False,
        level_attention: bool = True,
    ) -> None:
        super().__init__()
        self.grid = grid_of(image_size, stem * 2 ** (len(channel_multipliers) - 1))
        if upsample not in ("nearest", "depth_to_space"):
            raise ArgumentError(f"upsample={upsample}: must be nearest or depth_to_space")
        self.dim = latent_dim
        self.stem = stem
        width = base_channels * channel_multipliers[-1]
        self.conv_in = nn.Conv2d(latent_dim, width, 3, padding=1)
        layers: list[nn.Module] = [ResBlock(width, width)]
        if attention:
            layers.append(SpatialAttention(width))
        layers.append(ResBlock(width, width))
        for level in reversed(range(len(channel_multipliers))):
            if adaptive_norm:
                layers.append(AdaptiveGroupNorm(width, latent_dim))
            for _ in range(num_res_blocks):
                layers.append(ResBlock(width, base_channels * channel_multipliers[level]))
                width = base_channels * channel_multipliers[level]
                if attention and level_attention and level == len(channel_multipliers) - 1:
                    layers.append(SpatialAttention(width))
            if level:
                layers.append((Upsample if upsample == "nearest" else DepthToSpace)(width))
        self.layers = nn.Sequential(*layers)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, channels * stem * stem, 3, padding=1)

    def reconstruct(self, quantized: Tensor, mask: Tensor | None = None, **sampling: Any) -> Tensor:
        """Images `(B, C, H, W)` from `(B, rows * columns, D)`; masked cells count as zero."""
        if mask is not None:
            quantized = quantized * mask[..., None]
        return F.pixel_shuffle(self.conv_out(self.features(quantized)), self.stem)

    def features(self, quantized: Tensor) -> Tensor:
        """What the last convolution sees: `(B, base_channels, H / stem, W / stem)`."""
        latents = quantized.transpose(1, 2).unflatten(2, self.grid)
        x = self.conv_in(latents)
        for layer in self.layers:
            x = layer(x, latents) if isinstance(layer, AdaptiveGroupNorm) else layer(x)
        return F.silu(self.norm_out(x))

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
        for latents, chunk in zip(quantized[:64].split(8), images[:64].split(8), strict=True):
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
