"""Exports: what another program reads, and what a hostile one cannot do."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import vistok
from helpers import PATIENCE, config_of, images_of, tiny_tokenizer
from test_checkpoint import STRANGERS
from vistok.checkpoints.exports import write_checksums
from vistok.core.errors import CheckpointError, ConfigError, VistokError
from vistok.export.codebooks import codebook_tensors
from vistok.export.exporter import write_export


def test_files(exported):
    assert sorted(p.name for p in exported.iterdir()) == [
        "README.md", "checksums.json", "codebook.safetensors", "config.json",
        "model.safetensors", "preprocess.json", "preprocessor_config.json", "vocabulary.json",
    ]  # fmt: skip
    config = json.loads((exported / "config.json").read_text())
    io = config["io"]
    assert io["image_size"] == [16, 16] and io["channels"] == 3 and io["num_tokens"] == 4
    assert io["codebook_sizes"] == [16] and io["codebook_dims"] == [8]
    assert io["joint_vocabulary_offsets"] == [0] and io["bits_per_image"] == 16
    assert io["crop"] == "adm_center" and io["token_order"] == "unordered"
    card = (exported / "README.md").read_text()
    assert "TiTok with VectorQuantizer" in card and "| val_psnr |" in card and "16 bits" in card


def test_identical_ids(exported, finished_run):
    images = images_of(32)
    ids = vistok.load(finished_run).tokenize(images)
    assert ids.shape == (32, 4, 1)  # Q is kept when it is 1
    assert ids.unique().numel() > 2
    tok = vistok.load(exported)
    assert torch.equal(tok.tokenize(images), ids)
    assert torch.equal(tok.detokenize(ids), vistok.load(finished_run).detokenize(ids))


READER = """
import sys
for name in ("vistok", "lightning", "hydra", "omegaconf"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file
books = load_file(sys.argv[1] + "/codebook.safetensors")
given = load_file(sys.argv[2])
ids, quantized, nearest = given["ids"], given["quantized"], given["latents"]
assert books["codebook.0"].shape == (16, 8) and books["codebook.0"].dtype == torch.float32
# The table is the product of other rows than these: equal up to rounding.
torch.testing.assert_close(books["decoder_input"][ids[..., 0]], quantized)
found = torch.cdist(given["latents"], books["codebook.0"]).argmin(-1)
assert torch.equal(found, ids[..., 0])
print("read")
"""


def test_a_fresh_process_reads_the_codebook_with_safetensors_alone(
    exported, finished_run, tmp_path
):
    tok = vistok.load(finished_run)
    images = images_of(16)
    ids = tok.tokenize(images)
    latents = tok.quantizer.project_in(tok.encode(tok.to_model_range(images)))
    save_file(
        {
            "ids": ids,
            "quantized": tok.quantizer.decode(ids).detach().contiguous(),
            "latents": latents.detach().contiguous(),
        },
        tmp_path / "given.safetensors",
    )
    result = subprocess.run(
        [sys.executable, "-c", READER, str(exported), str(tmp_path / "given.safetensors")],
        capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path,
    )  # fmt: skip
    assert result.stdout == "read\n", result.stderr


@pytest.mark.parametrize(
    ("overrides", "slots", "looked_up"),
    [
        (["quantizer=residual_vq", "quantizer.num_layers=3"], 3, False),
        (["quantizer=fqgan"], 2, False),
        (["quantizer=fsq", "quantizer.levels=[5,3]"], 1, True),
        (["quantizer=var"], 1, False),
        (["quantizer=lfq"], 1, True),
    ],
)
def test_quantizers_of_other_kinds(tmp_path, overrides, slots, looked_up):
    from helpers import SIZES
    from vistok.models.build import build_tokenizer

    config = config_of(*SIZES["titok_tiny"], "data.image_size=16")
    config["quantizer"] = config_of("~experiment", *overrides)["quantizer"] | {"dim": 16}
    if "codebook_size" in config["quantizer"]:
        config["quantizer"]["codebook_size"] = 16
    torch.manual_seed(0)
    tok = build_tokenizer(config)
    tok.initialize(tok.to_model_range(images_of(16)))
    tok.eval()
    write_export(tok, config, tmp_path / "out", {})
    back = vistok.load(tmp_path / "out")
    ids = tok.tokenize(images_of(8))
    assert ids.shape[-1] == slots
    assert torch.equal(back.tokenize(images_of(8)), ids)
    assert torch.equal(back.detokenize(ids), tok.detokenize(ids))
    tensors = load_file(tmp_path / "out" / "codebook.safetensors")
    assert ("decoder_input" in tensors) == looked_up
    for slot, table in enumerate(tok.codebooks()):
        assert torch.equal(tensors[f"codebook.{slot}"], table)
    if looked_up:
        vectors = tensors["decoder_input"][ids[..., 0]]
        torch.testing.assert_close(vectors, tok.quantizer.decode(ids), atol=1e-6, rtol=1e-5)
    io = json.loads((tmp_path / "out" / "config.json").read_text())["io"]
    sizes = io["codebook_sizes"]
    assert io["joint_vocabulary_offsets"] == [sum(sizes[:q]) for q in range(slots)]
    assert "Not evaluated yet" in (tmp_path / "out" / "README.md").read_text()


def test_codebooks_are_float32_and_detached():
    tables = tiny_tokenizer("quantizer.codebook=gradient").codebooks()
    assert [(t.shape, t.dtype, t.requires_grad) for t in tables] == [
        ((16, 8), torch.float32, False)
    ]
    assert codebook_tensors(tiny_tokenizer())["decoder_input"].shape == (16, 16)


# ---------------------------------------------------------------------- hostile and damaged


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    write_checksums(folder)  # as a stranger would


@pytest.mark.parametrize("target", STRANGERS, ids=str)
@pytest.mark.parametrize("part", ["quantizer", "encoder", "tokenizer"])
def test_foreign_classes_are_refused(copy, monkeypatch, part, target):
    calls = []
    monkeypatch.setattr(os, "system", calls.append)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: calls.append(a))

    def change(config):
        place = config["tokenizer"]["encoder"] if part == "encoder" else config[part]
        place["_target_"] = target

    edit(copy, change)
    with pytest.raises(ConfigError, match="_target_"):
        vistok.load(copy)
    assert calls == []


def test_a_class_hidden_in_an_argument_is_refused(copy):
    edit(copy, lambda c: c["quantizer"].update(metric={"_target_": "os.system", "command": "id"}))
    with pytest.raises(ConfigError, match=r"os\.system"):
        vistok.load(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("quantizer"),
        lambda c: c.update(tokenizer=3),
        lambda c: c.update(tokenizer=[]),
        lambda c: c["tokenizer"].pop("decoder"),
        lambda c: c["quantizer"].update(codebook_size=1),
        lambda c: c["quantizer"].update(codebook_size=32),
        lambda c: c["quantizer"].update(nonsense=32),
        lambda c: c["tokenizer"]["encoder"].update(width="wide"),
    ],
)
def test_damaged_configs_give_one_line(fails, copy, change):
    edit(copy, change)
    fails("evaluate", f"run={copy}")
    with pytest.raises(VistokError):
        vistok.load(copy)


def test_damaged_files(fails, copy):
    weights, config = copy / "model.safetensors", copy / "config.json"
    whole = weights.read_bytes()
    for content in (b"", whole[:50], whole[: len(whole) // 2], b"x" * 1000):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match="copy"):
            vistok.load(copy)
    weights.write_bytes(whole)
    (copy / "checksums.json").unlink()
    (copy / "vocabulary.json").unlink()  # as before there were any
    for text in ("", "{", "[]", "null", '"x"'):
        config.write_text(text)
        with pytest.raises(CheckpointError, match="copy"):
            vistok.load(copy)
    config.unlink()
    fails("evaluate", f"run={copy}", words=("config.json", "missing"))


def test_a_pickle_in_place_of_weights_does_not_run(copy, tmp_path):
    from test_errors import Malicious

    torch.save({"w": Malicious(tmp_path / "executed")}, copy / "model.safetensors")
    with pytest.raises(CheckpointError):
        vistok.load(copy)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------- writing


def test_overwriting(fails, cli, finished_run, tmp_path):
    words = (f"run={finished_run}", "out=out")
    assert cli("export", *words)[0] == 0
    (tmp_path / "out" / "mark").touch()
    fails("export", *words, words=("out=out", "overwrite=true"))
    assert (tmp_path / "out" / "mark").exists()
    code, _, out = cli("export", *words, "overwrite=true", "weights=last")
    assert code == 0 and not (tmp_path / "out" / "mark").exists()
    assert 'vistok.load("out")' in out
    raw = vistok.load(finished_run, weights="last").state_dict()
    assert all(torch.equal(v, raw[k]) for k, v in vistok.load("out").state_dict().items())

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    line = ("out=mine", "not an export")
    fails("export", f"run={finished_run}", "out=mine", "overwrite=true", words=line)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert cli("export", f"run={finished_run}", "out=deep/er/out")[0] == 0


def test_disk_full(fails, cli, finished_run, tmp_path, monkeypatch):
    import vistok.export.exporter as exporter

    assert cli("export", f"run={finished_run}", "out=out")[0] == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporter, "save_file", full)
    words = ("out=out", "could not be written", "No space left")
    fails("export", f"run={finished_run}", "out=out", "overwrite=true", words=words)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    fails("export", f"run={finished_run}", "out=new", words="No space left")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_export_of_a_checkpoint_file_and_evaluated_metrics(cli, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert cli("evaluate", "run=run", "num_pictures=0", "eval=pixels")[0] == 0
    assert cli("export", "run=run/checkpoints/last.ckpt", "out=out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert f"| psnr | {metrics['psnr']:.4g} |" in card and "| ssim |" in card
    assert metrics["protocol_hash"] in card and '"crop": "adm_center"' in card
