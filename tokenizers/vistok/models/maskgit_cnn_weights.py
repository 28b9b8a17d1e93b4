"""Released weights of MaskGIT's CNN, under the names of this project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vistok.core.released_weights import Published


def maskgit_encoder(
    published: Published, prefix: str, image_size: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state of MaskGIT's encoder, whose published names begin with `prefix`."""
    blocks = published.count(f"{prefix}.mid")
    layers: list[str] = []
    for level in range(published.count(f"{prefix}.down")):
        layers += ["an average over 2x2 cells"] * (level > 0)
        layers += [f"{prefix}.down.{level}.block.{n}" for n in range(blocks)]
    layers += [f"{prefix}.mid.{n}" for n in range(blocks)]
    names = {name: f"layers.{n}" for n, name in enumerate(layers) if name.startswith(prefix)}
    ends = {f"{prefix}.{end}": end for end in ("conv_in", "norm_out", "conv_out")}
    state = _maskgit_state(published, names | ends)
    widths = [
        len(state[f"{ours}.conv1.weight"])
        for theirs, ours in names.items()
        if ".down." in theirs and theirs.endswith(".block.0")
    ]
    config = {
        "_target_": "maskgit_encoder",
        "image_size": image_size,
        "channels": state["conv_in.weight"].shape[1],
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "latent_dim": len(state["conv_out.weight"]),
        "num_res_blocks": blocks,
        **_norms(widths),
    }
    return config, state


def maskgit_decoder(
    published: Published, prefix: str, image_size: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `maskgit_encoder` does, for the decoder."""
    blocks = published.count(f"{prefix}.mid")
    layers = [f"{prefix}.mid.{n}" for n in range(blocks)]
    for level in reversed(range(published.count(f"{prefix}.up"))):
        layers += [f"{prefix}.up.{level}.block.{n}" for n in range(blocks)]
        layers += [f"{prefix}.up.{level}.upsample_conv"] * (level > 0)
    names = {
        name: f"layers.{n}" + ".conv" * name.endswith("upsample_conv")
        for n, name in enumerate(layers)
    }
    ends = {f"{prefix}.{end}": end for end in ("conv_in", "norm_out", "conv_out")}
    state = _maskgit_state(published, names | ends)
    widths = [
        len(state[f"{ours}.conv1.weight"])
        for theirs, ours in names.items()
        if ".up." in theirs and theirs.endswith(".block.0")
    ][::-1]
    config = {
        "_target_": "maskgit_decoder",
        "image_size": image_size,
        "channels": len(state["conv_out.weight"]),
        "latent_dim": state["conv_in.weight"].shape[1],
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "num_res_blocks": blocks,
        **_norms(widths),
    }
    return config, state


def _norms(widths: Sequence[int]) -> dict[str, int]:
    """Return the groups of the norms where ours would have others: of fewer than 64 channels."""
    return {"norm_groups": 32} if min(widths) < 64 else {}


def _maskgit_state(published: Published, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {k.replace("nin_shortcut", "skip"): v for k, v in published.move(names).items()}
