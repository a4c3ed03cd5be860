"""Splits: disjoint weights to different methods, each told its share of losses of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hybridopt
from hybridopt import Reason, Run, Split, method
from hybridopt.errors import ClosedError, MethodError, SelectionError, StateError
from hybridopt.optimizer import HandOver, Kind, Need
from hybridopt.problems._gate import THRESHOLD, rounding_gate
from hybridopt.randomness import derive_seed
from hybridopt.testing import Model, OptimizerContract
from tests.driving import BOX, SOLVERS, start, whole

WHOLE = (-2.0, 2.0)


class SplitContract(OptimizerContract):
    """The model of one weight has one tensor, which leaves nothing for a second part."""

    bounds = WHOLE
    evaluations = 40

    def test_one_weight(self) -> None:
        with pytest.raises(SelectionError, match=r"matches no weight|leave nothing"):
            hybridopt.minimize(lambda m: m.x().sum(), Model([-1.0]), self.method, budget=9, bounds=WHOLE)


class TestGradientsAndPopulation(SplitContract):
    method = method('split("a": adam(lr=0.05), "b": cmaes)')
    budget = 1500.0
    random = True


class TestSimultaneous(SplitContract):
    method = method('split("a": adamw(lr=0.05), "b": sgd(lr=0.002))')
    budget = 2000.0
    random = False


class TestAlternating(SplitContract):
    """(Descent by coordinates would creep along the bent valley.)"""

    method = method(
        'split("a": slsqp, "...": pso(swarmsize=6), order=alternating, turn=4, evaluations=31) > slsqp'
    )
    budget = 400.0
    random = True


@pytest.mark.slow
class TestNested(SplitContract):
    """In a chain, a chain and a closure in it, with limits inside and out."""

    method = method(
        'slsqp(evaluations=4) > split("b": torch.lbfgs(lr=0.1), "a": snes(evaluations=9) > adam(lr=0.05), '
        "forward_equivalents=60) > slsqp"
    )
    budget = 400.0
    random = True


@pytest.mark.slow
class TestOneGraph(SplitContract):
    """Two solvers that are told of the same values and gradients."""

    method = method('split("a": slsqp, "b": slsqp(ftol=1e-9), steps=20) > split("*": adam(lr=0.05))')
    budget = 2000.0
    random = False


# -- laws --------------------------------------------------------------------------------------------------------

ONE = {**SOLVERS, "adam": method("adam(lr=0.1)"), "lbfgs": method("torch.lbfgs"), "cmaes": method("cmaes")}


def finish(run: Run) -> Any:
    with run:
        for _ in run:
            pass
    return run.result()


@pytest.mark.parametrize("name", ONE)
def test_a_split_over_one_pattern_is_the_method(name: str) -> None:
    bounds = None if name == "nelder_mead" else BOX
    split = Split({"*": ONE[name]})
    assert whole(split, 50, bounds=bounds) == whole(ONE[name], 50)
    plain, alone = finish(start(ONE[name], 50)[0]), finish(start(split, 50, bounds=bounds)[0])
    for what in ("loss", "best_loss", "reason", "evaluations", "forward_equivalents", "steps"):
        assert getattr(plain, what) == getattr(alone, what), what


def two(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"a": torch.tensor([-1.2, 0.7], dtype=dtype), "b": torch.tensor([1.0, 0.3, -0.4], dtype=dtype)}


def coupled(w: dict[str, Tensor]) -> Tensor:
    x = torch.cat([w["a"], w["b"]])
    return ((x - 0.5) ** 2).sum() + (x[1:] * x[:-1]).sum() ** 2


class Seen:
    """A loss that remembers the weights it was called at, and what it said."""

    def __init__(self, function: Callable[[dict[str, Tensor]], Tensor] = coupled) -> None:
        self.function = function
        self.a: list[list[float]] = []
        self.b: list[list[float]] = []
        self.losses: list[float] = []

    def __call__(self, w: dict[str, Tensor]) -> Tensor:
        value = self.function(w)
        self.a.append(w["a"].tolist())
        self.b.append(w["b"].tolist())
        self.losses.append(value.item())
        return value


def run_split(text: str, budget: Any, **options: Any) -> tuple[Any, Seen]:
    loss = options.pop("loss", None) or Seen()
    weights = options.pop("weights", None) or two()
    return hybridopt.minimize(loss, weights, text, budget=budget, seed=4, batch="loop", **options), loss


def test_options_of_layers_are_parameter_groups() -> None:
    """Two in-place methods step on one forward and backward, as torch's groups do, bit for bit."""
    result, loss = run_split('split("a": sgd(lr=0.05), "b": sgd(lr=0.002, momentum=0.9))', 30)
    assert (result.evaluations, result.steps, result.forward_equivalents) == (30, 30, 90)
    w = {name: t.requires_grad_() for name, t in two().items()}
    groups = [{"params": [w["a"]], "lr": 0.05}, {"params": [w["b"]], "lr": 0.002, "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups)
    for a, b in zip(loss.a, loss.b, strict=True):
        assert (w["a"].tolist(), w["b"].tolist()) == (a, b)
        optimizer.zero_grad()
        coupled(w).backward()
        optimizer.step()


def test_alternating_moves_one_part_at_a_time() -> None:
    _, loss = run_split('split("a": sgd(lr=0.05), "b": sgd(lr=0.02), order=alternating, turn=3)', 24)
    moved = [(p != q, r != s) for p, q, r, s in zip(loss.a, loss.a[1:], loss.b, loss.b[1:], strict=False)]
    assert (
        moved == ([(True, False)] * 3 + [(False, True)] * 3) * 3 + [(True, False)] * 3 + [(False, True)] * 2
    )


@pytest.mark.parametrize(
    "other", ["cmaes(popsize=5)", "slsqp(gradients=differences)", "nelder_mead(maxiter=9)", "torch.lbfgs"]
)
@pytest.mark.parametrize("scale", [None, "start"])
def test_an_iterate_kept_in_place_survives_the_turns_of_others(other: str, scale: str | None) -> None:
    """The loss does not depend on what the other part does, so the path of the first is that of the method alone."""

    def apart(w: dict[str, Tensor]) -> Tensor:
        return ((w["a"] - 0.5) ** 4).sum() + 0 * w["b"].sum() + 3.0

    _, loss = run_split(f'split("a": adam(lr=0.05), "b": {other})', 60, loss=Seen(apart), scale=scale)
    alone: list[list[float]] = []

    def single(x: Tensor) -> Tensor:
        alone.append(x.tolist())
        return ((x - 0.5) ** 4).sum() + 3.0

    hybridopt.minimize(single, two()["a"], "adam(lr=0.05)", budget=60, seed=4, scale=scale)
    path = [a for i, a in enumerate(loss.a) if i == 0 or a != loss.a[i - 1]]
    if scale is None:
        assert len(path) > 8
        assert path == alone[: len(path)]
    else:  # at others' points the iterate passes through scaled coordinates, but it comes back unrounded
        steps = [a for a in loss.a if a in alone]
        assert [a for i, a in enumerate(steps) if i == 0 or a != steps[i - 1]] == alone[
            : len(set(map(tuple, steps)))
        ]
        assert len(steps) > 8


@pytest.mark.parametrize("text", ['split("a": cmaes(popsize=4), "b": pso(swarmsize=5))',
                                  'split("a": slsqp, "b": de(popsize=5), order=alternating)',
                                  'split("a": nelder_mead, "b": powell)'])  # fmt: skip
def test_parts_without_in_place_methods_never_get_worse(text: str) -> None:
    """They stand at the best point of all, whatever their methods remember."""
    run = Run(Seen(), two(), text, budget=150, seed=4, bounds=WHOLE, batch="loop")
    before = np.inf
    with run:
        for _ in run:
            loss, x = run.optimizer.incumbent
            assert loss <= before
            before = loss
            assert x is not None
            again = {"a": torch.tensor(x[:2]), "b": torch.tensor(x[2:])}
            assert coupled(again).item() == loss
    result = run.result()
    assert result.loss < result.best_loss + 1e-3  # probes may be lower, and are no method's point


def drive(text: str, requests: int) -> list[Any]:
    """The questions of a split on the coupled loss."""
    objective = hybridopt.Objective(coupled, two(), 10_000, bounds=WHOLE)
    run = method(text).start(objective.vector, 5)
    asked = []
    with objective:
        for _ in range(requests):
            request = run.ask()
            asked.append(request._replace(x=None if request.x is None else request.x.copy()))
            done = run.tell(objective.answer(request))
            if done is not None and done.reason is not None:
                break
        run.close()
    return asked


def test_gradients_are_asked_at_the_point_of_their_value() -> None:
    asked = drive('split("a": slsqp(gradients=autograd), "b": slsqp(gradients=autograd))', 40)
    kinds = [request.kind for request in asked]
    assert kinds.count(Kind.GRADIENT) > 4
    assert kinds.count(Kind.VALUE) > kinds.count(Kind.GRADIENT)
    for value, gradient in itertools.pairwise(asked):
        if gradient.kind is Kind.GRADIENT:
            assert value.kind is Kind.VALUE
            assert value.keep_graph
            assert np.array_equal(value.x, gradient.x)


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
def test_differences_are_taken_while_the_others_wait(order: str) -> None:
    text = f'split("a": slsqp(gradients=differences), "b": slsqp(gradients=differences), order={order})'
    asked = drive(text, 40)
    stencils = 0
    base = None
    for request in asked:
        if not request.probe:
            base = request.x
            continue
        stencils += 1
        moved = request.x != base
        assert not (moved[:, :2].any() and moved[:, 2:].any())  # of one part at a time
        assert (moved.sum(axis=1) == 1).all()
    assert stencils > 5


def test_parts_that_ask_for_the_same_share_an_evaluation() -> None:
    kinds = 'split("a": nelder_mead, "b": nelder_mead, order={})'
    one, other = drive(kinds.format("simultaneous"), 30), drive(kinds.format("alternating"), 30)
    both = [tuple(np.flatnonzero(p.x != q.x)) for p, q in itertools.pairwise(one)]
    single = [tuple(np.flatnonzero(p.x != q.x)) for p, q in itertools.pairwise(other)]
    assert any(min(moved, default=9) < 2 <= max(moved, default=0) for moved in both)
    assert all(len(r.scopes) == 2 for r in one)
    assert all(len(r.scopes) == 1 for r in other)
    assert len(single) == 29


# -- limits, ends, what is handed over ---------------------------------------------------------------------------


def test_limits_of_parts_are_exact() -> None:
    result, loss = run_split('split("a": adam(lr=0.05, evaluations=11), "b": cmaes(evaluations=17))', 500)
    assert [s.spent["evaluations"] for s in result.stages] == [11, 17]
    assert [s.reason for s in result.stages] == [Reason.EVALUATIONS] * 2
    assert (result.evaluations, result.reason) == (28, Reason.EVALUATIONS)
    assert [s.method for s in result.stages] == [
        '"a": adam(lr=0.05, evaluations=11)', '"b": cmaes(evaluations=17)'
    ]  # fmt: skip
    shared, _ = run_split('split("a": sgd(evaluations=17, lr=0.01), "b": sgd(lr=0.01, evaluations=11))', 500)
    assert [s.spent["evaluations"] for s in shared.stages] == [17, 11]
    assert shared.evaluations == 17


def test_shares_are_of_the_enclosing_budget() -> None:
    """Not of a sibling's limit, although they are told of the same evaluations."""
    text = 'split("a": sgd(evaluations=20%, lr=0.01), "b": sgd(evaluations=30%, lr=0.01))'
    result, _ = run_split(text, 100)
    assert [s.spent["evaluations"] for s in result.stages] == [20, 30]


def test_a_part_that_has_ended_stays() -> None:
    _, loss = run_split('split("a": adam(lr=0.05, steps=4), "b": snes)', 60)
    later = loss.a[40:]
    assert all(a == later[0] for a in later)
    assert later[0] != loss.a[0]
    assert loss.b[40] != loss.b[41]


def test_seeds_of_parts() -> None:
    run, _ = start(method("cmaes"), 10)
    run.finish()
    split = method('split("a": cmaes, "b": cmaes)').start(hybridopt.ParameterVector(two()), 11)
    seeds = [part["child"]["start"]["seed"] for part in split.state_dict()["parts"]]
    assert seeds == [11, derive_seed(11, 1)]


def test_what_is_handed_to_parts() -> None:
    vector = hybridopt.ParameterVector(two())
    spread = np.array([4.0, 1.0, 0.5, 0.25, 2.0])
    x = np.arange(5.0)
    warm = HandOver(x, 7.0, 0.3, spread, np.zeros((2, 5)), np.ones(2))
    split = method('split("b": cmaes, "a": cmaes)').start(vector, 1, warm)
    for part, index in zip(split.state_dict()["parts"], ([2, 3, 4], [0, 1]), strict=True):
        began = part["child"]["start"]
        assert began["x0"].tolist() == x[index].tolist()
        told = began["sigma"] * began["covariance"].numpy() ** 0.5
        assert told == pytest.approx(0.3 * spread[index] ** 0.5)
        assert np.exp(np.log(began["covariance"].numpy()).mean()) == pytest.approx(1.0)
        assert began["points"] is None  # their losses are those of all weights
    boxed = hybridopt.ParameterVector(two(), bounds=(-9, 9))
    one = method('split("*": pso)').start(boxed, 1, warm)
    assert one.state_dict()["parts"][0]["child"]["start"]["points"].tolist() == [[0.0] * 5] * 2


def test_whole_numbers_and_gradients_side_by_side() -> None:
    """An in-place method refuses whole numbers; given to another method they do not stand in its way."""
    weights = {"k": torch.tensor([7.0]), "x": torch.tensor([0.0, 0.0])}

    def loss(w: dict[str, Tensor]) -> Tensor:
        return (w["k"] - 3).square().sum() + (w["x"] - w["k"]).square().sum()

    with pytest.raises(MethodError, match="integer"):
        hybridopt.minimize(loss, dict(weights), "adam", budget=9, integer="k")
    text = 'split("x": adam(lr=0.2), "k": de(popsize=6))'
    result = hybridopt.minimize(loss, weights, text, budget=900, seed=1, integer="k", bounds={"k": (0, 9)})
    assert weights["k"].item() == 3.0
    assert result.best_loss < 1e-4


def test_residuals() -> None:
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)

    def residuals(w: dict[str, Tensor]) -> Tensor:
        return torch.exp(w["rate"] * x) * w["height"] - torch.exp(0.7 * x) * 2.0

    for parts in (
        '"rate": least_squares, "height": least_squares',
        '"height": adam(lr=0.1), "rate": least_squares',
    ):
        w = {name: torch.ones(1, dtype=torch.float64) for name in ("rate", "height")}
        text = f"split({parts}, order=alternating)"
        result = hybridopt.minimize(residuals, w, text, budget=200, residuals=True)
        assert result.best_loss < 0.05


def test_constraints_are_refused() -> None:
    def keeps(w: dict[str, Tensor]) -> Tensor:
        return w["a"].sum()

    with pytest.raises(MethodError, match="split: it cannot keep constraints"):
        run_split('split("a": slsqp, "b": slsqp)', 9, constraints=keeps)
    assert Need.CONSTRAINTS not in method('split("a": slsqp, "b": slsqp)').uses
    assert Need.CONSTRAINTS in method('split("*": slsqp)').uses


def test_a_part_without_effect_does_no_harm_and_is_named() -> None:
    result, loss = run_split(
        'split("a": sgd(lr=0.1), "b": adam)', 20, loss=Seen(lambda w: w["a"].square().sum())
    )
    assert loss.losses[-1] < loss.losses[0]
    assert loss.b[-1] == loss.b[0]
    assert "split: the loss does not depend on the weights of 'b'" in result.notes


# -- which weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ('split("a": adam)', r"split: no pattern matches 'b'; add one \('...' means all that is left\)"),
        ('split("*": adam, "b": cmaes)', r"the patterns '\*' and 'b' both match 'b'"),
        ('split("a": adam, "[ab]": cmaes)', r"both match 'a'"),
        ('split("a": adam, "c": cmaes, "...": sgd)', r"the pattern 'c' matches no weight"),
        ('split("a": adam, "b": cmaes, "...": sgd)', r"leave nothing for '...'"),
    ],
)
def test_leftovers_and_overlaps(text: str, message: str) -> None:
    loss = Seen()
    with pytest.raises(SelectionError, match=message):
        run_split(text, 9, loss=loss)
    assert loss.losses == []


