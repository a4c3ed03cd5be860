"""`hybridopt.scores`: the point that a run ends with is chosen by a second function, within the budget."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hybridopt
from hybridopt import Run, minimize
from hybridopt.errors import BudgetError, ObjectiveError
from hybridopt.optimizer import Kind, Request
from hybridopt.testing import Heard

METHODS = ["cmaes(popsize=8)", "pso(swarmsize=8)", "torch.adam(lr=0.1)", "scipy.nelder_mead", "slsqp"]


class Noisy:
    """A bowl with noise on it, which remembers where and what; and the bowl itself, as the score."""

    def __init__(self, noise: float = 1.0) -> None:
        self.noise = noise
        self.points: list[Tensor] = []
        self.losses: list[float] = []
        self.scored: list[Tensor] = []

    def loss(self, x: Tensor) -> Tensor:
        value = (x**2).sum() + self.noise * torch.randn((), dtype=torch.float64)
        self.points.append(x.detach().clone())
        self.losses.append(value.item())
        return value

    def score(self, x: Tensor) -> float:
        self.scored.append(x.detach().clone())
        return float((x.detach() ** 2).sum())


def start() -> Tensor:
    return torch.full((3,), 1.5, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_the_lowest_losses_and_the_own_point_are_scored_within_the_budget(method: str) -> None:
    noisy, x, tracker = Noisy(), start(), hybridopt.Tracker()
    result = minimize(
        noisy.loss, x, method, budget=80, seed=2, bounds=(-2, 2), batch="loop", score=noisy.score, candidates=4,
        tracker=tracker,
    )  # fmt: skip
    own, *kept = noisy.scored
    probes = [row.probe for row in tracker.rows()]
    lowest: list[Tensor] = []
    for i in np.argsort(noisy.losses, kind="stable"):
        point = noisy.points[i]
        if len(lowest) < 4 and not probes[i] and not any(torch.equal(point, other) for other in lowest):
            lowest.append(point)
    scored = sorted(p.tolist() for p in noisy.scored)
    expected = {tuple(p.tolist()) for p in (own, *lowest)}
    assert scored == sorted(map(list, expected)), "each point once"
    assert 1 <= len(kept) <= 4
    scores = [float((p**2).sum()) for p in noisy.scored]
    assert result.score == min(scores) == float((x**2).sum())
    assert result.score == float((torch.from_numpy(result.x) ** 2).sum())
    made = len(noisy.losses) + len(noisy.scored)
    assert result.evaluations == made <= 80
    assert result.best_loss == min(noisy.losses), "a score is no loss"


def test_it_ends_nearer_to_the_optimum_than_without() -> None:
    ends = []
    for seed in range(5):
        for score in (None, Noisy().score):
            x = start()
            minimize(Noisy().loss, x, "random_search", budget=100, seed=seed, bounds=(-2, 2), score=score)
            ends.append(float((x**2).sum()))
    without, scored = np.mean(ends[::2]), np.mean(ends[1::2])
    assert scored < without


@pytest.mark.parametrize("unit", ["evaluations", "forward_equivalents"])
def test_what_the_scores_take_is_kept_back(unit: str) -> None:
    noisy = Noisy()
    result = minimize(
        noisy.loss, start(), "cmaes", budget={unit: 30}, seed=1, batch="loop", score=noisy.score
    )
    assert len(noisy.losses) == 30 - 6
    assert len(noisy.scored) <= 6
    assert result.forward == result.evaluations == len(noisy.losses) + len(noisy.scored)
    with pytest.raises(BudgetError, match=rf"expected more {unit} than the 6 that scoring 5 candidates"):
        minimize(noisy.loss, start(), "cmaes", budget={unit: 6}, score=noisy.score)


def test_batched_or_not_and_listened_to_or_not_the_candidates_are_the_same() -> None:
    def loss(x: Tensor) -> Tensor:
        return (x**2).sum() + torch.sin(40 * x).sum()

    kept = []
    for batch, listens in (("loop", False), ("vmap", False), ("vmap", True)):
        run = Run(loss, start(), "cmaes(popsize=8)", budget=60, seed=4, batch=batch, score=loss, candidates=5)
        if listens:
            run.objective.listeners.append(Heard())
        with run:
            for _ in run:
                pass
        state = run.objective.state_dict()["scores"]
        kept.append([point["x"].tolist() for point in state["points"]])
        assert sorted(state["losses"].tolist()) == state["losses"].tolist()
        assert len(state["losses"]) == 5
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("method", ["cmaes(popsize=8)", "torch.adam(lr=0.1)"])
def test_a_saved_run_ends_at_the_same_point(method: str) -> None:
    def run(seed: int = 3) -> Run:
        return Run(Noisy().loss, start(), method, budget=60, seed=seed, batch="loop", score=Noisy().score)

    whole = run()
    states = []
    with whole:
        for _ in whole:
            file = io.BytesIO()
            torch.save(whole.state_dict(), file)
            states.append(file.getvalue())
    expected = whole.result()
    for state in states[:: max(1, len(states) // 5)]:
        again = run(seed=9)
        with again:
            again.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
            for _ in again:
                pass
        found = again.result()
        assert found.x.tolist() == expected.x.tolist()
        assert (found.score, found.evaluations) == (expected.score, expected.evaluations)


def test_the_method_s_own_point_may_win() -> None:
    """Of an in-place method that is where its last update went, which no loss was computed at."""
    x = torch.full((2,), 3.0, dtype=torch.float64)
    seen: list[list[float]] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(x.tolist())
        return (x**2).sum()

    result = minimize(loss, x, "torch.sgd(lr=0.1)", budget="60fe", score=lambda x: float((x**2).sum()))
    assert x.tolist() not in seen
    assert result.score == float((x**2).sum()) < result.best_loss


def test_buffers_go_with_their_candidate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    inputs = torch.randn(16, 2, dtype=torch.float64) + 3
    found: dict[float, list[float]] = {}

    def score(model: nn.Module) -> float:
        told = -float(sum(w.detach().sum() for w in model.parameters()))
        found[told] = model[0].running_mean.tolist()  # type: ignore[index]
        return told

    result = minimize(
        lambda model: (model(inputs) ** 2).mean(), model, "torch.adam(lr=0.1)", budget="60fe", score=score
    )
    assert len({tuple(mean) for mean in found.values()}) > 1
    assert result.score is not None
    assert model[0].running_mean.tolist() == found[result.score]  # type: ignore[union-attr]


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_without_a_finite_score_it_is_as_without_one(spoilt: float) -> None:
    x, y = start(), start()
    result = minimize(
        lambda x: (x**2).sum(), x, "pso", budget=60, seed=1, bounds=(-2, 2), score=lambda x: spoilt
    )
    minimize(lambda x: (x**2).sum(), y, "pso", budget=54, seed=1, bounds=(-2, 2))
    assert result.score is None
    assert x.tolist() == y.tolist()


def test_exceptions_pass_and_the_model_holds_what_it_would_without() -> None:
    class Broken(Exception):
        pass

    def broken(x: Any) -> float:
        raise Broken

    x, y = start(), start()
    minimize(lambda x: (x**2).sum(), y, "cmaes", budget=54, seed=1)
    with pytest.raises(Broken):
        minimize(lambda x: (x**2).sum(), x, "cmaes", budget=60, seed=1, score=broken)
    assert x.tolist() == y.tolist()

    calls: list[int] = []

    def breaks(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 20:
            raise Broken
        return (x**2).sum()

    noisy = Noisy()
    with pytest.raises(Broken):
        minimize(breaks, start(), "cmaes", budget=60, seed=1, batch="loop", score=noisy.score)
    assert not noisy.scored, "an ending by an exception is not scored"


def test_an_exception_in_a_score_leaves_an_in_place_method_where_it_stood() -> None:
    x, y = start(), start()
    minimize(Noisy().loss, y, "torch.adam(lr=0.1)", budget=54, seed=1)
    calls: list[int] = []

    def third(x: Tensor) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return -float(len(calls))

    with pytest.raises(KeyboardInterrupt):
        minimize(Noisy().loss, x, "torch.adam(lr=0.1)", budget=60, seed=1, score=third)
    assert x.tolist() == y.tolist()


def test_where_the_weights_stand_is_not_where_they_were_asked() -> None:
    noisy = Noisy()
    objective = hybridopt.Objective(noisy.loss, start(), score=noisy.score)
    assert objective.scores is not None
    with objective:
        objective.answer(Request(Kind.VALUE, np.array([1.0, 2.0, 3.0])))
        objective.vector.write([0.0, 0.0, 0.5])
        assert objective.scores.choose(None, objective.ledger) == 0.25
    assert [p.tolist() for p in noisy.scored] == [[0, 0, 0.5], [1, 2, 3]]


def test_wrong_arguments_are_named() -> None:
    for wrong in (0, 2.5, True):
        with pytest.raises(ObjectiveError, match="candidates: expected a whole number of at least 1"):
            hybridopt.Objective(lambda x: (x**2).sum(), start(), score=lambda x: 0.0, candidates=wrong)  # type: ignore[arg-type]
    for name in ("score", "surrogate"):
        with pytest.raises(ObjectiveError, match=f"^{name}: expected a function, got int$"):
            hybridopt.Objective(lambda x: (x**2).sum(), start(), **{name: 3})
    two: Any = lambda x, y: 0.0  # noqa: E731
    with pytest.raises(ObjectiveError, match=r"^score: expected a function of the model .* it needs x, y"):
        hybridopt.Objective(lambda x: (x**2).sum(), start(), score=two)
    for value, message in (
        ("a", "a number or a one-element tensor, got str"),
        (torch.ones(2), "one real number"),
    ):
        with pytest.raises(ObjectiveError, match=f"^score: expected {message}"):
            hybridopt.minimize(lambda x: (x**2).sum(), start(), "cmaes", budget=9, score=lambda x, v=value: v)


def test_constraints_are_refused() -> None:
    with pytest.raises(ObjectiveError, match="score: expected a loss without constraints"):
        hybridopt.minimize(
            lambda x: float((x**2).sum()),
            np.ones(2),
            "cmaes",
            budget=50,
            score=lambda x: 0.0,
            constraints=lambda x: x,
        )
