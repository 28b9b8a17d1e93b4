"""Alignment of a decoder's tokens with the features of a frozen teacher."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ConfigError
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.pretrained import Teacher
from vistok.models.tokenizer import Tokenizer
from vistok.nn.frozen import Frozen


class Alignment(nn.Module):
    """Pulls the patch tokens inside a decoder towards a teacher's features.

    One minus the cosine between a projection of the tokens behind one block and the features of
    the teacher at the same place, mean over the patches: REPA (Yu et al. 2025,
    https://arxiv.org/abs/2410.06940), as FlexTok and GigaTok use it. The projection, an MLP of
    three layers, is trained along, and is no part of the tokenizer.

    Args:
        tokenizer: its decoder must have blocks.
        teacher: what to align with; it is used, not owned.
        layer: index of the decoder's block.
        grid: where the two are compared: "tokens", the features shrunk to the patches, or
            "teacher", the projected patches interpolated to the features (FlexTok: 37 x 37).
    """

    def __init__(
        self, tokenizer: Tokenizer, teacher: Teacher, layer: int, grid: str = "tokens"
    ) -> None:
        super().__init__()
        if grid not in ("tokens", "teacher"):
            raise ConfigError(f"alignment.grid={grid}: must be tokens or teacher")
        self.grid = grid
        decoder = tokenizer.decoder
        blocks = getattr(getattr(decoder, "transformer", decoder), "blocks", None)
        if blocks is None:
            raise ConfigError(f"alignment: {type(decoder).__name__} has no transformer blocks")
        if not 0 <= layer < len(blocks):
            raise ConfigError(
                f"alignment.layer={layer}: the decoder has blocks 0 to {len(blocks) - 1}"
            )
        width = decoder.embed.out_features  # type: ignore[union-attr]
        self.projector = nn.Sequential(
            nn.Linear(width, 4 * width),  # type: ignore[arg-type,operator]
            nn.SiLU(),
            nn.Linear(4 * width, 4 * width),  # type: ignore[arg-type,operator]
            nn.SiLU(),
            nn.Linear(4 * width, teacher.dim),  # type: ignore[arg-type,operator]
        )
        self.teacher = Frozen(teacher)
        self._decoder = (decoder,)  # a tuple: the tokenizer owns it
        self._sequence: Tensor | None = None
        blocks[layer].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        if block.training:
            self._sequence = output

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar in [0, 2].

        Args:
            images: `(B, C, H, W)` of the last training forward.
            mask: `(B, N)` bool, the tokens that the decoder got in it; None for all.
        """
        return self.distances(images).mean()

    def distances(self, images: Tensor) -> Tensor:
        """One minus the cosine, `(B, places of the grid)`."""
        assert self._sequence is not None, "the decoder has not been called in training mode"
        (decoder,) = self._decoder
        tokens = self.projector(decoder.patch_tokens(self._sequence))  # type: ignore[operator]
        self._sequence = None
        features = self.teacher(images).float()
        patches = tokens.float().transpose(1, 2).unflatten(2, decoder.grid)  # type: ignore[arg-type]
        if self.grid == "teacher":
            patches = F.interpolate(patches, size=features.shape[2:], mode="bilinear")
        else:
            features = F.interpolate(features, size=decoder.grid, mode="area")  # type: ignore[arg-type]
        return 1 - F.cosine_similarity(patches, features, dim=1).flatten(1)


class HierarchicalAlignment(Alignment):
    """Alignment that weighs less the longer the code: first tokens for meaning, tail for detail.

    An image whose decoder got k of T tokens counts with the weight 1 - (k - 1) / T: 1 for a
    single token, 1 / T for all of them. That is how likely token k is to be seen under a uniform
    length. ReTok's hierarchical semantic regularisation (Fu et al. 2026,
    https://arxiv.org/abs/2601.01535); its formula was not at hand, this one is ours.

    Args:
        tokenizer: a flexible one, whose decoder has blocks.
        teacher: what to align with; it is used, not owned.
        layer: index of the decoder's block.
        grid: see `Alignment`.
    """

    def __init__(
        self, tokenizer: Tokenizer, teacher: Teacher, layer: int, grid: str = "tokens"
    ) -> None:
        super().__init__(tokenizer, teacher, layer, grid)
        if not isinstance(tokenizer, FlexibleTokenizer):
            raise ConfigError(
                f"alignment.form=hierarchical: weighs lengths, but {type(tokenizer).__name__} has "
                "one; use alignment.form=plain"
            )

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar in [0, 2]; arguments as of `Alignment`, with a mask."""
        assert mask is not None, "a flexible tokenizer masks in training"
        return (length_weights(mask)[:, None] * self.distances(images)).mean()


def length_weights(mask: Tensor) -> Tensor:
    """Weights `(B,)` in (0, 1] of codes of which a prefix is kept, `(B, T)` bool."""
    return 1 - (mask.sum(dim=1) - 1) / mask.shape[1]
