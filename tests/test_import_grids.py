"""Released grid tokenizers: ids and pictures are those of the published architectures."""

import functools
import os
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import vistok
from published_grids import LAYOUTS, SOURCES, Oracle, published
from vistok.cli import import_weights as command
from vistok.core.errors import CheckpointError, ConfigError
from vistok.export.importer import import_weights
from vistok.export.released_files import read_released

ONE = torch.ones(1)


def pictures(*size, count=2, channels=3):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(1))


def imported(source, tensors, path, **more):
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path / "w.safetensors")
    return vistok.load(import_weights(source, path / "w.safetensors", path / "out", **more))


@pytest.mark.parametrize("family", ["kl_f8", "kl_f16"])
def test_latents_and_pictures_of_kl_autoencoders_are_the_published_ones(family, tmp_path, capsys):
    tensors = published(family)
    state = {**tensors, "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": ONE}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    tok = vistok.load(import_weights("auto", tmp_path / "model.ckpt", tmp_path / "out", 32))
    assert "source=auto: kl_autoencoder, for" in capsys.readouterr().out
    oracle = Oracle(family, tensors)
    for size in ((32, 32), (16, 24)):
        images, sized = pictures(*size), tok.at(size)
        means = oracle.latents(images.double())
        found = sized.encoder(2 * images - 1).transpose(1, 2).view_as(means)
        assert (found - means).abs().max() < 1e-4 and means.std() > 0.1
        expected = oracle.pictures(means)
        found = sized.decode(means.float().flatten(2).transpose(1, 2))
        assert (found - expected).abs().max() < 1e-4
        assert expected.std() > 0.1 and (expected[0] - expected[1]).std() > 0.01


@pytest.mark.parametrize("family", [n for n in LAYOUTS if not LAYOUTS[n].moments])
def test_ids_and_pictures_are_the_published_ones(family, tmp_path, capsys):
    tensors, source = published(family), SOURCES.get(family, family)
    side = 64 if family in ("var", "cosmos_di16") else 32
    tok, oracle = imported("auto", tensors, tmp_path, image_size=side), Oracle(family, tensors)
    assert f"source=auto: {source}, for" in capsys.readouterr().out
    assert '"license": "unknown"' not in (tmp_path / "out" / "config.json").read_text()
    for size in ((side, side), LAYOUTS[family].other):
        images, sized = pictures(*size), tok.at(size)
        ids, codes = oracle.codes(images.double())
        assert torch.equal(sized.tokenize(images), ids) and ids.unique().numel() > 8
        found = sized.decode(sized.quantizer.decode(ids, sized.encoder.grid))
        expected = oracle.pictures(codes)
        assert (found - expected).abs().max() < 1e-4
        assert expected.std() > 0.1 and (expected[0] - expected[1]).std() > 0.01


