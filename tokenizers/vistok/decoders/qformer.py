"""A Q-Former that lays a 1D code out on a grid, and a CNN that paints it (GigaTok's decoder)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vistok.decoders.base import Decoder
from vistok.decoders.cnn import CNNDecoder
from vistok.errors import ArgumentError
from vistok.nn.linear_start import start_conv_
from vistok.nn.patches import grid_points, position_table
from vistok.nn.qformer import QFormer, read_by_position_, token_positions
from vistok.nn.transformer import init_transformer_


class QFormerDecoder(Decoder):
    """Grid queries, all of them the first token at the start, read the code; a CNN does the rest.

    Differs from the released code: tokens start at the centres of what their queries average, and
    the first block starts by copying from those near a cell. All of it stays learned.

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
        norm_first: as in the encoder, of the code.
    """

    def __init__(
        self,
        cnn: CNNDecoder,
        num_latent_tokens: int,
        latent_dim: int,
        width: int,
        depth: int,
        num_heads: int,
        activation_checkpointing: bool = False,
        padding_start: int | None = None,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        if cnn.dim != latent_dim:
            raise ArgumentError(f"cnn.latent_dim={cnn.dim}: must be latent_dim={latent_dim}")
        self.dim = latent_dim
        self.grid = cnn.grid
        self.embed = nn.Linear(latent_dim, width)
        self.norm_first = norm_first
        self.norm_in = nn.LayerNorm(latent_dim if norm_first else width)
        self.transformer = QFormer(width, depth, num_heads, activation_checkpointing)
        self.norm_out = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, latent_dim, 3, padding=1)
        init_transformer_(self)
        read_by_position_(self.transformer.blocks[0].cross_attn, width // 2)  # type: ignore[arg-type]
        self.cnn = cnn
        points = grid_points(cnn.grid)
        self.grid_positions = nn.Parameter(position_table(points, width, width // 2, cnn.grid))
        self.latent_positions = nn.Parameter(
            token_positions(num_latent_tokens, width, cnn.grid, padding_start)
        )
        self.num_tokens = len(self.latent_positions)  # with the padding

    def reconstruct(self, quantized: Tensor, mask: Tensor | None = None, **sampling: Any) -> Tensor:
        """Images `(B, C, H, W)` from the first n <= K tokens `(B, n, D)`; the first is needed."""
        return self.cnn.reconstruct(self.cells(quantized, mask))

    def cells(self, quantized: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the CNN gets: `(B, rows * columns, D)`, raster order."""
        return self.conv_out(self.maps(quantized, mask)).flatten(2).transpose(1, 2)

    def maps(self, quantized: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the Q-Former makes of the code: `(B, W, rows, columns)`."""
        norm, embed = self.norm_in, self.embed
        memory = embed(norm(quantized)) if self.norm_first else norm(embed(quantized))
        queries = memory[:, :1].expand(-1, self.grid_positions.shape[0], -1)
        x = self.transformer(
            queries, memory, self.grid_positions, self.latent_positions[: memory.shape[1]], mask
        )
        return self.norm_out(x).transpose(1, 2).unflatten(2, self.grid)

    def patch_tokens(self, sequence: Tensor) -> Tensor:
        """The cells `(B, rows * columns, W)` in the sequence behind any block: all of it."""
        return sequence

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start the CNN as a map that hands on what the code says of `images`."""
        start_conv_(self.conv_out, self.maps(quantized[:64]))
        self.cnn.initialize(
            torch.cat([self.cells(chunk) for chunk in quantized[:64].split(8)]), images[:64]
        )

    @property
    def last_layer(self) -> Tensor:
        """Weight of the CNN's last convolution."""
        return self.cnn.last_layer
