"""Checks that the terms of an objective fit the tokenizer, made when it is built."""

from __future__ import annotations

from collections.abc import Mapping

from vistok.core.errors import ArgumentError, ConfigError, nearest
from vistok.core.registry import registered
from vistok.losses.entry import Entry
from vistok.models.flexible import WHOLE, FlexibleTokenizer
from vistok.models.term import Player, Term, check_taps
from vistok.models.tokenizer import Tokenizer


def reads_the_prediction_alone(term: Term) -> bool:
    """Return whether a term's loss is a function of the prediction, and of nothing that learns."""
    return bool(term.accepts) and not (term.taps or any(p.requires_grad for p in term.parameters()))


def check_fit(member: Term | Player, entry: Entry, tokenizer: Tokenizer, key: str) -> None:
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
    if entry.adaptive is True:
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


def check_whole(
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


def check_pictures(
    terms: Mapping[str, Term | Player], entries: Mapping[str, Entry], key: str
) -> None:
    """Raise if a weight follows gradients at a prediction that are not there."""
    follow = [name for name, entry in entries.items() if entry.adaptive == "picture"]
    for name in follow:
        here, member = f"{key}.terms.{name}.adaptive=picture", terms[name]
        if not (
            member.accepts if isinstance(member, Player) else reads_the_prediction_alone(member)
        ):
            raise ConfigError(
                f"{here}: {type(member).__name__} reads more than a prediction, or none; use a "
                "fixed weight"
            )
        others = [
            k
            for k, term in terms.items()
            if k not in follow
            and entries[k].of == entries[name].of
            and isinstance(term, Term)
            and reads_the_prediction_alone(term)
        ]
        if not others:
            raise ConfigError(
                f"{here}: no other term compares {entries[name].of} alone, whose gradient it could "
                "follow; use a fixed weight"
            )
