"""A transformer that paints a grid from levels of latents, and a CNN behind it (ResTok's)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.core.registry import register
from vistok.core.taps import NO_TAPS, Tap, Taps, inside
from vistok.core.values import Count, check
from vistok.models.cnn import CNNDecoder
from vistok.models.decoder import Decoder
from vistok.models.maskgit_cnn import MaskGITDecoder
from vistok.nn.blocks import init_transformer_
from vistok.nn.data_init import chunks, start_at_target_
from vistok.nn.halves import half_offset
from vistok.nn.positions import level_points
from vistok.nn.qformer import pooling_pyramid
from vistok.nn.rotary import RotaryBlock, attend_by_place_, rotation
from vistok.systems.restok.hierarchy import LevelLinear, Places, queued_points


@register("restok_decoder")
class ResTokDecoder(Decoder):
    """`[latents | mask tokens]` with full attention; the mask tokens become the CNN's grid.

    Tokens that are missing (masked, or behind the end) become one learned vector of the code
    space, before the linear layer of their level. Positions are rotary, as in the encoder. The
    biases of the linear layers tell the levels apart; the released code adds vectors of their own,
    which say no more, so that the forward is the released one. The start is not: the linear layers
    are orthogonal, with `places` centered the first block copies from the tokens that lie near, and
    `initialize`, which a run with `init=random` leaves out, fits the CNN's last layer and, with
    `places` centered, the layer behind the blocks.

    Paper: ResTok, Zhang et al. 2026, https://arxiv.org/abs/2601.03955.

    Args:
        cnn: the last stage.
        num_latent_tokens: K, the longest code; a power of two.
        latent_dim: D, the width of the quantized latents.
        width: W of the transformer.
        depth: number of blocks.
        num_heads: attention heads.
        activation_checkpointing: recompute each block in the backward pass.
        places: "queued", the latents lie on a diagonal and the cells behind them, or "centered",
            each at the centre of its part of the image.
        norms: normalise the sequence before the blocks, and the cells behind them.
    """

    def __init__(
        self,
        cnn: CNNDecoder | MaskGITDecoder,
        num_latent_tokens: Count,
        latent_dim: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        activation_checkpointing: bool = False,
        places: Places = "queued",
        norms: bool = True,
    ) -> None:
        super().__init__()
        check("places", places, Places)
        self.places = places
        self.dim = latent_dim
        self.grid = cnn.grid
        self.num_tokens = num_latent_tokens
        self.activation_checkpointing = activation_checkpointing
        levels = pooling_pyramid(num_latent_tokens)
        counts = [rows * columns for rows, columns in levels]
        self.embed = LevelLinear(counts, latent_dim, width)
        self.norm_in = nn.LayerNorm(width) if norms else nn.Identity()
        self.blocks = nn.ModuleList(RotaryBlock(width, num_heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width) if norms else nn.Identity()
        self.project = nn.Linear(width, cnn.dim)
        init_transformer_(self)
        for net in self.embed.layers:
            nn.init.orthogonal_(net.weight)  # type: ignore[arg-type]
        self.cnn = cnn
        self.dropped = nn.Parameter(torch.randn(1, 1, latent_dim) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        if places == "queued":
            points = queued_points([num_latent_tokens, cnn.grid])
        else:
            offset = half_offset(levels[-1], cnn.grid)
            attend_by_place_(self.blocks[0].attn, offset=offset)  # type: ignore[arg-type]
            for net in self.embed.layers:
                # A norm follows: next to these vectors it leaves the size of what a token says.
                net.bias.data.copy_(0.35 * torch.randn(width).sign())  # type: ignore[union-attr]
            points = level_points([*levels, cnn.grid], cnn.grid)
        self.turn: Tensor
        self.register_buffer("turn", rotation(points, width // num_heads), persistent=False)

    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **sampling: Any,
    ) -> Tensor:
        """Images `(B, C, H, W)` from the first n <= K tokens, `(B, n, D)`."""
        cells = self.cells(quantized, mask, taps)
        return self.cnn.reconstruct(cells, taps=taps.inside("cnn"))

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks and of the CNN, and the latents before the blocks."""
        width = self.embed.out_features
        tap = Tap(width, self.grid)
        blocks = {f"block.{number}": tap for number in range(len(self.blocks))}
        return blocks | {"latents": Tap(width)} | inside("cnn", self.cnn.tap_shapes())

    def cells(self, quantized: Tensor, mask: Tensor | None = None, taps: Taps = NO_TAPS) -> Tensor:
        """Return what the CNN gets: `(B, rows * columns, D)` of its own D, raster order."""
        latents = self.embed(self.filled(quantized, mask))
        taps.offer("latents", latents)
        return self.project(self.norm_out(self.paint(latents, self.mask_token, taps)))

    def filled(self, quantized: Tensor, mask: Tensor | None = None) -> Tensor:
        """All K tokens `(B, K, D)`, the missing ones replaced."""
        batch, length, _ = quantized.shape
        if mask is None:  # DDP wants every parameter in every step's graph
            mask = torch.ones(batch, length, dtype=torch.bool, device=quantized.device)
        dropped = self.dropped.to(quantized.dtype)
        kept = torch.where(mask[..., None], quantized, dropped)
        return torch.cat([kept, dropped.expand(batch, self.num_tokens - length, -1)], dim=1)

    def paint(self, latents: Tensor, mask_token: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Cells `(B, rows * columns, W)` that start as `mask_token` `(1, 1, W)`, by all blocks."""
        tokens = mask_token.to(latents.dtype)
        cells = self.grid[0] * self.grid[1]
        x = self.norm_in(torch.cat([latents, tokens.expand(latents.shape[0], cells, -1)], dim=1))
        for number, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, self.turn, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, self.turn)
            taps.offer(f"block.{number}", self._cells_of(x))
        return self._cells_of(x)

    def _cells_of(self, sequence: Tensor) -> Tensor:
        """The cells `(B, rows * columns, W)` in the sequence behind any block."""
        return sequence[:, self.num_tokens :]

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start what follows the blocks as a map that hands on what they say of `images`.

        With `places` queued they say little yet: there the CNN alone is fitted.
        """
        if self.places == "centered":
            painted = [
                self.norm_out(self.paint(self.embed(self.filled(part)), self.mask_token))
                for _, part in chunks(images, quantized)
            ]
            maps = torch.cat(painted).transpose(1, 2).unflatten(2, self.grid)
            start_at_target_(self.project, maps, images)
        self.cnn.initialize(
            torch.cat(
                [self.cells(part) for _, part in chunks(images[:64], quantized[:64], most=8)]
            ),
            images[:64],
        )

    @property
    def last_layer(self) -> Tensor:
        """Weight of the CNN's last convolution."""
        return self.cnn.last_layer
