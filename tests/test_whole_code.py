"""The whole code in every step: a flexible tokenizer that decodes twice, and its loss."""

import math
import warnings

import pytest
import torch

from helpers import SIZES, TINY, config_of, images_of, needs_hed, stepped, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.models.flexible import prefix_mask
from vistok.tasks.reconstruction import Reconstruction

WHOLE = "tokenizer.length.whole=true"
painters = pytest.mark.parametrize("name", ["one_d_piece_tiny", "retok_tiny", "restok_tiny"])


def drawn_as(tok, monkeypatch, length):
    """Let the policy draw one length."""
    monkeypatch.setattr(
        type(tok.length), "forward", lambda self, batch, *_: torch.full((batch,), length)
    )


def spied(tok, monkeypatch):
    """Lengths of the codes that the decoder was given."""
    seen = []
    forward = tok.decoder.forward

    def spy(quantized, *args, **more):
        seen.append(quantized.shape[1])
        return forward(quantized, *args, **more)

    monkeypatch.setattr(tok.decoder, "forward", spy)
    return seen


@painters
@pytest.mark.parametrize("kept", [1, 3, 4])
def test_the_second_prediction_is_decoded_from_the_whole_code(name, kept, monkeypatch):
    tok = tiny_tokenizer(WHOLE, tokenizer=name).train()
    assert tok.heads == {"image": "pixels", "whole_image": "pixels"}
    images = tok.to_model_range(images_of(3))
    tok.initialize(images)
    drawn_as(tok, monkeypatch, kept)
    output = tok(images)
    code = output.quantizer.quantized[:, :4]  # ReTok's padding lies behind
    drawn, whole = (output.predictions[key] for key in ("image", "whole_image"))
    assert torch.allclose(whole.value, tok.decode(code), atol=1e-3)
    shorter = tok.decode(code, prefix_mask(torch.full((3,), kept), 4))
    assert torch.allclose(drawn.value, shorter, atol=1e-3)
    assert torch.allclose(drawn.value, whole.value, atol=1e-3) == (kept == 4)
    assert torch.equal(whole.target, images) and whole.kind == "pixels"


def test_the_decoder_works_once_where_all_tokens_are_kept(monkeypatch):
    tok = tiny_tokenizer(WHOLE, tokenizer="one_d_piece_tiny").train()
    seen = spied(tok, monkeypatch)
    images = tok.to_model_range(images_of(3))
    tok(images)
    for kept, decodings in ((3, 2), (4, 1)):
        drawn_as(tok, monkeypatch, kept)
        seen.clear()
        tok(images)
        assert seen == [kept, 4][-decodings:]
    tok.eval()
    seen.clear()
    output = tok(images)
    assert len(seen) == 1
    assert output.predictions["image"].value is output.predictions["whole_image"].value


@painters
def test_every_token_gets_a_gradient_in_every_step(name, monkeypatch):
    tok = tiny_tokenizer(WHOLE, tokenizer=name).train()
    images = tok.to_model_range(images_of(3))
    tok.initialize(images)
    drawn_as(tok, monkeypatch, 1)
    found = {}
    quantize = tok.quantize

    def spy(latents):
        found["quantized"] = quantize(latents)
        found["quantized"].quantized.retain_grad()
        return found["quantized"]

    monkeypatch.setattr(tok, "quantize", spy)
    for head, tail in (("image", False), ("whole_image", True)):
        said = tok(images).predictions[head]
        (said.value - said.target).square().mean().backward()
        moved = (found["quantized"].quantized.grad[:, :4] != 0).any(dim=2)
        assert moved[:, 0].all() and (moved[:, 1:] == tail).all()


def test_published_laws_predict_once():
    tok = tiny_tokenizer(tokenizer="one_d_piece_tiny").train()
    assert tok.heads == {"image": "pixels"}
    assert set(tok(tok.to_model_range(images_of(2))).predictions) == {"image"}


def whole_task(*words, loss="log_mse_whole", tokenizer="one_d_piece_tiny"):
    more = [w for w in TINY if w not in SIZES["titok_tiny"] and not w.startswith("loss=")]
    words = [f"tokenizer={tokenizer}", f"loss={loss}", *more, *SIZES[tokenizer], *words]
    torch.manual_seed(0)
    return Reconstruction(config_of(*words))


