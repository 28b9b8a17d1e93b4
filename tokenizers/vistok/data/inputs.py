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
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from vistok.core.errors import ConfigError, DataError, VistokError, nearest
from vistok.core.files import parse_json
from vistok.core.terminal import counted
from vistok.data.folders import FileSource, FolderSource, images_under, read_file
from vistok.data.formats import HEAD, IMAGE_EXTENSIONS, image_extension, sniffed
from vistok.data.index import ShardIndex, sidecar
from vistok.data.names import shown
from vistok.data.places import expand_shards
from vistok.data.shards import ShardFile
from vistok.data.sources import ShardSource, Source
from vistok.data.table_labels import Labels, class_names, look

SPOOL = ".unpacked"  # folder within `out`

NONE = "null"  # in place of a column: there is none

_ROWS = 64  # of a table held in memory at once

_LABELS = 4096  # likewise, of its labels alone

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
    path = Path(os.path.expanduser(place))
    if path.is_dir():
        return _open_folder(place, path, columns, members)
    is_pattern = not path.exists() and ("{" in place or glob.has_magic(place))
    if path.suffix in _TABLES and (is_pattern or path.is_file()):
        tables = [Path(p) for p in sorted(glob.glob(str(path)))] if is_pattern else [path]
        return Tables(place, tables, columns or Columns())
    if path.suffix == ".tar" or "://" in place:
        return ShardSource(expand_shards(place, "source"), "source", members)
    if is_pattern:
        return _open_pattern(place, members)
    if path.is_file():
        return read_list(path)
    return FolderSource(place, "folder")


def _open_folder(
    place: str, path: Path, columns: Columns | None, members: Sequence[str] | None
) -> Source | Tables:
    if (path / "dataset_dict.json").is_file():
        content = _json(path / "dataset_dict.json")
        splits = content.get("splits")
        if not isinstance(splits, list) or not splits:
            raise DataError(f"{shown(path)}/dataset_dict.json: names no splits")
        raise DataError(
            f"{place} contains {len(splits)} data sets; name one: {place}/{shown(str(splits[0]))}"
        )
    tables = sorted(p for p in path.rglob("*") if p.suffix in _TABLES and _visible(p, path))
    if tables:
        return Tables(place, _listed_in_state(path) or tables, columns or Columns())
    tars = sorted(path.glob("*.tar"))
    if not tars:
        return FolderSource(place, "folder")
    source = ShardSource(tars, "source", members)
    single, left_out = images_under(path)
    source.left_out += [(shown(name), "is not in a tar, as the others are") for name, _ in single]
    source.left_out += left_out
    return source


def _open_pattern(place: str, members: Sequence[str] | None) -> Source:
    """Open what a pattern matches: shards, or single image files."""
    matches = sorted(glob.glob(os.path.expanduser(place)))
    if not matches or any(match.endswith(".tar") for match in matches):
        return ShardSource(expand_shards(place, "source"), "source", members)
    files = [match for match in matches if os.path.isfile(match)]
    if not files:
        raise DataError(f"{place}: matches only folders; name one of them, such as {matches[0]}")
    sizes = [_size(Path(match)) for match in files]
    return FileSource(place, Path(), files, sizes, [-1] * len(files), [])


def _json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError:
        content = None
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise DataError(f"{shown(path)}: damaged, or not what Hugging Face's library writes")
    return content


def _visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _listed_in_state(folder: Path) -> list[Path] | None:
    """Return the files of a data set that Hugging Face's library saved; None for any other."""
    state = folder / "state.json"
    if not state.is_file():
        return None
    content = _json(state)
    if content.get("_indices_files"):
        raise DataError(f"{folder} is a selection of rows; call flatten_indices() before saving it")
    files = content.get("_data_files")
    listed = files if isinstance(files, list) else []
    names = [str(f.get("filename")) if isinstance(f, dict) else "" for f in listed]
    if not names or not all(name and Path(name).name == name for name in names):
        raise DataError(f"{shown(state)}: names no files of this folder")
    return [folder / name for name in names]


