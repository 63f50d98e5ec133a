"""int8 weights times rows, on a GPU: one kernel for float and for int8 rows, a GEMV for few, two passes for split K.

The operands are swapped, y^T = weight @ x^T, so that the weights are the tensor core's first operand: dequantised in
registers, they never pass through shared memory, and the rows are its narrow side, as few as 16.

    M, N, K      rows, outputs, inputs           weight [N, K]            one program: BLOCK_N outputs x BLOCK_M rows
    x [M, K]     float or int8                           K ->     x^T [K, M]      acc [BLOCK_N, BLOCK_M]
    y [M, N]     x's dtype, or partial sums           N  [ w ] @ [   x^T   ]  =   y^T
    partial      [SPLIT_K, M, N] fp32 or int32        |
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import activations
from ..checks import dense_rows
from . import tiles
from .activations import activate
from .launch import aligned, launch, settled

TL_DTYPE = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
}


@triton.jit
def finish(acc, scale, bias_ptr, row_scale, n, n_mask, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr):
    """The epilogue: acc, scale, n broadcast against each other; row_scale None or the scale of int8 rows."""
    y = acc.to(tl.float32)
    if scale is not None:
        y *= scale if row_scale is None else scale * row_scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0)
    return activate(y, ACTIVATION, PARAMETER)


@triton.jit
def tile_sums(
    x_ptr, weight_ptr, M, N, K, x_stride, m, n, first, steps,
    COMPUTE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weight[n] @ x[m]^T over ``steps`` tiles of inputs from ``first`` on: [BLOCK_N, BLOCK_M]."""
    k = tl.arange(0, BLOCK_K)

    # rows and outputs past the end repeat the last one and are not stored: no mask inside the loop
    x_tile = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * x_stride + (first + k)[:, None]
    w_tile = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + (first + k)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if COMPUTE == tl.int8 else tl.float32)
    for step in range(steps):
        if EVEN_K:
            w, x = tl.load(w_tile), tl.load(x_tile)
        else:
            left = K - first - step * BLOCK_K
            w = tl.load(w_tile, mask=k[None, :] < left, other=0)
            x = tl.load(x_tile, mask=k[:, None] < left, other=0)
        acc = tl.dot(w.to(COMPUTE), x.to(COMPUTE), acc, input_precision="tf32", out_dtype=acc.dtype)
        w_tile += BLOCK_K
        x_tile += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["M"])
