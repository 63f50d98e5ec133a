"""A whole MLP in one call: blocks of 48 rows pass through all layers while they are in cache.

    h = x     per hidden layer: h = act(q(h) @ weight^T * row_scale * scale + bias)     y = act(h @ last^T + last_bias)

``Int8`` quantises every row anew before each hidden layer, ``Float`` keeps it fp32; the last layer is fp32 in both.

    net     int64: hidden layers, outputs, last weight [outputs, padded], last bias, then per hidden layer
            the address of its packed header, of its scale, of its bias (0: none)
    scratch row scales, the rows as the tile reads them, the rows as fp32, both as wide as the widest layer
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .activations import ACTIVATIONS
from .linear import BLOCK
from .pointers import f32, i64, load, stack, store
from .rows import take_rows
from .sweep import sweep
from .tile import PANEL, Float, Int8

FIELDS = 4


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


def build(kind: Int8 | Float, hidden: str, last: str):
    """The kernel's Python and its argument letters: one activation for the hidden layers, one for the last."""
    take, compute, item, activate = take_rows(kind), sweep(kind, hidden), kind.item, ACTIVATIONS[last]
    sums_memory = stack(types.int32, kind.rows * PANEL)

    def mlp(net, widest, hidden_parameter, last_parameter, scratch, x, stride, m, y):
        layers, outputs, last_weight, last_bias = (
            load(i64(net), 0), load(i64(net), 1), load(i64(net), 2), load(i64(net), 3),
        )  # fmt: skip
        taken, sums = scratch + BLOCK * 4, sums_memory()
        h = taken + BLOCK * widest * item
        for begin in range(0, m, BLOCK):
            rows = min(BLOCK, m - begin)
            source, source_stride = x + begin * stride * 4, stride
            width = 0
            for i in range(layers):
                field = FIELDS + 3 * i
                layer, scale, bias = load(i64(net), field), load(i64(net), field + 1), load(i64(net), field + 2)
                n, k = load(i64(layer), 3), load(i64(layer), 4)
                row_bytes = (k + 3) // 4 * 4 * item
                take(source, source_stride, rows, k, 0, taken, row_bytes, scratch)
                panels = (n + PANEL - 1) // PANEL
                compute(
                    layer, scale, bias, hidden_parameter, rows, taken, row_bytes, scratch, h, widest, 0, panels, sums
                )  # fmt: skip
                source, source_stride, width = h, widest, n
            vectors = (width + 15) // 16
            for r in range(rows):
                row = h + r * widest * 4
                for j in range(width, vectors * 16):
                    store(f32(row), j, 0.0)
                for o in range(outputs):
                    value = dot(row, last_weight + o * vectors * 64, vectors) + load(f32(last_bias), o)
                    store(f32(y), (begin + r) * outputs + o, activate(value, last_parameter))

    return mlp, "iiffiiiii"
