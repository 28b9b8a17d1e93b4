"""Run folders: claimed once, locked while a process trains, never replaced unasked."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from helpers import TINY
from vistok.core import run_lock
from vistok.core.errors import ConfigError, VistokError
from vistok.core.run_folders import RUN_FILES, claim_new, held, refuse_run, remove_run
from vistok.core.run_lock import LOCK, RunLock, start_of


@pytest.fixture
def words(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "data=folder", f"data.train={photos}", "data.image_size=16"]
    return [*words, "data.val_fraction=0.2", "trainer.max_steps=1", "trainer.val_check_interval=1"]


def state_of(folder):
    """Digests of every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------------- claims


def test_no_two_claims_get_one_folder(tmp_path):
    claimed, barrier = [], threading.Barrier(16)

    def claim():
        barrier.wait()
        claimed.append(claim_new(tmp_path / "runs" / "now_name"))

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {path.name for path in claimed}
    assert names == {"now_name", *(f"now_name_{n}" for n in range(2, 17))}


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_folder_with_any_file_of_a_run_is_refused(tmp_path, name):
    path = tmp_path / name
    if "." in name:
        path.write_text("mine")
    else:
        path.mkdir()
        refuse_run(tmp_path)  # an empty folder of that name is nobody's work
        (path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match=r"overwrite=true replaces it"):
        refuse_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    remove_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    refuse_run(tmp_path)


def test_a_new_run_replaces_an_old_one_only_when_asked(cli, fails, words, tmp_path):
    words = [*words, "hydra.run.dir=run"]
    assert cli("train", *words)[0] == 0
    before = state_of(tmp_path / "run")
    fails("train", *words, "seed=5", words=("hydra.run.dir=run", "resume=run", "overwrite=true"))
    fails("train", *words, "overwrite=true", "quantizer.metric=x", words="metric=x")
    fails("train", *words, "overwrite=true", "resume=auto", words="overwrite=true")
    assert state_of(tmp_path / "run") == before
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, lines, _ = cli("train", *words, "seed=5", "overwrite=true")
    assert code == 0, lines
    after = state_of(tmp_path / "run")
    assert after["checkpoints/last.ckpt"] != before["checkpoints/last.ckpt"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert "overwrite: false" in (tmp_path / "run" / "config.yaml").read_text()
    assert not [name for name in after if name.startswith(".")]


# ---------------------------------------------------------------------- the lock


def lock_of(folder, name=LOCK, **changes):
    lock = RunLock(folder)
    lock.owner.update(changes)
    (folder / name).write_text(json.dumps(lock.owner))


def newest(folder):
    return max(folder.iterdir(), key=lambda path: json.loads(path.read_text())["pid"])


def test_one_process_at_a_time(tmp_path, fails, words):
    folder = tmp_path / "run"
    with held(folder):
        assert (folder / LOCK).is_file()
        with pytest.raises(VistokError, match=f"process {os.getpid()} on .* trains in this folder"):
            RunLock(folder).acquire()
        fails("train", *words, "hydra.run.dir=run", words=("run: process", "trains in this folder"))
        fails("train", *words, "hydra.run.dir=run", "resume=auto", words="trains in this folder")
    assert not folder.exists()  # empty


@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("claims", [0, 2])
def test_only_one_of_many_gets_it(tmp_path, number, claims):
    got, barrier = [], threading.Barrier(8)
    lock_of(tmp_path, pid=2**22 + 1)  # of a process that is not there
    for dead in range(claims):  # each died when it was about to replace the lock of the one before
        text = json.dumps(json.loads(newest(tmp_path).read_text()), sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        lock_of(tmp_path, f"{LOCK}.{name}.claim", pid=2**22 + 2 + dead)

    def take():
        lock = RunLock(tmp_path)
        lock.owner["token"] += str(threading.get_ident())
        barrier.wait()
        try:
            lock.acquire()
            got.append(lock)
        except VistokError:
            pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and got[0].is_held()
    got[0].release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "left",
    [
        {"pid": 2**22 + 1},
        {"pid": os.getpid(), "started": "1"},  # the number is used again
        {"pid": "x"},
        {"pid": -1},
    ],
)
def test_the_lock_of_a_dead_process_is_taken(tmp_path, left):
    lock_of(tmp_path, **left)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert lock.is_held()
    lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 3}'])
def test_a_torn_lock_counts_as_one_of_elsewhere(tmp_path, monkeypatch, text):
    monkeypatch.setattr(run_lock, "SILENCE", 0.2)
    (tmp_path / LOCK).write_text(text)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_killed_process_leaves_a_lock_that_is_taken(tmp_path):
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom vistok.core.run_lock import RunLock\n"
        "RunLock(Path(sys.argv[2])).acquire()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    source = os.path.join(os.path.dirname(run_lock.__file__), "..", "..")
    subprocess.run([sys.executable, "-c", code, source, str(tmp_path)], check=False)
    assert (tmp_path / LOCK).exists()
    with held(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_the_heartbeat_tells_of_a_process_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE", 2.0)
    lock_of(tmp_path, host="elsewhere")
    said = []
    lock = RunLock(tmp_path, said.append)
    stop = threading.Event()

    def beat():
        number = 0
        while not stop.wait(0.05):
            number += 1
            os.utime(tmp_path / LOCK, (time.time(), time.time() + number))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(VistokError, match="on elsewhere trains in this folder"):
        lock.acquire()
    stop.set()
    thread.join()
    assert "waiting" in said[0]
    monkeypatch.setattr(run_lock, "SILENCE", 0.3)
    lock.acquire()  # no beat any more
    lock.release()


def test_a_process_knows_when_it_started():
    assert start_of(os.getpid()) == start_of(os.getpid())
    assert start_of(2**22 + 1) is None


def test_other_ranks_leave_the_lock_to_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with held(tmp_path / "run", is_new=True):
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- refused resumes


def test_a_refused_resume_leaves_the_run_as_it_was(cli, fails, words, tmp_path, photos):
    assert cli("train", *words, "hydra.run.dir=run")[0] == 0
    before = state_of(tmp_path / "run")
    more = ["resume=run", "trainer.max_steps=3"]
    fails("train", *more, "data.image_size=24", words=("data.image_size=24", "init_from"))
    fails("train", *more, "data.seed=5", words="data.seed=5")
    fails("train", *more, f"data.train={photos.parent}/nope", words="nope: no such folder")
    fails("train", *more, "optimizer.lr=-1", words="optimizer.lr=-1: must be a number, 0 or more")
    fails("train", *more, "tokenizer.encoder.depth=2", words="another architecture")
    fails("train", *more, "hydra.run.dir=other", words="goes on in its own folder")
    assert state_of(tmp_path / "run") == before
    code, lines, out = cli("train", *more)
    assert code == 0, lines
    assert "optimizer.on_extend=hold" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["resumed_at_step"] == 1
    assert summary["seconds_of_all_calls"] > summary["seconds"] - 1


def test_a_checkpoint_that_was_copied_alone_goes_on_in_a_new_folder(cli, words, tmp_path):
    import shutil

    assert cli("train", *words, "hydra.run.dir=run")[0] == 0
    (tmp_path / "dl").mkdir()
    shutil.copy(tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "dl")
    before = state_of(tmp_path / "dl")
    more = ["resume=dl/last.ckpt", "trainer.max_steps=2"]
    code, lines, _ = cli("train", *more, "hydra.run.dir=next")
    assert code == 0, lines
    assert json.loads((tmp_path / "next" / "summary.json").read_text())["steps"] == 2
    assert state_of(tmp_path / "dl") == before
