"""Steps that are not finite are skipped, on all ranks alike, and too many in a row are undone."""

import json
import math

import pytest
import torch

from helpers import TINY, metrics_of
from ranks import TWO, assert_ended, fork
from same_runs import assert_same, assert_same_training, state_of
from test_adversary import ADVERSARY, TERM
from vistok.cli import train


@pytest.fixture
def words(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return words_of(photos)


def words_of(photos):
    return [
        *TINY,
        "data=folder",
        f"data.train={photos}",
        "data.image_size=16",
        "data.val_fraction=0.3",
        "trainer.max_steps=6",
        "trainer.val_check_interval=6",
        "callbacks.checkpoint_every=2",
        "callbacks.num_pictures=0",
        "optimizer.total_samples=24",
        "quantizer.assignment=nearest",
        "plugins=[poison]",
    ]


def poison(at, kind="loss", on_rank="null"):
    term = f"_target_: poison, weight: 1.0, at: {at}, kind: {kind}, on_rank: {on_rank}"
    return f"+loss.terms.poison={{{term}}}"


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def parts(state):
    """Return everything that a step moves."""
    (moments,) = state["optimizer_states"]
    return {"weights": state["state_dict"], "ema": state["ema"], "moments": moments["state"]}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing(cli, words, tmp_path, kind):
    """Checkpoints at 2 and 4, of which the steps 3 and 4 are skipped, differ in the count alone."""
    words = [*words, "callbacks.keep_last=3", "quantizer=ema_vq", *ADVERSARY]
    code, lines, out = cli("train", *words, poison([8, 12], kind), "hydra.run.dir=run")
    assert code == 0, lines
    said = "loss/poison is nan" if kind == "loss" else "norm of the gradient is "
    assert out.count("the step is skipped") == 1 and f"step 3: {said}" in out
    assert summary_of(tmp_path / "run")["skipped_steps"] == 2
    assert summary_of(tmp_path / "run")["returns"] == 0
    # In between nothing was saved: the state might be what makes steps sick.
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt", "step_00000002.ckpt"}
    rows = metrics_of(tmp_path / "run")
    finite = [math.isfinite(float(row["loss/total"])) for row in rows if row["loss/total"]]
    assert finite == [True, True, kind != "loss", kind != "loss", True, True]
    skipped = [float(row["skipped_steps"]) for row in rows if row["skipped_steps"]]
    assert skipped == [0, 0, 1, 2, 2, 2]


def test_weights_moments_averages_codes_and_players_stay(words, tmp_path, monkeypatch):
    from vistok.tasks.reconstruction import Reconstruction

    kept = []
    real = Reconstruction.optimizer_step

    def watched(self, *args, **kwargs):
        kept.append(snapshot(self))
        real(self, *args, **kwargs)
        kept.append(snapshot(self))

    def snapshot(task):
        (optimizer,) = [o.optimizer for o in [task.optimizers()]]
        state = {
            "model": task.state_dict(),
            "ema": task.ema.state_dict(),
            "moments": optimizer.state_dict()["state"],
            "players": task.objective.players_state(),
        }
        return json_free_copy(state)

    monkeypatch.setattr(Reconstruction, "optimizer_step", watched)
    words = [*words, *ADVERSARY, f"{TERM}.lecam={{weight: 0.1, decay: 0.9, per: logit}}"]
    assert train([*words, poison([8], "gradient"), "hydra.run.dir=run"]) == 0
    pairs = list(zip(kept[::2], kept[1::2], strict=True))
    assert len(pairs) == 6
    for number, (before, after) in enumerate(pairs, start=1):
        if number == 3:
            assert_same(before, after)
        else:
            for part in before:
                with pytest.raises(AssertionError):
                    assert_same(before[part], after[part])


def json_free_copy(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: json_free_copy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_free_copy(v) for v in value]
    return value


def test_the_discriminators_side_is_watched_too(cli, words, tmp_path):
    target = f"{TERM}._target_=poisoned_adversary"
    code, lines, out = cli(
        "train", *words, *ADVERSARY, target, f"+{TERM}.at=[1,3]", "hydra.run.dir=run"
    )
    assert code == 0, lines
    assert "step 2: loss/discriminator is nan" in out
    assert summary_of(tmp_path / "run")["skipped_steps"] == 2
    state = state_of(tmp_path / "run")
    assert state["players"]["adversarial"]["steps"] == 4
    moments = state["optimizer_states"][0]["state"]
    assert {int(m["step"]) for m in moments.values()} == {4}


def test_too_many_in_a_row_return_to_the_last_good_state(cli, words, tmp_path):
    """From step 3 on the weights themselves are NaN; step 6 goes back to those of step 2."""
    words = [*words, "callbacks.max_skipped_steps=3", "trainer.max_steps=8", *ADVERSARY]
    words = [*words, "optimizer.total_samples=32", poison([8], "weights")]
    code, lines, out = cli("train", *words, "hydra.run.dir=run")
    assert code == 0, lines
    said = " ".join(out.split())
    assert "step 5: 3 steps in a row were not finite; back to the weights of step 2" in said
    summary = summary_of(tmp_path / "run")
    assert summary["skipped_steps"] == 3 and summary["returns"] == 1 and summary["steps"] == 8
    assert summary["samples_seen"] == 32  # the data went on
    state = state_of(tmp_path / "run")
    assert all(v.isfinite().all() for v in state["state_dict"].values() if v.is_floating_point())
    assert state["guard"] == {
        "skipped": 3, "in_a_row": 0, "returns": 1, "proven": True, "tried": [2]
    }  # fmt: skip
    # A run that dies after the return does all of it again.
    assert train([*words, "hydra.run.dir=cut", "trainer.max_steps=6"]) == 0
    assert train(["resume=cut", "trainer.max_steps=8", "plugins=[poison]"]) == 0
    assert_same_training(tmp_path / "cut", tmp_path / "run")
    assert_same(state_of(tmp_path / "cut")["players"], state["players"])


def test_without_a_good_state_the_run_ends(fails, words):
    words = [*words, "callbacks.max_skipped_steps=2", poison([0, 4, 8])]
    fails(
        "train", *words, "hydra.run.dir=run",
        words=("2 steps in a row", "no earlier checkpoint", "lower optimizer.lr"),
    )  # fmt: skip


def test_a_checkpoint_is_gone_back_to_once(fails, words):
    """Training from the state of step 2 fails again at once, and no older state is left."""
    always = poison(list(range(8, 80, 4)))
    words = [*words, "callbacks.max_skipped_steps=2", "trainer.max_steps=20", always]
    fails("train", *words, "hydra.run.dir=run", words=("2 steps in a row", "no earlier"))


@pytest.mark.parametrize("word", ["max_skipped_steps=0", "health_every=0.5", "winning_accuracy=2"])
def test_options_are_checked(fails, words, word):
    fails("train", *words[:-1], f"callbacks.{word}", words=(f"callbacks.{word}", "must be"))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("where", ["loss", "gradient", "player"])
def test_ranks_agree(words, tmp_path, where):
    """One of two ranks is struck, and both skip and return alike."""
    words = [*words, "callbacks.max_skipped_steps=2", "trainer.max_steps=8", *ADVERSARY]
    if where == "player":
        sick = [f"{TERM}._target_=poisoned_adversary", f"+{TERM}.at=[3]", f"+{TERM}.on_rank=1"]
        skipped, returns = 1, 0
    else:
        sick = [poison([8, 12], where, on_rank=1)]
        skipped, returns = 2, 1
    process = fork([*words, *sick, *TWO, "hydra.run.dir=two"])
    assert_ended(process, 0)
    summary = summary_of(tmp_path / "two")
    assert summary["skipped_steps"] == skipped and summary["returns"] == returns
    assert summary["steps"] == 8
    state = state_of(tmp_path / "two")
    assert all(v.isfinite().all() for v in state["state_dict"].values() if v.is_floating_point())
