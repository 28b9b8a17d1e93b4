"""ResTok: levels of tokens that hold residuals, whole levels of which may be missing."""

from vistok.core.registry import register
from vistok.models.flexible import FlexibleTokenizer


@register("restok")
class ResTok(FlexibleTokenizer):
    """A hierarchy of latents, each level about what the coarser ones have left unsaid.

    In training each image draws its own number of tokens, all of them most of the time and else
    the first levels alone (`LevelPolicy`); what is dropped becomes a learned vector in code space.
    Any prefix decodes, but those that end with a level are what training saw.

    The paper's loss on a vision foundation model's features is `alignment.form=foundation` of the
    run, see `FoundationAlignment`.

    Paper: Zhang et al. 2026, https://arxiv.org/abs/2601.03955.
    Parts: `ResTokEncoder`, `ResTokDecoder`, `LevelPolicy`.
    """
