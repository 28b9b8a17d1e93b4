"""IBQ against its dense one-hot form in float64, and against fused attention."""

import pytest
import torch
import torch.nn.functional as F

from quantizers.conftest import total_loss, train
from vistok.core.errors import ConfigError
from vistok.quantizers.ibq import IBQ
from vistok.quantizers.soft_assignment import soft_straight_through


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_dense_form(temperature, masked):
    quantizer = IBQ(
        6, 40, temperature=temperature, entropy_temperature=0.3, double_weight=0.7, init_std=0.8
    )
    z = torch.randn(2, 25, 6, requires_grad=True)
    mask = torch.rand(2, 25) < 0.6 if masked else None
    slope = torch.randn(2, 25, 6)
    output = quantizer(z, mask)
    (total_loss(quantizer, output) + (output.quantized * slope).sum()).backward()

    z64 = z.detach().double().requires_grad_()
    e64 = quantizer.embedding.detach().double().requires_grad_()
    keep = torch.ones(2, 25, dtype=torch.bool) if mask is None else mask
    logits = z64 @ e64.T
    p = (logits / temperature).softmax(-1)
    hard = F.one_hot(logits.argmax(-1), 40).double()
    # The value of the one-hot's soft part is zero, so that its codes get no gradient from it.
    quantized = hard @ e64 + (p - p.detach()) @ e64
    q = hard @ e64
    sharp = (logits / 0.3).softmax(-1)[keep]
    average = sharp.mean(0)
    losses = {
        "double": (quantized - z64).square()[keep].mean(),
        "commitment": (z64 - q.detach()).square()[keep].mean(),
        "codebook": (q - z64.detach()).square()[keep].mean(),
        "entropy": -(sharp * sharp.log()).sum(-1).mean() + (average * average.log()).sum(),
    }
    assert set(losses) == set(output.losses)
    weights = {"double": 0.7, "commitment": 1.0, "codebook": 0.25, "entropy": 0.05}
    total = sum(weights[name] * loss for name, loss in losses.items())
    (total + (quantized * slope.double()).sum()).backward()

    assert torch.equal(output.indices[..., 0], hard.argmax(-1))
    for name, loss in losses.items():
        torch.testing.assert_close(
            output.losses[name].double(), loss.detach(), rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(output.quantized.double(), quantized.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.grad.double(), z64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.embedding.grad.double(), e64.grad, rtol=1e-4, atol=1e-5)


def test_every_code_receives_a_gradient():
    quantizer = IBQ(8, 200, entropy_weight=0.0)
    output = quantizer(torch.randn(1, 10, 8))
    output.quantized.square().sum().backward()
    assert output.indices.unique().numel() <= 10
    assert (quantizer.embedding.grad.abs().sum(1) > 0).all()


def test_equals_fused_attention():
    """The form used on a GPU: E_i + A − sg A with A from scaled_dot_product_attention."""
    z, e = torch.randn(30, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    slope = torch.randn(30, 16)
    q = torch.randn(30, 16)
    ours, _ = soft_straight_through(z, q, e, scale=0.7)
    assert torch.equal(ours, q)
    blocks = torch.autograd.grad((ours * slope).sum(), (z, e))
    soft = F.scaled_dot_product_attention(z[None], e[None], e.detach()[None], scale=0.7)[0]
    fused = torch.autograd.grad((soft * slope).sum(), (z, e))
    for a, b in zip(blocks, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_index_is_the_largest_dot_product_in_eval_too():
    quantizer = IBQ(4, 3).eval()
    with torch.no_grad():
        quantizer.embedding.copy_(torch.eye(4)[:3] * torch.tensor([[1.0], [1.0], [9.0]]))
    z = torch.tensor([[[1.0, 0.0, 0.5, 0.0]]])  # nearest is code 0, the largest product code 2
    assert quantizer(z).indices.item() == 2


def test_loss_falls():
    centers = torch.randn(20, 8)
    batches = [centers[torch.randint(20, (4, 64))] for _ in range(150)]
    quantizer = IBQ(8, 32)
    before = quantizer(batches[0]).losses["commitment"].item()
    train(quantizer, batches, lr=1e-2)
    assert quantizer(batches[0]).losses["commitment"] < 0.6 * before


def test_wrong_temperatures_are_refused():
    with pytest.raises(ConfigError, match=r"^temperature=.*: must be a number above 0"):
        IBQ(4, 8, temperature=0.0)
    with pytest.raises(ConfigError, match="entropy_temperature"):
        IBQ(4, 8, entropy_temperature=-1.0)
