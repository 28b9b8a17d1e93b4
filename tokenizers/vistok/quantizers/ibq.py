"""Index backpropagation quantization: every code gets a gradient from every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.values import CodebookSize, Count, NonNegative, Positive
from vistok.quantizers.base import Quantizer, token_mean
from vistok.quantizers.estimators import squared_errors
from vistok.quantizers.search import best_codes
from vistok.quantizers.soft_assignment import entropy_penalty, picked_codes, soft_straight_through


@register("ibq")
class IBQ(Quantizer):
    """Picks the code with the largest dot product and trains all codes through a softmax.

        p = softmax(z·Eᵀ)    i = argmax p    o = onehot(i) + p − sg p    ẑ = o·E

    The value of ẑ is E_i. Its gradient reaches the picked code directly and all codes through p,
    so that large codebooks of wide codes (262144 × 256) stay in use. Written with one-hots this
    keeps seven N×K tensors; here it is ẑ = E_i + A − sg A with A = Σ_k p_k·sg(E_k), an attention
    whose backward pass works in blocks, see `soft_assignment.py`.

    Losses, each a mean over tokens and dimensions: "double" |ẑ − z|², which trains latents and
    codes through p, "commitment" |z − sg q|² and "codebook" |q − sg z|².

    The index is the largest dot product, in eval too, and not the nearest neighbour. So the
    vector of an index quantizes back to it only where no longer code lies in its direction.

    Paper: Shi et al. 2024, https://arxiv.org/abs/2412.02692. Weights and the raw dot product
    without a temperature are the released code's.

    Args:
        dim: width D of the latents.
        codebook_size: number of codes K.
        codebook_dim: width d of the codes, 256 in the paper; None for D.
        temperature: of the softmax of p; 1 in the paper.
        double_weight: weight of the "double" loss.
        commitment_weight: weight of the commitment loss, 1 in the released code.
        codebook_weight: weight of the codebook loss, β = 0.25 in the released code.
        entropy_weight: weight of H(code | token) − H(code); 0 skips its cost.
        entropy_temperature: temperature of the soft assignment in that loss, on z·Eᵀ.
        init_std: standard deviation of the initial codes. The released N(0, 1) at d = 256
            saturates the softmax; None is d^(-1/2), for codes of length about 1.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        codebook_dim: Count | None = None,
        *,
        temperature: Positive = 1.0,
        double_weight: NonNegative = 1.0,
        commitment_weight: NonNegative = 1.0,
        codebook_weight: NonNegative = 0.25,
        entropy_weight: NonNegative = 0.05,
        entropy_temperature: Positive = 0.01,
        init_std: Positive | None = None,
    ) -> None:
        check_values(IBQ, locals())
        weights = {
            "double": double_weight,
            "commitment": commitment_weight,
            "codebook": codebook_weight,
            "entropy": entropy_weight,
        }
        weights = {name: weight for name, weight in weights.items() if weight != 0}
        super().__init__(dim, codebook_dim, [codebook_size], weights)
        self.temperature = temperature
        self.entropy_temperature = entropy_temperature
        std = self.codebook_dim**-0.5 if init_std is None else init_std
        self.embedding = nn.Parameter(std * torch.randn(int(codebook_size), self.codebook_dim))

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        z, keep = codes.reshape(-1, self.codebook_dim), None if mask is None else mask.reshape(-1)
        ids = best_codes(z.detach(), self.embedding.detach())
        q, table = picked_codes(self.embedding, ids)
        quantized, table = soft_straight_through(z, q, table, scale=1 / self.temperature)

        commitment, codebook = squared_errors(z, q)
        double = (quantized - z).square().mean(-1) if "double" in self.loss_weights else commitment
        errors = {"double": double, "commitment": commitment, "codebook": codebook}
        losses = {
            name: token_mean(error, keep)
            for name, error in errors.items()
            if name in self.loss_weights
        }
        metrics = {}
        if "entropy" in self.loss_weights:
            losses["entropy"], metrics = entropy_penalty(
                z, table, False, 1 / self.entropy_temperature, keep
            )
        indices = ids.view(*codes.shape[:-1], 1)
        return QuantizerOutput(quantized.view_as(codes), indices, losses, metrics)

    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        ids = best_codes(codes.reshape(-1, self.codebook_dim), self.embedding.detach())
        return ids.view(*codes.shape[:-1], 1)

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        return F.embedding(indices.squeeze(-1), self.embedding)

    @property
    def against_collapse(self) -> str:
        """Its entropy term is what spreads the use of codes."""
        return "a higher quantizer.entropy_weight, fewer codes or a lower optimizer.lr"

    def codebooks(self) -> list[Tensor]:
        """The table `(K, d)`."""
        return [self.embedding.detach()]
