"""What PSO and DE make of losses that they remember and that were lucky draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import ParameterVector
from hybridopt.objective import Objective
from hybridopt.optimizer import Answer, step
from hybridopt.population import PSO, DifferentialEvolution
from tests.population.drive import Floats, bowl

METHODS = [PSO(swarmsize=8), PSO(swarmsize=8, topology="ring"), DifferentialEvolution(popsize=8)]


def begin(method: Any, seed: int = 1) -> Any:
    return method.start(ParameterVector(torch.full((3,), 0.9, dtype=torch.float64), bounds=(-1, 1)), seed)


def tell(run: Any, losses: Floats, paired: bool = False, keeps_best: bool = False) -> None:
    run.tell(Answer(losses=losses, keeps_best=keeps_best, paired=paired))


def told(method: Any, losses: Any) -> Any:
    """A run whose first generation had these losses."""
    run = begin(method)
    run.ask()
    tell(run, np.array(losses, dtype=float))
    return run


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_lucky_draw_does_not_survive(method: Any) -> None:
    run = begin(method)
    losses = bowl(run.ask().x)
    losses[5] = -100.0
    tell(run, losses)
    lucky = run.strategy.x[5].copy()
    assert run.strategy.losses.min() == -100
    x = run.ask().x
    np.testing.assert_array_equal(x[0], lucky)
    tell(run, bowl(x))
    assert losses[5] == -100, "what was told is not written to"
    assert run.strategy.losses.min() > 0
    assert run.incumbent.loss == bowl(lucky[None])[0]
    np.testing.assert_array_equal(run.strategy.losses, bowl(run.strategy.x))
    x = run.ask().x
    assert not (x[0] == lucky).all()
    tell(run, bowl(x))
    assert run.incumbent.loss < bowl(lucky[None])[0]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_who_is_evaluated_again(method: Any) -> None:
    """First the lowest of those whose loss did not choose them, then the three lowest of all others."""
    run = told(method, [9, 8, 7, 6, 5, 4, 3, 2])
    points = run.strategy.x.copy()
    x = run.ask().x
    assert len(x) == 4 + 8
    np.testing.assert_array_equal(x[:4], points[[7, 6, 5, 4]])
    losses = np.array([6.5, 6.2, 6.1, 1e3] + [1e4] * 8)  # what they lead by was luck, and no new one is taken
    tell(run, losses)
    assert run.strategy.losses.tolist() == [9, 8, 7, 6, 1e3, 6.1, 6.2, 6.5]
    np.testing.assert_array_equal(run.ask().x[:4], points[[5, 3, 6, 7]])


def test_of_few_points_all_are() -> None:
    run = told(PSO(swarmsize=2), [2.0, 1.0])
    np.testing.assert_array_equal(run.ask().x[:2], run.strategy.x[[1, 0]])
    assert len(run.ask().x) == 2 + 2


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_is_told_again_is_averaged_without_the_draw_that_chose(method: Any) -> None:
    run = told(method, [-50.0] + [100.0] * 7)
    for k, loss in enumerate([4.0, 6.0, 11.0]):
        run.ask()
        tell(run, np.array([loss] + [100.0] * 3 + [200.0] * 8))
        assert run.strategy.losses[0] == pytest.approx([4, 5, 7][k])
        assert run.strategy.checks[0] == k + 1
        assert run.incumbent.loss == loss
    for _ in range(300):
        run.strategy.correct(np.array([1.0] + [100.0] * 3), paired=False)
    assert run.strategy.losses[0] == pytest.approx(1, abs=1e-4)  # the first ones have faded


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_rejected_when_told_again(method: Any) -> None:
    """It teaches nothing: what is known of the point stays, and the luck of the generation is that of the others."""
    run = told(method, [1.0, 2.0] + [math.inf] * 6)
    run.ask()
    tell(run, np.array([math.inf, 5.0, math.inf, 7.0] + [math.inf] * 7 + [50.0]), paired=True)
    losses = run.strategy.losses
    assert losses[0] == 1
    assert losses[1] == 2
    assert losses[[2, 3]].tolist() == [math.inf, 4]  # 3 lower: the luck of the only one that was finite twice
    assert losses[7] == 47
    np.testing.assert_array_equal(run.strategy.checks[:3], [0, 1, 0])
    np.testing.assert_array_equal(run.ask().x[0], run.strategy.x[1])  # confirmed


@pytest.mark.filterwarnings("ignore:loss nan at evaluation 1")
@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize("method", ["pso(swarmsize=8)", "de(popsize=8)"])
def test_a_first_generation_without_a_finite_loss(method: str, noise: Any) -> None:
    calls = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        value = x.pow(2).sum() + torch.randn((), dtype=x.dtype)
        return value if len(calls) > 20 else value * math.nan

    x = torch.ones(3, dtype=torch.float64)
    options: dict[str, Any] = {"bounds": (-4, 4), "batch": "loop", "noise": noise}
    result = hybridopt.minimize(loss, x, method, budget=200, seed=1, **options)
    assert result.evaluations == len(calls) == 200
    assert x.abs().max() < 3


def test_minibatches_do_not_carry_remembered_losses_away() -> None:
    """The remembered losses sink below the true ones by a fraction of what they would with all taken for luck."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x - 0.3 + 0.3 * torch.randn(5, dtype=x.dtype)).pow(2).sum()

    x = torch.full((5,), 1.5, dtype=torch.float64)
    run = hybridopt.Run(loss, x, "de", budget=2000, seed=0, bounds=(-4, 4))
    for _ in run:
        pass
    strategy: Any = run.optimizer.strategy  # type: ignore[attr-defined]
    assert strategy.losses.min() > -20  # -29 if the luck of chosen points counts as that of the generation
    handed = run.optimizer.hand_over()
    assert handed.points is not None
    assert handed.losses is None, "good for comparisons only"
    np.testing.assert_array_equal(handed.points[0], strategy.favourite())


