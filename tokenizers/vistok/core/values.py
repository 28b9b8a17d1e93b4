"""Rules for the values of arguments: each stands once, in the annotation.

`Count`, `Share` and the others annotate what a constructor takes, next to plain `int`, `float`,
`bool`, `str`, `Literal["a", "b"]`, lists and unions of these. `registry.build` holds the values of
a config to them. A constructor calls `check`, or `check_values` for all of its arguments, where a
wrong value would make it compute nonsense without a word when it is called from Python.
"""

from __future__ import annotations

import collections.abc
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union

from vistok.core.errors import ArgumentError, as_written, nearest


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule for the values of an argument.

    Attributes:
        words: that completes "must be".
        test: whether a value is that. In place of a part that is not built yet it gets the class.
        choices: the words to choose from, if there are some.
        meant: other names of choices, such as those of a paper.
    """

    words: str
    test: Callable[[Any], bool]
    choices: tuple[str, ...] = ()
    meant: Mapping[str, str] = field(default_factory=dict)

    def complaint(self, name: str, value: Any) -> str:
        """Return what is wrong with `name=value`, on one line."""
        words = self.words
        if isinstance(value, float) and not math.isfinite(value):
            words = words.replace("a number", "a finite number")
        if isinstance(value, int) and not _fits(value):
            words = words.replace("number", "number of 64 bits", 1)
        meant = self.meant.get(value, value) if isinstance(value, str) else ""
        return f"{name}={as_written(value)}: must be {words}{nearest(meant, self.choices)}"


def check(name: str, value: Any, annotation: Any) -> None:
    """Raise unless a value is what an annotation, such as `Count`, asks for.

    Raises:
        ArgumentError: with the name, the value, and what would be right.
    """
    rule = rule_of(annotation)
    if rule is not None and not rule.test(value):
        raise ArgumentError(rule.complaint(name, value))


# ---------------------------------------------------------------------- numbers


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a value is a finite number; true and false are not."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and _fits(value)


def is_whole(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer, of 64 bits; 8.0 is not."""
    return is_number(value) and isinstance(value, int)


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def whole(least: int) -> Rule:
    """Return the rule of whole numbers of `least` or more."""
    return Rule(f"a whole number, {least} or more", lambda v: is_whole(v) and v >= least)


def number(least: float, most: float) -> Rule:
    """Return the rule of numbers from `least` to `most`."""
    return Rule(f"a number, {least} to {most}", lambda v: is_number(v) and least <= v <= most)


def filled_list(annotation: Any, words: str, lengths: Collection[int] = ()) -> Rule:
    """Return the rule of lists of values that an annotation asks for.

    Args:
        annotation: of each value.
        words: that complete "must be".
        lengths: how many there may be; by default one or more.
    """
    inner = rule_of(annotation)
    assert inner is not None, "any value would be right"

    def fits(value: Any) -> bool:
        if not (_is_list(value) and all(map(inner.test, value))):
            return False
        return len(value) in lengths if lengths else len(value) > 0

    return Rule(words, fits)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


# ---------------------------------------------------------------------- rules from annotations


def choice(*words: str, meant: Mapping[str, str] | None = None) -> Rule:
    """Return the rule of a choice of words."""
    said = " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"
    return Rule(said, lambda v: isinstance(v, str) and v in words, words, meant or {})


_PLAIN: dict[Any, Rule] = {
    int: Rule("a whole number", is_whole),
    float: Rule("a number", is_number),
    bool: Rule("true or false", lambda v: isinstance(v, bool)),
    str: Rule("text", lambda v: isinstance(v, str)),
    Path: Rule("a path", lambda v: isinstance(v, (str, Path))),
    type(None): Rule("null", lambda v: v is None),
}


def rule_of(annotation: Any) -> Rule | None:
    """Return the rule of an annotation; None of one that takes anything, or is not understood."""
    if isinstance(annotation, Rule):
        return annotation
    if annotation is Any:
        return None
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        own = [each for each in inner[1:] if isinstance(each, Rule)]
        return own[0] if own else rule_of(inner[0])
    if origin in (Union, types.UnionType):
        rules = [rule_of(each) for each in inner]
        return _any_of([rule for rule in rules if rule]) if all(rules) else None
    if origin is Literal:
        return choice(*inner) if all(isinstance(word, str) for word in inner) else None
    if origin in (collections.abc.Sequence, list):
        return _list_of(rule_of(inner[0]))
    if origin in (collections.abc.Mapping, dict) or typing.is_typeddict(annotation):
        return Rule("a group of keys", lambda v: isinstance(v, Mapping))
    if isinstance(annotation, type) and typing.Protocol not in annotation.__bases__:
        return _part(annotation)
    return None


def _any_of(rules: Sequence[Rule]) -> Rule:
    words = [rule.words for rule in rules]
    joint = ", or " if any(", " in said for said in words) else " or "
    return Rule(
        joint.join(words),
        lambda v: any(rule.test(v) for rule in rules),
        tuple(word for rule in rules for word in rule.choices),
    )


def _list_of(rule: Rule | None) -> Rule:
    if rule is None:
        return Rule("a list", _is_list)
    words = rule.words.removeprefix("a ")
    for one in ("number", "part"):
        words = words.replace(one, f"{one}s")
    return Rule(f"a list of {words}", lambda v: _is_list(v) and all(map(rule.test, v)))


def _part(cls: type) -> Rule:
    def fits(value: Any) -> bool:
        return issubclass(value, cls) if isinstance(value, type) else isinstance(value, cls)

    return Rule(f"a part of class {cls.__name__}", fits)


# ---------------------------------------------------------------------- the annotations

Count = Annotated[int, whole(1)]
Index = Annotated[int, whole(0)]
CodebookSize = Annotated[int, whole(2)]
Share = Annotated[float, number(0, 1)]
Positive = Annotated[float, Rule("a number above 0", lambda v: is_number(v) and v > 0)]
NonNegative = Annotated[float, Rule("a number, 0 or more", lambda v: is_number(v) and v >= 0)]
#: Of a moving average.
Decay = Annotated[
    float, Rule("a number, 0 or more and below 1", lambda v: is_number(v) and 0 <= v < 1)
]
Sizes = Annotated[Sequence[int], filled_list(Count, "a list of whole numbers, 1 or more")]
ImageSize = Count | Annotated[Sequence[int], filled_list(Count, "[height, width]", (2,))]
_share_pair = filled_list(Share, "two numbers, 0 to 1", (2,))

#: [least, most], both shares.
ShareRange = Annotated[
    Sequence[float],
    Rule(
        "[least, most] with 0 <= least <= most <= 1",
        lambda v: _share_pair.test(v) and v[0] <= v[1],
    ),
]
