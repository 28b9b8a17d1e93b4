"""ResTok's released weights in our names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, inside, vector_quantizer
from vistok.core.taps import NO_TAPS, Taps
from vistok.models.maskgit_cnn_weights import maskgit_decoder, maskgit_encoder
from vistok.systems.restok.encoder import ResTokEncoder

#: What only training needs: the teacher, the projections to it, and the mask token painted for it.
_OF_TRAINING = ("foundation_model.", "vf_proj", "decoder.feat_mask_token")


@register("reshaped_restok_encoder")
class ReshapedResTokEncoder(ResTokEncoder):
    """ResTok's encoder as the released weights need it.

    The K x W values of the latents are read in memory as W x K: each token gets channels of every
    latent, of all levels.
    """

    def latents(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return what the projections see: `(B, K, W)`, mixed."""
        x = super().latents(images, taps)
        return x.reshape(len(x), x.shape[2], self.num_tokens).transpose(1, 2)


@register("restok", kind="importer")
def restok(published: Published, image_size: int | None) -> Released:
    """ResTok (https://arxiv.org/abs/2601.03955)."""
    size = image_size or 256  # nothing in it has a size
    published.left = {  # checkpoints of compiled training have a prefix
        name.removeprefix("_orig_mod."): value for name, value in published.left.items()
    }
    for name in [name for name in published.left if name.startswith(_OF_TRAINING)]:
        del published.left[name]
    codes = published.take("quantize.embedding.weight")
    encoder, encoder_state = _encoder(published, size)
    decoder, decoder_state = _decoder(published, size)
    count = 2 ** (len(encoder_state["latent_levels"]) - 1)  # levels of 1, 1, 2, 4, ... tokens
    channels = encoder["cnn"]["channels"]
    tokenizer = {
        "_target_": "restok",
        "image_size": size,
        "channels": channels,
        "encoder": encoder | {"num_latent_tokens": count, "dim": codes.shape[1]},
        "decoder": decoder | {"num_latent_tokens": count, "latent_dim": codes.shape[1]},
        "length": {
            "_target_": "levels",
            "shortest": min(4, count),
            "full_probability": 0.8,
        },
    }
    state = inside("encoder", encoder_state) | inside("decoder", decoder_state)
    state["quantizer.embedding"] = codes
    return Released(tokenizer, vector_quantizer(codes, codes.shape[1], "cosine"), state)


def _encoder(published: Published, image_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cnn, cnn_state = maskgit_encoder(published, "pixel_encoder", image_size)
    state = inside("cnn", cnn_state) | _blocks(published, "encoder")
    names = {"encoder.ln_pre": "norm_in", "encoder.ln_post": "norm_out"}
    for n in range(published.count("encoder.conv_out")):
        names[f"encoder.conv_out.{n}"] = f"project.layers.{n}"
    state |= published.move(names | {"encoder.patch_embed": "embed"})
    for name in [name for name, value in state.items() if value.ndim == 4 and "cnn." not in name]:
        state[name] = state[name][:, :, 0, 0]
    for theirs, ours in (("level", "image"), ("latent_token_level", "latent")):
        state[f"{ours}_levels"] = _levels(published, f"encoder.{theirs}_embedding")
    sizes = _sizes(state)
    stages = len(state["image_levels"])
    config = {
        "_target_": "reshaped_restok_encoder",
        "cnn": cnn | {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        **sizes,
        "merge_layers": [n * sizes["depth"] // stages - 1 for n in range(1, stages)],
    }
    return config, state


def _decoder(published: Published, image_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cnn, cnn_state = maskgit_decoder(published, "pixel_decoder", image_size)
    state = inside("cnn", cnn_state) | _blocks(published, "decoder")
    names = {"decoder.ln_pre": "norm_in", "decoder.ln_post": "norm_out"}
    levels = _levels(published, "decoder.latent_token_level_embedding")
    for n in range(len(levels)):
        names[f"decoder.decoder_embed.{n}"] = f"embed.layers.{n}"
    state |= published.move(names)
    for n, level in enumerate(levels):
        state[f"embed.layers.{n}.bias"] += level
    state["project.weight"] = published.take("decoder.ffn.weight")[:, :, 0, 0]
    state["project.bias"] = published.take("decoder.ffn.bias")
    state["dropped"] = published.take("decoder.latent_mask_token")
    state["mask_token"] = published.take("decoder.mask_token")
    return {"_target_": "restok_decoder", "cnn": cnn, **_sizes(state)}, state


def _blocks(published: Published, part: str) -> dict[str, Tensor]:
    names, state = {}, {}
    for n in range(published.count(f"{part}.blocks")):
        theirs, ours = f"{part}.blocks.{n}", f"blocks.{n}"
        for scale in (1, 2):
            state[f"{ours}.scale{scale}"] = published.take(f"{theirs}.gamma_{scale}")
        for kind in ("q_bias", "v_bias"):
            state[f"{ours}.attn.{kind}"] = published.take(f"{theirs}.attn.{kind}")
        for name in ("attn.qkv", "attn.q_norm", "attn.k_norm", "attn.proj", "norm1", "norm2"):
            names[f"{theirs}.{name}"] = f"{ours}.{name}"
        names |= {f"{theirs}.mlp.fc1": f"{ours}.mlp.0", f"{theirs}.mlp.fc2": f"{ours}.mlp.2"}
    return state | published.move(names)


def _levels(published: Published, name: str) -> Tensor:
    return torch.cat([published.take(f"{name}.{n}") for n in range(published.count(name))])


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    width = len(state["norm_in.weight"])
    return {
        "width": width,
        "depth": sum(name.endswith(".norm1.weight") and "cnn." not in name for name in state),
        "num_heads": width // len(state["blocks.0.attn.q_norm.weight"]),
    }
