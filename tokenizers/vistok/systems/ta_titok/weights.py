"""Import TA-TiTok's released weights."""

from __future__ import annotations

import torch

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released
from vistok.models.latent_vit_weights import released_latent_vit


@register("ta_titok", kind="importer")
def ta_titok(published: Published, image_size: int | None) -> Released:
    """TA-TiTok (https://arxiv.org/abs/2501.07730) with a codebook."""
    released = released_latent_vit(published, image_size, "ta_titok")
    decoder, state = released.tokenizer["decoder"], released.state
    state |= published.move({"decoder.text_guidance_proj": "decoder.text_embed"})
    positions = published.take("decoder.text_guidance_positional_embedding")
    state["decoder.text_positions"] = positions
    # There is none: without a caption these weights are outside of what they were trained on.
    state["decoder.no_text"] = torch.zeros(1, 1, positions.shape[1])
    decoder |= {
        "_target_": "text_decoder",
        "num_text_tokens": len(positions),
        "text_dim": state["decoder.text_embed.weight"].shape[1],
    }
    return released._replace(license="Apache-2.0")
