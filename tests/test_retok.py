"""ReTok: a padded tail in training and none outside, and a teacher who cares for short codes."""

import math

import pytest
import torch
import torch.nn.functional as F

import vistok
from helpers import (
    SIZES,
    TINY,
    aligned,
    awake,
    config_of,
    errors_while_learning,
    images_of,
    stepped,
    tiny_tokenizer,
)
from vistok.cli import train
from vistok.core.errors import ConfigError
from vistok.losses.alignment import length_weights
from vistok.models.build import build_tokenizer
from vistok.models.length import LengthPolicy
from vistok.models.qformer import QFormerDecoder
from vistok.tasks.reconstruction import TokenizerModule

N, M = 4, 3  # tokens and padding of the small one: queries 1 to 3 are repeated


def small(*overrides):
    return tiny_tokenizer(*overrides, tokenizer="retok_tiny")


# ---------------------------------------------------------------------- redundant token padding


def test_queries_are_repeated_with_positions_of_their_own():
    encoder, seen = small().encoder, []
    encoder.transformer.blocks[0].register_forward_hook(lambda b, i, o: seen.append(i))
    latents = encoder.padded(torch.rand(2, 3, 16, 16))
    queries, _, positions = seen[0][:3]
    assert latents.shape == (2, N + M, 16) and positions.shape == (N + M, 16)
    assert torch.equal(queries[:, N:], queries[:, 1:N])
    rows = {tuple(row) for row in positions.tolist()}
    assert len(rows) == N + M
    assert torch.equal(encoder(torch.ones(1, 3, 16, 16)), encoder.padded(torch.ones(1, 3, 16, 16))[:, :N])  # fmt: skip


def test_lengths_reach_into_the_padding(monkeypatch):
    tok, seen = small().train(), []
    forward = tok.decoder.forward
    monkeypatch.setattr(
        tok.decoder, "forward", lambda q, x, m=None, **k: (seen.append(q), forward(q, x, m))[1]
    )
    images = tok.to_model_range(images_of(3))
    for _ in range(60):
        output = tok(images)
        assert output.quantizer.indices.shape == (3, N + M, 1)  # all of them are quantized
        kept = int(output.mask.sum(dim=1)[0])
        assert output.mask.shape == (3, N + M)
        assert torch.equal(seen[-1], output.quantizer.quantized[:, :kept])
    assert {q.shape[1] for q in seen} == set(range(1, N + M + 1))


def test_the_last_token_of_the_code_does_not_starve():
    """Of 256 tokens with 224 of padding it is seen in 225 of 480 steps, without in 1 of 256."""
    torch.manual_seed(0)
    draws = 20000
    for total, share in ((480, 225 / 480), (256, 1 / 256)):
        seen = (LengthPolicy("uniform")(draws, total) >= 256).double().mean().item()
        assert abs(seen - share) < 5 * math.sqrt(share * (1 - share) / draws)


def test_padding_is_thrown_away_outside_training():
    tok = awake(small())
    images = images_of(4)
    ids = tok.tokenize(images)
    assert ids.shape == (4, N, 1) and tok.num_tokens == N
    assert tok.bits_per_image == N * tok.quantizer.bits_per_token
    with torch.no_grad():
        output = tok(tok.to_model_range(images))
    assert output.mask is None and output.quantizer.indices.shape == (4, N, 1)
    before = tok.detokenize(ids)
    quantized = torch.randn(2, N + M, 16)
    trained = tok.decoder.reconstruct(quantized)
    with torch.no_grad():
        tok.decoder.latent_positions[N:] += torch.randn(M, 16)
    assert torch.equal(tok.detokenize(ids), before)
    assert not torch.equal(tok.decoder.reconstruct(quantized), trained)
    with pytest.raises(ConfigError, match="num_tokens=5: must be 1 to 4"):
        tok.tokenize(images, num_tokens=N + 1)


