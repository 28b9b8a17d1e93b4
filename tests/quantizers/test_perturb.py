import copy

import pytest
import torch

from vistok.core.errors import ConfigError
from vistok.quantizers.dual_vq import SharedIndexVQ
from vistok.quantizers.perturb import Perturb, near_codes
from vistok.quantizers.product_vq import ProductVQ
from vistok.quantizers.residual_vq import ResidualVQ
from vistok.quantizers.vq import VectorQuantizer


def build(inner=None, size=32, **options):
    torch.manual_seed(0)
    if inner is None:
        inner = VectorQuantizer(4, size, codebook="gradient", kmeans_init=False)
    options = {"alpha": 1.0, "beta": 1.0, "delta": 5, **options}
    return Perturb(inner.dim, size, inner, **options)


def chosen(quantizer, quantized):
    """The ids whose vectors `quantized` holds."""
    distance = torch.cdist(quantized.detach(), quantizer.codebooks()[0][None])
    assert distance.amin(-1).max() < 1e-3
    return distance.argmin(-1)


def ranks(quantizer, z, ids):
    """Place of each id among all codes, by cosine to its latent, in float64."""
    unit = torch.nn.functional.normalize(z.double(), dim=-1)
    order = (unit @ quantizer.codebooks()[0].double().T).argsort(-1, descending=True)
    return (order == ids[..., None]).int().argmax(-1)


def test_draws_uniformly_from_the_nearest_codes():
    quantizer = build()
    z = torch.randn(20, 100, 4)
    drawn = ranks(quantizer, z, chosen(quantizer, quantizer(z).quantized))
    share = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
    assert share.shape == (5,)  # none beyond δ
    assert torch.allclose(share, torch.full((5,), 0.2), atol=0.05)


def test_alpha_is_the_share_of_tokens():
    quantizer = build(alpha=0.3, delta=30)
    z = torch.randn(20, 100, 4)
    output = quantizer(z)
    moved = chosen(quantizer, output.quantized) != output.indices[..., 0]
    assert abs(moved.float().mean() - 0.3 * 29 / 30) < 0.05


def test_beta_is_the_share_of_images_from_the_first():
    quantizer = build(beta=0.3, delta=30)
    output = quantizer(torch.randn(10, 100, 4))
    moved = (chosen(quantizer, output.quantized) != output.indices[..., 0]).any(1)
    assert moved.tolist() == [True] * 3 + [False] * 7


def test_small_batches_take_part_with_the_remaining_probability():
    quantizer = build(beta=0.1, delta=30)
    z = torch.randn(4, 10, 4)
    hits = 0
    for _ in range(200):
        output = quantizer(z)
        moved = (chosen(quantizer, output.quantized) != output.indices[..., 0]).any(1)
        assert not moved[1:].any()
        hits += int(moved[0])
    assert abs(hits / 200 - 0.4) < 0.15  # 0.1 · 4 images


def test_losses_indices_and_gradients_are_those_of_the_clean_codes():
    quantizer = build()
    z = torch.randn(6, 10, 4, requires_grad=True)
    upstream = torch.randn_like(z)
    output = quantizer(z)
    (output.quantized * upstream).sum().backward()
    gradient, z.grad = z.grad, None
    clean = quantizer.inner(z)
    (clean.quantized * upstream).sum().backward()
    assert not torch.allclose(output.quantized, clean.quantized)
    assert torch.equal(gradient, z.grad)
    assert torch.equal(output.indices, clean.indices)
    assert all(torch.equal(output.losses[name], clean.losses[name]) for name in clean.losses)
    assert quantizer.usage.counts.sum() == 60


def test_eval_is_that_of_the_inner_quantizer():
    inner = VectorQuantizer(6, 32, 4, kmeans_init=False)
    quantizer = build(inner).eval()
    z = torch.randn(3, 10, 6)
    output, clean = quantizer(z), inner(z)
    assert torch.equal(output.quantized, clean.quantized)
    assert torch.equal(output.quantized, quantizer(z).quantized)
    assert torch.equal(output.quantized, quantizer.decode(output.indices))
    assert torch.equal(quantizer.encode(z), clean.indices)
    # The only projections are the inner quantizer's, in training as well.
    quantizer.train()
    assert not [name for name, _ in quantizer.named_parameters() if not name.startswith("inner.")]
    assert quantizer(z).quantized.shape == z.shape