def test_tied_weights_are_one() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    split = method('split("1.bias": adam, "1.weight": cmaes)')
    assert split.assign(hybridopt.ParameterVector(model)) == [["1.bias"], ["0.weight"]]  # type: ignore[attr-defined]


def test_a_part_of_a_vector() -> None:
    groups = [
        {"params": [torch.ones(2)], "lr": 0.1},
        {"params": [torch.full((3,), 4.0), torch.full((1,), 2.0)]},
    ]
    scale = np.arange(1.0, 7.0)
    vector = hybridopt.ParameterVector(groups, bounds={"1.0": (1, 9)}, scale=scale, integer="1.1", log="1.0")
    part = vector.part(["1.0", "1.1"])
    assert (part.n, part.names, part.slices["1.1"], part.bounded) == (4, ("1.0", "1.1"), slice(3, 4), True)
    assert part.groups == [{"params": ["1.0", "1.1"]}]
    assert part.tensors[0] is vector.tensors[1]
    x = vector.encode(vector.read())
    assert part.encode(part.read()).tolist() == x[2:].tolist()
    assert part.decode(x[2:] + 0.1).tolist() == vector.decode(x + 0.1)[2:].tolist()
    assert part.part(["1.1"]).from_whole(np.arange(6.0)).tolist() == [5.0]
    assert vector.part(["0.0"]).integer is None
    before = vector.epoch
    part.part(["1.1"]).write([3.0])
    assert (vector.epoch, vector.read()[5]) == (before + 1, 3.0)


