"""Robust residuals at the ends of the number range."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hybridopt.objective import Objective
from hybridopt.optimizer import Kind, Request

LARGEST = {torch.float16: 4, torch.float32: 38, torch.float64: 307}  # powers of ten


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("name", ["soft_l1", "huber", "cauchy", "arctan"])
def test_a_worse_residual_never_counts_less(name: str, dtype: torch.dtype) -> None:
    """r² is inf long before r is; the factor used to be 0 or nan then."""
    sizes = 10.0 ** np.arange(-3, LARGEST[dtype] + 1)
    with Objective(lambda x: x, torch.ones(1, dtype=dtype), residuals=name) as objective:
        told = [objective.answer(Request(Kind.VALUE, np.array([size]))).loss for size in sizes]
    seen = np.array(told)
    if name == "soft_l1":  # ½ rho ~ r is more than the narrow dtype, or its square, can hold
        seen = seen[seen < math.inf]
        assert len(seen) > len(sizes) / 2
    assert np.isfinite(seen).all() or name == "huber"
    finite = seen[np.isfinite(seen)]
    assert (np.diff(finite) >= -1e-3 * finite[:-1]).all()
    exact: dict[str, Any] = {
        "soft_l1": lambda r: np.hypot(1, r) - 1,
        "huber": lambda r: np.where(r <= 1, r * r / 2, r - 0.5),
        "cauchy": lambda r: np.log(np.hypot(1, r)),
        "arctan": lambda r: np.where(r < 1e150, np.arctan(r * np.minimum(r, 1e150)), np.pi / 2) / 2,
    }
    held = sizes[: len(finite)]
    near = held < 1e140
    tol = {torch.float16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
    np.testing.assert_allclose(finite[near], exact[name](held[near]), rtol=tol, atol=tol * 1e-3)


@pytest.mark.parametrize("name", ["soft_l1", "huber", "cauchy", "arctan"])
def test_gradients_are_finite_and_those_of_the_loss(name: str) -> None:
    sizes = torch.tensor([0.0, 1e-5, 0.5, 3.0, 1e10, 1e130, 1e200], dtype=torch.float64)
    with Objective(lambda x: x, torch.zeros(7, dtype=torch.float64), residuals=(name, 0.7)) as objective:
        answer = objective.answer(Request(Kind.VALUE_AND_GRADIENT, sizes.numpy()))
        assert answer.gradient is not None
        assert np.isfinite(answer.gradient).all()
        for i in (1, 2, 3):
            step = 1e-6 * np.eye(7)[i]
            up, down = (
                objective.answer(
                    Request(Kind.VALUE, np.where(np.arange(7) < 4, sizes.numpy(), 0) + side * step)
                ).loss
                for side in (1, -1)
            )
            assert answer.gradient[i] == pytest.approx((up - down) / 2e-6, rel=1e-4)
