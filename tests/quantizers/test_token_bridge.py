"""TokenBridge: post-training quantization per channel."""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from vistok.core.errors import ConfigError
from vistok.quantizers.token_bridge import TokenBridge, normal_levels


def oracle_levels(count: int, limit: float) -> list[float]:
    """Truncated normal means, with the standard library alone."""
    normal = NormalDist()
    inner = [normal.inv_cdf(k / count) for k in range(1, count)]
    edges = [-limit, *(min(max(edge, -limit), limit) for edge in inner), limit]
    return [
        (normal.pdf(a) - normal.pdf(b)) / (normal.cdf(b) - normal.cdf(a))
        for a, b in pairwise(edges)
    ]


@pytest.mark.parametrize("count", [2, 5, 64, 512])
def test_levels_equal_the_definition(count):
    levels = normal_levels(count, 3.0)
    expected = torch.tensor(oracle_levels(count, 3.0), dtype=torch.float64)
    torch.testing.assert_close(levels, expected)


def test_indices_equal_the_released_procedure():
    # Map [-5, 5] to [-3, 3], clamp, take the nearest value by a full table, map back.
    quantizer = TokenBridge(4, None).eval()
    z = 3 * torch.randn(2, 500, 4)
    output = quantizer(z)
    values = torch.tensor(oracle_levels(64, 3.0), dtype=torch.float64)
    scaled = ((z.double() + 5) / 10 * 6 - 3).clamp(-3, 3)
    indices = (scaled[..., None] - values).abs().argmin(-1)
    assert torch.equal(output.indices, indices)
    expected = ((values[indices] + 3) / 6 * 10 - 5).float()
    torch.testing.assert_close(output.quantized, expected)
    assert output.quantized.abs().max().item() == pytest.approx(4.06, abs=0.01)


def test_every_id_there_and_back():
    quantizer = TokenBridge(3, None, 512).eval()
    quantizer.initialize(torch.randn(500, 3) * torch.tensor([0.1, 1, 20]) + 3)
    ids = torch.arange(512)[None, :, None].expand(1, 512, 3)
    vectors = quantizer.decode(ids)
    assert torch.equal(quantizer.encode(vectors), ids)
    assert torch.equal(quantizer(vectors).quantized, vectors)
    rows = [table[ids[..., q], 0] for q, table in enumerate(quantizer.codebooks())]
    assert torch.equal(torch.stack(rows, -1), vectors)
    assert quantizer.codebooks()[0].shape == (512, 1)


@pytest.mark.filterwarnings("error")
def test_latents_that_lie_channels_first_are_searched_without_a_warning():
    """As an encoder of convolutions leaves them; torch's search warns of such memory, once."""
    latents = torch.randn(2, 3, 50).transpose(1, 2)
    quantizer = TokenBridge(3, None).eval()
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        ids = quantizer.encode(latents)
    finally:
        torch.set_warn_always(before)
    assert torch.equal(ids, quantizer.encode(latents.contiguous()))


def test_attached_after_training_it_fits_the_latents():
    """Whatever their scale, calibrated latents lose the error of the normal quantizer."""
    torch.manual_seed(0)
    latents = torch.randn(20_000, 3) * torch.tensor([0.05, 1.0, 30.0]) + torch.tensor([2.0, 0, -7])
    quantizer = TokenBridge(3, None, value_range=3.0).eval()
    blind = (quantizer(latents[None]).quantized[0] - latents).std(0) / latents.std(0)
    quantizer.initialize(latents)
    fitted = (quantizer(latents[None]).quantized[0] - latents).std(0) / latents.std(0)
    assert fitted.max() < 0.08 and blind[2] > 0.5
    counts = torch.bincount(quantizer.encode(latents[None])[0, :, 1], minlength=64) / 20_000
    entropy = -torch.special.xlogy(counts, counts).sum() / math.log(2)
    assert entropy > 5.9  # equally probable levels; stretched by 5/3 it is 5.72
    quantizer = TokenBridge(3, None).eval()
    quantizer.initialize(latents)
    counts = torch.bincount(quantizer.encode(latents[None])[0, :, 1], minlength=64) / 20_000
    entropy = -torch.special.xlogy(counts, counts).sum() / math.log(2)
    assert entropy.item() == pytest.approx(5.72, abs=0.03)


def test_calibration_is_saved():
    first, second = TokenBridge(8, 4), TokenBridge(8, 4)
    first.initialize(5 + 3 * torch.randn(first.num_init_latents, 8))
    second.load_state_dict(first.state_dict())
    z = torch.randn(1, 20, 8)
    assert torch.equal(first.eval()(z).quantized, second.eval()(z).quantized)
    frozen = TokenBridge(8, 4, calibrate=False)
    frozen.initialize(5 + 3 * torch.randn(100, 8))
    assert frozen.num_init_latents == 0 and (frozen.std == 1).all()


