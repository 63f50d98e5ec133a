"""int8_linear on a CPU: ``linear.py`` with fp32 rows and weights made fp32 in registers."""

from functools import partial

import torch
from torch import Tensor

from ..int8_linear import int8_linear_reference
from .linear import linear, settled
from .tile import Float


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
    isa: str | None = None,
) -> Tensor:
    rows = x.to(compute_dtype or x.dtype).float()
    y = linear(Float, rows, weight, scale, bias, activation, None, isa)
    if y is None:
        return int8_linear_reference(x, weight, scale, bias, activation, compute_dtype)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


int8_linear.settled = partial(settled, Float)  # type: ignore[attr-defined]
