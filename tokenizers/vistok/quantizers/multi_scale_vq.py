"""Multi-scale residual quantization: the picture first at 1×1, then ever finer."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.registry import register
from vistok.core.signatures import OptionsOf, check_values
from vistok.core.values import (
    CodebookSize,
    Count,
    Index,
    NonNegative,
    Share,
    Sizes,
    filled_list,
)
from vistok.quantizers import estimators
from vistok.quantizers.base import token_mean
from vistok.quantizers.composite import Composite, assign_codes, keep_active, sample_depths
from vistok.quantizers.vq import VectorQuantizer

#: [rows, columns] or [N].
Places = Annotated[
    Sequence[int],
    filled_list(Count, "[rows, columns], for example [8,16]", (1, 2)),
]

Ties = Literal["earlier", "later"]

VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@register("multi_scale")
class MultiScale(Composite):
    """Residual quantization over a pyramid of grids with one codebook for all scales.

    The latents f lie on a grid. For each scale s, coarse to fine:

        ids_s = search(area-downsample(f − f̂))
        h = bicubic-upsample(codes[ids_s])        h ← (1−ρ)·h + ρ·φ(h)        f̂ ← f̂ + h

    so the ids are a sequence of all scales, `(B, L, Q)` with L = `num_index_tokens(N, grid)`, from
    which `decode` makes N vectors. φ is one of a few shared 3×3 convolutions. "commitment"
    |f − sg f̂|² and "codebook" |f̂ − sg f|² are taken after every scale and averaged over the
    scales; the second trains codes and φ, each scale also through all later ones. The residual
    is detached and the encoder's gradient is the identity.

    A line of tokens is a grid of one row. Each scale has `scales[s] / scales[-1]` of the length of
    an axis, so one list serves grids of every size; with N = scales[-1]² it is the side lengths.

    With scale dropout a training sample keeps its first n scales only, so that a prefix of the
    scales decodes (`decode_prefix`). The scales it lacks are index -1 and add nothing.

    Paper: VAR, Tian et al. 2024, https://arxiv.org/abs/2404.02905. Differs from its code: the
    residual keeps no graph, one scale is allowed, no process group is needed.

    Args:
        dim: width D of the latents.
        book: the quantizer of the pooled residuals, in code space. Its own losses are not used.
        scales: sizes relative to the last, ascending; a size may repeat.
        grid: [rows, columns] of the tokens, or [N] for a line, in place of the grid that calls
            name; None for that one.
        num_phi: number of shared convolutions; scale s takes the one nearest to its place from
            first to last. 0 for none.
        phi_ratio: ρ in [0, 1].
        phi_ties: which convolution serves a scale that is as near to two, as the third and the
            eighth of ten scales are to four convolutions: the "earlier" or, as in the released
            code, the "later".
        commitment_weight: β, weight of the commitment loss.
        codebook_weight: weight of the codebook loss.
        scale_dropout: probability that a training sample keeps n scales, n uniform on
            [min_scales, S], instead of all.
        min_scales: the least that it keeps.
    """

    def __init__(
        self,
        dim: Count,
        book: VectorQuantizer,
        *,
        scales: Sizes = VAR_SCALES,
        grid: Places | None = None,
        num_phi: Index = 4,
        phi_ratio: Share = 0.5,
        phi_ties: Ties = "earlier",
        commitment_weight: NonNegative = 0.25,
        codebook_weight: NonNegative = 1.0,
        scale_dropout: Share = 0.0,
        min_scales: Count = 1,
    ) -> None:
        check_values(MultiScale, locals())
        scales = tuple(scales)
        if list(scales) != sorted(scales):
            raise ArgumentError(f"scales={list(scales)}: must be ascending")
        if min_scales > len(scales):
            raise ArgumentError(f"min_scales={min_scales}: must be 1 to {len(scales)}")
        if "entropy" in book.loss_weights:
            raise ArgumentError("entropy_weight: the multi-scale losses have no entropy")
        weights = {"commitment": commitment_weight, "codebook": codebook_weight}
        super().__init__(dim, book.dim, [book], book.codebook_sizes, weights)
        self.scales = scales
        self.grid = None if grid is None else tuple(grid)
        self.phi_ratio = phi_ratio
        self.phi_ties = phi_ties
        self.scale_dropout = scale_dropout
        self.min_scales = min_scales
        self.phi = nn.ModuleList(
            nn.Conv2d(book.dim, book.dim, kernel_size=3, padding=1) for _ in range(num_phi)
        )

    @property
    def book(self) -> VectorQuantizer:
        """The quantizer of the pooled residuals."""
        return cast(VectorQuantizer, self.books[0])

    # ------------------------------------------------------------------ the method

    def _quantize(
        self,
        codes: Tensor,
        mask: Tensor | None,
        grid: Grid | None,
        depths: Tensor | None = None,
    ) -> QuantizerOutput:
        book, (batch, num_tokens, _) = self.book, codes.shape
        grid = self._grid(num_tokens, grid)
        if depths is None and self.scale_dropout > 0:
            depths = self.sample_depths(batch, codes.device)
        if not book._is_ready():  # else the 1×1 scale would start it from a handful of means
            z = book._metric(codes.detach().flatten(0, 1))
            book._initialize_from_batch(z, None if mask is None else mask.flatten())
        target = _to_map(codes, grid)
        painted, residual = torch.zeros_like(target), target.detach()
        indices, commitment, codebook = [], [], []
        for number, size in enumerate(self._sizes(grid)):
            active = None if depths is None else number < depths
            rows = _pool(residual, size)
            kept = None if mask is None else _pool_mask(mask, grid, size)
            ids = assign_codes(book, rows, keep_active(kept, active, rows.shape[1]))
            layer = self._paint(book._lookup(ids), number, size, grid)
            if active is not None:
                layer = layer * active[:, None, None, None]
                ids = torch.where(active[:, None, None], ids, -1)
            painted = painted + layer
            residual = residual - layer.detach()
            indices.append(ids)
            keep = keep_active(mask, active, num_tokens)
            commitment.append(_map_loss(target, painted.detach(), keep))
            codebook.append(_map_loss(painted, target.detach(), keep))
        losses = {
            "commitment": torch.stack(commitment).mean(),
            "codebook": torch.stack(codebook).mean(),
        }
        quantized = estimators.straight_through(codes, _to_tokens(painted))
        return QuantizerOutput(quantized, torch.cat(indices, dim=1), losses)

    @torch.no_grad()
    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        grid = self._grid(codes.shape[1], grid)
        residual, indices = _to_map(codes, grid), []
        for number, size in enumerate(self._sizes(grid)):
            ids = self.book._search(_pool(residual, size))
            residual = residual - self._paint(self.book._lookup(ids), number, size, grid)
            indices.append(ids)
        return torch.cat(indices, dim=1)

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        grid = self._grid_of_ids(indices.shape[1], grid)
        sizes = self._sizes(grid)
        painted = torch.zeros((), device=indices.device)
        parts = indices.split([math.prod(size) for size in sizes], dim=1)
        for number, (ids, size) in enumerate(zip(parts, sizes, strict=True)):
            layer = self._paint(self.book._lookup(ids.clamp(min=0)), number, size, grid)
            present = (ids >= 0).flatten(1).all(dim=1)
            painted = painted + layer * present[:, None, None, None]
        return _to_tokens(painted)

    def _paint(self, vectors: Tensor, number: int, size: Grid, grid: Grid) -> Tensor:
        """Return what scale `number` adds to f̂: `(B, h·w, d)` codes to a `(B, d, H, W)` map."""
        layer = _to_map(vectors, size)
        if size != grid:
            layer = F.interpolate(layer, size=grid, mode="bicubic")
        if self.phi:
            place = number / max(len(self.scales) - 1, 1)
            phi = self.phi[_nearest_tick(place, len(self.phi), self.phi_ties == "later")]
            layer = (1 - self.phi_ratio) * layer + self.phi_ratio * phi(layer)
        return layer

    def codebooks(self) -> list[Tensor]:
        """The tables of the book, which serve all scales."""
        return self.book.codebooks()

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        """Start the codebook from `latents` `(M, D)`, and from what codes leave of them.

        The first scale sees latents, the later ones what is left. How much that is depends on the
        grid, which is not known here: one and two codes stand for all scales.
        """
        if not self.book.kmeans_init or latents.shape[0] == 0:
            return
        with torch.autocast(latents.device.type, enabled=False):
            residuals = [self.project_in(latents.float())]
            self.book.initialize(residuals[0])
            for _ in range(min(2, len(self.scales) - 1)):
                ids = self.book._search(residuals[-1][None])
                residuals.append(residuals[-1] - self.book._lookup(ids)[0])
            self.book.initialize(torch.cat(residuals))

    def decode_prefix(self, indices: Tensor, num_tokens: int, grid: Grid | None = None) -> Tensor:
        """Decode the first scales alone: a coarser picture.

        Args:
            indices: `(B, n, Q)` integers, the sequence up to the end of some scale.
            num_tokens: N, the number of vectors to make.
            grid: where they lie; None for a line.

        Returns:
            `(B, N, D)` float32, the same as `decode` with the other scales at -1.
        """
        return self.decode(self.pad_prefix(indices, num_tokens, grid), grid)

    def pad_prefix(self, indices: Tensor, num_tokens: int, grid: Grid | None = None) -> Tensor:
        """Fill `(B, n, Q)` indices of the first scales up with -1 to those of N latents."""
        sizes = [math.prod(size) for size in self._sizes(self._grid(num_tokens, grid))]
        ends = list(itertools.accumulate(sizes))
        if indices.shape[1] not in ends:
            raise ConfigError(
                f"{type(self).__name__}.decode_prefix: {indices.shape[1]} indices end inside a "
                f"scale; the scales end at {ends}"
            )
        return F.pad(indices, (0, 0, 0, ends[-1] - indices.shape[1]), value=-1)

    def sample_depths(self, batch: int, device: torch.device) -> Tensor:
        """Return how many scales each training sample keeps, `(B,)` int64."""
        return sample_depths(batch, len(self.scales), self.min_scales, self.scale_dropout, device)

    # ------------------------------------------------------------------ the geometry

    @property
    def per_token(self) -> bool:
        """Return False: an id stands for all tokens under it."""
        return False

    def num_index_tokens(self, num_tokens: int, grid: Grid | None = None) -> int:
        """L: the sizes of all scales added up."""
        return self._length(self._grid(num_tokens, grid))

    def scales_of(self, num_tokens: int, grid: Grid | None = None) -> list[Grid]:
        """Return the grid of every scale; the last is that of the latents."""
        return self._sizes(self._grid(num_tokens, grid))

    def index_mask(self, mask: Tensor, grid: Grid | None = None) -> Tensor:
        """An index token counts if any latent under it does; `(B, L)`."""
        grid = self._grid(mask.shape[1], grid)
        return torch.cat([_pool_mask(mask, grid, size) for size in self._sizes(grid)], dim=1)

    def _sizes(self, grid: Grid) -> list[Grid]:
        """The grid of every scale; the last is the grid itself."""
        return [tuple(self._scaled(side, scale) for side in grid) for scale in self.scales]

    def _scaled(self, length: int, scale: int) -> int:
        last = self.scales[-1]
        return max(1, (2 * length * scale + last) // (2 * last))  # rounded half up

    def _length(self, grid: Grid) -> int:
        return sum(math.prod(size) for size in self._sizes(grid))

    def _grid(self, num_tokens: int, grid: Grid | None) -> Grid:
        """Rows and columns of N latents: the option's, else those of `grid`, else one row."""
        key = "grid" if self.grid is None else "quantizer.grid"
        grid = self.grid or grid or (num_tokens,)
        if math.prod(grid) != num_tokens:
            raise ConfigError(
                f"{key}={list(grid)}: has {math.prod(grid)} places, but there are {num_tokens} "
                f"tokens; the product must be {num_tokens}"
            )
        return _in_rows(grid)

    def _grid_of_ids(self, length: int, grid: Grid | None) -> Grid:
        """Rows and columns of the latents that a sequence of ids stands for."""
        grid = self.grid or grid
        if grid is None:  # A longer line has more ids, so one line at most has so many.
            grid = (1 + bisect.bisect_left(range(1, length), length, key=self.num_index_tokens),)
        grid = _in_rows(grid)
        if self._length(grid) != length:
            raise ConfigError(
                f"{type(self).__name__}.decode: found {length} index tokens, but a grid of "
                f"{grid[0]} x {grid[1]} has {self._length(grid)} at scales {list(self.scales)}; "
                "a prefix goes to decode_prefix"
            )
        return grid


