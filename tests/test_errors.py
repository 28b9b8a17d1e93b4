"""Fails well: one line that names the key or file, a non-zero exit code, no traceback.

(Shards and folders in all their brokenness are in tests/data.)
"""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import vistok
from helpers import PATIENCE, ROOT, TINY, add_seal, losses_of, make_photos
from vistok.checkpoints.read import read_checkpoint
from vistok.core.errors import CheckpointError


@pytest.fixture
def words(photos):
    """A tiny run on the pictures; what comes later wins."""
    return [*TINY, "data=folder", f"data.train={photos}", "data.image_size=16"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "experiment=titok_tyny",
            ("experiment=titok_tyny", "did you mean 'titok_tiny'", "vqgan_f16"),
        ),
        ("quantizer=emavq", ("quantizer=emavq", "did you mean 'ema_vq'")),
        ("logger=wandbb", ("logger=wandbb", "did you mean 'wandb'")),
        ("data=foldr", ("data=foldr", "did you mean 'folder'")),
        ("trainer.max_step=3", ("trainer.max_step", "did you mean 'trainer.max_steps'")),
        ("max_steps=3", ("max_steps", "did you mean 'trainer.max_steps'")),
        ("quantizer.codebok_size=9", ("codebok_size", "did you mean 'quantizer.codebook_size'")),
        ("nonsense", ("nonsense", "key=value")),
        ("resume=", ("resume", "which run")),
        ("hydra.run.dir=", ("hydra.run.dir=: name a folder",)),
        ("hydra.run.dir=''", ("name a folder",)),
        ("hydra.run.dir=null", ("hydra.run.dir=null: name a folder",)),
        ("resume=runs/nope", ("runs/nope", "no such run")),
        ("--config-dir=/nope/there", ("/nope/there", "no such config folder")),
        ("--config-dir", ("--config-dir", "which folder")),
    ],
)
def test_mistyped_words(fails, override, expected):
    fails("train", override, words=expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.max_steps=abc", ("trainer.max_steps=abc", "a number")),
        ("optimizer.lr=fast", ("optimizer.lr=fast", "a number")),
        ("logger=wandb logger.offline=perhaps", ("logger.offline=perhaps", "true or false")),
        ("trainer.precision=17", ("trainer.precision=17", "bf16")),
        ("trainer.matmul_precision=hi", ("trainer.matmul_precision=hi", "highest, high, medium")),
        ("trainer.precision=16", ("trainer.precision=16", "needs a GPU")),
        ("data.image_size=16.5", ("image_size=16.5",)),
        ("tokenizer.decoder=null", ("tokenizer.decoder=null", "_target_")),
        ("data.image_size=20", ("data.image_size=20", "patch of 8 px", "data.image_size=16")),
        ("tokenizer=vqgan_tiny data.image_size=20", ("data.image_size=20", "divisible")),
        ("quantizer.codebook_size=1", ("quantizer.codebook_size=1", "2 or more")),
        ("quantizer.metric=foo", ("quantizer.metric=foo", "cosine or euclidean")),
        ("ema.decay=1.5", ("ema.decay=1.5", "below 1")),
        ("tokenizer.encoder.num_heads=3", ("num_heads=3", "16")),
        ("stage.proxy=runs/x", ("stage.proxy is set", "stage=single", "add stage=proxy")),
        ("stage.name=proxy stage.proxy=runs/x", ("runs/x: no such run",)),
        ("stage.frozen=encodr", ("stage.frozen", "no part encodr")),
        (
            "tokenizer=flextok_tiny tokenizer.decoder.null_probability=0 tokenizer.decoder.guidance=7.5",
            ("tokenizer.decoder.guidance=7.5", "null_probability=0", "guidance=1"),
        ),
        (
            "tokenizer=flextok_tiny tokenizer.decoder.steps=2.5",
            ("tokenizer.decoder.steps=2.5", "whole number"),
        ),
        ("alignment.teacher=vit_tiny_patch16_22", ("alignment.teacher", "did you mean")),
        ("tokenizer.decoder.latent_dim=8", ("tokenizer.latent_dim", "8", "equal")),
        ("+quantizer.foo=1", ("quantizer.foo: no such argument of vq",)),
        ("plugins=[no_such_module]", ("plugins", "no_such_module")),
        ("plugins=no_such_module", ("plugins", "no_such_module")),
        ("init_from=runs/nope", ("runs/nope", "no such")),
        ("quantizer._target_=os.system", ("quantizer._target_=os.system", "registry")),
        ("quantizer._target_=vqq", ("quantizer._target_=vqq", "did you mean 'vq'")),
        ("quantizer._target_=titok", ("is a tokenizer, expected a quantizer",)),
        ("tokenizer._target_=vq", ("is a quantizer, expected a tokenizer",)),
        ("tokenizer.decoder._target_=cnn_encoder", ("is an encoder, expected a decoder",)),
        ("tokenizer.encoder._target_=mse", ("is the class MSELoss, expected an encoder",)),
        (
            "quantizer._target_=vistok.quantizers.vq.VectorQuantiser",
            ("did you mean 'vistok.quantizers.vq.VectorQuantizer'",),
        ),
        ("data.train=/no/photos", ("/no/photos", "no such folder")),
        ("data.train=null", ("data.train is not set",)),
        ("data=shards data.train=/x-{000000..000003}.tar", ("no such shard /x-000000.tar",)),
    ],
)
def test_wrong_values(fails, words, tmp_path, override, expected):
    words = words if "vqgan" not in override else [w for w in words if "tokenizer." not in w]
    fails("train", *words, *override.split(), words=expected)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]  # nothing was begun


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu(fails, words, finished_run):
    fails("train", *words, "trainer.accelerator=gpu", words=("trainer.accelerator=gpu", "cpu"))
    fails("evaluate", f"run={finished_run}", "device=cuda", words=("device=cuda", "cpu"))


