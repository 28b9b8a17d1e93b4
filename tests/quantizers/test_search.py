import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vistok.core.errors import VistokError
from vistok.core.sample_random import drawing
from vistok.quantizers import search
from vistok.quantizers.search import best_codes, best_scores, code_bias, sampled_codes


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest floating-point tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, torch.Tensor) and item.is_floating_point():
                self.numel = max(self.numel, item.numel())
        return out


@pytest.mark.parametrize("num_codes", [2, 3, 63, 64, 65, 1000, 8192, 8200, 20000])
@pytest.mark.parametrize("dim", [4, 8, 40])
def test_equals_brute_force_nearest_neighbour(num_codes, dim):
    queries, codebook = torch.randn(77, dim), torch.randn(num_codes, dim)
    distances = (queries.double()[:, None] - codebook.double()[None]).square().sum(-1)
    # float32 may swap codes whose distances agree to the last digits; then both are nearest.
    ids = best_codes(queries, codebook, code_bias(codebook))
    found = distances.gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(found, distances.amin(dim=1), rtol=1e-5, atol=1e-5)
    assert (ids == distances.argmin(dim=1)).double().mean() > 0.98


def test_dot_product_search_and_scores():
    queries, codebook = torch.randn(50, 16), torch.randn(300, 16)
    scores, ids = best_scores(queries, codebook)
    full = queries @ codebook.t()
    assert torch.equal(ids, full.argmax(dim=1))
    torch.testing.assert_close(scores, full.amax(dim=1))


@pytest.mark.parametrize("where", [(5, 70), (64, 8191), (0, 8192), (8191, 8192), (100, 9000)])
def test_the_lowest_index_wins_a_tie(where):
    codebook = torch.randn(9001, 4)
    best = torch.tensor([9.0, 9.0, 9.0, 9.0])
    codebook[list(where)] = best
    assert best_codes(best[None], codebook, code_bias(codebook)).item() == min(where)


def test_small_differences_far_from_zero_survive():
    """|z|² would swallow them in float32: the expanded distance fails here."""
    codebook = torch.rand(512, 8, dtype=torch.float64) / 512
    queries = (torch.rand(256, 8, dtype=torch.float64) / 512) + 0.0
    truth = (queries[:, None] - codebook[None]).square().sum(-1).argmin(1)
    q, e = queries.float(), codebook.float()
    assert (best_codes(q, e, code_bias(e)) == truth).float().mean() > 0.99
    shifted = q + 30.0
    expanded = (
        shifted.square().sum(1)[:, None] + (e + 30).square().sum(1) - 2 * shifted @ (e + 30).t()
    )
    assert (expanded.argmin(1) == truth).float().mean() < 0.9


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_block_size_and_batch_split_change_no_id(monkeypatch, block):
    queries, codebook = torch.randn(130, 8), torch.randn(2100, 8)
    whole = best_codes(queries, codebook, code_bias(codebook))
    monkeypatch.setattr(search, "_CPU_SCORES", block)
    monkeypatch.setattr(search, "_COLUMNS", 512)
    parts = [best_codes(part, codebook, code_bias(codebook)) for part in queries.split(37)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 63, 8191, 8195])
def test_nan_never_becomes_an_id(bad, position):
    codebook = torch.randn(8196, 4)
    codebook[position, 2] = bad
    with pytest.raises(VistokError, match="NaN"):
        best_codes(torch.randn(5, 4), codebook, code_bias(codebook))
    queries = torch.randn(5, 4)
    queries[3, 1] = bad
    with pytest.raises(VistokError, match="NaN"):
        best_codes(queries, torch.randn(100, 4))


def test_empty_queries():
    assert best_codes(torch.randn(0, 4), torch.randn(10, 4)).shape == (0,)


@pytest.mark.parametrize("codes", [2, 5, 64, 200])
def test_sampling_follows_the_softmax(codes, monkeypatch):
    """By the χ² of 200 000 draws; with blocks so small that they compete with each other."""
    monkeypatch.setattr(search, "_COLUMNS", 64)
    monkeypatch.setattr(search, "_CPU_SCORES", 1 << 16)
    codebook, query = torch.randn(codes, 3), torch.randn(1, 3)
    bias = code_bias(codebook)
    expected = ((query @ codebook.t() + bias).double() / 0.7).softmax(dim=1)[0] * 200_000
    ids = sampled_codes(query.expand(200_000, 3), codebook, bias, temperature=0.7)
    counts = torch.bincount(ids, minlength=codes)
    chi2 = ((counts - expected).square() / expected)[expected > 5].sum().item()
    assert chi2 < codes + 5 * math.sqrt(2 * codes) + 5
    assert counts[expected < 1e-6].sum() == 0


def test_a_cold_sample_is_the_best_code_and_equal_codes_share():
    queries, codebook = 30 * torch.randn(300, 4), torch.randn(20_000, 4)
    bias = code_bias(codebook)
    cold = sampled_codes(queries, codebook, bias, temperature=1e-6)
    assert torch.equal(cold, best_codes(queries, codebook, bias))
    twins = torch.cat([codebook[:1]] * 3)  # in one place three times
    shares = torch.bincount(sampled_codes(queries[:1].expand(30_000, 4), twins, None, 1e-6))
    torch.testing.assert_close(shares / 30_000, torch.full((3,), 1 / 3), rtol=0, atol=0.02)


def test_samples_belong_to_the_tokens_and_not_to_the_batch():
    queries, codebook = torch.randn(6, 10, 4), torch.randn(100, 4)
    positions = torch.arange(6)

    def sample(part):
        with drawing(3, positions[part], 0):
            flat = queries[part].flatten(0, 1)
            return sampled_codes(flat, codebook, None, 1.0).view(-1, 10)

    whole = sample(slice(0, 6))
    assert torch.equal(whole, torch.cat([sample(slice(0, 2)), sample(slice(2, 6))]))
    assert not torch.equal(whole[0], whole[1])


def test_sampling_refuses_nan():
    with pytest.raises(VistokError, match="NaN"):
        sampled_codes(torch.full((3, 4), torch.nan), torch.randn(100, 4), None, 1.0)


def test_no_matrix_of_all_scores():
    queries, codebook = torch.randn(4096, 4), torch.randn(16384, 4)
    with LargestTensor() as largest:
        best_codes(queries, codebook, code_bias(codebook))
    assert largest.numel <= search._CPU_SCORES < queries.shape[0] * codebook.shape[0] / 10


def test_compiles_without_graph_breaks():
    queries, codebook = torch.randn(40, 8), torch.randn(130, 8)

    def nearest(queries, codebook):
        return best_codes(queries, codebook, code_bias(codebook))

    compiled = torch.compile(nearest, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries, codebook), nearest(queries, codebook))
