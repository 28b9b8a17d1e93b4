"""Rules of arguments stand in annotations, and `build` holds every part's config to them."""

from __future__ import annotations

import inspect
import math
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from torch import nn

import vistok
from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.registry import build, check_arguments, registered
from vistok.core.signatures import OptionsOf, arguments_of
from vistok.core.values import (
    CodebookSize,
    Count,
    Decay,
    ImageSize,
    Index,
    NonNegative,
    Positive,
    Share,
    ShareRange,
    Sizes,
    check,
)

if TYPE_CHECKING:
    from somewhere import Nothing  # type: ignore

PARTS = {name: cls for name, cls in registered().items() if cls.__module__.startswith("vistok.")}
NAN, INF = math.nan, math.inf


# ---------------------------------------------------------------------- every part

#: What no argument of a type takes.
NEVER = {
    int: [1.5, 8.0, True, None, "8", NAN, INF, 2**63, -(2**70), [1], {}],
    float: ["0.5", None, True, NAN, INF, -INF, 10**30, [], {}],
    bool: [1, 0, None, "yes", []],
    str: [None, 1, 0.5, True, [], {}],
    Path: [None, 1, 0.5, True, [], {}],
    typing.Literal: ["nonsense", "", None, 1, True, []],
    typing.Sequence: [5, 0.5, None, True, "text", [None], [{}], {}],
    type: [None, 3, True, "word", [], {}, {"_target_": "adversary"}],
}

#: What they don't take because of a bound.
BOUNDS: dict[Any, list[Any]] = {
    Count: [0, -1],
    Index: [-1],
    CodebookSize: [1, 0, -2],
    Share: [-0.01, 1.01],
    Positive: [0, 0.0, -1],
    NonNegative: [-1, -0.01],
    Decay: [1, 1.0, -0.1],
    Sizes: [[], [0], [1, -1], [1.5], [True], [NAN]],
    ShareRange: [[], [0.5], [0.5, 0.2], [0, 2], [0, NAN], [0, 0.1, 1]],
}


def members(hint):
    """The alternatives of a union, itself if it is none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [m for each in typing.get_args(hint) for m in members(each)]
    return [hint]


def type_of(hint):
    """The key of NEVER of an annotation."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return type_of(typing.get_args(hint)[0])
    if origin is not None:
        return {Literal: typing.Literal}.get(origin, typing.Sequence)
    return hint if hint in NEVER or hint is type(None) else type


def kind(value):
    if isinstance(value, (bool, type(None), str, list, dict)):
        return type(value)
    return float


TAKES = {int: float, float: float, bool: bool, str: str, Path: str, typing.Literal: str}
TAKES |= {typing.Sequence: list, type: dict, type(None): type(None)}


def wrong_values(hint):
    """Values that none of the alternatives takes."""
    found = []
    for member in members(hint):
        others = {TAKES[type_of(other)] for other in members(hint) if other is not member}
        for value in NEVER.get(type_of(member), []) + BOUNDS.get(member, []):
            if kind(value) not in others:
                found.append(value)
    return found


def hints_of(cls):
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {k: hints[k] for k, p in inspect.signature(cls).parameters.items() if p.kind in named}


@pytest.mark.parametrize("name", PARTS)
def test_every_argument_has_a_rule(name):
    parameters = inspect.signature(PARTS[name]).parameters.values()
    assert not [p.name for p in parameters if p.annotation is p.empty]
    arguments = arguments_of(PARTS[name])
    assert not arguments.open, "**options say whose they are with OptionsOf"
    assert not [key for key, rule in arguments.rules.items() if rule is None]


@pytest.mark.parametrize("name", PARTS)
def test_a_wrong_value_is_refused_by_its_full_key(name):
    hints = hints_of(PARTS[name])
    for key, hint in hints.items():
        if any(typing.is_typeddict(member) for member in (hint, *typing.get_args(hint))):
            continue
        wrong, given = wrong_values(hint), {k: None for k in hints if k != key}
        assert len(wrong) > 3
        for value in wrong:
            with pytest.raises(ConfigError, match=rf"^a\.b\.{key}=.*: must be ") as error:
                build({"_target_": name, key: value}, "a.b", **given)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PARTS)
