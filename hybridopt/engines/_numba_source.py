"""A variant of a rule as the source text of a numba module: one loop over all tensors of a table of addresses."""

from __future__ import annotations

from hybridopt.engines._noise import FIRST, GOLDEN, SECOND
from hybridopt.engines._translate import translate
from hybridopt.engines._variant import SIZES, Variant, width
from hybridopt.rules import Rule

_POINTERS = {"float32": "f32", "float64": "f64", "bfloat16": "u16", "float16": "u16"}
_NUMBERS = {"float32": "np.float32", "float64": "np.float64"}


def module_source(rule: Rule, variant: Variant) -> str:
    """The generated module: `run(block)`, `block` being the address of nine int64.

    They are: the next piece; how many pieces; the address of the pieces (tensor, start, count); what to do (0 all,
    1 only the coefficients, 2 only pieces, until none is left: any number of threads may do so with the same block);
    how many tensors; the addresses of the table, of the gradients' addresses, of the numbers (the rule's
    hyperparameters, `Variant.extras`, and under `stochastic` the seed; float64), and of room for `width` float64 a
    tensor. A row of the table: elements, addresses of the per-tensor numbers, of the
    weight, of the states, under `kahan` of `kahan_comp`, and under `stochastic` the tensor's number.
    """
    return "\n".join(
        [*_helpers(variant), *_rule(rule, variant), *_inner(rule, variant), *_driver(rule, variant)]
    )


def squares_source(dtype: str) -> str:
    """A module that sums squares: `run(block)`, `block` being the address of five int64.

    They are: the next piece; how many pieces; the addresses of the pieces (tensor, start, count), of the gradients'
    addresses, and of as many float64 as pieces for the results. Eight running sums, so that the processor need not wait
    for each addition.
    """
    load = f"_from_{dtype}(g[i + {{j}}])" if dtype in ("bfloat16", "float16") else "g[i + {j}]"
    sums = [f"            a{j} += np.float64({load.format(j=j)}) ** 2" for j in range(8)]
    return "\n".join(
        [
            *_imports(),
            "@njit(**INNER)",
            "def _sum(g):",
            f"    {', '.join(f'a{j}' for j in range(8))} = {', '.join(['0.0'] * 8)}",
            "    n = g.shape[0] // 8 * 8",
            "    for i in range(0, n, 8):",
            *(line[4:] for line in sums),
            "    for i in range(n, g.shape[0]):",
            f"        a0 += np.float64({load.format(j=0)}) ** 2",
            "    return ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))",
            "@njit('void(int64)', cache=True, **OPTIONS)",
            "def run(block_address):",
            "    block = carray(pointer_i64(block_address), (5,))",
            "    n = block[1]",
            "    pieces = carray(pointer_i64(block[2]), (n, 3))",
            "    gradients = carray(pointer_i64(block[3]), (n,))",
            "    out = carray(pointer_f64(block[4]), (n,))",
            "    k = claim(block_address)",
            "    while k < n:",
            f"        address = gradients[pieces[k, 0]] + pieces[k, 1] * {SIZES[dtype]}",
            f"        out[k] = _sum(carray(pointer_{_POINTERS[dtype]}(address), (pieces[k, 2],)))",
            "        k = claim(block_address)",
            "",
        ]
    )


def watch_source() -> str:
    """A module that compares what is there with what is known of it: `look(tensors, gradients)`, `same(block)`.

    `look` takes the addresses of two blocks of 22 int64: how many tensors; the addresses of a Python list of them, of
    their data's addresses, and of their layouts (how many dimensions, sizes, strides; -1 = any will do); room for an
    answer; torch's functions that tell a tensor's data, dimensions, sizes, strides, and dtype, layout, kind and number
    of the device; what the last four should say; the two types that an object may have; and of gradients the address of
    torch's function that finds one (0: the tensors themselves are meant), the place and the value of its dispatch keys.
    Returns -1 if anything differs, but for gradients with other data, which are put down and counted.

    `same` takes the address of a block of int64: how many lists; of each its address, its length and its items; how
    many dicts; of each its address and its version. Returns 1 if all are so.

    A list's items stand 24 bytes behind its address, an object's type 8, the size of a list 16, its `at::Tensor` 16, a
    dict's version 24 (CPython; the caller makes sure).
    """
    return "\n".join([*_imports(), _WATCH])


