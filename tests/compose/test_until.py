"""When stages end: limits, shares of a budget, and rules that look at the path."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hybridopt
from hybridopt import Reason, Share, Stage, method
from hybridopt.errors import BudgetError, MethodError
from hybridopt.ledger import Budget, Ledger
from hybridopt.until import (
    Switch,
    converged,
    evaluations,
    forward_equivalents,
    gradient_norm,
    plateau,
    predicate,
    seconds,
    step_size,
    steps,
    target,
)
from tests.driving import Recorded, rosenbrock, start, whole

X0 = [-1.2, 1.0, 0.3]


def stages(text: Any, budget: Any = 2000, loss: Any = rosenbrock, **options: Any) -> Any:
    x = torch.tensor(options.pop("x0", X0), dtype=torch.float64)
    options = {"bounds": (-2, 2), "seed": 3} | options
    return hybridopt.minimize(loss, x, text, budget=budget, **options).stages


def quarter(view: Any) -> bool:
    """A rule of a user's."""
    return view.ledger.evaluations % 25 == 0


# -- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "adam until plateau(50)",
        "adam until plateau(50, tolerance=0.1)",
        "adam(lr=0.1, evaluations=90) until plateau(50) | gradient_norm(1e-06)",
        "adam until target(0.5) & evaluations(9) | step_size(0.1)",
        "adam until (target(0.5) | step_size(0.1)) & converged",
        "adam(evaluations=20%) > scipy.slsqp(forward_equivalents=12.5%, handover=point)",
        "(adam > scipy.slsqp)(seconds=3.0) until plateau(5) > cmaes",
        "(adam until plateau(5))(evaluations=50) > cmaes",
        "adam until predicate('tests.compose.test_until:quarter')",
        "cycle(adam(steps=5) until plateau(9) > cmaes(evaluations=20), rounds=3)",
        "cycle(adam(steps=5), evaluations=90) > cmaes",
        "restart(scipy.slsqp, begin_at=uniform, restarts=4)",
        "restart(cmaes(popsize=6, evaluations=60), sigma=0.5, grow=popsize, factor=1.5)",
        "restart(cycle(adam(steps=2), rounds=2)) > scipy.slsqp",
    ],
)
def test_text_is_what_is_printed(text: str) -> None:
    made = method(text)
    assert str(made) == text
    assert method(str(made)) == made


def test_python_and_text_are_one_value() -> None:
    adam = method("adam", lr=0.1)
    assert adam.until(plateau(50) | gradient_norm(1e-6)) == method(
        "adam(lr=0.1) until plateau(50) | gradient_norm(1e-6)"
    )
    assert adam.until(target(1) & (steps(3) | converged)) == method(
        "adam(lr=.1) until target(1) & (steps(3) | converged)"
    )
    assert (
        adam.limit(evaluations="20%")
        == adam.limit(evaluations=Share(20))
        == method("adam(lr=.1, evaluations=20%)")
    )
    assert adam.limit(steps=9).until(plateau(5)) == adam.until(plateau(5) | steps(9))
    assert method("adam(lr=.1) until plateau(5)").until(step_size(1)) == adam.until(plateau(5) | step_size(1))  # type: ignore[attr-defined]


