"""VQGAN as `VQModel` of diffusers lays it out: its weights, and exports for it."""

from __future__ import annotations

import re

from vistok.core.errors import ConfigError
from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized, vector_quantizer
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer, projections
from vistok.models.originals import CNNNames, Original, original_grid
from vistok.models.tokenizer import Tokenizer

_NAMES = CNNNames(
    "down_blocks",
    "up_blocks",
    "resnets",
    ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
)

#: Parts of a name there, and in taming-transformers.
_PARTS = (
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("down_blocks.", "down."),
    ("up_blocks.", "up."),
    (".resnets.", ".block."),
    (".attentions.", ".attn."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
)
_ATTENTION = re.compile(r"\.(to_[qkv]|to_out\.0)\.weight$")


@register("diffusers", kind="importer")
@recognized(
    "`down_blocks` and a codebook",
    lambda p: p.has("encoder.down_blocks.0.resnets.0", "quantize.embedding"),
)
def diffusers(published: Published, image_size: ImageSize | None) -> Released:
    """`VQModel` of diffusers: taming's VQGAN (https://arxiv.org/abs/2012.09841)."""
    found = {}
    for name, tensor in published.left.items():
        linear = _ATTENTION.search(name) and tensor.ndim == 2
        for theirs, ours in _PARTS:
            name = name.replace(theirs, ours)
        found[name] = tensor[..., None, None] if linear else tensor
    published.left = found
    codes = published.take("quantize.embedding.weight")
    narrow = codes.shape[1] != len(published.left.get("encoder.conv_out.weight", codes.T))
    tokenizer, state = grid_tokenizer(
        published, "vqgan", image_size or 256, convolutions=not narrow
    )
    state |= projections(published) if narrow else {}
    quantizer = vector_quantizer(codes, tokenizer["encoder"]["latent_dim"], "euclidean")
    return Released(tokenizer, quantizer, state | {"quantizer.embedding": codes}, "unknown")


@register("diffusers", kind="exporter")
def for_diffusers(tokenizer: Tokenizer) -> Original:
    """VQGAN, as `VQModel` of diffusers reads it (https://arxiv.org/abs/2012.09841)."""
    tensors = {}
    for name, tensor in original_grid(tokenizer, _NAMES).items():
        if not name.startswith(("quant", "post_quant")):
            for theirs, ours in _PARTS[5:]:
                name = name.replace(ours, theirs)
        flat = _ATTENTION.search(name) and tensor.ndim == 4
        tensors[name] = tensor.flatten(1) if flat else tensor

    def levels(side: str) -> list[list[str]]:
        """Names of each level's tensors, in the order in which they run."""
        numbers = {int(m[1]) for n in tensors if (m := re.match(rf"{side}\.(\d+)\.", n))}
        return [[n for n in tensors if n.startswith(f"{side}.{i}.")] for i in sorted(numbers)]

    def blocks(names: list[str]) -> int:
        return sum(name.endswith(".conv1.bias") for name in names)

    down, up = levels("encoder.down_blocks"), levels("decoder.up_blocks")
    counts = {blocks(names) for names in down}, {blocks(names) for names in up}
    (count,) = counts[0] if len(counts[0]) == 1 else (0,)
    if counts != ({count}, {count + 1}):
        raise ConfigError(
            "a level of its decoder has one residual block more than one of its encoder, found "
            f"{sorted(counts[1])} and {sorted(counts[0])}"
        )
    codes = tensors["quantize.embedding.weight"]
    widths = [tensors[f"encoder.down_blocks.{i}.resnets.0.conv2.bias"] for i in range(len(down))]

    def kinds(sides: list[list[str]], plain: str, attending: str) -> list[str]:
        return [attending if any(".attentions." in n for n in s) else plain for s in sides]

    config = {
        "_class_name": "VQModel",
        "in_channels": tokenizer.channels,
        "out_channels": tokenizer.channels,
        "down_block_types": kinds(down, "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": kinds(up, "UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
        "block_out_channels": [len(width) for width in widths],
        "layers_per_block": count,
        "latent_channels": len(tensors["encoder.conv_out.weight"]),
        "sample_size": max(tokenizer.image_size),
        "num_vq_embeddings": len(codes),
        "vq_embed_dim": codes.shape[1],
        "norm_num_groups": 32,
    }
    opened = 'python: diffusers.VQModel.from_pretrained("{out}"), of images in [-1, 1]'
    return Original(tensors, config, "diffusion_pytorch_model.safetensors", opened)
