"""ResTok: residual levels, merging, who sees whom, what is dropped and what stands in for it."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from helpers import (
    SIZES,
    TINY,
    aligned,
    awake,
    config_of,
    errors_while_learning,
    images_of,
    tiny_tokenizer,
)
from vistok.core.errors import ConfigError
from vistok.models.build import build_tokenizer
from vistok.models.length import LevelPolicy
from vistok.nn.positions import level_points
from vistok.nn.qformer import pooling_pyramid
from vistok.nn.rotary import RotaryAttention, RotaryBlock, attend_by_place_, rotate, rotation
from vistok.systems.restok.encoder import ResTokEncoder
from vistok.systems.restok.hierarchy import (
    block_causal_mask,
    halved,
    merge_residual,
    queued_points,
    residual_pyramid,
)
from vistok.systems.restok.weights import ReshapedResTokEncoder
from vistok.tasks.reconstruction import Reconstruction


def small(*overrides):
    return tiny_tokenizer(*overrides, tokenizer="restok_tiny")


#: 4 x 4 cells, merged to 4 x 2 and 4 x 1, as the released code does it; 8 latents in 4 levels.
RELEASED = [
    "data.image_size=32",
    "tokenizer.encoder.num_latent_tokens=8",
    "tokenizer.encoder.depth=4",
    "tokenizer.encoder.merge_layers=[0,1]",
]

#: The other values of all options: merged to 2 x 4, 2 x 2 and 1 x 2.
DEEP = [
    *RELEASED[:-1],
    "tokenizer.encoder.merge_layers=[0,1,2]",
    "tokenizer.encoder.merge_axis=longest",
    "tokenizer.encoder.places=centered",
    "tokenizer.encoder.level_vectors=merge",
    "tokenizer.decoder.norms=false",
]


# ---------------------------------------------------------------------- hierarchies


def test_levels_are_averages_of_what_is_left():
    """Against loops in float64."""
    grid = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    levels = pooling_pyramid(64)
    found = residual_pyramid(grid, levels)
    left = grid.clone()
    for (rows, columns), tokens in zip(levels, found, strict=True):
        high, wide = 8 // rows, 8 // columns
        assert tokens.shape == (2, rows * columns, 3)
        means = torch.stack(
            [
                left[:, :, y * high : (y + 1) * high, x * wide : (x + 1) * wide].mean((2, 3))
                for y in range(rows)
                for x in range(columns)
            ],
            dim=1,
        )
        assert torch.allclose(tokens, means, atol=1e-12)
        for number, mean in enumerate(means.unbind(1)):
            y, x = number // columns * high, number % columns * wide
            left[:, :, y : y + high, x : x + wide] -= mean[:, :, None, None]
    assert found[1].abs().max() < 1e-12  # a second level of one cell finds nothing left
    assert found[2].abs().max() > 0.01


def test_merging_takes_every_other_token_off_the_grid():
    cases = (((4, 4), "longest", 1), ((2, 4), "longest", 2), ((4, 4), "columns", 2))
    for grid, axis, dim in cases:
        tokens = torch.randn(2, grid[0] * grid[1], 3)
        coarse, rest = merge_residual(tokens, grid, axis)
        rows, columns = halved(grid, axis)
        assert coarse.shape == (2, rows * columns, 3) and rest.shape == tokens.shape
        for y in range(grid[0]):
            for x in range(grid[1]):
                parent = (y // 2, x) if dim == 1 else (y, x // 2)
                taken = tokens[:, (y - y % 2) * grid[1] + x if dim == 1 else y * grid[1] + x - x % 2]  # fmt: skip
                assert torch.equal(coarse[:, parent[0] * columns + parent[1]], taken)
                expected = tokens[:, y * grid[1] + x] - taken
                assert torch.equal(rest[:, y * grid[1] + x], expected)
                if (y if dim == 1 else x) % 2 == 0:
                    assert not expected.any()


def test_grids_are_halved():
    grids = [(16, 16)]
    for _ in range(3):
        grids.append(halved(grids[-1], "longest"))
    assert grids == [(16, 16), (8, 16), (8, 8), (4, 8)]
    for grid in ((1, 1), (3, 3)):
        with pytest.raises(ConfigError, match="can't be halved"):
            halved(grid, "longest")
    assert halved((16, 16)) == (16, 8)  # what the released code does
    assert halved((16, 4)) == (16, 2)
    for grid in ((16, 1), (4, 3)):
        with pytest.raises(ConfigError, match="can't be halved"):
            halved(grid)
    with pytest.raises(ConfigError, match=r"merge_layers=\[1\]: must be rising indices.*0 to 0"):
        small("tokenizer.encoder.merge_layers=[1]")


def test_mask_by_its_definition():
    counts = [2, 4, 1, 3]
    level = [i for i, count in enumerate(counts) for _ in range(count)]
    mask = block_causal_mask(counts)
    for row in range(10):
        for column in range(10):
            assert mask[row, column] == (level[column] <= level[row])


def test_tokens_lie_at_the_centres_of_their_cells():
    points = level_points([(1, 1), (1, 2), (2, 2)], (2, 2))
    expected = [[0.5, 0.5], [0.5, 0], [0.5, 1], [0, 0], [0, 1], [1, 0], [1, 1]]
    assert points.tolist() == expected
    assert level_points([(2, 4)], (4, 4))[5].tolist() == [2.5, 1]


def test_released_places_lie_one_behind_the_other():
    """Each part begins behind as many places as there are tokens before it, in both axes."""
    found = queued_points([(2, 1), (2, 2), 3]).tolist()
    grids = [[0, 0], [1, 0], [2, 2], [2, 3], [3, 2], [3, 3]]
    assert found == [*grids, [6, 6], [7, 7], [8, 8]]
    assert queued_points([2, (1, 2)]).tolist() == [[0, 0], [1, 1], [2, 2], [2, 3]]


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.5, 0.0), (0.0, 1.0)])
def test_attention_starts_among_neighbours(offset):
    """Logits of the start by hand: strength times the cosines of the six fastest turns.

    Half of the heads read before a place, the others behind it; the norm of the queries takes
    their mean off, which bends the logits a little.
    """
    torch.manual_seed(0)
    net = RotaryAttention(64, 2)
    attend_by_place_(net, strength=4.0, offset=offset)
    net.qkv.weight.data[: 2 * 64] = 0  # content out of queries and keys
    places = torch.tensor([[float(y), float(x)] for y in range(6) for x in range(6)])
    turn, near = rotation(places, 32), []
    for head, side in enumerate([-1, 1]):
        bias = net.q_bias.unflatten(0, (2, 32))[head]
        queries = rotate(net.q_norm(bias).expand(36, -1), turn)
        keys = rotate(net.k_norm(torch.zeros(32)).expand(36, -1), turn)
        logits = queries @ keys.T / 32**0.5
        gaps = (places[:, None] - places + side * torch.tensor(offset)).double()
        expected = sum(4 * torch.cos(gaps * 1e4 ** (-step / 8)).sum(-1) for step in range(3))
        assert torch.allclose(logits.double(), expected, atol=1e-3 + 0.8 * max(offset))
        read = 14 + side * round(6 * 2 * offset[0] + offset[1])  # row 2, column 2
        if offset != (0.5, 0.0):  # there it lies between two rows
            assert logits[14].argmax() == read
        near.append(logits.softmax(1))
    x = torch.randn(1, 36, 64)
    with torch.no_grad():
        net.proj.bias.zero_()
        values = (x @ net.qkv.weight[128:].T).unflatten(2, (2, 32))
        mixed = torch.cat([share @ values[0, :, head] for head, share in enumerate(near)], dim=1)
    assert torch.allclose(net(x, turn)[0], mixed @ net.proj.weight.T, atol=1e-4)
    if offset == (0.0, 0.0):  # values pass unchanged
        assert torch.allclose(net(x, turn)[0], near[0] @ x[0], atol=1e-3)


def test_rotation_by_complex_numbers_and_by_differences_alone():
    torch.manual_seed(0)
    points = torch.tensor([[0.0, 0.0], [3.0, 1.0], [7.0, 5.0]])
    x = torch.randn(3, 8, dtype=torch.float64)
    turned = rotate(x, rotation(points, 8).double())
    for token in range(3):
        for pair in range(4):
            axis, step = divmod(pair, 2)
            angle = points[token, axis].item() * 1e4 ** (-step / 2)
            expected = complex(*x[token, 2 * pair : 2 * pair + 2]) * complex(math.cos(angle), math.sin(angle))  # fmt: skip
            assert complex(*turned[token, 2 * pair : 2 * pair + 2]) == pytest.approx(expected, abs=1e-5)  # fmt: skip
    moved = rotate(x, rotation(points + 11, 8).double())
    assert torch.allclose(turned @ turned.T, moved @ moved.T, atol=1e-4)
    assert not torch.allclose(turned @ turned.T, x @ x.T, atol=1e-1)


def test_attention_normalises_turns_and_hides():
    torch.manual_seed(0)
    net, x = awake(RotaryAttention(16, 2)), torch.randn(1, 3, 16)
    turn = rotation(torch.rand(3, 2) * 5, 8)
    mask = block_causal_mask([1, 2])
    q, k, v = (net.qkv(x) + torch.cat([net.q_bias, torch.zeros(16), net.v_bias])).view(3, 3, 2, 8).unbind(1)  # fmt: skip
    heads = []
    for head in range(2):
        queries = rotate(net.q_norm(q[:, head]), turn)
        keys = rotate(net.k_norm(k[:, head]), turn)
        scores = (queries @ keys.T / 8**0.5).masked_fill(~mask, -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, head])
    assert torch.allclose(net(x, turn, mask)[0], net.proj(torch.cat(heads, dim=1)), atol=1e-5)


def test_a_block_scales_what_it_adds():
    """LayerScale, of attention and MLP apart."""
    block, x = awake(RotaryBlock(16, 2)), torch.randn(1, 3, 16)
    turn = rotation(torch.rand(3, 2) * 5, 8)
    assert (block.scale1 - 1).abs().min() > 0 and (block.scale2 - 1).abs().min() > 0
    y = x + block.scale1 * block.attn(block.norm1(x), turn)
    y = y + block.scale2 * block.mlp(block.norm2(y))
    assert torch.allclose(block(x, turn), y, atol=1e-6)


# ---------------------------------------------------------------------- the encoder


def test_latents_start_as_pooled_residuals():
    encoder = small(*DEEP).encoder
    features = torch.randn(2, 16, 16)
    x = encoder.sequence(features)
    assert torch.allclose(x[:, :16], features + encoder.image_levels[0])
    start = 16
    pooled = residual_pyramid(features.transpose(1, 2).unflatten(2, (4, 4)), pooling_pyramid(8))
    for level, tokens in enumerate(pooled):
        found = x[:, start : start + tokens.shape[1]]
        assert torch.allclose(found, tokens + encoder.latent_levels[level], atol=1e-5)
        start += tokens.shape[1]
    assert start == x.shape[1] == 24


def test_merging_happens_between_attention_and_mlp():
    encoder, seen = small(*DEEP).encoder, []
    for block in encoder.blocks:
        block.norm1.register_forward_hook(lambda m, i, o: seen.append(("attention", o.shape[1])))
        block.norm2.register_forward_hook(lambda m, i, o: seen.append(("mlp", o.shape[1])))
    encoder(torch.randn(1, 3, 32, 32))
    lengths = [16 + 8, 16 + 8 + 8, 16 + 8 + 4 + 8, 16 + 8 + 4 + 2 + 8]
    expected = []
    for number in range(4):
        expected += [("attention", lengths[number]), ("mlp", lengths[min(number + 1, 3)])]
    assert seen == expected
    block, x = RotaryBlock(16, 2), torch.randn(1, 4, 16)
    turn = rotation(torch.zeros(4, 2), 8)
    y = x + block.attn(block.norm1(x), turn)
    y = y[:, :2]
    assert torch.allclose(block(x, turn, between=lambda t: t[:, :2]), y + block.mlp(block.norm2(y)))


def test_merged_sequence_is_coarse_to_fine():
    encoder = small(*DEEP).encoder
    x = torch.randn(1, 24, 16)
    merged = encoder.merge(x, 1)
    coarse, rest = merge_residual(x[:, :16], (4, 4), "longest")
    assert torch.equal(merged[:, :8], coarse + encoder.image_levels[1])
    assert torch.equal(merged[:, 8:24], rest) and torch.equal(merged[:, 24:], x[:, 16:])
    assert encoder.coarsest(torch.arange(38).view(1, 38, 1)).flatten().tolist() == [0, 1]


def test_places_and_masks_follow_the_sequence_of_every_merge():
    """Coarse to fine, then the latents; in units of the finest grid's cells."""
    encoder = small(*DEEP).encoder
    grids = [(4, 4), (2, 4), (2, 2), (1, 2)]
    latents = [(1, 1), (1, 1), (1, 2), (2, 2)]
    for merges in range(4):
        points, level = [], []
        for number, (rows, columns) in enumerate([*grids[merges::-1], *latents]):
            for y in range(rows):
                for x in range(columns):
                    points.append([(y + 0.5) * 4 / rows - 0.5, (x + 0.5) * 4 / columns - 0.5])
                    level.append(number)
        turn = rotation(torch.tensor(points), 8)
        assert torch.allclose(encoder.get_buffer(f"turn{merges}"), turn, atol=1e-5)
        visible = [[theirs <= own for theirs in level] for own in level]
        assert encoder.get_buffer(f"mask{merges}").tolist() == visible


