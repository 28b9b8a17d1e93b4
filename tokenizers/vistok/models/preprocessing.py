"""Pictures as users have them, for a tokenizer that was loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ConfigError
from vistok.models.arguments import as_tensor, in_words


class Preprocessing:
    """What a tokenizer knows of the pictures that it was trained and evaluated on."""

    #: Crop policy of its evaluation, a name of `vistok.data.crops.CROPS`; `vistok.load` sets it.
    crop = "adm_center"

    image_size: tuple[int, int]
    channels: int

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        raise NotImplementedError

    def preprocess(self, images: Any) -> Tensor:
        """Resize and crop pictures as the evaluation of this tokenizer does, bit for bit.

        A crop of one's own gives other pixels, and with them other ids.

        Args:
            images: paths and PIL images, one or a list of them.

        Returns:
            `(B, C, H, W)` uint8, for `tokenize`.

        Raises:
            DataError: naming the picture that cannot be used.
        """
        from vistok.data.preprocess import preprocess  # needs Pillow, which ids alone do not

        return preprocess(images, self.image_size, self.channels, self.crop)

    def to_model_range(self, images: Any) -> Tensor:
        """Check images `(B, C, H, W)`, uint8 or float in [0, 1], and map them to [-1, 1].

        Raises:
            ConfigError: if shape, type or range is another.
        """
        expected, found = (self.channels, *self.image_size), as_tensor(images)
        if found is None or found.ndim != 4 or tuple(found.shape[1:]) != expected:
            raise ConfigError(
                f"images: expected (B, {', '.join(map(str, expected))}), "
                f"found {in_words(images) if found is None else tuple(found.shape)}; "
                "give a tensor or an array (B, C, H, W)"
            )
        images = found.to(self.device)
        if images.dtype == torch.uint8:
            return images.float() / 127.5 - 1
        if not images.is_floating_point():
            raise ConfigError(f"images: expected uint8 or float in [0, 1], found {images.dtype}")
        low, high = (images.min().item(), images.max().item()) if images.numel() else (0, 1)
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
            raise ConfigError(
                f"images: floats must lie in [0, 1], found [{low:.3g}, {high:.3g}]; "
                "pass uint8, or map them first"
            )
        return images.float() * 2 - 1


def to_unit_range(images: Tensor) -> Tensor:
    """Model output near [-1, 1] to float32 in [0, 1], clamped."""
    return ((images.float() + 1) / 2).clamp(0, 1)
