"""Helpers that the importers of released weights share.

Each converter takes the tensors of a published file by their published names, and gives the config
of a tokenizer and the state that belongs to it. All sizes are read off the tensors, and a tensor
that is missing or left over is an error.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vistok.core.errors import CheckpointError

Importer = TypeVar("Importer", bound=Callable[..., Any])


class Released(NamedTuple):
    """Result of a converter: the parts of a config, and a state without fresh statistics.

    Attributes:
        tokenizer: its config.
        quantizer: its config.
        state: tensors by our names.
        license: the one that the weights were released under, as their owners name it.
    """

    tokenizer: dict[str, Any]
    quantizer: dict[str, Any]
    state: dict[str, Tensor]
    license: str = "unknown"


class Published:
    """The tensors of a published file, each taken once.

    Args:
        tensors: by their published names.
        metadata: what a safetensors file says of itself.
        source: the name of the importer that reads them, for errors.
        lenient: go on without a tensor that is missing, to find all of these: `missing` lists them,
            and single zeros stand for them, so that an importer may or may not come to its end.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        source: str = "",
        lenient: bool = False,
    ) -> None:
        self.source = source
        self.lenient = lenient
        self.missing: list[str] = []
        self.left = dict(tensors)
        self.metadata = dict(metadata or {})

    def said(self) -> dict[str, Any]:
        """Return all plain values of the config that comes with the file, by their last names."""

        def leaves(value: Any) -> Iterator[tuple[str, Any]]:
            for name, inner in value.items():
                if isinstance(inner, Mapping):
                    yield from leaves(inner)
                elif inner is not None:
                    yield name, inner

        parsed = {}
        for name, text in self.metadata.items():
            try:
                parsed[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                parsed[name] = text  # no plain value
        return dict(leaves(parsed))

    def take(self, name: str) -> Tensor:
        """The tensor `name`, float32.

        Raises:
            CheckpointError: if there is none.
        """
        self.shape(name)
        return self.left.pop(name, torch.zeros([1] * 4)).detach().float()

    def shape(self, name: str) -> torch.Size:
        """The shape of the tensor `name`, which stays.

        Raises:
            CheckpointError: if there is none.
        """
        if name in self.left:
            return self.left[name].shape
        if not self.lenient:
            raise self.misfit(f"'{name}' is missing")
        self.missing += [name] * (name not in self.missing)
        return torch.Size([1] * 4)

    def move(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """All tensors of some parts, `{theirs: ours}`, under our names."""
        moved = {}
        for theirs, ours in names.items():
            inside = [name for name in self.left if name.startswith(f"{theirs}.")]
            for name in inside or [f"{theirs}.weight"]:
                moved[ours + name[len(theirs) :]] = self.take(name)
        return moved

    def has(self, *names: str) -> bool:
        """Return whether there are all of some tensors, or parts."""
        return all(
            name in self.left or any(key.startswith(f"{name}.") for key in self.left)
            for name in names
        )

    def copy(self, lenient: bool = False) -> Published:
        """Return another one with the same tensors, to try something on."""
        return Published(self.left, self.metadata, self.source, lenient)

    def drop(self, *prefixes: str) -> None:
        """Leave out tensors that are known and not needed, such as those of a loss."""
        for name in [name for name in self.left if name.startswith(prefixes)]:
            del self.left[name]

    def count(self, prefix: str) -> int:
        """Return how many parts `prefix.0`, `prefix.1`, ... there are."""
        start = len(prefix) + 1
        return len({k[start:].partition(".")[0] for k in self.left if k.startswith(f"{prefix}.")})

    def within(self, *prefixes: str) -> None:
        """Leave out what is outside a part of a larger model, if the file has one.

        Args:
            prefixes: names that the part may have, such as "model.vqmodel".
        """
        for prefix in prefixes:
            start = f"{prefix}."
            if any(name.startswith(start) for name in self.left):
                self.left = {
                    name.removeprefix(start): value
                    for name, value in self.left.items()
                    if name.startswith(start)
                }
                return

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            CheckpointError: naming the first tensor that has no place.
        """
        for name in self.left:
            raise self.misfit(f"'{name}' has no place (and {len(self.left) - 1} more)")

    def misfit(self, found: str) -> CheckpointError:
        """Return the error that the file is of another kind, for what was found in it."""
        return CheckpointError(
            f"the file does not look like weights of source={self.source}: {found}"
        )


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return the first names, quoted, and how many more there are."""
    names = list(names)
    more = len(names) - most
    text = ", ".join(f"'{name}'" for name in names[:most]) or "none"
    return f"{text} (and {more} more)" if more > 0 else text


def recognized(why: str, test: Callable[[Published], bool]) -> Callable[[Importer], Importer]:
    """Let `source=auto` find an importer; a decorator of it.

    Args:
        why: what in a file tells that it is of this family, for the user.
        test: whether a file has that.
    """

    def mark(importer: Importer) -> Importer:
        importer.mark = Mark(why, test)  # type: ignore[attr-defined]
        return importer

    return mark


class Mark(NamedTuple):
    """What tells a family: in words, and as a test."""

    why: str
    test: Callable[[Published], bool]


def vector_quantizer(codes: Tensor, dim: int, metric: str) -> dict[str, Any]:
    """Config of a quantizer with the codebook `codes` `(K, d)`, for latents of width `dim`."""
    return {
        "_target_": "vq",
        "dim": dim,
        "codebook_size": len(codes),
        "codebook_dim": codes.shape[1],
        "codebook": "gradient",
        "metric": metric,
        "kmeans_init": False,
        "revival": "none",
    }


def inside(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state under the names that it has as part of a larger one."""
    return {f"{part}.{name}": value for name, value in state.items()}
