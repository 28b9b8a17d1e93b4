"""Check shards against their manifest, their indexes and themselves: `vistok check-shards`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import DataError
from vistok.core.files import replacing
from vistok.core.terminal import counted
from vistok.data.decode import DecodeError, decode
from vistok.data.deep import Range
from vistok.data.formats import IMAGE_EXTENSIONS
from vistok.data.index import ShardIndex, scan, sidecar
from vistok.data.manifest import entries
from vistok.data.names import key_text, shown
from vistok.data.places import expand_shards
from vistok.data.remote import RemoteShard, ShardCache, read_manifest
from vistok.data.shards import sha256
from vistok.tools.words import VALUE_RANGE, Option, Tool, flag, processes

# What an index knows in addition to what is in its tar.
_NOT_IN_TAR = ("heights", "widths", "plan", "names", "left_out", "reasons")


@dataclass(frozen=True)
class Job:
    """A shard to check, and its entry in the manifest (None without a manifest)."""

    tar: Path | RemoteShard
    expected: dict[str, Any] | None


@dataclass
class Finding:
    """The contents of a shard, and the problems found in it."""

    shard: str
    samples: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    further: dict[str, int] = field(default_factory=dict)
    keys: list[bytes] = field(default_factory=list)


def check_shards(
    place: str, decoded: bool = False, workers: int = 1, value_range: Range | None = None
) -> list[Finding]:
    """Return a finding for each shard, and one for the whole set if that has a problem.

    Args:
        place: a folder, or shards by name.
        decoded: decode every image.
        workers: processes.
        value_range: black and white of images of more than 8 bits, to decode them.

    Raises:
        DataError: if there are no shards, or the manifest cannot be read.
    """
    folder = Path(os.path.expanduser(place))
    if "://" in place and not place.endswith(".tar"):
        jobs = _jobs_of_address(place.rstrip("/"))
    else:
        jobs = _jobs_of_folder(folder) if folder.is_dir() else _jobs_of_names(place)
    with ProcessPoolExecutor(max(1, min(workers, len(jobs)))) as pool:
        from rich.progress import track

        results = pool.map(partial(_check, decoded=decoded, value_range=value_range), jobs)
        findings = list(track(results, "Checking shards", total=len(jobs), transient=True))
    return findings + _check_set(findings)


def _jobs_of_folder(folder: Path) -> list[Job]:
    listed = _manifest(folder)
    names = {path.name for path in folder.glob("*.tar")}
    if not names and not listed:
        raise DataError(f"{folder}: no shards in this folder; expected *.tar")
    return [
        Job(folder / name, listed.get(name, {} if listed else None))
        for name in sorted(names | set(listed))
    ]


def _jobs_of_names(place: str) -> list[Job]:
    jobs = []
    for path in expand_shards(place, "shards"):
        if isinstance(path, RemoteShard):
            jobs.append(Job(path, path.in_manifest() or None))
            continue
        if not path.exists() and not (path.parent / "manifest.json").exists():
            raise DataError(f"{path}: no such folder or shard")
        jobs += [job for job in _jobs_of_folder(path.parent) if job.tar == path] or [
            Job(path, None)
        ]
    return jobs


def _jobs_of_address(address: str) -> list[Job]:
    listed = read_manifest(f"{address}/manifest.json", ShardCache())
    if not listed:
        raise DataError(f"{address}: no manifest.json of vistok here; name the shards themselves")
    return [Job(RemoteShard(f"{address}/{name}", ShardCache()), listed[name]) for name in listed]


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the manifest of a folder says of each shard; empty without one."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        return entries(path.read_bytes())
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{shown(path)}: damaged, or not a manifest of vistok: {error}") from None


def _check(job: Job, decoded: bool, value_range: Range | None = None) -> Finding:
    """Check one shard; each problem becomes a line."""
    if isinstance(job.tar, RemoteShard):
        try:
            job.tar.index()
            here = Job(job.tar.fetch(), job.expected)
        except DataError as error:
            reason = str(error).removeprefix(f"{job.tar}: ")
            return Finding(job.tar.name, problems=[reason])
        return replace(_check(here, decoded, value_range), shard=job.tar.name)
    finding = Finding(shown(job.tar.name))
    if not job.tar.exists():
        finding.problems.append("is missing")
        return finding
    try:
        return _check_file(job.tar, job.expected, decoded, finding, value_range)
    except OSError as error:
        finding.problems.append(f"cannot be read: {error.strerror}")
        return finding


def _check_file(
    tar: Path,
    expected: dict[str, Any] | None,
    decoded: bool,
    finding: Finding,
    value_range: Range | None,
) -> Finding:
    finding.bytes = tar.stat().st_size
    try:
        found = scan(tar)
    except DataError as error:
        said = str(error).removeprefix(f"{tar}").removeprefix(":").strip()
        finding.problems.append(shown(said))
        found = None
    problems = finding.problems
    if expected == {}:
        problems.append("is not in the manifest")
    elif expected is not None:
        problems += _against_manifest(tar, expected, found)
    if sidecar(tar).exists():
        problems += _against_index(tar, found)
    if found is not None:
        finding.samples, finding.keys = len(found), found.keys.tolist()
        finding.left_out = [
            f"{shown(name)} {key_text(reason)}"
            for name, reason in zip(found.left_out.tolist(), found.reasons.tolist(), strict=True)
        ]
        for extension, offsets in zip(found.others.tolist(), found.other_offsets, strict=True):
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                finding.further[extension] = int((offsets >= 0).sum())
        if decoded:
            index = ShardIndex.load(sidecar(tar))
            shapes = None if index is None or len(index) != len(found) else index
            problems += _against_decoder(tar, found, shapes, value_range)
    return finding


def _against_manifest(tar: Path, expected: dict[str, Any], found: ShardIndex | None) -> list[str]:
    problems = []
    if (size := tar.stat().st_size) != expected["bytes"]:
        problems.append(f"has {counted(size, 'byte')}; the manifest says {expected['bytes']}")
    elif sha256(tar) != expected["sha256"]:
        problems.append("does not match its checksum (SHA-256)")
    if not sidecar(tar).exists():
        problems.append(f"has no index {sidecar(tar).name}")
    elif sha256(sidecar(tar)) != expected["index_sha256"]:
        problems.append(f"its index {sidecar(tar).name} does not match its checksum (SHA-256)")
    if found is not None and len(found) != expected["samples"]:
        problems.append(
            f"has {counted(len(found), 'sample')}; the manifest says {expected['samples']}"
        )
    return problems


def _against_index(tar: Path, found: ShardIndex | None) -> list[str]:
    index = ShardIndex.load(sidecar(tar))
    if index is None:
        return [f"its index {sidecar(tar).name} is damaged, or not an index of vistok"]
    if found is None:
        return []
    wrong = [
        f.name
        for f in fields(ShardIndex)
        if f.name not in _NOT_IN_TAR
        and (index.proof or not f.name.startswith("proof"))
        and not np.array_equal(getattr(index, f.name), getattr(found, f.name))
    ]
    return [f"its index differs from what is in it ({', '.join(wrong)})"] if wrong else []


def _against_decoder(
    tar: Path, found: ShardIndex, shapes: ShardIndex | None, value_range: Range | None
) -> list[str]:
    problems = []
    with open(tar, "rb") as file:
        for row in range(len(found)):
            data = os.pread(file.fileno(), int(found.sizes[row]), int(found.offsets[row]))
            key = shown(bytes(found.keys[row]))
            try:
                size = decode(data, value_range=value_range).shape[:2]
            except DecodeError as error:
                problems.append(f"{key} does not decode: {error}")
                continue
            said = (0, 0) if shapes is None else (int(shapes.heights[row]), int(shapes.widths[row]))
            if any(said) and said != size:
                problems.append(f"{key} is {size[0]}x{size[1]}; the index says {said[0]}x{said[1]}")
    return problems


def _check_set(findings: Sequence[Finding]) -> list[Finding]:
    """Find keys that occur more than once in a split."""
    problems = []
    splits: dict[str, dict[bytes, str]] = {}
    for finding in findings:
        seen = splits.setdefault(re.sub(r"[0-9]+\.tar$", "", finding.shard), {})
        for key in finding.keys:
            if key in seen:
                name = shown(key)
                problems.append(f"key {name} is in {seen[key]} and in {finding.shard}")
            seen[key] = finding.shard
    return [Finding("all shards", problems=problems)] if problems else []


def _report(findings: Sequence[Finding]) -> int:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        for problem in finding.problems[:20]:
            console.print(f"{finding.shard}: {problem}", markup=False)
        if (more := len(finding.problems) - 20) > 0:
            console.print(f"{finding.shard}: ... and {more} more (report=FILE lists them all)")
        for reason in finding.left_out[:5]:
            console.print(f"{finding.shard}: left out: {reason}", markup=False)
        if (more := len(finding.left_out) - 5) > 0:
            console.print(f"{finding.shard}: left out: {more} more (report=FILE lists them all)")
        for extension, count in finding.further.items():
            images = f"{counted(count, 'image')} .{shown(extension)}"
            said = "a further member" if count == 1 else "further members"
            console.print(f"{finding.shard}: {images}: {said} of samples", markup=False)
    samples, size = sum(f.samples for f in findings), sum(f.bytes for f in findings) / 1e6
    problems = sum(len(finding.problems) for finding in findings)
    shards = counted(sum(f.bytes > 0 for f in findings), "shard")
    found = counted(problems, "problem") if problems else "no problems"
    left_out = sum(len(finding.left_out) for finding in findings)
    left = f" ({left_out} left out)" if left_out else ""
    console.print(f"{shards}, {counted(samples, 'image')}{left}, {size:.1f} MB: {found} found")
    return 1 if problems else 0


def _run(place: str | None, values: dict[str, Any]) -> int:
    findings = check_shards(place or "", values["decode"], values["workers"], values["value_range"])
    if report := values["report"]:
        listed = [{k: v for k, v in asdict(f).items() if k != "keys"} for f in findings]
        with replacing(Path(report)) as file:
            file.write(json.dumps(listed, indent=2).encode() + b"\n")
    return _report(findings)


TOOL = Tool(
    name="check-shards",
    about="Check shards: checksums, counts and indexes, and with decode=true every image.",
    place="PLACE",
    place_is="folder or pattern of shards",
    place_about="PLACE is a folder of shards (its manifest.json is checked too, if there is one), "
    "or shards by name. Both may be addresses (https://, s3://, gs://, hf://): shards are fetched "
    "into the cache that training reads from, and a folder must have a manifest.json.",
    run=_run,
    options={
        "decode": Option("decode every image, and compare its size with the index", flag, "false"),
        "workers": Option("number of processes; empty: one per core", processes),
        "value_range": VALUE_RANGE,
        "report": Option("file to write all findings to, as JSON"),
    },
    closing="The exit code is 0 if nothing is wrong, 1 if anything is damaged, and 2 if the "
    "command itself is wrong.",
    examples=("/sets/photos", "/sets/photos decode=true", "'/sets/train-{000000..000127}.tar'"),
)
