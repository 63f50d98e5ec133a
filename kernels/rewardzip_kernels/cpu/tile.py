"""The register tile: sums of a few rows times 64 outputs, held in registers over all of K.

    x     [rows, 4 * steps] u8 (or fp32), rows ``stride`` bytes apart
    w     [steps, 64, 4] int8: one panel of packed weights
    start [64] int32 (or fp32): where the sums begin
    sums  [rows, 64] int32 (or fp32)

Each step broadcasts four inputs of a row and multiplies them with ``vectors`` vectors of outputs; weights are read once
for all rows. Numba would not keep such a tile in registers, so its loop is written as LLVM instructions.
A row's sums are taken in the same order whatever the tile it falls in.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .instruction_sets import I8, I32, InstructionSet, signed_byte

PANEL = 64
I64, F32 = ir.IntType(64), ir.FloatType()


def _read(builder, base, offset, dtype):
    place = builder.gep(base, [offset])
    return builder.load(builder.bitcast(place, dtype.as_pointer()), align=4)


def _splat(builder, value, lanes):
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


class Int8:
    """u8 rows times int8 weights, exact in int32; a step is one part."""

    item, element, parts = 1, I32, 1
    # multiply-adds from which a second thread pays for its waking, some 20 us
    parallel_work = 1 << 25

    def __init__(self, isa: InstructionSet):
        self.isa, self.rows, self.dot = isa, isa.rows, isa.dot

    def weights(self, builder, w, part):
        return self.isa.split_w(builder, w)

    def inputs(self, builder, row, offset, part):
        return self.isa.split_x(builder, _splat(builder, _read(builder, row, offset, I32), self.isa.lanes))


class Float:
    """fp32 rows times int8 weights made fp32 in registers; a step is four parts, or the registers would not do."""

    item, element, parts, rows_dtype = 4, F32, 4, "float32"
    parallel_work = 1 << 23

    def __init__(self, isa: InstructionSet):
        # more rows spill the unpacked weights: 6 measured 5 % slower
        self.isa, self.rows = isa, min(isa.rows, 4)

    def weights(self, builder, w, part):
        return builder.sitofp(signed_byte(builder, w, part), ir.VectorType(F32, self.isa.lanes))

    def inputs(self, builder, row, offset, part):
        return _splat(builder, _read(builder, row, builder.add(offset, I64(4 * part)), F32), self.isa.lanes)

    def dot(self, builder, acc, x, w):
        function_type = ir.FunctionType(acc.type, [acc.type] * 3)
        name = f"llvm.fmuladd.v{self.isa.lanes}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [x, w, acc])


class Float16(Float):
    """Rows rounded to fp16 first."""

    rows_dtype = "float16"


class BFloat16(Float):
    """Rows rounded to bf16 first."""

    rows_dtype = "bfloat16"


def emit(builder, kind, rows, vectors, x, stride, w, steps, columns, start, sums):
    """The tile's instructions; every pointer is an i8*, every other argument an i64."""
    isa = kind.isa
    vector, element = ir.VectorType(I32, isa.lanes), ir.VectorType(kind.element, isa.lanes)
    width = isa.lanes * vectors
    x_rows = [builder.gep(x, [builder.mul(stride, I64(r))]) for r in range(rows)]
    with cgutils.for_range_slice(builder, I64(0), columns, I64(width), intp=I64) as (column, _):
        columns_at = [builder.mul(builder.add(column, I64(v * isa.lanes)), I64(4)) for v in range(vectors)]
        first = [_read(builder, start, at, element) for at in columns_at]
        before, loop, after = (
            builder.block,
            builder.append_basic_block("tile.step"),
            builder.append_basic_block("tile.end"),
        )
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(I64)
        step.add_incoming(I64(0), before)
        acc = [[builder.phi(element) for _ in columns_at] for _ in range(rows)]
        for row in acc:
            for phi, value in zip(row, first, strict=True):
                phi.add_incoming(value, before)
        w_at = builder.mul(step, I64(4 * PANEL))
        raw = [_read(builder, w, builder.add(w_at, at), vector) for at in columns_at]
        x_at = builder.mul(step, I64(4 * kind.item))
        new = acc
        for part in range(kind.parts):
            weights = [kind.weights(builder, v, part) for v in raw]
            inputs = [kind.inputs(builder, row, x_at, part) for row in x_rows]
            new = [
                [kind.dot(builder, a, x_r, weight) for a, weight in zip(sums_r, weights, strict=True)]
                for sums_r, x_r in zip(new, inputs, strict=True)
            ]
        following = builder.add(step, I64(1))
        step.add_incoming(following, loop)
        for row, values in zip(acc, new, strict=True):
            for phi, value in zip(row, values, strict=True):
                phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
        builder.position_at_end(after)
        for r, values in enumerate(new):
            for at, value in zip(columns_at, values, strict=True):
                place = builder.gep(sums, [builder.add(at, I64(4 * PANEL * r))])
                builder.store(value, builder.bitcast(place, element.as_pointer()), align=4)


def tile(kind, rows, vectors):
    """The tile as a function for kernels: (x, stride, w, steps, columns, start, sums), addresses and integers.

    It covers the first ``columns`` of the 64, rounded up to whole passes of ``vectors``.
    """

    @intrinsic
    def run(typing_context, x, stride, w, steps, columns, start, sums):
        def lower(context, builder, signature, args):
            x, stride, w, steps, columns, start, sums = args
            x, w, start, sums = (builder.inttoptr(a, I8.as_pointer()) for a in (x, w, start, sums))
            emit(builder, kind, rows, vectors, x, stride, w, steps, columns, start, sums)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), lower

    return run
