"""One function that brings what older versions wrote into the form of today.

A run's config, a checkpoint and an export name the format in which they were written; without a
number it is 1. Each step below leads from one form to the next, and is never changed afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

#: The form that is written today.
FORMAT = 2


def migrate_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's or an export's config in today's form; one that has it already as it is.

    Args:
        config: plain containers, with `format` (1 if it is missing).
    """
    number = config.get("format", 1)
    if number == FORMAT:
        return config
    config = copy.deepcopy(config)
    for step in _CONFIG_STEPS[number - 1 :]:
        step(config)
    config["format"] = FORMAT
    return config


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


#: Steps from form 1 to 2, in their order; each changes the config in place.
_FROM_1: list[Callable[[dict[str, Any]], None]] = [_one_objective]


def _from_1(config: dict[str, Any]) -> None:
    for step in _FROM_1:
        step(config)


_CONFIG_STEPS: list[Callable[[dict[str, Any]], None]] = [_from_1]
