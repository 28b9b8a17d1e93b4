"""Tell whose released weights a file holds, by the names and shapes of its tensors."""

from __future__ import annotations

from typing import Any

from vistok.core.errors import CheckpointError, VistokError
from vistok.core.registry import registered
from vistok.core.released_weights import Published


def recognize(published: Published) -> str:
    """Return the name of the importer that a file is for, and print why.

    Families say what marks their files. A file with one family's mark is that family's; else every
    importer tries, and the one that takes every tensor is right.

    Raises:
        CheckpointError: if none does, or several do.
    """
    importers = registered("importer")
    marked = [name for name, importer in importers.items() if _marks(importer, published)]
    if len(marked) == 1:
        print(f"source=auto: {marked[0]}, for it has {importers[marked[0]].mark.why}")
        return marked[0]
    tried = {name: attempt(published, importers[name]) for name in marked or importers}
    fitting = [name for name, left in tried.items() if left == 0]
    if len(fitting) == 1:
        print(f"source=auto: {fitting[0]}, for every tensor has a place there")
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"source=auto: several families fit, {', '.join(fitting)}; name one of them"
        )
    nearest = min(tried, key=lambda name: tried[name])
    raise CheckpointError(
        f"source=auto: no known family takes all tensors; the nearest is source={nearest}, where "
        f"{tried[nearest]} of {len(published.left)} have no place"
    )


def family_of(published: Published) -> str | None:
    """Return the importer that a file is for, by its mark or as the only one that fits; or None."""
    importers = registered("importer")
    marked = [name for name, each in importers.items() if _marks(each, published)]
    fitting = [n for n in marked or importers if attempt(published, importers[n]) == 0]
    return fitting[0] if len(fitting) == 1 else None


def attempt(published: Published, importer: Any) -> int:
    """Return how many tensors an importer has no place for; more than 0 if it misses one."""
    trial = published.copy()
    try:
        importer(trial, None)
    except (VistokError, RuntimeError, ValueError, ArithmeticError, LookupError):
        # It has not come to its end: what it had not asked for yet counts as without a place.
        return max(1, len(trial.left))
    return len(trial.left)


def _marks(importer: Any, published: Published) -> bool:
    mark = getattr(importer, "mark", None)
    return mark is not None and mark.test(published)
