"""What a fused MLP's kernel knows when it is compiled, and how it loads: the tiles of inputs, weights and vectors.

``net`` is a ``mlp_layout.Layout``; a tile of weights goes from one input tile to one slice of outputs. Everything is a
compile-time constant but the rows and, where there is a loop, where the tile starts.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def depth(net):
    return len(net.layers)


@triton.constexpr_function
def member_size(net, flat):
    return getattr(net, flat)


@triton.constexpr_function
def get(net, L, field):
    return getattr(net.layers[L], field)


@triton.constexpr_function
def piece_count(net, L):
    return len(net.layers[L].pieces)


@triton.constexpr_function
def piece_width(net, L, i):
    return net.layers[L].pieces[i]


@triton.constexpr_function
def piece_start(net, L, i):
    return sum(-(-k // 16) * 16 for k in net.layers[L].pieces[:i])


@triton.constexpr_function
def block(width, most):
    """The width of a tile: a power of two that a dot takes."""
    return min(most, max(16, triton.next_power_of_2(width)))


@triton.constexpr_function
def slices(width, most):
    return -(-width // block(width, most))


@triton.constexpr_function
def ragged(width, size):
    return width % size != 0


@triton.constexpr_function
def input_tiles(net, L, most):
    return sum(slices(piece, most) for piece in net.layers[L].pieces)


@triton.constexpr_function
def tile_piece(net, L, s, most):
    """The piece that input tile s of layer L belongs to."""
    for i, piece in enumerate(net.layers[L].pieces):
        if s < slices(piece, most):
            return i
        s -= slices(piece, most)


@triton.constexpr_function
def tile_start(net, L, s, most):
    """Where input tile s starts in its piece."""
    return most * (s - sum(slices(k, most) for k in net.layers[L].pieces[: tile_piece(net, L, s, most)]))


@triton.constexpr_function
def resident_index(net, L, s, j, most):
    """Where ``load_all`` put the weights from input tile s to slice j of layer L."""
    before = sum(input_tiles(net, k, most) * slices(net.layers[k].width, most) for k in range(L))
    return before + s * slices(net.layers[L].width, most) + j


@triton.constexpr_function
def kept_index(net, L, j, most):
    """Where slice j of layer L's outputs is among those of all hidden layers."""
    return sum(slices(net.layers[i].width, most) for i in range(L)) + j


@triton.constexpr_function
def unpadded_start(net, L, i):
    return sum(net.layers[L].pieces[:i])


@triton.jit
def weight_tile(
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
    BLOCK_N: tl.constexpr = block(get(NET, L, "width"), SLICE)
    BLOCK_K: tl.constexpr = block(piece_width(NET, L, i), SLICE)
    STORED: tl.constexpr = (piece_width(NET, L, i) + 15) // 16 * 16
    n = tl.minimum(j * BLOCK_N + tl.arange(0, BLOCK_N), get(NET, L, "width") - 1)[None, :]
    k = k0 + tl.arange(0, BLOCK_K)[:, None]
    at = weights + (get(NET, L, "weight") + piece_start(NET, L, i)) + n * get(NET, L, "columns") + k
    if not ragged(STORED, BLOCK_K):
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=k < STORED, other=0)
    return tile.to(COMPUTE)


@triton.jit
def load_all(weights, NET: tl.constexpr, COMPUTE: tl.constexpr, SLICE: tl.constexpr):
    tiles = ()
    for L in tl.static_range(depth(NET) - 1):
        for s in tl.static_range(input_tiles(NET, L, SLICE)):
            for j in tl.static_range(slices(get(NET, L, "width"), SLICE)):
                start = tile_start(NET, L, s, SLICE)
                w = weight_tile(weights, start, j, NET, L, tile_piece(NET, L, s, SLICE), COMPUTE, SLICE)
                tiles = tiles + (w,)
    return tiles


@triton.jit
def x_tile(x_ptr, stride, scales_ptr, rows, k0, NET: tl.constexpr, i: tl.constexpr, SLICE: tl.constexpr):
    BLOCK_K: tl.constexpr = block(piece_width(NET, 0, i), SLICE)
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    if not ragged(piece_width(NET, 0, i), BLOCK_K):
        x = tl.load(x_ptr + rows[:, None] * stride + k)
    else:
        x = tl.load(x_ptr + rows[:, None] * stride + k, mask=k < piece_width(NET, 0, i), other=0)
    if x.dtype.is_int():
        x = (x.to(tl.float32) - tl.load(scales_ptr + 2 * i + 1)) * tl.load(scales_ptr + 2 * i)
    return x


@triton.jit
def x_tiles(xs, strides, scales_ptr, rows, NET: tl.constexpr, COMPUTE: tl.constexpr, SLICE: tl.constexpr):
    h = ()
    for s in tl.static_range(input_tiles(NET, 0, SLICE)):
        x = x_tile(
            xs[tile_piece(NET, 0, s, SLICE)], strides[tile_piece(NET, 0, s, SLICE)], scales_ptr, rows,
            tile_start(NET, 0, s, SLICE), NET, tile_piece(NET, 0, s, SLICE), SLICE,
        )  # fmt: skip
        h = h + (x.to(COMPUTE),)
    return h


@triton.jit
def vector(params, START: tl.constexpr, n, NET: tl.constexpr, L: tl.constexpr):
    # zeros are stored up to a multiple of 16, and stand for all that follow
    return tl.load(params + START + n, mask=n < (get(NET, L, "width") + 15) // 16 * 16, other=0.0)[None, :]
