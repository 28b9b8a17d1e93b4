"""Discriminators."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from vistok.core.registry import register
from vistok.core.values import Count
from vistok.nn.conv import group_norm


@register("patch_discriminator")
class PatchDiscriminator(nn.Module):
    """Convolutions of stride 2 down to one logit for each overlapping patch (PatchGAN).

    Group norms stand where the paper has batch norms, whose statistics would make an image's
    logits depend on its batch and its rank.

    Paper: Isola et al. 2017, https://arxiv.org/abs/1611.07004.

    Args:
        channels: C of the images.
        base_channels: width of the first layer; each later one is twice as wide, up to 8 times.
        num_layers: how often the resolution is halved; images must have at least 2^(this + 2)
            pixels on a side.
    """

    def __init__(
        self, channels: Count = 3, base_channels: Count = 64, num_layers: Count = 3
    ) -> None:
        super().__init__()
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (narrow, wide) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if i < num_layers else 1
            conv = nn.Conv2d(narrow, wide, 4, stride, 1, bias=False)
            layers += [conv, group_norm(wide), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, 1, h, w)` of images `(B, C, H, W)` in [-1, 1]; positive for real ones."""
        return self.layers(images)
