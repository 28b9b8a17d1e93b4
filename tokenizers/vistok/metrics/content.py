"""Content that reconstructions keep: words that read the same, faces that are the same person's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import DataError
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.values import Share
from vistok.metrics.image import ImageMetric
from vistok.nn.frozen import Frozen
from vistok.nn.network import Network, Region


class ContentMetric(ImageMetric):
    """A metric of what a network finds in originals, and sees at the same places afterwards.

    TokBench (Wu et al. 2025, https://arxiv.org/abs/2505.18142) has places annotated by people;
    here the network finds them in the originals, so any images do. Values compare on the same
    images alone. Originals are looked at once for all numbers of tokens.

    Args:
        network: finds and describes.
        gift: of the network.
        names: of the sums over what was found.
    """

    def __init__(self, network: Network, gift: str, names: Sequence[str]) -> None:
        super().__init__()
        network.require(gift)
        self.gift, self.names = gift, tuple(names)
        self.network = Frozen(network)
        for name in (*self.names, "found"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def options(self) -> dict[str, Any]:
        """Return the network."""
        return {"network": self.network.module.identity()}  # type: ignore[operator]

    def counts(self, region: Region) -> bool:
        """Return whether what was found in an original counts."""
        return True

    def judged(self, before: Any, after: Any) -> Sequence[float]:
        """Return a number for each of `names`, of a region in an original and afterwards."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""
        self.check_pair(originals, reconstructions)
        network: Network = self.network.module  # type: ignore[assignment]
        found = network.recall("regions", originals, network.regions)
        kept = [[region for region in own if self.counts(region)] for own in found]
        values = network.values(reconstructions.float() / 127.5 - 1, kept)
        for regions, after in zip(kept, values, strict=True):
            for region, value in zip(regions, after, strict=True):
                for name, number in zip(self.names, self.judged(region.value, value), strict=True):
                    setattr(self, name, getattr(self, name) + number)
                self.found += 1  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Return the means of `names`, and "found", of how many.

        Raises:
            DataError: if there was nothing in the originals.
        """
        found: Tensor = self.found  # type: ignore[assignment]
        if not found:
            raise DataError(
                f"{self.network.module.name} finds no {self.gift} in the originals; "
                f"measure images that have some"
            )
        means = {name: getattr(self, name) / found for name in self.names}
        return {**means, "found": torch.tensor(int(found))}


@register("text_kept", kind="metric")
class TextKept(ContentMetric):
    """Share of words that read the same, and how alike the readings are: T-ACC and T-NED.

    "accuracy" is the share of exactly equal readings, upper and lower case apart; "similarity" the
    mean of 1 - edits / length of the longer reading, both 0 to 1. TokBench counts the words that
    its reader gets right in the original; here a word counts that the reader is sure of.

    Args:
        network: finds and reads text.
        confidence: that it must have in the original's reading, 0 to 1.
    """

    higher_is_better = True

    def __init__(self, network: Network, confidence: Share = 0.5) -> None:
        super().__init__(network, "text", ("accuracy", "similarity"))
        check_values(TextKept, locals())
        self.confidence = confidence

    def options(self) -> dict[str, Any]:
        """Return the network, and which words count."""
        return {**super().options(), "confidence": self.confidence}

    def counts(self, region: Region) -> bool:
        """Return whether a reading is sure enough, and says something."""
        return bool(region.value.strip()) and region.confidence >= self.confidence

    def judged(self, before: str, after: str) -> Sequence[float]:
        """Return whether two readings are equal, and how alike they are."""
        longer = max(len(before), len(after))
        return float(before == after), 1 - edits(before, after) / longer


@register("faces_kept", kind="metric")
class FacesKept(ContentMetric):
    """Distance of the faces' vectors before and afterwards, and the share of the same persons.

    "distance" is the mean Euclidean distance, lower is better; "same" the share below `same`.
    TokBench gives the cosine of another embedding. This one's vectors all point one way, so that
    even two persons' have a cosine near 1.

    Args:
        network: finds and embeds faces.
        same: distance below which two faces are one person's; dlib's own is 0.6.
    """

    higher_is_better = False

    def __init__(self, network: Network, same: float = 0.6) -> None:
        super().__init__(network, "faces", ("distance", "same"))
        check_values(FacesKept, locals())
        self.same_below = same

    def options(self) -> dict[str, Any]:
        """Return the network, and which distance is one person's."""
        return {**super().options(), "same": self.same_below}

    def judged(self, before: Tensor, after: Tensor) -> Sequence[float]:
        """Return the distance of two vectors, and whether they are one person's."""
        distance = float((before.double() - after.double()).norm())
        return distance, float(distance < self.same_below)


def edits(a: str, b: str) -> int:
    """Return the least number of characters to insert, delete or exchange (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]
