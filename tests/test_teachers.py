"""Semantic teachers: what they say, that nobody owns them, whom the alignment teaches."""

import pytest
import torch
import torch.nn.functional as F
import yaml

import vistok
from helpers import TINY, aligned, awake, config_of, images_of, metrics_of, stepped
from vistok.checkpoints.read import read_checkpoint
from vistok.core.errors import ArgumentError, ConfigError
from vistok.models import pretrained
from vistok.models.pretrained import Teacher, feature_map
from vistok.tasks.reconstruction import Reconstruction

timm = pytest.importorskip("timm")
VIT, CNN, LEVIT = "vit_tiny_patch16_224", "resnet18", "levit_128s"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights of small models, as files."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    paths = {}
    for name in (VIT, CNN, LEVIT):
        paths[name] = folder / f"{name}.pth"
        torch.save(timm.create_model(name, pretrained=False).state_dict(), paths[name])
    return paths


def test_features_of_a_vit_are_its_patch_tokens(files):
    teacher = Teacher(VIT, str(files[VIT]), 224).eval()
    model = timm.create_model(VIT, pretrained=False).eval()
    model.load_state_dict(torch.load(files[VIT], weights_only=True))
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        tokens = model.forward_features(((images + 1) / 2 - mean) / std)
        features = teacher(images)
    assert features.shape == (2, 192, 14, 14) and teacher.dim == 192
    assert torch.allclose(features[:, :, 3, 5], tokens[:, 1 + 3 * 14 + 5], atol=1e-3)


def test_other_sizes_channels_and_models(files):
    with torch.no_grad():
        assert Teacher(VIT, str(files[VIT]), 64).eval()(torch.zeros(1, 1, 16, 16)).shape == (1, 192, 4, 4)  # fmt: skip
        assert Teacher(CNN, str(files[CNN]), 64).eval()(torch.zeros(1, 4, 16, 16)).shape == (1, 512, 2, 2)  # fmt: skip
        levit = Teacher(LEVIT, str(files[LEVIT]), 224)
        assert levit.dim == 384 and levit(torch.zeros(1, 3, 16, 16)).shape == (1, 384, 4, 4)