@register("multi_scale_vq")
class MultiScaleVQ(MultiScale):
    """Multi-scale residual quantization with one learned codebook: VAR's tokenizer.

    The mechanism is `MultiScale`'s.

    Paper: VAR, Tian et al. 2024, https://arxiv.org/abs/2404.02905

    Args:
        dim: width D of the latents.
        codebook_size: number of codes K.
        codebook_dim: width d of the codes; None for D.
        scales: as in `MultiScale`, like the eight that follow.
        grid: [rows, columns] or [N] in place of the encoder's grid; None for that one.
        num_phi: number of shared convolutions.
        phi_ratio: share of the convolution in the sum.
        phi_ties: "later" as released.
        commitment_weight: β.
        codebook_weight: weight of the codebook loss.
        scale_dropout: probability that a training sample keeps its first scales only.
        min_scales: the least that it keeps.
        **codebook_options: passed to the `VectorQuantizer`.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        codebook_dim: Count | None = None,
        *,
        scales: Sizes = VAR_SCALES,
        grid: Places | None = None,
        num_phi: Index = 4,
        phi_ratio: Share = 0.5,
        phi_ties: Ties = "earlier",
        commitment_weight: NonNegative = 0.25,
        codebook_weight: NonNegative = 1.0,
        scale_dropout: Share = 0.0,
        min_scales: Count = 1,
        **codebook_options: Annotated[Any, OptionsOf(VectorQuantizer)],
    ) -> None:
        # Weights of 0: the losses of the codebook itself are not computed.
        book = VectorQuantizer(
            codebook_dim or dim,
            codebook_size,
            commitment_weight=0.0,
            codebook_weight=0.0,
            **codebook_options,
        )
        super().__init__(
            dim,
            book,
            scales=scales,
            grid=grid,
            num_phi=num_phi,
            phi_ratio=phi_ratio,
            phi_ties=phi_ties,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
            scale_dropout=scale_dropout,
            min_scales=min_scales,
        )


def _in_rows(grid: Grid) -> Grid:
    """A line as a single row; interpolation and φ know two axes."""
    if len(grid) > 2:
        raise ConfigError(f"grid={list(grid)}: scales work on a grid of one or two axes")
    return (1, *grid)[-2:]


def _to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """`(B, h·w, d)` to `(B, d, h, w)`, row-major."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def _to_tokens(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)


