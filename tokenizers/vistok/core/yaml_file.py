"""YAML files of others, read as plain values in bounded memory. Light."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from vistok.core.errors import CheckpointError

#: Bytes, values and depth that no config of a run comes near.
LARGEST, MOST, DEEPEST = 1 << 20, 20_000, 40


class _Loader(yaml.SafeLoader):
    """Plain values, with the floats of YAML 1.2 (1e-3), and without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)|[-+]?(\d+\.\d*|\.\d+)$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a YAML file holds: a mapping of plain values.

    Raises:
        CheckpointError: in one line with the file and the place, if it is anything else, is too
            large, or grows too large by its anchors.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path}: too large for a run's config")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not text in UTF-8 (byte {error.start})") from error
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _measure(node, path, {}, 0)
        value = None if node is None else loader.construct_document(node)
    except CheckpointError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}{place}: not YAML: {problem}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply for a run's config") from error
    except (ValueError, TypeError, OverflowError) as error:
        said = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: holds a value that cannot be read ({said})") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no keys; expected the config of a run")
    _check_plain(value, path, "")
    return value


def _measure(node: yaml.Node, path: Path, sizes: dict[int, int], depth: int) -> int:
    """Return how many values a node is, each alias counted in full."""
    place = f"{path}, line {node.start_mark.line + 1}"
    if depth > DEEPEST:
        raise CheckpointError(f"{place}: nested too deeply for a run's config")
    known = sizes.get(id(node))
    if known == -1:
        raise CheckpointError(f"{place}: refers to itself")
    if known is not None:
        return known
    sizes[id(node)] = -1
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_measure(item, path, sizes, depth + 1) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in seen:
                raise CheckpointError(f"{place}: the key {name[:60]} is there twice")
            seen |= {name} - {"", "<<"}
        for key, value in node.value:
            size += _measure(key, path, sizes, depth + 1) + _measure(value, path, sizes, depth + 1)
    if size > MOST:
        raise CheckpointError(f"{place}: stands for more than {MOST} values by its anchors")
    sizes[id(node)] = size
    return size


def _check_plain(value: Any, path: Path, key: str) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            here = f"{key}.{name}" if key else str(name)
            if not isinstance(name, str):
                raise CheckpointError(f"{path}: {here[:80]}: a key must be a word")
            _check_plain(inner, path, here)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_plain(inner, path, f"{key}[{number}]")
    elif isinstance(value, str):
        if "${" in value:
            raise CheckpointError(
                f"{path}: {key}={value[:60]}: a stored config has no references; write the value"
            )
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise CheckpointError(f"{path}: {key}: {type(value).__name__} is not a plain value")
