"""Runs that several test files look at, each made once."""

import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers", "same_runs")

# Before torch is imported: processes that share cores with several threads each would wait for one
# another at every barrier.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("VISTOK_CONFIG_DIR", "VISTOK_DEBUG", "WANDB_API_KEY"):
    os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Mark the fast tier; files that take long come first, so that both processes end together."""
    long = set()
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("slow", "ranks", "nightly")):
            item.add_marker(pytest.mark.fast)
        elif not item.get_closest_marker("nightly"):
            long.add(item.path)
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of 22 synthetic pictures, 24 px."""
    from helpers import make_photos

    return make_photos(tmp_path_factory.mktemp("pictures") / "photos")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, photos) -> Path:
    """A finished run of 7 steps with its validation at 4 and at the end; do not write to it."""
    from helpers import tiny_words
    from vistok.cli import train

    run = tmp_path_factory.mktemp("finished") / "run"
    code = train(
        [
            *tiny_words(photos),
            "trainer.max_steps=7",
            "baseline.patch_size=8",
            "baseline.num_patches=60",
            f"hydra.run.dir={run}",
        ]
    )
    assert code == 0
    return run


@pytest.fixture(scope="session")
def exported(tmp_path_factory, finished_run) -> Path:
    """The export of `finished_run`; do not write to it."""
    from vistok.cli import export

    out = tmp_path_factory.mktemp("exported") / "tokenizer"
    assert export([f"run={finished_run}", f"out={out}"]) == 0
    return out


@pytest.fixture
def cli(capfd, monkeypatch, tmp_path):
    """Call a command in an empty folder; returns (exit code, lines of stderr, stdout)."""
    import vistok.cli

    monkeypatch.chdir(tmp_path)

    def call(command: str, *argv: object) -> tuple[int, list[str], str]:
        capfd.readouterr()
        code = getattr(vistok.cli, command)([str(a) for a in argv])
        captured = capfd.readouterr()
        return code, captured.err.splitlines(), captured.out

    return call


@pytest.fixture
def fails(cli):
    """Call a command that must fail with one line that contains all of `words`."""

    def call(command: str, *argv: object, words: tuple[str, ...] | str = ()) -> str:
        code, lines, out = cli(command, *argv)
        assert code != 0, out
        assert len(lines) == 1, "\n".join(lines)
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0] + out
        for word in [words] if isinstance(words, str) else words:
            assert word in lines[0], lines[0]
        return lines[0]

    return call
