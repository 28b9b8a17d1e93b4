"""The command line: help, words, config folders, sweeps."""

import os
import subprocess
import sys
import time

import pytest
import torch

import vistok
from helpers import CONFIGS, ROOT, TINY
from vistok.cli import main, train

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
        ("scripts/import_weights.py", "maskgit_vqgan"),
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


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Training that only takes note of what it is given; and how often Hydra composed."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.hydra_config import HydraConfig

    seen = {"composed": 0}
    compose = ConfigLoaderImpl.load_configuration

    def counted(self, *args, **kwargs):
        seen["composed"] += 1
        return compose(self, *args, **kwargs)

    def run(config, folder, checkpoint=None, words=None):
        seen.update(config=config, folder=str(folder), words=words, argv=sys.argv[1:])
        seen.update(hydra=HydraConfig.initialized(), mark=os.environ.get("MARK"))

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    monkeypatch.setattr("vistok.cli._run_training", run)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # as in a fresh process
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["data=folder", "data.train=/photos/{a,b}", "name=mine", "trainer.precision=bf16"],
        ["experiment=vqgan_tiny", "init_from=null", "seed=3", "~baseline", "+quantizer.foo=x"],
        ["baseline=null", "resume=null", "data.image_size=[16,32]", "trainer.max_steps=7"],
    ],
)
def test_a_plain_run_composes_once(started, words):
    """And what it is given is what Hydra's own main gives."""
    folder = "hydra.run.dir='runs/a b/${name}_${hydra.job.name}_${hydra.job.override_dirname}'"
    argv = sys.argv
    assert train([*words, folder]) == 0 and sys.argv is argv
    first = dict(started)
    assert first["composed"] == 1 and not first["hydra"]
    assert train([*words, folder, "hydra.verbose=false"]) == 0 and sys.argv is argv
    assert started["composed"] > 2 and started["hydra"]
    for part in ("config", "folder", "words"):
        assert started[part] == first[part]
    assert os.path.isdir(first["folder"])
    # The other ranks, which start with these words, are given the same.
    assert train(first["argv"]) == 0
    assert {**started, "composed": 0} == {**first, "composed": 0}


def test_what_only_hydra_can_do_is_left_to_it(started, tmp_path):
    assert train(["+hydra.job.env_set.MARK=here", "hydra.run.dir=a"]) == 0
    assert started["hydra"] and started["mark"] == "here"
    mine = tmp_path / "mine" / "experiment"
    mine.mkdir(parents=True)
    text = "# @package _global_\nname: {}\n"
    (mine / "plain.yaml").write_text(text.format("plain"))
    assert train(["experiment=plain", f"--config-dir={tmp_path}/mine", "hydra.run.dir=b"]) == 0
    assert not started["hydra"] and started["config"]["name"] == "plain"
    assert f"--config-dir={tmp_path}/mine" in started["argv"]
    more = "hydra:\n  job:\n    env_set:\n      MARK: there\n"
    (mine / "more.yaml").write_text(text.format("more") + more)
    assert train(["experiment=more", f"--config-dir={tmp_path}/mine", "hydra.run.dir=c"]) == 0
    assert started["hydra"] and started["mark"] == "there"


def test_a_run_that_fails_at_once_leaves_no_folder(fails, tmp_path):
    fails("train", "quantizer.codebook_size=1", "hydra.run.dir=runs/here", words="codebook_size=1")
    assert not (tmp_path / "runs" / "here").exists()


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
