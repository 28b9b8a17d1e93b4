"""Latents of a frozen autoencoder, and FlexTok in them: what is encoded, learned, kept, exported."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import vistok
from helpers import SIZES, TINY, aligned, awake, config_of, images_of, needs_lite0, tiny_tokenizer
from vistok.checkpoints.read import read_checkpoint
from vistok.cli import evaluate, export, train
from vistok.core.errors import ConfigError
from vistok.models.latent_space import LatentSpace
from vistok.quantizers.fsq import FSQ
from vistok.tasks.reconstruction import Reconstruction

COMMON = ["trainer.max_steps=5", "trainer.val_check_interval=2"]
BRIDGE = ["quantizer=token_bridge_post", "quantizer.codebook_dim=5", "quantizer.codebook_size=8"]


def words_of(photos, *dropped):
    words = [w for w in TINY if not w.startswith(("quantizer.", *dropped)) and w not in SIZES["titok_tiny"]]  # fmt: skip
    return [*words, "data=folder", f"data.train={photos}", "data.val_fraction=0.2", "data.image_size=16", *COMMON]  # fmt: skip


@pytest.fixture(scope="module")
def autoencoder_run(tmp_path_factory, photos):
    """A continuous 2D tokenizer of 4 x 4 cells of 4 pixels, with 5 channels."""
    run = tmp_path_factory.mktemp("autoencoder") / "run"
    words = [*words_of(photos), *SIZES["vqgan_tiny"], *BRIDGE]
    words += ["tokenizer.encoder.channel_multipliers=[2]"]
    assert train(["experiment=vqgan_tiny", *words, f"hydra.run.dir={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def latent_words(photos, autoencoder_run):
    words = [*words_of(photos), *SIZES["flextok_tiny"], "experiment=flextok_tiny"]
    return [*words, "stage=latents", f"stage.autoencoder={autoencoder_run}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, latent_words):
    folder = tmp_path_factory.mktemp("latent") / "run"
    assert train([*latent_words, f"hydra.run.dir={folder}"]) == 0
    return folder


def space_of(tokenizer):
    return LatentSpace(tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder)


# ---------------------------------------------------------------------- the space


def test_without_rounding_the_autoencoder_is_the_tokenizer(autoencoder_run):
    tok = vistok.load(autoencoder_run)
    space = space_of(tok)
    x = tok.to_model_range(images_of(6))
    with torch.no_grad():
        codes = tok.quantizer.project_in(tok.encoder(x))
        expected = tok.decoder.reconstruct(tok.quantizer.project_out(codes))
        space.calibrate(x)
        maps = space.encode(x)
        assert torch.allclose(space.decode(maps), expected, atol=1e-5)
    assert maps.shape == (6, 5, 4, 4)
    # Cell (2, 3) of the map is token 11, in units of its channel's deviation over the images.
    mean, std = codes.flatten(0, 1).mean(0), codes.flatten(0, 1).std(0, correction=0)
    assert torch.allclose(maps[:, :, 2, 3], (codes[:, 11] - mean) / std, atol=1e-4)
    flat = maps.transpose(0, 1).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(5), atol=1e-4)
    assert torch.allclose(flat.std(1, correction=0), torch.ones(5), atol=1e-4)


def test_it_computes_in_float32_under_autocast(autoencoder_run):
    space = space_of(vistok.load(autoencoder_run))
    x = images_of(2).float() / 127.5 - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = space.encode(x)
        pictures = space.decode(maps)
    assert maps.dtype == pictures.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(space.encode(x), maps) and torch.equal(space.decode(maps), pictures)


def test_codes_of_unit_length_stay_so():
    tok = tiny_tokenizer("quantizer=vq", "quantizer.codebook_size=16", tokenizer="vqgan_tiny")
    space = space_of(tok)
    x = tok.to_model_range(images_of(3))
    with torch.no_grad():
        space.calibrate(x)
        codes = F.normalize(tok.quantizer.project_in(tok.encoder(x)), dim=-1)
        maps = space.encode(x)
        back = maps.flatten(2).transpose(1, 2) * space.std + space.mean
        assert torch.allclose(back, codes, atol=1e-5)
        longer = space.decode((3 * back - space.mean).div(space.std).transpose(1, 2).unflatten(2, space.grid))  # fmt: skip
        assert torch.allclose(longer, space.decode(maps), atol=1e-4)


def test_what_is_no_autoencoder_is_refused():
    tok = tiny_tokenizer(tokenizer="vqgan_tiny")
    with pytest.raises(ConfigError, match=r"FSQ.*token_bridge_post"):
        LatentSpace(tok.encoder, FSQ(16, [8, 5, 5]), tok.decoder)
    with pytest.raises(ConfigError, match="must be a 2D tokenizer"):
        space_of(tiny_tokenizer("tokenizer.encoder.num_latent_tokens=3"))


# ---------------------------------------------------------------------- FlexTok in it


def test_patches_stay_as_large_in_pixels(run):
    config = yaml.safe_load((run / "config.yaml").read_text())["tokenizer"]
    for part in ("encoder", "decoder"):
        assert config[part]["image_size"] == [4, 4] and config[part]["channels"] == 5
        assert config[part]["patch_size"] == 2  # 8 pixels
    assert config["decoder"]["predicts"] == "velocity"
    assert config["image_size"] == 16 and config["channels"] == 3


def test_encoder_reads_and_flow_learns_the_latents(run, autoencoder_run):
    tok = vistok.load(run).train()
    x = tok.to_model_range(images_of(6))
    read = []
    tok.encoder.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0]))
    torch.manual_seed(5)
    output = tok(x)
    source = vistok.load(autoencoder_run)
    with torch.no_grad():
        codes = source.quantizer.project_in(source.encoder(x))
    mean, std = tok.autoencoder.mean, tok.autoencoder.std
    maps = ((codes - mean) / std).transpose(1, 2).unflatten(2, (4, 4))
    assert torch.allclose(read[0], maps, atol=1e-4)
    assert (
        output.predictions["image"].target.shape
        == output.predictions["image"].value.shape
        == (6, 5, 4, 4)
    )
    # The target is noise less latents: adding the latents leaves noise alone, of deviation 1.
    noise = output.predictions["image"].target + maps
    assert abs(noise.std().item() - 1) < 0.15 and abs(torch.corrcoef(torch.stack([noise.flatten(), maps.flatten()]))[0, 1].item()) < 0.15  # fmt: skip


def test_latents_are_scaled_by_what_the_training_images_have(run, photos):
    tok = vistok.load(run)
    assert tok.autoencoder.std.min() > 0 and not torch.allclose(tok.autoencoder.std, torch.ones(5))
    from PIL import Image
    from torchvision.transforms.functional import center_crop, pil_to_tensor

    files = sorted(Path(photos).glob("*.png"))
    images = torch.stack([center_crop(pil_to_tensor(Image.open(f)), [16, 16]) for f in files])
    flat = tok.to_signal(tok.to_model_range(images)).transpose(0, 1).flatten(1)
    assert flat.mean(1).abs().max() < 0.5 and (flat.std(1) - 1).abs().max() < 0.5


def test_the_autoencoder_stays_as_it_is_and_outside_the_ema(run, autoencoder_run):
    expected = space_of(vistok.load(autoencoder_run)).state_dict()
    for weights in ("ema", "last"):
        state = vistok.load(run, weights=weights).autoencoder.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[k], expected[k]) for k in state if k not in ("mean", "std"))
    module = Reconstruction(yaml.safe_load((run / "config.yaml").read_text()))
    assert not any("autoencoder" in name for name in module.ema.shadow)
    trained = {id(p) for g in module.configure_optimizers().param_groups for p in g["params"]}
    assert not any(id(p) in trained for p in module.tokenizer.autoencoder.parameters())
    for tok in (module.tokenizer.train(), vistok.load(run).train()):  # without a stage too
        assert not any(m.training for m in tok.autoencoder.modules())
        assert not any(p.requires_grad for p in tok.autoencoder.parameters())
    x = module.tokenizer.to_model_range(images_of(4))
    output = module.tokenizer(x)
    (
        output.predictions["image"].value - output.predictions["image"].target
    ).square().mean().backward()
    reached = {n for n, p in module.tokenizer.named_parameters() if p.grad is not None}
    assert not any(n.startswith("autoencoder") for n in reached)
    assert any(n.startswith("encoder.") for n in reached)


def test_pictures_come_from_its_decoder(run):
    tok = vistok.load(run)
    ids = tok.tokenize(images_of(3))
    with torch.no_grad():
        maps = tok.decode(tok.quantizer.decode(ids), steps=3, seed=1)
        pictures = (tok.autoencoder.decode(maps) + 1) / 2
    assert maps.shape == (3, 5, 4, 4)
    assert torch.allclose(tok.detokenize(ids, steps=3, seed=1), pictures.clamp(0, 1), atol=1e-6)
    assert tok.detokenize_progressive(ids, [1, 4]).shape == (3, 2, 3, 16, 16)


@needs_lite0
def test_alignment_looks_at_images_and_teaches_the_flow(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    alignment = config_of(*TINY, "alignment=plain")["loss"]["terms"]["alignment"]
    config["loss"]["terms"]["alignment"] = {**alignment, "tap": "decoder.block.0"}
    module = Reconstruction(config).train()
    awake(module.tokenizer.decoder)
    images = module.tokenizer.to_model_range(images_of(4))
    aligned(module, images).backward()  # the teacher takes three channels, not five
    reached = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("objective.terms.alignment.projector", "tokenizer.encoder.transformer", "tokenizer.decoder.blocks.0"):  # fmt: skip
        assert any(n.startswith(part) for n in reached), part
    assert not any(n.startswith("tokenizer.autoencoder") for n in reached)


def test_without_its_source_it_resumes_evaluates_and_exports(
    latent_words, autoencoder_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(autoencoder_run, "source")
    words = [w for w in latent_words if not w.startswith("stage.autoencoder")]
    assert train([*words, "stage.autoencoder=source", "hydra.run.dir=run"]) == 0
    kept = vistok.load("run", weights="last").autoencoder.state_dict()
    shutil.rmtree("source")
    assert train(["resume=run", "trainer.max_steps=8"]) == 0
    assert evaluate(["run=run", "out=e", "eval.num_tokens=[1,4]"]) == 0
    assert export(["run=run", "out=x"]) == 0
    content = read_checkpoint(Path("run/checkpoints/last.ckpt"))
    trained = [k for k in content["state_dict"] if not k.startswith("tokenizer.autoencoder")]
    assert 0 < len(content["optimizer_states"][0]["state"]) <= len(trained)
    tok, back = vistok.load("run"), vistok.load("x")
    shutil.rmtree("run")
    images = images_of(4)
    ids = tok.tokenize(images)
    assert torch.equal(back.tokenize(images), ids)
    assert torch.equal(back.detokenize(ids), tok.detokenize(ids))
    assert all(torch.equal(v, kept[k]) for k, v in back.autoencoder.state_dict().items())


def test_what_does_not_fit_is_told(fails, photos, latent_words, autoencoder_run, finished_run):
    words = [w for w in latent_words if not w.startswith("stage.autoencoder")]
    fails("train", *words, words=("stage.autoencoder: is missing", "2D tokenizer"))
    fails("train", *words, f"stage.autoencoder={finished_run}", words="must be a 2D tokenizer")
    fails("train", *words, f"stage.autoencoder={autoencoder_run}", "tokenizer.encoder.patch_size=2", "tokenizer.decoder.patch_size=2", words=("patch_size=2", "multiple of 4 pixels"))  # fmt: skip
    fails("train", *words, f"stage.autoencoder={autoencoder_run}", "data.image_size=32", words="data.image_size")  # fmt: skip
    titok = [*words_of(photos), *SIZES["titok_tiny"], "stage=latents"]
    fails("train", *titok, f"stage.autoencoder={autoencoder_run}", words="needs a flextok")


def test_latents_are_measured_alike_from_bytes_and_from_floats(autoencoder_run, latent_words):
    from vistok.tasks.stages import resolve_stage

    tok = Reconstruction(resolve_stage(config_of(*latent_words))).tokenizer
    images, told = images_of(24), []
    tok.initialize(images, told.append)
    found = [tok.autoencoder.mean.clone(), tok.autoencoder.std.clone()]
    assert told[0] == "latents, from 24 images" and len(told) == 4
    tok.initialize(tok.to_model_range(images))
    assert torch.equal(found[0], tok.autoencoder.mean)
    assert torch.equal(found[1], tok.autoencoder.std)
    maps = tok.to_signal(tok.to_model_range(images)).transpose(0, 1).flatten(1)
    assert torch.allclose(maps.mean(1), torch.zeros(len(maps)), atol=1e-4)
    assert torch.allclose(maps.std(1, correction=0), torch.ones(len(maps)), atol=1e-3)


def test_a_random_start_measures_the_latents_and_nothing_else(autoencoder_run, latent_words):
    from vistok.tasks.stages import resolve_stage

    class Data:
        def init_batches(self, count):
            return images_of(24)

    task = Reconstruction(resolve_stage(config_of(*latent_words, "init=random")))
    before = {name: value.clone() for name, value in task.tokenizer.state_dict().items()}
    task.start_weights(Data(), torch.device("cpu"))
    after = task.tokenizer.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"autoencoder.mean", "autoencoder.std"}


@pytest.mark.slow
def test_it_learns_latents(autoencoder_run, latent_words):
    from vistok.tasks.stages import resolve_stage

    torch.manual_seed(0)
    wide = ["tokenizer.encoder.width=32", "tokenizer.decoder.width=32", "tokenizer.decoder.depth=2"]
    module = Reconstruction(resolve_stage(config_of(*latent_words, *wide)))
    tok = module.tokenizer
    x = tok.to_model_range(images_of(24))
    tok.initialize(x)
    tok.train()
    optimizer = torch.optim.AdamW([p for p in tok.parameters() if p.requires_grad], 3e-3)
    for _ in range(300):
        output = tok(x)
        optimizer.zero_grad()
        (
            output.predictions["image"].value - output.predictions["image"].target
        ).square().mean().backward()
        optimizer.step()
    tok.eval()
    errors = []
    with torch.no_grad():
        maps = tok.to_signal(x).repeat(4, 1, 1, 1)
        quantized = tok.quantizer(tok.encode(maps)).quantized
        for tokens in (quantized, quantized.roll(1, 0)):  # its own, and another image's
            torch.manual_seed(3)
            said = tok.decoder(tokens, maps)["image"]
            prediction, target = said.value, said.target
            errors.append((prediction - target).square().mean().item())
    assert errors[0] < 1.8 and errors[0] < 0.9 * errors[1]  # a guess of zero has an error of 2
