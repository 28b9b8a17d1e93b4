"""Arguments that users give: numbers of Python's, NumPy's or torch's, one or several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ConfigError


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor | None:
    """A number, or a list, an array or a tensor of numbers; None for anything else."""
    if hasattr(value, "__array_interface__"):  # NumPy's; torch takes none flipped or read-only
        value = value.copy()
    try:
        return torch.as_tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        return None


def as_numbers(value: Any) -> Tensor | None:
    """One number or several as float64; None for NaN, truth values and anything else."""
    found, numbers = as_tensor(value), as_tensor(value, torch.float64)
    if found is not None and (found.is_complex() or found.dtype == torch.bool):
        return None
    return None if numbers is None or numbers.isnan().any() else numbers


def as_plain(value: Any) -> Any:
    """A number of NumPy's or torch's as Python's, several as a tensor; anything else as it is."""
    if isinstance(value, (int, float)):
        return value
    found = as_tensor(value)
    return value if found is None else found if found.ndim else found.item()


def is_whole(numbers: Tensor) -> bool:
    """Return whether they are integers."""
    return not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)


def in_words(value: Any) -> str:
    """Return what was given where numbers are expected, on one line."""
    if isinstance(value, (str, int, float)) or (isinstance(value, (list, tuple)) and not value):
        return repr(value)
    found = as_tensor(value)
    return type(value).__name__ if found is None else f"{tuple(found.shape)} {found.dtype}"


def as_budgets(budgets: Any, most: int) -> list[int]:
    """`budgets=` as a list, in the order given.

    Args:
        budgets: an integer, or any iterable of them.
        most: the largest that is allowed.

    Raises:
        ConfigError: if it holds none, or anything but integers of 1 to `most`.
    """
    found = as_tensor(budgets)
    if found is None and isinstance(budgets, Iterable):
        found = as_tensor(list(budgets))
    if found is None or found.ndim > 1 or not found.numel() or not is_whole(found):
        raise ConfigError(f"budgets: expected one or more integers, found {in_words(budgets)}")
    lengths = found.reshape(-1).tolist()
    if not 1 <= min(lengths) <= max(lengths) <= most:
        raise ConfigError(f"budgets={sorted(lengths)}: must lie in 1 to {most}")
    return lengths


def as_lengths(num_tokens: Any, ids: Tensor) -> Tensor:
    """Return `num_tokens=` as int64 on the device of `ids`, one number or `(B,)` of them.

    Args:
        num_tokens: as it was given.
        ids: `(B, n, Q)`, which it is for.

    Raises:
        ConfigError: if it is neither an integer nor one for each of `ids`.
    """
    lengths = as_tensor(num_tokens)
    if lengths is None or not is_whole(lengths) or lengths.shape not in ((), (len(ids),)):
        raise ConfigError(
            f"num_tokens: expected an integer or ({len(ids)},) of them, found "
            f"{in_words(num_tokens)}"
        )
    return lengths.to(ids.device, torch.long)
