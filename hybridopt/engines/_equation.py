"""A rule's function as LLVM instructions: elementwise arithmetic on one type of numbers."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir

from hybridopt.engines._translate import Untranslatable, translate

SINGLE, DOUBLE, HALF, BIT = ir.FloatType(), ir.DoubleType(), ir.HalfType(), ir.IntType(1)
FLOATS = {"float32": SINGLE, "float64": DOUBLE}

_ARITHMETIC = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
_LOGIC = {ast.BitAnd: "and_", ast.BitOr: "or_", ast.BitXor: "xor"}
_COMPARED = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_INTRINSICS = {"_sqrt": "llvm.sqrt", "_exp": "llvm.exp", "_log": "llvm.log", "_abs": "llvm.fabs"}


def convert(build: Any, x: Any, to: Any) -> Any:
    """A float32 or float64 as the other, to nearest."""
    if x.type == to:
        return x
    return build.fpext(x, to) if to == DOUBLE else build.fptrunc(x, to)


class Equation:
    """A rule's function.

    Args:
        function: `Rule.update` or `Rule.scalars`.
        flags: their values.
        casts: types to which `xp.stored` and `xp.default` round.

    Raises:
        Untranslatable: says what cannot be expressed.
    """

    def __init__(
        self, function: Callable[..., Any], flags: Mapping[str, bool], casts: Mapping[str, Any]
    ) -> None:
        (definition,) = ast.parse("\n".join(translate(function, "equation", flags, ""))).body
        assert isinstance(definition, ast.FunctionDef)
        self._body = definition.body
        self._names = [argument.arg for argument in definition.args.args]
        self._casts = {f"_{name}": kind for name, kind in casts.items()}

    def write(self, build: Any, kind: Any, arguments: list[Any], results: int) -> list[Any]:
        """The instructions, and the results, all of one type.

        Args:
            build: where to.
            kind: the type.
            arguments: of the function.
            results: how many there must be.
        """
        if len(arguments) != len(self._names):
            raise Untranslatable(f"it takes {len(self._names)} arguments, not {len(arguments)}")
        body = _Body(build, kind, dict(zip(self._names, arguments, strict=True)), self._casts)
        told = body.run(self._body)
        if len(told) != results:
            raise Untranslatable(f"it returns {len(told)} values, not {results}")
        return told


class _Body:
    """Straight-line code: what a name stands for is the last value it was given."""

    def __init__(self, build: Any, kind: Any, names: dict[str, Any], casts: Mapping[str, Any]) -> None:
        self.build = build
        self.kind = kind
        self.names = names
        self.casts = casts

    def run(self, statements: list[ast.stmt]) -> list[Any]:
        for statement in statements:
            match statement:
                case ast.Return(value=ast.Tuple(elts=values)):
                    return [self.number(self.value(value)) for value in values]
                case ast.Assign(targets=targets, value=value):
                    told = self.values(value)
                    for target in targets:
                        self.assign(target, told)
                case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                    loaded = ast.Name(name, ast.Load())
                    self.assign(target, [self.value(ast.BinOp(loaded, op, value))])
                case ast.Pass():
                    pass
                case _:
                    raise Untranslatable(
                        f"`{ast.unparse(statement)}`; a rule is assignments and a return of a tuple"
                    )
        raise Untranslatable("it does not return")

    def assign(self, target: ast.expr, told: list[Any]) -> None:
        places = target.elts if isinstance(target, ast.Tuple) else [target]
        if len(places) != len(told):
            raise Untranslatable(f"`{ast.unparse(target)}` is not given as many values")
        for place, value in zip(places, told, strict=True):
            if not isinstance(place, ast.Name):
                raise Untranslatable(f"`{ast.unparse(place)}` is assigned to")
            self.names[place.id] = value

    def values(self, node: ast.expr) -> list[Any]:
        return [self.value(one) for one in node.elts] if isinstance(node, ast.Tuple) else [self.value(node)]

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=float(number) | bool(number)):  # a flag may be a factor
                return self.kind(float(number))
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.build.fneg(self.number(self.value(operand)))
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.number(self.value(operand))
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return self.build.not_(self.bit(self.value(operand), node))
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(node, op, self.value(left), self.value(right))
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self.compare(self.value(left), ops, [self.value(other) for other in others])
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return self.call(node, name, [self.value(argument) for argument in arguments])
        raise Untranslatable(f"`{ast.unparse(node)}`")

    def number(self, x: Any) -> Any:
        """A comparison's outcome as 0 or 1."""
        return self.build.uitofp(x, self.kind) if x.type == BIT else x

    def bit(self, x: Any, node: ast.expr) -> Any:
        if x.type != BIT:
            raise Untranslatable(f"`{ast.unparse(node)}` is not of comparisons")
        return x

    def binary(self, node: ast.expr, op: ast.operator, left: Any, right: Any) -> Any:
        if type(op) in _LOGIC:
            return getattr(self.build, _LOGIC[type(op)])(self.bit(left, node), self.bit(right, node))
        if left.type == right.type == BIT and isinstance(op, ast.Add | ast.Sub):  # torch's True + True is 1
            raise Untranslatable(f"`{ast.unparse(node)}`, a sum of comparisons; use xp.where")
        left, right = self.number(left), self.number(right)
        if isinstance(op, ast.Mod):
            return self.remainder(left, right)
        if type(op) in _ARITHMETIC:
            return getattr(self.build, _ARITHMETIC[type(op)])(left, right)
        if isinstance(op, ast.Pow):
            return self.intrinsic("llvm.pow", left, right)
        raise Untranslatable(f"the operator in `{ast.unparse(node)}`")

    def remainder(self, a: Any, b: Any) -> Any:
        """With the sign of the divisor, as in Python and torch."""
        zero, r = self.kind(0.0), self.build.frem(a, b)
        signs = [self.build.fcmp_ordered("<", x, zero) for x in (r, b)]
        other = self.build.and_(self.build.fcmp_ordered("!=", r, zero), self.build.xor(*signs))
        return self.build.select(other, self.build.fadd(r, b), r)

    def compare(self, left: Any, ops: list[ast.cmpop], others: list[Any]) -> Any:
        """`a < b < c` holds where both do."""
        told = None
        for op, right in zip(ops, others, strict=True):
            if type(op) not in _COMPARED:
                raise Untranslatable(f"the comparison {type(op).__name__}")
            a, b = self.number(left), self.number(right)
            kind = self.build.fcmp_unordered if isinstance(op, ast.NotEq) else self.build.fcmp_ordered
            found = kind(_COMPARED[type(op)], a, b)  # nan differs from everything
            told = found if told is None else self.build.and_(told, found)
            left = right
        return told

    def call(self, node: ast.Call, name: str, given: list[Any]) -> Any:
        match name, given:
            case "_where", [condition, a, b]:
                if condition.type != BIT:
                    condition = self.build.fcmp_unordered("!=", condition, self.kind(0.0))
                if not a.type == b.type == BIT:
                    a, b = self.number(a), self.number(b)
                return self.build.select(condition, a, b)
            case "_fma", [a, b, c]:
                return self.intrinsic("llvm.fma", *map(self.number, (a, b, c)))
            case (("_maximum" | "_minimum"), [a, b]):
                a, b = self.number(a), self.number(b)
                first = self.build.fcmp_ordered(">" if name == "_maximum" else "<", a, b)
                nan = self.build.fcmp_unordered("uno", a, a)
                return self.build.select(self.build.or_(first, nan), a, b)
            case "_sign", [x]:
                zero = self.kind(0.0)
                x = self.number(x)
                above, below = self.build.fcmp_ordered(">", x, zero), self.build.fcmp_ordered("<", x, zero)
                return self.build.fsub(self.number(above), self.number(below))
            case (("_stored" | "_default"), [x]):
                rounded = convert(self.build, self.number(x), self.casts[name])
                return convert(self.build, rounded, self.kind)
            case _, [x] if name in _INTRINSICS:
                return self.intrinsic(_INTRINSICS[name], self.number(x))
        raise Untranslatable(f"`{ast.unparse(node)}`")

    def intrinsic(self, name: str, *given: Any) -> Any:
        if name == "llvm.fma":
            return self.build.fma(*given)
        kind = ir.FunctionType(self.kind, [self.kind] * len(given))
        function = self.build.module.declare_intrinsic(name, [self.kind], kind)
        return self.build.call(function, given)
