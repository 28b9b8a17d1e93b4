"""Write a tokenizer for other programs: codebooks, weights, config and card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

import vistok
from vistok.checkpoints.exports import write_checksums
from vistok.checkpoints.find import find_checkpoint, run_folder
from vistok.checkpoints.load import load
from vistok.checkpoints.migrate import FORMAT
from vistok.checkpoints.read import read_config
from vistok.core.errors import CheckpointError, ConfigError
from vistok.core.files import parse_json
from vistok.evaluation.protocol import weights_hash
from vistok.export import hub
from vistok.export.card import card
from vistok.export.codebooks import codebook_dims, codebook_tensors
from vistok.export.graphs import check_graphs, write_graphs
from vistok.export.vocabulary import vocabulary
from vistok.models.tokenizer import Tokenizer


def export_run(
    run: Path,
    out: Path,
    weights: str = "ema",
    overwrite: bool = False,
    license: str | None = None,
    push: str | None = None,
    graphs: Sequence[str] = (),
) -> Path:
    """Export a run.

    Args:
        run: run folder or checkpoint.
        out: folder to write; it appears whole or not at all.
        weights: "ema" or "last".
        overwrite: replace an export that is there.
        license: of the weights, for the card and config.json; such as "apache-2.0".
        push: owner/name on the Hugging Face Hub to upload it to.
        graphs: of "onnx" and "torch": also write encode and decode as such.

    Returns:
        `out`.

    Raises:
        ConfigError: if `out` is there already and `overwrite` is off, or is not an export.
    """
    check_out(out, overwrite)
    check_graphs(graphs)
    if push is not None:
        hub.check_name(push)
    source = find_checkpoint(run)
    tokenizer = load(run, weights=weights)
    metrics = run_metrics(source, tokenizer)
    place_export(tokenizer, read_config(source), out, metrics, license, graphs)
    sizes = zip(tokenizer.quantizer.codebook_sizes, codebook_dims(tokenizer), strict=True)
    print(
        f"exported {source} to {out}\n"
        f"  {tokenizer.num_tokens} tokens per image, codebooks {' '.join(map(str, sizes))}\n"
        f'  python: vistok.load("{out}")'
    )
    if push is not None:
        print(f"  pushed to {hub.push(out, push)}")
    return out


def check_out(out: Path, overwrite: bool, file: str = "model.safetensors") -> None:
    """Check that an export, which has a file of its weights, may be written to `out`.

    Raises:
        ConfigError: if `out` is there already and `overwrite` is off, or is not an export.
    """
    if out.exists():
        if not overwrite:
            raise ConfigError(f"out={out}: already exists; use overwrite=true or another folder")
        if not (out / file).exists():
            raise ConfigError(f"out={out}: not an export, so it is not overwritten")


def place_export(
    tokenizer: Tokenizer,
    config: dict[str, Any],
    out: Path,
    metrics: dict[str, Any],
    license: str | None = None,
    graphs: Sequence[str] = (),
) -> None:
    """Write an export next to `out`, then put it there, in place of one that is there already.

    Raises:
        CheckpointError: if it could not be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_export(tokenizer, config, temporary, metrics, license, graphs)
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"out={out}: could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_export(
    tokenizer: Tokenizer,
    config: dict[str, Any],
    folder: Path,
    metrics: dict[str, Any],
    license: str | None = None,
    graphs: Sequence[str] = (),
) -> None:
    """Write the files of an export into `folder`.

    Args:
        tokenizer: with the weights to export.
        config: the run's resolved config.
        folder: created.
        metrics: for the card.
        license: of the weights, such as "apache-2.0"; None if none was chosen.
        graphs: of "onnx" and "torch": also write encode and decode as such.
    """
    folder.mkdir(parents=True)
    description = describe(tokenizer, config, license)
    cut = preprocessing(tokenizer, description["io"]["crop"])
    texts = {
        "config.json": description,
        "vocabulary.json": vocabulary(tokenizer),
        "preprocess.json": cut,
        # The name by which transformers looks for it, once `vistok.hf` is imported.
        "preprocessor_config.json": {"image_processor_type": "VistokImageProcessor", **cut},
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "README.md").write_text(card(description, metrics))
    state = {name: value.contiguous().clone() for name, value in tokenizer.state_dict().items()}
    tables = codebook_tensors(tokenizer)
    for name, tensors in (("model.safetensors", state), ("codebook.safetensors", tables)):
        save_file(tensors, folder / name, metadata={"format": "pt"})
        # safetensors makes files for their owner alone; these are to be as the umask has it.
        os.chmod(folder / name, (folder / "config.json").stat().st_mode & 0o777)
    write_graphs(tokenizer, folder, graphs)
    write_checksums(folder)


