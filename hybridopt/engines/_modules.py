"""What compilers read and made: in a cache folder, under a digest of all that it depends on, written in one move."""

from __future__ import annotations

import atexit
import contextlib
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
from typing import Generic, TypeVar

from hybridopt.engines._translate import Untranslatable
from hybridopt.engines._variant import Variant
from hybridopt.rules import Rule

T = TypeVar("T")
_CHECK = 16  # bytes


class Variants(Generic[T]):
    """Variants of rules, each made once, by one thread at a time.

    Args:
        make: a variant's code; where it raises `Untranslatable`, so does every later call: a second try would take
            as long.
    """

    def __init__(self, make: Callable[[Rule, Variant], T]) -> None:
        self._make = make
        self._found: dict[tuple[Rule, Variant], T | str] = {}
        self.making = threading.Lock()

    def __call__(self, rule: Rule, variant: Variant) -> T:
        """The code of a variant."""
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
    """Where what is generated is kept: `$HYBRIDOPT_CACHE`, else the user's cache folder, else a temporary one."""
    try:
        folder = _lasting_folder(engine)
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # not writable; no home
        pass
    return _temporary_folder()


def _lasting_folder(engine: str) -> Path:
    named = os.environ.get("HYBRIDOPT_CACHE")
    base = Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybridopt")
    return base / engine


@functools.cache
def _temporary_folder() -> Path:
    """For this process, which removes it at its end."""
    folder = tempfile.mkdtemp(prefix="hybridopt-")
    atexit.register(_remove, folder, os.getpid())
    return Path(folder)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves its parent's folder alone
        shutil.rmtree(folder, ignore_errors=True)


def kept(engine: str, name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, from disk if it is there and whole."""
    found = b""
    with contextlib.suppress(OSError, RuntimeError):  # not there; no home
        found = (_lasting_folder(engine) / name).read_bytes()  # a folder that is only to be read will do
    if found[:_CHECK] and _check(found[_CHECK:]) == found[:_CHECK]:
        return found[_CHECK:]
    made = make()
    with contextlib.suppress(OSError):  # the disk is full, or the folder went away: made again next time
        _write(cache_folder(engine) / name, _check(made) + made)
    return made


def load(source: str, engine: str, compiler: str, *versions: str, kind: str = "rule") -> ModuleType:
    """The Python module made of `source`.

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
    path = folder / f"{name}.py"
    if not path.exists() or path.read_text() != source:
        _write(path, source.encode())
    return path


def _write(path: Path, content: bytes) -> None:
    """Put there in one move: other processes may be doing the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as scratch:
        scratch.write(content)
    Path(scratch.name).replace(path)


def _check(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECK).digest()
