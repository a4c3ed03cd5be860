"""A variant of a rule as LLVM code: one loop over a tensor's elements, and what comes before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from hybridopt.engines import _noise
from hybridopt.engines._equation import DOUBLE, FLOATS, HALF, SINGLE, Equation, convert
from hybridopt.engines._translate import Untranslatable
from hybridopt.engines._variant import SIZES, Variant, columns, places, width
from hybridopt.engines._words import WORD
from hybridopt.rules import Rule

_SHORT, _INT, _VOID = ir.IntType(16), ir.IntType(32), ir.VoidType()
_MEMORY = {**FLOATS, "bfloat16": _SHORT, "float16": HALF}
_LANES = 8


class RuleCode:
    """The function `run(row, gradient, start, count, numbers, out)`, all of them words.

    With count = -1 it writes a tensor's coefficients to `out` (`width` float64) from the `numbers` (the rule's
    hyperparameters, `Variant.extras`, and under `stochastic` the seed; float64); else it steps `count` elements from
    `start` on, by the coefficients there. `gradient` is an address. A row of the table: elements, addresses of the
    per-tensor numbers, of the weight, of the states, under `kahan` of `kahan_comp`, and under `stochastic` the tensor's
    number.

    Raises:
        Untranslatable: the rule's source is not available, or uses what cannot be compiled.
    """

    def __init__(self, rule: Rule, variant: Variant) -> None:
        self.rule = rule
        self.variant = variant
        casts = {"stored": FLOATS[variant.number], "default": FLOATS[variant.scalar]}
        self.update = Equation(rule.update, dict(variant.flags), casts)
        self.scalars = None if rule.scalars is None else Equation(rule.scalars, {}, casts)
        self.active = rule.active(dict(variant.flags))
        self.compute = FLOATS[variant.compute]

    def write(self, module: Any) -> None:
        """Into a module."""
        inner = self._inner(module)
        run = ir.Function(module, ir.FunctionType(_VOID, [WORD] * 6), "run")
        build = ir.IRBuilder(run.append_basic_block())
        at, gradient, start, count, numbers, out = run.args
        row, told = _pointer(build, at, WORD), _pointer(build, out, DOUBLE)
        with build.if_then(build.icmp_signed("<", count, WORD(0))):
            self._begin(build, row, _pointer(build, numbers, DOUBLE), told)
            build.ret_void()
        first, dtypes = places(self.rule, self.variant)
        arrays = [_moved(build, gradient, start, self.variant.gradient)]
        for i, dtype in enumerate(dtypes, first):
            arrays.append(_moved(build, _item(build, row, i), start, dtype))
        passed = [
            _item(build, told, i) for i in range(len(self.rule.coefficients) + len(self.variant.extras))
        ]
        passed = [convert(build, x, self.compute) for x in passed]
        stream = _INT(0)
        if self.variant.stochastic:
            stream = build.fptoui(_item(build, told, width(self.rule, self.variant) - 1), _INT)
        build.call(inner, [*arrays, start, count, stream, *passed])
        build.ret_void()

    def _begin(self, build: Any, row: Any, numbers: Any, out: Any) -> None:
        """The coefficients of a tensor's step."""
        rule, variant = self.rule, self.variant
        counts, n = int(rule.counts or variant.stochastic), len(rule.coefficients)
        step = DOUBLE(0.0)
        if counts:
            kind = FLOATS[variant.scalar]
            place = _pointer(build, _item(build, row, 1), kind)
            counted = build.fadd(build.load(place), kind(1.0))
            build.store(counted, place)
            step = convert(build, counted, DOUBLE)
        kind = FLOATS[variant.number]
        kept = [
            _pointer(build, _item(build, row, 1 + counts + i), kind) for i in range(len(rule.scalar_state))
        ]
        hyper = [_item(build, numbers, i) for i in range(len(rule.hyper))]
        told = hyper
        if self.scalars is not None:
            given = [step, *(convert(build, build.load(place), DOUBLE) for place in kept), *hyper]
            told = self.scalars.write(build, DOUBLE, given, n + len(kept))
        elif len(hyper) != n:
            raise Untranslatable(f"it has {len(hyper)} hyperparameters and takes {n} coefficients")
        for place, value in zip(kept, told[n:], strict=True):
            build.store(convert(build, value, kind), place)
        extras = [_item(build, numbers, len(rule.hyper) + i) for i in range(len(variant.extras))]
        for i, value in enumerate([*told[:n], *extras]):
            build.store(value, build.gep(out, [WORD(i)]))
        if variant.stochastic:
            seed = _item(build, numbers, len(rule.hyper) + len(extras))
            tensor = _item(build, row, columns(rule, variant) - 1)
            stream = _mix(build, build.trunc(build.fptosi(seed, WORD), _INT))
            stream = _mix(build, build.add(stream, build.trunc(build.fptosi(step, WORD), _INT)))
            stream = _mix(build, build.add(stream, build.trunc(tensor, _INT)))
            build.store(build.uitofp(stream, DOUBLE), build.gep(out, [WORD(n + len(extras))]))

    def _inner(self, module: Any) -> Any:
        """The loop over a tensor's elements, or a piece of them.

        A function of its own, whose arrays are declared to be apart: LLVM vectorises it without tests at run time.
        """
        variant, n = self.variant, len(self.rule.coefficients)
        _, dtypes = places(self.rule, variant)
        arrays = [_MEMORY[dtype].as_pointer() for dtype in (variant.gradient, *dtypes)]
        numbers = [self.compute] * (n + len(variant.extras))
        inner = ir.Function(module, ir.FunctionType(_VOID, [*arrays, WORD, WORD, _INT, *numbers]), "inner")
        inner.linkage = "internal"
        inner.attributes.add("noinline")
        for pointer in inner.args[: len(arrays)]:
            pointer.add_attribute("noalias")
        g, p, *states = inner.args[: len(arrays)]
        start, count, stream, *given = inner.args[len(arrays) :]
        coefficients, extras = given[:n], dict(zip(variant.extras, given[n:], strict=True))

        def element(build: Any, i: Any) -> None:
            gradient = self._load(build, g, i, variant.gradient)
            if "divisor" in extras:
                gradient = build.fdiv(gradient, extras["divisor"])
                self._store(build, gradient, g, i, variant.gradient)
            if "factor" in extras:
                gradient = build.fmul(gradient, extras["factor"])
            weight = self._load(build, p, i, variant.weight)
            if variant.kahan:
                weight = build.fadd(weight, self._load(build, states[-1], i, variant.weight))
            known = {
                name: self._load(build, at, i, dtype)
                for name, at, dtype in zip(self.active, states, variant.states, strict=False)
            }
            zero = self.compute(0.0)
            before = [known.get(state.name, zero) for state in self.rule.state]
            told = self.update.write(
                build, self.compute, [weight, gradient, *before, *coefficients], 1 + len(self.rule.state)
            )
            noise = None
            if variant.stochastic:
                noise = _noise_at(build, build.add(start, i), stream)
            weight = told[0]
            stored = self._store(build, weight, p, i, variant.weight, None if variant.kahan else noise, 0)
            if variant.kahan:
                lost = build.fsub(weight, stored)
                finite = build.fcmp_ordered("==", build.fsub(lost, lost), zero)
                lost = build.select(finite, lost, zero)  # an overflow is not to be made up for
                self._store(build, lost, states[-1], i, variant.weight)
            after = dict(zip((state.name for state in self.rule.state), told[1:], strict=True))
            for k, name in enumerate(self.active):
                self._store(build, after[name], states[k], i, variant.states[k], noise, k + 1)

        _loop(inner, count, element)
        return inner

    def _load(self, build: Any, array: Any, i: Any, dtype: str) -> Any:
        return convert(build, _wide(build, build.load(build.gep(array, [i])), dtype), self.compute)

    def _store(
        self,
        build: Any,
        x: Any,
        array: Any,
        i: Any,
        dtype: str,
        noise: Callable[[int], Any] | None = None,
        column: int = 0,
    ) -> Any:
        """What was stored, as it will be loaded."""
        if dtype in FLOATS:
            told = convert(build, x, FLOATS[dtype])
        else:
            narrow = _float16 if dtype == "float16" else _bfloat16
            told = narrow(build, convert(build, x, SINGLE), None if noise is None else noise(column))
        build.store(told, build.gep(array, [i]))
        return convert(build, _wide(build, told, dtype), self.compute)


