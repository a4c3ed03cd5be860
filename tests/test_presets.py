"""`auto`: what it chooses, that it says so, and that a run of it is a run like any other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hybridopt
from hybridopt import Objective, Run, method, problems
from hybridopt.errors import MethodError
from hybridopt.presets import choose
from tests.driving import BOX, Recorded, rosenbrock

BOX5 = (-5.0, 5.0)


def values(x: np.ndarray) -> float:
    return float((x**2).sum())


def gradients(x: Tensor) -> Tensor:
    return (x**2).sum()


SIDE_BY_SIDE = "scipy.slsqp from random points and {} side by side"


@pytest.mark.parametrize(
    "loss, n, bounds, budget, first, why",
    [
        (gradients, 3, None, 500, "(restart(slsqp, begin_at=uniform, evaluations=50%)", "the start"),
        (gradients, 3, BOX, 500, "coordinate_search(separable=true) until noise", SIDE_BY_SIDE.format("lq_cmaes")),
        (gradients, 3, BOX, "9s", "coordinate_search(separable=true) until noise", SIDE_BY_SIDE.format("cmaes")),
        (gradients, 400, BOX, 500, "restart(lbfgsb) until noise | no_gradient", "cmaes of O(n) memory"),
        (gradients, 30_000, BOX, 500, "adam", "30000 weights have gradients"),
        (values, 3, BOX, 900, "coordinate_search(separable=true) until noise", SIDE_BY_SIDE.format("lq_cmaes")),
        (values, 3, BOX, "9s", "coordinate_search(separable=true) until noise", SIDE_BY_SIDE.format("lq_cmaes")),
        (values, 50, BOX, 900, "coordinate_search(separable=true) until noise", SIDE_BY_SIDE.format("cmaes")),
        (values, 3, None, 900, "portfolio(restart(slsqp(ftol=1e-11)), lq_cmaes(restarts=bipop, handover=point)) "
         "until noise", "differences and lq_cmaes side by side, since there are no gradients"),
        (values, 400, BOX, 900, "cmaes(covariance=separable)", "400 weights have no gradients"),
        (values, 30_000, None, 900, "cmaes(covariance=limited)", "30000 weights have no gradients"),
    ],
)  # fmt: skip
def test_what_is_chosen(loss: Any, n: int, bounds: Any, budget: Any, first: str, why: str) -> None:
    x0 = np.zeros(n) if loss is values else torch.zeros(n, dtype=torch.float64)
    text, reason = choose(Objective(loss, x0, budget, bounds=bounds))
    assert text.split(" > ")[0] == first
    assert why in reason
    method(text).start(Objective(loss, x0, budget, bounds=bounds).vector, 0).close()


def test_whole_numbers() -> None:
    """Differences and models see nothing between them: every evaluation but the first is of a generation."""
    asked: list[np.ndarray] = []

    def loss(x: np.ndarray) -> float:
        asked.append(x.copy())
        return float(((x - 3) ** 2).sum())

    x0 = np.full(3, -4.0)
    result = hybridopt.minimize(loss, x0, "auto", budget=600, bounds=BOX5, integer=True, seed=0)
    assert "whole numbers" in result.notes[-1]
    assert result.best_loss == 0
    assert len({tuple(x) for x in asked[:10]}) > 6
    text, _ = choose(Objective(values, np.zeros(400), 900, bounds=BOX, integer=True))
    assert text == "cmaes(covariance=separable) until noise > cmaes"


def test_residuals_and_constraints() -> None:
    def residuals(x: Tensor) -> Tensor:
        return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    x = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    result = hybridopt.minimize(residuals, x, "auto", budget="300fe", seed=0, residuals=True)
    assert result.best_loss < 1e-15
    assert "since the residuals are known" in result.notes[-1]
    assert result.reason is hybridopt.Reason.TARGET  # a loss of 0 cannot be lowered
    assert result.best_loss == 0
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    result = hybridopt.minimize(
        gradients, x, "auto", budget="300fe", seed=0, constraints=lambda x: x.sum() - 1
    )
    assert result.best_loss == pytest.approx(0.5, abs=1e-6)
    assert "since it keeps constraints" in result.notes[-1]
    x = torch.ones(3, dtype=torch.float64)
    result = hybridopt.minimize(
        lambda x: x - 0.3,
        x,
        "auto",
        budget="300fe",
        seed=0,
        residuals=True,
        constraints=lambda x: x.sum() - 2,
    )
    assert result.best_loss == pytest.approx(1.1**2 / 6, abs=1e-6)


def test_it_is_what_it_says_it_chose() -> None:
    """The same evaluations as the text in the note."""

    def run(text: str) -> tuple[list[Any], tuple[str, ...]]:
        loss = Recorded()
        x = torch.tensor([-1.2, 1.0, 0.3], dtype=torch.float64)
        result = hybridopt.minimize(loss, x, text, budget=200, bounds=BOX, seed=3, batch="loop")
        return loss.path, result.notes

    path, notes = run("auto")
    assert len(path) == 200
    chosen, _ = run(notes[-1].rpartition(": ")[2])
    assert chosen == path
    assert method("auto") == method(str(method("auto")))


def test_resume_makes_the_same_choice() -> None:
    def begun() -> tuple[Run, Recorded]:
        loss = Recorded()
        x = torch.tensor([-1.2, 1.0, 0.3], dtype=torch.float64)
        return Run(loss, x, "auto", budget=150, bounds=BOX, seed=3, batch="loop"), loss

    run, whole = begun()
    with run:
        for _ in run:
            pass
    run, first = begun()
    for _ in range(40):
        run.step()
    state = run.state_dict()
    run.finish()
    run, rest = begun()
    run.load_state_dict(state)
    with run:
        for _ in run:
            pass
    assert first.path + rest.path == whole.path


def test_what_was_chosen_stays_chosen_under_another_budget() -> None:
    def begun(budget: Any) -> Run:
        x = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        return Run(Recorded(), x, "auto", budget=budget, bounds=BOX, seed=3)

    run, other = begun(90), begun("60s")
    for _ in range(20):
        run.step()
    state = run.state_dict()
    notes = run.finish().notes
    assert other.state_dict()["chosen"] != state["chosen"]
    other.load_state_dict(state)
    with other:
        for _ in range(200):
            other.step()
    result = other.result()
    assert result.notes[-1] == notes[-1]
    assert result.evaluations > 90


def test_noise() -> None:
    """From the second evaluation on CMA-ES, which comes near although no loss can be trusted."""

    def loss(x: np.ndarray) -> float:
        return float(((x - 1) ** 2).sum() + 0.3 * np.random.randn())

    result = hybridopt.minimize(loss, np.full(4, -3.0), "auto", budget=900, bounds=BOX5, seed=0)
    assert [stage.method for stage in result.stages][-1] == "cmaes"
    assert result.stages[-1].spent["evaluations"] == 898
    assert result.notes[-1].rpartition(": ")[0].endswith("with noise cmaes")
    assert float(((result.x - 1) ** 2).sum()) < 0.1


def test_noise_of_a_loss_of_many_weights_that_has_no_graph() -> None:
    model = torch.nn.Linear(20, 20)

    def loss(model: torch.nn.Module) -> float:
        return float(model.weight.detach().square().sum() + torch.randn(()))

    result = hybridopt.minimize(loss, model, "auto", budget=1200, seed=0)
    assert result.reason is hybridopt.Reason.EVALUATIONS
    assert [stage.method for stage in result.stages][-1] == "cmaes(covariance=separable)"


def test_without_noise_nothing_waits() -> None:
    """What noise would have called for is no stage that the user should miss."""
    result = hybridopt.minimize(values, np.full(3, 2.0), "auto", budget=60, bounds=BOX5, seed=0)
    assert not [note for note in result.notes if note.startswith("never began")]


def test_it_cannot_be_a_part() -> None:
    with pytest.raises(MethodError, match="expected to be the whole method of a run"):
        hybridopt.minimize(values, np.zeros(2), "auto(evaluations=50) > slsqp", budget=90, seed=0)


def test_identity() -> None:
    """The seed problem's global minimum from a random start."""
    problem = problems.get("identity")
    result = hybridopt.minimize(
        problem.loss, problem.target, "auto", budget="3000fe", seed=1, bounds=problem.bounds
    )
    assert result.best_loss <= 0.783055


