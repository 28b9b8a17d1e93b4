"""What every quantizer promises, checked on every config that ships."""

import copy

import pytest
import torch
from hydra.errors import InstantiationException

from quantizers.conftest import (
    DIM,
    NAMES,
    assert_same_state,
    build,
    load_config,
    state,
    total_loss,
    train,
)
from vistok.core.errors import VistokError
from vistok.quantizers.gumbel import GumbelLogits
from vistok.quantizers.multi_scale_vq import MultiScale
from vistok.quantizers.perturb import Perturb
from vistok.quantizers.product_vq import Product
from vistok.quantizers.residual_vq import ResidualVQ

everywhere = pytest.mark.parametrize("name", NAMES)
SCALES = ("image_folder", "token_flow_multi_scale", "var", "var_1024", "var_as_drawn")
#: Graphs of many books take long; those of `var` and `token_flow` have all that is in the nightly.
MARKS_OF_COMPILING = dict.fromkeys(("dual_token", "residual_vq", "unitok"), pytest.mark.slow)
MARKS_OF_COMPILING |= {
    name: pytest.mark.slow if name == "var" else pytest.mark.nightly for name in SCALES
}


def independent_books(quantizer):
    """The parts of a quantizer whose ids can be chosen freely.

    A residual or a pyramid picks each id given those before it, so that not every combination
    of ids is the code of its own vector. Its books, one search each, are held to the promise.
    """
    if isinstance(quantizer, Perturb):
        return independent_books(quantizer.inner)
    if isinstance(quantizer, Product | ResidualVQ | MultiScale):
        return [part for book in quantizer.books for part in independent_books(book)]
    return [quantizer]


def some_ids(sizes):
    """Every id of every slot at least once; 10^5 random ones where that would be too many."""
    largest = max(sizes)
    count = largest if largest <= 1 << 14 else 100_000
    columns = []
    for size in sizes:
        ids = torch.randint(size, (count,))
        if size <= count:
            ids[torch.randperm(count)[:size]] = torch.arange(size)
        columns.append(ids)
    return torch.stack(columns, dim=-1)[None]


def latents(*shape):
    return torch.randn(*shape, DIM)


@everywhere
def test_vectors_of_ids_quantize_back_to_them(name):
    for book in independent_books(build(name).eval()):
        if isinstance(book, GumbelLogits):
            continue  # logits pick its codes, whatever their vectors are
        ids = some_ids(book.codebook_sizes)
        with torch.no_grad():
            # FSQ squashes latents before it rounds them; it tells the latents of an id itself.
            vectors = book.latents_of(ids) if hasattr(book, "latents_of") else book._lookup(ids)
            assert torch.equal(book._search(vectors), ids)


@everywhere
def test_saved_ids_decode_to_the_forward_bit_for_bit(name):
    quantizer = train(build(name), [latents(4, 16)] * 2).eval()
    z = latents(3, 16)
    output = quantizer(z)
    saved = output.indices.to(torch.int32).numpy().copy()
    assert torch.equal(quantizer.decode(torch.from_numpy(saved)), output.quantized)
    assert torch.equal(quantizer.encode(z), output.indices)
    assert output.quantized.dtype == torch.float32 and output.indices.dtype == torch.int64
    assert output.quantized.shape == z.shape
    tokens = quantizer.num_index_tokens(16)
    assert output.indices.shape == (3, tokens, quantizer.num_indices)
    sizes = torch.tensor(quantizer.codebook_sizes)
    assert (output.indices >= 0).all() and (output.indices < sizes).all()


@everywhere
def test_only_scales_make_other_ids_than_one_per_token(name):
    quantizer = build(name)
    with_scales = "scales" in load_config(name)
    assert quantizer.per_token != with_scales
    lengths = {quantizer.num_index_tokens(16, grid) for grid in (None, (2, 8), (4, 4))}
    assert len(lengths) == 3 if with_scales else lengths == {16}
    assert (name in SCALES) == with_scales


@everywhere
def test_ids_on_a_grid_decode_to_the_forward_bit_for_bit(name):
    quantizer, z = train(build(name), [latents(4, 18)] * 2), latents(2, 18)
    output = quantizer.eval()(z, grid=(3, 6))
    assert torch.equal(quantizer.encode(z, (3, 6)), output.indices)
    assert torch.equal(quantizer.decode(output.indices, (3, 6)), output.quantized)
    flat = quantizer(z)
    assert torch.equal(flat.indices, output.indices) == (name not in SCALES)
    mask = torch.rand(2, 18) < 0.6
    assert quantizer.train()(z, mask, (3, 6)).indices.shape == output.indices.shape
    assert quantizer.index_mask(mask, (3, 6)).shape == output.indices.shape[:2]