def test_limits_leave_the_rule() -> None:
    """A limit holds exactly, so it becomes one wherever that means the same; of two the first reached holds."""
    made = method("adam", evaluations=80).until(
        plateau(5) | evaluations(50) | seconds(9.0) | target(0.5) | forward_equivalents("10%") | steps(7)
    )
    assert isinstance(made, Stage)
    assert (made.budget, made.steps) == (Budget(evaluations=50, seconds=9.0, target=0.5), 7)
    assert (made.shares, made.rule) == ((("forward_equivalents", Share(10)),), plateau(5))
    assert method("adam until evaluations(50)") == method("adam(evaluations=50)")
    assert method("adam", target=1.0).until(target(2.0)).budget.target == 2.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text, message, place",
    [
        ("adam until plato(5)", r"unknown switch rule 'plato'; nearest: plateau", 12),
        ("adam until", "expected a switch rule", 11),
        (
            "adam until plateau",
            r"plateau: missing a required argument: 'window'; a rule is written plateau\(window",
            12,
        ),
        ("adam until plateau(5, tol=2)", "plateau: got an unexpected keyword argument 'tol'", 12),
        ("adam until plateau(a)", "plateau: expected window to be a whole number, got 'a'", 12),
        ("race(adam, sgd)(steps=5)", "expected limits inside the parentheses before", 16),
        ("adam(lr=1)(steps=5) > sgd", "expected limits inside the parentheses before", 11),
        ("adam until plateau(0)", "plateau: expected window >= 1, got 0", 12),
        ("adam until plateau(5, tolerance=-1)", "expected tolerance >= 0, got -1", 12),
        ("adam until plateau(5) & evaluations(20%)", "a share .* is a limit of its own", 25),
        ("adam until gradient_norm(0)", "expected tolerance > 0, got 0", 12),
        ("adam until (plateau(5) | target(1)", "to close the group of rules", 35),
        ("adam(evaluations=0%)", "a percentage above 0 and at most 100, got 0", 18),
        ("adam until steps(20%)", "expected a number of steps, got a share, 20%", 12),
        ("adam until target(20%)", "expected a number of target, got a share, 20%", 12),
        ("adam until evaluations(-5) & plateau(3)", "expected evaluations > 0, got -5", 12),
        ("adam(target=5%)", "expected a loss as target, got 5%", 1),
        ("adam(evaluations=9, handover=some)", "expected handover to be one of all, point, got 'some'", 1),
        (
            "adam until predicate('no.such:place')",
            "expected the place of a function, got 'no.such:place'",
            12,
        ),
    ],
)
def test_errors_point_at_the_character(text: str, message: str, place: int) -> None:
    with pytest.raises(MethodError, match=rf"(?s){message}.*at character {place}:"):
        method(text)


def test_what_is_no_rule() -> None:
    with pytest.raises(MethodError, match=r"expected a rule of hybridopt\.until, got 3"):
        method("adam").until(3)
    with pytest.raises(MethodError, match="expected a rule beside"):
        plateau(3) | 4  # type: ignore[operator]
    with pytest.raises(MethodError, match="unknown limit 'evaluation'; nearest: evaluations"):
        method("adam").limit(evaluation=4)
    with pytest.raises(BudgetError, match="expected a percentage such as '20%', got 'many'"):
        evaluations("many")
    with pytest.raises(BudgetError, match=r"expected a percentage such as '20%', got '1\.2\.3%'"):
        evaluations("1.2.3%")


# -- shares of a budget ------------------------------------------------------------------------------------------


def test_a_share_is_of_the_enclosing_budget() -> None:
    found = stages(
        "pso(evaluations=20%) > cmaes(evaluations=25%) > (pso(evaluations=50%) > cmaes)(evaluations=31)", 137
    )
    assert [s.spent["evaluations"] for s in found] == [27, 34, 31]
    inner = Recorded()
    run, _ = start(
        method("cmaes(evaluations=9) > (pso(evaluations=50%) > cmaes)(evaluations=31)"), 137, loss=inner
    )
    with run:
        for _ in run:
            if run.optimizer.state_dict()["index"] == 1:
                grouped = run.optimizer._child.reports  # type: ignore[attr-defined]
    assert [s.spent["evaluations"] for s in grouped] == [15, 16]


def test_a_share_of_what_is_not_limited_is_one_of_what_is() -> None:
    found = stages("adam(evaluations=20%) > pso(evaluations=10%)", "300fe")
    assert [s.spent["forward_equivalents"] for s in found] == [60, 30]
    found = stages("adam(forward_equivalents=20%) > pso", Budget(evaluations=40, seconds=1e6))
    assert found[0].spent["evaluations"] == 8
    assert found[0].reason is Reason.EVALUATIONS


