"""The DataModule: batches, exact resume, bad images, hold-out and its messages."""

import inspect
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from data_helpers import encode, picture

from vistok.core.errors import ConfigError, DataError
from vistok.data.datamodule import VistokDataModule
from vistok.data.dataset import StreamError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def module(shards, **options):
    options = {
        "kind": "shards",
        "train": f"{shards}/train-*.tar",
        "val_fraction": 0.1,
        "image_size": 16,
        "batch_size": 8,
        "num_workers": 0,
        "augment": ["hflip", "color"],
        "shuffle_buffer": 12,
        **options,
    }
    datamodule = VistokDataModule(**options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def take(datamodule, count):
    """Consume batches as a training loop does."""
    batches = []
    for batch in datamodule.train_dataloader():
        batches.append(batch)
        datamodule.advance()
        if len(batches) == count:
            return batches
    raise AssertionError("the stream ended")


def rows(batches):
    """(index, pixels) of each sample, in order."""
    return [
        (int(index), image.numpy().tobytes())
        for batch in batches
        for index, image in zip(batch["index"], batch["image"], strict=True)
    ]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_batch_is_what_it_says(shards, channels):
    datamodule = module(shards, channels=channels, image_size=[16, 12])
    (batch,) = take(datamodule, 1)
    assert batch["image"].shape == (8, channels, 16, 12) and batch["image"].dtype == torch.uint8
    assert batch["valid"].all() and batch["valid"].dtype == torch.bool
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    for key, label, index in zip(batch["key"], batch["label"], batch["index"], strict=True):
        assert int(key) == int(index) and int(label) == int(index) % 5
    assert batch["skipped"] == []


def test_every_sample_once_per_epoch_over_the_border(shards):
    datamodule = module(shards)
    count = datamodule.num_train
    assert count % 8  # so that a batch spans the border
    indices = [index for index, _ in rows(take(datamodule, 12))]
    held_out = {int(i) for b in datamodule.val_dataloader() for i in b["index"]}
    for epoch in range(2):
        assert set(indices[epoch * count : (epoch + 1) * count]) == set(range(37)) - held_out
    assert len(datamodule.train_dataloader()) == count // 8


def test_epochs_crop_and_flip_anew_but_equal_seeds_agree(shards):
    first, second = (dict(rows(take(module(shards), 4))) for _ in range(2))
    assert first == second
    again = dict(rows(take(module(shards), 9))[37:])
    changed = [index for index in first if index in again and first[index] != again[index]]
    assert len(changed) > 20
    assert rows(take(module(shards, seed=1), 4)) != list(first.items())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(shards, workers):
    expected = rows(take(module(shards), 10))
    assert rows(take(module(shards, num_workers=workers), 10)) == expected


def test_resume_at_every_batch_is_exact(shards):
    whole = rows(take(module(shards), 11))
    for done in range(11):
        before = module(shards)
        take(before, done) if done else None
        after = module(shards)
        after.load_state_dict(pickle.loads(pickle.dumps(before.state_dict())))
        assert rows(take(after, 11 - done)) == whole[8 * done :]


def test_resume_with_other_workers_and_ranks(shards, monkeypatch):
    whole = rows(take(module(shards), 12))
    before = module(shards, num_workers=2)
    take(before, 5)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("vistok.core.ranks.rank", lambda rank=rank: rank)
        monkeypatch.setattr("vistok.core.ranks.world_size", lambda: 2)
        after = module(shards, batch_size=4, num_workers=3 - rank)
        after.load_state_dict(before.state_dict())
        parts.append(take(after, 7))
        assert after.samples_seen == 12 * 8
    joined = [batch for step in zip(*parts, strict=True) for batch in step]
    assert rows(joined) == whole[40:]


def test_a_new_iteration_takes_up_what_was_consumed_not_what_was_fetched(shards):
    datamodule = module(shards, num_workers=2)
    loader = datamodule.train_dataloader()  # workers persist and have batches ahead
    first = next(iter(loader))
    second = next(iter(loader))
    assert rows([first]) == rows([second])
    datamodule.advance()
    assert rows([next(iter(loader))]) == rows(take(module(shards), 2))[8:]


def test_iterating_leaves_the_global_generators_alone(shards):
    datamodule = module(shards, num_workers=1)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(datamodule, 3)
    list(datamodule.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_resume_refuses_other_data_seed_or_window(shards, tmp_path):
    state = module(shards).state_dict()
    module(shards, batch_size=3, image_size=8).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"data.seed=4, but the run to resume .* with 0"):
        module(shards, seed=4).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"data.shuffle_buffer=13"):
        module(shards, shuffle_buffer=13).load_state_dict(state)
    for other in (
        {"train": f"{shards}/train-{{000000..000001}}.tar"},
        {"val_fraction": 0.5},
        {"train": [f"{shards}/train-00000{i}.tar" for i in (1, 0, 2)]},
    ):
        with pytest.raises(DataError, match=r"not the training data of the run to resume"):
            module(shards, **other).load_state_dict(state)
    early = VistokDataModule(**{"kind": "shards", "train": f"{shards}/*.tar", "seed": 9})
    early.load_state_dict(state)
    with pytest.raises(DataError, match=r"not the training data"):
        early.setup("fit")
    moved = tmp_path / "elsewhere"
    shards.rename(moved)
    module(moved).load_state_dict(state)