@pytest.mark.parametrize("kept", [2, 4])
def test_the_objective_weighs_both_pictures(kept, monkeypatch):
    task = whole_task(WHOLE, "quantizer.commitment_weight=0.5")
    tok = task.tokenizer.train()
    images = tok.to_model_range(images_of(5))
    tok.initialize(images)
    drawn_as(tok, monkeypatch, kept)
    step = stepped(task, images)
    losses = task.objective(step)
    code = step.output.quantizer.quantized.detach()
    errors = [(tok.decode(code[:, :k]) - images).double().square().mean() for k in (kept, 4)]
    first, second = (math.log(error.item() + 1e-4) for error in errors)
    assert losses["reconstruction"].item() == pytest.approx(first, rel=1e-5)
    assert losses["whole"].item() == pytest.approx(second, rel=1e-5)
    expected = 0.0075 * first + 0.0225 * second + 0.5 * losses["commitment"].item()
    assert losses["total"].item() == pytest.approx(expected, rel=1e-5)


@needs_hed
@pytest.mark.parametrize("kept", [2, 4])
def test_a_perceptual_term_looks_at_each_picture_once(kept, monkeypatch):
    task = whole_task(WHOLE, "quantizer.commitment_weight=0.5", loss="log_mse_whole_hed_vgg")
    tok = task.tokenizer.train()
    images = tok.to_model_range(images_of(3))
    tok.initialize(images)
    drawn_as(tok, monkeypatch, kept)
    step, seen = stepped(task, images), []
    networks = [
        task.objective.terms[name].network.module for name in ("perceptual", "perceptual_whole")
    ]
    look = networks[0].maps
    for network in networks:
        monkeypatch.setattr(network, "maps", lambda x: seen.append(x.requires_grad) or look(x))
    losses = task.objective(step)
    assert sorted(seen) == [False, True] + [True] * (kept < 4)  # the originals, and the pictures
    code = step.output.quantizer.quantized.detach()
    pictures = [tok.decode(code[:, :k]) for k in (kept, 4)]
    expected = [networks[0].distances(look(x), look(images)).mean().item() for x in pictures]
    found = [losses[name].item() for name in ("perceptual", "perceptual_whole")]
    assert found == pytest.approx(expected, rel=1e-3)
    weights = {"reconstruction": 0.03, "whole": 0.09, "perceptual": 0.1, "perceptual_whole": 0.3}
    total = sum(weight * losses[name].item() for name, weight in weights.items())
    assert losses["total"].item() == pytest.approx(
        total + 0.5 * losses["commitment"].item(), rel=1e-5
    )


def test_a_mask_gives_the_objective_of_truncation(monkeypatch):
    """Check the branch that torch.compile traces: it masks where eager code truncates."""
    task = whole_task(WHOLE)
    tok = task.tokenizer.train()
    images = tok.to_model_range(images_of(5))
    tok.initialize(images)
    drawn_as(tok, monkeypatch, 2)
    cut = task.objective(stepped(task, images))["total"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        masked = task.objective(stepped(task, images))["total"]
    assert masked.item() == pytest.approx(cut.item(), rel=1e-5)


def test_a_whole_code_that_nobody_compares_is_refused():
    words = r"^tokenizer\.length\.whole=true: no term of the loss compares whole_image; set loss="
    with pytest.raises(ConfigError, match=words):
        whole_task(WHOLE, loss="log_mse")


@pytest.mark.parametrize(
    ("tokenizer", "more"),
    [("restok_tiny", r"set tokenizer\.length\.whole=true, or"), ("titok_tiny", "has one length")],
)
def test_a_term_of_a_whole_code_that_is_not_predicted_is_refused(tokenizer, more):
    words = rf"^loss\.terms\.whole\.of=whole_image: the tokenizer does not also decode .*{more}.*of=image$"
    with pytest.raises(ConfigError, match=words):
        whole_task(tokenizer=tokenizer)


def test_a_quantizer_without_prefixes_keeps_the_second_prediction():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tok = tiny_tokenizer("quantizer=var", WHOLE, tokenizer="one_d_piece_tiny").train()
    assert set(tok(tok.to_model_range(images_of(2))).predictions) == set(tok.heads)
