"""What numba lacks: addresses as pointers, and fused multiply-add.

Imported only by generated modules, because numba loads slowly.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic


def _cast(element: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        signature = types.CPointer(element)(types.int64)  # type: ignore[no-untyped-call]

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

        return signature, codegen

    return pointer


pointer_i64 = _cast(types.int64)
pointer_f64 = _cast(types.float64)
pointer_f32 = _cast(types.float32)


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` with one rounding, in the type of `a`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, a, a), codegen
