"""The register tile: sums of a few rows times 64 outputs, held in registers over all of K.

    x     [rows, 4 * steps] u8 (or fp32, bf16), rows ``stride`` bytes apart
    w     [steps, 64, 4] int8: one panel of packed weights; in floats as ``packing.py`` lays them
    start [64] int32 (or fp32): where the sums begin; or as much for each row, ``apart`` bytes from the last one's
    sums  [rows, 64] int32 (or fp32)

Each step broadcasts four inputs of a row and multiplies them with ``vectors`` vectors of outputs; weights are read once
for all rows. Numba would not keep such a tile in registers, so its loop is written as LLVM instructions.
A row's sums are taken in the same order whatever the tile it falls in.
"""

from contextlib import contextmanager

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .instruction_sets import I8, I32, InstructionSet, call, processor_features, signed_byte

PANEL = 64
I64, F32 = ir.IntType(64), ir.FloatType()


def read(builder, base, offset, dtype, align=4):
    place = builder.gep(base, [offset])
    return builder.load(builder.bitcast(place, dtype.as_pointer()), align=align)


def splat(builder, value, lanes):
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


class Dense:
    """A step of the loop over K: four inputs, and the four weights of each output in a 32-bit lane."""

    inputs, step_bytes = 4, 4 * PANEL
    rows_bytes = 4  # of a value of the rows and the outputs where they lie: fp32

    def step(self, builder, acc, x_rows, x_at, w, outputs):
        """acc [rows][vectors] after one step; ``w`` is where its weights begin, a vector's first output in outputs."""
        stored = [self.stored(builder, w, output) for output in outputs]
        for part in range(self.parts):
            weights = [self.weights(builder, v, part) for v in stored]
            inputs = [self.inputs_of(builder, row, x_at, part) for row in x_rows]
            acc = [
                [self.dot(builder, a, x_r, weight) for a, weight in zip(sums_r, weights, strict=True)]
                for sums_r, x_r in zip(acc, inputs, strict=True)
            ]
        return acc

    def stored(self, builder, w, output):
        """What ``weights`` takes its parts from: here all four weights of a vector of outputs."""
        return read(builder, w, builder.mul(output, I64(4)), ir.VectorType(I32, self.isa.lanes))


class Int8(Dense):
    """u8 rows times int8 weights, exact in int32; a step is one part."""

    item, element, parts = 1, I32, 1
    # multiply-adds of an MLP from which a second thread pays for its waking, some 80 us; a wide layer is twice as fast
    parallel_work = 1 << 25

    def __init__(self, isa: InstructionSet):
        self.isa, self.rows, self.dot = isa, isa.rows, isa.dot

    def weights(self, builder, w, part):
        return self.isa.split_w(builder, w)

    def inputs_of(self, builder, row, offset, part):
        return self.isa.split_x(builder, splat(builder, read(builder, row, offset, I32), self.isa.lanes))


class Float(Dense):
    """fp32 rows times int8 weights made fp32 in registers; a step is four parts, or the registers would not do."""

    item, element, parts, rows_dtype = 4, F32, 4, "float32"
    parallel_work = 1 << 24

    def __init__(self, isa: InstructionSet):
        # more rows spill the unpacked weights: 6 measured 5 % slower
        self.isa, self.rows = isa, min(isa.rows, 4)

    def weights(self, builder, w, part):
        return builder.sitofp(signed_byte(builder, w, part), ir.VectorType(F32, self.isa.lanes))

    def inputs_of(self, builder, row, offset, part):
        return splat(builder, read(builder, row, builder.add(offset, I64(4 * part)), F32), self.isa.lanes)

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


class Whole(Float):
    """fp32 rows times weights that are floats themselves, kept as fp32: four vectors of them a step."""

    step_bytes = 4 * 4 * PANEL

    def __init__(self, isa: InstructionSet):
        self.isa, self.rows = isa, isa.rows

    def stored(self, builder, w, output):
        return builder.gep(w, [builder.mul(output, I64(4))])

    def weights(self, builder, w, part):
        return read(builder, w, I64(4 * PANEL * part), ir.VectorType(F32, self.isa.lanes))


