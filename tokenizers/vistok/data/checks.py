"""Check values of the config: return each, or raise an error that says what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vistok.core.errors import ConfigError, nearest
from vistok.core.values import check, is_number, whole
from vistok.data.places import as_path

KINDS = ("sample", "folder", "shards", "mixture")


def check_places(kind: str, train: Any, val: Any) -> None:
    """Raise if `data.train` and `data.val` are not what a kind of data takes."""
    if kind not in KINDS:
        raise ConfigError(
            f"data.kind={kind!r}: must be one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}"
        )
    if kind == "sample" and (train or val):
        raise ConfigError(
            "data=sample brings its own images; use data=folder or data=shards to set"
            " data.train and data.val"
        )
    if kind == "mixture" and train:
        raise ConfigError("data=mixture reads data.sources; data.train is for a single source")
    if kind in ("folder", "shards") and not train:
        example = "/photos" if kind == "folder" else "'/sets/train-{000000..000127}.tar'"
        raise ConfigError(f"data.train is not set; for example data.train={example}")
    if kind == "folder" and not (isinstance(train, str) and isinstance(val, str | None)):
        raise ConfigError("data=folder takes one folder as data.train, and one as data.val")


def mixture_sources(sources: Any) -> dict[str, dict[str, Any]]:
    """Return the parts of a mixture, checked."""
    example = (
        "data.sources={photos:{train:/photos,weight:3},art:{train:'/sets/art-*.tar',weight:1}}"
    )
    if not isinstance(sources, Mapping) or not sources:
        raise ConfigError(f'data.sources is not set; for example "{example}"')
    found = {}
    for name, spec in sources.items():
        if not isinstance(spec, Mapping) or not spec.get("train"):
            raise ConfigError(f"data.sources.{name}.train is not set; for example {example}")
        if unknown := set(spec) - {"train", "weight"}:
            raise ConfigError(
                f"data.sources.{name}: unknown key {min(unknown)}; the keys are train and weight"
            )
        found[str(name)] = {
            "train": as_path(spec["train"]),
            "weight": above_zero(f"sources.{name}.weight", spec.get("weight", 1)),
        }
    return found


def at_least(least: int, name: str, value: Any) -> int:
    """Return a whole number of at least `least`."""
    check(f"data.{name}", value, whole(least))
    return value


def above_zero(name: str, value: Any) -> float:
    """Return a number above 0."""
    if not is_number(value) or not value > 0:
        raise ConfigError(f"data.{name}={value!r}: must be a number above 0")
    return float(value)


def share_pair(name: str, value: Any) -> tuple[float, float]:
    """Return [least, largest], both in (0, 1]."""
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    numbers = len(pair) == 2 and all(type(number) in (int, float) for number in pair)
    if not numbers or not 0 < pair[0] <= pair[1] <= 1:
        raise ConfigError(f"data.{name}={value!r}: must be [least, largest], both in (0, 1]")
    return float(pair[0]), float(pair[1])


def value_range(value: Any) -> tuple[float, float] | None:
    """Return [black, white] of images of more than 8 bits; None for those of their types."""
    if value is None:
        return None
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(pair) != 2 or not all(map(is_number, pair)) or not pair[0] < pair[1]:
        raise ConfigError(
            f"data.value_range={value!r}: must be [LOW, HIGH], the values that are black and white,"
            " for example [0, 1]"
        )
    return float(pair[0]), float(pair[1])


def image_size(value: Any, name: str = "image_size") -> tuple[int, int]:
    """Return height and width, of one number or two."""
    sides = list(value) if isinstance(value, Sequence) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
        raise ConfigError(
            f"data.{name}={value!r}: must be a positive number of pixels, or [height, width]"
        )
    return sides[0], sides[1]
