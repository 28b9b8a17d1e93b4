"""Write images of any source as checked WebDataset shards: `vistok make-shards`.

Which image goes into which shard is settled before anything is written, so shards are made in
parallel, and a run that was killed is continued by the same command: shards that are whole and
made from the same plan stay.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import DataError, VistokError
from vistok.core.terminal import counted, typed
from vistok.data.decode import DecodeError, decode
from vistok.data.deep import Range
from vistok.data.formats import image_extension
from vistok.data.held_out import hold_out
from vistok.data.index import ShardIndex, sidecar
from vistok.data.inputs import NONE, SPOOL, Columns, Tables, end_with_parent, open_input
from vistok.data.names import shown
from vistok.data.shards import (
    ShardFile,
    ShardInfo,
    member_bytes,
    tar_bytes,
    write_manifest,
    write_names,
)
from vistok.data.sources import Source
from vistok.tools.words import (
    VALUE_RANGE,
    Option,
    Tool,
    flag,
    fraction,
    names,
    processes,
    size,
    whole,
)


@dataclass(frozen=True)
class Options:
    """The command line, read."""

    source: str
    out: str
    columns: Columns
    shard_size: int
    shuffle: bool
    seed: int
    val_fraction: float
    members: tuple[str, ...] | None
    workers: int
    value_range: Range | None


@dataclass(frozen=True)
class Job:
    """One shard to be: its path, its images, and a digest of all that decides its bytes."""

    tar: Path
    images: list[tuple[str, int]]  # key, number in the source
    plan: str


@dataclass(frozen=True)
class Made:
    """The result of a job: a shard, or None if no image in it decodes."""

    shard: ShardInfo | None
    bad: list[tuple[str, str]]  # name in the source, reason


def make_shards(options: Options) -> tuple[dict[str, list[Made]], list[tuple[str, str]]]:
    """Write the shards and the manifest; return the results of each split, and what is left out.

    Raises:
        DataError: if there are no images, none decodes, `out` holds something else, or another
            process is writing there.
        ConfigError: if an option does not fit the source.
    """
    out = Path(options.out)
    source = open_input(options.source, options.columns, options.members)
    try:
        return _make_shards(out, source, options)
    except BrokenProcessPool:
        raise DataError(
            f"out={shown(out)}: a process ended (killed from outside, or too little memory: fewer"
            " workers= need less); the same command continues"
        ) from None
    except OSError as error:
        raise DataError(
            f"out={shown(out)}: {error.strerror}"
            + (f": {shown(str(error.filename))}" if error.filename else "")
            + "; the same command continues"
        ) from None


def _make_shards(
    out: Path, source: Source | Tables, options: Options
) -> tuple[dict[str, list[Made]], list[tuple[str, str]]]:
    with _alone_in(out):
        if isinstance(source, Tables):
            source = source.unpack(out, options.workers)
        members = tuple(source.others) if options.members is None else options.members
        jobs = _plan(source, members, options)
        _check_out(out, jobs)
        workers = max(1, min(options.workers, len(jobs)))
        with ProcessPoolExecutor(
            workers, initializer=_start_worker, initargs=(source, members, options.value_range)
        ) as pool:
            from rich.progress import track

            results = pool.map(_make, jobs)
            made = list(track(results, "Writing shards", total=len(jobs), transient=True))
        splits: dict[str, list[Made]] = {}
        for job, result in zip(jobs, made, strict=True):
            splits.setdefault(job.tar.name.partition("-")[0], []).append(result)
        if not any(result.shard for result in made):
            name, reason = made[0].bad[0]
            raise DataError(
                f"{options.source}: found {counted(len(source), 'image')}, but none that decodes; "
                f"{name}: {reason}"
            )
        bad = [item for result in made for item in result.bad] + source.left_out
        write_names(out, [result.shard.name for result in made if result.shard])
        write_manifest(
            out,
            {name: [r.shard for r in results if r.shard] for name, results in splits.items()},
            classes=[shown(name) for name in source.classes],
            arguments={
                key: getattr(options, key)
                for key in ("shard_size", "shuffle", "seed", "val_fraction")
            },
            left_out=sorted(
                name for each in splits.values() for made in each for name, _ in made.bad
            ),
        )
    return splits, bad


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Make `out`, and keep other runs of this command from it.

    The lock is the system's, so it ends with its holder however that ends. Workers inherit it: a
    run that continues after a kill waits the moment until those left over are gone too.
    """
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    lock = out / ".lock"
    patience = time.monotonic() + 5
    while True:
        file = open(lock, "w")  # noqa: SIM115 (closed below)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and lock.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break  # else its last holder has just removed it
        except OSError:
            if time.monotonic() > patience:
                raise DataError(f"out={out}: another make-shards is writing to it") from None
            time.sleep(0.05)
        file.close()
    try:
        for stale in [*out.glob(".*.tmp"), *(out / SPOOL).glob(".*.tmp")]:
            stale.unlink(missing_ok=True)  # of a run that was killed
        yield
    except VistokError:
        shutil.rmtree(out / SPOOL, ignore_errors=True)
        raise
    else:
        shutil.rmtree(out / SPOOL, ignore_errors=True)
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _plan(source: Source, members: Sequence[str], options: Options) -> list[Job]:
    """Deal all images out to shards."""
    numbers = np.arange(len(source))
    if options.shuffle:
        # Folder order is class order, and no shuffling window repairs that later.
        raw = np.random.Philox(key=[options.seed, 0]).random_raw(len(source))
        numbers = np.argsort(raw, kind="stable")
    held_out = np.zeros(len(source), dtype=bool)
    if options.val_fraction:
        held_out = hold_out(source, options.val_fraction, "val_fraction")
    jobs: list[Job] = []
    for split, chosen in (("train", ~held_out), ("val", held_out)):
        images: list[list[tuple[str, int]]] = []
        filled = 0
        for position, number in enumerate(numbers[chosen[numbers]].tolist()):
            grown = member_bytes(int(source.sizes[number]))
            grown += 0 if source.label(number) is None else member_bytes(1)
            sizes = (source.other_size(number, extension) for extension in members)
            grown += sum(member_bytes(size) for size in sizes if size is not None)
            if position == 0 or tar_bytes(filled + grown) > options.shard_size:
                images.append([])
                filled = 0
            filled += grown
            images[-1].append((f"{position:09d}", number))
        for shard, dealt in enumerate(images):
            tar = Path(options.out) / f"{split}-{shard:06d}.tar"
            jobs.append(Job(tar, dealt, _digest(source, members, dealt)))
    return jobs


