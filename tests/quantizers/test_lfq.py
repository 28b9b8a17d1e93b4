"""LFQ, group-wise LFQ and the digit arithmetic they share."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vistok.core.errors import ConfigError
from vistok.core.leaving import ends_with
from vistok.quantizers.bsq import BSQ
from vistok.quantizers.lfq import LFQ, GroupLFQ, bit_entropy, mean_code_probabilities
from vistok.quantizers.scalar import binary_radices, pack_digits, unpack_digits

CPU = torch.device("cpu")


def all_signs(bits: int) -> torch.Tensor:
    """The codes +-1 in index order, least significant bit first, by Python arithmetic."""
    rows = [[1.0 if code >> bit & 1 else -1.0 for bit in range(bits)] for code in range(2**bits)]
    return torch.tensor(rows, dtype=torch.float64)


def naive_entropies(z, scale, temperature, eps, weights=None):
    """Sample and batch entropy from the N x 2^d table, float64. `z` is `(N, d)`."""
    p = (2 * z @ (scale * all_signs(z.shape[1])).T / temperature).softmax(-1)
    w = torch.full_like(z[:, 0], 1 / len(z)) if weights is None else weights
    sample = -(w @ torch.special.xlogy(p, p).sum(-1))
    mean = w @ p
    return sample, -(mean * (mean + eps).log()).sum()


def train(quantizer, z, mask=None):
    z = z.detach().clone().requires_grad_()
    return z, quantizer.train()(z, mask)


# ------------------------------------------------------------------------------------ digits


@pytest.mark.parametrize("radices", [[2] * 62, [8] * 20, [7, 5, 5, 5, 5], [2**31, 2**31], [3]])
def test_digits_go_there_and_back_up_to_the_edge_of_int64(radices):
    radices = torch.tensor(radices)
    draws = (torch.rand(1000, len(radices), dtype=torch.float64) * radices).long()
    digits = torch.cat([torch.zeros_like(draws[:1]), (radices - 1)[None], draws])
    ids = pack_digits(digits, radices)
    assert torch.equal(unpack_digits(ids, radices), digits)
    place, expected = 1, 0
    for digit, radix in zip(digits[5].tolist(), radices.tolist(), strict=True):
        expected, place = expected + digit * place, place * radix
    assert ids[5] == expected and ids[0] == 0 and ids[1] == place - 1


def test_first_bit_is_least_significant():
    assert pack_digits(torch.tensor([True, False, False]), binary_radices(3, CPU)) == 1
    assert LFQ(6, 8, 2).encode(torch.tensor([[[1.0, -1, -1, -1, 1, -1]]])).tolist() == [[[1, 2]]]


# --------------------------------------------------------------------------------- quantizing


@pytest.mark.parametrize(
    "quantizer",
    [LFQ(10, 2**10), LFQ(18, 512, 2), BSQ(12, 2**12), BSQ(36, 512, 4), GroupLFQ(32, 256, 4)],
    ids=lambda q: f"{type(q).__name__}{q.codebook_dim}",
)
def test_every_id_there_and_back(quantizer):
    quantizer.eval()
    size = quantizer.codebook_sizes[0]
    ids = torch.arange(size)[None, :, None].repeat(1, 1, quantizer.num_indices)
    ids = torch.cat([ids, torch.randint(size, (1, 20000, quantizer.num_indices))], 1)
    vectors = quantizer.decode(ids)
    assert torch.equal(quantizer.encode(vectors), ids)
    assert torch.equal(quantizer(vectors).quantized, vectors)
    rows = [table[ids[..., q]] for q, table in enumerate(quantizer.codebooks())]
    assert torch.equal(torch.cat(rows, -1), vectors)


def test_eval_and_training_quantize_to_the_table_exactly():
    quantizer = LFQ(12, 2**12, scale=0.3)
    z = torch.randn(2, 50, 12)
    _, output = train(quantizer, z)
    assert torch.equal(output.quantized, quantizer.decode(output.indices))
    assert torch.equal(quantizer.eval()(z).quantized, output.quantized)


def test_ids_survive_bfloat16_autocast():
    # bsq-vit packs ids in the activation's type: 99 % of 18-bit ids are wrong in bfloat16.
    z = torch.randn(2, 500, 18)
    for quantizer in (LFQ(18), BSQ(18)):
        plain = quantizer.encode(z)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantizer.encode(z), plain)
            assert torch.equal(quantizer.train()(z).indices, plain)


def test_straight_through_gradient_is_the_identity():
    quantizer = LFQ(6, 64, entropy_weight=0.0)
    z, output = train(quantizer, torch.randn(2, 5, 6))
    slope = torch.randn(2, 5, 6)
    (output.quantized * slope).sum().backward()
    assert torch.equal(z.grad, slope)
    assert "entropy" not in output.losses  # weight 0: not even computed


def test_zero_is_minus():
    assert LFQ(4, 16).eval()(torch.zeros(1, 1, 4)).quantized.tolist() == [[[-1.0] * 4]]


def test_one_bit_one_token_and_no_tokens():
    for quantizer in (LFQ(1, 2), BSQ(1, 2), GroupLFQ(1, 2, 1)):
        for shape in ((1, 1, 1), (0, 3, 1), (2, 0, 1)):
            z, output = train(quantizer, torch.ones(shape))
            assert output.indices.shape == shape and output.quantized.shape == shape
            sum(output.losses.values()).backward()
            assert all(torch.isfinite(loss) for loss in output.losses.values())
            assert torch.isfinite(z.grad).all()


# ------------------------------------------------------------------------------------ entropy


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_exact_entropy_equals_the_definition(bits, temperature, eps):
    torch.manual_seed(bits)
    quantizer = LFQ(bits, 2**bits, temperature=temperature, entropy_eps=eps, scale=0.7)
    z, output = train(quantizer, 0.2 * torch.randn(3, 40, bits))
    x = z.detach().double().flatten(0, 1).requires_grad_()
    sample, batch = naive_entropies(x, 0.7, temperature, eps)
    torch.testing.assert_close(
        output.metrics["sample_entropy"].double(), sample.detach(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        output.metrics["batch_entropy"].double(), batch.detach(), rtol=1e-5, atol=1e-6
    )
    (sample - batch).backward()
    output.losses["entropy"].backward()
    torch.testing.assert_close(z.grad.flatten(0, 1).double(), x.grad, rtol=2e-4, atol=2e-6)


def test_commitment_equals_the_definition():
    z, output = train(LFQ(5, 32, entropy_weight=0.0), torch.randn(2, 7, 5))
    output.losses["commitment"].backward()
    x = z.detach().double()
    signs = torch.where(x > 0, 1.0, -1.0)
    torch.testing.assert_close(
        output.losses["commitment"].double(), ((x - signs) ** 2).mean(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(z.grad.double(), 2 * (x - signs) / x.numel(), rtol=1e-5, atol=1e-6)


def test_mean_code_probabilities_in_blocks(monkeypatch):
    monkeypatch.setattr("vistok.quantizers.lfq.BLOCK", 64)  # several blocks, the last one short
    logits = torch.randn(23, 2, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(23, dtype=torch.float64)
    p = torch.sigmoid(logits)[:, :, None]
    ones = all_signs(5) > 0
    naive = torch.where(ones, p, 1 - p).prod(-1)
    expected = torch.einsum("n,ngc->gc", weights, naive)
    torch.testing.assert_close(mean_code_probabilities(logits, weights), expected)
    assert torch.autograd.gradcheck(lambda x: mean_code_probabilities(x, weights), logits)


def test_bit_entropy_keeps_its_digits_at_large_logits():
    logits = torch.tensor([0.0, 1.0, -30.0, 60.0, 400.0])
    p = torch.sigmoid(-logits.abs().double())
    expected = -torch.special.xlogy(p, p) - torch.special.xlogy(1 - p, 1 - p)
    torch.testing.assert_close(bit_entropy(logits).double(), expected, rtol=1e-4, atol=1e-12)


def test_entropy_stays_finite_where_float16_logits_overflow():
    # 2 sum|z| > 655 at T = 0.01 is inf - inf = NaN in the released form under float16.
    z, output = train(LFQ(18), 100 * torch.randn(1, 30, 18))
    output.losses["entropy"].backward()
    assert torch.isfinite(output.losses["entropy"]) and torch.isfinite(z.grad).all()


def test_low_temperature_leaves_no_denormal_numbers():
    # Products of small probabilities are denormal: the matrix products took 20 times as long.
    from vistok.quantizers.lfq import _code_table

    table = _code_table(40 * torch.randn(1, 9, 500))
    assert not ((table > 0) & (table < 1e-30)).any()
    torch.testing.assert_close(table.sum(1), torch.ones(1, 500))


def test_entropy_of_an_even_and_of_a_collapsed_vocabulary():
    even = LFQ(8, 256, entropy_eps=0.0).train()(all_signs(8).float()[None])
    assert even.losses["entropy"].item() == pytest.approx(-8 * 0.6931472, abs=1e-4)
    collapsed = LFQ(8, 256, entropy_eps=0.0).train()(torch.ones(1, 256, 8))
    assert collapsed.losses["entropy"].item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("entropy", "group"), [("per_codebook", 3), ("per_bit", 1)])
def test_named_approximations_bound_the_batch_entropy(entropy, group):
    torch.manual_seed(0)
    copied = torch.randn(1, 200, 1).repeat(1, 1, 6)  # all bits alike: one bit of information
    settings = {"temperature": 1.0, "entropy_eps": 0.0}
    output = LFQ(6, 8, 2, entropy=entropy, **settings).train()(copied)
    x = copied[0].double()
    parts = [naive_entropies(part, 1, 1, 0) for part in x.split(group, -1)]
    torch.testing.assert_close(
        output.metrics["sample_entropy"].double(), sum(p[0] for p in parts), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        output.metrics["batch_entropy"].double(), sum(p[1] for p in parts), rtol=1e-5, atol=1e-6
    )
    exact = LFQ(6, 8, 2, **settings).train()(copied)
    assert output.metrics["batch_entropy"] > exact.metrics["batch_entropy"] + 0.1


@pytest.mark.parametrize("entropy", ["pooled", "per_group"])
def test_group_entropies_equal_the_definition(entropy):
    torch.manual_seed(1)
    quantizer = GroupLFQ(12, 16, 3, entropy=entropy, temperature=0.5)
    z, output = train(quantizer, 0.3 * torch.randn(2, 50, 12))
    x = z.detach().double().reshape(100, 3, 4).requires_grad_()
    if entropy == "pooled":
        sample, batch = naive_entropies(x.flatten(0, 1), 1, 0.5, 1e-5)
    else:
        parts = [naive_entropies(x[:, group], 1, 0.5, 1e-5) for group in range(3)]
        sample, batch = sum(p[0] for p in parts) / 3, sum(p[1] for p in parts) / 3
    torch.testing.assert_close(
        output.losses["entropy"].double(), (sample - batch).detach(), rtol=1e-5, atol=1e-6
    )
    (sample - batch).backward()
    output.losses["entropy"].backward()
    torch.testing.assert_close(z.grad.double(), x.grad.reshape(2, 50, 12), rtol=1e-4, atol=1e-7)


def test_only_per_group_entropy_sees_groups_that_collapsed_apart():
    # Four groups, each stuck at one code of its own: pooled, they look like four codes in use.
    codes = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).reshape(1, 1, 8).repeat(1, 60, 1)
    batch = {
        entropy: GroupLFQ(8, 4, 4, entropy=entropy).train()(codes).metrics["batch_entropy"].item()
        for entropy in ("pooled", "per_group")
    }
    assert batch["pooled"] == pytest.approx(1.386, abs=1e-3)
    assert batch["per_group"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("cls", [LFQ, BSQ])
def test_masked_tokens_enter_nothing(cls):
    torch.manual_seed(2)
    mask = torch.rand(3, 20) < 0.4
    z = torch.randn(3, 20, 6)
    quantizer = cls(6, 8, 2, entropy="joint", commitment_weight=1.0)
    free, kept = train(quantizer, z, mask)
    quantizer.usage.reset()
    alone, only = train(quantizer, z[mask][None])
    for name in ("commitment", "entropy"):
        torch.testing.assert_close(kept.losses[name], only.losses[name])
    assert quantizer.usage.counts.sum() == 2 * mask.sum()
    sum(kept.losses.values()).backward()
    sum(only.losses.values()).backward()
    assert not free.grad[~mask].any()
    torch.testing.assert_close(free.grad[mask], alone.grad[0])
    nothing = quantizer(z, torch.zeros_like(mask))
    assert all(loss == 0 for loss in nothing.losses.values())


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        LargestTensor.numel = max([LargestTensor.numel, *sizes])
        return out


def test_no_tensor_of_tokens_times_codes():
    LargestTensor.numel = 0
    quantizer = LFQ(18).train()
    z = torch.randn(1, 4096, 18, requires_grad=True)
    with LargestTensor():
        sum(quantizer(z).losses.values()).backward()
    assert 0 < LargestTensor.numel <= 2**20  # 4096 x 2^18 would be 2^30


# -------------------------------------------------------------------------- ranks and errors


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    quantizers = [  # built before the process group exists, as Lightning does
        LFQ(6, 64, temperature=0.5),
        BSQ(6, 64, entropy="joint", commitment_weight=1.0),
        GroupLFQ(6, 8, 2, temperature=0.5),
    ]
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    z, mask = torch.load(os.path.join(folder, "batch.pt"))
    results = []
    for quantizer in quantizers:
        for part in (None, mask[rank][None]):
            x = z[rank][None].clone().requires_grad_()
            output = quantizer.train()(x, part)
            sum(output.losses.values()).backward()
            results.append((output.metrics["batch_entropy"], x.grad / 2))  # DDP's average
    torch.save(results, os.path.join(folder, f"rank{rank}.pt"))
    ends_with(0)


def test_two_ranks_equal_the_joined_batch(tmp_path):
    # vector-quantize-pytorch drops the result of its all-reduce; Open-MAGVIT2 has none.
    torch.manual_seed(3)
    z = torch.randn(2, 30, 6) * 0.3 + torch.tensor([0.3, -0.3])[:, None, None]
    mask = torch.rand(2, 30) < torch.tensor([[0.8], [0.3]])
    torch.save((z, mask), tmp_path / "batch.pt")
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    case = 0
    for quantizer in (
        LFQ(6, 64, temperature=0.5),
        BSQ(6, 64, entropy="joint", commitment_weight=1.0),
        GroupLFQ(6, 8, 2, temperature=0.5),
    ):
        for part in (None, mask):
            x, output = train(quantizer, z, part)
            sum(output.losses.values()).backward()
            grads = torch.cat([rank[case][1] for rank in ranks])
            for rank in ranks:
                torch.testing.assert_close(rank[case][0], output.metrics["batch_entropy"])
            torch.testing.assert_close(grads, x.grad, rtol=1e-4, atol=1e-6)
            case += 1


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: LFQ(8, 500), "codebook_size=500: binary"),
        (lambda: LFQ(8, 1), "codebook_size=1: must be a whole number, 2 or more"),
        (lambda: LFQ(8, 2**36), "with num_codebooks"),
        (lambda: LFQ(8, 2**9, 4), "entropy=joint"),
        (lambda: LFQ(8, 16, entropy="pooled"), "entropy=pooled: must be one of"),
        (lambda: LFQ(8, 16, temperature=0.0), "temperature=0.0"),
        (lambda: GroupLFQ(8, 16, 0), "num_codebooks=0: must be a whole number, 1 or more"),
    ],
)
def test_bad_values_name_their_key(build, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        build()


def test_agrees_with_vector_quantize_pytorch():
    peers = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(4)
    peer = peers.LFQ(dim=8, codebook_size=256, commitment_loss_weight=1.0).train()
    z = 0.5 * torch.randn(2, 60, 8)
    peer_output, peer_losses = peer(z, inv_temperature=2.0, return_loss_breakdown=True)
    ours = LFQ(8, 256, temperature=0.5, entropy_eps=0.0).train()(z)
    torch.testing.assert_close(ours.quantized, peer_output.quantized)
    reverse = unpack_digits(ours.indices[..., 0], binary_radices(8, CPU)).flip(-1)
    assert torch.equal(pack_digits(reverse, binary_radices(8, CPU)), peer_output.indices.long())
    torch.testing.assert_close(
        ours.metrics["sample_entropy"], peer_losses.per_sample_entropy, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        ours.metrics["batch_entropy"], peer_losses.batch_entropy, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ours.losses["commitment"], peer_losses.commitment)
