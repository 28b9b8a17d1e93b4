"""The readers of other programs open the folders as they are, and return the ids that were written."""

import importlib.util
import json

import numpy as np
import pytest

from token_helpers import FORMATS, settings, small_export, small_shards
from vistok.data.tokens import TokenFolder
from vistok.export.tokenize import tokenize


@pytest.fixture(scope="module", params=["one stream", "two streams"])
def tokens(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("readers")
    two = ("quantizer=fqgan", "quantizer.codebook_size=300")
    options = {"quantizer": two} if request.param == "two streams" else {}
    model = small_export(place / "export", **options)
    small_shards(place / "sets", captions=True)
    words = [f"data.train={place}/sets/*.tar", "data.fields=[caption]"]
    formats = f"format=[{','.join(FORMATS)}]"
    document = "document=[begin_of_image,class,end_of_image]"
    assert tokenize(settings(model, place / "t", formats, "flip=true", document), words)
    return TokenFolder(place / "t")


def joint(tokens, sample):
    """Ids of the joint vocabulary, by hand: token by token, stream q from its offset."""
    offsets = [stream["offset"] for stream in tokens.manifest["streams"]]
    return [int(i) + o for token in sample.ids for i, o in zip(token, offsets, strict=True)]


def document(tokens, sample):
    special, first = tokens.manifest["special"], tokens.manifest["classes"]["first"]
    begin, end = special["begin_of_image"], special["end_of_image"]
    return [begin, first + sample.label, *joint(tokens, sample), end]


def test_streams_are_disjoint_from_special_ids(tokens):
    manifest = tokens.manifest
    codes = {i for s in tokens for i in joint(tokens, s)}
    assert max(codes) < manifest["num_codes"]
    others = [*manifest["special"].values()]
    first, count = manifest["classes"]["first"], manifest["classes"]["count"]
    others += range(first, first + count)
    assert sorted(others) == list(range(manifest["num_codes"], manifest["vocabulary_size"]))


def test_megatron(tokens):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    found = indexed.IndexedDataset(str(tokens.path / "megatron" / "tokens"))
    assert len(found) == len(tokens)
    for number, sample in enumerate(tokens):
        assert found[number].tolist() == document(tokens, sample)
    assert found.document_indices.tolist() == list(range(len(tokens) + 1))
    kind = "uint8" if tokens.manifest["vocabulary_size"] < 257 else "uint16"
    assert found[0].dtype == kind


def test_huggingface_datasets(tokens, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = str(tokens.path / "parquet" / "*.parquet")
    found = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path)
    )
    assert len(found) == len(tokens)
    for row, sample in zip(found, tokens, strict=True):
        assert row["tokens"] == joint(tokens, sample) and row["length"] == len(sample.ids)
        assert (row["label"], row["caption"]) == (sample.label, sample.caption)
        assert (row["key"], row["view"]) == (sample.key, sample.view)


def test_webdataset(tokens):
    from webdataset import WebDataset

    number = 0
    for path in sorted((tokens.path / "webdataset").glob("*.tar")):
        for row in WebDataset(str(path), shardshuffle=False).decode():
            sample = tokens[number]
            assert row["tokens.npy"].tolist() == joint(tokens, sample)
            assert row["cls"] == sample.label and row.get("txt") == sample.caption
            assert row["json"]["key"] == sample.key
            number += 1
    assert number == len(tokens)


def test_nanogpt(tokens):
    """As its `get_batch` does: a memmap of uint16, windows anywhere."""
    data = np.memmap(tokens.path / "nanogpt" / "tokens.bin", dtype=np.uint16, mode="r")
    expected = [i for sample in tokens for i in document(tokens, sample)]
    assert data.tolist() == expected
    x = data[3 : 3 + 8].astype(np.int64)
    assert x.tolist() == expected[3:11]


