"""An MLP of one output and that output's gradient by the inputs, in one call: blocks of rows, as ``mlp_engine.py``.

    forward      h_l = act(q(h_l-1) @ weight_l^T * row_scale * scale_l + bias_l)         every h_l is kept
    backward     g_l-1 = (g_l * act'(h_l) * scale_l) @ weight_l                          from g = act'(y) * last

The rounding of rows counts as the identity. The second product runs on the transposed weights, packed as the first's
are, with rows in fp32. Only activations whose slope follows from their output are taken, and no LayerNorm.

    back    int64 per hidden layer: its transposed weights, packed
    y       [m] fp32     gradient  [m, columns] fp32, the inputs side by side
"""

from numba import types
from numpy import float32

from .activations import ACTIVATIONS, ONE, ZERO, exp, inlined
from .linear import BLOCK
from .mlp_engine import HEADER, HIDDEN, LAST, dot, gather
from .pointers import f32, i64, load, stack, store
from .rows import take_rows
from .sweep import sweep
from .tile import PANEL, Float, Int8


@inlined
def none(y, _):
    return ONE


@inlined
def relu(y, _):
    return ZERO if y <= ZERO else ONE


@inlined
def leaky_relu(y, slope):
    return ONE if y > ZERO else slope


@inlined
def elu(y, alpha):
    return ONE if y > ZERO else y + alpha


@inlined
def tanh(y, _):
    return ONE - y * y


@inlined
def sigmoid(y, _):
    return y * (ONE - y)


@inlined
def softplus(y, _):
    return ONE - exp(-y)


# from the output, which tells the side of 0 where the parameter, if there is one, is above 0
SLOPES = {f.__name__: f for f in (none, relu, leaky_relu, elu, tanh, sigmoid, softplus)}


def pulling(names: tuple[str, ...]):
    """One row's g * act'(h) * scale, in place; ``code`` says which of the activations it is at run time."""
    slope = SLOPES[names[0]]

    @inlined
    def pull(code, g, h, scale, width, parameter):
        for j in range(width):
            store(f32(g), j, load(f32(g), j) * slope(load(f32(h), j), parameter) * load(f32(scale), j))

    if len(names) == 1:
        return pull
    others = pulling(names[1:])

    @inlined
    def select(code, g, h, scale, width, parameter):
        if code == 0:
            pull(code, g, h, scale, width, parameter)
        else:
            others(code - 1, g, h, scale, width, parameter)

    return select


def build(kind: Int8 | Float, back_kind: Float, hidden: tuple[str, ...], last: str):
    """The kernel's Python and its argument letters, for hidden layers of these activations."""
    take, compute, item = take_rows(kind), sweep(kind, hidden, 16), kind.item
    take_back, compute_back = take_rows(back_kind), sweep(back_kind, ("none",), 16)
    activate, slope, pull = ACTIVATIONS[last], SLOPES[last], pulling(hidden)
    sums_memory = stack(types.int32, BLOCK * PANEL)
    header, last_fields, fields = len(HEADER), len(LAST), len(HIDDEN)

    def gradient(net, back, scratch, inputs, first, last_row, y, gradient):
        layers, widest, count, columns, ones = (
            load(i64(net), 0), load(i64(net), 2), load(i64(net), 3), load(i64(net), 4), load(i64(net), 7),
        )  # fmt: skip
        sums, size = sums_memory(), BLOCK * widest * 4
        taken = scratch + BLOCK * 4
        hs = taken + size
        g = hs + (layers + 1) * size
        member = net + (header + 2 * count) * 8
        for begin in range(first, last_row, BLOCK):
            rows = min(BLOCK, last_row - begin)
            gather(net, inputs, begin, rows, hs, widest, columns)
            for i in range(layers):
                layer, source, target = member + (last_fields + fields * i) * 8, hs + i * size, hs + (i + 1) * size
                packed, scale, bias, code = (
                    load(i64(layer), 0), load(i64(layer), 1), load(i64(layer), 2), load(i64(layer), 3),
                )  # fmt: skip
                n, k = load(i64(packed), 3), load(i64(packed), 4)
                row_bytes = (k + 3) // 4 * 4 * item
                take(source, widest, rows, (k + 15) // 16 * 16, 0, taken, row_bytes, scratch)
                compute(
                    packed, scale, bias, code, load(f32(layer + 32), 0), rows, taken, row_bytes, scratch, target,
                    widest, 0, (n + PANEL - 1) // PANEL, sums,
                )  # fmt: skip
                for r in range(rows):
                    for j in range(n, (n + 15) // 16 * 16):
                        store(f32(target + r * widest * 4), j, float32(0))
            weight, parameter = load(i64(member), 0), load(f32(member + 16), 0)
            n = load(i64(load(i64(member + (last_fields + fields * (layers - 1)) * 8), 0)), 3)
            vectors = (n + 15) // 16
            for r in range(rows):
                row, pulled = hs + layers * size + r * widest * 4, f32(g + r * widest * 4)
                value = activate(dot(row, weight, vectors) + load(f32(load(i64(member), 1)), 0), parameter)
                store(f32(y), begin + r, value)
                slant = slope(value, parameter)
                for j in range(vectors * 16):
                    store(pulled, j, slant * load(f32(weight), j))
            for down in range(layers):
                i = layers - 1 - down
                layer, transposed = member + (last_fields + fields * i) * 8, load(i64(back), i)
                scale, code, parameter = load(i64(layer), 1), load(i64(layer), 3), load(f32(layer + 32), 0)
                k, n = load(i64(transposed), 3), load(i64(transposed), 4)
                for r in range(rows):
                    at = r * widest * 4
                    pull(code, g + at, hs + (i + 1) * size + at, scale, (n + 15) // 16 * 16, parameter)
                row_bytes = (n + 3) // 4 * 4 * 4
                take_back(g, widest, rows, (n + 15) // 16 * 16, 0, taken, row_bytes, scratch)
                compute_back(
                    transposed, ones, 0, 0, float32(0), rows, taken, row_bytes, scratch, g, widest,
                    0, (k + PANEL - 1) // PANEL, sums,
                )  # fmt: skip
            for r in range(rows):
                row, out = f32(g + r * widest * 4), f32(gradient + (begin + r) * columns * 4)
                for j in range(columns):
                    store(out, j, load(row, j))

    return gradient, "iiibiiii"
