"""The continuous latents of a trained 2D tokenizer, as a space that another tokenizer works in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ConfigError
from vistok.core.registry import register
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.nn.data_init import chunks, scale_of
from vistok.quantizers.base import Quantizer
from vistok.quantizers.token_bridge import TokenBridge
from vistok.quantizers.vq import VectorQuantizer


@register("latent_space")
class LatentSpace(nn.Module):
    """A frozen autoencoder: images to maps of latents of mean 0 and deviation 1, and back.

    It is a 2D tokenizer of this project without the rounding: the latents are what its quantizer
    would round, in code space. Trained with `quantizer=token_bridge_post` the tokenizer has
    learned to decode these; one with a codebook decodes them too, for it has seen points all
    around them. Nothing is sampled: an image has one map.

    Encoder and decoder compute in the precision of their weights, float32, whatever that of the
    run.

    Args:
        encoder: of the 2D tokenizer, with a grid.
        quantizer: of the 2D tokenizer; of it the projections are used.
        decoder: of the 2D tokenizer.

    Attributes:
        dim: channels of the map.
        grid: its rows and columns.

    Raises:
        ConfigError: if there is no grid, or the quantizer's codes are not continuous before
            rounding.
    """

    def __init__(self, encoder: Encoder, quantizer: Quantizer, decoder: Decoder) -> None:
        super().__init__()
        if encoder.grid is None:
            raise ConfigError(
                f"autoencoder: must be a 2D tokenizer, found {type(encoder).__name__}"
            )
        if not isinstance(quantizer, (TokenBridge, VectorQuantizer)):
            raise ConfigError(
                f"autoencoder: the codes of {type(quantizer).__name__} have no continuous form "
                "that its decoder takes; use a run with quantizer=token_bridge_post or ema_vq"
            )
        self.grid = encoder.grid
        self.dim = quantizer.codebook_dim
        self.encoder, self.decoder = encoder, decoder
        self.project_in, self.project_out = quantizer.project_in, quantizer.project_out
        self.unit_length = getattr(quantizer, "cosine", False)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("std", torch.ones(self.dim))

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Set mean and deviation of the channels to those of images `(M, C, H, W)` in [-1, 1]."""
        codes = torch.cat([self._codes(chunk).flatten(0, 1) for chunk in chunks(images)])
        self.mean.copy_(codes.mean(dim=0))
        self.std.copy_(scale_of(codes.std(dim=0, correction=0)))

    def encode(self, images: Tensor) -> Tensor:
        """Maps `(B, dim, rows, columns)` of images `(B, C, H, W)` in [-1, 1]."""
        codes = (self._codes(images) - self.mean) / self.std
        return codes.transpose(1, 2).unflatten(2, self.grid)

    def decode(self, maps: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, unclamped, of maps `(B, dim, rows, columns)`."""
        with torch.autocast(maps.device.type, enabled=False):
            codes = maps.to(self.mean.dtype).flatten(2).transpose(1, 2) * self.std + self.mean
            return self.decoder.reconstruct(self.project_out(self._metric(codes)))

    def _codes(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self._metric(self.project_in(self.encoder(images.to(self.mean.dtype))))

    def _metric(self, codes: Tensor) -> Tensor:
        return F.normalize(codes, dim=-1, eps=1e-6) if self.unit_length else codes