@everywhere
def test_codebooks_have_the_advertised_shapes(name):
    quantizer = build(name).eval()
    tables = quantizer.codebooks()
    assert [table.shape[0] for table in tables] == list(quantizer.codebook_sizes)
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in tables)


@everywhere
def test_autocast_changes_no_id(name):
    quantizer = build(name)
    z = latents(2, 16)
    quantizer(z)  # initialises
    for mode in (True, False):
        quantizer.train(mode)
        plain, cast = [], []
        for ids, enabled in ((plain, False), (cast, True)):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                output = copy.deepcopy(quantizer)(z)
                ids += [output.indices, quantizer.encode(z)]
            assert output.quantized.dtype == torch.float32
            assert all(loss.dtype == torch.float32 for loss in output.losses.values())
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@everywhere
def test_casting_the_model_changes_no_id(name):
    """As with precision="bf16-true": the quantizer stays float32."""
    quantizer = build(name)
    z = latents(2, 16).bfloat16()
    quantizer(z)  # initialises
    plain = quantizer.eval()(z)
    for cast in (quantizer.bfloat16(), quantizer.half()):
        output = cast(z)
        assert torch.equal(output.indices, plain.indices)
        assert torch.equal(output.quantized, plain.quantized)
    moments = [value.dtype for value in quantizer.state_dict().values()]
    assert torch.bfloat16 not in moments and torch.float16 not in moments


@everywhere
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_raise_an_error_that_names_the_quantizer(name, bad):
    quantizer = build(name)
    z = latents(2, 16)
    z[1, 3, 5] = bad
    for call in (quantizer, quantizer.eval(), quantizer.encode):
        with pytest.raises(VistokError, match=type(quantizer).__name__):
            call(z)


@everywhere
def test_wrong_shapes_are_refused(name):
    quantizer = build(name)
    with pytest.raises(VistokError, match="latents"):
        quantizer(torch.randn(2, DIM))
    with pytest.raises(VistokError, match="indices"):
        quantizer.decode(torch.zeros(2, 16, quantizer.num_indices + 1, dtype=torch.long))


@everywhere
@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 25)], ids=str)
def test_small_batches_train(name, shape):
    """One token, and fewer tokens than codes."""
    quantizer = train(build(name), [latents(*shape) for _ in range(2)]).eval()
    output = quantizer(latents(*shape))
    assert output.quantized.isfinite().all()


@everywhere
def test_an_empty_batch_is_defined(name):
    quantizer = build(name)
    for mode in (True, False):
        output = quantizer.train(mode)(latents(0, 16))
        assert output.quantized.shape == (0, 16, DIM)
        assert output.indices.shape == (0, quantizer.num_index_tokens(16), quantizer.num_indices)
        assert all(loss.isfinite() for loss in output.losses.values())
    quantizer.after_step()
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@pytest.mark.parametrize("name", [name for name in NAMES if "codebook_size" in load_config(name)])
def test_two_codes_are_enough(name):
    quantizer = build(name, codebook_size=2)
    assert set(quantizer.codebook_sizes) == {2}
    train(quantizer, [latents(2, 16) for _ in range(3)]).eval()
    assert set(quantizer(latents(2, 16)).indices.unique().tolist()) <= {0, 1}
    with pytest.raises((VistokError, InstantiationException), match="codebook_size"):
        build(name, codebook_size=1)


@everywhere
def test_eval_is_deterministic_and_changes_nothing(name):
    quantizer = train(build(name), [latents(4, 16)] * 2).eval()
    before, counts = state(quantizer), quantizer.usage.counts.clone()
    z = latents(2, 16)
    first, second = quantizer(z), quantizer(z)
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.quantized, second.quantized)
    quantizer.encode(z), quantizer.decode(first.indices)
    assert_same_state(before, state(quantizer))
    assert torch.equal(counts, quantizer.usage.counts)


