"""Tell whose released weights a file holds, by the names and shapes of its tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

from vistok.core.errors import CheckpointError, VistokError
from vistok.core.registry import registered
from vistok.core.released_weights import Published, listed

#: What an importer may raise on tensors of another family, or without one.
_FAILED = (VistokError, RuntimeError, ValueError, ArithmeticError, LookupError, TypeError)


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
    tried = {name: misfits(published, importers[name]) for name in marked or importers}
    fitting = [name for name, found in tried.items() if not found]
    if len(fitting) == 1:
        print(f"source=auto: {fitting[0]}, for every tensor has a place there")
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"source=auto: several families fit, {', '.join(fitting)}; name one of them"
        )
    nearest = min(tried, key=lambda name: len(tried[name]))
    if len(tried[nearest]) >= len(published.left):
        raise CheckpointError("source=auto: no known family takes all tensors, and none is near")
    raise CheckpointError(
        f"source=auto: no known family takes all tensors; the nearest is source={nearest}: "
        f"{tried[nearest]}"
    )


def nearest_family(published: Published) -> str | None:
    """Return the importer that takes the most of a file: the one of its mark, if it has one."""
    importers = registered("importer")
    marked = [name for name, each in importers.items() if _marks(each, published)]
    tried = {name: len(misfits(published, importers[name])) for name in marked or importers}
    least = min(tried.values())
    # If several are as near, or all tensors are strange, none is to be named.
    names = [name for name, count in tried.items() if count == least < len(published.left)]
    return names[0] if len(names) == 1 else None


class Misfits(NamedTuple):
    """What keeps a file from being of a family: names of tensors.

    Attributes:
        missing: that the family has and the file does not.
        left: without a place in the family.
        ended: whether the importer came to its end; else there may be more missing, and what it
            had not asked for yet is among `left`.
    """

    missing: list[str]
    left: list[str]
    ended: bool

    def __len__(self) -> int:
        return len(self.missing) + len(self.left) + (not self.ended)

    def __str__(self) -> str:
        rest = "without a place" if self.ended else "not come to"
        return f"missing {listed(self.missing)}; {rest} {listed(self.left)}"


def misfits(published: Published, importer: Any) -> Misfits:
    """Return what keeps a file from being of an importer's family; it is not changed."""
    trial = published.copy(lenient=True)
    try:
        importer(trial, None)
    except _FAILED:
        return Misfits(trial.missing, list(trial.left), False)
    return Misfits(trial.missing, list(trial.left), True)


def _marks(importer: Any, published: Published) -> bool:
    mark = getattr(importer, "mark", None)
    return mark is not None and mark.test(published)
