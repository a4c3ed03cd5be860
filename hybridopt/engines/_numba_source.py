"""A variant of a rule as the source text of a numba module: one loop over all tensors of a table of addresses."""

from __future__ import annotations

from hybridopt.engines._noise import FIRST, GOLDEN, SECOND
from hybridopt.engines._translate import translate
from hybridopt.engines._variant import SIZES, Variant, width
from hybridopt.rules import Rule

_POINTERS = {"float32": "f32", "float64": "f64", "bfloat16": "u16", "float16": "u16"}
_NUMBERS = {"float32": "np.float32", "float64": "np.float64"}


def module_source(rule: Rule, variant: Variant) -> str:
    """The generated module: `run(row, gradient, start, count, numbers, out)`, all of them words.

    With count = -1 it writes a tensor's coefficients to `out` (`width` float64) from the `numbers` (the rule's
    hyperparameters, `Variant.extras`, and under `stochastic` the seed; float64); else it steps `count` elements from
    `start` on, by the coefficients there. `gradient` is an address. A row of the table: elements, addresses of the
    per-tensor numbers, of the weight, of the states, under `kahan` of `kahan_comp`, and under `stochastic` the tensor's
    number.
    """
    return "\n".join(
        [*_helpers(variant), *_rule(rule, variant), *_inner(rule, variant), *_entry(rule, variant)]
    )


def joins(rule: Rule, variant: Variant) -> list[int]:
    """What tells whether tensors can be stepped as one; see `STEPS` in `_driver.py`."""
    if variant.stochastic:  # noise depends on the tensor
        return [-1]
    first, dtypes = _columns(rule, variant)
    sizes = [number for i, dtype in enumerate(dtypes, first) for number in (i, SIZES[dtype])]
    return [len(dtypes), SIZES[variant.gradient], *sizes]


def squares_source(dtype: str) -> str:
    """A module that sums squares: `run(gradient, count, out)`, all of them words.

    Eight running sums, so that the processor need not wait for each addition.
    """
    load = f"_from_{dtype}(g[i + {{j}}])" if dtype in ("bfloat16", "float16") else "g[i + {j}]"
    sums = [f"            a{j} += np.float64({load.format(j=j)}) ** 2" for j in range(8)]
    return "\n".join(
        [
            *_imports(),
            "@njit('void(int64, int64, int64)', cache=True, **ENTRY)",
            "def run(address, count, out):",
            f"    g = carray(pointer_{_POINTERS[dtype]}(address), (count,))",
            f"    {', '.join(f'a{j}' for j in range(8))} = {', '.join(['0.0'] * 8)}",
            "    n = count // 8 * 8",
            "    for i in range(0, n, 8):",
            *(line[4:] for line in sums),
            "    for i in range(n, count):",
            f"        a0 += np.float64({load.format(j=0)}) ** 2",
            "    carray(pointer_f64(out), (1,))[0] = ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))",
            "",
        ]
    )


def _imports() -> list[str]:
    return [
        '"""Generated; safe to delete."""',
        "import math",
        "import numpy as np",
        "from numba import carray, njit",
        "from hybridopt.engines._intrinsics import bfloat16_bits, fma as _fma, float16_bits, float32_bits",
        "from hybridopt.engines._intrinsics import from_bfloat16 as _from_bfloat16, from_float16 as _from_float16",
        "from hybridopt.engines._intrinsics import pointer_f32, pointer_f64, pointer_i64, pointer_u16",
        "ENTRY = dict(nogil=True, error_model='numpy', no_cpython_wrapper=True)",
        "INNER = dict(ENTRY, no_cfunc_wrapper=True)  # wrappers would cost 0.2 s",
    ]


def _helpers(variant: Variant) -> list[str]:
    return [
        *_imports(),
        f"ZERO = {_NUMBERS[variant.compute]}(0)",
        "@njit(**INNER)",
        "def _stored(x):",
        f"    return np.float64({_NUMBERS[variant.number]}(x))",
        "@njit(**INNER)",
        "def _default(x):",
        f"    return np.float64({_NUMBERS[variant.scalar]}(x))",
        _HELPERS,
        _ROUNDING if {"bfloat16", "float16"} & {variant.weight, *variant.states} else "",
        _STOCHASTIC if variant.stochastic else "",
    ]


