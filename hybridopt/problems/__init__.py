"""Problems to compare methods on: built in by name, or a user's own function in a file.

Example:
    >>> from hybridopt import problems
    >>> problems.names()
    ['digits', 'digits_mlp', 'identity']
    >>> problems.get("identity").best_known
    0.7830541615
"""

from __future__ import annotations

from hybridopt.problems._digits import digits, digits_mlp
from hybridopt.problems._identity import identity
from hybridopt.problems._load import load
from hybridopt.problems._problem import Build, Problem, ProblemError
from hybridopt.registry import nearest

__all__ = [
    "Build",
    "Problem",
    "ProblemError",
    "builder",
    "digits",
    "digits_mlp",
    "get",
    "identity",
    "load",
    "names",
]

_BUILTIN: dict[str, Build] = {"digits": digits, "digits_mlp": digits_mlp, "identity": identity}


def names() -> list[str]:
    """The built-in problems."""
    return sorted(_BUILTIN)


def builder(name: str) -> Build:
    """What builds the named problem from a seed.

    Args:
        name: a built-in name, or `file.py:function` (see `load`).

    Raises:
        ProblemError: unknown name (the nearest ones are shown), file or function.
    """
    if name in _BUILTIN:
        return _BUILTIN[name]
    if ":" in name or name.endswith(".py"):
        return load(name)
    raise ProblemError(f"problem: unknown name {name!r}{nearest(name, names())}; your own: file.py:function")


def get(name: str, seed: int = 42) -> Problem:
    """The named problem, fresh: its target is nobody else's.

    Args:
        name: as in `builder`.
        seed: varies the start (of `identity`: nothing).

    Raises:
        ProblemError: see `builder`; or the problem cannot be built.
    """
    return builder(name)(seed)
