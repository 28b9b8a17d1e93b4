import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode

from vistok.core.errors import ConfigError
from vistok.quantizers.residual_vq import ResidualVQ


def build(dim=6, size=16, **options):
    torch.manual_seed(0)
    options = {"num_layers": 4, "codebook": "gradient", "kmeans_init": False, **options}
    quantizer = ResidualVQ(dim, size, **options)
    for number, book in enumerate(quantizer.books):
        book.embedding.data.normal_(0, 0.8 ** (number + 1))
        if book.stats.averages:
            book.stats.start(book.embedding.data, torch.ones(size))
    return quantizer


def oracle(z, tables):
    """Residual VQ from its definition, one token at a time: ids, sum of codes, layer losses."""
    ids = torch.zeros(*z.shape[:2], len(tables), dtype=torch.long)
    total = torch.zeros_like(z)
    commitment = [0.0] * len(tables)
    codebook = [0.0] * len(tables)
    for b in range(z.shape[0]):
        for n in range(z.shape[1]):
            done = torch.zeros_like(z[b, n])
            for j, table in enumerate(tables):
                r = z[b, n] - done.detach()
                i = ((r.detach() - table.detach()) ** 2).sum(-1).argmin()
                q = table[i]
                commitment[j] = commitment[j] + ((r - q.detach()) ** 2).mean()
                codebook[j] = codebook[j] + ((q - r.detach()) ** 2).mean()
                done = done + q
                ids[b, n, j] = i
            total[b, n] = done.detach()
    scale = z.shape[0] * z.shape[1] * len(tables)
    return ids, total, sum(commitment) / scale, sum(codebook) / scale


@pytest.mark.parametrize("shared", [False, True])
def test_matches_the_definition_and_its_gradients(shared):
    quantizer = build(shared=shared)
    z = torch.randn(2, 5, 6, requires_grad=True)
    upstream = torch.randn(2, 5, 6)
    output = quantizer(z)
    loss = (output.quantized * upstream).sum()
    loss = loss + 0.25 * output.losses["commitment"] + output.losses["codebook"]
    loss.backward()

    exact = [book.embedding.detach().double().requires_grad_() for book in quantizer.books]
    z64 = z.detach().double().requires_grad_()
    ids, total, commitment, codebook = oracle(z64, exact * 4 if shared else exact)
    straight_through = z64 + (total - z64).detach()
    ((straight_through * upstream.double()).sum() + 0.25 * commitment + codebook).backward()

    assert torch.equal(output.indices, ids)
    assert torch.allclose(output.quantized.double(), total, atol=1e-5)
    assert torch.allclose(output.losses["commitment"].double(), commitment, atol=1e-6)
    assert torch.allclose(output.losses["codebook"].double(), codebook, atol=1e-6)
    assert torch.allclose(z.grad.double(), z64.grad, atol=1e-6)
    for book, table in zip(quantizer.books, exact, strict=True):
        assert torch.allclose(book.embedding.grad.double(), table.grad, atol=1e-6)


def test_the_encoder_gradient_is_the_identity_not_q_times():
    quantizer = build()
    z = torch.randn(2, 5, 6, requires_grad=True)
    upstream = torch.randn(2, 5, 6)
    (quantizer(z).quantized * upstream).sum().backward()
    assert torch.equal(z.grad, upstream)


def test_the_commitment_of_every_layer_reaches_the_encoder():
    quantizer = build()
    z = torch.randn(2, 5, 6, requires_grad=True)
    output = quantizer(z)
    output.losses["commitment"].backward()
    leftovers = [z - quantizer.decode_prefix(output.indices[..., : j + 1]) for j in range(4)]
    expected = 2 * sum(leftovers) / (z.numel() * 4)
    assert torch.allclose(z.grad, expected, atol=1e-7)
    assert not torch.allclose(z.grad, 2 * leftovers[0] / (z.numel() * 4), atol=1e-3)


