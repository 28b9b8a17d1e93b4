"""SimVQ against its definition in float64."""

import pytest
import torch

from quantizers.conftest import total_loss, train
from vistok.quantizers.simvq import SimVQ


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_losses_and_gradients_equal_the_definition(metric):
    quantizer = SimVQ(6, 30, metric=metric)
    z = torch.randn(2, 20, 6, requires_grad=True)
    mask = torch.rand(2, 20) < 0.7
    output = quantizer(z, mask)
    total_loss(quantizer, output).backward()

    w = quantizer.map.weight.detach().double().requires_grad_()
    b = quantizer.map.bias.detach().double().requires_grad_()
    z64 = z.detach().double().requires_grad_()
    e, u = quantizer.embedding.double() @ w.T + b, z64
    if metric == "cosine":
        e, u = e / e.norm(dim=-1, keepdim=True), u / u.norm(dim=-1, keepdim=True)
    ids = (u[..., None, :] - e).square().sum(-1).argmin(-1)
    q = e[ids]
    loss = 0.25 * (u - q.detach()).square()[mask].mean() + (q - u.detach()).square()[mask].mean()
    loss.backward()
    assert torch.equal(output.indices[..., 0], ids)
    found = total_loss(quantizer, output).double()
    torch.testing.assert_close(found, loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad.double(), z64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.map.weight.grad.double(), w.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.map.bias.grad.double(), b.grad, rtol=1e-4, atol=1e-6)


def test_ids_decode_and_export_with_the_map():
    quantizer = SimVQ(6, 30).eval()
    table = quantizer.codebooks()[0]
    torch.testing.assert_close(table, quantizer.map(quantizer.embedding).detach())
    assert (table - quantizer.embedding).norm() > 0.5 * table.norm()
    ids = torch.randint(30, (3, 7, 1))
    assert torch.equal(quantizer.decode(ids), table[ids[..., 0]])
    # Whatever else is in the batch, the same bits.
    assert torch.equal(quantizer.decode(ids)[1:2, :3], quantizer.decode(ids[1:2, :3]))


def test_codes_are_frozen_and_the_map_moves_all_of_them():
    quantizer = SimVQ(8, 64)
    assert {name for name, _ in quantizer.named_parameters()} == {"map.weight", "map.bias"}
    codes, table = quantizer.embedding.clone(), quantizer.codebooks()[0]
    centers = torch.randn(20, 8)
    batches = [centers[torch.randint(20, (4, 64))] for _ in range(100)]
    before = quantizer(batches[0]).losses["commitment"].item()
    train(quantizer, batches, lr=1e-2)
    assert torch.equal(codes, quantizer.embedding)
    assert ((quantizer.codebooks()[0] - table).norm(dim=-1) > 0).all()
    assert quantizer(batches[0]).losses["commitment"] < 0.6 * before
