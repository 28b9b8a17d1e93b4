"""Priors: their distributions against sums over all ids, their samples against these."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vistok.core.errors import ArgumentError, CheckpointError, ConfigError, DataError
from vistok.core.sample_random import chances, drawing
from vistok.nn.attention import attend
from vistok.nn.norms import RMSNorm
from vistok.priors.gpt import GPT
from vistok.priors.layout import Layout, parents
from vistok.priors.llamagen_weights import gpt_from_llamagen
from vistok.priors.maskgit import MaskGITPrior, masked_share, remask
from vistok.priors.sampling import Sampling, draw, filtered, guided, probabilities

SCALES = ((1, 1), (1, 2), (2, 2))
LEVELS = ((1, 1), (1, 1), (1, 2))

#: Layout and options of each kind of GPT; few enough codes to list all images.
KINDS = {
    "line": (Layout((3,), 4, num_classes=2), {}),
    "grid": (Layout((3,), 4, (2, 2), num_classes=2), {}),
    "caption": (Layout((3,), 4, (2, 2), captions=True), {"condition": "caption", "caption_bytes": 5}),
    "none": (Layout((3,), 4, (2, 2)), {"condition": "none"}),
    "heads": (Layout((3, 2), 3, num_classes=2), {}),
    "chained": (Layout((3, 2), 3, num_classes=2), {"streams": "chained"}),
    "flattened": (Layout((3, 2), 4, (2, 2), num_classes=2), {"streams": "flattened"}),
    "scales": (Layout((2,), 7, None, SCALES, num_classes=2), {"predict": "blocks"}),
    "scales of streams": (
        Layout((2, 2), 3, None, SCALES[:2], num_classes=2),
        {"predict": "blocks", "streams": "chained"},
    ),
    "levels": (Layout((3,), 4, num_classes=2), {"predict": "blocks", "levels": [1, 1, 2]}),
    "captioned levels": (
        Layout((3,), 4, captions=True),
        {"predict": "blocks", "levels": [1, 1, 2], "condition": "caption", "caption_bytes": 3},
    ),
    "lengths": (Layout((3,), 4, num_classes=2, variable=True), {}),
    "lengths of streams": (
        Layout((2, 3), 3, num_classes=2, variable=True),
        {"streams": "chained"},
    ),
    "flattened lengths": (
        Layout((2, 2), 3, num_classes=2, variable=True),
        {"streams": "flattened"},
    ),
}  # fmt: skip


def awake(prior, scale=0.4):
    """Weights under which everything matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in prior.parameters():
            p.copy_(torch.randn_like(p) * scale + (p.ndim == 1))
    return prior.eval()


def gpt(kind):
    layout, options = KINDS[kind]
    return awake(GPT(layout, 16, 2, 2, multiple=8, **options))


def condition_of(prior, count, number=0):
    given = {"label": number, "caption": "ab", "none": None}[prior.told.kind]
    return prior.condition([given] * count)


def all_images(layout):
    """Ids `(M, N, Q)` and lengths of all images that there are."""
    tokens = list(itertools.product(*map(range, layout.sizes)))
    ids, lengths = [], []
    for length in range(0 if layout.variable else layout.num_tokens, layout.num_tokens + 1):
        for image in itertools.product(tokens, repeat=length):
            padded = [*image, *[(0,) * layout.num_streams] * (layout.num_tokens - length)]
            ids.append(padded)
            lengths.append(length)
    return torch.tensor(ids), torch.tensor(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_the_probabilities_of_all_images_add_up_to_one(kind):
    prior = gpt(kind)
    ids, lengths = all_images(prior.layout)
    with torch.no_grad():
        found = prior(ids, lengths, condition_of(prior, len(ids)))
    assert found.nll.shape == ids.shape
    total = (-found.nll.double().sum(dim=(1, 2))).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5)
    assert (found.nll[~found.counted] == 0).all()
    if not prior.layout.variable:
        assert found.counted.all()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_distributed_as_the_likelihood_says(kind):
    """Chi-square over all images that there are; without a cache they are the same ones."""
    prior = gpt(kind)
    ids, lengths = all_images(prior.layout)
    with torch.no_grad():
        found = prior(ids, lengths, condition_of(prior, len(ids), 1))
        expected = (-found.nll.double().sum(dim=(1, 2))).exp().numpy()
    count = 3000
    drawn = prior.generate(condition_of(prior, count, 1), Sampling(seed=7))
    padded = F.pad(drawn.ids, (0, 0, 0, prior.layout.num_tokens - drawn.ids.shape[1]))
    number = {
        (tuple(row.flatten().tolist()), n): i
        for i, (row, n) in enumerate(zip(ids, lengths.tolist(), strict=True))
    }
    rows = [
        number[tuple(row.flatten().tolist()), n]
        for row, n in zip(padded, drawn.lengths.tolist(), strict=True)
    ]
    assert_distributed(np.bincount(rows, minlength=len(expected)), expected)


