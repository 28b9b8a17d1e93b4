"""Exports in the layouts of LlamaGen, Janus, TiTok and diffusers: read back, and by the libraries themselves."""

import json

import pytest
import torch
from safetensors.torch import load_file

import vistok
from helpers import SIZES, TINY, config_of
from vistok.cli import main, train
from vistok.core.errors import ConfigError
from vistok.export.exporter import export_run, place_export
from vistok.export.importer import import_weights
from vistok.export.original import export_original
from vistok.models.build import build_tokenizer

GRID = (
    "experiment=llamagen_vq16", "data.image_size=64", "tokenizer.latent_dim=16",
    "tokenizer.encoder.base_channels=32", "tokenizer.encoder.channel_multipliers=[1,1,2]",
    "quantizer.codebook_size=64",
)  # fmt: skip
TAMING = (
    "experiment=taming_f16", *GRID[1:], "tokenizer.encoder.num_res_blocks=1",
    "tokenizer.decoder.num_res_blocks=2",
)  # fmt: skip
TITOK = (
    "experiment=titok_s128", "data.image_size=32", "tokenizer.encoder.num_latent_tokens=12",
    "quantizer=vq_8192x64", "quantizer.codebook_size=128", "quantizer.codebook_dim=8",
    "quantizer.metric=euclidean",
)  # fmt: skip

COMMON = [
    *(word for word in TINY if not word.startswith(("tokenizer.", "quantizer.", "data.image_size"))),
    "data=folder", "data.val_fraction=0.2", "adversary=none", "trainer.max_steps=3",
    "trainer.global_batch_size=null",
]  # fmt: skip


