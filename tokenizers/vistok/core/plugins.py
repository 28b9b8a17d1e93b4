"""Import modules of the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from vistok.core.errors import ConfigError


def import_plugins(names: str | Sequence[str], from_here: bool = True) -> None:
    """Import modules, which register what is in them.

    Args:
        names: of modules.
        from_here: look in the present folder first. Otherwise it is no place to look at all, unless
            PYTHONPATH names it: it may hold what someone else wrote, such as a downloaded run.

    Raises:
        ConfigError: if there is no such module.
    """
    for name in [names] if isinstance(names, str) else names:
        before = list(sys.path)
        here = os.getcwd()
        if from_here:
            sys.path.insert(0, here)
        else:
            asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)
            kept = [os.path.abspath(place) for place in asked if place]
            sys.path[:] = [p for p in before if os.path.abspath(p) != here or here in kept]
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            hint = "" if from_here else "; if it lies in this folder, set PYTHONPATH=."
            raise ConfigError(f"plugins=[{name}]: {error}{hint}") from error
        except (ValueError, TypeError) as error:  # an empty or a relative name
            raise ConfigError(f"plugins=[{name}]: not the name of a module") from error
        finally:
            if from_here:
                sys.path.remove(here)
            else:
                sys.path[:] = before
