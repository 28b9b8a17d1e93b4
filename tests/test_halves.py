"""Attention starts where a token reads the two halves of its part of the image."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import config_of, images_of
from vistok.models.build import build_tokenizer
from vistok.nn.data_init import pixels, start_at_target_
from vistok.nn.halves import half_offset, halves_maps, side_of
from vistok.nn.positions import (
    grid_points,
    level_points,
    position_table,
    shift_matrix,
    sincos_positions,
)
from vistok.nn.qformer import CrossAttention, pooling_pyramid, read_by_position_


def test_a_part_is_halved_along_its_longer_side():
    assert half_offset((4, 8), (8, 8)) == (0.5, 0.0)  # 2 x 1 cells: one up, one down
    assert half_offset((8, 8), (8, 16)) == (0.0, 0.5)
    assert half_offset((1, 1), (8, 8)) == (0.0, 2.0)
    assert [side_of(head, 4) for head in range(4)] == [-1, -1, 1, 1]
    assert side_of(0, 1) == 0


@pytest.mark.parametrize("offset", [(0.5, 0.0), (-1.25, 2.0)])
def test_shifted_positions_are_the_positions_of_shifted_points(offset):
    points = torch.rand(7, 2) * 8
    moved = sincos_positions(points + torch.tensor(offset), 16, (8, 8))
    assert torch.allclose(
        sincos_positions(points, 16, (8, 8)) @ shift_matrix(offset, 16, (8, 8)).T, moved, atol=1e-5
    )


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_two_halves_become_their_mean_and_difference(mean):
    """By hand, for heads that each read one cell."""
    values, output = halves_maps(8, mean)
    first, second = torch.randn(8), torch.randn(8)
    heads = torch.cat([(values @ first)[:4], (values @ second)[4:]])  # two heads of four channels
    expected = torch.cat([mean * (first + second)[:4], (first - second)[:4] / 2])
    assert torch.allclose(output @ heads, expected, atol=1e-6)


@pytest.mark.parametrize("grid", [(8, 8), (8, 16)])
def test_queries_start_at_the_halves_of_their_parts(grid):
    """Every token of the finest level reads its first cell with one head, its last with the other."""
    torch.manual_seed(0)
    width, level = 64, pooling_pyramid(grid[0] * grid[1])[-1]
    attention = CrossAttention(width, 2)
    read_by_position_(attention, width // 2, level, grid)
    cells = position_table(grid_points(grid), width, width // 2, grid)
    tokens = position_table(level_points([level], grid), width, width // 2, grid)
    q, k = attention.q.weight.unflatten(0, (2, -1)), attention.k.weight.unflatten(0, (2, -1))
    read = torch.stack([((tokens @ q[h].T) @ (cells @ k[h].T).T).argmax(1) for h in range(2)])
    rows, columns = grid[0] // level[0], grid[1] // level[1]
    numbers = torch.arange(grid[0] * grid[1]).view(level[0], rows, level[1], columns)
    parts = numbers.permute(0, 2, 1, 3).reshape(-1, rows * columns)
    assert rows * columns == 2
    assert torch.equal(read.T, parts)


@pytest.mark.parametrize("kind", ["convolution", "wide convolution", "linear"])
def test_a_layer_starts_at_what_its_input_says_of_the_pixels(kind):
    """Next to channels that say nothing and are louder, nothing that tells pixels is lost."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 16, 16)
    noise = 10 * torch.randn(16, 20 if kind != "wide convolution" else 300, 8, 8)
    maps = torch.cat([noise, F.pixel_unshuffle(images, 2)], dim=1)
    channels = maps.shape[1]
    layer = nn.Linear(channels, 14) if kind == "linear" else nn.Conv2d(channels, 14, 3, padding=1)
    start_at_target_(layer, maps, images)
    with torch.no_grad():
        found = layer(maps.movedim(1, -1)).movedim(-1, 1) if kind == "linear" else layer(maps)
    x, y = pixels(found).double(), pixels(F.pixel_unshuffle(images, 2)).double()
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    rest = y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    lost = (rest.square().sum() / y.square().sum()).item()
    assert lost < (0.1 if kind == "wide convolution" else 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retok_whole_tiny", "restok_whole_tiny"])
def test_a_start_from_data_shows_pictures(name):
    """By 4 dB better than each picture's mean color, before the first step.

    Without the halves and the pixels it was 3.1 dB for ReTok and none for ResTok.
    """
    torch.manual_seed(0)
    config = config_of(f"experiment={name}")
    tokenizer = build_tokenizer({key: config[key] for key in ("tokenizer", "quantizer")})
    images = images_of(96, size=64)
    tokenizer.initialize(images)
    tokenizer.eval()
    with torch.no_grad():
        found = tokenizer.detokenize(tokenizer.tokenize(images))
    wanted = images.float() / 255
    error = (found - wanted).square().mean()
    flat = (wanted - wanted.mean(dim=(2, 3), keepdim=True)).square().mean()
    assert 10 * torch.log10(flat / error) > 4
