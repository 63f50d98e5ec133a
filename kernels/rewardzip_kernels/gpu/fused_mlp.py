"""fused_mlp on a GPU: one program takes BLOCK_M rows through every layer; activations never leave its registers.

    x_i [BLOCK_M, K_i]   one dot per input into the same sums: the concatenation costs nothing
    h                    a tuple of [BLOCK_M, SLICE] tiles in 16 bits, each the first operand of the next layer's dots
    y                    a tuple of [BLOCK_M, up to 32] fp32 sums, added to as each slice of the last hidden layer ends

A layer is computed a slice of outputs at a time, so that 256 wide fits the registers: h (64 a thread), the next h, and
one slice of sums. The last hidden layer keeps no h, and walks over its slices in a run-time loop. A wide LayerNorm needs
all sums of a row before any of them can end: its layer is computed twice, moments first. Where the weights of one
network fit on chip they are loaded before the loop over the rows (RESIDENT), elsewhere a tile at a time.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import dense_rows
from ..fused_mlp import compute_type, fused_mlp_reference, new_output
from ..mlp_layout import Layout, layout
from .activations import activate
from .int8_linear import TL_DTYPE
from .launch import aligned, launch


@triton.constexpr_function
def _depth(net):
    return len(net.layers)


@triton.constexpr_function
def _size(net, flat):
    return getattr(net, flat)


@triton.constexpr_function
def _get(net, L, field):
    return getattr(net.layers[L], field)


@triton.constexpr_function
def _pieces(net, L):
    return len(net.layers[L].pieces)


@triton.constexpr_function
def _piece(net, L, i):
    return net.layers[L].pieces[i]


@triton.constexpr_function
def _start(net, L, i):
    return sum(-(-k // 16) * 16 for k in net.layers[L].pieces[:i])


@triton.constexpr_function
def _block(width, most):
    """The width of a tile: a power of two that a dot takes."""
    return min(most, max(16, triton.next_power_of_2(width)))


@triton.constexpr_function
def _slices(width, most):
    return -(-width // _block(width, most))


@triton.constexpr_function
def _ragged(width, size):
    return width % size != 0


@triton.constexpr_function
def _input_tiles(net, L, most):
    return sum(_slices(piece, most) for piece in net.layers[L].pieces)


@triton.constexpr_function
def _tile_piece(net, L, s, most):
    """The piece that input tile s of layer L belongs to."""
    for i, piece in enumerate(net.layers[L].pieces):
        if s < _slices(piece, most):
            return i
        s -= _slices(piece, most)


@triton.constexpr_function
def _tile_start(net, L, s, most):
    """Where input tile s starts in its piece."""
    return most * (s - sum(_slices(k, most) for k in net.layers[L].pieces[: _tile_piece(net, L, s, most)]))


@triton.constexpr_function
def _resident_index(net, L, s, j, most):
    """Where ``_load_all`` put the weights from input tile s to slice j of layer L."""
    before = sum(_input_tiles(net, k, most) * _slices(net.layers[k].width, most) for k in range(L))
    return before + s * _slices(net.layers[L].width, most) + j


@triton.jit
def _weight_tile(
    weights,
    k0,
    j,
    NET: tl.constexpr,
    L: tl.constexpr,
    i: tl.constexpr,
    COMPUTE: tl.constexpr,
    SLICE: tl.constexpr,
):
    # [inputs k0 ..., slice j of the outputs]; outputs past the last repeat it, inputs past the piece are 0
    BLOCK_N: tl.constexpr = _block(_get(NET, L, "width"), SLICE)
    BLOCK_K: tl.constexpr = _block(_piece(NET, L, i), SLICE)
    STORED: tl.constexpr = (_piece(NET, L, i) + 15) // 16 * 16
    n = tl.minimum(j * BLOCK_N + tl.arange(0, BLOCK_N), _get(NET, L, "width") - 1)[None, :]
    k = k0 + tl.arange(0, BLOCK_K)[:, None]
    at = weights + (_get(NET, L, "weight") + _start(NET, L, i)) + n * _get(NET, L, "columns") + k
    if not _ragged(STORED, BLOCK_K):
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=k < STORED, other=0)
    return tile.to(COMPUTE)


@triton.jit
def _load_all(weights, NET: tl.constexpr, COMPUTE: tl.constexpr, SLICE: tl.constexpr):
    tiles = ()
    for L in tl.static_range(_depth(NET) - 1):
        for s in tl.static_range(_input_tiles(NET, L, SLICE)):
            for j in tl.static_range(_slices(_get(NET, L, "width"), SLICE)):
                start = _tile_start(NET, L, s, SLICE)
                w = _weight_tile(weights, start, j, NET, L, _tile_piece(NET, L, s, SLICE), COMPUTE, SLICE)
                tiles = tiles + (w,)
    return tiles


@triton.jit
def _x_tile(x_ptr, stride, scales_ptr, rows, k0, NET: tl.constexpr, i: tl.constexpr, SLICE: tl.constexpr):
    BLOCK_K: tl.constexpr = _block(_piece(NET, 0, i), SLICE)
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    if not _ragged(_piece(NET, 0, i), BLOCK_K):
        x = tl.load(x_ptr + rows[:, None] * stride + k)
    else:
        x = tl.load(x_ptr + rows[:, None] * stride + k, mask=k < _piece(NET, 0, i), other=0)
    if x.dtype.is_int():
        x = (x.to(tl.float32) - tl.load(scales_ptr + 2 * i + 1)) * tl.load(scales_ptr + 2 * i)
    return x


@triton.jit
def _x_tiles(xs, strides, scales_ptr, rows, NET: tl.constexpr, COMPUTE: tl.constexpr, SLICE: tl.constexpr):
    h = ()
    for s in tl.static_range(_input_tiles(NET, 0, SLICE)):
        x = _x_tile(
            xs[_tile_piece(NET, 0, s, SLICE)], strides[_tile_piece(NET, 0, s, SLICE)], scales_ptr, rows,
            _tile_start(NET, 0, s, SLICE), NET, _tile_piece(NET, 0, s, SLICE), SLICE,
        )  # fmt: skip
        h = h + (x.to(COMPUTE),)
    return h


@triton.jit
def _next_slice(
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
    acc = tl.zeros([h[0].shape[0], _block(_get(NET, L, "width"), SLICE)], tl.float32)
    for s in tl.static_range(len(h)):
        if len(resident) > 0:
            w = resident[_resident_index(NET, L, s, j, SLICE)]
        else:
            start = _tile_start(NET, L, s, SLICE)
            w = _weight_tile(weights, start, j, NET, L, _tile_piece(NET, L, s, SLICE), COMPUTE, SLICE)
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
    for _ in tl.static_range(_slices(_get(NET, 0, "width"), SLICE)):
        sums = sums + (tl.zeros([rows.shape[0], _block(_get(NET, 0, "width"), SLICE)], tl.float32),)
    for i in tl.static_range(_pieces(NET, 0)):
        for k0 in tl.range(0, _piece(NET, 0, i), SLICE):
            x = _x_tile(xs[i], strides[i], scales_ptr, rows, k0, NET, i, SLICE).to(COMPUTE)
            sums = _add_products(sums, x, weights, k0, NET, i, SLICE)
    zs = ()
    for j in tl.static_range(len(sums)):
        zs = zs + (_scale_and_bias(sums[j], params, j, NET, 0),)
    return zs


@triton.jit
def _add_products(sums, x, weights, k0, NET: tl.constexpr, i: tl.constexpr, SLICE: tl.constexpr):
    more = ()
    for j in tl.static_range(len(sums)):
        w = _weight_tile(weights, k0, j, NET, 0, i, x.dtype, SLICE)
        more = more + (tl.dot(x, w, sums[j], input_precision="tf32"),)
    return more


@triton.jit
def _vector(params, START: tl.constexpr, n, NET: tl.constexpr, L: tl.constexpr):
    # zeros are stored up to a multiple of 16, and stand for all that follow
    return tl.load(params + START + n, mask=n < (_get(NET, L, "width") + 15) // 16 * 16, other=0.0)[None, :]


@triton.jit
def _scale_and_bias(acc, params, j, NET: tl.constexpr, L: tl.constexpr):
    n = j * acc.shape[1] + tl.arange(0, acc.shape[1])
    if _get(NET, L, "scale") is not None:
        acc *= _vector(params, _get(NET, L, "scale"), n, NET, L)
    acc += _vector(params, _get(NET, L, "bias"), n, NET, L)
    return acc


@triton.jit
def _add_moments(mean, squares, z, j, NET: tl.constexpr, L: tl.constexpr):
    # mean and sum of squared distances of the slices so far, joined with those of slice j
    n = j * z.shape[1] + tl.arange(0, z.shape[1])
    inside = (n < _get(NET, L, "width"))[None, :]
    seen = tl.zeros([1], tl.float32) + j * z.shape[1]
    count = tl.minimum(_get(NET, L, "width") - seen, seen * 0.0 + z.shape[1])
    here = tl.sum(tl.where(inside, z, 0.0), axis=1) / count
    distance = tl.where(inside, z - here[:, None], 0.0)
    step = here - mean
    squares += tl.sum(distance * distance, axis=1) + step * step * (seen * count / (seen + count))
    return mean + step * (count / (seen + count)), squares


@triton.jit
def _finish(z, mean, inverse, params, j, NET: tl.constexpr, L: tl.constexpr):
    n = j * z.shape[1] + tl.arange(0, z.shape[1])
    if _get(NET, L, "eps") is not None:
        gamma = _vector(params, _get(NET, L, "gamma"), n, NET, L)
        z = (z - mean[:, None]) * inverse[:, None] * gamma + _vector(params, _get(NET, L, "beta"), n, NET, L)
    z = activate(z, _get(NET, L, "activation"), _get(NET, L, "parameter"))
    if _ragged(_get(NET, L, "width"), z.shape[1]):
        # not 0 times something: a row with an inf has NaN here
        z = tl.where((n < _get(NET, L, "width"))[None, :], z, 0.0)
    return z


@triton.jit
def _last_layer(ys, h, params, k0, o0, NET: tl.constexpr, i: tl.constexpr, EXACT: tl.constexpr):
    """ys += h @ weight[o0 ..., k0 ...]^T for fp32 h [BLOCK_M, inputs k0 ... of piece i]."""
    END: tl.constexpr = _depth(NET) - 1
    WIDTH: tl.constexpr = _get(NET, END, "width")
    k = k0 + tl.arange(0, h.shape[1])
    row = params + (_get(NET, END, "weight") + _start(NET, END, i))
    inside = k < (_piece(NET, END, i) + 15) // 16 * 16
    more = ()
    for j in tl.static_range(len(ys)):
        o = o0 + j * ys[0].shape[1] + tl.arange(0, ys[0].shape[1])
        if ys[0].shape[1] < 16:
            y = ys[j]
            for one in tl.static_range(WIDTH):
                v = tl.load(row + one * _get(NET, END, "columns") + k, mask=inside, other=0.0)
                y += tl.where((o == one)[None, :], tl.sum(h * v[None, :], axis=1, keep_dims=True), 0.0)
        else:
            at = row + tl.minimum(o, WIDTH - 1)[None, :] * _get(NET, END, "columns") + k[:, None]
            y = tl.dot(h, tl.load(at, mask=inside[:, None], other=0.0), ys[j], input_precision=EXACT)
        more = more + (y,)
    return more


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, OUT: tl.constexpr):
    ys = ()
    for _ in tl.static_range((OUT + 31) // 32):
        ys = ys + (tl.zeros([BLOCK_M, min(OUT, 32)], tl.float32),)
    return ys


@triton.jit
def _network(
    xs, strides, scales_ptr, rows, o0, weights, params, resident,
    NET: tl.constexpr, COMPUTE: tl.constexpr, SLICE: tl.constexpr, OUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    END: tl.constexpr = _depth(NET) - 1
    WIDE: tl.constexpr = min(OUT, 32)
    ys = _zeros(rows.shape[0], OUT)
    if END == 0:
        for i in tl.static_range(_pieces(NET, 0)):
            for k0 in tl.range(0, _piece(NET, 0, i), SLICE):
                x = _x_tile(xs[i], strides[i], scales_ptr, rows, k0, NET, i, SLICE).to(tl.float32)
                ys = _last_layer(ys, x, params, k0, o0, NET, i, EXACT)
    h = ()
    if END > 0 and _input_tiles(NET, 0, SLICE) * SLICE <= 256:
        h = _x_tiles(xs, strides, scales_ptr, rows, NET, COMPUTE, SLICE)
    for L in tl.static_range(END):
        ys, h = _layer(
            ys, h, xs, strides, scales_ptr, rows, o0, weights, params, resident, NET, L, COMPUTE, SLICE, EXACT
        )
    done = ()
    for j in tl.static_range(len(ys)):
        z = ys[j] + _vector(params, _get(NET, END, "bias"), o0 + j * WIDE + tl.arange(0, WIDE), NET, END)
        done = done + (activate(z, _get(NET, END, "activation"), _get(NET, END, "parameter")),)
    return done


@triton.jit
def _layer(
    ys, h, xs, strides, scales_ptr, rows, o0, weights, params, resident,
    NET: tl.constexpr, L: tl.constexpr, COMPUTE: tl.constexpr, SLICE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = L == _depth(NET) - 2
    NORM: tl.constexpr = _get(NET, L, "eps") is not None
    SLICES: tl.constexpr = _slices(_get(NET, L, "width"), SLICE)
    BLOCK_N: tl.constexpr = _block(_get(NET, L, "width"), SLICE)
    zs = ()
    if len(h) == 0:
        zs = _wide_first_layer(xs, strides, scales_ptr, rows, weights, params, NET, COMPUTE, SLICE)
    elif len(resident) > 0 or SLICES == 1:
        for j in tl.static_range(SLICES):
            zs = zs + (_next_slice(h, weights, resident, params, j, NET, L, COMPUTE, SLICE),)

    mean = tl.zeros([rows.shape[0]], tl.float32)
    squares = tl.zeros([rows.shape[0]], tl.float32)
    if NORM:
        if len(zs) > 0:
            for j in tl.static_range(SLICES):
                mean, squares = _add_moments(mean, squares, zs[j], j, NET, L)
        else:
            for j in tl.range(SLICES):
                z = _next_slice(h, weights, resident, params, j, NET, L, COMPUTE, SLICE)
                mean, squares = _add_moments(mean, squares, z, j, NET, L)
        squares = 1.0 / tl.sqrt_rn(squares / _get(NET, L, "width") + _get(NET, L, "eps"))

    out = ()
    if LAST and len(zs) == 0:
        for j in tl.range(SLICES):
            z = _next_slice(h, weights, resident, params, j, NET, L, COMPUTE, SLICE)
            z = _finish(z, mean, squares, params, j, NET, L)
            ys = _last_layer(ys, z, params, j * BLOCK_N, o0, NET, 0, EXACT)
    else:
        for j in tl.static_range(SLICES):
            if len(zs) > 0:
                z = zs[j]
            else:
                z = _next_slice(h, weights, resident, params, j, NET, L, COMPUTE, SLICE)
            z = _finish(z, mean, squares, params, j, NET, L)
            if LAST:
                ys = _last_layer(ys, z, params, j * BLOCK_N, o0, NET, 0, EXACT)
            else:
                out = out + (z.to(COMPUTE),)
    return ys, out


@triton.jit
def _store(y_ptr, ys, m, o0, M, NET: tl.constexpr):
    WIDTH: tl.constexpr = _get(NET, _depth(NET) - 1, "width")
    for j in tl.static_range(len(ys)):
        o = o0 + j * ys[0].shape[1] + tl.arange(0, ys[0].shape[1])
        inside = (m < M)[:, None] & (o < WIDTH)[None, :]
        tl.store(y_ptr + m[:, None] * WIDTH + o[None, :], ys[j].to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_member(total, mean, squares, ys, e):
    # the sum gives the mean as torch does; the running mean serves the squares alone
    totals, means, more = (), (), ()
    for j in tl.static_range(len(ys)):
        step = ys[j] - mean[j]
        moved = mean[j] + step / (e + 1.0)
        totals = totals + (total[j] + ys[j],)
        means = means + (moved,)
        more = more + (squares[j] + step * (ys[j] - moved),)
    return totals, means, more


@triton.jit
def _rows(
    tile, y_ptr, xs, strides, scales_ptr, weights, params, resident, M,
    NET: tl.constexpr, MEMBERS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, SLICE: tl.constexpr,
    OUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    # rows past the end repeat the last one and are not stored
    rows = tl.minimum(m, M - 1)
    o0 = tl.program_id(2) * OUT
    if MEMBERS == 0:
        ys = _network(xs, strides, scales_ptr, rows, o0, weights, params, resident, NET, COMPUTE, SLICE, OUT, EXACT)
        _store(y_ptr, ys, m, o0, M, NET)
    else:
        total, mean, squares = _zeros(BLOCK_M, OUT), _zeros(BLOCK_M, OUT), _zeros(BLOCK_M, OUT)
        for e in tl.range(MEMBERS):
            ys = _network(xs, strides, scales_ptr, rows, o0, weights, params, (), NET, COMPUTE, SLICE, OUT, EXACT)
            total, mean, squares = _add_member(total, mean, squares, ys, e)
            weights += _size(NET, "weights")
            params += _size(NET, "params")
        averages, deviations = _statistics(total, squares, MEMBERS)
        _store(y_ptr, averages, m, o0, M, NET)
        _store(y_ptr + M.to(tl.int64) * _get(NET, _depth(NET) - 1, "width"), deviations, m, o0, M, NET)


@triton.jit
def _statistics(total, squares, MEMBERS: tl.constexpr):
    averages, deviations = (), ()
    for j in tl.static_range(len(total)):
        averages = averages + (total[j] / MEMBERS,)
        if MEMBERS == 1:
            deviations = deviations + (squares[j] + float("nan"),)
        else:
            deviations = deviations + (tl.sqrt_rn(squares[j] / (MEMBERS - 1)),)
    return averages, deviations


@triton.jit(do_not_specialize=["M"])
def _fused_mlp_kernel(
    y_ptr, xs, strides, scales_ptr, weights_ptr, params_ptr, M,
    NET: tl.constexpr, MEMBERS: tl.constexpr, COMPUTE: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr, SLICE: tl.constexpr, OUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # MEMBERS 0: programs (row tile, member, block of outputs); otherwise a program goes through all members
    member = tl.program_id(1).to(tl.int64)
    y_ptr += member * M * _get(NET, _depth(NET) - 1, "width")
    weights = weights_ptr + member * _size(NET, "weights")
    params = params_ptr + member * _size(NET, "params")
    if RESIDENT:
        resident = _load_all(weights, NET, COMPUTE, SLICE)
        for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
            _rows(
                tile, y_ptr, xs, strides, scales_ptr, weights, params, resident, M,
                NET, MEMBERS, COMPUTE, BLOCK_M, SLICE, OUT, EXACT,
            )  # fmt: skip
    else:
        # no loop: what it keeps alive from one tile to the next would spill
        _rows(
            tl.program_id(0), y_ptr, xs, strides, scales_ptr, weights, params, (), M,
            NET, MEMBERS, COMPUTE, BLOCK_M, SLICE, OUT, EXACT,
        )  # fmt: skip


class Tile(NamedTuple):
    block_m: int
    slice: int
    out: int
    warps: int
    resident: bool


# rows of the batch classes that share a tile: up to the first, up to the second, more
FEW, SOME = 4096, 32768

# 16-bit weights of one network that stay on chip beside the rows: the smallest shared memory is 64 KiB
RESIDENT_BYTES = 48 * 1024


def tile(net: Layout, m: int, member_loop: bool, compute: torch.dtype) -> Tile:
    """The written rule, from what compiles without spilling, not yet from measurements.

    Few rows: 16 a program, to fill the multiprocessors; in so small a tile any network fits the registers. Many rows,
    at most 128 wide: 128 a program, the weights loaded once. Wider: 64 or 128 rows where a program keeps one layer of
    256, slices of 32 where it keeps two, a layer and the next; 16 rows where it would keep more: a LayerNorm's sums,
    more than 16 outputs, fp32. So do several such pairs, which compile for a minute otherwise.
    """
    hidden = net.layers[:-1]
    widest = max((layer.width for layer in hidden), default=0)
    width = net.layers[-1].width
    # as many outputs as one program sums beside the rest
    out = triton.next_power_of_2(width) if width <= 4 else _block(width, 64)
    few = Tile(16, 64, out, 4, False)
    if m <= FEW or compute == torch.float32 or width > 16:
        return few
    if widest <= 128:
        fits = 2 * net.weights <= RESIDENT_BYTES and net.layers[0].columns <= 256 and not member_loop
        return Tile(128, 64, out, 4 if widest <= 64 else 8, fits)
    pairs = sum(layer.width > 128 and layer.columns > 128 for layer in hidden[:-1])
    if pairs > 1 or any(layer.eps is not None and layer.width > 128 for layer in hidden):
        return few
    if pairs == 1:
        return Tile(64, 32, out, 4, False)
    return Tile(64, 64, out, 4, False) if m <= SOME else Tile(128, 64, out, 8, False)


@lru_cache(maxsize=256)
def _plan(layers: str, quantised: bool, rows: int, member_loop: bool, compute: torch.dtype) -> tuple[Layout, Tile]:
    net = layout(layers, quantised)
    return net, tile(net, rows, member_loop, compute)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def fused_mlp(
    inputs: list[Tensor],
    weights: Tensor,
    params: Tensor,
    layers: str,
    members: int | None = None,
    reduce: str = "none",
    compute_dtype: torch.dtype | None = None,
    input_scales: Tensor | None = None,
) -> Tensor:
    if compute_dtype == torch.int8:
        return fused_mlp_reference(inputs, weights, params, layers, members, reduce, compute_dtype, input_scales)
    y = new_output(inputs, layers, members, reduce)
    xs = tuple(dense_rows(x) for x in inputs)
    m = xs[0].shape[0]
    if m == 0:
        return y
    strides = tuple(x.stride(0) for x in xs)
    compute = compute_type(inputs, weights, compute_dtype)
    loop = (members or 0) if reduce == "mean_std" else 0
    rows = FEW if m <= FEW else SOME if m <= SOME else SOME + 1
    net, t = _plan(layers, weights.dtype == torch.int8, rows, loop > 0, compute)
    programs = triton.cdiv(m, t.block_m)
    if t.resident:
        programs = min(programs, 2 * _multiprocessors(y.device))
    grid = (programs, 1 if loop else members or 1, triton.cdiv(net.layers[-1].width, t.out))
    # fp32 through the tensor cores to 2^-22, where there are any
    exact = "ieee" if y.device.type == "cpu" else "bf16x6"
    key = (
        tuple(x.dtype for x in xs), y.dtype, weights.dtype, compute, input_scales is None,
        aligned(y, *xs, weights, params, input_scales), strides, layers, loop, t,
    )  # fmt: skip
    constants = (net, loop, TL_DTYPE[compute], t.resident, t.block_m, t.slice, t.out, exact)
    launch(
        _fused_mlp_kernel, grid, key, (y, xs, strides, input_scales, weights, params, m, *constants),
        num_warps=t.warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return y
