"""Bulk tokenizing: the ids are right, and nothing depends on who did what, and when."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import vistok
from helpers import PATIENCE, ROOT
from token_helpers import FORMATS, contents, settings, small_export, small_shards
from vistok.core.errors import ConfigError, DataError
from vistok.data.tokens import TokenFolder
from vistok.export.formats.all import samples_of
from vistok.export.plan import Settings
from vistok.export.tokenize import prepare, tokenize
from vistok.export.units import claimed, order_of, share_of
from vistok.export.views import Views


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An export, three shards with captions, and the folder of their tokens in every format."""
    place = tmp_path_factory.mktemp("tokenized")
    model = small_export(place / "export")
    small_shards(place / "sets", captions=True)
    words = [f"data.train={place}/sets/*.tar", "data.fields=[caption]"]
    config = settings(model, place / "tokens", "flip=true", f"format=[{','.join(FORMATS)}]")
    manifest = tokenize(config, words)
    assert manifest is not None
    return place, manifest, config, words


def test_ids_are_those_of_the_tokenizer(made):
    """Against the public calls, image by image, with mirrored pictures made by hand."""
    place, manifest, *_ = made
    tok, folder = vistok.load(place / "export"), TokenFolder(place / "tokens")
    from webdataset import WebDataset

    expected = []
    for shard in sorted((place / "sets").glob("*.tar")):
        for sample in WebDataset(str(shard), shardshuffle=False):
            path = place / "image.png"
            path.write_bytes(sample["png"])
            try:
                picture = tok.preprocess(path)
            except DataError:
                continue
            label, text = int(sample["cls"]), sample.get("txt")
            for view, images in enumerate((picture, picture.flip(-1))):
                ids = tok.tokenize(images)[0].numpy()
                expected.append((ids, label, text and text.decode(), sample["__key__"], view))
    assert len(folder) == len(expected) == 22
    for sample, (ids, label, text, key, view) in zip(folder, expected, strict=True):
        np.testing.assert_array_equal(sample.ids, ids)
        assert (sample.label, sample.caption, sample.key, sample.view) == (label, text, key, view)
    assert len({ids.tobytes() for ids, *_ in expected}) > 10
    assert manifest["counts"] == {"samples": 22, "tokens": 88, "left_out": 1}
    assert manifest["images"] == 11 and manifest["views"] == ["center", "center mirrored"]
    assert manifest["classes"] == {"first": 21, "count": 3} and manifest["vocabulary_size"] == 24
    assert manifest["labels"] and manifest["captions"] and manifest["dtype"] == "uint8"
    folder.check_tokenizer(
        json.loads((place / "export/checksums.json").read_text())["tokenizer_hash"]
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_samples(made, name):
    place, *_ = made
    folder = TokenFolder(place / "tokens")
    found = list(samples_of(folder, name))
    assert len(found) == len(folder)
    for sample, expected in zip(found, folder, strict=True):
        np.testing.assert_array_equal(sample.ids, expected.ids)
        if name in ("webdataset", "parquet"):
            assert (sample.label, sample.caption) == (expected.label, expected.caption)
            assert (sample.key, sample.view) == (expected.key, expected.view)
        if name == "llamagen":
            assert (sample.label, sample.view) == (expected.label, expected.view)


def test_the_same_command_finds_it_finished_and_adds_formats(made, tmp_path, capsys):
    place, manifest, config, words = made
    before = contents(place / "tokens")
    assert tokenize(config, words) == manifest
    assert "nothing to do" in capsys.readouterr().out
    assert contents(place / "tokens") == before
    fewer = settings(place / "export", tmp_path / "tokens", "flip=true", "format=parquet")
    tokenize(fewer, words)
    tokenize(fewer | {"format": FORMATS}, words)
    assert contents(tmp_path / "tokens") == before


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_workers_writes_the_same_bytes(made, tmp_path, count):
    place, _, config, words = made
    for number in range(count):
        tokenize(config | {"out": str(tmp_path / "t"), "worker": f"{number}/{count}"}, words)
    assert contents(tmp_path / "t") == contents(place / "tokens")


def test_a_worker_leaves_alone_what_another_one_does(made, tmp_path, capsys):
    place, _, config, words = made
    config = config | {"out": str(tmp_path / "t")}
    with claimed(tmp_path / "t" / ".claims", "tokens-000001") as mine:
        assert mine
        assert tokenize(config, words) is None
    told = capsys.readouterr().out
    assert "1 shard with other workers" in told and "run the same command again" in told
    assert not (tmp_path / "t" / "manifest.json").exists()
    assert not (tmp_path / "t" / "tokens-000001.safetensors").exists()
    with pytest.raises(DataError, match="has not"):
        TokenFolder(tmp_path / "t")
    assert tokenize(config, words) is not None
    assert contents(tmp_path / "t") == contents(place / "tokens")


def test_work_that_broke_off_anywhere_is_continued(made, tmp_path, monkeypatch):
    """An exception at some encoding or file: attempt n dies at its n-th, as a kill would."""
    import vistok.core.files as files
    from vistok.export.tokenize_units import Worker

    place, _, config, words = made
    config = config | {"out": str(tmp_path / "t"), "format": ["parquet", "megatron"]}
    encode, fsync = Worker.encode, os.fsync

    class Killed(BaseException):
        pass

    kills, left = 0, [1]

    def dying(real):
        def call(*args):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args)

        return call

    monkeypatch.setattr(Worker, "encode", dying(encode))
    monkeypatch.setattr(files.os, "fsync", dying(fsync))
    while True:
        try:
            assert tokenize(config, words)
            break
        except Killed:
            kills += 1
            left[0] = kills + 1
            assert kills < 40
    assert kills >= 4
    monkeypatch.undo()
    whole = config | {"out": str(tmp_path / "whole")}
    tokenize(whole, words)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_shards_are_opened_once_and_images_are_read_a_little_ahead(made, tmp_path, monkeypatch):
    from vistok.export.tokenize_units import Worker
    from vistok.export.units import Units

    place, *_ = made
    small_shards(tmp_path / "sets", shards=3, images=40)
    opened, counts, most = [], {"read": 0, "encoded": 0}, [0]
    real = {"open": Units.open, "read": Worker._read, "encode": Worker.encode}

    def opening(self, number):
        opened.append(number)
        return real["open"](self, number)

    def reading(self, *args):
        counts["read"] += 1
        most[0] = max(most[0], counts["read"] - counts["encoded"])
        return real["read"](self, *args)

    def encoding(self, pictures):
        counts["encoded"] += len(pictures)
        return real["encode"](self, pictures)

    monkeypatch.setattr(Units, "open", opening)
    monkeypatch.setattr(Worker, "_read", reading)
    monkeypatch.setattr(Worker, "encode", encoding)
    config = settings(place / "export", tmp_path / "t", "batch_size=6", "decode_threads=1")
    assert tokenize(config, [f"data.train={tmp_path}/sets/*.tar"])
    assert sorted(opened) == [0, 1, 2] and counts["read"] == 120
    assert most[0] <= 4 * 6, "two batches ahead, one that waits, and a part"


