"""Stages of a training recipe: what is frozen, and where weights come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vistok.checkpoints.find import find_checkpoint_or_export
from vistok.checkpoints.load import load
from vistok.checkpoints.read import read_config
from vistok.core.errors import ConfigError
from vistok.core.geometry import as_pair
from vistok.core.registry import registered, resolve
from vistok.models.build import build_tokenizer
from vistok.models.stage import Source, Stage
from vistok.models.tokenizer import Tokenizer

#: Options of the parts that change how they compute and not what, so that any stage takes them.
_COMPUTING = ("activation_checkpointing", "attention")


def resolve_stage(config: dict[str, Any], words: Sequence[str] = ()) -> dict[str, Any]:
    """Return a config with the architecture and start that its stage calls for.

    Args:
        config: as composed, resolved, plain containers.
        words: `key=value` of the command line. What they say of the tokenizer or the quantizer
            holds, or is refused.

    Raises:
        ConfigError: if the stage lacks its source, or the two do not fit, or a word does not.
    """
    options = config["stage"]
    stage = _stage(options)
    for name, other in registered("stage").items():
        if options.get(other.source) and (stage is None or other.source != stage.source):
            raise ConfigError(
                f"stage.{other.source} is set, but stage={options['name']} does not read it; add "
                f"stage={name}"
            )
    if stage is None:
        return config
    source = _described(config, stage, options)
    found = stage.resolve(config, source)
    return _with_words(found, config, words, stage) if stage.keeps_words else found


def prepare_stage(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Give a tokenizer what its stage builds from the source, and freeze what the stage keeps."""
    options = config.get("stage")
    if not options:  # a run from before there were stages
        return
    stage = _stage(options)
    if stage is not None and stage.reads_weights:
        path = options[stage.source]
        # A fresh run found it when its config was resolved. A resumed one may need it no more, for
        # the weights are in its checkpoint.
        if Path(path).exists() or not stage.forgets_source:
            stage.prepare(tokenizer, load(path))
    frozen = options["frozen"] or []
    frozen = frozen if isinstance(frozen, list) else [frozen]
    parts = [name for name, _ in tokenizer.named_modules(remove_duplicate=False) if name]
    for name in frozen:
        if name not in parts:
            raise ConfigError(f"stage.frozen: the tokenizer has no part {name or repr(name)}")
    tokenizer.freeze(*frozen)


def _stage(options: Mapping[str, Any]) -> Stage | None:
    """Return the stage that a run names; None for one that trains everything from the start."""
    name = options["name"]
    return None if name == "single" else resolve(name, kind="stage", key="stage.name")()


def _described(config: dict[str, Any], stage: Stage, options: Mapping[str, Any]) -> Source:
    """Return config and architecture (without values) of a run that fits this one's images."""
    key, path = stage.source, options[stage.source]
    if not path:
        raise ConfigError(
            f"stage.{key}: is missing; set it to {stage.described}, stage.{key}=runs/<run>"
        )
    own = read_config(find_checkpoint_or_export(path))
    with torch.device("meta"):
        found = build_tokenizer(own, teachers=False)
    size, channels = as_pair(config["data"]["image_size"]), config["data"]["channels"]
    if (found.image_size, found.channels) != (size, channels):
        raise ConfigError(
            f"stage.{key}={path}: takes {found.channels} x {found.image_size} images, but "
            f"data.image_size and data.channels are {size} and {channels}"
        )
    return Source(str(path), own, found)


def _with_words(
    found: dict[str, Any], config: dict[str, Any], words: Sequence[str], stage: Stage
) -> dict[str, Any]:
    """Return `found` with what the words say of how it computes; other words must agree."""
    name, path = found["stage"]["name"], found["stage"][stage.source]
    tokenizer, own = found["tokenizer"], config["tokenizer"]
    derived = {f"tokenizer.{key}" for key in stage.derived}
    for word in reversed(words):  # of two for one key the later one holds
        given = word.lstrip("+~").partition("=")[0]
        if given == "experiment" and own["_target_"] != tokenizer["_target_"]:
            # Of the same kind, it is the recipe of the source's tokenizer, whatever its size.
            raise ConfigError(
                f"{word}: is for a {_class(own)}, but stage={name} trains the {_class(tokenizer)} "
                f"of stage.{stage.source}={path}; choose an experiment for that"
            )
        if given.split(".")[0] not in ("tokenizer", "quantizer"):
            continue
        option = given.split(".")[-1]
        if option in _COMPUTING:  # of the decoder too where it follows from the encoder's
            for part in ("encoder", "decoder"):
                if option in own[part]:
                    tokenizer[part][option] = own[part][option]
        elif given.startswith("tokenizer.length.") and "length" in tokenizer:
            tokenizer["length"] = own["length"]
        for key, value in _leaves(_at(config, given), given):
            skipped = given == "tokenizer" and (key in derived or key.split(".")[-1] in _COMPUTING)
            if not skipped and _at(found, key) != value:
                raise ConfigError(
                    f"{word}: stage={name} takes {key}={_at(found, key)} from "
                    f"stage.{stage.source}={path}; leave it out"
                )
    return found


def _class(config: Mapping[str, Any]) -> str:
    return resolve(config["_target_"]).__name__


def _at(config: Any, key: str) -> Any:
    """The value of a dotted key; None if there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of everything under a value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key, value