# -- text, values ------------------------------------------------------------------------------------------------


def test_text() -> None:
    value = Split(
        {"features.*": method("adam", lr=1e-3), "...": method("pso(evaluations=5) > cmaes")},
        order="alternating",
        turn=2,
    )
    text = 'split("features.*": adam(lr=0.001), "...": pso(evaluations=5) > cmaes, order=alternating, turn=2)'
    assert str(value) == text
    assert method(text) == value
    assert hash(method(text)) == hash(value)
    nested = (
        f'cycle(scipy.slsqp(steps=3) > split("a": adam until plateau(5), "b\\"": {value}, evaluations=20%))'
    )
    assert str(method(nested)) == nested


@pytest.mark.parametrize(
    "text, what, at",
    [
        ("split(adam)", "expected a pattern in quotes and a method", 7),
        ("split()", "expected patterns with methods", 1),
        ('split("a" adam)', "expected ':' and a method after 'a'", 11),
        ('split("a": adam, "a": sgd)', "the pattern 'a' is given twice", 18),
        ('split("a": adm)', "unknown name 'adm'", 12),
        ('split("a": adam, ordr=alternating)', "unknown option 'ordr'; nearest: order", 1),
        ('split("a": adam, order=both)', "expected order to be one of simultaneous, alternating", 1),
        ('split("a": adam, turn=2)', "expects order=alternating", 1),
        ('split("a": adam', "expected ',' or ')'", 16),
    ],
)
def test_errors_point_at_the_character(text: str, what: str, at: int) -> None:
    with pytest.raises(MethodError) as caught:
        method(text)
    message = str(caught.value)
    assert what in message
    assert f"at character {at}:" in message