def test_killed_workers_of_changing_number(made, tmp_path):
    """SIGKILL as soon as there is progress, workers 1, then 3, then 2."""
    place, _, config, words = made
    small_shards(tmp_path / "sets", shards=7, images=5)
    words = [f"data.train={tmp_path}/sets/*.tar"]
    plain = ["flip=true", "format=[parquet,megatron]", "batch_size=3", "device=cpu"]
    killed_and_compared(place / "export", tmp_path, words, plain, kills=3)


@pytest.mark.nightly
def test_ten_kills_and_two_hundred_shards(made, tmp_path):
    place, *_ = made
    small_shards(tmp_path / "sets", shards=200, images=12)
    words = [f"data.train={tmp_path}/sets/*.tar"]
    plain = ["flip=true", "crops=5", "crop_range=1.1", "format=[parquet,megatron,webdataset]"]
    plain += ["batch_size=5", "device=cpu"]
    killed_and_compared(place / "export", tmp_path, words, plain, kills=10)


def killed_and_compared(model, place, words, plain, kills):
    """Forks of this process are the workers: they need not import anything before they can die."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    config = settings(model, place / "t", *plain)

    def start(count):
        workers = [
            context.Process(target=tokenize, args=(config | {"worker": f"{k}/{count}"}, words))
            for k in range(count)
        ]
        for worker in workers:
            worker.start()
        return workers

    def written():
        return len(list((place / "t").glob("tokens-*")))

    shards = len(list((place / "sets").glob("*.tar")))
    landed = 0
    for kill in range(kills):
        workers = start((1, 3, 2)[kill % 3])
        wanted = written() + max(1, (shards - written()) // (kills + 1 - kill))
        begun = time.monotonic()
        while any(w.is_alive() for w in workers) and written() < wanted:
            assert time.monotonic() - begun < PATIENCE
            time.sleep(0.002)
        for worker in workers:
            landed += worker.is_alive()
            worker.kill()
            worker.join()
    for worker in (last := start(2)):
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in last] == [0, 0]
    assert landed >= kills // 2, "too few kills landed while there was work"
    tokenize(config | {"out": str(place / "whole")}, words)
    assert contents(place / "t") == contents(place / "whole")


@pytest.mark.ranks
def test_processes_of_one_command(made, tmp_path):
    place, _, _, words = made
    run = subprocess.run(
        [sys.executable, "-m", "vistok", "tokenize", f"model={place / 'export'}", "batch_size=3",
         "device=cpu", f"out={tmp_path / 't'}", *words, "flip=true", "workers=2",
         f"format={','.join(FORMATS)}"],
        capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tokenizers")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "22 samples of 11 images" in run.stdout
    assert contents(tmp_path / "t") == contents(place / "tokens")


# ---------------------------------------------------------------------- views


def test_ten_crops_are_torchvisions(made):
    transforms = pytest.importorskip("torchvision.transforms.functional")
    from helpers import picture
    from vistok.data.transforms import Transform

    image = picture(3, 40, 52)
    views = Views((16, 20), "adm_center", 5, 1.1, True)
    large = Transform((17, 22), "adm_center")(image, np.random.default_rng(0))
    expected = transforms.ten_crop(torch.from_numpy(large).permute(2, 0, 1), [16, 20])
    found = views(image)
    assert len(views) == 10 and found.shape == (10, 16, 20, 3)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.permute(1, 2, 0))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((16, "adm_center", 2, 1.0, False), "crops=2"),
        ((16, "adm_center", True, 1.0, False), "crops=True"),
        ((16, "adm_center", 5, 0.9, False), "crop_range=0.9"),
        ((16, "adm_center", 1, 1.1, False), "crop_range=1.1"),
        ((16, "resize_random", 1, 1.0, False), "draws at random"),
    ],
)
def test_views_that_cannot_be(words, told):
    side, *rest = words
    with pytest.raises(ConfigError, match=told):
        Views((side, side), *rest)


# ---------------------------------------------------------------------- division of work


@pytest.mark.parametrize("count", [1, 2, 7, 512])
@pytest.mark.parametrize("units", [1, 5, 1000])
def test_every_worker_would_do_everything_its_own_part_first(units, count):
    own = []
    for number in range(count):
        order = list(order_of(units, number, count))
        assert sorted(order) == list(range(units))
        mine = [unit for unit in order if unit % count == number]
        assert order[: len(mine)] == mine
        own += mine
    assert sorted(own) == list(range(units))


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        (
            {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4",
             "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "11"},
            (2, 4),
        ),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, (5, 6)),
        (
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_PROCID": "3",
             "SLURM_NTASKS": "4", "SLURM_ARRAY_TASK_MAX": "1"},
            (7, 8),
        ),
    ],
)  # fmt: skip
def test_launchers_say_which_worker_this_is(environment, share, monkeypatch):
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE") or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert share_of(None) == share
    assert share_of("2/5") == (2, 5)


@pytest.mark.parametrize("worker", ["5/5", "1", "a/b", "-1/4", "1/0", "/"])
def test_shares_that_cannot_be(worker):
    with pytest.raises(ConfigError, match="worker="):
        share_of(worker)


def test_512_ranks_that_die_and_are_split_anew(tmp_path):
    """The claims and the order themselves, with dying ranks simulated by a scheduler.

    Each rank takes a step at a time: it claims a unit, and a step later the unit is there. Ranks
    die in between; whole jobs are begun anew with other numbers of ranks. In the end every unit
    was written, never by two at once.
    """
    rng = np.random.default_rng(0)
    units, written, twice = 3000, {}, 0
    jobs = [512, 384, 512, 64]
    for job, count in enumerate(jobs):
        held: dict[int, int] = {}  # unit to rank
        orders = {rank: order_of(units, rank, count) for rank in range(count)}
        working: dict[int, int] = {}  # rank to unit
        alive = set(range(count))
        steps = 0
        while alive:
            steps += 1
            if job < len(jobs) - 1 and steps > 3:
                break  # the job's time is over: whatever was claimed is lost
            for rank in rng.permutation(sorted(alive)).tolist():
                if rng.random() < 0.03:
                    alive.discard(rank)  # killed: the system drops its claim
                    held.pop(working.pop(rank, -1), None)
                    continue
                if rank in working:
                    unit = working.pop(rank)
                    twice += unit in written
                    written[unit] = (job, rank)
                    held.pop(unit)
                for unit in orders[rank]:
                    if unit not in written and unit not in held:
                        held[unit], working[rank] = rank, unit
                        break
                else:
                    if rank not in working:
                        alive.discard(rank)
            if not alive and len(written) < units:
                orders = {0: order_of(units, 0, 1)}
                alive = {0}
    assert sorted(written) == list(range(units)) and twice == 0
    share = np.bincount([rank for job, rank in written.values() if job == 0], minlength=512)
    assert share.max() <= 4


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("format=[megatorn]", "did you mean 'megatron'"),
        ("format=megatorn", "did you mean 'megatron'"),
        ("format=3", "format=3: must be of native"),
        ("document=[eos]", "document"),
        ("batch_size=0", "batch_size=0"),
        ("batch_size=1.5", "batch_size=1.5"),
        ("threads=0", "threads=0"),
        ("workers=0", "workers=0"),
        ("num_tokens=2", "fixed length"),
        ("psnr=20", "fixed length"),
        ("psnr=true", "psnr=true"),
        ("precision=8", "precision=8"),
        ("flip=2", "flip=2"),
        ("worker=3", "k/n"),
        ("images_per_shard=-1", "images_per_shard"),
    ],
)
def test_wrong_values(made, tmp_path, word, told):
    place, _, _, words = made
    with pytest.raises(ConfigError, match=told) as caught:
        tokenize(settings(place / "export", tmp_path / "t", word), words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_a_folder_of_something_else_is_left_alone(made, tmp_path):
    place, _, config, words = made
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"holds thesis\.tex"):
        tokenize(config | {"out": str(tmp_path / "t")}, words)
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["thesis.tex"]


def test_a_folder_keeps_to_its_plan(made, tmp_path):
    place, _, config, words = made
    before = contents(place / "tokens")
    for change, told in (({"batch_size": 5}, "batch_size"), ({"flip": False}, "flip")):
        with pytest.raises(DataError, match=f"begun with another {told}"):
            tokenize(config | change, words)
    other = small_shards(tmp_path / "sets")
    with pytest.raises(DataError, match=r"another data\.(train|fields)"):
        tokenize(config, [f"data.train={other}/*.tar"])
    assert contents(place / "tokens") == before


def test_a_run_is_told_to_be_exported(made, finished_run, tmp_path):
    place, _, _, words = made
    with pytest.raises(ValueError, match="vistok export run="):
        tokenize(settings(finished_run, tmp_path / "t"), words)


def test_a_set_without_a_usable_image(made, tmp_path):
    place, *_ = made
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"\xff\xd8\xff but not really")
    with pytest.raises(DataError, match=r"none of the images can be used; a\.jpg"):
        tokenize(settings(place / "export", tmp_path / "t"), [f"data.train={tmp_path}/photos"])


def test_altered_formats_are_found(made, tmp_path):
    import shutil

    place, *_ = made
    copy = shutil.copytree(place / "tokens", tmp_path / "t")
    path = copy / "megatron" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="altered"):
        list(samples_of(TokenFolder(copy), "megatron"))
    with pytest.raises(DataError, match=r"valid in stream 0|expected the token"):
        data[5] = 255
        path.write_bytes(data)
        list(samples_of(TokenFolder(copy, verify=False), "megatron"))
    with pytest.raises(ConfigError, match="format=ttf"):
        list(samples_of(TokenFolder(copy), "ttf"))


def test_per_image_lengths(tmp_path):
    """Each image as few tokens as reach its PSNR: those of the public call."""
    model = small_export(tmp_path / "export", "one_d_piece_tiny")
    small_shards(tmp_path / "sets", shards=2)
    words = [f"data.train={tmp_path}/sets/*.tar"]
    formats = "format=[megatron,torchtitan,webdataset,parquet]"
    # At a batch of one the public call sees the very same numbers.
    config = settings(model, tmp_path / "t", "psnr=11", formats, "batch_size=1")
    manifest = tokenize(config, words)
    assert manifest["lengths"] == "variable" and manifest["budgets"] == "all"
    folder, tok = TokenFolder(tmp_path / "t"), vistok.load(model)
    worker = prepare(Settings.of(config), words)
    found = []
    for unit in range(2):
        source, numbers = worker.units.open(unit)
        for number in numbers:
            (tmp_path / "a.png").write_bytes(source.read(number)[1])
            try:
                images = tok.preprocess(tmp_path / "a.png")
            except DataError:
                continue
            ids, lengths = tok.tokenize_to_target(images, psnr=11)
            found.append(ids[0, : lengths[0]].numpy())
    assert len(found) == len(folder)
    for sample, ids in zip(folder, found, strict=True):
        np.testing.assert_array_equal(sample.ids, ids)
    assert len({len(ids) for ids in found}) > 1
    for name in ("megatron", "torchtitan", "webdataset", "parquet"):
        for sample, ids in zip(samples_of(folder, name), found, strict=True):
            np.testing.assert_array_equal(sample.ids, ids)
    with pytest.raises(ConfigError, match="one length"):
        tokenize(config | {"format": ["llamagen"]}, words)
