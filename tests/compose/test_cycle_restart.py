"""Stages that come round again, and methods that begin again."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hybridopt
from hybridopt import Cycle, Reason, Restart, method
from hybridopt.errors import MethodError
from hybridopt.optimizer import Incumbent
from hybridopt.randomness import derive_seed
from hybridopt.testing import OptimizerContract
from tests.driving import BOX, Recorded, rosenbrock, start, whole


class TestCycle(OptimizerContract):
    method = hybridopt.method("cycle(adam(lr=0.05, steps=7) > cmaes(evaluations=17))")
    random = True


class TestRestart(OptimizerContract):
    method = hybridopt.method("restart(slsqp(evaluations=15), sigma=0.2)")
    random = True


class TestRestartUniform(OptimizerContract):
    method = hybridopt.method(
        "restart(cmaes(popsize=5, evaluations=23), begin_at=uniform, grow=popsize) > slsqp"
    )
    random = True
    bounds = BOX


class TestRestartTemperature(OptimizerContract):
    method = hybridopt.method("restart(slsqp(evaluations=15), sigma=0.2, temperature=50)")
    random = True


def run(text: Any, budget: Any = 300, **options: Any) -> tuple[Any, Recorded]:
    made, loss = start(method(text), budget, **options)
    with made:
        for _ in made:
            pass
    return made.result(), loss


# -- laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["slsqp", "adam(lr=0.1)", "cmaes(evaluations=40)", "dual_annealing"])
def test_one_round_is_the_chain_and_no_restart_is_the_method(text: str) -> None:
    alone = whole(method(text), 80)
    assert whole(Cycle(method(text), rounds=1), 80) == alone
    assert whole(Restart(method(text), restarts=0), 80) == alone
    assert whole(method(f"restart({text})"), 80)[: len(alone)] == alone


def test_rounds_are_the_chain_written_out() -> None:
    parts = "adam(lr=0.1, steps=5) > cmaes(evaluations=14)"
    assert whole(method(f"cycle({parts}, rounds=3)"), 200) == whole(method(" > ".join([parts] * 3)), 200)


def test_restart_from_the_best_is_a_cycle() -> None:
    one = "cmaes(evaluations=25)"
    assert whole(method(f"restart({one}, begin_at=best)"), 120) == whole(method(f"cycle({one})"), 120)


# -- how they end ------------------------------------------------------------------------------------------------


def test_rounds_and_restarts_are_counted() -> None:
    result, _ = run("cycle(adam(steps=3) > cmaes(evaluations=9), rounds=4)")
    assert [s.spent["evaluations"] for s in result.stages] == [3, 9] * 4
    result, _ = run("restart(adam(steps=3), restarts=4)")
    assert [s.spent["evaluations"] for s in result.stages] == [3] * 5
    assert result.reason is Reason.STEPS


def test_an_endless_one_lasts_as_long_as_the_budget() -> None:
    for text in ("cycle(adam(steps=3) > slsqp(evaluations=4))", "restart(slsqp, sigma=0.5)"):
        result, loss = run(text, 137)
        assert len(loss.path) == result.evaluations
        assert result.reason is Reason.EVALUATIONS
        assert result.evaluations == 137


def test_a_cycle_of_stages_that_do_nothing_ends() -> None:
    """Neither can afford a step: it would go round for ever."""
    result, _ = run(
        "cycle(adam(forward_equivalents=2) > torch.sgd(forward_equivalents=1)) > cmaes(evaluations=6)"
    )
    assert result.evaluations == 6
    assert result.stages[0].reason is Reason.STALLED
    assert "no stage evaluates anything any more" in result.stages[0].message


# -- where they begin --------------------------------------------------------------------------------------------


def begins(text: str, **options: Any) -> tuple[np.ndarray, Any]:
    """Where each stage of 4 evaluations began (SGD evaluates its start), and the seeds."""
    _, loss = run(text, 80, **options)
    points = np.array([np.frombuffer(e.x) for e in loss.path])
    return points[::4], loss


def test_perturbed_starts() -> None:
    found, loss = begins("restart(torch.sgd(lr=0.0, steps=4), sigma=0.1)", bounds=None)
    losses = [float.fromhex(e.loss) for e in loss.path]
    for i in range(1, len(found)):
        best = np.frombuffer(loss.path[int(np.argmin(losses[: 4 * i]))].x)
        assert 0 < np.linalg.norm(found[i] - best) < 0.1 * 3 * np.sqrt(3)
    assert len({tuple(x) for x in found}) == len(found)
    again, _ = begins("restart(torch.sgd(lr=0.0, steps=4), sigma=0.1)", bounds=None)
    assert np.array_equal(found, again)


def test_at_no_temperature_nothing_higher_is_accepted() -> None:
    """A temperature at which exp(-rise / temperature) is 0 for any rise walks the path of temperature 0."""
    cold = whole(method("restart(slsqp(evaluations=9), sigma=0.2, temperature=1e-300)"), 300)
    assert cold == whole(method("restart(slsqp(evaluations=9), sigma=0.2)"), 300)
    assert cold != whole(method("restart(slsqp(evaluations=9), sigma=0.2, temperature=50)"), 300)


def test_when_hot_the_same_steps_are_taken_from_the_last_point() -> None:
    """At temperature 0 from the best one: the draws are the same."""
    cold, loss = begins("restart(torch.sgd(lr=0.0, steps=4), sigma=0.1)", bounds=None)
    hot, _ = begins("restart(torch.sgd(lr=0.0, steps=4), sigma=0.1, temperature=1e300)", bounds=None)
    losses = [float.fromhex(e.loss) for e in loss.path[::4]]
    best = np.array([cold[int(np.argmin(losses[:i]))] for i in range(1, len(cold))])
    assert np.diff(hot, axis=0) == pytest.approx(cold[1:] - best, abs=1e-12)
    assert not np.array_equal(best, cold[:-1])


def test_the_accepted_point_is_saved() -> None:
    walk = method("restart(torch.sgd(lr=0.0, steps=2), sigma=0.3, temperature=1e300)")
    path = whole(walk, 20)
    for cut in (3, 8, 13):
        first, loss = start(walk, 20)
        with first:
            for _ in range(cut):
                first.step()
            state = first.state_dict()
        second, _ = start(walk, 20, loss=loss)
        del loss.path[cut:]
        second.load_state_dict(state)
        with second:
            for _ in second:
                pass
        assert loss.path == path


def test_a_rise_is_accepted_as_often_as_its_exponential_says() -> None:
    rule = Restart(method("slsqp"), temperature=2.0)
    low, high = Incumbent(1.0, np.zeros(1)), Incumbent(1.0 + 2 * np.log(4), np.ones(1))
    climbed = sum(rule.accept(low, high, low, seed) is high for seed in range(4000))
    assert abs(climbed / 4000 - 1 / 4) < 4 * np.sqrt(3 / 16 / 4000)  # four standard errors
    assert all(rule.accept(high, low, low, seed) is low for seed in range(20))
    lost = Incumbent(np.inf, np.ones(1))
    assert all(rule.accept(low, lost, low, seed) is low for seed in range(20))


def test_a_temperature_crosses_a_barrier_of_minima() -> None:
    """Minima near 0, 1, ..., 4, of heights 0, 0.7, 1.4, 0.5, -3.8 above the first; sigma reaches the next one."""

    def loss(x: Tensor) -> Tensor:
        return (0.3 * x**2 * (3.2 - x) - 3 * torch.cos(2 * torch.pi * x)).sum()

    found = {}
    for temperature in (0, 1):
        text = f"restart(torch.sgd(lr=0.005, steps=12), sigma=0.7, temperature={temperature})"
        ends = [
            hybridopt.minimize(
                loss, torch.zeros(1, dtype=torch.float64), text, budget=3000, seed=seed, bounds=(-2, 4.2)
            )
            for seed in range(3)
        ]
        found[temperature] = [round(end.x.item()) for end in ends]
    assert found == {0: [0, 0, 0], 1: [4, 4, 4]}


def test_starts_from_the_box() -> None:
    found, _ = begins("restart(torch.sgd(lr=0.0, steps=4), begin_at=uniform)", bounds=(-2.0, 2.0))
    assert (np.abs(found) <= 2).all()
    assert found[1:].std(axis=0).min() > 0.6  # 4 / sqrt(12) = 1.15 for uniform numbers
    wide, _ = begins("restart(torch.sgd(lr=0.0, steps=4), begin_at=uniform, sigma=9)", bounds=None)
    assert wide[1:].std(axis=0).min() > 4


def test_perturbed_starts_stay_in_the_box() -> None:
    found, _ = begins("restart(torch.sgd(lr=0.0, steps=4), sigma=3)", bounds=(-2.0, 2.0))
    assert (np.abs(found) <= 2).all()
    assert (np.abs(found) < 2).any(axis=1).all()  # mirrored, not clipped to a corner


def test_starts_anew_with_another_seed() -> None:
    text = "restart(cmaes(popsize=4, evaluations=8), begin_at=start)"
    run_, _ = start(method(text), 40, seed=5)
    seen: dict[int, Any] = {}
    with run_:
        for _ in run_:
            state = run_.optimizer.state_dict()
            seen[state["index"]] = (state["child"]["start"]["seed"], state["child"]["start"]["x0"].tolist())
    assert [seed for seed, _ in seen.values()][:3] == [5, derive_seed(5, 1), derive_seed(5, 2)]
    assert all(x == [-1.2, 1.0, 0.3] for _, x in seen.values())


@pytest.mark.parametrize("solver", ["lbfgsb", "slsqp"])
def test_a_gradient_found_right_is_not_checked_again(solver: str) -> None:
    def spent(text: str) -> list[tuple[int, int]]:
        x0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
        result = hybridopt.minimize(
            lambda x: ((x - 3) ** 2).sum() + (x[0] * x[1]) ** 2, x0, text, budget="900fe"
        )
        return [(stage.spent["evaluations"], stage.spent["backward"]) for stage in result.stages]

    trusting = spent(f"restart({solver}(gradients=autograd), begin_at=start, restarts=2)")
    (first, *again) = spent(f"restart({solver}, begin_at=start, restarts=2)")
    assert first == (trusting[0][0] + 1, trusting[0][1] + 1)
    assert again == trusting[1:]


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("restart(lbfgsb(evaluations=6), restarts=3)", True),
        ("slsqp(evaluations=6) > lbfgsb", False),
        ("restart(slsqp(evaluations=6) > lbfgsb(evaluations=6), restarts=2)", False),
    ],
)
def test_what_was_found_right_is_saved_and_no_other_methods_affair(text: str, known: bool) -> None:
    made, _ = start(method(text), 60)
    later = []
    with made:
        for _ in made:
            state = made.optimizer.state_dict()
            if state["index"]:
                child = state["child"]
                later.append(child.get("child", child)["start"]["checked"])
    assert later
    assert all(checked == (["gradient"] if known else []) for checked in later)


@pytest.mark.parametrize("solver", ["lbfgsb", "slsqp"])
def test_a_restart_where_there_is_no_graph_goes_on_with_differences(solver: str) -> None:
    def loss(x: Tensor) -> Tensor:
        value = ((x - 3) ** 2).sum()
        return value if x[0].item() > 0 else value.detach() + 1

    result = hybridopt.minimize(
        loss,
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        f"restart({solver}(evaluations=9), begin_at=uniform, restarts=6)",
        bounds=(-5, 5),
        budget="300fe",
        seed=0,
    )
    assert len(result.stages) == 7
    assert result.best_loss < 1e-9
    assert any("no graph" in note for note in result.notes)


def test_growing_options() -> None:
    result, _ = run("restart(cmaes(popsize=5, steps=2), grow=popsize, factor=1.5, restarts=3)")
    # each begins at a point of its own, which is evaluated
    assert [s.spent["evaluations"] for s in result.stages] == [11, 17, 23, 35]
    assert [s.method for s in result.stages][1] == "cmaes(popsize=8, steps=2)"
    result, _ = run("restart(cmaes(popsize=5, steps=1, evaluations=9), grow=popsize)")
    assert (
        result.stages[-1].method == "cmaes(popsize=2560, evaluations=9, steps=1)"
    )  # nine times, then no more
    result, _ = run("restart(torch.sgd(lr=0.01, steps=2), grow=lr, factor=0.5, restarts=2)")
    assert [s.method for s in result.stages][2] == "torch.sgd(lr=0.0025, steps=2)"


@pytest.mark.parametrize(
    "text, message",
    [
        ("restart(slsqp, grow=ftoll)", r"scipy\.slsqp: unknown option 'ftoll'; nearest: ftol"),
        ("restart(cmaes, grow=popsise)", "cmaes: unknown option 'popsise'; nearest: popsize"),
        ("restart(torch.adam, grow=lrr)", r"torch\.adam: unknown option 'lrr'; nearest: lr"),
        (
            "restart(slsqp, grow=gradients)",
            "an option of scipy.slsqp that is a number, 'gradients' is 'auto',",
        ),
        ("restart(cmaes(evaluations=9), grow=evaluations)", "that is a number, 'evaluations' is a limit,"),
        ("restart(torch.adam, grow=lr)", r"'lr' is None; give it one, e\.g\. torch\.adam\(lr=10\)"),
        ("restart(cmaes, grow=popsize)", r"'popsize' is None; give it one, e\.g\. cmaes\(popsize=10\)"),
        ("restart(slsqp, temperature=-1)", "expected temperature >= 0, got -1"),
        ("restart(slsqp, begin_at=best, temperature=1)", "expected begin_at=perturb with a temperature"),
        (
            "restart(slsqp > adam, grow=lr)",
            r"expected a single method, .* e\.g\. restart\(scipy\.slsqp, grow=lr\)",
        ),
        ("restart(slsqp, grow=3)", "expected grow to be text or None, got 3"),
        ("restart(slsqp, factor=x)", "expected factor to be a number, got 'x'"),
        ("restart(slsqp, sigma=0)", "expected sigma > 0, got 0"),
        ("restart(slsqp, sigma=inf)", "expected sigma to be finite, got inf"),
        ("restart(slsqp, restarts=-1)", "expected restarts >= 0, got -1"),
        ("restart(slsqp, restarts=a)", "expected restarts to be a whole number or None, got 'a'"),
        (
            "restart(slsqp, begin_at=there)",
            "expected begin_at to be one of perturb, uniform, best, start, got 'there'",
        ),
        ("cycle(slsqp, rounds=0)", "expected rounds >= 1, got 0"),
        ("cycle(slsqp, rounds=b)", "expected rounds to be a whole number or None, got 'b'"),
        ("cycle(slsqp, round=2)", "cycle: unknown option 'round'; nearest: rounds"),
        ("cycle()", r"cycle: expected one method inside, got 0"),
        ("restart(slsqp, adam)", r"restart: expected one method inside, got 2"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(MethodError, match=f"(?s){message}.*at character 1:"):
        method(text)


# -- what they are for -------------------------------------------------------------------------------------------


def test_basin_hopping_finds_what_one_descent_does_not() -> None:
    def rastrigin(x: Tensor) -> Tensor:
        return (x**2 - 10 * torch.cos(2 * torch.pi * x) + 10).sum()

    found = {"slsqp": 0, "restart(slsqp, sigma=1)": 0}
    for text in found:
        for seed in range(3):
            x = torch.tensor([2.2, -3.1], dtype=torch.float64)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[text] += hybridopt.minimize(rastrigin, x, text, budget=2000, seed=seed).best_loss < 1e-6
    assert found["slsqp"] == 0
    assert found["restart(slsqp, sigma=1)"] == 3


def test_a_cycle_improves_on_its_parts() -> None:
    def loss(x: Tensor) -> Tensor:
        return rosenbrock(x)

    result, _ = run("cycle(adam(lr=0.05, steps=40) > slsqp(evaluations=30))", 600, loss=Recorded(loss))
    assert result.best_loss < 1e-8


def test_a_noisy_loss_is_not_left_at_a_drawn_start() -> None:
    """No best point is kept; the last start that was drawn is no better for being the last."""

    def loss(x: Tensor) -> Tensor:
        return ((x - 0.3) ** 2).sum() + 0.1 * torch.randn((), dtype=torch.float64)

    for seed in range(4):
        x = torch.ones(3, dtype=torch.float64)
        hybridopt.minimize(loss, x, "restart(cmaes(evaluations=60), begin_at=uniform)", budget=200, seed=seed,
                           bounds=(-5, 5))  # fmt: skip
        assert float(((x - 0.3) ** 2).sum()) < 3


def test_a_million_rounds_are_not_written_out() -> None:
    result, _ = run("cycle(adam(steps=2) > cmaes(evaluations=9), rounds=1000000)", 30)
    assert len(result.notes[-1]) < 200
