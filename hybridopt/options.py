"""Are a method's options of the types, and in the ranges, that its class declares?"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from hybridopt.errors import MethodError


@dataclass(frozen=True)
class Range:
    """What values an option may have, beside its type."""

    words: str
    holds: Callable[[float], bool]


Count: TypeAlias = Annotated[int, Range(">= 1", lambda v: v >= 1)]
Index: TypeAlias = Annotated[int, Range(">= 0", lambda v: v >= 0)]
_FINITE = Range("to be finite", lambda v: v < float("inf"))
Positive: TypeAlias = Annotated[float, Range("> 0", lambda v: v > 0), _FINITE]
NonNegative: TypeAlias = Annotated[float, Range(">= 0", lambda v: v >= 0), _FINITE]
Share: TypeAlias = Annotated[float, Range("in (0, 1)", lambda v: 0 < v < 1)]
Part: TypeAlias = Annotated[float, Range("above 0 and at most 1", lambda v: 0 < v <= 1)]
Fraction: TypeAlias = Annotated[float, Range("in [0, 1]", lambda v: 0 <= v <= 1)]

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}


def check_options(method: Any) -> None:
    """Compare a dataclass's fields with their annotations; called by a method's `__post_init__`.

    Checked are int, float, bool, str, None, `Literal` and unions of these, and each `Range` that one is annotated with;
    other annotations are left alone. A whole number is a float, True and False are no numbers, None fits every range.

    Args:
        method: a dataclass instance with a `name`.

    Raises:
        MethodError: an option has another type or is out of its range; says which, what was expected, and what came.

    Example:
        >>> from hybridopt.adapters import SLSQP
        >>> SLSQP(maxiter="many")
        Traceback (most recent call last):
        hybridopt.errors.MethodError: scipy.slsqp: expected maxiter to be a whole number, got 'many'
    """
    hints = _hints(type(method))  # type: ignore[arg-type]
    for field in dataclasses.fields(method):
        check_value(method.name, field.name, getattr(method, field.name), hints[field.name])


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)  # reading them takes milliseconds


def check_value(owner: str, option: str, value: Any, hint: Any) -> None:
    """Compare one value with a type; see `check_options`."""
    allowed = _alternatives(hint)
    if allowed is not None and not any(_fits(value, kind) for kind in allowed):
        words = " or ".join(_WORDS[kind] for kind in allowed if kind in _WORDS)
        words = words or f"one of {', '.join(map(str, allowed))}"
        raise MethodError(f"{owner}: expected {option} to be {words}, got {value!r}")
    for range_ in _ranges(hint):
        if value is not None and not range_.holds(value):
            raise MethodError(f"{owner}: expected {option} {range_.words}, got {value!r}")


def _ranges(hint: Any) -> list[Range]:
    """The ranges in `Annotated[...]`, also inside a union."""
    if typing.get_origin(hint) is Annotated:
        return [part for part in hint.__metadata__ if isinstance(part, Range)]
    return [found for part in typing.get_args(hint) for found in _ranges(part)]


def _alternatives(hint: Any) -> list[Any] | None:
    """The simple types and literal values a hint allows; None if it is not made of those alone."""
    if typing.get_origin(hint) is Annotated:
        return _alternatives(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_alternatives(part) for part in typing.get_args(hint)]
        return (
            None if any(part is None for part in parts) else [kind for part in parts for kind in part or ()]
        )
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return [hint] if hint in _WORDS else None


def _fits(value: Any, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if isinstance(kind, type):
        return isinstance(value, kind)
    return type(value) is type(kind) and bool(value == kind)
