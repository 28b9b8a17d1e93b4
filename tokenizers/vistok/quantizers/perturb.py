"""Latent perturbation: train the decoder on the errors that a generator will make."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.values import CodebookSize, Count, Index, Share
from vistok.quantizers.base import Quantizer
from vistok.quantizers.product_vq import Product
from vistok.quantizers.vq import VectorQuantizer

_BLOCK_SCORES = 1 << 20  # scores computed at a time; 4 MiB of float32


@register("perturb")
class Perturb(Quantizer):
    """Replaces some codes of some training images by near ones: RobustTok.

    In the first β·B images of a batch each token, with probability α, takes a code drawn
    uniformly from the δ nearest to its latent (the nearest included). Losses, statistics and
    indices are those of the clean codes, only `quantized` is perturbed; the gradient is that of
    the clean estimator. Eval is the inner quantizer's. Cost: the δ best codes are searched for
    the β·B images alone, in blocks.

    α and δ are multiplied by 1 until step `anneal_start`, then linearly less until `final_ratio`
    at `anneal_end`. Steps are counted by `after_step` and saved.

    Paper: RobustTok, Qiu et al. 2025, https://arxiv.org/abs/2503.08354. Differs from the
    released code: β·B is not rounded down (the last image is perturbed with the remaining
    probability, so small batches take part), δ stays at 1 or more, and eval is never perturbed.

    Args:
        dim: width D of the latents, that of `inner`.
        codebook_size: number of codes K of each slot of `inner`.
        inner: any `VectorQuantizer`, or a product of them. The codes of a residual or a pyramid
            depend on each other, so that none can be exchanged alone.
        alpha: share of the tokens, 0 to 1.
        beta: share of the images, 0 to 1.
        delta: number of nearest codes to draw from, at most K.
        anneal_start: optimizer step until which α and δ are full.
        anneal_end: optimizer step from which they are at `final_ratio`.
        final_ratio: the factor at the end, 0 to 1.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        inner: Quantizer,
        *,
        alpha: Share = 1.0,
        beta: Share = 0.1,
        delta: Count = 100,
        anneal_start: Index = 200_000,
        anneal_end: Index = 600_000,
        final_ratio: Share = 0.5,
    ) -> None:
        if inner.dim != dim or any(size != codebook_size for size in inner.codebook_sizes):
            raise ArgumentError(
                f"inner: has dim={inner.dim} and codebook sizes {list(inner.codebook_sizes)}; "
                f"must be dim={dim} and codebook_size={codebook_size}"
            )
        check_values(Perturb, locals())
        if anneal_start > anneal_end:
            raise ArgumentError(
                f"anneal_start={anneal_start}: must be 0 to anneal_end={anneal_end}"
            )
        super().__init__(dim, None, inner.codebook_sizes, inner.loss_weights)
        self.inner = inner
        self.books = _flat_books(inner)  # a plain list: the modules are the inner's
        self.alpha = alpha
        self.beta = beta
        self.delta = min(delta, codebook_size)
        self.anneal_start = anneal_start
        self.anneal_end = anneal_end
        self.final_ratio = final_ratio
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._trained = False  # since the last step

    def ratio(self) -> Tensor:
        """The factor on α and δ at the current step, a float32 scalar."""
        span = max(self.anneal_end - self.anneal_start, 1)
        progress = ((self.steps - self.anneal_start) / span).clamp(0, 1)
        return 1 - (1 - self.final_ratio) * progress

    # `codes` below are still of width D: the projections are the inner quantizer's.

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        self._trained = True
        codes = self.inner.project_in(codes)
        output = self.inner._quantize(codes, mask, grid)
        quantized = output.quantized
        expected = round(self.beta * codes.shape[0], 6)  # of images; 0.1 * 30 is above 3
        num_images = math.ceil(expected)
        if num_images > 0:
            clean = quantized[:num_images]
            image_share = torch.ones(num_images, device=codes.device)
            image_share[-1] = expected - (num_images - 1)
            ids = self._perturb(codes[:num_images], output.indices[:num_images], image_share)
            perturbed = clean + (self.inner._lookup(ids, grid) - clean).detach()
            quantized = torch.cat([perturbed, quantized[num_images:]])
        return QuantizerOutput(
            self.inner.project_out(quantized),
            output.indices,
            output.losses,
            {**output.metrics, "perturbation_ratio": self.ratio()},
        )

    @torch.no_grad()
    def _perturb(self, codes: Tensor, ids: Tensor, image_share: Tensor) -> Tensor:
        """Indices `(b, N, Q)` after the draw, of `codes` `(b, N, d)` with the clean `ids`."""
        ratio = self.ratio()
        images = torch.rand_like(image_share) < image_share
        tokens = torch.rand(ids.shape[:2], device=ids.device) < self.alpha * ratio
        drawn = tokens & images[:, None]
        num_near = (ratio * self.delta).floor().clamp(min=1)
        moved = []
        parts = codes.split([book.codebook_dim for book in self.books], dim=-1)
        for book, part, clean in zip(self.books, parts, ids.unbind(-1), strict=True):
            near = near_codes(book, part.reshape(-1, book.codebook_dim), self.delta)
            rank = (torch.rand(near.shape[0], device=near.device) * num_near).long()
            pick = near.gather(1, rank[:, None]).view_as(clean)
            moved.append(torch.where(drawn, pick, clean))
        return torch.stack(moved, dim=-1)

    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        return self.inner._search(self.inner.project_in(codes), grid)

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        return self.inner.project_out(self.inner._lookup(indices, grid))

    def digits(self) -> list[list[float]] | None:
        """Return those of the inner quantizer."""
        return self.inner.digits()

    def codebooks(self) -> list[Tensor]:
        """Those of the inner quantizer."""
        return self.inner.codebooks()

    def initialize(self, latents: Tensor) -> None:
        """Initialize the inner quantizer."""
        self.inner.initialize(latents)

    def initialize_from(self, latents: Tensor) -> None:
        """Set the inner quantizer's projections and codebook."""
        self.inner.initialize_from(latents)

    @property
    def num_init_latents(self) -> int:
        """Return what the inner quantizer wants."""
        return self.inner.num_init_latents

    @property
    def against_collapse(self) -> str:
        """Return what the inner quantizer advises, whose keys are one level down."""
        return self.inner.against_collapse.replace("quantizer.", "quantizer.inner.")

    def after_step(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Tensor]:
        """Step the inner quantizer and, after a training forward, the schedule."""
        self.steps.add_(int(self._trained))
        self._trained = False
        return self.inner.after_step(optimizers)

    def discard(self) -> None:
        """Let the schedule stay."""
        self._trained = False


@torch.no_grad()
def near_codes(book: VectorQuantizer, codes: Tensor, count: int) -> Tensor:
    """The `count` best codes of each of the `codes` `(M, d)` by the book's own score, best first.

    Memory is O(M·count): scores are computed a block of rows at a time.
    """
    queries, table = book._metric(codes), book._table()
    bias = book._bias(table)
    rows = max(1, _BLOCK_SCORES // table.shape[0])
    near = torch.empty(codes.shape[0], count, dtype=torch.long, device=codes.device)
    for start in range(0, codes.shape[0], rows):
        block = queries[start : start + rows]
        scores = block @ table.t() if bias is None else torch.addmm(bias, block, table.t())
        near[start : start + rows] = scores.topk(count, dim=1).indices
    return near


def _flat_books(quantizer: Quantizer) -> list[VectorQuantizer]:
    """The codebooks of a quantizer whose slots are independent of each other."""
    if isinstance(quantizer, VectorQuantizer):
        return [quantizer]
    if isinstance(quantizer, Product):
        return [flat for book in quantizer.books for flat in _flat_books(book)]
    raise ConfigError(
        f"Perturb wraps a VectorQuantizer or a product of them, not {type(quantizer).__name__}"
    )
