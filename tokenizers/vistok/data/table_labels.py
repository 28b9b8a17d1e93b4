"""Labels in tables: numbers as they are, texts numbered, all else kept next to the image."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vistok.core.errors import DataError
from vistok.core.files import parse_json

_MOST_CLASSES = 100_000

_MOST = 10**18  # what a `.cls` member may say


@dataclass(frozen=True)
class Labels:
    """What a column of labels means.

    Attributes:
        kind: `numbers`, `texts` (numbered in their sorted order), `others` (kept as JSON), `none`.
        classes: of texts, by their numbers.
    """

    kind: str = "none"
    classes: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def read(self, value: Any) -> tuple[int | None, bytes | None]:
        """Return the class number of a row, and what is kept as its member `label.json`."""
        if value is None or self.kind == "none" or (value != value):
            return None, None
        if self.kind == "others":
            return None, json.dumps(value, default=str).encode()
        if self.kind == "texts":
            return self._numbers[str(value)], None
        number = int(value)
        return (number if number >= 0 else None), None  # -1 says that there is none


def look(batches: Iterator[Iterable[Any]], place: str, column: str) -> Labels:
    """Find out what the values of a column are, by looking at all of them.

    Args:
        batches: of the column's values.
        place: of the table, for messages.
        column: its name.

    Raises:
        DataError: if there are more different texts than classes could be.
    """
    texts: set[str] = set()
    numbers = other = False
    for batch in batches:
        for value in batch:
            if value is None or value != value:
                continue
            if isinstance(value, str):
                texts.add(value)
            elif _is_whole(value):
                numbers = True
            else:
                other = True
        if len(texts) > _MOST_CLASSES:
            raise DataError(
                f"{place}: column {column} holds more than {_MOST_CLASSES} different texts, which"
                " are not classes; name another: label=COLUMN, or none: label=null"
            )
    if other or (texts and numbers):
        return Labels("others")
    if not texts:
        return Labels("numbers" if numbers else "none")
    if all(text.isdecimal() and text.isascii() and int(text) < _MOST for text in texts):
        return Labels("numbers")
    classes = sorted(texts)
    return Labels("texts", classes, {name: number for number, name in enumerate(classes)})


def _is_whole(value: Any) -> bool:
    if isinstance(value, bool | int):
        return abs(value) < _MOST
    return isinstance(value, float) and math.isfinite(value) and value == int(value) < _MOST


def class_names(schema: Any, label: str) -> list[str]:
    """Return the names of classes that Hugging Face's library notes in a table."""
    try:
        info = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = info.get("info", {}).get("features", {}).get(label, {}).get("names", [])
    except (ValueError, AttributeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
