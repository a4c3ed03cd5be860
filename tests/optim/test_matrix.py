"""Muon and Adafactor: weights and state as torch's for-loop leaves them, however the step is batched."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridopt.errors import MethodError
from hybridopt.optim import adafactor as adafactor_file
from hybridopt.optim import muon as muon_file
from hybridopt.optim.adafactor import Adafactor
from hybridopt.optim.muon import Muon
from tests.optim.side_by_side import carried

NAMES = ("Muon", "Adafactor")
OURS: dict[str, Any] = {"Muon": Muon, "Adafactor": Adafactor}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
STEPS = 20
BATCHED = muon_file.BATCHED
# Stacks, lone weights, both orientations, one row or column; for Adafactor also vectors, numbers and more dimensions.
MATRICES = ((3, 4), (4, 3), (3, 4), (2, 5), (2, 5), (6, 2), (5, 5), (4, 3), (2, 2))
OTHERS = ((1, 5), (6, 1), (127,), (), *[(7,)] * 5, *[()] * 5, *[(2, 3, 4)] * 3, (2, 3, 3, 3))
SHAPES: dict[str, Any] = {"Muon": MATRICES, "Adafactor": MATRICES + OTHERS}

MORE: dict[str, list[dict[str, Any]]] = {
    "Muon": [
        {"nesterov": False, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "lr": torch.tensor(0.01, dtype=torch.float64)},
        {"adjust_lr_fn": "original", "momentum": 0.0, "eps": 1.0, "ns_steps": 0},
        {"lr": torch.tensor([0.01])},
    ],
    "Adafactor": [
        {"eps": (1e-2, 2.0), "lr": 0.1},
        {"eps": (0.0, 1e-3), "d": 3.0, "weight_decay": 0.1, "maximize": True},
        {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.1},
        {"lr": torch.tensor([0.01]), "beta2_decay": 0.0},
    ],
}


@functools.cache
def database() -> dict[str, Any]:
    """torch's own table of optimizers, their inputs and their errors, by class name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing torch's test helpers warns about other libraries
        module: Any = importlib.import_module("torch.testing._internal.common_optimizers")
    return {info.optim_cls.__name__: info for info in module.optim_db}


def configurations(name: str) -> list[dict[str, Any]]:
    return [i.kwargs for i in database()[name].optim_inputs_func(device="cpu")] + MORE[name]


def pair(
    name: str, dtype: torch.dtype = torch.float64, shapes: Any = None, ours: Any = None, **kwargs: Any
) -> Any:
    """(our optimizer, its weights, torch's, its weights) at the same point; `ours`: options that torch lacks."""
    torch.manual_seed(1)
    params = [Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in shapes or SHAPES[name]]
    references = [Parameter(p.detach().clone()) for p in params]
    made = OURS[name](params, **copy.deepcopy(kwargs), **(ours or {}))
    return made, params, getattr(torch.optim, name)(references, **copy.deepcopy(kwargs)), references


