"""Gradients at the prediction and at the decoder's last layer, for weights that follow them.

All are float32: their norms decide a weight, and squares of bf16 gradients underflow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.core.ranks import all_reduce_sum, world_size

_LARGEST = 1e4  # of a ratio of norms
_EPSILON = 1e-4  # VQGAN's, next to gradients of a layer
_TINY = 1e-12  # next to those of a prediction, each of which is of the order of 1 / its size


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None


def leaf_of(value: Tensor) -> Tensor:
    """Return a prediction as the beginning of a graph of its own."""
    return value.detach().requires_grad_()


def carried(loss: Tensor, leaf: Tensor, value: Tensor, keep: bool = False) -> tuple[Tensor, Tensor]:
    """Move a loss from a leaf to the prediction that the leaf was made of.

    The graph between leaf and loss is walked once, here, however often the loss is differentiated.

    Args:
        loss: a scalar, of `leaf`.
        leaf: what `leaf_of(value)` returned.
        value: the prediction.
        keep: whether the graph of `loss` is needed again.

    Returns:
        The loss as a function of `value`, and its gradient there.
    """
    (gradient,) = torch.autograd.grad(
        loss, leaf, retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    return _Carried.apply(value, loss.detach(), gradient), gradient  # type: ignore[return-value]


def adaptive_scale(others: Tensor, own: Tensor, layer: Tensor) -> Tensor:
    """Return the ratio of the gradients' norms of two losses at a layer, as VQGAN's weight has it.

    |d others / d layer| / (|d own / d layer| + 1e-4), at most 1e4, a float32 scalar without a
    gradient. The gradients are means over the ranks, so that the ratio is that of one process with
    all images.

    Paper: Esser et al. 2021, https://arxiv.org/abs/2012.09841.

    Args:
        others: weighted sum of the other terms.
        own: the term, without its weight.
        layer: weight of the decoder's last layer.
    """
    gradients = [
        torch.autograd.grad(
            loss, layer, retain_graph=True, allow_unused=True, materialize_grads=True
        )[0]
        .float()
        .flatten()
        for loss in (others, own)
    ]
    if world_size() > 1:
        joint = all_reduce_sum(torch.cat(gradients)) / world_size()
        gradients = list(joint.split(layer.numel()))
    first, second = (gradient.norm() for gradient in gradients)
    return _ratio(first, second, _EPSILON)


def picture_scale(others: Tensor, own: Tensor) -> Tensor:
    """Return the ratio of the norms of two losses' gradients at a prediction.

    |d others / d prediction| / |d own / d prediction|, at most 1e4, a float32 scalar without a
    gradient. The norms are over the predictions of all ranks, so that the ratio is that of one
    process with all images.

    Args:
        others: gradient of the weighted sum of the other terms at the prediction.
        own: that of the term, without its weight.
    """
    squares = torch.stack([gradient.float().square().sum() for gradient in (others, own)])
    first, second = all_reduce_sum(squares).sqrt()
    return _ratio(first, second, _TINY)


def _ratio(first: Tensor, second: Tensor, epsilon: float) -> Tensor:
    return (first / (second + epsilon)).clamp(max=_LARGEST)
