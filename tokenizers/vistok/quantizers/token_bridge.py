"""TokenBridge: a continuous tokenizer made discrete channel by channel, after its training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vistok.core.errors import ArgumentError
from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.ranks import all_reduce_mean_with_grad
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.values import CodebookSize, Count, Decay, NonNegative, Positive
from vistok.quantizers.base import Quantizer
from vistok.quantizers.scalar import straight_through, token_weights


@register("token_bridge")
class TokenBridge(Quantizer):
    """Dimension-wise quantization of latents that are roughly normal.

    Every channel is an index slot of its own. A channel is standardised and clamped, and takes
    the nearest of K levels: the means of a standard normal within K bins of equal probability
    cut off at +-`std_range`. The standard normal's axis is stretched by
    `value_range / std_range` first, as released: levels reach to +-4.06 for K = 64 instead of
    +-2.4, at the price of unit-variance latents using 5.72 of the 6 bits. With both ranges equal
    the levels are the normal's own.

    With `post_training` (the paper's way) the tokenizer trains as a continuous one: the decoder
    gets the latents as they are, and the levels only follow their mean and deviation. Eval,
    `encode` and `decode` are discrete, so validation shows what the codes reach. Without it,
    training rounds with a straight-through gradient.

    In both, the loss "moment" keeps the latents where the levels are: the divergence from the
    standard normal of a normal with each channel's mean and variance over the batch, in nats per
    channel.

    A continuous tokenizer from elsewhere: build this with its latent width and
    `codebook_dim: null`, call `initialize` on latents (M, D) of training images, and put it in
    place of the bottleneck, in eval mode. Nothing is trained. Without `initialize` the latents
    are taken to have unit variance.

    Paper: https://arxiv.org/abs/2503.16430. Departures: mean and standard deviation per channel
    instead of one given scale; the search is `bucketize` on the midpoints, the same indices
    without the N x C x K table of the released code.

    Args:
        dim: width D of the latents.
        codebook_dim: channels C, each with an index; None for C = D and no projection.
        codebook_size: levels K of a channel, 2 to 512.
        value_range: latents beyond this many standard deviations are clamped.
        std_range: where the standard normal is cut off.
        calibrate: whether `initialize` sets mean and standard deviation of the channels.
        moment_weight: weight of the loss "moment".
        post_training: train without rounding; see above.
        decay: of the moving mean and variance that the levels follow with `post_training`, per
            optimizer step, in [0, 1).

    Raises:
        ConfigError: if a value is out of range; the message names its key.
    """

    whiten_projection = True

    def __init__(
        self,
        dim: Count,
        codebook_dim: Count | None = 16,
        codebook_size: CodebookSize = 64,
        value_range: Positive = 5.0,
        std_range: Positive = 3.0,
        calibrate: bool = True,
        moment_weight: NonNegative = 0.01,
        post_training: bool = False,
        decay: Decay = 0.99,
    ) -> None:
        check_values(TokenBridge, locals())
        levels = normal_levels(codebook_size, std_range)
        if not torch.all(levels.diff() > 1e-4):
            raise ArgumentError(
                f"codebook_size={codebook_size}: too many levels for "
                f"std_range={std_range}, whose outer bins are empty; use at most 512"
            )
        channels = codebook_dim or dim
        super().__init__(dim, channels, [codebook_size] * channels, {"moment": moment_weight})
        self.calibrate = calibrate
        self.post_training = post_training
        self.decay = decay
        self._moments: list[Tensor] = []  # of the forwards since the last step
        self.mean: Tensor
        self.std: Tensor
        self.levels: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        levels = (levels * (value_range / std_range)).float()
        self.register_buffer("levels", levels.to(self.mean.device), persistent=False)

    @property
    def num_init_latents(self) -> int:
        """Latents for the moments of `initialize`: 8192 leave an error of about 1 %."""
        return 8192 if self.calibrate else 0

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        """Set mean and standard deviation of the channels to those of `latents` `(M, D)`."""
        if not self.calibrate:
            return
        codes = self.project_in(latents.float())
        self.mean.copy_(codes.mean(0))
        self.std.copy_(codes.std(0, correction=0).clamp(min=1e-6))

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        indices = self._search(codes)
        x = (codes - self.mean) / self.std
        clipped = (x.abs() > self.levels[-1]).float().mean(-1)
        weights = token_weights(codes, mask)
        metrics = {"clipped": (weights @ clipped.flatten()).detach()}
        if self.post_training:
            moments = _moments(codes.flatten(0, 1), weights)
            self._moments.append(moments.detach())
            return QuantizerOutput(codes, indices, {"moment": _divergence(moments)}, metrics)
        quantized = straight_through(codes, self._lookup(indices))
        losses = {"moment": _divergence(_moments(x.flatten(0, 1), weights))}
        return QuantizerOutput(quantized, indices, losses, metrics)

    @torch.no_grad()
    def after_step(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Tensor]:
        """With `post_training`, let the levels follow the latents of the step."""
        moments = [m for m in self._moments if bool(m[0, 0] > 0)]  # 0: no token counted
        self._moments = []
        if moments:
            _, mean, square = torch.stack(moments).mean(0)
            variance = (square - mean.square()).clamp(min=1e-12)
            # The variance around the moving mean, were the two batches one.
            old = self.std.square() + (1 - self.decay) * (mean - self.mean).square()
            self.mean.lerp_(mean, 1 - self.decay)
            self.std.copy_(old.lerp(variance, 1 - self.decay).sqrt())
        return {}

    def discard(self) -> None:
        """Forget the latents of the step."""
        self._moments = []

    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        # Clamping is implicit: beyond the last midpoint everything has the last level.
        midpoints = (self.levels[1:] + self.levels[:-1]) / 2
        x = (codes - self.mean) / self.std
        return torch.bucketize(x.contiguous(), midpoints)  # it warns of other memory and copies it

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        return self.levels[indices] * self.std + self.mean

    def codebooks(self) -> list[Tensor]:
        """C tables `(K, 1)`: the levels of each channel, in units of the latents."""
        tables = self.levels[:, None] * self.std + self.mean
        return [table[:, None] for table in tables.unbind(1)]


def normal_levels(num_levels: int, std_range: float) -> Tensor:
    """Means `(K,)` float64 of a standard normal within K equally probable bins.

    The bins' edges are clamped to +-`std_range`; each level is the mean of the normal truncated
    to its bin. On the CPU also where the default device is another one.
    """
    edges = torch.special.ndtri(
        torch.linspace(0, 1, num_levels + 1, dtype=torch.float64, device="cpu")
    ).clamp(-std_range, std_range)
    density = torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5
    mass = torch.special.ndtr(edges).diff()
    return -density.diff() / mass.clamp(min=1e-30)


def _moments(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted means `(3, C)` over all ranks of 1, x and x², for `(N, C)` values."""
    columns = torch.cat([torch.ones_like(x), x, x.square()], 1)
    return all_reduce_mean_with_grad(weights @ columns).view(3, -1)


def _divergence(moments: Tensor) -> Tensor:
    """Mean over channels of KL(N(mean, variance) | N(0, 1)) of `_moments`, in nats."""
    total, mean, square = moments.unbind()
    variance = (square - mean.square()).clamp(min=1e-6)
    # total is 1, or 0 where no token counts
    return (total * (variance + mean.square() - 1 - variance.log())).mean() / 2
