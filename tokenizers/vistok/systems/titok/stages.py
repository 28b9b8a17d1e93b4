"""TiTok's two stages: learn the codes of a frozen 2D tokenizer, then pixels."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vistok.core.errors import ConfigError
from vistok.core.geometry import cell_side
from vistok.core.registry import register
from vistok.models.proxy_decoder import ProxyDecoder
from vistok.models.stage import Source, Stage
from vistok.models.tokenizer import Tokenizer
from vistok.nn.frozen import Frozen


@register("proxy", kind="stage")
class LearnCodes(Stage):
    """The first stage: the decoder predicts the codes of a frozen 2D tokenizer, the proxy.

    Paper: TiTok, Yu et al. 2024, https://arxiv.org/abs/2406.07550.
    """

    source = "proxy"
    described = "the run of a 2D tokenizer"
    derived = ("decoder._target_", "decoder.patch_size", "decoder.border")

    def resolve(self, config: dict[str, Any], source: Source) -> dict[str, Any]:
        """Exchange the pixel head for one over the proxy's codes."""
        tokenizer, proxy = config["tokenizer"], source.tokenizer
        grid, quantizer = proxy.encoder.grid, proxy.quantizer
        if grid is None or quantizer.num_indices != 1 or not quantizer.per_token:
            raise self.refuse(
                source,
                f"must be a 2D tokenizer with one id per cell, found {type(proxy).__name__} with "
                f"{type(quantizer).__name__}",
            )
        if tokenizer["decoder"].get("_target_") != "latent_vit_decoder":
            raise ConfigError(
                "stage=proxy: needs a tokenizer with a latent_vit_decoder, found "
                f"{tokenizer['decoder'].get('_target_')}; for example add experiment=titok_tiny"
            )
        side = cell_side(proxy.image_size, grid, f"stage.proxy={source.path}")
        kept = {key: value for key, value in tokenizer["decoder"].items() if key != "border"}
        decoder = {
            **kept,
            "_target_": "proxy_decoder",
            "patch_size": side,
            "num_codes": quantizer.codebook_sizes[0],
            "code_dim": proxy.decoder.dim,
            "pixel_decoder": copy.deepcopy(source.config["tokenizer"]["decoder"]),
            "learns": "codes",
        }
        return {**config, "tokenizer": {**tokenizer, "decoder": decoder}}

    @torch.no_grad()
    def prepare(self, tokenizer: Tokenizer, source: Tokenizer) -> None:
        """Copy the proxy's code vectors and decoder, and hold its encoder for the targets."""
        decoder = tokenizer.decoder
        assert isinstance(decoder, ProxyDecoder)
        ids = torch.arange(source.quantizer.codebook_sizes[0])[None, :, None]
        decoder.code_vectors.weight.copy_(source.quantizer.decode(ids)[0])
        decoder.pixel_decoder.load_state_dict(source.decoder.state_dict())
        decoder.proxy = Frozen(ProxyCodes(source))


@register("decoder", kind="stage")
class LearnPixels(Stage):
    """The second stage: the decoder learns pixels, encoder and codebook stay.

    Paper: TiTok, Yu et al. 2024, https://arxiv.org/abs/2406.07550.
    """

    source = "weights"
    described = "the run of stage=proxy"
    derived = LearnCodes.derived
    reads_weights = False

    def resolve(self, config: dict[str, Any], source: Source) -> dict[str, Any]:
        """Take the tokenizer of the first stage with its weights, its decoder set to pixels."""
        if not isinstance(source.tokenizer.decoder, ProxyDecoder):
            raise self.refuse(source, "is not a run of stage=proxy")
        tokenizer = copy.deepcopy(source.config["tokenizer"])
        tokenizer["decoder"]["learns"] = "pixels"
        return {
            **config,
            "tokenizer": tokenizer,
            "quantizer": copy.deepcopy(source.config["quantizer"]),
            "init_from": config["init_from"] or source.path,
        }

    def prepare(self, tokenizer: Tokenizer, source: Tokenizer) -> None:
        """Do nothing: the weights come by `init_from`, once."""


class ProxyCodes(nn.Module):
    """Images `(B, C, H, W)` in [-1, 1] to the codes `(B, cells)` of a 2D tokenizer.

    Args:
        tokenizer: the 2D tokenizer; one id per cell.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.encoder, self.quantizer = tokenizer.encoder, tokenizer.quantizer

    def forward(self, images: Tensor) -> Tensor:
        """Encode and search."""
        return self.quantizer.encode(self.encoder(images), self.encoder.grid)[..., 0]
