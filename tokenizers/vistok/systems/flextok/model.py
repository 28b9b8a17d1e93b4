"""FlexTok: nested registers and a flow that paints from any prefix of them."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.core.registry import register
from vistok.core.terminal import counted
from vistok.core.values import Count, ImageSize
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.latent_space import LatentSpace
from vistok.models.length import LengthPolicy
from vistok.nn.data_init import Say, quiet
from vistok.quantizers.base import Quantizer


@register("flextok")
class FlexTok(FlexibleTokenizer):
    """Causal registers, FSQ, nested dropout per image and a rectified-flow decoder.

    With an autoencoder (the paper's way; `stage=latents`) the encoder reads its latents, the flow
    runs in them, and pixels come from its decoder. It stays as it is: no gradient, no optimizer,
    no EMA, but its weights are in checkpoints and exports, which so need nothing besides. Without
    one, all of this happens in pixels.

    Encoder and decoder compute what the released ones do. Differs from the paper: latents are not
    sampled but the autoencoder's own, and positions are learned, from sines and cosines.

    Paper: Bachmann et al. 2025, https://arxiv.org/abs/2502.13967.
    Parts: `FlexTokEncoder`, `FlowDecoder`, `FSQ` with levels 8, 8, 8, 5, 5, 5; its alignment
    (REPA) is `alignment.*` of the run.

    Args:
        encoder: images or maps of latents to latents of tokens.
        quantizer: latents to indices and vectors.
        decoder: vectors to images or maps of latents.
        image_size: (H, W) in pixels, or the side of squares.
        length: how many tokens a training step keeps.
        channels: C of the images.
        autoencoder: between images and maps of latents; None to work in pixels.
    """

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Quantizer,
        decoder: Decoder,
        image_size: ImageSize,
        length: LengthPolicy,
        channels: Count = 3,
        autoencoder: LatentSpace | None = None,
    ) -> None:
        super().__init__(encoder, quantizer, decoder, image_size, length, channels)
        self.autoencoder = autoencoder
        if autoencoder is not None:
            self.freeze("autoencoder")

    def to_signal(self, images: Tensor) -> Tensor:
        """The autoencoder's maps of images, if there is one."""
        if self.autoencoder is None:
            return images
        with torch.no_grad():
            return self.autoencoder.encode(images)

    def to_images(self, signal: Tensor) -> Tensor:
        """The autoencoder's images of maps, if there is one."""
        return signal if self.autoencoder is None else self.autoencoder.decode(signal)

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        """Whether there is an autoencoder, whose latents are measured."""
        return self.autoencoder is not None

    def calibrate(self, images: Tensor, say: Say = quiet) -> None:
        """Measure mean and deviation of the autoencoder's latents, if there is one.

        Args:
            images: training images `(M, C, H, W)`, uint8 or in [-1, 1], the same on every rank.
            say: told what is measured.
        """
        if self.autoencoder is None:
            return
        few = images[: self.init_images]
        say(f"latents, from {counted(len(few), 'image')}")
        few = self.to_model_range(few) if few.dtype == torch.uint8 else few.to(self.device)
        self.autoencoder.calibrate(few)
