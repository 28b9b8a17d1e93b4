"""Pictures that show what a tokenizer does."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
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


#: Pixels that the shorter side of a picture is enlarged to, if it is smaller.
SIDE = 128


def scale_for(size: tuple[int, int], scale: int | None = None) -> int:
    """Return how many times pictures of (H, W) pixels are enlarged; None for large enough."""
    return -(-SIDE // min(SIDE, *size)) if scale is None else scale


def save_png(image: Tensor, path: Path, scale: int = 1, caption: str = "") -> None:
    """Write an image `(C, H, W)` uint8, whole or not at all.

    Args:
        image: a picture or a sheet of them.
        path: of the file.
        scale: integer enlargement.
        caption: a line of text above it.
    """
    array = image.cpu().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    if scale > 1:
        size = (picture.width * scale, picture.height * scale)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    if caption:
        picture = _with_caption(picture, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        picture.save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _with_caption(picture: Image.Image, caption: str) -> Image.Image:
    """Return a picture below a line of text, which may make it wider."""
    font = ImageFont.load_default()
    left, _, right, bottom = font.getbbox(caption)
    width, height = int(right - left) + 8, int(bottom) + 6
    white = {"L": 255, "RGB": (255, 255, 255)}.get(picture.mode, (255, 255, 255, 255))
    size = (max(width, picture.width), picture.height + height)
    sheet = Image.new(picture.mode, size, white)
    sheet.paste(picture, (0, height))
    black = {"L": 0, "RGB": (0, 0, 0)}.get(picture.mode, (0, 0, 0, 255))
    ImageDraw.Draw(sheet).text((4, 3), caption, fill=black, font=font)
    return sheet
