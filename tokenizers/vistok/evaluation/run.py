"""`eval.py`: judge a trained tokenizer on a set of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from vistok.checkpoints.find import find_checkpoint, run_folder
from vistok.checkpoints.load import load
from vistok.checkpoints.read import read_config
from vistok.checkpoints.seals import is_checkpoint
from vistok.core.configuration import apply_overrides, compose
from vistok.core.console import say
from vistok.core.errors import ConfigError
from vistok.core.files import replacing
from vistok.data.build import build_data
from vistok.evaluation.budgets import checked_budgets, evaluate_budgets, print_budgets
from vistok.evaluation.evaluator import Evaluator
from vistok.evaluation.pictures import comparison, save_png, scale_for

#: Keys of the run's data that stay when `data=...` chooses another kind.
_KEPT = ("image_size", "channels", "val_crop", "num_workers", "seed")

#: Arguments of decoders that sample; null keeps the decoder's own.
_SAMPLING = ("steps", "guidance", "seed")


def evaluate(config: dict[str, Any], data_overrides: list[str]) -> dict[str, Any]:
    """Evaluate, print a table, write `metrics.json` and `reconstructions.png`.

    With `eval.num_tokens` also the curve over budgets, `curve.png` and `budgets.png`.

    Args:
        config: resolved `configs/eval.yaml`.
        data_overrides: `data=...` and `data.*=...`, applied to the run's own data.

    Returns:
        What `metrics.json` holds.
    """
    run = Path(config["run"])
    source = run if (run / "model.safetensors").exists() else find_checkpoint(run)
    device = choose_device(config["device"])
    tokenizer = load(run, weights=config["weights"], device=device)
    budgets = checked_budgets(tokenizer, config["eval"]["num_tokens"])
    codec_images, num_pictures = config["eval"]["codec_images"], config["num_pictures"]
    for key, count in (("eval.codec_images", codec_images), ("num_pictures", num_pictures)):
        if type(count) is not int or count < 0:
            raise ConfigError(f"{key}={count}: must be a whole number, 0 for none")
    conditions = list(tokenizer.decoder.conditions)
    values = data_config(source, data_overrides, config["batch_size"], conditions)
    data = build_data(values)
    if (data.channels, tuple(data.image_size)) != (tokenizer.channels, tokenizer.image_size):
        raise ConfigError(
            f"data: {data.channels} x {data.image_size} images, but the tokenizer takes "
            f"{tokenizer.channels} x {tokenizer.image_size}"
        )
    data.prepare_data()
    data.setup("validate")
    out = Path(config["out"]) if config["out"] else default_folder(run)

    scale = scale_for(tokenizer.image_size, config["picture_scale"])
    dtype = choose_precision(config["precision"], device)
    sampling = {k: config["eval"][k] for k in _SAMPLING if config["eval"][k] is not None}
    evaluator = Evaluator(tokenizer, sampling=sampling)
    autocast = torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=bool(dtype))
    with autocast:
        for batch in data.val_dataloader():
            evaluator.update(batch["image"], batch["valid"], tokenizer.conditions_of(batch))
        samples = data.val_samples(num_pictures) if num_pictures else None
        results: dict[str, Any] = evaluator.compute()
        if samples is not None:
            painter, given = Evaluator(tokenizer, {}, sampling=sampling), samples["image"]
            painted = painter.update(given, None, tokenizer.conditions_of(samples))
            sheet = comparison(given.cpu(), painted.cpu())
            save_png(sheet, out / "reconstructions.png", scale)
        if budgets:
            curve = evaluate_budgets(
                tokenizer,
                data,
                out,
                budgets,
                sampling,
                codec_images,
                num_pictures,
                scale,
            )
            results.update(curve)
    results["weights"] = config["weights"]
    results["checkpoint"] = str(source)
    results["crop"] = values["val_crop"]
    results["precision"] = str(dtype or torch.float32).removeprefix("torch.")
    results["sampling"] = sampling
    results["conditions"] = [name for name in conditions if name in data.fields]
    results["skipped_images"] = len(data.skipped)
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "metrics.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    print_table(results, out)
    for name in conditions:
        if name not in data.fields:
            say(f"[yellow]decoded without {name}; data.fields=\\[{name}] reads it[/yellow]")
    if "budgets" in results:
        print_budgets(results, out)
    if report := data.skipped_report():
        say(f"[yellow]{report}[/yellow]")
    return results


def data_config(
    source: Path, overrides: list[str], batch_size: int, conditions: Sequence[str] = ()
) -> dict[str, Any]:
    """The run's data config with the user's changes.

    Args:
        source: checkpoint or export.
        overrides: `data=...` and `data.*=...`.
        batch_size: of evaluation.
        conditions: what the decoder reads besides tokens. They stay fields when the kind of data
            changes, and are those of an export's data.
    """
    from omegaconf import OmegaConf

    run_config = read_config(source)
    own = dict(run_config.get("data") or {})
    choice = [o.partition("=")[2] for o in overrides if o.startswith("data=")]
    base: dict[str, Any] = {"seed": run_config.get("seed", 0)}
    if choice or "kind" not in own:  # an export has no data of its own
        composed = compose("train", [f"data={choice[-1] if choice else 'sample'}"])
        chosen = OmegaConf.to_container(composed, resolve=False)["data"]  # type: ignore[index]
        read = [name for name in conditions if name in own.get("fields", conditions)]
        own = {**chosen, **{k: own[k] for k in _KEPT if k in own}}  # type: ignore[dict-item]
        own["fields"] = read
        own["seed"] = base["seed"]
    holder = OmegaConf.create({"data": own})
    OmegaConf.set_struct(holder, True)
    holder = apply_overrides(holder, [o for o in overrides if not o.startswith("data=")])
    values = OmegaConf.to_container(holder.data, resolve=True)
    assert isinstance(values, dict)
    if values.get("val") and not values.get("train"):
        values["train"] = values["val"]  # evaluation alone needs no training images
    values["eval_batch_size"] = batch_size
    return {str(k): v for k, v in values.items()}


def default_folder(run: Path) -> Path:
    """Return the folder for results of `run`: in a run; next to an export, which stays as it is."""
    if (run / "model.safetensors").exists():
        return run.with_name(f"{run.resolve().name}_eval")
    return (run_folder(run) if is_checkpoint(run) else run) / "eval"


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: no usable GPU was found; use cpu or auto")
    if name not in ("cpu", "cuda", "gpu"):
        raise ConfigError(f"device={name}: must be auto, cpu or cuda")
    return torch.device("cuda" if name == "gpu" else name)


def choose_precision(name: Any, device: torch.device) -> torch.dtype | None:
    """Autocast type of the networks; None for float32, which `auto` is: metrics want it."""
    known = {"auto": None, "32": None, "bf16": torch.bfloat16, "16": torch.float16}
    if str(name) not in known:
        raise ConfigError(f"precision={name}: must be one of {', '.join(known)}")
    return known[str(name)]


def print_table(results: dict[str, Any], out: Path) -> None:
    """For people."""
    table = Table(title=str(out), title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in results.items():
        if isinstance(value, (list, dict)):
            continue
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    say(table)
