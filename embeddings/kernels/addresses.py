"""Arrays at bare addresses, for kernels over memory that grows in blocks, whose number is not known to a signature."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from embeddings.kernels.compiled import inlined


def _pointer(typing_context: Any, address: Any) -> Any:
    """Makes a pointer of a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _multiply_high(typing_context: Any, a: Any, b: Any) -> Any:
    """Gives the upper 64 of the 128 bits of the product of two uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        a, b = (builder.zext(argument, wide) for argument in arguments)
        return builder.trunc(builder.lshr(builder.mul(a, b), wide(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


pointer: Any = intrinsic(_pointer)
multiply_high: Any = intrinsic(_multiply_high)


@inlined
def floats_at(address: Any, count: Any) -> Any:
    """Gives the float32 numbers at an address; nothing keeps their memory alive."""
    return carray(pointer(address), (count,), np.float32)


@inlined
def halves_at(address: Any, count: Any) -> Any:
    """Gives the float16 numbers at an address, as int16, since Numba does not know them."""
    return carray(pointer(address), (count,), np.int16)


@inlined
def longs_at(address: Any, count: Any) -> Any:
    """Gives the int64 numbers at an address that is a multiple of 8."""
    return carray(pointer(address), (count,), np.int64)


@inlined
def words_at(address: Any, count: Any) -> Any:
    """Gives the uint32 numbers at an address."""
    return carray(pointer(address), (count,), np.uint32)
