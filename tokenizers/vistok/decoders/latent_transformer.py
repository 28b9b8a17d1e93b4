"""A ViT that paints an image from latent tokens (TiTok's decoder)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.decoders.base import Decoder
from vistok.errors import ArgumentError
from vistok.nn.patches import (
    grid_of,
    grid_points,
    least_squares,
    pad_edges,
    patchify,
    position_table,
    spread_points,
    unpatchify,
)
from vistok.nn.transformer import Transformer, attend_by_position_, init_transformer_


class LatentTransformerDecoder(Decoder):
    """Mask tokens and latent tokens through one transformer; the mask tokens become patches.

    Sequence `[class token | mask tokens | latent tokens]` with full attention and a linear head
    to pixels, then a 3x3 convolution across the seams: the single-stage TiTok (Yu et al. 2024,
    https://arxiv.org/abs/2406.07550; head of TA-TiTok, https://arxiv.org/abs/2501.07730).

    Args:
        image_size: side in pixels, or (H, W), multiples of `patch_size`.
        channels: C.
        patch_size: side of a patch in pixels.
        num_latent_tokens: K, the longest code.
        latent_dim: D, the width of the quantized latents.
        width: W of the transformer, a multiple of 4.
        depth: number of blocks.
        num_heads: attention heads.
        class_token: prepend a learned token, as the paper does.
        activation_checkpointing: see `Transformer`.
        nested: as in the encoder.
        attention: auto, dense or flex, where tokens are masked; see `nn/attention.py`.
        borders: what the last convolution sees beyond the image, its edges "repeated" or "black",
            as in the released models.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        patch_size: int,
        num_latent_tokens: int,
        latent_dim: int,
        width: int,
        depth: int,
        num_heads: int,
        class_token: bool = True,
        activation_checkpointing: bool = False,
        nested: bool = False,
        attention: str = "auto",
        borders: str = "repeated",
    ) -> None:
        super().__init__()
        if borders not in ("repeated", "black"):
            raise ArgumentError(f"borders={borders}: must be repeated or black")
        self.borders = borders
        self.grid = grid_of(image_size, patch_size)
        self.patch_size = patch_size
        self.dim = latent_dim
        self.num_tokens = num_latent_tokens
        self.embed = nn.Linear(latent_dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.norm_in = nn.LayerNorm(width)
        self.transformer = Transformer(
            width,
            depth,
            num_heads,
            activation_checkpointing=activation_checkpointing,
            attention=attention,
        )
        self.norm_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch_size * patch_size * channels)
        init_transformer_(self)
        # Positions start in as many dimensions as a head has, content in the others.
        head = width // num_heads
        attend_by_position_(self.transformer.blocks[0].attn, head)  # type: ignore[union-attr]
        nn.init.orthogonal_(self.embed.weight)
        if latent_dim == width:
            nn.init.eye_(self.embed.weight)
        self.smooth = nn.Conv2d(channels, channels, 3)
        nn.init.dirac_(self.smooth.weight)
        nn.init.zeros_(self.smooth.bias)  # type: ignore[arg-type]
        points = grid_points(self.grid)
        self.patch_positions = nn.Parameter(position_table(points, width, head, self.grid))
        points = spread_points(num_latent_tokens, self.grid, nested)
        self.latent_positions = nn.Parameter(position_table(points, width, head, self.grid))

    def reconstruct(self, quantized: Tensor, mask: Tensor | None = None, **sampling: Any) -> Tensor:
        """Images `(B, C, H, W)` from the first n <= K tokens, `(B, n, D)`."""
        return self.paint(self.features(quantized, mask))

    def paint(self, features: Tensor) -> Tensor:
        """Images `(B, C, H, W)` of what `features` returns."""
        patches = unpatchify(self.head(features), self.grid, self.patch_size)
        black = self.borders == "black"
        return self.smooth(
            F.pad(patches, (1, 1, 1, 1), value=-1.0) if black else pad_edges(patches)
        )

    def features(
        self, quantized: Tensor, mask: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """What the head sees: `(B, rows * columns, W)`, raster order.

        Args:
            quantized: `(B, n, D)`.
            mask: `(B, n)` bool; tokens marked False are not seen.
            context: `(B, T, W)`, further tokens at the end of the sequence.
        """
        batch, length, _ = quantized.shape
        latents = self.embed(quantized) + self.latent_positions[:length]
        patches = (self.mask_token + self.patch_positions).expand(batch, -1, -1)
        parts = [patches.to(latents.dtype), latents]
        if self.class_token is not None:
            parts.insert(0, self.class_token.expand(batch, -1, -1).to(latents.dtype))
        before = sum(part.shape[1] for part in parts) - length
        if context is not None:
            parts.append(context.to(latents.dtype))
        x = torch.cat(parts, dim=1)
        visible = None
        if mask is not None:
            visible = mask.new_ones(batch, x.shape[1])
            visible[:, before : before + length] = mask
            visible = visible[:, None, None, :]
        return self.norm_out(self.transformer(self.norm_in(x), visible, keep=self._patches))

    @property
    def _patches(self) -> slice:
        """Where they lie in the sequence."""
        start = 0 if self.class_token is None else 1
        return slice(start, start + len(self.patch_positions))

    def patch_tokens(self, sequence: Tensor) -> Tensor:
        """The patches `(B, rows * columns, W)` in the sequence behind any block."""
        if sequence.shape[1] == len(self.patch_positions):  # behind the last nothing else is left
            return sequence
        return sequence[:, self._patches]

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start the head at the linear map that reconstructs `images` best."""
        features = torch.cat([self.features(chunk) for chunk in quantized.split(32)])
        patches = patchify(images, self.patch_size)
        weight, bias = least_squares(features.flatten(0, 1), patches.flatten(0, 1))
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the pixel head."""
        return self.head.weight
