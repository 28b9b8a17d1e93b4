"""How much of a codebook is in use, over a window of batches and all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vistok.distributed import all_reduce_sum


class CodeUsage(nn.Module):
    """Counts how often each code is chosen, until `reset`.

    Counts are int64: float32 totals stop growing at 2^24. They are not part of the saved state,
    and each rank counts its own tokens until `compute` adds them up.

    Args:
        codebook_sizes: number of codes of each index slot.
    """

    def __init__(self, codebook_sizes: Iterable[int]) -> None:
        super().__init__()
        self.codebook_sizes = tuple(codebook_sizes)
        offsets = [0]
        for size in self.codebook_sizes:
            offsets.append(offsets[-1] + size)
        self.offsets = tuple(offsets)
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(offsets[-1], dtype=torch.long), persistent=False)

    @torch.no_grad()
    def update(self, indices: Tensor, mask: Tensor | None = None) -> None:
        """Count `indices` `(B, N, Q)`; with `mask` `(B, N)`, only tokens marked True.

        An index of -1 is absent (dropped layers and scales) and is not counted.
        """
        flat = indices.reshape(-1, len(self.codebook_sizes))
        present = flat >= 0 if mask is None else (flat >= 0) & mask.reshape(-1, 1)
        for slot in range(len(self.codebook_sizes)):
            ids = flat[:, slot].clamp(min=0) + self.offsets[slot]
            self.counts.index_add_(0, ids, present[:, slot].long())

    def reset(self) -> None:
        """Start a new window."""
        self.counts.zero_()

    @torch.no_grad()
    def histograms(self) -> list[Tensor]:
        """Counts of each slot, `(K_q,)` int64, summed over ranks."""
        counts = all_reduce_sum(self.counts.clone())
        return [
            counts[start:stop]
            for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True)
        ]

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
