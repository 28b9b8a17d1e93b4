"""Folders of tokens: what is written comes back, and what is wrong is one line."""

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vistok.core.errors import DataError
from vistok.data.token_shards import ShardRows, write_shard
from vistok.data.tokens import TokenFolder, finish_folder, smallest_dtype

SIZES = [7, 300]


def rows_of(seed, count=5, most=4):
    rng = np.random.default_rng(seed)
    rows = ShardRows(left_out=[("bad.jpg", "not an image")] if seed else [])
    for number in range(count):
        rows.ids.append(rng.integers(0, SIZES, (rng.integers(1, most + 1), 2)))
        rows.labels.append(int(rng.integers(-1, 3)))
        rows.keys.append(f"größe/{seed}/{number}")
        rows.views.append(number % 2)
        rows.captions.append([None, "", "ein Hund"][number % 3])
    return rows


VALUES = {
    "tokenizer_hash": "ab" * 32,
    "num_tokens": 4,
    "num_streams": 2,
    "streams": [
        {"name": f"codebook.{q}", "size": size, "offset": sum(SIZES[:q])}
        for q, size in enumerate(SIZES)
    ],
    "vocabulary_size": 312,
    "special": {"begin_of_image": 307},
    "order": "raster",
    "grid": None,
    "lengths": "variable",
    "dtype": "uint16",
}


def write(folder, seeds=(0, 1, 2), counts=(5, 0, 3)):
    folder.mkdir(parents=True, exist_ok=True)
    written = [rows_of(seed, count) for seed, count in zip(seeds, counts, strict=True)]
    names = [f"tokens-{number:06d}.safetensors" for number in range(len(seeds))]
    for name, rows in zip(names, written, strict=True):
        write_shard(folder / name, rows, SIZES, "uint16", {"plan": "p"})
    finish_folder(folder, names, VALUES)
    return written


def test_samples_come_back(tmp_path):
    written = write(tmp_path)
    folder = pickle.loads(pickle.dumps(TokenFolder(tmp_path)))
    assert len(folder) == 8
    number = 0
    for rows in written:
        for row in range(len(rows.ids)):
            sample = folder[number]
            assert sample.ids.dtype == np.int64
            np.testing.assert_array_equal(sample.ids, rows.ids[row])
            assert sample.label == (None if rows.labels[row] < 0 else rows.labels[row])
            assert sample.caption == rows.captions[row] and sample.key == rows.keys[row]
            assert sample.view == rows.views[row]
            number += 1
    np.testing.assert_array_equal(folder[-1].ids, folder[7].ids)
    with pytest.raises(IndexError):
        folder[8]
    chosen = [6, 0, 6, 4]
    lengths, batch = folder.lengths(chosen), folder.ids(chosen)
    assert batch.shape == (4, 4, 2) and batch.dtype == np.int64
    for place, index in enumerate(chosen):
        np.testing.assert_array_equal(batch[place, : lengths[place]], folder[index].ids)
        assert not batch[place, lengths[place] :].any()
        assert folder.labels(chosen)[place] == (-1 if (n := folder[index].label) is None else n)


def test_the_manifest_counts(tmp_path):
    written = write(tmp_path)
    folder = TokenFolder(tmp_path)
    joint = np.concatenate([ids for rows in written for ids in rows.ids])
    counts = folder.manifest["counts"]
    assert counts == {"samples": 8, "tokens": len(joint), "left_out": 2}
    histogram = load_file(tmp_path / "histogram.safetensors")
    for stream, size in enumerate(SIZES):
        expected = np.bincount(joint[:, stream], minlength=size)
        np.testing.assert_array_equal(histogram[f"stream.{stream}"], expected)
        shares = expected[expected > 0] / expected.sum()
        usage = folder.manifest["usage"][stream]
        assert usage["codes"] == (expected > 0).sum()
        assert usage["entropy_bits"] == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-5)


def test_equal_samples_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_shards_are_plain_safetensors(tmp_path):
    written = write(tmp_path)
    arrays = load_file(tmp_path / "tokens-000000.safetensors")
    np.testing.assert_array_equal(arrays["ids"], np.concatenate(written[0].ids))
    assert arrays["ids"].dtype == np.uint16


@pytest.mark.parametrize(
    ("largest", "name"),
    [(255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "uint32"), (2**32 - 1, "uint32")],
)
def test_the_smallest_type_that_holds_the_largest_id(largest, name):
    assert smallest_dtype(largest) == np.dtype(name)


def test_larger_ids_than_32_bits_are_refused():
    with pytest.raises(DataError, match="32 bits at most"):
        smallest_dtype(2**32)


