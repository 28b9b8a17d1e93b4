"""A text tokenizer of Hugging Face with a tokenizer's codes behind it: `vistok vocabulary`.

Ids are `text | reserved | codes`: those of text stay as they were, then come structure tokens, of
which some are kept free, then the codes of all streams. All is written as JSON, in the order of
the text tokenizer's own file, so equal input gives equal bytes on every machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vistok.checkpoints.exports import check_export, tokenizer_hash
from vistok.checkpoints.hub import find_export
from vistok.core.console import say
from vistok.core.errors import ConfigError, DataError, as_written
from vistok.core.files import parse_json, replacing
from vistok.core.values import is_whole

#: Structure tokens, in the order of their ids.
STRUCTURE = ("img_start", "img_end", "img_token_start", "img_end_of_row", "image")

#: The file that says which id is what.
MAP = "image_vocabulary.json"

_FORMAT = 1

#: Files of a text tokenizer that are taken along as they are.
_COPIED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def merge(config: dict[str, Any]) -> Path:
    """Write a merged tokenizer.

    Args:
        config: resolved `configs/vocabulary.yaml`.

    Returns:
        The folder, which `AutoTokenizer.from_pretrained` opens.

    Raises:
        ConfigError: for a value that cannot be.
        DataError: if the text tokenizer cannot be read, or already has such tokens.
    """
    reserved, text = config["reserved"], Path(str(config["text"])).expanduser()
    if not is_whole(reserved) or reserved < len(STRUCTURE):
        raise ConfigError(
            f"reserved={as_written(reserved)}: must be a whole number of at least {len(STRUCTURE)}"
        )
    model, out = find_export(config["model"]), Path(str(config["out"])).expanduser()
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ConfigError(f"out={out}: already exists; choose another folder")
    check_export(model)
    words = _read(model / "vocabulary.json")
    content = _read(text / "tokenizer.json")
    first = _text_size(content, text / "tokenizer.json")
    names = [f"<|{name}|>" for name in STRUCTURE]
    names += [f"<|img_reserved_{number:03d}|>" for number in range(len(STRUCTURE), reserved)]
    names += [code_name(number) for number in range(words["num_codes"])]
    known = {token["content"] for token in content["added_tokens"]}
    if taken := sorted(known.intersection(names)):
        raise DataError(f"{text}: has a token {taken[0]} already; choose a tokenizer of text alone")
    content["added_tokens"] += [_token(first + number, name) for number, name in enumerate(names)]
    out.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        if (text / name).is_file():
            shutil.copyfile(text / name, out / name)
    codes = first + reserved
    described = {
        "format": _FORMAT,
        "tokenizer_hash": tokenizer_hash(model),
        "text": {"first": 0, "size": first},
        "structure": {name: first + number for number, name in enumerate(STRUCTURE)},
        "reserved": {"first": first + len(STRUCTURE), "size": reserved - len(STRUCTURE)},
        "streams": [s | {"offset": codes + s["offset"]} for s in words["streams"]],
        "codes": {"first": codes, "size": words["num_codes"]},
        "vocabulary_size": codes + words["num_codes"],
        "num_tokens": words["num_tokens"],
        "grid": words["grid"],
    }
    _write(out / MAP, described)
    _write(out / "tokenizer.json", content)
    say(f"{out}: {first} of text, {reserved} of structure, {words['num_codes']} codes")
    return out


def code_name(number: int) -> str:
    """Return the token of a code, by its number in the joint vocabulary."""
    return f"<|img_code_{number:06d}|>"


def _token(number: int, name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, **flags, "special": True}


def _read(path: Path) -> Any:
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content


def _write(path: Path, content: Any) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def _text_size(content: dict[str, Any], path: Path) -> int:
    """Return the number of ids of a `tokenizer.json`, which must be 0 to n - 1."""
    try:
        vocab = content["model"]["vocab"]
        ids = set(range(len(vocab))) if isinstance(vocab, list) else set(vocab.values())
        content.setdefault("added_tokens", [])
        content["added_tokens"] = content["added_tokens"] or []
        ids |= {token["id"] for token in content["added_tokens"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a tokenizer of Hugging Face ({error!r:.80})") from None
    if not ids or ids != set(range(len(ids))):
        raise DataError(
            f"{path}: its ids must be 0 to {max(len(ids) - 1, 0)} without gaps; tokens that are "
            "added would not get the ids that their file says"
        )
    return len(ids)


@dataclass(frozen=True)
class MergedVocabulary:
    """Which id of a merged tokenizer is what.

    Attributes:
        structure: id of each structure token.
        offsets: first id of each stream.
        sizes: codes of each stream.
        grid: rows and columns of the tokens, or None for a sequence.
        tokenizer_hash: of the export whose codes they are.
    """

    structure: dict[str, int]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    grid: tuple[int, int] | None
    tokenizer_hash: str

    @classmethod
    def load(cls, folder: str | Path) -> MergedVocabulary:
        """Read the map of a merged tokenizer.

        Raises:
            DataError: if it is missing or damaged.
        """
        path = Path(folder).expanduser() / MAP
        found = _read(path)
        try:
            if found["format"] > _FORMAT:
                raise DataError(f"{path}: written by a newer vistok; update vistok")
            grid = found["grid"]
            return cls(
                {name: int(found["structure"][name]) for name in STRUCTURE},
                tuple(int(stream["offset"]) for stream in found["streams"]),
                tuple(int(stream["size"]) for stream in found["streams"]),
                (int(grid[0]), int(grid[1])) if grid is not None and len(grid) == 2 else None,
                str(found["tokenizer_hash"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{path}: damaged ({error!r:.80})") from None

    def text(self, ids: Any) -> str:
        """Return an image as text, which the merged tokenizer turns into its ids.

        `<|img_start|>32*32<|img_token_start|>` and the codes, each row of a grid ended by
        `<|img_end_of_row|>`, then `<|img_end|>`; tokens without rows have their number as size.

        Args:
            ids: `(N, Q)` integers, each stream counting from 0.
        """
        array = self._checked(ids)
        rows = self._rows(len(array))
        size = "*".join(map(str, self.grid)) if rows > 1 and self.grid else str(len(array))
        first = self.offsets[0]
        names = [[code_name(number - first) for number in token] for token in array.tolist()]
        width = len(names) // rows
        parts = [f"<|img_start|>{size}<|img_token_start|>"]
        for row in range(rows):
            parts += [name for token in names[row * width : (row + 1) * width] for name in token]
            if rows > 1:
                parts.append("<|img_end_of_row|>")
        return "".join([*parts, "<|img_end|>"])

    def images(self, sequence: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the ids `(N, Q)` of every image in a sequence of merged ids, such as a sample.

        Raises:
            DataError: if an image is not whole, or something else is in it.
        """
        found: list[np.ndarray] = []
        inside: list[int] | None = None
        for place, number in enumerate(np.asarray(sequence).reshape(-1).tolist()):
            if number == self.structure["img_token_start"]:
                if inside is not None:
                    raise DataError(f"id {place}: an image begins inside another one")
                inside = []
            elif inside is None or number == self.structure["img_end_of_row"]:
                continue
            elif number == self.structure["img_end"]:
                found.append(self._split(inside, place))
                inside = None
            else:
                inside.append(number)
        if inside is not None:
            raise DataError("the last image does not end")
        return found

    def _split(self, numbers: list[int], place: int) -> np.ndarray:
        if len(numbers) % len(self.sizes):
            raise DataError(f"id {place}: an image ends inside a token of {len(self.sizes)} ids")
        ids = np.array(numbers, dtype=np.int64).reshape(-1, len(self.sizes)) - self.offsets
        if (wrong := (ids < 0) | (ids >= self.sizes)).any():
            row, stream = np.argwhere(wrong)[0]
            raise DataError(
                f"id {place}: {ids[row, stream] + self.offsets[stream]} in an image is not a code "
                f"of stream {stream}"
            )
        return ids

    def _checked(self, ids: Any) -> np.ndarray:
        array = np.asarray(ids)
        if array.ndim != 2 or array.shape[1] != len(self.sizes) or array.dtype.kind not in "iu":
            raise DataError(
                f"ids: expected (N, {len(self.sizes)}) integers, found {array.dtype} {array.shape}"
            )
        array = array.astype(np.int64)
        if len(array) and ((array < 0) | (array >= self.sizes)).any():
            raise DataError(f"ids: must be below {', '.join(map(str, self.sizes))}")
        return array + self.offsets

    def _rows(self, length: int) -> int:
        rows, columns = self.grid or (1, length)
        return rows if rows * columns == length else 1
