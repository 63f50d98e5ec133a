"""How a kernel takes in rows: as bytes, as fp32, rounded or not, or as bf16. All pad a row to a multiple of 4."""

from numpy import float32, int32, rint, uint8, uint16

from ..quantize import QMAX, TINY
from .activations import INFINITY, inlined
from .pointers import as_bits, f32, from_bits, load, magnitude, store, u8, u16
from .tile import Int8, PairsBFloat16, RowsBFloat16

LIMIT, SMALLEST, NAN = float32(QMAX), float32(TINY), float32("nan")
INFINITE, SMALLEST_FLOAT16 = int32(0x7F800000), int32(0x38800000)


def quantize(zero_point):
    """``quantize_rows`` for one row, its integers moved by ``zero_point``; returns the row's scale."""

    @inlined
    def fill(x_address, k, padded, static_address, q_address):
        x, q = f32(x_address), u8(q_address)
        largest = int32(0)
        for i in range(k):
            largest = max(largest, magnitude(load(x, i)))
        for i in range(k, padded):
            store(q, i, uint8(zero_point))
        if largest >= INFINITE:
            for i in range(k):
                store(q, i, uint8(zero_point))
            return NAN
        if static_address:
            step = load(f32(static_address), 0)
            inverse = float32(1) / step
            for i in range(k):
                value = min(max(load(x, i) * inverse, -LIMIT), LIMIT)
                store(q, i, uint8(int32(rint(value)) + int32(zero_point)))
            return step
        # nothing to clamp: rounded twice, the largest is 127 (1 + 2^-23) at most
        amax = max(from_bits(largest), SMALLEST)
        inverse = LIMIT / amax
        for i in range(k):
            store(q, i, uint8(int32(rint(load(x, i) * inverse)) + int32(zero_point)))
        return amax / LIMIT

    return fill


@inlined
def as_it_is(x):
    return x


@inlined
def to_float16(x):
    """To the nearest fp16, ties to even; below its smallest normal number, to a multiple of 2^-24."""
    bits = magnitude(x)
    y = from_bits((bits + int32(0xFFF) + (bits >> int32(13) & int32(1))) & ~int32(0x1FFF))
    y = (from_bits(bits) + float32(0.5)) - float32(0.5) if bits < SMALLEST_FLOAT16 else y
    y = INFINITY if y > float32(65504) else y
    y = -y if x < float32(0) else y
    return y if x == x else x


@inlined
def to_bfloat16(x):
    bits = magnitude(x)
    y = from_bits((bits + int32(0x7FFF) + (bits >> int32(16) & int32(1))) & ~int32(0xFFFF))
    y = -y if x < float32(0) else y
    return y if x == x else x


ROUNDINGS = {"float32": as_it_is, "float16": to_float16, "bfloat16": to_bfloat16}


def copy(source, target, converted, zero):
    @inlined
    def fill(x_address, k, padded, _, copy_address):
        x, y = source(x_address), target(copy_address)
        for i in range(k):
            store(y, i, converted(load(x, i)))
        for i in range(k, padded):
            store(y, i, zero)
        return float32(1)

    return fill


@inlined
def upper_half(x):
    """The bits of an fp32 rounded to bf16; of a NaN that only its lower half tells from inf, those of another."""
    value = to_bfloat16(x)
    return uint16(as_bits(value if value == value else NAN) >> int32(16) & int32(0xFFFF))


def take_rows(kind):
    """Rows where they lie, ``stride`` values apart, to what the tile of this kind reads, with a scale for each row."""
    if isinstance(kind, Int8):
        fill = quantize(kind.isa.zero_point)
    elif isinstance(kind, RowsBFloat16):
        fill = copy(u16, u16, as_it_is, uint16(0))
    elif isinstance(kind, PairsBFloat16):
        fill = copy(f32, u16, upper_half, uint16(0))
    else:
        fill = copy(f32, f32, ROUNDINGS[kind.rows_dtype], float32(0))
    item, size = kind.item, kind.rows_bytes

    @inlined
    def take(x, stride, rows, k, static, taken, row_bytes, scales):
        for r in range(rows):
            scale = fill(x + r * stride * size, k, row_bytes // item, static, taken + r * row_bytes)
            store(f32(scales), r, scale)

    return take