def _rule(rule: Rule, variant: Variant) -> list[str]:
    flags = dict(variant.flags)
    decorator = "@njit(**INNER)"
    typed = "np.float32" if variant.compute == "float32" else ""
    update = translate(rule.update, "_update", flags, decorator, number=typed)
    if rule.scalars is not None:
        return [*update, *translate(rule.scalars, "_scalars", {}, decorator)]
    names = ", ".join(f"h{i}" for i in range(len(rule.hyper)))
    return [
        *update,
        decorator,
        f"def _scalars(step, {names}):",
        f"    return {f'{names},' if names else '()'}",
    ]


def _inner(rule: Rule, variant: Variant) -> list[str]:
    """The loop over one tensor's elements, or a piece of them."""
    active = rule.active(dict(variant.flags))
    states = [f"s{i}" for i in range(len(active))]
    arguments = ["p", "g", *states, *(["k"] if variant.kahan else [])]
    arguments += [f"c{i}" for i in range(len(rule.coefficients))]
    arguments += [*variant.extras, *(["start", "stream"] if variant.stochastic else [])]
    inputs = [
        _loaded(f"{states[active.index(s.name)]}[i]", variant.states[active.index(s.name)], variant)
        if s.name in active
        else "ZERO"
        for s in rule.state
    ]
    results = [f"r{active.index(s.name)}" if s.name in active else "_" for s in rule.state]
    coefficients = [f"c{i}" for i in range(len(rule.coefficients))]
    gradient = _loaded("g[i]", variant.gradient, variant)
    lines = ["@njit(**INNER)", f"def _inner({', '.join(arguments)}):", "    for i in range(p.shape[0]):"]
    if variant.unscaled:
        lines += [
            f"        d = {gradient} / divisor",
            f"        g[i] = {_nearest('d', variant.gradient, variant)}",
        ]
        gradient = "d"
    if variant.scaled:
        gradient = f"{gradient} * factor"
    weight = _loaded("p[i]", variant.weight, variant)
    if variant.kahan:
        weight = f"{weight} + {_loaded('k[i]', variant.weight, variant)}"
    called = ", ".join([weight, gradient, *inputs, *coefficients])
    lines.append(f"        {', '.join(['q', *results])}{'' if results else ','} = _update({called})")
    if variant.stochastic:
        lines.append("        h = np.uint32(_mix(_low(start + i)) ^ _high(start + i))")
    lines.append(f"        b = {_kept('q', variant.weight, 0, variant)}")
    lines.append("        p[i] = b")
    if variant.kahan:
        lines.append(f"        lost = q - {_loaded('b', variant.weight, variant)}")
        lines.append(
            "        lost = lost if lost - lost == ZERO else ZERO  # an overflow is not to be made up for"
        )
        lines.append(f"        k[i] = {_nearest('lost', variant.weight, variant)}")
    for i, name in enumerate(states):
        lines.append(f"        {name}[i] = {_kept(f'r{i}', variant.states[i], i + 1, variant)}")
    return lines


def _loaded(expression: str, dtype: str, variant: Variant) -> str:
    if dtype in ("bfloat16", "float16"):
        expression = f"_from_{dtype}({expression})"
        return expression if variant.compute == "float32" else f"np.float64({expression})"
    return expression if dtype == variant.compute else f"{_NUMBERS[variant.compute]}({expression})"


def _nearest(expression: str, dtype: str, variant: Variant) -> str:
    if dtype in ("bfloat16", "float16"):
        return f"_to_{dtype}({expression if variant.compute == 'float32' else f'np.float32({expression})'})"
    return expression if dtype == variant.compute else f"{_NUMBERS[dtype]}({expression})"


def _kept(expression: str, dtype: str, column: int, variant: Variant) -> str:
    """As it is stored: rounded at random where that was asked for and the dtype is bfloat16."""
    if dtype == "bfloat16" and variant.stochastic and not (variant.kahan and column == 0):
        single = expression if variant.compute == "float32" else f"np.float32({expression})"
        return f"_at_random({single}, _mix(np.uint32(h ^ _mix(_sum(stream, {column})))))"
    return _nearest(expression, dtype, variant)


def _columns(rule: Rule, variant: Variant) -> tuple[int, list[str]]:
    """Of the addresses in a row of the table: the first one's place, and their dtypes."""
    dtypes = [variant.weight, *variant.states, *([variant.weight] if variant.kahan else [])]
    return 1 + int(rule.counts or variant.stochastic) + len(rule.scalar_state), dtypes


def columns(rule: Rule, variant: Variant) -> int:
    """Words in a row of the table."""
    first, dtypes = _columns(rule, variant)
    return first + len(dtypes) + int(variant.stochastic)


