"""Races: equal shares in turn, the better part goes on, each member's path is its own."""

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
from hybridopt import Method, Race, Reason, Run, method
from hybridopt.compose._halving import Halving
from hybridopt.errors import ClosedError, MethodError, NonFiniteLoss, StateError
from hybridopt.optimizer import HandOver, Need
from hybridopt.randomness import derive_seed
from hybridopt.testing import OptimizerContract
from tests.driving import BOX, SOLVERS, Evaluation, Recorded, rosenbrock, start, whole

ADAMS = "race(torch.adam(lr=0.001), torch.adam(lr=0.1), torch.adam(lr=0.01), torch.adam(lr=0.03), rung=30)"
MIXED = "race(slsqp(ftol=1e-12), cma.cmaes, torch.adam(lr=0.1), pyswarm.pso(swarmsize=6), rung=25)"


def finish(run: Run) -> Any:
    with run:
        for _ in run:
            pass
    return run.result()


def race(text: str | Method, budget: Any = 200, **options: Any) -> tuple[Any, Recorded]:
    run, loss = start(method(text), budget, **options)
    return finish(run), loss


class ByMember:
    """Listens: the path of each member of a race, told apart by its ledger's label."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.paths: dict[str, list[Evaluation]] = {}
        run.objective.listeners.append(self)

    def evaluated(self, ledger: Any, scopes: Any, loss: float, probe: bool) -> None:
        x = self.run.objective.vector.read().tobytes()
        self.paths.setdefault(scopes[0].label, []).append(Evaluation(x, float(loss).hex()))


# -- laws --------------------------------------------------------------------------------------------------------

ONE = {**SOLVERS, "adam": method("torch.adam(lr=0.1)"), "lbfgs": method("torch.lbfgs")}


@pytest.mark.parametrize("name", ONE)
def test_a_race_of_one_is_the_method(name: str) -> None:
    bounds = None if name == "nelder_mead" else BOX
    assert whole(Race((ONE[name],), rung=7), 50, bounds=bounds) == whole(ONE[name], 50)
    alone, _ = start(ONE[name], 50)
    raced, _ = start(Race((ONE[name],)), 50, bounds=bounds)
    plain, same = finish(alone), finish(raced)
    assert (plain.loss, plain.best_loss, plain.reason, plain.message, plain.forward_equivalents) == (
        same.loss, same.best_loss, same.reason, same.message, same.forward_equivalents
    )  # fmt: skip


def test_every_member_walks_the_path_that_it_walks_alone() -> None:
    """The others' evaluations in between change nothing; seeds are drawn in the order of the members."""
    given = method(MIXED)
    run, _ = start(given, 400, seed=11)
    heard = ByMember(run)
    finish(run)
    assert isinstance(given, Race)
    for i, member in enumerate(given.methods):
        path = heard.paths[str(member)]
        assert len(path) >= 8
        assert path == whole(member, 400, seed=derive_seed(11, i) if i else 11)[: len(path)], str(member)


# -- shares ------------------------------------------------------------------------------------------------------


def test_equal_shares_then_half_of_them_twice_as_much() -> None:
    """A step of Adam costs 3 forward-equivalents, so 30 are ten steps; what is left is the winner's."""
    result, loss = race(ADAMS, {"forward_equivalents": 600})
    spent = {stage.method: stage.spent["forward_equivalents"] for stage in result.stages}
    said = {stage.method: (stage.reason, stage.message) for stage in result.stages}
    assert spent == {
        "torch.adam(lr=0.001)": 30,
        "torch.adam(lr=0.1)": 600 - 30 - 30 - 90,
        "torch.adam(lr=0.01)": 30,
        "torch.adam(lr=0.03)": 30 + 60,
    }
    assert said == {
        "torch.adam(lr=0.001)": (Reason.SWITCHED, "dropped in rung 1"),
        "torch.adam(lr=0.1)": (None, ""),
        "torch.adam(lr=0.01)": (Reason.SWITCHED, "dropped in rung 1"),
        "torch.adam(lr=0.03)": (Reason.SWITCHED, "dropped in rung 2"),
    }
    assert len(loss.path) == result.evaluations == 200


def test_what_a_turn_spends_too_much_is_taken_off_the_next_one() -> None:
    """Generations of 7 in rungs of 8: 14 in the first; 24 may be spent by the end of the second, which are 28."""
    result, _ = race("race(cma.cmaes, cma.cmaes(sigma=1.0), rung=8)", 300)
    lost = [stage for stage in result.stages if stage.message == "dropped in rung 1"]
    assert [stage.spent["evaluations"] for stage in lost] == [14]
    four = "race(cma.cmaes, cma.cmaes(sigma=1.0), cma.cmaes(sigma=0.5), cma.cmaes(sigma=0.2), rung=8)"
    result, _ = race(four, 300)
    spent = sorted(stage.spent["evaluations"] for stage in result.stages)
    assert spent == [14, 14, 28, 300 - 56]


