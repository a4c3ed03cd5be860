"""Torch optimizers in the harness: bit for bit what a loop written by hand does, whatever stands beside it."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hybridopt
from hybridopt import Objective, Reason, Run, method
from hybridopt.errors import ClosedError, MethodError, MissingGradient, ReplayMismatch, StateError
from hybridopt.optimizer import Kind, Request
from tests.driving import resident, rosenbrock
from tests.third_party import Extragradient, SignSGD

Losses = list[float]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:, :2] * x[:, 2:]).to(dtype)


def regression(dtype: torch.dtype = torch.float64) -> Callable[[nn.Module], Tensor]:
    x, y = data(dtype)
    return lambda model: ((model(x) - y) ** 2).mean()


def by_hand(
    model: nn.Module, loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer, evaluations: int
) -> Losses:
    """The loop of torch's documentation; the losses of all closure calls."""
    losses: Losses = []

    class Enough(Exception):
        pass

    def closure() -> Tensor:
        if len(losses) == evaluations:
            raise Enough
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        losses.append(value.item())
        return value

    try:
        while len(losses) < evaluations:
            optimizer.step(closure)
    except Enough:
        pass
    return losses


def recorded(loss: Callable[[Any], Tensor], losses: Losses) -> Callable[[Any], Tensor]:
    def inner(model: Any) -> Tensor:
        value = loss(model)
        losses.append(value.item())
        return value

    return inner


def weights(run: Run) -> list[Tensor]:
    """The optimizer's own iterate."""
    return run.optimizer.state_dict()["weights"]  # type: ignore[no-any-return]


# -- as by hand --------------------------------------------------------------------------------------------------