class WholeFloat16(Whole):
    """Rows rounded to fp16 first."""

    rows_dtype = "float16"


class WholeBFloat16(Whole):
    """Rows rounded to bf16 first."""

    rows_dtype = "bfloat16"


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """llvmlite has no such type."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


class PairsBFloat16(Float):
    """Rows rounded to bf16 times weights in bf16, two and two in one instruction, added in fp32.

    int8 weights are whole numbers that bf16 holds exactly. Only for processors that multiply bf16: ``multiplies``.
    """

    item, step_bytes, parts, rows_dtype = 2, 4 * 2 * PANEL, 2, "bfloat16"
    parallel_work = 1 << 25

    def __init__(self, isa: InstructionSet):
        self.isa, self.rows = isa, isa.rows

    @staticmethod
    def multiplies(isa: InstructionSet) -> bool:
        return isa.lanes == 16 and "avx512bf16" in processor_features()

    def stored(self, builder, w, output):
        return builder.gep(w, [builder.mul(output, I64(4))])

    def weights(self, builder, w, part):
        return read(builder, w, I64(4 * PANEL * part), ir.VectorType(I32, self.isa.lanes))

    def inputs_of(self, builder, row, offset, part):
        return splat(builder, read(builder, row, builder.add(offset, I64(4 * part)), I32), self.isa.lanes)

    def dot(self, builder, acc, x, w):
        x, w = (builder.bitcast(v, ir.VectorType(_BFloat(), 2 * self.isa.lanes)) for v in (x, w))
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", acc.type, acc, x, w)


class RowsBFloat16(PairsBFloat16):
    """Of rows that are bf16, to outputs in bf16."""

    rows_bytes = 2


def emit(builder, kind, rows, vectors, x, stride, w, steps, columns, start, apart, sums):
    """The tile's instructions; every pointer is an i8*, every other argument an i64."""
    isa = kind.isa
    element = ir.VectorType(kind.element, isa.lanes)
    x_rows = [builder.gep(x, [builder.mul(stride, I64(r))]) for r in range(rows)]
    with passes(builder, isa, vectors, columns) as column:
        outputs = [builder.add(column, I64(v * isa.lanes)) for v in range(vectors)]
        columns_at = [builder.mul(output, I64(4)) for output in outputs]
        starts = [builder.gep(start, [builder.mul(apart, I64(r))]) for r in range(rows)]
        first = [[read(builder, row, at, element) for at in columns_at] for row in starts]
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
        for row, values in zip(acc, first, strict=True):
            for phi, value in zip(row, values, strict=True):
                phi.add_incoming(value, before)
        w_step = builder.gep(w, [builder.mul(step, I64(kind.step_bytes))])
        x_at = builder.mul(step, I64(kind.inputs * kind.item))
        new = kind.step(builder, acc, x_rows, x_at, w_step, outputs)
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


@contextmanager
def passes(builder, isa, vectors, columns):
    """A loop over the panel's outputs, ``vectors`` at a time; the narrower tiles are only given what is one pass."""
    width = isa.lanes * vectors
    if width == PANEL or vectors < isa.vectors:
        yield I64(0)
        return
    with cgutils.for_range_slice(builder, I64(0), columns, I64(width), intp=I64) as (column, _):
        yield column


def tile(kind, rows, vectors):
    """The tile as a function for kernels: (x, stride, w, steps, columns, start, apart, sums), addresses and integers.

    It covers the first ``columns`` of the 64, rounded up to whole passes of ``vectors``: with fewer vectors than the
    instruction set's, one pass.
    """

    @intrinsic
    def run(typing_context, x, stride, w, steps, columns, start, apart, sums):
        def lower(context, builder, signature, args):
            x, stride, w, steps, columns, start, apart, sums = args
            x, w, start, sums = (builder.inttoptr(a, I8.as_pointer()) for a in (x, w, start, sums))
            emit(builder, kind, rows, vectors, x, stride, w, steps, columns, start, apart, sums)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), lower

    return run