def test_a_wrong_name_is_refused_by_its_full_key(name):
    known = arguments_of(PARTS[name]).rules
    with pytest.raises(ConfigError, match=rf"^a\.b\.qqq: no such argument of {name}$"):
        build({"_target_": name, "qqq": 1}, "a.b", **dict.fromkeys(known))
    for key in known:
        with pytest.raises(ConfigError, match=rf"^a\.b\.{key}_: no such .* \(did you mean '{key}'"):
            build({"_target_": name, f"{key}_": 1}, "a.b")


@pytest.mark.parametrize("name", PARTS)
def test_a_missing_argument_is_named(name):
    parameters = inspect.signature(PARTS[name]).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    for key in needed:
        given = {other: None for other in needed if other != key}
        with pytest.raises(ConfigError, match=rf"^a\.b\.{key} is missing: {name} needs .+"):
            build({"_target_": name}, "a.b", **given)


# ---------------------------------------------------------------------- nested


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"inner": {"_target_": "vq", "dim": 4}}, "a.inner.codebook_size is missing: vq needs a"),
        (
            {"inner": {"_target_": "fsq", "dim": 4, "level": [5]}},
            "a.inner.level: no such argument of fsq (did you mean 'levels'?)",
        ),
        (
            {"inner": {"_target_": "vq", "dim": 4, "codebook_size": 8, "metric": "cosin"}},
            "a.inner.metric=cosin: must be cosine or euclidean (did you mean 'cosine'?)",
        ),
        ({"inner": {"_target_": "vqq"}}, "a.inner._target_=vqq: not in"),
        ({"inner": {"_target_": "mse"}}, "a.inner=mse: must be a part of class Quantizer"),
        ({"inner": {"dim": 4}}, "a.inner={'dim': 4}: must be a part of class Quantizer"),
    ],
)
def test_parts_inside_a_part(config, message):
    with pytest.raises(ConfigError) as error:
        build({"_target_": "perturb", "dim": 4, "codebook_size": 8, **config}, "a")
    assert str(error.value).startswith(message)


