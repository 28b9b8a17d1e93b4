"""Common ground of lookup-free and scalar quantizers: digits of an index, weights, estimator."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.ranks import all_reduce_sum, world_size

MAX_CODES = 2**18

"""Largest vocabulary of one index slot; larger ones are split over several (`num_codebooks`)."""


def pack_digits(digits: Tensor, radices: Tensor) -> Tensor:
    """Combine digits into one index, the first digit least significant.

    All arithmetic is int64: packed in the activation's type, 18 bits are 99 % wrong in bfloat16
    and 36 bits wrong in float32.

    Args:
        digits: `(..., d)` integers or bools, digit j in [0, radices[j]).
        radices: `(d,)` int64 whose product is at most 2^63 (see `check_slot`).

    Returns:
        `(...)` int64.
    """
    return (digits.long() * place_values(radices)).sum(-1)


def unpack_digits(indices: Tensor, radices: Tensor) -> Tensor:
    """Inverse of `pack_digits`: `(...)` int64 to `(..., d)` int64."""
    return indices[..., None] // place_values(radices) % radices


def place_values(radices: Tensor) -> Tensor:
    """Return what a digit of each place counts, `(d,)` int64."""
    # 1, r0, r0*r1, ...: the last radix never multiplies, so a product of 2^63 still fits.
    return torch.cat([torch.ones_like(radices[:1]), radices[:-1]]).cumprod(0)


def binary_radices(num_bits: int, device: torch.device) -> Tensor:
    """Radices `(num_bits,)` of a binary number."""
    return torch.full((num_bits,), 2, dtype=torch.long, device=device)


def check_slot(key: str, value: object, num_codes: int) -> None:
    """Refuse a vocabulary that one index slot cannot or should not hold.

    Raises:
        ArgumentError: naming `<key>=<value>`.
    """
    if num_codes > MAX_CODES:
        raise ArgumentError(
            f"{key}={value}: {num_codes} codes in one index slot, at most {MAX_CODES}; "
            "split the token over several slots with num_codebooks"
        )


def bits_of(codebook_size: int) -> int:
    """log2 of a codebook size that must be a power of two."""
    size = int(codebook_size)
    if size != codebook_size or size < 2 or size & (size - 1):
        below = 1 << max(1, size.bit_length() - 1)
        raise ArgumentError(
            f"codebook_size={codebook_size}: binary codes need a power of two, "
            f"for example {below} or {2 * below}"
        )
    check_slot("codebook_size", codebook_size, size)
    return size.bit_length() - 1


def straight_through(source: Tensor, value: Tensor) -> Tensor:
    """`value` forward, bit for bit, with the gradient of `source`."""
    # Not source + (value - source): that differs from `value` in the last bits.
    return value.detach() + (source - source.detach())


def token_weights(codes: Tensor, mask: Tensor | None) -> Tensor:
    """Weights whose sum with a per-token quantity is its mean over the tokens of all ranks.

    Args:
        codes: `(B, N, d)`, for size, type and device.
        mask: `(B, N)` bool, True for tokens that count, or None for all.

    Returns:
        `(B * N,)`. Without a mask 1 / (B N), ranks being taken to hold equally many tokens. With
        one, the denominator is the global count: DDP averages gradients over ranks, so a rank
        with fewer valid tokens must weigh less. A batch without valid tokens has weights 0.
    """
    tokens = codes.shape[0] * codes.shape[1]
    if mask is None:
        return codes.new_full((tokens,), 1 / max(tokens, 1))
    valid = mask.reshape(-1).to(codes.dtype)
    return valid * (world_size() / all_reduce_sum(valid.sum()).clamp(min=1))
