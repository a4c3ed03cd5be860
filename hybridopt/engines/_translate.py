"""A rule's functions as text for a compiler: flags folded in, numbers typed, `xp` replaced by plain functions."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

HELPERS = ("sqrt", "exp", "log", "abs", "sign", "where", "maximum", "minimum", "fma", "stored", "default")


class Untranslatable(Exception):
    """A rule uses something that a compiled engine cannot express."""


def translate(
    function: Callable[..., Any],
    name: str,
    flags: Mapping[str, bool],
    decorator: str,
    *,
    number: str = "",
    calls: bool = False,
    prefix: str = "_",
) -> list[str]:
    """A rule's function under another name: flags folded, `xp.f` as `_f`.

    Args:
        function: `Rule.update` or `Rule.scalars`.
        name: of the function in the text.
        flags: their values.
        decorator: the line above it.
        number: makes every number a typed constant of the module (`np.float32`); empty = plain literals.
        calls: write `a / b` as `_div(a, b)` and `a ** b` as `_pow(a, b)`.
        prefix: of the helpers' names, in place of `_`.

    Raises:
        Untranslatable: says what cannot be expressed.
    """
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
    folder = _Folder(flags, function.__globals__, known, bool(number), calls, prefix)
    definition = folder.visit(definition)
    constants = [f"{key} = {number}({str(value)!r})" for key, value in folder.constants.items()]
    return [*constants, decorator, ast.unparse(ast.fix_missing_locations(definition))]


class _Folder(ast.NodeTransformer):
    def __init__(
        self,
        flags: Mapping[str, bool],
        module: Mapping[str, Any],
        known: set[str],
        typed: bool,
        calls: bool,
        prefix: str,
    ) -> None:
        self.flags = flags
        self.module = module
        self.known = known
        self.typed = typed
        self.calls = calls
        self.prefix = prefix
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

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        left = self.visit(node.left)
        if isinstance(node.op, ast.Pow) and isinstance(node.right, ast.Constant) and node.right.value == 2:
            return ast.BinOp(left, ast.Mult(), left)  # as torch does it
        right = self.visit(node.right)
        name = {ast.Div: "div", ast.Pow: "pow"}.get(type(node.op)) if self.calls else None
        if name is None:
            return ast.BinOp(left, node.op, right)
        return ast.Call(ast.Name(self.prefix + name, ast.Load()), [left, right], [])

    def visit_Assign(self, node: ast.Assign) -> Any:
        for target in node.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.known.add(name.id)
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == "xp" and node.attr in HELPERS:
            return ast.Name(self.prefix + node.attr, ast.Load())
        raise Untranslatable(f"`{ast.unparse(node)}`; a rule may use xp.{', xp.'.join(HELPERS)}")

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
                f"a call of `{ast.unparse(node.func)}`; a rule may call xp.{', xp.'.join(HELPERS)}"
            )
        return ast.Call(function, [self.visit(a) for a in node.args], [])

    def _number(self, value: float) -> ast.expr:
        if not self.typed:
            size = ast.Constant(abs(float(value)))  # unparsed as 1e309 if infinite
            return ast.UnaryOp(ast.USub(), size) if math.copysign(1, value) < 0 else size
        for name, known in self.constants.items():
            if known == value:
                return ast.Name(name, ast.Load())
        name = f"_K{len(self.constants)}"
        self.constants[name] = float(value)
        return ast.Name(name, ast.Load())
