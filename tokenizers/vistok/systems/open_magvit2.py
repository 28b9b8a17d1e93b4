"""Open-MAGVIT2's image tokenizer, and its released weights."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer
from vistok.models.grid import GridTokenizer


@register("open_magvit2")
class OpenMAGVIT2(GridTokenizer):
    """A CNN without attention around the signs of its latents; norms that the codes set.

    Paper: Luo et al. 2024, https://arxiv.org/abs/2409.04410. Parts: `CNNEncoder`, `CNNDecoder`,
    `LFQ`.
    """


@register("open_magvit2", kind="importer")
@recognized(
    "norms `adaptive` in the decoder, and no codebook",
    lambda p: p.has("encoder.mid_block", "decoder.adaptive") and not p.has("quant_conv"),
)
def open_magvit2(published: Published, image_size: ImageSize | None) -> Released:
    """Open-MAGVIT2 (https://arxiv.org/abs/2409.04410)."""
    published.drop("loss.", "quantize.")
    tokenizer, state = grid_tokenizer(
        published,
        "open_magvit2",
        image_size or 256,
        encoder={"padding": "centered"},
        convolutions=False,
    )
    bits = tokenizer["encoder"]["latent_dim"]
    quantizer = {"_target_": "lfq", "dim": bits, "codebook_size": 2**bits}
    return Released(tokenizer, quantizer, state, "Apache-2.0")
