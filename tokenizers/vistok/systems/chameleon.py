"""Chameleon's image tokenizer, and its released weights."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from vistok.core.errors import ConfigError
from vistok.core.registry import register
from vistok.core.released_weights import (
    Published,
    Released,
    inside,
    recognized,
    vector_quantizer,
)
from vistok.core.taps import NO_TAPS, Taps
from vistok.core.values import Count, ImageSize
from vistok.models.cnn_weights import cnn_encoder, grid_tokenizer
from vistok.models.decoder import Decoder
from vistok.models.grid import GridTokenizer


@register("no_decoder")
class NoDecoder(Decoder):
    """Stands for the decoder of a tokenizer that was released without one.

    Args:
        latent_dim: D, the width of the quantized latents.
    """

    def __init__(self, latent_dim: Count) -> None:
        super().__init__()
        self.dim = latent_dim

    def at(self, image_size: tuple[int, int]) -> NoDecoder:
        """Return itself."""
        return self

    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **sampling: Any,
    ) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError("detokenize: these weights have no decoder; import a file that has one")


@register("chameleon")
class Chameleon(GridTokenizer):
    """VQGAN's CNN with attention in the middle alone; 32 x 32 tokens for 512 px.

    Paper: Chameleon team 2024, https://arxiv.org/abs/2405.09818. As transformers lays it out it has
    no decoder: such an import tokenizes, and `detokenize` says that it cannot.
    """

    def detokenize(self, ids: Any, num_tokens: Any = None, **sampling: Any) -> Tensor:
        """Turn ids back into images, if the weights have a decoder; see `Tokenizer`."""
        if isinstance(self.decoder, NoDecoder):
            self.decoder.reconstruct(ids)
        return super().detokenize(ids, num_tokens, **sampling)


@register("chameleon", kind="importer")
@recognized(
    "an encoder with a block `mid.attn_1`, a codebook and no decoder",
    lambda p: (
        any(name.endswith("encoder.mid.attn_1.q.weight") for name in p.left)
        and any(name.endswith("quantize.embedding.weight") for name in p.left)
        and not any("decoder." in name for name in p.left)
    ),
)
def chameleon(published: Published, image_size: ImageSize | None) -> Released:
    """Chameleon's VQ model, as transformers lays it out (https://arxiv.org/abs/2405.09818)."""
    published.within("model.vqmodel", "vqmodel")
    size = image_size or 512
    codes = published.take("quantize.embedding.weight")
    quantizer = vector_quantizer(codes, codes.shape[1], "euclidean")
    if published.has("decoder"):
        tokenizer, state = grid_tokenizer(published, "chameleon", size)
    else:
        published.drop("post_quant_conv.")  # a decoder's
        encoder, encoder_state = cnn_encoder(published)
        encoder_state |= published.move({"quant_conv": "latent_conv"})
        sizes = {"image_size": size, "channels": encoder["channels"]}
        tokenizer = {
            "_target_": "chameleon",
            **sizes,
            "encoder": encoder | {"image_size": size, "latent_kernel": 1},
            "decoder": {"_target_": "no_decoder", "latent_dim": codes.shape[1]},
        }
        state = inside("encoder", encoder_state)
    state |= {"quantizer.embedding": codes}
    return Released(tokenizer, quantizer, state, "Chameleon Research License")
