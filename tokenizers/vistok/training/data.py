"""What the engine asks of the data of a task."""

from __future__ import annotations

from typing import Any, Protocol

from vistok.data.skipped import SkippedImages


class TrainingData(Protocol):
    """A LightningDataModule that owns the position in an endless stream of samples.

    Attributes:
        samples_seen: the position: samples consumed by all ranks; in the state dict.
        batch_size: of training, per device.
        batches_per_step: that a rank's optimizer step accumulates; the trainer sets it.
        skipped: account of the samples that cannot be used.
    """

    samples_seen: int
    batch_size: int
    batches_per_step: int
    skipped: SkippedImages

    @property
    def wait_seconds(self) -> float:
        """Return how long training has waited for batches."""
        ...

    def prepare_data(self) -> None:
        """Do what needs doing once per machine."""
        ...

    def setup(self, stage: str | None = None) -> None:
        """Open the sources, so that what is missing or broken shows before training."""
        ...

    def val_dataloader(self) -> Any:
        """Return the batches of a validation; they have a length."""
        ...

    def expect(self, state_dict: dict[str, Any]) -> None:
        """Let `setup` refuse data that are not those of a position, before anything is begun."""
        ...

    def advance(self, num_samples: int | None = None) -> None:
        """Move the position past samples that were consumed."""
        ...

    def in_words(self) -> str:
        """Describe the data in a line, for people."""
        ...

    def describe(self) -> dict[str, Any]:
        """Describe the data for a run's summary: plain values only."""
        ...

    def skipped_report(self) -> str:
        """Return a line on the samples that were skipped so far, or an empty one."""
        ...
