"""Whole runs on two ranks, by Lightning's own launcher and by torchrun, against one process."""

import json
import sys

import pytest
import torch

from helpers import ROOT, TINY, losses_of, metrics_of
from ranks import TWO, assert_ended, ended, fork, start, start_command
from same_runs import assert_same_training, state_of
from vistok.cli import train
from vistok.core.errors import ConfigError
from vistok.training.optimizers import learning_rate
from vistok.training.trainer import split_batch

#: Leaves what each rank holds at the end in the working folder.
PROBE = """
import torch
import torch.distributed as dist
from vistok.tasks.reconstruction import Reconstruction

def on_train_end(self):
    quantizer = self.tokenizer.quantizer
    content = {"state": self.state_dict(), "ema": self.ema.shadow, "backend": dist.get_backend()}
    content["usage"] = torch.cat(quantizer.usage.histograms())
    torch.save(content, f"rank{self.global_rank}.pt")

Reconstruction.on_train_end = on_train_end
"""


@pytest.fixture
def words(photos, tmp_path, monkeypatch):
    """Words of a run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe.py").write_text(PROBE)
    return words_of(photos)


def words_of(photos):
    """A VQ with an EMA codebook, dead codes that restart, and accumulation-free steps of 4."""
    return [
        *TINY,
        "data=folder",
        f"data.train={photos}",
        "data.image_size=16",
        "data.val_fraction=0.3",
        "data.eval_batch_size=2",
        "quantizer.dead_code_threshold=0.3",
        "quantizer.ema_decay=0.5",
        "trainer.max_steps=6",
        "trainer.val_check_interval=3",
        "callbacks.checkpoint_every=2",
        "callbacks.codebook_window=2",
        "baseline.patch_size=8",
        "baseline.num_patches=60",
    ]


def floats(run, column):
    return {int(r["step"]): float(r[column]) for r in metrics_of(run) if r.get(column)}


def assert_as_one_process(two, one, tmp_path):
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    for part in ("state", "ema"):
        assert ranks[0][part].keys() == ranks[1][part].keys()
        for key, value in ranks[0][part].items():
            assert torch.equal(value, ranks[1][part][key]), f"{key} differs between the ranks"
    assert torch.equal(ranks[0]["usage"], ranks[1]["usage"])
    assert ranks[0]["backend"] == "gloo"
    for column in ("loss/total", "loss/commitment", "loss/reconstruction", "lr"):
        first, second = floats(two, column), floats(one, column)
        assert first.keys() == second.keys() and len(first) >= 6
        assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-4)
    for column in ("val/psnr", "val/ssim", "val/perplexity", "samples_seen"):
        assert floats(two, column) == pytest.approx(floats(one, column), rel=3e-4)
    for column in ("val/codebook_usage", "train/codebook_usage"):
        assert floats(two, column) == floats(one, column) and floats(one, column)
    codebook = "tokenizer.quantizer.embedding"
    torch.testing.assert_close(
        ranks[0]["state"][codebook], state_of(one)["state_dict"][codebook], rtol=1e-4, atol=1e-4
    )
    first, second = (json.loads((run / "summary.json").read_text()) for run in (two, one))
    keys = ("val_psnr", "val_ssim", "codebook_usage", "perplexity", "samples_seen", "steps")
    for key in (*keys, "baseline_kmeans_psnr"):
        assert first[key] == pytest.approx(second[key], rel=3e-4), key


@pytest.mark.ranks
def test_two_ranks_train_as_one_process(words, tmp_path):
    process = start([*words, *TWO, "plugins=[probe]", "hydra.run.dir=two"])
    assert train([*words, "hydra.run.dir=one"]) == 0
    code, out, err = ended(process)
    assert code == 0, out + err
    assert err == "" and "of 4 images on 2 CPU processes" in out, out + err
    assert out.count("run folder:") == 1
    revived = [floats(tmp_path / name, "quantizer/dead_codes_revived") for name in ("one", "two")]
    assert sum(revived[0].values()) > 0 and revived[0] == revived[1]
    assert_as_one_process(tmp_path / "two", tmp_path / "one", tmp_path)
    states = state_of(tmp_path / "two")["random_state"]
    assert len(states) == 2


@pytest.mark.slow
@pytest.mark.ranks
def test_the_console_command_starts_the_other_ranks_too(words, tmp_path):
    """They are started with its words, among which `train` is no override."""
    vistok = [sys.executable, "-m", "vistok", "train"]
    more = [*TWO, "trainer.max_steps=2", "hydra.run.dir=two"]
    process = start_command([*vistok, *words, *more], PYTHONPATH=str(ROOT / "tokenizers"))
    code, out, err = ended(process)
    assert code == 0, out + err
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["samples_seen"] == 2 * 4


@pytest.mark.slow
@pytest.mark.ranks
def test_torchrun_with_accumulation_trains_as_one_process(words, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launcher += ["--master_port=29513"]
    # What a dead code restarts from is in the last of the accumulated batches.
    words = [*words, "quantizer.dead_code_threshold=0"]
    wide = ["trainer.global_batch_size=8", "data.batch_size=2"]
    process = start(
        [*words, *wide, "trainer.devices=2", "plugins=[probe]", "hydra.run.dir=two"], *launcher
    )
    assert train([*words, "data.batch_size=8", "hydra.run.dir=one"]) == 0
    code, out, err = ended(process)
    assert code == 0, out + err
    assert "of 8 images in 4 batches on 2 CPU processes" in out
    assert_as_one_process(tmp_path / "two", tmp_path / "one", tmp_path)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    "more",
    [
        ["tokenizer=flextok_tiny"],  # lengths of samples; noise, times and dropped conditions
        ["tokenizer=one_d_piece_tiny", "tokenizer.length.distribution=rounded_up"],  # of steps
    ],
)
def test_two_ranks_draw_what_one_process_draws(words, tmp_path, more):
    words = [w for w in words if "dead_code" not in w and "ema_decay" not in w]
    words = [*words[: words.index("loss=mse")], *more, *words[words.index("loss=mse") :]]
    job = fork([*words, *TWO, "hydra.run.dir=two"])
    assert train([*words, "hydra.run.dir=one"]) == 0
    assert_ended(job, 0)
    first, second = (floats(tmp_path / name, "loss/total") for name in ("two", "one"))
    assert first.keys() == second.keys() and len(first) == 6
    assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-4)
    split = ["trainer.global_batch_size=4", "data.batch_size=1"]  # and in what it accumulates
    assert train([*words, *split, "quantizer.dead_code_threshold=0", "hydra.run.dir=four"]) == 0
    assert train([*words, "quantizer.dead_code_threshold=0", "hydra.run.dir=zero"]) == 0
    first, second = (floats(tmp_path / name, "loss/total") for name in ("four", "zero"))
    assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-4)


# ---------------------------------------------------------------------- endings

AT_STEP_3 = """
import os, signal, time
from vistok.core.errors import VistokError
from vistok.tasks.reconstruction import Reconstruction
from datetime import timedelta
import torch.distributed as dist