def test_a_level_depends_on_no_later_one():
    encoder = awake(small(*DEEP).encoder).double()
    images = torch.rand(2, 3, 32, 32).double()
    before = encoder(images)
    edges = [0, 1, 2, 4, 8]  # levels of 1, 1, 2 and 4 tokens
    change = torch.randn(16).double()
    for level in range(4):
        with torch.no_grad():
            encoder.latent_levels[level] += change
        after = encoder(images)
        with torch.no_grad():
            encoder.latent_levels[level] -= change
        moved = (after - before).abs().amax(dim=(0, 2)) > 1e-12
        assert not moved[: edges[level]].any(), level
        assert moved[edges[level] :].all(), level


def test_image_tokens_see_no_latents():
    encoder, seen = awake(small(*DEEP).encoder), []
    encoder.blocks[-1].register_forward_hook(lambda b, i, o: seen.append(o))
    images = torch.rand(2, 3, 32, 32)
    encoder(images)
    with torch.no_grad():
        encoder.latent_levels += torch.randn(16)
    encoder(images)
    assert torch.allclose(seen[0][:, :30], seen[1][:, :30], atol=1e-5)
    assert not torch.allclose(seen[0][:, 30:], seen[1][:, 30:], atol=1e-2)


def test_each_level_has_its_own_projection():
    encoder = small(*DEEP).encoder
    images = torch.rand(2, 3, 32, 32)
    before = encoder(images)
    with torch.no_grad():
        encoder.project.layers[2].bias += 1
    moved = (encoder(images) - before).abs().amax(dim=(0, 2)) > 1e-4
    assert moved.tolist() == [False, False, True, True, False, False, False, False]