def test_luck_of_a_whole_generation_is_compared_away() -> None:
    """Where its members draw the same numbers; DE then walks as without noise, and else does not."""
    quiet, common, separate = (begin(DifferentialEvolution(popsize=8)) for _ in range(3))
    strayed = False
    for luck in (5.0, -3.0, 0.5, -7.0, 2.0, -1.0, 4.0, -2.0):
        x, y, z = (run.ask().x for run in (quiet, common, separate))
        np.testing.assert_allclose(y[-8:], x, rtol=0, atol=1e-9)
        strayed |= not np.allclose(z[-8:], x)
        tell(quiet, bowl(x), keeps_best=True)
        tell(common, bowl(y) + luck, paired=True)
        tell(separate, bowl(z) + luck)
    assert strayed
    assert common.incumbent.loss == bowl(y[:1])[0] + luck  # what it was told, luck and all


def test_who_was_not_evaluated_again_leads_no_swarm() -> None:
    run = told(PSO(swarmsize=8), [9, 8, 7, 6, 5, 4, 3, 2])
    run.ask()
    losses = np.array([6.5, 6.2, 6.1, 1e3] + [10.0] * 8)
    losses[4] = -100.0  # the first particle's move
    tell(run, losses)
    swarm = run.strategy
    assert swarm.losses.argmin() == 0
    assert (swarm._leaders() == 5).all()
    run.ask()
    tell(run, np.array([6.1, -99.0, 1e3, 1e3] + [1e3] * 8))
    assert (swarm._leaders() == 0).all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_new_point_in_its_place_begins_anew(method: Any) -> None:
    run = told(method, [9, 8, 7, 6, 5, 4, 3, 2])
    run.ask()
    losses = np.array([6.5, 6.2, 6.1, 1e3] + [1e4] * 8)
    losses[4 + 5] = -100.0
    tell(run, losses)
    assert run.strategy.checks.tolist() == [0, 0, 0, 0, 1, 0, 1, 1]
    np.testing.assert_array_equal(run.ask().x[0], run.strategy.x[6])


def test_who_was_evaluated_again_is_known_when_a_population_shrinks() -> None:
    run = begin(DifferentialEvolution(popsize=12, reduce_over=80))
    tell(run, bowl(run.ask().x) - 50)
    asked = 12
    while len(run.strategy.x) > 8:
        x = run.ask().x
        asked += len(x)
        losses = bowl(x)
        losses[4:] += 1e3
        tell(run, losses)
        assert ((run.strategy.losses > 0) == (run.strategy.checks > 0)).all()
    assert len(np.unique(run.strategy.checks > 0)) == 2
    assert run.strategy.evaluations == asked, "those count too on the way to `reduce_over`"


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_without_noise_nothing_is_evaluated_again(method: Any) -> None:
    run = begin(method)
    for _ in range(5):
        x = run.ask().x
        assert len(x) == 8
        tell(run, bowl(x), keeps_best=True)
    assert not run.strategy.checks.any()
    np.testing.assert_array_equal(run.strategy.losses, bowl(run.strategy.x))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("method", [*METHODS, DifferentialEvolution(popsize=12, reduce_over=80)], ids=str)
