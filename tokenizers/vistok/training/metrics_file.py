"""`metrics.jsonl`: every logged number, in a file that survives a kill at any moment.

Each row is a line of JSON, which is appended once and never touched again, so that a kill can cut
the last line short and nothing else. Lightning's CSVLogger deletes the file when a run goes on in
its folder, and writes all of it anew, in place, when a further column appears.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from vistok.core.errors import VistokError
from vistok.core.files import parse_json
from vistok.core.ranks import is_first_process
from vistok.training.lightning_internals import row_to_log


class MetricsFile(Logger):
    """Lightning's way to `metrics.jsonl`; a resumed run goes on below the rows that still hold.

    A row that is logged again (same step, same names) is left out: a resume repeats the validation
    that followed its checkpoint.

    Args:
        folder: of the run.
        first_step: rows of later steps are dropped, for they come again.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__()
        self.path = folder / "metrics.jsonl"
        self.first_step = first_step
        self._begun = False
        self._latest = -1  # step of the last row
        self._written: set[frozenset[str]] = set()  # names in each row of that step

    @property
    def name(self) -> None:
        """None: the folder is enough."""

    @property
    def version(self) -> None:
        """None: the folder is enough."""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` has them."""

    @property
    def experiment(self) -> Path:
        """The file."""
        return self.path

    def begin(self) -> Path:
        """Drop the rows that come again (rank 0), before the first one is written.

        Not earlier: a resume that is refused leaves the file as it was.
        """
        if not self._begun and is_first_process():
            self._begun = True
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                file.seek(0)
                end = 0
                for row, after in whole_rows(file):
                    if row["step"] > self.first_step:
                        break
                    self._is_new(row)
                    end = after
                file.truncate(end)
        return self.path

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row, unless it is there."""
        path, row = self.begin(), {"step": step or 0, **metrics}
        if self._is_new(row):
            with _appending(path) as file:
                file.write(json.dumps(row).encode() + b"\n")

    def _is_new(self, row: dict[str, float]) -> bool:
        """Take note of a row; rows come in the order of their steps."""
        if row["step"] != self._latest:
            self._latest, self._written = int(row["step"]), set()
        names = frozenset(row)
        new = names not in self._written
        self._written.add(names)
        return new

    @rank_zero_only
    def log_early(self, trainer: L.Trainer) -> None:
        """Write the row of the step that just ended, and wait until it is on the disk.

        Lightning logs behind the callbacks. A checkpoint must not be there before the row of its
        step: a resume would never write it.
        """
        if row := row_to_log(trainer):
            step = int(row.pop("step", trainer.global_step))
            self.log_metrics(row, step)
        with _appending(self.begin()) as file:
            os.fsync(file.fileno())


@contextmanager
def _appending(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "ab") as file:
            yield file
    except OSError as error:
        raise VistokError(f"{path}: could not be written, {error.strerror}") from error


def whole_rows(lines: Iterable[bytes]) -> Iterator[tuple[dict[str, float], int]]:
    """Return the rows of a `metrics.jsonl`, each with the place of its end, up to any torn line."""
    end = 0
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(row, dict) or "step" not in row:
            return
        end += len(line)
        yield row, end
