"""The one machine instruction Numba has no word for: ask for memory before it is needed.

Rows lie at random places of memory that fits no cache, so that a loop over them waits for each; asking for a row a
few rows ahead takes a quarter off looking up and a third off updating.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_CACHE_LINE_BYTES = 64
_READ, _KEEP_IN_ALL_CACHES, _DATA = 0, 3, 1  # llvm.prefetch's last three operands


def _prefetch(typing_context: Any, vector: Any) -> Any:
    """Asks for the cache lines of a contiguous vector. Its place need not exist: this never faults."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        word, byte_pointer, flag = ir.IntType(64), ir.IntType(8).as_pointer(), ir.IntType(32)
        ask = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte_pointer], ir.FunctionType(ir.VoidType(), [byte_pointer, flag, flag, flag])
        )
        start = builder.ptrtoint(view.data, word)
        end = builder.add(start, builder.mul(view.nitems, view.itemsize))
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        line = builder.phi(word)
        line.add_incoming(start, before)
        builder.call(ask, [builder.inttoptr(line, byte_pointer), flag(_READ), flag(_KEEP_IN_ALL_CACHES), flag(_DATA)])
        next_line = builder.add(line, word(_CACHE_LINE_BYTES))
        line.add_incoming(next_line, loop)
        builder.cbranch(builder.icmp_unsigned("<", next_line, end), loop, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(vector), generate


# Numba calls it with the context in front; who reads the types of kernels must not expect that argument.
prefetch: Any = intrinsic(_prefetch)
