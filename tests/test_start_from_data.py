"""The start from data: bounded chunks, no more images than needed, and any data at all."""

import pytest
import torch

from helpers import CONFIGS, images_of, tiny_tokenizer
from vistok.nn.data_init import chunks, principal_components, start_at_components_

TINY_PRESETS = sorted(path.stem for path in (CONFIGS / "tokenizer").glob("*_tiny.yaml"))


def flat(count=6):
    """Blank slices: all of one colour."""
    return torch.full((count, 3, 16, 16), 40, dtype=torch.uint8)


DATA = {
    "flat": flat(),
    "flats of several colours": flat() + torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1) * 20,
    "one image": images_of(1),
    "one image many times": images_of(1).expand(8, -1, -1, -1),
    "black": torch.zeros(3, 3, 16, 16, dtype=torch.uint8),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", TINY_PRESETS)
def test_any_data_give_a_finite_start_from_which_training_goes_on(name, data):
    torch.manual_seed(0)
    tok = tiny_tokenizer(tokenizer=name)
    tok.initialize(DATA[data])
    assert all(torch.isfinite(value).all() for value in tok.state_dict().values())
    images = tok.to_model_range(images_of(4))
    for seen in (tok.to_model_range(DATA[data]), images):
        output = tok.train()(seen)
        prediction = output.predictions["image"]
        loss = prediction.mean((prediction.value - prediction.target).square())
        loss = loss + sum(output.quantizer.losses.values())
        tok.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in tok.parameters() if p.grad is not None)


def test_it_looks_at_no_more_images_than_it_needs():
    """Encoder and decoder at as many as have 65536 squares of 8 pixels, the codebook at all."""
    tok, seen = tiny_tokenizer(), {"encoder": [], "decoder": []}
    tok.image_size = (16, 16)
    assert tok.init_images == 16384
    encoder, decoder = tok.encoder.initialize, tok.decoder.initialize
    tok.encoder.initialize = lambda x: seen["encoder"].append(len(x)) or encoder(x)
    tok.decoder.initialize = lambda q, x: seen["decoder"].append(len(x)) or decoder(q, x)
    told = []
    type(tok).init_images, before = property(lambda self: 3), type(tok).init_images
    try:
        tok.initialize(images_of(10), told.append)
    finally:
        type(tok).init_images = before
    assert seen == {"encoder": [3], "decoder": [3]}
    assert told == ["encoder, from 3 images", "codebook, from 10 images", "decoder, from 3 images"]


def test_chunks_hold_a_bounded_number_of_pixels():
    for side, size in ((64, 32), (128, 10), (256, 2), (1024, 1)):
        images = torch.zeros(40, 3, side, side, dtype=torch.uint8)
        assert next(len(part) for part in chunks(images)) == size
    images, latents = torch.zeros(5, 3, 512, 512), torch.arange(5)
    assert [part.tolist() for _, part in chunks(images, latents)] == [[0], [1], [2], [3], [4]]
    assert next(iter(chunks(torch.zeros(0, 3, 8, 8)))).shape == (0, 3, 8, 8)


def test_uint8_and_floats_start_alike():
    states = []
    for images in (images_of(6), images_of(6).float() / 127.5 - 1):
        torch.manual_seed(0)
        tok = tiny_tokenizer()
        tok.initialize(images)
        states.append(tok.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_components_of_what_does_not_vary_are_not_blown_up():
    layer, rows = torch.nn.Linear(5, 4), torch.full((9, 5), 0.3)
    mean, components, deviations = principal_components(rows, 4)
    assert torch.allclose(mean, rows[0]) and not deviations.any()
    start_at_components_(layer, rows, 4)
    assert layer.weight.abs().max() <= 1.0001 and layer(rows).abs().max() < 1e-5
