"""MaskGIT's VQGAN: import its released weights."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import (
    Published,
    Released,
    inside,
    recognized,
    vector_quantizer,
)
from vistok.models.maskgit_cnn_weights import maskgit_decoder, maskgit_encoder


@register("maskgit_vqgan", kind="importer")
@recognized(
    "blocks `mid.0` without attention, `upsample_conv` between levels, and a codebook",
    lambda p: (
        p.has("encoder.mid.0.conv1", "decoder.up.1.upsample_conv", "quantize.embedding")
        and not p.has("quant_conv")
    ),
)
def maskgit_vqgan(published: Published, image_size: int | None) -> Released:
    """The VQGAN of MaskGIT (https://arxiv.org/abs/2202.04200), the proxy of TiTok's stages."""
    size = image_size or 256  # convolutions take any
    codes = published.take("quantize.embedding.weight")
    encoder, encoder_state = maskgit_encoder(published, "encoder", size)
    decoder, decoder_state = maskgit_decoder(published, "decoder", size)
    tokenizer = {
        "_target_": "vqgan",
        "image_size": size,
        "channels": encoder["channels"],
        "encoder": encoder,
        "decoder": decoder,
    }
    state = inside("encoder", encoder_state) | inside("decoder", decoder_state)
    state["quantizer.embedding"] = codes
    quantizer = vector_quantizer(codes, codes.shape[1], "euclidean")
    return Released(tokenizer, quantizer, state, "Apache-2.0")
