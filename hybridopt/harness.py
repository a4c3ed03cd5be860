"""The only loop: runs any method on any objective under one budget, and leaves the model with the best point."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from hybridopt import randomness
from hybridopt.callbacks import read_callbacks
from hybridopt.errors import BudgetError, ClosedError, MethodError, ObjectiveError, StateError, Stop, nearest
from hybridopt.ledger import Budget, Reason
from hybridopt.objective import Objective
from hybridopt.optimizer import Method, Need, Optimizer, Step, leaves, step
from hybridopt.registry import methods
from hybridopt.result import Result
from hybridopt.text import method as read_method
from hybridopt.tracker import RunLog, Tracker

Callback = Callable[["Run", Step], Any]
STATE_VERSION = 6


class Run:
    """A method at work on an objective, one step at a time, for those who want to hold the reins.

    Use it in a `with` block: leaving the block, by whatever way, puts the best point into the model and gives the
    caller's gradients, modes and generators back. Arguments are those of `minimize`.

    Example:
        >>> import numpy as np
        >>> from hybridopt import Run
        >>> with Run(lambda x: float((x**2).sum()), np.ones(2), "cmaes", budget=100, seed=0) as run:
        ...     for step in run:
        ...         if step.loss < 0.1:
        ...             break
        >>> run.result().best_loss < 0.1
        True
    """

    def __init__(
        self,
        loss: Callable[..., Any] | Objective,
        target: Any = None,
        method: str | type | Method | None = None,
        *,
        budget: Any,
        seed: int | None = None,
        tracker: Tracker | None = None,
        label: str | None = None,
        **objective: Any,
    ) -> None:
        if method is None:
            raise MethodError("minimize: expected a method, e.g. a name that `hybridopt methods` lists")
        self.method = read_method(method)
        self.seed = randomness.draw_seed() if seed is None else _checked_seed(seed)
        limits = Budget.parse(budget)
        if isinstance(loss, Objective):
            if target is not None or objective:
                raise BudgetError(
                    "minimize: an Objective brings its target and options; pass only method and budget"
                )
            self.objective = loss
        else:
            known = [
                p
                for p in inspect.signature(Objective).parameters
                if p not in ("loss", "target", "budget", "seed")
            ]
            for name in objective:
                if name not in known:
                    raise ObjectiveError(f"minimize: unknown argument {name!r}{nearest(name, known)}")
            self.objective = Objective(loss, target, seed=self.seed, **objective)
        scores = self.objective.scores
        self.objective.ledger.limit(limits if scores is None else scores.leaving(limits))
        _require_skills(self.method, self.objective)
        self.label = label or str(self.method)
        self.steps = 0
        self.reason: Reason | None = None
        self.message = ""
        self._tracker = tracker
        self._log: RunLog | None = None
        if tracker is not None:
            self._log = tracker.begin(self.label, self.seed)
            self.objective.listeners.append(self._log)
        self._result: Result | None = None
        self._ended: tuple[Reason, str] | None = None  # by the method itself, which no larger budget undoes
        self._fitted, self._chosen = self.method.fitted(self.objective)
        _require_skills(self._fitted, self.objective)
        self.optimizer: Optimizer = self._fitted.start(self.objective.vector, self.seed)

    # -- stepping -----------------------------------------------------------------------------------------------

    def step(self) -> Step | None:
        """Do one step; None once the run has ended (see `reason`)."""
        if self._result is not None:
            raise ClosedError("run: it is finished; make a new one, or load its state into a new one")
        if self.reason is not None:
            return None
        try:
            done = step(self.optimizer, self.objective)
        except Stop as stop:
            self.reason, self.message = stop.reason, stop.reason.sentence
            return None
        self.steps += 1
        if done.reason is not None:
            self._ended = (done.reason, done.message or done.reason.sentence)
            self.reason, self.message = self._ended
        self._look_at_target()
        return done

    def _look_at_target(self) -> None:
        if self.objective.ledger.target_reached:
            self.reason, self.message = Reason.TARGET, Reason.TARGET.sentence

    def __iter__(self) -> Iterator[Step]:
        while (done := self.step()) is not None:
            yield done

    # -- ending -------------------------------------------------------------------------------------------------

    def end(self, message: str = "") -> None:
        """Let the run do no further step, as if the user had interrupted it; nothing if it has ended already."""
        if self.reason is None:
            self.reason, self.message = Reason.INTERRUPTED, message

    def finish(self, reason: Reason = Reason.INTERRUPTED) -> Result:
        """End the run: the model gets the kept point, everything else is as found. Calling it twice is allowed.

        Args:
            reason: said if nothing ended the run so far.
        """
        if self._result is None:
            try:
                self._result = self._conclude(reason)
            finally:
                self.optimizer.close()
                self.objective.close()
            if self._tracker is not None and self._log is not None:
                self._tracker.finish(self._log, self._result)
        return self._result

    def result(self) -> Result:
        """The result; ends the run if it is still going."""
        return self.finish()

    def _conclude(self, reason: Reason) -> Result:
        objective, ledger = self.objective, self.objective.ledger
        own = self.optimizer.incumbent
        self.reason = self.reason or reason
        score: float | None = None
        try:
            if objective.scores is not None and self.reason is not Reason.FAILED:
                score = objective.scores.choose(own.x, ledger)
        finally:
            if score is None and ledger.best_point is not None and objective.keeps_best:
                objective.restore_best()
            elif score is None and own.x is not None:
                objective.vector.write(objective.vector.decode(own.x))
        if ledger.evaluations and ledger.best_loss == float("inf"):
            self.reason, self.message = Reason.NON_FINITE, Reason.NON_FINITE.sentence
        vector = objective.vector
        return Result(
            method=str(self.method),
            seed=self.seed,
            params=dict(zip(vector.names, vector.snapshot(), strict=True)),
            loss=own.loss,
            best_loss=ledger.best_loss,
            best_evaluation=ledger.best_evaluation,
            reason=self.reason,
            message=self.message or self.reason.sentence,
            **ledger.spent(),
            violation=ledger.best_violation if objective.constraints is not None else 0.0,
            nonfinite=ledger.nonfinite,
            stochastic=objective.stochastic,
            score=score,
            steps=self.steps,
            stages=self.optimizer.reports,
            notes=(*objective.notes, *self.optimizer.notes, *self._chosen),
        )

    def __enter__(self) -> Run:
        self.objective.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is None or issubclass(kind, KeyboardInterrupt)
        self.finish(Reason.INTERRUPTED if interrupted else Reason.FAILED)

    # -- saving -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, as tensors, numbers, strings, lists and dicts.

        May be called between any two steps. `torch.save` it; it loads with `weights_only=True`.
        """
        return {
            "version": STATE_VERSION,
            "method": str(self.method),
            "fitted": str(self._fitted),
            "chosen": list(self._chosen),
            "seed": self.seed,
            "steps": self.steps,
            "ended": None if self._ended is None else [self._ended[0].value, self._ended[1]],
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = True) -> None:
        """Go on where a saved run stood, in this or another process. The budget stays as given here.

        What `auto` chose then stays chosen, whatever it would choose for this budget.

        Args:
            state: from `state_dict`.
            exact: see `Optimizer.load_state_dict`.

        Raises:
            StateError: it was saved by another method or over other weights.
            ReplayMismatch: (at the next step) a solver does not walk the recorded path any more.
        """
        if "trials" in state:
            raise StateError("state: expected one of a run, got one of tune")
        if state.get("version") != STATE_VERSION:
            raise StateError(f"state: expected version {STATE_VERSION}, got {state.get('version')!r}")
        if state["method"] != str(self.method):
            raise StateError(f"state: it was saved by {state['method']!r}, this run is {str(self.method)!r}")
        if state["fitted"] != str(self._fitted):
            self.optimizer.close()
            self._fitted, self._chosen = read_method(state["fitted"]), list(state["chosen"])
            self.optimizer = self._fitted.start(self.objective.vector, state["seed"])
        self.seed = state["seed"]
        self.steps = state["steps"]
        ended = state["ended"]
        self._ended = None if ended is None else (Reason(ended[0]), ended[1])
        self.reason, self.message = (None, "") if self._ended is None else self._ended
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"], exact=exact)
        self._look_at_target()