def test_a_share_of_nothing() -> None:
    scope = Ledger(shares={"evaluations": Share(20)}, label="adam")
    with pytest.raises(BudgetError, match=r"adam: evaluations=20% expects an enclosing budget with a limit"):
        scope.resolve([Ledger(Budget(target=1.0))])


def test_the_lower_of_a_share_and_a_number() -> None:
    assert stages("pso(evaluations=10) until evaluations(50%) > cmaes", 40)[0].spent["evaluations"] == 10
    assert stages("pso(evaluations=30) until evaluations(50%) > cmaes", 40)[0].spent["evaluations"] == 20


def test_a_begun_stage_keeps_its_share_when_the_budget_is_raised() -> None:
    chain = method("pso(swarmsize=5, evaluations=50%) > cmaes(evaluations=50%)")
    run, _ = start(chain, 20)
    run.step()
    state = run.state_dict()
    run.finish()
    again, loss = start(chain, 100)
    again.load_state_dict(state)
    with again:
        for _ in again:
            pass
    assert [s.spent["evaluations"] for s in again.result().stages] == [10, 50]


@pytest.mark.parametrize("percent", [20, 12.5, 100, 33.3, 1e-3])
def test_a_share_prints_as_it_reads(percent: float) -> None:
    assert Share.read(str(Share(percent))) == Share(percent)


# -- rules that look ---------------------------------------------------------------------------------------------


def test_plateau_counts_evaluations() -> None:
    """A loss that stops falling after 30 evaluations ends a stage with a window of 40 after 70."""
    calls: list[int] = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return (x**2).sum() * 0 + max(10.0 - len(calls) / 3, 0.0)

    first = stages("adam until plateau(40) > slsqp(evaluations=1)", loss=loss, batch="loop")[0]
    assert (first.spent["evaluations"], first.reason, first.message) == (
        70,
        Reason.SWITCHED,
        "until plateau(40)",
    )


@pytest.mark.parametrize("drop, ended", [(0.002, False), (0.0005, True)])
def test_plateau_is_relative(drop: float, ended: bool) -> None:
    """An improvement of 0.2 % in each window goes on, one of 0.05 % ends it."""
    calls: list[int] = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return (x**2).sum() * 0 + 1e3 * (1 - drop) ** (len(calls) / 20)

    found = stages("adam until plateau(20)", 100, loss=loss, batch="loop")
    assert (found[0].reason is Reason.SWITCHED) is ended


def test_plateau_of_a_noisy_loss() -> None:
    """The lowest draw goes on falling; the mean does not. A falling mean is not taken for a plateau."""

    def loss(x: Tensor) -> Tensor:
        return (x**2).sum() + 0.3 * torch.randn((), dtype=torch.float64)

    flat = stages("torch.sgd(lr=0.0) until plateau(40) > torch.sgd(steps=1)", 3000, loss=loss, bounds=None)[0]
    assert flat.reason is Reason.SWITCHED
    assert flat.spent["evaluations"] < 200
    falling = stages(
        "torch.sgd(lr=0.003) until plateau(40)", 120, loss=loss, x0=[9.0, 9.0, 9.0], bounds=None
    )[0]
    assert falling.reason is None


def test_gradient_norm_of_sparse_gradients() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    rows = torch.tensor([0, 2, 2])

    def loss(m: torch.nn.Module) -> Tensor:
        return ((m(rows) - 1) ** 2).sum()  # type: ignore[no-any-return]

    result = hybridopt.minimize(
        loss, embedding, "sparse_adam(lr=0.05) until gradient_norm(0.01)", budget=900, seed=0
    )
    assert result.reason is Reason.SWITCHED
    dense = torch.nn.Embedding.from_pretrained(embedding.weight.detach(), freeze=False)
    loss(dense).backward()
    assert dense.weight.grad is not None
    assert dense.weight.grad.norm() < 0.01


