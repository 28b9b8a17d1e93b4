"""Flexible length: the law of the lengths, what is dropped, and what keeps the numbers."""

import math
from collections import Counter

import pytest
import torch

from helpers import awake, images_of, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.models.flexible import prefix_mask
from vistok.models.length import LengthPolicy, LevelPolicy
from vistok.models.preprocessing import to_unit_range

FLEXIBLE = ["one_d_piece_tiny", "flextok_tiny", "retok_tiny", "restok_tiny"]
flexible = pytest.mark.parametrize("name", FLEXIBLE)


# ---------------------------------------------------------------------- the law of the lengths


def law(distribution, n):
    """P(k) for k of 1..n, by enumeration of the definitions."""
    p = [0.0] * (n + 1)
    if distribution == "uniform":
        for k in range(1, n + 1):
            p[k] += 1 / n
    elif distribution == "powers_of_two":
        levels = sorted({min(2**i, n) for i in range(20)})
        for k in levels:
            p[k] += 1 / len(levels)
    elif distribution == "full":
        p[n] = 1.0
    else:  # a uniform draw, rounded up
        for k in range(1, n + 1):
            p[min(2 ** math.ceil(math.log2(k)), n)] += 1 / n
    return torch.tensor(p[1:], dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 8, 12, 256])