def describe(
    tokenizer: Tokenizer, config: dict[str, Any], license: str | None = None
) -> dict[str, Any]:
    """Return `config.json`: the tokenizer's config, and the contract of its inputs and outputs."""
    sizes = tokenizer.quantizer.codebook_sizes
    return {
        "format": FORMAT,
        "model_type": "vistok",  # what `import vistok.hf` registers with transformers
        "vistok": vistok.__version__,
        "license": license,
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
            "codebook_dims": codebook_dims(tokenizer),
            # id of slot q in one joint vocabulary = offset[q] + id
            "joint_vocabulary_offsets": [sum(sizes[:q]) for q in range(len(sizes))],
            "bits_per_image": tokenizer.bits_per_image,
        },
        "data": {key: config["data"].get(key) for key in ("image_size", "channels", "val_crop")},
        # of imported weights: whose they are, and their license
        **({"released": config["released"]} if config.get("released") else {}),
    }


def preprocessing(tokenizer: Tokenizer, crop: str) -> dict[str, Any]:
    """Return `preprocess.json`: how images become what the tokenizer takes."""
    return {
        "format": 1,
        "image_size": list(tokenizer.image_size),
        "channels": tokenizer.channels,
        "orientation": "EXIF orientation is applied",
        "transparency": "blended over white" if tokenizer.channels != 4 else "kept",
        "crop": crop,
        "resize": _RESIZES.get(crop, "bicubic, antialiased"),
        "range": "uint8, or float in [0, 1]",
    }


_CENTRE = "of that the middle, its offset rounded"

#: What the crop policies of evaluation do; `vistok.data.crops` has them all.
_RESIZES = {
    "adm_center": "averaged over 2 x 2 pixels while twice the target still fits, then bicubic, "
    f"antialiased, until the short side fits, the long one rounded; {_CENTRE} down",
    "tv_center": "bicubic, antialiased, until the short side fits, the long one rounded down; "
    f"{_CENTRE}",
    "none": "none: images must have the size",
}


def run_metrics(checkpoint: Path, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Return the run's `eval/metrics.json` if it was evaluated, else its `summary.json`.

    Numbers, and of an evaluation also `protocol`, `protocol_hash` and `data`, which they belong to.
    A damaged file is passed over: a table in a card is no reason to refuse an export. So is an
    evaluation of other weights than the tokenizer's: of an earlier step, or the raw ones.
    """
    run = run_folder(checkpoint)
    for path in (run / "eval" / "metrics.json", run / "summary.json"):
        try:
            values = parse_json(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            values = None
        if not isinstance(values, dict):
            print(f"{path}: not readable; the card is written without it")
            continue
        measured = (values.get("model") or {}).get("sha256")
        if tokenizer is not None and measured and measured != weights_hash(tokenizer):
            print(f"{path}: measured with other weights; the card is written without it")
            continue
        kept: dict[str, Any] = {
            key: value
            for key, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if isinstance(values.get("protocol"), dict):
            kept |= {key: values.get(key) for key in ("protocol", "protocol_hash", "data")}
        return kept
    return {}
