"""The tokens of a run, and whether they are those that a prior was built for."""

from __future__ import annotations

from typing import Any

from vistok.core.errors import ConfigError, DataError
from vistok.data.token_module import TokenDataModule
from vistok.priors.layout import Layout


def token_data(config: dict[str, Any]) -> TokenDataModule:
    """Return the tokens of a run's config."""
    options = config["data"]
    if options.get("kind") != "tokens":
        raise ConfigError(
            f"data.kind={options.get('kind')}: task=prior reads tokens; add data=tokens"
        )
    return TokenDataModule(train=config.get("tokens"), **options)


def check_layout(data: TokenDataModule, wanted: Layout) -> None:
    """Raise if a folder of tokens is not laid out as a prior was built for.

    Raises:
        DataError: naming what differs.
    """
    found = Layout.from_manifest(data.train_folder.manifest, data.num_classes).as_config()
    for name, value in wanted.as_config().items():
        if name == "tokenizer" and value != found[name]:
            raise DataError(
                f"tokens={data.train_place}: of another tokenizer ({found[name][:12]}) than those "
                f"that the prior was trained on ({str(value)[:12]})"
            )
        if value != found[name]:
            raise DataError(
                f"tokens={data.train_place}: {name} is {found[name]}, but the prior was built for "
                f"{value}"
            )
