"""The Triton engine: natively where there is a GPU, in Triton's interpreter elsewhere, and compiled for sm_90."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.engines import _noise, gpu
from hybridopt.engines._variant import Variant
from hybridopt.errors import NonFiniteLoss
from hybridopt.optim import _plan
from hybridopt.optim._device_plan import DevicePlan
from tests.optim import test_against_torch as reference
from tests.optim import test_precision as precision
from tests.optim.side_by_side import odd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN = ("Lion", "ADOPT", "Adan", "AdEMAMix")
FUSED = "fused (triton)"

pytest.importorskip("triton")


SHAPES = ((7,), (1100,), (0,), (), (2, 1))  # no full block, a full one and a tail, nothing


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton for weights on the CPU too, few of them, and no warnings of NumPy, which interprets the kernels."""
    monkeypatch.setitem(_plan.ENGINES, "cpu", "triton")
    monkeypatch.setattr(reference, "SHAPES", SHAPES)
    with np.errstate(all="ignore"):
        yield


def on_device(params: list[Any]) -> list[Any]:
    return [Parameter(p.detach().to(DEVICE)) for p in params]


def give(params: list[Any], gradients: list[Tensor]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()


def run(optimizer: Any, params: list[Any], grads: list[list[Tensor]]) -> None:
    reference.run(optimizer, params, [[g.to(DEVICE) for g in step] for step in grads])


# -- results --------------------------------------------------------------------------------------------------


def compare(name: str, dtype: torch.dtype, steps: int) -> None:
    grads = reference.gradients(dtype, steps)
    for description, kwargs in reference.configurations(name):
        lr = kwargs.get("lr")
        if isinstance(lr, Tensor) and lr.dtype.itemsize < dtype.itemsize:
            continue  # torch computes with the tensor's precision
        params, references = on_device(reference.weights(dtype)), on_device(reference.weights(dtype))
        theirs = getattr(torch.optim, name)(references, **deepcopy(kwargs), foreach=False)
        ours = getattr(hybridopt.optim, name)(params, **deepcopy(kwargs))
        run(theirs, references, grads)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(ours, params, grads)
        assert ours._used == FUSED, f"{description}: {ours!r}"
        try:
            reference.assert_same(ours, theirs, params, references, reference.TOLERANCE[dtype])
        except AssertionError as error:
            raise AssertionError(f"{name} {description!r}: {error}") from error


@pytest.mark.parametrize("name", reference.NAMES)
def test_torchs_inputs_in_float64(name: str) -> None:
    compare(name, torch.float64, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.NAMES)
def test_torchs_inputs(name: str) -> None:
    """All configurations of torch's own table in float32, 20 steps, within the tolerance of the other engines."""
    compare(name, torch.float32, reference.STEPS)


def same_as_cpu(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, **options: Any) -> None:
    """Both engines, the same options: equal weights and states (bit for bit below float32)."""
    results = []
    for engine in ("llvm", "triton"):
        if DEVICE == "cpu":
            monkeypatch.setitem(_plan.ENGINES, "cpu", engine)
        params = [Parameter(p.detach().clone()) for p in precision.weights(dtype)[:3]]
        if engine == "triton":
            params = on_device(params)
        optimizer = precision.make(name, params, **options)
        for step in range(4):
            precision.give(params, step)
            for p in params:
                assert p.grad is not None
                p.grad = p.grad.to(p.device)
            optimizer.step()
        assert optimizer._used == f"fused ({engine})"
        results.append(precision.bits(params, optimizer))
    for a, b in zip(*results, strict=True):
        assert a.dtype is b.dtype
        if a.dtype in precision.HALVES:
            assert torch.equal(a, b.cpu())
        else:
            torch.testing.assert_close(a, b.cpu(), rtol=2e-6, atol=1e-6)


def test_numbers_of_a_tensor_are_rounded_as_torch_stores_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """NAdam's product of momenta, to the bit, while it still changes quickly."""
    products = []
    for kind in (torch.optim.NAdam, hybridopt.optim.NAdam):
        if DEVICE == "cpu":
            monkeypatch.setitem(_plan.ENGINES, "cpu", "triton")
        params = [Parameter(torch.ones(3, device=DEVICE))]
        optimizer = kind(params, momentum_decay=0.3)
        seen = []
        for _ in range(12):
            params[0].grad = torch.ones(3, device=DEVICE)
            optimizer.step()
            seen.append(float(optimizer.state[params[0]]["mu_product"]))
        products.append(seen)
    assert products[0] == products[1]


@pytest.mark.parametrize("name", [*OWN, "LAMB", "AdamW", "SGD"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_same_as_the_cpu_engine(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    same_as_cpu(monkeypatch, name, dtype)


@pytest.mark.parametrize("dtype", precision.HALVES)
def test_numbers_are_rounded_at_random_as_in_python(dtype: torch.dtype) -> None:
    x = precision.edges()
    if dtype is torch.bfloat16:  # of which the interpreter makes other numbers where they are subnormal
        x = x[x.double().abs() >= 2.0**-126]
    told, used = precision.stored(x.to(DEVICE), dtype, "auto", seed=3)
    assert used == FUSED
    precision.assert_same_bits(told.cpu(), _noise.rounded(x, dtype, _noise.key(3, 2, 0, 1)))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((dtype, {"stochastic_rounding": True, "seed": 5}) for dtype in precision.HALVES),
        (torch.bfloat16, {"kahan_sum": True}),
        (torch.bfloat16, {"kahan_sum": True, "stochastic_rounding": True, "state_dtype": torch.float32}),
        (torch.bfloat16, {"max_grad_norm": 0.25, "state_dtype": torch.float32}),
    ],
    ids=["random bfloat16", "random float16", "kahan", "both", "clipped"],
)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_precision_as_the_cpu_engine(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    same_as_cpu(monkeypatch, name, dtype, **options)


def test_unaligned_views() -> None:
    """Weights that start at any element: a second launch, without 16-byte loads."""
    base = torch.randn(3000, dtype=torch.float64, device=DEVICE)
    params = [Parameter(base[k : k + 1100]) for k in (0, 1101)] + [Parameter(base[2300:2302])]
    copies = [Parameter(p.detach().clone()) for p in params]
    ours, theirs = hybridopt.optim.RMSprop(params), torch.optim.RMSprop(copies)
    for k in range(3):
        for p, q in zip(params, copies, strict=True):
            p.grad = torch.sin(p.detach() * k)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert ours._used == FUSED
    assert ours._plans is not None
    (plan,) = ours._plans
    assert isinstance(plan, DevicePlan)
    assert plan.even == [True, False, True]
    assert (len(plan.aligned), len(plan.unaligned)) == (3, 2)
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_more_than_two_to_the_31_elements() -> None:
    """The last block of a weight of 5 billion elements, by a table that says so: no offset is cut to 32 bits."""
    p = Parameter(torch.ones(700, device=DEVICE))
    optimizer = hybridopt.optim.SGD([p], lr=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer._plans is not None
    (plan,) = optimizer._plans
    assert isinstance(plan, DevicePlan)
    block = 5_000_000
    start = block * 1024
    plan.tables[0] = start + 700
    plan.tables[1] -= start * 4
    plan.gradients_there[0] -= start * 4
    plan.aligned = plan.aligned.clone()
    plan.aligned[0, 1] = block
    plan.run()
    assert bool((p == 0).all())


# -- nothing waits for the device -----------------------------------------------------------------------------


def prepared(name: str, **options: Any) -> tuple[Any, list[Any]]:
    params = on_device(precision.weights(torch.float32)[:3])
    optimizer = precision.make(name, params, **options)
    for step in range(2):
        precision.give(params, step)
        for p in params:
            p.grad = p.grad.to(DEVICE)
        optimizer.step()
    assert optimizer._used == FUSED
    return optimizer, params


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever reads a number from the device is an error."""

    def refuse(self: Tensor, *args: Any) -> Any:
        raise AssertionError("a step waited for the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, refuse)
        yield


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "ASGD", "Lion"])
def test_step_without_waiting(name: str) -> None:
    """Clipping, skipping, a GradScaler's numbers and a tensor as learning rate: all decided on the device."""
    lr = torch.tensor(0.01, device=DEVICE)
    optimizer, params = prepared(name, lr=lr, max_grad_norm=1.0, nonfinite="skip")
    before = precision.bits(params, optimizer)
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
    optimizer._prepare()
    gradients = [torch.randn_like(p) for p in params]
    give(params, [4 * g for g in gradients])
    with no_waiting():
        optimizer._update()
    after = precision.bits(params, optimizer)
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))
    for found_inf, bad, skipped in ((1.0, 0.0, 0), (0.0, math.nan, 1), (0.0, math.inf, 2)):
        optimizer.found_inf.fill_(found_inf)
        params[1].grad[0] = bad
        with no_waiting():
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(after, precision.bits(params, optimizer), strict=True))
        assert optimizer.skipped_steps == skipped


@pytest.mark.parametrize("options", [{}, {"kahan_sum": True}], ids=str)
def test_lamb_does_not_wait_either(options: dict[str, Any]) -> None:
    """Whether the directions were skipped is not asked, so the weights stay by what is told on the device."""
    dtype = torch.bfloat16 if options else torch.float32
    params = on_device(precision.weights(dtype)[:3])
    lr = torch.tensor(0.01, device=DEVICE)
    optimizer = hybridopt.optim.LAMB(params, lr=lr, max_grad_norm=1.0, nonfinite="skip", **options)
    twins = on_device(precision.weights(dtype)[:3])
    twin = hybridopt.optim.LAMB(twins, lr=0.01, max_grad_norm=1.0, nonfinite="skip", **options)
    for k in range(7):
        gradients = [torch.randn(p.shape, device=DEVICE).to(dtype) for p in params]
        if k in (0, 3):
            gradients[1][0] = math.nan
        give(params, gradients)
        before = (
            precision.bits(params, optimizer) if optimizer.state else [p.detach().clone() for p in params]
        )
        if k < 3:
            optimizer.step()
        else:
            with no_waiting():
                optimizer.step()
        after = precision.bits(params, optimizer)
        if k in (0, 3):
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
        else:
            give(twins, gradients)
            twin.step()
    assert optimizer._used == FUSED
    assert optimizer.skipped_steps == 2
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6 if dtype is torch.float32 else 2**-8, atol=1e-6)
    optimizer.add_param_group({"params": on_device([torch.ones(2)])})
    optimizer.step()
    assert optimizer.skipped_steps == 2


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_what_a_grad_scaler_leaves_out_is_not_counted(nonfinite: str) -> None:
    """As on the CPU: its verdict comes first."""
    optimizer, params = prepared("Adam", nonfinite=nonfinite)
    before = precision.bits(params, optimizer)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    scaler.scale(torch.zeros((), device=DEVICE))
    params[0].grad[0, 0] = math.inf
    scaler.step(optimizer)
    assert optimizer.skipped_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, precision.bits(params, optimizer), strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_hands_nan_and_inf_on(bad: float) -> None:
    optimizer, params = prepared("RMSprop", max_grad_norm=1.0)
    wanted = [p.detach().clone() for p in params]
    params[0].grad[0, 0] = bad
    optimizer.step()
    assert bool(params[0][0, 0].isnan())
    for p, w in zip(params[1:], wanted[1:], strict=True):
        assert bool(p.isnan().all()) if math.isnan(bad) else torch.equal(p, w)


