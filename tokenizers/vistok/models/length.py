"""The number of tokens that a training step keeps: the length policy of flexible tokenizers."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.sample_random import integers, shared_integer, uniform
from vistok.core.signatures import check_values
from vistok.core.values import Count, Share, choice

#: What FlexTok's released code calls the distributions.
_OFFICIAL = {"pow2": "powers_of_two", "uniform_pow2": "rounded_up"}

_DISTRIBUTION = choice("uniform", "powers_of_two", "rounded_up", "full", meant=_OFFICIAL)


@register("length")
class LengthPolicy(nn.Module):
    """Draws the number of tokens k that the decoder gets, 1 to N.

    Where the tail is cut, what stands in for it and when are the tokenizer's and its decoder's:
    published checkpoints differ in these, and they can't be exchanged. In training the numbers are
    a function of the run's seed and a position in the data stream (see `core/sample_random.py`):
    that of the sample, or with per="batch" that of the step's first sample. So ranks draw different
    lengths for their samples, all together what one process would draw, and a resumed run what the
    whole run would have drawn.

    Args:
        distribution: of k. "uniform": each of 1..N alike (One-D-Piece's tail token drop; nested
            dropout). "powers_of_two": each of 1, 2, 4, ..., N alike. "rounded_up": uniform,
            then up to the next power of two, so P(N) = 1/2, P(N/2) = 1/4 and so on, which keeps
            the tail from starving. If N is not a power of two it stands in for the next one.
            "full": always N, the tokenizer of one length that the others are compared with.
        per: "sample" draws one k for each image, "batch" one for all images of an optimizer step,
            on all ranks and in all batches that it accumulates: their shapes agree.
        whole: the decoder also predicts from all N tokens in every step; see `FlexibleTokenizer`.
    """

    def __init__(
        self,
        distribution: Annotated[str, _DISTRIBUTION] = "uniform",
        per: Literal["sample", "batch"] = "sample",
        whole: bool = False,
    ) -> None:
        super().__init__()
        check_values(LengthPolicy, locals())
        self.distribution = distribution
        self.per = per
        self.whole = whole

    def forward(
        self, batch: int, num_tokens: int, device: torch.device | str | None = None
    ) -> Tensor:
        """Lengths `(B,)` int64 in 1..N; all the same with per="batch"."""
        if self.distribution == "full":
            return torch.full((batch,), num_tokens, device=device)
        levels = power_levels(num_tokens).to(device)
        powers = self.distribution == "powers_of_two"
        low, high = (0, len(levels)) if powers else (1, num_tokens + 1)
        if self.per == "batch":
            kept = shared_integer(low, high, device)
        else:
            kept = integers(low, high, (batch,), device)
        if powers:
            kept = levels[kept]
        elif self.distribution == "rounded_up":
            kept = levels[torch.searchsorted(levels, kept)]
        return kept.expand(batch)

    def budgets(self, num_tokens: int) -> list[int]:
        """Return the lengths that a code may be cut to: all, also those between the ones drawn."""
        return [num_tokens] if self.distribution == "full" else list(range(1, num_tokens + 1))


@register("levels")
class LevelPolicy(nn.Module):
    """All N tokens most of the time, else the first levels of a hierarchy: ResTok's drop.

    Each image draws its own k: N with probability `full_probability`, and else one of the lengths
    `shortest`, 2 * `shortest`, 4 * `shortest`, ... below N, with a probability that grows as the
    length does. The tail then starves less than under a uniform length.

    Paper: ResTok, Zhang et al. 2026, https://arxiv.org/abs/2601.03955.

    Args:
        shortest: the shortest length, at most N; levels of a pyramid 1, 1, 2, 4, ... end at powers
            of two, and so must this.
        full_probability: of keeping all, 0 to 1.
        whole: as of `LengthPolicy`.
    """

    def __init__(
        self, shortest: Count = 4, full_probability: Share = 0.8, whole: bool = False
    ) -> None:
        super().__init__()
        check_values(LevelPolicy, locals())
        if shortest & (shortest - 1):
            raise ArgumentError(f"shortest={shortest}: must be a power of two, where a level ends")
        self.shortest = shortest
        self.full_probability = full_probability
        self.per = "sample"
        self.whole = whole

    def forward(
        self, batch: int, num_tokens: int, device: torch.device | str | None = None
    ) -> Tensor:
        """Lengths `(B,)` int64."""
        lengths = torch.tensor(self._levels(num_tokens), device=device)
        shares = lengths.cumsum(0) / lengths.sum()
        drawn = lengths[torch.searchsorted(shares, uniform((batch,), device))]
        full = uniform((batch,), device) < self.full_probability
        return torch.where(full, num_tokens, drawn)

    def budgets(self, num_tokens: int) -> list[int]:
        """Return the lengths that a code may be cut to: whole levels, those that training shows."""
        levels = self._levels(num_tokens)  # refuses a longer shortest
        shown = set(levels) if self.full_probability < 1 else set()
        if self.full_probability > 0 or self.whole:
            shown |= {num_tokens}
        return sorted(shown)

    def _levels(self, num_tokens: int) -> list[int]:
        if self.shortest > num_tokens:
            raise ArgumentError(
                f"length.shortest={self.shortest}: must be at most {num_tokens}, the whole code"
            )
        levels = [self.shortest * 2**i for i in range(num_tokens.bit_length())]
        return [level for level in levels if level < num_tokens] or [num_tokens]


def power_levels(num_tokens: int) -> Tensor:
    """`[1, 2, 4, ..., N]` int64; N is the last whether or not it is a power of two."""
    levels = [2**i for i in range(num_tokens.bit_length()) if 2**i < num_tokens]
    return torch.tensor([*levels, num_tokens])
