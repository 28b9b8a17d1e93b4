"""A ViT that paints an image from latent tokens and a text (TA-TiTok's decoder)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vistok.core.errors import ConfigError
from vistok.core.registry import register
from vistok.core.sample_random import uniform
from vistok.core.taps import NO_TAPS, Taps
from vistok.core.values import Count, ImageSize, Share
from vistok.models.latent_vit import Border, LatentTransformerDecoder
from vistok.nn.attention import AttentionKind


@register("text_decoder")
class TextTransformerDecoder(LatentTransformerDecoder):
    """TiTok's decoder with text tokens at the end of its sequence.

    Sequence `[class token | mask tokens | latent tokens | text tokens]`. The text comes as the
    features of a frozen text tower, one per token (CLIP's after its last norm); a linear layer
    and learned positions make tokens of them.

    Without a text, and in training for a share of the images, one learned vector stands for each
    of its tokens. The released models have no such vector: there, decoding without a caption is
    out of what they were trained on.

    TA-TiTok (Kim et al. 2025, https://arxiv.org/abs/2501.07730).

    Args:
        image_size: side in pixels, or (H, W), multiples of `patch_size`.
        channels: C.
        patch_size: side of a patch in pixels.
        num_latent_tokens: K, the longest code.
        latent_dim: D, the width of the quantized latents.
        width: W of the transformer, a multiple of 4.
        depth: number of blocks.
        num_heads: attention heads.
        text_dim: width of the text features.
        num_text_tokens: T, their number; shorter texts are padded, as text towers do.
        text_dropout: share of the training images whose text is left out.
        class_token: prepend a learned token, as the paper does.
        activation_checkpointing: see `Transformer`.
        nested: as in the encoder.
        attention: dense or flex, where tokens are masked; see `nn/attention.py`.
        border: as in TiTok's decoder.
    """

    conditions = ("text",)

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        patch_size: Count,
        num_latent_tokens: Count,
        latent_dim: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        text_dim: Count = 768,
        num_text_tokens: Count = 77,
        text_dropout: Share = 0.1,
        class_token: bool = True,
        activation_checkpointing: bool = False,
        nested: bool = False,
        attention: AttentionKind = "dense",
        border: Border = "black",
    ) -> None:
        super().__init__(
            image_size,
            channels,
            patch_size,
            num_latent_tokens,
            latent_dim,
            width,
            depth,
            num_heads,
            class_token,
            activation_checkpointing,
            nested,
            attention,
            border,
        )
        self.text_shape = (num_text_tokens, text_dim)
        self.text_dropout = text_dropout
        self.text_embed = nn.Linear(text_dim, width)
        nn.init.trunc_normal_(self.text_embed.weight, std=text_dim**-0.5)
        nn.init.zeros_(self.text_embed.bias)
        self.text_positions = nn.Parameter(torch.randn(num_text_tokens, width) * 0.02)
        self.no_text = nn.Parameter(torch.randn(1, 1, width) * 0.02)

    def reconstruct(  # type: ignore[override]
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        text: Tensor | None = None,
    ) -> Tensor:
        """Images `(B, C, H, W)` from the first n <= K tokens `(B, n, D)` and a text.

        Args:
            quantized: vectors of the tokens.
            mask: `(B, n)` bool; tokens marked False are not seen.
            taps: offered `block.{i}`, the patches.
            text: `(B, T, text_dim)` features; None for no text.
        """
        return self.paint(self.features(quantized, mask, text, taps))

    def features(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        taps: Taps = NO_TAPS,
    ) -> Tensor:
        """Return TiTok's features; `context` are text features `(B, T, text_dim)`, or None."""
        text = self.text_tokens(context, quantized.shape[0])
        return super().features(quantized, mask, text, taps)

    def text_tokens(self, text: Tensor | None, batch: int) -> Tensor:
        """Tokens `(B, T, W)` of text features, in training with some of the texts left out.

        Raises:
            ConfigError: for features of another shape.
        """
        tokens = self.no_text
        if text is not None:
            expected = (batch, *self.text_shape)
            if not isinstance(text, Tensor) or tuple(text.shape) != expected:
                found = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
                raise ConfigError(
                    f"text: expected features {expected} of a text tower, found {found}"
                )
            tokens = self.text_embed(text.to(self.text_embed.weight))
            if self.training:  # also at a share of 0: DDP wants every parameter in the graph
                drop = uniform((batch, 1, 1), tokens.device) < self.text_dropout
                tokens = torch.where(drop, self.no_text.to(tokens.dtype), tokens)
        return (tokens + self.text_positions).expand(batch, -1, -1)
