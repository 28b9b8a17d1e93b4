"""Codes of any length: ids, progressive pictures, budgets, targets, and ids as bytes."""

import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch

from helpers import awake, images_of, loud, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.metrics.image import PSNR, to_uint8
from vistok.models.flexible import prefix_mask, rounded_psnr
from vistok.models.length import LengthPolicy
from vistok.models.packing import pack, packed_size, unpack

FLEXIBLE = ["one_d_piece_tiny", "flextok_tiny", "retok_tiny", "restok_tiny"]
flexible = pytest.mark.parametrize("name", FLEXIBLE)


@flexible
def test_shorter_ids_are_a_prefix(name):
    tok = tiny_tokenizer(tokenizer=name)
    images = images_of(20)
    tok.initialize(tok.to_model_range(images))
    ids = tok.tokenize(images)
    assert len(ids.unique()) > 8
    for k in (1, 2, 3, 4):
        assert torch.equal(tok.tokenize(images, num_tokens=k), ids[:, :k])


@flexible
def test_lengths_may_differ_inside_a_batch(name):
    tok = tiny_tokenizer(tokenizer=name)
    loud(awake(tok.decoder), 4 if name.startswith("re") else 1)
    ids = torch.randint(tok.quantizer.codebook_sizes[0], (4, 4, 1))
    lengths = torch.tensor([4, 1, 3, 2])
    together = tok.detokenize(ids, num_tokens=lengths)
    for row, k in enumerate(lengths.tolist()):
        alone = tok.detokenize(ids[row : row + 1, :k])
        assert torch.allclose(together[row : row + 1], alone, atol=1e-5)
        assert torch.equal(tok.detokenize(ids[row : row + 1], num_tokens=k), alone)
    # Ids behind an image's length are not looked at, whatever they are.
    padded = torch.where(prefix_mask(lengths, 4)[..., None], ids, -1)
    assert torch.equal(tok.detokenize(padded, num_tokens=lengths), together)
    assert not torch.allclose(together[1], tok.detokenize(ids)[1], atol=1e-3)


@flexible
def test_progressive(name):
    tok = tiny_tokenizer(tokenizer=name)
    awake(tok.decoder)
    ids = tok.tokenize(images_of(3))
    pictures = tok.detokenize_progressive(ids, budgets=range(1, 5))
    assert pictures.shape == (3, 4, 3, 16, 16)
    for k in range(1, 5):
        assert torch.equal(pictures[:, k - 1], tok.detokenize(ids, num_tokens=k))
    few = tok.detokenize_progressive(ids, budgets=[4, 1])
    assert torch.equal(few, pictures[:, [3, 0]])
    for one in (2, torch.tensor(2), np.int64(2), {2}, (k for k in [2])):
        assert torch.equal(tok.detokenize_progressive(ids, budgets=one), pictures[:, [1]])
    assert torch.equal(tok.detokenize_progressive(ids), pictures)  # by default every prefix
    assert torch.equal(tok.detokenize_progressive(ids[:, :3]), pictures[:, :3])


def fitted(name):
    """Trained for a moment, so that budgets matter."""
    tok = tiny_tokenizer("quantizer.codebook_size=64", tokenizer=name)
    images = tok.to_model_range(images_of(24))
    tok.initialize(images)
    tok.train()
    optimizer = torch.optim.AdamW(tok.parameters(), 3e-3)
    for _ in range(60):
        output = tok(images)
        loss = (
            (output.predictions["image"].value - output.predictions["image"].target).square().mean()
        )
        optimizer.zero_grad()
        (loss + sum(output.quantizer.losses.values())).backward()
        optimizer.step()
        tok.quantizer.after_step([optimizer])
    return tok.eval()


#: dB between a target and the quality that is to reach it, or not: which of two bytes a pixel is
#: rounded to may depend on the images that are decoded with it.
SLACK = 3e-3


