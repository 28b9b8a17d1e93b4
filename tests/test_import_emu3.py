"""Emu3's VQ model against transformers' own class, with random weights."""

import pytest
import torch
from safetensors.torch import save_file

import vistok
from helpers import config_of, images_of
from vistok.core.outputs import TokenizerOutput
from vistok.export.importer import import_weights
from vistok.models.build import build_tokenizer

SIZES = {
    "three levels": {"base_channels": 32, "channel_multiplier": [1, 2, 2], "hidden_size": 64,
                     "attn_resolutions": [2], "num_res_blocks": 1, "codebook_size": 64},
    "four levels, two frames": {"base_channels": 32, "channel_multiplier": [1, 1, 2, 2],
                                "hidden_size": 64, "attn_resolutions": [3], "num_res_blocks": 2,
                                "codebook_size": 96, "temporal_downsample_factor": 2},
}  # fmt: skip


def theirs(**sizes):
    transformers = pytest.importorskip("transformers")
    model = transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
                drawn = torch.randn(value.shape, generator=generator) * scale
                if name.endswith("running_var"):
                    drawn = 0.5 + drawn.abs()
                value.copy_(drawn + (value.ndim == 1 and name.endswith("weight")))
        # Codes where the latents are, so that ids differ, and far enough apart for sharp choices.
        images = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
        images = images * torch.linspace(0.1, 1, 4)[:, None, None, None]
        hidden = model.encode(images, image_sizes=[(64, 64)] * 4).last_hidden_state
        z = model.quant_conv(hidden.permute(0, 2, 1, 3, 4)).transpose(0, 1).flatten(1).T
        model.quantize.embedding.weight.copy_(
            z[torch.randperm(len(z), generator=generator)[: sizes["codebook_size"]]]
        )
    return model


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_ids_and_pictures_are_those_of_transformers(sizes, tmp_path, capsys):
    model = theirs(**sizes)
    folder = tmp_path / "hub"
    folder.mkdir()
    state = {f"model.vqmodel.{k}": v.contiguous() for k, v in model.state_dict().items()}
    state["model.text_model.embed_tokens.weight"] = torch.zeros(2, 2)
    save_file(state, folder / "model.safetensors")
    out = import_weights("auto", folder, tmp_path / "out", image_size=64)
    assert "source=auto: emu3, for it has convolutions over time" in capsys.readouterr().out
    tok = vistok.load(out)
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in tok.parameters()) == count
    for size in ((64, 64), (32, 48)):
        images, sized = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)), tok.at(size)  # fmt: skip
        with torch.no_grad():
            expected = torch.stack(
                list(model.encode(2 * images - 1, image_sizes=[size] * 2).image_tokens)
            )
            pictures = model.decode(expected)
        ids = sized.tokenize(images)
        assert torch.equal(ids[..., 0], expected.flatten(1)) and ids.unique().numel() > 8
        found = sized.decode(sized.quantizer.decode(ids, sized.encoder.grid))
        assert (found - pictures).abs().max() < 1e-4 and pictures.std() > 0.05


def test_a_step_reaches_every_weight_and_the_statistics_of_norms():
    config = config_of("experiment=emu3_tiny")
    tokenizer = build_tokenizer(config)
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    before = tokenizer.encoder.blocks[0].norm1.running_mean.clone()
    output: TokenizerOutput = tokenizer.train()(images)
    (
        output.predictions["image"].value.square().mean() + sum(output.quantizer.losses.values())
    ).backward()
    assert output.predictions["image"].value.shape == images.shape
    # The first frame sees zeros alone where earlier ones would be.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    assert not torch.equal(before, tokenizer.encoder.blocks[0].norm1.running_mean)


def test_the_start_from_data_hands_pictures_on_over_time():
    """In training too, where the norms over time take the statistics of the batch."""
    small = ["tokenizer.encoder.base_channels=32", "quantizer.codebook_size=128"]
    words = ["experiment=emu3_tiny", "data.image_size=32", *small]
    tokenizer = build_tokenizer(config_of(*words)).eval()
    photos = images_of(48, 32)
    tokenizer.initialize(photos)
    fresh = photos[:16].float() / 255
    error = (tokenizer.detokenize(tokenizer.tokenize(fresh)) - fresh).square().mean()
    assert error < 0.3 * fresh.var()
    picture = tokenizer.train()(2 * fresh - 1).predictions["image"].value
    assert ((picture + 1) / 2 - fresh).square().mean() < 1.2 * error + 1e-3