def read_list(path: Path) -> FileSource:
    """Open a list: a path in each line, within the list's folder or absolute, and any label.

    The label comes after a tab, or after a space if the path ends as an image does. Labels that
    are all whole numbers are taken as they are; others are names, numbered in their order.

    Raises:
        DataError: if it is not text, names nothing, or only some lines have a label.
    """
    try:
        data = read_file(path, FileSource.most_bytes)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    if b"\0" in data or sniffed(data[:HEAD]):
        raise DataError(f"{shown(path)}: not a text file with a path on each line")
    # Names may be of any bytes; a line ends where it does for programs that write lists.
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
    names, labels = [], []
    for line in filter(None, lines):
        name, tab, label = line.partition("\t")
        if not tab and (match := _LISTED.fullmatch(line)):
            name, label = match[1], match[2]
        names.append(os.path.expanduser(name.strip()))
        labels.append(label.strip())
    if not names:
        raise DataError(f"{shown(path)}: lists no images")
    if any(labels) and not all(labels):
        raise DataError(
            f"{shown(path)}: only some lines have a label; the first without one is "
            f"{shown(names[labels.index('')])}"
        )
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise DataError(f"{shown(path)}: lists {shown(twice)} more than once")
    classes: list[str] = []
    if not any(labels):
        numbers = [-1] * len(names)
    elif all(label.isdecimal() and label.isascii() and len(label) < 19 for label in labels):
        numbers = [int(label) for label in labels]
    else:
        classes = sorted(set(labels))
        by_name = {name: number for number, name in enumerate(classes)}
        numbers = [by_name[label] for label in labels]
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
        spool = out / SPOOL
        spool.mkdir(exist_ok=True)
        jobs = [(path, spool / f"{number:05d}.tar") for number, path in enumerate(self.paths)]
        try:
            # All of it in other processes: a table that is damaged can end them.
            with ProcessPoolExecutor(min(workers, len(jobs)), initializer=end_with_parent) as pool:
                from rich.progress import track

                fields, labels, classes = pool.submit(self._schema).result()
                done = pool.map(partial(_unpack, fields=fields, labels=labels), jobs)
                made = list(track(done, "Unpacking tables", total=len(jobs), transient=True))
        except BrokenProcessPool:
            raise DataError(
                f"{self.name}: reading it ended a process: a table is damaged, or there is too"
                " little memory"
            ) from None
        tars = [tar for tar in made if tar is not None]
        if not tars:
            raise DataError(f"{self.name}: has no rows")
        source = ShardSource(tars, "source", None)
        source.name, source.classes = shown(self.name), classes
        from vistok.core.console import say

        if labels.kind == "texts":
            from vistok.core.console import say

            say(f"labels: {counted(len(classes), 'text')}, numbered in the order of manifest.json")
        if labels.kind == "others":
            from vistok.core.console import say

            say(f"labels: {fields.label} is neither numbers nor texts; kept as members label.json")
        return source

    def _schema(self) -> tuple[Columns, Labels, list[str]]:
        """Return the columns that exist, what the labels are, and the names of the classes."""
        schema = _read_schema(self.paths[0])
        found = {kind: self._column(schema, kind) for kind in _USUAL}
        if found["image"] is None:
            raise DataError(
                f"{self.name}: has no column of images; its columns are"
                f" {shown(', '.join(schema.names))}; name one: image=COLUMN"
            )
        column, labels = found["label"], Labels()
        if column is not None:
            values = (
                batch.column(0).to_pylist()
                for path in self.paths
                for batch in _batches(path, [column], _LABELS)
            )
            labels = look(values, self.name, column)
        classes = labels.classes or class_names(schema, column or "")
        return Columns(**found), labels, classes

    def _column(self, schema: Any, kind: str) -> str | None:
        asked = getattr(self.columns, kind)
        if asked == NONE:
            return None
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
        if isinstance(error, Exception) and not isinstance(error, VistokError):
            reason = shown(" ".join(str(error).split())[:200]) or type(error).__name__
            raise DataError(f"{shown(self.path)}: cannot be read: {reason}") from None


