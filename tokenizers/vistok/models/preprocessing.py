"""Pictures as users have them, for a tokenizer that was loaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Preprocessing:
    """What a tokenizer knows of the pictures that it was trained and evaluated on."""

    #: Crop policy of its evaluation, a name of `vistok.data.crops.CROPS`; `vistok.load` sets it.
    crop = "adm_center"

    image_size: tuple[int, int]
    channels: int

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


def to_unit_range(images: Tensor) -> Tensor:
    """Model output near [-1, 1] to float32 in [0, 1], clamped."""
    return ((images.float() + 1) / 2).clamp(0, 1)
