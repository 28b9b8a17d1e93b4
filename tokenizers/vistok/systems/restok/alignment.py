"""ResTok's loss on the features of a vision foundation model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ConfigError
from vistok.models.pretrained import Teacher
from vistok.models.tokenizer import Tokenizer
from vistok.nn.frozen import Frozen
from vistok.systems.restok.decoder import ResTokDecoder
from vistok.systems.restok.encoder import ResTokEncoder


class FoundationAlignment(nn.Module):
    """ResTok's loss on a vision foundation model's features, in its encoder and its decoder.

    Mean over images of max(0, 1 - margin - cosine), summed over two places: a projection of the
    mean of the encoder's coarsest image tokens against the mean of the teacher's features, and a
    projection of the decoder's cells, painted a second time from a mask token of their own,
    against the features at the same place. Mask token and projections belong to this loss and not
    to the tokenizer. The paper's summary is the teacher's class token, which not every model of
    timm has.

    Paper: ResTok, Zhang et al. 2026, https://arxiv.org/abs/2601.03955.

    Args:
        tokenizer: one with ResTok's encoder and decoder.
        teacher: what to align with; it is used, not owned.
        layer: not used: both places are behind the last block.
        grid: "tokens" alone: features are shrunk to the decoder's cells.
        margin: how far from 1 a cosine may stay.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        teacher: Teacher,
        layer: int,
        grid: str = "tokens",
        margin: float = 0.25,
    ) -> None:
        super().__init__()
        if grid != "tokens":
            raise ConfigError(
                f"alignment.grid={grid}: alignment.form=foundation takes tokens alone"
            )
        encoder, decoder = tokenizer.encoder, tokenizer.decoder
        if not (isinstance(encoder, ResTokEncoder) and isinstance(decoder, ResTokDecoder)):
            raise ConfigError(
                f"alignment.form=foundation: needs a ResTok tokenizer, but this is a "
                f"{type(tokenizer).__name__}; use alignment.form=plain"
            )
        self.margin = margin
        self.teacher = Frozen(teacher)
        self.encoder_projector = nn.Linear(encoder.embed.out_features, teacher.dim)
        self.decoder_projector = nn.Linear(decoder.embed.out_features, teacher.dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder.embed.out_features) * 0.02)
        self._parts = (encoder, decoder)  # a tuple: the tokenizer owns them
        self._kept: dict[str, Tensor] = {}
        encoder.blocks[-1].register_forward_hook(self._keep("sequence"))
        decoder.embed.register_forward_hook(self._keep("latents"))

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.training and module.training:
                self._kept[name] = output

        return hook

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar of 0 or more; arguments as of `Alignment`."""
        encoder, decoder = self._parts
        kept, self._kept = self._kept, {}
        features = self.teacher(images).float()
        summary = self.encoder_projector(encoder.coarsest(kept["sequence"]).mean(dim=1))
        cells = self.decoder_projector(decoder.paint(kept["latents"], self.mask_token))
        grid = F.interpolate(features, size=decoder.grid, mode="area").flatten(2).transpose(1, 2)
        return self._distance(summary, features.mean(dim=(2, 3))) + self._distance(cells, grid)

    def _distance(self, ours: Tensor, target: Tensor) -> Tensor:
        cosine = F.cosine_similarity(ours.float(), target, dim=-1)
        return (1 - self.margin - cosine).clamp(min=0).mean()
