"""Many starts: in turns or in one program, the same paths; hopeless ones are culled, and others get their budget."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hybridopt
from hybridopt import Method, MultiStart, Reason, Run, method
from hybridopt.batch import ULPS
from hybridopt.compose._halving import Turns
from hybridopt.compose.multistart import Together
from hybridopt.errors import ClosedError, MethodError, MissingGradient, NonFiniteLoss, StateError
from hybridopt.optimizer import FloatArray, HandOver, Kind, Need
from hybridopt.randomness import derive_seed
from hybridopt.testing import OptimizerContract
from tests.driving import BOX, SOLVERS, rosenbrock, whole

X0 = [-1.2, 1.0, 0.3]


def finish(run: Run) -> Any:
    with run:
        for _ in run:
            pass
    return run.result()


def begin(text: str | Method, budget: Any, loss: Any = rosenbrock, x0: Any = X0, **options: Any) -> Run:
    target = torch.tensor(x0, dtype=options.pop("dtype", torch.float64)) if isinstance(x0, list) else x0
    options = {"bounds": BOX, "seed": 3, **options}
    return Run(loss, target, method(text), budget=budget, **options)


def points(given: MultiStart, vector: hybridopt.ParameterVector, seed: int = 3) -> FloatArray:
    return given._points(vector, seed, None)


class Paths:
    """Listens to a program of many starts in which nobody is dropped: the losses of each start."""

    def __init__(self, run: Run, starts: int) -> None:
        self.starts, self.heard = starts, list[float]()
        run.objective.listeners.append(self)

    def evaluated(self, ledger: Any, scopes: Any, loss: float, probe: bool) -> None:
        self.heard.append(loss)

    def of(self, index: int) -> list[float]:
        return self.heard[index :: self.starts]


# -- laws --------------------------------------------------------------------------------------------------------

ONE = {
    **SOLVERS,
    "adam": method("torch.adam(lr=0.1)"),
    "ours": method("adam(lr=0.1)"),
    "lbfgs": method("torch.lbfgs"),
}


@pytest.mark.parametrize("name", ONE)
def test_a_multistart_of_one_is_the_method(name: str) -> None:
    bounds = None if name == "nelder_mead" else BOX
    assert whole(MultiStart(ONE[name], starts=1, rung=7), 50, bounds=bounds) == whole(ONE[name], 50)


ELEMENTWISE = [
    "adam(lr=0.05)", "adamw(lr=0.05, weight_decay=0.1)", "sgd(lr=1e-3, momentum=0.9, nesterov=True)", "rprop(lr=0.01)",
    "nadam(lr=0.05)", "asgd(lr=1e-3)", "adadelta", "adagrad(lr=0.1)", "adamax(lr=0.05)", "radam(lr=0.05)",
    "rmsprop(lr=0.01, centered=True, momentum=0.5)", "lion(lr=0.02)", "adan(lr=0.02)", "torch.adam(lr=0.05)",
]  # fmt: skip


def alone(text: str, z: FloatArray, steps: int, **options: Any) -> list[float]:
    """The losses of one start by itself."""
    run = begin(text, steps, x0=z.tolist(), batch="loop", **options)
    heard = Paths(run, 1)
    finish(run)
    return heard.of(0)


@pytest.mark.parametrize("text", ELEMENTWISE)
@pytest.mark.parametrize("batch", ["loop", "auto"])
def test_a_program_of_many_starts_is_each_start_by_itself(text: str, batch: Any) -> None:
    """Bit for bit where the loss is evaluated one by one; else the batched losses differ in their last bits."""
    given = MultiStart(method(text), starts=6, keep=1)
    run = begin(given, 6 * 25, batch=batch)
    heard = Paths(run, 6)
    where = points(given, run.objective.vector)
    result = finish(run)
    assert isinstance(run.optimizer, Together)
    assert result.forward_equivalents == 450 + 6 * (
        batch == "auto"
    )  # two forwards and backwards to check the batch
    for i, z in enumerate(where):
        expected = alone(text, z, 25)
        if batch == "loop":
            assert heard.of(i) == expected
        else:
            np.testing.assert_allclose(heard.of(i), expected, rtol=1e-9)


def test_bounds_are_kept_in_a_program_as_alone() -> None:
    near: dict[str, Any] = {"x0": [-1.2, 0.7, 0.3], "bounds": (-1.25, 0.75)}
    given = MultiStart(method("adam(lr=0.3)"), starts=4, keep=1)
    run = begin(given, 4 * 15, batch="loop", **near)
    heard = Paths(run, 4)
    where = points(given, run.objective.vector)
    finish(run)
    for i, z in enumerate(where):
        assert heard.of(i) == alone("adam(lr=0.3)", z, 15, bounds=near["bounds"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights(dtype: torch.dtype) -> None:
    given = MultiStart(method("adam(lr=0.05)"), starts=5, keep=1)
    run = begin(given, 5 * 20, batch="loop", dtype=dtype)
    heard = Paths(run, 5)
    where = points(given, run.objective.vector)
    finish(run)
    for i, z in enumerate(where):
        assert heard.of(i) == alone("adam(lr=0.05)", z, 20, dtype=dtype)


def test_weights_of_two_dtypes_in_groups_with_a_scale() -> None:
    def weights() -> Any:
        a = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        b = torch.tensor([0.3], dtype=torch.float32)
        c = torch.tensor([0.5], dtype=torch.float64)
        return [{"params": [a, b], "lr": 0.05}, {"params": [c], "lr": 0.002}], (a, b, c)

    def make(given: Method, budget: int, z: FloatArray | None = None) -> Run:
        groups, tensors = weights()
        if z is not None:
            for tensor, part in zip(tensors, np.split(z, [2, 3]), strict=True):
                tensor.copy_(torch.tensor(part))

        def loss() -> Tensor:
            return rosenbrock(torch.cat([t.double() for t in tensors]))

        return Run(loss, groups, given, budget=budget, bounds=BOX, scale=0.7, seed=3)

    given = MultiStart(method("adam"), starts=4, keep=1)
    run = make(given, 4 * 20)
    heard = Paths(run, 4)
    where = run.objective.vector.decode(points(given, run.objective.vector))
    finish(run)
    assert isinstance(run.optimizer, Together)
    for i, z in enumerate(where):
        one = make(method("adam"), 20, z)
        path = Paths(one, 1)
        finish(one)
        np.testing.assert_allclose(heard.of(i), path.of(0), rtol=1e-9)


@pytest.mark.parametrize("text", ["adam(lr=0.05)", "nadam(lr=0.05)", "rprop(lr=0.01)"])
def test_a_step_that_is_not_finite_leaves_its_start_alone(text: str) -> None:
    """Weights and state, the count of steps for the bias corrections among them, as if it were by itself."""

    def jumping(x: Tensor) -> Tensor:
        calls.append(0)
        return rosenbrock(x) * (math.nan if (len(calls) - 1) // 4 % 4 == 2 else 1.0)

    calls: list[int] = []
    given = MultiStart(method(text), starts=3, keep=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = begin(given, 3 * 24, loss=jumping, batch="loop")
        heard = Paths(run, 3)
        where = points(given, run.objective.vector)
        finish(run)
        bad = [[math.isnan(value) for value in heard.of(i)] for i in range(3)]
        assert len({tuple(pattern) for pattern in bad}) == 3
        for i, z in enumerate(where):
            pattern = iter(bad[i])

            def same(x: Tensor, pattern: Any = pattern) -> Tensor:
                return rosenbrock(x) * (math.nan if next(pattern) else 1.0)

            expected = alone(text, z, 24, loss=same)
            np.testing.assert_array_equal(heard.of(i), expected)


# -- culling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["torch.adam(lr=0.02)", "adam(lr=0.02, steps=10_000)"])
def test_the_budget_of_the_dropped_goes_to_the_others(text: str) -> None:
    """In one program or in turns: 8 starts of 30 forward-equivalents, 4 of 60, 2 of 120, then one with all the rest."""
    run = begin(f"multistart({text}, starts=8, rung=30)", {"forward_equivalents": 1500}, batch="loop")
    result = finish(run)
    assert result.forward_equivalents == 1500
    spent = [stage.spent["forward_equivalents"] for stage in result.stages]
    if isinstance(run.optimizer, Together):
        assert spent == [240, 240, 240, 780]
        assert [stage.method for stage in result.stages] == [
            f"8 × {text}",
            f"4 × {text}",
            f"2 × {text}",
            text,
        ]
        assert [stage.message for stage in result.stages] == [
            "4 of 8 starts go on", "2 of 4 starts go on", "1 of 2 starts go on", "",
        ]  # fmt: skip
        assert [stage.reason for stage in result.stages] == [Reason.SWITCHED] * 3 + [None]
    else:
        assert sorted(spent) == [30] * 4 + [90] * 2 + [210, 990]


def test_both_ways_drop_the_same_starts() -> None:
    """The lone survivor of either walks the same path, and it is the start that was best at each halving."""
    together = begin("multistart(adam(lr=0.02), starts=8, rung=30)", 400, batch="loop")
    turns = begin("multistart(adam(lr=0.02, steps=10_000), starts=8, rung=30)", 400, batch="loop")
    where = points(MultiStart(method("adam(lr=0.02)"), starts=8), together.objective.vector)
    first, second = finish(together), finish(turns)
    assert isinstance(turns.optimizer, Turns)
    assert (first.best_loss, first.loss) == (second.best_loss, second.loss)
    paths = [alone("adam(lr=0.02)", z, 230) for z in where]
    left = list(range(8))
    for steps in (10, 30, 70):
        left = sorted(left, key=lambda i: min(paths[i][:steps]))[: len(left) // 2]
    assert len(left) == 1
    assert first.loss == paths[left[0]][-1]
    assert min(paths[left[0]]) == first.best_loss < min(path[0] for path in paths)


def test_a_start_without_finite_losses_is_dropped() -> None:
    def loss(x: Tensor) -> Tensor:
        return rosenbrock(x) + torch.where(x[0] > 0.5, torch.nan, 0.0)

    text = "multistart(torch.sgd(lr=1e-4), starts=16, keep=1)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = begin(text, 2000, loss=loss, batch="loop")
        where = points(run.method, run.objective.vector)  # type: ignore[arg-type]
        heard = Paths(run, 16)
        for _ in range(20):
            run.step()
        resumed = begin(text, 2000, loss=loss, batch="loop")
        rest = Paths(resumed, 16)
        resumed.load_state_dict(run.state_dict())
        done = len(heard.heard)
        finish(run)
        finish(resumed)
    bad = int((where[:, 0] > 0.5).sum())
    assert 2 < bad < 14
    assert sum(map(math.isnan, heard.heard)) == 30 * bad
    np.testing.assert_array_equal(rest.heard, heard.heard[done:])


def test_nothing_finite_at_any_start_is_an_error() -> None:
    run = begin("multistart(adam, starts=5)", 100, loss=lambda x: rosenbrock(x) * math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NonFiniteLoss, match="at the start point"):
            finish(run)


def test_nothing_finite_later_ends_it() -> None:
    calls: list[int] = []

    def loss(x: Tensor) -> Tensor:
        calls.append(0)
        return rosenbrock(x) * (1.0 if len(calls) <= 8 else math.nan)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = finish(begin("multistart(adam, starts=4)", 1000, loss=loss, batch="loop"))
    assert result.reason is Reason.NON_FINITE
    assert result.evaluations == 8 + 30 * 4


def test_a_loss_without_graph() -> None:
    with pytest.raises(MissingGradient):
        finish(begin("multistart(adam, starts=4)", 100, loss=lambda x: rosenbrock(x).detach()))


# -- starts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin_at", ["sobol", "uniform", "normal"])
def test_where_they_begin(begin_at: Any) -> None:
    tensors = {name: torch.full((2,), 1.0, dtype=torch.float64) for name in "abc"}
    bounds = np.array([[-2, 6], [-2, 6], [0, np.inf], [0, np.inf], [-np.inf, np.inf], [-np.inf, np.inf]])
    vector = hybridopt.ParameterVector(tensors, bounds=bounds, scale=2.0)
    given = MultiStart(method("adam"), starts=513, begin_at=begin_at)
    x = points(given, vector)
    assert x.shape == (513, 6)
    assert x[0].tolist() == [0.5] * 6
    assert ((x >= vector.lower / 2) & (x <= vector.upper / 2)).all()
    boxed, free = x[1:, :2], x[1:, 4:]
    expected = (1.0, 4 / math.sqrt(12)) if begin_at != "normal" else (boxed.mean(), 0.3 * 4 * 0.85)
    near = 1e-2 if begin_at == "sobol" else 0.15
    assert boxed.mean(axis=0) == pytest.approx(expected[0], abs=near + 0.05 * (begin_at == "normal"))
    assert boxed.std(axis=0) == pytest.approx(expected[1], rel=near + 0.1 * (begin_at == "normal"))
    assert free.mean(axis=0) == pytest.approx(0.5, abs=0.1)
    assert free.std(axis=0) == pytest.approx(0.5, rel=0.1)
    assert (points(given, vector) == x).all()
    assert (points(given, vector, seed=4)[1:] != x[1:]).any(axis=1).all()
    wide = MultiStart(method("adam"), starts=513, begin_at=begin_at, sigma=3.0)
    assert points(wide, vector)[1:, 4:].std(axis=0) == pytest.approx(3.0, rel=0.1)
    assert (points(given, vector)[:9] == points(MultiStart(method("adam"), 9, begin_at), vector)).all()


def test_seeds_and_starts_of_the_children() -> None:
    run = begin("multistart(cma.cmaes, starts=4, rung=20)", 200, batch="loop")
    where = points(run.method, run.objective.vector)  # type: ignore[arg-type]
    assert isinstance(run.optimizer, Turns)
    state = run.optimizer.state_dict()
    run.finish()
    children = [member["run"]["child"]["start"] for member in state["members"]]
    assert [child["seed"] for child in children] == [
        3,
        derive_seed(3, 1),
        derive_seed(3, 2),
        derive_seed(3, 3),
    ]
    assert [child["x0"].tolist() for child in children] == where.tolist()


def test_a_predecessors_point_and_spread_are_where_they_begin() -> None:
    given = method("multistart(torch.adam, starts=4, begin_at=normal)")
    objective = hybridopt.Objective(rosenbrock, torch.zeros(3, dtype=torch.float64), 100, bounds=BOX)
    run = given.start(objective.vector, 3, HandOver(np.ones(3), sigma=0.2))
    asked = run.ask()
    assert asked.kind is Kind.VALUES_AND_GRADIENTS
    assert asked.x is not None
    assert asked.x[0].tolist() == [1, 1, 1]
    assert 0.1 < (asked.x[1:] - 1).std() < 0.4  # 1.2 in this box otherwise
    assert objective.vector.read().tolist() == [0, 0, 0]


def test_what_shares_a_program() -> None:
    def shares(text: str, **options: Any) -> bool:
        x = torch.full((3,), 0.5, dtype=torch.float64)
        vector = hybridopt.ParameterVector(x, **options)
        return method(text).start_many(vector, np.ones((2, 3))) is not None

    for text in ELEMENTWISE:
        assert shares(text)
    for text in ("lamb", "muon", "adafactor", "lbfgs", "slsqp", "cmaes", "sparse_adam", "adam(max_grad_norm=1.0)",
                 "adam(stochastic_rounding=True)", "adam(steps=3)", "adam > sgd"):  # fmt: skip
        assert not shares(text), text
    assert not shares("adam", log=True)
    assert not shares("adam", integer=True)


def test_hand_over_of_the_best_points() -> None:
    run = begin("multistart(adam(lr=0.05), starts=8, rung=30)", 200, batch="loop")
    for _ in range(12):
        run.step()
    handed = run.optimizer.hand_over()
    assert handed.points is not None
    assert handed.losses is not None
    assert handed.points.shape == (4, 3)
    assert (np.diff(handed.losses) >= 0).all()
    found = [rosenbrock(torch.tensor(x)).item() for x in handed.points]
    assert found == handed.losses.tolist()
    assert handed.losses[0] == run.objective.ledger.best_loss
    run.finish()


# -- budgets and saving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["loop", "auto", 3])
@pytest.mark.parametrize(
    "text", ["multistart(adam(lr=0.05), starts=7, rung=12)", "multistart(adam(lr=0.05), starts=5, keep=1)"]
)
def test_budgets_are_exact_and_a_cut_batch_goes_on(text: str, batch: Any) -> None:
    """Cut anywhere, saved in the middle of a batch, raised elsewhere: the same losses to the last bit."""

    def losses(budget: Any, state: Any = None) -> tuple[list[float], Any, Any]:
        run = begin(text, budget, batch=batch)
        heard = Paths(run, 1)
        with run:
            if state is not None:
                run.load_state_dict(state)
            for _ in run:
                pass
            file = io.BytesIO()
            torch.save(run.state_dict(), file)
        file.seek(0)
        return heard.of(0), torch.load(file, weights_only=True), run.result()

    whole_path, _, _ = losses(120)
    assert len(whole_path) == 120
    for budget in (1, 3, 20, 47):
        first, state, result = losses(budget)
        assert result.evaluations == budget
        rest, _, _ = losses(120, state)
        assert first + rest == whole_path
    for limit in (3.0, 29.0):
        first, state, result = losses({"forward_equivalents": limit})
        assert limit - 3 < result.forward_equivalents <= limit or (batch != "loop" and limit < 13)
        rest, _, _ = losses(120, state)
        assert first + rest == whole_path


@pytest.mark.parametrize("text", ["multistart(adam(lr=0.3), starts=16, rung=12)", "cmaes(popsize=12)"])
def test_the_books_are_the_same_whoever_listens(text: str) -> None:
    """Without listeners a batch is booked at once, with one row by row; some rows are the best so far, others not."""

    def books(listens: bool) -> Any:
        run = begin(text, 150)
        if listens:
            Paths(run, 1)
        with run:
            for _ in run:
                pass
            state = run.state_dict()
        for ledger in (state["objective"]["ledger"], state["optimizer"].get("scope", {}).get("ledger", {})):
            ledger.pop("seconds", None)
        best = state["objective"]["best"]["x"].tolist()
        reports = [(stage.best_loss, stage.spent["forward_equivalents"]) for stage in run.result().stages]
        return state["objective"]["ledger"], state["optimizer"].get("scope", {}).get("ledger"), best, reports

    assert books(True) == books(False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.x = torch.randn(16, 3)

    def loss(self) -> Tensor:
        return ((self.layers(self.x) - self.x.prod(dim=1, keepdim=True)) ** 2).mean()


def test_a_model_ends_with_the_best_point_of_all_starts() -> None:
    model = Net()
    result = hybridopt.minimize(
        lambda m: m.loss(),
        model,
        "multistart(adam(lr=0.05), starts=12, begin_at=normal)",
        budget=2000,
        seed=1,
    )
    far = ULPS * torch.finfo(torch.float32).eps  # of a batch from the loop
    assert model.loss().item() == pytest.approx(result.best_loss, rel=far)
    single = Net()
    one = hybridopt.minimize(lambda m: m.loss(), single, "adam(lr=0.05)", budget=100, seed=1)
    assert result.best_loss < one.best_loss


def test_other_states_and_ends_are_refused() -> None:
    run = begin("multistart(adam, starts=4)", 50)
    run.step()
    state = run.optimizer.state_dict()
    other = begin("multistart(adam, starts=5)", 50)
    with pytest.raises(StateError, match="it was saved by"):
        other.optimizer.load_state_dict(state)
    changed = method("adam(lr=0.1)").start_many(run.objective.vector, np.ones((4, 3)))
    assert changed is not None
    with pytest.raises(StateError, match="it was saved by"):
        changed.load_state_dict(state["many"])
    run.optimizer.close()
    with pytest.raises(ClosedError):
        run.optimizer.ask()
    run.finish()
    other.finish()


def test_a_copy_goes_on_by_itself() -> None:
    text = "multistart(adam(lr=0.05), starts=6, rung=20)"
    run = begin(text, 200, batch="loop")
    heard = Paths(run, 1)
    for _ in range(11):
        run.step()
    done = len(heard.heard)
    other = begin(text, 200, batch="loop")
    other_heard = Paths(other, 1)
    other.load_state_dict(run.state_dict())
    other.optimizer = copy.deepcopy(run.optimizer)
    finish(run)
    finish(other)
    assert other_heard.heard == heard.heard[done:]


# -- the value ---------------------------------------------------------------------------------------------------


def test_text_copies_and_needs() -> None:
    text = "multistart(adam(lr=0.1) > scipy.slsqp, starts=4, begin_at=normal, sigma=0.5, keep=0.25, rung=60)"
    given = method(text)
    assert str(given) == text
    assert given.needs == {Need.GRADIENT}
    for again in (method(str(given)), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert (again, again.needs, hash(again)) == (given, given.needs, hash(given))
    assert (
        str(method("multistart(adam, starts=9, evaluations=70)"))
        == "multistart(adam, starts=9, evaluations=70)"
    )


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: MultiStart(3), "expected text, a class or a Method, got 3"),  # type: ignore[arg-type]
        (lambda: MultiStart(method("adam"), starts=0), "multistart: expected starts >= 1, got 0"),
        (lambda: MultiStart(method("adam"), starts=2.5), "multistart: expected starts to be a whole number"),  # type: ignore[arg-type]
        (
            lambda: MultiStart(method("adam"), starts="many"),
            "multistart: expected starts to be a whole number",
        ),  # type: ignore[arg-type]
        (
            lambda: MultiStart(method("adam"), begin_at="grid"),  # type: ignore[arg-type]
            "expected begin_at to be one of sobol, uniform, normal",
        ),
        (lambda: MultiStart(method("adam"), sigma=-1), "multistart: expected sigma > 0, got -1"),
        (lambda: MultiStart(method("adam"), sigma="a"), "multistart: expected sigma to be a number or None"),  # type: ignore[arg-type]
        (
            lambda: MultiStart(method("adam"), keep=2),
            "multistart: expected keep above 0 and at most 1, got 2",
        ),
        (lambda: MultiStart(method("adam"), rung=-1), "multistart: expected rung > 0, got -1"),
        (lambda: method("multistart(adam, sgd)"), "multistart: expected one method inside, got 2"),
        (lambda: method("multistart(adam, start=3)"), "multistart: unknown option 'start'; nearest: starts"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(MethodError, match=text):
        make()


def test_too_many_weights_for_sobol() -> None:
    x = torch.zeros(30_000)
    with pytest.raises(
        MethodError, match="expected at most 21201 weights for begin_at=sobol, got 30000; use uniform"
    ):
        method("multistart(adam)").start(hybridopt.ParameterVector(x), 0)


class TestMultiStartAdam(OptimizerContract):
    method = hybridopt.method("multistart(adam(lr=0.05), starts=5, rung=20)")
    random = True


@pytest.mark.slow
class TestMultiStartTorchBounded(OptimizerContract):
    method = hybridopt.method("multistart(torch.rprop(lr=0.01), starts=3, rung=9, begin_at=uniform)")
    bounds = BOX
    random = True


@pytest.mark.slow
class TestMultiStartSLSQP(OptimizerContract):
    method = hybridopt.method("multistart(slsqp, starts=4, rung=12)")
    random = True


class TestMultiStartInAChain(OptimizerContract):
    method = hybridopt.method(
        "(multistart(adam(lr=0.05), starts=4, rung=9))(evaluations=31) > multistart(cmaes(popsize=4), starts=3, rung=8)"
    )
    bounds = BOX
    random = True