@everywhere
def test_masked_tokens_enter_no_loss_and_no_statistic(name):
    quantizer = build(name)
    twin = copy.deepcopy(quantizer)
    if name in SCALES:
        # Scales pool neighbours: what a token holds shows in the tokens above it. Whole images.
        mask = torch.tensor([True, True, False, True])[:, None].expand(4, 16)
    else:
        mask = torch.rand(4, 16) < 0.6
    z = latents(4, 16)
    other = torch.where(mask[..., None], z, latents(4, 16))
    results = []
    for module, inputs in ((quantizer, z), (twin, other)):
        torch.manual_seed(5)
        inputs.requires_grad_()
        output = module(inputs, mask)
        loss = total_loss(module, output)
        if loss.requires_grad:
            loss.backward()
            assert inputs.grad[~mask].abs().max() == 0
        module.after_step()
        results.append((output.losses, state(module), module.usage.counts))
    for key, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][key])
    for key, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][key])
    assert torch.equal(results[0][2], results[1][2])
    kept = quantizer.index_mask(mask).sum()
    assert 0 < quantizer.usage.counts.sum() <= kept * quantizer.num_indices


@everywhere
def test_usage_counts_every_training_token(name):
    quantizer = build(name)
    quantizer(latents(2, 16)), quantizer(latents(2, 16))
    full = 4 * quantizer.num_index_tokens(16) * quantizer.num_indices
    # Dropped scales have no index; ImageFolder drops some by default.
    expected = full if name != "image_folder" else quantizer.usage.counts.sum()
    assert quantizer.usage.counts.sum() == expected > 0
    assert all(value.isfinite() for value in quantizer.usage.compute().values())
    quantizer.usage.reset()
    assert quantizer.usage.counts.sum() == 0


@everywhere
def test_state_dict_round_trip(name):
    quantizer = train(build(name), [latents(4, 16) for _ in range(3)])
    copied = build(name)
    copied.load_state_dict(quantizer.state_dict(), strict=True)
    z = latents(2, 16)
    assert torch.equal(copied.eval()(z).quantized, quantizer.eval()(z).quantized)
    # A loaded codebook is not initialised a second time.
    assert copied.num_init_latents == quantizer.num_init_latents
    for module in (quantizer, copied):
        torch.manual_seed(3)
        train(module, [z])
    assert_same_state(quantizer.state_dict(), copied.state_dict())


@everywhere
def test_one_that_is_frozen_hands_on_gradients_and_stays(name):
    """As behind an encoder that is fine-tuned for ids that others have learned."""
    quantizer = train(build(name), [latents(4, 16)] * 2).requires_grad_(False)
    before = state(quantizer)
    for _ in range(2):
        z = latents(4, 16).requires_grad_()
        output = quantizer(z)
        (total_loss(quantizer, output) + output.quantized.square().mean()).backward()
        assert z.grad is not None and z.grad.any()
        quantizer.discard_step()
    kept = {
        key: value for key, value in before.items() if not key.endswith(("usage.counts", "steps"))
    }
    assert all(torch.equal(quantizer.state_dict()[key], value) for key, value in kept.items())
    quantizer.after_step()  # nothing has been gathered
    assert all(torch.equal(quantizer.state_dict()[key], value) for key, value in kept.items())


@everywhere
def test_gradients_reach_the_latents_and_every_loss_has_a_weight(name):
    quantizer = build(name)
    z = latents(4, 16).requires_grad_()
    output = quantizer(z)
    assert set(output.losses) <= set(quantizer.loss_weights)
    (grad,) = torch.autograd.grad((output.quantized * torch.randn(4, 16, DIM)).sum(), z)
    assert grad.isfinite().all() and (grad.abs().sum(-1) > 0).all()
    output = quantizer(z)
    loss = total_loss(quantizer, output)
    if loss.requires_grad:
        (grad,) = torch.autograd.grad(loss, z)
        assert grad.isfinite().all()
    assert all(not metric.requires_grad for metric in output.metrics.values())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS_OF_COMPILING.get(name, ())) for name in NAMES]
)
def test_compiles_without_graph_breaks(name):
    """One graph for a training forward and one for encode, with the numbers of eager mode."""
    eager = build(name)
    z = latents(4, 16)
    eager(z)  # codebooks start on the first batch
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    results = []
    for quantizer, forward in ((eager, eager), (compiled, graph)):
        torch.manual_seed(1)
        x = z.clone().requires_grad_()
        output = forward(x)
        (total_loss(quantizer, output) + output.quantized.square().mean()).backward()
        results.append((output.indices, x.grad))
    (ids, gradient), (compiled_ids, compiled_gradient) = results
    torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-3, atol=1e-6)
    eager.eval(), compiled.eval()
    encode = torch.compile(compiled.encode, fullgraph=True, backend="aot_eager")
    # Pyramids are interpolated by other formulas in a graph, and a few codes are nearly as near.
    allowed = 0.05 if isinstance(eager, MultiScale) else 0.0
    for ours, theirs in ((ids, compiled_ids), (eager.encode(z), encode(z))):
        assert (ours != theirs).float().mean() <= allowed
