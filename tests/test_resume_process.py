"""State saved between any two steps and loaded in a new process: the identical path, for every adapter and chain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.resuming import CASES, Path_, begin

ROOT = Path(__file__).parent.parent
every_case = pytest.mark.parametrize("name", CASES)


class Saved:
    """A whole path, and states along it with the number of evaluations made by then."""

    def __init__(self, name: str) -> None:
        case = CASES[name]
        run, recorder = begin(case)
        self.states: list[tuple[int, Any]] = [(0, run.state_dict())]
        with run:
            for _ in run:
                self.states.append((len(recorder.path), run.state_dict()))
        self.path = recorder.path
        # a budget that ends inside a generation, a stencil, a line search, or between a value and its gradient
        for budget in (17, {"forward_equivalents": 11.0}, {"forward_equivalents": 24.0}):
            cut, recorder = begin(case, budget)
            with cut:
                for _ in cut:
                    pass
            self.states.append((len(recorder.path), cut.state_dict()))

    def some(self) -> list[tuple[int, Any]]:
        """The budget stops, and a few steps: early, in the middle of things, and near the end."""
        steps = self.states[:-3]
        chosen = sorted(
            {1, 2, 5, 13, len(steps) // 2, len(steps) // 2 + 1, len(steps) - 2} & set(range(len(steps)))
        )
        return [steps[i] for i in chosen] + self.states[-3:]


def in_a_new_process(todo: list[tuple[str, Any]], folder: Path) -> list[Path_]:
    """The rest of each saved run's path."""
    states, paths = folder / "states.pt", folder / "paths.pt"
    torch.save([[name, state] for name, state in todo], states)
    # found there as it is found here
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-W", "error", "-m", "tests.resuming", str(states), str(paths)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    return [[tuple(row) for row in path] for _, path in torch.load(paths, weights_only=True)]


@pytest.fixture(scope="module")
def saved() -> dict[str, Saved]:
    torch.set_num_threads(1)
    return {name: Saved(name) for name in CASES}


@pytest.fixture(scope="module")
def resumed(saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path_]]:
    """All the chosen states, continued in one new process."""
    todo = [(name, state) for name, one in saved.items() for _, state in one.some()]
    paths = in_a_new_process(todo, tmp_path_factory.mktemp("resume"))
    found: dict[str, list[Path_]] = {name: [] for name in saved}
    for (name, _), path in zip(todo, paths, strict=True):
        found[name].append(path)
    return found


@every_case
def test_the_rest_of_the_path(name: str, saved: dict[str, Saved], resumed: dict[str, list[Path_]]) -> None:
    whole = saved[name].path
    assert len(whole) > 15
    for (done, _), rest in zip(saved[name].some(), resumed[name], strict=True):
        assert rest == whole[done:], f"saved after evaluation {done} of {len(whole)}"


@every_case
def test_what_is_saved_in_the_middle_of(name: str, saved: dict[str, Saved]) -> None:
    """The chosen states do stand where it is hard to stand."""
    states = [state for _, state in saved[name].some()]
    optimizers = [state["optimizer"] for state in states]
    if name in ("cma.cmaes", "cmaes_bounded", "cmaes_noisy", "slsqp_differences"):
        assert any(state["objective"]["generations"]["begun"] is not None for state in states)
    if name in ("lbfgs", "lbfgs_noisy"):
        assert any(len(state["told"]) > 1 for state in optimizers)
    if name.startswith("chain"):
        assert len({state["index"] for state in optimizers}) > 1


@pytest.mark.slow
@every_case
def test_after_every_step(name: str, saved: dict[str, Saved], tmp_path: Path) -> None:
    one = saved[name]
    rest = in_a_new_process([(name, state) for _, state in one.states], tmp_path)
    for (done, _), path in zip(one.states, rest, strict=True):
        assert path == one.path[done:], f"saved after evaluation {done} of {len(one.path)}"
