"""Tokenizers and their parts: shapes, masks, initialisation, what users call."""

import pytest
import torch
import torch.nn.functional as F

from helpers import SIZES, awake, images_of, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.core.geometry import grid_of
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.latent_vit import LatentTransformerDecoder, LatentTransformerEncoder
from vistok.models.latent_vit_conv import LatentTransformerConvDecoder
from vistok.models.preprocessing import to_unit_range
from vistok.models.tokenizer import Tokenizer
from vistok.nn.attention import attend
from vistok.nn.blocks import Block, Transformer
from vistok.nn.data_init import least_squares, principal_components
from vistok.nn.patches import pad_edges, patchify, unpatchify
from vistok.nn.positions import grid_points, position_table, spread_points
from vistok.systems.flextok.decoder import FlowDecoder

both = pytest.mark.parametrize("tokenizer", ["titok_tiny", "vqgan_tiny"])
with_convolutions = pytest.mark.parametrize(
    "tokenizer", ["titok_tiny", "titok_conv_tiny", "vqgan_tiny"]
)


@with_convolutions
def test_eval_forward_is_detokenize_of_tokenize(tokenizer):
    tok = tiny_tokenizer(tokenizer=tokenizer)
    images = images_of(3)
    model_images = tok.to_model_range(images)
    with torch.no_grad():
        output = tok(model_images)
    ids = tok.tokenize(images)
    assert torch.equal(output.quantizer.indices, ids)
    assert torch.allclose(
        to_unit_range(output.predictions["image"].value), tok.detokenize(ids), atol=1e-6
    )
    assert torch.equal(output.predictions["image"].target, model_images) and output.mask is None
    assert ids.shape == (3, 4, 1) and ids.dtype == torch.int64 and tok.num_tokens == 4
    rec = tok.detokenize(ids)
    assert rec.shape == images.shape and rec.dtype == torch.float32
    assert rec.min() >= 0 and rec.max() <= 1


@with_convolutions
@pytest.mark.parametrize(
    ("size", "channels", "batch"), [((16, 32), 3, 2), ((24, 8), 1, 1), ((16, 16), 4, 2)]
)
def test_sizes_channels_and_batches(tokenizer, size, channels, batch):
    height, width = size
    tok = tiny_tokenizer(
        f"data.image_size=[{height},{width}]", f"data.channels={channels}", tokenizer=tokenizer
    )
    images = images_of(batch, size, channels)
    ids = tok.tokenize(images)
    tokens = height // 8 * (width // 8) if tokenizer == "vqgan_tiny" else 4
    assert ids.shape == (batch, tokens, 1)
    assert tok.detokenize(ids).shape == images.shape
    tok.train()
    output = tok(tok.to_model_range(images))
    output.predictions["image"].value.square().mean().backward()
    assert output.predictions["image"].value.shape == images.shape


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tokenizer", list(SIZES))
def test_an_empty_batch(tokenizer):
    tok = tiny_tokenizer(tokenizer=tokenizer)
    none = images_of(2)[:0]
    for images in (none, none.float()):
        ids = tok.tokenize(images)
        assert ids.shape == (0, tok.num_tokens, 1) and ids.dtype == torch.int64
    assert tok.detokenize(ids).shape == (0, 3, 16, 16)
    assert tok.to_bytes(ids) == [] and torch.equal(tok.from_bytes([]), ids)
    if not isinstance(tok, FlexibleTokenizer):
        return
    assert tok.detokenize_progressive(ids, budgets=[1, 4]).shape == (0, 2, 3, 16, 16)
    for target in ({"psnr": 20.0}, {"psnr": []}, {"max_bytes": 5}):
        fewest, num_tokens = tok.tokenize_to_target(none, **target)
        assert fewest.shape == (0, 4, 1) and num_tokens.shape == (0,)
    if tok.decoder.sampling:
        assert tok.detokenize(ids, seed=[]).shape == (0, 3, 16, 16)
        assert tok.detokenize_progressive(ids, seed=[]).shape == (0, 4, 3, 16, 16)
        tok.tokenize_to_target(none, psnr=20.0, seed=[])


@both
def test_images_are_tokenized_one_by_one(tokenizer):
    """A neighbour in the batch changes nothing."""
    tok = tiny_tokenizer(tokenizer=tokenizer)
    images = images_of(5)
    together = tok.encode(tok.to_model_range(images))
    alone = torch.cat([tok.encode(tok.to_model_range(x[None])) for x in images])
    assert torch.allclose(together, alone, atol=1e-4)