def _int8_linear_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, row_scale_ptr, y_ptr, M, N, K, x_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, COMPUTE: tl.constexpr, EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share their rows and walk over the outputs: rows are read from memory once
    n_tiles = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first = tl.program_id(1) * steps * BLOCK_K
    acc = tile_sums(
        x_ptr, weight_ptr, M, N, K, x_stride, m, n, first, steps, COMPUTE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
    )
    y_tile = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    if SPLIT_K == 1:
        scale, row_scale = None, None
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        if row_scale_ptr is not None:
            row_scale = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)[None, :]
        acc = finish(acc, scale, bias_ptr, row_scale, n[:, None], (n < N)[:, None], ACTIVATION, PARAMETER)
    else:
        y_tile += tl.program_id(1).to(tl.int64) * M * N
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _sum_splits_kernel(
    partial_ptr, scale_ptr, bias_ptr, row_scale_ptr, y_ptr, M, N,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK outputs of one row, the partial sums added in a fixed order
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    acc = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + (split * M + m) * N + n, mask=inside, other=0)
    row_scale = None
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + m)
    scale = tl.load(scale_ptr + n, mask=inside, other=0.0)
    y = finish(acc, scale, bias_ptr, row_scale, n, inside, ACTIVATION, PARAMETER)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_sums(
    x_ptr, weight_ptr, N, K, x_stride, m, n,
    COMPUTE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weight[n] @ x[m] for one row m, without a tensor core: [BLOCK_N]."""
    k = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + m * x_stride + k
    w_tile = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    SUM: tl.constexpr = tl.int32 if COMPUTE == tl.int8 else tl.float32
    acc = tl.zeros([BLOCK_N, BLOCK_K], SUM)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            w, x = tl.load(w_tile), tl.load(x_tile)
        else:
            w = tl.load(w_tile, mask=k[None, :] < K - start, other=0)
            x = tl.load(x_tile, mask=k < K - start, other=0)
        acc += w.to(SUM) * x.to(COMPUTE).to(SUM)[None, :]
        w_tile += BLOCK_K
        x_tile += BLOCK_K
    return tl.sum(acc, axis=1)


@triton.jit(do_not_specialize=["M"])
def _int8_gemv_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, row_scale_ptr, y_ptr, M, N, K, x_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, COMPUTE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N outputs of one row; the programs of a tile's rows are neighbours and share it in the cache
    m = (tl.program_id(0) % M).to(tl.int64)
    n = (tl.program_id(0) // M) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = row_sums(x_ptr, weight_ptr, N, K, x_stride, m, n, COMPUTE, EVEN_K, BLOCK_N, BLOCK_K)
    row_scale = None
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + m)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    y = finish(sums, scale, bias_ptr, row_scale, n, n < N, ACTIVATION, PARAMETER)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


class Tile(NamedTuple):
    block_m: int  # 0: the GEMV
    block_n: int
    block_k: int
    split_k: int
    warps: int
    stages: int


def tile(m: int, n: int, k: int, x_bytes: int) -> Tile:
    """The written rule, from arithmetic and compiled code, not yet from measurements.

    Few rows: bytes of weights are all that counts, so narrow output tiles give every multiprocessor some, and K is
    split where there are still fewer than 128 programs and each part keeps 1024 inputs. Many rows: 128 x 128, where a
    tile's products outweigh its loads; 64 x 64 where K is odd, whose byte-wide loads would spill. x_bytes shortens the
    K tile so that the stages fit in shared memory.
    """
    if m <= 4:
        return Tile(0, 8, 512, 1, 4, 3)
    block_k = 128 // x_bytes if x_bytes > 1 else 128
    if m <= 64:
        block_m = max(16, triton.next_power_of_2(m))
        programs = triton.cdiv(n, 64)
        split = 1
        while programs * split < 128 and k // (2 * split) >= 1024 and split < 16:
            split *= 2
        return Tile(block_m, 64, min(128, 2 * block_k), split, 4, 4 if block_m < 64 else 3)
    if m <= 1024 or k % 16:
        return Tile(64, 64, block_k, 1, 4, 4)
    return Tile(128, 128, block_k, 1, 8, 3)


def candidates(m: int, n: int, k: int, x_bytes: int) -> list[Tile]:
    """What a sweep measures beside the rule's, which comes first; a measured tile is one of these or not used."""
    found = [tile(m, n, k, x_bytes)]
    block_k = 128 // x_bytes if x_bytes > 1 else 128
    most = min(128, max(16, triton.next_power_of_2(m)))
    if m <= 16:
        found += [Tile(0, block_n, size, 1, 4, 3) for block_n in (4, 8, 16) for size in (256, 512)]
    for block_m, block_n in product((16, 32, 64, 128), (64, 128)):
        # of few rows the weights are the work: wider K tiles, K in parts
        splits = [s for s in (1, 2, 4, 8, 16) if s == 1 or (block_n == 64 and m <= 64 and k // s >= 512)]
        if most // 4 <= block_m <= most:
            found += [Tile(block_m, block_n, min(128, 2 * block_k), s, 4, 3) for s in splits if m <= 64]
            found += [Tile(block_m, block_n, block_k, 1, warps, 3) for warps in (4, 8) if m > 16 or warps == 4]
    return list(dict.fromkeys(found))


class Plan(NamedTuple):
    """How one product is launched: what does not depend on the addresses."""

    kernel: Any
    grid: tuple[int, int, int]
    split_k: int
    epilogue: tuple[str, float]
    constants: tuple[Any, ...]
    warps: int
    stages: int
    variant: tuple[Any, ...]  # what of this a compiled kernel depends on


# worked out once a shape: this is on the path of every call
@tiles.planned
def plan(
    m: int, n: int, k: int, x_bytes: int, weight_bytes: int, compute: torch.dtype, activation: str, device: int
) -> Plan:
    bucket = tiles.linear_bucket("int8_linear", m, n, k, x_bytes, weight_bytes)
    t = tiles.choose(bucket, device, tile(m, n, k, x_bytes), lambda: candidates(m, n, k, x_bytes))
    entry, parameter = activations.parse(activation)
    epilogue = (entry.name, parameter)
    constants: tuple[Any, ...] = (*epilogue, TL_DTYPE[compute], k % (t.block_k * t.split_k) == 0)
    if t.block_m == 0:
        grid = (triton.cdiv(n, t.block_n) * m, 1, 1)
        constants += (t.block_n, t.block_k)
        return Plan(_int8_gemv_kernel, grid, 1, epilogue, constants, t.warps, t.stages, (*constants, t.warps, t.stages))
    grid = (triton.cdiv(m, t.block_m) * triton.cdiv(n, t.block_n), t.split_k, 1)
    constants += (t.split_k, t.block_m, t.block_n, t.block_k)
    variant = (*constants, t.warps, t.stages)
    return Plan(_int8_linear_kernel, grid, t.split_k, epilogue, constants, t.warps, t.stages, variant)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    weights_times_rows(dense_rows(x), weight, scale, bias, activation, None, y, compute_dtype or x.dtype)
    return y


def _settled(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    x_scale: Tensor | None,
    like: Tensor,
) -> Callable[[Tensor], Tensor | None] | None:
    """The launch for inputs of this shape and type, all else looked up already; None where it takes two, or where
    no launch of such inputs was compiled yet.

    It gives None for other inputs. The tensors are read where they lie.
    """
    (n, k), m = weight.shape, like.shape[:-1].numel()
    dense = like.is_contiguous() and weight.is_contiguous() and aligned(like, weight, scale, bias) is True
    if m == 0 or like.shape[-1] != k or not dense:
        return None
    dtype, device = like.dtype, like.get_device()
    p = plan(m, n, k, like.element_size(), 1, dtype, activation, device)
    if p.split_k > 1:
        return None
    # what is allocated anew is aligned
    key = (dtype, weight.dtype, dtype, True, bias is None, n, k, k, p.variant)
    go = settled(p.kernel, p.grid, key, like.device)
    if go is None or ((like.dim() == 1 or m == 1) and dense_rows(like).stride(0) != k):
        return None
    shape, sizes = (*like.shape[:-1], n), (m, n, k, k, *p.constants)

    def call(x: Tensor) -> Tensor | None:
        if x.dtype is not dtype or x.get_device() != device or not x.is_contiguous() or x.is_neg():
            return None
        if x.data_ptr() & 15:
            return None
        y = x.new(*shape)
        return y if go(x, weight, scale, bias, None, y, *sizes) else None

    return call


int8_linear.settled = _settled  # type: ignore[attr-defined]


def _key(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, row_scale: Tensor | None, y: Tensor, p: Plan
) -> tuple[Any, ...]:
    at = aligned(x, weight, scale, bias, row_scale, y)
    return (x.dtype, weight.dtype, y.dtype, at, bias is None, *weight.shape, x.stride(0), p.variant)


def weights_times_rows(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    row_scale: Tensor | None,
    y: Tensor,
    compute: torch.dtype,
) -> None:
    """y [M, N] = act(scale * row_scale * (x @ weight^T) + bias); x [M, K] float, or int8 with its row_scale.

    The weight is int8, or float with no scale where M is beyond 64: one pass, no split."""
    (m, k), n, stride = x.shape, weight.shape[0], x.stride(0)
    if m == 0:
        return
    weight = weight.contiguous()
    p = plan(m, n, k, x.element_size(), weight.element_size(), compute, activation, x.get_device())
    key = _key(x, weight, scale, bias, row_scale, y, p)
    sums = y
    if p.split_k > 1:
        sums_dtype = torch.int32 if compute == torch.int8 else torch.float32
        sums = torch.empty(p.split_k, m, n, dtype=sums_dtype, device=x.device)
    launch(
        p.kernel, p.grid, key, (x, weight, scale, bias, row_scale, sums, m, n, k, stride, *p.constants),
        num_warps=p.warps, num_stages=p.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if p.split_k > 1:
        launch(
            _sum_splits_kernel, (m, triton.cdiv(n, 1024), 1), key,
            (sums, scale, bias, row_scale, y, m, n, *p.epilogue, p.split_k, 1024),
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
