"""ResTok's loss on the features of a vision foundation model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.values import NonNegative
from vistok.models.pretrained import Teacher
from vistok.models.term import Step, Term
from vistok.models.tokenizer import Tokenizer
from vistok.nn.frozen import Frozen
from vistok.systems.restok.decoder import ResTokDecoder
from vistok.systems.restok.encoder import ResTokEncoder


@register("foundation_alignment")
class FoundationAlignment(Term):
    """ResTok's loss on a vision foundation model's features, in its encoder and its decoder.

    Mean over images of max(0, 1 - margin - cosine), summed over two places: a projection of the
    mean of the encoder's coarsest image tokens against the mean of the teacher's features, and a
    projection of the decoder's cells, painted a second time from a mask token of their own,
    against the features at the same place. Mask token and projections belong to this loss and not
    to the tokenizer. The paper's summary is the teacher's class token, which not every model of
    timm has.

    Paper: ResTok, Zhang et al. 2026, https://arxiv.org/abs/2601.03955.

    Args:
        tokenizer: one with ResTok's encoder and decoder; given by the objective.
        teacher: what to align with; it is used, not owned.
        margin: how far from 1 a cosine may stay.
    """

    taps = ("encoder.coarsest", "decoder.latents")

    def __init__(self, tokenizer: Tokenizer, teacher: Teacher, margin: NonNegative = 0.25) -> None:
        super().__init__()
        encoder, decoder = tokenizer.encoder, tokenizer.decoder
        if not (isinstance(encoder, ResTokEncoder) and isinstance(decoder, ResTokDecoder)):
            raise ArgumentError(
                f"_target_=foundation_alignment: needs a ResTok tokenizer, but this is a "
                f"{type(tokenizer).__name__}; use alignment=plain"
            )
        self.margin = margin
        self.teacher = Frozen(teacher)
        self.encoder_projector = nn.Linear(encoder.embed.out_features, teacher.dim)
        self.decoder_projector = nn.Linear(decoder.embed.out_features, teacher.dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder.embed.out_features) * 0.02)

    def forward(self, step: Step) -> Tensor:
        """Return a scalar of 0 or more."""
        decoder = step.tokenizer.decoder
        assert isinstance(decoder, ResTokDecoder)
        tapped = step.output.features
        features = self.teacher(step.images).float()
        summary = self.encoder_projector(tapped["encoder.coarsest"].mean(dim=1))
        cells = decoder.paint(tapped["decoder.latents"], self.mask_token)
        grid = F.interpolate(features, size=decoder.grid, mode="area").flatten(2).transpose(1, 2)
        return self._distance(summary, features.mean(dim=(2, 3))) + self._distance(
            self.decoder_projector(cells), grid
        )

    def _distance(self, ours: Tensor, target: Tensor) -> Tensor:
        cosine = F.cosine_similarity(ours.float(), target, dim=-1)
        return (1 - self.margin - cosine).clamp(min=0).mean()