# ---------------------------------------------------------------------- what users pass


def test_uint8_and_float_are_the_same_images():
    tok = tiny_tokenizer()
    images = images_of(4)
    floats = images.float() / 255
    assert torch.allclose(tok.to_model_range(images), tok.to_model_range(floats), atol=1e-6)
    assert torch.equal(tok.tokenize(images), tok.tokenize(floats))
    assert torch.equal(tok.tokenize(images), tok.tokenize(floats.double()))
    black_white = torch.tensor([0, 255], dtype=torch.uint8).repeat(384).view(1, 3, 16, 16)
    assert tok.to_model_range(black_white).unique().tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[0], "expected (B, 3, 16, 16), found (3, 16, 16)"),
        (lambda x: x[:, :1], "found (2, 1, 16, 16)"),
        (lambda x: x[..., :8], "found (2, 3, 16, 8)"),
        (lambda x: x.permute(0, 2, 3, 1), "found (2, 16, 16, 3)"),
        (lambda x: x.int(), "found torch.int32"),
        (lambda x: x > 3, "found torch.bool"),
        (lambda x: x.float(), "must lie in [0, 1]"),
        (lambda x: x / 127.5 - 1, "found [-"),
        (lambda x: x / 255 * float("nan"), "nan"),
    ],
)
def test_tokenize_refuses(change, words):
    with pytest.raises(ConfigError) as error:
        tiny_tokenizer().tokenize(change(images_of(2)))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[..., 0], "expected (B, N, 1), found (2, 4)"),
        (lambda x: x.repeat(1, 1, 2), "found (2, 4, 2)"),
        (lambda x: x.float(), "expected integers"),
        (lambda x: x + 16, "valid are 0 to 15"),
        (lambda x: x - 16, "valid are 0 to 15"),
    ],
)
def test_detokenize_refuses(change, words):
    tok = tiny_tokenizer()
    ids = torch.arange(8).view(2, 4, 1)
    tok.detokenize(ids.to(torch.int16))
    with pytest.raises(ConfigError) as error:
        tok.detokenize(change(ids))
    assert words in str(error.value)


def test_parts_must_fit():
    tok, other = tiny_tokenizer(), tiny_tokenizer("tokenizer.encoder.width=32")
    with pytest.raises(ConfigError, match=r"latent_dim.*32.*16.*equal"):
        Tokenizer(other.encoder, tok.quantizer, tok.decoder, 16)


# ---------------------------------------------------------------------- masks


