"""Sources of `make-shards`: folders, lists of files, tables (Parquet, Hugging Face) and shards.

All become a `Source`. Rows of a table cannot be read singly, so a table is first unpacked to
shards of its own, in its own order and unchecked, in a hidden folder next to the shards to be.
"""

from __future__ import annotations

import glob
import hashlib
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from vistok.core.errors import ConfigError, DataError, nearest
from vistok.data.folders import FileSource, FolderSource
from vistok.data.formats import IMAGE_EXTENSIONS, image_extension
from vistok.data.index import ShardIndex, sidecar
from vistok.data.places import expand_shards
from vistok.data.shards import ShardFile
from vistok.data.sources import ShardSource, Source

SPOOL = ".unpacked"  # folder within `out`

_ROWS = 64  # of a table held in memory at once

_TABLES = (".parquet", ".arrow")

_USUAL = {
    "image": ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content"),
    "label": ("label", "labels", "cls", "class", "fine_label", "target"),
    "caption": ("caption", "text", "txt", "captions", "prompt"),
}

_LISTED = re.compile(rf"(.*\.(?:{'|'.join(sorted(IMAGE_EXTENSIONS))}))[ \t]+(\S.*)", re.IGNORECASE)


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None to find one by its usual names."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None


def open_input(
    place: str, columns: Columns | None = None, members: Sequence[str] | None = None
) -> Source | Tables:
    """Find out what a source is, and open it.

    Args:
        place: as the user wrote it.
        columns: of a table.
        members: extensions of further members to be read; None for all that shards have.

    Raises:
        DataError: if there is nothing of a known kind.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
            raise DataError(
                f"{place} contains {len(splits)} data sets; name one: {place}/{splits[0]}"
            )
        tables = sorted(p for p in path.rglob("*") if p.suffix in _TABLES and _visible(p, path))
        if tables:
            return Tables(place, _listed_in_state(path) or tables, columns or Columns())
        if any(path.glob("*.tar")):
            return ShardSource(expand_shards(f"{path}/*.tar", "source"), "source", members)
    elif path.suffix in _TABLES and (glob.has_magic(place) or path.is_file()):
        tables = [Path(p) for p in sorted(glob.glob(str(path)))]
        return Tables(place, tables, columns or Columns())
    elif "{" in place or glob.has_magic(place) or path.suffix == ".tar":
        return ShardSource(expand_shards(place, "source"), "source", members)
    elif path.is_file():
        return read_list(path)
    return FolderSource(place, "folder")


def _visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _listed_in_state(folder: Path) -> list[Path] | None:
    """Return the files of a data set that Hugging Face's library saved; None for any other."""
    state = folder / "state.json"
    if not state.is_file():
        return None
    content = json.loads(state.read_text())
    if content.get("_indices_files"):
        raise DataError(f"{folder} is a selection of rows; call flatten_indices() before saving it")
    return [folder / file["filename"] for file in content["_data_files"]]


def read_list(path: Path) -> FileSource:
    """Open a list: a path in each line, within the list's folder or absolute, and any label.

    The label comes after a tab, or after a space if the path ends as an image does. Labels that
    are all whole numbers are taken as they are; others are names, numbered in their order.

    Raises:
        DataError: if it is not text, names nothing, or only some lines have a label.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file with a path on each line") from None
    names, labels = [], []
    for line in filter(None, lines):
        name, tab, label = line.partition("\t")
        if not tab and (match := _LISTED.fullmatch(line)):
            name, label = match[1], match[2]
        names.append(os.path.expanduser(name.strip()))
        labels.append(label.strip())
    if not names:
        raise DataError(f"{path}: lists no images")
    if any(labels) and not all(labels):
        raise DataError(
            f"{path}: only some lines have a label; the first without one is "
            f"{names[labels.index('')]}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: lists {twice} more than once")
    classes: list[str] = []
    if not any(labels):
        numbers = [-1] * len(names)
    elif all(label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
    else:
        classes = sorted(set(labels))
        numbers = [classes.index(label) for label in labels]
    sizes = [_size(path.parent / name) for name in names]
    return FileSource(str(path), path.parent, names, sizes, numbers, classes)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will say why


@dataclass(frozen=True)
class Tables:
    """Parquet or Arrow files of one data set, to be unpacked.

    Attributes:
        name: what the user called them.
        paths: the files, in order.
        columns: as asked for.
    """

    name: str
    paths: list[Path]
    columns: Columns

    def unpack(self, out: Path, workers: int) -> ShardSource:
        """Write their rows as shards in `out / SPOOL`; those already there stay.

        Rows without an image become empty files, which do not decode and so are reported.

        Raises:
            DataError: if pyarrow is missing, a column is, or a file is broken.
        """
        try:
            import pyarrow  # noqa: F401
        except ModuleNotFoundError:
            raise DataError(
                f"{self.name}: reading tables needs pyarrow; pip install pyarrow"
            ) from None
        fields, classes = self._schema()
        spool = out / SPOOL
        spool.mkdir(exist_ok=True)
        jobs = [(path, spool / f"{number:05d}.tar") for number, path in enumerate(self.paths)]
        with ProcessPoolExecutor(min(workers, len(jobs)), initializer=end_with_parent) as pool:
            from rich.progress import track

            done = pool.map(partial(_unpack, fields=fields), jobs)
            made = list(track(done, "Unpacking tables", total=len(jobs), transient=True))
        source = ShardSource([tar for tar in made if tar is not None], "source", None)
        source.name, source.classes = self.name, classes
        return source

    def _schema(self) -> tuple[Columns, list[str]]:
        """Return the columns that exist, and the names of the classes."""
        schema = _read_schema(self.paths[0])
        found = {kind: self._column(schema, kind) for kind in _USUAL}
        if found["image"] is None:
            raise DataError(
                f"{self.name}: has no column of images; its columns are {', '.join(schema.names)};"
                " name one: image=COLUMN"
            )
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = info.get("info", {}).get("features", {}).get(found["label"] or "", {})
        return Columns(**found), list(feature.get("names", [])) if isinstance(feature, dict) else []

    def _column(self, schema: Any, kind: str) -> str | None:
        asked = getattr(self.columns, kind)
        if asked is not None:
            if asked not in schema.names:
                raise ConfigError(
                    f"{kind}={asked}: {self.name} has no such column{nearest(asked, schema.names)};"
                    f" its columns are {', '.join(schema.names)}"
                )
            return asked
        return next((name for name in _USUAL[kind] if name in schema.names), None)


def _read_schema(path: Path) -> Any:
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        with _readable(path):
            return parquet.read_schema(path)
    return _arrow(path).schema


class _readable:
    """Turns what pyarrow raises on a broken file into one line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow

        if isinstance(error, (pyarrow.ArrowException, OSError)):
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self.path}: cannot be read: {reason}") from None


