"""Released weights of VQGAN's CNN and of those that followed it, under the names of this project.

Published names differ in how they spell levels and in the order of the decoder's: in one list
level 0 has the highest resolution (VQGAN, VAR, Open-MAGVIT2), in another the lowest (LlamaGen,
Janus). Shapes do not tell, for neighbouring levels may be equally wide. But levels of the highest
resolution have no upsampling, and so the names do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import CheckpointError
from vistok.core.released_weights import Published, inside

State = dict[str, Tensor]

_ATTENTION = ("q.weight", "qkv.weight")
_BLOCK = ("norm1", "conv1", "norm2", "conv2")


def cnn_encoder(published: Published, prefix: str = "encoder") -> tuple[dict[str, Any], State]:
    """Config and state of an encoder, whose published names begin with `prefix`.

    The config has no `image_size`; which side a strided convolution is padded on is the caller's
    to say, as no tensor does.
    """
    part = _Part(published, prefix)
    order = list(range(part.num_levels))
    layers: list[tuple[str, str]] = []
    for level in order:
        layers += part.level(level)
        layers += [(name, ".conv") for name in part.resampling(level)]
    layers += part.middle()
    options = part.options(order)
    state = part.take(layers)
    state |= published.move({f"{prefix}.{end}": end for end in ("conv_in", "norm_out", "conv_out")})
    base = len(state["conv_in.weight"])
    config = {
        "_target_": "cnn_encoder",
        "channels": state["conv_in.weight"].shape[1],
        "base_channels": base,
        "channel_multipliers": [width // base for width in part.widths],
        **options,
        "latent_dim": len(state["conv_out.weight"]),
        "output_kernel": state["conv_out.weight"].shape[2],
    }
    return config, state


def cnn_decoder(
    published: Published, prefix: str = "decoder", base_channels: int | None = None
) -> tuple[dict[str, Any], State]:
    """Return what `cnn_encoder` does, for a decoder.

    Args:
        published: the tensors.
        prefix: with which their names begin.
        base_channels: the encoder's; None for the channels of the last level.
    """
    part = _Part(published, prefix)
    count = part.num_levels
    highest = [level for level in range(count) if not part.resampling(level)]
    first, last = list(range(len(highest))), list(range(count - len(highest), count))
    if not highest or highest not in (first, last):
        raise CheckpointError(
            f"'{prefix}': the first levels or the last ones, one at least, must be without "
            f"upsampling, found {highest or 'none'} of {count}"
        )
    # From low to high resolution, as they run.
    order = list(range(count)) if highest == last else list(reversed(range(count)))
    layers: list[tuple[str, str]] = part.middle()
    adaptive = f"{prefix}.adaptive.0.gamma.weight" in published.left
    for level in order:
        if adaptive:
            layers.append((f"{prefix}.adaptive.{level}", ""))
        layers += part.level(level)
        layers += [(name, ".conv") for name in part.resampling(level)]
    spaced = any(name.endswith(".conv1") for name in part.resampling(order[0]))
    options = part.options(order[::-1])
    state = part.take(layers)
    state |= published.move({f"{prefix}.{end}": end for end in ("conv_in", "norm_out", "conv_out")})
    if spaced:
        _space_by_channels(state)
    widths = [part.widths[level] for level in order[::-1]]
    base = base_channels or widths[0]
    config = {
        "_target_": "cnn_decoder",
        "channels": len(state["conv_out.weight"]),
        "latent_dim": state["conv_in.weight"].shape[1],
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        **options,
        "upsample": "depth_to_space" if spaced else "nearest",
        "adaptive_norm": adaptive,
        "unbiased_deviation": adaptive,
    }
    return config, state


class _Part:
    """An encoder or decoder of a file: how it spells what it has."""

    def __init__(self, published: Published, prefix: str) -> None:
        self.published, self.prefix = published, prefix
        down = any(self._has(f"{prefix}.down.{end}") for end in ("0.block", "0.res_blocks"))
        if self._has(f"{prefix}.conv_blocks.0"):
            self.levels, self.blocks = f"{prefix}.conv_blocks", "res"
        else:
            self.levels = f"{prefix}.{'down' if down else 'up'}"
            self.blocks = "res_blocks" if self._has(f"{self.levels}.0.res_blocks") else "block"
        self.num_levels = published.count(self.levels)
        if not self.num_levels:
            published.shape(
                f"{self.levels}.0.{self.blocks}.0.conv1.weight"
            )  # says that it is missing
        self.num_blocks = published.count(f"{self.levels}.0.{self.blocks}")
        self.widths = [
            published.shape(f"{self.levels}.{level}.{self.blocks}.0.conv1.weight")[0]
            for level in range(self.num_levels)
        ]
        self.middle_layers = self._middle()

    def _has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.published.left)

    def _attends(self, name: str) -> bool:
        return any(f"{name}.{end}" in self.published.left for end in _ATTENTION)

    def level(self, number: int) -> list[tuple[str, str]]:
        """Names of a level's layers, in their order, and what ours add to their own names."""
        names = []
        for block in range(self.published.count(f"{self.levels}.{number}.{self.blocks}")):
            names.append(f"{self.levels}.{number}.{self.blocks}.{block}")
            attention = f"{self.levels}.{number}.attn.{block}"
            names += [attention] * self._attends(attention)
        return [(name, "") for name in names]

    def resampling(self, number: int) -> list[str]:
        """Name of a level's strided convolution or upsampling, if it has one."""
        ends = ("downsample.conv", "downsample", "down_conv")
        ends += ("upsample.conv", "upsample.conv1", "upsample_conv")
        names = [f"{self.levels}.{number}.{end}" for end in ends]
        return [name for name in names if f"{name}.weight" in self.published.left]

    def middle(self) -> list[tuple[str, str]]:
        """Names of the layers at the lowest resolution."""
        return [(name, "") for name in self.middle_layers]

    def _middle(self) -> list[str]:
        for start in ("mid_block", "mid.res_blocks", "mid"):
            names = [f"{self.prefix}.{start}.{n}" for n in range(100)]
            if found := [name for name in names if self._has(name)]:
                return found
        names = [f"{self.prefix}.mid.{end}" for end in ("block_1", "attn_1", "block_2")]
        return [name for name in names if self._has(name)]

    def options(self, levels: list[int]) -> dict[str, Any]:
        """Options that encoders and decoders share; `levels` from high to low resolution."""
        attending = [
            place
            for place, level in enumerate(levels)
            if self._attends(f"{self.levels}.{level}.attn.0")
        ]
        in_middle = any(map(self._attends, self.middle_layers))
        if attending and not in_middle:
            raise CheckpointError(f"'{self.prefix}': attention in levels, but not in the middle")
        last = len(levels) - 1
        halvings = sum(bool(self.resampling(level)) for level in levels)
        return {
            "num_res_blocks": self.num_blocks,
            "attention": in_middle,
            "level_attention": attending == [last] if attending in ([], [last]) else attending,
            "block": self._block(),
            "norm_groups": 32,
            "middle_blocks": sum(not self._attends(name) for name in self.middle_layers),
            **({} if halvings == last else {"halvings": halvings}),
        }

    def _block(self) -> str:
        first = f"{self.levels}.0.{self.blocks}.0.conv1"
        if f"{first}.bias" in self.published.left:
            return "biased"
        return "output_skip" if self.blocks == "res_blocks" else "unbiased"

    def _parts(self, name: str) -> tuple[str, ...]:
        """Return the parts that a block or attention must have, and one that it may; else none."""
        if self._attends(name):
            fused = f"{name}.qkv.weight" in self.published.left
            return ("norm", *(("qkv",) if fused else "qkv"), "proj_out")
        if any(self._has(f"{name}.{part}") for part in _BLOCK):
            return (*_BLOCK, *["nin_shortcut"] * self._has(f"{name}.nin_shortcut"))
        return ()

    def take(self, layers: list[tuple[str, str]]) -> State:
        """Take the tensors of layers, under the names that they have in ours."""
        names, biases = {}, []
        for n, (name, end) in enumerate(layers):
            parts, ours = self._parts(name), f"layers.{n}{end}"
            names |= {f"{name}.{part}": f"{ours}.{part}" for part in parts} or {name: ours}
            for part in parts:
                place, always = f"{name}.{part}", not part.startswith(("conv", "nin"))
                plain = f"{place}.weight" in self.published.left or not self._has(place)
                if plain and (always or self._block() == "biased"):
                    biases.append(f"{place}.bias")
        for name in biases:  # the weights are asked for as parts are moved
            self.published.shape(name)
        moved = self.published.move(names)
        renamed = (("nin_shortcut", "skip"), ("gamma", "scale"), ("beta", "shift"))
        for theirs, ours in (*renamed, ("proj_out", "proj")):
            moved = {name.replace(f".{theirs}.", f".{ours}."): v for name, v in moved.items()}
        for name in [name for name in moved if name.endswith((".q.weight", ".q.bias"))]:
            start, _, kind = name.rpartition("q.")
            joint = [moved.pop(f"{start}{one}.{kind}") for one in "qkv"]
            moved[f"{start}qkv.{kind}"] = torch.cat(joint)
        return moved


