"""Paper presets: their numbers next to the papers', and a step of each whole recipe, made small."""

import re

import pytest
import torch
import yaml

from helpers import CONFIGS, ROOT, SIZES, TINY, compared, config_of, metrics_of
from test_adversary import TERM
from test_configs import EXPERIMENTS
from test_losses import Fake
from test_networks import layers_of
from test_stages import proxy_run  # noqa: F401
from test_ta_titok import write_captioned
from vistok.core.errors import ConfigError
from vistok.losses.objective import build_objective

PRESETS = [name for name in EXPERIMENTS if not name.endswith("_tiny")]

#: Images a step, steps, warm-up in steps, largest gradient norm, betas, decay, EMA, last factor of the
#: learning rate: as published with the code, in the config of the same size. `None`: not published.
RUNS = {
    "titok_(s128|b64|l32)": (256, 1_000_000, 10_000, 1.0, [0.9, 0.99], 1e-4, 0.999, 0.1),
    "titok_(bl64|bl128|sl256)": (256, 1_000_000, 10_000, 1.0, [0.9, 0.999], 1e-4, 0.999, 0.1),
    "ta_titok_.*": (1024, 650_000, 10_000, 1.0, [0.9, 0.999], 1e-4, 0.999, 0.1),
    "one_d_piece_.*256": (1024, 1_000_000, 10_000, 1.0, [0.9, 0.99], 1e-4, 0.999, 0.1),
    "gigatok_s_s": (128, 1_000_000, 0, 10.0, [0.9, 0.95], 1e-4, None, 0.1),
    "gigatok_s_b": (128, 2_000_000, 0, 10.0, [0.9, 0.95], 1e-4, None, 0.1),
    "gigatok_b_l": (256, 1_000_000, 0, 10.0, [0.9, 0.95], 1e-4, None, 0.1),
    "gigatok_xl_xxl": (256, 1_500_000, 5_000, 10.0, [0.9, 0.95], 1e-4, None, 0.1),
    "retok_s_.": (128, 2_500_000, 0, 10.0, [0.9, 0.95], 1e-4, None, 0.1),
    "restok_l": (256, 1_000_000, 5_000, 10.0, [0.9, 0.95], 1e-4, 0.9999, 0.1),
    # Its losses are half of the published ones, and so is the largest norm.
    "hita_336": (256, 250_000, 4 * 1_281_000 / 256, 0.5, [0.9, 0.95], 0.0, 0.9999, 1.0),
    "(taming|vqgan)_f16|taming_f8|chameleon": (12, None, 0, None, [0.5, 0.9], 0.0, 0.0, 1.0),
    "autoencoder_(f8|f16)": (24, None, 0, None, [0.5, 0.9], 0.0, 0.0, 1.0),
    "llamagen_vq(8|16)|janus": (128, 400_000, 0, 1.0, [0.9, 0.95], 0.0, 0.0, 1.0),
    "maskgit_vqgan": (256, 1_000_000, 0, None, [0.0, 0.99], 0.0, None, 1.0),
    "ibq": (256, 330 * 5004.6, 0, None, [0.5, 0.9], 0.0, 0.999, 1.0),
    "open_magvit2": (256, 270 * 5004.6, 0, None, [0.5, 0.9], 0.0, 0.999, 1.0),
    "maskbit": (256, 1_350_000, 5_000, 1.0, [0.9, 0.999], 1e-4, 0.999, 0.1),
    "rq_vae": (128, 10 * 10_009, 10_009 / 2, None, [0.5, 0.9], 0.0, 0.0, 1.0),
    "vit_vqgan_.*": (256, 500_000, 50_000, 1.0, [0.9, 0.99], 1e-4, None, 0.5),
    "bsq_vit": (256, 1_000_000, 5_000, None, [0.9, 0.99], 1e-4, None, 0.5),
}
RATES = {"bsq_vit": 1.024e-4, "rq_vae": 4e-5, "taming_f16": 12 * 4.5e-6, "vqgan_f16": 12 * 4.5e-6}
RATES |= dict.fromkeys(("autoencoder_f8", "autoencoder_f16"), 24 * 4.5e-6)
RATES |= dict.fromkeys(("taming_f8", "chameleon"), 12 * 4.5e-6)

