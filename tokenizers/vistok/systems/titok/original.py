"""Export TiTok for the code that it was published with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import ConfigError
from vistok.core.registry import register
from vistok.models.latent_vit import LatentTransformerDecoder, LatentTransformerEncoder
from vistok.models.latent_vit_conv import LatentTransformerConvDecoder
from vistok.models.maskgit_cnn import MaskGITDecoder
from vistok.models.originals import Original, one_codebook, pointwise
from vistok.models.proxy_decoder import ProxyDecoder
from vistok.models.tokenizer import Tokenizer
from vistok.nn.conv import OutputSkipBlock, Upsample

#: Its code knows three sizes, by width and depth.
_SIZES = {(512, 8): "small", (768, 12): "base", (1024, 24): "large"}

#: And one decoder of MaskGIT's codes: their number and width, and the widths of its levels.
_PIXELS = (1024, 256, 128, 128, 256, 256, 512)

_BLOCK = {
    "norm1": "ln_1",
    "attn.proj": "attn.out_proj",
    "norm2": "ln_2",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}

State = dict[str, Tensor]


@register("titok", kind="exporter")
def for_titok(tokenizer: Tokenizer) -> Original:
    """TiTok's `TiTok.from_pretrained`, of two stages or of one (https://arxiv.org/abs/2406.07550)."""
    encoder, decoder, quantizer = tokenizer.encoder, tokenizer.decoder, tokenizer.quantizer
    if not isinstance(encoder, LatentTransformerEncoder) or not isinstance(
        decoder, LatentTransformerDecoder
    ):
        raise ConfigError(f"it is of TiTok's parts, and the encoder is a {type(encoder).__name__}")
    if isinstance(decoder, LatentTransformerConvDecoder):
        raise ConfigError("its decoder ends in TiTok's pixel head, and this one in residual blocks")
    height, width = tokenizer.image_size
    if height != width:
        raise ConfigError(f"its images are squares, found {height} x {width}")
    if encoder.latent_means is not None and encoder.latent_means.any():
        raise ConfigError(
            "its encoder takes no means off the latents, which differ from token to token, so no "
            "other weight can hold them; train with tokenizer.encoder.latent_means=false"
        )
    codes, two_stages = one_codebook(tokenizer), isinstance(decoder, ProxyDecoder)
    # Ours sees images in [-1, 1], and folds pixels as (row, column, channel).
    side = encoder.patch_size
    patches = encoder.patch_embed.weight.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2) * 2
    # Theirs maps a code to the decoder's width at once, ours by way of the latents' width.
    out = pointwise(quantizer.project_out, quantizer.dim)
    embed = decoder.embed
    state: State = {
        "encoder.patch_embed.weight": patches,
        "encoder.patch_embed.bias": encoder.patch_embed.bias - patches.sum(dim=(1, 2, 3)) / 2,
        "latent_tokens": encoder.latent_tokens[0],
        "quantize.embedding.weight": codes,
        "decoder.mask_token": decoder.mask_token,
        "decoder.decoder_embed.weight": embed.weight @ out["weight"][:, :, 0, 0],
        "decoder.decoder_embed.bias": embed.weight @ out["bias"] + embed.bias,
    }
    project = pointwise(quantizer.project_in, quantizer.dim)
    state |= {f"encoder.conv_out.{kind}": value for kind, value in project.items()}
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        state |= {f"{name}.{key}": value for key, value in _transformer(part).items()}
    state |= _two_stage_head(decoder) if isinstance(decoder, ProxyDecoder) else _head(decoder)
    model = {
        "codebook_size": len(codes),
        "token_size": codes.shape[1],
        "use_l2_norm": getattr(quantizer, "metric", "euclidean") == "cosine",
        "commitment_cost": 0.25,  # of its training
        "vit_enc_model_size": _size(encoder),
        "vit_dec_model_size": _size(decoder),
        "vit_enc_patch_size": side,
        "vit_dec_patch_size": height // decoder.grid[0],
        "num_latent_tokens": encoder.num_tokens,
        "finetune_decoder": two_stages,
        "is_legacy": two_stages,
    }
    config = {"model": {"vq_model": model}, "dataset": {"preprocessing": {"crop_size": height}}}
    opened = 'python, in its repository: TiTok.from_pretrained("{out}"), of images in [0, 1]'
    return Original(state, config, "model.safetensors", opened)


