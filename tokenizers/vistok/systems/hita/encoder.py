"""Holistic queries before the patches of a CNN (Hita's encoder)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.taps import NO_TAPS, Tap, Taps, inside
from vistok.core.values import Count
from vistok.models.cnn import CNNEncoder
from vistok.models.encoder import Encoder
from vistok.models.pretrained import PretrainedTokens
from vistok.nn.attention import AttentionKind
from vistok.nn.blocks import NORMALIZED, Transformer, attend_by_position_, init_transformer_
from vistok.nn.data_init import chunks, start_at_components_, start_conv_
from vistok.nn.frozen import Frozen
from vistok.nn.positions import grid_points, position_table, spread_points

#: What the blocks of encoder and decoder may be made of.
BlockKind = Literal["biased", "normalized"]

#: Their options; see `Block`.
BLOCKS: Mapping[BlockKind, Mapping[str, Any]] = MappingProxyType(
    {"biased": {"mlp": "swiglu", "multiple": 8}, "normalized": NORMALIZED}
)


@register("hita_encoder")
class HitaEncoder(Encoder):
    """`[holistic queries | patches]` through full, then through causal attention; all are kept.

    The patches are the cells of a CNN with learned positions. In the full blocks the queries read
    the whole image; in the causal ones, which prepare the order that a language model will read,
    the patches see all queries and the patches before them.

    With a pretrained network the full blocks read its tokens, too, between the queries and the
    patches; they end there. That network is used, not owned: it is in no state dict and no export,
    and whoever encodes needs its weights. Without one an encoder runs on its own weights.

    Differs from the released code: each token's mean over images is taken off. It has no dropout.
    The rest of the forward is the released one. In the start, queries and patches have
    positions of sines and cosines, the first attention copies between tokens at one place, and
    `initialize`, which a run with `init=random` leaves out, sets the embedding to principal
    components.

    Paper: Hita, Zheng et al. 2025, https://arxiv.org/abs/2507.02358.

    Args:
        cnn: the first stage.
        num_holistic_tokens: H; the code has H tokens and one per cell of the CNN's grid.
        width: W of the transformers, a multiple of 4; also D of the latents.
        depth: number of full blocks.
        causal_depth: number of causal blocks.
        num_heads: attention heads.
        activation_checkpointing: see `Transformer`.
        attention: dense or flex, in the causal blocks; see `nn/attention.py`.
        block: "biased", SwiGLU blocks with biases and norms that learn, or "normalized", without
            biases and with plain norms, also of queries and keys, and a norm that learns at the
            end.
        embed: of the CNN's features, by a 3x3 "conv" or cell by cell, "linear".
        pretrained: a frozen network whose tokens are read along, the paper's DINOv2; None for none.
    """

    def __init__(
        self,
        cnn: CNNEncoder,
        num_holistic_tokens: Count,
        width: Count,
        depth: Count,
        causal_depth: Count,
        num_heads: Count,
        activation_checkpointing: bool = False,
        attention: AttentionKind = "dense",
        block: BlockKind = "biased",
        embed: Literal["conv", "linear"] = "conv",
        pretrained: PretrainedTokens | None = None,
    ) -> None:
        super().__init__()
        check_values(HitaEncoder, locals())
        self.dim = width
        self.num_holistic_tokens = num_holistic_tokens
        self.num_tokens = num_holistic_tokens + cnn.num_tokens
        linear = embed == "linear"
        self.embed = (
            nn.Linear(cnn.dim, width) if linear else nn.Conv2d(cnn.dim, width, 3, padding=1)
        )
        self.pretrained = None if pretrained is None else Frozen(pretrained)
        self.num_read = 0
        if pretrained is not None:
            self.num_read = pretrained.num_tokens
            self.pretrained_embed = nn.Sequential(
                nn.Linear(pretrained.dim, width, bias=False),
                nn.LayerNorm(width),
                nn.ReLU(),
                nn.Linear(width, width, bias=False),
                nn.LayerNorm(width),
            )
        self.norm_in = nn.LayerNorm(width)
        self.transformer = Transformer(
            width,
            depth,
            num_heads,
            activation_checkpointing=activation_checkpointing,
            **BLOCKS[block],
        )
        self.norm_causal = nn.LayerNorm(width)
        self.causal = Transformer(
            width,
            causal_depth,
            num_heads,
            activation_checkpointing=activation_checkpointing,
            attention=attention,
            **BLOCKS[block],
        )
        self.norm_out = nn.LayerNorm(width) if block == "normalized" else nn.Identity()
        init_transformer_(self)
        self.num_position_dims = head = width // num_heads
        attend_by_position_(self.transformer.blocks[0].attn, head)  # type: ignore[union-attr]
        self.cnn = cnn
        points = grid_points(cnn.grid)
        self.patch_positions = nn.Parameter(position_table(points, width, head, cnn.grid))
        points = spread_points(num_holistic_tokens, cnn.grid)
        positions = position_table(points, width, head, cnn.grid)
        self.queries = nn.Parameter(positions + 0.02 * torch.randn_like(positions))
        # A token says nothing new about its own place: its mean over images is taken off.
        self.latent_means = nn.Parameter(torch.zeros(self.num_tokens, width))
        mask = torch.ones(self.num_tokens, self.num_tokens, dtype=torch.bool).tril()
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, H + cells, D)`, holistic tokens first."""
        patches = self.patches(self.cnn(images, taps.inside("cnn"))) + self.patch_positions
        queries = self.queries.expand(patches.shape[0], -1, -1).to(patches.dtype)
        read = [] if self.pretrained is None else [self.pretrained_embed(self.pretrained(images))]
        holistic, behind = self.num_holistic_tokens, self.num_read
        x = torch.cat([queries, *read, patches], dim=1)
        places = slice(holistic + behind, None)
        x = self.transformer(self.norm_in(x), taps=taps, places=places)
        x = self.norm_causal(torch.cat([x[:, :holistic], x[:, places]], dim=1) if read else x)
        places = slice(holistic, None)
        x = self.causal(x, self.mask, taps=taps.inside("causal"), places=places)
        return self.norm_out(x) - self.latent_means

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the full blocks, of the causal ones (`causal.block.{i}`), of the CNN."""
        tap = Tap(self.dim, self.cnn.grid)
        full, causal = (
            {f"block.{number}": tap for number in range(len(stack.blocks))}
            for stack in (self.transformer, self.causal)
        )
        return full | inside("causal", causal) | inside("cnn", self.cnn.tap_shapes())

    def patches(self, features: Tensor) -> Tensor:
        """The embedding `(B, cells, W)` of the CNN's features `(B, cells, D)`."""
        if isinstance(self.embed, nn.Linear):
            return self.embed(features)
        return self.embed(self._map(features)).flatten(2).transpose(1, 2)

    def _map(self, features: Tensor) -> Tensor:
        return features.transpose(1, 2).unflatten(2, self.cnn.grid)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Start the embedding at the principal components of the CNN's features.

        Where it is linear, in the dimensions that positions leave free. Then take the latents'
        means off.
        """
        self.cnn.initialize(images)
        features = torch.cat([self.cnn(chunk).float() for chunk in chunks(images)])
        if isinstance(self.embed, nn.Linear):
            free = self.dim - self.num_position_dims
            start_at_components_(self.embed, features.flatten(0, 1), free)
        else:
            start_conv_(self.embed, self._map(features[:128]))
        latents = torch.cat([self(chunk).float() for chunk in chunks(images)])
        self.latent_means += latents.mean(dim=0)
