"""Define what the floors hand to each other. Everything else is private to its floor.

Inside the package images are `(B, C, H, W)` float in [-1, 1], latents `(B, N, D)` float and
indices `(B, N, Q)` int64, for 1D tokens and (row-major) 2D grids alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class QuantizerOutput:
    """Output of a quantizer.

    Attributes:
        quantized: `(B, N, D)` float32. In training it carries the gradient estimator back to
            the latents; in eval it is exactly `decode(indices)`.
        indices: `(B, N, Q)` int64; Q is the depth of a residual or the groups of a product VQ.
        losses: unweighted float32 scalars, for example "commitment", "codebook", "entropy".
            Their weights are the quantizer's `loss_weights`.
        metrics: detached scalars worth logging.
    """

    quantized: Tensor
    indices: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


#: What the values of a prediction are.
KINDS = ("pixels", "velocity", "logits", "features", "logit_laplace")


@dataclass(frozen=True)
class Prediction:
    """Value and target of one head of a decoder.

    Attributes:
        value: what the head returned.
        target: of the same shape, or class ids for logits.
        kind: one of `KINDS`: "pixels" `(B, C, H, W)` in [-1, 1], a flow's "velocity" of that
            shape, "logits" `(B, places, K)` with ids `(B, places)` as their target, "features"
            `(B, places, width)`, or "logit_laplace" `(B, 2 C, H, W)`, the locations and logarithms
            of scales of C channels, with pixels as their target.
        weight: `(B,)`, how much each sample counts; None for all alike.
    """

    value: Tensor
    target: Tensor
    kind: str
    weight: Tensor | None = None

    def mean(self, errors: Tensor) -> Tensor:
        """Return the mean of errors `(B, ...)` over everything, each sample by its weight."""
        if self.weight is None:
            return errors.mean()
        per_sample = errors.flatten(1).mean(dim=1)
        weight = self.weight.to(per_sample)
        return (per_sample * weight).sum() / weight.sum().clamp(min=1e-12)


@dataclass(frozen=True)
class TokenizerOutput:
    """Output of a tokenizer's training forward.

    Attributes:
        predictions: of the decoder's heads by name: "image", and whatever a system adds.
        quantizer: the quantizer's output.
        mask: `(B, N)` bool, True for the tokens that the decoder was given; None for all.
        features: what was tapped, `(B, places, width)` by name; see `core/taps.py`.
    """

    predictions: dict[str, Prediction]
    quantizer: QuantizerOutput
    mask: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
