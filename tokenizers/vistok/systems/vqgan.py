"""VQGAN: an image as a 2D grid of tokens."""

from vistok.core.registry import register
from vistok.models.tokenizer import Tokenizer


@register("vqgan")
class VQGAN(Tokenizer):
    """A convolutional encoder and decoder around a codebook; one token per cell of the grid.

    Paper: Esser et al. 2021, https://arxiv.org/abs/2012.09841. The adversarial and perceptual
    terms of its loss are not here yet: this trains its autoencoder with the losses of the config.
    Parts: `CNNEncoder`, `CNNDecoder`.
    """

    token_order = "raster"
