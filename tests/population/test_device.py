"""Generations drawn where the model lives: the same points as on the host, and none of them moved.

Where there is no GPU, torch's operations run on the CPU: they round as a GPU's do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hybridopt
from hybridopt import start as start_module
from hybridopt.optimizer import Answer
from hybridopt.population import CMAES, PGPE, SNES, OpenAIES, _device, _large
from hybridopt.population._boundary import Space
from hybridopt.population._large import MANY, fill_mirrored, fill_normal, weighted_moments
from hybridopt.rows import DeviceRows, combined, square, squared_lengths, stacked
from hybridopt.start import Start

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = MANY + 905
METHODS = [SNES(popsize=7), PGPE(popsize=6), OpenAIES(popsize=8)]
CMA = [CMAES(popsize=7, covariance="separable")]  # its sums round otherwise there


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are drawn by NumPy, wherever the weights are."""
    monkeypatch.setattr(start_module, "_home", lambda vector: None)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are drawn by torch, wherever the weights are."""
    monkeypatch.setattr(start_module, "_home", lambda vector: DEVICE)


@pytest.fixture
def unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error to copy a whole matrix to the host."""

    def refuse(self: DeviceRows, dtype: Any = None, copy: Any = None) -> Any:
        raise AssertionError("a generation was moved to the host")

    monkeypatch.setattr(DeviceRows, "__array__", refuse)


def empty(rows: int, n: int) -> DeviceRows:
    return DeviceRows(torch.full((rows, n), torch.nan, dtype=torch.float64, device=DEVICE))


# -- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [MANY, MANY + 1, 6143, 6144, 6145, 40_001])
@pytest.mark.parametrize("given", [False, True])
def test_normal_numbers_are_the_same_bits(n: int, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    what = (rng.normal(size=n), rng.uniform(0.1, 2, n)) if given else ()
    here, rows = np.empty((7, n)), empty(7, n)
    monkeypatch.setattr(_device, "_AT_ONCE", 3 * n)  # in three parts
    one, other = np.random.default_rng(5), np.random.default_rng(5)
    fill_normal(one, here, *what)
    fill_normal(other, rows, *what)
    np.testing.assert_array_equal(np.asarray(rows), here)
    assert one.random() == other.random()


@pytest.mark.parametrize("n", [MANY, 6145])
def test_mirrored_pairs_and_moments_are_the_same_bits(n: int) -> None:
    rng = np.random.default_rng(0)
    mu, sigma, weights = rng.normal(size=n), rng.uniform(0.1, 2, n), rng.normal(size=8)
    here, rows = np.empty((8, n)), empty(8, n)
    fill_mirrored(np.random.default_rng(5), here, mu, sigma)
    fill_mirrored(np.random.default_rng(5), rows, mu, sigma)
    np.testing.assert_array_equal(np.asarray(rows), here)
    for a, b in zip(
        weighted_moments(here, mu, sigma, weights), weighted_moments(rows, mu, sigma, weights), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_arithmetic_and_sums() -> None:
    rng = np.random.default_rng(0)
    x, by = rng.normal(size=(4, 6)), rng.normal(size=6)
    rows = DeviceRows(torch.from_numpy(x.copy()).to(DEVICE))
    for found, expected in ((rows * by, x * by), (np.float64(3) * rows, 3 * x), (2.5 * rows, 2.5 * x)):
        np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_allclose(combined(by[:4], rows), by[:4] @ x, rtol=1e-13)
    np.testing.assert_allclose(squared_lengths(rows), (x * x).sum(1), rtol=1e-13)
    other = rows.copy()
    other += by
    other += rows
    np.testing.assert_array_equal(np.asarray(other), x + by + x)
    square(rows)
    np.testing.assert_array_equal(np.asarray(rows), x * x)
    with pytest.raises(TypeError):  # nothing is moved unasked
        np.exp(rows)
    with pytest.raises(ValueError, match="copy=False"):
        np.asarray(rows, copy=False)


def test_extreme_words_give_the_same_bits() -> None:
    """Every bit set, none, and the signs alone."""
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**30, 3 << 30], dtype=np.uint32)
    radius, angle = (a.ravel() for a in np.meshgrid(words, words))
    kernels = _large._kernels()
    assert kernels is not None
    x, y = np.empty(len(radius)), np.empty(len(radius))
    kernels._box_muller(radius, angle, x, y)
    given = (torch.from_numpy(word.view(np.int32).copy()).to(DEVICE) for word in (radius, angle))
    for found, expected in zip(_device._box_muller(*given), (x, y), strict=True):
        np.testing.assert_array_equal(found.cpu().numpy(), expected)


