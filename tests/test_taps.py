"""Taps: every encoder and decoder hands out what it declares, and computes what it did without."""

import math

import pytest
import torch

from helpers import SIZES, awake, config_of, images_of, tiny_tokenizer
from vistok.core.taps import NO_TAPS, Tap, Taps, inside
from vistok.models.cnn import CNNDecoder, CNNEncoder
from vistok.models.maskgit_cnn import MaskGITDecoder, MaskGITEncoder
from vistok.models.proxy_decoder import ProxyDecoder
from vistok.nn.blocks import Transformer
from vistok.training.sharding import blocks_of

#: Where the places of the picture begin in the sequences of encoder and decoder; of systems that
#: are not here it is not known, but they lie in one piece.
STARTS = {
    "titok_tiny": (1, 1),  # behind the class token
    "titok_conv_tiny": (1, 1),
    "ta_titok_tiny": (1, 1),
    "one_d_piece_tiny": (1, 1),
    "flextok_tiny": (0, 0),
    "gigatok_tiny": (0, 0),  # the encoder's are queries, and no places
    "retok_tiny": (0, 0),
    "restok_tiny": (2, 4),  # behind the two merged tokens; behind the latents
    "hita_tiny": (2, 1),  # behind the holistic tokens; one place early
}


class Everything(frozenset):
    """All names."""

    def __contains__(self, name):
        return True


def all_taps():
    taps = Taps()
    taps.names = Everything()
    return taps


def tokenizer(name, *more):
    """With class tokens, to tell places from the rest."""
    tokens = [f"tokenizer.{part}.class_token=true" for part in ("encoder", "decoder")]
    tokens = tokens if STARTS.get(name) == (1, 1) else []
    return awake(tiny_tokenizer(*tokens, *more, tokenizer=name))


def calls_of(tok):
    """The ways to run encoder and decoder: part, and a function of taps."""
    images = tok.to_model_range(images_of(3))
    torch.manual_seed(1)
    quantized = torch.randn(3, tok.encoder.num_tokens, tok.encoder.dim)
    mask = torch.ones(3, tok.encoder.num_tokens, dtype=torch.bool)
    mask[1, 2:] = False
    yield tok.encoder, lambda taps: tok.encoder(images, taps=taps)
    yield tok.decoder, lambda taps: tok.decoder(quantized, images, mask, taps=taps)["image"].value
    yield tok.decoder, lambda taps: tok.decoder.reconstruct(quantized, mask, taps=taps)


def run(call, taps):
    torch.manual_seed(2)  # a flow draws its noise
    return call(taps)


def check(part, call):
    """All that is declared and nothing else, as declared; and the same output."""
    plain, taps = run(call, NO_TAPS), all_taps()
    assert torch.allclose(run(call, taps), plain, atol=1e-5)
    declared = part.tap_shapes()
    assert declared and taps.features.keys() == declared.keys()
    for name, tap in declared.items():
        features = taps.features[name]
        assert features.shape[0] == 3 and features.shape[2] == tap.width, name
        assert tap.grid is None or features.shape[1] == math.prod(tap.grid), name
    some = Taps([next(iter(declared))])
    run(call, some)
    assert some.features.keys() == some.names
    assert not NO_TAPS.features
    return taps.features


@pytest.mark.parametrize("name", SIZES)
def test_all_that_is_declared_is_offered(name):
    for part, call in calls_of(tokenizer(name)):
        with torch.no_grad():
            check(part, call)


@pytest.mark.parametrize("name", SIZES)
def test_blocks_hand_out_the_places_of_the_picture(name):
    tok = tokenizer(name)
    seen = []
    for block in blocks_of(tok):
        block.register_forward_hook(lambda m, i, o: seen.append(o))
    starts = STARTS.get(name, (None, None))
    for start, (_, call) in zip(starts, calls_of(tok), strict=False):
        seen.clear()
        taps = all_taps()
        run(call, taps)
        blocks = [x for key, x in taps.features.items() if "block." in key]
        assert len(blocks) == len(seen) and (blocks or name not in STARTS)
        for features, sequence in zip(blocks, seen, strict=True):
            count = features.shape[1]
            known = [start if sequence.shape[1] > count else 0]
            possible = range(sequence.shape[1] - count + 1) if start is None else known
            assert any(torch.equal(features, sequence[:, s : s + count]) for s in possible)


