"""English of what the program says: no phrase of the list comes back, and plurals are right."""

import ast
import re
from types import SimpleNamespace

import pytest

from helpers import CONFIGS, ROOT
from vistok.core.terminal import columns, counted, typed, wrapped

#: Phrases that no native speaker would write, or that were misread by users.
BAD = (
    r"(?<!there )\bis no (?!longer)",
    r"(?<!there )\bare no (?!longer)",
    r"\bcannot be(?=[;,.]|$)",
    r"\bcan be(?=[;,.]|$)",
    r"\bbeside\b",
    r"\ball is well\b",
    r"\bis there already\b",
    r"\bare there already\b",
    r"\bof everything\b",
    r"\bof ours\b",
    r"\bof one's own\b",
    r"\bare they\b",
    r"\bholds no (?:checkpoint|config|plain)",
    r"\bgrey\b",
    r"\bcolour",
    r"\bhas a usage\b",
    r"\bno choice of it\b",
    r"\bis not to be expected\b",
    r"\bwhich (?:run|folder)\b(?!\?)",
    r"\bAccelerator x\b",
    r"\b1 (?:shards|images|problems|workers|processes|configs|bytes|samples|tries)\b",
    r"\{[^{}]*\} (?:shards|images|problems|workers|processes|configs|samples)\b(?!/)",
)

#: Counts that are above 1 wherever they are told, or of which only the many is told.
ALLOWED = (
    "images reach their psnr",
    "training and",
    "images cannot be used, more than",
    "validation images",
    "images per device cannot be divided",
    "images, but",
    "images in a row",
    "x {",
)


def strings(path):
    """(line, text) of every string that is not a docstring; f-strings with {expressions}."""
    tree = ast.parse(path.read_text())
    docs, parts, found = set(), set(), []
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            docs.add(id(body[0].value))
        if isinstance(node, ast.JoinedStr):
            text = ""
            for value in node.values:
                parts.update(id(part) for part in ast.walk(value))
                is_text = isinstance(value, ast.Constant)
                text += str(value.value) if is_text else f"{{{ast.unparse(value.value)}}}"
            found.append((node.lineno, text))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [(node.lineno, node.value)] * (id(node) not in docs | parts)
    return found


def wrong(text):
    return [
        phrase
        for phrase in BAD
        if re.search(phrase, text) and not any(allowed in text for allowed in ALLOWED)
    ]


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "tokenizers" / "vistok").rglob("*.py")),
    ids=lambda path: "/".join(path.parts[-2:]),
)
def test_no_bad_phrase_in_a_message(path):
    found = [f"{path.name}:{n}: {text!r}" for n, text in strings(path) if wrong(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_bad_phrase_in_a_config(path):
    comments = [line.partition("#")[2] for line in path.read_text().splitlines()]
    found = [comment for comment in comments if wrong(comment)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "shard_size=big is no size",
        "data.channels=2; 1 (grey), 3 (RGB) and 4 (with alpha) can be",
        "null cannot be; such as seed=0",
        "{n} shards, {samples} images, {size} MB: all is well",
        "out=x: is there already; use overwrite=true",
        "weights: 'x' is missing; are they what source= says?",
        "{path}: holds no checkpoints/last.ckpt and no model.safetensors",
        "no index beside the shard",
        "in {len(shards)} shards, {size} MB",
    ],
)
def test_the_list_finds_what_users_met(text):
    assert wrong(text)


def test_counts_take_their_nouns_with_them():
    said = [counted(n, noun) for n in (0, 1, 2) for noun in ("shard", "batch", "CPU process")]
    assert said == [
        "0 shards", "0 batches", "0 CPU processes",
        "1 shard", "1 batch", "1 CPU process",
        "2 shards", "2 batches", "2 CPU processes",
    ]  # fmt: skip


def test_the_trainer_is_told_in_words():
    from vistok.training.trainer import in_words

    class CPUAccelerator: ...

    class CUDAAccelerator: ...

    def trainer(**values):
        return SimpleNamespace(**values)

    alone = trainer(
        max_steps=880,
        world_size=1,
        accumulate_grad_batches=1,
        accelerator=CPUAccelerator(),
        precision="bf16-mixed",
    )
    assert in_words(alone, 32) == "880 steps of 32 images on 1 CPU process in bf16"
    many = trainer(
        max_steps=1,
        world_size=4,
        accumulate_grad_batches=2,
        accelerator=CUDAAccelerator(),
        precision="32-true",
    )
    assert in_words(many, 8) == "1 step of 64 images in 8 batches on 4 GPUs in float32"


def test_commands_are_named_as_they_were_typed(monkeypatch):
    for program, train, export, listed in (
        ("/x/train.py", "uv run train.py", "uv run scripts/export.py", "uv run vistok list"),
        ("scripts/make_shards.py", "uv run train.py", "uv run scripts/export.py", "uv run vistok list"),
        ("/x/bin/vistok", "vistok train", "vistok export", "vistok list"),
        ("/x/vistok/__main__.py", "vistok train", "vistok export", "vistok list"),
        ("my_training.py", "vistok train", "vistok export", "vistok list"),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", [program])
        assert (typed("train"), typed("export"), typed("list")) == (train, export, listed)


@pytest.mark.parametrize("across", [40, 63, 80, 100])
def test_text_is_wrapped_between_words(across, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(across))
    sentence = "A sentence of the usual length, with-hyphens and/or slashes, in short."
    words = sentence.split() * 4
    long = "https://arxiv.org/abs/" + "0" * 90
    lines = wrapped(" ".join([*words, long])).splitlines()
    assert " ".join(lines).split() == [*words, long]
    assert max(len(line) for line in lines if long not in line) <= across
    table = columns([("key", " ".join(words)), ("k" * 45, "short"), ("bare", "")]).splitlines()
    assert " ".join(table).split() == ["key", *words, "k" * 45, "short", "bare"]
    assert max(map(len, table)) <= max(across, 47)