@pytest.mark.parametrize("weights", [{}, {1: method("adam")}, method("adam")])
def test_wrong_values(weights: Any) -> None:
    with pytest.raises(MethodError, match="split: expected"):
        Split(weights)


def test_another_splits_state_and_closing() -> None:
    vector = hybridopt.ParameterVector(two())
    split, other = method('split("a": adam, "b": cmaes)'), method('split("a": cmaes, "b": adam)')
    run = split.start(vector, 1)
    with pytest.raises(StateError, match="it was saved by"):
        run.load_state_dict(other.start(hybridopt.ParameterVector(two()), 1).state_dict())
    run.close()
    with pytest.raises(ClosedError):
        run.ask()


# -- networks ----------------------------------------------------------------------------------------------------


def noisy() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """float32, BatchNorm, dropout and minibatches."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))
    x = torch.randn(64, 3)

    def loss(model: nn.Module) -> Tensor:
        rows = torch.randint(64, (16,))
        return (model(x[rows]) - x[rows].prod(dim=1, keepdim=True)).square().mean()

    return model, loss


@pytest.mark.parametrize("text", ['split("0.*": adam, "1.*": sgd(lr=0.01), "4.*": snes)',
                                  'split("4.*": torch.lbfgs(max_iter=3), "...": cmaes(steps=2) > adam)'])  # fmt: skip
def test_a_noisy_network_is_resumed_bit_for_bit(text: str) -> None:
    def begin() -> tuple[Run, list[str]]:
        model, loss = noisy()
        run, heard = Run(loss, model, text, budget=40, seed=2, batch="loop"), []

        class Ear:
            def evaluated(self, ledger: Any, scopes: Any, loss: float, probe: bool) -> None:
                heard.append(loss.hex())

        run.objective.listeners.append(Ear())
        return run, heard

    run, heard = begin()
    states = []
    with run:
        for _ in run:
            states.append((len(heard), run.state_dict()))
    assert len(states) > 6
    for done, state in states:
        other, rest = begin()
        with other:
            other.load_state_dict(state)
            for _ in other:
                pass
        assert rest == heard[done:]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rounding_gate_is_learned_by_both_halves_together(seed: int) -> None:
    def learn(text: str, select: str | None = None) -> tuple[float, float]:
        problem = rounding_gate(seed)
        result = hybridopt.minimize(
            problem.loss, problem.target, text, budget="2000fe", seed=seed, select=select
        )
        return result.best_loss, problem.target.threshold.item()

    features, stuck = learn("adam(lr=0.1)")
    thresholds, _ = learn("openai_es", "threshold")
    both, found = learn('split("threshold": openai_es, "features.*": adam(lr=0.1))')
    assert stuck == pytest.approx(-0.8)  # adam had all weights, and its gradient there was 0
    assert both < 0.2 * min(features, thresholds)
    assert abs(found - THRESHOLD) < 0.2
