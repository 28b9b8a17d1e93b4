"""Shards against their manifest, their indexes and themselves: `vistok check-shards`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vistok.core.errors import ConfigError, DataError, VistokError, nearest
from vistok.core.files import replacing
from vistok.data.decode import DecodeError, decode
from vistok.data.index import ShardIndex, scan, sidecar
from vistok.data.remote import RemoteShard, ShardCache, read_manifest
from vistok.data.shards import sha256
from vistok.data.sources import expand_shards

HELP = """\
Check shards: checksums, counts and indexes, and with decode=true every image.

  {program} PLACE [option=value ...]

PLACE is a folder of shards (its manifest.json is checked too, if there is one), or shards by name
('sets/train-{{000000..000127}}.tar'). Both may be addresses (https://, s3://, gs://, hf://): shards
are fetched, into the cache that training reads from, and a folder must have a manifest.json.

  decode=false   decode every image, and compare its size with the index
  workers=       processes; empty for one per core
  report=        file to write all findings to, as JSON
  debug=false    show the traceback of an error

The exit code is 0 if all is well, 1 if anything is damaged, 2 if the command was wrong.
"""


@dataclass(frozen=True)
class Job:
    """One shard to check, and what its manifest says of it (None without one)."""

    tar: Path | RemoteShard
    expected: dict[str, Any] | None


@dataclass
class Finding:
    """What is in a shard, and what is wrong with it."""

    shard: str
    samples: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)


def check_shards(place: str, decoded: bool = False, workers: int = 1) -> list[Finding]:
    """Check shards; returns a finding per shard, and one for the set if that has a problem.

    Args:
        place: a folder, or shards by name.
        decoded: decode every image.
        workers: processes.

    Raises:
        DataError: if there are no shards, or the manifest cannot be read.
    """
    folder = Path(place).expanduser()
    if "://" in place and not place.endswith(".tar"):
        jobs = _jobs_of_address(place.rstrip("/"))
    else:
        jobs = _jobs_of_folder(folder) if folder.is_dir() else _jobs_of_names(place)
    with ProcessPoolExecutor(max(1, min(workers, len(jobs)))) as pool:
        from rich.progress import track

        results = pool.map(partial(_check, decoded=decoded), jobs)
        findings = list(track(results, "Checking shards", total=len(jobs), transient=True))
    return findings + _check_set(findings)


def _jobs_of_folder(folder: Path) -> list[Job]:
    manifest = _manifest(folder)
    listed = {
        shard["name"]: shard
        for split in manifest.get("splits", {}).values()
        for shard in split["shards"]
    }
    names = {path.name for path in folder.glob("*.tar")}
    if not names and not listed:
        raise DataError(f"{folder}: no shards in this folder; wanted *.tar")
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
        raise DataError(f"{address}: has no manifest.json of ours; name the shards themselves")
    return [Job(RemoteShard(f"{address}/{name}", ShardCache()), listed[name]) for name in listed]


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        for split in content["splits"].values():
            assert split["samples"] == sum(shard["samples"] for shard in split["shards"])
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise DataError(f"{path}: is damaged, or no manifest of ours") from None
    return content


def _check(job: Job, decoded: bool) -> Finding:
    """Check one shard; whatever is wrong becomes a line."""
    if isinstance(job.tar, RemoteShard):
        try:
            job.tar.index()
            here = Job(job.tar.fetch(), job.expected)
        except DataError as error:
            reason = str(error).removeprefix(f"{job.tar}: ")
            return Finding(job.tar.name, problems=[reason])
        return replace(_check(here, decoded), shard=job.tar.name)
    finding = Finding(job.tar.name)
    if not job.tar.exists():
        finding.problems.append("is missing")
        return finding
    finding.bytes = job.tar.stat().st_size
    try:
        found = scan(job.tar)
    except DataError as error:
        finding.problems.append(str(error).removeprefix(f"{job.tar} "))
        found = None
    problems = finding.problems
    if job.expected == {}:
        problems.append("is not in the manifest")
    elif job.expected is not None:
        problems += _against_manifest(job.tar, job.expected, found)
    if sidecar(job.tar).exists():
        problems += _against_index(job.tar, found)
    if found is not None:
        finding.samples, finding.keys = len(found), found.keys.tolist()
        if decoded:
            index = ShardIndex.load(sidecar(job.tar))
            shapes = None if index is None or len(index) != len(found) else index
            problems += _against_decoder(job.tar, found, shapes)
    return finding


def _against_manifest(tar: Path, expected: dict[str, Any], found: ShardIndex | None) -> list[str]:
    problems = []
    if (size := tar.stat().st_size) != expected["bytes"]:
        problems.append(f"has {size} bytes; the manifest says {expected['bytes']}")
    elif sha256(tar) != expected["sha256"]:
        problems.append("does not match its checksum (SHA-256)")
    if not sidecar(tar).exists():
        problems.append(f"has no index {sidecar(tar).name}")
    elif sha256(sidecar(tar)) != expected["index_sha256"]:
        problems.append(f"its index {sidecar(tar).name} does not match its checksum (SHA-256)")
    if found is not None and len(found) != expected["samples"]:
        problems.append(f"has {len(found)} samples; the manifest says {expected['samples']}")
    return problems


def _against_index(tar: Path, found: ShardIndex | None) -> list[str]:
    index = ShardIndex.load(sidecar(tar))
    if index is None:
        return [f"its index {sidecar(tar).name} is damaged, or not ours"]
    if found is None:
        return []
    wrong = [
        f.name
        for f in fields(ShardIndex)
        if f.name not in ("heights", "widths", "plan")
        and not np.array_equal(getattr(index, f.name), getattr(found, f.name))
    ]
    return [f"its index differs from what is in it ({', '.join(wrong)})"] if wrong else []


def _against_decoder(tar: Path, found: ShardIndex, shapes: ShardIndex | None) -> list[str]:
    problems = []
    with open(tar, "rb") as file:
        for row in range(len(found)):
            data = os.pread(file.fileno(), int(found.sizes[row]), int(found.offsets[row]))
            key = found.keys[row].decode(errors="replace")
            try:
                size = decode(data).shape[:2]
            except DecodeError as error:
                problems.append(f"{key} does not decode: {error}")
                continue
            said = (0, 0) if shapes is None else (int(shapes.heights[row]), int(shapes.widths[row]))
            if any(said) and said != size:
                problems.append(f"{key} is {size[0]}x{size[1]}; the index says {said[0]}x{said[1]}")
    return problems


def _check_set(findings: Sequence[Finding]) -> list[Finding]:
    """Keys that come more than once, within each split."""
    problems = []
    splits: dict[str, dict[bytes, str]] = {}
    for finding in findings:
        seen = splits.setdefault(re.sub(r"[0-9]+\.tar$", "", finding.shard), {})
        for key in finding.keys:
            if key in seen:
                name = key.decode(errors="replace")
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
            console.print(f"{finding.shard}: ... and {more} more (report=FILE lists all)")
    samples, size = sum(f.samples for f in findings), sum(f.bytes for f in findings) / 1e6
    problems = sum(len(finding.problems) for finding in findings)
    said = f"{problems} problems" if problems != 1 else "1 problem"
    console.print(
        f"{sum(f.bytes > 0 for f in findings)} shards, {samples} images, {size:.1f} MB:"
        f" {said if problems else 'all is well'}"
    )
    return 1 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (1 for damage, 2 for an error of the user's)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        script = sys.argv[0].endswith("check_shards.py")
        print(
            HELP.format(
                program="uv run scripts/check_shards.py" if script else "vistok check-shards"
            ),
            end="",
        )
        return 0 if arguments else 2
    debug = "debug=true" in arguments or os.environ.get("VISTOK_DEBUG") == "1"
    try:
        place, options = _parse(arguments)
        workers = int(options.get("workers") or os.cpu_count() or 1)
        findings = check_shards(place, options.get("decode") == "true", workers)
        if report := options.get("report"):
            listed = [{k: v for k, v in asdict(f).items() if k != "keys"} for f in findings]
            with replacing(Path(report)) as file:
                file.write(json.dumps(listed, indent=2).encode() + b"\n")
        return _report(findings)
    except (VistokError, OSError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str]) -> tuple[str, dict[str, str]]:
    known = {
        "decode": "true|false",
        "workers": "[1-9][0-9]*|",
        "report": ".*",
        "debug": "true|false",
    }
    places, options = [], {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or "/" in name:
            places.append(argument)
        elif name not in known:
            raise ConfigError(f"unknown option {name}={nearest(name, known)}; see --help")
        elif not re.fullmatch(known[name], value):
            raise ConfigError(f"{argument}: must be {known[name].replace('|', ' or ')}; see --help")
        else:
            options[name] = value
    if len(places) != 1:
        raise ConfigError(f"name one folder or pattern of shards; found {len(places)}; see --help")
    return places[0], options


if __name__ == "__main__":
    sys.exit(main())
