"""Transformers on a grid, ViT-VQGAN and BSQ-ViT: sizes, positions, a second decoder, released ids.

The oracle of the released weights knows the published names alone and computes in float64, by
torch's functions. Next to the official class with the same random weights our ids were equal and
pictures within 2e-6, also at 64 x 96 and at the paper's size (docs/systems/grids.md).
"""

import math

import pytest
import torch
import torch.nn.functional as F

import vistok
from helpers import SIZES, TINY, Names, config_of, images_of, metrics_of, tiny_tokenizer
from vistok.cli import train
from vistok.core.errors import CheckpointError, ConfigError
from vistok.export.importer import import_weights
from vistok.models.build import build_tokenizer
from vistok.models.patch_vit import PatchViTDecoder, PatchViTEncoder
from vistok.nn.positions import resize_positions
from vistok.tasks.stages import resolve_stage

SYSTEMS = ("vit_vqgan_tiny", "bsq_vit_tiny")
both = pytest.mark.parametrize("system", SYSTEMS)

WIDTH, HEADS, SIDE = 128, 2, 8


def small(system, *words, **options):
    """A tokenizer of random weights that an image has something to say to."""
    quantizer = {"vit_vqgan_tiny": "vq_1024x8", "bsq_vit_tiny": "bsq_1024"}[system]
    torch.manual_seed(0)
    config = config_of(
        f"tokenizer={system}", f"quantizer={quantizer}", *SIZES[system], *words, **options
    )
    tok = build_tokenizer(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in tok.named_parameters():
            if name.endswith("positions"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return tok


def drawn(*size, count=2, channels=3):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------- sizes and channels


@both
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_different_sizes_get_the_ids_that_each_has_alone(system, positions, channels):
    words = [f"data.channels={channels}", f"tokenizer.encoder.positions={positions}"]
    if system == "vit_vqgan_tiny":
        words.append(f"tokenizer.decoder.decoder.channels={2 * channels}")
    tok = small(system, "data.image_size=[64,96]", *words)
    sizes = [(64, 96), (64, 64), (64, 96), (96, 40)]
    images = [drawn(*size, count=1, channels=channels)[0] for size in sizes]
    found = tok.tokenize(images)
    assert [len(ids) for ids in found] == [h * w // 64 for h, w in sizes]
    for image, ids in zip(images, found, strict=True):
        sized = tok.at(image.shape[1:])
        assert torch.equal(sized.tokenize(image[None])[0], ids) and ids.unique().numel() > 8
        picture = sized.detokenize(ids[None])
        assert picture.shape == image[None].shape and picture.std() > 1e-3
    assert tok.image_size == (64, 96) and tok.encoder.grid == (8, 12)  # itself unchanged
    assert torch.equal(tok.tokenize(images[0][None])[0], found[0])


@both
def test_batches_of_another_size_train_the_same_positions(system):
    tok = small(system, "data.image_size=32").train()
    output = tok(2 * drawn(16, 48) - 1)
    assert output.predictions["image"].value.shape == (2, 3, 16, 48)
    output.predictions["image"].value.square().mean().backward()
    for part in (tok.encoder, tok.decoder):
        gradients = [p.grad for name, p in part.named_parameters() if name.endswith("positions")]
        assert len(gradients) == 1 and gradients[0].abs().sum(dim=1).min() > 0


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_learned_positions_are_interpolated(interpolation):
    """To what a network of that size computes that has them written in."""
    options = {"patch_size": 8, "width": 16, "depth": 2, "num_heads": 2}
    options |= {"channels": 3, "interpolation": interpolation}
    torch.manual_seed(0)
    net = PatchViTEncoder(32, **options)
    torch.nn.init.normal_(net.transformer.positions)
    other = PatchViTEncoder([48, 16], **options)
    state = net.state_dict()
    table = state["transformer.positions"].view(4, 4, 16).permute(2, 0, 1)[None]
    table = F.interpolate(table, (6, 2), mode=interpolation, antialias=True)
    state["transformer.positions"] = table[0].permute(1, 2, 0).reshape(12, 16)
    other.load_state_dict(state)
    images = drawn(48, 16)
    assert torch.allclose(net.at((48, 16))(images), other(images), atol=1e-6)
    assert torch.equal(net.at((48, 16)).at((32, 32))(drawn(32, 32)), net(drawn(32, 32)))


def test_interpolated_positions_keep_a_slope():
    """A table that rises evenly is read between its places, away from the border."""
    rows = torch.arange(8.0)[:, None].expand(8, 6).reshape(48, 1)
    found = resize_positions(rows, (8, 6), (16, 6)).view(16, 6)
    wanted = (torch.arange(16.0) + 0.5) / 2 - 0.5
    assert torch.allclose(found[4:-4], wanted[4:-4, None].expand(8, 6), atol=1e-5)
    assert torch.equal(resize_positions(rows, (8, 6), (8, 6)), rows)


@both
def test_positions_of_one_size_alone_refuse_others(system):
    tok = small(system, "data.image_size=32", "tokenizer.encoder.interpolation=null")
    assert tok.at(32).tokenize(drawn(32, 32)).shape == (2, 16, 1)
    with pytest.raises(ConfigError, match=r"4 x 4 patches alone, found 4 x 8") as error:
        tok.at((32, 64))
    assert "\n" not in str(error.value)


def test_rotary_positions_are_those_of_a_network_of_that_size():
    options = {"patch_size": 8, "width": 16, "depth": 2, "num_heads": 2}
    options |= {"channels": 3, "positions": "rotary"}
    torch.manual_seed(0)
    net, other = PatchViTEncoder(32, **options), PatchViTEncoder([16, 64], **options)
    other.load_state_dict(net.state_dict())
    images = drawn(16, 64)
    assert torch.equal(net.at((16, 64))(images), other(images))
    assert not any("positions" in name for name in net.state_dict())
    turned = images.flip(2)  # a picture upside down is not its tokens in another order
    assert not torch.allclose(other(turned).view(2, 2, 8, 16).flip(1), other(images).view(2, 2, 8, 16))  # fmt: skip


def test_activation_checkpointing_changes_no_gradient():
    found = []
    for flag in (False, True):
        torch.manual_seed(0)
        options = {"channels": 3, "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2}
        net = PatchViTEncoder(32, **options, activation_checkpointing=flag)
        net(drawn(32, 32)).square().sum().backward()
        found.append(net.embed.weight.grad)
    assert torch.equal(*found)


# ---------------------------------------------------------------------- the start


@both
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_start_from_data_paints_pictures(system, positions):
    """Of codes of unit length too."""
    words = ["data.image_size=32", f"tokenizer.encoder.positions={positions}"]
    tok = build_tokenizer(config_of(f"experiment={system}", *words)).eval()
    photos = images_of(96, 32)
    tok.initialize(photos)
    fresh = photos[:16].float() / 255
    error = (tok.detokenize(tok.tokenize(fresh)) - fresh).square().mean()
    assert error < 0.4 * fresh.var()


def test_masked_cells_count_as_zero():
    net = PatchViTDecoder(16, 3, 8, 16, 16, 1, 2, head_width=32).eval()
    quantized = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True, True]])
    changed = quantized.clone()
    changed[0, 1] *= -1
    assert torch.equal(net.reconstruct(quantized, mask), net.reconstruct(changed, mask))
    assert not torch.allclose(net.reconstruct(quantized), net.reconstruct(changed))


# ---------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("experiment", "published"),
    [
        ("vit_vqgan_small", 54.640544),  # the class in BSQ-ViT's code, built with these sizes
        ("vit_vqgan_base", 175.689888),
        ("vit_vqgan_small_large", 662.273696),
        ("bsq_vit", 174.816210),
    ],
)
def test_paper_sizes_have_the_published_parameters(experiment, published):
    with torch.device("meta"):
        tok = build_tokenizer(config_of(f"experiment={experiment}"))
    found = sum(p.numel() for p in tok.parameters()) / 1e6
    assert found == pytest.approx(published, rel=1e-3)
    assert tok.num_tokens == 1024 and tok.encoder.grid == (32, 32)


