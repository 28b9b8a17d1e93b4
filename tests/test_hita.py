"""Hita: two kinds of tokens and two codebooks, causal fusion, the shift."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vistok
from helpers import SIZES, TINY, awake, config_of, errors_while_learning, images_of, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.export.exporter import codebook_tensors, describe, write_export
from vistok.models.build import build_tokenizer
from vistok.models.pretrained import PretrainedTokens

HITA_TINY = [w for w in TINY if w not in SIZES["titok_tiny"]] + SIZES["hita_tiny"]

#: Paper size without the network that it reads along.
ALONE = "tokenizer.encoder.pretrained=null"

#: 6 holistic tokens and 4 x 4 patches, shifted by 3.
SHIFTED = [
    "data.image_size=32",
    "tokenizer.encoder.num_holistic_tokens=6",
    "tokenizer.decoder.shift=3",
]


def small(*overrides):
    return tiny_tokenizer(*overrides, tokenizer="hita_tiny")


# ---------------------------------------------------------------------- the encoder


def test_holistic_tokens_come_first_and_patches_in_raster_order():
    encoder, seen = small(*SHIFTED).encoder, []
    encoder.norm_in.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    images = torch.rand(2, 3, 32, 32)
    assert encoder(images).shape == (2, 22, 16) and encoder.num_tokens == 22
    assert torch.equal(seen[0][:, :6], encoder.queries.expand(2, -1, -1))
    patches = encoder.patches(encoder.cnn(images)) + encoder.patch_positions
    assert torch.equal(seen[0][:, 6:], patches)


def test_full_attention_first_then_causal():
    encoder = awake(small(*SHIFTED).encoder).double()
    x, change = torch.randn(1, 22, 16).double(), torch.randn(16).double()
    for part, mask, causal in (
        (encoder.transformer, None, False),
        (encoder.causal, encoder.mask, True),
    ):
        before = part(x, mask)
        for token in (0, 7, 21):
            other = x.clone()
            other[:, token] += change
            moved = ((part(other, mask) - before).abs().amax(dim=2) > 1e-12)[0].tolist()
            assert moved == [not causal or place >= token for place in range(22)]
    calls = []
    encoder.transformer.register_forward_hook(lambda m, i, o: calls.append(("full", len(i))))
    encoder.causal.register_forward_hook(lambda m, i, o: calls.append(("causal", i[1])))
    encoder(torch.rand(1, 3, 32, 32).double())
    assert calls[0] == ("full", 1)
    assert calls[1][0] == "causal" and torch.equal(calls[1][1], torch.ones(22, 22).tril().bool())


# ---------------------------------------------------------------------- the network that is read along


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    """Random weights of a small network with a class token and another prefix token."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(timm.create_model(VIT, pretrained=False).state_dict(), path)
    return path


#: In timm; of 14 px patches, four registers behind the class token.
VIT = "vit_small_patch14_reg4_dinov2.lvd142m"


def reading(file):
    node = f"{{_target_: pretrained_tokens, name: {VIT}, weights: {file}, input_size: 28}}"
    return f"tokenizer.encoder.pretrained={node}"


def test_pretrained_tokens_are_its_class_token_and_its_patches(vit_file):
    import timm

    network = PretrainedTokens(VIT, str(vit_file), 28).eval()
    model = timm.create_model(VIT, pretrained=False, num_classes=0, img_size=28).eval()
    model.load_state_dict(network.model.state_dict())
    images = torch.rand(2, 3, 28, 28) * 2 - 1
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        found = model.forward_features(((images + 1) / 2 - mean) / std)
        tokens = network(images)
    assert found.shape == (2, 1 + 4 + 4, 384) and network.num_tokens == 5 and network.dim == 384
    assert torch.allclose(tokens, found[:, [0, 5, 6, 7, 8]], atol=1e-4)


