"""The convolutional decoder of MaskGIT's VQGAN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vistok.decoders.base import Decoder
from vistok.nn.cnn import OutputSkipBlock, Upsample, group_norm
from vistok.nn.patches import grid_of


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
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        latent_dim: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.grid = grid_of(image_size, 2 ** (len(channel_multipliers) - 1))
        self.dim = latent_dim
        width = base_channels * channel_multipliers[-1]
        self.conv_in = nn.Conv2d(latent_dim, width, 3, padding=1)
        layers: list[nn.Module] = [OutputSkipBlock(width, width) for _ in range(num_res_blocks)]
        for level in reversed(range(len(channel_multipliers))):
            for _ in range(num_res_blocks):
                layers.append(OutputSkipBlock(width, base_channels * channel_multipliers[level]))
                width = base_channels * channel_multipliers[level]
            if level:
                layers.append(Upsample(width))
        self.layers = nn.Sequential(*layers)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def reconstruct(self, quantized: Tensor, mask: Tensor | None = None, **sampling: Any) -> Tensor:
        """Images `(B, C, H, W)` from `(B, rows * columns, D)`; masked cells count as zero."""
        if mask is not None:
            quantized = quantized * mask[..., None]
        x = self.conv_in(quantized.transpose(1, 2).unflatten(2, self.grid))
        x = self.conv_out(F.silu(self.norm_out(self.layers(x))))
        return 2 * x - 1  # the weights know images in [0, 1]

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution."""
        return self.conv_out.weight