def assert_distributed(counts, expected):
    """Pearson's chi-square, with rare outcomes as one, at 5 deviations."""
    total = counts.sum()
    rare = expected * total < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum()) * total
    kept = wanted > 1
    square = ((observed[kept] - wanted[kept]) ** 2 / wanted[kept]).sum()
    freedom = kept.sum() - 1
    assert freedom >= 1 and square < freedom + 5 * math.sqrt(2 * freedom) + 5, (square, freedom)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_nothing(kind):
    prior = gpt(kind)
    condition = prior.condition(
        ["ab", "c", None]
        if prior.told.kind == "caption"
        else [0, 1, -1]
        if prior.told.kind == "label"
        else [None] * 3
    )
    for sampling in (Sampling(), Sampling(0.8, 2, 0.9, 2.5, seed=3), Sampling(temperature=0)):
        cached = prior.generate(condition, sampling)
        whole = prior.generate(condition, sampling, cached=False)
        assert torch.equal(cached.ids, whole.ids) and torch.equal(cached.lengths, whole.lengths)
        alone = prior.generate(condition[1:2], sampling, first=1)
        length = min(alone.ids.shape[1], cached.ids.shape[1])
        assert torch.equal(alone.ids[:, :length], cached.ids[1:2, :length])
        assert alone.lengths[0] == cached.lengths[1]


@pytest.mark.parametrize("kind", [k for k, (layout, _) in KINDS.items() if not layout.variable])
def test_no_id_is_predicted_from_itself_or_what_comes_later(kind):
    """By gradient, from each id to the embedding of each place."""
    prior = gpt(kind)
    layout = prior.layout
    torch.manual_seed(0)
    ids = torch.stack(
        [torch.randint(size, (1, layout.num_tokens)) for size in layout.sizes], dim=-1
    )
    block = list(range(layout.num_tokens))
    if prior.places is not None:
        block = [i for i, count in enumerate(layout.counts) for _ in range(count)]
    inputs, embed = [], prior.embed

    class Watched(torch.nn.Module):
        weight, num_embeddings = embed.weight, embed.num_embeddings

        def forward(self, indices):
            inputs.append(embed(indices).detach().requires_grad_())
            return inputs[-1]

    prior.embed = Watched()
    prior.chain = None if prior.chain is None else prior.chain
    nll = prior(ids, None, condition_of(prior, 1)).nll
    reached = 0
    for place, stream in itertools.product(range(layout.num_tokens), range(layout.num_streams)):
        gradient = torch.autograd.grad(nll[0, place, stream], inputs[0], retain_graph=True)[0]
        moved = (
            gradient.flatten(2).abs().sum(-1).flatten()
            if gradient.ndim == 3
            else gradient.abs().sum(-1).sum(-1).flatten()
        )
        for other, amount in enumerate(moved.tolist()):
            token = other // prior.per_place
            before = block[token] < block[place]
            if prior.per_place > 1:
                before = other < place * prior.per_place + stream
            if before:
                reached += amount > 0
            else:
                assert amount == 0, (place, stream, other)
    assert reached >= layout.num_tokens - 1


