"""The sums of one output over its nonzeros, for a block of rows at once: a row a lane, each nonzero a multiply-add.

    x        [K, rows] fp32, the rows side by side (one row: the row itself)
    values   int8 or fp32     columns   int16 or int32     nonzeros from ``first`` to ``last``
    sums     [rows] fp32

Four partial sums, each of every fourth nonzero, hide the latency of the additions; the last few nonzeros go to the
first. So a row's sums are taken in the same order whatever the block it falls in.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .instruction_sets import I8, I32
from .tile import F32, I64, read, splat

UNROLLED = 4


def _widened(builder, at, lanes, integers):
    """``lanes`` values from an address on as fp32."""
    if integers:
        loaded = read(builder, at, I64(0), ir.VectorType(I8, lanes), 1)
        return builder.sitofp(loaded, ir.VectorType(F32, lanes))
    return read(builder, at, I64(0), ir.VectorType(F32, lanes))


def nonzero_sums(lanes, vectors, integers, column_bytes):
    """The sums as a function for kernels: (x, values, columns, first, last, sums), addresses and integers."""
    column = ir.IntType(8 * column_bytes)
    element = F32 if lanes == 1 else ir.VectorType(F32, lanes)
    fma = f"llvm.fmuladd.{'' if lanes == 1 else f'v{lanes}'}f32"

    def emit(builder, x, values, columns, first, last, sums):
        function_type = ir.FunctionType(element, [element] * 3)
        multiply_add = cgutils.get_or_insert_function(builder.module, function_type, fma)

        def added(acc, index, value):
            at = builder.mul(index, I64(column_bytes))
            place = builder.zext(read(builder, columns, at, column, column_bytes), I64)
            row = builder.gep(x, [builder.mul(place, I64(4 * lanes * vectors))])
            weight = value if lanes == 1 else splat(builder, value, lanes)
            inputs = [read(builder, row, I64(4 * lanes * v), element) for v in range(vectors)]
            return [builder.call(multiply_add, [i, weight, a]) for i, a in zip(inputs, acc, strict=True)]

        def loop(begin, end, step, acc, body):
            """``acc`` after ``body(i, acc)`` for i from begin by step to end; phi nodes carry the sums."""
            before, head = builder.block, builder.append_basic_block("head")
            inside, after = builder.append_basic_block("inside"), builder.append_basic_block("after")
            builder.branch(head)
            builder.position_at_end(head)
            index = builder.phi(I64)
            index.add_incoming(begin, before)
            phis = [builder.phi(element) for _ in acc]
            for phi, value in zip(phis, acc, strict=True):
                phi.add_incoming(value, before)
            following = builder.add(index, I64(step))
            builder.cbranch(builder.icmp_signed("<=", following, end), inside, after)
            builder.position_at_end(inside)
            new = body(index, phis)
            for phi, value in zip([index, *phis], [following, *new], strict=True):
                phi.add_incoming(value, builder.block)
            builder.branch(head)
            builder.position_at_end(after)
            return index, phis

        size = 1 if integers else 4

        def several(index, acc):
            four = _widened(builder, builder.gep(values, [builder.mul(index, I64(size))]), UNROLLED, integers)
            new = []
            for i in range(UNROLLED):
                value = builder.extract_element(four, I32(i))
                new += added(acc[i * vectors : (i + 1) * vectors], builder.add(index, I64(i)), value)
            return new

        def single(index, acc):
            one = _widened(builder, builder.gep(values, [builder.mul(index, I64(size))]), 1, integers)
            return added(acc, index, builder.extract_element(one, I32(0)))

        zero = ir.Constant(element, 0.0 if lanes == 1 else [0.0] * lanes)
        index, acc = loop(first, last, UNROLLED, [zero] * (UNROLLED * vectors), several)
        _, head = loop(index, last, 1, acc[:vectors], single)
        parts = [head, *(acc[i * vectors : (i + 1) * vectors] for i in range(1, UNROLLED))]
        for v in range(vectors):
            a, b, c, d = (part[v] for part in parts)
            total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
            place = builder.gep(sums, [I64(4 * lanes * v)])
            builder.store(total, builder.bitcast(place, element.as_pointer()), align=4)

    @intrinsic
    def run(typing_context, x, values, columns, first, last, sums):
        def lower(context, builder, signature, args):
            x, values, columns, first, last, sums = args
            x, values, columns, sums = (builder.inttoptr(a, I8.as_pointer()) for a in (x, values, columns, sums))
            emit(builder, x, values, columns, first, last, sums)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), lower

    return run
