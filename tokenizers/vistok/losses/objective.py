"""The objective: one table of named terms, and the one place where their weighted sum is formed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError, ConfigError, nearest
from vistok.core.registry import build, check_arguments, register, registered, resolve
from vistok.core.sample_random import aside
from vistok.core.signatures import check_values
from vistok.core.values import Index, NonNegative, Share
from vistok.losses.gradients import adaptive_scale, carried, leaf_of
from vistok.models.flexible import WHOLE, FlexibleTokenizer
from vistok.models.term import MakeOptimizer, Player, Step, Term, check_taps
from vistok.models.tokenizer import Tokenizer


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
            own at the decoder's last layer; see `adaptive_scale`.
    """

    weight: NonNegative
    of: str = "image"
    start_samples: Index = 0
    ramp_samples: Index = 0
    start: Share = 0.0
    ramp: Share = 0.0
    adaptive: bool = False

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
        self.notes = {}
        adaptive = [
            name
            for name, entry in self.entries.items()
            if entry.adaptive and entry.weight_at(step.samples_seen) and torch.is_grad_enabled()
        ]
        for name in self.order:
            entry = self.entries[name]
            member = self.players.get(name) or self.terms[name]
            seen = replace(step, of=entry.of)
            losses[name] = self._loss(member, entry, seen, bool(adaptive))
            weights[name] = entry.weight_at(step.samples_seen)
        for name, loss in step.output.quantizer.losses.items():
            if name not in self.quantizer:
                raise ConfigError(f"the quantizer's loss '{name}' has no weight")
            losses[name] = loss
            weights[name] = self.quantizer[name].weight_at(step.samples_seen)
        if adaptive:
            layer = step.tokenizer.decoder.last_layer
            assert layer is not None, "checked when it was built"
            others = sum(w * losses[name] for name, w in weights.items() if name not in adaptive)
            for name in adaptive:
                scale = adaptive_scale(others, losses[name], layer)  # type: ignore[arg-type]
                self.notes[f"weight/{name}"] = weights[name] = weights[name] * scale
        if self.measuring and torch.is_grad_enabled():
            self._measure(step, weights)
        total = sum(weights[name] * loss for name, loss in losses.items())
        return {**losses, "total": total}  # type: ignore[dict-item]

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

    def _loss(self, member: Any, entry: Entry, step: Step, carry: bool) -> Tensor:
        """Return the loss of a term; with `carry` its graph is walked to the prediction now."""
        if entry.counts(step.samples_seen):
            if not (carry and isinstance(member, Term) and _reads_the_prediction_alone(member)):
                return member(step)
            predictions, value = step.output.predictions, step.prediction.value
            leaf = leaf_of(value)
            own = {**predictions, step.of: replace(step.prediction, value=leaf)}
            seen = replace(step, output=replace(step.output, predictions=own))
            return carried(member(seen), leaf, value)[0]
        if isinstance(member, Player):
            if step.samples_seen >= entry.start_samples - member.warmup_samples:
                member.watch(step)
        elif any(p.requires_grad for p in member.parameters()):
            return member(step)  # DDP wants every parameter in every step's graph
        return step.images.new_zeros(())

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


@register("quantizer_loss")
class QuantizerLoss(Term):
    """One of the quantizer's own losses, by the name of its entry: to override weight and start."""

    def forward(self, step: Step) -> Tensor:
        """Raise: the objective reads these losses from the quantizer's output."""
        raise AssertionError("the objective reads the quantizer's losses itself")


_COMMON = ("weight", "of", "start_samples", "ramp_samples", "start", "ramp", "adaptive")


def _reads_the_prediction_alone(term: Term) -> bool:
    return bool(term.accepts) and not (term.taps or any(p.requires_grad for p in term.parameters()))


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
            raise ConfigError(f"{here}: expected a mapping with a _target_")
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
        _check_fit(built, entries[name], tokenizer, here)
        terms[name] = built
    _check_whole(terms, entries, tokenizer)
    return Objective(terms, entries, quantizer)


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


def _check_fit(member: Term | Player, entry: Entry, tokenizer: Tokenizer, key: str) -> None:
    """Raise if a term cannot compare the prediction that it names, or a tap does not exist."""
    heads, decoder = tokenizer.heads, type(tokenizer.decoder).__name__
    drawn = entry.of.removeprefix(WHOLE)
    if member.accepts and entry.of not in heads and drawn != entry.of and drawn in heads:
        raise ConfigError(
            f"{key}.of={entry.of}: the tokenizer does not also decode the whole code; "
            + (
                f"set tokenizer.length.whole=true, or {key}.of={drawn}"
                if isinstance(tokenizer, FlexibleTokenizer)
                else f"{type(tokenizer).__name__} has one length: set {key}.of={drawn}"
            )
        )
    if member.accepts and entry.of not in heads:
        known = ", ".join(f"{name} ({kind})" for name, kind in heads.items())
        raise ConfigError(
            f"{key}.of={entry.of}: {decoder} predicts no such thing{nearest(entry.of, heads)}; "
            f"it predicts: {known}"
        )
    if member.accepts and heads[entry.of] not in member.accepts:
        fitting = [
            name
            for name, cls in registered().items()
            if isinstance(cls, type) and heads[entry.of] in getattr(cls, "accepts", ())
        ]
        raise ConfigError(
            f"{key}: {type(member).__name__} compares {' or '.join(member.accepts)}, but {decoder} "
            f"predicts {entry.of} as {heads[entry.of]}; terms for these are: {', '.join(fitting)}"
        )
    if entry.adaptive:
        layer = tokenizer.decoder.last_layer
        if not member.accepts:
            raise ConfigError(
                f"{key}.adaptive=true: {type(member).__name__} compares no prediction"
            )
        if layer is None or not layer.requires_grad:
            found = "none" if layer is None else "one that is frozen"
            raise ConfigError(
                f"{key}.adaptive=true: reads gradients at the decoder's last layer, but {decoder} "
                f"has {found}; use a fixed weight"
            )
    try:
        check_taps(tokenizer, member.taps)
    except ArgumentError as error:
        raise ConfigError(f"{key}.{error}") from error


def _check_whole(
    terms: Mapping[str, Term | Player], entries: Mapping[str, Entry], tokenizer: Tokenizer
) -> None:
    """Raise if the whole code is decoded in every step and no term looks at it."""
    second = [name for name in tokenizer.heads if name not in tokenizer.decoder.heads]
    compared = {entries[name].of for name, term in terms.items() if term.accepts}
    if second and not compared & set(second):
        raise ConfigError(
            f"tokenizer.length.whole=true: no term of the loss compares {' or '.join(second)}; set "
            f"loss=log_mse_whole, loss.terms.NAME.of={second[0]} or tokenizer.length.whole=false"
        )
