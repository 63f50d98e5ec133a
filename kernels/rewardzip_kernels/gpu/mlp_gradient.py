"""An MLP of one output and that output's gradient by the inputs, in one launch: 16 rows a program, all in registers.

    forward      as ``mlp_layers.py``; the outputs h_l of every hidden layer are kept, in the type of the products
    backward     g = act'(y) * last;   g = (g * act'(h_l) * scale_l) @ weight_l, in fp32, through tf32 on tensor cores

Only activations whose slope follows from their output are taken, and no LayerNorm.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import dense_rows
from ..mlp_layout import Layout, layout
from .activations import SLOPES, activate, slope
from .int8_linear import TL_DTYPE
from .launch import aligned, launch
from .mlp_layers import finish_slice, next_slice
from .mlp_tiles import (
    block,
    depth,
    get,
    input_tiles,
    kept_index,
    piece_count,
    piece_start,
    piece_width,
    ragged,
    slices,
    unpadded_start,
    vector,
    x_tiles,
)

BLOCK_M, SLICE = 16, 64

# of the hidden layers together, by the bytes of what products are made of: three of 256, which compile in ten seconds
MOST_SLICES = {2: 12, 4: 8}


@triton.jit
def _turned_tile(weights, s, j, NET: tl.constexpr, L: tl.constexpr, SLICE: tl.constexpr):
    # [slice j of the outputs, tile s of the stored columns], all inputs side by side; outputs past the last repeat it
    COLUMNS: tl.constexpr = get(NET, L, "columns")
    BLOCK_N: tl.constexpr = block(get(NET, L, "width"), SLICE)
    BLOCK_K: tl.constexpr = block(COLUMNS, SLICE)
    n = tl.minimum(j * BLOCK_N + tl.arange(0, BLOCK_N), get(NET, L, "width") - 1)[:, None]
    k = s * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    at = weights + get(NET, L, "weight") + n * COLUMNS + k
    if not ragged(COLUMNS, BLOCK_K):
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=k < COLUMNS, other=0)
    return tile.to(tl.float32)


@triton.jit
def _pulled(g, kept, params, NET: tl.constexpr, L: tl.constexpr, SLICE: tl.constexpr):
    """g * act'(h) * scale of layer L, slice by slice."""
    out = ()
    for j in tl.static_range(len(g)):
        h = kept[kept_index(NET, L, j, SLICE)].to(tl.float32)
        z = g[j] * slope(h, get(NET, L, "activation"), get(NET, L, "parameter"))
        if get(NET, L, "scale") is not None:
            z *= vector(params, get(NET, L, "scale"), j * z.shape[1] + tl.arange(0, z.shape[1]), NET, L)
        out = out + (z,)
    return out


@triton.jit
def _back(g, weights, NET: tl.constexpr, L: tl.constexpr, SLICE: tl.constexpr, EXACT: tl.constexpr):
    """g @ weight of layer L, tile by tile of its stored columns."""
    sums = ()
    for _ in tl.static_range(slices(get(NET, L, "columns"), SLICE)):
        sums = sums + (tl.zeros([g[0].shape[0], block(get(NET, L, "columns"), SLICE)], tl.float32),)
    # slice by slice of g: as an operand every warp holds all of it, and has no registers for more than one
    for j in tl.static_range(len(g)):
        sums = _add_products(sums, g[j], weights, j, NET, L, SLICE, EXACT)
    return sums


@triton.jit
def _add_products(sums, g, weights, j, NET: tl.constexpr, L: tl.constexpr, SLICE: tl.constexpr, EXACT: tl.constexpr):
    more = ()
    for s in tl.static_range(len(sums)):
        more = more + (tl.dot(g, _turned_tile(weights, s, j, NET, L, SLICE), sums[s], input_precision=EXACT),)
    return more


@triton.jit
def _column(k, NET: tl.constexpr):
    """Where the gradient of stored column k belongs among the inputs' own, side by side; -1 for what pads them."""
    at = k * 0 - 1
    for i in tl.static_range(piece_count(NET, 0)):
        inside = (k >= piece_start(NET, 0, i)) & (k < piece_start(NET, 0, i) + piece_width(NET, 0, i))
        at = tl.where(inside, k - piece_start(NET, 0, i) + unpadded_start(NET, 0, i), at)
    return at