def decoder(class_token=False):
    torch.manual_seed(0)
    return LatentTransformerDecoder(
        [16, 24], 3, patch_size=8, num_latent_tokens=6, latent_dim=12, width=16, depth=2,
        num_heads=2, class_token=class_token,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("class_token", [False, True])
def test_masked_tokens_have_no_influence_and_equal_truncation(class_token):
    net = decoder(class_token)
    quantized, noise = torch.randn(3, 6, 12), torch.randn(3, 6, 12)
    keep = torch.arange(6)[None] < torch.tensor([6, 4, 1])[:, None]
    masked = net.reconstruct(quantized, keep)
    changed = torch.where(keep[..., None], quantized, 100 * noise)
    assert torch.allclose(net.reconstruct(changed, keep), masked, atol=1e-5)
    for row, count in enumerate((6, 4, 1)):
        short = net.reconstruct(quantized[row : row + 1, :count])
        assert torch.allclose(masked[row : row + 1], short, atol=1e-5)
    # What is not masked does have an influence, else all of this would hold of itself.
    other = torch.where(keep[..., None], noise, quantized)
    assert not torch.allclose(net.reconstruct(other, keep), masked, atol=1e-2)
    assert not torch.allclose(net.reconstruct(quantized), masked, atol=1e-2)
    assert torch.allclose(
        net.reconstruct(quantized, torch.ones(3, 6).bool()), net.reconstruct(quantized), atol=1e-5
    )


def test_a_tokenizer_with_masks_trains_and_reads_prefixes():
    tok = tiny_tokenizer(tokenizer="one_d_piece_tiny")
    tok.sample_mask = lambda latents: torch.arange(4).expand(len(latents), 4) < 2
    images = images_of(3)
    output = tok(tok.to_model_range(images))
    assert output.mask.sum() == 6
    prefix = tok.detokenize(tok.tokenize(images)[:, :2])
    assert torch.allclose(to_unit_range(output.predictions["image"].value), prefix, atol=1e-5)


def test_cnn_decoder_counts_masked_cells_as_zero():
    net = tiny_tokenizer(tokenizer="vqgan_tiny").decoder
    quantized = torch.randn(2, 4, 16)
    keep = torch.tensor([[True, False, True, True]]).expand(2, 4)
    zeroed = quantized.clone()
    zeroed[:, 1] = 0
    assert torch.equal(net.reconstruct(quantized, keep), net.reconstruct(zeroed))
    assert not torch.allclose(net.reconstruct(quantized), net.reconstruct(zeroed))


# ---------------------------------------------------------------------- TiTok's sequences


def before(norm):
    """What a norm is given."""
    seen = []
    norm.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("class_token", [False, True])
def test_the_encoder_reads_class_token_patches_and_latents(class_token):
    torch.manual_seed(0)
    net = awake(LatentTransformerEncoder([16, 24], 3, 8, 5, 16, 2, 2, class_token))
    images, seen = torch.randn(2, 3, 16, 24), before(net.norm_in)
    latents = net(images)
    patches = [images[:, :, y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8, 16)]
    embedded = net.patch_embed(torch.stack([p.movedim(1, 3).flatten(1) for p in patches], dim=1))
    parts = [embedded + net.patch_positions]
    parts += [(net.latent_tokens + net.latent_positions).expand(2, -1, -1)]
    if class_token:
        parts.insert(0, net.class_token.expand(2, -1, -1))
    assert torch.allclose(seen[0], torch.cat(parts, dim=1), atol=1e-5)
    # The latents are the last ones, less their means.
    expected = net.norm_out(net.transformer(net.norm_in(torch.cat(parts, dim=1))))[:, -5:]
    assert net.latent_means.all()
    assert torch.allclose(latents, expected - net.latent_means, atol=1e-5)


@pytest.mark.parametrize("class_token", [False, True])
def test_the_decoder_reads_class_token_mask_tokens_and_latents(class_token):
    net = awake(decoder(class_token))
    quantized, seen = torch.randn(2, 6, 12), before(net.norm_in)
    for length in (6, 2):
        net.reconstruct(quantized[:, :length])
        parts = [(net.mask_token + net.patch_positions).expand(2, -1, -1)]
        parts += [net.embed(quantized[:, :length]) + net.latent_positions[:length]]
        if class_token:
            parts.insert(0, net.class_token.expand(2, -1, -1))
        assert torch.allclose(seen[-1], torch.cat(parts, dim=1), atol=1e-5)


@pytest.mark.parametrize("border", ["black", "edge"])
def test_a_convolution_goes_across_the_seams(border):
    torch.manual_seed(0)
    net = awake(LatentTransformerDecoder([16, 24], 3, 8, 6, 12, 16, 1, 2, border=border))
    features = torch.randn(2, 6, 16)
    images = net.head(features).view(2, 2, 3, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 16, 24)  # fmt: skip
    around = -torch.ones(2, 3, 18, 26)
    around[:, :, 1:-1, 1:-1] = images
    if border == "edge":
        rows, columns = torch.arange(-1, 17).clamp(0, 15), torch.arange(-1, 25).clamp(0, 23)
        around = images[:, :, rows][:, :, :, columns]
    expected = F.conv2d(around, net.smooth.weight, net.smooth.bias)
    assert torch.allclose(net.paint(features), expected, atol=1e-4)


def test_residual_convolutions_start_as_the_linear_head():
    """Set from data, the pixels are those of the linear head that fits the images best."""
    nets, images = [], torch.randn(6, 3, 16, 24)
    quantized = torch.randn(6, 6, 12)
    for cls in (LatentTransformerDecoder, LatentTransformerConvDecoder):
        torch.manual_seed(0)
        options = {} if cls is LatentTransformerDecoder else {"cell_size": 4, "cell_channels": 50}
        net = cls([16, 24], 3, 8, 6, 12, 16, 1, 2, **options)
        if nets:
            shared = {k: v for k, v in nets[0].state_dict().items() if "head" not in k}
            net.load_state_dict(
                {k: v for k, v in shared.items() if "smooth" not in k}, strict=False
            )
        net.initialize(quantized, images)
        nets.append(net)
    linear, conv = (net.reconstruct(quantized) for net in nets)
    assert torch.allclose(conv, linear, atol=1e-5)
    assert conv.var() > 0.01


def test_residual_convolutions_lay_out_cells_and_work_on_them():
    torch.manual_seed(0)
    net = awake(LatentTransformerConvDecoder([16, 24], 3, 8, 6, 12, 16, 1, 2, 4, 50, 2))
    features = torch.randn(2, 6, 16)
    cells = net.head(features).view(2, 2, 3, 2, 2, 50)  # rows, columns of patches; of cells in them
    cells = cells.permute(0, 5, 1, 3, 2, 4).reshape(2, 50, 4, 6)
    for block in net.blocks:
        y = block.conv1(F.silu(F.group_norm(cells, block.norm1.num_groups, *affine(block.norm1))))
        y = block.conv2(F.silu(F.group_norm(y, block.norm2.num_groups, *affine(block.norm2))))
        cells = cells + y
    last = F.conv2d(cells, net.conv_out.weight, net.conv_out.bias, padding=1)
    expected = last.view(2, 3, 4, 4, 4, 6).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 24)
    assert torch.allclose(net.paint(features), expected, atol=1e-4)
    assert net.last_layer is net.conv_out.weight


