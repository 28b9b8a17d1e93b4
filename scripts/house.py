"""Measure the house: what a system costs in files, and what the tree looks like.

    python scripts/house.py                       # the working tree
    python scripts/house.py 3a1c16c HEAD          # git revisions, next to each other
    python scripts/house.py 3a1c16c HEAD --json house.json

A system is what a `configs/tokenizer/NAME_tiny.yaml` describes. Of each:

- `files`: modules of the package that belong to it or mention it, and its tiny configs. A module
  belongs to a system if it or its folder has the system's name, or if no other system's modules
  need it. It mentions a system if its code does, docstrings and comments aside. Modules that
  translate older checkpoints are left out: a new system never enters them.
- `folders`: of the package, over which these modules are spread.
- `mentions`: those of them that do not belong to it. Each is an edit that a system would cost.
- `own lines`: of the modules that belong to it.
- `hops`: from its experiment config to the file with the encoder's forward: each config that is
  named by another, the class that `_target_` names, and each class that one takes its forward from.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tokenizers/vistok/"
LONG = 450  # lines

#: Modules that say what older versions wrote.
_HISTORY = re.compile(r"checkpoints/(migrate|old_\w+)\.py$|^tokenizers/vistok/checkpoint\.py$")


def read_tree(revision: str | None) -> dict[str, str]:
    """Return the text of every module and config by its path.

    Args:
        revision: of git; None for the working tree.
    """
    if revision is None:
        paths = [p for folder in ("tokenizers", "configs") for p in (ROOT / folder).rglob("*")]
        files = {p.relative_to(ROOT).as_posix(): p for p in sorted(paths)}
        return {name: p.read_text() for name, p in files.items() if _is_source(name)}
    command = ["git", "archive", "--format=tar", revision, "tokenizers", "configs"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise SystemExit(f"{revision}: {archive.stderr.decode().strip()}")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        for member in tar:
            if _is_source(member.name) and (file := tar.extractfile(member)):
                found[member.name] = file.read().decode()
    return dict(sorted(found.items()))


def _is_source(name: str) -> bool:
    return name.endswith((".py", ".yaml"))


@dataclass(frozen=True)
class Part:
    """A class that a config names: its file, and its name there."""

    file: str
    name: str


class House:
    """A tree of modules and configs.

    Args:
        files: text by path, such as `tokenizers/vistok/cli.py` and `configs/train.yaml`.
    """

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.modules = {name: text for name, text in files.items() if name.startswith(PACKAGE)}
        self.trees = {name: ast.parse(text) for name, text in self.modules.items()}
        self.code = {name: _code(tree) for name, tree in self.trees.items()}
        self.systems = sorted(
            Path(name).stem.removesuffix("_tiny")
            for name in files
            if re.fullmatch(r"configs/tokenizer/\w+_tiny\.yaml", name)
        )
        self.registered = self._registered()
        self._imports: dict[str, dict[str, Part]] = {}

    def _registered(self) -> dict[str, Part]:
        found = {}
        for file, text in self.modules.items():
            for name, cls in re.findall(r'^@register\("(\w+)"\)\nclass (\w+)', text, re.MULTILINE):
                found[name] = Part(file, cls)
        return found

    def part(self, target: str) -> Part:
        """Return the class that a `_target_` names, by a short name or by its path."""
        if target in self.registered:
            return self.registered[target]
        module, _, cls = target.rpartition(".")
        return Part(f"tokenizers/{module.replace('.', '/')}.py", cls)

    # ------------------------------------------------------------------ configs

    def chain(self, name: str) -> list[str]:
        """Return a tokenizer's config and those that it builds on, itself first."""
        path = f"configs/tokenizer/{name}.yaml"
        bases = re.search(r"^defaults:((?: .*)?\n(?:  - .*\n)*)", self.files[path], re.MULTILINE)
        names = re.findall(r"[\w/@.]+", bases[1]) if bases else []
        inherited = [n for n in names if f"configs/tokenizer/{n}.yaml" in self.files]
        return [path, *(file for base in inherited for file in self.chain(base))]

    def parts(self, system: str) -> list[Part]:
        """Return the classes that a system's tokenizer config names."""
        texts = [self.files[path] for path in self.chain(f"{system}_tiny")]
        targets = [t for text in texts for t in re.findall(r"^ *_target_: (\S+)", text, re.M)]
        return [self.part(target) for target in dict.fromkeys(targets)]

    # ------------------------------------------------------------------ modules

    def imports(self, file: str) -> dict[str, Part]:
        """Return what a module imports of the package, by the names that it has there."""
        if file not in self._imports:
            self._imports[file] = self._imports_of(file)
        return self._imports[file]

    def _imports_of(self, file: str) -> dict[str, Part]:
        found = {}
        for node in ast.walk(self.trees[file]):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vistok"):
                for alias in node.names:
                    inner = self._file(f"{node.module}.{alias.name}")
                    part = Part(inner or self._file(node.module or "") or "", alias.name)
                    if part.file:
                        found[alias.asname or alias.name] = part
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if file_of := self._file(alias.name):
                        found[alias.name] = Part(file_of, "")
        return found

    def _file(self, module: str) -> str | None:
        path = f"tokenizers/{module.replace('.', '/')}"
        return next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in self.modules), None)

    def named(self, system: str) -> set[str]:
        """Return the modules of a system's name, and those in a folder of that name."""
        return {file for file in self.modules if re.search(rf"/{system}(\.py$|/)", file)}

    def reached(self, system: str) -> set[str]:
        """Return the modules that a system lies in, and all that they import."""
        found: set[str] = set()
        waiting = [*(part.file for part in self.parts(system)), *self.named(system)]
        while waiting:
            if (file := waiting.pop()) not in found:
                found.add(file)
                waiting += [part.file for part in self.imports(file).values()]
        return found

    @cached_property
    def _words(self) -> dict[str, set[str]]:
        """The systems that the code or the path of a module names; of two names, the longer."""
        stems = {Path(f).stem for f in self.files if f.startswith("configs/tokenizer/")}
        names = {*self.systems, *(stem.rpartition("_")[0] for stem in stems)} - {""}
        # A class is the system's that comes first: titok's, not titok_conv's, which takes it over.
        classes = {self.parts(name)[0].name: name for name in reversed(self.systems)}
        words = sorted({*names, *classes}, key=lambda word: (-len(word), word))
        pattern = re.compile(rf"(?<![A-Za-z])({'|'.join(words)})(?![a-z])")
        return {
            file: {classes.get(word, word) for word in pattern.findall(f"{file}\n{code}")}
            for file, code in self.code.items()
        }

    def mentions(self, system: str) -> set[str]:
        """Return the modules whose code or path names a system."""
        found = {file for file, words in self._words.items() if system in words}
        return {file for file in found if not _HISTORY.search(file)}

    def hops(self, system: str) -> int:
        """Return the steps from a system's experiment config to its encoder's forward."""
        pattern = re.compile(r"^encoder:.*\n(?:  .*\n)*?  _target_: (\S+)", re.MULTILINE)
        for number, path in enumerate(self.chain(f"{system}_tiny"), start=1):
            if found := pattern.search(self.files[path]):
                part = self.part(found[1])
                return number + 1 + self._hops_to_forward(part)
        raise SystemExit(f"configs/tokenizer/{system}_tiny.yaml: names no encoder")

    def _hops_to_forward(self, part: Part) -> int:
        for node in self.trees[part.file].body:
            if isinstance(node, ast.ClassDef) and node.name == part.name:
                if any(isinstance(n, ast.FunctionDef) and n.name == "forward" for n in node.body):
                    return 0
                base = ast.unparse(node.bases[0])
                other = self.imports(part.file).get(base, Part(part.file, base))
                return (other.file != part.file) + self._hops_to_forward(other)
        raise SystemExit(f"{part.file}: has no class {part.name}")

    # ------------------------------------------------------------------ numbers

    def measure(self) -> dict[str, Any]:
        """Return all numbers: `systems` by name, `tree` and `configs`."""
        reached = {system: self.reached(system) for system in self.systems}
        systems = {}
        for system in self.systems:
            others = set().union(*(reached[name] for name in self.systems if name != system))
            mentioned = self.mentions(system)
            own = self.named(system) | (reached[system] - others)
            touched = own | mentioned
            configs = [f for f in self.files if re.fullmatch(rf"configs/\w+/{system}_tiny.yaml", f)]
            systems[system] = {
                "files": len(touched) + len(configs),
                "folders": len({str(Path(file).parent) for file in touched}),
                "mentions": len(touched - own),
                "own lines": sum(map(self._lines, own)),
                "hops": self.hops(system),
                "modules": sorted(touched),
            }
        longest = max(self.modules, key=lambda file: (self._lines(file), file))
        return {
            "systems": systems,
            "tree": {
                "modules": len(self.modules),
                "lines": sum(map(self._lines, self.modules)),
                "longest": f"{longest.removeprefix(PACKAGE)} ({self._lines(longest)})",
                f"above {LONG} lines": sum(self._lines(file) > LONG for file in self.modules),
            },
            "configs": self.repeated(),
        }

    def _lines(self, file: str) -> int:
        return self.files[file].count("\n")

    def repeated(self) -> dict[str, dict[str, int]]:
        """Return for each config group the lines without comments, and how many another file has.

        A line counts as repeated once for each file of its group beyond the first that has it.
        """
        groups: dict[str, list[set[str]]] = {}
        for name, text in self.files.items():
            if match := re.fullmatch(r"configs/(\w+)/\w+\.yaml", name):
                lines = (line.partition(" #")[0].rstrip() for line in text.splitlines())
                content = {line for line in lines if line and not line.startswith("#")}
                groups.setdefault(match[1], []).append(content)
        found = {}
        for group, files in sorted(groups.items()):
            counts = Counter(line for lines in files for line in lines)
            repeated = sum(count - 1 for count in counts.values())
            found[group] = {"lines": sum(counts.values()), "repeated": repeated}
        return found