def _digest(source: Source, members: Sequence[str], images: list[tuple[str, int]]) -> str:
    """Return a digest of all that decides the bytes of a shard and is known before reading."""
    what = [
        (key, os.fsdecode(bytes(source.keys[i])), int(source.sizes[i]), source.label(i))
        for key, i in images
    ]
    return hashlib.sha256(json.dumps([what, list(members)]).encode()).hexdigest()


def _check_out(out: Path, jobs: Sequence[Job]) -> None:
    """Raise if `out` has shards that this command would not write itself."""
    plans = {job.tar: job.plan for job in jobs}
    for tar in sorted(out.glob("*.tar")):
        index = ShardIndex.load(sidecar(tar))
        if tar not in plans or index is None or index.plan != plans[tar]:
            raise DataError(
                f"out={out} already holds {tar.name}, made from other images or with other"
                " options; choose an empty folder or delete the old shards"
            )


_source: Source  # of this worker, and the members it takes along

_members: tuple[str, ...]

_value_range: Range | None


def _start_worker(source: Source, members: tuple[str, ...], value_range: Range | None) -> None:
    """Take the source once, not with every job."""
    global _source, _members, _value_range
    _source, _members, _value_range = source, members, value_range
    end_with_parent()


def _make(job: Job) -> Made:
    """Write one shard, unless it already exists."""
    index = ShardIndex.load(sidecar(job.tar))
    if (
        index
        and index.plan == job.plan
        and job.tar.exists()
        and job.tar.stat().st_size == index.tar_bytes
    ):
        there = set(index.keys.tolist())
        bad = [
            (_name(number), "left out by an earlier run")
            for key, number in job.images
            if key.encode() not in there
        ]
        return Made(ShardInfo.of(job.tar), bad)
    bad = []
    try:
        with ShardFile(job.tar, job.plan) as shard:
            for key, number in job.images:
                try:
                    name, data, label = _source.read(number)
                    height, width = decode(data, value_range=_value_range).shape[:2]
                    others = {e: o for e in _members if (o := _source.read_other(number, e))}
                except DecodeError as error:
                    bad.append((_name(number), str(error)))
                except OSError as error:
                    bad.append((_name(number), error.strerror or str(error)))
                else:
                    extension = image_extension(data, name)
                    original = _source.original(number)
                    shard.add(key, data, extension, label, (height, width), others, original)
    except DataError:
        if len(bad) < len(job.images):
            raise
        return Made(None, bad)
    return Made(ShardInfo.of(job.tar), bad)


