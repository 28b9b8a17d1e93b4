"""Views of an image: the crops and flips of it that are tokenized, in a fixed order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vistok.core.errors import ConfigError
from vistok.data.transforms import Transform

#: Windows of the larger crop, in torchvision's order.
_CORNERS = ("top left", "top right", "bottom left", "bottom right", "center")


class Views:
    """Cuts A pictures out of each image; nothing here is random.

    Args:
        size: height and width of a picture.
        crop: the evaluation's policy.
        crops: 1 for that crop alone, or 5: four corners and the middle of one that is
            `crop_range` times as large.
        crop_range: at least 1.
        flip: add the mirrored pictures behind the others. With five crops and `crop_range=1.1`
            that is torchvision's TenCrop as LlamaGen uses it.

    Raises:
        ConfigError: for a value that cannot be.
    """

    def __init__(
        self, size: tuple[int, int], crop: str, crops: int, crop_range: float, flip: bool
    ) -> None:
        if crops not in (1, 5) or isinstance(crops, bool):
            raise ConfigError(f"crops={crops}: must be 1 (the center) or 5 (corners and center)")
        if isinstance(crop_range, bool) or not isinstance(crop_range, (int, float)):
            raise ConfigError(f"crop_range={crop_range}: must be a number from 1 to 4")
        if not 1 <= crop_range <= 4:
            raise ConfigError(f"crop_range={crop_range}: must be a number from 1 to 4")
        if crops == 1 and crop_range != 1:
            raise ConfigError(f"crop_range={crop_range}: is for crops=5; leave it out")
        if crop in ("random", "random_resized", "resize_random", "adm_random"):
            raise ConfigError(
                f"data.val_crop={crop}: draws at random; tokens are made with adm_center or "
                "tv_center"
            )
        self.size, self.flip = size, flip
        larger = (int(size[0] * crop_range), int(size[1] * crop_range))
        self.transform = Transform(larger, crop, key="data.val_crop")
        self._unused = np.random.default_rng(0)  # evaluation's policies draw nothing from it
        self.windows = [(0, 0)] if crops == 1 else _windows(larger, size)
        corners = ("center",) if crops == 1 else _CORNERS
        self.names = [*corners, *(f"{name} mirrored" for name in corners if flip)]

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, image: np.ndarray) -> Tensor:
        """Return `(A, h, w, C)` uint8 of an image `(H, W, C)` uint8.

        Raises:
            DecodeError: if the policy cannot take an image of this size.
        """
        large = self.transform(image, self._unused)
        if len(self) == 1:
            return torch.from_numpy(large[None])
        sides = [large, large[:, ::-1]] if self.flip else [large]
        height, width = self.size
        pictures = [
            side[top : top + height, left : left + width]
            for side in sides
            for top, left in self.windows
        ]
        return torch.from_numpy(np.stack(pictures))


def _windows(large: tuple[int, int], size: tuple[int, int]) -> list[tuple[int, int]]:
    down, right = large[0] - size[0], large[1] - size[1]
    middle = (round(down / 2), round(right / 2))
    return [(0, 0), (0, right), (down, 0), (down, right), middle]
