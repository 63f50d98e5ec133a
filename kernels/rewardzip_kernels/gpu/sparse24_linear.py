"""2:4 weights times rows, on a GPU: values and places to a dense tile in registers, then as in ``int8_linear.py``.

The operands are swapped there: y^T = weight @ x^T with the weights as the tensor core's first operand, which comes from
registers anyway. A byte of indices belongs to two groups of 4 inputs that lie half of K apart, so a tile is two tiles:

    values [N, 4, B]  ->  [BLOCK_N, BLOCK_B] of each plane     w [BLOCK_N, 4 BLOCK_B] of group b on, and of B + b on
    indices [N, B]    ->  [BLOCK_N, BLOCK_B]                   x^T [4 BLOCK_B, BLOCK_M] to each

Bytes are what it saves, 5 bits a weight for 8: that pays while rows are few. Many rows take the dense way: the weight
expanded to [N, K] once a call, and the product of ``int8_linear.py``. From how many rows on, a measured table may say,
and whether torch's own 2:4 product (``semi_structured.py``) takes its place.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import activations
from ..checks import dense_rows
from ..sparse24_linear import products
from . import semi_structured, tiles
from .int8_linear import TL_DTYPE, _sum_splits_kernel, finish, weights_times_rows
from .launch import aligned, launch
from .quantize_rows import quantize_rows


@triton.jit
def _four(first, second, places):
    """The four dense weights of each group from its two values and their places, the low bits: a tile each."""
    p, q = places & 3, (places >> 2) & 3
    none = tl.zeros_like(first)
    w0 = tl.where(p == 0, first, none)
    w1 = tl.where(p == 1, first, tl.where(q == 1, second, none))
    w2 = tl.where(p == 2, first, tl.where(q == 2, second, none))
    w3 = tl.where(q == 3, second, none)
    return w0, w1, w2, w3


@triton.jit
def _dense(first, second, places, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr):
    """[BLOCK_N, 4 BLOCK_B], the weights of a group side by side."""
    w0, w1, w2, w3 = _four(first, second, places)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_N, 4 * BLOCK_B)


@triton.jit(do_not_specialize=["M"])
def _sparse24_kernel(
    x_ptr, values_ptr, indices_ptr, scale_ptr, bias_ptr, row_scale_ptr, y_ptr, M, N, K, B, x_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, COMPUTE: tl.constexpr, EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N outputs of BLOCK_M rows, over all of K or one half of it (SPLIT_K 2); rows and outputs past
    # the end repeat the last one, not stored
    n_tiles = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, k = tl.arange(0, BLOCK_B), tl.arange(0, 4 * BLOCK_B)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * B
    indices_tile = indices_ptr + row + b[None, :]
    values_tile = values_ptr + 4 * row + b[None, :]
    x_tile = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if COMPUTE == tl.int8 else tl.float32)
    for start in range(0, B, BLOCK_B):
        inside = (start + b)[None, :] < B
        if EVEN_K:
            places = tl.load(indices_tile).to(tl.int32)
        else:
            places = tl.load(indices_tile, mask=inside, other=0).to(tl.int32)
        for part in tl.static_range(2 // SPLIT_K):
            half = part if SPLIT_K == 1 else tl.program_id(1)
            at = values_tile + 2 * half * B
            if EVEN_K:
                first, second = tl.load(at), tl.load(at + B)
                x = tl.load(x_tile + 4 * half * B)
            else:
                first, second = tl.load(at, mask=inside, other=0), tl.load(at + B, mask=inside, other=0)
                # a tile reaches past its half, where the weights are masked, and past the row
                x = tl.load(x_tile + 4 * half * B, mask=(4 * (half * B + start) + k)[:, None] < K, other=0)
            w = _dense(first, second, places >> (4 * half), BLOCK_N, BLOCK_B)
            acc = tl.dot(w.to(COMPUTE), x.to(COMPUTE), acc, input_precision="tf32", out_dtype=acc.dtype)
        indices_tile += BLOCK_B
        values_tile += BLOCK_B
        x_tile += 4 * BLOCK_B
    y_tile = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT_K == 1:
        scale, row_scale = None, None
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        if row_scale_ptr is not None:
            row_scale = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)[None, :]
        acc = finish(acc, scale, bias_ptr, row_scale, n[:, None], (n < N)[:, None], ACTIVATION, PARAMETER)
    else:
        y_tile += tl.program_id(1).to(tl.int64) * M * N
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _pick(x0, x1, x2, x3, place):
    """Of four inputs of each group the one at its place."""
    odd = (place & 1) != 0
    return tl.where((place & 2) != 0, tl.where(odd, x3, x2), tl.where(odd, x1, x0))


@triton.jit(do_not_specialize=["M"])
def _sparse24_gemv_kernel(
    x_ptr, values_ptr, indices_ptr, scale_ptr, bias_ptr, row_scale_ptr, y_ptr, M, N, K, B, x_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, COMPUTE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N outputs of one row; the kept inputs are picked, so that half the products are made
    m = (tl.program_id(0) % M).to(tl.int64)
    n = (tl.program_id(0) // M) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, k = tl.arange(0, BLOCK_B), tl.arange(0, 4 * BLOCK_B)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * B
    indices_tile = indices_ptr + row + b[None, :]
    values_tile = values_ptr + 4 * row + b[None, :]
    x_tile = x_ptr + m * x_stride + k
    SUM: tl.constexpr = tl.int32 if COMPUTE == tl.int8 else tl.float32
    acc = tl.zeros([BLOCK_N, BLOCK_B], SUM)
    for start in range(0, B, BLOCK_B):
        inside = (start + b)[None, :] < B
        if EVEN_K:
            places = tl.load(indices_tile).to(tl.int32)
        else:
            places = tl.load(indices_tile, mask=inside, other=0).to(tl.int32)
        for half in tl.static_range(2):
            at = values_tile + 2 * half * B
            if EVEN_K:
                first, second = tl.load(at), tl.load(at + B)
                x = tl.load(x_tile + 4 * half * B)
            else:
                first, second = tl.load(at, mask=inside, other=0), tl.load(at + B, mask=inside, other=0)
                x = tl.load(x_tile + 4 * half * B, mask=4 * (half * B + start) + k < K, other=0)
            even, odd = tl.split(x.to(COMPUTE).to(SUM).reshape(BLOCK_B, 2, 2))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            p, q = (places >> (4 * half)) & 3, (places >> (4 * half + 2)) & 3
            acc += first.to(SUM) * _pick(x0[None, :], x1[None, :], x2[None, :], x3[None, :], p)
            acc += second.to(SUM) * _pick(x0[None, :], x1[None, :], x2[None, :], x3[None, :], q)
        indices_tile += BLOCK_B
        values_tile += BLOCK_B
        x_tile += 4 * BLOCK_B
    scale, row_scale = None, None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + m)
    y = finish(tl.sum(acc, axis=1), scale, bias_ptr, row_scale, n, n < N, ACTIVATION, PARAMETER)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _expand_kernel(
    values_ptr, indices_ptr, dense_ptr, N, K, B, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr
):  # fmt: skip
    # one program: the dense weights of BLOCK_N outputs and BLOCK_B bytes of indices
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_B
    b, k = start + tl.arange(0, BLOCK_B), tl.arange(0, 4 * BLOCK_B)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    inside = (n < N)[:, None] & (b < B)[None, :]
    places = tl.load(indices_ptr + row * B + b[None, :], mask=inside, other=0).to(tl.int32)
    for half in tl.static_range(2):
        at = values_ptr + (4 * row + 2 * half) * B + b[None, :]
        first, second = tl.load(at, mask=inside, other=0), tl.load(at + B, mask=inside, other=0)
        w = _dense(first, second, places >> (4 * half), BLOCK_N, BLOCK_B)
        column = 4 * (half * B + start) + k
        # the end of a tile of the first half is the second half's beginning: not this program's
        mine = (4 * start + k < 4 * B) & (column < K)
        mask = (n < N)[:, None] if EVEN_K else (n < N)[:, None] & mine[None, :]
        tl.store(dense_ptr + row * K + column[None, :], w, mask=mask)


class Tile(NamedTuple):
    block_m: int  # 0: the GEMV, -1: the dense way, -2: torch's product
    block_n: int
    block_b: int
    warps: int
    stages: int
    split_k: int = 1


DENSE = Tile(-1, 0, 0, 0, 0)
TORCH = Tile(-2, 0, 0, 0, 0)


def tile(m: int, n: int, k: int, x_bytes: int, value_bytes: int) -> Tile:
    """The written rule, from arithmetic and compiled code, not from measurements.

    Up to 4 rows a program takes 8 outputs of one row. Up to 16 the picking out of weights is the work (int8 ones): two
    warps, each with outputs of its own, and K in halves where there would be fewer than 256 programs; not with fp32
    rows, which would spill on sm_80. Then bytes still count for more than products: 64 x 64, smaller while there would
    be fewer than 128 programs; 16 rows where K ends inside a tile, since masked loads of bytes would spill with more.
    From 512 rows on an H200's tensor cores need longer for a dense int8 product, 2 * 512 operations a weight, 0.5 ps,
    than its memory for the expanding, 1.6 bytes a weight, 0.4 ps; here each 64 rows expand anew.
    """
    if m >= 512:
        return DENSE
    if m <= 4:
        return Tile(0, 8, 128 if k % 1024 == 0 else 64, 4, 3)
    block_b = 32 if x_bytes == 1 and k % 256 == 0 else 16
    even = k % (8 * block_b) == 0
    if m <= 16 and even and value_bytes == 1 and x_bytes < 4:
        return Tile(16, 32, block_b, 2, 3, 2 if triton.cdiv(n, 32) < 256 else 1)
    block_m = max(16, triton.next_power_of_2(m)) if even else 16
    if triton.cdiv(m, 64) * triton.cdiv(n, 64) < 128 or block_m < 64:
        return Tile(min(32, block_m), 32, block_b, 4, 3)
    # two stages of fp32 rows: three would be 80 KB on a chip that has 64
    return Tile(64, 64, block_b, 4, 2 if x_bytes == 4 else 3)


def candidates(m: int, n: int, k: int, x_bytes: int, value_bytes: int) -> list[Tile]:
    """What a sweep measures beside the rule's, which comes first: where the GEMV ends and the dense way begins too."""
    found = [tile(m, n, k, x_bytes, value_bytes)]
    block_b = 32 if x_bytes == 1 and k % 256 == 0 else 16
    if m <= 16:
        found += [Tile(0, block_n, 128 if k % 1024 == 0 else 64, 4, 3) for block_n in (4, 8, 16)]
    most = 64 if k % (8 * block_b) == 0 else 16
    sizes = ((16, 16, 1, 2), (16, 32, 2, 2), (16, 32, 2, 1), (16, 32, 4, 1), (32, 32, 4, 1), (64, 64, 4, 1))
    found += [
        Tile(block_m, block_n, block_b, warps, 2 if x_bytes == 4 and block_m == 64 else 3, split)
        for block_m, block_n, warps, split in sizes
        if m > 1 and split <= 3 - value_bytes and block_m <= most and (m > 16 or block_m == 16)
    ]
    # fp16 and bf16 weights have no GEMV in the dense way
    found += [DENSE] if m > 64 else []
    found += [TORCH] if m > 64 and semi_structured.takes(n, k, x_bytes, value_bytes) else []
    return list(dict.fromkeys(found))


