"""Pretrained networks: features of a frozen one, which training is aligned with."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ConfigError, nearest
from vistok.core.registry import register
from vistok.nn.lite0 import Lite0

#: The teacher whose weights come with a package, so that no download is needed.
PACKAGED = "packaged_lite0"


@register("pretrained")
class Teacher(nn.Module):
    """Images to a feature map of a pretrained network.

    Of a timm model it is the last one, of the packaged EfficientNet-Lite0 that of stride 16.

    Attributes:
        dim: channels of the map.

    Args:
        name: of the model in timm, or "packaged_lite0".
        weights: a local file (.safetensors, .pth); None for timm's own, from its cache or the
            network, or for those of the installed package.
        input_size: side of the squares that images are resized to, in pixels.

    Raises:
        ConfigError: if there is no such model, or it has no map, or its weights are not at hand;
            the message says how to get them.
    """

    def __init__(self, name: str, weights: str | None, input_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        if name == PACKAGED:
            self.model: nn.Module = Lite0(_file(weights))
            range_: Mapping[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        else:
            self.model = _create(name, _file(weights), input_size)
            range_ = self.model.pretrained_cfg  # type: ignore[assignment]
        for key in ("mean", "std"):
            values = torch.tensor(range_[key]).view(1, 3, 1, 1)
            self.register_buffer(key, values, persistent=False)
        self.mean: Tensor
        self.std: Tensor
        # Whether there is a map shows now, and not in the first step of a run.
        try:
            with torch.no_grad():
                self.dim = self.eval()(torch.zeros(1, 3, input_size, input_size)).shape[1]
        except Exception as error:  # whatever the model raises
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise ConfigError(
                f"alignment.teacher={name}: makes no map of features of "
                f"alignment.input_size={input_size} ({reason})"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, D, h, w)` of images `(B, C, H, W)` in [-1, 1]; C 1, 3 or 4."""
        x = (images + 1) / 2
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
        size = (self.input_size, self.input_size)
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        x = (x - self.mean) / self.std
        if isinstance(self.model, Lite0):
            return self.model(x)
        return feature_map(self.model, x)


def feature_map(model: nn.Module, images: Tensor) -> Tensor:
    """Last features `(B, D, h, w)` of a timm model, of normalised images `(B, 3, H, W)`.

    Raises:
        ValueError: if they do not lie on a grid as fine as timm says.
    """
    found = model.forward_features(images)  # type: ignore[operator]
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


def _file(weights: str | None) -> str | None:
    if weights is not None and not Path(weights).is_file():
        raise ConfigError(f"alignment.weights={weights}: no such file")
    return weights


def _create(name: str, weights: str | None, input_size: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        known = [PACKAGED, *timm.list_models()]
        raise ConfigError(f"alignment.teacher={name}: timm has no such model{nearest(name, known)}")
    options: dict[str, Any] = {"num_classes": 0, "pretrained": True}
    try:
        if weights is None:
            return _from_cache_or_network(name, input_size, options)
        model = _seeded(name, input_size, {**options, "pretrained_cfg_overlay": {"file": weights}})
        # timm passes over names that do not fit: what still is as it was drawn was not loaded.
        drawn = _seeded(name, input_size, {**options, "pretrained": False})
        for (key, value), other in zip(model.named_parameters(), drawn.parameters(), strict=True):
            if value.ndim > 1 and value.any() and torch.equal(value, other):
                raise ValueError(f"it holds no '{key}'")
        return model
    except Exception as error:  # whatever the network or the file raise
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        if weights is not None:
            raise ConfigError(
                f"alignment.weights={weights}: not weights of {name} ({reason})"
            ) from error
        raise ConfigError(
            f"alignment.teacher={name}: its weights are not at hand ({reason}); with a network "
            f"run python -c \"import timm; timm.create_model('{name}', pretrained=True)\" once, "
            "or name a file of them: alignment.weights=FILE"
        ) from error


def _from_cache_or_network(name: str, input_size: int, options: dict[str, Any]) -> nn.Module:
    """Looks into the hub's cache first; asks the network once, where the hub would six times."""
    import timm
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    words = (os.environ.get(key, "") for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    offline = any(word.upper() in ("1", "ON", "YES", "TRUE") for word in words)
    with _quiet_hub(offline=True):
        try:
            return _seeded(name, input_size, options)
        except LocalEntryNotFoundError as error:
            if offline:
                raise OSError("not in the cache, and HF_HUB_OFFLINE is set") from error
    with _quiet_hub(offline=False):
        found = timm.get_pretrained_cfg(name)
        repository, _, revision = str(found and found.hf_hub_id).partition("@")
        HfApi().model_info(repository, revision=revision or None, timeout=5)
        return _seeded(name, input_size, options)


@contextmanager
def _quiet_hub(offline: bool) -> Iterator[None]:
    """The hub's client without its warnings; it reads HF_HUB_OFFLINE when imported, never again."""
    from huggingface_hub import constants

    log = logging.getLogger("huggingface_hub")
    before = log.level, constants.HF_HUB_OFFLINE
    log.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = offline
    try:
        yield
    finally:
        log.setLevel(before[0])
        constants.HF_HUB_OFFLINE = before[1]


def _seeded(name: str, input_size: int, options: dict[str, Any]) -> nn.Module:
    import timm

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(20250406)
        try:
            return timm.create_model(name, img_size=input_size, **options)
        except TypeError:  # convolutional models take any size
            torch.manual_seed(20250406)
            return timm.create_model(name, **options)
