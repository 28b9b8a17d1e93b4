"""What the layers hand to each other. Everything else is private to its layer.

Inside the package images are `(B, C, H, W)` float in [-1, 1], latents `(B, N, D)` float and
indices `(B, N, Q)` int64, for 1D tokens and (row-major) 2D grids alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class QuantizerOutput:
    """What a quantizer returns.

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


@dataclass(frozen=True)
class TokenizerOutput:
    """What a tokenizer's training forward returns.

    Attributes:
        prediction: what the decoder says; pixels `(B, C, H, W)`, proxy logits or a velocity.
        target: what it should have said, of the same shape (or class ids for logits).
        quantizer: the quantizer's output.
        mask: `(B, N)` bool, True for the tokens that the decoder was given; None for all.
    """

    prediction: Tensor
    target: Tensor
    quantizer: QuantizerOutput
    mask: Tensor | None = None
