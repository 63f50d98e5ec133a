"""One linear layer on packed weights: rows in blocks, panels of 64 outputs, a register tile, its epilogue.

    y = act(sums * (row_scale * scale) + bias)

A block of rows is taken into scratch memory once (``rows.py``), then passes under every panel while it is in cache.
The tile's sums go through 1.5 KB of stack to the epilogue, which LLVM vectorises over the outputs.
"""

from functools import lru_cache
from typing import Any

import torch
from numba import types
from numpy import float32
from torch import Tensor

from ..activations import parse
from ..checks import dense_rows
from . import threads
from .activations import ACTIVATIONS, inlined
from .engine import kernel
from .instruction_sets import choose
from .packing import packed
from .pointers import f32, i32, i64, load, stack, store
from .rows import copy, quantize
from .tile import PANEL, Float, Int8, tile

# a block of rows fills about this many bytes, half a small L2 cache
BLOCK_BYTES = 1 << 18
ROWS_AT_LEAST, ROWS_AT_MOST = 48, 384


def block_rows(row_bytes: int) -> int:
    return max(ROWS_AT_LEAST, min(ROWS_AT_MOST, BLOCK_BYTES // row_bytes // 48 * 48))


def build(kind: Int8 | Float, activation: str):
    """The kernel's Python and its argument letters."""
    activate = ACTIVATIONS[activation]
    whole = isinstance(kind, Int8)
    fill = quantize(kind.isa.zero_point) if whole else copy
    start_field = 1 if whole and kind.isa.zero_point else 2
    tall, tall_rows, single = tile(kind, kind.isa.rows), kind.isa.rows, tile(kind, 1)
    middle, middle_rows = tile(kind, kind.isa.rows // 2), kind.isa.rows // 2
    tile_sums = stack(types.int32, tall_rows * PANEL)
    pointer, item = i32 if whole else f32, kind.item

    @inlined
    def finish(sums_address, rows, width, scales, scale, bias, y_address, n, parameter):
        for r in range(rows):
            sums, y = pointer(sums_address + r * PANEL * 4), f32(y_address + r * n * 4)
            row_scale = load(scales, r)
            for j in range(width):
                value = float32(load(sums, j)) * (row_scale * load(scale, j)) + load(bias, j)
                store(y, j, activate(value, parameter))

    def linear(
        layer, scale, bias, static, parameter, stride, block, scratch, x, m, y, first_panel, last_panel
    ):  # fmt: skip
        header = i64(layer)
        panels, start, zeros = load(header, 0), load(header, start_field), load(header, 2)
        n, k = load(header, 3), load(header, 4)
        bias = bias or zeros
        steps = (k + 3) // 4
        row_bytes = 4 * steps * item
        taken = scratch + block * 4
        sums = tile_sums()
        for begin in range(0, m, block):
            rows = min(block, m - begin)
            for r in range(rows):
                x_row = x + (begin + r) * stride * 4
                store(f32(scratch), r, fill(x_row, k, 4 * steps, static, taken + r * row_bytes))
            for panel in range(first_panel, last_panel):
                column = panel * PANEL
                width = min(PANEL, n - column)
                w, first = panels + panel * steps * PANEL * 4, start + column * 4
                done = 0
                while done < rows:
                    rows_at = taken + done * row_bytes
                    if rows - done >= tall_rows:
                        tall(rows_at, row_bytes, w, steps, width, first, sums)
                        now = tall_rows
                    elif rows - done >= middle_rows:
                        middle(rows_at, row_bytes, w, steps, width, first, sums)
                        now = middle_rows
                    else:
                        single(rows_at, row_bytes, w, steps, width, first, sums)
                        now = 1
                    y_at = y + ((begin + done) * n + column) * 4
                    scales, scale_at, bias_at = f32(scratch + done * 4), f32(scale + column * 4), f32(bias + column * 4)
                    if width == PANEL:
                        finish(sums, now, PANEL, scales, scale_at, bias_at, y_at, n, parameter)
                    else:
                        finish(sums, now, width, scales, scale_at, bias_at, y_at, n, parameter)
                    done += now

    return linear, "iiiifiiiiiiii"


@lru_cache(maxsize=256)
def prepare(kind: type[Int8] | type[Float], activation: str, isa: str | None) -> tuple[Any, float]:
    """(the compiled kernel or None, the activation's parameter)."""
    entry, parameter = parse(activation)
    chosen = choose(isa)
    key = (kind.__name__.lower(), chosen.name, entry.name)
    return kernel(key, lambda: build(kind(chosen), entry.name)), parameter


def linear(
    kind: type[Int8] | type[Float],
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    x_scale: Tensor | None,
    isa: str | None,
) -> Tensor | None:
    """x [..., K] fp32 -> y [..., N] fp32; None where the kernel cannot be compiled."""
    run, parameter = prepare(kind, activation, isa)
    if run is None:
        return None
    layer = packed(weight)
    n, k = layer.n, layer.k
    y = torch.empty((*x.shape[:-1], n), dtype=torch.float32)
    if x.dim() != 2 or x.stride(1) != 1:
        x = dense_rows(x)
    m, stride = x.shape[0], x.stride(0)
    if not scale.is_contiguous():
        scale = scale.contiguous()
    bias_at = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at = bias.data_ptr()
    row_bytes = layer.padded_k * kind.item
    block = min(block_rows(row_bytes), m)
    static = 0 if x_scale is None else x_scale.data_ptr()
    fixed = layer.address, scale.data_ptr(), bias_at, static, parameter, stride, block
    x_at, y_at, size, panels = x.data_ptr(), y.data_ptr(), block * (row_bytes + 4), layer.count
    if m * n * k < threads.PARALLEL_WORK or (count := torch.get_num_threads()) == 1:
        run(*fixed, threads.scratch(size), x_at, m, y_at, 0, panels)
        return y

    def some_rows(start: int, stop: int) -> None:
        rows_at = x_at + start * stride * 4, stop - start, y_at + start * n * 4
        run(*fixed, threads.scratch(size), *rows_at, 0, panels)

    def some_panels(start: int, stop: int) -> None:
        run(*fixed, threads.scratch(size), x_at, m, y_at, start, stop)

    if m >= count * ROWS_AT_LEAST:
        threads.run(some_rows, threads.ranges(m, count, 12))
    else:
        threads.run(some_panels, threads.ranges(panels, count, 1))
    return y