def test_gradient_norm() -> None:
    """In place (`.grad`) and flat alike, at the last gradient."""
    for text in ("adam(lr=0.05)", "torch.sgd(lr=0.001)", "slsqp"):
        run, loss = start(method(f"{text} until gradient_norm(30) > slsqp(evaluations=1)"), 500)
        with run:
            for _ in run:
                pass
        first = run.result().stages[0]
        path = [torch.tensor(np.frombuffer(e.x), requires_grad=True) for e in loss.path]
        norms = [
            float(torch.autograd.grad(rosenbrock(x), x)[0].norm()) for x in path[: first.spent["evaluations"]]
        ]
        assert first.reason is Reason.SWITCHED, text
        assert norms[-1] <= 30, text
        if text != "slsqp":  # a trial of its line search that is not accepted has no gradient
            assert min(norms[:-1]) > 30
    assert stages("pso until gradient_norm(1e9)", 60)[0].reason is None  # there is no gradient to look at


def test_step_size() -> None:
    points: list[list[float]] = []

    def loss(x: Tensor) -> Tensor:
        points.append(x.tolist())
        return (x**2).sum()

    first = stages("torch.sgd(lr=0.1) until step_size(0.05) > slsqp(evaluations=1)", loss=loss, bounds=None)[
        0
    ]
    moves = np.linalg.norm(np.diff(np.array(points[: first.spent["evaluations"]]), axis=0), axis=1)
    assert first.reason is Reason.SWITCHED
    # the update after the last evaluation is the first that moves by less; it shrinks by 0.8 at each step
    assert (moves > 0.05).all()
    assert moves[-1] * 0.8 <= 0.05


def test_predicate_sees_the_stage() -> None:
    seen: list[tuple[int, int, float]] = []

    def rule(view: Any) -> bool:
        seen.append((view.ledger.evaluations, view.steps, view.loss))
        return len(seen) == 7

    made = method("adam").until(predicate(rule)) >> method("slsqp", evaluations=1)
    first = stages(made, loss=rosenbrock)[0]
    assert (first.reason, first.spent["evaluations"]) == (Reason.SWITCHED, 7)
    assert [s[:2] for s in seen] == [(i, i) for i in range(1, 8)]
    assert seen[0][2] == float(rosenbrock(torch.tensor(X0, dtype=torch.float64)))
    assert (
        stages("adam until predicate('tests.compose.test_until:quarter')", 99)[0].spent["evaluations"] == 25
    )


def test_and_waits_for_all() -> None:
    assert stages("adam until target(1e9) & evaluations(12) > slsqp")[0].spent["evaluations"] == 12
    assert stages("adam until target(-1) & evaluations(12)", 40)[0].reason is None
    assert stages("adam until (steps(3) & evaluations(5)) | steps(4) > slsqp")[0].spent["evaluations"] == 4


def test_converged_alone_changes_nothing() -> None:
    plain, ruled = method("slsqp"), method("slsqp until converged")
    assert whole(ruled, 300) == whole(plain, 300)
    assert stages(ruled)[0].reason is Reason.CONVERGED


def test_noise_ends_a_stage_with_its_first_step() -> None:
    def noisy(x: Tensor) -> Tensor:
        return rosenbrock(x) + torch.randn(())

    text = "adam until noise > cmaes"
    assert [s.spent["evaluations"] for s in stages(text, 100, noisy)] == [1, 99]
    assert [s.spent["evaluations"] for s in stages(text, 100, noisy, keep="best")] == [100]
    assert [s.spent["evaluations"] for s in stages(text, 100, keep="last")] == [1, 99]
    assert whole(method(text)) == whole(method("adam"))
    x = torch.tensor(X0, dtype=torch.float64)
    assert not hybridopt.minimize(rosenbrock, x, text, budget=20, seed=3).notes
    assert hybridopt.minimize(rosenbrock, x, "adam > cmaes", budget=20, seed=3).notes == (
        "never began: cmaes",
    )