def _imports() -> list[str]:
    return [
        '"""Generated; safe to delete."""',
        "import math",
        "import numpy as np",
        "from numba import carray, njit",
        "from hybridopt.engines._intrinsics import bfloat16_bits, fma as _fma, float16_bits, float32_bits",
        "from hybridopt.engines._intrinsics import from_bfloat16 as _from_bfloat16, from_float16 as _from_float16",
        "from hybridopt.engines._intrinsics import ask_tensor, claim, gradient_of",
        "from hybridopt.engines._intrinsics import pointer_f32, pointer_f64, pointer_i64, pointer_u16",
        "OPTIONS = dict(nogil=True, error_model='numpy')",
        "INNER = dict(OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # wrappers would cost 0.2 s",
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


def _driver(rule: Rule, variant: Variant) -> list[str]:
    """From the block of addresses to the loops."""
    active = rule.active(dict(variant.flags))
    counts, extra, n = int(rule.counts or variant.stochastic), len(rule.scalar_state), len(rule.coefficients)
    first = 1 + counts + extra  # column of the weight
    arrays = ["p", *(f"s{i}" for i in range(len(active))), *(["k"] if variant.kahan else [])]
    dtypes = [variant.weight, *variant.states, *([variant.weight] if variant.kahan else [])]
    columns = first + len(arrays) + int(variant.stochastic)
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
        stream = f"_stream(hyper[{hypers + len(extras)}], step, row[{columns - 1}])"
        lines.append(f"    out[{n + len(extras)}] = {stream}")
    lines += [f"    x{i}[0] = e{i}" for i in range(extra)]
    number = _NUMBERS[variant.compute]
    passed = [*arrays[:1], "g", *arrays[1:], *(f"{number}(c[{i}])" for i in range(n + len(extras)))]
    passed += ["start", f"np.uint32(c[{n + len(extras)}])"] if variant.stochastic else []
    lines += [
        "@njit(**INNER)",
        "def _apply(row, gradient, start, count, c):",
        f"    at = gradient + start * {SIZES[variant.gradient]}",
        f"    g = carray(pointer_{_POINTERS[variant.gradient]}(at), (count,))",
        *(
            f"    {name} = carray(pointer_{_POINTERS[dtype]}(row[{first + i}] + start * {SIZES[dtype]}), (count,))"
            for i, (name, dtype) in enumerate(zip(arrays, dtypes, strict=True))
        ),
        f"    _inner({', '.join(passed)})",
        *_follows(
            variant, [(first + i, SIZES[dtype]) for i, dtype in enumerate(dtypes)], width(rule, variant)
        ),
        "@njit(**INNER)",
        "def _tables(block_address):",
        "    block = carray(pointer_i64(block_address), (9,))",
        "    n = block[4]",
        f"    table = carray(pointer_i64(block[5]), (n, {columns}))",
        "    gradients = carray(pointer_i64(block[6]), (n,))",
        f"    hyper = carray(pointer_f64(block[7]), ({max(hypers + len(extras) + int(variant.stochastic), 1)},))",
        f"    c = carray(pointer_f64(block[8]), (n, {width(rule, variant)}))",
        "    return n, table, gradients, hyper, c",
        _RUN,
    ]
    return lines


def _follows(variant: Variant, columns: list[tuple[int, int]], numbers: int) -> list[str]:
    """Whether a tensor begins in memory where another ends, in all that is stepped, with the same coefficients."""
    conditions = [
        f"h == g + count * {SIZES[variant.gradient]}",
        *(f"b[{i}] == a[{i}] + count * {size}" for i, size in columns),
        *(f"d[{i}] == c[{i}]" for i in range(numbers)),
    ]
    # noise depends on the tensor
    told = "False" if variant.stochastic else " and ".join(conditions)
    return ["@njit(**INNER)", "def _follows(a, b, g, h, c, d, count):", f"    return {told}"]


# one entry: what numba takes long for is paid per entry
_RUN = """@njit('void(int64)', cache=True, **OPTIONS)
def run(block_address):
    n, table, g, hyper, c = _tables(block_address)
    block = carray(pointer_i64(block_address), (9,))
    work = block[3]
    if work != 2:
        for t in range(n):
            _begin(table[t], hyper, c[t])
    if work == 0:
        t = 0
        while t < n:
            count, last = table[t, 0], t + 1
            while last < n and _follows(table[t], table[last], g[t], g[last], c[t], c[last], count):
                count += table[last, 0]
                last += 1
            _apply(table[t], g[t], 0, count, c[t])
            t = last
    if work == 2:
        pieces = carray(pointer_i64(block[2]), (block[1], 3))
        k = claim(block_address)
        while k < block[1]:
            t = pieces[k, 0]
            _apply(table[t], g[t], pieces[k, 1], pieces[k, 2], c[t])
            k = claim(block_address)
"""

_WATCH = """
@njit(**INNER)
def _differ(address, known, first, count):
    there = carray(pointer_i64(address), (count,))
    for i in range(count):
        if there[i] != known[first + i]:
            return True
    return False
@njit(**INNER)
def _at(address):
    return carray(pointer_i64(address), (1,))[0]
@njit(**INNER)
def _look(block_address):
    block = carray(pointer_i64(block_address), (22,))
    n, answer = block[0], block_address + 32
    objects = carray(pointer_i64(_at(block[1] + 24)), (n,))
    data = carray(pointer_i64(block[2]), (n,))
    layouts = carray(pointer_i64(block[3]), (1,))
    at = moved = 0
    for k in range(n):
        kind = _at(objects[k] + 8)
        if kind != block[17] and kind != block[18]:
            return -1
        tensor, dims = objects[k] + 16, layouts[at]
        at += 1
        if block[19] != 0:
            tensor = gradient_of(block[19], _at(tensor))
            if _at(_at(tensor) + block[20]) != block[21]:
                return -1
        if dims >= 0:
            for i in range(4):
                if ask_tensor(block[9 + i], tensor, answer) != 0 or (block[4] & 0xFFFFFFFF) != block[13 + i]:
                    return -1
            if ask_tensor(block[6], tensor, answer) != 0 or block[4] != dims:
                return -1
            for i in range(2):
                if ask_tensor(block[7 + i], tensor, answer) != 0 or _differ(block[4], layouts, at, dims):
                    return -1
                at += dims
        if ask_tensor(block[5], tensor, answer) != 0:
            return -1
        if block[4] != data[k]:
            moved += 1
            if block[19] != 0:
                data[k] = block[4]
    return moved
@njit('int64(int64, int64)', cache=True, error_model='numpy', no_cfunc_wrapper=True)
def look(tensors, gradients):
    if _look(tensors) != 0:
        return -1
    return 0 if gradients == 0 else _look(gradients)
@njit('int64(int64)', cache=True, error_model='numpy', no_cfunc_wrapper=True)
def same(address):
    lists, at = _at(address), address + 8
    for k in range(lists):
        there, count = _at(at), _at(at + 8)
        if _at(there + 16) != count:
            return 0
        items = _at(there + 24)
        for i in range(count):
            if _at(items + 8 * i) != _at(at + 16 + 8 * i):
                return 0
        at += 16 + 8 * count
    dicts = _at(at)
    for k in range(dicts):
        if _at(_at(at + 8 + 16 * k) + 24) != _at(at + 16 + 16 * k):
            return 0
    return 1
"""

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
