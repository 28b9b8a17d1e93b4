"""The VQ family against float64 oracles written from the definitions."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from quantizers.conftest import total_loss, train
from quantizers.test_search import LargestTensor
from vistok.core.errors import ConfigError, VistokError
from vistok.quantizers import estimators, search, soft_assignment
from vistok.quantizers.kmeans import kmeans
from vistok.quantizers.soft_assignment import entropy_penalty, gumbel_codes, soft_straight_through
from vistok.quantizers.vq import VectorQuantizer


def make(codebook_size=20, dim=6, **options):
    options = {"kmeans_init": False, "codebook": "gradient", "revival": "none"} | options
    quantizer = VectorQuantizer(dim, codebook_size, **options)
    with torch.no_grad():  # U(±1/K) is too small to tell codes apart by eye
        quantizer.embedding.copy_(quantizer._metric(torch.randn(codebook_size, dim)))
        quantizer.stats.start(quantizer.embedding, torch.ones(codebook_size))
    return quantizer


def normalize(x):
    return x / x.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------------- losses and gradients


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_losses_and_gradients_equal_the_definition(metric, masked, legacy):
    quantizer = make(metric=metric, legacy_beta=legacy)
    z = torch.randn(3, 7, 6, requires_grad=True)
    mask = torch.rand(3, 7) < 0.6 if masked else None
    slope = torch.randn(3, 7, 6)
    output = quantizer(z, mask)
    (total_loss(quantizer, output) + (output.quantized * slope).sum()).backward()

    z64 = z.detach().double().requires_grad_()
    e64 = quantizer.embedding.detach().double().requires_grad_()
    unit = normalize if metric == "cosine" else (lambda x: x)
    u, e = unit(z64), unit(e64)
    ids = (u.detach()[..., None, :] - e.detach()).square().sum(-1).argmin(-1)
    q = e[ids]
    keep = torch.ones(3, 7, dtype=torch.bool) if mask is None else mask
    commitment = (u - q.detach()).square()[keep].mean()
    codebook = (q - u.detach()).square()[keep].mean()
    a, b = (1.0, 0.25) if legacy else (0.25, 1.0)
    ste = u + (q - u).detach()
    (a * commitment + b * codebook + (ste * slope.double()).sum()).backward()

    assert torch.equal(output.indices[..., 0], ids)
    for name, exact in (("commitment", commitment), ("codebook", codebook)):
        found = output.losses[name].double()
        torch.testing.assert_close(found, exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.quantized.double(), q.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.grad.double(), z64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.embedding.grad.double(), e64.grad, rtol=1e-4, atol=1e-6)


def test_zero_latents_have_finite_gradients():
    for estimator in ("straight_through", "rotation", "diveq"):
        quantizer = make(estimator=estimator, metric="cosine", revival="restart")
        z = torch.zeros(1, 4, 6, requires_grad=True)
        output = quantizer(z)
        (output.quantized.sum() + total_loss(quantizer, output)).backward()
        assert z.grad.isfinite().all() and z.grad.abs().max() < 1e8


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_ema_has_no_codebook_gradient(metric):
    quantizer = make(metric=metric, codebook="ema")
    assert not list(quantizer.parameters())
    assert set(quantizer(torch.randn(1, 5, 6)).losses) == {"commitment"}


# ---------------------------------------------------------------------- estimators


def test_rotation_equals_the_rotation_matrix():
    z = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    q, slope = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    out = estimators.rotation(z, q)
    torch.testing.assert_close(out, q)
    (out * slope).sum().backward()
    for n in range(9):
        u, v = normalize(z[n].detach()), normalize(q[n])
        w = normalize(u + v)
        matrix = torch.eye(5, dtype=torch.float64) - 2 * w.outer(w) + 2 * v.outer(u)
        matrix *= q[n].norm() / z[n].detach().norm()
        torch.testing.assert_close(z.grad[n], matrix.T @ slope[n])


def test_rotation_falls_back_where_it_is_undefined():
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    q = torch.tensor([[1.0, 2.0], [-2.0, 0.0], [0.0, 0.0]])
    out = estimators.rotation(z, q)
    torch.testing.assert_close(out, q)
    out.sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z))


def test_diveq_gradients():
    z = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(8, 5, dtype=torch.float64)
    out = estimators.diveq(z, q, noise_std=0.0)
    torch.testing.assert_close(out, q)
    (out * slope).sum().backward()
    direction = normalize((q - z).detach())
    along = (direction * slope).sum(-1, keepdim=True) * direction  # ê ûᵀ g, û = ê without noise
    torch.testing.assert_close(z.grad, slope - along)
    torch.testing.assert_close(q.grad, along)


def test_diveq_noise_has_the_stated_size_and_a_perfect_code_is_safe():
    z, q = torch.zeros(2000, 8), torch.ones(2000, 8)
    out = estimators.diveq(z, q, noise_std=0.05)
    sideways = (out - q).norm(dim=-1) / q.norm(dim=-1)
    assert 0.5 < sideways.mean() / (0.05 * math.sqrt(7) / math.sqrt(8)) < 1.5
    z = torch.ones(3, 4, requires_grad=True)
    estimators.diveq(z, torch.ones(3, 4), 0.0).sum().backward()
    assert z.grad.isfinite().all()


def test_synchronous_hands_the_decoder_gradient_to_the_code():
    z, q = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    out = estimators.synchronous(z, q, 0.5)
    torch.testing.assert_close(out, q)
    slope = torch.randn(4, 3)
    (out * slope).sum().backward()
    torch.testing.assert_close(z.grad, slope)
    torch.testing.assert_close(q.grad, 0.5 * slope)


# ---------------------------------------------------------------------- soft assignments


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_entropy_equals_the_naive_sum(metric):
    quantizer = make(metric=metric, entropy_weight=0.3, entropy_temperature=0.2)
    z = torch.randn(2, 30, 6, requires_grad=True)
    mask = torch.rand(2, 30) < 0.7
    loss = quantizer(z, mask).losses["entropy"]
    loss.backward()

    z64 = z.detach().double().requires_grad_()
    e64 = quantizer.embedding.detach().double().requires_grad_()
    unit = normalize if metric == "cosine" else (lambda x: x)
    distances = (unit(z64)[..., None, :] - unit(e64)).square().sum(-1)
    p = (-distances / 0.2).softmax(-1)[mask]
    naive = -(p * p.log()).sum(-1).mean() + (p.mean(0) * p.mean(0).log()).sum()
    naive.backward()
    torch.testing.assert_close(loss.double(), naive.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad.double(), z64.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(quantizer.embedding.grad.double(), e64.grad, rtol=1e-3, atol=1e-5)


def test_entropy_is_bounded_and_sharp_temperatures_stay_finite():
    z, codebook = 50 * torch.randn(40, 8, requires_grad=True), torch.randn(30, 8)
    loss, metrics = entropy_penalty(z, codebook, False, 100.0, None)
    assert -math.log(30) <= loss <= 0 and metrics["sample_entropy"] >= -1e-5
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_entropy_of_weight_zero_is_not_computed():
    quantizer = make(entropy_weight=0.0)
    assert set(quantizer(torch.randn(1, 5, 6)).losses) == {"commitment", "codebook"}


def test_gumbel_equals_the_dense_straight_through_softmax():
    quantizer = make(assignment="gumbel", temperature=0.6, metric="euclidean")
    z = torch.randn(1, 25, 6, requires_grad=True)
    slope = torch.randn(1, 25, 6)
    torch.manual_seed(4)
    output = quantizer(z)
    (output.quantized * slope).sum().backward()

    torch.manual_seed(4)
    tokens = torch.randint(-(2**31), 2**31, (25,)).int()
    zeros = torch.zeros(25, 1), torch.zeros(20, 1)  # no scores: the logits are the noise
    noise = torch.cat(
        [
            logits.clone()
            for _, logits, _ in soft_assignment._logit_blocks(*zeros, False, 1.0, tokens)
        ]
    ).double()
    z64 = z.detach()[0].double().requires_grad_()
    e64 = quantizer.embedding.detach().double().requires_grad_()
    logits = (z64 @ e64.T - 0.5 * e64.square().sum(1)) / 0.6 + noise
    soft, hard = logits.softmax(-1), F.one_hot(logits.argmax(-1), 20).double()
    assert torch.equal(output.indices[0, :, 0], hard.argmax(-1))
    # The value path sees the hard code; the logits' gradient flows through the soft one.
    out = hard @ e64 + (soft - soft.detach()) @ e64.detach()
    (out * slope[0].double()).sum().backward()
    torch.testing.assert_close(output.quantized[0].double(), out.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.grad[0].double(), z64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.embedding.grad.double(), e64.grad, rtol=1e-4, atol=1e-5)


def test_gumbel_noise_is_gumbel_noise():
    """Kolmogorov and Smirnov's distance to exp(−exp(−x)); finite; nothing shared by rows, columns."""
    tokens = torch.randint(-(2**31), 2**31, (1000,)).int()
    zeros, codes = torch.zeros(1000, 1), torch.zeros(1000, 1)
    blocks = soft_assignment._logit_blocks(zeros, codes, False, 1.0, tokens)
    noise = torch.cat([logits.clone() for _, logits, _ in blocks])
    ordered = noise.flatten().double().sort().values
    steps = torch.arange(1, 10**6 + 1) / 10**6
    assert (torch.exp(-torch.exp(-ordered)) - steps).abs().max() < 2 / 1000
    for matrix in (noise, noise.T):
        correlation = torch.corrcoef(matrix[:100])
        assert (correlation - torch.eye(100)).abs().max() < 6 / math.sqrt(1000)
    extremes = torch.tensor([0, 511, 512, -1, -512, 2**31 - 1], dtype=torch.int32)
    u = soft_assignment._to_unit(extremes.clone(), torch.empty(6))
    assert (u > 0).all() and (u < 1).all()


