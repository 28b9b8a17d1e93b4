"""GigaTok: sizes as published, pooled queries, who reads what."""

import pytest
import torch

from helpers import awake, config_of, errors_while_learning, images_of, loud, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.models.build import build_tokenizer
from vistok.nn.conv import AdaptiveGroupNorm, DepthToSpace, group_norm
from vistok.nn.qformer import CrossAttention, QFormer, QFormerBlock, pooling_pyramid


@pytest.mark.parametrize(
    ("name", "published"),
    [("gigatok_s_s", 136), ("gigatok_s_b", 232), ("gigatok_b_l", 622), ("gigatok_xl_xxl", 2900)],
)
def test_parameters_within_two_per_cent_of_the_published(name, published):
    """Millions, with the projection to 768 features that the released models count."""
    with torch.device("meta"):
        tok = build_tokenizer(config_of(f"experiment={name}"))
    width = tok.decoder.embed.out_features
    projection = 4 * width * width + 16 * width * width + 4 * width * 768
    found = sum(p.numel() for p in tok.parameters()) + projection
    assert found / 1e6 == pytest.approx(published, rel=0.02)


def test_paper_size_forward_and_backward_on_the_meta_device():
    with torch.device("meta"):
        tok = build_tokenizer(config_of("experiment=gigatok_b_l")).train()
        latents = tok.encoder(torch.zeros(1, 3, 256, 256))
        assert latents.shape == (1, 256, 256)
        pictures = tok.decoder.reconstruct(latents)
        assert pictures.shape == (1, 3, 256, 256)
        pictures.sum().backward()
    unused = [n for n, p in tok.named_parameters() if p.grad is None]
    assert all(n.startswith("quantizer") for n in unused), unused


def test_the_pyramid_of_the_paper():
    sizes = [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16)]
    assert pooling_pyramid(256) == sizes
    for count in (1, 2, 4, 64):
        assert sum(r * c for r, c in pooling_pyramid(count)) == count
    with pytest.raises(ConfigError, match="power of two"):
        pooling_pyramid(48)


def test_queries_are_averages_of_ever_smaller_parts():
    encoder = tiny_tokenizer("tokenizer.encoder.num_latent_tokens=8", "data.image_size=32", tokenizer="gigatok_tiny").encoder  # fmt: skip
    memory = torch.randn(2, 16, 16)  # a grid of 4 x 4; the first projection is the identity
    queries = encoder.queries(memory)
    grid = memory.view(2, 4, 4, 16)
    whole = grid.mean(dim=(1, 2))
    expected = [whole, whole, grid[:, :, :2].mean((1, 2)), grid[:, :, 2:].mean((1, 2))]
    expected += [grid[:, y : y + 2, x : x + 2].mean((1, 2)) for y in (0, 2) for x in (0, 2)]
    assert torch.allclose(queries, torch.stack(expected, dim=1), atol=1e-5)


def test_attention_equals_torchs():
    torch.manual_seed(0)
    ours = CrossAttention(16, 4)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias)
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    assert torch.allclose(ours(q, k, v), theirs(q, k, v)[0], atol=1e-5)


def test_a_block_by_its_definition():
    """DETR's decoder before its norms: positions in queries and keys, never in values."""
    block = awake(QFormerBlock(16, 4))
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    places, memory_places = torch.randn(5, 16), torch.randn(7, 16)
    hidden = torch.arange(7) >= torch.tensor([[7], [3]])

    def attended(own, queries, keys, values, hidden=None):
        projections = [torch.cat([getattr(getattr(own, n), w) for n in "qkv"]) for w in ("weight", "bias")]  # fmt: skip
        q, k, v = (part.transpose(0, 1) for part in (queries, keys, values))
        return torch.nn.functional.multi_head_attention_forward(
            q, k, v, 16, 4, *projections, None, None, False, 0.0,
            own.proj.weight, own.proj.bias, False, hidden, False,
        )[0].transpose(0, 1)  # fmt: skip

    y = block.norm1(x)
    expected = x + attended(block.self_attn, y + places, y + places, y)
    y = block.norm2(expected) + places
    expected = expected + attended(block.cross_attn, y, memory + memory_places, memory, hidden)
    y = block.norm3(expected) @ block.mlp[0].weight.T + block.mlp[0].bias
    y = y * torch.special.ndtr(y)  # GELU
    expected = expected + y @ block.mlp[2].weight.T + block.mlp[2].bias
    assert torch.allclose(block(x, memory, places, memory_places, ~hidden), expected, atol=1e-5)