def on_train_batch_start(self, batch, index):
    if self.global_step == 3:
        if self.global_rank == {rank}:
            {what}
        else:
            {others}

Reconstruction.on_train_batch_start = on_train_batch_start
"""


IMPATIENT = (
    "assert self.trainer.strategy._timeout == timedelta(seconds=555); "
    "(getattr(dist, 'set_timeout', None) or dist.distributed_c10d._set_pg_timeout)"
    "(timedelta(seconds=3))"
)


def plan(tmp_path, rank, what, others="pass"):
    (tmp_path / "accident.py").write_text(AT_STEP_3.format(rank=rank, what=what, others=others))
    return "plugins=[accident]"


RAISE, KILL = "raise VistokError('planned')", "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("rank", "what", "words_of_error", "begin"),
    [
        (1, RAISE, "rank 1: planned", fork),
        (0, RAISE, "error: planned", fork),
        (1, KILL, "rank 1 was ended by SIGKILL", start),
        (1, "time.sleep(1000)", "another rank ended, or did not answer", fork),
        pytest.param(1, RAISE, "rank 1: planned", start, marks=pytest.mark.nightly),
        pytest.param(0, RAISE, "error: planned", start, marks=pytest.mark.nightly),
        pytest.param(1, "time.sleep(1000)", "or did not answer", start, marks=pytest.mark.nightly),
    ],
)
def test_a_rank_that_fails_takes_the_job_down(words, tmp_path, rank, what, words_of_error, begin):
    # Ranks also have trainer.timeout to start in, so it is long; where one sleeps, the other is
    # told by then to wait for 3 s.
    accident = plan(tmp_path, rank, what, IMPATIENT if "sleep" in what else "pass")
    job = [*words, *TWO, accident, "trainer.timeout=555", "hydra.run.dir=run"]
    code, out, err = ended(begin(job))
    assert code not in (0, 75), out + err
    assert words_of_error in err, err
    assert state_of(tmp_path / "run")["global_step"] == 2


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory):
    """A run of two ranks."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert_ended(fork([*words_of(photos), *TWO, f"hydra.run.dir={run}"]), 0)
    return run


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("rank", "begin"), [(0, start), (1, fork), pytest.param(1, start, marks=pytest.mark.nightly)]
)
def test_preemption_of_one_rank_stops_all_and_goes_on_exactly(
    words, tmp_path, uninterrupted, rank, begin
):
    words = [*words, *TWO, "hydra.run.dir=run", "resume=auto"]
    signal_once = "os.kill(os.getpid(), signal.SIGTERM)"
    code, out, err = ended(begin([*words, plan(tmp_path, rank, signal_once)]))
    assert code == 75 and "preempted at step 4" in err, (code, out, err)
    assert state_of(tmp_path / "run")["global_step"] == 4
    assert_ended(fork(words), 0)
    assert losses_of(tmp_path / "run") == losses_of(uninterrupted)
    assert_same_training(tmp_path / "run", uninterrupted)


