"""The compiled CPU engine: its disk cache, what it refuses and how it says so, what an import costs, large indices."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import hybridopt.optim
from hybridopt.engines import _llvm, _noise, cpu
from hybridopt.engines._cpu_code import RuleCode
from hybridopt.engines._modules import kept
from hybridopt.engines._translate import Untranslatable
from hybridopt.engines._variant import Variant
from hybridopt.rules import Rule, xp
from hybridopt.rules.sgd import RULE as SGD
from hybridopt.rules.sgd import _scalars

FLAGS = (("maximize", False), ("decay", False), ("heavy", False), ("nesterov", False))
STEP = """
import sys, torch, hybridopt.optim
p = torch.nn.Parameter(torch.ones(3))
optimizer = hybridopt.optim.SGD([p], lr=0.5)
p.grad = torch.ones(3)
optimizer.step()
assert p.tolist() == [0.5] * 3
print(optimizer._used)
"""


def run(code: str, **environment: str) -> str:
    """What a fresh Python prints; warnings are errors there too."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def step(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


# -- the cache on disk --------------------------------------------------------------------------------------


def test_key_covers_all_that_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edited rule, other flags, other dtypes, other constants of ours: other code; the same rule again: the same."""
    names: list[str] = []

    def listen(engine: str, name: str, make: Callable[[], bytes]) -> bytes:
        names.append(name)
        return make()

    monkeypatch.setattr(_llvm, "kept", listen)
    plain = Variant(FLAGS)
    noisy = replace(plain, weight="bfloat16", gradient="bfloat16", stochastic=True)

    def name(rule: Rule, variant: Variant) -> str:
        _llvm.Library("rule", RuleCode(rule, variant).write)
        return names[-1]

    again = types.FunctionType(_scalars.__code__, _scalars.__globals__)
    first = name(SGD, plain)
    assert name(Rule(SGD.update, again, SGD.state, SGD.hyper, (), False), plain) == first
    others = [
        name(SGD, replace(plain, weight="float64")),
        name(SGD, replace(plain, gradient="bfloat16")),
        name(SGD, replace(plain, scaled=True)),
        name(SGD, replace(plain, flags=(("maximize", True), *FLAGS[1:]))),
        name(Rule(SGD.update, None, SGD.state, SGD.coefficients, (), False), plain),
        name(replace(SGD, counts=True), plain),
        name(SGD, noisy),
        name(SGD, replace(noisy, weight="float16")),
    ]
    monkeypatch.setattr(_noise, "FIRST", 3)
    others.append(name(SGD, noisy))
    monkeypatch.setattr(_llvm, "_PASSES", {"speed_level": 1})
    others.append(name(SGD, plain))
    assert len({first, *others}) == len(others) + 1


@pytest.mark.slow
def test_rule_edited_on_disk_is_compiled_anew(tmp_path: Path) -> None:
    rule = tmp_path / "mine.py"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else '.')\n"
        "import torch, mine, hybridopt.optim\n"
        "p = torch.nn.Parameter(torch.ones(1)); p.grad = torch.ones(1)\n"
        "o = hybridopt.optim.from_rule(mine.update, defaults={'lr': 0.5})([p])\n"
        "o.param_groups[0]['lr'] = 0.25; o.step(); o.step(); print(o._used, p.item())"
    )
    code = code.replace("sys.argv[1] if len(sys.argv) > 1 else '.'", repr(str(tmp_path)))
    results = []
    for factor in (1, 2):
        rule.write_text(f"def update(p, g, lr):\n    return (p - lr * {factor}.0 * g,)\n")
        results.append(run(code, HYBRIDOPT_CACHE=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1"))
    assert results == ["fused (llvm) 0.5", "fused (llvm) 0.0"]
    assert len(list((tmp_path / "cache" / "cpu").glob("rule_*.o"))) == 2


def test_cache_is_used_again(tmp_path: Path) -> None:
    """LLVM is not asked a second time."""
    assert run(STEP, HYBRIDOPT_CACHE=str(tmp_path)) == "fused (llvm)"
    refused = "import llvmlite.binding; llvmlite.binding.parse_assembly = lambda text: 1 / 0 if text else parse('')\n"
    again = "from llvmlite.binding import parse_assembly as parse\n" + refused + STEP
    assert run(again, HYBRIDOPT_CACHE=str(tmp_path)) == "fused (llvm)"
    assert "LLVM cannot compile it (ZeroDivisionError" in run(again, HYBRIDOPT_CACHE=str(tmp_path / "empty"))
    assert len(list((tmp_path / "cpu").glob("rule_*.o"))) == 1
    assert not list((tmp_path / "cpu").glob("*.tmp"))


@pytest.mark.slow
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file stands where the folder should be: a temporary folder, gone afterwards."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    assert run(STEP, HYBRIDOPT_CACHE=str(tmp_path / "file"), TMPDIR=str(tmp_path / "tmp")) == "fused (llvm)"
    assert not list((tmp_path / "tmp").glob("hybridopt-*"))


@pytest.mark.parametrize(
    "damage", [lambda code: code[:-1], lambda code: code[:20] + b"?" + code[21:], lambda code: b""]
)
def test_damaged_code_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    """Cut off, changed, empty: running it could do anything."""
    monkeypatch.setenv("HYBRIDOPT_CACHE", str(tmp_path))
    made: list[int] = []

    def make() -> bytes:
        made.append(1)
        return bytes(range(100))

    for damaged, times in ((False, 1), (False, 1), (True, 2), (False, 2)):
        if damaged:
            file = tmp_path / "cpu" / "rule.o"
            file.write_bytes(damage(file.read_bytes()))
        assert kept("cpu", "rule.o", make) == bytes(range(100))
        assert len(made) == times


@pytest.mark.slow
def test_two_processes_compile_at_once(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "HYBRIDOPT_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", STEP], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [p.communicate(timeout=120)[0].strip() for p in processes] == ["fused (llvm)"] * 3
    assert run(STEP, HYBRIDOPT_CACHE=str(tmp_path)) == "fused (llvm)"


# -- imports ------------------------------------------------------------------------------------------------


def test_import_loads_no_compiler() -> None:
    loaded = run("import sys, hybridopt.optim; print('numba' in sys.modules, 'llvmlite' in sys.modules)")
    assert loaded == "False False"


def test_without_llvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's code, and one warning; none if nothing compiled was wanted."""
    monkeypatch.setattr(cpu, "available", lambda: "llvmlite is not installed")
    reference = hybridopt.optim.RMSprop([Parameter(torch.ones(2))], implementation="reference")
    step(reference)
    for options in ({}, {"fused": True}):
        optimizer = hybridopt.optim.RMSprop([Parameter(torch.ones(2))], **options)
        with pytest.warns(RuntimeWarning, match="RMSprop: llvmlite is not installed; torch's own code runs"):
            step(optimizer)
        step(optimizer)
        assert optimizer._used == "torch's own code: llvmlite is not installed"


