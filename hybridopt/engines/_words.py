"""Functions of machine words.

For what surrounds the compiled rules: tables of addresses, memory of torch and of CPython, pieces for threads. The
language is a part of Python with one type, int64, as B had it: `a[i]` is the word that stands i words behind the
address `a`, and can be assigned to; `call(f, ...)` calls the C function at an address, `claim(a)` adds one to the word
at an address and gives what stood there, as no other thread is told; `prefetch(a)` says that what stands at an address,
which may be any number, will be read.
"""

from __future__ import annotations

import ast
import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from llvmlite import binding, ir

from hybridopt.engines._llvm import Library

WORD = ir.IntType(64)
_OPERATORS = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.BitAnd: "and_",
    ast.BitOr: "or_",
    ast.BitXor: "xor",
}
_COMPARED = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_PYTHON = {"PyLong_AsVoidPtr": 1, "PyLong_FromLongLong": 1, "PyEval_SaveThread": 0, "PyEval_RestoreThread": 1}
_METHOD = """
def {name}_method(module, argument):
    return PyLong_FromLongLong({name}(PyLong_AsVoidPtr(argument)))
"""
_FREE = """
def {name}_method(module, argument):
    address = PyLong_AsVoidPtr(argument)
    thread = PyEval_SaveThread()
    told = {name}(address)
    PyEval_RestoreThread(thread)
    return PyLong_FromLongLong(told)
"""


class Words:
    """Compiled functions.

    Args:
        source: their text; a function calls only those above it.
        methods: names of those with one argument that Python is to call, and whether other threads may run Python
            meanwhile.
    """

    def __init__(self, source: str, methods: Mapping[str, bool]) -> None:
        for name in _PYTHON:
            binding.add_symbol(name, ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0)
        source += "".join((_FREE if free else _METHOD).format(name=name) for name, free in methods.items())
        self._library = Library("words", lambda module: _write(module, source))
        kept = [_Method(name.encode(), self.address(f"{name}_method"), 8, None) for name in methods]
        self.methods = {name: _method(one, self) for name, one in zip(methods, kept, strict=True)}
        self._kept = kept  # behind `methods`, which die first

    def address(self, name: str) -> int:
        """Of a function, to be called from C."""
        return self._library.address(name)


def _write(module: Any, source: str) -> None:
    functions: dict[str, Any] = {
        name: ir.Function(module, ir.FunctionType(WORD, [WORD] * count), name)
        for name, count in _PYTHON.items()
    }
    for definition in ast.parse(source).body:
        assert isinstance(definition, ast.FunctionDef)
        _Function(module, functions, definition)


class _Method(ctypes.Structure):
    """CPython's `PyMethodDef`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


def _method(definition: _Method, words: Words) -> Callable[[int], int]:
    """CPython's function object, which keeps the compiled code alive."""
    make: Any = ctypes.pythonapi.PyCFunction_NewEx
    make.argtypes, make.restype = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p], ctypes.py_object
    return cast("Callable[[int], int]", make(ctypes.addressof(definition), words, None))


