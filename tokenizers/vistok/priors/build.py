"""A prior from a run's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.core.errors import ConfigError, as_written
from vistok.core.registry import build, check_arguments, resolve
from vistok.priors.layout import Layout
from vistok.priors.prior import Prior


def build_prior(config: Mapping[str, Any]) -> Prior:
    """Build the prior that a run's config describes.

    Args:
        config: resolved; `prior` is the part, and `layout` that of the ids, which a fresh run takes
            from its folder of tokens.

    Raises:
        ConfigError: naming the key that is wrong.
    """
    part = config.get("prior")
    if not isinstance(part, Mapping) or "_target_" not in part:
        raise ConfigError(
            f"prior={as_written(part)}: expected a mapping with a _target_; choose one, for "
            "example prior=gpt_tiny"
        )
    cls = resolve(part["_target_"], key="prior._target_")
    if not issubclass(cls, Prior):
        raise ConfigError(f"prior._target_={part['_target_']}: {cls.__name__} is not a prior")
    check_arguments(part, "prior", {"layout"})
    return build(part, "prior", layout=Layout.from_config(config["layout"]))
