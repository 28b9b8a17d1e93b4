"""What older versions wrote is read in today's form; what no version wrote is refused."""

import copy
import json
import shutil

import pytest
import torch
import yaml

import vistok
from helpers import images_of
from test_export import edit
from vistok.checkpoints.migrate import FORMAT, in_todays_form, migrate_checkpoint, migrate_config
from vistok.checkpoints.read import read_checkpoint, read_config
from vistok.checkpoints.write import write_sealed
from vistok.core.errors import CheckpointError, ConfigError
from vistok.core.registry import registered, resolve

#: Every class that a config could name in format 1, below `vistok.`, and its name since.
OLD = """
decoders.cnn.CNNDecoder cnn_decoder
decoders.flow.FlowDecoder flow_decoder
decoders.hita.HitaDecoder hita_decoder
decoders.latent_transformer.LatentTransformerDecoder latent_vit_decoder
decoders.maskgit.MaskGITDecoder maskgit_decoder
decoders.proxy.ProxyDecoder proxy_decoder
decoders.qformer.QFormerDecoder qformer_decoder
decoders.restok.ResTokDecoder restok_decoder
decoders.text_transformer.TextTransformerDecoder text_decoder
encoders.cnn.CNNEncoder cnn_encoder
encoders.hita.HitaEncoder hita_encoder
encoders.latent_transformer.LatentTransformerEncoder latent_vit_encoder
encoders.maskgit.MaskGITEncoder maskgit_encoder
encoders.qformer.QFormerEncoder qformer_encoder
encoders.restok.ResTokEncoder restok_encoder
losses.adversarial.PatchDiscriminator patch_discriminator
losses.codes.CodeLoss codes
losses.features.FeatureLoss features
losses.reconstruction.MSELoss mse
losses.reconstruction.LogMSELoss log_mse
losses.reconstruction.L1Loss l1
models.flexible.FlexibleTokenizer flexible_tokenizer
models.flextok.FlexTok flextok
models.gigatok.GigaTok gigatok
models.hita.Hita hita
models.latents.LatentSpace latent_space
models.length.LengthPolicy length
models.length.LevelPolicy levels
models.one_d_piece.OneDPiece one_d_piece
models.restok.ResTok restok
models.retok.ReTok retok
models.ta_titok.TATiTok ta_titok
models.titok.TiTok titok
models.tokenizer.Tokenizer tokenizer
models.vqgan.VQGAN vqgan
quantizers.binary.BinaryLatents binary
quantizers.bsq.BSQ bsq
quantizers.dual_vq.SharedIndexVQ shared_index_vq
quantizers.dual_vq.MultiScaleSharedIndexVQ multi_scale_shared_index_vq
quantizers.dual_vq.DualToken dual_token
quantizers.dual_vq.ImageFolder image_folder
quantizers.fsq.FSQ fsq
quantizers.ibq.IBQ ibq
quantizers.lfq.LFQ lfq
quantizers.lfq.GroupLFQ group_lfq
quantizers.multi_scale_vq.MultiScale multi_scale
quantizers.multi_scale_vq.MultiScaleVQ multi_scale_vq
quantizers.perturb.Perturb perturb
quantizers.product_vq.Product product
quantizers.product_vq.ProductVQ product_vq
quantizers.residual_vq.ResidualVQ residual_vq
quantizers.segments.Segments segments
quantizers.simvq.SimVQ simvq
quantizers.token_bridge.TokenBridge token_bridge
quantizers.vq.VectorQuantizer vq
"""
NAMES = {f"vistok.{old}": name for old, name in map(str.split, OLD.strip().splitlines())}


@pytest.mark.parametrize("old", NAMES)
def test_a_path_of_the_old_tree_becomes_a_name(old):
    config = {"quantizer": {"inner": [{"_target_": old, "dim": 3}]}}
    before = copy.deepcopy(config)
    found = migrate_config(config, "x")
    assert found["quantizer"]["inner"][0]["_target_"] == NAMES[old] and found["format"] == FORMAT
    assert config == before
    assert resolve(NAMES[old]).__name__ == old.rpartition(".")[2]


@pytest.mark.parametrize(
    "target",
    [
        "my_module.TiTok",
        "os.system",
        "vistok.cli.TiTok",
        "vistok.models.titok",
        "vistok.models..titok.TiTok",
        "vistok.models.titok.TiTok.__init__",
        "vistok.losses.composite.CompositeLoss",
        7,
    ],
)
def test_other_targets_stay_as_they_are(target):
    assert migrate_config({"a": {"_target_": target}}, "x")["a"] == {"_target_": target}


def test_todays_form_stays_as_it_is():
    config = {"format": FORMAT, "tokenizer": {"_target_": "vistok.models.titok.TiTok"}}
    assert migrate_config(config, "x") is config


def test_data_needed_no_target():
    data = {"_target_": "vistok.data.datamodule.VistokDataModule", "kind": "sample"}
    assert migrate_config({"data": data}, "x")["data"] == {"kind": "sample"}


