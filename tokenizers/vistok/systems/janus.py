"""Janus' tokenizer of generated images, and its released weights."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized, vector_quantizer
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer, projections
from vistok.models.grid import GridTokenizer


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
