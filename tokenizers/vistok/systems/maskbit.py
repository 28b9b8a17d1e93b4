"""MaskBit's tokenizer, and its released weights."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized, vector_quantizer
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer
from vistok.models.grid import GridTokenizer


@register("maskbit")
class MaskBit(GridTokenizer):
    """A CNN without attention around the signs of its latents, or around a codebook (VQGAN+).

    Its shortcuts are of what a block returns; see `OutputSkipBlock`. Paper: Weber et al. 2024,
    https://arxiv.org/abs/2409.16211. Parts: `CNNEncoder`, `CNNDecoder`, `LFQ` or `VectorQuantizer`.
    """


@register("maskbit", kind="importer")
@recognized(
    "levels of `res_blocks`",
    lambda p: p.has("encoder.down.0.res_blocks"),
)
def maskbit(published: Published, image_size: ImageSize | None) -> Released:
    """MaskBit and VQGAN+ (https://arxiv.org/abs/2409.16211)."""
    published.drop("quantize.bits_to_indices", "quantize.codebook")
    codes = published.left.pop("quantize.embedding.weight", None)
    tokenizer, state = grid_tokenizer(
        published,
        "maskbit",
        image_size or 256,
        encoder={"unit_range": True},
        decoder={"unit_range": True},
        convolutions=False,
    )
    bits = tokenizer["encoder"]["latent_dim"]
    if codes is None:
        quantizer = {"_target_": "lfq", "dim": bits, "codebook_size": 2**bits}
    else:
        state["quantizer.embedding"] = codes.float()
        quantizer = vector_quantizer(codes, bits, "euclidean")
    return Released(tokenizer, quantizer, state, "Apache-2.0")
