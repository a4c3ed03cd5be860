"""A rule as the source text of a numba module: flags folded in, literals typed, `xp` replaced by plain functions."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hybridopt.rules import Rule

_TYPES = {"float32": ("f32", "np.float32"), "float64": ("f64", "np.float64")}
_HELPERS = ("sqrt", "exp", "log", "abs", "sign", "where", "maximum", "minimum", "fma", "stored")


class Untranslatable(Exception):
    """A rule uses something that the compiled engine cannot express."""


def module_source(rule: Rule, flags: Mapping[str, bool], dtype: str, scalar_dtype: str) -> str:
    """The generated module: `run(block)`, `block` being the address of nine int64.

    They are: how many tensors; the addresses of the table (a row for each tensor: elements, per-tensor numbers, weight,
    states), of the gradients' addresses, of the hyperparameters, and of room for coefficients; what to do (0 all,
    1 only the coefficients, 2 only the pieces `low` to `high`); the address of the pieces (tensor, start, count);
    low; high.
    """
    kind, number = _TYPES[dtype]
    size = 8 if dtype == "float64" else 4
    scalar_kind, scalar_number = _TYPES[scalar_dtype]
    active = rule.active(dict(flags))
    update = _function(rule.update, "_update", dict(flags), typed=dtype == "float32")
    if rule.scalars is None:
        names = ", ".join(f"h{i}" for i in range(len(rule.hyper)))
        returned = f"{names}," if names else "()"
        scalars = ["@njit(**INNER)", f"def _scalars(step, {names}):", f"    return {returned}"]
    else:
        scalars = _function(rule.scalars, "_scalars", {}, typed=False)
    coefficients = rule.coefficients
    counts, extra, states = int(rule.counts), len(rule.scalar_state), len(active)
    first = 2 + counts + extra  # columns: numel, [step], scalar states, p, states
    scalar_arguments = [
        "step",
        *(f"e{i}" for i in range(extra)),
        *(f"hyper[{i}]" for i in range(len(rule.hyper))),
    ]
    outs = [*(f"c{i}" for i in range(len(coefficients))), *(f"e{i}" for i in range(extra))]
    inputs = ", ".join(f"s{active.index(s.name)}[i]" if s.name in active else "ZERO" for s in rule.state)
    results = ", ".join(f"r{active.index(s.name)}" if s.name in active else "_" for s in rule.state)
    arrays = ", ".join(f"s{i}" for i in range(states))
    cs = ", ".join(f"c{i}" for i in range(len(coefficients)))
    lines = [
        '"""Generated from a rule; safe to delete."""',
        "import math",
        "import numpy as np",
        "from numba import carray, njit",
        "from hybridopt.engines._intrinsics import fma as _fma, pointer_f32, pointer_f64, pointer_i64",
        "OPTIONS = dict(nogil=True, error_model='numpy', no_cfunc_wrapper=True)",
        "INNER = dict(OPTIONS, no_cpython_wrapper=True)  # called by `run` alone; wrappers would cost 0.2 s",
        f"ZERO = {number}(0)",
        "@njit(**INNER)",
        "def _stored(x):",
        f"    return np.float64({scalar_number}(x))",
        _HELPER_SOURCE,
        *update,
        *scalars,
        "@njit(**INNER)",
        f"def _inner(p, g, {arrays + ', ' if arrays else ''}{cs}):",
        "    for i in range(p.shape[0]):",
        f"        q, {results + ',' if results else ''} = _update(p[i], g[i], {inputs + ', ' if inputs else ''}{cs})"
        if rule.state
        else f"        (q,) = _update(p[i], g[i], {cs})",
        "        p[i] = q",
        *(f"        s{i}[i] = r{i}" for i in range(states)),
        "@njit(**INNER)",
        "def _begin(row, hyper, out):",
    ]
    if rule.counts:
        lines += [
            f"    steps = carray(pointer_{scalar_kind}(row[1]), (1,))",
            "    steps[0] += 1",
            "    step = np.float64(steps[0])",
        ]
    else:
        lines.append("    step = 0.0")
    for i in range(extra):
        lines += [
            f"    x{i} = carray(pointer_{scalar_kind}(row[{1 + counts + i}]), (1,))",
            f"    e{i} = np.float64(x{i}[0])",
        ]
    lines.append(
        f"    {', '.join(outs)}{',' if len(outs) == 1 else ''} = _scalars({', '.join(scalar_arguments)})"
    )
    lines += [f"    out[{i}] = c{i}" for i in range(len(coefficients))]
    lines += [f"    x{i}[0] = e{i}" for i in range(extra)]
    lines += [
        "@njit(**INNER)",
        "def _apply(row, gradient, start, count, c):",
        f"    g = carray(pointer_{kind}(gradient + start * {size}), (count,))",
        *(
            f"    {name} = carray(pointer_{kind}(row[{first - 1 + i}] + start * {size}), (count,))"
            for i, name in enumerate(["p", *(f"s{j}" for j in range(states))])
        ),
        f"    _inner(p, g, {arrays + ', ' if arrays else ''}"
        + ", ".join(f"{number}(c[{i}])" for i in range(len(coefficients)))
        + ")",
        "@njit(**INNER)",
        "def _tables(block_address):",
        "    block = carray(pointer_i64(block_address), (5,))",
        "    n = block[0]",
        f"    table = carray(pointer_i64(block[1]), (n, {first + states}))",
        "    gradients = carray(pointer_i64(block[2]), (n,))",
        f"    hyper = carray(pointer_f64(block[3]), ({max(len(rule.hyper), 1)},))",
        f"    c = carray(pointer_f64(block[4]), (n, {len(coefficients)}))",
        "    return n, table, gradients, hyper, c",
        "@njit('void(int64)', cache=True, **OPTIONS)",  # one entry: what numba takes long for is paid per entry
        "def run(block_address):",
        "    n, table, g, hyper, c = _tables(block_address)",
        "    block = carray(pointer_i64(block_address), (9,))",
        "    work, low, high = block[5], block[7], block[8]",
        "    if work != 2:",
        "        for t in range(n):",
        "            _begin(table[t], hyper, c[t])",
        "    if work == 0:",
        "        low, high = 0, n",
        "    if work != 1:",
        "        chunks = carray(pointer_i64(block[6]), (high, 3))",
        "        for k in range(low, high):",
        "            if work == 0:",
        "                t, start, count = k, 0, table[k, 0]",
        "            else:",
        "                t, start, count = chunks[k, 0], chunks[k, 1], chunks[k, 2]",
        "            _apply(table[t], g[t], start, count, c[t])",
    ]
    return "\n".join(lines) + "\n"


_HELPER_SOURCE = """
_sqrt = math.sqrt
_exp = math.exp
_log = math.log
_abs = abs
@njit(**INNER)
def _where(c, a, b):
    return a if c else b