def test_fewest_tokens_that_reach_a_quality():
    tok = fitted("one_d_piece_tiny")
    images = images_of(24)
    ids = tok.tokenize(images)
    table = []  # (B, N) by brute force with the metric of the evaluation
    for picture, original in zip(tok.detokenize_progressive(ids), images, strict=True):
        table.append([PSNR().per_image(original[None], to_uint8(p[None])).item() for p in picture])
    middle = sorted(value for row in table for value in row)[36:60]
    below, above = max(itertools.pairwise(middle), key=lambda pair: pair[1] - pair[0])
    target = (below + above) / 2
    assert above - below > 2 * SLACK
    missed = [max(row) for row in table if max(row) < target]
    said = (
        f"{len(missed)} of 24 images reach their psnr with none of the budgets, at best "
        r"(\d+\.\d\d) to (\d+\.\d\d) dB; they get 4 tokens"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        cut, num_tokens = tok.tokenize_to_target(images, psnr=target)
    assert [w.filename for w in caught] == [__file__]  # once, and it names the caller's line
    bounds = [float(value) for value in re.search(said, str(caught[0].message)).groups()]
    assert bounds == pytest.approx([min(missed), max(missed)], abs=0.005 + SLACK)
    expected = [next((k for k, v in enumerate(row, 1) if v >= target), 4) for row in table]
    assert num_tokens.tolist() == expected
    assert len(set(expected)) > 1 and any(max(row) < target for row in table)
    assert torch.equal(cut, ids[:, : max(expected)])
    tok.detokenize(cut, num_tokens=num_tokens)
    with pytest.warns(UserWarning):
        _, few = tok.tokenize_to_target(images, psnr=target, budgets=[4, 1])
        assert few.tolist() == [1 if row[0] >= target else 4 for row in table]
        assert tok.tokenize_to_target(images, psnr=99.0, budgets=3)[1].tolist() == [3] * 24
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tok.tokenize_to_target(images, psnr=0.0)[1].tolist() == [1] * 24
        assert tok.tokenize_to_target(images[:0], psnr=99.0)[1].shape == (0,)
        # A target for each image: what it has with 3 tokens, or sooner.
        each = [row[2] - SLACK for row in table]
        sooner = [next(k for k, v in enumerate(row, 1) if v >= row[2] - SLACK) for row in table]
        assert len(set(sooner)) > 1
        for targets in (each, torch.tensor(each, dtype=torch.float64), np.array(each)):
            assert tok.tokenize_to_target(images, psnr=targets)[1].tolist() == sooner


def test_a_target_is_reached_by_what_equals_it():
    tok = tiny_tokenizer(tokenizer="one_d_piece_tiny")
    images = images_of(16)
    first = tok.detokenize(tok.tokenize(images), num_tokens=1)
    errors = (first.double().mul(255).round() - images).square().mean(dim=(1, 2, 3)) / 255**2
    exact = -10 * errors.log10()  # of the bytes, in float64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (images, images.double() / 255, images.numpy()):
            _, reached = tok.tokenize_to_target(given, psnr=exact - 1e-9, budgets=[1])
            assert reached.tolist() == [1] * 16
    with pytest.warns(UserWarning, match="16 of 16 images"):
        tok.tokenize_to_target(images, psnr=exact + 1e-9, budgets=[1])


def test_most_tokens_that_fit():
    tok = tiny_tokenizer("quantizer.codebook_size=64", tokenizer="one_d_piece_tiny")  # 6 bits
    images = images_of(2)
    for size, k in ((1, 1), (1.5, 1), (2, 2), (2.25, 2), (2.99, 2), (3, 4), (1000, 4)):
        ids, num_tokens = tok.tokenize_to_target(images, max_bytes=size)
        assert num_tokens.tolist() == [k, k] and ids.shape == (2, k, 1), size
        assert all(len(data) <= size for data in tok.to_bytes(ids, num_tokens))
    assert tok.tokenize_to_target(images, max_bytes=math.inf)[1].tolist() == [4, 4]
    with pytest.warns(UserWarning, match="2 of 2 images"):
        _, both = tok.tokenize_to_target(images, psnr=99.0, max_bytes=2)
    assert both.tolist() == [2, 2]
    with pytest.raises(ConfigError, match=r"max_bytes=0\.75: one token has 6 bits"):
        tok.tokenize_to_target(images, max_bytes=0.75)
    with pytest.raises(ConfigError, match=r"budgets=\[2, 5\]: must lie in 1 to 4"):
        tok.tokenize_to_target(images, psnr=20.0, budgets=[5, 2])
    with pytest.raises(ConfigError, match="needs psnr"):
        tok.tokenize_to_target(images)


@flexible
def test_only_budgets_that_are_named_or_mean_something_are_given_out(name):
    tok = tiny_tokenizer("quantizer.codebook_size=256", tokenizer=name)
    images, three = images_of(2), 3  # bytes, of one token each
    most = 2 if name == "restok_tiny" else 3
    for budgets, k in ((None, most), ([4, 2, 1], 2), ([3, 4], 3), (1, 1)):
        ids, num_tokens = tok.tokenize_to_target(images, max_bytes=three, budgets=budgets)
        assert num_tokens.tolist() == [k, k] and ids.shape[1] == k
    with pytest.warns(UserWarning, match="get 2 tokens"):
        _, num_tokens = tok.tokenize_to_target(images, 99.0, three, budgets=[2, 4])
    assert num_tokens.tolist() == [2, 2]
    for psnr in (None, 99.0):
        with pytest.raises(ConfigError, match="3 tokens fit, but the smallest of the budgets is 4"):
            tok.tokenize_to_target(images, psnr, max_bytes=three, budgets=[4])
    tok.length = LengthPolicy("full")
    with pytest.raises(ConfigError, match="the smallest of the budgets is 4"):
        tok.tokenize_to_target(images, max_bytes=three)


def test_targets_that_are_none():
    tok = tiny_tokenizer(tokenizer="one_d_piece_tiny")
    images = images_of(2)
    ids = tok.tokenize(images)
    nan = float("nan")
    for call, words in (
        (lambda: tok.tokenize_to_target(images, psnr=20.0, budgets=[]), r"integers, found \[\]"),
        (lambda: tok.detokenize_progressive(ids, budgets=[]), r"integers, found \[\]"),
        (lambda: tok.detokenize_progressive(ids, budgets="12"), r"integers, found '12'"),
        (lambda: tok.detokenize_progressive(ids, budgets=[1.0]), r"integers, found \(1,\) torch"),
        (lambda: tok.detokenize_progressive(ids, budgets=[5]), r"budgets=\[5\]: .* 1 to 4"),
        (lambda: tok.tokenize_to_target(images, psnr=nan), r"psnr: expected dB, .*found nan"),
        (lambda: tok.tokenize_to_target(images, psnr="28"), "psnr: expected dB, .*found '28'"),
        (lambda: tok.tokenize_to_target(images, psnr=[1.0] * 3), r"\(2,\) of them, found \(3,\)"),
        (lambda: tok.tokenize_to_target(images, psnr=True), "psnr: expected dB, .*found True"),
        (lambda: tok.tokenize_to_target(images, psnr=[True, False]), "psnr: expected dB, .*bool"),
        (lambda: tok.tokenize_to_target(images, psnr=1j), "psnr: expected dB, .*found .*complex"),
        (lambda: tok.tokenize_to_target(images, max_bytes=True), "max_bytes: .*found True"),
        (lambda: tok.tokenize_to_target(images, max_bytes=nan), "max_bytes: .*found nan"),
        (lambda: tok.tokenize_to_target(images, max_bytes="4"), "max_bytes: .*found '4'"),
        (lambda: tok.tokenize_to_target(images, max_bytes=-math.inf), "max_bytes=-inf: one token"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_an_image_keeps_its_seed_while_others_are_done():
    """Whatever holds the seeds: an image is judged by the picture that its own seed gives."""
    tok = tiny_tokenizer("tokenizer.decoder.steps=2", tokenizer="flextok_tiny")
    awake(tok.decoder)
    images, seeds = images_of(6), [1, 2, 3, 4, 5, 6]
    ids = tok.tokenize(images)
    originals = images.float() / 255
    pictures = tok.detokenize_progressive(ids, seed=torch.tensor(seeds))
    quality = torch.stack([rounded_psnr(p, originals) for p in pictures.unbind(1)], dim=1)
    # One image after the other reaches its target, the last ones never.
    targets = quality[range(6), [0, 1, 2, 0, 1, 2]] - SLACK
    targets[5] = 99.0
    wanted = [[1, 2, 3, 4][int((row >= t).int().argmax())] for row, t in zip(quality, targets, strict=True)]  # fmt: skip
    wanted[5] = 4
    for given in (seeds, tuple(seeds), torch.tensor(seeds), np.array(seeds), range(1, 7)):
        with pytest.warns(UserWarning, match="1 of 6"):
            assert tok.tokenize_to_target(images, psnr=targets, seed=given)[1].tolist() == wanted
    assert len(set(wanted)) > 1
    with pytest.warns(UserWarning):  # one seed in a list is one for all
        tok.tokenize_to_target(images, psnr=99.0, seed=[7])
    with pytest.raises(ConfigError, match="seed: expected one number or 6, found 5"):
        tok.tokenize_to_target(images, psnr=0.0, seed=seeds[:5])


def test_rounded_psnr_is_that_of_the_evaluation():
    a, b = torch.rand(5, 3, 8, 8), images_of(5, 8)
    expected = PSNR().per_image(b, to_uint8(a))
    assert torch.allclose(rounded_psnr(a, b.float() / 255), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["titok_tiny", "vqgan_tiny"])
def test_fixed_length_tokenizers_say_so(name):
    tok = tiny_tokenizer(tokenizer=name)
    images = images_of(2)
    ids = tok.tokenize(images)
    for four in (4, np.int64(4), torch.tensor(4), torch.tensor([4, 4]), [4, 4]):
        assert torch.equal(tok.tokenize(images, num_tokens=four), ids)
        assert torch.equal(tok.detokenize(ids, num_tokens=four), tok.detokenize(ids))
    for call in (
        lambda: tok.tokenize(images, num_tokens=2),
        lambda: tok.tokenize_to_target(images, psnr=20.0),
        lambda: tok.detokenize(ids, num_tokens=2),
        lambda: tok.detokenize(ids, num_tokens=torch.tensor([4, 2])),
        lambda: tok.detokenize(ids[:, :2]),
        lambda: tok.detokenize_progressive(ids),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert "has a fixed length of 4 tokens" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("num_tokens", "words"),
    [
        (0, "num_tokens=0: must be 1 to 4"),
        (5, "num_tokens=5: must be 1 to 4"),
        (torch.tensor([1, 9]), "num_tokens=9"),
        (torch.tensor([1, 2, 3]), r"\(2,\)"),
        (1.5, "expected an integer.*found 1.5"),
        ("2", "expected an integer.*found '2'"),
        (True, "expected an integer.*found True"),
        (torch.tensor([True, False]), r"expected an integer.*found \(2,\) torch.bool"),
        ([[1], [1, 2]], "expected an integer.*found list"),
    ],
)
def test_wrong_budgets_are_refused(num_tokens, words):
    flexible, fixed = tiny_tokenizer(tokenizer="one_d_piece_tiny"), tiny_tokenizer()
    ids = flexible.tokenize(images_of(2))
    with pytest.raises(ConfigError, match=words):
        flexible.detokenize(ids, num_tokens=num_tokens)
    if "expected" in words:
        with pytest.raises(ConfigError, match=words):
            fixed.tokenize(images_of(2), num_tokens=num_tokens)


@flexible
def test_more_ids_than_a_code_has_are_cut_or_refused(name):
    tok = tiny_tokenizer(tokenizer=name)
    ids = tok.tokenize(images_of(2))
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    assert torch.equal(tok.detokenize(longer, num_tokens=4), tok.detokenize(ids))
    assert tok.detokenize_progressive(longer, budgets=[4]).shape[1] == 1
    with pytest.raises(ConfigError, match="num_tokens=5: must be 1 to 4 for ids of 5 tokens"):
        tok.detokenize(longer, num_tokens=5)
    for call in (tok.detokenize, tok.detokenize_progressive, tok.to_bytes):
        for wrong, count in ((longer, 5), (ids[:, :0], 0)):
            with pytest.raises(ConfigError, match=f"ids: expected 1 to 4 tokens .*found {count}$"):
                call(wrong)
    with pytest.raises(ConfigError, match=r"ids: expected 1 to 4 tokens .*found 0$"):
        tok.detokenize(ids[:, :0], num_tokens=1)


def test_arguments_of_sampling_are_refused_where_nothing_is_sampled():
    tok = tiny_tokenizer(tokenizer="one_d_piece_tiny")
    with pytest.raises(ConfigError, match="steps: LatentTransformerDecoder takes no such argument"):
        tok.detokenize(tok.tokenize(images_of(2)), steps=3)


def quantized_by(name, **changes):
    from test_configs import quantizer_config, tokenizer_config
    from vistok.models.build import build_tokenizer

    config = {**tokenizer_config("one_d_piece_tiny")}
    return build_tokenizer({**config, "quantizer": {**quantizer_config(name), **changes}}).eval()


def test_a_code_of_scales_keeps_its_full_length():
    with pytest.warns(
        UserWarning, match=r"^quantizer: .*scales.* OneDPiece keeps its full length$"
    ):
        tok = quantized_by("var")
    images = images_of(3)
    assert tok.train()(tok.to_model_range(images)).mask.all()  # no tail is dropped in training
    ids = tok.eval().tokenize(images)
    assert tok.detokenize(ids).shape == (3, 3, 16, 16)
    with pytest.raises(ConfigError, match="stand for scales"):
        tok.detokenize(ids, num_tokens=2)
    with pytest.raises(ConfigError, match="stand for scales"):
        tok.tokenize_to_target(images, max_bytes=8)


@flexible
def test_ids_do_not_depend_on_the_mode(name):
    tok = tiny_tokenizer(tokenizer=name)
    tok.initialize(tok.to_model_range(images_of(20)))
    ids = tok.eval().tokenize(images_of(4))
    assert ids.shape == (4, 4, 1) and torch.equal(tok.train().tokenize(images_of(4)), ids)
    assert torch.equal(tok.tokenize(images_of(4), num_tokens=2), ids[:, :2])


@flexible
def test_a_decoder_for_fewer_tokens_is_refused(name):
    with pytest.raises(ConfigError) as error:
        tiny_tokenizer("tokenizer.decoder.num_latent_tokens=2", tokenizer=name)
    taken = 3 if name == "retok_tiny" else 2  # one of them padding
    expected = f"num_latent_tokens: the decoder takes {taken} tokens, but the encoder makes 4; must"
    assert expected in str(error.value)
    tiny_tokenizer("tokenizer.decoder.num_latent_tokens=8", tokenizer=name)


# ---------------------------------------------------------------------- ids as bytes


def bits_of(tok, length):
    return length * tok.quantizer.bits_per_token


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vq", {"codebook_size": 16}),
        ("vq", {"codebook_size": 11}),
        ("fsq_64k", {}),
        ("fqgan", {"codebook_size": 9}),
    ],
)
def test_bytes_are_as_many_as_a_budget_counts(name, changes):
    tok = quantized_by(name, **changes)
    sizes = tok.quantizer.codebook_sizes
    torch.manual_seed(0)
    ids = torch.stack([torch.randint(size, (6, 4)) for size in sizes], dim=2)
    ids[0], ids[1] = torch.tensor(sizes) - 1, 0  # the last code and the first one
    lengths = torch.tensor([4, 4, 1, 2, 3, 3])
    packed = tok.to_bytes(ids, lengths)
    assert [len(p) for p in packed] == [math.ceil(bits_of(tok, k) / 8 - 1e-9) for k in lengths.tolist()]  # fmt: skip
    back = tok.from_bytes(packed, lengths)
    kept = prefix_mask(lengths, 4)[..., None]
    assert back.dtype == torch.int64 and torch.equal(back, torch.where(kept, ids, 0))
    assert torch.equal(tok.from_bytes(tok.to_bytes(ids)), ids)
    assert torch.equal(tok.from_bytes(tok.to_bytes(ids, 2), 2), ids[:, :2])
    for size in range(math.ceil(bits_of(tok, 1) / 8), math.ceil(bits_of(tok, 4) / 8) + 2):
        cut, given = tok.tokenize_to_target(images_of(3), max_bytes=size)
        assert all(len(p) <= size for p in tok.to_bytes(cut, given))
        k = int(given[0])
        assert k == 4 or math.ceil(bits_of(tok, k + 1) / 8 - 1e-9) > size  # no more would fit


def test_packing_numbers_the_codes():
    """All of a small alphabet, counted through."""
    alphabet = [(0, 3), (5, 2), (0, 50)]
    codes = [(a, b, c) for a in range(3) for b in (5, 6) for c in range(50)]
    assert packed_size(alphabet) == 2 and packed_size([(0, 256)]) == 1
    for number, code in enumerate(codes):
        assert pack(code, alphabet) == number.to_bytes(2, "big")
        assert tuple(unpack(number.to_bytes(2, "big"), alphabet)) == code


def test_bytes_of_fixed_codes():
    """Hita's two codebooks are packed as what they are and not as the joint vocabulary."""
    for name in ("titok_tiny", "hita_tiny"):
        tok = tiny_tokenizer(tokenizer=name)
        ids = tok.tokenize(images_of(3))
        packed = tok.to_bytes(ids)
        assert {len(p) for p in packed} == {math.ceil(tok.bits_per_image / 8 - 1e-9)}
        assert torch.equal(tok.from_bytes(packed), ids)


def test_bytes_that_are_no_code():
    tok = tiny_tokenizer("quantizer.codebook_size=11", tokenizer="one_d_piece_tiny")
    packed = tok.to_bytes(tok.tokenize(images_of(2)))
    for bad, words in (
        ([packed[0], packed[1][:1]], "image 1 is not a code of 4 tokens: 1 bytes, where 2 are"),
        ([packed[0], b"\xff\xff"], "image 1 is not a code of 4 tokens: a number beyond"),
        (packed[0], r"packed: expected the bytes of each image, .*found bytes"),
    ):
        with pytest.raises(ConfigError, match=words):
            tok.from_bytes(bad)
    with pytest.raises(ConfigError, match="slot 0 holds 11"):
        tok.to_bytes(torch.full((1, 4, 1), 11))
