"""`flatten=True`: the same bits as where tensors lie on their own, whatever is done to the weights."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.errors import MethodError
from hybridopt.rules import xp

NAMES = (
    "SGD", "Adam", "AdamW", "AMSGrad", "Adagrad", "Adadelta", "Adamax", "RMSprop", "Rprop", "ASGD", "NAdam", "RAdam",
    "Lion", "Adan", "ADOPT", "AdEMAMix",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"centered": True, "momentum": 0.5},
}
SHAPES = ((3, 5), (7,), (), (65,), (0,), (2, 3, 4))


def twins(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """(flat optimizer, its weights, one by table, its weights)."""
    torch.manual_seed(0)
    weights = [Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    others = [Parameter(p.detach().clone()) for p in weights]
    cls = getattr(hybridopt.optim, name)
    options = {**OPTIONS.get(name, {}), **options}
    return cls(weights, **options, flatten=True), weights, cls(others, **options), others


def give(params: list[Parameter], k: int) -> None:
    """The gradients of step k, into those that are there."""
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * k + i)).to(p.dtype)
        if p.grad is None:
            p.grad = torch.empty_like(p).copy_(g)
        else:
            p.grad.copy_(g)


def run(case: Any, steps: range, change: Callable[[Any, list[Parameter]], None] | None = None) -> None:
    for optimizer, params in (case[:2], case[2:]):
        for k in steps:
            give(params, k)
            if change is not None and k == steps[len(steps) // 2]:
                change(optimizer, params)
            optimizer.step()


def assert_bits(case: Any) -> None:
    flat, params, table, others = case
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert flat.state[p].keys() == table.state[q].keys()
        for name, value in table.state[q].items():
            assert torch.equal(flat.state[p][name], value), name


def in_one(tensors: list[Tensor]) -> bool:
    return len({t.untyped_storage().data_ptr() for t in tensors if t.numel()}) == 1


def is_flat(optimizer: Any, params: list[Parameter]) -> bool:
    """Whether weights, and every elementwise state, are in one buffer each."""
    names = optimizer._active(optimizer.param_groups[0])
    columns = [[optimizer.state[p][name] for p in params] for name in names]
    return in_one(list(params)) and all(map(in_one, columns))


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in NAMES), ("SGD", torch.bfloat16), ("NAdam", torch.float64)],
)
def test_same_bits(name: str, dtype: torch.dtype) -> None:
    case = twins(name, dtype)
    identities = [id(p) for p in case[1]]
    run(case, range(6))
    assert_bits(case)
    assert [id(p) for p in case[1]] == identities
    assert is_flat(*case[:2])
    assert in_one([p.grad for p in case[1] if p.grad is not None])
    assert not in_one(case[3])
    assert case[0]._plans[0].table[0] > case[1][0].numel()  # reaches to the next weight


@pytest.mark.parametrize(
    "options",
    [{"stochastic_rounding": True}, {"kahan_sum": True}, {"max_grad_norm": 0.5}, {"nonfinite": "skip"}],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_bits_with_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    case = twins("AdamW", dtype, **options)
    run(case, range(6))
    assert_bits(case)
    assert is_flat(*case[:2])


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_when_large(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        weights = [
            Parameter(torch.randn(300, 701)),
            Parameter(torch.randn(99)),
            Parameter(torch.randn(250_001)),
        ]
        others = [Parameter(p.detach().clone()) for p in weights]
        case = (
            hybridopt.optim.Adam(weights, flatten=True), weights, hybridopt.optim.Adam(others), others
        )  # fmt: skip
        run(case, range(4))
        assert_bits(case)
        assert is_flat(*case[:2])
    finally:
        torch.set_num_threads(before)


def test_different_steps_are_not_merged() -> None:
    """Neighbours whose counters differ have different bias corrections."""

    def reset(optimizer: Any, params: list[Parameter]) -> None:
        optimizer.state[params[1]]["step"].zero_()

    case = twins("Adam")
    run(case, range(8), reset)
    assert_bits(case)
    assert is_flat(*case[:2])


def test_groups_share_a_buffer_but_not_their_numbers() -> None:
    torch.manual_seed(0)
    weights = [Parameter(torch.randn(64)) for _ in range(4)]  # no room between them
    others = [Parameter(p.detach().clone()) for p in weights]
    case: list[Any] = []
    for params, flatten in ((weights, True), (others, False)):
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.2}]
        case += [hybridopt.optim.Adam(groups, flatten=flatten), params]
    run(case, range(5))
    assert_bits(case)
    assert in_one(list(weights))
    assert in_one([case[0].state[p]["exp_avg"] for p in weights])


# -- what is done to weights, gradients and states ---------------------------------------------------------------


def _zero_grad_keeps(optimizer: Any, params: list[Parameter]) -> None:
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    give(params, 50)


def _zero_grad(optimizer: Any, params: list[Parameter]) -> None:
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    give(params, 50)


def _no_gradient(optimizer: Any, params: list[Parameter]) -> None:
    params[1].grad = None


def _frozen(optimizer: Any, params: list[Parameter]) -> None:
    params[0].requires_grad_(False)
    params[0].grad = None


def _double(optimizer: Any, params: list[Parameter]) -> None:
    for p in params:
        p.data = p.data.double()
        p.grad = p.grad.double() if p.grad is not None else None
        for name, value in optimizer.state[p].items():
            optimizer.state[p][name] = value.double() if name != "step" else value


def _other_memory(optimizer: Any, params: list[Parameter]) -> None:
    params[0].data = params[0].data.clone()


def _other_state(optimizer: Any, params: list[Parameter]) -> None:
    optimizer.state[params[3]]["exp_avg"] = optimizer.state[params[3]]["exp_avg"] * 2


def _own_state_dict(optimizer: Any, params: list[Parameter]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _shared(optimizer: Any, params: list[Parameter]) -> None:
    for p in params:
        p.share_memory_()  # type: ignore[no-untyped-call]


def _new_group(optimizer: Any, params: list[Parameter]) -> None:
    params.append(Parameter(torch.linspace(-1, 1, 9)))
    params[-1].grad = torch.ones(9)
    optimizer.add_param_group({"params": [params[-1]], "lr": 0.3})


def _rebuilt_gradients(optimizer: Any, params: list[Parameter]) -> None:
    for p in params:
        p.grad = p.grad * 2 if p.grad is not None else None


def _somebody_elses_gradients(optimizer: Any, params: list[Parameter]) -> None:
    """DDP's `gradient_as_bucket_view`: views of one buffer, in another order."""
    bucket = torch.zeros(sum(p.numel() for p in params))
    at = 0
    for p in reversed(params):
        view = bucket[at : at + p.numel()].view(p.shape)
        p.grad = view.copy_(p.grad) if p.grad is not None else None
        at += p.numel()
    for name in list(optimizer.state[params[0]]):  # plans are made anew
        optimizer.state[params[0]][name] = optimizer.state[params[0]][name].clone()


