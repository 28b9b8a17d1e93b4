"""Stages of a training recipe: what is frozen, and where weights come from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.checkpoints.find import find_checkpoint
from vistok.checkpoints.load import load
from vistok.checkpoints.read import read_config
from vistok.core.errors import ConfigError
from vistok.core.geometry import as_pair, cell_side
from vistok.core.values import check_whole
from vistok.models.build import build_tokenizer
from vistok.models.latent_space import LatentSpace
from vistok.models.proxy_decoder import ProxyDecoder
from vistok.models.tokenizer import Tokenizer
from vistok.nn.frozen import Frozen
from vistok.systems.flextok.model import FlexTok

_PIXEL_DECODER = "vistok.models.latent_vit.LatentTransformerDecoder"

_PROXY_DECODER = "vistok.models.proxy_decoder.ProxyDecoder"

_FLOW_DECODER = "vistok.systems.flextok.decoder.FlowDecoder"

_FLEXTOK = "vistok.systems.flextok.model.FlexTok"

_LATENT_SPACE = "vistok.models.latent_space.LatentSpace"

_CODE_LOSS = "vistok.losses.codes.CodeLoss"

#: The key that names where a stage's weights come from, and the stage that reads it.
_SOURCES = {"proxy": "proxy", "weights": "decoder", "autoencoder": "latents"}

#: Options of the parts that change how they compute and not what, so that any stage takes them.
_COMPUTING = ("activation_checkpointing", "attention")

#: Keys that stage=proxy sets by itself, whatever `tokenizer=...` says of them.
_DERIVED = tuple(f"tokenizer.decoder.{key}" for key in ("_target_", "patch_size", "borders"))


def resolve_stage(config: dict[str, Any], words: Sequence[str] = ()) -> dict[str, Any]:
    """A config as composed, with the architecture and start that its stage calls for.

    Args:
        config: resolved, as plain containers.
        words: `key=value` of the command line. What they say of the tokenizer or the quantizer
            holds, or is refused.

    Raises:
        ConfigError: if the stage lacks its source, or the two do not fit, or the loss or a word
            does not.
    """
    stage = config["stage"]
    for key, owner in _SOURCES.items():
        if stage.get(key) and stage["name"] != owner:
            raise ConfigError(
                f"stage.{key} is set, but stage={stage['name']} does not read it; add stage={owner}"
            )
    _check_loss(config)
    if stage["name"] == "proxy":
        found = _learn_codes(config, _source(stage, "proxy", "the run of a 2D tokenizer"))
        return _with_words(found, config, words)
    if stage["name"] == "decoder":
        found = _learn_pixels(config, _source(stage, "weights", "the run of stage=proxy"))
        return _with_words(found, config, words)
    if stage["name"] == "latents":
        return _learn_latents(config, _source(stage, "autoencoder", "the run of a 2D tokenizer"))
    return config


def prepare_stage(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Give a tokenizer its proxy or autoencoder, and freeze what its stage keeps."""
    stage = config.get("stage")
    if not stage:  # a run from before there were stages
        return
    if stage["name"] == "proxy":
        assert isinstance(tokenizer.decoder, ProxyDecoder)
        _attach(tokenizer.decoder, load(stage["proxy"]))
    if stage["name"] == "latents":
        assert isinstance(tokenizer, FlexTok) and tokenizer.autoencoder is not None
        _fill(tokenizer.autoencoder, stage["autoencoder"])
    frozen = stage["frozen"] or []
    frozen = frozen if isinstance(frozen, list) else [frozen]
    parts = [name for name, _ in tokenizer.named_modules(remove_duplicate=False) if name]
    for name in frozen:
        if name not in parts:
            raise ConfigError(f"stage.frozen: the tokenizer has no part {name or repr(name)}")
    tokenizer.freeze(*frozen)


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


@torch.no_grad()
def _attach(decoder: ProxyDecoder, proxy: Tokenizer) -> None:
    ids = torch.arange(proxy.quantizer.codebook_sizes[0])[None, :, None]
    decoder.code_vectors.weight.copy_(proxy.quantizer.decode(ids)[0])
    decoder.pixel_decoder.load_state_dict(proxy.decoder.state_dict())
    decoder.proxy = Frozen(ProxyCodes(proxy))