def test_the_full_blocks_read_it_and_the_causal_ones_do_not(vit_file):
    encoder, seen = small(*SHIFTED, reading(vit_file)).encoder, {}
    encoder = awake(encoder)
    for name in ("norm_in", "norm_causal"):
        part = getattr(encoder, name)
        part.register_forward_hook(lambda m, i, o, name=name: seen.update({name: i[0]}))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = encoder(images)
    assert latents.shape == (2, 22, 16) and encoder.num_tokens == 22
    assert seen["norm_in"].shape == (2, 6 + 5 + 16, 16)
    assert seen["norm_causal"].shape == (2, 22, 16)
    state = {
        k.removeprefix("pretrained_embed."): v.double() for k, v in encoder.state_dict().items()
    }
    x = encoder.pretrained(images).double() @ state["0.weight"].T
    x = F.layer_norm(x, (16,), state["1.weight"], state["1.bias"]).relu() @ state["3.weight"].T
    x = F.layer_norm(x, (16,), state["4.weight"], state["4.bias"])
    assert torch.allclose(seen["norm_in"][:, 6:11].double(), x, atol=1e-5)
    assert torch.equal(seen["norm_in"][:, :6], encoder.queries.expand(2, -1, -1))
    whole = encoder.transformer(encoder.norm_in(seen["norm_in"]), None)
    kept = torch.cat([whole[:, :6], whole[:, 11:]], dim=1)
    assert torch.allclose(seen["norm_causal"], kept, atol=1e-6)
    other = F.layer_norm(torch.randn(2, 5, 16), (16,))
    encoder.pretrained_embed.register_forward_hook(lambda m, i, o: other)
    assert not torch.allclose(encoder(images), latents, atol=1e-3)


