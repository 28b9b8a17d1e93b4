"""Codes by logits and Gumbel noise: a start from data picks the nearest code."""

import pytest
import torch

from vistok.quantizers.gumbel import GumbelLogits


def clusters(count=16, dim=8):
    centers = 3 * torch.randn(count, dim)
    return centers, centers.repeat(64, 1) + 0.1 * torch.randn(64 * count, dim)


def test_a_start_by_k_means_picks_the_nearest_code():
    centers, latents = clusters()
    quantizer = GumbelLogits(8, 32, kmeans_init=True)
    assert quantizer.num_init_latents == 4 * 32
    quantizer.initialize_from(latents)
    (codes,) = quantizer.codebooks()
    quantizer.eval()
    ids = quantizer.encode(latents[None])[0, :, 0]
    assert torch.equal(ids, torch.cdist(latents, codes).argmin(dim=1))
    assert (codes[ids] - latents).norm(dim=1).mean() < 0.5
    # Noise hardly leads to codes of another cluster.
    quantizer.train()
    found = codes[quantizer(latents[None]).indices[0, :, 0]]
    assert ((found - latents).norm(dim=1) < 1).float().mean() > 0.95


def test_as_published_it_starts_as_it_is_drawn():
    quantizer = GumbelLogits(8, 32)
    before = quantizer.codebooks()[0].clone()
    assert quantizer.num_init_latents == 0 and "kmeans_init" in quantizer.against_collapse
    quantizer.initialize_from(clusters()[1])
    assert torch.equal(quantizer.codebooks()[0], before)


@pytest.mark.parametrize("rows", [0, 3])
def test_few_latents_leave_no_number_that_is_not_finite(rows):
    quantizer = GumbelLogits(8, 32, kmeans_init=True)
    quantizer.initialize_from(torch.ones(rows, 8)) if rows else quantizer.initialize(
        torch.ones(0, 8)
    )
    output = quantizer(torch.ones(1, 4, 8))
    assert output.quantized.isfinite().all() and output.losses["prior"].isfinite()


def test_codes_that_fit_few_latents_exactly_leave_a_gradient():
    """As many latents as codes, and a few more: logits as sure as k-means would be are constant."""
    torch.manual_seed(0)
    latents = torch.randn(40, 8)
    quantizer = GumbelLogits(8, 32, kmeans_init=True)
    quantizer.initialize_from(latents)
    given = latents[None].requires_grad_()
    (quantizer(given).quantized.square().sum()).backward()
    assert given.grad.abs().amax(dim=-1).max() > 1e-2  # 1e-5 where logits are that sure
