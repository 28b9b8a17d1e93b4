"""The settings of bulk work, and the plan that a folder of tokens is begun with."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vistok.checkpoints.exports import tokenizer_hash
from vistok.core.errors import ConfigError, DataError, as_written
from vistok.core.files import parse_json
from vistok.core.values import is_whole
from vistok.evaluation.inputs import choose_device
from vistok.export.formats.base import DOCUMENT
from vistok.export.units import Units
from vistok.export.vocabulary import vocabulary
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.tokenizer import Tokenizer

#: What a folder was begun with; written once, before anything else.
PLAN = "plan.json"

_PRECISIONS = {"auto": "32", "32": "32", "bf16": "bf16"}


@dataclass(frozen=True)
class Settings:
    """`configs/tokenize.yaml`, read and checked; the comments there say what each is."""

    model: str
    out: str
    format: list[str]
    crops: int
    crop_range: float
    flip: bool
    num_tokens: int | None
    psnr: float | None
    document: list[str]
    batch_size: int
    device: torch.device
    precision: str
    workers: int | None
    worker: str | None
    threads: int
    decode_threads: int
    images_per_shard: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Settings:
        """Read a resolved config.

        Raises:
            ConfigError: naming the key that is wrong.
        """
        for key in ("batch_size", "threads", "decode_threads", "images_per_shard"):
            _check(config, key, "a whole number of at least 1", _counts)
        for key in ("num_tokens", "workers"):
            _check(config, key, "null or a whole number of at least 1", _counts_or_none)
        _check(config, "flip", "true or false", lambda value: isinstance(value, bool))
        _check(config, "psnr", "null or dB from 0 to 100", _is_psnr)
        _check(config, "precision", "auto, 32 or bf16", lambda value: str(value) in _PRECISIONS)
        format = [] if config["format"] is None else config["format"]
        format = format if isinstance(format, list) else str(format).split(",")
        document = config["document"] or []
        if not isinstance(document, list) or any(name not in DOCUMENT for name in document):
            raise ConfigError(
                f"document={as_written(document)}: must be a list of {', '.join(DOCUMENT)}"
            )
        if config["psnr"] is not None and config["num_tokens"] is not None:
            raise ConfigError("psnr: chooses the numbers of tokens; leave num_tokens out")
        return cls(
            str(config["model"]),
            str(config["out"]),
            [str(name) for name in format],
            config["crops"],
            config["crop_range"],
            config["flip"],
            config["num_tokens"],
            None if config["psnr"] is None else float(config["psnr"]),
            [name for name in DOCUMENT if name in document],
            config["batch_size"],
            _device(str(config["device"])),
            _PRECISIONS[str(config["precision"])],
            config["workers"],
            None if config["worker"] is None else str(config["worker"]),
            config["threads"],
            config["decode_threads"],
            config["images_per_shard"],
        )

    def check_length(self, tokenizer: Tokenizer) -> None:
        """Raise a ConfigError if the tokenizer has no codes of the lengths asked for."""
        most = tokenizer.num_tokens
        for key in ("num_tokens", "psnr"):
            value = getattr(self, key)
            if value is not None and not isinstance(tokenizer, FlexibleTokenizer):
                raise ConfigError(
                    f"{key}={value}: {type(tokenizer).__name__} has a fixed length of {most} "
                    f"tokens; leave {key} out"
                )
        if self.num_tokens is not None and self.num_tokens > most:
            raise ConfigError(f"num_tokens={self.num_tokens}: must be 1 to {most}")


def _device(name: str) -> torch.device:
    device = choose_device(name)
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _counts(value: Any) -> bool:
    return is_whole(value) and value >= 1


def _counts_or_none(value: Any) -> bool:
    return value is None or _counts(value)


def _is_psnr(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and 0 <= value <= 100)


def _check(config: dict[str, Any], key: str, wanted: str, is_right: Any) -> None:
    if not is_right(config[key]):
        raise ConfigError(f"{key}={as_written(config[key])}: must be {wanted}")


def manifest_values(
    settings: Settings, tokenizer: Tokenizer, model: Path, views: list[str]
) -> dict[str, Any]:
    """Return what the manifest says of the ids before the images are known."""
    words = vocabulary(tokenizer)
    budgets = words.pop("lengths")["budgets"]
    words.pop("format")
    return {
        "tokenizer_hash": tokenizer_hash(model),
        **words,
        "num_tokens": settings.num_tokens or tokenizer.num_tokens,
        "lengths": "fixed" if settings.psnr is None else "variable",
        "budgets": budgets,
        "document": settings.document,
        "image_size": list(tokenizer.image_size),
        "channels": tokenizer.channels,
        "views": views,
    }


def plan_of(
    settings: Settings, values: dict[str, Any], units: Units, crop: str, captions: bool
) -> dict[str, Any]:
    """Return all that decides the bytes of the shards, with its digest."""
    device = settings.device.type
    plan = {
        "model": values["tokenizer_hash"],
        "data.train": units.digest(),
        "shards": len(units),
        "data.val_crop": crop,
        "data.fields": ["caption"] if captions else [],
        "crops": settings.crops,
        "crop_range": float(settings.crop_range),
        "flip": settings.flip,
        "num_tokens": settings.num_tokens,
        "psnr": settings.psnr,
        "document": settings.document,
        "batch_size": settings.batch_size,
        "device": device,
        "precision": settings.precision,
        "threads": settings.threads if device == "cpu" else None,
        "dtype": values["dtype"],
    }
    text = json.dumps(plan, sort_keys=True)
    return {**plan, "digest": hashlib.sha256(text.encode()).hexdigest()}


def claim_folder(out: Path, plan: dict[str, Any]) -> None:
    """Make `out` this plan's, or see that it is.

    Raises:
        DataError: if it holds something else, or was begun with another plan.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / PLAN
    if not path.exists():
        visible = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
        if visible and not path.exists():  # another worker may just have begun
            raise DataError(f"out={out}: holds {visible[0]}, but no {PLAN}; choose an empty folder")
        temporary = out / f".{PLAN}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
        temporary.write_text(json.dumps(plan, indent=2) + "\n")
        with suppress(FileExistsError):
            os.link(temporary, path)  # whole, and never in place of another's
        temporary.unlink()
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable ({error}); choose another folder") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a plan of vistok tokenize; choose another folder")
    for key, value in plan.items():
        if key != "digest" and found.get(key) != value:
            raise DataError(
                f"out={out}: was begun with another {key} ({_short(found.get(key))}, now "
                f"{_short(value)}); use that one, or choose another folder"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 30 else f"{text.strip(chr(34))[:12]}..."