def _arrow(path: Path) -> Any:
    """Open an Arrow file, which Hugging Face writes as a stream."""
    import pyarrow

    with _readable(path):
        memory = pyarrow.memory_map(str(path))
        try:
            return pyarrow.ipc.open_stream(memory)
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(memory)


def _batches(path: Path, columns: list[str], rows: int = _ROWS) -> Iterator[Any]:
    """Yield a few rows at a time."""
    with _readable(path):
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            with parquet.ParquetFile(path) as file:
                yield from file.iter_batches(rows, columns=columns)
            return
        reader = _arrow(path)
        whole = (
            (reader.get_batch(i) for i in range(reader.num_record_batches))
            if hasattr(reader, "get_batch")
            else reader
        )
        for batch in whole:
            batch = batch.select(columns)
            yield from (batch.slice(i, rows) for i in range(0, batch.num_rows, rows))


def _unpack(job: tuple[Path, Path], fields: Columns, labels: Labels) -> Path | None:
    """Write one table as one shard, unless it is there; None if it has no rows."""
    path, tar = job
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    what = [str(path.resolve()), status.st_size, status.st_mtime_ns, *vars(fields).values()]
    what += [labels.kind, labels.classes]
    plan = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    index = ShardIndex.load(sidecar(tar))
    if index and index.plan == plan and tar.exists() and tar.stat().st_size == index.tar_bytes:
        return tar
    columns = [name for name in vars(fields).values() if name is not None]
    rows = _rows(path, columns, fields, labels)
    first = next(rows, None)
    if first is None:
        return None
    with ShardFile(tar, plan) as shard:
        folder = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:70]
        for number, (image, name, label, others) in enumerate(chain([first], rows)):
            key = f"{folder}/{number:09d}"
            extension = image_extension(image, name)
            extension = extension if extension in IMAGE_EXTENSIONS else "jpg"
            original = os.fsencode(name) if name else key.encode()
            shard.add(key, image, extension, label, others=others, name=original)
    return tar


def _rows(
    path: Path, columns: list[str], fields: Columns, labels: Labels
) -> Iterator[tuple[bytes, str, int | None, dict[str, bytes]]]:
    """Yield image bytes, file name, label and further members of each row."""
    for batch in _batches(path, columns):
        with _readable(path):
            found = batch.to_pylist()
        for row in found:
            image, name = row[fields.image], ""
            if isinstance(image, dict):  # Hugging Face's: bytes, or the path of a file, or both
                name, image = image.get("path"), image.get("bytes")
                name = name if isinstance(name, str) else ""
                if image is None and name:
                    image = _file_next_to(path, name)
            if not isinstance(image, bytes | None):
                raise DataError(
                    f"{path}: column {fields.image} holds {type(image).__name__}, not the bytes of"
                    " image files; name another: image=COLUMN"
                )
            label, kept = labels.read(row.get(fields.label) if fields.label else None)
            others = {} if kept is None else {"label.json": kept}
            caption = row.get(fields.caption) if fields.caption else None
            caption = caption[0] if isinstance(caption, list) and caption else caption
            if caption is not None:
                others["txt"] = str(caption).encode("utf-8", "replace")
            yield image or b"", name, label, others


def _file_next_to(table: Path, name: str) -> bytes | None:
    """Return the bytes of a file that a table names, if it lies in the table's folder."""
    folder = table.parent.resolve()
    try:
        file = (folder / name).resolve()
        return read_file(file, FileSource.most_bytes) if file.is_relative_to(folder) else None
    except (OSError, ValueError):
        return None


def end_with_parent() -> None:
    """Let a pool's worker end when the process that began it does, however that ended."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
