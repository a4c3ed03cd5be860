"""What a caller wants to be told of: functions, checked before the first evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from hybridopt.errors import ObjectiveError


def read_callbacks(given: Any, *arguments: str) -> list[Callable[..., Any]]:
    """A callable, or some, as a list.

    Args:
        given: by the caller.
        arguments: names of what each will be called with, in order.

    Raises:
        ObjectiveError: something else, or one that does not take these arguments.
    """
    call = f"callback({', '.join(arguments)})"
    many = [given] if callable(given) else given
    found = list(many) if isinstance(many, Iterable) else []
    if not (isinstance(many, Iterable) and all(map(callable, found))):
        raise ObjectiveError(f"callbacks: expected a callable, {call}, or a list of callables, got {given!r}")
    for callback in found:
        try:
            signature = inspect.signature(callback)
        except (TypeError, ValueError):  # built without one
            continue
        try:
            signature.bind(*arguments)
        except TypeError as error:
            raise ObjectiveError(
                f"callbacks: expected a function that can be called as {call}, got one of {signature}: {error}"
            ) from None
    return found