def test_initialisation_gives_uncorrelated_channels_on_one_scale():
    tok = small(*DEEP, "tokenizer.latent_dim=4")
    images = tok.to_model_range(images_of(64, 32))
    tok.encoder.initialize(images)
    with torch.no_grad():
        features = tok.encoder.embed(tok.encoder.cnn(images)).flatten(0, 1).double()
        latents = tok.encoder.latents(images).split([1, 1, 2, 4], dim=1)
        codes = tok.encoder(images).split([1, 1, 2, 4], dim=1)
    covariance = torch.cov(features.T)
    assert covariance.diagonal().mean().item() == pytest.approx(1, rel=0.02)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.02
    total = 0.0  # variance of all latents, which becomes 1 per channel of the code
    for latent, code in zip(latents, codes, strict=True):
        rows = code.flatten(0, 1).double()
        assert rows.mean(0).abs().max() < 0.02
        covariance = torch.cov(rows.T, correction=0)
        assert (covariance - covariance.diagonal().diag()).abs().max() < 0.02
        variance = latent.flatten(0, 1).double().var(dim=0, correction=0).sum()
        total += latent.shape[1] / 8 * variance.item()
    for latent, code in zip(latents, codes, strict=True):
        rows = latent.flatten(0, 1).double()
        strongest = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0))[-4:].flip(0)
        found = code.flatten(0, 1).double().var(dim=0, correction=0)
        assert torch.allclose(found, strongest / (total / 4), rtol=0.02, atol=1e-3)


