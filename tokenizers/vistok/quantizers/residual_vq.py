"""Residual vector quantization: each layer codes what the layers before it left over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.registry import register
from vistok.core.signatures import OptionsOf, check_values
from vistok.core.values import CodebookSize, Count, Share
from vistok.quantizers.base import token_mean
from vistok.quantizers.composite import (
    Composite,
    assign_codes,
    keep_active,
    mean_over,
    sample_depths,
)
from vistok.quantizers.vq import VectorQuantizer


@register("residual_vq")
class ResidualVQ(Composite):
    """Sum of Q codes per token, found greedily, coarse to fine.

        r_0 = z        i_j = argmin |r_j − E_i|        r_{j+1} = r_j − sg q_j        ẑ = Σ_j q_j

    The gradient estimator is applied once, around the sum: with straight-through the encoder's
    gradient is the identity (one estimator per layer would multiply it by Q). Only the codes are
    detached in r_j, so the commitment loss of every layer reaches the encoder. Losses are means
    over the layers, and a layer's loss is the mean over the tokens that use it.

    With quantizer dropout a training sample keeps its first n layers only, so that any prefix of
    the layers decodes (`decode_prefix`). The layers that it lacks are index -1: they add the
    zero vector and enter no loss and no statistic.

    Papers: SoundStream, Zeghidour et al. 2021, https://arxiv.org/abs/2107.03312 (dropout);
    RQ-VAE, Lee et al. 2022, https://arxiv.org/abs/2203.01941 (images, shared codebook).

    Args:
        dim: width D of the latents.
        codebook_size: number of codes K of each layer.
        codebook_dim: width d of the codes; None for D.
        num_layers: Q.
        shared: one codebook for all layers. Its statistics then add up over the layers, and its
            codes must serve large vectors and small residuals alike.
        quantizer_dropout: probability that a training sample keeps n layers, n uniform on
            [1, Q], instead of all.
        **codebook_options: passed to each layer's `VectorQuantizer`. The metric is always
            Euclidean: a residual has a length.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        codebook_dim: Count | None = None,
        *,
        num_layers: Count = 8,
        shared: bool = False,
        quantizer_dropout: Share = 0.0,
        **codebook_options: Annotated[Any, OptionsOf(VectorQuantizer, but=("metric",))],
    ) -> None:
        check_values(ResidualVQ, locals())
        if codebook_options.get("assignment") == "gumbel":
            raise ArgumentError(
                "assignment=gumbel: brings a gradient per layer, but a residual has one "
                "around the sum; use nearest or stochastic"
            )
        if codebook_options.get("entropy_weight"):
            raise ArgumentError("entropy_weight: the residual losses have no entropy")
        width = codebook_dim or dim
        layers = [
            VectorQuantizer(width, codebook_size, metric="euclidean", **codebook_options)
            for _ in range(1 if shared else num_layers)
        ]
        sizes = [codebook_size] * num_layers
        super().__init__(dim, width, layers, sizes, layers[0].loss_weights)
        self.num_layers = num_layers
        self.shared = shared
        self.quantizer_dropout = quantizer_dropout

    @property
    def layers(self) -> list[VectorQuantizer]:
        """The codebook of each layer, Q entries; the same one Q times if it is shared."""
        books = cast(list[VectorQuantizer], list(self.books))
        return books * self.num_layers if self.shared else books

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        depths = None
        if self.quantizer_dropout > 0:
            depths = sample_depths(
                codes.shape[0], self.num_layers, 1, self.quantizer_dropout, codes.device
            )
        if self.shared and not self.layers[0]._is_ready():
            keep = None if mask is None else mask.flatten()
            self._start_shared(
                codes.detach().flatten(0, 1),
                lambda rows: self.layers[0]._initialize_from_batch(
                    rows, None if keep is None else keep.repeat(len(rows) // len(keep))
                ),
            )
        residual, total = codes, torch.zeros_like(codes)
        losses, indices, candidates = [], [], []
        for number, layer in enumerate(self.layers):
            active = None if depths is None else number < depths
            keep = keep_active(mask, active, codes.shape[1])
            ids = assign_codes(layer, residual, keep)
            vectors, target = layer._lookup(ids), residual.detach()
            if active is not None:
                vectors = vectors * active[:, None, None]
                ids = torch.where(active[:, None, None], ids, -1)
            residual = residual - vectors.detach()
            total = total + vectors
            errors = {"commitment": residual, "codebook": vectors - target}  # r_j − q_j is r_{j+1}
            losses.append(
                {
                    name: token_mean(errors[name].square().mean(-1), keep)
                    for name in self.loss_weights
                }
            )
            indices.append(ids)
            candidates.append(layer.stats.candidates)
        if self.shared:
            self._mix_candidates(candidates)
        quantized = self.layers[0]._estimate(codes, total)
        return QuantizerOutput(quantized, torch.cat(indices, dim=-1), mean_over(losses))

    @torch.no_grad()
    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        residual, indices = codes, []
        for layer in self.layers:
            indices.append(layer._search(residual))
            residual = residual - layer._lookup(indices[-1])
        return torch.cat(indices, dim=-1)

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        total = torch.zeros((), device=indices.device)
        for layer, ids in zip(self.layers, indices.split(1, dim=-1), strict=True):
            total = total + layer._lookup(ids.clamp(min=0)) * (ids >= 0)
        return total

    def decode_prefix(self, indices: Tensor) -> Tensor:
        """Decode the first layers alone: a coarser vector.

        Args:
            indices: `(B, N, n)` integers of the first n <= Q layers.

        Returns:
            `(B, N, D)` float32, the same as `decode` with the other layers at -1.
        """
        missing = self.num_layers - indices.shape[-1]
        if missing < 0:
            raise ConfigError(
                f"{type(self).__name__}.decode_prefix: indices have {indices.shape[-1]} layers, "
                f"the quantizer has {self.num_layers}"
            )
        return self.decode(F.pad(indices, (0, missing), value=-1))

    def codebooks(self) -> list[Tensor]:
        """Q tables `(K, d)`; the same one Q times if it is shared."""
        return [table for layer in self.layers for table in layer.codebooks()]

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        """Start each layer from the residuals of `latents` `(M, D)` that reach it."""
        with torch.autocast(latents.device.type, enabled=False):
            codes = self.project_in(latents.float())
            if self.shared:
                self._start_shared(codes, self.layers[0].initialize)
                return
            for layer in self.layers:
                layer.initialize(codes)
                codes = codes - layer._lookup(layer._search(codes[None]))[0]

    @torch.no_grad()
    def _start_shared(self, codes: Tensor, start: Callable[[Tensor], None]) -> None:
        """Start the shared codebook with `start`, on the residuals of all depths of `(M, d)`."""
        start(codes)
        residuals = [codes]
        for layer in self.layers[1:]:  # so far it knows only whole vectors
            ids = layer._search(residuals[-1][None])
            residuals.append(residuals[-1] - layer._lookup(ids)[0])
        start(torch.cat(residuals))

    def _mix_candidates(self, candidates: list[Tensor]) -> None:
        """Let dead codes of a shared codebook revive from the residuals of all depths."""
        drawn = torch.stack(candidates)
        turn = torch.arange(drawn.shape[1], device=drawn.device)
        self.layers[0].stats.candidates = drawn[turn % drawn.shape[0], turn]
