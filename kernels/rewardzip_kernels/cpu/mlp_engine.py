"""A whole MLP, or an ensemble, in one call: blocks of rows pass through all layers while they are in cache.

    h = x     per hidden layer: h = act(norm(q(h) @ weight^T * row_scale * scale + bias))     y = act(h @ last^T + bias)

``Int8`` quantises every row anew before each hidden layer, ``Float`` keeps it fp32 or rounds it to 16 bits; the last
layer is fp32 in both: of few outputs a dot product each, of many packed like the others.

    net     int64: a header (HEADER), the width and position of each input in a row, then per member its last layer
            (LAST) and its hidden layers (HIDDEN); parameters are the bits of an fp32, a missing LayerNorm is gamma 0
    inputs  int64 per input: address, row stride in values
    scratch row scales, the rows as the tile reads them, the rows as fp32, both as wide as the widest layer, and with
            a mean and deviation the outputs of every member; 0 where OWN_SCRATCH bytes on the stack are enough
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy import float32, sqrt

from .activations import ACTIVATIONS, inlined
from .pointers import f32, i64, load, stack, store
from .rows import take_rows
from .sweep import finishing, sweep
from .tile import PANEL, Float, Int8, Whole

HEADER = ("hidden", "outputs", "widest", "inputs", "columns", "members", "mean_std", "ones", "member_size", "block")
LAST = ("weight", "bias", "parameter")
HIDDEN = ("packed", "scale", "bias", "code", "parameter", "gamma", "beta", "eps")
OWN_SCRATCH = 1 << 15
# the most rows of a block
MOST_ROWS = 192


@intrinsic
def dot(typing_context, a, b, vectors):
    """The sum of a[i] * b[i] over ``vectors`` times 16 fp32, in an order of its own: 16 partial sums, then in pairs."""

    def emit(context, builder, signature, args):
        vector = ir.VectorType(ir.FloatType(), 16)
        pointers = [builder.inttoptr(p, vector.as_pointer()) for p in args[:2]]
        total = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * 16))
        builder.store(ir.Constant(vector, [0.0] * 16), total)
        function_type = ir.FunctionType(vector, [vector] * 3)
        multiply_add = cgutils.get_or_insert_function(builder.module, function_type, "llvm.fmuladd.v16f32")
        with cgutils.for_range(builder, args[2], intp=ir.IntType(64)) as loop:
            x, y = (builder.load(builder.gep(p, [loop.index]), align=4) for p in pointers)
            builder.store(builder.call(multiply_add, [x, y, builder.load(total)]), total)
        total, half = builder.load(total), 8
        while half:
            indices = [ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(s, s + half))) for s in (0, half)]
            low, high = (builder.shuffle_vector(total, total, i) for i in indices)
            total, half = builder.fadd(low, high), half // 2
        return builder.extract_element(total, ir.IntType(32)(0))

    return types.float32(types.int64, types.int64, types.int64), emit


@inlined
def gather(net, inputs, begin, rows, y, y_stride, columns):
    """Each row's inputs side by side, zeros between them and up to a multiple of 16."""
    for r in range(rows):
        row = f32(y + r * y_stride * 4)
        for j in range((columns + 15) // 16 * 16):
            store(row, j, float32(0))
        for i in range(load(i64(net), 3)):
            width, position = load(i64(net), len(HEADER) + 2 * i), load(i64(net), len(HEADER) + 2 * i + 1)
            x = f32(load(i64(inputs), 2 * i) + (begin + r) * load(i64(inputs), 2 * i + 1) * 4)
            for j in range(width):
                store(row, position + j, load(x, j))


@inlined
def statistics(ys, members, count, mean_at, deviation_at):
    """Over the members: their mean, and their standard deviation over E - 1."""
    for i in range(count):
        total, squares = float32(0), float32(0)
        for e in range(members):
            total += load(f32(ys), e * count + i)
        mean = total / float32(members)
        for e in range(members):
            distance = load(f32(ys), e * count + i) - mean
            squares += distance * distance
        store(f32(mean_at), i, mean)
        store(f32(deviation_at), i, sqrt(squares / float32(members - 1)))


def build(kind: Int8 | Float, hidden: tuple[str, ...], last: str, normed: bool, tiled: bool):
    """The kernel's Python and its argument letters, for hidden layers of these activations.

    Where there is a LayerNorm, ``normed``, the first of them is "none". ``tiled``: the last layer's weight is packed.
    """
    take, compute, item, activate = take_rows(kind), sweep(kind, hidden, 16), kind.item, ACTIVATIONS[last]
    finish = finishing(f32, hidden)
    sums_memory = stack(types.int32, MOST_ROWS * PANEL)
    own_memory = stack(types.int8, OWN_SCRATCH)
    header, last_fields, fields = len(HEADER), len(LAST), len(HIDDEN)

    def normalise(layer, h, stride, rows, width, ones, scales):
        code, parameter = load(i64(layer), 3), load(f32(layer + 32), 0)
        gamma, beta, eps = load(i64(layer), 5), load(i64(layer), 6), load(f32(layer + 56), 0)
        vectors = (width + 15) // 16
        for r in range(rows):
            row = h + r * stride * 4
            for j in range(width, vectors * 16):
                store(f32(row), j, float32(0))
            mean = dot(row, ones, vectors) / float32(width)
            for j in range(width):
                store(f32(row), j, load(f32(row), j) - mean)
            variance = dot(row, row, vectors) / float32(width)
            store(f32(scales), 0, float32(1) / sqrt(variance + eps))
            finish(code, row, 1, vectors * 16, f32(scales), f32(gamma), f32(beta), row, stride, parameter)

    def skip(layer, h, stride, rows, width, ones, scales):
        pass

    # a second copy of the epilogue, compiled only where it is needed
    normalise = inlined(normalise if normed else skip)

    def one_by_one(member, h, stride, rows, vectors, outputs, ones, scales, out, sums):
        weight, bias, parameter = load(i64(member), 0), load(i64(member), 1), load(f32(member + 16), 0)
        for r in range(rows):
            row = h + r * stride * 4
            for o in range(outputs):
                value = dot(row, weight + o * vectors * 64, vectors) + load(f32(bias), o)
                store(f32(out), r * outputs + o, activate(value, parameter))

    whole = sweep(Whole(kind.isa), (last,))

    def in_tiles(member, h, stride, rows, vectors, outputs, ones, scales, out, sums):
        weight, bias, parameter = load(i64(member), 0), load(i64(member), 1), load(f32(member + 16), 0)
        for r in range(rows):
            store(f32(scales), r, float32(1))
        panels = (outputs + PANEL - 1) // PANEL
        whole(weight, ones, bias, 0, parameter, rows, h, stride * 4, scales, out, outputs, 0, panels, sums)

    finish_last = inlined(in_tiles if tiled else one_by_one)

    def mlp(net, scratch, inputs, first, last_row, m, y):
        layers, outputs, widest, count, columns, members, mean_std, ones, member_size, block = (
            load(i64(net), 0), load(i64(net), 1), load(i64(net), 2), load(i64(net), 3), load(i64(net), 4),
            load(i64(net), 5), load(i64(net), 6), load(i64(net), 7), load(i64(net), 8), load(i64(net), 9),
        )  # fmt: skip
        sums, own = sums_memory(), own_memory()
        if scratch == 0:
            scratch = own
        taken = scratch + block * 4
        h = taken + block * widest * item
        ys = h + block * widest * 4
        for begin in range(first, last_row, block):
            rows = min(block, last_row - begin)
            for e in range(members):
                member = net + (header + 2 * count + e * member_size) * 8
                width = columns
                if count == 1 and columns % 16 == 0 and layers > 0:
                    source_stride = load(i64(inputs), 1)
                    source = load(i64(inputs), 0) + begin * source_stride * 4
                else:
                    source, source_stride = h, widest
                    gather(net, inputs, begin, rows, h, widest, columns)
                for i in range(layers):
                    layer = member + (last_fields + fields * i) * 8
                    packed, scale, bias, gamma = (
                        load(i64(layer), 0), load(i64(layer), 1), load(i64(layer), 2), load(i64(layer), 5),
                    )  # fmt: skip
                    code = 0 if gamma else load(i64(layer), 3)
                    n, k = load(i64(packed), 3), load(i64(packed), 4)
                    row_bytes = (k + 3) // 4 * 4 * item
                    take(source, source_stride, rows, (k + 15) // 16 * 16, 0, taken, row_bytes, scratch)
                    compute(
                        packed, scale, bias, code, load(f32(layer + 32), 0), rows, taken, row_bytes, scratch, h, widest,
                        0, (n + PANEL - 1) // PANEL, sums,
                    )  # fmt: skip
                    if gamma:
                        normalise(layer, h, widest, rows, n, ones, scratch)
                    source, source_stride, width = h, widest, (n + 15) // 16 * 16
                    for r in range(rows):
                        for j in range(n, width):
                            store(f32(h + r * widest * 4), j, float32(0))
                if mean_std:
                    out = ys + e * rows * outputs * 4
                else:
                    out = y + (e * m + begin) * outputs * 4
                finish_last(member, h, widest, rows, width // 16, outputs, ones, scratch, out, sums)
            if mean_std:
                statistics(ys, members, rows * outputs, y + begin * outputs * 4, y + (m + begin) * outputs * 4)

    return mlp, "iibiiii"
