"""Softmax over all codes, with its gradient, without an N×K matrix.

The functions here compute logits a block of tokens at a time, forget them, and compute them
again in the backward pass, as flash attention does. Memory is O(N·d + K·d) and a few blocks.
Second derivatives are not defined.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vistok.distributed import all_reduce_mean_with_grad, all_reduce_sum, world_size
from vistok.quantizers.base import token_mean

_CPU_SCORES = 1 << 22  # logits per block; two blocks are alive: 16 MiB of float32 each
_GPU_SCORES = 1 << 25
_MIN_ROWS = 32  # smaller blocks would read the codebook more often than they compute


def attention_gradient(
    z: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    seed: int | None = None,
) -> Tensor:
    """Zeros `(N, d)` that carry the gradient of the soft code A = Σ_k p_k sg(E_k).

    p = softmax((z·Eᵀ + bias)·scale + noise). Added to a hard code E_i it makes
    `E_i + A − sg A`, the straight-through one-hot of IBQ and of Gumbel-softmax, in value exactly
    E_i. The forward pass costs nothing, the backward pass four matrix products.

    Args:
        z: `(N, d)` float32.
        codebook: `(K, d)` float32; its gradient is that of the logits alone.
        bias: `(K,)` float32 or None.
        scale: one over the temperature.
        seed: of the Gumbel noise, see `gumbel_codes`; None for no noise.
    """
    if z.is_cuda and bias is None and seed is None:  # fused attention does the same there
        soft = F.scaled_dot_product_attention(
            z[None, None], codebook[None, None], codebook.detach()[None, None], scale=scale
        )[0, 0]
        return soft - soft.detach()
    queries, keys = _with_bias(z, codebook, bias, scale)
    return _AttentionGradient.apply(queries, keys, seed)[0][:, : z.shape[1]]


def attention_through(z: Tensor, codebook: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `attention_gradient`, and the codebook for `entropy_penalty` to take.

    The penalty's gradient then comes through here and is added to in place: a large codebook has
    one gradient and not two at a time.
    """
    if z.is_cuda:
        return attention_gradient(z, codebook, scale=scale), codebook
    return _AttentionGradient.apply(z * scale, codebook, None)  # type: ignore[return-value]


def gumbel_codes(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, seed: int
) -> Tensor:
    """Indices `(N,)` sampled with the probabilities and the noise of `attention_gradient`."""
    ids = torch.empty(z.shape[0], dtype=torch.long, device=z.device)
    with torch.no_grad():
        queries, keys = _with_bias(z, codebook, bias, scale)
        for block, logits, _ in _logit_blocks(queries, keys, seed):
            ids[block] = logits.argmax(dim=1)
    return ids


