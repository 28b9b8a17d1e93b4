"""Shards on other machines: fetched whole into a local cache, checked, and read from there.

`http(s)://` is read with the standard library; every other address (`s3://`, `gs://`, `hf://`)
through fsspec and the package that it names for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import DataError
from vistok.core.files import cache_dir
from vistok.data.index import ShardIndex, scan
from vistok.data.manifest import entries

log = logging.getLogger(__name__)

_CHUNK = 1 << 20

_LONGEST_PAUSE = 60.0  # seconds between two tries, at most


class _Missing(Exception):
    """Nothing exists at this address."""


@dataclass(frozen=True)
class ShardCache:
    """A folder of fetched shards, shared by all processes of a machine.

    Args:
        folder: None for `shards` in vistok's cache folder.
        max_bytes: when more lies there, what was used longest ago is removed. Only shards being
            read may exceed it.
        retries: further tries after one that failed.
        timeout: seconds without a byte, after which a try has failed.
        pause: seconds before the first retry; each later one waits twice as long.
    """

    folder: Path = field(default_factory=lambda: cache_dir() / "shards")
    max_bytes: int = 100 * 10**9
    retries: int = 5
    timeout: float = 30.0
    pause: float = 1.0

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Keep other processes from a name; ends with the process that holds it."""
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f".{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def make_room(self, keep: Path) -> None:
        """Remove the shards used longest ago, until the rest is within bounds."""
        with self.locked("room"):
            found = []
            for path in self.folder.glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self.max_bytes:
                    break
                if path != keep:
                    # A process that has it open reads on; the space is freed when it closes.
                    path.unlink(missing_ok=True)
                    total -= size


