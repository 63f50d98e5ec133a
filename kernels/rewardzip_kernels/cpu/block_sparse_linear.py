"""block_sparse_linear on a CPU: rows in groups as tall as the tile, interleaved, under every stored piece of weights.

Blocks of any shape are cut into pieces of 4 inputs x 16 outputs first (``block_packing.py``), the form that one vector
instruction multiplies. Four groups of 16 outputs share the epilogue of ``sweep.py``.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from numba import types
from torch import Tensor

from ..activations import parse
from ..block_sparse_linear import block_sparse_linear_reference
from ..checks import dense_rows
from . import threads
from .activations import inlined
from .block_packing import GROUPS, packed_blocks
from .block_tile import OUTPUTS, Wide, heights, interleave, piece_sums
from .engine import kernel
from .instruction_sets import choose
from .linear import BLOCK
from .outputs import in_large_pages
from .pointers import f32, i32, i64, load, stack
from .quick import settled_rows
from .rows import take_rows
from .sweep import finishing
from .tile import PANEL, Float, Int8

KINDS: dict[tuple[torch.dtype, bool], Any] = {
    (torch.int8, True): Int8,
    (torch.int8, False): Float,
    (torch.float16, False): Wide,
    (torch.bfloat16, False): Wide,
}

# values, columns, starts, outputs, inputs, scale, bias
Numbers = tuple[Tensor, Tensor, Tensor, int, int, Tensor | None, Tensor | None]


def group_sums(kind, rows: int):
    """The sums of ``rows`` interleaved rows for the four groups of a panel, as a function for kernels."""
    sums_of = piece_sums(kind, rows)

    @inlined
    def run(x, w, inputs, starts, panel, start, sums):
        for group in range(GROUPS):
            first, last = load(starts, panel * GROUPS + group), load(starts, panel * GROUPS + group + 1)
            sums_of(x, w, inputs, first, last, start + group * OUTPUTS * 4, sums + group * OUTPUTS * 4)

    return run


def build(kind: Int8 | Float, activation: str):
    """The kernel's Python and its argument letters."""
    take, finish = take_rows(kind), finishing(f32 if isinstance(kind, Float) else i32, (activation,))
    tall, *lower = heights(kind)
    middle = lower[0]
    mix_tall, mix_middle = interleave(kind, tall), interleave(kind, middle)
    tall_sums, middle_sums, single_sums = (group_sums(kind, rows) for rows in (tall, middle, 1))
    start_field = 1 if isinstance(kind, Int8) and kind.isa.zero_point else 2
    sums_memory, step_bytes = stack(types.int32, tall * PANEL), 4 * kind.item

    def block_sparse_linear(
        layer, scale, bias, parameter, row_bytes, stride, scratch, x, m, y, first_panel, last_panel
    ):  # fmt: skip
        header = i64(layer)
        pieces, start, zeros, inputs = load(header, 0), load(header, start_field), load(header, 2), load(header, 3)
        starts, n, k = i32(load(header, 4)), load(header, 5), load(header, 6)
        bias, sums = bias or zeros, sums_memory()
        scales, taken, mixed = scratch, scratch + 64, scratch + 64 + tall * row_bytes
        done = 0
        while done < m:
            now = 1
            if m - done >= tall:
                now = tall
            elif m - done >= middle:
                now = middle
            take(x + done * stride * 4, stride, now, k, 0, taken, row_bytes, scales)
            if now == tall:
                mix_tall(taken, row_bytes, row_bytes // step_bytes, mixed)
            elif now == middle and middle > 1:
                mix_middle(taken, row_bytes, row_bytes // step_bytes, mixed)
            for panel in range(first_panel, last_panel):
                column = panel * PANEL
                first = start + column * 4
                if now == tall:
                    tall_sums(mixed, pieces, inputs, starts, panel, first, sums)
                elif now == middle and middle > 1:
                    middle_sums(mixed, pieces, inputs, starts, panel, first, sums)
                else:
                    single_sums(taken, pieces, inputs, starts, panel, first, sums)
                width = min(PANEL, n - column)
                scale_at, bias_at = f32(scale + column * 4), f32(bias + column * 4)
                y_at = y + (done * n + column) * 4
                if width == PANEL:
                    finish(0, sums, now, PANEL, f32(scales), scale_at, bias_at, y_at, n, parameter)
                else:
                    finish(0, sums, now, width, f32(scales), scale_at, bias_at, y_at, n, parameter)
            done += now

    return block_sparse_linear, "iiifiiiiiiii"


@lru_cache(maxsize=256)
def prepare(kind: Any, activation: str, isa: str | None) -> tuple[Any, float, int]:
    """(the compiled kernel or None, the activation's parameter, the rows of its tallest tile)."""
    entry, parameter = parse(activation)
    made = kind(choose(isa))
    key = ("blocks", kind.__name__, made.isa.name, entry.name)
    return kernel(key, lambda: build(made, entry.name)), parameter, heights(made)[0]


class Layer:
    """What the kernel is told of a layer, whatever its rows; ``held`` are the tensors behind the addresses."""

    def __init__(self, numbers: Numbers, activation: str, dynamic: bool, isa: str | None) -> None:
        values, columns, starts, n, k, scale, bias = numbers
        kind = KINDS[values.dtype, dynamic]
        self.run, parameter, self.tall = prepare(kind, activation, isa)
        self.packed = packed_blocks((values, columns, starts), n, k)
        scale = _ones(n) if scale is None else scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        # whole squares of the tallest tile, and whole cache lines
        row_bytes = (k + 63) // 64 * 64 * kind.item
        self.size = 64 + 2 * self.tall * row_bytes
        at = self.packed.address, scale.data_ptr(), 0 if bias is None else bias.data_ptr()
        self.fixed, self.held = (*at, parameter, row_bytes), (self.packed, scale, bias)
        # rows from which a second thread pays for its waking
        self.parallel_rows = kind.parallel_work / (self.packed.stored * OUTPUTS * 4 + 1)


@lru_cache(maxsize=256)
def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float32, device="cpu")


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
    isa: str | None = None,
) -> Tensor:
    numbers, n = (values, columns, starts, out_features, in_features, scale, bias), out_features
    layer = Layer(numbers, activation, dynamic, isa)
    run = layer.run
    if run is None:
        return block_sparse_linear_reference(x, *numbers, activation, dynamic)
    y, rows = in_large_pages(x.new_empty(*x.shape[:-1], n, dtype=torch.float32)), dense_rows(x.float())
    m, stride = rows.shape[0], rows.stride(0)
    x_at, y_at, fixed, panels = rows.data_ptr(), y.data_ptr(), layer.fixed, layer.packed.count

    def some_rows(start: int, stop: int) -> None:
        rows_at = x_at + start * stride * 4, stop - start, y_at + start * n * 4
        run(*fixed, stride, threads.scratch(layer.size), *rows_at, 0, panels)

    def some_panels(start: int, stop: int) -> None:
        run(*fixed, stride, threads.scratch(layer.size), x_at, m, y_at, start, stop)

    count = 1 if m < layer.parallel_rows else torch.get_num_threads()
    if count > 1 and m < count * 2 * layer.tall:
        threads.run(some_panels, layer.packed.panel_ranges(count))
    elif m:
        threads.run(some_rows, threads.ranges(m, count, layer.tall, BLOCK))
    return y.to(x.dtype)


def settled(
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    out_features: int,
    in_features: int,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    dynamic: bool,
    x: Tensor,
) -> Callable[[Tensor], Tensor | None] | None:
    """The call for inputs of x's shape, all else looked up already; None where that is not the work of one thread.

    It gives None for inputs that are not fp32 and contiguous on a CPU, and once the blocks have been written to. The
    other tensors are read where they lie.
    """
    n, m = out_features, x.shape[:-1].numel()
    dense = all(t is None or t.is_contiguous() for t in (scale, bias))
    if values.is_inference() or not dense or x.dtype != torch.float32 or x.shape[-1] != in_features:
        return None
    layer = Layer((values, columns, starts, n, in_features, scale, bias), activation, dynamic, None)
    run = layer.run
    if run is None or not 0 < m < layer.parallel_rows:
        return None
    weights, fixed = (values, columns, starts), (*layer.fixed, in_features)
    out, held = (*x.shape[:-1], n), layer.held
    return settled_rows(run, fixed, (0, layer.packed.count), x, out, layer.size, weights, held)


block_sparse_linear.settled = settled  # type: ignore[attr-defined]
