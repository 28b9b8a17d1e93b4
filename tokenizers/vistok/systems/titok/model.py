"""TiTok: an image as a short 1D sequence of tokens."""

from vistok.core.registry import register
from vistok.models.tokenizer import Tokenizer


@register("titok")
class TiTok(Tokenizer):
    """Single-stage TiTok: a ViT encoder with latent tokens, a codebook, a ViT decoder to pixels.

    Paper: Yu et al. 2024, https://arxiv.org/abs/2406.07550; the single-stage form with a pixel
    head is TA-TiTok's, https://arxiv.org/abs/2501.07730, without text; with it, see `TATiTok`.
    Parts: `LatentTransformerEncoder`, `LatentTransformerDecoder`.
    """

    # Full attention on both sides: no token comes before another.
    token_order = "unordered"
