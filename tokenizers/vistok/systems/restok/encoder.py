"""A transformer over hierarchies of image and latent tokens that hold residuals (ResTok's)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.taps import NO_TAPS, Tap, Taps, inside
from vistok.core.values import Count, Index
from vistok.models.cnn import CNNEncoder
from vistok.models.encoder import Encoder
from vistok.models.maskgit_cnn import MaskGITEncoder
from vistok.nn.attention import AttentionKind, mask_for
from vistok.nn.blocks import init_transformer_
from vistok.nn.data_init import chunks, start_at_components_
from vistok.nn.halves import half_offset, halves_maps
from vistok.nn.positions import level_points
from vistok.nn.qformer import pooling_pyramid
from vistok.nn.rotary import RotaryAttention, RotaryBlock, attend_by_place_, rotation
from vistok.systems.restok.hierarchy import (
    LevelLinear,
    Places,
    block_causal_mask,
    halved,
    merge_residual,
    queued_points,
    residual_pyramid,
)


@register("restok_encoder")
class ResTokEncoder(Encoder):
    """Image to a grid of features by a CNN, and these to levels of latents by a transformer.

    - The latents are not learned: those of each level (1, 1, 2, 4, ... of them) start as averages
      of the features over ever smaller cells, of what the levels before have left.
    - In some layers, between attention and MLP, the coarsest grid of image tokens is merged: every
      other token is put in front as a coarser grid, and taken off the finer one.
    - The mask is block-causal over the levels: image grids, coarse to fine, then the levels of
      the latents. So a level of the code is the same whatever comes behind it.
    - Each level is projected to the code by a layer of its own.

    The forward is the released one; the released weights also mix channels over tokens, see
    `ReshapedResTokEncoder`. The start is not: `initialize`, which a run with `init=random` leaves
    out, starts embedding and projections at principal components, and with `places` centered the
    first block reads the halves of a token's part: what they have in common, and what differs.

    Paper: ResTok, Zhang et al. 2026, https://arxiv.org/abs/2601.03955.

    Args:
        cnn: the first stage.
        num_latent_tokens: K, the length of the code; a power of two.
        dim: D, the width of the latents; the quantizer's codebook_dim to code in it directly.
        width: W of the transformer.
        depth: number of blocks.
        num_heads: attention heads.
        merge_layers: indices of the blocks that merge, rising.
        activation_checkpointing: recompute each block in the backward pass.
        attention: dense or flex, under the mask; see `nn/attention.py`.
        merge_axis: what a merge halves, the "columns" of a grid or its "longest" side.
        places: where rotary positions lie: "queued", the grids one behind the other and the
            latents behind them on a diagonal, or "centered", every token at the centre of its part
            of the image.
        level_vectors: where a merged grid gets the vector that tells its level: behind the
            "block", or in the "merge", before the block's MLP.
    """

    def __init__(
        self,
        cnn: CNNEncoder | MaskGITEncoder,
        num_latent_tokens: Count,
        dim: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        merge_layers: Sequence[Index],
        activation_checkpointing: bool = False,
        attention: AttentionKind = "dense",
        merge_axis: Literal["columns", "longest"] = "columns",
        places: Places = "queued",
        level_vectors: Literal["block", "merge"] = "block",
    ) -> None:
        super().__init__()
        check_values(ResTokEncoder, locals())
        self.merge_axis, self.level_vectors = merge_axis, level_vectors
        self.attention = attention
        self.dim = dim
        self.num_tokens = num_latent_tokens
        self.levels = pooling_pyramid(num_latent_tokens)
        self.merge_layers = list(merge_layers)
        if sorted({i for i in self.merge_layers if 0 <= i < depth}) != self.merge_layers:
            raise ArgumentError(
                f"merge_layers={self.merge_layers}: must be rising indices of "
                f"the blocks, 0 to {depth - 1}"
            )
        self.activation_checkpointing = activation_checkpointing
        counts = [rows * columns for rows, columns in self.levels]
        self.grids = [cnn.grid]  # fine to coarse: each merge adds one
        for _ in self.merge_layers:
            self.grids.append(halved(self.grids[-1], merge_axis))
        self.embed = nn.Linear(cnn.dim, width)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(RotaryBlock(width, num_heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        self.project = LevelLinear(counts, width, dim)
        init_transformer_(self)
        self.cnn = cnn
        if places == "centered":
            reading = self.blocks[0].attn
            assert isinstance(reading, RotaryAttention)
            attend_by_place_(reading, 16.0, half_offset(self.levels[-1], cnn.grid))
            values, output = halves_maps(width, 0.5)
            reading.qkv.weight.data[2 * width :] = values
            reading.proj.weight.data.copy_(output)
        # About as large as the features: where these are zero (the second level of one cell), the
        # norm would blow up a small vector, and the gradient to it.
        self.image_levels = nn.Parameter(torch.randn(len(self.grids), width) * 0.5)
        self.latent_levels = nn.Parameter(torch.randn(len(counts), width) * 0.5)
        for merges in range(len(self.grids)):
            grids = self.grids[merges::-1]  # coarse to fine, as they stand in the sequence
            sizes = [rows * columns for rows, columns in grids] + counts
            if places == "queued":
                points = queued_points([*grids, num_latent_tokens])
            else:
                points = level_points([*grids, *self.levels], cnn.grid)
            turn = rotation(points, width // num_heads)
            self.register_buffer(f"turn{merges}", turn, persistent=False)
            self.register_buffer(f"mask{merges}", block_causal_mask(sizes), persistent=False)

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, K, D)`."""
        return self.project(self.latents(images, taps))

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks and of the CNN, and the coarsest tokens behind all blocks.

        Behind a block are the finest image tokens: once merged, what the coarser ones leave.
        """
        width = self.embed.out_features
        tap = Tap(width, self.grids[0])
        blocks = {f"block.{number}": tap for number in range(len(self.blocks))}
        coarsest = {"coarsest": Tap(width, self.grids[-1])}
        return blocks | coarsest | inside("cnn", self.cnn.tap_shapes())

    def latents(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return what the projections see: `(B, K, W)`."""
        features = self.embed(self.cnn(images, taps.inside("cnn")))
        cells = features.shape[1]
        x, merges = self.norm_in(self.sequence(features)), 0
        for number, block in enumerate(self.blocks):
            mask = mask_for(self.attention, self.get_buffer(f"mask{merges}"), x)
            inputs = (x, self.get_buffer(f"turn{merges}"), mask)
            between = None
            if number in self.merge_layers:
                merges += 1
                between = partial(self.merge, merges=merges)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, between, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(*inputs, between)
            if between is not None and self.level_vectors == "block":
                x = self.name_coarsest(x, merges)
            taps.offer(f"block.{number}", x[:, -cells - self.num_tokens : -self.num_tokens])
        taps.offer("coarsest", self.coarsest(x))
        return self.norm_out(x[:, -self.num_tokens :])

    def sequence(self, features: Tensor) -> Tensor:
        """`[image tokens | levels of latents]` `(B, cells + K, W)` of features `(B, cells, W)`."""
        grid = features.transpose(1, 2).unflatten(2, self.grids[0])
        parts = [features + self.image_levels[0]]
        for number, level in enumerate(residual_pyramid(grid, self.levels)):
            parts.append(level + self.latent_levels[number])
        return torch.cat(parts, dim=1)

    def merge(self, x: Tensor, merges: int) -> Tensor:
        """Put the coarser half of the coarsest grid in front; `merges` counts this one too."""
        grid = self.grids[merges - 1]
        cells = grid[0] * grid[1]
        coarse, rest = merge_residual(x[:, :cells], grid, self.merge_axis)
        x = torch.cat([coarse, rest, x[:, cells:]], dim=1)
        return self.name_coarsest(x, merges) if self.level_vectors == "merge" else x

    def name_coarsest(self, x: Tensor, merges: int) -> Tensor:
        """Add the vector of its level to the coarsest grid behind so many merges."""
        cells = self.grids[merges][0] * self.grids[merges][1]
        return torch.cat([x[:, :cells] + self.image_levels[merges], x[:, cells:]], dim=1)

    def coarsest(self, sequence: Tensor) -> Tensor:
        """The coarsest image tokens `(B, cells, W)` in the sequence behind the last block."""
        return sequence[:, : self.grids[-1][0] * self.grids[-1][1]]

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Start embedding and projections at the principal components of what they see.

        The projections share one scale: a level that says little yet must not be blown up.
        """
        self.cnn.initialize(images)
        features = torch.cat([self.cnn(chunk).float() for chunk in chunks(images)])
        start_at_components_(self.embed, features.flatten(0, 1), self.embed.out_features)
        latents = torch.cat([self.latents(chunk).float() for chunk in chunks(images)])
        parts = latents.split(self.project.counts, dim=1)
        spread = torch.cat([part - part.mean(dim=(0, 1)) for part in parts], dim=1)
        deviation = (spread.square().sum(dim=-1).mean() / self.dim).sqrt()
        for net, part in zip(self.project.layers, parts, strict=True):
            assert isinstance(net, nn.Linear)
            start_at_components_(net, part.flatten(0, 1), self.dim, deviation)
