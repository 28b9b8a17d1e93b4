"""Every config composes, builds and trains; every mistyped key is refused."""

import copy
import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import vistok
from helpers import CONFIGS, SIZES, TINY, TOKENIZERS, config_of, images_of
from vistok.core.configuration import all_keys, compose, header
from vistok.core.errors import ConfigError
from vistok.core.registry import build, resolve
from vistok.export.exporter import write_export
from vistok.losses.objective import build_objective
from vistok.models.build import build_tokenizer
from vistok.models.term import Step
from vistok.priors.build import build_prior
from vistok.priors.layout import Layout
from vistok.training.optimizers import build_optimizer


def names(group, pattern="*"):
    return sorted(path.stem for path in (CONFIGS / group).glob(f"{pattern}.yaml"))


#: Experiments that train priors, on tokens, and those that train tokenizers.
PRIORS = [
    name
    for name in names("experiment", "[!_]*")
    if "- _prior\n" in (CONFIGS / "experiment" / f"{name}.yaml").read_text()
]
EXPERIMENTS = [name for name in names("experiment", "[!_]*") if name not in PRIORS]
QUANTIZERS = names("quantizer")

#: Millions of parameters, where a paper or its code says them. TiTok: 12 width^2 a block, in encoder
#: and decoder; VQGAN: the paper's.
PARAMETERS = {
    "titok_s128": (50, 56),
    "titok_b64": (170, 180),
    "titok_bl64": (387, 400),
    "titok_bl128": (387, 400),
    "titok_sl256": (325, 340),
    "titok_l32": (604, 620),
    "vqgan_f16": (60, 90),
    # TiTok-BL and 0.9 M for the text.
    "ta_titok_bl32": (387, 400),
    "ta_titok_bl64": (387, 400),
    "ta_titok_bl128": (387, 400),
    # As TiTok of the same letter: 192 more positions and latent tokens are 0.3 to 0.6 M.
    "one_d_piece_s256": (50, 56),
    "one_d_piece_b256": (170, 180),
    "one_d_piece_l256": (604, 620),
    # Published: about 0.3, 0.9 and 2.5 B with an autoencoder of 84 M, which is not here.
    "flextok_d12_d12": (250, 265),
    "flextok_d18_d18": (855, 875),
    "flextok_d18_d28": (2430, 2470),
    # Without the alignment's projection; with it, see test_gigatok.py.
    "gigatok_s_s": (125, 132),
    "gigatok_s_b": (212, 220),
    "gigatok_b_l": (590, 600),
    "gigatok_xl_xxl": (2800, 2900),
    # As GigaTok of the same letters, and 224 more positions in encoder and decoder.
    "retok_s_s": (125, 132),
    "retok_s_b": (212, 220),
    "restok_l": (655, 668),
    # Of LlamaGen's CNN and nine blocks; the paper names no number.
    "hita_336": (80, 120),
}
#: Grids: what the released class has, or that of the code that it is built with.
PUBLISHED = {
    "taming_f16": 72.142,
    "taming_f8": 68.996,
    "llamagen_vq16": 71.883,
    "llamagen_vq8": 70.110,
    "janus": 71.883,
    "chameleon": 68.718,  # taming's, without attention in its levels
    "var": 108.948,
    "ibq": 110.982,
    "open_magvit2": 115.128,
    "maskbit": 54.489,
    "rq_vae": 100.207,
    "emu3": 270.740,
    "cosmos_di8": 79.004,
    "cosmos_di16": 83.724,
    "maskgit_vqgan": 54.516,
    "autoencoder_f8": 83.654,
    "autoencoder_f16": 69.611,
    "vit_vqgan_small": 54.641,
    "vit_vqgan_base": 175.690,
    "vit_vqgan_small_large": 662.274,
    "bsq_vit": 174.816,
}
TOKENS = {
    "titok_s128": 128,
    "titok_b64": 64,
    "titok_bl64": 64,
    "titok_bl128": 128,
    "titok_sl256": 256,
    "titok_l32": 32,
    "vqgan_f16": 256,
    "taming_f16": 256,
    "taming_f8": 1024,
    "llamagen_vq16": 256,
    "llamagen_vq8": 1024,
    "maskgit_vqgan": 256,
    "autoencoder_f8": 1024,
    "autoencoder_f16": 256,
    "cosmos_di8": 1024,
    "cosmos_di16": 256,
    "ta_titok_bl32": 32,
    "ta_titok_bl64": 64,
    "ta_titok_bl128": 128,
    "one_d_piece_s256": 256,
    "one_d_piece_b256": 256,
    "one_d_piece_l256": 256,
    "flextok_d12_d12": 256,
    "flextok_d18_d18": 256,
    "flextok_d18_d28": 256,
    "gigatok_s_s": 256,
    "gigatok_s_b": 256,
    "gigatok_b_l": 256,
    "gigatok_xl_xxl": 256,
    "retok_s_s": 256,
    "retok_s_b": 256,
    "restok_l": 128,
}