def test_a_merged_grid_is_named_behind_the_block():
    """Who is right about the numbers: the oracle of test_import_weights.py."""
    encoder, seen = awake(small(*RELEASED).encoder), []
    encoder.blocks[0].register_forward_hook(lambda b, i, o: seen.append(o))
    encoder.blocks[1].norm1.register_forward_pre_hook(lambda n, i: seen.append(i[0]))
    encoder(torch.rand(1, 3, 32, 32))
    named = seen[1] - seen[0]
    assert torch.allclose(named[:, :8], encoder.image_levels[1].expand(1, 8, -1), atol=1e-5)
    assert named.shape[1] == 16 + 8 + 8 and not named[:, 8:].any()
    assert encoder.grids == [(4, 4), (4, 2), (4, 1)]


def test_released_weights_read_memory_in_another_shape():
    """Token k gets the values k, k + 8, k + 16, ... of all; also of no images."""
    target = "tokenizer.encoder._target_=reshaped_restok_encoder"
    encoder, images = small(*RELEASED, target).encoder, torch.rand(2, 3, 32, 32)
    assert type(encoder) is ReshapedResTokEncoder
    mixed, plain = encoder.latents(images), ResTokEncoder.latents(encoder, images).flatten(1)
    for token in range(8):
        assert torch.equal(mixed[:, token], plain[:, token::8])
    assert encoder(images[:0]).shape == (0, 8, 16)