def test_parts_in_a_list():
    fsq = {"_target_": "fsq", "dim": 2, "levels": [5, 5]}
    for books, message in [
        ([fsq, {**fsq, "slope": 0}], r"^q\.books\[1\]\.slope=0: must be a number above 0$"),
        ([fsq, {"_target_": "mse"}], r"^q\.books=\['fsq', 'mse'\]: must be a list of quantizers$"),
        ([], r"^q\.books=\[\]: must be a list of quantizers$"),
        ([fsq, {"_target_": "fsk"}], r"^q\.books\[1\]\._target_=fsk: .*mean 'fsq'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build({"_target_": "product", "dim": 4, "books": books}, "q")


def test_options_that_are_passed_on_keep_their_rules():
    """Of a multi-scale quantizer on a codebook of two spaces, which is a codebook with options."""
    base = {"_target_": "multi_scale_shared_index_vq", "dim": 4, "codebook_size": 8}
    for options, message in [
        ({"ema_decay": 1.0}, r"^q\.ema_decay=1\.0: must be a number, 0 or more and below 1$"),
        ({"revival": "clusters"}, r"^q\.revival=clusters: .*mean 'clustering'"),
        ({"metric": "cosine"}, r"^q\.metric: no such argument of multi_scale_shared_index_vq$"),
        ({"kmeans_iteration": 3}, r"^q\.kmeans_iteration: .*mean 'kmeans_iterations'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build({**base, **options}, "q")
    assert build({**base, "ema_decay": 0.5}, "q").book.stats.decay == 0.5


def test_groups_of_keys():
    adversary = {"_target_": "adversary", "discriminator": {"_target_": "patch_discriminator"}}
    group = {"lr": 1e-4, "betas": [0.5, 0.9], "weight_decay": 0.0}
    check_arguments({**adversary, "optimizer": group}, "t")
    for changed, message in [
        ({"lr": NAN}, r"^t\.optimizer\.lr=nan: must be a finite number, 0 or more$"),
        ({"betas": [0.9, 1]}, r"^t\.optimizer\.betas=\[0\.9, 1\]: must be two numbers, 0 or more"),
        ({"momentum": 0.9}, r"^t\.optimizer\.momentum: no such argument of t\.optimizer$"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build({**adversary, "optimizer": {**group, **changed}}, "t")
    del group["lr"]
    with pytest.raises(ConfigError, match=r"^t\.optimizer\.lr is missing: t\.optimizer needs a"):
        build({**adversary, "optimizer": group}, "t")
    with pytest.raises(ConfigError, match=r"^t\.optimizer=adam: must be a group of keys$"):
        build({**adversary, "optimizer": "adam"}, "t")


def test_what_cannot_be_evaluated_is_not_held_to_anything():
    @vistok.register
    class Part(nn.Module):
        def __init__(self, size: Count, other: Nothing = None, plain=None):
            super().__init__()
            self.other = other

    @vistok.register
    class Open(nn.Module):
        def __init__(self, **options: Any):
            super().__init__()
            self.options = options

    @vistok.register
    class Passing(nn.Module):
        def __init__(
            self, size: Index, **options: Annotated[Any, OptionsOf(PARTS["vq"], ("dim",))]
        ):
            super().__init__()

    part = {"_target_": f"{__name__}.{Part.__qualname__}"}
    assert build({**part, "size": 1, "other": 5}).other == 5
    with pytest.raises(ConfigError, match=r"^size=0: must be a whole number, 1 or more$"):
        build({**part, "size": 0, "other": 5})
    assert build({"_target_": f"{__name__}.{Open.__qualname__}", "any": 1}).options == {"any": 1}
    assert arguments_of(Passing).required == ("size", "codebook_size")


# ---------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("annotation", "values"),
    [
        (Count, [1, 2**40]),
        (Index, [0, 7]),
        (CodebookSize, [2, 2**18]),
        (Share, [0, 1, 0.5]),
        (Positive, [1e-9, 3]),
        (NonNegative, [0, 0.0, 1e30]),
        (Decay, [0, 0.9999]),
        (Sizes, [[1], (2, 3)]),
        (ImageSize, [1, [64, 128], (1, 1)]),
        (ShareRange, [[0, 1], [0.2, 0.2]]),
        (int, [-5, -(2**63), 2**63 - 1]),
        (float, [-1, 2.5]),
        (bool, [True, False]),
        (str, ["", "word"]),
        (Path | None, ["a/b", Path("a"), None]),
        (Count | None, [3, None]),
        (Any, [None, object()]),
        (list[int] | None, [[], [0, -1], None]),
        (Literal["a", "b"], ["a", "b"]),
    ],
)
def test_values_within_the_rules(annotation, values):
    for value in values:
        check("x", value, annotation)


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (Count, 0, "x=0: must be a whole number, 1 or more"),
        (Count, None, "x=null: must be a whole number, 1 or more"),
        (Count, 2**64, f"x={2**64}: must be a whole number of 64 bits, 1 or more"),
        (Count | None, True, "x=true: must be a whole number, 1 or more, or null"),
        (int | None, 1.0, "x=1.0: must be a whole number or null"),
        (Share, INF, "x=inf: must be a finite number, 0 to 1"),
        (ImageSize, [8], "x=[8]: must be a whole number, 1 or more, or [height, width]"),
        (ImageSize, [8, 0], "x=[8, 0]: must be a whole number, 1 or more, or [height, width]"),
        (bool, 1, "x=1: must be true or false"),
        (typing.Sequence[int], ["1"], "x=['1']: must be a list of whole numbers"),
        (Literal["dense", "flex"], "flx", "x=flx: must be dense or flex (did you mean 'flex'?)"),
        (Literal["a", "b"] | None, 1, "x=1: must be a or b or null"),
        (Literal["a", "b", "c"], None, "x=null: must be one of a, b, c"),
    ],
)
def test_words_of_the_rules(annotation, value, message):
    with pytest.raises(ArgumentError) as error:
        check("x", value, annotation)
    assert str(error.value) == message
