"""Chains: each stage from the best point so far, under limits of its own, itself an optimizer."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hybridopt
from hybridopt import (
    Chain,
    Cycle,
    Method,
    MultiStart,
    Portfolio,
    Race,
    Reason,
    Restart,
    Run,
    Split,
    Stage,
    method,
)
from hybridopt.errors import BoundsError, ClosedError, MemoryLimit, MethodError, StateError
from hybridopt.optimizer import HandOver, Need
from hybridopt.randomness import derive_seed
from tests.driving import BOX, SOLVERS, Evaluation, Recorded, rosenbrock, start, whole

X0 = [-1.2, 1.0, 0.3]


def finish(run: Run) -> Any:
    with run:
        for _ in run:
            pass
    return run.result()


def run_chain(text: str | Method, budget: Any = 200, **options: Any) -> tuple[Any, Recorded]:
    run, loss = start(method(text), budget, **options)
    return finish(run), loss


def points(path: list[Evaluation]) -> list[list[float]]:
    return [np.frombuffer(e.x).tolist() for e in path]


def best_point(path: list[Evaluation]) -> list[float]:
    best = min(path, key=lambda e: float.fromhex(e.loss))
    return np.frombuffer(best.x).tolist()  # type: ignore[no-any-return]


# -- laws --------------------------------------------------------------------------------------------------------

ONE = {**SOLVERS, "adam": method("torch.adam(lr=0.1)"), "lbfgs": method("torch.lbfgs")}


@pytest.mark.parametrize("name", ONE)
def test_a_chain_of_one_is_the_method(name: str) -> None:
    alone = whole(ONE[name], 50)
    bounds = None if name == "nelder_mead" else BOX
    assert whole(Chain([ONE[name]]), 50, bounds=bounds) == alone
    assert whole(ONE[name].limit(evaluations=50), 500, bounds=bounds) == alone[:50]
    run, _ = start(ONE[name], 50)
    chain, _ = start(Chain([ONE[name]]), 50, bounds=bounds)
    plain, chained = finish(run), finish(chain)
    assert (plain.loss, plain.best_loss, plain.reason, plain.evaluations, plain.forward_equivalents) == (
        chained.loss, chained.best_loss, chained.reason, chained.evaluations, chained.forward_equivalents
    )  # fmt: skip


def test_chains_of_chains_are_flat() -> None:
    a, b, c = method("pyswarm.pso"), method("cma.cmaes(evaluations=9)"), method("slsqp")
    assert (
        (a >> b) >> c
        == a >> (b >> c)
        == Chain([a, b, c])
        == Chain([Chain([a]), Chain([Stage(Chain([b, c]))])])
    )
    assert hash((a >> b) >> c) == hash(a >> (b >> c))
    assert len(((a >> b) >> (c >> a)).stages) == 4  # type: ignore[attr-defined]
    assert str((a >> b) >> c) == "pyswarm.pso > cma.cmaes(evaluations=9) > scipy.slsqp"
    limited = (a >> b).limit(evaluations=20) >> c
    assert len(limited.stages) == 2  # type: ignore[attr-defined]
    assert str(limited) == "(pyswarm.pso > cma.cmaes(evaluations=9))(evaluations=20) > scipy.slsqp"
    assert method(str(limited)) == limited


def test_a_group_without_an_effective_limit_changes_nothing() -> None:
    """A limit that is never reached leaves the path as it is, one level deeper (only the derived seeds differ)."""
    flat, _ = run_chain("cma.cmaes(evaluations=15) > slsqp")
    deep, _ = run_chain("(cma.cmaes(evaluations=15))(evaluations=1000) > (slsqp)(steps=1000)")
    assert (flat.best_loss, flat.evaluations, flat.forward_equivalents) == (
        deep.best_loss,
        deep.evaluations,
        deep.forward_equivalents,
    )


def test_needs_are_those_of_its_parts() -> None:
    chain = method("pyswarm.pso(evaluations=9) > (torch.adam > slsqp)(steps=5)")
    assert chain.needs == {Need.BOUNDS, Need.GRADIENT}
    assert Need.GRADIENT in chain.uses
    assert method("slsqp > cma.cmaes").needs == frozenset()
    for again in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert (again, again.needs) == (chain, chain.needs)


# -- limits ------------------------------------------------------------------------------------------------------


def test_stage_budgets_are_exact() -> None:
    result, loss = run_chain(
        "cma.cmaes(evaluations=55) > pyswarm.pso(swarmsize=6, evaluations=44) > slsqp(evaluations=20)", 500
    )
    assert [s.spent["evaluations"] for s in result.stages] == [55, 44, 20]
    assert [s.reason for s in result.stages] == [Reason.EVALUATIONS] * 3
    assert result.evaluations == len(loss.path) == 119
    assert result.reason is Reason.EVALUATIONS
    # both populations were cut in the middle: the rows that fit were evaluated, and count for the best
    assert 55 % 7
    assert 44 % 6
    assert [s.best_loss for s in result.stages] == [
        min(float.fromhex(e.loss) for e in part)
        for part in (loss.path[:55], loss.path[55:99], loss.path[99:])
    ]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 12.5, 30])
def test_stage_forward_equivalents_are_never_exceeded(limit: float) -> None:
    result, _ = run_chain(f"slsqp(forward_equivalents={limit}) > cma.cmaes(evaluations=8)", 500)
    first = result.stages[0]
    assert limit - 3 < first.spent["forward_equivalents"] <= limit
    assert first.reason is Reason.FORWARD_EQUIVALENTS
    assert result.stages[1].spent["forward_equivalents"] == 8


def test_a_stage_that_can_afford_nothing_is_passed_over() -> None:
    result, loss = run_chain("torch.adam(forward_equivalents=2) > slsqp(evaluations=5)")
    assert [s.spent["evaluations"] for s in result.stages] == [0, 5]
    assert points(loss.path)[0] == X0


def test_stage_steps() -> None:
    result, loss = run_chain("cma.cmaes(popsize=5, steps=3) > torch.adam(lr=0.1, steps=4) > slsqp(steps=2)")
    assert [s.spent["evaluations"] for s in result.stages] == [15, 4, 2]
    assert [s.reason for s in result.stages] == [Reason.STEPS] * 3
    assert result.steps == 9
    assert result.reason is Reason.STEPS


def test_stage_target() -> None:
    result, loss = run_chain("torch.adam(lr=0.1, target=20) > cma.cmaes(target=5) > slsqp(ftol=1e-12)", 5000)
    values = [float.fromhex(e.loss) for e in loss.path]
    first, second = (s.spent["evaluations"] for s in result.stages[:2])
    assert [s.reason for s in result.stages] == [Reason.TARGET, Reason.TARGET, Reason.CONVERGED]
    assert min(values[:first]) <= 20 < min(values[: first - 1])
    assert min(values[first : first + second]) <= 5
    assert result.reason is Reason.CONVERGED


def test_the_runs_own_target_ends_the_chain() -> None:
    result, loss = run_chain("torch.adam(lr=0.1, steps=500) > slsqp", {"evaluations": 500, "target": 20})
    assert result.reason is Reason.TARGET
    assert len(result.stages) == 1
    assert float.fromhex(loss.path[-1].loss) <= 20


def test_nested_limits_hold_at_every_level() -> None:
    inner = "(pyswarm.pso(swarmsize=5, evaluations=12) > torch.adam(lr=0.1, evaluations=30))(evaluations=22)"
    result, loss = run_chain(f"({inner} > cma.cmaes)(forward_equivalents=60) > slsqp(evaluations=4)", 5000)
    outer, last = result.stages
    assert outer.spent["forward_equivalents"] == 60  # 12 + 10 * 3 + 18 * 1
    assert outer.spent["evaluations"] == 12 + 10 + 18
    assert outer.reason is Reason.FORWARD_EQUIVALENTS
    assert last.spent["evaluations"] == 4
    assert result.evaluations == len(loss.path) == 44


@pytest.mark.parametrize("budget", [1, 12, 13, 22, 23, 40, 41, 44])
def test_the_runs_own_budget_cuts_any_stage(budget: int) -> None:
    inner = "(pyswarm.pso(swarmsize=5, evaluations=12) > torch.adam(lr=0.1, evaluations=30))(evaluations=22)"
    text = f"({inner} > cma.cmaes)(forward_equivalents=60) > slsqp(evaluations=4)"
    _, long = run_chain(text, 5000)
    result, loss = run_chain(text, budget)
    assert loss.path == long.path[:budget]
    assert result.evaluations == budget
    assert result.best_loss == loss.best


def test_a_stage_that_ends_by_itself_leaves_its_budget_to_the_rest() -> None:
    result, _ = run_chain("slsqp(evaluations=400) > cma.cmaes(evaluations=10)", 5000)
    assert result.stages[0].reason is Reason.CONVERGED
    assert result.stages[0].message == "Optimization terminated successfully"
    assert result.stages[0].spent["evaluations"] < 100
    assert result.stages[1].reason is Reason.EVALUATIONS


# -- handing over ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["cma.cmaes", "pyswarm.pso(swarmsize=6)", "dual_annealing", "torch.adam(lr=0.3)",
                                   "torch.lbfgs", "slsqp(gradients=differences)"])  # fmt: skip
@pytest.mark.parametrize("second", ["slsqp", "torch.adam", "torch.lbfgs", "dual_annealing"])
def test_each_stage_starts_at_the_best_point_so_far(first: str, second: str) -> None:
    """Probes count: whatever was evaluated and was the lowest."""
    _, loss = run_chain(method(first).limit(evaluations=25) >> method(second).limit(evaluations=3), 500)
    assert len(loss.path) == 28
    assert points(loss.path)[25] == best_point(loss.path[:25])


def test_a_stage_that_finds_nothing_better_hands_on_what_it_was_given() -> None:
    calls: list[int] = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return rosenbrock(x) + (100.0 if 10 < len(calls) <= 30 else 0.0)

    _, seen = run_chain(
        "cma.cmaes(evaluations=10) > pyswarm.pso(evaluations=20, swarmsize=5) > slsqp",
        40,
        loss=Recorded(loss),
    )
    assert points(seen.path)[30] == best_point(seen.path[:10])


@pytest.mark.parametrize(
    ("dark", "after"),
    [("pyswarm.pso(evaluations=10, swarmsize=5)", 20), ("torch.adam", 11), ("torch.lbfgs", 11)],
)
def test_a_stage_without_a_finite_loss_hands_on_what_it_was_given(dark: str, after: int) -> None:
    """A method that follows gradients does not ask twice for the first one."""
    calls: list[int] = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return rosenbrock(x) * (math.nan if 10 < len(calls) <= after else 1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, seen = run_chain(f"cma.cmaes(evaluations=10) > {dark} > slsqp", 40, loss=Recorded(loss))
    assert points(seen.path)[after] == best_point(seen.path[:10])


def test_a_first_stage_without_a_finite_loss_hands_on_the_start() -> None:
    calls: list[int] = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return rosenbrock(x) * (math.nan if len(calls) <= 10 else 1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, seen = run_chain("pyswarm.pso(evaluations=10, swarmsize=5) > slsqp", 40, loss=Recorded(loss))
    assert points(seen.path)[10] == X0


def test_a_handed_over_point_is_the_chains_best_until_it_is_beaten() -> None:
    chain = method("pyswarm.pso(swarmsize=4, evaluations=8) > slsqp(evaluations=1)")
    objective = hybridopt.Objective(rosenbrock, torch.tensor(X0, dtype=torch.float64), 100, bounds=BOX)
    optimum = np.ones(3)
    run = chain.start(objective.vector, 3, HandOver(optimum, 0.0))
    with objective:
        for _ in range(8):
            hybridopt.step(run, objective)
        assert run.ask().x is not None
        last = hybridopt.step(run, objective)
        run.close()
    assert last.loss == 0.0  # slsqp began at the optimum handed over, not at the swarm's best
    assert last.reason is Reason.EVALUATIONS or last.reason is None


@pytest.mark.parametrize("second", ["slsqp", "pyswarm.pso", "torch.adam", "torch.lbfgs"])
def test_the_incumbent_between_two_stages(second: str) -> None:
    """A run that stops when a stage has begun but evaluated nothing returns the point which that would start from."""
    result, loss = run_chain(f"torch.adam(lr=0.1, steps=5) > {second}", 5)
    assert len(result.stages) == 2
    assert result.stages[1].spent["evaluations"] == 0
    assert result.loss == result.best_loss == loss.best
    assert result.x.tolist() == best_point(loss.path)


def test_a_noisy_loss_is_handed_on_where_the_method_stands() -> None:
    """The lowest of noisy losses is a lucky draw, not the best point."""
    seen: list[list[float]] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(x.tolist())
        return (x**2).sum() + torch.randn((), dtype=torch.float64)

    x = torch.ones(2, dtype=torch.float64)
    hybridopt.minimize(loss, x, "torch.sgd(lr=0.1, steps=10) > torch.sgd(lr=0.0)", budget=11, seed=0)
    assert seen[10] == pytest.approx([0.8**10] * 2)


def test_seeds_of_stages() -> None:
    """The first stage has the chain's own seed, so that a chain of one is the method; later ones have derived ones."""
    run, _ = start(method("cma.cmaes(evaluations=7) > cma.cmaes(evaluations=7) > cma.cmaes"), 30, seed=11)
    seeds: dict[int, int] = {}
    with run:
        for _ in run:
            state = run.optimizer.state_dict()
            seeds[state["index"]] = state["child"]["start"]["seed"]
    assert seeds == {0: 11, 1: derive_seed(11, 1), 2: derive_seed(11, 2)}
    assert len(set(seeds.values())) == 3