@pytest.mark.parametrize("options", [RELEASED, DEEP], ids=["released", "deep"])
def test_every_weight_learns_and_blocks_recompute(options):
    tok = small(*options).train()
    images = tok.to_model_range(images_of(16, 32))
    before = {name: p.clone() for name, p in tok.named_parameters()}
    errors = errors_while_learning(tok, images, lr=2e-3, steps=40)
    assert errors[-1] < 0.7 * errors[0]
    still = [name for name, p in tok.named_parameters() if torch.equal(p, before[name])]
    assert not still
    plain = tok.encoder(images)
    for part in (tok.encoder, tok.decoder):
        part.activation_checkpointing = True
    assert torch.allclose(tok.encoder(images), plain, atol=1e-6)


# ---------------------------------------------------------------------- what is dropped


@pytest.mark.parametrize(("shortest", "n"), [(4, 128), (1, 64), (4, 4)])
def test_lengths_follow_the_published_law(shortest, n):
    """Chi-square at 5 standard deviations of its statistic."""
    torch.manual_seed(1)
    levels = [shortest * 2**i for i in range(20) if shortest * 2**i < n]
    law = {level: Fraction(1, 5) * Fraction(level, sum(levels)) for level in levels}
    law[n] = 1 - sum(law.values())
    if n == 128:
        assert law[64] == Fraction(16, 155) and law[4] == Fraction(1, 155)
        assert law[128] == Fraction(4, 5)
    draws = 40000
    lengths = LevelPolicy(shortest, 0.8)(draws, n)
    assert set(lengths.tolist()) <= set(law)
    chi2 = sum(
        ((lengths == k).sum().item() - draws * float(p)) ** 2 / (draws * float(p))
        for k, p in law.items()
    )
    freedom = len(law) - 1
    assert chi2 <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


def test_policies_out_of_range_are_refused():
    assert LevelPolicy()(0, 64).shape == (0,)
    for shortest in (0, 2.5, 3, 4.0):
        with pytest.raises(ConfigError, match=f"^shortest={shortest}: must be"):
            LevelPolicy(shortest)
    with pytest.raises(ConfigError, match=r"full_probability=1\.5: must be a number, 0 to 1"):
        LevelPolicy(4, 1.5)
    assert LevelPolicy(4).budgets(4) == [4]
    assert LevelPolicy(1, 0.0).budgets(8) == [1, 2, 4]
    assert LevelPolicy(1, 0.0, whole=True).budgets(8) == [1, 2, 4, 8]  # which is shown every step
    assert LevelPolicy(1, 1.0).budgets(8) == [8]
    for call in (LevelPolicy(8).budgets, lambda n: LevelPolicy(8)(1, n)):
        with pytest.raises(ConfigError, match=r"length\.shortest=8: must be at most 4"):
            call(4)


def test_each_image_draws_its_own_length():
    tok = small("tokenizer.length.full_probability=0.3").train()
    output = tok(tok.to_model_range(images_of(40)))
    lengths = output.mask.sum(dim=1)
    assert set(lengths.tolist()) == {1, 2, 4}
    assert torch.equal(output.mask, torch.arange(4) < lengths[:, None])


