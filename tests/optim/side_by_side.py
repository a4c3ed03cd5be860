"""Two optimizers, ours and torch's, stepped side by side; what may move between their steps."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import hybridopt.optim

NAMES = (
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "RMSprop",
    "Rprop",
    "ASGD",
    "NAdam",
    "RAdam",
)
COMPILED = "fused (llvm)"
odd = pytest.mark.filterwarnings(r"ignore:.* runs for \d+ of \d+ weights of group:RuntimeWarning")
"""For tests of weights and gradients that no engine can step (`test_aside.py` looks at the warning)."""
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}  # so that every class has a state


def pair(name: str, shapes: Any = ((3, 2), (5,)), dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    """(our optimizer, its weights, torch's, its weights) at the same point."""
    torch.manual_seed(1)
    ours = [Parameter(torch.randn(s, dtype=dtype)) for s in shapes]
    theirs = [Parameter(p.detach().clone()) for p in ours]
    options = {**OPTIONS.get(name, {}), **kwargs}
    return (
        getattr(hybridopt.optim, name)(ours, **options),
        ours,
        getattr(torch.optim, name)(theirs, **options),
        theirs,
    )


def give(params: list[Parameter], k: int, skip: int | None = None) -> None:
    """The gradients of step k; none for the weight `skip`."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * k + i)
        draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = None if i == skip else torch.empty_like(p).copy_(draw)


def both(case: Any, steps: range, skip: int | None = None) -> None:
    ours, params, theirs, references = case
    for k in steps:
        give(params, k, skip)
        give(references, k, skip)
        ours.step()
        theirs.step()


def assert_same(case: Any, tol: float = 1e-12) -> None:
    ours, params, theirs, references = case
    for p, q in zip(params, references, strict=True):
        torch.testing.assert_close(p, q, rtol=tol, atol=tol, equal_nan=True)
        a, b = ours.state.get(p, {}), theirs.state.get(q, {})
        assert set(a) == set(b)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=tol, atol=tol, equal_nan=True)


def carried(how: str, params: list[Parameter], optimizer: Any) -> tuple[list[Parameter], Any]:
    """Weights and optimizer after a way through a file of their states, a deep copy, or a pickle of both."""
    if how == "deepcopy":
        return copy.deepcopy((params, optimizer))
    if how == "pickle":
        return pickle.loads(pickle.dumps((params, optimizer)))  # type: ignore[no-any-return]
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    others = [Parameter(w) for w in loaded["weights"]]
    other = type(optimizer)(others)
    other.load_state_dict(loaded["optimizer"])
    return others, other
