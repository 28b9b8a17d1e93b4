"""Two branches in one latent, for pixels and for semantics: TokenFlow, DualToken, ImageFolder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.registry import register
from vistok.core.signatures import OptionsOf
from vistok.core.values import (
    CodebookSize,
    Count,
    NonNegative,
    Positive,
    Share,
    Sizes,
    check,
)
from vistok.quantizers.composite import sample_depths
from vistok.quantizers.multi_scale_vq import MultiScale, MultiScaleVQ, Places
from vistok.quantizers.product_vq import Product
from vistok.quantizers.residual_vq import ResidualVQ
from vistok.quantizers.vq import VectorQuantizer


@register("shared_index_vq")
class SharedIndexVQ(VectorQuantizer):
    """Two codebooks, semantic S and pixel P, that share one index: TokenFlow.

    The first channels of a code vector are semantic (s), the others pixel (p), each part of unit
    length:

        i = argmin_i |s − S_i|² + w·|p − P_i|²        ẑ = (S_i, P_i)

    which is the nearest neighbour among the joint vectors (S_i, √w·P_i): one search, and all of
    `VectorQuantizer` (EMA or gradient codes, revival, k-means) applies to them. The losses are
    taken there too, so w weighs the pixel part in them as well. A latent as wide as the two parts
    is not projected, and `quantized` then splits into the branches.

    Paper: TokenFlow, Qu et al. 2024, https://arxiv.org/abs/2412.03069

    Args:
        dim: width D of the latents.
        codebook_size: number of code pairs K.
        semantic_dim: width of S.
        pixel_dim: width of P.
        pixel_weight: w > 0.
        **codebook_options: passed to `VectorQuantizer`; the metric is cosine in each part.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        *,
        semantic_dim: Count = 32,
        pixel_dim: Count = 8,
        pixel_weight: Positive = 1.0,
        **codebook_options: Annotated[
            Any, OptionsOf(VectorQuantizer, but=("metric", "codebook_dim"))
        ],
    ) -> None:
        check("pixel_weight", pixel_weight, Positive)
        self.widths = [semantic_dim, pixel_dim]  # before super, which calls _metric
        self.pixel_scale = math.sqrt(pixel_weight)
        width = semantic_dim + pixel_dim
        super().__init__(dim, codebook_size, width, metric="cosine", **codebook_options)

    def _metric(self, codes: Tensor) -> Tensor:
        """Each part to unit length, the pixel part scaled by √w."""
        semantic, pixel = codes.split(self.widths, dim=-1)
        pixel = F.normalize(pixel, dim=-1, eps=1e-6) * self.pixel_scale
        return torch.cat([F.normalize(semantic, dim=-1, eps=1e-6), pixel], dim=-1)

    def _unscale(self, joint: Tensor) -> Tensor:
        semantic, pixel = joint.split(self.widths, dim=-1)
        return torch.cat([semantic, pixel / self.pixel_scale], dim=-1)

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        output = super()._quantize(codes, mask, grid)
        quantized = self._unscale(output.quantized)
        return QuantizerOutput(quantized, output.indices, output.losses, output.metrics)

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        return self._unscale(super()._lookup(indices, grid))

    def _start(self, points: Tensor) -> None:
        super()._start(points)
        with torch.no_grad():  # k-means leaves the joint mean at unit length, not its parts
            codes = self._metric(self.embedding)
            self.embedding.copy_(codes)
            self.stats.start(codes, self.stats.counts)

    def codebooks(self) -> list[Tensor]:
        """One table `(K, semantic_dim + pixel_dim)`: the pairs (S_i, P_i)."""
        return [self._unscale(self._table())]


