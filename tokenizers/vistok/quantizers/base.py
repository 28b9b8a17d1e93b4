"""The contract of a quantizer: what makes a tokenizer discrete."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.ranks import all_reduce_sum, world_size
from vistok.nn.data_init import principal_components, scale_of
from vistok.quantizers.usage import CodeUsage


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of one value per token over the tokens that `mask` keeps, 0 if there are none.

    With a mask the ranks keep different numbers of tokens. Each then divides by the mean count
    over the ranks, so that the average of the ranks' gradients (DDP) is the gradient of the mean
    over all tokens.

    Args:
        values: float32, one per token, any shape.
        mask: bool of the same shape or None for all; masked or not must agree between ranks.
    """
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    kept = torch.where(mask, values, 0.0).sum()
    count = all_reduce_sum(mask.sum().to(values.dtype)) / world_size()
    return torch.where(count > 0, kept / count.clamp(min=1e-6), 0.0)


class Quantizer(nn.Module, ABC):
    """Maps latents `(B, N, D)` to integer indices `(B, N, Q)` and back to vectors.

    A method subclasses this and writes three functions in *code space*, on float32 rows and
    with autocast off: `_quantize`, `_search` and `_lookup`. The base class owns what must be the
    same everywhere: the projection between the model's width D and the code dimension d, the
    float32 island, the check for NaN and inf, the usage statistics, and the rule that in eval
    mode the forward output *is* `decode(indices)`, bit for bit.

    Statistics are gathered in `forward` and applied in `after_step`, which the trainer calls
    once per optimizer step: gradient accumulation, activation checkpointing (where forward runs
    twice) and several ranks then all see one update.

    Args:
        dim: width D of the latents, in and out.
        codebook_dim: width d of the codes; None for d = D. If they differ, a linear layer on
            either side projects (factorized codes, ViT-VQGAN, https://arxiv.org/abs/2110.04627).
        codebook_sizes: number of codes of each of the Q index slots, each at least 2.
        loss_weights: the weight of every loss that `_quantize` can return.
    """

    #: Give every code dimension the same variance at the start: right where each dimension is
    #: quantized by itself (FSQ, LFQ), wrong where distances between vectors count (VQ).
    whiten_projection = False

    def __init__(
        self,
        dim: int,
        codebook_dim: int | None,
        codebook_sizes: Iterable[int],
        loss_weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.codebook_dim = codebook_dim or dim
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        for size in self.codebook_sizes:
            if size < 2:
                raise ArgumentError(f"codebook_size={size}: a codebook needs 2 or more codes")
        self.loss_weights = dict(loss_weights or {})
        projects = self.codebook_dim != dim
        self.project_in: nn.Module = (
            nn.Linear(dim, self.codebook_dim) if projects else nn.Identity()
        )
        self.project_out: nn.Module = (
            nn.Linear(self.codebook_dim, dim) if projects else nn.Identity()
        )
        self.usage = CodeUsage(self.codebook_sizes)

    # ------------------------------------------------------------------ what a method writes

    @abstractmethod
    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        """Training forward in code space.

        Args:
            codes: `(B, N, d)` float32 with a gradient.
            mask: `(B, N)` bool or None; a token marked False enters no loss and no statistic.
            grid: see `forward`.

        Returns:
            Output whose `quantized` is `(B, N, d)`.
        """

    @abstractmethod
    def _search(self, codes: Tensor, grid: Grid | None) -> Tensor:
        """Indices `(B, N, Q)` of `codes` `(B, N, d)` float32, by the shortest path."""

    @abstractmethod
    def _lookup(self, indices: Tensor, grid: Grid | None) -> Tensor:
        """Vectors `(B, N, d)` float32 of `indices` `(B, N, Q)`."""

    @abstractmethod
    def codebooks(self) -> list[Tensor]:
        """The Q tables `(K_q, d_q)` float32 that a downstream model looks up, detached.

        Implicit codebooks (FSQ, LFQ) are written out.
        """

    @property
    def per_token(self) -> bool:
        """Return whether an id stands for one token, and says all about it; not so with scales."""
        return True

    def num_index_tokens(self, num_tokens: int, grid: Grid | None = None) -> int:
        """Length of the index sequence of `num_tokens` latents; longer for multi-scale only."""
        return num_tokens

    def scales_of(self, num_tokens: int, grid: Grid | None = None) -> list[Grid] | None:
        """Return the grids whose ids follow one another in a code, coarse to fine; else None."""
        return None

    def digits(self) -> list[list[float]] | None:
        """Return the values that each channel of an implicit code takes; None for tables.

        An id is a number whose digits choose them: the first channel's is the least significant,
        and has as many values as the first list.
        """
        return None

    def index_mask(self, mask: Tensor, grid: Grid | None = None) -> Tensor:
        """The mask over index tokens `(B, num_index_tokens(N))` of one over latents `(B, N)`."""
        return mask

    @torch.no_grad()
    def initialize_from(self, latents: Tensor) -> None:
        """Set projections and codebook from data, once, before training.

        The projections start at the principal components of the latents, scaled to unit mean
        variance (or each to unit variance if `whiten_projection`), and at their inverse.

        Args:
            latents: `(M, D)` encoder outputs, the same on every rank.
        """
        latents = latents.float()
        if isinstance(self.project_in, nn.Linear) and isinstance(self.project_out, nn.Linear):
            count = min(self.codebook_dim, self.dim)
            mean, components, deviations = principal_components(latents, count)
            deviations = scale_of(deviations.clamp(min=1e-6 * float(deviations[0])))
            if not self.whiten_projection:
                deviations = deviations.square().mean().sqrt().expand(count)
            inward = components / deviations[:, None]
            self.project_in.weight[:count] = inward
            self.project_in.bias[:count] = -inward @ mean
            self.project_out.weight[:, :count] = (components * deviations[:, None]).T
            if self.project_out.bias is not None:
                self.project_out.bias.copy_(mean)
        self.initialize(latents)

    def initialize(self, latents: Tensor) -> None:
        """Set the codebook from data, once, before training. The default does nothing.

        Args:
            latents: `(M, D)` encoder outputs of as many batches as the codebook needs, the
                same on every rank. See `num_init_latents`.
        """

    @property
    def num_init_latents(self) -> int:
        """Return how many latent vectors `initialize` wants; 0 if it does nothing."""
        return 0

    def after_step(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Tensor]:
        """Apply what the forwards since the last call have gathered (EMA, code restarts).

        Args:
            optimizers: those that train this quantizer; their moments are cleared for codes
                that are replaced.

        Returns:
            Detached scalars to log.
        """
        return {}

    def discard_step(self) -> None:
        """Forget what the forwards since the last `after_step` have gathered: the step is skipped.

        Calls `discard` of every part that has it; a quantizer that gathers in itself has one.
        """
        for part in self.modules():
            if hasattr(part, "discard"):
                part.discard()  # type: ignore[operator]

    @property
    def against_collapse(self) -> str:
        """Return what to change when few codes do all the work, for the alarm; ends its line."""
        return "a lower optimizer.lr, or quantizer=simvq"

    # ------------------------------------------------------------------ what everyone calls

    @property
    def num_indices(self) -> int:
        """Q, the number of index slots per token."""
        return len(self.codebook_sizes)

    @property
    def bits_per_token(self) -> float:
        """log2 of the number of different tokens."""
        return sum(math.log2(size) for size in self.codebook_sizes)

    def forward(
        self, latents: Tensor, mask: Tensor | None = None, grid: Grid | None = None
    ) -> QuantizerOutput:
        """Quantize.

        Args:
            latents: `(B, N, D)`, any float type.
            mask: `(B, N)` bool; a token marked False enters no loss and no statistic. It still
                gets an index and a vector.
            grid: where the tokens lie, in raster order, such as (rows, columns): the encoder's
                `grid`. None for a line of N. Only scales look at it.

        Returns:
            The output with `quantized` `(B, N, D)` float32.

        Raises:
            ValueError: if the shape is wrong or a latent is NaN or infinite.
        """
        with torch.autocast(latents.device.type, enabled=False):
            codes = self._codes(latents)
            if not self.training:
                indices = self._search(codes, grid)
                return QuantizerOutput(self.decode(indices, grid), indices)
            output = self._quantize(codes, mask, grid)
            kept = None if mask is None else self.index_mask(mask, grid)
            self.usage.update(output.indices, kept)
            quantized = self.project_out(output.quantized)
            return QuantizerOutput(quantized, output.indices, output.losses, output.metrics)

    @torch.no_grad()
    def encode(self, latents: Tensor, grid: Grid | None = None) -> Tensor:
        """Indices `(B, N, Q)` of `latents` `(B, N, D)`: no losses, no statistics, no vectors."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._search(self._codes(latents), grid)

    def decode(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        """Look up the vectors of the given indices.

        Args:
            indices: `(B, N, Q)` integers, slot q in [0, codebook_sizes[q]).
            grid: the one that they were encoded with.

        Returns:
            `(B, N, D)` float32, the input that the decoder was trained on.

        Raises:
            ValueError: if the last dimension is not Q.
        """
        if indices.ndim != 3 or indices.shape[-1] != self.num_indices:
            raise ConfigError(
                f"{type(self).__name__}.decode: indices must be (B, N, {self.num_indices}), "
                f"found {tuple(indices.shape)}"
            )
        with torch.autocast(indices.device.type, enabled=False):
            return self.project_out(self._lookup(indices.long(), grid))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Move, but stay float32 under `.bfloat16()`, which would change ids, or `.double()`."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_precision, recurse)
        return self

    def _codes(self, latents: Tensor) -> Tensor:
        if latents.ndim != 3 or latents.shape[-1] != self.dim:
            raise ConfigError(
                f"{type(self).__name__}: latents must be (B, N, {self.dim}), "
                f"found {tuple(latents.shape)}"
            )
        codes = self.project_in(latents.float())
        # Under torch.compile the check would break the graph, so the eager path alone has it.
        # A sum is NaN or infinite if any of its terms is (or if it overflows, an error as well).
        if not torch.compiler.is_compiling() and not math.isfinite(codes.detach().sum().item()):
            raise ConfigError(
                f"{type(self).__name__}: the latents contain NaN or inf; lower the learning rate, "
                "clip gradients or use precision bf16 or 32"
            )
        return codes
