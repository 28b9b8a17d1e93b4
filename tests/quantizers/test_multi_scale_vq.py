import pytest
import torch
import torch.nn.functional as F

from vistok.core.errors import ConfigError
from vistok.quantizers.multi_scale_vq import MultiScaleVQ


def build(dim=4, size=16, **options):
    torch.manual_seed(0)
    options = {
        "scales": [1, 2, 3, 4],
        "codebook": "gradient",
        "metric": "euclidean",
        "kmeans_init": False,
        **options,
    }
    quantizer = MultiScaleVQ(dim, size, **options)
    quantizer.book.embedding.data.normal_(0, 0.7)
    return quantizer


def area(x, height, width):
    """Mean under each cell of the coarser grid, cells as in adaptive pooling."""
    out = x.new_zeros(*x.shape[:2], height, width)
    for i in range(height):
        for j in range(width):
            top, bottom = i * x.shape[2] // height, -(-(i + 1) * x.shape[2] // height)
            left, right = j * x.shape[3] // width, -(-(j + 1) * x.shape[3] // width)
            out[:, :, i, j] = x[:, :, top:bottom, left:right].mean((2, 3))
    return out


def cubic(x, size, dim):
    """Cubic convolution (a = -0.75, half-pixel centres, clamped border) along one axis."""
    a, length = -0.75, x.shape[dim]
    weights = x.new_zeros(size, length)
    for i in range(size):
        place = (i + 0.5) * length / size - 0.5
        first = int(place // 1)
        for k in range(first - 1, first + 3):
            t = abs(place - k)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            weights[i, min(max(k, 0), length - 1)] += near if t <= 1 else far if t < 2 else 0
    return torch.movedim(torch.tensordot(x, weights, ([dim], [1])), -1, dim)


def oracle(z, table, phis, sizes, ratio=0.5, ties="earlier"):
    """VAR's quantizer from its definition: ids, f̂, and the two losses."""
    height, width = sizes[-1]
    f = z.transpose(1, 2).reshape(z.shape[0], z.shape[2], height, width)
    painted, ids, commitment, codebook = torch.zeros_like(f), [], 0, 0
    ticks = torch.linspace(1 / 12, 11 / 12, 4)
    for s, (h, w) in enumerate(sizes):
        rows = area((f - painted).detach(), h, w)
        distance = (rows[:, None] - table.detach()[None, :, :, None, None]).square().sum(2)
        chosen = distance.argmin(1)
        layer = table[chosen].permute(0, 3, 1, 2)
        layer = cubic(cubic(layer, height, 2), width, 3)
        if phis:
            away = (ticks - s / max(len(sizes) - 1, 1)).abs()
            nearest = [i for i in range(4) if away[i] < away.min() + 1e-5]
            weight, bias = phis[nearest[-1 if ties == "later" else 0]]
            layer = (1 - ratio) * layer + ratio * F.conv2d(layer, weight, bias, padding=1)
        painted = painted + layer
        commitment = commitment + (f - painted.detach()).square().mean() / len(sizes)
        codebook = codebook + (painted - f.detach()).square().mean() / len(sizes)
        ids.append(chosen.flatten(1))
    return torch.cat(ids, 1)[..., None], painted.flatten(2).transpose(1, 2), commitment, codebook


@pytest.mark.parametrize(
    ("grid", "num_tokens", "sizes"),
    [
        ((4, 4), 16, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ((7, 7), 49, [(2, 2), (4, 4), (5, 5), (7, 7)]),
        ((2, 6), 12, [(1, 2), (1, 3), (2, 5), (2, 6)]),
        ((5, 3), 15, [(1, 1), (3, 2), (4, 2), (5, 3)]),
        (None, 16, [(1, 4), (1, 8), (1, 12), (1, 16)]),
        ((7,), 7, [(1, 2), (1, 4), (1, 5), (1, 7)]),
    ],
)
@pytest.mark.parametrize("num_phi", [0, 4])
def test_matches_the_definition_and_its_gradients(grid, num_tokens, sizes, num_phi):
    quantizer = build(num_phi=num_phi)
    z = torch.randn(2, num_tokens, 4, requires_grad=True)
    upstream = torch.randn_like(z)
    output = quantizer(z, grid=grid)
    loss = (output.quantized * upstream).sum()
    (loss + 0.25 * output.losses["commitment"] + output.losses["codebook"]).backward()

    z64 = z.detach().double().requires_grad_()
    table = quantizer.book.embedding.detach().double().requires_grad_()
    phis = [
        [p.detach().double().requires_grad_() for p in phi.parameters()] for phi in quantizer.phi
    ]
    ids, painted, commitment, codebook = oracle(z64, table, phis, sizes)
    loss = ((z64 + (painted - z64).detach()) * upstream.double()).sum()
    (loss + 0.25 * commitment + codebook).backward()

    assert torch.equal(output.indices, ids)
    assert torch.allclose(output.quantized.double(), painted, atol=1e-5)
    assert torch.allclose(output.losses["commitment"].double(), commitment, atol=1e-6)
    assert torch.allclose(output.losses["codebook"].double(), codebook, atol=1e-6)
    assert torch.allclose(z.grad.double(), z64.grad, atol=1e-6)
    assert torch.allclose(quantizer.book.embedding.grad.double(), table.grad, atol=1e-6)
    for phi, exact in zip(quantizer.phi, phis, strict=True):
        for mine, other in zip(phi.parameters(), exact, strict=True):
            assert other.grad is not None and other.grad.abs().max() > 1e-4
            assert torch.allclose(mine.grad.double(), other.grad, atol=1e-6)


def test_the_encoder_gradient_is_the_identity():
    quantizer = build()
    z = torch.randn(2, 16, 4, requires_grad=True)
    upstream = torch.randn_like(z)
    (quantizer(z, grid=(4, 4)).quantized * upstream).sum().backward()
    assert torch.equal(z.grad, upstream)


def test_one_scale_is_plain_vq():
    """VAR's code divides by S - 1 = 0 here."""
    quantizer = build(scales=[1], num_phi=0).eval()
    z = torch.randn(2, 9, 4)
    output = quantizer(z, grid=(3, 3))
    nearest = torch.cdist(z, quantizer.codebooks()[0][None]).argmin(-1)
    assert torch.equal(output.indices[..., 0], nearest)
    assert build(scales=[1]).train()(z).quantized.isfinite().all()  # with φ


@pytest.mark.parametrize(
    ("scales", "num_tokens", "length"),
    [
        ([1, 2, 3, 4, 5, 6, 8, 10, 13, 16], 256, 680),  # VAR
        ([1, 1, 2, 3, 3, 4, 5, 6, 8, 11], 121, 286),  # ImageFolder
        ([1, 2, 4, 6, 8, 10, 12, 14, 16], 256, 817),  # TokenFlow, 256 px
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27], 729, 2227),  # TokenFlow, 384 px
    ],
)
def test_published_sequence_lengths(scales, num_tokens, length):
    quantizer = build(scales=scales)
    side = scales[-1]
    assert quantizer.num_index_tokens(num_tokens, (side, side)) == length
    assert quantizer._sizes((side, side)) == [(scale, scale) for scale in scales]


