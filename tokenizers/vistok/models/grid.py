"""Tokenizers with one token per cell of a grid, for images of any size."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ConfigError
from vistok.core.geometry import as_pair
from vistok.core.outputs import TokenizerOutput
from vistok.core.registry import register
from vistok.models.arguments import as_tensor, in_words
from vistok.models.tokenizer import Tokenizer


@register("grid_tokenizer")
class GridTokenizer(Tokenizer):
    """A tokenizer whose tokens lie in rows and columns, for images of other sizes as well.

    The size of the config is the one that training and `detokenize` take by default. Height and
    width may be any multiples of the stride: `at` returns the tokenizer for another size, and
    `tokenize` takes a list of images of different sizes, each of which gets the ids that it gets
    alone. In training, batches may differ in size (aspect buckets).
    """

    token_order = "raster"

    def at(self, image_size: int | Sequence[int]) -> GridTokenizer:
        """Return this tokenizer for images of another size; the weights are the same tensors.

        Args:
            image_size: side in pixels, or (H, W), multiples of the stride.

        Raises:
            ConfigError: if a side is not, or a part knows one size alone.
        """
        size = as_pair(image_size)
        other = copy.copy(self)
        other._modules = dict(self._modules)
        for name in ("encoder", "decoder"):
            part = self.get_submodule(name)
            if not hasattr(part, "at"):
                raise ConfigError(
                    f"image_size={list(size)}: {type(part).__name__} takes images of "
                    f"{list(self.image_size)} alone"
                )
            other._modules[name] = part.at(size)  # type: ignore[operator]
        other.image_size = size
        return other

    def forward(
        self, images: Tensor, taps: Iterable[str] = (), **conditions: Tensor
    ) -> TokenizerOutput:
        """Compute a training step's predictions, of images of any size."""
        size = as_pair(images.shape[-2:])
        if size != self.image_size:
            return self.at(size).forward(images, taps, **conditions)
        return super().forward(images, taps, **conditions)

    @torch.no_grad()
    def tokenize(self, images: Any, num_tokens: int | None = None) -> Any:
        """Turn images into integers.

        Args:
            images: `(B, C, H, W)`, uint8 or float in [0, 1], of the config's size; or a list of
                images `(C, H, W)` of any sizes.
            num_tokens: None, or all of them.

        Returns:
            `(B, N, Q)` int64 ids; of a list one tensor `(N, Q)` for each image.
        """
        if not isinstance(images, (list, tuple)) or not images or _is_plain(images[0]):
            return super().tokenize(images, num_tokens)
        tensors = [as_tensor(image) for image in images]
        sizes: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(tensors):
            if image is None or image.ndim != 3:
                found = in_words(images[number]) if image is None else tuple(image.shape)
                raise ConfigError(f"images: expected (C, H, W) for image {number}, found {found}")
            sizes.setdefault(as_pair(image.shape[-2:]), []).append(number)
        ids: dict[int, Tensor] = {}
        for size, numbers in sizes.items():
            batch = torch.stack([tensors[n] for n in numbers])  # type: ignore[misc]
            ids |= zip(numbers, self.at(size).tokenize(batch, num_tokens), strict=True)
        return [ids[number] for number in range(len(images))]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (list, tuple, int, float))
