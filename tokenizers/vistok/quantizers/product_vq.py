"""Product quantization: the channels of a latent are split and each part has its codebook."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.registry import register
from vistok.core.signatures import OptionsOf
from vistok.core.values import CodebookSize, Count, NonNegative, check
from vistok.quantizers.base import token_mean
from vistok.quantizers.composite import Books, Composite, mean_over
from vistok.quantizers.vq import VectorQuantizer


@register("product")
class Product(Composite):
    """Splits the channels of the code space over several quantizers and joins their outputs.

    Slots, channels and codebooks are in the order of the books. If D is the sum of their widths
    there is no projection, and the channels of `quantized` are the branches themselves: split
    them to hang a loss on one branch. Losses are means over the books.

    Args:
        dim: width D of the latents.
        books: the quantizers of the parts, any kind; their widths add up to the code space.
        disentanglement_weight: weight of the "disentanglement" loss, the mean over tokens and
            pairs of books of cos²(q_a, q_b). It sees the codes through the gradient estimator,
            so that it trains the encoder and never a codebook, and needs equal widths. 0 skips
            it.
    """

    def __init__(
        self, dim: Count, books: Books, *, disentanglement_weight: NonNegative = 0.0
    ) -> None:
        weights = {name: w for book in books for name, w in book.loss_weights.items()}
        if disentanglement_weight != 0:
            if len(books) < 2 or len({book.dim for book in books}) > 1:
                raise ArgumentError(
                    "disentanglement_weight: compares codes, and needs two or more books "
                    f"of one width, found widths {[book.dim for book in books]}"
                )
            weights["disentanglement"] = disentanglement_weight
        sizes = [size for book in books for size in book.codebook_sizes]
        super().__init__(dim, sum(book.dim for book in books), books, sizes, weights)
        self.widths = [book.dim for book in books]
        self.slots = [book.num_indices for book in books]

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        outputs = self._quantize_books(codes.split(self.widths, dim=-1), mask, grid)
        vectors = [output.quantized for output in outputs]
        losses = mean_over([output.losses for output in outputs])
        if "disentanglement" in self.loss_weights:
            losses["disentanglement"] = disentanglement(vectors, mask)
        return QuantizerOutput(
            torch.cat(vectors, dim=-1),
            torch.cat([output.indices for output in outputs], dim=-1),
            losses,
            mean_over([output.metrics for output in outputs]),
        )

    def _quantize_books(
        self, parts: Sequence[Tensor], mask: Tensor | None, grid: Grid | None
    ) -> list[QuantizerOutput]:
        pairs = zip(self.books, parts, strict=True)
        return [book._quantize(part, mask, grid) for book, part in pairs]

    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        pairs = zip(self.books, codes.split(self.widths, dim=-1), strict=True)
        return torch.cat([book._search(part, grid) for book, part in pairs], dim=-1)

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        pairs = zip(self.books, indices.split(self.slots, dim=-1), strict=True)
        return torch.cat([book._lookup(ids, grid) for book, ids in pairs], dim=-1)

    def codebooks(self) -> list[Tensor]:
        """The tables of all books, one per slot."""
        return [table for book in self.books for table in book.codebooks()]

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        """Start each book from its channels of `latents` `(M, D)`."""
        with torch.autocast(latents.device.type, enabled=False):
            parts = self.project_in(latents.float()).split(self.widths, dim=-1)
            for book, part in zip(self.books, parts, strict=True):
                book.initialize(part)

    @property
    def per_token(self) -> bool:
        """Return whether all books have an id per token."""
        return all(book.per_token for book in self.books)

    def num_index_tokens(self, num_tokens: int, grid: Grid | None = None) -> int:
        """That of the books, which agree."""
        return self.books[0].num_index_tokens(num_tokens, grid)

    def scales_of(self, num_tokens: int, grid: Grid | None = None) -> list[Grid] | None:
        """Return those of the books, which agree."""
        return self.books[0].scales_of(num_tokens, grid)

    def index_mask(self, mask: Tensor, grid: Grid | None = None) -> Tensor:
        """That of the books, which agree."""
        return self.books[0].index_mask(mask, grid)


@register("product_vq")
class ProductVQ(Product):
    """G independent codebooks over G slices of each latent: a vocabulary of K^G per token.

    z = (z_1, …, z_G), i_g = argmin |z_g − E_g,i|, ẑ = (E_1[i_1], …, E_G[i_G]).

    Many small codebooks stay in use where one large one would not (UniTok: 8 of 4096). With
    `disentanglement_weight` the slices are pushed to hold different things (FQGAN); its feature
    losses belong to the tokenizer, see `Product` for the branches. UniTok's attention
    projections around the codebooks belong to encoder and decoder.

    Papers: UniTok, Ma et al. 2025, https://arxiv.org/abs/2502.20321; FQGAN, Bai et al. 2024,
    https://arxiv.org/abs/2411.16681

    Args:
        dim: width D of the latents.
        codebook_size: number of codes K of each codebook.
        codebook_dim: width of the codes of each codebook; None for D / G.
        num_codebooks: G.
        disentanglement_weight: weight of the mean cos² between the slices of a token.
        **codebook_options: passed to each `VectorQuantizer`.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        codebook_dim: Count | None = None,
        *,
        num_codebooks: Count = 8,
        disentanglement_weight: NonNegative = 0.0,
        **codebook_options: Annotated[Any, OptionsOf(VectorQuantizer)],
    ) -> None:
        check("num_codebooks", num_codebooks, Count)
        if codebook_dim is None and dim % num_codebooks:
            raise ArgumentError(
                f"num_codebooks={num_codebooks}: does not divide dim={dim}; set codebook_dim"
            )
        books = [
            VectorQuantizer(codebook_dim or dim // num_codebooks, codebook_size, **codebook_options)
            for _ in range(num_codebooks)
        ]
        super().__init__(dim, books, disentanglement_weight=disentanglement_weight)


def disentanglement(vectors: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean over tokens and pairs of cos² between vectors `(B, N, d)` of one token."""
    pairs = [
        F.cosine_similarity(a, b, dim=-1, eps=1e-6).square()
        for a, b in itertools.combinations(vectors, 2)
    ]
    return token_mean(torch.stack(pairs).mean(dim=0), mask)