def test_gumbel_codes_follow_the_softmax():
    codebook, z = torch.randn(50, 4), torch.randn(1, 4)
    expected = (z @ codebook.T * 2).double().softmax(1)[0] * 100_000
    noise = torch.randint(-(2**31), 2**31, (100_000,)).int()
    ids = gumbel_codes(z.expand(100_000, 4), codebook, False, 2.0, noise)
    chi2 = ((torch.bincount(ids, minlength=50) - expected).square() / expected)[expected > 5].sum()
    assert chi2 < 50 + 5 * math.sqrt(100)


def test_sampled_assignments_differ_in_training_only():
    for assignment in ("stochastic", "gumbel"):
        quantizer = make(assignment=assignment, temperature=1.0)
        z = torch.randn(1, 200, 6)
        assert not torch.equal(quantizer(z).indices, quantizer(z).indices)
        quantizer.eval()
        nearest = make().eval()
        nearest.load_state_dict(quantizer.state_dict())
        assert torch.equal(quantizer(z).indices, nearest(z).indices)


@pytest.mark.parametrize("what", ["entropy", "attention", "vq", "ema"])
def test_no_matrix_of_all_scores(what, monkeypatch):
    monkeypatch.setattr(search, "_CPU_SCORES", 1 << 14)
    monkeypatch.setattr(soft_assignment, "_CPU_SCORES", 1 << 14)
    monkeypatch.setattr(soft_assignment, "_MIN_ROWS", 1)
    z, codebook = torch.randn(1024, 4, requires_grad=True), torch.randn(1024, 4)
    with LargestTensor() as largest:
        if what == "entropy":
            entropy_penalty(z, codebook, False, 1.0, None)[0].backward()
        elif what == "attention":
            soft_straight_through(z, codebook, codebook)[0].sum().backward()
        else:
            codes = "ema" if what == "ema" else "gradient"
            quantizer = VectorQuantizer(4, 1024, codebook=codes, kmeans_init=False)
            output = quantizer(z[None])
            (output.quantized.sum() + total_loss(quantizer, output)).backward()
            quantizer.after_step()
    assert 0 < largest.numel <= 1 << 15 < 1024 * 1024


