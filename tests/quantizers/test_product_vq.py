import pytest
import torch

from vistok.core.errors import ConfigError
from vistok.quantizers.product_vq import ProductVQ


def build(dim=8, size=16, codebook_dim=None, **options):
    torch.manual_seed(0)
    options = {
        "num_codebooks": 2,
        "codebook": "gradient",
        "metric": "euclidean",
        "kmeans_init": False,
        **options,
    }
    quantizer = ProductVQ(dim, size, codebook_dim, **options)
    for book in quantizer.books:
        book.embedding.data.copy_(book._metric(torch.randn_like(book.embedding)))
    return quantizer


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_matches_the_definition_and_its_gradients(metric):
    quantizer = build(dim=12, num_codebooks=3, metric=metric, disentanglement_weight=0.1)
    z = torch.randn(2, 5, 12, requires_grad=True)
    upstream = torch.randn_like(z)
    output = quantizer(z)
    loss = (output.quantized * upstream).sum()
    loss = loss + sum(quantizer.loss_weights[name] * each for name, each in output.losses.items())
    loss.backward()
    assert quantizer.loss_weights == {"commitment": 0.25, "codebook": 1.0, "disentanglement": 0.1}

    z64 = z.detach().double().requires_grad_()
    tables = [book.embedding.detach().double().requires_grad_() for book in quantizer.books]
    ids, through, commitment, codebook = [], [], 0, 0
    for part, table in zip(z64.split(4, dim=-1), tables, strict=True):
        part, table = (unit(part), unit(table)) if metric == "cosine" else (part, table)
        chosen = torch.cdist(part, table[None]).argmin(-1)
        q = table[chosen]
        commitment = commitment + (part - q.detach()).square().mean() / 3
        codebook = codebook + (q - part.detach()).square().mean() / 3
        ids.append(chosen)
        through.append(part + (q - part).detach())
    cosines = [
        (unit(through[a]) * unit(through[b])).sum(-1).square().mean()
        for a, b in [(0, 1), (0, 2), (1, 2)]
    ]
    disentanglement = sum(cosines) / 3
    quantized = torch.cat(through, -1)
    loss = (quantized * upstream.double()).sum() + 0.25 * commitment + codebook
    (loss + 0.1 * disentanglement).backward()

    assert torch.equal(output.indices, torch.stack(ids, -1))
    assert torch.allclose(output.quantized.double(), quantized, atol=1e-5)
    for name, exact in [
        ("commitment", commitment),
        ("codebook", codebook),
        ("disentanglement", disentanglement),
    ]:
        assert torch.allclose(output.losses[name].double(), exact, atol=1e-6), name
    assert torch.allclose(z.grad.double(), z64.grad, atol=1e-5)
    for book, table in zip(quantizer.books, tables, strict=True):
        assert torch.allclose(book.embedding.grad.double(), table.grad, atol=1e-6)


def test_disentanglement_trains_the_encoder_and_never_a_codebook():
    quantizer = build(disentanglement_weight=0.1)
    z = torch.randn(2, 5, 8, requires_grad=True)
    quantizer(z).losses["disentanglement"].backward()
    assert z.grad.abs().max() > 1e-3
    for book in quantizer.books:
        assert book.embedding.grad is None or book.embedding.grad.abs().max() == 0


def test_disentanglement_is_one_for_parallel_and_zero_for_orthogonal_codes():
    quantizer = build(dim=4, disentanglement_weight=0.1)
    a, b = quantizer.books
    z = torch.randn(2, 5, 4)
    a.embedding.data[:] = torch.tensor([1.0, 0.0])
    b.embedding.data[:] = torch.tensor([-3.0, 0.0])
    assert torch.allclose(quantizer(z).losses["disentanglement"], torch.ones(()))
    b.embedding.data[:] = torch.tensor([0.0, 2.0])
    assert torch.allclose(quantizer(z).losses["disentanglement"], torch.zeros(()))
    b.embedding.data[:] = torch.tensor([1.0, 1.0])
    assert torch.allclose(quantizer(z).losses["disentanglement"], torch.tensor(0.5))
    assert "disentanglement" not in build()(torch.randn(1, 2, 8)).losses


def test_a_mask_hides_tokens_from_every_loss():
    z = torch.randn(2, 5, 8)
    mask = torch.tensor([[True, True, False, False, False], [True, False, True, True, False]])
    masked = build(disentanglement_weight=0.1)(z, mask).losses
    kept = build(disentanglement_weight=0.1)(z[mask][None]).losses
    assert masked.keys() == {"commitment", "codebook", "disentanglement"}
    assert all(torch.allclose(masked[name], kept[name], atol=1e-6) for name in masked)


def test_all_pairs_of_ids_go_there_and_back():
    quantizer = build(dim=6, codebook_dim=3, metric="cosine").eval()
    ids = torch.cartesian_prod(torch.arange(16), torch.arange(16))[None]
    assert torch.equal(quantizer.encode(quantizer.decode(ids)), ids)
    output = quantizer(torch.randn(2, 7, 6))
    assert torch.equal(output.quantized, quantizer.decode(output.indices))
    tables = quantizer.codebooks()
    for part, table, slot in zip(output.quantized.split(3, -1), tables, (0, 1), strict=True):
        # Rows are brought to unit length one by one here, and all at once in the table.
        rows = table[output.indices[..., slot]]
        torch.testing.assert_close(part, rows, rtol=0, atol=1e-6)


def test_the_books_are_independent():
    quantizer = build(dim=8).eval()
    z = torch.randn(2, 7, 8)
    other = torch.cat([z[..., :4], torch.randn(2, 7, 4)], dim=-1)
    before, after = quantizer.encode(z), quantizer.encode(other)
    assert torch.equal(before[..., 0], after[..., 0])
    assert not torch.equal(before[..., 1], after[..., 1])


def test_projection_usage_and_start():
    torch.manual_seed(0)
    quantizer = ProductVQ(5, 8, 4, num_codebooks=3, metric="cosine")
    assert quantizer.project_in.weight.shape == (12, 5)
    assert quantizer.codebook_sizes == (8, 8, 8) and quantizer.bits_per_token == 9
    assert quantizer.num_init_latents == 32
    quantizer.initialize(torch.randn(64, 5))
    assert quantizer.num_init_latents == 0
    starts = torch.stack(quantizer.codebooks())
    assert (starts[0] - starts[1]).abs().max() > 0.1
    quantizer(torch.randn(3, 10, 5))
    assert quantizer.usage.counts.view(3, 8).sum(1).tolist() == [30, 30, 30]
    assert quantizer.after_step().keys() == {"dead_codes_revived"}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_codebooks": 3}, "num_codebooks"),
        ({"num_codebooks": 0}, "^num_codebooks=0: must be a whole number, 1 or more"),
        ({"num_codebooks": 1, "disentanglement_weight": 1.0}, "disentanglement"),
    ],
)
def test_wrong_options_are_refused(options, key):
    with pytest.raises(ConfigError, match=key):
        build(dim=8, **options)
