"""LlamaGen's tokenizers, and their released weights."""

from __future__ import annotations

import torch

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized, vector_quantizer
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer, projections
from vistok.models.grid import GridTokenizer
from vistok.models.originals import CNNNames, Original, original_grid
from vistok.models.tokenizer import Tokenizer


@register("llamagen")
class LlamaGen(GridTokenizer):
    """VQGAN's CNN around narrow codes of unit length; one token per cell of the grid.

    Paper: Sun et al. 2024, https://arxiv.org/abs/2406.06525. VQ-16 and VQ-8 have 16384 codes of 8
    channels. Parts: `CNNEncoder`, `CNNDecoder`, `VectorQuantizer`.
    """


@register("llamagen", kind="importer")
@recognized(
    "levels named `conv_blocks` around a narrow `quant_conv`",
    lambda p: (
        p.has("encoder.conv_blocks", "quant_conv", "quantize.embedding")
        and not p.has("s2to1encoder")
    ),
)
def llamagen(published: Published, image_size: ImageSize | None) -> Released:
    """LlamaGen VQ-16 and VQ-8 (https://arxiv.org/abs/2406.06525)."""
    published.drop("quantize.codebook_used")
    codes = published.take("quantize.embedding.weight")
    tokenizer, state = grid_tokenizer(published, "llamagen", image_size or 256, convolutions=False)
    state |= projections(published) | {"quantizer.embedding": codes}
    quantizer = vector_quantizer(codes, tokenizer["encoder"]["latent_dim"], "cosine")
    return Released(tokenizer, quantizer, state, "MIT")


_NAMES = CNNNames("conv_blocks", "conv_blocks", "res", ("mid.0", "mid.1", "mid.2"))


@register("llamagen", kind="exporter")
def for_llamagen(tokenizer: Tokenizer) -> Original:
    """LlamaGen's `--vq-ckpt` (https://arxiv.org/abs/2406.06525)."""
    tensors = original_grid(tokenizer, _NAMES)
    # A ring of the ids of the last images in training, which its loader asks for.
    tensors["quantize.codebook_used"] = torch.zeros(65536)
    return Original(tensors, None, "vq.pt", "--vq-ckpt {out}/vq.pt")
