"""Whether a function's code is what it was."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any


def code_digest(function: Callable[..., Any]) -> str | None:
    """A digest of a function's instructions, names and constants; None where Python shows none (a C function).

    Not covered: what it calls, and data that it reads.

    Example:
        >>> from hybridopt.code import code_digest
        >>> code_digest(lambda x: x + 1) == code_digest(lambda x: x + 1), code_digest(len)
        (True, None)
        >>> code_digest(lambda x: x + 1) == code_digest(lambda x: x + 2)
        False
    """
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    if code is None:
        return None
    text = repr((sys.version_info[:2], _parts(code)))  # another Python has other instructions
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _parts(code: CodeType) -> tuple[Any, ...]:
    constants = [
        _parts(constant)
        if isinstance(constant, CodeType)
        else sorted(map(repr, constant))
        if isinstance(constant, frozenset)
        else repr(constant)
        for constant in code.co_consts
    ]
    return code.co_code, code.co_names, constants
