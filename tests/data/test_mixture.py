"""Mixtures, resampling and buckets through the DataModule: exact, complete and resumable."""

from collections import Counter

import numpy as np
import pytest
from data_helpers import encode, picture

from vistok.core.errors import ConfigError, DataError
from vistok.data.datamodule import VistokDataModule
from vistok.data.sets import nearest_shapes
from vistok.data.shards import ShardWriter


@pytest.fixture
def art(tmp_path):
    """11 images in two shards."""
    with ShardWriter(tmp_path / "art", "train") as writer:
        for number in range(11):
            if number == 6:
                writer.roll()
            writer.write(encode(picture(50 + number, 20, 26)), "png", label=number)
    return f"{tmp_path}/art/*.tar"


@pytest.fixture
def mixed(shards, photos, art):
    def build(**options):
        sources = {
            "stock": {"train": f"{shards}/*.tar", "weight": 4},
            "art": {"train": art, "weight": 1},
            "photos": {"train": str(photos), "weight": 3},
        }
        options = {
            "image_size": 16,
            "batch_size": 8,
            "num_workers": 0,
            "val_fraction": 0.1,
            **options,
        }
        datamodule = VistokDataModule("mixture", sources=options.pop("sources", sources), **options)
        datamodule.setup()
        return datamodule

    return build


def take(datamodule, count):
    batches = []
    for batch in datamodule.train_dataloader():
        batches.append(batch)
        datamodule.advance()
        if len(batches) == count:
            return batches


def rows(batches):
    return [
        (key, image.numpy().tobytes())
        for batch in batches
        for key, image in zip(batch["key"], batch["image"], strict=True)
    ]


def test_shares_passes_and_hold_out(mixed):
    datamodule = mixed()
    keys = [key for key, _ in rows(take(datamodule, 40))]
    counts = Counter(key.partition("/")[0] for key in keys)
    assert counts == {"stock": 160, "art": 40, "photos": 120}
    held_out = {key for batch in datamodule.val_dataloader() for key in batch["key"]}
    sizes = {"stock": 37, "art": 11, "photos": 24}
    for name, size in sizes.items():
        of_it = [key for key in keys if key.startswith(f"{name}/")]
        mine = {key for key in held_out if key.startswith(f"{name}/")}
        length = size - len(mine)
        assert mine and not mine & set(of_it)
        for begin in range(0, len(of_it) - length + 1, length):
            assert len(set(of_it[begin : begin + length])) == length  # each pass exactly once
    assert not datamodule.skipped


@pytest.mark.parametrize("options", [{}, {"resample": True}, {"shuffle_buffer": 5}])
def test_resume_is_exact_with_other_workers_and_ranks(mixed, monkeypatch, options):
    whole = rows(take(mixed(**options), 9))
    assert rows(take(mixed(num_workers=2, **options), 9)) == whole
    for done in (1, 5):
        before = mixed(**options)
        take(before, done)
        parts = []
        for rank in range(2):
            monkeypatch.setattr("vistok.core.ranks.rank", lambda rank=rank: rank)
            monkeypatch.setattr("vistok.core.ranks.world_size", lambda: 2)
            after = mixed(batch_size=4, num_workers=1, **options)
            after.load_state_dict(before.state_dict())
            parts.append(take(after, 9 - done))
        monkeypatch.undo()
        joined = [batch for step in zip(*parts, strict=True) for batch in step]
        assert rows(joined) == whole[8 * done :]


def test_resume_refuses_other_weights_or_sampling(mixed, art, shards):
    state = mixed().state_dict()
    with pytest.raises(ConfigError, match=r"data.resample=True, but the run to resume"):
        mixed(resample=True).load_state_dict(state)
    sources = dict(mixed().sources)
    sources["art"] = {**sources["art"], "weight": 2}
    with pytest.raises(ConfigError, match=r"weights of the sources: .*'art': 2.0"):
        mixed(sources=sources).load_state_dict(state)
    del sources["art"]
    with pytest.raises(DataError, match=r"not the training data"):
        mixed(sources=sources).load_state_dict(state)


def test_a_mixture_has_its_own_validation_if_named(mixed, art):
    datamodule = mixed(val=art)
    assert datamodule.num_val == 11 and datamodule.num_train == 37 + 11 + 24


def test_weights_that_are_lost_in_rounding(mixed, art):
    sources = {"a": {"train": art, "weight": 1}, "b": {"train": art, "weight": 1e-6}}
    with pytest.raises(ConfigError, match=r"data.sources: a weight is below"):
        mixed(sources=sources).order  # noqa: B018


