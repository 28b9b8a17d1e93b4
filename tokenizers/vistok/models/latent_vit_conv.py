"""A ViT that paints an image from latent tokens, with residual convolutions across its seams."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.values import Count, ImageSize
from vistok.models.latent_vit import LatentTransformerDecoder
from vistok.nn.attention import AttentionKind
from vistok.nn.blocks import init_transformer_
from vistok.nn.conv import ResBlock
from vistok.nn.data_init import chunks, least_squares
from vistok.nn.patches import fold, patchify, unpatchify


@register("latent_vit_conv_decoder")
class LatentTransformerConvDecoder(LatentTransformerDecoder):
    """The transformer of `LatentTransformerDecoder`, and residual convolutions behind its head.

    A linear head paints each patch by itself, and one 3x3 convolution cannot mend the seams where
    two of them meet. Here the head lays out cells of a few pixels, each with more channels than
    pixels, on which residual blocks work before the last convolution turns them into pixels. Ours,
    not TiTok's: there a whole CNN follows, which reads predicted codes (`ProxyDecoder`).

    At the start the blocks and the last convolution hand on the cells' first channels, which
    `initialize` sets to pixels as it does those of a linear head.

    Args:
        image_size: side in pixels, or (H, W), multiples of `patch_size`.
        channels: C.
        patch_size: side of a patch in pixels, a multiple of `cell_size`.
        num_latent_tokens: K, the longest code.
        latent_dim: D, the width of the quantized latents.
        width: W of the transformer, a multiple of 4.
        depth: number of blocks of the transformer.
        num_heads: attention heads.
        cell_size: side of a cell in pixels.
        cell_channels: channels of a cell, at least the pixels' C * cell_size ** 2.
        num_res_blocks: residual blocks of convolutions.
        class_token: prepend a learned token, as TiTok does.
        activation_checkpointing: see `Transformer`.
        nested: as in the encoder.
        attention: dense or flex, where tokens are masked; see `nn/attention.py`.
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        patch_size: Count,
        num_latent_tokens: Count,
        latent_dim: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        cell_size: Count = 2,
        cell_channels: Count = 32,
        num_res_blocks: Count = 2,
        class_token: bool = True,
        activation_checkpointing: bool = False,
        nested: bool = False,
        attention: AttentionKind = "dense",
    ) -> None:
        check_values(LatentTransformerConvDecoder, locals())
        super().__init__(
            image_size,
            channels,
            patch_size,
            num_latent_tokens,
            latent_dim,
            width,
            depth,
            num_heads,
            class_token,
            activation_checkpointing,
            nested,
            attention,
        )
        if patch_size % cell_size:
            raise ArgumentError(f"cell_size={cell_size}: must divide patch_size={patch_size}")
        self.num_pixels = channels * cell_size**2  # of a cell
        if cell_channels < self.num_pixels:
            raise ArgumentError(
                f"cell_channels={cell_channels}: must be at least the {self.num_pixels} values of "
                f"the pixels of a cell"
            )
        self.cell_size = cell_size
        self.side = patch_size // cell_size  # of a patch, in cells
        del self.smooth  # the last convolution is another
        self.head = nn.Linear(width, self.side**2 * cell_channels)
        init_transformer_(self.head)
        blocks = [ResBlock(cell_channels, cell_channels) for _ in range(num_res_blocks)]
        self.blocks = nn.Sequential(*blocks)
        for block in blocks:
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)  # type: ignore[arg-type]
        self.conv_out = nn.Conv2d(cell_channels, self.num_pixels, 3, padding=1)
        nn.init.dirac_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def paint(self, features: Tensor) -> Tensor:
        """Images `(B, C, H, W)` of what `features` returns."""
        cells = self.blocks(unpatchify(self.head(features), self.grid, self.side))
        return F.pixel_shuffle(self.conv_out(cells), self.cell_size)

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start the pixels' share of the head at the map that reconstructs `images` best."""
        features = torch.cat([self.features(part) for _, part in chunks(images, quantized)])
        cells = patchify(fold(images, self.cell_size), self.side)
        weight, bias = least_squares(features.flatten(0, 1), cells.flatten(0, 1))
        each = (self.side**2, -1)  # cell of a patch
        self.head.weight.unflatten(0, each)[:, : self.num_pixels] = weight.unflatten(0, each)
        self.head.bias.unflatten(0, each)[:, : self.num_pixels] = bias.unflatten(0, each)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution."""
        return self.conv_out.weight