def test_eval_is_decode_and_prefixes_are_partial_sums():
    quantizer = build(dim=8, codebook_dim=6).eval()
    z = torch.randn(3, 7, 8)
    output = quantizer(z)
    assert torch.equal(output.indices, quantizer.encode(z))
    assert torch.equal(output.quantized, quantizer.decode(output.indices))
    assert torch.equal(quantizer.decode_prefix(output.indices), output.quantized)

    tables = quantizer.codebooks()
    partial = torch.zeros(3, 7, 6)
    for n in range(4):
        partial = partial + tables[n][output.indices[..., n]]
        decoded = quantizer.decode_prefix(output.indices[..., : n + 1])
        assert torch.allclose(decoded, quantizer.project_out(partial), atol=1e-6)
    with pytest.raises(ConfigError, match="5 layers"):
        quantizer.decode_prefix(torch.zeros(1, 1, 5, dtype=torch.long))


def test_training_and_eval_find_the_same_ids():
    quantizer = build()
    z = torch.randn(4, 50, 6)
    assert torch.equal(quantizer(z).indices, quantizer.eval()(z).indices)


def test_dropout_draws_a_uniform_prefix_per_sample():
    quantizer = build(quantizer_dropout=0.5)
    z = torch.randn(4000, 2, 6)
    output = quantizer(z)
    present = output.indices >= 0
    depth = present.sum(-1)
    assert torch.equal(depth[:, 0], depth[:, 1])  # per sample
    assert torch.equal(present, torch.arange(4) < depth[..., None])  # a prefix
    share = torch.bincount(depth[:, 0], minlength=5) / 4000
    # n < 4 with 0.5 · 1/4 each, 4 with the rest; five standard deviations.
    assert torch.allclose(share, torch.tensor([0, 0.125, 0.125, 0.125, 0.625]), atol=0.04)
    assert torch.allclose(output.quantized, quantizer.decode(output.indices), atol=1e-5)
    assert torch.equal(quantizer.usage.counts.view(4, -1).sum(-1), present.sum((0, 1)))

    quantizer.eval()
    assert (quantizer(z).indices >= 0).all()


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_dropped_layers_enter_no_loss_and_no_statistic(codebook, monkeypatch):
    quantizer = build(quantizer_dropout=1.0, codebook=codebook)
    depths = torch.tensor([1, 3])
    monkeypatch.setattr(
        "vistok.quantizers.residual_vq.sample_depths", lambda *args: depths, raising=True
    )
    z = torch.randn(2, 5, 6, requires_grad=True)
    output = quantizer(z)
    output.losses["commitment"].backward()
    leftovers = torch.stack(
        [z - quantizer.decode_prefix(output.indices[..., : j + 1]) for j in range(4)]
    ).detach()
    errors = leftovers.square().mean(-1)  # (layer, sample, token)
    expected = errors[0].mean() + errors[1, 1].mean() + errors[2, 1].mean()
    assert torch.allclose(output.losses["commitment"], expected / 4, atol=1e-6)
    gradient = 2 * leftovers / (5 * 6 * 4)
    assert torch.allclose(z.grad[0], gradient[0, 0] / 2, atol=1e-6)
    assert torch.allclose(z.grad[1], gradient[0, 1] / 2 + gradient[1:3, 1].sum(0), atol=1e-6)
    seen = [book.stats.step_counts.sum().item() for book in quantizer.books]
    assert seen == [10, 5, 5, 0]


def test_a_mask_hides_tokens_from_losses_and_statistics():
    quantizer = build(codebook="ema")
    z = torch.randn(2, 5, 6)
    mask = torch.rand(2, 5) < 0.5
    masked = quantizer(z, mask).losses["commitment"]
    kept = build(codebook="ema")(z[mask][None]).losses["commitment"]
    assert torch.allclose(masked, kept, atol=1e-6)
    assert all(book.stats.step_counts.sum() == mask.sum() for book in quantizer.books)


