"""Captions and embeddings: from the writer to the batch, and what happens where they are missing."""

import io
import pickle

import numpy as np
import pytest
import torch
from data_helpers import encode, picture
from safetensors.torch import save

from vistok.core.errors import DataError
from vistok.data.datamodule import VistokDataModule
from vistok.data.index import index_of, sidecar
from vistok.data.shards import ShardWriter


def npy(value, **options):
    file = io.BytesIO()
    np.save(file, value, **options)
    return file.getvalue()


def write(folder, count=20, change=None):
    with ShardWriter(folder, "train") as writer:
        for number in range(count):
            others = {
                "txt": f"Bild Nr. {number} – schön".encode(),
                "npy": npy(np.arange(6, dtype=np.float16).reshape(2, 3) + number),
                "clip.safetensors": save({"x": torch.full((4,), number, dtype=torch.bfloat16)}),
            }
            if change is not None:
                change(number, others)
            writer.write(encode(picture(number, 20, 24)), "png", label=number, others=others)
    return f"{folder}/train-*.tar"


def module(train, **options):
    options = {"image_size": 16, "batch_size": 5, "num_workers": 0, "val": train, **options}
    datamodule = VistokDataModule(
        "shards", train, fields=["caption", "embedding", "clip"], **options
    )
    datamodule.setup()
    return datamodule


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("sidecars", [True, False])
def test_fields_belong_to_their_images(tmp_path, workers, sidecars):
    train = write(tmp_path / "s")
    if not sidecars:
        for path in (tmp_path / "s").glob("*.idx"):
            path.unlink()
    batches = iter(module(train, num_workers=workers).train_dataloader())
    for _ in range(6):
        batch = next(batches)
        assert batch["embedding"].dtype == torch.float16 and batch["embedding"].shape == (5, 2, 3)
        assert batch["clip"].dtype == torch.bfloat16 and batch["clip"].shape == (5, 4)
        for row, label in enumerate(batch["label"].tolist()):
            assert batch["caption"][row] == f"Bild Nr. {label} – schön"
            assert batch["embedding"][row].tolist() == (np.arange(6).reshape(2, 3) + label).tolist()
            assert batch["clip"][row].tolist() == [label] * 4
    assert not {"caption", "clip"} & set(
        next(iter(VistokDataModule("shards", train, num_workers=0).train_dataloader()))
    )


def test_padding_has_fields_too(tmp_path, monkeypatch):
    train = write(tmp_path / "s", 5)
    monkeypatch.setattr("vistok.core.ranks.rank", lambda: 3)
    monkeypatch.setattr("vistok.core.ranks.world_size", lambda: 4)
    (batch,) = module(train).val_dataloader()
    assert batch["valid"].tolist() == [False, False] and batch["caption"] == ["", ""]
    assert batch["embedding"].shape == (2, 2, 3) and not batch["clip"].any()


def test_samples_without_a_field_are_skipped_and_counted(tmp_path):
    def change(number, others):
        if number == 3:
            del others["txt"]
        if number == 5:
            others["npy"] = npy(np.zeros((2, 4), np.float16))
        if number == 7:
            others["npy"] = npy(np.zeros((2, 3), np.float32))
        if number == 9:
            others["txt"] = b"\xff\xfe\xff"
        if number == 11:
            others["clip.safetensors"] = b"hello"
        if number == 13:
            others["npy"] = npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)

    datamodule = module(write(tmp_path / "s", change=change))
    found = [int(i) for batch in datamodule.val_dataloader() for i in batch["index"]]
    assert found == [n for n in range(20) if n not in (3, 5, 7, 9, 11, 13)]
    assert dict(datamodule.skipped.causes) == {
        "no caption": 1,
        "other embedding": 2,
        "damaged caption": 1,
        "damaged clip": 1,
        "damaged embedding": 1,
    }
    assert "is float32 [2, 3], not float16 [2, 3]" in datamodule.skipped["000000007"]
    assert next(iter(datamodule.train_dataloader()))["clip"].shape == (5, 4)


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    file = io.BytesIO()
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    for data in (file.getvalue(), pickle.dumps(Bomb())):
        train = write(tmp_path / f"s{len(data)}", change=lambda n, o, data=data: o.update(npy=data))
        with pytest.raises(
            DataError, match=r"000000000.npy (is not a readable|holds Python objects)"
        ):
            module(train)


def test_a_field_that_is_nowhere(tmp_path):
    train = write(tmp_path / "s", change=lambda n, o: o.pop("txt"))
    message = r"data.fields=caption: .* has no member .txt .*; it has .clip.safetensors, .npy"
    with pytest.raises(DataError, match=message):
        module(train)


def test_files_beside_images(tmp_path):
    (tmp_path / "p").mkdir()
    for number in range(6):
        (tmp_path / "p" / f"{number}.png").write_bytes(encode(picture(number)))
        (tmp_path / "p" / f"{number}.txt").write_text(str(number))
    datamodule = VistokDataModule("folder", str(tmp_path / "p"), fields=["caption"], num_workers=0)
    batch = next(iter(datamodule.train_dataloader()))
    assert [f"{caption}.png" for caption in batch["caption"]] == batch["key"]


def test_memory_holds_only_the_places_of_chosen_fields(tmp_path):
    source = module(write(tmp_path / "s")).train_set.source
    assert set(source._others) == {"txt", "npy", "clip.safetensors"}
    plain = VistokDataModule("shards", f"{tmp_path}/s/*.tar", num_workers=0).train_set.source
    assert plain._others == {} and plain.others == ["clip.safetensors", "npy", "txt"]


def test_webdataset_reads_the_members(tmp_path):
    import webdataset

    write(tmp_path / "s", 3)
    samples = list(webdataset.WebDataset(f"{tmp_path}/s/train-000000.tar", shardshuffle=False))
    assert [s["txt"].decode() for s in samples] == [f"Bild Nr. {n} – schön" for n in range(3)]
    assert np.array_equal(np.load(io.BytesIO(samples[2]["npy"])), np.arange(6).reshape(2, 3) + 2)
    tar = tmp_path / "s" / "train-000000.tar"
    ours = index_of(tar)
    sidecar(tar).unlink()
    scanned = index_of(tar)
    for name in ("others", "other_offsets", "other_sizes"):
        assert np.array_equal(getattr(scanned, name), getattr(ours, name)), name


@pytest.mark.parametrize("extension", ["png", "cls", "A", "", ".txt", "a b", "x" * 100])
def test_members_that_cannot_be_written(tmp_path, extension):
    with pytest.raises(DataError, match=r"not a valid extension|at most 100 bytes"):
        ShardWriter(tmp_path).write(b"x", "jpg", others={extension: b"x"})
