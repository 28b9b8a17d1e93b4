"""Collectives that are identities on one process.

Whether we are distributed is asked at call time: modules are built before the process group
exists, and an answer cached then would leave the codebooks of each rank to themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first_process() -> bool:
    """Return whether this is rank 0, also before a process group exists (torchrun, SLURM)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return all(os.environ.get(name, "0") == "0" for name in _RANK_VARIABLES)


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over the ranks, in place and without a gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class _Sum(torch.autograd.Function):
    """The sum over the ranks: each rank's loss depends on the share of every rank."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce_sum(grads[0].clone(memory_format=torch.contiguous_format))


def all_reduce_mean_with_grad(tensor: Tensor) -> Tensor:
    """Return the mean of `tensor` over the ranks, with a gradient to each rank's share.

    Needed where a loss is nonlinear in an average over the global batch (batch entropy).
    """
    return tensor if world_size() == 1 else _Sum.apply(tensor) / world_size()


@torch.no_grad()
def all_gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate equally long `(M, ...)` tensors of all ranks to `(world_size * M, ...)`."""
    if world_size() == 1:
        return tensor
    out = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(out, tensor.contiguous())
    return out


@torch.no_grad()
def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Overwrite `tensor` with rank `source`'s values, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their means over the ranks, in one reduction.

    For parameters that neither DDP nor FSDP looks after; once per step, also when it accumulates.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not grads:
        return
    flat = torch.cat([grad.float().flatten() for grad in grads])
    dist.all_reduce(flat)
    means = flat.div_(world_size()).split([grad.numel() for grad in grads])
    for grad, mean in zip(grads, means, strict=True):
        grad.copy_(mean.view_as(grad))


_control: tuple[Any, Any] | None = None  # the default group, and the gloo group next to it


def control_group() -> Any:
    """Return a gloo group for flags and small objects, which never wait for the accelerator.

    Every rank must make the first call together.
    """
    global _control
    default = dist.group.WORLD
    if _control is None or _control[0] is not default:
        own = default if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        _control = default, own
    return _control[1]


def gather(value: Any) -> list[Any]:
    """Return an object of each rank, in their order; every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def max_of_all(value: int) -> int:
    """Return the largest of the ranks' numbers; every rank must call it."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=control_group())
    return int(tensor)
