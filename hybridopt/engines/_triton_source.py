"""A variant of a rule as the source text of a Triton module: two kernels over a table of addresses.

`begin` (one program a tensor) counts the step and computes the coefficients, in float64, from numbers that live on the
device; `apply` (one program a block of elements) does the update. Nothing of a step is a host number, so a step can be
recorded in a CUDA graph, and left out without anybody waiting for the device (`skip`).
"""

from __future__ import annotations

from hybridopt.engines._noise import EXPONENTS, FIRST, GOLDEN, INFINITE, LARGEST, NORMAL, SECOND
from hybridopt.engines._translate import translate
from hybridopt.engines._variant import SIZES, Variant, width
from hybridopt.rules import Rule

_TYPES = {
    "float32": "tl.float32",
    "float64": "tl.float64",
    "bfloat16": "tl.bfloat16",
    "float16": "tl.float16",
}


def module_source(rule: Rule, variant: Variant, interpreted: bool) -> str:
    """The generated module: kernels `begin` and `apply`, tables as in `_cpu_code.RuleCode`."""
    conversion = _INTERPRETED if interpreted else _NATIVE
    return "\n".join(
        [
            *_helpers(variant, conversion),
            *_rule(rule, variant),
            *_begin(rule, variant),
            *_apply(rule, variant),
            "",
        ]
    )


def squares_source(dtype: str) -> str:
    """A module with the kernel `squares`: the sum of squared gradients of each block, in float64."""
    return f'''"""Generated; safe to delete."""
import triton
import triton.language as tl
@triton.jit
def squares(table, width, gradients, chunks, out, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    t = tl.load(chunks + 2 * k).to(tl.int64)
    start = tl.load(chunks + 2 * k + 1).to(tl.int64) * BLOCK
    count = tl.load(table + t * width)
    g = tl.load(gradients + t).to(tl.pointer_type({_TYPES[dtype]}))
    i = start + tl.arange(0, BLOCK)
    x = tl.load(g + i, mask=i < count, other=0.0).to(tl.float64)
    tl.store(out + k, tl.sum(x * x, axis=0))
'''


def _helpers(variant: Variant, conversion: str) -> list[str]:
    single = variant.compute == "float32"
    return [
        '"""Generated from a rule; safe to delete."""',
        "import triton",
        "import triton.language as tl",
        _functions(
            "_", "tl.sqrt_rn(x)" if single else "tl.sqrt(x)", "tl.div_rn(a, b)" if single else "a / b"
        ),
        _functions("_wide_", "tl.sqrt(x)", "a / b"),
        "@triton.jit",
        "def _wide_stored(x):",
        f"    return x.to({_TYPES[variant.number]}).to(tl.float64)",
        "@triton.jit",
        "def _wide_default(x):",
        f"    return x.to({_TYPES[variant.scalar]}).to(tl.float64)",
        conversion,
        _STOCHASTIC if variant.stochastic else "",
    ]


def _functions(prefix: str, sqrt: str, divide: str) -> str:
    """What `xp` and the operators mean; torch's maximum and minimum hand nan on."""
    return f"""
@triton.jit
def {prefix}sqrt(x):
    return {sqrt}
@triton.jit
def {prefix}div(a, b):
    return {divide}
@triton.jit
def {prefix}pow(a, b):
    size = tl.exp(b * tl.log(tl.abs(a + 0.0 * b)))
    half = (0.0 * a + b) * 0.5
    below = tl.where(half == tl.floor(half), size, tl.where(half * 2 == tl.floor(half * 2), -size, float("nan")))
    return tl.where(half == 0, 1.0, tl.where(a < 0, below, size))
@triton.jit
def {prefix}exp(x):
    return tl.exp(x)
@triton.jit
def {prefix}log(x):
    return tl.log(x)
@triton.jit
def {prefix}abs(x):
    return tl.abs(x)
@triton.jit
def {prefix}where(c, a, b):
    return tl.where(c, a, b)
@triton.jit
def {prefix}maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
@triton.jit
def {prefix}minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
@triton.jit
def {prefix}sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)
@triton.jit
def {prefix}fma(a, b, c):
    return tl.fma(a, b, c)
"""


_NATIVE = """
@triton.jit
def _bfloat16(x):
    return x.to(tl.bfloat16)
"""

# Triton's interpreter cuts where the device rounds to nearest
_INTERPRETED = """
@triton.jit
def _bfloat16(x):
    x = x.to(tl.float32)
    bits = x.to(tl.uint32, bitcast=True)
    up = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, up, x).to(tl.bfloat16)
"""

