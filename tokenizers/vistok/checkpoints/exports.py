"""Exports: their checksums, and the identity of the tokenizer in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vistok.core.errors import CheckpointError
from vistok.core.files import parse_json

CHECKSUMS = "checksums.json"

#: The form of `checksums.json` that is written today.
_FORMAT = 1


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file of an export, and the hash of its tokenizer."""
    files = {
        path.relative_to(folder).as_posix(): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS
    }
    content = {"format": _FORMAT, "tokenizer_hash": tokenizer_hash(folder), "sha256": files}
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=2) + "\n")


def check_export(folder: Path) -> None:
    """Compare the files of an export with their checksums; one from before there were any passes.

    `README.md` may be edited, and files may be added.

    Raises:
        CheckpointError: naming the first file that is missing or altered.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        if (folder / "vocabulary.json").exists():  # written together
            raise CheckpointError(f"{folder}: {CHECKSUMS} is missing; copy the export again")
        return
    try:
        content = parse_json(path.read_bytes())
        number, files = content["format"], dict(content["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{path}: damaged ({reason}); copy the export again") from None
    if not isinstance(number, int) or number < 1:
        raise CheckpointError(f"{path}: format: expected 1, found {number!r}")
    if number > _FORMAT:
        raise CheckpointError(
            f"{path}: written in format {number} by a newer vistok, and this one reads formats up "
            f"to {_FORMAT}; update vistok"
        )
    for name in ("model.safetensors", "config.json"):
        if name not in files:
            raise CheckpointError(f"{path}: has no checksum of {name}; copy the export again")
    for name, wanted in files.items():
        file = folder / str(name)
        if name == "README.md":
            continue
        if Path(str(name)).is_absolute() or ".." in Path(str(name)).parts:
            raise CheckpointError(f"{path}: {name} is not a file of the export")
        if not file.is_file():
            raise CheckpointError(f"{folder}: {name} is missing from the export; copy it again")
        if (found := _sha256(file)) != wanted:
            raise CheckpointError(
                f"{file}: altered: its checksum begins with {found[:12]}, and that in {CHECKSUMS} "
                f"with {str(wanted)[:12]}; copy the export again, or export the run anew"
            )


def tokenizer_hash(folder: Path) -> str:
    """Return the identity of an export's tokenizer: of what decides ids and pictures.

    It covers the weights and the entries of `config.json` that they are built by, so it is the same
    for any copy, wherever it is, and with another card.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    try:
        config = parse_json((folder / "config.json").read_bytes())
        decides = {key: config.get(key) for key in ("tokenizer", "quantizer", "data")}
        weights = _sha256(folder / "model.safetensors")
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name
        raise CheckpointError(f"{folder}: not an export; {name} is missing from it") from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: damaged export ({error})") from None
    text = json.dumps([decides, weights], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
