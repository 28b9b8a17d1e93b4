"""Import modules of the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from vistok.core.errors import ConfigError


def import_plugins(names: str | Sequence[str]) -> None:
    """Import modules, which register what is in them; those of the present folder come first.

    Raises:
        ConfigError: if there is no such module.
    """
    for name in [names] if isinstance(names, str) else names:
        folder = os.getcwd()
        sys.path.insert(0, folder)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"plugins=[{name}]: {error}") from error
        finally:
            sys.path.remove(folder)