@njit(**INNER)
def _maximum(a, b):
    return a if (a > b) | (a != a) else b
@njit(**INNER)
def _minimum(a, b):
    return a if (a < b) | (a != a) else b
@njit(**INNER)
def _sign(a):
    return type(a)(a > 0) - type(a)(a < 0)
"""


def digest(source: str) -> str:
    """The key of the disk cache: the generated text, the pointer helpers, and the versions of the compiler."""
    pointers = Path(__file__).with_name("_intrinsics.py").read_text()
    text = "\n".join([source, pointers, version("numba"), version("llvmlite"), version("numpy")])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _function(function: Callable[..., Any], name: str, flags: Mapping[str, bool], typed: bool) -> list[str]:
    """A rule's function as njit source: flags folded, numbers as typed constants, `xp.f` as `_f`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise Untranslatable(f"its source cannot be read ({error})") from error
    if not (tree.body and isinstance(tree.body[0], ast.FunctionDef)):
        raise Untranslatable("it is not a plain `def` function")
    definition = tree.body[0]
    definition.decorator_list = []
    definition.name = name
    definition.returns = None
    definition.args.kwonlyargs, definition.args.kw_defaults = [], []
    known = {a.arg for a in definition.args.args}
    for argument in definition.args.args:
        argument.annotation = None
    if (
        definition.body
        and isinstance(definition.body[0], ast.Expr)
        and isinstance(definition.body[0].value, ast.Constant)
    ):
        definition.body = definition.body[1:]  # a docstring
    folder = _Folder(flags, function.__globals__, known, typed)
    definition = folder.visit(definition)
    constants = [f"{key} = np.float32({str(value)!r})" for key, value in folder.constants.items()]
    return [*constants, "@njit(**INNER)", ast.unparse(ast.fix_missing_locations(definition))]


