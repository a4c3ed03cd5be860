"""torch's `foreach=` and `fused=` mean the same for every class, and for users' own."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import hybridopt
from hybridopt.errors import MethodError
from hybridopt.optim import RuleOptimizer, from_rule

NAMES = sorted(set(hybridopt.optim.__all__) - {"RuleOptimizer", "StepOptions", "from_rule"})


def descent(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (p - g * lr,)


Descent = from_rule(descent, defaults={"lr": 0.1}, name="Descent")
CLASSES: list[Any] = [*(getattr(hybridopt.optim, name) for name in NAMES), Descent]
every = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def weights() -> list[Tensor]:
    return [Parameter(torch.linspace(-1, 1, 6).view(2, 3)) for _ in range(2)]


@every
@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, "auto"),
        ({"foreach": None, "fused": None}, "auto"),
        ({"foreach": True}, "foreach"),
        ({"foreach": True, "fused": False}, "foreach"),
        ({"fused": True}, "fused"),
        ({"fused": True, "foreach": False}, "fused"),
        ({"foreach": False}, "auto"),
        ({"fused": False}, "auto"),
        ({"foreach": False, "fused": False}, "reference"),
        ({"foreach": False, "fused": False, "implementation": "fused"}, "fused"),
        ({"foreach": True, "implementation": "foreach"}, "foreach"),
    ],
)
def test_torchs_spelling(cls: Any, given: dict[str, Any], chosen: str) -> None:
    assert cls(weights(), **given).implementation == chosen


@every
def test_what_contradicts_itself_is_refused(cls: Any) -> None:
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        cls(weights(), foreach=True, fused=True)
    with pytest.raises(MethodError, match="implementation='reference' contradicts fused=True"):
        cls(weights(), fused=True, implementation="reference")


@every
def test_they_are_seen_in_the_signature(cls: Any) -> None:
    parameters = inspect.signature(cls).parameters
    assert parameters["foreach"].default is parameters["fused"].default is None


@pytest.mark.parametrize(
    ("spelling", "ran"), [("fused", "fused (llvm)"), ("foreach", "the rule over lists of tensors")]
)
@pytest.mark.parametrize(
    "cls", [cls for cls in CLASSES if issubclass(cls, RuleOptimizer | hybridopt.optim.LAMB)],
    ids=lambda cls: cls.__name__,
)  # fmt: skip
def test_they_run_what_they_say(cls: Any, spelling: str, ran: str) -> None:
    optimizer, params = cls(ours := weights(), **{spelling: True}), ours
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert ran in repr(optimizer)
