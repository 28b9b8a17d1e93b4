"""`metrics.csv`: every logged number, in a file that survives a kill at any moment."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from vistok.core.files import replacing
from vistok.core.ranks import is_first_process
from vistok.training.lightning_internals import row_to_log


class ContinuedCSVLogger(CSVLogger):
    """`metrics.csv` in the run folder; a resumed run goes on below the rows that still hold.

    Lightning's own logger deletes the file when a run starts in the same folder, and rewrites it
    in place when a new column appears.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__(str(folder.parent), name=folder.name, version="")
        self.first_step = first_step

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` has them."""

    @property
    def experiment(self) -> Any:
        """The writer, which begins with the earlier rows (on rank 0)."""
        if self._experiment is None and is_first_process():
            path = Path(self.log_dir) / "metrics.csv"
            self._experiment = Rows(path, self.first_step)  # pyright: ignore
        return super().experiment

    @rank_zero_only
    def log_early(self, trainer: L.Trainer) -> None:
        """Write the row of the step that just ended, which Lightning does after the callbacks.

        A checkpoint must not be there before the row of its step: a resume would never write it.
        """
        if row := row_to_log(trainer):
            step = int(row.pop("step", trainer.global_step))
            self.experiment.log_metrics(row, step)
            self.experiment.save()


class Rows:
    """Rows on disk and those to be written.

    A row that is logged again (same step, same columns) is left out: a resume repeats the
    validation that followed its checkpoint.

    Args:
        path: of the file.
        first_step: rows of later steps are dropped, for they come again.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        self.columns: list[str] = []
        self.metrics: list[dict[str, Any]] = []  # not yet in the file
        self.known: set[tuple[int, frozenset[str]]] = set()
        rows = read_rows(path, first_step)
        for row in rows:
            values = {name: value for name, value in row.items() if value not in ("", None)}
            self.known.add((int(row["step"]), frozenset(values)))
        if rows:
            self.columns = sorted(rows[0])
            self._rewrite(rows)
        else:
            path.unlink(missing_ok=True)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Take a row."""
        row = {name: getattr(value, "item", lambda v=value: v)() for name, value in metrics.items()}
        row["step"] = 0 if step is None else step
        key = row["step"], frozenset(row)
        if key not in self.known:
            self.known.add(key)
            self.metrics.append(row)

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Nothing."""

    def save(self) -> None:
        """Append the new rows, or write all anew if there are new columns."""
        if not self.metrics:
            return
        columns = sorted({*self.columns, *(name for row in self.metrics for name in row)})
        if columns != self.columns:
            rows = read_rows(self.path, None)
            self.columns = columns
            self._rewrite([*rows, *self.metrics])
        else:
            with open(self.path, "a", newline="") as file:
                file.write(self._text(self.metrics))
        self.metrics = []

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            file.write((",".join(self.columns) + "\n" + self._text(rows)).encode())

    def _text(self, rows: list[dict[str, Any]]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue()


def read_rows(path: Path, last_step: int | None) -> list[dict[str, Any]]:
    """Rows up to a step; a row that was cut short when the run ended is left out."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.DictReader(io.StringIO(whole)))
    kept = [r for r in rows if (r.get("step") or "").isdecimal() and None not in r.values()]
    return [r for r in kept if last_step is None or int(r["step"]) <= last_step]
