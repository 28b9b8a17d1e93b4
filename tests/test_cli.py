"""The command line: help, words, config folders, sweeps."""

import os
import subprocess
import sys

import pytest
import torch

import vistok
from helpers import CONFIGS, PATIENCE, ROOT, TINY
from vistok.cli import main, train
from vistok.core.configuration import header, notes
from vistok.core.registry import registered

PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"hydra", "lightning", "rich", "timm", "torch", "torchmetrics", "wandb"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("train.py", "uv run train.py resume=runs/<run>"),
        ("eval.py", "run=runs/<run>"),
        ("scripts/export.py", "out="),
        ("scripts/import_weights.py", "maskgit_vqgan"),
        ("scripts/make_shards.py", "shard_size"),
        ("scripts/check_shards.py", "decode=false"),
        ("scripts/bench_data.py", "seconds=8"),
    ],
)
def test_help_is_light(script, word):
    """It comes at once, since it imports none of what takes its time."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(ROOT / script), "--help"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    assert word in result.stdout


@pytest.mark.parametrize("words", [["--help"], ["list", "experiments"]], ids=" ".join)
def test_help_may_be_cut_short(words):
    """As by `vistok --help | head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vistok", *words]
    path = {**os.environ, "PYTHONPATH": str(ROOT / "tokenizers")}
    result = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=path, timeout=PATIENCE
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")


COMMANDS = ("train", "evaluate", "export", "import_weights", "list_configs")
COMMANDS += ("make_shards", "check_shards", "bench_data")
COMMANDS += ("tokenize", "detokenize", "vocabulary", "near_codes")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_one_screen(command, cli, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/make_shards.py"])  # whose commands are longer
    monkeypatch.setenv("COLUMNS", "80")
    code, errors, out = cli(command, "--help")
    lines = out.splitlines()
    assert code == 0 and not errors
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert "\x1b" not in out and not [line for line in lines if line != line.rstrip()]


def test_train_help_shows_keys_that_exist(cli):
    from vistok.core.configuration import compose

    _, _, out = cli("train", "--help")
    keys = out.partition("Main keys, for example\n")[2].partition("\n\n")[0].splitlines()
    words = [line.split()[0] for line in keys if line[2] != " "]
    assert len(words) == 8 and "quantizer.codebook_size=4096" in words
    assert compose("train", words).quantizer.codebook_size == 4096


@pytest.mark.parametrize("count", [1, 2, 4, 60])
def test_train_help_shows_the_experiments_there_are(count, cli, tmp_path, monkeypatch):
    """Whatever they are called, the default first; and with many of them it stays short."""
    folder = tmp_path / "configs"
    (folder / "experiment").mkdir(parents=True)
    for n in range(count):
        text = "# Default: the last one.\n" if n == count - 1 else f"# Number {n}.\n"
        (folder / "experiment" / f"system{n:02d}_tiny.yaml").write_text(text)
    (folder / "experiment" / "system_l256.yaml").write_text("# Days on a GPU.\n")
    monkeypatch.setattr("vistok.core.configuration.config_dir", lambda: folder)
    _, _, out = cli("train", "--help")
    shown = out.partition("\nExperiments")[2].partition("\n\n")[0].splitlines()[1:]
    assert shown[0].split() == [f"system{count - 1:02d}_tiny", "Default:", "the", "last", "one."]
    assert shown[1:3] == [f"  system{n:02d}_tiny  Number {n}." for n in range(min(count - 1, 2))]
    assert count < 4 or shown[3].startswith("  and system02_tiny")
    assert len(shown) == {1: 1, 2: 2, 4: 4, 60: 5}[count] and "system_l256" not in out
    assert shown[-1].endswith(" ...") == (count == 60)


def test_import_help_names_every_importer(cli):
    """It reads their names off the sources; the registry has them from importing those."""
    _, _, out = cli("import_weights", "--help")
    named = out.partition("Keys\n  source=")[2].partition("weights=")[0]
    assert " ".join(named.split()).split(", ") == ["auto", *registered("importer")]


def entries(out):
    """Names and texts of a listing whose columns are put back together."""
    found = {}
    for line in out.splitlines():
        if line.startswith("  ") and line[2] != " ":
            name, _, text = line.strip().partition(" ")
            found[name] = text.strip()
        elif line.startswith("   "):
            found[name] += f" {line.strip()}"
    return found


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("group", [p.name for p in CONFIGS.iterdir() if p.is_dir() and p.name != "hydra"])  # fmt: skip
def test_list_tells_every_choice_and_cuts_no_word(group, columns, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    paths = {path.stem: path for path in (CONFIGS / group).glob("[!_]*.yaml")}
    code, _, out = cli("list_configs", group)
    if code == 0 and len(paths) > 1:
        assert max(map(len, out.splitlines())) <= columns and "\x1b" not in out
        assert entries(out) == {name: header(path) for name, path in paths.items()}
    assert code == 0 and set(paths) <= set(out.replace("=", " ").split())


def test_list_finds_words_in_names_and_notes(cli):
    _, _, all_of_them = cli("list_configs", "quantizers")
    code, _, out = cli("list_configs", "quantizers", "entropy")
    expected = [
        path.stem
        for path in (CONFIGS / "quantizer").glob("*.yaml")
        if "entropy" in f"{path.stem} {' '.join(notes(path))}".lower()
    ]
    assert code == 0 and sorted(entries(out)) == sorted(expected)
    assert 1 < len(expected) < len(entries(all_of_them))
    assert cli("list_configs", "quantizer", "ENTROPY")[2] == out
    _, _, one = cli("list_configs", "experiments", "titok_l32")  # all of its notes
    assert "https://arxiv.org/abs/2406.07550" in one and "override /loss" not in one
    code, _, out = cli("list_configs")
    names = ("experiments", "tokenizers", "quantizers", "losses", "adversaries", "stages", "data")
    assert code == 0 and all(name in out.split() for name in names)


def test_list_fails_in_one_line(fails):
    fails("list_configs", "experimnts", words=("no such group", "did you mean 'experiments'"))
    fails("list_configs", "quantizers", "emavq", words=("emavq", "did you mean 'ema_vq'"))
    fails("list_configs", "--config-dir=/nope", words=("/nope", "no such config folder"))
    fails("list_configs", "experiments", "--all", words="--all: no such option")


def test_notes_are_wrapped_as_sentences_and_commands_stay_whole(cli, tmp_path, monkeypatch):
    """A folder of one's own counts too; of two files with one name, ours is chosen."""
    monkeypatch.setenv("COLUMNS", "60")
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "_base.yaml").write_text("# Not a choice.\n")
    (tmp_path / "loss" / "l1.yaml").write_text("# Not ours.\n")
    command = f"train.py loss=mine {'x' * 70} \\\n#     y=1"
    sentence = "A first sentence that goes on\n# in a second line. And another: one."
    (tmp_path / "loss" / "mine.yaml").write_text(
        f"# @package _global_\n# {sentence}\n# {command}\n"
    )
    code, _, out = cli("list_configs", "losses", "--config-dir", tmp_path)
    assert code == 0 and "Not" not in out
    assert entries(out)["mine"] == "A first sentence that goes on in a second line."
    code, _, out = cli("list_configs", "losses", "mine", f"--config-dir={tmp_path}")
    assert out == (
        "loss=mine\n\n  A first sentence that goes on in a second line. And\n  another: one.\n"
        f"  train.py loss=mine {'x' * 70} \\\n      y=1\n"
    )


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
        timeout=PATIENCE,
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
        assert folder.is_dir()

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    monkeypatch.setattr("vistok.starting._run_training", run)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # as in a fresh process
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["data=shards", "data.train=/photos/{a,b}.tar", "name=mine", "trainer.precision=bf16"],
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
    # The other ranks, which start with these words, are given the same.
    assert train(first["argv"]) == 0
    assert {**started, "composed": 0} == {**first, "composed": 0}


@pytest.mark.parametrize("more", [[], ["hydra.verbose=false"]])
def test_other_ranks_start_with_the_same_command(started, monkeypatch, more):
    words = ["name=mine", *more]
    monkeypatch.setattr(sys, "argv", ["vistok", "train", *words])
    assert train(words) == 0
    assert started["argv"][:2] == ["train", "name=mine"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert train(words) == 0
    assert started["argv"][0] == "name=mine"


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
    code, _, out = cli("list_configs", "experiments", "own run")
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


def test_tools_read_their_words_in_one_way():
    from vistok.core.errors import ConfigError
    from vistok.tools.words import Option, Tool, flag, fraction, names, seconds, size, whole

    given = {}

    def run(place, values):
        given.update(values, place=place)
        return 7

    options = {
        "to": Option("a word", default=None, example="here"),
        "on": Option("a flag", flag, "true"),
        "count": Option("a number", whole(2), "3"),
        "bytes": Option("a size", size, "1kb"),
        "share": Option("a fraction", fraction, "0"),
        "wait": Option("a time", seconds, "2.5"),
        "kinds": Option("names", names),
    }
    tool = Tool("try", "Try it.", "PLACE", "place", "A place.", options, run)
    assert tool(["./a=b", "to=x", "debug=true"]) == 7
    first = ("./a=b", "x", True, 3, 1000, 0.0, 2.5, None)
    assert tuple(given[name] for name in ("place", *options)) == first
    tool(["p", "to=x=y", "on=no", "count=2", "bytes=1.5GiB", "share=.5", "wait=1", "kinds=.A, b,a"])
    second = ("p", "x=y", False, 2, 3 * 2**29, 0.5, 1.0, ("a", "b"))
    assert tuple(given[name] for name in ("place", *options)) == second
    for words, message in (
        ([], None),
        (["p"], "to= is not set; for example to=here"),
        (["to=x"], "expected one place, found none; see --help"),
        (["p", "q", "to=x"], "expected one place, found p q; see --help"),
        (["p", "too=x"], "too=: no such option (did you mean 'to'?); see --help"),
        (["p", "to=x", "on=maybe"], "on=maybe: must be true or false"),
        (["p", "to=x", "count=1"], "count=1: must be a whole number, 2 or more"),
        (["p", "to=x", "count=2.0"], "count=2.0: must be a whole number, 2 or more"),
        (["p", "to=x", "bytes=0MB"], "bytes=0MB: must be a size, for example 300MB or 1GB"),
        (["p", "to=x", "share=1"], "share=1: must be at least 0 and below 1"),
        (["p", "to=x", "wait=nan"], "wait=nan: must be a number of seconds above 0"),
    ):
        if message is None:
            assert tool(words) == 2  # and prints its help
            continue
        with pytest.raises(ConfigError) as error:
            tool(words)
        assert str(error.value) == message


def test_an_interrupted_tool_says_how_to_go_on(monkeypatch, capsys):
    from vistok.cli import make_shards
    from vistok.tools import make_shards as module

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "make_shards", interrupted)
    assert make_shards(["/photos", "out=/nowhere"]) == 130
    assert capsys.readouterr().err == "error: interrupted; the same command continues\n"
