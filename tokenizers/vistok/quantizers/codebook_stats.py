"""Track how often each code is used and by what: moving averages, and the revival of dead codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vistok.core.ranks import all_gather_rows, all_reduce_sum, world_size
from vistok.quantizers.search import best_scores

_MAX_REVIVED = 1024  # codes that one step can revive

_LAPLACE = 1e-5


class CodebookStats(nn.Module):
    """Moving averages of one codebook's use.

    Counts are in units of the expected count, tokens / K, so that their mean is 1 whatever the
    batch, the codebook and the number of micro-batches or ranks:

        c ← γ·c + (1−γ)·n·K/Σn        m ← γ·m + (1−γ)·S·K/Σn        E = m / smoothed(c)

    with n the tokens of each code in this step and S the sum of their latents. The common factor
    K/Σn leaves E as it is in van den Oord et al. 2017, appendix A.1.

    `observe` only adds to local sums; `update` reduces them over the ranks, once per optimizer
    step, and `revive` then gives dead codes (c below the threshold) a new place.

    The sums of a step are plain tensors, not buffers: DistributedDataParallel overwrites every
    buffer with rank 0's before a forward, which would lose what the other ranks have gathered.

    Args:
        codes: `(K, d)` float32, the codebook at the start.
        decay: γ, per optimizer step.
        averages: keep m as well, for a codebook that follows its moving average.
        threshold: codes with c below it are dead.
        revival: "restart" puts a dead code on a random latent of the batch, with the mean count,
            so that it has log(threshold)/log(γ) steps to prove itself. "clustering" pulls a
            little used code k towards its nearest latent, E_k ← (1−a)·E_k + a·z, with
            a = exp(−10·c_k/(1−γ) − 0.001), the formula of CVQ-VAE; `threshold` is not used.
            "none" leaves dead codes alone.
    """

    def __init__(
        self, codes: Tensor, decay: float, averages: bool, threshold: float, revival: str
    ) -> None:
        super().__init__()
        self.num_codes, self.code_dim = codes.shape
        self.decay = decay
        self.averages = averages
        self.threshold = threshold
        self.revival = revival
        self.num_candidates = min(_MAX_REVIVED, self.num_codes)
        self.counts: Tensor
        self.sums: Tensor
        self.register_buffer("counts", torch.ones(self.num_codes))
        self.register_buffer("sums", codes.clone() if averages else None)
        self.step_counts = torch.zeros(self.num_codes)
        self.step_sums = torch.zeros_like(codes) if averages else None
        self.step = torch.zeros(())
        # One row per candidate: a latent, its score, and whether it may be used.
        self.candidates = torch.zeros(1, self.code_dim + 2)
        self.candidate_ids: Tensor | None = None  # whom they are for, with "clustering"
        self.observed = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodebookStats:
        super()._apply(fn, recurse)
        self.step_counts = fn(self.step_counts)
        self.step_sums = None if self.step_sums is None else fn(self.step_sums)
        self.step = fn(self.step)
        self.candidates = fn(self.candidates)
        return self

    def start(self, codes: Tensor, counts: Tensor) -> None:
        """Begin from `codes` `(K, d)` and the number of points `(K,)` behind each.

        An empty cluster counts as one point: with none, the first update would move it to 0.
        """
        counts = counts.clamp(min=1).float()
        self.counts.copy_(counts / counts.mean())
        if self.averages:
            self.sums.copy_(codes * self.counts[:, None])

    # ------------------------------------------------------------------ in forward, local

    @torch.no_grad()
    def observe(
        self, z: Tensor, ids: Tensor, keep: Tensor | None, codes: Tensor, dot: bool
    ) -> None:
        """Take note of a batch.

        Args:
            z: latents `(M, d)` float32.
            ids: their codes `(M,)`.
            keep: `(M,)` bool or None; a token marked False is ignored.
            codes: the codebook `(K, d)`.
            dot: nearness is the dot product, not the Euclidean distance.
        """
        weight = z.new_ones(z.shape[0]) if keep is None else keep.to(z.dtype)
        self.step_counts.index_add_(0, ids, weight)
        if self.step_sums is not None:
            self.step_sums.index_add_(0, ids, z if keep is None else z * weight[:, None])
        if self.revival == "restart":
            self.candidates = self._spread_rows(z, weight)
        elif self.revival == "clustering":
            self.candidates = self._nearest_rows(z, weight, codes, dot)
        self.observed = True

    def _spread_rows(self, z: Tensor, weight: Tensor) -> Tensor:
        """Rows evenly spread over the batch, for `restart`.

        Each step starts at another offset (golden-ratio steps), so that all positions of a
        batch get their turn. No random numbers: reruns agree.
        """
        size = max(1, self.num_candidates // world_size())
        num_tokens = z.shape[0]
        out = z.new_zeros(size, self.code_dim + 2)
        if num_tokens > 0:
            stride = max(1, num_tokens // size)
            offset = (self.step * 0.6180339887 % 1 * stride).long()
            rows = torch.arange(min(size, num_tokens), device=z.device) * stride + offset
            out[: rows.shape[0], :-2] = z[rows]
            out[: rows.shape[0], -1] = weight[rows]
        return out

    def _nearest_rows(self, z: Tensor, weight: Tensor, codes: Tensor, dot: bool) -> Tensor:
        """The latent nearest to each of the least used codes, for `clustering`.

        The released code finds it for all K codes, which costs a second N×K search and changes
        nothing: a is zero but for the least used.
        """
        least_used = self._least_used()[1]
        out = z.new_zeros(least_used.shape[0], self.code_dim + 2)
        if z.shape[0] > 0:
            kept = weight > 0
            first = z.index_select(0, kept.int().argmax()[None])
            z = torch.where(kept[:, None], z, first)  # a duplicate changes no maximum
            bias = None if dot else z.square().sum(dim=1).mul_(-0.5)
            score, row = best_scores(codes[least_used], z, bias)
            out[:, :-2] = z[row]
            out[:, -2] = score
            out[:, -1] = kept.any()
        return out

    def _least_used(self) -> tuple[Tensor, Tensor]:
        return self.counts.topk(self.num_candidates, largest=False)

    # ------------------------------------------------------------------ once per step, all ranks

    @torch.no_grad()
    def update(self) -> bool:
        """Fold this step's sums, over all ranks, into the averages; False if there are none."""
        if not self.observed:
            return False
        if self.revival == "clustering":  # whom `_nearest_rows` has served
            self.candidate_ids = self._least_used()[1]
        step_counts = all_reduce_sum(self.step_counts)
        total = step_counts.sum()
        unit = self.num_codes / total.clamp(min=1)
        rate = (1 - self.decay) * (total > 0)  # a step without any token changes nothing
        self.counts.lerp_(step_counts * unit, rate)
        step_counts.zero_()
        if self.step_sums is not None:
            step_sums = all_reduce_sum(self.step_sums)
            self.sums.lerp_(step_sums.mul_(unit), rate)
            step_sums.zero_()
        self.step += 1
        self.observed = False
        return True

    def discard(self) -> None:
        """Forget what was observed since the last update."""
        self.step_counts.zero_()
        if self.step_sums is not None:
            self.step_sums.zero_()
        self.observed = False

    def means_into(self, codes: Tensor) -> None:
        """Write the codes `(K, d)` that the averages stand for, with Laplace smoothing."""
        total = self.counts.sum()
        smoothed = (self.counts + _LAPLACE) / (total + self.num_codes * _LAPLACE) * total
        torch.div(self.sums, smoothed[:, None], out=codes)

    @torch.no_grad()
    def revive(
        self,
        codes: Tensor,
        optimizers: Iterable[torch.optim.Optimizer],
        metric: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Give dead rows of `codes` `(K, d)` a new place, the same on every rank.

        The statistics and the optimizer moments of a row go along, or the next update would
        throw it back. At most `num_candidates` codes are served in one call, the least used
        first; shapes do not depend on how many.

        Args:
            codes: the codebook, changed in place.
            optimizers: those that may hold moments of `codes`.
            metric: puts vectors where codes live, on the unit sphere for example.

        Returns:
            The number of codes replaced; for `clustering` the sum of a.
        """
        if self.revival == "none":
            return self.counts.new_zeros(())
        clustering = self.revival == "clustering"
        rows = all_gather_rows(self.candidates)
        if clustering:
            ids = self.candidate_ids
            assert ids is not None
            rows = rows.view(-1, *self.candidates.shape)  # (ranks, C, d + 2)
            score = rows[..., -2].masked_fill(rows[..., -1] == 0, -torch.inf)
            rows = rows.gather(0, score.argmax(0)[None, :, None].expand_as(rows[:1]))[0]
            blend = torch.exp(-10 / (1 - self.decay) * self.counts[ids] - 1e-3) * rows[:, -1]
        else:
            rows = rows[rows[:, -1].argsort(descending=True, stable=True)]
            use, ids = self._least_used()
            rows, ids = rows[: len(ids)], ids[: len(rows)]
            blend = (use[: len(rows)] < self.threshold) * (rows[:, -1] > 0).to(codes.dtype)

        old, share = codes[ids], blend[:, None]
        # Untouched rows are not normalised again.
        codes[ids] = torch.where(share > 0, metric(torch.lerp(old, rows[:, :-2], share)), old)
        if not clustering:
            self.counts[ids] = torch.lerp(self.counts[ids], torch.ones_like(blend), blend)
        if self.averages:
            moved = codes[ids] * self.counts[ids, None]
            self.sums[ids] = torch.where(share > 0, moved, self.sums[ids])
        for optimizer in optimizers:
            for moment in optimizer.state.get(codes, {}).values():
                if isinstance(moment, Tensor) and moment.shape == codes.shape:
                    moment[ids] *= 1 - share
        return blend.sum()
