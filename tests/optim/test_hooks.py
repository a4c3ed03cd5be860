"""Hooks, the profiler, closures, and options that change between steps, as in torch.optim."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim import optimizer as torch_optimizer

import hybridopt.optim
from tests.optim.side_by_side import COMPILED, NAMES, assert_same, both, give, pair

# -- hooks, profiler, closures -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["compiled", "torch"])
@pytest.mark.parametrize("plain_first", [False, True])
def test_hooks_run_once(way: str, plain_first: bool) -> None:
    if plain_first:  # torch wraps the class's step when its first instance is made
        torch.optim.RMSprop([Parameter(torch.ones(1))])
    implementation = "auto" if way == "compiled" else "reference"
    p = Parameter(torch.ones(3))
    ours = hybridopt.optim.RMSprop([p], implementation=implementation)
    for _ in range(2):
        p.grad = torch.ones(3)
        ours.step()
    seen: list[tuple[str, int]] = []
    handles = [
        ours.register_step_pre_hook(lambda o, a, k: seen.append(("pre", len(a)))),
        ours.register_step_post_hook(lambda o, a, k: seen.append(("post", len(a)))),
        torch_optimizer.register_optimizer_step_pre_hook(lambda o, a, k: seen.append(("global pre", len(a)))),
        torch_optimizer.register_optimizer_step_post_hook(
            lambda o, a, k: seen.append(("global post", len(a)))
        ),
    ]
    before = p.detach().clone()
    ours.step()
    for handle in handles:
        handle.remove()
    assert seen == [("global pre", 1), ("pre", 1), ("post", 1), ("global post", 1)]
    assert not torch.equal(p, before)
    assert ours._used.startswith("fused" if way == "compiled" else "torch's for-loop")
    ours.step()
    assert len(seen) == 4
    assert ours.state[p]["step"] == 4


def test_subclass_with_its_own_step_runs_hooks_once() -> None:
    class Mine(hybridopt.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    p = Parameter(torch.ones(2))
    optimizer = Mine([p])
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
    assert seen == [1, 1, 1]
    assert optimizer._used == COMPILED


def test_pre_hook_may_change_the_arguments() -> None:
    p = Parameter(torch.ones(1))
    optimizer = hybridopt.optim.SGD([p], lr=0.5)

    def closure() -> str:
        p.grad = torch.ones(1)
        return "from the hook"

    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    assert optimizer.step() == "from the hook"
    assert p.item() == 0.5


def test_state_dict_hooks() -> None:
    ours, params, _, _ = pair("Adam")
    seen: list[str] = []
    ours.register_state_dict_pre_hook(lambda o: seen.append("save"))
    ours.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
    ours.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "extra"})
    ours.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    saved = ours.state_dict()
    assert saved["extra"] == 1
    ours.load_state_dict(saved)
    assert seen == ["save", "loaded"]


def test_profiler_sees_the_step() -> None:
    ours, params, _, _ = pair("Adam")
    give(params, 0)
    ours.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kineto, about the machine
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ours.step()
    assert ours._used == COMPILED
    assert [e.key for e in profile.key_averages() if "#" in e.key] == ["Optimizer.step#Adam.step"]


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_closure(name: str, implementation: str) -> None:
    p = Parameter(torch.tensor([1.0, -2.0]))
    optimizer = getattr(hybridopt.optim, name)([p], lr=0.01, implementation=implementation)
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    for k in range(3):
        with torch.no_grad():
            loss = optimizer.step(closure)
            assert not torch.is_grad_enabled()
        assert isinstance(loss, Tensor)
        assert loss.requires_grad
        assert len(calls) == k + 1
    assert all(calls)
    assert loss < 5
    assert (optimizer._used == COMPILED) == (implementation == "auto")


# -- options that change between steps -----------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 2, cycle_momentum="momentum" in o.defaults),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)], o),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.5, 3),
}


def test_all_schedulers_are_covered() -> None:
    known = {
        key
        for key, value in vars(lr_scheduler).items()
        if isinstance(value, type) and key in lr_scheduler.__all__ and key != "LRScheduler"
    }
    assert known <= set(SCHEDULERS)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler(scheduler: str) -> None:
    """The rate it sets is the next step's; no warnings (they are errors here)."""
    for name in ("SGD", "Adam"):
        case = pair(name, lr=0.05)
        schedulers = [SCHEDULERS[scheduler](case[0]), SCHEDULERS[scheduler](case[2])]
        for k in range(6):
            both(case, range(k, k + 1))
            for s in schedulers:
                s.step(1.0) if scheduler == "ReduceLROnPlateau" else s.step()
        assert case[0].param_groups[0]["lr"] == case[2].param_groups[0]["lr"]
        assert case[0]._used == COMPILED
        assert_same(case)


CHANGES: dict[str, list[tuple[str, Any]]] = {
    "SGD": [("lr", 0.5), ("momentum", 0.0), ("momentum", 0.5), ("weight_decay", 0.1), ("nesterov", True)],
    "Adam": [("betas", (0.5, 0.7)), ("weight_decay", 0.1), ("decoupled_weight_decay", True), ("eps", 0.1)],
    "AdamW": [("weight_decay", 0), ("lr", 0.1)],
    "RMSprop": [("weight_decay", 0.1), ("alpha", 0.5)],
    "Rprop": [("etas", (0.1, 3.0)), ("step_sizes", (0.1, 0.2))],
    "Adagrad": [("lr_decay", 0.5), ("weight_decay", 0.1)],
    "ASGD": [("lambd", 0.5), ("alpha", 0.2), ("t0", 3)],
    "NAdam": [("momentum_decay", 0.5), ("decoupled_weight_decay", True), ("weight_decay", 0.1)],
}


@pytest.mark.parametrize("name", CHANGES)
def test_options_changed_between_steps(name: str) -> None:
    case = pair(name)
    both(case, range(2))
    for k, (key, value) in enumerate([*CHANGES[name], ("maximize", True), ("maximize", False)]):
        for optimizer in (case[0], case[2]):
            optimizer.param_groups[0][key] = value
        both(case, range(2 + 2 * k, 4 + 2 * k))
        assert case[0]._used == COMPILED, key
        assert_same(case)


def test_options_changed_in_place() -> None:
    """A tensor lr, and betas in a list: nothing is replaced, the value is another."""
    case = pair("Adam", lr=torch.tensor(0.1, dtype=torch.float64))
    for optimizer in (case[0], case[2]):
        optimizer.param_groups[0]["betas"] = [0.9, 0.99]
    both(case, range(3))
    for optimizer in (case[0], case[2]):
        optimizer.param_groups[0]["lr"].fill_(0.5)
    both(case, range(3, 5))
    for optimizer in (case[0], case[2]):
        optimizer.param_groups[0]["betas"][0] = 0.2
    both(case, range(5, 8))
    assert case[0]._used == COMPILED
    assert_same(case)


def test_number_replaced_by_an_equal_tensor_which_then_changes() -> None:
    case = pair("Adam", lr=0.5)
    both(case, range(3))
    rates = [torch.tensor(0.5, dtype=torch.float64) for _ in range(2)]
    case[0].param_groups[0]["lr"], case[2].param_groups[0]["lr"] = rates
    both(case, range(3, 5))
    for rate in rates:
        rate.fill_(0.01)
    both(case, range(5, 7))
    assert_same(case)


def test_tensor_betas_are_torchs() -> None:
    case = pair("Adam", betas=(torch.tensor(0.8), torch.tensor(0.9)))
    both(case, range(4))
    assert "betas holds a tensor" in case[0]._used
    assert_same(case, 0)
