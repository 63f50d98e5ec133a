"""Rows to int8 and their scales: to the bit what the definition in torch gives."""

import pytest
import torch
from checked import DEVICE, cells, shapes, timed

from rewardzip_kernels import quantize_rows
from rewardzip_kernels.quantize import quantize_rows_reference


@cells
@shapes
@pytest.mark.parametrize("name", ["torch", "quantize_rows"])
def test_quantize_rows(benchmark, name, shape, rows):
    torch.manual_seed(0)
    x = torch.randn(rows, shape[0], device=DEVICE)
    q, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(rows, device=DEVICE)

    def rounded(run):
        run()
        return torch.cat([q.float(), scale[:, None]], 1)

    def define():
        return quantize_rows_reference(x, None, q, scale)

    exact = rounded(define).double()
    q.fill_(1)
    run = define if name == "torch" else lambda: quantize_rows(x, None, (q, scale))
    group = f"quantize_rows: {rows} x {shape[0]}"
    timed(benchmark, group, lambda: rounded(run), exact, tolerance=0, then=run)
