"""How a kernel takes in the rows of x: quantised to bytes, or copied as fp32. Both pad a row to a multiple of 4."""

from numpy import float32, int32, rint, uint8

from ..quantize import QMAX, TINY
from .activations import inlined
from .pointers import bits, f32, from_bits, load, store, u8

LIMIT, SMALLEST, NAN = float32(QMAX), float32(TINY), float32("nan")
ABSOLUTE, INFINITE = int32(0x7FFFFFFF), int32(0x7F800000)


def quantize(zero_point):
    """``quantize_rows`` for one row, its integers moved by ``zero_point``; returns the row's scale."""

    @inlined
    def fill(x_address, k, padded, static_address, q_address):
        x, q = f32(x_address), u8(q_address)
        # as integers, the bits of absolute values are in the order of the values, inf and NaN above all
        largest = int32(0)
        for i in range(k):
            largest = max(largest, bits(load(x, i)) & ABSOLUTE)
        for i in range(k, padded):
            store(q, i, uint8(zero_point))
        if largest >= INFINITE:
            for i in range(k):
                store(q, i, uint8(zero_point))
            return NAN
        if static_address:
            step = load(f32(static_address), 0)
            inverse = float32(1) / step
        else:
            amax = max(from_bits(largest), SMALLEST)
            step, inverse = amax / LIMIT, LIMIT / amax
        for i in range(k):
            value = min(max(load(x, i) * inverse, -LIMIT), LIMIT)
            store(q, i, uint8(int32(rint(value)) + int32(zero_point)))
        return step

    return fill


@inlined
def copy(x_address, k, padded, _, copy_address):
    x, y = f32(x_address), f32(copy_address)
    for i in range(k):
        store(y, i, load(x, i))
    for i in range(k, padded):
        store(y, i, float32(0))
    return float32(1)
