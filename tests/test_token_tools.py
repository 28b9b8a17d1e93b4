"""Exports for other programs, pictures of tokens, near codes, and the page's language model."""

import json
import os
import re
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vistok
from helpers import PATIENCE, ROOT, images_of, picture
from test_before_move import ASSETS
from token_helpers import settings, small_export, small_shards, small_tokenizer
from vistok.checkpoints.exports import check_export, tokenizer_hash, write_checksums
from vistok.core.configuration import compose, to_container
from vistok.core.errors import CheckpointError, ConfigError, DataError
from vistok.data.tokens import TokenFolder
from vistok.export.codebooks import codebook_tensors
from vistok.export.detokenize import detokenize
from vistok.export.exporter import run_metrics
from vistok.export.near_codes import near_codes, nearest_codes, survival
from vistok.export.tokenize import tokenize
from vistok.export.vocabulary import factors, vocabulary


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("tools")
    small_export(place / "export")
    small_shards(place / "sets", shards=2, images=16)
    words = [f"data.train={place}/sets/*.tar"]
    tokenize(settings(place / "export", place / "t", "format=[megatron,parquet]"), words)
    return place


# ---------------------------------------------------------------------- exports


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = small_export(tmp_path / "export")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_every_file_has_a_checksum_and_every_altered_byte_is_refused(tmp_path):
    folder = small_export(tmp_path / "export")
    names = {p.name for p in folder.iterdir()} - {"checksums.json"}
    assert set(json.loads((folder / "checksums.json").read_text())["sha256"]) == names
    for name in names - {"README.md"}:
        whole = (folder / name).read_bytes()
        for at in np.linspace(0, len(whole) - 1, 15).astype(int):
            data = bytearray(whole)
            data[at] ^= 1
            (folder / name).write_bytes(data)
            with pytest.raises(CheckpointError, match=rf"{name}: altered"):
                check_export(folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            check_export(folder)
        (folder / name).write_bytes(whole)
    (folder / "README.md").write_text("# Mine\n")
    check_export(folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"checksums\.json is missing"):
        vistok.load(folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ('{"format": 2, "sha256": {}}', "newer vistok"),
        ('{"format": "x", "sha256": {}}', "format"),
        ('{"format": 1, "sha256": {}}', "no checksum of model.safetensors"),
        ('{"format": 1}', "damaged"),
        (
            '{"format": 1, "sha256": {"model.safetensors": 1, "config.json": 1, "../x": 1}}',
            "not a file of the export|altered",
        ),
    ],
)
def test_wrong_checksum_files(tmp_path, text, told):
    folder = small_export(tmp_path / "export")
    (folder / "checksums.json").write_text(text)
    with pytest.raises(CheckpointError, match=told) as caught:
        vistok.load(folder)
    assert "checksums.json" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_a_stranger_sealed_are_looked_at(tmp_path):
    """NaN, other types, missing keys and another run's, with checksums that fit."""
    folder = small_export(tmp_path / "export")
    whole = load_file(folder / "model.safetensors")
    name = next(key for key, value in whole.items() if value.dtype == torch.float32)
    for state, told in (
        (whole | {name: torch.full_like(whole[name], torch.nan)}, "NaN"),
        (whole | {name: whole[name].half()}, "float16"),
        ({key: value for key, value in whole.items() if key != name}, "missing"),
    ):
        save_file(state, folder / "model.safetensors")
        write_checksums(folder)
        with pytest.raises(CheckpointError, match=told):
            vistok.load(folder)


def test_the_hash_is_the_tokenizers(tmp_path):
    import shutil

    folder = small_export(tmp_path / "a")
    copy = shutil.copytree(folder, tmp_path / "b")
    (copy / "README.md").write_text("another card")
    assert tokenizer_hash(copy) == tokenizer_hash(folder)
    other = small_export(tmp_path / "c", quantizer=("quantizer=vq", "quantizer.codebook_size=8"))
    assert tokenizer_hash(other) != tokenizer_hash(folder)
    assert len({tokenizer_hash(path) for path in (ASSETS / "exports").iterdir()}) > 20


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"psnr": "high"}', "[" * 10**5, "\xff"])
def test_damaged_metrics_never_stop_an_export(tmp_path, text, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "summary.json").write_bytes(text.encode("latin1"))
    assert run_metrics(tmp_path / "checkpoints" / "last.ckpt") == {}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text(
        '{"psnr": 20.5, "protocol": {}, "protocol_hash": "ab12"}'
    )
    found = run_metrics(tmp_path / "checkpoints" / "last.ckpt")
    assert found == {"psnr": 20.5, "protocol": {}, "protocol_hash": "ab12", "data": None}


