"""Pictures for the data tests."""

import io

import numpy as np
from PIL import Image


def picture(seed=0, height=40, width=56, channels=3):
    """A smooth picture with some detail, `(H, W, C)` uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    planes = [
        np.asarray(
            Image.fromarray(coarse[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
        )
        for c in range(channels)
    ]
    fine = rng.integers(-12, 13, (height, width, channels))
    return np.clip(np.stack(planes, 2).astype(int) + fine, 0, 255).astype(np.uint8)


def encode(array, kind="PNG", **options):
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(file, kind, **options)
    return file.getvalue()
