"""Shards: what is written is what is read, by us and by WebDataset; equal input, equal bytes."""

import hashlib
import json
import tarfile

import numpy as np
import pytest
import webdataset
from data_helpers import encode, picture

from vistok.core.errors import DataError
from vistok.data.index import ShardIndex, index_of, scan, sidecar
from vistok.data.places import expand_shards
from vistok.data.shards import ShardFile, ShardWriter, write_manifest
from vistok.data.sources import ShardSource


def write(folder, count=9, max_bytes=10**9):
    with ShardWriter(folder, "train", max_bytes) as writer:
        for number in range(count):
            label = number if number % 2 else None
            data = encode(picture(number), "JPEG")
            writer.write(data, "jpg", label=label, size=(40, 56))
    write_manifest(folder, {"train": writer.shards}, classes=["a", "b"])
    return writer


def tree(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_runs_give_equal_bytes(tmp_path):
    write(tmp_path / "a", max_bytes=15_000)
    write(tmp_path / "b", max_bytes=15_000)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.tar"))) > 1
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}
        names = tar.getnames()
    assert names[:3] == ["000000000.jpg", "000000001.jpg", "000000001.cls"]


def test_bytes_pass_through_and_come_back(tmp_path):
    write(tmp_path, max_bytes=20_000)
    tars = sorted(tmp_path.glob("*.tar"))
    assert all(tar.stat().st_size <= 20_480 for tar in tars)
    source = ShardSource(tars)
    assert len(source) == 9 and source.shard_sizes.sum() == 9
    for number in range(9):
        key, data, label = source.read(number)
        assert key == f"{number:09d}" and label == (number if number % 2 else None)
        assert data == encode(picture(number), "JPEG")


def test_webdataset_reads_our_shards(tmp_path):
    write(tmp_path, max_bytes=20_000)
    tars = [str(tar) for tar in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{n:09d}" for n in range(9)]
    assert [s["jpg"] for s in samples] == [encode(picture(n), "JPEG") for n in range(9)]
    assert [s.get("cls") for s in samples] == [b"%d" % n if n % 2 else None for n in range(9)]


def test_a_foreign_shard_gets_the_same_index_once(tmp_path, cache, monkeypatch):
    write(tmp_path)
    tar = tmp_path / "train-000000.tar"
    ours = ShardIndex.load(sidecar(tar))
    sidecar(tar).write_text("v1.2 1\nsome other tool's index\n")
    scanned = index_of(tar)
    for name in ("keys", "offsets", "sizes", "labels", "tar_bytes"):
        assert np.array_equal(getattr(scanned, name), getattr(ours, name)), name
    assert len(list((cache / "index").glob("*.idx"))) == 1
    monkeypatch.setattr("vistok.data.index.scan", lambda tar: pytest.fail("scanned again"))
    assert np.array_equal(index_of(tar).offsets, ours.offsets)


def test_a_changed_foreign_shard_is_indexed_again(tmp_path):
    import os

    with ShardFile(tmp_path / "x.tar") as shard:
        shard.add("a", encode(picture(0)), "png")
    sidecar(tmp_path / "x.tar").unlink()
    assert index_of(tmp_path / "x.tar").keys.tolist() == [b"a"]
    with ShardFile(tmp_path / "x.tar") as shard:
        shard.add("b", encode(picture(0)), "png")
    sidecar(tmp_path / "x.tar").unlink()
    os.utime(tmp_path / "x.tar", ns=(1, 1))
    assert index_of(tmp_path / "x.tar").keys.tolist() == [b"b"]


def test_members_of_webdataset_style_tars(tmp_path):
    """Members in any order, folders, other files, upper case."""
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as tar:
        tar.write({"__key__": "n01/a", "cls": b"7", "jpg": b"JJ", "json": b"{}"})
        tar.write({"__key__": "n01/b", "seg.png": b"SS", "JPG": b"KKK", "txt": b"caption"})
        tar.write({"__key__": "n02/c", "txt": b"no image"})
        tar.write({"__key__": "n02/d", "png": b"P", "cls": b"x"})
    source = ShardSource([tmp_path / "x.tar"])
    assert [source.read(i) for i in range(len(source))] == [
        ("n01/a", b"JJ", 7),
        ("n01/b", b"KKK", None),
        ("n02/d", b"P", None),
    ]


def test_manifest_says_what_is_there(tmp_path):
    writer = write(tmp_path, max_bytes=20_000)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    assert manifest["classes"] == ["a", "b"] and train["samples"] == 9 == writer.num_samples
    assert train["bytes"] == sum(tar.stat().st_size for tar in tmp_path.glob("*.tar"))
    for shard in train["shards"]:
        for name, digest in (("name", "sha256"), ("index", "index_sha256")):
            path = tmp_path / shard["name"]
            path = path if name == "name" else sidecar(path)
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard[digest]


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardFile(tmp_path / "x.tar") as shard:
        shard.add("a", b"data", "jpg")
        raise RuntimeError
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train") as writer:
        writer.write(b"data", "jpg")
        raise RuntimeError
    with pytest.raises(DataError, match=r"would contain no samples"), ShardFile(tmp_path / "x.tar"):
        pass
    assert list(tmp_path.glob("*.tar")) == [] and list(tmp_path.glob("*.idx")) == []
    assert list(tmp_path.glob(".*.tmp")) == []


@pytest.mark.parametrize("key", ["a.b", "", "/a", "../a", "ä", "x" * 91, "a b"])
def test_keys_that_readers_would_misread(tmp_path, key):
    with (
        pytest.raises(DataError, match=r"not a valid key"),
        ShardFile(tmp_path / "x.tar") as shard,
    ):
        shard.add(key, b"data", "jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "is not a tar file: it is empty"),
        (lambda data: b"hello world" * 300, "is not a tar file: it begins with b'hello wo'"),
        (lambda data: b"\x1f\x8b" + data, "it is gzip-compressed; unpack it"),
        (lambda data: data[:5000], "is cut short: its 5000 bytes"),
        (lambda data: data[: 512 * 7], "is cut short: its 3584 bytes"),
        (lambda data: data[:512] + b"\0" * 4, "is cut short"),
        (lambda data: data.replace(b"000000001.jpg", b"\xff" * 13, 1), "is damaged: no valid tar"),
        (lambda data: data.replace(b".jpg", b".txt"), "contains no images: found .cls, .txt"),
        (lambda data: b"\0" * 10240, "contains no images: found nothing"),
    ],
)
def test_broken_shards(tmp_path, change, message):
    write(tmp_path)
    tar = tmp_path / "train-000000.tar"
    changed = change(tar.read_bytes())
    # Checksums cover names, so members renamed on purpose get theirs.
    tar.write_bytes(_with_checksums(changed) if b".txt" in changed else changed)
    sidecar(tar).unlink()
    with pytest.raises(DataError, match=message) as error:
        index_of(tar)
    assert str(tar) in str(error.value) and "\n" not in str(error.value)


