"""quantize_rows on a GPU: each program takes a few rows, finds their largest magnitude, rounds them.

The rows are read twice; the second time they come from the cache. The arithmetic follows ``quantize.py`` to the bit:
true division, no fused multiply-add, rounding by adding and taking away 1.5 * 2^23, which is half to even.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import aligned, launch

ROUND = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["R"])
def _quantize_rows_kernel(
    x_ptr, static_ptr, q_ptr, scale_ptr, R, K, x_stride, q_stride, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    # one program: BLOCK_R rows of x [R, K] to q [R, K] int8 and scale [R]
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_row = x_ptr + tl.minimum(row, R - 1).to(tl.int64)[:, None] * x_stride
    q_row = q_ptr + row.to(tl.int64)[:, None] * q_stride

    amax = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        size = tl.abs(tl.load(x_row + k, mask=k < K, other=0.0).to(tl.float32))
        # a NaN compares false: it becomes inf, so that the maximum cannot lose it
        amax = tl.maximum(amax, tl.max(tl.where(size < float("inf"), size, float("inf")), axis=1))
    finite = amax < float("inf")

    if static_ptr is None:
        amax = tl.maximum(tl.where(finite, amax, 1.0), 1e-30)
        inverse = tl.div_rn(tl.full([BLOCK_R], 127.0, tl.float32), amax)
        scale = tl.div_rn(amax, tl.full([BLOCK_R], 127.0, tl.float32))
    else:
        scale = tl.load(static_ptr) + tl.zeros([BLOCK_R], tl.float32)
        inverse = tl.div_rn(tl.full([BLOCK_R], 1.0, tl.float32), scale)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")), mask=row < R)

    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_row + k, mask=k < K, other=0.0).to(tl.float32)
        scaled = tl.where(finite[:, None], x * inverse[:, None], 0.0)
        q = (tl.minimum(tl.maximum(scaled, -127.0), 127.0) + ROUND) - ROUND
        tl.store(q_row + k, q.to(tl.int8), mask=(row < R)[:, None] & (k < K))


def blocks(k: int) -> tuple[int, int]:
    """(rows, columns) a program holds at once: about 4096 elements, 32 a thread."""
    block_k = min(2048, max(16, triton.next_power_of_2(k)))
    return max(1, 4096 // block_k), block_k


def quantize_rows(x: Tensor, static_scale: Tensor | None, q: Tensor, scale: Tensor) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    r, k = x.shape
    if r == 0:
        return
    block_r, block_k = blocks(k)
    key = (x.dtype, aligned(x, static_scale, q, scale), static_scale is None, k, x.stride(0), q.stride(0))
    launch(
        _quantize_rows_kernel, (triton.cdiv(r, block_r), 1, 1), key,
        (x, static_scale, q, scale, r, k, x.stride(0), q.stride(0), block_r, block_k),
        num_warps=4, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
