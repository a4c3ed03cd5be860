"""Several methods on one problem, each from the same start, under budgets that mean the same for all of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridopt.errors import BoundsError, HybridoptError, MethodError
from hybridopt.harness import Callback, minimize
from hybridopt.ledger import Budget, Reason
from hybridopt.objective import Objective
from hybridopt.optimizer import Method, Need
from hybridopt.problems import Build, Problem, ProblemError, builder
from hybridopt.text import method as read_method
from hybridopt.tracker import Tracker, finite_or_none

DEFAULT_SEED = 42
JSON_KEYS = ("method", "seed", "loss", "best_loss", "evaluations", "forward", "backward", "forward_equivalents",
             "seconds", "reason")  # fmt: skip
"""What `records` keeps; `method` is the label."""


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Args:
        label: its name in tables and plots.
        method: as in `hybridopt.minimize`.
        budget: its own, where the comparison sets none; None = `default_budget`.
    """

    label: str
    method: str | type | Method
    budget: Any = None


_SAFETY = 100_000  # evaluations: these methods end by their own criteria long before

SEED_COMPARISON = (
    Entry("adam", "torch.adam(lr=1.0)", 100),
    Entry("slsqp-fd", "scipy.slsqp(gradients=differences, eps=1e-3, maxiter=100)", _SAFETY),
    Entry("slsqp", "scipy.slsqp(gradients=autograd)", _SAFETY),
    Entry("pso", "pyswarm.pso(maxiter=100, omega=0.5, phip=0.5, phig=0.5)", _SAFETY),
    Entry("cmaes", "cma.cmaes(sigma=0.5, popsize=10, maxiter=100)", _SAFETY),
    Entry("dual_annealing", "scipy.dual_annealing(maxiter=100, initial_temp=1, gradients=none)", _SAFETY),
    Entry(
        "dual_annealing > slsqp",
        "scipy.dual_annealing(evaluations=500, gradients=none) > scipy.slsqp(ftol=1e-12)",
        _SAFETY,
    ),
)
"""The seed comparison: on the problem `identity`, seed 42; labels stay whatever the bare names stand for later."""


def compare(
    problem: str | Build = "identity",
    methods: Iterable[str | Method | Entry] | Mapping[str, Any] | None = None,
    budget: Any = None,
    seeds: Iterable[int] = (DEFAULT_SEED,),
    *,
    tracker: Tracker | None = None,
    callbacks: Sequence[Callback] | Callback = (),
) -> Tracker:
    """Run every method from the same start with every seed; the outcome is in the tracker.

    A method that needs a box searches in the problem's bounds, and so does a chain that contains one; all others
    run without bounds. What fails with a `HybridoptError` becomes a result whose `reason` is `"failed"` and whose
    `message` is the error's; the others go on. An interrupted run (Ctrl-C, or a callback that returns true) ends
    the comparison with what was done so far. The first run in a process also pays, in seconds, for torch's warm-up.

    Args:
        problem: a name (`hybridopt.problems.names()`), `"file.py:function"`, or a function from a seed to a fresh
            `Problem`, called anew for every run.
        methods: texts, methods or `Entry`s; or a mapping from labels to texts or methods. None: those of
            `SEED_COMPARISON`, with their own budgets if the problem is `"identity"`.
        budget: of each run, as in `minimize`; it replaces the entries' own. None: theirs, else `default_budget`.
        seeds: of the problem and of the method's random numbers.
        tracker: where to add the runs; None = a new one.
        callbacks: as in `minimize`.

    Raises:
        ProblemError: the problem is unknown, cannot be built, or does not start where it started before.
        MethodError: a method is unknown or given twice.
        BudgetError: the budget cannot be read.

    Example:
        >>> from hybridopt.compare import compare
        >>> tracker = compare("identity", ["slsqp", "cmaes(sigma=0.5)"], budget=137)
        >>> [(r["label"], r["evaluations"], r["reason"]) for r in tracker.results()]
        [('slsqp', 88, 'converged'), ('cmaes(sigma=0.5)', 137, 'evaluations')]
    """
    tracker = Tracker() if tracker is None else tracker
    for _ in runs(problem, methods, budget, seeds, tracker=tracker, callbacks=callbacks):
        pass
    return tracker


def runs(
    problem: str | Build,
    methods: Iterable[str | Method | Entry] | Mapping[str, Any] | None,
    budget: Any,
    seeds: Iterable[int],
    *,
    tracker: Tracker,
    callbacks: Sequence[Callback] | Callback = (),
) -> Iterator[dict[str, Any]]:
    """As `compare`, one finished run at a time: yields each result as it stands in the tracker."""
    build = builder(problem) if isinstance(problem, str) else problem
    lines = entries(methods, own_budgets=methods is not None or problem == "identity")
    parsed = None if budget is None else Budget.parse(budget)
    starts: dict[int, bytes] = {}
    todo = list(seeds)
    if not todo:
        raise ProblemError("seeds: expected at least one, got none")
    for entry in lines:
        for seed in todo:
            result = _run(entry, build, parsed, seed, starts, tracker, callbacks)
            yield result
            if result["reason"] == Reason.INTERRUPTED.value:
                return


