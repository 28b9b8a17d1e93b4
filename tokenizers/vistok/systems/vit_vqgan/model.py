"""ViT-VQGAN's tokenizer."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.models.grid import GridTokenizer


@register("vit_vqgan")
class ViTVQGAN(GridTokenizer):
    """Vision transformers around narrow codes of unit length; one token for each patch.

    Paper: Yu et al. 2022, https://arxiv.org/abs/2110.04627. The authors released no code: layers
    are those of the transformer in BSQ-ViT's, https://arxiv.org/abs/2406.07548. Parts:
    `PatchViTEncoder`, `PatchViTDecoder` within `LogitLaplaceDecoder`, `VectorQuantizer`.
    """