def test_ids_out_of_range_are_not_written(tmp_path):
    for bad in ([7, 0], [0, 300], [-1, 0]):
        rows = ShardRows([np.array([bad])], [-1], ["a"], [0], [None])
        with pytest.raises(DataError, match="valid are 0 to"):
            write_shard(tmp_path / "a.safetensors", rows, SIZES, "uint16", {})
    with pytest.raises(DataError, match="uint8 cannot hold"):
        write_shard(tmp_path / "a.safetensors", ShardRows(), SIZES, "uint8", {})
    assert not list(tmp_path.iterdir())


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("kind"), "vistok-tokens"),
        (lambda m: m.update(format=2), "update vistok"),
        (lambda m: m.update(format="1"), "format"),
        (lambda m: m.update(order="spiral"), "order: expected one of raster"),
        (lambda m: m.update(dtype="float16"), "dtype: expected one of uint8"),
        (lambda m: m.update(streams=[]), "streams"),
        (lambda m: m["streams"][1].update(offset=9), "must be 7"),
        (lambda m: m.update(num_streams=1), "num_streams"),
        (lambda m: m.update(num_tokens=True), "num_tokens"),
        (lambda m: m.update(special={"a": -1}), "special"),
        (lambda m: m.update(grid=[4, 0]), "grid"),
        (lambda m: m.update(lengths=3), "lengths"),
        (lambda m: m.update(vocabulary_size=10**30), "vocabulary_size"),
        (lambda m: m["shards"][0].update(name="../tokens-000000.safetensors"), "shards"),
        (lambda m: m["shards"][0].update(samples=-1), "shards"),
        (lambda m: m["shards"][0].update(bytes=5), "has "),
        (lambda m: m["shards"][0].update(name="tokens-000007.safetensors"), "missing"),
    ],
)
def test_wrong_manifests(tmp_path, change, words):
    write(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(DataError, match=r"manifest\.json|tokens-") as caught:
        TokenFolder(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 10**5, "\x00", '{"kind": 3}'])
def test_damaged_manifests(tmp_path, text):
    write(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        TokenFolder(tmp_path)


def test_missing_folders(tmp_path):
    with pytest.raises(DataError, match=r"nothing: no such folder$"):
        TokenFolder(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        TokenFolder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a folder of tokens"):
        TokenFolder(tmp_path / "file")


def test_every_altered_byte_is_found(tmp_path):
    write(tmp_path)
    path = tmp_path / "tokens-000000.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match="tokens-000000"):
            TokenFolder(tmp_path)[0]
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="bytes"):
        TokenFolder(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        TokenFolder(tmp_path)


ARRAYS = {
    "ids": np.zeros((3, 2), np.uint16),
    **{name: np.array([1, 3]) for name in ("ends", "key_ends", "caption_ends")},
    **{name: np.zeros(2, np.int64) for name in ("labels", "views")},
    **{name: np.zeros(3, np.uint8) for name in ("keys", "captions")},
    "has_caption": np.zeros(2, np.uint8),
}


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("ids", None, "no array 'ids'"),
        ("ids", np.zeros((3, 2), np.float16), "expected uint8, uint16, uint32, found float16"),
        ("ids", np.zeros((3, 2), np.int64), "expected uint8, uint16, uint32, found int64"),
        ("ids", np.zeros((3, 3), np.uint16), "expected 2"),
        ("ids", np.full((3, 2), 9, np.uint16), "valid are 0 to 6"),
        ("ends", np.array([3, 1]), "must rise"),
        ("ends", np.array([1, 4]), "must rise"),
        ("ends", np.array([-5, 3]), "must rise"),
        ("labels", np.zeros(1, np.int64), "expected 2, found 1"),
        ("labels", np.zeros(2, np.float32), "one row of int64"),
        ("key_ends", np.array([1, 10**12]), "must rise"),
    ],
)
def test_shards_of_wrong_arrays(tmp_path, name, array, words):
    """As a stranger could write them, with their own checksum in the manifest."""
    write(tmp_path, (0,), (2,))
    path = tmp_path / "tokens-000000.safetensors"
    save_file({k: v for k, v in (ARRAYS | {name: array}).items() if v is not None}, path)
    from vistok.data.token_shards import file_sha256

    entry = {"bytes": path.stat().st_size, "sha256": file_sha256(path), "samples": 2, "tokens": 3}
    edit(tmp_path, lambda m: m["shards"][0].update(entry))
    with pytest.raises(DataError) as caught:
        TokenFolder(tmp_path)[0]
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_tokens_of_another_tokenizer(tmp_path):
    write(tmp_path)
    folder = TokenFolder(tmp_path)
    folder.check_tokenizer("ab" * 32)
    with pytest.raises(DataError, match="another tokenizer"):
        folder.check_tokenizer("cd" * 32, "exported/mine")