def test_resampling_crops_anew(shards):
    datamodule = VistokDataModule(
        "shards", f"{shards}/*.tar", image_size=16, batch_size=8, num_workers=0, resample=True
    )
    found = rows(take(datamodule, 20))
    most, times = Counter(key for key, _ in found).most_common(1)[0]
    assert times > 160 / 36 + 1  # drawn, not dealt
    assert len({pixels for key, pixels in found if key == most}) >= 3  # of 5 windows


# ---------------------------------------------------------------------- buckets


@pytest.fixture
def shapes(tmp_path):
    """40 images of three shapes, in four shards whose indexes know the sizes."""
    sizes = [(30, 30), (20, 40), (45, 22)]
    with ShardWriter(tmp_path / "shapes", "train") as writer:
        for number in range(40):
            if number and number % 10 == 0:
                writer.roll()
            height, width = sizes[0 if number % 2 else 1 + number % 4 // 2]
            image = encode(picture(number, height, width))
            writer.write(image, "png", label=number, size=(height, width))
    return f"{tmp_path}/shapes/*.tar"


BUCKETS = [[16, 16], [12, 24], [24, 12]]


def bucketed(shapes, **options):
    options = {"batch_size": 4, "num_workers": 0, "image_size": 16, "val": shapes, **options}
    datamodule = VistokDataModule("shards", shapes, buckets=BUCKETS, **options)
    datamodule.setup()
    return datamodule


def test_batches_are_of_one_shape_the_nearest(shapes, monkeypatch):
    batches = take(bucketed(shapes), 40)
    sizes = Counter()
    for batch in batches:
        shape = tuple(batch["image"].shape[2:])
        sizes[shape] += 1
        for label in batch["label"].tolist():
            assert shape == ((16, 16) if label % 2 else [(12, 24), (24, 12)][label % 4 // 2])
    assert sizes == {(16, 16): 20, (12, 24): 10, (24, 12): 10}
    for shape in sizes:  # each bucket goes through its own passes
        alike = [b for b in batches if tuple(b["image"].shape[2:]) == shape]
        flat = [label for b in alike for label in b["label"].tolist()]
        length = 20 if shape == (16, 16) else 10
        for begin in range(0, len(flat), length):
            assert len(set(flat[begin : begin + length])) == length
    assert bucketed(shapes).init_batches(10).shape == (10, 3, 16, 16)
    assert rows(take(bucketed(shapes, num_workers=2), 20)) == rows(batches[:20])


def test_buckets_resume_exactly_with_other_ranks(shapes, monkeypatch):
    whole = rows(take(bucketed(shapes), 12))
    before = bucketed(shapes)
    take(before, 5)
    state = before.state_dict()
    with pytest.raises(
        ConfigError, match=r"global batch with buckets: 8, but 4 in the run to resume"
    ):
        bucketed(shapes, batch_size=8).load_state_dict(state)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("vistok.core.ranks.rank", lambda rank=rank: rank)
        monkeypatch.setattr("vistok.core.ranks.world_size", lambda: 2)
        after = bucketed(shapes, batch_size=2, num_workers=1)
        after.load_state_dict(state)
        parts.append(take(after, 7))
    joined = [batch for step in zip(*parts, strict=True) for batch in step]
    assert rows(joined) == whole[20:]


def test_a_bad_image_is_replaced_by_one_of_its_shape(shapes):
    source = bucketed(shapes).train_set.source
    tar = source.paths[0]
    data = bytearray(tar.read_bytes())
    data[int(source._offsets[2]) : int(source._offsets[2]) + 40] = b"x" * 40
    tar.write_bytes(data)
    datamodule = bucketed(shapes)
    batches = take(datamodule, 30)
    assert list(datamodule.skipped) == ["000000002"]
    assert all(batch["valid"].all() for batch in batches)
    assert {n % 2 for b in batches if b["image"].shape[2] == 16 for n in b["label"].tolist()} == {1}


def test_buckets_need_known_sizes(shards):
    datamodule = VistokDataModule("shards", f"{shards}/*.tar", buckets=BUCKETS, num_workers=0)
    with pytest.raises(DataError, match=r"data.buckets: the sizes of the images .* make-shards"):
        datamodule.setup()


def test_nearest_shape_by_brute_force():
    sizes = np.random.default_rng(0).integers(1, 500, (200, 2))
    which = nearest_shapes(sizes, np.array(BUCKETS))
    for (height, width), found in zip(sizes.tolist(), which.tolist(), strict=True):
        far = [abs(np.log(height / width / (h / w))) for h, w in BUCKETS]
        assert far[found] == pytest.approx(min(far))
