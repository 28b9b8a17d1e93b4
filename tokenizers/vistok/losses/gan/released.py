"""Weights of discriminators that others released, or that a run of ours has learned."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.core.errors import CheckpointError
from vistok.losses.gan.discriminators import Discriminator


def load_discriminator(discriminator: nn.Module, path: Path) -> None:
    """Give a discriminator the weights in a file, by our names or the published ones.

    They may lie anywhere in it: under "discriminator" (LlamaGen, GigaTok, ImageFolder), as
    `loss.discriminator.*` (taming) or `discriminator.*` (TiTok), or under "players" in a checkpoint
    of ours. Only tensors and plain containers are read.

    Args:
        discriminator: changed in place.
        path: a .safetensors, .pt, .pth, .bin or .ckpt file.

    Raises:
        CheckpointError: naming the first tensor that is missing, left over or of another shape.
    """
    wanted = discriminator.state_dict()
    best: tuple[int, dict[str, Tensor]] = (0, {})
    for tensors in _groups(_content(path)):
        found = _named(discriminator, tensors)
        shared = len(found.keys() & wanted.keys())
        if shared > best[0]:
            best = shared, found
    found = best[1]
    here = f"{path}: not weights of {type(discriminator).__name__}"
    for name, value in wanted.items():
        if name not in found:
            raise CheckpointError(f"{here}: '{name}' is missing")
        if found[name].shape != value.shape:
            sizes = tuple(found[name].shape), tuple(value.shape)
            raise CheckpointError(f"{here}: '{name}' has shape {sizes[0]}, expected {sizes[1]}")
    if left := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"{here}: '{left[0]}' has no place (and {len(left) - 1} more)")
    discriminator.load_state_dict(found)


def _content(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):  # a training checkpoint's arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # other files make torch.load raise almost anything
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: cannot be read as weights ({reason})") from error


def _groups(content: Any, depth: int = 0) -> list[dict[str, Tensor]]:
    """Return every mapping of names to tensors, and of those under a prefix `...discriminator.`."""
    if not isinstance(content, dict) or depth > 4:
        return []
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor) and isinstance(k, str)}
    groups = [tensors] if tensors else []
    marked: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        before, mark, after = name.rpartition("discriminator.")
        if mark:
            marked.setdefault(before, {})[after] = value
    groups = [*marked.values(), *groups]
    for value in content.values():
        groups += _groups(value, depth + 1)
    return groups


def _named(discriminator: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under our names; `module.` of DDP and `_orig_mod.` of compile fall away."""
    found = {}
    for name, value in tensors.items():
        for wrapper in ("module.", "_orig_mod."):
            name = name.removeprefix(wrapper)
        if isinstance(discriminator, Discriminator):
            name = discriminator.our_name(name)
        found[name] = value.float() if value.is_floating_point() else value
    return found
