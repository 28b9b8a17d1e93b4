"""Exact search for the best code of each token, without an N×K matrix.

The score is `q·e + bias`. With `bias = −|e|²/2` the highest score is the smallest Euclidean
distance; the constant `|q|²` is left out, so that nothing cancels and small differences between
codes survive in float32. Training, eval and export all use this one function: ids agree.

Scores are computed in blocks of a fixed size, in one reused buffer, and reduced at once. On a
CPU the reduction, not the matrix product, is the slow part: `argmax` over a row costs 15 times
`amax`. So the maximum of every group of 64 scores is taken first, and `argmax` only looks at the
group maxima and inside the winning group. See docs/performance.md.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vistok.errors import VistokError

_CPU_SCORES = 1 << 22  # scores per block: 16 MiB of float32, in the shared cache
_GPU_SCORES = 1 << 25  # 128 MiB: few launches
_COLUMNS = 8192  # codes per block
_GROUP = 64


@torch.no_grad()
def best_codes(
    queries: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    temperature: float | None = None,
) -> Tensor:
    """Index of the code with the highest score `q·e + bias` for each query.

    Args:
        queries: `(N, d)` float32.
        codebook: `(K, d)` float32.
        bias: `(K,)` float32 or None for 0.
        temperature: None for the highest score; else sample a code with probability
            softmax(score / temperature).

    Returns:
        `(N,)` int64; on a CPU the lowest index among equal scores.

    Raises:
        VistokError: if a score is NaN or infinite (not checked under torch.compile).
    """
    return best_scores(queries, codebook, bias, temperature)[1]


@torch.no_grad()
def best_scores(
    queries: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Like `best_codes`, but returns `(scores (N,), indices (N,))`."""
    num_queries, num_codes = queries.shape[0], codebook.shape[0]
    if bias is not None:
        # The bias rides along as one more dimension: cheaper than adding it to every score.
        queries = torch.cat([queries, queries.new_ones(num_queries, 1)], dim=1)
    best = queries.new_full((num_queries,), -torch.inf)
    index = torch.zeros(num_queries, dtype=torch.long, device=queries.device)

    block_scores = _CPU_SCORES if queries.device.type == "cpu" else _GPU_SCORES
    columns = min(_COLUMNS, num_codes)
    rows = max(1, min(block_scores // columns, num_queries))
    # A fresh buffer per block would be mapped and zeroed by the kernel each time.
    compiling = torch.compiler.is_compiling()
    buffer = None if compiling else queries.new_empty(rows * columns)

    for first, last in _column_blocks(num_codes, columns):
        table = codebook[first:last]
        if bias is not None:
            table = torch.cat([table, bias[first:last, None]], dim=1)
        for start in range(0, num_queries, rows):
            block = slice(start, start + rows)
            scores = _product(queries[block], table, buffer)
            if temperature is not None:  # the Gumbel-max trick
                scores = scores / temperature - torch.empty_like(scores).exponential_().log_()
            score, code = _row_max(scores)
            # A later block wins only if strictly better, which keeps the lowest index; NaN wins
            # and stays, to be found below.
            better = (score > best[block]) | score.isnan()
            index[block] = torch.where(better, code + first, index[block])
            best[block] = torch.where(better, score, best[block])

    if not compiling and not bool(torch.isfinite(best).all()):
        raise VistokError("the codebook or the latents contain NaN or inf: no nearest code exists")
    return best, index


def code_bias(codebook: Tensor) -> Tensor:
    """The `−|e|²/2` `(K,)` that makes the highest score the smallest Euclidean distance."""
    return -0.5 * torch.linalg.vector_norm(codebook, dim=1).square()


def _column_blocks(num_codes: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of codes whose lengths are multiples of the group, and one for the rest."""
    whole = num_codes - num_codes % _GROUP
    edges = [*range(0, whole, columns), whole, num_codes]
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