def test_a_chained_head_sees_the_streams_before_its_own_alone():
    prior = gpt("chained")
    ids = torch.zeros(2, 3, 2, dtype=torch.long)
    ids[1, 2, 0] = 1
    with torch.no_grad():
        nll = prior(ids, None, condition_of(prior, 2)).nll
    assert nll[0, 2, 1] != nll[1, 2, 1] and torch.equal(nll[0, :2], nll[1, :2])
    ids[1, 2] = torch.tensor([0, 1])
    with torch.no_grad():
        nll = prior(ids, None, condition_of(prior, 2)).nll
    assert nll[0, 2, 0] == nll[1, 2, 0]


def test_what_is_behind_an_image_does_not_matter():
    prior = gpt("lengths of streams")
    ids = torch.zeros(1, 3, 2, dtype=torch.long)
    other = ids.clone()
    other[0, 1:] = 1
    lengths = torch.tensor([1])
    with torch.no_grad():
        a, b = (prior(each, lengths, condition_of(prior, 1)) for each in (ids, other))
    assert torch.equal(a.nll, b.nll) and a.counted.sum() == 3  # a token of two ids, and the end


@pytest.mark.parametrize("blocks", [SCALES, LEVELS, ((1, 1), (2, 2), (3, 3), (5, 4))])
def test_a_token_is_predicted_from_the_one_above_it(blocks):
    found, start, flat = parents(blocks), 0, 0
    for level, (rows, columns) in enumerate(blocks):
        for row, column in itertools.product(range(rows), range(columns)):
            if level == 0:
                assert found[flat] == -1
            else:
                up, across = blocks[level - 1]
                assert (
                    found[flat] == start + (row * up // rows) * across + column * across // columns
                )
            flat += 1
        start += math.prod(blocks[level - 1]) if level else 0


def test_conditions_and_their_dropout():
    prior = gpt("grid")
    ids = torch.zeros(2, 4, 1, dtype=torch.long)
    nll = [prior(ids[:1], None, prior.condition([c])).nll for c in (0, 1, -1)]
    assert not torch.equal(nll[0], nll[1]) and not torch.equal(nll[0], nll[2])
    prior.condition_dropout = 1.0
    prior.train()
    prior.transformer.blocks[0].dropout = prior.transformer.blocks[1].dropout = 0.0
    prior.token_dropout = 0.0
    for label in (0, 1):
        torch.testing.assert_close(prior(ids[:1], None, prior.condition([label])).nll, nll[2])
    with pytest.raises(ConfigError, match="label 2: the prior knows 0 to 1"):
        prior.condition([2])
    captioned = gpt("caption")
    rows = captioned.condition(["ä", "abcdefg", None])
    assert rows.tolist() == [[195, 164, 256, 256, 256], [97, 98, 99, 100, 101], [-1] * 5]
    with pytest.raises(DataError, match="expected text"):
        captioned.condition([3])


def test_misfits_are_refused():
    plain = Layout((3,), 4)
    for layout, options, message in (
        (plain, {}, "condition=label: the token folder has no labels"),
        (plain, {"condition": "caption"}, "condition=caption: the token folder has no captions"),
        (
            plain,
            {"condition": "none", "predict": "blocks"},
            "predict=blocks: the tokens have no sc",
        ),
        (
            plain,
            {"condition": "none", "predict": "blocks", "levels": [1, 2]},
            "levels=.1, 2.: must",
        ),
        (KINDS["lengths"][0], {"predict": "blocks", "levels": [1, 3]}, "images have different l"),
        (KINDS["grid"][0], {"num_heads": 3}, "num_heads=3 does not divide the width 16"),
    ):
        with pytest.raises(ArgumentError, match=message):
            GPT(layout, **{"width": 16, "depth": 1, "num_heads": 2, **options})
    with pytest.raises(ArgumentError, match="different lengths"):
        MaskGITPrior(KINDS["lengths"][0], 16, 1, 2)
    with pytest.raises(ConfigError, match=r"layout\.grid"):
        Layout((3,), 4, (2, 3))
    with pytest.raises(DataError, match="stream 1 holds the id 2; valid are 0 to 1"):
        KINDS["heads"][0].check(torch.full((1, 3, 2), 2), "x")


# ---------------------------------------------------------------------- sampling


def test_top_k_and_top_p_against_brute_force():
    torch.manual_seed(0)
    for _ in range(60):
        logits = (torch.randn(9) * 2).round(decimals=1)
        k, p = int(torch.randint(0, 10, ())), float(torch.rand(()).clamp(max=0.98))
        kept = filtered(logits, k, p).isfinite()
        order = sorted(range(9), key=lambda i: (-logits[i], i))
        allowed = (
            set(range(9)) if not k else {i for i in order if logits[i] >= logits[order[k - 1]]}
        )
        weights = {i: math.exp(logits[i]) for i in allowed}
        mass, wanted = 0.0, set()
        for i in (i for i in order if i in allowed):
            if wanted and mass >= p - 1e-7:
                break
            wanted.add(i)
            mass += weights[i] / sum(weights.values())
        assert set(kept.nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.5), Sampling(top_k=3), Sampling(top_p=0.7), Sampling(2.0, 5, 0.9)],
)
def test_draws_have_the_probabilities_of_the_closed_form(sampling):
    logits = torch.tensor([0.3, -1.0, 2.0, 1.0, 0.0, -3.0])
    count = 20_000
    with drawing(5, torch.arange(count), 0):
        from vistok.core.sample_random import uniform

        numbers = uniform((count,))
    drawn = draw(logits.expand(count, -1), numbers, sampling)
    weights = np.exp(logits.double().numpy() / sampling.temperature)
    order = np.argsort(-weights)
    if sampling.top_k:
        weights[order[sampling.top_k :]] = 0
    shares = weights / weights.sum()
    behind = np.cumsum(shares[order]) - shares[order]
    shares[order[behind >= sampling.top_p]] = 0
    shares /= shares.sum()
    counts = np.bincount(drawn.numpy(), minlength=6)
    assert not counts[shares == 0].any()
    assert_distributed(counts, shares)
    torch.testing.assert_close(probabilities(logits, sampling), torch.from_numpy(shares))