#: Weights of the terms; squared errors of images in [0, 1] count a quarter of those in [-1, 1].
UNIT = {"mse": 0.25, "lpips": 1.0, "convnext_small.fb_in1k": 0.1}
LPIPS = {"mse": 1.0, "lpips": 1.0}
TERMS = {
    "(titok|ta_titok|one_d_piece)_.*": UNIT,
    "flextok_.*": {"mse": 1.0, "vit_large_patch14_dinov2.lvd142m": 1.0},
    "(gigatok|retok)_.*": {**LPIPS, "vit_base_patch14_dinov2.lvd142m": 0.5},
    "restok_l": {"mse": 0.25, "lpips": 1.0, "vit_large_patch16_dinov3.lvd1689m": 1.0},
    "hita_336": {"mse": 2 / 2, "lpips": 1 / 2},
    "taming_f(8|16)|chameleon|vqgan_f16|autoencoder_(f8|f16)|ibq|open_magvit2": {
        "l1": 1.0,
        "lpips": 1.0,
    },
    "llamagen_vq(8|16)|janus|var|rq_vae|emu3": LPIPS,
    "maskgit_vqgan": {"mse": 0.25, "lpips": 0.1},
    "cosmos_.*": {"l1": 1.0, "lpips": 1.0},
    "vit_vqgan_.*": {"mse": 1.0, "logit_laplace": 0.1, "lpips": 0.1},
    "bsq_vit": {"l1": 1.0, "lpips": 0.1},
    "maskbit": {"mse": 4 / 4, "resnet50.tv_in1k": 0.1, "fading_quantizer_loss": 0.02 * 2},
}

#: Weight, first step, adaptive, norm or stages, game, LeCAM, largest gradient norm of adversaries.
GAN = {
    "titok_.*|one_d_piece_.*": (0.1, 200_000, False, 3, "hinge", (0.001, "batch"), 1.0),
    "ta_titok_.*": (0.1, 200_000, False, 3, "hinge", (0.001, "batch"), 1.0),
    "gigatok_.*": (0.5, 20_000, False, "batch", "hinge", None, 10 / 0.5),
    "retok_.*": (0.5, 0, False, "batch", "hinge", None, 10 / 0.5),
    "restok_l": (0.5, 20_000, False, "batch", "hinge", (0.001, "batch"), 10.0),
    "hita_336": (0.5 / 2, 20_000, False, "batch", "hinge_non_saturating", None, 1 / 0.5),
    "taming_f(8|16)|chameleon|vqgan_f16": (0.8, 250_001, True, "batch", "hinge", None, None),
    "autoencoder_(f8|f16)": (0.5, 50_001, True, "batch", "hinge", None, None),
    "vit_vqgan_.*|bsq_vit|maskgit_vqgan": (0.1, 0, False, None, "non_saturating", None, None),
    "emu3": (0.5, 10_000, False, "batch", "hinge", None, 1 / 0.5),  # after LlamaGen's images
    "llamagen_vq(8|16)|janus|var": (0.5, 20_000, False, "batch", "hinge", None, 1 / 0.5),
    "ibq|open_magvit2": (
        0.1, 0, False, "batch", "hinge_non_saturating_mean", (0.05, "logit"), None),
    "maskbit": (0.02, 20_000, False, 4, "hinge", (0.001, "batch"), 1.0),
    "rq_vae": (0.75, 0, True, "batch", "hinge", None, None),
}  # fmt: skip


#: Whose batch, optimizer and length were not published.
UNPUBLISHED = ("flextok", "var", "cosmos", "emu3")


def of(table, name):
    (found,) = [row for pattern, row in table.items() if re.fullmatch(pattern, name)]
    return found


def one_d(name):
    return name.startswith(("titok", "one_d_piece"))


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith(UNPUBLISHED)])
def test_the_papers_run(name):
    batch, steps, warmup, clip, betas, decay, ema, last = of(RUNS, name)
    config = config_of(f"experiment={name}")
    trainer, optimizer = config["trainer"], config["optimizer"]
    assert trainer["global_batch_size"] == batch and batch % config["data"]["batch_size"] == 0
    assert steps is None or trainer["max_steps"] == pytest.approx(steps, rel=1e-3)
    assert optimizer["warmup_samples"] == pytest.approx(warmup * batch, rel=1e-3)
    assert trainer["gradient_clip_val"] == clip and optimizer["betas"] == betas
    assert optimizer["weight_decay"] == decay and optimizer["final_lr_factor"] == last
    assert ema is None or config["ema"]["decay"] == ema
    assert optimizer["lr"] == pytest.approx(RATES.get(name, 1e-4))