# -- a matrix that reads like an array -----------------------------------------------------------------------------


def test_rows() -> None:
    expected = np.arange(12.0).reshape(4, 3)
    rows = DeviceRows(torch.from_numpy(expected.copy()).to(DEVICE))
    assert (len(rows), rows.shape, rows.ndim) == (4, (4, 3), 2)
    np.testing.assert_array_equal(np.asarray(rows), expected)
    np.testing.assert_array_equal(rows[2], expected[2])
    np.testing.assert_array_equal(rows[[3, 1]], expected[[3, 1]])
    own = rows[np.int64(1)]
    own[:] = 0
    kept = rows.copy()
    part = rows[1:3]
    assert isinstance(part, DeviceRows)
    part[0] = np.array([7.0, 8.0, 9.0])
    np.testing.assert_array_equal(rows[1], [7, 8, 9])
    np.testing.assert_array_equal(np.asarray(kept), expected)
    rows.clamp(np.full(3, 2.0), np.array([5.0, np.inf, 5.0]))
    np.testing.assert_array_equal(rows[1], [5, 8, 5])
    np.testing.assert_array_equal(rows[0], [2, 2, 2])
    above = stacked([np.ones(3), np.zeros(3)], kept)
    np.testing.assert_array_equal(np.asarray(above), np.vstack([np.ones(3), np.zeros(3), expected]))


# -- whole runs ----------------------------------------------------------------------------------------------------


def path(method: Any, budget: Any, **options: Any) -> Any:
    """All losses and the best point."""
    weights = torch.zeros(N, dtype=options.pop("dtype", torch.float64), device=DEVICE)
    target = torch.linspace(-1, 1, N, dtype=weights.dtype, device=DEVICE)
    loss = options.pop("loss", lambda w: ((w - target) ** 2).mean())
    losses = []
    with hybridopt.Run(loss, weights, method, budget=budget, seed=3, **options) as run:
        for step in run:
            losses.append(step.loss)
        result = run.result()
    return losses, result.best_loss, result.x.tolist()


