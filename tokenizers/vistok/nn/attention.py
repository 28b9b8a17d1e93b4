"""Scaled dot-product attention by PyTorch's kernels.

Ours are the plain products, which train faster than the fused kernel in bf16 on a CPU, and the
blocks of a constant mask, which FlexAttention would have us make anew in every forward.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vistok.core.torch_internals import version_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = "Tensor | BlockMask"

#: How attention under a mask is computed. "dense" computes all pairs and hides some; "flex" takes
#: FlexAttention, which passes over blocks of 128 x 128 pairs that are all hidden. The numbers are
#: the same up to rounding. Where torch has no FlexAttention with a gradient, on CPUs, training is
#: dense in any case.
AttentionKind = Literal["dense", "flex"]

#: What `in_blocks` made of masks that hold for all samples, with the state that they were in. Kept
#: here, since a module would have to copy, move and pickle it; an entry goes with its mask.
_BLOCKS = WeakTensorKeyDictionary()


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention over `(B, heads, L, d)`; `mask` True = visible.

    With `causal`, in place of a mask, each place sees itself and those before it.

    PyTorch's fused kernel, except in training on a CPU whose products take bf16, where its
    backward pass takes up to three times as long as the plain products (measured at 385 tokens,
    torch 2.15). With a mask in blocks, FlexAttention.
    """
    if mask is not None and not isinstance(mask, Tensor):
        fused = q.device.type != "cpu" and not torch.compiler.is_compiling()
        return _flex_attention(fused)(q, k, v, block_mask=mask)
    if q.device.type == "cpu" and torch.is_grad_enabled() and _multiplies_bf16(q.dtype):
        if causal:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return _attend_plainly(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _multiplies_bf16(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 or (
        dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    )


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    shape = q.shape
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    nothing = q.new_zeros(1, 1, 1)
    # The product scales its result in passing.
    scores = torch.baddbmm(nothing, q, k.mT, beta=0, alpha=shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.unflatten(0, shape[:2]).masked_fill(~mask, float("-inf")).flatten(0, 1)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).view(shape)


def mask_for(attention: str, mask: Tensor, x: Tensor) -> Mask:
    """Return the mask in the form in which the layers of a transformer are to have it.

    Args:
        attention: an `AttentionKind`.
        mask: bool, broadcasts to `(B, 1, L, L)`, True = visible; the same for all heads.
        x: `(B, L, W)`, what the layers get.
    """
    if attention == "flex" and not (x.device.type == "cpu" and torch.is_grad_enabled()):
        return in_blocks(mask, x.shape[1])
    return mask


def in_blocks(mask: Tensor, length: int) -> BlockMask:
    """A dense mask for FlexAttention, which passes over blocks of pairs that are all hidden.

    For a mask without samples, such as a causal one, this is done once and kept as long as the
    mask lives and stays as it is.

    Args:
        mask: bool, broadcasts to `(B, 1, L, L)`, True = visible; the same for all heads.
        length: L.
    """
    if mask.ndim > 2 or torch.compiler.is_compiling():
        return _new_blocks(mask, length)
    state = (None if mask.is_inference() else version_of(mask), length)
    known = _BLOCKS.get(mask)
    if known is None or known[0] != state:
        with torch.inference_mode(False):  # a later training step may need them
            # Of a copy: blocks that refer to the mask itself would keep it alive.
            known = (state, _new_blocks(mask.clone(), length))
        _BLOCKS[mask] = known
    return known[1]


def _new_blocks(mask: Tensor, length: int) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    each = mask.ndim == 4 and mask.shape[0] > 1  # a mask of its own for each sample
    table = mask.expand(mask.shape[0] if each else 1, 1, length, length)[:, 0]

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return table[b if each else 0, row, column]

    batch = len(table) if each else None
    return create_block_mask(visible, batch, None, length, length, device=mask.device)


@cache
def _flex_attention(fused: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if fused else flex_attention