# ---------------------------------------------------------------------- EMA and k-means


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_ema_follows_the_formula(metric):
    quantizer = make(codebook="ema", metric=metric, ema_decay=0.9)
    unit = normalize if metric == "cosine" else (lambda x: x)
    e = quantizer.embedding.double()
    # The definition, in tokens: 100 per step over 20 codes is 5 for each on average.
    c, m = torch.full((20,), 5.0, dtype=torch.float64), 5.0 * e
    for _ in range(5):
        z = torch.randn(2, 50, 6)
        quantizer(z[:1]), quantizer(z[1:])  # two micro-batches, one update
        before = quantizer.embedding.clone()
        quantizer.after_step()
        assert not torch.equal(before, quantizer.embedding)
        u = unit(z.double().flatten(0, 1))
        hard = F.one_hot((u[:, None] - e).square().sum(-1).argmin(-1), 20).double()
        c = 0.9 * c + 0.1 * hard.sum(0)
        m = 0.9 * m + 0.1 * hard.T @ u
        smoothed = (c + 5e-5) / (c.sum() + 20 * 5e-5) * c.sum()
        e = unit(m / smoothed[:, None])
        torch.testing.assert_close(quantizer.embedding.double(), e, rtol=1e-5, atol=1e-6)


def test_the_output_of_a_step_uses_the_codes_before_it():
    quantizer = make(codebook="ema", metric="euclidean")
    before = quantizer.embedding.clone()
    output = quantizer(torch.randn(1, 30, 6))
    torch.testing.assert_close(output.quantized, before[output.indices[..., 0]], rtol=0, atol=1e-6)


