"""One sequence, several quantizers: each codes its own stretch of the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ConfigError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.registry import register
from vistok.core.values import Sizes
from vistok.quantizers.base import Quantizer
from vistok.quantizers.composite import Books, mean_over


@register("segments")
class Segments(Quantizer):
    """The first L_1 tokens of a sequence by one quantizer, the next L_2 by another, and so on.

    Ids are those of one joint vocabulary: in each slot the codes of the second quantizer follow
    those of the first, and so on. An id thus says itself whose it is: `decode` needs no positions,
    and a language model needs one table, `codebooks`. Tables of unequal width are filled up with
    zeros, which changes no distance. Projections are the quantizers' own; losses and metrics are
    means over them.

    Args:
        books: the quantizers, of one width D, one number of slots and an id per token.
        lengths: tokens of each.
    """

    def __init__(self, books: Books, lengths: Sizes) -> None:
        first = books[0]
        for book in books:
            if not book.per_token:
                raise ConfigError(
                    f"quantizer: the ids of {type(book).__name__} stand for scales, which a "
                    "sequence of several parts does not have; use one with an id per token"
                )
            if (book.dim, book.num_indices) != (first.dim, first.num_indices):
                raise ConfigError(
                    f"quantizer: {type(book).__name__} has width {book.dim} and "
                    f"{book.num_indices} slots, {type(first).__name__} {first.dim} and "
                    f"{first.num_indices}; the parts of one sequence must agree"
                )
        slots = zip(*(book.codebook_sizes for book in books), strict=True)
        weights = {name: w for book in books for name, w in book.loss_weights.items()}
        super().__init__(first.dim, None, [sum(sizes) for sizes in slots], weights)
        self.books = cast(Sequence[Quantizer], nn.ModuleList(books))
        self.lengths = list(lengths)
        sizes = torch.tensor([book.codebook_sizes for book in books])
        self.sizes: Tensor  # (books, Q), and where each book's ids begin
        self.offsets: Tensor
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        parts = codes.split(self.lengths, dim=1)
        masks = [None] * len(parts) if mask is None else mask.split(self.lengths, dim=1)
        outputs, quantized = [], []
        for book, part, kept in zip(self.books, parts, masks, strict=True):
            output = book._quantize(book.project_in(part), kept, None)
            outputs.append(output)
            quantized.append(book.project_out(output.quantized))
        return QuantizerOutput(
            torch.cat(quantized, dim=1),
            self._join([output.indices for output in outputs]),
            mean_over([output.losses for output in outputs]),
            mean_over([output.metrics for output in outputs]),
        )

    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        parts = zip(self.books, codes.split(self.lengths, dim=1), strict=True)
        return self._join([book._search(book.project_in(part), None) for book, part in parts])

    def _join(self, indices: Sequence[Tensor]) -> Tensor:
        # Absent ids (-1, of dropped layers) stay absent.
        pairs = zip(indices, self.offsets, strict=True)
        return torch.cat([torch.where(ids < 0, ids, ids + start) for ids, start in pairs], dim=1)

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        vectors = torch.zeros(*indices.shape[:2], self.dim, device=indices.device)
        for number, book in enumerate(self.books):
            local = indices - self.offsets[number]
            own = ((local >= 0) & (local < self.sizes[number])).all(dim=-1, keepdim=True)
            found = book.project_out(book._lookup(torch.where(own, local, 0), None))
            vectors = torch.where(own, found, vectors)
        return vectors

    def owners(self, indices: Tensor) -> Tensor:
        """Return which quantizer each id `(B, N, Q)` belongs to, int64 of the same shape."""
        return (indices[..., None] >= self.offsets.T).sum(dim=-1) - 1

    @property
    def against_collapse(self) -> str:
        """Return what the first quantizer advises."""
        return self.books[0].against_collapse

    def codebooks(self) -> list[Tensor]:
        """The joint tables of all slots, narrower ones filled up with zeros."""
        joint = []
        for tables in zip(*(book.codebooks() for book in self.books), strict=True):
            width = max(table.shape[1] for table in tables)
            joint.append(torch.cat([F.pad(t, (0, width - t.shape[1])) for t in tables]))
        return joint

    @property
    def bits_per_token(self) -> float:
        """Mean over the tokens: which quantizer's an id is, its position says for free."""
        pairs = zip(self.books, self.lengths, strict=True)
        return sum(book.bits_per_token * n for book, n in pairs) / sum(self.lengths)

    @torch.no_grad()
    def initialize_from(self, latents: Tensor) -> None:
        """Start each quantizer from its tokens of `latents` `(M * N, D)`, whole images."""
        parts = latents.unflatten(0, (-1, sum(self.lengths))).split(self.lengths, dim=1)
        for book, part in zip(self.books, parts, strict=True):
            book.initialize_from(part.flatten(0, 1))

    @property
    def num_init_latents(self) -> int:
        """So many that each quantizer gets as many of its own as it wants."""
        pairs = zip(self.books, self.lengths, strict=True)
        total = sum(self.lengths)
        return max(-(-book.num_init_latents * total // length) for book, length in pairs)

    def after_step(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Tensor]:
        """Step every quantizer; the scalars are means over them."""
        optimizers = list(optimizers)
        return mean_over([book.after_step(optimizers) for book in self.books])
