"""DreamSim against numbers of its released code, with the same random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vistok.core.errors import ConfigError
from vistok.metrics.build import build_metrics
from vistok.models.networks.dreamsim import DreamSim

#: What the released code (v0.2.1 with peft) gives for the weights and images drawn below.
EXPECTED = [0.18938487768173218, 0.15484541654586792, 0.2238491177558899]


def drawn_weights():
    """DINO's names and shapes; values of one generator, names in alphabetical order."""
    shapes = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "norm.weight": (768,)}
    shapes |= {"norm.bias": (768,), "patch_embed.proj.weight": (768, 3, 16, 16)}
    shapes["patch_embed.proj.bias"] = (768,)
    for n in range(12):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{n}.{norm}.{kind}": (768,) for kind in ("weight", "bias")}
        for name, out, width in (
            ("attn.qkv", 2304, 768), ("attn.proj", 768, 768), ("mlp.fc1", 3072, 768), ("mlp.fc2", 768, 3072),
        ):  # fmt: skip
            shapes[f"blocks.{n}.{name}.weight"] = (out, width)
            shapes[f"blocks.{n}.{name}.bias"] = (out,)
    generator, weights = torch.Generator().manual_seed(5), {}
    for name in sorted(shapes):
        scale = 0.05 if len(shapes[name]) > 1 else 0.2
        shift = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")) else 0.0
        weights[name] = torch.randn(shapes[name], generator=generator) * scale + shift
    return weights


def drawn_adapter(rank=4):
    prefix, generator, found = (
        "base_model.model.extractor_list.0.model.blocks",
        torch.Generator(),
        {},
    )
    generator.manual_seed(7)
    names = [f"{prefix}.{n}.attn.qkv.lora_{x}.weight" for n in range(12) for x in "AB"]
    for name in sorted(names):
        shape = (rank, 768) if "lora_A" in name else (2304, rank)
        found[name] = torch.randn(shape, generator=generator) * 0.3
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dreamsim")
    torch.save(drawn_weights(), folder / "dino.pth")
    (folder / "adapter").mkdir()
    save_file(drawn_adapter(), folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 0.5, "r": 4}))
    return folder


@pytest.mark.slow
def test_distances_are_those_of_the_released_code(files):
    generator = torch.Generator().manual_seed(9)
    a = torch.rand(3, 3, 224, 224, generator=generator)
    b = (a + 0.3 * torch.rand(3, 3, 224, 224, generator=generator)).clamp(0, 1)
    b[2] = a[0]
    network = DreamSim(files / "adapter", files / "dino.pth").eval()
    with torch.no_grad():
        found = network.distances(network.maps(2 * a - 1), network.maps(2 * b - 1))
        assert found.tolist() == pytest.approx(EXPECTED, abs=1e-5)
        small = network.maps(torch.zeros(1, 1, 20, 30))
    assert small[0].shape == (1, 768, 1, 1)
    identity = network.identity()
    assert identity["name"] == "dreamsim_dino_vitb16"
    assert {len(value) for value in identity["sha256"].values()} == {64}
    assert identity["sha256"].keys() == {"weights", "adapter"}


@pytest.mark.slow
def test_wrong_adapters_are_one_line(files, tmp_path):
    def fails(words, tensors=None, config='{"lora_alpha": 1}'):
        if tensors is not None:
            save_file(tensors, tmp_path / "adapter_model.safetensors")
            (tmp_path / "adapter_config.json").write_text(config)
        network = {
            "_target_": "dreamsim",
            "adapter": str(tmp_path),
            "weights": str(files / "dino.pth"),
        }
        with pytest.raises(ConfigError, match=words) as error:
            build_metrics({"x": {"_target_": "perceptual", "network": network}})
        assert "\n" not in str(error.value)

    fails("adapter=.*must be a folder with adapter_config.json")
    good = drawn_adapter()
    name = next(name for name in good if "lora_A" in name)
    fails("has no place", {**good, "base_model.model.mlp.weight": torch.zeros(2)})
    fails("lora_A", {k: v for k, v in good.items() if k != name.replace("lora_A", "lora_B")})
    fails("lora_A", {**good, name: torch.full((4, 768), torch.nan)})
    fails("adapter_config.json: not weights of DreamSim's adapter", good, config="{}")
