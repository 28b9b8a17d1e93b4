"""vistok: an open training framework for discrete visual tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vistok.checkpoints.load import load as load
    from vistok.core.registry import register as register
    from vistok.models.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"
__all__ = ["Tokenizer", "__version__", "load", "register"]

_LAZY = {
    "load": "vistok.checkpoints.load",
    "register": "vistok.core.registry",
    "Tokenizer": "vistok.models.tokenizer",
}


def __getattr__(name: str) -> Any:
    # Late imports: `vistok --help` and the config layer answer without waiting for torch.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vistok' has no attribute '{name}'")
