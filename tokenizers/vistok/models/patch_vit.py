"""A vision transformer with one latent for each patch, and one that paints patches from latents."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.core.errors import ConfigError
from vistok.core.geometry import grid_of
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.taps import NO_TAPS, Tap, Taps
from vistok.core.torch_internals import with_children
from vistok.core.values import Count, ImageSize
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.nn.blocks import Block, init_transformer_
from vistok.nn.data_init import least_squares, principal_components, scale_of
from vistok.nn.patches import patchify, unpatchify
from vistok.nn.positions import Interpolation, grid_points, resize_positions
from vistok.nn.rotary import RotaryBlock, rotation

#: How a token knows its place: a learned vector is added, or queries and keys are turned.
Positions = Literal["learned", "rotary"]

#: Strength of the content at the start, over that of a vector that all tokens share.
_CONTENT = 1.0

#: Of the least squares that a decoder starts at. Fitted more closely, the last layer blows up what
#: the weakest components say: ViT-VQGAN's tiny form starts 0.8 dB higher and falls at first.
_RIDGE = 0.3

_ROWS = 20000  # patches are enough for a start


class GridTransformer(nn.Module):
    """Pre-norm blocks over the cells of a grid, whose tokens know where they are.

    Args:
        grid: rows and columns.
        width: W, in and out.
        depth: number of blocks.
        num_heads: attention heads; with rotary positions of a multiple of 4 channels each.
        positions: "learned", a vector for each cell that is added in front of the first block, or
            "rotary", see `RotaryBlock`.
        interpolation: of learned positions, for a grid of another size; None refuses it.
        norm_in: normalise tokens before the first block.
        activation_checkpointing: recompute each block in the backward pass.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
        positions: Positions,
        interpolation: Interpolation | None,
        norm_in: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.grid = self.trained_grid = grid
        self.width = width
        self.interpolation: Interpolation | None = interpolation
        self.activation_checkpointing = activation_checkpointing
        self.norm_in = nn.LayerNorm(width) if norm_in else nn.Identity()
        self.positions: nn.Parameter | None = None
        self.head = width // num_heads
        kind = Block if positions == "learned" else RotaryBlock
        self.blocks = nn.ModuleList(kind(width, num_heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        init_transformer_(self)
        turn = None
        if positions == "learned":
            self.positions = nn.Parameter(torch.randn(grid[0] * grid[1], width) * 0.02)
        else:
            turn = rotation(grid_points(grid), self.head)
        self.register_buffer("turn", turn, persistent=False)

    def forward(self, x: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Map `(B, rows * columns, W)` to the same shape, normalised; offer `block.{i}`."""
        if self.positions is not None:
            x = x + self._resized(self.positions).to(x.dtype)
        x = self.norm_in(x)
        places = () if self.positions is not None else (self._turn(x),)
        for number, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *places, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, *places)
            taps.offer(f"block.{number}", x)
        return self.norm_out(x)

    def at(self, grid: tuple[int, int]) -> GridTransformer:
        """Return the same transformer, weights and all, for another grid.

        Raises:
            ConfigError: if its positions belong to one grid alone.
        """
        if self.positions is not None and self.interpolation is None and grid != self.trained_grid:
            raise ConfigError(
                f"interpolation=null: learned positions are for {self.trained_grid[0]} x "
                f"{self.trained_grid[1]} patches alone, found {grid[0]} x {grid[1]}; take "
                "interpolation=bicubic or positions=rotary"
            )
        other = copy.copy(self)
        other.grid = grid
        return other

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks."""
        tap = Tap(self.width, self.grid)
        return {f"block.{number}": tap for number in range(len(self.blocks))}

    def _resized(self, positions: Tensor) -> Tensor:
        if self.grid == self.trained_grid or self.interpolation is None:
            return positions
        return resize_positions(positions, self.trained_grid, self.grid, self.interpolation)

    def _turn(self, x: Tensor) -> Tensor:
        turn = self.get_buffer("turn")
        if self.grid == self.trained_grid:
            return turn
        return rotation(grid_points(self.grid), self.head).to(turn)


@register("patch_vit_encoder")
class PatchViTEncoder(Encoder):
    """Patches of an image, through a transformer, to one latent each.

    Paper: ViT-VQGAN, Yu et al. 2022, https://arxiv.org/abs/2110.04627; layers as BSQ-ViT was
    released with, Zhao et al. 2024, https://arxiv.org/abs/2406.07548. All weights are drawn;
    `initialize` sets the patch embedding to principal components. A quantizer that projects to
    narrow codes has the linear layer that the papers put behind the last norm.

    Args:
        image_size: side in pixels, or (H, W), multiples of `patch_size`.
        channels: C.
        patch_size: side of a patch in pixels.
        width: W of the transformer; also D of the latents.
        depth: number of blocks.
        num_heads: attention heads.
        positions: "learned" as published, or "rotary" in rows and columns.
        interpolation: how learned positions are resized for images of another size, "bicubic" or
            "bilinear"; None refuses such images.
        norm_in: normalise tokens before the first block.
        activation_checkpointing: recompute each block in the backward pass; less memory, about a
            third more time, the same numbers.
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        patch_size: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        positions: Positions = "learned",
        interpolation: Interpolation | None = "bicubic",
        norm_in: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_values(PatchViTEncoder, locals())
        self.grid = rows, columns = grid_of(image_size, patch_size)
        self.num_tokens = rows * columns
        self.dim = width
        self.patch_size = patch_size
        # Next to learned positions, which are added too, the norm leaves a bias nothing to do.
        bias = positions == "rotary" or not norm_in
        self.embed = nn.Linear(patch_size * patch_size * channels, width, bias=bias)
        init_transformer_(self.embed)
        self.transformer = GridTransformer(
            self.grid,
            width,
            depth,
            num_heads,
            positions,
            interpolation,
            norm_in,
            activation_checkpointing,
        )

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, N, W)`."""
        return self.transformer(self.embed(patchify(images, self.patch_size)), taps)

    def at(self, image_size: tuple[int, int]) -> PatchViTEncoder:
        """Return the same encoder, weights and all, for images of another size."""
        grid = grid_of(image_size, self.patch_size)
        other = with_children(self, {"transformer": self.transformer.at(grid)})
        other.grid, other.num_tokens = grid, grid[0] * grid[1]
        return other

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks."""
        return self.transformer.tap_shapes()

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Start the patch embedding at the principal components of the patches.

        All on one scale, so that distances between latents begin as distances between patches, and
        next to a vector that all tokens share: without it a norm would wipe out brightness.
        """
        patches = patchify(images, self.patch_size).flatten(0, 1)
        head = self.transformer.head
        mean, components, deviations = principal_components(
            patches, min(self.dim - head, patches.shape[1])
        )
        deviation = scale_of(deviations.square().sum().sqrt())
        weight = components * (_CONTENT * head**0.5 / deviation)
        self.embed.weight.zero_()
        self.embed.weight[: len(weight)] = weight
        shared = torch.zeros_like(self.embed.weight[:, 0])
        shared[: len(weight)] = -weight @ mean
        shared[-head::2], shared[1 - head :: 2] = 1.0, -1.0
        if self.embed.bias is not None:
            self.embed.bias.copy_(shared)
        else:
            assert self.transformer.positions is not None
            self.transformer.positions.add_(shared)


@register("patch_vit_decoder")
class PatchViTDecoder(Decoder):
    """Latents, one for each patch, through a transformer to pixels.

    Two layers with a tanh between them paint the patches. Papers: as of `PatchViTEncoder`.

    Args:
        image_size: side in pixels, or (H, W), multiples of `patch_size`.
        channels: C; twice that of the images within a `logit_laplace_decoder`.
        patch_size: side of a patch in pixels.
        latent_dim: D, the width of the quantized latents. Others than W pass a linear layer first,
            and all of them do in front of rotary positions.
        width: W of the transformer.
        depth: number of blocks.
        num_heads: attention heads.
        head_width: of the layer in front of the tanh; None for a single linear layer.
        positions: as in the encoder.
        interpolation: as in the encoder.
        norm_in: normalise tokens before the first block.
        activation_checkpointing: as in the encoder.
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        patch_size: Count,
        latent_dim: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        head_width: Count | None = 3072,
        positions: Positions = "learned",
        interpolation: Interpolation | None = "bicubic",
        norm_in: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_values(PatchViTDecoder, locals())
        self.grid = rows, columns = grid_of(image_size, patch_size)
        self.num_tokens = rows * columns
        self.dim = latent_dim
        self.patch_size = patch_size
        self.embed: nn.Module = nn.Identity()
        if latent_dim != width or positions == "rotary":
            self.embed = nn.Linear(latent_dim, width)
            nn.init.orthogonal_(self.embed.weight)
        self.transformer = GridTransformer(
            self.grid,
            width,
            depth,
            num_heads,
            positions,
            interpolation,
            norm_in,
            activation_checkpointing,
        )
        values = patch_size * patch_size * channels
        if head_width is None:
            self.hidden: nn.Module = nn.Identity()
        else:
            self.hidden = nn.Sequential(nn.Linear(width, head_width), nn.Tanh())
        self.head = nn.Linear(head_width or width, values)
        init_transformer_(self.hidden)
        init_transformer_(self.head)

    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **sampling: Any,
    ) -> Tensor:
        """Images `(B, C, H, W)` from `(B, rows * columns, D)`; masked cells count as zero."""
        if mask is not None:
            quantized = quantized * mask[..., None]
        patches = self.head(self.features(quantized, taps))
        return unpatchify(patches, self.grid, self.patch_size)

    def features(self, quantized: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return what the last layer sees: `(B, rows * columns, head_width or W)`."""
        return self.hidden(self.transformer(self.embed(quantized), taps))

    def at(self, image_size: tuple[int, int]) -> PatchViTDecoder:
        """Return the same decoder, weights and all, for images of another size."""
        grid = grid_of(image_size, self.patch_size)
        other = with_children(self, {"transformer": self.transformer.at(grid)})
        other.grid, other.num_tokens = grid, grid[0] * grid[1]
        return other

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks."""
        return self.transformer.tap_shapes()

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start the last layer at the linear map that reconstructs `images` best.

        What tokens share is first made as long as in the encoder, next to what they differ in:
        codes of unit length hand on a small part of what the latents said.
        """
        few = max(1, _ROWS // self.num_tokens)
        tokens = torch.cat([self.embed(part) for part in quantized.split(8)]).flatten(0, 1)
        shared = tokens.mean(dim=0)
        content = (tokens - shared).square().sum(dim=1).mean().sqrt()
        wanted = shared * (content / (_CONTENT * scale_of(shared.norm())))
        if isinstance(self.embed, nn.Linear):
            self.embed.bias.add_(wanted - shared)
        else:
            assert self.transformer.positions is not None
            self.transformer.positions.add_(wanted - shared)
        # A few images at a time: between the layers, a paper's size has 3072 channels for a patch.
        features = torch.cat([self.features(part) for part in quantized[:few].split(8)])
        patches = patchify(images[:few], self.patch_size)
        weight, bias = least_squares(features.flatten(0, 1), patches.flatten(0, 1), _RIDGE)
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the layer that paints the patches."""
        return self.head.weight
