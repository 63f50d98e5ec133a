"""sparse_rows_linear on a CPU: rows turned on their side once a block, then every output's nonzeros (``nonzeros.py``).

16-bit values are kept as fp32 beside them: fp32 is what the products are made of.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from numba import types
from torch import Tensor

from ..activations import parse
from ..checks import dense_rows
from ..kept import Kept
from ..sparse_rows_linear import check_stored, sparse_rows_linear_reference
from . import threads
from .activations import ACTIVATIONS
from .engine import kernel
from .instruction_sets import choose
from .linear import BLOCK
from .nonzeros import nonzero_sums
from .outputs import in_large_pages
from .pointers import f32, i32, load, stack, store
from .quick import settled_rows

# outputs that go through the epilogue together
GROUP = 64
# multiply-adds from which a second thread pays for its waking
PARALLEL_WORK = 1 << 18


def build(lanes: int, integers: bool, column_bytes: int, activation: str):
    """The kernel's Python and its argument letters."""
    activate = ACTIVATIONS[activation]
    one, thin, wide = (nonzero_sums(*shape, integers, column_bytes) for shape in ((1, 1), (lanes, 1), (lanes, 2)))
    sums_memory = stack(types.float32, GROUP * 2 * lanes)

    def sparse_rows_linear(
        starts, values, columns, scale, bias, parameter, k, n, stride, scratch, x, m, y, first, last
    ):  # fmt: skip
        sums, begin, offsets = sums_memory(), 0, i32(starts)
        while begin < m:
            left = m - begin
            width = 1 if left == 1 else lanes if left <= lanes else 2 * lanes
            rows, rows_at = min(left, width), x + begin * stride * 4
            if width > 1:
                side = f32(scratch)
                for r in range(rows):
                    row = f32(rows_at + r * stride * 4)
                    for i in range(k):
                        store(side, i * width + r, load(row, i))
                for r in range(rows, width):
                    for i in range(k):
                        store(side, i * width + r, types.float32(0))
                rows_at = scratch
            for group in range(first, last, GROUP):
                count = min(GROUP, last - group)
                for j in range(count):
                    at, end = load(offsets, group + j), load(offsets, group + j + 1)
                    place = sums + j * width * 4
                    if width == 1:
                        one(rows_at, values, columns, at, end, place)
                    elif width == lanes:
                        thin(rows_at, values, columns, at, end, place)
                    else:
                        wide(rows_at, values, columns, at, end, place)
                scale_at, bias_at, found = f32(scale + group * 4), f32(bias + group * 4), f32(sums)
                for r in range(rows):
                    out = f32(y + ((begin + r) * n + group) * 4)
                    for j in range(count):
                        value = load(found, j * width + r) * load(scale_at, j) + load(bias_at, j)
                        store(out, j, activate(value, parameter))
            begin += rows

    return sparse_rows_linear, "iiiiifiiiiiiiii"


class Stored:
    """The nonzeros as the kernel reads them, found to be inside the weight."""

    def __init__(self, values: Tensor, columns: Tensor, starts: Tensor, k: int):
        check_stored(columns, starts, k)
        self.n = starts.numel() - 1
        self.values = values.contiguous() if values.dtype == torch.int8 else values.float().contiguous()
        self.columns, self.starts = columns.contiguous(), starts.clone()
        self.ones, self.zeros = (
            torch.ones(self.n, dtype=torch.float32, device="cpu"),
            torch.zeros(self.n, dtype=torch.float32, device="cpu"),
        )
        self.addresses = self.starts.data_ptr(), self.values.data_ptr(), self.columns.data_ptr()
        self.work = int(starts[-1])


_kept = Kept(Stored)


@lru_cache(maxsize=256)
def prepare(integers: bool, column_bytes: int, activation: str, isa: str | None) -> tuple[Any, float, int]:
    """(the compiled kernel or None, the activation's parameter, the lanes of a vector)."""
    entry, parameter = parse(activation)
    lanes = choose(isa).lanes
    key = ("sparse_rows", str(lanes), f"{'int8' if integers else 'fp32'}", f"{8 * column_bytes}", entry.name)
    return kernel(key, lambda: build(lanes, integers, column_bytes, entry.name)), parameter, lanes


def sparse_rows_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    isa: str | None = None,
) -> Tensor:
    run, parameter, lanes = prepare(values.dtype == torch.int8, columns.element_size(), activation, isa)
    if run is None:
        return sparse_rows_linear_reference(x, values, columns, starts, scale, in_features, bias, activation)
    stored = _kept((values, columns, starts), in_features)
    rows = dense_rows(x.float())
    (m, k), stride, n = rows.shape, rows.stride(0), stored.n
    y = in_large_pages(x.new_empty(*x.shape[:-1], n, dtype=torch.float32))
    scale = stored.ones if scale is None else scale.contiguous()
    bias = stored.zeros if bias is None else bias.contiguous()
    fixed = *stored.addresses, scale.data_ptr(), bias.data_ptr(), parameter, k, n, stride
    block, x_at, y_at = 2 * lanes, rows.data_ptr(), y.data_ptr()
    size = 4 * k * (1 if m == 1 else lanes if m <= lanes else block)

    def some_rows(start: int, stop: int) -> None:
        run(*fixed, threads.scratch(size), x_at + start * stride * 4, stop - start, y_at + start * n * 4, 0, n)

    def some_outputs(start: int, stop: int) -> None:
        run(*fixed, threads.scratch(size), x_at, m, y_at, start, stop)

    count = torch.get_num_threads()
    if m * stored.work < PARALLEL_WORK or count == 1:
        some_rows(0, m)
    elif m >= count * block:
        threads.run(some_rows, threads.ranges(m, count, block, BLOCK))
    else:
        threads.run(some_outputs, threads.ranges(n, count, GROUP))
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _settled(
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    in_features: int,
    bias: Tensor | None,
    activation: str,
    x: Tensor,
) -> Callable[[Tensor], Tensor | None] | None:
    """As ``linear.settled``: all looked up but the input, for calls that one thread does."""
    weights = values, columns, starts
    run, parameter, lanes = prepare(values.dtype == torch.int8, columns.element_size(), activation, None)
    dense = all(vector is None or vector.is_contiguous() for vector in (scale, bias))
    fits = dense and x.dtype == torch.float32 and x.shape[-1] == in_features
    if run is None or not fits or any(weight.is_inference() for weight in weights):
        return None
    stored = _kept(weights, in_features)
    m, n, out = x.shape[:-1].numel(), stored.n, (*x.shape[:-1], stored.n)
    if m == 0 or m * stored.work >= PARALLEL_WORK:
        return None
    scale, bias = stored.ones if scale is None else scale, stored.zeros if bias is None else bias
    fixed = *stored.addresses, scale.data_ptr(), bias.data_ptr(), parameter, in_features, n, in_features
    size = 4 * in_features * (1 if m == 1 else lanes if m <= lanes else 2 * lanes)
    return settled_rows(run, fixed, (0, n), x, out, size, weights, (stored, scale, bias))


sparse_rows_linear.settled = _settled  # type: ignore[attr-defined]
