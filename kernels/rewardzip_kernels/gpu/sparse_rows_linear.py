"""sparse_rows_linear on a GPU: a warp an output, its nonzeros read in order, the inputs they name gathered.

There is no tensor-core path for nonzeros without a pattern. What is read once is 3 bytes a nonzero (int8 and 16-bit
columns); the rows come from the cache, each nonzero's from another place. For few rows: each further one is gathered
anew, at the price of the first.

    x [M, K]    values, columns [room]    starts [N + 1]    one program: BLOCK_M rows of one output
"""

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import activations
from ..checks import dense_rows
from .int8_linear import finish
from .launch import aligned, launch


@triton.jit(do_not_specialize=["M"])
def _sparse_rows_kernel(
    x_ptr, values_ptr, columns_ptr, starts_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, x_stride, room,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # neighbouring programs are outputs of the same rows
    n = tl.program_id(0) % N
    m = (tl.program_id(0) // N) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_stride
    # what lies outside of the stored nonzeros or of a row is not read, whatever the tensors say
    first, last = tl.maximum(tl.load(starts_ptr + n), 0), tl.minimum(tl.load(starts_ptr + n + 1), room)
    acc = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        column = tl.load(columns_ptr + i, mask=i < last, other=-1).to(tl.int32)
        value = tl.load(values_ptr + i, mask=i < last, other=0).to(tl.float32)
        inside = (column >= 0) & (column < K)
        x = tl.load(x_rows + column[None, :], mask=inside[None, :], other=0).to(tl.float32)
        acc += tl.where(inside, value, 0.0)[None, :] * x
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n)
    y = finish(tl.sum(acc, axis=1), scale, bias_ptr, None, n, n < N, ACTIVATION, PARAMETER)
    tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=m < M)


# worked out once a shape: this is on the path of every call
@lru_cache(maxsize=4096)
def plan(m: int, n: int, per_output: int, activation: str) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
    """(grid, constants) by the written rule, unmeasured: a warp, as many nonzeros a turn as an output has, to 128."""
    block_m = min(8, triton.next_power_of_2(m))
    block = min(128, max(32, triton.next_power_of_2(per_output)))
    entry, parameter = activations.parse(activation)
    return (triton.cdiv(m, block_m) * n, 1, 1), (entry.name, parameter, block_m, block)


def sparse_rows_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    n, room = starts.shape[0] - 1, values.shape[0]
    y = x.new_empty(*x.shape[:-1], n)
    rows = dense_rows(x)
    (m, k), stride = rows.shape, rows.stride(0)
    if m == 0:
        return y
    values, columns, starts = values.contiguous(), columns.contiguous(), starts.contiguous()
    grid, constants = plan(m, n, room // n, activation)
    tensors = rows, values, columns, starts, scale, bias, y
    types = rows.dtype, values.dtype, columns.dtype, y.dtype
    key = (*types, aligned(*tensors), scale is None, bias is None, n, k, stride, room, constants)
    launch(
        _sparse_rows_kernel, grid, key, (*tensors, m, n, k, stride, room, *constants),
        num_warps=1, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return y
