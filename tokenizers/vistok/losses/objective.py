"""The objective: one table of named terms, and the one place where their weighted sum is formed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.registry import build, check_arguments, register, resolve
from vistok.core.sample_random import aside
from vistok.core.signatures import check_values
from vistok.losses.entry import Entry
from vistok.losses.fits import (
    check_fit,
    check_pictures,
    check_whole,
    reads_the_prediction_alone,
)
from vistok.losses.gradients import adaptive_scale, carried, leaf_of, picture_scale
from vistok.models.term import MakeOptimizer, Player, Step, Term
from vistok.models.tokenizer import Tokenizer


class Objective(nn.Module):
    """Weighted sum of named terms; the quantizer's own losses are entries of the same table.

    Every loss of a quantizer comes with a weight in the quantizer's config, so that exchanging the
    quantizer exchanges them too; an entry with `_target_: quantizer_loss` under the loss's name
    overrides it, with a start and a ramp. A loss without a weight is an error, never a silent drop.

    Attributes:
        measuring: whether the next forwards measure the gradients of the terms.
        notes: numbers of the last forward besides the losses: `weight/NAME` of adaptive terms, and
            `gradient/NAME` where they were measured.

    Args:
        terms: name to term or player.
        entries: name to how it counts, for exactly these names.
        quantizer: name to how a quantizer's loss counts.
    """

    def __init__(
        self,
        terms: Mapping[str, Term | Player],
        entries: Mapping[str, Entry],
        quantizer: Mapping[str, Entry],
    ) -> None:
        super().__init__()
        self.measuring = False
        self.notes: dict[str, Tensor] = {}
        self.order = list(terms)
        self.terms = nn.ModuleDict({k: v for k, v in terms.items() if isinstance(v, Term)})
        self.players = {k: v for k, v in terms.items() if isinstance(v, Player)}
        self.entries = dict(entries)
        self.quantizer = dict(quantizer)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the features that some term reads."""
        members = [*self.terms.values(), *self.players.values()]
        return tuple(sorted({name for member in members for name in member.taps}))  # type: ignore

    def resolve(self, total_samples: int) -> None:
        """Turn shares of the run into samples, once it is known how many there will be."""
        for table in (self.entries, self.quantizer):
            table.update({name: entry.resolved(total_samples) for name, entry in table.items()})
        for player in self.players.values():
            player.warmup_samples = player.warmup_samples or round(player.warmup * total_samples)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return all losses unweighted under their names, and their weighted sum as "total"."""
        losses: dict[str, Tensor] = {}
        weights: dict[str, Any] = {}
        gradients: dict[str, Tensor] = {}  # at the prediction, of the terms without their weights
        self.notes = {}
        adaptive = [
            name
            for name, entry in self.entries.items()
            if entry.adaptive and entry.weight_at(step.samples_seen) and torch.is_grad_enabled()
        ]
        for name in self.order:
            weights[name] = self.entries[name].weight_at(step.samples_seen)
        joint = _Joint(step)
        for name in self.order:
            entry = self.entries[name]
            member: Any = self.players.get(name) or self.terms[name]
            seen = replace(step, of=entry.of)
            if adaptive and name not in adaptive and self._carries(member, entry, step):
                losses[name] = joint.add(name, member, seen, weights[name])
                continue
            losses[name], found = self._loss(member, entry, seen, name in adaptive)
            if found is not None:
                gradients[name] = found
        joint.carry()
        for name, loss in step.output.quantizer.losses.items():
            if name not in self.quantizer:
                raise ConfigError(f"the quantizer's loss '{name}' has no weight")
            losses[name] = loss
            weights[name] = self.quantizer[name].weight_at(step.samples_seen)
        for name in adaptive:
            others = {k: w for k, w in weights.items() if k not in adaptive}
            if self.entries[name].adaptive == "picture":
                scale = self._picture_scale(name, others, gradients, joint)
            else:
                layer = step.tokenizer.decoder.last_layer
                assert layer is not None, "checked when it was built"
                total = joint.added(w * losses[k] for k, w in others.items() if k not in joint)
                scale = adaptive_scale(total, losses[name], layer)
            self.notes[f"weight/{name}"] = scale * weights[name]
        weights |= {name: self.notes[f"weight/{name}"] for name in adaptive}
        if self.measuring and torch.is_grad_enabled():
            self._measure(step, weights)
        total = joint.added(weights[k] * loss for k, loss in losses.items() if k not in joint)
        return {**losses, "total": total}

    def _picture_scale(
        self,
        name: str,
        others: Mapping[str, float],
        gradients: Mapping[str, Tensor],
        joint: _Joint,
    ) -> Tensor:
        """Return the ratio of gradients at the prediction that a term compares."""
        own, of = gradients[name], self.entries[name].of
        total = joint.gradients.get(of, torch.zeros_like(own)).float()
        for k, weight in others.items():
            if k in gradients and self.entries[k].of == of:
                total = total + weight * gradients[k].float()
        return picture_scale(total, own)

    def _measure(self, step: Step, weights: Mapping[str, Any]) -> None:
        """Note the norm of each weighted term's gradient at what it reads of the tokenizer.

        That is its prediction, and features that are tapped; the quantizer's losses have neither.
        Terms compute once more, aside from the graph of the step, which FSDP and compiled models
        let nobody walk in part. The norm is of this rank's batch.
        """
        for name, player in self.players.items():
            if player.gradient is not None:
                norm = player.gradient.float().norm()
                self.notes[f"gradient/{name}"] = norm * weights[name]
        predictions = step.output.predictions.items()
        read = {k: replace(v, value=leaf_of(v.value)) for k, v in predictions}
        features = {k: leaf_of(v) for k, v in step.output.features.items()}
        output = replace(step.output, predictions=read, features=features)
        leaves = [*(prediction.value for prediction in read.values()), *features.values()]
        with aside():
            for name, term in self.terms.items():
                entry = self.entries[name]
                if not entry.counts(step.samples_seen):
                    continue
                loss = term(replace(step, output=output, of=entry.of))
                if not loss.requires_grad:
                    continue
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
                norms = [g.float().norm() for g in found if g is not None]
                if norms:
                    norm = torch.stack(norms).norm()
                    self.notes[f"gradient/{name}"] = norm * weights[name]

    def _carries(self, member: Any, entry: Entry, step: Step) -> bool:
        """Tell whether a term's graph may be walked to its prediction before the step's is."""
        counts = isinstance(member, Term) and entry.counts(step.samples_seen)
        return counts and reads_the_prediction_alone(member)

    def _loss(
        self, member: Any, entry: Entry, step: Step, carry: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss of a term, and its gradient at the prediction where that is known.

        It is of players, and with `carry` of terms: then their graph is walked to there now.
        """
        if entry.counts(step.samples_seen):
            if isinstance(member, Player):
                return member(step), member.gradient
            if not (carry and self._carries(member, entry, step)):
                return member(step), None
            leaf = leaf_of(step.prediction.value)
            return carried(member(instead(step, leaf)), leaf, step.prediction.value)
        if isinstance(member, Player):
            if step.samples_seen >= entry.start_samples - member.warmup_samples:
                member.watch(step)
        elif any(p.requires_grad for p in member.parameters()):
            return member(step), None  # DDP wants every parameter in every step's graph
        return step.images.new_zeros(()), None

    # ------------------------------------------------------------------ the players

    def start(self) -> None:
        """Give the players the weights that a fresh run begins with."""
        for player in self.players.values():
            player.start()

    def fresh_players(self) -> list[str]:
        """Return a line for each player that starts untrained: when it learns, and when it counts.

        Call it after `resolve`.
        """
        lines = []
        for name, player in self.players.items():
            counts = self.entries[name].start_samples
            learns = max(0, counts - player.warmup_samples)
            if getattr(player, "weights", None) is None:
                lines.append(
                    f"{name} is untrained: it learns alone from image {learns} to {counts}, and "
                    "counts from there on"
                    if learns < counts
                    else f"{name} is untrained, and counts from image {counts} on without warm-up"
                )
        return lines

    def equip(self, make_optimizer: MakeOptimizer) -> None:
        """Give every player its optimizer."""
        for player in self.players.values():
            player.equip(make_optimizer)

    def learn(self, share: float, context: AbstractContextManager[Any]) -> dict[str, Tensor]:
        """Let the players learn from the batch, whose graph is gone; return scalars to log."""
        scalars: dict[str, Tensor] = {}
        for player in self.players.values():
            scalars |= player.learn(share, context)
        return scalars

    def gather(self) -> list[Tensor]:
        """End the players' gradients of a step; return their norms, of those that have any."""
        norms = [player.gather() for player in self.players.values()]
        return [norm for norm in norms if norm is not None]

    def discard(self) -> None:
        """Let the players forget the step under way."""
        for player in self.players.values():
            player.discard()

    def step(self, factor: float) -> None:
        """Move the players, with `factor` times their learning rates."""
        for player in self.players.values():
            player.step(factor)

    def players_to(self, device: torch.device) -> None:
        """Move the players to a device; as they are not modules, nobody else does."""
        for player in self.players.values():
            player.to(device)

    def players_state(self) -> dict[str, Any]:
        """Return weights and moments of the players by name."""
        return {name: player.state_dict() for name, player in self.players.items()}

    def load_players_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `players_state` returned; a player that is new starts as it is."""
        for name, player in self.players.items():
            if name in state:
                player.load_state_dict(state[name])


class _Joint:
    """The terms of fixed weight that read a prediction alone, next to an adaptive one.

    They begin at one leaf for each prediction, and the graph of their sum is walked there once. So
    they look at a view of the leaf: of a leaf itself `Step.once` shares nothing.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.leaves: dict[str, Tensor] = {}
        self.views: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def add(self, name: str, term: Term, step: Step, weight: float) -> Tensor:
        """Compute a term; return its value, without a graph."""
        if step.of not in self.leaves:
            leaf = self.leaves[step.of] = leaf_of(step.prediction.value)
            self.views[step.of] = leaf.view_as(leaf)
        loss = term(instead(step, self.views[step.of]))
        self.sums[step.of] = weight * loss + self.sums.get(step.of, 0.0)
        self.names.add(name)
        return loss.detach()

    def carry(self) -> None:
        """Walk the sums' graphs to their predictions."""
        for of, leaf in self.leaves.items():
            value = self.step.output.predictions[of].value
            self.sums[of], self.gradients[of] = carried(self.sums[of], leaf, value)

    def added(self, losses: Iterable[Tensor]) -> Tensor:
        """Return the sum of weighted losses and of these."""
        return sum([*losses, *self.sums.values()])  # type: ignore[return-value]


