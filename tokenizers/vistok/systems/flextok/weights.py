"""Released weights in our names: FlexTok, with its autoencoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import CheckpointError, ConfigError, as_written
from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, inside
from vistok.core.values import is_number

_VAE = "vae.vae"

#: A module has the name that its config gives it; its kind shows in a tensor that no other has.
_KINDS = {
    "out_proj.weight": "alignment",
    "adaLN_modulation.1.weight": "head",
    "proj.weight": "linear",
    "patch_proj.weight": "patches",
    "registers": "registers",
    "posembs": "positions",
    "blocks.0.attn.wq.weight": "trunk",
    "mlp.0.weight": "time",
    "dropout_mask_token": "dropped",
    "nullcond": "null",
}


@register("flextok", kind="importer")
def flextok(published: Published, image_size: int | None) -> Released:
    """FlexTok (https://arxiv.org/abs/2502.13967); three numbers are in its file's own config."""
    said = published.said()
    scale = _number(said, "scaling_factor", None)
    # Its code has 1000 as the latest time, and stretches shorter ranges to as many radians.
    fastest = 1000 / _number(said, "max_timestep", 1000)
    levels = said.get("levels", [8, 8, 8, 5, 5, 5])
    if not isinstance(levels, list):
        raise CheckpointError(f"weights: their config has levels: {levels}; must be a list")
    _name_modules(published)

    autoencoder, state = _autoencoder(published)
    channels = autoencoder["quantizer"]["codebook_dim"]
    state["mean"] = torch.zeros(channels)
    state["std"] = torch.full((channels,), 1 / scale)
    state = inside("autoencoder", state)
    encoder = _encoder(published, channels, state)
    width = encoder["width"]
    decoder = _decoder(published, channels, width, fastest, state)
    # Theirs maps a code to the decoder's width at once, ours by way of the latents' width.
    state["quantizer.project_out.weight"] = torch.eye(width, len(levels))
    state["quantizer.project_out.bias"] = torch.zeros(width)

    factor = 2 ** (len(autoencoder["encoder"]["channel_multipliers"]) - 1)
    side = encoder["image_size"] * factor
    if image_size not in (None, side):
        raise ConfigError(f"image_size={image_size}: these weights have positions for {side} px")
    for part in ("encoder", "decoder"):
        autoencoder[part] |= {"image_size": side, "channels": 3}
    tokenizer = {
        "_target_": "flextok",
        "image_size": side,
        "channels": 3,
        "encoder": encoder,
        "decoder": {**decoder, "image_size": encoder["image_size"]},
        "autoencoder": autoencoder,
        "length": {
            "_target_": "length",
            "distribution": "uniform",
            "per": "sample",
        },
    }
    quantizer = {"_target_": "fsq", "dim": width, "levels": list(levels)}
    return Released(tokenizer, quantizer, state)


def _number(said: Mapping[str, Any], name: str, default: float | None) -> float:
    value = said.get(name, default)
    if not is_number(value) or value <= 0:
        raise CheckpointError(
            f"weights: {name}={as_written(value)} in the config that the file carries; "
            "must be a positive number, as the published safetensors files have it"
        )
    return float(value)


def _name_modules(published: Published) -> None:
    """Name the modules of encoder and decoder by what they are; leave out those of training."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name in [n for n in published.left if n.startswith(("encoder.", "decoder."))]:
        part, rest = name.replace("_checkpoint_wrapped_module.", "").split(".module_dict.", 1)
        module, _, inner = rest.partition(".")
        modules.setdefault(f"{part}.{module}", {})[inner] = published.left.pop(name)
    for module, tensors in modules.items():
        part, _, own = module.partition(".")
        kind = next((_KINDS[inner] for inner in _KINDS if inner in tensors), own)
        if kind == "positions" and tensors["posembs"].shape[1] == 1:
            kind = "places"  # of a sequence, and not of a grid
        if kind == "linear" and part == "encoder":
            kind = "head"
        named = {f"{part}.{kind}.{inner}": value for inner, value in tensors.items()}
        if named.keys() & published.left.keys():
            raise CheckpointError(f"weights: '{module}' is the second of its kind ({kind})")
        if kind != "alignment":
            published.left |= named


def _encoder(published: Published, channels: int, state: dict[str, Tensor]) -> dict[str, Any]:
    registers = published.take("encoder.registers.registers")
    count, width = registers.shape
    state["encoder.latent_tokens"] = registers[None]
    state["encoder.latent_positions"] = torch.zeros(count, width)
    state["encoder.norm_out.weight"] = torch.ones(width)
    state["encoder.norm_out.bias"] = torch.zeros(width)
    patches = _patches(published, "encoder", channels, state)
    depth = _blocks(published, "encoder.trunk.blocks", "encoder.transformer.blocks", state)
    state |= published.move({"encoder.head.proj": "quantizer.project_in"})
    return {
        "_target_": "flextok_encoder",
        **patches,
        **_sizes(count, width, depth),
    }


def _decoder(
    published: Published, channels: int, latent_dim: int, fastest: float, state: dict[str, Tensor]
) -> dict[str, Any]:
    places = published.take("decoder.places.posembs")[0, 0].T
    count, width = places.shape
    state["decoder.register_positions"] = places
    patches = _patches(published, "decoder", channels, state)
    state["decoder.dropped"] = published.take("decoder.dropped.dropout_mask_token")[None, None]
    state["decoder.null"] = published.take("decoder.null.nullcond")[None, None]
    embed = published.take("decoder.linear.proj.weight")
    state["decoder.embed.weight"] = torch.cat(
        [embed, embed.new_zeros(width, latent_dim - embed.shape[1])], 1
    )
    state["decoder.embed.bias"] = published.take("decoder.linear.proj.bias")
    state |= published.move(
        {
            "decoder.time.mlp": "decoder.time_embed",
            "decoder.head.adaLN_modulation.1": "decoder.modulate_out",
            "decoder.head.proj": "decoder.head",
        }
    )
    # Their frequencies fall and ours rise, cosines and sines apart.
    turned = state["decoder.time_embed.0.weight"].unflatten(1, (2, -1)).flip(2)
    state["decoder.time_embed.0.weight"] = turned.flatten(1)
    half = turned.shape[2]
    for n in range(published.count("decoder.trunk.blocks")):
        for kind in ("weight", "bias"):
            name = f"decoder.trunk.blocks.{n}.adaLN_modulation.1.{kind}"
            for i, part in enumerate(published.take(name).chunk(2)):
                state[f"decoder.blocks.{n}.modulations.{i}.{kind}"] = part
    depth = _blocks(published, "decoder.trunk.blocks", "decoder.blocks", state)
    return {
        "_target_": "flow_decoder",
        **patches,
        **_sizes(count, width, depth),
        "latent_dim": latent_dim,
        "time_dim": 2 * half,
        "slowest_time": fastest * 256 ** (1 / half - 1),
        "predicts": "velocity",
    }


def _patches(
    published: Published, part: str, channels: int, state: dict[str, Tensor]
) -> dict[str, Any]:
    """Put patch embedding and positions into the state; what a config says of them."""
    state |= published.move({f"{part}.patches.patch_proj": f"{part}.patch_embed"})
    positions = published.take(f"{part}.positions.posembs")[0]
    state[f"{part}.patch_positions"] = positions.flatten(1).T
    # A patch is a square, folded into channels.
    patch_size = math.isqrt(state[f"{part}.patch_embed.weight"].shape[1] // channels)
    side = positions.shape[1] * patch_size
    return {"image_size": side, "channels": channels, "patch_size": patch_size}


def _sizes(count: int, width: int, depth: int) -> dict[str, int]:
    heads = width // 64  # in all published sizes
    return {"num_latent_tokens": count, "width": width, "depth": depth, "num_heads": heads}


def _blocks(published: Published, theirs: str, ours: str, state: dict[str, Tensor]) -> int:
    """Put the blocks of a transformer into the state; how many there are."""
    depth = published.count(theirs)
    for n in range(depth):
        there, here = f"{theirs}.{n}", f"{ours}.{n}"
        joint = {
            "attn.qkv": ("attn.wq", "attn.wk", "attn.wv"),
            "attn.proj": ("attn.proj",),
            "mlp.gate_up": ("mlp.fc1", "mlp.fc3"),
            "mlp.down": ("mlp.fc2",),
        }
        for name, parts in joint.items():
            weights = [published.take(f"{there}.{part}.weight") for part in parts]
            state[f"{here}.{name}.weight"] = torch.cat(weights)
    return depth


def _autoencoder(published: Published) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Latent diffusion's autoencoder (https://arxiv.org/abs/2112.10752), without its sampling."""
    encoder, state = _cnn(published, "encoder")
    decoder, decoder_state = _cnn(published, "decoder")
    state = inside("encoder", state) | inside("decoder", decoder_state)
    # Of means and deviations the first half are the latents.
    moments = published.take(f"{_VAE}.quant_conv.weight").flatten(1)
    both, channels = len(moments), len(moments) // 2
    state["project_in.weight"] = moments[:channels]
    state["project_in.bias"] = published.take(f"{_VAE}.quant_conv.bias")[:channels]
    # The decoder takes them in the encoder's width, with zeros behind.
    weight = published.take(f"{_VAE}.post_quant_conv.weight").flatten(1)
    bias = published.take(f"{_VAE}.post_quant_conv.bias")
    state["project_out.weight"] = torch.cat([weight, torch.zeros_like(weight)])
    state["project_out.bias"] = torch.cat([bias, torch.zeros_like(bias)])
    weight = state["decoder.conv_in.weight"]
    state["decoder.conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight)], 1)
    encoder["_target_"], decoder["_target_"] = (
        "cnn_encoder",
        "cnn_decoder",
    )
    quantizer = {
        "_target_": "token_bridge",
        "dim": both,
        "codebook_dim": channels,
        "post_training": True,
    }
    config = {
        "_target_": "latent_space",
        "encoder": {**encoder, "latent_dim": both},
        "quantizer": quantizer,
        "decoder": {**decoder, "latent_dim": both},
    }
    return config, state


def _cnn(published: Published, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    there = f"{_VAE}.{part}"
    kind, resample = ("down", "downsamplers") if part == "encoder" else ("up", "upsamplers")
    levels = published.count(f"{there}.{kind}_blocks")
    blocks = published.count(f"{there}.{kind}_blocks.0.resnets")
    layers = []
    for level in range(levels):
        level_ = f"{there}.{kind}_blocks.{level}"
        layers += [f"{level_}.resnets.{n}" for n in range(blocks)]
        layers += [f"{level_}.{resample}.0"] * (level < levels - 1)
    middle = [f"{there}.mid_block.{name}" for name in ("resnets.0", "attentions.0", "resnets.1")]
    layers = [*layers, *middle] if part == "encoder" else [*middle, *layers]
    names = {name: f"layers.{n}" for n, name in enumerate(layers)}
    attention = f"{there}.mid_block.attentions.0"
    here = names.pop(attention)
    names |= {f"{attention}.group_norm": f"{here}.norm"}
    names |= {f"{there}.conv_norm_out": "norm_out"}
    names |= {f"{there}.{end}": end for end in ("conv_in", "conv_out")}
    state = {}
    for end in ("weight", "bias"):
        parts = [published.take(f"{attention}.to_{name}.{end}") for name in "qkv"]
        for name, value in (
            ("qkv", torch.cat(parts)),
            ("proj", published.take(f"{attention}.to_out.0.{end}")),
        ):  # linear layers there, 1x1 convolutions here
            state[f"{here}.{name}.{end}"] = value[..., None, None] if end == "weight" else value
    first = [f"{there}.{kind}_blocks.{level}.resnets.0.conv1.weight" for level in range(levels)]
    widths = [published.shape(name)[0] for name in first]
    widths = widths if part == "encoder" else widths[::-1]
    moved = published.move(names)
    state |= {name.replace(".conv_shortcut.", ".skip."): value for name, value in moved.items()}
    config = {
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "num_res_blocks": blocks,
        "level_attention": False,
    }
    return config, state