@dataclass(frozen=True)
class RemoteShard:
    """One shard at an address."""

    url: str
    cache: ShardCache

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rpartition("/")[2]

    @cached_property
    def _local(self) -> Path:
        # The whole address, for train/0000.tar and val/0000.tar are not the same.
        # And what the manifest says of it, for a set may be written anew at the same address.
        name = f"{self.url} {self.in_manifest().get('sha256', '')}"
        digest = hashlib.sha256(name.encode()).hexdigest()[:20]
        return self.cache.folder / f"{digest}-{Path(self.name).stem[:60]}.tar"

    def open(self) -> int:
        """Return a file descriptor of the shard, which is fetched if it is not in the cache.

        Raises:
            DataError: if it cannot be had, or is not what its manifest or index says.
        """
        for _ in range(3):
            self.fetch()
            with contextlib.suppress(FileNotFoundError):  # another process made room just now
                return os.open(self._local, os.O_RDONLY)
        raise DataError(f"{self.url}: the cache is too small for it; raise data.cache_gb")

    def fetch(self) -> Path:
        """Fetch the shard if it is not in the cache, and return its path there."""
        with self._writing():
            path = self._local
            with self.cache.locked(path.name):
                index = self._kept_index()
                if path.exists() and (index is None or path.stat().st_size == index.tar_bytes):
                    os.utime(path)  # used now
                    return path
                self._download(path, index)
            self.cache.make_room(path)
        return path

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.url}: cannot be written to the cache {self.cache.folder}: {error.strerror};"
                " set data.cache_dir"
            ) from None

    def _download(self, path: Path, index: ShardIndex | None) -> None:
        log.info("fetching %s", self.url)
        expected = self.in_manifest()
        begun = path.with_suffix(".tar.part")

        def check() -> str | None:
            size = begun.stat().st_size
            wanted = expected.get("bytes", size if index is None else index.tar_bytes)
            if size != wanted:
                return f"has {size} bytes; its {'manifest' if expected else 'index'} says {wanted}"
            if "sha256" in expected:
                with open(begun, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                        return "does not match the checksum in its manifest"
            elif index is not None and not _belongs(index, begun):
                return "does not match its index"
            return None

        try:
            _fetch(self.url, begun, self.cache, check)
            begun.replace(path)
        finally:
            begun.unlink(missing_ok=True)

    def index(self) -> ShardIndex:
        """The shard's index: the one next to it, else made from the whole shard, once.

        Raises:
            DataError: as `open`; or if the shard is damaged.
        """
        with self._writing():
            expected = self.in_manifest().get("index_sha256")
            kept = self._local.with_suffix(".idx")
            with self.cache.locked(kept.name):
                index = ShardIndex.load(kept)
                if index is not None and expected == hashlib.sha256(kept.read_bytes()).hexdigest():
                    return index
                data = _read(self.url.removesuffix(".tar") + ".idx", self.cache)
                if data is not None:
                    part = kept.with_suffix(".idx.part")
                    part.write_bytes(data)
                    if (found := ShardIndex.load(part)) is not None:
                        part.replace(kept)
                        return found
                    part.unlink()  # another tool's
                if index is None:
                    log.info("%s has no index: fetching all of it to make one", self.url)
                    index = scan(self.fetch())
                    index.save(kept)
                return index

    def _kept_index(self) -> ShardIndex | None:
        return ShardIndex.load(self._local.with_suffix(".idx"))

    def in_manifest(self) -> dict[str, Any]:
        """Return what the manifest next to the shard says of it; empty if there is none."""
        manifest = read_manifest(self.url.rpartition("/")[0] + "/manifest.json", self.cache)
        return manifest.get(self.name, {})


def _belongs(index: ShardIndex, tar: Path) -> bool:
    """Return whether an index, if need be without a proof of its own, is that of a tar."""
    if index.proof:
        return index.belongs_to(tar)
    found = scan(tar)
    return all(
        np.array_equal(getattr(index, name), getattr(found, name))
        for name in ("keys", "offsets", "sizes", "labels")
    )


_manifests: dict[str, dict[str, dict[str, Any]]] = {}  # by address, once in each process

_reading_manifest = threading.Lock()


def read_manifest(url: str, cache: ShardCache) -> dict[str, dict[str, Any]]:
    """Name to what the manifest at an address says of a shard; empty if there is none."""
    with _reading_manifest:
        if url not in _manifests:
            data = _read(url, cache)
            try:
                _manifests[url] = {} if data is None else entries(data)
            except ValueError as error:
                log.warning("%s %s; shards are not checked against it", url, error)
                _manifests[url] = {}
        return _manifests[url]


def _read(url: str, cache: ShardCache) -> bytes | None:
    """Return a small file; None if there is none."""
    cache.folder.mkdir(parents=True, exist_ok=True)
    reader = f"{os.getpid()}-{threading.get_ident()}"
    part = cache.folder / f".{hashlib.sha256(url.encode()).hexdigest()[:20]}.{reader}.part"
    try:
        _fetch(url, part, cache)
        return part.read_bytes()
    except _Missing:
        return None
    finally:
        part.unlink(missing_ok=True)


def _fetch(url: str, part: Path, cache: ShardCache, check: Any = None) -> None:
    """Write what is at `url` to `part`, trying again where that may help.

    A try goes on at the byte that the last one reached.

    Raises:
        DataError: naming the address, what happened, and how often.
        _Missing: if there is nothing, and no `check` that says there should be.
    """
    part.unlink(missing_ok=True)
    reason = ""
    for attempt in range(cache.retries + 1):
        if attempt:
            pause = min(cache.pause * 2 ** (attempt - 1), _LONGEST_PAUSE)
            log.warning("%s: %s; trying again in %.3g s", url, reason, pause)
            time.sleep(pause)
        try:
            _transfer(url, part, cache.timeout)
        except _Missing:
            if check is None:
                raise
            raise DataError(f"{url}: there is no such shard (any more)") from None
        except DataError:
            raise
        except Exception as error:  # each file system has exceptions of its own
            reason = _what_happened(error, cache.timeout)
            if not _may_pass(error):
                if check is None:  # some stores answer so if a file is not there
                    raise _Missing from None
                raise DataError(f"{url}: {reason}") from None
            continue
        reason = check() if check is not None else None
        if reason is None:
            return
        part.unlink(missing_ok=True)  # all of it again
    tries = f"{cache.retries + 1} tries" if cache.retries else "1 try"
    raise DataError(f"{url}: {reason} (gave up after {tries}); resume when it can be reached")


def _transfer(url: str, part: Path, timeout: float) -> None:
    """Try once to append what is missing of `url` to `part`."""
    start = part.stat().st_size if part.exists() else 0
    chunks = _http if url.startswith(("http://", "https://")) else _fsspec
    with open(part, "ab") as file:
        for place, chunk in chunks(url, start, timeout):
            if place < file.tell():
                file.truncate(place)  # the server began anew
                file.seek(place)
            file.write(chunk)


def _http(url: str, start: int, timeout: float) -> Iterator[tuple[int, bytes]]:
    """Yield pieces of a file and their positions."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise _Missing from None
        if error.code == 416 and start:
            return  # nothing is left to be sent
        raise
    with response:
        place = start if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        end = None if length is None else place + int(length)
        while chunk := response.read1(_CHUNK):
            yield place, chunk
            place += len(chunk)
        if end is not None and place < end:
            raise ConnectionError(f"the connection was cut at byte {place} of {end}")


def _fsspec(url: str, start: int, timeout: float) -> Iterator[tuple[int, bytes]]:
    """Yield pieces of a file and their positions."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        needed = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
        package = f"fsspec {needed.get(scheme, '')}".strip()
        raise DataError(
            f"{url}: {scheme}:// needs a package that is missing ({error}); pip install {package}"
        ) from None
    except ValueError as error:
        raise DataError(f"{url}: {error}") from None
    try:
        size = int(system.size(path))
        while start < size:
            chunk = system.cat_file(path, start=start, end=min(start + 16 * _CHUNK, size))
            if not chunk:
                raise ConnectionError(f"no data at byte {start} of {size}")
            yield start, chunk
            start += len(chunk)
    except FileNotFoundError:
        raise _Missing from None


def _may_pass(error: Exception) -> bool:
    """Return whether another try may succeed: not if the server understood and refused."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 425, 429)
    return not isinstance(error, PermissionError)


def _what_happened(error: Exception, timeout: float) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} ({error.reason})"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _what_happened(error.reason, timeout)
    if isinstance(error, TimeoutError):
        return f"no data for {timeout:g} s"
    if isinstance(error, http.client.HTTPException):
        return f"invalid answer from the server ({type(error).__name__})"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