def minimize(
    loss: Callable[..., Any] | Objective,
    target: Any = None,
    method: str | type | Method | None = None,
    *,
    budget: Any,
    seed: int | None = None,
    tracker: Tracker | None = None,
    callbacks: Iterable[Callback] | Callback = (),
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    exact: bool = True,
    label: str | None = None,
    **objective: Any,
) -> Result:
    """Minimise a loss over a model's weights with any method; afterwards the model holds the best point.

    Args:
        loss: `loss(model)`, `f(x)`, `f(params)` or `closure()`, see `Objective`.
        target: a module, tensor(s), NumPy array, dict of tensors, parameter groups, or `ParameterVector`.
        method: text (`"adam(lr=.01)"`, `"dual_annealing(evaluations=500) > slsqp"`), a `Method`, or a class.
        budget: evaluations (`137`, `"137"`), forward-equivalents (`"1000fe"`), seconds (`"30s"`), or a `Budget`;
            never exceeded by one evaluation.
        seed: of the method and of the random numbers that the loss draws; None = drawn and recorded.
        tracker: collects one row per evaluation of the loss (those of a score have none).
        callbacks: each called as `callback(run, step)` after every step; a true return value ends the run.
        checkpoint: a file. If it exists the run goes on from it; it is written every `checkpoint_seconds` seconds
            and at the end, atomically.
        exact: see `Run.load_state_dict`.
        label: the tracker's name for this run; default the method's text.
        **objective: further arguments of `Objective`: residuals, constraints, surrogate, nonfinite, keep, score,
            candidates, noise, batch, backward_cost, select, bounds, scale, integer, log.

    Returns:
        A `Result`. An interrupt (Ctrl-C) ends the run between two steps and returns too; a second one raises at
        once. An exception in the loss or a callback passes unchanged, after the best point was put into the model.

    Example:
        >>> import torch, hybridopt
        >>> model = torch.nn.Linear(1, 1)
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loss = lambda model: ((model(x) - 3 * x - 1) ** 2).mean()
        >>> result = hybridopt.minimize(loss, model, "slsqp", budget=100, seed=0)
        >>> round(model.weight.item(), 2), round(model.bias.item(), 2)
        (3.0, 1.0)
    """
    todo = read_callbacks(callbacks, "run", "step")
    run = Run(loss, target, method, budget=budget, seed=seed, tracker=tracker, label=label, **objective)
    file = checkpoint_file(checkpoint)
    with run, Interrupt() as interrupt:
        if file is not None and file.exists():
            state = load_checkpoint(file)
            if seed is not None and state.get("seed", seed) != seed:
                raise StateError(
                    f"checkpoint {file}: it was saved with seed {state['seed']}, got seed={seed}"
                )
            run.load_state_dict(state, exact=exact)
        saved = time.monotonic()
        while (done := run.step()) is not None:  # a generator could not pass on a StopIteration of the loss
            for callback in todo:
                if callback(run, done):
                    run.end("a callback ended the run")
            if interrupt.seen:
                run.end()
            if file is not None and time.monotonic() - saved >= checkpoint_seconds:
                save_checkpoint(run.state_dict(), file)
                saved = time.monotonic()
        if file is not None:
            save_checkpoint(run.state_dict(), file)
    return run.result()