_STOCHASTIC = f"""
@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * {FIRST}
    x = (x ^ (x >> 15)) * {SECOND}
    return x ^ (x >> 16)
@triton.jit
def _stream(seed, step, tensor):
    a = _mix(seed.to(tl.int64).to(tl.uint32)) + step.to(tl.int64).to(tl.uint32)
    return _mix(_mix(a) + tensor.to(tl.uint32))
@triton.jit
def _place(i):
    return _mix((i & 0xFFFFFFFF).to(tl.uint32)) ^ ((i >> 32).to(tl.uint32) * {GOLDEN})
@triton.jit
def _noise(place, stream, column):
    return _mix(place ^ _mix(stream + column)) & 0xFFFF
@triton.jit
def _bfloat16_at_random(x, noise):
    bits = x.to(tl.uint32, bitcast=True)
    up = ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return _bfloat16(tl.where((bits & 0x7F800000) == 0x7F800000, x, up))
@triton.jit
def _float16_at_random(x, noise):
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    high = tl.minimum((size - {EXPONENTS} + (noise >> 3)) >> 13, {LARGEST})
    low = ((tl.abs(x) * {2.0**40}).to(tl.int32).to(tl.uint32) + noise) >> 16
    up = tl.where(size < {NORMAL}, low, high) | ((bits >> 16) & 0x8000)
    return tl.where(size < {INFINITE}, up.to(tl.uint16).to(tl.float16, bitcast=True), x.to(tl.float16))
"""


def _rule(rule: Rule, variant: Variant) -> list[str]:
    decorator = "@triton.jit"
    update = translate(rule.update, "_update", dict(variant.flags), decorator, calls=True)
    if rule.scalars is not None:
        return [*update, *translate(rule.scalars, "_scalars", {}, decorator, calls=True, prefix="_wide_")]
    return update


def _columns(rule: Rule, variant: Variant) -> tuple[int, int, int]:
    """(whether a step is counted, per-tensor numbers besides it, columns of a table row)."""
    counts, extra = int(rule.counts or variant.stochastic), len(rule.scalar_state)
    arrays = 1 + len(variant.states) + int(variant.kahan)
    return counts, extra, 1 + counts + extra + arrays + int(variant.stochastic)


def _begin(rule: Rule, variant: Variant) -> list[str]:
    counts, extra, columns = _columns(rule, variant)
    scalar, number, n, hypers, extras = (
        _TYPES[variant.scalar],
        _TYPES[variant.number],
        len(rule.coefficients),
        len(rule.hyper),
        len(variant.extras),
    )
    lines = [
        "@triton.jit",
        "def begin(table, hyper, numbers, skip):",
        "    if tl.load(skip) == 0:",
        "        t = tl.program_id(0).to(tl.int64)",
        f"        row = table + t * {columns}",
        f"        out = numbers + t * {width(rule, variant)}",
    ]
    if counts:
        lines += [
            f"        steps = tl.load(row + 1).to(tl.pointer_type({scalar}))",
            "        counted = tl.load(steps) + 1",
            "        tl.store(steps, counted)",
            "        step = counted.to(tl.float64)",
        ]
    else:
        lines.append("        step = tl.load(hyper) * 0")
    for i in range(extra):
        lines += [
            f"        x{i} = tl.load(row + {1 + counts + i}).to(tl.pointer_type({number}))",
            f"        e{i} = tl.load(x{i}).to(tl.float64)",
        ]
    given = [*(f"e{i}" for i in range(extra)), *(f"tl.load(hyper + {i})" for i in range(hypers))]
    outs = [*(f"c{i}" for i in range(n)), *(f"f{i}" for i in range(extra))]
    if rule.scalars is None:
        lines += [f"        {out} = {value}" for out, value in zip(outs, given, strict=True)]
    elif len(outs) == 1:
        lines.append(f"        ({outs[0]},) = _scalars({', '.join(['step', *given])})")
    else:
        lines.append(f"        {', '.join(outs)} = _scalars({', '.join(['step', *given])})")
    lines += [f"        tl.store(out + {i}, c{i})" for i in range(n)]
    lines += [f"        tl.store(out + {n + i}, tl.load(hyper + {hypers + i}))" for i in range(extras)]
    if variant.stochastic:
        lines += [
            f"        stream = _stream(tl.load(hyper + {hypers + extras}), step, tl.load(row + {columns - 1}))",
            f"        tl.store(out + {n + extras}, stream.to(tl.float64))",
        ]
    return [*lines, *(f"        tl.store(x{i}, f{i})" for i in range(extra))]


