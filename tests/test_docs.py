"""The pages say what is there: links lead somewhere, names are configs, commands compose."""

import re
import shlex
from functools import cache

import pytest
from omegaconf import OmegaConf

from helpers import CONFIGS, ROOT
from vistok.core.configuration import all_keys, compose, options, sweep
from vistok.core.words import quoted

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "data" / "README.md"])

GROUPS = ("experiment", "tokenizer", "quantizer", "loss", "alignment", "adversary", "stage", "data")

#: The config of a command, by what it is called.
COMMANDS = {
    **dict.fromkeys(("train.py", "vistok train"), "train"),
    **dict.fromkeys(("eval.py", "vistok eval"), "eval"),
    **dict.fromkeys(("export.py", "vistok export"), "export"),
    **dict.fromkeys(("import_weights.py", "vistok import-weights"), "import"),
    **dict.fromkeys(("vistok tokenize",), "tokenize"),
    **dict.fromkeys(("vistok detokenize",), "detokenize"),
    **dict.fromkeys(("vistok vocabulary",), "vocabulary"),
    **dict.fromkeys(("vistok near-codes",), "near_codes"),
}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def by_page(function):
    return pytest.mark.parametrize("page", PAGES, ids=name_of)(function)


def fenced(text):
    """Return (language, block) of what lies between lines of three backticks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)


def unfenced(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page):
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", unfenced(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_links(page, text):
    prose = re.sub(r"`[^`\n]*`", "", unfenced(text))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@by_page
def test_links_lead_somewhere(page):
    assert not list(wrong_links(page, page.read_text()))


def wrong_names(text):
    """Yield `group=name` of which there is no config, and that the page does not make itself."""
    own = set(re.findall(r"\b(\w+)/(\w+)\.yaml", text))
    for line in text.splitlines():
        if "--config-dir" in line:
            continue
        for group, names in re.findall(rf"(?<![\w.])({'|'.join(GROUPS)})=([\w,|]+)", line):
            for name in re.split(r"[,|]", names):
                if not (
                    name in options(group) or (group, name) in own or name.isupper() or not name
                ):
                    yield f"{group}={name}"


@by_page
def test_names_are_configs(page):
    assert not list(wrong_names(page.read_text()))


def commands(text):
    """Yield (config, words) of each command of a page, in blocks and in lines of text."""
    pieces = [
        block.replace("\\\n", " ") for language, block in fenced(text) if language != "python"
    ]
    pieces += re.findall(r"`([^`\n]+)`", unfenced(text))
    for line in "\n".join(pieces).splitlines():
        for part in line.split("&&"):
            found = re.search(rf"(?<![\w-])({'|'.join(map(re.escape, COMMANDS))})(?: (.*))?$", part)
            if found and "--config-dir" not in part:
                words = shlex.split(found[2] or "", comments=True)
                yield COMMANDS[found[1]], tuple(w for w in words if w not in ("...", "[key=value"))


@cache
def composed(config, choices):
    return compose(config, choices)


@cache
def keys_of(config, choices):
    return frozenset(all_keys(composed(config, choices)))


def chooses(word):
    return (CONFIGS / word.lstrip("+").partition("=")[0]).is_dir()


def is_there(word):
    """Return whether a choice is a config; `test_names_are_configs` says whether it must be."""
    group, _, name = word.lstrip("+").partition("=")
    return name in options(group)


def wrong_words(config, words):
    """Yield the words of a command that name no key of its config."""
    given = [w for w in words if "=" in w and not w.startswith(("hydra", "--"))]
    if config in ("eval", "tokenize", "near_codes"):  # data and sizes are those of the run
        yield from wrong_words("train", [w for w in given if w.startswith(("data.", "data="))])
        given = [w for w in given if not w.startswith(("data.", "data="))]
    jobs = sweep([quoted(w) for w in given]) if "--multirun" in words else [given]
    for job in jobs:
        keys = keys_of(config, tuple(filter(is_there, filter(chooses, job))))
        for word in (w for w in job if not chooses(w)):
            key, added = word.partition("=")[0].lstrip("+~"), word.startswith("+")
            if not (key in keys or any(k.startswith(f"{key}.") for k in keys)):
                parent = key.rpartition(".")[0]
                if not (added and any(k.startswith(f"{parent}.") for k in keys)):
                    yield word


@by_page
def test_commands_compose(page):
    wrong = [
        f"{config}: {word}"
        for config, words in commands(page.read_text())
        for word in wrong_words(config, words)
    ]
    assert not wrong


def test_the_checks_see_what_is_wrong():
    page = ROOT / "docs" / "architecture.md"
    links = "[a](nothing.md) [b](#no-such-heading) [c](add_a_tokenizer.md) [d](https://x.org)"
    assert list(wrong_links(page, links)) == ["nothing.md", "#no-such-heading"]
    names = "quantizer=vq,vqq loss=NAME experiment=mine tokenizer/mine.yaml tokenizer=mine"
    assert list(wrong_names(names)) == ["quantizer=vqq", "experiment=mine"]
    text = "```\nuv run train.py experiment=vqgan_tiny \\\n  trainer.max_step=3 seed=1 # x=1\n```\n`eval.py run=x dataval=1`"
    found = list(commands(text))
    assert found == [
        ("train", ("experiment=vqgan_tiny", "trainer.max_step=3", "seed=1")),
        ("eval", ("run=x", "dataval=1")),
    ]
    assert [list(wrong_words(*each)) for each in found] == [["trainer.max_step=3"], ["dataval=1"]]
    assert (
        OmegaConf.select(composed("train", ("loss=l1",)), "loss.terms.reconstruction._target_")
        == "l1"
    )


def test_pages_are_short():
    """All but the guide that shows every file of a system in full."""
    pages = [page for page in PAGES if page.name != "add_a_tokenizer.md"]
    long = {name_of(p): n for p in pages if (n := len(p.read_text().splitlines())) > 255}
    assert not long


def test_blocks_of_python_parse():
    blocks = [
        (name_of(p), b) for p in PAGES for lang, b in fenced(p.read_text()) if lang == "python"
    ]
    assert len(blocks) > 10
    for page, block in blocks:
        compile(block, page, "exec")