def test_training_gradients_equal_the_definition():
    quantizer = TokenBridge(3, None, calibrate=False)
    z = (2 * torch.randn(2, 50, 3) + 0.5).requires_grad_()
    slope = torch.randn(2, 50, 3)
    output = quantizer.train()(z)
    assert torch.equal(output.quantized, quantizer.decode(output.indices))
    ((output.quantized * slope).sum() + output.losses["moment"]).backward()
    x = z.detach().double().flatten(0, 1).requires_grad_()
    variance = x.var(0, correction=0)
    loss = ((variance + x.mean(0) ** 2 - 1 - variance.log()) / 2).mean()
    loss.backward()
    torch.testing.assert_close(
        output.losses["moment"].double(), loss.detach(), rtol=1e-5, atol=1e-6
    )
    expected = slope.double().flatten(0, 1) + x.grad
    torch.testing.assert_close(z.grad.double().flatten(0, 1), expected, rtol=1e-4, atol=1e-6)


def test_moment_loss_brings_latents_to_the_levels():
    quantizer = TokenBridge(2, None, calibrate=False).train()
    z = (0.05 * torch.randn(1, 400, 2) + 3).requires_grad_()
    optimizer = torch.optim.Adam([z], 0.1)
    before = quantizer(z).losses["moment"].item()
    for _ in range(100):
        optimizer.zero_grad()
        quantizer(z).losses["moment"].backward()
        optimizer.step()
    assert before > 5 and quantizer(z).losses["moment"].item() < 0.05
    assert z.detach().std().item() == pytest.approx(1, abs=0.2)


def test_masked_tokens_and_empty_batches():
    quantizer = TokenBridge(2, None).train()
    z = torch.randn(2, 30, 2)
    mask = torch.rand(2, 30) < 0.5
    alone = quantizer(z[mask][None])
    masked = quantizer(z, mask)
    torch.testing.assert_close(masked.losses["moment"], alone.losses["moment"])
    assert quantizer(z, torch.zeros_like(mask)).losses["moment"] == 0
    assert quantizer(torch.zeros(0, 4, 2)).losses["moment"] == 0


def test_bad_values_name_their_key():
    with pytest.raises(ConfigError, match=r"^codebook_size=1024"):
        TokenBridge(4, None, 1024)
    with pytest.raises(ConfigError, match=r"^codebook_size=1: must be a whole number, 2 or more"):
        TokenBridge(4, None, 1)
    with pytest.raises(ConfigError, match=r"^value_range=0"):
        TokenBridge(4, None, value_range=0.0)


def test_post_training_trains_a_continuous_tokenizer():
    torch.manual_seed(0)
    quantizer = TokenBridge(3, None, post_training=True, decay=0.9)
    scale, shift = torch.tensor([0.2, 1.0, 5.0]), torch.tensor([1.0, 0.0, -3.0])
    latents = [(torch.randn(4, 500, 3) * scale + shift).requires_grad_() for _ in range(40)]
    output = quantizer(latents[0])
    assert torch.equal(output.quantized, latents[0])  # the decoder sees no rounding
    (gradient,) = torch.autograd.grad(output.quantized.sum(), latents[0])
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert torch.equal(output.indices, quantizer.encode(latents[0]))

    mean, variance = torch.zeros(3), torch.ones(3)
    quantizer._moments.clear()
    for z in latents:  # two forwards a step, as with accumulated gradients
        quantizer(z[:2]), quantizer(z[2:])
        quantizer.after_step()
        now = z.detach().flatten(0, 1)
        parts = now.mean(0), now.var(0, correction=0)
        # Moments of the mixture of 90 % of what was and 10 % of the step.
        mixed = 0.9 * mean + 0.1 * parts[0]
        variance = (
            0.9 * (variance + mean.square()) + 0.1 * (parts[1] + parts[0].square())
        ) - mixed.square()
        mean = mixed
    torch.testing.assert_close(quantizer.mean, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantizer.std, variance.sqrt(), rtol=1e-4, atol=1e-4)

    quantizer.eval()
    z = latents[-1].detach()
    output = quantizer(z)
    assert torch.equal(output.quantized, quantizer.decode(output.indices))
    error = (output.quantized - z).flatten(0, 1).std(0) / scale
    assert error.min() > 0.001 and error.max() < 0.2


def test_post_training_pulls_latents_to_the_standard_normal():
    quantizer = TokenBridge(2, None, post_training=True)
    z = (3 * torch.randn(2, 50, 2) + 4).requires_grad_()
    loss = quantizer(z).losses["moment"]
    rows = z.detach().double().flatten(0, 1)
    mean, variance = rows.mean(0), rows.var(0, correction=0)
    expected = (variance + mean.square() - 1 - variance.log()).mean() / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, z)
    assert (gradient.flatten(0, 1).sum(0) > 0).all()  # down, towards 0
