"""Options are checked against the types their class declares, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

import hybridopt
from hybridopt.errors import MethodError
from hybridopt.options import check_options


@dataclass(frozen=True)
class Example:
    name = "example"

    rate: float = 0.1
    count: int | None = None
    on: bool = False
    mode: Literal["a", "b"] = "a"
    anything: Any = None

    def __post_init__(self) -> None:
        check_options(self)


@pytest.mark.parametrize(
    "options",
    [{"rate": 1}, {"rate": np.float64(2)}, {"count": 3}, {"count": np.int64(3)}, {"on": True}, {"mode": "b"},
     {"anything": object()}],
)  # fmt: skip
def test_right_types_pass(options):
    Example(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": "fast"}, "expected rate to be a number, got 'fast'"),
        ({"rate": True}, "expected rate to be a number, got True"),
        ({"rate": None}, "expected rate to be a number, got None"),
        ({"count": 2.5}, "expected count to be a whole number or None, got 2.5"),
        ({"on": 1}, "expected on to be True or False, got 1"),
        ({"mode": "c"}, "expected mode to be one of a, b, got 'c'"),
    ],
)
def test_wrong_types_are_named(options, words):
    with pytest.raises(MethodError, match=f"^example: {words}$"):
        Example(**options)


@pytest.mark.parametrize(
    "text", ["pyswarm.pso(omega=abc)", "pyswarm.pso(maxiter=2.5)", "slsqp(maxiter=abc)", "cma.cmaes(popsize=abc)",
             "dual_annealing(local_search=1)", "cma.cmaes(sigma=(1, 2))"],
)  # fmt: skip
def test_every_method_checks_its_options(text):
    with pytest.raises(MethodError, match="expected"):
        hybridopt.method(text)
