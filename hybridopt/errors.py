"""Every exception that hybridopt raises on purpose; all derive from `HybridoptError`.

Each message says what was expected, what came, and what to do. Classes that refine a built-in exception also
derive from it, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridopt.ledger import Ledger, Reason


class HybridoptError(Exception):
    """Base of every error that hybridopt raises on purpose."""


class SelectionError(HybridoptError, ValueError):
    """A selection of weights is empty, overlaps itself, or names weights that cannot be optimized."""


class BoundsError(HybridoptError, ValueError):
    """Bounds have the wrong shape, are empty, exclude the start, or are missing where a method needs a box."""


class BudgetError(HybridoptError, ValueError):
    """A budget is missing, malformed, or not positive."""


class MethodError(HybridoptError, ValueError):
    """A method's text, name or options are wrong."""


class PluginError(HybridoptError):
    """A plugin cannot be imported, or two plugins claim one name."""


class StateError(HybridoptError, ValueError):
    """A saved state does not belong to the object that should load it."""


class ObjectiveError(HybridoptError, TypeError):
    """The loss, the start or the model has a form that cannot be optimized."""


class MissingGradient(HybridoptError, RuntimeError):
    """A gradient was asked for, but the loss does not depend differentiably on some of the weights."""


class NonFiniteLoss(HybridoptError, ArithmeticError):
    """A loss or gradient is nan or inf where the run cannot go on, or where `nonfinite="raise"` was asked."""

    @classmethod
    def at_start(cls, value: float) -> NonFiniteLoss:
        """Of a method that follows gradients, at its first point; +inf is what any such loss was told as."""
        got = "inf or nan" if value == math.inf else value
        return cls(
            f"loss: expected a finite loss and gradient at the start point, got {got}; a method that needs "
            "gradients cannot begin here: change the initial weights, name a method without gradients (cmaes), or put "
            "one before it (cmaes(evaluations=20%) > slsqp)"
        )


class MemoryLimit(HybridoptError, MemoryError):
    """A method would need more memory than the machine has; raised before it starts."""


class ReplayMismatch(HybridoptError, RuntimeError):
    """A solver revived from its journal asked another question than the one recorded."""


class ClosedError(HybridoptError, RuntimeError):
    """An optimizer or objective was used after `close()`."""


class Stop(Exception):
    """A limit of `ledger` forbids the next evaluation; raised before it begins.

    Not a `HybridoptError`: it is the ordinary end of a run or stage. The harness turns it into `Result.reason`.

    Attributes:
        ledger: whose limit was reached (the run's own, or a stage's).
        reason: which limit.
    """

    def __init__(self, ledger: Ledger, reason: Reason) -> None:
        super().__init__(reason.value)
        self.ledger = ledger
        self.reason = reason


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; nearest: a, b"` for an error message, or all known names when none is near."""
    known = sorted(known)
    plain: dict[str, list[str]] = {}
    for one in known:
        plain.setdefault(_plain(one), []).append(one)
    near = [
        one for match in difflib.get_close_matches(_plain(name), plain, 3, cutoff=0.5) for one in plain[match]
    ][:3]
    return f"; nearest: {', '.join(near)}" if near else f"; known: {', '.join(known)}"


def _plain(name: str) -> str:
    """What names are compared by: `L-BFGS-B` is nearest to `lbfgsb`."""
    return re.sub(r"[\W_]", "", name).casefold()