def test_positions_enter_queries_and_keys_alone():
    """Equal positions everywhere shift all logits of a row alike, or not at all, and no value."""
    torch.manual_seed(0)
    net = QFormer(16, 2, 2).eval()
    x, memory = torch.randn(1, 4, 16), torch.randn(1, 6, 16)
    zero, place = torch.zeros(1, 16), torch.randn(1, 16)
    none = net(x, memory, zero.expand(4, -1), zero.expand(6, -1))
    same = net(x, memory, zero.expand(4, -1), place.expand(6, -1))
    assert torch.allclose(same, none, atol=1e-5)  # a key shared by all changes no softmax
    other = net(x, memory, zero.expand(4, -1), torch.randn(6, 16) * 3)
    assert not torch.allclose(other, none, atol=1e-3)


def test_grid_queries_begin_as_the_first_token():
    tok = tiny_tokenizer(tokenizer="gigatok_tiny")
    decoder, seen = tok.decoder, []
    decoder.transformer.blocks[0].register_forward_hook(lambda b, i, o: seen.append(i))
    quantized = torch.randn(2, 4, 16)
    decoder.reconstruct(quantized)
    queries, memory = seen[0][:2]
    assert torch.equal(queries, memory[:, :1].expand(-1, 4, -1)) and queries.shape == (2, 4, 16)
    moved = quantized.clone()
    moved[:, 3] += 1  # every token has a say
    assert not torch.allclose(decoder.reconstruct(moved), decoder.reconstruct(quantized))


def test_a_mask_equals_truncation():
    """Masked memory is not there at all; a vector of zeros in its place would have a say."""
    # A norm over the four cells of so small an image hides most of what the tokens say.
    plain = "tokenizer.decoder.cnn.adaptive_norm=false"
    decoder = tiny_tokenizer(plain, tokenizer="gigatok_tiny").decoder
    loud(decoder.transformer)
    quantized = torch.randn(3, 4, 16)
    lengths = torch.tensor([4, 2, 1])
    mask = torch.arange(4) < lengths[:, None]
    together = decoder.reconstruct(quantized, mask)
    for row, k in enumerate(lengths.tolist()):
        alone = decoder.reconstruct(quantized[row : row + 1, :k])
        assert torch.allclose(together[row : row + 1], alone, atol=1e-5)
    zeroed = decoder.reconstruct(quantized * mask[..., None])
    assert not torch.allclose(together[2], zeroed[2], atol=1e-2)


def test_the_decoder_starts_by_reading_what_is_near():
    """A token moves the cells around the centre of what it averages most."""
    torch.manual_seed(0)
    decoder = tiny_tokenizer(
        "tokenizer.encoder.num_latent_tokens=16",
        "tokenizer.decoder.width=64",
        "data.image_size=32",
        tokenizer="gigatok_tiny",
    ).decoder
    seen = []
    decoder.transformer.blocks[0].cross_attn.register_forward_hook(lambda m, i, o: seen.append(o))
    quantized = torch.randn(1, 16, 16)
    decoder.cells(quantized)
    for token, (rows, columns) in ((8, (0, 0)), (11, (0, 3)), (12, (2, 0)), (15, (2, 3))):
        other = quantized.clone()  # the last level has 2 x 4 cells of 2 x 1
        other[:, token] = torch.randn(16)
        decoder.cells(other)
        moved = (seen[-1] - seen[0])[0].norm(dim=1).view(4, 4)
        own = moved[rows : rows + 2, columns].mean()
        away = moved[2 - rows : 4 - rows, 3 - columns].mean()
        assert own > 2 * away, (token, own, away)


@pytest.mark.parametrize("norm", ["input", "embedding"])
def test_initialisation_takes_means_off(norm):
    """What the Q-Former reads and what is coded: means 0, uncorrelated, mean variance 1."""
    words = ["tokenizer.encoder.width=32", f"tokenizer.encoder.norm={norm}"]
    tok = tiny_tokenizer(*words, tokenizer="gigatok_tiny")
    images = tok.to_model_range(images_of(48))
    tok.encoder.initialize(images)
    with torch.no_grad():
        read = tok.encoder.embed(tok.encoder.cells(images))[..., :16]  # as many as it has inputs
        code = tok.encoder(images)
    for rows in (read.flatten(0, 1).double(), code.flatten(0, 1).double()):
        covariance = torch.cov(rows.T)
        assert rows.mean(0).abs().max() < 0.02
        assert covariance.diagonal().mean().item() == pytest.approx(1, rel=0.02)
        assert (covariance - covariance.diagonal().diag()).abs().max() < 0.02