@pytest.mark.parametrize("distribution", ["uniform", "powers_of_two", "rounded_up", "full"])
def test_lengths_follow_their_definition(distribution, n):
    """Chi-square at 5 standard deviations of its statistic, about 1e-6."""
    torch.manual_seed(1)
    draws = 40 * 256
    lengths = LengthPolicy(distribution, "sample")(draws, n)
    counts = torch.bincount(lengths, minlength=n + 1)[1:].double()
    expected = law(distribution, n) * draws
    assert len(counts) == n and (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi2 = ((counts - expected)[possible].square() / expected[possible]).sum()
    freedom = int(possible.sum()) - 1
    assert chi2 <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9, (chi2, freedom)


def test_the_chi_square_tells_the_laws_apart():
    n, draws = 256, 40 * 256
    lengths = LengthPolicy("powers_of_two")(draws, n)
    counts = torch.bincount(lengths, minlength=n + 1)[1:].double()
    for other in ("uniform", "rounded_up"):
        expected = law(other, n) * draws
        chi2 = ((counts - expected).square() / expected.clamp(min=1e-3)).sum()
        assert chi2 > 1000, other


def test_the_rounded_law_of_the_reference():
    """Of 256: 1/2, 1/4, 1/8 ... 2/256 for 4, and 1/256 each for 2 and 1."""
    p = law("rounded_up", 256)
    assert [p[k - 1].item() * 256 for k in (256, 128, 64, 4, 2, 1)] == [128, 64, 32, 2, 1, 1]


def test_one_length_per_batch_or_per_sample():
    torch.manual_seed(0)
    assert len(LengthPolicy("uniform", "batch")(50, 64).unique()) == 1
    assert len(LengthPolicy("uniform", "sample")(50, 64).unique()) > 20
    firsts = {int(LengthPolicy("uniform", "batch")(3, 64)[0]) for _ in range(50)}
    assert len(firsts) > 20


def test_a_batch_of_one_image_has_a_length_too():
    tok = tiny_tokenizer("tokenizer.length.per=batch", tokenizer="one_d_piece_tiny").train()
    shapes = {tok(images_of(1) / 127.5 - 1).quantizer.indices.shape for _ in range(3)}
    assert shapes == {(1, tok.num_tokens, 1)}


def test_lengths_come_from_torchs_generator():
    """What a resumed run restores."""
    policy = LengthPolicy("rounded_up")
    torch.manual_seed(5)
    policy(7, 64)
    state = torch.get_rng_state()
    expected = policy(100, 64)
    torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(policy(100, 64), expected)


@pytest.mark.parametrize("n", [1, 6, 8])
@pytest.mark.parametrize(
    "policy",
    [
        *map(LengthPolicy, ("uniform", "powers_of_two", "rounded_up", "full")),
        *map(LevelPolicy, (1, 2, 2, 4), (0.8, 0.5, 1.0, 0.0)),
    ],
    ids=lambda p: getattr(p, "distribution", "levels"),
)
def test_budgets_are_lengths_that_are_drawn_or_lie_between(policy, n):
    if getattr(policy, "shortest", 1) > n:
        with pytest.raises(
            ConfigError, match=rf"length\.shortest={policy.shortest}: .* {n}, the whole"
        ):
            policy.budgets(n)
        return
    torch.manual_seed(0)
    drawn = policy(4000, n).unique().tolist()
    between = getattr(policy, "distribution", "") in ("powers_of_two", "rounded_up")
    assert policy.budgets(n) == (list(range(1, n + 1)) if between else drawn)


@pytest.mark.parametrize(
    ("official", "ours"), [("pow2", "powers_of_two"), ("uniform_pow2", "rounded_up")]
)
def test_names_of_the_released_flextok_lead_to_ours(official, ours):
    with pytest.raises(ConfigError, match=rf"={official}: must be one .*did you mean '{ours}'"):
        LengthPolicy(official)


def test_unknown_policies_are_refused():
    with pytest.raises(ConfigError, match=r"^distribution=uniforn.*did you mean 'uniform'"):
        LengthPolicy("uniforn")
    with pytest.raises(ConfigError, match=r"^per=image"):
        LengthPolicy("uniform", "image")


# ---------------------------------------------------------------------- tail token drop


def spied(tok, monkeypatch):
    """What the decoder was given: a list of (quantized, mask)."""
    seen = []
    forward = tok.decoder.forward

    def spy(quantized, images, mask=None, **more):
        seen.append((quantized, mask))
        return forward(quantized, images, mask, **more)

    monkeypatch.setattr(tok.decoder, "forward", spy)
    return seen


def test_tail_token_drop_truncates_once_per_forward(monkeypatch):
    tok = tiny_tokenizer(tokenizer="one_d_piece_tiny").train()
    seen = spied(tok, monkeypatch)
    images = tok.to_model_range(images_of(6))
    for _ in range(40):
        output = tok(images)
        quantized, mask = seen[-1]
        kept = quantized.shape[1]
        assert mask is None  # nothing stands in for the tail
        assert torch.equal(quantized, output.quantizer.quantized[:, :kept])
        assert torch.equal(output.mask, prefix_mask(torch.full((6,), kept), 4))
    assert {quantized.shape[1] for quantized, _ in seen} == {1, 2, 3, 4}
    tok.eval()
    tok(images)
    assert seen[-1][0].shape[1] == 4 and seen[-1][1] is None


@pytest.mark.parametrize(
    ("name", "words"),
    [("one_d_piece_tiny", []), ("restok_tiny", ["tokenizer.length.full_probability=0"])],
)
def test_quantizer_losses_and_statistics_see_all_tokens(name, words):
    """Whether the decoder gets a cut code or a mask for each image."""
    tok = tiny_tokenizer(*words, tokenizer=name).train()
    images = tok.to_model_range(images_of(6))
    tok(images)  # starts the codebook
    for _ in range(5):
        tok.quantizer.usage.reset()
        output = tok(images)
        assert int(tok.quantizer.usage.histograms()[0].sum()) == 6 * 4
        latents = tok.quantizer.project_in(tok.encode(images))
        codes = tok.quantizer._lookup(output.quantizer.indices)
        expected = (latents - codes).square().mean()
        assert torch.allclose(output.quantizer.losses["commitment"], expected, rtol=1e-4)


def test_dropped_tokens_get_no_gradient_from_the_picture():
    tok = tiny_tokenizer(tokenizer="one_d_piece_tiny").train()
    quantized = torch.randn(2, 4, 16, requires_grad=True)
    images = tok.to_model_range(images_of(2))
    said = tok.decoder(quantized[:, :2], images)["image"]
    (said.value - said.target).square().mean().backward()
    assert (quantized.grad[:, :2] != 0).any() and (quantized.grad[:, 2:] == 0).all()


def test_a_mask_gives_the_numbers_of_truncation(monkeypatch):
    """Check the branch that torch.compile traces: static shapes, so it masks and never truncates."""
    tok = tiny_tokenizer(tokenizer="one_d_piece_tiny").train()
    seen = spied(tok, monkeypatch)
    images = tok.to_model_range(images_of(3))
    tok(images)  # starts the codebook, which draws numbers too
    for seed in range(6):
        torch.manual_seed(seed)
        cut = tok(images)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            torch.manual_seed(seed)
            masked = tok(images)
        assert torch.equal(cut.mask, masked.mask)
        quantized, mask = seen[-1]  # all tokens, whatever the length: one shape for all steps
        assert quantized.shape[1] == 4 and torch.equal(mask, masked.mask)
        assert torch.allclose(
            cut.predictions["image"].value, masked.predictions["image"].value, atol=1e-5
        )


def test_lengths_per_sample_mask_each_image():
    tok = tiny_tokenizer("tokenizer.length.per=sample", tokenizer="one_d_piece_tiny").train()
    output = tok(tok.to_model_range(images_of(32)))
    lengths = output.mask.sum(dim=1)
    assert len(lengths.unique()) > 1
    assert torch.equal(output.mask, prefix_mask(lengths, 4))


# ---------------------------------------------------------------------- whole runs


def test_eval_forward_uses_all_tokens():
    tok = tiny_tokenizer(tokenizer="one_d_piece_tiny")
    images = images_of(3)
    with torch.no_grad():
        output = tok(tok.to_model_range(images))
    assert output.mask is None
    rec = tok.detokenize(tok.tokenize(images))
    assert torch.allclose(to_unit_range(output.predictions["image"].value), rec, atol=1e-6)


@pytest.mark.slow
@flexible
def test_an_interrupted_run_draws_the_lengths_of_a_whole_one(name, photos, tmp_path, monkeypatch):
    import vistok
    from helpers import SIZES, TINY
    from vistok.cli import train

    monkeypatch.chdir(tmp_path)
    words = [w for w in TINY if not w.startswith(("quantizer.", "trainer.max_steps", "tokenizer."))]
    words += SIZES[name]
    words = [f"experiment={name}", *words, "data=folder", f"data.train={photos}"]
    words += ["data.val_fraction=0.2", "data.image_size=16", "optimizer.total_samples=100"]
    if name != "flextok_tiny":
        words += ["quantizer.codebook_size=16"]
    assert train([*words, "trainer.max_steps=8", "hydra.run.dir=whole"]) == 0
    assert train([*words, "trainer.max_steps=3", "hydra.run.dir=parts"]) == 0
    assert train(["resume=parts", "trainer.max_steps=8"]) == 0
    whole, parts = (
        vistok.load(f"{run}/checkpoints/last.ckpt", weights="last").state_dict()
        for run in ("whole", "parts")
    )
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key


# ---------------------------------------------------------------------- options that keep numbers


@pytest.mark.parametrize(
    "name",
    [
        "one_d_piece_tiny",
        pytest.param("flextok_tiny", marks=pytest.mark.slow),
        pytest.param("gigatok_tiny", marks=pytest.mark.slow),
        pytest.param("hita_tiny", marks=pytest.mark.slow),
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in ("restok_tiny", "retok_tiny", "ta_titok_tiny")
        ),
    ],
)
def test_compiling_keeps_the_numbers(name, monkeypatch):
    """The graph that torch.compile takes, run without code generation, against eager."""
    torch._dynamo.reset()
    tok = tiny_tokenizer("quantizer.kmeans_init=false", tokenizer=name).train()
    awake(tok.decoder)
    images = tok.to_model_range(images_of(4))
    compiled = torch.compile(tok.forward, backend="aot_eager")
    for seed in range(3):
        torch.manual_seed(seed)
        ours = compiled(images)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            torch.manual_seed(seed)
            eager = tok(images)
        if name in FLEXIBLE:
            assert torch.equal(ours.mask, eager.mask)
        assert torch.allclose(
            ours.predictions["image"].value, eager.predictions["image"].value, atol=1e-4
        )
    torch._dynamo.reset()


@flexible
def test_activation_checkpointing_keeps_the_gradients(name):
    """And each block is computed once more in the backward pass: else there is nothing to see."""
    results, computed = [], []
    for flag in ("false", "true"):
        options = [f"tokenizer.{part}.activation_checkpointing={flag}" for part in ("encoder", "decoder")]  # fmt: skip
        tok = tiny_tokenizer(*options, tokenizer=name).train()
        awake(tok)
        calls = Counter()
        for part, module in tok.named_modules():
            if part.rpartition(".")[0].endswith("blocks"):
                module.register_forward_pre_hook(lambda m, i, c=calls, part=part: c.update([part]))
        torch.manual_seed(1)
        output = tok(tok.to_model_range(images_of(4)))
        (
            output.predictions["image"].value - output.predictions["image"].target
        ).square().mean().backward()
        results.append([p.grad for p in tok.parameters()])
        computed.append(calls)
    assert {part.split(".")[0] for part in computed[0]} == {"encoder", "decoder"}
    assert computed[1] == {part: 2 * count for part, count in computed[0].items()}
    assert sum(g is not None and bool(g.any()) for g in results[0]) > 20
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-7)
