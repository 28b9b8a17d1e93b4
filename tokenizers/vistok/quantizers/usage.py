"""Measure how much of a codebook is in use, over a window of batches and all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vistok.core.ranks import all_reduce_sum


class CodeUsage(nn.Module):
    """Counts how often each code is chosen, until `reset`.

    Counts are int64: float32 totals stop growing at 2^24. They are not part of the saved state,
    and each rank counts its own tokens until `compute` adds them up. They are a plain tensor:
    DistributedDataParallel would overwrite a buffer with rank 0's before every forward.

    Args:
        codebook_sizes: number of codes of each index slot.
    """

    def __init__(self, codebook_sizes: Iterable[int]) -> None:
        super().__init__()
        self.codebook_sizes = tuple(codebook_sizes)
        # A bin for absent tokens in front of each slot's codes, so that counting is one call.
        self._bins = [size + 1 for size in self.codebook_sizes]
        self._first = torch.tensor([sum(self._bins[:slot]) + 1 for slot in range(len(self._bins))])
        self._one = torch.ones((), dtype=torch.long)
        self._tally = torch.zeros(sum(self._bins), dtype=torch.long)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodeUsage:
        super()._apply(fn, recurse)
        self._first, self._one, self._tally = fn(self._first), fn(self._one), fn(self._tally)
        return self

    @torch.no_grad()
    def update(self, indices: Tensor, mask: Tensor | None = None) -> None:
        """Count `indices` `(B, N, Q)`; with `mask` `(B, N)`, only tokens marked True.

        An index of -1 is absent (dropped layers and scales) and is not counted.
        """
        flat = indices.reshape(-1, len(self.codebook_sizes))
        bins = (flat if mask is None else flat.where(mask.reshape(-1, 1), -1)) + self._first
        self._tally.index_add_(0, bins.flatten(), self._one.expand(bins.numel()))

    def reset(self) -> None:
        """Start a new window."""
        self._tally.zero_()

    @property
    def counts(self) -> Tensor:
        """Counts of all slots, one after the other, `(sum of K_q,)` int64, of this rank."""
        return torch.cat([slot[1:] for slot in self._tally.split(self._bins)])

    def restore(self, counts: Tensor) -> None:
        """Go on from the `counts` of a window."""
        slots = self._tally.split(self._bins)
        for slot, saved in zip(slots, counts.split(self.codebook_sizes), strict=True):
            slot[1:] = saved

    @torch.no_grad()
    def histograms(self) -> list[Tensor]:
        """Counts of each slot, `(K_q,)` int64, summed over ranks."""
        return list(all_reduce_sum(self.counts).split(self.codebook_sizes))

    def compute(self) -> dict[str, Tensor]:
        """Usage statistics of the window, averaged over the index slots.

        Returns:
            `codebook_usage` (share of codes chosen at least once, 0 to 1), `perplexity`
            (exp of the entropy of the choices, 1 to K) and `dead_codes` (number never chosen,
            summed over the slots).
        """
        usages, perplexities, dead = [], [], []
        for histogram in self.histograms():
            used = histogram > 0
            p = histogram.double() / histogram.sum().clamp(min=1)
            usages.append(used.double().mean())
            perplexities.append(torch.exp(-torch.special.xlogy(p, p).sum()))
            dead.append((~used).sum())
        return {
            "codebook_usage": torch.stack(usages).mean().float(),
            "perplexity": torch.stack(perplexities).mean().float(),
            "dead_codes": torch.stack(dead).sum(),
        }


def collapse_advice(
    usage: CodeUsage,
    remedies: str,
    min_usage: float = 0.3,
    min_perplexity: float = 0.1,
    min_tokens: int = 4,
) -> str | None:
    """Return what to do about a codebook that collapses, in one line; None if all is well.

    A slot has collapsed if the window uses less than `min_usage` of its codes, or if its
    perplexity is below `min_perplexity`·K: all codes in use, but a few do the work. Usage in a
    short window says nothing, so slots that saw fewer than `min_tokens`·K tokens are judged by
    the codes that they could have used at most. Every rank must call this.

    Args:
        usage: a window of training or validation batches.
        remedies: the quantizer's `against_collapse`.
        min_usage: share of the codes, 0 to 1.
        min_perplexity: share of the codes, 0 to 1.
        min_tokens: tokens per code that make a window long.
    """
    worst: tuple[float, str] | None = None
    for slot, histogram in enumerate(usage.histograms()):
        tokens, size = int(histogram.sum()), histogram.numel()
        if tokens == 0:
            continue
        reachable = min(size, max(1, tokens // min_tokens))
        used = int((histogram > 0).sum())
        p = histogram.double() / tokens
        perplexity = float(torch.exp(-torch.special.xlogy(p, p).sum()))
        if used >= min_usage * reachable and perplexity >= min_perplexity * reachable:
            continue
        message = (
            f"codebook {slot} is collapsing: {tokens} tokens used {used} of {size} codes, "
            f"perplexity {perplexity:.1f}; try {remedies}"
        )
        health = min(used, perplexity) / reachable
        if worst is None or health < worst[0]:
            worst = health, message
    return None if worst is None else worst[1]
