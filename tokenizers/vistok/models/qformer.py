"""A CNN with a Q-Former: from a grid of features to a 1D code, and back."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.taps import NO_TAPS, Tap, Taps, inside
from vistok.core.values import Count, Index, check
from vistok.models.cnn import CNNDecoder, CNNEncoder
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.nn.blocks import init_transformer_
from vistok.nn.data_init import chunks, start_at_components_, start_at_target_, start_conv_
from vistok.nn.halves import halves_maps
from vistok.nn.positions import grid_points, position_table
from vistok.nn.qformer import (
    CrossAttention,
    QFormer,
    pooling_pyramid,
    read_by_position_,
    token_positions,
)

#: What is normalised on the way in.
Norm = Literal["input", "embedding"]


@register("qformer_encoder")
class QFormerEncoder(Encoder):
    """Image to a grid of features by a CNN, and these to a 1D code by a Q-Former.

    The queries start as averages of the embedded grid over ever finer cells (1, 1, 2, 4, ... of
    them), so the first tokens see the whole image and the last ones small parts of it.

    Differs from the released code in its start: there weights and positions are drawn; here
    positions start as sines and cosines, the queries' layer as the identity, the first block by
    reading what the halves of a query's part differ by, and `initialize`, which a run with
    `init=random` leaves out, sets embedding and projection to principal components.

    Paper: GigaTok, Xiong et al. 2025, https://arxiv.org/abs/2504.08736.

    Args:
        cnn: the first stage.
        num_latent_tokens: K, the length of the code; a power of two.
        dim: D, the width of the latents.
        width: W of the Q-Former, a multiple of 4.
        depth: number of blocks.
        num_heads: attention heads.
        activation_checkpointing: of the Q-Former's blocks.
        padding_start: repeat the queries from this one on behind the code, with positions of
            their own (ReTok); None for none. See `padded`.
        norm: what is normalised on the way in, the "input" of the embedding, the features of the
            grid, or the "embedding" itself.
    """

    def __init__(
        self,
        cnn: CNNEncoder,
        num_latent_tokens: Count,
        dim: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        activation_checkpointing: bool = False,
        padding_start: Index | None = None,
        norm: Norm = "input",
    ) -> None:
        super().__init__()
        check("norm", norm, Norm)
        self.dim = dim
        self.num_tokens = num_latent_tokens
        self.levels = pooling_pyramid(num_latent_tokens)
        self.conv_out = nn.Conv2d(cnn.dim, dim, 3, padding=1)
        self.embed = nn.Linear(dim, width)
        self.norm_first = norm == "input"
        self.norm_in = nn.LayerNorm(dim if self.norm_first else width)
        self.query = nn.Linear(width, width)
        self.transformer = QFormer(width, depth, num_heads, activation_checkpointing)
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim)
        init_transformer_(self)
        nn.init.eye_(self.query.weight)
        self.cnn = cnn
        reading = self.transformer.blocks[0].cross_attn
        assert isinstance(reading, CrossAttention)
        read_by_position_(reading, width // 2, self.levels[-1], cnn.grid)
        for net, weight in zip((reading.v, reading.proj), halves_maps(width, 0.0), strict=True):
            net.weight.data.copy_(weight)
        points = grid_points(cnn.grid)
        self.grid_positions = nn.Parameter(position_table(points, width, width // 2, cnn.grid))
        self.padding_start = padding_start
        self.latent_positions = nn.Parameter(
            token_positions(num_latent_tokens, width, cnn.grid, padding_start)
        )

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, K, D)`, the padding thrown away."""
        return self.padded(images, taps)[:, : self.num_tokens]

    def padded(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """The latents `(B, K + M, D)`: the code, and behind it the M repeated queries."""
        return self.project(self.latents(images, taps))

    def latents(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return what is projected to the code: `(B, K + M, W)`."""
        x = self.embed(self.cells(images, taps.inside("cnn")))
        memory = x if self.norm_first else self.norm_in(x)
        queries = self.queries(memory)
        if self.padding_start is not None:
            queries = torch.cat([queries, queries[:, self.padding_start :]], dim=1)
        positions = (self.latent_positions, self.grid_positions)
        return self.norm_out(self.transformer(queries, memory, *positions, taps=taps))

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks, which are the queries, and those of the CNN."""
        tap = Tap(self.embed.out_features)
        blocks = {f"block.{number}": tap for number in range(len(self.transformer.blocks))}
        return blocks | inside("cnn", self.cnn.tap_shapes())

    def cells(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return what is embedded for the Q-Former to read: `(B, cells, D)`; taps are the CNN's."""
        grid = self.conv_out(self.cnn(images, taps).transpose(1, 2).unflatten(2, self.cnn.grid))
        cells = grid.flatten(2).transpose(1, 2)
        return self.norm_in(cells) if self.norm_first else cells

    def queries(self, memory: Tensor) -> Tensor:
        """Averages `(B, K, W)` of the grid `(B, cells, W)` over the parts of each level."""
        grid = memory.transpose(1, 2).unflatten(2, self.cnn.grid)
        pooled = [F.adaptive_avg_pool2d(grid, level).flatten(2) for level in self.levels]
        return self.query(torch.cat(pooled, dim=2).transpose(1, 2))

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Start the embedding and the projection at the principal components of what they see."""
        self.cnn.initialize(images)
        maps = torch.cat([self.cnn(chunk).float() for chunk in chunks(images[:128])])
        start_conv_(self.conv_out, maps.transpose(1, 2).unflatten(2, self.cnn.grid))
        cells = torch.cat([self.cells(chunk).float() for chunk in chunks(images)])
        start_at_components_(self.embed, cells.flatten(0, 1), self.embed.out_features)
        latents = torch.cat([self.latents(chunk).float() for chunk in chunks(images)])
        start_at_components_(self.project, latents.flatten(0, 1), self.dim)


@register("qformer_decoder")
class QFormerDecoder(Decoder):
    """Grid queries, all of them the first token at the start, read the code; a CNN does the rest.

    Differs from the released code in its start, as the encoder does: tokens start at the centres
    of what their queries average, and the first block by copying from those near a cell. All of it
    stays learned.

    Paper: GigaTok, Xiong et al. 2025, https://arxiv.org/abs/2504.08736.

    Args:
        cnn: the last stage; its `latent_dim` is D.
        num_latent_tokens: K, the length of the code.
        latent_dim: D, the width of the quantized latents.
        width: W of the Q-Former, a multiple of 4.
        depth: number of blocks.
        num_heads: attention heads.
        activation_checkpointing: of the Q-Former's blocks.
        padding_start: the encoder's; the code may then be longer by the padding.
        norm: as in the encoder, of the code.
    """

    def __init__(
        self,
        cnn: CNNDecoder,
        num_latent_tokens: Count,
        latent_dim: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        activation_checkpointing: bool = False,
        padding_start: Index | None = None,
        norm: Norm = "input",
    ) -> None:
        super().__init__()
        check("norm", norm, Norm)
        if cnn.dim != latent_dim:
            raise ArgumentError(f"cnn.latent_dim={cnn.dim}: must be latent_dim={latent_dim}")
        self.dim = latent_dim
        self.grid = cnn.grid
        self.embed = nn.Linear(latent_dim, width)
        self.norm_first = norm == "input"
        self.norm_in = nn.LayerNorm(latent_dim if self.norm_first else width)
        self.transformer = QFormer(width, depth, num_heads, activation_checkpointing)
        self.norm_out = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, latent_dim, 3, padding=1)
        init_transformer_(self)
        reading = self.transformer.blocks[0].cross_attn
        assert isinstance(reading, CrossAttention)
        read_by_position_(reading, width // 2, pooling_pyramid(num_latent_tokens)[-1], cnn.grid)
        self.cnn = cnn
        points = grid_points(cnn.grid)
        self.grid_positions = nn.Parameter(position_table(points, width, width // 2, cnn.grid))
        self.latent_positions = nn.Parameter(
            token_positions(num_latent_tokens, width, cnn.grid, padding_start)
        )
        self.num_tokens = len(self.latent_positions)  # with the padding

    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **sampling: Any,
    ) -> Tensor:
        """Images `(B, C, H, W)` from the first n <= K tokens `(B, n, D)`; the first is needed."""
        cells = self.cells(quantized, mask, taps)
        return self.cnn.reconstruct(cells, taps=taps.inside("cnn"))

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks, which are the cells, and those of the CNN."""
        tap = Tap(self.embed.out_features, self.grid)
        blocks = {f"block.{number}": tap for number in range(len(self.transformer.blocks))}
        return blocks | inside("cnn", self.cnn.tap_shapes())

    def cells(self, quantized: Tensor, mask: Tensor | None = None, taps: Taps = NO_TAPS) -> Tensor:
        """Return what the CNN gets: `(B, rows * columns, D)`, raster order."""
        return self.conv_out(self.maps(quantized, mask, taps)).flatten(2).transpose(1, 2)

    def maps(self, quantized: Tensor, mask: Tensor | None = None, taps: Taps = NO_TAPS) -> Tensor:
        """Return what the Q-Former makes of the code: `(B, W, rows, columns)`."""
        norm, embed = self.norm_in, self.embed
        memory = embed(norm(quantized)) if self.norm_first else norm(embed(quantized))
        queries = memory[:, :1].expand(-1, self.grid_positions.shape[0], -1)
        positions = (self.grid_positions, self.latent_positions[: memory.shape[1]])
        x = self.transformer(queries, memory, *positions, mask, taps)
        return self.norm_out(x).transpose(1, 2).unflatten(2, self.grid)

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start what follows the Q-Former as a map that hands on what it says of `images`."""
        maps = torch.cat([self.maps(part) for _, part in chunks(images, quantized)])
        start_at_target_(self.conv_out, maps, images)
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
