"""A user's problem: a function in a Python file."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from hybridopt.errors import nearest
from hybridopt.problems._problem import Build, Problem, ProblemError


def load(where: str) -> Build:
    """The builder of a user's problem.

    The function takes the argument `seed` or none, and returns a `Problem` or a pair `(loss, target)`. It is
    called anew for every run and must make a fresh target each time. The file runs once, with its own folder on the
    import path; while it and the function run, the global generators of torch, NumPy and Python are seeded
    (the function: with the run's seed; the file: with 42), and given back as found.

    Args:
        where: `path/to/file.py:function`.

    Raises:
        ProblemError: no such file or function, or it takes or returns something else. An exception in the user's
            own code passes unchanged.
    """
    path, _, name = where.rpartition(":")
    if not path or not name:
        raise ProblemError(f"problem: expected file.py:function, got {where!r}")
    file = Path(path)
    if not file.is_file():
        raise ProblemError(f"problem: there is no file {path!r} (from {where!r})")
    module = _run(file)
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__
        ]
        raise ProblemError(f"problem: {path} has no function {name!r}{nearest(name, known) if known else ''}")
    return _builder(where, function)


def _builder(where: str, function: Callable[..., Any]) -> Build:
    parameters = inspect.signature(function).parameters.values()
    takes_seed = any(p.name == "seed" and p.kind is not p.POSITIONAL_ONLY for p in parameters)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        p.name for p in parameters if p.default is p.empty and p.kind not in variadic and p.name != "seed"
    ]
    if missing:
        raise ProblemError(f"problem: {where} is called with seed= or nothing, but it also needs {missing}")

    def build(seed: int) -> Problem:
        with _seeded(seed):
            made = function(seed=seed) if takes_seed else function()
        if isinstance(made, Problem):
            return made
        if isinstance(made, tuple) and len(made) == 2 and callable(made[0]):
            return Problem(where, *made)
        raise ProblemError(
            f"problem: {where} must return a Problem or (loss, target), got {type(made).__name__}"
        )

    return build


def _run(file: Path) -> ModuleType:
    """The file as a module, under a name that no import finds by accident."""
    digest = hashlib.blake2b(str(file.resolve()).encode(), digest_size=4).hexdigest()  # two files of one stem
    name = f"_hybridopt_problem_{file.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ProblemError(f"problem: expected a Python file that ends in .py, got {str(file)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    folder = str(file.parent.resolve())
    sys.path.insert(0, folder)
    try:
        with _seeded(42):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators, seeded for a while."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