def test_a_rung_smaller_than_a_step_is_one_step() -> None:
    result, _ = race("race(cma.cmaes, cma.cmaes(sigma=1.0), cma.cmaes(sigma=0.5), rung=1)", 100)
    assert sorted(stage.spent["evaluations"] for stage in result.stages) == [7, 14, 100 - 21]


def test_nobody_is_dropped_where_all_are_kept() -> None:
    result, _ = race("race(torch.adam(lr=0.1), torch.adam(lr=0.01), rung=30, keep=1)", 200)
    assert [stage.spent["evaluations"] for stage in result.stages] == [100, 100]
    assert [stage.reason for stage in result.stages] == [None, None]


@pytest.mark.parametrize("n, rung", [(3, 130), (20, 300)])
def test_the_default_rung(n: int, rung: int) -> None:
    x0 = [0.5] * n
    result, _ = race("race(torch.adam(lr=0.1), torch.adam(lr=0.001))", 600, x0=x0)
    assert result.stages[1].spent["forward_equivalents"] == math.ceil(rung / 3) * 3


def test_who_goes_on() -> None:
    half, third, most = Halving(1, 0.5), Halving(1, 1 / 3), Halving(1, 0.9)
    inf = math.inf
    assert half.survivors([4.0, 1.0, 3.0, 2.0]) == [1, 3]
    assert half.survivors([2.0, 1.0, 1.0, 1.0]) == [1, 2]
    assert half.survivors([inf, inf, 5.0]) == [0, 2]
    assert half.survivors([2.0, 1.0]) == [1]
    assert half.survivors([1.0]) == [0]
    assert third.survivors([float(i) for i in range(9)]) == [0, 1, 2]
    assert most.survivors([1.0, 2.0, 0.0]) == [0, 2]
    assert Halving(1, 1.0).survivors([3.0, inf, 1.0]) == [0, 1, 2]
    assert [half.size(rung) for rung in range(3)] == [1, 2, 4]


@pytest.mark.parametrize("budget", [1, 7, 8, 33, 90, 160])
def test_the_runs_budget_cuts_a_race_anywhere(budget: int) -> None:
    _, long = race(MIXED, 200)
    result, loss = race(MIXED, budget)
    assert loss.path == long.path[:budget]
    assert result.evaluations == budget
    assert result.best_loss == loss.best


def test_shares_inside_are_of_the_budget_around_the_race() -> None:
    result, _ = race(
        "race(cma.cmaes(evaluations=10%), torch.adam(lr=0.0001), rung=1000)", {"forward_equivalents": 400}
    )
    first = result.stages[0]
    assert (first.spent["evaluations"], first.reason) == (40, Reason.FORWARD_EQUIVALENTS)


# -- ends --------------------------------------------------------------------------------------------------------


def test_who_has_ended_is_ranked_with_what_it_found_and_spends_no_more() -> None:
    result, _ = race("race(slsqp(ftol=1e-12), cma.cmaes, rung=150)", 5000)
    first, second = result.stages
    assert (first.reason, second.message) == (Reason.CONVERGED, "dropped in rung 1")
    assert first.best_loss < second.best_loss
    assert (result.reason, result.message) == (first.reason, first.message)
    assert result.evaluations == first.spent["evaluations"] + second.spent["evaluations"] < 400
    assert result.loss == first.best_loss
    assert math.ceil(150 / 7) * 7 == second.spent["evaluations"]


def test_who_has_ended_can_be_beaten() -> None:
    result, _ = race("race(torch.adam(lr=0.001, steps=3), torch.adam(lr=0.1), rung=60)", 100)
    first, second = result.stages
    assert (first.reason, first.spent["evaluations"]) == (Reason.STEPS, 3)
    assert (second.reason, second.spent["evaluations"]) == (None, 97)


def test_a_race_ends_when_all_have_ended() -> None:
    result, _ = race("race(torch.adam(lr=0.1, steps=3), torch.adam(lr=0.2, evaluations=5), rung=60)", 100)
    assert [stage.reason for stage in result.stages] == [Reason.STEPS, Reason.EVALUATIONS]
    assert result.reason is Reason.EVALUATIONS  # the leader's
    assert result.evaluations == 8


