"""What numba lacks: addresses as pointers, fused multiply-add, and the bits of numbers.

Imported only by generated modules, because numba loads slowly.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
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


pointer_u16 = _cast(types.uint16)


@intrinsic
def float32_bits(typingctx: Any, x: Any) -> Any:
    """The bits of a float32, as uint32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def bfloat16_bits(typingctx: Any, bits: Any) -> Any:
    """The upper half of a float32's bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.trunc(builder.lshr(args[0], ir.Constant(ir.IntType(32), 16)), ir.IntType(16))

    return types.uint16(types.uint32), codegen


@intrinsic
def from_bfloat16(typingctx: Any, bits: Any) -> Any:
    """float32 from the bits of a bfloat16."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def float16_bits(typingctx: Any, x: Any) -> Any:
    """The bits of the float16 nearest to a float32 (needs the processor's own conversion)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def from_float16(typingctx: Any, bits: Any) -> Any:
    """float32 from the bits of a float16 (needs the processor's own conversion)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen
