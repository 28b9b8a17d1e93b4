"""Robustness: what a decoder makes of tokens that are a little wrong, as a generator's are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vistok.core.errors import ConfigError, as_written
from vistok.core.sample_random import drawing, uniform
from vistok.core.values import is_number, is_whole
from vistok.evaluation.measure import Measurement
from vistok.metrics.distribution import FrechetDistance
from vistok.metrics.image import ImageMetric
from vistok.models.tokenizer import Tokenizer

_BLOCK_DISTANCES = 1 << 22  # computed at a time; 16 MiB of float32

_SETTINGS = "eval.robustness.settings"


class Setting(NamedTuple):
    """A strength of perturbation: each token, with probability α, takes one of its δ nearest."""

    alpha: float
    delta: int


def checked_settings(robustness: Mapping[str, Any]) -> list[Setting]:
    """Return `eval.robustness.settings`.

    Raises:
        ConfigError: naming the pair or the seed that is wrong.
    """
    seed = robustness["seed"]
    if not is_whole(seed) or seed < 0:
        raise ConfigError(f"eval.robustness.seed={as_written(seed)}: must be a whole number")
    pairs = robustness["settings"] or []
    if not isinstance(pairs, (list, tuple)):
        raise ConfigError(f"{_SETTINGS}={as_written(pairs)}: must be a list of [alpha, delta]")
    found = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ConfigError(f"{_SETTINGS}: {as_written(pair)} must be [alpha, delta]")
        alpha, delta = pair
        if not is_number(alpha) or not 0 <= alpha <= 1:
            raise ConfigError(f"{_SETTINGS}: alpha={as_written(alpha)} must be 0 to 1")
        if not is_whole(delta) or delta < 1:
            raise ConfigError(f"{_SETTINGS}: delta={as_written(delta)} must be 1 or more")
        if Setting(float(alpha), delta) in found:
            raise ConfigError(f"{_SETTINGS}: [{alpha}, {delta}] is there twice")
        found.append(Setting(float(alpha), delta))
    return found


class Perturbation:
    """Exchanges codes for near ones, as RobustTok does for its pFID.

    A token is perturbed with probability α: each of its ids then becomes one of the δ nearest,
    itself included, all equally likely. Near are codes by their Euclidean distance from the code
    in the table that `codebooks` returns, among those that the id could be; δ ends at their
    number. All images are perturbed. The draws are a function of the seed and the image's place
    in the set, the same ones for all settings, so that these differ by their strength alone.

    Paper: RobustTok, Qiu et al. 2025, https://arxiv.org/abs/2503.08354. There the neighbours are
    the code's, in the released training code the latent's.

    Args:
        tokenizer: in eval mode.
        settings: strengths.
        seed: another one draws otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Sequence[Setting], seed: int = 0) -> None:
        self.settings, self.seed = list(settings), seed
        self.most = max(setting.delta for setting in settings)
        self.tables = tokenizer.codebooks()
        # Where one sequence has several codebooks, an id stays in that of its place.
        ranges = torch.tensor(tokenizer._alphabet(tokenizer.num_tokens))
        self.ranges = ranges.view(tokenizer.num_tokens, len(self.tables), 2)

    @torch.no_grad()
    def perturbed(self, ids: Tensor, numbers: Sequence[int]) -> Iterator[tuple[Setting, Tensor]]:
        """Yield each setting, and what becomes of ids in it.

        Args:
            ids: `(B, N, Q)`, of all tokens.
            numbers: places of the images in the set.
        """
        near, sizes = self.neighbors(ids), self.ranges[..., 1].to(ids.device)
        with drawing(self.seed, torch.tensor(numbers, device=ids.device), 0):
            chance = uniform(ids.shape[:2], ids.device)[..., None]
            rank = uniform(ids.shape, ids.device)
        for setting in self.settings:
            chosen = (rank * sizes.clamp(max=setting.delta)).long()
            moved = near.gather(-1, chosen[..., None]).squeeze(-1)
            yield setting, torch.where(chance < setting.alpha, moved, ids)

    def neighbors(self, ids: Tensor) -> Tensor:
        """Return the nearest codes of each id `(B, N, Q)`, nearest first: `(B, N, Q, most)`.

        The first is the code itself. Where there are fewer than `most`, the rest is the code.
        """
        near = ids[..., None].expand(*ids.shape, self.most).clone()
        for slot, table in enumerate(self.tables):
            ranges = self.ranges[:, slot]
            for start, size in ranges.unique(dim=0).tolist():
                places = (ranges == torch.tensor([start, size])).all(dim=1).to(ids.device)
                own = ids[:, places, slot]
                codes, inverse = own.unique(return_inverse=True)
                found = _nearest(table[start : start + size], codes - start, self.most) + start
                near[:, places, slot, : found.shape[1]] = found[inverse]
        return near


def _nearest(table: Tensor, codes: Tensor, count: int) -> Tensor:
    """Return the `count` nearest rows of some rows of a table, or all of it: `(U, count)`."""
    squares = table.square().sum(dim=1)
    rows, parts = max(1, _BLOCK_DISTANCES // len(table)), []
    for block in codes.split(rows):
        # The squared distance up to the code's own length, which all share.
        distances = torch.addmm(squares, table[block], table.T, alpha=-2)
        distances.scatter_(1, block[:, None], -math.inf)  # itself first, whatever rounding says
        parts.append(distances.topk(min(count, len(table)), dim=1, largest=False).indices)
    return torch.cat(parts)


class Robustness:
    """Accumulates the Fréchet distances of perturbed reconstructions, at each setting.

    Args:
        settings: strengths.
        metrics: of the suite; its Fréchet distances are measured, each by its own network.
        lenient: see `Measurement`.
    """

    def __init__(
        self, settings: Sequence[Setting], metrics: Mapping[str, ImageMetric], lenient: bool
    ) -> None:
        measured = {k: m for k, m in metrics.items() if isinstance(m, FrechetDistance)}
        if settings and not measured:
            raise ConfigError(
                f"{_SETTINGS}: needs a Fréchet distance in eval.metrics, such as fd_lite0"
            )
        self.measurements = {
            setting: Measurement(
                {
                    name: FrechetDistance(m.network.module, corrected=False).to(m.device)  # type: ignore[arg-type]
                    for name, m in measured.items()
                },
                lenient=lenient,
            )
            for setting in settings
        }

    def update(self, originals: Tensor, perturbed: Mapping[Setting, Tensor]) -> None:
        """Take in a batch: `(B, C, H, W)` uint8, and as many at each setting."""
        for setting, measurement in self.measurements.items():
            measurement.update(originals, perturbed[setting])

    def compute(self) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Return the mean over the settings by name, and a row for each; every rank must call it.

        The name of a mean is p and that of the distance: pfid of fid.
        """
        rows = [
            {**setting._asdict(), **measurement.compute()}
            for setting, measurement in self.measurements.items()
        ]
        names = [n for m in list(self.measurements.values())[:1] for n in m.metrics]
        means = {
            f"p{name}": math.fsum(row[name] for row in rows) / len(rows)
            for name in names
            if all(name in row for row in rows)
        }
        return means, rows

    def state_dict(self) -> list[dict[str, Any]]:
        """Return what this rank has taken in."""
        return [measurement.state_dict() for measurement in self.measurements.values()]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the state of the same settings."""
        for measurement, state in zip(self.measurements.values(), states, strict=True):
            measurement.load_state_dict(state)