def test_a_step_without_tokens_changes_nothing():
    quantizer = make(codebook="ema", revival="restart")
    before = copy.deepcopy(quantizer.state_dict())
    assert quantizer.after_step() == {}
    quantizer(torch.randn(2, 5, 6), torch.zeros(2, 5, dtype=torch.bool))
    quantizer.after_step()
    for key, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, before[key])


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_equals_naive_lloyd(cosine):
    points = torch.randn(300, 5)
    points = normalize(points) if cosine else points
    torch.manual_seed(7)
    means, counts = kmeans(points, 12, iterations=6, cosine=cosine)
    torch.manual_seed(7)
    e = points[torch.randperm(300)[:12]].double()
    p = points.double()
    for _ in range(6):
        ids = (p[:, None] - e).square().sum(-1).argmin(-1)
        e = torch.stack([p[ids == k].mean(0) if (ids == k).any() else e[k] for k in range(12)])
        e = normalize(e) if cosine else e
    torch.testing.assert_close(means.double(), e, rtol=1e-4, atol=1e-5)
    ids = (p[:, None] - e).square().sum(-1).argmin(-1)
    assert torch.equal(counts, torch.bincount(ids, minlength=12))


def test_kmeans_with_too_few_points_and_empty_clusters():
    points = torch.randn(3, 4)
    means, counts = kmeans(points, 8)
    assert means.isfinite().all() and counts.sum() == 3
    assert {tuple(row) for row in means.tolist()} == {tuple(row) for row in points.tolist()}
    means, counts = kmeans(torch.zeros(50, 4), 5)
    assert torch.equal(means, torch.zeros(5, 4)) and counts.tolist() == [50, 0, 0, 0, 0]


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_start_survives_the_first_update(codebook, metric):
    """With m = E and c = n the first EMA step would shrink the codes to almost nothing."""
    centers = 3 * torch.randn(16, 6)
    z = (centers[torch.randint(16, (1, 640))] + 0.01 * torch.randn(1, 640, 6)).requires_grad_()
    quantizer = VectorQuantizer(6, 16, codebook=codebook, metric=metric, revival="none")
    assert quantizer.num_init_latents == 64
    quantizer(z)
    started = quantizer.embedding.detach().clone()
    assert quantizer.num_init_latents == 0 and bool(quantizer.initialized)
    quantizer.after_step()
    used = quantizer.stats.counts > 0.5
    moved = (quantizer.embedding - started).norm(dim=-1) / started.norm(dim=-1)
    assert used.sum() >= 8 and moved[used].max() < 0.05
    assert quantizer(z).losses["commitment"] < 0.5 * z.square().mean()