def test_torchtitan(tokens):
    """Its pretokenized reader's logic: uint32, documents from offset to offset."""
    folder = tokens.path / "torchtitan"
    data = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
    offsets = np.load(folder / "document_offsets.npy", mmap_mode="r")
    assert offsets[0] == 0 and offsets[-1] == len(data)
    for sample, begin, end in zip(tokens, offsets[:-1], offsets[1:], strict=True):
        assert data[begin:end].tolist() == document(tokens, sample)


def test_llamagen(tokens):
    """Its `CustomDataset`: codes (1, A, n), of which one view is drawn; a label (1,)."""
    folder = tokens.path / "llamagen"
    views = len(tokens.manifest["views"])
    for number in range(len(tokens) // views):
        features = np.load(folder / "imagenet16_codes" / f"{number}.npy")
        label = np.load(folder / "imagenet16_labels" / f"{number}.npy")
        assert features.dtype == np.int64 and features.shape[:2] == (1, views)
        for view in range(views):
            sample = tokens[number * views + view]
            assert features[:, view].tolist() == [joint(tokens, sample)]
            assert label.shape == (1,) and label[0] == sample.label


@pytest.mark.skipif(importlib.util.find_spec("litdata") is None, reason="in .ci/nightly")
def test_litdata(tokens, tmp_path):
    """It takes the files in the order in which the system lists them."""
    import litdata

    folder = str(tokens.path / "parquet")
    litdata.index_parquet_dataset(folder, cache_dir=str(tmp_path))
    loader = litdata.streaming.item_loader.ParquetLoader()
    found = litdata.StreamingDataset(folder, item_loader=loader, index_path=str(tmp_path))
    columns = ("key", "view", "label", "caption", "tokens")
    read = [tuple(row[name] for name in columns) for row in found]
    expected = [(s.key, s.view, s.label, s.caption, joint(tokens, s)) for s in tokens]
    assert sorted(read, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(("size", "dtype"), [(251, "uint8"), (252, "uint16"), (65530, "uint16"), (65531, "uint16"), (65532, "int32")])  # fmt: skip
def test_megatron_takes_the_type_that_holds_the_special_ids(tmp_path, size, dtype):
    """65 536 ids are the most of uint16; five of them are special."""
    from vistok.core.errors import ConfigError
    from vistok.data.token_shards import ShardRows, write_shard
    from vistok.data.tokens import describe_shards
    from vistok.export.formats.all import LAYOUTS
    from vistok.export.formats.base import Alphabet
    from vistok.export.vocabulary import SPECIAL

    ids = np.array([[0], [size - 1]])
    rows = ShardRows([ids], [-1], ["a"], [0], [None])
    special = {name: size + number for number, name in enumerate(SPECIAL)}
    values = {
        "streams": [{"name": "codebook.0", "size": size, "offset": 0}],
        "special": special,
        "classes": {"first": size + 5, "count": 0},
        "vocabulary_size": size + 5,
        "document": ["begin_of_image", "end_of_image"],
        "num_tokens": 2,
        "num_streams": 1,
    }
    write_shard(tmp_path / "a.safetensors", rows, [size], "uint32", {})
    folder = TokenFolder(tmp_path, manifest=describe_shards(tmp_path, ["a.safetensors"], values))
    (tmp_path / "megatron").mkdir()
    LAYOUTS["megatron"].write(tmp_path / "megatron", folder)
    head = (tmp_path / "megatron" / "tokens.idx").read_bytes()
    assert head[17] == {"uint8": 1, "uint16": 8, "int32": 4}[dtype]
    data = np.fromfile(tmp_path / "megatron" / "tokens.bin", dtype)
    assert data.tolist() == [size, 0, size - 1, size + 1]
    if size + 5 > 2**16:
        with pytest.raises(ConfigError, match=r"format=nanogpt: holds ids up to 65535"):
            LAYOUTS["nanogpt"].check(Alphabet.of(values))
    else:
        LAYOUTS["nanogpt"].check(Alphabet.of(values))


def test_the_manifest_is_json_of_plain_values(tokens):
    assert json.loads(json.dumps(tokens.manifest)) == tokens.manifest