def _with_checksums(data):
    blocks = bytearray(data)
    for begin in range(0, len(blocks), 512):
        if blocks[begin + 257 : begin + 262] == b"ustar":
            blocks[begin + 148 : begin + 156] = b" " * 8
            total = sum(blocks[begin : begin + 512])
            blocks[begin + 148 : begin + 156] = b"%06o\0 " % total
    return bytes(blocks)


def test_a_shard_shorter_than_its_index(tmp_path):
    write(tmp_path)
    tar = tmp_path / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-10240])
    with pytest.raises(DataError, match=r"train-000000.tar is cut short: \d+ bytes, but its index"):
        index_of(tar)


def test_every_cut_of_a_tar_is_noticed(tmp_path):
    write(tmp_path, count=3)
    tar = tmp_path / "train-000000.tar"
    data = tar.read_bytes()
    with tarfile.open(tar) as archive:
        archive.getmembers()
        end = archive.offset
    for length in [*range(1, end + 512, 97), *range(512, end + 512, 512)]:
        (tmp_path / "cut.tar").write_bytes(data[:length])
        with pytest.raises(DataError, match=r"cut short|not a tar"):
            scan(tmp_path / "cut.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/train-{{000000..000003}}.tar", r"no such shard .*3.tar \(1 of 4 are missing\)"),
        ("{folder}/val.tar", r"data.train: no such shard .*val.tar$"),
        ("{folder}/val-*.tar", "matches no file"),
        ("{folder}", "is a folder; name its shards"),
        ("pipe:cat x.tar", "commands are not run"),
        ("{folder}/train-{{000000..000003.tar", "the braces do not match"),
        ([], "is an empty list"),
    ],
)
def test_shards_that_are_not_there(shards, pattern, message):
    wanted = pattern.format(folder=shards) if isinstance(pattern, str) else pattern
    with pytest.raises(ValueError, match=message) as error:
        ShardSource(expand_shards(wanted))
    assert "\n" not in str(error.value)


def test_patterns(shards):
    names = [f"train-00000{i}.tar" for i in range(3)]
    for pattern in (
        f"{shards}/train-{{000000..000002}}.tar",
        f"{shards}/train-*.tar",
        [f"{shards}/{name}" for name in names],
        [f"{shards}/train-{{000000..000001}}.tar", f"{shards}/*2.tar"],
    ):
        assert [path.name for path in expand_shards(pattern)] == names


def test_many_shards_need_few_open_files(shards, monkeypatch):
    monkeypatch.setattr("vistok.data.sources._MAX_OPEN", 2)
    source = ShardSource(sorted(shards.glob("*.tar")))
    for number in [0, 20, 36, 1, 21, 35] * 3:
        assert source.read(number)[0] == f"{number:09d}"
        assert len(source._files) <= 2
    source.close()
    assert not source._files and source.read(5)[0] == "000000005"