class _Folder(ast.NodeTransformer):
    def __init__(
        self, flags: Mapping[str, bool], module: Mapping[str, Any], known: set[str], typed: bool
    ) -> None:
        self.flags = flags
        self.module = module
        self.known = known
        self.typed = typed
        self.constants: dict[str, float] = {}

    def visit_If(self, node: ast.If) -> Any:
        test = self.visit(node.test)
        if isinstance(test, ast.Constant):
            kept = node.body if test.value else node.orelse
            result: list[ast.stmt] = []
            for statement in kept:
                out = self.visit(statement)
                result.extend(out if isinstance(out, list) else [out])
            return result
        raise Untranslatable("`if` on a value; use xp.where (an `if` may only test flags)")

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        test = self.visit(node.test)
        if isinstance(test, ast.Constant):
            return self.visit(node.body if test.value else node.orelse)
        raise Untranslatable("`... if ... else ...` on a value; use xp.where (an `if` may only test flags)")

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        values = [self.visit(v) for v in node.values]
        if all(isinstance(v, ast.Constant) for v in values):
            decide = all if isinstance(node.op, ast.And) else any
            return ast.Constant(decide(v.value for v in values))
        raise Untranslatable("`and`/`or` on values; combine with & and | on comparisons")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        operand = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            if isinstance(operand, ast.Constant):
                return ast.Constant(not operand.value)
            raise Untranslatable("`not` on a value")
        return ast.UnaryOp(node.op, operand)

    def visit_Assign(self, node: ast.Assign) -> Any:
        for target in node.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.known.add(name.id)
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == "xp" and node.attr in _HELPERS:
            return ast.Name(f"_{node.attr}", ast.Load())
        raise Untranslatable(f"`{ast.unparse(node)}`; a rule may use xp.{', xp.'.join(_HELPERS)}")

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.flags:
            return ast.Constant(self.flags[node.id])
        if node.id in self.known:
            return node
        value = self.module.get(node.id)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._number(value)
        raise Untranslatable(f"the name {node.id!r}; a rule may use its arguments, numbers and xp")

    def visit_Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return self._number(node.value)
        raise Untranslatable(f"the constant {node.value!r}")

    def visit_Call(self, node: ast.Call) -> Any:
        function = self.visit_Attribute(node.func) if isinstance(node.func, ast.Attribute) else None
        if function is None:
            raise Untranslatable(
                f"a call of `{ast.unparse(node.func)}`; a rule may call xp.{', xp.'.join(_HELPERS)}"
            )
        return ast.Call(function, [self.visit(a) for a in node.args], [])

    def _number(self, value: float) -> ast.expr:
        if not self.typed:
            return ast.Constant(float(value))  # unparsed as 1e309 if infinite
        for name, known in self.constants.items():
            if known == value:
                return ast.Name(name, ast.Load())
        name = f"_K{len(self.constants)}"
        self.constants[name] = float(value)
        return ast.Name(name, ast.Load())