class _Function:
    """One function, written into a module. Variables are in memory; LLVM moves them into registers."""

    def __init__(self, module: Any, functions: dict[str, Any], definition: ast.FunctionDef) -> None:
        names = [argument.arg for argument in definition.args.args]
        self.functions = functions
        self.function = ir.Function(module, ir.FunctionType(WORD, [WORD] * len(names)), definition.name)
        functions[definition.name] = self.function
        self.build = ir.IRBuilder(self.function.append_basic_block())
        assigned = [
            n.id for n in ast.walk(definition) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        ]
        self.places = {name: self.build.alloca(WORD) for name in dict.fromkeys([*names, *assigned])}
        for name, value in zip(names, self.function.args, strict=True):
            self.build.store(value, self.places[name])
        self.body(definition.body)
        if not self.build.block.is_terminated:
            self.build.ret(WORD(0))

    def body(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self.do(statement)

    def do(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=sources)):
                for target, value in zip(targets, [self.value(source) for source in sources], strict=True):
                    self.build.store(value, self.place(target))
            case ast.Assign(targets=[target], value=source):
                self.build.store(self.value(source), self.place(target))
            case ast.AugAssign(target=target, op=op, value=source):
                place = self.place(target)
                self.build.store(self.binary(op, self.build.load(place), self.value(source)), place)
            case ast.Expr(value=source):
                self.value(source)
            case ast.Return(value=source):
                self.build.ret(WORD(0) if source is None else self.value(source))
            case ast.If(test=test, body=body, orelse=orelse):
                self.branch(self.truth(test), body, orelse)
            case ast.While(test=test, body=body):
                self.loop(lambda: self.truth(test), lambda: self.body(body))
            case ast.For(target=target, iter=ast.Call(func=ast.Name(id="range"), args=[end]), body=body):
                self.count(self.place(target), self.value(end), body)
            case _:
                raise SyntaxError(f"not in the language of words: {ast.unparse(statement)}")

    def branch(self, truth: Any, then: Sequence[ast.stmt], orelse: Sequence[ast.stmt]) -> None:
        yes, no, after = (self.function.append_basic_block() for _ in range(3))
        self.build.cbranch(truth, yes, no)
        for block, statements in ((yes, then), (no, orelse)):
            self.build.position_at_end(block)
            self.body(statements)
            if not self.build.block.is_terminated:
                self.build.branch(after)
        self.build.position_at_end(after)

    def count(self, place: Any, end: Any, body: Sequence[ast.stmt]) -> None:
        self.build.store(WORD(0), place)

        def run() -> None:
            self.body(body)
            self.build.store(self.build.add(self.build.load(place), WORD(1)), place)

        self.loop(lambda: self.build.icmp_signed("<", self.build.load(place), end), run)

    def loop(self, test: Callable[[], Any], run: Callable[[], None]) -> None:
        head, inside, after = (self.function.append_basic_block() for _ in range(3))
        self.build.branch(head)
        self.build.position_at_end(head)
        self.build.cbranch(test(), inside, after)
        self.build.position_at_end(inside)
        run()
        self.build.branch(head)
        self.build.position_at_end(after)

    def place(self, node: ast.expr) -> Any:
        """Where a variable, or the word behind an address, stands."""
        match node:
            case ast.Name(id=name):
                return self.places[name]
            case ast.Subscript(value=base, slice=index):
                first = self.build.inttoptr(self.value(base), WORD.as_pointer())
                return self.build.gep(first, [self.value(index)])
        raise SyntaxError(f"not in the language of words: {ast.unparse(node)}")

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number)):
                return WORD(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.build.neg(self.value(operand))
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(op, self.value(left), self.value(right))
            case ast.Call(func=ast.Name(id="claim"), args=[at]):
                counter = self.build.inttoptr(self.value(at), WORD.as_pointer())
                return self.build.atomic_rmw("add", counter, WORD(1), "monotonic")
            case ast.Call(func=ast.Name(id="prefetch"), args=[at]):
                byte = ir.IntType(8).as_pointer()
                kind = ir.FunctionType(ir.VoidType(), [byte, *[ir.IntType(32)] * 3])
                hint = self.build.module.declare_intrinsic("llvm.prefetch", [byte], kind)
                how = [ir.IntType(32)(number) for number in (0, 3, 1)]  # to read, into all caches, data
                self.build.call(hint, [self.build.inttoptr(self.value(at), byte), *how])
                return WORD(0)
            case ast.Call(func=ast.Name(id="call"), args=[function, *rest]):
                kind = ir.FunctionType(WORD, [WORD] * len(rest)).as_pointer()
                target = self.build.inttoptr(self.value(function), kind)
                return self.build.call(target, [*map(self.value, rest)])
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return self.build.call(self.functions[name], [*map(self.value, arguments)])
            case ast.Compare() | ast.BoolOp():
                return self.build.zext(self.truth(node), WORD)
        return self.build.load(self.place(node))

    def binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        if type(op) not in _OPERATORS:
            raise SyntaxError(f"not in the language of words: {type(op).__name__}")
        return getattr(self.build, _OPERATORS[type(op)])(left, right)

    def truth(self, node: ast.expr) -> Any:
        """One bit. `and` and `or` ask no further than they must."""
        if isinstance(node, ast.Compare):
            (op,), (right,) = node.ops, node.comparators
            return self.build.icmp_signed(_COMPARED[type(op)], self.value(node.left), self.value(right))
        if isinstance(node, ast.BoolOp):
            bit, after = ir.IntType(1), self.function.append_basic_block()
            decided = bit(int(isinstance(node.op, ast.Or)))
            told = []
            for one in node.values[:-1]:
                found, further = self.truth(one), self.function.append_basic_block()
                told.append((decided, self.build.block))
                self.build.cbranch(found, *((after, further) if decided.constant else (further, after)))
                self.build.position_at_end(further)
            told.append((self.truth(node.values[-1]), self.build.block))
            self.build.branch(after)
            self.build.position_at_end(after)
            phi = self.build.phi(bit)
            for value, block in told:
                phi.add_incoming(value, block)
            return phi
        return self.build.icmp_signed("!=", self.value(node), WORD(0))
