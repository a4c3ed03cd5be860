"""L-BFGS: torch's path bit for bit, its checkpoints both ways, and its contracts."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hybridopt
from hybridopt.errors import MethodError
from hybridopt.optim.lbfgs import LBFGS

Loss = Callable[[list[Tensor]], Tensor]


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([(torch.view_as_real(p) if p.is_complex() else p).reshape(-1) for p in params])


def rosenbrock(params: list[Tensor]) -> Tensor:
    x = flat(params)
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def beale(params: list[Tensor]) -> Tensor:
    x = flat(params)
    a, b = x[0], x[1]
    terms = [(c - a + a * b**k) ** 2 for k, c in enumerate((1.5, 2.25, 2.625), 1)]
    return torch.stack(terms).sum() + 0.01 * (x**4).sum()


def kinked(params: list[Tensor]) -> Tensor:
    """Not twice differentiable at its minimum: hard for the line search."""
    x = flat(params)
    return (
        torch.logsumexp(torch.stack([x.sum(), -2 * x.sum(), (x**2).sum()]), 0) + (x - 1).abs().pow(1.5).sum()
    )


def walled(params: list[Tensor]) -> Tensor:
    """Infinite outside a ball: the search's cubic is nan there."""
    x = flat(params)
    return torch.where((x**2).sum() < 2 * x.numel(), (x - 1).pow(4).sum(), torch.inf)


def barely_lower(params: list[Tensor]) -> Tensor:
    """A first step of 1 lowers it by 5e-4 of what its slope promises, and halves the slope: on Armijo's limit."""
    z = flat(params) - START
    return (-z + 1.4985 * z**2 - 0.499 * z**3 + 0.01 * (z * (z - 1)) ** 2 * z**2).sum()