def test_initialize_uses_the_given_latents_once():
    quantizer = VectorQuantizer(8, 16, 4)
    assert quantizer.num_init_latents == 64
    latents = torch.randn(200, 8)
    quantizer.initialize(latents)
    codes = quantizer.embedding.clone()
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(16))
    z = quantizer._metric(quantizer.project_in(latents)).detach()
    sizes = torch.bincount((z @ codes.T).argmax(1), minlength=16).clamp(min=1)
    torch.testing.assert_close(quantizer.stats.counts, sizes / sizes.float().mean())
    quantizer(torch.randn(2, 5, 8))
    assert torch.equal(codes, quantizer.embedding)
    # The start is worth something: far closer to the data than random codes.
    random = VectorQuantizer(8, 16, 4, kmeans_init=False)
    near = (z @ codes.T).amax(1).mean()
    assert near > (z @ random.embedding.T).amax(1).mean() + 0.02


# ---------------------------------------------------------------------- dead codes


def dead_and_alive(**options):
    """A quantizer of 32 codes, 28 of them far from the data, and its data."""
    quantizer = make(32, 6, metric="euclidean", ema_decay=0.9, revival="restart", **options)
    with torch.no_grad():
        quantizer.embedding[4:] += 1000
        if quantizer.stats.averages:
            quantizer.stats.sums.copy_(quantizer.embedding)
    return quantizer, torch.randn(4, 50, 6)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_restart_sticks_and_resets_moments(codebook):
    quantizer, z = dead_and_alive(codebook=codebook)
    params = list(quantizer.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-3) if params else None
    revived = 0
    for _ in range(60):
        output = quantizer(z.requires_grad_())
        if optimizer:
            optimizer.zero_grad()
            total_loss(quantizer, output).backward()
            optimizer.step()
            optimizer.state[quantizer.embedding]["exp_avg"].fill_(7.0)
        now = quantizer.after_step([optimizer] if optimizer else [])["dead_codes_revived"]
        revived += int(now)
        if now and optimizer:
            moment = optimizer.state[quantizer.embedding]["exp_avg"]
            assert (moment == 0).all(dim=1).sum() == now and (moment == 7).all(dim=1).any()
        if optimizer:
            optimizer.state[quantizer.embedding]["exp_avg"].zero_()
    # Every dead code came back to the data and the updates after it left it there.
    assert revived >= 28
    assert quantizer.embedding.abs().max() < 50
    assert quantizer(z).indices.unique().numel() > 20
    assert quantizer.stats.counts.min() > 0


def test_restart_puts_codes_on_unmasked_latents():
    quantizer, z = dead_and_alive(codebook="ema")
    quantizer.stats.counts[4:] = 0.0
    mask = torch.rand(4, 50) < 0.5
    quantizer(z, mask)
    assert quantizer.after_step()["dead_codes_revived"] > 5
    rows = quantizer.embedding[(quantizer.stats.counts == 1.0)]
    kept = z[mask]
    distances = (rows[:, None] - kept).norm(dim=-1).amin(1)
    assert rows.shape[0] > 5 and (distances == 0).all()
    masked = z[~mask]
    assert ((rows[:, None] - masked).norm(dim=-1).amin(1) > 0).all()


def test_without_revival_dead_codes_stay():
    quantizer, z = dead_and_alive(codebook="gradient")
    quantizer.stats.revival = "none"
    for _ in range(60):
        quantizer(z)
        quantizer.after_step()
    assert quantizer(z).indices.unique().numel() <= 4


def test_clustering_follows_the_formula_and_scales_moments():
    quantizer = make(32, 6, metric="euclidean", revival="clustering")
    quantizer.stats.counts.copy_(torch.cat([torch.rand(16) * 2e-3, torch.rand(16) + 0.5]))
    params = [quantizer.embedding]
    optimizer = torch.optim.Adam(params)
    quantizer.embedding.grad = torch.zeros_like(quantizer.embedding)
    optimizer.step()
    optimizer.state[quantizer.embedding]["exp_avg"].fill_(1.0)
    z = torch.randn(1, 40, 6)
    ids = quantizer(z).indices.flatten()
    before = quantizer.embedding.detach().double()
    c = quantizer.stats.counts.double()
    quantizer.after_step([optimizer])
    c = 0.99 * c + 0.01 * torch.bincount(ids, minlength=32) * 32 / 40
    a = torch.exp(-c * 10 / (1 - 0.99) - 1e-3)
    nearest = (before[:, None] - z[0].double()).square().sum(-1).argmin(1)
    expected = (1 - a)[:, None] * before + a[:, None] * z[0].double()[nearest]
    assert (a > 0.1).sum() > 3
    torch.testing.assert_close(quantizer.embedding.double(), expected, rtol=1e-3, atol=1e-5)
    moment = optimizer.state[quantizer.embedding]["exp_avg"]
    torch.testing.assert_close(moment[:, 0].double(), 1 - a, rtol=1e-3, atol=1e-5)


