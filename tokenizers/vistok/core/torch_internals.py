"""Every private name of torch that vistok uses, as small functions, in one place.

torch may rename any of them in a new version: pyproject.toml bounds the versions, and
tests/test_internals.py fails when a name is gone or does something else. (Private names of the
DataLoader are in `data/loader_internals.py`, those of Lightning in
`training/lightning_internals.py`.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", bound=nn.Module)


def cpu_has_bf16_units() -> bool:
    """Return whether the processor multiplies in bfloat16 (AVX-512 or AMX).

    Elsewhere torch emulates bfloat16, at a loss. No public function tells the two apart.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def softmax_backward_(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """Overwrite a gradient with respect to probabilities by the one with respect to the logits.

    p·(dp − Σ p·dp) in one pass over memory; written out with public operations it takes three,
    and a further matrix.

    Args:
        gradient: `(M, K)`, overwritten and returned.
        probabilities: `(M, K)`, a softmax over the last dimension.
    """
    return torch.ops.aten._softmax_backward_data.out(
        gradient, probabilities, 1, probabilities.dtype, grad_input=gradient
    )


def resize_bicubic_into(pixels: Tensor, out: Tensor) -> None:
    """Resize `pixels` to the size of `out`, bicubic and antialiased, and write there.

    `F.interpolate` computes the same, but cannot be told where to put it.

    Args:
        pixels: `(B, C, H, W)` uint8.
        out: `(B, C, h, w)` uint8.
    """
    size = out.shape[2:]
    torch.ops.aten._upsample_bicubic2d_aa.out(pixels, size, False, None, None, out=out)


def version_of(tensor: Tensor) -> int:
    """Return a number that grows with every change of a tensor in place.

    Autograd counts it; nothing public tells whether what was computed from a tensor still holds.
    """
    return tensor._version


def with_children(module: T, children: Mapping[str, nn.Module]) -> T:
    """Return a module that shares parameters, buffers and children, but for the children given.

    `copy.copy` alone would share the table of the children, too.
    """
    other = copy.copy(module)
    other._modules = {**module._modules, **children}
    return other


def shared_bytes(count: int) -> Tensor:
    """Return `(count,)` uint8 that other processes see, too, all zero.

    A tensor's public `share_memory_` copies it to such memory, which takes it twice at first.
    """
    shared = torch.UntypedStorage._new_shared(count)
    return torch.empty(0, dtype=torch.uint8).set_(shared)  # pyright: ignore[reportArgumentType]
