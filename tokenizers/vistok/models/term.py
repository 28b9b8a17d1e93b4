"""The contract of the objective's terms, and of players that learn next to the tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError, nearest
from vistok.core.outputs import Prediction, TokenizerOutput
from vistok.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Step:
    """A batch as a term sees it.

    Attributes:
        images: `(B, C, H, W)` in [-1, 1].
        output: what the tokenizer's training forward returned.
        tokenizer: that tokenizer.
        samples_seen: position in the data at which the optimizer step began.
        of: name of the prediction that the term compares.
    """

    images: Tensor
    output: TokenizerOutput
    tokenizer: Tokenizer
    samples_seen: int = 0
    of: str = "image"
    _shared: dict[Hashable, tuple[Tensor, Any]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def once(self, what: Hashable, tensor: Tensor, compute: Callable[[], Any]) -> Any:
        """Return what `compute` makes of a tensor; in one step the same is computed once.

        Terms that look at the same picture through the same network share its forward so. It ends
        with the step. Of a leaf that takes a gradient nothing is shared: it is a copy whose graph
        somebody walks term by term, and a graph can be walked once.

        Args:
            what: is computed, for example a network's key and the name of its output.
            tensor: of which; told apart by identity.
            compute: computes it.
        """
        if tensor.is_leaf and tensor.requires_grad:
            return compute()
        key = (what, id(tensor), torch.is_grad_enabled())
        if key not in self._shared:
            self._shared[key] = (tensor, compute())  # kept along, so that no other takes its id
        return self._shared[key][1]

    @property
    def prediction(self) -> Prediction:
        """The prediction that the term compares."""
        return self.output.predictions[self.of]


class Term(nn.Module, ABC):
    """One entry of the objective: a scalar to minimise.

    Weight, start and ramp are the objective's. A term may own trainable parts, which belong to no
    tokenizer. Where its constructor has an argument `tokenizer`, it is given the tokenizer, to read
    shapes and refuse what does not fit; it must not keep it.

    Attributes:
        accepts: kinds of predictions that it compares; none if it compares no prediction.
        taps: names of the features that it reads from `TokenizerOutput.features`.
    """

    accepts: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """Return a float32 scalar, without its weight."""


#: Makes an optimizer: (module, lr, betas, weight_decay). How it works is the task's to say.
MakeOptimizer = Callable[..., torch.optim.Optimizer]


class Player(ABC):
    """A term with a network of its own that learns something else, such as a discriminator.

    It is not a module: DDP, FSDP and Lightning know the tokenizer alone, its optimizer steps are
    not counted, and no export carries it. For each batch `__call__` returns the tokenizer's side,
    through a network that gets no gradient from it, and keeps what the other side needs. After the
    tokenizer's backward pass `learn` adds the player's own gradients. `step` moves it, once per
    optimizer step. So both see the same network in a step, and accumulated batches and ranks count
    as one batch.

    Attributes:
        accepts: as of a term.
        taps: as of a term.
        warmup_samples: how long it learns before the tokenizer's loss reads it.
        warmup: the same as a share of the run, where `warmup_samples` is 0.
        gradient: of the last `__call__`, with respect to the prediction; None if there is none.
    """

    accepts: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    warmup_samples: int = 0
    warmup: float = 0.0
    gradient: Tensor | None = None

    def start(self) -> None:
        """Take the weights that a fresh run begins with, if they are not random."""
        return None

    @abstractmethod
    def equip(self, make_optimizer: MakeOptimizer) -> None:
        """Take an optimizer, before training."""

    @abstractmethod
    def __call__(self, step: Step) -> Tensor:
        """Return the tokenizer's side of a batch: a float32 scalar, without its weight."""

    @abstractmethod
    def watch(self, step: Step) -> None:
        """Keep what `learn` needs of a batch that the tokenizer's loss does not read yet."""

    @abstractmethod
    def learn(self, share: float, context: AbstractContextManager[Any]) -> dict[str, Tensor]:
        """Add the player's own gradients for the batch that was kept.

        Args:
            share: of this batch in the step.
            context: to compute in (autocast).

        Returns:
            Detached scalars to log as `loss/NAME`, or as they are if the name has a slash; none if
            no batch was kept.
        """

    def gather(self) -> Tensor | None:
        """End the gradients of a step: average them over the ranks, bound them.

        Returns:
            Their norm before it was bounded, the same on every rank; None without gradients.
        """
        return None

    @abstractmethod
    def discard(self) -> None:
        """Forget what the step under way has gathered, for the step is skipped."""

    @abstractmethod
    def step(self, factor: float) -> None:
        """Move the player, with `factor` times its learning rate, if it has gradients."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move it to a device."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return weights and moments."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""


def check_taps(tokenizer: Tokenizer, names: Iterable[str]) -> None:
    """Raise if the tokenizer has no such features.

    Raises:
        ArgumentError: naming the nearest one.
    """
    known = tokenizer.tap_shapes()
    for name in names:
        if name not in known:
            raise ArgumentError(
                f"tap={name}: the tokenizer has no such features{nearest(name, known)}; it has: "
                f"{', '.join(known)}"
            )
