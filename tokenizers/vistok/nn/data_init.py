"""Starts of a CNN at which images pass it nearly unchanged, so that training begins with pictures.

A random deep CNN says little about its input: of photographs in 8 x 8 pixel cells, a linear map
gets back 15 dB from one and 20 from the pixels' principal components. What comes behind it, above
all a codebook, would settle on that before the CNN has learned. All of it stays learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.nn.conv import DepthToSpace, OutputSkipBlock, ResBlock, SpatialAttention, Upsample

_REFERENCE = 0.5  # in units of what differs between images

_ROWS = 20000  # samples are enough

_INPUTS = 2048  # of least squares over windows: more take minutes, and their middles serve

#: Is told which part of a start comes next.
Say = Callable[[str], None]


def quiet(part: str) -> None:
    """Say nothing."""


@torch.no_grad()
def start_conv_(conv: nn.Conv2d, maps: Tensor, reference: float = _REFERENCE) -> None:
    """Let a convolution start as a rotation of its input's principal components, mean taken off.

    Turned at random, so that every channel says a little of everything, and the channels that a
    group norm takes together are on one scale. A constant is added to one half of the channels
    and taken off the other: next to it, a norm over the image leaves brightness and contrast as
    they are, nearly, instead of wiping them out.

    Args:
        conv: with a stride s it starts with the s x s first of its taps, else with the central one.
        maps: `(M, C, H, W)`, samples of what it sees.
        reference: the constant, where the components have unit variance per channel.
    """
    taps = conv.stride[0]
    rows = pixels(maps, taps, stride=taps)
    count = min(conv.out_channels, rows.shape[1])
    mean, components, deviations = principal_components(rows, count)
    turn = nn.init.orthogonal_(torch.empty(conv.out_channels, count)).to(rows.device)
    scale = conv.out_channels**0.5 / scale_of(deviations.square().sum().sqrt())
    weight = turn @ components * scale
    bias = -weight @ mean
    bias[::2] += reference
    bias[1::2] -= reference
    _set(conv, weight, bias, taps)


@torch.no_grad()
def start_upsampling_(layer: Upsample | DepthToSpace, maps: Tensor, wanted: Tensor) -> None:
    """Let an upsampling start at the linear map that comes nearest to pixels at its new size.

    Args:
        layer: what to set.
        maps: `(M, C, H, W)`, samples of what it sees.
        wanted: `(M, F, 2H, 2W)`, pixels of the images; its outputs are a rotation of them.
    """
    spaced = isinstance(layer, DepthToSpace)
    turn = nn.Conv2d(wanted.shape[1], layer.conv.out_channels // (4 if spaced else 1), 1)
    start_conv_(turn.to(maps.device), wanted)
    targets = turn(wanted)
    if spaced:
        rows, targets = pixels(maps), pixels(F.pixel_unshuffle(targets, 2))
    else:
        large = F.interpolate(maps, scale_factor=2.0, mode="nearest")
        rows, targets = pixels(large, 3), pixels(targets)
    weight, bias = least_squares(rows, targets)
    _set(layer.conv, weight, bias, 1)


@torch.no_grad()
def start_at_target_(layer: nn.Conv2d | nn.Linear, maps: Tensor, images: Tensor) -> None:
    """Let a layer start as a rotation of what its input says of the pixels of each cell.

    Of all that it sees, principal components would keep what differs most; these keep what the
    image can be told from.

    Args:
        layer: linear, or a convolution of an odd side and stride 1.
        maps: `(M, C, H, W)`, samples of what it sees.
        images: `(M, F, H * s, W * s)`.
    """
    side = layer.kernel_size[0] if isinstance(layer, nn.Conv2d) else 1
    if layer.weight[0].numel() > _INPUTS:
        side = 1
    wanted = F.pixel_unshuffle(images, images.shape[2] // maps.shape[2])
    weight, bias = least_squares(pixels(maps, side), pixels(wanted))
    taps = weight.view(len(weight), -1, side, side)
    turn = nn.Conv2d(len(weight), len(layer.weight), 1).to(maps.device)
    start_conv_(turn, F.conv2d(maps, taps, bias, padding=side // 2))
    assert turn.bias is not None
    turned = turn.weight.flatten(1)
    weight, bias = turned @ weight, turned @ bias + turn.bias
    if isinstance(layer, nn.Conv2d):
        _set(layer, weight, bias, 1)
    else:
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


@torch.no_grad()
def start_block_(block: nn.Module, maps: Tensor) -> None:
    """Let a residual or attention block start as its skip connection.

    One whose skip is from its own output has nothing of its input to hand on: there the two
    convolutions start as rotations, and the skip adds nothing.

    Args:
        block: a layer; others than these blocks are left alone.
        maps: `(M, C, H, W)`, samples of what it sees.
    """
    if isinstance(block, OutputSkipBlock) and not block.keeps_channels:
        for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
            maps = F.silu(norm(maps))
            start_conv_(conv, maps)
            maps = conv(maps)
        nn.init.zeros_(block.skip.weight)  # type: ignore[arg-type]
    elif isinstance(block, ResBlock):
        for parameter in block.conv2.parameters():
            nn.init.zeros_(parameter)
        if isinstance(block.skip, nn.Conv2d):
            start_conv_(block.skip, maps)
    elif isinstance(block, SpatialAttention):
        for parameter in block.proj.parameters():
            nn.init.zeros_(parameter)


def pixels(maps: Tensor, side: int = 1, stride: int = 1, count: int = _ROWS) -> Tensor:
    """Pixels, or windows around them, of maps `(M, C, H, W)` as rows `(R, C * side * side)`.

    Args:
        maps: one after the other, for windows take `side` squared times their memory.
        side: of the windows; odd with a stride of 1, which then reach over the edge into zeros.
        stride: from one window to the next, 1 or `side`.
        count: about so many rows, evenly from all maps; all pixels if there are no more.
    """
    parts = []
    for one in maps.split(1):
        rows = F.unfold(one, side, padding=side // 2 if stride == 1 else 0, stride=stride)[0].T
        kept = min(len(rows), max(1, count // len(maps)))
        parts.append(rows[torch.linspace(0, len(rows) - 1, kept, device=rows.device).long()])
    return torch.cat(parts)


def _set(conv: nn.Conv2d, weight: Tensor, bias: Tensor, taps: int) -> None:
    """Write a map `(out, in * side * side)`; of the central tap, the first ones or all."""
    side = conv.kernel_size[0]
    conv.weight.zero_()
    if weight.shape[1] == conv.weight[0].numel():
        conv.weight.copy_(weight.view_as(conv.weight))
    else:
        first = 0 if taps > 1 else side // 2
        part = conv.weight[:, :, first : first + taps, first : first + taps]
        part.copy_(weight.view_as(part))
    if conv.bias is not None:
        conv.bias.copy_(bias)


def chunks(images: Tensor, *others: Tensor, most: int = 32) -> Iterator[Any]:
    """Split images, and what belongs to each of them, so that networks need bounded memory.

    Args:
        images: `(M, C, H, W)`.
        others: tensors of M rows.
        most: images of a chunk; fewer if they are large.

    Yields:
        A chunk of the images, or with `others` a tuple of chunks.
    """
    size = max(1, min(most, 2**19 // max(1, images[0].numel()))) if len(images) else 1
    parts = [tensor.split(size) for tensor in (images, *others)]
    yield from zip(*parts, strict=True) if others else parts[0]


def scale_of(deviation: Tensor) -> Tensor:
    """Return deviations to divide by: 1 where nothing differs, as in flat images."""
    return torch.where(deviation > 1e-6, deviation, 1.0)


@torch.no_grad()
def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal component analysis.

    Args:
        rows: `(M, F)` samples.
        count: number of components, at most F.

    Returns:
        mean `(F,)`, components `(count, F)` with orthonormal rows, strongest first, and their
        standard deviations `(count,)`; float32.
    """
    x = rows.double()
    mean = x.mean(dim=0)
    covariance = (x - mean).T @ (x - mean) / max(1, len(x) - 1)
    variances, vectors = torch.linalg.eigh(covariance)
    order = torch.arange(x.shape[1] - 1, x.shape[1] - 1 - count, -1)
    deviations = variances[order].clamp(min=0).sqrt()
    return mean.float(), vectors[:, order].T.contiguous().float(), deviations.float()


