"""Released weights of TiTok and the systems built on it, under the names of this project."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import CheckpointError, ConfigError
from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, inside, vector_quantizer
from vistok.core.taps import NO_TAPS, Taps
from vistok.models.latent_vit import LatentTransformerEncoder
from vistok.models.maskgit_cnn_weights import maskgit_decoder


@register("reshaped_latent_vit_encoder")
class ReshapedLatentEncoder(LatentTransformerEncoder):
    """TiTok's encoder as the released two-stage weights need it, and One-D-Piece's.

    The K x W values of the latents are read in memory as W x K: each token gets channels of every
    latent.
    """

    def latents(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """The latent tokens `(B, K, W)`, mixed."""
        latents = super().latents(images, taps)
        return latents.reshape(-1, self.dim, self.num_tokens).transpose(1, 2)


def released_latent_vit(published: Published, image_size: int | None, target: str) -> Released:
    """Return a tokenizer of two latent transformers with a codebook.

    Args:
        published: what TiTok, or a system built on it, released.
        image_size: side in pixels; None for that of the weights.
        target: name of the tokenizer's class.
    """
    if "quantize.embedding.weight" not in published.left:
        raise CheckpointError(
            "weights: 'quantize.embedding.weight' is missing; continuous tokenizers (VAE) have "
            "no ids, and are not imported"
        )
    published.left.pop("quantize.embed_prob", None)  # the usage of its codes, in training alone
    codes = published.take("quantize.embedding.weight")
    two_stages = "decoder.ffn.2.weight" in published.left
    patches = published.take("encoder.patch_embed.weight")
    width, channels, patch_size = patches.shape[:3]
    positions = {side: published.take(f"{side}.positional_embedding") for side in _SIDES}
    # Published images are squares: a table has a position per patch, and one of a class token.
    side = math.isqrt(len(positions["encoder"]) - 1) * patch_size
    if image_size not in (None, side):
        raise ConfigError(f"image_size={image_size}: these weights have positions for {side} px")
    count = len(published.left["encoder.latent_token_positional_embedding"])
    common = {"image_size": side, "channels": channels, "num_latent_tokens": count}

    # Ours sees images in [-1, 1], and folds pixels as (row, column, channel).
    state = {
        "encoder.patch_embed.weight": patches.permute(0, 2, 3, 1).reshape(width, -1) / 2,
        "encoder.patch_embed.bias": published.take("encoder.patch_embed.bias")
        + patches.sum(dim=(1, 2, 3)) / 2,
        "encoder.latent_tokens": published.take("latent_tokens")[None],
        "quantizer.embedding": codes,
        "quantizer.project_in.weight": published.take("encoder.conv_out.weight")[:, :, 0, 0],
        "quantizer.project_in.bias": published.take("encoder.conv_out.bias"),
        "decoder.mask_token": published.take("decoder.mask_token"),
    }
    # Theirs maps a code to the decoder's width at once, ours by way of the latents' width.
    code_dim = codes.shape[1]
    state["quantizer.project_out.weight"] = torch.eye(width, code_dim)
    state["quantizer.project_out.bias"] = torch.zeros(width)
    embed = published.take("decoder.decoder_embed.weight")
    state["decoder.embed.weight"] = torch.cat(
        [embed, embed.new_zeros(len(embed), width - code_dim)], 1
    )
    state["decoder.embed.bias"] = published.take("decoder.decoder_embed.bias")
    for part in _SIDES:
        place = positions[part]
        token = published.take(f"{part}.class_embedding")
        state[f"{part}.class_token"] = (token + place[:1])[None]
        state[f"{part}.patch_positions"] = place[1:]
        state[f"{part}.latent_positions"] = published.take(
            f"{part}.latent_token_positional_embedding"
        )
        state |= _transformer(published, part)

    grid = math.isqrt(len(positions["decoder"]) - 1)
    encoder = {
        "_target_": "reshaped_latent_vit_encoder" if two_stages else "latent_vit_encoder",
        **common,
        **_sizes(state, "encoder"),
        "patch_size": patch_size,
        "latent_means": False,
    }
    decoder = {
        **common,
        **_sizes(state, "decoder"),
        "patch_size": side // grid,
        "latent_dim": width,
    }
    add_head = _two_stage_head if two_stages else _pixel_head
    add_head(published, decoder, state)
    tokenizer = {
        "_target_": target,
        "image_size": side,
        "channels": channels,
        "encoder": encoder,
        "decoder": decoder,
    }
    return Released(
        tokenizer, vector_quantizer(codes, width, "cosine" if two_stages else "euclidean"), state
    )


_SIDES = ("encoder", "decoder")


def _transformer(published: Published, part: str) -> dict[str, Tensor]:
    names = {f"{part}.ln_pre": f"{part}.norm_in", f"{part}.ln_post": f"{part}.norm_out"}
    state = {}
    for n in range(published.count(f"{part}.transformer")):
        theirs, ours = f"{part}.transformer.{n}", f"{part}.transformer.blocks.{n}"
        for kind in ("weight", "bias"):
            state[f"{ours}.attn.qkv.{kind}"] = published.take(f"{theirs}.attn.in_proj_{kind}")
        names |= {
            f"{theirs}.ln_1": f"{ours}.norm1",
            f"{theirs}.attn.out_proj": f"{ours}.attn.proj",
            f"{theirs}.ln_2": f"{ours}.norm2",
            f"{theirs}.mlp.c_fc": f"{ours}.mlp.0",
            f"{theirs}.mlp.c_proj": f"{ours}.mlp.2",
        }
    return state | published.move(names)


def _sizes(state: Mapping[str, Tensor], part: str) -> dict[str, int]:
    width = state[f"{part}.norm_in.weight"].numel()
    depth = sum(k.startswith(f"{part}.") and k.endswith(".norm1.weight") for k in state)
    return {"width": width, "depth": depth, "num_heads": width // 64}  # in all published sizes


def _two_stage_head(
    published: Published, decoder: dict[str, Any], state: dict[str, Tensor]
) -> None:
    """Logits over the codes of MaskGIT's VQGAN, and its decoder."""
    for layer in (0, 2):
        weight = published.take(f"decoder.ffn.{layer}.weight")
        state[f"decoder.head.{layer}.weight"] = weight[:, :, 0, 0]
        state[f"decoder.head.{layer}.bias"] = published.take(f"decoder.ffn.{layer}.bias")
    vectors = published.take("pixel_quantize.embedding.weight")
    pixels, pixel_state = maskgit_decoder(published, "pixel_decoder", decoder["image_size"])
    state["decoder.code_vectors.weight"] = vectors
    state |= inside("decoder.pixel_decoder", pixel_state)
    decoder |= {
        "_target_": "proxy_decoder",
        "num_codes": len(vectors),
        "code_dim": vectors.shape[1],
        "pixel_decoder": pixels,
        "learns": "pixels",
    }


def _pixel_head(published: Published, decoder: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Patches of pixels and a convolution over their seams, from [0, 1] to [-1, 1]."""
    decoder["_target_"] = "latent_vit_decoder"
    state["decoder.head.weight"] = 2 * published.take("decoder.ffn.0.weight")[:, :, 0, 0]
    state["decoder.head.bias"] = 2 * published.take("decoder.ffn.0.bias") - 1
    weight = published.take("decoder.conv_out.weight")
    state["decoder.smooth.weight"] = weight
    state["decoder.smooth.bias"] = (
        weight.sum(dim=(1, 2, 3)) + 2 * published.take("decoder.conv_out.bias") - 1
    )
