"""Draw ids from logits: temperature, top-k, top-p, guidance; random numbers belong to samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.core.sample_random import drawing, uniform
from vistok.core.signatures import check_values
from vistok.core.values import Index, NonNegative, Share


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest id.
        top_k: number of likeliest ids to draw from; 0 for all.
        top_p: share of the probability to draw from: the fewest likeliest ids that hold it.
        guidance: s of `uncond + s * (cond - uncond)` (Ho and Salimans 2022,
            https://arxiv.org/abs/2207.12598); 1 for none.
        seed: of the random numbers. Sample i of a seed is the same in any batch.
        steps: of priors that draw in several passes (MaskGIT).
        noise: how random the order is in which MaskGIT settles tokens, at its start.
    """

    temperature: NonNegative = 1.0
    top_k: Index = 0
    top_p: Share = 1.0
    guidance: NonNegative = 1.0
    seed: Index = 0
    steps: Index = 8
    noise: NonNegative = 4.5

    def __post_init__(self) -> None:
        check_values(Sampling, vars(self))


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Combine logits of `[cond; uncond]` `(2B, ...)` to `(B, ...)`; without guidance as they are.

    Args:
        logits: of B samples if `guidance` is 1.
        guidance: see `Sampling`.
    """
    if guidance == 1:
        return logits
    cond, uncond = logits.chunk(2)
    return uncond + guidance * (cond - uncond)


def filtered(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set the logits `(..., K)` of ids that are not drawn from to minus infinity.

    First top-k, where ids as likely as the k-th stay too, then top-p of what is left: an id goes
    if the likelier ones hold `top_p` already.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(dim=-1).cumsum(dim=-1)
        gone = mass - ordered.softmax(dim=-1) >= top_p
        gone[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(gone).scatter(-1, order, gone), float("-inf"))
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities `(..., K)` of which `draw` draws, in float64 where there is such."""
    logits = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1)
    return filtered(logits / sampling.temperature, sampling.top_k, sampling.top_p).softmax(dim=-1)


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """Draw an id for each row of logits, by inverting the distribution function.

    Args:
        logits: `(..., K)`.
        numbers: `(...)` in [0, 1), see `random_numbers`.
        sampling: temperature, top-k and top-p.

    Returns:
        `(...)` int64.
    """
    mass = probabilities(logits, sampling).cumsum(dim=-1)
    wanted = numbers.to(mass)[..., None] * mass[..., -1:]
    return torch.searchsorted(mass, wanted, right=True).squeeze(-1).clamp(max=mass.shape[-1] - 1)


def random_numbers(seed: int, first: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers `(B, ...)` in [0, 1) for the samples `first`, `first + 1`, ... of a seed."""
    positions = torch.arange(first, first + shape[0], device=device)
    with drawing(seed, positions, 0):
        return uniform(shape, device)


def gumbel(numbers: Tensor) -> Tensor:
    """Turn numbers in [0, 1) of 24 bits into those of a Gumbel distribution."""
    return -(-(numbers + 2**-25).log()).log()
