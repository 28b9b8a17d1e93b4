"""Priors: train any generator over the ids of a tokenizer, watched by its likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vistok.checkpoints.find import find_checkpoint
from vistok.checkpoints.load import load_prior, load_weights
from vistok.core.console import say
from vistok.core.ranks import all_reduce_sum
from vistok.core.registry import register
from vistok.core.sample_random import drawing
from vistok.data.token_module import TokenDataModule
from vistok.evaluation.generation import conditions_for, load_decoder, pictures_of
from vistok.evaluation.pictures import grid, save_png, scale_for
from vistok.evaluation.priors import evaluate_prior, statistics_of
from vistok.evaluation.tokens import check_layout, token_data
from vistok.losses.objective import Objective
from vistok.priors.build import build_prior
from vistok.priors.layout import Layout
from vistok.priors.sampling import Sampling
from vistok.quantizers.base import token_mean
from vistok.training.task import Task

#: Keys of a run that another task reads.
_OF_OTHERS = ("tokenizer", "quantizer", "loss", "adversary", "alignment")


@register("prior", kind="task")
class PriorTask(Task):
    """Trains a prior on a folder of tokens.

    It reads that folder and, for pictures, the export; never images. The objective has no terms:
    the loss is minus the log-likelihood of an id, the mean over those of a step.

    Args:
        config: the run's resolved config as plain containers. It is saved in checkpoints.
    """

    monitor = ("nll", "min")

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.prior = build_prior(config)
        self.objective = Objective({}, {}, {})
        self.statistics: dict[str, float] = {}
        self.ready()

    @property
    def model(self) -> Any:  # type: ignore[override]
        """The prior."""
        return self.prior

    @property
    def data(self) -> TokenDataModule:  # type: ignore[override]
        """The DataModule."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @classmethod
    def resolve(cls, config: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
        """Return the config without what only tokenizers need, and with the layout of the ids."""
        if config["init_from"]:
            find_checkpoint(config["init_from"])  # one that is missing shows now
        data = token_data(config)
        layout = Layout.from_manifest(data.train_folder.manifest, data.num_classes)
        kept = {key: value for key, value in config.items() if key not in _OF_OTHERS}
        return {**kept, "layout": layout.as_config()}

    def build_data(self) -> TokenDataModule:
        """Return the tokens of the run.

        Raises:
            DataError: if they do not have the layout that the prior was built for.
        """
        data = token_data(self.config)
        check_layout(data, Layout.from_config(self.config["layout"]))
        return data

    def start_weights(self, data: Any, device: torch.device) -> None:
        """Take the weights of `init_from`, or leave the random ones."""
        if source := self.config["init_from"]:
            other, _ = load_prior(source)
            load_weights(self.prior, other.state_dict(), str(source))
        if self.ema is not None:
            self.ema.reset()

    # ------------------------------------------------------------------ training

    def compute(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the mean loss of a batch's ids, in nats."""
        with self.drawing(len(batch["ids"])):
            condition = self.prior.condition_of(batch)
            found = self._step_function(batch["ids"], batch["length"], condition)
        return {"total": token_mean(found.nll, found.counted)}, {}

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        """Begin to measure."""
        self._sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, images
        if not self.statistics:
            self.statistics = statistics_of(self.data)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Measure a batch; `AveragedWeights` has put its averages in place."""
        with drawing(self.config["seed"], batch["index"], 0):
            condition = self.prior.condition_of(batch)
            found = self.prior(batch["ids"], batch["length"], condition)
        valid = batch["valid"]
        nats = found.nll.double().sum(dim=(1, 2))[valid].sum().cpu()
        counts = [batch["length"][valid].sum().cpu().double(), valid.sum().cpu().double()]
        self._sums += torch.stack([nats, *counts])

    def on_validation_epoch_end(self) -> None:
        """Log the results as `val/...`."""
        sums = self._sums.float() if self.device.type == "mps" else self._sums
        nats, tokens, images = all_reduce_sum(sums.to(self.device)).tolist()
        self.results = {
            "nll": nats / images,
            "nll_per_token": nats / tokens,
            "bits_per_image": nats / images / math.log(2),
            **self.statistics,
        }
        self.validated_step = self.global_step
        self.log("step", float(self.global_step))
        for name in ("nll", "nll_per_token"):
            self.log(f"val/{name}", self.results[name], batch_size=1)

    # ------------------------------------------------------------------ for people

    def callbacks(self, folder: Path) -> list[L.Callback]:
        """Return what draws pictures, if there is an export to decode them with."""
        options, place = self.config["callbacks"], self.config["data"]["tokenizer"]
        if not place or not options["num_pictures"]:
            return []
        return [
            SampleGrid(
                folder / "pictures",
                place,
                self.prior.layout.tokenizer,
                options["num_pictures"],
                options["picture_scale"],
                Sampling(**self.config["sampling"]),
            )
        ]

    @classmethod
    def evaluate(cls, config: dict[str, Any], data_overrides: list[str]) -> dict[str, Any]:
        """Judge a prior; see `vistok.evaluation.priors.evaluate_prior`."""
        return evaluate_prior(config, data_overrides)

    def description(self) -> str:
        """Return a line that says what is trained."""
        layout = self.prior.layout
        parameters = sum(p.numel() for p in self.prior.parameters()) / 1e6
        streams = " x ".join(map(str, layout.sizes))
        return (
            f"{type(self.prior).__name__}, {parameters:.2f} M parameters, {layout.num_tokens} "
            f"tokens of {streams} codes, condition: {self.prior.told.kind}"
        )

    def headline(self) -> str:
        """Return the likelihood of a token next to that of simple models."""
        return (
            f"val nll {self.results['nll']:.1f} nats per image, "
            f"{self.results['nll_per_token']:.3f} per token (bigrams "
            f"{self.results['bigram_nll']:.3f}, unigrams {self.results['unigram_nll']:.3f})"
        )

    def summary(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return the last validation's numbers."""
        return {
            f"val_{name}" if name.startswith(("nll", "bits")) else name: value
            for name, value in self.results.items()
        }


class SampleGrid(L.Callback):
    """Writes a PNG of generated images at every validation, for the same conditions and seed.

    Args:
        folder: where to write `step_000100.png`.
        place: export that decodes them.
        wanted_hash: of its tokenizer.
        num_images: how many images.
        scale: integer enlargement of small images; None for large enough to look at.
        sampling: how ids are drawn.

    Raises:
        DataError: if the export is another tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        place: str,
        wanted_hash: str,
        num_images: int,
        scale: int | None,
        sampling: Sampling,
    ) -> None:
        self.folder, self.num_images, self.scale = folder, num_images, scale
        self.sampling = sampling
        self.tokenizer = load_decoder(place, wanted_hash, torch.device("cpu"))

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        """Draw with the validated weights; on all ranks, for each may hold a part of them."""
        prior = module.prior
        condition = conditions_for(prior, module.data, self.num_images)
        samples = prior.generate(condition, self.sampling)
        if not trainer.is_global_zero:
            return
        sheet = grid(pictures_of(self.tokenizer, samples)[None])
        path = self.folder / f"step_{trainer.global_step:06d}.png"
        try:
            save_png(sheet, path, scale_for(self.tokenizer.image_size, self.scale))
        except OSError as error:  # a picture is not worth a run
            say(f"[yellow]{path}: could not be written: {error.strerror or error}[/yellow]")