def _name(number: int) -> str:
    return shown(bytes(_source.keys[number]))


def _column(text: str) -> str | None:
    return NONE if text.lower() in ("null", "none") else text or None


def _report(options: Options, splits: dict[str, list[Made]], bad: list[tuple[str, str]]) -> None:
    from rich.console import Console

    train = typed("train")
    console = Console(highlight=False, soft_wrap=True)
    places = {}
    for split, results in splits.items():
        shards = [result.shard for result in results if result.shard]
        images = counted(sum(shard.samples for shard in shards), "image")
        megabytes = sum(shard.bytes for shard in shards) / 1e6
        console.print(
            f"[bold]{split}[/]: {images} in {counted(len(shards), 'shard')}, {megabytes:.1f} MB"
        )
        out = Path(options.out).resolve()
        if len(shards) == 1:
            places[split] = f"{out / shards[0].name}"
        elif len(shards) == len(results):
            places[split] = f"{out}/{split}-{{000000..{len(shards) - 1:06d}}}.tar"
        elif shards:
            places[split] = f"{out}/{split}-*.tar"  # a shard is missing: nothing in it decodes
    if bad:
        bad.sort()
        console.print(f"[bold]left out[/]: {counted(len(bad), 'image')} that cannot be used")
        for name, reason in bad[:5]:
            console.print(f"  {name}: {reason}", markup=False)
        if len(bad) > 5:
            console.print(f"  ...; all of them are in {Path(options.out) / 'manifest.json'}")
    overrides = " ".join(f"'data.{split}={place}'" for split, place in places.items())
    console.print("Train with:")
    console.print(f"  {train} data=shards {overrides}", markup=False)
    if "val" not in places:  # a set that came split has its own folder for each part
        val = f"'data.train=...' 'data.val={places['train']}'"
        console.print("or, if this is a validation set:")
        console.print(f"  {train} data=shards {val}", markup=False)


def _run(place: str | None, values: dict[str, Any]) -> None:
    columns = Columns(*(values.pop(name) for name in ("image", "label", "caption")))
    options = Options(source=place or "", columns=columns, **values)
    try:
        _report(options, *make_shards(options))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues") from None


TOOL = Tool(
    name="make-shards",
    about="Write images as checked WebDataset shards.",
    place="SOURCE out=FOLDER",
    place_is="source of images",
    place_about="SOURCE is one of",
    kinds={
        "a folder": "its images and those in subfolders, which become the class labels",
        "a list": "a text file with a path in each line, and a label after a tab or space",
        "Parquet": "a file or a folder of them, with the images' bytes in a column",
        "Hugging Face": "a folder written by Dataset.save_to_disk",
        "shards": "'sets/old-{000000..000007}.tar', or a folder of tars",
    },
    run=_run,
    options={
        "out": Option(
            "where the shards go; made if missing", os.path.expanduser, None, "/sets/photos"
        ),
        "shard_size": Option("largest shard (KB, MB, GB or bytes)", size, "300MB"),
        "shuffle": Option("mix all images; false keeps their order", flag, "true"),
        "seed": Option("seed of the shuffle", whole(0), "0"),
        "val_fraction": Option(
            "share of the images that goes to val-*.tar instead of train-*.tar", fraction, "0"
        ),
        "members": Option(
            "further members to take along, such as txt,npy: files next to each image, or members "
            "of shards (empty: none of a folder or list, all of shards)",
            names,
        ),
        "image": Option("column of a table with the images; empty: by its usual names", _column),
        "label": Option("column of a table with the labels; likewise; null: none", _column),
        "caption": Option("column of a table with the captions; likewise; null: none", _column),
        "value_range": VALUE_RANGE,
        "workers": Option("number of processes; empty: one per core", processes),
    },
    closing="Every image is decoded once; those that do not decode are reported and left out. The "
    "bytes are written as they are. The same command continues a run that was interrupted.",
    examples=(
        "/photos out=/sets/photos",
        "/photos out=/sets/photos shard_size=1GB",
        "/photos out=/sets/photos members=txt",
    ),
)
