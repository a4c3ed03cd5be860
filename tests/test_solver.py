"""Blocking solvers as steppers: interleaved, nested, moved, copied, closed, abandoned, and revived from the journal."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import Method, Reason, Run, method
from hybridopt.errors import ClosedError, MemoryLimit, ReplayMismatch, StateError
from hybridopt.solver import Ask, BlockingMethod, Ending, SolverRun, Start
from hybridopt.vector import ParameterVector
from tests.driving import BOX, SOLVERS, Recorded, resident, rosenbrock, start, whole
from tests.third_party import NelderMead

every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def finish(run: Run) -> None:
    with run:
        for _ in run:
            pass


def in_thread(work: Callable[[], Any]) -> Any:
    """Do it in a new thread; its result."""
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(work()))
    thread.start()
    thread.join()
    return out[0]


# -- several at once ---------------------------------------------------------------------------------------------


def deeper(depth: int, work: Callable[[], Any]) -> Any:
    """Call it from farther down the C stack."""
    return work() if depth == 0 else functools.reduce(lambda *_: deeper(depth - 1, work), (0, 0))


@every_solver
@pytest.mark.parametrize("copies", [2, 8])
def test_interleaved_runs_are_as_alone(solver: Method, copies: int) -> None:
    """From different depths of the C stack: solvers that keep a pointer into it crash."""
    alone = [whole(solver, 40, seed=seed) for seed in range(copies)]
    pairs = [start(solver, 40, seed=seed) for seed in range(copies)]
    order = np.random.default_rng(copies)
    live = list(range(copies))
    while live:
        i = live[order.integers(len(live))]
        if deeper(int(order.integers(12)), pairs[i][0].step) is None:
            live.remove(i)
    for (run, loss), path in zip(pairs, alone, strict=True):
        run.finish()
        assert loss.path == path


INNER = {"pyswarm.pso": ("pyswarm.pso(swarmsize=4)", 9), "slsqp": ("slsqp", 12), "annealing": ("dual_annealing", 15),
         "cma.cmaes": ("cma.cmaes", 13)}  # fmt: skip


@every_solver
@pytest.mark.parametrize("inner", INNER)
def test_a_solver_inside_anothers_loss(solver: Method, inner: str) -> None:
    text, budget = INNER[inner]
    counts: list[int] = []

    def nested(x: torch.Tensor) -> torch.Tensor:
        y = torch.tensor([0.5, -0.5], dtype=torch.float64)
        shift = x.detach().sum()
        result = hybridopt.minimize(
            lambda y: ((y - shift) ** 2).sum(), y, text, budget=budget, bounds=(-9, 9), seed=1
        )
        counts.append(result.evaluations)
        return rosenbrock(x) + 1e-3 * result.best_loss

    expected = whole(solver, 12, loss=Recorded(nested))
    inner_counts, counts[:] = list(counts), []
    assert len(expected) <= 12
    assert all(0 < count <= budget for count in inner_counts)
    assert whole(solver, 12, loss=Recorded(nested)) == expected
    assert counts == inner_counts


def test_a_solver_inside_itself() -> None:
    """One step of a swarm runs a whole swarm whose loss runs a third one."""

    def level(depth: int, x: torch.Tensor) -> torch.Tensor:
        if depth == 0:
            return (x**2).sum()
        y = torch.full((2,), 0.5, dtype=torch.float64)
        inner = hybridopt.minimize(
            lambda y: level(depth - 1, y + x.detach().mean()),
            y,
            "pyswarm.pso(swarmsize=3)",
            budget=4,
            bounds=BOX,
            seed=1,
        )
        assert inner.evaluations == 4
        return (x**2).sum() + inner.best_loss

    path = whole(method("pyswarm.pso(swarmsize=3)"), 7, loss=Recorded(lambda x: level(2, x)))
    assert len(path) == 7
    assert path == whole(method("pyswarm.pso(swarmsize=3)"), 7, loss=Recorded(lambda x: level(2, x)))


# -- moved, copied -----------------------------------------------------------------------------------------------


@every_solver
def test_stepped_from_another_thread_than_it_began_in(solver: Method) -> None:
    run, loss = start(solver, 40)
    for _ in range(5):
        run.step()
    in_thread(run.step)
    finish(run)
    assert loss.path == whole(solver, 40)


@every_solver
def test_stepped_from_thirty_threads_in_turn(solver: Method) -> None:
    run, loss = start(solver, 40)
    for _ in range(30):
        if in_thread(run.step) is None:
            break
    finish(run)
    assert loss.path == whole(solver, 40)


@every_solver
def test_two_runs_in_two_threads(solver: Method) -> None:
    pairs = [start(solver, 40, seed=seed) for seed in (0, 1)]
    threads = [threading.Thread(target=lambda run=run: finish(run)) for run, _ in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [loss.path for _, loss in pairs] == [whole(solver, 40, seed=seed) for seed in (0, 1)]


def clone_by_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@every_solver
@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle, copy.copy])
def test_copied_half_way(solver: Method, clone: Callable[[Any], Any]) -> None:
    """A copy of a live solver goes on from there; the original is not disturbed by it."""
    expected = whole(solver, 40)
    run, loss = start(solver, 40)
    for _ in range(7):
        run.step()
    done = len(loss.path)
    other, other_loss = start(solver, 40)
    other.load_state_dict(run.state_dict())
    other.optimizer = clone(run.optimizer)
    finish(run)
    finish(other)
    assert loss.path == expected
    assert other_loss.path == expected[done:]


# -- closed, abandoned -------------------------------------------------------------------------------------------


@every_solver
def test_closed_at_every_stop(solver: Method, capfd: pytest.CaptureFixture[str]) -> None:
    """By a budget of any size, in the middle of anything: nothing is printed, no thread stays."""
    before = threading.active_count()
    for budget in range(1, 32):
        run, _ = start(solver, budget)
        finish(run)
        assert threading.active_count() == before
    assert capfd.readouterr() == ("", "")


@every_solver
def test_closed_after_an_exception(solver: Method, capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()

    def failing(x: torch.Tensor) -> torch.Tensor:
        if left.pop():
            raise ValueError("no loss here")
        return rosenbrock(x)

    for fails in (0, 1, 5, 13):
        left = [True, *[False] * fails]
        loss = Recorded(failing)
        run, _ = start(solver, 60, loss=loss)
        with pytest.raises(ValueError, match="no loss here") as caught:
            finish(run)
        assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert threading.active_count() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("offset", [0.0, 1e12, -1e12, math.nan])
@pytest.mark.parametrize("minfunc", [1e-8, 0.0])
def test_a_swarm_is_closed_quietly_whatever_its_losses(
    offset: float, minfunc: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """An exception through pyswarm's Fortran code would print to stderr."""
    run, _ = start(
        method("pyswarm.pso", swarmsize=6, minfunc=minfunc),
        20,
        loss=Recorded(lambda x: rosenbrock(x) + offset),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finish(run)
    assert capfd.readouterr() == ("", "")


def abandon(solver: Method, times: int) -> None:
    for i in range(times):
        run, _ = start(solver, 60, seed=i)
        for _ in range(3):
            run.step()
        run.objective.close()
    gc.collect()


@every_solver
def test_abandoned_runs_leave_nothing(solver: Method, capfd: pytest.CaptureFixture[str]) -> None:
    gc.collect()
    others = [
        o for o in gc.get_objects() if type(o) is SolverRun
    ]  # what other tests of this process still hold
    abandon(solver, 50)
    threads, before = set(threading.enumerate()), resident()
    abandon(solver, 150)
    for thread in set(threading.enumerate()) - threads:  # they were told to end
        thread.join()
    # a run that stays costs 30 kB at least (its stack), 150 of them 4.5 MB
    assert resident() - before < 3e6
    known = {id(o) for o in others}
    assert not [o for o in gc.get_objects() if type(o) is SolverRun and id(o) not in known]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@every_solver
def test_a_thousand_abandoned_runs_leave_nothing(solver: Method) -> None:
    abandon(solver, 100)
    before = resident()
    abandon(solver, 1000)
    assert resident() - before < 4e6


def test_closed_optimizer_refuses() -> None:
    run, _ = start(SOLVERS["slsqp"])
    run.step()
    run.optimizer.close()
    with pytest.raises(ClosedError, match=r"scipy\.slsqp: it was closed; start it again, or load its state"):
        run.optimizer.ask()


def test_ended_optimizer_refuses() -> None:
    run, _ = start(SOLVERS["slsqp"], 500)
    while run.step() is not None:
        pass
    assert run.reason is Reason.CONVERGED
    with pytest.raises(ClosedError, match="it has ended"):
        run.optimizer.ask()


# -- exceptions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scripted(BlockingMethod):
    """Asks at 0, 1, 2, ... and does as told: the smallest solver."""

    name: ClassVar[str] = "scripted"

    questions: int = 5
    script: str = ""

    def solve(self, ask: Ask, start: Start) -> Ending:
        x = np.array(start.x0)
        told: list[float] = []
        for i in range(self.questions):
            x[:] = i  # the buffer is reused, as Fortran does
            if self.script == "populations":
                losses = ask.values(np.stack([x, x + 0.5]))
                told.append(float(losses.min()))
                losses[:] = -1  # and what it is told is written into
            else:
                told.append(ask.value(x, keep_graph=True))
            if self.script == "gradients":
                gradient = ask.gradient(x).gradient
                assert gradient is not None
                told.append(float(gradient.sum()))
                gradient[:] = -1
            if self.script == "note":
                ask.note("look out", warn=True)
        if self.script == "raise":
            raise OverflowError("the solver's own")
        if self.script == "inf":
            return Ending(Reason.CONVERGED, "found it", float(np.array(np.inf) - np.array(np.inf)), x)
        return Ending(Reason.CONVERGED, repr(told), min(told, default=0.0), x)


def parabola(x: torch.Tensor) -> torch.Tensor:
    return ((x - 3.25) ** 2).sum()


def scripted(script: str = "", questions: int = 5, budget: int = 99) -> tuple[Run, Recorded]:
    return start(Scripted(questions, script), budget, x0=[9.0], bounds=None, loss=Recorded(parabola))


def test_the_solvers_own_exception_comes_out() -> None:
    run, _ = scripted("raise")
    for _ in range(4):
        run.step()
    errors = []
    for _ in range(2):  # a retry revives it, and it fails again
        with pytest.raises(OverflowError, match="the solver's own") as caught:
            run.step()
        errors.append(caught.value)
    run.finish()
    assert errors[0] is not errors[1]


def test_interrupted_in_its_last_moments() -> None:
    """The answer was recorded, the solver then interrupted: the next question finds that it has ended."""
    run, _ = scripted()
    for _ in range(4):
        run.step()
    optimizer = run.optimizer
    assert isinstance(optimizer, SolverRun)
    answer = run.objective.answer(optimizer.ask())

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    optimizer._carrier.advance, kept = interrupted, optimizer._carrier  # type: ignore[union-attr, assignment]
    with pytest.raises(KeyboardInterrupt):
        optimizer.tell(answer)
    del kept
    with pytest.raises(ClosedError, match="it has ended"):
        optimizer.ask()
    assert optimizer.incumbent.x is not None
    run.finish()


def test_an_interrupt_inside_the_solver_loses_nothing() -> None:
    """A second Ctrl-C may strike in the solver's own code; the journal revives it."""
    strikes = {2: True, 4: True}

    @dataclass(frozen=True)
    class Struck(Scripted):
        name: ClassVar[str] = "struck"

        def solve(self, ask: Ask, start: Start) -> Ending:
            class Striking(Ask):
                def value(self, x: Any, **options: Any) -> float:
                    if strikes.pop(int(x[0]), False):
                        raise KeyboardInterrupt
                    return ask.value(x, **options)

            return super().solve(Striking(ask.question, []), start)

    run, loss = start(Struck(), 99, x0=[9.0], bounds=None, loss=Recorded(parabola))
    interrupts = 0
    while run.reason is None:
        try:
            run.step()
        except KeyboardInterrupt:
            interrupts += 1
    run.finish()
    assert interrupts == 2
    assert points(loss) == [0.0, 1.0, 2.0, 3.0, 4.0]


def points(loss: Recorded) -> list[float]:
    return [float(np.frombuffer(e.x)[0]) for e in loss.path]


def test_a_solver_without_a_question() -> None:
    run, _ = scripted(questions=0)
    with pytest.raises(StateError, match="without asking a single question"):
        run.step()
    run.finish()


@pytest.mark.parametrize("errstate", ["ignore", "warn", "raise"])
def test_the_callers_errstate_does_not_reach_the_solver(errstate: Any) -> None:
    """inf - inf in a solver is our doing (rejected losses are told as inf); it must not become an exception."""
    with np.errstate(all=errstate):
        run, _ = scripted("inf")
        finish(run)
    assert run.result().reason is Reason.CONVERGED


def test_a_solver_that_found_nothing_returns_its_start() -> None:
    run, _ = scripted("inf")
    finish(run)
    own = run.optimizer.incumbent
    assert own.x is not None
    assert own.x.tolist() == [9.0]
    assert not math.isfinite(own.loss)


def test_notes_are_told_once(recwarn: pytest.WarningsRecorder) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run, _ = scripted("note")
        for _ in range(3):
            run.step()
        in_thread(run.step)  # revived, it comes to the same note again
        finish(run)
    assert [str(w.message) for w in caught] == ["look out"]
    assert run.result().notes == ("look out",)


# -- the journal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["", "populations", "gradients"])
def test_a_solver_may_write_into_what_it_gets_and_gives(script: str) -> None:
    """It reuses its x and overwrites the answers; every question and every replay sees the true ones."""
    run, loss = scripted(script)
    finish(run)
    message = run.result().message
    for stop in range(1, 5):
        run, again = scripted(script)
        for _ in range(stop):
            run.step()
        in_thread(run.step)
        finish(run)
        assert again.path == loss.path
        assert run.result().message == message


def test_the_incumbent_is_not_the_solvers_buffer() -> None:
    run, _ = scripted()
    with run:
        for _ in range(4):
            run.step()
        run.optimizer.ask()  # the solver has moved its x on to 4
        own = run.optimizer.incumbent
        assert own.x is not None
        assert (own.loss, own.x.tolist()) == (0.0625, [3.0])


def saved(steps: int, solver: Method | None = None) -> tuple[dict[str, Any], Recorded]:
    run, loss = start(solver or SOLVERS["annealing_none"], 60)
    for _ in range(steps):
        run.step()
    state = run.state_dict()
    run.finish()
    return state, loss


def test_another_path_is_a_mismatch_that_names_question_and_change(monkeypatch: pytest.MonkeyPatch) -> None:
    state, _ = saved(20)
    state["optimizer"]["journal"]["digests"][12] += 1
    state["optimizer"]["fingerprint"]["scipy"] = "0.9"
    state["optimizer"]["fingerprint"]["torch_threads"] = "64"
    run, loss = start(SOLVERS["annealing_none"])
    run.load_state_dict(state)
    with pytest.raises(ReplayMismatch) as caught:
        run.step()
    text = str(caught.value)
    assert "scipy.dual_annealing: question 13 of 20 differs" in text
    assert "scipy '0.9' -> " in text
    assert "torch_threads '64' -> '1'" in text
    assert "exact=False" in text
    assert loss.path == []
    run.finish()


def test_a_change_that_nothing_records_is_said_so() -> None:
    state, _ = saved(20)
    state["optimizer"]["journal"]["digests"][0] += 1
    run, _ = start(SOLVERS["annealing_none"])
    run.load_state_dict(state)
    with pytest.raises(ReplayMismatch, match=r"question 1 of 20.*none of the versions"):
        run.step()
    run.finish()


@pytest.mark.parametrize("question", [0, 19])
def test_a_mismatch_loses_nothing(question: int) -> None:
    """The optimizer still has its best point and its journal, and can be saved again."""
    state, _ = saved(20)
    state["optimizer"]["journal"]["digests"][question] += 1
    run, _ = start(SOLVERS["annealing_none"])
    run.load_state_dict(state)
    with pytest.raises(ReplayMismatch):
        run.step()
    assert run.optimizer.incumbent.loss == state["optimizer"]["incumbent"][0]
    again = run.state_dict()["optimizer"]
    assert torch.equal(again["journal"]["digests"], state["optimizer"]["journal"]["digests"])
    assert again["incumbent"][1].tolist() == state["optimizer"]["incumbent"][1].tolist()
    run.finish()


@pytest.mark.parametrize("question", [0, 7, 19])
@every_solver
def test_inexact_resume_starts_anew_from_the_best(solver: Method, question: int) -> None:
    state, before = saved(20, solver)
    entries = len(state["optimizer"]["journal"]["digests"])
    state["optimizer"]["journal"]["digests"][min(question, entries - 1)] += 1
    run, loss = start(solver, 90)
    run.load_state_dict(state, exact=False)
    run.step()
    best_loss, best_x = state["optimizer"]["incumbent"]
    optimizer = run.optimizer
    assert isinstance(optimizer, SolverRun)
    assert optimizer.start.x0.tolist() == best_x.tolist()
    assert optimizer.incumbent.loss <= best_loss
    assert len(run.optimizer.notes) == 1
    assert "started anew from the best point" in run.optimizer.notes[0]
    done = len(before.path)
    finish(run)
    result = run.result()
    assert result.evaluations == done + len(loss.path) <= 90
    assert result.best_loss <= before.best
    assert any("started anew" in note for note in result.notes)


def test_a_solver_that_ends_before_its_journal_does() -> None:
    run, _ = scripted()
    for _ in range(4):
        run.step()
    state = run.optimizer.state_dict()
    run.finish()
    state["method"] = str(Scripted(3))
    other, _ = scripted(questions=3)
    other.optimizer.load_state_dict(state)
    with pytest.raises(ReplayMismatch, match=r"question 4 of 4 differs.*the solver ended"):
        other.step()
    other.finish()


def test_changed_options_are_refused() -> None:
    state, _ = saved(5, method("slsqp(ftol=1e-6)"))
    run, _ = start(method("slsqp(ftol=1e-3)"))
    with pytest.raises(StateError, match=r"saved by 'scipy.slsqp'.*this.* 'scipy.slsqp\(ftol=0.001\)'"):
        run.load_state_dict(state)
    with pytest.raises(StateError, match="with the options it began with"):
        run.optimizer.load_state_dict(state["optimizer"])
    run.finish()


def test_a_state_names_what_a_replay_depends_on() -> None:
    for solver, library in (("slsqp", "scipy"), ("pyswarm.pso", "pyswarm"), ("cma.cmaes", "cma")):
        state, _ = saved(2, SOLVERS[solver])
        assert {"torch", "numpy", "torch_threads", "cpu_capability", library} <= set(
            state["optimizer"]["fingerprint"]
        )


def test_the_journal_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past it the run goes on, says once that it can no longer be resumed exactly, and can be resumed inexactly."""
    expected = whole(SOLVERS["annealing_none"], 60)
    monkeypatch.setattr("hybridopt.solver.JOURNAL_LIMIT", 500)
    run, loss = start(SOLVERS["annealing_none"], 60)
    for _ in range(20):
        run.step()
    with pytest.warns(RuntimeWarning, match="the journal passed 500 bytes") as caught:
        run.step()
    for _ in range(9):
        run.step()
    assert len(caught) == 1
    state = run.state_dict()
    clone = copy.deepcopy(run.optimizer)
    finish(run)
    assert loss.path == expected

    with pytest.raises(ReplayMismatch, match="journal was dropped"):
        clone.ask()
    fresh, _ = start(SOLVERS["annealing_none"], 60)
    with pytest.raises(StateError, match="exact resume is impossible; load with exact=False"):
        fresh.load_state_dict(state)
    fresh.load_state_dict(state, exact=False)
    assert fresh.step() is not None
    assert "its journal had grown too large" in fresh.optimizer.notes[0]
    best_loss, best_x = state["optimizer"]["incumbent"]
    optimizer = fresh.optimizer
    assert isinstance(optimizer, SolverRun)
    assert optimizer.start.x0.tolist() == best_x.tolist()
    assert optimizer.incumbent.loss == best_loss

    monkeypatch.setattr("hybridopt.solver.JOURNAL_LIMIT", 2**30)
    small, _ = saved(5)
    clone.load_state_dict(small["optimizer"])  # a full journal is forgotten with the state it belonged to
    assert clone.ask().x is not None
    clone.close()
    fresh.finish()


def test_an_ended_run_without_a_journal_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = start(SOLVERS["slsqp"], 500)
    monkeypatch.setattr("hybridopt.solver.JOURNAL_LIMIT", 500)
    with pytest.warns(RuntimeWarning, match="the journal passed"):
        finish(run)
    state = run.state_dict()
    assert state["optimizer"]["journal"] is None
    fresh, _ = start(SOLVERS["slsqp"], 500)
    fresh.optimizer.load_state_dict(state["optimizer"])
    assert fresh.optimizer.incumbent.loss == run.result().loss
    fresh.finish()


# -- before it starts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, n, way_out",
    [
        ("slsqp", 200_000, r"fewer weights \(select="),
        ("cma.cmaes", 200_000, "diagonal=True"),
        ("pyswarm.pso(maxiter=1_000_000_000)", 3, "lower maxiter"),
        ("adam > slsqp", 200_000, r"fewer weights \(select="),
    ],
)
def test_memory_is_checked_before_it_is_taken(text: str, n: int, way_out: str) -> None:
    vector = ParameterVector(torch.zeros(n), bounds=(-1, 1))
    before = resident()
    with pytest.raises(MemoryLimit, match=rf"GiB \(\d+ bytes\) for {n} weights.*{way_out}"):
        method(text).start(vector, 0)
    assert resident() - before < 5e7


def test_diagonal_cmaes_needs_little() -> None:
    vector = ParameterVector(torch.zeros(200_000))
    method("cma.cmaes(diagonal=True)").start(vector, 0).close()


def test_a_method_without_bounds_refuses_them() -> None:
    vector = ParameterVector(torch.zeros(2), bounds=(-1, 1))
    with pytest.raises(StateError, match="cannot keep within bounds"):
        NelderMead().start(vector, 0)
