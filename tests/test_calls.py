"""What users may pass: models of any precision, ids, images and numbers of any kind."""

import copy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import SIZES, awake, images_of, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.models.arguments import as_numbers, as_plain
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.latent_space import LatentSpace
from vistok.models.proxy_decoder import ProxyDecoder

# ---------------------------------------------------------------------- precision

#: How far pictures in [0, 1] may be from those of float32: 8 or 11 bits of mantissa, some layers.
PRECISIONS = [("bfloat16", 0.1), ("half", 0.02), ("double", 1e-4)]
precise = pytest.mark.parametrize(("cast", "tolerance"), PRECISIONS)


@pytest.mark.parametrize("name", list(SIZES))
def test_a_model_of_any_precision_tokenizes_and_paints(name):
    tok = tiny_tokenizer(tokenizer=name)
    awake(tok.decoder)
    images = images_of(4)
    ids, sampling = tok.tokenize(images), {"steps": 2} if tok.decoder.sampling else {}
    pictures = tok.detokenize(ids, **sampling)
    for cast, tolerance in PRECISIONS:
        other = getattr(copy.deepcopy(tok), cast)()
        found = other.tokenize(images)
        assert found.dtype == torch.int64 and found.shape == ids.shape
        assert (found == ids).float().mean() >= (1 if cast == "double" else 0.5)
        painted = other.detokenize(ids, **sampling)
        assert painted.dtype == torch.float32, cast
        assert (painted - pictures).abs().max() < tolerance, cast
        assert not torch.equal(painted, pictures), cast
        assert {p.dtype for p in other.quantizer.parameters()} <= {torch.float32}


@precise
def test_an_autoencoder_of_any_precision_maps_there_and_back(cast, tolerance):
    tok = tiny_tokenizer("quantizer=vq", "quantizer.codebook_size=16", tokenizer="vqgan_tiny")
    space = LatentSpace(tok.encoder, tok.quantizer, tok.decoder)
    images = tok.to_model_range(images_of(3))
    with torch.no_grad():
        space.calibrate(images)
        expected = space.decode(space.encode(images))
        other = getattr(copy.deepcopy(space), cast)()
        found = other.decode(other.encode(images).float())  # as a flow's walk leaves them
    assert (found - expected).abs().max() < 2 * tolerance


@pytest.mark.parametrize("learns", ["codes", "pixels"])
def test_a_proxy_of_any_precision_paints(learns):
    tok = tiny_tokenizer(tokenizer="vqgan_tiny")
    net = ProxyDecoder(16, 3, 8, 4, 16, 16, 1, 2, 16, 16, tok.decoder, learns)
    for cast in (torch.bfloat16, torch.float64, torch.float32):
        pictures = net.to(cast).reconstruct(torch.zeros(2, 4, 16, dtype=cast))
        assert pictures.shape == (2, 3, 16, 16) and pictures.dtype == cast


# ---------------------------------------------------------------------- ids, images, bytes


@pytest.mark.parametrize("name", ["titok_tiny", "one_d_piece_tiny", "hita_tiny"])
def test_ids_may_be_anything_that_holds_integers(name):
    tok = tiny_tokenizer(tokenizer=name)
    ids = tok.tokenize(images_of(3))
    pictures, files = tok.detokenize(ids), tok.to_bytes(ids)
    kinds = [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64]
    given = [*map(ids.to, kinds), *(ids.to(kind).numpy() for kind in kinds), ids.tolist()]
    given += [ids.numpy()[::-1].copy()[::-1], np.broadcast_to(ids.numpy(), ids.shape)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in given:
            assert torch.equal(tok.detokenize(same), pictures)
            assert tok.to_bytes(same) == files
            if isinstance(tok, FlexibleTokenizer):
                last = tok.detokenize_progressive(same)[:, -1]
                assert torch.allclose(last, pictures, atol=1e-6)
    for wrong, words in (
        (None, r"ids: expected \(B, N, 1\), found NoneType"),
        ("1 2 3", r"found '1 2 3'"),
        ([[[1]], [[1], [2]]], r"found list"),
        (7, r"found \(\)"),
        (ids.double().numpy(), "expected integers, found torch.float64"),
        (ids.numpy() > 0, "expected integers, found torch.bool"),
        (np.full(ids.shape, 2**64 - 1, np.uint64), "slot 0 holds"),
    ):
        for call in (tok.detokenize, tok.to_bytes):
            with pytest.raises(ConfigError, match=words):
                call(wrong)


def test_images_may_be_arrays():
    tok = tiny_tokenizer()
    images = images_of(3)
    ids = tok.tokenize(images)
    array = images.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (array, array / 255, (array / 255).astype(np.float32), array.tolist()):
            if isinstance(same, list):
                same = np.array(same, np.uint8)
            same = np.broadcast_to(same, same.shape)  # read-only
            assert torch.equal(tok.tokenize(same), ids)
        mirrored = tok.to_model_range(array[..., ::-1])
    assert torch.equal(mirrored, tok.to_model_range(images.flip(3)))
    flexible = tiny_tokenizer(tokenizer="one_d_piece_tiny")
    for target in ({"psnr": 1.0}, {"max_bytes": 2}):
        found, expected = (flexible.tokenize_to_target(x, **target) for x in (array, images))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (None, "NoneType"),
        ("cat.png", "'cat.png'"),
        (Image.new("RGB", (16, 16)), "Image"),
        ([Image.new("RGB", (16, 16))], "list"),
        (list(images_of(2)), "list"),
        (images_of(1)[0].permute(1, 2, 0).numpy(), "(16, 16, 3)"),
        (images_of(2).permute(0, 2, 3, 1).numpy(), "(2, 16, 16, 3)"),
    ],
)
def test_what_is_no_batch_of_images_is_told_what_one_is(wrong, found):
    with pytest.raises(ConfigError) as error:
        tiny_tokenizer().tokenize(wrong)
    assert str(error.value) == (
        f"images: expected (B, 3, 16, 16), found {found}; give a tensor or an array (B, C, H, W)"
    )


