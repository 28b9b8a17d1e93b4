"""TA-TiTok: where the text goes, that it says what tokens can't, and that it may be missing."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from helpers import SIZES, TINY, config_of, images_of, picture, tiny_tokenizer
from vistok.cli import evaluate, export, train
from vistok.core.errors import ConfigError
from vistok.data.shards import ShardWriter
from vistok.models.flexible import rounded_psnr
from vistok.systems.ta_titok.decoder import TextTransformerDecoder
from vistok.tasks.reconstruction import Reconstruction


def decoder(**options):
    torch.manual_seed(0)
    settings = {"text_dim": 6, "num_text_tokens": 3, **options}
    return TextTransformerDecoder([16, 24], 3, 8, 4, 12, 16, 2, 2, **settings).eval()


def test_text_tokens_come_last():
    net, seen = decoder(), []
    net.transformer.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    quantized, text = torch.randn(2, 4, 12), torch.randn(2, 3, 6)
    with torch.no_grad():
        net.reconstruct(quantized, text=text)
        net.reconstruct(quantized)
        own = net.norm_in(net.text_embed(text) + net.text_positions)
        none = net.norm_in(net.no_text + net.text_positions).expand(2, -1, -1)
    assert seen[0].shape == (2, 1 + 6 + 4 + 3, 16)  # class token, patches, latents, text
    assert torch.allclose(seen[0][:, -3:], own, atol=1e-6)
    assert torch.allclose(seen[1][:, -3:], none, atol=1e-6)
    assert torch.equal(seen[0][:, :-3], seen[1][:, :-3])


def test_every_text_token_has_a_say_in_its_own_picture_alone():
    net = decoder()
    quantized, text = torch.randn(2, 4, 12), torch.randn(2, 3, 6)
    with torch.no_grad():
        before = net.reconstruct(quantized, text=text)
        assert not torch.allclose(net.reconstruct(quantized), before, atol=1e-4)
        for j in range(3):
            other = text.clone()
            other[0, j] += 3 * torch.randn(6)
            after = net.reconstruct(quantized, text=other)
            assert not torch.allclose(after[0], before[0], atol=1e-4)
            assert torch.allclose(after[1], before[1], atol=1e-5)


def test_masked_tokens_do_not_hide_the_text():
    net = decoder()
    quantized, text = torch.randn(2, 4, 12), torch.randn(2, 3, 6)
    mask = torch.arange(4) < torch.tensor([[4], [2]])
    with torch.no_grad():
        masked = net.reconstruct(quantized, mask, text=text)
        assert torch.allclose(masked[1:], net.reconstruct(quantized[1:, :2], text=text[1:]), atol=1e-5)  # fmt: skip
        assert torch.allclose(masked[:1], net.reconstruct(quantized[:1], text=text[:1]), atol=1e-5)
        assert not torch.allclose(net.reconstruct(quantized, mask), masked, atol=1e-4)


def test_the_share_of_texts_left_out():
    text = torch.randn(600, 3, 6)
    shares = []
    for share in (0.0, 0.3, 1.0):
        net = decoder(text_dropout=share)
        with torch.no_grad():
            none = net.text_tokens(None, 600)
            assert not torch.allclose(net.text_tokens(text, 600), none)  # all of it in eval
            torch.manual_seed(1)
            same = torch.isclose(net.train().text_tokens(text, 600), none).flatten(1).all(1)
        shares.append(same.float().mean().item())
    assert shares[0] == 0 and shares[2] == 1 and abs(shares[1] - 0.3) < 5 * (0.3 * 0.7 / 600) ** 0.5


def test_every_parameter_learns_in_every_step():
    """Several ranks want that, also when chance leaves out no text."""
    for share in (0.0, 1.0):
        net = decoder(text_dropout=share).train()
        net(torch.randn(2, 4, 12), torch.randn(2, 3, 16, 24), text=torch.randn(2, 3, 6))["image"].value.sum().backward()  # fmt: skip
        assert not [n for n, p in net.named_parameters() if p.grad is None]


def test_the_calls_of_users():
    tok = tiny_tokenizer(tokenizer="ta_titok_tiny")
    ids, text = tok.tokenize(images_of(2)), torch.randn(2, 3, 6)
    pictures = tok.detokenize(ids, text=text.half())  # as shards hold it
    assert torch.allclose(pictures, tok.detokenize(ids, text=text.half().float()), atol=1e-6)
    assert not torch.allclose(pictures, tok.detokenize(ids), atol=1e-4)
    with pytest.raises(ConfigError, match=r"text: expected features \(2, 3, 6\).*\(2, 6\)"):
        tok.detokenize(ids, text=text[:, 0])
    with pytest.raises(ConfigError, match=r"of a text tower, found list"):
        tok.detokenize(ids, text=["a dog", "a cat"])
    with pytest.raises(ConfigError, match="LatentTransformerDecoder takes no such argument"):
        tiny_tokenizer().detokenize(tok.tokenize(images_of(2)), text=text)
    with pytest.raises(ConfigError, match="text_dropout=2"):
        tiny_tokenizer("tokenizer.decoder.text_dropout=2", tokenizer="ta_titok_tiny")


def test_a_text_says_what_tokens_cannot():
    """One token of two codes, four colours: the colour is in the text alone."""
    torch.manual_seed(0)
    words = ["quantizer.codebook_size=2", "tokenizer.encoder.num_latent_tokens=1"]
    words += ["tokenizer.decoder.width=32", "tokenizer.decoder.text_dropout=0.2"]
    tok = tiny_tokenizer(*words, tokenizer="ta_titok_tiny")
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]]) * 0.8

    def batch(count):
        which = torch.randint(4, (count,))
        images = colours[which][:, :, None, None].expand(-1, 3, 16, 16).clone()
        dark = torch.randint(2, (count,)).bool()  # the one bit that the token has room for
        images[dark, :, 8:] = -0.9
        text = torch.zeros(count, 3, 6)
        text[:, 1, :4] = torch.eye(4)[which] * 2
        return images, text

    images, _ = batch(64)
    tok.initialize(images)
    tok.train()
    optimizer = torch.optim.AdamW(tok.parameters(), 3e-3)
    for _ in range(150):
        images, text = batch(32)
        output = tok(images, text=text)
        loss = (
            (output.predictions["image"].value - output.predictions["image"].target).square().mean()
        )
        loss = loss + 0.25 * output.quantizer.losses["commitment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tok.quantizer.after_step([optimizer])
    tok.eval()
    images, text = batch(64)
    ids = tok.tokenize((images + 1) / 2)

    def error(**text):
        return (tok.detokenize(ids, **text) * 2 - 1 - images).square().mean().item()

    right, none, wrong = error(text=text), error(), error(text=text.roll(1, 0))
    flat = (images.mean(dim=(0, 2, 3), keepdim=True) - images).square().mean().item()
    assert right < 0.3 * none and none < wrong
    assert none < 1.1 * flat  # without a text the best it can do is the mean of the colours


def test_a_flexible_tokenizer_reads_texts_too():
    words = ["tokenizer.decoder._target_=text_decoder", "+tokenizer.decoder.text_dim=6"]
    words += ["+tokenizer.decoder.num_text_tokens=3", "+tokenizer.decoder.text_dropout=0.1"]
    tok = tiny_tokenizer(*words, tokenizer="one_d_piece_tiny")
    images, text = images_of(5), torch.randn(5, 3, 6)
    ids = tok.tokenize(images)
    quality = [rounded_psnr(tok.detokenize(ids, k, text=text), images / 255) for k in (1, 2, 3, 4)]
    values = torch.stack(quality).flatten().sort().values
    target = values[9:11].mean().item()  # no picture's own: batches of other sizes round otherwise
    _, lengths = tok.tokenize_to_target(images, psnr=target, text=text)
    for row, k in enumerate(lengths.tolist()):
        assert k == next((j + 1 for j in range(3) if quality[j][row] >= target), 4)
    tok.train()(tok.to_model_range(images), text=text).predictions["image"].value.sum().backward()
    assert tok.decoder.text_embed.weight.grad.any()


# ---------------------------------------------------------------------- runs


def write_captioned(folder):
    """Pictures with texts of 3 x 6 numbers, as shards; returns their paths."""
    with ShardWriter(folder, "train") as writer:
        for number in range(20):
            image, text = io.BytesIO(), io.BytesIO()
            Image.fromarray(picture(number)).save(image, "png")
            np.save(text, np.random.default_rng(number).normal(size=(3, 6)).astype(np.float16))
            writer.write(image.getvalue(), "png", others={"text.npy": text.getvalue()})
    return f"{folder}/train-*.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("captioned"))


@pytest.fixture(scope="module")
def words(shards):
    words = [w for w in TINY if w not in SIZES["titok_tiny"]] + SIZES["ta_titok_tiny"]
    return ["experiment=ta_titok_tiny", *words, f"data.train={shards}", f"data.val={shards}"]


@pytest.mark.slow
def test_a_run_reads_texts_from_shards(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    original = TextTransformerDecoder.text_tokens

    def spy(self, text, batch):
        seen.append((self.training, text))
        return original(self, text, batch)

    monkeypatch.setattr(TextTransformerDecoder, "text_tokens", spy)
    assert train([*words, "trainer.max_steps=3", "hydra.run.dir=run"]) == 0
    trained = [text for training, text in seen if training]
    assert len(trained) == 3 and all(t.shape == (4, 3, 6) and t.any() for t in trained)
    judged = [text for training, text in seen if not training and text is not None]
    pictures = config_of(*words)["callbacks"]["num_pictures"]
    assert sum(map(len, judged)) == 20 + min(20, pictures)  # validation and its picture too
    assert train(["resume=run", "trainer.max_steps=5"]) == 0
    assert evaluate(["run=run", "out=with"]) == 0
    assert evaluate(["run=run", "out=without", "data.fields=[]"]) == 0
    assert "decoded without text; data.fields=[text] reads it" in capsys.readouterr().out
    assert export(["run=run", "out=x"]) == 0
    files = ["data=shards", f"data.val={words[-1].partition('=')[2]}"]
    assert evaluate(["run=run", "out=other", *files]) == 0  # another kind of data
    assert evaluate(["run=x", "out=exported", *files]) == 0
    assert "decoded without" not in capsys.readouterr().out
    found = {
        f: json.loads(Path(f"{f}/metrics.json").read_text())
        for f in ("with", "without", "other", "exported")
    }
    assert found["with"]["psnr"] != found["without"]["psnr"]
    for name in ("other", "exported"):
        assert found[name]["psnr"] == pytest.approx(found["with"]["psnr"], abs=1e-9)
    drawn = [Path(f"{f}/reconstructions.png").read_bytes() for f in found]
    assert drawn[0] != drawn[1] and drawn[0] == drawn[2] == drawn[3]
    assert [f["conditions"] for f in found.values()] == [["text"], [], ["text"], ["text"]]
    tok, back = vistok.load("run"), vistok.load("x")
    ids, text = tok.tokenize(images_of(2)), torch.randn(2, 3, 6)
    assert torch.equal(back.tokenize(images_of(2)), ids)
    assert torch.equal(back.detokenize(ids, text=text), tok.detokenize(ids, text=text))
    assert not torch.equal(back.detokenize(ids), back.detokenize(ids, text=text))


def test_a_run_without_texts_is_refused(fails, words, photos):
    fails("train", *words, "data.fields=[]", words=("data.fields: must hold text", ".text.npy"))
    folder = [w for w in words if not w.startswith(("data.train", "data.val="))]
    fails("train", *folder, "data=folder", f"data.train={photos}", words="no member .text.npy")


def test_images_without_texts_are_not_evaluated_silently(
    fails, words, photos, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert train([*words, "trainer.max_steps=1", "hydra.run.dir=run"]) == 0
    other = ["run=run", "data=folder", f"data.val={photos}"]
    fails("evaluate", *other, words=("no member .text.npy", "data.fields=[] reads none"))
    assert evaluate([*other, "data.fields=[]"]) == 0


def test_other_tokenizers_know_nothing_of_it():
    module = Reconstruction(config_of(*TINY))
    batch = {"image": images_of(2), "text": torch.zeros(2, 3, 6)}
    assert module.tokenizer.conditions_of(batch) == {}
    assert "text" in tiny_tokenizer(tokenizer="ta_titok_tiny").conditions_of(batch)