#: Pairs that make no sense, and the one line says so: ids of scales have no tokens to part.
SCALES = ("image_folder", "token_flow_multi_scale", "var", "var_1024", "var_as_drawn")
REFUSED = {
    (tokenizer, quantizer) for tokenizer in ("retok_tiny", "hita_tiny") for quantizer in SCALES
}


def without_networks(terms):
    """The terms that need no weights of others; test_recipes.py has them all."""
    parts = {name: (t.get("network"), t.get("teacher"), t.get("discriminator", {}).get("name"))
             for name, t in terms.items()}  # fmt: skip
    return {name: None if any(parts[name]) else t for name, t in terms.items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_builds_on_the_meta_device(name):
    alone = ["tokenizer.encoder.pretrained=null"] if name == "hita_336" else []
    config = config_of(f"experiment={name}", *alone)
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
        build_objective({"terms": without_networks(config["loss"]["terms"])}, tokenizer)
    assert {p.device.type for p in tokenizer.parameters()} == {"meta"}
    low, high = PARAMETERS.get(name, (0.5, 6) if name.endswith("_tiny") else (1, 1e6))
    found = sum(p.numel() for p in tokenizer.parameters()) / 1e6
    assert low < found < high
    assert found == pytest.approx(PUBLISHED.get(name, found), rel=0.01)
    if name in TOKENS:
        assert tokenizer.num_tokens == TOKENS[name] and tokenizer.image_size == (256, 256)
    assert config["name"] == name


@pytest.mark.parametrize("name", PRIORS)
def test_prior_experiment_builds_on_the_meta_device(name):
    config = config_of(f"experiment={name}")
    layout = Layout((16384,), 256, (16, 16), num_classes=1000).as_config()
    with torch.device("meta"):
        prior = build_prior({**config, "layout": layout})
    millions = {"ar_gpt_b": 111, "ar_gpt_l": 343, "ar_gpt_xl": 775, "ar_gpt_xxl": 1411}.get(name)
    found = sum(p.numel() for p in prior.parameters()) / 1e6
    assert found == pytest.approx(millions, rel=0.01) if millions else found < 12
    assert config["name"] == name and config["task"] == "prior"
    assert not {"tokenizer", "quantizer", "loss"} & set(config)


@pytest.mark.parametrize("name", names("prior"))
def test_prior_configs_write_out_every_argument(name):
    part = config_of("experiment=ar_gpt_tiny", f"prior={name}")["prior"]
    known = {*inspect.signature(resolve(part["_target_"])).parameters} - {"layout"}
    assert known == set(part) - {"_target_"}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_says_what_it_is(path):
    assert len(header(path)) > 10, path
    assert (yaml.safe_load(path.read_text()) is None) == (path.stem == "none")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_no_sample_counts_and_no_absolute_paths(path):
    def walk(node):
        if isinstance(node, dict):
            for key, value in node.items():
                counts = ("num_samples", "num_train", "epoch_size")
                drawn = path.stem == "eval" and key == "num_samples"  # of a prior, not of a set
                assert drawn or not any(count in str(key) for count in counts), key
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)
        else:
            assert not str(node).startswith("/") or path.stem in ("train",), node

    content = yaml.safe_load(path.read_text()) or {}
    content.pop("defaults", None)
    walk(content)


def leaves(config):
    return [key for key in all_keys(config) if not key.startswith("hydra")]


