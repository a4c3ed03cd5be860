"""The choice of what runs a step, and saying which: shared by every optimizer class here."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch._compile import _disable_dynamo  # see `_base.py`

from hybridopt.errors import MethodError
from hybridopt.optim._extras import Implementation

log = logging.getLogger("hybridopt.optim")


def outside_graphs(step: Callable[..., Any]) -> Callable[..., Any]:
    """A `step` that torch.compile calls instead of tracing it, because it reads numbers and addresses."""
    outside: Callable[..., Any] = _disable_dynamo(step)

    @functools.wraps(step)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        # spelled out: dynamo runs a function as it is, and traces `step`, if it does not name torch in its code
        if torch.compiler.is_compiling():
            return outside(*args, **kwargs)
        return step(*args, **kwargs)

    return chosen


class Chosen(torch.optim.Optimizer):
    """A torch optimizer with `implementation=`; mixed in before torch's own class.

    A subclass calls `_choose` at the end of its `__init__`, and `_say` when it knows what runs.
    """

    _implementation: Implementation = "auto"
    _used = "not stepped yet"
    _warned = False

    @property
    def implementation(self) -> Implementation:
        """What was asked for: auto, reference, foreach or fused."""
        return self._implementation

    def _choose(self, implementation: str, foreach: bool | None, fused: bool | None) -> None:
        """Settle `implementation=` with torch's own `foreach=` and `fused=`; called at the end of `__init__`."""
        if implementation not in get_args(Implementation):
            raise MethodError(
                f"implementation: expected one of {', '.join(get_args(Implementation))}, got {implementation!r}"
            )
        if foreach and fused:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        asked = "fused" if fused else "foreach" if foreach else None
        if asked is not None and implementation not in ("auto", asked):
            raise MethodError(f"implementation={implementation!r} contradicts {asked}=True; give one of them")
        chosen: str = asked or implementation
        if chosen == "auto" and foreach is False and fused is False:
            chosen = "reference"
        self._implementation = chosen  # type: ignore[assignment]
        self._settle()

    def _settle(self) -> None:
        """Make torch's own step do what was asked for, in all groups and those to come."""
        if self._implementation in ("reference", "foreach"):
            for options in (self.defaults, *self.param_groups):
                if "foreach" in options:
                    options["foreach"] = self._implementation == "foreach"
                if "fused" in options:
                    options["fused"] = False

    def _otherwise(self) -> str:
        """What runs when the compiled loop does not, for `repr`."""
        names = {"reference": "torch's for-loop", "foreach": "torch's foreach"}
        return names.get(self._implementation, "torch's own code")

    def _say(self, used: str) -> None:
        if used != self._used:
            self._used = used
            log.debug("%s: %s", type(self).__name__, used)

    def _warn(self, message: str) -> None:
        """Say once, where `step` is called, that something is not as asked for."""
        if self._warned:
            return
        self._warned = True
        level = 1
        while sys._getframe(level).f_globals.get("__name__", "").startswith(("hybridopt.optim", "torch.")):
            level += 1
        warnings.warn(f"{type(self).__name__}: {message}", RuntimeWarning, stacklevel=level + 1)

    def __repr__(self) -> str:
        text: str = super().__repr__()
        return f"{text[:-1]}\nimplementation: {self._implementation} -> {self._used}\n)"

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, with what was asked for."""
        return {**super().__getstate__(), "_implementation": self._implementation}
