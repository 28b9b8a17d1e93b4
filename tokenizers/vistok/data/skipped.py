"""Account of the images that could not be used."""

from __future__ import annotations

import logging
from collections.abc import Iterable

log = logging.getLogger(__name__)


class SkippedImages(dict[str, str]):
    """Key to reason, each key once, however often it was met."""

    def record(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Add a batch's (key, reason) pairs; logs the first few and then ever fewer."""
        for key, reason in skipped:
            if key not in self:
                self[key] = reason
                if len(self) <= 5 or str(len(self)).strip("0") == "1":  # 1 to 5, 10, 100, ...
                    log.warning("skipped image %s (%s); %d so far", key, reason, len(self))

    def report(self) -> str:
        """One line; empty if there are none."""
        if not self:
            return ""
        listed = [f"{key} ({reason})" for key, reason in list(self.items())[:3]]
        more = f" and {len(self) - 3} more" if len(self) > 3 else ""
        noun = "image" if len(self) == 1 else "images"
        return f"skipped {len(self)} {noun}: {', '.join(listed)}{more}"