def test_guidance_and_temperature_zero():
    cond, uncond = torch.randn(2, 5), torch.randn(2, 5)
    found = guided(torch.cat([cond, uncond]), 3.0)
    torch.testing.assert_close(found, 3 * cond - 2 * uncond)
    assert torch.equal(guided(cond, 1), cond)
    assert torch.equal(draw(cond, torch.rand(2), Sampling(temperature=0)), cond.argmax(-1))
    with pytest.raises(ArgumentError, match=r"top_p=1\.5: must be"):
        Sampling(top_p=1.5)


def test_a_stream_shows_every_step():
    prior = gpt("scales")
    steps = list(prior.stream(condition_of(prior, 2), Sampling()))
    assert [s.ids.shape[1] for s in steps] == [1, 3, 7]
    for step in steps:
        assert torch.equal(step.ids, steps[-1].ids[:, : step.ids.shape[1]])


# ---------------------------------------------------------------------- MaskGIT


def maskgit(layout, **options):
    return awake(MaskGITPrior(layout, 16, 2, 2, multiple=8, **options))


def test_the_bound_of_one_token_is_its_likelihood():
    prior = maskgit(Layout((3, 2), 1, num_classes=2))
    ids, _ = all_images(prior.layout)
    with torch.no_grad():
        found = prior(ids, None, condition_of(prior, len(ids)))
    assert (-found.nll.double().sum(dim=(1, 2))).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert found.counted.all()


def test_the_bound_is_that_of_any_order():
    """Its mean over the draws is that of N/n times the loss of n masked tokens, over all masks."""
    prior = maskgit(Layout((3,), 3, num_classes=2))
    ids = torch.tensor([[[0], [2], [1]]])
    condition = condition_of(prior, 1)
    exact = 0.0
    for n in (1, 2, 3):
        losses = []
        for masked in itertools.combinations(range(3), n):
            mask = torch.zeros(1, 3, dtype=torch.bool)
            mask[0, list(masked)] = True
            logits = prior.logits(ids, mask, condition)[0]
            nll = F.cross_entropy(logits[0], ids[0, :, 0], reduction="none")
            losses.append(nll[mask[0]].sum().item() * 3 / n)
        exact += sum(losses) / len(losses) / 3
    count = 4000
    torch.manual_seed(0)
    with torch.no_grad():
        found = prior(ids.expand(count, -1, -1), None, condition.expand(count))
    values = found.nll.double().sum(dim=(1, 2))
    assert values.mean().item() == pytest.approx(exact, abs=5 * values.std().item() / count**0.5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "square", "cubic", "sqrt", "arccos"])