def test_dropped_tokens_become_a_learned_vector_of_the_code_space():
    tok = awake(small())
    decoder = tok.decoder
    quantized = torch.randn(2, 4, 16, requires_grad=True)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    filled = decoder.filled(quantized, mask)
    assert torch.equal(filled[0, 2:], decoder.dropped[0].expand(2, -1))
    assert torch.equal(filled[0, :2], quantized[0, :2]) and torch.equal(filled[1], quantized[1])
    assert torch.equal(decoder.filled(quantized[:1, :2]), filled[:1])
    read = []  # by the linear layers of their levels
    decoder.embed.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0]))
    decoder.reconstruct(quantized, mask).square().mean().backward()
    assert torch.equal(read[0], filled)
    assert decoder.dropped.grad.any()
    assert quantized.grad[0, :2].any() and quantized.grad[1, 2:].any()
    assert not quantized.grad[0, 2:].any()
    # Training on whole codes alone still has every parameter in its graph.
    tok.zero_grad()
    decoder.reconstruct(quantized).square().mean().backward()
    assert decoder.dropped.grad is not None


def test_the_code_space_is_the_quantizers_where_the_widths_agree():
    from helpers import config_of

    tok = build_tokenizer(config_of("experiment=restok_tiny"))
    assert isinstance(tok.quantizer.project_in, torch.nn.Identity)
    with torch.device("meta"):
        large = build_tokenizer(config_of("experiment=restok_l"))
    assert isinstance(large.quantizer.project_in, torch.nn.Identity)
    assert large.codebooks()[0].shape == (8192, 8)


def test_cells_come_behind_the_latents_and_see_all():
    decoder, seen = awake(small().decoder).double(), []
    decoder.blocks[0].register_forward_hook(lambda b, i, o: seen.append(i))
    quantized = torch.randn(1, 4, 16).double()
    cells = decoder.cells(quantized)
    x, turn = seen[0][:2]
    assert len(seen[0]) == 2 and turn.shape == (2, 4 + 4, 4)  # no mask
    tokens = [decoder.embed(quantized), decoder.mask_token.expand(1, 4, -1)]
    assert torch.equal(x, decoder.norm_in(torch.cat(tokens, dim=1)))
    for token in range(4):
        other = quantized.clone()
        other[:, token] += 1
        assert ((decoder.cells(other) - cells).abs().amax(dim=2) > 1e-9).all()


def test_the_decoder_turns_latents_and_cells_by_their_places():
    """2 x 2 cells behind the latents, or latents at the centres of what they stand for."""
    queued = [[0.0, 0.0], [1, 1], [2, 2], [3, 3], [4, 4], [4, 5], [5, 4], [5, 5]]
    centered = [[0.5, 0.5], [0.5, 0.5], [0.5, 0], [0.5, 1], [0, 0], [0, 1], [1, 0], [1, 1]]
    for places, points in (("queued", queued), ("centered", centered)):
        decoder = small(f"tokenizer.encoder.places={places}").decoder
        assert torch.allclose(decoder.turn, rotation(torch.tensor(points), 8), atol=1e-6)


# ---------------------------------------------------------------------- the teacher


@pytest.fixture(scope="module")
def teacher_words(tmp_path_factory):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "vit.pth"
    name = "vit_tiny_patch16_224"
    torch.save(timm.create_model(name, pretrained=False).state_dict(), path)
    words = [f"name={name}", f"weights={path}", "input_size=32"]
    words = [f"loss.terms.alignment.teacher.{word}" for word in words]
    return ["alignment=restok", *words]


def module(words, name="restok_tiny"):
    base = [w for w in TINY if not w.startswith("tokenizer.")]
    torch.manual_seed(0)
    built = Reconstruction(config_of(f"experiment={name}", *base, *SIZES[name], *words)).train()
    awake(built.tokenizer)
    return built


