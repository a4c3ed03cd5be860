"""A rule as one compiled loop over all tensors on the CPU (numba), reading a table of addresses.

Per step and tensor nothing runs in Python but reading the gradient's address. Compiled once per machine and variant
(rule, flags, dtype), kept on disk under a key that covers the rule's text and the compiler's versions: numba's own
cache does not notice a rule that was edited in another file.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from hybridopt.engines._source import Untranslatable, digest, module_source
from hybridopt.rules import Rule

__all__ = ["Untranslatable", "available", "compiled", "pool"]


@functools.cache
def available() -> str:
    """Empty if numba can be used, else why not."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    return ""


def cache_folder() -> Path:
    """Where generated modules are kept: `$HYBRIDOPT_CACHE`, else the user's cache folder, else a temporary one."""
    named = os.environ.get("HYBRIDOPT_CACHE")
    base = (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybridopt"
    )
    try:
        folder = base / "cpu"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="hybridopt-"))


@functools.cache
def compiled(rule: Rule, flags: tuple[tuple[str, bool], ...], dtype: str, scalar_dtype: str) -> ModuleType:
    """The compiled variant of a rule: a module with `run`, `begin` and `apply`.

    Raises:
        Untranslatable: the rule's source is not available or uses what cannot be compiled.
    """
    source = module_source(rule, dict(flags), dtype, scalar_dtype)
    name = f"rule_{digest(source)}"
    path = cache_folder() / f"{name}.py"
    if not path.exists() or path.read_text() != source:
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(source)
        scratch.replace(path)
    spec = importlib.util.spec_from_file_location(f"_hybridopt_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Worker threads for large steps; compiled code releases the interpreter lock."""
    return ThreadPoolExecutor(threads, thread_name_prefix="hybridopt-step")


# a forked child has the parent's pool object but none of its threads
os.register_at_fork(after_in_child=pool.cache_clear)
