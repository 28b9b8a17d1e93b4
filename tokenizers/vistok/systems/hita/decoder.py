"""Causal fusion of holistic and patch tokens, shifted, and a CNN behind it (Hita's decoder)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.taps import NO_TAPS, Tap, Taps, inside
from vistok.core.values import Count, Index
from vistok.models.cnn import CNNDecoder
from vistok.models.decoder import Decoder
from vistok.nn.attention import AttentionKind
from vistok.nn.blocks import Transformer, init_transformer_
from vistok.nn.data_init import chunks
from vistok.nn.positions import grid_points, position_table, spread_points
from vistok.systems.hita.encoder import BLOCKS, BlockKind


@register("hita_decoder")
class HitaDecoder(Decoder):
    """Causal attention over `[holistic | patches]`; the CNN gets the outputs `shift` places early.

    Cell p of the CNN's grid is output H - k + p of the causal blocks, k being the shift. So it is
    led by the patches up to p - k and by all holistic tokens (the first k cells by those up to
    their own place), and the last k patch codes reach no pixel. Without the shift a cell could be
    painted from its own patch alone, and the holistic codebook would fall out of use.

    The forward is the released one, but for its dropout. `initialize`, which a run with
    `init=random` leaves out, fits the CNN.

    Paper: Hita, Zheng et al. 2025, https://arxiv.org/abs/2507.02358.

    Args:
        cnn: the last stage.
        num_holistic_tokens: H.
        latent_dim: D, the width of the quantized latents.
        width: W of the transformer, a multiple of 4; also what the CNN takes.
        depth: number of causal blocks.
        num_heads: attention heads.
        shift: k, 0 to H.
        activation_checkpointing: see `Transformer`.
        attention: dense or flex; see `nn/attention.py`.
        block: "biased" or "normalized", as in the encoder.
    """

    def __init__(
        self,
        cnn: CNNDecoder,
        num_holistic_tokens: Count,
        latent_dim: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        shift: Index = 4,
        activation_checkpointing: bool = False,
        attention: AttentionKind = "dense",
        block: BlockKind = "biased",
    ) -> None:
        super().__init__()
        check_values(HitaDecoder, locals())
        if cnn.dim != width:
            raise ArgumentError(f"cnn.latent_dim={cnn.dim}: must be width={width}")
        if shift > num_holistic_tokens:
            raise ArgumentError(
                f"shift={shift}: must be 0 to num_holistic_tokens={num_holistic_tokens}"
            )
        self.dim = latent_dim
        self.num_holistic_tokens = num_holistic_tokens
        self.grid = cnn.grid
        self.first = num_holistic_tokens - shift
        self.embed = nn.Linear(latent_dim, width)
        self.norm_in = nn.LayerNorm(width)
        self.transformer = Transformer(
            width,
            depth,
            num_heads,
            activation_checkpointing=activation_checkpointing,
            attention=attention,
            **BLOCKS[block],
        )
        self.norm_out = nn.LayerNorm(width) if block == "normalized" else nn.Identity()
        init_transformer_(self)
        if latent_dim == width:
            nn.init.eye_(self.embed.weight)
        self.cnn = cnn
        points = torch.cat([spread_points(num_holistic_tokens, cnn.grid), grid_points(cnn.grid)])
        head = width // num_heads
        self.positions = nn.Parameter(position_table(points, width, head, cnn.grid))
        mask = torch.ones(len(points), len(points), dtype=torch.bool).tril()
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=False)

    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **sampling: Any,
    ) -> Tensor:
        """Images `(B, C, H, W)` from `(B, H + cells, D)`; masked tokens count as zero."""
        if mask is not None:
            quantized = quantized * mask[..., None]
        return self.cnn.reconstruct(self.cells(quantized, taps), taps=taps.inside("cnn"))

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks, which are the outputs that the CNN gets, and of the CNN."""
        tap = Tap(self.embed.out_features, self.grid)
        blocks = {f"block.{number}": tap for number in range(len(self.transformer.blocks))}
        return blocks | inside("cnn", self.cnn.tap_shapes())

    def cells(self, quantized: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return what the CNN gets: `(B, rows * columns, W)`, raster order."""
        x = self.norm_in(self.embed(quantized) + self.positions)
        x = self.transformer(x, self.mask, taps=taps, places=self._cells)
        return self.norm_out(x[:, self._cells])

    @property
    def _cells(self) -> slice:
        """Return where they lie in the sequence."""
        return slice(self.first, self.first + self.grid[0] * self.grid[1])

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start the CNN's last layer at the linear map that reconstructs `images` best."""
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
