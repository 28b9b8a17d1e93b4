"""A stream built to collapse a codebook: few clusters, then a shift to many."""

import re

import pytest
import torch
from omegaconf import OmegaConf

from quantizers.conftest import NAMES, build, load_config, total_loss
from vistok.quantizers.codebook_stats import CodebookStats
from vistok.quantizers.usage import CodeUsage, collapse_advice
from vistok.quantizers.vq import VectorQuantizer

CODES, DIM = 64, 8


def run(steps=200, **options):
    """Train on 3 tight clusters, then on 200 elsewhere; usage of the last 20 steps."""
    quantizer = VectorQuantizer(DIM, CODES, ema_decay=0.95, dead_code_threshold=0.1, **options)
    params = list(quantizer.parameters())
    optimizers = [torch.optim.Adam(params, 1e-3)] if params else []
    few = torch.tensor([[1.0], [2.0], [3.0]]) * torch.ones(3, DIM)
    many = -4 + 3 * torch.randn(200, DIM)
    for step in range(2 * steps):
        centers = few if step < steps else many
        z = centers[torch.randint(len(centers), (2, 256))] + 1e-3 * torch.randn(2, 256, DIM)
        if step == 2 * steps - 20:
            quantizer.usage.reset()
        loss = total_loss(quantizer, quantizer(z))
        for optimizer in optimizers:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        quantizer.after_step(optimizers)
    return quantizer


def advice_of(usage):
    return collapse_advice(usage, "this and that")


RULES = [("ema", "euclidean"), ("ema", "cosine"), ("gradient", "euclidean")]


@pytest.mark.parametrize(("codebook", "metric"), RULES)
def test_the_alarm_fires_with_advice(codebook, metric):
    quantizer = run(revival="none", codebook=codebook, metric=metric)
    assert quantizer.usage.compute()["codebook_usage"] < 0.3
    advice = collapse_advice(quantizer.usage, quantizer.against_collapse)
    assert advice is not None and "\n" not in advice
    assert "quantizer.revival=restart" in advice and f"of {CODES} codes" in advice


@pytest.mark.parametrize(("codebook", "metric"), [*RULES, ("gradient", "cosine")])
def test_restart_recovers(codebook, metric):
    usage = run(revival="restart", codebook=codebook, metric=metric).usage
    assert usage.compute()["codebook_usage"] > 0.8
    assert advice_of(usage) is None


@pytest.mark.parametrize("name", NAMES)
def test_advice_names_keys_that_the_config_has(name):
    advice = build(name).against_collapse
    for key in re.findall(r"quantizer\.(\S+?)(?:=\S+)?(?:[, ]|$)", advice):
        assert OmegaConf.select(load_config(name), key) is not None, key
    assert "quantizer=" in advice or "lower optimizer.lr" in advice


def window(*histograms):
    usage = CodeUsage([len(histogram) for histogram in histograms])
    usage.restore(torch.cat([torch.as_tensor(histogram) for histogram in histograms]))
    return usage


def test_advice_looks_at_usage_perplexity_and_the_length_of_the_window():
    even = [10] * 100
    assert advice_of(window(even)) is None
    assert "used 5 of 100" in advice_of(window([200] * 5 + [0] * 95))
    # All codes in use, but one does the work.
    assert "perplexity 1.0" in advice_of(window([1_000_000] + [1] * 99))
    # The worst slot is the one that is named.
    assert advice_of(window(even, [1000] + [0] * 99)).startswith("codebook 1 ")
    # A short window cannot have used more, and an empty one says nothing.
    assert advice_of(window([1] * 10 + [0] * 990)) is None
    assert advice_of(window([0] * 50)) is None


def test_usage_statistics():
    usage = CodeUsage([4, 2])
    ids = torch.tensor([[[0, 1], [0, 1], [3, 1], [-1, 0]]])
    usage.update(ids)
    usage.update(ids, torch.tensor([[True, False, False, True]]))
    first, second = usage.histograms()
    assert first.tolist() == [3, 0, 0, 1] and second.tolist() == [2, 4]
    computed = usage.compute()
    assert computed["dead_codes"] == 2 and computed["codebook_usage"] == 0.75
    p = torch.tensor([0.75, 0.25]), torch.tensor([1 / 3, 2 / 3])
    expected = sum(float((-(q * q.log()).sum()).exp()) for q in p) / 2
    assert abs(computed["perplexity"] - expected) < 1e-5
    assert not list(usage.state_dict()) and not list(usage.buffers())


def test_averages_are_smoothed_as_published():
    """van den Oord et al. 2017: (n + e) / (N + K e) N, so that the smoothed counts add up to N."""
    sums = torch.randn(3, 2, dtype=torch.float64)
    stats = CodebookStats(sums, 0.9, True, 0.0, "none").double()
    stats.counts.copy_(torch.tensor([0.0, 0.5, 2.5]))
    codes = torch.empty_like(sums)
    stats.means_into(codes)
    smoothed = (sums / codes)[:, 0]
    torch.testing.assert_close(smoothed.sum(), stats.counts.sum(), rtol=1e-12, atol=0)
    share = (stats.counts + 1e-5) / (3 + 3e-5)
    torch.testing.assert_close(smoothed, 3 * share, rtol=1e-12, atol=0)
