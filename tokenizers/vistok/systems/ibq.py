"""IBQ's tokenizer, and its released weights."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer
from vistok.models.grid import GridTokenizer


@register("ibq_tokenizer")
class IBQTokenizer(GridTokenizer):
    """VQGAN's CNN, deeper, around a large codebook whose every code gets a gradient.

    Paper: Shi et al. 2024, https://arxiv.org/abs/2412.02692. Parts: `CNNEncoder`, `CNNDecoder`,
    `IBQ`.
    """


@register("ibq", kind="importer")
@recognized(
    "levels `down` and `up`, with four residual blocks in a level of the encoder",
    lambda p: p.has("encoder.down.0.block.3", "quantize.embedding", "quant_conv"),
)
def ibq(published: Published, image_size: ImageSize | None) -> Released:
    """IBQ (https://arxiv.org/abs/2412.02692)."""
    published.drop("loss.", "quantize.embed_prob")
    codes = published.take("quantize.embedding.weight")
    tokenizer, state = grid_tokenizer(published, "ibq_tokenizer", image_size or 256)
    quantizer = {
        "_target_": "ibq",
        "dim": codes.shape[1],
        "codebook_size": len(codes),
        "codebook_dim": codes.shape[1],
    }
    return Released(tokenizer, quantizer, state | {"quantizer.embedding": codes}, "Apache-2.0")
