"""What a user may replace between two steps, and what a compiled step may not miss of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import hybridopt
from hybridopt.errors import NonFiniteLoss
from hybridopt.optim import _plan, _watch
from hybridopt.optim._cpu_plan import CpuPlan


def step(optimizer: Any, *weights: Tensor) -> None:
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()


def begun(*weights: Tensor, **options: Any) -> Any:
    optimizer = hybridopt.optim.Adam(weights, lr=0.1, **options)
    for _ in range(3):
        step(optimizer, *weights)
    return optimizer


def test_groups_that_are_replaced_are_those_that_count() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = begun(p)
    optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 1e-5}]
    before = p.detach().clone()
    step(optimizer, p)
    torch.testing.assert_close(before - p, torch.full((3,), 1e-5), rtol=0.05, atol=0)
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [q]}]
    before = p.detach().clone()
    step(optimizer, p, q)
    assert torch.equal(p, before)
    assert (q < 1).all()


def test_a_state_that_is_replaced_together_with_an_option() -> None:
    """As a schedule and a reset of the momentum do between two steps."""
    cases = []
    for kind in (hybridopt.optim.Adam, torch.optim.Adam):
        p = nn.Parameter(torch.ones(3))
        optimizer = kind([p], lr=0.1)
        cases.append(p)
        for k in range(8):
            optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
            if k == 4:
                optimizer.state[p]["exp_avg"] = torch.full((3,), -5.0)
            if k == 6:
                optimizer.state[p] = {
                    "step": torch.tensor(1.0),
                    **dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.ones(3)),
                }
                optimizer.state[p]["exp_avg"] = torch.full((3,), 2.0)
            step(optimizer, p)
    torch.testing.assert_close(*cases, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [tuple, dict.fromkeys])
def test_weights_in_another_container(make: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = begun(p)
    optimizer.param_groups[0]["params"] = make([p])
    for _ in range(3):
        before = p.detach().clone()
        step(optimizer, p)
        assert (p < before).all()


def test_tables_follow_when_some_gradients_moved_before_one_that_is_laid_out_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 1))
    optimizer = hybridopt.optim.Adam([p, q], lr=0.1)
    g, h = torch.ones(4), torch.ones(4, 1)
    for _ in range(3):
        p.grad, q.grad = g, h
        optimizer.step()
    (plan,) = optimizer._plans
    calls: list[int] = []
    monkeypatch.setattr(CpuPlan, "_moved", lambda self: calls.append(1))
    p.grad, q.grad = torch.ones(4), h.as_strided((4, 1), (1, 7))  # one element wide: the stride says nothing
    optimizer.step()
    assert optimizer._plans == [plan]
    assert list(plan.gradients) == [p.grad.data_ptr(), q.grad.data_ptr()]
    assert calls == [1]


def test_weights_that_share_memory_are_stepped_one_after_the_other() -> None:
    n = 9 * 65536
    ends = []
    torch.set_num_threads(2)
    for cls in (hybridopt.optim.Adam, hybridopt.optim.Adam, torch.optim.Adam):
        whole = torch.ones(n)
        a, b = nn.Parameter(whole), nn.Parameter(whole.view(-1))
        optimizer = cls([a, b], lr=0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            a.grad, b.grad = (torch.randn(n, generator=generator) for _ in range(2))
            optimizer.step()
        ends.append(a.detach().clone())
    assert torch.equal(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-6)
    apart = hybridopt.optim._cpu_plan._apart
    assert apart([torch.ones(3), torch.ones(2), torch.empty(0)])
    assert not apart([whole[:5], whole[4:9]])
    assert apart([whole[:5], whole[5:9]])


@pytest.mark.parametrize("name", ["LAMB", "Adam", "Muon"])
def test_hooks_of_all_optimizers_see_each_step_once(name: str) -> None:
    seen: list[str] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(type(optimizer).__name__))
    try:
        p = nn.Parameter(torch.ones(3, 2))
        optimizer = getattr(hybridopt.optim, name)([p], lr=0.1)
        for _ in range(3):
            step(optimizer, p)
    finally:
        handle.remove()
    assert seen == [name] * 3


def test_a_refused_first_step_leaves_scaled_gradients_as_they_are() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = hybridopt.optim.Adam([p], nonfinite="raise")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)  # as a GradScaler does
    p.grad = torch.tensor([8.0, 8.0, torch.inf])
    with pytest.raises(NonFiniteLoss):
        optimizer.step()
    assert p.grad.tolist() == [8, 8, torch.inf]
    assert p.tolist() == [1, 1, 1]


@pytest.mark.parametrize("lack", ["function", "name"])
def test_where_memory_cannot_be_read_python_does_the_same(lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Tensor:
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
        optimizer = begun(p, q)
        p.grad, q.grad = torch.full((3,), 2.0), torch.ones(2, 2)
        optimizer.step()
        assert "fused" in repr(optimizer)
        return torch.cat([p.detach().ravel(), q.detach().ravel()])

    expected = run()
    for cached in (_watch.functions, _watch.counts_versions):
        cached.cache_clear()
    if lack == "function":
        monkeypatch.setattr(_plan, "readable", lambda tensors: False)
        monkeypatch.setattr(_watch, "functions", tuple)
    else:
        monkeypatch.delattr(torch._C, "_aoti")
        assert _watch.functions() == ()
    try:
        assert torch.equal(run(), expected)
    finally:
        monkeypatch.undo()
        for cached in (_watch.functions, _watch.counts_versions):
            cached.cache_clear()


def test_a_step_that_is_to_be_differentiable_from_now_on() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = begun(p)
    optimizer.param_groups[0]["differentiable"] = True
    step(optimizer, p)
    assert "differentiable=True" in optimizer._used


def test_weights_left_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As experts and layers are: no plan is made twice, and none is used for what was replaced meanwhile."""
    made = []
    monkeypatch.setattr(
        CpuPlan, "_table", lambda self, *given: made.append(self) or _plan.Plan._table(self, *given)
    )
    cases = []
    for kind in (torch.optim.Adam, hybridopt.optim.Adam):
        weights = [nn.Parameter(torch.full((k + 1,), 1.0 + k)) for k in range(4)]
        optimizer = kind(weights, lr=0.1)
        for k in range(30):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + k)
            if k == 13:  # while the plan without this weight is in use
                optimizer.state[weights[k % 4]]["exp_avg"] = torch.full_like(weights[k % 4], -3.0)
            if k == 20:
                optimizer.state = type(optimizer.state)(
                    dict, {p: {n: 1.5 * s for n, s in e.items()} for p, e in optimizer.state.items()}
                )
            if k == 25:
                optimizer.param_groups = [{**optimizer.param_groups[0], "betas": (0.5, 0.9)}]
            for i, p in enumerate(weights):
                if i != k % 4:
                    p.grad = torch.full_like(p, (-1.0) ** k)
            optimizer.step()
            if k == 12:
                begun = len(made)
        cases.append(weights)
    for p, q in zip(*cases, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert len(made) - begun == 3 * 4  # after each of the three replacements, for each pattern
