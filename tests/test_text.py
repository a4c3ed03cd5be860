"""`hybridopt.text`: what is printed is read back equal, and what cannot be read is shown at its place."""

from __future__ import annotations

import math
import pickle
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hybridopt
from hybridopt.adapters import CMAES, PSO, SLSQP, Adam, DualAnnealing
from hybridopt.errors import BudgetError, HybridoptError, MethodError, PluginError
from hybridopt.optimizer import HandOver, Method, Optimizer
from hybridopt.text import LIMITS, method
from hybridopt.vector import ParameterVector


class Outside(torch.optim.Optimizer):
    """A third party's optimizer, which takes any option."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


class Shell:
    Inner = Outside


@pytest.fixture(autouse=True, scope="module")
def outside_module() -> Iterator[None]:
    """A module by the name under which the methods made of `Outside` print themselves."""
    module = types.ModuleType("outside_module")
    module.Outside, module.Shell = Outside, Shell  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    name = Outside.__module__
    Outside.__module__ = "outside_module"
    sys.modules["outside_module"] = module
    yield
    del sys.modules["outside_module"]
    Outside.__module__ = name


# -- print, then read -----------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none())
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        NUMBERS,
        st.text(max_size=8),
        st.sampled_from(["None", "true", "inf", "nan", "-inf", "it's", '"', "\\"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=5,
)
POSITIVE = st.floats(1e-300, 1e300)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True).filter(
    lambda name: name not in LIMITS and not re.match(r"(inf|nan)$|cls$|self$|params$", name)
)


def options(**given: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=given)


MODES = st.sampled_from(["auto", "autograd", "differences", "none"])
LEAVES: st.SearchStrategy[Method] = st.one_of(
    options(ftol=POSITIVE, maxiter=st.integers(1), eps=POSITIVE, gradients=MODES).map(lambda o: SLSQP(**o)),
    options(maxiter=st.integers(1), local_search=st.booleans(), gradients=MODES).map(
        lambda o: DualAnnealing(**o)
    ),
    options(swarmsize=st.integers(1, 999), maxiter=st.integers(1, 999)).map(lambda o: PSO(**o)),
    options(sigma=POSITIVE, popsize=st.none() | st.integers(2, 99), diagonal=st.booleans()).map(
        lambda o: CMAES(**o)
    ),
    options(lr=POSITIVE, betas=st.tuples(POSITIVE, POSITIVE), foreach=st.none() | st.booleans()).map(
        lambda o: Adam(**o)
    ),
    st.dictionaries(NAMES, VALUES, max_size=3).map(lambda o: method(Outside, **o)),
)
LIMITED = options(
    evaluations=st.integers(1, 10**9),
    forward_equivalents=POSITIVE,
    seconds=POSITIVE,
    target=st.floats(allow_nan=False, allow_infinity=False),
    steps=st.integers(1, 10**9),
)


def limit(pair: tuple[Method, dict[str, Any]]) -> Method:
    made, limits = pair
    return made.limit(**limits) if limits else made


def chain(stages: list[Method]) -> Method:
    made = stages[0]
    for stage in stages[1:]:
        made = made >> stage
    return made


METHODS: st.SearchStrategy[Method] = st.recursive(
    st.tuples(LEAVES, LIMITED).map(limit),
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3).map(chain), LIMITED).map(limit),
    max_leaves=5,
)


@given(METHODS)
def test_what_is_printed_is_read_back_equal(made: Method) -> None:
    text = str(made)
    again = method(text)
    assert again == made
    assert type(again) is type(made)
    assert str(again) == text
    assert method(f" {text} ") == made
    assert method(made) is made


@given(st.text("abz_ (){}[],=>.:'\"\\0139-e#\n", max_size=30))
def test_any_text_is_a_method_or_an_error_of_ours(text: str) -> None:
    with pytest.raises((MethodError, PluginError)):
        method(text)  # (no method has a name of these letters)


def test_what_was_pickled_prints_the_same() -> None:
    for made in (method("slsqp(ftol=1e-9) > torch.adam(lr=.1, evaluations=5)"), Adam(lr=0.5)):
        again = pickle.loads(pickle.dumps(made))
        assert again == made
        assert str(again) == str(made)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slsqp", SLSQP()),
        ("scipy.slsqp", SLSQP()),
        ("slsqp()", SLSQP()),
        ("(slsqp)", SLSQP()),
        ("slsqp(ftol=1e-9,)", SLSQP(ftol=1e-9)),
        ("slsqp ( ftol = +1_0.5e-1 , gradients = 'none' )", SLSQP(ftol=1.05, gradients="none")),
        ('slsqp(gradients="none", eps=None)', SLSQP(gradients="none")),
        ("dual_annealing(local_search=false)", DualAnnealing(local_search=False)),
        ("torch.adam(betas=(.8, .9), amsgrad=True)", Adam(betas=(0.8, 0.9), amsgrad=True)),
        ("torch.adam(betas=[.8, .9])", Adam(betas=[0.8, 0.9])),
        ("torch.optim:Adam(lr=1)", Adam(lr=1)),
        ("outside_module:Shell.Inner(a=(), b=(1,), c=[[]])", method(Outside, a=(), b=(1,), c=[[]])),
        ("slsqp>torch.adam", SLSQP() >> Adam()),
        ("slsqp > (torch.adam > slsqp)", SLSQP() >> Adam() >> SLSQP()),
        ("(slsqp > torch.adam)(steps=3) > torch.adam", (SLSQP() >> Adam()).limit(steps=3) >> Adam()),
        ("slsqp(evaluations=5, ftol=1e-3)", SLSQP(ftol=1e-3).limit(evaluations=5)),
        ("slsqp(target=-inf_)", None),
    ],
)
def test_text_as_written(text: str, expected: Method | None) -> None:
    if expected is None:
        with pytest.raises(MethodError, match="target"):
            method(text)
    else:
        assert method(text) == expected


def test_a_comma_between_values_is_not_one_between_methods() -> None:
    assert method("adam(betas=(.9, .99), lr=1)").options() == {"betas": (0.9, 0.99), "lr": 1}


@dataclass(frozen=True)
class Mine(Method):
    """Not registered anywhere."""

    name: ClassVar[str] = "mine"
    depth: int = 3

    def start(self, vector: ParameterVector, seed: int, warm: HandOver | None = None) -> Optimizer:
        """Never called."""
        raise NotImplementedError


def test_a_class_a_name_and_a_method_take_the_same_options() -> None:
    assert method("slsqp", ftol=1, evaluations=5) == method(SLSQP, ftol=1, evaluations=5)
    assert method(SLSQP(ftol=1), evaluations=5) == method("slsqp(ftol=1, evaluations=5)")
    assert (
        method("torch.adam", lr=1, steps=2)
        == method(torch.optim.Adam, lr=1, steps=2)
        == method(Adam, lr=1, steps=2)
    )
    # a method with other options
    assert method(SLSQP(ftol=1, maxiter=5), ftol=2) == SLSQP(ftol=2, maxiter=5)
    assert method(Adam(lr=1, amsgrad=True), lr=2) == Adam(lr=2, amsgrad=True)
    assert method(method(Outside, a=1, b=2), a=3) == method(Outside, a=3, b=2)
    assert method(Mine(), depth=4) == method(Mine, depth=4) == Mine(4)
    changed = SLSQP(ftol=1)
    method(changed, ftol=2)
    assert changed.ftol == 1


def test_numbers_of_numpy_print_as_numbers() -> None:
    made = SLSQP(ftol=np.float64(1e-3), maxiter=np.int64(5))  # type: ignore[arg-type]
    assert str(made) == "scipy.slsqp(ftol=0.001, maxiter=5)"
    assert method(str(made)) == made


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", 1, "expected a method's name"),
        ("slsqp >", 8, "expected a method's name"),
        ("slsqp > > adam", 9, "expected a method's name"),
        ("> slsqp", 1, "expected a method's name"),
        ("3 > slsqp", 1, "expected a method's name"),
        ("slsqp adam", 7, "expected '>' or the end"),
        ("slsqp(ftol=1))", 14, "expected '>' or the end"),
        ("(slsqp > adam", 14, "expected ')' to close the group"),
        ("slsqp(", 7, "expected an option's name or ')'"),
        ("slsqp(1)", 7, "expected an option's name or ')'"),
        ("slsqp(ftol)", 11, "expected '=' after 'ftol'"),
        ("slsqp(ftol=)", 12, "expected a value"),
        ("slsqp(ftol=1 maxiter=2)", 14, "expected ',' or ')' after a value"),
        ("slsqp(ftol=(1 2))", 15, "expected ',' or ')' after a value"),
        ("slsqp(ftol=[1)", 14, "expected ',' or ']' after a value"),
        ("slsqp(ftol=1, ftol=2)", 15, "the option 'ftol' is given twice"),
        ("slsqp(ftol=1, evaluations=2, evaluations=3)", 30, "the option 'evaluations' is given twice"),
        ("slsqp(ftol=#)", 12, "unexpected character"),
        ("slsqp(gradients='none)", 17, "unexpected character"),
        ("slsqp(gradients='\\x')", 17, "expected a string as Python writes it"),
        ("slsqp > L-BFGS-B(maxiter=3)", 9, "unknown name 'L-BFGS-B'; nearest: lbfgsb, "),
        ("slsqp > adm(lr=1)", 9, "unknown name 'adm'; nearest: adam"),
        ("slsqp > slsqp(ftoll=1)", 9, "slsqp: unknown option 'ftoll'; nearest: ftol"),
        ("slsqp(evalautions=1)", 1, "unknown option 'evalautions'; nearest: evaluations"),
        ("torch.adam(lrr=1)", 1, "torch.adam: unknown option 'lrr'; nearest: lr"),
        (
            "slsqp > slsqp(gradients=yes)",
            9,
            "expected gradients to be one of auto, autograd, differences, none, got",
        ),
        ("slsqp(evaluations=0)", 1, "budget: expected evaluations > 0, got 0"),
        ("slsqp(evaluations=1.5)", 1, "expected a whole number of evaluations, got 1.5"),
        ("slsqp(steps=0)", 1, "stage: expected steps >= 1, got 0"),
        ("slsqp(steps=1.5)", 1, "stage: expected steps"),
        ("slsqp(steps=soon)", 1, "stage: expected steps"),
        (
            "(slsqp > adam)(lr=3)",
            16,
            "expected a limit of the group, got 'lr'; known: evaluations, forward_equ",
        ),
        ("(slsqp > adam)(step=3)", 16, "expected a limit of the group, got 'step'; nearest: steps"),
    ],
)
def test_errors_point_at_the_character(text: str, place: int, message: str) -> None:
    with pytest.raises(MethodError) as caught:
        method(text)
    first, line, caret = str(caught.value).split("\n")
    assert first.startswith("method: ")
    assert message in first
    assert first.endswith(f", at character {place}:")
    assert line == f"  {text}"
    assert caret == " " * (place + 1) + "^"
    assert str(caught.value).count("at character") == 1


@pytest.mark.parametrize(
    ("spec", "given", "error", "message"),
    [
        ("slspq", {}, MethodError, r"unknown name 'slspq'; nearest: slsqp"),
        ("slsqp", {"ftoll": 1}, MethodError, r"slsqp: unknown option 'ftoll'; nearest: ftol"),
        (SLSQP, {"ftoll": 1}, MethodError, r"scipy\.slsqp: unknown option 'ftoll'; nearest: ftol"),
        (SLSQP(), {"ftoll": 1}, MethodError, r"scipy\.slsqp: unknown option 'ftoll'; nearest: ftol"),
        (Adam(), {"lrr": 1}, MethodError, r"torch\.adam: unknown option 'lrr'; nearest: lr"),
        (torch.optim.Adam, {"lrr": 1}, MethodError, r"torch\.adam: unknown option 'lrr'; nearest: lr"),
        ("slsqp > adam", {"lr": 1}, MethodError, r"options belong inside the text here"),
        ("slsqp", {"evaluations": -1}, BudgetError, r"expected evaluations > 0, got -1"),
        (3, {}, MethodError, r"expected text, a class or a Method, got 3$"),
        (
            torch.optim.Adam([torch.ones(1)]),
            {},
            MethodError,
            r"got an instance of Adam; pass the class and its options, method\(Adam, lr=\.\.\.\)$",
        ),
        ("SLSQP", {}, MethodError, r"unknown name 'SLSQP'; nearest: slsqp, "),
        ("L-BFGS-B", {}, MethodError, r"unknown name 'L-BFGS-B'; nearest: lbfgsb, "),
        ("Nelder-Mead", {"maxiter": 3}, MethodError, r"nearest: nelder_mead, "),
        (torch.nn.Linear, {}, MethodError, r"expected a torch\.optim\.Optimizer class, got <class"),
        (
            "nowhere:Class",
            {},
            PluginError,
            r"plugin: 'nowhere:Class' .*cannot be imported: ModuleNotFoundError",
        ),
        ("outside_module:Clas", {}, PluginError, r"cannot be imported: AttributeError"),
        ("outside_module:number", {}, MethodError, r"got 3"),
        ("a:b:c", {}, PluginError, r"'a:b:c' .*cannot be imported"),
    ],
)
def test_wrong_methods_are_said_clearly(
    spec: Any, given: dict[str, Any], error: type[HybridoptError], message: str
) -> None:
    with pytest.raises(error, match=message):
        method(spec, **given)


def test_not_a_number_and_infinity_are_numbers() -> None:
    made = method("outside_module:Outside(a=nan, b=-inf, c=inf, d=info)")
    assert math.isnan(made.options()["a"])
    assert made.options() | {"a": 0} == {"a": 0, "b": -math.inf, "c": math.inf, "d": "info"}


def test_dtypes_and_tensors_of_one_number_have_a_text() -> None:
    made = method("adam", lr=torch.tensor(0.5), state_dtype=torch.bfloat16)
    assert str(made) == "adam(lr=0.5, state_dtype=bfloat16)"
    assert method(str(made)) == made == method("adam(lr=0.5, state_dtype=bfloat16)")
    result = hybridopt.minimize(lambda w: (w**2).sum(), torch.ones(3), str(made), budget=9, seed=0)
    assert method(result.method) == made
    with pytest.raises(MethodError, match="torch float dtype, got 'bfloat15'"):
        hybridopt.minimize(lambda w: (w**2).sum(), torch.ones(3), "adam(state_dtype=bfloat15)", budget=9)
