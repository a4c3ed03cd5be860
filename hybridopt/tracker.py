"""One row per evaluation of the loss, in counters that mean the same for every method."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridopt.errors import HybridoptError, StateError
from hybridopt.ledger import Ledger

if TYPE_CHECKING:
    from hybridopt.result import Result


class ReportError(HybridoptError, ValueError):
    """A table, plot or file was asked for in a way that it cannot be made."""


def check_folder(path: Path) -> None:
    """Raise `ReportError` if the folder is not there that a file is to be written in."""
    if not path.parent.is_dir():
        raise ReportError(
            f"{path}: expected an existing folder, there is no {str(path.parent)!r}; make it first, or name another one"
        )


class Row(NamedTuple):
    """One evaluation of the loss in one run.

    The evaluations of a score, which `minimize(score=)` makes at the end, are counted in the result and have no row.
    """

    label: str
    seed: int
    method: str
    """The method at work (a chain's stage)."""
    stage: int
    """Place of that stage in its chain, from 0."""
    evaluations: int
    forward: int
    backward: int
    forward_equivalents: float
    seconds: float
    """Wall-clock seconds since the run's first evaluation began."""
    loss: float
    best_loss: float
    """The lowest loss so far, inf before a finite one."""
    probe: bool
    """Whether it was a difference probe or a check, not a point of the method."""


class RunLog:
    """The evaluations of one run, in columns; made by `Tracker.begin`, fed by the objective."""

    def __init__(self, label: str, seed: int) -> None:
        self.label = label
        self.seed = seed
        self.result: dict[str, Any] | None = None
        """The run's result as plain data, once it has ended."""
        self._stages: list[tuple[str, int]] = []
        self._scope: Ledger | None = None
        self._stage = array("I")
        self._counts = (array("Q"), array("Q"), array("Q"))
        self._numbers = (array("d"), array("d"), array("d"), array("d"))
        self._probe = bytearray()

    def __len__(self) -> int:
        return len(self._stage)

    def evaluated(self, ledger: Ledger, scopes: Sequence[Ledger], loss: float, probe: bool) -> None:
        """See `hybridopt.objective.Listener`."""
        scope = scopes[-1] if scopes else ledger
        if scope is not self._scope:
            self._scope = scope
            self._stages.append((scope.label or self.label, len(self._stages)))
        self._stage.append(len(self._stages) - 1)
        evaluations, forward, backward = self._counts
        evaluations.append(ledger.evaluations)
        forward.append(ledger.forward)
        backward.append(ledger.backward)
        equivalents, seconds, losses, best = self._numbers
        equivalents.append(ledger.forward_equivalents)
        seconds.append(ledger.seconds)
        losses.append(loss)
        best.append(ledger.best_loss)
        self._probe.append(probe)

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        for i, stage in enumerate(self._stage):
            method, place = self._stages[stage]
            evaluations, forward, backward = (c[i] for c in self._counts)
            equivalents, seconds, loss, best = (c[i] for c in self._numbers)
            yield Row(
                self.label,
                self.seed,
                method,
                place,
                evaluations,
                forward,
                backward,
                equivalents,
                seconds,
                loss,
                best,
                bool(self._probe[i]),
            )

    def column(self, name: str) -> list[float]:
        """One column as a list: evaluations, forward, backward, forward_equivalents, seconds, loss or best_loss."""
        names = ("evaluations", "forward", "backward", "forward_equivalents", "seconds", "loss", "best_loss")
        if name not in names:
            raise KeyError(f"column: expected one of {', '.join(names)}, got {name!r}")
        return list((*self._counts, *self._numbers)[names.index(name)])


class Tracker:
    """Collects the evaluations of one or many runs; give the same one to several `minimize` calls to compare them.

    Example:
        >>> import numpy as np, hybridopt
        >>> tracker = hybridopt.Tracker()
        >>> f = lambda x: float((x**2).sum())
        >>> _ = hybridopt.minimize(f, np.ones(2), "cmaes", budget=20, seed=0, tracker=tracker)
        >>> _ = hybridopt.minimize(f, np.ones(2), "slsqp", budget=20, seed=0, tracker=tracker)
        >>> [(log.label, len(log)) for log in tracker.runs]
        [('cmaes', 20), ('scipy.slsqp', 7)]
    """

    def __init__(self) -> None:
        self.runs: list[RunLog] = []

    def begin(self, label: str, seed: int) -> RunLog:
        """A new run's log."""
        log = RunLog(label, seed)
        self.runs.append(log)
        return log

    def rows(self) -> Iterator[Row]:
        """All rows of all runs."""
        for run in self.runs:
            yield from run.rows()

    def results(self) -> list[dict[str, Any]]:
        """The ended runs' results as plain data, in order."""
        return [run.result for run in self.runs if run.result is not None]

    def to_dict(self) -> dict[str, Any]:
        """`{"runs": [{"label", "seed", "result", "rows": [...]}]}`, ready for JSON but for nan and inf."""
        return {
            "runs": [
                {
                    "label": r.label,
                    "seed": r.seed,
                    "result": r.result,
                    "rows": [row._asdict() for row in r.rows()],
                }
                for r in self.runs
            ]
        }

    def to_jsonl(self, path: str | Path) -> None:
        """One JSON object a row; losses that are not finite are written as null."""
        check_folder(Path(path))
        with Path(path).open("w", encoding="utf-8") as file:
            for row in self.rows():
                plain = {k: _jsonable(v) for k, v in row._asdict().items()}
                file.write(json.dumps(plain) + "\n")

    def table(self) -> str:
        """One line a run, as text: counters, losses, and why it ended."""
        from hybridopt.registry import composition

        text: str = composition("table")(self.results())
        return text

    def plot(self, path: str | Path, x: str = "forward_equivalents") -> Path:
        """Write a log-scale picture of the best loss over forward-equivalents or seconds; returns the path."""
        from hybridopt.registry import composition

        written: Path = composition("plot")(self, path, x)
        return written

    def finish(self, log: RunLog, result: Result) -> None:
        """Keep a run's result."""
        if log not in self.runs:
            raise StateError("tracker: this log belongs to another tracker")
        log.result = result.to_dict() | {"label": log.label}


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite_or_none(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with null where a number is not finite, as JSON wants it."""
    return {k: _jsonable(v) for k, v in record.items()}
