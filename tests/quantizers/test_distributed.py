"""Two gloo processes against one on the joined batch.

Equal where the method allows it: EMA sums and counts, the gradient of the mean losses, the
averaged probability of the entropy, and restarts (their candidates are spread evenly over each
rank's share, which for two ranks is the same set as over the joined batch). Not equal, only the
same on every rank: anything that draws random numbers per token (stochastic and Gumbel
assignment, DiVeQ's noise, quantizer dropout, latent perturbation).
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from quantizers.conftest import NAMES, build, total_loss
from vistok.core.leaving import ends_with
from vistok.core.ranks import rank, world_size
from vistok.quantizers.multi_scale_vq import MultiScale

pytestmark = pytest.mark.ranks

STEPS, BATCH, TOKENS, DIM = 20, 4, 16, 32
VARIANTS = {
    "ema_vq": {},
    "ema_vq+euclidean": {"metric": "euclidean"},
    "vq": {},
    "vq+euclidean": {"metric": "euclidean"},
    "vq_clustering": {},
    "vq_rotation": {},
    "vq_synchronous": {},
    "vq_entropy": {"entropy_temperature": 0.5},
    "ibq": {"entropy_temperature": 0.5},
    "simvq": {},
    "lfq": {"temperature": 1.0},  # 0.01 makes training chaotic: the last digit soon decides
    "bsq": {},
    "residual_vq": {},
}


def make(variant):
    """Built before the process group exists, as a trainer does."""
    torch.manual_seed(0)
    quantizer = build(variant.split("+")[0], codebook_size=64, **VARIANTS.get(variant, {}))
    for module in quantizer.modules():
        if hasattr(module, "dead_code_threshold"):
            module.dead_code_threshold = 0.3
        if hasattr(module, "threshold") and hasattr(module, "revive"):
            module.threshold = 0.3
            module.decay = 0.9
    return quantizer


def batches(quantizer):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        z = torch.randn(BATCH, TOKENS, DIM, generator=generator)
        mask = torch.rand(BATCH, TOKENS, generator=generator) < 0.8
        if isinstance(quantizer, MultiScale):
            mask = mask[:, :1].expand(BATCH, TOKENS)
        yield z, mask


def run(quantizer):
    """Train on this rank's share; gradients are averaged over ranks as DDP does."""
    torch.set_num_threads(1)
    quantizer.train()
    params = list(quantizer.parameters())
    optimizers = [torch.optim.SGD(params, 0.05)] if params else []
    revived = 0.0
    for number, (z, mask) in enumerate(batches(quantizer)):
        share = slice(rank() * BATCH // world_size(), (rank() + 1) * BATCH // world_size())
        torch.manual_seed(number)
        output = quantizer(z[share], mask[share] if number % 2 else None)
        loss = total_loss(quantizer, output) + 0.1 * output.quantized.square().mean()
        for param in params:
            param.grad = None
        if loss.requires_grad:
            loss.backward()
        for param in params:
            if world_size() > 1:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
                dist.all_reduce(param.grad)
                param.grad /= world_size()
        for optimizer in optimizers:
            optimizer.step()
        scalars = quantizer.after_step(optimizers)
        revived += float(scalars.get("dead_codes_revived", 0.0))
    return {
        "state": quantizer.state_dict(),
        "usage": torch.cat(quantizer.usage.histograms()),
        "revived": revived,
    }


def worker(process, init, variants, folder):
    quantizers = {variant: make(variant) for variant in variants}
    dist.init_process_group("gloo", f"file://{init}", rank=process, world_size=2)
    results = {variant: run(quantizer) for variant, quantizer in quantizers.items()}
    torch.save(results, f"{folder}/{process}.pt")
    ends_with(0)


ALL = [*VARIANTS, *(name for name in NAMES if name not in VARIANTS)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All variants in one pair of processes: starting them is what takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder / "init"), ALL, str(folder)), nprocs=2)
    return [torch.load(folder / f"{process}.pt") for process in range(2)]


def assert_same_on_both_ranks(first, second):
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
        assert value.isfinite().all()
    assert torch.equal(first["usage"], second["usage"]) and first["usage"].sum() > 0


@pytest.mark.parametrize("variant", ALL)
def test_both_ranks_hold_the_same_codebook(results, variant):
    assert_same_on_both_ranks(*(result[variant] for result in results))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_one_process_on_the_joined_batch(results, variant):
    joined, ranks = run(make(variant)), results[0][variant]
    for key, value in joined["state"].items():
        if key == "step" or not value.is_floating_point():
            continue
        torch.testing.assert_close(ranks["state"][key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert torch.equal(ranks["usage"], joined["usage"])
    if variant in ("ema_vq", "vq", "ema_vq+euclidean"):
        assert joined["revived"] == ranks["revived"] > 0


def test_one_rank_alone_would_differ():
    """The comparison above sees a missing all-reduce: half the batch gives another codebook."""
    quantizer = make("ema_vq")
    half = copy.deepcopy(quantizer)
    run(quantizer)
    torch.manual_seed(0)
    for z, _ in batches(half):
        half(z[: BATCH // 2])
        half.after_step()
    assert not torch.allclose(quantizer.embedding, half.embedding, atol=1e-2)
