"""Emu3's encoder, decoder and tokenizer."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.signatures import OptionsOf, check_values
from vistok.core.taps import NO_TAPS, Taps
from vistok.core.values import Count
from vistok.models.cnn import CNNDecoder, CNNEncoder
from vistok.models.grid import GridTokenizer


class CausalConv(nn.Conv3d):
    """Convolution over time and space, of `(B, C, T, h, w)`; two frames of zeros go before.

    Args:
        channels: C, in and out.
        frames: length of the kernel in frames.
        side: of the kernel, in cells; odd.
        stride: in frames.
    """

    def __init__(self, channels: int, frames: int = 3, side: int = 3, stride: int = 1) -> None:
        super().__init__(channels, channels, (frames, side, side), (stride, 1, 1))
        self.border = side // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, T, h, w)` to `(B, C, (T + 2 - frames) // stride + 1, h, w)`."""
        return super().forward(F.pad(x, (*[self.border] * 4, 2, 0)))


class TemporalBlock(nn.Module):
    """norm over the batch, SiLU, causal convolution, twice, plus the input.

    Args:
        channels: C, in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv(channels)
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, T, h, w)` to the same shape."""
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


@torch.no_grad()
def _start_passing(conv: CausalConv, x: Tensor, silu: bool = True) -> None:
    """Let a convolution hand on its latest frame, each channel on one scale.

    Args:
        conv: what to set.
        x: `(B, C, T, h, w)`, samples of what it sees.
        silu: whether a SiLU follows: the values then lie where that is nearly straight.
    """
    mean, deviation = x.mean(dim=(0, 2, 3, 4)), x.std(dim=(0, 2, 3, 4)).clamp(min=1e-6)
    gain, offset = (0.5, 2.0) if silu else (1.0, 0.0)
    conv.weight.zero_()
    middle = conv.kernel_size[1] // 2
    # Of four frames and three, two lie before the first.
    conv.weight[:, :, 2, middle, middle] = torch.diag(gain / deviation)
    assert conv.bias is not None
    conv.bias.copy_(offset - gain * mean / deviation)


@torch.no_grad()
def _start_as_skips(blocks: nn.ModuleList) -> None:
    """Let residual blocks start as their skip connections, whatever their norms have seen."""
    for block in blocks:
        assert isinstance(block, TemporalBlock)
        for parameter in block.conv2.parameters():
            nn.init.zeros_(parameter)


def _doublings(frames: int) -> int:
    """Return how often one frame is doubled to become `frames`."""
    if frames & (frames - 1):
        raise ArgumentError(f"frames={frames}: must be a power of 2")
    return frames.bit_length() - 1


@register("emu3_encoder")
class Emu3Encoder(CNNEncoder):
    """`CNNEncoder` of each frame, and causal convolutions of `frames` of them to one.

    An image counts as a video that stands still (Wang et al. 2024,
    https://arxiv.org/abs/2409.18869): its latents are repeated.

    Args:
        latent_dim: D, the width of the latents.
        frames: of a token, a power of 2.
        temporal_blocks: residual blocks over time.
        **cnn: those of `CNNEncoder`.
    """

    def __init__(
        self,
        latent_dim: Count,
        frames: Count = 4,
        temporal_blocks: Count = 2,
        **cnn: Annotated[Any, OptionsOf(CNNEncoder)],
    ) -> None:
        super().__init__(latent_dim=latent_dim, **cnn)
        check_values(Emu3Encoder, locals())
        self.frames = frames
        self.shorten = nn.ModuleList(
            CausalConv(latent_dim, 4, stride=2) for _ in range(_doublings(frames))
        )
        self.blocks = nn.ModuleList(TemporalBlock(latent_dim) for _ in range(temporal_blocks))
        self.project = CausalConv(latent_dim, side=1)

    def forward(self, images: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode `(B, C, H, W)` in [-1, 1] to `(B, rows * columns, D)`, raster order."""
        x = self._video(super().forward(images, taps))
        for layer in self.shorten:
            x = F.silu(layer(x))
        for block in self.blocks:
            x = block(x)
        return self.project(x).flatten(2).transpose(1, 2)

    def _video(self, latents: Tensor) -> Tensor:
        """Return the frames `(B, D, frames, rows, columns)` of an image's latents."""
        maps = latents.transpose(1, 2).unflatten(2, self.grid)
        return maps[:, :, None].expand(-1, -1, self.frames, -1, -1)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Start as `CNNEncoder` does, and hand that on over time."""
        super().initialize(images)
        few = images[: max(8, 2**18 // images[0, 0].numel())]
        x = self._video(super().forward(few))
        for layer in self.shorten:
            assert isinstance(layer, CausalConv)
            _start_passing(layer, x)
            x = F.silu(layer(x))
        _start_as_skips(self.blocks)
        _start_passing(self.project, x, silu=False)


@register("emu3_decoder")
class Emu3Decoder(CNNDecoder):
    """`CNNDecoder` with norms that the codes set, behind causal convolutions over time.

    Of a token's frames the first is the image. The convolutions that double frames see nothing
    but zeros before it, so that the other frames are not computed.

    Args:
        latent_dim: D, the width of the quantized latents.
        frames: of a token, the encoder's.
        temporal_blocks: the encoder's.
        spatial_norm: as `CNNDecoder` has it; on as published.
        **cnn: those of `CNNDecoder`.
    """

    def __init__(
        self,
        latent_dim: Count,
        frames: Count = 4,
        temporal_blocks: Count = 2,
        spatial_norm: bool = True,
        **cnn: Annotated[Any, OptionsOf(CNNDecoder)],
    ) -> None:
        super().__init__(latent_dim=latent_dim, spatial_norm=spatial_norm, **cnn)
        check_values(Emu3Decoder, locals())
        self.project = CausalConv(latent_dim, side=1)
        self.blocks = nn.ModuleList(TemporalBlock(latent_dim) for _ in range(temporal_blocks))
        self.lengthen = nn.ModuleList(CausalConv(latent_dim) for _ in range(_doublings(frames)))

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Hand codes on over time, and start as `CNNDecoder` does from there."""
        few = max(8, 2**18 // images[0, 0].numel())
        x = quantized[:few].transpose(1, 2).unflatten(2, self.grid)[:, :, None]
        _start_passing(self.project, x, silu=False)
        x = self.project(x)
        _start_as_skips(self.blocks)
        for layer in self.lengthen:
            assert isinstance(layer, CausalConv)
            _start_passing(layer, x)
            x = F.silu(layer(x))
        super().initialize(quantized, images)

    def _mixed(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        codes = latents[:, :, None]
        # Codes for the norms go the same way as what is decoded, as one batch.
        x = torch.cat([self.project(codes), codes])
        for block in self.blocks:
            x = block(x)
        for layer in self.lengthen:
            x = F.silu(layer(x))
        x, latents = x[:, :, 0].chunk(2)
        return x, latents


@register("emu3")
class Emu3(GridTokenizer):
    """Emu3's VQ model for images: a grid of 8 px cells, codes of 4 channels.

    Paper: Wang et al. 2024, https://arxiv.org/abs/2409.18869. Parts: `Emu3Encoder`, `Emu3Decoder`,
    `VectorQuantizer`. Videos are not tokenized here.
    """
