"""ReTok: a flexible GigaTok whose tail is padded, so that it does not starve."""

from __future__ import annotations

from torch import Tensor

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.registry import register
from vistok.core.released_weights import Published, Released
from vistok.core.taps import NO_TAPS, Taps
from vistok.core.values import Count, ImageSize
from vistok.models.decoder import Decoder
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.length import LengthPolicy, LevelPolicy
from vistok.models.qformer import QFormerEncoder
from vistok.models.qformer_weights import released_qformer
from vistok.quantizers.base import Quantizer


@register("retok")
class ReTok(FlexibleTokenizer):
    """GigaTok with nested dropout over a code that is padded with copies of its later queries.

    Redundant token padding: the queries from `padding_start` on are repeated behind the N of the
    code, M more, with positions of their own in encoder and decoder. In training all N + M are
    quantized, the length policy draws k of 1..N+M, and the decoder reads the first k. Under a
    uniform k the last token of the code is then seen in (M + 1) / (N + M) of the steps and not in
    1 / N. Outside training the padding is thrown away: ids are N tokens, and their prefixes.

    The paper's hierarchical semantic regularisation is `alignment.form=hierarchical` of the run,
    see `HierarchicalAlignment`. Its last phase, in which the decoder alone is trained on, is a
    run with `init_from=runs/<run>` and `stage.frozen=[encoder,quantizer]`.

    Paper: Fu et al. 2026, https://arxiv.org/abs/2601.01535. Its training code is not public; a
    uniform k is our choice.
    Parts: `QFormerEncoder` and `QFormerDecoder` with `padding_start`.

    Args:
        encoder: images to latents.
        quantizer: one id (of any number of slots) per token.
        decoder: vectors to images; it must take N + M tokens.
        image_size: (H, W) in pixels, or the side of squares.
        length: how many of the N + M tokens a training step keeps.
        channels: C of the images.
    """

    encoder: QFormerEncoder

    def __init__(
        self,
        encoder: QFormerEncoder,
        quantizer: Quantizer,
        decoder: Decoder,
        image_size: ImageSize,
        length: LengthPolicy | LevelPolicy,
        channels: Count = 3,
    ) -> None:
        if not quantizer.per_token:
            raise ConfigError(
                f"quantizer: the ids of {type(quantizer).__name__} stand for scales of the whole "
                "code, so ReTok's padding can't be cut off; use one with an id per token"
            )
        super().__init__(encoder, quantizer, decoder, image_size, length, channels)
        total = len(encoder.latent_positions)
        if (taken := getattr(decoder, "num_tokens", total)) < total:
            raise ArgumentError(
                f"decoder.padding_start: the decoder takes {taken} tokens, but the code "
                f"and its padding are {total}; must be the encoder's {encoder.padding_start}"
            )

    def encode(self, signal: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode images `(B, C, H, W)` in [-1, 1] to `(B, N, D)`, in training `(B, N + M, D)`."""
        if self.training:
            return self.encoder.padded(signal, taps=taps)
        return self.encoder(signal, taps=taps)


@register("retok", kind="importer")
def retok(published: Published, image_size: int | None) -> Released:
    """ReTok (https://arxiv.org/abs/2601.01535)."""
    length = {
        "_target_": "length",
        "distribution": "uniform",
        "per": "batch",
    }
    model = {"_target_": "retok", "length": length}
    return released_qformer(published, image_size, model)