def test_validation_is_complete_and_in_order(shards):
    datamodule = module(shards, val=f"{shards}/train-000001.tar", eval_batch_size=4)
    batches = list(datamodule.val_dataloader())
    assert [len(batch["key"]) for batch in batches] == [4, 4, 4, 3]
    assert [int(i) for batch in batches for i in batch["index"]] == list(range(15))
    again = list(datamodule.val_dataloader())
    assert rows(batches) == rows(again)
    assert datamodule.num_train == 37 and datamodule.num_val == 15


def test_validation_over_ranks_is_padded(shards, monkeypatch):
    found, lengths = [], set()
    for rank in range(4):
        monkeypatch.setattr("vistok.core.ranks.rank", lambda rank=rank: rank)
        monkeypatch.setattr("vistok.core.ranks.world_size", lambda: 4)
        datamodule = module(shards, val=f"{shards}/train-000001.tar", eval_batch_size=3)
        batches = list(datamodule.val_dataloader())
        lengths.add(len(batches))
        for batch in batches:
            found += batch["index"][batch["valid"]].tolist()
            assert not batch["image"][~batch["valid"]].any()
    assert sorted(found) == list(range(15)) and lengths == {2}


def test_hold_out_is_stable_and_disjoint(photos):
    def keys(fraction):
        datamodule = VistokDataModule("folder", str(photos), val_fraction=fraction, num_workers=0)
        datamodule.setup()
        source = datamodule.train_set.source
        train = {source.keys[i] for i in datamodule.train_set.members}
        val = {source.keys[i] for i in datamodule.val_set.members}
        assert not train & val and len(train) + len(val) == len(source)
        return val

    assert len(keys(1e-9)) == 1 and len(keys(0.999999)) == 23
    some = keys(0.3)
    assert 2 < len(some) < 15 and some < keys(0.6)
    (photos / "new.png").write_bytes(encode(picture(99)))
    assert keys(0.3) - {b"new.png"} == some


def test_folder_labels_are_subfolders(photos):
    datamodule = VistokDataModule(
        "folder", str(photos), str(photos / "cats"), batch_size=24, num_workers=0
    )
    datamodule.setup()
    (batch,) = take(datamodule, 1)
    for key, label in zip(batch["key"], batch["label"], strict=True):
        assert ["birds", "cats"][label] == key.split("/")[0]
    (photos / "top.jpg").write_bytes(encode(picture(0), "JPEG"))
    mixed = VistokDataModule("folder", str(photos), num_workers=0)
    assert (take(mixed, 1)[0]["label"] == -1).all()


