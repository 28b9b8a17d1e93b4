"""Ways to send the decoder's gradient through the quantization step.

Every function takes latents `z` and their codes `q`, both `(..., d)` float32, and returns a
tensor with the value of `q` (DiVeQ: up to its noise) that hands gradients to `z` and, for some,
to `q`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vistok.core.sample_random import normal


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """Value of q, bit for bit, gradient of the identity to z (https://arxiv.org/abs/1308.3432)."""
    return _StraightThrough.apply(z, q)  # type: ignore[return-value]


def squared_errors(z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """|z − sg q|² and |sg z − q|² per dimension, of each row: what commitment and codebook pay.

    The two have one value and are computed once; the first hands gradients to `z` alone, the
    second to `q` alone.

    Args:
        z: `(N, d)` float32.
        q: `(N, d)` float32.

    Returns:
        Twice `(N,)`.
    """
    return _SquaredErrors.apply(z, q)  # type: ignore[return-value]


class _StraightThrough(Function):
    """No arithmetic, where z + (q − z).detach() passes over the memory twice."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor) -> Tensor:  # type: ignore[override]
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _SquaredErrors(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        difference = z - q
        ctx.save_for_backward(difference)
        errors = torch.linalg.vector_norm(difference, dim=1).square() / max(z.shape[1], 1)
        return errors, errors.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_z: Tensor, to_q: Tensor):  # type: ignore[override]
        (difference,) = ctx.saved_tensors
        slope = 2 / max(difference.shape[1], 1)
        d_z = difference * (slope * to_z)[:, None] if ctx.needs_input_grad[0] else None
        d_q = difference * (-slope * to_q)[:, None] if ctx.needs_input_grad[1] else None
        return d_z, d_q


def synchronous(z: Tensor, q: Tensor, strength: float = 1.0) -> Tensor:
    """Straight-through that also hands `strength` times the decoder's gradient to the code.

    Paper: Huh et al. 2023, https://arxiv.org/abs/2305.08842 (synchronised update).
    """
    return straight_through(z, q) + strength * (q - q.detach())


def rotation(z: Tensor, q: Tensor, eps: float = 1e-6) -> Tensor:
    """Rotation trick: turn and scale z onto q by a matrix that counts as a constant.

    With unit vectors u = z/|z|, v = q/|q| and w = (u+v)/|u+v|, the matrix is
    |q|/|z| · (I − 2wwᵀ + 2vuᵀ), and its product with z is q. Its transpose is applied to the
    gradient, elementwise, O(N·d). Where the rotation is undefined (z or q near 0, or q opposite
    to z) the token falls back to straight-through.

    Paper: Fifty et al. 2024, https://arxiv.org/abs/2410.06424
    """
    return _Rotation.apply(z, q, eps)  # type: ignore[return-value]


class _Rotation(Function):
    """Keeps z and q, which are kept anyway, and no matrix or unit vector."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(z, q)
        ctx.eps = eps
        return q.view_as(q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        z, q = ctx.saved_tensors
        z_norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        q_norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        defined = (z_norm > ctx.eps) & (q_norm > ctx.eps)
        z_norm, q_norm = z_norm.clamp(min=ctx.eps), q_norm.clamp(min=ctx.eps)
        cosine = (z * q).sum(-1, keepdim=True) / (z_norm * q_norm)
        defined &= cosine > ctx.eps - 1
        # |u + v|² = 2 + 2 u·v, and g − 2w(w·g) + 2u(v·g) is g and so much of u and of v:
        u_g = (z * gradient).sum(-1, keepdim=True) / z_norm
        v_g = (q * gradient).sum(-1, keepdim=True) / q_norm
        of_v = -(u_g + v_g) / (1 + cosine).clamp(min=ctx.eps)
        of_u = of_v + 2 * v_g
        scale = torch.where(defined, q_norm / z_norm, 1.0)
        turned = gradient * scale
        turned.addcmul_(z, torch.where(defined, of_u * scale / z_norm, 0.0))
        turned.addcmul_(q, torch.where(defined, of_v * scale / q_norm, 0.0))
        return turned, None, None


def diveq(z: Tensor, q: Tensor, noise_std: float = 1e-3) -> Tensor:
    """DiVeQ: z plus its distance to q along a fixed direction, which is differentiable in both.

    ẑ = z + |q−z|·sg(d/|d|) with d = q − z + noise_std·ξ, ξ ~ N(0, I). The distance carries
    gradients to z and to the code, so that no commitment or codebook loss is needed.

    Paper: Vali et al. 2025, https://arxiv.org/abs/2509.26469. The released code passes a
    variance of 1e-3 as a standard deviation and adds noise in eval as well; here `noise_std` is
    what its name says, and only training calls this.
    """
    difference = q - z
    direction = difference.detach()
    if noise_std > 0:
        direction = direction + noise_std * normal(direction.shape, direction.device)
    direction = F.normalize(direction, dim=-1, eps=1e-12)
    # sqrt has an infinite slope at 0; a token that already sits on its code gets no gradient.
    squared = difference.square().sum(-1, keepdim=True)
    distance = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
    return z + distance * direction