def _size(part: Any) -> str:
    sizes = (part.norm_out.normalized_shape[0], len(part.transformer.blocks))
    if sizes not in _SIZES:
        known = ", ".join(f"{depth} x {width}" for width, depth in _SIZES)
        raise ConfigError(f"its blocks are {known}, found {sizes[1]} x {sizes[0]}")
    return _SIZES[sizes]


def _transformer(part: Any) -> State:
    if part.class_token is None:
        raise ConfigError("it has class tokens, found class_token=false")
    # Theirs adds a position to the class token.
    state = {
        "class_embedding": part.class_token[0],
        "positional_embedding": torch.cat(
            [torch.zeros_like(part.patch_positions[:1]), part.patch_positions]
        ),
        "latent_token_positional_embedding": part.latent_positions,
    }
    layers = {"ln_pre": part.norm_in, "ln_post": part.norm_out}
    for number, block in enumerate(part.transformer.blocks):
        place = f"transformer.{number}"
        layers |= {f"{place}.{theirs}": block.get_submodule(o) for o, theirs in _BLOCK.items()}
        for kind, value in block.attn.qkv.state_dict().items():
            state[f"{place}.attn.in_proj_{kind}"] = value
    return state | _states(layers)


def _states(layers: dict[str, Any]) -> State:
    return {f"{k}.{end}": v for k, layer in layers.items() for end, v in layer.state_dict().items()}


def _head(decoder: LatentTransformerDecoder) -> State:
    """Patches of pixels and a convolution over their seams, from [-1, 1] to [0, 1]."""
    weight, bias = decoder.smooth.weight, decoder.smooth.bias
    assert bias is not None
    return {
        "decoder.ffn.0.weight": decoder.head.weight[..., None, None] / 2,
        "decoder.ffn.0.bias": (decoder.head.bias + 1) / 2,
        "decoder.conv_out.weight": weight,
        "decoder.conv_out.bias": (bias + 1 - weight.sum(dim=(1, 2, 3))) / 2,
    }


def _two_stage_head(decoder: ProxyDecoder) -> State:
    """Logits over the codes of MaskGIT's VQGAN, and its decoder."""
    pixels = decoder.pixel_decoder
    if decoder.learns != "pixels" or not isinstance(pixels, MaskGITDecoder):
        raise ConfigError("of two stages it is the second, with MaskGIT's decoder")
    sizes = (*decoder.code_vectors.weight.shape, *pixels.widths)
    if sizes != _PIXELS:
        raise ConfigError(f"its MaskGIT decoder has codes and widths of {_PIXELS}, found {sizes}")
    state = {"pixel_quantize.embedding.weight": decoder.code_vectors.weight}
    for number in (0, 2):
        for kind, value in pointwise(decoder.head[number], 0).items():  # pyright: ignore
            state[f"decoder.ffn.{number}.{kind}"] = value
    layers = {name: getattr(pixels, name) for name in ("conv_in", "norm_out", "conv_out")}
    blocks = [each for each in pixels.layers if isinstance(each, OutputSkipBlock)]
    count = len(blocks) // (len(pixels.widths) + 1)
    names = [f"mid.{n}" for n in range(count)]
    for level in reversed(range(len(pixels.widths))):
        names += [f"up.{level}.block.{n}" for n in range(count)]
        names += [f"up.{level}.upsample_conv"] * (level > 0)
    found = [each.conv if isinstance(each, Upsample) else each for each in pixels.layers]
    layers |= dict(zip(names, found, strict=True))
    return state | {
        f"pixel_decoder.{name.replace('skip', 'nin_shortcut')}": value
        for name, value in _states(layers).items()
    }
