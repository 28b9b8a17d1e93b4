"""Binary spherical quantization."""

import pytest
import torch

from vistok.quantizers.bsq import BSQ


def test_codes_lie_on_the_unit_sphere_and_the_error_is_bounded():
    quantizer = BSQ(18).eval()
    z = 10 * torch.randn(1, 2000, 18)
    codes = quantizer(z).quantized
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(1, 2000))
    unit = z / z.norm(dim=-1, keepdim=True)
    assert (unit - codes).norm(dim=-1).mean() < (2 - 2 / 18**0.5) ** 0.5


def test_code_is_the_nearest_on_the_sphere():
    quantizer = BSQ(6, 64).eval()
    z = torch.randn(1, 500, 6)
    unit = z / z.norm(dim=-1, keepdim=True)
    nearest = torch.cdist(unit[0], quantizer.codebooks()[0]).argmin(-1)
    assert torch.equal(quantizer.encode(z)[0, :, 0], nearest)


def test_gradient_passes_the_normalisation_with_factor_one():
    quantizer = BSQ(5, 32, entropy_weight=0.0)
    z = torch.randn(2, 7, 5, requires_grad=True)
    slope = torch.randn(2, 7, 5)
    (quantizer.train()(z).quantized * slope).sum().backward()
    x = z.detach().double()
    length = x.norm(dim=-1, keepdim=True)
    unit = x / length
    expected = (slope - unit * (unit * slope).sum(-1, keepdim=True)) / length
    torch.testing.assert_close(z.grad.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("entropy", ["joint", "per_codebook", "per_bit"])
def test_losses_equal_the_definition(entropy):
    torch.manual_seed(0)
    quantizer = BSQ(6, 8, 2, entropy=entropy, temperature=0.3, commitment_weight=1.0)
    z = torch.randn(2, 40, 6, requires_grad=True)
    output = quantizer.train()(z)
    sum(output.losses.values()).backward()

    x = z.detach().double().flatten(0, 1).requires_grad_()
    unit = x / x.norm(dim=-1, keepdim=True)
    group = {"joint": 6, "per_codebook": 3, "per_bit": 1}[entropy]
    bits = torch.arange(2**group)[:, None] >> torch.arange(group) & 1
    codes = (2.0 * bits - 1).double() / 6**0.5
    total = 0.0
    for part in unit.split(group, -1):
        p = (2 * part @ codes.T / 0.3).softmax(-1)
        mean = p.mean(0)
        total = total - (p * p.log()).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
    torch.testing.assert_close(
        output.losses["entropy"].double(), total.detach(), rtol=1e-5, atol=1e-6
    )
    total = total + ((unit - torch.where(unit > 0, 1, -1) / 6**0.5) ** 2).mean()
    total.backward()
    torch.testing.assert_close(z.grad.flatten(0, 1).double(), x.grad, rtol=1e-4, atol=1e-7)


def test_zero_latent_has_a_code_and_a_finite_gradient():
    z = torch.zeros(1, 3, 8, requires_grad=True)
    output = BSQ(8, 256).train()(z)
    (output.quantized.sum() + output.losses["entropy"]).backward()
    assert (output.indices == 0).all() and torch.isfinite(z.grad).all()


def test_projection_and_state_round_trip():
    first, second = BSQ(32, 256), BSQ(32, 256)
    second.load_state_dict(first.state_dict())
    z = torch.randn(2, 10, 32)
    assert torch.equal(first.eval()(z).quantized, second.eval()(z).quantized)
    assert not any("codebook" in key for key in first.state_dict())


def test_agrees_with_vector_quantize_pytorch():
    peers = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(1)
    peer = peers.LFQ(dim=7, codebook_size=128, spherical=True).train()
    z = torch.randn(2, 30, 7)
    expected, losses = peer(z, inv_temperature=1.0, return_loss_breakdown=True)
    ours = BSQ(7, 128, entropy="joint", entropy_eps=0.0).train()(z)
    torch.testing.assert_close(ours.quantized, expected.quantized)
    torch.testing.assert_close(ours.metrics["batch_entropy"], losses.batch_entropy)
    torch.testing.assert_close(ours.metrics["sample_entropy"], losses.per_sample_entropy)