def affine(norm):
    return norm.weight, norm.bias, norm.eps


def test_a_vit_block_is_torchs():
    torch.manual_seed(0)
    ours = awake(Block(16, 2))
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, F.gelu, batch_first=True, norm_first=True)  # fmt: skip
    names = {
        "attn.qkv": "self_attn.in_proj",
        "attn.proj": "self_attn.out_proj",
        "mlp.0": "linear1",
        "mlp.2": "linear2",
    }
    state = {}
    for key, value in ours.state_dict().items():
        part, _, kind = key.rpartition(".")
        joint = "_" if part == "attn.qkv" else "."
        state[names.get(part, part) + joint + kind] = value
    theirs.load_state_dict(state)
    x = torch.randn(3, 7, 16)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


# ---------------------------------------------------------------------- initialisation


@both
def test_initialisation_helps_and_is_deterministic(tokenizer):
    images = images_of(48)
    fresh, errors, states = images_of(64)[48:], [], []
    for _ in range(2):
        tok = tiny_tokenizer("quantizer.codebook_size=64", tokenizer=tokenizer)
        before = mse(tok, fresh)
        torch.manual_seed(1)
        tok.initialize(tok.to_model_range(images))
        assert not tok.training
        errors.append((before, mse(tok, fresh)))
        states.append(tok.state_dict())
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
    before, after = errors[0]
    assert errors[0] == errors[1]
    mean = (fresh.float() / 255).mean(dim=(0, 2, 3), keepdim=True)
    trivial = (fresh.float() / 255 - mean).square().mean().item()
    assert after < 0.9 * before
    if tokenizer == "titok_tiny":  # the CNN sets its last layer alone
        assert after < trivial  # better than the best flat colour


def mse(tok, images):
    return (tok.detokenize(tok.tokenize(images)) - images.float() / 255).square().mean().item()


@pytest.mark.parametrize("tokenizer", ["titok_tiny", "flextok_tiny", "hita_tiny"])
def test_what_a_latent_says_of_its_place_is_taken_off(tokenizer):
    """Over the images of the start its mean is zero; it learns from there."""
    tok = tiny_tokenizer(tokenizer=tokenizer)
    images = tok.to_model_range(images_of(40))
    with torch.no_grad():
        before = tok.encoder(images).mean(dim=0)
        tok.encoder.initialize(images)
        after = tok.encoder(images).mean(dim=0)
    assert before.abs().max() > 0.1 and after.abs().max() < 1e-4


def test_initialize_keeps_the_mode():
    tok = tiny_tokenizer().train()
    tok.initialize(tok.to_model_range(images_of(16)))
    assert tok.training and tok.quantizer.training


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize("channels", [1, 3])
def test_patchify_is_cut_by_hand_and_unpatchify_its_inverse(channels):
    images = torch.randn(2, channels, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 16 * channels)
    by_hand = images[1, :, 4:8, 8:12].permute(1, 2, 0).flatten()  # row 1, column 2
    assert torch.equal(patches[1, 5], by_hand)
    assert torch.equal(unpatchify(patches, (2, 3), 4), images)


