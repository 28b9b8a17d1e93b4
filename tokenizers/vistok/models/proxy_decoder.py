"""TiTok's two-stage decoder: latent tokens to the codes of a 2D tokenizer, and these to pixels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.outputs import Prediction
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.taps import NO_TAPS, Tap, Taps, inside
from vistok.core.values import Count, ImageSize
from vistok.models.decoder import Decoder
from vistok.models.latent_vit import LatentTransformerDecoder
from vistok.nn.attention import AttentionKind
from vistok.nn.blocks import init_transformer_
from vistok.nn.frozen import Frozen


@register("proxy_decoder")
class ProxyDecoder(LatentTransformerDecoder):
    """Predicts a code of a 2D tokenizer for each of its cells, and decodes them as it does.

    Stage 1 learns the codes that the frozen 2D tokenizer gives the image, by cross-entropy, and
    decodes the likeliest one of each cell. Stage 2 learns pixels: logits become expected code
    vectors, through which gradients pass, and the 2D tokenizer's decoder is trained along.

    TiTok (Yu et al. 2024, https://arxiv.org/abs/2406.07550). The head is the reference code's:
    two linear layers around a tanh.

    Args:
        image_size: side in pixels, or (H, W).
        channels: C.
        patch_size: side of a cell of the 2D tokenizer in pixels.
        num_latent_tokens: K, the longest code.
        latent_dim: D, the width of the quantized latents.
        width: W of the transformer, a multiple of 4.
        depth: number of blocks.
        num_heads: attention heads.
        num_codes: size of the 2D tokenizer's codebook.
        code_dim: width of its code vectors, as its decoder takes them.
        pixel_decoder: its decoder.
        learns: "codes" (stage 1) or "pixels" (stage 2).
        class_token: prepend a learned token, as the paper does.
        activation_checkpointing: see `Transformer`.
        nested: as in the encoder.
        attention: dense or flex, where tokens are masked; see `nn/attention.py`.
    """

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
        num_codes: Count,
        code_dim: Count,
        pixel_decoder: Decoder,
        learns: Literal["codes", "pixels"] = "codes",
        class_token: bool = True,
        activation_checkpointing: bool = False,
        nested: bool = False,
        attention: AttentionKind = "dense",
    ) -> None:
        check_values(ProxyDecoder, locals())
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
        )
        if pixel_decoder.dim != code_dim:
            raise ArgumentError(f"code_dim={code_dim}: its pixel_decoder takes {pixel_decoder.dim}")
        self.learns = learns
        del self.smooth  # belongs to the pixel head, which this one replaces
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, num_codes)
        )
        init_transformer_(self.head)
        self.code_vectors = nn.Embedding(num_codes, code_dim)
        self.pixel_decoder = pixel_decoder
        #: Images `(B, C, H, W)` to target codes `(B, cells)`; only stage 1 has and needs one.
        self.proxy: Frozen | None = None

    def logits(self, quantized: Tensor, mask: Tensor | None = None, taps: Taps = NO_TAPS) -> Tensor:
        """Logits `(B, cells, num_codes)` of the first n <= K tokens, `(B, n, D)`."""
        return self.head(self.features(quantized, mask, taps=taps))

    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **sampling: Any,
    ) -> Tensor:
        """Images `(B, C, H, W)` from the first n <= K tokens, `(B, n, D)`."""
        logits = self.logits(quantized, mask, taps)
        if self.learns == "codes":
            vectors = self.code_vectors(logits.argmax(dim=-1))
        else:
            # Over a thousand codes, bf16 weights would not add up to one.
            with torch.autocast(logits.device.type, enabled=False):
                vectors = logits.float().softmax(dim=-1) @ self.code_vectors.weight.float()
                vectors = vectors.to(self.code_vectors.weight.dtype)
        return self.pixel_decoder.reconstruct(vectors, taps=taps.inside("pixel_decoder"))

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks, in stage 2 also those of the 2D tokenizer's decoder."""
        pixels = self.pixel_decoder.tap_shapes() if self.learns == "pixels" else {}
        return super().tap_shapes() | inside("pixel_decoder", pixels)

    @property
    def heads(self) -> dict[str, str]:
        """In stage 1 the logits of "codes", in stage 2 the pixels of an "image"."""
        return {"codes": "logits"} if self.learns == "codes" else {"image": "pixels"}

    def forward(  # type: ignore[override]
        self, quantized: Tensor, images: Tensor, mask: Tensor | None = None, taps: Taps = NO_TAPS
    ) -> dict[str, Prediction]:
        """Predict the proxy's codes `(B, cells)` in stage 1, pictures in stage 2."""
        if self.learns == "pixels":
            return super().forward(quantized, images, mask, taps)
        if self.proxy is None:
            raise ConfigError(
                "tokenizer.decoder: learning codes needs stage=proxy stage.proxy=<run>"
            )
        logits = self.logits(quantized, mask, taps)
        return {"codes": Prediction(logits, self.proxy(images), "logits")}

    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Nothing: codes are no linear map of the features."""

    @property
    def last_layer(self) -> Tensor | None:
        """Weight of the pixel decoder's last layer."""
        return self.pixel_decoder.last_layer
