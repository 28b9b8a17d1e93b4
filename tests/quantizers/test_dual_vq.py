import pytest
import torch

from vistok.core.errors import ConfigError
from vistok.quantizers.dual_vq import DualToken, ImageFolder, MultiScaleSharedIndexVQ, SharedIndexVQ


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def shared_index(weight=1.0, **options):
    torch.manual_seed(0)
    options = {"codebook": "gradient", "kmeans_init": False, **options}
    return SharedIndexVQ(9, 32, semantic_dim=6, pixel_dim=3, pixel_weight=weight, **options)


@pytest.mark.parametrize("weight", [0.2, 1.0, 5.0])
def test_one_index_minimises_the_weighted_sum_of_both_distances(weight):
    quantizer = shared_index(weight)
    z = torch.randn(4, 20, 9, requires_grad=True)
    output = quantizer(z)
    table = quantizer.codebooks()[0].double()
    s, p = unit(z.detach().double()[..., :6]), unit(z.detach().double()[..., 6:])
    semantic = (s[:, :, None] - table[:, :6]).square().sum(-1)
    pixel = (p[:, :, None] - table[:, 6:]).square().sum(-1)
    best = (semantic + weight * pixel).argmin(-1)
    assert torch.equal(output.indices[..., 0], best)
    if weight != 1:
        assert not torch.equal(best, (semantic + pixel).argmin(-1))

    # Both halves have unit length, whatever the weight.
    assert torch.allclose(output.quantized.double(), table[best], atol=1e-5)
    ones = torch.ones(4, 20)
    assert torch.allclose(output.quantized[..., :6].norm(dim=-1), ones, atol=1e-5)
    assert torch.allclose(output.quantized[..., 6:].norm(dim=-1), ones, atol=1e-5)

    error = semantic.gather(-1, best[..., None]) + weight * pixel.gather(-1, best[..., None])
    expected = error.mean() / 9
    assert torch.allclose(output.losses["commitment"].double(), expected, atol=1e-6)
    assert torch.allclose(output.losses["codebook"].double(), expected, atol=1e-6)

    # The encoder's gradient is that of normalising each half, not changed by the weight.
    upstream = torch.randn_like(z)
    (output.quantized * upstream).sum().backward()
    again = z.detach().clone().requires_grad_()
    halves = torch.cat([unit(again[..., :6]), unit(again[..., 6:])], dim=-1)
    (halves * upstream).sum().backward()
    assert torch.allclose(z.grad, again.grad, atol=1e-5)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_codes_stay_pairs_of_unit_vectors(codebook):
    torch.manual_seed(0)
    quantizer = SharedIndexVQ(
        9, 16, semantic_dim=6, pixel_dim=3, pixel_weight=4.0, codebook=codebook, ema_decay=0.5
    )
    z = torch.randn(4, 64, 9)
    for _ in range(3):  # the first starts it by k-means
        before = quantizer.codebooks()[0]
        output = quantizer(z)
        assert torch.allclose(output.quantized.norm(dim=-1), torch.full((4, 64), 2**0.5))
        for part in (output.quantized[..., :6], output.quantized[..., 6:]):
            assert torch.allclose(part.norm(dim=-1), torch.ones(4, 64), atol=1e-5)
        if codebook == "gradient":
            sum(output.losses.values()).backward()
            with torch.no_grad():
                quantizer.embedding -= 10 * quantizer.embedding.grad
        quantizer.after_step()
    assert (quantizer.codebooks()[0] - before).abs().max() > 1e-3
    quantizer.eval()
    output = quantizer(z)
    assert torch.equal(output.quantized, quantizer.decode(output.indices))
    ids = torch.arange(16)[None, :, None]
    assert torch.equal(quantizer.encode(quantizer.decode(ids)), ids)


def test_an_ema_pair_is_the_mean_of_its_latents_half_by_half():
    quantizer = shared_index(3.0, codebook="ema", ema_decay=0.0, revival="none")
    z = torch.randn(4, 40, 9)
    ids = quantizer(z).indices[..., 0]
    quantizer.after_step()
    table = quantizer.codebooks()[0]
    for code in ids.unique():
        own = z[ids == code]
        assert torch.allclose(table[code, :6], unit(unit(own[:, :6]).mean(0)), atol=1e-4)
        assert torch.allclose(table[code, 6:], unit(unit(own[:, 6:]).mean(0)), atol=1e-4)


