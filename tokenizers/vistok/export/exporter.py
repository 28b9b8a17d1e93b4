"""Write a tokenizer for other programs: codebooks, weights, config and card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import vistok
from vistok.checkpoints.find import find_checkpoint, run_folder
from vistok.checkpoints.load import load
from vistok.checkpoints.migrate import FORMAT
from vistok.checkpoints.read import read_config
from vistok.core.errors import CheckpointError, ConfigError
from vistok.core.files import read_json
from vistok.core.registry import resolve
from vistok.models.tokenizer import Tokenizer

#: Larger implicit codebooks are not written out; `config.json` says how to compute them.
LARGEST_TABLE = 2**20


def export_run(run: Path, out: Path, weights: str = "ema", overwrite: bool = False) -> Path:
    """Export a run.

    Args:
        run: run folder or checkpoint.
        out: folder to write; it appears whole or not at all.
        weights: "ema" or "last".
        overwrite: replace an export that is there.

    Returns:
        `out`.

    Raises:
        ConfigError: if `out` is there already and `overwrite` is off, or is not an export.
    """
    check_out(out, overwrite)
    source = find_checkpoint(run)
    tokenizer = load(run, weights=weights)
    place_export(tokenizer, read_config(source), out, run_metrics(source))
    print(
        f"exported {source} to {out}\n"
        f"  {tokenizer.num_tokens} tokens per image, codebooks "
        f"{' '.join(str(tuple(t.shape)) for t in tokenizer.codebooks())}\n"
        f'  python: vistok.load("{out}")'
    )
    return out


def check_out(out: Path, overwrite: bool) -> None:
    """Check that an export may be written to `out`.

    Raises:
        ConfigError: if `out` is there already and `overwrite` is off, or is not an export.
    """
    if out.exists():
        if not overwrite:
            raise ConfigError(f"out={out}: already exists; use overwrite=true or another folder")
        if not (out / "model.safetensors").exists():
            raise ConfigError(f"out={out}: not an export, so it is not overwritten")


def place_export(
    tokenizer: Tokenizer, config: dict[str, Any], out: Path, metrics: dict[str, Any]
) -> None:
    """Write an export next to `out`, then put it there, in place of one that is there already.

    Raises:
        CheckpointError: if it could not be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_export(tokenizer, config, temporary, metrics)
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"out={out}: could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_export(
    tokenizer: Tokenizer, config: dict[str, Any], folder: Path, metrics: dict[str, Any]
) -> None:
    """Write the files of an export into `folder`.

    Args:
        tokenizer: with the weights to export.
        config: the run's resolved config.
        folder: created.
        metrics: for the card.
    """
    folder.mkdir(parents=True)
    state = {name: value.contiguous().clone() for name, value in tokenizer.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(codebook_tensors(tokenizer), folder / "codebook.safetensors", {"format": "pt"})
    description = describe(tokenizer, config)
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    (folder / "README.md").write_text(card(description, metrics))


@torch.no_grad()
def codebook_tensors(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return the tables in which a downstream model looks ids up.

    `codebook.q` `(K_q, d_q)` for every index slot q: the vectors that distances are measured
    between (of unit length for cosine codebooks). With one slot also `decoder_input` `(K, D)`:
    row i is the vector that the decoder gets for id i.
    """
    tables = tokenizer.codebooks()
    tensors = {f"codebook.{q}": t.contiguous().clone() for q, t in enumerate(tables)}
    sizes = tokenizer.quantizer.codebook_sizes
    # Codes that only mean something together (multi-scale) have no such table.
    if len(sizes) == 1 and sizes[0] <= LARGEST_TABLE and tokenizer.quantizer.per_token:
        ids = torch.arange(sizes[0], device=tokenizer.device)[None, :, None]
        tensors["decoder_input"] = tokenizer.quantizer.decode(ids)[0].contiguous().clone()
    return tensors


def describe(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    """Return `config.json`: the tokenizer's config, and the contract of its inputs and outputs."""
    sizes = tokenizer.quantizer.codebook_sizes
    return {
        "format": FORMAT,
        "vistok": vistok.__version__,
        "tokenizer": config["tokenizer"],
        "quantizer": config["quantizer"],
        "io": {
            "image_size": list(tokenizer.image_size),
            "channels": tokenizer.channels,
            "image_range": "uint8, or float in [0, 1]",
            "crop": config["data"]["val_crop"],
            "num_tokens": tokenizer.num_tokens,
            # places of the latents, [rows, columns]; null for a sequence
            "grid": None if tokenizer.encoder.grid is None else list(tokenizer.encoder.grid),
            "token_order": tokenizer.token_order,
            "ids": "int64 (B, N, Q), each slot counting from 0",
            "codebook_sizes": list(sizes),
            "codebook_dims": [t.shape[1] for t in tokenizer.codebooks()],
            # id of slot q in one joint vocabulary = offset[q] + id
            "joint_vocabulary_offsets": [sum(sizes[:q]) for q in range(len(sizes))],
            "bits_per_image": tokenizer.bits_per_image,
        },
        "data": {key: config["data"].get(key) for key in ("image_size", "channels", "val_crop")},
    }


def run_metrics(checkpoint: Path) -> dict[str, Any]:
    """Return the run's `eval/metrics.json` if it was evaluated, else its `summary.json`."""
    run = run_folder(checkpoint)
    for path in (run / "eval" / "metrics.json", run / "summary.json"):
        if values := read_json(path):  # a damaged one stops no export
            return {k: v for k, v in values.items() if isinstance(v, (int, float))}
    return {}


def card(description: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Return the `README.md` of an export."""
    io = description["io"]
    name = resolve(description["tokenizer"]["_target_"]).__name__
    quantizer = resolve(description["quantizer"]["_target_"]).__name__
    rows = [
        f"| {k} | {v:.4g} |" if isinstance(v, float) else f"| {k} | {v} |"
        for k, v in metrics.items()
    ]
    table = "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else "Not evaluated yet."
    size = " x ".join(map(str, io["image_size"]))
    sizes = zip(io["codebook_sizes"], io["codebook_dims"], strict=True)
    books = [f"{count} codes of dimension {dim}" for count, dim in sizes]
    return f"""# {name} with {quantizer}

A discrete visual tokenizer, exported by vistok {description["vistok"]}.

| | |
|---|---|
| images | {size} pixels, {io["channels"]} channels, {io["image_range"]}, crop `{io["crop"]}` |
| tokens | {io["num_tokens"]} per image, {len(books)} ids each, order: {io["token_order"]} |
| codebooks | {", ".join(books)} |
| size | {io["bits_per_image"]:.0f} bits per image |

## Measured

{table}

## Use

```python
import vistok

tok = vistok.load("path/to/this/folder")
ids = tok.tokenize(images)      # (B, C, H, W) uint8 or float in [0, 1] -> (B, N, Q) int64
rec = tok.detokenize(ids)       # float in [0, 1]
```

`codebook.safetensors` needs safetensors alone: `codebook.q` is the table of index slot q;
`decoder_input`, where ids have one slot, holds the vector that the decoder gets for each id.
"""
