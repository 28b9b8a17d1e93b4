"""What users may pass: models of any precision, ids, images and numbers of any kind."""

import copy

import pytest
import torch

from helpers import SIZES, awake, images_of, tiny_tokenizer
from vistok.decoders.proxy import ProxyDecoder
from vistok.models.latents import LatentSpace

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
