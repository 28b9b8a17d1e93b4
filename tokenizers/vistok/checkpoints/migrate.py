"""One function that brings what older versions wrote into the form of today.

A run's config, a checkpoint and an export name the format in which they were written; without a
number it is 1. Each step below leads from one form to the next, and is never changed afterwards.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vistok.checkpoints.old_forms import say_forms
from vistok.checkpoints.old_grids import keep_grids
from vistok.core.errors import CheckpointError, as_written
from vistok.core.registry import registered, with_names
from vistok.core.values import is_whole

#: The form that is written today.
FORMAT = 2


def in_todays_form(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's config as it is stored: with its format first, and parts by their names."""
    return {**with_names({"format": FORMAT, **config}), "format": FORMAT}


def migrate_config(config: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Return a run's or an export's config in today's form; one that has it already as it is.

    Args:
        config: plain containers, with `format` (1 if it is missing).
        source: the file that it is from, for errors.

    Raises:
        CheckpointError: if the format is not one that was ever written, or a newer one.
    """
    number = _format(config, source)
    if number == FORMAT:
        return config
    config = copy.deepcopy(config)
    for step in _CONFIG_STEPS[number - 1 :]:
        step(config)
    return {**config, "format": FORMAT}


def _one_objective(config: dict[str, Any]) -> None:
    """Bring weights, alignment and adversary into the one table of terms."""
    loss = config.get("loss")
    if not isinstance(loss, dict) or "weights" not in loss:  # an export's config
        return
    weights = loss.pop("weights")
    loss.pop("_target_", None)
    terms = {}
    for name, term in (loss.get("terms") or {}).items():
        of = "codes" if str(term.get("_target_")).endswith(".CodeLoss") else "image"
        terms[name] = {**_COMMON, **term, "weight": weights[name], "of": of}
    alignment = config.pop("alignment", None) or {}
    if alignment.get("teacher"):
        terms["alignment"] = {**_COMMON, **_alignment(alignment)}
    adversary = config.pop("adversary", None) or {}
    if adversary.get("discriminator"):
        terms["adversarial"] = {**_COMMON, "_target_": "adversary", **adversary}
    loss["terms"] = terms


_COMMON = {"weight": 1.0, "of": "image", "start_samples": 0, "ramp_samples": 0}


def _alignment(old: dict[str, Any]) -> dict[str, Any]:
    form = old.get("form", "plain")
    teacher = {"_target_": "pretrained", "name": old["teacher"]}
    term = {
        "weight": old["weight"],
        "teacher": {**teacher, "weights": old["weights"], "input_size": old["input_size"]},
    }
    if form == "foundation":
        return {"_target_": "foundation_alignment", **term}
    target = "hierarchical_alignment" if form == "hierarchical" else "alignment"
    tap = f"decoder.block.{old['layer']}"
    return {"_target_": target, **term, "tap": tap, "grid": old.get("grid", "tokens")}


def migrate_checkpoint(content: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Return a checkpoint's content in today's form; without a config in it, as it is.

    Args:
        content: as it was read, perhaps without some of its top level.
        source: the file that it is from, for errors.

    Raises:
        CheckpointError: as `migrate_config`.
    """
    parameters = content.get("hyper_parameters")
    if not isinstance(parameters, dict) or not isinstance(parameters.get("config"), dict):
        return content
    config = parameters["config"]
    content = {**content}
    for step in _CHECKPOINT_STEPS[_format(config, source) - 1 :]:
        step(content)
    content["hyper_parameters"] = {**parameters, "config": migrate_config(config, source)}
    return content


def _format(config: dict[str, Any], source: str | Path) -> int:
    number = config.get("format", 1)
    if not is_whole(number) or number < 1:
        raise CheckpointError(
            f"{source}: format={as_written(number)} must be a whole number, 1 to {FORMAT}"
        )
    if number > FORMAT:
        raise CheckpointError(
            f"{source}: written in format {number} by a newer vistok, and this one reads formats "
            f"up to {FORMAT}; update vistok"
        )
    return number


def _untuned(config: Any) -> None:
    """Let attention that chose its kernel by trial take the one that needs no trial."""
    if isinstance(config, dict):
        if config.get("attention") == "auto":
            config["attention"] = "dense"
        config = config.values()
    elif not isinstance(config, list):
        return
    for value in config:
        _untuned(value)


#: Steps from form 1 to 2, in their order; each changes the config in place. They see parts by the
#: import paths of that time.
_FROM_1: list[Callable[[dict[str, Any]], None]] = [
    keep_grids,
    say_forms,
    _untuned,
    _one_objective,
]


def _terms_of_one_objective(content: dict[str, Any]) -> None:
    """Put the weights of alignment and adversary under the names of their terms."""
    if isinstance(state := content.get("state_dict"), dict):
        content["state_dict"] = {
            re.sub(r"^alignment\.", "objective.terms.alignment.", name): value
            for name, value in state.items()
        }
    if "adversary" in content:
        content["players"] = {"adversarial": content.pop("adversary")}


#: Steps for the other contents of a checkpoint, before its config changes; each may replace what
#: is at the top level, in place.
_CHECKPOINT_FROM_1: list[Callable[[dict[str, Any]], None]] = [_terms_of_one_objective]


def _from_1(config: dict[str, Any]) -> None:
    for step in _FROM_1:
        step(config)
    _name_parts(config)


def _checkpoint_from_1(content: dict[str, Any]) -> None:
    for step in _CHECKPOINT_FROM_1:
        step(content)


_CONFIG_STEPS: list[Callable[[dict[str, Any]], None]] = [_from_1]

_CHECKPOINT_STEPS: list[Callable[[dict[str, Any]], None]] = [_checkpoint_from_1]

#: Where parts lived: first in a folder for each kind of part, then by system.
_OLD_PATH = re.compile(r"vistok\.(encoders|decoders|models|quantizers|losses|systems)(\.\w+)+")


def _name_parts(config: dict[str, Any]) -> None:
    """Replace import paths by names: a class has moved between modules, but kept its own name."""
    by_class = {
        cls.__name__: name
        for name, cls in registered().items()
        if cls.__module__.startswith("vistok.")
    }
    for part in _mappings(config):
        target = part.get("_target_")
        if isinstance(target, str) and _OLD_PATH.fullmatch(target):
            part["_target_"] = by_class.get(target.rpartition(".")[2], target)
    if isinstance(data := config.get("data"), dict):
        data.pop("_target_", None)  # there is one kind of DataModule


def _mappings(config: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping of a config, inner ones too."""
    if isinstance(config, dict):
        yield config
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, (dict, list)):
            yield from _mappings(value)
