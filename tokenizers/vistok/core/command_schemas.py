"""What the keys of `eval`, `export` and `import-weights` may be. Light."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from vistok.core.schema import Names, or_null, precision, up_to
from vistok.core.values import ImageSize

#: `configs/eval.yaml`; the suite and the judgement of priors check the keys in their groups.
EVAL: dict[str, dict[str, Any]] = {
    "": {
        "run": str | None,
        "model": str | None,
        "images": str | None,
        "out": str | None,
        "weights": Literal["ema", "last"],
        "device": Literal["auto", "cpu", "cuda", "gpu"],
        "precision": precision(),
        "batch_size": Annotated[int, up_to(2**24)],
        "num_pictures": Annotated[int, up_to(10_000, 0)],
        "picture_scale": or_null(Annotated[int, up_to(64)]),
        "eval": dict,
        "prior": dict,
        "plugins": Names,
        "debug": bool,
    },
}

#: `configs/export.yaml`.
EXPORT: dict[str, dict[str, Any]] = {
    "": {
        "run": str,
        "out": str,
        "weights": Literal["ema", "last"],
        "layout": str | None,
        "license": str | None,
        "push": str | None,
        "graphs": or_null(Names),
        "overwrite": bool,
        "plugins": Names,
        "debug": bool,
    }
}

#: `configs/import.yaml`.
IMPORT: dict[str, dict[str, Any]] = {
    "": {
        "source": str,
        "weights": str,
        "config": or_null(str),
        "out": str,
        "image_size": or_null(ImageSize),
        "overwrite": bool,
        "plugins": Names,
        "debug": bool,
    }
}
