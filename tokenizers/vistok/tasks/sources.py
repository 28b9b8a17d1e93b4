"""Fine-tuning: a run that starts from the weights of another, by `init_from` and `init_parts`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.checkpoints.find import find_checkpoint_or_export
from vistok.checkpoints.load import load, load_weights
from vistok.checkpoints.read import read_config
from vistok.core.errors import CheckpointError, ConfigError, nearest
from vistok.core.geometry import as_pair
from vistok.core.registry import resolve
from vistok.models.tokenizer import Tokenizer
from vistok.nn.positions import resize_positions

_MISSING = object()

#: Share of a fine-tuning in which a fresh player, such as a discriminator, learns alone.
_WARMUP = 0.05


def resolve_source(config: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return a config with the architecture and the sizes of `init_from`.

    What the words say of the tokenizer, the quantizer or the sizes of images holds instead.

    Args:
        config: as composed, resolved, plain containers.
        words: `key=value` of the command line.
    """
    parts_of(config)
    if not config["init_from"]:
        return config
    path = find_checkpoint_or_export(config["init_from"])
    if config["stage"]["name"] != "single":
        return config
    own = read_config(path)
    config = copy.deepcopy(config)
    told = [word.lstrip("+~").partition("=")[0] for word in words]
    _warm_players((config.get("loss") or {}).get("terms") or {}, told)
    tokenizer = copy.deepcopy(own["tokenizer"])
    composed = config["tokenizer"]
    other = resolve(tokenizer["_target_"]) is not resolve(composed["_target_"])
    if "tokenizer" in told or ("experiment" in told and other):
        return config
    for key in ("image_size", "channels"):
        before, asked = tokenizer[key], config["data"][key]
        if f"data.{key}" in told:
            _replace(tokenizer, key, before, asked)
        else:
            config["data"][key] = before
    for key in told:
        if key.startswith("tokenizer."):
            _set(tokenizer, key.split(".")[1:], _at(config, key))
    config["tokenizer"] = tokenizer
    if "quantizer" in told:
        if "dim" in config["quantizer"]:
            config["quantizer"]["dim"] = tokenizer["latent_dim"]
    else:
        quantizer = copy.deepcopy(own["quantizer"])
        for key in told:
            if key.startswith("quantizer."):
                _set(quantizer, key.split(".")[1:], _at(config, key))
        config["quantizer"] = quantizer
    return config


def _warm_players(terms: Mapping[str, Any], told: Sequence[str]) -> None:
    """Let players without weights and warm-up learn alone first, in place, unless words say not.

    Recipes whose discriminator has no warm-up train both from scratch. Of a tokenizer that is
    trained already, the gradient of an untrained discriminator is noise that moves it away.
    """
    for name, options in terms.items():
        if not isinstance(options, dict) or "warmup" not in options or options.get("weights"):
            continue
        keys = {f"loss.terms.{name}.{key}" for key in ("warmup", "warmup_samples")}
        if keys.isdisjoint(told) and not (options["warmup"] or options.get("warmup_samples")):
            options["warmup"] = _WARMUP
            if not options.get("start_samples"):
                options["start"] = max(options.get("start") or 0.0, _WARMUP)