# ---------------------------------------------------------------------- batches, learning rate


@pytest.mark.parametrize(
    ("total", "ranks", "largest", "expected"),
    [
        (256, 1, 32, (32, 8)),
        (256, 8, 32, (32, 1)),
        (2048, 64, 32, (32, 1)),
        (48, 1, 32, (24, 2)),
        (4, 4, 32, (1, 1)),
        (6, 2, 2, "6"),
        (10, 4, 32, "8 or 12"),
        (3, 4, 32, "4 or 4"),
        (74, 2, 32, "128 would"),
    ],
)
def test_the_global_batch_is_split(total, ranks, largest, expected):
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=f"global_batch_size={total}"):
            split_batch(total, ranks, largest)
    else:
        size, batches = expected
        assert split_batch(total, ranks, largest) == expected
        assert size * batches * ranks == total and size <= largest


@pytest.mark.slow
def test_accumulation_equals_the_batch_at_once(words, tmp_path):
    more = ["quantizer.dead_code_threshold=0", "trainer.max_steps=9"]
    assert train([*words, *more, "data.batch_size=8", "hydra.run.dir=one"]) == 0
    split = ["trainer.global_batch_size=8", "data.batch_size=2"]
    assert train([*words, *more, *split, "hydra.run.dir=four"]) == 0
    for column in ("loss/total", "val/psnr", "samples_seen", "lr"):
        first, second = floats(tmp_path / "four", column), floats(tmp_path / "one", column)
        assert first.keys() == second.keys()
        assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-4)
    assert train([*words, *more, *split, "trainer.max_steps=5", "hydra.run.dir=cut"]) == 0
    assert train(["resume=cut", "trainer.max_steps=9"]) == 0
    last = {step: loss for step, loss in losses_of(tmp_path / "cut").items() if step > 5}
    assert last.keys() == {6, 7, 8, 9}


def test_batch_errors_are_one_line(fails, words):
    fails("train", *words, "trainer.global_batch_size=7", "data.batch_size=2", words="=7: ")
    both = ["trainer.global_batch_size=8", "trainer.accumulate_grad_batches=2"]
    fails("train", *words, *both, words=("accumulate_grad_batches=2", "one of the two"))
    fails("train", *words, "optimizer.lr_rule=linaer", words="did you mean 'linear'")


def test_the_rule_of_the_learning_rate(words, tmp_path):
    assert learning_rate({"lr": 1e-4}, 4096) == 1e-4
    assert learning_rate({"lr": 1e-4, "lr_rule": "absolute"}, 64) == 1e-4
    assert learning_rate({"lr": 1e-4, "lr_rule": "linear"}, 1024) == pytest.approx(4e-4)
    assert learning_rate({"lr": 1e-4, "lr_rule": "sqrt"}, 1024) == pytest.approx(2e-4)
    more = ["optimizer.lr_rule=linear", "optimizer.final_lr_factor=1", "optimizer.lr=0.064"]
    assert train([*words, *more, "trainer.max_steps=1", "hydra.run.dir=run"]) == 0
    assert floats(tmp_path / "run", "lr") == pytest.approx({1: 0.064 * 4 / 256})


# ---------------------------------------------------------------------- SLURM sweeps


def test_the_submitit_launcher_is_asked_for_by_name(fails, words):
    try:
        import hydra_plugins.hydra_submitit_launcher  # pyright: ignore  # noqa: F401
    except ImportError:
        fails(
            "train", "--multirun", *words, "hydra/launcher=submitit", words="pip install 'vistok[s"
        )
    else:
        from hydra import compose, initialize_config_dir

        from helpers import CONFIGS

        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", ["hydra/launcher=submitit"], return_hydra_config=True)
        launcher = config.hydra.launcher
        assert launcher._target_.endswith("SlurmLauncher")
        assert launcher.tasks_per_node == launcher.gpus_per_node == 8