def test_schedules_fall_from_one_to_zero(schedule):
    r = torch.linspace(0, 1, 50)
    share = masked_share(schedule, r)
    assert share[0] == 1 and share[-1].abs() < 1e-12 and (share.diff() <= 0).all()
    if schedule == "cosine":
        assert masked_share(schedule, torch.tensor(1 / 3)).item() == pytest.approx(
            math.cos(math.pi / 6)
        )


def test_the_least_sure_tokens_are_masked_again():
    torch.manual_seed(0)
    for progress in (0.1, 0.4, 0.9, 1.0):
        confidence = torch.randn(5, 12).double()
        confidence[:, :4] = math.inf
        found = remask(confidence, "cosine", progress)
        wanted = int(math.cos(progress * math.pi / 2) * 12)
        many = 0 if progress == 1 else max(1, min(wanted, 7))
        for row, mask in zip(confidence, found, strict=True):
            assert mask.sum() == many
            assert set(mask.nonzero().flatten().tolist()) == set(row.argsort()[:many].tolist())


def test_maskgit_settles_what_it_has_drawn():
    prior = maskgit(Layout((5, 4), 9, (3, 3), num_classes=2))
    condition = condition_of(prior, 3)
    sampling = Sampling(steps=5, guidance=2.0)
    steps = list(prior.stream(condition, sampling))
    assert len(steps) == 5 and steps[-1].ids.shape == (3, 9, 2)
    prior.layout.check(steps[-1].ids, "x")
    kept = [(a.ids == b.ids).all(-1).sum().item() for a, b in itertools.pairwise(steps)]
    assert kept[-1] > kept[0]
    alone = prior.generate(condition[2:], sampling, first=2)
    assert torch.equal(alone.ids, steps[-1].ids[2:])


def test_maskgit_in_one_pass_draws_what_it_says():
    prior = maskgit(Layout((4,), 2, num_classes=2))
    count = 5000
    drawn = prior.generate(condition_of(prior, count), Sampling(steps=1)).ids[..., 0]
    with torch.no_grad():
        masked = torch.ones(1, 2, dtype=torch.bool)
        logits = prior.logits(
            torch.zeros(1, 2, 1, dtype=torch.long), masked, condition_of(prior, 1)
        )
    for place in range(2):
        shares = logits[0][0, place].double().softmax(-1).numpy()
        assert_distributed(np.bincount(drawn[:, place].numpy(), minlength=4), shares)


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    "kind", ["grid", "chained", "flattened", "scales", "levels", "lengths", "maskgit"]
)
def test_priors_learn(kind):
    torch.manual_seed(0)
    if kind == "maskgit":
        prior = MaskGITPrior(
            Layout((3,), 4, (2, 2), num_classes=2),
            16,
            2,
            2,
            multiple=8,
            dropout=0.0,
            token_dropout=0.0,
            label_smoothing=0.0,
        )
    else:
        layout, options = KINDS[kind]
        prior = GPT(layout, 16, 2, 2, multiple=8, dropout=0.0, token_dropout=0.0, **options)
    layout = prior.layout
    ids = torch.zeros(2, layout.num_tokens, layout.num_streams, dtype=torch.long)
    ids[1] = 1
    lengths = torch.tensor([layout.num_tokens, 2]) if layout.variable else None
    condition = prior.condition([0, 1])
    optimizer = torch.optim.AdamW(prior.parameters(), 1e-2)
    for _ in range(80):
        found = prior(ids, lengths, condition)
        optimizer.zero_grad()
        (found.nll.sum() / found.counted.sum()).backward()
        optimizer.step()
    drawn = prior.eval().generate(condition, Sampling(temperature=0, steps=3))
    if lengths is not None:
        assert drawn.lengths.tolist() == lengths.tolist()
        assert (drawn.ids[0] == 0).all() and (drawn.ids[1, :2] == 1).all()
    else:
        assert torch.equal(drawn.ids, ids)


