"""Residual blocks and resampling of the convolutional tokenizers (VQGAN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError


def group_norm(channels: int, affine: bool = True, groups: int | None = None) -> nn.GroupNorm:
    """GroupNorm of `groups`; by default up to 32 that divide `channels` into two or more each."""
    if groups is None:
        groups = next(
            g for g in (32, 16, 8, 4, 2, 1) if (channels % g == 0 and channels // g >= 2) or g == 1
        )
    if channels % groups:
        raise ArgumentError(f"norm_groups={groups}: must divide {channels}, a number of channels")
    return nn.GroupNorm(groups, channels, eps=1e-6, affine=affine)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose scale and shift follow from a map of latents.

    The scale is a linear map of the deviations of the latents' channels over the image, the
    shift one of their means: what a normalised map has lost, the whole image tells it. Starts as
    a plain norm.

    Args:
        channels: C of the map that is normalised.
        latent_channels: D of the latents.
        groups: of the norm, see `group_norm`.
        correction: 1 for deviations with n - 1 in the denominator (Open-MAGVIT2), 0 for n; a single
            cell has a deviation of 0 either way.
    """

    takes_latents = True

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        groups: int | None = None,
        correction: int = 0,
    ) -> None:
        super().__init__()
        self.correction = correction
        self.norm = group_norm(channels, affine=False, groups=groups)
        self.scale = nn.Linear(latent_channels, channels)
        self.shift = nn.Linear(latent_channels, channels)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.ones_(self.scale.bias)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, H, W)`, given latents `(B, D, h, w)`."""
        flat = latents.flatten(2).float()
        # Of no images torch would warn.
        correction = min(self.correction, flat.shape[2] - 1)
        variances = (
            flat.var(dim=2, correction=correction) if flat.shape[0] > 0 else flat.mean(dim=2)
        )
        deviations = (variances + 1e-6).sqrt()  # the root of a variance of zero has no gradient
        scale = self.scale(deviations.to(latents.dtype))[..., None, None]
        shift = self.shift(flat.mean(dim=2).to(latents.dtype))[..., None, None]
        return scale * self.norm(x) + shift


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift at each place follow from the latent there.

    MoVQ (Zheng et al. 2022, https://arxiv.org/abs/2209.09002). Starts as a plain norm.

    Args:
        channels: C of the map that is normalised.
        latent_channels: D of the latents.
        groups: of the norm, see `group_norm`.
    """

    def __init__(self, channels: int, latent_channels: int, groups: int | None = None) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups=groups)
        self.scale = nn.Conv2d(latent_channels, channels, 1)
        self.shift = nn.Conv2d(latent_channels, channels, 1)
        for parameter in (*self.scale.parameters(), *self.shift.parameters()):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.scale.bias)  # pyright: ignore[reportArgumentType] (it has one)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, H, W)`, given latents `(B, D, h, w)`."""
        # The 1x1 convolutions are cheaper before the resize, and give the same.
        scale, shift = (
            F.interpolate(layer(latents), size=x.shape[-2:], mode="nearest")
            for layer in (self.scale, self.shift)
        )
        return scale * self.norm(x) + shift


def norm_of(
    channels: int, groups: int | None = None, latent_channels: int | None = None
) -> nn.Module:
    """Return a `group_norm`, or with `latent_channels` a `SpatialNorm` of them."""
    if latent_channels is None:
        return group_norm(channels, groups=groups)
    return SpatialNorm(channels, latent_channels, groups)


class ResBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, plus the input (1x1 projected if channels change).

    Args:
        channels_in: C of the input.
        channels_out: C of the output.
        bias: of the convolutions.
        groups: of the norms, see `group_norm`.
        latent_channels: of the latents that set the norms, see `SpatialNorm`; None for none.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        bias: bool = True,
        groups: int | None = None,
        latent_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.takes_latents = latent_channels is not None
        self.norm1 = norm_of(channels_in, groups, latent_channels)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)
        self.norm2 = norm_of(channels_out, groups, latent_channels)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=bias)
        self.skip = (
            nn.Identity()
            if channels_in == channels_out
            else nn.Conv2d(channels_in, channels_out, 1, bias=bias)
        )

    def forward(self, x: Tensor, *latents: Tensor) -> Tensor:
        """Map `(B, C_in, H, W)` to `(B, C_out, H, W)`."""
        y = self.conv1(F.silu(self.norm1(x, *latents)))
        y = self.conv2(F.silu(self.norm2(y, *latents)))
        return self.skip(x) + y


class OutputSkipBlock(ResBlock):
    """The residual block of MaskGIT's VQGAN.

    As `ResBlock`, without biases, and where channels change the 1x1 projection is of the *second
    convolution's output*: nothing of the input is added there. The weights that are in use were
    trained this way.

    Args:
        channels_in: C of the input.
        channels_out: C of the output.
        groups: of the norms, see `group_norm`.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int | None = None) -> None:
        super().__init__(channels_in, channels_out, groups=groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.keeps_channels = channels_in == channels_out
        if not self.keeps_channels:
            self.skip = nn.Conv2d(channels_out, channels_out, 1, bias=False)

    def forward(self, x: Tensor, *latents: Tensor) -> Tensor:
        """Map `(B, C_in, H, W)` to `(B, C_out, H, W)`."""
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + (x if self.keeps_channels else self.skip(y))


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map.

    Args:
        channels: C, in and out.
        groups: of the norm, see `group_norm`.
        latent_channels: of the latents that set the norm, see `SpatialNorm`; None for none.
    """

    def __init__(
        self, channels: int, groups: int | None = None, latent_channels: int | None = None
    ) -> None:
        super().__init__()
        self.takes_latents = latent_channels is not None
        self.norm = norm_of(channels, groups, latent_channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, *latents: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, H, W)`."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x, *latents)).view(batch, 3, 1, channels, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(-1, -2).reshape(batch, channels, height, width))


class Downsample(nn.Module):
    """Halve the size by a strided 3x3 convolution.

    Args:
        channels: C, in and out.
        centered: pad on all four sides; else at the right and the bottom alone.
    """

    def __init__(self, channels: int, centered: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=int(centered))
        self.centered = centered

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, H/2, W/2)`."""
        return self.conv(x if self.centered else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size by nearest neighbours, then a 3x3 convolution.

    Three neighbours along a side are copies of two, so that a pixel is the sum of 2x2 products and
    not of 3x3. On CPUs both are one transposed convolution, with 4/9 of the operations and without
    the large map between them; the numbers agree up to rounding. On GPUs that is not measured.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, 2H, 2W)`."""
        if x.device.type == "cpu":
            return F.conv_transpose2d(x, self._spread(), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def _spread(self) -> Tensor:
        """Return what a pixel adds to the 4 x 4 around its 2 x 2 copies, `(C, C, 4, 4)`."""
        turned = self.conv.weight.flip(2, 3).transpose(0, 1)
        places = ((0, 1, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0))
        return torch.stack([F.pad(turned, place) for place in places]).sum(0)


class DepthToSpace(nn.Module):
    """Double the size by a 3x3 convolution to four times the channels, which become 2x2 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, 2H, 2W)`."""
        return F.pixel_shuffle(self.conv(x), 2)
