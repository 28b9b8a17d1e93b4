"""The contract of a discriminator, and those of convolutions: patches (pix2pix) and MaskBit's."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.ranks import all_reduce_sum
from vistok.core.registry import register
from vistok.core.taps import NO_TAPS, Taps
from vistok.core.values import Count
from vistok.nn.conv import group_norm


class Discriminator(nn.Module, ABC):
    """Maps images to logits, positive for real ones.

    Attributes:
        taps: names of the features that every forward offers, for feature matching.
    """

    taps: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return logits `(B, ...)` of images `(B, C, H, W)` in [-1, 1].

        Args:
            images: real ones or pictures of the tokenizer.
            taps: offered the features that `self.taps` names, `(B, places, width)`.
        """

    def our_name(self, published: str) -> str:
        """Return our name of a tensor of the released discriminator; by default the same."""
        return published


def places_first(x: Tensor) -> Tensor:
    """Return a map `(B, W, h, w)` as features `(B, h * w, W)`."""
    return x.flatten(2).transpose(1, 2)


class ActNorm(nn.Module):
    """A scale and a shift for each channel, which the first batch of training sets.

    After it a channel has mean 0 and deviation 1 over that batch, of all ranks.

    Paper: Kingma and Dhariwal 2018, https://arxiv.org/abs/1807.03039; as in VQGAN.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.initialized: Tensor
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self._ready = False  # reading the buffer would wait for the GPU in every step

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = bool(self.initialized)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]).double()
        count = all_reduce_sum(sums.new_tensor([x.numel() // x.shape[1]]))
        mean, square = all_reduce_sum(sums) / count
        variance = (square - mean.square()).clamp(min=0) * count / (count - 1)
        self.loc.copy_(-mean.view_as(self.loc))
        self.scale.copy_((1 / (variance.sqrt() + 1e-6)).view_as(self.scale))
        self.initialized.fill_(1)
        self._ready = True

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, h, w)` to the same shape."""
        if self.training and not self._ready:
            self._initialize(x.float())
        return self.scale * (x + self.loc)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "group":
        return group_norm(channels)
    return nn.BatchNorm2d(channels) if kind == "batch" else ActNorm(channels)


@register("patch_discriminator")
class PatchDiscriminator(Discriminator):
    """Convolutions of stride 2 down to one logit for each overlapping patch (PatchGAN).

    Paper: Isola et al. 2017, https://arxiv.org/abs/1611.07004; starts as theirs does, with weights
    of deviation 0.02. With `norm=batch` or `norm=act` it is that of VQGAN, and released weights
    of it (`main.*`) load.

    Args:
        channels: C of the images.
        base_channels: width of the first layer; each later one is twice as wide, up to 8 times.
        num_layers: how often the resolution is halved; images must have at least 2^(this + 2)
            pixels on a side.
        norm: behind each convolution but the first and the last. "batch" is the paper's; an image's
            logits then depend on the images of its batch on its rank, and real and reconstructed
            images are normalized apart. "group" depends on the image alone. "act" is set by the
            first batch.
    """

    def __init__(
        self,
        channels: Count = 3,
        base_channels: Count = 64,
        num_layers: Count = 3,
        norm: Literal["group", "batch", "act"] = "group",
    ) -> None:
        super().__init__()
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (narrow, wide) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if i < num_layers else 1
            conv = nn.Conv2d(narrow, wide, 4, stride, 1, bias=norm == "act")
            layers += [conv, _norm(norm, wide), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.taps = tuple(f"stage.{i}" for i in range(num_layers + 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return logits `(B, 1, h, w)` of images `(B, C, H, W)` in [-1, 1]."""
        x, stage = images, 0
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU):
                taps.offer(f"stage.{stage}", places_first(x))
                stage += 1
        return x

    def our_name(self, published: str) -> str:
        """Return our name of `main.*`."""
        return published.replace("main.", "layers.", 1)


class BlurDownsample(nn.Module):
    """Halve the size by a 4x4 binomial filter, `(B, C, H, W)` to `(B, C, ceil(H/2), ceil(W/2))`."""

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = taps[:, None] * taps
        self.kernel: Tensor
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Pad with zeros, as TensorFlow does where it keeps the size, and filter."""
        rows, columns = (max((math.ceil(n / 2) - 1) * 2 + 4 - n, 0) for n in x.shape[2:])
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])


@register("maskbit_discriminator")
class MaskBitDiscriminator(Discriminator):
    """Convolutions and blurred downsampling to a grid of logits (MaskBit, TiTok, TA-TiTok).

    Sees pixels in [0, 1], as theirs does, whose weights load.

    Paper: Weber et al. 2024, https://arxiv.org/abs/2409.16211.

    Args:
        channels: C of the images.
        base_channels: width of the stem and the first stage; each later one is twice as wide.
        num_stages: how often the resolution is halved.
        grid: side of the grid of logits.
    """

    def __init__(
        self,
        channels: Count = 3,
        base_channels: Count = 128,
        num_stages: Count = 3,
        grid: Count = 16,
    ) -> None:
        super().__init__()
        self.block_in = nn.Sequential(
            nn.Conv2d(channels, base_channels, 5, padding=2), nn.LeakyReLU(0.1)
        )
        widths = [base_channels, *(base_channels * 2**i for i in range(num_stages))]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(narrow, wide, 3, padding=1),
                BlurDownsample(),
                nn.GroupNorm(math.gcd(32, wide), wide),
                nn.LeakyReLU(0.1),
            )
            for narrow, wide in itertools.pairwise(widths)
        )
        self.pool = nn.AdaptiveMaxPool2d(grid)
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(widths[-1], 1, 5, padding=2),
        )
        self.taps = tuple(f"stage.{i}" for i in range(num_stages + 1))

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Return logits `(B, 1, grid, grid)` of images `(B, C, H, W)` in [-1, 1]."""
        x = self.block_in((images + 1) / 2)
        taps.offer("stage.0", places_first(x))
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            taps.offer(f"stage.{number}", places_first(x))
        return self.to_logits(self.pool(x))