@triton.jit(do_not_specialize=["M"])
def _mlp_gradient_kernel(
    y_ptr, gradient_ptr, xs, strides, weights, params, M,
    NET: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, SLICE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    END: tl.constexpr = depth(NET) - 1
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    # rows past the end repeat the last one and are not stored
    rows = tl.minimum(m, M - 1)
    h = x_tiles(xs, strides, None, rows, NET, COMPUTE, SLICE)
    nothing = tl.zeros([BLOCK_M], tl.float32)
    y, kept, g = nothing, (), ()
    for L in tl.static_range(END):
        out = ()
        for j in tl.static_range(slices(get(NET, L, "width"), SLICE)):
            z = next_slice(h, weights, (), params, j, NET, L, COMPUTE, SLICE)
            z = finish_slice(z, nothing, nothing, params, j, NET, L)
            if L == END - 1:
                last = vector(params, get(NET, END, "weight"), j * z.shape[1] + tl.arange(0, z.shape[1]), NET, L)
                y += tl.sum(z * last, axis=1)
                g = g + (last,)
            out = out + (z.to(COMPUTE),)
        kept = kept + out
        h = out
    y = activate(y + tl.load(params + get(NET, END, "bias")), get(NET, END, "activation"), get(NET, END, "parameter"))
    tl.store(y_ptr + m, y, mask=m < M)
    steep = slope(y, get(NET, END, "activation"), get(NET, END, "parameter"))[:, None]
    start = ()
    for j in tl.static_range(len(g)):
        start = start + (steep * g[j],)
    g = start
    for D in tl.static_range(END - 1, -1, -1):
        g = _back(_pulled(g, kept, params, NET, D, SLICE), weights, NET, D, SLICE, EXACT)
    for s in tl.static_range(len(g)):
        column = _column(s * g[s].shape[1] + tl.arange(0, g[s].shape[1]), NET)[None, :]
        tl.store(gradient_ptr + m[:, None] * COLUMNS + column, g[s], mask=(m < M)[:, None] & (column >= 0))


def takes(net: Layout, compute: torch.dtype) -> bool:
    """Two layers or more, one output, what fits in registers, and slopes that follow from the outputs."""
    return (
        len(net.layers) > 1
        and net.layers[-1].width == 1
        and input_tiles(net, 0, SLICE) * SLICE <= 256
        and sum(slices(layer.width, SLICE) for layer in net.layers[:-1]) <= MOST_SLICES[compute.itemsize]
        and all(layer.eps is None and layer.activation in SLOPES for layer in net.layers)
        and all(layer.parameter > 0 for layer in net.layers if layer.activation in ("leaky_relu", "elu"))
    )


def gradient(
    weights: Tensor, params: Tensor, layers: str, compute_dtype: torch.dtype | None
) -> Callable[[list[Tensor]], tuple[Tensor, Tensor]] | None:
    """(y [m, 1], gradient [m, columns]) as a function of fp32 inputs [m, piece]; None for a network not taken."""
    net = layout(layers, weights.dtype == torch.int8)
    compute = compute_dtype or (torch.float16 if weights.dtype == torch.int8 else weights.dtype)
    if compute == torch.int8 or not takes(net, compute):
        return None
    columns = sum(net.layers[0].pieces)
    warps = 8 if max(layer.width for layer in net.layers) > 64 else 4

    def call(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        xs: tuple[Tensor, ...] = tuple([dense_rows(x) for x in inputs])
        m, strides = xs[0].shape[0], tuple([x.stride(0) for x in xs])
        y, found = xs[0].new_empty(m, 1), xs[0].new_empty(m, columns)
        exact = "ieee" if y.device.type == "cpu" else "tf32"
        key: tuple[Any, ...] = (layers, weights.dtype, compute, strides, aligned(y, found, *xs, weights, params))
        constants = (net, columns, TL_DTYPE[compute], BLOCK_M, SLICE, exact)
        launch(
            _mlp_gradient_kernel, (triton.cdiv(m, BLOCK_M), 1, 1), key,
            (y, found, xs, strides, weights, params, m, *constants),
            num_warps=warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        return y, found

    return call
