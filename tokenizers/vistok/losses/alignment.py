"""Alignment of a tokenizer's features with those of a frozen teacher."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.values import check
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.pretrained import Teacher
from vistok.models.term import Step, Term, check_taps
from vistok.models.tokenizer import Tokenizer
from vistok.nn.frozen import Frozen

#: Where projected and taught features are compared.
PlacesOf = Literal["tokens", "teacher"]


@register("alignment")
class Alignment(Term):
    """Pulls features on a grid, of the decoder's patch tokens for example, towards a teacher's.

    One minus the cosine between a projection of what is tapped and the features of the teacher at
    the same place, mean over the places: REPA (Yu et al. 2025, https://arxiv.org/abs/2410.06940),
    as FlexTok and GigaTok use it. The projection, an MLP of three layers, is trained along, and is
    not part of the tokenizer.

    Args:
        tokenizer: what is aligned; given by the objective.
        teacher: what to align with; it is used, not owned.
        tap: name of the tokenizer's features, such as "decoder.block.1"; they must have a grid of
            rows and columns.
        grid: where the two are compared: "tokens", the teacher's features shrunk to those tapped,
            or "teacher", the projected ones interpolated to the teacher's (FlexTok: 37 x 37).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        teacher: Teacher,
        tap: str = "decoder.block.1",
        grid: PlacesOf = "tokens",
    ) -> None:
        super().__init__()
        check("grid", grid, PlacesOf)
        check_taps(tokenizer, [tap])
        width, places = tokenizer.tap_shapes()[tap]
        if places is None or len(places) != 2:
            raise ArgumentError(f"tap={tap}: these features do not lie on rows and columns")
        self.taps = (tap,)
        self.places = places
        self.grid = grid
        self.projector = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Linear(4 * width, 4 * width),
            nn.SiLU(),
            nn.Linear(4 * width, teacher.dim),
        )
        self.teacher = Frozen(teacher)

    def forward(self, step: Step) -> Tensor:
        """Return a scalar in [0, 2]."""
        return self.distances(step).mean()

    def distances(self, step: Step) -> Tensor:
        """Return one minus the cosine, `(B, places of the grid)`."""
        tokens = self.projector(step.output.features[self.taps[0]])
        features = self.teacher(step.images).float()
        patches = tokens.float().transpose(1, 2).unflatten(2, self.places)
        if self.grid == "teacher":
            patches = F.interpolate(patches, size=features.shape[2:], mode="bilinear")
        else:
            features = F.interpolate(features, size=self.places, mode="area")
        return 1 - F.cosine_similarity(patches, features, dim=1).flatten(1)


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
