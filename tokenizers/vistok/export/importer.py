"""Released weights to a tokenizer of ours: `vistok import-weights`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vistok.checkpoints.load import load_weights
from vistok.core.errors import CheckpointError
from vistok.core.registry import resolve
from vistok.export.exporter import check_out, place_export
from vistok.export.recognize import family_of, recognize
from vistok.export.released_files import read_released
from vistok.models.build import build_tokenizer

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
    try:
        if source == "auto":
            source = recognize(published)
        released = resolve(source, kind="importer", key="source")(published, image_size)
        published.finish()
    except CheckpointError as error:
        raise CheckpointError(f"{weights}: {error}{_hint(weights, source)}") from error
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
    load_weights(tokenizer, fresh | released.state, str(weights))
    license = None if released.license == "unknown" else released.license
    place_export(tokenizer, config, out, {}, license)
    print(
        f"imported {weights} to {out} (source={source}, license: {released.license})\n"
        f"  {type(tokenizer).__name__}, {tokenizer.num_tokens} tokens per image of "
        f"{tokenizer.image_size[0]}x{tokenizer.image_size[1]}\n"
        f'  python: vistok.load("{out}")'
    )
    return out


def _hint(weights: Path, source: str) -> str:
    """Return which family a file is of, if it is another than `source`."""
    family = None if source == "auto" else family_of(read_released(weights))
    return f"; it looks like source={family}" if family not in (None, source) else ""