def test_pixels_of_a_folder_are_the_files(photos):
    datamodule = VistokDataModule(
        "folder", str(photos), image_size=36, train_crop="random", num_workers=0
    )
    for batch in take(datamodule, 2):
        for key, image in zip(batch["key"], batch["image"], strict=True):
            whole = picture(int(Path(key).stem), 36 + int(Path(key).stem), 50)
            windows = np.lib.stride_tricks.sliding_window_view(whole, (36, 36), (0, 1))
            assert (windows == image.numpy()).all((2, 3, 4)).any()


# ---------------------------------------------------------------------- images that fail


@pytest.fixture
def broken(photos):
    """The photos, five of which do not decode."""
    for number in (3, 4, 5, 10, 20):
        (path,) = photos.rglob(f"{number:02d}.png")
        path.write_bytes(path.read_bytes()[:300])
    return photos


@pytest.mark.parametrize("workers", [0, 2])
def test_training_puts_the_next_good_image(broken, workers):
    options = {"image_size": 16, "batch_size": 6, "num_workers": workers, "val_fraction": 1e-9}
    datamodule = VistokDataModule("folder", str(broken), **options)
    batches = take(datamodule, 12)
    assert all(batch["image"].shape[0] == 6 and batch["valid"].all() for batch in batches)
    bad = {f"{n:02d}.png" for n in (3, 4, 5, 10, 20)}
    assert {Path(key).name for key in datamodule.skipped} == bad
    seen = [Path(key).name for batch in batches for key in batch["key"]]
    assert not bad & set(seen)
    assert len(set(seen)) == datamodule.num_train - 5
    report = datamodule.skipped_report()
    assert report.startswith("skipped 5 images: ") and "and 2 more" in report
    assert str(broken) in report and "\n" not in report
    after = VistokDataModule("folder", str(broken), **options)
    after.setup("fit")
    take(datamodule, 1)
    after.load_state_dict({**datamodule.state_dict(), "samples_seen": 30})
    assert rows(take(after, 7)) == rows(batches[5:])


def test_validation_leaves_bad_images_out(broken):
    datamodule = VistokDataModule(
        "folder", str(broken), str(broken), image_size=16, eval_batch_size=1, num_workers=0
    )
    batches = list(datamodule.val_dataloader())
    assert len(batches) == 24
    assert sum(int(batch["valid"].sum()) for batch in batches) == 19
    for batch in batches:
        assert batch["valid"].all() == (not batch["skipped"])
    datamodule.eval_batch_size = 12
    batches = list(datamodule.val_dataloader())
    assert sum(len(batch["key"]) for batch in batches) == 19
    assert all(batch["valid"].all() for batch in batches)
    assert len(datamodule.skipped) == 5
    assert datamodule.val_samples(24)["image"].shape[0] == 19


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_decodes(photos, workers):
    for path in photos.rglob("*.png"):
        path.write_bytes(b"hello")
    datamodule = VistokDataModule("folder", str(photos), num_workers=workers)
    with pytest.raises(DataError, match=r"no image can be used; .*not an image") as error:
        take(datamodule, 1)
    assert "\n" not in str(error.value) and str(photos) in str(error.value)
    with pytest.raises(DataError, match=r"none of the validation images can be used"):
        list(datamodule.val_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_shrinks_in_mid_run(shards, workers):
    datamodule = module(shards, num_workers=workers)
    for tar in shards.glob("*.tar"):
        os.truncate(tar, 600)
    with pytest.raises(StreamError, match=r"^\S*train-00000\d.tar became shorter") as error:
        take(datamodule, 1)
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()  # the error is still held, the workers are gone


def test_a_file_that_vanishes_in_mid_run(photos):
    datamodule = VistokDataModule("folder", str(photos), num_workers=0, batch_size=24)
    datamodule.setup()
    next(photos.rglob("05.png")).unlink()
    take(datamodule, 2)
    assert list(datamodule.skipped.values()) == [f"{photos}: No such file or directory"]


# ---------------------------------------------------------------------- single looks


def test_init_batches_are_the_stream_and_move_nothing(shards, monkeypatch):
    datamodule = module(shards)
    stream = torch.cat([batch["image"] for batch in take(module(shards), 6)])
    take(datamodule, 2)
    assert torch.equal(datamodule.init_batches(48), stream)
    monkeypatch.setattr("vistok.core.ranks.rank", lambda: 1)
    monkeypatch.setattr("vistok.core.ranks.world_size", lambda: 2)
    assert torch.equal(datamodule.init_batches(20), stream[:20])
    assert datamodule.samples_seen == 16


def test_val_images_are_fixed_and_spread(shards):
    datamodule = module(shards, val=f"{shards}/*.tar")
    images = datamodule.val_samples(4)["image"]
    every = torch.cat([batch["image"] for batch in datamodule.val_dataloader()])
    where = [int((every == image).flatten(1).all(1).nonzero()[0, 0]) for image in images]
    assert where == [4, 13, 23, 32]
    assert torch.equal(datamodule.val_samples(4)["image"], images)
    assert datamodule.val_samples(1000)["image"].shape == (37, 3, 16, 16)


def test_describe_is_plain(shards):
    import json

    found = module(shards).describe()
    assert json.loads(json.dumps(found)) == found
    assert found["num_train"] + found["num_val"] == 37 and found["shards"] == 3


def test_the_dataset_can_be_sent_to_a_spawned_worker(shards):
    dataset = module(shards).train_set
    dataset[0, 3]  # opens a shard
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0, 3]["image"], dataset[0, 3]["image"])