def give(params: list[Parameter], k: int, size: float = 1.0, skip: int | None = None) -> None:
    """The gradients of step k; none for the weight `skip`."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * k + i)
        draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = None if i == skip else torch.empty_like(p).copy_(draw * size)


def both(case: Any, steps: range, **how: Any) -> None:
    ours, params, theirs, references = case
    for k in steps:
        give(params, k, **how)
        give(references, k, **how)
        ours.step()
        theirs.step()


def assert_same(case: Any, tol: float) -> None:
    ours, params, theirs, references = case
    for i, (p, q) in enumerate(zip(params, references, strict=True)):
        a, b = {"weight": p.detach(), **ours.state[p]}, {"weight": q.detach(), **theirs.state[q]}
        assert list(a) == list(b)
        for key in a:
            x, y = a[key], b[key]
            assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride()), (i, key)
            assert torch.equal(x.isfinite(), y.isfinite()), (i, key)
            excess = ((x - y).abs() / (1 + y.abs())).nan_to_num(0)
            assert excess.max() <= tol, (
                f"{key} of weight {i}, {tuple(p.shape)}: {excess.max():.3g} > {tol:.0e}"
            )


def torchs_iteration(stack: Tensor, *options: Any) -> Tensor:
    return torch.stack([torch.optim._muon._zeropower_via_newtonschulz(matrix, *options) for matrix in stack])  # type: ignore[attr-defined]


@pytest.fixture(params=["as measured", "always batched", "as on a device"])
def everything_batched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The choice the code makes, one under which torch's for-loop does nothing and stacks hold two weights, and the way
    of a device, where Adafactor's numbers are tensors.
    """
    if request.param == "as measured":
        return False
    if request.param == "as on a device":
        monkeypatch.setattr(adafactor_file, "_on_host", lambda tensor: False)
        monkeypatch.setattr(muon_file, "_live", lambda lr: isinstance(lr, Tensor))
        return True
    monkeypatch.setattr(muon_file, "LONE_BELOW", 0)
    monkeypatch.setattr(muon_file, "CHUNK", 24)
    monkeypatch.setattr(adafactor_file, "LARGE", 0)
    monkeypatch.setattr(
        adafactor_file, "STACKED", 24
    )  # two 3 x 4; a 5 x 5 and larger ones go by a few rows at a time
    monkeypatch.setattr(adafactor_file, "SEPARABLE", 0)
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", NAMES)
def test_all_of_torchs_inputs(
    name: str, dtype: torch.dtype, everything_batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the tolerance of a dtype, but for the last bits of bfloat16 in Muon's iteration: they have their own test."""
    monkeypatch.setattr(muon_file, "orthogonalised", torchs_iteration)
    for kwargs in configurations(name):
        case = pair(name, dtype, **kwargs)
        both(case, range(STEPS))
        assert case[0]._used == BATCHED
        lr = kwargs.get("lr")
        single = (
            isinstance(lr, Tensor) and lr.dtype is torch.float32
        )  # torch then rounds the step's size to float32
        tol = max(TOLERANCE[dtype], 1e-7 if single and not adafactor_file._on_host(case[1][0]) else 0)
        try:
            assert_same(case, tol)
        except AssertionError as error:
            raise AssertionError(f"{kwargs}: {error}") from error


class Tape(TorchDispatchMode):
    """Records the operations of a step, to repeat them on the same memory: what a CUDA graph does, on the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            raise AssertionError(f"{function} waits for the device, or copies from the host")
        made = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for function, args, kwargs, made in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if (
                    isinstance(old, Tensor)
                    and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                ):
                    old.copy_(new)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_a_device_can_be_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for it; replayed, it reads gradients, learning rate and counts as they are then."""
    monkeypatch.setattr(adafactor_file, "_on_host", lambda tensor: False)
    monkeypatch.setattr(muon_file, "_live", lambda lr: isinstance(lr, Tensor))
    results = []
    for recorded in (True, False):
        lr = torch.tensor(0.05, dtype=torch.float64)
        optimizer, params, *_ = pair(name, lr=lr, weight_decay=0.1)
        tape = Tape()
        for k in range(6):
            for p, drawn in zip(params, drawn_for(params, k), strict=True):
                p.grad = drawn if p.grad is None else p.grad.copy_(drawn)
            lr.fill_(0.05 / (k + 1))
            if not recorded or k == 0:
                optimizer.step()
            elif k == 1:
                with torch.no_grad(), tape:
                    optimizer.step()
            else:
                with torch.no_grad():
                    tape.replay()
        results.append([t.detach() for p in params for t in (p, *optimizer.state[p].values())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph(name: str) -> None:
    """The same natively."""
    results = []
    for recorded in (True, False):
        lr = torch.tensor(0.05, dtype=torch.float64, device="cuda")
        _, params, *_ = pair(name)
        params = [Parameter(p.detach().cuda()) for p in params]
        optimizer = OURS[name](params, lr=lr, weight_decay=0.1)
        for p, drawn in zip(params, drawn_for(params, 0), strict=True):
            p.grad = drawn
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if recorded:
            with torch.cuda.graph(graph):
                optimizer.step()
        for k in range(1, 5):
            lr.fill_(0.05 / k)
            for p, drawn in zip(params, drawn_for(params, k), strict=True):
                assert p.grad is not None
                p.grad.copy_(drawn)
            if recorded:
                graph.replay()
            else:
                optimizer.step()
        assert optimizer._used == BATCHED
        results.append([t.detach() for p in params for t in (p, *optimizer.state[p].values())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def drawn_for(params: list[Parameter], k: int) -> list[Tensor]:
    copies = [Parameter(p.detach().clone()) for p in params]
    give(copies, k)
    return [p.grad for p in copies if p.grad is not None]


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_torchs(name: str) -> None:
    for options, used in (
        ({"implementation": "reference"}, "torch's for-loop"),
        ({"foreach": False, "fused": False}, "torch's for-loop"),
        ({"implementation": "foreach"}, BATCHED if name == "Muon" else "torch's foreach"),
        ({"foreach": True}, BATCHED if name == "Muon" else "torch's foreach"),
    ):
        torchs = {"foreach": True} if used == "torch's foreach" else {}
        case = pair(name, torch.float32, ours=options)
        case[2].param_groups[0].update(torchs)
        both(case, range(3))
        assert_same(case, 0)
        assert case[0]._used == used
        assert f"-> {used}" in repr(case[0])


@pytest.mark.parametrize("name", NAMES)
def test_all_of_torchs_errors(name: str) -> None:
    """The same exception and message as torch, whatever torch raises (or warns) in this configuration."""
    construction = 0

    def use(make: Any, case: Any) -> None:
        given = case.optimizer_error_input
        optimizer = make(
            [Parameter(torch.randn(2, 3))] if given.params is None else given.params, **given.kwargs
        )
        if case.error_on.name != "CONSTRUCTION_ERROR":
            optimizer.step()

    for case in database()[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        messages = []
        for make in (getattr(torch.optim, name), OURS[name]):
            with pytest.raises(case.error_type, match=case.error_regex) as error:
                use(make, case)
            messages.append(str(error.value))
        construction += case.error_on.name == "CONSTRUCTION_ERROR"
        assert messages[0] == messages[1]
    assert construction >= 5


@pytest.mark.parametrize(
    ("options", "text"),
    [({"ns_steps": 100}, "less than 100"), ({"ns_coefficients": (1.0, 2.0)}, "exactly 3 values")],
)
def test_errors_of_muons_step(options: dict[str, Any], text: str) -> None:
    ours, params, _, _ = pair("Muon", shapes=[(3, 4)] * 2, **options)
    give(params, 0)
    with pytest.raises(ValueError, match=text):
        ours.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_complex_and_sparse_are_refused(name: str, kind: str) -> None:
    p = Parameter(torch.ones(2, 3, dtype=torch.complex64 if kind == "complex" else torch.float32))
    p.grad = torch.ones_like(p) if kind == "complex" else torch.ones(2, 3).to_sparse()
    with pytest.raises(RuntimeError, match=f"{name} does not support {kind}"):
        OURS[name]([p]).step()


# -- the iteration of Muon, where it cannot be torch's to the last bit ------------------------------------------

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def exact(matrix: Tensor) -> Tensor:
    """The iteration in float64."""
    a, b, c = COEFFICIENTS
    X = matrix.double() / matrix.double().norm()
    X = X.T if len(X) > len(X.T) else X
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if len(matrix) > len(matrix.T) else X


@pytest.mark.parametrize("shape", [(1, 5), (6, 1), (16, 16), (33, 70), (70, 33), (1, 400), (64, 64)])
@pytest.mark.parametrize("native", [False, True])
def test_iteration_is_as_exact_as_torchs(shape: Any, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the products are made: as near the exact iteration as torch's, each entry within bfloat16 of torch's."""
    monkeypatch.setattr(muon_file, "_bfloat16_products", lambda stack: native)
    monkeypatch.setattr(muon_file, "LONE_BELOW", 0)
    case = pair("Muon", torch.float64, [shape] * 3, lr=1.0, weight_decay=0.0, momentum=0.0)
    ours, params, _, references = case
    starts = [p.detach().clone() for p in params]
    both(case, range(1))
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    for p, q, start in zip(params, references, starts, strict=True):
        step, torchs, wanted = (start - p) / scale, (start - q) / scale, exact(q.grad)  # type: ignore[arg-type]
        assert (step - wanted).norm() <= 1.1 * (torchs - wanted).norm() + 1e-12
        assert (step - torchs).abs().max() <= 2**-6
        assert torch.equal(ours.state[p]["momentum_buffer"], case[2].state[q]["momentum_buffer"])


@pytest.mark.parametrize("native", [False, True])
def test_every_product_is_rounded_to_bfloat16(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch: after one iteration 999 of 1000 entries are the same, the others next to it."""
    monkeypatch.setattr(muon_file, "_bfloat16_products", lambda stack: native)
    stack = torch.randn(20, 16, 24).bfloat16()
    ours = muon_file.orthogonalised(stack.clone(), COEFFICIENTS, 1, 1e-7).float()
    theirs = torchs_iteration(stack.clone(), COEFFICIENTS, 1, 1e-7).float()
    assert torch.equal(ours, ours.bfloat16().float())
    assert (ours == theirs).float().mean() >= 0.999
    assert ((ours - theirs).abs() <= theirs.abs() * 2**-7).all()


def test_large_chunks_and_small_ones_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (1, 3 * 20 * 30, 1 << 22):
        monkeypatch.setattr(muon_file, "CHUNK", chunk)
        case = pair("Muon", torch.float32, [(20, 30)] * 7)
        seen: list[int] = []
        inner = muon_file.orthogonalised
        monkeypatch.setattr(
            muon_file,
            "orthogonalised",
            lambda stack, *a, inner=inner, seen=seen: (seen.append(len(stack)), inner(stack, *a))[1],
        )
        both(case, range(2))
        monkeypatch.setattr(muon_file, "orthogonalised", inner)
        results.append(torch.stack([p.detach() for p in case[1]]))
        assert seen == {1: [1] * 14, 1800: [3, 3, 1] * 2, 1 << 22: [7, 7]}[chunk]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 3, 4)])
def test_a_weight_alone_of_its_shape(shape: Any, everything_batched: bool) -> None:
    case = pair("Adafactor", torch.float64, [shape], weight_decay=0.1)
    both(case, range(4))
    assert_same(case, 1e-12)


# -- Adafactor at the ends of the number range ---------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-7, 1e-5, 1e8, 1e12, 1e25])
def test_tiny_and_huge_gradients(size: float, everything_batched: bool) -> None:
    """Clamped at eps, below the square root of the smallest number, overflowing: as torch."""
    for eps in ((None, 1e-3), (0.0, 1e-3), (1e-3, 1e-3)):
        for dtype, tol in TOLERANCE.items():
            case = pair("Adafactor", dtype, [(4, 6), (4, 6), (4, 6), (40, 30), (9,)], eps=eps)
            both(case, range(6), size=size)
            assert_same(case, tol)


@pytest.mark.parametrize("number", [0.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", [(0, 0), (7, 1), (slice(None), 2), (3, slice(None)), slice(None)])
def test_gradients_with_zeros_and_non_finite(number: float, where: Any, everything_batched: bool) -> None:
    case = pair("Adafactor", torch.float32, [(8, 6)] * 3 + [(30, 40)])
    for k in range(4):
        for params in (case[1], case[3]):
            give(params, k)
            if k == 1:
                for p in (params[1], params[3]):
                    assert p.grad is not None
                    p.grad[where] = number
        case[0].step()
        case[2].step()
    assert_same(case, 1e-6)


# -- torch's contracts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    mine = inspect.signature(OURS[name].__init__).parameters
    torchs = inspect.signature(getattr(torch.optim, name).__init__).parameters
    kept = [(key, p.kind, p.default) for key, p in mine.items() if key in torchs]
    assert kept == [(key, p.kind, p.default) for key, p in torchs.items()]
    added = {"fused"} | ({"foreach"} if name == "Muon" else set())
    assert {key for key, p in mine.items() if key not in torchs and p.kind is p.KEYWORD_ONLY} == added
    assert set(mine) - set(torchs) == {*added, "options"}


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_go_both_ways(name: str) -> None:
    case = pair(name)
    ours, params, theirs, references = case
    both(case, range(3))
    mine, torchs = ours.state_dict(), theirs.state_dict()
    assert [set(g) for g in mine["param_groups"]] == [set(g) for g in torchs["param_groups"]]
    assert {k: list(v) for k, v in mine["state"].items()} == {k: list(v) for k, v in torchs["state"].items()}
    theirs.load_state_dict(copy.deepcopy(mine))
    ours.load_state_dict(copy.deepcopy(torchs))
    both(case, range(3, 6))
    assert ours._used == BATCHED
    assert_same(case, 1e-12)


@pytest.mark.parametrize("how", ["torch.save", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_between_steps(name: str, how: str) -> None:
    ours, params, _, _ = pair(name, torch.float32, ours={"implementation": "auto"})
    for k in range(3):
        give(params, k)
        ours.step()
    others, other = carried(how, params, ours)
    for k in range(3, 6):
        for optimizer, weights in ((ours, params), (other, others)):
            give(weights, k)
            optimizer.step()
    assert other._used == BATCHED
    for p, q in zip(params, others, strict=True):
        assert p is not q
        assert torch.equal(p, q)
        assert all(torch.equal(ours.state[p][key], other.state[q][key]) for key in ours.state[p])


@pytest.mark.parametrize("implementation", ["reference", "foreach"])
def test_chosen_implementation_survives(implementation: Any) -> None:
    _, params, theirs, _ = pair("Adafactor")
    ours = Adafactor(params, implementation=implementation)
    ours.load_state_dict(theirs.state_dict())
    ours.add_param_group({"params": [Parameter(torch.ones(2))], "lr": 0.5})
    for optimizer in (ours, copy.deepcopy(ours)):
        assert optimizer.implementation == implementation
        assert [g["foreach"] for g in optimizer.param_groups] == [implementation == "foreach"] * 2


@pytest.mark.parametrize("name", NAMES)
def test_implementation_errors(name: str) -> None:
    p = [Parameter(torch.ones(1, 1))]
    with pytest.raises(MethodError, match="expected one of auto, reference, foreach, fused, got 'fast'"):
        OURS[name](p, implementation="fast")
    with pytest.raises(MethodError, match="contradicts foreach=True"):
        OURS[name](p, foreach=True, implementation="fused")


@pytest.mark.parametrize("options", [{"fused": True}, {"implementation": "fused"}])
@pytest.mark.parametrize("name", NAMES)
def test_fused_warns_once_and_runs_as_auto(name: str, options: dict[str, Any]) -> None:
    case = pair(name, ours=options)
    with pytest.warns(
        RuntimeWarning, match=f"{name}: fused was asked for, but .* {BATCHED} runs instead"
    ) as seen:
        both(case, range(1))
    assert [w.filename for w in seen] == [__file__]
    both(case, range(1, 4))  # a second warning would be an error
    assert_same(case, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_weights_without_gradient_groups_and_schedulers(name: str) -> None:
    case = pair(name, lr=0.05)
    schedulers: list[Callable[[Any], Any]] = [
        lambda o: lr_scheduler.ExponentialLR(o, 0.8),
        lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    ]
    for make in schedulers:
        both(case, range(2), skip=0)
        assert (case[1][0] not in case[0].state) == (make is schedulers[0])
        mine, torchs = make(case[0]), make(case[2])
        for k in range(2, 5):
            both(case, range(k, k + 1), skip=k)
            mine.step()
            torchs.step()
        for optimizer, params in ((case[0], case[1]), (case[2], case[3])):
            extra = [Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(3)]
            params.extend(extra)
            optimizer.add_param_group({"params": extra, "lr": 0.5, "weight_decay": 0.3})
        both(case, range(5, 8))
    assert_same(case, 1e-12)
    both((case[0], [], case[2], []), range(1))  # gradients as they are


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_at_all(name: str) -> None:
    ours, params, _, _ = pair(name)
    before = [p.detach().clone() for p in params]
    ours.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_closure_and_hooks(name: str, implementation: str) -> None:
    getattr(torch.optim, name)([Parameter(torch.ones(1, 1))])  # torch wraps a class's step when one is made
    p = Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = OURS[name]([p], lr=0.01, implementation=implementation)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        seen.append("loss")
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    for _ in range(3):
        with torch.no_grad():
            loss = optimizer.step(closure)
    assert isinstance(loss, Tensor)
    assert loss < 5
    assert seen == ["before", "loss", "after"] * 3


@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_and_layouts(name: str) -> None:
    """Weights of two dtypes in a group, transposed weights: torch's result."""
    case = pair(name)
    for optimizer, params in ((case[0], case[1]), (case[2], case[3])):
        for dtype in (torch.float32, torch.float64):
            params.append(Parameter(torch.linspace(-1, 1, 12, dtype=dtype).view(4, 3).T))
            optimizer.param_groups[0]["params"].append(params[-1])
    both(case, range(4))
    assert case[0]._used == BATCHED
    assert_same(case, 1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, while it traces `return loss`
@pytest.mark.parametrize("name", NAMES)
def test_compiled_training_step(name: str) -> None:
    """torch.compile leaves our step out of its graphs, and the result is the same."""

    def train(compiled: bool) -> tuple[Tensor, str]:
        torch.manual_seed(0)
        weights = [Parameter(torch.randn(3, 3)) for _ in range(3)]
        optimizer = OURS[name](weights, lr=0.1)

        def one() -> Tensor:
            optimizer.zero_grad()
            loss = (weights[0] @ weights[1] @ weights[2]).square().sum()
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(one, backend="eager") if compiled else one
        for _ in range(4):
            run()
        return torch.stack([w.detach() for w in weights]), optimizer._used

    (eager, _), (compiled, used) = train(False), train(True)
    assert used == BATCHED
    torch.testing.assert_close(eager, compiled)