def test_bytes_may_come_from_any_iterable():
    tok = tiny_tokenizer()
    ids = tok.tokenize(images_of(3))
    files = tok.to_bytes(ids)
    for same in (tuple(files), iter(files), (f for f in files), map(bytearray, files),
                 dict(enumerate(files)).values(), map(memoryview, files)):  # fmt: skip
        assert torch.equal(tok.from_bytes(same), ids)
    for wrong, words in (
        (None, "expected the bytes of each image.*found NoneType"),
        (files[0], "expected the bytes of each image.*found bytes"),
        ("ab", "expected the bytes of each image.*found 'ab'"),
        ([files[0], 3], "image 1 .*not 'int'"),
        ([files[0], "ab"], "image 1 .*not 'str'"),
    ):
        with pytest.raises(ConfigError, match=f"packed: {words}") as error:
            tok.from_bytes(wrong)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- arguments of sampling


def test_numbers_of_any_kind_lead_the_sampling_but_truth_values_do_not():
    tok = tiny_tokenizer(tokenizer="flextok_tiny")
    awake(tok.decoder)
    ids = tok.tokenize(images_of(2))
    expected = tok.detokenize(ids, steps=2, guidance=2.0, seed=3)
    assert not torch.equal(expected, tok.detokenize(ids, steps=2, guidance=1.0, seed=3))
    for kind in (np.float32, np.float64, torch.tensor, int):
        for whole in (np.int64, np.uint8, torch.tensor):
            found = tok.detokenize(ids, steps=whole(2), guidance=kind(2), seed=whole(3))
            assert torch.equal(found, expected)
    for true in (True, np.True_, torch.tensor(True)):
        for name in ("steps", "guidance", "seed"):
            with pytest.raises(ConfigError, match=f"{name}=true: must be a"):
                tok.detokenize(ids, **{name: true})


def test_seven_and_a_half_stays_what_it_is():
    """A tensor of Python's 0.1 would be float32."""
    assert as_plain(7.3) == 7.3 and as_plain(np.float64(7.3)) == 7.3
    assert as_numbers(0.1).item() == 0.1 and as_numbers(10**30).item() == 1e30


def test_a_text_may_be_an_array():
    tok = tiny_tokenizer(tokenizer="ta_titok_tiny")
    ids, text = tok.tokenize(images_of(2)), torch.randn(2, *tok.decoder.text_shape)
    expected = tok.detokenize(ids, text=text)
    assert not torch.equal(expected, tok.detokenize(ids))
    assert torch.equal(tok.detokenize(ids, text=text.numpy()), expected)
    with pytest.raises(ConfigError, match=r"text: expected features .*found str"):
        tok.detokenize(ids, text="a cat")


@pytest.mark.parametrize("target", [{"max_bytes": 5}, {"psnr": 0.0}, {"psnr": 0.0, "max_bytes": 5}])
def test_sampling_is_checked_whether_or_not_anything_is_decoded(target):
    tok = tiny_tokenizer(tokenizer="flextok_tiny")
    images = images_of(2)
    for wrong, words in (
        ({"stepz": 2}, "stepz: FlowDecoder takes no such argument"),
        ({"steps": "x"}, "steps=x: must be a whole number"),
        ({"guidance": -1}, "guidance=-1: must be a number"),
        ({"seed": "x"}, "seed=x: must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=words):
            tok.tokenize_to_target(images, **target, **wrong)
    tok.tokenize_to_target(images, **target, steps=1, guidance=1.0, seed=[3, 4])
    with pytest.raises(ConfigError, match="steps: LatentTransformerDecoder takes no such"):
        tiny_tokenizer(tokenizer="one_d_piece_tiny").tokenize_to_target(images, **target, steps=2)
