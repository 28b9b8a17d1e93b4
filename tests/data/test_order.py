"""The order of samples against its definition: once per epoch, pure, local where it should be."""

import numpy as np
import pytest

from vistok.data.dataset import EvalSampler, StreamSampler
from vistok.data.order import (
    MixtureOrder,
    RenumberedOrder,
    ResampledOrder,
    SampleOrder,
    SampleRandom,
    sample_rng,
)

SIZES = [7, 1, 12, 0, 5]
N = sum(SIZES)


@pytest.mark.parametrize("window", [None, 1, 4, 10, N, 1000])
def test_each_sample_comes_once_per_epoch(window):
    order = SampleOrder(SIZES, seed=3, window=window)
    epochs = [[order(p) for p in range(e * N, (e + 1) * N)] for e in range(4)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(index for _, index in epoch) == list(range(N))
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("window", [None, 4])
def test_it_is_a_pure_function_of_the_position(window):
    line = [SampleOrder(SIZES, 3, window)(p) for p in range(3 * N)]  # a fresh one each time
    order = SampleOrder(SIZES, 3, window)
    for p in np.random.default_rng(0).permutation(3 * N).tolist():
        assert order(p) == line[p]


def test_seeds_differ_and_equal_seeds_agree():
    lines = [[SampleOrder(SIZES, seed, None)(p) for p in range(N)] for seed in (0, 1, 2**63, 0)]
    assert lines[0] == lines[3]
    assert len({tuple(line) for line in lines}) == 3


def test_windows_stay_within_few_shards():
    order = SampleOrder([10] * 20, seed=0, window=20)
    for begin in range(0, 200, 20):
        read = {order(p)[1] // 10 for p in range(begin, begin + 20)}
        assert len(read) == 2  # 20 samples laid end to end are two whole shards
    # and inside the windows samples are mixed
    assert [order(p)[1] for p in range(20)] != sorted(order(p)[1] for p in range(20))


def test_full_shuffle_is_uniform_enough():
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        order = SampleOrder([2, 4], seed=1, window=None)
        for place in range(6):
            counts[place, order(epoch * 6 + place)[1]] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.035  # five standard deviations


def test_one_generator_for_all_samples_is_that_of_each():
    random = SampleRandom()
    for number in range(50):
        key = (number % 3, 2**40 + number, 7 * number)
        fresh, again = sample_rng(*key), random(*key)
        for draw in (lambda g: g.integers(7), lambda g: g.random(), lambda g: g.permutation(9)):
            assert np.array_equal(draw(fresh), draw(again))


def test_sample_rng_depends_on_each_part():
    draws = {
        sample_rng(*key).random() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    }
    assert len(draws) == 4


@pytest.fixture
def world(monkeypatch):
    def be(rank, size):
        monkeypatch.setattr("vistok.core.ranks.rank", lambda: rank)
        monkeypatch.setattr("vistok.core.ranks.world_size", lambda: size)

    return be


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_see_the_one_stream(world, ranks):
    order = SampleOrder(SIZES, seed=5, window=6)
    streams = []
    for rank in range(ranks):
        world(rank, ranks)
        batches = iter(StreamSampler(order, 8 // ranks, lambda: 13))
        streams.append([next(batches) for _ in range(12)])
    joined = [request for step in zip(*streams, strict=True) for part in step for request in part]
    assert joined == [order(p) for p in range(13, 13 + 12 * 8)]


def test_length_is_an_epoch_of_global_batches(world):
    order = SampleOrder(SIZES, 0, None)
    assert len(StreamSampler(order, 4, lambda: 0)) == 6
    assert len(StreamSampler(order, 400, lambda: 0)) == 1
    world(0, 3)
    assert len(StreamSampler(order, 4, lambda: 0)) == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 5, 8, 9, 16, 23])
def test_validation_comes_once_in_equally_many_batches(world, ranks, count):
    batches = []
    for rank in range(ranks):
        world(rank, ranks)
        sampler = EvalSampler(count, 4)
        batches.append(list(sampler))
        assert len(batches[-1]) == len(sampler)
    steps = zip(*batches, strict=True)
    numbers = [number for step in steps for part in step for _, number in part if number >= 0]
    assert numbers == list(range(count))
    assert all(len({len(part) for part in step}) == 1 for step in zip(*batches, strict=True))


# ---------------------------------------------------------------------- mixtures and resampling


@pytest.mark.parametrize("unit", [1, 4])
def test_a_mixture_interleaves_the_streams_of_its_parts(unit):
    sizes, weights = ([5, 6], [7], [20, 3]), (5, 1, 2.5)
    parts = [SampleOrder(s, 3, 4, stream) for stream, s in enumerate(sizes)]
    starts = np.cumsum([0, 11, 7])
    mixture = MixtureOrder(parts, weights, unit)
    assert mixture.num_samples == 41
    reached = [0, 0, 0]  # by brute force: how far each part has come
    for p in range(25_000 * unit):
        epoch, index = mixture(p)
        owner = int(np.searchsorted(starts, index, side="right")) - 1
        expected = parts[owner](reached[owner])
        assert (epoch, index - starts[owner]) == expected
        reached[owner] += 1
        if p % unit == unit - 1:
            target = np.array(weights) / sum(weights) * (p + 1)
            assert np.abs(np.array(reached) - target).max() <= 2 * unit
    for p in np.random.default_rng(0).integers(0, 10**12, 50).tolist():
        assert MixtureOrder(parts, weights, unit)(p) == mixture(p)  # at once, however far


def test_equal_parts_of_a_mixture_are_shuffled_apart():
    parts = [SampleOrder([50], 0, None, stream) for stream in range(2)]
    assert [parts[0](p) for p in range(50)] != [parts[1](p) for p in range(50)]


def test_weights_too_small_for_a_block_are_refused():
    parts = [SampleOrder([5], 0, None, stream) for stream in range(2)]
    with pytest.raises(ValueError, match="below 1/20000"):
        MixtureOrder(parts, [1, 1e-6])
    assert MixtureOrder(parts, [1, 3]).shares.tolist() == [2500, 7500]


def test_renumbered():
    order = SampleOrder([4], 0, None)
    renamed = RenumberedOrder(order, np.array([10, 20, 30, 40]))
    assert [renamed(p) for p in range(8)] == [(e, 10 * (i + 1)) for e, i in map(order, range(8))]


@pytest.mark.parametrize("window", [None, 1, 6, 1000])
def test_resampling_draws_all_alike_with_replacement(window):
    counts = np.zeros(N)
    draws = 40_000
    order = ResampledOrder(SIZES, 7, window)
    line = [order(p) for p in range(draws)]
    for _, index in line:
        counts[index] += 1
    # Draws of a block share shards, so the spread is larger than that of independent ones.
    block = order.window
    assert np.abs(counts / draws - 1 / N).max() < 6 * np.sqrt(block / draws / N)
    assert len({number for number, _ in line}) == draws  # no crop comes twice
    first = [index for _, index in line[:N]]
    assert window == 1 or len(set(first)) < N
    fresh = ResampledOrder(SIZES, 7, window)
    for p in np.random.default_rng(0).integers(0, draws, 200).tolist():
        assert fresh(p) == line[p]


def test_resampling_in_windows_reads_few_shards():
    order = ResampledOrder([10] * 50, seed=0, window=20)
    for begin in range(0, 400, 20):
        assert len({order(p)[1] // 10 for p in range(begin, begin + 20)}) <= 2


def test_a_third_is_missing_as_theory_has_it():
    order = ResampledOrder([5000], seed=1, window=None)
    assert abs(len({order(p)[1] for p in range(5000)}) / 5000 - (1 - np.exp(-1))) < 0.03
