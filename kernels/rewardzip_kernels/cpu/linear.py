"""One linear layer on packed weights, kernel and call.

A block of rows is taken into scratch memory once (``rows.py``), then passes under every panel of weights while it is
in cache (``sweep.py``). A call is split over threads by rows, or by panels where rows are few.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from numba import types
from torch import Tensor

from ..activations import parse
from ..checks import dense_rows
from . import threads
from .engine import kernel
from .instruction_sets import choose
from .outputs import in_large_pages
from .pointers import i64, load, stack
from .quick import settled_rows
from .rows import take_rows
from .sweep import sweep
from .tile import PANEL, Float, Int8

# rows that pass under the panels together, in a whole MLP and at least
BLOCK = 48
# and in one layer, where they fit: of weights beyond the cache it reads each fewer times
MOST_ROWS, ROWS_BYTES = 384, 3 << 19


def build(kind: Int8 | Float, activation: str):
    """The kernel's Python and its argument letters."""
    take, compute, item, inputs = take_rows(kind), sweep(kind, (activation,)), kind.item, kind.inputs
    rows_bytes = kind.rows_bytes
    sums_memory = stack(types.int32, MOST_ROWS * PANEL)

    def linear(
        layer, scale, bias, static, parameter, stride, block, scratch, x, m, y, first_panel, last_panel
    ):  # fmt: skip
        n, k = load(i64(layer), 3), load(i64(layer), 4)
        row_bytes = (k + inputs - 1) // inputs * inputs * item
        taken, sums = scratch + block * 4, sums_memory()
        for begin in range(0, m, block):
            rows = min(block, m - begin)
            take(x + begin * stride * rows_bytes, stride, rows, k, static, taken, row_bytes, scratch)
            y_at = y + begin * n * rows_bytes
            compute(
                layer, scale, bias, 0, parameter, rows, taken, row_bytes, scratch, y_at, n, first_panel, last_panel,
                sums,
            )  # fmt: skip

    return linear, "iiiifiiiiiiii"


@lru_cache(maxsize=256)
def prepare(kind: Any, activation: str, isa: str | None) -> tuple[Any, float]:
    """(the compiled kernel or None, the activation's parameter)."""
    entry, parameter = parse(activation)
    chosen = choose(isa)
    key = (kind.__name__, chosen.name, entry.name)
    return kernel(key, lambda: build(kind(chosen), entry.name)), parameter


def block_of(m: int, row_bytes: int) -> int:
    """Rows that pass under the panels together: whole tiles of any kind."""
    return min(m, max(BLOCK, min(MOST_ROWS, ROWS_BYTES // row_bytes) // 12 * 12))


def linear(
    kind: Any,
    x: Tensor,
    weights: Callable[[], Any],
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    x_scale: Tensor | None,
    isa: str | None,
) -> Tensor | None:
    """x [..., K] -> y [..., N], by a kind of tile, both in its type of rows; None where the kernel cannot be compiled.

    ``weights`` gives them packed as the kind reads them, once it is known that they will be needed.
    """
    run, parameter = prepare(kind, activation, isa)
    if run is None:
        return None
    layer = weights()
    n, k = layer.n, layer.k
    y = in_large_pages(x.new_empty((*x.shape[:-1], n)))
    if x.dim() != 2 or x.stride(1) != 1:
        x = dense_rows(x)
    m, stride = x.shape[0], x.stride(0)
    scale = layer.ones if scale is None else scale.contiguous()
    bias_at = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at = bias.data_ptr()
    row_bytes = layer.padded_k * kind.item
    block = block_of(m, row_bytes)
    static = 0 if x_scale is None else x_scale.data_ptr()
    fixed = layer.address, scale.data_ptr(), bias_at, static, parameter, stride, block
    x_at, y_at, size, panels = x.data_ptr(), y.data_ptr(), block * (row_bytes + 4), layer.count
    if m * n * k < 2 * kind.parallel_work or (count := torch.get_num_threads()) == 1:
        run(*fixed, threads.scratch(size), x_at, m, y_at, 0, panels)
        return y

    def some_rows(start: int, stop: int) -> None:
        rows_at = x_at + start * stride * kind.rows_bytes, stop - start, y_at + start * n * kind.rows_bytes
        run(*fixed, threads.scratch(size), *rows_at, 0, panels)

    def some_panels(start: int, stop: int) -> None:
        run(*fixed, threads.scratch(size), x_at, m, y_at, start, stop)

    if m >= count * BLOCK:
        threads.run(some_rows, threads.ranges(m, count, 12, BLOCK))
    else:
        threads.run(some_panels, threads.ranges(panels, count, 1))
    return y


def settled(
    kind: Any,
    pack: Callable[..., Any],
    weights: tuple[Tensor, ...],
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    x_scale: Tensor | None,
    x: Tensor,
) -> Callable[[Tensor], Tensor | None] | None:
    """``linear`` for inputs of x's shape, all else looked up already; None where that is not the work of one thread.

    It gives None for inputs that are not of its type and contiguous on a CPU, and once one of the ``weights``, which
    ``pack`` makes a layer of, has been written to. The other tensors are read where they lie.
    """
    run, parameter = prepare(kind, activation, None)
    dense = all(vector is None or vector.is_contiguous() for vector in (scale, bias))
    if run is None or any(weight.is_inference() for weight in weights) or not dense:
        return None
    layer, m = pack(*weights), x.shape[:-1].numel()
    fits = x.dtype.itemsize == kind.rows_bytes and x.shape[-1] == layer.k and m > 0
    if not fits or m * layer.n * layer.k >= 2 * kind.parallel_work:
        return None
    scale = layer.ones if scale is None else scale
    row_bytes = layer.padded_k * kind.item
    block = block_of(m, row_bytes)
    at = layer.address, scale.data_ptr(), 0 if bias is None else bias.data_ptr()
    fixed = *at, 0 if x_scale is None else x_scale.data_ptr(), parameter, layer.k, block
    size, held = block * (row_bytes + 4), (layer, scale, bias, x_scale)
    return settled_rows(run, fixed, (0, layer.count), x, (*x.shape[:-1], layer.n), size, weights, held)