def test_without_a_grid_the_number_of_ids_tells_the_length_of_the_line():
    quantizer = build(dim=4, scales=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16], num_phi=0).eval()
    lengths = [quantizer.num_index_tokens(count) for count in range(1, 300)]
    assert lengths == sorted(set(lengths))
    for count in (1, 2, 16, 63, 64, 100, 299):
        ids = torch.zeros(1, lengths[count - 1], 1, dtype=torch.long)
        assert quantizer.decode(ids).shape == (1, count, 4)
    assert 13 not in lengths  # a line of 2 has 12, of 3 has 15
    for length in (0, 3, 13):
        with pytest.raises(ConfigError, match=rf"found {length} index tokens.* decode_prefix"):
            quantizer.decode(torch.zeros(1, length, 1, dtype=torch.long))


def test_the_option_overrides_the_grid_that_calls_name():
    z = torch.randn(2, 12, 4)
    for option, named in (([2, 6], (3, 4)), ([12], (3, 4)), ([3, 4], None)):
        quantizer, free = build(grid=option).eval(), build().eval()
        ids = quantizer.encode(z, named)
        assert torch.equal(ids, free.encode(z, tuple(option)))
        assert ids.shape[1] == quantizer.num_index_tokens(12, named)
        vectors = quantizer.decode(ids, named)
        assert torch.equal(vectors, free.decode(ids, tuple(option)))
        assert torch.equal(vectors, quantizer(z, grid=named).quantized)


