"""Options of encoders and decoders that had other names, or other defaults, in form 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

#: An encoder or a decoder as its config describes it.
_Part = dict[str, Any]


def _parts(value: Any) -> Iterator[_Part]:
    """Yield all descriptions inside a config, the outer ones first."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for inner in value.values():
            yield from _parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _parts(inner)


def say_forms(config: dict[str, Any]) -> None:
    """Say in the options of today what a config of form 1 computes, in place.

    Today's defaults are the published forms. In form 1 an option that is missing has the value
    that it had before it was there. Parts are known by the ends of their import paths.
    """
    for part in _parts(config.get("tokenizer")):
        rename = _OPTIONS_OF_1.get(str(part["_target_"]).rpartition(".")[2])
        if rename is not None:
            rename(part)


def _latent_encoder(part: _Part) -> None:
    block = part.pop("block", "vit")
    if part.pop("legacy_reshape", False):
        part["_target_"] = "reshaped_latent_vit_encoder"
    if block == "flextok":
        part["_target_"] = "flextok_encoder"
        missing = {"class_token": True, "causal": False, "content": 0.125, "norm_in": True}
        part.update(missing | part)


def _latent_decoder(part: _Part) -> None:
    part["border"] = {"repeated": "edge", "black": "black"}[part.pop("borders", "repeated")]


def _flow_decoder(part: _Part) -> None:
    if part.get("time_dim") is None:
        part["time_dim"] = part["width"]
    part.setdefault("slowest_time", 1.0)


def _qformer(part: _Part) -> None:
    part["norm"] = "input" if part.pop("norm_first", False) else "embedding"


def _restok_encoder(part: _Part) -> None:
    released = part.pop("released", False)
    if part.pop("legacy_reshape", False):
        part["_target_"] = "reshaped_restok_encoder"
    part["merge_axis"] = "columns" if released else "longest"
    part["places"] = "queued" if released else "centered"
    part["level_vectors"] = "block" if released else "merge"


def _restok_decoder(part: _Part) -> None:
    part["norms"] = part.pop("released", False)
    part["places"] = "queued" if part["norms"] else "centered"


def _hita_encoder(part: _Part) -> None:
    released = part.pop("released", False)
    part["block"] = "biased" if released else "normalized"
    part["embed"] = "conv" if released else "linear"


def _hita_decoder(part: _Part) -> None:
    part["block"] = "biased" if part.pop("released", False) else "normalized"


_OPTIONS_OF_1: dict[str, Callable[[_Part], None]] = {
    "LatentTransformerEncoder": _latent_encoder,
    "LatentTransformerDecoder": _latent_decoder,
    "TextTransformerDecoder": _latent_decoder,
    "FlowDecoder": _flow_decoder,
    "QFormerEncoder": _qformer,
    "QFormerDecoder": _qformer,
    "ResTokEncoder": _restok_encoder,
    "ResTokDecoder": _restok_decoder,
    "HitaEncoder": _hita_encoder,
    "HitaDecoder": _hita_decoder,
}
