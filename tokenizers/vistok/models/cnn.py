"""The convolutional encoder and decoder of VQGAN and of the grid tokenizers that followed it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.geometry import grid_of
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.taps import NO_TAPS, Tap, Taps
from vistok.core.values import Count, ImageSize, Index, Sizes, filled_list, whole
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.nn.conv import (
    AdaptiveGroupNorm,
    DepthToSpace,
    Downsample,
    OutputSkipBlock,
    ResBlock,
    SpatialAttention,
    Upsample,
    group_norm,
    norm_of,
)
from vistok.nn.data_init import (
    chunks,
    least_squares,
    pixels,
    start_block_,
    start_conv_,
    start_upsampling_,
)
from vistok.nn.patches import fold, haar, unfold_haar

Block = Literal["biased", "unbiased", "output_skip"]
Side = Annotated[int, whole(1)]  # of a convolution; odd
Stem = Literal["squares", "haar"]
Levels = bool | Annotated[Sequence[int], filled_list(Index, "a list of levels, 0 or more")]


class _Layers:
    """Makes the layers of one CNN, all with norms of so many groups, or set by so wide latents."""

    def __init__(self, block: Block, groups: int | None, latents: int | None = None) -> None:
        kinds: dict[str, Callable[..., nn.Module]] = {
            "biased": ResBlock,
            "unbiased": partial(ResBlock, bias=False),
            "output_skip": OutputSkipBlock,
        }
        if latents is not None and block == "output_skip":
            raise ArgumentError("spatial_norm=true: block=output_skip has no such norms")
        norms = {"groups": groups} | ({} if latents is None else {"latent_channels": latents})
        self.block: Callable[[int, int], nn.Module] = partial(kinds[block], **norms)
        self.attention = partial(SpatialAttention, **norms)

    def middle(self, width: int, count: int, attention: bool) -> list[nn.Module]:
        """Return the layers at the lowest resolution."""
        layers = [self.block(width, width)]
        if attention:
            layers.append(self.attention(width))
        return [*layers, *(self.block(width, width) for _ in range(count - 1))]


@register("cnn_encoder")
class CNNEncoder(Encoder):
    """Residual blocks with a halving between levels; one latent per cell of the last grid.

    VQGAN (Esser et al. 2021, https://arxiv.org/abs/2012.09841). The downsampling factor is
    `stem * 2 ** halvings`.

    Args:
        image_size: side in pixels, or (H, W), multiples of the downsampling factor.
        channels: C of the images.
        base_channels: channels of the first level.
        channel_multipliers: one per level, times `base_channels`.
        num_res_blocks: residual blocks per level.
        stem: first, fold squares of this side into channels (1: the paper's 3x3 convolution).
            Work on few large cells costs less than on many small ones: 2 is about three
            times as fast and what the CPU-sized presets use.
        attention: self-attention in the middle block and at the last level.
        level_attention: with it, also at the last level (VQGAN), or at those of a list, 0 the
            finest, and not in the middle block alone (latent diffusion, Rombach et al. 2022,
            https://arxiv.org/abs/2112.10752).
        latent_dim: D, the width of the latents, to which a convolution leads; None for the
            channels of the last level, and none.
        block: "biased" residual blocks (VQGAN); "unbiased": their convolutions, and the first one,
            have no bias (Open-MAGVIT2); "output_skip": and their shortcuts are of what they return
            (MaskBit), see `OutputSkipBlock`.
        middle_blocks: residual blocks behind the last level; attention follows the first.
        padding: of the strided convolutions: at one "corner" (VQGAN), or on all sides, "centered".
        output_kernel: side of the convolution to the latents.
        latent_kernel: side of one more convolution, from latents to latents (VQGAN's `quant_conv`);
            None for none.
        unit_range: the weights know images in [0, 1].
        norm_groups: groups of all norms, 32 in published networks; None for up to 32 that divide
            the channels into two or more each.
        stem_kind: what the stem folds into channels: "squares" of pixels, or their "haar" wavelets
            (Cosmos, https://arxiv.org/abs/2501.03575), of a `stem` that is a power of 2.
        halvings: levels that end in a halving, the finest first; None for all but the last.
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        base_channels: Count,
        channel_multipliers: Sizes,
        num_res_blocks: Count = 2,
        stem: Count = 1,
        attention: bool = True,
        level_attention: Levels = True,
        latent_dim: Count | None = None,
        block: Block = "biased",
        middle_blocks: Count = 2,
        padding: Literal["corner", "centered"] = "corner",
        output_kernel: Side = 3,
        latent_kernel: Side | None = None,
        unit_range: bool = False,
        norm_groups: Count | None = None,
        stem_kind: Stem = "squares",
        halvings: Index | None = None,
    ) -> None:
        super().__init__()
        check_values(CNNEncoder, locals())
        make = _Layers(block, norm_groups)
        self.unit_range = unit_range
        last = len(channel_multipliers) - 1
        self.halvings = _halvings(halvings, last)
        self.stem, self.stem_kind = _stem(stem, stem_kind), stem_kind
        grid = grid_of(image_size, stem * 2**self.halvings)
        self.grid: tuple[int, int] = grid  # type: ignore[assignment]
        self.num_tokens = grid[0] * grid[1]
        self.conv_in = nn.Conv2d(
            channels * stem * stem, base_channels, 3, padding=1, bias=block == "biased"
        )
        self.widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.ends: dict[int, int] = {}  # levels by the indices of their last layers
        layers: list[nn.Module] = []
        width = base_channels
        attends = _attending(attention, level_attention, last)
        for level in range(last + 1):
            for _ in range(num_res_blocks):
                layers.append(make.block(width, self.widths[level]))
                width = self.widths[level]
                if level in attends:
                    layers.append(make.attention(width))
            self.ends[len(layers) - 1] = level
            if level < self.halvings:
                layers.append(Downsample(width, padding == "centered"))
        self.layers = nn.Sequential(*layers, *make.middle(width, middle_blocks, attention))
        self.norm_out = group_norm(width, groups=norm_groups)
        self.dim = width if latent_dim is None else latent_dim
        self.conv_out = None if latent_dim is None else _conv(width, latent_dim, output_kernel)
        self.latent_conv = (
            None if latent_kernel is None else _conv(self.dim, self.dim, latent_kernel)
        )

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, rows * columns, D)`, raster order."""
        x = self.conv_in(self._folded(images))
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.ends:
                offer_level(taps, self.ends[number], x)
        x = F.silu(self.norm_out(x))
        x = x if self.conv_out is None else self.conv_out(x)
        x = x if self.latent_conv is None else self.latent_conv(x)
        return x.flatten(2).transpose(1, 2)

    def at(self, image_size: tuple[int, int]) -> CNNEncoder:
        """Return the same encoder, weights and all, for images of another size."""
        other = copy.copy(self)
        other.grid = grid_of(image_size, self.stem * 2**self.halvings)
        other.num_tokens = other.grid[0] * other.grid[1]
        return other

    def _folded(self, images: Tensor) -> Tensor:
        images = (images + 1) / 2 if self.unit_range else images
        return _FOLDS[self.stem_kind](images, self.stem)

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the levels."""
        levels = range(len(self.widths))
        return level_taps(self.widths, self.grid, [max(self.halvings - i, 0) for i in levels])

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Start as a map that keeps the principal components; see `nn/data_init.py`."""
        few = images[: max(8, 2**18 // images[0, 0].numel())]
        x = self._folded(few)
        start_conv_(self.conv_in, x)
        x = self.conv_in(x)
        for layer in self.layers:
            start_block_(layer, x)
            if isinstance(layer, Downsample):
                start_conv_(layer.conv, x)
            x = layer(x)
        if self.conv_out is not None:
            x = F.silu(self.norm_out(x))
            start_conv_(self.conv_out, x)
            x = self.conv_out(x)
        if self.latent_conv is not None:
            start_conv_(self.latent_conv, x)


def _conv(channels_in: int, channels_out: int, side: int) -> nn.Conv2d:
    """Return a convolution that keeps the size of its maps.

    Raises:
        ArgumentError: if its side is even.
    """
    if side % 2 == 0:
        raise ArgumentError(f"kernel of {side} x {side}: its side must be odd")
    return nn.Conv2d(channels_in, channels_out, side, padding=side // 2)


def _halvings(halvings: int | None, last: int) -> int:
    """Return how many levels end in a halving."""
    if halvings is not None and halvings > last + 1:
        raise ArgumentError(f"halvings={halvings}: there are {last + 1} levels")
    return last if halvings is None else halvings


def _stem(stem: int, kind: str) -> int:
    """Return a stem that can be folded."""
    if kind == "haar" and stem & (stem - 1):
        raise ArgumentError(f"stem={stem}: wavelets need a power of 2")
    return stem


#: What a stem does to images, and its inverse.
_FOLDS = {"squares": fold, "haar": haar}
_UNFOLDS = {"squares": F.pixel_shuffle, "haar": unfold_haar}


def _attending(attention: bool, level_attention: Levels, last: int) -> set[int]:
    """Return the levels with attention."""
    if not attention or level_attention is False:
        return set()
    levels = {last} if level_attention is True else set(level_attention)
    if max(levels) > last:
        raise ArgumentError(f"level_attention={sorted(levels)}: the levels are 0 to {last}")
    return levels


def level_taps(
    widths: Sequence[int], coarsest: tuple[int, int], doublings: Sequence[int] | None = None
) -> dict[str, Tap]:
    """Return the taps `level.{i}` of a CNN.

    Args:
        widths: channels of each level, 0 the finest.
        coarsest: rows and columns of the last level.
        doublings: from there to each level; None for grids that are each half of the one before.
    """
    rows, columns = coarsest
    scales = [2**n for n in doublings or reversed(range(len(widths)))]
    grids = [(rows * scale, columns * scale) for scale in scales]
    return {f"level.{i}": Tap(*level) for i, level in enumerate(zip(widths, grids, strict=True))}


def offer_level(taps: Taps, level: int, maps: Tensor) -> None:
    """Offer the cells of maps `(B, C, rows, columns)` as `level.{i}`, `(B, cells, C)`."""
    if taps.wants(f"level.{level}"):
        taps.offer(f"level.{level}", maps.flatten(2).transpose(1, 2))


def _run(layer: nn.Module, x: Tensor, latents: Tensor) -> Tensor:
    """Return what a layer makes of maps, given latents if it takes them."""
    return layer(x, latents) if getattr(layer, "takes_latents", False) else layer(x)


_ROWS = 20000  # pixels that the last layer is fitted to


@register("cnn_decoder")
class CNNDecoder(Decoder):
    """Residual blocks with a doubling between levels; the mirror of `CNNEncoder`.

    VQGAN (Esser et al. 2021, https://arxiv.org/abs/2012.09841).

    Args:
        image_size: side in pixels, or (H, W), multiples of the downsampling factor.
        channels: C of the images.
        latent_dim: D, the width of the quantized latents.
        base_channels: channels of the last level.
        channel_multipliers: one per level, times `base_channels`, in the *encoder's* order.
        num_res_blocks: residual blocks per level (one more than the encoder, as in the paper).
        stem: side of the squares that the last channels unfold into; the encoder's.
        attention: self-attention in the middle block and at the first level.
        upsample: "nearest" pixels and a convolution (VQGAN), or "depth_to_space" (GigaTok).
        adaptive_norm: begin each level with a norm that is set by the latents; see
            `AdaptiveGroupNorm` (GigaTok).
        level_attention: the encoder's.
        block: the encoder's; the first convolution has a bias in any case.
        middle_blocks: the encoder's.
        latent_kernel: the encoder's (VQGAN's `post_quant_conv`).
        unbiased_deviation: the deviations of adaptive norms have n - 1 in the denominator.
        unit_range: the encoder's.
        norm_groups: the encoder's.
        stem_kind: the encoder's.
        halvings: the encoder's: so many levels end in a doubling, the coarsest first.
        spatial_norm: the latents set all norms, place by place; see `SpatialNorm` (Emu3).
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        latent_dim: Count,
        base_channels: Count,
        channel_multipliers: Sizes,
        num_res_blocks: Count = 3,
        stem: Count = 1,
        attention: bool = True,
        upsample: Literal["nearest", "depth_to_space"] = "nearest",
        adaptive_norm: bool = False,
        level_attention: Levels = True,
        block: Block = "biased",
        middle_blocks: Count = 2,
        latent_kernel: Side | None = None,
        unbiased_deviation: bool = False,
        unit_range: bool = False,
        norm_groups: Count | None = None,
        stem_kind: Stem = "squares",
        halvings: Index | None = None,
        spatial_norm: bool = False,
    ) -> None:
        super().__init__()
        check_values(CNNDecoder, locals())
        last = len(channel_multipliers) - 1
        self.halvings = _halvings(halvings, last)
        self.stem, self.stem_kind = _stem(stem, stem_kind), stem_kind
        self.grid = grid_of(image_size, stem * 2**self.halvings)
        self.dim = latent_dim
        self.widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.ends: dict[int, int] = {}  # levels by the indices of their last layers
        self.unit_range = unit_range
        latents = latent_dim if spatial_norm else None
        make, width = _Layers(block, norm_groups, latents), self.widths[-1]
        attends = _attending(attention, level_attention, last)
        self.latent_conv = (
            None if latent_kernel is None else _conv(latent_dim, latent_dim, latent_kernel)
        )
        self.conv_in = nn.Conv2d(latent_dim, width, 3, padding=1)
        layers = make.middle(width, middle_blocks, attention)
        for level in reversed(range(last + 1)):
            if adaptive_norm:
                layers.append(
                    AdaptiveGroupNorm(width, latent_dim, norm_groups, int(unbiased_deviation))
                )
            for _ in range(num_res_blocks):
                layers.append(make.block(width, self.widths[level]))
                width = self.widths[level]
                if level in attends:
                    layers.append(make.attention(width))
            self.ends[len(layers) - 1] = level
            if level > last - self.halvings:
                layers.append((Upsample if upsample == "nearest" else DepthToSpace)(width))
        self.layers = nn.Sequential(*layers)
        self.norm_out = norm_of(width, norm_groups, latents)
        self.spatial_norm = spatial_norm
        self.conv_out = nn.Conv2d(width, channels * stem * stem, 3, padding=1)

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
        x = _UNFOLDS[self.stem_kind](self.conv_out(self.features(quantized, taps)), self.stem)
        return 2 * x - 1 if self.unit_range else x

    def features(self, quantized: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return what the last convolution sees: `(B, base_channels, H / stem, W / stem)`."""
        x, latents = self._mixed(quantized.transpose(1, 2).unflatten(2, self.grid))
        x = self.conv_in(x)
        for number, layer in enumerate(self.layers):
            x = _run(layer, x, latents)
            if number in self.ends:
                offer_level(taps, self.ends[number], x)
        return F.silu(self.norm_out(x, latents) if self.spatial_norm else self.norm_out(x))

    def _mixed(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first convolution sees of latents, and what norms do."""
        return (latents if self.latent_conv is None else self.latent_conv(latents)), latents

    def at(self, image_size: tuple[int, int]) -> CNNDecoder:
        """Return the same decoder, weights and all, for images of another size."""
        other = copy.copy(self)
        other.grid = grid_of(image_size, self.stem * 2**self.halvings)
        return other

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the levels."""
        levels = reversed(range(len(self.widths)))
        return level_taps(self.widths, self.grid, [min(self.halvings, i) for i in levels])

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start as a map that hands on what latents say of `images`; see `nn/data_init.py`.

        The last convolution is the linear map that reconstructs them best.
        """
        few = max(8, 2**18 // images[0, 0].numel())
        latents = quantized[:few].transpose(1, 2).unflatten(2, self.grid)
        if self.latent_conv is not None:
            start_conv_(self.latent_conv, latents)
        x, latents = self._mixed(latents)
        start_conv_(self.conv_in, x)
        x = self.conv_in(x)
        for layer in self.layers:
            start_block_(layer, x)
            if isinstance(layer, (Upsample, DepthToSpace)):
                factor = images.shape[2] // (2 * x.shape[2])
                start_upsampling_(layer, x, F.pixel_unshuffle(images[:few], factor))
            x = _run(layer, x, latents)
        rows, targets = [], []
        # A few images are enough.
        for chunk, latents in chunks(images[:64], quantized[:64], most=8):
            count = _ROWS * len(chunk) // min(64, len(images))
            rows.append(pixels(self.features(latents), 3, count=count))
            wanted = (chunk + 1) / 2 if self.unit_range else chunk
            targets.append(pixels(_FOLDS[self.stem_kind](wanted, self.stem), count=count))
        weight, bias = least_squares(torch.cat(rows), torch.cat(targets))
        self.conv_out.weight.copy_(weight.view_as(self.conv_out.weight))
        assert self.conv_out.bias is not None
        self.conv_out.bias.copy_(bias)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution."""
        return self.conv_out.weight
