"""Softmax over all codes, with its gradient, without an N×K matrix.

The functions here compute logits a block of tokens at a time, forget them, and compute them
again in the backward pass, as flash attention does. Memory is O(N·d + K·d) and two blocks.
Second derivatives are not defined.

Functions that return the codebook hand it on to whoever uses it next: the gradient of that next
use comes back through them and is added to in place. However many use it, a large codebook has
one gradient and not one for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vistok.core.ranks import all_reduce_mean_with_grad, all_reduce_sum, world_size
from vistok.core.torch_internals import softmax_backward_
from vistok.quantizers.base import token_mean
from vistok.quantizers.search import code_bias

_CPU_SCORES = 1 << 22  # logits per block; two blocks are alive: 16 MiB of float32 each

_GPU_SCORES = 1 << 25

_NOISE = 1 << 18  # logits that get their noise at a time

_MIN_ROWS = 32  # smaller blocks would read the codebook more often than they compute

_MAPPED_ROWS = 8192  # codes whose gradient is computed at a time


def mapped_codes(codebook: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """`rule(codebook)` `(K, d)`, a rule for single rows; its gradient is computed in place."""
    if torch.compiler.is_compiling():
        return rule(codebook)
    return _MappedCodes.apply(codebook, rule)  # type: ignore[return-value]


def picked_codes(codebook: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `(N, d)` of `ids` `(N,)`, and the codebook `(K, d)`, handed on."""
    if torch.compiler.is_compiling():
        return F.embedding(ids, codebook), codebook
    return _PickedCodes.apply(codebook, ids)  # type: ignore[return-value]