def test_token_flow_over_scales():
    torch.manual_seed(0)
    quantizer = MultiScaleSharedIndexVQ(
        9, 32, semantic_dim=6, pixel_dim=3, scales=[1, 2, 4], kmeans_init=False
    ).eval()
    z = torch.randn(2, 16, 9)
    output = quantizer(z, grid=(4, 4))
    assert output.indices.shape == (2, 21, 1)
    assert torch.equal(output.quantized, quantizer.decode(output.indices, (4, 4)))
    # The first id is that of the mean latent, by the shared-index rule.
    table, mean = quantizer.codebooks()[0], z.mean(1)
    joint = torch.cat([unit(mean[:, :6]), unit(mean[:, 6:])], dim=-1)
    assert torch.equal(output.indices[:, 0, 0], torch.cdist(joint, table).argmin(-1))


def test_dual_token_is_two_residual_quantizers_side_by_side():
    torch.manual_seed(0)
    quantizer = DualToken(8, 16, num_layers=3, kmeans_init=False)
    for book in quantizer.books:
        book.books[0].embedding.normal_(0, 0.7)
    pixel, semantic = quantizer.books
    z = torch.randn(2, 5, 8)
    output = quantizer(z)
    left, right = pixel(z[..., :4]), semantic(z[..., 4:])
    assert output.indices.shape == (2, 5, 6)
    assert torch.equal(output.indices, torch.cat([left.indices, right.indices], dim=-1))
    assert torch.equal(output.quantized, torch.cat([left.quantized, right.quantized], dim=-1))
    mean = (left.losses["commitment"] + right.losses["commitment"]) / 2
    assert torch.allclose(output.losses["commitment"], mean)
    assert pixel.books[0].embedding.data_ptr() != semantic.books[0].embedding.data_ptr()
    assert len(quantizer.codebooks()) == 6
    with pytest.raises(ConfigError, match="halves"):
        DualToken(7, 16)


def image_folder(**options):
    torch.manual_seed(0)
    options = {"scales": [1, 2, 2, 4], "min_scales": 2, "kmeans_init": False, **options}
    quantizer = ImageFolder(8, 16, codebook="gradient", metric="euclidean", **options)
    for branch in quantizer.branches:
        branch.book.embedding.data.normal_()
    return quantizer


def test_image_folder_drops_the_same_scales_in_all_branches():
    quantizer = image_folder(scale_dropout=0.5)
    z = torch.randn(300, 16, 8)
    output = quantizer(z, grid=(4, 4))
    assert output.indices.shape == (300, 1 + 4 + 4 + 16, 2)
    present = output.indices >= 0
    assert torch.equal(present[..., 0], present[..., 1])
    depth = present[..., 0].sum(1)
    assert set(depth.tolist()) == {5, 9, 25}  # 2, 3 and 4 scales
    assert torch.allclose(output.quantized, quantizer.decode(output.indices, (4, 4)), atol=1e-5)


def test_image_folder_is_a_product_of_pyramids():
    quantizer = image_folder(scale_dropout=0.0)
    z, grid = torch.randn(2, 18, 8), (3, 6)
    output = quantizer(z, grid=grid)
    pairs = zip(quantizer.branches, z.split(4, -1), strict=True)
    parts = [branch(part, grid=grid) for branch, part in pairs]
    assert torch.equal(output.indices, torch.cat([part.indices for part in parts], -1))
    assert torch.equal(output.quantized, torch.cat([part.quantized for part in parts], -1))
    for name in ("commitment", "codebook"):
        mean = sum(part.losses[name] for part in parts) / 2
        assert torch.allclose(output.losses[name], mean)
    length = 1 * 2 + 2 * (2 * 3) + 3 * 6  # of 3 rows a half is 2, a quarter 1
    assert quantizer.num_index_tokens(18, grid) == output.indices.shape[1] == length
    mask = torch.rand(2, 18) < 0.5
    assert quantizer.index_mask(mask, grid).shape == (2, length)
    quantizer(z, mask, grid)

    quantizer.eval()
    ids = quantizer.encode(z, grid)
    prefix = quantizer.decode_prefix(ids[:, :8], 18, grid)
    expected = [
        branch.decode_prefix(ids[:, :8, i : i + 1], 18, grid)
        for i, branch in enumerate(quantizer.branches)
    ]
    assert torch.equal(prefix, torch.cat(expected, -1))
