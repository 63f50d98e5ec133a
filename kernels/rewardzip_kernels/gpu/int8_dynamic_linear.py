"""int8_dynamic_linear on a GPU: the rows rounded by ``quantize_rows``, then the int8 form of the int8_linear kernel.

Two launches: rounding inside the product would be done again for every tile of outputs. The rounded rows are padded to
16 bytes, so that any K loads in wide words.
"""

import torch
from torch import Tensor

from ..checks import dense_rows
from .int8_linear import weights_times_rows
from .quantize_rows import quantize_rows


def int8_dynamic_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    x_scale: Tensor | None = None,
) -> Tensor:
    rows = dense_rows(x)
    m, k = rows.shape
    q = torch.empty(m, -(-k // 16) * 16, dtype=torch.int8, device=x.device)[:, :k]
    row_scale = torch.empty(m, dtype=torch.float32, device=x.device)
    quantize_rows(rows, x_scale, q, row_scale)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    weights_times_rows(q, weight, scale, bias, activation, row_scale, y, torch.int8)
    return y