def test_resizing_makes_nothing_brighter_than_white(files):
    """Bicubic interpolation overshoots at edges, and networks know no such pixels."""
    teacher, seen = Teacher(VIT, str(files[VIT]), 64).eval(), []
    teacher.model.patch_embed.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    stripes = (torch.arange(16) // 4 % 2 * 2 - 1).float().expand(1, 3, 16, 16)
    with torch.no_grad():
        teacher(stripes)
    pixels = seen[0] * teacher.std + teacher.mean
    assert pixels.min() > -1 - 1e-5 and pixels.max() < 1 + 1e-5
    assert torch.allclose(pixels[0, :, 0, 8], -torch.ones(3), atol=1e-5)  # inside of a stripe
    assert torch.allclose(pixels[0, :, 0, 24], torch.ones(3), atol=1e-5)


def test_missing_weights_say_how_to_get_them(files, monkeypatch):
    with pytest.raises(ArgumentError, match=r"^name=vit_tiny_patch16_22: .*no such model.*did you"):
        Teacher("vit_tiny_patch16_22", None, 224)
    with pytest.raises(ArgumentError, match=r"^weights=none\.pth: no such file"):
        Teacher(VIT, "none.pth", 224)
    with pytest.raises(ArgumentError, match=f"^weights=.*: not weights of {VIT}"):
        Teacher(VIT, str(files[CNN]), 224)

    def offline(*args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(pretrained, "_reach", lambda name: None)
    with pytest.raises(ArgumentError) as error:
        Teacher(VIT, None, 224)
    message = str(error.value)
    assert message.startswith(f"name={VIT}: ") and "\n" not in message and "no network" in message
    assert f"timm.create_model('{VIT}', pretrained=True)" in message
    assert "weights=FILE" in message


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Names can't be looked up and the hub's cache is empty; returns the cache and naps taken."""
    import socket
    import time

    from huggingface_hub import constants

    def lookup(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    naps = []
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(time, "sleep", naps.append)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path, naps


def test_without_network_and_weights_the_error_comes_at_once_and_alone(
    no_network, monkeypatch, capfd
):
    from huggingface_hub import constants

    with pytest.raises(ArgumentError, match=r"not at hand \(.*Name or service not known"):
        Teacher(VIT, None, 32)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # which the hub reads when imported
    with pytest.raises(ArgumentError, match=r"not at hand \(.*offline mode is enabled"):
        Teacher(VIT, None, 32)
    assert not no_network[1]  # no retries
    assert capfd.readouterr() == ("", "")


def test_weights_in_the_hubs_cache_need_no_network(no_network, files, capfd):
    from safetensors.torch import save_file

    folder = no_network[0] / f"models--timm--{timm.get_pretrained_cfg(VIT).hf_hub_id[5:]}"
    for name in ("refs", "snapshots/0123"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text("0123")
    weights = torch.load(files[VIT], weights_only=True)
    save_file(weights, folder / "snapshots/0123/model.safetensors")
    kept = Teacher(VIT, None, 224).model.state_dict()
    assert torch.equal(kept["blocks.3.mlp.fc1.weight"], weights["blocks.3.mlp.fc1.weight"])
    assert not no_network[1] and capfd.readouterr() == ("", "")


def small(name, **options):
    """A model of the family with random weights."""
    torch.manual_seed(0)
    return awake(timm.create_model(name, pretrained=False, num_classes=0, **options)).eval()


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("swin_tiny_patch4_window7_224", 64, {"embed_dim": 16, "depths": (1, 1, 1, 1)}),  # NHWC
        ("levit_128s", 128, {}),  # tokens; its class knows of no prefix
        ("mixer_s32_224", 96, {}),
        ("hiera_tiny_224", 64, {"embed_dim": 16, "stages": (1, 1, 1, 1)}),
        ("mvitv2_tiny", 64, {}),
        ("deit_tiny_distilled_patch16_224", 64, {"depth": 1}),  # two prefix tokens
        ("convnext_atto", 64, {"depths": (1, 1, 1, 1)}),  # NCHW
    ],
)
def test_maps_of_all_layouts(name, size, options):
    """Against timm's own maps of its last layer, which other code of timm makes."""
    fixed = {} if name in ("mvitv2_tiny", "convnext_atto") else {"img_size": size}
    model = small(name, **fixed, **options)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found = feature_map(model, images)
        norm = {} if name in ("levit_128s", "hiera_tiny_224") else {"norm": True}
        expected = model.forward_intermediates(
            images, indices=1, output_fmt="NCHW", intermediates_only=True, **norm
        )[-1]
    if "convnext" in name:  # its norm lies in the head
        assert torch.equal(found, model.forward_features(images))
    else:
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)
    assert found.shape[2] == found.shape[3] > 1 and found.std() > 1e-2


def test_a_map_lies_on_the_models_own_grid():
    """2 x 8 patches, of which a square could be made, too."""
    model = small(VIT, img_size=(32, 128), depth=1)
    images = torch.randn(1, 3, 32, 128)
    with torch.no_grad():
        found, tokens = feature_map(model, images), model.forward_features(images)
    assert found.shape == (1, 192, 2, 8)
    assert torch.equal(found[:, :, 1, 3], tokens[:, 1 + 8 + 3])


@pytest.mark.parametrize("name", ["pit_ti_224", "coat_tiny"])
def test_what_has_no_grid_is_refused(name):
    with pytest.raises(ValueError, match="is not a grid of features"):
        feature_map(small(name), torch.zeros(1, 3, 224, 224))


def test_a_teacher_without_a_map_is_told_in_one_line(files, monkeypatch):
    with pytest.raises(ArgumentError) as error:
        Teacher(VIT, str(files[VIT]), 16)  # one patch
    assert str(error.value).startswith(
        f"name={VIT}: makes no map of features of input_size=16 (found (1, 2,"
    )
    assert "\n" not in str(error.value)


TERM = "loss.terms.alignment"


def alignment(files):
    words = [f"teacher.name={VIT}", f"teacher.weights={files[VIT]}", "teacher.input_size=32"]
    return ["alignment=plain", *(f"{TERM}.{word}" for word in words)]


def module(files, name, *overrides):
    words = [w for w in TINY if not w.startswith("quantizer.")]
    words += [*alignment(files), f"{TERM}.tap=decoder.block.0"]
    torch.manual_seed(0)
    config = config_of(f"experiment={name}", *words, *overrides)
    built = Reconstruction(config).train()
    awake(built.tokenizer)
    return built


@pytest.mark.parametrize("name", ["titok_tiny", "one_d_piece_tiny", "flextok_tiny"])
def test_alignment_is_one_minus_the_cosine_at_the_same_place(files, name):
    m = module(files, name)
    images = m.tokenizer.to_model_range(images_of(4))
    kept = []
    decoder = m.tokenizer.decoder
    blocks = getattr(decoder, "transformer", decoder).blocks
    blocks[0].register_forward_hook(lambda block, inputs, output: kept.append(output))
    value = aligned(m, images)
    # A 32 px input gives 2 x 2 features, as many as there are patches of 8 px in 16 px.
    features = m.objective.terms["alignment"].teacher(images).flatten(2).transpose(1, 2)
    tokens = m.objective.terms["alignment"].projector(kept[0][:, :4])
    expected = 1 - F.cosine_similarity(tokens, features, dim=-1).mean()
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_alignment_shrinks_features_by_averages(files):
    """Of 6 x 6 features a patch of 2 x 2 has 3 x 3, and all of them a say."""
    m = module(files, "titok_tiny", f"{TERM}.teacher.input_size=96")
    images, kept = m.tokenizer.to_model_range(images_of(4)), []
    m.tokenizer.decoder.transformer.blocks[0].register_forward_hook(
        lambda block, inputs, output: kept.append(output)
    )
    value = aligned(m, images)
    features = m.objective.terms["alignment"].teacher(images)
    assert features.shape[2:] == (6, 6)
    cells = [features[:, :, y : y + 3, x : x + 3].mean((2, 3)) for y in (0, 3) for x in (0, 3)]
    tokens = m.objective.terms["alignment"].projector(kept[0][:, :4])
    expected = 1 - F.cosine_similarity(tokens, torch.stack(cells, dim=1), dim=-1).mean()
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_alignment_at_the_teachers_grid(files):
    """Patches are interpolated between their centres, in each direction by the same matrix."""
    m = module(files, "titok_tiny", f"{TERM}.grid=teacher", f"{TERM}.teacher.input_size=64")
    images = m.tokenizer.to_model_range(images_of(4))
    kept = []
    m.tokenizer.decoder.transformer.blocks[0].register_forward_hook(
        lambda block, inputs, output: kept.append(output)
    )
    value = aligned(m, images)
    features = m.objective.terms["alignment"].teacher(images)
    assert features.shape[2:] == (4, 4)  # of 2 x 2 patches
    patches = m.objective.terms["alignment"].projector(kept[0][:, :4]).unflatten(1, (2, 2))
    up = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    patches = torch.einsum("yi,xj,bijd->bdyx", up, up, patches)
    expected = 1 - F.cosine_similarity(patches, features, dim=1).mean()
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)


