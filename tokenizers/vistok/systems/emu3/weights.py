"""Emu3's released weights."""

from __future__ import annotations

import re

from torch import Tensor

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized, vector_quantizer
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer

#: Emu3's names, and those of VQGAN's family for the same parts.
_NAMES = (
    (r"\.(down|up)_block\.", "."),
    (r"\.middle_block\.attn_norm\.", ".mid.attn_1.norm."),
    (r"\.middle_block\.", ".mid."),
    (r"\.attn_norms\.(\d+)\.", r".attn.\1.norm."),
    (r"\.([qkv])_proj\.", r".\1."),
    (r"\.out_proj\.", ".proj_out."),
    (r"\.norm_layer\.", ".norm."),
    (r"\.conv_y\.", ".scale."),
    (r"\.conv_b\.", ".shift."),
)


@register("emu3", kind="importer")
@recognized(
    "convolutions over time behind levels named `down_block`",
    lambda p: (
        any("encoder.down_block.down.0." in name for name in p.left)
        and any("encoder.time_conv.0." in name for name in p.left)
    ),
)
def emu3(published: Published, image_size: ImageSize | None) -> Released:
    """Emu3's VQ model, as transformers lays it out (https://arxiv.org/abs/2409.18869)."""
    published.within("model.vqmodel", "vqmodel")
    codes = published.take("quantize.embedding.weight")
    frames = 2 ** published.count("encoder.time_conv")
    blocks = published.count("encoder.time_res_stack")
    state = {"quantizer.embedding": codes}
    for part, names in (
        ("encoder", {"encoder.time_conv": "shorten", "quant_conv": "project"}),
        ("decoder", {"decoder.time_conv": "lengthen", "post_quant_conv": "project"}),
    ):
        for name, value in published.move({**names, f"{part}.time_res_stack": "blocks"}).items():
            name = re.sub(r"(\.conv)+\.", ".", name)
            state[f"{part}.{name}"] = value.long() if name.endswith("_tracked") else value
    published.left = {_family_name(name): _as_conv(name, v) for name, v in published.left.items()}
    options = {"frames": frames, "temporal_blocks": blocks}
    tokenizer, spatial = grid_tokenizer(
        published,
        "emu3",
        image_size or 512,
        encoder={"_target_": "emu3_encoder", **options},
        decoder={"_target_": "emu3_decoder", **options},
        convolutions=False,
    )
    quantizer = vector_quantizer(codes, codes.shape[1], "euclidean")
    return Released(tokenizer, quantizer, state | spatial, "Apache-2.0")


def _family_name(name: str) -> str:
    for theirs, ours in _NAMES:
        name = re.sub(theirs, ours, name)
    return name


def _as_conv(name: str, value: Tensor) -> Tensor:
    """Return the weight of a linear layer of attention as one of a 1x1 convolution."""
    return value[..., None, None] if name.endswith("_proj.weight") else value
