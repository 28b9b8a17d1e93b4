"""Files from untrusted sources are refused in one line that names file and place, and run no code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import CONFIGS, ROOT, TINY, config_of
from vistok.core.errors import CheckpointError, ConfigError
from vistok.core.schema import TOKENS, TRAIN, check_run, check_sizes
from vistok.core.values import rule_of
from vistok.core.yaml_file import read_yaml

# ---------------------------------------------------------------------- YAML

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line .*: stands for more than 20000 values"),
        ("a: &a [*a]\n", "line 1: refers to itself"),
        ("[" * 50_000, "nested too deeply"),
        ("a: 1\nb: [\n", "line 3: not YAML"),
        ("a: 1\na: 2\n", "line 1: the key a is there twice"),
        ("a: !!python/object/apply:os.mkdir [x]\n", "line 1: not YAML: could not determine"),
        ("a: {1: 2}\n", "a.1: a key must be a word"),
        ("a: ${oc.env:HOME}\n", "a stored config has no references"),
        ("- 1\n", "holds no keys"),
        ("", "holds no keys"),
        ("a: " + "x" * (1 << 20), "too large"),
        ("a: !!binary aGk=\n", "bytes is not a plain value"),
    ],
)
def test_yaml_of_strangers(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        read_yaml(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_yaml_that_is_not_text(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(CheckpointError, match=r"not text in UTF-8 \(byte 3\)"):
        read_yaml(tmp_path / "config.yaml")


def test_yaml_that_is_fine(tmp_path):
    text = "a: 1e-3\nb: 1.0e-4\nc: 2020-01-01\nd: [1, 2.5, true, null, x]\ne: &e {f: 3}\ng: *e\nh: '1'\n"
    (tmp_path / "c.yaml").write_text(text)
    found = read_yaml(tmp_path / "c.yaml")
    assert found == {
        "a": 1e-3, "b": 1e-4, "c": "2020-01-01", "d": [1, 2.5, True, None, "x"],
        "e": {"f": 3}, "g": {"f": 3}, "h": "1",
    }  # fmt: skip
    config = config_of()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert read_yaml(tmp_path / "run.yaml") == config


# ---------------------------------------------------------------------- every key


def keys_of(group):
    """The keys that the files of a group have, by dotted path from the top."""
    keys = set()
    for path in (CONFIGS / group).glob("*.yaml"):
        config = yaml.safe_load(path.read_text()) or {}
        keys |= set(config) - {"defaults", "_target_"}
    return keys


@pytest.mark.parametrize("group", ["trainer", "optimizer", "callbacks", "logger", "data"])
def test_every_key_of_a_group_has_a_rule(group):
    known = TRAIN[group] | (TOKENS if group == "data" else {})
    assert not keys_of(group) - set(known)
    for wanted in known.values():
        assert rule_of(wanted[0] if isinstance(wanted, tuple) else wanted) is not None


def test_every_key_of_the_top_level_has_a_rule():
    top = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    groups = {*TRAIN, "tokenizer", "quantizer", "loss", "hydra", "defaults"}
    assert set(top) - groups - set(TRAIN[""]) == set()
    assert set(top["ema"]) == set(TRAIN["ema"]) and set(top["baseline"]) == set(TRAIN["baseline"])


NEVER = {"nonsense": "x y z", "nan": float("nan"), "huge": 10**30, "negative": -(10**9)}
NEVER |= {"list": [[1], [2]], "group": {"a": 1}}


@pytest.mark.parametrize("wrong", NEVER)
def test_no_number_takes_nonsense(wrong):
    """Every number, flag and choice, by its full key; text takes text."""
    for group, keys in TRAIN.items():
        for key in keys:
            config = config_of()
            part = config if not group else config[group]
            if key not in part or (isinstance(part[key], str) and wrong == "nonsense"):
                continue
            if (group, key) in {("data", "train"), ("data", "val"), ("data", "sources")}:
                continue
            if NEVER[wrong] == "x y z" and key in (
                "resume",
                "init_from",
                "init_parts",
                "plugins",
                "tokens",
            ):
                continue
            if (group, key) in {("stage", "frozen"), ("data", "cache_dir"), ("logger", "project")}:
                continue
            if group == "stage" or (group, key, wrong) == ("data", "buckets", "list"):
                continue
            part[key] = NEVER[wrong]
            with pytest.raises(ConfigError) as error:
                check_run(config)
            full = f"{group}.{key}" if group else key
            assert str(error.value).startswith(f"{full}="), str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.limit_val_batches", 0),
        ("trainer.val_check_interval", 0),
        ("trainer.val_check_interval", 0.5),
        ("trainer.devices", 0),
        ("trainer.strategy", "dpp"),
        ("callbacks.checkpoint_every", 0),
        ("callbacks.keep_last", 0),
        ("optimizer.lr", -1e-4),
        ("optimizer.betas", [0.9, 1.1]),
        ("optimizer.betas", [0.9]),
        ("optimizer.weight_decay", -1),
        ("optimizer.final_lr_factor", 1.5),
        ("optimizer.on_extend", "strech"),
        ("data.batch_size", 10**12),
        ("ema.decay", 1),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_numbers_that_cannot_be(key, value):
    config = config_of()
    group, _, name = key.rpartition(".")
    (config[group] if group else config)[name] = value
    with pytest.raises(ConfigError, match=rf"^{key}="):
        check_run(config)


def test_what_never_fits_is_refused():
    config = config_of()
    config["data"]["batch_size"] = 2**24
    config["data"]["image_size"] = [4096, 4096]
    with pytest.raises(ConfigError, match=r"^data\.batch_size=16777216: .* takes .* TB; this"):
        check_sizes(config)


def test_lightnings_own_keys(fails, photos):
    words = [*TINY, "data=folder", f"data.train={photos}", "data.image_size=16"]
    fails("train", *words, "+trainer.max_epochs=1", words=("max_epochs", "set trainer.max_steps"))
    fails("train", *words, "+trainer.profilr=1", words=("trainer.profilr: no such", "profiler"))
    fails("train", *words, "quantizer.codebook_size=1000000000000", words=("takes", "this machine"))


# ---------------------------------------------------------------------- code


def test_a_downloaded_run_executes_nothing(fails, finished_run, tmp_path, monkeypatch):
    import shutil

    run = shutil.copytree(finished_run, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("plugins: []", "plugins: [evil]"))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m vistok` does
    more = ("resume=run", "trainer.max_steps=9")
    fails("train", *more, words=("config.yaml: names plugins=[evil]", "if you trust it"))
    fails("train", *more, "plugins=[evil]", words=("plugins=[evil]", "PYTHONPATH=."))
    assert not (tmp_path / "executed").exists()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    from vistok.core.plugins import import_plugins

    import_plugins(["evil"], from_here=False)  # who says so gets it
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("junk", [b"", b"[", b"[" * 200_000, b"null", b'{"steps": "x"}', b"\xff"])
def test_damaged_summaries_stop_nothing(finished_run, tmp_path, junk):
    from vistok.checkpoints.resume import finished_steps
    from vistok.export.exporter import run_metrics

    (tmp_path / "eval").mkdir()
    for name in ("summary.json", "eval/metrics.json"):
        (tmp_path / name).write_bytes(junk)
    assert finished_steps(tmp_path) == 0
    numbers = run_metrics(tmp_path / "checkpoints" / "last.ckpt")
    assert numbers == {} or junk == b'{"steps": "x"}'


# ---------------------------------------------------------------------- many at once


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(16, marks=pytest.mark.slow),
        pytest.param(560, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)]),
    ],
)
def test_mutated_inputs_get_one_line(count):
    """No traceback, no exception of a library, nothing accepted, executed or endless."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fuzz_runs.py"), "0", str(count)],
        capture_output=True, text=True, timeout=7000,
    )  # fmt: skip
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"cases": count, "bad": 0}
    assert Path(CONFIGS).is_dir()
