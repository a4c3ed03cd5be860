"""What torch promises of its optimizers holds for ours, with the compiled step and on every way around it."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim import optimizer as torch_optimizer

import hybridopt.optim
from hybridopt.engines import cpu
from hybridopt.errors import MethodError

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


# -- constructors and state dicts ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    mine = inspect.signature(getattr(hybridopt.optim, name).__init__).parameters
    torchs = inspect.signature(getattr(torch.optim, name).__init__).parameters
    kept = {key: p for key, p in mine.items() if key in torchs}
    assert list(kept) == list(torchs)
    assert [(p.kind, p.default) for p in kept.values()] == [(p.kind, p.default) for p in torchs.values()]
    assert set(mine) - set(torchs) <= {"fused", "options"}
    assert mine["options"].kind is inspect.Parameter.VAR_KEYWORD
    assert "fused" in torchs or mine["fused"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_go_both_ways(name: str) -> None:
    """ours -> torch -> ours, each continuing where the other stopped; no group key that torch lacks."""
    case = pair(name)
    ours, params, theirs, references = case
    both(case, range(3))
    assert ours._used == COMPILED
    mine, torchs = ours.state_dict(), theirs.state_dict()
    assert [set(g) for g in mine["param_groups"]] == [set(g) for g in torchs["param_groups"]]
    assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in torchs["state"].items()}
    theirs.load_state_dict(copy.deepcopy(mine))
    ours.load_state_dict(copy.deepcopy(torchs))
    both(case, range(3, 6))
    assert ours._used == COMPILED
    assert_same(case)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "numbers"), [("ASGD", ("eta", "mu")), ("NAdam", ("mu_product",))])
def test_numbers_that_loading_widens(name: str, numbers: tuple[str, ...], default: torch.dtype) -> None:
    """torch casts them, but not `step`, to float64; it then rounds those of ASGD anew, and those of NAdam no more."""
    options = {"t0": 2, "lambd": 0.1, "lr": 0.1} if name == "ASGD" else {"momentum_decay": 0.3}
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        case = pair(name, **options)
        both(case, range(3))
        case[0].load_state_dict(copy.deepcopy(case[2].state_dict()))
        case[2].load_state_dict(copy.deepcopy(case[2].state_dict()))
        both(case, range(3, 30))
    finally:
        torch.set_default_dtype(before)
    entry = case[0].state[case[1][0]]
    assert {entry[key].dtype for key in numbers} == {torch.float64}
    assert entry["step"].dtype is default
    assert case[0]._used == COMPILED
    assert_same(case)


@pytest.mark.parametrize("how", ["torch.save", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_between_steps(name: str, how: str) -> None:
    """The identical path, bit for bit."""
    ours, params, _, _ = pair(name, dtype=torch.float32)
    for k in range(3):
        give(params, k)
        ours.step()
    if how == "torch.save":
        file = io.BytesIO()
        torch.save({"weights": [p.detach() for p in params], "optimizer": ours.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        others = [Parameter(w) for w in loaded["weights"]]
        other = getattr(hybridopt.optim, name)(others)
        other.load_state_dict(loaded["optimizer"])
    elif how == "deepcopy":
        others, other = copy.deepcopy((params, ours))
    else:
        others, other = pickle.loads(pickle.dumps((params, ours)))
    assert other.implementation == "auto"
    for k in range(3, 6):
        for optimizer, weights in ((ours, params), (other, others)):
            give(weights, k)
            optimizer.step()
    assert other._used == COMPILED
    for p, q in zip(params, others, strict=True):
        assert p is not q
        assert torch.equal(p, q)
        assert all(torch.equal(ours.state[p][key], other.state[q][key]) for key in ours.state[p])


@pytest.mark.parametrize("implementation", ["reference", "foreach"])
def test_chosen_implementation_survives(implementation: str) -> None:
    """load_state_dict and add_param_group bring torch's flags; what was asked for stays."""
    ours, params, theirs, _ = pair("Adam")
    ours = hybridopt.optim.Adam(params, implementation=implementation)
    ours.load_state_dict(theirs.state_dict())
    assert [g["foreach"] for g in ours.param_groups] == [implementation == "foreach"]
    ours.add_param_group({"params": [Parameter(torch.ones(2))], "lr": 0.5})
    again = copy.deepcopy(ours)
    for optimizer in (ours, again):
        assert optimizer.implementation == implementation
        assert [g["foreach"] for g in optimizer.param_groups] == [implementation == "foreach"] * 2
    give(params, 1)
    ours.step()
    assert ours._used == {"reference": "torch's for-loop", "foreach": "torch's foreach"}[implementation]


