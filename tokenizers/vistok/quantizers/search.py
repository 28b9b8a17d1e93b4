"""Exact search for the best code of each token, without an N×K matrix.

The score is `q·e + bias`. With `bias = −|e|²/2` the highest score is the smallest Euclidean
distance; the constant `|q|²` is left out, so that nothing cancels and small differences between
codes survive in float32. Training, eval and export all use this one function: ids agree.

Scores are computed in blocks of a fixed size, in one reused buffer, and reduced at once. On a
CPU the reduction, not the matrix product, is the slow part: `argmax` over a row costs 15 times
`amax`. So the maximum of every group of 64 scores is taken first, and `argmax` only looks at the
group maxima and inside the winning group. See docs/lab/performance.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from vistok.core.errors import VistokError
from vistok.core.sample_random import uniform

_CPU_SCORES = 1 << 22  # scores per block: 16 MiB of float32, in the shared cache

_GPU_SCORES = 1 << 25  # 128 MiB: few launches

_COLUMNS = 8192  # codes per block

_GROUP = 64


@torch.no_grad()
def best_codes(queries: Tensor, codebook: Tensor, bias: Tensor | None = None) -> Tensor:
    """Index of the code with the highest score `q·e + bias` for each query.

    Args:
        queries: `(N, d)` float32.
        codebook: `(K, d)` float32.
        bias: `(K,)` float32 or None for 0.

    Returns:
        `(N,)` int64; on a CPU the lowest index among equal scores.

    Raises:
        VistokError: if a score is NaN or infinite (not checked under torch.compile).
    """
    return best_scores(queries, codebook, bias)[1]


@torch.no_grad()
def best_scores(
    queries: Tensor, codebook: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Like `best_codes`, but returns `(scores (N,), indices (N,))`."""
    best = queries.new_full((queries.shape[0],), -torch.inf)
    index = torch.zeros(queries.shape[0], dtype=torch.long, device=queries.device)
    for block, first, scores in _score_blocks(queries, codebook, bias):
        score, code = _row_max(scores)
        # A later block wins only if strictly better, which keeps the lowest index; NaN wins
        # and stays, to be found below.
        better = (score > best[block]) | score.isnan()
        index[block] = torch.where(better, code + first, index[block])
        best[block] = torch.where(better, score, best[block])
    _check_finite(best)
    return best, index


@torch.no_grad()
def sampled_codes(
    queries: Tensor, codebook: Tensor, bias: Tensor | None, temperature: float
) -> Tensor:
    """Index of one code for each query, drawn with probability softmax(score / temperature).

    A block of codes draws one of its own and then takes the place of the code drawn before with
    the probability that its share of the sum so far gives it. So two random numbers do for a
    block; noise for every score would take ten times as long as the rest.

    Args and errors as in `best_codes`.
    """
    num_queries = queries.shape[0]
    top = queries.new_full((num_queries,), -torch.inf)
    total = queries.new_zeros(num_queries)
    index = torch.zeros(num_queries, dtype=torch.long, device=queries.device)
    draws = uniform((num_queries, 2 * len(_column_blocks(codebook.shape[0]))), queries.device)
    scaled = None if bias is None else bias / temperature
    for block, first, scores in _score_blocks(queries / temperature, codebook, scaled):
        number = -(-first // _COLUMNS) * 2  # of the block of codes, twice
        new_top = torch.maximum(top[block], scores.amax(dim=1))
        # exp(−60) is nothing next to a sum of at least 1, and farther down floats are denormal,
        # with which everything takes many times as long.
        weights = scores.sub_(new_top[:, None]).clamp_(min=-60).exp_()
        weight, code = _row_sample(weights, draws[block, number])
        new_total = total[block] * (top[block] - new_top).exp() + weight
        taken = draws[block, number + 1] * new_total < weight
        index[block] = torch.where(taken, code + first, index[block])
        total[block], top[block] = new_total, new_top
    _check_finite(total)
    return index


def code_bias(codebook: Tensor) -> Tensor:
    """The `−|e|²/2` `(K,)` that makes the highest score the smallest Euclidean distance."""
    return -0.5 * torch.linalg.vector_norm(codebook, dim=1).square()


def _check_finite(scores: Tensor) -> None:
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(scores).all()):
        raise VistokError("the codebook or the latents contain NaN or inf: no nearest code exists")


def _score_blocks(
    queries: Tensor, codebook: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, int, Tensor]]:
    """Blocks of scores: their queries, their first code, and `(R, C)`, free to be overwritten."""
    num_queries, num_codes = queries.shape[0], codebook.shape[0]
    if bias is not None:
        # The bias rides along as one more dimension: cheaper than adding it to every score.
        queries = torch.cat([queries, queries.new_ones(num_queries, 1)], dim=1)
    block_scores = _CPU_SCORES if queries.device.type == "cpu" else _GPU_SCORES
    columns = min(_COLUMNS, num_codes)
    rows = max(1, min(block_scores // columns, num_queries))
    # A fresh buffer per block would be mapped and zeroed by the kernel each time.
    compiling = torch.compiler.is_compiling()
    buffer = None if compiling else queries.new_empty(rows * columns)
    for first, last in _column_blocks(num_codes):
        table = codebook[first:last]
        if bias is not None:
            table = torch.cat([table, bias[first:last, None]], dim=1)
        # The number of queries is not known in a graph that is exported for batches of any size.
        exporting = torch.compiler.is_exporting()
        for start in (0,) if exporting else range(0, num_queries, rows):
            block = slice(None) if exporting else slice(start, start + rows)
            yield block, first, _product(queries[block], table, buffer)


def _column_blocks(num_codes: int) -> list[tuple[int, int]]:
    """Ranges of codes whose lengths are multiples of the group, and one for the rest."""
    whole = num_codes - num_codes % _GROUP
    edges = [*range(0, whole, _COLUMNS), whole, num_codes]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def _product(queries: Tensor, table: Tensor, buffer: Tensor | None) -> Tensor:
    if buffer is None:
        return queries @ table.t()
    shape = queries.shape[0], table.shape[0]
    return torch.mm(queries, table.t(), out=buffer[: shape[0] * shape[1]].view(shape))


def _row_max(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row and its first position; NaN if the row has one."""
    rows, columns = scores.shape
    if scores.device.type != "cpu" or columns % _GROUP:
        return scores.max(dim=1)
    groups = scores.view(rows, columns // _GROUP, _GROUP)
    best, group = groups.amax(dim=2).max(dim=1)
    winner = groups.gather(1, group[:, None, None].expand(rows, 1, _GROUP)).squeeze(1)
    return best, winner.argmax(dim=1).add_(group * _GROUP)


def _row_sample(weights: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of each row, and a position drawn in proportion to the weights.

    First a group, then one of its members: running sums over a whole row would take long.
    """
    rows, columns = weights.shape
    size = columns if columns % _GROUP else _GROUP
    groups = weights.view(rows, columns // size, size)
    sums = groups.sum(dim=2).cumsum(dim=1)
    total = sums[:, -1]
    goal = draws * total
    group = torch.searchsorted(sums, goal[:, None], right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(group > 0, sums.gather(1, (group - 1).clamp(min=0)), 0.0)
    members = groups.gather(1, group[..., None].expand(rows, 1, size)).squeeze(1).cumsum(dim=1)
    place = torch.searchsorted(members, goal[:, None] - before, right=True)
    return total, (group * size + place.clamp_(max=size - 1)).squeeze(1)
