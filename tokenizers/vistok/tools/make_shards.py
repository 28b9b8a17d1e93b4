"""Images from anywhere to checked WebDataset shards: `vistok make-shards`.

Which image goes into which shard is settled before anything is written, so shards are made in
parallel, and a run that was killed is continued by the same command: shards that are whole and
made from the same plan stay.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vistok.core.errors import ConfigError, DataError, VistokError, nearest
from vistok.data.decode import DecodeError, decode, image_extension
from vistok.data.index import ShardIndex, sidecar
from vistok.data.inputs import SPOOL, Columns, Tables, end_with_parent, open_input
from vistok.data.shards import ShardFile, ShardInfo, member_bytes, tar_bytes, write_manifest
from vistok.data.sources import Source, hold_out

HELP = """\
Write images as checked WebDataset shards.

  {program} SOURCE out=FOLDER [option=value ...]

SOURCE is one of
  a folder           its images and those in subfolders, which become the class labels
  a list             a text file with a path in each line, and a label after a tab or space
  Parquet            a file or a folder of them, with the images' bytes in a column
  Hugging Face       a folder written by Dataset.save_to_disk
  shards             'sets/old-{{000000..000007}}.tar', or a folder of tars

  out=FOLDER         where the shards go; made if missing
  shard_size=300MB   largest shard (KB, MB, GB or bytes)
  shuffle=true       mix all images; false keeps the order they have
  seed=0             of the shuffle
  val_fraction=0     share of the images that goes to val-*.tar instead of train-*.tar
  members=           further members to take along, such as txt,npy: files beside each image, or
                     members of shards (empty: none of a folder or list, all of shards)
  image=, label=, caption=   columns of a table; empty to find them by their usual names
  workers=           processes; empty for one per core
  debug=false        show the traceback of an error

Every image is decoded once; those that do not decode are reported and left out. The bytes are
written as they are. A run that was interrupted is continued by the same command.

Examples:
  {program} /photos out=/sets/photos
  {program} /photos out=/sets/photos shard_size=1GB val_fraction=0.01 members=txt
  {program} /downloads/imagenet-parquet out=/sets/in1k image=image label=label
"""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20}

_UNITS["gib"] = 2**30


@dataclass(frozen=True)
class Options:
    """What the command was told."""

    source: str
    out: str
    shard_size: int = 300_000_000
    shuffle: bool = True
    seed: int = 0
    val_fraction: float = 0.0
    members: tuple[str, ...] | None = None
    columns: Columns = field(default_factory=Columns)
    workers: int = 1


@dataclass(frozen=True)
class Job:
    """One shard to be: its path, its images, and a digest of all that decides its bytes."""

    tar: Path
    images: list[tuple[str, int]]  # key, number in the source
    plan: str


@dataclass(frozen=True)
class Made:
    """What became of a job: None for the shard if no image in it decodes."""

    shard: ShardInfo | None
    bad: list[tuple[str, str]]  # name in the source, reason


def make_shards(options: Options) -> dict[str, list[Made]]:
    """Write the shards and the manifest; returns what was made, per split.

    Raises:
        DataError: if there are no images, none decodes, `out` holds something else, or another
            process is writing there.
        ConfigError: if an option cannot be.
    """
    out = Path(options.out)
    source = open_input(options.source, options.columns, options.members)
    with _alone_in(out):
        if isinstance(source, Tables):
            source = source.unpack(out, options.workers)
        members = tuple(source.others) if options.members is None else options.members
        jobs = _plan(source, members, options)
        _check_out(out, jobs)
        workers = max(1, min(options.workers, len(jobs)))
        with ProcessPoolExecutor(
            workers, initializer=_start_worker, initargs=(source, members)
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
                f"{options.source}: none of the {len(source)} images decodes; {name}: {reason}"
            )
        write_manifest(
            out,
            {name: [r.shard for r in results if r.shard] for name, results in splits.items()},
            classes=source.classes,
            arguments={
                key: getattr(options, key)
                for key in ("shard_size", "shuffle", "seed", "val_fraction")
            },
            left_out=sorted(name for result in made for name, _ in result.bad),
        )
    return splits


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
                raise DataError(f"out={out}: another make-shards is writing there") from None
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
    """Of all that decides the bytes of a shard, as far as it can be known without reading them."""
    what = [
        (key, os.fsdecode(bytes(source.keys[i])), int(source.sizes[i]), source.label(i))
        for key, i in images
    ]
    return hashlib.sha256(json.dumps([what, list(members)]).encode()).hexdigest()


def _check_out(out: Path, jobs: Sequence[Job]) -> None:
    """Refuse to mix with, or write over, what is not this command's own."""
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