def test_number_after_a_tensor() -> None:
    """The same number as before the tensor, which has overwritten it on the device."""
    p = Parameter(torch.zeros(3, device=DEVICE))
    optimizer = hybridopt.optim.SGD([p], lr=1.0, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    told = []
    for lr in (1.0, 1.0, torch.tensor(0.25, device=DEVICE), torch.tensor(0.5, device=DEVICE), 1.0, 2.0):
        before = p.detach().clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        told.append((before - p.detach())[0].item())
    assert optimizer._used == FUSED
    assert told == [1.0, 1.0, 0.25, 0.5, 1.0, 2.0]


def test_frozen_groups_are_their_devices_engines() -> None:
    """One of another engine would make a guarded step wait for the device."""
    trained, frozen = Parameter(torch.ones(3, device=DEVICE)), Parameter(torch.ones(3, device=DEVICE))
    optimizer = hybridopt.optim.RMSprop([{"params": [trained]}, {"params": [frozen]}], nonfinite="skip")
    for step in range(5):
        trained.grad = torch.ones_like(trained)
        frozen.grad = torch.ones_like(frozen) if step > 2 else None
        optimizer.step()
        if step:
            assert optimizer._plans is not None or step == 3
            assert all(isinstance(plan, DevicePlan) for plan in optimizer._plans or ())
    assert optimizer.state[frozen]["step"].item() == 2
    meta = Parameter(torch.ones(3, device="meta"))
    mixed = hybridopt.optim.SGD([{"params": [trained]}, {"params": [meta]}])
    mixed.step()
    assert "a weight is on meta" in mixed._used


def folded(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (p - lr * sum([g, g]),)


def test_rule_that_cannot_be_translated_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    translate = gpu.module_source
    monkeypatch.setattr(gpu, "module_source", lambda *a: tried.append(1) or translate(*a))
    p = Parameter(torch.ones(3, device=DEVICE))
    optimizer = hybridopt.optim.from_rule(folded, defaults={"lr": 0.5})([p])
    p.grad = torch.ones_like(p)
    for _ in range(4):
        optimizer.step()
    assert "a call of `sum`" in optimizer._used
    assert len(tried) == 1


def powers(p: Any, g: Any, lr: Any, exponent: Any, root: Any) -> tuple[Any, ...]:
    return (p * 0 + g**2 + 10 * g**3 + 100 * g**exponent + 1000 * g**0 + lr + root,)


def powers_of_steps(step: float, lr: float, exponent: float) -> tuple[float, ...]:
    return lr, exponent, (-0.5) ** step


_CLIPPED = Variant(
    (("amsgrad", False), ("maximize", False), ("decay", False), ("decoupled", False)),
    states=("float32", "float32"),
    scaled=True,
)


@pytest.mark.parametrize("broken", ["begin", "apply", "squares"])
def test_launch_that_fails(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Before anything has changed: torch's own code does the step, with one warning that names the reason."""

    tries = []

    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            tries.append(grid)
            raise RuntimeError("no kernel image is available\nfor this device")

    make = gpu.squares if broken == "squares" else gpu.compiled
    made: list[Any] = []

    def once(*wanted: Any) -> Any:
        made[:] = made or [SimpleNamespace(**{**vars(make(*wanted)), broken: Broken()})]
        return made[0]

    monkeypatch.setattr(gpu, make.__name__, once)
    if broken == "squares":  # a module that no other test sees: it remembers
        module = SimpleNamespace(**vars(gpu.compiled(hybridopt.optim.Adam.rule, _CLIPPED)))
        monkeypatch.setattr(gpu, "compiled", lambda *wanted: module)
    results = []
    for optim, options in ((hybridopt.optim, {"max_grad_norm": 1e9}), (torch.optim, {})):
        params = [Parameter(torch.linspace(-1, 1, 9, device=DEVICE))]
        optimizer: Any = optim.Adam(params, lr=0.1, **options)  # type: ignore[attr-defined]
        for step in range(4):
            give(params, [torch.full((9,), step + 1.0, device=DEVICE)])
            if optim is hybridopt.optim and step == 1:
                told = r"Adam: Triton cannot run it \(RuntimeError: no kernel image is available\); torch's own code"
                with pytest.warns(RuntimeWarning, match=told):
                    optimizer.step()
            else:
                optimizer.step()
        results.append(params[0].detach())
    torch.testing.assert_close(*results)
    assert len(tries) == 1


def test_powers_of_numbers_below_zero() -> None:
    """Squares, whole powers, powers given as numbers."""
    Own = hybridopt.optim.from_rule(powers, defaults={"lr": 1.0, "exponent": 3.0}, scalars=powers_of_steps)
    results = []
    for implementation in ("auto", "reference"):
        p = Parameter(torch.zeros(6, dtype=torch.float64, device=DEVICE))
        optimizer = Own([p], implementation=implementation)
        p.grad = torch.tensor([-2.0, 2.0, 0.0, -1.5, 3.0, 0.5], dtype=torch.float64, device=DEVICE)
        for _ in range(3):
            optimizer.step()
        results.append(p.detach())
        assert (optimizer._used == FUSED) == (implementation == "auto")
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_blocks() -> None:
    """Each block of each tensor once, also of many tensors of which some are empty."""
    sizes = [0, 1, 1024, 1025, 0, 5000, 7]
    params = [Parameter(torch.zeros(n, device=DEVICE)) for n in sizes]
    optimizer = hybridopt.optim.SGD(params, lr=1.0)
    give(params, [torch.ones(n, device=DEVICE) for n in sizes])
    optimizer.step()
    assert optimizer._plans is not None
    (plan,) = optimizer._plans
    assert isinstance(plan, DevicePlan)
    wanted = [[t, k] for t, n in enumerate(sizes) for k in range(math.ceil(n / 1024))]
    assert plan.all.tolist() == wanted
    assert all(bool((p == -1).all()) for p in params)


def test_raise() -> None:
    optimizer, params = prepared("Adam", nonfinite="raise")
    before = precision.bits(params, optimizer)
    params[1].grad[0] = math.nan
    with pytest.raises(NonFiniteLoss, match="number 1 of group 0"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, precision.bits(params, optimizer), strict=True))


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "RMSprop", "NAdam"])
def test_replay_reads_live_hyperparameters(name: str) -> None:
    """What a graph replays is `run` alone: tensors as learning rate and weight decay act when they are refilled."""
    lr = torch.tensor(0.01, dtype=torch.float64, device=DEVICE)
    results = []
    for replay in (True, False):
        params = [Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64, device=DEVICE))]
        optimizer: Any = getattr(hybridopt.optim, name)(params, lr=lr.fill_(0.01), weight_decay=0.1)
        decay = torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
        optimizer.param_groups[0]["weight_decay"] = decay
        params[0].grad = torch.linspace(1, 2, 9, dtype=torch.float64, device=DEVICE)
        for step in range(5):
            if step == 3:
                lr.fill_(0.5)
                decay.fill_(0.01)
            if replay and step >= 2:
                optimizer._plans[0].run()
            else:
                optimizer.step()
        assert optimizer._used == FUSED
        results.append(precision.bits(params, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    first = results[0][0]
    assert (first - torch.linspace(-1, 1, 9, dtype=torch.float64, device=DEVICE)).abs().max() > 0.3


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", [*reference.NAMES, *OWN])
def test_cuda_graph(name: str) -> None:
    """A recorded step, replayed, leaves the same bits as eager steps."""
    results = []
    for recorded in (True, False):
        torch.manual_seed(0)
        optimizer, params = prepared(name, lr=torch.tensor(0.01, device=DEVICE) if name not in OWN else 0.01)
        if recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(3):
                optimizer.step()
        results.append(precision.bits(params, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- weights of other kinds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_complex_weights(name: str, limit: float | None) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    params = on_device([torch.randn(n, dtype=torch.complex64) for n in (5, 1100)])
    copies = on_device(params)
    mine: Any = getattr(hybridopt.optim, name)(params, **options, max_grad_norm=limit)
    torchs: Any = getattr(torch.optim, name)(copies, **options)
    for _ in range(4):
        gradients = [torch.randn_like(p) for p in params]
        give(params, gradients)
        give(copies, [g.clone() for g in gradients])
        if limit:
            torch.nn.utils.clip_grad_norm_(copies, limit)
        mine.step()
        torchs.step()
    assert mine._used == FUSED
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@odd
def test_a_sparse_gradient_beside_others() -> None:
    torch.manual_seed(0)
    params = on_device([torch.randn(6, 3), torch.randn(1100)])
    copies = on_device(params)
    mine, torchs = hybridopt.optim.SGD(params, lr=0.1), torch.optim.SGD(copies, lr=0.1)
    rows = torch.tensor([[1, 4, 1]], device=DEVICE)
    for _ in range(3):
        values, dense = torch.randn(3, 3, device=DEVICE), torch.randn(1100, device=DEVICE)
        for own in (params, copies):
            own[0].grad = torch.sparse_coo_tensor(rows, values, (6, 3), check_invariants=True)
            own[1].grad = dense.clone()
        mine.step()
        torchs.step()
    assert mine._used.startswith(f"{FUSED}, torch's own code: a gradient is")
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# -- around it ------------------------------------------------------------------------------------------------


def test_counters_move_to_the_device_and_checkpoints_interchange() -> None:
    optimizer, params = prepared("Adam")
    copies = on_device(params)
    torchs: Any = torch.optim.Adam(copies, lr=0.01)
    torchs.load_state_dict(deepcopy(optimizer.state_dict()))
    gradients = [torch.randn_like(p) for p in params]
    for _ in range(2):
        give(params, gradients)
        give(copies, gradients)
        optimizer.step()
        torchs.step()
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert optimizer.state[p]["step"].device == p.device


@pytest.mark.parametrize("name", ["ASGD", "NAdam"])
def test_numbers_that_loading_widens(name: str) -> None:
    """float64 `eta`, `mu`, `mu_product` beside a float32 `step`: as torch goes on from there."""
    optimizer, params = prepared(name)
    copies = [Parameter(p.detach().double()) for p in params]
    twins = on_device(copies)
    mine: Any = getattr(hybridopt.optim, name)(copies, lr=0.1)
    torchs: Any = getattr(torch.optim, name)(twins, lr=0.1)
    for other in (mine, torchs):
        other.load_state_dict(deepcopy(optimizer.state_dict()))
    gradients = [torch.randn_like(p) for p in copies]
    for _ in range(4):
        give(copies, gradients)
        give(twins, gradients)
        mine.step()
        torchs.step()
    assert mine._used == "fused (triton)"
    for p, q in zip(copies, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "available", lambda: "Triton is not installed")
    p = Parameter(torch.ones(2, device=DEVICE))
    optimizer = hybridopt.optim.RMSprop([p])
    p.grad = torch.ones_like(p)
    with pytest.warns(RuntimeWarning, match="RMSprop: Triton is not installed; torch's own"):
        optimizer.step()


# -- code for sm_90, made without such a device ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_code_for_sm_90() -> None:
    """Loads and stores of 16 bytes in the main path of every rule, no spilled registers, at least 5 blocks an SM."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "triton_code.py"), "--json"],
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["rule"] for row in rows} >= {"adam", "sgd", "rprop", "nadam", "lion"}
    for row in rows:
        assert row["loads of 16 bytes"] >= row["arrays read"], row
        assert row["stores of 16 bytes"] >= row["arrays written"], row
        assert row["spilled bytes"] == 0, row
        assert row["registers"] <= 96, row  # 65 536 registers, 128 threads a block
