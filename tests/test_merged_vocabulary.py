"""A text tokenizer with codes behind its ids, in Hugging Face's own reader."""

import json
import subprocess
import sys

import numpy as np
import pytest

from token_helpers import small_export
from vistok.core.errors import ConfigError, DataError
from vistok.export.merged import MergedVocabulary, merge

tokenizers = pytest.importorskip("tokenizers")


def text_tokenizer(folder, kind="bpe"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = ["a photo of a dog 16*16", "the cat sat on the mat", "2*2 4*4 0123456789 größe"]
    if kind == "bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        )
    else:
        made = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=60,
            special_tokens=["<s>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(["<extra>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return made


def words(model, text, out, reserved=200):
    return {"model": str(model), "text": str(text), "out": str(out), "reserved": reserved}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("merged")
    small_export(place / "export")
    small_export(place / "two", quantizer=("quantizer=fqgan", "quantizer.codebook_size=30"))
    text_tokenizer(place / "text")
    text_tokenizer(place / "unigram", "unigram")
    return place


@pytest.mark.parametrize("text", ["text", "unigram"])
@pytest.mark.parametrize("model", ["export", "two"])
def test_text_keeps_its_ids_and_codes_follow(place, tmp_path, text, model):
    transformers = pytest.importorskip("transformers")
    merge(words(place / model, place / text, tmp_path / "out"))
    before = tokenizers.Tokenizer.from_file(str(place / text / "tokenizer.json"))
    size = before.get_vocab_size()
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for line in ("a photo of a dog", "the mat 16*16", "größe <extra>"):
        assert after(line, add_special_tokens=False).input_ids == before.encode(line).ids
    vocabulary = MergedVocabulary.load(tmp_path / "out")
    slots = len(vocabulary.sizes)
    codes = sum(vocabulary.sizes)
    assert len(after) == size + 200 + codes
    assert vocabulary.structure["img_start"] == size and vocabulary.offsets[0] == size + 200
    assert after.convert_tokens_to_ids("<|img_end|>") == vocabulary.structure["img_end"]
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, vocabulary.sizes, (4, slots)) for _ in range(2))
    sample = f"a dog {vocabulary.text(first)} and {vocabulary.text(second)} sat"
    found = after(sample, add_special_tokens=False).input_ids
    images = vocabulary.images(found)
    assert [image.tolist() for image in images] == [first.tolist(), second.tolist()]
    # By hand: structure, the size as text, rows of two tokens.
    begin = found.index(size)
    digits = before.encode("2*2").ids
    rest = found[begin + 1 + len(digits) :]
    assert found[begin + 1 : begin + 1 + len(digits)] == digits
    joint = (first + vocabulary.offsets).reshape(2, -1).tolist()
    row_end = vocabulary.structure["img_end_of_row"]
    expected = [size + 2, *joint[0], row_end, *joint[1], row_end, size + 1]
    assert rest[: len(expected)] == expected


def test_equal_input_gives_equal_bytes_in_another_process(place, tmp_path):
    merge(words(place / "export", place / "text", tmp_path / "a"))
    code = (
        "import sys; from vistok.export.merged import merge; "
        "merge(dict(zip(('model','text','out'), sys.argv[1:]), reserved=200))"
    )
    from helpers import ROOT

    subprocess.run(
        [sys.executable, "-c", code, place / "export", place / "text", tmp_path / "b"],
        check=True, env={"PYTHONPATH": str(ROOT / "tokenizers"), "PYTHONHASHSEED": "7", "LC_ALL": "C"},
    )  # fmt: skip
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["image_vocabulary.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_cannot_be(place, tmp_path):
    with pytest.raises(ConfigError, match="reserved=2"):
        merge(words(place / "export", place / "text", tmp_path / "out", 2))
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file"):
        merge(words(place / "export", tmp_path, tmp_path / "out"))
    merge(words(place / "export", place / "text", tmp_path / "out"))
    with pytest.raises(ConfigError, match="already exists"):
        merge(words(place / "export", place / "text", tmp_path / "out"))
    with pytest.raises(DataError, match="already; choose a tokenizer of text"):
        merge(words(place / "export", tmp_path / "out", tmp_path / "twice"))
    gaps = tmp_path / "gaps"
    gaps.mkdir()
    content = json.loads((place / "text" / "tokenizer.json").read_text())
    content["added_tokens"][-1]["id"] += 5
    (gaps / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="without gaps"):
        merge(words(place / "export", gaps, tmp_path / "other"))
    for text in ("", "[]", "{}", '{"model": 3}'):
        (gaps / "tokenizer.json").write_text(text)
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            merge(words(place / "export", gaps, tmp_path / "other"))


def test_sequences_that_are_not_images(place, tmp_path):
    merge(words(place / "export", place / "text", tmp_path / "out"))
    vocabulary = MergedVocabulary.load(tmp_path / "out")
    begin, end = vocabulary.structure["img_token_start"], vocabulary.structure["img_end"]
    assert vocabulary.images([1, 2, end, 3]) == []
    for sequence, told in (
        ([begin, 5, end], "is not a code"),
        ([begin, begin], "inside another"),
        ([begin, vocabulary.offsets[0]], "does not end"),
    ):
        with pytest.raises(DataError, match=told):
            vocabulary.images(sequence)
    with pytest.raises(DataError, match="expected"):
        vocabulary.text([[0.5]])
    with pytest.raises(DataError, match="below 16"):
        vocabulary.text([[16]] * 4)