def test_grids_that_there_are_not(files):
    with pytest.raises(
        ConfigError, match=r"^loss\.terms\.alignment\.grid=pixels: must be one of tokens"
    ):
        module(files, "titok_tiny", f"{TERM}.grid=pixels")


def test_errors_of_a_run_name_its_keys(files):
    with pytest.raises(ConfigError, match=r"^loss\.terms\.alignment\.teacher\.name=resnet_18: timm has"):  # fmt: skip
        module(files, "titok_tiny", f"{TERM}.teacher.name=resnet_18")
    with pytest.raises(
        ConfigError, match=r"^loss\.terms\.alignment\.teacher\.weights=none\.pth: no"
    ):
        module(files, "titok_tiny", f"{TERM}.teacher.weights=none.pth")


@pytest.mark.parametrize("value", ["-1", "null", "true", "nan"])
def test_a_weight_that_leads_nowhere_is_refused(files, value):
    with pytest.raises(ConfigError, match=r"^loss\.terms\.alignment\.weight.*"):
        module(files, "titok_tiny", f"{TERM}.weight={value}")


@pytest.mark.parametrize("word", ["start_samples=0.5", "ramp_samples=-1", "teacher.input_size=0"])
def test_whole_numbers_of_the_alignment(files, word):
    with pytest.raises(ConfigError, match=rf"^loss\.terms\.alignment\.{word}: must be a whole"):
        module(files, "titok_tiny", f"{TERM}.{word}")


