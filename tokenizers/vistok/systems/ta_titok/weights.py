"""Import TA-TiTok's released weights."""

from __future__ import annotations

from vistok.core.released_weights import Published, Released
from vistok.models.latent_vit_weights import _titok


def ta_titok(published: Published, image_size: int | None) -> Released:
    """TA-TiTok (https://arxiv.org/abs/2501.07730) with a codebook."""
    return _titok(published, image_size, "vistok.systems.ta_titok.model.TATiTok")
