"""Early stopping of training runs: which trial is given up, by the intermediate losses of earlier ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

from hybridopt.options import Count, Index, Range, check_options

Reports: TypeAlias = Mapping[int, float]
"""Intermediate losses of one trial by step."""


@dataclass(frozen=True)
class MedianPruner:
    """Gives a trial up whose best loss so far is above the median of what earlier ones had reached at this step.

    The median stopping rule (Golovin et al. 2017), but with the earlier trials' best losses in place of their running
    averages, and of all that came so far, given up later or not. nan counts as the worst. Expect it to give up
    more than half of the trials.

    Args:
        n_startup_trials: how many earlier trials must have come so far before it compares.
        n_warmup_steps: the grace period: up to this step no trial is given up. None (default) = a fifth of the
            longest earlier trial's steps. More where slow learners end best; 0 for the lowest cost.

    Raises:
        MethodError: an option is no such number.

    Example:
        >>> from hybridopt.pruning import MedianPruner
        >>> MedianPruner(n_warmup_steps=5)
        MedianPruner(n_startup_trials=4, n_warmup_steps=5)
    """

    name: ClassVar[str] = "MedianPruner"
    n_startup_trials: Count = 4
    n_warmup_steps: Index | None = None

    def __post_init__(self) -> None:
        check_options(self)

    def hopeless(self, step: int, reports: Reports, earlier: Sequence[Reports]) -> bool:
        """Whether a trial that has just reported `step` is given up."""
        grace = _longest(earlier) / 5 if self.n_warmup_steps is None else self.n_warmup_steps
        loss = _lowest(reports.values())
        others = [
            _lowest(value for at, value in trial.items() if at <= step)
            for trial in earlier
            if min(trial) <= step <= max(trial)
        ]
        if step <= grace or len(others) < self.n_startup_trials:
            return False
        return math.isinf(loss) or loss > statistics.median(others)


@dataclass(frozen=True)
class HalvingPruner:
    """Gives a trial up that is not among the better part of those that came as far, at a few steps only.

    Asynchronous successive halving (Li et al. 2020): at the rungs, which are the steps `min_resource`, that times
    `reduction_factor`, times it again and so on, the best 1 / `reduction_factor` go on. A trial's loss at a rung is
    that of its first report there or later. Nobody waits for others, and nobody that was given up is taken up again.
    nan counts as the worst. It compares seldom, so noise has fewer chances to end a good trial than in `MedianPruner`.

    Args:
        n_startup_trials: how many earlier trials must have come so far before it compares.
        min_resource: the first rung, which is the grace period. None (default) = an eighth of the longest earlier
            trial's steps.
        reduction_factor: at least 2.

    Raises:
        MethodError: an option is no such number.

    Example:
        >>> from hybridopt.pruning import HalvingPruner
        >>> HalvingPruner(min_resource=3, reduction_factor=3)
        HalvingPruner(n_startup_trials=4, min_resource=3, reduction_factor=3)
    """

    name: ClassVar[str] = "HalvingPruner"
    n_startup_trials: Count = 4
    min_resource: Count | None = None
    reduction_factor: Annotated[int, Range(">= 2", lambda v: v >= 2)] = 2

    def __post_init__(self) -> None:
        check_options(self)

    def hopeless(self, step: int, reports: Reports, earlier: Sequence[Reports]) -> bool:
        """Whether a trial that has just reported `step` is given up."""
        longest = _longest(earlier)
        rung: float = longest / 8 if self.min_resource is None else self.min_resource
        before, reached = max((at for at in reports if at < step), default=-1), None
        while rung < longest and rung <= step:
            if rung > before:
                reached = rung
            rung *= self.reduction_factor
        if reached is None:
            return False
        loss = reports[step]
        others = [
            trial[min(at for at in trial if at >= reached)] for trial in earlier if max(trial) >= reached
        ]
        if len(others) < self.n_startup_trials:
            return False
        better = sum(other < loss for other in others)
        return not loss < math.inf or better >= (len(others) + 1) / self.reduction_factor


Pruner: TypeAlias = MedianPruner | HalvingPruner
PRUNERS: dict[str, Callable[[], Pruner]] = {"median": MedianPruner, "halving": HalvingPruner}


def _longest(earlier: Iterable[Reports]) -> int:
    """The last step that any of them reported; 0 without any."""
    return max((max(trial) for trial in earlier), default=0)


def _lowest(losses: Iterable[float]) -> float:
    """The lowest loss; nan is none."""
    return min((loss for loss in losses if not math.isnan(loss)), default=math.inf)