@register("multi_scale_shared_index_vq")
class MultiScaleSharedIndexVQ(MultiScale):
    """TokenFlow as published: `SharedIndexVQ` over the scales of `MultiScale`, without φ.

    Codes have unit length in each part and the residual does not, as in the released code. The
    losses are `MultiScale`'s, after every scale at full resolution; the released code takes them
    on each pooled residual.

    Paper: TokenFlow, Qu et al. 2024, https://arxiv.org/abs/2412.03069

    Args:
        dim: width D of the latents.
        codebook_size: number of code pairs K.
        semantic_dim: width of S.
        pixel_dim: width of P.
        pixel_weight: w > 0.
        scales: sizes relative to the last.
        grid: as in `MultiScale`.
        commitment_weight: β.
        codebook_weight: weight of the codebook loss.
        scale_dropout: probability that a training sample keeps its first scales only. The
            released code drops one inner scale of the batch with probability 0.1.
        min_scales: the least that it keeps.
        **codebook_options: passed to `VectorQuantizer`.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        *,
        semantic_dim: Count = 32,
        pixel_dim: Count = 8,
        pixel_weight: Positive = 1.0,
        scales: Sizes = (1, 2, 4, 6, 8, 10, 12, 14, 16),
        grid: Places | None = None,
        commitment_weight: NonNegative = 0.25,
        codebook_weight: NonNegative = 1.0,
        scale_dropout: Share = 0.0,
        min_scales: Count = 1,
        **codebook_options: Annotated[Any, OptionsOf(SharedIndexVQ)],
    ) -> None:
        book = SharedIndexVQ(
            semantic_dim + pixel_dim,
            codebook_size,
            semantic_dim=semantic_dim,
            pixel_dim=pixel_dim,
            pixel_weight=pixel_weight,
            commitment_weight=0.0,
            codebook_weight=0.0,
            **codebook_options,
        )
        super().__init__(
            dim,
            book,
            scales=scales,
            grid=grid,
            num_phi=0,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
            scale_dropout=scale_dropout,
            min_scales=min_scales,
        )


@register("dual_token")
class DualToken(Product):
    """Two residual codes per token, one for pixels and one for semantics, with own indices.

    The first half of the code space is the pixel branch, the second the semantic one, each a
    `ResidualVQ` whose codebook is shared over its depth; indices are `(B, N, 2·num_layers)`,
    pixel first. The paper feeds the branches from a shallow and a deep layer of the encoder: lay
    those two on the two halves of the latent (D = 2·codebook_dim: no projection mixes them).

    Paper: DualToken, Song et al. 2025, https://arxiv.org/abs/2503.14324

    Args:
        dim: width D of the latents.
        codebook_size: number of codes K of each branch.
        codebook_dim: width of the codes of each branch; None for D / 2.
        num_layers: residual depth of each branch.
        shared: one codebook per branch instead of one per branch and layer.
        quantizer_dropout: as in `ResidualVQ`; each branch draws for itself.
        **codebook_options: passed to each `VectorQuantizer`.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        codebook_dim: Count | None = None,
        *,
        num_layers: Count = 8,
        shared: bool = True,
        quantizer_dropout: Share = 0.0,
        **codebook_options: Annotated[Any, OptionsOf(ResidualVQ)],
    ) -> None:
        if codebook_dim is None and dim % 2:
            raise ArgumentError(f"dim={dim}: must be even, for two halves; or set codebook_dim")
        branches = [
            ResidualVQ(
                codebook_dim or dim // 2,
                codebook_size,
                num_layers=num_layers,
                shared=shared,
                quantizer_dropout=quantizer_dropout,
                **codebook_options,
            )
            for _ in ("pixel", "semantic")
        ]
        super().__init__(dim, branches)


@register("image_folder")
class ImageFolder(Product):
    """P branches, each a multi-scale residual over its share of the channels, folded together.

    The branches code the same positions at the same scales, so that a generator can predict the
    P ids of a position at once: indices are `(B, L, P)`. A sample that drops scales drops them
    in all branches. The last branch is the semantic one: the paper hangs a contrastive loss to
    DINOv2 on its channels, which is the tokenizer's part. Losses are means over branches and
    scales (the released VQ variant forgets the latter for one of the two).

    Paper: ImageFolder, Li et al. 2024, https://arxiv.org/abs/2410.01756

    Args:
        dim: width D of the latents.
        codebook_size: number of codes K of each branch.
        codebook_dim: width of the codes of each branch; None for D / P.
        num_branches: P.
        scales: sizes relative to the last; a size may repeat.
        scale_dropout: probability that a training sample keeps its first n scales, n uniform on
            [min_scales, S].
        min_scales: the least that it keeps.
        **options: passed to each branch's `MultiScaleVQ`.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        codebook_dim: Count | None = None,
        *,
        num_branches: Count = 2,
        scales: Sizes = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11),
        scale_dropout: Share = 0.1,
        min_scales: Count = 3,
        **options: Annotated[Any, OptionsOf(MultiScaleVQ)],
    ) -> None:
        check("num_branches", num_branches, Count)
        if codebook_dim is None and dim % num_branches:
            raise ArgumentError(
                f"num_branches={num_branches}: does not divide dim={dim}; set codebook_dim"
            )
        branches = [
            MultiScaleVQ(
                codebook_dim or dim // num_branches,
                codebook_size,
                scales=scales,
                min_scales=min_scales,
                **options,
            )
            for _ in range(num_branches)
        ]
        super().__init__(dim, branches)
        self.scale_dropout = scale_dropout
        self.min_scales = min_scales

    @property
    def branches(self) -> list[MultiScaleVQ]:
        """The P branches."""
        return cast(list[MultiScaleVQ], list(self.books))

    def _quantize_books(
        self, parts: Sequence[Tensor], mask: Tensor | None, grid: Grid | None
    ) -> list[QuantizerOutput]:
        depths = None
        if self.scale_dropout > 0:
            batch, device = parts[0].shape[0], parts[0].device
            num_scales = len(self.branches[0].scales)
            depths = sample_depths(batch, num_scales, self.min_scales, self.scale_dropout, device)
        pairs = zip(self.branches, parts, strict=True)
        return [branch._quantize(part, mask, grid, depths) for branch, part in pairs]

    def decode_prefix(self, indices: Tensor, num_tokens: int, grid: Grid | None = None) -> Tensor:
        """Decode the first scales alone; see `MultiScale.decode_prefix`."""
        return self.decode(self.branches[0].pad_prefix(indices, num_tokens, grid), grid)
