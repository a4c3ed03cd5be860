"""Warnings filters belong to the process: who changes them for a while does so alone, or they would never come back."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Literal

alone = threading.RLock()
"""Held while filters are changed; a thread that wants to do so, too, waits."""


@contextlib.contextmanager
def changed(
    action: Literal["ignore", "error"], message: str = "", category: type[Warning] = Warning
) -> Iterator[None]:
    """Treat such warnings so for a while, as `warnings.filterwarnings`.

    Not while a solver asks a question, since losses would wait for it; nor in a solver with a thread of its own, whose
    caller holds `alone`.
    """
    with alone, warnings.catch_warnings():
        warnings.filterwarnings(action, message, category)
        yield


def _after_fork() -> None:
    """A forked child has the parent's lock, but not the thread that holds it."""
    global alone
    alone = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
