"""Clipping, numbers that are not finite, and a GradScaler's work, inside the step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.engines import cpu
from hybridopt.errors import NonFiniteLoss
from tests.optim.side_by_side import odd
from tests.optim.test_precision import COMPILED, bits, give, make, weights

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
IMPLEMENTATIONS = ["auto", "reference"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_torchs(name: str, dtype: torch.dtype, implementation: str, limit: float) -> None:
    """As after clip_grad_norm_, over several groups; the gradients themselves stay."""
    results = []
    for inside in (True, False):
        params = weights(dtype)
        groups: Any = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
        extra = {"max_grad_norm": limit} if inside else {}
        optimizer = make(name, groups, implementation=implementation, **extra)
        for step in range(4):
            give(params, step)
            kept = [p.grad.clone() for p in params if p.grad is not None]
            if not inside:
                torch.nn.utils.clip_grad_norm_(params, limit)
            optimizer.step()
            if inside:
                assert all(
                    torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True) if p.grad is not None
                )
        results.append(params)
        assert (optimizer._used == COMPILED) == (implementation == "auto")
    tol = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_same_bits_for_any_number_of_threads() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            p = Parameter(torch.linspace(-1, 1, 300_001))
            optimizer = hybridopt.optim.Adam([p], max_grad_norm=0.1)
            for _ in range(3):
                p.grad = torch.sin(p.detach() * 1000)
                optimizer.step()
            results.append(p.detach().clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_hands_nan_and_inf_on(bad: float, implementation: str) -> None:
    """As torch does: a nan makes every weight nan, an infinite norm every other gradient 0."""
    p, q = (Parameter(torch.ones(3)) for _ in range(2))
    mine = make("SGD", [p], max_grad_norm=1.0, implementation=implementation)
    plain = make("SGD", [q])
    for g in ([1.0, 2.0, 3.0], [bad, 2.0, 3.0]):
        p.grad, q.grad = torch.tensor(g), torch.tensor(g)
        torch.nn.utils.clip_grad_norm_([q], 1.0)
        mine.step()
        plain.step()
    torch.testing.assert_close(p, q, equal_nan=True)


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
def test_limit_of_any_number_type(kind: Any) -> None:
    p = Parameter(torch.ones(4))
    optimizer = hybridopt.optim.SGD([p], lr=1.0, max_grad_norm=kind(0.5))
    for _ in range(2):
        p.grad = torch.ones(4)
        optimizer.step()
    assert optimizer._used == COMPILED
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_norm_that_overflows(implementation: str) -> None:
    p = Parameter(torch.ones(70_000, dtype=torch.float64))  # two pieces
    optimizer = hybridopt.optim.SGD([p], lr=0.1, nonfinite="raise", implementation=implementation)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    p.grad[0] = p.grad[-1] = 1.2e154
    with pytest.raises(NonFiniteLoss, match="expected a finite norm of all gradients, it overflows"):
        optimizer.step()


def test_sum_of_squares() -> None:
    """Pieces with and without a rest of 8, starting anywhere, in every dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for sizes in ([0], [1, 7, 8, 9, 31], [65_535, 65_537, 3]):
            base = torch.randn(1 + sum(sizes)).to(dtype)
            views = base[1:].split(sizes)
            params = [Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]
            optimizer = make("RMSprop", params, max_grad_norm=1.0)
            for _ in range(2):
                for p, g in zip(params, views, strict=True):
                    p.grad = g
                optimizer.step()
            told = sum(plan.square_sum() for plan in optimizer._plans)
            assert told == pytest.approx(base[1:].double().square().sum().item(), rel=1e-12)