def _space_by_channels(state: State) -> None:
    """Order the channels of upsamplings as ours: theirs count the four pixels first."""
    for name in [name for name in state if name.endswith((".conv.weight", ".conv.bias"))]:
        state[name] = state[name].unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)


def grid_tokenizer(
    published: Published,
    target: str,
    image_size: Any,
    encoder: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    convolutions: bool = True,
) -> tuple[dict[str, Any], State]:
    """Config and state of a CNN encoder and decoder, with the convolutions around the quantizer.

    Args:
        published: the tensors.
        target: name of the tokenizer's class.
        image_size: of the config; convolutions take any multiple of the stride.
        encoder: further options of the encoder.
        decoder: and of the decoder.
        convolutions: `quant_conv` and `post_quant_conv` are maps of latents to as many channels,
            and those of encoder and decoder; False leaves them, as the quantizer's projections.
    """
    encoder_config, encoder_state = cnn_encoder(published)
    decoder_config, decoder_state = cnn_decoder(
        published, base_channels=encoder_config["base_channels"]
    )
    if convolutions:
        encoder_state |= published.move({"quant_conv": "latent_conv"})
        decoder_state |= published.move({"post_quant_conv": "latent_conv"})
        for config, state in ((encoder_config, encoder_state), (decoder_config, decoder_state)):
            config["latent_kernel"] = state["latent_conv.weight"].shape[2]
    encoder_config |= encoder or {}
    channels = encoder_config["channels"] // encoder_config.get("stem", 1) ** 2
    sizes = {"image_size": image_size, "channels": channels}
    tokenizer = {
        "_target_": target,
        **sizes,
        "encoder": encoder_config | sizes,
        "decoder": decoder_config | sizes | (decoder or {}),
    }
    return tokenizer, inside("encoder", encoder_state) | inside("decoder", decoder_state)


def projections(published: Published) -> State:
    """1x1 convolutions to and from narrow codes, as a quantizer's projections."""
    state = {}
    for theirs, ours in (("quant_conv", "project_in"), ("post_quant_conv", "project_out")):
        state[f"quantizer.{ours}.weight"] = published.take(f"{theirs}.weight").flatten(1)
        state[f"quantizer.{ours}.bias"] = published.take(f"{theirs}.bias")
    return state
