"""How a term of the objective counts: its weight and its schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vistok.core.values import Index, NonNegative, Share


@dataclass(frozen=True)
class Entry:
    """Weight and schedule of a term.

    Attributes:
        weight: of the term in the sum.
        of: name of the prediction that it compares.
        start_samples: position in the data from which it counts; 0 for what `start` says.
        ramp_samples: samples over which its weight rises from 0, linearly; 0 for what `ramp` says.
        start: the same as a share of the run, until `resolved` says how many samples these are.
        ramp: the same as a share of the run.
        adaptive: whether the weight is times the ratio of the other terms' gradient to the term's
            own: True for the ratio at the decoder's last layer (`adaptive_scale`), "picture" for
            that at the prediction, of the terms that compare the same one (`picture_scale`).
    """

    weight: NonNegative
    of: str = "image"
    start_samples: Index = 0
    ramp_samples: Index = 0
    start: Share = 0.0
    ramp: Share = 0.0
    adaptive: bool | Literal["picture"] = False

    def resolved(self, total_samples: int) -> Entry:
        """Return it with shares in samples of a run of `total_samples`."""
        start = self.start_samples or round(self.start * total_samples)
        ramp = self.ramp_samples or round(self.ramp * total_samples)
        return replace(self, start_samples=start, ramp_samples=ramp, start=0.0, ramp=0.0)

    def counts(self, samples_seen: int) -> bool:
        """Return whether the term has started."""
        return samples_seen >= self.start_samples

    def weight_at(self, samples_seen: int) -> float:
        """Return the weight at a position in the data."""
        if not self.counts(samples_seen):
            return 0.0
        if not self.ramp_samples:
            return self.weight
        return self.weight * min(1.0, (samples_seen - self.start_samples) / self.ramp_samples)


def resolve_terms(terms: Mapping[str, Any], total_samples: int) -> None:
    """Turn the shares in the config of an objective's terms into samples, in place."""
    for options in terms.values():
        if isinstance(options, dict):
            for name in ("start", "ramp", "warmup"):
                if share := options.get(name):
                    given = options.get(f"{name}_samples")
                    options[f"{name}_samples"] = given or round(share * total_samples)
                    options[name] = 0.0
