"""`initial=` of pycma and pyswarm: a user's own points in the first generation, in the weights' units."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import method
from hybridopt.errors import BoundsError, MethodError

CMAES, PSO = "cma.cmaes(popsize=8)", "pyswarm.pso(swarmsize=8)"
KNOWN = ((0.25, 3.0), (1.75, 1.0), (2.0, 4.0))  # the last one in a corner of (0.1, 2) x (1, 4)


def asked(made: Any, budget: int = 8, **options: Any) -> list[list[float]]:
    points: list[list[float]] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        points.append(x.tolist())
        return ((x - 1) ** 2).sum()

    bounds = np.array([(0.1, 2.0), (1.0, 4.0)])
    options = {"bounds": bounds, "seed": 3, "batch": "loop"} | options
    hybridopt.minimize(loss, torch.tensor([1.0, 2.0], dtype=torch.float64), made, budget=budget, **options)
    return points


def given(text: str, initial: Any = KNOWN) -> Any:
    name = text.partition("(")[0]
    size = {"popsize": 8} if name == "cma.cmaes" else {"swarmsize": 8}
    return method(name, initial=initial, **size)


@pytest.mark.parametrize("text", [CMAES, PSO])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": np.array([10.0, 0.1])},
        {"log": [True, False]},
        {"log": True, "scale": np.array([10.0, 0.1])},
        {"integer": [False, True]},
        {"integer": [False, True], "log": [True, True]},
    ],
)
def test_are_in_the_first_generation(text: str, options: dict[str, Any]) -> None:
    points = np.array(asked(given(text), **options))
    assert len(points) == 8
    for known in KNOWN:
        assert np.isclose(points, known, rtol=1e-9, atol=0).all(axis=1).any(), known
    assert len(np.unique(points.round(6), axis=0)) > len(KNOWN)  # the others are drawn
    if text == PSO:
        np.testing.assert_allclose(points[:3], KNOWN, rtol=1e-12)


@pytest.mark.parametrize("text", [CMAES, PSO])
def test_are_plain_data(text: str) -> None:
    made = given(text, torch.tensor(KNOWN, dtype=torch.float64))
    assert made == given(text, np.array(KNOWN)) == given(text, [list(p) for p in KNOWN])
    assert made.initial == KNOWN
    assert method(str(made)) == made
    assert hash(made) == hash(given(text))
    assert given(text, []) == method(text)
    assert asked(given(text, ())) == asked(text)


@pytest.mark.parametrize("text", [CMAES, PSO])
def test_come_before_the_points_of_a_predecessor(text: str) -> None:
    """A stage takes both; the predecessor's best point is the next one after the user's."""
    points = np.array(asked(f"scipy.nelder_mead(evaluations=8) > {given(text)}", budget=16))
    losses = ((points[:8] - 1) ** 2).sum(axis=1)
    later = points[8:]
    for known in (*KNOWN, points[:8][losses.argmin()]):
        assert np.isclose(later, known, rtol=1e-9, atol=0).all(axis=1).any(), known


@pytest.mark.parametrize("text", [CMAES, PSO])
def test_go_on_from_a_saved_state(text: str) -> None:
    def new() -> Any:
        x = torch.ones(2, dtype=torch.float64)
        return hybridopt.Run(
            lambda x: ((x - 1) ** 2).sum(),
            x,
            given(text),
            budget=40,
            bounds=(0.1, 4),
            log=[True, False],
            seed=1,
        )

    losses, states = [], []
    with new() as whole:
        while (step := whole.step()) is not None:
            losses.append(step.loss)
            states.append(whole.state_dict())
    for i in (0, len(states) // 2):
        with new() as part:
            part.load_state_dict(states[i])
            rest = []
            while (step := part.step()) is not None:
                rest.append(step.loss)
        assert rest == losses[i + 1 :]


@pytest.mark.parametrize("text", [CMAES, PSO])
@pytest.mark.parametrize(
    "initial", [3, (1.0, 2.0), ((1.0, 2.0), (1.0,)), ((1.0, np.nan),), "abc", ((1, None),)]
)
def test_must_be_rows_of_finite_numbers(text: str, initial: Any) -> None:
    words = re.escape(f"{text.partition('(')[0]}: expected initial to be points of n finite numbers each")
    with pytest.raises(MethodError, match=words):
        given(text, initial)


@pytest.mark.parametrize("text", [CMAES, PSO])
def test_must_fit_the_weights(text: str) -> None:
    with pytest.raises(MethodError, match="expected initial points of 2 numbers, one for each weight, got 3"):
        asked(given(text, ((1.0, 2.0, 3.0),)))
    with pytest.raises(BoundsError, match=r"initial points inside the bounds, number 2 is \(1.0, 4.5\)"):
        asked(given(text, ((1.0, 2.0), (1.0, 4.5))))


def test_must_be_positive_where_the_logarithm_is_searched() -> None:
    with pytest.raises(MethodError, match="positive where the logarithm"):
        asked(given(CMAES, ((0.0, 2.0),)), log=[True, False], bounds=None)


def test_must_not_be_too_many() -> None:
    with pytest.raises(MethodError, match="expected at most 4 initial points, half of popsize=8, got 5"):
        asked(given(CMAES, ((1.0, 2.0),) * 5))
    with pytest.raises(MethodError, match="expected at most swarmsize=8 initial points, got 9"):
        given(PSO, ((1.0, 2.0),) * 9)