class Plan(NamedTuple):
    kernel: Any
    grid: tuple[int, int, int]
    constants: tuple[Any, ...]
    warps: int
    stages: int
    split_k: int = 1


# worked out once a shape: this is on the path of every call
@tiles.planned
def plan(
    m: int, n: int, k: int, b: int, x_bytes: int, value_bytes: int, compute: torch.dtype, activation: str, device: int
) -> Plan | Tile:
    """DENSE and TORCH, which have no kernel here, as they are."""
    bucket = tiles.linear_bucket("sparse24_linear", m, n, k, x_bytes, value_bytes)
    t = tiles.choose(
        bucket, device, tile(m, n, k, x_bytes, value_bytes), lambda: candidates(m, n, k, x_bytes, value_bytes)
    )
    if t in (DENSE, TORCH):
        return t
    entry, parameter = activations.parse(activation)
    # even: whole tiles, and a half of K ends with one
    constants: tuple[Any, ...] = (entry.name, parameter, TL_DTYPE[compute], k % (8 * t.block_b) == 0)
    if t.block_m == 0:
        grid = (triton.cdiv(n, t.block_n) * m, 1, 1)
        return Plan(_sparse24_gemv_kernel, grid, (*constants, t.block_n, t.block_b), t.warps, t.stages)
    grid = (triton.cdiv(m, t.block_m) * triton.cdiv(n, t.block_n), t.split_k, 1)
    constants += (t.split_k, t.block_m, t.block_n, t.block_b)
    return Plan(_sparse24_kernel, grid, constants, t.warps, t.stages, t.split_k)


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    y = x.new_empty(*x.shape[:-1], values.shape[0])
    rows, row_scale, compute = dense_rows(x), None, products(x, values, compute_dtype)
    (m, k), n, b = rows.shape, values.shape[0], values.shape[2]
    if m == 0:
        return y
    if compute == torch.int8:
        q = torch.empty(m, -(-k // 16) * 16, dtype=torch.int8, device=x.device)[:, :k]
        row_scale = torch.empty(m, dtype=torch.float32, device=x.device)
        quantize_rows(rows, None, q, row_scale)
        rows = q
    values, indices = values.contiguous(), indices.contiguous()
    p = plan(m, n, k, b, rows.element_size(), values.element_size(), compute, activation, x.get_device())
    if p == TORCH and scale is not None and compute == rows.dtype:
        found = semi_structured.sums(rows, values, indices, scale)
        if found is not None:
            _finish(*found, bias, activation, y)
            return y
    if isinstance(p, Tile):
        weight = expand(values, indices, k)
        weights_times_rows(rows, weight, scale, bias, activation, row_scale, y, compute)
        return y
    sums = y
    if p.split_k > 1:
        sums_dtype = torch.int32 if compute == torch.int8 else torch.float32
        sums = torch.empty(p.split_k, m, n, dtype=sums_dtype, device=x.device)
    tensors = rows, values, indices, scale, bias, row_scale, sums
    types = rows.dtype, values.dtype, y.dtype
    key = (*types, aligned(*tensors), bias is None, n, k, rows.stride(0), p.constants, p.warps, p.stages)
    launch(
        p.kernel, p.grid, key, (*tensors, m, n, k, b, rows.stride(0), *p.constants),
        num_warps=p.warps, num_stages=p.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if p.split_k > 1:
        launch(
            _sum_splits_kernel, (m, triton.cdiv(n, 1024), 1), (*key, aligned(y)),
            (sums, scale, bias, row_scale, y, m, n, *p.constants[:2], p.split_k, 1024),
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _finish(sums: Tensor, scale: Tensor, bias: Tensor | None, activation: str, y: Tensor) -> None:
    """y = act(scale * sums + bias)."""
    (m, n), (entry, parameter) = sums.shape, activations.parse(activation)
    tensors = sums, scale, bias, None, y
    key = (sums.dtype, aligned(*tensors), bias is None, n, entry.name, parameter)
    launch(
        _sum_splits_kernel, (m, triton.cdiv(n, 1024), 1), key, (*tensors, m, n, entry.name, parameter, 1, 1024),
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def expand(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """The dense weight [N, K], for one call: kept, it would take more memory than the packed form saves."""
    n, b = indices.shape
    weight = torch.empty(n, k, dtype=values.dtype, device=values.device)
    block_b = 64
    constants = (k % (8 * block_b) == 0, 16, block_b)
    key = (values.dtype, aligned(values, indices, weight), n, k, constants)
    launch(
        _expand_kernel, (triton.cdiv(n, 16), triton.cdiv(b, block_b), 1), key,
        (values, indices, weight, n, k, b, *constants), num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return weight
