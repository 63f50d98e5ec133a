"""Raw memory in Numba: typed loads and stores at an address, so that a kernel takes plain integers and no arrays.

f32(address)            a pointer to float32; i64, i32, i8, u8, u16 likewise
load(pointer, i)        pointer[i], with no wrap-around of negative indices and no bounds check
store(pointer, i, v)    pointer[i] = v
stack(dtype, count)()   the address of ``count`` elements on the stack
"""

import struct

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _pointer_to(dtype):
    @intrinsic
    def pointer(typing_context, address):
        def emit(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(types.int64), emit

    return pointer


f32, i64, i32 = _pointer_to(types.float32), _pointer_to(types.int64), _pointer_to(types.int32)
i8, u8, u16 = _pointer_to(types.int8), _pointer_to(types.uint8), _pointer_to(types.uint16)


@intrinsic
def load(typing_context, pointer, index):
    def emit(context, builder, signature, args):
        return builder.load(builder.gep(*_element(args), inbounds=True))

    return pointer.dtype(pointer, types.int64), emit


@intrinsic
def store(typing_context, pointer, index, value):
    def emit(context, builder, signature, args):
        builder.store(args[2], builder.gep(*_element(args), inbounds=True))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, pointer.dtype), emit


def _element(args):
    return args[0], [args[1]]


def stack(dtype, count):
    @intrinsic
    def array(typing_context):
        def emit(context, builder, signature, args):
            place = cgutils.alloca_once(builder, context.get_data_type(dtype), size=count)
            place.align = 64
            return builder.ptrtoint(place, ir.IntType(64))

        return types.int64(), emit

    return array


@intrinsic
def magnitude(typing_context, value):
    """The bits of |float32| as int32: in the order of the values, inf above all numbers, NaN above inf."""

    def emit(context, builder, signature, args):
        integer = ir.IntType(32)
        return builder.and_(builder.bitcast(args[0], integer), integer(0x7FFFFFFF))

    return types.int32(types.float32), emit


@intrinsic
def as_bits(typing_context, value):
    """The bits of a float32 as an int32."""

    def emit(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), emit


@intrinsic
def from_bits(typing_context, value):
    """The float32 with the bits of an int32."""

    def emit(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), emit


@intrinsic
def multiply_add(typing_context, a, b, c):
    """a * b + c, with one rounding where the processor has the instruction, otherwise two."""

    def emit(context, builder, signature, args):
        f = ir.FloatType()
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(f, [f] * 3), "llvm.fmuladd.f32")
        return builder.call(function, args)

    return types.float32(types.float32, types.float32, types.float32), emit


def bits_of(value: float) -> int:
    """The bits of a float32, as tables of int64 hold it."""
    return int(struct.unpack("i", struct.pack("f", value))[0])
