"""Arguments of constructors, and their rules."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vistok.core.values import Rule, check, rule_of


@dataclass(frozen=True)
class OptionsOf:
    """Marks `**options` that a constructor passes on, so that the other's rules hold for them.

    For example `**options: Annotated[Any, OptionsOf(VectorQuantizer, but=("metric",))]`.

    Attributes:
        cls: the class whose constructor gets them.
        but: the arguments of it that are not options.
    """

    cls: type
    but: Collection[str] = ()


@dataclass(frozen=True)
class Arguments:
    """The arguments of a constructor, or the keys of a `TypedDict`.

    Attributes:
        rules: by name; None where the annotation takes anything, or is not understood.
        required: names of those without a default.
        open: whether there may be others.
        groups: of those that are a `TypedDict`, what they hold.
    """

    rules: dict[str, Rule | None] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    open: bool = False
    groups: dict[str, Arguments] = field(default_factory=dict)


@functools.cache
def arguments_of(cls: type) -> Arguments:
    """Return what the constructor of a class takes by name.

    An annotation that cannot be evaluated, for example because its name is imported for type
    checkers alone, leaves its argument without a rule.
    """
    if typing.is_typeddict(cls):
        hints = typing.get_type_hints(cls, include_extras=True)
        required = [name for name in hints if name in cls.__required_keys__]  # type: ignore
        return _collected(hints, required)
    names = getattr(inspect.unwrap(cls.__init__), "__globals__", {})
    hints, required, others = {}, [], None
    for name, parameter in inspect.signature(cls).parameters.items():
        hint = _evaluated(parameter.annotation, names)
        if parameter.kind is parameter.VAR_KEYWORD:
            others = hint
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            hints[name] = hint
            if parameter.default is parameter.empty:
                required.append(name)
    own = _collected(hints, required)
    rules, required = dict(own.rules), list(own.required)
    passed = [each for each in getattr(others, "__metadata__", ()) if isinstance(each, OptionsOf)]
    for options in passed:
        inner = arguments_of(options.cls)
        more = [name for name in inner.rules if name not in {*rules, *options.but}]
        rules |= {name: inner.rules[name] for name in more}
        required += [name for name in inner.required if name in more]
    return Arguments(rules, tuple(required), others is not None and not passed, own.groups)


def check_values(cls: type, values: Mapping[str, Any]) -> None:
    """Raise unless the arguments of a class fit their annotations.

    `registry.build` does that for configs. A constructor that would compute nonsense without a
    word when called from Python begins with `check_values(Its, locals())`.

    Args:
        cls: the class.
        values: by name; others than its arguments are passed over.

    Raises:
        ArgumentError: naming the first that is wrong.
    """
    for name, rule in arguments_of(cls).rules.items():
        if rule is not None and name in values:
            check(name, values[name], rule)


def _collected(hints: Mapping[str, Any], required: Sequence[str]) -> Arguments:
    groups = {}
    for name, hint in hints.items():
        for member in (hint, *typing.get_args(hint)):  # one, or that or None
            if typing.is_typeddict(member):
                groups[name] = arguments_of(member)
    return Arguments(
        {k: rule_of(hint) for k, hint in hints.items()}, tuple(required), groups=groups
    )


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, names)
    except Exception:  # whatever an expression raises whose names are not there
        return Any
