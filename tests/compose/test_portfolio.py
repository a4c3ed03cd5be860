"""Portfolios: the turn goes to who lowers the loss, else to who has had the least; the best point is shared."""

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
from hybridopt import Method, Portfolio, Reason, Run, method
from hybridopt.errors import MethodError, NonFiniteLoss, StateError
from hybridopt.optimizer import HandOver, Need
from hybridopt.randomness import derive_seed
from hybridopt.testing import OptimizerContract
from tests.driving import BOX, SOLVERS, Recorded, rosenbrock, start, whole

MIXED = "portfolio(slsqp(ftol=1e-12), cma.cmaes, torch.adam(lr=0.1), pyswarm.pso(swarmsize=6), turn=15)"


def finish(run: Run) -> Any:
    with run:
        for _ in run:
            pass
    return run.result()


def portfolio(text: str | Method, budget: Any = 200, **options: Any) -> tuple[Any, Recorded]:
    run, loss = start(method(text), budget, **options)
    return finish(run), loss


def spent(result: Any) -> list[int]:
    return [stage.spent["evaluations"] for stage in result.stages]


class Heard:
    """Listens: which member evaluated what, in order."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.path: list[tuple[str, list[float], float]] = []
        run.objective.listeners.append(self)

    def evaluated(self, ledger: Any, scopes: Any, loss: float, probe: bool) -> None:
        self.path.append((scopes[0].label, self.run.objective.vector.read().tolist(), loss))

    def turns(self) -> list[tuple[str, int]]:
        """Who had the turn, and how many evaluations."""
        found: list[tuple[str, int]] = []
        for label, _, _ in self.path:
            if found and found[-1][0] == label:
                found[-1] = (label, found[-1][1] + 1)
            else:
                found.append((label, 1))
        return found


def rising() -> Recorded:
    """A loss that is a little higher at each call: nobody ever wins but with the first one."""
    calls: list[int] = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return x.sum() * 0 + float(len(calls))

    return Recorded(loss)


# -- laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_a_portfolio_of_one_is_the_method(name: str) -> None:
    bounds = None if name == "nelder_mead" else BOX
    assert whole(Portfolio((SOLVERS[name],), turn=7), 50, bounds=bounds) == whole(SOLVERS[name], 50)


@pytest.mark.parametrize("budget", [1, 7, 33, 90, 160])
def test_the_runs_budget_cuts_it_anywhere(budget: int) -> None:
    _, long = portfolio(MIXED, 200)
    result, loss = portfolio(MIXED, budget)
    assert loss.path == long.path[:budget]
    assert result.evaluations == budget
    assert result.best_loss == loss.best


# -- who has the turn --------------------------------------------------------------------------------------------


def bowl(x: Tensor) -> Tensor:
    return (x**2).sum()


def test_who_lowers_the_loss_goes_on() -> None:
    """Small steps of Adam lower it in every turn, so the other one has none, or what was lost before."""
    result, _ = portfolio("portfolio(torch.adam(lr=0.001), cmaes, turn=30)", 100, loss=Recorded(bowl))
    assert spent(result) == [100, 0]
    flat = "random_search(popsize=1, evaluations=10)"
    result, _ = portfolio(f"portfolio({flat}, torch.adam(lr=0.001), cmaes, turn=10)", 90, loss=Recorded(bowl))
    assert spent(result) == [10, 80, 0]


def test_equal_turns_first_then_four_fifths_for_the_better() -> None:
    """Each is worth ten turns; of what follows the better one has four times as much.

    The first loss of all wins the first turn, so two are in a row, of a generation more (the start is evaluated too);
    then the other one has less until it has had three.
    """
    run, _ = start(
        method("portfolio(random_search(popsize=3), pso(swarmsize=3), turn=6)"), 420, loss=rising()
    )
    heard = Heard(run)
    result = finish(run)
    assert [count for _, count in heard.turns()][:28] == [13, 18, *[6] * 16, *[24, 6] * 5]
    assert [s - 60 for s in spent(result)] == [240, 60]


def test_a_turn_is_a_whole_step() -> None:
    result, _ = portfolio("portfolio(cma.cmaes, cma.cmaes(sigma=1.0), turn=1)", 21, loss=rising())
    assert spent(result) == [14, 7]


@pytest.mark.parametrize("n, turn", [(3, 20), (20, 105)])
def test_the_default_turn(n: int, turn: int) -> None:
    text = "portfolio(random_search(popsize=1), random_search(popsize=1))"
    run, _ = start(method(text), 5 * turn, x0=[0.5] * n, loss=rising())
    result = finish(run)
    assert spent(result) == [3 * turn, 2 * turn]


# -- what they share ---------------------------------------------------------------------------------------------


def test_who_has_not_begun_begins_at_the_best_point() -> None:
    run, _ = start(method("portfolio(torch.adam(lr=0.1, steps=20), slsqp, cmaes, turn=9)"), 120)
    heard = Heard(run)
    result = finish(run)
    first = [(x, loss) for label, x, loss in heard.path if label.startswith("torch.adam")]
    begun = next(x for label, x, _ in heard.path if label == "scipy.slsqp")
    assert begun == min(first, key=lambda point: point[1])[0] != first[0][0]
    assert result.stages[1].received.startswith("point")


def test_what_is_handed_over_can_be_the_point_alone() -> None:
    def received(member: str) -> str:
        result, _ = portfolio(f"portfolio(cmaes(evaluations=40), {member}, turn=9)", 150)
        return str(result.stages[1].received)

    assert received("lq_cmaes").startswith("point, sigma")
    assert received("lq_cmaes(handover=point)") == "point"


def waves(x: Tensor) -> Tensor:
    return (x**2 - 10 * torch.cos(2 * math.pi * x) + 10).sum()


def test_who_rests_begins_again_where_another_one_lowered_the_loss() -> None:
    """SLSQP ends in a minimum of many; random points find a lower place, and SLSQP the minimum there."""
    text = "portfolio(slsqp, random_search(popsize=5), turn=10)"
    run, _ = start(method(text), 600, loss=Recorded(waves), x0=[1.9, 1.9], seed=2)
    heard = Heard(run)
    result = finish(run)
    lowest, won, again = math.inf, None, []
    for (label, x, loss), before in zip(heard.path, [("", [], 0.0), *heard.path], strict=False):
        if label == "scipy.slsqp" and before[0] != label:
            again.append((x, won))
        if loss < lowest:
            lowest, won = loss, x
    assert len(again) >= 3
    assert again[0][0] == [1.9, 1.9]
    assert all(x == won for x, won in again[1:])
    assert f"begun {len(again)} times" in result.notes[-1]


@pytest.mark.parametrize("cut", [40, 80, 140])
@pytest.mark.parametrize("first", ["slsqp, slsqp(ftol=1e-3)", "restart(slsqp, restarts=1, sigma=0.1)"])
def test_who_rests_is_saved(first: str, cut: int) -> None:
    """With what it knew and how often it began: it begins again at the same moments, with the same seeds."""
    text = f"portfolio({first}, random_search(popsize=1), turn=10)"
    options: dict[str, Any] = {"x0": [1.9, 1.9], "seed": 2}
    run, loss = start(method(text), 400, loss=Recorded(waves), **options)
    assert finish(run).notes[-1].count("begun") >= 1
    run, first = start(method(text), 400, loss=Recorded(waves), **options)
    for _ in range(cut):
        run.step()
    state = run.state_dict()
    run.finish()
    run, rest = start(method(text), 400, loss=Recorded(waves), **options)
    run.load_state_dict(state)
    finish(run)
    assert first.path + rest.path == loss.path


def test_who_ended_by_its_own_limit_does_not_begin_again() -> None:
    text = "portfolio(slsqp(evaluations=3), random_search(popsize=5), turn=10)"
    result, _ = portfolio(text, 400, loss=Recorded(waves), x0=[1.9, 1.9], seed=2)
    assert spent(result) == [3, 397]
    assert result.stages[0].reason is Reason.EVALUATIONS


def test_it_ends_when_all_rest() -> None:
    result, loss = portfolio("portfolio(slsqp(ftol=1e-3), slsqp(ftol=1e-13), turn=20)", 5000)
    assert result.reason is Reason.CONVERGED
    assert result.evaluations < 500
    assert min(spent(result)) > 0
    assert result.loss == result.best_loss == loss.best < 1e-12


def test_the_seeds() -> None:
    """The first has the portfolio's; who begins later at another one's point one of its place."""
    text = "portfolio(random_search(popsize=2), random_search(popsize=3), turn=4)"
    run, _ = start(method(text), 40, seed=5, loss=rising())
    heard = Heard(run)
    finish(run)
    found = {label: [x for who, x, _ in heard.path if who == label] for label, _ in heard.turns()}
    for label, seed, known in zip(found, (5, derive_seed(5, 1, 0)), (0, 1), strict=True):
        alone, loss = start(method(label), 9, seed=seed)
        finish(alone)
        path = [np.frombuffer(e.x).tolist() for e in loss.path]
        assert found[label][: 9 - known] == path[known:]  # the loss at a point handed over is known


# -- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_start_that_is_not_finite() -> None:
    """Who cannot begin there begins where another one found a finite loss; if nobody does it is an error."""

    def loss(x: Tensor) -> Tensor:
        return rosenbrock(x) * (math.nan if x.tolist() == [-1.2, 1.0, 0.3] else 1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, _ = portfolio("portfolio(slsqp, cmaes, turn=20)", 300, loss=Recorded(loss))
        assert result.stages[0].spent["evaluations"] > 1
        assert result.best_loss < 1e-6
        with pytest.raises(NonFiniteLoss, match=r"one of its methods at least; .*cannot begin here"):
            portfolio("portfolio(slsqp, torch.adam)", 300, loss=Recorded(loss))


def test_points_that_break_constraints_win_nothing() -> None:
    """Lower losses at points that break them are worth less than higher ones at points that keep them."""
    x = torch.zeros(2, dtype=torch.float64)
    text = "portfolio(slsqp, scipy.cobyqa, turn=10)"
    result = hybridopt.minimize(bowl, x, text, budget=200, seed=0, constraints=lambda x: x.sum() - 1)
    assert result.best_loss == pytest.approx(0.5, abs=1e-6)
    assert result.violation < 1e-6


def test_noise() -> None:
    """No lowest loss is kept; the run names a point all the same, and is the same again."""

    def loss(x: Tensor) -> Tensor:
        return rosenbrock(x) + 0.1 * torch.randn(())

    paths = []
    for _ in range(2):
        recorded = Recorded(loss)
        result, _ = portfolio("portfolio(slsqp, cmaes, turn=20)", 300, loss=recorded)
        paths.append(recorded.path)
        assert math.isfinite(result.loss)
    assert paths[0] == paths[1]


# -- the value ---------------------------------------------------------------------------------------------------


def test_the_point_is_the_best_of_all() -> None:
    """Also just after its finder began again elsewhere, or another one has the turn."""
    run, loss = start(method(MIXED), 300)
    for _ in range(120):
        run.step()
        assert run.optimizer.incumbent.loss == loss.best or len(loss.path) < 10
    run.finish()


def test_it_is_handed_on_within_a_chain() -> None:
    text = "torch.adam(lr=0.1, steps=10) > (portfolio(cma.cmaes, torch.adam(lr=0.1), turn=20))(evaluations=80) > slsqp"
    result, loss = portfolio(text, 120)
    points = [np.frombuffer(e.x).tolist() for e in loss.path]
    losses = [float.fromhex(e.loss) for e in loss.path]
    assert spent(result) == [10, 80, 30]
    assert points[90] == points[int(np.argmin(losses[:90]))]


def test_members_are_handed_what_they_take() -> None:
    given = method("portfolio(slsqp, cmaes, torch.adam, turn=20)")
    assert given.takes == method("cmaes").takes | method("slsqp").takes
    objective = hybridopt.Objective(rosenbrock, torch.zeros(3), 100, bounds=BOX)
    run = given.start(objective.vector, 3, HandOver(np.ones(3), 0.0, sigma=0.25))
    received = [report.received for report in run.reports]
    assert [("sigma" in text) for text in received] == ["sigma" in part.takes for part in given.parts]
    assert objective.vector.read().tolist() == [0, 0, 0]
    run.close()


def test_text_copies_and_needs() -> None:
    text = "portfolio(scipy.slsqp > cmaes, torch.adam(lr=0.1) until plateau(50), pso, turn=60)"
    given = method(text)
    assert str(given) == text
    assert given.needs == {Need.GRADIENT, Need.BOUNDS}
    for again in (method(str(given)), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert (again, again.needs, hash(again)) == (given, given.needs, hash(given))
    assert given == Portfolio([method("slsqp") >> method("cmaes"), given.parts[1], method("pso")], 60)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Portfolio(()), "portfolio: expected at least one method"),
        (
            lambda: Portfolio(method("adam")),
            r"portfolio: expected several methods, portfolio\(\(a, b, c\)\), got",
        ),  # type: ignore[arg-type]
        (lambda: Portfolio((method("adam"),), turn=0), "portfolio: expected turn > 0, got 0"),
        (lambda: method("portfolio(adam, turns=3)"), "portfolio: unknown option 'turns'; nearest: turn"),
        (lambda: method("portfolio()"), "portfolio: expected at least one method, at character 1"),
    ],
)
def test_wrong_arguments(make: Any, text: str) -> None:
    with pytest.raises(MethodError, match=text):
        make()


def test_another_portfolio_is_refused() -> None:
    run, _ = start(method(MIXED), 50)
    run.step()
    other, _ = start(method(MIXED.replace("turn=15", "turn=16")), 50)
    with pytest.raises(StateError, match="it was saved by"):
        other.optimizer.load_state_dict(run.optimizer.state_dict())
    run.finish()
    other.finish()


class TestPortfolioOfSolvers(OptimizerContract):
    method = hybridopt.method("portfolio(slsqp, cmaes, nelder_mead, turn=6)")
    random = True


class TestPortfolioInPlace(OptimizerContract):
    method = hybridopt.method(
        "portfolio(cmaes(popsize=5), adam(lr=0.05, steps=9), torch.sgd(lr=1e-3), turn=8)"
    )
    random = True

    def test_nothing_finite(self) -> None:
        """Its member without gradients goes on looking until the run's patience ends."""
        x = torch.zeros(2, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = hybridopt.minimize(lambda x: x.sum() * math.nan, x, self.method, budget=400, seed=0)
        assert result.reason is Reason.NON_FINITE


class TestPortfolioInAChain(OptimizerContract):
    method = hybridopt.method(
        "(portfolio(lq_cmaes, restart(slsqp, begin_at=uniform), turn=9))(evaluations=30) > portfolio(slsqp, cmaes)"
    )
    bounds = BOX
    random = True
