"""A rule as one compiled loop over all tensors on the CPU (LLVM), reading a table of addresses.

Per step and tensor nothing runs in Python but reading the gradient's address. Compiled once per machine and variant
(rule, flags, dtype) in a twentieth of a second, and kept on disk under a digest of its instructions, the compiler's
version and the processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, cast

import torch

from hybridopt.engines._driver import STEPS, WATCH
from hybridopt.engines._modules import Variants, failed
from hybridopt.engines._translate import Untranslatable
from hybridopt.engines._variant import Variant, columns, joins, width
from hybridopt.rules import Rule

if TYPE_CHECKING:
    from hybridopt.engines._llvm import Library
    from hybridopt.engines._words import Words

__all__ = [
    "Untranslatable",
    "at_once",
    "available",
    "columns",
    "compiled",
    "joins",
    "native",
    "pool",
    "squares",
    "together",
    "width",
]


@functools.cache
def available() -> str:
    """Empty if LLVM can be used, else why not."""
    return "" if importlib.util.find_spec("llvmlite") else "llvmlite is not installed"


@functools.cache
def converts_float16() -> bool:
    """Whether the processor itself converts float16 (without it compiled code would call a missing function)."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    triple: str = binding.get_process_triple()
    return features.get("f16c", False) or triple.startswith(("aarch64", "arm64"))


def compiled(rule: Rule, variant: Variant) -> int:
    """The address of a rule's compiled variant; see `RuleCode`.

    Raises:
        Untranslatable: the rule's source is not available, uses what cannot be compiled, or LLVM failed.
    """
    return _variants(rule, variant).address("run")


def squares(dtype: str) -> int:
    """The address of a compiled sum of squares; see `write_squares`."""
    with _variants.making:
        return _squares(dtype).address("squares")


@functools.cache
def _squares(dtype: str) -> Library:
    with _compiling():
        from hybridopt.engines._cpu_code import write_squares
        from hybridopt.engines._llvm import Library

        return Library("squares", lambda module: write_squares(module, dtype))


def native() -> Words:
    """Compiled `run`, `enter`, `rows`, `squares`, `touch`, `look` and `same`; see `_driver.py`.

    Raises:
        Untranslatable: LLVM cannot be loaded, or failed.
    """
    with _variants.making:
        return _native()


@functools.cache
def _native() -> Words:
    with _compiling():
        from hybridopt.engines._words import Words  # loads LLVM

        # what looks at Python's objects must be alone
        alone = {"touch": False, "look": False, "same": False}
        return Words(STEPS + WATCH, {"run": True, "enter": True, "rows": True, "squares": True, **alone})


def _compile(rule: Rule, variant: Variant) -> Library:
    with _compiling():
        if "float16" in (variant.weight, variant.gradient, *variant.states) and not converts_float16():
            raise Untranslatable("this processor does not convert float16")
        from hybridopt.engines._cpu_code import RuleCode
        from hybridopt.engines._llvm import Library

        return Library("rule", RuleCode(rule, variant).write)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Whatever a compiler throws, other code can still do the step."""
    try:
        yield
    except Untranslatable:
        raise
    except Exception as error:
        raise failed("LLVM", error) from error


_variants = Variants(_compile)


def together(name: str, block: array[int], threads: int) -> None:
    """Let several threads run one of `native` on one block, from which they claim pieces until none is left.

    They are those of torch's own OpenMP where it has one that we know: its threads go on spinning for milliseconds
    after each of torch's operations, and others would have to wait for the processors. Else, and in a forked child,
    which has none of them, a pool of our own.
    """
    block[0] = 0
    address, run = block.buffer_info()[0], native().methods[name]
    if threads < 2:
        run(address)
    elif (begin := _openmp()) is not None:
        begin(native().address(name), address, threads, 0)
    else:
        at_once([functools.partial(run, address)] * threads)


def at_once(tasks: Sequence[Callable[[], object]]) -> None:
    """Run each in a thread of its own, the first in the caller's."""
    first, *rest = tasks
    others = [pool(len(rest)).submit(task) for task in rest]
    try:
        first()
    finally:  # nobody may free their memory while they write to it
        wait(others)
    for other in others:
        other.result()


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP that torch was linked with, None without."""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):  # torch has other threads, or they have other names
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return cast("Callable[[int, int, int, int], None]", function)


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Worker threads for large steps; compiled code releases the interpreter lock."""
    return ThreadPoolExecutor(threads, thread_name_prefix="hybridopt-step")


def _after_fork() -> None:
    """A forked child has the parent's pool and lock, but none of the threads that serve and hold them."""
    global _openmp
    pool.cache_clear()
    _variants.making = threading.Lock()
    _openmp = functools.cache(lambda: None)


os.register_at_fork(after_in_child=_after_fork)
