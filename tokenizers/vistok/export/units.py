"""The units of bulk work: a tar, or so many images of a folder; which worker does which, and when.

Nothing depends on who does a unit, so all that claims and shares are for is that no two do the
same one: a unit done twice is written twice, with the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vistok.core.errors import ConfigError, DataError
from vistok.data.held_out import fingerprint
from vistok.data.remote import RemoteShard
from vistok.data.sources import ShardSource, Source


class Units:
    """Parts of a set of images, numbered.

    A tar is opened when its unit is done, so memory does not grow with their number.

    Args:
        tars: a unit each; or
        source: images that are no tars, cut into units of `per_unit`.
        per_unit: images.
        members: extensions of further members that will be read.
    """

    def __init__(
        self,
        tars: Sequence[Path | RemoteShard] = (),
        source: Source | None = None,
        per_unit: int = 10_000,
        members: Sequence[str] = (),
    ) -> None:
        self.tars, self.source = list(tars), source
        self.per_unit, self.members = per_unit, list(members)

    def __len__(self) -> int:
        if self.source is None:
            return len(self.tars)
        return -(-len(self.source) // self.per_unit)

    @property
    def name(self) -> str:
        """Return what the user called the images."""
        return self.source.name if self.source is not None else str(self.tars[0])

    def open(self, number: int) -> tuple[Source, range]:
        """Return where the images of a unit are, and their numbers there."""
        if self.source is not None:
            begin = number * self.per_unit
            return self.source, range(begin, min(begin + self.per_unit, len(self.source)))
        opened = ShardSource([self.tars[number]], "data.train", self.members)
        return opened, range(len(opened))

    def digest(self) -> str:
        """Return the identity of the images, wherever they are.

        Of tars it is that of their names and sizes; nothing in them is read.
        """
        if self.source is not None:
            return f"{fingerprint(self.source)}-{self.per_unit}"
        summed = hashlib.sha256()
        for tar in self.tars:
            try:
                size = tar.stat().st_size if isinstance(tar, Path) else 0
            except OSError as error:
                raise DataError(f"{tar}: no such shard ({error.strerror})") from None
            summed.update(f"{tar.name}\0{size}\n".encode("utf-8", "surrogateescape"))
        return summed.hexdigest()


def share_of(worker: str | None) -> tuple[int, int]:
    """Return which of how many workers this process is, by `worker=k/n` or its launcher.

    torchrun says so in RANK and WORLD_SIZE, a SLURM array in SLURM_ARRAY_TASK_ID, and srun in
    SLURM_PROCID; of an array of jobs that srun starts, each task of each job is a worker.

    Raises:
        ConfigError: if `worker` is not such a share.
    """
    if worker is not None:
        number, slash, count = str(worker).partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ConfigError(f"worker={worker}: must be k/n, with k from 0 to n - 1, such as 0/8")
        return int(number), int(count)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    number, count = _of_array()
    if "SLURM_PROCID" in os.environ:
        tasks = int(os.environ.get("SLURM_NTASKS", "1"))
        number, count = number * tasks + int(os.environ["SLURM_PROCID"]), count * tasks
    return number, count


def _of_array() -> tuple[int, int]:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
    if not all(name in os.environ for name in names):
        return 0, 1
    least = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    most = int(os.environ.get("SLURM_ARRAY_TASK_MAX", "0"))
    count = int(os.environ[names[1]])
    step = max(1, (most - least) // max(1, count - 1))
    return (int(os.environ[names[0]]) - least) // step, count


def order_of(units: int, number: int, count: int) -> Iterator[int]:
    """Yield all units: a worker's own ones, then those of the workers after it.

    So whoever is done helps the others, and a worker that died is missed by nobody.
    """
    for shift in range(count):
        yield from range((number + shift) % count, units, count)


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Claim a piece of work; the block is told whether it has it.

    The claim is a lock of the system's on a file, so it ends with its process, however that ends.
    Where a network's file system does not share locks, two machines may claim the same: the work is
    then done twice, and nothing else happens.

    Args:
        folder: of the claims.
        name: of the work.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.claim"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
