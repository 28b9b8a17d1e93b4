"""The alignment that a run asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from vistok.core.errors import ArgumentError, ConfigError, nearest
from vistok.core.values import check_number, check_whole
from vistok.losses.alignment import Alignment, HierarchicalAlignment
from vistok.models.pretrained import Teacher
from vistok.models.tokenizer import Tokenizer
from vistok.systems.restok.alignment import FoundationAlignment

_FORMS = {
    "plain": Alignment,
    "hierarchical": HierarchicalAlignment,
    "foundation": FoundationAlignment,
}


def build_alignment(tokenizer: Tokenizer, config: Mapping[str, Any] | None) -> nn.Module | None:
    """The alignment that a run's config asks for, if any."""
    if not config or not config["teacher"]:
        return None
    form = config.get("form", "plain")  # runs from before there were forms have none
    if form not in _FORMS:
        raise ConfigError(
            f"alignment.form={form}: must be one of {', '.join(_FORMS)}{nearest(str(form), _FORMS)}"
        )
    check_number("alignment.weight", config["weight"], 0)
    check_whole("alignment.layer", config["layer"], 0)
    check_whole("alignment.input_size", config["input_size"], 1)
    try:
        teacher = Teacher(config["teacher"], config["weights"], config["input_size"])
    except ArgumentError as error:
        key = re.sub("^name=", "teacher=", str(error))  # as the config calls it
        raise ConfigError(f"alignment.{key}") from error
    grid = config.get("grid", "tokens")  # nor a choice of grids
    return _FORMS[form](tokenizer, teacher, config["layer"], grid)
