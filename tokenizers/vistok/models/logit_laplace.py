"""Pixels as logit-Laplace distributions: a decoder that says how sure it is of each value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ConfigError
from vistok.core.outputs import Prediction
from vistok.core.registry import register
from vistok.core.taps import NO_TAPS, Tap, Taps
from vistok.core.torch_internals import with_children
from vistok.models.decoder import Decoder

#: How far values of [0, 1] are kept from its ends, where the logit is infinite.
EDGE = 0.1

#: Range of the logarithm of the scale.
LOG_SCALES = (-7.0, 7.0)


def to_logits(images: Tensor) -> Tensor:
    """Return the logits of images in [-1, 1], which are squeezed into [EDGE, 1 - EDGE] first."""
    return ((1 - 2 * EDGE) * (images + 1) / 2 + EDGE).logit()


def to_pixels(logits: Tensor) -> Tensor:
    """Inverse of `to_logits`; what lies outside of [-1, 1] is cut off."""
    return (2 * (logits.sigmoid() - EDGE) / (1 - 2 * EDGE) - 1).clamp(-1, 1)


@register("logit_laplace_decoder")
class LogitLaplaceDecoder(Decoder):
    """Any decoder of 2C channels, read as location and logarithm of scale of C colors.

    It predicts "image", the pixels at the locations, for terms that compare pixels, and
    "distribution", for the term `logit_laplace`. ViT-VQGAN weighs them 1.0 and 0.1.

    Papers: DALL-E, Ramesh et al. 2021, https://arxiv.org/abs/2102.12092; ViT-VQGAN, Yu et al. 2022,
    https://arxiv.org/abs/2110.04627.

    Args:
        decoder: whose `channels` are twice those of the images.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.dim = decoder.dim
        if hasattr(decoder, "num_tokens"):
            self.num_tokens = decoder.num_tokens
        self.sampling, self.conditions = decoder.sampling, decoder.conditions

    def check_sampling(self, **sampling: Any) -> None:
        """Refuse what the inner decoder refuses."""
        self.decoder.check_sampling(**sampling)

    @property
    def heads(self) -> dict[str, str]:
        """Return the two readings of the same output."""
        return {"image": "pixels", "distribution": "logit_laplace"}

    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **sampling: Any,
    ) -> Tensor:
        """Return the images at the locations, `(B, C, H, W)` in [-1, 1]."""
        raw = self.decoder.reconstruct(quantized, mask, taps.inside("decoder"), **sampling)
        return to_pixels(raw.float().chunk(2, dim=1)[0])

    def forward(
        self,
        quantized: Tensor,
        images: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **conditions: Tensor,
    ) -> dict[str, Prediction]:
        """Return "image" and "distribution"; see `Decoder.forward`."""
        raw = self.decoder.reconstruct(quantized, mask, taps.inside("decoder"), **conditions)
        if raw.shape[1] != 2 * images.shape[1]:
            raise ConfigError(
                f"tokenizer.decoder.decoder.channels={raw.shape[1]}: must be "
                f"{2 * images.shape[1]}, a location and a scale for each channel of the images"
            )
        pixels = to_pixels(raw.float().chunk(2, dim=1)[0])
        return {
            "image": Prediction(pixels, images, "pixels"),
            "distribution": Prediction(raw, images, "logit_laplace"),
        }

    def at(self, image_size: tuple[int, int]) -> LogitLaplaceDecoder:
        """Return the same decoder, weights and all, for images of another size.

        Raises:
            ConfigError: if the inner decoder knows one size alone.
        """
        if not hasattr(self.decoder, "at"):
            raise ConfigError(
                f"image_size={list(image_size)}: {type(self.decoder).__name__} takes images of one "
                "size alone"
            )
        inner = self.decoder.at(image_size)  # type: ignore[operator]
        other = with_children(self, {"decoder": inner})
        if hasattr(inner, "num_tokens"):
            other.num_tokens = inner.num_tokens
        return other

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the inner decoder."""
        return {f"decoder.{name}": tap for name, tap in self.decoder.tap_shapes().items()}

    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start the inner decoder at the logits of the images, with a scale of 1."""
        logits = to_logits(images)
        self.decoder.initialize(quantized, torch.cat([logits, torch.zeros_like(logits)], dim=1))

    @property
    def last_layer(self) -> Tensor | None:
        """Return that of the inner decoder."""
        return self.decoder.last_layer
