"""The one machine instruction Numba has no word for: ask for memory before it is needed.

Rows lie at random places of memory that fits no cache, so that a loop over them waits for each. Asking for a row some
rows ahead, and into the second-level cache: the first-level one has few places for lines under way, and waits again
once they are taken. With 26 tables of 100,000 rows x 64 the update takes 4 ms so and 7 by way of the first-level cache.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_CACHE_LINE_BYTES = 64
_READ, _SECOND_LEVEL, _DATA = 0, 2, 1  # llvm.prefetch's last three operands


def _prefetch(typing_context: Any, vector: Any) -> Any:
    """Asks for the cache lines of a contiguous vector. Its place need not exist: this never faults."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        word, byte_pointer, flag = ir.IntType(64), ir.IntType(8).as_pointer(), ir.IntType(32)
        ask = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte_pointer], ir.FunctionType(ir.VoidType(), [byte_pointer, flag, flag, flag])
        )
        first = builder.ptrtoint(view.data, word)
        end = builder.add(first, builder.mul(view.nitems, view.itemsize))
        # What begins within a line reaches into one more than its length says.
        start = builder.and_(first, word(-_CACHE_LINE_BYTES))
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        line = builder.phi(word)
        line.add_incoming(start, before)
        builder.call(ask, [builder.inttoptr(line, byte_pointer), flag(_READ), flag(_SECOND_LEVEL), flag(_DATA)])
        next_line = builder.add(line, word(_CACHE_LINE_BYTES))
        line.add_incoming(next_line, loop)
        builder.cbranch(builder.icmp_unsigned("<", next_line, end), loop, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(vector), generate


# Numba calls it with the context in front; who reads the types of kernels must not expect that argument.
prefetch: Any = intrinsic(_prefetch)
