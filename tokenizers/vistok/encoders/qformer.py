"""A CNN read by a Q-Former (GigaTok's encoder)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.encoders.base import Encoder
from vistok.encoders.cnn import CNNEncoder
from vistok.nn.linear_start import start_conv_
from vistok.nn.patches import grid_points, position_table, start_at_components_
from vistok.nn.qformer import QFormer, pooling_pyramid, token_positions
from vistok.nn.transformer import init_transformer_


class QFormerEncoder(Encoder):
    """Image to a grid of features by a CNN, and these to a 1D code by a Q-Former.

    The queries start as averages of the embedded grid over ever finer cells (1, 1, 2, 4, ... of
    them), so the first tokens see the whole image and the last ones small parts of it.

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
        norm_first: normalise the grid's features before they are embedded, as the released code
            does, and not their embedding.
    """

    def __init__(
        self,
        cnn: CNNEncoder,
        num_latent_tokens: int,
        dim: int,
        width: int,
        depth: int,
        num_heads: int,
        activation_checkpointing: bool = False,
        padding_start: int | None = None,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_tokens = num_latent_tokens
        self.levels = pooling_pyramid(num_latent_tokens)
        self.grid = cnn.grid
        self.conv_out = nn.Conv2d(cnn.dim, dim, 3, padding=1)
        self.embed = nn.Linear(dim, width)
        self.norm_first = norm_first
        self.norm_in = nn.LayerNorm(dim if norm_first else width)
        self.query = nn.Linear(width, width)
        self.transformer = QFormer(width, depth, num_heads, activation_checkpointing)
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, dim)
        init_transformer_(self)
        nn.init.eye_(self.query.weight)
        self.cnn = cnn
        points = grid_points(cnn.grid)
        self.grid_positions = nn.Parameter(position_table(points, width, width // 2, cnn.grid))
        self.padding_start = padding_start
        self.latent_positions = nn.Parameter(
            token_positions(num_latent_tokens, width, cnn.grid, padding_start)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, K, D)`, the padding thrown away."""
        return self.padded(images)[:, : self.num_tokens]

    def padded(self, images: Tensor) -> Tensor:
        """The latents `(B, K + M, D)`: the code, and behind it the M repeated queries."""
        return self.project(self.latents(images))

    def latents(self, images: Tensor) -> Tensor:
        """What is projected to the code: `(B, K + M, W)`."""
        x = self.embed(self.cells(images))
        memory = x if self.norm_first else self.norm_in(x)
        queries = self.queries(memory)
        if self.padding_start is not None:
            queries = torch.cat([queries, queries[:, self.padding_start :]], dim=1)
        x = self.transformer(queries, memory, self.latent_positions, self.grid_positions)
        return self.norm_out(x)

    def cells(self, images: Tensor) -> Tensor:
        """What is embedded for the Q-Former to read: `(B, cells, D)`."""
        grid = self.conv_out(self.cnn(images).transpose(1, 2).unflatten(2, self.grid))
        cells = grid.flatten(2).transpose(1, 2)
        return self.norm_in(cells) if self.norm_first else cells

    def queries(self, memory: Tensor) -> Tensor:
        """Averages `(B, K, W)` of the grid `(B, cells, W)` over the parts of each level."""
        grid = memory.transpose(1, 2).unflatten(2, self.grid)
        pooled = [F.adaptive_avg_pool2d(grid, level).flatten(2) for level in self.levels]
        return self.query(torch.cat(pooled, dim=2).transpose(1, 2))

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Start the embedding and the projection at the principal components of what they see."""
        self.cnn.initialize(images)
        chunks = images.split(32)
        maps = torch.cat([self.cnn(chunk).float() for chunk in chunks[:4]])
        start_conv_(self.conv_out, maps.transpose(1, 2).unflatten(2, self.grid))
        cells = torch.cat([self.cells(chunk).float() for chunk in chunks])
        start_at_components_(self.embed, cells.flatten(0, 1), self.embed.out_features)
        latents = torch.cat([self.latents(chunk).float() for chunk in chunks])
        start_at_components_(self.project, latents.flatten(0, 1), self.dim)