def write_squares(module: Any, dtype: str) -> None:
    """The function `squares(gradient, count, out)`, all of them words: writes the float64 sum of squares.

    Eight running sums, so that the processor need not wait for each addition.
    """
    squares = ir.Function(module, ir.FunctionType(_VOID, [WORD] * 3), "squares")
    gradient, count, out = squares.args
    build = ir.IRBuilder(squares.append_basic_block())
    g, sums = _pointer(build, gradient, _MEMORY[dtype]), build.alloca(DOUBLE, _LANES)
    for lane in range(_LANES):
        build.store(DOUBLE(0.0), build.gep(sums, [WORD(lane)]))

    def add(build: Any, i: Any, lane: int) -> None:
        x = convert(build, _wide(build, build.load(build.gep(g, [i])), dtype), DOUBLE)
        place = build.gep(sums, [WORD(lane)])
        build.store(build.fadd(build.load(place), build.fmul(x, x)), place)

    def eight(build: Any, i: Any) -> None:
        for lane in range(_LANES):
            add(build, build.add(build.mul(i, WORD(_LANES)), WORD(lane)), lane)

    whole = build.ashr(count, WORD(3))
    done = build.shl(whole, WORD(3))
    build = _loop(squares, whole, eight, build)
    build = _loop(squares, build.sub(count, done), lambda b, i: add(b, b.add(done, i), 0), build)
    a = [_item(build, sums, lane) for lane in range(_LANES)]
    while len(a) > 1:
        a = [build.fadd(x, y) for x, y in zip(a[::2], a[1::2], strict=True)]
    build.store(a[0], _pointer(build, out, DOUBLE))
    build.ret_void()