def kind(term):
    """Return the network or teacher that a term compares with, or the term's own name."""
    network, teacher = term.get("network", {}), term.get("teacher", {})
    return (
        network.get("model") or network.get("_target_") or teacher.get("name") or term["_target_"]
    )


@pytest.mark.parametrize("name", PRESETS)
def test_the_papers_terms(name):
    terms = config_of(f"experiment={name}")["loss"]["terms"]
    found = {kind(t): t["weight"] for key, t in terms.items() if key != "adversarial"}
    assert found == pytest.approx(of(TERMS, name))
    assert not any(t["start_samples"] or t["start"] for k, t in terms.items() if k != "adversarial")
    pixels = {"terms": {"reconstruction": terms["reconstruction"]}}
    wrong = compared(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))  # half the range
    unit = found.get("mse") == 0.25
    assert build_objective(pixels, Fake())(wrong)["total"].item() == (0.25 if unit else 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_the_papers_adversary(name):
    config = config_of(f"experiment={name}")
    own = config["loss"]["terms"].get("adversarial")
    if name.startswith(("flextok", "cosmos")):
        assert own is None
        return
    weight, step, adaptive, form, game, lecam, clip = of(GAN, name)
    # TiTok and One-D-Piece in one stage start as TiTok would, after steps of 256 images.
    batch = 256 if one_d(name) else config["trainer"]["global_batch_size"]
    assert own["weight"] == weight and own["start_samples"] == step * batch
    assert own["adaptive"] is adaptive and own["loss"] == game
    assert not (own["start"] or own["ramp"] or own["warmup"])
    shape = own["discriminator"]
    assert form == shape.get("num_stages", shape.get("norm"))
    assert shape.get("num_layers", 3) == (2 if name == "rq_vae" else 3)
    assert own["gradient_clip_val"] == clip
    found = own["lecam"] and (own["lecam"]["weight"], own["lecam"]["per"])
    assert found == lecam
    player, optimizer = own["optimizer"], config["optimizer"]
    assert player["lr"] == optimizer["lr"] and player["weight_decay"] == optimizer["weight_decay"]
    maskbit = "num_stages" in shape
    assert player["betas"] == ([0.9, 0.999] if maskbit else optimizer["betas"])


#: Images a step, steps, start of the discriminator: of the second stages.
STAGES = {"titok": (256, 500_000, 20_000), "one_d_piece": (512, 500_000, 20_000)}


@pytest.mark.parametrize(
    "name", [n for n in PRESETS if re.match("titok_(s128|b64|l32)|one_d_piece", n)]
)
def test_the_papers_stages(name):
    first = config_of(f"experiment={name}", "stage=proxy")
    assert list(first["loss"]["terms"]) == ["codes"] and first["optimizer"]["betas"] == [0.9, 0.99]
    family = "titok" if name.startswith("titok") else "one_d_piece"
    batch, steps, start = STAGES[family]
    second = config_of(f"experiment={name}", f"stage={family}_decoder")
    assert second["stage"]["name"] == "decoder"
    assert second["stage"]["frozen"] == ["encoder", "quantizer"]
    terms = second["loss"]["terms"]
    found = {key: term["weight"] for key, term in terms.items()}
    assert found == {"reconstruction": 0.25, "logits": 0.1, "adversarial": 0.01}
    assert terms["adversarial"]["start_samples"] == start * batch
    assert second["optimizer"]["betas"] == [0.9, 0.999]
    assert second["optimizer"]["warmup_samples"] == 5_000 * batch
    assert second["trainer"]["global_batch_size"] == batch
    assert second["trainer"]["max_steps"] == steps


@pytest.mark.parametrize("name", PRESETS)
def test_headers_name_the_paper_and_say_that_nothing_was_measured(name):
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert "https://arxiv.org/abs/" in text and "Not trained here" in " ".join(text.split("\n# "))


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_says_what_the_preset_has(name):
    config = config_of(f"experiment={name}")
    text = (ROOT / "docs" / "guide" / "recipes.md").read_text()
    rows = [row for row in text.splitlines() if f"`{name}`" in row and "stage=" not in row]
    if name.startswith("one_d_piece"):
        rows = [row for row in text.splitlines() if "the same in one stage" in row]
    cells = " ".join(rows)
    assert str(config["trainer"]["max_steps"]) in cells
    batch = config["trainer"]["global_batch_size"]
    assert (f"| {batch} |" if batch else "| 32 a device |") in cells
    own = config["loss"]["terms"].get("adversarial")
    if own and "`" in cells and "the same |" not in cells and "as TiTok's" not in cells:
        step = own["start_samples"] // batch
        assert re.search(rf"\b{own['weight']} from {step}\b", cells), cells


# ---------------------------------------------------------------------- weights that are not at hand


def test_a_loss_without_its_weights_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError) as error:
        build_objective(config_of("experiment=llamagen_vq16")["loss"], Fake())
    message = str(error.value)
    assert message.startswith("loss.terms.perceptual.network.weights=null: VGG16 is not at hand")
    assert "vgg16-397923af.pth" in message and "loss/perceptual=hed_vgg" in message
    assert "\n" not in message
    terms = config_of("experiment=llamagen_vq16", "loss/perceptual=hed_vgg")["loss"]["terms"]
    assert terms["perceptual"]["network"] == {"_target_": "hed_vgg", "weights": None}
    assert terms["perceptual"]["weight"] == 1.0


