"""Finite scalar quantization."""

import math

import pytest
import torch

from vistok.core.errors import ConfigError
from vistok.quantizers.fsq import FSQ

LEVELS = [[8, 8, 8, 5, 5, 5], [8, 6, 5], [7, 5, 5, 5, 5], [3], [17, 17, 17, 17]]


def standard(z: float, levels: int) -> tuple[int, float]:
    """Digit and value of one channel by the paper's formula, in Python floats."""
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    rounded = round(math.tanh(z + math.atanh(offset / half)) * half - offset)
    return rounded + levels // 2, rounded / (levels // 2)


def symmetric(z: float, levels: int, slope: float = 1.0) -> tuple[int, float]:
    digit = math.floor((levels - 1) * (math.tanh(slope * z) + 1) / 2 + 0.5)
    return digit, 2 * digit / (levels - 1) - 1


def ifsq(z: float, levels: int) -> tuple[int, float]:
    """As Tencent's code has it: a sigmoid, and rounding about zero."""
    rounded = round((2 / (1 + math.exp(-1.6 * z)) - 1) * (levels - 1) / 2)
    return rounded + (levels - 1) // 2, rounded / ((levels - 1) / 2)


CASES = [
    (standard, {"levels": [8, 5, 4, 7]}),
    (standard, {"levels": [3, 16, 6]}),
    (symmetric, {"levels": [8, 5, 2, 7], "grid": "symmetric"}),
    (ifsq, {"levels": [17, 17, 5], "grid": "symmetric", "slope": 0.8}),
]


@pytest.mark.parametrize(("oracle", "settings"), CASES)
def test_indices_and_values_equal_the_formula(oracle, settings):
    levels = settings["levels"]
    quantizer = FSQ(len(levels), **settings)
    z = 2 * torch.randn(1, 400, len(levels))
    output = quantizer.train()(z)
    for row, index, vector in zip(
        z[0].tolist(), output.indices[0, :, 0].tolist(), output.quantized[0].tolist(), strict=True
    ):
        expected, place = 0, 1
        for x, number, value in zip(row, levels, vector, strict=True):
            digit, level = oracle(x, number)
            expected, place = expected + digit * place, place * number
            assert value == pytest.approx(level, abs=1e-6)
        assert index == expected  # the first channel is least significant
    assert torch.equal(quantizer.decode(output.indices), output.quantized)
    assert torch.equal(quantizer.eval()(z).quantized, output.quantized)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("grid", ["standard", "symmetric"])
def test_every_id_there_and_back(levels, grid):
    quantizer = FSQ(len(levels), levels, grid=grid).eval()
    ids = torch.arange(math.prod(levels))[None, :, None]
    vectors = quantizer.decode(ids)
    assert torch.equal(quantizer.indices_of(vectors), ids)
    assert torch.equal(quantizer.encode(quantizer.latents_of(ids)), ids)
    assert torch.equal(quantizer.codebooks()[0], vectors[0])
    assert vectors.abs().max() <= 1 and len(vectors[0].unique(dim=0)) == len(ids[0])


def test_flextok_levels_have_64000_codes():
    quantizer = FSQ(6, LEVELS[0])
    assert quantizer.codebook_sizes == (64000,) and quantizer.codebooks()[0].shape == (64000, 6)


def test_extreme_latents_reach_the_outer_levels_and_no_further():
    for settings in ({"levels": [8, 5]}, {"levels": [8, 5], "grid": "symmetric"}):
        quantizer = FSQ(2, **settings).eval()
        ids = quantizer.encode(torch.tensor([[[-50.0, -50], [50, 50]]]))
        assert ids.flatten().tolist() == [0, 39]
    huge = FSQ(1, [1025]).eval()  # 1.001 * 1024 / 2 rounds beyond the last level
    assert huge.encode(torch.tensor([[[-50.0], [50]]])).flatten().tolist() == [0, 1024]