def test_it_is_used_and_not_owned(vit_file, tmp_path):
    """It learns nothing and is in no export, which needs its file again."""
    tok = small(*SHIFTED, reading(vit_file))
    before = {k: v.clone() for k, v in tok.encoder.pretrained.module.state_dict().items()}
    names = {k.split(".")[1] for k in tok.state_dict() if k.startswith("encoder.pretrained")}
    assert names == {"pretrained_embed"}
    tok.initialize(torch.rand(64, 3, 32, 32) * 2 - 1)
    tok.train()
    tok(torch.rand(2, 3, 32, 32)).predictions["image"].value.square().mean().backward()
    assert tok.encoder.pretrained_embed[0].weight.grad.any()
    held = tok.encoder.pretrained.module
    assert not any(p.requires_grad for p in held.parameters()) and not held.training
    assert all(torch.equal(v, before[k]) for k, v in held.state_dict().items())
    tok.eval()
    images = images_of(2, 32)
    file = tmp_path / "vit.pth"
    file.write_bytes(vit_file.read_bytes())
    config = config_of("tokenizer=hita_tiny", *HITA_TINY, *SHIFTED, reading(file))
    write_export(tok, config, tmp_path / "out", {})
    assert sum(f.stat().st_size for f in (tmp_path / "out").iterdir()) < 1e6
    assert torch.equal(vistok.load(tmp_path / "out").tokenize(images), tok.tokenize(images))
    file.unlink()
    with pytest.raises(ConfigError, match=r"encoder\.pretrained\.weights=.*vit\.pth: no such file"):
        vistok.load(tmp_path / "out")


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["vit.pth", "vit.bin"])
def test_what_an_export_names_runs_no_code(name, tmp_path):
    """Exports of strangers name a file or a model, and loading them looks for it."""
    torch.save({"x": _Code(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(ConfigError, match="not weights of"):
        small(*SHIFTED, reading(tmp_path / name))
    assert not (tmp_path / "ran").exists()
    node = "{_target_: pretrained_tokens, name: 'hf-hub:a/b', weights: null, input_size: 28}"
    with pytest.raises(ConfigError, match=r"pretrained\.name=hf-hub:a/b: timm has no such model"):
        small(*SHIFTED, f"tokenizer.encoder.pretrained={node}")


# ---------------------------------------------------------------------- fusion and shift


@pytest.mark.parametrize("shift", [0, 3, 6])
def test_a_cell_is_led_by_patches_before_it_and_by_holistic_tokens(shift):
    """By gradients, for every pair of cell and token."""
    decoder = awake(small(*SHIFTED[:2], f"tokenizer.decoder.shift={shift}").decoder)
    quantized = torch.randn(1, 22, 16, requires_grad=True)
    cells = decoder.cells(quantized)
    assert cells.shape == (1, 16, 16)
    for p in range(16):
        (gradient,) = torch.autograd.grad(cells[0, p].square().sum(), quantized, retain_graph=True)
        reached = gradient[0].abs().sum(dim=1) > 0
        holistic, patches = reached[:6].tolist(), reached[6:].tolist()
        assert patches == [patch <= p - shift for patch in range(16)]
        if p >= shift:
            assert all(holistic)
        else:  # outputs of holistic tokens, which see those up to their own place
            assert holistic == [token <= 6 - shift + p for token in range(6)]


def test_the_last_patch_codes_reach_no_pixel():
    tok = awake(small(*SHIFTED))
    images = images_of(2, 32)
    ids = tok.tokenize(images)
    other = ids.clone()
    other[:, -3:] = 16 + (other[:, -3:] - 16 + 1) % 16
    assert torch.equal(tok.detokenize(other), tok.detokenize(ids))
    other[:, -4] = 16 + (other[:, -4] - 16 + 1) % 16
    assert not torch.equal(tok.detokenize(other), tok.detokenize(ids))
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 16  # a holistic one reaches the last cell too
    assert not torch.equal(tok.detokenize(other)[..., -8:, -8:], tok.detokenize(ids)[..., -8:, -8:])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"decoder\.shift=3: must be 0 to num_holistic_tokens=2"):
        small("tokenizer.decoder.shift=3")
    with pytest.raises(
        ConfigError, match=r"^tokenizer\.decoder\.cnn\.latent_dim=8: must be width=16"
    ):
        small("tokenizer.decoder.cnn.latent_dim=8")
    both = (
        r"^tokenizer\.decoder\.num_holistic_tokens=3: .*tokenizer\.encoder\.num_holistic_tokens=2$"
    )
    with pytest.raises(ConfigError, match=both):
        small("tokenizer.decoder.num_holistic_tokens=3")


# ---------------------------------------------------------------------- by hand

#: The other values of all options.
NORMALIZED = ["tokenizer.encoder.block=normalized", "tokenizer.encoder.embed=linear"]


def oracle_blocks(transformer, x, heads, causal, normalized):
    """Blocks one after the other: heads and their logits by einsum."""
    for block in transformer.blocks:
        p = dict(block.named_parameters())
        assert ("norm1.weight" in p) == ("attn.qkv.bias" in p) == (not normalized)
        p = {name: torch.zeros(()) if name.endswith("bias") else torch.ones(()) for name in NAMES} | p  # fmt: skip
        y = F.layer_norm(x, x.shape[-1:]) * p["norm1.weight"] + p["norm1.bias"]
        q, k, v = (y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).unflatten(2, (3, heads, -1)).unbind(2)  # fmt: skip
        if normalized:
            q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        logits = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
        if causal:
            later = torch.arange(x.shape[1]) > torch.arange(x.shape[1])[:, None]
            logits = logits.masked_fill(later, -torch.inf)
        y = torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), v).flatten(2)
        x = x + y @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        y = F.layer_norm(x, x.shape[-1:]) * p["norm2.weight"] + p["norm2.bias"]
        y = y @ p["mlp.gate_up.weight"].T + p["mlp.gate_up.bias"]
        gate, up = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
        x = x + (gate * gate.sigmoid() * up) @ p["mlp.down.weight"].T + p["mlp.down.bias"]
    return x


