"""CNNs start as maps that hand on what they see: by principal components and least squares."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import config_of, images_of
from vistok.models.build import build_tokenizer
from vistok.models.cnn import CNNDecoder, CNNEncoder
from vistok.nn.conv import DepthToSpace, OutputSkipBlock, ResBlock, SpatialAttention, Upsample
from vistok.nn.data_init import pixels, start_block_, start_conv_, start_upsampling_


def photographs(count=24, size=16):
    return images_of(count, size=size).float() / 127.5 - 1


def unexplained(features, targets):
    """Share of the variance of `targets` that no linear map of `features` gives back; float64."""
    x, y = features.double(), targets.double()
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    rest = y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    return (rest.square().sum() / y.square().sum()).item()


def test_a_wide_convolution_keeps_everything_on_one_scale():
    maps = torch.randn(4, 5, 8, 8) * torch.tensor([4.0, 2, 1, 0.5, 0.1]).view(-1, 1, 1) + 3
    conv = nn.Conv2d(5, 16, 3, padding=1)
    start_conv_(conv, maps, reference=0.7)
    rows = pixels(conv(maps)).double()
    means = torch.tensor([0.7, -0.7]).double().repeat(8)
    assert torch.allclose(rows.mean(dim=0), means, atol=1e-4)
    assert rows.var(dim=0).mean().item() == pytest.approx(1, rel=1e-2)
    # A rotation: distances between pixels stay in proportion.
    before, after = torch.pdist(pixels(maps).double()), torch.pdist(rows)
    assert torch.allclose(after, before * (after / before).mean(), rtol=1e-3)


def test_a_narrow_stride_keeps_the_strongest_components():
    torch.manual_seed(0)
    maps = photographs()
    conv = nn.Conv2d(3, 4, 3, stride=2)
    start_conv_(conv, maps)
    windows = pixels(F.pixel_unshuffle(maps, 2))
    variances = torch.linalg.eigvalsh(windows.double().T.cov())
    lost = unexplained(pixels(conv(F.pad(maps, (0, 1, 0, 1)))).detach(), windows)
    assert lost == pytest.approx((variances[:-4].sum() / variances.sum()).item(), rel=1e-3)


@pytest.mark.parametrize("kind", [DepthToSpace, Upsample])
def test_upsampling_gives_the_pixels_at_its_new_size(kind):
    torch.manual_seed(0)
    maps, wanted = torch.randn(8, 12, 4, 4), torch.randn(8, 6, 8, 8)
    if kind is DepthToSpace:  # every pixel can be told
        wanted = F.pixel_shuffle(maps, 2)
    else:  # what lies under a cell is that cell
        wanted = F.interpolate(maps[:, :6], scale_factor=2.0)
    layer = kind(12)
    start_upsampling_(layer, maps, wanted)
    out = layer(maps).detach()
    assert unexplained(pixels(out), pixels(wanted)) < 1e-4
    assert out.var().item() == pytest.approx(1, abs=0.6)


def test_upsampling_is_nearest_pixels_and_a_convolution():
    """Value and gradients of the definition; the sum of four shifted kernels is one of 4 x 4."""
    torch.manual_seed(0)
    maps, layer = torch.randn(2, 6, 5, 7).double(), Upsample(6).double()
    wanted, inputs = [], (maps.requires_grad_(), layer.conv.weight, layer.conv.bias)
    probe = torch.randn(2, 6, 10, 14).double()
    for forward in (
        layer,
        lambda x: layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")),
    ):
        out = forward(maps)
        wanted.append((out, *torch.autograd.grad((out * probe).sum(), inputs)))
    for found, expected in zip(*wanted, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


def test_blocks_start_as_their_skip():
    maps = torch.randn(2, 8, 4, 4)
    for block in (ResBlock(8, 8), SpatialAttention(8)):
        assert not torch.allclose(block(maps), maps)
        start_block_(block, maps)
        assert torch.allclose(block(maps), maps, atol=1e-6)
        out = (block(maps) * torch.randn_like(maps)).sum()
        out.backward()
        last = block.conv2 if isinstance(block, ResBlock) else block.proj
        assert last.weight.grad.abs().sum() > 0  # it learns from the first step
    wider = ResBlock(8, 16)
    start_block_(wider, maps)
    assert unexplained(pixels(wider(maps)).detach(), pixels(maps)) < 1e-6


def test_a_block_that_drops_its_input_starts_as_a_rotation_of_it():
    """MaskBit's, where channels change: with a last convolution of zero it would say nothing."""
    torch.manual_seed(0)
    maps, block = torch.randn(8, 16, 4, 4), OutputSkipBlock(16, 32)
    start_block_(block, maps)
    out = block(maps)
    assert unexplained(pixels(out).detach(), pixels(maps)) < 0.3
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


def test_maskbit_starts_with_many_codes_and_a_picture():
    """It started with one code, a grey picture and no gradient in the encoder."""
    torch.manual_seed(0)
    words = ["data.image_size=16", "tokenizer.encoder.base_channels=32"]
    tok = build_tokenizer(config_of("experiment=maskbit_tiny", *words))
    images = images_of(64)
    tok.initialize(images)
    tok.eval()
    assert tok.tokenize(images).unique().numel() > 50
    error = (tok.detokenize(tok.tokenize(images)) - images / 255).square().mean()
    assert error < 0.75 * (images / 255).var()
    tok.train()
    output = tok(tok.to_model_range(images[:8]))
    (output.predictions["image"].value - tok.to_model_range(images[:8])).square().mean().backward()
    assert tok.encoder.conv_in.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("latent_dim", [None, 48])
def test_an_encoder_says_at_once_what_it_sees(latent_dim):
    """Also how bright an image is, which a norm over the image takes from a random network."""
    images = photographs(32)
    targets = pixels(F.pixel_unshuffle(images, 4))
    torch.manual_seed(0)
    net = CNNEncoder(16, 3, 32, [1, 2], 1, 2, attention=False, latent_dim=latent_dim)
    assert net.dim == (latent_dim or 64)
    before = unexplained(net(images).flatten(0, 1).detach(), targets)
    net.initialize(images)
    after = unexplained(net(images).flatten(0, 1).detach(), targets)
    assert after < before / 4 and after < 0.1, (before, after)


@pytest.mark.parametrize("upsample", ["nearest", "depth_to_space"])
@pytest.mark.parametrize("adaptive_norm", [False, True])
def test_a_decoder_paints_at_once_what_it_is_told(upsample, adaptive_norm):
    images = photographs(32)
    latents = pixels(F.pixel_unshuffle(images, 4)).unflatten(0, (32, 16))
    torch.manual_seed(0)
    net = CNNDecoder(16, 3, 48, 32, [1, 2], 1, 2, False, upsample, adaptive_norm)
    net.initialize(latents, images)
    error = (net.reconstruct(latents) - images).square().mean()
    # Better than the best flat colour of each cell; where norms at each level take their part of
    # the image's own brightness and contrast, of each 2 x 2 cells.
    side = 8 if adaptive_norm else 4
    cells = F.avg_pool2d(images, side)
    flat = (F.interpolate(cells, scale_factor=float(side)) - images).square().mean()
    assert error < flat, (error, flat)


def test_a_start_draws_alike_on_all_ranks():
    images, states = photographs(8), []
    for _ in range(2):
        torch.manual_seed(5)
        net = CNNEncoder(16, 3, 8, [1, 2], num_res_blocks=1, stem=2, attention=True)
        net.initialize(images)
        states.append(torch.cat([p.flatten() for p in net.parameters()]))
    assert torch.equal(*states)