@pytest.mark.parametrize("name", SIZES)
def test_taps_change_no_gradient_and_have_one(name):
    """With and without recomputing the blocks."""
    found = []
    for recompute in ("false", "true"):
        own = config_of(f"tokenizer={name}")["tokenizer"]
        parts = [p for p in ("encoder", "decoder") if "activation_checkpointing" in own[p]]
        words = [f"tokenizer.{part}.activation_checkpointing={recompute}" for part in parts]
        tok = tokenizer(name, *words)
        for taps in (NO_TAPS, all_taps()):
            for _, call in list(calls_of(tok))[:2]:
                run(call, taps).square().sum().backward()
            found.append([None if p.grad is None else p.grad.clone() for p in tok.parameters()])
            tok.zero_grad()
        taps = all_taps()
        for _, call in list(calls_of(tok))[:2]:
            run(call, taps)
        sum(x.square().sum() for x in taps.features.values()).backward()
        assert any(p.grad is not None and p.grad.any() for p in tok.decoder.parameters())
    for grads in zip(*found, strict=True):
        assert len({g is None for g in grads}) == 1
        if grads[0] is not None:
            scale = grads[0].abs().max() + 1e-3
            assert all(torch.allclose(g / scale, grads[0] / scale, atol=1e-4) for g in grads)


@pytest.mark.parametrize("grid", [(2, 3), (4, 2)])
@pytest.mark.parametrize("kind", ["vqgan", "maskgit"])
def test_levels_of_a_cnn_are_its_last_maps_of_a_size(kind, grid):
    """But for the middle blocks, which an encoder has behind its coarsest level."""
    torch.manual_seed(0)
    size, scales = [4 * side for side in grid], (4, 2, 1)
    if kind == "vqgan":
        size, middle = [2 * side for side in size], 3  # of which one is attention
        pair = (CNNEncoder(size, 3, 4, [1, 2, 3], 1, 2), CNNDecoder(size, 3, 12, 4, [1, 2, 3], 1, 2))  # fmt: skip
    else:
        middle = 2
        pair = (MaskGITEncoder(size, 3, 4, [1, 2, 3], 12), MaskGITDecoder(size, 3, 12, 4, [1, 2, 3]))  # fmt: skip
    encoder, decoder = pair
    images, quantized = torch.randn(3, 3, *size), torch.randn(3, grid[0] * grid[1], 12)
    calls = (
        (encoder, lambda taps: encoder(images, taps)),
        (decoder, lambda taps: decoder.reconstruct(quantized, taps=taps)),
    )
    for part, call in calls:
        with torch.no_grad():
            features, maps = check(part, call), []
            for layer in part.layers:
                layer.register_forward_hook(lambda m, i, o, maps=maps: maps.append(o))
            call(NO_TAPS)
        for level, scale in enumerate(scales):
            cells = (scale * grid[0], scale * grid[1])
            of_size = [x for x in maps if x.shape[2:] == cells]
            expected = of_size[-1 - middle * (part is encoder and scale == 1)]
            assert part.tap_shapes()[f"level.{level}"] == Tap(4 * (level + 1), cells)
            assert torch.allclose(features[f"level.{level}"], expected.flatten(2).mT, atol=1e-5)


@pytest.mark.parametrize("learns", ["codes", "pixels"])
def test_the_two_stage_decoder_hands_on_those_of_its_pixel_decoder(learns):
    torch.manual_seed(0)
    pixel_decoder = MaskGITDecoder(4, 3, 5, 4, [1, 2])
    net = ProxyDecoder(16, 3, 8, 4, 6, 16, 2, 2, 7, 5, pixel_decoder, learns, class_token=True)
    net.proxy = lambda images: torch.zeros(len(images), 4)
    images, quantized = torch.randn(3, 3, 16, 16), torch.randn(3, 4, 6)
    with torch.no_grad():
        head = "codes" if learns == "codes" else "image"
        check(awake(net), lambda taps: net(quantized, images, taps=taps)[head].value)
    assert ("pixel_decoder.level.1" in net.tap_shapes()) == (learns == "pixels")


def test_the_last_block_computes_no_more_than_before_unless_that_is_tapped():
    torch.manual_seed(0)
    net, x, keep, places = (
        Transformer(16, 2, 2),
        torch.randn(2, 9, 16),
        slice(-3, None),
        slice(1, 5),
    )
    lengths = []
    net.blocks[-1].register_forward_hook(lambda m, i, o: lengths.append(o.shape[1]))
    for names, length in (([], 3), (["block.0"], 3), (["block.1"], 9)):
        taps = Taps(names)
        found = net(x, None, keep, taps, places)
        assert lengths.pop() == length and found.shape == (2, 3, 16)
        assert {name: f.shape for name, f in taps.features.items()} == dict.fromkeys(names, (2, 4, 16))  # fmt: skip


def test_parts_see_their_own_names():
    taps = Taps(["decoder.cnn.level.0", "encoder.coarsest"])
    inner, features = taps.inside("decoder").inside("cnn"), torch.zeros(1, 2, 3)
    assert inner.wants("level.0") and not inner.wants("coarsest") and not taps.wants("level.0")
    inner.offer("level.0", features)
    inner.offer("level.1", features)
    assert taps.features == {"decoder.cnn.level.0": features}
    assert inside("cnn", {"level.0": Tap(3)}) == {"cnn.level.0": Tap(3, None)}
