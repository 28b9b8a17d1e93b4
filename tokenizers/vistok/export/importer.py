"""Released weights to a tokenizer of ours: `vistok import-weights`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vistok.checkpoints.load import load_weights
from vistok.core.errors import CheckpointError
from vistok.core.registry import resolve
from vistok.core.released_weights import Published, listed
from vistok.export.exporter import check_out, place_export
from vistok.export.recognize import misfits, nearest_family, recognize
from vistok.export.released_files import read_released, read_said
from vistok.models.build import build_tokenizer
from vistok.models.tokenizer import Tokenizer

#: What a released file does not have, for only training needs it.
_FRESH = re.compile(
    r"quantizer\.(.*\.)?(stats\..*|usage\..*|initialized|steps)|encoder\.latent_means"
)


def import_weights(
    source: str,
    weights: Path,
    out: Path,
    image_size: int | Sequence[int] | None = None,
    overwrite: bool = False,
    config: Path | None = None,
) -> Path:
    """Write released weights as an export, which `vistok.load`, `stage.*` and `init_from` take.

    Args:
        source: whose they are: the name of a registered importer, such as "titok"; or "auto", to
            recognize it by names and shapes.
        weights: a `.safetensors` file, one of `torch.save`, which is read without running code, or
            a folder of Hugging Face; of a training checkpoint the averaged weights are taken, if it
            has some.
        out: folder to write; it appears whole or not at all.
        image_size: side in pixels or (height, width), for weights that take any; None for the
            published one.
        overwrite: replace an export that is there.
        config: the authors' config, JSON or YAML, for what tensors do not say.

    Returns:
        `out`.

    Raises:
        ConfigError: for a source that is not known, or an `out` that is there already.
        CheckpointError: if the file cannot be read, or holds other weights.
    """
    if source != "auto":
        resolve(source, kind="importer", key="source")
    check_out(out, overwrite)
    published = read_released(weights, source)
    if config is not None:
        published.metadata |= read_said(config)
    untouched = published.copy()
    try:
        if source == "auto":
            source = recognize(published)
        tokenizer, written = imported_tokenizer(published, source, image_size)
    except CheckpointError as error:
        raise CheckpointError(f"{weights}: {error}{_reasons(untouched, source)}") from error
    license = written["released"]["license"]
    place_export(tokenizer, written, out, {}, None if license == "unknown" else license)
    print(
        f"imported {weights} to {out} (source={source}, license: {license})\n"
        f"  {type(tokenizer).__name__}, {tokenizer.num_tokens} tokens per image of "
        f"{tokenizer.image_size[0]}x{tokenizer.image_size[1]}\n"
        f'  python: vistok.load("{out}")'
    )
    return out


def imported_tokenizer(
    published: Published,
    source: str,
    image_size: int | Sequence[int] | None = None,
) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer of released weights, for evaluation, and its config.

    Args:
        published: the tensors; all are taken.
        source: the name of a registered importer.
        image_size: see `import_weights`.

    Raises:
        CheckpointError: if they are other weights.
    """
    released = resolve(source, kind="importer", key="source")(published, image_size)
    published.finish()
    config = {
        "tokenizer": released.tokenizer,
        "quantizer": released.quantizer,
        "data": {
            "image_size": released.tokenizer["image_size"],
            "channels": released.tokenizer["channels"],
            "val_crop": "adm_center",
        },
        "released": {"source": source, "license": released.license},
    }
    tokenizer = build_tokenizer(config).eval()
    fresh = {k: v for k, v in tokenizer.state_dict().items() if _FRESH.fullmatch(k)}
    state = fresh | released.state
    if strange := state.keys() ^ tokenizer.state_dict().keys():
        missing, left = sorted(strange - state.keys()), sorted(strange & state.keys())
        raise published.misfit(
            f"by our names, missing {listed(missing)}; without a place {listed(left)}"
        )
    load_weights(tokenizer, state, f"source={source}")
    return tokenizer, config


def _reasons(published: Published, source: str) -> str:
    """Return what is missing and left over of a file for `source`, and its nearest family."""
    if source == "auto":
        return ""  # the error has it
    found = misfits(published, resolve(source, kind="importer"))
    family = nearest_family(published)
    text = f"; {found}" if found.missing or found.left else ""
    if family is None:
        return f"{text}; no family is near"
    return text + ("" if family == source else f"; it looks like source={family}")