def rastrigin(x: np.ndarray) -> float:
    z = x - 1.3
    return float((z**2 - 10 * np.cos(2 * np.pi * z) + 10).sum())


def test_values_alone() -> None:
    """A sum over the weights with ten minima each, and a turned ellipsoid of condition 10^6."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    scale = np.logspace(0, 6, 5)
    x0 = np.random.default_rng(1).uniform(-4, 4, 5)
    sums = hybridopt.minimize(rastrigin, x0, "auto", budget=1000, bounds=BOX5, seed=0)
    assert sums.best_loss < 1e-6

    def ellipsoid(x: np.ndarray) -> float:
        return float(scale @ (turn @ (x - 1.3)) ** 2)

    bent = hybridopt.minimize(ellipsoid, x0, "auto", budget=1000, bounds=BOX5, seed=0)
    assert bent.best_loss < 1e-8


def test_rosenbrock() -> None:
    x = torch.tensor([-1.2, 1.0, 0.3, -0.5, 1.5], dtype=torch.float64)
    assert hybridopt.minimize(rosenbrock, x, "auto", budget="1000fe", seed=0).best_loss < 1e-8


INPUTS = torch.randn(300, 4, generator=torch.Generator().manual_seed(3))
SIDES = (INPUTS[:, 0] * INPUTS[:, 1] > 0).long()


def errors(model: torch.nn.Module) -> torch.Tensor:
    wrong: torch.Tensor = model(INPUTS).argmax(1) != SIDES
    return wrong.float().mean()


@pytest.mark.parametrize(("hidden", "budget"), [(6, 1000), (100, 1500)])
def test_errors_are_counted_down_without_a_box(hidden: int, budget: int) -> None:
    """Differences of a loss that counts are nearly all 0; following them all along left 40 % of the errors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 2))
    result = hybridopt.minimize(errors, model, "auto", budget=budget, seed=0)
    assert result.stages[-1].method.startswith("cmaes")
    assert result.stages[0].spent["evaluations"] < 100
    assert result.best_loss < 0.15


def test_a_loss_without_a_graph_that_is_smooth_keeps_its_differences() -> None:
    x = torch.full((4,), 2.0, dtype=torch.float64)
    result = hybridopt.minimize(lambda x: (x.detach() ** 2).sum(), x, "auto", budget=200, seed=0)
    assert len(result.stages) == 1
    assert result.best_loss < 1e-8