@pytest.mark.parametrize(
    "quantizer",
    [
        ("quantizer=fsq", "quantizer.levels=[5,3,4]"),
        ("quantizer=lfq", "quantizer.codebook_size=32"),
        ("quantizer=bsq", "quantizer.codebook_size=32"),
        ("quantizer=binary", "quantizer.codebook_size=16"),
    ],
    ids=lambda words: words[0],
)
def test_digits_describe_an_implicit_codebook(quantizer, monkeypatch):
    """Its rows, computed from the digits by hand, are the table; a larger one is not written."""
    import vistok.export.codebooks as codebooks

    tok, _ = small_tokenizer(quantizer=quantizer)
    digits = vocabulary(tok)["digits"]
    table = tok.codebooks()[0]
    for number, row in enumerate(table.tolist()):
        expected, rest = [], number
        for values in digits:
            expected.append(values[rest % len(values)])
            rest //= len(values)
        assert row == pytest.approx(expected, abs=1e-6)
    assert "codebook.0" in codebook_tensors(tok)
    monkeypatch.setattr(codebooks, "LARGEST_TABLE", len(table) - 1)
    assert not codebook_tensors(tok)


@pytest.mark.parametrize("name", ["fqgan", "residual_vq", "unitok"])
def test_tables_of_several_slots_add_up_to_the_decoders_input(name):
    tok, _ = small_tokenizer("titok_tiny", (f"quantizer={name}", "quantizer.codebook_size=8"))
    tensors = codebook_tensors(tok)
    ids = tok.tokenize(images_of(4))
    found = tensors["decoder_bias"] + sum(
        tensors[f"decoder_input.{q}"][ids[..., q]] for q in range(ids.shape[-1])
    )
    torch.testing.assert_close(found, tok.quantizer.decode(ids), atol=1e-4, rtol=1e-4)


def test_vocabularies_of_scales_and_prefixes():
    tok, _ = small_tokenizer(quantizer=("quantizer=var", "quantizer.codebook_size=16"))
    words = vocabulary(tok)
    assert words["order"] == "next_scale"
    assert sum(rows * columns for rows, columns in words["scales"]) == words["num_tokens"]
    flexible, _ = small_tokenizer("one_d_piece_tiny")
    words = vocabulary(flexible, num_classes=10)
    assert words["order"] == "nested" and words["lengths"]["budgets"] == "all"
    assert words["vocabulary_size"] == 16 + 5 + 10 and words["classes"]["first"] == 21
    restok, _ = small_tokenizer("restok_tiny")
    budgets = vocabulary(restok)["lengths"]["budgets"]
    assert budgets == restok.length.budgets(restok.num_tokens)


@pytest.mark.parametrize(
    ("size", "digits", "found"),
    [(2**18, None, [512, 512]), (64000, [8, 8, 8, 5, 5, 5], [512, 125]), (10007, None, [101, 100])],
)
def test_huge_codebooks_fall_into_two_factors(size, digits, found):
    assert factors(size, digits) == found
    assert found[0] * found[1] >= size


# ---------------------------------------------------------------------- preprocessing


