"""A ViT whose learned latent tokens read an image, and one that paints it from them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.geometry import grid_of
from vistok.core.registry import register
from vistok.core.taps import NO_TAPS, Tap, Taps
from vistok.core.values import Count, ImageSize, NonNegative, check
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.nn.attention import AttentionKind
from vistok.nn.blocks import Transformer, attend_by_position_, init_transformer_
from vistok.nn.data_init import chunks, least_squares, principal_components, scale_of
from vistok.nn.patches import pad_edges, patchify, unpatchify
from vistok.nn.positions import grid_points, position_table, spread_points

#: What a convolution sees beyond the image.
Border = Literal["black", "edge"]


@register("latent_vit_encoder")
class LatentTransformerEncoder(Encoder):
    """Patches and K learned latent tokens through one transformer; the latents are kept.

    Sequence `[class token | patches | latent tokens]` with full attention, as in TiTok (Yu et
    al. 2024, https://arxiv.org/abs/2406.07550). The forward is the released one; the start is not.
    There all weights are drawn, positions with a deviation of W ** -0.5. Here positions start as
    sines and cosines, the latent tokens' at points spread over the image, the first attention
    copies between tokens at one place, and `initialize`, which a run with `init=random` leaves
    out, sets the patch embedding to principal components. All remain learned.

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
        nested: start the latent tokens where every prefix of them covers the image; see
            `spread_points`. The decoder's must agree.
        attention: dense or flex, under the causal mask; see `nn/attention.py`.
        content: strength of the patches' content at the start, over that of the positions. A
            codebook follows latents that training moves about as a whole, so there an eighth
            serves, which the norms hardly bend. FSQ's range stays where it is: with less than
            about 1 the latents would leave it before they are of use. 0 or more.
        norm_in: normalise the sequence before the first block.
        latent_means: take a learned vector off each latent; see `initialize`. Without them the
            encoder is as published, so that TiTok's own code reads it (`layout=titok`).
    """

    #: Options of the blocks, see `Block`.
    block: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        patch_size: Count,
        num_latent_tokens: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        class_token: bool = True,
        activation_checkpointing: bool = False,
        causal: bool = False,
        nested: bool = False,
        attention: AttentionKind = "dense",
        content: NonNegative = 0.125,
        norm_in: bool = True,
        latent_means: bool = True,
    ) -> None:
        super().__init__()
        self.patch_grid = grid_of(image_size, patch_size)
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
            attention=attention,
            **self.block,
        )
        self.norm_out = nn.LayerNorm(width)
        init_transformer_(self)
        # Positions start in as many dimensions as a head has, content in the others.
        self.num_position_dims = head = width // num_heads
        attend_by_position_(self.transformer.blocks[0].attn, head)  # type: ignore[union-attr]
        points = grid_points(self.patch_grid)
        self.patch_positions = nn.Parameter(position_table(points, width, head, self.patch_grid))
        points = spread_points(num_latent_tokens, self.patch_grid, nested)
        self.latent_positions = nn.Parameter(position_table(points, width, head, self.patch_grid))
        # A latent says nothing new about its own place: its mean over images is taken off.
        means = torch.zeros(num_latent_tokens, width)
        self.latent_means = nn.Parameter(means) if latent_means else None
        self.latent_tokens = nn.Parameter(torch.randn(1, num_latent_tokens, width) * 0.02)
        self.mask: Tensor | None
        prefix = len(self.patch_positions) + class_token
        mask = prefix_causal_mask(prefix, num_latent_tokens) if causal else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, K, W)`; `block.{i}` are the patches."""
        latents = self.latents(images, taps)
        return latents if self.latent_means is None else latents - self.latent_means

    def latents(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """The latent tokens `(B, K, W)` behind the last norm, their means still in them."""
        x = self.patch_embed(patchify(images, self.patch_size)) + self.patch_positions
        latents = (self.latent_tokens + self.latent_positions).expand(x.shape[0], -1, -1)
        parts = [x, latents.to(x.dtype)]
        if self.class_token is not None:
            parts.insert(0, self.class_token.expand(x.shape[0], -1, -1).to(x.dtype))
        x = self.norm_in(torch.cat(parts, dim=1))
        start = 0 if self.class_token is None else 1
        patches = slice(start, start + len(self.patch_positions))
        latents = slice(-self.num_tokens, None)
        return self.norm_out(self.transformer(x, self.mask, latents, taps, patches))

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks."""
        return _block_taps(self.transformer, Tap(self.dim, self.patch_grid))

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
        deviation = scale_of(deviations.square().sum().sqrt())
        strength = self.num_position_dims**0.5 / deviation * self.content
        weight = components * strength
        self.patch_embed.weight.zero_()
        self.patch_embed.bias.zero_()
        self.patch_embed.weight[:count] = weight
        self.patch_embed.bias[:count] = -weight @ mean
        if self.latent_means is None:
            return
        latents = torch.cat([self(chunk).float() for chunk in chunks(images)])
        self.latent_means += latents.mean(dim=0)


def _block_taps(transformer: Transformer, tap: Tap) -> dict[str, Tap]:
    return {f"block.{number}": tap for number in range(len(transformer.blocks))}


def prefix_causal_mask(prefix: int, length: int) -> Tensor:
    """`(prefix + length,)` squared bool, True = visible: a full prefix, then a causal tail."""
    total = prefix + length
    columns = torch.arange(total)
    rows = columns[:, None]
    return (columns < prefix) | ((rows >= prefix) & (columns <= rows))


@register("latent_vit_decoder")
class LatentTransformerDecoder(Decoder):
    """Mask tokens and latent tokens through one transformer; the mask tokens become patches.

    Sequence `[class token | mask tokens | latent tokens]` with full attention and a linear head
    to pixels, then a 3x3 convolution across the seams: the single-stage TiTok (Yu et al. 2024,
    https://arxiv.org/abs/2406.07550; head of TA-TiTok, https://arxiv.org/abs/2501.07730). The
    forward is the released one. As in the encoder, the start is not: there all weights are drawn;
    here `initialize` fits the head, and the last convolution starts as the identity.

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
        attention: dense or flex, where tokens are masked; see `nn/attention.py`.
        border: what the last convolution sees beyond the image, "black" or its own "edge".
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
        class_token: bool = True,
        activation_checkpointing: bool = False,
        nested: bool = False,
        attention: AttentionKind = "dense",
        border: Border = "black",
    ) -> None:
        super().__init__()
        check("border", border, Border)
        self.border = border
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

    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **sampling: Any,
    ) -> Tensor:
        """Images `(B, C, H, W)` from the first n <= K tokens, `(B, n, D)`."""
        return self.paint(self.features(quantized, mask, taps=taps))

    def paint(self, features: Tensor) -> Tensor:
        """Images `(B, C, H, W)` of what `features` returns."""
        patches = unpatchify(self.head(features), self.grid, self.patch_size)
        edge = self.border == "edge"
        return self.smooth(pad_edges(patches) if edge else F.pad(patches, (1, 1, 1, 1), value=-1.0))

    def features(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        taps: Taps = NO_TAPS,
    ) -> Tensor:
        """Return what the head sees: `(B, rows * columns, W)`, raster order.

        Args:
            quantized: `(B, n, D)`.
            mask: `(B, n)` bool; tokens marked False are not seen.
            context: `(B, T, W)`, further tokens at the end of the sequence.
            taps: offered `block.{i}`, the patches.
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
        x, patches = self.norm_in(x), self._patches
        return self.norm_out(self.transformer(x, visible, patches, taps, patches))

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks."""
        return _block_taps(self.transformer, Tap(self.embed.out_features, self.grid))

    @property
    def _patches(self) -> slice:
        """Return where they lie in the sequence."""
        start = 0 if self.class_token is None else 1
        return slice(start, start + len(self.patch_positions))

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start the head at the linear map that reconstructs `images` best."""
        features = torch.cat([self.features(part) for _, part in chunks(images, quantized)])
        patches = patchify(images, self.patch_size)
        weight, bias = least_squares(features.flatten(0, 1), patches.flatten(0, 1))
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the pixel head."""
        return self.head.weight