# -- before it starts, after it ends -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, error",
    [
        ("torch.adam(evaluations=50) > pyswarm.pso", BoundsError),
        ("torch.adam(evaluations=50) > (slsqp > dual_annealing)(steps=9)", BoundsError),
        ("torch.adam(evaluations=50) > pyswarm.pso(maxiter=1_000_000_000)", MemoryLimit),
        ("slsqp > torch.adam(lr=-1.0)", MethodError),
    ],
)
def test_what_cannot_begin_is_refused_before_anything_is_spent(text: str, error: type[Exception]) -> None:
    loss = Recorded()
    bounds = BOX if error is MemoryLimit else None
    with pytest.raises(error):
        start(method(text), 200, loss=loss, bounds=bounds)
    assert loss.path == []


def test_stage_reports_tell_what_happened() -> None:
    run, _ = start(method("cma.cmaes(popsize=5, steps=2) > slsqp"), 500)
    for _ in range(4):
        run.step()
    first, second = run.optimizer.reports
    assert (first.method, first.reason) == ("cma.cmaes(popsize=5, steps=2)", Reason.STEPS)
    assert (second.method, second.reason, second.spent["evaluations"]) == ("scipy.slsqp", None, 2)
    result = finish(run)
    assert [s.reason for s in result.stages] == [Reason.STEPS, Reason.CONVERGED]
    assert result.evaluations == sum(s.spent["evaluations"] for s in result.stages)


