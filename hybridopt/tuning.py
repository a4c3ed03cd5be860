"""Hyperparameters tuned by any method: `tune(train, space, method, budget)`."""

from __future__ import annotations

import concurrent.futures
import inspect
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from hybridopt.callbacks import read_callbacks
from hybridopt.errors import HybridoptError, ObjectiveError, StateError
from hybridopt.forms import as_number
from hybridopt.harness import Interrupt, Run, checkpoint_file, load_checkpoint, save_checkpoint
from hybridopt.ledger import Ledger
from hybridopt.objective import Objective
from hybridopt.optimizer import Answer, FloatArray, Kind, Method, Request
from hybridopt.pruning import PRUNERS, Pruner
from hybridopt.randomness import derive_seed
from hybridopt.registry import composition
from hybridopt.result import Result
from hybridopt.space import Space, Value

Config: TypeAlias = dict[str, Value]


class TrialPruned(HybridoptError):
    """Raised by `Trial.report` to end a trial that early stopping gave up."""


@dataclass(frozen=True)
class Trial:
    """What a training run is told of itself; plain data, so that it can be sent to another process.

    Attributes:
        number: from 0, in the order of asking.
        seed: for the training's own random numbers: a pure function of the study's seed and the trial's number.
        early: what may give the trial up, see `tune`; None = nothing.
        earlier: intermediate losses by step of the trials that had ended when this one's generation was asked for.
        reports: its own intermediate losses by step, so far.
    """

    number: int
    seed: int
    early: Pruner | None = None
    earlier: tuple[dict[int, float], ...] = ()
    reports: dict[int, float] = field(default_factory=dict)

    def report(self, step: int, loss: float) -> None:
        """Tell an intermediate loss, e.g. after each epoch.

        Args:
            step: of the training, a whole number ≥ 0 that grows from report to report.
            loss: what `train` would return if it ended now.

        Raises:
            TrialPruned: early stopping gives the trial up. Let it pass; the last loss reported is the trial's.
        """
        before = max(self.reports, default=-1)
        if not isinstance(step, int) or step <= before:
            raise ObjectiveError(f"report: expected a whole number above {before} as step, got {step!r}")
        self.reports[int(step)] = float(loss)
        if self.early is not None and self.early.hopeless(int(step), self.reports, self.earlier):
            raise TrialPruned(f"trial {self.number} was given up after step {step}")


@dataclass(frozen=True)
class TrialRecord:
    """One trial as it ended.

    Attributes:
        number: from 0, in the order of asking.
        config: the values that it was trained with, by name.
        loss: what `train` returned; of a pruned trial the last loss reported; nan of a failed one.
        state: "complete", "pruned" (given up early) or "failed" (it raised an exception).
        seconds: that the training took.
        reports: intermediate losses by step.
        error: of a failed trial: its traceback.
        cause: of a failed trial: the exception's type and message, in one line.
    """

    number: int
    config: Config
    loss: float
    state: Literal["complete", "pruned", "failed"]
    seconds: float
    reports: dict[int, float]
    error: str = ""
    cause: str = ""


@dataclass(frozen=True, eq=False)
class Tuning:
    """What `tune` returns.

    Attributes:
        trials: in the order of asking.
        result: of the method that searched; `evaluations` are trials.
    """

    trials: tuple[TrialRecord, ...]
    result: Result

    @property
    def best(self) -> TrialRecord:
        """The completed trial of the lowest loss; of pruned ones if none was completed.

        Raises:
            ObjectiveError: every trial failed.
        """
        for state in ("complete", "pruned"):
            found = [t for t in self.trials if t.state == state and math.isfinite(t.loss)]
            if found:
                return min(found, key=lambda trial: trial.loss)
        first = next((t.error for t in self.trials if t.error), "its loss was not finite")
        raise ObjectiveError(
            f"tune: no trial of {len(self.trials)} has a finite loss; the first one:\n{first}"
        )

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dict a trial, for `pandas.DataFrame` and the like; a failed one's has its cause as "error"."""
        return [
            {"number": t.number, "state": t.state, "loss": t.loss, "seconds": t.seconds, **t.config}
            | ({"error": t.cause} if t.cause else {})
            for t in self.trials
        ]

    def __str__(self) -> str:
        """A table of the trials, best first."""
        text: str = composition("trials")(self.to_dicts())
        return text


