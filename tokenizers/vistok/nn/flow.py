"""Rectified flow: straight paths from data (s = 0) to noise (s = 1), and how to walk back."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def mix(data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """The point of the path at `time` `(B,)` in [0, 1]: (1 - s) data + s noise."""
    s = time.view(-1, *[1] * (data.ndim - 1))
    return (1 - s) * data + s * noise


def integrate(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Walk from noise to data in equal Euler steps; exact where the velocity is constant.

    Args:
        velocity: of a point `(B, ...)` at times `(B,)`, the derivative by s: noise - data.
        noise: `(B, ...)` float32, the point at s = 1.
        steps: 1 or more. With one step the result is what the network expects of the data on
            average, which looks smooth.
    """
    x = noise
    for step in range(steps):
        time = noise.new_full((len(noise),), 1 - step / steps)
        x = x - velocity(x, time).float() / steps
    return x


class Guidance:
    """Classifier-free guidance of a velocity, plain or as adaptive projected guidance (APG).

    Plain: u + g (c - u). APG (Sadat et al. 2024, https://arxiv.org/abs/2410.02416) bends the
    difference c - u: it is given momentum over the steps, cut to a norm, and loses what is
    parallel to c, which would oversaturate. With g = 1 both are c itself. One per sampling.

    Args:
        scale: g; 1 for none.
        apg: the adaptive form.
        momentum: of the difference.
        threshold: largest norm of the difference of one image.
    """

    def __init__(
        self, scale: float, apg: bool = True, momentum: float = -0.5, threshold: float = 2.5
    ) -> None:
        self.scale = scale
        self.apg = apg
        self.momentum = momentum
        self.threshold = threshold
        self._running: Tensor | None = None

    def __call__(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The guided velocity; all `(B, ...)`."""
        c, difference = conditional, conditional - unconditional
        if self.apg:
            if self._running is not None:
                difference = difference + self.momentum * self._running
            self._running = difference
            norm = _norm(difference)
            difference = difference * (self.threshold / norm.clamp(min=1e-12)).clamp(max=1)
            direction = c / _norm(c).clamp(min=1e-12)
            parallel = (difference * direction).flatten(1).sum(dim=1).view_as(norm) * direction
            difference = difference - parallel
        return c + (self.scale - 1) * difference


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def time_features(time: Tensor, width: int, slowest: float = 1.0) -> Tensor:
    """Sines and cosines `(B, width)` of times `(B,)` in [0, 1], at rising frequencies.

    Args:
        time: in units of the whole path.
        width: number of features.
        slowest: lowest frequency, in radians for the whole path; the highest is all but 256 times
            that. With 1, no feature comes round more than 41 times.
    """
    half = width // 2
    frequencies = torch.exp(math.log(256.0) * torch.arange(half, device=time.device) / half)
    angles = time.float()[:, None] * (slowest * frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
