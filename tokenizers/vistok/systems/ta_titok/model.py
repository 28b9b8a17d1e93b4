"""TA-TiTok: TiTok whose decoder reads the caption."""

from vistok.core.registry import register
from vistok.models.tokenizer import Tokenizer


@register("ta_titok")
class TATiTok(Tokenizer):
    """Single-stage TiTok with text tokens in the decoder: ids need not say what a text says.

    The encoder sees the image alone: `tokenize(images)` takes no text, `detokenize(ids,
    text=features)` does, and works without. The same ids give another picture with another text,
    so a caption belongs to its ids. In training the text is the batch's field of that name,
    features of a frozen text tower computed beforehand.

    Paper: Kim et al. 2025, https://arxiv.org/abs/2501.07730.
    Parts: `LatentTransformerEncoder`, `TextTransformerDecoder`.
    """

    # Full attention on both sides: no token comes before another.
    token_order = "unordered"