def test_a_diverging_loss_is_named(fails, words):
    fails(
        "train", *words, "optimizer.lr=1e30", "trainer.gradient_clip_val=0", words="learning rate"
    )


def test_fewer_shards_than_workers_and_broken_shards(fails, cli, words, photos, tmp_path):
    code, _, _ = cli("make_shards", photos, f"out={tmp_path}/s", "workers=1")
    assert code == 0
    (tar,) = (tmp_path / "s").glob("train-*.tar")
    words = [*words, "data=shards", f"data.train={tar}", "data.val_fraction=0.2"]
    words = [*words, "data.image_size=16"]
    fails("train", *words, "data.num_workers=2", words=("data.num_workers=2", "1 training shard"))
    whole = tar.read_bytes()
    for name, content, expected in (
        ("none", b"no tar at all " * 100, "is not a tar"),
        ("short", whole[: len(whole) // 2], "short"),
    ):
        bad = tmp_path / f"{name}.tar"
        bad.write_bytes(content)
        fails("train", *words, f"data.train={bad}", words=(bad.name, expected))
    with tarfile.open(tmp_path / "empty.tar", "w") as empty:
        empty.add(ROOT / "LICENSE", "a.txt")
    fails("train", *words, f"data.train={tmp_path}/empty.tar", words=("empty.tar", "no image"))


def test_a_bad_image_is_skipped_and_reported(cli, words, tmp_path):
    folder = make_photos(tmp_path / "photos")
    (folder / "007x.png").write_bytes(b"\x89PNG but not really")
    run = tmp_path / "run"
    words = [*words, f"data.train={folder}", f"data.val={folder}", f"hydra.run.dir={run}"]
    code, _, out = cli("train", *words, "trainer.max_steps=6")
    assert code == 0
    assert "skipped 1 image: 1 not an image; 007x.png" in out
    assert json.loads((run / "summary.json").read_text())["skipped_images"] == 1
    code, _, out = cli("evaluate", f"run={run}")
    assert code == 0 and "skipped 1 image: 1 not an image; 007x.png" in out
    results = json.loads((run / "eval" / "metrics.json").read_text())
    assert results["skipped_images"] == 1 and results["images"] == 22


def test_nothing_but_bad_images_fails(fails, words, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.png").write_bytes(b"no picture")
    fails("train", *words, f"data.train={folder}", words=(str(folder), "can be used"))


# ---------------------------------------------------------------------- runs and checkpoints


def test_eval_and_export_without_a_run(fails, finished_run, tmp_path):
    fails("evaluate", words=("run", "eval run="))
    fails("evaluate", "run=runs/nope", words=("runs/nope", "no such run"))
    fails("evaluate", "rum=x", words="did you mean 'run'")
    near = finished_run.with_name("rum")
    fails("evaluate", f"run={near}", words=("rum", "did you mean 'run'"))
    (tmp_path / "empty").mkdir()
    fails("evaluate", "run=empty", words=("empty", "last.ckpt"))
    fails("export", f"run={finished_run}", words="out is missing")
    fails("export", "run=runs/nope", "out=x", words="runs/nope")
    fails("evaluate", f"run={finished_run}", "weights=best", words=("weights=best", "ema or last"))
    fails("evaluate", f"run={finished_run}", "data.nope=1", words=("data.nope", "no such key"))
    wrong = ("data.image_size", "data: 3 x (32, 32)")[1:]
    fails("evaluate", f"run={finished_run}", "data.image_size=32", f"out={tmp_path}/o", words=wrong)


def test_resume_refuses_what_cannot_go_on(fails, finished_run, tmp_path):
    fails("train", f"resume={finished_run}", words=("trainer.max_steps=7", "already at step 7"))
    fails(
        "train",
        f"resume={finished_run}",
        "trainer.max_stepz=9",
        words="did you mean 'trainer.max_steps'",
    )
    run = shutil.copytree(finished_run, tmp_path / "run")
    more = (f"resume={run}", "trainer.max_steps=9")
    fails("train", *more, "data=sample", words="a resumed run keeps its own data")
    fails("train", *more, "data.seed=5", words=("data.seed=5", "data.seed=0"))
    other = "tokenizer.encoder.num_latent_tokens=2"
    line = fails("train", *more, other, words=("last.ckpt", "another architecture", "shape"))
    assert "latent" in line
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    fails("train", *more, words=("run", "last.ckpt"))
    (run / "config.yaml").unlink()
    fails("train", *more, words="config.yaml")


@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.9, 0.999])
def test_a_checkpoint_cut_short(fails, finished_run, tmp_path, kept):
    whole = (finished_run / "checkpoints" / "last.ckpt").read_bytes()
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    shutil.copy(finished_run / "config.yaml", tmp_path / "run")
    for command in (["evaluate", f"run={path}"], ["evaluate", "run=run"]):
        fails(*command, words="last.ckpt")
    fails("train", "resume=run", "trainer.max_steps=9", words="last.ckpt")
    fails("export", "run=run", "out=out", words="last.ckpt")
    assert not (tmp_path / "out").exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_checkpoint_is_refused_and_runs_nothing(fails, finished_run, words, tmp_path):
    mark = tmp_path / "executed"
    good = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    path = tmp_path / "evil.ckpt"
    for content in (Malicious(mark), {**good, "callbacks": Malicious(mark)}):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            add_seal(path)
            fails("evaluate", f"run={path}", words=("evil.ckpt", "refused"))
            fails("train", "init_from=evil.ckpt", *words, words=("evil.ckpt", "refused"))
            fails("export", f"run={path}", "out=out", words="evil.ckpt")
            with pytest.raises(CheckpointError):
                vistok.load(path)
            assert not mark.exists()
    torch.load(path, weights_only=False)  # the trap itself works
    assert mark.exists()


def test_files_that_are_no_checkpoints(fails, tmp_path):
    for name, content in (
        ("text.ckpt", b"hello"),
        ("yaml.ckpt", (ROOT / "pyproject.toml").read_bytes()),
    ):
        (tmp_path / name).write_bytes(content)
        fails("evaluate", f"run={name}", words=name)
    for name, value in (("list.ckpt", [1]), ("bare.ckpt", {"state_dict": {}})):
        torch.save(value, tmp_path / name)
        add_seal(tmp_path / name)
        fails("evaluate", f"run={name}", words=(name, "not a vistok checkpoint"))


# ---------------------------------------------------------------------- tracebacks on demand


def test_debug_shows_the_traceback(words, monkeypatch, tmp_path):
    from vistok.cli import train
    from vistok.core.errors import VistokError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(VistokError, match="patch of 8"):
        train([*words, "data.image_size=20", "debug=true"])
    monkeypatch.setenv("VISTOK_DEBUG", "1")
    with pytest.raises(VistokError, match="no such config"):
        train(["experiment=nope"])


def test_errors_of_libraries_are_one_line_too(fails, words, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("first line\nsecond line\n" + "x" * 5000)

    monkeypatch.setattr("vistok.training.run.build_trainer", broken)
    line = fails("train", *words, words=("RuntimeError", "first line second line", "debug=true"))
    assert len(line) < 500


def test_fails_in_a_fresh_process_too(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "experiment=titok_tyny"],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout.count("\n") == 1  # the sign of life
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: experiment=")


# ---------------------------------------------------------------------- a full disk


def interrupted_writes(monkeypatch, how: str, after: int):
    """Let the first `after` checkpoints be written, then fail."""
    count = 0
    real_save, real_fsync = torch.save, os.fsync

    def save(content, file, *args, **kwargs):
        nonlocal count
        count += 1
        if count > after and how == "save":
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_save(content, file, *args, **kwargs)

    def fsync(descriptor):
        if count > after:
            metrics = os.path.samestat(os.fstat(descriptor), os.stat("run/metrics.jsonl"))
            if how == ("metrics" if metrics else "fsync"):
                raise OSError(errno.ENOSPC, "No space left on device")
        return real_fsync(descriptor)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("how", ["save", "fsync", "metrics"])
def test_disk_full_keeps_the_previous_checkpoint(fails, cli, words, tmp_path, monkeypatch, how):
    run = tmp_path / "run"
    words = [*words, f"hydra.run.dir={run}", "callbacks.checkpoint_every=2", "trainer.max_steps=6"]
    words += ["trainer.val_check_interval=100"]
    with monkeypatch.context() as patch:
        interrupted_writes(patch, how, after=0 if how == "metrics" else 1)
        told = ("metrics.jsonl",) if how == "metrics" else ("last.ckpt", "previous checkpoint")
        fails("train", *words, words=(*told, "could not be written", "No space left"))
    last = run / "checkpoints" / "last.ckpt"
    assert [p.name for p in last.parent.iterdir()] == ["last.ckpt"]
    assert read_checkpoint(last)["global_step"] == 2
    vistok.load(run)
    code, lines, _ = cli("train", f"resume={run}")
    assert code == 0, lines
    assert list(losses_of(run)) == [1, 2, 3, 4, 5, 6]


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
import vistok.training.run as run
from vistok.cli import train
real = run.fit
def fit(trainer, *args):
    callback = trainer.checkpoint_callbacks[-1]
    real_save = callback.save
    def save(*a):
        real_save(*a)
        callback.writer.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # from now on it is full
    callback.save = save
    return real(trainer, *args)
run.fit = fit
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(train(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_really_limited_disk(words, tmp_path):
    run = tmp_path / "run"
    words = [*words, f"hydra.run.dir={run}", "callbacks.checkpoint_every=2", "trainer.max_steps=6"]
    words += ["trainer.val_check_interval=100"]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(ROOT / "tokenizers"), *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert "last.ckpt: could not be written" in line and "previous checkpoint is intact" in line
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000 and Path(run).exists()


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "room",
    [
        pytest.param(kilobytes, marks=[] if kilobytes in (400, 1000) else pytest.mark.nightly)
        for kilobytes in (0, 4, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 1000, 1200, 1500)
    ],
)
def test_a_real_disk_that_is_full(cli, words, small_disk, room):
    """Wherever the room ends: one line says so, and what was there goes on from there."""
    run, fill = small_disk / "run", small_disk / "fill"
    fill.write_bytes(b"x" * ((8192 - room) << 10))
    words = [*words, "experiment=titok_tiny", f"hydra.run.dir={run}"]  # three checkpoints fit
    words += ["callbacks.checkpoint_every=2", "trainer.max_steps=6"]
    code, lines, out = cli("train", *words)
    if code:
        assert len(lines) == 1 and "No space left" in lines[0], out
    fill.unlink()
    if (run / "checkpoints" / "last.ckpt").exists():
        vistok.load(run)
        last = read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"]
        if last < 6 or code:
            code, lines, _ = cli("train", f"resume={run}")
            assert code == 0, lines
    else:
        code, lines, out = cli("train", *words)
        assert code == 0 or "overwrite=true" in lines[0], lines
        code, lines, out = cli("train", *words, "overwrite=true")
        assert code == 0, lines
    assert list(losses_of(run)) == [1, 2, 3, 4, 5, 6]


def test_a_folder_that_is_not_a_run_is_told_by_its_content(fails, tmp_path):
    """A hint names something else than the folder that was given."""
    folder = tmp_path / "dl"
    folder.mkdir()
    for words in (["train", f"resume={folder}"], ["evaluate", f"run={folder}"]):
        assert "did you mean" not in fails(*words, words=str(folder))
    (folder / "notes.txt").write_text("")
    fails(
        "train", f"resume={folder}", words=(f"{folder}: has no config.yaml", "contains: notes.txt")
    )
    fails("train", f"resume={tmp_path / 'd'}", words=("no such run", "did you mean 'dl'"))
