"""One-D-Piece: TiTok with a tail that may be missing."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.latent_vit_weights import released_latent_vit


@register("one_d_piece")
class OneDPiece(FlexibleTokenizer):
    """TiTok trained with tail token drop, so that the first tokens carry the most.

    All N tokens are quantized and enter the quantizer's losses and statistics; then one k,
    uniform on 1..N, is drawn, and the decoder gets the first k tokens and nothing in place of the
    others. Differs from the released code on several GPUs, where each draws its own k: here one
    holds for all ranks of an optimizer step, so that none waits for another's longer sequence.

    Paper: Miwa et al. 2025, https://arxiv.org/abs/2501.10064.
    Parts: `LatentTransformerEncoder`, `LatentTransformerDecoder`; the length policy of the paper
    is distribution="uniform", per="batch".
    """


@register("one_d_piece", kind="importer")
def one_d_piece(published: Published, image_size: int | None) -> Released:
    """One-D-Piece (https://arxiv.org/abs/2501.10064)."""
    released = released_latent_vit(published, image_size, "one_d_piece")
    released.tokenizer["length"] = {
        "_target_": "length",
        "distribution": "uniform",
        "per": "batch",
    }
    return released
