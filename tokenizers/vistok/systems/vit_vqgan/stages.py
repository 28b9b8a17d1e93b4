"""ViT-VQGAN's second stage: a larger decoder for the codes of a trained tokenizer."""

from __future__ import annotations

import copy
from typing import Any

from vistok.core.registry import register
from vistok.models.stage import Source, Stage
from vistok.models.tokenizer import Tokenizer


@register("larger_decoder", kind="stage")
class LearnLargerDecoder(Stage):
    """The second stage: another decoder learns pixels, encoder and codebook stay.

    Ids remain those of the first stage, so what a prior learned of them holds. For any tokenizer
    whose decoder fits the quantizer. Paper: Parti, Yu et al. 2022,
    https://arxiv.org/abs/2206.10789.
    """

    source = "weights"
    described = "the run of the first stage"
    reads_weights = False

    def resolve(self, config: dict[str, Any], source: Source) -> dict[str, Any]:
        """Take encoder and quantizer of the first stage with their weights; keep the decoder."""
        own, found = config["tokenizer"], copy.deepcopy(source.config["tokenizer"])
        for key in ("_target_", "latent_dim"):
            if own[key] != found[key]:
                raise self.refuse(
                    source,
                    f"has tokenizer.{key}={found[key]}, but the decoder is of a tokenizer with "
                    f"{own[key]}",
                )
        return {
            **config,
            "tokenizer": {**found, "decoder": own["decoder"]},
            "quantizer": copy.deepcopy(source.config["quantizer"]),
            "init_from": config["init_from"] or source.path,
            "init_parts": config["init_parts"] or ["encoder", "quantizer"],
        }

    def prepare(self, tokenizer: Tokenizer, source: Tokenizer) -> None:
        """Do nothing: the weights come by `init_from`, once."""