def test_dead_code_threshold_does_not_depend_on_the_batch_size():
    counts = []
    for copies in (1, 8):
        torch.manual_seed(0)
        quantizer = make(codebook="ema", revival="none")
        quantizer(torch.randn(1, 100, 6).repeat(copies, 1, 1))
        quantizer.after_step()
        counts.append(quantizer.stats.counts)
    torch.testing.assert_close(counts[0], counts[1])
    assert counts[0].mean().sub(1).abs() < 1e-5


def test_a_cosine_gradient_codebook_keeps_its_length():
    quantizer = train(make(metric="cosine"), [torch.randn(2, 50, 6) for _ in range(5)], lr=0.1)
    torch.testing.assert_close(quantizer.embedding.norm(dim=-1), torch.ones(20))


# ---------------------------------------------------------------------- constructor


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"codebook": "emma"}, "^codebook=emma.*did you mean 'ema'"),
        ({"metric": "dot"}, "metric"),
        ({"codebook": "ema", "estimator": "diveq"}, "estimator=diveq"),
        ({"codebook": "ema", "estimator": "synchronous"}, "estimator=synchronous"),
        ({"codebook": "ema", "assignment": "gumbel"}, "assignment=gumbel"),
        ({"codebook": "ema", "legacy_beta": True}, "legacy_beta"),
        ({"estimator": "rotation", "assignment": "stochastic"}, "rotation"),
        ({"codebook": "gradient", "estimator": "diveq", "assignment": "gumbel"}, "gumbel"),
        ({"codebook": "gradient", "estimator": "diveq", "revival": "none"}, "revival"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"temperature": 0.0}, "temperature"),
        ({"codebook_size": 1}, "codebook_size"),
    ],
)
def test_what_cannot_work_is_refused(options, key):
    with pytest.raises(ConfigError, match=key):
        VectorQuantizer(**{"dim": 4, "codebook_size": 8, **options})


def test_a_broken_codebook_raises():
    quantizer = make()
    with torch.no_grad():
        quantizer.embedding[3] = float("nan")
    with pytest.raises(VistokError, match="NaN"):
        quantizer(torch.randn(1, 5, 6))


def test_every_learning_rule_lowers_the_error():
    """Each estimator, rule and revival together with the others."""
    random = VectorQuantizer(8, 32, kmeans_init=False).eval()
    centers = torch.randn(30, 8)
    batches = [
        centers[torch.randint(30, (4, 64))] + 0.05 * torch.randn(4, 64, 8) for _ in range(40)
    ]
    for codebook in ("ema", "gradient"):
        for estimator in ("straight_through", "rotation", "diveq", "synchronous"):
            if codebook == "ema" and estimator in ("diveq", "synchronous"):
                continue
            for revival in ("restart", "clustering"):
                quantizer = VectorQuantizer(
                    8, 32, codebook=codebook, estimator=estimator, revival=revival
                )
                train(quantizer, batches, lr=1e-2).eval()
                z = quantizer._metric(batches[0])
                error = (quantizer(batches[0]).quantized - z).square().sum(-1).mean()
                start = (random(batches[0]).quantized - z).square().sum(-1).mean()
                assert error < 0.4 * start, (codebook, estimator, revival, error)


def test_compiles_without_graph_breaks():
    for options in ({"codebook": "ema"}, {"estimator": "rotation"}, {"entropy_weight": 0.1}):
        quantizer = make(40, 8, **options)
        eager = copy.deepcopy(quantizer)
        z = torch.randn(2, 20, 8)
        torch._dynamo.reset()
        compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
        a, b = compiled(z.clone().requires_grad_()), eager(z.clone().requires_grad_())
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(total_loss(quantizer, a), total_loss(eager, b))
        quantizer.after_step(), eager.after_step()
        for key, value in eager.state_dict().items():
            torch.testing.assert_close(quantizer.state_dict()[key], value)
