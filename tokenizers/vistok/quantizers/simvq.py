"""SimVQ: a frozen random codebook and one learned linear map that moves all codes at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.registry import register
from vistok.core.values import CodebookSize, Count, NonNegative, Positive
from vistok.quantizers.soft_assignment import mapped_codes
from vistok.quantizers.vq import Estimator, Metric, VectorQuantizer


@register("simvq")
class SimVQ(VectorQuantizer):
    """Vector quantization with the codebook E = C·Wᵀ + b, C frozen.

    A loss on any code moves W and with it every code, so that none is left behind. Search,
    decoding and export all use E (the released `get_codebook_entry` forgets W). In training the
    rows of C are gathered before the map, so that its backward pass costs N·d², not K·d²; E for
    the search is computed once per forward, without a gradient.

    Paper: Zhu et al. 2024, https://arxiv.org/abs/2411.02038

    Args:
        dim: width D of the latents.
        codebook_size: number of codes K.
        codebook_dim: width d of the codes; None for D.
        bias: learn b, as in the released code.
        metric: "euclidean" in the paper, or "cosine".
        estimator: as in `VectorQuantizer`.
        commitment_weight: β, weight of the commitment loss.
        codebook_weight: weight of the codebook loss, which trains W.
        entropy_weight: as in `VectorQuantizer`.
        entropy_temperature: as in `VectorQuantizer`.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        codebook_dim: Count | None = None,
        *,
        bias: bool = True,
        metric: Metric = "euclidean",
        estimator: Estimator = "straight_through",
        commitment_weight: NonNegative = 0.25,
        codebook_weight: NonNegative = 1.0,
        entropy_weight: NonNegative = 0.0,
        entropy_temperature: Positive = 0.01,
    ) -> None:
        super().__init__(
            dim,
            codebook_size,
            codebook_dim,
            codebook="gradient",
            metric=metric,
            estimator=estimator,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            kmeans_init=False,
            revival="none",
        )
        del self.embedding
        frozen = torch.randn(self.codebook_size, self.codebook_dim) * self.codebook_dim**-0.5
        self.embedding: Tensor
        self.register_buffer("embedding", frozen)
        self.map = nn.Linear(self.codebook_dim, self.codebook_dim, bias=bias)

    def after_step(self, optimizers=()) -> dict[str, Tensor]:
        """Nothing to do: the frozen codes stay and the map learns by gradient."""
        self.stats.update()
        return {}

    @property
    def against_collapse(self) -> str:
        """One map moves all codes, so there are none to revive."""
        return "a higher quantizer.entropy_weight, fewer codes or a lower optimizer.lr"

    @torch.no_grad()
    def _table(self) -> Tensor:
        return self._metric(self.map(self.embedding))

    def _soft_table(self) -> Tensor:
        codes = self.map(self.embedding)
        return mapped_codes(codes, self._metric) if self.cosine else codes

    def _rows(self, ids: Tensor) -> Tensor:
        if not self.training:
            # Rows of the same product as the search and the export, hence the same bits
            # whatever the number of ids.
            return F.embedding(ids, self._table())
        if ids.numel() < self.codebook_size:
            return self._metric(self.map(F.embedding(ids, self.embedding)))
        return F.embedding(ids, self._soft_table())
