"""Mutation check: change places of the package at random, and see whether tests notice.

    python tests/mutate.py --count 50 --seed 0             # the full tier for each
    python tests/mutate.py --count 10 --related --of quantizers
    python tests/mutate.py --show --count 50               # lists the changes, and runs nothing

Works in a clone of HEAD. Each change is one of: a comparison, an operator, a condition or a flag
turned round, a number one larger, two arguments swapped, a statement dropped. The test files that
name the changed module, its folder or its classes run first, quick ones before slow ones, and with
`--related` alone. A change that no test notices is reported as survived; some of those change
nothing that can be seen.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("tokenizers/vistok")

#: Each class of operators, and what stands in its place.
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


class Change(NamedTuple):
    """A node of a file, and the source to put in its place."""

    path: Path
    node: ast.AST
    text: str

    def __str__(self) -> str:
        old = " ".join(ast.unparse(self.node).split())[:70]
        return f"{self.path}:{self.node.lineno}: {old}  ->  {' '.join(self.text.split())[:70]}"  # type: ignore[attr-defined]

    def applied(self, source: bytes) -> bytes:
        """Return the source of the file with the change."""
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        node: ast.expr = self.node  # type: ignore[assignment]
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        return source[:begin] + self.text.encode() + source[end:]


def code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what is computed below a node: no annotations, messages of errors or f-strings."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr | ast.Raise):
                yield child
                yield from code(child)


def replacements(node: ast.AST) -> Iterator[str]:
    """Yield the source of each changed form of a node."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in SWAPS:
        new.ops[0] = SWAPS[type(new.ops[0])]()
        yield f"({ast.unparse(new)})"
    elif isinstance(new, ast.BinOp | ast.BoolOp) and type(new.op) in SWAPS:
        new.op = SWAPS[type(new.op)]()
        yield f"({ast.unparse(new)})"
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub):
        yield f"({ast.unparse(new.operand)})"
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        yield str(not new.value)
    elif isinstance(new, ast.Constant) and isinstance(new.value, int | float):
        yield str(new.value + 1)
    elif isinstance(new, ast.Call) and len(new.args) >= 2:
        if not any(isinstance(a, ast.Starred) for a in new.args[:2]):
            new.args[:2] = new.args[1::-1]
            yield ast.unparse(new)
    elif isinstance(new, ast.AugAssign) or (
        isinstance(new, ast.Expr) and not isinstance(new.value, ast.Constant | ast.Yield)
    ):
        yield "pass"
    elif isinstance(new, ast.If | ast.IfExp | ast.While):
        pass  # their conditions are nodes of their own


def changes(root: Path, part: str) -> list[Change]:
    """Return all changes of the files whose path contains `part`."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        relative = path.relative_to(root)
        if part in str(relative):
            for node in code(ast.parse(path.read_text())):
                found += [Change(relative, node, text) for text in replacements(node)]
    return found


def related(root: Path, path: Path) -> list[str]:
    """Return the test files that name a module, its class or its folder; the most specific first."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    tree = ast.parse((root / path).read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    scores = {}
    for test in sorted((root / "tests").rglob("test_*.py")):
        text = test.read_text()
        own = f"from {module} import" in text or f"import {module}" in text
        parts = path.stem in test.stem or path.parent.name in test.stem
        score = 4 * own + 2 * parts + any(name in text for name in names if name[0] != "_")
        if score or path.parent.name in test.parts:
            scores[str(test.relative_to(root))] = score
    first = sorted(scores, key=lambda name: -scores[name])[:12]
    return first or ["tests/test_pipeline.py"]


def failing(clone: Path, tests: list[str], limit: float) -> str:
    """Run tests in the clone; return the first that failed, or why there is none, or ""."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(
            [*command, *tests], cwd=clone, env=environment, capture_output=True, text=True, timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end in {limit:.0f} s"
    if result.returncode in (0, 5):  # 5: no test of that kind
        return ""
    lines = result.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return (failed or lines[-1:] or ["pytest failed"])[0]


class Tests:
    """Runs tests of a clone; those that fail without a change are left out from then on."""

    def __init__(self, clone: Path, limit: float) -> None:
        self.clone, self.limit = clone, limit
        self.broken: list[str] = []

    def notice(self, change: Change, tests: list[str]) -> str:
        """Return the first test that fails with the change and passes without it, or ""."""
        path = self.clone / change.path
        before = path.read_bytes()
        while True:
            path.write_bytes(change.applied(before))
            left_out = [f"--deselect={name}" for name in self.broken]
            failed = failing(self.clone, [*tests, *left_out], self.limit)
            path.write_bytes(before)
            kind, _, rest = failed.partition(" ")
            name = rest.partition(" - ")[0]
            if kind not in ("FAILED", "ERROR") or not failing(
                self.clone, ["-n", "0", name], self.limit
            ):
                return failed
            print(f"      fails without a change: {name}", flush=True)
            self.broken.append(name)


def main() -> int:
    """Change, test and report; the exit code is 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", default="", help="only files whose path contains this")
    parser.add_argument("--related", action="store_true", help="only the tests that name the file")
    parser.add_argument("--half", type=int, choices=(1, 2), help="only every other change")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one run of tests")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        found = changes(clone, given.of)
        chosen = random.Random(given.seed).sample(found, min(given.count, len(found)))
        chosen = chosen[given.half - 1 :: 2] if given.half else chosen
        if given.show:
            print(*chosen, sep="\n")
            return 0
        tests, killed = Tests(clone, given.limit), 0
        for number, change in enumerate(chosen, 1):
            own = ["-n", "0", *related(clone, change.path)]
            notice = tests.notice(change, [*own, "-m", "fast"]) or tests.notice(
                change, [*own, "-m", "(slow or ranks) and not nightly"]
            )
            if not notice and not given.related:
                notice = tests.notice(change, [])
            killed += bool(notice)
            print(f"{number:3d} {'killed  ' if notice else 'SURVIVED'} {change}", flush=True)
            print(f"      {notice[:150]}", flush=True)
    print(f"{killed} of {len(chosen)} killed; {len(found)} places in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