def tune(
    train: Callable[..., float],
    space: Space,
    method: str | type | Method = "bayes(popsize=4)",
    budget: Any = 100,
    *,
    seed: int | None = None,
    start: Mapping[str, Value] | None = None,
    early: Literal["median", "halving"] | Pruner | None = None,
    workers: int | concurrent.futures.Executor = 1,
    checkpoint: str | Path | None = None,
    callbacks: Iterable[Callable[[TrialRecord], Any]] | Callable[[TrialRecord], Any] = (),
) -> Tuning:
    """Search hyperparameters with any method or composition.

    Args:
        train: `train(config)` or `train(config, trial)`: trains with the values in `config` (a dict of those parameters
            that count) and returns the loss to be made small. With `trial.report(step, loss)` it can be stopped early.
            A trial that raises an exception is recorded as failed and its point rejected; the search goes on, with a
            warning of the first one, and another at the end if all failed.
        space: the parameters.
        method: text or a `Method`; anything that needs no gradients. Default Bayesian optimisation, four trials at a
            time: `bayes` learns most from each trial if they come one by one; for more than four workers name
            `"bayes(popsize=8)"` or more, for thousands of quick trials `"cmaes"`. A method that asks for whole
            populations is what `workers` need.
        budget: number of trials, or anything that `Budget.parse` takes (`"600s"`).
        seed: of the method and the trials; None = drawn and recorded.
        start: values to begin at; default the middle of the space. (Populations begin around it.)
        early: gives hopeless trials up: `"median"` = `MedianPruner()`, `"halving"` = `HalvingPruner()`, or one of
            these from `hybridopt.pruning` with options, above all its grace period; None (default) = none.
        workers: trials at a time: a number of threads (training in torch and NumPy leaves Python's lock most of the
            time), or a `concurrent.futures.Executor` of processes or machines, which `train` must be picklable for.
            What a trial is told does not depend on it, so the search is the same; global random generators are shared
            between threads, so draw from `trial.seed`.
        checkpoint: a file, written after every trial. If it exists the search goes on from it, bit for bit.
        callbacks: each called with every `TrialRecord`; a true return value ends the search after
            the method's present step (a generation is trained to its end).

    Returns:
        A `Tuning`: the trials, the best one, a table (`print(tuning)`). An interrupt (Ctrl-C) ends the search after the
        method's present step and returns too; a second one raises at once.

    Example:
        >>> import math
        >>> from hybridopt import tune
        >>> from hybridopt.space import Categorical, Float, Space
        >>> space = Space({"lr": Float(1e-4, 1, log=True), "act": Categorical(["relu", "tanh"])})
        >>> def train(config):
        ...     return (math.log10(config["lr"]) + 2) ** 2 + (config["act"] == "relu")
        >>> tuning = tune(train, space, budget=60, seed=0)
        >>> tuning.best.config["act"], round(tuning.best.config["lr"], 2), len(tuning.trials)
        ('tanh', 0.01, 60)
    """
    file = checkpoint_file(checkpoint)
    objective = _Trials(train, space, start, early)
    todo = read_callbacks(callbacks, "record")
    whole = isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1
    if not (whole or isinstance(workers, concurrent.futures.Executor)):
        raise ObjectiveError(f"tune: expected workers >= 1 or an executor, got {workers!r}")
    with (
        _pool(workers) as pool,
        Run(objective, None, method, budget=budget, seed=seed) as run,
        Interrupt() as interrupt,
    ):
        objective.begin(pool, run.seed)
        saved = None
        if file is not None and file.exists():
            saved = load_checkpoint(file)
            if "trials" not in saved:
                raise StateError(f"checkpoint {file}: expected one that tune wrote, got one of minimize")
            if seed is not None and saved["run"]["seed"] != seed:
                raise StateError(
                    f"checkpoint {file}: it was saved with seed {saved['run']['seed']}, got seed={seed}"
                )
            objective.load(saved)
            run.load_state_dict(saved["run"])
            objective.study_seed = run.seed
        settled = run.state_dict()

        def after_trial(record: TrialRecord) -> None:
            if file is not None:
                save_checkpoint({"version": 1, "run": settled, **objective.state(objective.settled)}, file)
            said = [callback(record) for callback in todo]
            if any(said):
                run.end("a callback ended the search")

        objective.after_trial = after_trial
        while run.step() is not None:
            settled = run.state_dict()
            objective.settle()
            if interrupt.seen:
                run.end()
        if file is not None:
            state = objective.state(len(objective.records))
            save_checkpoint({"version": 1, "run": run.state_dict(), **state}, file)
        result = run.result()
    failed = [record for record in objective.records if record.state == "failed"]
    if failed and len(failed) == len(objective.records):
        warnings.warn(
            f"tune: all {len(failed)} trials failed, the first one with {failed[0].cause}; its traceback is "
            "`tuning.trials[0].error`",
            RuntimeWarning,
            stacklevel=2,
        )
    return Tuning(tuple(objective.records), result)


