"""Scaled dot-product attention: PyTorch's kernels, and the choice between them."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vistok.core.errors import ArgumentError, nearest
from vistok.core.torch_internals import version_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = "Tensor | BlockMask"

#: How attention under a mask is computed. "dense" computes all pairs and hides some; "flex" takes
#: FlexAttention, which passes over blocks of 128 x 128 pairs that are all hidden; "auto" takes the
#: faster of them on a GPU, see `flex_is_faster`. The numbers are the same up to rounding. Where
#: torch has no FlexAttention with a gradient, on CPUs, training is dense in any case.
ATTENTION = ("auto", "dense", "flex")

#: FlexAttention must take less than this part of the dense kernel's time to be chosen.
WORTHWHILE = 0.95

#: What `in_blocks` made of masks that hold for all samples, with the state that they were in. Kept
#: here, since a module would have to copy, move and pickle it; an entry goes with its mask.
_BLOCKS = WeakTensorKeyDictionary()

#: What `flex_is_faster` found, by device, dtype and shape.
_FASTER: dict[tuple[Any, ...], bool] = {}

log = logging.getLogger(__name__)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
    """Scaled dot-product attention over `(B, heads, L, d)`; `mask` True = visible.

    PyTorch's fused kernel, except in training on a CPU whose products take bf16, where its
    backward pass takes up to three times as long as the plain products (measured at 385 tokens,
    torch 2.15). With a mask in blocks, FlexAttention.
    """
    if mask is not None and not isinstance(mask, Tensor):
        fused = q.device.type != "cpu" and not torch.compiler.is_compiling()
        return _flex_attention(fused)(q, k, v, block_mask=mask)
    if q.device.type == "cpu" and torch.is_grad_enabled() and _multiplies_bf16(q.dtype):
        return _attend_plainly(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


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


def check_kind(attention: str) -> str:
    """`attention`, if it is one of `ATTENTION`.

    Raises:
        ConfigError: if it is none.
    """
    if attention not in ATTENTION:
        raise ArgumentError(
            f"attention={attention}: must be one of {', '.join(ATTENTION)}"
            f"{nearest(str(attention), ATTENTION)}"
        )
    return attention


def mask_for(attention: str, mask: Tensor, x: Tensor, num_heads: int) -> Mask:
    """The mask in the form in which the layers of a transformer are to have it.

    Args:
        attention: one of `ATTENTION`.
        mask: bool, broadcasts to `(B, 1, L, L)`, True = visible; the same for all heads.
        x: `(B, L, W)`, what the layers get.
        num_heads: of each layer.
    """
    length, on_cpu = x.shape[1], x.device.type == "cpu"
    if attention == "flex" and not (on_cpu and torch.is_grad_enabled()):
        return in_blocks(mask, length)
    # Masks of single samples would be cut into blocks in every forward; and a choice by the clock
    # is no function of the seed.
    constant, repeatable = mask.ndim == 2, torch.are_deterministic_algorithms_enabled()
    if attention == "auto" and has_flex(x.device) and constant and not repeatable:
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        shape = (x.shape[0], num_heads, length, x.shape[2] // num_heads)
        if flex_is_faster(mask, shape, dtype):
            return in_blocks(mask, length)
    return mask


def has_flex(device: torch.device) -> bool:
    """Whether torch compiles FlexAttention, with its gradient, for a device."""
    return device.type == "cuda"


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


@torch.compiler.assume_constant_result  # so it is measured under torch.compile, too
def flex_is_faster(mask: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> bool:
    """Whether FlexAttention is the faster kernel here, forward and backward; found by trying.

    The first call for a device, dtype and shape (whatever its batch) takes as long as compiling
    does, and logs what it found. FlexAttention that fails, or gives other numbers than the dense
    kernel, is not taken, with a warning.

    Args:
        mask: bool `(L, L)`, True = visible.
        shape: (B, heads, L, d) of queries, keys and values.
        dtype: theirs.
    """
    key = (mask.device, dtype, *shape[1:])
    if key not in _FASTER:
        _FASTER[key] = _measure(mask, shape, dtype)
    return _FASTER[key]


def _measure(mask: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> bool:
    device, length = mask.device, shape[2]
    what = f"attention of {length} tokens, {shape[1]} heads of {shape[3]}, {dtype}"
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        visible = mask.clone()  # one from inference mode can't be kept for a gradient
        # Random numbers of its own, so that the run's stay the same.
        source = torch.Generator(device).manual_seed(0)
        q, k, v, slope = torch.randn(4, *shape, generator=source, device=device).to(dtype)
        parts = [part.requires_grad_() for part in (q, k, v)]

        def run(kind: Callable[..., Tensor], **hidden: Any) -> list[Tensor]:
            value = kind(q, k, v, **hidden)
            return [value.detach(), *torch.autograd.grad(value, parts, slope)]

        def dense() -> list[Tensor]:
            return run(F.scaled_dot_product_attention, attn_mask=visible)

        try:
            blocks = in_blocks(mask, length)

            def flex() -> list[Tensor]:
                return run(_flex_attention(True), block_mask=blocks)

            pairs = zip(flex(), dense(), strict=True)
            wrong = max(_relative_error(ours, theirs) for ours, theirs in pairs)
            if not wrong < max(1e-3, 8 * torch.finfo(dtype).eps):
                warnings.warn(f"{what}: FlexAttention errs by {wrong:.0e}: not taken", stacklevel=2)
                return False
            spent = {"flex": _seconds(flex, device), "dense": _seconds(dense, device)}
        except Exception as error:  # of a compiler: of any kind
            first = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            warnings.warn(f"{what}: FlexAttention failed: not taken ({first})", stacklevel=2)
            return False
    log.info("%s: FlexAttention %.2f ms, dense %.2f ms", what, *(1e3 * s for s in spent.values()))
    return spent["flex"] < WORTHWHILE * spent["dense"]


def _relative_error(found: Tensor, right: Tensor) -> float:
    """Distance over length, of tensors of any shape."""
    found, right = found.float(), right.float()
    return float((found - right).norm() / right.norm())


def _seconds(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """The least time of a call, when it has been called before."""
    best = math.inf
    for _ in range(3 + repeats):  # the first ones warm up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best
