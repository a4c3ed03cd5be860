"""Every configuration that torch itself tests: weights and state as torch's for-loop leaves them."""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.optim._base import FusedStep
from tests.optim.side_by_side import NAMES

SHAPES = ((1,), (7,), (127,), (1823,), (), (0,), (3, 0, 2), (5, 4), (1, 1))
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
STEPS = 20


@functools.cache
def database() -> dict[str, Any]:
    """torch's own table of optimizers, their inputs and their errors, by class name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing torch's test helpers warns about other libraries
        module: Any = importlib.import_module("torch.testing._internal.common_optimizers")
    return {info.optim_cls.__name__: info for info in module.optim_db}


# Beyond torch's table: what its inputs leave out.
MORE: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.5, "nesterov": True, "maximize": True},
    ],
    "Adam": [
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "amsgrad": True},
        {"eps": 0.1, "betas": (0.5, 0.6)},
        {"betas": (0.0, 0.9)},
        {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.1},
    ],
    "AdamW": [{"weight_decay": 0, "maximize": True}, {"lr": torch.tensor([0.01], dtype=torch.float64)}],
    "Adagrad": [
        {"initial_accumulator_value": 0.5, "maximize": True, "weight_decay": 0.1, "lr_decay": 0.2},
        {"lr": torch.tensor(0.01, dtype=torch.float64)},
    ],
    "RMSprop": [
        {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "alpha": 0.9},
        {"centered": True, "maximize": True},
    ],
    "Rprop": [
        {"step_sizes": (0.001, 0.02), "etas": (0.3, 1.7), "lr": torch.tensor(0.02, dtype=torch.float64)}
    ],
    "ASGD": [{"t0": 5, "lambd": 0.1, "alpha": 0.5, "weight_decay": 0.1, "maximize": True}, {"t0": 0}],
    "NAdam": [{"momentum_decay": 0.3, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}],
    "RAdam": [{"betas": (0.9, 0.7)}, {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}],
    "Adamax": [{"betas": (0.5, 0.6), "weight_decay": 0.1, "maximize": True}],
    "Adadelta": [{"eps": 1e-3, "rho": 0.5, "lr": torch.tensor(0.3, dtype=torch.float64)}],
}


def configurations(name: str) -> list[tuple[str, dict[str, Any]]]:
    """(description, keyword arguments) of torch's inputs, and ours."""
    inputs = database()[name].optim_inputs_func(device="cpu")
    return [(i.desc, i.kwargs) for i in inputs] + [(str(k), k) for k in MORE[name]]


def weights(dtype: torch.dtype, seed: int = 1) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(dtype: torch.dtype, steps: int = STEPS) -> list[list[Tensor]]:
    """Of every step; a part repeats or vanishes, so that signs agree, differ and are zero (Rprop)."""
    generator = torch.Generator().manual_seed(2)
    out: list[list[Tensor]] = []
    for k in range(steps):
        draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
        if k % 3:
            draw = [torch.where(d > 0.3, d, 0.5 * o.double()) for d, o in zip(draw, out[-1], strict=True)]
        out.append([torch.where(d.abs() < 0.05, 0.0, d).to(dtype) for d in draw])
    return out


def run(optimizer: Any, params: list[Parameter], grads: list[list[Tensor]]) -> None:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


def values(optimizer: Any, params: list[Parameter]) -> Iterator[tuple[str, Tensor]]:
    for i, p in enumerate(params):
        yield f"weight {i}", p.detach()
        for key, value in sorted(optimizer.state.get(p, {}).items()):
            assert isinstance(value, Tensor)
            yield f"{key} {i}", value


def assert_same(
    ours: Any, theirs: Any, params: list[Parameter], references: list[Parameter], tol: float
) -> None:
    a, b = list(values(ours, params)), list(values(theirs, references))
    assert [key for key, _ in a] == [key for key, _ in b]
    for (key, x), (_, y) in zip(a, b, strict=True):
        assert x.dtype == y.dtype, key
        assert x.shape == y.shape, key
        assert torch.equal(x.isfinite(), y.isfinite()), key
        excess = ((x - y).abs() / (1 + y.abs())).nan_to_num(0)
        assert excess.numel() == 0 or excess.max() <= tol, f"{key}: {excess.max():.3g} > {tol:.0e}"


def implementation_case(name: str, implementation: str) -> dict[str, Any]:
    if implementation in ("foreach=True", "fused=True"):
        return {implementation.partition("=")[0]: True}
    return {"implementation": implementation}