def checkpoint_file(checkpoint: str | Path | None) -> Path | None:
    """The file to save to; `StateError` if its folder is not there."""
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None and not file.parent.is_dir():
        raise StateError(f"checkpoint {file}: expected an existing folder, there is no {str(file.parent)!r}")
    return file


def load_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint's contents; `StateError` naming the file if it is none."""
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:
        raise StateError(
            f"checkpoint {file}: expected a file that hybridopt wrote, it cannot be read: {error!r}"
        ) from error
    if not isinstance(state, dict) or "version" not in state:
        raise StateError(f"checkpoint {file}: expected a file that hybridopt wrote, got something else")
    return state


def save_checkpoint(state: Mapping[str, Any], file: Path) -> None:
    """Write a checkpoint so that the file is always a whole one, the old or the new."""
    scratch = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    torch.save(state, scratch)
    scratch.replace(file)


class Interrupt:
    """The first Ctrl-C is noted, to be acted on between steps; the second raises at once. Main thread only."""

    def __init__(self) -> None:
        self.seen = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            if self._previous is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._handle)
            else:
                self._previous = None  # somebody else's handler stays in force
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        warnings.warn("interrupt: ending after this step; press Ctrl-C again to stop at once", stacklevel=2)

    def __exit__(self, *exc: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


def _require_skills(method: Method, objective: Objective) -> None:
    """Refuse a method that would pass over the constraints, or that needs residuals where there are none.

    Raises:
        MethodError: names the methods that can keep constraints.
        ObjectiveError: the loss returns one number.
    """
    for part in leaves(method):
        if objective.constraints is not None and not part.parts and Need.CONSTRAINTS not in part.uses:
            able = [name for name, cls in methods().items() if Need.CONSTRAINTS in cls.uses]
            raise MethodError(
                f"{part.label}: it cannot keep constraints; methods that can: {', '.join(able)}"
            )
        if Need.RESIDUALS in part.needs and objective.residuals is None:
            raise ObjectiveError(
                f"{part.label}: expected a loss that returns residuals, of which it makes the squares small: pass "
                "residuals=True and return the residuals themselves"
            )


def _checked_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise StateError(f"seed: expected a whole number from 0 to 2**32 - 1, got {seed!r}")
    return seed
