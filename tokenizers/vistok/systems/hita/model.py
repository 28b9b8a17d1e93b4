"""Hita: tokens of the whole image before those of its patches, each kind with its codebook."""

from __future__ import annotations

import copy

from torch import Tensor

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.registry import register
from vistok.core.values import Count, ImageSize
from vistok.models.decoder import Decoder
from vistok.models.tokenizer import Tokenizer
from vistok.quantizers.base import Quantizer
from vistok.quantizers.segments import Segments
from vistok.systems.hita.encoder import HitaEncoder


@register("hita")
class Hita(Tokenizer):
    """Holistic tokens, then a grid of patch tokens, and a decoder that can't do without either.

    Ids are `(B, H + cells, Q)`, holistic ones first, of one joint vocabulary: see `Segments`.

    Paper: Zheng et al. 2025, https://arxiv.org/abs/2507.02358. The paper's encoder also reads the
    tokens of a frozen DINOv2, at encode time too: `pretrained` of `HitaEncoder`.
    Parts: `HitaEncoder`, `HitaDecoder`, `Segments`.

    Args:
        encoder: images to latents.
        quantizer: of the patch tokens; an id per token.
        decoder: vectors to images.
        image_size: (H, W) in pixels, or the side of squares.
        channels: C of the images.
        holistic_quantizer: of the holistic tokens; None for a second one like `quantizer`.
    """

    token_order = "holistic"
    quantizer: Segments

    def __init__(
        self,
        encoder: HitaEncoder,
        quantizer: Quantizer,
        decoder: Decoder,
        image_size: ImageSize,
        channels: Count = 3,
        holistic_quantizer: Quantizer | None = None,
    ) -> None:
        books = [holistic_quantizer or copy.deepcopy(quantizer), quantizer]
        holistic = encoder.num_holistic_tokens
        if (taken := getattr(decoder, "num_holistic_tokens", holistic)) != holistic:
            raise ArgumentError(
                f"decoder.num_holistic_tokens={taken}: must be that of the encoder, "
                f"tokenizer.encoder.num_holistic_tokens={holistic}"
            )
        parts = Segments(books, [holistic, encoder.num_tokens - holistic])
        super().__init__(encoder, parts, decoder, image_size, channels)

    def _alphabet(self, length: int) -> list[tuple[int, int]]:
        """The ids of an image's own kinds of tokens: which kind one is, its place says for free."""
        parts = zip(self.quantizer.offsets.tolist(), self.quantizer.sizes.tolist(), strict=True)
        alphabet: list[tuple[int, int]] = []
        for (offsets, sizes), count in zip(parts, self.quantizer.lengths, strict=True):
            alphabet += list(zip(offsets, sizes, strict=True)) * count
        return alphabet

    def _check_range(self, ids: Tensor) -> None:
        super()._check_range(ids)
        owners = self.quantizer.owners(ids)
        for book, part in enumerate(owners.split(self.quantizer.lengths, dim=1)):
            if part.numel() and bool((part != book).any()):
                first, last = (("holistic", "patch"), ("patch", "holistic"))[book]
                raise ConfigError(f"ids: a {first} token holds the id of a {last} token")