def test_no_files_stay_open(shards):
    def files():
        return len(os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files through /proc")
    before = files()
    for _ in range(5):
        datamodule = module(shards)
        take(datamodule, 2)
        del datamodule
    import gc

    gc.collect()
    assert files() <= before + 1


# ---------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", ["sample", "folder", "shards", "mixture"])
def test_configs_write_out_every_argument(name):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert list(config) == list(inspect.signature(VistokDataModule).parameters)
    assert config["kind"] == name and config["seed"] == "${seed}"
    values = {**config, "seed": 0}
    if name == "mixture":
        with pytest.raises(ConfigError, match=r"data.sources is not set; for example"):
            VistokDataModule(**values)
        values["sources"] = {"a": {"train": "/somewhere"}}
    elif name != "sample":
        with pytest.raises(ConfigError, match=r"data.train is not set; for example data.train="):
            VistokDataModule(**values)
        values["train"] = "/somewhere"
    VistokDataModule(**values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "shard"}, r"data.kind='shard': must be one of .* \(did you mean 'shards'\?\)"),
        ({"train": "/x"}, "data=sample brings its own images"),
        ({"kind": "folder", "train": ["/x"]}, "takes one folder"),
        ({"image_size": 0}, "data.image_size=0: must be a positive number"),
        ({"image_size": [8, 8, 8]}, "data.image_size="),
        ({"image_size": "big"}, "data.image_size='big'"),
        ({"image_size": True}, "data.image_size=True"),
        ({"channels": 2}, r"data.channels=2: must be 1 \(grayscale\), 3"),
        ({"batch_size": 0}, "data.batch_size=0: must be a whole number, 1 or more"),
        ({"batch_size": 1.5}, "data.batch_size=1.5"),
        ({"eval_batch_size": 0}, "data.eval_batch_size=0"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer=0"),
        ({"seed": -1}, "data.seed=-1"),
        ({"seed": 2**64}, "data.seed="),
        ({"val_crop": "center"}, "data.val_crop='center': must be one of tv_center"),
        ({"fields": "caption"}, "must be a list"),
        ({"fields": ["image"]}, "every batch has 'image' anyway"),
        ({"fields": ["a.b"]}, "'a.b' is not a valid name"),
        ({"max_skipped_share": 2}, "data.max_skipped_share=2: must be"),
        ({"crop_scale": [0, 1]}, "data.crop_scale="),
        ({"crop_scale": 0.5}, "data.crop_scale=0.5"),
        ({"cache_gb": 0}, "data.cache_gb=0: must be a number above 0"),
        ({"retries": -1}, "data.retries=-1"),
        ({"timeout": "long"}, "data.timeout='long'"),
        ({"buckets": [[8]]}, "data.buckets="),
        ({"buckets": [[8, 8]], "resample": True}, "data.buckets: cannot be combined with"),
        (
            {"kind": "mixture", "train": "/x", "sources": {"a": {"train": "/x"}}},
            "reads data.sources",
        ),
        ({"kind": "mixture", "sources": {"a": {}}}, "data.sources.a.train is not set"),
        ({"kind": "mixture", "sources": {"a": {"train": "x", "wait": 2}}}, "unknown key wait"),
        (
            {"kind": "mixture", "sources": {"a": {"train": "x", "weight": 0}}},
            "data.sources.a.weight=0",
        ),
    ],
)
def test_values_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        VistokDataModule(**options)
    assert "\n" not in str(error.value)


