"""Differentiable augmentation of what a discriminator sees (DiffAug)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.core.registry import register
from vistok.core.sample_random import uniform
from vistok.core.values import Count, Share, choice, filled_list

POLICIES = ("color", "translation", "cutout")

_NUMBERS = 13  # that a sample draws, whatever the policy: leaving out one moves no other


@register("diff_augment")
class DiffAugment:
    """Shifts colors, moves and cuts images, differently for each, with gradients to the pixels.

    Brightness moves by up to 0.5, saturation is scaled by 0 to 2 and contrast by 0.5 to 1.5, in
    [-1, 1]. Numbers belong to samples: ranks, accumulated batches and resumes change nothing.

    Paper: Zhao et al. 2020, https://arxiv.org/abs/2006.10738; numbers as in StyleGAN-T.

    Args:
        policy: out of color, translation and cutout.
        probability: with which each of them is applied to an image.
        translation: largest move, as a share of the side; what comes in is 0, mid-gray.
        cutout: side of the square that is set to 0, as a share of the image's.
        crop_size: side of the images that come out of a further step, each cropped at a random
            place or averaged over areas; None for none. Larger than the images it does nothing.
        crop_share: how likely a crop is.
    """

    def __init__(
        self,
        policy: Annotated[
            Sequence[str],
            filled_list(
                Annotated[str, choice(*POLICIES)], "a list out of color, translation and cutout"
            ),
        ] = POLICIES,
        probability: Share = 1.0,
        translation: Share = 0.125,
        cutout: Share = 0.2,
        crop_size: Count | None = None,
        crop_share: Share = 0.5,
    ) -> None:
        self.policy = tuple(policy)
        self.probability = probability
        self.translation = translation
        self.cutout = cutout
        self.crop_size = crop_size
        self.crop_share = crop_share

    def draw(self, images: Tensor) -> Tensor:
        """Draw the numbers `(B, 13)` in [0, 1) of a batch `(B, C, H, W)`."""
        return uniform((images.shape[0], _NUMBERS), images.device)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Augment `(B, C, H, W)` in [-1, 1], in float32, by numbers of `draw`."""
        x = images.float()
        chosen = numbers[:, :3] < self.probability
        if "translation" in self.policy:
            x = _where(chosen[:, 0], self._moved(x, numbers[:, 3:5]), x)
        if "color" in self.policy:
            x = _where(chosen[:, 1], _recolored(x, numbers[:, 5:8]), x)
        if "cutout" in self.policy:
            x = _where(chosen[:, 2], self._cut(x, numbers[:, 8:10]), x)
        if self.crop_size is not None and min(x.shape[2:]) > self.crop_size:
            size = (self.crop_size, self.crop_size)
            small = F.interpolate(x, size=size, mode="area")
            x = _where(numbers[:, 10] < self.crop_share, self._cropped(x, numbers[:, 11:13]), small)
        return x

    def _moved(self, x: Tensor, numbers: Tensor) -> Tensor:
        most = [round(side * self.translation) for side in x.shape[2:]]
        moves = [_whole(numbers[:, i], 2 * m + 1) - m for i, m in enumerate(most)]
        padded = F.pad(x, (1, 1, 1, 1))
        places = [
            (torch.arange(side, device=x.device) + move[:, None] + 1).clamp(0, side + 1)
            for side, move in zip(x.shape[2:], moves, strict=True)
        ]
        return _picked(padded, *places)

    def _cut(self, x: Tensor, numbers: Tensor) -> Tensor:
        inside = []
        for i, side in enumerate(x.shape[2:]):
            length = round(side * self.cutout)
            first = _whole(numbers[:, i], side + 1 - length % 2) - length // 2
            place = torch.arange(side, device=x.device) - first[:, None]
            inside.append((place >= 0) & (place < length))
        kept = ~(inside[0][:, :, None] & inside[1][:, None, :])
        return x * kept[:, None]

    def _cropped(self, x: Tensor, numbers: Tensor) -> Tensor:
        assert self.crop_size is not None
        places = []
        for i, side in enumerate(x.shape[2:]):
            first = _whole(numbers[:, i], side - self.crop_size + 1)
            places.append(torch.arange(self.crop_size, device=x.device) + first[:, None])
        return _picked(x, *places)


def _where(chosen: Tensor, there: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], there, otherwise)


def _whole(numbers: Tensor, choices: int) -> Tensor:
    """Map numbers in [0, 1) to whole ones below `choices`."""
    return (numbers * choices).long().clamp(max=choices - 1)


def _picked(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return x at rows `(B, h)` and columns `(B, w)` of each image: `(B, C, h, w)`."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x.movedim(1, 3)[batch, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def _recolored(x: Tensor, numbers: Tensor) -> Tensor:
    brightness, saturation, contrast = numbers.T[:, :, None, None, None]
    x = x + (brightness - 0.5)
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * (2 * saturation) + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean
