"""Cosmos' image tokenizers with discrete tokens, and their released weights."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer, projections
from vistok.models.grid import GridTokenizer

#: Squares that wavelets fold before the first convolution, and of which 3 channels become 48.
_STEM = {"stem": 4, "stem_kind": "haar"}

#: Values of each channel of a code, 64 000 codes; of the released files scripts alone have them.
_LEVELS = [8, 8, 8, 5, 5, 5]


@register("cosmos")
class Cosmos(GridTokenizer):
    """A CNN on Haar wavelets of squares of 4 pixels around FSQ; one token per cell of the grid.

    Paper: NVIDIA 2025, https://arxiv.org/abs/2501.03575. DI 8x8 and DI 16x16 differ in how many of
    their three levels end in a halving. Parts: `CNNEncoder`, `CNNDecoder`, `FSQ`.
    """


@register("cosmos", kind="importer")
@recognized(
    "`quant_conv` to six channels and no codebook, and a first convolution of 48 channels",
    lambda p: (
        p.has("encoder.conv_in", "quant_conv", "decoder.conv_in")
        and not p.has("quantize")
        and p.shape("encoder.conv_in.weight")[1] % 16 == 0
        and p.shape("quant_conv.weight")[0] == len(_LEVELS)
    ),
)
def cosmos(published: Published, image_size: ImageSize | None) -> Released:
    """Cosmos DI 8x8 and DI 16x16 (https://arxiv.org/abs/2501.03575)."""
    levels = list(_LEVELS)
    if published.has("quantizer._levels"):
        levels = [int(level) for level in published.take("quantizer._levels")]
    # What else a script keeps of itself: wavelets and the quantizer's constants.
    published.drop("quantizer.", "encoder.patcher.", "decoder.unpatcher.")
    if published.has("encoder.conv_in") and published.shape("encoder.conv_in.weight")[1] % 16:
        raise published.misfit("`encoder.conv_in` is not of wavelets of squares of 4 pixels")
    tokenizer, state = grid_tokenizer(
        published, "cosmos", image_size or 256, encoder=_STEM, decoder=_STEM, convolutions=False
    )
    state |= projections(published)
    found = len(state["quantizer.project_in.weight"])
    if found != len(levels):
        raise published.misfit(f"`quant_conv` leads to {found} channels, not {len(levels)}")
    quantizer = {"_target_": "fsq", "dim": tokenizer["encoder"]["latent_dim"], "levels": levels}
    return Released(tokenizer, quantizer, state, "NVIDIA Open Model License")