def _start_worker(source: Source, members: tuple[str, ...]) -> None:
    """Take the source once, not with every job."""
    global _source, _members
    _source, _members = source, members
    end_with_parent()


def _make(job: Job) -> Made:
    """Write one shard, unless it is there already."""
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
                    height, width = decode(data).shape[:2]
                    others = {e: o for e in _members if (o := _source.read_other(number, e))}
                except DecodeError as error:
                    bad.append((_name(number), str(error)))
                except OSError as error:
                    bad.append((_name(number), error.strerror or str(error)))
                else:
                    extension = image_extension(data, name)
                    shard.add(key, data, extension, label, (height, width), others)
    except DataError:
        if len(bad) < len(job.images):
            raise
        return Made(None, bad)
    return Made(ShardInfo.of(job.tar), bad)


def _name(number: int) -> str:
    return os.fsdecode(bytes(_source.keys[number]))


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line.

    Raises:
        ConfigError: naming the argument that is wrong.
    """
    known = ("out", "shard_size", "shuffle", "seed", "val_fraction", "members")
    known += ("image", "label", "caption", "workers", "debug")
    values: dict[str, str] = {}
    sources = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or "/" in name:
            sources.append(argument)
        elif name not in known:
            raise ConfigError(f"unknown option {name}={nearest(name, known)}; see --help")
        else:
            values[name] = value
    if len(sources) != 1:
        found = f"found {' '.join(sources)}" if sources else "found none"
        raise ConfigError(f"name one source of images; {found}; see --help")
    if not values.get("out"):
        raise ConfigError("out= is not set; for example out=/sets/photos")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Options(
        source=sources[0],
        out=os.path.expanduser(values["out"]),
        shard_size=_bytes(values.get("shard_size", "300MB")),
        shuffle=_flag("shuffle", values.get("shuffle", "true")),
        seed=_whole("seed", values.get("seed", "0"), 0),
        val_fraction=_fraction(values.get("val_fraction", "0")),
        members=_names(values.get("members", "")),
        columns=Columns(*(values.get(name) or None for name in ("image", "label", "caption"))),
        workers=_whole("workers", values.get("workers") or str(cores or 1), 1),
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"shard_size={text} is no size; write for example 300MB or 1GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _names(text: str) -> tuple[str, ...] | None:
    names = [name.strip(" .").lower() for name in text.split(",")]
    return tuple(dict.fromkeys(filter(None, names))) or None


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ConfigError(f"{name}={text} must be true or false")
    return text.lower() in ("true", "1", "yes")


def _whole(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text} must be a whole number of at least {least}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ConfigError(f"val_fraction={text} must be at least 0 and below 1")
    return value


def _report(options: Options, splits: dict[str, list[Made]], train: str) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    bad = [item for results in splits.values() for result in results for item in result.bad]
    places = {}
    for split, results in splits.items():
        shards = [result.shard for result in results if result.shard]
        size = sum(shard.bytes for shard in shards) / 1e6
        console.print(
            f"[bold]{split}[/]: {sum(shard.samples for shard in shards)} images"
            f" in {len(shards)} shards, {size:.1f} MB"
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
        console.print(f"[bold]left out[/]: {len(bad)} that cannot be used")
        for name, reason in bad[:5]:
            console.print(f"  {name}: {reason}", markup=False)
        if len(bad) > 5:
            console.print(f"  ... all are listed in {Path(options.out) / 'manifest.json'}")
    overrides = " ".join(f"'data.{split}={place}'" for split, place in places.items())
    console.print("Train with:")
    console.print(f"  {train} data=shards {overrides}", markup=False)
    if "val" not in places:  # a set that came split has its own folder for each part
        val = f"'data.train=...' 'data.val={places['train']}'"
        console.print("or, if this is a validation set:")
        console.print(f"  {train} data=shards {val}", markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (2 for an error that the user can mend)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    script = sys.argv[0].endswith("make_shards.py")
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        program = "uv run scripts/make_shards.py" if script else "vistok make-shards"
        print(HELP.format(program=program), end="")
        return 0 if arguments else 2
    debug = "debug=true" in arguments or os.environ.get("VISTOK_DEBUG") == "1"
    try:
        options = parse(arguments)
        _report(options, make_shards(options), "uv run train.py" if script else "vistok train")
    except (VistokError, OSError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
