"""int8_linear on a CPU: ``linear.py`` with fp32 rows and weights made fp32 in registers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..int8_linear import int8_linear_reference
from .linear import linear, settled
from .packing import packed
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
    y = linear(Float, rows, lambda: packed(weight), scale, bias, activation, None, isa)
    if y is None:
        return int8_linear_reference(x, weight, scale, bias, activation, compute_dtype)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _settled(weight: Tensor, *rest: Any) -> Callable[[Tensor], Tensor | None] | None:
    return settled(Float, packed, (weight,), *rest)


int8_linear.settled = _settled  # type: ignore[attr-defined]