def test_implementation_errors() -> None:
    p = [Parameter(torch.ones(1))]
    with pytest.raises(MethodError, match="expected one of auto, reference, foreach, fused, got 'fast'"):
        hybridopt.optim.RMSprop(p, implementation="fast")
    with pytest.raises(MethodError, match="contradicts foreach=True"):
        hybridopt.optim.RMSprop(p, foreach=True, implementation="fused")
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        hybridopt.optim.RMSprop(p, foreach=True, fused=True)


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


# -- weights, gradients and states that move -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_missing_gradients(name: str) -> None:
    """Skipped, step counter and all; frozen and unfrozen weights; a group added later; different counters."""
    case = pair(name)
    both(case, range(3), skip=1)
    assert_same(case)
    both(case, range(3, 6))
    both(case, range(6, 8), skip=0)
    for optimizer, params in ((case[0], case[1]), (case[2], case[3])):
        extra = Parameter(torch.ones(4, dtype=torch.float64))
        params.append(extra)
        optimizer.add_param_group({"params": [extra], "lr": 0.3})
    both(case, range(8, 11))
    assert case[0]._used == COMPILED
    assert_same(case)
    both(case, range(11, 12), skip=2)
    both(case, range(12, 14))
    assert case[0]._used == COMPILED
    assert_same(case)
    for p in (*case[1], *case[3]):
        p.grad = None
    before = [p.detach().clone() for p in case[1]]
    case[0].step()
    assert all(torch.equal(a, b) for a, b in zip(before, case[1], strict=True))


def _swap_weights(optimizer: Any, params: list[Parameter]) -> None:
    for p in params:
        p.data = p.data * 2


def _repoint_gradients(optimizer: Any, params: list[Parameter]) -> None:
    for p in params:
        assert p.grad is not None
        p.grad.data = p.grad.data * 3


def _transpose_gradient(optimizer: Any, params: list[Parameter]) -> None:
    p = params[0]
    assert p.grad is not None
    p.grad.data = torch.arange(6.0, dtype=p.dtype).view(2, 3).t()


def _replace_state_tensor(optimizer: Any, params: list[Parameter]) -> None:
    for key, value in optimizer.state[params[0]].items():
        optimizer.state[params[0]][key] = value * 0.5


def _repoint_state_tensor(optimizer: Any, params: list[Parameter]) -> None:
    for value in optimizer.state[params[0]].values():
        value.data = value.data * 0.5


def _share_state_memory(optimizer: Any, params: list[Parameter]) -> None:
    for entry in optimizer.state.values():
        for value in entry.values():
            value.share_memory_()


def _replace_entry(optimizer: Any, params: list[Parameter]) -> None:
    optimizer.state[params[0]] = {k: v * 0.25 for k, v in optimizer.state[params[0]].items()}


def _replace_state(optimizer: Any, params: list[Parameter]) -> None:
    state = optimizer.state
    optimizer.state = type(state)(dict, {p: {k: v.clone() for k, v in e.items()} for p, e in state.items()})


def _clear_state(optimizer: Any, params: list[Parameter]) -> None:
    if type(optimizer).__name__ != "Adagrad":  # torch's raises then: it makes its state in __init__
        optimizer.state.clear()


