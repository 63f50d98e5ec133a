"""block_sparse_linear on a CPU: rows in groups as tall as the tile, interleaved, under every stored piece of weights.

Blocks of any shape are cut into pieces of 4 inputs x 16 outputs first (``block_packing.py``), the form that one vector
instruction multiplies. Four groups of 16 outputs share the epilogue of ``sweep.py``.
"""

import weakref
from functools import lru_cache
from typing import Any

import torch
from numba import types
from torch import Tensor

from ..activations import parse
from ..block_sparse_linear import _check as check
from ..block_sparse_linear import block_sparse_linear_reference
from ..checks import FLOATS, dense_rows
from . import threads
from .activations import inlined
from .block_packing import GROUPS, packed_blocks
from .block_tile import OUTPUTS, Wide, heights, interleave, piece_sums
from .engine import kernel
from .instruction_sets import choose
from .pointers import f32, i32, i64, load, stack
from .rows import take_rows
from .sweep import finishing
from .tile import PANEL, Float, Int8

KINDS: dict[tuple[torch.dtype, bool], Any] = {
    (torch.int8, True): Int8,
    (torch.int8, False): Float,
    (torch.float16, False): Wide,
    (torch.bfloat16, False): Wide,
}


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


class Plan:
    """What a call needs that its rows do not change; all its tensors but ``values``, with which it goes, are kept."""

    def __init__(
        self,
        values: Tensor,
        columns: Tensor,
        starts: Tensor,
        n: int,
        k: int,
        scale: Tensor | None,
        bias: Tensor | None,
        activation: str,
        dynamic: bool,
        isa: str | None,
    ) -> None:
        kind = KINDS[values.dtype, dynamic]
        self.run, parameter, self.tall = prepare(kind, activation, isa)
        self.layer = packed_blocks((values, columns, starts), n, k)
        self.columns, self.starts, self.n, self.k, self.scale, self.bias = columns, starts, n, k, scale, bias
        self.stamp = _stamp(values, columns, starts, scale, bias)
        # the kernel reads them dense; a copy is never out of date: a change makes another plan
        self.dense = torch.ones(n) if scale is None else scale.contiguous(), None if bias is None else bias.contiguous()
        # whole squares of the tallest tile, and whole cache lines
        row_bytes = (k + 63) // 64 * 64 * kind.item
        self.size = 64 + 2 * self.tall * row_bytes
        scale_at, bias_at = (0 if t is None else t.data_ptr() for t in self.dense)
        self.fixed = self.layer.address, scale_at, bias_at, parameter, row_bytes
        self.row_work, self.parallel_work = self.layer.stored * OUTPUTS * 4, kind.parallel_work


def _stamp(
    values: Tensor, columns: Tensor, starts: Tensor, scale: Tensor | None, bias: Tensor | None
) -> tuple[int, ...]:
    """Where the numbers are, and how often they were changed: counters only grow, so their sum tells."""
    changes = values._version + columns._version + starts._version
    at: tuple[int, ...] = values.data_ptr(), columns.data_ptr(), starts.data_ptr()
    if scale is not None:
        changes, at = changes + scale._version, (*at, scale.data_ptr())
    if bias is not None:
        changes, at = changes + bias._version, (*at, bias.data_ptr())
    return changes, *at


_plans: dict[tuple[Any, ...], Plan] = {}


def _plan(x: Tensor, *arguments: Any) -> Plan:
    """Checks everything, then works a plan out, and keeps it where changes of its tensors are counted."""
    tensors, (activation, dynamic, isa) = arguments[:-3], arguments[-3:]
    check(x, *arguments[:-1])
    counted = not any(isinstance(t, Tensor) and t.is_inference() for t in tensors)
    with torch.inference_mode(False), torch.no_grad():
        if not counted:
            tensors = tuple(t.clone() if isinstance(t, Tensor) else t for t in tensors)
        plan = Plan(*tensors, activation, dynamic, isa)
    if counted:
        key = id(tensors[0]), activation, dynamic, isa
        if key not in _plans:
            weakref.finalize(tensors[0], _plans.pop, key, None).atexit = False
        _plans[key] = plan
    return plan


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
    dtype, shape = x.dtype, x.shape
    plan = _plans.get((id(values), activation, dynamic, isa))
    if not (
        plan is not None
        and plan.columns is columns
        and plan.starts is starts
        and plan.scale is scale
        and plan.bias is bias
        and plan.n == out_features
        and plan.k == in_features
        and dtype in FLOATS
        and len(shape) > 0
        and shape[-1] == in_features
        and plan.stamp == _stamp(values, columns, starts, scale, bias)
    ):
        plan = _plan(x, values, columns, starts, out_features, in_features, scale, bias, activation, dynamic, isa)
    run, n = plan.run, out_features
    if run is None:
        arguments = values, columns, starts, n, in_features, scale, bias, activation, dynamic
        return block_sparse_linear_reference(x, *arguments)
    rows = x if dtype == torch.float32 else x.float()
    if len(shape) == 2 and rows.stride(1) == 1:
        y = rows.new_empty((shape[0], n))
    else:
        y, rows = rows.new_empty((*shape[:-1], n)), dense_rows(rows)
    m, stride = rows.shape[0], rows.stride(0)
    x_at, y_at, fixed, panels = rows.data_ptr(), y.data_ptr(), plan.fixed, plan.layer.count
    if m * plan.row_work < plan.parallel_work or (count := torch.get_num_threads()) == 1:
        run(*fixed, stride, threads.scratch(plan.size), x_at, m, y_at, 0, panels)
        return y if dtype == torch.float32 else y.to(dtype)

    def some_rows(start: int, stop: int) -> None:
        rows_at = x_at + start * stride * 4, stop - start, y_at + start * n * 4
        run(*fixed, stride, threads.scratch(plan.size), *rows_at, 0, panels)

    def some_panels(start: int, stop: int) -> None:
        run(*fixed, stride, threads.scratch(plan.size), x_at, m, y_at, start, stop)

    if m >= count * 2 * plan.tall:
        threads.run(some_rows, threads.ranges(m, count, plan.tall))
    else:
        threads.run(some_panels, plan.layer.panel_ranges(count))
    return y if dtype == torch.float32 else y.to(dtype)


block_sparse_linear.checks = True  # type: ignore[attr-defined]