def test_what_is_stored_has_names_and_a_format():
    config = {"quantizer": {"_target_": "vistok.quantizers.vq.VectorQuantizer"}, "format": 1}
    stored = {"format": FORMAT, "quantizer": {"_target_": "vq"}}
    assert list(in_todays_form(config).items()) == list(stored.items())


@pytest.mark.parametrize("number", [0, -1, True, 1.0, 2.5, "2", None, [1]])
def test_a_format_is_a_whole_number(number):
    with pytest.raises(CheckpointError, match=r"^x: format=.* must be a whole number, 1 to \d+$"):
        migrate_config({"format": number}, "x")


# ---------------------------------------------------------------------- runs and exports


def test_runs_and_exports_name_parts_and_their_format(finished_run, exported):
    run = yaml.safe_load((finished_run / "config.yaml").read_text())
    stored = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    description = json.loads((exported / "config.json").read_text())
    for config in (run, stored["hyper_parameters"]["config"], description):
        assert config["format"] == 2
        assert config["tokenizer"]["_target_"] == "titok"
        assert config["quantizer"]["_target_"] == "vq"


def old_form(config):
    """The config of a TiTok with a VQ as format 1 had it."""
    if isinstance(config, dict):
        paths = {name: old for old, name in NAMES.items()}
        config = {k: old_form(v) for k, v in config.items() if k != "format"}
        if config.get("_target_") in paths:
            config["_target_"] = paths[config["_target_"]]
        if "border" in config:
            config["borders"] = {"edge": "repeated", "black": "black"}[config.pop("border")]
    return config


@pytest.fixture
def old_run(finished_run, tmp_path):
    """`finished_run`, if it had been written in format 1."""
    run = shutil.copytree(finished_run, tmp_path / "old")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(old_form(config)))
    for path in (run / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        content["hyper_parameters"]["config"] = old_form(content["hyper_parameters"]["config"])
        write_sealed(content, path)
    return run


def test_a_run_of_the_old_form_loads_goes_on_and_is_exported(cli, old_run, finished_run, tmp_path):
    images = images_of(4)
    ids = vistok.load(finished_run).tokenize(images)
    assert torch.equal(vistok.load(old_run).tokenize(images), ids)
    code, lines, _ = cli("export", f"run={old_run}", "out=out")
    assert code == 0, lines
    assert json.loads((tmp_path / "out/config.json").read_text())["format"] == 2
    code, lines, _ = cli("train", f"resume={old_run}", "trainer.max_steps=8")
    assert code == 0, lines
    config = read_config(old_run / "checkpoints" / "last.ckpt")
    assert config["format"] == 2 and config["tokenizer"]["_target_"] == "titok"
    assert read_checkpoint(old_run / "checkpoints" / "last.ckpt")["global_step"] == 8


def test_a_newer_form_is_refused_in_one_line(fails, finished_run, exported, tmp_path):
    words = ("format 3", "newer vistok", "update")
    copied = shutil.copytree(exported, tmp_path / "export")
    edit(copied, lambda config: config.update(format=3))
    fails("evaluate", f"run={copied}", words=(f"{copied}/config.json", *words))
    run = shutil.copytree(finished_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "format": 3}))
    fails("train", f"resume={run}", words=("run/config.yaml", *words))
    path = tmp_path / "new.ckpt"
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["config"]["format"] = 3
    write_sealed(content, path)
    fails("evaluate", f"run={path}", words=("new.ckpt", *words))


def test_attention_that_chose_by_trial_is_dense():
    """Wherever it stands; other words stay."""
    encoder = {"depth": 2, "attention": "auto"}
    old = {"tokenizer": {"encoder": encoder, "decoder": {"attention": "flex"}}, "notes": ["auto"]}
    new = migrate_config(old, "x")
    assert new["tokenizer"]["encoder"] == {"depth": 2, "attention": "dense"}
    assert new["tokenizer"]["decoder"] == {"attention": "flex"} and new["notes"] == ["auto"]
    assert encoder["attention"] == "auto"  # what was read stays as it was


def test_what_is_no_checkpoint_of_ours_stays_as_it_is():
    for content in ({}, {"hyper_parameters": 3}, {"hyper_parameters": {"config": []}}):
        assert migrate_checkpoint(content, "x") is content


def test_a_class_of_nobody_is_refused_after_all(tmp_path, exported):
    copied = shutil.copytree(exported, tmp_path / "copy")
    change = {"_target_": "vistok.quantizers.vq.Quantizer"}
    edit(copied, lambda config: [config.pop("format"), config["quantizer"].update(change)])
    with pytest.raises(
        ConfigError, match=r"^quantizer\._target_=vistok\.quantizers\.vq\.Quantizer"
    ):
        vistok.load(copied)


def test_the_old_tree_had_all_these_parts():
    assert set(NAMES.values()) <= set(registered()) and len(NAMES) == 55
