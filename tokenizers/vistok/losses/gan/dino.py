"""A discriminator of heads on the features of a frozen network (StyleGAN-T, VAR, DINO-S)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.taps import NO_TAPS, Taps
from vistok.core.values import Count
from vistok.losses.gan.discriminators import Discriminator
from vistok.models.backbone import Backbone
from vistok.nn.frozen import Frozen

_VIRTUAL = 8  # images that are normalized together


class LocalBatchNorm(nn.Module):
    """Normalize channels over up to 8 neighboring images of a batch, without running statistics.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, N)` to the same shape, in float32."""
        batch = x.shape[0]
        groups = next(n for n in range(math.ceil(batch / _VIRTUAL), batch + 1) if batch % n == 0)
        grouped = x.float().view(groups, -1, *x.shape[1:])
        mean = grouped.mean((1, 3), keepdim=True)
        variance = grouped.var((1, 3), correction=0, keepdim=True)
        normalized = ((grouped - mean) / (variance + 1e-6).sqrt()).view(x.shape)
        return normalized * self.weight[:, None] + self.bias[:, None]


class Residual(nn.Module):
    """Return (f(x) + x) / sqrt(2).

    Args:
        fn: f, which keeps the shape.
    """

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, N)` to the same shape."""
        return (self.fn(x) + x) / math.sqrt(2)


def _conv(width_in: int, width_out: int, size: int, spectral: bool) -> nn.Module:
    conv = nn.Conv1d(width_in, width_out, size, padding=size // 2, padding_mode="circular")
    return spectral_norm(conv, eps=1e-12) if spectral else conv


def _block(width: int, size: int, norm: str, spectral: bool) -> nn.Sequential:
    groups = math.gcd(32, width)
    own = LocalBatchNorm(width) if norm == "batch" else nn.GroupNorm(groups, width, eps=1e-6)
    return nn.Sequential(_conv(width, width, size, spectral), own, nn.LeakyReLU(0.2))


@register("dino_discriminator")
class DinoDiscriminator(Discriminator):
    """Heads of convolutions along the tokens of several layers of a frozen network.

    Paper: Sauer et al. 2023, https://arxiv.org/abs/2301.09515; heads as in VAR and ImageFolder,
    whose weights load. Gradients pass through the network, which is in no checkpoint.

    Args:
        name: of a model in timm, or "packaged_lite0".
        weights: a local file; None for timm's own, from the cache or the network.
        input_size: side of the squares that images are resized to, in pixels.
        layers: see `Backbone`.
        kernel_size: of the second convolution of each head, odd.
        norm: "group" depends on the image alone; "batch" normalizes up to 8 images of a rank
            together, as released.
        spectral: bound the weights of the heads by spectral norm, Miyato et al. 2018,
            https://arxiv.org/abs/1802.05957. One step of the power iteration per forward.
        tanh_gelu: compute GELU by tanh, as released; the network was trained without.
    """

    def __init__(
        self,
        name: str = "vit_small_patch16_224.dino",
        weights: str | None = None,
        input_size: Count = 224,
        layers: Sequence[int] = (-1, 2, 5, 8, 11),
        kernel_size: Count = 9,
        norm: Literal["group", "batch"] = "group",
        spectral: bool = True,
        tanh_gelu: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ArgumentError(f"kernel_size={kernel_size}: must be odd")
        backbone = Backbone(name, weights, input_size, layers, tanh_gelu)
        self.backbone = Frozen(backbone)
        self.heads = nn.ModuleList(
            nn.Sequential(
                _block(width, 1, norm, spectral),
                Residual(_block(width, kernel_size, norm, spectral)),
                _conv(width, 1, 1, spectral),
            )
            for width in backbone.widths
        )
        self.taps = tuple(f"stage.{i}" for i in range(len(self.heads)))

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return logits `(B, all places)` of images `(B, C, H, W)` in [-1, 1]."""
        logits = []
        for number, features in enumerate(self.backbone.module(images)):
            # Stack of head and its last layer, so that what the last layer sees can be tapped.
            seen = self.heads[number][:2](features)  # type: ignore[index]
            taps.offer(f"stage.{number}", seen.transpose(1, 2))
            logits.append(self.heads[number][2](seen).flatten(1))  # type: ignore[index]
        return torch.cat(logits, dim=1)

    def our_name(self, published: str) -> str:
        """Return our name of a tensor under spectral norm."""
        stem, _, kind = published.rpartition(".")
        own = {"weight_orig": "original", "weight_u": "0._u", "weight_v": "0._v"}
        return f"{stem}.parametrizations.weight.{own[kind]}" if kind in own else published
