"""Solvers whose trials lead to where no loss is finite, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hybridopt
from hybridopt import Reason

GRADIENT = ["slsqp", "lbfgsb", "tnc", "bfgs"]


@pytest.mark.filterwarnings("ignore:loss nan")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", GRADIENT)
def test_barriers_are_approached(method: str, seed: int) -> None:
    """Told +inf, L-BFGS-B went back to where it was and said it had converged there, in 4 of 5 such problems."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    c = 5 * torch.randn(4, generator=generator, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return -torch.log(1 - a @ x).sum() - torch.log(1 - x**2).sum() + c @ x

    x = torch.zeros(4, dtype=torch.float64)
    result = hybridopt.minimize(loss, x, method, budget=400, seed=0)
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(x), x)
    assert slope.norm() < 1e-2 * c.norm()
    assert result.best_loss == pytest.approx(loss(x).item())


@pytest.mark.filterwarnings("ignore:loss nan")
@pytest.mark.parametrize("method", ["lbfgsb", "tnc"])
def test_an_end_at_a_rejected_point_is_no_convergence(method: str) -> None:
    def loss(x: Tensor) -> Tensor:
        return ((x - 1) ** 2).sum() + 0 * torch.sqrt(1.5 - x.sum())  # nan beyond a line

    for start in (-1.0, 0.2, 0.7):
        x = torch.full((2,), start, dtype=torch.float64)
        result = hybridopt.minimize(loss, x, method, budget=300, seed=0)
        assert result.best_loss == pytest.approx(0.125, abs=1e-3)
        assert result.reason in (Reason.STALLED, Reason.CONVERGED)
        assert loss(x.detach()).item() == pytest.approx(result.best_loss)
