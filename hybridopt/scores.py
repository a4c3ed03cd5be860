"""Which point a run ends with, by a second opinion: the lowest losses scored once more, all by the same function."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hybridopt.errors import BudgetError, ObjectiveError
from hybridopt.evaluation import Evaluation
from hybridopt.forms import Loss, as_number
from hybridopt.ledger import Budget, Ledger
from hybridopt.point import Point
from hybridopt.vector import FloatArray


class Scores:
    """Keeps the points of lowest loss; at the end scores them and the method's own point, and chooses the lowest score.

    Where losses are noisy the lowest of many is a lucky draw. A score on data that chose nothing tells which of the
    candidates is good. Each score is a forward and an evaluation within the budget (`leaving`), of which the ledger's
    best loss and its listeners hear nothing, since it is no loss.

    Args:
        evaluation: where the weights stand, and how another function is called there.
        score: like the loss.
        candidates: how many points of lowest loss are kept.
    """

    def __init__(self, evaluation: Evaluation, score: Loss, candidates: int) -> None:
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            raise ObjectiveError(f"candidates: expected a whole number of at least 1, got {candidates!r}")
        self._evaluation = evaluation
        self._score = score
        self._candidates = candidates
        self._kept: list[tuple[float, Point]] = []  # lowest loss first

    def leaving(self, budget: Budget) -> Budget:
        """What of a budget is for the search.

        Raises:
            BudgetError: nothing is.
        """
        scores = self._candidates + 1
        left: dict[str, Any] = {}
        for quantity, limit in budget.limits.items():
            if quantity == "seconds":
                continue
            if limit <= scores:
                raise BudgetError(
                    f"budget: expected more {quantity} than the {scores} that scoring {self._candidates} candidates "
                    f"and the method's own point takes, got {limit:g}; give a larger budget or fewer candidates="
                )
            left[quantity] = limit - scores
        return replace(budget, **left)

    def offer(self, losses: Sequence[float] | FloatArray, points: FloatArray | None = None) -> None:
        """Keep the point being answered, or the rows of `points` (weights), where their losses are among the lowest."""
        order = np.argsort(losses, kind="stable")[: self._candidates].tolist()
        for i in order:
            loss = float(losses[i])
            full = len(self._kept) == self._candidates
            if not math.isfinite(loss) or (full and loss >= self._kept[-1][0]):
                return
            if points is not None:
                self._evaluation.imagine(points[i])
            point = self._evaluation.point_here()
            known = [j for j, (_, other) in enumerate(self._kept) if _same(point, other)]
            if known and self._kept[known[0]][0] <= loss:
                continue
            for j in known:
                del self._kept[j]
            bisect.insort(self._kept, (loss, point), key=lambda entry: entry[0])
            del self._kept[self._candidates :]

    def choose(self, own: FloatArray | None, ledger: Ledger) -> float | None:
        """Put the candidate of lowest score into the model; its score.

        Args:
            own: the method's own point, in solver coordinates; None = where the weights stand.
            ledger: of the run.

        Returns:
            None, and the own point in the model, if no score is finite.
        """
        evaluation = self._evaluation
        evaluation.kept = None
        if own is None:
            evaluation.x = None
        first = evaluation.point_here(own)
        candidates = [first, *(point for _, point in self._kept if not _same(point, first))]
        best, lowest = first, math.inf
        try:
            for point in candidates:
                self._put(point)
                ledger.evaluations += 1
                ledger.forward += 1
                value, _ = as_number(evaluation.call(self._score.call, False), "score")
                if value < lowest and math.isfinite(value):
                    best, lowest = point, value
        except BaseException:
            best = first
            raise
        finally:
            self._put(best)
        return lowest if math.isfinite(lowest) else None

    def _put(self, point: Point) -> None:
        point.put(self._evaluation.vector)
        self._evaluation.guard.set_buffers(point.buffers)

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The kept points and their losses."""
        losses = torch.tensor([loss for loss, _ in self._kept], dtype=torch.float64)
        return {"losses": losses, "points": [point.state_dict() for _, point in self._kept]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the points that were saved."""
        points = [Point.from_state(point) for point in state["points"]]
        self._kept = list(zip(state["losses"].tolist(), points, strict=True))[: self._candidates]


def _same(one: Point, other: Point) -> bool:
    """Whether two points are the same weights, as far as that is seen without comparing tensors."""
    return one.x is not None and other.x is not None and np.array_equal(one.x, other.x)