def test_several_codebooks():
    quantizer = FSQ(8, [4, 4], 4).eval()
    z = torch.randn(2, 9, 8)
    single = FSQ(2, [4, 4]).eval()
    for slot, part in enumerate(z.split(2, -1)):
        assert torch.equal(quantizer.encode(z)[..., slot], single.encode(part)[..., 0])
    assert torch.equal(quantizer.indices_of(quantizer(z).quantized), quantizer.encode(z))


@pytest.mark.parametrize(("oracle", "settings"), CASES)
def test_gradient_is_that_of_the_bounded_value(oracle, settings):
    levels = torch.tensor(settings["levels"])
    quantizer = FSQ(len(levels), **settings)
    z = torch.randn(2, 30, len(levels), requires_grad=True)
    slope = torch.randn_like(z)
    (quantizer.train()(z).quantized * slope).sum().backward()
    x = z.detach().double().requires_grad_()
    if oracle is standard:
        half, offset = (levels - 1) * 1.001 / 2, 0.5 * (levels % 2 == 0).double()
        soft = (torch.tanh(x + torch.atanh(offset / half)) * half - offset) / (levels // 2)
    else:
        soft = torch.tanh(settings.get("slope", 1.0) * x)
    (soft * slope).sum().backward()
    torch.testing.assert_close(z.grad.double(), x.grad, rtol=1e-4, atol=1e-6)


def test_saturation_is_reported_and_starves_the_gradient():
    for grid in ("standard", "symmetric"):
        quantizer = FSQ(2, [8, 5], grid=grid).train()
        z = torch.full((1, 4, 2), 6.0, requires_grad=True)
        output = quantizer(z)
        output.quantized.sum().backward()
        assert output.metrics["saturation"] == 1 and z.grad.abs().max() < 1e-4
        assert quantizer(torch.randn(1, 500, 2)).metrics["saturation"] < 0.05
        mask = torch.tensor([[True, False]])
        half = quantizer(torch.tensor([[[0.0, 0], [9, 9]]]), mask)
        assert half.metrics["saturation"] == 0


def test_ids_survive_bfloat16_autocast():
    # vector-quantize-pytorch issue 107: packed in bfloat16, ids leave the vocabulary.
    quantizer, z = FSQ(6, LEVELS[0]), torch.randn(2, 500, 6)
    plain = quantizer.encode(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.train()(z).indices, plain)


def test_ifsq_fills_its_levels_more_evenly():
    z = torch.randn(1, 200_000, 1)
    shares = []
    for settings in ({"levels": [17]}, {"levels": [17], "grid": "symmetric", "slope": 0.8}):
        counts = FSQ(1, **settings).encode(z).flatten().bincount(minlength=17)
        shares.append(counts[1:-1] / counts.sum())
    assert shares[0].min() < 0.05 and shares[0].max() > 0.08
    assert shares[1].min() > 0.06 and shares[1].max() < 0.07


# ------------------------------------------------------------------------- training variants


def test_noise_dropout_spans_one_bin_about_the_bounded_value():
    torch.manual_seed(0)
    quantizer = FSQ(1, [9], grid="symmetric", noise_dropout=0.5).train()
    z = torch.full((1, 20_000, 1), 0.3, requires_grad=True)
    output = quantizer(z)
    values = output.quantized.detach().flatten()
    rounded = quantizer.decode(output.indices).flatten()
    noisy = values != rounded
    assert noisy.float().mean() == pytest.approx(0.5, abs=0.02)
    offset = values[noisy] - math.tanh(0.3)
    assert offset.abs().max() <= 0.125 and offset.min() < -0.12 and offset.max() > 0.12
    output.quantized.sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, 1 - math.tanh(0.3) ** 2))
    far = FSQ(1, [9], noise_dropout=1.0).train()(torch.full((1, 1000, 1), 9.0))
    assert far.quantized.abs().max() <= 1


def test_quantization_dropout_is_per_sample():
    torch.manual_seed(1)
    quantizer = FSQ(3, [8, 6, 5], quantization_dropout=0.3).train()
    output = quantizer(torch.randn(2000, 4, 3))
    same = (output.quantized == quantizer.decode(output.indices)).flatten(1)
    rounded = same.float().mean(1) > 0.5
    assert (same[rounded]).all() and not same[~rounded].any()
    assert rounded.float().mean() == pytest.approx(0.7, abs=0.04)


