"""Common ground of quantizers that are made of other quantizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, cast

import torch
from torch import Tensor, nn

from vistok.core.errors import ConfigError
from vistok.core.sample_random import integers, uniform
from vistok.core.values import filled_list
from vistok.quantizers.base import Quantizer
from vistok.quantizers.vq import VectorQuantizer

Books = Annotated[Sequence[Quantizer], filled_list(Quantizer, "a list of quantizers")]


class Composite(Quantizer):
    """A quantizer made of others, its books, which work in its code space.

    The composite projects, counts usage and speaks to the outside; a book has no projection of
    its own. Losses and metrics are means over the books, so that their size does not depend on
    how many there are.

    Args:
        dim: width D of the latents.
        codebook_dim: width d of the code space; None for D.
        books: the quantizers inside, each owned once.
        codebook_sizes: number of codes of each index slot.
        loss_weights: the weight of every loss that `_quantize` can return.
    """

    def __init__(
        self,
        dim: int,
        codebook_dim: int | None,
        books: Sequence[Quantizer],
        codebook_sizes: Iterable[int],
        loss_weights: dict[str, float],
    ) -> None:
        super().__init__(dim, codebook_dim, codebook_sizes, loss_weights)
        for book in books:
            if book.dim != book.codebook_dim:
                raise ConfigError(
                    f"{type(self).__name__}: its {type(book).__name__} projects {book.dim} to "
                    f"{book.codebook_dim}; give it codebook_dim = dim, the outer one projects"
                )
        self.books = cast(Sequence[Quantizer], nn.ModuleList(books))

    @property
    def num_init_latents(self) -> int:
        """Return what the most demanding book wants."""
        return max(book.num_init_latents for book in self.books)

    @property
    def against_collapse(self) -> str:
        """Return what the first book advises; the books are alike."""
        return self.books[0].against_collapse

    def after_step(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Tensor]:
        """Step every book; the scalars are means over the books."""
        optimizers = list(optimizers)
        return mean_over([book.after_step(optimizers) for book in self.books])


def mean_over(scalars: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each named scalar over the dictionaries that have it."""
    names = dict.fromkeys(name for each in scalars for name in each)
    return {
        name: torch.stack([each[name].float() for each in scalars if name in each]).mean()
        for name in names
    }


def sample_depths(
    batch: int, depth: int, minimum: int, probability: float, device: torch.device
) -> Tensor:
    """Return how many of `depth` layers each sample keeps: quantizer dropout.

    With `probability` a sample keeps n layers, n uniform on [minimum, depth]; else it keeps all.
    Every sample draws for itself, also in a batch of one, and shapes do not depend on the draw.

    Returns:
        `(B,)` int64.
    """
    drawn = integers(minimum, depth + 1, (batch,), device)
    return torch.where(uniform((batch,), device) < probability, drawn, depth)


def keep_active(mask: Tensor | None, active: Tensor | None, num_tokens: int) -> Tensor | None:
    """Combine a token mask `(B, N)` with the samples `(B,)` that a layer is active for."""
    if active is None:
        return mask
    active = active[:, None].expand(-1, num_tokens)
    return active if mask is None else mask & active


@torch.no_grad()
def assign_codes(book: VectorQuantizer, rows: Tensor, keep: Tensor | None) -> Tensor:
    """The training search of a codebook alone: indices, and its statistics.

    Args:
        book: the codebook; it starts here if it has not yet.
        rows: `(B, M, d)` float32 in code space.
        keep: `(B, M)` bool or None; rows marked False enter no statistic.

    Returns:
        `(B, M, 1)` int64.
    """
    z, kept = book._metric(rows.flatten(0, 1)), None if keep is None else keep.flatten()
    if not book._is_ready():
        book._initialize_from_batch(z, kept)
    table = book._table()
    ids, _ = book._assign(z, table)
    book.stats.observe(z, ids, kept, table, book.cosine)
    return ids.view(*rows.shape[:-1], 1)