def test_pad_edges_is_replicate_padding():
    images = torch.randn(2, 3, 4, 5)
    assert torch.equal(pad_edges(images), F.pad(images, (1, 1, 1, 1), mode="replicate"))


def test_grid_of():
    assert grid_of(16, 8) == (2, 2) and grid_of([16, 24], 8) == (2, 3)
    with pytest.raises(ConfigError, match=r"data\.image_size=20.*8 px.*data\.image_size=16"):
        grid_of(20, 8)
    with pytest.raises(ConfigError, match=r"\[16, 20\]"):
        grid_of([16, 20], 8)


@pytest.mark.parametrize(
    ("count", "grid"),
    [(64, (8, 8)), (6, (2, 3)), (32, (16, 16)), (5, (4, 4)), (1, (3, 3)), (100, (2, 2))],
)
def test_points_are_spread(count, grid):
    points = spread_points(count, grid)
    assert points.shape == (count, 2) and len(points.unique(dim=0)) == count
    assert (points > -0.5).all() and (points < torch.tensor(grid) - 0.5).all()
    if count == grid[0] * grid[1]:
        assert torch.allclose(points, grid_points(grid))


@pytest.mark.parametrize("grid", [(8, 8), (4, 6)])
def test_nested_points_cover_the_grid_at_every_length(grid):
    count = grid[0] * grid[1]
    rows, nested = spread_points(count, grid), spread_points(count, grid, nested=True)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, nested.tolist()))
    patches = grid_points(grid)
    for k in (2, 4, 8, count // 2):
        reach = [
            torch.cdist(patches, points[:k]).min(dim=1).values.max() for points in (rows, nested)
        ]
        assert reach[1] < reach[0], k


@pytest.mark.parametrize("nested", [False, True])
def test_latents_start_at_those_points_on_both_sides(nested):
    parts = [LatentTransformerEncoder(32, 3, 8, 8, 16, 1, 2, nested=nested)]
    parts += [LatentTransformerDecoder(32, 3, 8, 8, 12, 16, 1, 2, nested=nested)]
    flow = FlowDecoder(32, 3, 8, 8, 12, 16, 1, 2, nested=nested)
    points = spread_points(8, (4, 4), nested)
    assert nested != torch.equal(points, spread_points(8, (4, 4)))
    expected = position_table(points, 16, 8, (4, 4))
    for positions in (*(part.latent_positions for part in parts), flow.register_positions):
        assert torch.equal(positions, expected)


def test_principal_components_equal_an_svd():
    rows = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + 3
    mean, components, deviations = principal_components(rows, 4)
    assert torch.allclose(mean.double(), rows.mean(0), atol=1e-5)
    _, s, v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert torch.allclose(deviations.double(), s[:4] / 199**0.5, rtol=1e-4)
    assert torch.allclose((components.double() @ v[:4].T).abs(), torch.eye(4).double(), atol=1e-4)


def test_least_squares_equals_lstsq():
    x, y = torch.randn(300, 5).double(), torch.randn(300, 3).double()
    y += x @ torch.randn(5, 3).double() + 2
    weight, bias = least_squares(x.float(), y.float(), ridge=0.0)
    full = torch.linalg.lstsq(torch.cat([x, torch.ones(300, 1)], dim=1), y).solution
    assert torch.allclose(weight.double(), full[:5].T, atol=1e-4)
    assert torch.allclose(bias.double(), full[5], atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_equals_the_fused_kernel(masked):
    q, k, v = torch.randn(3, 2, 4, 7, 8).bfloat16()
    mask = (torch.rand(2, 1, 1, 7) > 0.4) if masked else None
    if mask is not None:
        mask[..., 0] = True
    with torch.enable_grad():
        plain = attend(q, k, v, mask)
    with torch.no_grad():
        fused = attend(q, k, v, mask)
    exact = attend(q.float(), k.float(), v.float(), mask)
    assert torch.allclose(plain.float(), exact, atol=0.03) and torch.allclose(
        fused.float(), exact, atol=0.03
    )


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for flag in (False, True):
        torch.manual_seed(0)
        net = Transformer(16, 2, 2, activation_checkpointing=flag)
        x = torch.randn(2, 5, 16)
        net(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
