"""Import TiTok's released weights."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released
from vistok.models.latent_vit_weights import released_latent_vit


@register("titok", kind="importer")
def titok(published: Published, image_size: int | None) -> Released:
    """TiTok (https://arxiv.org/abs/2406.07550) with a codebook, of two stages or of one."""
    return released_latent_vit(published, image_size, "titok")._replace(license="Apache-2.0")
