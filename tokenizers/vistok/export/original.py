"""Write a tokenizer in the layout of the code that its kind was published with."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vistok.checkpoints.find import find_checkpoint_or_export
from vistok.checkpoints.load import load
from vistok.checkpoints.read import read_config
from vistok.core.errors import CheckpointError, ConfigError, VistokError
from vistok.core.registry import resolve
from vistok.core.released_weights import Published
from vistok.export.exporter import check_out
from vistok.export.importer import imported_tokenizer
from vistok.models.originals import Original
from vistok.models.tokenizer import Tokenizer


def export_original(
    run: Path, out: Path, layout: str, weights: str = "ema", overwrite: bool = False
) -> Path:
    """Export a run for the code of the original, and read it back.

    Args:
        run: run folder, checkpoint or export.
        out: folder to write; it appears whole or not at all.
        layout: whose it is: the name of a registered exporter, such as "llamagen".
        weights: "ema" or "last".
        overwrite: replace an export that is there.

    Returns:
        `out`.

    Raises:
        ConfigError: for a layout that is not known or in which this tokenizer would compute
            something else, or an `out` that is there already.
    """
    exporter = resolve(layout, kind="exporter", key="layout")
    tokenizer = load(run, weights=weights).eval()
    try:
        original: Original = exporter(tokenizer)
    except ConfigError as error:
        raise ConfigError(f"layout={layout}: {error}") from None
    check_out(out, overwrite, original.file)
    _compare(tokenizer, original, layout, read_config(find_checkpoint_or_export(str(run))))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(original, temporary)
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except OSError as error:
        raise CheckpointError(f"out={out}: could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"exported {run} to {out} (layout={layout})\n  {original.opened.format(out=out)}")
    return out


def _write(original: Original, folder: Path) -> None:
    folder.mkdir(parents=True)
    if original.config is not None:
        (folder / "config.json").write_text(json.dumps(original.config, indent=2) + "\n")
    tensors = {k: v.detach().contiguous().clone() for k, v in original.tensors.items()}
    path = folder / original.file
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(path, 0o666 & ~umask)  # safetensors makes files for their owner alone
    else:
        torch.save({"model": tensors}, path)


@torch.no_grad()
def _compare(
    tokenizer: Tokenizer, original: Original, layout: str, config: Mapping[str, Any]
) -> None:
    """Raise unless the importer of a layout makes the same tokenizer of it.

    The importers are held to the original code. So what one of them reads back with the same ids
    and pictures is what that code computes.
    """
    published = Published(original.tensors, source=layout)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, tokenizer.channels, *tokenizer.image_size, generator=generator)
    found: dict[str, Any] = {}
    why = ""
    try:
        height, width = tokenizer.image_size
        size = height if height == width else [height, width]
        other, found = imported_tokenizer(published, layout, size)
        ids = tokenizer.tokenize(images)
        same = (other.tokenize(images) == ids).float().mean().item()
        error = (other.detokenize(ids) - tokenizer.detokenize(ids)).abs().max().item()
    except (VistokError, RuntimeError, ValueError, LookupError) as misfit:
        same, error, why = 0.0, 1.0, str(misfit).partition("\n")[0]
    # Rounding in another order may turn an id of two codes that are as near.
    if same >= 0.99 and error <= 1e-3:
        return
    why = _difference(config, found) or why or f"{same:.0%} of the ids agree"
    raise ConfigError(
        f"layout={layout}: its code would compute something else than this tokenizer: {why}"
    )


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return the first option that differs between two configs, and its values; or ""."""
    for part in ("encoder", "decoder"):
        one, other = (config.get("tokenizer", {}).get(part, {}) for config in (ours, theirs))
        if not other:
            continue
        parameters = inspect.signature(resolve(other["_target_"])).parameters
        for key, value in one.items():
            # Channels are those of what a stem folds; means that are not zero were refused before.
            if key in ("channels", "latent_means"):
                continue
            there = other.get(key, parameters[key].default if key in parameters else None)
            if None not in (value, there) and not isinstance(value, dict) and value != there:
                return f"tokenizer.{part}.{key}={value}, where its weights have {there}"
    one, other = (config.get("quantizer", {}) for config in (ours, theirs))
    for key in ("_target_", "metric"):
        if other and one.get(key) != other.get(key):
            return f"quantizer.{key}={one.get(key)}, where its weights have {other.get(key)}"
    return ""