def _fill(autoencoder: LatentSpace, source: str) -> None:
    # A fresh run found it when its config was resolved. A resumed one needs it no more, for the
    # weights are in its checkpoint.
    if not Path(source).exists():
        return
    found = load(source)
    space = LatentSpace(found.encoder, found.quantizer, found.decoder)
    autoencoder.load_state_dict(space.state_dict())


def _check_loss(config: dict[str, Any]) -> None:
    """Codes are learned by a loss on codes, and pixels by one on pixels."""
    name = config["stage"]["name"]
    for key, term in (config["loss"].get("terms") or {}).items():
        target = str((term or {}).get("_target_"))
        if not target.startswith("vistok.losses."):
            continue  # a user's own
        what = target.rsplit(".", 1)[-1]
        if name == "proxy" and target != _CODE_LOSS:
            raise ConfigError(
                f"loss.terms.{key}: {what} compares pixels, but stage=proxy learns codes; use "
                "loss=proxy_codes, which stage=proxy brings along"
            )
        if name != "proxy" and target == _CODE_LOSS:
            raise ConfigError(
                f"loss.terms.{key}: {what} compares codes, which stage={name} does not predict; "
                "use stage=proxy, or a loss on pixels such as loss=mse"
            )


def _learn_codes(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """Exchange the pixel head for one over the proxy's codes."""
    own, proxy = _described(config, "proxy", source)
    tokenizer = config["tokenizer"]
    size = proxy.image_size
    if (
        proxy.token_order != "raster"
        or proxy.quantizer.num_indices != 1
        or not proxy.quantizer.per_token
    ):
        raise ConfigError(
            f"stage.proxy={source}: must be a 2D tokenizer with one id per cell, found "
            f"{type(proxy).__name__} with {type(proxy.quantizer).__name__}"
        )
    if tokenizer["decoder"].get("_target_") != _PIXEL_DECODER:
        raise ConfigError(
            f"stage=proxy: needs a tokenizer with a LatentTransformerDecoder, found "
            f"{tokenizer['decoder'].get('_target_')}"
        )
    kept = {key: value for key, value in tokenizer["decoder"].items() if key != "borders"}
    decoder = {
        **kept,
        "_target_": _PROXY_DECODER,
        "patch_size": cell_side(size, proxy.encoder.grid, f"stage.proxy={source}"),
        "num_codes": proxy.quantizer.codebook_sizes[0],
        "code_dim": proxy.decoder.dim,
        "pixel_decoder": copy.deepcopy(own["tokenizer"]["decoder"]),
        "learns": "codes",
    }
    return {**config, "tokenizer": {**tokenizer, "decoder": decoder}}


def _learn_latents(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """Move encoder and flow from pixels into the latents of an autoencoder."""
    own, found = _described(config, "autoencoder", source)
    if found.token_order != "raster":
        raise ConfigError(
            f"stage.autoencoder={source}: must be a 2D tokenizer, found {type(found).__name__}"
        )
    try:
        space = LatentSpace(found.encoder, found.quantizer, found.decoder)
    except ConfigError as error:
        raise ConfigError(f"stage.autoencoder={source}: {error}") from error
    tokenizer = config["tokenizer"]
    parts = {key: tokenizer[key] for key in ("encoder", "decoder")}
    if (tokenizer.get("_target_"), parts["decoder"].get("_target_")) != (_FLEXTOK, _FLOW_DECODER):
        raise ConfigError(
            f"stage=latents: needs a FlexTok with a FlowDecoder, found "
            f"{tokenizer.get('_target_')} with {parts['decoder'].get('_target_')}"
        )
    # A patch stays as large as it was, counted in pixels.
    factor = cell_side(found.image_size, space.grid, f"stage.autoencoder={source}")
    for name, part in parts.items():
        check_whole(f"tokenizer.{name}.patch_size", part["patch_size"], 1)
        patch, rest = divmod(part["patch_size"], factor)
        if rest or not patch:
            raise ConfigError(
                f"tokenizer.{name}.patch_size={part['patch_size']}: must be a multiple of "
                f"{factor} pixels, the side of a cell of stage.autoencoder={source}"
            )
        parts[name] = {
            **part,
            "image_size": list(space.grid),
            "channels": space.dim,
            "patch_size": patch,
        }
    autoencoder = {
        "_target_": _LATENT_SPACE,
        "encoder": copy.deepcopy(own["tokenizer"]["encoder"]),
        "quantizer": copy.deepcopy(own["quantizer"]),
        "decoder": copy.deepcopy(own["tokenizer"]["decoder"]),
    }
    return {**config, "tokenizer": {**tokenizer, **parts, "autoencoder": autoencoder}}


def _described(
    config: dict[str, Any], key: str, source: Path
) -> tuple[Mapping[str, Any], Tokenizer]:
    """Config and architecture (without values) of a run that fits this one's images."""
    own = read_config(source)
    with torch.device("meta"):
        found = build_tokenizer(own)
    size, channels = as_pair(config["data"]["image_size"]), config["data"]["channels"]
    if (found.image_size, found.channels) != (size, channels):
        raise ConfigError(
            f"stage.{key}={source}: takes {found.channels} x {found.image_size} images, but "
            f"data.image_size and data.channels are {size} and {channels}"
        )
    return own, found


def _learn_pixels(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """The tokenizer of stage 1, its weights as the start, its decoder set to learn pixels."""
    own, found = _described(config, "weights", source)
    if not isinstance(found.decoder, ProxyDecoder):
        raise ConfigError(f"stage.weights={source}: is no run of stage=proxy")
    tokenizer = copy.deepcopy(own["tokenizer"])
    tokenizer["decoder"]["learns"] = "pixels"
    return {
        **config,
        "tokenizer": tokenizer,
        "quantizer": copy.deepcopy(own["quantizer"]),
        "init_from": config["init_from"] or str(config["stage"]["weights"]),
    }


def _with_words(
    found: dict[str, Any], config: dict[str, Any], words: Sequence[str]
) -> dict[str, Any]:
    """`found`, and what the words say of how its tokenizer computes; other words must agree."""
    stage = found["stage"]["name"]
    tokenizer, own = found["tokenizer"], config["tokenizer"]
    for word in reversed(words):  # of two for one key the later one holds
        given = word.lstrip("+~").partition("=")[0]
        if given == "experiment" and own["_target_"] != tokenizer["_target_"]:
            # Of the same kind, it is the recipe of the source's tokenizer, whatever its size.
            source = next(key for key, owner in _SOURCES.items() if owner == stage)
            raise ConfigError(
                f"{word}: is for a {_class(own)}, but stage={stage} trains the {_class(tokenizer)} "
                f"of stage.{source}={found['stage'][source]}; choose an experiment of that"
            )
        if given.split(".")[0] not in ("tokenizer", "quantizer"):
            continue
        option = given.split(".")[-1]
        if option in _COMPUTING:  # of the decoder too where it follows from the encoder's
            for part in ("encoder", "decoder"):
                if option in own[part]:
                    tokenizer[part][option] = own[part][option]
        elif given.startswith("tokenizer.length.") and "length" in tokenizer:
            tokenizer["length"] = own["length"]
        for key, value in _leaves(_at(config, given), given):
            skipped = given == "tokenizer" and (key in _DERIVED or key.split(".")[-1] in _COMPUTING)
            if not skipped and _at(found, key) != value:
                source = next(key for key, owner in _SOURCES.items() if owner == stage)
                raise ConfigError(
                    f"{word}: stage={stage} takes {key}={_at(found, key)} from "
                    f"stage.{source}={found['stage'][source]}; leave the word out"
                )
    return found


def _class(config: Mapping[str, Any]) -> str:
    return str(config["_target_"]).rpartition(".")[2]


def _at(config: Any, key: str) -> Any:
    """The value of a dotted key; None if there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of everything under a value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key, value


def _source(stage: dict[str, Any], key: str, what: str) -> Path:
    if not stage[key]:
        raise ConfigError(f"stage.{key}: is missing; set it to {what}, stage.{key}=runs/<run>")
    folder = Path(stage[key])
    return folder if (folder / "model.safetensors").exists() else find_checkpoint(folder)
