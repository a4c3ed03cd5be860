"""Weights, gradients and states that move between steps, and what the compiled loop does not take."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import hybridopt.optim
from tests.optim.side_by_side import COMPILED, NAMES, OPTIONS, assert_same, both, give, odd, pair

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


def step_moved(case: Any, move: str) -> None:
    """Make a move on both sides, and a step unless a weight was shrunk, which has no gradient then."""
    for optimizer, params in ((case[0], case[1]), (case[2], case[3])):
        give(params, 3)
        MOVES[move](optimizer, params)
    if move != "shrink":
        case[0].step()
        case[2].step()


@odd
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", NAMES)
def test_whatever_moves_is_noticed(name: str, move: str) -> None:
    case = pair(name)
    both(case, range(3))
    assert case[0]._used == COMPILED
    step_moved(case, move)
    if move != "shrink":
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


@odd
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


@odd
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
    assert case[0]._used == COMPILED
    assert_same(case)


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
    p = Parameter(torch.ones(4)[::2])
    optimizer = hybridopt.optim.RMSprop([p], fused=True)
    p.grad = torch.ones_like(p)
    with pytest.warns(RuntimeWarning, match=r"RMSprop: fused was asked for, but .* the weight has gaps"):
        optimizer.step()
    optimizer.step()  # a second warning would be an error


@odd
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