BY_HAND: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {"lr": 0.05}),
    (torch.optim.Adam, {"lr": 0.05, "amsgrad": True, "betas": (0.8, 0.99), "weight_decay": 0.01}),
    (torch.optim.AdamW, {"lr": 0.05, "foreach": True}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adagrad, {"lr": 0.1}),
    (torch.optim.Adamax, {"lr": 0.05}),
    (torch.optim.ASGD, {"lr": 0.05, "t0": 5}),
    (torch.optim.NAdam, {"lr": 0.05}),
    (torch.optim.RAdam, {"lr": 0.05}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (torch.optim.Rprop, {"lr": 0.01, "etas": (0.4, 1.3)}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.LBFGS, {}),
    (torch.optim.LBFGS, {"line_search_fn": "strong_wolfe", "history_size": 4}),
    (torch.optim.LBFGS, {"max_iter": 3, "lr": 0.3}),
    (torch.optim.Adafactor, {"lr": 0.05}),
    (SignSGD, {}),
    (Extragradient, {"lr": 0.05}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cls, options", BY_HAND)
def test_as_by_hand(cls: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype) -> None:
    evaluations = 37
    model, loss = network(dtype), regression(dtype)
    expected = by_hand(model, loss, cls(model.parameters(), **options), evaluations)
    losses: Losses = []
    run = Run(recorded(loss, losses), network(dtype), method(cls, **options), budget=evaluations, seed=0)
    with run:
        for _ in run:
            pass
        stands = weights(run)
    assert losses == expected
    if cls not in (torch.optim.LBFGS, Extragradient):  # those stand inside a step
        assert all(torch.equal(a, b) for a, b in zip(stands, model.parameters(), strict=True))


def test_lbfgs_on_the_seed_problem() -> None:
    """98 evaluations by hand (torch 2.13), and no more than those that it asks for here."""
    torch.manual_seed(42)
    np.random.seed(42)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double()
    x = torch.randn(32, 2).double()
    x[:, 1] *= 1000
    hybridopt.ParameterVector(model).write(0.1 * np.random.randn(10))
    twin = copy.deepcopy(model)

    def loss(m: nn.Module) -> Tensor:
        return ((m(x) - x) ** 2).mean()

    losses: Losses = []
    result = hybridopt.minimize(
        recorded(loss, losses), model, "torch.lbfgs(line_search_fn=strong_wolfe)", budget=500, seed=42
    )
    assert (result.reason, result.evaluations, result.forward, result.backward) == (
        Reason.CONVERGED,
        98,
        98,
        98,
    )
    optimizer = torch.optim.LBFGS(twin.parameters(), line_search_fn="strong_wolfe")
    assert losses == by_hand(twin, loss, optimizer, 98)


def test_parameter_groups_keep_their_options() -> None:
    def groups(model: nn.Module) -> Any:
        return [
            {"params": list(model[0].parameters()), "lr": 0.2},  # type: ignore[index]
            {"params": list(model[2].parameters()), "momentum": 0.0},  # type: ignore[index]
        ]

    model, twin, loss = network(), network(), regression()
    expected = by_hand(twin, loss, torch.optim.SGD(groups(twin), lr=0.05, momentum=0.9), 20)
    losses: Losses = []

    def closure() -> Tensor:
        return recorded(loss, losses)(model)

    given = groups(model)
    hybridopt.minimize(closure, given, method("torch.sgd", lr=0.05, momentum=0.9), budget=20, seed=0)
    assert losses == expected
    assert [sorted(g) for g in given] == [["lr", "params"], ["momentum", "params"]]


def test_sparse_gradients() -> None:
    def words() -> nn.Module:
        torch.manual_seed(5)
        return nn.Embedding(9, 3, sparse=True).double()

    index = torch.tensor([1, 4, 4, 7])

    def loss(model: nn.Module) -> Tensor:
        return ((model(index) - 1) ** 2).sum()

    model, twin = words(), words()
    before = model.weight.detach().clone()  # type: ignore[operator, union-attr]
    expected = by_hand(twin, loss, torch.optim.SparseAdam(twin.parameters(), lr=0.1), 25)
    losses: Losses = []
    result = hybridopt.minimize(recorded(loss, losses), model, "torch.sparse_adam(lr=0.1)", budget=25, seed=0)
    assert losses == expected
    assert result.best_loss < 0.5 * losses[0]
    untouched = [i for i in range(9) if i not in index.tolist()]
    assert torch.equal(model.weight[untouched], before[untouched])  # type: ignore[index]


# -- bounds, rejected steps, buffers -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["torch.adam(lr=0.5)", "torch.sgd(lr=1.0, momentum=0.9)", "torch.lbfgs"])
def test_projected_onto_bounds(text: str) -> None:
    seen: list[list[float]] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(x.tolist())
        return ((x - torch.tensor([3.0, 0.2])) ** 2).sum()

    x = torch.zeros(2)
    result = hybridopt.minimize(loss, x, text, budget=60, bounds=[(-1, 1), (-0.5, 0.5)], seed=0)
    points = np.array(seen)
    assert np.abs(points[:, 0]).max() == 1
    assert np.abs(points[:, 1]).max() <= 0.5
    assert result.best_loss == pytest.approx(4, abs=1e-2)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(what: str) -> None:
    """Weights and moments stay as they were: the path is the one without that evaluation."""
    model, twin, loss = network(), network(), regression()
    expected = by_hand(twin, loss, torch.optim.Adam(twin.parameters(), lr=0.05), 10)
    losses: Losses = []
    finite: Losses = []
    calls = [0]

    def spoiled(m: nn.Module) -> Tensor:
        calls[0] += 1
        value = loss(m)
        if calls[0] % 3 == 2:
            if what == "loss":
                return value * math.nan
            value.register_hook(lambda g: g * math.nan)
        else:
            losses.append(value.item())
        finite.append(value.item())
        return value

    with pytest.warns(RuntimeWarning, match="at evaluation 2: rejected"):
        result = hybridopt.minimize(spoiled, model, "torch.adam(lr=0.05)", budget=14, seed=0)
    assert losses == expected[: len(losses)]
    assert len(losses) == 9
    assert result.best_loss == min(finite)


@pytest.mark.parametrize("text", ["torch.adam(lr=0.05)", "torch.lbfgs"])
def test_gradients_that_are_nan_for_good_end_the_run(text: str) -> None:
    """Otherwise every further evaluation is made at the same point, until the budget is burnt."""

    def loss(x: Tensor) -> Tensor:
        value = rosenbrock(x)
        calls.append(0)
        if len(calls) > 1:
            value.register_hook(lambda g: g * math.nan)
        return value

    calls: list[int] = []
    with pytest.warns(RuntimeWarning, match="gradient"):
        result = hybridopt.minimize(loss, torch.full((3,), 0.5), text, budget=400, seed=0)
    assert result.reason is Reason.NON_FINITE
    assert result.evaluations <= 40


@pytest.mark.filterwarnings("ignore:loss inf", "ignore:loss nan")
@pytest.mark.parametrize("rate", [0.1, 1e30, 1e38])
@pytest.mark.parametrize("after", ["", " > random_search"])
def test_under_noise_the_last_point_is_one_with_a_finite_loss(rate: float, after: str) -> None:
    """No best point is kept then: a diverging method used to leave, and hand over, weights whose loss is inf or nan."""

    def loss(x: Tensor) -> Tensor:
        return (x**4).sum() * (1 + 0.1 * torch.rand(()))

    for budget in (1, 3, 60):
        x = torch.full((3,), 2.0)
        result = hybridopt.minimize(loss, x, f"sgd(lr={rate}){after}", budget=budget, seed=0)
        assert x.detach().isfinite().all()
        if budget > 1:  # the update after the only evaluation is seen by nobody
            assert loss(x.detach()).isfinite()
        assert result.loss < math.inf


@pytest.mark.filterwarnings("ignore:loss inf", "ignore:loss nan")
@pytest.mark.parametrize("cut", [1, 2, 3, 10])
def test_a_diverged_run_is_resumed_with_its_last_sound_point(cut: int) -> None:
    def loss(x: Tensor) -> Tensor:
        return (x**4).sum() * (1 + 0.1 * torch.rand(()))

    def run(state: Any = None, steps: int = 99) -> tuple[Any, Tensor]:
        x = torch.full((3,), 2.0)
        with hybridopt.Run(loss, x, "sgd(lr=0.1)", budget=60, seed=0) as made:
            if state is not None:
                made.load_state_dict(state)
            for _ in range(steps):
                if made.step() is None:
                    break
            return made.state_dict(), x

    _, whole = run()
    state, _ = run(steps=cut)
    _, resumed = run(state)
    assert torch.equal(whole, resumed)


def test_lbfgs_backs_off_from_a_cliff() -> None:
    """A line search that steps over an edge comes back (told +inf, torch's would interpolate it to nan weights)."""

    def cliff(x: Tensor) -> Tensor:
        return (-torch.log(x) + 3 * x).sum()  # nan below 0; minimum at 1/3

    x = torch.full((2,), 2.9, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="rejected"):
        result = hybridopt.minimize(
            cliff, x, "torch.lbfgs(line_search_fn=strong_wolfe, lr=4)", budget=200, seed=0
        )
    assert result.nonfinite > 0
    assert result.best_loss == pytest.approx(2 * (math.log(3) + 1), abs=1e-9)
    assert result.reason is Reason.CONVERGED


def test_lbfgs_is_not_converged_because_a_step_began_with_nan() -> None:
    """An outer step whose first loss is nan moves nothing; that is no convergence."""
    calls: list[int] = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return rosenbrock(x) * (math.nan if draws.random() < 0.4 and len(calls) > 1 else 1.0)

    for seed in range(4):
        draws = np.random.default_rng(seed)
        calls.clear()
        x = torch.tensor([-1.2, 1.0, 0.3], dtype=torch.float64)
        with pytest.warns(RuntimeWarning, match="rejected"):
            result = hybridopt.minimize(loss, x, "torch.lbfgs(max_iter=4)", budget=150, seed=0)
        assert (result.reason, result.evaluations) == (Reason.EVALUATIONS, 150)


class Normed(nn.Module):
    """A network whose buffers move at every forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out

    def statistics(self) -> list[Tensor]:
        return [b.clone() for b in self.buffers()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batch_norm_statistics_are_those_of_the_loop_by_hand() -> None:
    model, twin, loss = Normed(), Normed(), regression()
    by_hand(twin, loss, torch.optim.Adam(twin.parameters(), lr=0.05), 12)
    hybridopt.minimize(loss, model, "torch.adam(lr=0.05)", budget=12, keep="last", seed=0)
    assert same(model.statistics(), twin.statistics())


def test_batch_norm_statistics_belong_to_the_best_point() -> None:
    model, twin, loss = Normed(), Normed(), regression()
    history: list[tuple[float, list[Tensor], list[Tensor]]] = []
    optimizer = torch.optim.SGD(twin.parameters(), lr=2.0)  # too large on purpose: the last is not the best
    for _ in range(15):
        optimizer.zero_grad()
        value = loss(twin)
        history.append((value.item(), [p.detach().clone() for p in twin.parameters()], twin.statistics()))
        value.backward()
        optimizer.step()
    best = min(history, key=lambda h: h[0])
    assert best is not history[-1]
    hybridopt.minimize(loss, model, "torch.sgd(lr=2.0)", budget=15, seed=0)
    assert same([p.detach() for p in model.parameters()], best[1])
    assert same(model.statistics(), best[2])


def test_line_search_trials_move_no_statistics() -> None:
    """One outer step of LBFGS commits one forward, however many its line search tries."""
    model = Normed()
    run = Run(regression(), model, "torch.lbfgs(line_search_fn=strong_wolfe, max_iter=6)", budget=40, seed=0)
    moved = []
    with run:
        for _ in run:
            moved.append(int(model.layers[1].num_batches_tracked))  # type: ignore[arg-type]
    assert moved[0] == 1
    assert moved[-1] < 12
    assert len(moved) == 40


def test_a_rejected_step_moves_no_statistics() -> None:
    model = Normed()
    loss = regression()
    calls = [0]

    def spoiled(m: nn.Module) -> Tensor:
        calls[0] += 1
        return loss(m) * (math.nan if calls[0] in (3, 4) else 1.0)

    run = Run(spoiled, model, "torch.adam(lr=0.01)", budget=6, seed=0)
    counts = []
    with warnings.catch_warnings(), run:
        warnings.simplefilter("ignore")
        for _ in run:
            counts.append(int(model.layers[1].num_batches_tracked))  # type: ignore[arg-type]
    assert counts == [1, 2, 2, 2, 3, 4]


# -- state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SignSGD, torch.optim.Adam, torch.optim.LBFGS])
def test_a_bf16_weight_keeps_its_state_in_float32(cls: type[torch.optim.Optimizer]) -> None:
    """torch's load_state_dict casts floating state to the weight's dtype; an exact resume must not."""
    loss = regression(torch.bfloat16)

    def fresh() -> Run:
        return Run(loss, network(torch.bfloat16), method(cls, lr=0.05), budget=30, seed=0)

    run = fresh()
    for _ in range(11):
        run.step()
    state = run.state_dict()
    other = fresh()
    other.load_state_dict(state)
    other.optimizer.ask()
    kept = other.optimizer.optimizer.state  # type: ignore[attr-defined]
    live = run.optimizer.optimizer.state  # type: ignore[attr-defined]
    for a, b in zip(live.values(), kept.values(), strict=True):
        for key in a:
            if isinstance(a[key], Tensor):
                assert a[key].dtype == b[key].dtype, key
                assert torch.equal(a[key], b[key]), key
    if cls is SignSGD:
        assert {entry["size"].dtype for entry in kept.values()} == {torch.float32}
    losses = [[step.loss for step in r] for r in (run, other)]
    assert losses[0] == losses[1]
    run.finish()
    other.finish()


def test_changed_options_are_refused() -> None:
    for text, changed in (
        ("torch.adam(lr=0.1)", "torch.adam(lr=0.2)"),
        ("torch.lbfgs", "torch.lbfgs(lr=0.5)"),
    ):
        run = Run(regression(), network(), text, budget=9, seed=0)
        run.step()
        other = Run(regression(), network(), changed, budget=9, seed=0)
        with pytest.raises(StateError, match="it was saved by"):
            other.optimizer.load_state_dict(run.optimizer.state_dict())
        run.finish()
        other.finish()


def lbfgs(budget: int = 60) -> tuple[Run, Losses]:
    losses: Losses = []
    loss = recorded(rosenbrock, losses)
    x = torch.tensor([-1.2, 1.0, 0.3], dtype=torch.float64)
    return Run(loss, x, "torch.lbfgs(line_search_fn=strong_wolfe)", budget=budget, seed=0), losses


def finish(run: Run) -> None:
    with run:
        for _ in run:
            pass


def undisturbed() -> Losses:
    run, losses = lbfgs()
    finish(run)
    return losses


def test_a_tampered_line_search_is_a_mismatch() -> None:
    run, _ = lbfgs()
    for _ in range(30):
        run.step()
    state = run.state_dict()
    run.finish()
    assert len(state["optimizer"]["told"]) > 2
    state["optimizer"]["told"][0][0] *= 0.5
    state["optimizer"]["told"][1][1][0] += 1.0
    state["optimizer"]["fingerprint"]["torch"] = "1.0"
    other, _ = lbfgs()
    other.load_state_dict(state)
    for _ in range(2):  # it loses nothing by it
        with pytest.raises(
            ReplayMismatch, match=r"torch.lbfgs: after \d+ recorded.*torch '1.0' ->.*exact=False"
        ):
            other.step()
    assert len(other.state_dict()["optimizer"]["told"]) == len(state["optimizer"]["told"])
    other.load_state_dict(state, exact=False)
    finish(other)
    assert other.result().best_loss < 1e-6
    assert "began a step anew" in other.result().notes[0]


def test_lbfgs_stepped_from_thirty_threads_in_turn() -> None:
    run, losses = lbfgs()
    for _ in range(30):
        thread = threading.Thread(target=run.step)
        thread.start()
        thread.join()
    finish(run)
    assert losses == undisturbed()


def test_lbfgs_asked_in_one_thread_and_told_in_another() -> None:
    run, losses = lbfgs()
    with run:
        for _ in range(40):
            answer = run.objective.answer(run.optimizer.ask())
            thread = threading.Thread(target=run.optimizer.tell, args=(answer,))
            thread.start()
            thread.join()
    assert losses == undisturbed()[:40]


@pytest.mark.parametrize("copies", [2, 8])
def test_interleaved_lbfgs_are_as_alone(copies: int) -> None:
    pairs = [lbfgs() for _ in range(copies)]
    order = np.random.default_rng(copies)
    live = list(range(copies))
    while live:
        i = live[order.integers(len(live))]
        if pairs[i][0].step() is None:
            live.remove(i)
    for run, losses in pairs:
        run.finish()
        assert losses == undisturbed()


TEXTS = ["torch.adam(lr=0.1)", "torch.sgd(lr=1e-3, momentum=0.9)", "torch.lbfgs(line_search_fn=strong_wolfe)",
         "cma.cmaes", "slsqp"]  # fmt: skip


@pytest.mark.parametrize("first", TEXTS[:3])
@pytest.mark.parametrize("second", TEXTS)
def test_two_runs_on_one_model_keep_their_own_iterates(first: str, second: str) -> None:
    """Each takes the weights over when it is its turn, and the other's iterate is put back when it is its."""

    def alone(text: str) -> Losses:
        objective = Objective(rosenbrock, start(), 500, seed=0)
        optimizer = method(text).start(objective.vector, 5)
        with objective:
            losses = [hybridopt.step(optimizer, objective).loss for _ in range(20)]
            optimizer.close()
        return losses

    def start() -> Tensor:
        return torch.tensor([-1.2, 1.0, 0.3], dtype=torch.float64)

    objective = Objective(rosenbrock, start(), 500, seed=0)
    pair = [method(text).start(objective.vector, 5) for text in (first, second)]
    losses: list[Losses] = [[], []]
    order = np.random.default_rng(1).permutation(np.repeat([0, 1], 20))
    with objective:
        for i in order:
            losses[i].append(hybridopt.step(pair[i], objective).loss)
            point = pair[0].incumbent
            assert point.x is None or point.x.shape == (3,)
        for optimizer in pair:
            optimizer.close()
    assert losses == [alone(first), alone(second)]


def test_somebody_else_writes_the_weights_between_steps() -> None:
    """A question elsewhere (a validation, a probe) does not move the iterate."""
    for text in TEXTS[:3]:
        runs = []
        for disturbed in (False, True):
            losses: Losses = []
            x = torch.tensor([-1.2, 1.0, 0.3], dtype=torch.float64)
            run = Run(recorded(rosenbrock, losses), x, text, budget=100, seed=0)
            with run:
                for _ in range(25):
                    run.step()
                    if disturbed:
                        run.objective.answer(Request(Kind.VALUE, np.array([0.1, 0.2, 0.3]), probe=True))
                        losses.pop()
            runs.append(losses)
        assert runs[0] == runs[1]


# -- grad mode, leaks --------------------------------------------------------------------------------------------


def test_grad_mode_stays_the_callers() -> None:
    """LBFGS is suspended inside its own no_grad."""
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            run, losses = lbfgs()
            for _ in range(30):
                run.step()
                assert torch.is_grad_enabled() is mode
            run.finish()
            assert torch.is_grad_enabled() is mode
            assert losses == undisturbed()[: len(losses)]


def test_abandoned_lbfgs_leaves_nothing() -> None:
    def abandon(times: int) -> None:
        for _ in range(times):
            run, _ = lbfgs()
            for _ in range(4):
                run.step()
            run.objective.close()
        with torch.no_grad():
            gc.collect()
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()

    abandon(100)
    before = resident()
    abandon(300)
    assert resident() - before < 4e6


# -- words -------------------------------------------------------------------------------------------------------


def test_one_value_by_every_name() -> None:
    from hybridopt.adapters import Adam

    made = [
        method("torch.adam(lr=0.1)"),
        method("torch.adam", lr=0.1),
        method(torch.optim.Adam, lr=0.1),
        Adam(lr=0.1),
    ]
    assert len({str(m) for m in made}) == 1
    assert all(m == made[0] and hash(m) == hash(made[0]) for m in made)
    assert made[0] != Adam(lr=0.2)
    assert all(pickle.loads(pickle.dumps(m)) == m for m in (*made, method(SignSGD, lr=0.5)))
    assert str(method(SignSGD, lr=0.5)) == "tests.third_party:SignSGD(lr=0.5)"


@pytest.mark.parametrize(
    "options, text",
    [
        ({"lr": -1.0}, "torch.adam: Invalid learning rate: -1.0"),
        ({"beta": 0.9}, "torch.adam: unknown option 'beta'; nearest: betas"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(MethodError) as caught:
        method("torch.adam", **options).start(hybridopt.ParameterVector(torch.zeros(2)), 0)
    assert str(caught.value) == text


def test_not_an_optimizer() -> None:
    with pytest.raises(MethodError, match=r"expected a torch.optim.Optimizer class, got <class 'int'>"):
        method(int)


@pytest.mark.parametrize("text", ["torch.adam", "torch.lbfgs"])
def test_a_loss_of_other_weights(text: str) -> None:
    other = torch.ones(2, requires_grad=True)
    with pytest.raises(MissingGradient, match="none of the selected weights"):
        hybridopt.minimize(lambda m: (other**2).sum() + 0 * other.sum(), network(), text, budget=5, seed=0)


@pytest.mark.parametrize("text", ["torch.adam", "torch.lbfgs"])
def test_closed(text: str) -> None:
    run = Run(regression(), network(), text, budget=5, seed=0)
    run.step()
    run.optimizer.close()
    with pytest.raises(ClosedError, match=f"{text}: it "):
        run.optimizer.ask()
    run.finish()


def test_an_optimizer_whose_step_asks_nothing() -> None:
    class Lazy(torch.optim.SGD):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            pass

    with pytest.raises(StateError, match="asked for no evaluation"):
        hybridopt.minimize(regression(), network(), method(Lazy, lr=0.1), budget=5, seed=0)
