"""The command line: help, words, config folders, sweeps."""

import os
import subprocess
import sys
import time

import pytest
import torch

import vistok
from helpers import CONFIGS, ROOT, TINY
from vistok.cli import main
from vistok.core.registry import registered

PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [name for name in ("torch", "lightning", "wandb") if name in sys.modules]
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("train.py", "experiment=vqgan_tiny"),
        ("eval.py", "run=runs/<run>"),
        ("scripts/export.py", "out="),
        ("scripts/make_shards.py", "shard_size"),
    ],
)
def test_help_is_quick_and_light(script, word):
    seconds = []
    for _ in range(2):  # the first reads the disk
        start = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", PROBE, str(ROOT / script), "--help"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        seconds.append(time.monotonic() - start)
        assert result.returncode == 0, result.stderr
        assert word in result.stdout
    assert min(seconds) < 3 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), seconds


def test_help_of_the_importer_names_every_source(cli):
    """It asks the registry, so it waits for torch."""
    code, lines, out = cli("import_weights", "--help")
    assert code == 0 and not lines
    assert len(registered("importer")) >= 8 and ", ".join(registered("importer")) in out


def test_help_may_be_cut_short():
    """As by `vistok --help | head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vistok.cli", "--help"]
    path = {**os.environ, "PYTHONPATH": str(ROOT / "tokenizers")}
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=path, timeout=60)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")


def test_train_help_lists_every_choice(cli):
    code, lines, out = cli("train", "--help")
    assert code == 0 and not lines
    for group in ("experiment", "quantizer", "tokenizer", "data", "logger"):
        for path in (CONFIGS / group).glob("*.yaml"):
            (line,) = [x for x in out.splitlines() if x.split()[:1] == [path.stem] and x[2] != " "][
                :1
            ]
            assert len(line.split()) > 3, f"{group}/{path.stem} has no line of its own: {line!r}"
    assert max(map(len, out.splitlines())) <= 102


def test_main_dispatches(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{vistok.__version__}\n"
    assert main([]) == 0 == main(["--help"])
    assert "make-shards" in capsys.readouterr().out
    assert main(["eval", "--help"]) == 0
    assert "metrics.json" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "code", "out", "err"),
    [
        ("--version", 0, f"{vistok.__version__}\n", ""),
        (
            "trian",
            2,
            "",
            "error: trian: no such command (did you mean 'train'?); try vistok --help\n",
        ),
    ],
)
def test_python_m_vistok_is_the_command(word, code, out, err):
    result = subprocess.run(
        [sys.executable, "-m", "vistok", word],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tokenizers")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout, result.stderr) == (code, out, err)


def test_cfg_prints_the_whole_config(cli):
    code, _, out = cli("train", "--cfg", "job", "quantizer.codebook_size=77")
    assert code == 0 and "codebook_size: 77" in out and "warmup_samples" in out


def test_user_config_folder(cli, tmp_path, photos, monkeypatch):
    mine = tmp_path / "my configs, {all}"  # a name that needs care
    (mine / "experiment").mkdir(parents=True)
    (mine / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n# My own run.\ndefaults:\n  - override /quantizer: fsq\n"
        "name: mine\nquantizer:\n  levels: [3, 3]\n"
    )
    tiny = [o for o in TINY if not o.startswith("quantizer.")]
    words = [*tiny, "data=folder", f"data.train={photos}", "data.image_size=16"]
    words += ["data.val_fraction=0.2", "trainer.max_steps=1", "experiment=mine"]
    code, lines, _ = cli("train", *words)
    assert code == 2 and "experiment=mine: no such config" in lines[0]
    code, lines, _ = cli("train", *words, "--config-dir", mine, "hydra.run.dir=a")
    assert code == 0, lines
    code, lines, _ = cli("train", *words, f"--config-dir={mine}", "hydra.run.dir=b")
    assert code == 0, lines
    monkeypatch.setenv("VISTOK_CONFIG_DIR", str(mine))
    code, lines, _ = cli("train", *words, "hydra.run.dir=c")
    assert code == 0, lines
    for run in "abc":
        assert vistok.load(tmp_path / run).codebooks()[0].shape[0] == 9
    code, _, out = cli("train", "--help")
    assert "My own run." in out


@pytest.mark.slow
def test_multirun_makes_one_run_for_each_combination(cli, tmp_path, photos):
    words = [*TINY, "data=folder", f"data.train={photos}", "data.image_size=16"]
    words += ["data.val_fraction=0.2", "trainer.max_steps=1", "hydra.sweep.dir=sweep"]
    code, lines, _ = cli("train", "--multirun", *words, "quantizer=ema_vq,vq", "seed=1,2")
    assert code == 0, lines
    runs = sorted((tmp_path / "sweep").glob("*/config.yaml"))
    assert len(runs) == 4
    books = [vistok.load(path.parent).codebooks()[0] for path in runs]
    assert not any(torch.equal(a, b) for a, b in zip(books, books[1:], strict=False))


def test_multirun_names_a_bad_job(fails):
    fails("train", "--multirun", "quantizer=ema_vq,fzq", words=("quantizer=fzq", "did you mean"))
    fails("train", "-m", "trainer.max_step=1,2", words="did you mean 'trainer.max_steps'")


def test_console_script_is_declared():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["vistok"] == "vistok.cli:main"
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["configs"] == "vistok/configs"
