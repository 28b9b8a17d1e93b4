"""StyleGAN's discriminator, in the form that tokenizers train with."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.geometry import as_pair
from vistok.core.registry import register
from vistok.core.taps import NO_TAPS, Taps
from vistok.core.values import Count, ImageSize, Index
from vistok.losses.gan.discriminators import Discriminator, places_first

_LAST = 4  # side of the map behind which linear layers come


class Blur(nn.Module):
    """Filter `(B, C, H, W)` by (1, 2, 1) along both sides; borders are reflected."""

    def __init__(self) -> None:
        super().__init__()
        self.f: Tensor
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered map, of the same size."""
        taps = self.f / self.f.sum()
        kernel = (taps[:, None] * taps).to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel, groups=x.shape[1])


class Block(nn.Module):
    """Two convolutions and a blurred downsampling, next to a projection; halves the size.

    Args:
        narrow: channels of the input.
        wide: channels of the output.
    """

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(narrow, wide, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(narrow, wide, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(wide, wide, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(wide, wide, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', ceil(H/2), ceil(W/2))`."""
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


def minibatch_deviation(x: Tensor, group: int) -> Tensor:
    """Return `(B, 1, h, w)`: how much images of a group differ, one number per group.

    Image i shares its group with i + M, i + 2M, ..., where M is B over the group's size; deviations
    over the group are averaged over everything else.

    Args:
        x: `(B, C, h, w)`.
        group: images in a group; the largest divisor of B up to that is taken.
    """
    batch = x.shape[0]
    size = next(n for n in range(min(group, batch), 0, -1) if batch % n == 0)
    grouped = x.float().view(size, batch // size, *x.shape[1:])
    deviation = (grouped.var(0, correction=0) + 1e-8).sqrt().flatten(1).mean(1)
    return deviation.repeat(size).view(batch, 1, 1, 1).expand(-1, -1, *x.shape[2:]).to(x.dtype)


@register("stylegan_discriminator")
class StyleGANDiscriminator(Discriminator):
    """Residual blocks with blurred downsampling to 4x4, then one logit for the image.

    Paper: Karras et al. 2019, https://arxiv.org/abs/1912.04958; layers as in LlamaGen, whose
    weights load, without equalized learning rates.

    Args:
        image_size: side in pixels, or (H, W).
        channels: C of the images.
        base: the width at a resolution of s pixels is this over s, up to `most_channels`.
        most_channels: largest width.
        minibatch_group: images whose deviation is one more channel in front of the last
            convolution (Karras et al. 2017, https://arxiv.org/abs/1710.10196), 4 in StyleGAN2; an
            image's logit then depends on its batch on its rank. 0 for none, as in LlamaGen.
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count = 3,
        base: Count = 16384,
        most_channels: Count = 512,
        minibatch_group: Index = 0,
    ) -> None:
        super().__init__()
        sides = as_pair(image_size)
        if min(sides) < _LAST:
            raise ArgumentError(f"image_size={image_size}: must be at least {_LAST} pixels")
        halvings = int(math.log2(min(sides) / _LAST))
        widths = [base * 2**i // max(sides) for i in range(halvings + 1)]
        widths = [min(most_channels, max(1, width)) for width in widths]
        rows, columns = (math.ceil(side / 2**halvings) for side in sides)
        self.blocks = nn.ModuleList(
            [
                nn.Conv2d(channels, widths[0], 3, padding=1),
                nn.LeakyReLU(0.2),
                *(Block(narrow, wide) for narrow, wide in itertools.pairwise(widths)),
            ]
        )
        self.minibatch_group = minibatch_group
        last = widths[-1]
        self.final_conv = nn.Sequential(
            nn.Conv2d(last + bool(minibatch_group), last, 3, padding=1), nn.LeakyReLU(0.2)
        )
        self.final_linear = nn.Sequential(
            nn.Linear(last * rows * columns, last), nn.LeakyReLU(0.2), nn.Linear(last, 1)
        )
        self.taps = tuple(f"stage.{i}" for i in range(halvings + 1))

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return logits `(B, 1)` of images `(B, C, H, W)` in [-1, 1], of the size given."""
        x = images
        for number, block in enumerate(self.blocks, start=-1):
            x = block(x)
            if number >= 0:
                taps.offer(f"stage.{number}", places_first(x))
        if self.minibatch_group:
            x = torch.cat([x, minibatch_deviation(x, self.minibatch_group)], dim=1)
        return self.final_linear(self.final_conv(x).flatten(1))