EXPECTED = {
    "auto": "fused (llvm)",
    "fused": "fused (llvm)",
    "fused=True": "fused (llvm)",
    "foreach": "torch's foreach",
    "foreach=True": "torch's foreach",
    "reference": "torch's for-loop",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", NAMES)
def test_all_of_torchs_inputs(name: str, dtype: torch.dtype) -> None:
    grads = gradients(dtype)
    for description, kwargs in configurations(name):
        for implementation, expected in EXPECTED.items():
            if "lr" in kwargs and isinstance(kwargs["lr"], Tensor) and "foreach" in implementation:
                continue  # torch: "lr as a Tensor is not supported for capturable=False and foreach=True"
            params, references = weights(dtype), weights(dtype)
            foreach = "foreach" in implementation  # torch's own is further from its for-loop, for ASGD
            theirs = getattr(torch.optim, name)(references, **deepcopy(kwargs), foreach=foreach)
            ours = getattr(hybridopt.optim, name)(
                params, **deepcopy(kwargs), **implementation_case(name, implementation)
            )
            run(theirs, references, grads)
            lr = kwargs.get("lr")
            if isinstance(lr, Tensor) and lr.dtype.itemsize < dtype.itemsize and expected.startswith("fused"):
                expected = "torch's own code: lr is a tensor of less precision than a weight"
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run(ours, params, grads)
            assert len(seen) == (implementation.startswith("fused") and not expected.startswith("fused"))
            try:
                assert_same(ours, theirs, params, references, 0 if foreach else TOLERANCE[dtype])
            except AssertionError as error:
                raise AssertionError(f"{name} {description!r} {implementation}: {error}") from error
            assert ours._used.startswith(expected), f"{description}: {ours!r}"
            assert f"-> {expected}" in repr(ours)


@pytest.mark.parametrize("name", NAMES)
def test_all_of_torchs_errors(name: str) -> None:
    """The same exception and message as torch, whatever torch raises (or warns) in this configuration."""
    info = database()[name]
    count = 0
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        params = [Parameter(torch.randn(2, 3))] if given.params is None else given.params
        if case.error_on.name != "CONSTRUCTION_ERROR":
            continue
        count += 1
        with pytest.raises(case.error_type) as theirs:
            getattr(torch.optim, name)(params, **given.kwargs)
        with pytest.raises(case.error_type, match=re.escape(str(theirs.value))):
            getattr(hybridopt.optim, name)(params, **given.kwargs)
    assert count >= 5


@pytest.mark.parametrize("name", NAMES)
def test_first_use_of_each_state_is_torchs(name: str) -> None:
    """The step that creates the state runs torch's code, bit for bit; the rest is compiled."""
    params, references = weights(torch.float32), weights(torch.float32)
    ours, theirs = getattr(hybridopt.optim, name)(params), getattr(torch.optim, name)(references)
    grads = gradients(torch.float32, 2)
    run(ours, params, grads[:1])
    run(theirs, references, grads[:1])
    assert_same(ours, theirs, params, references, 0 if name not in ("SGD", "Adagrad") else 1e-6)
    run(ours, params, grads[1:])
    assert ours._used == "fused (llvm)"


def reference(optimizer: FusedStep, p: Parameter, states: dict[str, Any]) -> None:
    """One step of a weight by its rule on tensors: what the rule says, in Python."""
    rule, group = optimizer.rule, optimizer.param_groups[0]
    flags = dict(zip(rule.flags, map(bool, optimizer._flags(group)), strict=True))
    step = 0.0
    if rule.counts:
        states["step"] += 1
        step = states["step"].item()
    numbers = [states[key].item() for key in rule.scalar_state]
    out = rule.coefficients_at(step, numbers, [float(h) for h in optimizer._hyper(group)])
    split = len(rule.coefficients)
    assert p.grad is not None
    result = rule.update(
        p.detach(), p.grad, *(states.get(s.name, 0.0) for s in rule.state), *out[:split], **flags
    )
    p.data.copy_(result[0])
    for name, value in zip((s.name for s in rule.state), result[1:], strict=True):
        if name in rule.active(flags):
            states[name].copy_(value)
    for key, number in zip(rule.scalar_state, out[split:], strict=True):
        states[key].fill_(number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", NAMES)
def test_rule_on_tensors(name: str, dtype: torch.dtype) -> None:
    """The source that is compiled is also the reference: Python runs it on tensors, to the same result."""
    grads = gradients(dtype)
    for description, kwargs in configurations(name):
        params, references = weights(dtype), weights(dtype)
        theirs = getattr(torch.optim, name)(references, **deepcopy(kwargs), foreach=False)
        ours = getattr(hybridopt.optim, name)(params, **deepcopy(kwargs), implementation="reference")
        run(theirs, references, grads)
        run(ours, params, grads[:1])  # torch creates the state
        for step in grads[1:]:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
                reference(ours, p, ours.state[p])
        try:
            assert_same(ours, theirs, params, references, TOLERANCE[dtype])
        except AssertionError as error:
            raise AssertionError(f"{name} {description!r}: {error}") from error


NON_FINITE = (float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e30, 1e-30, -1e-42)


@pytest.mark.parametrize("name", NAMES)
def test_non_finite_gradients(name: str) -> None:
    """inf, nan and denormals end where torch's for-loop puts them, in weights and in state."""
    for _, kwargs in configurations(name):
        if min(kwargs.get("betas", (0.9,))) <= 0.5:
            continue  # torch's lerp then computes g - (g - m) * beta: nan for an infinite gradient, where we have inf
        results: list[tuple[Any, list[Parameter]]] = []
        for make in (getattr(torch.optim, name), getattr(hybridopt.optim, name)):
            p = Parameter(torch.linspace(-1, 1, 8 * len(NON_FINITE)))
            optimizer: Any = make([p], **deepcopy(kwargs))
            for k in range(6):
                p.grad = torch.linspace(-1, 1, p.numel())
                if k in (2, 4):
                    p.grad = torch.tensor(NON_FINITE).repeat_interleave(8) * (1 if k == 2 else p.grad.sign())
                optimizer.step()
            results.append((optimizer, [p]))
        (theirs, references), (ours, params) = results
        assert ours._used == "fused (llvm)"
        for (key, x), (_, y) in zip(values(ours, params), values(theirs, references), strict=True):
            torch.testing.assert_close(
                x, y, rtol=2e-6, atol=1e-6, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_a_real_network() -> None:
    """Gradients from autograd, fresh at every step; the run stays compiled and with torch."""
    inputs, targets = torch.randn(32, 8), torch.randn(32, 3)

    def train(make: Callable[..., Any]) -> tuple[list[Tensor], Any]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        optimizer = make(model.parameters(), lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()], optimizer

    for name in NAMES:
        theirs, _ = train(getattr(torch.optim, name))
        ours, optimizer = train(getattr(hybridopt.optim, name))
        assert optimizer._used == "fused (llvm)"
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4 if name == "Rprop" else 2e-5)
