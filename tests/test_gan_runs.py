"""Whole adversarial runs: shares of a run, resumes bit for bit, kills, ranks, alarms."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from helpers import PATIENCE, ROOT, SIZES, losses_of, metrics_of
from ranks import TWO, assert_ended, ended, fork
from same_runs import assert_same, assert_same_training, state_of
from test_adversary import TERM
from test_guard import words_of
from vistok.cli import train
from vistok.quantizers.usage import CodeUsage
from vistok.tasks.callbacks import CodebookWatch
from vistok.training.health import Health

#: Everything of an adversary that has a state or draws numbers.
RICH = [
    "adversary=patch",
    f"{TERM}.start=0.25",
    f"{TERM}.ramp=0.25",
    f"{TERM}.warmup=0.125",
    f"{TERM}.discriminator.base_channels=4",
    f"{TERM}.discriminator.num_layers=2",
    f"{TERM}.lecam={{weight: 0.1, decay: 0.9, per: logit}}",
    f"{TERM}.penalty={{r1: 1.0, r2: 0.0, interval: 2}}",
    f"{TERM}.augment={{_target_: diff_augment}}",
]
ADAPTIVE = [f"{TERM}.adaptive=true"]


@pytest.fixture
def words(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return rich_words(photos)


def rich_words(photos):
    own = ["trainer.max_steps=8", "optimizer.total_samples=32", "plugins=[]"]
    return [*words_of(photos), *own, *RICH, "callbacks.health_every=3"]


def assert_same_players(run, other):
    first, second = state_of(run), state_of(other)
    for part in ("players", "guard", "health"):
        assert_same(first[part], second[part], part)


def test_shares_are_those_of_the_run_that_was_planned(words, tmp_path):
    """A quarter of 32 samples; continued for longer, the start stays where it was."""
    words = [*words, *ADAPTIVE, "optimizer.total_samples=null"]
    assert train([*words, "hydra.run.dir=whole"]) == 0
    rows = metrics_of(tmp_path / "whole")
    assert [int(r["step"]) for r in rows if float(r["loss/adversarial"] or 0)] == [3, 4, 5, 6, 7, 8]
    assert next(int(r["step"]) for r in rows if r["loss/discriminator"]) == 2  # it warms up
    weights = {int(r["step"]): r["weight/adversarial"] for r in rows if r["weight/adversarial"]}
    assert min(weights) == 4 and float(weights[8]) > 0  # the ramp begins at 0
    for row in rows[1:]:
        if row["gan/accuracy"]:
            assert 0 <= float(row["gan/accuracy"]) <= 1
    measured = [int(r["step"]) for r in rows if r["gradient/reconstruction"]]
    assert measured[0] == 3
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert {"gan/accuracy", "gan/logits_real", "gradient/reconstruction", "weight/adversarial"} <= (
        summary["health"].keys()
    )
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    own = config["loss"]["terms"]["adversarial"]
    assert own["start_samples"] == 8 and own["ramp_samples"] == 8 and own["warmup_samples"] == 4
    stored = state_of(tmp_path / "whole")["hyper_parameters"]["config"]
    assert stored["loss"]["terms"]["adversarial"]["start_samples"] == 8
    assert train(["resume=whole", "trainer.max_steps=10"]) == 0
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert config["loss"]["terms"]["adversarial"]["start_samples"] == 8


@pytest.mark.parametrize("split", [[], ["trainer.global_batch_size=4", "data.batch_size=2"]])
def test_a_rich_adversary_goes_on_exactly(words, tmp_path, split):
    words = [*words, *ADAPTIVE, *split]
    assert train([*words, "hydra.run.dir=whole"]) == 0
    assert train([*words, "trainer.max_steps=5", "hydra.run.dir=cut"]) == 0
    assert train(["resume=cut", "trainer.max_steps=8"]) == 0
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
    assert_same_players(tmp_path / "cut", tmp_path / "whole")
    assert state_of(tmp_path / "cut")["players"]["adversarial"]["steps"] == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "steps", "ranks"),
    [
        (3, 24, 1),
        pytest.param(20, 300, 1, marks=[pytest.mark.nightly, pytest.mark.timeout(2000)]),
        pytest.param(10, 200, 2, marks=[pytest.mark.nightly, pytest.mark.timeout(2000)]),
    ],
)
def test_kills_change_nothing_of_either_player(photos, tmp_path, kills, steps, ranks):
    words = [
        *rich_words(photos), *ADAPTIVE, f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps // 2}", f"optimizer.total_samples={4 * steps}",
        "callbacks.checkpoint_every=3", "resume=auto", *(TWO if ranks == 2 else ()),
    ]  # fmt: skip
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "soak.py"), str(tmp_path), str(kills), str(ranks), *words],
        capture_output=True, text=True, timeout=PATIENCE * 2 if kills < 9 else 1800,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["kills"] == kills
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert_same_training(killed, whole)
    assert_same_players(killed, whole)
    assert losses_of(killed) == losses_of(whole)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_ranks_that_are_killed_go_on_exactly(words, tmp_path, strategy):
    """SIGKILL of both ranks once a checkpoint is there; accumulated batches of one image."""
    words = [w for w in words if w not in SIZES["titok_tiny"]]
    words = ["tokenizer=vqgan_tiny", *words, *SIZES["vqgan_tiny"], *TWO, "resume=auto"]
    words += ["data.batch_size=1", "trainer.global_batch_size=4", f"trainer.strategy={strategy}"]
    words += ADAPTIVE if strategy == "auto" else []
    assert_ended(fork([*words, "hydra.run.dir=whole"]), 0)
    job, last = fork([*words, "hydra.run.dir=cut"]), tmp_path / "cut" / "checkpoints" / "last.ckpt"
    waited = time.monotonic()
    while not last.exists() and any(p.is_alive() for p in job.ranks):
        assert time.monotonic() < waited + PATIENCE
        time.sleep(0.01)
    job.kill()
    ended(job)
    assert not (tmp_path / "cut" / "summary.json").exists() or last.exists()
    assert_ended(fork([*words, "hydra.run.dir=cut"]), 0)
    assert_same_training(tmp_path / "cut", tmp_path / "whole")
    assert_same_players(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("adaptive", ["true", "picture"])
def test_a_rich_adversary_on_two_ranks_is_one_process(words, tmp_path, adaptive):
    words = [*words, f"{TERM}.adaptive={adaptive}"]
    assert_ended(fork([*words, *TWO, "hydra.run.dir=two"]), 0)
    assert train([*words, "hydra.run.dir=one"]) == 0
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    for name in ("loss/total", "loss/discriminator", "weight/adversarial", "gan/logits_real"):
        first, second = ([float(r[name]) for r in rows if r[name]] for rows in (one, two))
        assert second == pytest.approx(first, rel=1e-3, abs=1e-4), name
    players = [state_of(tmp_path / n)["players"]["adversarial"] for n in ("one", "two")]
    torch.testing.assert_close(players[0]["means"], players[1]["means"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strategy", ["compile=true", "trainer.strategy=fsdp2"])
def test_an_adaptive_weight_needs_a_graph_that_can_be_walked(fails, words, strategy):
    needed = (f"{TERM}.adaptive=true", strategy, "fixed weight")
    fails("train", *words, *ADAPTIVE, strategy, "hydra.run.dir=run", words=needed)


# ---------------------------------------------------------------------- alarms


class _Objective:
    def __init__(self):
        self.players = {"adversarial": None}


class _Task:
    objective, global_step = _Objective(), 0


def watched(accuracies, losses, **options):
    health = Health({"health_every": 2, "winning_windows": 2, **options})
    for accuracy, loss in zip(accuracies, losses, strict=True):
        numbers = {"gan/accuracy": accuracy, "loss/adversarial": loss}
        health.take({k: torch.tensor(v) for k, v in numbers.items()}, _Task())  # type: ignore
    return health


def test_a_discriminator_that_wins_is_an_alarm_once(capsys):
    won = watched([1.0] * 16, [0.1 * i for i in range(16)])
    assert list(won.alarms) == ["adversarial.wins"]
    (said,) = won.summary()["alarms"]
    assert "right in 100% of cases" in said and "loss.terms.adversarial.optimizer.lr" in said
    assert " ".join(capsys.readouterr().out.split()).count("the discriminator is right") == 1
    assert won.last["gan/accuracy"] == 1 and won.last["loss/adversarial"] == pytest.approx(1.45)


def test_a_codebook_that_collapses_is_an_alarm_once(capsys):
    """Of two windows, and none after a resume; the numbers go on."""
    usage, logged = CodeUsage([64]), []
    quantizer = SimpleNamespace(usage=usage, against_collapse="quantizer.revival=restart")
    health = Health({})
    module = SimpleNamespace(
        tokenizer=SimpleNamespace(quantizer=quantizer),
        health=health,
        log=lambda name, value: logged.append(name),
    )
    watch = CodebookWatch(2)
    watch.on_train_start(SimpleNamespace(global_step=0), module)  # type: ignore[arg-type]
    for step in range(1, 7):
        usage.update(torch.zeros(64, 8, 1, dtype=torch.long))
        watch.on_train_batch_end(SimpleNamespace(global_step=step), module)  # type: ignore[arg-type]
        if step == 4:
            module.health = Health({})
            module.health.load_state_dict(health.state_dict())
    (said,) = module.health.summary()["alarms"]
    assert said.startswith("step 2: codebook 0 is collapsing: 1024 tokens used 1 of 64 codes")
    assert capsys.readouterr().out.count("is collapsing") == 1
    assert logged.count("train/codebook_usage") == 3


@pytest.mark.parametrize(
    ("accuracies", "losses"),
    [
        ([1.0] * 16, [-0.1 * i for i in range(16)]),  # the generator's loss falls
        ([0.9] * 16, [0.1 * i for i in range(16)]),  # it is not that accurate
        ([1.0, 1.0, 1.0, 1.0, 0.5, 0.5] * 3, [0.1 * i for i in range(18)]),  # not for long
    ],
)
def test_one_that_does_not_win_is_none(accuracies, losses):
    assert not watched(accuracies, losses).alarms


def test_a_window_goes_on_after_a_resume():
    whole = watched([0.5] * 7, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    first = watched([0.5] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    second = Health({"health_every": 2, "winning_windows": 2})
    second.load_state_dict(first.state_dict())
    for loss in (6.0, 7.0):
        numbers = {"gan/accuracy": torch.tensor(0.5), "loss/adversarial": torch.tensor(loss)}
        second.take(numbers, _Task())  # type: ignore[arg-type]
    assert_same(second.state_dict(), whole.state_dict())


# ---------------------------------------------------------------------- recipes

#: Small versions of the discriminators, by the entry that has them.
SMALL = {
    "patch": ["base_channels=2", "num_layers=1"],
    "maskbit": ["base_channels=4", "num_stages=2", "grid=4"],
    "stylegan": ["base=32", "most_channels=4"],
}
PATCH = ("vqgan", "gigatok", "gigatok_s", "retok", "hita", "llamagen", "rq_vae")
SMALL |= dict.fromkeys((*PATCH, "open_magvit2", "latent_diffusion"), SMALL["patch"])
MASKBIT = ("titok", "titok_single", "ta_titok", "one_d_piece", "vqgan_plus")
SMALL |= dict.fromkeys(MASKBIT, SMALL["maskbit"]) | {"r3gan": SMALL["stylegan"]}
DINO = ["name=test_vit", "input_size=160", "layers=[-1,5]", "kernel_size=3"]


def started(name):
    small = [f"{TERM}.discriminator.{word}" for word in SMALL.get(name, DINO)]
    return [*small, f"{TERM}.start_samples=0", f"{TERM}.start=0", f"{TERM}.ramp=0"]


@pytest.mark.parametrize("name", [*SMALL, "dino", "restok"])
def test_every_adversary_trains(cli, words, tmp_path, name):
    words = [w for w in words if not w.startswith(("adversary", TERM))]
    more = [f"adversary={name}", *started(name), "trainer.max_steps=2"]
    if name in ("dino", "restok"):
        timm = pytest.importorskip("timm")
        model = timm.create_model("test_vit", pretrained=False, num_classes=0)
        torch.save(model.state_dict(), tmp_path / "vit.pth")
        more.append(f"{TERM}.discriminator.weights={tmp_path / 'vit.pth'}")
    code, lines, _ = cli("train", *words, *more, "hydra.run.dir=run")
    assert code == 0, lines
    rows = metrics_of(tmp_path / "run")
    assert all(float(row["loss/discriminator"]) for row in rows if row["loss/total"])
    assert state_of(tmp_path / "run")["players"]["adversarial"]["steps"] == 2
