"""A rule as Triton kernels, two launches a step for all tensors of one kind."""

from __future__ import annotations

import functools
import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from hybridopt.engines._modules import Variants, load
from hybridopt.engines._translate import Untranslatable
from hybridopt.engines._triton_source import module_source, squares_source
from hybridopt.engines._variant import Variant, width
from hybridopt.rules import Rule

__all__ = ["Untranslatable", "available", "compiled", "interpreted", "squares", "width"]


@functools.cache
def available() -> str:
    """Empty if Triton can be used, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (on the CPU, slowly: for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def compiled(rule: Rule, variant: Variant) -> ModuleType:
    """The kernels `begin` and `apply` of a variant; Triton compiles them when they are first launched.

    Raises:
        Untranslatable: the rule's source is not available, or uses what a kernel cannot express.
    """
    return _variants(rule, variant)


@functools.cache
def squares(dtype: str) -> ModuleType:
    """A module with the kernel `squares`."""
    return _load(squares_source(dtype))


def _compile(rule: Rule, variant: Variant) -> ModuleType:
    return _load(module_source(rule, variant, interpreted()))


def _load(source: str) -> ModuleType:
    try:
        return load(source, "gpu", "Triton", version("triton"))
    except PackageNotFoundError as error:
        raise Untranslatable("Triton is not installed") from error


_variants = Variants(_compile)