def _replace_group(optimizer: Any, params: list[Parameter]) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.2}


def _replace_params_list(optimizer: Any, params: list[Parameter]) -> None:
    optimizer.param_groups[0]["params"] = list(params[:1])


def _replace_one_param(optimizer: Any, params: list[Parameter]) -> None:
    new = Parameter(params[0].detach().clone())
    new.grad = params[0].grad
    optimizer.state[new] = optimizer.state.pop(params[0])
    optimizer.param_groups[0]["params"][0] = new
    params[0] = new


def _load_state(optimizer: Any, params: list[Parameter]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _shrink(optimizer: Any, params: list[Parameter]) -> None:
    """Same address, fewer elements; states cut likewise."""
    p = params[1]
    p.grad = None
    p.data = p.data[:2]
    for key, value in optimizer.state[p].items():
        if value.numel() > 1:
            optimizer.state[p][key] = value[:2]


MOVES = {
    f.__name__[1:]: f
    for f in (
        _swap_weights,
        _repoint_gradients,
        _transpose_gradient,
        _replace_state_tensor,
        _repoint_state_tensor,
        _share_state_memory,
        _replace_entry,
        _replace_state,
        _clear_state,
        _replace_group,
        _replace_params_list,
        _replace_one_param,
        _load_state,
        _shrink,
    )
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", NAMES)
def test_whatever_moves_is_noticed(name: str, move: str) -> None:
    case = pair(name)
    both(case, range(3))
    assert case[0]._used == COMPILED
    for optimizer, params in ((case[0], case[1]), (case[2], case[3])):
        give(params, 3)
        MOVES[move](optimizer, params)
    if move != "shrink":
        case[0].step()
        case[2].step()
        assert_same(case)
    both(case, range(4, 7))
    assert case[0]._used == COMPILED
    assert_same(case)


def test_module_moved_to_another_dtype_mid_run() -> None:
    def train(make: Any) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = make(model.parameters(), lr=0.1)
        for k in range(6):
            if k == 3:
                model.double()
                for entry in optimizer.state.values():
                    for key in ("exp_avg", "exp_avg_sq"):
                        entry[key] = entry[key].double()
            optimizer.zero_grad(set_to_none=k % 2 == 0)
            model(torch.ones(4, 3, dtype=model.weight.dtype)).square().sum().backward()
            optimizer.step()
        return list(model.parameters()), optimizer

    (ours, optimizer), (theirs, _) = train(hybridopt.optim.Adam), train(torch.optim.Adam)
    assert optimizer._used == COMPILED
    for p, q in zip(ours, theirs, strict=True):
        assert p.dtype == torch.float64
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_assigned_state_dict_and_tied_weights() -> None:
    def train(make: Any) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).double()
        model[1].weight = model[0].weight
        optimizer = make(model.parameters(), lr=0.1)
        for k in range(6):
            if k == 3:
                weights = {key: value.clone() * 2 for key, value in model.state_dict().items()}
                model.load_state_dict(
                    weights, assign=True
                )  # new Parameters: the optimizer keeps the old ones
            optimizer.zero_grad()
            model(torch.ones(4, 3, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        return [p for g in optimizer.param_groups for p in g["params"]], list(model.parameters())

    for a, b in zip(train(hybridopt.optim.Adam), train(torch.optim.Adam), strict=True):
        assert len(a) == len(b)
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_gradients_are_not_kept_alive() -> None:
    ours, params, _, _ = pair("Adam")
    for k in range(3):
        give(params, k)
        ours.step()
    assert params[0].grad is not None
    reference = weakref.ref(params[0].grad)
    ours.zero_grad()
    assert reference() is None


def test_optimizer_is_freed_without_the_garbage_collector() -> None:
    ours, params, _, _ = pair("Adam")
    for k in range(3):
        give(params, k)
        ours.step()
    reference = weakref.ref(ours.state[params[0]]["exp_avg"])
    gc.disable()
    try:
        del ours, _
        assert reference() is None
    finally:
        gc.enable()


# -- what the compiled loop does not take --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_stays_compiled(name: str) -> None:
    results = []
    for package in (hybridopt.optim, torch.optim):
        torch.manual_seed(0)
        p = Parameter(torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last))
        optimizer: Any = getattr(package, name)([p], **OPTIONS.get(name, {}))
        for _ in range(4):
            p.grad = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
            optimizer.step()
        results.append((p, optimizer))
    assert results[0][1]._used == COMPILED
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.t().contiguous().t(),
    "strided": lambda g: torch.stack([g, g], -1)[..., 0],
    "expanded": lambda g: g[:1, :1].expand(g.shape),
    "negative view": lambda g: torch._neg_view(g),
    "subclass": lambda g: g.as_subclass(Special),
}


class Special(Tensor):
    pass


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("name", NAMES)
def test_strange_gradients(name: str, strange: str) -> None:
    """Before, during and after: torch's code while they last, the compiled step again afterwards.

    A subclass that only overrides functions of Python is a tensor like others to compiled code.
    """
    case = pair(name, shapes=((3, 2), (4, 4)))
    for k in range(8):
        for params in (case[1], case[3]):
            give(params, k)
            if k in (3, 4):
                for p in params:
                    assert p.grad is not None
                    p.grad = STRANGE[strange](p.grad)
        case[0].step()
        case[2].step()
        first = () if name == "Adagrad" else (0,)
        assert (case[0]._used == COMPILED) == (k not in (*first, *(() if strange == "subclass" else (3, 4))))
    assert_same(case)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own, from Adagrad
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients(name: str) -> None:
    results = []
    for package in (hybridopt.optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Embedding(10, 3, sparse=True)
        optimizer: Any = getattr(package, name)(model.parameters(), lr=0.1)
        for k in range(4):
            optimizer.zero_grad()
            model(torch.tensor([k, 2])).square().sum().backward()
            optimizer.step()
        results.append((model.weight.detach(), optimizer))
    assert torch.equal(results[0][0], results[1][0])
    assert "sparse" in results[0][1]._used


def test_sparse_gradients_where_torch_refuses_them() -> None:
    p = Parameter(torch.ones(3, 2))
    optimizer = hybridopt.optim.Adam([p])
    for _ in range(2):
        p.grad = torch.ones(3, 2)
        optimizer.step()
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_complex_weights(name: str) -> None:
    case = pair(name, dtype=torch.complex128)
    both(case, range(4))
    assert "complex128" in case[0]._used
    assert_same(case, 0)


def test_mixed_dtypes_of_weights() -> None:
    """A group's weights of several dtypes: one loop for each."""
    case = pair("Adam")
    for optimizer, params in ((case[0], case[1]), (case[2], case[3])):
        extra = Parameter(torch.ones(4))
        params.append(extra)
        optimizer.add_param_group({"params": [extra]})
        second = Parameter(torch.ones(4, dtype=torch.float32))
        params.append(second)
        optimizer.param_groups[0]["params"].append(second)
    both(case, range(3))
    assert case[0]._used == COMPILED
    assert len(case[0]._plans) == 3
    assert_same(case, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_differentiable(name: str) -> None:
    """Gradients flow through the step, as through torch's."""
    results = []
    for package in (hybridopt.optim, torch.optim):
        start = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        p = start.clone()
        optimizer: Any = getattr(package, name)([p], lr=0.1, differentiable=True)
        p.grad = (start * 3).clone()
        with torch.enable_grad():
            optimizer.step()
        (gradient,) = torch.autograd.grad(p.sum(), start)
        results.append((p.detach(), gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_capturable_is_refused_as_torch_refuses_it() -> None:
    messages = []
    for package in (hybridopt.optim, torch.optim):
        p = Parameter(torch.ones(2))
        optimizer: Any = package.Adam([p], capturable=True)
        p.grad = torch.ones(2)
        with pytest.raises(AssertionError, match="capturable") as error:
            optimizer.step()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_fused_that_cannot_be_warns_once_with_the_reason() -> None:
    p = Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = hybridopt.optim.RMSprop([p], fused=True)
    p.grad = torch.ones_like(p)
    with pytest.warns(RuntimeWarning, match=r"fused was asked for, but a weight is torch.complex64"):
        optimizer.step()
    optimizer.step()  # a second warning would be an error


def test_states_of_other_kinds() -> None:
    """Counters in another dtype than their neighbours', a number where a tensor was: torch's code, torch's result."""
    for change in (
        lambda entry: entry.update(step=entry["step"].int()),
        lambda entry: entry.update(exp_avg=entry["exp_avg"].t().contiguous().t()),
    ):
        case = pair("Adam", shapes=((3, 2), (4, 4)))
        both(case, range(3))
        for optimizer, params in ((case[0], case[1]), (case[2], case[3])):
            change(optimizer.state[params[0]])
        both(case, range(3, 5))
        assert case[0]._used != COMPILED
        assert_same(case)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_infinite_gradients(fused: bool) -> None:
    results = []
    for package in (hybridopt.optim, torch.optim):
        p = Parameter(torch.ones(3))
        optimizer: Any = package.Adam([p], lr=0.1, **({"fused": True} if fused else {}))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for k in range(5):
            optimizer.zero_grad()
            scaler.scale((p * torch.tensor([1.0, 2.0, float("inf") if k == 2 else 3.0])).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append((p.detach(), optimizer.state[p]["step"].item(), optimizer))
    assert results[0][1] == results[1][1] == 4
    assert "grad_scale" not in vars(results[0][2])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)


# -- autograd, threads, processes ----------------------------------------------------------------------------


def test_autograd_notices_the_write() -> None:
    for package in (torch.optim, hybridopt.optim):
        p = Parameter(torch.ones(3))
        optimizer: Any = package.Adam([p])
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
        loss = (p * p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_inference_mode() -> None:
    for inside in (True, False):
        with torch.inference_mode(inside):
            p = torch.ones(3)
            p.grad = torch.ones(3)
        with torch.inference_mode():
            optimizer = hybridopt.optim.SGD([p], lr=0.25)
            optimizer.step()
            optimizer.step()
        assert p.tolist() == [0.5] * 3
        assert optimizer._used == COMPILED


def _big(threads: int, name: str = "Adam") -> Tensor:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shapes = (300_007, 3, 0, 70_000)
    params = [Parameter(torch.randn(s)) for s in shapes]
    optimizer = getattr(hybridopt.optim, name)(params, **OPTIONS.get(name, {}))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    assert optimizer._used == COMPILED
    assert optimizer._plans[0].parallel
    states = [v.flatten() for p in params for v in optimizer.state[p].values()]
    return torch.cat([*(p.detach().flatten() for p in params), *states])


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "ASGD", "Rprop"])
def test_same_bits_with_any_number_of_threads(name: str) -> None:
    one = _big(1, name)
    assert torch.equal(one, _big(2, name))
    assert torch.equal(one, _big(5, name))


def test_the_pieces_of_a_step_cover_everything_once() -> None:
    """Also where large and small tensors take turns."""
    params = [Parameter(torch.zeros(n)) for n in (200_000, 10, 200_000, 10, 0, 65_536, 65_537)]
    optimizer = hybridopt.optim.SGD(params)
    give(params, 0)
    optimizer.step()
    assert optimizer._plans is not None
    pieces = optimizer._plans[0]._cut()  # type: ignore[attr-defined]
    rows = [tuple(pieces[i : i + 3]) for i in range(0, len(pieces), 3)]
    for t, p in enumerate(params):
        covered = sorted((start, start + count) for tensor, start, count in rows if tensor == t)
        assert [a for a, _ in covered] + [p.numel()] == [0] + [b for _, b in covered]
    assert max(count for *_, count in rows) <= 1 << 16


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("name", ["SGD", "Rprop"])
def test_pieces_are_stepped_once_by_torchs_threads_and_by_ours(
    name: str, openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, calls = cpu._openmp(), 0
    if openmp and begin is None:
        pytest.skip("torch has no threads that we know")

    def counted(*arguments: int) -> None:
        nonlocal calls
        calls += 1
        begin(*arguments)  # type: ignore[misc]

    expected = _big(1, name)
    monkeypatch.setattr(cpu, "_openmp", lambda: counted if openmp else None)
    assert torch.equal(_big(3, name), expected)
    assert calls == (2 if openmp else 0)  # the first step makes the states


@pytest.mark.slow
def test_nothing_that_a_parallel_step_reads_is_freed() -> None:
    """In a process that overwrites freed memory."""
    code = """
import torch, hybridopt
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(1 << 18))
optimizer = hybridopt.optim.Adam([p])
for step in range(1, 6):
    p.grad = torch.ones(1 << 18)
    optimizer.step()
    assert optimizer.state[p]["step"] == step, (step, optimizer.state[p]["step"])
assert optimizer._plans[0].parallel
"""
    environment = {**os.environ, "PYTHONMALLOC": "debug"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_sum_of_squares_is_the_same_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(n, generator=generator)) for n in (200_000, 3, 150_001)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer = hybridopt.optim.SGD(params, max_grad_norm=1e9)
    optimizer.step()
    assert optimizer._plans is not None
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(optimizer._plans[0].square_sum())
    gradients = [p.grad.double() for p in params if p.grad is not None]
    assert found[0] == pytest.approx(sum(float(g.square().sum()) for g in gradients), rel=1e-13)
    assert found[1:] == found[:1] * 2


def test_two_threads_with_their_own_optimizers() -> None:
    expected = _big(2)
    results: list[Any] = [None, None]

    def work(i: int) -> None:
        generator = torch.Generator().manual_seed(i)
        params = [Parameter(torch.randn(270_000, generator=generator)) for _ in range(2)]
        optimizer = hybridopt.optim.Adam(params)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        results[i] = (torch.cat([p.detach() for p in params]), optimizer._used)

    alone = []
    for i in range(2):
        work(i)
        alone.append(results[i][0])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b[0]) and b[1] == COMPILED for a, b in zip(alone, results, strict=True))
    assert torch.equal(expected, _big(2))


def _one_parallel_step(params: list[Parameter], optimizer: Any) -> None:
    """torch's own threads do not survive a fork: only the step may use several."""
    for p in params:
        p.grad = torch.ones(p.shape)
    torch.set_num_threads(2)
    optimizer.step()
    torch.set_num_threads(1)


def _child(params: list[Parameter], optimizer: Any, queue: Any) -> None:
    _one_parallel_step(params, optimizer)
    queue.put((optimizer._used, params[0][-1].item()))


def test_child_steps_after_its_parent_stepped_in_parallel() -> None:
    params = [Parameter(torch.zeros(300_000))]
    optimizer = hybridopt.optim.SGD(params, lr=1.0)
    _one_parallel_step(params, optimizer)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads about
        child = context.Process(target=_child, args=(params, optimizer, queue), daemon=True)
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == (COMPILED, -2.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, while it traces `return loss`
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_compiled_training_step(name: str) -> None:
    """torch.compile leaves our step out of its graphs, without a warning, and the result is the same."""

    def train(compiled: bool) -> tuple[list[Tensor], str]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = getattr(hybridopt.optim, name)(model.parameters(), lr=0.1)
        x = torch.ones(4, 3)

        def one() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(one, backend="eager") if compiled else one
        for _ in range(4):
            run()
        return [p.detach() for p in model.parameters()], optimizer._used

    (eager, _), (compiled, used) = train(False), train(True)
    assert used == COMPILED
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
