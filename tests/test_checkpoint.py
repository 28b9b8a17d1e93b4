"""Configs to modules and back: the registry lets in what is ours, and nothing else."""

import json
import sys
import zipfile

import pytest
import torch
from torch import nn

import vistok
from helpers import TINY, add_seal, config_of, images_of, tiny_tokenizer
from vistok.checkpoints.find import find_checkpoint
from vistok.checkpoints.load import load_weights
from vistok.checkpoints.read import read_config, read_export
from vistok.core.errors import CheckpointError, ConfigError
from vistok.core.registry import build, registered, resolve
from vistok.models.build import build_tokenizer

STRANGERS = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "torch.nn.Linear",
    "torch.load",
    "vistok.cli.main",
    "vistok.checkpoints.load.load",
    "vistok.training.run.train",
    "vistok.quantizers.vq.torch",
    "vistok.quantizers.vq.nn",
    "vistok.quantizers.vq.Quantizer",  # imported there, at home elsewhere
    "vistok.quantizers.base.Quantizer",  # at home there, and not registered
    "vistok.losses.objective.CompositeLoss",
    "vistok.systems.titok.weights.titok",  # an importer
    "maskgit_vqgan",
    "vistok.quantizers.kmeans.kmeans",  # a function
    "vistok.quantizers.vq",
    "vistok.models.tokenizer.Sequence",
    "vistok.models..tokenizer.Tokenizer",
    "vistok.quantizers.vq.VectorQuantizer.__init__",
    "vistok.quantizers.no_such.Thing",
    "vistok",
    "",
    None,
    7,
    ["os.system"],
    {"a": "b"},
]


@pytest.mark.parametrize("target", STRANGERS, ids=str)
def test_strangers_are_refused(target):
    registered()  # which imports all modules that register something
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="_target_"):
        resolve(target)
    with pytest.raises(ConfigError, match="_target_"):
        build({"deep": [{"_target_": target, "args": ["touch /tmp/x"]}]})
    assert set(sys.modules) == before


def test_our_own_are_found():
    from vistok.quantizers.vq import VectorQuantizer

    assert resolve("vq") is resolve("vistok.quantizers.vq.VectorQuantizer") is VectorQuantizer
    with pytest.raises(
        ConfigError, match=r"did you mean 'vistok\.quantizers\.vq\.VectorQuantizer'"
    ):
        resolve("vistok.quantizers.vq.VectorQuantiser")


def test_registered_classes_are_found_by_their_own_name_only():
    @vistok.register
    class Mine(nn.Module):
        pass

    name = f"{__name__}.{Mine.__qualname__}"
    assert resolve(name) is Mine
    assert isinstance(build({"_target_": name}), Mine)
    with pytest.raises(ConfigError):
        resolve(f"{__name__}.Mine")


def test_a_config_never_causes_an_import(tmp_path, monkeypatch):
    (tmp_path / "evil_module_of_this_test.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("evil_module_of_this_test.X", "vistok.quantizers.evil_module_of_this_test.X"):
        with pytest.raises(ConfigError):
            resolve(name)
    assert not (tmp_path / "ran").exists()


def test_build_names_a_wrong_argument():
    with pytest.raises(ConfigError, match=r"^foo: no such argument of mse$"):
        build({"_target_": "mse", "foo": 1})


def test_a_tokenizer_must_be_one():
    class Odd(nn.Module):
        def __init__(self, quantizer):
            super().__init__()

    vistok.register(Odd)
    odd = {**config_of(*TINY), "tokenizer": {"_target_": f"{__name__}.{Odd.__qualname__}"}}
    with pytest.raises(
        ConfigError, match=r"^tokenizer\._target_=.*Odd: is the class Odd, expected a"
    ):
        build_tokenizer(odd)


def test_weights_of_another_architecture():
    small, large = tiny_tokenizer(), tiny_tokenizer("quantizer.codebook_size=32")
    before = {k: v.clone() for k, v in small.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"x\.ckpt: .*embedding.* shape \(32, .*\), expected \(16,"
    ):
        load_weights(small, large.state_dict(), "x.ckpt")
    state = small.state_dict()
    first = next(iter(state))
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(small, {k: v for k, v in state.items() if k != first}, "x")
    with pytest.raises(CheckpointError, match="'new' is not expected"):
        load_weights(small, {**state, "new": torch.zeros(1)}, "x")
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())  # untouched


