"""Patches and causal registers through blocks without biases (FlexTok's encoder)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vistok.core.registry import register
from vistok.core.values import Count, ImageSize, NonNegative
from vistok.models.latent_vit import LatentTransformerEncoder
from vistok.nn.attention import AttentionKind
from vistok.nn.blocks import NORMALIZED


@register("flextok_encoder")
class FlexTokEncoder(LatentTransformerEncoder):
    """TiTok's encoder with causal registers, SwiGLU blocks without biases, and no first norm.

    The forward is the released one, but that the last norm learns a scale and a shift and that
    positions of patches are learned. The start is that of `LatentTransformerEncoder`.

    FlexTok (Bachmann et al. 2025, https://arxiv.org/abs/2502.13967).

    Args:
        image_size: side in pixels (or in cells of latents), or (H, W), multiples of `patch_size`.
        channels: C.
        patch_size: side of a patch.
        num_latent_tokens: K, the number of registers.
        width: W of the transformer, a multiple of 4; also D of the latents.
        depth: number of blocks.
        num_heads: attention heads.
        class_token: prepend a learned token.
        activation_checkpointing: see `Transformer`.
        causal: registers see the patches and the registers before them; see
            `LatentTransformerEncoder`.
        nested: start the registers where every prefix of them covers the image.
        attention: dense or flex, under the causal mask; see `nn/attention.py`.
        content: strength of the patches' content at the start, over that of the positions.
        norm_in: normalise the sequence before the first block.
    """

    block: ClassVar[Mapping[str, Any]] = NORMALIZED

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        patch_size: Count,
        num_latent_tokens: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        class_token: bool = False,
        activation_checkpointing: bool = False,
        causal: bool = True,
        nested: bool = False,
        attention: AttentionKind = "dense",
        content: NonNegative = 1.0,
        norm_in: bool = False,
    ) -> None:
        super().__init__(
            image_size,
            channels,
            patch_size,
            num_latent_tokens,
            width,
            depth,
            num_heads,
            class_token,
            activation_checkpointing,
            causal,
            nested,
            attention,
            content,
            norm_in,
        )
