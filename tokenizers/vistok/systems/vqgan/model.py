"""VQGAN's tokenizer, and its released weights."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized, vector_quantizer
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer
from vistok.models.grid import GridTokenizer


@register("vqgan")
class VQGAN(GridTokenizer):
    """A convolutional encoder and decoder around a codebook; one token per cell of the grid.

    Paper: Esser et al. 2021, https://arxiv.org/abs/2012.09841. Parts: `CNNEncoder`, `CNNDecoder`.
    """


@register("vqgan", kind="importer")
@recognized(
    "levels `down` and `up`, fewer than four residual blocks in one of the encoder, a `quant_conv`",
    lambda p: (
        p.has("encoder.down.0.block.0", "decoder.up.0.block.0", "quant_conv")
        and (p.has("quantize.embedding") or p.has("quantize.proj"))
        and not p.has("encoder.down.0.block.3")
        and not p.has("quantize.quant_resi")
        and not p.has("decoder.up.0.upsample")
    ),
)
def vqgan(published: Published, image_size: ImageSize | None) -> Released:
    """VQGAN of taming-transformers, with a codebook or Gumbel (https://arxiv.org/abs/2012.09841)."""
    published.drop("loss.", "colorize")
    if "quantize.proj.weight" in published.left:
        state = {
            "quantizer.logits.weight": published.take("quantize.proj.weight").flatten(1),
            "quantizer.logits.bias": published.take("quantize.proj.bias"),
        }
        codes = published.take("quantize.embed.weight")
        quantizer = {
            "_target_": "gumbel",
            "dim": state["quantizer.logits.weight"].shape[1],
            "codebook_size": len(codes),
        }
        if codes.shape[1] != quantizer["dim"]:
            raise published.misfit(
                f"codes of {codes.shape[1]} channels, latents of {quantizer['dim']}"
            )
    else:
        codes, state = published.take("quantize.embedding.weight"), {}
        quantizer = vector_quantizer(codes, codes.shape[1], "euclidean")
    tokenizer, cnn_state = grid_tokenizer(published, "vqgan", image_size or 256)
    state |= cnn_state | {"quantizer.embedding": codes}
    return Released(tokenizer, quantizer, state, "MIT")