def test_preprocess_is_the_evaluations_transform(tmp_path):
    """Against the data pipeline itself, and a PIL image against its file."""
    from vistok.data.datamodule import VistokDataModule

    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (kind, mode) in enumerate(
        [
            ("jpg", "RGB"),
            ("png", "RGBA"),
            ("png", "P"),
            ("jpg", "L"),
            ("webp", "RGB"),
            ("tif", "CMYK"),
        ]
    ):
        image = Image.fromarray(picture(number, 61, 47)).convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.fromarray(picture(9, 61, 47)[..., 0]))
        exif = Image.Exif()
        exif[0x0112] = 6 if kind == "jpg" else 1
        image.save(folder / f"{number}.{kind}", **({"exif": exif} if kind == "jpg" else {}))
    tok = vistok.load(small_export(tmp_path / "export"))
    data = VistokDataModule(
        "folder",
        train=str(folder),
        val=str(folder),
        image_size=16,
        num_workers=0,
        eval_batch_size=9,
    )
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    paths = [folder / key for key in batch["key"]]
    assert len(paths) == 6
    assert torch.equal(tok.preprocess(paths), batch["image"])
    for path, expected in zip(paths, batch["image"], strict=True):
        with Image.open(path) as image:
            found = tok.preprocess(image)[0]
        assert (found.int() - expected.int()).abs().max() <= (0 if path.suffix != ".jpg" else 2)
    assert tok.preprocess([]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("images", [3, "nothing.jpg", [np.zeros((3, 3), np.uint8)]])
def test_pictures_that_cannot_be_used(tmp_path, images):
    tok = vistok.load(small_export(tmp_path / "export"))
    with pytest.raises(DataError, match=r"expected|No such file"):
        tok.preprocess(images)


# ---------------------------------------------------------------------- pictures, near codes


@pytest.mark.parametrize("format", ["native", "megatron", "parquet"])
def test_detokenize_makes_the_tokenizers_pictures(place, tmp_path, format):
    words = to_container(compose("detokenize", ["model=x", "tokens=x", "out=x"]))
    words |= {"model": str(place / "export"), "tokens": str(place / "t"), "out": str(tmp_path)}
    assert detokenize(words | {"format": format, "first": 3, "count": 4, "batch_size": 3}) == 4
    tok, tokens = vistok.load(place / "export"), TokenFolder(place / "t")
    for number in range(3, 7):
        expected = tok.detokenize(torch.from_numpy(tokens[number].ids)[None])[0]
        found = np.asarray(Image.open(tmp_path / f"{number:09d}.png")) / 255
        assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() < 0.51 / 255
    for change, told in (
        ({"first": 99}, "first=99"),
        ({"count": 0}, "count=0"),
        ({"format": "nanogpt"}, "not written as"),
    ):
        with pytest.raises((ConfigError, DataError), match=told):
            detokenize(words | change)
    other = small_export(
        tmp_path / "other", quantizer=("quantizer=vq", "quantizer.codebook_size=8")
    )
    with pytest.raises(DataError, match="tokens of another tokenizer"):
        detokenize(words | {"model": str(other)})


def test_near_codes_by_brute_force(monkeypatch):
    import vistok.export.near_codes as module

    monkeypatch.setattr(module, "_CELLS", 100)  # several chunks
    table = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    ids, distances = nearest_codes(table, 4)
    for code in range(37):
        apart = [(float((table[code] - other).double().norm()), i) for i, other in enumerate(table)]
        expected = sorted(apart[:code] + apart[code + 1 :])[:4]
        assert ids[code].tolist() == [i for _, i in expected]
        assert distances[code].tolist() == pytest.approx([d for d, _ in expected], rel=1e-5)


def test_survival_by_hand(place, tmp_path):
    tok = vistok.load(place / "export")
    images = images_of(7)
    found = survival(tok, images, batch_size=3)
    ids = tok.tokenize(images)
    again = tok.tokenize((tok.detokenize(ids) * 255).round().to(torch.uint8))
    assert found["share"] == pytest.approx((ids == again).double().mean().item())
    assert found["whole"] == pytest.approx((ids == again).flatten(1).all(1).double().mean().item())
    words = to_container(compose("near_codes", ["model=x", "out=x"]))
    words |= {"model": str(place / "export"), "out": str(tmp_path), "count": 3, "images": 20}
    results = near_codes(words, [f"data.train={place}/sets/*.tar"])
    assert results["images"] == 20 and 0 <= results["share"] <= 1
    assert load_file(tmp_path / "near_codes.safetensors")["codes.0"].shape == (16, 3)
    assert near_codes(words, []) == {}


# ---------------------------------------------------------------------- the page


@pytest.mark.slow
def test_the_pages_language_model_learns(place, tmp_path):
    """The block of docs/guide/tokens.md as it stands there, below the unigram entropy."""
    text = (ROOT / "docs" / "guide" / "tokens.md").read_text()
    block = re.search(r"```python\n(import sys\n.*?)```", text, re.DOTALL)
    (tmp_path / "gpt.py").write_text(block[1])
    run = subprocess.run(
        [sys.executable, "gpt.py", place / "t", "60"], cwd=tmp_path, capture_output=True, text=True,
        timeout=PATIENCE, env={**os.environ, "PYTHONPATH": str(ROOT / "tokenizers"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stdout)]
    entropy = TokenFolder(place / "t").manifest["usage"][0]["entropy_bits"] * np.log(2)
    assert losses[-1] < entropy < losses[0]
