"""block_sparse_linear on a GPU: a program walks over the stored blocks of one block row, and touches nothing else.

The operands are swapped as in ``int8_linear.py``, y^T = W @ x^T: a block of weights is the tensor core's first operand,
widened in registers, the rows of x its narrow side. 64 x 64 blocks keep wgmma. Blocks whose inputs do not fill a step
are laid side by side until they do, and their inputs gathered. Block rows start heaviest first, so that the last ones
to end are short.

    block row r:  values[starts[r] : starts[r + 1]]  [BN, BK] each        one program: BLOCK_N outputs x BLOCK_M rows
    columns       where in a row of x each block's BK inputs begin        acc [BLOCK_N, BLOCK_M]
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import activations
from ..block_sparse_linear import compute_type
from ..blocks import check_pattern
from ..checks import dense_rows
from ..kept import Kept
from .int8_linear import TL_DTYPE, finish
from .launch import aligned, launch
from .quantize_rows import quantize_rows


@triton.jit
def flat_step(values_row, columns_ptr, first, stored, step, BN: tl.constexpr, BK: tl.constexpr, BLOCK_K: tl.constexpr):
    """A step over blocks side by side: (where its weights are [.., BLOCK_K], their inputs, which are there at all)."""
    e = step * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = e < stored * BK
    block, within = first + e // BK, e % BK
    k = tl.load(columns_ptr + block, mask=inside, other=0) * BK + within
    return values_row + block.to(tl.int64) * (BN * BK) + within, k, inside


@triton.jit(do_not_specialize=["M"])
def _block_sparse_linear_kernel(
    x_ptr, values_ptr, columns_ptr, starts_ptr, order_ptr, scale_ptr, bias_ptr, row_scale_ptr, y_ptr,
    M, N, K, x_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, COMPUTE: tl.constexpr, EVEN_K: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share their blocks and walk over the rows
    PARTS: tl.constexpr = (BN + BLOCK_N - 1) // BLOCK_N
    m_tiles = tl.cdiv(M, BLOCK_M)
    r = tl.load(order_ptr + tl.program_id(0) // (m_tiles * PARTS))
    m = (tl.program_id(0) % m_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = (tl.program_id(0) // m_tiles) % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    n = r * BN + inner
    n_inside = (inner < BN) & (n < N)
    first = tl.load(starts_ptr + r)
    stored = tl.load(starts_ptr + r + 1) - first

    # rows and outputs past the end repeat the last one and are not stored
    x_rows = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * x_stride
    values_rows = values_ptr + tl.minimum(inner, BN - 1)[:, None] * BK
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if COMPUTE == tl.int8 else tl.float32)
    if BK % BLOCK_K == 0:
        STEPS: tl.constexpr = BK // BLOCK_K
        for step in range(stored * STEPS):
            block, within = first + step // STEPS, (step % STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)
            k = tl.load(columns_ptr + block) * BK + within
            w = tl.load(values_rows + block.to(tl.int64) * (BN * BK) + within[None, :])
            if EVEN_K:
                x = tl.load(x_rows + k[:, None])
            else:
                x = tl.load(x_rows + k[:, None], mask=(k < K)[:, None], other=0)
            acc = tl.dot(w.to(COMPUTE), x.to(COMPUTE), acc, input_precision="tf32", out_dtype=acc.dtype)
    else:
        for step in range(tl.cdiv(stored * BK, BLOCK_K)):
            w_at, k, inside = flat_step(values_rows, columns_ptr, first, stored, step, BN, BK, BLOCK_K)
            w = tl.load(w_at, mask=inside[None, :], other=0)
            x = tl.load(x_rows + k[:, None], mask=(inside & (k < K))[:, None], other=0)
            acc = tl.dot(w.to(COMPUTE), x.to(COMPUTE), acc, input_precision="tf32", out_dtype=acc.dtype)

    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n, mask=n_inside, other=0.0)[:, None]
    row_scale = None
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    y = finish(acc, scale, bias_ptr, row_scale, n[:, None], n_inside[:, None], ACTIVATION, PARAMETER)
    y_tile = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & n_inside[:, None])


@triton.jit(do_not_specialize=["M"])
def _block_gemv_kernel(
    x_ptr, values_ptr, columns_ptr, starts_ptr, order_ptr, scale_ptr, bias_ptr, row_scale_ptr, y_ptr,
    M, N, K, x_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, COMPUTE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N outputs of one row, without a tensor core; the programs of a block row are neighbours
    PARTS: tl.constexpr = (BN + BLOCK_N - 1) // BLOCK_N
    m = (tl.program_id(0) % M).to(tl.int64)
    r = tl.load(order_ptr + tl.program_id(0) // (M * PARTS))
    inner = (tl.program_id(0) // M) % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    n = r * BN + inner
    n_inside = (inner < BN) & (n < N)
    first = tl.load(starts_ptr + r)
    stored = tl.load(starts_ptr + r + 1) - first
    SUM: tl.constexpr = tl.int32 if COMPUTE == tl.int8 else tl.float32
    values_rows = values_ptr + tl.minimum(inner, BN - 1)[:, None] * BK
    acc = tl.zeros([BLOCK_N, BLOCK_K], SUM)
    for step in range(tl.cdiv(stored * BK, BLOCK_K)):
        w_at, k, inside = flat_step(values_rows, columns_ptr, first, stored, step, BN, BK, BLOCK_K)
        w = tl.load(w_at, mask=inside[None, :], other=0)
        x = tl.load(x_ptr + m * x_stride + k, mask=inside & (k < K), other=0)
        acc += w.to(SUM) * x.to(COMPUTE).to(SUM)[None, :]
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n, mask=n_inside, other=0.0)
    row_scale = None
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + m)
    y = finish(tl.sum(acc, axis=1), scale, bias_ptr, row_scale, n, n_inside, ACTIVATION, PARAMETER)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask=n_inside)


class Tile(NamedTuple):
    block_m: int  # 0: the GEMV
    block_n: int
    block_k: int
    stages: int


@lru_cache(maxsize=4096)
def tile(m: int, bn: int, bk: int, x_bytes: int) -> Tile:
    """The written rule, from arithmetic and compiled code, not from measurements.

    A block row is one tile of outputs, or several where it is taller than 64. Few rows: bytes of weights are all that
    counts. x_bytes shortens a step so that its stages fit in shared memory.
    """
    block_n = min(64, max(16, triton.next_power_of_2(bn)))
    if m <= 4:
        return Tile(0, min(block_n, 16), 256, 3)
    block_m = max(16, triton.next_power_of_2(m)) if m <= 64 else 64 if m <= 1024 else 128
    return Tile(block_m, block_n, 32 if x_bytes == 4 else 64, 3)


def _heaviest_first(columns: Tensor, starts: Tensor, n: int, k: int, bn: int, bk: int) -> Tensor:
    """The block rows by how many blocks they hold, once the pattern has been found to stay inside the weight."""
    if not starts.is_meta:
        check_pattern(columns, starts, n, k, (bn, bk))
    return starts.diff().argsort(descending=True, stable=True).to(torch.int32)


heaviest_first = Kept(_heaviest_first)


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    out_features: int,
    in_features: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    dynamic: bool = False,
) -> Tensor:
    n, k, (_, bn, bk) = out_features, in_features, values.shape
    y = x.new_empty(*x.shape[:-1], n)
    rows, row_scale, compute = dense_rows(x), None, compute_type(x.dtype, values.dtype)
    m = rows.shape[0]
    if m == 0:
        return y
    order = heaviest_first((columns, starts), n, k, bn, bk)
    if dynamic:
        # padded to 16 bytes, so that any K loads in wide words
        q = torch.empty(m, -(-k // 16) * 16, dtype=torch.int8, device=x.device)[:, :k]
        row_scale = torch.empty(m, dtype=torch.float32, device=x.device)
        quantize_rows(rows, None, q, row_scale)
        rows, compute = q, torch.int8
    t, stride, values = tile(m, bn, bk, rows.element_size()), rows.stride(0), values.contiguous()
    entry, parameter = activations.parse(activation)
    constants: tuple[Any, ...] = (entry.name, parameter, TL_DTYPE[compute])
    row_tiles = (starts.shape[0] - 1) * triton.cdiv(bn, t.block_n)
    if t.block_m == 0:
        kernel, programs = _block_gemv_kernel, row_tiles * m
        constants = (*constants, bn, bk, t.block_n, t.block_k)
    else:
        kernel, programs = _block_sparse_linear_kernel, row_tiles * triton.cdiv(m, t.block_m)
        constants = (*constants, k % bk == 0, bn, bk, t.block_m, t.block_n, t.block_k)
    tensors = rows, values, columns, starts, order, scale, bias, row_scale, y
    key = (rows.dtype, values.dtype, y.dtype, aligned(*tensors), bias is None, scale is None, n, k, stride, constants)
    launch(
        kernel, (programs, 1, 1), key, (*tensors, m, n, k, stride, *constants),
        num_warps=4, num_stages=t.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y
