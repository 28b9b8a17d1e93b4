"""Released weights of GigaTok and the systems built on it, under the names of this project."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ConfigError
from vistok.core.released_weights import Published, Released, vector_quantizer

_POSITIONS = "latent_token_positional_embedding"

_TRAINING = ("s1to2decoder.distill_mlp.", "quantize.codebook_used")  # used in training alone


def released_qformer(
    published: Published, image_size: int | None, model: dict[str, Any]
) -> Released:
    """Return a tokenizer of a CNN around a Q-Former with a codebook.

    Args:
        published: what GigaTok, or a system built on it, released.
        image_size: side in pixels; None for that of the weights.
        model: the tokenizer's `_target_`, and `length` if its queries are padded.
    """
    for name in [name for name in published.left if name.startswith(_TRAINING)]:
        del published.left[name]
    codes = published.take("quantize.embedding.weight")
    state = {"quantizer.embedding": codes}
    padded = "length" in model
    encoder = _qformer(published, "s2to1encoder", "encoder", padded, state)
    decoder = _qformer(published, "s1to2decoder", "decoder", padded, state)
    for theirs, ours in (
        ("s2to1encoder.conv_out", "encoder.project"),
        ("quant_conv", "quantizer.project_in"),
        ("post_quant_conv", "quantizer.project_out"),
    ):
        state[f"{ours}.weight"] = published.take(f"{theirs}.weight").flatten(1)  # 1x1
        state[f"{ours}.bias"] = published.take(f"{theirs}.bias")
    state |= published.move(
        {
            "s2to1encoder.global_proj": "encoder.query",
            "encoder.conv_out": "encoder.conv_out",
            "s1to2decoder.conv_out": "decoder.conv_out",
        }
    )
    cells = len(state["encoder.grid_positions"])
    # Published images are squares: the table has a position per cell.
    side = math.isqrt(cells) * 2 ** (published.count("encoder.conv_blocks") - 1)
    if image_size not in (None, side):
        raise ConfigError(f"image_size={image_size}: these weights have positions for {side} px")
    dim = len(state["encoder.project.weight"])
    size = {"image_size": side, "channels": published.shape("decoder.conv_out.bias")[0]}
    cnn = {**size, "stem": 1, "attention": False}
    tokenizer = {
        **model,
        **size,
        "encoder": {
            "_target_": "qformer_encoder",
            "dim": dim,
            "cnn": {
                "_target_": "cnn_encoder",
                **cnn,
                **_cnn(published, "encoder", state),
            },
            **encoder,
        },
        "decoder": {
            "_target_": "qformer_decoder",
            "latent_dim": dim,
            "cnn": {
                "_target_": "cnn_decoder",
                "latent_dim": dim,
                "upsample": "depth_to_space",
                "adaptive_norm": True,
                **cnn,
                **_cnn(published, "decoder", state),
            },
            **decoder,
        },
    }
    # Theirs takes the deviations of n cells with n - 1 in the denominator.
    for name in (name for name in state if name.endswith(".scale.weight")):
        state[name] = state[name] * math.sqrt(cells / max(1, cells - 1))
    return Released(tokenizer, vector_quantizer(codes, dim, "cosine"), state)


def _qformer(
    published: Published, theirs: str, ours: str, padded: bool, state: dict[str, Tensor]
) -> dict[str, Any]:
    """Put a Q-Former's tensors into the state; its config."""
    positions = published.take(f"{theirs}.{_POSITIONS}")[:, 0]
    config: dict[str, Any] = {"num_latent_tokens": len(positions), "padding_start": None}
    if padded:
        padding = published.take(f"{theirs}.{_POSITIONS}_comp")[:, 0]
        config["padding_start"] = len(positions) - len(padding)
        positions = torch.cat([positions, padding])
    state[f"{ours}.latent_positions"] = positions
    state[f"{ours}.grid_positions"] = published.take(f"{theirs}.positional_embedding")[:, 0]
    depth = published.count(f"{theirs}.transformer")
    names = {f"{theirs}.{ours}_embed": f"{ours}.embed"}
    names |= {f"{theirs}.ln_pre": f"{ours}.norm_in", f"{theirs}.ln_post": f"{ours}.norm_out"}
    for n in range(depth):
        there, here = f"{theirs}.transformer.{n}", f"{ours}.transformer.blocks.{n}"
        for layer, name in (("self_attn", "self_attn"), ("multihead_attn", "cross_attn")):
            for kind in ("weight", "bias"):
                joint = published.take(f"{there}.{layer}.in_proj_{kind}").chunk(3)
                state |= {
                    f"{here}.{name}.{part}.{kind}": value
                    for part, value in zip("qkv", joint, strict=True)
                }
            names[f"{there}.{layer}.out_proj"] = f"{here}.{name}.proj"
        names |= {f"{there}.norm{i}": f"{here}.norm{i}" for i in (1, 2, 3)}
        names |= {f"{there}.linear1": f"{here}.mlp.0", f"{there}.linear2": f"{here}.mlp.2"}
    state |= published.move(names)
    width = len(state[f"{ours}.norm_out.weight"])
    heads = width // 64  # in all published sizes
    return {**config, "width": width, "depth": depth, "num_heads": heads}


def _cnn(published: Published, part: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Put a CNN's tensors into the state; what its config says of levels and blocks."""
    levels = published.count(f"{part}.conv_blocks")
    blocks = published.count(f"{part}.conv_blocks.0.res")
    first = [f"{part}.conv_blocks.{level}.res.0.conv1.weight" for level in range(levels)]
    widths = [published.shape(name)[0] for name in first]
    widths = widths if part == "encoder" else widths[::-1]
    resample = "downsample" if part == "encoder" else "upsample.conv1"
    layers = []
    for level in range(levels):
        layers += [f"decoder.adaptive.{level}"] * (part == "decoder")
        layers += [f"{part}.conv_blocks.{level}.res.{n}" for n in range(blocks)]
        layers += [f"{part}.conv_blocks.{level}.{resample}"] * (level < levels - 1)
    middle = [f"{part}.mid.0", f"{part}.mid.1"]
    layers = [*layers, *middle] if part == "encoder" else [*middle, *layers]
    names = {name: f"{part}.cnn.layers.{n}" for n, name in enumerate(layers)}
    upsampling = [name for name in layers if name.endswith("upsample.conv1")]
    names |= {name: f"{names[name]}.conv" for name in upsampling}
    ends = ["conv_in", "norm_out"] + ["conv_out"] * (part == "decoder")
    moved = published.move(names | {f"{part}.{end}": f"{part}.cnn.{end}" for end in ends})
    for name in (names[theirs] for theirs in upsampling):
        for kind in ("weight", "bias"):
            # Theirs counts the four pixels first, ours the channels.
            value = moved[f"{name}.{kind}"].unflatten(0, (4, -1))
            moved[f"{name}.{kind}"] = value.transpose(0, 1).flatten(0, 1)
    for theirs, ours in (("nin_shortcut", "skip"), ("gamma", "scale"), ("beta", "shift")):
        moved = {name.replace(f".{theirs}.", f".{ours}."): value for name, value in moved.items()}
    state |= moved
    return {
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "num_res_blocks": blocks,
    }
