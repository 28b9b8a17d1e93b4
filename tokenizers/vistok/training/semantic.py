"""Forms of semantic alignment: the plain one of `teachers.py`, and those of single papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.decoders.restok import ResTokDecoder
from vistok.encoders.restok import ResTokEncoder
from vistok.errors import ConfigError, check_number, check_whole, nearest
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.tokenizer import Tokenizer
from vistok.nn.frozen import Frozen
from vistok.training.teachers import Alignment, Teacher


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
                f"alignment.form=foundation: is ResTok's, but the tokenizer is a "
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


_FORMS = {
    "plain": Alignment,
    "hierarchical": HierarchicalAlignment,
    "foundation": FoundationAlignment,
}


def build_alignment(tokenizer: Tokenizer, config: Mapping[str, Any] | None) -> nn.Module | None:
    """The alignment that a run's config asks for, if any."""
    if not config or not config["teacher"]:
        return None
    form = config.get("form", "plain")  # runs from before there were forms have none
    if form not in _FORMS:
        raise ConfigError(
            f"alignment.form={form}: must be one of {', '.join(_FORMS)}{nearest(str(form), _FORMS)}"
        )
    check_number("alignment.weight", config["weight"], 0)
    check_whole("alignment.layer", config["layer"], 0)
    check_whole("alignment.input_size", config["input_size"], 1)
    teacher = Teacher(config["teacher"], config["weights"], config["input_size"])
    grid = config.get("grid", "tokens")  # nor a choice of grids
    return _FORMS[form](tokenizer, teacher, config["layer"], grid)
