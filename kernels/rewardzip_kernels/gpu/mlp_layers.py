"""The layers of a fused MLP on rows that are in registers: products, LayerNorm, activation, the last layer's sums."""

import triton
import triton.language as tl

from .activations import activate
from .mlp_tiles import (
    block,
    depth,
    get,
    input_tiles,
    piece_count,
    piece_start,
    piece_width,
    ragged,
    resident_index,
    slices,
    tile_piece,
    tile_start,
    vector,
    weight_tile,
    x_tile,
    x_tiles,
)


@triton.jit
def next_slice(
    h,
    weights,
    resident,
    params,
    j,
    NET: tl.constexpr,
    L: tl.constexpr,
    COMPUTE: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Slice j of layer L before its LayerNorm and activation."""
    acc = tl.zeros([h[0].shape[0], block(get(NET, L, "width"), SLICE)], tl.float32)
    for s in tl.static_range(len(h)):
        if len(resident) > 0:
            w = resident[resident_index(NET, L, s, j, SLICE)]
        else:
            start = tile_start(NET, L, s, SLICE)
            w = weight_tile(weights, start, j, NET, L, tile_piece(NET, L, s, SLICE), COMPUTE, SLICE)
        acc = tl.dot(h[s], w, acc, input_precision="tf32")
    return _scale_and_bias(acc, params, j, NET, L)


@triton.jit
def _wide_first_layer(
    xs,
    strides,
    scales_ptr,
    rows,
    weights,
    params,
    NET: tl.constexpr,
    COMPUTE: tl.constexpr,
    SLICE: tl.constexpr,
):
    """All slices of layer 0 at once, for inputs too wide to be kept: each is read once."""
    sums = ()
    for _ in tl.static_range(slices(get(NET, 0, "width"), SLICE)):
        sums = sums + (tl.zeros([rows.shape[0], block(get(NET, 0, "width"), SLICE)], tl.float32),)
    for i in tl.static_range(piece_count(NET, 0)):
        for k0 in tl.range(0, piece_width(NET, 0, i), SLICE):
            x = x_tile(xs[i], strides[i], scales_ptr, rows, k0, NET, i, SLICE).to(COMPUTE)
            sums = _add_products(sums, x, weights, k0, NET, i, SLICE)
    zs = ()
    for j in tl.static_range(len(sums)):
        zs = zs + (_scale_and_bias(sums[j], params, j, NET, 0),)
    return zs


@triton.jit
def _add_products(sums, x, weights, k0, NET: tl.constexpr, i: tl.constexpr, SLICE: tl.constexpr):
    more = ()
    for j in tl.static_range(len(sums)):
        w = weight_tile(weights, k0, j, NET, 0, i, x.dtype, SLICE)
        more = more + (tl.dot(x, w, sums[j], input_precision="tf32"),)
    return more


@triton.jit
def _scale_and_bias(acc, params, j, NET: tl.constexpr, L: tl.constexpr):
    n = j * acc.shape[1] + tl.arange(0, acc.shape[1])
    if get(NET, L, "scale") is not None:
        acc *= vector(params, get(NET, L, "scale"), n, NET, L)
    acc += vector(params, get(NET, L, "bias"), n, NET, L)
    return acc


@triton.jit
def _add_moments(mean, squares, z, j, NET: tl.constexpr, L: tl.constexpr):
    # mean and sum of squared distances of the slices so far, joined with those of slice j
    n = j * z.shape[1] + tl.arange(0, z.shape[1])
    inside = (n < get(NET, L, "width"))[None, :]
    seen = tl.zeros([1], tl.float32) + j * z.shape[1]
    count = tl.minimum(get(NET, L, "width") - seen, seen * 0.0 + z.shape[1])
    here = tl.sum(tl.where(inside, z, 0.0), axis=1) / count
    distance = tl.where(inside, z - here[:, None], 0.0)
    step = here - mean
    squares += tl.sum(distance * distance, axis=1) + step * step * (seen * count / (seen + count))
    return mean + step * (count / (seen + count)), squares


@triton.jit
def finish_slice(z, mean, inverse, params, j, NET: tl.constexpr, L: tl.constexpr):
    n = j * z.shape[1] + tl.arange(0, z.shape[1])
    if get(NET, L, "eps") is not None:
        gamma = vector(params, get(NET, L, "gamma"), n, NET, L)
        z = (z - mean[:, None]) * inverse[:, None] * gamma + vector(params, get(NET, L, "beta"), n, NET, L)
    z = activate(z, get(NET, L, "activation"), get(NET, L, "parameter"))
    if ragged(get(NET, L, "width"), z.shape[1]):
        # not 0 times something: a row with an inf has NaN here
        z = tl.where((n < get(NET, L, "width"))[None, :], z, 0.0)
    return z


@triton.jit
def _last_layer(ys, h, params, k0, o0, NET: tl.constexpr, i: tl.constexpr, EXACT: tl.constexpr):
    """ys += h @ weight[o0 ..., k0 ...]^T for fp32 h [BLOCK_M, inputs k0 ... of piece i]."""
    END: tl.constexpr = depth(NET) - 1
    WIDTH: tl.constexpr = get(NET, END, "width")
    k = k0 + tl.arange(0, h.shape[1])
    row = params + (get(NET, END, "weight") + piece_start(NET, END, i))
    inside = k < (piece_width(NET, END, i) + 15) // 16 * 16
    more = ()
    for j in tl.static_range(len(ys)):
        o = o0 + j * ys[0].shape[1] + tl.arange(0, ys[0].shape[1])
        if ys[0].shape[1] < 16:
            y = ys[j]
            for one in tl.static_range(WIDTH):
                v = tl.load(row + one * get(NET, END, "columns") + k, mask=inside, other=0.0)
                y += tl.where((o == one)[None, :], tl.sum(h * v[None, :], axis=1, keep_dims=True), 0.0)
        else:
            at = row + tl.minimum(o, WIDTH - 1)[None, :] * get(NET, END, "columns") + k[:, None]
            y = tl.dot(h, tl.load(at, mask=inside[:, None], other=0.0), ys[j], input_precision=EXACT)
        more = more + (y,)
    return more


@triton.jit
def zeros(BLOCK_M: tl.constexpr, OUT: tl.constexpr):
    ys = ()
    for _ in tl.static_range((OUT + 31) // 32):
        ys = ys + (tl.zeros([BLOCK_M, min(OUT, 32)], tl.float32),)
    return ys


@triton.jit
def network(
    xs, strides, scales_ptr, rows, o0, weights, params, resident,
    NET: tl.constexpr, COMPUTE: tl.constexpr, SLICE: tl.constexpr, OUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    END: tl.constexpr = depth(NET) - 1
    WIDE: tl.constexpr = min(OUT, 32)
    ys = zeros(rows.shape[0], OUT)
    if END == 0:
        for i in tl.static_range(piece_count(NET, 0)):
            for k0 in tl.range(0, piece_width(NET, 0, i), SLICE):
                x = x_tile(xs[i], strides[i], scales_ptr, rows, k0, NET, i, SLICE).to(tl.float32)
                ys = _last_layer(ys, x, params, k0, o0, NET, i, EXACT)
    h = ()
    if END > 0 and input_tiles(NET, 0, SLICE) * SLICE <= 256:
        h = x_tiles(xs, strides, scales_ptr, rows, NET, COMPUTE, SLICE)
    for L in tl.static_range(END):
        ys, h = _layer(
            ys, h, xs, strides, scales_ptr, rows, o0, weights, params, resident, NET, L, COMPUTE, SLICE, EXACT
        )
    done = ()
    for j in tl.static_range(len(ys)):
        z = ys[j] + vector(params, get(NET, END, "bias"), o0 + j * WIDE + tl.arange(0, WIDE), NET, END)
        done = done + (activate(z, get(NET, END, "activation"), get(NET, END, "parameter")),)
    return done


@triton.jit
def _layer(
    ys, h, xs, strides, scales_ptr, rows, o0, weights, params, resident,
    NET: tl.constexpr, L: tl.constexpr, COMPUTE: tl.constexpr, SLICE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = L == depth(NET) - 2
    NORM: tl.constexpr = get(NET, L, "eps") is not None
    SLICES: tl.constexpr = slices(get(NET, L, "width"), SLICE)
    BLOCK_N: tl.constexpr = block(get(NET, L, "width"), SLICE)
    zs = ()
    if len(h) == 0:
        zs = _wide_first_layer(xs, strides, scales_ptr, rows, weights, params, NET, COMPUTE, SLICE)
    elif len(resident) > 0 or SLICES == 1:
        for j in tl.static_range(SLICES):
            zs = zs + (next_slice(h, weights, resident, params, j, NET, L, COMPUTE, SLICE),)

    mean = tl.zeros([rows.shape[0]], tl.float32)
    squares = tl.zeros([rows.shape[0]], tl.float32)
    if NORM:
        if len(zs) > 0:
            for j in tl.static_range(SLICES):
                mean, squares = _add_moments(mean, squares, zs[j], j, NET, L)
        else:
            for j in tl.range(SLICES):
                z = next_slice(h, weights, resident, params, j, NET, L, COMPUTE, SLICE)
                mean, squares = _add_moments(mean, squares, z, j, NET, L)
        squares = 1.0 / tl.sqrt_rn(squares / get(NET, L, "width") + get(NET, L, "eps"))

    out = ()
    if LAST and len(zs) == 0:
        for j in tl.range(SLICES):
            z = next_slice(h, weights, resident, params, j, NET, L, COMPUTE, SLICE)
            z = finish_slice(z, mean, squares, params, j, NET, L)
            ys = _last_layer(ys, z, params, j * BLOCK_N, o0, NET, 0, EXACT)
    else:
        for j in tl.static_range(SLICES):
            if len(zs) > 0:
                z = zs[j]
            else:
                z = next_slice(h, weights, resident, params, j, NET, L, COMPUTE, SLICE)
            z = finish_slice(z, mean, squares, params, j, NET, L)
            if LAST:
                ys = _last_layer(ys, z, params, j * BLOCK_N, o0, NET, 0, EXACT)
            else:
                out = out + (z.to(COMPUTE),)
    return ys, out
