"""Generated modules: written to a cache folder in one move, under a name that is a digest of their text, and loaded."""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from hybridopt.engines._translate import Untranslatable
from hybridopt.engines._variant import Variant
from hybridopt.rules import Rule


class Variants:
    """Variants of rules, each made once, by one thread at a time.

    Args:
        make: a variant's module; where it raises `Untranslatable`, so does every later call: a second try would take
            as long.
    """

    def __init__(self, make: Callable[[Rule, Variant], ModuleType]) -> None:
        self._make = make
        self._found: dict[tuple[Rule, Variant], ModuleType | str] = {}
        self.making = threading.Lock()

    def __call__(self, rule: Rule, variant: Variant) -> ModuleType:
        """The module of a variant."""
        key = (rule, variant)
        found = self._found.get(key)
        if found is None:
            with self.making:
                found = self._found.get(key)
                if found is None:
                    try:
                        found = self._make(rule, variant)
                    except Untranslatable as error:
                        found = str(error)
                    self._found[key] = found
        if isinstance(found, str):
            raise Untranslatable(found)
        return found


def cache_folder(engine: str) -> Path:
    """Where generated modules are kept: `$HYBRIDOPT_CACHE`, else the user's cache folder, else a temporary one."""
    named = os.environ.get("HYBRIDOPT_CACHE")
    try:
        base = Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybridopt")
        folder = base / engine
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # not writable; no home
        pass
    return _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    """For this process, which removes it at its end."""
    folder = tempfile.mkdtemp(prefix="hybridopt-")
    atexit.register(_remove, folder, os.getpid())
    return Path(folder)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves its parent's folder alone
        shutil.rmtree(folder, ignore_errors=True)


def load(source: str, engine: str, compiler: str, *versions: str, kind: str = "rule") -> ModuleType:
    """The module made of `source`.

    Args:
        source: its text.
        engine: name of its folder in the cache.
        compiler: for messages.
        versions: whatever else the compiled code depends on.
        kind: what it is, in its file's name.

    Raises:
        Untranslatable: the compiler failed.
    """
    text = "\n".join([source, *versions])
    name = f"{kind}_{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
    try:
        path = _written(cache_folder(engine), name, source)
    except OSError:  # the disk is full, or the folder went away
        path = _written(_temporary_folder(), name, source)
    spec = importlib.util.spec_from_file_location(f"_hybridopt_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # numba looks it up there when it loads from its cache
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a compiler throws, other code can still do the step
        del sys.modules[spec.name]
        raise failed(compiler, error) from error
    return module


def failed(compiler: str, error: Exception) -> Untranslatable:
    """What is raised where a compiler failed."""
    first = str(error).strip().partition("\n")[0]
    return Untranslatable(f"{compiler} cannot compile it ({type(error).__name__}: {first})")


def _written(folder: Path, name: str, source: str) -> Path:
    """The module's file, put there in one move: other processes may be doing the same."""
    path = folder / f"{name}.py"
    if not path.exists() or path.read_text() != source:
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as scratch:
            scratch.write(source)
        Path(scratch.name).replace(path)
    return path