def test_alignment_teaches_what_lies_before_its_block(files):
    m = module(files, "titok_tiny", "tokenizer.decoder.depth=2")
    images = m.tokenizer.to_model_range(images_of(4))
    aligned(m, images).backward()
    reached = {n for n, p in m.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("objective.terms.alignment.projector", "tokenizer.encoder", "tokenizer.decoder.transformer.blocks.0"):  # fmt: skip
        assert any(n.startswith(part) for n in reached), part
    for part in ("tokenizer.decoder.transformer.blocks.1", "tokenizer.decoder.head"):
        assert not any(n.startswith(part) for n in reached), part


def test_activation_checkpointing_keeps_the_gradients_of_alignment(files):
    """The tokens that it keeps are those of the forward pass, whatever is computed again."""
    results = []
    for flag in ("false", "true"):
        m = module(files, "titok_tiny", f"tokenizer.decoder.activation_checkpointing={flag}")
        images = m.tokenizer.to_model_range(images_of(4))
        for _ in range(2):  # the second step finds what the first one left
            step = stepped(m, images)
            m.zero_grad()
            term = m.objective.terms["alignment"]
            (term(step) + step.prediction.value.square().mean()).backward()
        results.append({n: p.grad for n, p in m.named_parameters()})
    for name, gradient in results[0].items():
        other = results[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.allclose(gradient, other, rtol=1e-4, atol=1e-7), name


def test_alignment_teaches_encoder_and_flow_of_flextok(files):
    """REPA as in the paper; the image that is aligned with is the clean one."""
    m = module(files, "flextok_tiny", "tokenizer.decoder.depth=2")
    images = m.tokenizer.to_model_range(images_of(4))
    seen = []
    m.objective.terms["alignment"].teacher.module.register_forward_pre_hook(
        lambda t, inputs: seen.append(inputs[0])
    )
    aligned(m, images).backward()
    assert torch.equal(seen[0], images)
    reached = {n for n, p in m.named_parameters() if p.grad is not None and p.grad.any()}
    parts = [
        "objective.terms.alignment.projector",
        "tokenizer.encoder.transformer",
        "tokenizer.quantizer.project_in",
    ]
    parts += [f"tokenizer.decoder.{p}" for p in ("embed", "patch_embed", "time_embed", "blocks.0")]
    for part in parts:
        assert any(n.startswith(part) for n in reached), part
    for part in ("blocks.1", "head", "modulate_out"):
        assert not any(n.startswith(f"tokenizer.decoder.{part}") for n in reached), part


def test_alignment_brings_the_flow_closer_to_the_teacher(files):
    m = module(files, "flextok_tiny")
    images = m.tokenizer.to_model_range(images_of(8))
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3)
    values = []
    for _ in range(25):
        value = aligned(m, images)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


def test_nobody_owns_the_teacher(files):
    m = module(files, "titok_tiny")
    assert not any("teacher" in key for key in m.state_dict())
    assert any(key.startswith("objective.terms.alignment.projector") for key in m.state_dict())
    assert not any("alignment" in key for key in m.ema.shadow)
    held = {id(p) for p in m.objective.terms["alignment"].teacher.module.parameters()}
    optimizer = m.configure_optimizers()
    trained = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert not held & trained
    assert {id(p) for p in m.objective.terms["alignment"].projector.parameters()} <= trained
    assert not any(
        p.requires_grad for p in m.objective.terms["alignment"].teacher.module.parameters()
    )
    assert not m.objective.terms["alignment"].teacher.module.training


def test_no_teacher_no_alignment():
    assert "alignment" not in Reconstruction(config_of(*TINY)).objective.terms


def test_a_decoder_without_blocks_is_refused(files):
    with pytest.raises(
        ConfigError, match=r"^loss\.terms\.alignment\.tap=decoder\.block\.1: .*it has: "
    ):
        Reconstruction(config_of("experiment=vqgan_tiny", *alignment(files)))
    with pytest.raises(ConfigError, match=r"tap=decoder\.block\.7: .*mean 'decoder\.block\.0'"):
        module(files, "titok_tiny", f"{TERM}.tap=decoder.block.7")


def test_a_run_with_a_teacher_resumes_and_leaves_it_behind(files, photos, tmp_path, monkeypatch):
    from vistok.cli import train

    monkeypatch.chdir(tmp_path)
    words = [*TINY, "data=folder", f"data.train={photos}", "data.val_fraction=0.2"]
    words += ["data.image_size=16", *alignment(files), f"{TERM}.tap=decoder.block.0"]
    words += ["hydra.run.dir=run"]
    assert train(words) == 0
    assert train(["resume=run", "trainer.max_steps=6"]) == 0
    content = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert not any("teacher" in key for key in content["state_dict"])
    assert any("projector" in key for key in content["state_dict"])
    tok = vistok.load("run")
    assert not any("projector" in key for key in tok.state_dict())
    rows = [row for row in metrics_of(tmp_path / "run") if row["loss/alignment"]]
    assert len(rows) >= 6
    total = float(rows[0]["loss/total"])
    parts = float(rows[0]["loss/reconstruction"]) + 0.5 * float(rows[0]["loss/alignment"])
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    weights = config["quantizer"]["commitment_weight"]
    assert total == pytest.approx(parts + weights * float(rows[0]["loss/commitment"]), rel=1e-4)