def _code(tree: ast.Module) -> str:
    """Return a module's code without comments and docstrings, which the tree loses too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value = ast.Constant(None)
    return ast.unparse(tree)


# ---------------------------------------------------------------------- tables


def tables(found: dict[str, dict[str, Any]]) -> str:
    """Return the numbers of trees as Markdown tables, a cell with the numbers of all of them.

    Args:
        found: what `measure` returned, by the name of the tree.
    """
    trees = list(found.values())
    names = sorted({name for tree in trees for name in tree["systems"]})
    columns = ["files", "folders", "mentions", "own lines", "hops"]
    rows = [["system", *columns]]
    for name in names:
        known = [tree["systems"].get(name, {}) for tree in trees]
        rows.append([name, *(_cell([system.get(c) for system in known]) for c in columns)])
    tree_rows = [["tree", ""]]
    for key in trees[0]["tree"]:
        tree_rows.append([key, _cell([tree["tree"][key] for tree in trees])])
    config_rows = [["configs", "lines", "repeated"]]
    for group in sorted({group for tree in trees for group in tree["configs"]}):
        known = [tree["configs"].get(group, {}) for tree in trees]
        config_rows.append([group, *(_cell([g.get(c) for g in known]) for c in config_rows[0][1:])])
    totals = [
        [sum(group[c] for group in tree["configs"].values()) for tree in trees]
        for c in config_rows[0][1:]
    ]
    config_rows.append(["all", *map(_cell, totals)])
    title = f"{' → '.join(found)}\n\n" if len(found) > 1 else ""
    return title + "\n\n".join(map(_table, (rows, tree_rows, config_rows)))


def _cell(values: list[Any]) -> str:
    return " → ".join("–" if value is None else str(value) for value in values)


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in rows]
    rule = " | ".join("-" * max(3, width) for width in widths)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def main(argv: list[str] | None = None) -> int:
    """Measure the trees that the command line names, and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revision", nargs="*", help="of git; none for the working tree")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    given = parser.parse_args(argv)
    found = {
        revision or "working tree": House(read_tree(revision)).measure()
        for revision in given.revision or [None]
    }
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    print(tables(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
