"""Exact resume: an interrupted run ends as the whole one does, bit for bit."""

import json
import shutil
import signal

import pytest

from helpers import losses_of, metrics_of, tiny_words
from same_runs import Stop, assert_same_training, break_runs, metric_rows, state_of, training_rows
from vistok.cli import train
from vistok.training.metrics_file import MetricsFile

#: An EMA codebook whose dead codes restart all the time, from latents chosen by chance; sampling
#: of codes, which draws from torch's generator; averaged weights; more than one epoch.
HARD = [
    "quantizer.codebook_size=32",
    "quantizer.dead_code_threshold=0.3",
    "quantizer.ema_decay=0.5",
    "quantizer.assignment=stochastic",
    "quantizer.temperature=0.5",
    "ema.decay=0.9",
    "optimizer.warmup_samples=20",
    "optimizer.total_samples=44",
    "trainer.val_check_interval=3",
    "callbacks.checkpoint_every=3",
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(0, id="in-process"),
        pytest.param(2, id="workers", marks=pytest.mark.slow),
    ],
)
def whole(request, photos, tmp_path_factory):
    """Words of a run of 11 steps and its folder, uninterrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    words = [*tiny_words(photos), *HARD, f"data.num_workers={request.param}"]
    assert train([*words, "trainer.max_steps=11", f"hydra.run.dir={run}"]) == 0
    revived = [
        float(r["quantizer/dead_codes_revived"] or 0) for r in metrics_of(run) if r["loss/total"]
    ]
    assert sum(revived[:5]) > 0 and sum(revived[6:]) > 0, "no restarts: the test would show nothing"
    return words, run


@pytest.mark.parametrize("stop", [5, 6])  # in mid-epoch; at a validation, which shares the step
def test_resume_after_max_steps_is_exact(whole, tmp_path, stop):
    words, full = whole
    run = tmp_path / "run"
    assert train([*words, f"trainer.max_steps={stop}", f"hydra.run.dir={run}"]) == 0
    assert list(losses_of(run)) == list(range(1, stop + 1))
    assert train([f"resume={run}", "trainer.max_steps=11"]) == 0
    assert losses_of(run) == losses_of(full)
    assert_same_training(run, full)
    kept = [row for row in metric_rows(run) if dict(row)["step"] != "5" or dict(row)["loss/total"]]
    assert kept == metric_rows(full)  # but for the validation at the end of the first part
    seen = json.loads((run / "summary.json").read_text())["samples_seen"]
    assert seen == 44
    assert len((run / "command.txt").read_text().splitlines()) == 2


def test_another_seed_or_no_resume_gives_other_losses(whole, tmp_path):
    words, full = whole
    assert (
        train([*words, "trainer.max_steps=4", "seed=1", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    )
    other = losses_of(tmp_path / "run")
    assert all(other[step] != losses_of(full)[step] for step in other)


def raise_stop():
    raise Stop("an accident")


def raise_interrupt():
    raise KeyboardInterrupt


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("what", "step", "hook", "code", "saved"),
    [
        (raise_stop, 5, "start", 1, 3),
        (raise_stop, 8, "zero_grad", 1, 6),
        (raise_stop, 6, "validation", 1, 6),  # saved just before the validation of that step
        (raise_interrupt, 7, "end", 130, 6),
        (press_ctrl_c, 4, "zero_grad", 130, 5),  # the step is finished, then saved
        (press_ctrl_c, 5, "start", 130, 6),
    ],
)
def test_resume_after_an_accident_is_exact(
    whole, tmp_path, monkeypatch, what, step, hook, code, saved
):
    words, full = whole
    run = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        break_runs(patch, step, what, hook)
        assert train([*words, "trainer.max_steps=11", f"hydra.run.dir={run}"]) == code
    assert signal.getsignal(signal.SIGINT) is handler
    assert state_of(run)["global_step"] == saved
    assert not (run / "summary.json").exists()
    assert train([f"resume={run}"]) == 0
    assert losses_of(run) == losses_of(full)
    assert_same_training(run, full)
    if hook != "validation":
        # A run stopped by Ctrl-C validates once more, which adds a row.
        assert training_rows(run) == training_rows(full)


def test_resume_from_an_older_checkpoint_and_a_moved_run(whole, tmp_path):
    words, full = whole
    moved = shutil.copytree(full, tmp_path / "elsewhere")
    best = moved / "checkpoints" / "best.ckpt"
    step = state_of(full, "best")["global_step"]
    before = metrics_of(full)
    assert step < 11
    assert train([f"resume={best}"]) == 0
    assert losses_of(moved) == losses_of(full)
    assert_same_training(moved, full)
    assert metrics_of(full) == before  # the original is left alone
    validations = [row["step"] for row in metrics_of(moved) if row["val/psnr"]]
    assert validations == [row["step"] for row in before if row["val/psnr"]]


def test_rows_that_do_not_hold_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = ['{"step": 1, "a": 1}', '{"step": 2, "a": 2}', '{"step": 2, "b": 2}', '{"step": 3}']
    whole = "".join(row + "\n" for row in rows)
    for torn in ("", '{"step": 3', '{"step": 3}', "\0\0\0\n"):
        for first_step, kept in ((0, 0), (1, 1), (2, 3), (9, 4)):
            path.write_text(whole + torn)
            assert MetricsFile(tmp_path, first_step).begin() == path
            assert path.read_text() == "".join(row + "\n" for row in rows[:kept])
    path.unlink()
    assert MetricsFile(tmp_path, 5).begin().read_text() == ""


def test_second_ctrl_c_stops_at_once(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def twice():
        press_ctrl_c()
        press_ctrl_c()

    break_runs(monkeypatch, 2, twice, "start")
    more = ["callbacks.checkpoint_every=1", "trainer.max_steps=9", "hydra.run.dir=run"]
    assert train([*tiny_words(photos), *more]) == 130
    assert state_of(tmp_path / "run")["global_step"] == 2
