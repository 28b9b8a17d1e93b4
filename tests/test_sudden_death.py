"""Runs that end at any moment: whole files or none, resume=auto, preemption, full disks."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from helpers import PATIENCE, ROOT, TINY, losses_of
from ranks import TWO
from same_runs import assert_same_training, break_runs, state_of
from vistok.checkpoints import write as checkpoints
from vistok.checkpoints.read import read_checkpoint, read_config
from vistok.checkpoints.resume import newest_whole
from vistok.checkpoints.seals import check_seal, read_seal
from vistok.checkpoints.write import snapshot
from vistok.cli import train
from vistok.core.errors import CheckpointError
from vistok.training.checkpointing import CheckpointWriter
from vistok.training.metrics_file import MetricsFile


@pytest.fixture
def words(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return words_of(photos)


def words_of(photos):
    return [
        "experiment=titok_tiny",  # whose best step is not the last
        *TINY,
        "data=folder",
        f"data.train={photos}",
        "data.image_size=16",
        "data.val_fraction=0.2",
        "quantizer.dead_code_threshold=0.3",
        "quantizer.assignment=stochastic",
        "trainer.val_check_interval=3",
        "callbacks.checkpoint_every=2",
        "callbacks.codebook_window=3",
        "optimizer.total_samples=100",  # one schedule, however many steps a run is asked for
        "trainer.max_steps=9",
    ]


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A run of 9 steps that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train([*words_of(photos), f"hydra.run.dir={run}"]) == 0
    return run


def content_of(step, fill=0.0):
    weights = {"a": torch.full((50, 40), fill), "b": torch.arange(7)}
    return {"state_dict": weights, "global_step": step, "pair": (1, [2.5, "x"])}


def written(folder, step, name="last.ckpt", keep=3):
    writer = CheckpointWriter(keep_last=keep)
    writer.save_checkpoint(content_of(step), folder / "checkpoints" / name)
    writer.join()
    return folder / "checkpoints" / name


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


# ---------------------------------------------------------------------- seals


def test_a_checkpoint_is_sealed_and_torch_reads_it(tmp_path):
    import hashlib
    import zipfile

    path = written(tmp_path, 12)
    body, _, line = path.read_bytes().rstrip(b"\n").rpartition(b"\n")
    assert line == f"vistok sha256={hashlib.sha256(body).hexdigest()} step=0000000012".encode()
    assert read_seal(path) == (hashlib.sha256(body).hexdigest(), 12)
    back = torch.load(path, weights_only=True)
    assert torch.equal(back["state_dict"]["b"], torch.arange(7)) and back["pair"] == (1, [2.5, "x"])
    assert zipfile.ZipFile(path).testzip() is None


def test_any_flipped_bit_is_seen(tmp_path):
    path = written(tmp_path, 1)
    whole = path.read_bytes()
    for place in range(0, len(whole) - 96, len(whole) // 40):  # the seal's own bytes come last
        flip(path, place)
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(path)
        path.write_bytes(whole)
    check_seal(path)
    flip(path, len(whole) - 60)  # in the digest
    with pytest.raises(CheckpointError, match="damaged"):
        check_seal(path)


def test_a_file_without_a_seal_is_refused(tmp_path):
    path = written(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-96])
    assert torch.load(path, weights_only=True)["global_step"] == 3  # nothing else is missing
    for read in (read_checkpoint, read_config, check_seal):
        with pytest.raises(CheckpointError, match=r"last\.ckpt: has no seal"):
            read(path)


def test_the_step_of_a_seal_is_compared_too(tmp_path):
    path = written(tmp_path, 3)
    path.write_bytes(path.read_bytes().replace(b"step=0000000003", b"step=0000000004"))
    with pytest.raises(CheckpointError, match="global_step=3 must be the 4 that its seal says"):
        read_checkpoint(path)


# ---------------------------------------------------------------------- last, older, best


def test_the_last_ones_are_kept(tmp_path):
    for step in (2, 4, 4, 6, 8):
        written(tmp_path, step)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step_00000004.ckpt", "step_00000006.ckpt"]
    assert [read_checkpoint(tmp_path / "checkpoints" / n)["global_step"] for n in names] == [
        8,
        4,
        6,
    ]
    written(tmp_path, 5)  # someone went back to step 4: 6 and 8 are given up
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step_00000004.ckpt"]
    written(tmp_path, 7, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_keeping_needs_no_hard_links(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", no_links)
    for step in (2, 4):
        written(tmp_path, step)
    assert read_checkpoint(tmp_path / "checkpoints" / "step_00000002.ckpt")["global_step"] == 2
    assert newest_whole(tmp_path).name == "last.ckpt"


def test_the_newest_whole_one_is_found(tmp_path, capsys):
    assert newest_whole(tmp_path) is None
    for step in (2, 4, 6):
        written(tmp_path, step)
    written(tmp_path, 5, "best.ckpt")
    expected = ["last.ckpt", "best.ckpt", "step_00000004.ckpt", "step_00000002.ckpt"]
    for number, name in enumerate(expected):
        found = newest_whole(tmp_path)
        assert found.name == name
        said = capsys.readouterr().out.splitlines()
        assert len(said) == number  # one line for each that was passed over
        assert all(
            f"{n}: " in line and "older" in line for n, line in zip(expected, said, strict=False)
        )
        if number % 2:
            flip(found, 300)
        else:  # cut short: the seal is gone too
            found.write_bytes(found.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact; .*last\.ckpt"):
        newest_whole(tmp_path)


POINTS = ["half", "fsync", "link", "replace", "folder", "unlink"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("links", [True, False])
def test_a_death_at_any_point_of_a_write_leaves_a_whole_one(tmp_path, point, links):
    """The process vanishes before each call that changes the disk."""
    for step in (2, 4):
        written(tmp_path, step, keep=2)
    child = os.fork()
    if child == 0:

        def die(*args, **kwargs):
            os._exit(9)

        if not links:
            os.link = lambda *args: (_ for _ in ()).throw(OSError())
        if point == "half":
            checkpoints.Summed.flush = die
            write = checkpoints.Summed.write
            checkpoints.Summed.write = lambda s, d: write(s, d) if s.file.tell() < 4000 else die()
        elif point == "link":
            os.link = die
        elif point == "folder":
            checkpoints.sync_folder = die
        elif point == "unlink":
            Path.unlink = die
        else:
            setattr(os, point, die)
        CheckpointWriter(keep_last=2, background=False).save_checkpoint(
            content_of(6), tmp_path / "checkpoints" / "last.ckpt"
        )
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    found = newest_whole(tmp_path)
    step = read_checkpoint(found)["global_step"]
    assert step == (6 if point == "folder" else 4)
    written(tmp_path, 8, keep=2)  # and it goes on
    assert read_checkpoint(newest_whole(tmp_path))["global_step"] == 8


# ---------------------------------------------------------------------- in the background


def test_training_does_not_wait_and_does_not_disturb(tmp_path, monkeypatch):
    gate, started, whole = threading.Event(), threading.Event(), []
    path = tmp_path / "checkpoints" / "last.ckpt"
    begin, write = checkpoints.Summed.__init__, checkpoints.Summed.write

    def begun(self, file):
        whole.append(path.exists())
        begin(self, file)

    def held_up(self, data):
        started.set()
        assert gate.wait(PATIENCE)
        return write(self, data)

    monkeypatch.setattr(checkpoints.Summed, "__init__", begun)
    monkeypatch.setattr(checkpoints.Summed, "write", held_up)
    writer, content = CheckpointWriter(), content_of(2)
    writer.save_checkpoint(content, path)  # comes back while the gate is shut
    assert started.wait(PATIENCE) and not path.exists()
    content["state_dict"]["a"].add_(1)  # training goes on
    content["global_step"] = 3
    second = threading.Thread(target=writer.save_checkpoint, args=(content, path))
    second.start()
    second.join(0.2)  # time to begin too early; a slow machine may only miss that it does
    assert second.is_alive()
    gate.set()
    second.join()
    writer.join()
    assert whole == [False, True]  # one in flight at most
    assert read_checkpoint(path)["global_step"] == 3
    older = read_checkpoint(path.with_name("step_00000002.ckpt"))
    assert older["global_step"] == 2 and not older["state_dict"]["a"].any()


def test_an_error_of_the_thread_comes_up_once(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the folder's place")
    writer = CheckpointWriter()
    writer.save_checkpoint(content_of(1), tmp_path / "checkpoints" / "last.ckpt")
    writer.teardown()
    with pytest.raises(CheckpointError, match=r"last\.ckpt: could not be written"):
        writer.check()
    writer.join()


def test_a_snapshot_shares_what_the_original_shares():
    tied = torch.ones(3)
    copy = snapshot({"x": tied, "y": [tied, (tied[1:], 2)], "z": torch.empty(0)})
    assert copy["x"] is copy["y"][0] and copy["x"] is not tied
    assert torch.equal(copy["y"][1][0], tied[1:]) and copy["z"].shape == (0,)
    tied += 1
    assert copy["x"].tolist() == [1, 1, 1] and copy["y"][1][0].tolist() == [1, 1]


# ---------------------------------------------------------------------- resume=auto


def test_auto_starts_goes_on_skips_damage_and_ends(cli, words, whole, tmp_path):
    run = tmp_path / "run"
    words = [*words, f"hydra.run.dir={run}", "resume=auto"]
    code, lines, out = cli("train", *words, "trainer.max_steps=4")
    assert code == 0 and "resuming" not in out, lines
    (run / "summary.json").unlink()  # as if it had been killed before its end
    code, lines, out = cli("train", *words, "trainer.max_steps=4")
    assert code == 0 and "resuming run/checkpoints/last.ckpt" in out
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    flip(run / "checkpoints" / "last.ckpt", 5000)
    (run / "checkpoints" / "best.ckpt.tmp").write_text("torn")
    code, lines, out = cli("train", *words)
    assert code == 0 and "last.ckpt: damaged" in out and "older" in out
    assert "resuming" in out and "checkpoints/last.ckpt:" not in out.split("resuming")[1]
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert losses_of(run) == losses_of(whole)
    assert_same_training(run, whole)
    before = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    code, lines, out = cli("train", *words)
    assert code == 0 and "finished at step 9; nothing to do" in out
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_resume_of_a_run_skips_damage(cli, words, whole, tmp_path):
    import shutil

    run = shutil.copytree(whole, tmp_path / "run")
    flip(run / "checkpoints" / "last.ckpt", 5000)
    code, lines, out = cli("train", f"resume={run}")
    assert code == 0 and "last.ckpt: damaged" in out, lines
    assert_same_training(run, whole)


def test_auto_asks_for_a_folder(fails, words):
    fails("train", *words, "resume=auto", words=("resume=auto", "hydra.run.dir=runs/<name>"))


def test_processes_from_outside_must_agree_on_a_folder(fails, words, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails("train", *words, words="hydra.run.dir is not set")


# ---------------------------------------------------------------------- preemption


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_preemption_saves_the_step_and_asks_for_a_requeue(fails, words, whole, monkeypatch, name):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        break_runs(patch, 4, lambda: signal.raise_signal(number), "zero_grad")
        words = [*words, "hydra.run.dir=run", "resume=auto"]
        fails("train", *words, words=("preempted at step 5", "same command"))
    assert signal.getsignal(number) is handler
    assert state_of(Path("run"))["global_step"] == 5
    assert train(words) == 0
    assert losses_of(Path("run")) == losses_of(whole)
    assert_same_training(Path("run"), whole)


def test_the_exit_code_says_requeue(words, monkeypatch):
    def preempt_twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)

    break_runs(monkeypatch, 3, preempt_twice, "start")
    assert train([*words, "hydra.run.dir=run"]) == 75
    assert state_of(Path("run"))["global_step"] == 4


def test_preemption_does_not_wait_for_a_validation(cli, words, whole, monkeypatch):
    with monkeypatch.context() as patch:
        break_runs(patch, 6, lambda: signal.raise_signal(signal.SIGTERM), "validation")
        code, lines, _ = cli("train", *words, "hydra.run.dir=run", "data.eval_batch_size=1")
    assert code == 75 and "stopped during a validation" in lines[0]
    assert state_of(Path("run"))["global_step"] == 6
    assert train(["resume=run", "data.eval_batch_size=4"]) == 0
    assert losses_of(Path("run")) == losses_of(whole)
    assert_same_training(Path("run"), whole)


FAKE = {
    "srun": '#!/bin/sh\necho "srun $*" >> calls\nexit $CODE\n',
    "scontrol": '#!/bin/sh\necho "scontrol $*" >> calls\n[ "$1" = requeue ] || echo node1\n',
}


@pytest.mark.parametrize("code", [0, 75, 2])
def test_the_slurm_script_requeues_on_75_alone(tmp_path, code):
    for name, text in FAKE.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CODE": str(code),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "mine",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / "slurm.sh"), "experiment=vqgan_f16"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text()
    assert "train.py" in calls and "experiment=vqgan_f16" in calls and "resume=auto" in calls
    assert "hydra.run.dir=runs/mine" in calls and "--kill-on-bad-exit=1" in calls
    assert ("scontrol requeue 77" in calls) == (code == 75)
    assert result.returncode == (0 if code == 75 else code), result.stderr


# ---------------------------------------------------------------------- disks


def test_a_read_only_run_folder(fails, words, tmp_path):
    if os.geteuid():
        (tmp_path / "locked").mkdir()
        (tmp_path / "locked").chmod(0o555)
        folder = tmp_path / "locked" / "run"
    else:  # root may write anywhere but here
        folder = Path("/proc/vistok")
    fails("train", *words, f"hydra.run.dir={folder}", words=str(folder.parent))


def test_a_run_folder_that_becomes_read_only_loses_nothing(fails, words, whole, monkeypatch):
    real = checkpoints.Summed.__init__

    def refuse(self, file):
        real(self, file)
        if Path("run/checkpoints/last.ckpt").exists():
            raise OSError(30, "Read-only file system")

    words = [*words, "hydra.run.dir=run", "resume=auto", "trainer.val_check_interval=100"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Summed, "__init__", refuse)
        fails("train", *words, words=("last.ckpt", "Read-only", "previous checkpoint is intact"))
    assert state_of(Path("run"))["global_step"] == 2
    assert train(words) == 0
    assert losses_of(Path("run")) == losses_of(whole)


# ---------------------------------------------------------------------- metrics.jsonl


def log_rows(file, steps):
    for step in steps:
        file.log_metrics({"loss": step / 3}, step)
        if step == 3:
            file.log_metrics({"psnr": 20.0, "ssim": float("nan")}, step)


def test_metrics_survive_a_kill_at_any_byte(tmp_path):
    file = MetricsFile(tmp_path, 0)
    log_rows(file, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    rows = whole.splitlines(keepends=True)
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 3, 4, 5]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        ended = whole[:cut].count(b"\n")
        MetricsFile(tmp_path, 9).begin()
        assert path.read_bytes() == b"".join(rows[:ended])
        again = MetricsFile(tmp_path, 2)  # and the run goes on from there
        log_rows(again, range(min(ended, 2) + 1, 6))
        assert path.read_bytes() == whole
    path.write_bytes(whole)
    again = MetricsFile(tmp_path, 3)
    again.log_metrics({"ssim": 0.5, "psnr": 20.0}, 3)  # what followed the checkpoint comes again
    log_rows(again, (4, 5))
    assert path.read_bytes() == whole
    again.log_metrics({"psnr": 21.0}, 5)
    assert path.read_bytes() == whole + b'{"step": 5, "psnr": 21.0}\n'


# ---------------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "steps", "ranks"),
    [
        (4, 40, 1),
        pytest.param(2, 20, 2, marks=pytest.mark.ranks),
        pytest.param(67, 500, 1, marks=[pytest.mark.nightly, pytest.mark.timeout(2000)]),
        pytest.param(33, 250, 2, marks=[pytest.mark.nightly, pytest.mark.timeout(2000)]),
    ],
)
def test_kills_change_nothing(photos, tmp_path, kills, steps, ranks):
    """SIGKILL anywhere among what a run does to its files, often inside a checkpoint."""
    words = [
        *words_of(photos),
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps // 5}",
        "callbacks.checkpoint_every=5",
        "callbacks.codebook_window=20",
        "callbacks.num_pictures=0",
        "resume=auto",
        *(TWO if ranks == 2 else ()),
    ]
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "soak.py"), str(tmp_path), str(kills), str(ranks), *words],
        capture_output=True, text=True, timeout=1800 if kills > 9 else 880,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = (tmp_path / "log.txt").read_text()[-3000:]
    assert result.returncode == 0, result.stdout + result.stderr + log
    report = json.loads(result.stdout.splitlines()[-1])
    print(report)
    assert report["kills"] == kills
    assert report["steps_lost"] > 0 or kills < 4
    if kills >= 30:  # so many that some must fall there
        assert report["in_a_write"] >= kills // 6 and report["while_starting"] >= 1
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert_same_training(killed, whole)
    assert losses_of(killed) == losses_of(whole)
    first, second = (json.loads((run / "summary.json").read_text()) for run in (killed, whole))
    for summary in (first, second):  # what differs between calls
        for name in ("seconds", "seconds_of_all_calls", "resumed_at_step"):
            summary.pop(name, None)
    assert first == second
    assert not list((killed / "checkpoints").glob("*.tmp"))
