"""The contract of pretrained networks that images are looked at through."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.torch_internals import version_of

#: What a network may give, in the words of errors.
_GIFTS = {
    "maps": "feature maps",
    "distances": "distances between images",
    "vectors": "a vector for each image",
    "logits": "class logits",
    "text": "text",
    "faces": "faces",
}

_Found = TypeVar("_Found")


class Region(NamedTuple):
    """Something that a network finds in an image.

    Attributes:
        place: where, in pixels; the network's own numbers.
        value: what: a text, or the vector of a face.
        confidence: how sure it is.
    """

    place: tuple[int, ...]
    value: Any
    confidence: float


class Network(nn.Module):
    """A pretrained network, used but never trained: by losses, alignments and metrics.

    It takes images `(B, C, H, W)` in [-1, 1] and maps them to the range that it was trained on. A
    single channel is repeated; other numbers of channels than 1 and 3 are refused. It computes in
    the precision of its own weights, float32: half precision rounds differences of features away
    that still count near the end of training, and the norm of a small feature vector to zero.

    Attributes:
        name: as the protocol of an evaluation names it.
        gives: which of "maps", "distances", "vectors", "logits", "text" and "faces" it can compute.
        least: the smallest side of an image that it takes, in pixels.
        dim: width of the vectors, if it gives some.
        hashes: SHA-256 of the files that its weights come from, by what they hold.
    """

    name: str = ""
    gives: tuple[str, ...] = ()
    least: int = 1
    dim: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.hashes: dict[str, str] = {}
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self._recalled: dict[str, list[tuple[Tensor, int, Any]]] = {}

    # ------------------------------------------------------------------ what it gives

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return feature maps `(B, C_i, H_i, W_i)` of several depths."""
        raise NotImplementedError

    def distances(self, maps: list[Tensor], others: list[Tensor]) -> Tensor:
        """Return the distance of each pair of images, `(B,)`, from what `maps` gave of them.

        By default the mean over depths and places of the squared distance of the feature vectors,
        each brought to unit length: 0 to 4.
        """
        pairs = zip(maps, others, strict=True)
        parts = [(unit(a) - unit(b)).square().sum(1).mean((1, 2)) for a, b in pairs]
        return torch.stack(parts).mean(0)

    def vectors(self, images: Tensor) -> Tensor:
        """Return a vector of each image, `(B, dim)`."""
        raise NotImplementedError

    def classify(self, vectors: Tensor) -> Tensor:
        """Return class logits `(B, classes)` of the vectors."""
        raise NotImplementedError

    def regions(self, images: Tensor) -> list[list[Region]]:
        """Return what it finds in each image, text or faces."""
        raise NotImplementedError

    def values(self, images: Tensor, regions: list[list[Region]]) -> list[list[Any]]:
        """Return what is at those places in other images, as values of regions."""
        raise NotImplementedError

    # ------------------------------------------------------------------ what it is

    def identity(self) -> dict[str, Any]:
        """Return what decides its output, for the protocol: name, options, SHA-256 of weights."""
        return {"name": self.name, **self.options(), "sha256": dict(self.hashes)}

    def options(self) -> dict[str, Any]:
        """Return the options that change its output."""
        return {}

    @property
    def key(self) -> str:
        """Return a text that two networks share if they compute the same."""
        return json.dumps(self.identity(), sort_keys=True)

    def require(self, gift: str, argument: str = "network") -> None:
        """Raise unless the network gives "maps", "distances" or whatever is asked for.

        Raises:
            ArgumentError: naming what it does give.
        """
        if gift not in self.gives:
            known = ", ".join(_GIFTS[each] for each in self.gives)
            raise ArgumentError(f"{argument}={self.name}: gives no {_GIFTS[gift]}; only {known}")

    def check(self, channels: int, size: tuple[int, int]) -> None:
        """Raise if it does not take such images.

        Raises:
            ConfigError: naming the network and what it takes.
        """
        if channels not in (1, 3):
            raise ConfigError(
                f"images: {self.name} takes RGB, or grayscale that it repeats, but these have "
                f"{channels} channels"
            )
        if min(size) < self.least:
            raise ConfigError(
                f"images: {self.name} takes sides of {self.least} px or more, but these are "
                f"{size[0]} x {size[1]}"
            )

    # ------------------------------------------------------------------ for its users

    def normalized(self, images: Tensor) -> Tensor:
        """Return what the network was trained on, `(B, 3, H, W)`, of images in [-1, 1]."""
        self.check(images.shape[1], (images.shape[2], images.shape[3]))
        x = images.to(self.mean.dtype).expand(-1, 3, -1, -1)
        return (x - self.mean) / self.std

    def normalize_by(self, mean: Any, std: Any) -> None:
        """Set mean and standard deviation, of three channels each, of images in [-1, 1]."""
        for name, value in (("mean", mean), ("std", std)):
            setattr(self, name, torch.as_tensor(value, dtype=torch.float32).view(1, 3, 1, 1))

    @torch.no_grad()
    def recall(
        self, what: str, images: Tensor, compute: Callable[[Tensor], _Found], kept: int = 2
    ) -> _Found:
        """Return `compute` of uint8 images, or what it returned for this same tensor just now.

        Metrics that look at the same batch through one network share its forward so. The two
        tensors that were asked for last are remembered: originals and reconstructions.

        Args:
            what: is computed.
            images: `(B, C, H, W)` uint8.
            compute: takes images in [-1, 1].
            kept: how many are remembered.
        """
        if images.is_inference():  # its changes are not counted
            return compute(images.float() / 127.5 - 1)
        known = self._recalled.setdefault(what, [])
        for number, (tensor, version, found) in enumerate(known):
            if tensor is images and version == version_of(images):
                known.append(known.pop(number))
                return found
        del known[: max(0, len(known) + 1 - kept)]  # first: they may be large
        with torch.autocast(images.device.type, enabled=False):
            found = compute(images.float() / 127.5 - 1)
        known.append((images, version_of(images), found))
        return found


def unit(features: Tensor) -> Tensor:
    """Return feature vectors `(B, C, H, W)` of unit length; those that are zero stay so.

    As LPIPS divides, by length + 1e-10. The gradient at zero is zero; that of a square root of a
    sum of squares would be NaN.
    """
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