def _arrow(path: Path) -> Any:
    """Open an Arrow file, which Hugging Face writes as a stream."""
    import pyarrow

    with _readable(path):
        memory = pyarrow.memory_map(str(path))
        try:
            return pyarrow.ipc.open_stream(memory)
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(memory)


def _batches(path: Path, columns: list[str]) -> Iterator[Any]:
    """Yield a few rows at a time."""
    with _readable(path):
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            with parquet.ParquetFile(path) as file:
                yield from file.iter_batches(_ROWS, columns=columns)
            return
        reader = _arrow(path)
        whole = (
            (reader.get_batch(i) for i in range(reader.num_record_batches))
            if hasattr(reader, "get_batch")
            else reader
        )
        for batch in whole:
            batch = batch.select(columns)
            yield from (batch.slice(i, _ROWS) for i in range(0, batch.num_rows, _ROWS))


def _unpack(job: tuple[Path, Path], fields: Columns) -> Path | None:
    """Write one table as one shard, unless it is there; None if it has no rows."""
    path, tar = job
    status = path.stat()
    what = [str(path.resolve()), status.st_size, status.st_mtime_ns, *vars(fields).values()]
    plan = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    index = ShardIndex.load(sidecar(tar))
    if index and index.plan == plan and tar.exists() and tar.stat().st_size == index.tar_bytes:
        return tar
    columns = [name for name in vars(fields).values() if name is not None]
    rows = _rows(path, columns, fields)
    first = next(rows, None)
    if first is None:
        return None
    with ShardFile(tar, plan) as shard:
        folder = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:70]
        for number, (image, name, label, caption) in enumerate(chain([first], rows)):
            key = f"{folder}/{number:09d}"
            extension = image_extension(image, name)
            extension = extension if extension in IMAGE_EXTENSIONS else "jpg"
            others = {} if caption is None else {"txt": caption.encode()}
            shard.add(key, image, extension, label, others=others)
    return tar


def _rows(
    path: Path, columns: list[str], fields: Columns
) -> Iterator[tuple[bytes, str, int | None, str | None]]:
    """Yield image bytes, file name, label and caption of each row."""
    for batch in _batches(path, columns):
        for row in batch.to_pylist():
            image, name = row[fields.image], ""
            if isinstance(image, dict):  # Hugging Face's: bytes, or the path of a file, or both
                name = image.get("path") or ""
                image = image.get("bytes")
                if image is None and name and Path(path.parent, name).is_file():
                    image = Path(path.parent, name).read_bytes()
            if not isinstance(image, bytes | None):
                raise DataError(
                    f"{path}: column {fields.image} holds {type(image).__name__}, not the bytes of"
                    " image files; name another: image=COLUMN"
                )
            label = row.get(fields.label) if fields.label else None
            if label is not None and not isinstance(label, int):
                raise DataError(
                    f"{path}: column {fields.label} holds {label!r}, not class numbers; name"
                    " another: label=COLUMN"
                )
            caption = row.get(fields.caption) if fields.caption else None
            caption = caption[0] if isinstance(caption, list) and caption else caption
            yield image or b"", name, label, None if caption is None else str(caption)


def end_with_parent() -> None:
    """Let a pool's worker end when the process that began it does, however that ended."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
