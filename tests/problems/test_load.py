"""A user's own problem, from a file."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import hybridopt
from hybridopt import problems

FILE = """
from __future__ import annotations
import random
import numpy as np
import torch
import neighbour
from dataclasses import dataclass
from hybridopt.problems import Problem

AT_IMPORT = torch.randn(2)

@dataclass
class Scale:
    value: float = neighbour.VALUE

def pair():
    start = torch.randn(3, dtype=torch.float64) + np.random.randn() + random.random()
    return (lambda x: (x**2).sum() * Scale().value), start

def seeded(seed):
    return Problem("mine", lambda x: (x**2).sum() + seed, torch.ones(2), bounds=(-2, 2))

def keyword(*, seed=5, other=1):
    return Problem("mine", lambda x: (x**2).sum() + seed, torch.ones(2))

def needy(size):
    pass

def wrong():
    return 3

def broken():
    raise ValueError("my own fault")

NUMBER = 3
"""


@pytest.fixture
def where(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "neighbour.py").write_text("VALUE = 2.0\n")
    return str(tmp_path / "mine.py")


def test_a_pair_becomes_a_problem(where: str) -> None:
    problem = problems.get(f"{where}:pair", 3)
    result = hybridopt.minimize(problem.loss, problem.target, "slsqp", budget=50, seed=0)
    assert result.best_loss < 1e-8
    assert problem.name == f"{where}:pair"


def test_a_function_may_take_the_seed(where: str) -> None:
    assert problems.get(f"{where}:seeded", 7).loss(torch.zeros(2)) == 7
    assert problems.get(f"{where}:keyword", 7).loss(torch.zeros(2)) == 7
    assert problems.get(f"{where}:seeded", 7).bounds == (-2, 2)


def test_what_it_draws_follows_the_seed_and_nothing_else(where: str) -> None:
    build = problems.load(f"{where}:pair")
    first = build(1).target
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert torch.equal(build(1).target, first)
    assert not torch.equal(build(2).target, first)


def test_global_generators_are_left_as_found(where: str) -> None:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    problems.get(f"{where}:pair", 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_equal(np.random.get_state(), states[1])
    assert random.getstate() == states[2]


def test_the_import_path_is_left_as_found(where: str) -> None:
    import sys

    before = list(sys.path)
    problems.load(f"{where}:pair")
    assert sys.path == before


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("seded", "has no function 'seded'; nearest: seeded"),
        ("NUMBER", "has no function 'NUMBER'"),
        ("needy", r"also needs \['size'\]"),
        ("wrong", "must return a Problem or \\(loss, target\\), got int"),
    ],
)
def test_faults_of_the_function(where: str, function: str, text: str) -> None:
    with pytest.raises(problems.ProblemError, match=text):
        problems.get(f"{where}:{function}")


def test_an_exception_of_the_user_passes_unchanged(where: str) -> None:
    with pytest.raises(ValueError, match="my own fault"):
        problems.get(f"{where}:broken")


@pytest.mark.parametrize("name", ["nowhere.py:f", "mine.py", ":f", "identty", ""])
def test_faults_of_the_name(name: str) -> None:
    with pytest.raises(problems.ProblemError, match=r"no file|file\.py:function"):
        problems.get(name)


def test_an_unknown_name_shows_the_nearest() -> None:
    with pytest.raises(problems.ProblemError, match="unknown name 'identty'; nearest: identity"):
        problems.get("identty")
    assert problems.names() == [
        "acrobot",
        "bbob",
        "cartpole",
        "digits",
        "digits_mlp",
        "fairness",
        "gaussian_process",
        "identity",
        "lennard_jones",
        "mgh",
        "pruning",
        "quantisation",
        "sampling",
        "thresholds",
    ]
