"""`eval.py`: measure a tokenizer, or the images of another program, on a set of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

import vistok
from vistok.checkpoints.load import load
from vistok.core import ranks
from vistok.core.console import say
from vistok.core.errors import ConfigError
from vistok.core.terminal import counted
from vistok.data.build import build_data
from vistok.data.datamodule import VistokDataModule
from vistok.data.transforms import Transform
from vistok.evaluation import inputs, protocol
from vistok.evaluation.budgets import checked_budgets, print_budgets
from vistok.evaluation.codecs import checked_codecs, versions
from vistok.evaluation.codes import TokenSample, statistics_settings
from vistok.evaluation.described import (
    describe_machine,
    describe_model,
    describe_protocol,
    whole_protocol,
)
from vistok.evaluation.engine import Progressing, run_through
from vistok.evaluation.findings import Findings
from vistok.evaluation.inputs import Subject
from vistok.evaluation.measure import Measurement
from vistok.evaluation.pairs import FolderPairs, PairSource, TokenizerPairs, source_name
from vistok.evaluation.rates import codec_settings
from vistok.evaluation.robustness import Perturbation, Robustness, checked_settings
from vistok.evaluation.suite import Suite, build_suite
from vistok.models.tokenizer import Tokenizer
from vistok.quantizers.usage import CodeUsage

#: Arguments of decoders that sample; null keeps the decoder's own.
_SAMPLING = ("steps", "guidance", "seed")


def evaluate(config: dict[str, Any], data_overrides: list[str]) -> dict[str, Any]:
    """Evaluate; write `metrics.json`, a table of all images, pictures and `report.html`.

    Args:
        config: resolved `configs/eval.yaml`.
        data_overrides: `data=...` and `data.*=...`, applied to the run's own data.

    Returns:
        What `metrics.json` holds.
    """
    subject = inputs.subject_of(config)
    inputs.ask_for_data(subject, data_overrides)
    check_counts(config)
    checked_settings(config["eval"]["robustness"])
    codecs = checked_codecs(config["eval"]["codecs"])
    with inputs.joined_ranks(inputs.choose_device(config["device"])) as device:
        out = Path(config["out"]) if config["out"] else subject.out
        if out.exists() and not out.is_dir():
            raise ConfigError(f"out={out}: is a file, not a folder")
        if subject.kind == "images":
            job = _of_folder(subject, config, data_overrides, device)
        else:
            job = _of_tokenizer(subject, config, data_overrides, device)
        findings = measure(job, config, out, codecs)
        if ranks.rank() == 0:
            page = out if config["out"] else subject.page
            results = findings.write(page)
            print_results(results, out)
            for line in job.notes:
                say(f"[yellow]{escape(line)}[/yellow]")
            say(f"report: {page / 'report.html'}")
            return results
    return {}


class Job:
    """An evaluation that is ready to start.

    Attributes:
        source: of the pairs.
        suite: the metrics, for each number of tokens.
        protocol: without the number of images, which shows in the end.
        recorded: what is written next to the protocol, and does not belong to it.
        tokenizer: None for the images of another program.
        sampling: further arguments of `detokenize`.
        budgets: numbers of tokens that were asked for.
        data: the DataModule of a tokenizer's images.
        notes: lines to say at the end.
    """

    def __init__(
        self,
        source: PairSource,
        suite: Suite,
        protocol: dict[str, Any],
        recorded: dict[str, Any],
        tokenizer: Tokenizer | None = None,
        sampling: Mapping[str, Any] | None = None,
        budgets: Sequence[int] = (),
        data: VistokDataModule | None = None,
    ) -> None:
        self.source, self.suite = source, suite
        self.metrics = suite.sets[source.budgets[-1]]
        self.protocol, self.recorded = protocol, recorded
        self.tokenizer, self.sampling = tokenizer, dict(sampling or {})
        self.budgets, self.data = list(budgets), data
        self.notes = list(suite.left_out)

    def rates(self, settings: Mapping[str, Any], codecs: Sequence[str]) -> bool:
        """Return whether codecs are measured next to the tokenizer."""
        asked = self.budgets or settings["codecs_always"]
        able = self.tokenizer is not None and self.tokenizer.channels in (1, 3)
        return bool(asked and able and codecs and settings["codec_images"])


def check_counts(config: Mapping[str, Any]) -> None:
    """Raise if a number of something is not a whole number.

    Raises:
        ConfigError: naming the key.
    """
    keys = ("codec_images", "code_images", "effect_images", "extremes")
    values = {f"eval.{key}": config["eval"][key] for key in keys}
    values["num_pictures"] = config["num_pictures"]
    for key, count in values.items():
        if type(count) is not int or count < 0:
            raise ConfigError(f"{key}={count}: must be a whole number, 0 for none")
    scale = config["picture_scale"]
    if scale is not None and (type(scale) is not int or scale < 1):
        raise ConfigError(f"picture_scale={scale}: must be a whole number, 1 or more, or null")
    seconds = config["eval"]["save_seconds"]
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds < 0:
        raise ConfigError(f"eval.save_seconds={seconds}: must be a number of seconds")


def _of_tokenizer(
    subject: Subject,
    config: dict[str, Any],
    overrides: list[str],
    device: torch.device,
) -> Job:
    tokenizer = load(subject.path, weights=config["weights"], device=device)
    settings = config["eval"]
    budgets = checked_budgets(tokenizer, settings["num_tokens"])
    conditions = list(tokenizer.decoder.conditions)
    values = inputs.data_config(subject.source, overrides, config["batch_size"], conditions)
    with inputs.named_by_val(values):
        data = build_data(values)
    if (data.channels, tuple(data.image_size)) != (tokenizer.channels, tokenizer.image_size):
        raise ConfigError(
            f"data: {data.channels} x {data.image_size} images, but the tokenizer takes "
            f"{tokenizer.channels} x {tokenizer.image_size}"
        )
    given = {k: settings[k] for k in _SAMPLING if settings[k] is not None}
    tokenizer._sampling(given)  # refuses what the decoder does not take
    with inputs.named_by_val(values):
        data.prepare_data()
        data.setup("validate")
    dtype = inputs.choose_precision(config["precision"], device)
    autocast = torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()
    strengths = checked_settings(settings["robustness"])
    seed = settings["robustness"]["seed"]
    perturbation = Perturbation(tokenizer, strengths, seed) if strengths else None
    source = TokenizerPairs(tokenizer, data, budgets, given, autocast, perturbation)
    precision = str(dtype or torch.float32).removeprefix("torch.")
    read = [name for name in conditions if name in data.fields]
    # An export holds one set of weights, those to use.
    weights = "ema" if (subject.path / "model.safetensors").exists() else config["weights"]
    described = describe_protocol(tokenizer, data, weights, precision, budgets, given)
    if strengths:
        described["robustness"] = {"settings": [list(s) for s in strengths], "seed": seed}
    recorded = {
        "weights": config["weights"],
        "checkpoint": str(subject.source),
        "crop": described["images"]["crop"],
        "precision": precision,
        "sampling": given,
        "conditions": read,
        "data": source_name(data.val_set.source),
        "model": describe_model(tokenizer),
    }
    suite = build_suite(settings, source.budgets, data.channels, [data.image_size], device)
    job = Job(source, suite, described, recorded, tokenizer, given, budgets, data)
    for name in conditions:
        if name not in data.fields:
            job.notes.append(f"decoded without {name}; data.fields=[{name}] reads it")
    return job


def _of_folder(
    subject: Subject,
    config: dict[str, Any],
    overrides: list[str],
    device: torch.device,
) -> Job:
    for key in ("num_tokens", *_SAMPLING):
        if config["eval"][key] is not None:
            raise ConfigError(f"eval.{key}: images= have no tokens; use run= or model=")
    originals, values = inputs.originals_of(overrides)
    cut = inputs.cut_of(overrides, values)
    transform = None if cut is None else Transform(cut[1], cut[0], key="data.val_crop")
    batch, channels = config["batch_size"], values["channels"]
    source = FolderPairs(originals, config["images"], channels, batch, transform, device)
    crop = "none" if cut is None else cut[0]
    one_size = source.shapes[0] if len(source.shapes) == 1 else None
    described = {
        "images": {
            "reference": protocol.reference_hash(
                (key.decode(errors="surrogateescape") for key in originals.keys),
                (int(size) for size in originals.sizes),
            ),
            "height": one_size and one_size[0],
            "width": one_size and one_size[1],
            "channels": channels,
            "crop": crop,
            "kernel": protocol.KERNELS[crop],
        },
        **dict.fromkeys(("weights", "sampling", "conditions", "precision"), "not known"),
        "num_tokens": "all",
        "budgets": [],
    }
    recorded = {
        "checkpoint": str(subject.path),
        "crop": crop,
        "data": source_name(originals),
        "model": None,
    }
    suite = build_suite(config["eval"], source.budgets, channels, source.shapes, device)
    return Job(source, suite, described, recorded)


def measure(job: Job, config: Mapping[str, Any], out: Path, codecs: Sequence[str]) -> Findings:
    """Run an evaluation to its end, or from where a kill ended it."""
    tokenizer, source, settings = job.tokenizer, job.source, config["eval"]
    described = whole_protocol(job.protocol, job.metrics)
    if tokenizer is not None and settings["code_images"]:
        described["statistics"] = statistics_settings(settings)
    if job.rates(settings, codecs):
        described["codecs"] = codec_settings(codecs, settings["codec_images"])
    lenient = settings["missing"] == "leave_out"
    measurements = {
        budget: Measurement(metrics, _usage(tokenizer), budget or None, lenient)
        for budget, metrics in job.suite.sets.items()
    }
    kept = settings["code_images"] if tokenizer else 0
    tokens = TokenSample(kept) if kept else None
    model = (job.recorded["model"] or {}).get("sha256") or getattr(source, "identity", "")
    identity = (
        f"{protocol.protocol_hash(described)} {model} {config['batch_size']} {vistok.__version__}"
    )
    progressing = Progressing(out / "unfinished", identity, settings["save_seconds"])
    strengths = checked_settings(settings["robustness"]) if tokenizer else []
    robustness = Robustness(strengths, job.metrics, lenient) if strengths else None
    rows = run_through(source, measurements, tokens, progressing, robustness)
    results = {budget: m.compute() for budget, m in measurements.items()}
    measured = [*measurements.values()]
    if robustness is not None:
        means, job.recorded["robustness"] = robustness.compute()
        results[source.budgets[-1]] |= means
        measured += robustness.measurements.values()
    job.notes += dict.fromkeys(note for m in measured for note in m.notes)
    all_rows = [row for part in ranks.gather(rows) for row in part]
    skips = {skip[0]: skip for part in ranks.gather(source.skips) for skip in part}
    ids, labels = tokens.gathered() if tokens else (None, np.zeros(0))
    described["images"]["count"] = len(all_rows)
    if skips and job.data is not None and (report := job.data.skipped_report()):
        job.notes.append(report)
    recorded = {
        **job.recorded,
        "skipped_images": len(skips),
        "images_per_second": source.done / source.seconds if source.seconds else 0.0,
        "machine": describe_machine(config["batch_size"], config_device(job)),
    }
    if "codecs" in described:
        recorded["machine"]["codecs"] = versions(codecs)
    found = (results, all_rows, ids, labels, codecs)
    return Findings(job, config, out, described, recorded, *found, done=progressing.clear)


def _usage(tokenizer: Tokenizer | None) -> CodeUsage | None:
    if tokenizer is None:
        return None
    return CodeUsage(tokenizer.quantizer.codebook_sizes).to(tokenizer.device)


def config_device(job: Job) -> torch.device:
    """Return the device that a job measures on."""
    if job.tokenizer is not None:
        return job.tokenizer.device
    return torch.device(getattr(job.source, "device", "cpu"))


# ---------------------------------------------------------------------- for people


def measured_words(results: Mapping[str, Any]) -> str:
    """Return which images were measured, and how many, in a line."""
    images = results["protocol"]["images"]
    size = f"{images['height']}x{images['width']} px, " if images["height"] else ""
    return (
        f"{counted(images['count'], 'image')} of {results['data']} ({size}crop {images['crop']}), "
        f"protocol {results['protocol_hash'][:12]}"
    )


def print_results(results: Mapping[str, Any], out: Path) -> None:
    """Print the table of an evaluation, and of each number of tokens."""
    table = Table(title=escape(str(out)), title_justify="left", caption_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right", overflow="fold")
    for name, value in results.items():
        if isinstance(value, (list, dict)) or name in ("data", "protocol_hash", "format"):
            continue
        if results["model"] is None and name in ("model", "images_per_second"):
            continue  # of another program's images nobody knows
        table.add_row(name, as_text(value))
    say(table)
    say(escape(measured_words(results)))
    if len(results["budgets"]) > 0:
        print_budgets(results, out)


def as_text(value: Any) -> str:
    """Return a value for a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))
