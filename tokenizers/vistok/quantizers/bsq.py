"""Binary spherical quantization: lookup-free codes on the unit sphere."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from vistok.core.registry import register
from vistok.core.values import CodebookSize, Count, NonNegative, Positive
from vistok.quantizers.lfq import LFQ


@register("bsq")
class BSQ(LFQ):
    """Binary spherical quantization.

    The d channels are normalised to length one and quantized to +-1/sqrt(d), so codes lie on the
    sphere as well and the error is bounded: |u - code| < sqrt(2 - 2/sqrt(d)).

    Gradient convention: straight-through onto the normalised latent with factor 1 (as in
    vector-quantize-pytorch), from there through the normalisation. bsq-vit scales by 1/sqrt(d)
    after the estimator, so its encoder gradient is smaller by that factor.

    Paper: https://arxiv.org/abs/2406.07548. Losses are those of `LFQ` at a = 4 u / (sqrt(d) T);
    "commitment" is the mean over channels, where the paper sums them (weight 0 there).

    Args:
        dim: width D of the latents.
        codebook_size: codes of one index slot, a power of two up to 2^18.
        num_codebooks: index slots Q; 36 bits are 4 slots of 2^9.
        entropy: "per_bit" is the released and cheapest approximation (group size 1),
            "per_codebook" the one with a slot's bits as a group, "joint" the exact entropy.
        temperature: T; 1 in the released code, 0.01 in vector-quantize-pytorch.
        diversity_gamma: weight of the batch entropy within the loss "entropy".
        entropy_eps: added inside the logarithm of the batch entropy (see `LFQ`).
        commitment_weight: weight of the loss "commitment".
        entropy_weight: weight of the loss "entropy".
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize = 2**18,
        num_codebooks: Count = 1,
        entropy: Literal["joint", "per_codebook", "per_bit"] = "per_bit",
        temperature: Positive = 1.0,
        diversity_gamma: NonNegative = 1.0,
        entropy_eps: NonNegative = 1e-5,
        commitment_weight: NonNegative = 0.0,
        entropy_weight: NonNegative = 0.1,
    ) -> None:
        super().__init__(
            dim,
            codebook_size,
            num_codebooks,
            entropy,
            temperature,
            diversity_gamma,
            entropy_eps,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
        )
        self.scale = self.codebook_dim**-0.5

    def _points(self, codes: Tensor) -> Tensor:
        # Below a length of 1e-3 a latent is scaled instead: at 0 the gradient of the plain
        # normalisation is infinite.
        return F.normalize(codes, dim=-1, eps=1e-3)
