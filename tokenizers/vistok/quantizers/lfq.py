"""Lookup-free quantization: the code is the sign of each channel, no codebook is learned."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.ranks import all_reduce_mean_with_grad
from vistok.core.registry import register
from vistok.core.signatures import OptionsOf, check_values
from vistok.core.values import CodebookSize, Count, NonNegative, Positive
from vistok.quantizers.base import Quantizer
from vistok.quantizers.scalar import (
    binary_radices,
    bits_of,
    pack_digits,
    straight_through,
    token_weights,
    unpack_digits,
)

MAX_JOINT_BITS = 22

"""Most bits over which the exact entropy may run: its table of 2^22 floats is 16 MB."""

BLOCK = 2**20

"""Elements of a table of partial code probabilities that are alive at a time (4 MB)."""


@register("lfq")
class LFQ(Quantizer):
    """Lookup-free quantization with the exact, factorised entropy.

    Every channel is one bit: z_j > 0 gives +scale, else -scale. With soft assignments
    p(c | z) proportional to exp(2 z.c / T) over the codes c, training adds

        entropy = mean_n H(p(. | z_n)) - gamma * H(mean_n p(. | z_n)),

    confident tokens against an evenly used vocabulary. p factorises over bits, with
    p(bit_j = +) = sigmoid(a_j) and a_j = 4 scale z_j / T. Hence the first term is a sum of d
    binary entropies, and the mean probability of all 2^d codes is one matrix product of the
    probabilities of the upper and the lower half of the bits (`mean_code_probabilities`).
    Nothing of size N x 2^d exists, and values and gradients are those of the definition.

    Indices: bit j of slot q is channel q * bits + j, least significant first (Open-MAGVIT2's
    order; vector-quantize-pytorch and bsq-vit have the first channel most significant).

    Papers: MAGVIT-v2, https://arxiv.org/abs/2310.05737 and Open-MAGVIT2,
    https://arxiv.org/abs/2409.04410. Differs from both: the batch entropy is that of the batch
    over all ranks. The entropy loss is negative by design, down to about -gamma * log(2^d).

    Args:
        dim: width D of the latents.
        codebook_size: codes of one index slot, a power of two up to 2^18.
        num_codebooks: index slots Q. The token has d = Q * log2(codebook_size) bits; two slots
            of 2^9 are the 2^18 codes of Open-MAGVIT2 with its token factorization.
        entropy: whose marginal the batch entropy takes. "joint": of all d bits, exact, up to 22
            bits. "per_codebook": the sum over slots of the entropy of each, an upper bound that
            ignores correlation between slots. "per_bit": the same for each bit. The bounds are
            other objectives: cheaper, but copies of one bit pass for diversity.
        temperature: T, in squared latent units.
        diversity_gamma: gamma.
        entropy_eps: added to probabilities inside the logarithm of the batch entropy, 1e-5 in
            the released code. It weakens the pull towards codes rarer than that (a uniform code
            of 2^18 has 4e-6); 0 gives Shannon's entropy.
        scale: absolute value of a code's channels.
        commitment_weight: weight of the loss "commitment", mean (z - code)^2.
        entropy_weight: weight of the loss "entropy", in nats per token; 0 skips its computation.

    Raises:
        ConfigError: if a value is out of range; the message names its key.
    """

    whiten_projection = True

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize = 2**18,
        num_codebooks: Count = 1,
        entropy: Literal["joint", "per_codebook", "per_bit"] = "joint",
        temperature: Positive = 0.01,
        diversity_gamma: NonNegative = 1.0,
        entropy_eps: NonNegative = 1e-5,
        scale: Positive = 1.0,
        commitment_weight: NonNegative = 0.25,
        entropy_weight: NonNegative = 0.1,
    ) -> None:
        check_values(type(self), locals())
        bits = bits_of(codebook_size)
        super().__init__(
            dim,
            bits * num_codebooks,
            [codebook_size] * num_codebooks,
            {"commitment": commitment_weight, "entropy": entropy_weight},
        )
        self.bits = bits
        self.entropy = entropy
        self.temperature = temperature
        self.diversity_gamma = diversity_gamma
        self.entropy_eps = entropy_eps
        self.scale = scale
        if entropy == "joint" and self.codebook_dim > MAX_JOINT_BITS and entropy_weight:
            raise ArgumentError(
                f"entropy=joint: the exact entropy takes at most {MAX_JOINT_BITS} bits, "
                f"this token has {self.codebook_dim}; use entropy=per_codebook or per_bit"
            )

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        points = self._points(codes)
        quantized = self._signs(codes > 0)
        weights = token_weights(codes, mask)
        error = (points - quantized).square().mean(-1)
        losses = {"commitment": weights @ error.flatten()}
        metrics = {}
        if self.loss_weights["entropy"]:
            sample, batch = self._entropies(points, weights)
            losses["entropy"] = sample - self.diversity_gamma * batch
            metrics = {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}
        return QuantizerOutput(
            straight_through(points, quantized), self._search(codes), losses, metrics
        )

    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        bits = (codes > 0).unflatten(-1, (self.num_indices, self.bits))
        return pack_digits(bits, binary_radices(self.bits, codes.device))

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        bits = unpack_digits(indices, binary_radices(self.bits, indices.device))
        return self._signs(bits.flatten(-2) > 0)

    @property
    def against_collapse(self) -> str:
        """Its entropy term is what spreads the use of codes."""
        return "a higher quantizer.entropy_weight, fewer codes or a lower optimizer.lr"

    def digits(self) -> list[list[float]]:
        """Return the two values of each bit."""
        return [[-float(self.scale), float(self.scale)]] * self.bits

    def codebooks(self) -> list[Tensor]:
        """The same table `(2^bits, bits)` for each slot; a token concatenates its rows."""
        device = self.usage.counts.device
        ids = torch.arange(self.codebook_sizes[0], device=device)
        table = self._signs(unpack_digits(ids, binary_radices(self.bits, device)) > 0)
        return [table] * self.num_indices

    def _points(self, codes: Tensor) -> Tensor:
        """The points that are pulled to the codes; BSQ puts them on the sphere."""
        return codes

    def _signs(self, bits: Tensor) -> Tensor:
        return bits.float().mul_(2 * self.scale).sub_(self.scale)

    def _entropies(self, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and batch entropy, in nats per token."""
        group = {"joint": self.codebook_dim, "per_codebook": self.bits, "per_bit": 1}[self.entropy]
        logits = self._logits(points)
        mean = mean_code_probabilities(logits.unflatten(-1, (-1, group)), weights)
        batch = code_entropy(all_reduce_mean_with_grad(mean), self.entropy_eps).sum()
        return weights @ bit_entropy(logits).sum(-1), batch

    def _logits(self, points: Tensor) -> Tensor:
        return points.flatten(0, 1) * (4 * self.scale / self.temperature)