def parts_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parts that `init_parts` names; none for all.

    Raises:
        ConfigError: if there is nothing to take them from, or no such part.
    """
    parts = config.get("init_parts")
    if parts is None:
        return ()
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    if not parts:
        raise ConfigError("init_parts=[]: name the parts, such as [encoder,decoder]")
    if not config["init_from"]:
        raise ConfigError(f"init_parts={list(parts)}: of which run? add init_from=runs/<run>")
    known = ("encoder", "quantizer", "decoder")
    for part in parts:
        if part.split(".")[0] not in known:
            raise ConfigError(
                f"init_parts={list(parts)}: no part {part}{nearest(part, known)}; there are "
                f"{', '.join(known)}"
            )
    return parts


def start_from(tokenizer: Tokenizer, source: str, parts: Sequence[str]) -> list[str]:
    """Give a tokenizer the weights of a run, an export or a checkpoint.

    Positions of patches are interpolated where the images have another size.

    Args:
        tokenizer: changed in place.
        source: path.
        parts: dotted names of what to take; none for all.

    Returns:
        Names of the weights that were interpolated.

    Raises:
        CheckpointError: if the weights do not fit.
    """
    path = find_checkpoint_or_export(source)
    other = load(path)
    found, own = other.state_dict(), tokenizer.state_dict()
    wanted = [name for name in own if _inside(name, parts)]
    for part in parts:
        if not any(_inside(name, [part]) for name in wanted):
            raise ConfigError(f"init_parts: the tokenizer has no weights in a part {part}")
    sizes = other.image_size, tokenizer.image_size
    trained = {name for name, _ in tokenizer.named_parameters()}
    moved = []
    for name in wanted:
        if name in found and found[name].shape != own[name].shape:
            if name not in trained and sizes[0] != sizes[1]:
                found[name] = own[name]  # a table that follows from the size
            elif (resized := _resized(found[name], own[name], *sizes)) is not None:
                found[name] = resized
                moved.append(name)
    state = {name: found[name] for name in wanted if name in found}
    if parts:
        state = {**{name: own[name] for name in own if name not in wanted}, **state}
    else:
        state |= {name: found[name] for name in found if name not in own}
    try:
        load_weights(tokenizer, state, source)
    except CheckpointError as error:
        if parts or not _differs(found, own, "quantizer."):
            raise
        raise CheckpointError(
            f"{source}: its quantizer is another one; init_parts=[encoder,decoder] keeps encoder "
            "and decoder, and starts the quantizer from data"
        ) from error
    return moved


def _differs(found: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str) -> bool:
    """Return whether two state dicts differ, and in nothing but what begins so."""
    names = {*found, *own}
    wrong = [n for n in names if n not in found or n not in own or found[n].shape != own[n].shape]
    return bool(wrong) and all(name.startswith(prefix) for name in wrong)


def _inside(name: str, parts: Sequence[str]) -> bool:
    return not parts or any(name == part or name.startswith(f"{part}.") for part in parts)


def _resized(
    given: Tensor, wanted: Tensor, before: tuple[int, int], after: tuple[int, int]
) -> Tensor | None:
    """Return positions of patches for images of another size; None if they are none.

    Args:
        given: `(extra + N, D)`: for tokens in front, then for patches row by row.
        wanted: `(extra + M, D)`.
        before: (H, W) of images in pixels.
        after: likewise.
    """
    if given.ndim != 2 or wanted.ndim != 2 or given.shape[1] != wanted.shape[1]:
        return None
    for patch in range(1, min(*before, *after) + 1):
        if any(side % patch for side in (*before, *after)):
            continue
        old = before[0] // patch, before[1] // patch
        new = after[0] // patch, after[1] // patch
        extra = len(given) - old[0] * old[1]
        if extra >= 0 and extra == len(wanted) - new[0] * new[1]:
            return torch.cat([given[:extra], resize_positions(given[extra:], old, new)])
    return None


def _replace(config: Any, key: str, before: Any, after: Any) -> None:
    """Replace a value wherever it stands under a key, in place."""
    if isinstance(config, dict):
        for name, value in config.items():
            if name == key and _same_size(value, before):
                config[name] = after
            else:
                _replace(value, key, before, after)
    elif isinstance(config, list):
        for value in config:
            _replace(value, key, before, after)


def _same_size(value: Any, other: Any) -> bool:
    if isinstance(value, (int, list)) and isinstance(other, (int, list)):
        return as_pair(value) == as_pair(other)
    return value == other


def _set(config: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        config = config.setdefault(part, {})
        if not isinstance(config, dict):
            return
    if value is not _MISSING:
        config[path[-1]] = value


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part, _MISSING) if isinstance(config, Mapping) else _MISSING
    return config
