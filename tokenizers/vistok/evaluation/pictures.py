"""Pictures that show what a tokenizer does."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def comparison(originals: Tensor, reconstructions: Tensor, gap: int = 2) -> Tensor:
    """Originals above their reconstructions, side by side.

    Args:
        originals: `(B, C, H, W)` uint8.
        reconstructions: the same shape.
        gap: white pixels between pictures.

    Returns:
        `(C, 2H + 3 gap, B (W + gap) + gap)` uint8.
    """
    return grid(torch.stack([originals, reconstructions]), gap)


def grid(pictures: Tensor, gap: int = 2) -> Tensor:
    """Pictures `(rows, columns, C, H, W)` uint8 on a white sheet.

    Returns:
        `(C, rows (H + gap) + gap, columns (W + gap) + gap)` uint8.
    """
    framed = F.pad(pictures, (gap, 0, gap, 0), value=255)
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in framed], dim=1)
    return F.pad(sheet, (0, gap, 0, gap), value=255)


def save_png(image: Tensor, path: Path, scale: int = 1) -> None:
    """Write an image `(C, H, W)` uint8, whole or not at all, enlarged by an integer `scale`."""
    array = image.cpu().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    if scale > 1:
        size = (picture.width * scale, picture.height * scale)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)
