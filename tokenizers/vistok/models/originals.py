"""Tokenizers in the layouts of the code that they were published with: the importers' reverse."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vistok.core.errors import ConfigError
from vistok.core.released_weights import inside
from vistok.models.cnn import CNNDecoder, CNNEncoder
from vistok.models.tokenizer import Tokenizer
from vistok.nn.conv import Downsample, SpatialAttention, Upsample

State = dict[str, Tensor]

#: Parts of layers whose names differ.
_THEIRS = {"skip": "nin_shortcut", "proj": "proj_out"}


class Original(NamedTuple):
    """Result of an exporter, a function of a tokenizer.

    Attributes:
        tensors: by the names of the original code.
        config: content of `config.json`; None for none.
        file: which holds the tensors: `.safetensors`, or `.pt` of `torch.save`, in a part "model".
        opened: by which code, for the user.
    """

    tensors: State
    config: dict[str, Any] | None
    file: str
    opened: str


class CNNNames(NamedTuple):
    """How a family spells the layers of VQGAN's CNN; its decoder's levels begin at the lowest.

    Attributes:
        down: the encoder's levels.
        up: the decoder's.
        block: residual blocks of a level.
        middle: the layers at the lowest resolution.
    """

    down: str
    up: str
    block: str
    middle: tuple[str, str, str]


def original_grid(tokenizer: Tokenizer, names: CNNNames) -> State:
    """Return the tensors of VQGAN's CNN around a codebook, whose projections are convolutions.

    Raises:
        ConfigError: if the tokenizer has other parts.
    """
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    if not isinstance(encoder, CNNEncoder) or not isinstance(decoder, CNNDecoder):
        raise ConfigError(
            f"this layout is of a CNN, and the tokenizer has a {type(encoder).__name__} and a "
            f"{type(decoder).__name__}"
        )
    state = _cnn(encoder, "encoder", names) | _cnn(decoder, "decoder", names)
    quantizer = tokenizer.quantizer
    state |= inside("quant_conv", _around(encoder, quantizer.project_in))
    state |= inside("post_quant_conv", _around(decoder, quantizer.project_out))
    return state | {"quantize.embedding.weight": one_codebook(tokenizer)}


def one_codebook(tokenizer: Tokenizer) -> Tensor:
    """Return the codes `(K, d)` in the space in which they are compared.

    Raises:
        ConfigError: if there are several codebooks.
    """
    tables = tokenizer.quantizer.codebooks()
    if len(tables) != 1:
        raise ConfigError(f"this layout has one codebook, and the tokenizer {len(tables)}")
    return tables[0]


def _around(part: CNNEncoder | CNNDecoder, projection: nn.Module) -> State:
    """Return what is between a part and the codes: the part's last layer, or the quantizer's."""
    own = part.latent_conv
    if own is None:
        return pointwise(projection, part.dim)
    if isinstance(projection, nn.Linear):
        raise ConfigError("this layout has one convolution next to the codes, the tokenizer two")
    return dict(own.state_dict())


def pointwise(layer: nn.Module, width: int) -> State:
    """Return a linear layer as a 1x1 convolution, and none as one that changes nothing."""
    if not isinstance(layer, nn.Linear):
        return {"weight": torch.eye(width)[..., None, None], "bias": torch.zeros(width)}
    return {"weight": layer.weight[..., None, None], "bias": layer.bias}


def _cnn(part: CNNEncoder | CNNDecoder, prefix: str, names: CNNNames) -> State:
    """Return the tensors of an encoder or decoder, under a prefix."""
    encodes = isinstance(part, CNNEncoder)
    layers, count = list(part.layers), len(names.middle)
    middle, rest = (
        (layers[-count:], layers[:-count]) if encodes else (layers[:count], layers[count:])
    )
    if not isinstance(middle[1], SpatialAttention):
        raise ConfigError(f"its {prefix} has attention between the two blocks in the middle")
    named = {f"{prefix}.{name}": layer for name, layer in zip(names.middle, middle, strict=True)}
    levels, level, block = f"{prefix}.{names.down if encodes else names.up}", 0, 0
    for layer in rest:
        if isinstance(layer, (Downsample, Upsample)):
            named[f"{levels}.{level}.{'down' if encodes else 'up'}sample"] = layer
            level, block = level + 1, 0
        elif isinstance(layer, SpatialAttention):
            named[f"{levels}.{level}.attn.{block - 1}"] = layer
        else:
            named[f"{levels}.{level}.{names.block}.{block}"] = layer
            block += 1
    named |= {f"{prefix}.{end}": getattr(part, end) for end in ("conv_in", "norm_out", "conv_out")}
    return {k: v for name, layer in named.items() for k, v in inside(name, _layer(layer)).items()}


def _layer(layer: nn.Module) -> State:
    """Return the tensors of a layer by the names that they have in all of these families."""
    state: State = {}
    for name, value in layer.state_dict().items():
        part, _, kind = name.rpartition(".")
        if part == "qkv":
            for one, third in zip("qkv", value.chunk(3), strict=True):
                state[f"{one}.{kind}"] = third
        else:
            state[f"{_THEIRS.get(part, part)}.{kind}"] = value
    return {name.removeprefix("."): value for name, value in state.items()}