def test_load_takes_runs_files_and_exports(finished_run, exported):
    images = images_of(4)
    ids = {
        str(place): vistok.load(place).tokenize(images)
        for place in (
            finished_run,
            str(finished_run),
            exported,
            finished_run / "checkpoints/best.ckpt",
        )
    }
    reference = ids[str(finished_run)]
    assert all(torch.equal(x, reference) for x in ids.values())
    assert reference.unique().numel() > 1
    assert not vistok.load(exported).training


def test_load_prefers_the_best_and_the_averaged_weights(finished_run, tmp_path):
    best = torch.load(finished_run / "checkpoints" / "best.ckpt", weights_only=True)
    assert find_checkpoint(finished_run).name == "best.ckpt"
    averaged, raw = vistok.load(finished_run), vistok.load(finished_run, weights="last")
    key = "decoder.head.weight"
    assert torch.equal(averaged.state_dict()[key], best["ema"]["weights"][key])
    assert torch.equal(raw.state_dict()[key], best["state_dict"][f"tokenizer.{key}"])
    assert not torch.equal(averaged.state_dict()[key], raw.state_dict()[key])
    with pytest.raises(ConfigError, match="weights=best"):
        vistok.load(finished_run, weights="best")


def test_the_best_may_be_the_validation_after_the_last_step(finished_run):
    with open(finished_run / "metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    scores = {row["step"]: row["val/psnr"] for row in rows if "val/psnr" in row}
    assert list(scores) == [4, 7]  # validated every 4 steps, and at the end
    best, last = (
        torch.load(finished_run / "checkpoints" / name, weights_only=True)
        for name in ("best.ckpt", "last.ckpt")
    )
    assert scores[best["global_step"]] == max(scores.values())
    for content in (best, last):
        (state,) = [v for k, v in content["callbacks"].items() if k.startswith("Checkpoints")]
        assert state["best"] == pytest.approx(max(scores.values()), abs=1e-4)


def test_the_config_is_in_the_checkpoint(finished_run):
    config = read_config(finished_run / "checkpoints" / "last.ckpt")
    assert config["tokenizer"]["encoder"]["width"] == 16
    assert type(config) is dict and type(config["data"]) is dict


def test_a_config_is_read_without_its_weights(finished_run, tmp_path, monkeypatch):
    """Alone, in a few pages; what is damaged is not believed: the config here, weights by `load`."""
    whole = (finished_run / "checkpoints" / "last.ckpt").read_bytes()
    content = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(whole)
    mapped, real = [], torch.load
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *a, **k: mapped.append(k["mmap"]) or real(*a, **k))
        patch.setattr("hashlib.sha256", None)  # all bytes would be read
        config = read_config(alone)
    assert config == content["hyper_parameters"]["config"] and mapped == [True]

    with zipfile.ZipFile(alone) as file:
        places = {name: file.getinfo(name).header_offset for name in file.namelist()}
    (pickled,) = [place for name, place in places.items() if name.endswith("/data.pkl")]
    end = min(place for place in places.values() if place > pickled)
    for place in range(pickled + 60, end, (end - pickled) // 25):
        alone.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            assert read_config(alone) == config  # padding behind the pickle
        except CheckpointError as error:
            assert "alone.ckpt" in str(error) and "\n" not in str(error)
        with pytest.raises(CheckpointError, match="damaged"):
            vistok.load(alone)
    weights = max(places.values())
    alone.write_bytes(whole[:weights] + bytes([whole[weights] ^ 1]) + whole[weights + 1 :])
    with pytest.raises(CheckpointError, match="damaged"):
        vistok.load(alone)


def test_an_older_file_of_torch_has_a_config_too(finished_run, tmp_path):
    content = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    add_seal(tmp_path / "old.ckpt")
    assert read_config(tmp_path / "old.ckpt") == content["hyper_parameters"]["config"]
    del content["hyper_parameters"]
    torch.save(content, tmp_path / "other.ckpt")
    add_seal(tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt: .*it has no config"):
        read_config(tmp_path / "other.ckpt")


def test_the_config_of_an_export_needs_no_weights(exported, tmp_path):
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    assert read_config(tmp_path)["tokenizer"]["encoder"]["width"] == 16
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        read_export(tmp_path)
