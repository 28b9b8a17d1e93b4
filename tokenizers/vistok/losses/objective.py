"""The training loss: named terms and their weights."""

from __future__ import annotations

from torch import Tensor, nn

from vistok.core.errors import ConfigError
from vistok.core.outputs import TokenizerOutput


class CompositeLoss(nn.Module):
    """Weighted sum of named terms and of the quantizer's own losses.

    The terms' weights live in the loss config. The quantizer's weights live in the quantizer
    config, so that exchanging the quantizer exchanges them too. A loss without a weight is an
    error, never a silent drop. Perceptual and adversarial terms are more entries in `terms`.

    Args:
        terms: name to module; each maps `(TokenizerOutput, step)` to a scalar.
        weights: name to weight, for exactly these names.
    """

    def __init__(self, terms: dict[str, nn.Module], weights: dict[str, float]) -> None:
        super().__init__()
        if set(terms) != set(weights):
            odd = ", ".join(sorted(set(terms) ^ set(weights)))
            raise ConfigError(f"loss.weights: names must equal those of loss.terms; check {odd}")
        self.terms = nn.ModuleDict(terms)
        self.weights = {name: float(weight) for name, weight in weights.items()}

    def forward(
        self, output: TokenizerOutput, quantizer_weights: dict[str, float], step: int
    ) -> dict[str, Tensor]:
        """All terms unweighted under their names, and their weighted sum as "total"."""
        losses = {name: term(output, step) for name, term in self.terms.items()}
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        for name, loss in output.quantizer.losses.items():
            if name not in quantizer_weights:
                raise ConfigError(f"quantizer loss '{name}' has no weight")
            if name in losses:
                raise ConfigError(f"loss.terms.{name}: the quantizer has a loss of that name")
            losses[name] = loss
            total = total + quantizer_weights[name] * loss
        return {**losses, "total": total}  # type: ignore[dict-item]