def test_kept_tokens_alone_get_gradients():
    tok = awake(small())
    for kept in (2, N + M):
        quantized = torch.randn(2, N + M, 16, requires_grad=True)
        tok.zero_grad()
        tok.decoder.reconstruct(quantized[:, :kept]).square().mean().backward()
        reached = quantized.grad.abs().sum(dim=(0, 2)) > 0
        assert reached.tolist() == [True] * kept + [False] * (N + M - kept)
        positions = tok.decoder.latent_positions.grad.abs().sum(dim=1) > 0
        assert positions.tolist() == reached.tolist()


def test_grid_queries_are_the_first_token_of_any_prefix():
    decoder, seen = small().decoder, []
    decoder.transformer.blocks[0].register_forward_hook(lambda b, i, o: seen.append(i))
    quantized = torch.randn(2, N + M, 16)
    for kept in (1, 3, N + M):
        decoder.reconstruct(quantized[:, :kept])
        queries, memory, _, positions = seen[-1][:4]
        assert memory.shape[1] == len(positions) == kept
        assert torch.equal(queries, seen[0][0])
        assert torch.equal(positions, decoder.latent_positions[:kept])


def test_wrong_paddings_are_refused():
    with pytest.raises(ConfigError) as error:
        small("tokenizer.encoder.padding_start=8", "tokenizer.encoder.num_latent_tokens=8")
    assert str(error.value).startswith("tokenizer.encoder.padding_start=8: must be 0 to 7, or null")
    assert str(error.value).endswith("is 1")
    small("tokenizer.encoder.padding_start=1", "tokenizer.encoder.num_latent_tokens=8")
    with pytest.raises(ConfigError, match=r"decoder\.padding_start: .* must be the encoder's 1"):
        small("tokenizer.decoder.padding_start=null")
    assert small("tokenizer.encoder.padding_start=null").encoder.latent_positions.shape == (4, 16)


# ---------------------------------------------------------------------- the teacher


def test_weights_of_lengths():
    mask = torch.arange(4) < torch.tensor([1, 2, 3, 4])[:, None]
    assert length_weights(mask).tolist() == [1, 0.75, 0.5, 0.25]


@pytest.fixture(scope="module")
def teacher_words(tmp_path_factory):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "vit.pth"
    name = "vit_tiny_patch16_224"
    torch.save(timm.create_model(name, pretrained=False).state_dict(), path)
    words = [f"name={name}", f"weights={path}", "input_size=32"]
    words = [f"loss.terms.alignment.teacher.{word}" for word in words]
    return ["alignment=retok", *words, "loss.terms.alignment.tap=decoder.block.0"]


def module(words, name="retok_tiny"):
    base = [w for w in TINY if not w.startswith("tokenizer.")]
    torch.manual_seed(0)
    built = TokenizerModule(config_of(f"experiment={name}", *base, *SIZES[name], *words)).train()
    awake(built.tokenizer)
    return built


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_regularisation_weighs_short_codes_more(teacher_words, per):
    m = module([*teacher_words, f"tokenizer.length.per={per}"])
    images, kept = m.tokenizer.to_model_range(images_of(6)), []
    m.tokenizer.decoder.transformer.blocks[0].register_forward_hook(
        lambda block, inputs, output: kept.append(output)
    )
    step = stepped(m, images)
    output = step.output
    value = m.objective.terms["alignment"](step)
    features = m.objective.terms["alignment"].teacher(images).flatten(2).transpose(1, 2)
    cosine = F.cosine_similarity(
        m.objective.terms["alignment"].projector(kept[0]), features, dim=-1
    )
    lengths = output.mask.sum(dim=1)
    expected = sum(
        (1 - (k - 1) / (N + M)) * (1 - row.mean()) for k, row in zip(lengths, cosine, strict=True)
    )
    assert value.item() == pytest.approx(expected.item() / 6, abs=1e-5)
    assert (per == "batch") == (len(lengths.unique()) == 1)