def test_notes_of_all_stages() -> None:
    def loss(x: Tensor) -> Tensor:
        return rosenbrock(x).detach()

    result, _ = run_chain(
        "slsqp(evaluations=9) > cma.cmaes(evaluations=9) > dual_annealing", 90, loss=Recorded(loss)
    )
    assert len([n for n in result.notes if "autograd refused" in n]) == 1  # of both stages, said once


def test_ended_and_closed() -> None:
    run, _ = start(method("cma.cmaes(evaluations=7) > slsqp(steps=1)"), 500)
    while run.step() is not None:
        pass
    with pytest.raises(ClosedError, match="it has ended or was closed"):
        run.optimizer.ask()
    run.finish()


@pytest.mark.parametrize(
    "other", ["cma.cmaes(evaluations=8) > slsqp", "cma.cmaes(evaluations=7) > slsqp(ftol=1e-9)"]
)
def test_changed_stages_are_refused(other: str) -> None:
    run, _ = start(method("cma.cmaes(evaluations=7) > slsqp"), 50)
    run.step()
    fresh, _ = start(method(other), 50)
    with pytest.raises(StateError, match="it was saved by"):
        fresh.optimizer.load_state_dict(run.optimizer.state_dict())
    run.finish()
    fresh.finish()


def test_a_run_copied_in_its_second_stage() -> None:
    text = method("cma.cmaes(evaluations=17) > dual_annealing")
    expected = whole(text, 60)
    run, loss = start(text, 60)
    for _ in range(30):
        run.step()
    done = len(loss.path)
    other, other_loss = start(text, 60)
    other.load_state_dict(run.state_dict())
    other.optimizer = copy.deepcopy(run.optimizer)
    finish(run)
    assert loss.path == expected
    # a copied chain has copied ledgers: the new run's are told apart by identity, so it is driven as it is
    finish(other)
    assert other_loss.path == expected[done:]


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Chain(("slsqp > adam", "pso")), "slsqp > adam > pso"),
        (lambda: method("slsqp") >> "adam > pso", "slsqp > adam > pso"),
        (lambda: Stage("slsqp", steps=3), "slsqp(steps=3)"),
        (lambda: Cycle("slsqp > pso", rounds=2), "cycle(slsqp > pso, rounds=2)"),
        (lambda: Restart("cmaes(popsize=4)", grow="popsize"), "restart(cmaes(popsize=4), grow=popsize)"),
        (lambda: MultiStart(torch.optim.Adam, starts=3), "multistart(torch.adam, starts=3)"),
        (lambda: Race(("slsqp", "cmaes(steps=2)")), "race(slsqp, cmaes(steps=2))"),
        (lambda: Portfolio(name for name in ("slsqp", "cmaes")), "portfolio(slsqp, cmaes)"),
        (lambda: Split({"a": "slsqp", "...": "adam"}), 'split("a": slsqp, "...": adam)'),
    ],
)
def test_what_stands_for_a_method_is_read_wherever_one_is_taken(make: Any, text: str) -> None:
    assert make() == method(text)
    assert hash(make()) == hash(method(text))


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Chain([]), "chain: expected at least one stage"),
        (lambda: Chain("slsqp"), "chain: expected several methods, .* got 'slsqp'"),  # type: ignore[arg-type]
        (lambda: Stage(3), "expected text, a class or a Method, got 3"),  # type: ignore[arg-type]
        (lambda: Cycle(3), "expected text, a class or a Method, got 3"),  # type: ignore[arg-type]
        (lambda: Restart(3), "expected text, a class or a Method, got 3"),  # type: ignore[arg-type]
        (lambda: Split({"a": 3}), "expected text, a class or a Method, got 3"),
        (lambda: Split({3: "adam"}), "split: expected a pattern and a method, got 3: 'adam'"),
        (lambda: method("slsqp").limit(steps=0), "stage: expected steps >= 1, got 0"),
        (
            lambda: method("slsqp").limit(steps=True),
            "stage: expected steps to be a whole number or None, got True",
        ),
    ],
)
def test_wrong_stages(make: Any, text: str) -> None:
    with pytest.raises(MethodError, match=text):
        make()


@pytest.mark.parametrize("last", ["adam(lr=0.01)", "torch.lbfgs"])
def test_one_loss_that_is_not_finite_where_a_stage_begins_does_not_end_the_run(last: str) -> None:
    calls: list[int] = []

    def loss(x: Tensor) -> Tensor:
        calls.append(1)
        return rosenbrock(x) * (math.nan if len(calls) == 41 else 1.0)

    weights = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="counted"):
        result = hybridopt.minimize(
            loss, weights, f"cmaes(evaluations=40) > {last}", budget=120, seed=0, batch="loop"
        )
    assert result.evaluations > 60
    assert result.nonfinite == 1
