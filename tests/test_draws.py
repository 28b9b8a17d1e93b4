"""Random numbers of samples: against another implementation, in distribution, over batches."""

import math

import numpy as np
import pytest
import torch

from helpers import awake
from vistok.core import sample_random as draws
from vistok.core.sample_random import drawing, integers, normal, shared_integer, uniform
from vistok.models.length import LengthPolicy, LevelPolicy
from vistok.systems.flextok.decoder import FlowDecoder
from vistok.systems.ta_titok.decoder import TextTransformerDecoder


def at(*positions):
    return torch.tensor(positions)


def mixed(x):
    """SplitMix64's finalizer in unsigned integers of Python."""
    bits = 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & bits
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & bits
    return x ^ (x >> 31)


def word(seed, position, call, number):
    golden, bits = 0x9E3779B97F4A7C15, 2**64 - 1
    half = ((golden - 2**64) >> 1) & bits
    key = mixed((mixed((position * golden + seed) & bits) + call * half) & bits)
    return mixed((key + (number + 1) * golden) & bits)


def test_the_words_are_those_of_another_implementation():
    with drawing(5, at(0, 7, 10**12), 3):
        first, second = uniform((3, 2, 2)), uniform((3, 4))
    for call, found in ((1, first.flatten(1)), (2, second)):
        for row, position in enumerate((0, 7, 10**12)):
            expected = [(word(5, position, call, n) >> 40) / 2**24 for n in range(4)]
            assert found[row].tolist() == expected


def test_numbers_belong_to_positions():
    """However the batch is cut, and whatever comes before or after."""

    def all_kinds(positions, step=0, seed=1):
        with drawing(seed, positions, step):
            count = len(positions)
            return [
                normal((count, 3, 5)).flatten(1),
                uniform((count * 4,)).view(count, 4),  # tokens of samples, flattened
                integers(0, 1000, (count, 6)),
                shared_integer(0, 10**6).expand(count, 1),
            ]

    whole = all_kinds(torch.arange(8))
    parts = [all_kinds(torch.arange(a, a + 2)) for a in (0, 2, 4, 6)]
    for kind, joined in enumerate(whole):
        cut = torch.cat([part[kind] for part in parts])
        assert torch.allclose(joined, cut, atol=1e-6) if kind == 0 else torch.equal(joined, cut)
    other_seed, other_step = all_kinds(torch.arange(8), seed=2), all_kinds(torch.arange(8), step=4)
    assert all(not torch.equal(a, b) for a, b in zip(whole, other_seed, strict=True))
    assert [torch.equal(a, b) for a, b in zip(whole, other_step, strict=True)] == [True] * 3 + [
        False
    ]


def test_elsewhere_numbers_are_torchs():
    torch.manual_seed(0)
    found = [uniform((2, 3)), normal((4,)), integers(2, 9, (5,)), shared_integer(0, 9)]
    torch.manual_seed(0)
    expected = [
        torch.rand(2, 3),
        torch.randn(4),
        torch.randint(2, 9, (5,)),
        torch.randint(0, 9, (1,)),
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    state = torch.get_rng_state()
    with drawing(0, at(1), 0):
        uniform((1, 3))
    assert torch.equal(state, torch.get_rng_state()) and draws._current is None


def test_the_distributions():
    """Within four standard errors of what they should be, also between neighbours and calls."""
    rows, columns = 400, 500
    with drawing(0, torch.arange(rows), 0):
        u, v, z, k = (
            uniform((rows, columns)),
            uniform((rows, columns)),
            normal((rows, columns + 1)),  # an odd number
            integers(3, 10, (rows, columns)),
        )
    n = rows * columns
    histogram = np.histogram(u.numpy(), bins=100, range=(0, 1))[0]
    chi_squared = ((histogram - n / 100) ** 2 / (n / 100)).sum()
    assert abs(chi_squared - 99) < 4 * math.sqrt(2 * 99)
    assert u.min() >= 0 and u.max() < 1
    counts = np.bincount(k.flatten().numpy())
    assert counts[:3].sum() == 0 and len(counts) == 10
    assert np.abs(counts[3:] - n / 7).max() < 4 * math.sqrt(n / 7)
    z = z.double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - expected) < 4 * math.sqrt(variance / n)
    centred = [x.double() - x.double().mean() for x in (u, v)]
    pairs = [
        (centred[0], centred[1]),  # calls
        (centred[0][1:], centred[0][:-1]),  # positions
        (centred[0][:, 1:], centred[0][:, :-1]),  # numbers
        (z[:, : columns // 2], z[:, columns // 2 + 1 :]),  # the two of a word
    ]
    for a, b in pairs:
        correlation = float((a * b).mean() / (a.std() * b.std()))
        assert abs(correlation) < 4 / math.sqrt(a.numel())


DISTRIBUTIONS = ["uniform", "powers_of_two", "rounded_up"]


@pytest.mark.parametrize(
    "policy", [*(LengthPolicy(d) for d in DISTRIBUTIONS), LevelPolicy(1, 0.5)], ids=str
)
def test_lengths_of_samples(policy):
    with drawing(0, torch.arange(4000), 0):
        one = policy(4000, 16)
    parts = []
    for first in range(0, 4000, 1000):
        with drawing(0, torch.arange(first, first + 1000), 0):
            parts.append(policy(1000, 16))
    assert torch.equal(one, torch.cat(parts)) and len(set(one.tolist())) > 4


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_lengths_of_steps(distribution):
    policy = LengthPolicy(distribution, per="batch")
    drawn = []
    for step in range(0, 400, 4):
        lengths = set()
        for first in range(step, step + 4, 2):  # two ranks, or two accumulated batches
            with drawing(0, at(first, first + 1), step):
                lengths.update(policy(2, 16).tolist())
        assert len(lengths) == 1
        drawn += lengths
    assert len(set(drawn)) > 4


@pytest.mark.parametrize("kind", ["flow", "text"])
def test_what_a_decoder_draws_in_training_is_the_samples_own(kind):
    """Noise, times and conditions left out: as many as there are, the sample gets the same."""
    torch.manual_seed(0)
    shape = ([16, 24], 3, 8, 4, 12, 16, 1, 2)
    if kind == "flow":
        net = FlowDecoder(*shape, null_probability=0.5).train()
    else:
        net = TextTransformerDecoder(*shape, text_dim=6, num_text_tokens=3, text_dropout=0.5)
    awake(net)
    images, quantized, text = torch.randn(8, 3, 16, 24), torch.randn(8, 4, 12), torch.randn(8, 3, 6)

    def predicted(first, last):
        part = slice(first, last)
        condition = {"text": text[part]} if kind == "text" else {}
        with torch.no_grad(), drawing(3, torch.arange(first, last), 0):
            said = net(quantized[part], images[part], **condition)["image"]
            return said.value, said.target

    whole, parts = predicted(0, 8), [predicted(0, 3), predicted(3, 8)]
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.allclose(one, torch.cat(several), atol=1e-5)