NAMES = [
    *(f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    *(f"{layer}.bias" for layer in ("attn.qkv", "attn.proj", "mlp.gate_up", "mlp.down")),
]


@pytest.mark.parametrize("normalized", [False, True])
def test_encoder_and_decoder_by_hand(normalized):
    """In float64; next to the official code without its DINOv2: docs/systems/hita.md."""
    tok = awake(small(*SHIFTED, *(NORMALIZED if normalized else []))).double()
    encoder, decoder = tok.encoder, tok.decoder
    heads = encoder.transformer.blocks[0].attn.num_heads

    def norm(net, x):
        return F.layer_norm(x, x.shape[-1:], net.weight, net.bias)

    images = torch.rand(2, 3, 32, 32).double()
    grid = encoder.cnn(images).mT.unflatten(2, (4, 4))
    if normalized:
        cells = F.linear(grid.flatten(2).mT, encoder.embed.weight, encoder.embed.bias)
    else:
        cells = F.conv2d(grid, encoder.embed.weight, encoder.embed.bias, padding=1).flatten(2).mT
    x = torch.cat([encoder.queries.expand(2, -1, -1), cells + encoder.patch_positions], dim=1)
    x = oracle_blocks(encoder.transformer, norm(encoder.norm_in, x), heads, False, normalized)
    x = oracle_blocks(encoder.causal, norm(encoder.norm_causal, x), heads, True, normalized)
    x = norm(encoder.norm_out, x) if normalized else x
    assert torch.allclose(encoder(images), x - encoder.latent_means, atol=1e-9)

    quantized = torch.randn(2, 22, 16).double()
    x = quantized @ decoder.embed.weight.T + decoder.embed.bias + decoder.positions
    x = oracle_blocks(decoder.transformer, norm(decoder.norm_in, x), heads, True, normalized)
    x = norm(decoder.norm_out, x) if normalized else x
    assert torch.allclose(decoder.cells(quantized), x[:, 3:19], atol=1e-9)


@pytest.mark.parametrize("options", [[], NORMALIZED], ids=["released", "normalized"])
def test_every_weight_learns(options):
    tok = small("data.image_size=32", *options)
    images = tok.to_model_range(images_of(16, 32))
    tok.initialize(images)
    before = {name: p.clone() for name, p in tok.named_parameters()}
    errors = errors_while_learning(tok, images, lr=2e-3, steps=40)
    assert errors[-1] < 0.7 * errors[0]
    assert not [name for name, p in tok.named_parameters() if torch.equal(p, before[name])]


# ---------------------------------------------------------------------- ids


def test_two_codebooks_in_one_vocabulary():
    tok = small(*SHIFTED)
    images = images_of(8, 32)
    tok.initialize(tok.to_model_range(images))
    ids = tok.tokenize(images)
    assert ids.shape == (8, 22, 1) and tok.num_tokens == 22
    assert (ids[:, :6] < 16).all() and (ids[:, 6:] >= 16).all() and (ids < 32).all()
    assert tok.bits_per_image == 22 * 4  # positions say which codebook
    books = tok.quantizer.books
    assert not torch.equal(books[0].embedding, books[1].embedding)
    assert torch.equal(tok.codebooks()[0], torch.cat([b.embedding for b in books]))


def test_an_id_of_the_wrong_kind_is_refused():
    tok = small(*SHIFTED)
    ids = tok.tokenize(images_of(2, 32))
    for place, value, words in ((0, 20, "holistic token holds the id of a patch"), (9, 3, "patch token holds the id of a holistic")):  # fmt: skip
        bad = ids.clone()
        bad[1, place] = value
        with pytest.raises(ConfigError, match=words):
            tok.detokenize(bad)
    with pytest.raises(ConfigError, match="valid are 0 to 31"):
        tok.detokenize(ids + 16)
    with pytest.raises(ConfigError, match="fixed length of 22 tokens"):
        tok.detokenize(ids[:, :6])


def test_an_export_says_whose_ids_are_whose(tmp_path):
    words = [*SHIFTED, "quantizer=vq", "quantizer.codebook_size=16", "quantizer.codebook_dim=8"]
    from helpers import SIZES, TINY
    from vistok.export.exporter import write_export

    base = [w for w in TINY if not w.startswith(("tokenizer.", "quantizer."))]
    config = config_of("tokenizer=hita_tiny", *base, *SIZES["hita_tiny"], *words)
    tok = build_tokenizer(config).eval()
    io = describe(tok, config)["io"]
    assert io["token_order"] == "holistic" and io["codebook_sizes"] == [32]
    tensors = codebook_tensors(tok)
    assert tensors["codebook.0"].shape == (32, 8) and tensors["decoder_input"].shape == (32, 16)
    ids = tok.tokenize(images_of(2, 32))
    vectors = tensors["decoder_input"][ids[..., 0]]
    torch.testing.assert_close(vectors, tok.quantizer.decode(ids))  # the product of other rows
    write_export(tok, config, tmp_path / "out", {})
    back = vistok.load(tmp_path / "out")
    assert torch.equal(back.detokenize(ids), tok.detokenize(ids))


def test_a_quantizer_of_its_own_for_the_holistic_tokens():
    with torch.device("meta"):
        tok = build_tokenizer(config_of("experiment=hita_336", ALONE))
    assert [book.codebook_dim for book in tok.quantizer.books] == [12, 8]
    assert tok.quantizer.codebook_sizes == (32768,)
    assert tok.num_tokens == 128 + 21 * 21 == 569 and tok.bits_per_image == 569 * 14
    assert tok.codebooks()[0].shape == (32768, 12)


# ---------------------------------------------------------------------- whole ones


def test_paper_size_forward_and_backward_on_the_meta_device():
    with torch.device("meta"):
        tok = build_tokenizer(config_of("experiment=hita_336", ALONE)).train()
        latents = tok.encoder(torch.zeros(1, 3, 336, 336))
        assert latents.shape == (1, 569, 512)
        pictures = tok.decoder.reconstruct(latents)
        assert pictures.shape == (1, 3, 336, 336)
        pictures.sum().backward()
    unused = [n for n, p in tok.named_parameters() if p.grad is None]
    assert all(n.startswith("quantizer") for n in unused), unused
    assert tok.decoder.first == 124  # outputs 124 to 564 are the cells
    hidden = tok.encoder.transformer.blocks[0].mlp.down.in_features
    assert hidden == 1368  # the released code rounds 1365 up to a multiple of 8


def test_activation_checkpointing_keeps_the_gradients():
    results = []
    for flag in ("false", "true"):
        options = [f"tokenizer.{part}.activation_checkpointing={flag}" for part in ("encoder", "decoder")]  # fmt: skip
        tok = awake(small(*options).train())
        torch.manual_seed(1)
        output = tok(tok.to_model_range(images_of(4)))
        (
            output.predictions["image"].value - output.predictions["image"].target
        ).square().mean().backward()
        results.append([p.grad for p in tok.parameters()])
    assert sum(g is not None and bool(g.any()) for g in results[0]) > 20
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_tiny_one_learns_with_both_codebooks():
    """With norms at the end, without which so small a network soon needs a few holistic codes."""
    torch.manual_seed(0)
    tok = small("quantizer.codebook_size=64", *NORMALIZED)
    x = tok.to_model_range(images_of(24))
    tok.initialize(x)
    for part in tok.tokenize(images_of(24)).split([2, 4], dim=1):
        assert len(part.unique()) > 8
    errors = errors_while_learning(tok, x, lr=3e-3, steps=60)
    assert sum(errors[-5:]) < 0.8 * sum(errors[:5])
    for part in tok.eval().tokenize(images_of(24)).split([2, 4], dim=1):
        assert len(part.unique()) > 3