def _entry(rule: Rule, variant: Variant) -> list[str]:
    """From addresses to the coefficients and to the loop."""
    counts, extra, n = int(rule.counts or variant.stochastic), len(rule.scalar_state), len(rule.coefficients)
    first, dtypes = _columns(rule, variant)
    arrays = ["p", *(f"s{i}" for i in range(len(variant.states))), *(["k"] if variant.kahan else [])]
    hypers, extras = len(rule.hyper), variant.extras
    scalar, number = _POINTERS[variant.scalar], _POINTERS[variant.number]
    lines = ["@njit(**INNER)", "def _begin(row, hyper, out):"]
    if counts:
        lines += [f"    steps = carray(pointer_{scalar}(row[1]), (1,))", "    steps[0] += 1"]
    lines.append(f"    step = {'np.float64(steps[0])' if counts else '0.0'}")
    for i in range(extra):
        lines += [
            f"    x{i} = carray(pointer_{number}(row[{1 + counts + i}]), (1,))",
            f"    e{i} = np.float64(x{i}[0])",
        ]
    given = ["step", *(f"e{i}" for i in range(extra)), *(f"hyper[{i}]" for i in range(hypers))]
    outs = [*(f"c{i}" for i in range(n)), *(f"e{i}" for i in range(extra))]
    lines.append(f"    {', '.join(outs)}{',' if len(outs) == 1 else ''} = _scalars({', '.join(given)})")
    lines += [f"    out[{i}] = c{i}" for i in range(n)]
    lines += [f"    out[{n + i}] = hyper[{hypers + i}]" for i in range(len(extras))]
    if variant.stochastic:
        stream = f"_stream(hyper[{hypers + len(extras)}], step, row[{columns(rule, variant) - 1}])"
        lines.append(f"    out[{n + len(extras)}] = {stream}")
    lines += [f"    x{i}[0] = e{i}" for i in range(extra)]
    number = _NUMBERS[variant.compute]
    passed = [*arrays[:1], "g", *arrays[1:], *(f"{number}(c[{i}])" for i in range(n + len(extras)))]
    passed += ["start", f"np.uint32(c[{n + len(extras)}])"] if variant.stochastic else []
    numbers = max(hypers + len(extras) + int(variant.stochastic), 1)
    lines += [
        "@njit('void(int64, int64, int64, int64, int64, int64)', cache=True, **ENTRY)",
        "def run(at, gradient, start, count, numbers, out):",
        f"    row = carray(pointer_i64(at), ({columns(rule, variant)},))",
        f"    c = carray(pointer_f64(out), ({width(rule, variant)},))",
        "    if count < 0:",
        f"        _begin(row, carray(pointer_f64(numbers), ({numbers},)), c)",
        "        return",
        f"    at = gradient + start * {SIZES[variant.gradient]}",
        f"    g = carray(pointer_{_POINTERS[variant.gradient]}(at), (count,))",
        *(
            f"    {name} = carray(pointer_{_POINTERS[dtype]}(row[{first + i}] + start * {SIZES[dtype]}), (count,))"
            for i, (name, dtype) in enumerate(zip(arrays, dtypes, strict=True))
        ),
        f"    _inner({', '.join(passed)})",
        "",
    ]
    return lines


_HELPERS = """
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

# to nearest, ties to even; nan stays nan
_ROUNDING = """
@njit(**INNER)
def _to_bfloat16(x):
    bits = float32_bits(x)
    up = np.uint32(bits + 0x7FFF + ((bits >> 16) & 1))
    return bfloat16_bits(np.uint32(0x7FC00000) if x != x else up)
_to_float16 = float16_bits
"""

# numba widens sums of uint32 to 64 bits: every result is cut back
_STOCHASTIC = f"""
@njit(**INNER)
def _mix(x):
    x = np.uint32((x ^ (x >> 16)) * np.uint32({FIRST}))
    x = np.uint32((x ^ (x >> 15)) * np.uint32({SECOND}))
    return np.uint32(x ^ (x >> 16))
@njit(**INNER)
def _low(i):
    return np.uint32(i & 0xFFFFFFFF)
@njit(**INNER)
def _high(i):
    return np.uint32((i >> 32) * {GOLDEN})
@njit(**INNER)
def _sum(a, b):
    return np.uint32(a + b)
@njit(**INNER)
def _stream(seed, step, tensor):
    return _mix(_sum(_mix(_sum(_mix(np.uint32(seed)), np.int64(step))), tensor))
@njit(**INNER)
def _at_random(x, noise):
    bits = float32_bits(x)
    special = (bits & 0x7F800000) == 0x7F800000
    up = np.uint32(bits + (noise & 0xFFFF))
    return _to_bfloat16(x) if special else bfloat16_bits(up)
"""