def test_corruption_replaces_a_drawn_share_of_the_tokens_of_some_samples():
    torch.manual_seed(2)
    quantizer = FSQ(6, LEVELS[0], corruption_probability=0.5, corruption_rate=[0.0, 0.4]).train()
    z = torch.randn(600, 100, 6, requires_grad=True)
    output = quantizer(z)
    table_ids = quantizer.indices_of(output.quantized.detach())
    changed = (table_ids != output.indices)[..., 0]
    share = changed.float().mean(1)
    assert torch.equal(output.indices, quantizer.encode(z))  # what the encoder chose
    assert (share == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert share.max() < 0.6 and share[share > 0].std() > 0.08  # a rate of its own per sample
    assert share[share > 0].mean() == pytest.approx(0.2, abs=0.03)
    assert quantizer.usage.counts.sum() == z.shape[0] * z.shape[1]
    output.quantized.sum().backward()
    assert not z.grad[changed].any() and z.grad[~changed].all()


def test_eval_has_no_noise():
    quantizer = FSQ(
        3,
        [8, 6, 5],
        noise_dropout=1.0,
        quantization_dropout=1.0,
        corruption_probability=1.0,
        corruption_rate=[1.0, 1.0],
    ).eval()
    z = torch.randn(2, 50, 3)
    assert torch.equal(quantizer(z).quantized, FSQ(3, [8, 6, 5]).eval()(z).quantized)


def test_one_token_and_no_tokens():
    quantizer = FSQ(3, [8, 6, 5], corruption_probability=1.0, noise_dropout=0.5).train()
    for shape in ((1, 1), (0, 4), (4, 0)):
        output = quantizer(torch.zeros(*shape, 3))
        assert output.indices.shape == (*shape, 1) and output.losses == {}
        assert torch.isfinite(output.metrics["saturation"])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"levels": [8, 2]}, r"^levels=.*symmetric"),
        ({"levels": [8, 1]}, "^levels=.*, 2 or more"),
        ({"levels": []}, "^levels="),
        ({"levels": [8] * 9}, "^levels=.* num_codebooks"),
        ({"grid": "cubic"}, "^grid=cubic: must be standard or symmetric"),
        ({"slope": 0.8}, "^slope=0.8"),
        ({"noise_dropout": 1.5}, "^noise_dropout=1.5: must be a number, 0 to 1"),
        ({"corruption_rate": [0.5, 0.2]}, "^corruption_rate="),
    ],
)
def test_bad_values_name_their_key(settings, key):
    with pytest.raises(ConfigError, match=key):
        FSQ(4, **settings)


@pytest.mark.parametrize("symmetric_grid", [False, True])
def test_agrees_with_vector_quantize_pytorch(symmetric_grid):
    peers = pytest.importorskip("vector_quantize_pytorch")
    levels = [8, 8, 6, 5]
    peer = peers.FSQ(levels, preserve_symmetry=symmetric_grid).eval()
    z = 2 * torch.randn(2, 500, 4)
    expected, indices = peer(z)
    ours = FSQ(4, levels, grid="symmetric" if symmetric_grid else "standard").eval()(z)
    assert torch.equal(ours.indices[..., 0], indices.long())
    torch.testing.assert_close(ours.quantized, expected)


@pytest.mark.parametrize("grid", ["standard", "symmetric"])
def test_how_many_tokens_come_together_changes_nothing(grid):
    """64 tokens at a time are computed next to repeated constants, other numbers in smaller parts."""
    quantizer = FSQ(6, levels=[8, 5, 3], num_codebooks=2, grid=grid).train()
    z = torch.randn(1, 192, 6)
    whole = quantizer(z)
    for count in (1, 3, 48, 64):
        parts = [quantizer(chunk) for chunk in z.split(count, dim=1)]
        assert torch.equal(torch.cat([p.indices for p in parts], dim=1), whole.indices)
        assert torch.equal(torch.cat([p.quantized for p in parts], dim=1), whole.quantized)