@pytest.mark.parametrize(
    "change",
    [
        _zero_grad_keeps, _zero_grad, _no_gradient, _frozen, _double, _other_memory, _other_state, _own_state_dict,
        _shared, _new_group, _rebuilt_gradients, _somebody_elses_gradients,
    ],
    ids=lambda f: f.__name__[1:],
)  # fmt: skip
def test_whatever_happens(change: Any) -> None:
    case = twins("Adam")
    run(case, range(8), change)
    assert_bits(case)
    weights = case[1]
    assert is_flat(case[0], weights)
    assert case[0]._used == "fused (llvm)"
    if change is _somebody_elses_gradients:
        assert weights[0].grad.untyped_storage().nbytes() == 4 * sum(p.numel() for p in weights)


@pytest.mark.parametrize("change", [_no_gradient, _zero_grad_keeps], ids=lambda f: f.__name__[1:])
def test_what_needs_no_move_moves_nothing(change: Any) -> None:
    optimizer, params, *_ = case = twins("Adam")
    run(case, range(4))
    places = [p.data_ptr() for p in params]
    run(case, range(4, 8), change)
    assert [p.data_ptr() for p in params] == places


def test_module_through_its_life() -> None:
    """`.to`, `assign=True`, tied weights, channels_last: flat and table side by side."""
    torch.manual_seed(0)

    def model() -> Any:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16))
        net[3].weight = net[2].weight  # tied
        return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    results = []
    for flatten in (True, False):
        net = model()
        optimizer = hybridopt.optim.AdamW(net.parameters(), lr=0.01, flatten=flatten)

        def train(steps: int, net: Any = net, optimizer: Any = optimizer) -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                x = torch.linspace(-1, 1, 32, dtype=net[0].weight.dtype).reshape(1, 2, 4, 4)
                net(x).square().sum().backward()
                optimizer.step()

        train(3)
        assert in_one(list(net.parameters())) is flatten
        assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
        net.load_state_dict({k: v.clone() * 0.9 for k, v in net.state_dict().items()}, assign=True)
        optimizer.param_groups[0]["params"][:] = list(net.parameters())  # assign makes new Parameters
        optimizer.state.clear()
        train(3)
        assert in_one(list(net.parameters())) is flatten
        net.double()
        optimizer.load_state_dict(optimizer.state_dict())  # states follow their weights
        train(3)
        assert in_one(list(net.parameters())) is flatten
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("how", ["torch.save", "deepcopy", "pickle"])
def test_saved_and_loaded(how: str) -> None:
    case = twins("NAdam")
    run(case, range(4))
    flat, params = case[:2]
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(flat.state_dict(), file)
        file.seek(0)
        weights = [Parameter(p.detach().clone()) for p in params]
        again = hybridopt.optim.NAdam(weights, flatten=True)
        again.load_state_dict(torch.load(file))
        theirs = torch.optim.NAdam(weights)
        theirs.load_state_dict(flat.state_dict())
    else:
        again = copy.deepcopy(flat) if how == "deepcopy" else pickle.loads(pickle.dumps(flat))
        weights = again.param_groups[0]["params"]
    assert not {p.data_ptr() for p in weights if p.numel()} & {p.data_ptr() for p in params}
    case = (again, weights, *case[2:])
    for p in weights:
        p.grad = None
    run(case, range(4, 8))
    assert_bits(case)
    assert is_flat(again, weights)