def _pool(workers: int | concurrent.futures.Executor) -> Any:
    """A context that gives the executor, or None for one trial at a time; an executor of the caller's stays open."""
    import contextlib

    if isinstance(workers, int):
        return contextlib.nullcontext() if workers == 1 else concurrent.futures.ThreadPoolExecutor(workers)
    return contextlib.nullcontext(workers)


@dataclass
class _Outcome:
    loss: float
    state: Literal["complete", "pruned", "failed"]
    seconds: float
    reports: dict[int, float]
    error: str = ""
    cause: str = ""


def _run_trial(train: Callable[..., Any], config: Config, trial: Trial, takes_trial: bool) -> _Outcome:
    """One training run, wherever it happens to run."""
    begun = time.perf_counter()
    loss, state, error, cause = math.nan, "complete", "", ""
    try:
        with torch.enable_grad():
            loss, _ = as_number(train(dict(config), trial) if takes_trial else train(dict(config)))
    except TrialPruned:
        loss, state = (trial.reports[max(trial.reports)] if trial.reports else math.nan), "pruned"
    except Exception as failure:  # noqa: BLE001 - a training run may fail in any way; it is recorded
        state, error = "failed", traceback.format_exc()
        cause = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    seconds = time.perf_counter() - begun
    return _Outcome(loss, state, seconds, dict(trial.reports), error, cause)  # type: ignore[arg-type]