@register("group_lfq")
class GroupLFQ(LFQ):
    """Group-wise lookup-free quantization (GQ) of WeTok.

    The d = Q * log2(codebook_size) bits form Q groups, each an index slot with entropies of its
    own: cost and memory grow with Q instead of 2^d, so 32 bits (4 x 2^8) are as cheap as 8.
    Entropies are means over the groups, so `entropy_weight` keeps its meaning for any Q.

    Paper: WeTok, https://arxiv.org/abs/2508.05599.

    Args:
        dim: width D of the latents.
        codebook_size: codes of one group, a power of two.
        num_codebooks: groups Q.
        entropy: "pooled" as released: one marginal, averaged over tokens and groups. Groups that
            each collapse to one code, but to different ones, still score well there. "per_group":
            the mean of the entropies of each group's own marginal, which has no such hole.
        **kwargs: those of `LFQ`.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize = 2**8,
        num_codebooks: Count = 4,
        entropy: Literal["pooled", "per_group"] = "pooled",
        **options: Annotated[Any, OptionsOf(LFQ)],
    ) -> None:
        super().__init__(dim, codebook_size, num_codebooks, entropy, **options)  # type: ignore

    def _entropies(self, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and batch entropy, in nats per group."""
        logits = self._logits(points)
        mean = mean_code_probabilities(logits.unflatten(-1, (-1, self.bits)), weights)
        mean = all_reduce_mean_with_grad(mean)
        if self.entropy == "pooled":
            mean = mean.mean(0, keepdim=True)
        sample = weights @ bit_entropy(logits).sum(-1) / self.num_indices
        return sample, code_entropy(mean, self.entropy_eps).mean()