def test_images_of_different_sizes_get_the_ids_that_each_has_alone(tmp_path):
    tok = imported("llamagen", published("llamagen"), tmp_path, image_size=[16, 32])
    sizes = [(16, 32), (64, 96), (16, 32), (32, 16)]
    images = [pictures(*size, count=1)[0] for size in sizes]
    found = tok.tokenize(images)
    assert [len(ids) for ids in found] == [h * w // 16 for h, w in sizes]
    for image, ids in zip(images, found, strict=True):
        assert torch.equal(tok.at(image.shape[1:]).tokenize(image[None])[0], ids)
    assert tok.image_size == (16, 32) and tok.encoder.grid == (4, 8)  # itself unchanged
    with pytest.raises(ConfigError, match="not divisible"):
        tok.at((18, 16))
    # Batches of other sizes train the same weights.
    tok.train()(pictures(32, 16)).predictions["image"].value.square().mean().backward()
    assert all(p.grad is not None for n, p in tok.named_parameters() if "decoder" in n)


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_config_of_the_authors_says_which_scales_var_has(form, tmp_path):
    tensors = published("var") | {"quantize.ema_vocab_hit_SV": torch.zeros(3, 40)}
    text = {"json": '{"vae": {"v_patch_nums": [1, 2, 4]}}', "yaml": "v_patch_nums: [1, 2, 4]\n"}
    said = tmp_path / f"config.{form}"
    said.write_text(text[form])
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, tmp_path / "w.safetensors")
    words = ["source=auto", f"weights={tmp_path / 'w.safetensors'}", f"out={tmp_path / 'out'}"]
    words += [f"config={said}", "image_size=16"]
    assert command(words) == 0
    tok, oracle = vistok.load(tmp_path / "out"), Oracle("var", tensors)
    oracle.served = {1: 0, 2: 2, 4: 3}
    images = pictures(16, 16)
    ids, codes = oracle.codes(images.double())
    assert ids.shape[1] == 21 and torch.equal(tok.tokenize(images), ids)
    found = tok.decode(tok.quantizer.decode(ids, tok.encoder.grid))
    assert (found - oracle.pictures(codes)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^config=.*: cannot be read"),
        ("- 1", r"^config=.*: must be JSON or YAML with keys"),
        ("{a: [", r"^config=.*: cannot be read"),
        ("v_patch_nums: many", r"v_patch_nums=.*; must be sides of grids"),
        ("v_patch_nums: [1, 2]", r"it has 10 scales, not the 2 of"),
    ],
)
def test_a_config_that_does_not_fit_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        imported("var", published("var"), tmp_path, config=tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_chameleon_with_a_decoder(tmp_path):
    """In VQGAN's names, without attention in levels, as its authors' file has it."""
    tensors = published("chameleon")
    tok = imported("chameleon", tensors, tmp_path, image_size=32)
    images, oracle = pictures(24, 40), Oracle("chameleon", tensors)
    ids, codes = oracle.codes(images.double())
    sized = tok.at((24, 40))
    assert type(tok).__name__ == "Chameleon" and torch.equal(sized.tokenize(images), ids)
    found, expected = sized.decode(sized.quantizer.decode(ids)), oracle.pictures(codes)
    assert (found - expected).abs().max() < 1e-4 and expected.std() > 0.1


def test_one_channel(tmp_path):
    tensors = published("vqgan", channels=1)
    tok = imported("vqgan", tensors, tmp_path, image_size=32)
    images = pictures(32, 32, channels=1)
    ids, codes = Oracle("vqgan", tensors).codes(images.double())
    assert tok.channels == 1 and torch.equal(tok.tokenize(images), ids)


def test_taming_s_discriminator_and_colors_are_left(tmp_path):
    tensors = published("vqgan")
    more = {"loss.discriminator.main.0.weight": torch.zeros(2), "colorize": torch.zeros(3)}
    tok = imported("vqgan", {**more, **tensors}, tmp_path, image_size=32)
    (tmp_path / "alone").mkdir()
    alone = imported("vqgan", tensors, tmp_path / "alone", image_size=32)
    images = pictures(32, 32)
    assert torch.equal(tok.tokenize(images), alone.tokenize(images))


def test_of_a_lightning_checkpoint_the_averages_without_dots_are_taken(tmp_path):
    live, averaged = published("ibq", seed=0), published("ibq", seed=1)
    averages = {f"model_ema.{k.replace('.', '')}": v for k, v in averaged.items()}
    # A frozen weight has no average.
    kept = "encoder.conv_in.bias"
    del averages[f"model_ema.{kept.replace('.', '')}"]
    extra = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    loss = {"loss.discriminator.main.0.weight": torch.zeros(1)}
    state = {**live, **averages, **extra, **loss}
    torch.save({"state_dict": state, "global_step": 3, "epoch": 1}, tmp_path / "last.ckpt")
    out = import_weights("ibq", tmp_path / "last.ckpt", tmp_path / "averaged")
    expected = imported("ibq", {**averaged, kept: live[kept]}, tmp_path).state_dict()
    found = vistok.load(out).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_folder_of_hugging_face_and_the_license(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    tensors = {f"model.vqmodel.{k}": v for k, v in published("janus").items()}
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    parts[0]["model.language_model.embed"] = torch.zeros(2)
    index = {}
    for n, part in enumerate(parts):
        save_file({k: v.contiguous() for k, v in part.items()}, folder / f"{n}.safetensors")
        index |= dict.fromkeys(part, f"{n}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": ' + str(index).replace("'", '"') + "}"
    )
    out = import_weights("auto", folder, tmp_path / "out", image_size=32)
    ids, _ = Oracle("janus", published("janus")).codes(pictures(32, 32).double())
    assert torch.equal(vistok.load(out).tokenize(pictures(32, 32)), ids)
    assert '"license": "DeepSeek Model License"' in (out / "config.json").read_text()
    assert "DeepSeek Model License" in (out / "README.md").read_text()


class Scripted(torch.nn.Module):
    """A module with given tensors, which returns what it gets."""

    def __init__(self, tensors):
        super().__init__()
        for name, value in tensors.items():
            *places, end = name.split(".")
            module = self
            for place in places:
                if place not in module._modules:
                    module.add_module(place, torch.nn.Module())
                module = module._modules[place]
            module.register_buffer(end, value)

    def forward(self, x):
        return x + 1


def test_a_script_gives_its_tensors_and_none_of_its_code_runs(tmp_path, monkeypatch):
    tensors = {k: v.bfloat16() for k, v in published("cosmos").items()}
    kept = {"quantizer._levels": torch.tensor([8, 8, 8, 5, 5, 5]), "empty.wavelets": torch.ones(0)}
    script = torch.jit.trace(Scripted({**tensors, **kept}), torch.ones(1))
    path = tmp_path / "autoencoder.jit"
    torch.jit.save(script, path)
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("ran the file's code"))
    found = read_released(path).left
    assert found.keys() == tensors.keys() | kept.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    del kept["empty.wavelets"]
    torch.jit.save(torch.jit.trace(Scripted({**tensors, **kept}), torch.ones(1)), path)
    tok = vistok.load(import_weights("auto", path, tmp_path / "out", image_size=32))
    ids, _ = Oracle("cosmos", tensors).codes(pictures(32, 32).double())
    assert torch.equal(tok.tokenize(pictures(32, 32)), ids)


def test_a_script_that_is_more_than_modules_is_refused(tmp_path):
    path = tmp_path / "evil.jit"

    def fails(content, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("evil/constants.pkl", b"")
            archive.writestr("evil/data.pkl", content)
        with pytest.raises(CheckpointError) as caught:
            import_weights("cosmos", path, tmp_path / "out")
        assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    touch = pickle.dumps(functools.partial(os.mkdir, str(tmp_path / "ran")))
    call = b"cos\nmkdir\n(S'" + str(tmp_path / "ran").encode() + b"'\ntR."
    for code in (touch, call):
        assert "refused; it contains more than tensors" in fails(code)
    assert "or is damaged" in fails(b"not a pickle")
    assert "is compressed" in fails(call, zipfile.ZIP_DEFLATED)
    assert "not a plain state_dict" in fails(pickle.dumps({}))


def test_what_is_not_as_it_says_is_refused_with_the_nearest_family(tmp_path):
    good = published("llamagen")

    def fails(tensors, source="llamagen"):
        with pytest.raises(CheckpointError) as caught:
            imported(source, tensors, tmp_path, image_size=32)
        assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    assert "'stranger' has no place" in fails({**good, "stranger": torch.zeros(1)})
    assert "it looks like source=llamagen" in fails(good, source="vqgan")
    assert "it looks like source=var" in fails(published("var"), source="vqgan")
    strange = {k.replace("mid.2.conv1", "mid.2.conv9"): v for k, v in good.items()}
    said = fails(strange)
    left = [f"'{p}.mid.2.conv9.{k}'" for p in ("decoder", "encoder") for k in ("bias", "weight")]
    missing = [f"'{p}.mid.2.conv1.{k}'" for p in ("encoder", "decoder") for k in ("bias", "weight")]
    assert f"missing {', '.join(missing)}; without a place {', '.join(left)}" in said
    assert "it looks like" not in said  # no other family is nearer
    del strange["encoder.mid.2.norm2.bias"]
    assert "; missing 'encoder.mid.2.conv1.bias', 'encoder.mid.2.norm2.bias'" in fails(
        strange, "auto"
    )
    unmarked = {k: v for k, v in good.items() if not k.startswith("quant_conv")}
    said = fails(unmarked, "auto")
    assert "the nearest is source=" in said and ": missing 'quant_conv.weight'" in said
    assert "'encoder.mid.2.norm2.bias', 'encoder.mid.2.conv1.weight'" in fails(strange)
    renamed = {f"stranger.{k}": v for k, v in good.items()}
    assert "takes all tensors, and none is near" in fails(renamed, source="auto")
    assert "no family is near" in fails(renamed)
    # Of an importer that cannot go on, what it has found so far.
    said = fails(published("ibq"), source="titok")
    assert "missing 'encoder.patch_embed.weight', 'encoder.positional_embedding'" in said
    assert "; not come to 'decoder.conv_in.bias', " in said and "it looks like source=ibq" in said


@pytest.mark.slow
@pytest.mark.parametrize("model", ["janus", "chameleon"])
def test_ids_are_those_of_transformers(model, tmp_path):
    """Janus' class searches by distances of latents and codes as they are; so codes are unit."""
    transformers = pytest.importorskip("transformers")
    sizes = {"base_channels": 32, "channel_multiplier": [1, 1, 2], "num_embeddings": 64}
    if model == "janus":
        config = transformers.JanusVQVAEConfig(
            **sizes, embed_dim=8, latent_channels=16, num_patches=8
        )
        theirs = transformers.models.janus.modeling_janus.JanusVQVAE(config)
    else:
        config = transformers.ChameleonVQVAEConfig(**sizes, embed_dim=16, latent_channels=16)
        theirs = transformers.ChameleonVQVAE(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(spread * scale + (parameter.ndim == 1))
        table = theirs.quantize.embedding.weight
        table.copy_(F.normalize(torch.randn(table.shape, generator=generator), dim=1))
    tok = imported(model, theirs.state_dict(), tmp_path, image_size=32)
    for size in ((48, 64), (32, 32)):
        images = pictures(*size)
        ids = theirs.encode(2 * images - 1).image_tokens.view(2, -1)
        assert ids.unique().numel() > 4
        assert torch.equal(tok.at(size).tokenize(images)[..., 0], ids)
    if model == "chameleon":
        with pytest.raises(ConfigError, match="have no decoder"):
            tok.detokenize(ids[..., None])
        return
    with torch.no_grad():
        expected = theirs.decode(ids)
    expected = expected.permute(0, 3, 1, 2) if expected.shape[-1] == 3 else expected
    found = tok.decode(tok.quantizer.decode(ids[..., None]))
    assert torch.allclose(found, expected, atol=1e-4)
