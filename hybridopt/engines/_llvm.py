"""LLVM: a module written with `llvmlite.ir` as machine code for this processor, kept on disk."""

from __future__ import annotations

import ctypes.util
import functools
import hashlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, cast

from llvmlite import binding, ir

from hybridopt.engines._modules import kept

_PASSES = {"speed_level": 3, "loop_vectorization": True}
_MACHINE: dict[str, Any] = {"opt": 3, "codemodel": "jitdefault", "jit": True}
_C_NAMES = ("exp", "expf", "log", "logf", "pow", "powf", "fma", "fmaf", "memcpy", "memset")


class Library:
    """Compiled functions; their code lives as long as this object.

    Args:
        kind: what they are, in the file's name.
        write: writes them into a module.
    """

    def __init__(self, kind: str, write: Callable[[Any], None]) -> None:
        machine = _machine()  # the engine's own from here on
        module = ir.Module(kind)
        module.triple = machine.triple
        write(module)
        text = str(module)
        # the instructions themselves, not what wrote them: a file may be replaced while a process lives
        key = "\n".join((text, version("llvmlite"), machine.triple, *_processor(), repr((_PASSES, _MACHINE))))
        digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
        code = kept("cpu", f"{kind}_{digest}.o", lambda: _compiled(machine, text))
        self._engine: Any = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        self._engine.add_object_file(binding.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Of a function, to be called from C."""
        return cast("int", self._engine.get_function_address(name))


def _compiled(machine: Any, text: str) -> bytes:
    module = binding.parse_assembly(text)
    module.data_layout = str(machine.target_data)
    module.verify()
    options = binding.create_pipeline_tuning_options()
    for name, value in _PASSES.items():
        setattr(options, name, value)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return cast("bytes", machine.emit_object(module))


def _machine() -> Any:
    _prepare()
    processor, features = _processor()
    target = binding.Target.from_triple(binding.get_process_triple())
    static = target.name.startswith("x86")  # as LLVM's loader of code wants it there
    reloc = "static" if static else "default"
    return target.create_target_machine(cpu=processor, features=features, reloc=reloc, **_MACHINE)


@functools.cache
def _processor() -> tuple[str, str]:
    return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()


@functools.cache
def _prepare() -> None:
    """LLVM would end the process if compiled code called what it does not find."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    if any(binding.address_of_symbol(name) is None for name in _C_NAMES):
        binding.load_library_permanently(ctypes.util.find_library("m"))