def test_saved_between_any_two_steps(method: Any, paired: bool) -> None:
    rng = np.random.default_rng(3)
    run = begin(method)
    for i in range(10):
        if i % 2:
            run.ask()
        other = begin(method, seed=7)
        other.load_state_dict(run.state_dict())
        run = begin(method, seed=8) if i == 7 else run
        run.load_state_dict(other.state_dict())
        x, y = run.ask().x, other.ask().x
        np.testing.assert_array_equal(x, y)
        losses = bowl(x) + rng.standard_normal(len(x))
        tell(run, losses, paired)
        tell(other, losses, paired)
        assert run.incumbent.loss == other.incumbent.loss
        np.testing.assert_array_equal(run.incumbent.x, other.incumbent.x)
        np.testing.assert_array_equal(run.strategy.losses, other.strategy.losses)
        np.testing.assert_array_equal(run.strategy.checks, other.strategy.checks)
    assert run.strategy.checks.any()


def common(x: torch.Tensor) -> torch.Tensor:
    return ((x - 0.3) ** 2).sum() + torch.randn((), dtype=x.dtype)


def uneven(x: torch.Tensor) -> torch.Tensor:
    return ((x - 0.3) ** 2).sum() * (1 + 0.3 * torch.randn((), dtype=x.dtype))


@pytest.mark.parametrize("batch", ["auto", "loop"])
def test_every_evaluation_is_counted(batch: Any) -> None:
    with Objective(common, torch.ones(3), 200, bounds=(-2, 2), batch=batch) as objective:
        run = PSO(swarmsize=8).start(objective.vector, 0)
        for count in (8, 20, 32, 44):
            step(run, objective)
            assert objective.ledger.evaluations == count


@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(method: Any, noise: Any) -> None:
    """Here among the points that are evaluated again."""

    def run(budget: int) -> hybridopt.Run:
        start = torch.full((3,), 1.5, dtype=torch.float64)
        return hybridopt.Run(uneven, start, method, budget=budget, seed=1, bounds=(-4, 4), noise=noise)

    first, second, whole = run(34), run(120), run(120)
    assert list(first)
    second.load_state_dict(first.state_dict())
    first.finish()
    assert list(second)
    assert list(whole)
    a, b = second.finish(), whole.finish()
    assert (a.evaluations, a.loss, a.best_loss) == (120, b.loss, b.best_loss)
    np.testing.assert_array_equal(a.x, b.x)


@pytest.mark.parametrize(("loss", "noise"), [(common, "shared"), (uneven, "independent")])
@pytest.mark.parametrize(("method", "near"), [(PSO(), 4e-4), (DifferentialEvolution(), 1e-8)])
def test_finds_the_minimum_in_noise(method: Any, near: float, loss: Any, noise: Any) -> None:
    """With losses remembered as drawn the worst of these runs ends at 2e-3 and more, or 1e-5 (DE, uneven)."""
    for seed in range(3):
        start = torch.full((3,), 1.5, dtype=torch.float64)
        result = hybridopt.minimize(loss, start, method, budget=2000, seed=seed, bounds=(-4, 4), noise=noise)
        assert float(((result.x - 0.3) ** 2).sum()) < near


@pytest.mark.parametrize(("noise", "paired"), [("shared", True), ("independent", False), ("fixed", False)])
def test_the_objective_says_who_draws_the_same_numbers(noise: Any, paired: bool) -> None:
    for loss, drawn in ((common, True), (lambda x: (x**2).sum(), False)):
        with Objective(loss, torch.ones(3), 200, bounds=(-2, 2), noise=noise) as objective:
            answer = objective.answer(PSO(swarmsize=8).start(objective.vector, 0).ask())
            assert answer.paired == (paired and drawn)
