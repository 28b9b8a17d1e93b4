"""Reconstruction: train any tokenizer on images, watched by PSNR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from vistok.core.console import say
from vistok.core.errors import ConfigError
from vistok.core.geometry import as_pair
from vistok.core.memory import fits_in_memory
from vistok.core.registry import register
from vistok.core.terminal import typed
from vistok.data.build import build_data
from vistok.data.datamodule import VistokDataModule
from vistok.evaluation.baseline import baseline_options, kmeans_baseline
from vistok.evaluation.evaluator import Evaluator
from vistok.evaluation.run import evaluate
from vistok.evaluation.trained import write_trained
from vistok.losses.objective import build_objective
from vistok.models.build import build_tokenizer, starts_from_data
from vistok.models.term import Step
from vistok.models.tokenizer import Tokenizer
from vistok.tasks.callbacks import CodebookWatch, LastPictures, ReconstructionGrid
from vistok.tasks.sources import parts_of, resolve_source, start_from
from vistok.tasks.stages import prepare_stage, resolve_stage
from vistok.training.task import Task


@register("reconstruction", kind="task")
class Reconstruction(Task):
    """Trains any tokenizer to reconstruct images.

    Args:
        config: the run's resolved config as plain containers. It is saved in checkpoints.
    """

    monitor = ("psnr", "max")

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        check_memory(config)
        self.tokenizer = build_tokenizer(config)
        check_images(self.tokenizer, config["data"])
        prepare_stage(self.tokenizer, config)
        check_fields(self.tokenizer, config["data"].get("fields") or ())
        self.objective = build_objective(config["loss"], self.tokenizer)
        self.evaluator: Evaluator | None = None
        baseline_options(config.get("baseline"))  # and a wrong value, not at the end
        starts_from_data(config)
        self.ready()

    @property
    def model(self) -> Tokenizer:  # type: ignore[override]
        """The tokenizer."""
        return self.tokenizer

    @property
    def data(self) -> VistokDataModule:  # type: ignore[override]
        """The DataModule."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @classmethod
    def resolve(cls, config: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
        """Return the config with what its stage, or the run that it starts from, calls for."""
        return resolve_source(resolve_stage(config, words), words)

    def build_data(self) -> VistokDataModule:
        """Return the images of `data`."""
        return build_data(self.config["data"])

    def start_weights(self, data: VistokDataModule, device: torch.device) -> None:
        """Take the weights of `init_from`, else start from data, else leave the random ones."""
        source, parts = self.config["init_from"], parts_of(self.config)
        tokenizer, from_data = self.tokenizer.to(device), starts_from_data(self.config)
        if source:
            moved = start_from(tokenizer, str(source), parts)
            _say_start(f"{', '.join(parts) or 'all weights'} of {source}", "weights")
            if moved:
                _say_start(f"{', '.join(moved)} interpolated", "weights")
            for line in self.objective.fresh_players():
                _say_start(line, "weights")
        if (parts or not source) and (from_data or tokenizer.calibrates):
            images = data.init_batches(self._init_images())
            if from_data:
                tokenizer.initialize(images, _say_start, keep=parts)
            else:
                tokenizer.calibrate(images, _say_start)
        if self.ema is not None:
            self.ema.reset()

    def _init_images(self) -> int:
        """Return how many images the start from data looks at, and no more than it needs."""
        wanted = self.tokenizer.quantizer.num_init_latents
        for_codebook = -(-wanted // self.tokenizer.num_tokens)
        most = self.config["init_images"]
        return max(min(most, self.tokenizer.init_images), min(for_codebook, max(4096, most)))

    # ------------------------------------------------------------------ training

    def compute(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Reconstruct a batch of uint8 images, normalised on the device."""
        images = batch["image"].float().div_(127.5).sub_(1)
        with self.drawing(len(images)):
            conditions = self.tokenizer.conditions_of(batch)
            output = self._step_function(images, self.objective.taps, **conditions)
            losses = self.objective(Step(images, output, self.tokenizer, self.step_began_at))
        metrics = output.quantizer.metrics
        return losses, {f"quantizer/{name}": value for name, value in metrics.items()}

    def after_step(self) -> dict[str, Tensor]:
        """Apply the codebook statistics."""
        if "quantizer" in self.tokenizer.frozen:
            self.tokenizer.quantizer.discard_step()
            return {}
        numbers = self.tokenizer.quantizer.after_step([self.trainer.optimizers[0]])
        return {f"quantizer/{name}": value for name, value in numbers.items()}

    def discard_step(self) -> None:
        """Forget the codebook statistics of the step."""
        self.tokenizer.quantizer.discard_step()

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        """Begin to measure."""
        self.evaluator = Evaluator(self.tokenizer)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Measure the tokenizer on a batch; `AveragedWeights` has put its averages in place."""
        assert self.evaluator is not None
        conditions = self.tokenizer.conditions_of(batch)
        self.evaluator.update(batch["image"], batch["valid"], conditions)

    def on_validation_epoch_end(self) -> None:
        """Log the results as `val/...`."""
        assert self.evaluator is not None
        self.results = self.evaluator.compute()
        self.validated_step = self.global_step
        self.log("step", float(self.global_step))
        for name in ("psnr", "ssim", "codebook_usage", "perplexity"):
            self.log(f"val/{name}", self.results[name], batch_size=1)
        self.evaluator = None

    # ------------------------------------------------------------------ for people

    def callbacks(self, folder: Path) -> list[L.Callback]:
        """Return the watch over the codebook, pictures, and those for the run's page."""
        options = self.config["callbacks"]
        self._watch = CodebookWatch(options["codebook_window"])
        pictures = folder / "pictures"
        grid = ReconstructionGrid(pictures, options["num_pictures"], options["picture_scale"])
        self._folder = folder
        self._last = LastPictures(options["num_pictures"] if options.get("report", True) else 0)
        return [self._watch, grid, self._last]

    def description(self) -> str:
        """Return a line that says what is trained."""
        t = self.tokenizer
        parameters = sum(p.numel() for p in t.parameters()) / 1e6
        return (
            f"{type(t).__name__} with {type(t.quantizer).__name__}, {parameters:.2f} M "
            f"parameters, {t.num_tokens} tokens = {t.bits_per_image:.0f} bits per image"
        )

    @classmethod
    def evaluate(cls, config: dict[str, Any], data_overrides: list[str]) -> dict[str, Any]:
        """Judge a tokenizer; see `vistok.evaluation.run.evaluate`."""
        return evaluate(config, data_overrides)

    def next_commands(self, folder: Path) -> list[str]:
        """Return what to type after the run in this folder."""
        export = f"{typed('export')} run={folder} out=exported/my_tokenizer"
        return [*super().next_commands(folder), export]

    def headline(self) -> str:
        """Return PSNR and the use of the codebook."""
        return (
            f"val psnr {self.results['psnr']:.2f} dB  "
            f"usage {self.results['codebook_usage']:.0%}  "
            f"perplexity {self.results['perplexity']:.0f}"
        )

    def summary(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return the last validation's numbers, the codebook's in training, and the baseline."""
        results, window = self.results, self._watch.last
        summary: dict[str, Any] = {
            "val_psnr": results["psnr"],
            "val_ssim": results["ssim"],
            "val_codebook_usage": results["codebook_usage"],
            "val_perplexity": results["perplexity"],
            "codebook_usage": window["codebook_usage"],  # of the last training window
            "perplexity": window["perplexity"],
            "bits_per_image": results["bits_per_image"],
            "val_images": int(results["images"]),
        }
        options = baseline_options(self.config.get("baseline"))
        if options:  # on every rank: they begin with the same codes and share the images
            summary.update(kmeans_baseline(self.data, self.tokenizer, **options))
        if self._last.pairs:
            self._write_report(str(trainer.precision))
        return summary

    @rank_zero_only
    def _write_report(self, precision: str) -> None:
        """Write `report.html`; a run whose numbers are there does not fail for its page."""
        words = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}.get(precision, "float32")
        weights = "last" if self.ema is None else "ema"
        try:
            page = write_trained(
                self._folder,
                self.tokenizer,
                self.data,
                self.results,
                self._last.pairs,
                weights,
                words,
            )
            say(f"report: {page}")
        except OSError as error:
            say(f"[yellow]report.html could not be written: {error.strerror}[/yellow]")


@rank_zero_only
def _say_start(part: str, what: str = "data") -> None:
    say(f"starting from {what}: {part}")


def check_memory(config: dict[str, Any]) -> None:
    """Raise if the tokenizer's weights alone are larger than this machine's memory.

    Raises:
        ConfigError: with both sizes.
    """
    try:
        with torch.device("meta"):
            tokenizer = build_tokenizer(config, teachers=False)
    except RuntimeError as error:
        if "out of memory" in str(error) or "overflow" in str(error):
            raise ConfigError(f"tokenizer: too large to be built ({error})") from error
        raise
    tensors = [*tokenizer.parameters(), *tokenizer.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    parts = {
        name: sum(t.numel() for t in part.state_dict().values())
        for name, part in tokenizer.named_children()
    }
    largest = max(parts, key=parts.__getitem__, default="tokenizer")
    fits_in_memory(size, f"tokenizer (most of it its {largest})")


def check_images(tokenizer: Tokenizer, data: dict[str, Any]) -> None:
    """Raise if the images that the data yield are not those that the tokenizer takes.

    Raises:
        ConfigError: naming the key of the data.
    """
    size, channels = as_pair(data["image_size"]), data["channels"]
    if (channels, size) != (tokenizer.channels, tokenizer.image_size):
        raise ConfigError(
            f"data.image_size={data['image_size']} and data.channels={channels}: the tokenizer "
            f"takes {tokenizer.channels} x {tokenizer.image_size}; a run keeps its sizes, and "
            "init_from=runs/<run> with another data.image_size fine-tunes it at that"
        )


def check_fields(tokenizer: Tokenizer, fields: Sequence[str]) -> None:
    """Raise if the data lack what the decoder reads in addition to tokens.

    Raises:
        ConfigError: naming the field that is missing.
    """
    for name in tokenizer.decoder.conditions:
        if name not in fields:
            raise ConfigError(
                f"data.fields: must hold {name}, which {type(tokenizer.decoder).__name__} reads; "
                f"with data.fields=[{name}] it is the member .{name}.npy of each sample"
            )