def test_a_member_without_finite_losses_is_no_end_of_the_race() -> None:
    """Only at the given start and where the second member walks is the loss finite."""
    calls = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return rosenbrock(x) * (math.nan if 7 < len(calls) <= 41 else 1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, _ = race("race(torch.adam(lr=0.5), cma.cmaes, rung=111)", 400, loss=Recorded(loss))
    first, second = result.stages
    assert first.reason is Reason.NON_FINITE
    assert first.spent["evaluations"] == 37
    assert second.spent["evaluations"] == 400 - 37


FOLLOWERS = [
    "slsqp",
    "torch.adam",
    "torch.lbfgs",
    "multistart(torch.adam, starts=1)",
    "multistart(slsqp, starts=1)",
]


@pytest.mark.parametrize("first", FOLLOWERS)
def test_a_start_that_is_not_finite_drops_who_cannot_begin_there(first: str) -> None:
    """Wherever it stands in the list; alone it is an error."""

    def loss(x: Tensor) -> Tensor:
        return rosenbrock(x) * (math.nan if x.tolist() == [-1.2, 1.0, 0.3] else 1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for text in (f"race({first}, cmaes, rung=20)", f"race(cmaes, {first}, rung=20)"):
            result, _ = race(text, 200, loss=Recorded(loss))
            dropped = result.stages[text.startswith("race(cmaes")]
            assert (dropped.reason, dropped.spent["evaluations"]) == (Reason.NON_FINITE, 1)
            assert "expected a finite loss and gradient at the start point" in dropped.message
            assert result.evaluations == 200
        with pytest.raises(NonFiniteLoss, match="at the start point"):
            race(f"race({first})", 200, loss=Recorded(loss))
        with pytest.raises(NonFiniteLoss, match=r"one of its methods at least; .*cannot begin here"):
            race(f"race({first}, slsqp)", 200, loss=Recorded(loss))


def test_many_starts_in_one_program_that_cannot_begin_leave_the_race() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, _ = race(
            "race(multistart(torch.adam, starts=2, sigma=1e-9, begin_at=normal), cmaes, rung=90)",
            200,
            loss=Recorded(
                lambda x: rosenbrock(x) * (math.nan if x[0].item() < -1.1999 and x[1] > 0.9999 else 1.0)
            ),
        )
    assert (result.stages[0].reason, result.stages[0].spent["evaluations"]) == (Reason.NON_FINITE, 2)
    assert result.evaluations == 200


def test_a_chain_without_finite_losses_is_no_end_of_the_race_either() -> None:
    """19 steps of its first stage and 11 generations of 7 of its second, which alone would have had more patience."""
    calls = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return rosenbrock(x) * (math.nan if 1 < len(calls) <= 97 else 1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = "race(torch.adam(lr=0.1, steps=20) > cma.cmaes(popsize=7), torch.adam(lr=0.1), rung=1000)"
        result, _ = race(text, 300, loss=Recorded(loss))
    first, second = result.stages
    assert (first.reason, first.spent["evaluations"]) == (Reason.NON_FINITE, 97)
    assert (second.reason, second.spent["evaluations"]) == (None, 203)


# -- composition -------------------------------------------------------------------------------------------------


def points(path: list[Evaluation]) -> list[list[float]]:
    return [np.frombuffer(e.x).tolist() for e in path]


def test_all_members_begin_where_the_weights_stand() -> None:
    """Also after one that writes the weights while it starts."""
    text = "race(multistart(torch.lbfgs, starts=3, rung=5), torch.adam, slsqp, cma.cmaes, rung=20)"
    run, _ = start(method(text), 150)
    heard = ByMember(run)
    finish(run)
    for label in ("torch.adam", "scipy.slsqp"):
        assert points(heard.paths[label])[0] == [-1.2, 1.0, 0.3]
    one = next(path for label, path in heard.paths.items() if label.startswith("multistart"))
    assert points(one)[0] == [-1.2, 1.0, 0.3]


def test_a_race_begins_and_hands_on_within_a_chain() -> None:
    text = "torch.adam(lr=0.1, steps=10) > (race(cma.cmaes, torch.adam(lr=0.1), rung=20))(evaluations=80) > slsqp"
    result, loss = race(text, 120)
    losses = [float.fromhex(e.loss) for e in loss.path]
    best = points(loss.path)[int(np.argmin(losses[:10]))]
    assert best in points(loss.path)[10:40]
    assert [stage.spent["evaluations"] for stage in result.stages] == [10, 80, 30]
    assert points(loss.path)[90] == points(loss.path)[int(np.argmin(losses[:90]))]


def test_members_are_handed_what_they_take() -> None:
    given = method("race(slsqp, cmaes, torch.adam, rung=20)")
    assert given.takes == method("cmaes").takes | method("slsqp").takes
    objective = hybridopt.Objective(rosenbrock, torch.zeros(3), 100, bounds=BOX)
    run = given.start(objective.vector, 3, HandOver(np.ones(3), 0.0, sigma=0.25))
    received = [report.received for report in run.reports]
    assert [("sigma" in text) for text in received] == ["sigma" in part.takes for part in given.parts]
    assert objective.vector.read().tolist() == [0, 0, 0]
    run.close()


def test_the_leaders_point_and_knowledge_are_the_races() -> None:
    run, loss = start(method("race(torch.adam(lr=1e-5), cma.cmaes(sigma=0.3), rung=200)"), 260)
    for _ in range(75):
        run.step()
    assert run.optimizer.incumbent.loss < 300
    assert run.optimizer.hand_over().points is not None  # which Adam knows nothing of
    finish(run)
    assert run.result().loss <= min(float.fromhex(e.loss) for e in loss.path[:67])


def test_notes_of_all_members() -> None:
    def loss(x: Tensor) -> Tensor:
        return rosenbrock(x).detach()

    result, _ = race("race(slsqp, dual_annealing, cma.cmaes, rung=20)", 200, loss=Recorded(loss))
    assert len([note for note in result.notes if "autograd refused" in note]) == 1


# -- the value ---------------------------------------------------------------------------------------------------


def test_text_copies_and_needs() -> None:
    text = "race(scipy.slsqp > cmaes, torch.adam(lr=0.1) until plateau(50), pso, rung=60, keep=0.25)"
    given = method(text)
    assert str(given) == text
    assert given.needs == {Need.GRADIENT, Need.BOUNDS}
    for again in (method(str(given)), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert (again, again.needs, hash(again)) == (given, given.needs, hash(given))
    assert given == Race([method("slsqp") >> method("cmaes"), given.parts[1], method("pso")], 60, 0.25)  # type: ignore[arg-type]
    assert str(method("race(adam, sgd, evaluations=70)")) == "race(adam, sgd, evaluations=70)"
    assert len(method("race(adam, sgd) > slsqp").stages) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Race(()), "race: expected at least one method"),
        (lambda: Race(method("adam")), r"race: expected several methods, race\(\(a, b, c\)\), got"),  # type: ignore[arg-type]
        (lambda: Race("adam"), r"race: expected several methods, race\(\(a, b, c\)\), got 'adam'"),  # type: ignore[arg-type]
        (lambda: Race(("adm",)), "unknown name 'adm'; nearest: adam"),  # type: ignore[arg-type]
        (lambda: Race((method("adam"),), rung=0), "race: expected rung > 0, got 0"),
        (lambda: Race((method("adam"),), rung=True), "race: expected rung to be a number or None, got True"),
        (lambda: Race((method("adam"),), keep=0), "race: expected keep above 0 and at most 1, got 0"),
        (lambda: Race((method("adam"),), keep=1.5), "race: expected keep"),
        (lambda: method("race(adam, rungs=3)"), "race: unknown option 'rungs'; nearest: rung"),
        (lambda: method("race()"), "race: expected at least one method, at character 1"),
    ],
)
def test_wrong_arguments(make: Any, text: str) -> None:
    with pytest.raises(MethodError, match=text):
        make()


def test_another_race_is_refused() -> None:
    run, _ = start(method(MIXED), 50)
    run.step()
    other, _ = start(method(MIXED.replace("rung=25", "rung=26")), 50)
    with pytest.raises(StateError, match="it was saved by"):
        other.optimizer.load_state_dict(run.optimizer.state_dict())
    run.finish()
    other.finish()


def test_ended_and_closed() -> None:
    run, _ = start(method("race(torch.adam(steps=2), torch.sgd(steps=2))"), 50)
    while run.step() is not None:
        pass
    with pytest.raises(ClosedError, match="it has ended or was closed"):
        run.optimizer.ask()
    run.finish()


def test_a_copy_goes_on_by_itself() -> None:
    expected = whole(method(MIXED), 200)
    run, loss = start(method(MIXED), 200)
    for _ in range(60):
        run.step()
    done = len(loss.path)
    other, other_loss = start(method(MIXED), 200)
    other.load_state_dict(run.state_dict())
    other.optimizer = copy.deepcopy(run.optimizer)
    finish(run)
    finish(other)
    assert loss.path == expected
    assert other_loss.path == expected[done:]


class TestRaceOfSolvers(OptimizerContract):
    method = hybridopt.method("race(slsqp, cmaes, nelder_mead, rung=12)")
    random = True


class TestRaceInPlace(OptimizerContract):
    method = hybridopt.method("race(adam(lr=0.05), torch.sgd(lr=1e-3), cmaes(popsize=5), rung=15, keep=0.7)")
    random = True


class TestRaceInAChain(OptimizerContract):
    method = hybridopt.method(
        "(race(adam(lr=0.05), pyswarm.pso(swarmsize=5), rung=9))(evaluations=30) > race(slsqp, torch.lbfgs, rung=15)"
    )
    bounds = BOX
    random = True