@torch.no_grad()
def start_at_components_(
    layer: nn.Linear, rows: Tensor, num_dims: int, deviation: Tensor | None = None
) -> None:
    """Let a linear layer start at the principal components of what it will see, mean taken off.

    All on one scale. So what differs between images is as large as anything else from the first
    step, and not a ripple on a constant that training moves about.

    Args:
        layer: its first `num_dims` outputs, or as many as it has inputs, are set; others are 0.
        rows: `(M, in_features)` samples.
        num_dims: at most `out_features`.
        deviation: what becomes 1; None for the components' own, root mean square.
    """
    count = min(num_dims, rows.shape[1])
    mean, components, deviations = principal_components(rows, count)
    if deviation is None:
        deviation = deviations.square().mean().sqrt()
    components = components / scale_of(deviation)
    layer.weight.zero_()
    layer.bias.zero_()
    layer.weight[:count] = components
    layer.bias[:count] = -components @ mean


@torch.no_grad()
def least_squares(inputs: Tensor, outputs: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """The linear layer that maps `inputs` to `outputs` best.

    Args:
        inputs: `(M, I)`.
        outputs: `(M, O)`.
        ridge: penalty on the weights, relative to the mean variance of the inputs.

    Returns:
        weight `(O, I)` and bias `(O,)`, float32.
    """
    x, y = inputs.double(), outputs.double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight.float(), (y_mean - weight @ x_mean).float()