# ---------------------------------------------------------------------- a second decoder


@pytest.mark.slow
def test_a_larger_decoder_learns_for_the_same_ids(tmp_path, photos):
    words = [w for w in TINY if not w.startswith(("tokenizer.", "loss="))]
    words += ["experiment=vit_vqgan_tiny", *SIZES["vit_vqgan_tiny"]]
    words += ["data=folder", f"data.train={photos}", "data.val_fraction=0.2", "data.image_size=16"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert train([*words, f"hydra.run.dir={first}"]) == 0
    larger = ["tokenizer.decoder.decoder.depth=2", "tokenizer.decoder.decoder.width=32"]
    words += larger
    stage = [*words, "stage=larger_decoder", f"stage.weights={first}", f"hydra.run.dir={second}"]
    assert train(stage) == 0
    old, new = (vistok.load(run) for run in (first, second))
    fresh = images_of(4)
    ids = old.tokenize(fresh)
    assert torch.equal(new.tokenize(fresh), ids)
    for part in ("encoder", "quantizer"):
        state = new.get_submodule(part).state_dict()
        for name, value in old.get_submodule(part).state_dict().items():
            if not name.startswith("usage"):
                assert torch.equal(state[name], value), name
    assert len(new.decoder.decoder.transformer.blocks) == 2
    assert not torch.equal(new.detokenize(ids), old.detokenize(ids))
    losses = [float(row["loss/total"]) for row in metrics_of(second) if row["loss/total"]]
    assert losses and all(map(math.isfinite, losses))
    stage = ["data.image_size=16", "stage=larger_decoder", f"stage.weights={first}"]
    with pytest.raises(ConfigError, match=r"has tokenizer._target_=vit_vqgan, but .* bsq_vit"):
        resolve_stage(config_of("experiment=bsq_vit_tiny", *stage))


# ---------------------------------------------------------------------- released weights


def published(size=(32, 32), bits=10, norm_in=True, laplace=False, seed=0):
    names = Names(seed)
    cells, values = size[0] * size[1] // SIDE**2, 3 * SIDE**2
    for part in ("encoder", "decoder"):
        names.add(f"{part}.positional_embedding", cells, WIDTH, scale=0.5)
        for norm in ("ln_pre", "ln_post")[not norm_in :]:
            names.norm(f"{part}.{norm}", WIDTH)
        for n in range(2):
            block = f"{part}.transformer.resblocks.{n}"
            names.norm(f"{block}.ln_1", WIDTH)
            names.norm(f"{block}.ln_2", WIDTH)
            names.add(f"{block}.attn.in_proj_weight", 3 * WIDTH, WIDTH)
            names.add(f"{block}.attn.in_proj_bias", 3 * WIDTH, scale=0.1)
            names.layer(f"{block}.attn.out_proj", WIDTH, WIDTH)
            names.layer(f"{block}.mlp.c_fc", 4 * WIDTH, WIDTH)
            names.layer(f"{block}.mlp.c_proj", WIDTH, 4 * WIDTH)
    names.layer("encoder.conv1", WIDTH, values, bias=not norm_in)
    names.layer("quant_embed", bits, WIDTH)
    names.layer("post_quant_embed", WIDTH, bits)
    names.layer("decoder.ffn.0", 256, WIDTH)
    names.layer("decoder.conv_out", values * (2 if laplace else 1), 256)
    names.tensors["quantize.basis"] = 2 ** torch.arange(bits - 1, -1, -1)
    names.tensors["quantize.group_basis"] = torch.ones(1, dtype=torch.long)
    return names.tensors


class Oracle:
    """The published forward, in float64."""

    def __init__(self, tensors, size):
        self.p = {k: v.double() for k, v in tensors.items()}
        self.rows, self.columns = size[0] // SIDE, size[1] // SIDE

    def linear(self, name, x):
        return F.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"))

    def norm(self, name, x):
        if f"{name}.weight" not in self.p:
            return x
        return F.layer_norm(x, (WIDTH,), self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def transformer(self, part, x):
        x = self.norm(f"{part}.ln_pre", x + self.p[f"{part}.positional_embedding"])
        for n in range(2):
            block = f"{part}.transformer.resblocks.{n}"
            y = self.norm(f"{block}.ln_1", x)
            y = F.linear(y, self.p[f"{block}.attn.in_proj_weight"], self.p[f"{block}.attn.in_proj_bias"])  # fmt: skip
            q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in y.chunk(3, dim=2))
            y = (q @ k.transpose(2, 3) * (WIDTH // HEADS) ** -0.5).softmax(dim=3) @ v
            x = x + self.linear(f"{block}.attn.out_proj", y.transpose(1, 2).flatten(2))
            y = F.gelu(self.linear(f"{block}.mlp.c_fc", self.norm(f"{block}.ln_2", x)))
            x = x + self.linear(f"{block}.mlp.c_proj", y)
        return self.norm(f"{part}.ln_post", x)

    def bits(self, images):
        """Signs `(B, N, bits)` of images `(B, 3, H, W)` as the network sees them."""
        patches = F.unfold(images.double(), SIDE, stride=SIDE).transpose(1, 2)
        x = self.transformer("encoder", self.linear("encoder.conv1", patches))
        return self.linear("quant_embed", x) > 0

    def pictures(self, bits):
        codes = (2.0 * bits.double() - 1) / bits.shape[2] ** 0.5
        x = self.transformer("decoder", self.linear("post_quant_embed", codes))
        x = self.linear("decoder.conv_out", self.linear("decoder.ffn.0", x).tanh())
        size = (self.rows * SIDE, self.columns * SIDE)
        return F.fold(x.transpose(1, 2), size, SIDE, stride=SIDE)


def number(bits):
    """One integer of each code, its first bit the most significant."""
    return (bits.long() * 2 ** torch.arange(bits.shape[2] - 1, -1, -1)).sum(2)


def imported(tensors, path, source="auto", **options):
    file = path / "weights.pt"  # as a training checkpoint holds them
    wrapped = {f"module.module.{name}": value for name, value in tensors.items()}
    plain = {name[7:]: torch.zeros_like(value) for name, value in wrapped.items()}
    torch.save({"iter": 1, "state_dict": plain, "ema_state_dict": wrapped}, file)
    return vistok.load(import_weights(source, file, path / "out", **options))


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 32), {}),
        ((32, 64), {}),
        ((24, 40), {"bits": 18}),
        ((32, 32), {"bits": 36}),
        ((32, 32), {"norm_in": False}),
        ((32, 32), {"laplace": True}),
    ],
)
def test_ids_and_pictures_are_the_published_ones(size, options, tmp_path, capsys):
    tensors = published(size, **options)
    given = {} if size == (32, 32) else {"image_size": list(size)}
    tok, oracle = imported(tensors, tmp_path, **given), Oracle(tensors, size)
    assert "source=auto: bsq_vit, for" in capsys.readouterr().out
    assert tok.image_size == size
    images = drawn(*size)
    laplace = options.get("laplace", False)
    bits = oracle.bits(0.8 * images + 0.1 if laplace else 2 * images - 1)
    ids, slot = tok.tokenize(images), 2 ** min(18, bits.shape[2])
    assert ids.shape[2] == (2 if bits.shape[2] == 36 else 1)
    assert torch.equal((ids * slot ** torch.arange(ids.shape[2])).sum(2), number(bits))
    assert number(bits).unique().numel() > 8
    found = tok.decode(tok.quantizer.decode(ids, tok.encoder.grid))
    expected = oracle.pictures(bits)
    if laplace:
        expected = (2 * (expected[:, :3].sigmoid() - 0.1) / 0.8 - 1).clamp(-1, 1)
    assert (found - expected).abs().max() < 1e-4
    assert expected.std() > 0.1 and (expected[0] - expected[1]).std() > 0.01


def test_an_image_size_that_the_positions_are_not_of_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has 4 x 6 patches, the file positions for 16"):
        imported(published(), tmp_path, image_size=[32, 48])


def test_a_tensor_too_many_or_too_few_is_refused(tmp_path):
    tensors = published()
    name = "decoder.transformer.resblocks.1.attn.in_proj_bias"
    with pytest.raises(CheckpointError, match=f"source=bsq_vit: '{name}' is missing"):
        missing = {key: value for key, value in tensors.items() if key != name}
        imported(missing, tmp_path, source="bsq_vit")
    with pytest.raises(CheckpointError, match=r"'decoder.more' has no place"):
        imported(tensors | {"decoder.more": torch.zeros(1)}, tmp_path)


def test_the_tiny_tokenizers_are_grids():
    for system in SYSTEMS:
        tok = tiny_tokenizer(tokenizer=system)
        assert tok.encoder.grid == (2, 2) and tok.token_order == "raster"
