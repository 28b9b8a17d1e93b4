"""Finite scalar quantization: each channel is bounded and rounded to a few levels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.registry import register
from vistok.core.sample_random import integers, uniform
from vistok.core.signatures import check_values
from vistok.core.values import (
    Count,
    Positive,
    Share,
    ShareRange,
    filled_list,
    whole,
)
from vistok.quantizers.base import Quantizer, token_mean
from vistok.quantizers.scalar import (
    check_slot,
    pack_digits,
    straight_through,
    unpack_digits,
)

_TILE = 64


Levels = Annotated[Sequence[int], filled_list(whole(2), "a list of whole numbers, 2 or more")]


@register("fsq")
class FSQ(Quantizer):
    """Finite scalar quantization (FSQ), with its symmetric and its iFSQ form.

    A channel with L levels becomes a digit in [0, L) and a value in [-1, 1]:

        standard    b = tanh(z + atanh(o / h)) h - o,  h = 1.001 (L - 1) / 2,  o = 1/2 for even L
                    digit = round(b) + L // 2,         value = round(b) / (L // 2)
        symmetric   y = tanh(slope z),                 value = 2 digit / (L - 1) - 1
                    digit = floor((L - 1)(y + 1) / 2 + 1/2)

    Nothing is learned, so nothing collapses; there is no loss. The index is the number with these
    digits, the first channel least significant. The gradient passes the rounding unchanged and
    the tanh: it fades beyond |z| = 3, which the metric "saturation" counts.

    Levels that the paper recommends: 2^8 [8, 6, 5], 2^10 [8, 5, 5, 5], 2^12 [7, 5, 5, 5, 5],
    2^14 [8, 8, 8, 6, 5], 2^16 [8, 8, 8, 5, 5, 5] (64 000 codes; FlexTok).

    Papers: FSQ, https://arxiv.org/abs/2309.15505 (its listing prints tan for atanh).
    iFSQ, https://arxiv.org/abs/2601.17124: symmetric with slope 0.8, which spreads a normal
    latent evenly. Noise: https://arxiv.org/abs/2411.19842. Dropout and corruption: FlexTok,
    https://arxiv.org/abs/2502.13967.

    Args:
        dim: width D of the latents.
        levels: L of each channel; their product is the codebook size, at most 2^18.
        num_codebooks: index slots Q, each with channels of its own at the same `levels`.
        grid: "standard" (L of 3 or more) or "symmetric" (2 or more).
        slope: factor before the tanh of the symmetric grid; 0.8 for iFSQ.
        noise_dropout: probability, per channel and token, that training adds uniform noise of
            one bin's width to the bounded value instead of rounding it.
        quantization_dropout: probability, per sample, that training does not round it at all.
        corruption_probability: probability, per sample, that training replaces some of its
            tokens by codes drawn uniformly. These pass no gradient. The reported indices, and so
            the usage statistics, stay those that the encoder chose.
        corruption_rate: `[least, most]` share of the tokens to replace, drawn per sample. (The
            released FlexTok code draws once per call and reads a least share of 0 as "most".)

    Raises:
        ConfigError: if a value is out of range; the message names its key.
    """

    whiten_projection = True

    def __init__(
        self,
        dim: Count,
        levels: Levels = (8, 8, 8, 5, 5, 5),
        num_codebooks: Count = 1,
        grid: Literal["standard", "symmetric"] = "standard",
        slope: Positive = 1.0,
        noise_dropout: Share = 0.0,
        quantization_dropout: Share = 0.0,
        corruption_probability: Share = 0.0,
        corruption_rate: ShareRange = (0.0, 1.0),
    ) -> None:
        check_values(FSQ, locals())
        levels = list(levels)
        if grid == "standard" and 2 in levels:
            raise ArgumentError(
                f"levels={levels}: a channel of 2 levels is almost constant on the standard grid "
                "(its threshold lies at z = -3.8); use grid=symmetric"
            )
        if grid == "standard" and slope != 1:
            raise ArgumentError(f"slope={slope}: only the symmetric grid has a slope")
        size = math.prod(levels)
        check_slot("levels", levels, size)
        super().__init__(dim, len(levels) * num_codebooks, [size] * num_codebooks)
        self.grid = grid
        self.slope = slope
        self.noise_dropout = noise_dropout
        self.quantization_dropout = quantization_dropout
        self.corruption_probability = corruption_probability
        self.corruption_rate = tuple(corruption_rate)
        # Constants of the channels, `(c,)` each: small, but used many times a step.
        self.levels: Tensor
        self.reach: Tensor  # h of the class docstring
        self.offset: Tensor  # o; the symmetric grid has none
        self.shift: Tensor
        self.middle: Tensor  # the digit of the value 0, and the bins between the values 0 and 1
        self.place: Tensor  # what a digit counts in the index
        self.tiles: Tensor  # (5, _TILE, c): shift, -offset, reach, middle, reach / middle
        count = torch.tensor(levels)
        symmetric = grid == "symmetric"
        self.register_buffer("levels", count, persistent=False)
        reach = (count - 1) / 2 if symmetric else (count - 1) * (1 + 1e-3) / 2
        offset = torch.zeros(len(levels)) if symmetric else (count % 2 == 0) * 0.5
        shift = torch.atanh(offset / reach)
        middle = (count - 1) / 2 if symmetric else (count // 2).float()
        self.register_buffer("reach", reach, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("middle", middle, persistent=False)
        constants = torch.stack([shift, -offset, reach, middle, reach / middle])
        self.register_buffer("tiles", constants[:, None].repeat(1, _TILE, 1), persistent=False)
        place = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("place", torch.tensor(place).float(), persistent=False)
        middles = [(level - 1) / 2 if symmetric else level // 2 for level in levels]
        self._first = sum(m * p for m, p in zip(middles, place, strict=True))  # of the bins 0
        # Above 1000 levels the slack of 0.1 % in the reach leads one digit too far.
        self._overshoots = max(levels) > 500

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        z, (shift, start, reach, middle, gain) = self._tiled(codes)
        squashed = self._squash(z, shift)
        bins = self._bins(squashed.detach(), start, reach, middle)
        # The gradient is that of the bounded value (h tanh - o) / middle, whose o has none.
        quantized = straight_through(squashed * gain, bins / middle)
        by_slot = (*codes.shape[:2], self.num_indices, len(self.levels))
        if self.noise_dropout or self.quantization_dropout or self.corruption_probability:
            soft = squashed * reach + start
            quantized = self._perturb(quantized.view(by_slot), soft.view(by_slot))
        # |tanh| > 0.995 leaves less than a hundredth of the gradient.
        saturated = F.hardshrink(squashed.detach(), 0.995)
        if mask is None:
            share = torch.linalg.vector_norm(saturated, 0) / max(saturated.numel(), 1)
        else:
            share = token_mean((saturated != 0).view_as(codes).float().mean(-1), mask)
        indices = self._pack(bins.view(by_slot))
        return QuantizerOutput(quantized.view_as(codes), indices, metrics={"saturation": share})

    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        z, (shift, start, reach, middle, _) = self._tiled(codes)
        bins = self._bins(self._squash(z, shift), start, reach, middle)
        return self._pack(bins.view(*codes.shape[:2], self.num_indices, len(self.levels)))

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        return self._values(unpack_digits(indices, self.levels)).flatten(-2)

    @property
    def against_collapse(self) -> str:
        """The grid is fixed: only the latents can spread."""
        return "fewer or smaller quantizer.levels, or a lower optimizer.lr"

    def digits(self) -> list[list[float]]:
        """Return the values of each channel's levels."""
        most = torch.arange(int(self.levels.max()), device=self.levels.device)
        values = self._values(most[:, None].minimum(self.levels - 1))
        counts = self.levels.tolist()
        return [values[:count, j].tolist() for j, count in enumerate(counts)]

    def codebooks(self) -> list[Tensor]:
        """The same table `(prod(levels), len(levels))` in [-1, 1] for each slot."""
        ids = torch.arange(self.codebook_sizes[0], device=self.levels.device)
        return [self._values(unpack_digits(ids, self.levels))] * self.num_indices

    def indices_of(self, quantized: Tensor) -> Tensor:
        """Indices `(B, N, Q)` of code vectors `(B, N, d)`: the inverse of the lookup.

        Code vectors are not latents: `encode` of one would put it through the tanh again.
        """
        digits = quantized.unflatten(-1, (self.num_indices, -1)) * self.middle + self.middle
        return pack_digits(digits.round(), self.levels)

    def latents_of(self, indices: Tensor) -> Tensor:
        """Latents `(B, N, d)` before the tanh, in the middle of the bins of `indices`."""
        values = self._values(unpack_digits(indices, self.levels))
        position = ((values * self.middle + self.offset) / self.reach).clamp(-0.9995, 0.9995)
        return ((torch.atanh(position) - self.shift) / self.slope).flatten(-2)

    def _tiled(self, codes: Tensor) -> tuple[Tensor, Iterable[Tensor]]:
        """Codes as `(rows, tile, c)`, and the constants of `tiles` as `(tile, c)`.

        A handful of channels is too short a row to compute with: next to constants that are
        repeated for 64 tokens the same arithmetic takes half the time on a CPU.
        """
        rows = codes.numel() // len(self.levels)
        tile = 1 if torch.compiler.is_compiling() else math.gcd(rows, _TILE)
        return codes.reshape(rows // tile, tile, len(self.levels)), self.tiles[:, :tile].unbind(0)

    def _squash(self, z: Tensor, shift: Tensor) -> Tensor:
        return torch.tanh(z + shift if self.grid == "standard" else self.slope * z)

    def _bins(self, squashed: Tensor, start: Tensor, reach: Tensor, middle: Tensor) -> Tensor:
        """The digits less `middle`, as floats: -middle to L - 1 - middle."""
        soft = torch.addcmul(start, squashed, reach)
        if self.grid == "symmetric":
            return torch.floor(soft + (middle + 0.5)) - middle
        bins = soft.round_()
        if self._overshoots:
            bins = torch.minimum(torch.maximum(bins, -middle), self.levels - 1 - middle)
        return bins

    def _pack(self, bins: Tensor) -> Tensor:
        """Indices of `_bins`."""
        # In float64, whatever precision products of float32 may have: they hold integers of 18
        # bits. Apple's devices have no float64, nor products of less precision.
        exact = bins if bins.device.type == "mps" else bins.double()
        return (exact @ self.place.to(exact.dtype) + self._first).long()

    def _values(self, digits: Tensor) -> Tensor:
        return (digits - self.middle) / self.middle

    def _perturb(self, quantized: Tensor, soft: Tensor) -> Tensor:
        """Noise, dropout and corruption; all `(B, N, Q, c)`."""
        batch, tokens, slots, _ = soft.shape
        device = soft.device
        if self.noise_dropout:
            least, most = -self.middle, self.levels - 1 - self.middle
            noisy = torch.clamp(soft + uniform(soft.shape, device) - 0.5, least, most)
            noisy = straight_through(soft / self.middle, noisy / self.middle)
            chosen = uniform(soft.shape, device) < self.noise_dropout
            quantized = torch.where(chosen, noisy, quantized)
        if self.quantization_dropout:
            skip = uniform((batch, 1, 1, 1), device) < self.quantization_dropout
            quantized = torch.where(skip, soft / self.middle, quantized)
        if self.corruption_probability:
            least, most = self.corruption_rate
            chosen = uniform((batch, 1), device) < self.corruption_probability
            rate = chosen * (least + (most - least) * uniform((batch, 1), device))
            replaced = uniform((batch, tokens), device) < rate
            ids = integers(0, self.codebook_sizes[0], (batch, tokens, slots), device)
            random = self._values(unpack_digits(ids, self.levels))
            quantized = torch.where(replaced[..., None, None], random, quantized)
        return quantized
