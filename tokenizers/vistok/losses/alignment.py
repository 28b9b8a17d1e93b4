"""Alignment of a tokenizer's features with those of a frozen teacher."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.values import NonNegative, check
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.pretrained import Teacher
from vistok.models.term import Step, Term, check_taps
from vistok.models.tokenizer import Tokenizer
from vistok.nn.frozen import Frozen

#: Where projected and taught features are compared.
PlacesOf = Literal["tokens", "teacher", "pooled"]

#: What brings tapped features to the teacher's width.
Projection = Literal["mlp", "linear"]


@register("alignment")
class Alignment(Term):
    """Pulls features of the encoder, the codes or the decoder towards a teacher's.

    One minus the cosine between a projection of what is tapped and the features of the teacher at
    the same place, mean over the places: REPA (Yu et al. 2025, https://arxiv.org/abs/2410.06940),
    as FlexTok and GigaTok use it. The projection is trained along, and is not part of the
    tokenizer.

    With margins it is the loss of VA-VAE (Yao et al. 2025, https://arxiv.org/abs/2501.01423), whose
    own are 0.5 and 0.25 with a linear projection of the latents: max(0, 1 - margin - cosine), and
    with `distance_margin` in addition the mean over pairs of places of
    max(0, |cosine of the projected - cosine of the taught| - distance_margin), which keeps their
    relations. VA-VAE sets the weight by gradients at the encoder's last layer; here it is fixed.

    Args:
        tokenizer: what is aligned; given by the objective.
        teacher: what to align with; it is used, not owned.
        tap: name of the tokenizer's features, such as "decoder.block.1", "latents" or "codes".
        grid: where the two are compared: "tokens", the teacher's features shrunk to those tapped;
            "teacher", the projected ones interpolated to the teacher's (FlexTok: 37 x 37); or
            "pooled", the means of both over all places, which sequences of tokens without rows and
            columns need.
        projection: "mlp", of three layers, or "linear".
        margin: how far from 1 a cosine may stay.
        distance_margin: how far cosines of pairs of places may differ; None for not counting them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        teacher: Teacher,
        tap: str = "decoder.block.1",
        grid: PlacesOf = "tokens",
        projection: Projection = "mlp",
        margin: NonNegative = 0.0,
        distance_margin: NonNegative | None = None,
    ) -> None:
        super().__init__()
        check("grid", grid, PlacesOf)
        check("projection", projection, Projection)
        check_taps(tokenizer, [tap])
        width, places = tokenizer.tap_shapes()[tap]
        if grid != "pooled" and (places is None or len(places) != 2):
            raise ArgumentError(
                f"tap={tap}: these features do not lie on rows and columns; grid=pooled compares "
                "their mean"
            )
        if grid == "pooled" and distance_margin is not None:
            raise ArgumentError(f"distance_margin={distance_margin}: grid=pooled leaves no pairs")
        self.taps = (tap,)
        self.places = places
        self.grid = grid
        self.margin, self.distance_margin = margin, distance_margin
        self.projector: nn.Module = nn.Linear(width, teacher.dim)
        if projection == "mlp":
            self.projector = nn.Sequential(
                nn.Linear(width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, teacher.dim),
            )
        self.teacher = Frozen(teacher)

    def forward(self, step: Step) -> Tensor:
        """Return a scalar, 0 or more."""
        return self.distances(step).mean()

    def distances(self, step: Step) -> Tensor:
        """Return what each image counts, `(B, places of the grid)`; 0 to 2 without pairs."""
        tokens = self.projector(step.output.features[self.taps[0]]).float()
        features = self.taught(step)
        if self.grid == "pooled":
            ours, taught = tokens.mean(dim=1, keepdim=True), features.mean((2, 3))[:, None]
        else:
            ours, taught = self._on_one_grid(tokens, features)
        cosines = F.cosine_similarity(ours, taught, dim=2)
        distances = 1 - cosines
        if self.margin:
            distances = (distances - self.margin).clamp(min=0)
        if self.distance_margin is not None:
            apart = (_relations(ours) - _relations(taught)).abs() - self.distance_margin
            distances = distances + apart.clamp(min=0).mean(dim=2)
        return distances

    def taught(self, step: Step) -> Tensor:
        """Return the teacher's features `(B, D, h, w)`, float32, computed once per step."""
        key = getattr(self.teacher.module, "key", id(self.teacher.module))
        return step.once(key, step.images, lambda: self.teacher(step.images).float())

    def _on_one_grid(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as `(B, places, width)`, at the same places."""
        assert self.places is not None
        patches = tokens.transpose(1, 2).unflatten(2, self.places)
        if self.grid == "teacher":
            patches = F.interpolate(patches, size=features.shape[2:], mode="bilinear")
        else:
            features = F.interpolate(features, size=self.places, mode="area")
        return patches.flatten(2).transpose(1, 2), features.flatten(2).transpose(1, 2)


def _relations(features: Tensor) -> Tensor:
    """Return the cosines of all pairs of places, `(B, P, P)`, of `(B, P, width)`."""
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features, dim=2)
        return unit @ unit.transpose(1, 2)


@register("hierarchical_alignment")
class HierarchicalAlignment(Alignment):
    """Alignment that weighs less the longer the code: first tokens for meaning, tail for detail.

    An image whose decoder got k of T tokens counts with the weight 1 - (k - 1) / T: 1 for a
    single token, 1 / T for all of them. That is how likely token k is to be seen under a uniform
    length. ReTok's hierarchical semantic regularisation (Fu et al. 2026,
    https://arxiv.org/abs/2601.01535); its formula was not at hand, this one is ours.

    Args:
        tokenizer: a flexible one.
        teacher: what to align with; it is used, not owned.
        tap: see `Alignment`.
        grid: see `Alignment`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        teacher: Teacher,
        tap: str = "decoder.block.1",
        grid: PlacesOf = "tokens",
    ) -> None:
        super().__init__(tokenizer, teacher, tap, grid)
        if not isinstance(tokenizer, FlexibleTokenizer):
            raise ArgumentError(
                f"_target_=hierarchical_alignment: weighs lengths, but {type(tokenizer).__name__} "
                "has only one; use alignment=plain"
            )

    def forward(self, step: Step) -> Tensor:
        """Return a scalar in [0, 2]."""
        mask = step.output.mask
        assert mask is not None, "a flexible tokenizer masks in training"
        return (length_weights(mask)[:, None] * self.distances(step)).mean()


def length_weights(mask: Tensor) -> Tensor:
    """Return weights `(B,)` in (0, 1] of codes of which a prefix is kept, `(B, T)` bool."""
    return 1 - (mask.sum(dim=1) - 1) / mask.shape[1]
