"""Import TA-TiTok's released weights."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released
from vistok.models.latent_vit_weights import _titok


@register("ta_titok", kind="importer")
def ta_titok(published: Published, image_size: int | None) -> Released:
    """TA-TiTok (https://arxiv.org/abs/2501.07730) with a codebook."""
    return _titok(published, image_size, "ta_titok")