def _apply(rule: Rule, variant: Variant) -> list[str]:
    counts, extra, columns = _columns(rule, variant)
    first = 1 + counts + extra
    names = ["p", *(f"s{i}" for i in range(len(variant.states))), *(["k"] if variant.kahan else [])]
    dtypes = [variant.weight, *variant.states, *([variant.weight] if variant.kahan else [])]
    compute, n = _TYPES[variant.compute], len(rule.coefficients)
    coefficients = [*(f"c{i}" for i in range(n)), *variant.extras]
    lines = [
        "@triton.jit",
        "def apply(table, gradients, chunks, numbers, skip, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):",
        "    if tl.load(skip) == 0:",
        "        k = tl.program_id(0).to(tl.int64)",
        "        t = tl.load(chunks + 2 * k).to(tl.int64)",
        "        start = tl.load(chunks + 2 * k + 1).to(tl.int64) * BLOCK",
        f"        row = table + t * {columns}",
        "        count = tl.load(row)",
        f"        g = tl.load(gradients + t).to(tl.pointer_type({_TYPES[variant.gradient]}))",
        *(
            f"        {name} = tl.load(row + {first + i}).to(tl.pointer_type({_TYPES[dtype]}))"
            for i, (name, dtype) in enumerate(zip(names, dtypes, strict=True))
        ),
        "        if ALIGNED:",  # what makes loads and stores 16 bytes wide, where no mask is needed either
        *(f"            {name} = tl.multiple_of({name}, 16)" for name in ["g", *names]),
        f"        c = numbers + t * {width(rule, variant)}",
        *(f"        {name} = tl.load(c + {i}).to({compute})" for i, name in enumerate(coefficients)),
        *(
            [f"        stream = tl.load(c + {width(rule, variant) - 1}).to(tl.int64).to(tl.uint32)"]
            if variant.stochastic
            else []
        ),
        "        i = start + tl.arange(0, BLOCK)",
        "        if start + BLOCK <= count:",
        *_body(rule, variant, ""),
        "        else:",
        *_body(rule, variant, ", mask=i < count"),
    ]
    return lines


def _body(rule: Rule, variant: Variant, mask: str) -> list[str]:
    compute, active = _TYPES[variant.compute], rule.active(dict(variant.flags))

    def load(name: str) -> str:
        return f"tl.load({name} + i{mask}).to({compute})"

    lines = [f"x = {load('p')}"]
    if variant.kahan:
        lines.append(f"x = x + {load('k')}")
    lines.append(f"d = {load('g')}")
    if variant.unscaled:
        lines += ["d = _div(d, divisor)", f"tl.store(g + i, {_nearest('d', variant.gradient)}{mask})"]
    if variant.scaled:
        lines.append("d = d * factor")
    inputs = [load(f"s{active.index(s.name)}") if s.name in active else "0.0" for s in rule.state]
    results = [f"r{active.index(s.name)}" if s.name in active else f"z{i}" for i, s in enumerate(rule.state)]
    called = ", ".join(["x", "d", *inputs, *(f"c{i}" for i in range(len(rule.coefficients)))])
    lines.append(f"{', '.join(['q', *results]) if results else '(q,)'} = _update({called})")
    if variant.stochastic:
        lines.append("place = _place(i)")
    lines += [f"b = {_kept('q', variant.weight, 0, variant)}", f"tl.store(p + i, b{mask})"]
    if variant.kahan:
        lines += [f"lost = q - b.to({compute})", "lost = tl.where(lost - lost == 0, lost, 0.0)"]
        lines.append(f"tl.store(k + i, {_nearest('lost', variant.weight)}{mask})")
    for i, dtype in enumerate(variant.states):
        lines.append(f"tl.store(s{i} + i, {_kept(f'r{i}', dtype, i + 1, variant)}{mask})")
    return [" " * 12 + line for line in lines]


def _kept(expression: str, dtype: str, column: int, variant: Variant) -> str:
    if SIZES[dtype] == 2 and variant.stochastic and not (variant.kahan and column == 0):
        return f"_{dtype}_at_random({expression}.to(tl.float32), _noise(place, stream, {column}))"
    return _nearest(expression, dtype)


def _nearest(expression: str, dtype: str) -> str:
    return f"_bfloat16({expression})" if dtype == "bfloat16" else f"{expression}.to({_TYPES[dtype]})"