def test_a_rule_never_met_changes_nothing() -> None:
    for text in ("adam", "slsqp", "cmaes", "torch.lbfgs", "pyswarm.pso"):
        rule = "target(-1) & plateau(9) & gradient_norm(1e-300) & step_size(1e-300)"
        assert whole(method(f"{text} until {rule}"), 60) == whole(method(text), 60), text


@pytest.mark.parametrize(
    "rule",
    [
        "plateau(15)",
        "step_size(0.02)",
        "gradient_norm(8) & evaluations(9)",
        "plateau(20, tolerance=0.9) & steps(4)",
    ],
)
@pytest.mark.parametrize("noisy", [False, True])
def test_what_a_rule_remembers_is_saved(rule: str, noisy: bool) -> None:
    """Saved and loaded after every step, the stages end where they end undisturbed."""
    chain = method(f"cycle(adam(lr=0.02) until {rule} > cmaes(evaluations=10) until {rule})")

    def loss(x: Tensor) -> Tensor:
        noise = torch.randn((), dtype=torch.float64) if noisy else 0.0
        return rosenbrock(x) + 0.1 * noise

    def reports(cut: bool) -> list[Any]:
        run, _ = start(chain, 90, loss=Recorded(loss))
        while run.step() is not None:
            if cut:
                state = run.state_dict()
                run.finish()
                run, _ = start(chain, 90, loss=Recorded(loss))
                run.load_state_dict(state)
        return [(s.reason, s.spent["evaluations"], s.best_loss) for s in run.finish().stages]

    undisturbed = reports(False)
    assert len(undisturbed) > 1
    assert reports(True) == undisturbed


def test_rules_are_switches() -> None:
    for rule in (
        plateau(3),
        converged,
        steps(3),
        gradient_norm(1),
        step_size(1),
        predicate(quarter),
        steps(1) & steps(2),
    ):
        assert isinstance(rule, Switch)
        assert hash(rule) == hash(rule)
    assert math.isinf(Ledger().best_loss)


def test_a_plateau_waits_for_the_constraints() -> None:
    """While the violation falls the loss may rise."""

    def constraint(x: Tensor) -> Tensor:
        return x.sum() - 2

    x = [0.1, 0.1, 0.1]
    options = {"constraints": constraint, "x0": x, "bounds": None, "loss": lambda x: (x**2).sum()}
    alone = stages("slsqp until converged", 300, **options)[0]
    ruled = stages("slsqp until plateau(2)", 300, **options)[0]
    assert ruled.best_loss == pytest.approx(alone.best_loss, rel=1e-4)
    missed = stages("slsqp until target(1.0) & evaluations(1)", 300, **options)[0]
    assert missed.reason is Reason.CONVERGED  # the start has a lower loss, and breaks the constraint


@pytest.mark.parametrize("rule", ["flat", "no_gradient", "noise | flat", "flat & no_gradient"])
def test_slopes_that_are_not_there(rule: str) -> None:
    """A count has neither gradient nor differences, a loss that autograd cannot see has these; resumed alike."""
    text = f"restart(scipy.slsqp) until {rule} > random_search(evaluations=9)"
    assert str(method(text)) == text
    smooth: Any = lambda x: (x.detach() ** 2).sum()  # noqa: E731
    counts: Any = lambda x: (x > 0.3).double().sum()  # noqa: E731
    seen: Any = lambda x: (x**2).sum()  # noqa: E731
    for loss, ended in ((counts, True), (smooth, rule == "no_gradient"), (seen, False)):
        paths = []
        for cut in (None, 1, 2):
            x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
            with hybridopt.Run(loss, x, text, budget=60, seed=0) as run:
                for _ in range(cut or 0):
                    run.step()
                state = run.state_dict()
            x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
            with hybridopt.Run(loss, x, text, budget=60, seed=0) as run:
                run.load_state_dict(state)
                list(run)
            result = run.result()
            assert (result.stages[0].reason is Reason.SWITCHED) == ended, (loss, cut)
            paths.append((result.best_loss, result.evaluations, x.tolist()))
        assert paths[0] == paths[1] == paths[2]
