"""Statistics of the ids themselves: entropies, Zipf's law, n-grams, compressibility, effects."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.core import ranks
from vistok.models.tokenizer import Tokenizer

#: The longest n-grams that are counted.
LONGEST = 4

#: A rank takes part in the fit of Zipf's law if its n-gram came at least as often.
ZIPF_LEAST = 5


class TokenSample:
    """Keeps the ids of the first images of a set, whichever rank sees them.

    Args:
        limit: images whose ids are kept, at most; memory is theirs.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: dict[int, tuple[Tensor, int]] = {}

    def update(self, numbers: Sequence[int], indices: Tensor, labels: Sequence[int]) -> None:
        """Take in a batch of ids `(B, N, Q)`, with the places of their images and their classes."""
        for number, ids, label in zip(numbers, indices, labels, strict=True):
            if number < self.limit:
                self.kept[number] = ids.to("cpu", torch.int32, copy=True), label

    def gathered(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ids `(M, N, Q)` and labels `(M,)` of all ranks, in the order of the set."""
        kept = {n: row for part in ranks.gather(self.kept) for n, row in part.items()}
        rows = [kept[number] for number in sorted(kept)]
        if not rows:
            return np.zeros((0, 0, 0), dtype=np.int64), np.zeros(0, dtype=np.int64)
        ids = torch.stack([row for row, _ in rows]).long().numpy()
        return ids, np.array([label for _, label in rows])

    def state_dict(self) -> dict[str, Any]:
        """Return what was kept."""
        return {"kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.kept = dict(state["kept"])


# ---------------------------------------------------------------------- statistics


def statistics_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what statistics of ids, effects and the probe depend on, of the group `eval`."""
    return {
        "images": settings["code_images"],
        "longest_ngram": LONGEST,
        "zipf_least": ZIPF_LEAST,
        "effect_images": settings["effect_images"],
        "probe": bool(settings["probe"]),
    }


def statistics(ids: np.ndarray, sizes: Sequence[int]) -> dict[str, Any]:
    """Return statistics of ids.

    Entropies are plug-in estimates in bits: with few tokens for each code they are too low, by
    about (codes used - 1) / (2 ln 2 · tokens), so they are given with the tokens they are of.

    Args:
        ids: `(M, N, Q)`; -1 is absent.
        sizes: number of codes of each slot.

    Returns:
        `images`, `tokens` (of a slot), `usage_expected` (the usage that uniform codes would have
        with as many tokens), `position_entropy` (N values, the mean over slots), `zipf` and
        `ngrams` by n (of slot 0), `innovation` (images seen, distinct codes), `frequencies`
        (rank, count) of slot 0, and `compression`.
    """
    images, length, slots = ids.shape
    if not images:
        return {}
    tokens = images * length
    result: dict[str, Any] = {
        "images": images,
        "tokens": tokens,
        "usage_expected": float(np.mean([1 - (1 - 1 / size) ** tokens for size in sizes])),
        "entropy": float(np.mean([_entropy(_counts(ids[..., q])) for q in range(slots)])),
        "position_entropy": [
            float(np.mean([_entropy(_counts(ids[:, n, q])) for q in range(slots)]))
            for n in range(length)
        ],
    }
    first = ids[..., 0]
    grams = {n: _ngrams(first, sizes[0], n) for n in range(1, min(LONGEST, length) + 1)}
    blocks = {n: _entropy(counts) for n, counts in grams.items()}
    result["ngrams"] = {
        str(n): {
            "distinct": len(counts),
            "count": int(counts.sum()),
            "entropy": blocks[n],
            "conditional_entropy": blocks[n] - blocks.get(n - 1, 0.0),
        }
        for n, counts in grams.items()
    }
    result["zipf"] = {str(n): zipf(counts) for n, counts in grams.items()}
    result["frequencies"] = _thinned(np.sort(grams[1])[::-1])
    result["innovation"] = _innovation(first)
    result["compression"] = compression(ids, sizes)
    return result


def _counts(ids: np.ndarray) -> np.ndarray:
    flat = ids[ids >= 0]
    counts = np.bincount(flat.reshape(-1)) if flat.size else np.zeros(0, dtype=np.int64)
    return counts[counts > 0]


def _entropy(counts: np.ndarray) -> float:
    p = counts / max(counts.sum(), 1)
    return float(-(p * np.log2(p)).sum()) + 0.0


def _ngrams(ids: np.ndarray, size: int, n: int) -> np.ndarray:
    """Return how often each n-gram within an image came, `(distinct,)`."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, n, axis=1).reshape(-1, n)
    windows = windows[(windows >= 0).all(axis=1)]
    if size**n < 2**62:  # one number for each
        keys = windows @ (size ** np.arange(n, dtype=np.int64))
        return np.unique(keys, return_counts=True)[1]
    return np.unique(windows, axis=0, return_counts=True)[1]


def zipf(counts: np.ndarray) -> dict[str, float] | None:
    """Fit frequency = constant · rank^-slope by least squares on logarithms.

    Returns:
        `slope` (1 in Zipf's law), `r2` and `ranks`, how many took part; None for fewer than 3.
    """
    ordered = np.sort(counts)[::-1]
    ordered = ordered[ordered >= ZIPF_LEAST]
    if len(ordered) < 3:
        return None
    x, y = np.log(np.arange(1, len(ordered) + 1)), np.log(ordered)
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(((y - slope * x - intercept) ** 2).sum()) / spread if spread else 1.0
    return {"slope": float(-slope), "r2": r2, "ranks": len(ordered)}


def _thinned(ordered: np.ndarray, most: int = 200) -> list[list[int]]:
    """Return (rank, count) pairs, evenly spread over the logarithm of the rank."""
    places = np.unique(np.geomspace(1, len(ordered), most).round().astype(int)) - 1
    return [[int(place) + 1, int(ordered[place])] for place in places]


def _innovation(ids: np.ndarray, most: int = 60) -> list[list[int]]:
    """Return (images seen, distinct codes so far) pairs."""
    flat = ids.reshape(-1)
    codes, first = np.unique(flat, return_index=True)
    image = np.sort(first[codes >= 0] // ids.shape[1])
    seen = np.unique(np.geomspace(1, len(ids), most).round().astype(int))
    return [[int(k), int(np.searchsorted(image, k))] for k in seen]


def compression(ids: np.ndarray, sizes: Sequence[int]) -> dict[str, float]:
    """Return what zlib saves on bit-packed ids, next to the same ids in random order.

    Returns:
        `packed_bytes` of all ids at ceil(log2 K) bits each, and `zlib` and `shuffled_zlib`, the
        compressed sizes as shares of it. A share that only the right order has is structure
        between tokens; one that both have is that of their frequencies.
    """
    packed = _packed(ids, sizes)
    rng = np.random.default_rng(0)
    mixed = rng.permutation(ids.reshape(-1, ids.shape[2]), axis=0).reshape(ids.shape)
    shuffled = _packed(mixed, sizes)
    return {
        "packed_bytes": len(packed),
        "zlib": len(zlib.compress(packed, 9)) / max(len(packed), 1),
        "shuffled_zlib": len(zlib.compress(shuffled, 9)) / max(len(packed), 1),
    }


def _packed(ids: np.ndarray, sizes: Sequence[int]) -> bytes:
    columns = []
    for slot, size in enumerate(sizes):
        width = max(1, math.ceil(math.log2(size)))
        values = ids[..., slot].reshape(-1, 1).clip(min=0)
        columns.append((values >> np.arange(width - 1, -1, -1)) & 1)
    return np.packbits(np.concatenate(columns, axis=1).astype(np.uint8)).tobytes()


# ---------------------------------------------------------------------- effects


@torch.no_grad()
def effect_maps(
    tokenizer: Tokenizer, indices: Tensor, sampling: Mapping[str, Any], most: int = 64
) -> tuple[list[int], np.ndarray]:
    """Return which token moves which pixels.

    Each token's id is exchanged for another one, drawn uniformly, and the absolute change of the
    reconstruction is averaged over channels and images. One decoding for each image and token.

    Args:
        tokenizer: in eval mode.
        indices: `(B, N, Q)` ids.
        sampling: further arguments of `detokenize`.
        most: tokens to look at; of more, as many are spread evenly.

    Returns:
        The tokens' places `(T,)`, and maps `(T, H, W)` in levels of 255.
    """
    length = indices.shape[1]
    places = sorted({round(p) for p in np.linspace(0, length - 1, min(most, length))})
    generator = torch.Generator().manual_seed(0)
    before = tokenizer.detokenize(indices, **sampling).double()
    maps = []
    for place in places:
        changed = indices.clone()
        for slot, size in enumerate(tokenizer.quantizer.codebook_sizes):
            steps = torch.randint(1, max(size, 2), (len(indices),), generator=generator)
            old = indices[:, place, slot]
            new = (old + steps.to(old.device)) % size
            changed[:, place, slot] = torch.where(old < 0, old, new)
        after = tokenizer.detokenize(changed, **sampling).double()
        maps.append(((after - before).abs().mean(dim=(0, 1)) * 255).cpu().numpy())
    return places, np.stack(maps)