@pytest.mark.parametrize("norm", ["input", "embedding"])
def test_what_is_normalized_on_the_way_in(norm):
    """The features of each cell or token before they are embedded, or their embedding."""
    words = ["tokenizer.encoder.width=32", f"tokenizer.encoder.norm={norm}"]
    tok = tiny_tokenizer(*words, tokenizer="gigatok_tiny")
    images, codes, seen = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 16), []
    for part in (tok.encoder, tok.decoder):
        part.transformer.register_forward_hook(lambda m, i, o: seen.append(i[1]))
    with torch.no_grad():
        tok.encoder(images)
        tok.decoder.reconstruct(codes)
        grid = tok.encoder.cnn(images).transpose(1, 2).unflatten(2, tok.encoder.cnn.grid)
        cells = tok.encoder.conv_out(grid).flatten(2).transpose(1, 2)
    for part, x, memory in zip((tok.encoder, tok.decoder), (cells, codes), seen, strict=True):

        def normal(rows):
            centered = rows - rows.mean(2, keepdim=True)
            return centered / (centered.square().mean(2, keepdim=True) + 1e-5).sqrt()

        expected = part.embed(normal(x)) if norm == "input" else normal(part.embed(x))
        assert torch.allclose(memory, expected, atol=1e-5)


def test_depth_to_space_doubles():
    net = DepthToSpace(3)
    x = torch.randn(1, 3, 4, 4)
    y = net(x)
    assert y.shape == (1, 3, 8, 8)
    assert torch.allclose(y[0, 1, 2::2, 5::2], net.conv(x)[0, 4 + 1, 1:, 2:], atol=1e-6)


# ---------------------------------------------------------------------- adaptive norms


def test_an_adaptive_norm_by_its_definition():
    torch.manual_seed(0)
    norm = AdaptiveGroupNorm(8, 5)
    x, latents = torch.randn(2, 8, 4, 6), torch.randn(2, 5, 2, 3) * 3 + 1
    plain = group_norm(8)(x)  # its own scale and shift are still one and zero
    assert torch.allclose(norm(x, latents), plain, atol=1e-6)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    z = latents.double().flatten(2)
    mean = z.mean(2)
    deviation = (z - mean[..., None]).square().mean(2).sqrt()
    scale = deviation @ norm.scale.weight.double().T + norm.scale.bias
    shift = mean @ norm.shift.weight.double().T + norm.shift.bias
    expected = scale[..., None, None] * plain.double() + shift[..., None, None]
    assert torch.allclose(norm(x, latents).double(), expected, atol=1e-4)
    constant = torch.ones(2, 5, 2, 3, requires_grad=True)
    norm(x, constant).sum().backward()
    assert torch.isfinite(constant.grad).all()


def test_each_level_of_gigatoks_decoder_begins_with_one():
    with torch.device("meta"):
        cnn = build_tokenizer(config_of("experiment=gigatok_s_s")).decoder.cnn
    norms = [m for m in cnn.layers if isinstance(m, AdaptiveGroupNorm)]
    assert [m.scale.out_features for m in norms] == [512, 512, 256, 256, 128]
    assert {m.scale.in_features for m in norms} == {256}
    off = tiny_tokenizer("tokenizer.decoder.cnn.adaptive_norm=false", tokenizer="gigatok_tiny")
    assert not any(isinstance(m, AdaptiveGroupNorm) for m in off.modules())


def test_adaptive_norms_see_the_whole_image_and_learn():
    tok = tiny_tokenizer(tokenizer="gigatok_tiny")
    cnn = tok.decoder.cnn
    norms = [m for m in cnn.layers if isinstance(m, AdaptiveGroupNorm)]
    assert len(norms) == 2
    cells = torch.randn(2, 4, 16)
    before = cnn.features(cells).detach()
    seen = []
    norms[0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        norms[0].shift.weight.normal_()
    after = cnn.features(cells)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(seen[0], cells.transpose(1, 2).unflatten(2, cnn.grid))
    after.sum().backward()
    for m in norms:
        assert m.scale.weight.grad.abs().max() > 0 and m.shift.weight.grad.abs().max() > 0


def test_activation_checkpointing_keeps_the_gradients():
    results = []
    for flag in (False, True):
        torch.manual_seed(0)
        net = QFormer(16, 2, 2, activation_checkpointing=flag)
        x, memory = torch.randn(2, 4, 16), torch.randn(2, 6, 16)
        net(x, memory, torch.randn(4, 16), torch.randn(6, 16)).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_tiny_one_learns():
    torch.manual_seed(0)
    tok = tiny_tokenizer(tokenizer="gigatok_tiny")
    x = tok.to_model_range(images_of(24))
    tok.initialize(x)
    errors = errors_while_learning(tok, x, lr=1e-3, steps=80)
    assert sum(errors[-5:]) < 0.7 * sum(errors[:5])