def test_llvm_that_is_broken() -> None:
    code = STEP.replace("import sys,", "import importlib.util, sys; sys.modules['llvmlite'] = None\nimport")
    code = code.replace("optimizer.step()", "importlib.util.find_spec = lambda name: True\noptimizer.step()")
    assert "LLVM cannot compile it (ModuleNotFoundError" in run(code, HYBRIDOPT_CACHE="")


# -- rules it cannot express --------------------------------------------------------------------------------

TABLE = [1.0, 2.0]


def unknown_global(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (p - lr * g * TABLE[0],)


def if_on_a_value(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    if lr > 0:
        p = p - lr * g
    return (p,)


def inline_if(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (p - (lr if lr > 0 else 0.0) * g,)


def unknown_function(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (p - lr * torch.sign(g),)


def and_on_values(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (xp.where((lr > 0) and (lr < 1), p - lr * g, p),)


def too_many_values(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (p - lr * g, p)


def no_return(p: Any, g: Any, lr: Any) -> None:
    p = p - lr * g


def one_value(p: Any, g: Any, lr: Any) -> Any:
    return p - lr * g


def whole_quotient(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (p // lr,)


def two_comparisons(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (p - lr * ((g > 0) + (p > 0)),)


def sum_of_comparisons(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (xp.where((p > 0) & g, p, g),)


def a_loop(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    while p > 0:
        p = p - lr
    return (p,)


def unpacked(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    p, _ = (p,)
    return (p,)


exec("def no_source(p, g, lr): return (p - lr * g,)")

REFUSED = {
    unknown_global: "the name 'TABLE'",
    if_on_a_value: "`if` on a value; use xp.where",
    inline_if: r"`\.\.\. if \.\.\. else \.\.\.` on a value; use xp.where",
    unknown_function: "`torch.sign`; a rule may use xp.sqrt",
    and_on_values: "`and`/`or` on values",
    too_many_values: "it returns 2 values, not 1",
    no_return: "it does not return",
    one_value: "a rule is assignments and a return of a tuple",
    whole_quotient: "the operator in `p // lr`",
    two_comparisons: "a sum of comparisons; use xp.where",
    sum_of_comparisons: "is not of comparisons",
    a_loop: "a rule is assignments",
    unpacked: "is not given as many values",
    globals()["no_source"]: "its source cannot be read",
}


@pytest.mark.parametrize("update", REFUSED, ids=lambda f: f.__name__)
def test_refusal_names_the_reason(update: Any) -> None:
    rule = Rule(update, None, (), ("lr",), (), False)
    for _ in range(2):  # the second answer is remembered
        with pytest.raises(Untranslatable, match=REFUSED[update]):
            cpu.compiled(rule, Variant())


def test_infinite_and_typed_constants() -> None:
    rule = Rule(_constants, None, (), ("lr",), (), False)
    p = Parameter(torch.tensor([1.0, 2.0]))
    optimizer: Any = hybridopt.optim.from_rule(_constants, defaults={"lr": 0.5})([p])
    step(optimizer)
    step(optimizer)
    assert rule.coefficients == ("lr",)
    assert optimizer._used == "fused (llvm)"
    assert p.tolist() == [0.0, 1.0]


INFINITY = float("inf")


def _constants(p: Any, g: Any, lr: Any) -> tuple[Any, ...]:
    return (xp.minimum(p - lr * g * 1, INFINITY),)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_of_the_language_means_what_torch_does(dtype: torch.dtype) -> None:
    """Also for nan, infinities and zeros."""
    inf, nan = float("inf"), float("nan")
    values = [-inf, -2.0, -1.0, -0.5, -0.0, 0.0, 0.3, 1.0, 5.0, inf, nan]
    weights = torch.tensor(values, dtype=dtype).repeat_interleave(len(values))
    gradients = torch.tensor(values, dtype=dtype).repeat(len(values))
    results = []
    for implementation in ("fused", "reference"):
        p = Parameter(weights.clone())
        optimizer: Any = hybridopt.optim.from_rule(
            _everything, defaults={"lr": 0.7, "up": True}, scalars=_numbers
        )([p], implementation=implementation)
        for _ in range(2):
            p.grad = gradients.clone()
            optimizer.step()
        results.append(p.detach())
        assert (optimizer._used == "fused (llvm)") == (implementation == "fused")
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert results[0].isfinite().sum() > 20


NEGATIVE = -2.0


def _everything(p: Any, g: Any, lr: Any, other: Any, *, up: bool) -> tuple[Any, ...]:
    a, b = xp.exp(-xp.abs(p)), g
    c = xp.log(xp.maximum(xp.fma(p, p, p * 0 + 1), a)) ** 1.5
    c += (b > 0) * 2 - (p <= b) / 4
    d = xp.where((p > -1) & ~(p >= 1) ^ (g == 0), xp.sqrt(xp.abs(b)), -c)
    d = xp.where(p != 1, d, 3)
    d = xp.where(xp.where(g > 0, p > 1, p < 0) & (g < 1), p % 3 + p % -0.7, d)
    e = xp.where(p < 0.5, xp.sign(g), xp.minimum(+p, g))
    told = d * lr + e - xp.where(p == 0, g * 0 + other, p) / 7
    return (xp.where(g != g, lr, told * (1 - 2 * up)),)


def _numbers(step: float, lr: float) -> tuple[float, float]:
    first = xp.where(2 < step < 3, lr, 1 - lr**step)
    return first, (NEGATIVE**step + step % 3) * xp.maximum(1, xp.minimum(step, 1.5)) * xp.sqrt(
        xp.exp(xp.log(step))
    )


@pytest.mark.parametrize("start", [2**31 + 5, 2**33 + 3])
def test_elements_beyond_32_bits(start: int) -> None:
    """By arithmetic: addresses begin so far ahead that element `start` is the first there is."""
    params = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
    params[1].data.copy_(params[0].data)
    optimizers = [hybridopt.optim.Adam([p], lr=0.1) for p in params]
    for k in range(3):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.full((5,), 1.0 + k)
            optimizer.step()
    plan: Any = optimizers[0]._plans[0]
    for column in range(2, len(plan.table)):
        plan.table[column] -= 4 * start
    plan.gradients[0] -= 4 * start
    plan.pieces = array("q", [0, start, 5])
    plan.step(plan._block(1).buffer_info()[0])
    cpu.together("run", plan._block(2), 1)
    optimizers[1].step()
    assert torch.equal(*params)


@pytest.mark.parametrize("start", [0, 2**31 + 5, 2**33 + 3])
def test_noise_of_elements_beyond_32_bits(start: int) -> None:
    """It goes by all bits of the place."""
    p = torch.nn.Parameter(torch.linspace(1, 2, 64).bfloat16())
    optimizer = hybridopt.optim.SGD([p], lr=2**-12, stochastic_rounding=True, seed=7)
    for _ in range(2):
        p.grad = torch.linspace(1, 3, 64).bfloat16()
        optimizer.step()
    plan: Any = optimizer._plans[0]
    before = p.detach().float()
    assert p.grad is not None
    exact = before - 2**-12 * p.grad.float()
    plan.table[2] -= 2 * start
    plan.gradients[0] -= 2 * start
    plan.pieces = array("q", [0, start, 64])
    plan.step(plan._block(1).buffer_info()[0])
    cpu.together("run", plan._block(2), 1)
    key = _noise.key(7, 3, 0, 0)
    assert torch.equal(p.detach(), _noise.rounded(exact, torch.bfloat16, key, start + torch.arange(64)))