def test_whom_the_regularisation_teaches(teacher_words):
    m = module([*teacher_words, "tokenizer.decoder.depth=2"])
    images = m.tokenizer.to_model_range(images_of(4))
    aligned(m, images).backward()
    reached = {n for n, p in m.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("objective.terms.alignment.projector", "tokenizer.encoder", "tokenizer.decoder.transformer.blocks.0"):  # fmt: skip
        assert any(n.startswith(part) for n in reached), part
    for part in ("tokenizer.decoder.transformer.blocks.1", "tokenizer.decoder.cnn"):
        assert not any(n.startswith(part) for n in reached), part


def test_a_run_weighs_the_lengths_that_it_drew(teacher_words, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    masks, kept = [], []
    monkeypatch.setattr(
        "vistok.losses.alignment.length_weights", lambda m: masks.append(m) or length_weights(m)
    )
    reconstruct = QFormerDecoder.reconstruct

    def spy(self, quantized, mask=None, **more):
        if self.training:
            kept.append(quantized.shape[1])
        return reconstruct(self, quantized, mask, **more)

    monkeypatch.setattr(QFormerDecoder, "reconstruct", spy)
    words = [w for w in TINY if not w.startswith("tokenizer.")]
    words = ["experiment=retok_tiny", *words, *SIZES["retok_tiny"], "data=folder"]
    words += [f"data.train={photos}", "data.val_fraction=0.2", "data.image_size=16"]
    assert train([*words, *teacher_words]) == 0
    assert [m.sum(dim=1).tolist() for m in masks] == [[k] * 4 for k in kept]
    assert len(masks) == 4 and len(set(kept)) > 1


def test_forms_of_alignment_that_do_not_fit_are_refused(teacher_words):
    with pytest.raises(
        ConfigError, match=r"^loss\.terms\.alignment\._target_.*GigaTok has only one"
    ):
        module(teacher_words, "gigatok_tiny")


# ---------------------------------------------------------------------- whole ones


@pytest.mark.parametrize(("name", "published"), [("retok_s_s", 136), ("retok_s_b", 232)])
def test_parameters_within_two_per_cent_of_the_published(name, published):
    """Millions, with the projection to 768 features that the released models count."""
    with torch.device("meta"):
        tok = build_tokenizer(config_of(f"experiment={name}"))
    width = tok.decoder.embed.out_features
    projection = 4 * width * width + 16 * width * width + 4 * width * 768
    found = sum(p.numel() for p in tok.parameters()) + projection
    assert found / 1e6 == pytest.approx(published, rel=0.02)
    assert tok.decoder.latent_positions.shape[0] == tok.encoder.latent_positions.shape[0] == 480


def test_paper_size_forward_and_backward_on_the_meta_device():
    with torch.device("meta"):
        tok = build_tokenizer(config_of("experiment=retok_s_s")).train()
        latents = tok.encode(torch.zeros(1, 3, 256, 256))
        assert latents.shape == (1, 480, 256)
        pictures = tok.decoder.reconstruct(latents[:, :300])
        assert pictures.shape == (1, 3, 256, 256)
        pictures.sum().backward()
        assert tok.eval().encode(torch.zeros(1, 3, 256, 256)).shape == (1, 256, 256)
    unused = [n for n, p in tok.named_parameters() if p.grad is None]
    assert all(n.startswith("quantizer") for n in unused), unused


def test_the_decoder_alone_is_trained_on(photos, tmp_path, monkeypatch):
    """The last phase of the paper: from a run, with encoder and quantizer as they are."""
    monkeypatch.chdir(tmp_path)
    words = [w for w in TINY if not w.startswith("tokenizer.")]
    words = ["experiment=retok_tiny", *words, *SIZES["retok_tiny"], "data=folder"]
    words += [f"data.train={photos}", "data.val_fraction=0.2", "data.image_size=16"]
    assert train([*words, "hydra.run.dir=first"]) == 0
    words += ["init_from=first", "stage.frozen=[encoder,quantizer]"]
    assert train([*words, "hydra.run.dir=second"]) == 0
    first = vistok.load("first").state_dict()  # what init_from takes
    second = vistok.load("second/checkpoints/last.ckpt", weights="last").state_dict()
    moved = {key for key, value in first.items() if not torch.equal(value, second[key])}
    assert moved and all(key.startswith("decoder.") for key in moved), moved


def test_a_tiny_one_learns():
    torch.manual_seed(0)
    tok = small("quantizer.codebook_size=64")
    x = tok.to_model_range(images_of(24))
    tok.initialize(x)
    errors = errors_while_learning(tok, x, lr=3e-3, steps=60)
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])