START = torch.randn(1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SEVERAL = ((3, 2), (), (0,), (5,))
PROBLEMS: dict[str, tuple[Loss, tuple[tuple[int, ...], ...]]] = {
    "rosenbrock": (rosenbrock, SEVERAL),
    "large rosenbrock": (rosenbrock, ((25, 4),)),
    "beale": (beale, ((2,),)),
    "kinked": (kinked, SEVERAL),
    "walled": (walled, ((25, 4),)),
    "barely lower": (barely_lower, ((1,),)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "wolfe": {"line_search_fn": "strong_wolfe"},
    "plain": {"lr": 1e-3},
    "plain, long": {"lr": 1e-2, "max_iter": 45, "history_size": 7, "tolerance_change": 0.0},
    "short history": {"line_search_fn": "strong_wolfe", "history_size": 3, "max_iter": 50},
    "few evaluations": {"line_search_fn": "strong_wolfe", "lr": 0.3, "max_eval": 7},
    "one evaluation": {"line_search_fn": "strong_wolfe", "max_eval": 1},
    "too long": {
        "line_search_fn": "strong_wolfe",
        "lr": 30.0,
        "max_iter": 40,
        "max_eval": 80,
        "tolerance_change": 0,
        "tolerance_grad": 0,
    },
    "far too short": {"line_search_fn": "strong_wolfe", "lr": 1e-4, "max_iter": 30},
    "tensor lr": {"line_search_fn": "strong_wolfe", "lr": torch.tensor(0.5)},
    "wide tensor lr": {"lr": torch.tensor([1e-3], dtype=torch.float64)},
    "early": {"line_search_fn": "strong_wolfe", "tolerance_grad": 0.5, "tolerance_change": 1e-3},
}


def weights(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [d.to(dtype).requires_grad_() for d in drawn]


def closure_of(optimizer: Any, params: list[Tensor], loss: Loss, path: list[Tensor]) -> Callable[[], Tensor]:
    """Records the loss and the point of every call."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(params)
        value.backward()  # type: ignore[no-untyped-call]
        path.append(torch.cat([value.detach().reshape(1), flat(params).detach()]))
        return value

    return closure


def walk(
    cls: Any, params: list[Tensor], loss: Loss, steps: int, **options: Any
) -> tuple[Tensor, list[Tensor], Any]:
    """(loss and weights at each closure call, what `step` returned, the optimizer)."""
    optimizer, path = cls(params, **options), []
    closure = closure_of(optimizer, params, loss, path)
    returned = [optimizer.step(closure).detach() for _ in range(steps)]
    return torch.stack(path), returned, optimizer


def assert_identical(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_same_state(ours: Any, theirs: Any) -> None:
    """Every entry of torch's state, of the same type and value; `al` is torch's scratch."""
    (mine,), (torchs,) = ours.state.values(), theirs.state.values()
    assert set(mine) == set(torchs) - {"al"}
    for key, value in torchs.items():
        if key == "al":
            continue
        a, b = (v if isinstance(v, list) else [v] for v in (mine[key], value))
        for x, y in zip(a, b, strict=True):
            assert type(x) is type(y), key
            if isinstance(x, Tensor):
                assert_identical(x, y)
            else:
                assert x == y or x != x != y, key


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_evaluation_is_torchs_bit_for_bit(problem: str, dtype: torch.dtype, options: str) -> None:
    loss, shapes = PROBLEMS[problem]
    params, others = weights(shapes, dtype), weights(shapes, dtype)
    theirs, they_returned, torchs = walk(torch.optim.LBFGS, others, loss, 3, **OPTIONS[options])
    ours, returned, mine = walk(LBFGS, params, loss, 3, **OPTIONS[options])
    assert "scalars as numbers" in repr(mine)
    assert_identical(ours, theirs)
    assert_identical(flat(params), flat(others))
    assert_identical(torch.stack(returned), torch.stack(they_returned))
    assert_same_state(mine, torchs)
    for p, q in zip(params, others, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert_identical(p.grad, q.grad)
    assert mine.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]


def test_the_losses_above_exercise_the_whole_search() -> None:
    """More than one evaluation a search, both signs of the slope, losses that are not finite."""
    path, _, optimizer = walk(LBFGS, weights(((2,),), torch.float64), rosenbrock, 1, **OPTIONS["wolfe"])
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert len(path) == state["func_evals"] > state["n_iter"] + 3
    path, _, _ = walk(LBFGS, weights(((25, 4),), torch.float64), walled, 1, **OPTIONS["too long"])
    assert path[:, 0].isinf().any()
    assert path.isnan().any()


@pytest.mark.parametrize("first", [LBFGS, torch.optim.LBFGS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_checkpoints_go_both_ways_mid_run(first: Any, dtype: torch.dtype) -> None:
    """Whoever began, the rest of the path is torch's."""
    second = torch.optim.LBFGS if first is LBFGS else LBFGS
    options = {"line_search_fn": "strong_wolfe", "max_iter": 4, "history_size": 5}
    whole, _, _ = walk(torch.optim.LBFGS, weights(((6,),), dtype), rosenbrock, 6, **options)
    params = weights(((6,),), dtype)
    begun, _, optimizer = walk(first, params, rosenbrock, 3, **options)
    file = io.BytesIO()
    torch.save({"weights": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [p.detach().requires_grad_() for p in saved["weights"]]
    other, path = second(others, **options), []
    other.load_state_dict(saved["optimizer"])
    for _ in range(3):
        other.step(closure_of(other, others, rosenbrock, path))
    assert_identical(torch.cat([begun, torch.stack(path)]), whole)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_bit_for_bit(how: str) -> None:
    """In torch the copy lacks its weights: AttributeError at the next step."""
    options = {"line_search_fn": "strong_wolfe", "max_iter": 4}
    params = weights(SEVERAL, torch.float32)
    _, _, optimizer = walk(LBFGS, params, rosenbrock, 3, implementation="foreach", **options)
    both = (params, optimizer)
    others, other = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert other.implementation == "foreach"
    paths: tuple[list[Tensor], list[Tensor]] = ([], [])
    for o, ps, path in ((optimizer, params, paths[0]), (other, others, paths[1])):
        for _ in range(3):
            o.step(closure_of(o, ps, rosenbrock, path))
    assert_identical(torch.stack(paths[0]), torch.stack(paths[1]))
    assert params[0] is not others[0]


def test_complex_weights_and_weights_without_gradient() -> None:
    def loss(params: list[Tensor]) -> Tensor:
        z, x, _ = params
        value: Tensor = (z * z.conj()).real.sum() + (z.real * x).sum() ** 2 + (z.imag - 1).pow(4).sum()
        return value

    paths = []
    for cls in (LBFGS, torch.optim.LBFGS):
        z = torch.tensor([1 + 2j, -1 + 0.5j], dtype=torch.complex128, requires_grad=True)
        x, idle = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64)
        params = [z, x, idle.requires_grad_()]
        path, _, _ = walk(cls, params, loss, 3, line_search_fn="strong_wolfe")
        assert idle.grad is None
        assert torch.equal(idle, torch.ones(3, dtype=torch.float64))
        paths.append(path)
    assert_identical(*paths)
    assert paths[0][-1, 0] < 0.5 * paths[0][0, 0]


def test_sparse_gradients_and_a_weight_of_another_dtype() -> None:
    paths = []
    for cls in (LBFGS, torch.optim.LBFGS):
        torch.manual_seed(0)
        table = torch.nn.Embedding(6, 2, sparse=True)
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)

        def loss(params: list[Tensor], table: torch.nn.Embedding = table) -> Tensor:
            return ((table(torch.tensor([0, 3, 3])) - params[1]) ** 4).sum() + params[1].sum() ** 2

        path, _, _ = walk(cls, [table.weight, x], loss, 2, max_iter=10)
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse
        paths.append(path)
    assert_identical(*paths)


def test_gradients_that_are_not_contiguous() -> None:
    """torch: "view size is not compatible with input tensor's size and stride"."""
    goal = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    x = torch.zeros(4, 3, dtype=torch.float64).t().requires_grad_()
    y = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)

    def loss(params: list[Tensor]) -> Tensor:
        return ((params[0].contiguous() - goal) ** 4).sum()

    a, _, _ = walk(LBFGS, [x], loss, 2, line_search_fn="strong_wolfe")
    assert x.grad is not None
    assert not x.grad.is_contiguous()
    b, _, _ = walk(torch.optim.LBFGS, [y], loss, 2, line_search_fn="strong_wolfe")
    assert_identical(a, b)


@pytest.mark.parametrize("zero", ["none", "in place"])
def test_gradients_may_be_overwritten_in_place(zero: str) -> None:
    """The flat gradient is a copy, also of a single weight."""
    paths = []
    for cls in (LBFGS, torch.optim.LBFGS):
        (x,) = params = weights(((4,),), torch.float64)
        optimizer, path = cls(params, line_search_fn="strong_wolfe"), []

        def closure(optimizer: Any = optimizer, x: Tensor = x, path: list[Tensor] = path) -> float:
            optimizer.zero_grad(set_to_none=zero == "none")
            value = rosenbrock([x])
            value.backward()  # type: ignore[no-untyped-call]
            path.append(x.detach().clone())
            return value.item()

        assert isinstance(optimizer.step(closure), float)
        paths.append(torch.stack(path))
    assert_identical(*paths)


# -- contracts --------------------------------------------------------------------------------------------------------


def test_signature_and_errors_are_torchs() -> None:
    mine, torchs = (dict(inspect.signature(c).parameters) for c in (LBFGS, torch.optim.LBFGS))
    for key in ("foreach", "fused"):
        assert mine.pop(key).kind is inspect.Parameter.KEYWORD_ONLY
    assert mine.pop("options").kind is inspect.Parameter.VAR_KEYWORD
    assert [(k, p.default) for k, p in mine.items()] == [(k, p.default) for k, p in torchs.items()]
    x = torch.ones(1, requires_grad=True)
    cases: list[tuple[Any, dict[str, Any]]] = [
        ([x], {"lr": -1.0}),
        ([x], {"lr": torch.ones(2)}),
        ([{"params": [x]}, {"params": [torch.ones(1)]}], {}),
    ]
    for params, wrong in cases:
        with pytest.raises(ValueError, match=r"lr|learning|groups") as theirs:
            torch.optim.LBFGS(params, **wrong)
        with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
            LBFGS(params, **wrong)
    with pytest.raises(MethodError, match="expected one of"):
        LBFGS([x], implementation="quick")  # type: ignore[arg-type]
    for option in (
        {"state_dtype": torch.float64},
        {"max_grad_norm": 1.0},
        {"nonfinite": "skip"},
        {"flatten": True},
    ):
        with pytest.raises(
            MethodError, match=f"LBFGS: {next(iter(option))} cannot be had, because its line search"
        ):
            LBFGS([x], **option)
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        walk(LBFGS, [x], lambda ps: ps[0].sum(), 1, line_search_fn="armijo")


def test_a_second_group_is_refused() -> None:
    params = weights(((2,),), torch.float64)
    optimizer = LBFGS(params)
    optimizer.add_param_group({"params": weights(((1,),), torch.float64)})
    with pytest.raises(MethodError, match="expected one parameter group, got 2"):
        optimizer.step(closure_of(optimizer, params, rosenbrock, []))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_hooks_run_once_and_gradients_are_on_in_the_closure_alone(implementation: str) -> None:
    torch.optim.LBFGS([torch.ones(1)])  # torch wraps its class's step when its first instance is made
    (x,) = params = weights(((2,),), torch.float64)
    optimizer = LBFGS(params, implementation=implementation)  # type: ignore[arg-type]
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.no_grad():
        optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert seen == ["before", "after"]
    assert ("torch's own code" if implementation == "reference" else "scalars as numbers") in repr(optimizer)


def test_other_dtypes_are_torchs_own_steps_and_said_so() -> None:
    paths = []
    for cls in (LBFGS, torch.optim.LBFGS):
        path, _, optimizer = walk(cls, weights(((3,),), torch.bfloat16), kinked, 2, lr=0.1)
        paths.append(path)
        if cls is LBFGS:
            assert "torch's own code: a weight or lr is torch.bfloat16" in repr(optimizer)
    assert_identical(*paths)


def test_what_numpy_says_of_overflow_in_the_loss_is_the_callers_choice() -> None:
    (x,) = weights(((2,),), torch.float64)
    optimizer = LBFGS([x], max_iter=2)

    def closure() -> Tensor:
        np.float64(1e308) * 10
        x.grad = x.detach().clone()
        return (x**2).sum()

    before = np.geterr()
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        optimizer.step(closure)
    with np.errstate(over="ignore"):
        optimizer.step(closure)
    assert np.geterr() == before


def test_a_scheduler_sets_the_next_step() -> None:
    paths = []
    for cls in (LBFGS, torch.optim.LBFGS):
        params = weights(((3,),), torch.float64)
        optimizer, path = cls(params, lr=1e-3, max_iter=3), []
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for _ in range(4):
            optimizer.step(closure_of(optimizer, params, rosenbrock, path))
            scheduler.step()
        paths.append(torch.stack(path))
    assert_identical(*paths)


@pytest.mark.parametrize("line_search", ["strong_wolfe", None])
def test_minimize_drives_it_as_it_drives_torchs(line_search: str | None) -> None:
    """The closure is turned inside out; evaluation by evaluation the same losses, and an exact budget."""
    options: dict[str, Any] = {
        "line_search_fn": line_search,
        "max_iter": 5,
        "lr": 1.0 if line_search else 1e-3,
    }
    losses = []
    for cls in (LBFGS, torch.optim.LBFGS):
        seen: list[float] = []
        x = torch.tensor([-1.2, 1.0, 0.5], dtype=torch.float64, requires_grad=True)

        def loss(x: Tensor, seen: list[float] = seen) -> Tensor:
            value = rosenbrock([x])
            seen.append(value.item())
            return value

        result = hybridopt.minimize(loss, x, hybridopt.method(cls, **options), budget=37, seed=0)
        assert result.evaluations == len(seen) == 37
        losses.append(seen)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