def test_a_network_for_a_loss_that_has_none(fails):
    fails("train", "loss=mse", "loss/perceptual=hed_vgg", words=("loss/perceptual", "the loss"))
    fails("train", "loss=mse_lpips", "loss/perceptual=hed", words="did you mean 'hed_vgg'")


# ---------------------------------------------------------------------- a step of each

#: Networks, made small: by the kind of term that takes one, what it is there.
NETWORKS = {"logits": "test_convnext", "alignment": "test_vit", "adversarial": "test_vit"}

#: A short run of small images that leaves a recipe its losses, optimizer and crops.
RECIPE = ("tokenizer.", "quantizer.", "loss=", "data.augment", "optimizer.")
SHORT = [word for word in TINY if not word.startswith(RECIPE)]

CNN = ["tokenizer.encoder.base_channels=32", "tokenizer.encoder.channel_multipliers=[1,2]"]
CNN += ["tokenizer.encoder.num_res_blocks=1", "tokenizer.decoder.num_res_blocks=1"]
BITS = ["tokenizer.latent_dim=6", "quantizer.codebook_size=64"]
CODES = ["quantizer.codebook_size=16"]
SIXTEENS = ("taming_f16", "llamagen_vq16", "llamagen_vq8", "janus", "chameleon", "rq_vae", "emu3")
GRIDS = {
    "open_magvit2": [*CNN, *BITS, "tokenizer.encoder.middle_blocks=1"],
    "maskbit": [*CNN, *BITS],
    "ibq": [*CNN, *CODES, "quantizer.codebook_dim=16", "tokenizer.latent_dim=16"],
    "var": [*CNN, *CODES, "quantizer.scales=[1,2,4,8]"],
    **{f"autoencoder_{f}": [*CNN, "tokenizer.encoder.attention=false"] for f in ("f8", "f16")},
    "taming_f8": [*CNN, *CODES, "tokenizer.latent_dim=64"],
    "maskgit_vqgan": [*CNN, *CODES, "tokenizer.latent_dim=64"],
    "vqgan_f16": [*CNN, *CODES, "tokenizer.latent_dim=64"],
    **{name: [*CNN, *CODES] for name in SIXTEENS},
    **{name: [*CNN, "quantizer.levels=[4,4,4]"] for name in ("cosmos_di8", "cosmos_di16")},
}


@pytest.fixture(scope="session")
def network_words(tmp_path_factory):
    """Words that put files of random weights where a recipe wants published ones."""
    timm = pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    tensors = layers_of("vgg").features.state_dict()
    torch.save({f"features.{k}": v for k, v in tensors.items()}, folder / "vgg.pth")
    for name in set(NETWORKS.values()):
        model = timm.create_model(name, pretrained=False)
        torch.save(model.state_dict(), folder / f"{name}.pth")

    def words(terms):
        found = []
        for key, term in terms.items():
            if term.get("network", {}).get("_target_") == "lpips":
                found.append(f"loss.terms.{key}.network.weights={folder / 'vgg.pth'}")
                continue
            for part, name in (
                ("network", "model"),
                ("teacher", "name"),
                ("discriminator", "name"),
            ):
                if name in term.get(part, {}):
                    here, model = f"loss.terms.{key}.{part}", NETWORKS[key]
                    found += [f"{here}.{name}={model}", f"{here}.weights={folder / model}.pth"]
                    found.append(f"{here}.input_size=160")
        return found

    words.pretrained = f"tokenizer.encoder.pretrained={{_target_:pretrained_tokens,name:test_vit,weights:{folder}/test_vit.pth,input_size:160}}"  # fmt: skip
    return words


