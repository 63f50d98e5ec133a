"""quantize_rows on a CPU: the row function that ``int8_dynamic_linear`` also uses, over a matrix."""

from typing import Any

import torch
from torch import Tensor

from ..checks import dense_rows
from ..quantize import quantize_rows_reference
from . import threads
from .engine import kernel
from .pointers import f32, store
from .rows import quantize


def _build() -> tuple[Any, str]:
    fill = quantize(0)

    def quantize_rows(x, stride, m, k, static, q, scale):
        for r in range(m):
            store(f32(scale), r, fill(x + r * stride * 4, k, k, static, q + r * k))

    return quantize_rows, "iiiiiii"


def quantize_rows(x: Tensor, static_scale: Tensor | None, q: Tensor, scale: Tensor) -> None:
    run = kernel(("quantize_rows",), _build)
    if run is None or not (q.is_contiguous() and scale.is_contiguous()):
        return quantize_rows_reference(x, static_scale, q, scale)
    rows = dense_rows(x.float())
    m, k = rows.shape
    stride, static = rows.stride(0), 0 if static_scale is None else static_scale.data_ptr()
    x_at, q_at, scale_at = rows.data_ptr(), q.data_ptr(), scale.data_ptr()

    def some_rows(start: int, stop: int) -> None:
        run(x_at + start * stride * 4, stride, stop - start, k, static, q_at + start * k, scale_at + start * 4)

    # a row's element costs as much as some ten multiply-adds
    count = torch.get_num_threads() if 10 * m * k >= threads.PARALLEL_WORK else 1
    threads.run(some_rows, threads.ranges(m, count, 1))
