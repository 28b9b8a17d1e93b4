"""Tokens of several layers of a pretrained network, for a discriminator on its features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.models.pretrained import Pretrained


class Backbone(Pretrained):
    """Images to the tokens of layers of a timm network, whose gradient reaches the images.

    Of a vision transformer they are the patch tokens, each plus the class token, before the first
    block (-1) or after a block (0 for the first). Of a convolutional network they are the cells of
    its maps, 0 for the one of the smallest stride.

    Attributes:
        widths: channels of each layer.

    Args:
        name: see `Pretrained`.
        weights: see `Pretrained`.
        input_size: side of the squares that images are resized to, in pixels.
        layers: which ones, in ascending order.
        tanh_gelu: compute GELU by tanh.

    Raises:
        ArgumentError: as `Pretrained`, or if there is no such layer.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None,
        input_size: int,
        layers: Sequence[int],
        tanh_gelu: bool = False,
    ) -> None:
        super().__init__(name, weights, input_size)
        self.eval().requires_grad_(False)
        self.input_size = input_size
        self.layers = list(layers)
        model: Any = self.model
        self.is_transformer = hasattr(model, "_pos_embed") and hasattr(model, "blocks")
        number = len(model.blocks) if self.is_transformer else len(model.feature_info)
        least = -1 if self.is_transformer else 0
        if not layers or sorted(set(layers)) != self.layers:
            raise ArgumentError(f"layers={self.layers}: must be numbers in ascending order")
        if layers[0] < least or layers[-1] >= number:
            raise ArgumentError(f"layers={self.layers}: {name} has {least} to {number - 1}")
        for module in self.modules():
            if tanh_gelu and isinstance(module, nn.GELU):
                module.approximate = "tanh"
        try:
            with torch.no_grad():
                found = self(torch.zeros(1, 3, input_size, input_size))
        except Exception as error:  # whatever the model raises
            raise ArgumentError(
                f"name={name}: takes no images of input_size={input_size}"
            ) from error
        self.widths = [features.shape[1] for features in found]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return `(B, W, N)` of each layer, for images `(B, C, H, W)` in [-1, 1]; C 1, 3 or 4."""
        x = self.normalized(resized(images, self.input_size))
        if self.is_transformer:
            return self._tokens(x)
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            x, indices=self.layers, output_fmt="NCHW", intermediates_only=True
        )
        return [features.flatten(2) for features in maps]

    def _tokens(self, x: Tensor) -> list[Tensor]:
        model: Any = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        found = [self._read(x)] if self.layers[0] < 0 else []
        for number, block in enumerate(model.blocks):
            x = block(x)
            if number in self.layers:
                found.append(self._read(x))
            if number == self.layers[-1]:
                break
        return found

    def _read(self, x: Tensor) -> Tensor:
        prefix = int(self.model.num_prefix_tokens)  # type: ignore[arg-type]
        patches = x[:, prefix:].float()
        return (patches + x[:, :1].float() if prefix else patches).transpose(1, 2)


def resized(images: Tensor, size: int) -> Tensor:
    """Return images `(B, C, size, size)`: averaged over areas if they are larger, else bicubic."""
    if images.shape[2:] == (size, size):
        return images
    mode = "area" if min(images.shape[2:]) > size else "bicubic"
    return F.interpolate(images.float(), size=(size, size), mode=mode)