def test_grids_that_do_not_fit_are_refused():
    z = torch.randn(1, 15, 4)
    with pytest.raises(ConfigError, match=r"^quantizer\.grid=\[4, 4\]: has 16 places, but .* 15"):
        build(grid=[4, 4])(z)
    with pytest.raises(ConfigError, match=r"^grid=\[2, 8\]: has 16 places, but there are 15"):
        build()(z, grid=(2, 8))
    with pytest.raises(ConfigError, match="one or two axes"):
        build()(z, grid=(5, 3, 1))
    quantizer = build().eval()
    with pytest.raises(ConfigError, match=r"found 30 index tokens, but a grid of 2 x 8 has "):
        quantizer.decode(quantizer.encode(torch.randn(1, 16, 4), (4, 4)), (2, 8))


def test_eval_is_decode_and_a_prefix_of_scales_decodes():
    quantizer = build(dim=6, codebook_dim=4).eval()
    z = torch.randn(2, 16, 6)
    output = quantizer(z, grid=(4, 4))
    assert output.indices.shape == (2, 30, 1) and output.quantized.shape == (2, 16, 6)
    assert torch.equal(output.indices, quantizer.encode(z, (4, 4)))
    assert torch.equal(output.quantized, quantizer.decode(output.indices, (4, 4)))
    assert torch.equal(quantizer.decode_prefix(output.indices, 16, (4, 4)), output.quantized)

    codes, painted = quantizer.book._lookup(output.indices), 0
    start = 0
    for number, side in enumerate([1, 2, 3, 4]):
        part = codes[:, start : start + side**2]
        painted = painted + quantizer._paint(part, number, (side, side), (4, 4))
        start += side**2
        prefix = quantizer.decode_prefix(output.indices[:, :start], 16, (4, 4))
        expected = quantizer.project_out(painted.flatten(2).transpose(1, 2))
        assert torch.allclose(prefix, expected, atol=1e-6)
    with pytest.raises(ConfigError, match="inside a scale"):
        quantizer.decode_prefix(output.indices[:, :4], 16, (4, 4))


def test_training_and_eval_find_the_same_ids():
    quantizer = build()
    z = torch.randn(8, 16, 4)
    assert torch.equal(quantizer(z).indices, quantizer.eval()(z).indices)


def test_scale_dropout_keeps_a_prefix_per_sample():
    quantizer = build(scale_dropout=0.5, min_scales=2)
    z = torch.randn(2000, 16, 4)
    output = quantizer(z, grid=(4, 4))
    scale_of = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 4, 9, 16]))
    present = output.indices[..., 0] >= 0
    depth = torch.where(present, scale_of + 1, 0).amax(1)
    assert torch.equal(present, scale_of < depth[:, None])
    share = torch.bincount(depth, minlength=5) / 2000
    assert torch.allclose(share, torch.tensor([0, 0, 1 / 6, 1 / 6, 2 / 3]), atol=0.06)
    # An absent scale adds nothing, not even the bias of φ.
    assert torch.allclose(output.quantized, quantizer.decode(output.indices, (4, 4)), atol=1e-5)
    assert quantizer.usage.counts.sum() == present.sum()
    assert quantizer.book.stats.step_counts.sum() == present.sum()
    assert (quantizer.eval()(z).indices >= 0).all()


def test_dropped_scales_enter_no_loss(monkeypatch):
    quantizer = build(scale_dropout=1.0)
    depths = torch.tensor([1, 4])
    monkeypatch.setattr(quantizer, "sample_depths", lambda batch, device: depths)
    z, grid = torch.randn(2, 16, 4), (4, 4)
    output = quantizer(z, grid=grid)
    ends, errors = [1, 5, 14, 30], []
    for number, end in enumerate(ends):
        prefix = quantizer.decode_prefix(quantizer.eval().encode(z, grid)[:, :end], 16, grid)
        active = depths > number
        errors.append((z - prefix)[active].square().mean())
    assert torch.allclose(output.losses["commitment"], sum(errors) / 4, atol=1e-6)


