"""Continuous autoencoders of latent diffusion, as parents of tokenizers, and their weights."""

from __future__ import annotations

import torch

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, inside, recognized
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import cnn_decoder, cnn_encoder
from vistok.models.grid import GridTokenizer


@register("kl_autoencoder")
class KLAutoencoder(GridTokenizer):
    """VQGAN's CNN around normal latents; the latent of an image is the mean of its posterior.

    Paper: Rombach et al. 2022, https://arxiv.org/abs/2112.10752. It gets its ids from the quantizer
    that is put in place of the sampling: `token_bridge` rounds each channel
    (https://arxiv.org/abs/2503.16430), and FlexTok's stage=latents takes the latents before it.
    """


@register("kl_autoencoder", kind="importer")
@recognized(
    "`quant_conv` of mean and variance, and no codebook",
    lambda p: (
        p.has("quant_conv", "post_quant_conv", "encoder.mid.block_1")
        and not p.has("quantize")
        and not p.has("quantizer")
        and p.shape("quant_conv.weight")[0] == 2 * p.shape("post_quant_conv.weight")[1]
    ),
)
def kl_autoencoder(published: Published, image_size: ImageSize | None) -> Released:
    """KL-f8, KL-f16 of latent diffusion and MAR's KL-16 (https://arxiv.org/abs/2112.10752)."""
    published.drop("loss.")
    size = image_size or 256
    encoder, encoder_state = cnn_encoder(published)
    # Of the moments the means alone, and the 1x1 convolution that ends in them folded into the
    # one before.
    weight, bias = (published.take(f"quant_conv.{kind}").double() for kind in ("weight", "bias"))
    means = len(weight) // 2
    ending = encoder_state["conv_out.weight"].double()
    weight = weight[:means].flatten(1)
    encoder_state["conv_out.bias"] = (
        weight @ encoder_state["conv_out.bias"].double() + bias[:means]
    ).float()
    encoder_state["conv_out.weight"] = torch.einsum("mk,kcij->mcij", weight, ending).float()
    decoder, decoder_state = cnn_decoder(published, base_channels=encoder["base_channels"])
    # From as many channels as the latents have to those of the decoder's first convolution.
    decoder_state |= published.move({"post_quant_conv": "latent_conv"})
    sizes = {"image_size": size, "channels": encoder["channels"]}
    if decoder_state["latent_conv.weight"].shape[:2] != (means, means):
        raise published.misfit("`post_quant_conv` changes the number of channels")
    tokenizer = {
        "_target_": "kl_autoencoder",
        **sizes,
        "encoder": encoder | sizes | {"latent_dim": means},
        "decoder": decoder | sizes | {"latent_kernel": 1},
    }
    quantizer = {"_target_": "token_bridge", "dim": means, "codebook_dim": means}
    quantizer |= {"codebook_size": 64, "post_training": True}
    state = inside("encoder", encoder_state) | inside("decoder", decoder_state)
    state |= {"quantizer.mean": torch.zeros(means), "quantizer.std": torch.ones(means)}
    return Released(tokenizer, quantizer, state, "MIT")
