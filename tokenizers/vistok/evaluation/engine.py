"""The loop of an evaluation: every image once, with a progress bar, going on after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vistok.core import ranks
from vistok.core.console import console, say
from vistok.core.files import replacing
from vistok.evaluation.codes import TokenSample
from vistok.evaluation.measure import Measurement
from vistok.evaluation.pairs import PairSource
from vistok.evaluation.results import Rows
from vistok.evaluation.robustness import Robustness


class Progressing:
    """The state of an evaluation of this rank, on the disk from time to time.

    Args:
        folder: where the file of each rank lies.
        identity: what the evaluation is of; a state of another one is not taken up.
        seconds: between two writes, at least.
    """

    def __init__(self, folder: Path, identity: str, seconds: float) -> None:
        self.path = folder / f"rank_{ranks.rank()}.pt"
        self.identity = f"{identity} of {ranks.world_size()}"
        self.seconds = seconds
        self._written = self._begun = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """Return the state that a kill left, on every rank or on none."""
        state = self._read()
        found = [state is not None for state in ranks.gather(state and True)]
        return state if all(found) else None

    def _read(self) -> dict[str, Any] | None:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:  # none, one that a kill cut short, or no such file at all
            return None
        return state if state.get("identity") == self.identity else None

    def write(self, state: Callable[[], dict[str, Any]], last: bool = False) -> None:
        """Write the state, if the last time is long enough ago.

        Args:
            state: returns it.
            last: no image is left; written unless all of them took less time than that.
        """
        if time.monotonic() - (self._begun if last else self._written) < self.seconds:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            torch.save({"identity": self.identity, **state()}, file)
        self._written = time.monotonic()

    def clear(self) -> None:
        """Remove what all ranks wrote; the results are there."""
        for path in self.path.parent.glob("rank_*.pt*"):
            path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def run_through(
    source: PairSource,
    measurements: Mapping[int, Measurement],
    tokens: TokenSample | None,
    progressing: Progressing,
    robustness: Robustness | None = None,
) -> Rows:
    """Take in all images of a source.

    Args:
        source: of the pairs.
        measurements: by number of tokens.
        tokens: keeps ids for the statistics of codes; None for none.
        progressing: where the state goes, and from where a killed evaluation goes on.
        robustness: measures reconstructions from perturbed tokens; None for none.

    Returns:
        A row for each image of this rank.
    """
    rows: Rows = []
    first = 0
    shown = source.budgets[-1]
    state = progressing.read()
    if state is not None:
        first, rows = state["batches"], state["rows"]
        for budget, measurement in measurements.items():
            measurement.load_state_dict(state["measurements"][budget])
        if tokens is not None:
            tokens.load_state_dict(state["tokens"])
        if robustness is not None:
            robustness.load_state_dict(state["robustness"])
        source.restore(state["skips"])
        source.seconds, source.done = state["speed"]
        if ranks.rank() == 0:
            say(f"going on after {first} of {source.num_batches} batches, where a kill ended it")

    def now(batches: int) -> dict[str, Any]:
        return {
            "batches": batches,
            "rows": rows,
            "measurements": {b: m.state_dict() for b, m in measurements.items()},
            "tokens": None if tokens is None else tokens.state_dict(),
            "robustness": None if robustness is None else robustness.state_dict(),
            "skips": list(source.skips),
            "speed": [source.seconds, source.done],
        }

    with bar("evaluating", source.num_images, ranks.rank() == 0) as advance:
        advance(len(rows) * ranks.world_size())
        for number, pairs in enumerate(source.batches(first), first + 1):
            columns: dict[str, list[float]] = {}
            for budget, measurement in measurements.items():
                pictures = pairs.reconstructions[budget]
                values = measurement.update(pairs.originals, pictures, pairs.indices)
                for name, found in values.items():
                    columns[name if budget == shown else f"{name}@{budget}"] = found.tolist()
            if robustness is not None:
                robustness.update(pairs.originals, pairs.perturbed)
            if tokens is not None and pairs.indices is not None:
                tokens.update(pairs.numbers, pairs.indices, pairs.labels)
            for i, place in enumerate(pairs.numbers):
                row = {"number": place, "key": pairs.keys[i]}
                rows.append({**row, **{name: values[i] for name, values in columns.items()}})
            advance(len(pairs.numbers) * ranks.world_size())
            progressing.write(lambda done=number: now(done))
        # Codecs, effects of tokens and the page come next, and may take longer than this did.
        progressing.write(lambda: now(source.num_batches), last=True)
        return rows


class bar:
    """Show a progress bar while the block runs; the value of `with` moves it on.

    Args:
        what: in words.
        total: units there are.
        shown: False on all ranks but one.
    """

    def __init__(self, what: str, total: int, shown: bool = True) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not shown or not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda count: self._progress.advance(self._task, count)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