def test_sums_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own code steps then, and clips as well; `repr` says why."""

    def fail(dtype: str) -> Any:
        raise cpu.Untranslatable("LLVM cannot compile it (of squares)")

    results = []
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(cpu, "squares", fail)
        params = weights(torch.float64)
        optimizer = make("AdamW", params, max_grad_norm=0.5)
        for step in range(3):
            give(params, step)
            optimizer.step()
        assert ("torch's own code: LLVM cannot compile it (of squares)" in repr(optimizer)) == broken
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_skip_and_count(dtype: torch.dtype, bad: float, implementation: str) -> None:
    params = weights(dtype)
    optimizer = make("Adam", params, nonfinite="skip", implementation=implementation)
    for step in range(3):
        give(params, step)
        optimizer.step()
    before = bits(params, optimizer)
    give(params, 3)
    assert params[3].grad is not None
    params[3].grad[-1, -1] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, bits(params, optimizer), strict=True))
    give(params, 4)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(before[0], params[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_raise_names_the_weight(implementation: str) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = hybridopt.optim.SGD(
        list(model.named_parameters()), lr=0.1, nonfinite="raise", implementation=implementation
    )
    before = [p.detach().clone() for p in model.parameters()]
    model.weight.grad = torch.ones(2, 3)
    model.bias.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(
        NonFiniteLoss, match=r"SGD: expected finite gradients, that of weight 'bias' \(shape \(2,\)\)"
    ):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    model.bias.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(model.bias, before[1])


def test_large_finite_gradients_are_finite() -> None:
    """Their squares overflow float32, not the sum kept in float64."""
    p = Parameter(torch.ones(100))
    optimizer = hybridopt.optim.SGD([p], lr=1e-38, nonfinite="raise")
    for _ in range(2):
        p.grad = torch.full((100,), 3e38)
        optimizer.step()
    assert optimizer._used == COMPILED


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "foreach"])
@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop", "Lion"])
def test_grad_scaler(name: str, implementation: str) -> None:
    """Scaled losses give the plain path; `.grad` is left unscaled; a step with an infinite gradient is left out."""
    results: list[list[Tensor]] = []
    for scaled in (True, False):
        params = weights(torch.float32)
        optimizer = make(name, params, implementation=implementation)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3, enabled=scaled)
        for step in range(7):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() + (p**2).sum() for p in params)
            assert isinstance(loss, Tensor)
            scaler.scale(loss).backward()
            wanted = 2 * params[0].detach() + torch.randn(
                params[0].shape, generator=torch.Generator().manual_seed(step)
            )
            if step == 4:
                assert params[1].grad is not None
                params[1].grad[0] = math.inf
                if not scaled:
                    continue
                before = bits(params, optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert params[0].grad is not None
            if step == 4:
                assert all(torch.equal(a, b) for a, b in zip(before, bits(params, optimizer), strict=True))
            else:
                torch.testing.assert_close(params[0].grad, wanted, rtol=1e-5, atol=1e-6)
            assert "grad_scale" not in optimizer.__dict__
        assert (optimizer._used == COMPILED) == (implementation == "auto")
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_grad_scaler_with_unscale_and_clipping() -> None:
    """Clipping sees unscaled gradients, whether the scaler or the step unscales them."""
    results = []
    for way in ("step", "unscale_", "plain"):
        params = weights(torch.float32)
        optimizer = make("AdamW", params, max_grad_norm=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=way != "plain")
        for step in range(4):
            give(params, step)
            for p in params:
                assert p.grad is not None
                if way != "plain":
                    scaler.scale(torch.zeros(()))
                    p.grad.mul_(256.0)
            if way == "unscale_":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach() for p in params])
    for other in results[:2]:
        for a, b in zip(other, results[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@odd
def test_grad_scaler_with_sparse_gradients() -> None:
    """Uncoalesced ones, which `coalesce` would copy; and clipped, by the norm of their sum."""
    for limit in (None, 0.5):
        results = []
        for scaled in (True, False):
            torch.manual_seed(0)
            table = torch.nn.Embedding(5, 2, sparse=scaled)
            extra: dict[str, Any] = {"max_grad_norm": limit} if limit else {}
            optimizer = make("SGD", list(table.parameters()), momentum=0.0, lr=0.1, **extra)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
            for _ in range(3):
                optimizer.zero_grad()
                scaler.scale(table(torch.tensor([1, 1, 2])).square().sum()).backward()
                scaler.step(optimizer)
                scaler.update()
            results.append(table.weight.detach())
        torch.testing.assert_close(*results)


def test_a_grad_scaler_without_any_gradient() -> None:
    """As torch's fused step: nothing is done."""
    p = Parameter(torch.ones(3))
    optimizer, scaler = make("Adam", [p]), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert p.tolist() == [1.0] * 3
    assert optimizer._used == COMPILED


def test_one_grad_scaler_for_two_optimizers() -> None:
    """An infinite gradient of one leaves the other's step alone; without a scaler steps go on as plain ones."""
    params = weights(torch.float32)
    first, second = make("Adam", params[:2]), make("SGD", params[2:])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    references = [Parameter(p.detach().clone()) for p in params]
    plain = make("Adam", references[:2]), make("SGD", references[2:])
    for step in range(6):
        give(params, step)
        give(references, step)
        scaled = step < 4
        if scaled:
            scaler.scale(torch.zeros(()))
            for p in params:
                assert p.grad is not None
                p.grad.mul_(scaler.get_scale())
        if step == 2:
            assert params[0].grad is not None
            params[0].grad[0, 0] = math.inf
        for mine, other in zip((first, second), plain, strict=True):
            if scaled:
                scaler.step(mine)
            else:
                mine.step()
            if step != 2 or other is plain[1]:
                other.step()
        if scaled:
            scaler.update()
        assert first._used == second._used == COMPILED or step == 0
    for p, q in zip(params, references, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_counts_and_options_survive_pickling() -> None:
    import pickle

    params = weights(torch.float32)
    optimizer = make("Adam", params, nonfinite="skip", max_grad_norm=1.0)
    give(params, 0)
    assert params[0].grad is not None
    params[0].grad[0, 0] = math.nan
    optimizer.step()
    copied = pickle.loads(pickle.dumps(optimizer))
    assert copied.skipped_steps == 1
    assert copied._extras == optimizer._extras