def entropy_penalty(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, mask: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """H(code | token) − H(code) of soft assignments: low if they are confident and spread evenly.

    H(code) is the entropy of the assignment averaged over the tokens of all ranks. The average
    is reduced, not the entropy, which is not linear in it.

    Papers: MAGVIT-v2, Yu et al. 2023, https://arxiv.org/abs/2310.05737; MaskGIT's VQGAN.

    Args:
        z: `(N, d)` float32.
        codebook: `(K, d)` float32.
        bias: `(K,)` float32 or None.
        scale: factor on `z·Eᵀ + bias`, one over the temperature.
        mask: `(N,)` bool or None; a token marked False does not count.

    Returns:
        The penalty in nats, at least −log K, and its two detached terms for the log.
    """
    weight = z.new_ones(z.shape[0]) if mask is None else mask.to(z.dtype)
    per_token, summed = assignment_entropy(z, codebook, bias, scale, weight)
    count = all_reduce_sum(weight.sum()) / world_size()
    mean = all_reduce_mean_with_grad(summed / count.clamp(min=1e-6))
    sample = token_mean(per_token, mask)
    batch = -(mean * mean.clamp(min=1e-20).log()).sum()
    metrics = {"sample_entropy": sample.detach(), "batch_entropy": batch.detach()}
    return sample - batch, metrics


def assignment_entropy(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Entropy of each token's soft assignment and the summed assignment of all tokens.

    p = softmax((z·Eᵀ + bias)·scale).

    Args:
        z: `(N, d)` float32.
        codebook: `(K, d)` float32.
        bias: `(K,)` float32 or None.
        scale: one over the temperature.
        weight: `(N,)` float32, the share of each token in the sum; 0 for masked ones.

    Returns:
        H(p) of each token, `(N,)` in nats, and Σ_n weight_n·p_n, `(K,)`.
    """
    return _AssignmentEntropy.apply(*_with_bias(z, codebook, bias, scale), weight)


def _with_bias(
    z: Tensor, codebook: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product is (z·Eᵀ + bias)·scale: the bias is one more dimension."""
    if bias is not None:
        z = torch.cat([z, z.new_ones(z.shape[0], 1)], dim=1)
        codebook = torch.cat([codebook, bias[:, None]], dim=1)
    return z * scale, codebook


def _logit_blocks(
    queries: Tensor, keys: Tensor, seed: int | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of tokens: their slice, their logits `(R, K)` and scratch memory of the same shape.

    Both tensors are free to be overwritten and are used again for the next block: fresh memory
    would be mapped and zeroed by the kernel each time, at several times the cost of the product.
    With a seed the logits have standard Gumbel noise, the same for the same seed.
    """
    num_tokens, num_codes = queries.shape[0], keys.shape[0]
    block_scores = _CPU_SCORES if queries.device.type == "cpu" else _GPU_SCORES
    rows = max(1, min(max(_MIN_ROWS, block_scores // num_codes), num_tokens))
    buffers = queries.new_empty(2, rows, num_codes)
    generator = None
    if seed is not None:
        generator = torch.Generator(queries.device).manual_seed(seed)
    for start in range(0, num_tokens, rows):
        block = slice(start, min(start + rows, num_tokens))
        logits, scratch = buffers[:, : block.stop - block.start].unbind()
        torch.mm(queries[block], keys.t(), out=logits)
        if generator is not None:
            logits.sub_(scratch.exponential_(generator=generator).log_())
        # exp(−60) is nothing beside a sum of at least 1, but below exp(−87) floats are denormal,
        # and arithmetic on those is many times slower.
        logits.clamp_(min=logits.amax(dim=1, keepdim=True) - 60)
        yield block, logits, scratch


class _SoftmaxBackward:
    """Sums the gradients of queries and keys over blocks, given p and dL/dp of each block.

    Those of the keys are added to `d_keys`, if there is such a tensor.
    """

    def __init__(
        self, ctx: Any, queries: Tensor, keys: Tensor, d_keys: Tensor | None = None
    ) -> None:
        needs_queries, needs_keys = ctx.needs_input_grad[:2]
        self.queries, self.keys = queries, keys
        self.d_queries = torch.empty_like(queries) if needs_queries else None
        self.d_keys = d_keys
        if d_keys is None and needs_keys:
            self.d_keys = torch.zeros_like(keys)

    def add(self, block: slice, p: Tensor, dp: Tensor) -> None:
        """Overwrites `dp`."""
        # p·(dp − Σ p·dp) in one pass
        dlogits = torch.ops.aten._softmax_backward_data.out(dp, p, 1, p.dtype, grad_input=dp)
        if self.d_queries is not None:
            torch.mm(dlogits, self.keys, out=self.d_queries[block])
        if self.d_keys is not None:
            self.d_keys.addmm_(dlogits.t(), self.queries[block])


class _AttentionGradient(Function):
    @staticmethod
    def forward(ctx, queries, keys, seed):
        ctx.save_for_backward(queries, keys)
        ctx.seed = seed
        ctx.set_materialize_grads(False)
        return torch.zeros_like(queries), keys.view_as(keys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, d_keys = grads
        if gradient is None:
            return None, d_keys, None
        queries, keys = ctx.saved_tensors
        total = _SoftmaxBackward(ctx, queries, keys, d_keys)
        for block, logits, scratch in _logit_blocks(queries, keys, ctx.seed):
            p = torch.softmax(logits, dim=1, out=scratch)
            total.add(block, p, torch.mm(gradient[block], keys.t(), out=logits))
        return total.d_queries, total.d_keys, None


class _AssignmentEntropy(Function):
    @staticmethod
    def forward(ctx, queries, keys, weight):
        entropy = queries.new_empty(queries.shape[0])
        summed = queries.new_zeros(keys.shape[0])
        for block, logits, scratch in _logit_blocks(queries, keys, None):
            p = torch.softmax(logits, dim=1, out=scratch)
            # log Σ exp(l) = l_max − log p_max, and H = log Σ exp(l) − Σ p·l
            log_total = logits.amax(dim=1) - p.amax(dim=1).log()
            summed.addmv_(p.t(), weight[block])
            entropy[block] = log_total - logits.mul_(p).sum(dim=1)
        ctx.save_for_backward(queries, keys, weight)
        return entropy, summed

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_entropy, d_summed = grads
        queries, keys, weight = ctx.saved_tensors
        total = _SoftmaxBackward(ctx, queries, keys)
        for block, logits, scratch in _logit_blocks(queries, keys, None):
            p = torch.softmax(logits, dim=1, out=scratch)
            # dH/dp = −l up to a constant per token, which the softmax's backward removes.
            dp = logits.mul_(-d_entropy[block, None]).addcmul_(weight[block, None], d_summed)
            total.add(block, p, dp)
        return total.d_queries, total.d_keys, None
