"""FID's Inception: the network of 2015 whose features published FIDs, KIDs and scores compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.registry import register
from vistok.models.networks.files import (
    check_hash,
    find_weights,
    load_strictly,
    read_tensors,
    sha256_of,
)
from vistok.nn.network import Network

_PUBLISHED = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)

_SIDE = 299

#: A path through a block: names of its convolutions, or a pooling, one after the other; the names
#: of a last tuple lie next to each other.
Path_ = Sequence[str | tuple[str, ...]]


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, width: int, wider: int, kernel: int | tuple[int, int], stride: int, padded: bool
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(width, wider, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(wider, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, width, H, W)` to `(B, wider, H', W')`."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block of paths that lie next to each other; their channels are joined.

    Args:
        units: of the block by name: channels in and out, kernel, stride, and whether it is padded.
        paths: through the units.
    """

    def __init__(self, units: Mapping[str, Unit], paths: Sequence[Path_]) -> None:
        super().__init__()
        for name, unit in units.items():
            self.add_module(name, unit)
        self.paths = paths

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the joined channels."""
        return torch.cat([self._walk(x, path) for path in self.paths], dim=1)

    def _walk(self, x: Tensor, path: Path_) -> Tensor:
        for place in path:
            if isinstance(place, tuple):
                x = torch.cat([self.get_submodule(name)(x) for name in place], dim=1)
            elif place == "average":  # TensorFlow's leaves the padding out
                x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            elif place == "max":
                x = F.max_pool2d(x, 3, 1, 1)
            elif place == "shrink":
                x = F.max_pool2d(x, 3, 2)
            else:
                x = self.get_submodule(place)(x)
        return x


def _at_35(width: int, pooled: int) -> Mixed:
    units = {
        "branch1x1": Unit(width, 64, 1, 1, True),
        "branch5x5_1": Unit(width, 48, 1, 1, True),
        "branch5x5_2": Unit(48, 64, 5, 1, True),
        "branch3x3dbl_1": Unit(width, 64, 1, 1, True),
        "branch3x3dbl_2": Unit(64, 96, 3, 1, True),
        "branch3x3dbl_3": Unit(96, 96, 3, 1, True),
        "branch_pool": Unit(width, pooled, 1, 1, True),
    }
    double = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
    paths = [["branch1x1"], ["branch5x5_1", "branch5x5_2"], double, ["average", "branch_pool"]]
    return Mixed(units, paths)


def _to_17(width: int) -> Mixed:
    units = {
        "branch3x3": Unit(width, 384, 3, 2, False),
        "branch3x3dbl_1": Unit(width, 64, 1, 1, True),
        "branch3x3dbl_2": Unit(64, 96, 3, 1, True),
        "branch3x3dbl_3": Unit(96, 96, 3, 2, False),
    }
    double = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
    return Mixed(units, [["branch3x3"], double, ["shrink"]])


def _at_17(width: int, few: int) -> Mixed:
    wide, tall = (1, 7), (7, 1)
    units = {
        "branch1x1": Unit(width, 192, 1, 1, True),
        "branch7x7_1": Unit(width, few, 1, 1, True),
        "branch7x7_2": Unit(few, few, wide, 1, True),
        "branch7x7_3": Unit(few, 192, tall, 1, True),
        "branch7x7dbl_1": Unit(width, few, 1, 1, True),
        "branch7x7dbl_2": Unit(few, few, tall, 1, True),
        "branch7x7dbl_3": Unit(few, few, wide, 1, True),
        "branch7x7dbl_4": Unit(few, few, tall, 1, True),
        "branch7x7dbl_5": Unit(few, 192, wide, 1, True),
        "branch_pool": Unit(width, 192, 1, 1, True),
    }
    paths = [
        ["branch1x1"],
        [f"branch7x7_{i}" for i in (1, 2, 3)],
        [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)],
        ["average", "branch_pool"],
    ]
    return Mixed(units, paths)


def _to_8(width: int) -> Mixed:
    units = {
        "branch3x3_1": Unit(width, 192, 1, 1, True),
        "branch3x3_2": Unit(192, 320, 3, 2, False),
        "branch7x7x3_1": Unit(width, 192, 1, 1, True),
        "branch7x7x3_2": Unit(192, 192, (1, 7), 1, True),
        "branch7x7x3_3": Unit(192, 192, (7, 1), 1, True),
        "branch7x7x3_4": Unit(192, 192, 3, 2, False),
    }
    seven = [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)]
    return Mixed(units, [["branch3x3_1", "branch3x3_2"], seven, ["shrink"]])


def _at_8(width: int, pooling: str) -> Mixed:
    units = {
        "branch1x1": Unit(width, 320, 1, 1, True),
        "branch3x3_1": Unit(width, 384, 1, 1, True),
        "branch3x3_2a": Unit(384, 384, (1, 3), 1, True),
        "branch3x3_2b": Unit(384, 384, (3, 1), 1, True),
        "branch3x3dbl_1": Unit(width, 448, 1, 1, True),
        "branch3x3dbl_2": Unit(448, 384, 3, 1, True),
        "branch3x3dbl_3a": Unit(384, 384, (1, 3), 1, True),
        "branch3x3dbl_3b": Unit(384, 384, (3, 1), 1, True),
        "branch_pool": Unit(width, 192, 1, 1, True),
    }
    double = ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")]
    fork = ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")]
    return Mixed(units, [["branch1x1"], fork, double, [pooling, "branch_pool"]])


@register("inception")
class Inception(Network):
    """The Inception v3 of FID: vectors of 2048, pooled, and the class logits of its score.

    TensorFlow's graph of 2015 as ported to PyTorch, with what differs from torchvision's:
    poolings that leave padding out, one maximum in the last block, 1008 classes, logits without
    bias, and TensorFlow's way to resize to 299 px, without antialiasing. torch-fidelity has the
    same.

    Papers: Szegedy et al. 2016, https://arxiv.org/abs/1512.00567; FID, Heusel et al. 2017,
    https://arxiv.org/abs/1706.08500.

    Args:
        weights: a file in the layout of pt_inception-2015-12-05-6726825d.pth; None for torch hub's
            cache.
        sha256: first digits that the file must have; None for any.

    Raises:
        ArgumentError: if the weights are not at hand or another network's.
    """

    name = "inception"
    gives = ("vectors", "logits")
    dim = 2048

    def __init__(self, weights: str | Path | None = None, sha256: str | None = None) -> None:
        path = find_weights(
            weights,
            "FID's Inception",
            _PUBLISHED,
            "; lite0 comes with a package",
        )
        check_hash(path, sha256)
        super().__init__()
        layers: dict[str, nn.Module] = {
            "Conv2d_1a_3x3": Unit(3, 32, 3, 2, False),
            "Conv2d_2a_3x3": Unit(32, 32, 3, 1, False),
            "Conv2d_2b_3x3": Unit(32, 64, 3, 1, True),
            "Conv2d_3b_1x1": Unit(64, 80, 1, 1, True),
            "Conv2d_4a_3x3": Unit(80, 192, 3, 1, False),
            "Mixed_5b": _at_35(192, 32),
            "Mixed_5c": _at_35(256, 64),
            "Mixed_5d": _at_35(288, 64),
            "Mixed_6a": _to_17(288),
            "Mixed_6b": _at_17(768, 128),
            "Mixed_6c": _at_17(768, 160),
            "Mixed_6d": _at_17(768, 160),
            "Mixed_6e": _at_17(768, 192),
            "Mixed_7a": _to_8(768),
            "Mixed_7b": _at_8(1280, "average"),
            "Mixed_7c": _at_8(2048, "max"),
            "fc": nn.Linear(2048, 1008),
        }
        self.net = nn.ModuleDict(layers)
        load_strictly(self.net, read_tensors(path, "FID's Inception"), path, "FID's Inception")
        self.hashes["weights"] = sha256_of(path)

    def vectors(self, images: Tensor) -> Tensor:
        """Return `(B, 2048)` of images `(B, C, H, W)` in [-1, 1]."""
        x = resize_as_tensorflow((self.normalized(images) + 1) * 127.5, _SIDE)
        x = (x - 128) / 128
        for name, layer in self.net.items():
            if name == "fc":
                break
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        return x.mean(dim=(2, 3))

    def classify(self, vectors: Tensor) -> Tensor:
        """Return logits `(B, 1008)`, without bias."""
        fc = self.net["fc"]
        assert isinstance(fc, nn.Linear)
        return vectors @ fc.weight.T


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Return images `(B, C, side, side)`, bilinear as TensorFlow 1 computed it.

    Pixel i is taken at i * size / side, not at the middle of the pixel, and nothing is smoothed.
    """
    x = images
    for dim in (2, 3):
        size = x.shape[dim]
        places = torch.arange(side, device=x.device, dtype=torch.float32) * (size / side)
        low = places.floor().long().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        share = (places - low).to(x.dtype)
        share = share.view(-1, 1) if dim == 2 else share
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)
    return x
