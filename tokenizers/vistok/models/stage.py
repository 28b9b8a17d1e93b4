"""The contract of a stage of a training recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vistok.core.errors import ConfigError
from vistok.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """A trained tokenizer that a stage builds on.

    Attributes:
        path: where it comes from, as the command names it.
        config: of its run, plain containers.
        tokenizer: its architecture; without values when a config is resolved.
    """

    path: str
    config: Mapping[str, Any]
    tokenizer: Tokenizer


class Stage(ABC):
    """A stage of a recipe: it changes a run's architecture, and builds on another run.

    The task loads the source and hands it in. A system's stages lie in its `stages.py`; each is
    registered with the kind "stage" under the name that `stage.name` has.

    Attributes:
        source: the key of `stage` that names the run to build on, such as "proxy".
        described: what that run must be, for errors.
        keeps_words: whether `key=value` words of the command that concern the tokenizer must agree
            with what the stage makes of it.
        derived: keys under `tokenizer` that the stage sets by itself, whatever the words say.
        reads_weights: whether `prepare` is called, with the trained source.
        forgets_source: whether a resumed run can do without the source.
    """

    source: str
    described: str
    keeps_words: bool = True
    derived: tuple[str, ...] = ()
    reads_weights: bool = True
    forgets_source: bool = False

    @abstractmethod
    def resolve(self, config: dict[str, Any], source: Source) -> dict[str, Any]:
        """Return the run's config with the architecture that the stage calls for.

        Args:
            config: as composed; it stays as it is.
            source: of an architecture that fits the run's images.

        Raises:
            ConfigError: if the source does not fit.
        """

    @abstractmethod
    def prepare(self, tokenizer: Tokenizer, source: Tokenizer) -> None:
        """Give a tokenizer what it needs of the source.

        Args:
            tokenizer: built from the resolved config.
            source: the trained tokenizer; the stage may take its parts.
        """

    def refuse(self, source: Source, message: str) -> ConfigError:
        """Return an error that names the key of the source."""
        return ConfigError(f"stage.{self.source}={source.path}: {message}")