def _loop(function: Any, count: Any, body: Callable[[Any, Any], None], build: Any = None) -> Any:
    """`for i in range(count): body`; in a function of its own where it follows nothing. The builder behind it."""
    alone = build is None
    build = build or ir.IRBuilder(function.append_basic_block())
    before = build.block
    inside, after = function.append_basic_block(), function.append_basic_block()
    build.cbranch(build.icmp_signed(">", count, WORD(0)), inside, after)
    build.position_at_end(inside)
    i = build.phi(WORD)
    body(build, i)
    following = build.add(i, WORD(1), flags=("nuw", "nsw"))
    i.add_incoming(WORD(0), before)
    i.add_incoming(following, build.block)
    build.cbranch(build.icmp_signed("<", following, count), inside, after)
    build.position_at_end(after)
    if alone:
        build.ret_void()
    return build


def _pointer(build: Any, address: Any, kind: Any) -> Any:
    return build.inttoptr(address, kind.as_pointer())


def _item(build: Any, array: Any, i: int) -> Any:
    return build.load(build.gep(array, [WORD(i)]))


def _moved(build: Any, address: Any, start: Any, dtype: str) -> Any:
    """A pointer to an array's element."""
    return _pointer(build, build.add(address, build.mul(start, WORD(SIZES[dtype]))), _MEMORY[dtype])


def _wide(build: Any, x: Any, dtype: str) -> Any:
    """A 16-bit number as float32; others as they are."""
    if dtype == "bfloat16":
        return build.bitcast(build.shl(build.zext(x, _INT), _INT(16)), SINGLE)
    return build.fpext(x, SINGLE) if dtype == "float16" else x


def _bfloat16(build: Any, x: Any, noise: Any) -> Any:
    """The bits of a float32 as bfloat16: to nearest, ties to even, nan stays nan; with noise up or down at random."""
    bits = build.bitcast(x, _INT)
    odd = build.and_(build.lshr(bits, _INT(16)), _INT(1))
    up = build.add(build.add(bits, _INT(0x7FFF)), odd)
    nearest = build.select(build.fcmp_unordered("uno", x, x), _INT(0x7FC00000), up)
    if noise is not None:
        exponent = _INT(0x7F800000)  # inf and nan have no neighbours to choose from
        special = build.icmp_unsigned("==", build.and_(bits, exponent), exponent)
        scattered = build.add(bits, noise)
        nearest = build.select(special, nearest, scattered)
    return build.trunc(build.lshr(nearest, _INT(16)), _SHORT)


def _float16(build: Any, x: Any, noise: Any) -> Any:
    """A float32 as float16: to nearest; with noise up or down at random."""
    nearest = build.fptrunc(x, HALF)
    if noise is None:
        return nearest
    bits = build.bitcast(x, _INT)
    size = build.and_(bits, _INT(0x7FFFFFFF))
    high = build.add(build.sub(size, _INT(_noise.EXPONENTS)), build.lshr(noise, _INT(3)))
    high, largest = build.lshr(high, _INT(13)), _INT(_noise.LARGEST)
    high = build.select(build.icmp_unsigned("<", high, largest), high, largest)
    # of sizes that are no number, or too large for an integer, it is not chosen
    low = build.fptosi(build.fmul(build.bitcast(size, SINGLE), SINGLE(2.0**40)), _INT)
    low = build.lshr(build.add(low, noise), _INT(16))
    up = build.select(build.icmp_unsigned("<", size, _INT(_noise.NORMAL)), low, high)
    up = build.or_(up, build.and_(build.lshr(bits, _INT(16)), _INT(0x8000)))
    finite = build.icmp_unsigned("<", size, _INT(_noise.INFINITE))
    return build.select(finite, build.bitcast(build.trunc(up, _SHORT), HALF), nearest)


def _noise_at(build: Any, place: Any, stream: Any) -> Callable[[int], Any]:
    """16 random bits for each column at an element's place in its tensor; see `_noise.py`."""
    high = build.trunc(build.mul(build.ashr(place, WORD(32)), WORD(_noise.GOLDEN)), _INT)
    here = build.xor(_mix(build, build.trunc(place, _INT)), high)

    def column(number: int) -> Any:
        noise = _mix(build, build.xor(here, _mix(build, build.add(stream, _INT(number)))))
        return build.and_(noise, _INT(0xFFFF))

    return column


def _mix(build: Any, x: Any) -> Any:
    """`_noise.mix`."""
    x = build.mul(build.xor(x, build.lshr(x, _INT(16))), _INT(_noise.FIRST))
    x = build.mul(build.xor(x, build.lshr(x, _INT(15))), _INT(_noise.SECOND))
    return build.xor(x, build.lshr(x, _INT(16)))
