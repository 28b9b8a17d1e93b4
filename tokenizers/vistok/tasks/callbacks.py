"""Callbacks of the reconstruction task: pictures, and a watch over the codebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from vistok.core.console import say
from vistok.evaluation.evaluator import Evaluator
from vistok.evaluation.pairs import Pairs
from vistok.evaluation.pictures import comparison, save_png, scale_for
from vistok.evaluation.trained import pictures_of
from vistok.metrics.image import PSNR
from vistok.quantizers.usage import collapse_advice


class ReconstructionGrid(L.Callback):
    """Writes a PNG of fixed images above their reconstructions at every validation.

    Args:
        folder: where to write `step_000100.png`.
        num_images: how many images.
        scale: integer enlargement of small images; None for large enough to look at.
    """

    def __init__(self, folder: Path, num_images: int, scale: int | None) -> None:
        self.folder = folder
        self.num_images = num_images
        self.scale = scale

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        """Draw with the validated weights; on all ranks, for each may hold a part of them."""
        if trainer.sanity_checking or not self.num_images:
            return
        samples = module.data.val_samples(self.num_images)
        conditions = module.tokenizer.conditions_of(samples)
        evaluator = Evaluator(module.tokenizer, metrics={})
        reconstructions = evaluator.update(samples["image"], None, conditions)
        if not trainer.is_global_zero:
            return
        originals = samples["image"].cpu()
        # Not `compute`, which would wait for the other ranks.
        psnr = PSNR().per_image(originals, reconstructions.cpu()).mean().item()
        step = trainer.global_step
        caption = f"step {step}: PSNR {psnr:.2f} dB on these {len(originals)}"
        sheet = comparison(originals, reconstructions.cpu())
        scale = scale_for(module.tokenizer.image_size, self.scale)
        path = self.folder / f"step_{step:06d}.png"
        try:
            save_png(sheet, path, scale, caption)
        except OSError as error:  # a picture is not worth a run
            say(f"[yellow]{path}: could not be written: {error.strerror or error}[/yellow]")


class LastPictures(L.Callback):
    """Keeps what the validated weights make of some images at the end of a run, for its page.

    Args:
        num_images: how many images; 0 for no page.

    Attributes:
        pairs: the pictures; none before the last validation.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.pairs: list[Pairs] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        """Take the pictures, on all ranks, if no more validation will come."""
        last = trainer.global_step >= trainer.max_steps or trainer.state.fn == "validate"
        if last and self.num_images and not trainer.sanity_checking:
            self.pairs = pictures_of(module.tokenizer, module.data, self.num_images)


class CodebookWatch(L.Callback):
    """Logs codebook usage over windows of training steps; a codebook that collapses is an alarm.

    Args:
        every: length of a window in optimizer steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.last: dict[str, float] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Begin to count."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        """Close the window when it is full, never between accumulated batches."""
        if trainer.global_step == self._step or trainer.global_step % self.every:
            return
        self._step = trainer.global_step
        quantizer = module.tokenizer.quantizer
        usage = quantizer.usage
        self._read(usage)
        for name, value in self.last.items():
            module.log(f"train/{name}", value)
        advice = collapse_advice(usage, quantizer.against_collapse)
        if advice:
            module.health.alarm("codebook.collapse", advice, trainer.global_step)
        usage.reset()

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Report usage also for a run that is shorter than a window."""
        if not self.last:
            self._read(module.tokenizer.quantizer.usage)

    def _read(self, usage: Any) -> None:
        self.last = {name: value.item() for name, value in usage.compute().items()}

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict) -> None:
        """Keep the window that is open, over all ranks."""
        counts = torch.cat(module.tokenizer.quantizer.usage.histograms())
        checkpoint["codebook_window"] = {"counts": counts, "last": self.last}

    def on_load_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict) -> None:
        """Open the window again; the counts go to one rank, for they are summed in the end."""
        window, usage = checkpoint.get("codebook_window"), module.tokenizer.quantizer.usage
        if window and window["counts"].shape == usage.counts.shape:
            self.last = dict(window["last"])
            usage.restore(window["counts"] * (trainer.global_rank == 0))