def _pool(grid: Tensor, size: Grid) -> Tensor:
    """Mean of the area under each token of the smaller grid, `(B, h·w, d)`."""
    if grid.shape[2:] != size:
        grid = F.interpolate(grid, size=size, mode="area")
    return _to_tokens(grid)


def _pool_mask(mask: Tensor, grid: Grid, size: Grid) -> Tensor:
    return _pool(_to_map(mask[..., None].float(), grid), size).squeeze(-1) > 0


def _map_loss(a: Tensor, b: Tensor, keep: Tensor | None) -> Tensor:
    """Mean squared difference of two maps over the tokens `(B, N)` that count."""
    return token_mean((a - b).square().mean(dim=1).flatten(1), keep)


def _nearest_tick(place: float, num_ticks: int, later: bool = False) -> int:
    """Return which of the shared convolutions serves a place in [0, 1] among the scales.

    Args:
        place: of the scale.
        num_ticks: number of convolutions.
        later: of two that are equally near, the later.
    """
    if num_ticks == 1:
        return 0
    first = 1 / (3 * num_ticks)
    ticks = [first + i * (1 - 2 * first) / (num_ticks - 1) for i in range(num_ticks)]
    shift = 1e-9 if later else 0.0  # far above the rounding of these numbers
    return min(range(num_ticks), key=lambda i: abs(ticks[i] - place - shift))