def test_starts_the_projections_and_codes_of_the_inner_quantizer():
    latents = torch.randn(200, 6) * 5
    quantizer = build(VectorQuantizer(6, 32, 4))
    other = copy.deepcopy(quantizer.inner)
    torch.manual_seed(1)
    quantizer.initialize_from(latents)
    torch.manual_seed(1)
    other.initialize_from(latents)
    assert quantizer.num_init_latents == 0
    assert torch.equal(quantizer.inner.project_in.weight, other.project_in.weight)
    assert torch.equal(quantizer.codebooks()[0], other.codebooks()[0])


def test_schedule_is_constant_then_linear_then_constant_and_is_saved():
    quantizer = build(anneal_start=4, anneal_end=8, final_ratio=0.5, delta=10)
    ratios = []
    for _ in range(10):
        ratios.append(quantizer.ratio().item())
        quantizer(torch.randn(1, 2, 4))
        quantizer.after_step()
    assert ratios == pytest.approx([1, 1, 1, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5])
    quantizer.after_step()  # nothing was trained since
    other = build(anneal_start=4, anneal_end=8, final_ratio=0.5, delta=10)
    other.load_state_dict(quantizer.state_dict())
    assert other.steps == 10
    z = torch.randn(20, 100, 4)
    output = quantizer(z)
    assert output.metrics["perturbation_ratio"] == 0.5
    ids = chosen(quantizer, output.quantized)
    assert ranks(quantizer, z, ids).max() == 4  # δ is 5 now
    moved = (ids != output.indices[..., 0]).float().mean()
    assert abs(moved - 0.5 * 4 / 5) < 0.05  # α is one half


def test_delta_never_falls_below_one():
    quantizer = build(delta=1, anneal_start=0, anneal_end=0, final_ratio=0.0, alpha=1.0)
    quantizer(torch.randn(2, 10, 4))
    quantizer.after_step()
    assert quantizer.ratio() == 0
    output = quantizer(torch.randn(2, 10, 4))
    assert torch.equal(chosen(quantizer, output.quantized), output.indices[..., 0])


def test_a_product_is_perturbed_slot_by_slot():
    inner = ProductVQ(8, 16, num_codebooks=2, metric="euclidean", kmeans_init=False)
    for book in inner.books:
        book.embedding.normal_()
    quantizer = build(inner, size=16, delta=3)
    z = torch.randn(10, 50, 8)
    output = quantizer(z)
    for slot, part in enumerate(z.split(4, -1)):
        table = inner.codebooks()[slot]
        distance = torch.cdist(output.quantized.split(4, -1)[slot].detach(), table[None])
        ids = distance.argmin(-1)
        order = torch.cdist(part, table[None]).argsort(-1)
        rank = (order == ids[..., None]).int().argmax(-1)
        assert set(rank.flatten().tolist()) == {0, 1, 2}


def test_near_codes_follow_the_score_of_the_codebook(monkeypatch):
    torch.manual_seed(0)
    book = SharedIndexVQ(9, 64, semantic_dim=6, pixel_dim=3, pixel_weight=4.0, kmeans_init=False)
    z = torch.randn(50, 9)
    exact = torch.cdist(book._metric(z).double(), book._table().double()).argsort(-1)[:, :7]
    assert torch.equal(near_codes(book, z, 7), exact)
    monkeypatch.setattr("vistok.quantizers.perturb._BLOCK_SCORES", 64 * 8)  # several blocks
    assert torch.equal(near_codes(book, z, 7), exact)
    assert torch.equal(near_codes(book, z, 1), book.encode(z[None])[0])


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="ResidualVQ"):
        build(ResidualVQ(4, 32, num_layers=2))
    with pytest.raises(ConfigError, match="inner"):
        build(size=64, inner=VectorQuantizer(4, 32))
    with pytest.raises(ConfigError, match=r"^alpha=1.5: must be a number, 0 to 1"):
        build(alpha=1.5)
    with pytest.raises(ConfigError, match=r"^delta=0: must be a whole number, 1 or more"):
        build(delta=0)
    with pytest.raises(ConfigError, match="anneal_start"):
        build(anneal_start=9, anneal_end=8)