def small_adversary(own):
    if own is None:
        return []
    shape = own["discriminator"]
    words = {
        "patch_discriminator": ["base_channels=2", "num_layers=1"],
        "maskbit_discriminator": ["base_channels=4", f"num_stages={shape.get('num_stages')}", "grid=2"],
        "stylegan_discriminator": ["most_channels=4", "minibatch_group=0"],
        "dino_discriminator": ["layers=[-1,5]", "kernel_size=3"],
    }[shape["_target_"]]  # fmt: skip
    return [f"{TERM}.start_samples=0", *(f"{TERM}.discriminator.{word}" for word in words)]


def small_tokenizer(name):
    """Words that make the tokenizer small: of 1D systems, the tiny one's shape."""
    if name in GRIDS:
        return GRIDS[name]
    (tiny,) = [t for t in SIZES if name.startswith(t.removesuffix("_tiny"))]
    if "vit" in name:
        return [f"tokenizer={tiny}", *SIZES[tiny]]
    deep = ["tokenizer.decoder.depth=3"]  # as many blocks as alignments look at
    return [f"tokenizer={tiny}", *SIZES[tiny], *deep, *([] if "flextok" in name else CODES)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_of_the_whole_recipe(cli, photos, tmp_path, network_words, name):
    """Of the recipe only sizes, the start of the adversary and the networks are others."""
    small = small_tokenizer(name)
    terms = config_of(f"experiment={name}")["loss"]["terms"]
    words = [f"experiment={name}", *SHORT, *small, *network_words(terms)]
    words += [*small_adversary(terms.get("adversarial")), "trainer.global_batch_size=null"]
    words += [network_words.pretrained] if name.startswith("hita") else []
    if name.startswith("ta_titok"):
        shards = write_captioned(tmp_path / "captioned")
        words += [f"data.train={shards}", f"data.val={shards}"]
    else:
        words += ["data=folder", f"data.train={photos}", "data.val_fraction=0.3"]
        words += crops(name)
    code, lines, _ = cli("train", *words, "trainer.max_steps=2", "hydra.run.dir=run")
    assert code == 0, lines
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["loss"]["terms"].keys() == terms.keys()
    rows = [row for row in metrics_of(tmp_path / "run") if row["loss/total"]]
    assert len(rows) == 2
    for key in terms:
        assert all(float(row[f"loss/{key}"]) for row in rows), key
    if "adversarial" in terms:
        assert all(float(row["loss/discriminator"]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("family", STAGES)
def test_a_step_of_both_stages(cli, photos, proxy_run, tmp_path, network_words, family):  # noqa: F811
    name = {"titok": "titok_s128", "one_d_piece": "one_d_piece_s256"}[family]
    own = [f"experiment={name}", *SHORT, *small_tokenizer(name), "trainer.global_batch_size=null"]
    own += ["data=folder", f"data.train={photos}", "data.val_fraction=0.3", "trainer.max_steps=2"]
    first = [*own, "stage=proxy", f"stage.proxy={proxy_run}", "hydra.run.dir=first"]
    code, lines, _ = cli("train", *first)
    assert code == 0, lines
    terms = config_of(f"experiment={name}", f"stage={family}_decoder")["loss"]["terms"]
    second = [*own, f"stage={family}_decoder", "stage.weights=first", *network_words(terms)]
    second += [*small_adversary(terms["adversarial"]), "hydra.run.dir=second"]
    code, lines, _ = cli("train", *second)
    assert code == 0, lines
    rows = [row for row in metrics_of(tmp_path / "second") if row["loss/total"]]
    assert len(rows) == 2
    assert all(float(row[f"loss/{key}"]) for row in rows for key in (*terms, "discriminator"))


def crops(name):
    """The crops and flips of a preset, which data=folder would set to its own."""
    data = config_of(f"experiment={name}")["data"]
    return [
        f"data.train_crop={data['train_crop']}",
        f"data.augment={data['augment']}".replace("'", ""),
    ]