# ---------------------------------------------------------------------- LlamaGen


def test_published_sizes():
    for width, depth, heads, millions in (
        (768, 12, 12, 110.888448),
        (1024, 24, 16, 342.910976),
        (1280, 36, 20, 774.69952),
        (1536, 48, 24, 1411),
    ):
        with torch.device("meta"):
            prior = GPT(Layout((16384,), 256, (16, 16), num_classes=1000), width, depth, heads)
        found = sum(p.numel() for p in prior.parameters()) / 1e6
        assert found == pytest.approx(millions, rel=0.01)


def published(width=8, heads=2, depth=2, codes=7, classes=3):
    """A state dict by LlamaGen's names, of fixed random numbers."""
    generator = torch.Generator().manual_seed(3)
    hidden = 256
    shapes = {
        "cls_embedding.embedding_table.weight": (classes + 1, width),
        "tok_embeddings.weight": (codes, width),
        "norm.weight": (width,),
        "output.weight": (codes, width),
    }
    for i in range(depth):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * width, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.feed_forward.w1.weight": (hidden, width),
            f"layers.{i}.feed_forward.w3.weight": (hidden, width),
            f"layers.{i}.feed_forward.w2.weight": (width, hidden),
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.ffn_norm.weight": (width,),
        }
    return {
        name: torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


#: What LlamaGen's own code gives for these weights, labels [0, 3] and ids 0, 1, 2, ... modulo 7:
#: the logits of code 0 at the four places of a 2 x 2 grid.
OFFICIAL = [[-0.852506, -0.484077, 0.075456, -1.015214], [0.367529, -0.383891, 0.489798, -0.541432]]


def test_the_forward_is_that_of_the_official_code():
    prior = gpt_from_llamagen(published(), (2, 2), num_heads=2)
    ids = (torch.arange(8).view(2, 4, 1)) % 7
    with torch.no_grad():
        hidden = prior.hidden(ids, torch.tensor([0, 3]))
        logits = prior.logits(prior.transformer.norm(hidden), 0)
    torch.testing.assert_close(logits[..., 0], torch.tensor(OFFICIAL), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["missing", "more", "w3", "shape"])
def test_other_weights_are_refused(change):
    state = published()
    if change == "missing":
        del state["layers.1.ffn_norm.weight"]
    elif change == "more":
        state["freqs_cis"] = torch.zeros(1)
    elif change == "w3":
        del state["layers.0.feed_forward.w3.weight"]
    else:
        state["output.weight"] = torch.zeros(3, 8)
    with pytest.raises(CheckpointError) as error:
        gpt_from_llamagen(state, (2, 2), num_heads=2)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- parts


def test_rms_norm_is_that_of_torch_with_its_gradients():
    torch.manual_seed(0)
    norm = RMSNorm(6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x, grad = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6)
    double, weight = (
        x.detach().double().requires_grad_(),
        norm.weight.detach().double().requires_grad_(),
    )
    y = norm(x)
    wanted = double * (double.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(y.double(), wanted, atol=1e-6, rtol=1e-5)
    y.backward(grad)
    wanted.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), double.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), y, atol=1e-6, rtol=1e-5)


def test_causal_attention_is_that_of_a_mask():
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, causal=True), attend(q, k, v, mask))
    half = [part.bfloat16().requires_grad_() for part in (q, k, v)]
    found = attend(*half, causal=True)
    torch.testing.assert_close(found.float(), attend(q, k, v, mask), atol=3e-2, rtol=3e-2)


def test_chances_belong_to_samples():
    with drawing(1, torch.arange(400), 0):
        whole = chances(0.3, (400, 50))
    with drawing(1, torch.arange(200, 400), 0):
        assert torch.equal(chances(0.3, (200, 50)), whole[200:])
    share = whole.float().mean().item()
    assert share == pytest.approx(0.3, abs=5 * (0.21 / whole.numel()) ** 0.5)
    assert whole.float().mean(0).std() < 0.06
    with drawing(1, torch.arange(3), 0):
        assert chances(1.0, (3, 5)).all() and not chances(0.0, (3, 5)).any()
