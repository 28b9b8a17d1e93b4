"""A ViT whose learned latent tokens read the image (TiTok's encoder)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vistok.encoders.base import Encoder
from vistok.errors import check_number
from vistok.nn.patches import (
    grid_of,
    grid_points,
    patchify,
    position_table,
    principal_components,
    spread_points,
)
from vistok.nn.transformer import Transformer, attend_by_position_, init_transformer_


class LatentTransformerEncoder(Encoder):
    """Patches and K learned latent tokens through one transformer; the latents are kept.

    Sequence `[class token | patches | latent tokens]` with full attention, as in TiTok (Yu et
    al. 2024, https://arxiv.org/abs/2406.07550). Differs from the reference code: positions start
    as sines and cosines, the latent tokens' at points spread over the image, and `initialize`
    sets the patch embedding to principal components. All remain learned.

    Args:
        image_size: side in pixels, or (H, W), multiples of `patch_size`.
        channels: C.
        patch_size: side of a patch in pixels.
        num_latent_tokens: K, the length of the code.
        width: W of the transformer, a multiple of 4; also D of the latents.
        depth: number of blocks.
        num_heads: attention heads.
        class_token: prepend a learned token, as the paper does.
        activation_checkpointing: see `Transformer`.
        causal: patches attend to patches alone, and latent token j to all patches and to the
            latent tokens up to j (FlexTok's registers), so that later ones don't change it.
        block: style of the blocks, such as "vit" or "flextok"; see `Block`.
        nested: start the latent tokens where every prefix of them covers the image; see
            `spread_points`. The decoder's must agree.
        attention: auto, dense or flex, under the causal mask; see `nn/attention.py`.
        content: strength of the patches' content at the start, over that of the positions. A
            codebook follows latents that training moves about as a whole, so there an eighth
            serves, which the norms hardly bend. FSQ's range stays where it is: with less than
            about 1 the latents would leave it before they are of use. 0 or more.
        legacy_reshape: read the K x W values of the latents in memory as W x K, as the released
            two-stage TiTok and One-D-Piece do: each token gets channels of every latent.
        norm_in: normalise the sequence before the first block; FlexTok does not.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        patch_size: int,
        num_latent_tokens: int,
        width: int,
        depth: int,
        num_heads: int,
        class_token: bool = True,
        activation_checkpointing: bool = False,
        causal: bool = False,
        block: str = "vit",
        nested: bool = False,
        attention: str = "auto",
        content: float = 0.125,
        legacy_reshape: bool = False,
        norm_in: bool = True,
    ) -> None:
        super().__init__()
        check_number("content", content, 0)
        self.legacy_reshape = legacy_reshape
        self.grid = grid_of(image_size, patch_size)
        self.patch_size = patch_size
        self.content = content
        self.dim = width
        self.num_tokens = num_latent_tokens
        self.patch_embed = nn.Linear(patch_size * patch_size * channels, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.norm_in = nn.LayerNorm(width) if norm_in else nn.Identity()
        self.transformer = Transformer(
            width,
            depth,
            num_heads,
            activation_checkpointing=activation_checkpointing,
            block=block,
            attention=attention,
        )
        self.norm_out = nn.LayerNorm(width)
        init_transformer_(self)
        # Positions start in as many dimensions as a head has, content in the others.
        self.num_position_dims = head = width // num_heads
        attend_by_position_(self.transformer.blocks[0].attn, head)  # type: ignore[union-attr]
        points = grid_points(self.grid)
        self.patch_positions = nn.Parameter(position_table(points, width, head, self.grid))
        points = spread_points(num_latent_tokens, self.grid, nested)
        self.latent_positions = nn.Parameter(position_table(points, width, head, self.grid))
        # What a latent says about its own place is no news: its mean over images is taken off.
        self.latent_means = nn.Parameter(torch.zeros(num_latent_tokens, width))
        self.latent_tokens = nn.Parameter(torch.randn(1, num_latent_tokens, width) * 0.02)
        self.mask: Tensor | None
        prefix = len(self.patch_positions) + class_token
        mask = prefix_causal_mask(prefix, num_latent_tokens) if causal else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, K, W)`."""
        x = self.patch_embed(patchify(images, self.patch_size)) + self.patch_positions
        latents = (self.latent_tokens + self.latent_positions).expand(len(x), -1, -1)
        parts = [x, latents.to(x.dtype)]
        if self.class_token is not None:
            parts.insert(0, self.class_token.expand(len(x), -1, -1).to(x.dtype))
        x = self.norm_in(torch.cat(parts, dim=1))
        latents = self.transformer(x, self.mask, keep=slice(-self.num_tokens, None))
        latents = self.norm_out(latents)
        if self.legacy_reshape:
            latents = latents.reshape(-1, self.dim, self.num_tokens).transpose(1, 2)
        return latents - self.latent_means

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Start the patch embedding at the principal components of the patches.

        In the dimensions that positions leave free, all on one scale, so that distances between
        latents begin as distances between patches; and at `content` times the positions'
        strength. Then take the latents' means off.
        """
        patches = patchify(images, self.patch_size).flatten(0, 1)
        count = min(self.dim - self.num_position_dims, patches.shape[1])
        mean, components, deviations = principal_components(patches, count)
        strength = (self.num_position_dims / deviations.square().sum()).sqrt() * self.content
        weight = components * strength
        self.patch_embed.weight.zero_()
        self.patch_embed.bias.zero_()
        self.patch_embed.weight[:count] = weight
        self.patch_embed.bias[:count] = -weight @ mean
        latents = torch.cat([self(chunk).float() for chunk in images.split(32)])
        self.latent_means += latents.mean(dim=0)


def prefix_causal_mask(prefix: int, length: int) -> Tensor:
    """`(prefix + length,)` squared bool, True = visible: a full prefix, then a causal tail."""
    total = prefix + length
    columns = torch.arange(total)
    rows = columns[:, None]
    return (columns < prefix) | ((rows >= prefix) & (columns <= rows))
