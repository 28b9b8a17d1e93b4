"""A file for each shard: Parquet, as Hugging Face datasets reads it, and WebDataset."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import ConfigError, DataError
from vistok.core.files import parse_json, replacing
from vistok.data.arrays import array_of
from vistok.data.token_shards import ShardArrays
from vistok.data.tokens import TokenSample, smallest_dtype
from vistok.export.formats.base import Alphabet, Layout, needed


def _code_dtype(alphabet: Alphabet) -> np.dtype:
    """Return the type of joint ids and special ones; classes are columns of their own."""
    return smallest_dtype(alphabet.first_class - 1)


def _utf8(name: str) -> str:
    """Return a name of a file system as text, with escapes for bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _files(folder: Path, ending: str) -> list[Path]:
    found = sorted(needed(folder, "nothing was written in this format").glob(f"*{ending}"))
    if not found:
        raise DataError(f"{folder}: has no file *{ending}")
    return found


class Parquet(Layout):
    """Rows of `key`, `view`, `label`, `caption`, `length` and `tokens`, a list of joint ids."""

    name = "parquet"
    per_shard = True

    def check(self, alphabet: Alphabet) -> None:
        """Raise if pyarrow is not installed."""
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ConfigError("format=parquet: needs pyarrow; pip install pyarrow") from None

    def file_of(self, folder: Path, shard: str) -> Path:
        """Return `SHARD.parquet`."""
        return folder / f"{shard}.parquet"

    def write_shard(self, path: Path, shard: ShardArrays, alphabet: Alphabet) -> None:
        """Write the rows of a shard."""
        import pyarrow as pa
        from pyarrow import parquet

        rows, slots = range(len(shard)), len(alphabet.sizes)
        kind = pa.from_numpy_dtype(_code_dtype(alphabet))
        joint = (np.asarray(shard.flat, dtype=np.int64) + alphabet.offsets).reshape(-1)
        ends = np.concatenate([[0], np.asarray(shard.ends)]) * slots
        values = pa.array(joint.astype(_code_dtype(alphabet)), type=kind)
        lengths = np.diff(ends) // slots
        table = pa.table(
            {
                "key": pa.array([_utf8(shard.key(row)) for row in rows], pa.string()),
                "view": pa.array(np.asarray(shard.views), pa.int32()),
                "label": pa.array(
                    [None if v < 0 else v for v in shard.labels.tolist()], pa.int64()
                ),
                "caption": pa.array([shard.caption(row) for row in rows], pa.string()),
                "length": pa.array(lengths, pa.int32()),
                "tokens": pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), values),
            }
        )
        with replacing(path) as file:
            parquet.write_table(table, file, compression="zstd", row_group_size=4096)

    def read(self, folder: Path, manifest: dict[str, Any]) -> Iterator[TokenSample]:
        """Yield the samples with all that they have."""
        import pyarrow as pa
        from pyarrow import parquet

        alphabet = Alphabet.of(manifest)
        for path in _files(folder, ".parquet"):
            try:
                with parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(1024):
                        for row in batch.to_pylist():
                            ids = np.array(row["tokens"], dtype=np.int64)
                            yield TokenSample(
                                alphabet.split(ids, f"{path}: {row['key']}"),
                                row["label"],
                                row["caption"],
                                row["key"],
                                row["view"],
                            )
            except (pa.ArrowException, KeyError, OSError) as error:
                reason = " ".join(str(error).split())[:120]
                raise DataError(f"{path}: not such a table ({reason})") from None


class WebDataset(Layout):
    """`SHARD.tar`: of each sample `.tokens.npy`, `.json`, and `.cls` and `.txt` if it has them."""

    name = "webdataset"
    per_shard = True

    def file_of(self, folder: Path, shard: str) -> Path:
        """Return `SHARD.tar`."""
        return folder / f"{shard}.tar"

    def write_shard(self, path: Path, shard: ShardArrays, alphabet: Alphabet) -> None:
        """Write the samples of a shard."""
        kind = _code_dtype(alphabet)
        with (
            replacing(path) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for row in range(len(shard)):
                array = io.BytesIO()
                np.save(array, alphabet.join(shard.tokens(row)).astype(kind))
                label, caption = int(shard.labels[row]), shard.caption(row)
                about = {"key": shard.key(row), "view": int(shard.views[row])}
                about |= {"length": shard.length(row)}
                members = {"tokens.npy": array.getvalue(), "json": json.dumps(about).encode()}
                if label >= 0:
                    members["cls"] = str(label).encode()
                if caption is not None:
                    members["txt"] = caption.encode("utf-8", "surrogateescape")
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{row:09d}.{extension}")
                    member.size, member.mode = len(data), 0o644
                    tar.addfile(member, io.BytesIO(data))

    def read(self, folder: Path, manifest: dict[str, Any]) -> Iterator[TokenSample]:
        """Yield the samples with all that they have."""
        alphabet = Alphabet.of(manifest)
        for path in _files(folder, ".tar"):
            try:
                with tarfile.open(path, "r:") as tar:
                    members: dict[str, bytes] = {}
                    row = ""
                    for member in tar:
                        name, _, extension = member.name.partition(".")
                        if name != row and members:
                            yield self._sample(members, alphabet, f"{path}: {row}")
                            members = {}
                        file = tar.extractfile(member)
                        row, members[extension] = name, file.read() if file else b""
                    if members:
                        yield self._sample(members, alphabet, f"{path}: {row}")
            except (tarfile.TarError, OSError, EOFError) as error:
                raise DataError(f"{path}: damaged ({error})") from None

    @staticmethod
    def _sample(members: dict[str, bytes], alphabet: Alphabet, where: str) -> TokenSample:
        try:
            joint = array_of(members["tokens.npy"])
            about = parse_json(members["json"])
            label = int(members["cls"]) if "cls" in members else None
            key, view = str(about["key"]), int(about["view"])
        except (KeyError, ValueError, TypeError, EOFError, OSError) as error:
            raise DataError(f"{where}: not a sample of tokens ({error!r:.100})") from None
        if joint.ndim != 1 or not np.issubdtype(joint.dtype, np.integer):
            raise DataError(f"{where}: expected one row of ids, found {joint.dtype} {joint.shape}")
        caption = members["txt"].decode("utf-8", "surrogateescape") if "txt" in members else None
        return TokenSample(alphabet.split(joint, where), label, caption, key, view)
