"""Janus' tokenizer of generated images, and its released weights."""

from __future__ import annotations

import torch.nn.functional as F

from vistok.core.errors import ConfigError
from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized, vector_quantizer
from vistok.core.values import ImageSize
from vistok.models.cnn import CNNEncoder
from vistok.models.cnn_weights import grid_tokenizer, projections
from vistok.models.grid import GridTokenizer
from vistok.models.originals import CNNNames, Original, original_grid
from vistok.models.tokenizer import Tokenizer


@register("janus")
class Janus(GridTokenizer):
    """LlamaGen's VQ-16 at 384 px, as Janus draws with it; one token per cell of the grid.

    Paper: Wu et al. 2024, https://arxiv.org/abs/2410.13848. Parts: `CNNEncoder`, `CNNDecoder`,
    `VectorQuantizer`.
    """


@register("janus", kind="importer")
@recognized(
    "decoder levels from low to high resolution, and a narrow `quant_conv`",
    lambda p: (
        any(name.endswith("decoder.up.0.upsample.conv.weight") for name in p.left)
        and not p.has("decoder.adaptive")
    ),
)
def janus(published: Published, image_size: ImageSize | None) -> Released:
    """Janus' VQ model, as transformers lays it out (https://arxiv.org/abs/2410.13848)."""
    published.within("model.vqmodel", "vqmodel")
    codes = published.take("quantize.embedding.weight")
    tokenizer, state = grid_tokenizer(published, "janus", image_size or 384, convolutions=False)
    state |= projections(published) | {"quantizer.embedding": codes}
    quantizer = vector_quantizer(codes, tokenizer["encoder"]["latent_dim"], "cosine")
    return Released(tokenizer, quantizer, state, "DeepSeek Model License")


_NAMES = CNNNames("down", "up", "block", ("mid.block_1", "mid.attn_1", "mid.block_2"))


@register("janus", kind="exporter")
def for_janus(tokenizer: Tokenizer) -> Original:
    """Janus' VQ model, as transformers' `JanusVQVAE` reads it (https://arxiv.org/abs/2410.13848)."""
    tensors = original_grid(tokenizer, _NAMES)
    encoder, codes = tokenizer.encoder, tensors["quantize.embedding.weight"]
    assert isinstance(encoder, CNNEncoder)  # `original_grid` has looked
    rows, columns = encoder.grid
    if rows != columns:
        raise ConfigError(f"its decoder takes squares alone, found a grid of {rows} x {columns}")
    # It searches by distance: among codes of unit length the nearest is that of the direction.
    tensors["quantize.embedding.weight"] = F.normalize(codes, dim=1)
    base = encoder.conv_in.out_channels
    config = {
        "architectures": ["JanusVQVAE"],
        "model_type": "janus_vqgan",
        "embed_dim": codes.shape[1],
        "num_embeddings": len(codes),
        "latent_channels": encoder.dim,
        "in_channels": tokenizer.channels,
        "out_channels": tokenizer.channels,
        "base_channels": base,
        "channel_multiplier": [width // base for width in encoder.widths],
        "num_res_blocks": sum(
            name.startswith("encoder.down.0.block.") and name.endswith("conv1.bias")
            for name in tensors
        ),
        "num_patches": rows,
    }
    opened = 'python: transformers.JanusVQVAE.from_pretrained("{out}"), of images in [-1, 1]'
    return Original(tensors, config, "model.safetensors", opened)
