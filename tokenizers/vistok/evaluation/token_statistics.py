"""Entropies of ids, and how well one or two of them predict the next: what a prior must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Strengths of the smoothing that are tried; the best one is told, in favour of the baseline.
_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def token_statistics(
    train: Sequence[np.ndarray], val: Sequence[np.ndarray], sizes: Sequence[int]
) -> dict[str, float]:
    """Return entropies of training ids and what simple models of them say of validation ids.

    All in nats per token, summed over its streams, each of which is taken by itself.

    Args:
        train: `(n, Q)` ids of each image.
        val: likewise.
        sizes: number of codes of each stream.

    Returns:
        `unigram_entropy` and `bigram_entropy`: of the frequencies of training ids, alone and given
        the one before in the image (the first given nothing). Plug-in estimates: with few ids for
        the number of codes that of pairs is far too low, so no model reaches it.
        `unigram_nll` and `bigram_nll`: what smoothed tables of the training ids give validation
        ids, with the strength that suits these best. A prior that has learned more than pairs of
        neighbours is below `bigram_nll`.
    """
    totals: dict[str, float] = {}
    for stream, size in enumerate(sizes):
        pairs = [_pairs([ids[:, stream] for ids in images]) for images in (train, val)]
        for name, value in _of_stream(*pairs[0], *pairs[1], size).items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def _pairs(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return each id and the one before it, -1 at the start of an image."""
    ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    before = np.empty_like(ids)
    before[1:] = ids[:-1]
    starts = np.cumsum([0, *(len(row) for row in rows)])[:-1]
    before[starts[starts < len(before)]] = -1
    return ids, before


def _of_stream(
    ids: np.ndarray, before: np.ndarray, val: np.ndarray, val_before: np.ndarray, size: int
) -> dict[str, float]:
    counts = np.bincount(ids, minlength=size).astype(np.float64)
    keys, pair_counts = np.unique((before + 1) * size + ids, return_counts=True)
    contexts = np.bincount(before + 1, minlength=size + 1).astype(np.float64)
    total = float(len(ids))
    unigram_entropy = -_xlogx(counts / total).sum()
    joint = -_xlogx(pair_counts / total).sum()
    bigram_entropy = joint + _xlogx(contexts / total).sum()
    unigram_nll = min(
        -np.log((counts + a) / (total + a * size))[val].mean() for a in (0.01, 0.1, 0.5, 1.0)
    )
    smooth = (counts + 0.1) / (total + 0.1 * size)
    wanted = (val_before + 1) * size + val
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    seen = np.where(keys[found] == wanted, pair_counts[found], 0).astype(np.float64)
    context = contexts[val_before + 1]
    bigram_nll = min(-np.log((seen + s * smooth[val]) / (context + s)).mean() for s in _STRENGTHS)
    return {
        "unigram_entropy": float(unigram_entropy),
        "bigram_entropy": float(bigram_entropy),
        "unigram_nll": float(unigram_nll),
        "bigram_nll": float(bigram_nll),
    }


def _xlogx(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1.0))