def bit_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of bits with p = sigmoid(logits), elementwise."""
    # In terms of |a| nothing cancels; softplus(a) - a sigmoid(a) loses all digits at |a| = 400,
    # which a temperature of 0.01 reaches.
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def code_entropy(probabilities: Tensor, eps: float) -> Tensor:
    """-sum p log(p + eps) over the last dimension, in nats."""
    floor = torch.finfo(probabilities.dtype).tiny  # for eps = 0 and a probability of 0
    return -(probabilities * (probabilities + max(eps, floor)).log()).sum(-1)


def mean_code_probabilities(logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over tokens of the probabilities of all codes of each group of bits.

    Args:
        logits: `(N, G, w)` of independent bits; p(bit is 1) = sigmoid(logit).
        weights: `(N,)`, without gradient.

    Returns:
        `(G, 2^w)`, code c having bit j of the binary number c, the first bit least significant.
        Time O(N G 2^w) in matrix products, memory O(G 2^w) plus a constant, backward included.
    """
    return _MeanCodeProbabilities.apply(logits, weights)  # type: ignore[return-value]


class _MeanCodeProbabilities(torch.autograd.Function):
    """With A, B the code probabilities `(G, 2^(w/2), n)` of the lower and upper bits: sum B A^T.

    Backward: for a gradient C `(G, upper, lower)`, u = A * (C^T B) holds what every lower code
    of every token contributes to the loss. With S1 and S0 its sums over the codes where bit j is
    1 and 0, the gradient of logit j is S1 sigmoid(-a_j) - S0 sigmoid(a_j). Likewise above. The
    tables are computed again, block by block of tokens, instead of being kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(logits, weights)
        _, groups, width = logits.shape
        low = width // 2
        mean = logits.new_zeros(groups, 2 ** (width - low), 2**low)
        for rows, w in _blocks(logits, weights):
            lower, upper = _code_table(rows[:, :low], w), _code_table(rows[:, low:])
            mean.baddbmm_(upper, lower.mT)
        return mean.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, weights = ctx.saved_tensors
        _, groups, width = logits.shape
        low = width // 2
        slope = grads[0].reshape(groups, 2 ** (width - low), 2**low)
        out = []
        for rows, w in _blocks(logits, weights):
            lower, upper = _code_table(rows[:, :low], w), _code_table(rows[:, low:])
            parts = [
                _logit_gradient(rows[:, :low], torch.bmm(slope.mT, upper).mul_(lower)),
                _logit_gradient(rows[:, low:], torch.bmm(slope, lower).mul_(upper)),
            ]
            out.append(torch.cat(parts, 1))
        return torch.cat(out, -1).permute(2, 0, 1), None


def _blocks(logits: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views `(G, w, n)` and `(n,)` of blocks of tokens, n contiguous in every table."""
    _, groups, width = logits.shape
    size = max(1, BLOCK // (groups * 2 ** (width - width // 2)))
    rows = logits.permute(1, 2, 0).contiguous()
    return list(zip(rows.split(size, -1), weights.split(size), strict=True))


def _code_table(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Probabilities `(G, 2^w, n)` of all codes of independent bits `(G, w, n)`, times `weights`."""
    groups, width, tokens = logits.shape
    if width == 0:
        return logits.new_ones(groups, 1, tokens) * (1 if weights is None else weights)
    if width == 1:
        table = torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], 1)
        table = table if weights is None else table * weights
    else:  # the outer product of two halves: one pass over the table
        low = width // 2
        lower, upper = _code_table(logits[:, :low], weights), _code_table(logits[:, low:])
        table = (upper[:, :, None] * lower[:, None]).flatten(1, 2)
    # At low temperatures most products underflow, and processors are many times slower on
    # denormal numbers; below 1e-18 a code is as good as impossible.
    return torch.threshold_(table, 1e-18, 0.0)


def _logit_gradient(logits: Tensor, contributions: Tensor) -> Tensor:
    """Gradient `(G, w, n)` of the logits from `contributions` `(G, 2^w, n)` of the codes."""
    width = logits.shape[1]
    codes = torch.arange(2**width, device=logits.device)
    is_one = (codes >> torch.arange(width, device=logits.device)[:, None] & 1).to(logits.dtype)
    sums = torch.matmul(torch.cat([is_one, 1 - is_one]), contributions)
    return sums[:, :width] * torch.sigmoid(-logits) - sums[:, width:] * torch.sigmoid(logits)
