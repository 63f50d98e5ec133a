"""reward_head on a GPU: int8_linear's product, whose epilogue multiplies with the head while the sums are in registers.

    acc [BLOCK_N, BLOCK_M] = weight @ x^T    h = act(scale * acc + bias)    partial[tile, m, o] = sum of h * head[o]

Each tile of outputs writes its own partial sums [tiles, M, n_out]; a second, tiny kernel adds the tiles in a fixed
order. No atomics, so the same rows give the same rewards.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import activations
from ..checks import dense_rows
from . import int8_linear as gemm
from . import tiles
from .int8_linear import TL_DTYPE, finish, row_sums, tile_sums
from .launch import aligned, launch


@triton.jit(do_not_specialize=["M"])
def _reward_head_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, head_ptr, partial_ptr, M, N, K, x_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, COMPUTE: tl.constexpr, EVEN_K: tl.constexpr,
    N_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share their rows and walk over the outputs: rows are read from memory once
    n_tiles = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(0) % n_tiles
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tile_sums(
        x_ptr, weight_ptr, M, N, K, x_stride, m, n, 0, tl.cdiv(K, BLOCK_K),
        COMPUTE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    inside = n < N
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n, mask=inside, other=0.0)[:, None]
    h = finish(acc, scale, bias_ptr, None, n[:, None], inside[:, None], ACTIVATION, PARAMETER)
    # outputs past the end repeat the last one: not 0 times something, which is NaN for an inf
    h = tl.where(inside[:, None], h, 0.0)
    at = partial_ptr + (tile.to(tl.int64) * M + m) * N_OUT
    for o in tl.static_range(N_OUT):
        v = tl.load(head_ptr + o * N + n, mask=inside, other=0.0)
        tl.store(at + o, tl.sum(h * v[:, None], axis=0), mask=m < M)


@triton.jit(do_not_specialize=["M"])
def _reward_gemv_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, head_ptr, partial_ptr, M, N, K, x_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, COMPUTE: tl.constexpr, EVEN_K: tl.constexpr,
    N_OUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N outputs of one row, as in int8_linear
    m = (tl.program_id(0) % M).to(tl.int64)
    tile = (tl.program_id(0) // M).to(tl.int64)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = row_sums(x_ptr, weight_ptr, N, K, x_stride, m, n, COMPUTE, EVEN_K, BLOCK_N, BLOCK_K)
    inside = n < N
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n, mask=inside, other=0.0)
    h = tl.where(inside, finish(sums, scale, bias_ptr, None, n, inside, ACTIVATION, PARAMETER), 0.0)
    for o in tl.static_range(N_OUT):
        v = tl.load(head_ptr + o * N + n, mask=inside, other=0.0)
        tl.store(partial_ptr + (tile * M + m) * N_OUT + o, tl.sum(h * v, axis=0))


@triton.jit(do_not_specialize=["size", "tiles"])
def _sum_tiles_kernel(
    partial_ptr, head_bias_ptr, y_ptr, size, tiles, N_OUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # one program: BLOCK of the M * n_out results; partial [tiles, size]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    acc = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        inside = (start + t < tiles)[:, None] & (i < size)[None, :]
        acc += tl.load(partial_ptr + (start + t)[:, None] * size + i[None, :], mask=inside, other=0.0)
    y = tl.sum(acc, axis=0)
    if head_bias_ptr is not None:
        y += tl.load(head_bias_ptr + i % N_OUT)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < size)


class Tile(NamedTuple):
    block_m: int  # 0: the GEMV
    block_n: int
    block_k: int
    warps: int
    stages: int


def tile(m: int, n: int, k: int, x_bytes: int) -> Tile:
    """int8_linear's rule, from arithmetic and compiled code, not yet from measurements; but K is never split.

    An activation needs the whole sum. For few rows the tiles of outputs get narrower instead, down to 16, until there
    are 128 programs.
    """
    t = gemm.tile(m, n, k, x_bytes)
    block_n = t.block_n
    while 0 < t.block_m and m <= 64 and block_n > 16 and triton.cdiv(n, block_n) < 128:
        block_n //= 2
    return Tile(t.block_m, block_n, t.block_k, t.warps, t.stages)


def candidates(m: int, n: int, k: int, x_bytes: int) -> list[Tile]:
    """What a sweep measures: int8_linear's that do not split K, for few rows in narrower tiles of outputs too."""
    whole = [Tile(t.block_m, *t[1:3], *t[4:]) for t in gemm.candidates(m, n, k, x_bytes) if t.split_k == 1]
    narrow = [t._replace(block_n=size) for t in whole for size in (16, 32) if t.block_m and m <= 64]
    return list(dict.fromkeys([tile(m, n, k, x_bytes), *whole, *narrow]))


@tiles.planned
def plan(m: int, n: int, k: int, x_bytes: int, weight_bytes: int, device: int) -> Tile:
    bucket = tiles.linear_bucket("reward_head", m, n, k, x_bytes, weight_bytes)
    return tiles.choose(bucket, device, tile(m, n, k, x_bytes), lambda: candidates(m, n, k, x_bytes))


def reward_head(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    rows = dense_rows(x)
    (m, k), n, n_out = rows.shape, weight.shape[0], head_weight.shape[0]
    y = x.new_empty(*x.shape[:-1], n_out)
    if m == 0:
        return y
    weight, head_weight = weight.contiguous(), head_weight.contiguous()
    compute = compute_dtype or x.dtype
    t = plan(m, n, k, rows.element_size(), weight.element_size(), x.get_device())
    n_tiles = triton.cdiv(n, t.block_n)
    partial = torch.empty(n_tiles, m, n_out, dtype=torch.float32, device=x.device)
    entry, parameter = activations.parse(activation)
    constants = (entry.name, parameter, TL_DTYPE[compute], k % t.block_k == 0, n_out, *(t.block_m,)[: t.block_m > 0])
    constants += (t.block_n, t.block_k)
    key = (
        x.dtype, weight.dtype, aligned(rows, weight, scale, bias, head_weight, head_bias, y), scale is None,
        bias is None, head_bias is None, n, k, rows.stride(0), constants, t.warps, t.stages,
    )  # fmt: skip
    kernel, programs = (_reward_head_kernel, triton.cdiv(m, t.block_m)) if t.block_m else (_reward_gemv_kernel, m)
    launch(
        kernel, (n_tiles * programs, 1, 1), key,
        (rows, weight, scale, bias, head_weight, partial, m, n, k, rows.stride(0), *constants),
        num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=True,
    )  # fmt: skip
    launch(
        _sum_tiles_kernel, (triton.cdiv(m * n_out, 64), 1, 1), (*key, y.dtype),
        (partial, head_bias, y, m * n_out, n_tiles, n_out, 32, 64),
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return y
