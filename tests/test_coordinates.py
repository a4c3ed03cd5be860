"""Whole numbers and logarithms as coordinates: laws, gradients, and that every method only evaluates whole numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hybridopt
from hybridopt import ParameterVector
from hybridopt.coordinates import cells
from hybridopt.errors import BoundsError, MethodError, SelectionError, StateError
from hybridopt.gradients import Differences
from hybridopt.objective import Objective
from hybridopt.optimizer import Kind, Request
from hybridopt.population._base import PopulationRun
from hybridopt.start import Start


def tuned(**options: Any) -> ParameterVector:
    """A rate (log), two widths (integer), a count (both), and a plain weight."""
    weights = {
        "rate": torch.tensor([0.1], dtype=torch.float64),
        "widths": torch.tensor([3.0, 7.0], dtype=torch.float64),
        "count": torch.tensor([16.0], dtype=torch.float64),
        "plain": torch.tensor([-0.5], dtype=torch.float64),
    }
    bounds = {"rate": (1e-4, 10), "widths": (-2.5, 8.2), "count": (1, 100), "plain": (-1, 1)}
    given = {"bounds": bounds, "integer": ["widths", "count"], "log": ["rate", "count"]} | options
    return ParameterVector(weights, **given)


def test_coordinates_of_whole_numbers_and_logarithms() -> None:
    vector = tuned()
    np.testing.assert_array_equal(vector.lower, [1e-4, -2, -2, 1, -1])  # tightened to whole numbers
    np.testing.assert_array_equal(vector.upper, [10, 8, 8, 100, 1])
    z = vector.encode(vector.read())
    np.testing.assert_allclose(z, [math.log(0.1), 3, 7, math.log(16), -0.5], rtol=1e-15)
    # halves to the even whole number; a logarithm is rounded as the number it stands for
    x = vector.decode(np.array([0.0, 2.5, 3.5, math.log(4.49), 0.25]))
    np.testing.assert_array_equal(x, [1, 2, 4, 4, 0.25])
    low, high = vector.coordinates.box()
    np.testing.assert_allclose(low, [math.log(1e-4), -2.5, -2.5, math.log(0.5), -1])
    np.testing.assert_allclose(high, [math.log(10), 8.5, 8.5, math.log(100.5), 1])
    assert vector.describe()["integer"] == [[1, 4]]
    assert vector.describe()["log"] == [[0, 1], [3, 4]]
    assert "integer, log" in repr(vector)


def test_every_whole_number_of_the_box_has_equal_room() -> None:
    vector = ParameterVector(torch.zeros(1), bounds=(-1, 3), integer=True)
    low, high = vector.coordinates.box()
    z = np.linspace(low[0], high[0], 50_001)[:, None]
    numbers, counts = np.unique(vector.decode(z), return_counts=True)
    np.testing.assert_array_equal(numbers, [-1, 0, 1, 2, 3])
    assert counts.max() - counts.min() <= 2


@given(st.data())
def test_decoding_undoes_encoding(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    values = data.draw(st.lists(st.floats(1.0, 200.0), min_size=1, max_size=5))
    n = len(values)
    integer, log = (np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for _ in range(2))
    vector = ParameterVector(
        torch.tensor(values, dtype=dtype), bounds=(0.5, 300), integer=integer, log=log, scale=2.0
    )
    x = vector.read()
    x[integer] = np.rint(x[integer])
    again = vector.decode(vector.encode(x))
    np.testing.assert_array_equal(again[integer], x[integer])
    np.testing.assert_allclose(again, x, rtol=1e-14)
    vector.write(again)
    assert not vector.outside(vector.read())
    np.testing.assert_array_equal(vector.read()[integer], x[integer])


@given(st.data())
def test_no_point_of_the_box_leaves_the_bounds(data: st.DataObject) -> None:
    low = data.draw(st.floats(1e-6, 50))
    high = low + data.draw(st.floats(2.0, 1e4))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    integer, log = data.draw(st.booleans()), data.draw(st.booleans())
    start = torch.tensor([math.ceil(low) if integer else (low + high) / 2], dtype=dtype)
    vector = ParameterVector(start, bounds=(low, high), integer=integer or None, log=log or None)
    first, last = vector.coordinates.box()
    for share in (0.0, 1.0, data.draw(st.floats(0, 1))):
        vector.write(vector.decode(np.clip(first + share * (last - first), first, last)))
        x = vector.read()[0]
        assert low <= x <= high
        assert not integer or x == round(x)


def test_a_cell_is_all_that_decodes_to_one_whole_number() -> None:
    vector = tuned()
    start = Start.at(vector, 0, None)
    rng = np.random.default_rng(0)
    z = rng.uniform(start.lower, start.upper, (500, 5))
    low, high = cells(z, start.log)
    integer = start.integer
    assert integer is not None
    inner = 1e-9 * (high - low)
    x, at_low, at_high = (
        vector.decode(np.where(integer, part, z)) for part in (z, low + inner, high - inner)
    )
    np.testing.assert_array_equal(at_low, x)
    np.testing.assert_array_equal(at_high, x)
    beyond = vector.decode(np.where(integer, high + inner, z))
    inside = x < vector.upper
    assert (beyond[:, integer] > x[:, integer])[inside[:, integer]].all()


def test_without_a_choice_nothing_changes() -> None:
    vector = ParameterVector(torch.ones(3), scale=2.0)
    assert vector.integer is vector.log is None
    x = np.array([1.0, -2.0, 3.0])
    np.testing.assert_array_equal(vector.coordinates.slope(x), vector.scale)
    for chosen in ({"integer": np.zeros(3, dtype=bool)}, {"log": lambda name, tensor: False}):
        plain = ParameterVector(torch.ones(3), **chosen)
        assert plain.encode(x) is x
        assert plain.decode(x) is x
        assert plain.coordinates.slope(x) is None


def test_a_tied_weight_is_chosen_by_either_name() -> None:
    shared = torch.nn.Parameter(torch.ones(2))
    model = torch.nn.ParameterDict({"a": shared, "b": shared, "c": torch.nn.Parameter(torch.ones(1))})
    for choice in ("a", "b", ["b"], lambda name, tensor: tensor is shared):
        vector = ParameterVector(model, integer=choice)
        assert vector.names == ("a", "c")
        assert vector.integer is not None
        assert vector.integer.tolist() == [True, True, False]


def test_scales_leave_whole_numbers_alone_and_divide_logarithms() -> None:
    vector = tuned(scale=4.0)
    assert vector.scale is not None
    assert vector.scale.tolist() == [4, 1, 1, 1, 4]
    np.testing.assert_allclose(vector.encode(vector.read()), [math.log(0.1) / 4, 3, 7, math.log(16), -0.125])
    assert tuned(scale="start").scale.tolist() == [1, 1, 1, 1, 0.5]  # type: ignore[union-attr]


def loss(w: dict[str, torch.Tensor]) -> torch.Tensor:
    return (w["rate"].log() ** 2).sum() * w["plain"].sum() + (w["widths"] ** 2).sum() + w["count"].sum()


@pytest.mark.parametrize("scale", [None, 3.0])
def test_gradients_are_those_of_the_solver_coordinates(scale: float | None) -> None:
    """Chain rule by hand: d/du of plain × u² = 2 u plain, u = log(rate); 0 for whole numbers."""
    with Objective(loss, tuned(scale=scale)) as objective:
        z = objective.vector.encode(np.array([0.3, 2.0, 5.0, 9.0, 0.7]))
        answer = objective.answer(Request(Kind.VALUE_AND_GRADIENT, z))
        u, size = math.log(0.3), scale or 1.0
        expected = [2 * u * 0.7 * size, 0, 0, 0, u * u * size]
        np.testing.assert_allclose(answer.gradient, expected, rtol=1e-12)
        rows = np.stack([z, z + 0.01, z - 0.01, z, z, z])
        losses, gradients = objective.values_and_gradients(rows)
        assert objective._generations.gradient_batch.way == "vmap"
        np.testing.assert_allclose(gradients[0], expected, rtol=1e-12)
        np.testing.assert_allclose(gradients[-1], expected, rtol=1e-12)
        one = [objective.answer(Request(Kind.VALUE_AND_GRADIENT, row)).gradient for row in rows]
        np.testing.assert_allclose(gradients, one, rtol=1e-12)
        h = 1e-6
        for i in (0, 4):
            up, down = (
                objective.answer(Request(Kind.VALUE, z + side * h * (np.arange(5) == i))).loss
                for side in (1, -1)
            )
            assert (up - down) / (2 * h) == pytest.approx(expected[i], rel=1e-6)


METHODS = [
    "cmaes", "de", "pso", "snes", "xnes", "openai_es", "random_search", "scipy.slsqp", "scipy.lbfgsb",
    "scipy.dual_annealing", "scipy.cobyqa", "scipy.nelder_mead", "cma.cmaes", "pyswarm.pso",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_evaluates_whole_numbers_inside_the_bounds(method: str) -> None:
    seen: list[list[float]] = []
    losses: list[float] = []

    def record(w: dict[str, torch.Tensor]) -> float:
        x = torch.cat([t.detach().reshape(-1) for t in w.values()])
        seen.append(x.tolist())
        losses.append(
            float(abs(x[0].log() + 3) + ((x[1:3] - 1) ** 2).sum() + (x[3].log() - 2) ** 2 + x[4] ** 2)
        )
        return losses[-1]

    vector = tuned()
    result = hybridopt.minimize(record, vector, method, budget=200, seed=1, batch="loop")
    x, first = np.array(seen), losses[0]
    assert len(np.unique(x, axis=0)) > 20
    np.testing.assert_array_equal(x[:, 1:4], np.rint(x[:, 1:4]))
    assert ((x >= vector.lower) & (x <= vector.upper)).all()
    assert result.best_loss < first
    np.testing.assert_array_equal(vector.read()[1:4], np.rint(vector.read()[1:4]))


def test_gradient_solvers_step_over_whole_numbers() -> None:
    """Autograd sees nothing of them (rounding is flat): differences move each by 1, and the solver gets there."""
    vector = ParameterVector(torch.tensor([9.0, -7.0]), bounds=(-20, 20), integer=True)
    with pytest.warns(RuntimeWarning, match="autograd refused"):
        result = hybridopt.minimize(
            lambda x: ((x - torch.tensor([3.0, 5.0])) ** 2).sum(), vector, "scipy.slsqp", budget=200
        )
    assert result.best_loss == 0
    assert vector.read().tolist() == [3, 5]


class Line:
    """Answers 3 k for the whole number k nearest to x."""

    def values(self, population: Any, probe: bool = False) -> Any:
        return 3 * np.rint(population[:, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("z", [-0.4, 0.3, 0.6, 1.4])
def test_differences_at_the_end_of_the_box_take_whole_steps_only(z: float, dtype: torch.dtype) -> None:
    vector = ParameterVector(torch.zeros(1, dtype=dtype), bounds=(0, 1), integer=True)
    start = Start.at(vector, 0, None)
    gradient = Differences(start).gradient(Line(), np.array([z]), 3 * round(z))  # type: ignore[arg-type]
    assert gradient[0] == pytest.approx(3, rel=1e-12)


def test_optimizers_in_place_refuse_whole_numbers() -> None:
    for method in ("adam", "lbfgs"):
        with pytest.raises(MethodError, match=r"cannot keep the 3 integer ones whole"):
            hybridopt.minimize(loss, tuned(), method, budget=10)
    # a logarithm they ignore, as they do the scale
    weights = {"a": torch.tensor([4.0], dtype=torch.float64)}
    plain = hybridopt.minimize(lambda w: w["a"].sum(), {"a": weights["a"].clone()}, "adam", budget=5)
    logged = hybridopt.minimize(lambda w: w["a"].sum(), ParameterVector(weights, log=True), "adam", budget=5)
    assert plain.x.tolist() == logged.x.tolist()


def test_a_saved_run_goes_on_in_the_same_coordinates() -> None:
    whole = hybridopt.minimize(loss, tuned(), "cmaes", budget=120, seed=3)
    method = hybridopt.method("cmaes")
    first = method.start(tuned(), 3)
    with Objective(loss, tuned(), 60, seed=3) as objective:
        for _ in range(4):
            first.tell(objective.answer(first.ask()))
        state = first.state_dict()
        other = method.start(ParameterVector(torch.ones(5), bounds=(-9, 9)), 9)
        other.load_state_dict(state)
        np.testing.assert_array_equal(other.ask().x, first.ask().x)
        assert isinstance(other, PopulationRun)
        for name in ("integer", "log"):
            np.testing.assert_array_equal(getattr(other.start, name), getattr(tuned(), name))
    assert math.isfinite(whole.best_loss)


def test_objective_and_minimize_take_the_choices() -> None:
    result = hybridopt.minimize(
        lambda x: float((x[0] - 2.4) ** 2 + (math.log(x[1]) - 3) ** 2),
        np.array([0.0, 1.0]),
        "cmaes",
        budget=600,
        bounds=[(-5, 5), (1e-3, 1e3)],
        integer=np.array([True, False]),
        log=np.array([False, True]),
        seed=0,
    )
    assert result.x[0] == 2
    assert result.x[1] == pytest.approx(math.exp(3), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"integer": "width"}, SelectionError, r"integer: the pattern 'width' matches no weight; nearest .* widths"),
        ({"log": np.array([1, 0, 0, 0, 0])}, SelectionError, r"log: expected True, patterns .* of shape \(5,\)"),
        ({"integer": np.array([True])}, SelectionError, r"bool array of shape \(5,\)"),
        ({"log": "plain", "bounds": None}, BoundsError, r"log: expected positive weights, got -0.5 for 'plain'\[0\]"),
        (
            {"log": "widths", "bounds": {"widths": (0, 9)}},
            BoundsError,
            r"log: expected positive lower bounds \(or none\), got 0 for 'widths'\[0\]",
        ),
        (
            {"integer": "rate", "log": None, "bounds": {"rate": (0.05, 0.6)}},
            BoundsError,
            r"no two whole torch.float64 numbers lie within the bounds of 'rate'",
        ),
        (
            {"integer": "widths", "bounds": {"widths": (3.5, 9)}, "log": None},
            BoundsError,
            r"the start lies outside for 'widths': value 3 at flat index 0",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_a_whole_number_or_a_logarithm(options: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        tuned(**options)


def test_a_logarithm_without_a_lower_bound_stays_above_zero() -> None:
    vector = ParameterVector(torch.ones(2), bounds=(-math.inf, 10), log=True)
    low, high = vector.coordinates.box()
    assert low.tolist() == [-math.inf] * 2
    np.testing.assert_allclose(high, math.log(10))
    x = vector.decode(np.array([-1e4, 1.0]))
    assert x[0] == torch.finfo(torch.float32).tiny
    assert math.isfinite(vector.encode(x)[0])
    assert vector.decode(np.array([1e4, 0.0]))[0] == 10


@pytest.mark.parametrize("bounds", [None, (1, 64)])
def test_a_whole_number_searched_by_its_logarithm_is_at_least_one(bounds: Any) -> None:
    vector = ParameterVector(torch.tensor([2.0]), bounds=bounds, integer=True, log=True)
    start = Start.at(vector, 0, None)
    assert start.lower == pytest.approx(math.log(0.5))
    assert vector.decode(np.array([[-50.0], [start.lower[0]], [0.0], [math.log(1.6)]])).ravel().tolist() == [
        1,
        1,
        1,
        2,
    ]
    low, high = cells(start.lower, start.log)
    assert (low, high) == (pytest.approx(start.lower), pytest.approx(math.log(1.5)))
    assert start.rounded(start.lower).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["scipy.lbfgsb", "scipy.tnc", "cmaes(popsize=5)", "scipy.nelder_mead"])
@pytest.mark.parametrize("bounds", [None, (1, 64), (2, 63)])
def test_logarithms_of_whole_numbers_are_searched_by_every_method(
    method: str, dtype: torch.dtype, bounds: Any
) -> None:
    seen: list[list[float]] = []

    def record(x: torch.Tensor) -> float:
        seen.append(x.tolist())
        return float((x.detach().log() ** 2).sum())

    vector = ParameterVector(torch.full((2,), 9.0, dtype=dtype), bounds=bounds, integer=True, log=True)
    result = hybridopt.minimize(record, vector, method, budget=150, seed=0)
    x = np.array(seen)
    np.testing.assert_array_equal(x, np.rint(x))
    assert x.min() >= 1
    assert bounds is None or ((x >= bounds[0]) & (x <= bounds[1])).all()
    assert result.best_loss < 2 * math.log(9) ** 2
    if method in ("scipy.lbfgsb", "scipy.tnc"):
        assert abs(x[1] - x[0]).sum() == 1, "a probe moves one number by one"


@pytest.mark.parametrize("upper", [9, 10])
@pytest.mark.parametrize(
    "method", ["scipy.slsqp", "scipy.lbfgsb", "scipy.nelder_mead", "scipy.least_squares"]
)
def test_whole_numbers_are_left_wherever_a_solver_arrives(method: str, upper: int) -> None:
    """The first step of SLSQP leads to the lower edge, -1/2: what is half a number further decodes to 0 as well."""
    many = method == "scipy.least_squares"
    result = hybridopt.minimize(
        lambda x: x - 3 if many else float(((x - 3) ** 2).sum()),
        np.full(2, float(upper)),
        method,
        budget=120,
        bounds=(0, upper),
        integer=True,
        **({"residuals": True} if many else {}),
    )
    assert result.best_loss == 0


def test_a_simplex_begins_at_least_one_number_wide() -> None:
    for start, bounds in ((10.0, None), (10.0, (-20, 10)), (-20.0, (-20, 10)), (0.0, (0, 10))):
        options = {} if bounds is None else {"bounds": bounds}
        result = hybridopt.minimize(
            lambda x: float(((x - 3) ** 2).sum()),
            np.full(2, start),
            "scipy.nelder_mead",
            budget=200,
            integer=True,
            **options,
        )
        assert result.best_loss == 0, (start, bounds)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_logarithm_without_an_upper_bound_stays_finite(dtype: torch.dtype) -> None:
    vector = ParameterVector(torch.ones(2, dtype=dtype), log=True)
    assert vector.decode(np.array([1e5, 0.0])).tolist() == [torch.finfo(dtype).max, 1]
    x = torch.ones(1, dtype=dtype)
    hybridopt.minimize(lambda x: -x.double().log().sum(), x, "cmaes", budget=900, log=True, seed=0)
    assert x.item() == torch.finfo(dtype).max


def test_a_start_that_is_not_whole_is_rounded() -> None:
    vector = ParameterVector(torch.tensor([0.7]), bounds=(0.9, 3), integer=True)
    result = hybridopt.minimize(lambda x: x.sum(), vector, "random_search", budget=1)  # of the start alone
    assert result.best_loss == 1


INPUTS = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))


def squares(model: torch.nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(INPUTS)
    return ((out - INPUTS @ torch.tensor([[3.0], [-2.0]])) ** 2).mean()


def straight(seed: int) -> torch.nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Linear(2, 1)


@pytest.mark.parametrize(
    "method",
    [
        "slsqp",
        "cmaes",
        "split('weight': adam(lr=0.1), 'bias': cmaes)",
        "restart(nelder_mead(steps=9))",
        "adam > slsqp",
    ],
)
def test_a_scale_read_from_the_start_is_resumed(method: str, tmp_path: Any) -> None:
    """A model that stands elsewhere by now has another "start"."""

    def run(model: torch.nn.Module, budget: int, **more: Any) -> Any:
        return hybridopt.minimize(squares, model, method, budget=budget, seed=0, scale="start", **more)

    whole = run(straight(1), 60)
    run(straight(1), 18, checkpoint=tmp_path / "c.pt")
    resumed = run(straight(2), 60, checkpoint=tmp_path / "c.pt")
    assert (resumed.best_loss, resumed.evaluations) == (whole.best_loss, whole.evaluations)
    np.testing.assert_array_equal(resumed.x, whole.x)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ({}, {"scale": 2.0}, r"other scale \(scale none, here 2\).*pass the same scale="),
        ({"scale": 2.0}, {}, r"other scale \(scale 2, here none\)"),
        ({"scale": 2.0}, {"scale": [2.0, 2.0, 3.0]}, r"other scale \(scale 2, here between 2 and 3\)"),
        ({}, {"scale": "start"}, r"other scale \(scale none"),
        ({"scale": "start"}, {}, r"other scale"),
        (
            {"bounds": (-1, 1)},
            {"bounds": (-1, 2)},
            r"other bounds \(upper 1, here 2\).*pass the same bounds=",
        ),
        ({}, {"bounds": (-1, 1)}, r"other bounds \(lower -inf, here -1\)"),
        ({"noise": "fixed"}, {}, r"noise='fixed', this objective has 'shared'"),
        ({"backward_cost": 1.0}, {}, r"backward_cost=1.0, this objective has 2.0"),
    ],
)
def test_a_state_of_other_coordinates_is_refused(before: Any, after: Any, text: str) -> None:
    x = np.array([0.5, -0.5, 0.25])
    with hybridopt.Run(lambda x: float((x**2).sum()), x, "cmaes", budget=30, seed=0, **before) as run:
        run.step()
        state = run.state_dict()
    with hybridopt.Run(lambda x: float((x**2).sum()), x, "cmaes", budget=30, seed=0, **before) as run:
        run.load_state_dict(state)
    with (
        hybridopt.Run(lambda x: float((x**2).sum()), x, "cmaes", budget=30, seed=0, **after) as run,
        pytest.raises(StateError, match=text),
    ):
        run.load_state_dict(state)