def instead(step: Step, value: Tensor) -> Step:
    """Return a step with another tensor as the prediction that its term compares."""
    own = {**step.output.predictions, step.of: replace(step.prediction, value=value)}
    return replace(step, output=replace(step.output, predictions=own))


@register("quantizer_loss")
class QuantizerLoss(Term):
    """One of the quantizer's own losses, by the name of its entry: to override weight and start."""

    def forward(self, step: Step) -> Tensor:
        """Raise: the objective reads these losses from the quantizer's output."""
        raise AssertionError("the objective reads the quantizer's losses itself")


_COMMON = ("weight", "of", "start_samples", "ramp_samples", "start", "ramp", "adaptive")


def build_objective(
    config: Mapping[str, Any], tokenizer: Tokenizer, key: str = "loss"
) -> Objective:
    """Build the objective of a run.

    Args:
        config: `terms`: name to `_target_`, the fields of `Entry`, and the term's own arguments;
            null for an entry that is not wanted.
        tokenizer: what is trained; every term is checked against its heads and taps.
        key: where the config lies in the run's, for messages.

    Raises:
        ConfigError: naming the key that is wrong.
    """
    quantizer = {
        name: Entry(float(weight)) for name, weight in tokenizer.quantizer.loss_weights.items()
    }
    terms: dict[str, Term | Player] = {}
    entries: dict[str, Entry] = {}
    for name, options in (config.get("terms") or {}).items():
        if options is None:
            continue
        here = f"{key}.terms.{name}"
        if not isinstance(options, Mapping) or "_target_" not in options:
            raise ConfigError(f"{here}{_not_a_term(options, here)}")
        cls = resolve(options["_target_"], key=f"{here}._target_")
        if cls is QuantizerLoss:
            if name not in quantizer:
                known = ", ".join(quantizer) or "none"
                raise ConfigError(f"{here}: the quantizer has no such loss; it has: {known}")
            quantizer[name] = _entry(options, here, quantizer[name].weight)
            continue
        if name in quantizer:
            raise ConfigError(f"{here}: the quantizer has a loss of that name")
        entries[name] = _entry(options, here)
        own = {k: v for k, v in options.items() if k not in _COMMON}
        given = {"tokenizer": tokenizer} if "tokenizer" in inspect.signature(cls).parameters else {}
        check_arguments(options, here, given, but=_COMMON)
        # A player's weights must not move the random numbers that the tokenizer's training draws.
        with torch.random.fork_rng(devices=[], enabled=issubclass(cls, Player)):
            built = build(own, here, **given)
        if not isinstance(built, (Term, Player)):
            raise ConfigError(f"{here}._target_={options['_target_']}: not a term of the objective")
        check_fit(built, entries[name], tokenizer, here)
        terms[name] = built
    check_whole(terms, entries, tokenizer)
    check_pictures(terms, entries, key)
    return Objective(terms, entries, quantizer)


def _not_a_term(options: Any, here: str) -> str:
    """Say what is wrong with a term that has no `_target_`; another loss may have had the term."""
    if not isinstance(options, Mapping) or not options:
        return f"={options}: expected a mapping with a _target_, or null for no such term"
    found = ", ".join(map(str, options))
    return (
        f": has {found} but no _target_, so the chosen loss has no term of that name; set "
        f"{here}=null to leave it out, or name its _target_"
    )


def _entry(options: Mapping[str, Any], key: str, weight: float | None = None) -> Entry:
    """Return the common options of a term, checked."""
    values = {name: options[name] for name in _COMMON if options.get(name) is not None}
    if "weight" not in values:
        if weight is None:
            raise ConfigError(f"{key}.weight is missing: how much the term counts, such as 1.0")
        values["weight"] = weight
    try:
        check_values(Entry, values)
    except ArgumentError as error:
        raise ConfigError(f"{key}.{error}") from error
    return Entry(**values)
