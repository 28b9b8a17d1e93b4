"""BSQ-ViT's tokenizer, and its released weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vistok.core.errors import CheckpointError
from vistok.core.geometry import grid_of
from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, inside, recognized
from vistok.core.values import ImageSize
from vistok.models.grid import GridTokenizer
from vistok.models.logit_laplace import EDGE

#: Most bits of one id: a token of more has several.
_ID_BITS = 18

#: Channels of an attention head, which the tensors do not tell.
_HEAD = 64


@register("bsq_vit")
class BSQViT(GridTokenizer):
    """Vision transformers around the signs of latents on a sphere; one token for each patch.

    Paper: Zhao et al. 2024, https://arxiv.org/abs/2406.07548. Parts: `PatchViTEncoder`,
    `PatchViTDecoder`, `BSQ`.
    """


@register("bsq_vit", kind="importer")
@recognized(
    "transformers of `resblocks` around `quant_embed`, and no codebook",
    lambda p: (
        p.has("encoder.transformer.resblocks", "quant_embed", "decoder.conv_out")
        and not p.has("quantize.embedding")
    ),
)
def bsq_vit(published: Published, image_size: ImageSize | None) -> Released:
    """BSQ-ViT (https://arxiv.org/abs/2406.07548); without `image_size` its images are squares."""
    published.drop("quantize.")
    width, values = published.shape("encoder.conv1.weight")
    side = math.isqrt(values // 3)
    painted = published.shape("decoder.conv_out.bias")[0]
    cells = published.shape("encoder.positional_embedding")[0]
    image_size = image_size or math.isqrt(cells) * side
    rows, columns = grid_of(image_size, side)
    if rows * columns != cells:
        raise CheckpointError(
            f"image_size={image_size}: has {rows} x {columns} patches, the file positions for "
            f"{cells}; name the size that it was trained at"
        )
    sizes = {"image_size": image_size, "patch_size": side, "width": width}
    sizes |= {"num_heads": max(1, width // _HEAD)}
    encoder, encoder_state = _transformer(published, "encoder", "conv1")
    decoder, decoder_state = _transformer(published, "decoder", None)
    decoder |= {"_target_": "patch_vit_decoder", **sizes, "latent_dim": width}
    decoder |= {"channels": 3 * (painted // values), "head_width": None}
    if published.has("decoder.ffn.0"):
        decoder["head_width"] = published.shape("decoder.ffn.0.bias")[0]
        decoder_state |= published.move({"decoder.ffn.0": "hidden.0"})
    decoder_state |= published.move({"decoder.conv_out": "head"})
    for state, name in ((encoder_state, "embed.weight"), (decoder_state, "head.weight")):
        state[name] = _colors_last(state[name], side, transposed=name == "embed.weight")
    decoder_state["head.bias"] = _colors_last(decoder_state["head.bias"], side)
    if painted == 2 * values:
        # Theirs squeezes images from [-1, 1] into [0.1, 0.9] in front of the encoder.
        encoder_state["transformer.positions"] += 0.5 * encoder_state["embed.weight"].sum(dim=1)
        encoder_state["embed.weight"] *= 0.5 - EDGE
        decoder = {"_target_": "logit_laplace_decoder", "decoder": decoder}
        decoder_state = inside("decoder", decoder_state)
    tokenizer = {
        "_target_": "bsq_vit",
        "image_size": image_size,
        "channels": 3,
        "latent_dim": width,
        "encoder": {"_target_": "patch_vit_encoder", **sizes, "channels": 3, **encoder},
        "decoder": decoder,
    }
    state = inside("encoder", encoder_state) | inside("decoder", decoder_state)
    quantizer, quantizer_state = _binary(published, width)
    return Released(tokenizer, quantizer, state | quantizer_state, "MIT")


def _transformer(
    published: Published, part: str, embed: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state of one of the two transformers."""
    names = {f"{part}.ln_post": "transformer.norm_out"}
    norm_in = published.has(f"{part}.ln_pre")
    if norm_in:
        names[f"{part}.ln_pre"] = "transformer.norm_in"
    if embed is not None:
        names[f"{part}.{embed}"] = "embed"
    blocks = f"{part}.transformer.resblocks"
    depth = published.count(blocks)
    for number in range(depth):
        theirs, ours = f"{blocks}.{number}", f"transformer.blocks.{number}"
        names |= {
            f"{theirs}.ln_1": f"{ours}.norm1",
            f"{theirs}.attn.out_proj": f"{ours}.attn.proj",
            f"{theirs}.ln_2": f"{ours}.norm2",
            f"{theirs}.mlp.c_fc": f"{ours}.mlp.0",
            f"{theirs}.mlp.c_proj": f"{ours}.mlp.2",
        }
    state = published.move(names)
    for number in range(depth):
        for kind in ("weight", "bias"):
            theirs = f"{blocks}.{number}.attn.in_proj_{kind}"
            state[f"transformer.blocks.{number}.attn.qkv.{kind}"] = published.take(theirs)
    state["transformer.positions"] = published.take(f"{part}.positional_embedding")
    return {"depth": depth, "norm_in": norm_in}, state


def _colors_last(rows: Tensor, side: int, transposed: bool = False) -> Tensor:
    """Order the values of a patch as ours, by pixels and then colors; theirs count colors first."""
    if transposed:
        return _colors_last(rows.T, side).T.contiguous()
    return rows.unflatten(0, (-1, side * side)).transpose(0, 1).flatten(0, 1).contiguous()


def _binary(published: Published, width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state of the quantizer: their first bit is the most significant one of an id."""
    bits = published.shape("quant_embed.bias")[0]
    slots = next(n for n in range(1, bits + 1) if bits % n == 0 and bits // n <= _ID_BITS)
    quantizer = {
        "_target_": "bsq",
        "dim": width,
        "codebook_size": 2 ** (bits // slots),
        "num_codebooks": slots,
    }
    state = published.move(
        {"quant_embed": "quantizer.project_in", "post_quant_embed": "quantizer.project_out"}
    )
    for name in ("project_in.weight", "project_in.bias"):
        state[f"quantizer.{name}"] = state[f"quantizer.{name}"].flip(0)
    state["quantizer.project_out.weight"] = state["quantizer.project_out.weight"].flip(1)
    return quantizer, state
