"""Several quantizers on one sequence: whose token, whose id, whose statistics."""

import copy
import math

import pytest
import torch

from quantizers.conftest import DIM, build
from vistok.core.errors import ConfigError
from vistok.quantizers.segments import Segments
from vistok.quantizers.vq import VectorQuantizer

NAMES = ["ema_vq", "vq", "fsq", "residual_vq", "lfq", "unitok", "robust_tok", "token_bridge"]


def segments(name="ema_vq", lengths=(3, 5)):
    torch.manual_seed(0)
    return Segments([build(name, 32) for _ in lengths], lengths)


@pytest.mark.parametrize("name", NAMES)
def test_each_stretch_is_coded_by_its_own_quantizer(name):
    quantizer = segments(name)
    z = torch.randn(20, 8, DIM)
    quantizer.initialize_from(z.flatten(0, 1))
    quantizer.train()(z)
    quantizer.eval()
    ids = quantizer.encode(z)
    first, second = (copy.deepcopy(book).eval() for book in quantizer.books)
    sizes = torch.tensor(first.codebook_sizes)
    assert torch.equal(ids[:, :3], first.encode(z[:, :3]))
    assert torch.equal(ids[:, 3:], second.encode(z[:, 3:]) + sizes)
    assert quantizer.codebook_sizes == tuple((2 * sizes).tolist())
    vectors = quantizer.decode(ids)
    alone = first.decode(ids[:, :3]), second.decode(ids[:, 3:] - sizes)
    torch.testing.assert_close(vectors, torch.cat(alone, dim=1))  # products of fewer rows
    assert torch.equal(quantizer(z).quantized, vectors)
    owners = quantizer.owners(ids)
    assert not owners[:, :3].any() and (owners[:, 3:] == 1).all()
    assert quantizer.bits_per_token == pytest.approx(first.bits_per_token)


def test_an_id_says_whose_it_is():
    """Wherever it stands: the table of a language model is looked up without positions."""
    quantizer = segments().eval()
    ids = torch.arange(64)[None, :, None]
    table = quantizer.decode(ids)[0]
    halves = [book.decode(ids[:, :32])[0] for book in quantizer.books]
    torch.testing.assert_close(table, torch.cat(halves))  # products of half the rows
    joint = quantizer.codebooks()[0]
    assert torch.equal(joint, torch.cat([book.codebooks()[0] for book in quantizer.books]))


def test_quantizers_of_two_sizes():
    books = [VectorQuantizer(DIM, 32, 12), VectorQuantizer(DIM, 8, 4)]
    quantizer = Segments(books, [2, 6]).eval()
    assert quantizer.codebook_sizes == (40,)
    assert quantizer.bits_per_token * 8 == pytest.approx(2 * 5 + 6 * 3)
    table = quantizer.codebooks()[0]
    assert table.shape == (40, 12) and not table[32:, 4:].any()
    assert torch.equal(table[32:, :4], books[1].codebooks()[0])
    ids = quantizer.encode(torch.randn(4, 8, DIM))
    assert (ids[:, :2] < 32).all() and (ids[:, 2:] >= 32).all()


def test_training_losses_statistics_and_gradients():
    quantizer = segments().train()
    z = torch.randn(6, 8, DIM, requires_grad=True)
    quantizer(z)
    quantizer.after_step()
    twins = [copy.deepcopy(book) for book in quantizer.books]
    output = quantizer(z)
    parts = [twin(part) for twin, part in zip(twins, z.split([3, 5], dim=1), strict=True)]
    expected = torch.stack([part.losses["commitment"] for part in parts]).mean()
    assert torch.allclose(output.losses["commitment"], expected)
    assert torch.allclose(output.quantized, torch.cat([p.quantized for p in parts], dim=1))
    counts = quantizer.usage.histograms()[0]
    assert counts[:32].sum() == 2 * 6 * 3 and counts[32:].sum() == 2 * 6 * 5
    output.losses["commitment"].backward()
    assert z.grad[:, :3].any() and z.grad[:, 3:].any()
    quantizer.after_step()
    for book, twin in zip(quantizer.books, twins, strict=True):
        twin.after_step()
        assert torch.equal(book.embedding, twin.embedding)


def test_masked_tokens_do_not_count():
    quantizer = segments("vq").train()
    z = torch.randn(6, 8, DIM)
    quantizer(z)
    mask = torch.arange(8).expand(6, 8) < 4
    losses = quantizer(z, mask).losses
    other = torch.where(mask[..., None], z, torch.randn(6, 8, DIM))
    for name, value in quantizer(other, mask).losses.items():
        assert torch.allclose(value, losses[name])


def test_each_starts_from_its_own_tokens():
    quantizer = segments()
    centres = torch.randn(2, DIM) * 10
    z = torch.randn(200, 8, DIM) * 0.1
    z[:, :3] += centres[0]
    z[:, 3:] += centres[1]
    quantizer.initialize_from(z.flatten(0, 1))
    for book, centre in zip(quantizer.books, centres, strict=True):
        assert torch.allclose(book.project_out.bias, centre, atol=0.1)
    books = [VectorQuantizer(DIM, 32, 8), VectorQuantizer(DIM, 64, 8)]
    wanted = Segments(books, [2, 6]).num_init_latents
    assert wanted == max(4 * 32 * 4, math.ceil(4 * 64 * 8 / 6))


def test_absent_ids_stay_absent():
    torch.manual_seed(0)
    quantizer = Segments([build("residual_vq", 32, quantizer_dropout=1.0) for _ in "ab"], [2, 2])
    ids = quantizer.train()(torch.randn(30, 4, DIM)).indices
    assert (ids == -1).any() and ids.min() == -1
    assert (ids[:, 2:][ids[:, 2:] >= 0] >= 32).all()


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="stand for scales"):
        Segments([build("var", 32), build("var", 32)], [4, 16])
    with pytest.raises(ConfigError, match=r"8 slots.* 1; the parts of one sequence must agree"):
        Segments([build("vq", 32), build("residual_vq", 32)], [4, 4])
