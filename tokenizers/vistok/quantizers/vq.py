"""Vector quantization with a learned codebook: the VQ-VAE family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.ranks import all_gather_rows
from vistok.core.registry import register
from vistok.core.sample_random import integers
from vistok.core.signatures import check_values
from vistok.core.values import CodebookSize, Count, Decay, NonNegative, Positive
from vistok.quantizers import estimators
from vistok.quantizers.base import Quantizer, token_mean
from vistok.quantizers.codebook_stats import CodebookStats
from vistok.quantizers.kmeans import kmeans
from vistok.quantizers.search import best_codes, code_bias, sampled_codes
from vistok.quantizers.soft_assignment import (
    entropy_penalty,
    gumbel_codes,
    mapped_codes,
    picked_codes,
    soft_straight_through,
)

Metric = Literal["cosine", "euclidean"]
Estimator = Literal["straight_through", "rotation", "diveq", "synchronous"]

_ROWS = 8192  # codes that are normalised at a time


@register("vq")
class VectorQuantizer(Quantizer):
    """Replaces each latent by the nearest row of a codebook.

    Index i = argmin |z − E_i|, vector q = E_i, and two losses, each a mean over tokens and
    dimensions: "commitment" |z − sg q|² pulls latents to their codes, "codebook" |q − sg z|²
    pulls codes to their latents.

    Papers: VQ-VAE, van den Oord et al. 2017, https://arxiv.org/abs/1711.00937; cosine metric and
    factorized codes, ViT-VQGAN, https://arxiv.org/abs/2110.04627; clustering revival, CVQ-VAE,
    https://arxiv.org/abs/2307.15139. Estimators cite theirs in `estimators.py`.

    Args:
        dim: width D of the latents.
        codebook_size: number of codes K.
        codebook_dim: width d of the codes, 8 to 32 for factorized codes; None for D.
        codebook: how the codes learn. "ema": each code is the moving average of its latents;
            "gradient": the codebook loss.
        metric: "cosine" normalises latents and codes to unit length, so that all vectors that
            the decoder sees have length 1; "euclidean" leaves both as they are.
        estimator: how the decoder's gradient passes to the latents; see `estimators.py`.
            "synchronous" and "diveq" also train the codes and need codebook="gradient"; DiVeQ
            is meant with both loss weights 0.
        assignment: in training, "nearest"; "stochastic" samples a code with probability
            softmax(score / temperature); "gumbel" samples likewise and lets the gradient of the
            softmax through (needs codebook="gradient"). Eval always takes the nearest.
        temperature: of the sampled assignments, in units of the score.
        ema_decay: decay per optimizer step of the code statistics, in [0, 1).
        commitment_weight: β, weight of the commitment loss.
        codebook_weight: weight of the codebook loss; unused with codebook="ema".
        legacy_beta: swap the two weights. The first VQGAN code put β on the codebook loss; only
            useful to reproduce its runs.
        entropy_weight: weight of H(code | token) − H(code), in nats, which rewards confident
            assignments and an evenly used codebook. 0 skips its cost, about three more searches.
        entropy_temperature: temperature of the soft assignment in that loss.
        kmeans_init: start the codebook by k-means, on the latents given to `initialize` or else
            on the first training batch.
        kmeans_iterations: rounds of k-means.
        revival: what happens to dead codes. "restart" moves them onto random latents of the
            batch, "clustering" pulls them towards the nearest latent.
        dead_code_threshold: a code is dead when its average use falls below this share of the
            mean use, so the value does not depend on batch or codebook size.
        diveq_noise: standard deviation of DiVeQ's noise.
        synchronous_strength: factor on the decoder's gradient to the codes.
    """

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize,
        codebook_dim: Count | None = None,
        *,
        codebook: Literal["ema", "gradient"] = "ema",
        metric: Metric = "cosine",
        estimator: Estimator = "straight_through",
        assignment: Literal["nearest", "stochastic", "gumbel"] = "nearest",
        temperature: Positive = 1.0,
        ema_decay: Decay = 0.99,
        commitment_weight: NonNegative = 0.25,
        codebook_weight: NonNegative = 1.0,
        legacy_beta: bool = False,
        entropy_weight: NonNegative = 0.0,
        entropy_temperature: Positive = 0.01,
        kmeans_init: bool = True,
        kmeans_iterations: Count = 10,
        revival: Literal["restart", "clustering", "none"] = "restart",
        dead_code_threshold: NonNegative = 0.03,
        diveq_noise: NonNegative = 1e-3,
        synchronous_strength: NonNegative = 1.0,
    ) -> None:
        _check(locals())
        learns = codebook == "gradient"
        weights = {"commitment": commitment_weight, "codebook": codebook_weight}
        if legacy_beta:
            weights = {"commitment": codebook_weight, "codebook": commitment_weight}
        if not learns:
            del weights["codebook"]
        weights["entropy"] = entropy_weight
        # A loss of weight 0 is not computed.
        weights = {name: weight for name, weight in weights.items() if weight != 0}
        super().__init__(dim, codebook_dim, [codebook_size], weights)
        self.codebook_size = int(codebook_size)
        self.cosine = metric == "cosine"
        self.learns = learns
        self.estimator = estimator
        self.assignment = assignment
        self.temperature = temperature
        self.entropy_temperature = entropy_temperature
        self.kmeans_init = kmeans_init
        self.kmeans_iterations = kmeans_iterations
        self.revival = revival
        self.diveq_noise = diveq_noise
        self.synchronous_strength = synchronous_strength

        codes = torch.randn(self.codebook_size, self.codebook_dim)
        if not self.cosine:  # the U(±1/K) of VQGAN
            codes = codes.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)
        codes = self._metric(codes)
        self.embedding: Tensor
        if learns:
            self.embedding = nn.Parameter(codes)
        else:
            self.register_buffer("embedding", codes)
        self.stats = CodebookStats(codes, ema_decay, not learns, dead_code_threshold, revival)
        self.initialized: Tensor
        self.register_buffer("initialized", torch.tensor(not kmeans_init))
        self._ready = not kmeans_init  # spares a look at the buffer, a sync on a GPU, every step

    # ------------------------------------------------------------------ the method

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        z = self._metric(codes.reshape(-1, self.codebook_dim))
        keep = None if mask is None else mask.reshape(-1)
        if not self._is_ready():
            self._initialize_from_batch(z.detach(), keep)

        soft = self.assignment == "gumbel" or "entropy" in self.loss_weights
        table = self._soft_table() if soft else self._table()
        ids, noise = self._assign(z.detach(), table.detach())
        self.stats.observe(z.detach(), ids, keep, table.detach(), self.cosine)
        if soft:
            q, table = picked_codes(table, ids)
        else:
            table = table.new_empty(0)  # lets go of a copy as large as the codebook
            q = self._rows(ids)

        if noise is None:
            quantized = self._estimate(z, q)
        else:
            quantized, table = soft_straight_through(
                z, q, table, not self.cosine, 1 / self.temperature, noise
            )
        losses, metrics = {}, {}
        for name, errors in zip(
            ("commitment", "codebook"), estimators.squared_errors(z, q), strict=True
        ):
            if name in self.loss_weights:
                losses[name] = token_mean(errors, keep)
        if "entropy" in self.loss_weights:
            # |z − e|² / T: the distance is twice the score, up to a term that all codes share.
            losses["entropy"], metrics = entropy_penalty(
                z, table, not self.cosine, 2 / self.entropy_temperature, keep
            )
        indices = ids.view(*codes.shape[:-1], 1)
        return QuantizerOutput(quantized.view_as(codes), indices, losses, metrics)

    def _assign(self, z: Tensor, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """Indices `(M,)` of the training forward, and what Gumbel noise was made from."""
        if self.assignment == "gumbel":
            noise = integers(-(2**31), 2**31, (len(z),), z.device).int()
            return gumbel_codes(z, table, not self.cosine, 1 / self.temperature, noise), noise
        if self.assignment == "stochastic":
            return sampled_codes(z, table, self._bias(table), self.temperature), None
        return best_codes(z, table, self._bias(table)), None

    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        z = self._metric(codes.reshape(-1, self.codebook_dim))
        table = self._table()
        return best_codes(z, table, self._bias(table)).view(*codes.shape[:-1], 1)

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        return self._rows(indices.squeeze(-1))

    def codebooks(self) -> list[Tensor]:
        """The table `(K, d)` of effective codes: of unit length under the cosine metric."""
        return [self._table()]

    def after_step(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Tensor]:
        """Apply the statistics of the step: move the codes (EMA), revive dead ones.

        Returns:
            `dead_codes_revived`: number of codes replaced in this step.
        """
        if not self.stats.update():
            return {}
        with torch.no_grad():
            if not self.learns:
                self.stats.means_into(self.embedding)
            if self.cosine:
                # The gradient of a unit code is tangential: without this a learned code would
                # grow longer, and its effective step smaller, with every step.
                for rows in self.embedding.split(_ROWS):  # a whole copy would be as large again
                    rows.copy_(self._metric(rows))
            revived = self.stats.revive(self.embedding, optimizers, self._metric)
        return {"dead_codes_revived": revived}

    @property
    def against_collapse(self) -> str:
        """Revival, k-means and narrower codes, as far as they are not set yet."""
        advice = ["quantizer.revival=restart"]
        if self.revival == "restart":
            advice = ["a higher quantizer.dead_code_threshold"]
        if not self.kmeans_init:
            advice.append("quantizer.kmeans_init=true")
        return f"{', '.join(advice)}, a smaller codebook_dim or codebook_size, or quantizer=simvq"

    # ------------------------------------------------------------------ its parts

    def _metric(self, codes: Tensor) -> Tensor:
        return F.normalize(codes, dim=-1, eps=1e-6) if self.cosine else codes

    @torch.no_grad()
    def _table(self) -> Tensor:
        """All effective codes `(K, d)` for the search, detached."""
        return self._metric(self.embedding.detach()) if self.learns else self.embedding

    def _rows(self, ids: Tensor) -> Tensor:
        """Effective codes of `ids`, with a gradient to a learned codebook.

        Only the picked rows are normalised: the backward pass costs O(N·d), not O(K·d).
        """
        rows = F.embedding(ids, self.embedding)
        return self._metric(rows) if self.learns else rows

    def _soft_table(self) -> Tensor:
        """All effective codes, with a gradient to a learned codebook; for soft assignments."""
        if not (self.learns and self.cosine):
            return self.embedding
        return mapped_codes(self.embedding, self._metric)

    def _bias(self, table: Tensor) -> Tensor | None:
        return None if self.cosine else code_bias(table)

    def _estimate(self, z: Tensor, q: Tensor) -> Tensor:
        match self.estimator:
            case "rotation":
                return estimators.rotation(z, q.detach())
            case "diveq":
                return estimators.diveq(z, q, self.diveq_noise)
            case "synchronous":
                return estimators.synchronous(z, q, self.synchronous_strength)
        return estimators.straight_through(z, q.detach())

    # ------------------------------------------------------------------ start

    @property
    def num_init_latents(self) -> int:
        """Four latents per code if the codebook starts by k-means and has not started yet."""
        return 0 if self._is_ready() else 4 * self.codebook_size

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        """Set the codebook by k-means on `latents` `(M, D)`, the same on every rank."""
        if self.kmeans_init and latents.shape[0] > 0:
            with torch.autocast(latents.device.type, enabled=False):
                self._start(self._metric(self.project_in(latents.float())))

    def _initialize_from_batch(self, z: Tensor, keep: Tensor | None) -> None:
        # Ranks may keep different numbers of tokens, and a collective needs equal shapes: each
        # repeats its own to the full length.
        if keep is not None:
            kept = keep.nonzero().squeeze(-1)
            if kept.numel() > 0:
                z = z[kept[torch.arange(z.shape[0], device=z.device) % kept.numel()]]
        z = all_gather_rows(z)
        if z.shape[0] > 0:
            self._start(z)

    def _start(self, points: Tensor) -> None:
        means, counts = kmeans(points, self.codebook_size, self.kmeans_iterations, self.cosine)
        with torch.no_grad():
            self.embedding.copy_(means)
            self.stats.start(means, counts)
            self.initialized.fill_(True)
        self._ready = True

    def _is_ready(self) -> bool:
        self._ready = self._ready or bool(self.initialized)
        return self._ready


def _check(arguments: dict) -> None:
    """Refuse values and pairs that cannot work."""
    check_values(VectorQuantizer, arguments)
    codebook, estimator = arguments["codebook"], arguments["estimator"]
    assignment = arguments["assignment"]
    if codebook == "ema":
        if estimator in ("diveq", "synchronous"):
            raise ArgumentError(
                f"estimator={estimator}: trains the codes by gradient; set codebook=gradient"
            )
        if assignment == "gumbel":
            raise ArgumentError(
                "assignment=gumbel: trains the codes by gradient; set codebook=gradient"
            )
        if arguments["legacy_beta"]:
            raise ArgumentError("legacy_beta=true: swaps two losses; codebook=ema has only one")
    if assignment != "nearest" and estimator == "rotation":
        raise ArgumentError(
            f"estimator=rotation: diverges with assignment={assignment}; use "
            "estimator=straight_through or assignment=nearest"
        )
    if assignment == "gumbel" and estimator != "straight_through":
        raise ArgumentError(
            f"assignment=gumbel: brings its own gradient, so estimator={estimator} is not used; "
            "set estimator=straight_through"
        )
    if estimator == "diveq" and arguments["revival"] == "none":
        raise ArgumentError("estimator=diveq: needs revival=restart or clustering")