def soft_straight_through(
    z: Tensor,
    q: Tensor,
    codebook: Tensor,
    euclidean: bool = False,
    scale: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hard codes that carry the gradient of soft ones as well: q + A − sg A, A = Σ_k p_k sg(E_k).

    p = softmax(score·scale + noise) with the score z·E or z·E − |E|²/2. This is the
    straight-through one-hot of IBQ and of Gumbel-softmax. The forward pass costs nothing, the
    backward pass four matrix products.

    Args:
        z: `(N, d)` float32, latents.
        q: `(N, d)` float32, their codes; the gradient of the result is theirs.
        codebook: `(K, d)` float32; its gradient is that of p alone.
        euclidean: the score is z·E − |E|²/2, by which the nearest code is the best.
        scale: one over the temperature.
        noise: `(N,)` int32, what each token's Gumbel noise is made from; None for no noise.

    Returns:
        `(N, d)`, in value q, and the codebook, handed on.
    """
    if z.is_cuda and not euclidean and noise is None:  # fused attention does the same there
        soft = F.scaled_dot_product_attention(
            z[None, None], codebook[None, None], codebook.detach()[None, None], scale=scale
        )[0, 0]
        return q + (soft - soft.detach()), codebook
    quantized, handed_on = _SoftStraightThrough.apply(z, q, codebook, euclidean, scale, noise)  # type: ignore
    # A compiled graph does not know that the second output is nothing but the codebook.
    return quantized, codebook if torch.compiler.is_compiling() else handed_on


@torch.no_grad()
def gumbel_codes(
    z: Tensor, codebook: Tensor, euclidean: bool, scale: float, noise: Tensor
) -> Tensor:
    """Indices `(N,)` sampled with the probabilities and the noise of `soft_straight_through`."""
    ids = torch.empty(z.shape[0], dtype=torch.long, device=z.device)
    for block, logits, _ in _logit_blocks(z, codebook, euclidean, scale, noise):
        ids[block] = logits.argmax(dim=1)
    return ids


def entropy_penalty(
    z: Tensor, codebook: Tensor, euclidean: bool, scale: float, mask: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """H(code | token) − H(code) of soft assignments: low if they are confident and spread evenly.

    H(code) is the entropy of the assignment averaged over the tokens of all ranks. The average
    is reduced, not the entropy, which is not linear in it.

    Papers: MAGVIT-v2, Yu et al. 2023, https://arxiv.org/abs/2310.05737; MaskGIT's VQGAN.

    Args:
        z: `(N, d)` float32.
        codebook: `(K, d)` float32.
        euclidean: the score is z·E − |E|²/2, not z·E.
        scale: factor on the score, one over the temperature.
        mask: `(N,)` bool or None; a token marked False does not count.

    Returns:
        The penalty in nats, at least −log K, and its two detached terms for the log.
    """
    weight = z.new_ones(z.shape[0]) if mask is None else mask.to(z.dtype)
    per_token, summed = assignment_entropy(z, codebook, euclidean, scale, weight)
    count = all_reduce_sum(weight.sum()) / world_size()
    mean = all_reduce_mean_with_grad(summed / count.clamp(min=1e-6))
    sample = token_mean(per_token, mask)
    batch = -(mean * mean.clamp(min=1e-20).log()).sum()
    metrics = {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}
    return sample - batch, metrics


def assignment_entropy(
    z: Tensor, codebook: Tensor, euclidean: bool, scale: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Entropy of each token's soft assignment and the summed assignment of all tokens.

    p = softmax(score·scale), the score as in `soft_straight_through`.

    Args:
        z: `(N, d)` float32.
        codebook: `(K, d)` float32.
        euclidean: the score is z·E − |E|²/2, not z·E.
        scale: one over the temperature.
        weight: `(N,)` float32, the share of each token in the sum; 0 for masked ones.

    Returns:
        H(p) of each token, `(N,)` in nats, and Σ_n weight_n·p_n, `(K,)`.
    """
    return _AssignmentEntropy.apply(z, codebook, euclidean, scale, weight)  # type: ignore


def _logit_blocks(
    z: Tensor, codebook: Tensor, euclidean: bool, scale: float, noise: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of tokens: their slice, their logits `(R, K)` and scratch memory of the same shape.

    Both tensors are free to be overwritten and are used again for the next block: fresh memory
    would be mapped and zeroed by the kernel each time, at several times the cost of the product.
    With `noise` `(N,)` int32 the logits have standard Gumbel noise, the same for the same numbers.
    """
    num_tokens, num_codes = z.shape[0], codebook.shape[0]
    block_scores = _CPU_SCORES if z.device.type == "cpu" else _GPU_SCORES
    rows = max(1, min(max(_MIN_ROWS, block_scores // num_codes), num_tokens))
    buffers = z.new_empty(2, rows, num_codes)
    bias = code_bias(codebook) if euclidean else z.new_zeros(1)
    words = torch.arange(num_codes if noise is not None else 0, dtype=torch.int32, device=z.device)
    words = _scrambled(words)  # of the codes
    for start in range(0, num_tokens, rows):
        block = slice(start, min(start + rows, num_tokens))
        logits, scratch = buffers[:, : block.stop - block.start].unbind()
        beta = scale if euclidean else 0.0
        torch.addmm(bias, z[block], codebook.t(), beta=beta, alpha=scale, out=logits)
        if noise is not None:
            _add_gumbel(logits, scratch, noise[block, None], words)
        # exp(−60) is nothing next to a sum of at least 1, but below exp(−87) floats are denormal,
        # and arithmetic on those is many times slower.
        logits.clamp_(min=logits.amax(dim=1, keepdim=True) - 60)
        yield block, logits, scratch


def _add_gumbel(logits: Tensor, scratch: Tensor, tokens: Tensor, codes: Tensor) -> None:
    """Add −log(−log u) to `(R, K)` logits, u from the words `(R, 1)` and `(K,)`, int32."""
    # A few rows at a time stay in the cache, and so do the copies that mixing makes.
    rows = len(logits) if torch.compiler.is_compiling() else max(1, _NOISE // len(codes))
    pieces = zip(logits.split(rows), scratch.split(rows), tokens.split(rows), strict=True)
    for logits, scratch, tokens in pieces:
        words = torch.bitwise_xor(tokens, codes, out=scratch.view(torch.int32))
        logits.sub_(_to_unit(_scrambled(words), scratch).log_().neg_().log_())


def _scrambled(words: Tensor) -> Tensor:
    """Mix the bits of int32 numbers, in place: "lowbias32" of C. Wellons' hash-prospector.

    Noise by position needs no generator, so that it can be computed again in the backward pass,
    compiled, and is the same whatever the batch.
    """
    for bits, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        words.bitwise_xor_((words >> bits).bitwise_and_((1 << (32 - bits)) - 1)).mul_(factor)
    return words


def _to_unit(words: Tensor, out: Tensor) -> Tensor:
    """The upper 23 bits of int32 numbers as float32 in (0, 1); `out` may be their own memory.

    With 24 bits the half that keeps away from 0 would round up to 1.
    """
    words.bitwise_right_shift_(9).bitwise_and_(2**23 - 1)
    return out.copy_(words).add_(0.5).mul_(2**-23)


class _SoftmaxBackward:
    """Sums the gradients of latents and codes over blocks, given p and dL/dp of each block.

    Those of the codes are added to `d_codebook`, if there is such a tensor already.
    """

    def __init__(
        self,
        z: Tensor,
        codebook: Tensor,
        rule: tuple[bool, float],
        needs: tuple[bool, bool],
        d_codebook: Tensor | None = None,
    ) -> None:
        euclidean, self.scale = rule
        self.z, self.codebook = z, codebook
        self.d_z = torch.empty_like(z) if needs[0] else None
        self.d_codebook = d_codebook
        if d_codebook is None and needs[1]:
            self.d_codebook = torch.zeros_like(codebook)
        self.d_bias = z.new_zeros(len(codebook)) if euclidean and needs[1] else None

    def add(self, block: slice, p: Tensor, dp: Tensor) -> None:
        """Overwrites `dp`."""
        dlogits = softmax_backward_(dp, p)
        if self.d_z is not None:
            out = self.d_z[block]
            torch.addmm(out, dlogits, self.codebook, beta=0, alpha=self.scale, out=out)
        if self.d_codebook is not None:
            self.d_codebook.addmm_(dlogits.t(), self.z[block], alpha=self.scale)
        if self.d_bias is not None:
            self.d_bias += dlogits.sum(dim=0)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the squared lengths of latents and codes."""
        if self.d_codebook is not None and self.d_bias is not None:
            # The bias is −|E|²/2.
            self.d_codebook.addcmul_(self.codebook, self.d_bias[:, None], value=-self.scale)
        return self.d_z, self.d_codebook


class _MappedCodes(Function):
    @staticmethod
    def forward(ctx, codebook, rule):
        ctx.save_for_backward(codebook)
        ctx.rule = rule
        return rule(codebook)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        (codebook,) = ctx.saved_tensors
        pieces = zip(codebook.split(_MAPPED_ROWS), gradient.split(_MAPPED_ROWS), strict=True)
        for rows, slope in pieces:
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                slope.copy_(torch.autograd.grad(ctx.rule(rows), rows, slope)[0])
        return gradient, None


class _PickedCodes(Function):
    @staticmethod
    def forward(ctx, codebook, ids):
        ctx.save_for_backward(ids)
        ctx.set_materialize_grads(False)
        ctx.shape = codebook.shape
        return codebook[ids], codebook.view_as(codebook)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_rows, d_codebook = gradients
        (ids,) = ctx.saved_tensors
        if d_rows is not None:
            if d_codebook is None:
                d_codebook = d_rows.new_zeros(ctx.shape)
            d_codebook.index_add_(0, ids, d_rows)
        return d_codebook, None


class _SoftStraightThrough(Function):
    @staticmethod
    def forward(ctx, z, q, codebook, euclidean, scale, noise):
        ctx.save_for_backward(z, codebook, noise)
        ctx.euclidean, ctx.scale = euclidean, scale
        ctx.set_materialize_grads(False)
        return q.view_as(q), codebook.view_as(codebook)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, d_codebook = gradients
        if gradient is None:
            return None, None, d_codebook, None, None, None
        z, codebook, noise = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        rule = ctx.euclidean, ctx.scale
        total = _SoftmaxBackward(z, codebook, rule, needs, d_codebook)
        for block, logits, scratch in _logit_blocks(z, codebook, *rule, noise):
            p = torch.softmax(logits, dim=1, out=scratch)
            total.add(block, p, torch.mm(gradient[block], codebook.t(), out=logits))
        d_z, d_codebook = total.gradients()
        return d_z, gradient, d_codebook, None, None, None


class _AssignmentEntropy(Function):
    @staticmethod
    def forward(ctx, z, codebook, euclidean, scale, weight):
        entropy = z.new_empty(z.shape[0])
        summed = z.new_zeros(codebook.shape[0])
        for block, logits, scratch in _logit_blocks(z, codebook, euclidean, scale, None):
            p = torch.softmax(logits, dim=1, out=scratch)
            # log Σ exp(l) = l_max − log p_max, and H = log Σ exp(l) − Σ p·l
            log_total = logits.amax(dim=1) - p.amax(dim=1).log()
            summed.addmv_(p.t(), weight[block])
            entropy[block] = log_total - logits.mul_(p).sum(dim=1)
        ctx.save_for_backward(z, codebook, weight)
        ctx.euclidean, ctx.scale = euclidean, scale
        return entropy, summed

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_entropy, d_summed = gradients
        z, codebook, weight = ctx.saved_tensors
        rule = ctx.euclidean, ctx.scale
        total = _SoftmaxBackward(z, codebook, rule, ctx.needs_input_grad[:2])
        for block, logits, scratch in _logit_blocks(z, codebook, *rule, None):
            p = torch.softmax(logits, dim=1, out=scratch)
            # dH/dp = −l up to a constant per token, which the softmax's backward removes.
            dp = logits.mul_(-d_entropy[block, None]).addcmul_(weight[block, None], d_summed)
            total.add(block, p, dp)
        return *total.gradients(), None, None, None
