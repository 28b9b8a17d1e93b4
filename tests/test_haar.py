"""Haar wavelets against their definition."""

import torch

from vistok.nn.patches import haar, unfold_haar


def test_a_level_against_its_definition():
    """Mean, then half the mean differences of rows, of columns and of diagonals."""
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    bands = haar(x, 2)
    assert bands.shape == (2, 12, 2, 3)
    signs = torch.tensor(
        [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]
    )
    for band, sign in enumerate(signs):
        for row in range(2):
            for column in range(3):
                square = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                expected = (square * sign).sum(dim=(2, 3)) / 4
                found = bands[:, 3 * band : 3 * band + 3, row, column]
                torch.testing.assert_close(found, expected)


def test_levels_come_back():
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)).double()
    for side in (1, 2, 4, 8):
        bands = haar(x, side)
        assert bands.shape == (2, 3 * side * side, 16 // side, 24 // side)
        torch.testing.assert_close(unfold_haar(bands, side), x)
        means = x.unflatten(2, (-1, side)).unflatten(4, (-1, side)).mean(dim=(3, 5))
        torch.testing.assert_close(bands[:, :3], means)
