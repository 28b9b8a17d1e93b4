"""The sample data: held-out photographs, cut as promised, built once even by many."""

import io
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.core.errors import ConfigError, DataError
from vistok.data import photographs
from vistok.data.datamodule import VistokDataModule
from vistok.data.sources import ShardSource


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(photographs, "MIN_IMAGES", 40)
    monkeypatch.setattr(photographs, "MAX_IMAGES", 40)


def images(paths):
    source = ShardSource(paths)
    return [
        np.asarray(Image.open(io.BytesIO(source.read(i)[1])).convert("RGB"))
        for i in range(len(source))
    ]


def test_photographs_are_disjoint_and_there():
    assert not set(photographs.TRAIN) & set(photographs.VAL)
    assert set(photographs.VAL) == {"coffee.png", "china.jpg"}
    digests = {photographs._find(n).read_bytes() for n in (*photographs.TRAIN, *photographs.VAL)}
    assert len(digests) == len(photographs.TRAIN) + len(photographs.VAL)


def test_validation_is_a_grid_of_the_held_out_photographs():
    _, val = photographs.sample_shards(64)
    crops = images(val)
    expected = []
    for name in ("coffee.png", "china.jpg"):
        whole = np.asarray(Image.open(photographs._find(name)).convert("RGB"))
        for y in range(0, whole.shape[0] - 63, 64):
            for x in range(0, whole.shape[1] - 63, 64):
                expected.append(whole[y : y + 64, x : x + 64])
    assert len(crops) == 9 * 6 + 10 * 6
    assert all(np.array_equal(a, b) for a, b in zip(crops, expected, strict=True))


def test_training_images_are_cut_from_the_training_photographs():
    train, _ = photographs.sample_shards(64)
    crops = images(train)
    assert len(train) == 4 and len(crops) == 40 and {c.shape for c in crops} == {(80, 80, 3)}
    pool = [np.asarray(photographs._open(photographs._find(n))) for n in photographs.TRAIN]
    packed = [whole.astype(int) @ [1, 256, 65536] for whole in pool]
    native = 0
    for crop in crops:
        own = crop.astype(int) @ [1, 256, 65536]
        for whole, numbers in zip(pool, packed, strict=True):
            # Native crops are found by three of their pixels, then compared whole.
            alike = (numbers[:-79, :-79] == own[0, 0]) & (numbers[79:, 79:] == own[79, 79])
            hits = np.argwhere(alike & (numbers[40:-39, 40:-39] == own[40, 40]))
            native += any(np.array_equal(whole[y : y + 80, x : x + 80], crop) for y, x in hits)
    assert 12 <= native <= 30  # half of them


def test_the_same_again_and_only_built_once(cache, monkeypatch):
    first = photographs.sample_shards(32)
    content = [path.read_bytes() for paths in first for path in paths]
    stamps = [path.stat().st_mtime_ns for paths in first for path in paths]
    with monkeypatch.context() as patch:
        patch.setattr(photographs, "_build", lambda *a: pytest.fail("built again"))
        assert photographs.sample_shards(32) == first
    assert stamps == [path.stat().st_mtime_ns for paths in first for path in paths]
    monkeypatch.setenv("VISTOK_CACHE", str(cache / "other"))
    second = photographs.sample_shards(32)
    assert content == [path.read_bytes() for paths in second for path in paths]


def _build(size):
    return [str(path) for paths in photographs.sample_shards(size) for path in paths]


def test_several_processes_at_once(cache):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        results = pool.map(_build, [16] * 6, chunksize=1)
    assert all(result == results[0] for result in results)
    assert len(list((cache / "photographs").iterdir())) == 1  # nothing half-built is left
    assert len(images(photographs.sample_shards(16)[0])) == 40


def test_a_size_larger_than_the_photographs(monkeypatch):
    monkeypatch.setattr(photographs, "MIN_IMAGES", 4)
    _, val = photographs.sample_shards(512)
    assert [crop.shape for crop in images(val)] == [(512, 512, 3)] * 2


def test_through_the_datamodule():
    datamodule = VistokDataModule(
        image_size=[32, 24], train_crop="random", batch_size=8, num_workers=0
    )
    datamodule.prepare_data()
    datamodule.setup()
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 24)
    assert datamodule.num_train == 40 and datamodule.num_val == 18 * 12 + 20 * 13
    val = torch.cat([batch["image"] for batch in datamodule.val_dataloader()])
    assert val.shape == (datamodule.num_val, 3, 32, 24) and val.float().std() > 30


def test_messages(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"brings its own images"):
        VistokDataModule(val="/x")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write the sample data to .* set VISTOK_CACHE"):
        photographs.sample_shards(16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"astronaut.png is not in the installed packages"):
        photographs.sample_shards(16)
