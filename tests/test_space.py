"""Spaces of hyperparameters: a point and its values, conditions, sampling, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

import hybridopt
from hybridopt.errors import BoundsError, SelectionError
from hybridopt.space import Categorical, Float, Int, Space


def space() -> Space:
    return Space(
        {
            "lr": Float(1e-5, 1, log=True),
            "width": Int(4, 128, log=True),
            "depth": Int(-1, 2),
            "optimizer": Categorical(["sgd", "adam", None]),
            "momentum": Float(0, 0.99, when=("optimizer", "sgd")),
            "nesterov": Categorical([False, True], when=("optimizer", ("sgd", None))),
            "beta": Float(0.1, 0.9, when=("nesterov", True)),
        }
    )


def test_every_sample_stands_for_values_that_stand_for_it() -> None:
    s, rng = space(), np.random.default_rng(0)
    vector = s.vector()
    for _ in range(200):
        x = s.sample(rng)
        assert not vector.outside(x)
        values = s.values(x)
        assert s.values(s.x(values)) == values
        assert values == s.values(vector.decode(vector.encode(x))) | {"lr": values["lr"]}
        assert type(values["width"]) is type(values["depth"]) is int
        assert type(values["lr"]) is float
        json.dumps(values)
        assert ("momentum" in values) == (values["optimizer"] == "sgd")
        assert ("nesterov" in values) == (values["optimizer"] in ("sgd", None))
        assert ("beta" in values) == (values.get("nesterov") is True)


def test_samples_are_even_in_what_is_searched() -> None:
    s, rng = space(), np.random.default_rng(1)
    drawn = [s.values(s.sample(rng)) for _ in range(3000)]
    depths = Counter(v["depth"] for v in drawn)
    assert set(depths) == {-1, 0, 1, 2}
    assert all(abs(n - 750) < 4 * 750**0.5 for n in depths.values())
    choices = Counter(v["optimizer"] for v in drawn)
    assert all(abs(choices[c] - 1000) < 4 * 1000**0.5 for c in ("sgd", "adam", None))
    # uniform logarithms: as many below the geometric mean of the ends as above
    assert abs(sum(v["lr"] < 10**-2.5 for v in drawn) - 1500) < 4 * 1500**0.5
    assert abs(sum(v["width"] < (3.5 * 128.5) ** 0.5 for v in drawn) - 1500) < 4 * 1500**0.5


def test_the_middle_and_a_start() -> None:
    s = space()
    middle = s.values(s.vector().read())
    assert middle == {
        "lr": pytest.approx(10**-2.5),
        "width": 23,  # sqrt(4 × 128) = 22.6
        "depth": 0,
        "optimizer": "sgd",
        "momentum": 0.495,
        "nesterov": False,
    }
    given = {"lr": 0.5, "width": 128, "depth": 2, "optimizer": "adam"}
    vector = s.vector(given)
    assert s.values(vector.read()) == given
    assert s.values(dict(zip(vector.names, vector.tensors, strict=True))) == given
    assert vector.names == tuple(s.slices)
    assert s.slices["optimizer"] == slice(3, 6)
    assert s.n == vector.n == 10


@pytest.mark.parametrize("method", ["cmaes", "de", "random_search"])
def test_any_method_searches_it(method: str) -> None:
    s = space()
    seen = []

    def loss(w: Any) -> float:
        v: Any = s.values(w)
        seen.append(v)
        badness = {"adam": 0.0, "sgd": 1.0 + v.get("momentum", 0), None: 2.0}[v["optimizer"]]
        return float(abs(np.log10(v["lr"]) + 3) + abs(v["width"] - 64) / 64 + abs(v["depth"] - 2) + badness)

    result = hybridopt.minimize(loss, s.vector(), method, budget=400, seed=0, batch="loop")
    assert {v["optimizer"] for v in seen} == {"sgd", "adam", None}
    best: Any = s.values(result.x)
    assert best["optimizer"] == "adam"
    assert best["depth"] == 2
    assert result.best_loss < 0.6


def test_a_space_as_plain_data() -> None:
    s = space()
    said = json.loads(json.dumps(s.describe()))
    assert said == s.describe()
    assert said["momentum"] == {
        "kind": "float",
        "low": 0,
        "high": 0.99,
        "log": False,
        "when": ["optimizer", "sgd"],
    }
    assert said["nesterov"]["when"] == ["optimizer", ["sgd", None]]
    assert said["optimizer"]["choices"] == ["sgd", "adam", None]
    again = eval(repr(s))
    assert again.describe() == s.describe()


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"lr": 0.1}, SelectionError, r"expected a value for 'width'"),
        ({"lr": 2}, BoundsError, r"'lr': expected a number from 1e-05 to 1, got 2"),
        ({"lr": True}, BoundsError, r"'lr': expected a number"),
        ({"lr": 0.1, "width": 8.5}, BoundsError, r"'width': expected a whole number, got 8.5"),
        (
            {"lr": 0.1, "width": 8, "depth": 0, "optimizer": "rprop"},
            SelectionError,
            r"'optimizer': expected one of \('sgd', 'adam', None\), got 'rprop'",
        ),
        (
            {"lr": 0.1, "width": 8, "depth": 0, "optimizer": "adam", "momentum": 0.9},
            SelectionError,
            r"'momentum' needs \('optimizer', 'sgd'\)",
        ),
        (
            {"lr": 0.1, "width": 8, "depth": 0, "optimizer": "adam", "speed": 1},
            SelectionError,
            r"'speed' is no parameter; known: .*, lr, .*, width",
        ),
        ({"lrr": 0.1}, SelectionError, r"'lrr' is no parameter; nearest: lr$"),
    ],
)
def test_values_that_no_point_stands_for(values: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        space().x(values)


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        ({}, SelectionError, "at least one parameter"),
        ({"a*": Float(0, 1)}, SelectionError, r"names that are text without any of '\*\?\[\]', got 'a\*'"),
        ({"a": (0, 1)}, SelectionError, r"'a': expected a Float, Int or Categorical, got \(0, 1\)"),
        ({"a": Float(1, 1)}, BoundsError, r"'a': expected finite low < high, got \(1, 1\)"),
        ({"a": Float(0, 1, log=True)}, BoundsError, r"'a': expected finite 0 < low < high"),
        ({"a": Float(1, 0)}, BoundsError, r"'a': expected finite low < high, got \(1, 0\)"),
        ({"a": Float("0", 1)}, BoundsError, r"'a': expected finite low < high, got \('0', 1\)"),  # type: ignore[arg-type]
        ({"a": Float(0, None)}, BoundsError, r"'a': expected finite low < high, got \(0, None\)"),  # type: ignore[arg-type]
        ({"a": Categorical([])}, SelectionError, r"'a': expected two or more different choices.*got \(\)"),
        ({"a": Categorical([[1], [2]])}, SelectionError, r"'a': expected two or more different choices"),  # type: ignore[list-item]
        (
            {"a": Categorical("relu")},
            SelectionError,
            r"'a': expected two or more different choices.*got 'relu'",
        ),
        ({"a": Categorical(5)}, SelectionError, r"'a': expected two or more different choices.*got 5"),  # type: ignore[arg-type]
        ({"a": Int(0.5, 3)}, BoundsError, r"'a': expected whole numbers"),  # type: ignore[arg-type]
        ({"a": Categorical(["x"])}, SelectionError, r"'a': expected two or more different choices"),
        ({"a": Categorical(["x", "x"])}, SelectionError, r"'a': expected two or more different choices"),
        ({"a": Float(0, 1, when=("b", 1))}, SelectionError, r"'a': expected when=\(an earlier parameter"),
        ({"b": Float(0, 1), "a": Float(0, 1, when=("b", 1))}, SelectionError, r"a condition is on choices"),
        (
            {"b": Int(0, 3), "a": Float(0, 1, when=("b", 4))},
            BoundsError,
            r"'b': expected a number from 0 to 3",
        ),
    ],
)
def test_what_is_no_space(parameters: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        Space(parameters)


def test_a_point_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(10,\), one number per coordinate, got \(3,\)"):
        space().values(np.zeros(3))