def test_a_shared_codebook_makes_one_ema_update_from_all_layers():
    quantizer = build(shared=True, codebook="ema", ema_decay=0.9, revival="none")
    book = quantizer.books[0]
    z = torch.randn(4, 20, 6)
    before, sums, counts = book.embedding.clone(), book.stats.sums.clone(), book.stats.counts
    tables = [before.double()] * 4
    ids, *_ = oracle(z.double(), tables)
    rows, residual = [], z.double()
    for j in range(4):
        rows.append(residual.reshape(-1, 6))
        residual = residual - before.double()[ids[..., j]]
    rows, flat = torch.cat(rows), ids.permute(2, 0, 1).reshape(-1)
    assert torch.equal(quantizer(z).indices, ids)
    assert torch.equal(book.embedding, before)  # not before after_step

    unit = 16 / flat.numel()
    counts = 0.9 * counts.double() + 0.1 * unit * torch.bincount(flat, minlength=16)
    new = torch.zeros(16, 6, dtype=torch.double).index_add_(0, flat, rows)
    sums = 0.9 * sums.double() + 0.1 * unit * new
    smooth = (counts + 1e-5) / (counts.sum() + 16e-5) * counts.sum()
    quantizer.after_step()
    assert torch.allclose(book.embedding.double(), sums / smooth[:, None], atol=1e-5)


def test_dead_codes_of_a_shared_codebook_revive_from_all_depths():
    quantizer = build(shared=True, codebook="ema", size=64)
    z = torch.randn(8, 64, 6)
    quantizer(z)
    tables = quantizer.codebooks()
    residual, depths = z, []
    for j in range(4):
        depths.append(residual.reshape(-1, 6))
        residual = residual - tables[j][quantizer.eval().encode(z)[..., j]]
    found = [
        (torch.cdist(quantizer.books[0].stats.candidates[:, :-2], rows) < 1e-4).any(1).sum()
        for rows in depths
    ]
    assert all(count >= 8 for count in found), found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_kmeans_start_leaves_less_with_every_layer(shared, lazy):
    torch.manual_seed(1)
    quantizer = ResidualVQ(4, 32, num_layers=4, shared=shared)
    z = torch.randn(16, 64, 4)
    assert quantizer.num_init_latents == 4 * 32
    if lazy:
        quantizer(z)
    else:
        quantizer.initialize(z.flatten(0, 1))
    assert quantizer.num_init_latents == 0
    ids = quantizer.eval().encode(z)
    errors = [(z - quantizer.decode_prefix(ids[..., : n + 1])).square().mean() for n in range(4)]
    # From U(±1/K) the deeper layers would take nearly nothing away.
    limit = 0.9 if shared else 0.7
    assert all(later < limit * earlier for earlier, later in itertools.pairwise(errors))


def test_rotation_is_applied_once_around_the_sum():
    from vistok.quantizers.estimators import rotation

    quantizer = build(estimator="rotation")
    z = torch.randn(2, 5, 6, requires_grad=True)
    upstream = torch.randn(2, 5, 6)
    output = quantizer(z)
    (output.quantized * upstream).sum().backward()
    again = z.detach().clone().requires_grad_()
    (rotation(again, quantizer.decode(output.indices).detach()) * upstream).sum().backward()
    assert torch.allclose(z.grad, again.grad, atol=1e-5)


class Largest(TorchFunctionMode):
    """The largest number of elements of any tensor that a function returns."""

    numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


def test_no_matrix_of_tokens_by_codes():
    quantizer = build(dim=4, size=1024, num_layers=2)
    z = torch.randn(1, 16384, 4, requires_grad=True)
    with Largest() as largest:
        output = quantizer(z)
        (output.quantized.sum() + output.losses["commitment"]).backward()
        quantizer.after_step()
    assert largest.numel <= 16384 * 1024 // 4


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_layers": 0}, "^num_layers=0: must be a whole number, 1 or more"),
        ({"quantizer_dropout": 1.5}, "^quantizer_dropout=1.5: must be a number, 0 to 1"),
        ({"assignment": "gumbel"}, "gumbel"),
    ],
)
def test_wrong_options_are_refused(options, key):
    with pytest.raises(ConfigError, match=key):
        build(**options)