def test_saved_states_are_as_large_as_they_are() -> None:
    """Every saved tensor has memory of its own: a view would drag the whole buffer along."""
    optimizer, params, *_ = case = twins("Adam")
    run(case, range(3))
    told = optimizer.state_dict()
    for entry in told["state"].values():
        for value in entry.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.itemsize
    assert told.keys() == case[2].state_dict().keys()
    told["state"][0]["exp_avg"].zero_()
    assert optimizer.state[params[0]]["exp_avg"].any()


def test_autograd_notices_the_write() -> None:
    optimizer, params, *_ = twins("SGD")
    give(params, 0)
    optimizer.step()
    loss = (params[0] ** 2).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- where weights cannot be moved ---------------------------------------------------------------------------------


def _views() -> list[Parameter]:
    whole = torch.randn(20)
    return [Parameter(whole[:12].view(3, 4)), Parameter(whole[12:])]


def _aliases() -> list[Parameter]:
    memory = torch.randn(8)
    return [Parameter(memory), Parameter(memory)]


def _in_shared_memory() -> list[Parameter]:
    return [Parameter(torch.randn(8).share_memory_()), Parameter(torch.randn(3))]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_views, "part of a larger memory"),
        (_aliases, "two weights share their memory"),
        (_in_shared_memory, "shared with other processes"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_weights_that_others_see_stay(make: Callable[[], list[Parameter]], reason: str) -> None:
    torch.manual_seed(0)
    params = make()
    optimizer = hybridopt.optim.Adam(params, flatten=True)
    places = [p.data_ptr() for p in params]
    for k in range(4):
        give(params, k)
        if k == 1:  # once
            with pytest.warns(RuntimeWarning, match=f"Adam: flatten was asked for, but .*{reason}"):
                optimizer.step()
        else:
            optimizer.step()
    assert [p.data_ptr() for p in params] == places
    assert optimizer._used == "fused (llvm)"


def test_what_is_not_compiled_is_not_moved_and_the_others_are() -> None:
    params = [Parameter(torch.randn(6)[::2]), Parameter(torch.randn(4))]
    optimizer = hybridopt.optim.Adam(params, flatten=True)
    places = [p.data_ptr() for p in params]
    give(params, 0)
    optimizer.step()  # creates the state
    with pytest.warns(RuntimeWarning, match="Adam: flatten was asked for, but .* the weight has gaps; torch"):
        optimizer.step()
    optimizer.step()
    assert [p.data_ptr() == place for p, place in zip(params, places, strict=True)] == [True, False]


@pytest.mark.parametrize("implementation", ["reference", "foreach"])
def test_contradiction(implementation: Any) -> None:
    with pytest.raises(
        MethodError, match=f"flatten is for the compiled step, but {implementation} was asked for"
    ):
        hybridopt.optim.SGD([Parameter(torch.ones(2))], implementation=implementation, flatten=True)


def test_not_a_bool() -> None:
    with pytest.raises(MethodError, match="expected flatten to be True or False, got 1"):
        hybridopt.optim.SGD([Parameter(torch.ones(2))], flatten=1)  # type: ignore[arg-type]


def test_own_rules_flatten_too() -> None:
    def signum(p: Any, g: Any, momentum: Any, lr: Any, beta: Any) -> tuple[Any, ...]:
        momentum = momentum * beta + g * (1 - beta)
        return p - xp.sign(momentum) * lr, momentum

    cls: Any = hybridopt.optim.from_rule(signum, state=["momentum"], defaults={"lr": 0.01, "beta": 0.9})
    torch.manual_seed(0)
    weights = [Parameter(torch.randn(shape)) for shape in SHAPES]
    others = [Parameter(p.detach().clone()) for p in weights]
    case = (cls(weights, flatten=True), weights, cls(others), others)
    run(case, range(5))
    assert_bits(case)
    assert is_flat(*case[:2])
