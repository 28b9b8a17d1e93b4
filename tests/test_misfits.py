"""Values that a key cannot have: one line that names it, before anything is built."""

import pytest
from omegaconf import DictConfig

from vistok.configuration import apply_overrides, compose
from vistok.errors import ConfigError

MAY_BE_NULL = {"train": {"resume", "init_from"}, "eval": {"run", "out"}, "export": {"run", "out"}}


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
        ("baseline=null", "holds keys of its own; set baseline.patch_size or baseline.num_patches"),
        ("logger=null", "there are: csv, tensorboard, wandb"),
        ("seed=null", "null cannot be; such as seed=0"),
        ("seed=x", "expected a number, such as 0"),
        ("compile=maybe", "expected true or false, such as false"),
        ("ema=3", "set ema.decay"),
        ("alignment=x", "set alignment.teacher or"),
        ("plugins=mine", "expected a list"),
        ("trainer.max_steps=many", "expected a number"),
    ],
)
def test_what_would_be_right_is_said(override, message):
    with pytest.raises(ConfigError) as error:
        compose("train", ["quantizer.codebook_size=32", override])
    assert str(error.value).startswith(f"{override}: ") and message in str(error.value)


def test_what_may_be_null_below_stays_so():
    config = compose("train", ["quantizer=vq", "quantizer.codebook_dim=null", "name=mine"])
    assert config.quantizer.codebook_dim is None and config.name == "mine"


def test_a_resumed_run_refuses_null_too():
    config = compose("train", [])
    with pytest.raises(ConfigError, match="baseline=null: it holds keys of its own"):
        apply_overrides(config, ["baseline=null"])
    changed = apply_overrides(config, ["baseline.patch_size=null", "init_from=null"])
    assert isinstance(changed.baseline, DictConfig)