def test_sources_that_are_not_there(tmp_path, photos):
    def setup(**options):
        VistokDataModule("folder", **options).setup()

    with pytest.raises(DataError, match=r"data.train=/nowhere: no such folder"):
        setup(train="/nowhere")
    with pytest.raises(DataError, match=r"data.val=/nowhere: no such folder"):
        setup(train=str(photos), val="/nowhere")
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    (tmp_path / "empty" / ".hidden" / "a.jpg").write_bytes(b"x")
    (tmp_path / "empty" / "notes.txt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"empty: no images in this folder"):
        setup(train=str(tmp_path / "empty"))
    (tmp_path / "x.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"x.tar: is a file, not a folder; .* data=shards"):
        setup(train=str(tmp_path / "x.tar"))
    with pytest.raises(ConfigError, match=r"data.val_fraction=0.0: must be above 0"):
        setup(train=str(photos), val_fraction=0.0)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(encode(picture(0)))
    with pytest.raises(DataError, match=r"has only one image"):
        setup(train=str(tmp_path / "one"))
    setup(train=str(tmp_path / "one"), val=str(tmp_path / "one"))


def test_more_workers_than_shards(shards):
    with pytest.raises(ConfigError, match=r"num_workers=8: too many for 3 training shards; set"):
        module(shards, num_workers=8)
    datamodule = module(shards, num_workers=4, split_shards=True)
    assert rows(take(datamodule, 5)) == rows(take(module(shards), 5))
    assert module(shards, num_workers=None).describe()["num_workers"] <= 3


def test_evaluation_needs_no_training_data(shards):
    datamodule = VistokDataModule(
        "shards", "/gone/train.tar", f"{shards}/train-000000.tar", num_workers=0, image_size=16
    )
    datamodule.setup("validate")
    assert sum(len(batch["key"]) for batch in datamodule.val_dataloader()) == 15


def test_links_in_a_circle_end(photos):
    (photos / "cats" / "loop").symlink_to(photos)
    datamodule = VistokDataModule("folder", str(photos), num_workers=0)
    datamodule.setup()
    assert datamodule.num_train + datamodule.num_val == 24


SHARED = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample"


@pytest.mark.skipif(not SHARED.exists(), reason="the real shards are not on this machine")
def test_real_shards():
    datamodule = VistokDataModule(
        "shards",
        f"{SHARED}/train-{{000000..000003}}.tar",
        f"{SHARED}/val-000000.tar",
        image_size=64,
        num_workers=2,
    )
    datamodule.setup()
    assert (datamodule.num_train, datamodule.num_val) == (700, 100)
    labels = {int(label) for batch in datamodule.val_dataloader() for label in batch["label"]}
    assert len(labels) == 100 and not datamodule.skipped