def entries(
    methods: Iterable[str | Method | Entry] | Mapping[str, Any] | None, *, own_budgets: bool = True
) -> list[Entry]:
    """The lines of a comparison, every method and budget read and so checked.

    Args:
        methods: as in `compare`.
        own_budgets: False = forget the entries' own.

    Raises:
        MethodError: a method cannot be read, a label is given twice, or there is none.
        BudgetError: a budget cannot be read.

    Example:
        >>> from hybridopt.compare import entries
        >>> [entry.label for entry in entries(["slsqp", "adam(lr=.1) > slsqp"])]
        ['slsqp', 'adam(lr=.1) > slsqp']
    """
    given: Iterable[Any] = SEED_COMPARISON if methods is None else methods
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        given = [Entry(label, method) for label, method in given.items()]
    found: dict[str, Entry] = {}
    for item in given:
        entry = item if isinstance(item, Entry) else Entry(str(item).strip(), item)
        if entry.label in found:
            raise MethodError(f"methods: {entry.label!r} is given twice; give each its own label")
        budget = Budget.parse(entry.budget) if own_budgets and entry.budget is not None else None
        found[entry.label] = Entry(entry.label, _read(entry), budget)
    if not found:
        raise MethodError("methods: expected at least one, got none")
    return list(found.values())


def _read(entry: Entry) -> Method:
    try:
        return read_method(entry.method)
    except MethodError as error:
        row = next((row for row in SEED_COMPARISON if row.label == entry.method), None)
        if row is None:
            raise
        raise MethodError(
            f"method: {row.label!r} is only a label, in the seed comparison; write {row.method!r}"
        ) from error


def default_budget(n: int) -> Budget:
    """1000 (n + 1) forward-equivalents for n weights, at most 100 000."""
    return Budget(forward_equivalents=float(min(1000 * (n + 1), 100_000)))


def records(tracker: Tracker) -> list[dict[str, Any]]:
    """One plain object a run, ready for JSON: the keys of `JSON_KEYS`, null where a number is not finite."""
    return [
        finite_or_none({k: r["label" if k == "method" else k] for k in JSON_KEYS}) for r in tracker.results()
    ]


# -- one run ----------------------------------------------------------------------------------------------------


def _run(
    entry: Entry,
    build: Build,
    budget: Budget | None,
    seed: int,
    starts: dict[int, bytes],
    tracker: Tracker,
    callbacks: Sequence[Callback] | Callback,
) -> dict[str, Any]:
    problem = build(seed)
    method = read_method(entry.method)
    begun = len(tracker.runs)
    try:
        objective = _objective(problem, method, seed)
        _check_start(problem, objective, seed, starts)
        minimize(
            objective,
            method=method,
            budget=budget or entry.budget or default_budget(objective.vector.n),
            seed=seed,
            tracker=tracker,
            callbacks=callbacks,
            label=entry.label,
        )
    except ProblemError:
        raise
    except HybridoptError as error:
        _fail(tracker, begun, entry.label, method, seed, _explain(error, problem))
    result = tracker.runs[-1].result
    assert result is not None
    return result


def _objective(problem: Problem, method: Method, seed: int) -> Objective:
    return Objective(
        problem.loss,
        problem.target,
        surrogate=problem.surrogate,
        select=problem.select,
        integer=problem.integer,
        batch=problem.batch,
        bounds=problem.bounds if Need.BOUNDS in method.needs else None,
        seed=seed,
    )


def _check_start(problem: Problem, objective: Objective, seed: int, starts: dict[int, bytes]) -> None:
    """All methods begin at the same point, which a target that is shared between runs would spoil."""
    start = hashlib.blake2b(objective.vector.read().tobytes()).digest()
    if starts.setdefault(seed, start) != start:
        raise ProblemError(
            f"problem {problem.name!r}: expected the same start at every call with seed {seed}, got another; make a "
            "fresh model in the function, and draw from generators that are seeded"
        )


def _explain(error: HybridoptError, problem: Problem) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, BoundsError) and problem.bounds is None:
        text += f" to Problem(...): {problem.name!r} has none"
    return text


def _fail(tracker: Tracker, begun: int, label: str, method: Method, seed: int, message: str) -> None:
    """Leave a failed result in the tracker, with what had been spent."""
    if len(tracker.runs) == begun:
        tracker.begin(label, seed)
    log = tracker.runs[-1]
    if log.result is None:
        spent = dict.fromkeys(("evaluations", "forward", "backward"), 0)
        spent |= {"forward_equivalents": 0.0, "seconds": 0.0}  # type: ignore[dict-item]
        losses = {"loss": math.nan, "best_loss": math.inf}
        log.result = {"method": str(method), "seed": seed} | losses | spent | {"label": label}
    log.result |= {"reason": Reason.FAILED.value, "message": message}