def both(request: pytest.FixtureRequest, method: Any, budget: Any, **options: Any) -> tuple[Any, Any]:
    """The path drawn on the host, and that drawn on the device, of which nothing may be moved."""
    here = path(method, budget, **options)
    request.getfixturevalue("there")
    request.getfixturevalue("unmoved")
    return here, path(method, budget, **options)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bounds": (-0.4, 0.3)},
        {"scale": np.linspace(0.5, 2, N), "bounds": (-0.4, 0.3)},
        {"dtype": torch.float32},
        {"batch": 3},
    ],
    ids=["plain", "bounds", "scale", "float32", "threes"],
)
def test_a_run_takes_the_same_path(
    method: Any, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    expected, found = both(request, method, 61, **options)
    assert found == expected


@pytest.mark.parametrize("method", CMA, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bounds": (-0.4, 0.3)}, {"scale": np.linspace(0.5, 2, N), "bounds": (-0.4, np.inf)}],
    ids=["plain", "bounds", "scale"],
)
def test_a_run_takes_almost_the_same_path(
    method: Any, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    for known, found in zip(*both(request, method, 64, **options), strict=True):
        np.testing.assert_allclose(found, known, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("covariance", ["full", "limited"])
def test_other_covariances_are_numpys(covariance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_large, "MANY", 30)
    optimizer: Any = CMAES(popsize=4, covariance=covariance).start(
        hybridopt.ParameterVector(torch.zeros(40)), 0
    )
    assert isinstance(optimizer.ask().x, np.ndarray)
    assert isinstance(optimizer.strategy.z, np.ndarray)


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_the_map_into_the_box(scale: float) -> None:
    rng = np.random.default_rng(0)
    lower, upper = np.array([-1, -np.inf, -2, -np.inf, 0.5]), np.array([1, 3, np.inf, np.inf, 0.6])
    space = Space(Start(np.zeros(5), lower, upper, np.full(5, 1e-16), 0), np.full(5, scale))
    u = rng.normal(size=(4000, 5)) * 10.0 ** rng.integers(-2, 3, (4000, 1))
    rows = space.inside(DeviceRows(torch.from_numpy(u).to(DEVICE)))
    np.testing.assert_array_equal(np.asarray(rows), space.inside(u))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("method", METHODS + CMA, ids=str)
def test_generations_are_on_the_device(method: Any) -> None:
    optimizer = method.start(hybridopt.ParameterVector(torch.zeros(N)), 0)
    assert isinstance(optimizer.ask().x, DeviceRows)
    optimizer.load_state_dict(optimizer.state_dict())  # what was drawn then is an array
    if method in CMA:
        assert isinstance(optimizer.strategy.z, DeviceRows)
        assert isinstance(optimizer.strategy.y, DeviceRows)
    optimizer.tell(Answer(losses=np.arange(float(len(optimizer.ask().x)))))
    assert isinstance(optimizer.ask().x, DeviceRows)
    few = method.start(hybridopt.ParameterVector(torch.zeros(MANY - 1)), 0)
    assert isinstance(few.ask().x, np.ndarray)


def test_only_gpus_whose_coordinates_are_plain_are_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cpu = hybridopt.ParameterVector(torch.zeros(3))
    assert start_module._home(cpu) is None

    class Elsewhere:
        device = torch.device("cuda", 1)

    assert start_module._home(_vector([Elsewhere(), Elsewhere()])) == "cuda:1"
    assert start_module._home(_vector([Elsewhere(), torch.zeros(1)])) is None
    assert start_module._home(_vector([Elsewhere()], integer=np.ones(1, bool))) is None
    assert start_module._home(_vector([Elsewhere()], log=np.ones(1, bool))) is None


def _vector(tensors: list[Any], integer: Any = None, log: Any = None) -> Any:
    class Vector:
        pass

    made: Any = Vector()
    made.tensors, made.integer, made.log = tensors, integer, log
    return made


@pytest.mark.parametrize("method", METHODS + CMA, ids=str)
@pytest.mark.parametrize("generation", [0, 3])
def test_too_little_memory_on_the_device(
    method: Any, generation: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host draws from then on."""

    def run() -> Any:
        weights = torch.zeros(N, dtype=torch.float64, device=DEVICE)
        result = hybridopt.minimize(lambda w: ((w - 0.3) ** 2).mean(), weights, near, budget=60, seed=1)
        return result.best_loss, result.x.tolist(), list(result.notes)

    near = dataclasses.replace(method, sigma=1e-3)
    *expected, notes = run()
    request.getfixturevalue("there")
    normal, drawn = _device.normal, []

    def full(*given: Any) -> None:
        drawn.append(given)
        normal(*given)
        if len(drawn) > generation:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_device, "normal", full)
    *found, said = run()
    assert len(drawn) == generation + 1
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-12 if method in CMA else 0)
    assert said == [*notes, "generations are drawn on the CPU: the weights' device has too little memory"]


@pytest.mark.usefixtures("there")
def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = DeviceRows.copy

    def small(self: DeviceRows) -> DeviceRows:
        if len(self) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copy(self)

    monkeypatch.setattr(DeviceRows, "copy", small)
    weights = torch.zeros(N, dtype=torch.float64, device=DEVICE)
    result = hybridopt.minimize(
        lambda w: ((w - 0.3) ** 2).mean(), weights, SNES(popsize=9), budget=60, seed=1
    )
    assert result.evaluations == 60
    assert any("halved" in note for note in result.notes)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_loss_that_cannot_be_batched_and_one_that_draws(
    method: Any, request: pytest.FixtureRequest
) -> None:
    def one_by_one(w: Tensor) -> Tensor:
        return torch.tensor(float((w**2).mean()) + 1)

    def noisy(w: Tensor) -> Tensor:
        return ((w - 0.1 * torch.randn_like(w)) ** 2).mean()

    expected = [path(method, 45, loss=loss) for loss in (one_by_one, noisy)]
    request.getfixturevalue("there")
    assert [path(method, 45, loss=loss) for loss in (one_by_one, noisy)] == expected


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_loss_that_writes_into_its_weights(method: Any, request: pytest.FixtureRequest) -> None:
    def loss(w: Tensor) -> Tensor:
        return (w.mul_(2) - 1).square().mean()

    near = dataclasses.replace(method, sigma=1e-3)
    expected, found = both(request, near, 45, loss=loss)
    assert np.abs(expected[-1]).max() > 0, "the best point is not the start"
    assert found == expected


@pytest.mark.parametrize(
    "text", ["snes(popsize=6, evaluations=20) > adam", "race(snes(popsize=6), pgpe(popsize=6))"]
)
def test_compositions(text: str, request: pytest.FixtureRequest) -> None:
    expected = path(text, 70)
    request.getfixturevalue("there")
    assert path(text, 70) == expected


def test_a_part_of_a_split(request: pytest.FixtureRequest) -> None:
    def run() -> Any:
        model = {"a": torch.zeros(N), "b": torch.zeros(3)}
        split = 'split("a": snes(popsize=5), "b": cmaes(popsize=5))'
        result = hybridopt.minimize(
            lambda w: ((w["a"] - 0.3) ** 2).mean() + ((w["b"] - 1) ** 2).sum(),
            model,
            split,
            budget=60,
            seed=1,
        )
        return result.best_loss, result.x.tolist()

    expected = run()
    request.getfixturevalue("there")
    assert run() == expected


@pytest.mark.parametrize("method", METHODS + CMA, ids=str)
@pytest.mark.parametrize(("cut", "scale"), [(20, None), (23, None), (23, np.linspace(0.5, 2, N))])
def test_saved_on_one_goes_on_on_the_other(
    method: Any, cut: int, scale: Any, request: pytest.FixtureRequest
) -> None:
    """Between generations and in the middle of one."""

    def begun(budget: int) -> Any:
        target = torch.linspace(-1, 1, N, dtype=torch.float64)
        weights = torch.zeros(N, dtype=torch.float64)
        return hybridopt.Run(
            lambda w: ((w - target) ** 2).mean(), weights, method, budget=budget, seed=3, scale=scale
        )

    def cut_at(budget: int) -> Any:
        with begun(budget) as run:
            for _ in run:
                pass
            return run.state_dict()

    def whole(state: Any = None) -> Any:
        with begun(1 + 8 * method.popsize) as run:  # whole generations, if nothing is evaluated twice
            if state is not None:
                run.load_state_dict(state)
            for _ in run:
                pass
            result = run.result()
        return result.best_loss, result.steps, result.x.tolist()

    expected, here = whole(), cut_at(cut)
    request.getfixturevalue("there")
    there = cut_at(cut)
    if method in CMA:  # to the bit only where it was
        assert whole(there) == whole()
        return
    assert whole() == whole(here) == whole(there) == expected
    request.getfixturevalue("monkeypatch").undo()
    assert whole(there) == expected