def test_masked_latents_hide_the_ids_that_cover_only_them():
    quantizer = build(scales=[1, 2, 4], num_phi=0)
    z = torch.randn(1, 4, 4)
    mask = torch.tensor([[True, True, False, False]])
    output = quantizer(z, mask)
    assert quantizer.index_mask(mask).tolist() == [[True, True, False, True, True, False, False]]
    assert quantizer.usage.counts.sum() == 4
    assert quantizer.book.stats.step_counts.sum() == 4
    ids, errors = output.indices, []
    for end in (1, 3, 7):
        prefix = quantizer.decode_prefix(ids[:, :end], 4)
        errors.append((z - prefix)[mask].square().mean())
    assert torch.allclose(output.losses["commitment"], sum(errors) / 3, atol=1e-6)


def test_an_ema_codebook_learns_from_the_pooled_residuals():
    quantizer = build(codebook="ema", revival="none", ema_decay=0.0, num_phi=0, scales=[1, 2])
    z = torch.randn(6, 4, 4)
    ids = quantizer(z, grid=(2, 2)).indices[..., 0]
    first = z.mean(1, keepdim=True)
    before = quantizer.book.embedding.clone()
    rows = torch.cat([first, z - before[ids[:, :1]]], dim=1)
    quantizer.after_step()
    for code in ids.unique():
        expected = rows[ids == code].mean(0)
        assert torch.allclose(quantizer.book.embedding[code], expected, atol=1e-4)


def test_the_codebook_starts_from_all_latents_not_from_the_coarsest_means():
    torch.manual_seed(0)
    quantizer = MultiScaleVQ(4, 64, metric="euclidean", codebook="gradient", scales=[1, 2, 4])
    quantizer(torch.randn(2, 256, 4), grid=(16, 16))  # the 1×1 scale has two tokens only
    assert len(quantizer.book.embedding.round(decimals=4).unique(dim=0)) == 64


def test_a_start_from_data_has_codes_for_what_coarser_scales_leave():
    """Of whole latents alone, finer scales would all take the few codes that lie near zero."""
    torch.manual_seed(0)
    latents = (4 * torch.randn(40, 1, 4) + torch.randn(40, 16, 4)).flatten(0, 1)
    counts = []
    for whole in (True, False):
        quantizer = MultiScaleVQ(4, 64, metric="euclidean", codebook="gradient", scales=[1, 2, 4])
        start = quantizer.book.initialize if whole else quantizer.initialize_from
        start(latents)
        ids = quantizer.eval().encode(latents.view(40, 16, 4), grid=(4, 4))
        fine = ids[:, 5:].flatten().bincount(minlength=64).float() / (40 * 16)
        counts.append(float((-(fine * fine.clamp(min=1e-9).log()).sum()).exp()))
    assert counts[1] > 2 * counts[0] and counts[1] > 20


def test_a_codebook_that_starts_as_drawn_is_left_alone():
    quantizer = build(kmeans_init=False)
    before = quantizer.book.embedding.clone()
    quantizer.initialize(torch.randn(50, 4))
    assert torch.equal(quantizer.book.embedding, before)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"scales": []}, "scales"),
        ({"scales": [2, 1]}, "scales"),
        ({"grid": "auto"}, r"^grid=auto: must be \[rows, columns\].* or null"),
        ({"grid": [4, 0]}, r"^grid=\[4, 0\]"),
        ({"grid": [2, 2, 4]}, r"^grid=\[2, 2, 4\]"),
        ({"grid": 16}, r"^grid=16"),
        ({"min_scales": 5}, "min_scales"),
        ({"entropy_weight": 0.1}, "entropy"),
    ],
)
def test_wrong_options_are_refused(options, key):
    with pytest.raises(ConfigError, match=key):
        build(**options)
