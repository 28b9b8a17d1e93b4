"""Values that a key cannot have: one line that names it, before anything is built."""

import json

import pytest
from omegaconf import DictConfig

from helpers import TINY
from vistok.core.configuration import apply_overrides, compose
from vistok.core.errors import ConfigError
from vistok.evaluation.baseline import baseline_options

MAY_BE_NULL = {
    "train": {"resume", "init_from", "init_parts", "tokens", "baseline"},
    "eval": {"run", "model", "images", "out", "picture_scale"},
    "export": {"run", "out", "layout", "license", "push", "graphs"},
}


@pytest.mark.parametrize("name", MAY_BE_NULL)
def test_null_for_every_top_level_key(name):
    for key in {*compose(name, []), "experiment", "stage"} - MAY_BE_NULL[name]:
        with pytest.raises(ConfigError, match=rf"^{key}=null: ") as error:
            compose(name, [f"{key}=null"])
        assert "\n" not in str(error.value)
    for key in MAY_BE_NULL[name]:
        assert compose(name, [f"{key}=null"])[key] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alignment=null", "null is not allowed; choose one of flextok, gigatok, none, plain"),
        (
            "baseline=none",
            "baseline is a group of keys; set baseline.patch_size or baseline.num_patches",
        ),
        ("logger=null", "null is not allowed; choose one of jsonl, tensorboard, wandb"),
        ("seed=null", "null is not allowed; for example seed=0"),
        ("seed=x", "expected a number, for example seed=0"),
        ("compile=maybe", "expected true or false, for example compile=false"),
        ("ema=3", "set ema.decay"),
        ("alignment=x", "choose one of flextok"),
        ("plugins=mine", "expected a list"),
        ("trainer.max_steps=many", "expected a number"),
    ],
)
def test_what_would_be_right_is_said(override, message):
    with pytest.raises(ConfigError) as error:
        compose("train", ["quantizer.codebook_size=32", override])
    assert str(error.value).startswith(f"{override}: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("override", "kind"),
    [("quantizer.dim=x", "a number"), ("trainer.deterministic=perhaps", "true or false")],
)
def test_a_kind_that_a_reference_or_a_users_config_gives(override, kind, tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "mine.yaml").write_text(
        "defaults: [default]\ndeterministic: True # mine\n"
    )
    words = ["trainer=mine"] if "trainer" in override else []
    with pytest.raises(ConfigError, match=f"^{override}: expected {kind}"):
        compose("train", [*words, override], [tmp_path])


def test_a_flag_may_be_a_word_that_some_config_has_there():
    words = ["adversary=llamagen", "loss.terms.adversarial.adaptive=picture"]
    assert compose("train", words).loss.terms.adversarial.adaptive == "picture"
    with pytest.raises(ConfigError, match=r"adaptive=pict: expected true or false"):
        compose("train", [words[0], "loss.terms.adversarial.adaptive=pict"])


def test_what_may_be_null_below_stays_so():
    config = compose("train", ["quantizer=vq", "quantizer.codebook_dim=null", "name=mine"])
    assert config.quantizer.codebook_dim is None and config.name == "mine"


def test_a_resumed_run_refuses_null_too():
    config = compose("train", [])
    with pytest.raises(ConfigError, match="ema=null: ema is a group of keys"):
        apply_overrides(config, ["ema=null"])
    changed = apply_overrides(config, ["baseline.patch_size=null", "init_from=null"])
    assert isinstance(changed.baseline, DictConfig)
    assert apply_overrides(changed, ["baseline=null"]).baseline is None


@pytest.mark.parametrize("value", [0, -8, 2.5, True, [8], "8"])
@pytest.mark.parametrize("key", ["patch_size", "num_patches", "iterations"])
def test_baselines_that_cannot_be_measured(key, value):
    group = {"patch_size": 8, "num_patches": 60, "iterations": 2}
    assert baseline_options(group) == group
    with pytest.raises(ConfigError, match=rf"^baseline\.{key}=.*: expected a whole number"):
        baseline_options({**group, key: value})
    if key != "patch_size":
        with pytest.raises(ConfigError, match=rf"^baseline\.{key}=null: expected a whole number"):
            baseline_options({**group, key: None})


@pytest.mark.parametrize("word", ["baseline=null", "~baseline", "baseline.patch_size=null"])
def test_a_run_without_a_baseline(cli, photos, tmp_path, word):
    words = [w for w in TINY if not w.startswith("baseline")]
    words += ["data=folder", f"data.train={photos}", "data.image_size=16", "data.val_fraction=0.2"]
    code, lines, _ = cli("train", *words, "trainer.max_steps=1", "hydra.run.dir=run", word)
    assert code == 0, lines
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1 and "baseline_kmeans_psnr" not in summary


def test_a_wrong_baseline_shows_before_the_training(fails, photos, tmp_path):
    words = [*TINY, "data=folder", f"data.train={photos}", "data.image_size=16"]
    words += ["data.val_fraction=0.2", "hydra.run.dir=run", "baseline.patch_size=-8"]
    fails("train", *words, words=("baseline.patch_size=-8", "baseline=null for none"))
    assert not (tmp_path / "run").exists()
