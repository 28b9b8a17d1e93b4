"""Forms of semantic alignment: the plain one of `teachers.py`, and those of single papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vistok.errors import ConfigError, nearest
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.tokenizer import Tokenizer
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
    """

    def __init__(self, tokenizer: Tokenizer, teacher: Teacher, layer: int) -> None:
        super().__init__(tokenizer, teacher, layer)
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


_FORMS = {
    "plain": Alignment,
    "hierarchical": HierarchicalAlignment,
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
    teacher = Teacher(config["teacher"], config["weights"], config["input_size"])
    return _FORMS[form](tokenizer, teacher, config["layer"])
