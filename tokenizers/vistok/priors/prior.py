"""The contract of a prior: a generator over the ids of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError, ConfigError, DataError
from vistok.core.sample_random import chances
from vistok.priors.layout import Layout
from vistok.priors.sampling import Sampling

#: What a prior is told of an image: nothing, its label or its caption.
ConditionKind = Literal["none", "label", "caption"]

#: Stands for the end of a caption, behind the values of bytes.
_END = 256


@dataclass(frozen=True)
class Likelihood:
    """What a prior says of given ids.

    Attributes:
        nll: `(B, N, Q)` float32, minus the log-likelihood of each id in nats, or an upper bound;
            0 where there is none.
        counted: `(B, N, Q)` bool, the ids that were predicted, an end of image among them.
    """

    nll: Tensor
    counted: Tensor


@dataclass(frozen=True)
class Samples:
    """What a prior has drawn so far.

    Attributes:
        ids: `(B, n, Q)` int64, without offsets; 0 behind an image's end.
        lengths: `(B,)` int64, tokens of each image among the n.
    """

    ids: Tensor
    lengths: Tensor


class Condition(nn.Module):
    """What stands in front of the ids: a vector for a label, or one for each byte of a caption.

    Captions are read as UTF-8 bytes, by a table of 257 vectors and learned places. So a prior needs
    no text encoder and no download; it does not know what words mean before training, either. What
    is unconditional has vectors of its own.

    Args:
        kind: none, label or caption.
        width: W.
        num_classes: number of labels.
        caption_bytes: T, the longest caption in bytes; what is behind is cut off.
    """

    def __init__(self, kind: str, width: int, num_classes: int, caption_bytes: int) -> None:
        super().__init__()
        self.kind, self.num_classes = kind, num_classes
        self.length = caption_bytes if kind == "caption" else 1
        rows = {"none": 1, "label": num_classes + 1, "caption": _END + 1}[kind]
        self.table = nn.Embedding(rows, width)
        if kind == "caption":
            self.places = nn.Embedding(self.length, width)
            self.nothing = nn.Embedding(self.length, width)

    def forward(self, condition: Tensor) -> Tensor:
        """Return `(B, T, W)` of what `Prior.condition` made."""
        if self.kind != "caption":
            return self.table(condition)[:, None]
        x = self.table(condition.clamp(min=0)) + self.places.weight
        return torch.where((condition < 0)[..., None], self.nothing.weight, x)

    def unconditional(self, condition: Tensor) -> Tensor:
        """Return what stands for no condition, of the shape of `condition`."""
        row = self.num_classes if self.kind == "label" else 0
        return torch.full_like(condition, -1 if self.kind == "caption" else row)


class Prior(nn.Module, ABC):
    """A generator over ids `(B, N, Q)`, trained to predict them.

    Args:
        layout: how the ids of an image lie.
        condition: what it is told of an image.
        condition_dropout: share of the images of which it is told nothing, for guidance.
        caption_bytes: the longest caption.
        width: W of the transformer.
    """

    #: See `training/sharding.py`.
    unsharded: tuple[str, ...] = ()
    entries: tuple[str, ...] = ("generate",)

    def __init__(
        self,
        layout: Layout,
        condition: str,
        condition_dropout: float,
        caption_bytes: int,
        width: int,
    ) -> None:
        super().__init__()
        if condition == "label" and not layout.num_classes:
            raise ArgumentError(
                "condition=label: the token folder has no labels; must be none or caption"
            )
        if condition == "caption" and not layout.captions:
            raise ArgumentError(
                "condition=caption: the token folder has no captions; must be none or label"
            )
        self.layout = layout
        self.condition_dropout = condition_dropout if condition != "none" else 0.0
        self.told = Condition(condition, width, layout.num_classes, caption_bytes)

    # ------------------------------------------------------------------ what a prior writes

    @abstractmethod
    def likelihood(self, ids: Tensor, lengths: Tensor | None, condition: Tensor) -> Likelihood:
        """Return the likelihood of ids, or in training a random part of it.

        Args:
            ids: `(B, N, Q)` int64; what is behind an image's length does not matter.
            lengths: `(B,)` tokens of each image; None for N.
            condition: see `condition`.
        """

    @abstractmethod
    def stream(
        self, condition: Tensor, sampling: Sampling, first: int = 0, cached: bool = True
    ) -> Iterator[Samples]:
        """Draw images, and yield them after every step.

        Args:
            condition: of B images, see `condition`.
            sampling: how.
            first: number of the first of them, which decides its random numbers.
            cached: keep keys and values, where that saves anything.
        """

    # ------------------------------------------------------------------ what everyone calls

    def forward(self, ids: Tensor, lengths: Tensor | None, condition: Tensor) -> Likelihood:
        """Return the likelihood of a batch; in training some conditions are left out."""
        if self.training and self.condition_dropout:
            left_out = chances(self.condition_dropout, (len(ids),), ids.device)
            left_out = left_out.view(-1, *[1] * (condition.ndim - 1))
            condition = torch.where(left_out, self.told.unconditional(condition), condition)
        return self.likelihood(ids, lengths, condition)

    @torch.no_grad()
    def generate(
        self, condition: Tensor, sampling: Sampling, first: int = 0, cached: bool = True
    ) -> Samples:
        """Draw images; see `stream`."""
        *_, samples = self.stream(condition, sampling, first, cached)
        return samples

    def condition_of(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the condition of a batch of tokens, with `label` and `caption`."""
        if self.told.kind == "caption":
            return self.condition(batch["caption"])
        if self.told.kind == "label":
            return self.condition(batch["label"])
        return self.condition([None] * len(batch["ids"]))

    def condition(self, given: Tensor | Sequence[Any]) -> Tensor:
        """Return labels or captions as this prior takes them.

        Args:
            given: a label or a caption for each image; -1 or None for nothing.

        Returns:
            `(B,)` int64, or `(B, T)` bytes of captions.

        Raises:
            ConfigError: if a label is none of those that it knows.
        """
        device = self.told.table.weight.device
        if self.told.kind == "none":
            return torch.zeros(len(given), dtype=torch.long, device=device)
        if self.told.kind == "caption":
            rows = [_as_bytes(text, self.told.length) for text in given]
            return torch.tensor(rows, device=device).view(-1, self.told.length)
        values = given.tolist() if isinstance(given, Tensor) else list(given)
        labels = [-1 if label is None else int(label) for label in values]
        known = self.told.num_classes
        for label in labels:
            if not -1 <= label < known:
                raise ConfigError(
                    f"label {label}: the prior knows 0 to {known - 1}, and -1 for none"
                )
        found = torch.tensor(labels, dtype=torch.long, device=device)
        return torch.where(found < 0, known, found)

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.told.table.weight.device


def _as_bytes(text: Any, length: int) -> list[int]:
    if text is None:
        return [-1] * length
    if not isinstance(text, str):
        raise DataError(f"caption {text!r}: expected text")
    found = list(text.encode())[:length]
    return found + [_END] * (length - len(found))