class _Trials(Objective):
    """The objective of a search: a trial an evaluation, those of a population begun ahead of their turn."""

    dear: ClassVar[bool] = True

    def __init__(
        self,
        train: Callable[..., float],
        space: Space,
        start: Mapping[str, Value] | None,
        early: Literal["median", "halving"] | Pruner | None,
    ) -> None:
        pruner = PRUNERS[early]() if isinstance(early, str) and early in PRUNERS else early
        if not (pruner is None or isinstance(pruner, Pruner)):
            raise ObjectiveError(
                f"tune: expected early to be 'median', 'halving', a pruner or None, got {early!r}"
            )
        if not isinstance(space, Space):
            raise ObjectiveError(f"tune: expected a Space, got {type(space).__name__}; see hybridopt.space")
        self.train, self.space, self.early = train, space, pruner
        self.takes_trial = _takes_trial(train)
        if early is not None and not self.takes_trial:
            raise ObjectiveError(
                f"tune: early={early!r} expects train(config, trial) that calls trial.report"
            )
        self.records: list[TrialRecord] = []
        self.after_trial: Callable[[TrialRecord], None] = lambda record: None
        self.study_seed = 0
        self._pool: concurrent.futures.Executor | None = None
        self._ahead: dict[bytes, list[concurrent.futures.Future[_Outcome]]] = {}
        self._known: list[TrialRecord] = []  # trials of a step that was cut off, in their order
        self.settled = 0
        super().__init__(self._loss, space.vector(start), batch="loop", keep="best")
        self._accounts.warned = True  # `_warn` says more than "loss nan"
        self._warned: set[str] = set()

    @property
    def differentiable(self) -> bool:
        """Never: a training run has no gradient."""
        return False

    def begin(self, pool: concurrent.futures.Executor | None, seed: int) -> None:
        """Take the workers."""
        self._pool, self.study_seed = pool, seed

    def settle(self) -> None:
        """A step is done: early stopping may look at its trials."""
        self.settled = len(self.records)

    def answer(self, request: Request) -> Answer:
        """See `Objective.answer`; a population's trials are begun together."""
        if self._pool is not None and request.kind is Kind.POPULATION and request.x is not None:
            self._begin_rows(self._pool, request.x, (self.ledger, *request.scopes))
        try:
            return super().answer(request)
        finally:
            for waiting in self._ahead.values():
                for future in waiting:
                    future.cancel()
            self._ahead = {}

    def _begin_rows(
        self, pool: concurrent.futures.Executor, x: FloatArray, ledgers: Sequence[Ledger]
    ) -> None:
        """Begin the trials of a population that are not answered yet and fit every budget."""
        if self._known:
            return  # first those that a checkpoint holds; what follows them is run one by one
        done = self._generations.answered(x)
        left = min(
            min(led.max_evaluations - led.evaluations, led.max_equivalents - led.forward) for led in ledgers
        )
        fit = done + int(min(left, len(x) - done))
        for number, row in enumerate(self.vector.decode(x[done:fit]), start=len(self.records)):
            future = pool.submit(
                _run_trial, self.train, self.space.values(row), self._trial(number), self.takes_trial
            )
            self._ahead.setdefault(row.tobytes(), []).append(future)

    def _trial(self, number: int) -> Trial:
        earlier = tuple(t.reports for t in self.records[: self.settled] if t.reports)
        return Trial(number, derive_seed(self.study_seed, "trial", number), self.early, earlier)

    def _loss(self, params: Mapping[str, Tensor]) -> float:
        """The loss of the next trial: known from before, begun ahead, or run now."""
        x = self.vector.read()
        config, number = self.space.values(x), len(self.records)
        if self._known and self._known[0].config == config:
            record = self._known.pop(0)
        else:
            self._known = []
            waiting = self._ahead.get(x.tobytes())
            if waiting:
                outcome = waiting.pop(0).result()
            else:
                outcome = _run_trial(self.train, config, self._trial(number), self.takes_trial)
            record = TrialRecord(number=number, config=config, **vars(outcome))
            if not math.isfinite(record.loss):
                self._warn(record)
        self.records.append(record)
        self.after_trial(record)
        return record.loss

    def _warn(self, record: TrialRecord) -> None:
        """Say of the first failed trial why, and likewise of the first other one that has no finite loss."""
        if record.state in self._warned:
            return
        self._warned.add(record.state)
        what = (
            f"failed with {record.cause}" if record.cause else f"({record.state}) had a loss of {record.loss}"
        )
        # how many calls the trial is away from the one of `tune` depends on the method
        frame, level = inspect.currentframe(), 1
        while frame is not None and frame.f_globals["__name__"].startswith("hybridopt."):
            frame, level = frame.f_back, level + 1
        warnings.warn(
            f"tune: trial {record.number} {what}; its point is rejected and the search goes on, without a warning of "
            "later ones",
            RuntimeWarning,
            stacklevel=level,
        )

    def state(self, booked: int) -> dict[str, Any]:
        """The trials as plain data; the first `booked` are in the state of the run saved beside."""
        return {
            "space": self.space.describe(),
            "settled": self.settled,
            "booked": booked,
            "trials": [asdict(record) for record in [*self.records, *self._known]],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on after the booked trials; the others are not run again when they are asked for."""
        if state["space"] != self.space.describe():
            raise StateError("checkpoint: it was saved with another space")
        records = [TrialRecord(**record) for record in state["trials"]]
        self.settled, booked = state["settled"], state["booked"]
        self.records, self._known = records[:booked], records[booked:]


def _takes_trial(train: Any) -> bool:
    """Whether `train` takes the trial beside the configuration."""
    if not callable(train):
        raise ObjectiveError(
            f"tune: expected a function train(config) or train(config, trial), got {train!r}"
        )
    try:
        parameters = inspect.signature(train).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (
        any(p.kind is p.VAR_POSITIONAL for p in parameters)
        or len([p for p in positional if p.default is p.empty or p.name == "trial"]) > 1
    )
