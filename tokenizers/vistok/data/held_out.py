"""Samples by their names: which are held out, and the identity of all of them."""

from __future__ import annotations

import hashlib

import numpy as np

from vistok.core.errors import ConfigError, DataError
from vistok.data.sources import Source


def hold_out(
    source: Source, fraction: float, key: str = "data.val_fraction", rule: int = 2
) -> np.ndarray:
    """Choose samples for validation by a hash of their keys: `(N,)` bool.

    The choice depends on no seed and no other sample, so it stands when images are added. Of
    samples of one key, as of shards whose numbers all begin anew, each is chosen for itself, by its
    number among them. At least one sample is chosen, and at least one left.

    Args:
        source: of the samples.
        fraction: of them.
        key: the configuration key, for messages.
        rule: 1 keeps samples of one key together, as runs from before did.

    Raises:
        ConfigError: if the fraction is not in (0, 1).
        DataError: if there are fewer than two samples.
    """
    if not 0 < fraction < 1:
        raise ConfigError(
            f"{key}={fraction}: must be above 0 and below 1 while data.val is not set"
        )
    if len(source) < 2:
        raise DataError(
            f"{source.name} has only one image; training and validation need two, or set data.val"
        )
    digests = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in source.keys)
    hashes = np.frombuffer(digests, dtype="<u8")
    if rule > 1:
        hashes = _apart(hashes)
    chosen = hashes < np.uint64(fraction * 2**64)
    if not chosen.any():
        chosen[np.argmin(hashes)] = True
    if chosen.all():
        chosen[np.argmax(hashes)] = False
    return chosen


def _apart(hashes: np.ndarray) -> np.ndarray:
    """Return other hashes for all but the first of each that comes again."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]]
    if first.all():
        return hashes
    places = np.arange(len(hashes))
    number = np.empty(len(hashes), dtype="<u8")
    number[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    hashes = hashes.copy()
    for place in np.flatnonzero(number):
        what = hashes[place].tobytes() + number[place].tobytes()
        hashes[place] = int.from_bytes(hashlib.blake2b(what, digest_size=8).digest(), "little")
    return hashes


def fingerprint(source: Source) -> str:
    """Return the identity of a source's samples and their order, independent of its place."""
    digest = hashlib.sha256()
    for part in (source.shard_sizes, source.sizes, source.keys):
        digest.update(f"{part.dtype} {len(part)} ".encode())
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]
