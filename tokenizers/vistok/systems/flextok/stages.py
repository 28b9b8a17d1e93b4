"""FlexTok's stage: encoder and flow move into the latents of a frozen autoencoder."""

from __future__ import annotations

import copy
from typing import Any

from vistok.core.errors import ConfigError
from vistok.core.geometry import cell_side
from vistok.core.registry import register
from vistok.core.values import Count, check
from vistok.models.latent_space import LatentSpace
from vistok.models.stage import Source, Stage
from vistok.models.tokenizer import Tokenizer
from vistok.systems.flextok.model import FlexTok


@register("latents", kind="stage")
class LearnLatents(Stage):
    """The flow runs in the latents that a 2D tokenizer has before rounding.

    Paper: FlexTok, Bachmann et al. 2025, https://arxiv.org/abs/2502.13967.
    """

    source = "autoencoder"
    described = "the run of a 2D tokenizer"
    keeps_words = False
    forgets_source = True

    def resolve(self, config: dict[str, Any], source: Source) -> dict[str, Any]:
        """Move encoder and flow from pixels into the latents of the autoencoder."""
        found = source.tokenizer
        try:
            space = LatentSpace(found.encoder, found.quantizer, found.decoder)
        except ConfigError as error:
            raise self.refuse(source, str(error)) from error
        tokenizer = config["tokenizer"]
        parts = {key: tokenizer[key] for key in ("encoder", "decoder")}
        targets = tokenizer.get("_target_"), parts["decoder"].get("_target_")
        if targets != ("flextok", "flow_decoder"):
            raise ConfigError(
                f"stage=latents: needs a flextok with a flow_decoder, found {targets[0]} with "
                f"{targets[1]}"
            )
        # A patch stays as large as it was, counted in pixels.
        factor = cell_side(found.image_size, space.grid, f"stage.autoencoder={source.path}")
        for name, part in parts.items():
            check(f"tokenizer.{name}.patch_size", part["patch_size"], Count)
            patch, rest = divmod(part["patch_size"], factor)
            if rest or not patch:
                raise ConfigError(
                    f"tokenizer.{name}.patch_size={part['patch_size']}: must be a multiple of "
                    f"{factor} pixels, the side of a cell of stage.autoencoder={source.path}"
                )
            parts[name] = {
                **part,
                "image_size": list(space.grid),
                "channels": space.dim,
                "patch_size": patch,
            }
        own = source.config
        autoencoder = {
            "_target_": "latent_space",
            "encoder": copy.deepcopy(own["tokenizer"]["encoder"]),
            "quantizer": copy.deepcopy(own["quantizer"]),
            "decoder": copy.deepcopy(own["tokenizer"]["decoder"]),
        }
        return {**config, "tokenizer": {**tokenizer, **parts, "autoencoder": autoencoder}}

    def prepare(self, tokenizer: Tokenizer, source: Tokenizer) -> None:
        """Copy the autoencoder's weights."""
        assert isinstance(tokenizer, FlexTok) and tokenizer.autoencoder is not None
        space = LatentSpace(source.encoder, source.quantizer, source.decoder)
        tokenizer.autoencoder.load_state_dict(space.state_dict())
