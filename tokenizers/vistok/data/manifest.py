"""Read `manifest.json`, and believe only what it can be."""

from __future__ import annotations

from typing import Any

from vistok.core.files import parse_json


def entries(data: bytes) -> dict[str, dict[str, Any]]:
    """Return what a manifest says of each shard, by the shard's name.

    Names are those of files in the manifest's folder: they lead nowhere else.

    Raises:
        ValueError: saying what is wrong, in a few words.
    """
    try:
        content = parse_json(data)
    except ValueError:
        raise ValueError("is not JSON") from None
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, dict):
        raise ValueError("has no splits")
    found: dict[str, dict[str, Any]] = {}
    for split, said in splits.items():
        shards = said.get("shards") if isinstance(said, dict) else None
        if not isinstance(shards, list) or not all(map(_is_possible, shards)):
            raise ValueError(f"its split {str(split)[:40]!r} has no shards, or impossible ones")
        if said.get("samples") != sum(shard["samples"] for shard in shards):
            raise ValueError(f"its split {str(split)[:40]!r} does not add up")
        for shard in shards:
            if shard["name"] in found:
                raise ValueError(f"it names {shard['name'][:80]!r} twice")
            found[shard["name"]] = shard
    return found


def _is_possible(shard: Any) -> bool:
    if not isinstance(shard, dict):
        return False
    name = shard.get("name")
    counts = [shard.get("samples"), shard.get("bytes")]
    sums = [shard.get("sha256"), shard.get("index_sha256")]
    return (
        isinstance(name, str)
        and name.endswith(".tar")
        and "/" not in name
        and "\0" not in name
        and all(type(count) is int and 0 <= count < 2**63 for count in counts)
        and all(isinstance(each, str) and len(each) == 64 for each in sums)
    )
