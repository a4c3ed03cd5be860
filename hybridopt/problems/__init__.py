"""Problems to compare methods on: built in by name, or a user's own function in a file.

Example:
    >>> from hybridopt import problems
    >>> problems.names()[:4]
    ['acrobot', 'bbob', 'cartpole', 'digits']
    >>> problems.get("identity").best_known
    0.7830541615
    >>> problems.get("bbob(f=8, d=5)", seed=1)
    Problem('bbob(f=8, d=5, instance=1)')
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from hybridopt.errors import nearest
from hybridopt.problems._architecture import train_digits
from hybridopt.problems._bbob import bbob, bbob_names, bbob_targets
from hybridopt.problems._control import acrobot, cartpole
from hybridopt.problems._diabetes import fairness, gaussian_process
from hybridopt.problems._digits import digits, digits_mlp
from hybridopt.problems._identity import identity
from hybridopt.problems._lennard_jones import lennard_jones
from hybridopt.problems._load import load
from hybridopt.problems._mgh import mgh
from hybridopt.problems._problem import Build, Problem, ProblemError
from hybridopt.problems._rounding import pruning, quantisation
from hybridopt.problems._sampling import sampling
from hybridopt.problems._thresholds import thresholds

__all__ = [
    "Build",
    "Problem",
    "ProblemError",
    "acrobot",
    "bbob",
    "bbob_names",
    "bbob_targets",
    "builder",
    "cartpole",
    "digits",
    "digits_mlp",
    "fairness",
    "gaussian_process",
    "get",
    "identity",
    "lennard_jones",
    "load",
    "mgh",
    "names",
    "pruning",
    "quantisation",
    "sampling",
    "thresholds",
    "train_digits",
]

_BUILTIN: dict[str, Callable[..., Problem]] = {
    "acrobot": acrobot,
    "bbob": bbob,
    "cartpole": cartpole,
    "digits": digits,
    "digits_mlp": digits_mlp,
    "fairness": fairness,
    "gaussian_process": gaussian_process,
    "identity": identity,
    "lennard_jones": lennard_jones,
    "mgh": mgh,
    "pruning": pruning,
    "quantisation": quantisation,
    "sampling": sampling,
    "thresholds": thresholds,
}


def names() -> list[str]:
    """The built-in problems."""
    return sorted(_BUILTIN)


def builder(name: str) -> Build:
    """What builds the named problem from a seed.

    Args:
        name: a built-in name, with options if it has any (`bbob(f=8, d=5)`), or `file.py:function` (see `load`).

    Raises:
        ProblemError: unknown name or option (the nearest ones are shown), file or function.
    """
    label, bracket, _ = name.partition("(")
    if label.strip() in _BUILTIN:
        build = _BUILTIN[label.strip()]
        return partial(build, **_options(name, build)) if bracket else build
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


def _options(name: str, build: Callable[..., Problem]) -> dict[str, Any]:
    """What stands between the brackets, as a call in Python: keywords and plain values."""
    known = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    try:
        call = ast.parse(name.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ProblemError(
            f"problem: expected a name with options like bbob(f=8, d=5), got {name!r}; known: {', '.join(known)}"
        ) from None
    for option in options:
        if option not in known:
            raise ProblemError(f"problem: {name!r} has no option {option!r}{nearest(option, known)}")
    return options