@pytest.mark.parametrize("name", ["train", "eval", "export"])
def test_every_mistyped_key_is_refused(name):
    """One letter too many in any key; the answer names the right one."""
    config = compose(name, [])
    keys = leaves(config)
    assert len(keys) > (60 if name == "train" else 4)
    # Composing each alone would take minutes: the struct flag is what refuses them all.
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    for key in keys:
        with pytest.raises((ConfigAttributeError, ConfigKeyError)):
            OmegaConf.update(config, f"{key}x", 1)
    for key in keys[:: max(1, len(keys) // 6)]:
        if "." in key or name != "train":
            with pytest.raises(ConfigError, match=f"{key}x: no such key.*did you mean"):
                compose(name, [f"{key}x=1"])


@pytest.mark.slow
def test_quantizer_configs_write_out_every_argument():
    """What is not in the YAML could not be overridden without a plus sign."""
    for group, wanted in (("quantizer", QUANTIZERS), ("tokenizer", names("tokenizer"))):
        for name in wanted:
            config = config_of("~experiment", f"{group}={name}")[group]
            parts = (
                [v for v in config.values() if isinstance(v, dict)] if group == "tokenizer" else []
            )
            for part in [config, *parts]:
                parameters = inspect.signature(resolve(part["_target_"])).parameters.values()
                known = {p.name for p in parameters if p.kind != p.VAR_KEYWORD}
                given = (
                    {"encoder", "decoder", "quantizer", "latent_dim"}
                    if group == "tokenizer"
                    else set()
                )
                assert known - set(part) <= given, f"{group}={name}: {known - set(part)}"


# ---------------------------------------------------------------------- tokenizer x quantizer


def scale_down(node, dim):
    """Small codebooks for latents of width `dim`, also of inner quantizers."""
    for key, value in node.items():
        if isinstance(value, dict):
            scale_down(value, dim)
        elif key == "codebook_size":
            node[key] = min(value, 64)
        elif key == "delta":
            node[key] = min(value, 16)
        elif key == "dim":
            node[key] = dim
    return node


@cache
def tokenizer_config(name):
    base = [o for o in TINY if not o.startswith(("tokenizer.", "quantizer."))]
    return config_of(f"tokenizer={name}", *base, *SIZES[name])


@cache
def quantizer_config(name, dim=16):
    return scale_down(config_of("~experiment", f"quantizer={name}")["quantizer"], dim)


def family(quantizer):
    """The class of a quantizer's config, by its registered name."""
    node = yaml.safe_load((CONFIGS / "quantizer" / f"{quantizer}.yaml").read_text())
    return node["_target_"] if "_target_" in node else family(node["defaults"][0])


def pairs():
    """All pairs, of which a third cover the rest: each quantizer with three tokenizers.

    Quantizers of one kind stand together, so that each tokenizer meets all kinds.
    """
    kinds = sorted(QUANTIZERS, key=lambda name: (name not in SCALES, family(name), name))
    for row, tokenizer in enumerate(TOKENIZERS):
        for column, quantizer in enumerate(kinds):
            chosen = (row + column) % 3 == 0 or (tokenizer, quantizer) in REFUSED
            yield tokenizer, quantizer, chosen


@pytest.mark.parametrize(
    ("tokenizer", "quantizer"),
    [pytest.param(t, q, marks=() if full else pytest.mark.nightly) for t, q, full in pairs()],
)
def test_every_pair_trains_saves_and_loads(tokenizer, quantizer, tmp_path):
    config = tokenizer_config(tokenizer)
    latents = quantizer_config(quantizer, config["tokenizer"]["latent_dim"])
    config = {**config, "quantizer": copy.deepcopy(latents)}
    torch.manual_seed(0)
    if (tokenizer, quantizer) in REFUSED:
        with pytest.raises(ConfigError, match=r"^quantizer: .* stand for scales") as error:
            build_tokenizer(config)
        assert "\n" not in str(error.value)
        return
    tok = build_tokenizer(config)
    objective = build_objective(config["loss"], tok)
    images = tok.to_model_range(images_of(20))
    tok.initialize(images)
    tok.train()
    optimizer = build_optimizer(tok, 1e-3, (0.9, 0.99), 0.01)
    for _ in range(2):
        losses = objective(Step(images[:2], tok(images[:2]), tok))
        optimizer.zero_grad()
        losses["total"].backward()
        gradients = {n: p.grad for n, p in tok.named_parameters() if p.grad is not None}
        assert all(torch.isfinite(g).all() for g in gradients.values())
        optimizer.step()
        tok.quantizer.after_step([optimizer])
    for part in ("encoder", "decoder"):
        reached = [n for n, g in gradients.items() if n.startswith(part) and g.abs().max() > 0]
        assert len(reached) > 5, f"no gradient reaches the {part}"

    tok.eval()
    fresh = images_of(30)[20:22]
    ids = tok.tokenize(fresh)
    count = tok.num_tokens
    assert ids.shape == (2, count, len(tok.quantizer.codebook_sizes))
    with torch.no_grad():
        output = tok(tok.to_model_range(fresh))
    assert torch.equal(output.quantizer.indices, ids)
    write_export(tok, config, tmp_path / "out", {})
    back = vistok.load(tmp_path / "out")
    assert torch.equal(back.tokenize(fresh), ids)
    assert torch.equal(back.detokenize(ids), tok.detokenize(ids))
    assert torch.isfinite(tok.detokenize(ids)).all()
    assert [t.shape[0] for t in back.codebooks()] == list(tok.quantizer.codebook_sizes)


def test_the_size_of_a_code_counts_the_ids_of_all_scales():
    config = {**tokenizer_config("titok_tiny"), "quantizer": quantizer_config("var")}
    tok = build_tokenizer(config).eval()
    ids = tok.tokenize(images_of(2))
    assert ids.shape[1] > tok.encoder.num_tokens
    assert tok.bits_per_image == ids.shape[1] * tok.quantizer.bits_per_token
    assert tok.num_tokens == ids.shape[1]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_quantizer_of_an_experiment_can_be_exchanged(experiment):
    """An experiment sets no keys of its quantizer that another one does not have."""
    others = (("fsq", "FSQ"), ("lfq", "LFQ"), ("vq", "VectorQuantizer"))
    for name, kind in others if experiment.endswith("_tiny") else others[:1]:
        config = config_of(f"experiment={experiment}", f"quantizer={name}")
        with torch.device("meta"):
            quantizer = build(config["quantizer"] | {"dim": 64})
        assert type(quantizer).__name__ == kind


def test_the_loss_of_an_experiment_can_be_exchanged():
    """No experiment sets options of a term that only the loss it has chosen defines."""
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        terms = ((yaml.safe_load(path.read_text()) or {}).get("loss") or {}).get("terms") or {}
        assert all("_target_" in options for options in terms.values()), path.name


def test_pairs_cover_all_that_ships():
    assert len(TOKENIZERS) >= 9 and len(QUANTIZERS) >= 10
    assert {name for name, _ in REFUSED} <= set(TOKENIZERS) and set(SCALES) <= set(QUANTIZERS)
    assert {*PARAMETERS, *PUBLISHED, *TOKENS} <= set(EXPERIMENTS)


def test_a_third_of_the_pairs_covers_every_kind():
    chosen = [(t, q) for t, q, full in pairs() if full]
    assert len(chosen) < 0.4 * len(TOKENIZERS) * len(QUANTIZERS)
    for quantizer in QUANTIZERS:
        assert sum(q == quantizer for _, q in chosen) >= len(TOKENIZERS) // 3
    for tokenizer in TOKENIZERS:
        met = {q for t, q in chosen if t == tokenizer}
        assert met & set(SCALES)
        assert len({family(q) for q in met}) > len({family(q) for q in QUANTIZERS}) / 3


# ---------------------------------------------------------------------- whole sizes


def test_debug_step_goes_on_top(cli, photos):
    words = ["+debug=step", "data=folder", f"data.train={photos}", "data.image_size=16"]
    words += [
        "data.val_fraction=0.2",
        *SIZES["titok_tiny"],
        "trainer.max_steps=2",
        "hydra.run.dir=run",
    ]
    words += ["trainer.accelerator=cpu", "trainer.precision=32", "data.augment=[hflip]"]
    code, lines, _ = cli("train", *words)
    assert code == 0, lines
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["data"]["batch_size"] == 2 and config["debug"] is True


@pytest.mark.nightly
def test_titok_s128_takes_a_step_at_paper_size(cli, tmp_path):
    from helpers import make_photos

    photos = make_photos(tmp_path / "photos", 4, height=256, width=300)
    words = ["experiment=titok_s128", "data=folder", f"data.train={photos}", f"data.val={photos}"]
    words += ["data.batch_size=1", "data.num_workers=0", "trainer.max_steps=1", "init_images=2"]
    words += ["trainer.limit_val_batches=1", "data.eval_batch_size=1", "callbacks.num_pictures=1"]
    words += ["loss.terms.perceptual=null", "loss.terms.logits=null"]
    words += ["loss.terms.adversarial.discriminator.base_channels=32"]
    words += [
        "trainer.global_batch_size=null",
        "trainer.precision=32",
        "quantizer.kmeans_iterations=1",
        "hydra.run.dir=run",
    ]
    code, lines, _ = cli("train", *words)
    assert code == 0, lines
    tok = vistok.load("run")
    assert tok.num_tokens == 128 and tok.codebooks()[0].shape == (4096, 12)
