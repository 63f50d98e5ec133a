"""The register tile of sparse pieces: sums of a few rows times 16 outputs, over the pieces that are stored.

    x     [steps][rows][4] u8 (or fp32): the rows' inputs interleaved, so that one offset finds a piece's inputs of all
    w     [P][16][4] int8 (or [P][4][16] fp32): pieces of 4 inputs x 16 outputs
    at    [P] int32: the step whose inputs a piece takes
    start [16] int32 (or fp32): where the sums begin
    sums  [rows][64] int32 (or fp32): 16 of the 64 are written

A piece costs one read of its index and its weights, then a broadcast and a dot product per row. Sums of few rows are
spread over several registers a row, or each dot product would wait for the one before. A float row's sums are taken in
the same order whatever the tile it falls in.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .instruction_sets import I8, I32
from .tile import F32, I64, PANEL, Float, Int8, read

OUTPUTS = 16


class Wide(Float):
    """fp32 rows times weights kept as fp32, from 16-bit values."""

    def piece(self, builder, w, index, lane):
        at = builder.add(builder.mul(index, I64(4 * OUTPUTS * 4)), I64(4 * lane))
        vector = ir.VectorType(F32, self.isa.lanes)
        return [read(builder, w, builder.add(at, I64(4 * OUTPUTS * part)), vector) for part in range(4)]


def piece(kind, builder, w, index, lane):
    """What each part of a step multiplies the inputs with: outputs ``lane`` onwards of one piece."""
    if isinstance(kind, Wide):
        return kind.piece(builder, w, index, lane)
    at = builder.add(builder.mul(index, I64(4 * OUTPUTS)), I64(4 * lane))
    raw = read(builder, w, at, ir.VectorType(I32, kind.isa.lanes))
    return [kind.weights(builder, raw, part) for part in range(kind.parts)]


def heights(kind) -> tuple[int, ...]:
    """Rows of the tiles, tallest first: sums, one weight and one input fill the registers. Powers of two for int8."""
    wide = kind.isa.lanes * kind.isa.vectors >= 64 or kind.isa.name == "neon_dot"
    if isinstance(kind, Float):
        return (6, 1) if wide else (2, 1)
    return (16, 4, 1) if wide else (8, 1) if kind.isa.lanes == 8 else (4, 1)


def loop(builder, first, last, step, values, body):
    """``body(i, values)`` for i in range(first, last, step), its results the next values; (the last i, the values)."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(f"pieces.{name}") for name in ("head", "loop", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(I64)
    i.add_incoming(first, before)
    phis = [builder.phi(v.type) for v in values]
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, before)
    following = builder.add(i, I64(step))
    builder.cbranch(builder.icmp_signed("<=", following, last), inside, after)
    builder.position_at_end(inside)
    new = body(i, phis)
    i.add_incoming(following, builder.block)
    for phi, value in zip(phis, new, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return i, phis


def emit(builder, kind, rows, x, w, at, first, last, start, sums):
    """The tile's instructions; every pointer is an i8*, ``first`` and ``last`` i64."""
    lanes, vector = kind.isa.lanes, ir.VectorType(kind.element, kind.isa.lanes)
    unroll = max(1, 4 // rows) if kind.parts == 1 else 1
    chains = unroll * kind.parts
    add = builder.fadd if kind.element is F32 else builder.add
    x_rows = [builder.gep(x, [I64(4 * kind.item * r)]) for r in range(rows)]

    def pieces(lane, count):
        """A loop's body: ``count`` pieces, outputs ``lane`` onwards."""

        def body(i, acc):
            acc = list(acc)
            for u in range(count):
                index = builder.add(i, I64(u))
                weights = piece(kind, builder, w, index, lane)
                step = builder.zext(read(builder, at, builder.mul(index, I64(4)), I32), I64)
                offset = builder.mul(step, I64(4 * kind.item * rows))
                for part, weight in enumerate(weights):
                    for r, row in enumerate(x_rows):
                        c = r * chains + u * kind.parts + part
                        acc[c] = kind.dot(builder, acc[c], kind.inputs_of(builder, row, offset, part), weight)
            return acc

        return body

    for lane in range(0, OUTPUTS, lanes):
        begin = read(builder, start, I64(4 * lane), vector)
        zero = ir.Constant(vector, [0] * lanes)
        values = [begin if chain == 0 else zero for _ in range(rows) for chain in range(chains)]
        i, values = loop(builder, first, last, unroll, values, pieces(lane, unroll))
        if unroll > 1:
            _, values = loop(builder, i, last, 1, values, pieces(lane, 1))
        for r in range(rows):
            parts = values[r * chains : (r + 1) * chains]
            while len(parts) > 1:
                parts = [add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
            place = builder.gep(sums, [I64(4 * (PANEL * r + lane))])
            builder.store(parts[0], builder.bitcast(place, vector.as_pointer()), align=4)


def piece_sums(kind, rows):
    """The tile as a function for kernels: (x, w, at, first, last, start, sums), addresses and integers."""

    @intrinsic
    def run(typing_context, x, w, at, first, last, start, sums):
        def lower(context, builder, signature, args):
            x, w, at, first, last, start, sums = args
            x, w, at, start, sums = (builder.inttoptr(a, I8.as_pointer()) for a in (x, w, at, start, sums))
            emit(builder, kind, rows, x, w, at, first, last, start, sums)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), lower

    return run


def transposed(builder, vectors):
    """A square of dwords, a vector a row: at each distance, halves of two rows change places."""
    size, distance = len(vectors), 1
    while distance < size:
        new = list(vectors)
        for i in (i for i in range(size) if not i & distance):
            a, b = vectors[i], vectors[i + distance]
            low = [j if not j & distance else size + j - distance for j in range(size)]
            high = [j + distance if not j & distance else size + j for j in range(size)]
            for place, lanes in ((i, low), (i + distance, high)):
                new[place] = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, size), lanes))
        vectors, distance = new, 2 * distance
    return vectors


def interleave(kind, rows):
    """Rows one after the other to rows interleaved, a step at a time: (rows, their bytes, steps, interleaved).

    int8 moves squares of ``rows`` steps, so it reads and writes up to a multiple of those.
    """
    square = rows if isinstance(kind, Int8) else 1
    item = ir.VectorType(I32, square if isinstance(kind, Int8) else 4)

    @intrinsic
    def run(typing_context, x, row_bytes, steps, mixed):
        def lower(context, builder, signature, args):
            x, row_bytes, steps, mixed = args
            x, mixed = (builder.inttoptr(a, I8.as_pointer()) for a in (x, mixed))
            x_rows = [builder.gep(x, [builder.mul(row_bytes, I64(r))]) for r in range(rows)]
            end = builder.mul(builder.udiv(builder.add(steps, I64(square - 1)), I64(square)), I64(square))

            def body(step, _):
                taken = [read(builder, row, builder.mul(step, I64(4 * kind.item)), item) for row in x_rows]
                if square > 1:
                    taken = transposed(builder, taken)
                place = builder.gep(mixed, [builder.mul(step, I64(4 * kind.item * rows))])
                for i, vector in enumerate(taken):
                    target = builder.gep(place, [I64(4 * kind.item * (rows if square > 1 else 1) * i)])
                    builder.store(vector, builder.bitcast(target, item.as_pointer()), align=4)
                return []

            loop(builder, I64(0), end, square, [], body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), lower

    return run