def exported(out, *words, stages=1, means=0.0):
    """A tokenizer with random weights, as an export; `means` are those taken off latents."""
    config = config_of(*words)
    if stages == 2:
        tokenizer = config["tokenizer"]
        decoder, pixels = tokenizer["decoder"], {
            "_target_": "maskgit_decoder", "image_size": 32, "channels": 3, "latent_dim": 256,
            "base_channels": 128, "channel_multipliers": [1, 1, 2, 2, 4], "num_res_blocks": 2,
        }  # fmt: skip
        tokenizer["encoder"]["_target_"] = "reshaped_latent_vit_encoder"
        del decoder["border"]
        decoder |= {"_target_": "proxy_decoder", "num_codes": 1024, "code_dim": 256}
        decoder |= {"pixel_decoder": pixels, "learns": "pixels"}
    tokenizer = build_tokenizer(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in tokenizer.parameters():
            scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
            value.copy_(torch.randn(value.shape, generator=generator) * scale + (value.ndim == 1))
        if "latent_means" in tokenizer.encoder._parameters:
            tokenizer.encoder.latent_means.fill_(means)
        images = pictures(tokenizer)
        codes = tokenizer.quantizer.project_in(tokenizer.encoder(2 * images - 1)).flatten(0, 1)
        table = tokenizer.quantizer.embedding
        chosen = torch.randint(len(codes), (len(table),), generator=generator)
        spread = codes.std() * torch.randn(table.shape, generator=generator)
        table.copy_(codes[chosen] + 0.3 * spread)
    place_export(tokenizer, config, out, {})
    return out


def pictures(tok, count=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, tok.channels, *tok.image_size, generator=generator)
    return images * torch.linspace(0.1, 1, count)[:, None, None, None]


@pytest.mark.parametrize(
    ("layout", "words", "stages", "file"),
    [
        ("llamagen", GRID, 1, "vq.pt"),
        ("llamagen", (*GRID, "data.image_size=[32,48]"), 1, "vq.pt"),
        ("janus", GRID, 1, "model.safetensors"),
        ("diffusers", GRID, 1, "diffusion_pytorch_model.safetensors"),
        ("diffusers", TAMING, 1, "diffusion_pytorch_model.safetensors"),
        pytest.param("titok", TITOK, 1, "model.safetensors", marks=pytest.mark.slow),
        pytest.param(
            *("titok", (*TITOK, "quantizer.metric=cosine"), 2, "model.safetensors"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_written_is_read_back(layout, words, stages, file, tmp_path, capsys):
    run = exported(tmp_path / "run", *words, stages=stages)
    ours, out = vistok.load(run), tmp_path / "theirs"
    assert main(["export", f"run={run}", f"out={out}", f"layout={layout}"]) in (0, None)
    assert f"layout={layout}" in capsys.readouterr().out
    size = None if layout == "titok" else list(ours.image_size)
    found = vistok.load(import_weights(layout, out / file, tmp_path / "back", size))
    assert type(found).__name__.lower() == {"diffusers": "vqgan"}.get(layout, layout)
    images = pictures(ours)
    ids = ours.tokenize(images)
    assert ids.unique().numel() > 8 and torch.equal(found.tokenize(images), ids)
    expected = ours.detokenize(ids)
    assert (found.detokenize(ids) - expected).abs().max() < 1e-4 and expected.std() > 0.01
    with pytest.raises(ConfigError, match="already exists"):
        export_original(run, out, layout)
    export_original(run, out, layout, overwrite=True)


def test_transformers_reads_janus_with_equal_ids_and_pictures(tmp_path):
    transformers = pytest.importorskip("transformers")
    run = exported(tmp_path / "run", *GRID)
    ours, out = vistok.load(run), export_original(run, tmp_path / "theirs", "janus")
    theirs, report = transformers.JanusVQVAE.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    images = pictures(ours)
    ids = ours.tokenize(images)
    assert torch.equal(theirs.encode(2 * images - 1).image_tokens.view(4, -1), ids[..., 0])
    with torch.no_grad():
        expected = theirs.decode(ids[..., 0])
    expected = expected.permute(0, 3, 1, 2) if expected.shape[-1] == 3 else expected
    found = ours.decode(ours.quantizer.decode(ids))
    assert (found - expected).abs().max() < 1e-4 and ids.unique().numel() > 8


@pytest.mark.parametrize("size", [64, [32, 96]])
def test_diffusers_reads_a_vqgan_with_equal_ids_and_pictures(tmp_path, size):
    diffusers = pytest.importorskip("diffusers")
    run = exported(tmp_path / "run", *TAMING, f"data.image_size={size}")
    ours, out = vistok.load(run), export_original(run, tmp_path / "theirs", "diffusers")
    theirs, report = diffusers.VQModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    images = pictures(ours)
    ids = ours.tokenize(images)
    with torch.no_grad():
        latents = theirs.encode(2 * images - 1).latents
        codes = theirs.quantize(latents)[2][2]
        expected = theirs.decode(latents).sample
    assert torch.equal(codes.view(4, -1), ids[..., 0])
    found = ours.decode(ours.quantizer.decode(ids))
    assert (found - expected).abs().max() < 1e-4 and ids.unique().numel() > 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "words", "file"),
    [
        ("llamagen", GRID, "vq.pt"),
        ("janus", GRID, "model.safetensors"),
        ("diffusers", TAMING, "diffusion_pytorch_model.safetensors"),
        ("titok", (*TITOK, "tokenizer.encoder.latent_means=false"), "model.safetensors"),
    ],
)
def test_what_was_trained_here_is_read_back(layout, words, file, tmp_path, photos):
    run, out = tmp_path / "run", tmp_path / "theirs"
    assert train([*words, *COMMON, f"data.train={photos}", f"hydra.run.dir={run}"]) == 0
    ours = vistok.load(export_run(run, tmp_path / "ours"))
    found = import_weights(
        layout, export_original(run, out, layout) / file, tmp_path / "back", *ours.image_size[:1]
    )
    images = pictures(ours, 8)
    ids = ours.tokenize(images)
    assert torch.equal(vistok.load(found).tokenize(images), ids) and ids.unique().numel() > 8
    expected = ours.detokenize(ids)
    assert (vistok.load(found).detokenize(ids) - expected).abs().max() < 1e-4
    assert expected.std() > 0.01
    if layout == "titok":  # and once more, of what has learned from there
        more = [*words[:1], *COMMON, f"data.train={photos}", f"init_from={found}"]
        assert train([*more, f"hydra.run.dir={tmp_path / 'on'}"]) == 0
        export_original(tmp_path / "on", tmp_path / "again", layout)


def test_titok_has_no_means_of_latents(tmp_path):
    run = exported(tmp_path / "run", *TITOK, means=0.1)
    with pytest.raises(ConfigError, match=r"layout=titok: .*encoder\.latent_means=false"):
        export_original(run, tmp_path / "theirs", "titok")


def test_titok_says_its_sizes(tmp_path):
    out = export_original(exported(tmp_path / "run", *TITOK), tmp_path / "theirs", "titok")
    config = json.loads((out / "config.json").read_text())
    model = config["model"]["vq_model"]
    assert model["vit_enc_model_size"] == model["vit_dec_model_size"] == "small"
    assert config["dataset"]["preprocessing"]["crop_size"] == 32 and not model["is_legacy"]
    assert load_file(out / "model.safetensors")["encoder.positional_embedding"].shape == (5, 512)


CONVOLUTIONS = ("experiment=titok_conv_tiny", "data.image_size=16", *SIZES["titok_conv_tiny"])

REFUSED = [
    ("janus", (*GRID, "tokenizer.encoder.stem=2"), "tokenizer.encoder.stem=2"),
    ("llamagen", (*GRID, "tokenizer.encoder.attention=false"), "its encoder has attention between"),
    ("llamagen", (*GRID, "tokenizer.encoder.padding=centered"), "encoder.padding=centered"),
    ("llamagen", (*GRID, "quantizer.metric=euclidean"), "quantizer.metric=euclidean"),
    ("janus", (*GRID, "data.image_size=[32,64]"), "its decoder takes squares alone"),
    ("titok", GRID, "it is of TiTok's parts, and the encoder is a CNNEncoder"),
    ("janus", TITOK, "this layout is of a CNN"),
    ("titok", (*TITOK, "tokenizer.decoder.border=edge"), "tokenizer.decoder.border=edge"),
    ("titok", CONVOLUTIONS, "this one in residual blocks"),
    ("titok", (*TITOK, "tokenizer.encoder.depth=2"), "its blocks are 8 x 512"),
    ("diffusers", (*TAMING, "tokenizer.decoder.num_res_blocks=1"), "found [1] and [1]"),
    ("diffusers", (*TAMING, "tokenizer.encoder.norm_groups=16"), "norm_groups=16"),
    ("titan", GRID, "did you mean 'titok'"),
]


@pytest.mark.parametrize(("layout", "words", "said"), REFUSED)
def test_what_the_original_would_compute_otherwise_is_refused(layout, words, said, tmp_path):
    run = exported(tmp_path / "run", *words)
    with pytest.raises(ConfigError) as caught:
        export_original(run, tmp_path / "theirs", layout)
    assert said in str(caught.value) and f"layout={layout}" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "theirs").exists()
