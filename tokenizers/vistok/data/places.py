"""Places of data as users write them: paths, patterns, addresses."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistok.core.errors import ConfigError, DataError
from vistok.core.terminal import counted
from vistok.data.names import shown
from vistok.data.remote import RemoteShard, ShardCache

_MOST_SHARDS = 1_000_000  # that braces may stand for

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


def absolute(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data's config with all paths absolute, so that it holds in any working folder.

    `~` is expanded; addresses stay.
    """
    found = dict(data)
    for key in ("train", "val", "cache_dir"):
        if found.get(key) is not None:
            found[key] = _absolute(found[key])
    if isinstance(found.get("sources"), Mapping):
        found["sources"] = {
            name: {**spec, "train": _absolute(spec["train"])}
            if isinstance(spec, Mapping) and spec.get("train") is not None
            else spec
            for name, spec in found["sources"].items()
        }
    return found


def _absolute(place: Any) -> Any:
    if isinstance(place, (list, tuple)):
        return [_absolute(part) for part in place]
    text = as_path(place)
    if not isinstance(text, str) or not text or "://" in text or text.startswith("pipe:"):
        return place
    return os.path.abspath(os.path.expanduser(text))


def as_path(place: Any) -> Any:
    """Return a place as text: a folder may be called 2020, which a config reads as a number."""
    is_number = isinstance(place, (int, float)) and not isinstance(place, bool)
    return str(place) if is_number else place


def expand_shards(
    pattern: str | Sequence[str], key: str = "data.train", cache: ShardCache | None = None
) -> list[Path | RemoteShard]:
    """Expand the shards that a user names: braces, globs, addresses, lists of these.

    Args:
        pattern: such as `train-{000000..000127}.tar`, `sets/*.tar` or `https://host/x.tar`.
        key: the configuration key, for messages.
        cache: where remote shards are kept; None for one with the default settings.

    Raises:
        ConfigError: if the braces make no sense.
        DataError: if a pattern matches nothing, or is a folder, or no address that can be read.
    """
    places: list[Path | RemoteShard] = []
    for part in [pattern] if isinstance(pattern, (str, int, float)) else pattern:
        text = os.path.expanduser(str(part))
        if text.startswith("pipe:"):
            raise DataError(f"{key}={shown(text)}: commands are not run; give the address itself")
        if "://" not in text and os.path.exists(text):  # whatever characters are in its name
            places.append(Path(text))
            continue
        fixed, text = _existing(text)
        for name in _braced(text, key):
            if "://" in name:
                places.append(RemoteShard(name, cache or ShardCache()))
                continue
            magic = glob.has_magic(name)
            matches = sorted(glob.glob(glob.escape(fixed) + name)) if magic else [fixed + name]
            if not matches:
                raise DataError(f"{key}={shown(fixed + name)}: matches no file")
            places += [Path(match) for match in matches]
    if not places:
        raise ConfigError(f"{key} is an empty list; name at least one shard")
    for path in places:
        if isinstance(path, Path) and path.is_dir():
            said = shown(path)
            raise DataError(f"{key}={said} is a folder; name its shards, such as {said}/*.tar")
    return places


def _existing(text: str) -> tuple[str, str]:
    """Split off the folders that exist as they are written: v[1]/*.tar is in the folder v[1]."""
    if "://" in text:
        return "", text
    parts = text.split("/")
    for count in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:count])
        if os.path.isdir(folder or "/"):
            return folder + "/", "/".join(parts[count:])
    return "", text


def _braced(text: str, key: str) -> list[str]:
    """Expand braces, unless they stand for absurdly many names."""
    from webdataset.shardlists import expand_urls

    counts = [
        abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1
        for first, last, step in _RANGE.findall(text)
    ]
    if (total := math.prod(counts)) > _MOST_SHARDS:
        raise ConfigError(
            f"{key}={shown(text)}: the braces name {counted(total, 'shard')}; at most"
            f" {_MOST_SHARDS} are allowed"
        )
    try:
        return expand_urls(text)
    except ValueError as error:
        raise ConfigError(f"{key}={shown(text)}: the braces do not match ({error})") from None