def test_foundation_loss_by_hand(teacher_words):
    m = module(teacher_words)
    encoder, decoder, seen = m.tokenizer.encoder, m.tokenizer.decoder, {}
    encoder.blocks[-1].register_forward_hook(lambda b, i, o: seen.update(sequence=o))
    decoder.embed.register_forward_hook(lambda b, i, o: seen.update(latents=o))
    images = m.tokenizer.to_model_range(images_of(4))
    value = aligned(m, images)
    features = m.objective.terms["alignment"].teacher(images)  # 2 x 2, as many as there are cells
    coarsest = seen["sequence"][:, :2] + encoder.image_levels[1]  # merged in the last block
    summary = m.objective.terms["alignment"].encoder_projector(coarsest.mean(1))
    x = torch.cat(
        [seen["latents"], m.objective.terms["alignment"].mask_token.expand(4, 4, -1)], dim=1
    )
    x = decoder.norm_in(x)
    for block in decoder.blocks:
        x = block(x, decoder.turn)
    cells = m.objective.terms["alignment"].decoder_projector(x[:, 4:])
    first = F.cosine_similarity(summary, features.mean((2, 3)), dim=-1)
    second = F.cosine_similarity(cells, features.flatten(2).transpose(1, 2), dim=-1)
    expected = (0.75 - first).relu().mean() + (0.75 - second).relu().mean()
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    with torch.no_grad():  # within the margin nothing is asked for
        near = features.mean((2, 3))
        assert m.objective.terms["alignment"]._distance(near + 0.1 * near.roll(1, 1), near) == 0


def test_foundation_features_are_averaged_over_a_cell(teacher_words):
    """Of 6 x 6 features a cell of 2 x 2 has 3 x 3, and all of them a say."""
    size = ["loss.terms.alignment.teacher.input_size=96"]
    m = module([w for w in teacher_words if "input_size" not in w] + size)
    images = m.tokenizer.to_model_range(images_of(2))
    seen = []
    term = m.objective.terms["alignment"]
    term._distance = lambda ours, target: seen.append(target) or ours.sum()
    aligned(m, images)
    features = m.objective.terms["alignment"].teacher(images)
    assert features.shape[2:] == (6, 6)
    cells = [features[:, :, y : y + 3, x : x + 3].mean((2, 3)) for y in (0, 3) for x in (0, 3)]
    assert torch.allclose(seen[0], features.mean((2, 3)), atol=1e-5)
    assert torch.allclose(seen[1], torch.stack(cells, dim=1), atol=1e-5)


def test_whom_the_foundation_loss_teaches(teacher_words):
    m = module(teacher_words)
    images = m.tokenizer.to_model_range(images_of(4))
    aligned(m, images).backward()
    reached = {n for n, p in m.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("objective.terms.alignment.mask_token", "objective.terms.alignment.encoder_projector", "objective.terms.alignment.decoder_projector", "tokenizer.encoder.cnn", "tokenizer.decoder.blocks.0"):  # fmt: skip
        assert any(n.startswith(part) for n in reached), part
    for part in ("tokenizer.decoder.cnn", "tokenizer.decoder.mask_token", "tokenizer.decoder.project"):  # fmt: skip
        assert not any(n.startswith(part) for n in reached), part
    assert not any("teacher" in key for key in m.state_dict())


def test_foundation_loss_is_restoks(teacher_words):
    with pytest.raises(
        ConfigError, match=r"^loss\.terms\.alignment\._target_.*needs a ResTok.*GigaTok"
    ):
        module(teacher_words, "gigatok_tiny")


# ---------------------------------------------------------------------- whole ones


def test_parameters_within_one_per_cent_of_the_published():
    with torch.device("meta"):
        tok = build_tokenizer(config_of("experiment=restok_l"))
    assert sum(p.numel() for p in tok.parameters()) / 1e6 == pytest.approx(662, rel=0.01)
    assert [encoder_grid[0] * encoder_grid[1] for encoder_grid in tok.encoder.grids] == [256, 128, 64, 32]  # fmt: skip
    assert tok.encoder.mask3.shape == (608, 608)


def test_paper_size_forward_and_backward_on_the_meta_device():
    with torch.device("meta"):
        tok = build_tokenizer(config_of("experiment=restok_l")).train()
        latents = tok.encoder(torch.zeros(1, 3, 256, 256))
        assert latents.shape == (1, 128, 8)
        pictures = tok.decoder.reconstruct(latents)
        assert pictures.shape == (1, 3, 256, 256)
        pictures.sum().backward()
    unused = [n for n, p in tok.named_parameters() if p.grad is None]
    assert all(n.startswith("quantizer") for n in unused), unused


def test_a_tiny_one_learns():
    torch.manual_seed(0)
    tok = small("quantizer.codebook_size=64")
    x = tok.to_model_range(images_of(24))
    tok.initialize(x)
    errors = errors_while_learning(tok, x, lr=1.2e-3, steps=60)
    assert sum(errors[-10:]) < 0.7 * sum(errors[:10])
