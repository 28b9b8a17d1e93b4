"""Import weights of the public reimplementation of ViT-VQGAN, for the authors released none."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from vistok.core.errors import CheckpointError
from vistok.core.geometry import grid_of
from vistok.core.registry import register
from vistok.core.released_weights import (
    Published,
    Released,
    inside,
    recognized,
    vector_quantizer,
)
from vistok.core.values import ImageSize
from vistok.models.patch_vit import GridTransformer, PatchViTDecoder, PatchViTEncoder

#: Channels of an attention head, in all sizes.
_HEAD = 64


@register("tanh_patch_vit_encoder")
class TanhPatchViTEncoder(PatchViTEncoder):
    """A `PatchViTEncoder` whose MLPs have a tanh, as in enhancing-transformers."""

    @functools.wraps(PatchViTEncoder.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _set_tanh(self.transformer)


@register("tanh_patch_vit_decoder")
class TanhPatchViTDecoder(PatchViTDecoder):
    """A `PatchViTDecoder` whose MLPs have a tanh, as in enhancing-transformers."""

    @functools.wraps(PatchViTDecoder.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _set_tanh(self.transformer)


def _set_tanh(transformer: GridTransformer) -> None:
    for block in transformer.blocks:
        assert isinstance(block.mlp, nn.Sequential)
        block.mlp[1] = nn.Tanh()


@register("vit_vqgan", kind="importer")
@recognized(
    "transformers of `layers` around `pre_quant`, and a codebook",
    lambda p: p.has("encoder.transformer.layers", "pre_quant", "quantizer.embedding"),
)
def vit_vqgan(published: Published, image_size: ImageSize | None) -> Released:
    """ViT-VQGAN of enhancing-transformers, of one code per token.

    https://github.com/thuanz123/enhancing-transformers, after Yu et al. 2022,
    https://arxiv.org/abs/2110.04627. Without `image_size` its images are squares.
    """
    published.drop("loss.")
    patches = published.take("encoder.to_patch_embedding.0.weight")
    width, channels, side = patches.shape[:3]
    painted = published.take("decoder.to_pixel.1.weight")
    if len(painted) != width:
        raise CheckpointError(
            f"weights: encoder and decoder are {width} and {len(painted)} channels wide; one "
            "width for both is supported"
        )
    cells = published.shape("encoder.en_pos_embedding")[1]
    image_size = image_size or math.isqrt(cells) * side
    rows, columns = grid_of(image_size, side)
    if rows * columns != cells:
        raise CheckpointError(
            f"image_size={image_size}: has {rows} x {columns} patches, the file positions for "
            f"{cells}; name the size that it was trained at"
        )
    sizes = {"image_size": image_size, "channels": channels, "patch_size": side, "width": width}
    sizes |= {"num_heads": max(1, width // _HEAD), "norm_in": False}
    # Theirs sees and paints images in [0, 1]; ours folds pixels as (row, column, channel).
    embed = patches.permute(0, 2, 3, 1).flatten(1)
    bias = published.take("encoder.to_patch_embedding.0.bias")
    state = {"encoder.embed.weight": embed / 2, "encoder.embed.bias": bias + embed.sum(dim=1) / 2}
    state["decoder.head.weight"] = 2 * painted.permute(2, 3, 1, 0).flatten(0, 2)
    shift = 2 * published.take("decoder.to_pixel.1.bias") - 1
    state["decoder.head.bias"] = shift.repeat(side * side)
    depths = {}
    for part, table in (("encoder", "en_pos_embedding"), ("decoder", "de_pos_embedding")):
        depths[part], blocks = _transformer(published, part, width)
        state |= inside(f"{part}.transformer", blocks)
        state[f"{part}.transformer.positions"] = published.take(f"{part}.{table}")[0]
    codes = published.take("quantizer.embedding.weight")
    state |= {"quantizer.embedding": codes} | published.move(
        {"pre_quant": "quantizer.project_in", "post_quant": "quantizer.project_out"}
    )
    tokenizer = {
        "_target_": "vit_vqgan",
        "image_size": image_size,
        "channels": channels,
        "latent_dim": width,
        "encoder": {"_target_": "tanh_patch_vit_encoder", **sizes, "depth": depths["encoder"]},
        "decoder": {
            "_target_": "tanh_patch_vit_decoder",
            **sizes,
            "depth": depths["decoder"],
            "latent_dim": width,
            "head_width": None,
        },
    }
    return Released(tokenizer, vector_quantizer(codes, width, "cosine"), state, "MIT")


def _transformer(published: Published, part: str, width: int) -> tuple[int, dict[str, Tensor]]:
    """Return depth and state of one of the two transformers."""
    prefix = f"{part}.transformer.layers"
    depth, names, state = published.count(prefix), {f"{part}.transformer.norm": "norm_out"}, {}
    for number in range(depth):
        theirs, ours = f"{prefix}.{number}", f"blocks.{number}"
        queries = published.take(f"{theirs}.0.fn.to_qkv.weight")
        if len(queries) != 3 * width:
            raise CheckpointError(
                f"weights: attention is {len(queries) // 3} channels wide in a transformer of "
                f"{width}; such sizes (Large) are not supported"
            )
        state[f"{ours}.attn.qkv.weight"] = queries
        state[f"{ours}.attn.qkv.bias"] = torch.zeros(3 * width)
        names |= {
            f"{theirs}.0.norm": f"{ours}.norm1",
            f"{theirs}.0.fn.to_out": f"{ours}.attn.proj",
            f"{theirs}.1.norm": f"{ours}.norm2",
            f"{theirs}.1.fn.net.0": f"{ours}.mlp.0",
            f"{theirs}.1.fn.net.2": f"{ours}.mlp.2",
        }
    return depth, state | published.move(names)
