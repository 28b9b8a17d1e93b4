"""Binary latents (BAE, Instella)."""

import pytest
import torch

from vistok.core.errors import ConfigError
from vistok.quantizers.binary import BinaryLatents


def test_every_id_there_and_back():
    quantizer = BinaryLatents(10, 32, 2).eval()
    ids = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij"), -1)
    ids = ids.reshape(1, -1, 2)
    bits = torch.cat([quantizer.codebooks()[q][ids[..., q]] for q in range(2)], -1)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(quantizer.encode(bits - 0.5), ids)
    assert quantizer.encode(torch.tensor([[[1.0] + [-1] * 9]])).tolist() == [[[1, 0]]]
    # A token is the sum of the vectors of its 1s.
    expected = bits @ quantizer.project_out.weight.T
    torch.testing.assert_close(quantizer.decode(ids), expected)


def test_training_samples_at_the_temperature_and_eval_does_not():
    torch.manual_seed(0)
    logits = torch.tensor([-1.0, -0.2, 0.0, 0.2, 1.0])
    for temperature in (1.0, 0.1):
        quantizer = BinaryLatents(5, 32, temperature=temperature)
        z = logits.expand(1, 20_000, 5)
        ids = quantizer.train()(z).indices[0, :, 0]
        share = torch.stack([(ids >> bit & 1).float().mean() for bit in range(5)])
        torch.testing.assert_close(share, torch.sigmoid(logits / temperature), atol=0.02, rtol=0)
        assert (quantizer.eval()(z).indices == 0b11000).all()


def test_training_output_is_the_decoding_of_its_sampled_ids():
    quantizer = BinaryLatents(8, 16, 2).train()
    output = quantizer(torch.randn(2, 30, 8))
    assert torch.equal(output.quantized, quantizer.decode(output.indices))


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_gradient_is_that_of_the_probability_without_temperature(temperature):
    torch.manual_seed(1)
    quantizer = BinaryLatents(6, 64, temperature=temperature, binarization_weight=1.0).train()
    z = torch.randn(2, 9, 6, requires_grad=True)
    slope = torch.randn(2, 9, 6)
    output = quantizer(z)
    ((output.quantized * slope).sum() + output.losses["binarization"]).backward()
    x = z.detach().double().requires_grad_()
    p = torch.sigmoid(x)
    matrix = quantizer.project_out.weight.detach().double()
    bits = quantizer.codebooks()[0][output.indices[..., 0]].double()
    variance = (p * (1 - p)).mean()
    (((p @ matrix.T) * slope).sum() + variance).backward()
    torch.testing.assert_close(z.grad.double(), x.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        output.losses["binarization"].double(), variance.detach(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        quantizer.project_out.weight.grad.double(),
        torch.einsum("bnd,bnk->dk", slope.double(), bits),
        rtol=1e-4,
        atol=1e-5,
    )


def test_temperature_is_annealed_and_resumed():
    settings = {"temperature": 1.0, "final_temperature": 0.2, "anneal_steps": 4}
    quantizer = BinaryLatents(4, 16, **settings).train()
    seen = []
    for _ in range(6):
        seen.append(quantizer(torch.zeros(1, 1, 4)).metrics["temperature"].item())
        quantizer.after_step()
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    resumed = BinaryLatents(4, 16, **settings)
    resumed.load_state_dict(quantizer.state_dict())
    assert resumed.current_temperature() == quantizer.current_temperature()


def test_masked_tokens_enter_no_loss():
    z = torch.randn(2, 10, 4)
    mask = torch.rand(2, 10) < 0.5
    mask[0, 0] = True
    quantizer = BinaryLatents(4, 16).train()
    p = torch.sigmoid(z[mask])
    torch.testing.assert_close(quantizer(z, mask).losses["binarization"], (p * (1 - p)).mean())


def test_no_tokens():
    output = BinaryLatents(4, 16).train()(torch.zeros(0, 5, 4))
    assert output.quantized.shape == (0, 5, 4) and output.losses["binarization"] == 0


def test_sixty_four_bits_in_eight_ids():
    quantizer = BinaryLatents(96, 256, 8).eval()
    assert quantizer.bits_per_token == 64 and quantizer.num_indices == 8
    z = torch.randn(2, 300, 96)
    output = quantizer(z)
    bits = (quantizer.project_in(z) > 0).float()
    torch.testing.assert_close(output.quantized, bits @ quantizer.project_out.weight.T)


def test_bad_values_name_their_key():
    with pytest.raises(ConfigError, match=r"^codebook_size=100: .*power of two"):
        BinaryLatents(4, 100)
    with pytest.raises(ConfigError, match=r"^final_temperature=0.*: must be a number above 0"):
        BinaryLatents(4, 16, final_temperature=0.0)
    with pytest.raises(ConfigError, match=r"^anneal_steps=-1: must be a whole number, 0"):
        BinaryLatents(4, 16, anneal_steps=-1)
