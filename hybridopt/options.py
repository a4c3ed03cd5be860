"""Are a method's options of the types that its class declares?"""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from typing import Any, Literal

from hybridopt.errors import MethodError

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}


def check_options(method: Any) -> None:
    """Compare a dataclass's fields with their annotations; called by a method's `__post_init__`.

    Checked are int, float, bool, str, None, `Literal` and unions of these; other annotations are left alone. A whole
    number is a float, True and False are no numbers.

    Args:
        method: a dataclass instance with a `name`.

    Raises:
        MethodError: an option has another type; says which, what was expected, and what came.

    Example:
        >>> from hybridopt.adapters import SLSQP
        >>> SLSQP(maxiter="many")
        Traceback (most recent call last):
        hybridopt.errors.MethodError: scipy.slsqp: expected maxiter to be a whole number, got 'many'
    """
    hints = typing.get_type_hints(type(method))
    for field in dataclasses.fields(method):
        value, allowed = getattr(method, field.name), _alternatives(hints[field.name])
        if allowed is not None and not any(_fits(value, kind) for kind in allowed):
            words = " or ".join(_WORDS[kind] for kind in allowed if kind in _WORDS)
            words = words or f"one of {', '.join(map(str, allowed))}"
            raise MethodError(f"{method.name}: expected {field.name} to be {words}, got {value!r}")


def _alternatives(hint: Any) -> list[Any] | None:
    """The simple types and literal values a hint allows; None if it is not made of those alone."""
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
