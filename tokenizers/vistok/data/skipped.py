"""Account of the images that could not be used."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vistok.core.errors import DataError
from vistok.core.terminal import counted

log = logging.getLogger(__name__)

# Before so many images were met, and so many of them bad, a share says little.
JUDGED_AFTER, JUDGED_FROM = 1000, 10


class Skip(NamedTuple):
    """One image that cannot be used."""

    key: str
    reason: str
    cause: str  # the kind of reason


class SkippedImages(dict[str, str]):
    """Key to reason, each key once, however often it was met.

    Args:
        max_share: of the images met that may be skipped; 1 for any.

    Attributes:
        causes: how many keys there are of each cause.
        cause_of: the cause of each key of training, and `met_in_training`: what checkpoints keep.
        met: images asked for so far, those skipped among them.
        total: images that there are, so that later epochs do not dilute the share; None if
            that is not known.
        file: where each key is written as one line (key, cause, reason; by tabs), also those met
            before it was set; None for nowhere.
    """

    def __init__(self, max_share: float = 1.0):
        super().__init__()
        self.max_share, self.met = max_share, 0
        self.total: int | None = None
        self.causes: Counter[str] = Counter()
        self.cause_of: dict[str, str] = {}
        self.met_in_training = 0
        self.file: Path | None = None
        self._unwritten: list[Skip] = []

    def record(self, skipped: Iterable[Skip], met: int = 0, training: bool = True) -> None:
        """Add those of a batch, and log the first few and then ever fewer.

        Args:
            skipped: of the batch.
            met: images that the batch has, without those skipped.
            training: a batch of the training stream. Others come again when a run is resumed.

        Raises:
            DataError: if the share of bad images is above the one allowed.
        """
        new = [skip for skip in {s.key: s for s in skipped}.values() if skip.key not in self]
        self.met += met + len(new)
        if training:
            self.met_in_training += met + len(new)
            self.cause_of |= {skip.key: skip.cause for skip in new}
        for skip in new:
            self[skip.key] = skip.reason
            self.causes[skip.cause] += 1
            if len(self) <= 5 or str(len(self)).strip("0") == "1":  # 1 to 5, 10, 100, ...
                log.warning("skipped image %s (%s); %d so far", skip.key, skip.reason, len(self))
        self._unwritten += new
        if self._unwritten and self.file is not None:
            self._write()
        different = min(self.met, self.total or self.met)
        if (
            self.met >= JUDGED_AFTER
            and len(self) >= JUDGED_FROM
            and len(self) > self.max_share * different
        ):
            key, reason = list(self.items())[-1]
            raise DataError(
                f"{len(self)} of {different} images cannot be used, more than"
                f" data.max_skipped_share={self.max_share:g} allows ({self._counts()}; the last is"
                f" {key}: {reason})"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the part of this process's account that a checkpoint keeps."""
        images = [[key, self[key], cause] for key, cause in self.cause_of.items()]
        return {"met": self.met_in_training, "images": images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add the account of `state_dict`, which was written to the file then."""
        self.met += state["met"]
        self.met_in_training += state["met"]
        for key, reason, cause in state["images"]:
            if key not in self:
                self[key], self.cause_of[key] = reason, cause
                self.causes[cause] += 1

    def _write(self) -> None:
        lines = [
            "\t".join((skip.key, skip.cause, " ".join(skip.reason.split()))) + "\n"
            for skip in self._unwritten
        ]
        try:
            with open(self.file or "", "a", encoding="utf-8", errors="replace") as file:
                file.writelines(lines)
        except OSError as error:  # an account that cannot be written does not end the run
            log.warning("cannot write %s: %s", self.file, error.strerror)
            self.file = None
        self._unwritten = []

    def _counts(self) -> str:
        return ", ".join(f"{count} {cause}" for cause, count in self.causes.most_common())

    def report(self) -> str:
        """Return one line; empty if there are none."""
        if not self:
            return ""
        listed = [f"{key} ({reason})" for key, reason in list(self.items())[:3]]
        more = f" and {len(self) - 3} more" if len(self) > 3 else ""
        return f"skipped {counted(len(self), 'image')}: {self._counts()}; {', '.join(listed)}{more}"
