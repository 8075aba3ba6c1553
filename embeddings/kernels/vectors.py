"""A vector of numbers in one register, for the loops that Numba's compiler cannot vectorise well by itself.

It must assume that two slices overlap, and checks or reloads; here loads and stores stand where they are written.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, models, register_model

LANES: int = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""Numbers per vector: those of the processor's registers."""

_FLOAT = ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_NUMBER_BYTES = 4
REGISTER_BYTES = _NUMBER_BYTES * LANES


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"Vector{LANES}")


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _FLOATS)  # type: ignore[no-untyped-call]


_VECTOR = _VectorType()


def _address(context: Any, builder: Any, signature: Any, arguments: Any, vector: ir.VectorType = _FLOATS) -> Any:
    view = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.bitcast(builder.gep(view.data, [arguments[1]]), vector.as_pointer())


def _load(typing_context: Any, numbers: Any, at: Any) -> Any:
    """Reads ``numbers[at : at + LANES]`` of a contiguous float32 vector; the caller keeps within it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_address(context, builder, signature, arguments), align=_NUMBER_BYTES)

    return _VECTOR(numbers, at), generate


def _load_wide(typing_context: Any, numbers: Any, at: Any) -> Any:
    """Reads as ``load`` does, from float32, or from bfloat16 in uint16 or float16 in int16, which are widened."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if numbers.dtype == types.float32:
            return builder.load(_address(context, builder, signature, arguments), align=_NUMBER_BYTES)
        stored = ir.IntType(16) if numbers.dtype == types.uint16 else ir.HalfType()
        address = _address(context, builder, signature, arguments, ir.VectorType(stored, LANES))
        narrow = builder.load(address, align=_NUMBER_BYTES // 2)
        if numbers.dtype == types.int16:
            return builder.fpext(narrow, _FLOATS)
        words = ir.VectorType(ir.IntType(32), LANES)
        bits = builder.shl(builder.zext(narrow, words), ir.Constant(words, [16] * LANES))
        return builder.bitcast(bits, _FLOATS)

    return _VECTOR(numbers, at), generate


def _stream(typing_context: Any, numbers: Any, at: Any, vector: Any) -> Any:
    """Writes as ``store`` does, past the caches, to a place that begins a register; then ``finish_streams``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature, arguments)
        written = builder.store(arguments[2], address, align=LANES * _NUMBER_BYTES)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(numbers, at, vector), generate


def _finish_streams(typing_context: Any) -> Any:
    """Waits until other threads would see what was streamed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _store(typing_context: Any, numbers: Any, at: Any, vector: Any) -> Any:
    """Writes ``numbers[at : at + LANES]`` of a contiguous float32 vector; the caller keeps within it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _address(context, builder, signature, arguments), align=_NUMBER_BYTES)
        return context.get_dummy_value()

    return types.void(numbers, at, vector), generate


def _store_narrow(typing_context: Any, numbers: Any, at: Any, given: Any) -> Any:
    """Writes a vector, or one float32, to float32, or to float16 in int16, rounded to nearest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = arguments[2]
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        place, align = builder.gep(view.data, [arguments[1]]), _NUMBER_BYTES
        if numbers.dtype == types.int16:
            narrow = ir.VectorType(ir.HalfType(), LANES) if given == _VECTOR else ir.HalfType()
            number, align = builder.fptrunc(number, narrow), _NUMBER_BYTES // 2
        builder.store(number, builder.bitcast(place, number.type.as_pointer()), align=align)
        return context.get_dummy_value()

    return types.void(numbers, at, given), generate


def _splat(typing_context: Any, number: Any) -> Any:
    """Gives a vector of one number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        undefined, index = ir.Constant(_FLOATS, ir.Undefined), ir.IntType(32)
        one = builder.insert_element(undefined, arguments[0], index(0))
        return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))

    return _VECTOR(types.float32), generate


def _multiply_add(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """Gives ``a * b + c``, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c = arguments
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    return _VECTOR(_VECTOR, _VECTOR, _VECTOR), generate


def _divide(typing_context: Any, a: Any, b: Any) -> Any:
    """Gives ``a / b``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    return _VECTOR(_VECTOR, _VECTOR), generate


def _square_root(typing_context: Any, vector: Any) -> Any:
    """Gives the square root of each number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name, kind = f"llvm.sqrt.v{LANES}f32", ir.FunctionType(_FLOATS, [_FLOATS])
        function = get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        return builder.call(function, arguments)

    return _VECTOR(_VECTOR), generate


def _total(typing_context: Any, vector: Any) -> Any:
    """Sums a vector's numbers, in any order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name, kind = f"llvm.vector.reduce.fadd.v{LANES}f32", ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
        function = get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        return builder.call(function, [_FLOAT(0.0), arguments[0]], fastmath=("reassoc",))

    return types.float32(_VECTOR), generate


# Numba calls them with its context in front; who reads the types of kernels must not expect that argument.
load: Any = intrinsic(_load)
load_wide: Any = intrinsic(_load_wide)
store: Any = intrinsic(_store)
store_narrow: Any = intrinsic(_store_narrow)
stream: Any = intrinsic(_stream)
finish_streams: Any = intrinsic(_finish_streams)
splat: Any = intrinsic(_splat)
multiply_add: Any = intrinsic(_multiply_add)
divide: Any = intrinsic(_divide)
square_root: Any = intrinsic(_square_root)
total: Any = intrinsic(_total)
